r"""Samplers for the reverse of a linear SDE: steps in the angle, exact in everything but v.

Divide a state of the kernel N(alpha x_0, sigma²) by r = sqrt(alpha² + sigma²) and it lies at the
angle phi = atan2(sigma, alpha) of one plane: y = cos(phi) x_0 + sin(phi) eps. The probability flow
of *every* linear SDE is then

.. math:: dy / d\phi = v = \cos(\phi) \, \epsilon - \sin(\phi) \, x_0 ,

bounded and regular at both ends: no smallest sigma, no last denoising step. `Ancestral` rotates by
the step (DDIM: exact where x_0 and eps stay put); `Multistep` integrates v through the
angles already visited (Adams-Bashforth-Moulton).

Noise of any amount lambda enters by one rule. From t to s, DDPM's posterior has the variance
b = sigma_s² (1 - (alpha_t sigma_s / (alpha_s sigma_t))²). Go by the flow to the level
(alpha_s, sqrt(sigma_s² - lambda² b)), below the one wanted, then add lambda sqrt(b) z. Both moves
keep the law exactly, so the only error is that of the flow's step: lambda = 1 is DDPM, 0 is DDIM.

References:
    Denoising diffusion implicit models (Song, Meng, Ermon, 2021)
    Progressive distillation for fast sampling of diffusion models (Salimans, Ho, 2022), for v
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kakusan.core.types import Field, State, Time
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE, angle_grid, velocity_of
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import Reverse, reverse
from kakusan.solvers.solve import Method, Noise, solve


class Level(NamedTuple):
    """One step of a plan, in floats: from angle phi to angle psi, then noise of size z.

    Attributes:
        r: Length of (alpha, sigma) where the step starts.
        phi: Angle where the step starts.
        psi: Angle that the flow goes to, below the one wanted where noise is added.
        scale: Length of (alpha, sigma) at psi.
        z: Standard deviation of the noise added, over sqrt(|h|), since dw brings that factor.
    """

    r: float
    phi: float
    psi: float
    scale: float
    z: float


class Memory(NamedTuple):
    """What a method in the angle remembers: the plan, the position, the last velocities."""

    velocity: Field
    plan: list[Level]
    k: int = 0
    past: tuple[Tensor, ...] = ()
    weights: Sequence[list[float]] = ()


def _plan(process: LinearSDE, noise: float, grid: Tensor) -> list[Level]:
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    (a_t, a_s), (o_t, o_s) = (alpha[:-1], alpha[1:]), (sigma[:-1], sigma[1:])
    # the posterior variance of DDPM; a step up in noise (an ODE run forwards) has none
    b = torch.where(o_t > o_s, o_s**2 * (1 - (a_t * o_s / (a_s * o_t)) ** 2), 0.0).clamp(min=0)
    kept = (o_s**2 - noise**2 * b).clamp(min=0).sqrt()
    z = noise * (b / grid.diff().abs()).sqrt()
    columns = (
        torch.hypot(a_t, o_t).round(decimals=15),
        torch.atan2(o_t, a_t),
        torch.atan2(kept, a_s),
        torch.hypot(a_s, kept).round(decimals=15),
        z,
    )
    return [Level(*row) for row in torch.stack(columns, 1).tolist()]


class Angular(Method):
    """What the samplers in the angle share."""

    def init(self, sde: SDE, x: State, grid: Tensor) -> Memory:
        """Plans the whole grid at once, so that a step is a few multiplications."""
        if not isinstance(sde, Reverse) or not isinstance(sde.sde, LinearSDE):
            name, inner = type(self).__name__, sde.sde if isinstance(sde, Reverse) else sde
            raise TypeError(
                f"{name} needs the reverse of a LinearSDE, got {type(inner).__name__}; "
                "EulerMaruyama takes any SDE"
            )
        if not 0 <= sde.noise <= 1:
            raise KakusanError(f"{type(self).__name__} takes noise in [0, 1], got {sde.noise}")
        plan = _plan(sde.sde, sde.noise, grid)
        return Memory(velocity_of(sde.sde, sde.score), plan)


class Ancestral(Angular):
    """DDPM's posterior at noise 1, DDIM at noise 0, and all between. Order 1."""

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Memory
    ) -> tuple[State, Memory]:
        """Turns by psi - phi: y cos + v sin, scaled, plus the noise."""
        r, phi, psi, scale, z = state.plan[state.k]
        turn = psi - phi
        v = state.velocity(x, t)
        shrink = scale * math.cos(turn) / r
        x = torch.add(x * shrink, v, alpha=scale * math.sin(turn))
        if dw is not None:
            x.add_(dw, alpha=z)
        return x, state._replace(k=state.k + 1)


