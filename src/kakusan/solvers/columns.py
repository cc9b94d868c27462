r"""A traced step rewritten so that every coordinate of the state is a tensor of its own.

A process in a few dimensions writes x[:, 0], stacks results, multiplies small matrices. Compiled
as it stands, each of these walks strided memory and ends a loop. Written in columns of shape (B,),
one a coordinate, every operation is elementwise over the batch, picking or stacking coordinates
costs nothing, and many steps become one loop that keeps the state in registers.

`Columns` runs a graph of ATen operations on such columns. A value is an array of tensors: NumPy's
object arrays do the broadcasting, indexing and reshaping of everything but the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

aten = torch.ops.aten


class NoColumns(Exception):
    """An operation that mixes samples, or that this module does not know."""


@dataclass
class Batch:
    """A tensor of shape (B, *cells.shape): one tensor of shape (B,), or (), in each cell."""

    cells: np.ndarray

    def tensor(self, B: int) -> Tensor:
        """The value as one tensor again."""
        flat = [c.expand(B) for c in self.cells.ravel()]
        return torch.stack(flat, -1).reshape(B, *self.cells.shape)


def cells(x: Tensor, lead: int = 1) -> np.ndarray:
    """The tensors along all axes of x but the first `lead`."""
    out = np.empty(x.shape[lead:], dtype=object)
    for at in np.ndindex(*out.shape):
        out[at] = x[(slice(None),) * lead + at]
    return out


def _each(call: Callable, array: np.ndarray) -> np.ndarray:
    out = np.empty(array.shape, dtype=object)
    for at in np.ndindex(*array.shape):
        out[at] = call(array[at])
    return out


def _axis(dim: int, rank: int) -> int:
    """An axis of (B, ...) as an axis of the cells."""
    dim = dim % rank
    if dim == 0:
        raise NoColumns("an operation along the batch")
    return dim - 1


def _select(a: np.ndarray, dim: int, index: int) -> np.ndarray:
    return _taken(a, _axis(dim, a.ndim + 1), index)


def _taken(a: np.ndarray, axis: int, index: int) -> np.ndarray:
    return _boxed(a[(slice(None),) * axis + (index,)])


def _slice(
    a: np.ndarray, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> np.ndarray:
    if dim % (a.ndim + 1) == 0 and not start and (end is None or end >= 2**62):
        return a
    at = [slice(None)] * a.ndim
    at[_axis(dim, a.ndim + 1)] = slice(start, end, step)
    return a[tuple(at)]


def _view(a: np.ndarray, shape: list[int]) -> np.ndarray:
    if int(np.prod(shape[1:])) != a.size:
        raise NoColumns("a view that moves the batch")
    return a.reshape(shape[1:])


def _squeeze(a: np.ndarray, dim: Any = None) -> np.ndarray:
    dims = [dim] if isinstance(dim, int) else range(1, a.ndim + 1) if dim is None else dim
    at = tuple(d % (a.ndim + 1) - 1 for d in dims)
    return a.squeeze(tuple(i for i in at if i >= 0 and a.shape[i] == 1))


def _expand(a: np.ndarray, shape: list[int], implicit: bool = False) -> np.ndarray:
    if len(shape) != a.ndim + 1:
        raise NoColumns("an expansion that moves the batch")
    target = [o if s == -1 else s for s, o in zip(shape[1:], a.shape, strict=True)]
    return np.broadcast_to(a, target)


def _permute(a: np.ndarray, dims: list[int]) -> np.ndarray:
    if dims[0] % len(dims) != 0:
        raise NoColumns("an operation that moves the batch")
    return a.transpose([_axis(d, a.ndim + 1) for d in dims[1:]])


def _transpose(a: np.ndarray, i: int, j: int) -> np.ndarray:
    return a.swapaxes(_axis(i, a.ndim + 1), _axis(j, a.ndim + 1))


def _added(a: np.ndarray, axes: tuple[int, ...], keepdim: bool) -> np.ndarray:
    return _boxed(np.add.reduce(a, axis=axes, keepdims=keepdim))


def _boxed(value: Any) -> np.ndarray:
    """An array again, where NumPy gave its only element."""
    if isinstance(value, np.ndarray):
        return value
    box = np.empty((), dtype=object)
    box[()] = value
    return box


def _sum(
    a: np.ndarray, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> np.ndarray:
    axes = tuple(_axis(d, a.ndim + 1) for d in (dim if dim else range(a.ndim + 1)))
    # sums of booleans and integers are int64, as in torch
    whole = not a.flat[0].is_floating_point()
    kind = dtype or (torch.int64 if whole else None)
    return _added(_each(lambda c: c.to(kind), a) if kind else a, axes, keepdim)


def _mean(
    a: np.ndarray, dim: list[int], keepdim: bool = False, *, dtype: Any = None
) -> np.ndarray:
    axes = tuple(_axis(d, a.ndim + 1) for d in dim)
    a = _each(lambda c: c.to(dtype), a) if dtype else a
    count = int(np.prod([a.shape[i] for i in axes]))
    return _each(lambda c: c / count, _added(a, axes, keepdim))


def _unbind(a: np.ndarray, dim: int = 0) -> list[np.ndarray]:
    axis = _axis(dim, a.ndim + 1)
    return [_taken(a, axis, i) for i in range(a.shape[axis])]


def _split(a: np.ndarray, size: int, dim: int = 0) -> list[np.ndarray]:
    axis = _axis(dim, a.ndim + 1)
    return np.split(a, range(size, a.shape[axis], size), axis=axis)


# operations of one value that only move cells about
_MOVES: dict[Any, Callable[..., Any]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.unsqueeze.default: lambda a, dim: np.expand_dims(a, _axis(dim, a.ndim + 2)),
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.alias.default: lambda a: a,
    aten.detach.default: lambda a: a,
    aten.lift_fresh_copy.default: lambda a: a,
}
# operations on each cell by itself that are not tagged as elementwise
_CELLWISE = {
    aten._to_copy.default, aten.clone.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default,
}  # fmt: skip
_LAYOUT = ("memory_format", "layout", "pin_memory", "device")


def tidied(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph without what nothing uses, and without copies into tangents made for them."""
    for node in list(graph.graph.nodes):
        if node.target is aten.copy_.default:
            to, source = node.args[:2]
            made = to.target is aten._new_zeros_with_same_feature_meta.default
            like = isinstance(source, fx.Node) and _kind(to) == _kind(source)
            if made and like and len(to.users) == 1:
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _kind(node: fx.Node) -> Any:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    return None if value is None else (tuple(value.shape), value.dtype)


