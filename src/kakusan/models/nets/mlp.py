"""A residual multilayer perceptron for states without a grid: points, tables, short series.

The state is flattened, lifted to `width` units, passed through `depth` blocks

    h + W_2 silu(W_1 ((1 + scale) norm(h) + shift)),

whose scale and shift are linear in the embedded noise level and label, and mapped back. The last
layer is zero at the start, and so is the output.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kakusan.models.nets.embeddings import Condition


class Block(nn.Module):
    """One residual block: normalise, modulate, two linear layers.

    Arguments:
        width: The number of units.
        dropout: The share of units dropped in training.
    """

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.dropout = width, dropout
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """All of shape (B, width)."""
        y = F.layer_norm(h, (self.width,)) * (1 + scale) + shift
        y = F.dropout(F.silu(self.first(y)), self.dropout, self.training)
        return h + self.second(y)


class MLP(nn.Module):
    """A residual multilayer perceptron (x, t, label) -> like x.

    Arguments:
        shape: The shape of one state.
        width: The number of hidden units.
        depth: The number of residual blocks, of two layers each.
        classes: The number of labels; 0 is a network without labels.
        dropout: The share of hidden units dropped in training.
        outputs: Numbers out for each number in: with 2 the first axis of the result is twice as
            long, and its second half is the spread (see `models.denoiser`).

    Example:
        >>> MLP((2,))(torch.randn(5, 2), torch.rand(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 256,
        depth: int = 4,
        classes: int = 0,
        dropout: float = 0.0,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.shape, self.depth, self.outputs = tuple(shape), depth, outputs
        size = math.prod(self.shape)
        self.condition = Condition(min(width, 128) // 2 * 2, classes)
        # the modulations of all blocks in one product
        self.modulation = nn.Linear(self.condition.dim, 2 * depth * width)
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, outputs * size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Evaluates the network.

        Arguments:
            x: States, shape (B, *shape).
            t: Noise levels in [0, 1], shape (B,) or ().
            label: Class indices, shape (B,); -1, and None for all, mean "no label".

        Returns:
            A tensor like x, with `outputs` times as many entries along its first axis.
        """
        condition = self.condition(t, label, len(x))
        modulation = self.modulation(condition).chunk(2 * self.depth, dim=-1)
        h = self.first(x.flatten(1))
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[2 * i], modulation[2 * i + 1])
        h = F.silu(F.layer_norm(h, (h.shape[-1],)))
        return self.last(h).view(len(x), self.outputs * x.shape[1], *x.shape[2:]).to(x.dtype)
