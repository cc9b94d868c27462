r"""What noise does to what is seen: a linear map J, and the normal law that it makes.

With z ~ N(0, I) the numbers of noise of some steps, Y = y_0 + J z + R-noise has the covariance
S = J Jᵀ + R. A `Reach` has what conditioning needs of it: the shortest noise that makes up for a
difference, Jᵀ S⁻¹ r, the density N(r; 0, S), and the noise that is left once Y is known.

The steps before these may be narrowed. Were all that is left of the path like step k, T - t_k in
h's, Y would have the variance ((T - t_k) / h_k) J Jᵀ + std², and given Y the noise of the step the
covariance

.. math:: I - \varphi J^\top (J J^\top + \varphi \, std^2)^{-1} J, \qquad
          \varphi = \frac{h_k}{T - t_k} :

what is seen is narrowed, as in a Brownian bridge, and what is not seen is left as it is. Where the
noise of the step comes to what is seen by way of the drift, the tilt says how (`Tilt.foresight`).
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from kakusan.core.operators import Operator
from kakusan.core.types import State
from kakusan.processes.observations import Linear


class Reach(abc.ABC):
    """J, from standard normal numbers z to what is seen, (B, k), with S = J Jᵀ + std².

    Attributes:
        bad: Where S has no inverse, (B,).
    """

    bad: Tensor

    @abc.abstractmethod
    def lift(self, r: Tensor) -> Tensor:
        """Jᵀ S⁻¹ r."""

    @abc.abstractmethod
    def log_density(self, r: Tensor) -> Tensor:
        """Log N(r; 0, S), (B,) in float64."""

    @abc.abstractmethod
    def narrowed(self, z: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
        """√(I - share Jᵀ S⁻¹ J) z, and the log of the determinant, (B,): none where S is bad.

        Arguments:
            z: Numbers of noise, (B, m).
            share: A number, or one for each row, (B, 1).
        """


class Whole(Reach):
    """J = √h G, square, for the whole state: no S, which would square the condition of G."""

    def __init__(self, G: Operator, root: float, x: State) -> None:
        self.G, self.root, self.x = G, root, x
        self.log_det = G.logabsdet(x).double() + x[0].numel() * math.log(root)
        self.bad = ~self.log_det.isfinite()

    def lift(self, r: Tensor) -> Tensor:  # noqa: D102
        return self.G.solve(r.reshape(self.x.shape)).flatten(1) / self.root

    def log_density(self, r: Tensor) -> Tensor:  # noqa: D102
        return _log_normal(self.lift(r).double()) - self.log_det

    def narrowed(self, z: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return _narrowed(z, torch.where(self.bad.unsqueeze(1), 0.0, share).expand_as(z))


class Single(Reach):
    """J = √h H G for single coordinates with a noise each: S is diagonal."""

    def __init__(self, G: Operator, root: float, H: Linear, x: State, std: float) -> None:
        self.G, self.root, self.H, self.x, self.std = G, root, H, x, std
        self.S = root**2 * H.forward(G.gram(torch.ones_like(x))) + std**2
        self.bad = ~(self.S > 0).all(1)

    def lift(self, r: Tensor) -> Tensor:  # noqa: D102
        return self.root * self.G.tmv(self.H.transpose(r / self.S, self.x)).flatten(1)

    def log_density(self, r: Tensor) -> Tensor:  # noqa: D102
        S = self.S.double()
        return _log_normal(r.double() / S.sqrt()) - S.log().sum(1) / 2

    def narrowed(self, z: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        known = torch.where(self.S > 0, 1 - self.std**2 / self.S, 0.0)
        return _narrowed(z, share * self.H.transpose(known, self.x).flatten(1))


class Rows(Reach):
    """J as matrices A, (B, k, m), and S = A Aᵀ + R: a variance, or matrices (B, k, k)."""

    def __init__(self, A: Tensor, R: float | Tensor) -> None:
        self.A, k = A.double(), A.shape[1]
        S = self.A @ self.A.mT + (R if isinstance(R, Tensor) else R * torch.eye(k).to(self.A))
        # as correlations, so that units and small steps do not count
        self.units = S.diagonal(dim1=1, dim2=2).sqrt()
        C = S / (self.units.unsqueeze(2) * self.units.unsqueeze(1))
        self.root, info = torch.linalg.cholesky_ex(torch.where(C.isfinite(), C, 0.0))
        least = self.root.diagonal(dim1=1, dim2=2).amin(1) ** 2
        self.bad = (info != 0) | ~(least > 100 * k * torch.finfo(A.dtype).eps)

    def lift(self, r: Tensor) -> Tensor:  # noqa: D102
        v = torch.cholesky_solve((r.double() / self.units).unsqueeze(-1), self.root)
        return (self.A.mT @ (v / self.units.unsqueeze(-1))).squeeze(-1).to(r)

    def log_density(self, r: Tensor) -> Tensor:  # noqa: D102
        u = (r.double() / self.units).unsqueeze(-1)
        white = torch.linalg.solve_triangular(self.root, u, upper=False).squeeze(-1)
        volume = self.root.diagonal(dim1=1, dim2=2).log() + self.units.log()
        return _log_normal(white) - volume.sum(1)

    def narrowed(self, z: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        A = torch.where(self.bad[:, None, None], 0.0, self.A / self.units.unsqueeze(2))
        L = torch.where(self.bad[:, None, None], torch.eye(A.shape[1]).to(A), self.root)
        B = torch.linalg.solve_triangular(L, A, upper=False)
        known, U = torch.linalg.eigh(B @ B.mT)  # all 1, or 0 where bad, where std = 0
        known = known.clamp(0.0, 1.0)
        less = share / (1 + (1 - share * known).sqrt())  # (1 - √(1 - share λ)) / λ
        V = U.mT @ B
        z_ = z.double().unsqueeze(-1)
        out = z_ - V.mT @ (less.unsqueeze(-1) * (V @ z_))
        return out.squeeze(-1).to(z), (1 - share * known).log().sum(1) / 2


def _narrowed(z: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Each number narrowed by what is known of it."""
    return (1 - known).sqrt() * z, (1 - known.double()).log().sum(1) / 2


def _log_normal(z: Tensor) -> Tensor:
    return -(z * z).sum(1) / 2 - z.shape[1] / 2 * math.log(2 * math.pi)
