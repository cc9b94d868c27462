r"""Conditioning a diffusion model without training: what all guidance shares.

A model knows ∇log p_t(x). To draw x_0 given y it needs the slope of log p(y | x_t) as well, which
is that of an integral over all x_0 that x_t may come from:

.. math:: p(y \mid x_t) = \int p(y \mid x_0) \, p(x_0 \mid x_t) \, dx_0 .

Guidance puts a simple law in the place of p(x_0 | x_t), around the mean x̂_0(x_t) that the denoiser
gives. Each kind says how log p(y | x_t) changes with that mean, its `slope` g; the chain rule goes
through the denoiser,

.. math:: u = J^\top g , \qquad J = \partial \hat x_0 / \partial x ,

and s + u is a score like any other (`Guided`), for any sampler. What it does is seen best in the
denoised state, x̂_0 + (sigma² / alpha) u, with the velocity v - (sigma r / alpha) u in the angle.
Since sigma² J / alpha is the covariance of x_0 given x_t (Tweedie), a slope g moves the denoised
state by covariance times g: a step of a Kalman filter.

Nothing here is exact but for Gaussian data; `twisted` mends that with many particles.

Near the noise sigma² J / alpha is a small slope times a large number, and the slope of a network
has errors: of one trained on MNIST it came out as -6 in random directions at alpha = 0.002, and
as 0.3 at the levels that follow. So u is damped, by cos² / (cos² + faint²) with cos = alpha / r;
there x_t tells next to nothing of x_0, and what is lost is made up for on the way.

References:
    Score-based generative modeling through SDEs (Song et al., 2021), section 5
    A survey on diffusion models for inverse problems (Daras et al., 2024), arXiv 2410.00083
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kakusan.core.types import Field, State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE, ScoreField, velocity_of
from kakusan.processes.observations import Linear, Observation

FLOOR = 1e-6  # of the variance of x_0 given x_t: what is left of a measurement without noise


@dataclass(frozen=True)
class Look:
    """What one look of the denoiser at a state shows; numbers stand beside the state.

    Attributes:
        x: The state.
        alpha: The factor of x_0 in it.
        sigma: The standard deviation of its noise.
        velocity: v, the angular velocity of the flow.
        x0: The denoised state x̂_0.
        variance: sigma² s² / (alpha² s² + sigma²), that of x_0 given x for Gaussian data of
            standard deviation s.
        trust: The factor that damps u, near 0 where x is nearly all noise.
        back: Jᵀ times a tensor like x_0; only where slopes were asked for.
    """

    x: State
    alpha: Tensor
    sigma: Tensor
    velocity: State
    x0: State
    variance: Tensor
    trust: Tensor
    back: Callable[[State], State]


@dataclass(frozen=True)
class Prior:
    """A diffusion model before anything was seen.

    Attributes:
        process: The forward process.
        score: Its score.
        data_std: The standard deviation s of the data.
        faint: Where alpha / r is below this, tilts are damped; 0 trusts the score everywhere, as
            one in closed form may be.
    """

    process: LinearSDE
    score: Field
    data_std: float = 1.0
    faint: float = 0.0

    def look(self, x: State, t: Time, slopes: bool = True) -> Look:
        """Denoises x, with one evaluation; with `slopes`, remembers how it was done."""
        alpha, sigma = (per_sample(c(as_time(t)), x) for c in self._kernel)
        r = torch.hypot(alpha, sigma)
        s2 = (alpha * self.data_std) ** 2 + sigma**2
        with torch.set_grad_enabled(slopes):
            x = x.detach().requires_grad_(slopes)
            v = velocity_of(self.process, self.score)(x, t)
            # x / r = cos x_0 + sin eps and v = cos eps - sin x_0, turned back
            x0 = (alpha / r**2) * x - (sigma / r) * v

        def back(g: State) -> State:
            return torch.autograd.grad(x0, x, g, retain_graph=True)[0]

        variance, cos2 = (sigma * self.data_std) ** 2 / s2, (alpha / r) ** 2
        trust = cos2 / (cos2 + self.faint**2)
        return Look(x.detach(), alpha, sigma, v.detach(), x0.detach(), variance, trust, back)

    @property
    def _kernel(self) -> tuple[Callable[[Time], Tensor], Callable[[Time], Tensor]]:
        return self.process.alpha, self.process.sigma


class Guidance(abc.ABC):
    """A model of p(y | x_t), by its slope in the denoised state."""

    @abc.abstractmethod
    def slope(self, look: Look, observation: Observation, y: Tensor) -> State:
        """The slope g of log p(y | x_t) as a function of x̂_0, like x_0.

        Arguments:
            look: What the denoiser sees.
            observation: What is observed of x_0.
            y: The values, (B, k).
        """

    def tilt(self, look: Look, observation: Observation, y: Tensor) -> State:
        """U = Jᵀ g, damped where the denoiser sees next to nothing."""
        return look.trust * look.back(self.slope(look, observation, y))

    def check(self, observation: Observation) -> None:
        """Refuses what cannot be guided so."""
        if not isinstance(observation, Linear):
            raise KakusanError(
                f"{self} needs a linear measurement (Coordinates, Measured), got {observation}: "
                "Classifier() follows a Label with logits, and Twisted() anything with a "
                "likelihood"
            )


class Guided(ScoreField):
    """The score s + u of a model that was shown y: for `generate`, `reverse` and every sampler.

    Arguments:
        prior: The model.
        guidance: How p(y | x_t) is approximated.
        observation: What is observed of x_0.
        y: The values, (B, k), a row a state; or (1, k) for all.

    Raises:
        KakusanError: If the guidance cannot follow the observation.

    Example:
        >>> from kakusan.inference.guidance.pigdm import PiGDM
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import VP
        >>> from kakusan.processes.observations import Coordinates
        >>> one = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> prior = Prior(VP(), one)
        >>> seen = Guided(prior, PiGDM(), Coordinates([0], std=1.0), torch.tensor([[2.0]]))
        >>> x, t = torch.zeros(1, 2), torch.tensor(0.0, dtype=torch.float64)
        >>> seen(x, t)  # at t = 0 the slope of log N(2; x, 1)
        tensor([[2., 0.]])
    """

    def __init__(
        self, prior: Prior, guidance: Guidance, observation: Observation, y: Tensor
    ) -> None:
        guidance.check(observation)
        self.prior, self.guidance, self.observation, self.y = prior, guidance, observation, y

    def tilt(self, x: State, t: Time) -> State:
        """U, the slope of log p(y | x_t), like x."""
        return self._seen(x, t)[1]

    def _seen(self, x: State, t: Time) -> tuple[Look, State]:
        look = self.prior.look(x, t)
        y = self.y.to(x).expand(len(x), -1)
        return look, self.guidance.tilt(look, self.observation, y)

    def __call__(self, x: State, t: Time) -> State:
        """∇log p_t(x) + u."""
        return self.prior.score(x, t) + self.tilt(x, t)

    def velocity(self, x: State, t: Time) -> State:
        """The flow's v - (sigma r / alpha) u: eps loses sigma u, x̂_0 gains sigma² u / alpha."""
        look, u = self._seen(x, t)
        r = torch.hypot(look.alpha, look.sigma)
        return look.velocity - (look.sigma * r / look.alpha) * u


