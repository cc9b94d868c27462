r"""Langevin sampling: a target that is known by its score.

The process dX = s(X) dt + sqrt(2) dW with s = ∇log p settles in p, so every step of `solve` on it
is a sampler, and no loop of its own is needed here. With steps of size ε,

.. math:: x' = x + \epsilon s(x) + \sqrt{2 \epsilon} \, z

is Euler's step, the unadjusted sampler. Its stationary law is p only as ε → 0: for a target
N(0, v) it is N(0, v / (1 - ε / 2v)). Two steps do better:

`MALA` takes Euler's step from x to y as a proposal and accepts it with the probability

.. math:: \min(1, e^r), \qquad
          r = \log\frac{p(y)\, q(x \mid y)}{p(x)\, q(y \mid x)}, \qquad
          q(y \mid x) = N(y;\ x + f(x) h,\ G(x) G(x)^\top h) .

Then p is stationary for every ε: the step only has to be small enough to be accepted. Nothing in r
asks for a gradient drift or a constant G, so `MALA` adjusts any process that knows its
`log_stationary` and whose G has an inverse. It adapts one step size a chain, never the average of
a batch, so that chain i does not depend on its batch mates: in the warm-up, with a_k the
probability of acceptance in step k and c the target,

.. math:: \log\epsilon_{k+1} = \log\epsilon_k + (k + 1)^{-0.6} \, \frac{a_k - c}{2 c (1 - c)}

(Robbins and Monro), and then stays at the average over the last half of the warm-up (Polyak). In
high dimension 0.574 is the best acceptance rate.

`BAOAB` is for motion with inertia, `Underdamped`: half a kick of the force, half a drift of
position, the exact Ornstein-Uhlenbeck step of the momentum, half a drift, half a kick. In a
quadratic energy the positions have exactly the right law at every step that is stable, and the
momenta the variance m T (1 - h² k / 4m); with any energy the error is of order h².

`langevin` is for most targets, `kinetic_langevin` where mixing is slow, `MALA` and `BAOAB` in
`solve` for processes of one's own. Annealing and the corrector are in `solvers.corrector`.

References:
    Exponential convergence of Langevin distributions and their discrete approximations
        (Roberts and Tweedie, 1996), doi 10.2307/3318418
    Optimal scaling of discrete approximations to Langevin diffusions
        (Roberts and Rosenthal, 1998), doi 10.1111/1467-9868.00123
    Rational construction of stochastic numerical methods for molecular sampling
        (Leimkuhler and Matthews, 2013), doi 10.1093/amrx/abs010
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core import grids
from kakusan.core.noise import Noise, Wants
from kakusan.core.operators import NotElliptic, Operator, Scale
from kakusan.core.types import State, Time, as_time, elapsed, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.processes.zoo.mechanics import Underdamped, gradient
from kakusan.processes.zoo.parameters import count, filled, parameter
from kakusan.solvers.solve import EulerMaruyama, Method, solve


class Chain(NamedTuple):
    """What a Langevin sampler returns.

    Attributes:
        x: The last states, (B, *shape).
        acceptance: The share of steps after the warm-up that were taken, (B,).
        size: The step size of each chain after the warm-up, (B,).
        trace: States after the warm-up, (n, B, *shape), where they were kept.
    """

    x: State
    acceptance: Tensor
    size: Tensor
    trace: Tensor | None


def second_normal(dw: tuple[Tensor, Tensor], h: Any) -> Tensor:
    """Unit normals independent of the increment w, from w and the area z = h (w + y/√3) / 2."""
    w, z = dw
    return (2 * z / abs(h) - w) * math.sqrt(3) / abs(h) ** 0.5


# --- Metropolis' adjustment


@dataclass
class Acceptance:
    """What a run of `MALA` did: give it one, and read it afterwards.

    Attributes:
        rate: The share of steps after the warm-up that each chain took, (B,).
        factor: What each chain multiplies the steps of the grid by, (B,).
    """

    rate: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    factor: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.float64))


class Point(NamedTuple):
    """A state, and what the adjustment asks of it: its drift, and the log density of its law."""

    x: State
    f: State
    log_p: Tensor


def log_ratio(here: Point, there: Point, G: tuple[Operator, Operator], h: Tensor) -> Tensor:
    r"""log[p(y) q(x|y)] - log[p(x) q(y|x)] for Euler's steps of length h from x to y, (B,).

    Arguments:
        here: The state x.
        there: The state y.
        G: The operators at x and at y.
        h: The length of the step of each chain, (B,).
    """
    back, forth = _log_q(there, here.x, G[1], h), _log_q(here, there.x, G[0], h)
    return there.log_p + back - here.log_p - forth


def _log_q(a: Point, x: State, G: Operator, h: Tensor) -> Tensor:
    """The log density of Euler's step from a to x, but for a constant."""
    z = G.solve(x - a.x - per_sample(h, x) * a.f)
    return -z.double().square().flatten(1).sum(1) / (2 * h) - G.logabsdet(a.x).double()


