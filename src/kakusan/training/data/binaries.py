"""Two classic binary layouts, read from a folder the user names.

IDX (MNIST, Fashion-MNIST, and any set in the same form): two zero bytes, a type byte (8 for
unsigned bytes), the number of axes, each size as a big-endian 32-bit number, then the values;
plain or gzipped. CIFAR-10: records of 3,073 bytes, one label and 3 x 32 x 32 pixels. Both come
with a test set, which is used where its file lies beside the training files.

Reference:
    The MNIST database (LeCun, Cortes, Burges); Learning multiple layers of features from tiny
    images (Krizhevsky, 2009).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from kakusan.errors import KakusanError
from kakusan.training.data.arrays import HeldRows, with_classes
from kakusan.training.data.sources import Found, class_labels

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR_RECORD = 1 + 3 * 32 * 32


def find_idx(folder: Path, part: str, what: str) -> Path | None:
    """The IDX file of one part ("train" or "t10k") and kind ("images" or "labels")."""
    axes = 3 if what == "images" else 1
    stems = (f"{part}-{what}-idx{axes}-ubyte", f"{part}-{what}.idx{axes}-ubyte")
    paths = [folder / (stem + end) for stem in stems for end in ("", ".gz")]
    return next((p for p in paths if p.is_file()), None)


def read_idx_folder(folder: Path) -> Found:
    """A folder with train-images-idx3-ubyte and, if there, its labels and t10k test set."""
    train = _idx_part(folder, "train")
    if train is None:
        raise KakusanError(
            f"{folder} holds no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
        )
    test = _idx_part(folder, "t10k")
    return with_classes(train.rows, train.labels, test)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of one IDX file, its magic number and size checked.

    Raises:
        KakusanError: The file is damaged, truncated or not IDX; it is named.
    """
    raw = _unpacked(path)
    axes = raw[3] if len(raw) > 3 else 0
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= axes <= 4 or len(raw) < 4 + 4 * axes:
        head = raw[:4].hex(" ") or "nothing"
        raise KakusanError(f"{path} is no IDX file of unsigned bytes: it begins with {head}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", axes, 4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    expected = int(np.prod(shape, dtype=np.float64))
    if len(values) != expected:
        raise KakusanError(
            f"{path} is damaged: its header says {shape}, {expected} values, but it holds "
            f"{len(values)}; fetch it again"
        )
    return values.reshape(shape)


def read_cifar_folder(folder: Path) -> Found:
    """A folder with data_batch_*.bin and, if there, test_batch.bin."""
    rows, labels = _cifar(sorted(folder.glob("data_batch_*.bin")), str(folder))
    test = None
    if (folder / "test_batch.bin").is_file():
        test = Found(*_cifar([folder / "test_batch.bin"], str(folder / "test_batch.bin")))
    return Found(rows, labels, CIFAR_CLASSES, test)


def _idx_part(folder: Path, part: str) -> Found | None:
    path = find_idx(folder, part, "images")
    if path is None:
        return None
    images = read_idx(path)
    if images.ndim not in (3, 4):
        raise KakusanError(f"{path} holds an array of shape {images.shape}, expected images")
    rows = HeldRows(images, str(path))
    label_path = find_idx(folder, part, "labels")
    labels = None
    if label_path is not None:
        labels = class_labels(read_idx(label_path), len(rows), str(label_path))
    return Found(rows, labels)


def _unpacked(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise KakusanError(f"{path} is damaged: {error}; fetch it again") from None


def _cifar(paths: list[Path], name: str) -> tuple[HeldRows, np.ndarray]:
    records = []
    for path in paths:
        raw = np.fromfile(path, np.uint8)
        if len(raw) == 0 or len(raw) % CIFAR_RECORD:
            raise KakusanError(
                f"{path} is damaged: {len(raw)} bytes are no whole number of CIFAR-10 records of "
                f"{CIFAR_RECORD}; fetch it again"
            )
        table = raw.reshape(-1, CIFAR_RECORD)
        if table[:, 0].max() > 9:
            row = int(np.argmax(table[:, 0] > 9))
            raise KakusanError(
                f"{path} is damaged: record {row} has the label {table[row, 0]}, expected 0 to 9"
            )
        records.append(table)
    images = np.concatenate([t[:, 1:] for t in records]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([t[:, 0] for t in records])
    return HeldRows(images, name), labels.astype(np.int64)
