r"""Principal axes of a model's samples, and what a linear measurement tells of x_0 along them.

For Gaussian data the covariance of x_0 given x_t has the axes of the data at all times, with
variances that do not depend on x_t. Of any model's paths these are averages; Kalman's formula with
them is exact for Gaussian data, takes no derivative of the denoiser, and knows that samples vary
together, as the brightness of pixels does, where the isotropic variance of ΠGDM does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.processes.observations import Linear

TINY = 1e-10  # of the largest: what passes for a zero of H Hᵀ
KEPT = 0.99  # the share of the variance of samples that the kept axes have


class Axes(NamedTuple):
    """Principal axes of a model's samples, and how far x_0 strays from x̂_0 along them.

    Attributes:
        mean: The mean sample, (d,).
        Q: The first q axes, (d, q).
        std: The standard deviations of samples along them, (q,).
        variance: Of X_0 - x̂_0 along them before each step, in units of r_k², (K, q).
        rest: The same in all other directions, (K,).
    """

    mean: Tensor
    Q: Tensor
    std: Tensor
    variance: Tensor
    rest: Tensor

    @staticmethod
    def of(end: State, x0: Tensor, spread: Sequence[float]) -> Axes:
        """As many as have `KEPT` of the variance of samples.

        Arguments:
            end: The samples, (P, *shape): the ends of paths.
            x0: What their states were denoised to before each step, (K, P, *shape).
            spread: The units r_k.
        """
        end = end.flatten(1).double()
        mean, n = end.mean(0), len(end)
        values, Q = torch.linalg.eigh((end - mean).mT @ (end - mean) / n)
        values, Q = values.flip(0).clamp(min=0), Q.flip(1)
        q = min(len(values), 1 + int((values.cumsum(0) < KEPT * values.sum()).sum()))
        Q, std = Q[:, :q], values[:q].sqrt()
        variance, rest = [], []
        for guess, r in zip(x0, spread, strict=False):
            away = (end - guess.flatten(1)) / r
            along = away @ Q
            variance.append(along.square().mean(0))
            left = away.square().sum(1) - along.square().sum(1)
            rest.append(left.mean().clamp(min=0) / max(1, len(values) - q))
        parts = (mean, Q, std.clamp(min=1e-6), torch.stack(variance), torch.stack(rest))
        return Axes(*(part.float() for part in parts))

    def to(self, device: torch.device) -> Axes:
        """The same on a device."""
        return Axes(*(part.to(device) for part in self))

    def along(self, x0: State) -> Tensor:
        """Samples in units of the axes, (B, q)."""
        return (x0.flatten(1).float() - self.mean) @ self.Q / self.std


class Lens:
    """What a linear measurement tells of x_0, at each step.

    Arguments:
        observation: The measurement.
        spread: The units r_k of the steps, and that of the last, which has no noise.
        axes: The covariance of X_0 - x̂_0; without them it is r_k² in all directions.
        x: States, for their shape.

    Raises:
        KakusanError: If a measurement without noise says a thing twice.
    """

    def __init__(
        self, observation: Linear, spread: Sequence[float], axes: Axes | None, x: State
    ) -> None:
        self.observation, self.spread, self.axes = observation, spread, axes
        H = self.H = observation.matrix(x[:1].detach().double())
        noise = observation.std**2 * torch.eye(len(H)).to(H)
        self.left = noise if observation.std else spread[-1] ** 2 * H @ H.mT
        root, info = torch.linalg.cholesky_ex(self.left)
        if info or not root.diagonal().amin() ** 2 > TINY * root.diagonal().amax() ** 2:
            raise KakusanError(
                f"{observation} sees {len(H)} numbers without noise, and some follow from the "
                "others: see fewer, or give it a noise, std > 0"
            )
        self.root, self.gains = root, dict[int, Tensor]()

    def log_likelihood(self, y: Tensor, x0: State) -> Tensor:
        """Log p(y | x̂_0) before the last step, (B,)."""
        away = (y - self.observation.forward(x0)).double().mT
        white = torch.linalg.solve_triangular(self.root, away, upper=False)
        constant = self.root.diagonal().log().sum() + len(self.H) / 2 * math.log(2 * math.pi)
        return -0.5 * white.square().sum(0) - constant

    def gain(self, k: int) -> Tensor:
        """V Hᵀ (H V Hᵀ + noise)⁻¹ / r_k, (d, k)."""
        if k not in self.gains:
            H, r = self.H, self.spread[k]
            if self.axes is None:
                VH = H.mT
            else:
                Q, rest = self.axes.Q.double(), self.axes.rest[k].double()
                more = (self.axes.variance[k] - rest).unsqueeze(1)
                VH = rest * H.mT + Q @ (more * (Q.mT @ H.mT))
            S = r * r * H @ VH + self.left
            self.gains[k] = r * torch.linalg.solve(S, VH.mT).mT
        return self.gains[k]

    def shift(self, y: Tensor, x0: State, k: int) -> State:
        """E[X_0 | y] - x̂_0 for X_0 ~ N(x̂_0, V), in units of r_k."""
        away = (y - self.observation.forward(x0)).double()
        return (away @ self.gain(k).mT).to(x0).reshape(x0.shape)
