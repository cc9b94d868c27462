r"""The one loop: a process, a state, a grid, a method and a source of noise.

A method is a pair `init(sde, x, grid) -> state` and `step(sde, x, t, s, dw, state) -> (x, state)`;
what it remembers between steps travels in `state`, never in itself. Grids are float64 and may run
either way for an ODE, but only with the arrow of time for an SDE. Whatever the step, the last
state stands exactly at the last time of the grid. Gradients flow through the loop.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Fresh, Noise
from kakusan.core.operators import Operator
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE


class Path(NamedTuple):
    """What `solve` returns.

    Attributes:
        t: The grid, with shape (N + 1,).
        x: The states: (N + 1, B, *shape) where they were kept, else the last one, (1, B, *shape).
        dw: The increments, (N, B, *noise shape), where they were kept; None for an ODE.
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

    def init(self, sde: SDE, x: State, grid: Tensor) -> Any:
        """What the method wants to remember, before the first step."""
        return None

    @abc.abstractmethod
    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step from time t to time s; dw is None where G is zero."""


def _checked(sde: SDE, x: State, grid: Tensor) -> Tensor:
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


def _check_shapes(x: State, shape: tuple[int, ...], G: Operator) -> None:
    moved = G.mv(torch.zeros(shape, dtype=x.dtype, device=x.device))
    if moved.shape != x.shape or moved.dtype != x.dtype:
        raise KakusanError(
            f"G takes noise of shape {shape} to {tuple(moved.shape)} in {moved.dtype}, but the "
            f"state is {tuple(x.shape)} in {x.dtype}; flatten the state or reshape G"
        )


def solve(
    sde: SDE,
    x: State,
    grid: Tensor,
    method: Method | None = None,
    noise: Noise | None = None,
    keep: bool = False,
    on_step: Callable[[int, Time, State], None] | None = None,
) -> Path:
    """Runs a process along a grid.

    Arguments:
        sde: The process.
        x: States at grid[0], with shape (B, *shape).
        grid: The times, 1-D float64.
        method: How to step; Euler-Maruyama by default.
        noise: Where dw comes from; fresh numbers by default.
        keep: Whether to keep every state and increment, N + 1 times the memory.
        on_step: Called with (index, time, state) after each step.

    Raises:
        KakusanError: If the grid is no grid, runs against the arrow of a stochastic process, or
            the states stop being finite.

    Example:
        >>> from kakusan.core.operators import Zero
        >>> decay = SDE.of(lambda x, t: -x, Zero())
        >>> grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
        >>> solve(decay, torch.ones(1, 1), grid).end
        tensor([[0.3677]])
    """
    method = method or EulerMaruyama()
    noise = noise or Fresh()
    grid = _checked(sde, x, grid)
    G = sde.diffusion(x, grid[0])
    stochastic = not G.deterministic
    shape = sde.noise_shape(x) if stochastic else ()
    if stochastic:
        _check_arrow(sde, grid)
        _check_shapes(x, shape, G)
    h = grid.diff().tolist()
    times = grid.unbind()
    # forward-mode derivatives refuse expanded tensors, so the state owns its memory
    x = x.contiguous()
    xs, dws = [x], []
    state = method.init(sde, x, grid)
    for k in range(len(h)):
        dw = noise.increment(k, h[k], shape, x) if stochastic else None
        x, state = method.step(sde, x, times[k], times[k + 1], dw, state)
        if keep:
            xs.append(x)
            dws.append(dw)
        if on_step is not None:
            on_step(k, times[k + 1], x)
    # the sum is a quick look; only where it is not finite is every number worth one
    if not x.sum().isfinite() and not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise KakusanError(
            f"{bad} of {len(x)} states are not finite at t={grid[-1].item():g} after "
            f"{len(h)} steps of {type(method).__name__}; take smaller steps"
        )
    kept_dw = torch.stack(dws) if keep and stochastic else None
    return Path(grid, torch.stack(xs) if keep else x.unsqueeze(0), kept_dw)


class EulerMaruyama(Method):
    """x + f h + G dw. Strong order 1/2 (1 for additive noise), weak order 1; order 1 for ODEs."""

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step."""
        h = (s - t).item()
        x_s = torch.add(x, sde.drift(x, t), alpha=h)
        return (x_s if dw is None else x_s + sde.diffusion(x, t).mv(dw)), state
