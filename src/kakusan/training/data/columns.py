"""The codec of a table: numbers are standardised, categories become one-hot blocks of +1 and -1.

A column is one of two things. A `Number` (any integer or float type) takes one model value,
(raw - mean) / std; integers are rounded and kept within their type on the way back. A `Category`
(text, bool, dictionary) with k levels takes k model values, +1 at its level and -1 elsewhere; the
largest one decides on the way back. Between file and model stands the matrix of codes: float64,
one column each, holding the number itself or the position of the level.

Types are stored as text, so that a sampled table has the types of the one that was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.training.data.codecs import Codec

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Number:
    """A numeric column; samples are rounded to the decimals that its data have."""

    name: str
    type: str
    mean: float = 0.0
    std: float = 1.0
    decimals: int | None = None
    width: ClassVar[int] = 1

    @property
    def layout(self) -> tuple[Any, ...]:
        """Name and type."""
        return self.name, self.type

    @property
    def unit(self) -> float:
        """The width of 1 in model units."""
        return 1 / self.std

    @property
    def whole(self) -> bool:
        """Whether it is of an integer type."""
        return np.dtype(arrow_type(self.type).to_pandas_dtype()).kind in "iu"

    def codes(self, column: pa.Array) -> np.ndarray:
        """The numbers as float64."""
        return column.to_numpy(zero_copy_only=False).astype(np.float64)

    def expand(self, codes: Tensor) -> Tensor:
        """(B,) codes to (B, 1) model values."""
        return ((codes - self.mean) / self.std)[:, None]

    def restore(self, x: Tensor) -> pa.Array:
        """(B, 1) model values to a column of the stored type."""
        import pyarrow as pa

        kind = arrow_type(self.type)
        dtype = np.dtype(kind.to_pandas_dtype())
        values = (x[:, 0] * self.std + self.mean).numpy()
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            # the largest 64-bit integers round up to floats beyond their type
            top = np.nextafter(float(info.max), 0) if info.bits == 64 else info.max
            values = np.clip(np.rint(values), info.min, top)
        elif self.decimals is not None:
            values = np.round(values, self.decimals)
        return pa.array(values.astype(dtype), kind)


def decimals(values: np.ndarray, most: int = 6) -> int | None:
    """How many decimals write these numbers exactly; None where `most` do not.

    Example:
        >>> decimals(np.array([39.1, 18.25])), decimals(np.array([1 / 3]))
        (2, None)
    """
    for k in range(most + 1):
        if np.allclose(values, np.round(values, k), rtol=1e-12, atol=0):
            return k
    return None


@dataclass(frozen=True)
class Category:
    """A categorical column; levels are kept as text and cast back to the column's type."""

    name: str
    type: str
    levels: tuple[str, ...]
    unit: ClassVar[float] = 2.0  # from -1 to +1: the cells of different levels do not meet
    whole: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """One model value a level."""
        return len(self.levels)

    @property
    def layout(self) -> tuple[Any, ...]:
        """Name, type and levels."""
        return self.name, self.type, self.levels

    def codes(self, column: pa.Array) -> np.ndarray:
        """The positions of the levels as float64."""
        import pyarrow as pa
        import pyarrow.compute as pc

        text = as_text(column)
        found = pc.call_function(
            "index_in", [text], pc.SetLookupOptions(pa.array(self.levels, pa.string()))
        )
        if found.null_count:
            row = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
            raise KakusanError(
                f"row {row} of column '{self.name}' holds {text[row].as_py()!r}, which is none of "
                f"the {self.width} levels learned: {', '.join(self.levels[:5])}..."
            )
        return found.to_numpy(zero_copy_only=False).astype(np.float64)

    def expand(self, codes: Tensor) -> Tensor:
        """(B,) codes to (B, k) model values, +1 at the level and -1 elsewhere."""
        return 2.0 * torch.nn.functional.one_hot(codes.long(), self.width).double() - 1

    def restore(self, x: Tensor) -> pa.Array:
        """(B, k) model values to a column of the stored type: the largest value wins."""
        return self.named(x.argmax(dim=1))

    def named(self, codes: Tensor) -> pa.Array:
        """(B,) positions to a column of the stored type."""
        import pyarrow as pa

        text = pa.array(self.levels, pa.string()).take(pa.array(codes.cpu().numpy()))
        kind = arrow_type(self.type)
        if isinstance(kind, pa.DictionaryType):
            return text.cast(kind.value_type).dictionary_encode().cast(kind)
        return text.cast(kind)


Column = Number | Category


