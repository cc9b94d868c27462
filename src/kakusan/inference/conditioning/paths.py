r"""Paths that meet what was seen, with weights.

The law P of a chain X_{k+1} = m_k + G_k dw_k, dw_k ~ N(0, h_k), is sampled by a tilted one: with
the control c of a `Tilt`, dw_k = h_k c_k + s_k db_k, db_k ~ N(0, h_k), and a path weighs

.. math:: \log w = \sum_k \Big[ \frac{|db_k|^2 - |dw_k|^2}{2 h_k} + m \log s_k \Big]
                   + \log p(y \mid X_{N-1}),

m the numbers of noise of a step. Its last step is drawn from the chain's own step given y, so the
path meets y however poor the tilt is. No step takes an inverse of G but the last, and that one an
inverse of what is seen of GGᵀ (`finish`). Then, for the chain itself, at any step size,

.. math:: E[w] = p(Y = y \mid X_0), \qquad E[w f(X)] / E[w] = E[f(X) \mid Y = y] :

a tilt decides how much the weights vary, not what they estimate. The control acts along the arrow
of the process: a reversed one has the same formulas, with h the length of a step.

References:
    Numerical techniques for maximum likelihood estimation of continuous-time diffusion processes
        (Durham and Gallant, 2002)
    Simulation of conditioned diffusion and application to parameter estimation (Delyon and Hu,
        2006)
    Twisted particle filters (Whiteley and Lee, 2014)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Fresh, Noise, generator
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.finish import End, Finish, Free, Pinned, Seen, placed
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.inference.weights import LogMean, effective_sample_size, log_mean_exp
from kakusan.processes.observations import Linear, Observation, Terminal
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from kakusan.solvers.solve import Path

RESAMPLED = 17  # separates this use of a seed from all others


class Expectation(NamedTuple):
    """A weighted mean over paths.

    Attributes:
        value: Σ w f / Σ w, with the shape of one f.
        std_error: Its standard error, to first order in the spread of the weights.
        ess: The effective number of paths.
    """

    value: Tensor
    std_error: Tensor
    ess: float


@dataclass(frozen=True, eq=False)
class Conditioned:
    """Paths given what was seen, with weights.

    Attributes:
        t: The times of the grid, (N + 1,).
        x: The states, (N + 1, n, *shape); the last alone, (1, n, *shape), where none were kept.
        dw: The increments as the chain sees them, (N, n, *noise shape); None where not kept.
        log_weights: Log w, (n,) in float64.
        y: What was seen, (n, k).
        missed: How far each path is from it, (n,): the largest |H x - y|, or 1 for an event that
            did not happen.
        estimates: Whether the mean of w estimates p(y | x_0): one start and one value for all.
    """

    t: Tensor
    x: Tensor
    dw: Tensor | None
    log_weights: Tensor
    y: Tensor
    missed: Tensor
    estimates: bool

    @property
    def end(self) -> State:
        """The last states, (n, *shape)."""
        return self.x[-1]

    @property
    def path(self) -> Path:
        """The same as what `solve` returns."""
        return Path(self.t, self.x, self.dw)

    @property
    def ess(self) -> float:
        """The effective number of paths, (Σ w)² / Σ w²."""
        return effective_sample_size(self.log_weights)

    @property
    def log_density(self) -> LogMean:
        """Log p(Y = y | X_0 = x_0) of the chain, with its standard error.

        Raises:
            KakusanError: If the paths differ in start or value, their weights were spent in
                drawing from them, or `Free` paths were to meet a singular event.
        """
        if not self.estimates:
            raise KakusanError(
                "the mean weight is p(y | x_0) where all paths share one start and one value, "
                "meet it, and have not been resampled; these do not"
            )
        return log_mean_exp(self.log_weights)

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Expectation:
        """The mean of f(X) given what was seen.

        Paths of a run with `resample` have common ancestors, which the standard error does not
        know.

        Arguments:
            f: A function from the states that were kept, (N + 1, n, *shape), to (n, ...).
        """
        values = torch.as_tensor(f(self.x))
        if values.ndim < 1 or len(values) != len(self.log_weights):
            raise KakusanError(
                f"f gives one value a path, ({len(self.log_weights)}, ...), got shape "
                f"{tuple(values.shape)}"
            )
        w = self.log_weights.softmax(0).to(values.device)
        w = w.reshape(-1, *(1,) * (values.ndim - 1))
        mean = (w * values.double()).sum(0)
        error = (w * (values.double() - mean)).square().sum(0).sqrt()
        # one path that counts says nothing of its error
        more = (self.ess / (self.ess - 1)) ** 0.5 if self.ess > 1 + 1e-9 else math.inf
        return Expectation(mean, error * more if more < math.inf else error + math.inf, self.ess)

    def resampled(self, seed: int = 0) -> Conditioned:
        """As many paths of equal weight, drawn from these by their weights (systematically)."""
        a = systematic(self.log_weights, generator(seed, RESAMPLED, device=self.x.device))
        return replace(
            self,
            x=self.x[:, a],
            dw=None if self.dw is None else self.dw[:, a],
            log_weights=torch.zeros_like(self.log_weights),
            y=self.y[a],
            missed=self.missed[a],
            estimates=False,
        )


def conditioned(
    steps: GaussianSteps,
    x: State,
    tilt: Tilt,
    observation: Observation,
    y: Tensor,
    *,
    noise: Noise | None = None,
    end: End | None = None,
    resample: float = 0.0,
    keep: bool = True,
    on_step: Callable[[int, Time, State], None] | None = None,
) -> Conditioned:
    """Paths of a chain given what is seen of them, with importance weights.

    Gradients flow through states and weights: draw under `torch.no_grad()` where none are wanted.

    Arguments:
        steps: The chain.
        x: States at steps.grid[0], (n, *shape).
        tilt: What pulls paths to y; `Untilted` leaves all to the last step and the weights.
        observation: What is seen.
        y: The value seen, (n, k), or (1, k) for all paths.
        noise: Where increments come from; fresh numbers by default.
        end: How paths come to y; `Pinned()` by default.
        resample: Where the effective number of paths falls below this share of n, paths are
            drawn anew by weight times h (a twisted particle filter, which keeps the mean weight
            unbiased). 0 never does; it takes one start, one value, and a tilt that knows log h.
        keep: Whether to keep states and increments.
        on_step: Called with (index, time, state) after steps.

    Raises:
        KakusanError: If shapes or times do not fit, the process has no noise, or states stop
            being finite or leave the domain.
        NotElliptic: If noise does not reach what is seen.

    Example:
        >>> from kakusan import Brownian, Fresh, grids
        >>> from kakusan.inference.conditioning.tilts import Untilted
        >>> brownian, start = Brownian(), torch.zeros(4000, 1, dtype=torch.float64)
        >>> steps = EulerSteps(brownian, grids.uniform(0.0, 1.0, 2))
        >>> y = torch.ones(1, 1)
        >>> paths = conditioned(
        ...     steps, start, Untilted(brownian), Terminal(), y, noise=Fresh(0))
        >>> bool((paths.end == 1.0).all())
        True
        >>> round(paths.log_density.value, 1)  # log N(1; 0, 1)
        -1.4
        >>> round(paths.expectation(lambda x: x[1]).value.item(), 1)  # half way at half time
        0.5
    """
    x, y, seen = _checked(steps, x, observation, y)
    end = end or Pinned()
    alike = bool((x == x[:1]).all() and (y == y[:1]).all())
    if not 0 <= resample < 1:
        raise KakusanError(f"resample is a share in [0, 1), got {resample}")
    if resample and not alike:
        raise KakusanError(
            "paths are resampled among one start and one value, and these differ: resample=0"
        )
    run = _Run(steps, tilt.along(steps), y, noise or Fresh(), end, seen, keep, on_step, x)
    found, k = end.finishes(steps, x, seen), 0
    while k < len(steps):
        if resample and k:
            run.resample(k, resample)
        if k in found:
            run.finish(found[k], _part(seen, found[k].at))
            k = found[k].at
        else:
            run.step(k)
            k += 1
    singular = any(isinstance(s.what, Linear) and not s.what.std for s in seen)
    return run.result(estimates=alike and not (singular and isinstance(end, Free)))


@dataclass
class _Run:
    """Paths on their way."""

    steps: GaussianSteps
    tilt: Tilt
    y: Tensor
    noise: Noise
    end: End
    seen: list[Seen]
    keep: bool
    on_step: Callable[[int, Time, State], None] | None
    x: State
    dw: list[Tensor] = field(default_factory=list)
    ancestors: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.x)
        self.points, self.times = self.steps.grid.unbind(), self.steps.grid.tolist()
        self.shape = self.steps.noise_shape(self.x)
        self.log_w = torch.zeros(n, dtype=torch.float64, device=self.x.device)
        self.missed = torch.zeros_like(self.log_w)
        self.good = torch.zeros(n, dtype=torch.long, device=self.x.device)
        self.kept, self.pinned = [self.x], set()

    def increment(self, k: int) -> Tensor:
        t, s = self.times[k], self.times[k + 1]
        return self.noise.increment(k, t, s, self.shape, self.x)

    def step(self, k: int) -> None:
        """Step k of the tilted chain."""
        c = self.tilt.control(self.x, self.points[k], self.y)
        if c.shape != self.shape:
            raise KakusanError(
                f"the control of {type(self.tilt).__name__} is {tuple(c.shape)}, and the noise of "
                f"the chain {self.shape}: both must be of one process"
            )
        h, db = self.steps.h(k), self.increment(k)
        seen = next((s for s in self.seen if s.at > k), None)
        narrow, log_s = self.end.narrowed(self.steps, k, self.x, seen, self.tilt, db)
        dw = h * c.to(db) + narrow
        # |db|² - |dw|², where most of both cancels
        term = ((db - dw) * (db + dw)).double().flatten(1).sum(1) / (2 * h)
        self.log_w = self.log_w + term + log_s
        self.arrive(k, self.steps.after(self.x, k, dw), dw)

    def finish(self, finish: Finish, seen: Seen) -> None:
        """The steps that meet what is seen."""
        free = [self.increment(k) for k in range(finish.first, finish.at)]
        self.check(finish.first)
        y, eps = self.y[:, seen.rows], 0.0
        if finish.what.std:
            # a number of its own, after those of all steps
            eps = self.noise.normal(len(self.steps) + finish.at, tuple(y.shape), self.x)
        landed = finish.land(self.x, y, free, eps)
        self.log_w = self.log_w + landed.log_p
        self.pinned.add(finish.at)
        for k, (x, dw) in enumerate(zip(landed.x, landed.dw, strict=True), start=finish.first):
            self.arrive(k, x, dw)

    def arrive(self, k: int, x: State, dw: Tensor) -> None:
        """Keeps, shows and weighs the state after step k."""
        self.x = x
        for at, what, rows in self.seen:
            if at == k + 1:
                self.see(what, self.y[:, rows], pinned=at in self.pinned)
        # counts the steps before the first bad one, and waits for no device
        good = x.flatten(1).isfinite().all(1) & ~self.log_w.isnan()
        self.good = self.good + (good & (self.good == k))
        if self.keep:
            self.kept.append(x)
            self.dw.append(dw)
        if self.on_step is not None:
            self.on_step(k, self.points[k + 1], x)

    def see(self, what: Observation, y: Tensor, pinned: bool) -> None:
        """How far the state is from what was seen, and its likelihood where it was not pinned."""
        if isinstance(what, Linear):
            gap = (what.forward(self.x) - y).double().norm(dim=1)
            weigh = bool(what.std) and not pinned
        else:
            gap, weigh = torch.zeros_like(self.log_w), True
        if weigh:
            log_p = what.log_likelihood(y, self.x).double()
            gap = torch.where(log_p == -math.inf, 1.0, gap)
            self.log_w = self.log_w + log_p
        self.missed = torch.maximum(self.missed, gap.detach())

    def resample(self, k: int, share: float) -> None:
        """Draws paths by w h(x_k), and leaves each the weight that keeps all means."""
        log_h = self.tilt.log_h(self.x, self.points[k], self.y).double()
        twisted = self.log_w + log_h
        if twisted.isnan().any():
            self.check(k)
        if effective_sample_size(twisted) >= share * len(twisted):
            return
        a = systematic(twisted, self.noise.generator(k, self.x.device))
        self.log_w = twisted.logsumexp(0) - math.log(len(a)) - log_h[a]
        self.x, self.missed, self.good = self.x[a], self.missed[a], self.good[a]
        self.ancestors[k] = a
        if self.keep:
            self.kept[k], self.dw[k - 1] = self.kept[k][a], self.dw[k - 1][a]

    def check(self, k: int) -> None:
        """Refuses paths that were not finite at all of the first k steps."""
        lost = self.good < k
        if lost.any():
            i = int(lost.nonzero()[0])
            at = int(self.good[i]) + 1
            raise KakusanError(
                f"path {i} of {len(lost)} is no longer finite after step {at} of "
                f"{len(self.steps)}, at t={self.times[at]:g}: take smaller steps, or a tilt "
                "that pulls less"
            )

    def result(self, estimates: bool) -> Conditioned:
        """The paths, once they are found to be good."""
        self.check(len(self.steps))
        states = self.traced() if self.keep else [self.x]
        _check_inside(self.steps, states, self.times[-len(states) :])
        t, x = self.steps.grid, torch.stack(states)
        dw = torch.stack(self.dw) if self.keep else None
        return Conditioned(t, x, dw, self.log_w, self.y, self.missed, estimates)

    def traced(self) -> list[State]:
        """The states that led to the last ones."""
        a: Tensor | None = None
        for k in reversed(range(len(self.steps))):
            if k + 1 in self.ancestors:
                b = self.ancestors[k + 1]
                a = b if a is None else b[a]
            if a is not None:
                self.kept[k] = self.kept[k][a]
                if k:
                    self.dw[k - 1] = self.dw[k - 1][a]
        return self.kept


def systematic(log_w: Tensor, source: torch.Generator) -> Tensor:
    """Indices drawn by weight, (n,), with one random number: each within one of n w / Σ w times.

    Example:
        >>> systematic(torch.tensor([0.0, 0.0, -800.0, 0.0]).double(), generator(0)).tolist()
        [0, 1, 1, 3]
    """
    n = len(log_w)
    u = torch.rand((), generator=source, dtype=torch.float64, device=log_w.device)
    at = (torch.arange(n, device=log_w.device) + u) / n
    edges = log_w.detach().double().softmax(0).cumsum(0)
    return torch.searchsorted(edges / edges[-1], at, right=True).clamp_(max=n - 1)


# --- the door: what is refused, and in which words


def _checked(
    steps: GaussianSteps, x: State, observation: Observation, y: Tensor
) -> tuple[State, Tensor, list[Seen]]:
    if not x.is_floating_point() or x.ndim < 2:
        raise KakusanError(
            f"states are floating-point tensors of shape (n, *shape), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    # forward-mode derivatives refuse expanded tensors, so the state owns its memory
    x, y = x.contiguous(), observation.value(y, x)
    if steps.operator(x, 0).deterministic:
        raise KakusanError(
            "a tilt moves an SDE by its noise, and an ODE has none: condition the process itself"
        )
    seen = placed(steps, observation)
    for at, what, rows in seen:
        if isinstance(what, Terminal):
            outside = ~steps.inside(y[:, rows].reshape(x.shape))
            if outside.any():
                i = int(outside.nonzero()[0])
                raise KakusanError(
                    f"y = {y[i, rows].tolist()[:6]}, to be reached at "
                    f"t={steps.grid[at].item():g}, is outside the domain of the process"
                    f"{_domain(steps)}, and no path gets there"
                )
    return x, y, seen


def _part(seen: Sequence[Seen], at: int) -> Seen:
    return next(s for s in seen if s.at == at)


def _domain(steps: GaussianSteps) -> str:
    words = steps.sde.domain if isinstance(steps, EulerSteps) else ""
    return f", {words}" if words else ""


def _check_inside(steps: GaussianSteps, states: Sequence[State], times: Sequence[float]) -> None:
    outside = ~torch.stack([steps.inside(x) for x in states])
    if outside.any():
        i = int(outside.any(0).nonzero()[0])
        k = int(outside[:, i].nonzero()[0])
        raise KakusanError(
            f"path {i} of {outside.shape[1]} left the domain of the process{_domain(steps)}: it "
            f"is at {states[k][i].flatten().tolist()[:6]} at t={times[k]:g}; take smaller steps"
        )
