"""Numbers about a training part that a model needs to know."""

from __future__ import annotations

import torch

from kakusan.inference.levels import evenly
from kakusan.training.data.sources import Batch, Data, Source, Stream


def rms(data: Data, most: int = 2048) -> float:
    """The root mean square of the data in model units, from evenly spread samples."""
    x, _ = first(data.train, most) if isinstance(data.train, Stream) else spread(data.train, most)
    return max(x.square().mean().sqrt().item(), 1e-3)


def spread(source: Source, most: int) -> Batch:
    """At most so many samples, evenly spread over a source."""
    return source.batch(evenly(len(source), most))


def first(stream: Stream, n: int) -> Batch:
    """The first n samples of a stream."""
    return next(iter(stream.batches(n, 0)))


def shares(data: Data, classes: int) -> tuple[float, ...]:
    """The share of each class in the training part."""
    if isinstance(data.train, Stream):
        _, labels = first(data.train, 2048)
    else:
        labels = data.train.labels
    if labels is None:
        return (1 / classes,) * classes
    counts = torch.bincount(labels, minlength=classes).double()
    return tuple((counts / counts.sum()).tolist())
