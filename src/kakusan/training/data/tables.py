"""Tables: CSV (also gzipped) and Parquet files, one sample a row.

Integer and float columns are learned as numbers; text, bool and dictionary columns as categories
of at most 100 levels. Empty cells, NA, NaN and null are missing in a CSV; null and NaN in Parquet.
What happens to rows with missing values is the user's choice: refuse them, drop them, or impute
the column's median or most frequent level. `data.labels` names a column that becomes the class
label instead of being learned. Row numbers count from 0, without the header line.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError, UsageError
from kakusan.training.config import DataConfig
from kakusan.training.data.codecs import Codec, moments
from kakusan.training.data.columns import (
    Category,
    Column,
    Number,
    TableCodec,
    as_text,
    decimals,
    flat,
    type_text,
)
from kakusan.training.data.sources import Found, Rows

if TYPE_CHECKING:
    import pyarrow as pa

MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL"]
MAX_LEVELS = 100
MAX_CLASSES = 1000


class TableRows(Rows):
    """Rows of a table, held as the matrix of codes that `columns` describe.

    Arguments:
        table: A table without missing values.
        codec: Its columns, before statistics.
        name: The file.
    """

    def __init__(self, table: pa.Table, codec: TableCodec, name: str) -> None:
        self.table, self.codec, self.name = table, codec, name
        self.codes = codec.codes(table)

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, index: np.ndarray) -> pa.Table:
        """The rows with these numbers, as a table of the learned columns."""
        return self.table.take(index)

    def fit(self, index: np.ndarray) -> Codec:
        """Means and deviations of the numeric columns over these rows."""
        means, stds = moments(iter([torch.from_numpy(self.codes[index])]))
        columns = [
            replace(c, mean=m, std=s, decimals=decimals(self.codes[index, i]))
            if isinstance(c, Number)
            else c
            for i, (c, m, s) in enumerate(zip(self.codec.columns, means, stds, strict=True))
        ]
        return replace(self.codec, columns=tuple(columns))

    def encode(self, index: np.ndarray, codec: Codec) -> Tensor:
        """The rows with these numbers as model values, straight from the codes."""
        assert isinstance(codec, TableCodec)
        return codec.expand(self.codes[index])


def read_table(path: Path, config: DataConfig) -> Found:
    """The rows of a CSV or Parquet file.

    Raises:
        KakusanError: A damaged file, a column that cannot be learned, or missing values that
            were not to be dropped or imputed; file, column and first row are named.
        UsageError: A column that the file does not have.
    """
    table = _open(path).slice(0, config.limit)
    order = table.column_names
    names, label = _chosen(table, config, path)
    used = [*names, label] if label else names
    table = _without_missing(table.select(used), config, label, path)
    if table.num_rows == 0:
        raise KakusanError(f"{path} holds no row without missing values to learn from")
    columns = tuple(_column(table, name, path) for name in names)
    if label is None:
        return Found(TableRows(table.select(names), TableCodec(columns), str(path)))
    classes = _label(table, label, path)
    place = len(names) if config.columns else order.index(label)
    codec = TableCodec(columns, classes, place)
    labels = classes.codes(flat(table, label)).astype(np.int64)
    return Found(TableRows(table.select(names), codec, str(path)), labels, classes.levels)


def _open(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            convert = csv.ConvertOptions(null_values=MISSING, strings_can_be_null=True)
            table = csv.read_csv(path, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise KakusanError(f"{path} is damaged or no table: {reason}") from None
    if table.num_rows == 0:
        raise KakusanError(f"{path} is empty: it has no rows")
    repeated = [n for n in table.column_names if table.column_names.count(n) > 1]
    if repeated:
        raise KakusanError(f"{path} has more than one column '{repeated[0]}': rename one")
    return table


def _chosen(table: pa.Table, config: DataConfig, path: Path) -> tuple[list[str], str | None]:
    """The columns to learn, in the user's order or the file's, and the label column."""
    known = table.column_names
    for name in [*(config.columns or []), *([config.labels] if config.labels else [])]:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean '{near[0]}'?" if near else ";"
            raise UsageError(f"{path} has no column '{name}'{hint} It has {', '.join(known)}")
    names = [n for n in config.columns or known if n != config.labels]
    if not names:
        raise UsageError(f"no column of {path} is left to learn")
    if len(set(names)) < len(names):
        raise UsageError(f"data.columns names a column twice: {', '.join(names)}")
    return names, config.labels


def _without_missing(
    table: pa.Table, config: DataConfig, label: str | None, path: Path
) -> pa.Table:
    """Refuses, drops or imputes; afterwards nothing is missing and numbers are finite."""
    import pyarrow as pa

    keep = np.ones(table.num_rows, bool)
    for k, name in enumerate(table.column_names):
        column = flat(table, name)
        missing = column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        _refuse_infinite(column, name, path)
        if not missing.any():
            continue
        if config.missing == "refuse" or (config.missing == "impute" and name == label):
            raise KakusanError(
                f"{path} has {missing.sum()} missing values in column '{name}', the first in row "
                f"{int(missing.argmax())} (counted from 0): give data.missing=drop"
                + ("" if name == label else " or impute")
            )
        if config.missing == "drop":
            keep &= ~missing
        else:
            table = table.set_column(k, name, _imputed(column, missing, name, path))
    return table if keep.all() else table.filter(pa.array(keep))


def _imputed(column: pa.Array, missing: np.ndarray, name: str, path: Path) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if missing.all():
        raise KakusanError(f"column '{name}' of {path} holds no values: leave it out")
    present = column.filter(pa.array(~missing))
    if _is_number(column.type):
        median = np.median(present.to_numpy(zero_copy_only=False).astype(np.float64))
        whole = pa.types.is_integer(column.type)
        value = pa.scalar(int(np.rint(median)) if whole else float(median)).cast(column.type)
        return pc.call_function("if_else", [pa.array(missing), value, column])
    levels, counts = np.unique(as_text(present).to_pylist(), return_counts=True)
    plain = column.type.value_type if isinstance(column.type, pa.DictionaryType) else column.type
    filled = as_text(column).fill_null(str(levels[counts.argmax()])).cast(plain)
    if isinstance(column.type, pa.DictionaryType):
        return filled.dictionary_encode().cast(column.type)
    return filled


def _refuse_infinite(column: pa.Array, name: str, path: Path) -> None:
    import pyarrow as pa

    if not pa.types.is_floating(column.type):
        return
    infinite = np.isinf(column.to_numpy(zero_copy_only=False).astype(np.float64))
    if infinite.any():
        row = int(infinite.argmax())
        raise KakusanError(
            f"{path} holds the value {column[row].as_py()} in column '{name}', row {row} (counted "
            "from 0): remove or mend that row, only finite numbers can be learned"
        )


def _column(table: pa.Table, name: str, path: Path) -> Column:
    import pyarrow as pa

    column = flat(table, name)
    kind = column.type
    if _is_number(kind):
        return Number(name, type_text(kind))
    plain = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    text = pa.types.is_string(plain) or pa.types.is_large_string(plain)
    if not (text or pa.types.is_boolean(plain) or pa.types.is_string_view(plain)):
        raise KakusanError(
            f"column '{name}' of {path} has type {kind}; numbers, text and bool can be learned: "
            "convert it, or leave it out by naming the others in data.columns"
        )
    levels = sorted(set(as_text(column).to_pylist()))
    if len(levels) > MAX_LEVELS:
        raise KakusanError(
            f"column '{name}' of {path} has {len(levels)} different values, at most {MAX_LEVELS} "
            "can be learned as categories: leave it out by naming the others in data.columns"
        )
    return Category(name, type_text(kind), tuple(levels))


def _label(table: pa.Table, name: str, path: Path) -> Category:
    """The label column as a category; whole numbers are sorted as numbers."""
    import pyarrow as pa

    column = flat(table, name)
    if not pa.types.is_integer(column.type):
        if _is_number(column.type):
            raise KakusanError(
                f"the label column '{name}' of {path} has type {column.type}, expected whole "
                "numbers or text"
            )
        found = _column(table, name, path)
        assert isinstance(found, Category)
        return found
    levels = sorted(set(column.to_pylist()))
    if len(levels) > MAX_CLASSES:
        raise KakusanError(
            f"the label column '{name}' of {path} has {len(levels)} different values, at most "
            f"{MAX_CLASSES} can be classes"
        )
    return Category(name, type_text(column.type), tuple(map(str, levels)))


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
