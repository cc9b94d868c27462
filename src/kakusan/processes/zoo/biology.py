r"""Nerves and cells: the examples on which methods for diffusion bridges are compared.

References:
    Impulses and physiological states in theoretical models of nerve membrane (FitzHugh, 1961),
        doi 10.1016/S0006-3495(61)86902-6
    Quantifying the Waddington landscape and biological paths for development and differentiation
        (Wang et al., 2011), doi 10.1073/pnas.1017017108
    Neural guided diffusion bridges (Yang, van der Meulen and Sommer, 2025), arXiv 2502.11909,
        whose parameters are the defaults
"""

from __future__ import annotations

import torch
from torch import Tensor

from kakusan.core.operators import Diagonal, Operator, Scale
from kakusan.core.types import State, Time
from kakusan.processes.sde import SDE
from kakusan.processes.zoo.parameters import Value, filled, frozen, keep, like, parameter


@frozen
class FitzHughNagumo(SDE):
    r"""A nerve that fires: a fast membrane voltage x and a slow recovery y.

    .. math:: dx = \tfrac{1}{\chi} (x - x^3 - y + s) \, dt, \qquad
              dy = (\gamma x - y + \alpha) \, dt + \sigma \, dW

    Noise enters y alone and reaches x through it, so G has no inverse: its row for x is zero. No
    law is known in closed form.

    Arguments:
        chi: How much faster the voltage is, > 0.
        s: The current from outside.
        gamma: How strongly the voltage drives the recovery.
        alpha: The bias of the recovery.
        sigma: The noise, >= 0.
        span: Where time starts and ends.

    References:
        Impulses and physiological states in theoretical models of nerve membrane (FitzHugh, 1961)

    Example:
        >>> FitzHughNagumo().drift(torch.tensor([[1.0, 0.0]]), torch.tensor(0.0))
        tensor([[0.0000, 2.3000]])
    """

    chi: Value
    s: Value
    gamma: Value
    alpha: Value
    sigma: Value
    span: tuple[float, float]

    def __init__(
        self,
        chi: float | Tensor = 0.1,
        s: float | Tensor = 0.0,
        gamma: float | Tensor = 1.5,
        alpha: float | Tensor = 0.8,
        sigma: float | Tensor = 0.3,
        span: tuple[float, float] = (0.0, 2.0),
    ) -> None:
        keep(self, chi=parameter("chi", chi, above=0.0), s=parameter("s", s), span=span)
        keep(self, gamma=parameter("gamma", gamma), alpha=parameter("alpha", alpha))
        keep(self, sigma=parameter("sigma", sigma, least=0.0))

    @property
    def start(self) -> Tensor:
        """A resting nerve, (-0.5, -0.6)."""
        return torch.tensor([-0.5, -0.6], dtype=torch.float64)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        chi, s, gamma, alpha = (like(c, x) for c in (1 / self.chi, self.s, self.gamma, self.alpha))
        u, y = x[:, :1], x[:, 1:]
        return torch.cat([chi * (u - u * u * u - y + s), gamma * u - y + alpha], 1)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        g = filled(self.sigma, x).reshape(1)
        return Diagonal(torch.cat([x.new_zeros(1), g]))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)


@frozen
class CellModel(SDE):
    r"""Two genes that promote themselves and suppress each other: how a cell decides.

    .. math:: dx_1 = \Big[ \frac{x_1^4}{a^4 + x_1^4} + \frac{a^4}{a^4 + x_2^4} - x_1 \Big] dt
                     + \sigma \, dW_1

    and the same for x_2 with the two exchanged. Three stable states: both genes on, or either one
    alone. No law is known in closed form.

    Arguments:
        sigma: The noise, >= 0.
        threshold: a > 0, where a gene is half on.
        span: Where time starts and ends.

    References:
        Quantifying the Waddington landscape and biological paths for development and
            differentiation (Wang et al., 2011)

    Example:
        >>> CellModel().drift(torch.tensor([[0.5, 0.5]]), torch.tensor(0.0))
        tensor([[0.5000, 0.5000]])
    """

    sigma: Value
    threshold: Value
    span: tuple[float, float]

    def __init__(
        self,
        sigma: float | Tensor = 0.1,
        threshold: float | Tensor = 0.5,
        span: tuple[float, float] = (0.0, 4.0),
    ) -> None:
        a = parameter("threshold", threshold, above=0.0)
        keep(self, sigma=parameter("sigma", sigma, least=0.0), threshold=a, span=span)

    @property
    def start(self) -> Tensor:
        """A cell that has not decided, (0.1, -0.1)."""
        return torch.tensor([0.1, -0.1], dtype=torch.float64)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        a = like(self.threshold**4, x)
        off = (x.square().square() + a).reciprocal() * a
        return off.flip(1) - off - (x - 1)  # x⁴ / (a + x⁴) is 1 - off

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Scale(filled(self.sigma, x))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)
