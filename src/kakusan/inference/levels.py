r"""The denoising loss by noise level: where on the way from noise to data a model is weak.

At each level t the number is E|v(x_t) - v|² / d, the plain error of the angular velocity, in the
same units for every process and every kind of prediction. A model that knows nothing but the mean
has about the variance of v there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Keyed
from kakusan.core.types import State, per_sample
from kakusan.models.denoiser import Denoiser
from kakusan.processes.linear import angle_grid

STREAM = 11  # separates this use of a seed from all others


class Levels(NamedTuple):
    """The loss at several noise levels.

    Attributes:
        t: The times, (L,).
        angle: Their angles in degrees, (L,): 0 is data, 90 is noise.
        loss: The mean loss at each level, (L,).
        std_error: Its standard error over the samples, (L,).
        n: How many samples.
    """

    t: Tensor
    angle: Tensor
    loss: Tensor
    std_error: Tensor
    n: int

    @property
    def mean(self) -> float:
        """The mean over the levels."""
        return self.loss.mean().item()


def evenly(n: int, most: int) -> Tensor:
    """At most so many places of n, evenly spread: the first of sorted data would be of one kind.

    Example:
        >>> evenly(100, 3)
        tensor([ 0, 49, 99])
    """
    # float64: float32 cannot count past 16 million
    return torch.linspace(0, n - 1, min(most, n), dtype=torch.float64).long()


@torch.no_grad()
def loss_by_level(
    model: Denoiser,
    x0: State,
    label: Tensor | None = None,
    levels: int = 10,
    seed: int = 0,
    batch: int = 256,
) -> Levels:
    """The denoising loss on given data, at levels evenly spaced in angle.

    Arguments:
        model: The denoiser.
        x0: Data, (N, *shape).
        label: Class indices, (N,).
        levels: How many noise levels.
        seed: Fixes the noise, so that two models see the same.
        batch: How many samples at a time.
    """
    process = model.process
    edges = angle_grid(process, process.span[0], process.span[1], 2 * levels)
    times = edges[1::2]  # the middles of `levels` equal angles
    rows = []
    for k, t in enumerate(times):
        alpha, sigma = process.alpha(t), process.sigma(t)
        r = torch.hypot(alpha, sigma)
        parts = []
        for i in range(0, len(x0), batch):
            x = x0[i : i + batch]
            eps = Keyed(seed, i, STREAM).normal(k, tuple(x.shape), x)
            v = per_sample(alpha / r, x) * eps - per_sample(sigma / r, x) * x
            given = None if label is None else label[i : i + batch]
            guess = model.velocity(process.noised(x, eps, t), t, given)
            parts.append((guess - v).square().flatten(1).mean(1).double().cpu())
        rows.append(torch.cat(parts))
    loss = torch.stack(rows)
    n = loss.shape[1]
    spread = loss.std(1, correction=min(1, n - 1))  # a single sample has none
    degrees = process.angle(times).rad2deg()
    return Levels(times, degrees, loss.mean(1), spread / n**0.5, n)
