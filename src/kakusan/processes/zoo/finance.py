r"""Processes of finance: prices, alone or with a variance that moves by itself.

Itô's equation is meant; `flow` and `kick` split Stratonovich's version of it.

References:
    The pricing of options and corporate liabilities (Black and Scholes, 1973), doi 10.1086/260062
    A closed-form solution for options with stochastic volatility (Heston, 1993),
        doi 10.1093/rfs/6.2.327
"""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor

from kakusan.core.operators import Dense, Diagonal, Operator
from kakusan.core.types import Field, State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.processes.sde import KnownTransition, Splittable
from kakusan.processes.zoo.laws import (
    Moments,
    decayed,
    gaussian_score,
    log_gaussian,
    per_coordinate,
)
from kakusan.processes.zoo.parameters import (
    Given,
    Value,
    at,
    beside,
    common_size,
    frozen,
    holds,
    keep,
    like,
    parameter,
    resting,
)


def _matrix(rows: list[list[Value]]) -> Tensor:
    """Numbers and tensors as one matrix of float64, keeping their graphs."""
    return torch.stack([torch.stack([as_time(c) for c in row]) for row in rows])


def _correlation(given: Given | None) -> Tensor | None:
    if given is None:
        return None
    C = torch.as_tensor(parameter("correlation", given, dims=2))
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise KakusanError(f"correlation must be a square matrix, got shape {tuple(C.shape)}")
    if not holds((C - C.mT).abs() < 1e-12) or not holds((C.diagonal() - 1).abs() < 1e-12):
        raise KakusanError(
            f"correlation must be symmetric with ones on its diagonal, got {C.tolist()}"
        )
    if torch.linalg.cholesky_ex(C.detach()).info.item():
        raise KakusanError(f"correlation must be positive definite, got {C.tolist()}")
    return C


