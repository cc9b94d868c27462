"""A Brownian path over one step, to be halved as often as one likes.

What `Counter` gives to a method that wants a bridge (`Wants.BRIDGE`). The step is a list of cells
of the path's tree (see `core.counter`); to halve it is to deal the cells to the two sides of its
middle, splitting the one that lies across. So each half is what the path itself has there, to the
rounding of a sum, and costs one hash where the step is a cell.

A bridge also imagines: two halves with numbers of the size of true ones that are on no path, for
methods that must choose a step without a look at where the path goes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.counter import _PATH, _TRIAL, DEPTH, Counter, Value, _halves, _joined
from kakusan.core.hashing import normals, words
from kakusan.core.noise import Wants, mix
from kakusan.errors import KakusanError

_SIZE = 0x7FFFFFFF  # all bits of a word but the sign
Cell = tuple[int, int, Value]  # level, index, value


class Bridge(NamedTuple):
    """The path of some samples from t to s.

    Attributes:
        dw: The increment, (n, *noise shape).
        area: The area under the path, where the path knows areas.
        t: Where the step starts.
        s: Where it ends.
        path: Whose path this is.
        lane: The numbers of the lanes, like dw.
        cells: The cells the step is made of, in the order of the clock.

    Example:
        >>> like = torch.empty(0, dtype=torch.float64)
        >>> whole = Counter(0, cell=1.0).bridge(0, 0.0, 1.0, (3, 2), like)
        >>> early, late = whole.halves()
        >>> torch.allclose(early.dw + late.dw, whole.dw)
        True
        >>> late.of(torch.tensor([1])).dw.shape
        torch.Size([1, 2])
    """

    dw: Tensor
    area: Tensor | None
    t: float
    s: float
    path: Counter
    lane: Tensor
    cells: list[Cell]

    @staticmethod
    def over(path: Counter, t: float, s: float, shape: tuple[int, ...], like: Tensor) -> Bridge:
        """The path of a batch from t to s.

        Arguments:
            path: The path.
            t: Where the step starts.
            s: Where it ends, before or after t.
            shape: The shape of the increment, (B, *noise shape).
            like: A tensor with the dtype and device of the increment.
        """
        lo, hi = sorted((path.tick(t), path.tick(s)))
        lane = path.lanes_of(shape, like)
        cells = [(n, i, path.node(n, i, like, lane)) for n, i in path._cells(lo, hi)]
        return _made_of(cells, path, t, s, lane)

    def want(self, wants: Wants) -> Tensor | tuple[Tensor, Tensor]:
        """What a method wants of the step: the increment, or that and the area."""
        if wants is Wants.INCREMENT:
            return self.dw
        if self.area is None:
            raise KakusanError(
                f"this method wants the area under the path, which {type(self.path).__name__} "
                f"does not know: CounterWithArea({self.path.seed}, cell={self.path.cell:g}) does"
            )
        return self.dw, self.area

    def of(self, which: Tensor) -> Bridge:
        """The same for some of the samples."""
        cells = [(n, i, tuple(v[which] for v in value)) for n, i, value in self.cells]
        area = None if self.area is None else self.area[which]
        return self._replace(dw=self.dw[which], area=area, lane=self.lane[which], cells=cells)

    def halves(self) -> tuple[Bridge, Bridge]:
        """From t to the middle of the step, and from there to s."""
        middle = (self.t + self.s) / 2
        at = self.path.tick(middle)
        low, high, rest = [], [], self.cells[::-1]
        while rest:
            level, index, value = rest.pop()
            size = 1 << (level + DEPTH)
            if (index + 1) * size <= at:
                low.append((level, index, value))
            elif index * size >= at:
                high.append((level, index, value))
            else:
                left, right = self._split(level, index, value)
                rest += [(level - 1, 2 * index + 1, right), (level - 1, 2 * index, left)]
        early, late = (low, high) if self.s > self.t else (high, low)
        return (
            _made_of(early, self.path, self.t, middle, self.lane),
            _made_of(late, self.path, middle, self.s, self.lane),
        )

    def imagined(self) -> tuple[Bridge, Bridge, Bridge]:
        """A whole and its two halves that are on no path, to try a step with: two of each sample.

        Each number has the variance of a true one, either sign, and between 0.5 and 1.43 standard
        deviations, so none is small by luck. The two differ in the sign of the first half, so what
        cancels in one does not in the other. Shapes are (2n, *noise shape).
        """
        h, place = abs(self.s - self.t) / 2, mix(self.path.tick(self.t), self.path.tick(self.s))
        early: list[Tensor] = []
        late: list[Tensor] = []
        for i in range(1 if self.area is None else 2):
            std = (h / 12**i) ** 0.5
            key, other = (
                self.path.key(_TRIAL, 2 * i + j, place, self.lane.device) for j in (0, 1)
            )
            (u, v), (u_too, v_too) = (words(self.lane, k) for k in (key, other))
            # the highest bit is the sign
            u_too, v_too = (u_too & _SIZE) | (~u & ~_SIZE), (v_too & _SIZE) | (v & ~_SIZE)
            early.append(std * _sized(torch.cat([u, u_too]), self.dw))
            late.append(std * _sized(torch.cat([v, v_too]), self.dw))
        low, high = (early, late) if self.s > self.t else (late, early)
        whole, middle = _joined(tuple(low), h, tuple(high), h), (self.t + self.s) / 2
        lane = self.lane.repeat(2, *(1,) * (self.lane.ndim - 1))
        return (
            _of_value(whole, self.path, self.t, self.s, lane, []),
            _of_value(tuple(early), self.path, self.t, middle, lane, []),
            _of_value(tuple(late), self.path, middle, self.s, lane, []),
        )

    def _split(self, level: int, index: int, value: Value) -> tuple[Value, Value]:
        """`Counter.split` remembers numbers of whole batches; this is for the samples here."""
        paired = len(value) == 1
        key = self.path.key(_PATH, level, index >> 1 if paired else index, self.lane.device)
        y, z = normals(self.lane, key, value[0].dtype)
        return _halves(value, z if paired and index & 1 else y, z, self.path.cell * 2.0**level)


def _made_of(cells: list[Cell], path: Counter, t: float, s: float, lane: Tensor) -> Bridge:
    if not cells:
        raise KakusanError(
            f"the step from t={t!r} to t={s!r} is shorter than a path with cells of "
            f"{path.cell:g} resolves ({path.cell * 2.0**-DEPTH:.1e}); choose smaller cells"
        )
    value, length = cells[0][2], path.cell * 2.0 ** cells[0][0]
    for level, _, part in cells[1:]:
        h = path.cell * 2.0**level
        value, length = _joined(value, length, part, h), length + h
    return _of_value(value, path, t, s, lane, cells)


def _of_value(
    value: Value, path: Counter, t: float, s: float, lane: Tensor, cells: list[Cell]
) -> Bridge:
    if len(value) == 1:
        return Bridge(value[0], None, t, s, path, lane, cells)
    w, a = value
    # run backwards, the path starts at the other end: the area changes the sign of its bend
    return Bridge(w, abs(s - t) * (w / 2 + (a if s > t else -a)), t, s, path, lane, cells)


def _sized(word: Tensor, like: Tensor) -> Tensor:
    """32-bit words as numbers of variance 1: a sign, and a size uniform on [0.5, 1.427]."""
    size = 0.5 + (word & _SIZE).to(like.dtype) * (0.927050983124842 * 2.0**-31)
    return torch.where(word < 0, -size, size)
