"""Which samples a step sees: a function of (seed, step), never of what was read before.

The samples of all epochs stand in one endless row, each epoch in an order of its own; step k takes
the places k B to (k + 1) B of that row. A resumed run therefore reads on exactly where the
interrupted one would have. Except for streams, one
batch is read ahead, in a thread, while the network works.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kakusan.core.noise import generator
from kakusan.training.data import Source, Stream

ORDER = 1  # separates this use of the seed from all others
Batch = tuple[Tensor, Tensor | None]


class Order:
    """The endless row of samples.

    Arguments:
        n: How many samples an epoch has.
        seed: Fixes the order of every epoch.

    Example:
        >>> order = Order(5, seed=0)
        >>> sorted(order.places(0, 5).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch, self._row = -1, torch.empty(0, dtype=torch.int64)

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._row = torch.randperm(self.n, generator=generator(self.seed, ORDER, epoch))
            self._epoch = epoch
        return self._row

    def places(self, start: int, stop: int) -> Tensor:
        """The samples at the places from start to stop of the row."""
        parts = []
        while start < stop:
            epoch, i = divmod(start, self.n)
            take = min(stop - start, self.n - i)
            parts.append(self._of(epoch)[i : i + take])
            start += take
        return torch.cat(parts)


def batches(source: Source | Stream, size: int, seed: int, start: int) -> Iterator[Batch]:
    """The batches of steps start, start + 1, ... without end.

    Arguments:
        source: Where samples come from.
        size: Samples a step.
        seed: Fixes the order.
        start: The first step.
    """
    if isinstance(source, Stream):
        yield from source.batches(size, start * size)
        return
    order = Order(len(source), seed)

    def read(step: int) -> Batch:
        return source.batch(order.places(step * size, (step + 1) * size))

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, start)
        while True:
            batch = ahead.result()
            start += 1
            ahead = reader.submit(read, start)
            yield batch
