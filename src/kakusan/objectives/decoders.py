r"""Decoders: what is left to say about the data beside their least noised state.

The bound of `objectives.elbo` ends in log p(x_0 | x_1), and what that is depends on the data.
Integers, brought to a lattice of cells, have probabilities: `DiscretisedGaussian` gives each level
the mass of its cell,

.. math:: p(x_0 | x_1) = \prod_i \left[ \Phi(\tfrac{x_i + c/2 - \mu_i}{s_i})
          - \Phi(\tfrac{x_i - c/2 - \mu_i}{s_i}) \right] ,

the last ones open to infinity, so that all levels together have mass 1. Real numbers, and integers
with noise added, have densities: `GaussianDecoder`.

Where the decoder takes over is free: every start gives a bound, and the best is where it stops
paying to remove noise. Below a fraction of a cell integers are certain, but a network that has
not learned to see their lattice goes on to pay for every noise level there. On a small model of
the digits (17 levels) the bound is 4.6 bits an entry from sigma = 0.0016 on; from a twelfth, a
quarter, a third, a half and the whole of a cell it is 2.6, 1.9, 1.9, 1.9 and 2.1. `start` is a
third.

References:
    Denoising diffusion probabilistic models (Ho et al., 2020), section 3.3
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from kakusan.core.types import State
from kakusan.errors import KakusanError, UsageError
from kakusan.processes.linear import LinearSDE

FAR = 1e30  # stands for infinity, with a slope of 0 and not of nan


class Decoder(abc.ABC):
    """log p(x_0 | x_1): what is left to say about the data beside their least noised state."""

    @abc.abstractmethod
    def log_prob(self, x0: State, mean: State, log_variance: Tensor) -> Tensor:
        """In nats, of each sample: float64 (B,).

        Arguments:
            x0: Data, (B, *shape).
            mean: Where they are expected, like x0.
            log_variance: Of each entry, to stand beside x0.
        """

    def check(self, x0: State) -> None:
        """Refuses data that this decoder gives no probability."""
        return

    def start(self, process: LinearSDE) -> float:
        """The time from which it speaks by default: the start of the span."""
        return process.span[0]


class GaussianDecoder(Decoder):
    """The density of a normal law, for data of real numbers.

    Arguments:
        std: Its standard deviation; by default that which the model's last step has.
    """

    def __init__(self, std: float | None = None) -> None:
        if std is not None and not std > 0:
            raise UsageError(f"the standard deviation of a decoder must be positive, got {std}")
        self.std = std

    def log_prob(self, x0: State, mean: State, log_variance: Tensor) -> Tensor:  # noqa: D102
        return _density(x0, mean, _own(self.std, log_variance)).flatten(1).sum(1)


class DiscretisedGaussian(Decoder):
    """The mass that a normal law gives to the cell of each level; the last cells are open.

    Arguments:
        cell: The distance between levels in model units, a number or one for each entry. Entries
            with cell 0 are real numbers and count their density.
        low: The lowest level; -inf where there is none.
        high: The highest level; inf where there is none.
        std: The standard deviation; by default that which the model's last step has.

    Example:
        >>> levels = torch.linspace(-1, 1, 17)[:, None]
        >>> decoder = DiscretisedGaussian(cell=2 / 16)
        >>> masses = decoder.log_prob(levels, torch.tensor(0.3), torch.tensor(-4.0)).exp()
        >>> round(masses.sum().item(), 12)
        1.0
    """

    def __init__(
        self,
        cell: float | Tensor,
        low: float = -1.0,
        high: float = 1.0,
        std: float | None = None,
    ) -> None:
        self.cell = torch.as_tensor(cell, dtype=torch.float64)
        if not bool((self.cell >= 0).all()) or not low < high or (std is not None and not std > 0):
            raise UsageError(
                "a discretised decoder needs cells of width 0 or more, low < high and std > 0; "
                f"got a least width of {self.cell.min().item():g}, {low:g}, {high:g} and {std}"
            )
        self.low, self.high, self.std = low, high, std

    def log_prob(self, x0: State, mean: State, log_variance: Tensor) -> Tensor:  # noqa: D102
        log_variance = _own(self.std, log_variance)
        x, m, s = x0.double(), mean.double(), (log_variance.double() / 2).exp()
        cell = self.cell.to(x.device)
        half = torch.where(cell > 0, cell, 1.0) / 2
        a = torch.where(x < self.low + half, -FAR, (x - half - m) / s)
        b = torch.where(x > self.high - half, FAR, (x + half - m) / s)
        # in the lower tail both are small numbers with all their digits
        a, b = torch.where(a + b > 0, -b, a), torch.where(a + b > 0, -a, b)
        upper = torch.special.log_ndtr(b)
        mass = upper + torch.log(-torch.expm1(torch.special.log_ndtr(a) - upper))
        whole = torch.where(cell > 0, mass, _density(x0, mean, log_variance))
        return whole.flatten(1).sum(1)

    def start(self, process: LinearSDE) -> float:
        """Where sigma / alpha is a third of the smallest cell; for real entries, of the span."""
        t = process.time_of_angle((self.cell.min() / 3).atan()).item()
        return t if process.span[0] < t < process.span[1] else process.span[0]

    def check(self, x0: State) -> None:
        """Refuses values that are no level."""
        cell = self.cell.to(x0.device).expand(x0.shape)
        lattice = self.low if math.isfinite(self.low) else self.high
        if not math.isfinite(lattice):
            return  # where the levels lie is not known
        x, c = x0[cell > 0].double(), cell[cell > 0]
        place = (x - lattice) / c
        off = ((place - place.round()).abs() > 1e-3) | (x < self.low - c) | (x > self.high + c)
        if bool(off.any()):
            i = int(off.nonzero()[0, 0])
            raise KakusanError(
                f"{x[i].item():g} is no level of a lattice from {self.low:g} to {self.high:g} in "
                f"steps of {c[i].item():g}; GaussianDecoder() takes real numbers"
            )


def _own(std: float | None, log_variance: Tensor) -> Tensor:
    if std is None:
        return log_variance
    return torch.full_like(log_variance, 2 * math.log(std))


def _density(x0: State, mean: State, log_variance: Tensor) -> Tensor:
    x, m, v = x0.double(), mean.double(), log_variance.double()
    return -0.5 * ((x - m) ** 2 * (-v).exp() + v + math.log(2 * math.pi))
