"""Data in the box: handwritten digits, and densities in the plane to look at.

The digits are scikit-learn's 1,797 images of 8 x 8 pixels with the values 0..16. Each toy density
is 20,000 points drawn from the seed; none has labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from kakusan.training.data.arrays import HeldRows
from kakusan.training.data.sources import Found, keyed, numbered

TOY_POINTS = 20_000


def read_digits() -> Found:
    """The digits, labelled 0 to 9."""
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    labels = np.asarray(targets, np.int64)
    images = np.asarray(values, np.uint8).reshape(-1, 8, 8)
    rows = HeldRows(images, "digits", levels=16)
    return Found(rows, labels, numbered(labels))


def read_toy(name: str, seed: int, n: int = TOY_POINTS) -> Found:
    """Points of one of `TOYS`, the same for the same seed.

    Example:
        >>> len(read_toy("rings", seed=0, n=100).rows)
        100
    """
    points = TOYS[name](n, keyed(f"toy {name}", seed))
    return Found(HeldRows(points.float().numpy(), name))


def two_moons(n: int, g: Generator) -> Tensor:
    """Two interleaved half circles with Gaussian blur 0.05."""
    upper = torch.rand(n, generator=g) < 0.5
    a = math.pi * torch.rand(n, generator=g)
    x = torch.where(upper, a.cos(), 1 - a.cos())
    y = torch.where(upper, a.sin(), 0.5 - a.sin())
    return torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2, generator=g)


def swiss_roll(n: int, g: Generator) -> Tensor:
    """A spiral r = a with Gaussian blur 0.4."""
    a = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=g))
    spiral = torch.stack([a * a.cos(), a * a.sin()], 1)
    return spiral + 0.4 * torch.randn(n, 2, generator=g)


def eight_gaussians(n: int, g: Generator) -> Tensor:
    """Eight Gaussians of deviation 0.2 on a circle of radius 2."""
    a = (math.pi / 4) * torch.randint(8, (n,), generator=g)
    return 2 * torch.stack([a.cos(), a.sin()], 1) + 0.2 * torch.randn(n, 2, generator=g)


def checkerboard(n: int, g: Generator) -> Tensor:
    """The dark squares of a 4 x 4 board on [-2, 2]^2."""
    column = torch.randint(4, (n,), generator=g)
    row = 2 * torch.randint(2, (n,), generator=g) + column % 2
    return torch.stack([column, row], 1) + torch.rand(n, 2, generator=g) - 2


def rings(n: int, g: Generator) -> Tensor:
    """Four concentric circles of radius 1 to 4, equally likely, with Gaussian blur 0.08."""
    r = 1.0 + torch.randint(4, (n,), generator=g)
    a = 2 * math.pi * torch.rand(n, generator=g)
    points = r[:, None] * torch.stack([a.cos(), a.sin()], 1)
    return points + 0.08 * torch.randn(n, 2, generator=g)


TOYS: dict[str, Callable[[int, Generator], Tensor]] = {
    "two-moons": two_moons,
    "swiss-roll": swiss_roll,
    "eight-gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "rings": rings,
}
