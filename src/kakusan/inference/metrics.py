r"""Distances between two sample sets, each with its error bar.

Notation: x holds N samples of the law p (usually a model's), y holds M samples of the law q
(usually the test split); a sample of any shape counts as one vector of d numbers. Every metric
returns an `Estimate(value, std_error, n)`; n is the smaller count of the two sides. Arithmetic is
float64 on the CPU (the classifier of `two_sample_test` learns in float32), so that a number does
not depend on the machine the samples were drawn on.

What the numbers can and cannot say:

* `energy_distance`, `mmd` and `kernel_distance` are unbiased: their mean is 0 where p = q, and
  they may then come out negative. They are squares: half the difference is a quarter the number.
* `sliced_wasserstein` and `frechet` are biased upwards at every finite N: two sets of the same law
  are at a positive distance. They mean something only beside a *floor*: the same metric, at the
  same counts, between real data and real data. `compare` gives it.
* `two_sample_test` says how well *this* classifier tells the sets apart; another might do better.
* `precision_recall` sees modes invented or missed, and nothing of the densities within one.
* `nearest_neighbour` sees copies of training points; it cannot see the memorisation of parts.
* Distances on features are blind to what the features ignore: two numbers on different features
  never compare.

The standard error is the spread of `value` over new draws of x, y and the seed, about its own
mean: it contains the sampling noise and not the bias. A value and its floor share y, so their
errors are correlated.

References:
    Sliced and Radon Wasserstein barycenters of measures (Bonneel et al., 2015)
    Central limit theorems for empirical transportation cost (del Barrio & Loubes, 2019)
    Energy statistics: a class of statistics based on distances (Székely & Rizzo, 2013)
    A kernel two-sample test (Gretton et al., 2012)
    The jackknife estimate of variance (Efron & Stein, 1981)
    A general theory for jackknife variance estimation (Shao & Wu, 1989)
    Revisiting classifier two-sample tests (Lopez-Paz & Oquab, 2017)
    Improved precision and recall metric for generative models (Kynkäänniemi et al., 2019)
    GANs trained by a two time-scale update rule (Heusel et al., 2017)
    Demystifying MMD GANs (Bińkowski et al., 2018)
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.inference.features import Features

__all__ = [
    "Estimate",
    "NearestNeighbour",
    "Row",
    "compare",
    "energy_distance",
    "frechet",
    "kernel_distance",
    "mmd",
    "nearest_neighbour",
    "precision_recall",
    "sliced_wasserstein",
    "two_sample_test",
]

Kernel = Callable[[Tensor, Tensor], Tensor]


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


def _check(x: Tensor, name: str, least: int) -> None:
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


def _rows(x: Tensor) -> Tensor:
    """The samples as rows of float64 on the CPU, (N, d)."""
    return x.detach().cpu().to(torch.float64).reshape(len(x), -1)


def _same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape[1:] != y.shape[1:]:
        raise KakusanError(
            f"the two sets hold samples of different shapes: {tuple(x.shape)} and "
            f"{tuple(y.shape)} must agree after the first number"
        )


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    _check(x, "the first set (x)", least)
    _check(y, "the second set (y)", least)
    _same_shape(x, y)
    return _rows(x), _rows(y)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _subset(x: Tensor, n: int, seed: int) -> Tensor:
    """A random n of the samples, in random order; all of them, untouched, where n covers them."""
    if len(x) <= n:
        return x
    return x[torch.randperm(len(x), generator=_generator(seed))[:n].to(x.device)]


def _jackknife(values: Sequence[float]) -> float:
    """The standard error of a statistic from its values with one group of samples left out."""
    v = torch.as_tensor(values, dtype=torch.float64)
    return float(((len(v) - 1) * v.var(correction=0)).sqrt())


def _groups(n: int, groups: int, seed: int) -> Tensor:
    """Random labels 0 .. groups-1 of nearly equal frequency, (n,)."""
    return torch.randperm(n, generator=_generator(seed)) % groups


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
    x, y = _pair(x, y, least=4)
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
    x, y = _pair(x, y, least=4)
    w = _median_distance(y, seed) if width is None else width
    if not w > 0:
        raise KakusanError(f"the kernel's width is {w}, but it must be positive")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b).square_()
        return sum((squares / (-2 * (s * w) ** 2)).exp_() for s in scales) / len(scales)  # pyright: ignore[reportReturnType]

    return _u_statistic(x, y, kernel, chunk)


def _median_distance(y: Tensor, seed: int) -> float:
    """The median heuristic, over pairs that differ: a table may hold many equal rows."""
    distances = torch.pdist(_subset(y, 1000, seed))
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
    x, y = _pair(x_features, y_features, least=4)
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
    x, y = _pair(x, y, least=2)
    theta = torch.randn(x.shape[1], projections, generator=_generator(seed), dtype=x.dtype)
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
    x, y = _pair(x_features, y_features, least=8)
    groups = min(groups, len(x) // 2, len(y) // 2)
    centre = y.mean(0)  # a common shift changes nothing, but keeps the sums of squares small
    x, y = x - centre, y - centre
    gx, gy = _groups(len(x), groups, seed), _groups(len(y), groups, seed + 1)
    left_out = [_frechet(x[gx != g], y[gy != g]) for g in range(groups)]
    return Estimate(_frechet(x, y), _jackknife(left_out), min(len(x), len(y)))


def _frechet(x: Tensor, y: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = torch.nn.Identity()
    given.num_features = x.shape[1]  # pyright: ignore[reportArgumentType]
    distance = FrechetInceptionDistance(feature=given).set_dtype(torch.float64)
    distance.update(y, real=True)
    distance.update(x, real=False)
    return float(distance.compute())


# --- a classifier's view ----------------------------------------------------------------------


def two_sample_test(
    x: Tensor, y: Tensor, *, seed: int = 0, classifier: Any = None, folds: int = 5
) -> Estimate:
    """How often a classifier tells samples of x from samples of y: 0.5 is never, 1 always.

    Accuracy over `folds` of cross-validation on equally many samples of each set. All values share
    one scale, so that a column that hardly varies (the border of a picture) is not blown up.

    Arguments:
        x: Samples, with shape (N, *shape).
        y: Reference samples, with shape (M, *shape).
        seed: Draws the subset of the larger set, the folds and the classifier's first weights.
        classifier: A scikit-learn classifier; by default `MLPClassifier` with two hidden layers of
            64, alpha=1 and 60 epochs. Trees are sharper, down to how values were rounded.
        folds: The number of folds.

    Returns:
        The accuracy, with the binomial standard error of 2 n guesses.

    Example:
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> two_sample_test(x, x + 5).value > 0.98
        True
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neural_network import MLPClassifier

    x, y = _pair(x, y, least=2 * folds)
    n = min(len(x), len(y))
    x, y = _subset(x, n, seed), _subset(y, n, seed)
    scale = y.std().item() or 1.0
    points = ((torch.cat([x, y]) - y.mean(0)) / scale).float().numpy()
    labels = torch.arange(2).repeat_interleave(n).numpy()
    if classifier is None:
        classifier = MLPClassifier((64, 64), alpha=1.0, max_iter=60, random_state=seed)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # 60 epochs are a choice, not a failure to converge
        warnings.simplefilter("ignore", ConvergenceWarning)
        guesses = cross_val_predict(classifier, points, labels, cv=split)
    hits = int((torch.as_tensor(guesses) == torch.as_tensor(labels)).sum())
    return _proportion(hits, 2 * n, n)


