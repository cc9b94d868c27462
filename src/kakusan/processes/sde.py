r"""The Itô SDE dx = f(x, t) dt + G(x, t) dw, run from span[0] to span[1].

One clock: t is the forward time of the original process, in float64, with data at the start. A
reversed process keeps the clock and owns a reversed span; its steps h = s - t are negative and dw
has variance |h|. Nothing here assumes a closed-form law: that is `LinearSDE`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from kakusan.core import calculus
from kakusan.core.operators import Operator
from kakusan.core.types import Field, State, Time


class SDE(abc.ABC):
    """A stochastic differential equation in the sense of Itô.

    A subclass gives `drift` and `diffusion`; the rest follows.

    Example:
        >>> class Swirl(SDE):
        ...     def drift(self, x, t):
        ...         return -x
        ...     def diffusion(self, x, t):
        ...         return Diagonal(1 + x**2)
        >>> from kakusan.core.operators import Diagonal
        >>> Swirl().gram_divergence(torch.tensor([[0.5, -1.0]]), torch.tensor(0.0))
        tensor([[ 2.5000, -8.0000]])
    """

    span: tuple[float, float] = (0.0, 1.0)
    domain = ""  # where states may be, in words, as "x >= 0"; nothing where they may be anywhere

    @abc.abstractmethod
    def drift(self, x: State, t: Time) -> State:
        """f(x, t), with the shape of x."""

    @abc.abstractmethod
    def diffusion(self, x: State, t: Time) -> Operator:
        """G(x, t)."""

    def noise_shape(self, x: State) -> tuple[int, ...]:
        """The shape of dw beside x; asked of G at the start of the span."""
        t = torch.tensor(self.span[0], dtype=torch.float64)
        return self.diffusion(x, t).noise_shape(x)

    def gram_divergence(self, x: State, t: Time) -> State:
        """∇·(GGᵀ), by forward-mode autograd: d passes through G. Additive noise overrides it."""
        return calculus.gram_divergence(self.diffusion, x, t)

    def inside(self, x: State) -> Tensor:
        """Which states are in the domain, as booleans of shape (B,)."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    @property
    def direction(self) -> int:
        """+1 where the span follows the clock, -1 where it runs against it."""
        return 1 if self.span[1] >= self.span[0] else -1

    @staticmethod
    def of(
        drift: Field,
        diffusion: Operator | Callable[[State, Time], Operator],
        span: tuple[float, float] = (0.0, 1.0),
    ) -> SDE:
        """An SDE from two functions, or from a drift and a constant operator.

        Arguments:
            drift: The field (x, t) -> f.
            diffusion: The field (x, t) -> Operator, or one operator for additive noise.
            span: Where time starts and ends.

        Example:
            >>> from kakusan.core.operators import Scale
            >>> SDE.of(lambda x, t: -x, Scale(1.0)).drift(torch.ones(1, 2), torch.tensor(0.0))
            tensor([[-1., -1.]])
        """
        if isinstance(diffusion, Operator):
            return _Additive(drift, diffusion, span)
        return _OfFunctions(drift, diffusion, span)


class KnownTransition(SDE):
    """A process whose law from one time to another can be drawn exactly: `solvers.Exact` does."""

    @abc.abstractmethod
    def exact(self, x: State, t: Time, s: Time, dw: Tensor, source: torch.Generator) -> State:
        """A draw of X_s given X_t = x, for s > t.

        Where the solution is a function of the Brownian path (geometric Brownian motion) it is
        that function of `dw`, the increment from t to s; where only the law is known, `dw`
        divided by sqrt(s - t) serves as normal numbers, and `source` gives any others.
        """


class Splittable(SDE):
    """A process that can be split into two flows with closed forms: `solvers.Splitting` uses it.

    In the sense of Stratonovich dx = f° dt + G ∘ dw: `flow` solves dx = f° dt and `kick` solves
    dx = G ∘ dw, each exactly and without leaving the domain.
    """

    @abc.abstractmethod
    def flow(self, x: State, t: Time, s: Time) -> State:
        """The solution of dx = f°(x) dt at time s, from x at time t."""

    @abc.abstractmethod
    def kick(self, x: State, t: Time, dw: Tensor) -> State:
        """The solution of dx = G(x, t) ∘ dw after the increment dw, from x."""


class _OfFunctions(SDE):
    def __init__(
        self, drift: Field, diffusion: Callable[[State, Time], Operator], span: tuple[float, float]
    ) -> None:
        self._drift, self._diffusion, self.span = drift, diffusion, span

    def drift(self, x: State, t: Time) -> State:
        return self._drift(x, t)

    def diffusion(self, x: State, t: Time) -> Operator:
        return self._diffusion(x, t)


class _Additive(SDE):
    def __init__(self, drift: Field, G: Operator, span: tuple[float, float]) -> None:
        self._drift, self._G, self.span = drift, G, span

    def drift(self, x: State, t: Time) -> State:
        return self._drift(x, t)

    def diffusion(self, x: State, t: Time) -> Operator:
        return self._G

    def gram_divergence(self, x: State, t: Time) -> State:
        return torch.zeros_like(x)
