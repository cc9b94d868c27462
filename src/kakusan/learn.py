r"""Learns the score of any SDE by running it: write f and G, and `reverse` has what it asks for.

Paths of the Euler-Maruyama chain are simulated, and a `ScoreNet` is fitted to targets along them
whose mean, given the state, is the score (`objectives.local`). What is learned is the score of the
chain on its grid, without bias for any step; run the reverse on the same grid.

The network predicts the score in units of the process, R_tᵀ S + y with y = R_t⁻¹(x - m_t), and the
squared error at time t is divided by the mean square v_t of this same number: the residual of a
Gaussian guess. Most of v_t is the variance of the target, which for `Local` grows with C_t / |h|:
with these weights all times are as noisy, the weighting of least variance (Gauss and Markov), and
a loss of 1 is that of the Gaussian guess.

Where the Gaussian is all there is, a network fitted to noisy targets adds nothing but noise.
At the end it is therefore multiplied by the factor in [0, 1] that suits unseen paths best.

Nothing is learned where no path went; there the score grows about as the state does. Where the
drift grows faster, as in a double well with a quartic energy, a few backward paths may stray out
of the wells and run away.

References:
    Simulating diffusion bridges with score matching (Heng et al., 2021), arXiv 2111.07243
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as File
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from kakusan.core import grids
from kakusan.core.noise import Fresh, generator, mix
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.models.scorenet import ScoreNet
from kakusan.objectives.local import Skorokhod, Target, reached
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito
from kakusan.solvers.solve import Path, solve
from kakusan.training import files
from kakusan.training.ema import Average
from kakusan.training.regress import regress, shuffled, strata

Starts = Tensor | Callable[[int], Tensor]

DENSE = 64  # states of more numbers than this get a diagonal covariance
MORE = 4  # times as many paths for the moments: they cost no targets
LOOKS = 24  # times at which the variance of the target, and what was learned, are measured
MOMENTS, HELD_OUT, TEST = -1, -2, -3  # the numbers of paths that are not trained on


class Report(NamedTuple):
    """What training has to say.

    Attributes:
        loss: The held-out loss, where the Gaussian guess has 1. It stays above the share of the
            target's own variance, which no score can explain.
        identity: How far E[s(x) (x - m)ᵀ] is from -1 on held-out states, in units of the process:
            root mean square over its entries and over times. The exact score has 0, up to the
            error of the mean.
        error: The standard error of `identity`: a value like it says that nothing was found.
        first: The first time with a target; before it the score is extrapolated.
        iterations: Steps of the optimiser.
        paths: Paths that were simulated.
        seconds: How long it took.
    """

    loss: float
    identity: float
    error: float
    first: float
    iterations: int
    paths: int
    seconds: float


class Pool(NamedTuple):
    """States in units of the process, levels, what the network should say, and weights."""

    y: Tensor
    level: Tensor
    goal: Tensor
    weight: Tensor


def learn_score(
    sde: SDE,
    starts: Starts,
    steps: int = 200,
    grid: Tensor | None = None,
    target: Target | None = None,
    net: nn.Module | None = None,
    iterations: int = 3000,
    batch: int = 1024,
    paths: int = 1024,
    times: int = 32,
    visits: int = 4,
    lr: float = 3e-3,
    ema: float = 0.999,
    seed: int = 0,
    quiet: bool = False,
) -> ScoreNet:
    """Learns the field (x, t) -> ∇log p_t(x) of a process from its paths.

    Arguments:
        sde: The process, in the sense of Itô unless it is a `Stratonovich`.
        starts: Where paths start: one state in a tensor of one dimension, else states
            (n, *shape) to draw from, or a function from n to n states.
        steps: The number of equal steps over the span of the process.
        grid: The times to step along instead.
        target: What is regressed on; by default `Skorokhod` with a quarter of the grid as window.
        net: A network (y, level) -> like y; a small multilayer perceptron by default.
        iterations: How many steps the optimiser takes.
        batch: How many states a step sees.
        paths: How many paths are simulated at a time.
        times: At how many random times a path is used.
        visits: How often each of these states is seen before the paths are replaced.
        lr: Where the learning rate starts; it falls to zero along half a cosine.
        ema: The decay of the average of the weights, which is what is returned.
        seed: All numbers are functions of it.
        quiet: Whether to show no progress, as where standard error is no terminal.

    Raises:
        KakusanError: If the starts are no states, or paths or losses stop being finite.
        NotElliptic: If the target is not defined for this process.

    Example:
        >>> from kakusan.core.operators import Scale
        >>> brownian = SDE.of(lambda x, t: 0 * x, Scale(2.0))
        >>> score = learn_score(brownian, torch.zeros(1), steps=5, iterations=8, paths=2048)
        >>> x = torch.tensor([[1.0]])
        >>> bool((score(x, torch.tensor(1.0)) + x / 4).abs() < 0.05)
        True
    """
    began = time.perf_counter()
    numbers = {"steps": steps, "iterations": iterations, "batch": batch, "paths": paths}
    for name, value in (numbers | {"times": times, "visits": visits}).items():
        if value < 1:
            raise KakusanError(f"{name} must be at least 1, got {value}")
    grid = grids.uniform(*sde.span, steps) if grid is None else torch.as_tensor(grid).double()
    sde, goal = ito(sde), target or Skorokhod(window=max(1, len(grid) // 4))
    # a net, and starts that are a function, may draw from the global generator
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed))
        draw = _Draw(sde, states_of(starts), grid, paths, seed)
        score, chain = _tables(draw, goal, net)
        average, pools = Average(score.net, ema), _Pools(draw, chain, times, visits, batch)
        regress(score.net, average, iter(pools), _loss, iterations, lr, "score", quiet)
        score.net = average.model
        score.trust.fill_(_trust(draw, chain))
        judged = _judged(draw, chain)
    seconds = time.perf_counter() - began
    score.report = Report(
        *judged, float(grid[chain.first]), iterations, (pools.number + MORE + 2) * paths, seconds
    )
    return score


def _loss(net: nn.Module, pool: Pool) -> Tensor:
    error = (net(pool.y, pool.level) - pool.goal).square().flatten(1).mean(1)
    return (pool.weight * error).mean()


class _Draw(NamedTuple):
    """Paths by number: the same number, the same paths."""

    sde: SDE
    starts: Callable[[int, torch.Generator], State]
    grid: Tensor
    paths: int
    seed: int

    def __call__(self, number: int, times: int = 1) -> Path:
        torch.manual_seed(mix(self.seed, number))
        x = self.starts(times * self.paths, generator(self.seed, number, 1))
        noise = Fresh(mix(self.seed, number, 2))
        return solve(self.sde, x, self.grid, noise=noise, keep=True)


class _Chain(NamedTuple):
    """How paths become what the network is trained on."""

    sde: SDE
    target: Target
    score: ScoreNet
    first: int
    variance: Tensor

    def pools(self, path: Path, at: Sequence[int]) -> list[Pool]:
        """What all paths have to say about some times, a pool for each."""
        targets = self.target(self.sde, path, at).flatten(2)
        return [self._pool(path, *one) for one in zip(at, targets, strict=True)]

    def _pool(self, path: Path, at: int, S: Tensor) -> Pool:
        score, t, x = self.score, path.t[at], path.x[at]
        m, R = (v.to(x) for v in score.gaussian(t))
        y = score.whitened(x.flatten(1) - m, R)
        goal = y + (S * R if score.covariance.ndim == 2 else S @ R)
        level = score.level(t).float().to(x.device).expand(len(x))
        weight = (1 / self.variance[at]).float().to(x.device).expand(len(x))
        return Pool(y.float().view(x.shape), level, goal.float().view(x.shape), weight)


def _tables(draw: _Draw, target: Target, net: nn.Module | None) -> tuple[ScoreNet, _Chain]:
    """Moments of the process, and the variance of the target, from paths of their own."""
    path = draw(MOMENTS, MORE)
    first = reached(target, draw.sde, path)
    x = path.x[first - 1 :].flatten(2).double()
    mean = x.mean(1)
    x = x - mean[:, None]
    if x.shape[-1] > DENSE:
        C = x.square().mean(1)
    else:
        C = x.mT @ x / x.shape[1]
        # rounding must not make a covariance singular
        C = C + 1e-9 * torch.diag_embed(C.diagonal(dim1=1, dim2=2))
    score = ScoreNet(tuple(path.x.shape[2:]), path.t[first - 1 :], mean, C, net=net)
    score.to(path.x.device)
    last = len(path.t) - 1
    chain = _Chain(draw.sde, target, score, first, torch.ones(last + 1, dtype=torch.float64))
    at = sorted({round(v) for v in _spread(first, last)})
    few = Path(
        path.t, path.x[:, : draw.paths], None if path.dw is None else path.dw[:, : draw.paths]
    )
    seen = [pool.goal.double().square().mean().item() for pool in chain.pools(few, at)]
    # at the first steps away from a point the Gaussian is exact, and no weight bears a zero
    seen = torch.tensor(seen, dtype=torch.float64).clamp(min=1e-3 * max(*seen, 1e-6))
    return score, chain._replace(variance=_interpolated(at, seen.log(), last).exp())


def _spread(first: int, last: int) -> list[float]:
    """Times near the start and all along."""
    u = torch.linspace(0, 1, LOOKS, dtype=torch.float64)
    return (first + (last - first) * u**2).tolist()


def _interpolated(at: list[int], values: Tensor, last: int) -> Tensor:
    """Values at the steps 0 to last, linear between those at some steps."""
    if len(at) == 1:
        return values.expand(last + 1)
    k, knots = torch.arange(last + 1, dtype=torch.float64), torch.tensor(at, dtype=torch.float64)
    i = torch.searchsorted(knots, k).clamp(1, len(at) - 1)
    w = ((k - knots[i - 1]) / (knots[i] - knots[i - 1])).clamp(0, 1)
    return torch.lerp(values[i - 1], values[i], w)


class _Pools:
    """Batches without end, of one pool of paths after the other."""

    def __init__(self, draw: _Draw, chain: _Chain, times: int, visits: int, batch: int) -> None:
        self.draw, self.chain, self.number = draw, chain, 0
        self.times, self.visits, self.batch = times, visits, batch

    def __iter__(self) -> Iterator[Pool]:
        while True:
            self.number += 1
            path, g = self.draw(self.number), generator(self.draw.seed, self.number, 3)
            first = self.chain.first
            at = [first + k for k in strata(len(path.t) - first, self.times, g)]
            pools = self.chain.pools(path, at)
            pool = Pool(*(torch.cat(parts) for parts in zip(*pools, strict=True)))
            yield from shuffled(pool, self.visits, self.batch, g)


def _looks(chain: _Chain, path: Path) -> list[Pool]:
    """Pools at times evenly spread along a path."""
    at = torch.linspace(chain.first, len(path.t) - 1, LOOKS)
    return chain.pools(path, at.round().long().unique().tolist())


@torch.no_grad()
def _trust(draw: _Draw, chain: _Chain) -> float:
    """The factor of the network with the least error, on paths of their own.

    None at all unless what it explains is beyond two standard errors.
    """
    along, square = torch.zeros(draw.paths, dtype=torch.float64), 1e-12
    for pool in _looks(chain, draw(HELD_OUT)):
        out = chain.score.net(pool.y, pool.level)
        along += (pool.weight * (out * pool.goal).flatten(1).sum(1)).double().cpu()
        square += out.square().flatten(1).sum(1).dot(pool.weight).item()
    total = along.sum().item()
    seen = total > 2 * along.std().item() * draw.paths**0.5
    return min(1.0, total / square) if seen else 0.0


@torch.no_grad()
def _judged(draw: _Draw, chain: _Chain) -> tuple[float, float, float]:
    """The loss, the gap of the identity and its standard error, on paths of their own."""
    losses, gaps, errors = [], [], []
    for pool in _looks(chain, draw(TEST)):
        out = chain.score.corrected(pool.y, pool.level)
        guess = pool.goal.square().mean().clamp(min=1e-12)
        losses.append((out - pool.goal).square().mean() / guess)
        each = ((out - pool.y) * pool.y).flatten(1).double()
        gaps.append((each.mean(0) + 1).square().mean())
        errors.append((each.var(0) / len(each)).mean())
    return (
        torch.stack(losses).mean().item(),
        torch.stack(gaps).mean().sqrt().item(),
        torch.stack(errors).mean().sqrt().item(),
    )


# --- the door


def states_of(starts: Starts) -> Callable[[int, torch.Generator], State]:
    """A function from n and a generator to n states."""
    if not isinstance(starts, Tensor):
        if not callable(starts):
            raise KakusanError(
                f"starts are a tensor of states or a function from n to n states, got "
                f"{type(starts).__name__}"
            )
        return lambda n, g: _states(starts(n), n)
    many = _states(starts[None] if starts.ndim == 1 else starts, None)
    return lambda n, g: many[torch.randint(len(many), (n,), generator=g).to(many.device)]


def _states(x: Tensor, n: int | None) -> State:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not x.numel():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise KakusanError(
            f"starts are floating-point states (n, *shape), or one state (d,); got {got}"
        )
    if n is not None and len(x) != n:
        raise KakusanError(f"starts({n}) must give {n} states, got {len(x)}")
    bad = ~x.flatten(1).isfinite().all(1)
    if bad.any():
        raise KakusanError(
            f"{int(bad.sum())} of {len(x)} starts are not finite; the first is state "
            f"{int(bad.nonzero()[0])}"
        )
    return x.detach()


# --- files


def save_score(score: ScoreNet, path: str | File) -> None:
    """Writes a learned score to one safetensors file, whole or not at all.

    Arguments:
        score: A score with the network that `learn_score` makes.
        path: The file.
    """
    if score.own_net:
        raise KakusanError(
            "this score has a network of your own, which a file cannot build again: keep "
            "score.state_dict() and build the ScoreNet yourself"
        )
    header = {"shape": score.shape, "width": score.width, "depth": score.depth}
    files.write_tensors(File(path), score.state_dict(), {"kakusan.ScoreNet": json.dumps(header)})


def load_score(path: str | File) -> ScoreNet:
    """Reads what `save_score` wrote."""
    tensors = files.read_tensors(File(path))
    with safetensors.safe_open(path, "pt") as handle:
        header = (handle.metadata() or {}).get("kakusan.ScoreNet")
    if header is None:
        raise KakusanError(f"{path} holds no learned score")
    shape, width, depth = (json.loads(header)[k] for k in ("shape", "width", "depth"))
    tables = (tensors[k] for k in ("times", "mean", "covariance"))
    score = ScoreNet(tuple(shape), *tables, width=width, depth=depth)
    score.load_state_dict(tensors)
    return score.eval().requires_grad_(False)