class _Walk(NamedTuple):
    """What `MALA` remembers: the step, where it stands, step sizes and their sum, acceptances."""

    k: int
    here: Point
    log_factor: Tensor
    total: Tensor
    taken: Tensor


class MALA(Method):
    """Euler-Maruyama with Metropolis' adjustment: the stationary law of the process, exactly.

    The law is meant, not the paths. For processes with a `log_stationary` and an invertible G.

    Arguments:
        target: The acceptance rate that the warm-up steers at.
        warmup: For how many steps each chain adapts its factor of the steps of the grid, from 1.
        report: Where acceptance and factors are written.

    Example:
        >>> from kakusan import DoubleWell, Fresh
        >>> well, x, report = DoubleWell(v=1.0), torch.ones(500, 1), Acceptance()
        >>> grid = grids.uniform(0.0, 60.0, 300)
        >>> x = solve(well, x, grid, MALA(warmup=150, report=report), Fresh(0)).end
        >>> bool(abs(x.mean()) < 0.2), round(report.rate.mean().item(), 1)
        (True, 0.6)
    """

    wants = Wants.AREA

    def __init__(
        self, target: float = 0.574, warmup: int = 0, report: Acceptance | None = None
    ) -> None:
        self.target = parameter("the acceptance target", target, above=0.0, below=1.0)
        self.gain = 0.5 / (self.target * (1 - self.target))
        self.warmup = _burn_in(warmup)
        self.report = report or Acceptance()

    def init(self, sde: SDE, x: State, grid: Tensor) -> _Walk:
        """Looks at the starts; refuses processes without a density, and G without inverse."""
        if getattr(sde, "log_stationary", None) is None:
            raise KakusanError(
                f"MALA compares densities, and {type(sde).__name__} has no log_stationary(x): "
                "give langevin a log_density, or take EulerMaruyama, which is not adjusted"
            )
        G, here = sde.diffusion(x, grid[0]), self._look(sde, x, grid[0])
        if not G.logabsdet(x).isfinite().all():
            raise NotElliptic(f"MALA needs noise in every direction, and G, a {type(G).__name__}, "
                              "has no inverse; BAOAB is for Underdamped")  # fmt: skip
        bad = (~here.log_p.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise KakusanError(
                f"chain {i} of {len(x)} starts where the log density is {here.log_p[i].item():g}; "
                "start where the density is positive"
            )
        none = torch.zeros_like(here.log_p)
        self.report.rate, self.report.factor = none, none + 1
        return _Walk(0, here, none, none, none)

    def _look(self, sde: SDE, x: State, t: Time) -> Point:
        log_p = sde.log_stationary(x)  # pyright: ignore[reportAttributeAccessIssue]
        if log_p.shape != x.shape[:1]:
            raise KakusanError(f"a log density gives one number a state, ({len(x)},), got "
                               f"{tuple(log_p.shape)}")  # fmt: skip
        return Point(x, sde.drift(x, t), log_p.double())

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Any, state: _Walk
    ) -> tuple[State, _Walk]:
        """One step: Euler's step of each chain's own length, taken or refused."""
        here, length, factor = state.here, elapsed(t, s), state.log_factor.exp()
        h, G = factor * length, sde.diffusion(x, t)
        stretched = per_sample(factor.sqrt(), x) * dw[0]
        there = self._look(sde, G.kick(x + per_sample(h, x) * here.f, stretched), t)
        r = log_ratio(here, there, (G, sde.diffusion(there.x, t)), h)
        # what is not finite is refused: a chain cannot be lost to one long step
        r = torch.where(r.isfinite() & there.f.flatten(1).isfinite().all(1), r, -math.inf)
        log_u = torch.special.log_ndtr(second_normal(dw, length).flatten(1)[:, 0].double())
        taken = log_u < r
        pairs = zip(here, there, strict=True)
        here = Point(*(torch.where(per_sample(taken, b).bool(), b, a) for a, b in pairs))
        return here.x, self._adapted(state, here, taken.double(), r.clamp(max=0).exp())

    def _adapted(self, state: _Walk, here: Point, taken: Tensor, a: Tensor) -> _Walk:
        """The step size of the next step, and the counts."""
        k, (log_factor, total) = state.k, (state.log_factor, state.total)
        if k < self.warmup:
            log_factor = log_factor + self.gain * (k + 1) ** -0.6 * (a - self.target)
            if 2 * k >= self.warmup:
                total = total + log_factor
            if k + 1 == self.warmup:
                log_factor = total / (self.warmup - (self.warmup + 1) // 2)
        counted = state.taken + taken if k >= self.warmup else state.taken
        self.report.rate = counted / max(k + 1 - self.warmup, 1)
        self.report.factor = log_factor.exp()
        return _Walk(k + 1, here, log_factor, total, counted)


# --- inertia


class BAOAB(Method):
    r"""The splitting of kinetic Langevin dynamics with the best positions, for `Underdamped`.

    .. math:: p \mathrel{+}= \tfrac h2 F(q), \quad q \mathrel{+}= \tfrac h2 p / m, \quad
              p = c p + \sqrt{(1 - c^2) m T}\, z, \quad q \mathrel{+}= \tfrac h2 p / m, \quad
              p \mathrel{+}= \tfrac h2 F(q), \qquad c = e^{-\gamma h}

    Weak order 2, with one evaluation of the force a step: the last is the first of the next step.
    Stable while h < 2 over the largest frequency of the energy.

    Example:
        >>> from kakusan import Fresh, Underdamped
        >>> ball = Underdamped(lambda q: (q**2).sum(1) / 2)
        >>> x = torch.zeros(20_000, 2, dtype=torch.float64)
        >>> end = solve(ball, x, grids.uniform(0.0, 10.0, 10), BAOAB(), Fresh(0)).end
        >>> round(end[:, 0].var().item(), 1)
        1.0
    """

    def init(self, sde: SDE, x: State, grid: Tensor) -> State:
        """The force at the start; refuses other processes."""
        if not isinstance(sde, Underdamped):
            raise KakusanError(
                f"BAOAB steps Underdamped, positions and momenta in an energy, got "
                f"{type(sde).__name__}; EulerMaruyama and MALA step overdamped motion"
            )
        if x.shape[1] % 2:
            raise KakusanError(f"a state holds positions and momenta, (B, 2d), got "
                               f"{tuple(x.shape)}")  # fmt: skip
        return -gradient(sde.energy, x.chunk(2, 1)[0])

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor, state: State
    ) -> tuple[State, State]:
        """One step; the state of the method is the force at the positions."""
        assert isinstance(sde, Underdamped)
        h, F = elapsed(t, s), state
        q, p = x.chunk(2, 1)
        m, T = filled(sde.mass, x), filled(sde.temperature, x)
        c = torch.exp(-filled(sde.friction, x) * h)
        p = p + h / 2 * F
        q = q + h / 2 * p / m
        p = c * p + ((1 - c**2) * m * T).sqrt() * dw.chunk(2, 1)[1] / h**0.5
        q = q + h / 2 * p / m
        F = -gradient(sde.energy, q)
        p = p + h / 2 * F
        return torch.cat([q, p], 1), F


