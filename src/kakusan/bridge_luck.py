"""Free paths that come near what was seen by luck: a trial of a few, a rejection sample of many.

*Near* is measured in standard deviations of the free value, by the worst of the numbers seen.

The share that comes near tells the density p(y) as well. Where log p is straight over the box of
half widths w_i around y, the probability of the box is p(y) Π 2 w_i sinh(b_i) / b_i, where b_i is
the logarithm of those above y_i over those below.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.bridge_request import Posed
from kakusan.errors import KakusanError
from kakusan.inference.weights import LogMean
from kakusan.processes.observations import Event
from kakusan.training.progress import progress

NEAR = 0.25  # standard deviations
TRIAL = 4_000  # free paths that are tried
MANY, ENOUGH, MOST = 100_000, 30, 1_000  # free paths for the comparison; least and most of them
HOPELESS = 10_000  # of which none comes near
STEEP = 3.0  # the largest b


class Trial(NamedTuple):
    """What free paths do.

    Attributes:
        near: How many of them come near what is asked for.
        of: How many there were.
        scale: The standard deviation of each number seen, (k,); 0 for an event.
    """

    near: int
    of: int
    scale: Tensor


class Free(NamedTuple):
    """Free paths that came near: a rejection sample.

    Attributes:
        x: Their states, (N + 1, m, *shape), the nearest first.
        near: How many came so near.
        within: How near that is, in standard deviations.
        of: How many free paths there were.
        above: How many of those in `x` lie above what was seen, for each number of it, (k,); None
            of an event.
    """

    x: Tensor
    near: int
    within: float
    of: int
    above: Tensor | None

    @property
    def enough(self) -> bool:
        """Whether they say anything."""
        return self.x.shape[1] >= ENOUGH

    def log_density(self, scale: Tensor) -> LogMean | None:
        """Log of the density of what was seen, of an event its probability, with its error.

        Arguments:
            scale: The standard deviation of each number seen, (k,).

        Returns:
            None where too few came near, or nearly all from one side.
        """
        if not self.enough:
            return None
        log_p, variance = math.log(self.near / self.of), 1 / self.near - 1 / self.of
        if self.above is None:
            return LogMean(log_p, variance**0.5)
        above, below = self.above + 0.5, self.near - self.above + 0.5
        b = (above / below).log().double().abs().clamp(min=1e-6)
        if b.max() > STEEP:
            return None
        log_p -= (2 * self.within * scale * b.sinh() / b).log().sum().item()
        variance += ((1 / b.tanh() - 1 / b).square() * (1 / above + 1 / below)).sum().item()
        return LogMean(log_p, variance**0.5)


def tried(posed: Posed) -> Trial:
    """What a few thousand free paths do."""
    chunk = posed.chunk
    y = torch.cat([posed.free(chunk, k)[1] for k in range(math.ceil(TRIAL / chunk))])[:TRIAL]
    scale = y.std(0) if not isinstance(posed.observe, Event) else torch.zeros_like(y[0])
    return Trial(int((_away(posed, y, scale) <= NEAR).sum()), len(y), scale)


def _away(posed: Posed, y: Tensor, scale: Tensor) -> Tensor:
    """How far values (n, k) are from the one that was seen, in standard deviations."""
    gap = (y - posed.y).abs()
    return torch.where(gap == 0, 0.0, gap / scale).amax(1)


def rejected(posed: Posed, scale: Tensor, quiet: bool) -> Free:
    """The free paths that come near; the nearest `MOST` of them."""
    chunk, done, count, event = posed.chunk, 0, 0, isinstance(posed.observe, Event)
    x, far = posed.starts.new_zeros(len(posed.steps) + 1, 0, *posed.starts.shape[1:]), scale[:0]
    over = posed.y[:0] > 0  # whether above what was seen
    first = math.ceil(TRIAL / chunk)  # those before were tried
    with progress("free paths", MANY, quiet=quiet) as advance:
        while done < MANY and (count or done < HOPELESS):
            try:
                path, y = posed.free(chunk, first + done // chunk)
            except KakusanError as error:
                warnings.warn(f"no rejection sample beside: {error}", stacklevel=3)
                return Free(x[:, :0], 0, math.inf, done, None)
            away, done = _away(posed, y, scale), done + chunk
            hit = away <= NEAR
            count += int(hit.sum())
            x, far = torch.cat([x, path.x[:, hit]], 1), torch.cat([far, away[hit]])
            over, nearest = torch.cat([over, y[hit] > posed.y]), far.argsort()[:MOST]
            x, far, over = x[:, nearest], far[nearest], over[nearest]
            advance(min(done, MANY), f"{count:,} came near")
    within = far[-1].item() if len(far) else math.inf
    return Free(x, count if event else len(far), within, done, None if event else over.sum(0))
