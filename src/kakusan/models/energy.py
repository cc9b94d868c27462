r"""A score that is a gradient by construction.

A network E(x, t) with one number a state defines the density p(x) = exp(-E(x, t)) / Z(t), with a
constant Z that nobody knows, and the score

.. math:: s(x, t) = -\nabla_x E(x, t) ,

which does not ask for Z. Its Jacobian is symmetric: no flow goes in circles, which a network for s
itself does not promise. It costs one more pass, backwards, and gives the density up to Z: an
acceptance probability, a comparison of two states.

The losses of `objectives.score_matching` differentiate s once more in x and then in the
parameters, so E has to be smooth: SiLU or tanh, not ReLU, whose second derivative is 0.

References:
    Estimation of non-normalized statistical models by score matching (Hyvärinen, 2005)
    Should EBMs model the energy or the score? (Salimans, Ho, 2021)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kakusan.core.types import State, Time
from kakusan.errors import KakusanError


class Energy(nn.Module):
    """The field s = -∇E of a network E(x, t) -> (B,).

    Called where gradients are wanted, the score carries them, in x and in the parameters. It also
    works inside `torch.no_grad()` and `torch.inference_mode()`, where samplers run.

    Arguments:
        net: A network (x, t) -> (B,), smooth in x.

    Raises:
        KakusanError: The network gives something else than one number a state.

    Example:
        >>> normal = Energy(lambda x, t: x.square().sum(1) / 2)
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> normal(x, torch.tensor(0.0)), normal.log_density(x, torch.tensor(0.0))
        (tensor([[-1.,  2.]]), tensor([-2.5000]))
    """

    def __init__(self, net: Callable[[State, Time], Tensor]) -> None:
        super().__init__()
        self.net = net

    def log_density(self, x: State, t: Time) -> Tensor:
        """Log p(x) up to a constant that depends on t alone: -E(x, t), (B,)."""
        E = self.net(x, t)
        if E.shape != x.shape[:1]:
            raise KakusanError(
                f"an energy is one number a state, ({len(x)},), and this network gave "
                f"{tuple(E.shape)}; squeeze or sum what is left over"
            )
        return -E

    def forward(self, x: State, t: Time) -> State:
        """∇log p(x) = -∇E(x, t), with the shape of x; t is () or (B,)."""
        # a transform has a grad mode of its own, whatever mode a sampler runs in
        return torch.func.grad(lambda y: self.log_density(y, t).sum())(x)
