r"""Linear processes: everything about them is a normal law.

.. math:: dX = -A (X - m) \, dt + G \, dW, \qquad
          X_t \mid x_0 \sim N(m + e^{-At} (x_0 - m), \, Q_t), \quad
          \dot Q = -A Q - Q A^\top + G G^\top .

Where A and G are numbers or vectors each coordinate goes its own way, and states may have any
shape; with a matrix states are vectors. Q comes from one power series, so A may be singular and
G degenerate; a density then exists where the noise reaches every coordinate.

References:
    On the theory of the Brownian motion (Uhlenbeck and Ornstein, 1930), doi 10.1103/PhysRev.36.823
    Score-based generative modeling with critically-damped Langevin diffusion (Dockhorn, Vahdat and
        Kreis, 2022), arXiv 2112.07068
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kakusan.core.operators import Dense, Diagonal, Operator, Scale
from kakusan.core.types import Field, State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.processes.sde import KnownTransition
from kakusan.processes.zoo.laws import (
    LinearSeries,
    Moments,
    decayed,
    gaussian_score,
    linear_kernel,
    linear_series,
    log_gaussian,
    log_normal,
    lyapunov,
    per_coordinate,
    root,
    total,
)
from kakusan.processes.zoo.parameters import (
    Given,
    Value,
    at,
    beside,
    common_size,
    count,
    filled,
    frozen,
    holds,
    keep,
    like,
    parameter,
    resting,
    square,
)


def constant(sigma: Value, x: State) -> Operator:
    """A constant G in its plainest form: a number, a diagonal or a matrix."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return Scale(filled(sigma, x))
    return Diagonal(sigma.to(x)) if sigma.ndim == 1 else Dense(sigma.to(x))


def _normals(dw: Tensor, h: Time, d: int, source: torch.Generator) -> Tensor:
    """(B, d) normal numbers from an increment over h: the spare are dropped, the missing drawn."""
    z = (dw / beside(h, dw).sqrt().to(dw)).flatten(1)
    if z.shape[1] >= d:
        return z[:, :d]
    more = torch.randn(len(z), d - z.shape[1], generator=source, dtype=z.dtype, device=z.device)
    return torch.cat([z, more], 1)


class _Linear(KnownTransition):
    """The laws of dX = -rate (X - mean) dt + sigma dW with constant coefficients."""

    rate: Value = 0.0
    sigma: Value = 1.0
    mean: Value = 0.0

    def drift(self, x: State, t: Time) -> State:
        away = x - like(self.mean, x)
        if isinstance(self.rate, Tensor) and self.rate.ndim == 2:
            return away @ -self.rate.to(x).mT
        return away * like(-self.rate, x)

    def diffusion(self, x: State, t: Time) -> Operator:
        return constant(self.sigma, x)

    def gram_divergence(self, x: State, t: Time) -> State:
        return torch.zeros_like(x)

    @property
    def _by_coordinate(self) -> bool:
        """Whether neither A nor G mixes coordinates."""
        return all(not isinstance(c, Tensor) or c.ndim < 2 for c in (self.rate, self.sigma))

    def _factors(self, t: Time, x: State) -> tuple[Tensor, Tensor]:
        """exp(-At) and Q_t, coordinate by coordinate: float64, broadcasting with x."""
        h, rate = beside(t, x), at(self.rate, x)
        return torch.exp(-rate * h), at(self.sigma, x) ** 2 * decayed(2 * rate, h)

    def _matrices(self, x: State) -> tuple[Tensor, Tensor]:
        """A and GGᵀ, (d, d), for vectors x."""
        eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        A, G = (
            c if isinstance(c, Tensor) and c.ndim == 2 else c * eye
            for c in (at(self.rate, x), at(self.sigma, x))
        )
        return A, G @ G.mT

    def _series(self, x: State) -> LinearSeries:
        """What all times share; remembered unless a fit runs gradients through it."""
        known = self.__dict__.get("_known")
        if known is None:
            with torch.inference_mode(False):
                A, D = self._matrices(x)
                known = linear_series(-A, D)
            given = (self.rate, self.sigma)
            if not any(isinstance(c, Tensor) and c.requires_grad for c in given):
                keep(self, _known=known)
        return LinearSeries(known.size, known.E.to(x.device), known.Q.to(x.device))

    def _kernel(self, x0: State, t: Time) -> tuple[Tensor, Tensor]:
        """Mean (B, d) and covariance (d, d) or (B, d, d) given vectors x0, in float64."""
        E, Q = linear_kernel(self._series(x0), t.to(x0.device))
        mean = like(self.mean, x0.double())
        return mean + (E @ (x0.double() - mean).unsqueeze(-1)).squeeze(-1), Q

    def exact(self, x: State, t: Time, s: Time, dw: Tensor, source: torch.Generator) -> State:
        h = as_time(s) - as_time(t)
        if self._by_coordinate:
            E, Q = self._factors(h, x)
            mean = like(self.mean, x)
            return mean + E.to(x) * (x - mean) + (Q / beside(h, x)).sqrt().to(x) * dw
        mean, Q = self._kernel(x, h)
        z = _normals(dw, h, x.shape[1], source)
        return (mean + (root(Q) @ z.double().unsqueeze(-1)).squeeze(-1)).to(x.dtype)

    def moments(self, x0: State, t: float | Time) -> Moments:
        """Mean (B, d) and covariance (B, d, d) of X_t given X_0 = x0."""
        if self._by_coordinate:
            E, Q = self._factors(as_time(t), x0)
            mean = like(self.mean, x0)
            return per_coordinate(mean + E * (x0 - mean), Q, x0)
        mean, Q = self._kernel(x0, as_time(t))
        return Moments(mean.to(x0), Q.to(x0).expand(*mean.shape, mean.shape[1]))

    def log_transition(self, x: State, x0: State, t: float | Time) -> Tensor:
        """Log p(X_t = x | X_0 = x0), with shape (B,)."""
        if self._by_coordinate:
            E, Q = self._factors(as_time(t), x)
            mean = like(self.mean, x)
            return total(log_normal(x.double(), mean + E * (x0 - mean), Q), x)
        mean, Q = self._kernel(x0, as_time(t))
        return log_gaussian(x.double(), mean, Q).to(x.dtype)

    def score_from(self, x0: State) -> Field:
        """The field (x, t) -> ∇log p(X_t = x | X_0 = x0)."""

        def score(x: State, t: Time) -> State:
            if self._by_coordinate:
                E, Q = self._factors(t, x)
                mean = like(self.mean, x)
                return ((mean + E * (x0 - mean) - x) / Q).to(x.dtype)
            mean, Q = self._kernel(x0, as_time(t))
            return gaussian_score(x.double(), mean, Q).to(x.dtype)

        return score


