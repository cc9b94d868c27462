"""Sources: where batches come from, and how a data set becomes a training and a test part.

Three layers, each ignorant of the next:

* `Rows` reads raw samples by number, from memory, a mapped file or a folder of pictures.
* `Source` is one part of a data set: some rows, their labels, and the codec that encodes them.
* `Data` is what the trainer gets: a training part, a test part and how they were told apart.

The split depends on the seed, the test fraction and the number of samples alone, never on the
machine, the batch size or anything drawn before. Statistics come from the training part only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.training.data.codecs import Codec

Batch = tuple[Tensor, Tensor | None]


class Rows(ABC):
    """Raw samples, read by number."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: np.ndarray) -> Any:
        """The raw samples with these numbers, as the codec's `encode` takes them."""

    @abstractmethod
    def fit(self, index: np.ndarray) -> Codec:
        """The codec for these rows, with statistics taken from these numbers only."""

    def encode(self, index: np.ndarray, codec: Codec) -> Tensor:
        """The samples with these numbers as model values."""
        return codec.encode(self.read(index))


class Source(ABC):
    """Random access to one part of a data set."""

    labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """Encoded float32 samples (B, *shape) and int64 labels (B,), or None without labels."""


class Stream(ABC):
    """Samples that arrive in order and without end: after the last comes the first again."""

    @abstractmethod
    def batches(self, size: int, start: int) -> Iterator[Batch]:
        """Batches of `size` samples from position `start` of the endless, seeded order.

        The sample at a position is always the same, so a resumed run asks for the position it
        stopped at. Skipped samples are read over, not stored.
        """


class Part(Source):
    """Some of the rows.

    Arguments:
        rows: Where raw samples are read.
        index: The numbers of this part's rows.
        labels: The class of every one of `rows`, or None.
        codec: Encodes what is read.
    """

    def __init__(
        self, rows: Rows, index: np.ndarray, labels: np.ndarray | None, codec: Codec
    ) -> None:
        self.rows, self.index, self.codec = rows, index, codec
        self.labels = None if labels is None else torch.from_numpy(labels[index])

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: Tensor) -> Batch:
        """Encoded samples and labels at these places of the part."""
        x = self.rows.encode(self.index[index.cpu().numpy()], self.codec)
        return x, None if self.labels is None else self.labels[index.cpu()]


@dataclass(frozen=True)
class Data:
    """What a run learns from.

    `test_index` holds the sorted numbers of the held-out samples of the one original array; it is
    None where the data came with a test set of their own.
    """

    name: str
    codec: Codec
    train: Source | Stream
    test: Source
    classes: tuple[str, ...] | None
    test_index: Tensor | None


@dataclass(frozen=True)
class Found:
    """Data as they were found, before they are split; `test` is a test set they came with."""

    rows: Rows
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    test: Found | None = None


def draw_test_index(n: int, fraction: float, seed: int) -> Tensor:
    """The sorted numbers of the rows held out of n: a function of its arguments alone.

    Example:
        >>> draw_test_index(10, 0.2, seed=0).tolist() == draw_test_index(10, 0.2, seed=0).tolist()
        True
    """
    count = min(max(round(n * fraction), 1), n - 1)
    return torch.randperm(n, generator=keyed("split", seed))[:count].sort().values


