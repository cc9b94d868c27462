r"""Steps as long as a tolerance allows, for each sample on its own.

A step of a method here goes from one time of the grid to the next in as many steps of its own as
each sample needs, so a grid says where states are wanted, not how they are found. What becomes of
a sample is a function of that sample alone, bit for bit, where the fields act on each by itself:
errors are measured by maxima over its coordinates, which no order of summation touches.

`DormandPrince` is for ODEs. With the stages k_i of the pair of orders 5 and 4, the error of a step
is estimated by e = h Σ (b_i - b*_i) k_i and accepted where

.. math:: r = \max_j |e_j| / (a + \rho \max(|x_j|, |x'_j|)) \le 1,

with a = `atol` and ρ = `rtol`; the next is h · 0.9 r^-0.17 r'^0.04 long, where r' is the ratio of
the step before (Hairer's constants of a proportional-integral controller).

`Bisection` is for SDEs on a path that can be asked about at any time. From the state x at the
start of a step of length h it tries the whole and two halves, and takes the halves where the two
differ by no more than

.. math:: (a + \rho |x_j|) \sqrt{h / T},

T the length of the grid; else it bisects. A method of strong order p leaves errors of size
h^(p + 1/2) and mean near zero, which add up like a random walk: so h^p, and with it the error at
T, is proportional to the tolerance.

The trial is made on increments of the size of true ones that are on no path. Were it made on the
path itself, steps would be chosen by where the path goes: long ones where errors happen to cancel,
and Euler's steps of geometric Brownian motion then tend to something else than the solution, 5%
too large where we measured it, the more so the smaller the tolerance (Gaines and Lyons warn of it;
nested steps and Stratonovich methods escape, say Foster and Jelinčič). A length that is known
before the step is taken leaves the theory of fixed steps as it is, for every method. Trials may
err in turn, the more rarely the smaller the tolerance, so a step whose true error is beyond 16
times the tolerance is halved as well: that is too far out in the tails to choose paths by.

References:
    Solving ordinary differential equations I (Hairer, Nørsett, Wanner, 1993), sections II.4, II.5
    Variable step size control for SDEs (Gaines, Lyons, 1997), doi 10.1137/S0036139995286515
    Convergence of adaptive approximations for SDEs (Foster, Jelinčič, 2023), arXiv 2311.14201
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.bridge import Bridge
from kakusan.core.noise import Wants
from kakusan.core.types import State, Time, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.flow import Integrating
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import EulerMaruyama, Method

# Dormand and Prince's coefficients: times, stages, the step, and its difference to the other
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

_WILD = 16.0  # so many tolerances is no error a trial would have let through


@dataclass
class Tally:
    """What a run of `DormandPrince` took: give it one, and read it afterwards.

    Attributes:
        evaluations: How often the drift was called, each time for the whole batch.
        accepted: Steps of each sample, (B,).
        rejected: Attempts of each sample that were too long, (B,).
        error: The sum over its steps of the estimated error of each number, like the state.
    """

    evaluations: int = 0
    accepted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    rejected: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    error: Tensor = field(default_factory=lambda: torch.zeros(0))


class Pace(NamedTuple):
    """What `DormandPrince` remembers of each sample; nothing before its first step.

    Attributes:
        h: The length of the next step, (B,).
        k: The drift at the state, which the last step evaluated.
        r: The ratio of error to tolerance of the last step, (B,).
    """

    h: Tensor
    k: State
    r: Tensor


class _Attempt(NamedTuple):
    x: State
    k: State
    error: State


class DormandPrince(Method):
    """The pair of orders 5 and 4 of Dormand and Prince, one step size a sample; for ODEs.

    The drift is called with times of shape (B,), always for the whole batch, never outside of the
    step of the grid. A step that meets infinities is tried again shorter. Gradients flow through
    the steps that were accepted, whose lengths count as given.

    Arguments:
        rtol: The error a step may make, relative to the state.
        atol: The error it may make beside that, > 0.
        max_steps: How many attempts a sample has between two times of the grid.
        tally: Counts evaluations and steps; it starts anew with each run.

    Example:
        >>> from kakusan.core.operators import Zero
        >>> from kakusan.solvers.solve import solve
        >>> decay = SDE.of(lambda x, t: -per_sample(t, x) * x, Zero())
        >>> x, tally = torch.ones(2, 1, dtype=torch.float64), Tally()
        >>> solve(decay, x, torch.tensor([0.0, 2.0]), DormandPrince(tally=tally)).end
        tensor([[0.1353],
                [0.1353]], dtype=torch.float64)
        >>> tally.evaluations, tally.accepted
        (86, tensor([12, 12]))
    """

    def __init__(
        self,
        rtol: float = 1e-6,
        atol: float = 1e-6,
        max_steps: int = 10_000,
        tally: Tally | None = None,
    ) -> None:
        _check_tolerances(rtol, atol)
        if max_steps < 1:
            raise KakusanError(f"a sample needs at least one attempt, got max_steps={max_steps}")
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps
        self.tally = tally or Tally()

    def init(self, sde: SDE, x: State, grid: Tensor) -> tuple[()]:
        """Nothing yet: the first step measures the drift."""
        if not sde.diffusion(x, grid[0]).deterministic:
            raise KakusanError(
                "DormandPrince is for ODEs, and this process has noise; Bisection(method) adapts "
                "the steps of an SDE, and probability_flow(sde, score) is an ODE"
            )
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.tally.evaluations, self.tally.accepted, self.tally.rejected = 0, none, none
        self.tally.error = torch.zeros_like(x)
        return ()

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Any, state: Any
    ) -> tuple[State, Pace]:
        """From t to s, each sample in its own steps."""
        now, end = (u.to(x.device).expand(len(x)) for u in (t, s))
        pace = state or self._start(sde, x, now, end)
        for _ in range(self.max_steps):
            short = (now != end) & (now + torch.copysign(pace.h, end - now) == now)
            if (now == end).all() or short.any():
                break
            x, now, pace = self._once(sde, x, now, end, pace)
        if (now != end).any():
            raise KakusanError(self._late(now, end, pace))
        return x, pace

    def _once(
        self, sde: SDE, x: State, now: Tensor, end: Tensor, pace: Pace
    ) -> tuple[State, Tensor, Pace]:
        """One attempt of every sample; those at the end stay there, with a step of length 0."""
        left = (end - now).abs()
        # the last two steps alike: a step of what happens to be left would waste one
        length = torch.where(pace.h >= left, left, torch.minimum(pace.h, left / 2))
        then = torch.where(pace.h >= left, end, now + torch.copysign(length, end - now))
        to = self._attempt(sde, x, now, then, pace.k)
        r = self._ratio(to, x)
        live, good = now != end, r <= 1
        moved = live & good
        if to.x.requires_grad and not good.all():
            # zero times the derivative of a NaN is NaN: those who stay take a step of length 0
            to = self._attempt(sde, x, now, torch.where(moved, then, now), pace.k)
        self.tally.accepted = self.tally.accepted + moved
        self.tally.rejected = self.tally.rejected + (live & ~good)
        error = to.error.detach().abs()
        self.tally.error = torch.where(_mask(moved, x), self.tally.error + error, self.tally.error)
        h = length * self._factor(r, pace.r, good)
        # a step cut short by the grid says nothing against the length that was planned
        h = torch.where(moved & (length < pace.h), torch.maximum(h, pace.h), h)
        pick, then = _mask(moved, x), torch.where(moved, then, now)
        pace = Pace(
            torch.where(live, h, pace.h),
            torch.where(pick, to.k, pace.k),
            torch.where(moved, r.clamp(min=1e-4), pace.r),
        )
        return torch.where(pick, to.x, x), then, pace

    def _attempt(self, sde: SDE, x: State, now: Tensor, then: Tensor, k: State) -> _Attempt:
        stages, h, beside = [k], then - now, per_sample(then - now, x)
        for c, a in zip(_C, _A, strict=True):
            u = then if c == 1 else now + c * h
            # the second stage has no weight but in other stages: integrals can do without
            drift = self._motion if len(stages) == 1 else self._drift
            stages.append(drift(sde, x + beside * _sum(a, stages), u))
        x_then = x + beside * _sum(_B, stages)
        stages.append(self._drift(sde, x_then, then))
        return _Attempt(x_then, stages[-1], beside * _sum(_E, stages))

    def _drift(self, sde: SDE, x: State, t: Tensor) -> State:
        self.tally.evaluations += 1
        return sde.drift(x, t)

    def _motion(self, sde: SDE, x: State, t: Tensor) -> State:
        """The drift without that of integrals."""
        if not isinstance(sde, Integrating):
            return self._drift(sde, x, t)
        self.tally.evaluations += 1
        return sde.motion(x, t)

    @torch.no_grad()
    def _ratio(self, to: _Attempt, x: State) -> Tensor:
        """The error over the tolerance, (B,); NaN or infinite where the attempt was."""
        scale = self.atol + self.rtol * torch.maximum(x.abs(), to.x.abs())
        r = (to.error.abs() / scale).flatten(1).amax(1).double()
        # an infinite state has an infinite scale, and so no error
        return torch.where(scale.flatten(1).amax(1).isfinite(), r, torch.inf)

    @staticmethod
    def _factor(r: Tensor, before: Tensor, good: Tensor) -> Tensor:
        """How much longer the next step is."""
        plain = 0.9 * r.clamp(min=1e-10) ** -0.17
        return torch.where(
            good,
            (plain * before**0.04).clamp(0.2, 10.0),
            plain.nan_to_num(0.2).clamp(0.2, 1.0),
        )

    @torch.no_grad()
    def _first_length(self, sde: SDE, x: State, now: Tensor, end: Tensor, k: State) -> Tensor:
        """Hairer's guess, from the size of the drift and of its derivative, and bolder.

        He has 0.01 for 1: but too long is found out, where too short a first step costs another.
        """
        scale, left = self.atol + self.rtol * x.abs(), (end - now).abs()
        # integrals are zero at first, so their drift, over that, says nothing
        moving = slice(sde.moving) if isinstance(sde, Integrating) else slice(None)

        def size(v: State) -> Tensor:
            return (v.abs() / scale)[:, moving].flatten(1).amax(1).double()

        d0, d1 = size(x), size(k)
        h = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h = torch.where(h < left, h, left)
        then = torch.where(h < left, now + torch.copysign(h, end - now), end)
        bent = self._motion(sde, x + per_sample(then - now, x) * k, then) - k
        most = torch.maximum(d1, size(bent) / h)
        guess = torch.where(most <= 1e-15, (h * 1e-3).clamp(min=1e-6), (1 / most) ** 0.2)
        guess = torch.minimum(100 * h, guess)
        return torch.where(guess > 0, guess, h)  # NaN is not > 0

    def _start(self, sde: SDE, x: State, now: Tensor, end: Tensor) -> Pace:
        k = self._drift(sde, x, now)
        h = self._first_length(sde, x, now, end, k)
        return Pace(h, k, torch.full_like(h, 1e-4))

    def _late(self, now: Tensor, end: Tensor, pace: Pace) -> str:
        i = int((now != end).nonzero()[0])
        return (
            f"sample {i} of {len(now)} did not get to t={end[i]:g} in {self.max_steps} steps of "
            f"DormandPrince(rtol={self.rtol:g}, atol={self.atol:g}): it reached t={now[i]:g}, "
            f"where steps are {pace.h[i]:.1e} long; the drift is stiff or infinite there, or the "
            "tolerance too small"
        )


class Bisection(Method):
    """Another method in steps halved where that matters, each sample on its own; for SDEs.

    The path must be one that can be asked about at any time, as `Counter` is. Samples whose step
    must be halved go on without the others, so drift and diffusion must act on each sample by
    itself, whichever are with it. rtol and atol are for the path as a whole: the error at its end
    is about that large. For a pair of halves that is kept, the method steps some fifteen times:
    this pays where the length of steps must vary much.

    Arguments:
        method: How to step: any method that wants increments or areas and remembers no steps.
        rtol: The error of the path, relative to the state.
        atol: The error beside that, > 0.
        max_depth: How often a step of the grid may be halved.

    Example:
        >>> from kakusan.core.counter import Counter
        >>> from kakusan.core.operators import Scale
        >>> from kakusan.solvers.solve import solve
        >>> well = SDE.of(lambda x, t: x - x**3, Scale(0.5), span=(0.0, 1.0))
        >>> x, grid = torch.tensor([[0.0], [9.0]]).double(), torch.tensor([0.0, 1.0])
        >>> solve(well, x, grid, Bisection(rtol=0.1, atol=0.1), Counter(0, cell=1.0)).end
        tensor([[0.4293],
                [0.8273]], dtype=torch.float64)
    """

    wants = Wants.BRIDGE

    def __init__(
        self,
        method: Method | None = None,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        max_depth: int = 20,
    ) -> None:
        _check_tolerances(rtol, atol)
        if max_depth < 1:
            raise KakusanError(f"max_depth must be at least 1, got {max_depth}")
        self.method = method or EulerMaruyama()
        self.stratonovich = self.method.stratonovich
        self.rtol, self.atol, self.max_depth = rtol, atol, max_depth

    def init(self, sde: SDE, x: State, grid: Tensor) -> _Plan:
        """The length of the grid; refuses methods that cannot be halved."""
        name = type(self.method).__name__
        if sde.diffusion(x, grid[0]).deterministic:
            raise KakusanError(
                "Bisection is for SDEs, and this process has no noise; DormandPrince() adapts the "
                "steps of an ODE"
            )
        if self.method.wants not in (Wants.INCREMENT, Wants.AREA):
            raise KakusanError(
                f"Bisection halves the path, which has increments and areas; {name} wants "
                f"{self.method.wants.value}"
            )
        return _Plan(abs(grid[-1] - grid[0]).item(), self.method.init(sde, x, grid))

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Bridge, state: _Plan
    ) -> tuple[State, _Plan]:
        """From t to s, each sample in as many halvings as it needs."""
        everyone = torch.arange(len(x), device=x.device)
        return self._over(sde, x, _Step(t, s, dw, everyone), state), state

    def _over(self, sde: SDE, x: State, step: _Step, plan: _Plan, depth: int = 0) -> State:
        """The states at the end of a step."""
        far, y = self._far(sde, x, step, plan), x
        if not far.all():
            good = (~far).nonzero()[:, 0]
            z, wild = self._halved(sde, x[good], step.of(good), plan)
            if wild.any():
                far, good = far.index_copy(0, good, wild), good[~wild]
                # again without the others: zero times the derivative of a NaN is NaN
                z, _ = self._halved(sde, x[good], step.of(good), plan)
            y = y.index_copy(0, good, z)
        if not far.any():
            return y
        where = far.nonzero()[:, 0]
        if depth == self.max_depth:
            raise KakusanError(self._deep(step.of(where), x[where]))
        z = x[where]
        for part in step.of(where).halves():
            z = self._over(sde, z, part, plan, depth + 1)
        return y.index_copy(0, where, z)

    @torch.no_grad()
    def _far(self, sde: SDE, x: State, step: _Step, plan: _Plan) -> Tensor:
        """Where one step and two halves lead to different states, on paths of no consequence."""
        both, (whole, early, late) = torch.cat([x, x]), step.path.imagined()
        m = (step.t + step.s) / 2
        half = self._step(sde, both, step.t, m, early, plan)
        fine = self._step(sde, half, m, step.s, late, plan)
        error = fine - self._step(sde, both, step.t, step.s, whole, plan)
        return ~(self._ratio(error, both, whole, plan) <= 1).reshape(2, -1).all(0)

    def _halved(self, sde: SDE, x: State, step: _Step, plan: _Plan) -> tuple[State, Tensor]:
        """The states after two halves, and where the trial was wrong about their error."""
        y = x
        for half in step.halves():
            y = self._step(sde, y, half.t, half.s, half.path, plan)
        with torch.no_grad():
            error = y - self._step(sde, x, step.t, step.s, step.path, plan)
            return y, ~(self._ratio(error, x, step.path, plan) <= _WILD)

    def _ratio(self, error: State, x: State, path: Bridge, plan: _Plan) -> Tensor:
        """Errors over the tolerance of a step, (n,)."""
        # of the state before the step: one after it knows the noise
        share = (abs(path.s - path.t) / plan.length) ** 0.5
        return (error.abs() / ((self.atol + self.rtol * x.abs()) * share)).flatten(1).amax(1)

    def _step(self, sde: SDE, x: State, t: Time, s: Time, path: Bridge, plan: _Plan) -> State:
        dw = path.want(self.method.wants)
        x, memory = self.method.step(sde, x, t, s, dw, plan.memory)
        if memory is not plan.memory:
            raise KakusanError(
                f"Bisection tries steps and takes them back, and {type(self.method).__name__} "
                "remembers each; EulerMaruyama() and Heun() do not"
            )
        return x

    def _deep(self, step: _Step, x: State) -> str:
        numbers = ", ".join(f"{v:.6g}" for v in x[0].flatten().tolist()[:6])
        return (
            f"sample {int(step.samples[0])} does not meet the tolerance of Bisection(rtol="
            f"{self.rtol:g}, atol={self.atol:g}) at t={step.path.t:g}, where the step has been "
            f"halved {self.max_depth} times to {abs(step.path.s - step.path.t):.1e}; its state "
            f"was [{numbers}{', ...' if x[0].numel() > 6 else ''}]; take a larger tolerance, or a "
            "larger max_depth"
        )


class _Plan(NamedTuple):
    """The length of the grid, and what the method found out before its first step."""

    length: float
    memory: Any


class _Step(NamedTuple):
    """A step of some samples: its ends, the path over it, and which samples of the batch."""

    t: Time
    s: Time
    path: Bridge
    samples: Tensor

    def of(self, which: Tensor) -> _Step:
        return self._replace(path=self.path.of(which), samples=self.samples[which])

    def halves(self) -> tuple[_Step, _Step]:
        (early, late), m = self.path.halves(), (self.t + self.s) / 2
        return self._replace(s=m, path=early), self._replace(t=m, path=late)


def _check_tolerances(rtol: float, atol: float) -> None:
    if not (rtol >= 0 and atol > 0):
        raise KakusanError(f"tolerances are rtol >= 0 and atol > 0, got {rtol} and {atol}")


def _mask(which: Tensor, x: State) -> Tensor:
    return which.reshape(-1, *(1,) * (x.ndim - 1))


def _sum(weights: tuple[float, ...], stages: list[State]) -> State:
    """Σ weights_i stages_i."""
    total = stages[0] * weights[0]
    for w, k in zip(weights[1:], stages[1:], strict=True):
        total = torch.add(total, k, alpha=w) if w else total
    return total
