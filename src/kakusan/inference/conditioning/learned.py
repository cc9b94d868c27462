r"""The tilt that was learned: a closed-form pull, and a network for what it leaves over."""

from __future__ import annotations

import copy

from torch import Tensor

from kakusan.core.operators import NotElliptic, Operator
from kakusan.core.types import State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.reach import Reach
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.models.bridgenet import BridgeNet
from kakusan.processes.observations import Linear, Observation
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps


class BridgeTilt(Tilt):
    """c = c_0 + a net(x, c_0, y, t) / √τ, for the time τ that is left until `end`.

    Arguments:
        base: The pull c_0.
        observation: What is seen.
        net: What was learned.
        end: When it is seen.
        steps: The chain in whose noise controls are measured; that of the process by default.
    """

    def __init__(
        self,
        base: Tilt,
        observation: Observation,
        net: BridgeNet,
        end: float,
        steps: GaussianSteps | None = None,
    ) -> None:
        self.sde, self.base, self.observation, self.steps = base.sde, base, observation, steps
        self.net, self.end, self.trust = net, float(end), float(net.trust)

    def along(self, steps: GaussianSteps) -> BridgeTilt:
        """The same with the pull of a chain; what was learned stays as it is."""
        twin = copy.copy(self)
        twin.base = self.base.along(steps)
        return twin

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        return self.pulls(x, t, y)[1] if self.trust else self.base.control(x, t, y)

    def pulls(self, x: State, t: Time, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if not self.trust:
            return self.base.pulls(x, t, y)
        here, behind = self.base.pulls(x, t, y)
        left = self.observation.left(as_time(t), self.end)
        root = per_sample(left.sqrt(), here)
        out = self.net(x, root * here, self.observation.told(y), t, left)
        more = self.trust * out.to(here) / root
        return here + more, behind + more

    def score(self, x: State, t: Time, y: Tensor) -> State:
        """∇log h = G⁻ᵀ c at x, like x.

        Raises:
            NotElliptic: If G has no inverse: the control Gᵀ∇log h is all that is known then.
        """
        try:
            return self._operator(x, t).tsolve(self.pulls(x, t, y)[0])
        except NotElliptic as error:
            raise NotElliptic(
                f"{error}; of a process with such noise the control GᵀS is learned, which is all "
                "that moves it: ask for .control"
            ) from None

    def foresight(  # noqa: D102
        self, seen: Linear, x: State, t: Time, s: Time, end: float
    ) -> tuple[Reach, Tensor | float] | None:
        return self.base.foresight(seen, x, t, s, end)

    def _operator(self, x: State, t: Time) -> Operator:
        """G of the chain in the step that starts at t."""
        if self.steps is None or type(self.steps) is EulerSteps:
            return self.sde.diffusion(x, t)
        t = as_time(t)
        if t.ndim:
            raise KakusanError(
                f"the score along {type(self.steps).__name__} is asked for at one time at once, "
                f"got {len(t)}"
            )
        k = int((self.steps.grid[:-1] - t.cpu()).abs().argmin())
        return self.steps.operator(x, k)
