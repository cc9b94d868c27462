r"""Denoising score matching over time, with any weight and any distribution of times.

.. math:: L = E_{t, x_0, \epsilon} \, \lambda(t) \,
              \| s_\theta(x_t, t) - \nabla \log p(x_t | x_0) \|^2 / d ,
          \qquad x_t = \alpha x_0 + \sigma \epsilon .

The network predicts F = a x_0 + b eps (see `models.denoiser`), and with det = alpha b - sigma a
the errors of all views are multiples of its own: that of eps is alpha/det, that of the score
alpha/(sigma det). A weight is therefore a factor on the plain error of F, which stays finite where
the score does not:

==========  =============================  =====================================
weight      lambda(t), on the score        factor on the error of F
==========  =============================  =====================================
Uniform     whatever makes the factor 1    1
SNR         sigma² (plain error of eps)    (alpha / det)²
Likelihood  g²                             g² (alpha / (sigma det))²
Karras      sigma² (sigma² + alpha² s²)    (sigma² + alpha² s²) / (s det)²
            / (alpha s)²
==========  =============================  =====================================

Times are drawn from numbers u in [0, 1) that the caller gives, one a sample, and come with an
importance weight where their density is not uniform.

References:
    A connection between score matching and denoising autoencoders (Vincent, 2011)
    Maximum likelihood training of score-based diffusion models (Song et al., 2021)
    Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
"""

from __future__ import annotations

import abc
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.types import State, Time, per_sample
from kakusan.models.denoiser import Denoiser


class Weight(abc.ABC):
    """lambda(t), as a factor on the squared error of the network's own output."""

    @abc.abstractmethod
    def factor(self, model: Denoiser, t: Time) -> Tensor:
        """With the shape of t."""

    @staticmethod
    def _parts(model: Denoiser, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = model.process.alpha(t), model.process.sigma(t)
        a, b = model.row(alpha, sigma)
        return alpha, sigma, alpha * b - sigma * a


class Uniform(Weight):
    """All times alike, in the network's own units."""

    def factor(self, model: Denoiser, t: Time) -> Tensor:  # noqa: D102
        return torch.ones_like(t)


class SNR(Weight):
    """alpha²/sigma² on the error of x_0: the plain error of eps, DDPM's L_simple."""

    def factor(self, model: Denoiser, t: Time) -> Tensor:  # noqa: D102
        alpha, _, det = self._parts(model, t)
        return (alpha / det) ** 2


class Likelihood(Weight):
    """g²: the weight whose loss bounds the negative log-likelihood."""

    def factor(self, model: Denoiser, t: Time) -> Tensor:  # noqa: D102
        alpha, sigma, det = self._parts(model, t)
        return model.process.rates(t)[1] * (alpha / (sigma * det)) ** 2


class Karras(Weight):
    """EDM's weight, which makes the loss start at 1 at every noise level."""

    def factor(self, model: Denoiser, t: Time) -> Tensor:  # noqa: D102
        alpha, sigma, det = self._parts(model, t)
        return (sigma**2 + (alpha * model.data_std) ** 2) / (model.data_std * det) ** 2


class Drawn(NamedTuple):
    """Times, and the weight that makes their average one over uniform times; both (B,)."""

    t: Time
    weight: Tensor


class Times(abc.ABC):
    """How noise levels are drawn over the span of the process."""

    @abc.abstractmethod
    def draw(self, model: Denoiser, u: Tensor) -> Drawn:
        """Times from numbers u in [0, 1), float64 with shape (B,)."""


class UniformTimes(Times):
    """Independent and uniform over the span."""

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        lo, hi = model.process.span
        return Drawn(lo + (hi - lo) * u, torch.ones_like(u))


class Stratified(Times):
    """Uniform, one in each of B equal strata: the same mean with less variance."""

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        lo, hi = model.process.span
        strata = torch.arange(len(u), dtype=u.dtype, device=u.device)
        return Drawn(lo + (hi - lo) * (strata + u) / len(u), torch.ones_like(u))


class LogNormal(Times):
    """log(sigma / alpha) normal (Karras et al. 2022); a choice of emphasis, so weighted by 1.

    Arguments:
        mean: The mean of log(sigma / alpha).
        std: Its standard deviation.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, std

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        z = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))
        t = model.process.time_of_angle(torch.exp(self.mean + self.std * z).atan())
        return Drawn(t.clamp(*model.process.span), torch.ones_like(u))


class Importance(Times):
    """Density proportional to the weight, so that every sample counts alike; unbiased.

    Arguments:
        weight: The weight whose factor shapes the density, and is divided out again.
        knots: How finely the distribution function is tabulated.
    """

    def __init__(self, weight: Weight, knots: int = 2049) -> None:
        self.weight, self.knots = weight, knots

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one small table a model
    def _table(self, model: Denoiser) -> tuple[Tensor, Tensor]:
        lo, hi = model.process.span
        # knots dense near the data, where weights like g²/sigma² are steep
        t = lo + (hi - lo) * torch.linspace(0, 1, self.knots, dtype=torch.float64) ** 3
        factor = self.weight.factor(model, t)
        area = (factor[1:] + factor[:-1]) / 2 * t.diff()
        return t, torch.cat([area.new_zeros(1), area.cumsum(0)]) / area.sum()

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:
        """Inverts the distribution function, linear between knots."""
        t, cdf = (table.to(u.device) for table in self._table(model))
        i = torch.searchsorted(cdf, u, right=True).clamp(1, self.knots - 1)
        slope = (t[i] - t[i - 1]) / (cdf[i] - cdf[i - 1])
        lo, hi = model.process.span
        # within a cell the density is constant, 1 / slope; uniform times have 1 / (hi - lo)
        return Drawn(t[i - 1] + (u - cdf[i - 1]) * slope, slope / (hi - lo))


class Denoising:
    """Denoising score matching: the loss of each sample.

    Arguments:
        weight: lambda(t).
        times: How times are drawn.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> zero = Denoiser(lambda x, t, label: torch.zeros_like(x), VP())
        >>> u = torch.rand(4, dtype=torch.float64)
        >>> Denoising()(zero, torch.zeros(4, 2), torch.ones(4, 2), u).shape
        torch.Size([4])
    """

    def __init__(self, weight: Weight | None = None, times: Times | None = None) -> None:
        self.weight, self.times = weight or Uniform(), times or Stratified()

    def at(
        self, model: Denoiser, x0: State, eps: State, t: Time, label: Tensor | None = None
    ) -> Tensor:
        """The weighted squared error at given times, a mean over the state; (B,)."""
        alpha, sigma = model.process.alpha(t), model.process.sigma(t)
        a, b = model.row(alpha, sigma)
        target = per_sample(_tensor(a, t), x0) * x0 + per_sample(_tensor(b, t), x0) * eps
        F = model.raw(model.process.noised(x0, eps, t), t, label)
        error = (F.to(x0.dtype) - target).square().flatten(1).mean(1)
        return self.weight.factor(model, t).to(error.dtype) * error

    def __call__(
        self, model: Denoiser, x0: State, eps: State, u: Tensor, label: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, (B,).

        Arguments:
            model: The denoiser.
            x0: Data, (B, *shape).
            eps: Standard normal numbers like x0.
            u: Numbers in [0, 1) that choose the times, float64 (B,).
            label: Class indices (B,), -1 for none.
        """
        t, importance = self.times.draw(model, u)
        return importance.to(x0.dtype) * self.at(model, x0, eps, t, label)


def _tensor(c: float | Tensor, t: Time) -> Tensor:
    return c if isinstance(c, Tensor) else torch.full_like(t, c)
