r"""Linear SDEs: everything follows from alpha(t) and sigma(t).

The kernel of dx = a(t) x dt + g(t) dw is p(x_t | x_0) = N(alpha x_0, sigma² I). Writing alpha and
sigma fixes the coefficients,

.. math:: a = \dot\alpha / \alpha, \qquad g^2 = \tfrac{d}{dt} \sigma^2 - 2 a \sigma^2,

which autograd derives, so a new process is two functions. Time is float64 throughout. sigma may
vanish at t = 0, where the score of a data point does not exist: `span` starts just after it, while
the kernel and the samplers of `solvers.exponential` reach t = 0 itself.

Every linear SDE lives in one plane: with r = sqrt(alpha² + sigma²) the scaled state x / r is
cos(phi) x_0 + sin(phi) eps, with the angle phi = atan2(sigma, alpha) running from 0 (data) to at
most pi/2 (noise). It is bounded and regular at both ends, which neither sigma nor the
log-signal-to-noise ratio is.

References:
    Score-based generative modeling through SDEs (Song et al., 2021)
    Denoising diffusion probabilistic models (Ho et al., 2020)
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kakusan.core import grids
from kakusan.core.operators import Scale
from kakusan.core.types import Field, State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE


class LinearSDE(SDE):
    """dx = a(t) x dt + g(t) dw, written by alpha(t) and sigma(t) alone."""

    @abc.abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """The factor of x_0 in x_t, with the shape of t."""

    @abc.abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """The standard deviation of x_t given x_0, with the shape of t."""

    def variance(self, t: Time) -> Tensor:
        """sigma², written out where sigma is a root that vanishes: its slope at 0 is infinite."""
        return self.sigma(t) ** 2

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """The coefficients (a, g²) at t, derived by autograd; each with the shape of t.

        Example:
            >>> a, g2 = VP(0.1, 20.0).rates(torch.tensor(0.0, dtype=torch.float64))
            >>> round(a.item(), 12), round(g2.item(), 12)
            (-0.05, 0.1)
        """
        t = as_time(t).contiguous()  # forward mode refuses expanded tensors
        one = torch.ones_like(t)
        # forward mode nests in other derivatives and in traces, where a graph of its own would not
        alpha = torch.func.jvp(self.alpha, (t,), (one,))  # the value and its slope
        variance = torch.func.jvp(self.variance, (t,), (one,))
        a = alpha[1] / alpha[0]
        return a, (variance[1] - 2 * a * variance[0]).clamp(min=0)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return per_sample(self.rates(t)[0], x) * x

    def diffusion(self, x: State, t: Time) -> Scale:  # noqa: D102
        return Scale(self.rates(t)[1].sqrt())

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return tuple(x.shape)

    def angle(self, t: Time) -> Tensor:
        """Phi = atan2(sigma, alpha), from 0 at the data to at most pi/2."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def time_of_angle(self, phi: Tensor) -> Time:
        """The time at which `angle` is phi, between 0 and the end of the span."""
        return self._time_of_angle(as_time(phi)).clamp(0, self.span[1])

    def _time_of_angle(self, phi: Tensor) -> Time:
        """By bisection to the last digits; processes that can be solved for t do that."""
        lo, hi = torch.zeros_like(phi), torch.full_like(phi, self.span[1])
        for _ in range(60):
            mid = (lo + hi) / 2
            above = self.angle(mid) > phi
            lo, hi = torch.where(above, lo, mid), torch.where(above, mid, hi)
        return (lo + hi) / 2

    def noised(self, x0: State, eps: State, t: Time) -> State:
        """x_t = alpha x_0 + sigma eps."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """Factor and variance of the kernel p(x_t | x_s) for s <= t.

        Example:
            >>> ddpm = VP.from_betas([0.1, 0.2])
            >>> factor, variance = ddpm.transition(as_time(0.5), as_time(1.0))
            >>> round(factor.item() ** 2, 12), round(variance.item(), 12)
            (0.8, 0.2)
        """
        factor = self.alpha(t) / self.alpha(s)
        return factor, (self.variance(t) - factor**2 * self.variance(s)).clamp(min=0)

    def coefficients(self, t: Time) -> tuple[Tensor | float, Tensor | float]:
        """(alpha, sigma) to multiply states by: floats, remembered, where t is one time.

        A sampler meets the same few times again and again; a float costs a tenth of a tensor.
        """
        if t.ndim:
            return self.alpha(t), self.sigma(t)
        key = t.item()
        if key not in self._known:
            if len(self._known) >= 4096:
                self._known.clear()
            t = t.detach().to("cpu", torch.float64)
            self._known[key] = (self.alpha(t).item(), self.sigma(t).item())
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[float, tuple[float, float]]:
        return {}


class ScoreField(abc.ABC):
    """A score of a linear SDE that knows its velocity without dividing by sigma or alpha."""

    @abc.abstractmethod
    def __call__(self, x: State, t: Time) -> State:
        """∇log p_t(x)."""

    @abc.abstractmethod
    def velocity(self, x: State, t: Time) -> State:
        """V = cos(phi) eps - sin(phi) x_0: d(x/r)/dphi along the probability flow."""


def velocity_of(process: LinearSDE, score: Field) -> Field:
    """The angular velocity that belongs to any score, by Tweedie's formula.

    With eps = -sigma score and x / r = cos(phi) x_0 + sin(phi) eps, the velocity is
    (eps - sin(phi) x / r) / cos(phi).
    """
    if isinstance(score, ScoreField):
        return score.velocity

    def velocity(x: State, t: Time) -> State:
        alpha, sigma = process.alpha(t), process.sigma(t)
        r = torch.hypot(alpha, sigma)
        eps = -per_sample(sigma, x) * score(x, t)
        return (per_sample(r, x) * eps - per_sample(sigma / r, x) * x) / per_sample(alpha, x)

    return velocity


@dataclass(frozen=True)
class VP(LinearSDE):
    """Variance preserving: beta(t) linear from beta_min to beta_max, alpha² + sigma² = 1."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    span: tuple[float, float] = (1e-3, 1.0)

    def _integral(self, t: Time) -> Tensor:
        return t * (self.beta_min + t * (0.5 * (self.beta_max - self.beta_min)))

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.exp(-0.5 * self._integral(t))

    def variance(self, t: Time) -> Tensor:  # noqa: D102
        return -torch.expm1(-self._integral(t))

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return self.variance(t).sqrt()

    def _time_of_angle(self, phi: Tensor) -> Time:
        return self._time_of_integral(-torch.log1p(-(torch.sin(phi) ** 2)))

    def _time_of_integral(self, B: Tensor) -> Time:
        """The root t of beta_min t + (beta_max - beta_min) t² / 2 = B, without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * B / (self.beta_min + (self.beta_min**2 + 2 * slope * B).sqrt())

    @staticmethod
    def from_betas(betas: Sequence[float] | Tensor) -> DDPM:
        """DDPM with this table of betas, as the VP process that meets it at its knots.

        Knot i of N stands at t = i / N; between knots log(alpha²) is linear, so that the kernel
        from one to the next is N(sqrt(1 - beta) x, beta) exactly.

        Arguments:
            betas: N numbers, each in (0, 1).
        """
        values = tuple(torch.as_tensor(betas, dtype=torch.float64).tolist())
        bad = [b for b in values if not 0 < b < 1]
        if not values or bad:
            what = f"{bad[0]} is among them" if bad else "the table is empty"
            raise KakusanError(f"betas must lie strictly between 0 and 1; {what}")
        return DDPM(values)


@dataclass(frozen=True)
class DDPM(LinearSDE):
    """The VP process with piecewise constant beta: DDPM's chain at its knots t = i / N."""

    betas: tuple[float, ...]
    span: tuple[float, float] = (1e-3, 1.0)

    @functools.cached_property
    def _log_alpha2(self) -> Tensor:
        steps = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64))
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)])

    def _at(self, t: Time) -> Tensor:
        table = self._log_alpha2.to(t.device)
        u = t * len(self.betas)
        # the index carries no slope; the linear rest does, so that rates() sees beta
        i = u.detach().floor().long().clamp(0, len(self.betas) - 1)
        return table[i] + (u - i) * (table[i + 1] - table[i])

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.exp(0.5 * self._at(t))

    def variance(self, t: Time) -> Tensor:  # noqa: D102
        return -torch.expm1(self._at(t))

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return self.variance(t).sqrt()

    def _time_of_angle(self, phi: Tensor) -> Time:
        table, wanted = -self._log_alpha2.to(phi.device), -torch.log1p(-(torch.sin(phi) ** 2))
        i = torch.searchsorted(table, wanted, right=True).clamp(1, len(self.betas)) - 1
        return (i + (wanted - table[i]) / (table[i + 1] - table[i])) / len(self.betas)

    def knots(self, n: int | None = None) -> Tensor:
        """The chain's own times from noise to data, or n + 1 of them, evenly spread."""
        N = len(self.betas)
        n = N if n is None else n
        if not 1 <= n <= N:
            raise KakusanError(f"this chain has {N} steps, so a grid of {n} steps has no knots")
        return torch.linspace(N, 0, n + 1, dtype=torch.float64).round() / N


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP (Song et al. 2021): VP's alpha, and sigma = 1 - alpha²."""

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return -torch.expm1(-self._integral(t))

    def variance(self, t: Time) -> Tensor:  # noqa: D102
        return self.sigma(t) ** 2

    def _time_of_angle(self, phi: Tensor) -> Time:
        # tan phi = 1/alpha - alpha, so log alpha = -asinh(tan(phi) / 2)
        return self._time_of_integral(2 * torch.asinh(torch.tan(phi) / 2))


