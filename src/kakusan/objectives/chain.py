r"""A linear SDE seen at T times: DDPM's chain, its posterior, and the variance of its reverse.

Take any linear SDE and times t_1 < ... < t_T. The step from s = t_{k-1} to t = t_k is

.. math:: q(x_t | x_s) = N(a x_s, \beta_k), \qquad
          a = \alpha_t / \alpha_s, \quad \beta_k = \sigma_t^2 - a^2 \sigma_s^2 ,

where the step into t_1 starts at the data themselves (alpha = 1, sigma = 0). Bayes' rule gives the
step back for a known x_0,

.. math:: q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, \tilde\beta_k), \qquad
          c_0 = \frac{\alpha_s \beta_k}{\sigma_t^2}, \quad
          c_t = \frac{a \sigma_s^2}{\sigma_t^2}, \quad
          \tilde\beta_k = \frac{\beta_k \sigma_s^2}{\sigma_t^2} ,

and the model's step back puts its E[x_0 | x_t] in the place of x_0. For `DDPM` at its own knots
these are the formulas of Ho et al.; for the cosine process, EDM and the others they are the same
formulas at other alpha and sigma.

The variance of the model's step is a choice, and each choice is a type:

==============  ==========================================  =====================================
type            variance                                    best where
==============  ==========================================  =====================================
`Large`         beta                                        the data are N(0, I) (and VP)
`Small`         beta tilde                                  the data are one point
`Interpolated`  exp(f log beta + (1 - f) log beta tilde)    the network learns f for each entry
`Analytic`      beta tilde + c_0² Cov(x_0 | x_t)            one number a step, estimated
==============  ==========================================  =====================================

beta tilde is 0 at the first step, where `Small` and `Interpolated` take that of the second one
(Nichol and Dhariwal). For data with a density `Small` never becomes exact: however fine the steps,
its bound stays at least 0.2886 nats, half of Euler's constant, below for each dimension (that with
an exact first step), lost in the first few steps, where beta tilde / beta is (k - 1) / k. Data of
integers lose nothing there.

References:
    Denoising diffusion probabilistic models (Ho et al., 2020), arXiv:2006.11239
    Improved denoising diffusion probabilistic models (Nichol, Dhariwal, 2021), arXiv:2102.09672
    Analytic-DPM (Bao et al., 2022), arXiv:2201.06503
    Estimating the optimal covariance with imperfect mean (Bao et al., 2022), arXiv:2206.07309
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from kakusan.core.noise import Keyed, Noise
from kakusan.core.types import Field, State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.models.denoiser import Conditioned, Denoiser
from kakusan.processes.linear import DDPM, LinearSDE, angle_grid, velocity_of

ESTIMATE, SAMPLE = 21, 22  # separate these uses of a seed from all others
Model: TypeAlias = Denoiser | Field
Ask: TypeAlias = Callable[[State, Time, Tensor | None], tuple[State, Tensor | None]]


class Step(NamedTuple):
    """The coefficients of some steps, each () or (B,): see the head of this module.

    `floor` is beta tilde, at the first step that of the second; `k` counts from 0.
    """

    t: Time
    alpha: Tensor
    sigma: Tensor
    beta: Tensor
    tilde: Tensor
    floor: Tensor
    c0: Tensor
    ct: Tensor
    k: Tensor


class Chain:
    """A linear SDE at T times, from the least noise to the most.

    Arguments:
        process: The process.
        times: The times, rising, (T,); or how many. By default DDPM's own knots, and 1000 times
            evenly spread in angle over the span of any other process.
        start: Where the span is to start instead: decoders say where they do.

    Raises:
        KakusanError: If the times do not rise, or there is no noise at the first.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> chain = Chain(VP.from_betas([0.1, 0.2, 0.3]))
        >>> step = chain.steps(torch.tensor(1))
        >>> round(step.beta.item(), 6), round(step.tilde.item(), 6)
        (0.2, 0.071429)
    """

    def __init__(
        self,
        process: LinearSDE,
        times: Tensor | int | None = None,
        start: float | None = None,
    ) -> None:
        self.process = process
        self.times = _times(process, times, start)
        t = self.times
        alpha, sigma, variance = process.alpha(t), process.sigma(t), process.variance(t)
        if not bool((variance > 0).all()):
            raise KakusanError(
                f"a chain starts above the data, and at its first time t={t[0].item():g} there is "
                "no noise yet; leave that time out"
            )
        # the step into the first time starts at the data: alpha = 1, sigma = 0
        factor, beta = alpha.clone(), variance.clone()
        later = process.transition(t[:-1], t[1:])
        factor, beta = (torch.cat([c[:1], d]) for c, d in zip((factor, beta), later, strict=True))
        before = torch.cat([alpha.new_ones(1), alpha[:-1]])
        below = torch.cat([variance.new_zeros(1), variance[:-1]])
        tilde = beta * below / variance
        floor = torch.cat([tilde[1:2] if len(t) > 1 else beta[:1], tilde[1:]])
        c0, ct = before * beta / variance, factor * below / variance
        self._rows = torch.stack([t, alpha, sigma, beta, tilde, floor, c0, ct])

    def __len__(self) -> int:
        return len(self.times)

    def steps(self, k: Tensor) -> Step:
        """The coefficients of steps k, counted from 0, with shape () or (B,)."""
        if k.device != self._rows.device:
            self._rows = self._rows.to(k.device)
        return Step._make([*self._rows[:, k], k])

    def table(self) -> Step:
        """The coefficients of all steps, (T,)."""
        return self.steps(torch.arange(len(self), device=self._rows.device))

    def index(self, t: Time) -> Tensor:
        """The steps that end at these times, with the shape of t: the nearest knots."""
        knots = self.times.to(t.device)
        between = (knots[1:] + knots[:-1]) / 2
        return torch.searchsorted(between, t.contiguous())

    def prior(self, x0: State) -> Tensor:
        """KL(q(x_T | x_0) || N(0, alpha_T² + sigma_T²)), (B,): N(0, I) where VP ends."""
        return prior(self.process, self.times[-1], x0)

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        x: State,
        variance: Variance | None = None,
        source: Noise | None = None,
        label: Tensor | None = None,
    ) -> State:
        """Ancestral sampling: the model's steps back, one by one, and x_0 at the end.

        Arguments:
            model: The denoiser, or a score.
            x: States at the last time, (B, *shape).
            variance: That of the steps; `Small` by default.
            source: Where the noise comes from; seed 0 by default.
            label: Class indices, (B,).
        """
        ask, variance = asking(self.process, model), variance or Small()
        source = source or Keyed(0, stream=SAMPLE)
        for k in range(len(self) - 1, -1, -1):
            step = self.steps(torch.tensor(k))
            v, spread = ask(x, step.t, label)
            mean = per_sample(step.c0, x) * clean(step, x, v) + per_sample(step.ct, x) * x
            if k == 0:
                return mean  # the data carry no noise
            z = source.normal(len(self) - 1 - k, tuple(x.shape), x)
            x = mean + (variance.log(step, spread, x) / 2).exp() * z
        return x


def chain_of(process: LinearSDE) -> Chain:
    """The chain of a process at its default times, remembered unless the process may change."""
    fixed = not isinstance(process, nn.Module) and process.__hash__ is not None
    return _remembered(process) if fixed else Chain(process)


@functools.lru_cache(maxsize=4)
def _remembered(process: LinearSDE) -> Chain:
    return Chain(process)


def _times(process: LinearSDE, times: Tensor | int | None, start: float | None) -> Time:
    if isinstance(times, Tensor):
        times = as_time(times)
        if times.ndim != 1 or not len(times) or not bool((times.diff() > 0).all()):
            raise KakusanError(
                f"the times of a chain rise from the data to the noise; got {times.tolist()}"
            )
        return times
    if isinstance(process, DDPM) and start is None:
        return process.knots(times).flip(0)[1:]
    count = 1000 if times is None else times
    if count < 2:
        raise KakusanError(f"a chain over a span has at least 2 times, got {count}")
    start = process.span[0] if start is None else start
    if not 0 <= start < process.span[1]:
        raise KakusanError(f"a chain starts before t={process.span[1]:g}, got start={start:g}")
    # the bisection behind the angle has no slope, and needs none
    with torch.no_grad():
        return angle_grid(process, process.span[1], start, count - 1).flip(0)


def prior(process: LinearSDE, t: Time, x0: State) -> Tensor:
    """KL(q(x_t | x_0) || N(0, alpha² + sigma²)) in nats, float64 (B,)."""
    alpha, variance = process.alpha(t).to(x0.device), process.variance(t).to(x0.device)
    whole = alpha**2 + variance
    ratio = variance / whole
    square = x0.flatten(1).double().square().sum(1) * (alpha**2 / whole)
    return 0.5 * (square + x0[0].numel() * (ratio - 1 - ratio.log()))


# --- asking a model


def process_of(model: Model) -> LinearSDE:
    """The process that a model belongs to."""
    owner = model.model if isinstance(model, Conditioned) else model
    process = getattr(owner, "process", None)
    if not isinstance(process, LinearSDE):
        raise KakusanError(
            f"a {type(model).__name__} does not say which linear SDE it belongs to; give a chain, "
            "or the process"
        )
    return process


def asking(process: LinearSDE, model: Model) -> Ask:
    """Any model as a function (x, t, label) -> (angular velocity, spread or None).

    The velocity v is regular where x_0 and eps are not, and both follow from it without loss.
    """
    if isinstance(model, Denoiser):
        return model.velocity_and_spread
    velocity = velocity_of(process, model)

    def ask(x: State, t: Time, label: Tensor | None) -> tuple[State, None]:
        if label is not None:
            raise KakusanError("labels go to a Denoiser; this model is a score, which takes none")
        return velocity(x, t), None

    return ask


def clean(step: Step, x: State, v: State) -> State:
    """x_0 from x and the velocity: cos(phi) x / r - sin(phi) v."""
    r = torch.hypot(step.alpha, step.sigma)
    return per_sample(step.alpha / r**2, x) * x - per_sample(step.sigma / r, x) * v


def miss(step: Step, x0: State, eps: State, v: State) -> State:
    """The error of a guessed velocity: cos(phi) eps - sin(phi) x_0 - v.

    That of x_0 is -sigma/r of it, and that of eps alpha/r of it.
    """
    r = torch.hypot(step.alpha, step.sigma)
    return per_sample(step.alpha / r, x0) * eps - per_sample(step.sigma / r, x0) * x0 - v


def divergence(step: Step, e: State, log_variance: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of each entry, like e.

    Arguments:
        step: The step.
        e: The error of the velocity, as `miss` gives it.
        log_variance: That of the model's step, beside e.
    """
    excess = per_sample(step.floor.log(), e) - log_variance
    square = per_sample((step.c0 * step.sigma) ** 2 / (step.alpha**2 + step.sigma**2), e) * e**2
    return 0.5 * (excess.expm1() - excess + square * (-log_variance).exp())


