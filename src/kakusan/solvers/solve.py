r"""The one loop: a process, a state, a grid, a method, a source of noise, and an engine.

A method is a pair `init(sde, x, grid) -> state` and `step(sde, x, t, s, dw, state) -> (x, state)`;
what it remembers between steps travels in `state`, never in itself. It says what it wants of the
noise (`wants`) and in which sense it reads coefficients (`stratonovich`); `solve` hands it the
process in that sense, so that every method converges to the solution of the process it is given.

Grids are float64 and may run either way for an ODE, but only with the arrow of time for an SDE.
Whatever the step, the last state stands exactly at the last time of the grid. An engine runs the
steps: `Eager` here, one after the other, with gradients flowing through; `Compiled` fuses them,
`Adjoint` differentiates them in constant memory. All give the same law in the same order of noise.
"""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Fresh, Noise, Wants
from kakusan.core.operators import Operator
from kakusan.core.types import State, Time, advanced, elapsed
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito, stratonovich


class Path(NamedTuple):
    """What `solve` returns.

    Attributes:
        t: The times of the states that were kept, or the whole grid.
        x: The states: (n, B, *shape) where they were kept, else the last one, (1, B, *shape).
        dw: The increments between kept states, (n - 1, B, *noise shape); None for an ODE.
    """

    t: Tensor
    x: Tensor
    dw: Tensor | None

    @property
    def end(self) -> State:
        """The last state, (B, *shape)."""
        return self.x[-1]


class Method(abc.ABC):
    """A way to step from t to s."""

    wants = Wants.INCREMENT
    stratonovich = False

    def init(self, sde: SDE, x: State, grid: Tensor) -> Any:
        """What the method wants to remember, before the first step; refuses what it cannot do."""
        return None

    @abc.abstractmethod
    def step(self, sde: SDE, x: State, t: Time, s: Time, dw: Any, state: Any) -> tuple[State, Any]:
        """One step from time t to time s; dw is what the method wants, None where G is zero."""


class EulerMaruyama(Method):
    """x + f h + G dw. Strong order 1/2 (1 for additive noise), weak order 1; order 1 for ODEs."""

    def step(self, sde: SDE, x: State, t: Time, s: Time, dw: Any, state: Any) -> tuple[State, Any]:
        """One step."""
        x_s = advanced(x, sde.drift(x, t), elapsed(t, s))
        return (x_s if dw is None else sde.diffusion(x, t).kick(x_s, dw)), state


@dataclass
class Task:
    """What an engine runs, and what it shows to those who asked.

    Attributes:
        sde: The process, in the sense the method reads.
        method: How to step.
        noise: Where increments come from.
        grid: The times; `times` are the same as floats.
        shape: The shape of an increment; None for an ODE.
        every: How often states are kept and shown.
    """

    sde: SDE
    method: Method
    noise: Noise
    grid: Tensor
    shape: tuple[int, ...] | None
    every: int
    keep: bool
    on_step: Callable[[int, Time, State], None] | None
    kept: list[State] = field(default_factory=list)
    kept_dw: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.times: list[float] = self.grid.tolist()
        self.points = self.grid.unbind()
        self._sum: Tensor | None = None

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.times) - 1

    def dw(self, k: int, like: State) -> Any:
        """What the method wants of the noise of step k."""
        if self.shape is None:
            return None
        t, s = self.times[k], self.times[k + 1]
        return self.noise.want(self.method.wants, k, t, s, self.shape, like)

    def init(self, x: State) -> Any:
        """What the method remembers before the first step."""
        return self._watched(self.method.init, x, self.grid)

    def _watched(self, call: Callable, x: State, *rest: Any) -> Any:
        try:
            return call(self.sde, x, *rest)
        except (RuntimeError, ValueError, IndexError):
            _check_shapes(self, x)
            raise

    def step(self, k: int, x: State, dw: Any, state: Any) -> tuple[State, Any]:
        """Step k; the first is watched for drifts and operators of a wrong shape."""
        t, s = self.points[k], self.points[k + 1]
        if k:
            return self.method.step(self.sde, x, t, s, dw, state)
        after = self._watched(self.method.step, x, t, s, dw, state)
        if after[0].shape != x.shape or after[0].dtype != x.dtype:
            _check_shapes(self, x)
        return after

    def shows(self, k: int) -> bool:
        """Whether anybody wants the state after step k."""
        asked = self.keep or self.on_step is not None
        return asked and ((k + 1) % self.every == 0 or k + 1 == self.steps)

    def seen(self, k: int, x: State, dw: Any) -> None:
        """Keeps and shows the state after step k, reached by dw."""
        if self.keep and dw is not None:
            dw = dw[0] if isinstance(dw, tuple) else dw
            self._sum = dw if self._sum is None else self._sum + dw
        if not self.shows(k):
            return
        if self.keep:
            self.kept.append(x)
            if self._sum is not None:
                self.kept_dw.append(self._sum)
                self._sum = None
        if self.on_step is not None:
            self.on_step(k, self.points[k + 1], x)


