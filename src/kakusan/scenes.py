"""What is seen of a sample, in words: a mask, a measurement, some columns.

The words of the verb `condition` become observations in the units of a model, beside what is known
of the sample that was looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from kakusan.core.noise import generator
from kakusan.errors import KakusanError, UsageError
from kakusan.inference.guidance.common import projected
from kakusan.processes.observations import Coordinates, Event, Linear, Measured, Observation
from kakusan.training.data import TableCodec
from kakusan.training.data.columns import Number
from kakusan.training.data.images import MODES, Target

if TYPE_CHECKING:
    from kakusan.pipeline import DiffusionModel

SIDES = ("top", "bottom", "left", "right", "centre")


class Scene(NamedTuple):
    """What is looked at, and what of it is seen.

    Attributes:
        observation: How it is seen.
        y: What was seen, (1, k).
        words: The same for a sentence.
        original: The whole, (*shape), where it is known.
        seen: A picture of y, (*shape).
        open: The numbers that nobody saw, (*shape), as booleans.
        label: A class that was given.
    """

    observation: Observation
    y: Tensor
    words: str
    original: Tensor | None
    seen: Tensor | None
    open: Tensor
    label: str | None


# --- pictures


def looked_at(model: DiffusionModel, row: int, image: Path | None) -> tuple[Tensor, str]:
    """A held-out picture, or one of the user's, (*shape) in model units; and its name."""
    if model.codec.kind != "images":
        raise UsageError(
            f"--mask and --measure look at pictures, and this model draws {model.codec.kind}: "
            "--given column=value fixes numbers"
        )
    if image is not None:
        return _opened(model, image), str(image)
    if row < 0:
        raise UsageError(f"rows are counted from 0, got {row}")
    rows, name = model.rows(None, row + 1)
    if row >= len(rows):
        raise UsageError(f"there is no row {row}: {name} data end at row {len(rows) - 1}")
    return rows[row], f"row {row} of the {name} data"


def _opened(model: DiffusionModel, path: Path) -> Tensor:
    """A picture file in model units; black is -1 and white 1."""
    from PIL import Image

    channels, high, wide = model.codec.shape
    if channels not in MODES:
        raise UsageError(f"a picture file has 1 to 4 channels, and this model draws {channels}")
    try:
        with Image.open(path) as image:
            if image.size != (wide, high):
                raise UsageError(
                    f"{path} is {image.width}x{image.height} pixels, and this model draws "
                    f"{wide}x{high}: cut or resize it first"
                )
            pixels = Target(channels, high, wide).bring(image, str(path))
    except OSError as error:
        raise KakusanError(f"{path} cannot be read as a picture: {error}") from None
    return torch.tensor(pixels).float() / 127.5 - 1


def pictured(
    model: DiffusionModel,
    original: Tensor,
    name: str,
    mask: str | None,
    measure: str | None,
    std: float | None,
    seed: int,
) -> Scene:
    """What is seen of a picture."""
    shape, like = model.codec.shape, original.unsqueeze(0)
    if mask is not None:
        hidden = hidden_part(mask, shape, seed)
        sight, open_ = Coordinates(~hidden, std or 0.0), hidden
        words = f"{name} without {_hidden_words(mask)}"
    else:
        assert measure is not None
        std = 0.05 if std is None else std
        sight, open_ = measurement(measure, shape, std, seed), torch.ones(shape, dtype=torch.bool)
        words = f"{name} through {measure}"
    y = sight.draw(like, generator(seed, 1))
    return Scene(sight, y, words, original, _shown(sight, y, measure, shape), open_, None)


def _hidden_words(mask: str) -> str:
    kind, _, rest = mask.partition(":")
    if kind == "random":
        return f"{100 * float(rest or 0.5):g}% of its pixels"
    return f"its {mask}{'' if mask == 'centre' else ' half'}" if mask in SIDES else mask