@dataclass(frozen=True)
class VE(LinearSDE):
    """Variance exploding: sigma² = sigma_min² ((sigma_max / sigma_min)^(2t) - 1) exactly."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    span: tuple[float, float] = (1e-5, 1.0)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.ones_like(t)

    def variance(self, t: Time) -> Tensor:  # noqa: D102
        return self.sigma_min**2 * torch.expm1(2 * t * math.log(self.sigma_max / self.sigma_min))

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return self.variance(t).sqrt()

    def _time_of_angle(self, phi: Tensor) -> Time:
        growth = torch.log1p((torch.tan(phi) / self.sigma_min) ** 2)
        return growth / (2 * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class Cosine(LinearSDE):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): time is the angle itself.

    The rate a = -(pi/2) tan(pi t / 2) is infinite at t = 1, where the span therefore does not end.
    """

    span: tuple[float, float] = (1e-3, 0.999)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return torch.sin(t * (math.pi / 2))

    def _time_of_angle(self, phi: Tensor) -> Time:
        return phi / (math.pi / 2)


@dataclass(frozen=True)
class Rectified(LinearSDE):
    """The straight path of rectified flow and flow matching: x_t = (1 - t) x_0 + t eps."""

    span: tuple[float, float] = (1e-3, 0.999)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return 1 - t

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return t * torch.ones_like(t)

    def _time_of_angle(self, phi: Tensor) -> Time:
        return torch.sin(phi) / (torch.sin(phi) + torch.cos(phi))


