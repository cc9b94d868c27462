r"""A Brownian path that can be asked about at any times, in any order, and is stored nowhere.

Time is cut into cells of one length, and every cell into halves, halves of halves and so on: a
binary tree. The increment of a cell and one standard normal number y fix those of its halves,

.. math:: w_{left} = w/2 + \sqrt{h}/2 \; y, \qquad w_{right} = w/2 - \sqrt{h}/2 \; y,

with h the length of the cell (Lévy's construction). y is a hash of the seed, the place of the cell
in the tree and the number of the sample (`core.hashing`), so the increment between any two times
is a function of the seed: a coarse grid sees sums of what a fine grid sees, exactly.

A sweep over equal steps that are cells of the tree costs one hash a step, as fresh numbers would,
for each split serves two steps. Times that are no corners of cells near them cost a descent.

To know also the area z = ∫ w(u) du under the path, `CounterWithArea` splits the pair (w, a), where
a = z/h - w/2 ~ N(0, h/12) is independent of w; two normal numbers a split instead of one:

.. math:: w_{left} = \tfrac{w}{2} + \tfrac{3}{2} a + \tfrac{\sqrt h}{4} y, \qquad
          a_{left,\,right} = \tfrac{a}{4} - \tfrac{\sqrt h}{8} y \pm \sqrt{\tfrac{h}{96}} \; y' .

References:
    Foster, Lyons, Oberhauser, "An optimal polynomial approximation of Brownian motion" (2020)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kakusan.core.hashing import normals, words
from kakusan.core.noise import Draw, Noise, Wants, Weak, generator, mix
from kakusan.errors import KakusanError

if TYPE_CHECKING:
    from kakusan.core.bridge import Bridge

# a node's Brownian value: (w,), or (w, a) where areas are wanted
Value = tuple[Tensor, ...]

TOP = 10  # the largest cells are 2^TOP cells long, and independent of each other
DEPTH = 30  # the smallest, 2^-DEPTH cells: times are rounded to them
_PATH, _SIGN, _ROOT, _OTHER, _TRIAL = range(5)  # what a key is for


def _halves(value: Value, y: Tensor, z: Tensor, h: Any) -> tuple[Value, Value]:
    root = h**0.5
    if len(value) == 1:
        (w,) = value
        half, bend = w * 0.5, y * (root * 0.5)
        return (half + bend,), (half - bend,)
    w, a = value
    bend = a * 1.5 + y * (root * 0.25)
    mean, spread = a * 0.25 - y * (root * 0.125), z * (root * 48**-0.5)
    return (w * 0.5 + bend, mean + spread), (w * 0.5 - bend, mean - spread)


def _joined(left: Value, h_left: float, right: Value, h_right: float) -> Value:
    """The value of two neighbouring intervals as one."""
    if len(left) == 1:
        return (left[0] + right[0],)
    (w, a), (v, b) = left, right
    h = h_left + h_right
    return w + v, (h_left * a + h_right * b + (h_right * w - h_left * v) / 2) / h


class Counter(Noise):
    """One Brownian path per seed, at any times and in any order.

    Sample i of a seed has the same path in every batch. Equal steps that are `cell` times a power
    of two, at multiples of themselves, cost one hash each, and in `Compiled` steps less than fresh
    numbers; any other times are right as well, but each costs dozens of hashes.

    Arguments:
        seed: The seed.
        cell: The length of a cell, in units of time.
        first: The index of the first sample of the batch.
        stream: Separates uses of one seed.

    Example:
        >>> path, like = Counter(0, cell=0.25), torch.empty(0, dtype=torch.float64)
        >>> coarse = path.increment(0, 0.0, 1.0, (3, 2), like)
        >>> late, early = (path.increment(0, t, t + 0.5, (3, 2), like) for t in (0.5, 0.0))
        >>> torch.allclose(coarse, early + late)
        True
    """

    areas = False

    def __init__(self, seed: int, cell: float = 1e-3, first: int = 0, stream: int = 0) -> None:
        if not 0 < cell < math.inf:
            raise KakusanError(f"a cell of a path has a length > 0, got {cell}")
        self.seed, self.cell, self.first, self.stream = seed, cell, first, stream
        self._memo: dict[Any, Any] = {}
        self._calls = self._splits = 0

    # --- the numbers of a place in the tree

    def key(self, purpose: int, level: int, index: int, device: torch.device) -> Tensor:
        """The two int32 words of a place, with shape (2,)."""
        return key_words(mix(self.seed, self.stream, purpose, level, index)).to(device)

    def lanes(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The numbers of the lanes of a batch, int32; sample i keeps its own in every batch."""
        each = math.prod(shape[1:])
        if (self.first + shape[0]) * each >= 1 << 32:
            raise KakusanError(
                f"samples up to {self.first + shape[0]:,} of {each:,} numbers each are more than "
                "the 2^32 lanes of a path; use another stream for some of them"
            )
        lane = torch.arange(self.first * each, (self.first + shape[0]) * each, device=device)
        return lane.reshape(shape).to(torch.int32)

    def split(
        self, value: Value, level: int, index: int, lane: Tensor, draw: Callable = normals
    ) -> tuple[Value, Value]:
        """The halves of the cell number `index` of a level, 2^level cells long.

        `draw` is `normals`, or the same function compiled.
        """
        self._splits += 1
        paired = index >> 1 if len(value) == 1 else index  # a pair of numbers serves two cells
        place = ("y", level)
        if self._memo.get(place, (None,))[0] != paired:
            key = self.key(_PATH, level, paired, lane.device)
            self._memo[place] = paired, draw(lane, key, value[0].dtype)
        y, z = self._memo[place][1]
        odd = len(value) == 1 and index & 1
        return _halves(value, z if odd else y, z, self.cell * 2.0**level)

    def root(self, index: int, like: Tensor, lane: Tensor) -> Value:
        """The value of one of the largest cells."""
        h = self.cell * 2.0**TOP
        y, z = normals(lane, self.key(_ROOT, TOP, index, lane.device), like.dtype)
        return (y * h**0.5, z * (h / 12) ** 0.5) if self.areas else (y * h**0.5,)

    # --- the value between two times

    def node(
        self, level: int, index: int, like: Tensor, lane: Tensor, split: Callable | None = None
    ) -> Value:
        """The value of a cell, remembering its neighbour and the way to it."""
        if level >= TOP:
            return self.root(index, like, lane)
        known = self._memo.get(level)
        if known is None or known[0] != index >> 1:
            above = self.node(level + 1, index >> 1, like, lane, split)
            halves = (split or self.split)(above, level + 1, index >> 1, lane)
            self._memo[level] = known = index >> 1, halves
        return known[1][index & 1]

    def _cells(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """The largest cells, (level, index), that make up [lo, hi), in units of the smallest."""
        cells = []
        while lo < hi:
            level = min((lo & -lo).bit_length() - 1 if lo else TOP + DEPTH, TOP + DEPTH)
            while lo + (1 << level) > hi:
                level -= 1
            cells.append((level - DEPTH, lo >> level))
            lo += 1 << level
        return cells

    def tick(self, t: float) -> int:
        """A time in units of the smallest cell, rounded."""
        return round(t / self.cell * (1 << DEPTH))

    def between(self, t: float, s: float, shape: tuple[int, ...], like: Tensor) -> Value:
        """The value of the path over [t, s], or [s, t]."""
        lo, hi = sorted((self.tick(t), self.tick(s)))
        if lo == hi:
            raise KakusanError(
                f"the step from t={t!r} to t={s!r} is shorter than a path with cells of "
                f"{self.cell:g} resolves ({self.cell * 2.0**-DEPTH:.1e}); choose smaller cells"
            )
        lane = self.lanes_of(shape, like)
        value, length = None, 0.0
        for level, index in self._cells(lo, hi):
            part, h = self.node(level, index, like, lane), self.cell * 2.0**level
            value = part if value is None else _joined(value, length, part, h)
            length += h
        self._calls += 1
        if self._calls == 64 and self._splits > 6 * self._calls:
            warnings.warn(
                f"the steps of this grid (from t={t:g} to t={s:g}, say) are no cells of "
                f"{type(self).__name__}({self.seed}, cell={self.cell:g}), so that each costs "
                f"{self._splits / self._calls:.0f} hashes; cell={abs(s - t):g} makes equal steps "
                "cost one",
                stacklevel=5,
            )
        assert value is not None
        return value

    def lanes_of(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The lanes of the batch; a path remembers its places for one batch at a time."""
        batch = (tuple(shape), like.dtype, like.device)
        if self._memo.get("batch") != batch:
            self._memo = {"batch": batch, "lanes": self.lanes(shape, like.device)}
        return self._memo["lanes"]

    # --- what methods want

    def normal(self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0) -> Tensor:
        """Normal numbers of a step that are on no path."""
        key = self.key(_OTHER, 0, step, like.device)
        return std * normals(self.lanes(shape, like.device), key, like.dtype)[0]

    def increment(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        return self.between(t, s, shape, like)[0]

    def area(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self.areas:
            raise KakusanError(
                "this method wants the area under the path, which Counter does not know: "
                f"CounterWithArea({self.seed}, cell={self.cell:g}) does"
            )
        w, a = self.between(t, s, shape, like)
        # run backwards, the path starts at the other end: the area changes the sign of its bend
        return w, abs(s - t) * (w / 2 + (a if s > t else -a))

    def three_point(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        lo, hi = sorted((self.tick(t), self.tick(s)))
        key = self.key(_SIGN, lo, hi, like.device)
        signs = three_signs(self.lanes_of(shape, like), key, like.dtype)
        return signs * math.sqrt(3 * abs(s - t))

    def bridge(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Bridge:
        from kakusan.core.bridge import Bridge  # it is made of parts of this module

        return Bridge.over(self, t, s, shape, like)

    def weak(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Weak:
        return super().weak(self._place(t, s), t, s, shape, like)

    def draw(self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor) -> Draw:
        """The increment, and a generator whose stream belongs to these times."""
        return super().draw(self._place(t, s), t, s, shape, like)

    def _place(self, t: float, s: float) -> int:
        """A number for the step from t to s: two runs that meet at a time share none."""
        return mix(*sorted((self.tick(t), self.tick(s))))

    def generator(self, step: int, device: torch.device) -> torch.Generator:
        """A generator for the whole batch: its numbers do depend on the batch size."""
        return generator(self.seed, self.stream, self.first, step, 1, device=device)


class CounterWithArea(Counter):
    """`Counter` with the area under the path, at the price of two numbers a step.

    Its path is another one than that of `Counter` with the same seed.
    """

    areas = True


def key_words(*keys: int) -> Tensor:
    """64-bit keys as pairs of int32 words: shape (2,) for one key, (n, 2) for several."""
    signed = [[k & 0xFFFFFFFF, k >> 32] for k in keys]
    pairs = [[w - (1 << 32) if w >> 31 else w for w in pair] for pair in signed]
    return torch.tensor(pairs if len(keys) > 1 else pairs[0], dtype=torch.int32)


def mixed_words(prefix: int, last: Tensor) -> Tensor:
    """`mix(*words, i)` for each i of an int64 tensor, as pairs of int32; prefix = mix(*words).

    Example:
        >>> bool((mixed_words(mix(5, 6), torch.tensor([7]))[0] == key_words(mix(5, 6, 7))).all())
        True
    """

    def signed(word: int) -> int:
        return word - (1 << 64) if word >> 63 else word

    def right(h: Tensor, n: int) -> Tensor:
        return (h >> n) & ((1 << (64 - n)) - 1)

    h = last + signed((prefix + 0x9E3779B97F4A7C15) & ((1 << 64) - 1))
    h = (h ^ right(h, 30)) * signed(0xBF58476D1CE4E5B9)
    h = (h ^ right(h, 27)) * signed(0x94D049BB133111EB)
    h = h ^ right(h, 31)
    # the narrowing keeps the low 32 bits
    return torch.stack([h.to(torch.int32), (h >> 32).to(torch.int32)], -1)


def three_signs(lane: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """1 and -1 with probability 1/6 each, else 0."""
    u, _ = words(lane, key)
    sixth = (1 << 32) // 6 - (1 << 31)
    return (u >= -sixth).to(dtype) - (u < sixth).to(dtype)


class Sweep:
    """A grid of equal steps that are cells of a path: what a compiled chunk of K steps needs.

    `inputs` is what the host knows of the chunk that starts at step k; `unfold` is a pure function
    of it, to be traced, which gives the increments of the K steps.

    Arguments:
        path: The path.
        wants: What the method wants.
        grid: All times, as floats.
        K: Steps a chunk, a power of two.
    """

    def __init__(self, path: Counter, wants: Wants, grid: list[float], K: int) -> None:
        self.path, self.wants, self.K = path, wants, K
        ticks = [path.tick(t) for t in grid]
        step = abs(ticks[1] - ticks[0])
        self.back = ticks[1] < ticks[0]
        # equal steps, a power of two long, at multiples of themselves
        self.fits = (
            step & (step - 1) == 0
            and step <= 1 << (TOP + DEPTH)
            and all(abs(b - a) == step for a, b in zip(ticks, ticks[1:], strict=False))
            and ticks[0] % step == 0
            and wants in (Wants.INCREMENT, Wants.AREA, Wants.THREE_POINT)
            and (wants is not Wants.AREA or path.areas)
        )
        self.steps = len(grid) - 1
        self._keys: Tensor | None = None
        self._lowest = 0
        self.level = step.bit_length() - 1 - DEPTH
        self.index = min(ticks[0], ticks[1]) // max(step, 1)
        self.depth = K.bit_length() - 1
        self.fits = self.fits and self.level + self.depth <= TOP
        # steps before the first whole chunk
        self.lead = (self.index + 1) % K if self.back else -self.index % K

    def inputs(
        self, k: int, lane: Tensor, like: Tensor, split: Callable | None
    ) -> tuple[Tensor, ...]:
        """The keys of the chunk's splits, whether its cell is odd, and the value of its cell."""
        index = (self.index - k - self.K + 1 if self.back else self.index + k) // self.K
        if self.wants is Wants.THREE_POINT:
            size = 1 << (self.level + DEPTH)
            steps = range(index * self.K, (index + 1) * self.K)
            words = [mix(self.path.seed, self.path.stream, _SIGN, i * size, (i + 1) * size)
                     for i in steps]  # fmt: skip
            return (key_words(*words).to(like.device),)
        if self._keys is None:
            self._keys = self._all_keys().to(like.device)
        value = self.path.node(self.level + self.depth, index, like, lane, split)
        odd = torch.tensor(bool(index & 1), device=like.device)
        return (self._keys[index - self._lowest], odd, *value)

    def _all_keys(self) -> Tensor:
        """The keys of all splits under the grid, hashed at once: (chunks, keys a chunk, 2)."""
        last = self.index - self.steps + 1 if self.back else self.index + self.steps - 1
        self._lowest, highest = sorted((self.index // self.K, last // self.K))
        chunks, keys = torch.arange(self._lowest, highest + 1), []
        for j in range(self.depth):
            prefix = mix(self.path.seed, self.path.stream, _PATH, self.level + self.depth - j)
            # without areas a key serves two cells, and the first level may begin with either
            shift = 0 if self.path.areas or j == 0 else 1
            at = (chunks[:, None] << j - shift) + torch.arange(1 << j - shift)
            keys.append(mixed_words(prefix, at >> (1 if not self.path.areas and j == 0 else 0)))
        return torch.cat(keys, 1)

    def unfold(self, inputs: tuple[Tensor, ...], lane: Tensor, dtype: torch.dtype) -> list[Any]:
        """What the method wants of each of the K steps, in the order of the grid."""
        h = self.path.cell * 2.0 ** (self.level + self.depth)
        if self.wants is Wants.THREE_POINT:
            root = math.sqrt(3 * h / self.K)
            each = [three_signs(lane, key, dtype) * root for key in inputs[0].unbind(0)]
            return each[::-1] if self.back else each
        keys, odd, *value = inputs
        cells, fresh = [tuple(value)], iter(keys.unbind(0))
        for j in range(self.depth):
            halves: list[Value] = []
            y = z = lane  # overwritten at once: the first cell of a level always draws
            for i, cell in enumerate(cells):
                # without areas a pair of numbers serves two neighbouring cells
                if self.path.areas or i % 2 == 0:
                    y, z = normals(lane, next(fresh), dtype)
                    y = torch.where(odd, z, y) if j == 0 and not self.path.areas else y
                else:
                    y = z
                halves += _halves(cell, y, z, h / 2**j)
            cells = halves
        cells = cells[::-1] if self.back else cells
        if self.wants is Wants.INCREMENT:
            return [c[0] for c in cells]
        side = -1 if self.back else 1
        return [(w, (w * 0.5 + a * side) * (h / self.K)) for w, a in cells]
