"""Every metric at once, each beside its floor."""

import warnings

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
        check(x, name, 2)
        same_shape(samples, x)
    n = min(len(samples), len(train), limit)  # the floor needs as many training points
    sets = [subset(samples, n, seed), subset(train, n, seed + 1), subset(test, limit, seed + 2)]
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
