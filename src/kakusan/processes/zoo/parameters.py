"""What a process is given: numbers, lists of numbers or tensors, checked once.

A Python number stays one, so that it takes the dtype of any state exactly; everything else becomes
a float64 tensor and keeps its graph, so that parameters can be fitted by gradients. A process does
not change after it is made: a fit makes it anew from its parameters in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from kakusan.core.types import State, Time, as_time
from kakusan.errors import KakusanError

Given: TypeAlias = float | Sequence[float] | Sequence[Sequence[float]] | Tensor
Value: TypeAlias = float | Tensor

T = TypeVar("T")
_FORMS = ("one number", "a number or a vector", "a number, a vector or a matrix")


def frozen(cls: type[T]) -> type[T]:
    """A frozen dataclass with its own __init__, compared by identity, as tensors have to be."""
    return dataclass(frozen=True, eq=False, init=False)(cls)


def keep(process: object, **values: Any) -> None:
    """Writes the fields of a frozen process; its `__init__` alone does."""
    process.__dict__.update(values)


def parameter(
    name: str,
    given: Given,
    dims: int = 0,
    above: float | None = None,
    below: float | None = None,
    least: float | None = None,
) -> Value:
    """A checked parameter: a float as it is, anything else as a float64 tensor.

    Arguments:
        name: What messages call it.
        given: The number, list or tensor.
        dims: How many dimensions it may have.
        above: All of it must be larger than this.
        below: All of it must be smaller than this.
        least: All of it must be at least this.

    Example:
        >>> parameter("sigma", 2), parameter("sigma", [1.0, 2.0], dims=1)
        (2.0, tensor([1., 2.], dtype=torch.float64))
        >>> parameter("sigma", -1.0, above=0.0)
        Traceback (most recent call last):
        kakusan.errors.KakusanError: sigma must be larger than 0, got -1.0
    """
    try:
        value = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise KakusanError(f"{name} must be {_FORMS[dims]}, got {given!r}") from None
    if value.ndim > dims or not value.numel():
        raise KakusanError(f"{name} must be {_FORMS[dims]}, got shape {tuple(value.shape)}")
    low, high = value.detach().min().item(), value.detach().max().item()
    if not math.isfinite(low + high):
        raise KakusanError(f"{name} must be finite, got {value.tolist()}")
    if above is not None and low <= above:
        raise KakusanError(f"{name} must be larger than {above:g}, got {low}")
    if below is not None and high >= below:
        raise KakusanError(f"{name} must be smaller than {below:g}, got {high}")
    if least is not None and low < least:
        raise KakusanError(f"{name} must be at least {least:g}, got {low}")
    return value if isinstance(given, Tensor) or value.ndim else value.item()


def count(name: str, given: int) -> int:
    """A whole number of at least one.

    Example:
        >>> count("dim", 3)
        3
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise KakusanError(f"{name} must be a whole number of at least 1, got {given!r}")
    return given


def common_size(**values: Value) -> int | None:
    """The d that vectors (d,) and matrices (d, ·) share; None where all are single numbers."""
    sizes = {k: len(v) for k, v in values.items() if isinstance(v, Tensor) and v.ndim}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{k} has {n}" for k, n in sizes.items())
        raise KakusanError(f"all parameters need one row for each coordinate, but {told}")
    return next(iter(sizes.values()), None)


def square(name: str, value: Value) -> Value:
    """Refuses a matrix that is not square."""
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] != value.shape[1]:
        raise KakusanError(f"{name} must be a square matrix, got shape {tuple(value.shape)}")
    return value


def like(c: Value, x: State) -> Value:
    """A parameter beside a state: tensors take its dtype and device, numbers need not."""
    return c.to(x) if isinstance(c, Tensor) else c


def filled(c: Value, x: State) -> Tensor:
    """A parameter as a tensor that broadcasts with x."""
    return c.to(x) if isinstance(c, Tensor) else x.new_full((), c)


def at(c: Value, x: Tensor) -> Value:
    """A parameter on the device of x, still in float64."""
    return c.to(x.device) if isinstance(c, Tensor) else c


def beside(t: float | Tensor, x: State) -> Time:
    """Times () or (B,) in float64 beside states (B, *shape): (B, 1, ...).

    Unlike `per_sample` they stay in float64, since exponentials of them come first.
    """
    t = as_time(t).to(x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


def holds(condition: Tensor | bool) -> bool:
    """Whether a condition on parameters holds for all of them."""
    return bool(torch.as_tensor(condition).all())


def resting(value: float | Tensor, **parameters: Value) -> Tensor:
    """A start (d,): the value in each coordinate, as many as the parameters have."""
    d = common_size(**parameters) or 1
    return torch.ones(d, dtype=torch.float64) * torch.as_tensor(value).detach()
