r"""Expectations of functions of the last state, by multilevel Monte Carlo.

Level l has N_l = N_0 M^l steps (`steps` N_0, `refine` M), and P_l is g of its last state. The sum

.. math:: E[P_L] = E[P_0] + \sum_{l=1}^{L} E[P_l - P_{l-1}]

is estimated term by term, each from samples of its own; the two halves of a term share their
Brownian paths, so that its variance V_l falls with l as M^(-β l) and few samples of fine steps are
needed. With the cost C_l of a sample, the variance of the sum is ε² at the least cost where the
numbers of samples are

.. math:: n_l = \epsilon^{-2} \sqrt{V_l / C_l} \; \sum_k \sqrt{V_k C_k} .

The means m_l of the terms fall as M^(-α l), which gives the bias that is left: about
|m_L| / (M^α - 1), the largest of what the last three levels say of it. Both rates are measured.
Levels are added until bias² + variance <= tolerance², a quarter of which is for the bias.

Assumed is that the terms fall geometrically from the first level on: `steps` must be large enough
for the method not to run away, and for the law of the coarsest path to know what g looks at.
Measured for the mean of geometric Brownian motion to 2e-3: a tenth of the steps, and an eighth of
the time, of samples of the last level alone.

References:
    Multilevel Monte Carlo path simulation (Giles, 2008), doi 10.1287/opre.1070.0496
    Multilevel Monte Carlo methods (Giles, 2015), doi 10.1017/S096249291500001X
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core import grids
from kakusan.core.noise import Recorded, Wants, generator
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import Engine, EulerMaruyama, Method, solve

_BIAS = 0.25  # the share of the squared tolerance that is for the bias (Giles, 2015, section 3)
_FIRST = 3  # levels to begin with: two terms to measure a rate from
_NUMBERS = 1 << 22  # increments held at a time

Start = Callable[[int, torch.Generator], State]


class Level(NamedTuple):
    """One term of the sum.

    Attributes:
        level: l.
        steps: N_l.
        samples: n_l.
        mean: The mean of P_l - P_{l-1}, of P_0 at level 0.
        variance: Its variance V_l.
        plain: The variance of P_l alone.
        cost: Steps of the method a sample takes.
    """

    level: int
    steps: int
    samples: int
    mean: float
    variance: float
    plain: float
    cost: int


@dataclass(frozen=True)
class Expectation:
    """What `expectation` returns.

    Attributes:
        value: The estimate.
        std_error: Its standard error.
        bias: An estimate of the size of its bias.
        weak_rate: The bias falls as h to this power, by measure.
        variance_rate: The variance of a term does so.
        levels: The terms.
    """

    value: float
    std_error: float
    bias: float
    weak_rate: float
    variance_rate: float
    levels: tuple[Level, ...]

    @property
    def error(self) -> float:
        """The root of the mean squared error."""
        return math.hypot(self.std_error, self.bias)

    @property
    def cost(self) -> int:
        """Steps of the method that were taken."""
        return sum(n.samples * n.cost for n in self.levels)

    @property
    def plain_cost(self) -> float:
        """Steps that samples of the last level alone would have taken for the same error."""
        last = self.levels[-1]
        return last.plain / max(self.std_error, 1e-300) ** 2 * last.steps

    def __str__(self) -> str:
        rows = [
            f"{self.value:.6g} +- {self.std_error:.2g}, bias about {self.bias:.2g}",
            "level    steps     samples         mean     variance",
        ]
        rows += [
            f"{n.level:5d} {n.steps:8d} {n.samples:11d} {n.mean:12.5g} {n.variance:12.5g}"
            for n in self.levels
        ]
        return "\n".join(rows)


def expectation(
    sde: SDE,
    x0: State | Start,
    g: Callable[[State], Tensor],
    tolerance: float,
    span: tuple[float, float] | None = None,
    method: Method | None = None,
    steps: int = 2,
    refine: int = 2,
    seed: int = 0,
    first_samples: int = 1000,
    max_samples: int = 100_000_000,
    max_level: int = 14,
    engine: Engine | None = None,
) -> Expectation:
    """E[g(X_T)], with an error bar.

    Arguments:
        sde: The process.
        x0: One state, with shape (1, *shape), or a function of n and a generator that draws n.
        g: A function from states (n, *shape) to numbers (n,).
        tolerance: The root of the mean squared error that is wanted.
        span: From when to when; that of the process by default.
        method: How to step; Euler-Maruyama by default. It must want increments or areas.
        steps: The number of steps of level 0.
        refine: How many steps of a level make up one of the level before.
        seed: The same seed gives the same result.
        first_samples: How many samples a level begins with.
        max_samples: How many samples of all levels there may be.
        max_level: The finest level there may be.
        engine: How to run the steps.

    Raises:
        KakusanError: If the tolerance takes more samples or levels; it says how far they lead.

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> growth = SDE.of(lambda x, t: 0.1 * x, lambda x, t: Diagonal(0.2 * x))
        >>> x0 = torch.ones(1, 1, dtype=torch.float64)
        >>> found = expectation(growth, x0, lambda x: x[:, 0], tolerance=0.005)
        >>> abs(found.value - math.exp(0.1)) < 2 * found.error
        True
    """
    _check(tolerance, steps, refine, first_samples, max_samples)
    method = method or EulerMaruyama()
    sampler = _Sampler(sde, x0, g, span or sde.span, method, steps, refine, seed, engine)
    terms = [_Term() for _ in range(_FIRST)]
    wanted = [first_samples] * _FIRST
    while True:
        if sum(wanted) > max_samples:
            raise KakusanError(_too_many(_summary(terms, sampler), wanted, tolerance, max_samples))
        for level, (term, n) in enumerate(zip(terms, wanted, strict=True)):
            sampler.draw(level, term, n - term.n)
        found = _summary(terms, sampler)
        wanted = _allocated(found, refine, (1 - _BIAS) * tolerance**2)
        if any(n > 1.01 * term.n for n, term in zip(wanted, terms, strict=True)):
            continue
        if found.bias <= math.sqrt(_BIAS) * tolerance:
            return found
        if len(terms) > max_level:
            raise KakusanError(_too_fine(found, tolerance))
        terms.append(_Term())
        wanted = [*(term.n for term in terms[:-1]), first_samples]


# --- samples


@dataclass
class _Term:
    """Running means and sums of squares of P_l - P_{l-1} and of P_l, both of shape (2,)."""

    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    batches: int = 0

    def add(self, y: Tensor) -> None:
        """A batch (n, 2) more, by the update of Chan, Golub and LeVeque."""
        n, mean = len(y), y.mean(0)
        shift, total = mean - self.mean, self.n + n
        self.squares = self.squares + (y - mean).square().sum(0) + shift**2 * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n, self.batches = total, self.batches + 1


class _Sampler:
    """Draws samples of the terms, a bounded number of increments at a time."""

    def __init__(
        self,
        sde: SDE,
        x0: State | Start,
        g: Callable[[State], Tensor],
        span: tuple[float, float],
        method: Method,
        steps: int,
        refine: int,
        seed: int,
        engine: Engine | None,
    ) -> None:
        if method.wants not in (Wants.INCREMENT, Wants.AREA):
            raise KakusanError(
                f"{type(method).__name__} wants {method.wants.value}, of which a coarse step "
                "cannot be made from fine ones; methods that want increments or areas can be "
                "nested, EulerMaruyama() for one"
            )
        self.sde, self.x0, self.g, self.span, self.method = sde, x0, g, span, method
        self.first, self.refine, self.seed, self.engine = steps, refine, seed, engine
        x = self._start(1, generator(seed))
        t = torch.tensor(span[0], dtype=torch.float64)
        still = sde.diffusion(x, t).deterministic
        self.shape = None if still else tuple(sde.noise_shape(x))[1:]
        areas = 2 if method.wants is Wants.AREA else 1
        self.each = areas * max(math.prod(self.shape or ()), x[0].numel())

    def steps(self, level: int) -> int:
        return self.first * self.refine**level

    def cost(self, level: int) -> int:
        """Steps of the method a sample takes, fine and coarse."""
        return self.steps(level) + (self.steps(level - 1) if level else 0)

    def draw(self, level: int, term: _Term, n: int) -> None:
        """Adds n samples to a term."""
        at_once = max(_NUMBERS // (self.each * self.steps(level)), 1)
        while n > 0:
            term.add(self._batch(level, min(n, at_once), term.batches))
            n -= at_once

    def _start(self, n: int, source: torch.Generator) -> State:
        if callable(self.x0):
            return self.x0(n, source)
        return self.x0.expand(n, *self.x0.shape[1:])

    @torch.no_grad()
    def _batch(self, level: int, n: int, batch: int) -> Tensor:
        """Samples of P_l - P_{l-1} and of P_l, (n, 2)."""
        device = "cpu" if callable(self.x0) else self.x0.device
        source = generator(self.seed, level, batch, device=device)
        x = self._start(n, source)
        grid = grids.uniform(*self.span, self.steps(level))
        path = self._path(x, grid, source)
        fine = self._value(x, grid, path)
        coarse = self._value(x, grid[:: self.refine], path) if level else 0
        return torch.stack([fine - coarse, fine], 1)

    def _path(self, x: State, grid: Tensor, source: torch.Generator) -> Recorded | None:
        if self.shape is None:
            return None
        h, size = abs((grid[1] - grid[0]).item()), (len(grid) - 1, len(x), *self.shape)
        w = x.new_empty(size).normal_(0, math.sqrt(h), generator=source)
        if self.method.wants is not Wants.AREA:
            return Recorded(w, grid)
        y = x.new_empty(size).normal_(0, math.sqrt(h), generator=source)
        return Recorded(w, grid, h / 2 * (w + y / math.sqrt(3)))

    def _value(self, x: State, grid: Tensor, path: Recorded | None) -> Tensor:
        end = solve(self.sde, x, grid, self.method, path, engine=self.engine).end
        y = self.g(end)
        if y.shape != (len(x),):
            raise KakusanError(
                f"g takes states {tuple(end.shape)} to one number each, ({len(x)},), and gave "
                f"{tuple(y.shape)}"
            )
        return y.to("cpu", torch.float64)


# --- what the samples say


def _summary(terms: list[_Term], sampler: _Sampler) -> Expectation:
    levels = tuple(
        Level(
            i,
            sampler.steps(i),
            t.n,
            t.mean[0].item(),
            *(t.squares / max(t.n - 1, 1)).tolist(),
            cost=sampler.cost(i),
        )
        for i, t in enumerate(terms)
    )
    M = sampler.refine
    known = []
    for n in levels[1:]:
        seen = n.samples * n.mean**2 / n.variance if n.variance else 1e12
        if seen > 4:  # a mean within two standard errors of 0 says nothing
            known.append((n.level, math.log(abs(n.mean)), seen - 4))
    alpha = min(max(-_slope(known, math.log(M)), 0.5), 4.0)
    known = [(n.level, math.log(n.variance), n.samples / 20) for n in levels[1:] if n.variance]
    beta = max(-_slope(known, math.log(M)), 0.5)
    last = len(levels) - 1
    left = max(abs(n.mean) * M ** (alpha * (n.level - last)) for n in levels[1:][-3:])
    return Expectation(
        value=sum(n.mean for n in levels),
        std_error=math.sqrt(sum(n.variance / max(n.samples, 1) for n in levels)),
        bias=left / (M**alpha - 1),
        weak_rate=alpha,
        variance_rate=beta,
        levels=levels,
    )


def _slope(points: list[tuple[int, float, float]], unit: float) -> float:
    """The slope of y over x, in the unit, by points (x, y, 1 / variance of y) and a prior.

    The prior is -1 with a standard deviation of 1/2, which any good measure outweighs.
    """
    total = sum(w for _, _, w in points) or 1.0
    x_mean, y_mean = (sum(p[i] * p[2] for p in points) / total for i in (0, 1))
    precision = 4.0
    above, below = -precision, precision
    for x, y, w in points:
        above += w * unit * (x - x_mean) * (y - y_mean)
        below += w * unit**2 * (x - x_mean) ** 2
    return above / below


def _allocated(found: Expectation, refine: int, variance: float) -> list[int]:
    """The numbers of samples that reach a variance at the least cost; those there are stay."""
    V = [n.variance for n in found.levels]
    for i in range(2, len(V)):
        # few samples may miss where the variance comes from: a term has no less than half of what
        # the one before it foretells
        V[i] = max(V[i], V[i - 1] * refine**-found.variance_rate / 2)
    C = [n.cost for n in found.levels]
    total = sum(math.sqrt(v * c) for v, c in zip(V, C, strict=True))
    return [
        max(n.samples, math.ceil(math.sqrt(v / c) * total / variance))
        for n, v, c in zip(found.levels, V, C, strict=True)
    ]


def _check(
    tolerance: float, steps: int, refine: int, first_samples: int, max_samples: int
) -> None:
    if not 0 < tolerance < math.inf:
        raise KakusanError(f"a tolerance is > 0, got {tolerance}")
    if steps < 1 or refine < 2:
        raise KakusanError(
            f"levels have steps · refine^l steps, with steps >= 1 and refine >= 2; got "
            f"steps={steps} and refine={refine}"
        )
    if first_samples < 10 or max_samples < _FIRST * first_samples:
        raise KakusanError(
            f"{_FIRST} levels begin with first_samples >= 10 each, {_FIRST * first_samples} in "
            f"all, and max_samples is {max_samples}"
        )


def _so_far(found: Expectation) -> str:
    n = sum(level.samples for level in found.levels)
    return (
        f"{n} samples of {len(found.levels)} levels gave {found.value:.6g} with a standard error "
        f"of {found.std_error:.2g} and a bias of about {found.bias:.2g}"
    )


def _too_many(found: Expectation, wanted: list[int], tolerance: float, most: int) -> str:
    reach = tolerance * math.sqrt(sum(wanted) / most)
    return (
        f"a tolerance of {tolerance:g} takes about {sum(wanted):.2g} samples, more than "
        f"max_samples={most}; {_so_far(found)}; {most} samples reach a tolerance of about "
        f"{reach:.1g}"
    )


def _too_fine(found: Expectation, tolerance: float) -> str:
    return (
        f"a tolerance of {tolerance:g} is not met with {found.levels[-1].steps} steps at the last "
        f"level: {_so_far(found)}, which falls as h^{found.weak_rate:.2g}; take more steps at "
        "level 0, a method of higher weak order, or a larger max_level"
    )
