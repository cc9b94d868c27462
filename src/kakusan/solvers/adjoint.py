r"""Gradients through any number of steps in the memory of a few.

The steps are x_{k+1} = Φ_k(x_k, θ), with the increments of step k in Φ_k. For a loss of the last
state, v_k = ∂L/∂x_k follows from the last to the first,

.. math:: v_k = (\partial_x \Phi_k)^\top v_{k+1}, \qquad
          \partial L / \partial \theta = \sum_k (\partial_\theta \Phi_k)^\top v_{k+1},

which is what autograd does with the graph of all steps: the exact derivative of what was computed,
for every method and every noise, not an equation solved backwards on its own. Here the graph is
that of one step. States are found again from s checkpoints, placed so that n steps are run

.. math:: t(n, s) = r n - \binom{s + r}{r - 1}, \qquad \binom{s + r}{s} \ge n \text{ with the
          smallest such } r,

times (Griewank and Walther: no placement needs fewer), and once more each for its derivative. With
16 checkpoints 1,000 steps are run less than three times, and all takes about twice as long as
with the graph of all steps.

Steps are run again from their state and their number alone: the method must remember no tensors,
and the noise must give the same numbers for the same step. The last state is found again too, and
compared, so that a network with dropout is refused and not differentiated wrongly.

References:
    Algorithm 799: revolve (Griewank, Walther, 2000), doi 10.1145/347837.347846
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kakusan.core.noise import Fresh
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.solvers.solve import Engine, Task


class Adjoint(Engine):
    """Runs steps without a graph, and finds gradients by running them again from checkpoints.

    Gradients go to the first state and to all tensors that need one: those in `parameters`, those
    of the process where it is a module, and those that the first step is seen to use. A step that
    comes upon another one later is refused. States that are kept or shown carry gradients too;
    each is held in memory, and the checkpoints are those between two of them.

    Arguments:
        parameters: Tensors or a module. To be given for what a first step does not use, and for
            tensors computed at some cost from others, which otherwise is differentiated each step.
        checkpoints: How many states are held at a time between two that are kept.

    Example:
        >>> from kakusan.core.operators import Zero
        >>> from kakusan.processes.sde import SDE
        >>> from kakusan.solvers.solve import solve
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> decay = SDE.of(lambda x, t: -rate * x, Zero())
        >>> grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
        >>> solve(decay, torch.ones(1, 1), grid, engine=Adjoint()).end.sum().backward()
        >>> rate.grad
        tensor(-0.6068)
    """

    def __init__(
        self, parameters: Iterable[Tensor] | nn.Module = (), checkpoints: int = 16
    ) -> None:
        if checkpoints < 1:
            raise KakusanError(f"Adjoint needs at least one checkpoint, got {checkpoints}")
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        self.parameters, self.checkpoints = tuple(given), checkpoints

    def run(self, task: Task, x: State) -> State:  # noqa: D102
        state = task.method.init(task.sde, x, task.grid)
        needed = self._needed(task, x, state) if torch.is_grad_enabled() else ()
        graph = bool(needed) or (torch.is_grad_enabled() and x.requires_grad)
        if graph and task.shape is not None and isinstance(task.noise, Fresh):
            raise KakusanError(
                "Adjoint runs steps again, and Fresh gives other numbers the second time; "
                "noise=Counter(seed) or Keyed(seed) gives the same"
            )
        # states that are kept know this engine's node; it must not know them
        bare = dataclasses.replace(task, keep=False, on_step=None, kept=[], kept_dw=[])
        stops = [k + 1 for k in range(task.steps) if task.shows(k)] or [task.steps]
        for lo, hi in zip([0, *stops], stops, strict=False):
            leg = _Leg(bare, lo, hi, state, self.checkpoints, needed)
            x = _Run.apply(leg, x, *needed) if graph else leg.forward(x)[-1].x
            task.seen(hi - 1, x, leg.dw)
            state, leg.dw = leg.end, None
        return x

    def _needed(self, task: Task, x: State, state: Any) -> tuple[Tensor, ...]:
        """All tensors that gradients go to, beside the first state."""
        own = task.sde.parameters() if isinstance(task.sde, nn.Module) else ()
        known = {id(p): p for p in (*self.parameters, *own) if p.requires_grad}
        before = x.detach()
        after, _ = task.step(0, before, task.dw(0, before), state)
        known |= {id(p): p for p in _sources(after, list(known.values()))}
        return tuple(known.values())


class _Point(NamedTuple):
    """A state, and where on the grid it is."""

    k: int
    x: State
    state: Any


class _Leg:
    """The steps from lo to hi, and how to run them again.

    Attributes:
        end: What the method remembers at hi, once it was there.
        dw: The increment from lo to hi.
    """

    def __init__(
        self, task: Task, lo: int, hi: int, state: Any, slots: int, needed: tuple[Tensor, ...]
    ) -> None:
        self.task, self.lo, self.hi, self.slots, self.needed = task, lo, hi, slots, needed
        self.start = self.end = state
        self.dw: Tensor | None = None
        self.last: Tensor | None = None
        self.gradients: list[Tensor | None] = []

    def forward(self, x: State) -> list[_Point]:
        """The checkpoints, the first and the last state among them."""
        points = [_Point(self.lo, x, self.start)]
        for k in (*marks(self.lo, self.hi, self.slots), self.hi):
            points.append(self._advance(points[-1], k, count=True))
        self.end = points[-1].state
        if _holds_tensors(self.end):
            raise KakusanError(
                "Adjoint runs steps again from their states alone, and "
                f"{type(self.task.method).__name__} remembers tensors; Eager() differentiates it"
            )
        return points

    def _advance(self, at: _Point, hi: int, count: bool = False) -> _Point:
        _, x, state = at
        for k in range(at.k, hi):
            dw = self.task.dw(k, x)
            x, state = self.task.step(k, x, dw, state)
            if count and dw is not None:
                dw = dw[0] if isinstance(dw, tuple) else dw
                self.dw = dw if self.dw is None else self.dw + dw
        return _Point(hi, x, state)

    def back(self, points: list[_Point], hi: int, slots: int, v: Tensor) -> Tensor:
        """From the gradient at hi to that at the first point; `slots` counts that point."""
        while points:
            at = points.pop()
            free = slots - len(points)
            inner = marks(at.k, hi, free)
            if inner:
                more = [at]
                for k in inner:
                    more.append(self._advance(more[-1], k))
                v = self.back(more, hi, free, v)
            else:
                for k in range(hi - 1, at.k - 1, -1):
                    v = self._step_back(self._advance(at, k), v)
            hi = at.k
        return v

    def _step_back(self, at: _Point, v: Tensor) -> Tensor:
        """(∂Φ)ᵀ v of one step: returned for the state, added up for the rest."""
        with torch.enable_grad():
            x = at.x.detach().requires_grad_()
            y, _ = self.task.step(at.k, x, self.task.dw(at.k, at.x), at.state)
        if at.k + 1 == self.hi:
            self._check_again(y)
        for p in _sources(y, [x, *self.needed]):
            raise KakusanError(
                f"step {at.k + 1} uses a tensor of shape {tuple(p.shape)} that needs a gradient "
                "and that the first step does not use: give it to Adjoint(parameters=[...])"
            )
        grads = torch.autograd.grad(
            # a graph outside of the step, of a parameter from others, is needed by each step
            y, (x, *self.needed), v, allow_unused=True, retain_graph=True
        )  # fmt: skip
        for i, g in enumerate(grads[1:]):
            if g is not None:
                old = self.gradients[i]
                self.gradients[i] = g if old is None else old + g
        return torch.zeros_like(v) if grads[0] is None else grads[0]

    def _check_again(self, y: State) -> None:
        last, eps = self.last, torch.finfo(y.dtype).eps ** 0.5
        assert last is not None
        if not ((y - last).abs() <= eps * (1 + last.abs().max())).all():
            raise KakusanError(
                f"run again, the step to t={self.task.times[self.hi]:g} leads elsewhere: drift, "
                f"diffusion or {type(self.task.noise).__name__} give other numbers the second "
                "time (dropout, say), and Adjoint cannot differentiate that; Eager() can"
            )


class _Run(torch.autograd.Function):
    """A leg as one node of the graph: its inputs are the first state and what is needed."""

    @staticmethod
    def forward(ctx: Any, leg: _Leg, x: State, *needed: Tensor) -> State:
        points = leg.forward(x)
        end = points.pop()
        # saved by autograd, which notices where one of them is changed before it is used again
        ctx.save_for_backward(end.x, *needed, *(p.x for p in points))
        ctx.leg, ctx.places = leg, [(p.k, p.state) for p in points]
        return end.x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if torch.is_grad_enabled():
            raise KakusanError(
                "Adjoint gives first derivatives, and create_graph=True asks for second ones; "
                "Eager() differentiates as often as one likes"
            )
        leg: _Leg = ctx.leg
        leg.last, *saved = ctx.saved_tensors
        states = saved[len(leg.needed) :]
        leg.gradients = [None] * len(leg.needed)
        points = [_Point(k, x, m) for (k, m), x in zip(ctx.places, states, strict=True)]
        v = leg.back(points, leg.hi, leg.slots, v)
        found, leg.gradients, leg.last = leg.gradients, [], None
        return None, v, *found


def marks(lo: int, hi: int, slots: int) -> list[int]:
    """Where to hold states on the way from lo to hi, with slots - 1 more than the one at lo.

    Example:
        >>> marks(0, 10, 3)
        [4, 7]
    """
    found = []
    while hi - lo > 1 and slots > 1:
        n, r = hi - lo, 1
        while comb(slots + r, slots) < n:
            r += 1
        lo += min(comb(slots + r - 1, slots), n - comb(slots + r - 2, slots - 1))
        slots -= 1
        found.append(lo)
    return found


def _sources(y: Tensor, known: list[Tensor]) -> list[Tensor]:
    """The tensors that need gradients and that y was computed from, no further than the known."""
    seen = {p.grad_fn for p in known if p.grad_fn is not None}
    leaves, todo = {}, [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        todo += [n for n, _ in node.next_functions]
    return [p for i, p in leaves.items() if i not in {id(k) for k in known}]


def _holds_tensors(state: Any) -> bool:
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        state = list(vars(state).values())
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return any(_holds_tensors(part) for part in state)
    return isinstance(state, Tensor)
