"""Least squares on batches without end: how a score or a bridge is learned from paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kakusan.errors import KakusanError
from kakusan.training.ema import Average
from kakusan.training.progress import progress

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")
P = TypeVar("P", bound=tuple)


class Stopped(KeyboardInterrupt):
    """Ctrl-C after some steps; `learned` is what they gave, where that can be used."""

    def __init__(self, steps: int) -> None:
        super().__init__(f"stopped after {steps:,} steps")
        self.steps = steps
        self.learned: Any = None


def strata(n: int, times: int, source: torch.Generator) -> list[int]:
    """Steps among n, one random one in each of as many equal parts."""
    u = torch.rand(times, generator=source, dtype=torch.float64)
    at = ((torch.arange(times) + u) * n / times).long().clamp(max=n - 1)
    return sorted(set(at.tolist()))


def shuffled(pool: P, visits: int, batch: int, source: torch.Generator) -> Iterator[P]:
    """The rows of a tuple of tensors in batches, in random order, so many times."""
    n, device = len(pool[0]), pool[0].device
    for _ in range(visits):
        for rows in torch.randperm(n, generator=source).split(batch):
            yield type(pool)(*(part[rows.to(device)] for part in pool))


def regress(
    model: M,
    average: Average[M],
    batches: Iterator[B],
    error: Callable[[M, B], Tensor],
    iterations: int,
    lr: float,
    label: str,
    quiet: bool,
) -> None:
    """Trains a model in place, and its average beside it.

    Arguments:
        model: What is trained.
        average: The average of its weights.
        batches: What is shown.
        error: The mean loss of a model on a batch.
        iterations: How many steps.
        lr: Where the learning rate starts; it falls to zero along half a cosine.
        label: What the progress bar says.
        quiet: Whether to show none.

    Raises:
        KakusanError: If the loss stops being finite.
        Stopped: On Ctrl-C, after the first step.
    """
    k, optimizer = 0, torch.optim.Adam(model.parameters(), lr, fused=True)
    try:
        with progress(label, iterations, quiet=quiet) as advance:
            for k in range(iterations):
                for group in optimizer.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * k / iterations))
                loss = error(model, next(batches))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                average.update(model, k)
                if k % 50 == 0 or k + 1 == iterations:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise KakusanError(f"the loss is {value} at step {k}; try a smaller lr")
                    advance(k + 1, f"loss {value:.4f}")
    except KeyboardInterrupt:
        if not k:
            raise
        raise Stopped(k) from None
