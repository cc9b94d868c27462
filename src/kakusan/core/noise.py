r"""Where randomness comes from: always an argument, never hidden state.

Three needs, three kinds. A simulation draws *fresh* increments from one generator (`Fresh`). A
sampler of a model promises more: sample i of seed s is the same whatever the batch size, so its
numbers must be functions of (seed, sample index, step) alone (`Keyed`). A study of convergence, or
a multilevel estimate, needs one Brownian *path* that may be asked about at any times, in any order
(`Counter`, in `core.counter`; `Recorded` where the path was drawn elsewhere).

A method says what it wants of a step from t to s, h = |s - t| (`Wants`): the increment w; or w
with the area z = ∫ w(u) du under the path of the step, which has variance h³/3 and covariance
h²/2 with w; or, for weak schemes, numbers with three values that have the moments of w up to the
fifth, alone or beside signs; or w beside a generator for draws of any law; or the path of the
step, to be halved.

Keys are mixed into one 64-bit seed by the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", 2014), each word in turn, so that neighbouring keys
give unrelated streams.
"""

from __future__ import annotations

import abc
import bisect
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.errors import KakusanError

_MASK = (1 << 64) - 1
SIXTH = 0.967421566101701  # P(z > SIXTH) = 1/6 for a standard normal z
THIRD, LAST = 0.430727299295457, 1.38299412710064  # P(z > THIRD) = 1/3, P(z > LAST) = 1/12


