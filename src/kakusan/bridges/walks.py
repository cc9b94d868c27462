"""Paths for learning to condition: simulated, seen, weighted, made into what a net is shown."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core import grids
from kakusan.core.noise import Fresh, Noise, generator, mix
from kakusan.core.operators import NotElliptic, Operator
from kakusan.core.types import State, per_sample
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.ahead import Linearised
from kakusan.inference.conditioning.finish import ModifiedBridge, placed
from kakusan.inference.conditioning.learned import BridgeTilt
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.paths import conditioned
from kakusan.inference.conditioning.pull import Pull
from kakusan.inference.conditioning.tilts import Tilt, Untilted
from kakusan.learn import Starts, states_of
from kakusan.models.bridgenet import BridgeNet
from kakusan.objectives.covering import Covering
from kakusan.objectives.malliavin import Bootstrapped, PathWeight, Window
from kakusan.processes.observations import Linear, Observation, Series, Terminal
from kakusan.processes.sde import SDE
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from kakusan.solvers.solve import Path, solve

FIRST, HELD_OUT = -1, -2  # the numbers of walks that are not trained on
LEAST = 0.1  # weights are flattened until so many of a hundred paths count
LOCAL = 16  # numbers of a state for which matrices of each row are no burden
GROUP = 64  # paths that share a start and a value, where these are drawn


class Walk(NamedTuple):
    """Paths, what is seen of each, how much each counts, and the step at which it is seen."""

    path: Path
    y: Tensor
    weight: Tensor
    last: int
    ess: float = 1.0


class Pool(NamedTuple):
    """What the network is shown: states, pulls, values, times, time left; its goal; a weight."""

    x: Tensor
    pull: Tensor
    y: Tensor
    t: Tensor
    left: Tensor
    goal: Tensor
    weight: Tensor


def grid_of(sde: SDE, observe: Observation, steps: int, grid: Tensor | None) -> Tensor:
    """The times to step along, those of observations among them."""
    grid = grids.uniform(*sde.span, steps) if grid is None else torch.as_tensor(grid).double()
    if len(grid) < 2 or grid[0] == grid[-1]:
        raise KakusanError(
            f"a bridge needs time: it starts at t={grid[0]:g} and ends at t={grid[-1]:g}"
        )
    if isinstance(observe, Series):
        times = torch.tensor(list(observe.seen), dtype=torch.float64)
        low, high = grid[[0, -1]].sort().values
        if not bool(((times >= low) & (times <= high)).all()):
            raise KakusanError(
                f"observations at t={times.tolist()} do not lie between t={low:g} and t={high:g}"
            )
        last = times.max() if low == grid[0] else times.min()
        grid = grid[(grid - last) * (1 if low == grid[0] else -1) <= 1e-9]
        near = (grid - times.unsqueeze(1)).abs().amin(1) < 1e-9
        grid = torch.cat([grid, times[~near]]).sort(descending=bool(grid[0] > grid[-1])).values
    return grid


class Task(NamedTuple):
    """What is to be learned."""

    steps: GaussianSteps
    starts: Callable[[int, torch.Generator], State]
    observe: Observation
    ends: Tensor | None
    horizons: bool
    paths: int
    group: int
    base: Tilt
    weights: PathWeight | Covering
    seed: int
    blind: int = 0  # the last steps, which have no weights

    @staticmethod
    def of(
        steps: GaussianSteps, start: Starts, observe: Observation, ends: Any, horizons: bool,
        paths: int, base: Tilt | None, seed: int,
    ) -> Task:  # fmt: skip
        """Checks, and the simplest choices; the weights are chosen by `_prepared`."""
        starts = states_of(start)
        x = starts(2, generator(seed, FIRST, 1))
        if still(steps.operator(x, 0), x):
            raise KakusanError(
                "a tilt moves an SDE by its noise, and this process has none: what it ends in is "
                "a function of where it starts"
            )
        observe.size(x)
        if horizons and (ends is not None or isinstance(observe, Series)):
            raise KakusanError("horizons=True goes with values that paths come to by themselves")
        if ends is not None:
            ends = values_of(observe, ends, x)
            check_inside(steps, observe, ends, x)
        alone = isinstance(start, Tensor) and (start.ndim == 1 or len(start) == 1)
        group = paths if alone and (ends is None or len(ends) == 1) else min(GROUP, paths)
        base = (base or _base(steps, observe, starts, seed)).along(steps)
        return Task(steps, starts, observe, ends, horizons, paths, group, base, Window(), seed)

    def walk(self, number: int, tilt: Tilt) -> Walk:
        """Paths by number; where ends are named, drawn towards them by the tilt."""
        torch.manual_seed(mix(self.seed, number))
        source, noise = generator(self.seed, number, 1), Fresh(mix(self.seed, number, 2))
        if self.ends is None:
            return self._free(number, source, noise)
        pairs = max(1, self.paths // self.group)
        x = self.starts(pairs, source).repeat_interleave(self.group, 0)
        which = torch.randint(len(self.ends), (pairs,), generator=source)
        y = self.ends[which.to(self.ends.device)].repeat_interleave(self.group, 0).to(x)
        end = ModifiedBridge()
        found = conditioned(self.steps, x, tilt, self.observe, y, noise=noise, end=end)
        weight, ess = flattened(found.log_weights.view(pairs, -1))
        return Walk(found.path, y, weight.flatten().to(x), len(self.steps), ess)

    def _free(self, number: int, source: torch.Generator, noise: Noise) -> Walk:
        x, steps = self.starts(self.paths, source), self.steps
        last = len(steps)
        if self.horizons:  # as many short bridges as long ones
            last = 1 + int(torch.randint(last, (), generator=source))
        path = walked(steps, x, noise)
        y = seen(self.observe, path, last, generator(self.seed, number, 3, device=x.device))
        return Walk(path, y, x.new_ones(len(x)), last)

    def tilt(self, model: BridgeNet) -> BridgeTilt:
        """What a network makes of the pull."""
        return BridgeTilt(self.base, self.observe, model, self.end(len(self.steps)), self.steps)

    def end(self, last: int) -> float:
        """The time after so many steps."""
        return self.steps.grid[last].item()

    def pull(self, last: int) -> Tilt:
        """The pull towards what is seen after so many steps."""
        return self.base if last == len(self.steps) else self.base.until(self.end(last))


def still(G: Operator, x: State) -> bool:
    """Whether there is no noise at all."""
    probe = torch.arange(1.0, 1 + x.numel(), dtype=x.dtype, device=x.device).cos()
    return G.deterministic or not bool(G.tmv(probe.reshape(x.shape)).any())


def invertible(steps: GaussianSteps, start: Starts) -> bool:
    """Whether G has an inverse where paths start."""
    x = states_of(start)(2, generator(0, FIRST, 1))
    try:
        steps.operator(x, 0).tsolve(x.new_zeros(steps.noise_shape(x)))
    except NotElliptic:
        return False
    return True


def seen(observe: Observation, path: Path, last: int, source: torch.Generator) -> Tensor:
    """Y of paths that are seen after so many steps, (B, k)."""
    end = path.t[last].item()
    observe.size(path.x[0])
    rows = []
    for t, part, _ in observe.parts(end):
        k = int((path.t - t).abs().argmin())
        rows.append(part.draw(path.x[k], source))
    return torch.cat(rows, 1)


def flattened(log_w: Tensor) -> tuple[Tensor, float]:
    """Weights of mean 1 in each row, as unequal as they may be, and their effective share.

    All are raised to one power in (0, 1] that leaves the rows `LEAST` of their paths. The share
    is zero where no path counts at all.
    """

    def share(power: float) -> float:
        w = (power * log_w).softmax(1)
        return (1 / w.square().sum(1) / log_w.shape[1]).median().item()

    none = log_w.max() == -math.inf
    log_w = log_w.nan_to_num(neginf=-1e4)
    low, high, ess = 0.0, 1.0, share(1.0)
    if ess < LEAST:
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) >= LEAST else (low, middle)
        high = low
    return (high * log_w).softmax(1) * log_w.shape[1], 0.0 if none else ess


def walked(steps: GaussianSteps, x: State, noise: Noise) -> Path:
    """Free paths of a chain, kept."""
    if type(steps) is EulerSteps:  # those of weak order 2 are steps of their own
        return solve(steps.sde, x, steps.grid, noise=noise, keep=True)
    xs, dws, shape = [x], [], steps.noise_shape(x)
    for k in range(len(steps)):
        t, s = steps.grid[k].item(), steps.grid[k + 1].item()
        dws.append(noise.increment(k, t, s, shape, x))
        x = steps.after(x, k, dws[-1])
        xs.append(x)
    return Path(steps.grid, torch.stack(xs), torch.stack(dws))


def _base(
    steps: GaussianSteps, observe: Observation, starts: Callable[..., State], seed: int
) -> Tilt:
    """The pull that needs no choice.

    That of the process itself where it is linear; of Brownian motion with its noise; of the
    process linearised at each state where that noise does not reach what is seen, or where free
    paths end if states are too large for it.
    """
    sde, end = steps.sde, steps.grid[-1].item()
    parts = [part for _, part, _ in observe.parts(end)]
    if not isinstance(steps, EulerSteps) or not any(isinstance(part, Linear) for part in parts):
        return Untilted(sde)
    with contextlib.suppress(KakusanError):
        return LinearTilt.exact(sde, observe, end)
    x, pull = starts(64, generator(seed, FIRST, 1)), Pull(sde, observe, end)
    try:
        y = torch.zeros(len(x), observe.size(x)).to(x)
        pull.control(x, steps.grid[0], y)
        return pull
    except NotElliptic:
        if x[0].numel() <= LOCAL:
            return Linearised(sde, observe, end)
        last = walked(steps, x, Fresh(mix(seed, FIRST, 2))).end
        return LinearTilt.around(sde, observe, last.mean(0), end)


def pools_of(task: Task, walk: Walk, at: list[int], tilt: Tilt | None) -> list[Pool]:
    """What paths have to say about some times, a pool for each."""
    path, steps, y = walk.path, task.steps, walk.y
    base, end, told = task.pull(walk.last), task.end(walk.last), task.observe.told(y)
    out = []
    for k, weight in _weights(task, walk, at, tilt):
        x, t = path.x[k], path.t[k]
        left = task.observe.left(t, end)
        root, c = left.sqrt().to(x.device), base.pulls(x, t, y)[0]
        goal = per_sample(root, c) * (steps.operator(x, k).tmv(weight) - c)
        row = (x, per_sample(root, c) * c, told, t.expand(len(x)), left.expand(len(x)), goal,
               walk.weight)  # fmt: skip
        out.append(Pool(*(v.detach().to(x.device, torch.float32) for v in row)))
    return out


def _weights(
    task: Task, walk: Walk, at: list[int], tilt: Tilt | None
) -> Iterator[tuple[int, Tensor]]:
    """The path weights at some times, for what is seen next.

    Noise that comes after an observation says nothing of how likely that was: weights look ahead
    as far as the next one, and by the Markov property it stands for all that are seen later.
    """
    path, extra = walk.path, {}
    if isinstance(task.weights, Bootstrapped) and tilt is not None:
        extra["ahead"] = lambda k: tilt.score(path.x[k], path.t[k], walk.y)
    several = isinstance(task.observe, Series)
    lasts = [part.at for part in placed(task.steps, task.observe)] if several else [walk.last]
    for first, last in zip([0, *lasts], lasts, strict=False):
        ks = [k for k in at if first <= k < last - task.blind]
        if ks:
            yield from zip(ks, task.weights(task.steps, path, ks, last, **extra), strict=True)


def check_inside(steps: GaussianSteps, observe: Observation, y: Tensor, x: State) -> None:
    """Refuses whole states to end in that the process cannot be in."""
    if isinstance(observe, Terminal):
        inside = steps.inside(y.reshape(-1, *x.shape[1:]))
        if not inside.all():
            row = y[int((~inside).nonzero()[0])].tolist()
            raise KakusanError(f"the end {row[:6]} is outside the domain {steps.sde.domain}")


def values_of(observe: Observation, ends: Any, x: State) -> Tensor:
    """Values (n, k) as people write them."""
    given = ends if isinstance(ends, Tensor) else torch.as_tensor(ends, dtype=torch.float64)
    k = observe.size(x)
    if given.numel() == k:
        return observe.value(given, x[:1])
    rows = given.reshape(len(given), -1) if given.ndim else given.reshape(1, 1)
    return observe.value(rows, x[:1].expand(len(rows), *x.shape[1:]))
