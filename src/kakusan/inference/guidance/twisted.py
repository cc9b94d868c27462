r"""Twisted diffusion: many particles that correct what guidance gets wrong, exactly for the chain.

The ancestral steps of a model are a chain of Gaussian steps x_{k+1} = m_k(x_k) + G_k dw_k from
noise to data. Wanted is its law weighted by p(y | x_0). Particles are led by a tilt u, any there
is, through the control c = G_kᵀ u, and weighed for it (Girsanov, exact for the steps); on the way
they are compared by a *twist* p̃_k(x_k), any positive guess at p(y | x_k):

.. math:: \log w \mathrel{+}= \log \tilde p_{k+1}(x_{k+1}) - \log \tilde p_k(x_k)
                              - c \cdot dw - \tfrac12 h |c|^2 .

At the data p̃ is p(y | x_0) itself (of a measurement without noise, one with the noise r_t that
the last step still has to remove), so that a poor twist costs particles and no exactness. Where
the effective number falls below half, particles are drawn anew by their weights. What is left, the
error of finitely many, goes with 1 / particles.

Twists take x_0 given x_t as N(x̂_0, r_t² I), as ΠGDM does. For a linear measurement the mean of
p(y | x_0) under it is known; for anything else with a likelihood, a `Label` or an `Event` with no
slope at all, it is the mean over a few draws, the same ones for every particle, with one more that
always agrees so that nobody is ruled out by a guess.

References:
    Practical and asymptotically exact conditional sampling in diffusion models (Wu et al., 2023),
    arXiv 2306.17775
    Twisted particle filters (Whiteley, Lee, 2014), arXiv 1308.4462
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Fresh, generator
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError
from kakusan.inference.guidance.common import Guidance, Look, Prior
from kakusan.inference.guidance.pigdm import weighed
from kakusan.inference.weights import effective_sample_size
from kakusan.processes.observations import Linear, Observation
from kakusan.solvers.gaussian import AncestralSteps

RESAMPLING, GUESSES = 11, 12  # separate the uses of one seed


class Particles(NamedTuple):
    """Weighted samples of x_0 given y.

    Attributes:
        x: The particles, (P, *shape).
        log_weights: Their weights, (P,) in float64, normalised: their exponentials sum to 1.
        log_evidence: An estimate of log p(y), unbiased before the logarithm; of a density where y
            is one.
        ess: The effective number of particles before each step and at the end, (N + 1,).
    """

    x: State
    log_weights: Tensor
    log_evidence: float
    ess: Tensor

    def draw(self, n: int, seed: int = 0) -> State:
        """N of them, (n, *shape), by their weights: each as often as it should be, to one."""
        u = torch.rand((), generator=generator(seed, RESAMPLING), dtype=torch.float64)
        return self.x[systematic(self.log_weights, n, u.item())]


@dataclass(frozen=True)
class Twisted:
    """Guidance corrected by particles.

    Attributes:
        base: What leads the particles; None leaves it to their weights alone.
        particles: How many.
        draws: How many guesses at x_0 a twist takes where there is no formula.

    Example:
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import VP, angle_grid
        >>> from kakusan.processes.observations import Event
        >>> normal = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> x1, grid = torch.randn(4000, 1), angle_grid(VP(), 1.0, 0.0, 100)
        >>> above, yes = Event(lambda x: x[:, 0] > 1.5), torch.ones(1, 1)
        >>> found = Twisted().run(Prior(VP(), normal), above, yes, x1, grid, seed=0)
        >>> round(math.exp(found.log_evidence), 2)  # P(z > 1.5) = 0.067
        0.06
        >>> bool((found.draw(100) > 1.5).all())
        True
    """

    base: Guidance | None = None
    particles: int = 256
    draws: int = 16

    def __post_init__(self) -> None:
        if self.particles < 2 or self.draws < 1:
            raise KakusanError(
                f"Twisted takes 2 particles and 1 draw or more, got {self.particles} and "
                f"{self.draws}"
            )

    def run(
        self,
        prior: Prior,
        observation: Observation,
        y: Tensor,
        x1: State,
        grid: Tensor,
        noise: float = 1.0,
        seed: int = 0,
        batch: int = 256,
        on_step: Callable[[int], None] = lambda k: None,
    ) -> Particles:
        """Leads particles from noise to data.

        Arguments:
            prior: The model.
            observation: What is observed of x_0; anything with a likelihood, or linear.
            y: Its value, (1, k).
            x1: The particles at the first time of the grid, (P, *shape), drawn from the model.
            grid: Falling times, to 0.
            noise: lambda of the ancestral steps, above 0.
            seed: Fixes all randomness.
            batch: How many states the network sees at a time.
            on_step: Called with the number of steps made.

        Raises:
            KakusanError: If no particle agrees with y, or the base cannot follow the observation.
        """
        self.check(observation)
        if not 0 < noise <= 1:
            raise KakusanError(f"particles are spread by noise in (0, 1], got {noise}")
        steps = AncestralSteps(prior.process, prior.score, grid, noise)
        if isinstance(observation, Linear) and not observation.std:
            left = prior.look(x1[:1], steps.points[-2], slopes=False).variance.sqrt()
            observation = softened(observation, left.item())
        source, tally = Fresh(seed), Tally(len(x1), seed)
        x, log_w, before = x1, torch.zeros(len(x1), dtype=torch.float64, device=x1.device), 0.0
        for k in range(len(steps)):
            v, log_h, u = self._looks(prior, observation, y, x, steps.points[k], batch, seed)
            kept, log_w = tally.after(k, log_w + log_h - before)
            x, v, u, before = x[kept], v[kept], u[kept], log_h[kept]
            h, G, mean = steps.h(k), steps.operator(x, k), steps.turned(x, v, k)
            c, dw = G.tmv(u), source.normal(k, tuple(x.shape), x, math.sqrt(h))
            x = G.kick(mean, dw + h * c)
            log_w = log_w - (c * dw + 0.5 * h * c * c).double().flatten(1).sum(1)
            on_step(k + 1)
        likely = [observation.log_likelihood(_rows(y, part), part) for part in x.split(batch)]
        truth = torch.cat(likely)
        return tally.end(x, log_w + truth.double() - before, observation)

    def check(self, observation: Observation) -> None:
        """Refuses what cannot lead the particles."""
        if self.base is not None:
            self.base.check(observation)

    def _looks(
        self,
        prior: Prior,
        observation: Observation,
        y: Tensor,
        x: State,
        t: Time,
        batch: int,
        seed: int,
    ) -> tuple[State, Tensor, State]:
        """Velocity, log twist and tilt of every particle."""
        parts = []
        for part in x.split(batch):
            look = prior.look(part, t, slopes=self.base is not None)
            seen = _rows(y, part)
            log_h = self._log_twist(look, observation, seen, seed)
            base = self.base
            u = torch.zeros_like(part) if base is None else base.tilt(look, observation, seen)
            parts.append((look.velocity, log_h.double(), u))
        v, log_h, u = (torch.cat(column) for column in zip(*parts, strict=True))
        return v, log_h, u

    def _log_twist(self, look: Look, observation: Observation, y: Tensor, seed: int) -> Tensor:
        """Log p̃(y | x_t), (B,); constants cancel, for each twist is taken back by the next."""
        if isinstance(observation, Linear):
            away = y - observation.forward(look.x0)
            return -0.5 * (away * weighed(look, observation, y, iterations=50)).sum(1)
        source = generator(seed, GUESSES, device=y.device)
        eps = torch.randn((self.draws, 1, *look.x0.shape[1:]), generator=source, device=y.device)
        guesses = look.x0 + look.variance.sqrt() * eps.to(look.x0)
        log_p = observation.log_likelihood(y.repeat(self.draws, 1), guesses.flatten(0, 1))
        # one more that agrees with y
        agree = torch.cat([log_p.reshape(self.draws, -1), log_p.new_zeros((1, len(y)))])
        return agree.logsumexp(0) - math.log(self.draws + 1)


class Tally:
    """The weights of particles: their effective numbers, and who is drawn anew.

    Arguments:
        n: How many particles there are.
        seed: Fixes the draws.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self.log_evidence, self.ess = 0.0, []

    def after(self, k: int, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Which particles go on, (P,), and their weights; all as they are where enough count."""
        self.ess.append(effective_sample_size(log_w))
        if self.ess[-1] >= self.n / 2:
            return torch.arange(self.n, device=log_w.device), log_w
        self.log_evidence += (log_w.logsumexp(0) - math.log(self.n)).item()
        u = torch.rand((), generator=generator(self.seed, RESAMPLING, k), dtype=torch.float64)
        return systematic(log_w, self.n, u.item()), torch.zeros_like(log_w)

    def end(self, x: State, log_w: Tensor, observation: Observation) -> Particles:
        """What came of it."""
        if not log_w.max() > -math.inf:
            raise KakusanError(
                f"none of {self.n} particles came to agree with {observation}: it may never "
                "hold, or take more particles (and draws, of Twisted)"
            )
        self.ess.append(effective_sample_size(log_w))
        total = log_w.logsumexp(0)
        evidence = self.log_evidence + total.item() - math.log(self.n)
        return Particles(x, log_w - total, evidence, torch.tensor(self.ess))


def softened(observation: Linear, std: float) -> Linear:
    """The same measurement with noise."""
    other = copy.copy(observation)
    other.std = std
    return other


def systematic(log_w: Tensor, n: int, u: float) -> Tensor:
    """Indices (n,) drawn by weights (P,), with one uniform number u: w_i n times each, to one.

    Example:
        >>> systematic(torch.tensor([0.5, 0.25, 0.25]).log(), 4, 0.5)
        tensor([0, 0, 1, 2])

    References:
        Monte Carlo filter and smoother (Kitagawa, 1996)
    """
    edges = log_w.double().softmax(0).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64, device=log_w.device) + u) / n
    return torch.searchsorted(edges, points, right=True).clamp(max=len(log_w) - 1)


def _rows(y: Tensor, x: State) -> Tensor:
    """One value, (1, k), beside each of many states."""
    return y.to(x).expand(len(x), -1)