@dataclass(frozen=True)
class TableCodec(Codec):
    """Rows of a table; `label` is the column taken out as class label, `place` its position.

    Example:
        >>> import pyarrow as pa
        >>> a, b = Number("a", "int64", 1.0, 2.0), Category("b", "string", ("u", "v"))
        >>> codec = TableCodec((a, b))
        >>> x = codec.encode(pa.table({"a": [5], "b": ["v"]}))
        >>> x
        tensor([[ 2., -1.,  1.]])
        >>> codec.decode(x).to_pylist()
        [{'a': 5, 'b': 'v'}]
    """

    kind: ClassVar[str] = "table"
    form: ClassVar[str] = "table"
    columns: tuple[Column, ...]
    label: Category | None = None
    place: int = 0

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> TableCodec:
        """Rebuilds the columns from their JSON records."""
        label = fields["label"]
        columns = tuple(map(_column, fields["columns"]))
        return cls(columns, label and _column(label), fields["place"])  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(d,), one entry a number and one a level."""
        return (sum(c.width for c in self.columns),)

    @property
    def units(self) -> Tensor:
        """Those of each column, once a model value."""
        units = [c.unit for c in self.columns for _ in range(c.width)]
        return torch.tensor(units, dtype=torch.float64)

    @property
    def whole(self) -> Tensor:
        """Integer columns, and levels."""
        return torch.tensor([c.whole for c in self.columns for _ in range(c.width)])

    @property
    def layout(self) -> tuple[Any, ...]:
        """Names, types and levels."""
        label = None if self.label is None else self.label.layout
        return self.form, tuple(c.layout for c in self.columns), label

    def describe(self) -> str:
        """The data this codec reads."""
        names = ", ".join(f"{c.name} ({_brief(c)})" for c in self.columns)
        return f"tables with the columns {names}"

    def codes(self, table: pa.Table) -> np.ndarray:
        """The matrix of codes (B, columns) of a table with the learned columns."""
        missing = [c.name for c in self.columns if c.name not in table.column_names]
        if missing:
            raise KakusanError(f"the table lacks the column '{missing[0]}'")
        arrays = [flat(table, c.name) for c in self.columns]
        codes = np.stack([c.codes(a) for c, a in zip(self.columns, arrays, strict=True)], 1)
        if not np.isfinite(codes).all():
            row, k = np.argwhere(~np.isfinite(codes))[0]
            raise KakusanError(
                f"row {row} of column '{self.columns[k].name}' holds {codes[row, k]}, "
                "expected a finite number"
            )
        return codes

    def expand(self, codes: np.ndarray) -> Tensor:
        """Codes (B, columns) to model values (B, d)."""
        values = torch.from_numpy(codes)
        blocks = [c.expand(values[:, k]) for k, c in enumerate(self.columns)]
        return torch.cat(blocks, dim=1).float()

    def encode(self, raw: pa.Table) -> Tensor:
        """The rows of a table with the learned columns as model values."""
        return self.expand(self.codes(raw))

    def decode(self, x: Tensor) -> pa.Table:
        """A table with the learned columns, in their order and types."""
        import pyarrow as pa

        blocks = x.detach().cpu().double().split([c.width for c in self.columns], dim=1)
        arrays = [c.restore(b) for c, b in zip(self.columns, blocks, strict=True)]
        return pa.table(arrays, [c.name for c in self.columns])

    def with_labels(self, table: pa.Table, labels: Tensor) -> pa.Table:
        """Puts the label column back in its place, for samples drawn with known classes."""
        if self.label is None:
            return table
        return table.add_column(self.place, self.label.name, self.label.named(labels))


def as_text(column: pa.Array) -> pa.Array:
    """Any categorical column as plain text."""
    import pyarrow as pa

    if isinstance(column.type, pa.DictionaryType):
        column = column.cast(column.type.value_type)
    return column.cast(pa.string())


def flat(table: pa.Table, name: str) -> pa.Array:
    """One column in one piece."""
    import pyarrow as pa

    chunks = table.column(name).combine_chunks()
    return pa.concat_arrays(chunks.chunks) if isinstance(chunks, pa.ChunkedArray) else chunks


def type_text(kind: pa.DataType) -> str:
    """The text that `arrow_type` reads back.

    Example:
        >>> import pyarrow as pa
        >>> arrow_type(type_text(pa.dictionary(pa.int8(), pa.string()))).value_type
        DataType(string)
    """
    import pyarrow as pa

    if not isinstance(kind, pa.DictionaryType):
        return str(kind)
    order = "ordered" if kind.ordered else "unordered"
    return f"dictionary {kind.value_type} {kind.index_type} {order}"


def arrow_type(text: str) -> pa.DataType:
    """The type that `type_text` wrote."""
    import pyarrow as pa

    if not text.startswith("dictionary "):
        return pa.type_for_alias(text)
    _, value, index, order = text.split()
    values, indices = pa.type_for_alias(value), pa.type_for_alias(index)
    return pa.dictionary(indices, values, order == "ordered")


def _column(record: dict[str, Any]) -> Column:
    if "levels" in record:
        levels: Sequence[str] = record["levels"]
        return Category(record["name"], record["type"], tuple(levels))
    return Number(**record)


def _brief(column: Column) -> str:
    return column.type if isinstance(column, Number) else f"{column.width} levels"
