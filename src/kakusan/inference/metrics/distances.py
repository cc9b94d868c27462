"""Distances between two laws: of energy, of kernels, of transport, of Gaussian features."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.inference.metrics.common import (
    Estimate,
    group_places,
    jackknife,
    pair,
    seeded,
    subset,
)

Kernel = Callable[[Tensor, Tensor], Tensor]

# --- U-statistics: one machine for energy distance, MMD and kernel distance -------------------


class _Pairs(NamedTuple):
    """Kernel values of all pairs, summed up: means, and the variance left after both means."""

    mean: Tensor  # ()
    rows: Tensor  # (N,)
    columns: Tensor  # (M,)
    interaction: Tensor  # ()


def _within(x: Tensor, kernel: Kernel, chunk: int) -> _Pairs:
    """The pairs i != i' of one set."""
    n = len(x)
    rows, squares = torch.empty(n, dtype=x.dtype), x.new_zeros(())
    for i in range(0, n, chunk):
        k = kernel(x[i : i + chunk], x)
        k.diagonal(offset=i).zero_()
        rows[i : i + chunk] = k.sum(1) / (n - 1)
        squares += k.square().sum()
    mean = rows.mean()
    # sum of (k_ij - r_i - r_j + mean)^2 over i != j, multiplied out; n (n - 3) degrees of freedom
    left = squares - 2 * n * rows.square().sum() + n * (n + 1) * mean**2
    return _Pairs(mean, rows, rows, left.clamp(min=0) / (n * (n - 3)))


def _between(x: Tensor, y: Tensor, kernel: Kernel, chunk: int) -> _Pairs:
    """All pairs of a sample of x with a sample of y."""
    n, m = len(x), len(y)
    rows, columns = torch.empty(n, dtype=x.dtype), x.new_zeros(m)
    squares = x.new_zeros(())
    for i in range(0, n, chunk):
        k = kernel(x[i : i + chunk], y)
        rows[i : i + chunk] = k.mean(1)
        columns += k.sum(0) / n
        squares += k.square().sum()
    mean = rows.mean()
    left = squares - m * rows.square().sum() - n * columns.square().sum() + n * m * mean**2
    return _Pairs(mean, rows, columns, left.clamp(min=0) / ((n - 1) * (m - 1)))


def _u_statistic(x: Tensor, y: Tensor, kernel: Kernel, chunk: int) -> Estimate:
    r"""E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased, with its standard error.

    The jackknife variance, var(a)/N + var(b)/M of the influences a and b of single samples, counts
    the interaction of pairs twice (Efron & Stein); it is subtracted once. What is left is never
    less than the interaction itself, which is all there is where p = q.
    """
    n, m = len(x), len(y)
    xx, yy = _within(x, kernel, chunk), _within(y, kernel, chunk)
    xy = _between(x, y, kernel, chunk)
    a, b = 2 * (xx.rows - xy.rows), 2 * (yy.rows - xy.columns)
    once = a.var() / n + b.var() / m
    pairs = 2 * xx.interaction / n**2 + 2 * yy.interaction / m**2 + 4 * xy.interaction / (n * m)
    variance = torch.maximum(once - pairs, pairs)
    value = xx.mean + yy.mean - 2 * xy.mean
    return Estimate(float(value), float(variance.sqrt()), min(n, m))


def energy_distance(x: Tensor, y: Tensor, *, seed: int = 0, chunk: int = 1024) -> Estimate:
    r"""The energy distance, unbiased; 0 in expectation if and only if p = q.

    .. math:: 2 E|x - y| - E|x - x'| - E|y - y'|

    Arguments:
        x: Samples, with shape (N, *shape).
        y: Reference samples, with shape (M, *shape).
        seed: Unused: nothing here is random.
        chunk: How many rows of the distance matrix are held at once.

    Example:
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> round(energy_distance(x, x + 3).value, 1)
        5.5
    """
    x, y = pair(x, y, least=4)
    return _u_statistic(x, y, lambda a, b: -torch.cdist(a, b), chunk)


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    seed: int = 0,
    width: float | None = None,
    scales: Sequence[float] = (0.5, 1.0, 2.0),
    chunk: int = 1024,
) -> Estimate:
    r"""The squared maximum mean discrepancy, unbiased, of a mixture of Gaussian kernels.

    .. math:: k(x, y) = \frac1S \sum_s \exp(-|x - y|^2 / (2 (s w)^2))

    Arguments:
        x: Samples, with shape (N, *shape).
        y: Reference samples, with shape (M, *shape).
        seed: Draws the thousand reference samples whose distances give the width.
        width: The width w. By default the median distance between two samples of y that differ.
        scales: The multiples s of w that are averaged.
        chunk: How many rows of the kernel matrix are held at once.

    Example:
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> mmd(x, x + 3).value > 0.5
        True
    """
    x, y = pair(x, y, least=4)
    w = _median_distance(y, seed) if width is None else width
    if not w > 0:
        raise KakusanError(f"the kernel's width is {w}, but it must be positive")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b).square_()
        return sum((squares / (-2 * (s * w) ** 2)).exp_() for s in scales) / len(scales)  # pyright: ignore[reportReturnType]

    return _u_statistic(x, y, kernel, chunk)


def _median_distance(y: Tensor, seed: int) -> float:
    """The median heuristic, over pairs that differ: a table may hold many equal rows."""
    distances = torch.pdist(subset(y, 1000, seed))
    distances = distances[distances > 0]
    if len(distances) == 0:
        raise KakusanError(
            f"all {len(y)} samples of the second set (y) are equal, so no kernel width follows "
            "from their distances; pass width"
        )
    return float(distances.median())


