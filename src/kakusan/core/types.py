"""The words used in every signature.

`State` is a batch of states, with shape (B, *shape). `Time` is a tensor of float64 with shape ()
or (B,), the forward time of the original process: data at 0, noise at the end. A `Field` maps a
state and a time to something like the state: a drift, a score, a denoised state.

Coefficients are computed in float64 where the times are, and take the dtype of the state only
when they meet it: `per_sample` is that meeting.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor

from kakusan.errors import KakusanError

State: TypeAlias = Tensor
Time: TypeAlias = Tensor
Field: TypeAlias = Callable[[State, Time], State]

_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


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


def elapsed(t: Time, s: Time) -> float | Tensor:
    """The length s - t of a step: a float, or a tensor while the step is being traced.

    Example:
        >>> elapsed(as_time(1.0), as_time(0.75))
        -0.25
    """
    return s - t if _tracing.get() else (s - t).item()


def advanced(x: State, v: State, h: float | Tensor) -> State:
    """X + h v, in one pass over the state where h is a float; v must be like x."""
    if v.shape != x.shape:  # which could broadcast, and be something else than was meant
        raise KakusanError(f"the drift is {tuple(v.shape)}, and the state {tuple(x.shape)}")
    return x + h.to(x.dtype) * v if isinstance(h, Tensor) else torch.add(x, v, alpha=h)


def is_tracing() -> bool:
    """Whether a step is being traced, to be compiled."""
    return _tracing.get()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Inside, `elapsed` gives tensors: a compiled step must not remember one step's length."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)
