r"""Noise schedules of DDPM: tables of beta for any number of steps, and one that is learned.

A table of N numbers beta_i makes the chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z, with
alpha_i² = Π (1 - beta_j); `VP.from_betas` turns it into a process. Three are in use:

=========  =================================================================  ==================
table      alpha²(t) at t = i / N, or beta                                    reference
=========  =================================================================  ==================
linear     beta from 1e-4 to 0.02 at N = 1000, times 1000 / N at other N      Ho et al., 2020
cosine     cos²(pi/2 (t + s) / (1 + s)), s = 0.008, over its value at 0       Nichol et al., 2021
sigmoid    S(-u), u from -3 to 3 over tau, brought to [0, 1]                  Jabri et al., 2022
=========  =================================================================  ==================

Here S is the logistic function. The last two end in alpha = 0, where beta = 1 has no reverse
kernel: it is cut off at 0.999, as their authors do.

`LearnedSchedule` is a monotone network for gamma(t) = -log(alpha²/sigma²),

.. math:: \gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0)
                      \frac{\tilde\gamma(t) - \tilde\gamma(0)}{\tilde\gamma(1) - \tilde\gamma(0)},
          \qquad \tilde\gamma(t) = w t + \sum_h c_h S(a_h t + b_h), \quad w, a, c > 0,

with alpha² = S(-gamma) and sigma² = S(gamma), variance preserving. The continuous-time bound sees
only the ends gamma_0 and gamma_1; what lies between decides how much its estimate varies, and so
how fast a model learns.

References:
    Denoising diffusion probabilistic models (Ho et al., 2020), arXiv:2006.11239
    Improved denoising diffusion probabilistic models (Nichol, Dhariwal, 2021), arXiv:2102.09672
    Scalable adaptive computation for iterative generation (Jabri et al., 2022), arXiv:2212.11972
    Variational diffusion models (Kingma et al., 2021), arXiv:2107.00630
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kakusan.core.types import Time, as_time
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE

MOST = 0.999  # beta = 1 would forget everything, and could not be reversed


def linear(steps: int) -> Tensor:
    """Ho et al.'s table, stretched so that any length ends in the same noise; (steps,).

    Example:
        >>> linear(1000)[[0, -1]]
        tensor([0.0001, 0.0200], dtype=torch.float64)
    """
    _checked(steps)
    first, last = (min(b * 1000 / steps, MOST) for b in (1e-4, 2e-2))
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine(steps: int, s: float = 0.008) -> Tensor:
    """Nichol and Dhariwal's table; (steps,).

    Arguments:
        steps: The length N.
        s: Keeps the first steps from being too small.

    Example:
        >>> cosine(4)
        tensor([0.1530, 0.4170, 0.7079, 0.9990], dtype=torch.float64)
    """
    return _table(steps, lambda t: torch.cos((t + s) / (1 + s) * (math.pi / 2)) ** 2)


def sigmoid(steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """Jabri et al.'s table: alpha² is a logistic function of time; (steps,).

    Arguments:
        steps: The length N.
        start: Where on the logistic curve the data are.
        end: Where on it the noise is.
        tau: Stretches the curve: a small one is steep in the middle.

    Example:
        >>> sigmoid(4)
        tensor([0.1491, 0.4124, 0.7017, 0.9990], dtype=torch.float64)
    """
    if not start < end or not tau > 0:
        raise KakusanError(
            f"a sigmoid table needs start < end and tau > 0; got {start}, {end} and {tau}"
        )
    low, high = (torch.sigmoid(as_time(-u / tau)) for u in (end, start))
    return _table(
        steps, lambda t: (torch.sigmoid(-(start + (end - start) * t) / tau) - low) / (high - low)
    )


def _checked(steps: int) -> None:
    if steps < 1:
        raise KakusanError(f"a table of betas has at least one step, got {steps}")


def _table(steps: int, alpha2: Callable[[Time], Tensor]) -> Tensor:
    """The betas of a curve alpha²(t), up to its value at 0."""
    _checked(steps)
    values = alpha2(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - values[1:] / values[:-1]).clamp(max=MOST)


class LearnedSchedule(nn.Module, LinearSDE):
    """A variance-preserving process whose log-signal-to-noise ratio is learned.

    All parameters are float64. Inside a `Denoiser` they are parameters of the model.

    Arguments:
        low: gamma at t = 0, at first: -log(alpha²/sigma²) of the data end.
        high: gamma at t = 1, at first.
        width: The number of hidden units.

    Raises:
        KakusanError: If low does not lie below high.

    Example:
        >>> schedule = LearnedSchedule(-10.0, 5.0)
        >>> schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        [-10.0, 5.0]
        >>> schedule.betas(4).shape
        torch.Size([4])
    """

    span = (0.0, 1.0)

    def __init__(self, low: float = -13.3, high: float = 5.0, width: int = 32) -> None:
        super().__init__()
        if not low < high:
            raise KakusanError(f"gamma rises from low to high, got low={low} and high={high}")
        self.low = nn.Parameter(as_time(low))
        self.log_rise = nn.Parameter(as_time(high - low).log())
        # hidden units turn on one after the other along the way; positive by softplus
        place = torch.linspace(0, 1, width, dtype=torch.float64)
        self.weight = nn.Parameter(as_time(1.0))
        self.rate = nn.Parameter(torch.full_like(place, 10.0))
        self.shift = nn.Parameter(-10.0 * place)
        self.scale = nn.Parameter(torch.full_like(place, -4.0))

    def gamma(self, t: Time) -> Tensor:
        """-log(alpha²/sigma²), rising, with the shape of t."""
        start, end = (self._raw(torch.full_like(t, u)) for u in (0.0, 1.0))
        return self.low + self.log_rise.exp() * (self._raw(t) - start) / (end - start)

    def _raw(self, t: Time) -> Tensor:
        on = torch.sigmoid(F.softplus(self.rate) * t.unsqueeze(-1) + self.shift)
        return F.softplus(self.weight) * t + (F.softplus(self.scale) * on).sum(-1)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.exp(0.5 * F.logsigmoid(-self.gamma(t)))

    def variance(self, t: Time) -> Tensor:  # noqa: D102
        return torch.sigmoid(self.gamma(t))

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return torch.exp(0.5 * F.logsigmoid(self.gamma(t)))

    def coefficients(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) as tensors with gradients: nothing is remembered while it is learned."""
        return self.alpha(t), self.sigma(t)

    def betas(self, steps: int) -> Tensor:
        """The table of DDPM that meets the schedule at t = i / steps; (steps,), with gradients.

        DDPM's chain starts at the data themselves, so its first step makes all of the first noise.
        """
        _checked(steps)
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=self.low.device)[1:]
        alpha2 = self.alpha(t) ** 2
        return 1 - alpha2 / torch.cat([alpha2.new_ones(1), alpha2[:-1]])
