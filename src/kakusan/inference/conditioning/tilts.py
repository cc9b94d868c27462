r"""A tilt: what has to be added to a process so that it ends where it was seen.

With h(x, t; y) = p(Y = y | X_t = x), the process given Y = y has the drift f + GGᵀ ∇log h (Doob).
A `Tilt` says ∇log h, or an approximation of it, for a whole family of values y. What moves a path
is the *control* c = Gᵀ ∇log h, in units of the noise: a step adds G (h c + dw). Controls need no
inverse of G, exist for degenerate noise, and E|c - c*|² / 2 is a rate of relative entropy.

References:
    Conditional Brownian motion and the boundary limits of harmonic functions (Doob, 1957)
"""

from __future__ import annotations

import abc
import copy
from typing import Self

import torch
from torch import Tensor

from kakusan.core.types import Field, State, Time
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.reach import Reach
from kakusan.processes.observations import Linear
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps


class Tilt(abc.ABC):
    """∇log h of a process, for values y of shape (B, k).

    Attributes:
        sde: The process that is tilted, in the sense of Itô.
        end: When the end is seen.
    """

    sde: SDE
    end: float

    @abc.abstractmethod
    def score(self, x: State, t: Time, y: Tensor) -> State:
        """∇log h(x, t; y), like x; t is () or (B,)."""

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:
        """Gᵀ ∇log h, with the shape of the noise."""
        return self.sde.diffusion(x, t).tmv(self.score(x, t, y))

    def pulls(self, x: State, t: Time, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gᵀ ∇log h at x, and the control: two things along a chain, whose noise acts behind x."""
        c = self.control(x, t, y)
        return c, c

    def log_h(self, x: State, t: Time, y: Tensor) -> Tensor:
        """Log h(x, t; y), (B,), where the tilt knows it."""
        raise KakusanError(f"{type(self).__name__} knows the slope of log h, not its value")

    def foresight(
        self, seen: Linear, x: State, t: Time, s: Time, end: float
    ) -> tuple[Reach, Tensor | float] | None:
        """What the noise of a step from t to s does to what is seen at `end`, and its share.

        The share, a number or (B, 1), is how far to go by it. None leaves both to the noise as it
        is at x.
        """
        return None

    def along(self, steps: GaussianSteps) -> Self:
        """The same for a chain, whose law is not quite that of the process; itself if unknown."""
        return self

    def until(self, end: float) -> Self:
        """The same for another end."""
        twin = copy.copy(self)
        twin.end = float(end)
        return twin

    def given(self, y: Tensor) -> Field:
        """The field (x, t) -> ∇log h(x, t; y), for `kakusan.tilt`."""
        return lambda x, t: self.score(x, t, y.expand(len(x), -1))


class Untilted(Tilt):
    """No tilt: h = 1."""

    def __init__(self, sde: SDE) -> None:
        self.sde, self.end = ito(sde), float(sde.span[1])

    def score(self, x: State, t: Time, y: Tensor) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        return x.new_zeros(self.sde.noise_shape(x))

    def log_h(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        return x.new_zeros(len(x))


class LinearLaw(Tilt):
    """A tilt by the law of a linear process, or of its Euler steps along a grid.

    Attributes:
        grid: The times of the chain; None for the process.
    """

    grid: Tensor | None = None
    _chain: Self | None = None

    def along(self, steps: GaussianSteps) -> Self:
        """The tilt of the Euler steps of the linear process."""
        if self.grid is steps.grid or not isinstance(steps, EulerSteps):
            return self
        if self._chain is None or self._chain.grid is not steps.grid:
            self._chain = self.until(self.end)
            self._chain.grid = steps.grid
        return self._chain

    def until(self, end: float) -> Self:
        """The same for another end."""
        twin = super().until(end)
        twin._chain = None
        return twin

    def pulls(self, x: State, t: Time, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        c = self.sde.diffusion(x, t).tmv(self.score(x, t, y))
        return c, c if self.grid is None else self.control(x, t, y)
