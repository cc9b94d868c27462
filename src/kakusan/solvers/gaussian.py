r"""Chains of Gaussian steps: what conditioning is exact for.

.. math:: X_{k+1} = m_k(X_k) + G_k(X_k) \, dw_k, \qquad dw_k \sim N(0, h_k) .

Each step is normal given the state before it, whatever the drift. Euler-Maruyama's steps of any
SDE are of this form, of a reversed one too; so are the ancestral steps of a diffusion model, which
turn the state in the angle and add noise. Densities of such a chain, and the weights that
condition it, are exact at any step size; nothing needs the limit h -> 0.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from kakusan.core.operators import Operator, Scale
from kakusan.core.types import Field, State, advanced
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito, reverse
from kakusan.solvers.exponential import Ancestral


class GaussianSteps(abc.ABC):
    """A chain of Gaussian steps along a grid of times.

    Attributes:
        sde: The process that they are steps of.
        grid: The N + 1 times, float64 and on the CPU.
    """

    sde: SDE
    grid: Tensor

    @abc.abstractmethod
    def mean(self, x: State, k: int) -> State:
        """m_k(x), like x."""

    @abc.abstractmethod
    def operator(self, x: State, k: int) -> Operator:
        """G_k(x)."""

    @abc.abstractmethod
    def noise_shape(self, x: State) -> tuple[int, ...]:
        """The shape of dw beside x."""

    def inside(self, x: State) -> Tensor:
        """Which states are in the domain, (B,)."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    def __len__(self) -> int:
        """The number of steps, N."""
        return len(self.grid) - 1

    def h(self, k: int) -> float:
        """The variance of dw_k: the length of step k."""
        return abs(self.grid[k + 1] - self.grid[k]).item()

    def after(self, x: State, k: int, dw: Tensor) -> State:
        """Step k with the increment dw."""
        return self.operator(x, k).kick(self.mean(x, k), dw)


class EulerSteps(GaussianSteps):
    """The steps of Euler-Maruyama: m = x + f h.

    Arguments:
        sde: A process with noise, in the sense of Itô unless it is a `Stratonovich`.
        grid: The times, along the arrow of the process.

    Example:
        >>> from kakusan.core.operators import Scale
        >>> sde = SDE.of(lambda x, t: -x, Scale(2.0))
        >>> steps = EulerSteps(sde, torch.tensor([0.0, 0.5, 1.0]))
        >>> steps.after(torch.ones(1, 1), 0, torch.tensor([[0.25]]))
        tensor([[1.]])
    """

    def __init__(self, sde: SDE, grid: Tensor) -> None:
        self.sde, self.grid = ito(sde), torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        h = self.grid.diff()
        if self.grid.ndim != 1 or not len(h) or not (h * self.sde.direction > 0).all():
            raise KakusanError(
                f"a grid is a row of times along the arrow of the process, which runs from "
                f"t={sde.span[0]:g} to t={sde.span[1]:g}; got {self.grid.tolist()[:8]}"
            )
        self.points, self.lengths = self.grid.unbind(), h.tolist()

    def mean(self, x: State, k: int) -> State:  # noqa: D102
        return advanced(x, self.sde.drift(x, self.points[k]), self.lengths[k])

    def operator(self, x: State, k: int) -> Operator:  # noqa: D102
        return self.sde.diffusion(x, self.points[k])

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.sde.noise_shape(x))

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return self.sde.inside(x)


class AncestralSteps(GaussianSteps):
    r"""The steps of `Ancestral`: a turn in the angle, then noise; from noise to data.

    With the plan of a step in the words of `solvers.exponential`,

    .. math:: m = \varrho \, [\cos(\psi - \phi) \, x / r + \sin(\psi - \phi) \, v] ,
              \qquad G = z I ,

    where rho is the length of (alpha, sigma) at psi. A step down to sigma = 0 has G = 0.

    Arguments:
        process: The forward process.
        score: Its score.
        grid: Falling times; the last may be 0.
        noise: lambda, from 0 (no step has noise) to 1 (DDPM's posterior).

    Example:
        >>> from kakusan.processes.linear import VP
        >>> steps = AncestralSteps(VP(), lambda x, t: -x, torch.tensor([1.0, 0.5, 0.0]))
        >>> [round(steps.operator(torch.ones(1, 2), k).g.item(), 3) for k in range(len(steps))]
        [1.357, 0.0]
    """

    def __init__(self, process: LinearSDE, score: Field, grid: Tensor, noise: float = 1.0) -> None:
        self.grid = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        if self.grid.ndim != 1 or len(self.grid) < 2 or not (self.grid.diff() < 0).all():
            raise KakusanError(
                f"ancestral steps go from noise to data, along a row of falling times; got "
                f"{self.grid.tolist()[:8]}"
            )
        self.sde = reverse(process, score, noise)
        memory = Ancestral().init(self.sde, torch.empty(0), self.grid)
        self.velocity, self.plan, self.points = memory.velocity, memory.plan, self.grid.unbind()

    def mean(self, x: State, k: int) -> State:  # noqa: D102
        return self.turned(x, self.velocity(x, self.points[k]), k)

    def turned(self, x: State, v: State, k: int) -> State:
        """m_k(x), where the angular velocity v of x is at hand."""
        r, phi, psi, scale, _ = self.plan[k]
        turn = psi - phi
        return torch.add(x * (scale * math.cos(turn) / r), v, alpha=scale * math.sin(turn))

    def operator(self, x: State, k: int) -> Operator:  # noqa: D102
        return Scale(self.plan[k].z)

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return tuple(x.shape)
