r"""The average of the weights along training: what samples.

.. math:: \bar\theta \leftarrow d_k \bar\theta + (1 - d_k) \theta, \qquad
          d_k = \min(d, (1 + k) / (10 + k)) .

The warm-up keeps the random weights of the start out of the average, which would otherwise sample
pure noise for the first 1/(1-d) steps.
"""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """An exponential moving average of a module's parameters and buffers.

    Arguments:
        model: The module that trains.
        decay: The limit d of the decay; 0 copies the weights.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> average = Average(layer, 0.999)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(1.0)
        >>> average.update(layer, step=0)
        >>> bool(average.model.weight.item() > 0.5)
        True
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the weights after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = _tensors(self.model), _tensors(model)
        torch._foreach_lerp_(mine, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [v for v in model.state_dict().values() if v.is_floating_point()]
