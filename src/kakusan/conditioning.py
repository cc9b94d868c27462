"""Drawing from a trained model given a measurement, a class or an event, without training.

What `DiffusionModel.condition` does: states, noise and labels as in `sampling`, with a score that
guidance has bent towards y, or with particles where that is not enough. A measurement without
noise is met exactly in the end, by the smallest change that does so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kakusan import sampling
from kakusan.core.noise import Keyed, mix
from kakusan.core.types import State, Time
from kakusan.errors import UsageError
from kakusan.inference.guidance.classifier import Classifier
from kakusan.inference.guidance.common import Guidance, Guided, Prior, projected
from kakusan.inference.guidance.pigdm import PiGDM
from kakusan.inference.guidance.twisted import Twisted
from kakusan.models.denoiser import Denoiser
from kakusan.processes.linear import ScoreField, angle_grid
from kakusan.processes.observations import Coordinates, Linear, Observation, Series
from kakusan.solvers.exponential import generate
from kakusan.training.progress import progress

if TYPE_CHECKING:
    from kakusan.learned_conditions import Learned, LearnedCondition
    from kakusan.pipeline import DiffusionModel

FAINT = 0.05  # below this alpha / r a network's slope is more error than slope; measured on MNIST


@dataclass(frozen=True)
class ConditionedSamples:
    """Samples given y, and how well they agree with it.

    Attributes:
        samples: (n, *shape), in model units and on the CPU.
        y: What was seen, (n, k), in the units of the observation.
        missed: By how much each sample misses y, (n,): the root mean square of H x - y; for a
            class or an event, the probability that it is not y.
        mended: By how much it did so before the exact values were put in, where std is 0.
        how: The guidance, in words.
        log_weights: Of the particles of `Twisted` or the paths of a learned tilt, (P,),
            normalised; the samples are drawn by them, so that each counts the same.
        log_evidence: log p(y), as they estimate it.
        ess: The smallest effective number of those particles on the way: where it is small the
            samples are near relatives, and vary too little.
    """

    samples: Tensor
    y: Tensor
    missed: Tensor
    mended: Tensor
    how: str
    log_weights: Tensor | None = None
    log_evidence: float | None = None
    ess: float | None = None

    @property
    def mean(self) -> Tensor:
        """The mean of the samples, (*shape)."""
        return self.samples.mean(0)

    @property
    def std(self) -> Tensor:
        """Their standard deviation, (*shape); 0 of one."""
        return self.samples.std(0, correction=min(1, len(self.samples) - 1))


class Given(NamedTuple):
    """What is asked for, checked: an observation, its values, and how to draw.

    Attributes:
        observation: What is observed.
        y: Its values, (n, k), on the device of the model.
        draw: How many samples, of which classes, in how many steps.
    """

    observation: Observation
    y: Tensor
    draw: sampling.Draw


@torch.no_grad()
def condition(
    model: DiffusionModel,
    observation: Observation,
    y: Any,
    n: int = 16,
    *,
    how: Guidance | Twisted | Learned | LearnedCondition | None = None,
    steps: int = 50,
    noise: float = 1.0,
    seed: int = 0,
    label: int | str | list[int | str] | None = None,
    guidance: float = 1.0,
    batch: int = 64,
    quiet: bool = True,
) -> ConditionedSamples:
    """Draws n samples of a model given that an observation of them was y.

    Sample i of a seed is the same for every n and batch, up to the rounding of the network's
    kernels, but for `Twisted`, whose particles compete.

    Arguments:
        model: A trained model.
        observation: What is seen of a sample, in model units: `Coordinates(mask)`,
            `Measured(function, std)`, `Label(classify, classes)`, `Event(holds)`.
        y: What was seen: as `observation.value` takes it; for `Coordinates` also whole samples,
            of which the seen part is taken.
        n: How many.
        how: The guidance. By default `PiGDM()` for a linear measurement, `Classifier()` for
            classes with a slope and `Twisted()` for anything else. `Learned()` learns a tilt
            first, and what `learn_condition` returned is one: these bring their own steps.
        steps: Evaluations of the network a sample; each takes its derivative as well.
        noise: 1 follows Anderson's reverse SDE, whose fresh noise washes out what guidance gets
            wrong; 0 the probability flow.
        seed: Fixes every sample.
        label: A class the model was trained with, by name or index; none by default.
        guidance: The weight of that label.
        batch: How many at a time: it bounds the memory.
        quiet: Whether to show no progress.

    Raises:
        UsageError: If the numbers make no sense, or the model knows no such label.
        KakusanError: If y does not fit, or the guidance cannot follow the observation.

    Example:
        >>> from kakusan.pipeline import DiffusionModel
        >>> data, train = torch.randn(200, 2), {"steps": 2, "batch": 16}
        >>> model = DiffusionModel.fit(data, train=train, quiet=True)
        >>> found = condition(model, Coordinates([0]), 1.5, 3, steps=4)
        >>> found.samples[:, 0]
        tensor([1.5000, 1.5000, 1.5000])
    """
    from kakusan.learned_conditions import Learned, LearnedCondition  # which builds on this

    draw = sampling.Draw(n, steps, noise, seed, None, guidance, batch, False)
    free = model.config.model.label_dropout > 0
    sampling.check(draw, model.classes is not None, free)
    if isinstance(observation, Series):
        raise UsageError(
            "a Series is seen along a path, and a diffusion model draws ends of paths: observe "
            "one part of it"
        )
    draw = draw._replace(labels=sampling.given(model.classes, n, label, free))
    like = next(model.denoiser.parameters()).new_zeros((1, *model.codec.shape))
    rows = _rows(observation, y, like.expand(n, *like.shape[1:]))
    if isinstance(how, (Learned, LearnedCondition)):
        return _learned(model, Given(observation, rows, draw), how, label, quiet)
    how = how or _default(observation, rows[:1], like)
    if not isinstance(how, (Guidance, Twisted)):
        raise UsageError(f"how is a guidance, as PiGDM() or Twisted(), got {how!r}")
    how.check(observation)  # before the work
    asked = Given(observation, rows, draw)
    with progress("condition", n, quiet=quiet) as advance:
        if isinstance(how, Twisted):
            return _twisted(model.denoiser, asked, how, like, advance)
        return _guided(model.denoiser, asked, how, like, advance)


def _rows(observation: Observation, y: Any, states: State) -> Tensor:
    """The values (n, k), of whole samples too.

    Where all numbers of a row are seen, y holds them in the order in which they are.
    """
    shape = states.shape[1:]
    part = len(shape) > 1 or observation.size(states) < shape[0]
    if isinstance(observation, Coordinates) and isinstance(y, Tensor) and part:
        if y.shape == shape or y.shape == (1, *shape) or y.shape == states.shape:
            y = observation.forward(y.reshape(-1, *shape))
    return observation.value(y, states)


def _default(observation: Observation, y: Tensor, like: State) -> Guidance | Twisted:
    """The guidance that an observation asks for."""
    if isinstance(observation, Linear):
        return PiGDM()
    with torch.enable_grad():
        log_p = observation.log_likelihood(y, like.clone().requires_grad_())
    return Classifier() if log_p.requires_grad else Twisted()


def _guided(
    net: Denoiser, asked: Given, how: Guidance, like: State, advance: Callable[..., None]
) -> ConditionedSamples:
    """Batch by batch, each by its own keys."""
    observation, y, draw = asked
    parts = []
    for i in range(0, draw.n, draw.batch):
        rows = y[i : i + draw.batch]
        labels = None if draw.labels is None else draw.labels[i : i + len(rows)].to(like.device)
        prior = _prior(net, net.given(labels, draw.guidance))
        x1 = _start(net, len(rows), i, draw.seed, like)
        source = Keyed(draw.seed, i, sampling.PATH)
        seen = Guided(prior, how, observation, rows)
        x = generate(net.process, seen, x1, draw.steps, draw.noise, source)
        parts.append([part.cpu() for part in met(observation, rows, x)])
        advance(i + len(rows))
    x, missed, mended = (torch.cat(column) for column in zip(*parts, strict=True))
    return ConditionedSamples(x, y.cpu(), missed, mended, repr(how))


def _learned(
    model: DiffusionModel, asked: Given, how: Learned | LearnedCondition, label: Any, quiet: bool
) -> ConditionedSamples:
    """By a tilt, which is learned here unless it is given."""
    from kakusan.learned_conditions import Learned, learn_condition

    observation, y, draw = asked
    if isinstance(label, list) or not bool((y == y[:1]).all()):
        raise UsageError(
            "a learned tilt draws for one value and one class at a time: condition on one after "
            "the other; what learn_condition returns serves all values"
        )
    if isinstance(how, Learned):
        with torch.enable_grad():
            how = learn_condition(model, observation, how, label=label, guidance=draw.guidance,
                                  quiet=quiet)  # fmt: skip
    elif how.observation is not observation:
        raise UsageError(f"the tilt was learned for {how.observation}, not for {observation}")
    elif label is not None or draw.guidance != 1:
        raise UsageError("a learned tilt has its class from learn_condition(..., label=)")
    return how.sample(y[:1], draw.n, draw.seed, quiet=quiet)


def _twisted(
    net: Denoiser, asked: Given, how: Twisted, like: State, advance: Callable[..., None]
) -> ConditionedSamples:
    """All particles at once, by one value and one class."""
    observation, y, draw = asked
    labels = None if draw.labels is None else draw.labels[:1].to(like.device)
    same = bool((y == y[:1]).all())
    if not same or (draw.labels is not None and bool((draw.labels != draw.labels[0]).any())):
        raise UsageError(
            "the particles of Twisted compete for one value and one class: condition on one after "
            "the other"
        )
    grid = angle_grid(net.process, net.process.span[1], 0.0, draw.steps, rho=1.5)
    x1 = _start(net, max(how.particles, draw.n), 0, draw.seed, like)
    found = how.run(
        prior_of(net, labels, draw.guidance), observation, y[:1], x1, grid,
        draw.noise, mix(draw.seed, sampling.PATH), draw.batch,
        lambda k: advance(draw.n * k // draw.steps),
    )  # fmt: skip
    x = found.draw(draw.n, draw.seed)
    x, missed, mended = met(observation, y, x)
    return ConditionedSamples(
        x.cpu(), y.cpu(), missed.cpu(), mended.cpu(), repr(how), found.log_weights.cpu(),
        found.log_evidence, found.ess.min().item(),
    )  # fmt: skip


def prior_of(net: Denoiser, label: Tensor | None = None, guidance: float = 1.0) -> Prior:
    """A denoiser before anything was seen, for one label (1,) or none and any number of states."""
    return _prior(net, _OneLabel(net, label, guidance))


def _prior(net: Denoiser, score: ScoreField) -> Prior:
    return Prior(net.process, score, net.data_std, FAINT)


def _start(net: Denoiser, n: int, first: int, seed: int, like: State) -> State:
    """States at the end of the span, (n, *shape), the same as `sampling` starts from."""
    end = torch.tensor(net.process.span[1], dtype=torch.float64)
    size = torch.hypot(net.process.sigma(end), net.process.alpha(end) * net.data_std).item()
    return size * Keyed(seed, first, sampling.START).normal(0, (n, *like.shape[1:]), like)


def met(observation: Observation, y: Tensor, x: State) -> tuple[State, Tensor, Tensor]:
    """States that meet y where it has no noise; how far they are from y now, and were before."""
    before = _missed(observation, y, x)
    if not isinstance(observation, Linear) or observation.std:
        return x, before, before
    x = projected(observation, y, x)
    return x, _missed(observation, y, x), before


def _missed(observation: Observation, y: Tensor, x: State) -> Tensor:
    """How far samples are from y, (n,)."""
    if isinstance(observation, Linear):
        return (observation.forward(x) - y).square().mean(1).sqrt()
    return 1 - observation.log_likelihood(y, x).exp()


class _OneLabel(ScoreField):
    """The score for one label, or none, of any number of states."""

    def __init__(self, net: Denoiser, label: Tensor | None, guidance: float) -> None:
        self.net, self.label, self.guidance = net, label, guidance

    def _given(self, n: int) -> ScoreField:
        label = None if self.label is None else self.label.expand(n)
        return self.net.given(label, self.guidance)

    def __call__(self, x: State, t: Time) -> State:
        return self._given(len(x))(x, t)

    def velocity(self, x: State, t: Time) -> State:
        return self._given(len(x)).velocity(x, t)
