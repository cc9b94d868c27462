"""Codecs: the map between the values a person has and the float32 values a network sees.

A codec is a frozen record that holds everything the map needs (levels, ranges, means), so a run
that stores its codec as JSON can turn samples back into the user's own units. Four maps exist:

=========  ====================================  ==========================================
form       raw values                            model values
=========  ====================================  ==========================================
pixels     integers 0..levels, (B, C, H, W)      x = 2 raw / levels - 1, in [-1, 1]
floats     reals, (B, C, H, W)                   x = 2 (raw - low) / (high - low) - 1
vectors    reals or integers, (B, *original)     x = (raw - mean) / std, flattened to (B, d)
table      rows of a table (`tables.py`)         numbers standardised, categories one-hot
=========  ====================================  ==========================================

`kind` says what a sample is to its reader: pixels and floats are both "images". Real values are
mapped in float64, results are float32. `decode(encode(raw))` is exact for pixels and for integer
vectors within 8 million of their mean, and within float32 rounding of the standardised value
elsewhere. Encoding checks shape, range and finiteness and refuses with the row.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError, UsageError


class Codec(ABC):
    """Raw values to model values and back; two codecs fit each other if their `layout` agrees."""

    kind: ClassVar[str]
    form: ClassVar[str]
    shape: tuple[int, ...]

    @abstractmethod
    def encode(self, raw: Any) -> Tensor:
        """Turns a raw batch into float32 model values of shape (B, *shape)."""

    @abstractmethod
    def decode(self, x: Tensor) -> Any:
        """Turns model values back into raw ones."""

    @property
    @abstractmethod
    def layout(self) -> tuple[Any, ...]:
        """What is not a statistic: equal for two codecs that read the same data."""

    @abstractmethod
    def describe(self) -> str:
        """The data this codec reads, in a few words for a sentence."""

    @property
    @abstractmethod
    def units(self) -> Tensor:
        """How far model values move where raw ones move by one: float64 of shape `shape`."""

    @property
    def whole(self) -> Tensor:
        """Which entries hold whole numbers only: bool of shape `shape`."""
        return torch.zeros(self.shape, dtype=torch.bool)

    @property
    def cells(self) -> Tensor:
        """The width, in model units, of what one whole number stands for; 0 for reals.

        Noise of this width spreads integers over disjoint cells, so that they have a density
        (dequantisation).
        """
        return self.units * self.whole

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Codec:
        """The codec with these fields, lists turned to tuples already."""
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record from which `codec_from_json` rebuilds the codec."""
        return {"form": self.form, **dataclasses.asdict(self)}  # type: ignore[call-overload]


class ImageCodec(Codec):
    """What both image codecs share: shape (C, H, W) and a view as 8-bit pixels."""

    kind: ClassVar[str] = "images"
    shape: tuple[int, int, int]

    def pixels(self, x: Tensor) -> np.ndarray:
        """Model values as uint8 (B, C, H, W) in 0..255, for pictures."""
        return ((x.detach().cpu().double() + 1) * 127.5).round().clamp(0, 255).byte().numpy()


@dataclass(frozen=True)
class PixelCodec(ImageCodec):
    """Integer images with values 0..levels.

    Example:
        >>> codec = PixelCodec((1, 1, 3), levels=16)
        >>> codec.encode(np.array([[[[0, 8, 16]]]]))
        tensor([[[[-1.,  0.,  1.]]]])
        >>> codec.decode(torch.tensor([[[[-1.2, 0.01, 1.0]]]])).tolist()
        [[[[0, 8, 16]]]]
    """

    form: ClassVar[str] = "pixels"
    shape: tuple[int, int, int]
    levels: int = 255

    def encode(self, raw: Any) -> Tensor:
        """Maps integers 0..levels to [-1, 1]."""
        values = checked(raw, self.shape, torch.float32)
        low, high = (v.item() for v in values.aminmax()) if values.numel() else (0, 0)
        if low < 0 or high > self.levels:
            raise KakusanError(
                f"image values run from {low:g} to {high:g}, expected 0 to {self.levels}"
            )
        return values / (self.levels / 2) - 1

    def decode(self, x: Tensor) -> np.ndarray:
        """Rounds to integers and clips them to 0..levels; uint8, or uint16 for many levels."""
        raw = (x.detach().cpu().double() + 1) * (self.levels / 2)
        whole = raw.round().clamp(0, self.levels).numpy()
        return whole.astype(np.uint8 if self.levels < 256 else np.uint16)

    @property
    def units(self) -> Tensor:
        """One level is 2 / levels wide."""
        return torch.full(self.shape, 2 / self.levels, dtype=torch.float64)

    @property
    def whole(self) -> Tensor:
        """All of them."""
        return torch.ones(self.shape, dtype=torch.bool)

    @property
    def layout(self) -> tuple[Any, ...]:
        """Form, shape and levels."""
        return self.form, self.shape, self.levels

    def describe(self) -> str:
        """The data this codec reads."""
        return f"images of shape {self.shape} with whole numbers from 0 to {self.levels}"


