r"""Square-root noise that vanishes at the edge of a domain: processes of rates and frequencies.

Itô's equation is meant; `flow` and `kick` split Stratonovich's version, whose drift is less by
∇·(GGᵀ) / 4. The processes hold on to their domain even where a step of Euler's does not: outside,
`diffusion` gives NaN, on purpose, and a solver tells. They belong to Pearson's family (linear
drift, quadratic GGᵀ), so all their moments are closed.

References:
    A theory of the term structure of interest rates (Cox, Ingersoll and Ross, 1985),
        doi 10.2307/1911242
    The Pearson diffusions (Forman and Sørensen, 2008), doi 10.1111/j.1467-9469.2007.00592.x
"""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor, _standard_gamma  # pyright: ignore[reportPrivateImportUsage]

from kakusan.core.operators import Diagonal, Operator
from kakusan.core.types import Field, State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.processes.sde import KnownTransition, Splittable
from kakusan.processes.zoo.laws import (
    Moments,
    decayed,
    log_bessel,
    log_chi_square,
    per_coordinate,
    total,
)
from kakusan.processes.zoo.parameters import (
    Given,
    Value,
    at,
    beside,
    common_size,
    filled,
    frozen,
    holds,
    keep,
    like,
    parameter,
    resting,
)


def _relaxed(x: State, rest: Value, rate: Value, t: Time, s: Time) -> State:
    """The solution of dx = rate (rest - x) dt."""
    h = beside(as_time(s) - as_time(t), x)
    rest = like(rest, x)
    return rest + (x - rest) * torch.exp(-at(rate, x) * h).to(x)