def kernel_distance(
    x_features: Tensor, y_features: Tensor, *, seed: int = 0, chunk: int = 1024
) -> Estimate:
    r"""The kernel distance (KID): the squared MMD of k(x, y) = (x·y/d + 1)^3 on given features.

    All pairs are used, not random subsets as in torchmetrics' KernelInceptionDistance, whose
    spread over overlapping subsets is no standard error.

    Arguments:
        x_features: Features of the samples, with shape (N, d).
        y_features: Features of the reference, with shape (M, d).
        seed: Unused: nothing here is random.
        chunk: How many rows of the kernel matrix are held at once.
    """
    x, y = pair(x_features, y_features, least=4)
    return _u_statistic(x, y, lambda a, b: ((a @ b.mT) / a.shape[1] + 1) ** 3, chunk)


# --- transport --------------------------------------------------------------------------------


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 512, *, seed: int = 0) -> Estimate:
    r"""The sliced Wasserstein distance of order 2, by POT, over random directions.

    .. math:: SW = \left( E_\theta\, W_2^2(\theta \cdot x, \theta \cdot y) \right)^{1/2}

    Biased upwards by the finite counts: read it beside its floor. The error is that of the central
    limit theorem for transport costs: the derivative of SW² in the weight of one sample is its
    Kantorovich potential, averaged over the directions; the spread of the potentials over samples,
    and of W² over the directions, is carried through the square root. Where p = q the error is
    up to 1.5 times too large.

    Arguments:
        x: Samples, with shape (N, *shape).
        y: Reference samples, with shape (M, *shape).
        projections: The number of directions.
        seed: Draws the directions; equal seeds give equal directions.

    Example:
        >>> x = torch.zeros(10, 4)
        >>> y = torch.ones(10, 4)  # E (theta . m)^2 = |m|^2 / d = 1
        >>> abs(sliced_wasserstein(x, y).value - 1) < 0.1
        True
    """
    from ot import wasserstein_1d

    if projections < 2:
        raise KakusanError(f"projections is {projections}, but at least 2 are needed")
    x, y = pair(x, y, least=2)
    theta = torch.randn(x.shape[1], projections, generator=seeded(seed), dtype=x.dtype)
    theta = theta / theta.norm(dim=0)
    costs, phi, psi = [], torch.zeros(len(x), dtype=x.dtype), torch.zeros(len(y), dtype=x.dtype)
    for part in theta.split(64, dim=1):  # 64 at a time bound the memory
        px, py = x @ part, y @ part
        costs.append(torch.as_tensor(wasserstein_1d(px.numpy(), py.numpy(), p=2)))
        phi += _potential(px, py).sum(1) / projections
        psi += _potential(py, px).sum(1) / projections
    cost = torch.cat(costs)
    variance = phi.var() / len(x) + psi.var() / len(y) + cost.var() / projections
    value = cost.mean().clamp(min=0).sqrt()
    error = variance.sqrt() / (2 * value) if value > 0 else variance
    return Estimate(float(value), float(error), min(len(x), len(y)))


def _potential(x: Tensor, y: Tensor) -> Tensor:
    """Kantorovich potentials of W_2^2 in each column: their slope is 2 (x - T(x)). (N, P)."""
    xs, order = x.sort(dim=0)
    n, m = len(x), len(y)
    # T sends the quantile (i + 1/2) / n of x to the same quantile of y
    at = ((torch.arange(n, dtype=x.dtype) + 0.5) * (m / n) - 0.5).clamp(0, m - 1)
    low = at.floor().long()
    ys = y.sort(dim=0).values
    mapped = torch.lerp(ys[low], ys[(low + 1).clamp(max=m - 1)], (at - low)[:, None])
    slope = 2 * (xs - mapped)
    rises = (slope[1:] + slope[:-1]) / 2 * xs.diff(dim=0)
    heights = torch.cat([torch.zeros_like(xs[:1]), rises.cumsum(0)])
    return torch.zeros_like(x).scatter(0, order, heights)


def frechet(
    x_features: Tensor, y_features: Tensor, *, seed: int = 0, groups: int = 20
) -> Estimate:
    r"""The Fréchet distance of Gaussians fitted to two sets of features, by torchmetrics.

    .. math:: |\mu_x - \mu_y|^2 + \mathrm{tr}(\Sigma_x + \Sigma_y - 2 (\Sigma_x \Sigma_y)^{1/2})

    Biased upwards by the finite counts: for one law with covariance s² I on both sides, by about
    s² (1/N + 1/M) d (d + 5) / 4. Compare at equal counts only, beside the floor. The error is a
    jackknife that leaves out one of `groups` random groups of both sets at a time; where p = q it
    is up to 1.4 times too large.

    Arguments:
        x_features: Features of the samples, with shape (N, d).
        y_features: Features of the reference, with shape (M, d).
        seed: Draws the groups.
        groups: How many groups; each costs an eigenvalue problem of size d.
    """
    x, y = pair(x_features, y_features, least=8)
    groups = min(groups, len(x) // 2, len(y) // 2)
    centre = y.mean(0)  # a common shift changes nothing, but keeps the sums of squares small
    x, y = x - centre, y - centre
    gx, gy = group_places(len(x), groups, seed), group_places(len(y), groups, seed + 1)
    left_out = [_frechet(x[gx != g], y[gy != g]) for g in range(groups)]
    return Estimate(_frechet(x, y), jackknife(left_out), min(len(x), len(y)))


def _frechet(x: Tensor, y: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = torch.nn.Identity()
    given.num_features = x.shape[1]  # pyright: ignore[reportArgumentType]
    distance = FrechetInceptionDistance(feature=given).set_dtype(torch.float64)
    distance.update(y, real=True)
    distance.update(x, real=False)
    return float(distance.compute())
