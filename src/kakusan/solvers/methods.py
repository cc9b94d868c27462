r"""General-purpose steps, for any SDE or ODE.

`EulerMaruyama` stands beside the loop in `solve.py`, whose default it is; methods of high strong
order are in `strong.py`, of high weak order in `weak.py`. A step runs from t to s, h = s - t;
where the process runs against the clock h is negative, the drift's displacement f h is right as it
is, and the noise has variance |h|. Orders are measured in tests/laws/test_methods.py.

References:
    Strong convergence of an explicit numerical method for SDEs with nonglobally Lipschitz
        continuous coefficients (Hutzenthaler, Jentzen and Kloeden, 2012), doi 10.1214/11-AAP803
    On the construction and comparison of difference schemes (Strang, 1968), doi 10.1137/0705041
"""

from typing import Any

import torch
from torch import Tensor

from kakusan.core.noise import Draw, Wants
from kakusan.core.types import State, Time, advanced, elapsed, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE, KnownTransition, Splittable
from kakusan.solvers.solve import Method


class Heun(Method):
    """Heun's trapezoidal step on the drift, with G frozen at the left end (so it stays Itô).

    Order 2 for ODEs. For additive noise strong order 1, and weak order 2 where G is constant in
    time; otherwise the orders of Euler.
    """

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step: predict by Euler, then average the drift of both ends."""
        h = elapsed(t, s)
        f = sde.drift(x, t)
        kick = x if dw is None else sde.diffusion(x, t).kick(x, dw)
        f_s = sde.drift(advanced(kick, f, h), s)
        return advanced(kick, f + f_s, h / 2), state


class TamedEuler(Method):
    r"""Euler's step with a drift that moves no state by more than 1: x + f h / (1 + |f h|) + G dw.

    Where the drift grows faster than the state, Euler's moments grow beyond all bounds as the
    steps get smaller; these stay bounded, and the orders are those of Euler. |f h| is the
    Euclidean norm of each sample, not of each coordinate: taming must keep the direction of the
    drift, or a drift that points inwards might no longer do so. The price is that a coordinate far
    out takes the drift from the others until it is back. G may grow no faster than the state.
    """

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step."""
        # the squares must not overflow, or the state would stand still
        big = torch.finfo(x.dtype).max ** 0.5 / x[0].numel()
        move = (elapsed(t, s) * sde.drift(x, t)).clamp(-big, big)
        length = move.square().flatten(1).sum(1).sqrt()
        x_s = x + move / (1 + per_sample(length, x))
        return (x_s if dw is None else sde.diffusion(x, t).kick(x_s, dw)), state


class RK4(Method):
    """The classical method of Runge and Kutta, of order 4, for ODEs."""

    def init(self, sde: SDE, x: State, grid: Tensor) -> None:
        """Refuses noise."""
        G = sde.diffusion(x, grid[0])
        if not G.deterministic:
            raise KakusanError(
                f"RK4 solves ODEs, and this process has noise, a {type(G).__name__}: SRK, "
                "Milstein or EulerMaruyama follow its paths, WeakSecond its law, and "
                "probability_flow(sde, score) is an ODE with the same marginals"
            )

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: None, state: Any
    ) -> tuple[State, Any]:
        """One step: the drift at both ends, and twice in the middle."""
        h, middle = elapsed(t, s), (t + s) / 2
        f1 = sde.drift(x, t)
        f2 = sde.drift(advanced(x, f1, h / 2), middle)
        f3 = sde.drift(advanced(x, f2, h / 2), middle)
        f4 = sde.drift(advanced(x, f3, h), s)
        return advanced(x, f1 + 2 * (f2 + f3) + f4, h / 6), state


class Exact(Method):
    """Draws of the law from one time to the next, for a `KnownTransition`: no error at all.

    Where the solution is a function of the Brownian path, this is that function.
    """

    wants = Wants.DRAW

    def init(self, sde: SDE, x: State, grid: Tensor) -> None:
        """Refuses processes whose transition nobody has written down."""
        if not isinstance(sde, KnownTransition):
            raise KakusanError(
                f"Exact needs a KnownTransition, a process with a method `exact` that draws from "
                f"its law, got {type(sde).__name__}; EulerMaruyama takes any SDE, WeakSecond gets "
                "close to laws in few steps"
            )
        if sde.diffusion(x, grid[0]).deterministic:
            raise KakusanError("Exact draws from laws, and an ODE has none: RK4 solves ODEs")

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Draw, state: Any
    ) -> tuple[State, Any]:
        """One draw."""
        assert isinstance(sde, KnownTransition)
        return sde.exact(x, t, s, dw.dw, dw.source), state


class Splitting(Method):
    r"""Strang's splitting for a `Splittable`: half the flow, all of the kick, half the flow.

    Each part is a closed form that stays in the domain of the process, so the step does. Strong
    order 1 and weak order 2 where the noise is commutative.
    """

    def init(self, sde: SDE, x: State, grid: Tensor) -> None:
        """Refuses processes that give no flows."""
        if not isinstance(sde, Splittable):
            raise KakusanError(
                f"Splitting needs a Splittable, a process with methods `flow` and `kick` that "
                f"solve its two parts, got {type(sde).__name__}; EulerMaruyama takes any SDE, "
                "StratonovichHeun and WeakSecond any smooth one"
            )

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step; noise acts in the middle."""
        assert isinstance(sde, Splittable)
        if dw is None:
            return sde.flow(x, t, s), state
        middle = (t + s) / 2
        x = sde.kick(sde.flow(x, t, middle), middle, dw)
        return sde.flow(x, middle, s), state
