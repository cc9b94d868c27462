r"""Learning to condition a trained model on anything that can be seen of its samples.

A *rehearsal* runs the model's own chain without any condition and keeps, at each step, a random
number whose mean, given the state and what is seen of the end, is how far the denoised state has
to be shifted (`inference.guidance.learned`). It asks nothing of the observation, so that one
rehearsal serves them all. A small network is fitted to it, as a function of the state and of y,
with the weights at which all steps are as noisy; the model itself is never trained.

A fifth of the paths is held out. It says when to stop, which may be before the first step of the
optimiser, and how much was learned, in nats:

.. math:: E \sum_k h_k (c_k \cdot \hat c_k - \tfrac12 |c_k|^2) \leq I(\text{path}; Y) ,

with c the control learned and ĉ what it was learned from: by so much the tilted chain is nearer in
relative entropy to the chain given Y than the chain itself is. Of a class that is at most its
entropy.

What is drawn has weights that are exact for the chain, however much or little was learned: more
nats are a larger effective sample size, and not another law.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kakusan import sampling
from kakusan.conditioning import ConditionedSamples, met, prior_of
from kakusan.core.noise import Keyed, generator, mix
from kakusan.errors import KakusanError, UsageError
from kakusan.inference.conditioning.paths import conditioned
from kakusan.inference.guidance.axes import Axes
from kakusan.inference.guidance.learned import (
    AtEnd,
    Denoised,
    Goal,
    Rehearsal,
    ReverseChain,
    ShiftTilt,
    corrected,
    rehearsed,
)
from kakusan.inference.guidance.twisted import systematic
from kakusan.inference.weights import effective_sample_size, log_mean_exp
from kakusan.models.bridgenet import BridgeNet
from kakusan.processes.linear import angle_grid
from kakusan.processes.observations import Observation, Series
from kakusan.training.ema import Average
from kakusan.training.progress import progress

if TYPE_CHECKING:
    from kakusan.pipeline import DiffusionModel

MOST = 4096  # numbers of a state whose covariance is no burden
REHEARSAL, SEEN, BATCHES, DRAWN = 13, 14, 15, 16  # separate the uses of one seed
NEAR = 2  # steps on each side that are trusted alike
LOOKS = 24  # how often the held-out paths are asked


class Report(NamedTuple):
    """What learning has to say.

    Attributes:
        nats: What the tilt knows of Y, on held-out paths.
        std_error: Its standard error.
        pull: What the pull knows without the network; 0 where there is none.
        entropy: The entropy of Y where it is a class or an event, the most there is to know.
        paths: Paths of the rehearsal.
        iterations: Steps of the optimiser until the best.
        seconds: How long it took, the rehearsal included where it was made.
    """

    nats: float
    std_error: float
    pull: float
    entropy: float | None
    paths: int
    iterations: int
    seconds: float


@dataclass(frozen=True)
class Learned:
    """How a tilt is learned: an argument `how` of `condition`, and the numbers of what it makes.

    Attributes:
        steps: Steps of the chain, the last without noise.
        paths: Paths of the rehearsal; most of the time goes there, `steps` evaluations each.
        goal: What is regressed on: `Denoised()`, or `PathNoise()`, exact for the chain and
            noisier: for many paths, few steps, or a guided label, whose score is none.
        iterations: Steps of the optimiser.
        width: Hidden units of the network.
        depth: Its hidden layers.
        lr: Where the learning rate starts; it falls to zero along half a cosine.
        particles: How many paths are drawn at least when sampling.
        seed: Fixes what is learned.
        batch: States that the model sees at a time.

    Example:
        >>> Learned(paths=512).steps
        25
    """

    steps: int = 25
    paths: int = 2048
    goal: Goal = Denoised()
    iterations: int = 1200
    width: int = 64
    depth: int = 2
    lr: float = 1e-3
    particles: int = 256
    seed: int = 0
    batch: int = 256

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("paths", 10), ("iterations", 0), ("particles", 1),
                            ("batch", 1), ("width", 1), ("depth", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class LearnedCondition:
    """A model that can be conditioned: what `learn_condition` returns.

    Attributes:
        tilt: How the denoised state is shifted, as a `Tilt` of the chain.
        how: How it was learned.
        report: What learning had to say.
    """

    tilt: ShiftTilt
    how: Learned
    report: Report | None = None

    @property
    def observation(self) -> Observation:
        """What is seen."""
        return self.tilt.observation.observation

    @torch.no_grad()
    def sample(
        self, y: Any, n: int = 16, seed: int = 0, *, particles: int | None = None,
        quiet: bool = True,
    ) -> ConditionedSamples:  # fmt: skip
        """Draws n samples given y, out of at least as many weighted paths.

        Arguments:
            y: What was seen, one value.
            n: How many.
            seed: Fixes every path.
            particles: How many paths are drawn; by default as many as were said in `how`. Where
                the effective number is well below n samples repeat: draw more.
            quiet: Whether to show no progress.

        Raises:
            KakusanError: If y does not fit, or none of the paths came to agree with it.
        """
        chain, at = self.tilt.chain, self.tilt.observation
        like = chain.like
        rows = self.observation.value(y, like.expand(1, *chain.shape))
        wanted = max(n, particles or self.how.particles)
        ends, weights = [], []
        with progress("condition", wanted, quiet=quiet) as advance:
            for i in range(0, wanted, self.how.batch):
                b = min(self.how.batch, wanted - i)
                x = chain.start(b, Keyed(seed, i, sampling.START), like)
                found = conditioned(chain.steps, x, self.tilt, at, rows.expand(b, -1),
                                    noise=Keyed(seed, i, sampling.PATH), keep=False)  # fmt: skip
                ends.append(chain.end(found.end))
                weights.append(found.log_weights)
                advance(i + b)
        return self._drawn(torch.cat(ends), torch.cat(weights), rows, n, seed)

    def _drawn(self, x: Tensor, log_w: Tensor, y: Tensor, n: int, seed: int) -> ConditionedSamples:
        if not log_w.max() > -math.inf:
            raise KakusanError(
                f"none of {len(x)} paths came to agree with {self.observation} = "
                f"{[round(v, 4) for v in y[0, :4].tolist()]}: draw more, as particles="
                f"{8 * len(x)}, or learn from more paths"
            )
        u = torch.rand((), generator=generator(seed, DRAWN), dtype=torch.float64).item()
        y = y.expand(n, -1)
        x, missed, mended = met(self.observation, y, x[systematic(log_w, n, u)])
        return ConditionedSamples(
            x.cpu(), y.cpu(), missed.cpu(), mended.cpu(), repr(self),
            (log_w - log_w.logsumexp(0)).cpu(), log_mean_exp(log_w).value,
            effective_sample_size(log_w),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"a tilt learned from {self.how.paths} paths"


def chain_of(
    model: DiffusionModel, steps: int = 25, label: int | str | None = None, guidance: float = 1.0
) -> ReverseChain:
    """The chain of a trained model.

    Arguments:
        model: The model.
        steps: How many steps, the last without noise.
        label: A class it was trained with, by name or index; none by default.
        guidance: The weight of that label.
    """
    net, free = model.denoiser, model.config.model.label_dropout > 0
    draw = sampling.Draw(1, steps, 1.0, 0, None, guidance, 1, False)
    sampling.check(draw, model.classes is not None, free)
    labels = sampling.given(model.classes, 1, label, free)
    grid = angle_grid(net.process, net.process.span[1], 0.0, steps, rho=1.5)
    like = next(net.parameters()).new_zeros((1, *model.codec.shape))
    return ReverseChain(prior_of(net, labels, guidance), grid, model.codec.shape, like)


def rehearse(chain: ReverseChain, how: Learned | None = None, quiet: bool = True) -> Rehearsal:
    """Free paths of a model: one rehearsal serves all observations.

    Arguments:
        chain: The steps, as `chain_of` makes them.
        how: How many paths, and what is to be regressed on.
        quiet: Whether to show no progress.
    """
    how, parts = how or Learned(), []
    if math.prod(chain.shape) > MOST:
        raise KakusanError(
            f"a tilt is learned in the principal axes of samples, of at most {MOST} numbers; "
            f"these have {math.prod(chain.shape)}: PiGDM() and Twisted() take any"
        )
    seed = mix(how.seed, REHEARSAL)
    with progress("rehearse", how.paths, quiet=quiet) as advance:
        for i in range(0, how.paths, how.batch):
            b = min(how.batch, how.paths - i)
            start = chain.start(b, Keyed(seed, i, sampling.START), chain.like)
            parts.append(rehearsed(chain, how.goal, start, Keyed(seed, i, sampling.PATH)))
            advance(i + b)
    x0, goal = (torch.cat(column, 1) for column in list(zip(*parts, strict=True))[:2])
    return Rehearsal(x0, goal, torch.cat([part.end for part in parts]))


def learn_condition(
    model: DiffusionModel | ReverseChain,
    observation: Observation,
    how: Learned | None = None,
    *,
    rehearsal: Rehearsal | None = None,
    label: int | str | None = None,
    guidance: float = 1.0,
    quiet: bool = True,
) -> LearnedCondition:
    """Learns to condition a trained model on what is seen of its samples, for all values at once.

    Nothing is asked of the observation but to be drawn, and the model is not trained.

    Arguments:
        model: A trained model, or the chain of any score.
        observation: What is seen of a sample, in model units.
        how: How it is learned.
        rehearsal: Paths that were rehearsed before with the same `how`.
        label: A class the model was trained with; none by default.
        guidance: The weight of that label.
        quiet: Whether to show no progress.

    Raises:
        KakusanError: If samples have too many numbers, all paths come to one value, or losses
            stop being finite.

    Example:
        >>> from kakusan.inference.guidance.common import Prior
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import VP
        >>> from kakusan.processes.observations import Event
        >>> normal = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> chain = ReverseChain(Prior(VP(), normal), angle_grid(VP(), 1.0, 0.0, 25), (1,))
        >>> tilt = learn_condition(chain, Event(lambda x: x[:, 0] > 1.5), Learned(iterations=300))
        >>> found = tilt.sample(1, n=100)
        >>> bool((found.samples > 1.5).all()), found.ess > 40  # of 256; P(z > 1.5) = 0.067
        (True, True)
    """
    began, how = time.perf_counter(), how or Learned()
    if isinstance(observation, Series):
        raise UsageError("a Series is seen along a path, and a model draws ends of paths: observe "
                         "one part of it")  # fmt: skip
    chain = model if isinstance(model, ReverseChain) else chain_of(
        model, how.steps, label, guidance
    )  # fmt: skip
    observation.size(chain.like)
    rehearsal = rehearsal or rehearse(chain, how, quiet)
    with torch.random.fork_rng():
        torch.manual_seed(mix(how.seed))
        task = _Task.of(chain, observation, rehearsal, how)
        net, iterations = _fitted(task, how, quiet)
        trust = task.trusted(net)
    nats, error = task.nats(net, trust)
    report = Report(nats, error, task.nats(None)[0], task.entropy, len(rehearsal.end), iterations,
                    time.perf_counter() - began)  # fmt: skip
    tilt = ShiftTilt(chain, AtEnd(observation, chain), task.axes, net, trust)
    return LearnedCondition(tilt, how, report)


class _Task(NamedTuple):
    """What the network is shown, along the axes, and what it should say: all (K, P, q)."""

    chain: ReverseChain
    axes: Axes
    x0: Tensor
    pull: Tensor
    goal: Tensor
    told: Tensor
    weight: Tensor
    kept: int  # paths that are trained on; the others are held out
    entropy: float | None

    @staticmethod
    def of(chain: ReverseChain, observation: Observation, told: Rehearsal, how: Learned) -> _Task:
        """Draws Y of all paths."""
        axes, at = Axes.of(told.end, told.x0, chain.spread.tolist()), AtEnd(observation, chain)
        y = at.drawn(told.end, generator(how.seed, SEEN, device=told.end.device))
        classes = y.unique(dim=0, return_counts=True)[1].double() / len(y)
        if len(classes) == 1:
            raise KakusanError(
                f"all {len(y)} paths of the model have {observation} = "
                f"{y[0, :4].tolist()}, so nothing is learned of other values: rehearse more paths"
            )
        tilt, Q = ShiftTilt(chain, at, axes), axes.Q
        x0 = torch.stack([axes.along(x) for x in told.x0])
        pull = torch.stack([tilt.pull(x, k, y).flatten(1).float() @ Q
                            for k, x in enumerate(told.x0)])  # fmt: skip
        goal = told.goal.flatten(2).float() @ Q
        kept = len(y) - len(y) // 5
        noise = (goal - pull)[:, :kept].square().sum(2).mean(1)
        few = len(classes) < len(y) // 4
        entropy = -(classes * classes.log()).sum().item() if few else None
        return _Task(chain, axes, x0, pull, goal, at.told(y).float(), noise.mean() / noise, kept,
                     entropy)  # fmt: skip

    def out(self, net: BridgeNet, k: Tensor, p: Tensor) -> Tensor:
        return corrected(net, self.chain, self.axes, self.x0[k, p], self.pull[k, p],
                         self.told[p], k)  # fmt: skip

    def loss(self, net: BridgeNet, k: Tensor, p: Tensor) -> Tensor:
        error = self.out(net, k, p) - (self.goal - self.pull)[k, p]
        return (self.weight[k] * error.square().sum(1)).mean()

    @torch.no_grad()
    def trusted(self, net: BridgeNet | None) -> Tensor:
        """The factor of the network with the least error at each step, less its standard error.

        It is taken over `NEAR` steps on each side, on held-out paths. Too small a tilt costs
        little, and one that follows noise much, most of all in the last steps, which weigh most.
        """
        K, n = self.x0.shape[:2]
        if net is None:
            return torch.zeros(K)
        p = torch.arange(self.kept, n)
        along, square = [], []
        for k, weight in enumerate(self.chain.weight.tolist()):
            out = self.out(net, torch.full_like(p, k), p)
            gap = self.goal[k, p] - self.pull[k, p]
            along.append(weight * (out * gap).sum(1).double().cpu())
            square.append(weight * out.square().sum(1).double().mean().cpu())
        trust = []
        for k in range(K):
            near = slice(max(0, k - NEAR), k + NEAR + 1)
            a, b = torch.stack(along[near]).sum(0), torch.stack(square[near]).sum()
            trust.append(((a.mean() - a.std() / len(p) ** 0.5) / b.clamp(min=1e-12)).clamp(0, 1))
        return torch.stack(trust).float()

    @torch.no_grad()
    def nats(self, net: BridgeNet | None, trust: Tensor | None = None) -> tuple[float, float]:
        """What a tilt knows on held-out paths, and the standard error of that."""
        each, p = 0.0, torch.arange(self.kept, self.x0.shape[1])
        for k, weight in enumerate(self.chain.weight.tolist()):
            c, goal = self.pull[k, p], self.goal[k, p]
            if net is not None:
                factor = 1.0 if trust is None else trust[k].item()
                c = c + factor * self.out(net, torch.full_like(p, k), p)
            each = each + weight * ((c * goal).sum(1) - 0.5 * c.square().sum(1)).double()
        assert isinstance(each, Tensor)
        return each.mean().item(), (each.std() / len(each) ** 0.5).item()


def _fitted(task: _Task, how: Learned, quiet: bool) -> tuple[BridgeNet | None, int]:
    """The network that is best on held-out paths, None where none is; after how many steps."""
    (K, _, q), like = task.x0.shape, task.x0
    model = BridgeNet((q,), (q,), (0.0, 1.0), like.flatten(0, 1), task.told, how.width,
                      how.depth).to(like.device)  # fmt: skip
    average, g = Average(model, 0.99), generator(how.seed, BATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), how.lr, weight_decay=0.01, fused=True)
    best: tuple[float, BridgeNet | None, int] = (task.nats(None)[0], None, 0)
    every = max(1, how.iterations // LOOKS)
    with progress("learn", how.iterations, quiet=quiet) as advance:
        for i in range(how.iterations):
            for group in optimizer.param_groups:
                group["lr"] = how.lr * 0.5 * (1 + math.cos(math.pi * i / how.iterations))
            k = torch.randint(K, (1024,), generator=g)
            p = torch.randint(task.kept, (1024,), generator=g)
            loss = task.loss(model, k, p)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(model, i)
            if (i + 1) % every == 0:
                nats, _ = task.nats(average.model)
                if not math.isfinite(nats):
                    raise KakusanError(f"the loss is {loss.item()} at step {i}; try a smaller lr")
                if nats > best[0]:
                    best = nats, copy.deepcopy(average.model), i + 1
                elif best[1] is not None and i + 1 > 3 * best[2] + 8 * every:
                    break
                advance(i + 1, f"{nats:.3f} nats")
    return best[1], best[2]