# --- the doors


class _Target(SDE):
    """dX = s(X) dt + sqrt(2) dW."""

    def __init__(self, score: Callable, log_density: Callable | None, at: float | None) -> None:
        self.score, self.log_stationary = _fixed(score, at), _fixed(log_density, at)

    def drift(self, x: State, t: Time) -> State:
        return self.score(x)

    def diffusion(self, x: State, t: Time) -> Operator:
        return Scale(math.sqrt(2))

    def gram_divergence(self, x: State, t: Time) -> State:
        return torch.zeros_like(x)


def _fixed(function: Any, at: float | None) -> Any:
    """A function of the state alone."""
    if function is None or at is None:
        return function
    t = as_time(at)
    return lambda x: function(x, t)


def _burn_in(given: int) -> int:
    return 0 if given == 0 else count("warmup", given)


def langevin(
    score: Callable[..., State],
    x: State,
    steps: int,
    size: float = 0.1,
    *,
    log_density: Callable[..., Tensor] | None = None,
    at: float | None = None,
    warmup: int = 0,
    target: float = 0.574,
    noise: Noise | None = None,
    keep: bool = False,
    every: int = 1,
) -> Chain:
    r"""Samples a target by its score: x' = x + ε s(x) + sqrt(2ε) z, adjusted where it can be.

    Arguments:
        score: x -> ∇log p(x), with the shape of x; or a field (x, t) of which one time is meant.
        x: The starts, (B, *shape): one chain each.
        steps: How many steps, after the warm-up.
        size: The step size ε > 0; with a log density, the first guess of the warm-up.
        log_density: x -> log p(x), (B,), but for a constant. Where it is given the steps are
            adjusted (`MALA`) and the law is exact; else its error is of order ε.
        at: The time at which fields (x, t) are asked; None where they are functions of x alone.
        warmup: Steps that come before, are not kept, and adapt the size of adjusted steps.
        target: The acceptance rate that the warm-up steers at.
        noise: Where z comes from.
        keep: Whether to keep the states after the warm-up.
        every: Keep one state of so many.

    Raises:
        KakusanError: If a number is out of range, a start has no density, or a chain runs away.

    Example:
        >>> x = torch.zeros(2000, 1, dtype=torch.float64)
        >>> chain = langevin(lambda x: -x, x, 200, log_density=lambda x: -(x**2).sum(1) / 2,
        ...                  warmup=200)
        >>> bool(abs(chain.x.var() - 1) < 0.2), round(chain.acceptance.mean().item(), 1)
        (True, 0.6)
    """
    report = Acceptance()
    adjust = MALA(target, warmup, report)
    method = EulerMaruyama() if log_density is None else adjust
    sde = _Target(score, log_density, at)
    end, trace = _run(sde, x, steps, size, method, adjust.warmup, noise, keep, every)
    ones = torch.ones(len(end), dtype=torch.float64, device=end.device)
    if log_density is None:
        return Chain(end, ones, size * ones, trace)
    return Chain(end, report.rate, size * report.factor, trace)