@frozen
class Brownian(_Linear):
    r"""Brownian motion, :math:`dX = \sigma \, dW`.

    X_t given x_0 is N(x_0, σσᵀ t); there is no stationary law. The exact step is Euler's.

    Arguments:
        sigma: A number, one for each coordinate (d,), or a matrix (d, m). Per square root of time.
        span: Where time starts and ends.

    Example:
        >>> Brownian(2.0).moments(torch.zeros(1, 1), 0.25)
        Moments(mean=tensor([[0.]]), covariance=tensor([[[1.]]]))
    """

    sigma: Value
    span: tuple[float, float]

    def __init__(self, sigma: Given = 1.0, span: tuple[float, float] = (0.0, 1.0)) -> None:
        keep(self, sigma=parameter("sigma", sigma, dims=2), span=span)

    @property
    def start(self) -> Tensor:
        """The origin."""
        return resting(0.0, sigma=self.sigma)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def exact(self, x: State, t: Time, s: Time, dw: Tensor, source: torch.Generator) -> State:
        """The solution along the path: x + sigma dw."""
        return x + self.diffusion(x, t).mv(dw)


@frozen
class OrnsteinUhlenbeck(_Linear):
    r"""The Ornstein-Uhlenbeck process, :math:`dX = -A (X - m) \, dt + G \, dW`.

    The only stationary process that is Gaussian and Markov. Where all eigenvalues of A have
    positive real parts it settles in N(m, S) with A S + S Aᵀ = GGᵀ; in one dimension S is
    sigma² / (2 rate). It is reversible where A GGᵀ is symmetric.

    Arguments:
        rate: A, per unit of time: a number, one for each coordinate (d,), or a matrix (d, d). It
            may be negative or singular.
        sigma: G: a number, one for each coordinate (d,), or a matrix (d, m).
        mean: m: a number, or one for each coordinate (d,).
        span: Where time starts and ends.

    References:
        On the theory of the Brownian motion (Uhlenbeck and Ornstein, 1930)

    Example:
        >>> ou = OrnsteinUhlenbeck(rate=0.5, sigma=1.0)
        >>> x = torch.zeros(1, 1, dtype=torch.float64)
        >>> ou.moments(x + 1, 50.0).covariance  # sigma² / (2 rate)
        tensor([[[1.]]], dtype=torch.float64)
        >>> ou.log_stationary(x)
        tensor([-0.9189], dtype=torch.float64)
    """

    rate: Value
    sigma: Value
    mean: Value
    span: tuple[float, float]

    def __init__(
        self,
        rate: Given = 1.0,
        sigma: Given = 1.0,
        mean: Given = 0.0,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        A = square("rate", parameter("rate", rate, dims=2))
        G = parameter("sigma", sigma, dims=2)
        m = parameter("mean", mean, dims=1)
        common_size(rate=A, sigma=G, mean=m)
        keep(self, rate=A, sigma=G, mean=m, span=span)

    @property
    def start(self) -> Tensor:
        """One away from the mean, in each coordinate."""
        return resting(self.mean + 1, rate=self.rate, sigma=self.sigma, mean=self.mean)

    def log_stationary(self, x: State) -> Tensor:
        """The logarithm of the stationary density, (B,), normalised."""
        y = x.double()
        mean = filled(self.mean, y)
        if self._by_coordinate:
            if not holds(self.rate > 0):
                raise KakusanError(f"a stationary law needs rate > 0, got {self.rate}")
            return total(log_normal(y, mean, filled(self.sigma**2 / (2 * self.rate), y)), x)
        A, D = self._matrices(x)
        real = torch.linalg.eigvals(A.detach()).real
        if not holds(real > 0):
            raise KakusanError(
                "a stationary law needs a rate whose eigenvalues have positive real parts, got "
                f"{real.tolist()}"
            )
        return log_gaussian(y, mean, lyapunov(-A, D)).to(x.dtype)


@frozen
class CriticallyDamped(_Linear):
    r"""Critically damped Langevin diffusion, data x and velocity v stacked in one state (B, 2d).

    .. math:: dx = \beta M^{-1} v \, dt, \qquad
              dv = -\beta (x + \Gamma M^{-1} v) \, dt + \sqrt{2 \Gamma \beta} \, dW .

    Noise enters v alone and reaches x through it; the law given (x_0, v_0) is normal with a
    density all the same. Stationary law N(0, I) for x, N(0, M I) for v. Gamma² = 4M is critical
    damping, the fastest way there without oscillation.

    Arguments:
        beta: The speed of time.
        mass: M.
        gamma: Friction; 0 means critical, 2 sqrt(mass).
        dim: The number d of data coordinates.
        span: Where time starts and ends.

    References:
        Score-based generative modeling with critically-damped Langevin diffusion (Dockhorn et al.,
            2022), arXiv 2112.07068

    Example:
        >>> cld = CriticallyDamped()
        >>> cld.drift(torch.tensor([[1.0, 0.5]]), torch.tensor(0.0))
        tensor([[  8., -12.]])
    """

    beta: float
    mass: float
    gamma: float
    dim: int
    span: tuple[float, float]

    def __init__(
        self,
        beta: float = 4.0,
        mass: float = 0.25,
        gamma: float = 0.0,
        dim: int = 1,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        b, M = (float(parameter(k, c, above=0.0)) for k, c in (("beta", beta), ("mass", mass)))
        friction = float(parameter("gamma", gamma, least=0.0)) or 2 * math.sqrt(M)
        eye, zero = torch.eye(count("dim", dim), dtype=torch.float64), torch.zeros(dim, dim)
        A = torch.cat(
            [
                torch.cat([zero, -b / M * eye], 1),
                torch.cat([b * eye, b * friction / M * eye], 1),
            ]
        )
        noise = torch.tensor([0.0, math.sqrt(2 * friction * b)], dtype=torch.float64)
        keep(self, beta=b, mass=M, gamma=friction, dim=dim, span=span)
        keep(self, rate=A, sigma=noise.repeat_interleave(dim))

    @property
    def start(self) -> Tensor:
        """Data at 1, at rest."""
        return torch.cat([torch.ones(self.dim), torch.zeros(self.dim)]).double()

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        q, v = x.chunk(2, 1)
        u = v * (self.beta / self.mass)
        return torch.cat([u, -self.beta * q - self.gamma * u], 1)

    def log_stationary(self, x: State) -> Tensor:
        """The logarithm of the stationary density, (B,), normalised."""
        q, v = x.double().chunk(2, 1)
        zero = torch.zeros_like(q)
        return total(log_normal(q, zero, zero + 1) + log_normal(v, zero, zero + self.mass), q).to(
            x
        )