@dataclass(frozen=True)
class FloatImageCodec(ImageCodec):
    """Real-valued images: [low, high] maps to [-1, 1]; values beyond it are not clipped.

    Example:
        >>> FloatImageCodec((1, 1, 2), low=0.0, high=4.0).encode(np.array([[[[1.0, 4.0]]]]))
        tensor([[[[-0.5000,  1.0000]]]])
    """

    form: ClassVar[str] = "floats"
    shape: tuple[int, int, int]
    low: float
    high: float

    @property
    def _half(self) -> float:
        return (self.high - self.low) / 2 or 1.0  # a constant image keeps its scale

    def encode(self, raw: Any) -> Tensor:
        """Maps [low, high] to [-1, 1]."""
        return ((checked(raw, self.shape) - self.low) / self._half - 1).float()

    def decode(self, x: Tensor) -> np.ndarray:
        """Maps [-1, 1] to [low, high], as float32."""
        return ((x.detach().cpu().double() + 1) * self._half + self.low).float().numpy()

    def describe(self) -> str:
        """The data this codec reads."""
        return f"images of shape {self.shape} with real numbers"

    @property
    def units(self) -> Tensor:
        """The range is 2 wide."""
        return torch.full(self.shape, 1 / self._half, dtype=torch.float64)

    @property
    def layout(self) -> tuple[Any, ...]:
        """Form and shape."""
        return self.form, self.shape


