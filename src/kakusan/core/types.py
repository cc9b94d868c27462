"""The words used in every signature.

`State` is a batch of states, with shape (B, *shape). `Time` is a tensor of float64 with shape ()
or (B,), the forward time of the original process: data at 0, noise at the end. A `Field` maps a
state and a time to something like the state: a drift, a score, a denoised state.

Coefficients are computed in float64 where the times are, and take the dtype of the state only
when they meet it: `per_sample` is that meeting.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Tensor
Time: TypeAlias = Tensor
Field: TypeAlias = Callable[[State, Time], State]


def as_time(t: float | Tensor) -> Time:
    """A time as float64, wherever it lives.

    Example:
        >>> as_time(0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    # dtype at once: a Python float must not pass through float32 on its way
    return torch.as_tensor(t, dtype=torch.float64)


def per_sample(c: Tensor, x: State) -> Tensor:
    """Brings coefficients of shape () or (B,) beside a state of shape (B, *shape).

    Example:
        >>> per_sample(torch.ones(5), torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 1, 1, 1])
    """
    c = c.to(device=x.device, dtype=x.dtype)
    return c.reshape(c.shape + (1,) * (x.ndim - 1)) if c.ndim == 1 else c
