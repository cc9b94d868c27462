r"""Moment matching: x_0 given x_t is normal with the mean *and* covariance that it has.

Tweedie's formula of second order reads the covariance off the denoiser, V = (sigma² / alpha) J. So

.. math:: u = J^\top H^\top (\text{std}^2 I + H V H^\top)^{-1} (y - H \hat x_0) ,

exact for all Gaussian data. The system is solved by conjugate gradients; each of their steps is a
derivative of the denoiser along one direction, and few of them are enough, for they find the large
directions first. V is symmetric for the true denoiser and nearly so for a network, where stopping
early keeps its errors small too.

References:
    Learning diffusion priors from observations by expectation maximization (Rozet et al., 2024)
    Tweedie moment projected diffusions for inverse problems (Boys et al., 2023), arXiv 2310.06721
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.inference.guidance.common import Guidance, Look, conjugate_gradients, noise_variance
from kakusan.processes.observations import Linear, Observation


@dataclass(frozen=True)
class MomentMatching(Guidance):
    """Moment matching by conjugate gradients.

    Attributes:
        iterations: How many; each takes one derivative of the denoiser more. Where the seen
            numbers are exact and the denoiser is a network, whose Jacobian is no covariance, more
            than one or two can run away.

    Example:
        >>> MomentMatching(iterations=5)
        MomentMatching(iterations=5)
    """

    iterations: int = 1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise KakusanError(f"moment matching takes 1 iteration or more, got {self.iterations}")

    def slope(self, look: Look, observation: Observation, y: Tensor) -> State:  # noqa: D102
        assert isinstance(observation, Linear)
        std2, scale = noise_variance(observation, look), look.sigma**2 / look.alpha

        def covariance(z: Tensor) -> Tensor:
            V = scale * look.back(observation.transpose(z, look.x0))
            return observation.forward(V) + std2 * z

        away = y - observation.forward(look.x0)
        z = conjugate_gradients(covariance, away, self.iterations)
        return observation.transpose(z, look.x0)