def _proportion(hits: int, trials: int, n: int) -> Estimate:
    """A frequency with its binomial error; one more hit and miss keep the error above zero."""
    p = (hits + 1) / (trials + 2)
    return Estimate(hits / trials, (p * (1 - p) / trials) ** 0.5, n)


# --- neighbours -------------------------------------------------------------------------------


def precision_recall(
    x: Tensor, y: Tensor, k: int = 5, *, seed: int = 0, halves: int = 20, chunk: int = 1024
) -> tuple[Estimate, Estimate]:
    """Precision: the part of x among y; recall: the part of y among x.

    "Among" means within the ball of at least one point, whose radius is the distance to its k-th
    neighbour in its own set. Two sets of one law do not reach 1: see the floor. Equally many of
    each set are used. The errors are the spread over random halves of both sets (the delete-half
    jackknife), since the balls vary with the draw as much as the points that are asked about;
    deleting less overstates a statistic that jumps as this one does.

    Arguments:
        x: Samples (or their features), with shape (N, *shape).
        y: Reference samples (or their features), with shape (M, *shape).
        k: Which neighbour gives the radius.
        seed: Draws the subset of the larger set and the halves.
        halves: How many random halves give the errors.
        chunk: How many rows of the distance matrix are held at once.

    Example:
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> [e.value for e in precision_recall(x, x + 9)]
        [0.0, 0.0]
    """
    if k < 1:
        raise KakusanError(f"k is {k}, but the radius needs a neighbour: 1 or more")
    x, y = _pair(x, y, least=2 * k + 2)  # k neighbours within a half
    n = min(len(x), len(y))
    x, y = _subset(x, n, seed) - y.mean(0), _subset(y, n, seed) - y.mean(0)
    kx, ky = _halves(n, halves, seed), _halves(n, halves, seed + 1)
    # distances of equal points are zero only up to rounding
    slack = 1e-7 * float(y.square().sum(1).mean().sqrt())
    rx, ry = _radii(x, k, kx, chunk) + slack, _radii(y, k, ky, chunk) + slack
    x_in, y_in = torch.zeros_like(kx), torch.zeros_like(ky)
    for i in range(0, n, chunk):
        rows, d = slice(i, i + chunk), torch.cdist(x[i : i + chunk], y)
        for h in range(1 + halves):
            x_in[h, rows] = (d <= ry[h]).any(1)
            y_in[h] |= (d <= rx[h, rows, None]).any(0)
    return _frequency(x_in, kx), _frequency(y_in, ky)


