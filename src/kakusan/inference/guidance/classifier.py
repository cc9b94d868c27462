r"""Guidance by a classifier of data: the slope of log p(y | x̂_0(x)) through the denoiser.

.. math:: u = \text{strength} \, J^\top \nabla_{\hat x_0} \log p(y \mid \hat x_0) .

All of p(x_0 | x_t) is put at its mean, where the classifier, which has seen only data, is asked;
no network for noisy states is trained. Far from the data x̂_0 is a blur that no classifier knows,
and the probability of a mean is not the mean of the probabilities: classes of a mixture come out
too sharp.

References:
    Universal guidance for diffusion models (Bansal et al., 2023), arXiv 2302.07121
    Diffusion models beat GANs on image synthesis (Dhariwal, Nichol, 2021), for noisy classifiers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.inference.guidance.common import Guidance, Look
from kakusan.processes.observations import Observation


@dataclass(frozen=True)
class Classifier(Guidance):
    """Guidance by any differentiable log-likelihood of data.

    Attributes:
        log_p: A function from states (B, *shape) to log p(y | x_0), (B,), up to a constant; by
            default that of the observation.
        strength: Its weight; 1 is Bayes' formula.

    Example:
        >>> bright = Classifier(lambda x: -((x.flatten(1).mean(1) - 0.5) ** 2), strength=3.0)
        >>> bright.strength
        3.0
    """

    log_p: Callable[[State], Tensor] | None = None
    strength: float = 1.0

    def slope(self, look: Look, observation: Observation, y: Tensor) -> State:  # noqa: D102
        with torch.enable_grad():
            x0 = look.x0.detach().requires_grad_()
            log_p = self.log_p(x0) if self.log_p else observation.log_likelihood(y, x0)
            if not log_p.requires_grad:
                raise KakusanError(
                    f"{observation} has no slope, which a classifier is followed by: give a Label "
                    "whose function returns logits (B, classes), or use Twisted()"
                )
            return self.strength * torch.autograd.grad(log_p.sum(), x0)[0]

    def check(self, observation: Observation) -> None:  # noqa: D102
        pass  # known once it is asked
