r"""Pseudoinverse guidance (ΠGDM): x_0 given x_t is N(x̂_0, r_t² I), as Gaussian data leave it.

For data of standard deviation s in every direction r_t² = sigma² s² / (alpha² s² + sigma²), and

.. math:: u = J^\top H^\top (r_t^2 H H^\top + \text{std}^2 I)^{-1} (y - H \hat x_0) .

Exact for such data. It costs one derivative of the denoiser; where the rows of H are orthonormal,
as for coordinates, the system is solved by one product.

References:
    Pseudoinverse-guided diffusion models for inverse problems (Song et al., 2023)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kakusan.core.types import State
from kakusan.inference.guidance.common import Guidance, Look, conjugate_gradients, noise_variance
from kakusan.processes.observations import Linear, Observation


@dataclass(frozen=True)
class PiGDM(Guidance):
    """Pseudoinverse guidance.

    Attributes:
        iterations: The most products with H Hᵀ to solve the system; none asks the network.

    Example:
        >>> PiGDM()
        PiGDM(iterations=50)
    """

    iterations: int = 50

    def slope(self, look: Look, observation: Observation, y: Tensor) -> State:  # noqa: D102
        assert isinstance(observation, Linear)
        return observation.transpose(weighed(look, observation, y, self.iterations), look.x0)


def weighed(look: Look, observation: Linear, y: Tensor, iterations: int) -> Tensor:
    """(r_t² H Hᵀ + std²)⁻¹ (y - H x̂_0), (B, k)."""
    std2, spread = noise_variance(observation, look), look.variance.reshape(-1, 1)

    def covariance(z: Tensor) -> Tensor:
        return spread * observation.forward(observation.transpose(z, look.x0)) + std2 * z

    return conjugate_gradients(covariance, y - observation.forward(look.x0), iterations)