def kinetic_langevin(
    score: Callable[..., State],
    x: State,
    steps: int,
    size: float = 0.1,
    *,
    friction: float = 1.0,
    mass: float = 1.0,
    at: float | None = None,
    warmup: int = 0,
    noise: Noise | None = None,
    keep: bool = False,
    every: int = 1,
) -> Chain:
    r"""Samples a target by its score, with inertia: `BAOAB` on `Underdamped` at temperature 1.

    Momenta start at zero and are at home after a time of a few 1 / friction. The chains hold
    positions only, and no gradients flow through them.

    Arguments:
        score: x -> ∇log p(x), or a field (x, t) of which one time is meant.
        x: The starts, (B, *shape).
        steps: How many steps, after the warm-up.
        size: The step h > 0, below 2 sqrt(m) times the smallest width of the target.
        friction: gamma > 0: little explores far, much is `langevin` with the size h² / 2m.
        mass: m > 0.
        at: The time at which fields (x, t) are asked.
        warmup: Steps that come before and are not kept.
        noise: Where z comes from.
        keep: Whether to keep the positions after the warm-up.
        every: Keep one state of so many.

    Example:
        >>> x = torch.zeros(20_000, 1, dtype=torch.float64)
        >>> from kakusan import Fresh
        >>> chain = kinetic_langevin(lambda x: -x, x, 20, size=1.0, noise=Fresh(0))
        >>> round(chain.x.var().item(), 1)
        1.0
    """
    fixed, shape = _fixed(score, at), x.shape

    def energy(q: State) -> Tensor:
        """Minus the score is its gradient; its value means nothing."""
        with torch.no_grad():
            force = fixed(q.detach().reshape(shape)).flatten(1)
        return -(force.detach() * q).sum(1)

    sde = Underdamped(energy, friction, mass=mass)
    still = torch.cat([x.flatten(1), torch.zeros_like(x.flatten(1))], 1)
    warmup = _burn_in(warmup)
    with torch.no_grad():
        end, trace = _run(sde, still, steps, size, BAOAB(), warmup, noise, keep, every)
    ones = torch.ones(len(end), dtype=torch.float64, device=end.device)
    if trace is not None:
        trace = trace.chunk(2, 2)[0].reshape(-1, *shape)
    return Chain(end.chunk(2, 1)[0].reshape(shape), ones, size * ones, trace)


def _run(
    sde: SDE,
    x: State,
    steps: int,
    size: float,
    method: Method,
    warmup: int,
    noise: Noise | None,
    keep: bool,
    every: int,
) -> tuple[State, Tensor | None]:
    """The last states, and those kept after the warm-up; errors say the step size."""
    parameter("the step size", size, above=0.0)
    n = count("steps", steps) + warmup
    trace: list[State] = []

    def look(k: int, t: Time, x: State) -> None:
        if keep and k >= warmup:
            trace.append(x)

    grid = grids.uniform(0.0, n * size, n)
    try:
        end = solve(sde, x, grid, method, noise, on_step=look, every=every).end
    except KakusanError as error:
        raise type(error)(f"with Langevin steps of size {size:g}, {error}") from None
    return end, torch.stack(trace) if keep else None
