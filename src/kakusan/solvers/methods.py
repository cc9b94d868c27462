"""General-purpose steps, for any SDE or ODE.

`EulerMaruyama` stands beside the loop in `solve.py`, whose default it is. Orders are measured in
the tests.
"""

from typing import Any

import torch
from torch import Tensor

from kakusan.core.types import State, Time
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import EulerMaruyama, Method

__all__ = ["EulerMaruyama", "Heun"]


class Heun(Method):
    """Heun's trapezoidal step on the drift, with G frozen at the left end (so it stays Itô).

    Order 2 for ODEs; for additive noise strong order 1 and weak order 2 in the drift.
    """

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step: predict by Euler, then average the drift of both ends."""
        h = (s - t).item()
        f = sde.drift(x, t)
        kick = x if dw is None else x + sde.diffusion(x, t).mv(dw)
        f_s = sde.drift(torch.add(kick, f, alpha=h), s)
        return torch.add(kick, f + f_s, alpha=h / 2), state
