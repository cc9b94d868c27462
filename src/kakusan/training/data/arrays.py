"""Arrays: data given as a tensor or numpy array, and the files `.npy` and `.npz`.

The shape and type of an array say what it is:

* uint8 (uint16, bool) of shape (N, H, W), (N, C, H, W) or (N, H, W, C) with C in 1..4 and
  H, W > 4: images with integer values up to 255 (65535, 1);
* floats of four dimensions: images whose observed range is mapped to [-1, 1];
* other floats, and integers of shape (N,) or (N, d): vectors, standardised entry by entry; those
  of integers are known to hold whole numbers, and samples are rounded to them.

A `.npy` file above `HELD_BYTES` is mapped, never read as a whole: its statistics come from a
subsample in evenly spaced blocks, and each batch is checked for NaN and infinity when it is read,
so a bad row is named when it is met. Smaller files, `.npz` and arrays are held in memory and
checked at once. Files are read without pickle.
"""

from __future__ import annotations

import difflib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError, UsageError
from kakusan.training.config import DataConfig
from kakusan.training.data.codecs import (
    Codec,
    FloatImageCodec,
    PixelCodec,
    VectorCodec,
    as_tensor,
    moments,
    refuse_non_finite,
)
from kakusan.training.data.sources import Data, Found, Rows, class_labels, numbered, split

HELD_BYTES = 2**28  # up to 256 MB a file is simply read
SUBSAMPLE_BYTES = 2**28  # statistics of a mapped file read about so much
CHUNK_BYTES = 2**24
BLOCKS = 256  # the subsample is so many runs of neighbouring rows, evenly spaced
LEVELS = {"bool": 1, "uint8": 255, "uint16": 65535}