def keyed(purpose: str, seed: int, step: int = 0) -> torch.Generator:
    """A generator for one purpose, so that no two uses of a seed share their numbers."""
    key = hashlib.sha256(f"{purpose} {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def split(
    name: str,
    found: Found,
    fraction: float,
    seed: int,
    limit: int | None = None,
    test_index: Tensor | None = None,
    codec: Codec | None = None,
) -> Data:
    """Splits what was found into training and test parts and fits the codec to the former.

    Arguments:
        name: What the data are called.
        found: The data, perhaps with their own test set, which is then used as it is.
        fraction: The share of rows held out where there is no test set.
        seed: Chooses those rows.
        limit: Keep only the first so many samples of either set.
        test_index: The held-out rows of an earlier run, instead of drawing them.
        codec: The codec of an earlier run, instead of fitting one.

    Raises:
        KakusanError: Fewer than two samples, or the earlier run's record does not fit the data.
    """
    n = min(len(found.rows), limit or len(found.rows))
    if n == 0:
        raise KakusanError(f"{found.rows.name} is empty: there is no sample to learn from")
    if found.test is not None:
        if test_index is not None:
            raise KakusanError(
                f"the run held out rows of one array, but {found.rows.name} now comes with a test "
                "set of its own: point data.source at the data the run was trained on"
            )
        train_index, held = np.arange(n), found.test
        rest = np.arange(min(len(held.rows), limit or len(held.rows)))
    else:
        _need_two(n, found.rows.name)
        drawn = draw_test_index(n, fraction, seed) if test_index is None else test_index
        test_index = _checked_index(drawn, n, found.rows.name)
        held, rest = found, test_index.numpy()
        train_index = np.setdiff1d(np.arange(n), rest, assume_unique=True)
    codec = _checked_codec(codec, found.rows, train_index)
    if held is not found:
        same_layout(codec, held.rows.fit(rest[:2]), held.rows.name, "the training set holds")
    train = Part(found.rows, train_index, found.labels, codec)
    test = Part(held.rows, rest, held.labels, codec)
    return Data(name, codec, train, test, found.classes, test_index)


def class_labels(labels: Any, n: int, name: str) -> np.ndarray:
    """Labels as int64 (n,), refused unless they are n whole numbers from 0.

    Example:
        >>> class_labels([0, 2, 1], 3, "toy")
        array([0, 2, 1])
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise KakusanError(f"the labels of {name} have shape {array.shape}, expected ({n},)")
    if len(array) != n:
        raise KakusanError(f"{name} holds {n} samples but {len(array)} labels")
    if array.dtype.kind not in "biuf":
        raise KakusanError(
            f"the labels of {name} have type {array.dtype}, expected whole numbers from 0"
        )
    whole = np.isfinite(array) & (array >= 0) & (np.floor(array) == array)
    if not whole.all():
        row = int(np.flatnonzero(~whole)[0])
        raise KakusanError(
            f"the label of row {row} of {name} is {array[row]}, expected a whole number from 0"
        )
    return array.astype(np.int64)


def numbered(labels: np.ndarray | None) -> tuple[str, ...] | None:
    """Class names for bare numbers: "0" to the largest one seen."""
    return None if labels is None else tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def _need_two(n: int, name: str) -> None:
    if n < 2:
        raise KakusanError(f"{name} holds {n} sample: at least 2 are needed, one to test with")


def _checked_index(index: Tensor, n: int, name: str) -> Tensor:
    index = index.to(torch.int64).cpu()
    if index.ndim != 1 or not 0 < len(index) < n or int(index.min()) < 0 or int(index.max()) >= n:
        top = int(index.max()) if index.numel() else "nothing"
        raise KakusanError(
            f"the run held out {index.numel()} rows up to row {top}, but {name} now holds {n}: "
            "point data.source at the data the run was trained on"
        )
    if len(index.unique()) != len(index):
        raise KakusanError("the stored split names a row twice: its file is damaged")
    return index.sort().values


def _checked_codec(codec: Codec | None, rows: Rows, train_index: np.ndarray) -> Codec:
    if codec is None:
        return rows.fit(train_index)
    same_layout(codec, rows.fit(train_index[:2]), rows.name, "the run was trained on")
    return codec


def same_layout(codec: Codec, found: Codec, name: str, said: str) -> None:
    """Refuses data of another layout than a codec reads."""
    if codec.layout != found.layout:
        raise KakusanError(
            f"{said} {codec.describe()}, but {name} holds {found.describe()}: "
            "both must be the same for one model"
        )
