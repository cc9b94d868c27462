r"""A network for what a closed-form pull towards y leaves over.

The control of a conditioned process, Gᵀ∇log p(y | x_t = x) in units of its noise, is written as

.. math:: c(x, t; y) = c_0(x, t; y) + a \, net(x, \sqrt\tau \, c_0, y; \tau, t) / \sqrt\tau ,

with the time τ that is left. The pull c_0 grows as 1 / √τ along bridges, and so does what is
learned: the network itself sees numbers of unit size, and gives them. It is zero at the start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kakusan.core.types import State, Time, as_time
from kakusan.models.scorenet import octaves, stacked

FREQUENCIES = 4


class BridgePerceptron(nn.Module):
    """A plain multilayer perceptron (x, pull, y, levels) -> like the pull, zero at the start.

    Arguments:
        sizes: The numbers of a state, of a noise and of what is told of y.
        width: The number of hidden units.
        depth: The number of hidden layers.
    """

    def __init__(self, sizes: tuple[int, int, int], width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.layers = stacked(sum(sizes) + 4 * FREQUENCIES, sizes[1], width, depth)

    def forward(self, x: Tensor, pull: Tensor, y: Tensor, levels: Tensor) -> Tensor:
        """Evaluates the network, with levels (B, 2) in [0, 1]."""
        told = torch.cat([octaves(level, FREQUENCIES) for level in levels.unbind(1)], 1)
        parts = [v.flatten(1) for v in (x, pull, y, told.to(x.dtype))]
        return self.layers(torch.cat(parts, 1)).view(pull.shape)


class BridgeNet(nn.Module):
    """What is added to a pull, in float32, from states, pulls and values in any units.

    Arguments:
        shape: The shape of one state.
        noise: The shape of one noise.
        span: The first and the last time there is.
        x: States, (n, *shape), whose mean and spread are the units of x.
        y: What is told of values, (n, j), likewise.
        width: The number of hidden units of the network.
        depth: The number of its hidden layers.
        net: A network (x, pull, y, levels) -> like the pull of your own instead; levels are
            (B, 2): the square root of the share of time that is left, and the share that is past.

    Attributes:
        trust: The factor a, 1 unless training found that less is better.

    Example:
        >>> net = BridgeNet((2,), (2,), (0.0, 1.0), torch.randn(9, 2), torch.randn(9, 2))
        >>> x, t = torch.zeros(3, 2), torch.tensor(0.5)
        >>> net(x, x, x, t, 1 - t).detach().abs().max()
        tensor(0.)
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor
    span: Tensor
    trust: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        noise: tuple[int, ...],
        span: tuple[float, float],
        x: Tensor,
        y: Tensor,
        width: int = 128,
        depth: int = 3,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.noise, self.width, self.depth = tuple(shape), tuple(noise), width, depth
        self.own_net, self.told = net is not None, y.shape[1]
        sizes = (math.prod(shape), math.prod(noise), self.told)
        self.net: nn.Module = net if net is not None else BridgePerceptron(sizes, width, depth)
        for name, v in (("x", x), ("y", y)):
            v = v.detach().double()
            self.register_buffer(f"{name}_mean", v.mean(0).float())
            # a number that never varies keeps its unit
            spread = v.std(0) if len(v) > 1 else torch.zeros_like(v[0])
            spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
            self.register_buffer(f"{name}_std", spread.float())
        self.register_buffer("span", torch.tensor(span, dtype=torch.float64))
        self.register_buffer("trust", torch.ones(()))

    def forward(self, x: State, pull: Tensor, y: Tensor, t: Time, left: Time) -> Tensor:
        """The network's own output; `pull` is √τ c_0, like the noise, and `left` is τ."""
        length = (self.span[1] - self.span[0]).abs()
        t, left = (as_time(v).to(x.device).expand(len(x)) for v in (t, left))
        past = (t - self.span[0]).abs() / length
        levels = torch.stack([(left / length).clamp(0, 1).sqrt(), past], 1).float()
        x, y = (x.float() - self.x_mean) / self.x_std, (y.float() - self.y_mean) / self.y_std
        # far from any bridge a pull is large: what is told of it grows as a logarithm there
        return self.net(x, pull.float().asinh(), y, levels)
