r"""Noise whose direction depends on the state: landmarks that move together, and a swirl.

References:
    Stochastic flows and stochastic differential equations (Kunita, 1990)
    Conditioning non-linear and infinite-dimensional diffusion processes (Baker et al., 2024),
        arXiv 2402.01434
    A complete recipe for stochastic gradient MCMC (Ma, Chen and Fox, 2015), arXiv 1506.04696
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kakusan.core.operators import Dense, NotElliptic, Operator
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.processes.zoo.laws import log_normal, total
from kakusan.processes.zoo.parameters import Value, count, frozen, keep, like, parameter


class Pointwise(Dense):
    """The matrix K ⊗ I: one symmetric (B, N, N) for each coordinate of N points (B, N, k).

    A `Dense` in all that can be seen, at a k-th of its work.

    Example:
        >>> Pointwise(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), 2).mv(torch.ones(1, 2, 2))
        tensor([[[1.5000, 1.5000],
                 [1.5000, 1.5000]]])
    """

    def __init__(self, K: Tensor, k: int) -> None:
        self.K, self.k = K, k

    @property
    def G(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The whole matrix, (B, N k, N k)."""
        return torch.kron(self.K, torch.eye(self.k, dtype=self.K.dtype, device=self.K.device))

    def mv(self, z: Tensor) -> State:  # noqa: D102
        return (self.K.to(z.dtype) @ z.reshape(len(z), -1, self.k)).reshape(z.shape)

    def kick(self, x: State, z: Tensor) -> State:  # noqa: D102
        return x + self.mv(z)

    def tmv(self, v: State) -> Tensor:  # noqa: D102
        return self.mv(v)

    def gram(self, v: State) -> State:  # noqa: D102
        return self.mv(self.mv(v))

    def tsolve(self, z: Tensor) -> State:  # noqa: D102
        solution, info = torch.linalg.solve_ex(self.K.to(z.dtype), z.reshape(len(z), -1, self.k))
        if (info != 0).any():
            raise NotElliptic(f"G is singular for {int((info != 0).sum())} of {len(z)} states")
        return solution.reshape(z.shape)

    def solve(self, v: State) -> Tensor:  # noqa: D102
        return self.tsolve(v)

    def scaled(self, c: float) -> Pointwise:  # noqa: D102
        return Pointwise(c * self.K, self.k)

    def logabsdet(self, x: State) -> Tensor:  # noqa: D102
        return self.k * torch.linalg.slogdet(self.K).logabsdet.expand(len(x))

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return tuple(x.shape)


