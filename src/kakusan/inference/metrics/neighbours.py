"""What a classifier and the nearest neighbours see: invented, missing and copied samples."""

import warnings
from typing import Any

import torch
from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.inference.metrics.common import (
    Estimate,
    NearestNeighbour,
    as_rows,
    check,
    pair,
    same_shape,
    seeded,
    subset,
)

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

    x, y = pair(x, y, least=2 * folds)
    n = min(len(x), len(y))
    x, y = subset(x, n, seed), subset(y, n, seed)
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
    x, y = pair(x, y, least=2 * k + 2)  # k neighbours within a half
    n = min(len(x), len(y))
    x, y = subset(x, n, seed) - y.mean(0), subset(y, n, seed) - y.mean(0)
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
    order = torch.rand(halves, n, generator=seeded(seed)).argsort(1)
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
    check(train, "the training split", 1)
    same_shape(x, train)
    x, test = pair(x, test, least=2)
    dx, dt = _nearest(x, train), _nearest(test, train)
    sample, own = _median(dx), _median(dt)
    if own == 0:
        raise KakusanError(
            f"at least half of the {len(test)} test points are copies of training points, so "
            "distances to the training split say nothing; remove the copies"
        )
    generator = seeded(seed)
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
        block = (as_rows(train[start : start + chunk]) - centre).float()
        squares = block.square().sum(1)
        for i in range(0, len(x), 1024):
            d = torch.addmm(squares, asked[i : i + 1024], block.mT, alpha=-2)  # less |x|^2
            least, index = d.min(1)
            closer = least < best[i : i + 1024]
            best[i : i + 1024][closer] = least[closer]
            who[i : i + 1024][closer] = index[closer] + start
    return torch.cat(
        [
            (x[i : i + chunk] - as_rows(train[who[i : i + chunk].to(train.device)])).norm(dim=1)
            for i in range(0, len(x), chunk)
        ]
    )
