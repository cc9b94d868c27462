"""Where and in which precision to train: measured, not ruled.

bfloat16 is faster on one processor and slower on the next, and so is the channels-last layout; the
network decides as much as the machine. So a few steps are timed in each way, on the real network
and a real batch, and the fastest way is taken. What was chosen is written into the configuration
of the run, where a resumed run finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kakusan.errors import UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.training.config import TrainConfig


def device_of(name: str) -> torch.device:
    """The device of that name; `auto` takes an accelerator where there is one.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        # Apple's has no float64, in which time is kept
        return found if found and found.type != "mps" else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"device {name!r} cannot be used here; try cpu or auto") from None
    return device


def precision(device: torch.device, name: str) -> AbstractContextManager:
    """The autocast context of a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")


def arrange(model: Denoiser, layout: str) -> None:
    """Brings the weights into a memory layout; the batch follows them."""
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def arranged(x: Tensor, layout: str) -> Tensor:
    """A batch in a memory layout."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def placed(
    config: TrainConfig, model: Denoiser, image: bool, descend: Callable[[TrainConfig], object]
) -> TrainConfig:
    """The configuration with precision and layout decided.

    Arguments:
        config: What was asked for, with its device; `auto` is decided here.
        model: The model, on its device; its weights are left as they are.
        image: Whether the data have a channel axis to lay out.
        descend: Runs one forward and backward pass in the way it is given.
    """
    kinds = [config.precision] if config.precision != "auto" else ["float32", "bfloat16"]
    layouts = ["contiguous"]
    if config.layout != "auto" or image:
        layouts = [config.layout] if config.layout != "auto" else ["contiguous", "channels_last"]
    ways = [
        config.model_copy(update={"precision": kind, "layout": layout})
        for kind in kinds
        for layout in layouts
    ]
    if len(ways) == 1:
        return ways[0]
    rounds = [[_seconds(model, way, descend) for way in ways] for _ in range(4)]
    # the first round warms up; the best of the others is the least disturbed
    best = [min(times) for times in zip(*rounds[1:], strict=True)]
    # an earlier way stays unless a later one is clearly faster, so that chance decides nothing
    return next(w for w, t in zip(ways, best, strict=True) if t <= 1.1 * min(best))


def _seconds(model: Denoiser, way: TrainConfig, descend: Callable[[TrainConfig], object]) -> float:
    """One forward and backward pass; weights keep their values and their layout."""
    before = {name: p.data for name, p in model.named_parameters()}
    arrange(model, way.layout)
    _wait(torch.device(way.device))
    start = time.perf_counter()
    descend(way)
    _wait(torch.device(way.device))
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    for name, p in model.named_parameters():
        p.data = before[name]
    return seconds


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
