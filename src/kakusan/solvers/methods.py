"""General-purpose steps, for any SDE or ODE.

`EulerMaruyama` stands beside the loop in `solve.py`, whose default it is. Orders are measured in
the tests.
"""

from typing import Any

from torch import Tensor

from kakusan.core.types import State, Time, advanced, elapsed
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import Method


class Heun(Method):
    """Heun's trapezoidal step on the drift, with G frozen at the left end (so it stays Itô).

    Order 2 for ODEs; for additive noise strong order 1 and weak order 2 in the drift.
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