def noise_variance(observation: Linear, look: Look) -> Tensor:
    """std², or the floor in its place; (B or 1, 1) beside rows of numbers."""
    variance = look.variance.reshape(-1, 1)
    return (FLOOR * variance).clamp(min=observation.std**2)


def conjugate_gradients(
    A: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-6
) -> Tensor:
    """The shortest z with A z = b, for each row of b by itself, (B, k).

    A is symmetric and not negative; a row stops where it is done, and before a direction in which
    A is not positive after all (the slope of a network is symmetric only nearly).

    Arguments:
        A: The map, from (B, k) to (B, k), row by row.
        b: The right-hand sides.
        iterations: How many products with A at most.
        tolerance: The size of what is left, relative to b, at which a row is done.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> conjugate_gradients(lambda z: z @ A, torch.tensor([[3.0, 3.0]]), 5)
        tensor([[1., 1.]])

    References:
        Methods of conjugate gradients for solving linear systems (Hestenes, Stiefel, 1952)
    """
    z, r = torch.zeros_like(b), b
    p, rr = r, (r * r).sum(1, keepdim=True)
    enough, going = tolerance**2 * rr, rr > 0
    for _ in range(iterations):
        Ap = A(p)
        curve = (p * Ap).sum(1, keepdim=True)
        going = going & (curve > 0)
        if not going.any():
            break
        step = torch.where(going, rr / curve, 0.0)
        z, r = z + step * p, r - step * Ap
        now = (r * r).sum(1, keepdim=True)
        p = r + torch.where(going, now / rr, 0.0) * p
        rr, going = now, going & (now > enough)
    return z


def projected(observation: Linear, y: Tensor, x: State, iterations: int = 100) -> State:
    """The nearest state with H x = y: x + Hᵀ (H Hᵀ)⁻¹ (y - H x).

    Seen coordinates come out equal to y to the last bit.

    Example:
        >>> from kakusan.processes.observations import Measured
        >>> mean = Measured(torch.tensor([[0.5, 0.5]]))
        >>> projected(mean, torch.tensor([[3.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[2., 4.]])
    """

    def gram(z: Tensor) -> Tensor:
        return observation.forward(observation.transpose(z, x))

    y = y.to(x).expand(len(x), -1)
    seen, wanted = (conjugate_gradients(gram, v, iterations) for v in (observation.forward(x), y))
    # one after the other: x - x + y is y, and x + (y - x) is not always
    return x - observation.transpose(seen, x) + observation.transpose(wanted, x)
