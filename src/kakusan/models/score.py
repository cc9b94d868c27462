r"""Scores that are known exactly: the truth that samplers and losses are tested against.

Under a linear SDE a mixture Σ w_k N(mu_k, C_k) stays one, p_t = Σ w_k N(alpha mu_k, S_k) with
S_k = alpha² C_k + sigma² I, and the score is Σ_k r_k S_k⁻¹ (alpha mu_k - x) with the
responsibilities r. A finite data set is the mixture with C_k = 0: its exact score leads every
sampler back to the training points, which is what memorisation looks like.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kakusan.core.types import State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE, ScoreField


def _beside(c: Tensor, x: State, ndim: int) -> Tensor:
    """Coefficients () or (B,) on the device of x, as (1 or B, 1, ...)."""
    return c.to(x.device).reshape(-1, *(1,) * (ndim - 1))


class ExactMixture(ScoreField):
    """The score of a Gaussian mixture under a linear SDE; on vectors.

    Arguments:
        process: The forward process.
        weights: (K,), positive; they are normalised.
        means: (K, d).
        covariances: (K, d, d).

    Example:
        >>> from kakusan.processes.linear import VP
        >>> one = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> one(torch.tensor([[1.0, 2.0]]), torch.tensor(0.3))
        tensor([[-1., -2.]])
    """

    def __init__(
        self, process: LinearSDE, weights: Tensor, means: Tensor, covariances: Tensor
    ) -> None:
        K, d = means.shape
        if weights.shape != (K,) or covariances.shape != (K, d, d):
            raise KakusanError(
                f"a mixture has weights (K,), means (K, d) and covariances (K, d, d), got "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(covariances.shape)}"
            )
        self.process = process
        self.weights, self.means = (weights / weights.sum()).double(), means.double()
        # S_k⁻¹ shares its eigenvectors with C_k at every time
        self.values, self.vectors = torch.linalg.eigh(covariances.double())

    def _parts(self, x: State, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        self._join(x.device)
        alpha, variance = (
            _beside(c(as_time(t)), x, 3) for c in (self.process.alpha, self.process.variance)
        )
        S = alpha**2 * self.values + variance  # (B or 1, K, d) eigenvalues
        delta = (alpha * self.means - x.double().unsqueeze(1)).unsqueeze(-2) @ self.vectors
        delta = delta.squeeze(-2)
        log_p = self.weights.log() - 0.5 * (delta**2 / S + S.log()).sum(-1)
        return log_p - 0.5 * x.shape[1] * math.log(2 * math.pi), delta, S

    def _join(self, device: torch.device) -> None:
        """Follows the states to their device."""
        if self.means.device != device:
            for name in ("weights", "means", "values", "vectors"):
                setattr(self, name, getattr(self, name).to(device))

    def log_prob(self, x: State, t: Time) -> Tensor:
        """Log p_t(x), with shape (B,), in float64."""
        return self._parts(x, t)[0].logsumexp(1)

    def __call__(self, x: State, t: Time) -> State:
        """∇log p_t(x)."""
        log_p, delta, S = self._parts(x, t)
        pull = ((delta / S).unsqueeze(-2) @ self.vectors.mT).squeeze(-2)
        return (log_p.softmax(1).unsqueeze(-1) * pull).sum(1).to(x.dtype)

    def denoised(self, x: State, t: Time) -> State:
        """E[x_0 | x_t = x]: the responsibilities' average of the posterior means."""
        alpha = _beside(self.process.alpha(as_time(t)), x, 3)
        log_p, delta, S = self._parts(x, t)
        # mu - C alpha S⁻¹ (alpha mu - x): no division by alpha or sigma
        back = ((alpha * self.values * delta / S).unsqueeze(-2) @ self.vectors.mT).squeeze(-2)
        return (log_p.softmax(1).unsqueeze(-1) * (self.means - back)).sum(1).to(x.dtype)

    def velocity(self, x: State, t: Time) -> State:
        """The angular velocity (alpha eps - sigma x_0) / r; regular at both ends of time."""
        alpha, sigma = self.process.alpha(as_time(t)), self.process.sigma(as_time(t))
        eps = -per_sample(sigma, x) * self(x, t)
        v = per_sample(alpha, x) * eps - per_sample(sigma, x) * self.denoised(x, t)
        return v / per_sample(torch.hypot(alpha, sigma), x)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of the data, (n, d), in float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        root = self.vectors[k] @ (self.values[k].sqrt() * z).unsqueeze(-1)
        return self.means[k] + root.squeeze(-1)


class ExactEmpirical(ScoreField):
    """The score of a finite data set under a linear SDE, for states of any shape.

    Arguments:
        process: The forward process.
        data: The points, (N, *shape).
    """

    def __init__(self, process: LinearSDE, data: Tensor) -> None:
        self.process, self.data = process, data

    def denoised(self, x: State, t: Time) -> State:
        """E[x_0 | x_t = x]: the points' average, weighted by exp(-|x - alpha y|² / 2 sigma²)."""
        alpha = _beside(self.process.alpha(as_time(t)), x, 2)
        variance = _beside(self.process.variance(as_time(t)), x, 2)
        u, y = x.flatten(1).double(), self.data.to(x.device).flatten(1).double()
        # |x - alpha y|² less |x|², which all points share
        distance = alpha**2 * (y**2).sum(1) - 2 * alpha * (u @ y.T)
        gap = distance - distance.amin(1, keepdim=True)
        # at sigma = 0 only the nearest point is left: 0/0 must read as 0 there
        weights = (-gap / (2 * variance).clamp(min=1e-300)).softmax(1)
        return (weights @ y).reshape(x.shape).to(x.dtype)

    def __call__(self, x: State, t: Time) -> State:
        """∇log p_t(x) = (alpha E[x_0 | x] - x) / sigma²."""
        alpha, variance = (c(as_time(t)) for c in (self.process.alpha, self.process.variance))
        return (per_sample(alpha, x) * self.denoised(x, t) - x) / per_sample(variance, x)

    def velocity(self, x: State, t: Time) -> State:
        """The angular velocity (cos(phi) x / r - x_0) / sin(phi)."""
        alpha, sigma = (c(as_time(t)) for c in (self.process.alpha, self.process.sigma))
        r = torch.hypot(alpha, sigma)
        y = per_sample(alpha / r**2, x) * x - self.denoised(x, t)
        return per_sample(r / sigma, x) * y
