r"""Learns to condition any SDE on what is seen of its end: write f and G, and say what was seen.

Paths of the chain are simulated without any condition, Y is drawn from each, and a network is
fitted to path weights S_k (`objectives.malliavin`) for which

.. math:: E[S_k \mid X_k = x, Y = y] = \nabla_x \log p(Y = y \mid X_k = x)

*exactly*, whatever the steps. So the function of (x, t, y) with the least squared error to the
weights is the tilt of every bridge at once: y may be X_T itself, a coordinate, a class, a set. No
likelihood is differentiated and no time reversed.

What is fitted is the control GᵀS in units of the noise, over the closed-form pull c_0, and its
squared error is weighted with the time τ that is left: up to the pull's own blow-up the sum of
these errors is a relative entropy between the laws of paths, for all y together.

Where the paths seldom or never come to y, they are made to: `ends` names values, paths are drawn
*towards* them with the tilt as it is so far, each with its weight dP/dQ (Girsanov, exact for the
chain), and the tilt is fitted to the weighted paths; the better it gets, the more equal the
weights. Weights that are too unequal are flattened for as long as they are.

References:
    Conditioning diffusions using Malliavin calculus (Pidstrigach et al., 2025), arXiv 2504.03461
    The cross-entropy method (Rubinstein and Kroese, 2004)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kakusan.bridges.bridge import Bridge as Bridge
from kakusan.bridges.bridge import Report as Report
from kakusan.bridges.walks import (
    FIRST,
    HELD_OUT,
    LOCAL,
    Pool,
    Task,
    Walk,
    grid_of,
    invertible,
    pools_of,
)
from kakusan.core.noise import Fresh, generator, mix
from kakusan.core.operators import NotElliptic
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.finish import ModifiedBridge
from kakusan.inference.conditioning.paths import conditioned
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.learn import Starts
from kakusan.models.bridgenet import BridgeNet
from kakusan.objectives.covering import Covering
from kakusan.objectives.malliavin import PathWeight, Window
from kakusan.processes.observations import Event, Observation, Terminal
from kakusan.processes.sde import SDE
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from kakusan.training.ema import Average
from kakusan.training.regress import Stopped, regress, shuffled, strata

# paths, times of each, visits of each time
FREE, GUIDED, COVERED = (8192, 8, 1), (2048, 32, 2), (1024, 64, 2)
PILOT = 2048  # paths from which the weights are chosen, where states are small
PAIRS, EACH = 64, 16  # values on which the network is tried, and paths to each
SEEN = 1 << 14  # values kept to know where paths came


def learn_bridge(
    process: SDE | GaussianSteps,
    start: Starts,
    observe: Observation | None = None,
    ends: Any = None,
    *,
    steps: int = 200,
    grid: Tensor | None = None,
    horizons: bool = False,
    weights: PathWeight | Covering | None = None,
    base: Tilt | None = None,
    net: nn.Module | None = None,
    width: int = 128,
    depth: int = 3,
    iterations: int = 4000,
    batch: int = 2048,
    paths: int | None = None,
    times: int | None = None,
    visits: int | None = None,
    lr: float = 3e-3,
    ema: float = 0.999,
    seed: int = 0,
    quiet: bool = False,
) -> Bridge:
    """Learns the tilt of a process towards what is seen of its end, for all values at once.

    Arguments:
        process: An SDE, in the sense of Itô unless it is a `Stratonovich`; or any chain of
            Gaussian steps, as the reverse of a diffusion model is.
        start: Where paths start: one state in a tensor of one dimension, else states
            (n, *shape) to draw from, or a function from n to n states: the bridge then serves all
            of them.
        observe: What is seen; the end of the path, `Terminal()`, by default.
        ends: Values to draw paths towards, one or several (n, k), where paths of their own accord
            seldom come: the bridge then serves these alone. By default it serves all values that
            paths come to.
        steps: The number of equal steps over the span of an SDE.
        grid: The times to step along instead.
        horizons: Whether to serve earlier ends as well: for autonomous processes, all bridges that
            are shorter than the span.
        weights: What is regressed on; by default `Window()`, with the window that has the least
            variance, and `Covering()` where G has no inverse.
        base: The pull that the network corrects; by default `LinearTilt.exact` for linear
            processes, `Pull` where the noise reaches what is seen, else `Linearised`.
        net: A network (x, pull, y, levels) -> like the pull; see `BridgeNet`.
        width: The number of hidden units of the default network.
        depth: The number of its hidden layers.
        iterations: How many steps the optimiser takes.
        batch: How many states a step sees.
        paths: How many paths are simulated at a time; by default 8192, 2048 of those that are
            drawn towards ends, and 1024 where `Covering` weighs them, which costs more each.
        times: At how many random times a path is used; by default 8, 32 and 64.
        visits: How often each of these states is seen before the paths are replaced; by default
            once, and twice of those that cost more.
        lr: Where the learning rate starts; it falls to zero along half a cosine.
        ema: The decay of the average of the weights, which is what is returned.
        seed: All numbers are functions of it.
        quiet: Whether to show no progress, as where standard error is no terminal.

    Raises:
        KakusanError: If starts or values do not fit, or paths or losses stop being finite.
        NotElliptic: If noise does not reach what is seen.
        Stopped: On Ctrl-C while learning; its `learned` is the bridge so far.

    Example:
        >>> from kakusan.processes.zoo import DoubleWell
        >>> bridge = learn_bridge(DoubleWell(v=1.0), torch.ones(1), iterations=30, steps=20)
        >>> paths = bridge.sample(torch.ones(1), y=-1.0, n=5)
        >>> paths.end.flatten().tolist()
        [-1.0, -1.0, -1.0, -1.0, -1.0]
    """
    began = time.perf_counter()
    _check_counts(steps=steps, iterations=iterations, batch=batch)
    observe = Terminal() if observe is None else observe
    process = _chain(process, observe, steps, grid)
    covered = isinstance(weights, Covering) or weights is None and not invertible(process, start)
    usual = COVERED if covered else FREE if ends is None else GUIDED
    paths, times, visits = _chosen(usual, paths=paths, times=times, visits=visits)
    # a net, and starts that are a function, may draw from the global generator
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed))
        task = Task.of(process, start, observe, ends, horizons, paths, base, seed)
        task, model, first = _prepared(task, weights, net, width, depth)
        average = Average(model, ema)
        shown = _Shown(task, average, first, times, visits, batch)
        stopped = _fitted(model, average, shown, iterations, lr, quiet)
        explained = _trusted(task, average.model, times)
    taken = stopped.steps if stopped else iterations
    report = Report(
        explained, first.ess, repr(task.weights), taken, (shown.number + 2) * paths,
        time.perf_counter() - began,
    )  # fmt: skip
    tilt = task.tilt(average.model)
    bridge = Bridge(tilt, process, first.values(), ends is not None, horizons, report)
    if stopped is not None:
        stopped.learned = bridge
        raise stopped
    return bridge


def _chain(
    process: SDE | GaussianSteps, observe: Observation, steps: int, grid: Tensor | None
) -> GaussianSteps:  # fmt: skip
    """The steps of a process."""
    if not isinstance(process, SDE | GaussianSteps) or not isinstance(observe, Observation):
        raise KakusanError(f"a bridge is learned of an SDE and an Observation, as Terminal(); got "
                           f"{process!r:.60} and {observe!r:.60}")  # fmt: skip
    if isinstance(process, GaussianSteps):
        return process
    return EulerSteps(process, grid_of(process, observe, steps, grid))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise KakusanError(f"{name} must be at least 1, got {value}")


def _chosen(usual: tuple[int, ...], **asked: int | None) -> tuple[int, ...]:
    """What was asked for, or what is usual."""
    counts = {k: u if v is None else v for u, (k, v) in zip(usual, asked.items(), strict=True)}
    _check_counts(**counts)
    return tuple(counts.values())


def _fitted(
    model: BridgeNet, average: Average[BridgeNet], shown: _Shown, iterations: int, lr: float,
    quiet: bool,
) -> Stopped | None:  # fmt: skip
    """Trains; Ctrl-C ends it early, and is not forgotten."""
    try:
        regress(model, average, iter(shown), _error, iterations, lr, "bridge", quiet)
    except Stopped as early:
        return early
    return None


def _error(model: BridgeNet, pool: Pool) -> Tensor:
    out = model(pool.x, pool.pull, pool.y, pool.t, pool.left)
    return (pool.weight * (out - pool.goal).square().flatten(1).mean(1)).mean()


def _prepared(
    task: Task, weights: PathWeight | Covering | None, net: nn.Module | None, width: int,
    depth: int,
) -> tuple[Task, BridgeNet, _Values]:  # fmt: skip
    """Weights with the window of least variance, and a network in the units of paths."""
    many = task.paths if task.starts(1, generator(0))[0].numel() > LOCAL else PILOT
    whole = task._replace(horizons=False, paths=max(task.paths, many))
    walk = whole.walk(FIRST, task.base)
    path = walk.path
    never = walk.y.max() == 0 if task.ends is None else walk.ess == 0
    if isinstance(task.observe, Event) and never:
        raise KakusanError(
            f"{task.observe} holds for none of {len(walk.y):,} paths, and is learned from those "
            "for which it does: observe a value instead"
        )
    kind = weights or Window()
    try:
        chosen = kind.chosen(task.steps, path, walk.last)
    except NotElliptic:
        if weights is not None:
            raise
        chosen = Covering().chosen(task.steps, path, walk.last)
    shape, noise = tuple(path.x.shape[2:]), tuple(task.steps.noise_shape(path.x[0])[1:])
    told = task.observe.told(walk.y)
    span = (task.end(0), task.end(len(task.steps)))
    model = BridgeNet(shape, noise, span, path.x.flatten(0, 1), told, width, depth, net)
    blind = 0
    if isinstance(chosen, Covering):
        blind = walk.last - 1 - chosen.latest(task.steps, path, walk.last)
    task = task._replace(weights=chosen, blind=blind)
    return task, model.to(path.x.device), _Values(task.observe, walk)


class _Values:
    """Values that paths came to, and how equal their weights are."""

    def __init__(self, observe: Observation, walk: Walk) -> None:
        self.observe, self.kept, self.ess = observe, [], walk.ess
        self.add(walk)

    def add(self, walk: Walk) -> None:
        """Keeps some of a walk."""
        self.ess = walk.ess
        if sum(map(len, self.kept)) < SEEN:
            self.kept.append(self.observe.told(walk.y).float().cpu())

    def values(self) -> Tensor:
        """What is told of them, (n, j)."""
        return torch.cat(self.kept)[:SEEN]


class _Shown:
    """Batches without end."""

    def __init__(
        self, task: Task, average: Average[BridgeNet], values: _Values, times: int, visits: int,
        batch: int,
    ) -> None:  # fmt: skip
        self.task, self.average, self.values = task, average, values
        self.times, self.visits, self.batch, self.number = times, visits, batch, 0

    def __iter__(self) -> Iterator[Pool]:
        while True:
            self.number += 1
            g = generator(self.task.seed, self.number, 4)
            pool = self._pool(g)
            yield from shuffled(pool, self.visits, self.batch, g)

    def _pool(self, g: torch.Generator) -> Pool:
        """What new paths have to say about some of their times."""
        task = self.task
        tilt = task.tilt(self.average.model)
        walk = task.walk(self.number, tilt)
        self.values.add(walk)
        at = strata(max(1, walk.last - task.blind), self.times, g)
        pools = pools_of(task, walk, at, tilt)
        return Pool(*(torch.cat(parts) for parts in zip(*pools, strict=True)))


@torch.no_grad()
def _trusted(task: Task, model: BridgeNet, times: int) -> float:
    """Sets the factor of the network; what it explains on unseen paths.

    The one with the least error, unless clearly more paths count with a part of it; none at all
    unless what it explains is beyond two standard errors.
    """
    tilt = task.tilt(model)
    walk = task.walk(HELD_OUT, tilt)
    n = walk.last - task.blind
    at = torch.linspace(0, n - 1, times).round().long().unique().tolist()
    along = torch.zeros(len(walk.y), dtype=torch.float64)
    square = whole = 1e-12
    for pool in pools_of(task, walk, at, tilt):
        out = model(pool.x, pool.pull, pool.y, pool.t, pool.left)
        along += (pool.weight * (out * pool.goal).flatten(1).sum(1)).double().cpu()
        square += out.square().flatten(1).sum(1).dot(pool.weight).item()
        whole += pool.goal.square().flatten(1).sum(1).dot(pool.weight).item()
    total, error = along.sum().item(), along.std().item() * len(along) ** 0.5
    trust = min(1.0, total / square) if total > 2 * error else 0.0
    if trust and not task.horizons:
        parts = [trust * c for c in (1.0, 0.75, 0.5, 0.25, 0.0)]
        shares = [_share(task, model, walk, part) for part in parts]
        trust = next(p for p, s in zip(parts, shares, strict=True) if s > 0.95 * max(shares))
    model.trust.fill_(trust)
    return (2 * trust * total - trust**2 * square) / whole


def _share(task: Task, model: BridgeNet, walk: Walk, trust: float) -> float:
    """The effective share of paths to values of a walk, with so much of the network."""
    model.trust.fill_(trust)
    x, y = (v[:PAIRS].repeat_interleave(EACH, 0) for v in (walk.path.x[0], walk.y))
    found = conditioned(task.steps, x, task.tilt(model), task.observe, y, noise=Fresh(task.seed),
                        end=ModifiedBridge(), keep=False)  # fmt: skip
    w = found.log_weights.view(-1, EACH).softmax(1).nan_to_num(1.0)
    return (1 / w.square().sum(1)).mean().item() / EACH
