r"""Random numbers as functions of a key and a lane: no state, any order, any part.

A 64-bit key (two 32-bit words, one pair for a place on a path) and a lane (which number of the
state) are hashed to two words,

.. math:: a = L(\text{lane} + k_0), \quad b = L(a \oplus k_1), \qquad
          (a \oplus (b \circlearrowleft 16),\ b),

with L the 32-bit mixer "lowbias32" (Chris Wellons, hash-prospector, 2018) and b turned by half its
bits, and the words become two normal numbers by Box and Muller (1958). Everything is 32-bit
integer arithmetic of tensors, which wraps as in C and which compilers turn into vector
instructions: fused with the step that uses the numbers it is faster than any generator with a
state. `a` alone would repeat a shifted window of one sequence for every key, and `b` alone would
never repeat a value within a key; the two together do neither. What the numbers pass is in
docs/noise.md.
"""

import math

import torch
from torch import Tensor

# cos(pi y / 2) in powers of y² and sin(pi y / 2) / y, least squares at Chebyshev points of
# [-1/2, 1/2]: errors below 5e-11 and 2e-9
_COS = (
    0.99999999995243,
    -1.23370054062171,
    0.253669203351708,
    -0.0208600670831277,
    0.000903622281490284,
)
_SIN = (1.57079630501443, -0.645962935515788, 0.079675878728812, -0.00459222674462642)
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


def _shifted(x: Tensor, n: int) -> Tensor:
    """The logical shift of 32-bit words: >> alone copies the sign."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def lowbias32(x: Tensor) -> Tensor:
    """Mixes 32-bit words: a bijection in which each bit of x flips half of the bits.

    Example:
        >>> lowbias32(torch.tensor([0, 1, 2], dtype=torch.int32))
        tensor([         0, 1753845952, -787275391], dtype=torch.int32)
    """
    x = (x ^ _shifted(x, 16)) * _M1
    x = (x ^ _shifted(x, 15)) * _M2
    return x ^ _shifted(x, 16)


def words(lane: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words for each lane.

    Arguments:
        lane: Which number, int32, of any shape.
        key: Two int32 words, with shape (2,).
    """
    a = lowbias32(lane + key[0])
    b = lowbias32(a ^ key[1])
    # half a turn: the high bits of the two, which make the radius and the angle, stay independent
    # even given a, which places share that have nearly the same k_0
    return a ^ (b << 16) ^ _shifted(b, 16), b


def normals(lane: Tensor, key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers for each lane; none beyond 6.6.

    Arguments:
        lane: Which number, int32, of any shape.
        key: Two int32 words, with shape (2,).
        dtype: Of the numbers; computed in float64 for float64, else in float32.

    Example:
        >>> lanes, key = torch.arange(100_000, dtype=torch.int32), torch.tensor([7, 8])
        >>> z, y = normals(lanes, key.int(), torch.float64)
        >>> round(z.mean().item(), 2), round(z.var().item(), 1), round((z * y).mean().item(), 2)
        (0.0, 1.0, 0.0)
    """
    wanted, dtype = dtype, torch.float64 if dtype == torch.float64 else torch.float32
    u, v = words(lane, key)
    # 31 bits that keep their precision near 0, where the logarithm is steep
    radius = (-2 * torch.log((_shifted(u, 1).to(dtype) + 1) * 2.0**-31)).sqrt()
    # 30 bits for an angle within 45 degrees of an axis, two to choose the axis and its end
    y = (v << 2).to(dtype) * 2.0**-32
    if dtype == torch.float64:
        cos, sin = torch.cos(y * (math.pi / 2)), torch.sin(y * (math.pi / 2))
    else:
        # so near an axis short polynomials are enough for float32, and three times as fast
        cos, sin = _polynomial(_COS, y * y), y * _polynomial(_SIN, y * y)
    swap, radius = v < 0, torch.where((v & 0x40000000) != 0, -radius, radius)
    z, y = radius * torch.where(swap, sin, cos), radius * torch.where(swap, cos, sin)
    return z.to(wanted), y.to(wanted)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = coefficients[-1] * x + coefficients[-2]
    for c in coefficients[-3::-1]:
        value = value * x + c
    return value
