"""Data: from a name, file, folder or hub to batches a network can learn from.

`load` follows the configuration; `as_data` takes a tensor or array. Both return `Data`: a codec,
a training part and a test part. One module a kind of source: `toys`, `binaries` (IDX, CIFAR-10),
`images`, `arrays` (.npy, .npz), `tables` and `columns` (.csv, .parquet), `hub`; they share
`codecs` and `sources`. Known names win over files of the same name: write ./digits for a folder.

A choice that the source at hand cannot follow (a crop for a table, say) is refused rather than
silently ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import numpy as np
from torch import Tensor

from kakusan.errors import KakusanError, UsageError
from kakusan.training.config import DataConfig
from kakusan.training.data.arrays import as_data as as_data
from kakusan.training.data.arrays import read_npy, read_npz
from kakusan.training.data.binaries import find_idx, read_cifar_folder, read_idx_folder
from kakusan.training.data.codecs import Codec as Codec
from kakusan.training.data.codecs import FloatImageCodec as FloatImageCodec
from kakusan.training.data.codecs import ImageCodec as ImageCodec
from kakusan.training.data.codecs import PixelCodec as PixelCodec
from kakusan.training.data.codecs import VectorCodec as VectorCodec
from kakusan.training.data.codecs import codec_from_json as codec_from_json
from kakusan.training.data.codecs import whole_cells as whole_cells
from kakusan.training.data.columns import TableCodec as TableCodec
from kakusan.training.data.hub import read_hub, stream_hub
from kakusan.training.data.images import read_image_folder
from kakusan.training.data.sources import Data as Data
from kakusan.training.data.sources import Found, Part, same_layout, split
from kakusan.training.data.sources import Source as Source
from kakusan.training.data.sources import Stream as Stream
from kakusan.training.data.tables import TableRows, read_table
from kakusan.training.data.toys import TOYS, read_digits, read_toy

# what each kind of source does with the options that not every source has
OPTIONS = (
    "size",
    "fit",
    "channels",
    "labels",
    "columns",
    "missing",
    "split",
    "column",
    "streaming",
)
TAKES = {
    "an array file": {"labels"},
    "a table": {"labels", "columns", "missing"},
    "an image folder": {"size", "fit", "channels"},
    "a hub data set": {"size", "fit", "channels", "labels", "split", "column", "streaming"},
}
KNOWN = ("digits", *TOYS)
Check = Callable[[DataConfig, str], None]


def load(
    config: DataConfig, seed: int, test_index: Tensor | None = None, codec: Codec | None = None
) -> Data:
    """Finds the data that `config.source` names and splits them.

    Arguments:
        config: The source and what to do with it.
        seed: Chooses the held-out samples, and draws the toys.
        test_index: The held-out samples of an earlier run, instead of choosing them.
        codec: The codec of an earlier run, instead of fitting one.

    Raises:
        KakusanError: The data are missing, damaged or cannot be learned.
        UsageError: The source is unknown, or cannot follow an option.

    Example:
        >>> data = load(DataConfig(source="digits"), seed=0)
        >>> data.codec.shape, len(data.train), len(data.test), data.classes[:3]
        ((1, 8, 8), 1527, 270, ('0', '1', '2'))
    """
    if config.source.startswith("hub:"):
        _refuse_options(config, "a hub data set")
        if config.streaming:
            return stream_hub(config, seed, test_index, codec)
        found = read_hub(config)
    else:
        found = _find(config, seed)
    return split(config.source, found, config.test_fraction, seed, config.limit, test_index, codec)


def rows_of(config: DataConfig, source: str, seed: int, codec: Codec) -> tuple[Part, str]:
    """All samples that a source names, in their order, encoded by the codec of a model; its name.

    Of data that come with a test set of their own, that set.

    Arguments:
        config: That of the run: which columns are labels, how pictures are cut.
        source: Where the data are.
        seed: Draws the toys.
        codec: That of the model.

    Raises:
        KakusanError: The data are missing, empty or damaged, or no kind that the model knows.
    """
    config = config.model_copy(update={"source": source, "limit": None})
    # the options are the run's: where they mean nothing to this source, nobody asked for them
    hub = source.startswith("hub:")
    found = read_hub(config) if hub else _find(config, seed, lambda *_: None)
    found = found.test or found
    index = np.arange(len(found.rows))
    if not len(index):
        raise KakusanError(f"{found.rows.name} is empty: there is no sample in it")
    other, rows = found.rows.fit(index[:2]), found.rows
    if isinstance(rows, TableRows) and _same_columns(codec, other):
        # by the model's own levels: a few rows need not hold all of them
        rows = TableRows(rows.table, codec, rows.name)
    elif not _fewer_levels(codec, other):
        same_layout(codec, other, rows.name, "the model was trained on")
    name = Path(source.removeprefix("hub:")).name.split(".")[0] or "data"
    return Part(rows, index, found.labels, codec), name


def _same_columns(codec: Codec, found: Codec) -> TypeGuard[TableCodec]:
    """Whether a table has the columns of a codec, in any order and among others."""
    if not isinstance(codec, TableCodec) or not isinstance(found, TableCodec):
        return False
    kinds = {c.name: type(c) for c in found.columns}
    return all(kinds.get(c.name) is type(c) for c in codec.columns)


def _fewer_levels(codec: Codec, found: Codec) -> bool:
    """Whether data may hold the pixels of a codec, in a file whose type has room for more."""
    if not isinstance(codec, PixelCodec) or not isinstance(found, PixelCodec):
        return False
    return codec.shape == found.shape and codec.levels <= found.levels


def _find(config: DataConfig, seed: int, check: Check | None = None) -> Found:
    """Named data, a folder or a file."""
    check = check or _refuse_options
    if config.source in KNOWN:
        check(config, f"'{config.source}'")
        return read_digits() if config.source == "digits" else read_toy(config.source, seed)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _find_folder(path, config, check)
    if not path.exists():
        raise _unknown(config.source, path)
    if path.suffix in (".npy", ".npz"):
        check(config, "an array file")
        return read_npy(path, config) if path.suffix == ".npy" else read_npz(path, config)
    if path.suffix == ".parquet" or path.name.endswith((".csv", ".csv.gz")):
        check(config, "a table")
        return read_table(path, config)
    raise UsageError(
        f"{path} is no kind of file that can be read: .npy, .npz, .csv, .csv.gz and .parquet are, "
        "and folders of pictures, IDX or CIFAR-10 files"
    )


def _find_folder(path: Path, config: DataConfig, check: Check) -> Found:
    if find_idx(path, "train", "images") or find_idx(path, "t10k", "images"):
        check(config, "an IDX folder")
        return read_idx_folder(path)
    if next(path.glob("data_batch_*.bin"), None):
        check(config, "a CIFAR-10 folder")
        return read_cifar_folder(path)
    check(config, "an image folder")
    return read_image_folder(path, config)


def _refuse_options(config: DataConfig, kind: str) -> None:
    defaults = DataConfig.model_fields
    for option in OPTIONS:
        given = getattr(config, option)
        if option not in TAKES.get(kind, ()) and given != defaults[option].default:
            users = [k for k, options in TAKES.items() if option in options]
            raise UsageError(
                f"data.{option}={given} does not apply to {kind}, only to {' and '.join(users)}"
            )


def _unknown(source: str, path: Path) -> KakusanError:
    """The error for a source that is neither a name nor a path, with the nearest of either."""
    if path.suffix or len(path.parts) > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        return KakusanError(f"there is no file or folder {path}{hint}")
    near = difflib.get_close_matches(source, [*KNOWN, "hub:NAME"], 1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return UsageError(
        f"no data source '{source}'{hint} Known are {', '.join(KNOWN)}, hub:NAME, and the path of "
        "a file or folder"
    )
