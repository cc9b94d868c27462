"""Data sets of the Hugging Face hub, through the optional library `datasets`.

`hub:NAME` or `hub:NAME:CONFIGURATION` learns one column: pictures, or numbers of one shape. Read
at once, the set lies in the library's own mapped files and pictures are decoded batch by batch;
a split called "test" is the test set if the training split is "train".

With `data.streaming` nothing but the samples asked for is fetched. The first `HELD_OUT` samples
are held out for testing (a tenth if the limit is small) and the rest pass through a shuffle buffer
whose order is a function of the seed and the epoch, so that the sample at a position is always
the same. To resume at a position, the samples before it are read over: that costs their transfer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError, UsageError
from kakusan.training.config import DataConfig
from kakusan.training.data.arrays import HeldRows
from kakusan.training.data.codecs import Codec, PixelCodec
from kakusan.training.data.images import Target, target_of
from kakusan.training.data.sources import (
    Batch,
    Data,
    Found,
    Part,
    Rows,
    Stream,
    class_labels,
    numbered,
    same_layout,
)

HELD_OUT = 1000
BUFFER = 1000
LABELS = ("label", "labels")


class HubRows(Rows):
    """One column of a data set on disk, decoded when asked for."""

    def __init__(self, table: Any, column: str, target: Target | None, name: str) -> None:
        self.table, self.column, self.target, self.name = table, column, target, name

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: np.ndarray) -> np.ndarray:
        """The cells with these numbers in one array."""
        cells = self.table[[int(i) for i in index]][self.column]
        return stacked(cells, self.target, self.name)

    def fit(self, index: np.ndarray) -> Codec:
        """Pixels for pictures."""
        assert self.target is not None, "columns of numbers are held in memory"
        return PixelCodec((self.target.channels, self.target.height, self.target.width))


class HubStream(Stream):
    """The endless, seeded order of a streamed data set behind its held-out samples.

    Arguments:
        table: The library's iterable data set, held-out samples skipped.
        columns: The name of the learned column, and of the labels or None.
        codec: Encodes what is read.
        target: The shape of pictures, None for numbers.
        name: For sentences.
        seed: Chooses the order.
        classes: How many classes the labels may name.
    """

    def __init__(
        self,
        table: Any,
        columns: tuple[str, str | None],
        codec: Codec,
        target: Target | None,
        name: str,
        seed: int,
        classes: int = 0,
    ) -> None:
        self.table, self.columns, self.codec = table, columns, codec
        self.target, self.name, self.seed, self.classes = target, name, seed, classes
        self._length: int | None = None

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """Batches of `size` from position `start`; they run across the ends of epochs."""
        if size < 1 or start < 0:
            raise UsageError(f"batches of {size} from position {start}: both must be positive")
        rows: list[dict[str, Any]] = []
        for row in self._rows(start):
            rows.append(row)
            if len(rows) == size:
                yield self._batch(rows)
                rows = []

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        epoch, skip = 0, start
        while True:
            seen = 0
            for row in self._epoch(epoch).skip(skip):
                seen += 1
                yield row
            if seen:
                self._length = skip + seen
                epoch, skip = epoch + 1, 0
                continue
            # the position lies in a later epoch; its number needs the length, counted once
            if self._length is None:
                self._length = sum(1 for _ in self.table)
            if self._length == 0:
                raise KakusanError(f"{self.name} has no samples behind those held out")
            epoch, skip = epoch + skip // self._length, skip % self._length

    def _epoch(self, epoch: int) -> Any:
        return self.table.shuffle(seed=self.seed * 1_000_003 + epoch, buffer_size=BUFFER)

    def _batch(self, rows: list[dict[str, Any]]) -> Batch:
        column, label = self.columns
        x = self.codec.encode(stacked([r[column] for r in rows], self.target, self.name))
        if label is None:
            return x, None
        labels = class_labels([r[label] for r in rows], len(rows), self.name)
        if labels.max() >= self.classes:
            raise KakusanError(
                f"{self.name} holds the label {labels.max()}, but the {self.classes} classes were "
                "counted on its first samples; train without labels (model.labels=none) or read "
                "it at once (data.streaming=false)"
            )
        return x, torch.from_numpy(labels)


def read_hub(config: DataConfig) -> Found:
    """A data set read at once, with its own test split where there is one."""
    table = _load(config, config.split)
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    found, classes = _found(table, config, config.source)
    if config.split != "train" or "test" not in _splits(config):
        return Found(found.rows, found.labels, classes)
    test, _ = _found(_load(config, "test"), config, f"{config.source} [test]")
    return Found(found.rows, found.labels, classes, test)


def stream_hub(
    config: DataConfig, seed: int, test_index: Tensor | None = None, codec: Codec | None = None
) -> Data:
    """A data set read while training; the first samples are held out and kept in memory."""
    table = _load(config, config.split)
    if config.limit is not None:
        table = table.take(config.limit)
    fraction = max(1, config.limit // 10) if config.limit else HELD_OUT
    count = min(HELD_OUT, fraction) if test_index is None else len(test_index)
    head = list(table.take(count))
    if len(head) < count:
        count = len(head) // 2
        head = head[:count]
    if not head:
        raise KakusanError(f"{config.source} is empty: there is no sample to learn from")
    columns = _columns(head[0], config)
    target = _target(head[0][columns[0]], config)
    cells = stacked([r[columns[0]] for r in head], target, config.source)
    rows = HeldRows(cells, f"{config.source} [held out]")
    index = np.arange(count)
    fitted = rows.fit(index)
    if codec is not None:
        same_layout(codec, fitted, config.source, "the run was trained on")
    labels = columns[1] and class_labels([r[columns[1]] for r in head], count, config.source)
    labels = labels if isinstance(labels, np.ndarray) else None
    classes = _class_names(table, columns[1]) or numbered(labels)
    known = len(classes or ())
    stream = HubStream(
        table.skip(count), columns, codec or fitted, target, config.source, seed, known
    )
    test = Part(rows, index, labels, codec or fitted)
    return Data(config.source, codec or fitted, stream, test, classes, torch.arange(count))


def stacked(cells: list[Any], target: Target | None, name: str) -> np.ndarray:
    """Pictures or numbers in one array, refused if they have no one shape."""
    if target is not None:
        return np.stack([target.bring(cell, f"a picture of {name}") for cell in cells])
    arrays = [np.asarray(cell) for cell in cells]
    shapes = sorted({a.shape for a in arrays})
    if len(shapes) > 1:
        raise KakusanError(f"{name} holds samples of the shapes {shapes[0]} and {shapes[1]}")
    return np.stack(arrays)


def _found(table: Any, config: DataConfig, name: str) -> tuple[Found, tuple[str, ...] | None]:
    if len(table) == 0:
        raise KakusanError(f"{name} is empty: there is no sample to learn from")
    first = table[0]
    column, label = _columns(first, config)
    target = _target(first[column], config)
    if target is None:
        rows: Rows = HeldRows(stacked(list(table[column]), None, name), name)
    else:
        rows = HubRows(table, column, target, name)
    if label is None:
        return Found(rows), None
    labels = class_labels(list(table[label]), len(rows), name)
    return Found(rows, labels), _class_names(table, label) or numbered(labels)


def _load(config: DataConfig, split: str) -> Any:
    library = _library()
    name, _, configuration = config.source.removeprefix("hub:").partition(":")
    try:
        return library.load_dataset(
            name, configuration or None, split=split, streaming=config.streaming
        )
    except Exception as error:  # the library raises what its many back ends raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise KakusanError(
            f"the split '{split}' of {config.source} could not be read: {reason[0]}"
        ) from None


def _splits(config: DataConfig) -> list[str]:
    name, _, configuration = config.source.removeprefix("hub:").partition(":")
    return list(_library().get_dataset_split_names(name, configuration or None))


def _library() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise KakusanError(
            'hub data sets need the library `datasets`: pip install "kakusan[data]"'
        ) from None
    return datasets


def _columns(row: dict[str, Any], config: DataConfig) -> tuple[str, str | None]:
    """The column to learn and the one with labels, checked against a row."""
    for name in filter(None, (config.column, config.labels)):
        if name not in row:
            near = difflib.get_close_matches(name, list(row), 1)
            hint = f", did you mean '{near[0]}'?" if near else ";"
            raise UsageError(
                f"{config.source} has no column '{name}'{hint} It has {', '.join(row)}: "
                "give data.column and data.labels"
            )
    label = config.labels or next((n for n in LABELS if n in row and n != config.column), None)
    return config.column, label


def _target(cell: Any, config: DataConfig) -> Target | None:
    """The shape of pictures; None where the cells are numbers."""
    from PIL.Image import Image

    return target_of(cell, config, config.source) if isinstance(cell, Image) else None


def _class_names(table: Any, label: str | None) -> tuple[str, ...] | None:
    features = getattr(table, "features", None) or {}
    names = getattr(features.get(label), "names", None)
    return tuple(names) if names else None
