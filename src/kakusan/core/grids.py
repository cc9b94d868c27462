r"""Time grids: functions that return a 1-D float64 tensor of n + 1 times.

A grid is a tensor you can print. It runs from `start` to `end`, whichever way that is, and both
ends are hit exactly. Grids that depend on a process (`log_snr_grid`, `angle_grid`)
stand beside the process, in `kakusan.processes.linear`.

References:
    Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
"""

import torch
from torch import Tensor

from kakusan.errors import KakusanError


def _between(start: float, end: float, w: Tensor) -> Tensor:
    grid = start + (end - start) * w
    grid[0], grid[-1] = start, end
    return grid


def _steps(n: int) -> Tensor:
    if n < 1:
        raise KakusanError(f"a grid needs at least one step, got n={n}")
    return torch.linspace(0, 1, n + 1, dtype=torch.float64)


def uniform(start: float, end: float, n: int) -> Tensor:
    """Equal steps.

    Example:
        >>> uniform(1.0, 0.0, 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    return _between(start, end, _steps(n))


def power(start: float, end: float, n: int, rho: float = 7.0) -> Tensor:
    """Equal steps in t^(1/rho), dense near 0 (Karras et al. 2022, equation 5).

    Example:
        >>> power(80.0, 0.002, 2)
        tensor([8.0000e+01, 2.5152e+00, 2.0000e-03], dtype=torch.float64)
    """
    if min(start, end) < 0:
        raise KakusanError(f"a power grid needs times >= 0, got {start} to {end}")
    a, b = start ** (1 / rho), end ** (1 / rho)
    grid = (a + (b - a) * _steps(n)) ** rho
    grid[0], grid[-1] = start, end
    return grid


def quadratic(start: float, end: float, n: int) -> Tensor:
    """Equal steps in the square root of t: dense near 0.

    Example:
        >>> quadratic(1.0, 0.0, 4)
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000], dtype=torch.float64)
    """
    return power(start, end, n, rho=2.0)


def cosine(start: float, end: float, n: int) -> Tensor:
    """Dense at both ends, as Chebyshev points are.

    Example:
        >>> cosine(0.0, 1.0, 4)
        tensor([0.0000, 0.1464, 0.5000, 0.8536, 1.0000], dtype=torch.float64)
    """
    return _between(start, end, (1 - torch.cos(torch.pi * _steps(n))) / 2)