def mix(*words: int) -> int:
    """One 64-bit number from several integers; the order counts.

    Example:
        >>> mix(0, 1) != mix(1, 0)
        True
    """
    h = 0
    for w in words:
        h = (h + (w & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator whose stream is a function of the key.

    Example:
        >>> a, b = (torch.rand(2, generator=generator(7, 3)) for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    # the CPU engine keeps the low 32 bits of a seed and CUDA all: fold, so that neither loses any
    h = mix(*key)
    return torch.Generator(device).manual_seed((h >> 32) ^ (h & 0xFFFFFFFF))


class Wants(enum.Enum):
    """What a method wants of the noise of a step; see the head of this module."""

    INCREMENT = "increment"
    AREA = "area"
    THREE_POINT = "three_point"
    WEAK = "weak"
    DRAW = "draw"
    BRIDGE = "bridge"


class Weak(NamedTuple):
    """Numbers with three values, and signs that are independent of them."""

    dw: Tensor
    sign: Tensor


class Draw(NamedTuple):
    """An increment, and a generator for numbers of any other law."""

    dw: Tensor
    source: torch.Generator


class Noise(abc.ABC):
    """A source of Brownian increments for `solve`; steps are numbered, times are floats."""

    @abc.abstractmethod
    def normal(self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0) -> Tensor:
        """Normal numbers for one step, with the dtype and device of `like`."""

    def increment(
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        """Brownian increments over the step from t to s (either way), with variance |s - t|."""
        return self.normal(step, shape, like, math.sqrt(abs(s - t)))

    def area(
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The increment w and the area z = ∫ w(u) du under the path of the step."""
        h = abs(s - t)
        w, y = self.normal(step, (shape[0], 2, *shape[1:]), like, math.sqrt(h)).unbind(1)
        return w, h / 2 * (w + y / math.sqrt(3))

    def three_point(
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        """Numbers ±sqrt(3h) with probability 1/6 each, else 0: the moments of w up to the 5th."""
        z = self.normal(step, shape, like)
        # a normal number is beyond this value with probability 1/6
        return ((z > SIXTH).to(z.dtype) - (z < -SIXTH).to(z.dtype)) * math.sqrt(3 * abs(s - t))

    def weak(self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor) -> Weak:
        """The numbers of `three_point`, and a sign beside each; both of one normal number."""
        z = self.normal(step, shape, like)
        three = (z > SIXTH).to(z.dtype) - (z < -SIXTH).to(z.dtype)
        # between these values lies half of each of the three cases
        size = z.abs()
        sign = 1 - 2 * ((size > THIRD) & (size < LAST)).to(z.dtype)
        return Weak(three * math.sqrt(3 * abs(s - t)), sign)

    def draw(self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor) -> Draw:
        """The increment, and a generator whose stream belongs to this step."""
        dw = self.increment(step, t, s, shape, like)
        return Draw(dw, self.generator(step, like.device))

    def bridge(self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor) -> Any:
        """The path over the step, to be halved at will: a `counter.Bridge`."""
        raise KakusanError(
            "this method halves its steps, which takes a path that may be asked about at any "
            f"time: Counter(seed), for one; {type(self).__name__} is none"
        )

    def generator(self, step: int, device: torch.device) -> torch.Generator:
        """A generator for numbers that are not normal."""
        raise TypeError(f"{type(self).__name__} gives Brownian increments only")

    def want(
        self, wants: Wants, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Any:
        """What a method wants of the step from t to s."""
        return getattr(self, wants.value)(step, t, s, shape, like)


class Fresh(Noise):
    """New numbers at each step, from one generator; reproducible where the seed is given.

    Step 0 starts the stream again, so one `Fresh` gives the same numbers to each `solve`.

    Arguments:
        seed: An integer, or None for a seed of the system's.
    """

    def __init__(self, seed: int | None = None) -> None:
        # a generator of its own: torch.seed() would reseed everybody's
        self.seed = torch.Generator().seed() if seed is None else seed
        self._generator: torch.Generator | None = None

    def normal(  # noqa: D102
        self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0
    ) -> Tensor:
        if self._generator is None or step == 0 or self._generator.device != like.device:
            self._generator = generator(self.seed, device=like.device)
        return like.new_empty(shape).normal_(0.0, std, generator=self._generator)

    def generator(self, step: int, device: torch.device) -> torch.Generator:  # noqa: D102
        return generator(self.seed, step, 1, device=device)


class Keyed(Noise):
    """Numbers that are functions of (seed, stream, sample index, step).

    Samples live in blocks of `BLOCK`; a block is drawn whole and cut, which costs one generator a
    block instead of one a sample.

    Arguments:
        seed: The seed.
        first: The index of the first sample of the batch.
        stream: Separates uses of one seed: steps of training, the start of sampling.

    Example:
        >>> like = torch.empty(0)
        >>> whole = Keyed(0).normal(3, (10, 2), like)
        >>> part = Keyed(0, first=4).normal(3, (6, 2), like)
        >>> torch.equal(whole[4:], part)
        True
    """

    BLOCK = 64

    def __init__(self, seed: int, first: int = 0, stream: int = 0) -> None:
        self.seed, self.first, self.stream = seed, first, stream

    def _blocks(
        self,
        step: int,
        shape: tuple[int, ...],
        like: Tensor,
        fill: Callable[[Tensor, torch.Generator], Tensor],
    ) -> Tensor:
        lo, hi = self.first, self.first + shape[0]
        parts = []
        for b in range(lo // self.BLOCK, -(-hi // self.BLOCK)):
            g = generator(self.seed, self.stream, b, step, device=like.device)
            block = fill(like.new_empty((self.BLOCK, *shape[1:])), g)
            parts.append(block[max(lo - b * self.BLOCK, 0) : hi - b * self.BLOCK])
        # a cut block would keep the whole of it alive
        return torch.cat(parts) if len(parts) != 1 else parts[0].clone()

    def normal(  # noqa: D102
        self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0
    ) -> Tensor:
        return self._blocks(step, shape, like, lambda x, g: x.normal_(0.0, std, generator=g))

    def uniform(self, step: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Numbers uniform on [0, 1)."""
        return self._blocks(step, shape, like, lambda x, g: x.uniform_(generator=g))

    def generator(self, step: int, device: torch.device) -> torch.Generator:
        """A generator for the whole batch: its numbers do depend on the batch size."""
        return generator(self.seed, self.stream, self.first, step, 1, device=device)


class Recorded(Noise):
    """Increments given in advance: to repeat a path, or to test a method on a known one.

    Without times, step k takes the k-th increment. With the times of the recording, any grid whose
    times are among them takes sums: the same path in coarser steps.

    Arguments:
        dw: One increment a step, with shape (N, B, *noise shape).
        times: The N + 1 times between which they were recorded.
        dz: The areas under the path of each step, like dw, for methods that want them.

    Example:
        >>> path = Recorded(torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1), [0.0, 0.5, 1.0, 2.0])
        >>> path.increment(0, 0.0, 1.0, (1, 1), torch.empty(0))
        tensor([[3.]])
    """

    def __init__(
        self,
        dw: Tensor,
        times: Sequence[float] | Tensor | None = None,
        dz: Tensor | None = None,
    ) -> None:
        self.dw, self.dz = dw, dz
        self.times = None if times is None else [float(t) for t in times]
        if self.times is not None and len(self.times) != len(dw) + 1:
            raise KakusanError(
                f"{len(dw)} increments lie between {len(dw) + 1} times, got {len(self.times)}"
            )

    def normal(self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0) -> Tensor:
        """Recorded increments carry their own variance, so unit normals cannot be had."""
        raise TypeError("Recorded holds increments, not unit normals; call increment()")

    def _steps(self, step: int, t: float, s: float, shape: tuple[int, ...]) -> tuple[int, int]:
        """The recorded steps that make up the step from t to s."""
        if tuple(self.dw.shape[1:]) != tuple(shape):
            raise KakusanError(f"recorded increments are {tuple(self.dw.shape[1:])}, not {shape}")
        if self.times is None:
            if step >= len(self.dw):
                raise KakusanError(
                    f"only {len(self.dw)} increments were recorded; step {step} has none"
                )
            return step, step + 1
        i, j = (self._index(u) for u in (t, s))
        if i >= j:
            raise KakusanError(
                f"the path was recorded from t={self.times[0]:g} to t={self.times[-1]:g}, and the "
                f"step from t={t:g} to t={s:g} runs the other way"
            )
        return i, j

    def _index(self, t: float) -> int:
        times = self.times or []
        sign = 1 if times[-1] >= times[0] else -1
        at = bisect.bisect_left(times, sign * t, key=lambda u: sign * u)
        i = min((k for k in (at - 1, at) if 0 <= k < len(times)), key=lambda k: abs(times[k] - t))
        if abs(times[i] - t) > 1e-9 * abs(times[-1] - times[0]):
            raise KakusanError(
                f"t={t:g} is not among the recorded times; the nearest is {times[i]:g}. "
                "Counter(seed) is a path that can be asked about at any time"
            )
        return i

    def increment(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        i, j = self._steps(step, t, s, shape)
        return (self.dw[i] if j == i + 1 else self.dw[i:j].sum(0)).to(like)

    def area(  # noqa: D102
        self, step: int, t: float, s: float, shape: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.dz is None:
            raise KakusanError("this method wants areas under the path: Recorded(dw, times, dz)")
        i, j = self._steps(step, t, s, shape)
        w, z = torch.zeros_like(self.dw[i]), torch.zeros_like(self.dw[i])
        for k in range(i, j):
            h = abs(self.times[k + 1] - self.times[k]) if self.times else abs(s - t)
            w, z = w + self.dw[k], z + h * w + self.dz[k]
        return w.to(like), z.to(like)
