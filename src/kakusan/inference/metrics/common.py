"""What all metrics share: their results, and the door that samples come in by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.errors import KakusanError


class Estimate(NamedTuple):
    """A number, its standard error, and the sample count behind it (the smaller side's)."""

    value: float
    std_error: float
    n: int


class NearestNeighbour(NamedTuple):
    """Median distances to the nearest training point; `std_error` is that of `ratio`."""

    sample_median: float
    test_median: float
    ratio: float
    std_error: float
    n: int


class Row(NamedTuple):
    """One metric of samples against test data, and its floor: training data against test data.

    `features` names what was measured: "values" (the samples themselves) or a feature map.
    """

    value: float
    std_error: float
    n: int
    floor: float
    floor_std_error: float
    features: str


# --- at the door ------------------------------------------------------------------------------


def check(x: Tensor, name: str, least: int) -> None:
    """Refuses too few samples and values that are not finite."""
    shape = tuple(x.shape)
    if x.ndim == 0 or len(x) < least or x.numel() == 0:
        raise KakusanError(f"{name} has shape {shape}, but at least {least} samples are needed")
    # by blocks: a training split may be a memory-mapped file larger than memory
    bad = torch.cat([~b.reshape(len(b), -1).isfinite().all(1) for b in x.detach().split(4096)])
    if bad.any():
        first, count = int(bad.int().argmax()), int(bad.sum())
        raise KakusanError(
            f"{name} of shape {shape} has {count} samples with values that are not finite, "
            f"the first is row {first}; remove or mend them"
        )


def as_rows(x: Tensor) -> Tensor:
    """The samples as rows of float64 on the CPU, (N, d)."""
    return x.detach().cpu().to(torch.float64).reshape(len(x), -1)


def same_shape(x: Tensor, y: Tensor) -> None:
    """Refuses sets whose samples have different shapes."""
    if x.shape[1:] != y.shape[1:]:
        raise KakusanError(
            f"the two sets hold samples of different shapes: {tuple(x.shape)} and "
            f"{tuple(y.shape)} must agree after the first number"
        )


def pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both sets as rows of float64, once they are fit to be compared."""
    check(x, "the first set (x)", least)
    check(y, "the second set (y)", least)
    same_shape(x, y)
    return as_rows(x), as_rows(y)


def seeded(seed: int) -> torch.Generator:
    """A generator for subsets, directions and folds."""
    return torch.Generator().manual_seed(seed)


def subset(x: Tensor, n: int, seed: int) -> Tensor:
    """A random n of the samples, in random order; all of them, untouched, where n covers them."""
    if len(x) <= n:
        return x
    return x[torch.randperm(len(x), generator=seeded(seed))[:n].to(x.device)]


def jackknife(values: Sequence[float]) -> float:
    """The standard error of a statistic from its values with one group of samples left out."""
    v = torch.as_tensor(values, dtype=torch.float64)
    return float(((len(v) - 1) * v.var(correction=0)).sqrt())


def group_places(n: int, groups: int, seed: int) -> Tensor:
    """Random labels 0 .. groups-1 of nearly equal frequency, (n,)."""
    return torch.randperm(n, generator=seeded(seed)) % groups