@frozen
class GeometricBrownian(KnownTransition, Splittable):
    r"""Geometric Brownian motion, :math:`dX_i = \mu_i X_i \, dt + \sigma_i X_i \, dB_i`.

    The B_i are Brownian motions with the given correlation. log X_t is a Brownian motion with
    drift mu - sigma² / 2, so the exact step follows the path.

    Arguments:
        mu: Growth, per unit of time: a number or one for each coordinate (d,).
        sigma: Volatility, > 0, per square root of time: a number or (d,).
        correlation: (d, d), symmetric, positive definite, with ones on its diagonal.
        span: Where time starts and ends.

    References:
        The pricing of options and corporate liabilities (Black and Scholes, 1973)

    Example:
        >>> gbm = GeometricBrownian(mu=0.0, sigma=0.5)
        >>> gbm.moments(torch.ones(1, 1), 1.0).covariance  # exp(sigma²) - 1
        tensor([[[0.2840]]])
    """

    mu: Value
    sigma: Value
    correlation: Tensor | None
    span: tuple[float, float]

    def __init__(
        self,
        mu: Given = 0.05,
        sigma: Given = 0.2,
        correlation: Given | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        m = parameter("mu", mu, dims=1)
        g = parameter("sigma", sigma, dims=1, above=0.0)
        C = _correlation(correlation)
        common_size(mu=m, sigma=g, **({} if C is None else {"correlation": C}))
        keep(self, mu=m, sigma=g, correlation=C, span=span)
        if C is not None:
            scale = (g if isinstance(g, Tensor) else C.new_tensor(g)).expand(len(C))
            root = scale.unsqueeze(-1) * torch.linalg.cholesky(C)
            keep(self, _root=root, _gram=root @ root.mT)

    _root: Tensor = field(init=False, repr=False)
    _gram: Tensor = field(init=False, repr=False)

    @property
    def start(self) -> Tensor:
        """One unit of each."""
        more = {} if self.correlation is None else {"correlation": self.correlation}
        return resting(1.0, mu=self.mu, sigma=self.sigma, **more)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return like(self.mu, x) * x

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        if self.correlation is None:
            return Diagonal(like(self.sigma, x) * x)
        return Dense(x.unsqueeze(-1) * self._root.to(x))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        if self.correlation is None:
            return like(2 * self.sigma**2, x) * x
        # ∂_j (D_ij x_i x_j) gives x_i D_ij for each j, and once more for j = i
        return x * (self._gram.sum(1) + self._gram.diagonal()).to(x)

    def _noise(self, dw: Tensor) -> Tensor:
        """What dw adds to log x."""
        if self.correlation is None:
            return like(self.sigma, dw) * dw
        return dw @ self._root.to(dw).mT

    def _growth(self, x: State) -> Value:
        """Of log x: mu - sigma² / 2."""
        return at(self.mu - self.sigma**2 / 2, x)

    def flow(self, x: State, t: Time, s: Time) -> State:  # noqa: D102
        return x * torch.exp(self._growth(x) * beside(as_time(s) - as_time(t), x)).to(x)

    def kick(self, x: State, t: Time, dw: Tensor) -> State:  # noqa: D102
        return x * torch.exp(self._noise(dw))

    def exact(self, x: State, t: Time, s: Time, dw: Tensor, source: torch.Generator) -> State:
        """The solution along the path: x exp((mu - sigma² / 2)(s - t) + sigma dw)."""
        return self.kick(self.flow(x, t, s), t, dw)

    def _log_law(self, x0: State, t: Time) -> tuple[Tensor, Tensor]:
        """Mean and covariance (d, d) or (B, d, d) of log x for vectors, in float64."""
        h = beside(t, x0)
        mean = x0.double().log() + self._growth(x0) * h
        if self.correlation is None:
            variance = at(self.sigma**2, x0) * h
            return mean, torch.diag_embed(variance.expand_as(x0))
        return mean, self._gram.to(x0.device) * beside(t, x0).unsqueeze(-1)

    def moments(self, x0: State, t: float | Time) -> Moments:
        """Mean (B, d) and covariance (B, d, d) of X_t given X_0 = x0."""
        h = beside(t, x0)
        mean = x0 * torch.exp(at(self.mu, x0) * h)
        if self.correlation is None:
            return per_coordinate(mean, mean**2 * torch.expm1(at(self.sigma**2, x0) * h), x0)
        C = self._gram.to(x0.device) * beside(t, x0).unsqueeze(-1)
        return Moments(mean.to(x0), (mean[:, :, None] * mean[:, None] * torch.expm1(C)).to(x0))

    def log_transition(self, x: State, x0: State, t: float | Time) -> Tensor:
        """Log p(X_t = x | X_0 = x0), with shape (B,), for x and x0 > 0."""
        y = x.double().log().flatten(1)
        mean, C = self._log_law(x0.flatten(1).expand_as(y), as_time(t))
        return (log_gaussian(y, mean, C) - y.sum(1)).to(x.dtype)

    def score_from(self, x0: State) -> Field:
        """The field (x, t) -> ∇log p(X_t = x | X_0 = x0), for x > 0."""

        def score(x: State, t: Time) -> State:
            y = x.double().log().flatten(1)
            mean, C = self._log_law(x0.flatten(1).expand_as(y), as_time(t))
            return ((gaussian_score(y, mean, C) - 1).reshape(x.shape) / x).to(x.dtype)

        return score


@frozen
class Heston(Splittable):
    r"""Heston's model of a log-price X and its variance v, the two coordinates of the state.

    .. math:: dX = (\mu - v / 2) \, dt + \sqrt v \, (\sqrt{1 - \rho^2} \, dW_1 + \rho \, dW_2)

    .. math:: dv = \kappa (\theta - v) \, dt + \sigma \sqrt v \, dW_2

    The price is S = exp(X), with E[S_t] = S_0 exp(mu t). All moments of (X, v) are closed, since
    the generator maps polynomials to polynomials of no higher degree; v alone is `CIR`.

    Arguments:
        mu: Growth of the price, per unit of time.
        rate: kappa > 0, how fast the variance relaxes.
        mean: theta > 0, the variance it relaxes to.
        sigma: > 0, the volatility of the variance.
        rho: The correlation of price and variance, in (-1, 1).
        span: Where time starts and ends.

    References:
        A closed-form solution for options with stochastic volatility (Heston, 1993)

    Example:
        >>> heston = Heston(mu=0.0, rate=1.0, mean=0.04, sigma=0.2, rho=0.0)
        >>> heston.drift(torch.tensor([[0.0, 0.08]]), torch.tensor(0.0))
        tensor([[-0.0400, -0.0400]])
    """

    mu: Value
    rate: Value
    mean: Value
    sigma: Value
    rho: Value
    span: tuple[float, float]
    domain = "v >= 0 (the second coordinate)"

    def __init__(
        self,
        mu: float | Tensor = 0.05,
        rate: float | Tensor = 2.0,
        mean: float | Tensor = 0.04,
        sigma: float | Tensor = 0.3,
        rho: float | Tensor = -0.7,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        m = parameter("mu", mu)
        kappa = parameter("rate", rate, above=0.0)
        theta = parameter("mean", mean, above=0.0)
        g = parameter("sigma", sigma, above=0.0)
        r = parameter("rho", rho, above=-1.0, below=1.0)
        keep(self, mu=m, rate=kappa, mean=theta, sigma=g, rho=r, span=span)
        keep(self, _splits=holds(4 * kappa * theta - g**2 >= 0))
        keep(self, _root=_matrix([[(1 - r**2) ** 0.5, r], [0.0, g]]))

    _splits: bool = field(init=False, repr=False)
    _root: Tensor = field(init=False, repr=False)

    @property
    def start(self) -> Tensor:
        """A price of 1 and the mean variance."""
        return torch.tensor([0.0, float(self.mean)], dtype=torch.float64)

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return x[:, 1] >= 0

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        v = x[:, 1:]
        relaxing = (v - like(self.mean, x)) * like(-self.rate, x)
        return torch.cat([v * -0.5 + like(self.mu, x), relaxing], 1)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Dense(x[:, 1:].sqrt().unsqueeze(-1) * self._root.to(x))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return (self._root[1] @ self._root.mT).to(x).expand_as(x)

    def flow(self, x: State, t: Time, s: Time) -> State:
        """The drift less (rho sigma, sigma²) / 4: v relaxes, X follows its integral."""
        if not self._splits:
            raise KakusanError(
                f"the flow of Heston keeps v >= 0 only where 4 rate mean >= sigma², got {self}"
            )
        h = beside(as_time(s) - as_time(t), x)
        rest = self.mean - self.sigma**2 / (4 * self.rate)
        away = x[:, 1:].double() - rest
        growth = self.mu - self.rho * self.sigma / 4 - rest / 2
        y = x[:, :1] + growth * h - away / 2 * decayed(self.rate, h)
        v = (rest + away * torch.exp(-self.rate * h)).clamp(min=0)
        return torch.cat([y, v], 1).to(x.dtype)

    def kick(self, x: State, t: Time, dw: Tensor) -> State:
        """Along dw the root of v is linear, and X adds its mean on the way."""
        w = dw @ self._root.to(dw).mT
        r = x[:, 1:].sqrt()
        return torch.cat([x[:, :1] + w[:, :1] * (r + w[:, 1:] / 4), (r + w[:, 1:] / 2) ** 2], 1)

    def moments(self, x0: State, t: float | Time) -> Moments:
        """Mean (B, 2) and covariance (B, 2, 2) of (X, v) given x0.

        The generator acts on the polynomials 1, y, v, y², y v, v² with y = X - X_0 by a matrix.
        """
        m, kappa, g = self.mu, self.rate, self.sigma
        pull, cross, zero = kappa * self.mean, self.rho * g, 0.0
        L = _matrix(
            [
                [zero] * 6,
                [m, zero, -0.5, zero, zero, zero],
                [pull, zero, -kappa, zero, zero, zero],
                [zero, 2 * m, 1.0, zero, -1.0, zero],
                [zero, pull, m + cross, zero, -kappa, -0.5],
                [zero, zero, 2 * pull + g**2, zero, zero, -2 * kappa],
            ]
        )
        v0 = x0[:, 1].double()
        zeros = torch.zeros_like(v0)
        basis = torch.stack([zeros + 1, zeros, v0, zeros, zeros, v0**2], 1)
        flow = torch.linalg.matrix_exp(L.to(v0) * as_time(t)[..., None, None])
        _, y, v, yy, yv, vv = (flow @ basis.unsqueeze(-1)).squeeze(-1).unbind(1)
        C = torch.stack([yy - y * y, yv - y * v, yv - y * v, vv - v * v], 1).reshape(-1, 2, 2)
        return Moments(torch.stack([x0[:, 0] + y, v], 1).to(x0), C.to(x0))