def hidden_part(mask: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Which numbers of a picture (C, H, W) a mask hides, as booleans.

    Example:
        >>> hidden_part("left", (1, 2, 4), 0).int().tolist()
        [[[1, 1, 0, 0], [1, 1, 0, 0]]]
    """
    _, H, W = shape
    hidden = torch.zeros(H, W, dtype=torch.bool)
    kind, _, rest = mask.partition(":")
    if mask in SIDES:
        parts = {
            "top": hidden[: H // 2], "bottom": hidden[H // 2 :],
            "left": hidden[:, : W // 2], "right": hidden[:, W // 2 :],
            "centre": hidden[H // 4 : H - H // 4, W // 4 : W - W // 4],
        }  # fmt: skip
        parts[mask].fill_(True)
    elif kind == "random":
        share = _number(rest or "0.5", mask)
        if not 0 < share < 1:
            raise UsageError(f"random:SHARE hides a share between 0 and 1, got {mask}")
        hidden = torch.rand(H, W, generator=generator(seed, 2)) < share
    else:
        return _mask_file(Path(mask), shape)
    return _partly(hidden.expand(shape), mask)


def _mask_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    from PIL import Image

    if not path.is_file():
        raise UsageError(
            f"no mask {str(path)!r}: it is {', '.join(SIDES)}, random:0.5, or a file, and there "
            "is none of that name"
        )
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.dtype != bool and not np.isin(array, (0, 1)).all():
                raise ValueError(f"a mask is true or false, 1 or 0, and this is {array.dtype}")
            hidden = torch.from_numpy(array != 0)
        else:
            with Image.open(path) as image:
                hidden = torch.from_numpy(np.asarray(image.convert("L")) > 127)
    except (OSError, ValueError) as error:
        raise KakusanError(f"{path} cannot be read as a mask: {error}") from None
    if tuple(hidden.shape) not in (tuple(shape), tuple(shape[1:])):
        raise UsageError(
            f"{path} is a mask of shape {tuple(hidden.shape)}, and pictures of this model are "
            f"{shape[1]} rows of {shape[2]} pixels"
        )
    return _partly(hidden.expand(shape), str(path))


def _partly(hidden: Tensor, mask: str) -> Tensor:
    if not bool(hidden.any()) or bool(hidden.all()):
        raise UsageError(f"{mask} hides {'all' if bool(hidden.any()) else 'nothing'} of a picture")
    return hidden


def measurement(measure: str, shape: tuple[int, ...], std: float, seed: int) -> Linear:
    """A measurement in words, as an observation of pictures (C, H, W)."""
    kind, _, rest = measure.partition(":")
    d = shape[0] * shape[1] * shape[2]
    if kind == "blur":
        width = _number(rest or "1", measure)
        if not 0 < width < float("inf"):
            raise UsageError(f"blur:PIXELS is as wide as a number above 0 says, got {measure}")
        return Measured(lambda x: _blurred(x, width), std)
    if kind == "downsample":
        k = int(_number(rest or "2", measure))
        if k < 2 or shape[1] % k or shape[2] % k:
            raise UsageError(
                f"downsample:K takes means of K x K pixels, and {shape[1]}x{shape[2]} pixels do "
                f"not come apart so for K={k}"
            )
        return Measured(lambda x: avg_pool2d(x, k), std)
    if kind == "project":
        m = int(_number(rest or "16", measure))
        if not 1 <= m < d:
            raise UsageError(f"project:M takes 1 to {d - 1} directions of {d} numbers, got {m}")
        directions = torch.randn(d, m, generator=generator(seed, 3), dtype=torch.float64)
        return Measured(torch.linalg.qr(directions).Q.mT, std)
    raise UsageError(
        f"no measurement {measure!r}; known are blur, blur:2, downsample:2 and project:16"
    )


def _blurred(x: Tensor, width: float) -> Tensor:
    """A Gaussian blur of so many pixels; beyond its edge a picture goes on as at it."""
    reach = max(1, round(3 * width))
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    bell = (-0.5 * (at / width) ** 2).exp()
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
    wide = pad(x, (reach,) * 4, mode="replicate")
    return conv2d(conv2d(wide, bell, groups=x.shape[1]), bell.mT, groups=x.shape[1])


def _shown(sight: Linear, y: Tensor, measure: str | None, shape: tuple[int, ...]) -> Tensor:
    """A picture of what was seen: grey where hidden; blurs as they are, else of least length."""
    if measure is not None and measure.startswith("blur"):
        return y.reshape(shape)
    return projected(sight, y, torch.zeros(1, *shape))[0]


# --- columns


def columns(model: DiffusionModel, given: list[str], std: float, label: str | None) -> Scene:
    """Columns with values, as coordinates of a row in model units."""
    if model.codec.kind == "images":
        raise UsageError("--given fixes columns, and this model draws pictures: --mask hides a "
                         "part of one")  # fmt: skip
    codec, at, values = model.codec, [], []
    named = codec.label.name if isinstance(codec, TableCodec) and codec.label else None
    for word in given:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not value:
            raise UsageError(f"--given is COLUMN=VALUE, got {word!r}")
        if name == named:
            label = value
            continue
        lo, block = (_cell if isinstance(codec, TableCodec) else _entry)(codec, name, value)
        if lo in at:
            raise UsageError(f"{name} was given twice")
        at += range(lo, lo + len(block))
        values += block
    if not at:
        raise UsageError(f"{named} is the class that the model was trained with: kakusan sample "
                         f"RUN --label {label} draws it")  # fmt: skip
    open_ = torch.ones(codec.shape, dtype=torch.bool)
    open_[at] = False
    y, sight = torch.tensor([values]), Coordinates(at, std)
    return Scene(sight, y, ", ".join(given), None, None, open_, label)


def _cell(codec: Any, name: str, value: str) -> tuple[int, list[float]]:
    """Where a column of a table stands in a row, and a value of it in model units."""
    lo = 0
    for column in codec.columns:
        if column.name == name:
            break
        lo += column.width
    else:
        raise UsageError(
            f"no column {name!r}; this model knows {', '.join(c.name for c in codec.columns)}"
        )
    if isinstance(column, Number):
        code = _number(value, name)
    elif value in column.levels:
        code = float(column.levels.index(value))
    else:
        raise UsageError(f"{name} is never {value!r}; it is {', '.join(column.levels)}")
    return lo, column.expand(torch.tensor([code], dtype=torch.float64))[0].tolist()


# --- events


def happening(model: DiffusionModel, text: str, label: str | None) -> Scene:
    """A comparison of two parts of a sample, or of a part with a number, as an event.

    Parts of a picture are `ink`, its mean on a scale from 0 (black) to 1 (white), and that of a
    half, `left`, `right`, `top` or `bottom`; of points x1, x2, ... in their own units.
    """
    for sign in "<>":
        one, found, other = (word.strip() for word in text.partition(sign))
        if found:
            break
    else:
        raise UsageError(f"--event compares, as ink>0.4 or left>right, got {text!r}")
    a, b = _part(model, one), _part(model, other)
    if sign == "<":
        a, b = b, a

    def holds(x: Tensor) -> Tensor:
        return a(x) > b(x)

    holds.__name__ = text
    seen = Event(holds)
    open_ = torch.ones(model.codec.shape, dtype=torch.bool)
    return Scene(seen, torch.ones(1, 1), text, None, None, open_, label)


def _part(model: DiffusionModel, word: str) -> Callable[[Tensor], Tensor]:
    """A number of each sample, (B,), by its name; or a number."""
    codec: Any = model.codec
    halves = {"left": (..., slice(0, codec.shape[-1] // 2)),
              "right": (..., slice(-(codec.shape[-1] // 2), None))}  # fmt: skip
    if len(codec.shape) == 3:
        rows = codec.shape[1] // 2
        halves |= {"top": (..., slice(0, rows), slice(None)),
                   "bottom": (..., slice(-rows, None), slice(None))}  # fmt: skip
    if codec.kind == "images" and (word == "ink" or word in halves):
        at = halves.get(word, (...,))
        return lambda x: (x[at].flatten(1).mean(1) + 1) / 2
    number = word.removeprefix("x")
    if codec.kind == "vectors" and number.isdigit() and number != word:
        i = _entry(codec, word, "0")[0]
        mean, std = float(codec.mean[i]), float(codec.std[i])
        return lambda x: x[:, i] * std + mean
    try:
        value = float(word)
    except ValueError:
        raise UsageError(
            f"--event knows ink, left, right, top and bottom of pictures and x1, x2, ... of "
            f"points, and numbers; not {word!r} of {codec.kind}"
        ) from None
    if not math.isfinite(value) or codec.kind == "images" and not 0 <= value <= 1:
        goes = "ink goes from 0 (black) to 1 (white)" if math.isfinite(value) else "it is finite"
        raise UsageError(f"--event compares with a number, and {goes}; got {word}")
    return lambda x: x.new_full((len(x),), value)


def _entry(codec: Any, name: str, value: str) -> tuple[int, list[float]]:
    """The same for the numbers x1, x2, ... of a vector."""
    d, number = codec.shape[0], name.removeprefix("x")
    if not number.isdigit() or not 1 <= int(number) <= d or name == number:
        raise UsageError(f"no number {name!r}; a sample of this model has x1 to x{d}")
    i = int(number) - 1
    return i, [(_number(value, name) - codec.mean[i]) / codec.std[i]]


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{what} takes a number, got {text!r}") from None