class Engine(abc.ABC):
    """A way to run all steps of a task."""

    @abc.abstractmethod
    def run(self, task: Task, x: State) -> State:
        """The last state; `task.seen` is called after each step."""


class Eager(Engine):
    """One step after the other, by torch's own kernels; gradients flow through all of them."""

    def run(self, task: Task, x: State) -> State:  # noqa: D102
        state = task.init(x)
        for k in range(task.steps):
            dw = task.dw(k, x)
            x, state = task.step(k, x, dw, state)
            task.seen(k, x, dw)
        return x


def solve(
    sde: SDE,
    x: State,
    grid: Tensor,
    method: Method | None = None,
    noise: Noise | None = None,
    keep: bool = False,
    on_step: Callable[[int, Time, State], None] | None = None,
    every: int = 1,
    engine: Engine | None = None,
) -> Path:
    """Runs a process along a grid.

    Arguments:
        sde: The process, in the sense of Itô unless it is a `Stratonovich`.
        x: States at grid[0], with shape (B, *shape).
        grid: The times, 1-D float64.
        method: How to step; Euler-Maruyama by default.
        noise: Where dw comes from; fresh numbers by default.
        keep: Whether to keep states, and the increments between them.
        on_step: Called with (index, time, state) after steps.
        every: Keep and show the state after every so many steps, and after the last.
        engine: How to run the steps; `Eager()` by default.

    Raises:
        KakusanError: If the grid is no grid, runs against the arrow of a stochastic process, or
            the states stop being finite or leave the domain of the process.

    Example:
        >>> from kakusan.core.operators import Zero
        >>> decay = SDE.of(lambda x, t: -x, Zero())
        >>> grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
        >>> solve(decay, torch.ones(1, 1), grid).end
        tensor([[0.3677]])
    """
    method = method or EulerMaruyama()
    sde = stratonovich(sde) if method.stratonovich else ito(sde)
    grid = _checked(x, grid)
    shape = _noise_shape(sde, x, grid)
    # forward-mode derivatives refuse expanded tensors, so the state owns its memory
    x = x.contiguous()
    task = Task(sde, method, noise or Fresh(), grid, shape, _checked_every(every), keep, on_step)
    if keep:
        _check_memory(task, x)
        task.kept.append(x)
    end = (engine or Eager()).run(task, x)
    # the sum is a quick look; only where it is not finite is every number worth one
    if not end.sum().isfinite() and not end.isfinite().all() or not sde.inside(end).all():
        raise KakusanError(_what_went_wrong(task, x, end))
    if not keep:
        return Path(grid, end.unsqueeze(0), None)
    at = [0, *(k + 1 for k in range(task.steps) if task.shows(k))]
    dw = torch.stack(task.kept_dw) if task.kept_dw else None
    return Path(grid[at], torch.stack(task.kept), dw)


# --- the door: what is refused, and in which words


