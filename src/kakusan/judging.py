"""`evaluate`: samples against held-out data, and the bits that a model needs for both."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from kakusan import densities
from kakusan.densities import Likelihoods
from kakusan.errors import KakusanError, UsageError
from kakusan.inference import judge
from kakusan.inference.levels import evenly
from kakusan.inference.metrics.comparison import MEASUREMENTS
from kakusan.training.data import Data, Stream
from kakusan.training.progress import progress

if TYPE_CHECKING:
    from kakusan.pipeline import DiffusionModel

LEAST = 12  # samples that the metrics need, on each side
ROOM = 250_000_000  # numbers of the training data to hold: a gigabyte


def evaluate(
    model: DiffusionModel,
    n: int | None,
    draw: Callable[[int], Tensor],
    data: Data,
    features: str | None,
    seed: int,
    limit: int,
    likelihoods: int,
    quiet: bool,
) -> judge.Evaluation:
    """Judges n samples that `draw` gives; see `DiffusionModel.evaluate`."""
    if likelihoods < 0 or likelihoods == 1:
        raise UsageError(f"likelihoods are of 2 points or more, or 0 for none; got {likelihoods}")
    test, label = judge.gather(data.test, limit, seed)
    n = len(test) if n is None else n
    if min(n, len(test), limit) < LEAST:
        raise UsageError(
            f"the metrics need at least {LEAST} samples and held-out points, got n={n} and "
            f"{len(test)} held-out points"
        )
    # enough to find copies in
    most = max(limit, min(20 * n, ROOM // test[0].numel()))
    most = limit if isinstance(data.train, Stream) else most
    train, train_label = densities.some(data.train, most, seed)
    # a wrong name should not cost the time of sampling
    named = judge.features_of(features, train, train_label)
    x = draw(n)
    if not model.classes:
        label = train_label = None
    if model.config.data.dequantise != "none":
        # the model learned whole numbers spread over their cells, and is judged by whole numbers
        x = densities.rounded(x, model.codec)
    with progress("measure", MEASUREMENTS, quiet=quiet) as advance:
        done = itertools.count()
        found = judge.evaluate(
            model.denoiser, x, test, train, label, named, seed, limit,
            tick=lambda name: advance(next(done), name),
        )  # fmt: skip
        advance(MEASUREMENTS)
    if not likelihoods:
        return found
    few = [
        (v[some := evenly(len(v), likelihoods)], None if y is None else y[some])
        for v, y in ((test, label), (train, train_label))
    ]
    return _with_bits(found, model, few, seed, quiet)


def _with_bits(
    found: judge.Evaluation,
    model: DiffusionModel,
    parts: list[tuple[Tensor, Tensor | None]],
    seed: int,
    quiet: bool,
) -> judge.Evaluation:
    """The same with the bits per dimension of held-out and training data, where they are found."""
    try:
        bits, below = densities.rows(model, parts[0], parts[1], seed, quiet)
    except KakusanError as error:  # everything else was found, at some cost
        warnings.warn(f"no bits per dimension: {error}", stacklevel=4)
        return found
    return dataclasses.replace(found, metrics={**found.metrics, **bits}, bound=below)


def told_apart(found: Likelihoods, held: Likelihoods) -> tuple[float, float]:
    """How often a held-out sample is the likelier of a pair, and the standard error of that.

    The area under the curve of a detector by likelihood; the error is Hanley and McNeil's.
    """
    a, b = held.value, found.value
    area = (a[:, None] > b).double().mean() + 0.5 * (a[:, None] == b).double().mean()
    n, m = len(a), len(b)
    # half a pair more: where all pairs agree, the next one still may not
    A = (area.item() * n * m + 0.5) / (n * m + 1)
    q1, q2 = A / (2 - A), 2 * A**2 / (1 + A)
    spread = A * (1 - A) + (n - 1) * (q1 - A**2) + (m - 1) * (q2 - A**2)
    return area.item(), math.sqrt(max(spread, 0.0) / (n * m))
