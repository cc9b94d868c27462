r"""What the diffusion G is at a point: a linear operator from noise to state.

An SDE dx = f dt + G dw only ever *applies* G, so nobody branches on its form:

====================  =========================  ===================================
form                  G                          noise shape
====================  =========================  ===================================
``Scale(g)``          g I, g of shape () or (B,)  that of the state
``Diagonal(g)``       diag(g), g like the state   that of the state
``Dense(G)``          (d, m) or (B, d, m)         (B, m), acting on flattened states
``Zero()``            0                           none is drawn
====================  =========================  ===================================
"""

from __future__ import annotations

import abc
import functools
import math

import torch
from torch import Tensor

from kakusan.core.types import State, per_sample
from kakusan.errors import KakusanError


class NotElliptic(KakusanError):
    """A routine needs the inverse of G, and G has none."""


class Operator(abc.ABC):
    """The value of G at one point (x, t)."""

    deterministic = False

    @abc.abstractmethod
    def mv(self, z: Tensor) -> State:
        """G z, from noise to state."""

    @abc.abstractmethod
    def tmv(self, v: State) -> Tensor:
        """Gᵀ v, from state to noise."""

    @abc.abstractmethod
    def tsolve(self, z: Tensor) -> State:
        """G⁻ᵀ z; raises `NotElliptic` where G has no inverse."""

    @abc.abstractmethod
    def solve(self, v: State) -> Tensor:
        """The shortest z with G z = v; raises `NotElliptic` where there is none."""

    @abc.abstractmethod
    def scaled(self, c: float) -> Operator:
        """The operator c G."""

    @abc.abstractmethod
    def logabsdet(self, x: State) -> Tensor:
        """log|det G| for the states x, with shape (B,)."""

    def gram(self, v: State) -> State:
        """G Gᵀ v."""
        return self.mv(self.tmv(v))

    def kick(self, x: State, z: Tensor) -> State:
        """X + G z, in one pass over the state where the form allows."""
        return x + self.mv(z)

    def noise_shape(self, x: State) -> tuple[int, ...]:
        """The shape of dw beside the state x."""
        return tuple(x.shape)


