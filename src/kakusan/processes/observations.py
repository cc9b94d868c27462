r"""What is seen of a state: Y given X_T.

An event to condition on is an observation and the value y that it had. Most are singular: X_T = y
has probability zero and no likelihood that could be differentiated; they are all the same *drawn*
from paths, which is what learning needs.

=====================  =========================================  ==================
observation            Y                                          p(y | x)
=====================  =========================================  ==================
``Terminal()``         X_T itself                                 none (singular)
``Coordinates(at)``    some of its numbers                        none (singular)
``Measured(H, std)``   H X_T + std eps                            normal; none at std 0
``Event(holds)``       whether X_T lies in a set                  0 or 1
``Label(classify)``    a class, drawn or certain                  the classifier's
``Series({t: ...})``   any of these at several times              their product
=====================  =========================================  ==================

A value y is a tensor (B, k), one row a state; what a person writes, as 1.0 or a picture, becomes
one by `Observation.value`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kakusan.core.types import State
from kakusan.errors import KakusanError


class Observation(abc.ABC):
    """What is seen of a state at the end of a path."""

    @abc.abstractmethod
    def draw(self, x: State, source: torch.Generator | None = None) -> Tensor:
        """Y of states, (B, k); `source` gives the numbers of a noisy one."""

    @abc.abstractmethod
    def log_likelihood(self, y: Tensor, x: State) -> Tensor:
        """Log p(y | x), (B,); refused where Y is a function of x with values in a continuum."""

    @abc.abstractmethod
    def size(self, x: State) -> int:
        """The number k of what is seen of a state like those of x."""

    def told(self, y: Tensor) -> Tensor:
        """What a network is told of y, (B, j)."""
        return y

    def parts(self, end: float) -> list[tuple[float, Observation, slice]]:
        """The observations one by one: when, what, and which numbers of y are theirs."""
        return [(end, self, slice(None))]

    def left(self, t: Tensor, end: float) -> Tensor:
        """The time until something is seen next; t is () or (B,)."""
        return (end - t).abs()

    def value(self, y: Any, x: State) -> Tensor:
        """A value as a person writes it, as (len(x), k) beside the states x.

        Raises:
            KakusanError: If it does not fit.
        """
        k, n = self.size(x), len(x)
        # a Python float must not pass through float32 on its way
        try:
            given = (y if isinstance(y, Tensor) else torch.as_tensor(y, dtype=torch.float64)).to(x)
        except (TypeError, ValueError, RuntimeError):
            raise KakusanError(
                f"a value to condition on is a number, or {k} in a list, got {y!r}"
            ) from None
        rows = given.reshape(1, -1) if given.numel() == k else given
        if rows.ndim > 2 and rows[0].numel() == k:
            rows = rows.flatten(1)
        if rows.ndim != 2 or rows.shape[1] != k or len(rows) not in (1, n):
            raise KakusanError(
                f"{self} sees {k} number{'s' * (k != 1)} of a state of shape "
                f"{tuple(x.shape[1:])}, so a value is {k} of them, or ({n}, {k}) for {n} states; "
                f"got shape {tuple(given.shape)}"
            )
        if not rows.isfinite().all():
            raise KakusanError(f"a value to condition on must be finite, got {rows[0].tolist()}")
        return rows.expand(n, k)


class Linear(Observation):
    """Y = H X_T + std eps, for a linear map H; std 0 is a singular event."""

    std: float = 0.0

    @abc.abstractmethod
    def forward(self, x: State) -> Tensor:
        """H x, (B, k)."""

    @abc.abstractmethod
    def transpose(self, v: Tensor, x: State) -> State:
        """Hᵀ v, like x, for v of shape (B, k)."""

    def matrix(self, x: State) -> Tensor:
        """H as a matrix (k, d) on flattened states, with the dtype and device of x."""
        one = x[:1]
        eye = torch.eye(one.numel(), dtype=x.dtype, device=x.device)
        return self.forward(eye.reshape(-1, *x.shape[1:])).mT

    def size(self, x: State) -> int:  # noqa: D102
        return self.forward(x[:1]).shape[1]

    def draw(self, x: State, source: torch.Generator | None = None) -> Tensor:  # noqa: D102
        y = self.forward(x)
        if not self.std:
            return y
        z = torch.randn(y.shape, generator=source, dtype=y.dtype, device=y.device)
        return y + self.std * z

    def log_likelihood(self, y: Tensor, x: State) -> Tensor:  # noqa: D102
        if not self.std:
            raise KakusanError(
                f"{self} is a function of the state, so p(y | x) is no density: give it a noise, "
                "std > 0, where a likelihood is needed"
            )
        away = (y - self.forward(x)) / self.std
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * away.square().sum(1) - y.shape[1] * constant


class Terminal(Linear):
    """Y = X_T: the whole state.

    Example:
        >>> Terminal().value([1.0, 2.0], torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def forward(self, x: State) -> Tensor:  # noqa: D102
        return x.flatten(1)

    def transpose(self, v: Tensor, x: State) -> State:  # noqa: D102
        return v.reshape(x.shape)

    def __repr__(self) -> str:
        return "Terminal()"


class Coordinates(Linear):
    """Some numbers of the state: a pinned coordinate, the known pixels of a picture.

    Arguments:
        at: Which numbers of a flattened state, or a mask of its shape, True where it is seen.
        std: The standard deviation of noise on them.

    Example:
        >>> Coordinates([0]).forward(torch.tensor([[1.0, 2.0]]))
        tensor([[1.]])
    """

    def __init__(self, at: Sequence[int] | Tensor, std: float = 0.0) -> None:
        given = torch.as_tensor(at)
        if given.is_floating_point() and given.numel():
            raise KakusanError(
                f"Coordinates takes whole numbers, or a mask of booleans, got {given.dtype} of "
                f"shape {tuple(given.shape)}"
            )
        self.mask = given if given.dtype == torch.bool else None
        self.at = (
            given.flatten().nonzero().flatten() if given.dtype == torch.bool else given.long()
        )
        self.std = _std(std)
        if self.at.ndim != 1 or not len(self.at):
            raise KakusanError("Coordinates sees at least one number of a state, and got none")
        if len(self.at.unique()) != len(self.at):
            raise KakusanError(f"Coordinates sees each number once, got {self.at.tolist()[:8]}")

    def _checked(self, x: State) -> Tensor:
        d = x[0].numel()
        wrong = self.mask is not None and self.mask.shape != x.shape[1:]
        if wrong or not bool(((self.at >= -d) & (self.at < d)).all()):
            seen = (
                f"a mask of shape {tuple(self.mask.shape)}"
                if self.mask is not None
                else (f"the numbers {self.at.tolist()[:8]}")
            )
            raise KakusanError(
                f"{seen} does not fit states of shape {tuple(x.shape[1:])}, {d} "
                f"number{'s' * (d != 1)} each"
            )
        return self.at.to(x.device)

    def forward(self, x: State) -> Tensor:  # noqa: D102
        at = self._checked(x)
        return x.flatten(1)[:, at]

    def transpose(self, v: Tensor, x: State) -> State:  # noqa: D102
        at = self._checked(x)
        out = torch.zeros(x.shape, dtype=v.dtype, device=v.device).flatten(1)
        return out.index_add(1, at % out.shape[1], v).reshape(x.shape)

    def __repr__(self) -> str:
        seen = self.at.tolist() if len(self.at) <= 8 else f"<{len(self.at)} numbers>"
        return f"Coordinates({seen}{f', std={self.std:g}' if self.std else ''})"


class Measured(Linear):
    """H X_T + std eps: a projection, a blur, a mean, with or without noise.

    Arguments:
        H: A matrix (k, d) on flattened states, or a linear function from states (B, *shape) to
            (B, ...), which is flattened.
        std: The standard deviation of the noise.

    Example:
        >>> mean = Measured(lambda x: x.flatten(1).mean(1, keepdim=True), std=0.1)
        >>> mean.transpose(torch.tensor([[2.0]]), torch.zeros(1, 2, 2))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    def __init__(self, H: Tensor | Callable[[State], Tensor], std: float = 0.0) -> None:
        self.H, self.std = H, _std(std)
        if isinstance(H, Tensor) and H.ndim != 2:
            raise KakusanError(f"H is a matrix (k, d), got shape {tuple(H.shape)}")
        if isinstance(H, Tensor) and not H.isfinite().all():
            raise KakusanError("H is a matrix of finite numbers, and this one holds others")
        self._linear = isinstance(H, Tensor)

    def forward(self, x: State) -> Tensor:  # noqa: D102
        if not isinstance(self.H, Tensor):
            if not self._linear and len(x):
                self._check_linear(self.H, x)
            return self.H(x).flatten(1)
        if self.H.shape[1] != x[0].numel():
            raise KakusanError(
                f"H is {self.H.shape[0]} x {self.H.shape[1]}, and states of shape "
                f"{tuple(x.shape[1:])} have {x[0].numel()} numbers"
            )
        return x.flatten(1) @ self.H.to(x).mT

    def _check_linear(self, H: Callable[[State], Tensor], x: State) -> None:
        """Refuses a function that is not linear, at the first states that it sees."""
        with torch.no_grad():
            i = torch.arange(1.0, 1 + x[0].numel(), dtype=x.dtype, device=x.device)
            a, b = (v.reshape(1, *x.shape[1:]) for v in (i.sin(), -2 * i.cos()))
            away = (H(a + b) - H(a) - H(b)).abs().max()
        if not bool(away <= 1e-3 * (H(a).abs().max() + H(b).abs().max())):
            raise KakusanError(
                "H is a linear function of the state, and this one is not: H(a + b) is not "
                "H(a) + H(b); Event and Label take any function"
            )
        self._linear = True

    def transpose(self, v: Tensor, x: State) -> State:  # noqa: D102
        if isinstance(self.H, Tensor):
            return (v @ self.H.to(v)).reshape(x.shape)
        # a linear function has the same derivative everywhere
        return torch.func.vjp(self.forward, torch.zeros_like(x))[1](v)[0]

    def __repr__(self) -> str:
        H = "x".join(map(str, self.H.shape)) if isinstance(self.H, Tensor) else "function"
        return f"Measured(<{H}>{f', std={self.std:g}' if self.std else ''})"


class Event(Observation):
    """Whether X_T lies in a set.

    Arguments:
        holds: A function from states to booleans (B,).

    Example:
        >>> above = Event(lambda x: x[:, 0] > 1)
        >>> above.draw(torch.tensor([[2.0], [0.0]]))
        tensor([[1.],
                [0.]])
    """

    def __init__(self, holds: Callable[[State], Tensor]) -> None:
        self.holds = holds

    def draw(self, x: State, source: torch.Generator | None = None) -> Tensor:  # noqa: D102
        holds = self.holds(x)
        if holds.dtype != torch.bool or holds.numel() != len(x):
            raise KakusanError(
                f"an Event says of each state whether it holds, booleans ({len(x)},); got "
                f"{holds.dtype} of shape {tuple(holds.shape)}"
            )
        return holds.reshape(len(x), 1).to(x.dtype)

    def value(self, y: Any, x: State) -> Tensor:  # noqa: D102
        rows = super().value(y, x)
        if not bool(((rows == 0) | (rows == 1)).all()):
            raise KakusanError(f"an Event holds (True) or does not (False), got {rows[0, 0]:g}")
        return rows

    def log_likelihood(self, y: Tensor, x: State) -> Tensor:  # noqa: D102
        same = self.draw(x)[:, 0] == y[:, 0]
        return torch.where(same, 0.0, -math.inf).to(x)

    def size(self, x: State) -> int:  # noqa: D102
        return 1

    def __repr__(self) -> str:
        return f"Event({getattr(self.holds, '__name__', 'function')})"


class Label(Observation):
    """A class of X_T; a value is its number.

    Arguments:
        classify: A function from states to class numbers (B,), or to logits (B, classes): then
            the label is drawn with the probabilities of their softmax.
        classes: How many classes there are.
    """

    def __init__(self, classify: Callable[[State], Tensor], classes: int) -> None:
        self.classify, self.classes = classify, classes

    def _log_p(self, x: State) -> Tensor:
        out = self.classify(x)
        if out.ndim == 2 and out.shape[1] == self.classes and out.is_floating_point():
            return out.log_softmax(1)
        hit = torch.nn.functional.one_hot(out.long().reshape(len(x)), self.classes)
        return torch.where(hit.bool(), 0.0, -math.inf)

    def draw(self, x: State, source: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return torch.multinomial(self._log_p(x).exp(), 1, generator=source).to(x.dtype)

    def log_likelihood(self, y: Tensor, x: State) -> Tensor:  # noqa: D102
        return self._log_p(x).gather(1, y.long())[:, 0].to(x)

    def size(self, x: State) -> int:  # noqa: D102
        return 1

    def told(self, y: Tensor) -> Tensor:  # noqa: D102
        return torch.nn.functional.one_hot(y[:, 0].long(), self.classes).to(y)

    def value(self, y: Any, x: State) -> Tensor:  # noqa: D102
        rows = super().value(y, x)
        if not bool(((rows >= 0) & (rows < self.classes) & (rows == rows.round())).all()):
            raise KakusanError(
                f"a class is a whole number from 0 to {self.classes - 1}, got {y!r}"
            )
        return rows

    def __repr__(self) -> str:
        return f"Label({getattr(self.classify, '__name__', 'function')}, {self.classes})"


class Series(Observation):
    """Observations at several times; y holds their numbers one after the other.

    Arguments:
        seen: What is seen at each time.

    Example:
        >>> Series({0.5: Coordinates([0]), 1.0: Terminal()}).size(torch.zeros(1, 2))
        3
    """

    def __init__(self, seen: Mapping[float, Observation]) -> None:
        if not seen:
            raise KakusanError("Series sees a path at one time at least, and got none")
        self.seen = {float(t): seen[t] for t in seen}
        self._sizes: list[int] | None = None

    def size(self, x: State) -> int:  # noqa: D102
        self._sizes = [part.size(x) for part in self.seen.values()]
        return sum(self._sizes)

    def parts(self, end: float) -> list[tuple[float, Observation, slice]]:  # noqa: D102
        if self._sizes is None:
            raise KakusanError("call value(y, x) or size(x) of a Series first")
        out, lo = [], 0
        for (t, part), k in zip(self.seen.items(), self._sizes, strict=True):
            out.append((t, part, slice(lo, lo + k)))
            lo += k
        return out

    def left(self, t: Tensor, end: float) -> Tensor:  # noqa: D102
        times = torch.tensor(list(self.seen), dtype=t.dtype, device=t.device)
        way = (times - t.unsqueeze(-1)) * (1 if end >= float(t.min()) else -1)
        return torch.where(way > 0, way, math.inf).amin(-1)

    def draw(self, x: State, source: torch.Generator | None = None) -> Tensor:  # noqa: D102
        raise KakusanError("a Series is seen along a path: draw its parts at their times")

    def log_likelihood(self, y: Tensor, x: State) -> Tensor:  # noqa: D102
        raise KakusanError("a Series is seen along a path: ask its parts at their times")

    def told(self, y: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([part.told(y[:, own]) for _, part, own in self.parts(math.nan)], 1)

    def __repr__(self) -> str:
        return f"Series({self.seen})"


def _std(std: float) -> float:
    if not 0 <= std < math.inf:
        raise KakusanError(f"the standard deviation of noise is at least 0 and finite, got {std}")
    return float(std)
