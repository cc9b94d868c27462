"""What all checks share: the process, its starts, paths on one Brownian motion, and statistics.

Grids are given as fractions of the span, so that a process of any span, in either direction, is
one case. Paths that leave the domain or stop being finite are kept as they are: they are counted,
not refused, which is why nothing here goes through the last look of `solve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kakusan.core.counter import Counter, CounterWithArea
from kakusan.core.noise import Noise, Wants, generator
from kakusan.core.types import State, Time
from kakusan.processes.sde import SDE, KnownTransition, Splittable
from kakusan.processes.transforms import ito, stratonovich
from kakusan.solvers.forms import NoiseForm
from kakusan.solvers.solve import Eager, Method, Task

F64 = torch.float64
STEPS, PATHS = 256, 1024  # of the look at the domain
LOOKS = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0)  # when states are kept, as fractions of the span


class Elapsed(Noise):
    """A path in the time since the start, so that the cells of its tree fit any span."""

    def __init__(self, path: Counter, origin: float) -> None:
        self.path, self.origin = path, origin

    def normal(  # noqa: D102
        self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0
    ) -> Tensor:
        return self.path.normal(step, shape, like, std)

    def want(  # noqa: D102
        self, wants: Wants, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Any:
        t, s = abs(t - self.origin), abs(s - self.origin)
        return self.path.want(wants, step, t, s, shape, like)


@dataclass
class Look:
    """States that paths came by.

    Attributes:
        x: States inside the domain, (n, *shape).
        t: Their times, (n,).
        left: The share of paths that left the domain.
        lost: The share of paths that stopped being finite without having left it before.
    """

    x: State
    t: Time
    left: float
    lost: float

    def some(self, n: int, seed: int) -> tuple[State, Time]:
        """At most n of the states, and their times."""
        at = torch.randperm(len(self.x), generator=generator(seed, 7))[:n]
        return self.x[at].contiguous(), self.t[at].contiguous()


@dataclass
class Case:
    """What is certified.

    Attributes:
        sde: The process.
        starts: States to start from, (n, *shape), float64.
        given: Whether they were given, and so are draws of a law, rather than the one state
            `sde.start`.
        method: The solver.
        promised: Its strong and weak order; None where theory is to say.
        learn: Whether to learn a score where none is known.
        paths: How many paths statistics are made of.
        seed: All randomness is a function of it.
        quiet: Whether to show no progress.
    """

    sde: SDE
    starts: Tensor
    given: bool
    method: Method
    promised: tuple[float, float] | None
    learn: bool
    paths: int
    seed: int
    quiet: bool
    look: Look = field(init=False)
    form: NoiseForm | None = field(init=False, default=None)  # once it is known

    @property
    def length(self) -> float:
        """The length of the span."""
        return abs(self.sde.span[1] - self.sde.span[0])

    @property
    def size(self) -> int:
        """How many numbers a state has."""
        return math.prod(self.starts.shape[1:])

    @property
    def solver(self) -> str:
        """The name of the method."""
        return type(self.method).__name__

    def t(self, fraction: float) -> Time:
        """The time at a fraction of the span."""
        return self.grid(1, 0.0, fraction)[1] if fraction else self.grid(1)[0]

    def grid(self, steps: int, lo: float = 0.0, hi: float = 1.0) -> Tensor:
        """Equal steps between two fractions of the span; lo > hi runs backwards."""
        a, b = self.sde.span
        return a + (b - a) * torch.linspace(lo, hi, steps + 1, dtype=F64)

    def noise(self, steps: int, stream: int, method: Method | None = None) -> Noise:
        """A Brownian path with `steps` cells in the span."""
        areas = (method or self.method).wants is Wants.AREA
        kind = CounterWithArea if areas else Counter
        path = kind(self.seed, cell=self.length / steps, stream=stream)
        return Elapsed(path, self.sde.span[0])

    def x0(self, n: int) -> State:
        """N starts: the first n, or all of them again and again."""
        return self.starts[torch.arange(n) % len(self.starts)].contiguous()

    def fewer(self, n: int) -> int:
        """At most n paths, and fewer of states of many numbers."""
        return min(n, max(64, 2**17 // self.size))

    def near(self, n: int) -> State:
        """N different states near the starts, inside the domain where these are."""
        x = self.x0(n)
        z = torch.randn(x.shape, generator=generator(self.seed, 1), dtype=F64)
        y = x + 0.1 * (x.abs() + 0.1) * z
        inside = self.sde.inside(y).reshape(-1, *(1,) * (x.ndim - 1))
        return torch.where(inside, y, x)

    def march(
        self,
        x: State,
        grid: Tensor,
        noise: Noise,
        sde: SDE | None = None,
        method: Method | None = None,
        on_step: Callable[[int, Time, State], None] | None = None,
    ) -> State:
        """The end of the paths, finite or not, inside the domain or not."""
        method, sde = method or self.method, sde or self.sde
        sde = stratonovich(sde) if method.stratonovich else ito(sde)
        still = sde.diffusion(x, grid[0]).deterministic
        shape = None if still else tuple(sde.noise_shape(x))
        task = Task(sde, method, noise, grid, shape, every=1, keep=False, on_step=on_step)
        with torch.no_grad():
            return Eager().run(task, x.contiguous())

    def looked(self) -> Look:
        """Runs the process once, to have states and to see who leaves."""
        left = torch.zeros(PATHS, dtype=torch.bool)
        lost, looks, kept = left.clone(), {round(u * STEPS) - 1 for u in LOOKS}, []

        def watch(k: int, t: Time, x: State) -> None:
            nonlocal left, lost
            finite = x.flatten(1).isfinite().all(1)
            left = left | finite & ~self.sde.inside(x) & ~lost
            # a root of what has left the domain is not finite: that is no explosion
            lost = lost | ~finite & ~left
            if k in looks:
                good = ~(left | lost)
                kept.append((x[good], t.expand(int(good.sum()))))

        noise = self.noise(STEPS, stream=1)
        self.march(self.x0(PATHS), self.grid(STEPS), noise, on_step=watch)
        x, t = (torch.cat(part) for part in zip(*kept, strict=True))
        return Look(x, t, left.double().mean().item(), lost.double().mean().item())

    def better(self) -> str:
        """Which method keeps to the domain, in words."""
        if isinstance(self.sde, Splittable) and self.solver != "Splitting":
            return "Splitting() stays inside by construction"
        if isinstance(self.sde, KnownTransition) and self.solver != "Exact":
            return "Exact() draws from the law itself"
        return ("use finer steps, a variable that may be anything (log x for x > 0), or make it "
                "Splittable (`flow`, `kick`) for Splitting()")  # fmt: skip


# --- statistics


def flat(x: Tensor) -> Tensor:
    """States as rows, (B, d)."""
    return x.flatten(1)


def finite_rows(*parts: Tensor) -> tuple[Tensor, ...]:
    """The rows that are finite in all parts, as rows of numbers."""
    rows = [flat(p) for p in parts]
    good = torch.stack([r.isfinite().all(1) for r in rows]).all(0)
    return tuple(r[good] for r in rows)


def moments_of(x: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """The coordinates and their products, (B, d + d (d + 1) / 2), in units of the scale."""
    y = (x - centre) / scale
    d = min(y.shape[1], 16)  # the products of more coordinates than this tell little more
    i, j = torch.triu_indices(d, d)
    return torch.cat([y, y[:, i] * y[:, j]], 1)


def score_of(values: Tensor, bias: Tensor | float = 0.0) -> tuple[float, int]:
    """The largest |mean| / standard error over columns, beyond an allowance for bias; where.

    Arguments:
        values: Independent rows, (B, k).
        bias: What the mean may be off by, (k,).
    """
    mean = (values.mean(0).abs() - bias).clamp(min=0)
    error = values.std(0) / len(values) ** 0.5
    z = mean / error.clamp(min=1e-12 * (1 + values.abs().max()))
    at = int(z.argmax())
    return float(z[at]), at


def bias_of(differences: Tensor) -> Tensor:
    """What means may be off by, (k,), from those of all steps halved, (B, k).

    Where the two follow one path the difference is sharp. Methods that follow none draw both
    anew, and their difference is mostly its own error, which must not count as bias.
    """
    error = differences.std(0) / len(differences) ** 0.5
    return 2 * (differences.mean(0).abs() - error).clamp(min=0)


def called(name: str, at: int, d: int) -> str:
    """The name of a column of `moments_of`."""
    if at < d:
        return f"the mean of x[{at}]"
    e = min(d, 16)
    i, j = torch.triu_indices(e, e)[:, at - d].tolist()
    return f"the {name} of x[{i}] and x[{j}]" if i != j else f"the variance of x[{i}]"