@dataclass(frozen=True)
class EDM(LinearSDE):
    """Time is the noise level: x_t = x_0 + t eps (Karras et al. 2022)."""

    span: tuple[float, float] = (0.002, 80.0)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.ones_like(t)

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return t * torch.ones_like(t)

    def _time_of_angle(self, phi: Tensor) -> Time:
        return torch.tan(phi)


def angle_grid(process: LinearSDE, start: float, end: float, n: int, rho: float = 1.0) -> Tensor:
    """Times whose angles are evenly spaced (rho = 1), or in phi^(1/rho): denser near the data.

    Example:
        >>> angle_grid(Cosine(), 0.8, 0.0, 4)
        tensor([0.8000, 0.6000, 0.4000, 0.2000, 0.0000], dtype=torch.float64)
    """
    a, b = (process.angle(as_time(t)).item() for t in (start, end))
    grid = process.time_of_angle(grids.power(a, b, n, rho))
    grid[0], grid[-1] = start, end
    return grid


def log_snr_grid(process: LinearSDE, start: float, end: float, n: int) -> Tensor:
    """Times evenly spaced in log(alpha / sigma); both ends must carry some noise."""
    levels = torch.stack([process.angle(as_time(t)) for t in (start, end)]).tan().log()
    if not levels.isfinite().all():
        raise KakusanError(f"log(alpha/sigma) is infinite at t={start} or t={end}; use angle_grid")
    u = grids.uniform(levels[0].item(), levels[1].item(), n)
    grid = process.time_of_angle(u.exp().atan())
    grid[0], grid[-1] = start, end
    return grid
