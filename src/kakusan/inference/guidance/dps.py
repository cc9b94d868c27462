r"""Diffusion posterior sampling (DPS): go downhill in what is missed.

All of p(x_0 | x_t) is put at its mean, so that y misses H x̂_0 by noise alone; and since that
makes far too sure of x̂_0 the slope is scaled by hand. Published is a step of size ζ against
∇|y - H x̂_0|², with ζ = ζ' / |y - H x̂_0|, after every step of a chain, however long that is. Here
pulls of that form are spread evenly over the angle, and missing is measured as a root mean square
ρ = |y - H x̂_0| / sqrt(k), so that one strength means the same for any number of steps and any
size of y:

.. math:: u = -\text{strength} \, \frac{\alpha}{\sigma r} \,
              \frac{\nabla |y - H \hat x_0|^2}{\rho} ,

which moves a state over sqrt(alpha² + sigma²) by strength ∇|y - H x̂_0|² / ρ a radian, of pi/2 in
all. std does not enter. The law of the samples is not that of x_0 given y, not even for Gaussian
data.

References:
    Diffusion posterior sampling for general noisy inverse problems (Chung et al., 2023),
    arXiv 2209.14687
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kakusan.core.types import State
from kakusan.inference.guidance.common import Guidance, Look
from kakusan.processes.observations import Linear, Observation


@dataclass(frozen=True)
class DPS(Guidance):
    """Diffusion posterior sampling.

    Attributes:
        strength: How hard to pull, in rms numbers of y a radian; of order 1.

    Example:
        >>> DPS(strength=0.5)
        DPS(strength=0.5)
    """

    strength: float = 1.0

    def slope(self, look: Look, observation: Observation, y: Tensor) -> State:  # noqa: D102
        assert isinstance(observation, Linear)
        away = y - observation.forward(look.x0)
        rms = away.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(y.dtype).tiny)
        r = torch.hypot(look.alpha, look.sigma)
        pull = 2 * observation.transpose(away / rms, look.x0)
        return self.strength * (look.alpha / (look.sigma * r)) * pull
