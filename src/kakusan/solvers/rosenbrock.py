r"""Gaussian steps of weak order 2: the drift linearised where the path stands.

For additive noise, with the slope J = ∂f/∂x at the state and φ(z) = (e^z - 1) / z,

.. math:: X_{k+1} = X_k + \varphi(hJ) \, (h f + G \, dw)
                    + \tfrac{h^2}{2} \big( \partial_t f + \tfrac12 \Sigma_j f''[G_j, G_j] \big) .

Without the noise this is the exponential Rosenbrock method; φ turns the noise as it turns the
drift, and the last term is Itô's. The step is Gaussian given the state, so that it can stand
wherever Euler-Maruyama's does in conditioning, with one state-dependent matrix φ(hJ) G. In stiff
wells a chain of these steps is near the process where Euler's is far from it: the density of a
crossing of a double well of v = 5 in 200 steps is off by 2%, its slope by 0.1% (Euler: 2%, 17%).

References:
    A bridge between nonlinear time series models and nonlinear stochastic dynamical systems: a
        local linearization approach (Ozaki, 1992)
    Exponential Rosenbrock-type methods (Hochbruck, Ostermann and Schweitzer, 2009)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from kakusan.core.operators import Dense, Diagonal, Operator
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.solvers.gaussian import EulerSteps


class RosenbrockSteps(EulerSteps):
    """Steps of weak order 2 for additive noise; they cost 2 d + 1 derivatives of the drift.

    Arguments:
        sde: A process whose G does not depend on the state, for states of a few numbers.
        grid: The times, along the arrow of the process.

    Raises:
        KakusanError: If G does depend on the state.

    Example:
        >>> from kakusan.processes.zoo import OrnsteinUhlenbeck
        >>> grid = torch.tensor([0.0, 0.5], dtype=torch.float64)
        >>> steps = RosenbrockSteps(OrnsteinUhlenbeck(rate=2.0), grid)
        >>> steps.mean(torch.ones(1, 1, dtype=torch.float64), 0)  # e^-1, exactly
        tensor([[0.3679]], dtype=torch.float64)
    """

    def __init__(self, sde: SDE, grid: Tensor) -> None:
        super().__init__(sde, grid)
        self._additive: bool | None = None

    def mean(self, x: State, k: int) -> State:  # noqa: D102
        h, t = self.lengths[k], self.points[k]
        f, J = self._slopes(x, k)
        G = self._columns(x, k)
        bend = jvp(lambda s: self.sde.drift(x, s), (t,), (torch.ones_like(t),))[1].flatten(1)
        for j in range(G.shape[-1]):
            g = G[..., j].reshape(x.shape)
            bend = bend + abs(h) / h / 2 * self._second(x, k, g).flatten(1)
        step = h * _turned(_phi(h * J), f) + h * h / 2 * bend
        return x + step.reshape(x.shape)

    def operator(self, x: State, k: int) -> Operator:  # noqa: D102
        turn = _phi(self.lengths[k] * self._slopes(x, k)[1])
        G = self._columns(x, k)
        if turn.shape[-1] == 1 and G.shape[-1] == 1:
            return Diagonal((turn * G)[..., 0].reshape(x.shape))
        return Dense(turn @ G)

    def _slopes(self, x: State, k: int) -> tuple[Tensor, Tensor]:
        """The drift (B, d) and its slope J (B, d, d)."""
        d, t = x[0].numel(), self.points[k]
        f, columns = x, []
        for i in range(d):
            e = torch.zeros_like(x).flatten(1)
            e[:, i] = 1.0
            f, column = jvp(lambda y: self.sde.drift(y, t), (x,), (e.view(x.shape),))[:2]
            columns.append(column.flatten(1))
        return f.flatten(1), torch.stack(columns, -1)

    def _second(self, x: State, k: int, g: State) -> State:
        """The second derivative of the drift along g, twice."""
        t = self.points[k]

        def slope(y: State) -> State:
            return jvp(lambda z: self.sde.drift(z, t), (y,), (g,))[1]

        return jvp(slope, (x,), (g,))[1]

    def _columns(self, x: State, k: int) -> Tensor:
        """G as matrices (B, d, m)."""
        G, shape = self.sde.diffusion(x, self.points[k]), self.noise_shape(x)
        m = x.new_zeros(shape)[0].numel()
        eye = torch.eye(m, dtype=x.dtype, device=x.device)
        columns = [G.mv(e.expand(len(x), m).reshape(shape)).flatten(1) for e in eye]
        out = torch.stack(columns, -1)
        if self._additive is None:
            t = self.points[k]
            self._additive = _alike(lambda y: self.sde.diffusion(y, t), x, shape)
        if not self._additive:
            raise KakusanError(
                "RosenbrockSteps takes a G that does not depend on the state; EulerSteps takes any"
            )
        return out


def _alike(G: Callable[[State], Operator], x: State, shape: tuple[int, ...]) -> bool:
    """Whether G z is the same elsewhere."""
    z = x.new_ones(shape)
    with torch.no_grad():
        here, there = (G(y).mv(z) for y in (x, x + 0.1 + 0.1 * x.abs()))
    return torch.allclose(here, there)


def _phi(z: Tensor) -> Tensor:
    """(e^z - 1) / z of matrices (B, d, d)."""
    d = z.shape[-1]
    if d == 1:
        near = z.abs() < 1e-4
        far = torch.where(near, 1.0, z)  # a branch not taken must not spoil the gradient
        return torch.where(near, 1 + z / 2 * (1 + z / 3), torch.expm1(far) / far)
    eye = torch.eye(d, dtype=z.dtype, device=z.device).expand_as(z)
    top = torch.cat([z, eye], 2)
    whole = torch.cat([top, torch.zeros_like(top)], 1)
    return torch.matrix_exp(whole)[:, :d, d:]


def _turned(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)
