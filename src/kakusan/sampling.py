"""Drawing samples from a trained denoiser, batch by batch: the same ones for any batch size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Keyed
from kakusan.errors import UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.solvers.exponential import generate

START, PATH, CLASS = 6, 7, 8  # separate the uses of one seed


class Draw(NamedTuple):
    """What is to be drawn, and how.

    Attributes:
        n: How many samples.
        steps: Evaluations of the network a sample.
        noise: 0 follows the probability flow, 1 Anderson's reverse SDE.
        seed: Fixes every sample.
        labels: Their classes, (n,), or None.
        guidance: The weight of the label.
        batch: How many at a time.
        keep: Whether to keep the way from noise to data.
    """

    n: int
    steps: int
    noise: float
    seed: int
    labels: Tensor | None
    guidance: float
    batch: int
    keep: bool


def check(draw: Draw, labelled: bool, free: bool) -> None:
    """Refuses what cannot be drawn.

    Arguments:
        draw: What is asked for.
        labelled: Whether the model knows labels.
        free: Whether it knows samples without label as well.
    """
    n, steps, noise, guidance, batch = draw.n, draw.steps, draw.noise, draw.guidance, draw.batch
    if min(n, batch, steps) < 1:
        name, value = min((("n", n), ("batch", batch), ("steps", steps)), key=lambda p: p[1])
        raise UsageError(f"{name} must be at least 1, got {value}")
    if not 0 <= noise <= 1:
        raise UsageError(f"noise must lie between 0 and 1, got {noise}")
    if not 0 <= guidance < float("inf"):
        raise UsageError(f"guidance must be a number of at least 0, got {guidance}")
    if guidance != 1 and not labelled:
        raise UsageError(f"guidance {guidance} needs labels, and this model knows none")
    if guidance != 1 and not free:
        raise UsageError(
            f"guidance {guidance} needs a model that has seen samples without label, and this "
            "one was trained with model.label_dropout=0"
        )


@torch.no_grad()
def batches(net: Denoiser, shape: tuple[int, ...], draw: Draw) -> Iterator[Tensor]:
    """Samples (b, *shape), or their paths (steps + 1, b, *shape), on the CPU."""
    process = net.process
    like = torch.empty(0, device=next(net.parameters()).device)
    end = torch.tensor(process.span[1], dtype=torch.float64)
    # x_T has the variance of its kernel and what is left of the data's
    size = torch.hypot(process.sigma(end), process.alpha(end) * net.data_std).item()
    for i in range(0, draw.n, draw.batch):
        b = min(draw.batch, draw.n - i)
        x1 = size * Keyed(draw.seed, i, START).normal(0, (b, *shape), like)
        given = None if draw.labels is None else draw.labels[i : i + b].to(like.device)
        score, source = net.given(given, draw.guidance), Keyed(draw.seed, i, PATH)
        yield generate(process, score, x1, draw.steps, draw.noise, source, draw.keep).cpu()


def labels(
    classes: tuple[str, ...] | None,
    shares: tuple[float, ...] | None,
    n: int,
    label: Any = None,
    seed: int = 0,
) -> Tensor | None:
    """The classes of n samples, (n,); None without labels.

    Arguments:
        classes: The names of the classes, or None.
        shares: How often each is drawn where nobody names one.
        n: How many.
        label: A class, by name or index, or a list that is repeated.
        seed: Fixes the draw.
    """
    if classes is None or shares is None:
        if label is not None:
            raise UsageError("this model was trained without labels, so it cannot follow one")
        return None
    if label is None:
        share = torch.tensor(shares, dtype=torch.float64)
        u = Keyed(seed, 0, CLASS).uniform(0, (n,), share)
        return torch.searchsorted(share.cumsum(0), u).clamp(max=len(classes) - 1)
    asked = label if isinstance(label, (list, tuple)) else [label]
    if not asked:
        raise UsageError(f"no class to draw was named; this model knows {', '.join(classes)}")
    index = torch.tensor([_index(classes, name) for name in asked])
    return index.repeat(-(-n // len(index)))[:n]


def given(classes: tuple[str, ...] | None, n: int, label: Any, free: bool = True) -> Tensor | None:
    """The classes of n samples that are at hand, (n,), as their owner named them; None for none.

    Arguments:
        classes: The names of the classes, or None.
        n: How many samples.
        label: A class, by name or index, a list of n, or a tensor (n,), where -1 is no label.
        free: Whether the model knows samples without label.
    """
    if label is None:
        if classes and not free:
            raise UsageError(
                "this model has seen no sample without label (model.label_dropout=0): name a "
                f"class, one of {', '.join(classes)}"
            )
        return None
    if classes is None:
        raise UsageError("this model was trained without labels, so it cannot follow one")
    if not isinstance(label, Tensor):
        asked = label if isinstance(label, (list, tuple)) else [label] * n
        label = torch.tensor([_index(classes, name) for name in asked])
    if label.shape != (n,) or label.is_floating_point():
        raise UsageError(
            f"the labels of {n} samples are whole numbers ({n},), got {label.dtype} of shape "
            f"{tuple(label.shape)}"
        )
    if not bool(((label >= -1) & (label < len(classes))).all()):
        raise UsageError(
            f"labels run from 0 to {len(classes) - 1}, or -1 for none; got {label.min().item()} "
            f"to {label.max().item()}"
        )
    return label.long()


def _index(classes: tuple[str, ...], name: int | str) -> int:
    if str(name) in classes:
        return classes.index(str(name))
    if str(name).isdigit() and int(name) < len(classes):
        return int(name)
    raise UsageError(f"no class {name!r}; this model knows {', '.join(classes)}")