@frozen
class Landmarks(SDE):
    r"""N points of an outline in the plane, moved by one random field: a Kunita flow (Itô).

    .. math:: dX_i = \sum_j k(X_i, X_j) \, dW_j, \qquad
              k(x, y) = \tfrac{\alpha}{2} \exp(-|x - y|^2 / 2 \kappa^2)

    States are (B, N, 2), and each landmark has its own noise in the plane. Near points move
    together, so that outlines stay outlines; two points that meet make G singular. No law is
    known in closed form; X is a martingale.

    Arguments:
        points: How many, on the unit circle, or where they are, (N, 2).
        alpha: The strength of the field, > 0.
        kappa: How far it reaches, > 0, in units of length.
        span: Where time starts and ends.

    References:
        Conditioning non-linear and infinite-dimensional diffusion processes (Baker et al., 2024)

    Example:
        >>> Landmarks(points=4).start.round(decimals=6).abs()
        tensor([[1., 0.],
                [0., 1.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    points: int | Tensor
    alpha: Value
    kappa: Value
    span: tuple[float, float]

    def __init__(
        self,
        points: int | Sequence[Sequence[float]] | Tensor = 8,
        alpha: float | Tensor = 0.3,
        kappa: float | Tensor = 0.5,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        where = count("points", points) if isinstance(points, int) else _places(points)
        keep(self, points=where, alpha=parameter("alpha", alpha, above=0.0), span=span)
        keep(self, kappa=parameter("kappa", kappa, above=0.0))

    @property
    def start(self) -> Tensor:
        """The points themselves, (N, 2)."""
        if isinstance(self.points, Tensor):
            return self.points
        angle = torch.arange(self.points, dtype=torch.float64) * (2 * math.pi / self.points)
        return torch.stack([angle.cos(), angle.sin()], 1)

    def _field(self, x: State) -> Tensor:
        """K_ij = k(x_i, x_j), (B, N, N)."""
        u, v = x[..., :1], x[..., 1:]
        square = (u - u.mT).square() + (v - v.mT).square()
        return (square * like(-0.5 / self.kappa**2, x)).exp() * like(self.alpha / 2, x)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Pointwise(self._field(x), 2)

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return tuple(x.shape)

    def gram_divergence(self, x: State, t: Time) -> State:
        """Σ_l g_il (k_il - k_0) - Σ_l k_il Σ_j g_lj with g_il = -k_il (x_i - x_l) / kappa²."""
        K = self._field(x)

        def pushed(w: Tensor) -> Tensor:  # Σ_l w_il (x_i - x_l)
            return x * w.sum(-1, keepdim=True) - w @ x

        out = K @ pushed(K) - pushed(K * (K - like(self.alpha / 2, x)))
        return out * like(1 / self.kappa**2, x)


def _places(points: Sequence[Sequence[float]] | Tensor) -> Tensor:
    places = torch.as_tensor(parameter("points", points, dims=2))
    if places.ndim != 2 or places.shape[1] != 2:
        raise KakusanError(
            f"points must be a number of them or places in the plane (N, 2), "
            f"got shape {tuple(places.shape)}"
        )
    return places.detach()


@frozen
class Swirl(SDE):
    r"""A process in the plane whose noise turns with the state, settling in N(0, I) all the same.

    .. math:: dX = \big[ \tfrac12 (\nabla \cdot D - D X) + \omega J X \big] dt + G \, dW, \qquad
              G = \sigma R_\phi \, \mathrm{diag}(1, b) \, R_\phi^\top, \quad
              \phi = \tfrac{k}{2} |X|^2

    with D = GGᵀ and J a quarter turn. The first part is reversible; the rotation along circles
    leaves N(0, I) as it is, so the reverse process has the same stationary law, and the drift
    of a swirl that rotates the other way.

    Arguments:
        turn: k, how fast the axes of the noise turn outwards.
        ratio: b > 0, the noise along the one axis over that along the other.
        rotation: omega; 0 makes the process reversible.
        sigma: The size of the noise, > 0.
        span: Where time starts and ends.

    References:
        A complete recipe for stochastic gradient MCMC (Ma, Chen and Fox, 2015)

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> Swirl(turn=0.0, ratio=1.0, rotation=2.0).drift(x, torch.tensor(0.0))
        tensor([[-0.5000,  2.0000]])
    """

    turn: Value
    ratio: Value
    rotation: Value
    sigma: Value
    span: tuple[float, float]

    def __init__(
        self,
        turn: float | Tensor = 1.0,
        ratio: float | Tensor = 0.3,
        rotation: float | Tensor = 1.0,
        sigma: float | Tensor = 1.0,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        keep(self, turn=parameter("turn", turn), rotation=parameter("rotation", rotation))
        keep(self, ratio=parameter("ratio", ratio, above=0.0), span=span)
        keep(self, sigma=parameter("sigma", sigma, above=0.0))

    @property
    def start(self) -> Tensor:
        """One to the right of the centre."""
        return torch.tensor([1.0, 0.0], dtype=torch.float64)

    def _axis(self, x: State) -> tuple[Tensor, Tensor]:
        """The cosine and sine of 2 phi, (B, 1): all that symmetric matrices need of phi."""
        angle = like(self.turn, x) * (x * x).sum(1, keepdim=True)
        return angle.cos(), angle.sin()

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        c, s = self._axis(x)
        p, q = (like(self.sigma * (1 + e * self.ratio) / 2, x) for e in (1, -1))
        return Dense(torch.cat([p + q * c, q * s, q * s, p - q * c], 1).reshape(-1, 2, 2))

    def _divergence(self, x: State, c: Tensor, s: Tensor) -> State:
        u, v = x[:, :1], x[:, 1:]
        n = like(self.sigma**2 * (1 - self.ratio**2) * self.turn, x)
        return n * torch.cat([c * v - s * u, c * u + s * v], 1)

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return self._divergence(x, *self._axis(x))

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        c, s = self._axis(x)
        u, v = x[:, :1], x[:, 1:]
        m, n = (like(self.sigma**2 * (1 + e * self.ratio**2) / 2, x) for e in (1, -1))
        Dx = m * x + n * torch.cat([c * u + s * v, s * u - c * v], 1)
        turned = torch.cat([-v, u], 1) * like(self.rotation, x)
        return (self._divergence(x, c, s) - Dx) / 2 + turned

    def log_stationary(self, x: State) -> Tensor:
        """Log N(x; 0, I), (B,), normalised."""
        y = x.double()
        return total(log_normal(y, torch.zeros_like(y), torch.ones_like(y)), x)