class Zero(Operator):
    """No noise: what makes an SDE an ODE.

    Example:
        >>> Zero().mv(torch.ones(2, 3))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    deterministic = True

    def mv(self, z: Tensor) -> State:  # noqa: D102
        return torch.zeros_like(z)

    def tmv(self, v: State) -> Tensor:  # noqa: D102
        return torch.zeros_like(v)

    def tsolve(self, z: Tensor) -> State:  # noqa: D102
        raise NotElliptic("this SDE has no noise (G = 0), so G has no inverse")

    def solve(self, v: State) -> Tensor:  # noqa: D102
        if (v != 0).any():
            raise NotElliptic("this SDE has no noise (G = 0), which reaches no state but 0")
        return torch.zeros_like(v)

    def scaled(self, c: float) -> Zero:  # noqa: D102
        return self

    def logabsdet(self, x: State) -> Tensor:  # noqa: D102
        return x.new_full(x.shape[:1], -math.inf)


class Scale(Operator):
    """g times the identity, with g of shape () or (B,).

    Example:
        >>> Scale(2.0).gram(torch.ones(1, 3))
        tensor([[4., 4., 4.]])
    """

    def __init__(self, g: float | Tensor) -> None:
        # a Python float must not pass through float32 on its way
        self.g = g if isinstance(g, Tensor) else torch.tensor(g, dtype=torch.float64)

    def _beside(self, x: Tensor) -> Tensor:
        return per_sample(self.g, x)

    def mv(self, z: Tensor) -> State:  # noqa: D102
        return self._beside(z) * z

    def tmv(self, v: State) -> Tensor:  # noqa: D102
        return self._beside(v) * v

    def kick(self, x: State, z: Tensor) -> State:  # noqa: D102
        return torch.addcmul(x, self._beside(z), z)

    def tsolve(self, z: Tensor) -> State:  # noqa: D102
        if (self.g == 0).any():
            raise NotElliptic(f"G = {self.g.tolist()} is zero, so it has no inverse")
        return z / self._beside(z)

    def solve(self, v: State) -> Tensor:  # noqa: D102
        g = self._beside(v)
        unreached = ((g == 0) & (v != 0)).flatten(1).any(1)
        if unreached.any():
            raise NotElliptic(
                f"G is zero where a vector is not, for {int(unreached.sum())} of {len(v)} states: "
                "no noise reaches them"
            )
        return torch.where(g == 0, torch.zeros_like(v), v / g)

    def scaled(self, c: float) -> Scale:  # noqa: D102
        return type(self)(c * self.g)

    def logabsdet(self, x: State) -> Tensor:  # noqa: D102
        return self._beside(x).abs().log().expand_as(x).flatten(1).sum(1)


class Diagonal(Scale):
    """diag(g), with g broadcastable to the state (B, *shape).

    Example:
        >>> Diagonal(torch.tensor([[1.0, 2.0]])).mv(torch.ones(1, 2))
        tensor([[1., 2.]])
    """

    def _beside(self, x: Tensor) -> Tensor:
        return self.g.to(x.dtype)


class Dense(Operator):
    """A full matrix, (d, m) or (B, d, m), acting on flattened states of d numbers.

    Example:
        >>> Dense(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).mv(torch.ones(1, 2))
        tensor([[2., 1.]])
    """

    def __init__(self, G: Tensor) -> None:
        self.G = G

    def _times(self, G: Tensor, v: Tensor) -> Tensor:
        G, v = G.to(v.dtype), v.flatten(1)
        if G.ndim == 2:
            return v @ G.mT
        if v.shape[-1] > 8:
            return (G * v.unsqueeze(-2)).sum(-1)
        # a few columns, one at a time: four times faster than the product and its strided sum
        columns = zip(G.unbind(-1), v.unbind(-1), strict=True)
        return functools.reduce(torch.add, [column * z[:, None] for column, z in columns])

    def mv(self, z: Tensor) -> State:  # noqa: D102
        Gz = self._times(self.G, z)
        return Gz.reshape(z.shape) if Gz.numel() == z.numel() else Gz

    def kick(self, x: State, z: Tensor) -> State:  # noqa: D102
        return x + self._times(self.G, z).reshape(x.shape)

    def tmv(self, v: State) -> Tensor:  # noqa: D102
        Gv = self._times(self.G.mT, v)
        return Gv.reshape(v.shape) if Gv.numel() == v.numel() else Gv

    def gram(self, v: State) -> State:  # noqa: D102
        return self._times(self.G, self._times(self.G.mT, v)).reshape(v.shape)

    def tsolve(self, z: Tensor) -> State:  # noqa: D102
        d, m = self.G.shape[-2:]
        if d != m:
            raise NotElliptic(f"G is {d} x {m}, and only a square matrix has an inverse")
        Gt = self.G.mT.to(z.dtype).expand(len(z), d, d)
        solution, info = torch.linalg.solve_ex(Gt, z.flatten(1).unsqueeze(-1))
        if (info != 0).any():
            raise NotElliptic(f"G is singular for {int((info != 0).sum())} of {len(z)} states")
        return solution.squeeze(-1).reshape(z.shape)

    def solve(self, v: State) -> Tensor:  # noqa: D102
        d, m = self.G.shape[-2:]
        G, u = self.G.to(v.dtype).expand(len(v), d, m), v.flatten(1).unsqueeze(-1)
        z, info = torch.linalg.solve_ex(G, u) if d == m else (None, None)
        if z is None or (info != 0).any():
            z = torch.linalg.pinv(G) @ u
            near = torch.finfo(v.dtype).eps ** 0.5 * u.norm(dim=1)
            unreached = (G @ z - u).norm(dim=1) > near
            if unreached.any():
                raise NotElliptic(
                    f"G is {d} x {m}, and its columns do not reach the vector wanted for "
                    f"{int(unreached.sum())} of {len(v)} states"
                )
        return z.reshape(v.shape if d == m else (len(v), m))

    def scaled(self, c: float) -> Dense:  # noqa: D102
        return Dense(c * self.G)

    def logabsdet(self, x: State) -> Tensor:  # noqa: D102
        return torch.linalg.slogdet(self.G.to(x.dtype)).logabsdet.expand(len(x))

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        m = self.G.shape[-1]
        return tuple(x.shape) if m == x[0].numel() else (len(x), m)