class Multistep(Angular):
    """Adams-Bashforth-Moulton in the angle, with exact weights for uneven steps.

    A step extrapolates the last velocities (Adams-Bashforth). When the velocity at its end is
    there, it is done again as an interpolation (Adams-Moulton); the velocity is not evaluated
    twice, so a step costs one evaluation. Order 2 with one velocity and 3 from two on, since the
    first step has but one; more make the error smaller, not its order larger.

    Arguments:
        order: How many velocities a step extrapolates, 1 to 4; the first steps use those there
            are.

    References:
        Solving ordinary differential equations I (Hairer, Nørsett, Wanner, 1993), section III.1
    """

    def __init__(self, order: int = 2) -> None:
        if order not in (1, 2, 3, 4):
            raise KakusanError(f"Multistep extrapolates 1 to 4 velocities, got {order}")
        self.order = order

    def init(self, sde: SDE, x: State, grid: Tensor) -> Memory:
        """Plans the steps and, at once for all of them, the weights of their velocities."""
        memory = super().init(sde, x, grid)
        # numpy, since many operations on few numbers are what torch is slow at
        return memory._replace(weights=self._weights(np.array(memory.plan)))

    def _weights(self, plan: np.ndarray) -> list[list[float]]:
        """For each step, what it adds of the velocities seen so far, the newest first."""
        first = [self._weighted(plan, k, k + 1)[0] for k in range(min(self.order, len(plan)))]
        return first + self._weighted(plan, self.order, len(plan))

    def _weighted(self, plan: np.ndarray, start: int, stop: int) -> list[list[float]]:
        """The weights of the steps from start to stop, which have equally many velocities."""
        if start >= stop:
            return []
        _, phi, psi, scale, _ = plan.T
        nodes = [phi[start - i : stop - i] for i in range(min(start, self.order) + 1)]
        now, before = slice(start, stop), slice(start - 1, stop - 1)
        ahead = integral_weights(nodes[: self.order], phi[now], psi[now])
        weights = [scale[now] * w for w in ahead] + [np.zeros_like(phi[now])] * (
            len(nodes) - len(ahead)
        )
        if start:
            # what the last step would have added of each, had it known the newest velocity
            known = integral_weights(nodes, phi[before], psi[before])
            guess = integral_weights(nodes[1:], phi[before], psi[before])
            ratio = scale[now] / plan[now, 0] * scale[before]
            for i, (w, g) in enumerate(zip(known, [0.0, *guess], strict=True)):
                weights[i] = weights[i] + ratio * (w - g)
        return np.stack(weights, 1).tolist()

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Memory
    ) -> tuple[State, Memory]:
        """Mends the last step, goes on from there, adds the noise: one sum of velocities."""
        r, _, _, scale, z = state.plan[state.k]
        seen = (state.velocity(x, t), *state.past)
        weights, shrink = state.weights[state.k], scale / r
        x = torch.add(x, seen[0], alpha=weights[0] / shrink)
        for v, w in zip(seen[1:], weights[1:], strict=True):
            x.add_(v, alpha=w / shrink)
        if shrink != 1:
            x.mul_(shrink)
        if dw is not None:
            x.add_(dw, alpha=z)
        return x, state._replace(k=state.k + 1, past=seen[: self.order])


def integral_weights(nodes: Sequence[Any], a: Any, b: Any) -> list[Any]:
    """Weights w with Σ w_i p(nodes_i) = ∫_a^b p, for every polynomial p through the nodes.

    All arguments are floats, or arrays of one shape for many integrals at once.

    Example:
        >>> [round(w, 12) for w in integral_weights([0.0, -1.0], 0.0, 1.0)]
        [1.5, -0.5]
    """
    weights = []
    for i, node in enumerate(nodes):
        # coefficients of the Lagrange polynomial of this node, in powers of (phi - a)
        poly: list[Any] = [1.0]
        for other in (*nodes[:i], *nodes[i + 1 :]):
            c, shift = node - other, other - a
            rising, flat = [0.0, *poly], [*poly, 0.0]
            poly = [(u - shift * w) / c for u, w in zip(rising, flat, strict=True)]
        weights.append(sum(c * (b - a) ** (k + 1) / (k + 1) for k, c in enumerate(poly)))
    return weights


def generate(
    process: LinearSDE,
    score: Field,
    x1: State,
    steps: int = 20,
    noise: float = 0.0,
    source: Noise | None = None,
    keep: bool = False,
) -> Tensor:
    """From noise to data in few steps, by the best method here for the amount of noise.

    Arguments:
        process: The forward process.
        score: Its score, a `Denoiser.score` or any other field.
        x1: States at the end of the span, with shape (B, *shape).
        steps: How many steps, and evaluations of the score.
        noise: lambda: 0 is the flow, 1 Anderson's reverse SDE.
        source: Where the noise comes from.
        keep: Whether to return all states, (steps + 1, B, *shape), instead of the last.
    """
    # denser near the data, where the velocity bends; the exponent was measured on mixtures
    grid = angle_grid(process, process.span[1], 0.0, steps, rho=1.5)
    # the past tells about the future along a smooth path; noise makes it of little use
    method = Multistep(2) if noise == 0 else Ancestral()
    path = solve(reverse(process, score, noise), x1, grid, method, source, keep)
    return path.x if keep else path.end
