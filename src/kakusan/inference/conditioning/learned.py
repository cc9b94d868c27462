r"""The tilt that was learned: a closed-form pull, and a network for what it leaves over."""

from __future__ import annotations

from torch import Tensor

from kakusan.core.operators import NotElliptic
from kakusan.core.types import State, Time, as_time, per_sample
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.models.bridgenet import BridgeNet
from kakusan.processes.observations import Observation


class BridgeTilt(Tilt):
    """c = c_0 + a net / √τ, for the time τ that is left until `end`.

    Arguments:
        base: The pull c_0.
        observation: What is seen.
        net: What was learned.
        end: When it is seen.
    """

    def __init__(self, base: Tilt, observation: Observation, net: BridgeNet, end: float) -> None:
        self.sde, self.base, self.observation = base.sde, base, observation
        self.net, self.end, self.trust = net, float(end), float(net.trust)

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        c = self.base.control(x, t, y)
        if not self.trust:
            return c
        left = self.observation.left(as_time(t), self.end)
        root = per_sample(left.sqrt(), c)
        out = self.net(x, root * c, self.observation.told(y), t, left)
        return c + self.trust * out.to(c) / root

    def score(self, x: State, t: Time, y: Tensor) -> State:
        """∇log h = G⁻ᵀ c, like x.

        Raises:
            NotElliptic: If G has no inverse: the control Gᵀ∇log h is all that is known then.
        """
        try:
            return self.sde.diffusion(x, t).tsolve(self.control(x, t, y))
        except NotElliptic as error:
            raise NotElliptic(
                f"{error}; of a process with such noise the control GᵀS is learned, which is all "
                "that moves it: ask for .control"
            ) from None
