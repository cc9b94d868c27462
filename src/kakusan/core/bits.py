"""Bits per dimension: log-likelihoods in a unit that does not depend on the size of a sample."""

import math
from typing import NamedTuple

from torch import Tensor


class Bits(NamedTuple):
    """Bits per dimension: a mean over data, with its standard error."""

    value: float
    std_error: float
    n: int


def bits_per_dim(log_p: Tensor, d: int, log_unit: float = 0.0) -> Bits:
    """-(log p + log_unit) / (d ln 2), averaged over data.

    Arguments:
        log_p: Log densities in nats, (B,).
        d: The number of dimensions.
        log_unit: The sum over dimensions of log(model units a raw unit), where the density was
            one in model units: 784 log(2/255) for 8-bit images brought to [-1, 1].

    Example:
        >>> bits_per_dim(-3 * torch.full((4,), 256.0).double().log(), d=3).value
        8.0
    """
    bits = -(log_p.double() + log_unit) / (d * math.log(2))
    n = len(bits)
    spread = bits.std().item() if n > 1 else math.nan
    return Bits(round(bits.mean().item(), 12), spread / n**0.5, n)