# --- variances


class Variance(abc.ABC):
    """The variance of the model's step back."""

    @abc.abstractmethod
    def log(self, step: Step, spread: Tensor | None, like: State) -> Tensor:
        """Its logarithm, to stand beside a state like `like`."""


class Large(Variance):
    """beta: that of the step forward."""

    def log(self, step: Step, spread: Tensor | None, like: State) -> Tensor:  # noqa: D102
        return per_sample(step.beta.log(), like)


class Small(Variance):
    """beta tilde: that of the step back for a known x_0; at the first step that of the second."""

    def log(self, step: Step, spread: Tensor | None, like: State) -> Tensor:  # noqa: D102
        return per_sample(step.floor.log(), like)


class Interpolated(Variance):
    """Between the two, for each entry as the network says: f = (1 + spread) / 2."""

    def log(self, step: Step, spread: Tensor | None, like: State) -> Tensor:  # noqa: D102
        if spread is None:
            raise KakusanError(
                "Interpolated reads its variance off the second half of the network's output, and "
                "this one has no second half; train with model.variance=learned, or use Small()"
            )
        f = (spread.to(like.dtype) + 1) / 2
        beta, floor = per_sample(step.beta.log(), like), per_sample(step.floor.log(), like)
        return f * beta + (1 - f) * floor