def _halves(n: int, halves: int, seed: int) -> Tensor:
    """Which points are kept, (1 + halves, n): all of them, then random halves."""
    order = torch.rand(halves, n, generator=_generator(seed)).argsort(1)
    return torch.cat([torch.ones(1, n, dtype=torch.bool), order < n // 2])


def _radii(y: Tensor, k: int, keep: Tensor, chunk: int) -> Tensor:
    """Distances to the k-th neighbour among the kept points, (1 + halves, N).

    A point that is itself left out has radius -inf: its ball holds nothing.
    """
    n = len(y)
    near, who = [], []
    for i in range(0, n, chunk):
        d = torch.cdist(y[i : i + chunk], y)
        d.diagonal(offset=i).fill_(torch.inf)
        # among 4 k + 16 neighbours a half holds k, save for one time in 10^4
        found = d.topk(min(4 * k + 16, n - 1), largest=False)
        near.append(found.values)
        who.append(found.indices)
    near, who = torch.cat(near), torch.cat(who)
    radii = []
    for kept in keep:
        kth = (kept[who].cumsum(1) < k).sum(1).clamp(max=near.shape[1] - 1)
        radii.append(near.gather(1, kth[:, None])[:, 0].masked_fill(~kept, -torch.inf))
    return torch.stack(radii)


def _frequency(inside: Tensor, keep: Tensor) -> Estimate:
    """The frequency of row 0, its error from the other rows, at least the binomial error."""
    n, half = inside.shape[1], inside.shape[1] // 2
    whole = _proportion(int(inside[0].sum()), n, n)
    rates = (inside & keep)[1:].sum(1).double() / half
    spread = float(rates.std()) * (half / (n - half)) ** 0.5
    return whole._replace(std_error=max(spread, whole.std_error))


def nearest_neighbour(
    x: Tensor, train: Tensor, test: Tensor, *, seed: int = 0, resamples: int = 400
) -> NearestNeighbour:
    """How near samples lie to the training split, against how near the test split lies to it.

    A ratio of 1 is what new data show; well below 1, the model repeats its training points. The
    error of the ratio is a bootstrap of both medians, the training split being given.

    Arguments:
        x: Samples, with shape (N, *shape).
        train: The training split, with shape (K, *shape); may be larger than memory.
        test: The test split, with shape (M, *shape).
        seed: Draws the bootstrap.
        resamples: The number of bootstrap draws.

    Example:
        >>> data = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> nearest_neighbour(data[:50], train=data[:200], test=data[200:]).ratio
        0.0
    """
    _check(train, "the training split", 1)
    _same_shape(x, train)
    x, test = _pair(x, test, least=2)
    dx, dt = _nearest(x, train), _nearest(test, train)
    sample, own = _median(dx), _median(dt)
    if own == 0:
        raise KakusanError(
            f"at least half of the {len(test)} test points are copies of training points, so "
            "distances to the training split say nothing; remove the copies"
        )
    generator = _generator(seed)
    medians = []
    for d in (dx, dt):
        draws = torch.randint(len(d), (resamples, len(d)), generator=generator)
        medians.append(_median(d[draws]))
    ratios = (medians[0] / medians[1])[medians[1] > 0]  # a draw may hold mostly copies
    ratio = float(sample / own)
    return NearestNeighbour(
        float(sample), float(own), ratio, float(ratios.std()), min(len(x), len(test))
    )


def _median(x: Tensor) -> Tensor:
    return x.quantile(0.5, dim=-1)


def _nearest(x: Tensor, train: Tensor, chunk: int = 4096) -> Tensor:
    """Distance of each row of x to the nearest of train: sought in float32, then in float64."""
    centre = x.mean(0)  # about the centre, float32 loses nothing to a common offset
    asked = (x - centre).float()
    best, who = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long)
    for start in range(0, len(train), chunk):
        block = (_rows(train[start : start + chunk]) - centre).float()
        squares = block.square().sum(1)
        for i in range(0, len(x), 1024):
            d = torch.addmm(squares, asked[i : i + 1024], block.mT, alpha=-2)  # less |x|^2
            least, index = d.min(1)
            closer = least < best[i : i + 1024]
            best[i : i + 1024][closer] = least[closer]
            who[i : i + 1024][closer] = index[closer] + start
    return torch.cat(
        [
            (x[i : i + chunk] - _rows(train[who[i : i + chunk].to(train.device)])).norm(dim=1)
            for i in range(0, len(x), chunk)
        ]
    )


# --- all of them ------------------------------------------------------------------------------


def compare(
    samples: Tensor,
    test: Tensor,
    train: Tensor,
    features: Features,
    seed: int = 0,
    limit: int = 5000,
) -> dict[str, Row]:
    """Every metric of samples against the test split, beside its floor.

    The floor is the same metric of as many training points as there are samples, against the same
    test points: what a perfect model would score. For `nearest_neighbour` the floor is 1, by
    definition. Precision, recall, Fréchet and kernel distance are measured on the features, the
    others on the values.

    Arguments:
        samples: Samples of the model, with shape (N, *shape).
        test: The test split, with shape (M, *shape).
        train: The training split, with shape (K, *shape).
        features: A feature map, already fitted where it needs to be.
        seed: Draws the subsets, directions, folds and groups.
        limit: At most so many samples, and so many test points, are used, drawn by seed.

    Returns:
        A `Row` for each metric by name. `nearest_neighbour` is missing, with a warning, where the
        test split repeats the training split.
    """
    for x, name in ((samples, "samples"), (test, "the test split"), (train, "the training split")):
        _check(x, name, 2)
        _same_shape(samples, x)
    n = min(len(samples), len(train), limit)  # the floor needs as many training points
    sets = [_subset(samples, n, seed), _subset(train, n, seed + 1), _subset(test, limit, seed + 2)]
    values = _measure(sets[0], sets[2], features, seed)
    floors = _measure(sets[1], sets[2], features, seed)
    on_values = ("sliced_wasserstein", "energy_distance", "mmd", "two_sample_test")
    rows = {
        name: Row(*v, *floors[name][:2], "values" if name in on_values else features.name)
        for name, v in values.items()
    }
    try:
        near = nearest_neighbour(sets[0], train, sets[2], seed=seed)
        rows["nearest_neighbour"] = Row(near.ratio, near.std_error, near.n, 1.0, 0.0, "values")
    except KakusanError as error:
        warnings.warn(f"nearest_neighbour is left out: {error}", stacklevel=2)
    return rows


def _measure(x: Tensor, y: Tensor, features: Features, seed: int) -> dict[str, Estimate]:
    fx, fy = features(x), features(y)
    precision, recall = precision_recall(fx, fy, seed=seed)
    return {
        "sliced_wasserstein": sliced_wasserstein(x, y, seed=seed),
        "energy_distance": energy_distance(x, y),
        "mmd": mmd(x, y, seed=seed),
        "two_sample_test": two_sample_test(x, y, seed=seed),
        "precision": precision,
        "recall": recall,
        "frechet": frechet(fx, fy, seed=seed),
        "kernel_distance": kernel_distance(fx, fy),
    }
