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
from pathlib import Path

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
from kakusan.training.data.columns import TableCodec as TableCodec
from kakusan.training.data.hub import read_hub, stream_hub
from kakusan.training.data.images import read_image_folder
from kakusan.training.data.sources import Data as Data
from kakusan.training.data.sources import Found, split
from kakusan.training.data.sources import Source as Source
from kakusan.training.data.sources import Stream as Stream
from kakusan.training.data.tables import read_table
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


def _find(config: DataConfig, seed: int) -> Found:
    """Named data, a folder or a file."""
    if config.source in KNOWN:
        _refuse_options(config, f"'{config.source}'")
        return read_digits() if config.source == "digits" else read_toy(config.source, seed)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _find_folder(path, config)
    if not path.exists():
        raise _unknown(config.source, path)
    if path.suffix in (".npy", ".npz"):
        _refuse_options(config, "an array file")
        return read_npy(path, config) if path.suffix == ".npy" else read_npz(path, config)
    if path.suffix == ".parquet" or path.name.endswith((".csv", ".csv.gz")):
        _refuse_options(config, "a table")
        return read_table(path, config)
    raise UsageError(
        f"{path} is no kind of file that can be read: .npy, .npz, .csv, .csv.gz and .parquet are, "
        "and folders of pictures, IDX or CIFAR-10 files"
    )


def _find_folder(path: Path, config: DataConfig) -> Found:
    if find_idx(path, "train", "images") or find_idx(path, "t10k", "images"):
        _refuse_options(config, "an IDX folder")
        return read_idx_folder(path)
    if next(path.glob("data_batch_*.bin"), None):
        _refuse_options(config, "a CIFAR-10 folder")
        return read_cifar_folder(path)
    _refuse_options(config, "an image folder")
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