class Analytic(Variance):
    """One number a step, estimated from the model: beta tilde + c_0² Cov(x_0 | x_t).

    Arguments:
        variance: The variances of all steps of one chain, (T,).
        std_error: Their standard errors, (T,).
    """

    def __init__(self, variance: Tensor, std_error: Tensor) -> None:
        self.variance, self.std_error = variance, std_error

    def log(self, step: Step, spread: Tensor | None, like: State) -> Tensor:  # noqa: D102
        return per_sample(self.variance.log().to(step.k.device)[step.k], like)

    @classmethod
    def estimate(
        cls,
        model: Model,
        data: State,
        chain: Chain | None = None,
        seed: int = 0,
        batch: int = 256,
        label: Tensor | None = None,
    ) -> Analytic:
        r"""From the mean square of the model's own score (Bao et al. 2022).

        .. math:: \sigma_k^2 = \tilde\beta_k + c_0^2 \frac{\sigma_t^2}{\alpha_t^2}
                  (1 - \sigma_t^2 E\|s(x_t)\|^2 / d)

        The bracket is a small difference of numbers near 1 where noise is high, and its factor is
        large there: the squares of the drawn eps serve as a control variate, and what multiplies
        c_0² is cut to [0, Var(x_0)] and the bracket to [0, 1], where they lie for the true score.

        Arguments:
            model: The denoiser, or a score.
            data: Data, (N, *shape): not the data to be judged.
            chain: The chain; that of the model's process by default.
            seed: Fixes the noise.
            batch: How many samples at a time.
            label: Class indices, (N,).

        Example:
            >>> from kakusan.models.score import ExactMixture
            >>> from kakusan.processes.linear import VP
            >>> vp = VP.from_betas([0.1, 0.2, 0.3])
            >>> exact = ExactMixture(vp, torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
            >>> found = Analytic.estimate(exact, torch.randn(4096, 1, dtype=torch.float64))
            >>> bool((found.variance - torch.tensor([0.1, 0.2, 0.3])).abs().max() < 0.02)
            True
        """
        most = data.double().var(0, correction=0).mean().item()
        return cls._measured(_score_square, most, model, data, chain, seed, batch, label)

    @classmethod
    def matched(
        cls,
        model: Model,
        data: State,
        chain: Chain | None = None,
        seed: int = 0,
        batch: int = 256,
        label: Tensor | None = None,
    ) -> Analytic:
        """From the mean square error of the model's x_0: the best for an imperfect mean.

        For the true score both are the same; arguments as in `estimate`.
        """
        return cls._measured(_error_square, math.inf, model, data, chain, seed, batch, label)

    @classmethod
    @torch.no_grad()
    def _measured(
        cls,
        measure: Callable[[State, State], Tensor],
        most: float,
        model: Model,
        data: State,
        chain: Chain | None,
        seed: int,
        batch: int,
        label: Tensor | None,
    ) -> Analytic:
        chain = chain or Chain(process_of(model))
        ask = asking(chain.process, model)
        share, error = [], []
        for k in range(len(chain)):
            step = chain.steps(torch.tensor(k))
            parts = []
            for i in range(0, len(data), batch):
                x0, given = data[i : i + batch], None if label is None else label[i : i + batch]
                eps = Keyed(seed, i, ESTIMATE).normal(k, tuple(x0.shape), x0)
                v, _ = ask(chain.process.noised(x0, eps, step.t), step.t, given)
                # the error of eps is alpha/r times that of v
                off = per_sample(step.alpha / torch.hypot(step.alpha, step.sigma), x0) * miss(
                    step, x0, eps, v
                )
                parts.append(measure(eps.double(), (eps - off).double()).cpu())
            every = torch.cat(parts, 1)
            every = every[0] - _explained(*every)
            share.append(every.mean())
            error.append(every.std(correction=min(1, len(every) - 1)) / math.sqrt(len(every)))
        step = chain.table()
        room = (step.sigma / step.alpha) ** 2
        left = (room * torch.stack(share)).clamp(min=0).minimum(room.clamp(max=most))
        # at the first step nothing keeps it from 0 but the floor
        variance = torch.maximum(step.tilde + step.c0**2 * left, step.floor)
        return cls(variance, step.c0**2 * room * torch.stack(error))


def _explained(value: Tensor, known: Tensor) -> Tensor:
    """What a number of known mean 0 explains of another: taken away, less noise is left."""
    return (
        known * ((value - value.mean()) * known).mean() / known.square().mean().clamp(min=1e-300)
    )


def _score_square(eps: State, guess: State) -> Tensor:
    """1 - eps_hat², which averages to alpha²/sigma² Cov(x_0 | x_t), beside eps² - 1; (2, b)."""
    return torch.stack([(1 - guess**2).flatten(1).mean(1), (eps**2 - 1).flatten(1).mean(1)])


def _error_square(eps: State, guess: State) -> Tensor:
    """(eps - eps_hat)², alpha²/sigma² times the square error of x_0, beside nothing; (2, b)."""
    square = (eps - guess).square().flatten(1).mean(1)
    return torch.stack([square, torch.zeros_like(square)])