class Columns(fx.Interpreter):
    """Runs a graph with some of its inputs, and all that follows from them, in columns.

    Raises `NoColumns` where it meets an operation it cannot write so.
    """

    def __init__(self, graph: fx.GraphModule, B: int) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.B = B

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operation."""
        flat = [a for arg in (*args, *kwargs.values())
                for a in (arg if isinstance(arg, list | tuple) else [arg])]  # fmt: skip
        if not any(isinstance(a, Batch) for a in flat):
            return super().call_function(target, args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in _LAYOUT}
        if not isinstance(target, torch._ops.OpOverload):  # getitem of several results
            return target(*args, **kwargs)
        if target is aten._new_zeros_with_same_feature_meta.default:
            # the tangent of something that does not depend on the state
            like = args[1].cells if isinstance(args[1], Batch) else cells(args[1])
            return Batch(_each(torch.zeros_like, like))
        if target._schema.is_mutable:
            raise NoColumns(f"{target} changes its argument in place")
        if torch.Tag.pointwise in target.tags or target in _CELLWISE:
            return self._pointwise(target, args, kwargs)
        if target in _MOVES:
            found = _MOVES[target](args[0].cells, *args[1:], **kwargs)
            return [Batch(a) for a in found] if isinstance(found, list) else Batch(found)
        if target in (aten.cat.default, aten.stack.default):
            return self._gathered(target, *args, **kwargs)
        if target in (aten.mm.default, aten.bmm.default):
            return self._product(*args)
        raise NoColumns(str(target))

    def _cells(self, value: Any, rank: int) -> Any:
        """An operand's cells; a tensor without samples has the same in all, numbers stay."""
        if isinstance(value, Batch):
            return value.cells
        if not isinstance(value, Tensor):
            return value
        if value.ndim < rank:
            return cells(value, 0)
        if value.shape[0] not in (1, self.B):
            raise NoColumns("a tensor of another batch")
        return cells(value[0], 0) if value.shape[0] == 1 else cells(value)

    def _pointwise(self, target: Any, args: Any, kwargs: Any) -> Batch:
        ranks = [a.cells.ndim + 1 for a in args if isinstance(a, Batch)]
        ranks += [a.ndim for a in args if isinstance(a, Tensor)]
        if any(isinstance(a, Batch) and a.cells.ndim + 1 < max(ranks) for a in args):
            raise NoColumns("a broadcast that sets samples against coordinates")
        operands = [self._cells(a, max(ranks)) for a in args]
        shape = np.broadcast_shapes(*(o.shape for o in operands if isinstance(o, np.ndarray)))
        wide = [np.broadcast_to(o, shape) if isinstance(o, np.ndarray) else o for o in operands]
        out = np.empty(shape, dtype=object)
        for at in np.ndindex(*shape):
            here = [o[at] if isinstance(o, np.ndarray) else o for o in wide]
            out[at] = target(*here, **kwargs)
        return Batch(out)

    def _gathered(self, target: Any, parts: list[Any], dim: int = 0) -> Batch:
        rank = max(p.cells.ndim + 1 if isinstance(p, Batch) else p.ndim for p in parts)
        arrays = [self._cells(p, rank) for p in parts]
        if target is aten.cat.default:
            return Batch(np.concatenate(arrays, _axis(dim, rank)))
        return Batch(np.stack(arrays, _axis(dim, rank + 1)))

    def _product(self, a: Any, b: Any) -> Batch:
        """Rows of samples times a matrix, or a matrix a sample times another."""
        if not isinstance(a, Batch) or (isinstance(b, Batch) and b.cells.ndim != 2):
            raise NoColumns("a product that mixes samples")
        left, right = a.cells, b.cells if isinstance(b, Batch) else cells(b, b.ndim - 2)
        return Batch(_boxed(left @ right))