def _checked(x: State, grid: Tensor) -> Tensor:
    if not x.is_floating_point() or x.ndim < 2:
        raise KakusanError(
            f"states are floating-point tensors of shape (B, *shape), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    grid = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2 or not grid.isfinite().all():
        raise KakusanError(
            f"a grid is a 1-D tensor of at least two finite times, got {grid.tolist()}"
        )
    h = grid.diff()
    if not ((h > 0).all() or (h < 0).all()):
        raise KakusanError(f"the times of a grid must all rise or all fall, got {grid.tolist()}")
    return grid


def _check_arrow(sde: SDE, grid: Tensor) -> None:
    if (grid[-1] - grid[0]) * sde.direction < 0:
        (a, b), (g, e) = sde.span, (grid[0].item(), grid[-1].item())
        raise KakusanError(
            f"this SDE runs from t={a:g} to t={b:g}, but the grid goes the other way, from "
            f"t={g:g} to t={e:g}; reverse the process with reverse(sde, score)"
        )


def _noise_shape(sde: SDE, x: State, grid: Tensor) -> tuple[int, ...] | None:
    """The shape of an increment; None for an ODE."""
    G = sde.diffusion(x, grid[0])
    if not isinstance(G, Operator):
        raise KakusanError(
            f"diffusion(x, t) gives a {type(G).__name__}, not an operator: wrap it in Scale(g) "
            "for one number, Diagonal(g) for one a coordinate, Dense(G) for matrices (B, d, m)"
        )
    for t in (grid[len(grid) // 2], grid[-2]):
        if sde.diffusion(x, t).deterministic != G.deterministic:
            raise KakusanError(
                f"G is Zero at some times (t={grid[0].item():g} or t={t.item():g}) and not at "
                "others; where noise comes and goes, Scale(0.0) says that there is none"
            )
    if G.deterministic:
        return None
    _check_arrow(sde, grid)
    return tuple(sde.noise_shape(x))


def _check_shapes(task: Task, x: State) -> None:
    """Raises where drift or diffusion is not like the state."""
    f, G = task.sde.drift(x, task.points[0]), task.sde.diffusion(x, task.points[0])
    moved, wrong = "draws none", f.shape != x.shape or f.dtype != x.dtype
    if task.shape is not None:
        try:
            Gz = G.kick(x, x.new_zeros(task.shape))
            moved = f"takes noise {task.shape} to {tuple(Gz.shape)} in {Gz.dtype}"
            wrong = wrong or Gz.shape != x.shape or Gz.dtype != x.dtype
        except RuntimeError as error:
            moved, wrong = f"fails on noise {task.shape}: {' '.join(str(error).split())}", True
    if wrong:
        raise KakusanError(
            f"the state is {tuple(x.shape)} in {x.dtype}, the drift {tuple(f.shape)} in {f.dtype},"
            f" and G {moved}; drift and G dw must be like the state (Dense acts on flattened "
            "states)"
        )


def _checked_every(every: int) -> int:
    if every < 1:
        raise KakusanError(f"every says after how many steps to keep a state, got {every}")
    return every


def _check_memory(task: Task, x: State) -> None:
    """Refuses to keep more than the machine has free, before the work."""
    n = sum(task.shows(k) for k in range(task.steps))
    each = x.numel() + (0 if task.shape is None else math.prod(task.shape))
    # the list of states and the stack made of them are alive together
    need, free = 2 * n * each * x.element_size(), _free_memory(x)
    if need > free:
        every = task.every * math.ceil(2 * need / free)
        raise KakusanError(
            f"keeping {n} states of shape {tuple(x.shape)} and their increments takes "
            f"{need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; every={every} keeps "
            "fewer, on_step sees each without keeping any"
        )


def _free_memory(x: State) -> float:
    if x.is_cuda:
        return torch.cuda.mem_get_info(x.device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf  # no such question on this system


def _what_went_wrong(task: Task, x: State, end: State) -> str:
    """Runs the task again, a look after every step, to say where it failed."""
    state, noise = task.init(x), task.noise
    for k in range(task.steps):
        before = x
        x, state = task.step(k, x, task.dw(k, x), state)
        good = x.flatten(1).isfinite().all(1)
        if not good.all() or not task.sde.inside(x).all():
            return _sentence(task, k, before, x, good)
    name = type(noise).__name__
    bad = int((~end.flatten(1).isfinite().all(1)).sum())
    return (
        f"{bad} of {len(end)} states are not finite at t={task.times[-1]:g}, but not when the "
        f"same steps are run again with {name}: drift or diffusion draw numbers of their own"
    )


def _sentence(task: Task, k: int, before: State, x: State, good: Tensor) -> str:
    inside = task.sde.inside(x)
    left = good & ~inside
    bad = left if left.any() else ~good
    i = int(bad.nonzero()[0])
    what = f"left the domain {task.sde.domain}" if left.any() else "is no longer finite"
    cure = (
        "Exact() or Splitting(), where the process has them, stay inside; smaller steps leave it "
        "more rarely"
        if left.any()
        else "take smaller steps, or TamedEuler() where the drift grows faster than the state"
    )
    numbers = ", ".join(f"{v:.6g}" for v in before[i].flatten().tolist()[:6])
    return (
        f"path {i} of {len(x)} {what} at t={task.times[k + 1]:g} (step {k + 1} of {task.steps} of "
        f"{type(task.method).__name__}); its last good state was [{numbers}"
        f"{', ...' if before[i].numel() > 6 else ''}] at t={task.times[k]:g}; {cure}"
    )
