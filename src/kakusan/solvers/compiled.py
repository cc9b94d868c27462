r"""Many steps as one compiled loop: what makes a simulation as fast as its random numbers.

`Compiled` traces one step of the method on the process, chains K of them behind the numbers they
need, and has torch.compile turn the chain into machine code. The state of a small process is kept
in columns, one tensor a coordinate (`solvers.columns`), so that all K steps are one pass over the
batch with everything in registers. With `Counter` the numbers are hashed inside the same loop;
from any other source they are drawn beforehand, in the order of `Eager`.

A process is traced anew by each `solve`, which takes milliseconds, and compiled where no equal
trace was compiled before, which takes seconds: changing a parameter can never leave old code
running. What cannot be traced (a step that looks at values, an unknown operation) and machines
without a compiler fall back to `Eager`, saying so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from kakusan.core.counter import Counter, Sweep
from kakusan.core.hashing import normals
from kakusan.core.noise import Wants, generator
from kakusan.core.types import State, tracing
from kakusan.errors import KakusanError
from kakusan.solvers.columns import Batch, Columns, cells, tidied
from kakusan.solvers.solve import Eager, Engine, Task

# by the text and constants of a step: its compiled chunk, normal numbers, whether in columns
_PROGRAMS: dict[Any, tuple[Callable, Callable, bool]] = {}
_KEPT = 64
# by default a value used twice is computed twice while its formula is short, which makes the text
# of a hash, whose every round uses its argument twice, grow as 2^rounds before it is simplified
_OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 12, "max_fusion_size": 512}
_SAID: set[str] = set()


@dataclass(frozen=True)
class Compiled(Engine):
    """K steps of a process as one compiled loop; no gradients.

    Arguments:
        chunk: Steps compiled together, a power of two. More run faster, and compile longer.
        columns: States of up to so many numbers are kept in columns.

    Example:
        >>> Compiled(chunk=4)
        Compiled(chunk=4, columns=8)
    """

    chunk: int = 16
    columns: int = 8

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise KakusanError(f"a chunk is a power of two of steps, got {self.chunk}")

    def run(self, task: Task, x: State) -> State:  # noqa: D102
        if task.steps < 2 * self.chunk:  # a chunk may start late: too few steps to gain anything
            return Eager().run(task, x)
        if torch.is_grad_enabled() and x.requires_grad:
            _say_once("Compiled computes no gradients, and the state asks for them")
            return Eager().run(task, x)
        learning = torch.is_grad_enabled()
        try:
            with torch.no_grad():
                program = _Program(task, x, self)
                if learning and program.learns:
                    raise _CannotCompile("its parameters ask for gradients; torch.no_grad() says "
                                         "that none are wanted")  # fmt: skip
                return program.run(x)
        except _CannotCompile as error:
            _say_once(f"this process cannot be compiled ({error})")
            return Eager().run(task, x)


class _CannotCompile(Exception):
    """Why the steps must run one by one."""


def _say_once(why: str) -> None:
    if why not in _SAID:
        _SAID.add(why)
        warnings.warn(f"{why}; the steps run one by one, as with Eager()", stacklevel=5)


class _Program:
    """The compiled chunk of a task, and how to feed it."""

    def __init__(self, task: Task, x: State, engine: Compiled) -> None:
        self.task, self.K, self.shape = task, engine.chunk, x.shape
        self.state = task.init(x)
        self.pairs = task.method.wants in (Wants.AREA, Wants.WEAK)
        self.sweep = self._sweep()
        self.lead = self.sweep.lead if self.sweep else 0
        aligned = self.lead == 0 and task.every % self.K == 0
        self.shows = task.keep or (task.on_step is not None and not aligned)
        self.step = self._traced(x)
        constants = (getattr(self.step, n.target) for n in self.step.graph.nodes
                     if n.op == "get_attr")  # fmt: skip
        self.learns = any(c.requires_grad for c in constants)
        self.few = x[0].numel() <= engine.columns
        self.narrow = False
        self.chunk, self.draw = self._compiled(x)

    def _sweep(self) -> Sweep | None:
        task = self.task
        if task.shape is None or not isinstance(task.noise, Counter) or self.K == 1:
            return None
        sweep = Sweep(task.noise, task.method.wants, task.times, self.K)
        return sweep if sweep.fits else None

    # --- from a step to a compiled chunk

    def _traced(self, x: State) -> fx.GraphModule:
        """One step as a graph of ATen operations: (x, t, s, *dw) -> x."""
        task = self.task
        if task.method.wants in (Wants.DRAW, Wants.BRIDGE):
            raise _CannotCompile(f"{type(task.method).__name__} draws as it goes")

        def step(x: State, t: Tensor, s: Tensor, *dw: Tensor) -> State:
            given = None if not dw else dw if self.pairs else dw[0]
            after, state = task.method.step(task.sde, x, t, s, given, self.state)
            if state is not self.state:
                raise _CannotCompile(f"{type(task.method).__name__} remembers earlier steps")
            return after

        task.step(0, x, self._example_noise(x), self.state)  # refuses wrong shapes in words
        try:
            from torch.fx.experimental.proxy_tensor import make_fx  # a second to import

            with tracing():
                graph = make_fx(step)(x, *task.points[:2], *_flat(self._example_noise(x)))
        except _CannotCompile:
            raise
        except Exception as error:
            raise _CannotCompile(_first_line(error)) from error
        return tidied(graph)

    def _example_noise(self, x: State) -> Any:
        if self.task.shape is None:
            return None
        dw = x.new_zeros(self.task.shape)
        # two tensors: a trace would take one given twice for a single input
        return (dw, dw.clone()) if self.pairs else dw

    def _fits_columns(self, x: State) -> bool:
        """Whether the step can be written in columns, and comes to the same."""
        return self._agrees(x, lambda given: self._in_columns(len(x), given))

    def _in_columns(self, B: int, given: list[Any]) -> Tensor:
        x, t, s, *dw = given
        columns = (Batch(cells(d)) for d in dw)
        return Columns(self.step, B).run(Batch(cells(x)), t, s, *columns).tensor(B)

    def _agrees(self, x: State, run: Callable) -> bool:
        """Whether a way to run the step gives at another place what the method gives there.

        A trace keeps as constants what it cannot see: values that went through NumPy, say.
        """
        source, points = generator(0, device=x.device), self.task.points
        some = x.new_empty(x.shape).normal_(generator=source)
        y, dw = x * (1 + 0.05 * some) + 0.01 * some, self._example_noise(x)
        for d in _flat(dw):
            d.normal_(0, 0.1, generator=source)
        method, (t, s) = self.task.method, points[-2:]
        try:
            found = run([y, t, s, *_flat(dw)])
        except Exception:  # noqa: BLE001 - whatever stops it, it is no way to run the step
            return False
        truth, _ = method.step(self.task.sde, y, t, s, dw, self.state)
        near = 1e-9 if x.dtype == torch.float64 else 1e-3
        return found.dtype == truth.dtype and torch.allclose(
            found, truth, rtol=near, atol=near, equal_nan=True
        )

    def _compiled(self, x: State) -> tuple[Callable, Callable]:
        sweep, task = self.sweep, self.task
        kind = (sweep.wants, sweep.back, sweep.level, sweep.path.cell, sweep.path.areas) if sweep \
            else None  # fmt: skip
        key = (self.step.code, _constants(self.step), tuple(x.shape), task.shape, x.dtype,
               x.device, self.K, self.few, self.shows, task.method.wants, kind)  # fmt: skip
        if key not in _PROGRAMS:
            if len(_PROGRAMS) >= _KEPT:
                _PROGRAMS.clear()
            if not self._agrees(x, lambda given: self.step(*given)):
                raise _CannotCompile("a trace of one step does not repeat it elsewhere")
            self.narrow = self.few and self._fits_columns(x)
            _PROGRAMS[key] = (*self._compile(x), self.narrow)
        run, draw, self.narrow = _PROGRAMS[key]
        return run, draw

    def _compile(self, x: State) -> tuple[Callable, Callable]:
        times, parts = self.task.grid[: self.K + 1], self.pack(x)
        draw = torch.compile(normals, dynamic=False, options=_OPTIONS)
        try:
            from torch import _inductor
            from torch.fx.experimental.proxy_tensor import make_fx

            drawn = self.drawn(self.lead, x, None)
            example: Any = (times, parts, drawn)
            with tracing():
                # without the numbers: a chain of real tensors would keep all of them alive
                trace = make_fx(_flattened(self._chain(len(x)), example), tracing_mode="fake",
                                _allow_non_fake_inputs=True)  # fmt: skip
                graph = trace(*_leaves(example))
            # straight to the compiler: the guards of torch.compile cost more than a small chunk
            run: Any = _inductor.compile(graph, _leaves(example), options=_OPTIONS)
            run(*_leaves(example))  # a machine without a compiler says so here
        except Exception as error:
            raise _CannotCompile(_first_line(error)) from error
        return run, draw

    def _chain(self, B: int) -> Callable:
        """The function to compile: times, state, noise -> state, states and increments shown."""
        sweep, K = self.sweep, self.K
        run = Columns(self.step, B).run if self.narrow else self.step

        def chain(times: Tensor, x: list[Tensor], drawn: Any) -> Any:
            if sweep:
                # drawn: the inputs of each part of the noise, and its lanes
                parts = [sweep.unfold(i, lane, x[0].dtype) for i, lane in drawn]
                steps = [[p[k] for p in parts] for k in range(K)]
            else:
                steps = drawn
            shown = []
            for k in range(K):
                dw = _sorted(steps[k], self.pairs) if steps else ()
                given = (self.value(d, self.task.shape) for d in dw)
                after = run(self.value(x, self.shape), times[k], times[k + 1], *given)
                x = self.parts(after)
                if self.shows:
                    shown.append((x, list(dw[0]) if dw else []))
            return _leaves((x, shown))

        return chain

    # --- states as the chunk has them: a list of columns, or of one tensor

    def pack(self, x: Tensor) -> list[Tensor]:
        """A state, or increments, as the chunk takes them."""
        if not self.narrow:
            return [x.contiguous()]
        return [c.contiguous() for c in x.reshape(len(x), -1).unbind(1)]

    def unpack(self, parts: list[Tensor], shape: Any) -> Tensor:
        """The same as one tensor."""
        return torch.stack(parts, -1).reshape(shape) if self.narrow else parts[0]

    def value(self, parts: Any, shape: Any) -> Any:
        """What the step takes, made of parts."""
        if not self.narrow:
            return parts[0]
        array = np.empty(len(parts), dtype=object)
        for i, part in enumerate(parts):
            array[i] = part
        return Batch(array.reshape(shape[1:]))

    def parts(self, value: Any) -> list[Tensor]:
        """What the step gives, in parts."""
        return list(value.cells.ravel()) if self.narrow else [value]

    # --- running

    def drawn(self, k: int, x: State, halve: Callable | None) -> Any:
        """The noise of the chunk that starts at step k."""
        task = self.task
        if task.shape is None:
            return []
        if self.sweep is None:
            each = (task.dw(k + i, x) for i in range(self.K))
            return [[p for d in _flat(dw) for p in self.pack(d)] for dw in each]
        path = self.sweep.path
        lane = path.lanes_of(task.shape, x)
        fixed = 1 if task.method.wants is Wants.THREE_POINT else 2
        inputs = self.sweep.inputs(k, lane, x, halve)
        values = zip(*(self.pack(v) for v in inputs[fixed:]), strict=True)
        lanes = self.pack(lane)
        each = zip(list(values) or [()] * len(lanes), lanes, strict=True)
        return [((*inputs[:fixed], *v), one) for v, one in each]

    def halve(self, value: Any, level: int, index: int, lane: Tensor) -> Any:
        """The halves of a cell of the path, by compiled numbers."""
        assert self.sweep is not None
        return self.sweep.path.split(value, level, index, lane, self.draw)

    def run(self, x: State) -> State:
        """All steps: one by one up to the first whole chunk, and after the last."""
        task, K, k = self.task, self.K, 0
        while k < task.steps:
            if k < self.lead or k + K > task.steps:
                dw = task.dw(k, x)
                x, _ = task.step(k, x, dw, self.state)
                task.seen(k, x, dw)
                k += 1
                continue
            parts = self.pack(x)
            while k + K <= task.steps:
                times = task.grid[k : k + K + 1]
                given = _leaves((times, parts, self.drawn(k, x, self.halve)))
                parts, shown = self._results(self.chunk(*given), len(parts))
                self._show(k, parts, shown)
                k += K
            x = self.unpack(parts, self.shape)
        return x

    def _results(self, flat: Any, n: int) -> tuple[list[Tensor], list[Any]]:
        """The state after a chunk, and (state, increment) after each of its steps if shown."""
        each = (len(flat) - n) // self.K
        rest = [flat[i : i + each] for i in range(n, len(flat), each)] if each else []
        return list(flat[:n]), [(r[:n], r[n:]) for r in rest]

    def _show(self, k: int, parts: list[Tensor], shown: list[Any]) -> None:
        task = self.task
        if not shown:
            if task.shows(k + self.K - 1):
                task.seen(k + self.K - 1, self.unpack(parts, self.shape), None)
            return
        for i, (x, dw) in enumerate(shown):
            # what nobody asked for need not be put together
            if task.keep or task.shows(k + i):
                moved = self.unpack(dw, task.shape) if dw and task.keep else None
                task.seen(k + i, self.unpack(x, self.shape), moved)


def _leaves(tree: Any) -> list[Any]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for branch in tree for leaf in _leaves(branch)]


def _flattened(call: Callable, example: Any) -> Callable:
    """The function of the leaves of its arguments."""

    def grown(tree: Any, leaves: Iterator[Tensor]) -> Any:
        if isinstance(tree, Tensor):
            return next(leaves)
        return type(tree)([grown(branch, leaves) for branch in tree])

    return lambda *leaves: call(*grown(example, iter(leaves)))


def _flat(dw: Any) -> tuple[Tensor, ...]:
    """An increment, a pair of increment and area, or nothing, as a tuple of tensors."""
    return () if dw is None else dw if isinstance(dw, tuple) else (dw,)


def _sorted(parts: list[Any], pairs: bool) -> tuple[list[Tensor], ...]:
    """The parts of the increment, and those of the area where there is one."""
    if not pairs:
        return (parts,)
    if isinstance(parts[0], tuple):
        return [w for w, _ in parts], [z for _, z in parts]
    return parts[: len(parts) // 2], parts[len(parts) // 2 :]


def _constants(graph: fx.GraphModule) -> tuple[Any, ...]:
    """What tells the constants of a graph from those of another: values, or where they live."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            c = getattr(graph, node.target)
            small = c.numel() <= 4096
            found.append((tuple(c.shape), c.dtype, tuple(c.flatten().tolist()) if small else
                          (c.data_ptr(), c._version)))  # fmt: skip
    return tuple(found)


def _first_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    )