class ArrayRows(Rows):
    """Rows of one array.

    Arguments:
        array: Samples along the first axis.
        name: What to call it in a sentence.
        levels: The largest pixel value, where it is not that of the type.

    Raises:
        KakusanError: The type or shape is none that can be learned.
    """

    def __init__(self, array: np.ndarray, name: str, levels: int | None = None) -> None:
        self.array, self.name = array, name
        _refuse_type(array, name)
        self.shape, self.levels = _layout(array, name)
        self.levels = levels or self.levels

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: np.ndarray) -> np.ndarray:
        """The rows with these numbers; images as (B, C, H, W)."""
        rows = self.array[index]
        if tuple(rows.shape[1:]) == self.shape:
            return rows
        return rows[:, None] if rows.ndim == 3 else np.moveaxis(rows, -1, 1)

    def fit(self, index: np.ndarray) -> Codec:
        """Pixels, floats or vectors, by type and shape."""
        if self.levels is not None:
            return PixelCodec(_three(self.shape), self.levels)
        if len(self.shape) == 3 and self.array.ndim == 4:
            bounds = [(float(c.min()), float(c.max())) for c in self._chunks(index)]
            low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
            return FloatImageCodec(_three(self.shape), low, high)
        mean, std = moments(self._chunks(index))
        return VectorCodec(self.shape, mean, std, integer=self.array.dtype.kind in "biu")

    def _sampled(self, index: np.ndarray) -> np.ndarray:
        return index

    def _chunks(self, index: np.ndarray) -> Iterator[Tensor]:
        index = self._sampled(index)
        row_bytes = self.array.dtype.itemsize * int(np.prod(self.shape))
        for part in np.array_split(index, max(1, len(index) * row_bytes // CHUNK_BYTES)):
            yield as_tensor(self.read(part)).double()


class HeldRows(ArrayRows):
    """An array in memory, checked as a whole when it is made."""

    def __init__(self, array: np.ndarray, name: str, levels: int | None = None) -> None:
        super().__init__(array, name, levels)
        if array.dtype.kind == "f" and len(array):
            first = 0
            for chunk in self._chunks(np.arange(len(array))):
                refuse_non_finite(chunk, name, first)
                first += len(chunk)


class MappedRows(ArrayRows):
    """An array on disk, larger than memory perhaps; every batch is checked when it is read."""

    def read(self, index: np.ndarray) -> np.ndarray:
        """The rows with these numbers, refused if one holds NaN or infinity."""
        rows = super().read(index)
        if rows.dtype.kind == "f":
            refuse_non_finite(as_tensor(rows), self.name, index)
        return rows

    def _sampled(self, index: np.ndarray) -> np.ndarray:
        row_bytes = max(1, self.array.dtype.itemsize * int(np.prod(self.shape)))
        count = min(len(index), max(1024, min(65536, SUBSAMPLE_BYTES // row_bytes)))
        if count == len(index):
            return index
        # blocks, because a disk reads neighbours together and single rows one by one
        block = count // BLOCKS
        starts = np.linspace(0, len(index) - block, BLOCKS).astype(np.int64)
        return index[np.unique(starts[:, None] + np.arange(block))]


def as_data(
    x: Any,
    labels: Any = None,
    *,
    test_fraction: float = 0.15,
    seed: int = 0,
    test_index: Tensor | None = None,
    codec: Codec | None = None,
) -> Data:
    """Data from a tensor or numpy array, told apart as the head of this module says.

    Arguments:
        x: Samples along the first axis.
        labels: One whole number from 0 for every sample, or None.
        test_fraction: The share held out.
        seed: Chooses what is held out.
        test_index: The rows an earlier run held out, instead of drawing them.
        codec: The codec of an earlier run, instead of fitting one.

    Raises:
        KakusanError: The array or its labels cannot be learned; the sentence says why.

    Example:
        >>> data = as_data(np.zeros((10, 8, 8), np.uint8), test_fraction=0.2, seed=0)
        >>> data.codec.shape, len(data.train), len(data.test)
        ((1, 8, 8), 8, 2)
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if not isinstance(x, np.ndarray):
        raise KakusanError(f"expected a tensor or numpy array, got {type(x).__name__}")
    rows = HeldRows(x, "the array")
    whole = None if labels is None else class_labels(labels, len(rows), rows.name)
    found = Found(rows, whole, numbered(whole))
    return split("array", found, test_fraction, seed, None, test_index, codec)


def read_npy(path: Path, config: DataConfig) -> Found:
    """The array of a `.npy` file; `data.labels` may name a second one with the labels."""
    array = open_npy(path)
    large = array.nbytes > HELD_BYTES
    rows = MappedRows(array, str(path)) if large else HeldRows(np.array(array), str(path))
    if config.labels is None:
        return Found(rows)
    labels = class_labels(open_npy(Path(config.labels).expanduser()), len(rows), str(path))
    return Found(rows, labels, numbered(labels))


def read_npz(path: Path, config: DataConfig) -> Found:
    """An `.npz` archive: samples under x, data or images, labels under y or labels.

    An archive with x_train and x_test (and y_train, y_test) brings its own test set.
    """
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        keys = list(archive.files)
        pairs = [("x_train", "y_train"), ("x_test", "y_test")]
        if "x_train" in keys:
            chosen = pairs[: 1 + ("x_test" in keys)]
        else:
            chosen = [_npz_keys(keys, config, path)]
        arrays = [(archive[x], archive[y] if y in keys else None) for x, y in chosen]
    parts = []
    for (x, y), (key, _) in zip(arrays, chosen, strict=True):
        name = f"{path} [{key}]"
        rows = HeldRows(x, name)
        parts.append(Found(rows, None if y is None else class_labels(y, len(rows), name)))
    return with_classes(parts[0].rows, parts[0].labels, parts[1] if len(parts) == 2 else None)


def with_classes(rows: Rows, labels: np.ndarray | None, test: Found | None) -> Found:
    """Numbers the classes, and refuses a test set labelled otherwise than the training set."""
    classes = numbered(labels)
    if test is not None:
        if (labels is None) != (test.labels is None):
            raise KakusanError(f"of {rows.name} and {test.rows.name} only one has labels")
        unknown = 0 if test.labels is None else int(test.labels.max(initial=-1))
        if classes is not None and unknown >= len(classes):
            raise KakusanError(
                f"{test.rows.name} has the label {unknown}, which no training sample has"
            )
    return Found(rows, labels, classes, test)


def open_npy(path: Path) -> np.ndarray:
    """Maps a `.npy` file, without pickle, in a sentence where that fails."""
    if not path.is_file():
        raise KakusanError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise KakusanError(f"{path} is empty: 0 bytes")
    with _reading(path):
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            # an array without elements cannot be mapped, but it can be read
            return np.load(path, allow_pickle=False)


class _reading:  # noqa: N801 - reads as a verb: with _reading(path)
    """Turns what numpy raises about a file into a sentence that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KakusanError):
            return
        if isinstance(error, ValueError) and "Object arrays" in str(error):
            raise KakusanError(
                f"{self.path} holds Python objects, which only pickle could read, and pickle can "
                "run foreign code: save a plain numeric array instead"
            ) from None
        broken = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
        if isinstance(error, broken):
            raise KakusanError(f"{self.path} is damaged or not a numpy file: {error}") from None


def _npz_keys(keys: list[str], config: DataConfig, path: Path) -> tuple[str, str]:
    if config.labels is not None and config.labels not in keys:
        near = difflib.get_close_matches(config.labels, keys, 1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; it holds {', '.join(keys)}"
        raise UsageError(f"{path} has no array '{config.labels}'{hint}")
    labels = config.labels or next((k for k in ("y", "labels") if k in keys), "")
    others = [k for k in keys if k != labels]
    named = [k for k in ("x", "data", "images") if k in others]
    if not named and len(others) != 1:
        raise KakusanError(
            f"{path} holds the arrays {keys}: name the one to learn 'x', 'data' or 'images'"
        )
    return (named or others)[0], labels


def _refuse_type(array: np.ndarray, name: str) -> None:
    if array.dtype.kind == "O":
        raise KakusanError(f"{name} holds Python objects: give a plain numeric array")
    if array.dtype.kind not in "biuf":
        raise KakusanError(
            f"{name} has type {array.dtype}: real numbers are needed (split complex values into "
            "their parts, turn text into numbers)"
        )
    if array.ndim == 0 or array.size == 0:
        raise KakusanError(f"{name} is empty: its shape is {array.shape}")


def _layout(array: np.ndarray, name: str) -> tuple[tuple[int, ...], int | None]:
    """The sample shape, channels first, and the number of levels for integer images."""
    kind, shape = array.dtype.kind, tuple(array.shape[1:])
    levels = LEVELS.get(array.dtype.name)
    last = len(shape) == 3 and shape[0] > 4 and shape[1] > 4 and shape[2] <= 4
    first = (shape[2], *shape[:2]) if last else shape
    if kind == "f" or array.ndim <= 2:
        return first, None
    if levels is not None and array.ndim in (3, 4):
        return ((1, *shape) if array.ndim == 3 else first), levels
    raise KakusanError(
        f"{name} has type {array.dtype} and shape {array.shape}, which could mean images or "
        "vectors: cast it to uint8 for images with values 0 to 255, to float32 otherwise"
    )


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