@frozen
class CIR(KnownTransition, Splittable):
    r"""The square-root process, :math:`dX = \kappa (\theta - X) \, dt + \sigma \sqrt X \, dW`.

    With c = sigma² (1 - exp(-kappa t)) / (4 kappa), X_t / c is noncentral chi-square with
    4 kappa theta / sigma² degrees of freedom and noncentrality x_0 exp(-kappa t) / c. Stationary
    law Gamma(2 kappa theta / sigma², rate 2 kappa / sigma²), under which it is reversible. It
    stays positive where 2 kappa theta >= sigma² (Feller), else touches zero and returns. Each
    coordinate goes its own way.

    Arguments:
        rate: kappa > 0, per unit of time: a number or (d,).
        mean: theta > 0: a number or (d,).
        sigma: > 0: a number or (d,).
        span: Where time starts and ends.

    References:
        A theory of the term structure of interest rates (Cox, Ingersoll and Ross, 1985)

    Example:
        >>> cir = CIR(rate=1.0, mean=2.0, sigma=1.0)
        >>> cir.moments(torch.ones(1, 1), 50.0)  # theta, and theta sigma² / (2 kappa)
        Moments(mean=tensor([[2.]]), covariance=tensor([[[1.]]]))
    """

    rate: Value
    mean: Value
    sigma: Value
    span: tuple[float, float]
    domain = "x >= 0"

    def __init__(
        self,
        rate: Given = 1.0,
        mean: Given = 1.0,
        sigma: Given = 0.5,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        kappa = parameter("rate", rate, dims=1, above=0.0)
        theta = parameter("mean", mean, dims=1, above=0.0)
        g = parameter("sigma", sigma, dims=1, above=0.0)
        common_size(rate=kappa, mean=theta, sigma=g)
        keep(self, rate=kappa, mean=theta, sigma=g, span=span)
        keep(self, _splits=holds(4 * kappa * theta - g**2 >= 0))

    _splits: bool = field(init=False, repr=False)

    @property
    def start(self) -> Tensor:
        """The mean."""
        return resting(self.mean, rate=self.rate, mean=self.mean, sigma=self.sigma)

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return (x >= 0).flatten(1).all(1)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return (x - like(self.mean, x)) * like(-self.rate, x)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Diagonal(like(self.sigma, x) * x.sqrt())

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return filled(self.sigma**2, x).expand_as(x)

    def flow(self, x: State, t: Time, s: Time) -> State:
        """Relaxation to theta - sigma² / (4 kappa), which must not be negative."""
        if not self._splits:
            raise KakusanError(
                "the flow of CIR keeps x >= 0 only where 4 rate mean >= sigma², "
                f"got {self}; draw from `exact` instead"
            )
        rest = self.mean - self.sigma**2 / (4 * self.rate)
        return _relaxed(x, rest, self.rate, t, s).clamp(min=0)

    def kick(self, x: State, t: Time, dw: Tensor) -> State:
        """(sqrt(x) + sigma dw / 2)²."""
        return (x.sqrt() + like(self.sigma / 2, x) * dw) ** 2

    @property
    def _df(self) -> Value:
        return 4 * self.rate * self.mean / self.sigma**2

    def _scale(self, x0: State, t: Time) -> tuple[Tensor, Tensor]:
        """c, and x_0 exp(-kappa t), which is c times the noncentrality; in float64."""
        h, rate = beside(t, x0), at(self.rate, x0)
        c = at(self.sigma**2 / 4, x0) * decayed(rate, h)
        return c, x0.double() * torch.exp(-rate * h)

    def exact(self, x: State, t: Time, s: Time, dw: Tensor, source: torch.Generator) -> State:
        """A draw from the chi-square law, as a mixture of Gamma laws; dw is not used."""
        c, left = self._scale(x, as_time(s) - as_time(t))
        jumps = torch.poisson(left / (2 * c), generator=source)
        shape = jumps + filled(self._df / 2, jumps)
        return (2 * c * _standard_gamma(shape, generator=source)).to(x.dtype)

    def moments(self, x0: State, t: float | Time) -> Moments:
        """Mean (B, d) and covariance (B, d, d) of X_t given X_0 = x0."""
        c, left = self._scale(x0, as_time(t))
        rest = c * filled(self._df, c)
        return per_coordinate(rest + left, 2 * c * (rest + 2 * left), x0)

    def log_transition(self, x: State, x0: State, t: float | Time) -> Tensor:
        """Log p(X_t = x | X_0 = x0), (B,), for x > 0; differentiable in the parameters too."""
        c, left = self._scale(x0, as_time(t))
        return total(log_chi_square(x.double() / c, self._df, left / c) - c.log(), x)

    def score_from(self, x0: State) -> Field:
        """The field (x, t) -> ∇log p(X_t = x | X_0 = x0), for x > 0."""

        def score(x: State, t: Time) -> State:
            c, left = self._scale(x0, as_time(t))
            y, shift = x.double() / c, left / c
            nu, w = filled(self._df / 2 - 1, y), shift * y / 4
            ratio = (log_bessel(nu + 1, w) - log_bessel(nu, w)).exp()
            return ((nu / y - 0.5 + shift / 4 * ratio) / c).to(x.dtype)

        return score

    def log_stationary(self, x: State) -> Tensor:
        """The logarithm of the stationary Gamma density, (B,), normalised."""
        y = x.double()
        a, b = filled(self._df / 2, y), filled(2 * self.rate / self.sigma**2, y)
        return total(a * b.log() - a.lgamma() + (a - 1) * y.log() - b * y, x)


@frozen
class Jacobi(Splittable):
    r"""The Jacobi (Wright-Fisher) process on [0, 1], of gene frequencies and probabilities.

    .. math:: dX = \kappa (\theta - X) \, dt + \sigma \sqrt{X (1 - X)} \, dW

    Stationary law Beta(2 kappa theta / sigma², 2 kappa (1 - theta) / sigma²), under which it is
    reversible; both numbers at least 1 keep it off the ends. All moments are closed. Each
    coordinate goes its own way.

    Arguments:
        rate: kappa > 0, per unit of time: a number or (d,).
        mean: theta, in (0, 1): a number or (d,).
        sigma: > 0: a number or (d,).
        span: Where time starts and ends.

    References:
        The Pearson diffusions (Forman and Sørensen, 2008)

    Example:
        >>> Jacobi().gram_divergence(torch.tensor([[0.25]]), torch.tensor(0.0))
        tensor([[0.1250]])
    """

    rate: Value
    mean: Value
    sigma: Value
    span: tuple[float, float]
    domain = "0 <= x <= 1"

    def __init__(
        self,
        rate: Given = 1.0,
        mean: Given = 0.5,
        sigma: Given = 0.5,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        kappa = parameter("rate", rate, dims=1, above=0.0)
        theta = parameter("mean", mean, dims=1, above=0.0, below=1.0)
        g = parameter("sigma", sigma, dims=1, above=0.0)
        common_size(rate=kappa, mean=theta, sigma=g)
        low, high = kappa * theta - g**2 / 4, kappa * (1 - theta) - g**2 / 4
        keep(self, rate=kappa, mean=theta, sigma=g, span=span)
        keep(self, _splits=holds(low >= 0) and holds(high >= 0))

    _splits: bool = field(init=False, repr=False)

    @property
    def start(self) -> Tensor:
        """The mean."""
        return resting(self.mean, rate=self.rate, mean=self.mean, sigma=self.sigma)

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return ((x >= 0) & (x <= 1)).flatten(1).all(1)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return (x - like(self.mean, x)) * like(-self.rate, x)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Diagonal(like(self.sigma, x) * (x - x * x).sqrt())

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return (x - 0.5) * like(-2 * self.sigma**2, x)

    def flow(self, x: State, t: Time, s: Time) -> State:
        """The solution of dx = [rate (mean - x) - sigma² (1 - 2x) / 4] dt."""
        if not self._splits:
            raise KakusanError(
                "the flow of Jacobi keeps 0 <= x <= 1 only where rate mean and "
                f"rate (1 - mean) are at least sigma² / 4, got {self}"
            )
        a = at(self.rate * self.mean - self.sigma**2 / 4, x)
        b = at(self.rate - self.sigma**2 / 2, x)
        h = beside(as_time(s) - as_time(t), x)
        moved = x * torch.exp(-b * h).to(x) + (a * decayed(b, h)).to(x)
        return moved.clamp(0, 1)

    def kick(self, x: State, t: Time, dw: Tensor) -> State:
        """sin²(arcsin(sqrt(x)) + sigma dw / 2)."""
        return (x.sqrt().arcsin() + like(self.sigma / 2, x) * dw).sin() ** 2

    def moments(self, x0: State, t: float | Time) -> Moments:
        """Mean (B, d) and covariance (B, d, d) of X_t given X_0 = x0."""
        h, y = beside(t, x0), x0.double()
        rate, rest, s2 = (at(c, x0) for c in (self.rate, self.mean, self.sigma**2))
        b, a = 2 * rate * rest + s2, 2 * rate + s2  # dE[X²] = (b E[X] - a E[X²]) dt
        slow, fast, away = torch.exp(-rate * h), torch.exp(-a * h), y - rest
        mean = rest + away * slow
        square = fast * y**2 + b * (rest * decayed(a, h) + away * (slow - fast) / (a - rate))
        return per_coordinate(mean, square - mean**2, x0)

    def log_stationary(self, x: State) -> Tensor:
        """The logarithm of the stationary Beta density, (B,), normalised."""
        y, scale = x.double(), 2 * self.rate / self.sigma**2
        a, b = filled(scale * self.mean, y), filled(scale * (1 - self.mean), y)
        constant = (a + b).lgamma() - a.lgamma() - b.lgamma()
        return total(constant + (a - 1) * y.log() + (b - 1) * torch.log1p(-y), x)
