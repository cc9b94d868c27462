r"""Where randomness comes from: always an argument, never hidden state.

Two needs, two kinds. A simulation draws *fresh* increments from one generator (`Fresh`). A sampler
of a model promises more: sample i of seed s is the same whatever the batch size, so its numbers
must be functions of (seed, sample index, step) alone (`Keyed`).

Keys are mixed into one 64-bit seed by the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", 2014), each word in turn, so that neighbouring keys
give unrelated streams.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kakusan.errors import KakusanError

_MASK = (1 << 64) - 1


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


class Noise(abc.ABC):
    """A source of Brownian increments for `solve`."""

    @abc.abstractmethod
    def normal(self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0) -> Tensor:
        """Normal numbers for one step, with the dtype and device of `like`."""

    def increment(self, step: int, h: float, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Brownian increments over a step of length h (of either sign), with variance |h|."""
        return self.normal(step, shape, like, math.sqrt(abs(h)))


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


class Recorded(Noise):
    """Increments given in advance: to repeat a path, or to test a method on a known one.

    Arguments:
        dw: One increment a step, with shape (N, B, *noise shape).
    """

    def __init__(self, dw: Tensor) -> None:
        self.dw = dw

    def normal(self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0) -> Tensor:
        """Recorded increments carry their own variance, so unit normals cannot be had."""
        raise TypeError("Recorded holds increments, not unit normals; call increment()")

    def increment(self, step: int, h: float, shape: tuple[int, ...], like: Tensor) -> Tensor:  # noqa: D102
        if step >= len(self.dw):
            raise KakusanError(
                f"only {len(self.dw)} increments were recorded; step {step} has none"
            )
        if tuple(self.dw.shape[1:]) != tuple(shape):
            raise KakusanError(f"recorded increments are {tuple(self.dw.shape[1:])}, not {shape}")
        return self.dw[step].to(like)
