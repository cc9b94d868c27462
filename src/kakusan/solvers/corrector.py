r"""Langevin steps at the noise levels of a diffusion: annealing, and predictor-corrector.

The score of a linear SDE at time t is the target of Langevin steps, and x' = x + ε s + sqrt(2ε) z
leaves p_t as it is, up to O(ε). Two uses:

* `annealed_langevin` (NCSN) makes K steps at each of a row of levels, from much noise to little,
  and nothing else: p_t at one level is the start for the next, and modes that no step could leave
  at the last level are still one at the first.
* `PredictorCorrector` steps along the reverse process and then makes K steps at the new time,
  which bring back to p_s what the step left beside it. It is a method of `solve`.

How long a step is, a rule says (`StepRule`). `NoiseLevel(c)` takes ε = c sigma_t², which is NCSN's
ε (sigma_i / sigma_L)² with c in units of the last level's variance; p_t has at least this variance
in each direction, so c < 2 is always stable. `SignalToNoise(r)` (Song et al. 2021) takes

.. math:: \epsilon = 2 (r |z| / |s|)^2

with the norms of *each sample*. The original averages norms over the batch, which makes a sample
depend on its batch mates. In many dimensions the norms hardly vary and the two rules agree, with
c = 2r² where the noise outweighs the data. In few dimensions |s| comes near zero close to every
mode, the step explodes there, and p_t is not left as it is. `NoiseLevel` is therefore the default:
on a mixture in the plane, 10 steps of `Ancestral` are much closer to the data with NoiseLevel(0.5)
than without, about as close as the 20 that cost the same, and with SignalToNoise(0.16) they are
farther away (docs/langevin.md).

Where alpha is not 1 (VP) levels are annealed in y = x / alpha, whose noise has the standard
deviation sigma / alpha and whose score is alpha s: there, going to the next level leaves y as it
is.

References:
    Generative modeling by estimating gradients of the data distribution (Song, Ermon, 2019)
    Score-based generative modeling through SDEs (Song et al., 2021), appendix G
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kakusan.core.hashing import lowbias32, normals
from kakusan.core.noise import Noise, Wants
from kakusan.core.operators import Operator, Scale
from kakusan.core.types import Field, State, Time, elapsed, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import Reverse, Tilted
from kakusan.processes.zoo.parameters import count, parameter
from kakusan.solvers.exponential import Ancestral, Multistep
from kakusan.solvers.langevin import second_normal
from kakusan.solvers.solve import Method, solve


class StepRule(abc.ABC):
    """How long a Langevin step is."""

    @abc.abstractmethod
    def size(self, s: State, z: Tensor, variance: Tensor | None) -> Tensor:
        """The step size ε, () or (B,).

        Arguments:
            s: The score, (B, *shape).
            z: The normal numbers of the step, like s.
            variance: sigma_t², () in float64; None for processes that have none.
        """


@dataclass(frozen=True)
class NoiseLevel(StepRule):
    """ε = c sigma_t², with c = `size`: a share of the variance of the noise.

    Example:
        >>> NoiseLevel(0.1).size(torch.ones(1, 2), torch.ones(1, 2), torch.tensor(4.0))
        tensor(0.4000)
    """

    c: float = 0.2

    def __post_init__(self) -> None:
        parameter("the step size c of NoiseLevel", self.c, least=0.0, below=2.0)

    def size(self, s: State, z: Tensor, variance: Tensor | None) -> Tensor:  # noqa: D102
        if variance is None:
            raise KakusanError("NoiseLevel takes its steps from sigma(t), which a LinearSDE has; "
                               "SignalToNoise takes any score")  # fmt: skip
        return self.c * variance


@dataclass(frozen=True)
class SignalToNoise(StepRule):
    """ε = 2 (r |z| / |s|)², with the norms of each sample; r is Song's signal-to-noise ratio.

    Example:
        >>> SignalToNoise(0.5).size(torch.ones(1, 2), torch.full((1, 2), 2.0), None)
        tensor([2.])
    """

    r: float = 0.16

    def __post_init__(self) -> None:
        parameter("the ratio r of SignalToNoise", self.r, least=0.0)

    def size(self, s: State, z: Tensor, variance: Tensor | None) -> Tensor:  # noqa: D102
        noise, signal = (v.flatten(1).square().sum(1) for v in (z, s))
        # no signal, no step: where the score is zero the rule would jump to infinity
        return torch.where(signal > 0, 2 * self.r**2 * noise / signal, torch.zeros_like(signal))


def langevin_step(x: State, s: State, z: Tensor, size: Tensor) -> State:
    """X + ε s + sqrt(2ε) z, with ε of shape () or (B,)."""
    return x + per_sample(size, x) * s + per_sample((2 * size).sqrt(), x) * z


# --- predictor and corrector


class PredictorCorrector(Method):
    r"""A step of the predictor, then K Langevin steps at the time where it ends.

    The numbers of the first correction are those that the noise source gives beside each
    increment (it must know areas: not `Counter`, but `CounterWithArea`); those of further ones are
    hashes of the sample's first, so that sample i is the same in any batch. No correction is made
    beyond the span of the process, at t = 0 say, where there is no score.

    Arguments:
        predictor: A method that takes one step without memory: `Ancestral()` by default,
            `EulerMaruyama()` for the reverse of any SDE. `Multistep` is refused: it extrapolates
            velocities of states that the corrector has moved since.
        rule: How long a correction is; `NoiseLevel()` by default.
        steps: K, corrections after each step.

    Example:
        >>> from kakusan import VE, Keyed, angle_grid, reverse
        >>> ve, x1 = VE(), 50 * torch.randn(10, 2, dtype=torch.float64)
        >>> grid, method = angle_grid(ve, 1.0, 0.0, 20), PredictorCorrector(steps=2)
        >>> score = lambda x, t: -x / (1 + ve.variance(t))
        >>> solve(reverse(ve, score), x1, grid, method, Keyed(0)).end.shape
        torch.Size([10, 2])
    """

    wants = Wants.AREA

    def __init__(
        self, predictor: Method | None = None, rule: StepRule | None = None, steps: int = 1
    ) -> None:
        self.predictor = predictor or Ancestral()
        self.rule, self.steps = rule or NoiseLevel(), count("steps", steps)
        if isinstance(self.predictor, Multistep):
            raise KakusanError(
                "Multistep extrapolates velocities of states that a corrector has moved since; "
                "correct a method of one step: Ancestral() or EulerMaruyama()"
            )
        if self.predictor.wants is not Wants.INCREMENT or self.predictor.stratonovich:
            raise KakusanError(
                f"a predictor takes Itô increments alone, and {type(self.predictor).__name__} "
                "wants more; Ancestral() and EulerMaruyama() do"
            )

    def init(self, sde: SDE, x: State, grid: Tensor) -> Any:
        """The memory of the predictor; refuses what has no score or no noise."""
        if score_of(sde) is None:
            raise KakusanError(
                f"a corrector needs the score of a reversed process, reverse(sde, score), got "
                f"{type(sde).__name__}"
            )
        if sde.diffusion(x, grid[0]).deterministic:
            raise KakusanError(
                "a corrector draws numbers, and a flow brings none: reverse(sde, score, "
                "noise=1e-6) is the flow with noise to correct it"
            )
        return self.predictor.init(sde, x, grid)

    def step(self, sde: SDE, x: State, t: Time, s: Time, dw: Any, state: Any) -> tuple[State, Any]:
        """One step, and its corrections at s."""
        x, state = self.predictor.step(sde, x, t, s, dw[0], state)
        score = score_of(sde)
        if score is None or (s - sde.span[1]) * sde.direction > 0:
            return x, state
        first, variance = second_normal(dw, elapsed(t, s)), _variance(sde, s)
        for k in range(self.steps):
            z = further_normals(first, k) if k else first
            value = score(x, s)
            x = langevin_step(x, value, z, self.rule.size(value, z, variance))
        return x, state


def score_of(sde: SDE) -> Field | None:
    """The score that a reversed process follows, with the tilts on top; None for others."""
    if isinstance(sde, Tilted):
        below, u = score_of(sde.sde), sde.u
        return None if below is None else lambda x, t: below(x, t) + u(x, t)
    return sde.score if isinstance(sde, Reverse) else None


def _variance(sde: SDE, t: Time) -> Tensor | None:
    while isinstance(sde, Tilted):
        sde = sde.sde
    process = sde.sde if isinstance(sde, Reverse) else sde
    return process.variance(t) if isinstance(process, LinearSDE) else None


def further_normals(z: Tensor, k: int) -> Tensor:
    """Unit normals of each sample that follow from its own numbers z, by a hash; k is which.

    The key of a sample is made of the bits of all its numbers, so nothing else enters: neither the
    batch nor the place in it.

    Example:
        >>> z = torch.randn(5, 2)
        >>> torch.equal(further_normals(z, 1)[2:], further_normals(z[2:], 1))
        True
    """
    bits = z.flatten(1).to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    words = bits.contiguous().view(torch.int32)
    place = lowbias32(torch.arange(words.shape[1], dtype=torch.int32, device=z.device))
    key = [_total(lowbias32(words ^ place ^ salt)) for salt in (k, ~k)]
    lane = torch.arange(bits.shape[1], dtype=torch.int32, device=z.device)
    # words() reads key[0] and key[1]: one pair a sample, beside the lanes
    return normals(lane, torch.stack(key).unsqueeze(-1), z.dtype)[0].reshape(z.shape)


def _total(words: Tensor) -> Tensor:
    """The sum of each row, wrapping in 32 bits."""
    return lowbias32(words.sum(1, dtype=torch.int64).to(torch.int32))


# --- annealing


class _Levels(SDE):
    """Langevin time: K units at each level, in y = x / alpha."""

    def __init__(self, process: LinearSDE, score: Field, times: Tensor, steps: int) -> None:
        self.process, self.score, self.times, self.steps = process, score, times, steps
        self.span = (0.0, float(len(times) * steps))
        self.alpha, self.sigma = process.alpha(times), process.sigma(times)

    def _level(self, t: Time) -> int:
        return int(t.item() + 0.5) // self.steps

    def variance(self, t: Time) -> Tensor:
        i = self._level(t)
        return (self.sigma[i] / self.alpha[i]) ** 2

    def drift(self, x: State, t: Time) -> State:
        i = self._level(t)
        alpha = self.alpha[i].item()
        return alpha * self.score(alpha * x, self.times[i])

    def diffusion(self, x: State, t: Time) -> Operator:
        return Scale(math.sqrt(2))

    def noise_shape(self, x: State) -> tuple[int, ...]:
        return tuple(x.shape)


class _ByRule(Method):
    """A Langevin step as long as a rule says."""

    def __init__(self, rule: StepRule) -> None:
        self.rule = rule

    def step(self, sde: SDE, x: State, t: Time, s: Time, dw: Any, state: Any) -> tuple[State, Any]:
        assert isinstance(sde, _Levels)
        z, value = dw / math.sqrt(elapsed(t, s)), sde.drift(x, t)
        return langevin_step(x, value, z, self.rule.size(value, z, sde.variance(t))), state


def annealed_langevin(
    process: LinearSDE,
    score: Field,
    x1: State,
    times: Tensor | Sequence[float],
    steps: int = 100,
    rule: StepRule | None = None,
    noise: Noise | None = None,
) -> State:
    r"""Langevin steps at one noise level after another, down to the last (NCSN).

    Arguments:
        process: The forward process.
        score: Its score, (x, t) -> ∇log p_t(x).
        x1: States at the first level, (B, *shape).
        times: The times of the levels, falling, all with some noise: `log_snr_grid` gives NCSN's
            geometric sequence.
        steps: K, steps at each level.
        rule: How long steps are; `NoiseLevel()` by default.
        noise: Where z comes from.

    Returns:
        States at the last level, whose noise is still in them.

    Example:
        >>> from kakusan import EDM, Fresh, log_snr_grid
        >>> edm, x1 = EDM(), 80 * torch.randn(2000, 1, dtype=torch.float64)
        >>> times = log_snr_grid(edm, 80.0, 0.01, 20)
        >>> score = lambda x, t: -x / (1 + t**2)
        >>> x = annealed_langevin(edm, score, x1, times, steps=50, noise=Fresh(0))
        >>> bool(abs(x.std() - 1) < 0.1)
        True
    """
    at = _levels(process, times)
    sde = _Levels(process, score, at, count("steps", steps))
    n, rule = len(at) * steps, rule or NoiseLevel()
    grid = torch.linspace(0, n, n + 1, dtype=torch.float64)
    try:
        y = solve(sde, x1 / sde.alpha[0].item(), grid, _ByRule(rule), noise).end
    except KakusanError as error:
        raise KakusanError(
            f"in annealed Langevin steps by {rule}, {steps} a level, {error}"
        ) from None
    return y * sde.alpha[-1].item()


def _levels(process: LinearSDE, times: Tensor | Sequence[float]) -> Tensor:
    at = torch.as_tensor(times, dtype=torch.float64).cpu()
    level = process.sigma(at) / process.alpha(at)
    falls = at.ndim == 1 and len(at) > 0 and bool((level.diff() < 0).all())
    if not falls or not level.isfinite().all() or not (level > 0).all():
        raise KakusanError(
            "levels are falling times with some noise and some signal left (sigma/alpha is "
            f"positive and finite), got t={at.tolist()}"
        )
    return at