@dataclass(frozen=True)
class VectorCodec(Codec):
    """Vectors of any original shape, standardised entry by entry.

    `integer` is true where the raw array was of an integer type: samples are then rounded, and
    every entry is whole. Records from before there were such codecs lack it and read as reals.

    Example:
        >>> codec = VectorCodec((2,), mean=(1.0, 0.0), std=(2.0, 1.0))
        >>> codec.encode(np.array([[5.0, 3.0]]))
        tensor([[2., 3.]])
        >>> codec_from_json(codec.to_json()) == codec
        True
        >>> VectorCodec((1,), (1.0,), (2.0,), integer=True).decode(torch.tensor([[0.4]]))
        array([[2]])
    """

    kind: ClassVar[str] = "vectors"
    form: ClassVar[str] = "vectors"
    original: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    integer: bool = False

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(d,), the entries of the original shape in a row."""
        return (len(self.mean),)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).double(), torch.tensor(self.std).double()

    def encode(self, raw: Any) -> Tensor:
        """Flattens and standardises."""
        values = checked(raw, self.original)
        mean, std = self._moments
        return ((values.reshape(len(values), -1) - mean) / std).float()

    def decode(self, x: Tensor) -> np.ndarray:
        """Undoes the standardisation: float32 of the original shape, int64 where integer."""
        mean, std = self._moments
        raw = (x.detach().cpu().double() * std + mean).reshape(len(x), *self.original)
        if self.integer:
            # a sample of any size must not wrap around
            return raw.round().clamp(-(2.0**62), 2.0**62).long().numpy()
        return raw.float().numpy()

    @property
    def units(self) -> Tensor:
        """One over the standard deviations."""
        return 1 / self._moments[1]

    @property
    def whole(self) -> Tensor:
        """All of them, or none."""
        return torch.full(self.shape, self.integer)

    @property
    def layout(self) -> tuple[Any, ...]:
        """Form and original shape."""
        return self.form, self.original

    def describe(self) -> str:
        """The data this codec reads."""
        return f"vectors of shape {self.original}"


def whole_cells(codec: Codec) -> Tensor:
    """The cells of data that are to be spread over them (dequantised).

    Raises:
        UsageError: No entry holds whole numbers, so there is nothing to spread.

    Example:
        >>> whole_cells(PixelCodec((1, 1, 2), levels=16))
        tensor([[[0.1250, 0.1250]]], dtype=torch.float64)
    """
    if not bool(codec.whole.any()):
        raise UsageError(
            f"dequantisation spreads whole numbers over their cells, and {codec.describe()} hold "
            "none: leave it out (data.dequantise=none), real numbers have a density as they are"
        )
    return codec.cells


def codec_from_json(d: dict[str, Any]) -> Codec:
    """Rebuilds a codec from the record that `Codec.to_json` wrote.

    Arguments:
        d: The record, straight from `json.load`: lists stand for tuples.

    Raises:
        KakusanError: The record names an unknown form or misses a field.
    """
    from kakusan.training.data.columns import TableCodec

    forms = {c.form: c for c in (PixelCodec, FloatImageCodec, VectorCodec, TableCodec)}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k != "form"}
    try:
        return forms[d["form"]].from_fields(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise KakusanError(f"the stored data codec is damaged: {error!r} in {d}") from None


def checked(raw: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A raw batch as a tensor on the CPU, of the expected sample shape and finite."""
    values = as_tensor(raw)
    if tuple(values.shape[1:]) != tuple(shape) or values.ndim == 0:
        expected = ", ".join(map(str, ("B", *shape)))
        raise KakusanError(
            f"data of shape {tuple(values.shape)} do not fit: expected ({expected})"
        )
    refuse_non_finite(values, "the batch", 0)
    return values.to(dtype)


def as_tensor(raw: Any) -> Tensor:
    """A tensor on the CPU from a tensor or array, copying only where torch would complain."""
    if isinstance(raw, Tensor):
        return raw.detach().cpu()
    array = np.asarray(raw)
    if array.dtype.kind not in "biuf":
        raise KakusanError(f"data of type {array.dtype} do not fit: real numbers are needed")
    if not array.flags.writeable or not array.dtype.isnative or array.dtype == np.longdouble:
        array = array.astype(array.dtype.newbyteorder("=")).copy()
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def refuse_non_finite(values: Tensor, name: str, first: int | np.ndarray) -> None:
    """Refuses NaN and infinity, naming the row and the value.

    Arguments:
        values: A batch (B, ...).
        name: The file or object, for the sentence.
        first: The row number of the first entry, or the row numbers of all.
    """
    if not values.is_floating_point() or bool(torch.isfinite(values).all()):
        return
    flat = values.reshape(len(values), -1)
    bad = int((~torch.isfinite(flat)).any(dim=1).nonzero()[0, 0])
    value = flat[bad][~torch.isfinite(flat[bad])][0].item()
    row = first + bad if isinstance(first, int) else int(first[bad])
    raise KakusanError(
        f"{name} holds the value {value} in row {row} (counted from 0): "
        "remove or mend that row, only finite numbers can be learned"
    )


def moments(chunks: Iterator[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every entry, in one pass over chunks (B, ...).

    Chunks are merged by their exact means (Chan, Golub, LeVeque 1979), which unlike a sum of
    squares loses nothing when the mean is large. A constant entry gets the deviation 1.
    """
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        flat = chunk.reshape(len(chunk), -1).double()
        n, m = len(flat), flat.mean(dim=0)
        step = m - mean
        total = count + n
        square = square + ((flat - m) ** 2).sum(dim=0) + step**2 * (count * n / total)
        mean = mean + step * (n / total)
        count = total
    std = (square / count).sqrt()
    if not bool((torch.maximum(std, mean.abs()) < 3e37).all()):
        raise KakusanError("the values are too large for float32: rescale them first")
    # rounding in the mean makes a constant entry look alive at about 1e-16 of its value
    std = torch.where(std <= 1e-14 * mean.abs(), torch.ones_like(std), std)
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())
