"""What is asked of a process that shall be conditioned, and whether it fits the process.

The numbers of a state are x1, x2, ... in the order of the flattened state, and x where there is
only one. An inequality is NAME OP NUMBER, as x1>1: it is parsed, and nothing of it is run.
Whatever cannot be answered is refused here, in the words of the command line, before any work.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.bridges.walks import grid_of, seen, still, walked
from kakusan.core import grids
from kakusan.core.noise import Fresh, generator, mix
from kakusan.core.types import State
from kakusan.errors import UsageError
from kakusan.inference.conditioning.finish import settled
from kakusan.launch import chosen, starts_of
from kakusan.processes.observations import Coordinates, Event, Observation, Series, Terminal
from kakusan.processes.sde import SDE
from kakusan.solvers.gaussian import EulerSteps
from kakusan.solvers.solve import Path

_OPS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
SAID = 6  # numbers that are said in words
ITERATIONS = 4000
FREE = 101  # separates this use of a seed from all others

Seen = tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """What is asked of a process.

    Attributes:
        end: What was seen at the end: the whole state, or the numbers named by `observe`.
        observe: Names of the numbers of a state that are seen, x1, x2, ...; all by default.
        std: The standard deviation of noise on what is seen.
        at: What was seen at other times: pairs of a time and numbers.
        event: Instead: an inequality that holds at the end, as x1>1.
        until: When the end is; by default the end of the process's span.
        start: States (m, *shape); path i starts at number i mod m. The process's by default.
        n: How many paths.
        steps: How many steps of equal length.
        guided: Whether to draw paths towards the end while learning; by default where free paths
            do not come near it.
        iterations: Steps of training; `ITERATIONS` by default.
        seed: Fixes every number.
    """

    end: tuple[float, ...] | None = None
    observe: tuple[str, ...] = ()
    std: float = 0.0
    at: tuple[tuple[float, tuple[float, ...]], ...] = ()
    event: str | None = None
    until: float | None = None
    start: Tensor | None = field(default=None, repr=False)
    n: int = 1000
    steps: int = 200
    guided: bool | None = None
    iterations: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for word in ("n", "steps", "iterations"):
            value = getattr(self, word)
            if value is not None and value < 1:
                raise UsageError(f"{word} must be at least 1, got {value}")
        if self.n < 2:
            raise UsageError("n must be at least 2: what paths tell is a weighted mean of several")


class Posed(NamedTuple):
    """A request that fits its process.

    Attributes:
        steps: The chain.
        starts: States, (m, *shape).
        observe: What is seen.
        y: The value that it had, (1, k).
        words: What is seen, in words.
        seed: Fixes free paths.
    """

    steps: EulerSteps
    starts: Tensor
    observe: Observation
    y: Tensor
    words: str
    seed: int

    def free(self, n: int, number: int) -> tuple[Path, Tensor]:
        """Free paths by number, and what is seen of each, (n, k)."""
        at = torch.arange(number * n, (number + 1) * n) % len(self.starts)
        noise, source = Fresh(mix(self.seed, FREE, number)), generator(self.seed, FREE, number)
        with torch.no_grad():
            path = walked(self.steps, self.starts[at], noise)
            return path, seen(self.observe, path, len(self.steps), source)

    @property
    def chunk(self) -> int:
        """How many free paths at a time take some hundred megabytes."""
        each = len(self.steps) * self.starts[0].numel()
        return max(1, min(2_000, (1 << 23) // each))


class Question(NamedTuple):
    """What to condition on.

    Attributes:
        observe: What is seen.
        y: The value that it had, (k,) in float64.
        words: Both, in words.
        until: When the last of it is seen.
    """

    observe: Observation
    y: Tensor
    words: str
    until: float


def asked(sde: SDE, x: State, r: Request) -> Question:
    """What was seen of a process, with states like x.

    Raises:
        UsageError: If it does not fit the process.

    Example:
        >>> from kakusan.processes.zoo import Brownian
        >>> asked(Brownian(), torch.zeros(1, 2), Request(end=(1.0,), observe=("x2",)))
        Question(observe=Coordinates([1]), y=tensor([1.], dtype=torch.float64), words='x2 = 1',
                 until=1.0)
    """
    last = float(sde.span[1] if r.until is None else r.until)
    if r.event is not None:
        if r.end is not None or r.at or r.observe or r.std:
            raise UsageError(
                f"the event {r.event!r} is all that is seen: it goes with no --end, --observe, "
                "--std or --at"
            )
        event, words = inequality(r.event, x)
        return Question(event, torch.ones(1, dtype=torch.float64), words, last)
    part, names = _part(x, r.observe, r.std)
    if r.at:
        return _series(sde, x, r, part, names)
    if r.end is None:
        raise UsageError("what is seen of the paths? say --end -1, --event 'x1>1' or --at 0.5=0.2")
    return Question(part, _value(r.end, names, x), _words(r.end, names), last)


def _series(sde: SDE, x: State, r: Request, part: Observation, names: list[str]) -> Question:
    """Observations at several times."""
    first, way, found = float(sde.span[0]), sde.direction, dict(r.at)
    latest = max(found, key=lambda t: way * t)
    last = float(r.until if r.until is not None else latest if r.end is None else sde.span[1])
    if len(found) < len(r.at):
        raise UsageError(f"--at says a time twice: {', '.join(f'{t:g}' for t, _ in r.at)}")
    for t in found:
        if not 0 < way * (t - first) <= way * (last - first):
            raise UsageError(f"--at {t:g}=... is not after t={first:g} and up to t={last:g}")
    if r.end is not None:
        if last in found:
            raise UsageError(f"--end and --at {last:g}=... say the same thing twice; choose one")
        found[last] = r.end
    elif latest != last:
        raise UsageError(
            f"nothing is seen after t={latest:g}, and from there paths are free: say "
            f"--until {latest:g}, or an --end"
        )
    found = {t: found[t] for t in sorted(found, key=lambda t: way * t)}
    y = torch.cat([_value(value, names, x) for value in found.values()])
    words = " and ".join(f"{_words(value, names)} at t={t:g}" for t, value in found.items())
    return Question(Series(dict.fromkeys(found, part)), y, words, last)


def inequality(text: str, x: State) -> tuple[Event, str]:
    """The event of an inequality as x1>1, and its words.

    Example:
        >>> event, words = inequality("x2 <= 1e-1", torch.zeros(1, 2))
        >>> words, event.draw(torch.tensor([[1.0, 0.0]]))
        ('x2 <= 0.1', tensor([[1.]]))
    """
    found = re.fullmatch(rf"\s*(\w+)\s*(>=|<=|>|<)\s*({_NUMBER})\s*", text)
    if not found:
        raise UsageError(f"an event is NAME OP NUMBER, as 'x1>1' or 'x1<=0.5'; got {text!r}")
    name, op, number = found[1], found[2], float(found[3])
    if not math.isfinite(number):
        raise UsageError(f"an event compares with a finite number, got {text!r}")
    i, holds = index(name, x), _OPS[op]

    def event(x: State) -> Tensor:
        return holds(x.flatten(1)[:, i], number)

    event.__name__ = f"{name} {op} {number:g}"  # how the observation is told from others
    return Event(event), event.__name__


def index(name: str, x: State) -> int:
    """Which number of a flattened state a name means.

    Example:
        >>> index("x2", torch.zeros(1, 3))
        1
    """
    known = coordinates(x)
    if name == "x" and len(known) == 1:
        return 0
    word = name.strip().lower()
    if word not in known:
        near = difflib.get_close_matches(word, known, 1, 0.6) if len(known) > SAID else []
        every = ", ".join(known) if len(known) <= SAID else f"x1, ..., {known[-1]}"
        every = "it is one number, x" if len(known) == 1 else f"its numbers are {every}"
        hint = f"did you mean {near[0]}?" if near else every
        raise UsageError(f"a state of this process has no {name!r}; {hint}")
    return known.index(word)


def coordinates(x: State) -> list[str]:
    """The names of the numbers of a state."""
    return [f"x{i + 1}" for i in range(x[0].numel())]


def _part(x: State, observe: Sequence[str], std: float) -> tuple[Observation, list[str]]:
    """What is seen at one time, and the names of its numbers."""
    if not 0 <= std < math.inf:
        raise UsageError(f"--std is at least 0 and finite, got {std}")
    known = coordinates(x)
    at = [index(name, x) for name in observe] or list(range(len(known)))
    if len(set(at)) < len(at):
        raise UsageError(f"a number is observed twice in {','.join(observe)}")
    names = [known[i] for i in at] if len(known) > 1 else ["x"]
    return (Coordinates(at, std) if observe or std else Terminal()), names


def _value(given: Seen, names: list[str], x: State) -> Tensor:
    if len(given) != len(names):
        whole = len(names) == x[0].numel()
        what = "a state of this process is" if whole else f"--observe {','.join(names)} sees"
        raise UsageError(
            f"{what} {len(names)} number{'s' * (len(names) > 1)}, and {len(given)} "
            f"{'are' if len(given) > 1 else 'is'} given: {_listed(given)}"
        )
    if not all(map(math.isfinite, given)):
        raise UsageError(f"what was seen must be finite, got {_words(given, names)}")
    return torch.tensor(given, dtype=torch.float64)


def _words(given: Seen, names: list[str]) -> str:
    if len(names) > SAID:
        return f"the {len(names)} numbers that were seen"
    return ", ".join(f"{name} = {value:g}" for name, value in zip(names, given, strict=True))


def _listed(given: Seen) -> str:
    return ",".join(f"{v:g}" for v in given[:SAID]) + ",..." * (len(given) > SAID)


def pose(sde: SDE, request: Request) -> Posed:
    """A request as it fits its process; what does not is refused here, before any work."""
    starts = starts_of(sde, request.start, torch.float64)
    question = asked(sde, starts, request)
    t0, t1 = float(sde.span[0]), question.until
    at = torch.tensor([t0, t1], dtype=torch.float64)
    _check_room(request.n * (request.steps + 1) * starts[0].numel())
    chosen(sde, "euler-maruyama", starts, at, request.seed)  # refuses what cannot step
    if still(sde.diffusion(starts[:1], at[0]), starts[:1]):
        raise UsageError(
            "this process has no noise, so where it ends is a function of where it starts: "
            "only an SDE has bridges"
        )
    grid = grid_of(sde, question.observe, request.steps, grids.uniform(t0, t1, request.steps))
    steps = EulerSteps(sde, grid)
    y = question.observe.value(question.y, starts[:1])
    _check_inside(steps, question, y, starts)
    return Posed(steps, starts, question.observe, y, question.words, request.seed)


def _check_room(numbers: int) -> None:
    """Refuses paths that fill the memory before the first is drawn."""
    if numbers * 8 > (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise UsageError(
            f"so many states are {numbers * 8 / 2**30:,.0f} GiB, and this machine has "
            f"{there / 2**30:,.0f}: fewer -n, or fewer --steps"
        )


def _check_inside(steps: EulerSteps, question: Question, y: Tensor, x: Tensor) -> None:
    for t, part, own in question.observe.parts(steps.grid[-1].item()):
        if not isinstance(part, Terminal | Coordinates) or part.std:
            continue
        if not steps.inside(settled(x[:1], part, y[:, own])).all():
            raise UsageError(
                f"{y[0, own].tolist()[:6]}, to be reached at t={t:g}, is outside the domain "
                f"{steps.sde.domain}"
            )
