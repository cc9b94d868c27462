"""Every metric at once, each beside its floor."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.inference.features import Features
from kakusan.inference.metrics.common import (
    Estimate,
    Row,
    check,
    same_shape,
    subset,
)
from kakusan.inference.metrics.distances import (
    energy_distance,
    frechet,
    kernel_distance,
    mmd,
    sliced_wasserstein,
)
from kakusan.inference.metrics.neighbours import (
    nearest_neighbour,
    precision_recall,
    two_sample_test,
)

Tick = Callable[[str], None]
MEASUREMENTS = 15


def compare(
    samples: Tensor,
    test: Tensor,
    train: Tensor,
    features: Features,
    seed: int = 0,
    limit: int = 5000,
    tick: Tick = lambda name: None,
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
        tick: Called with the name of each measurement before it, `MEASUREMENTS` times.

    Returns:
        A `Row` for each metric by name. `nearest_neighbour` is missing, with a warning, where the
        test split repeats the training split.
    """
    for x, name in ((samples, "samples"), (test, "the test split"), (train, "the training split")):
        check(x, name, 2)
        same_shape(samples, x)
    n = min(len(samples), len(train), limit)  # the floor needs as many training points
    sets = [subset(samples, n, seed), subset(train, n, seed + 1), subset(test, limit, seed + 2)]
    values = _measure(sets[0], sets[2], features, seed, tick)
    floors = _measure(sets[1], sets[2], features, seed, tick)
    on_values = ("sliced_wasserstein", "energy_distance", "mmd", "two_sample_test")
    rows = {
        name: Row(*v, *floors[name][:2], "values" if name in on_values else features.name)
        for name, v in values.items()
    }
    tick("nearest neighbour")
    try:
        near = nearest_neighbour(sets[0], train, sets[2], seed=seed)
        rows["nearest_neighbour"] = Row(near.ratio, near.std_error, near.n, 1.0, 0.0, "values")
    except KakusanError as error:
        warnings.warn(f"nearest_neighbour is left out: {error}", stacklevel=2)
    return rows


def _measure(
    x: Tensor, y: Tensor, features: Features, seed: int, tick: Tick
) -> dict[str, Estimate]:
    fx, fy = features(x), features(y)
    found: dict[str, Estimate] = {}
    measures: dict[str, Callable[[], Any]] = {
        "sliced_wasserstein": lambda: sliced_wasserstein(x, y, seed=seed),
        "energy_distance": lambda: energy_distance(x, y),
        "mmd": lambda: mmd(x, y, seed=seed),
        "two_sample_test": lambda: two_sample_test(x, y, seed=seed),
        "precision recall": lambda: precision_recall(fx, fy, seed=seed),
        "frechet": lambda: frechet(fx, fy, seed=seed),
        "kernel_distance": lambda: kernel_distance(fx, fy),
    }
    for name, measure in measures.items():
        tick(name.replace("_", " "))
        result = measure()
        # a pair of names is a pair of numbers
        found |= zip(name.split(), result, strict=True) if " " in name else {name: result}
    return found
