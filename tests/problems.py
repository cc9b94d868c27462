"""Processes with known answers; laws, docs and benchmarks draw from here.

Everything is float64. A mixture in the plane stands for data that are neither Gaussian nor
symmetric; `Swirl` and `Geometric` for noise that depends on the state.
"""

import math

import torch

from kakusan import DDPM, EDM, SDE, VE, VP, Cosine, Dense, Diagonal, ExactMixture, Rectified, SubVP

F64 = torch.float64

PROCESSES = [
    VP(),
    SubVP(),
    VE(),
    Cosine(),
    Rectified(),
    EDM(),
    VP.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=F64)),
]
NAMES = [type(p).__name__ for p in PROCESSES]
assert isinstance(PROCESSES[-1], DDPM)


def time(t):
    return torch.tensor(t, dtype=F64)


def times(process, n=7):
    """Times inside the span, and its two ends."""
    return torch.linspace(*process.span, n, dtype=F64)


def gaussian(process, mean=0.7, variance=0.36, d=1):
    """N(mean, variance) data in d dimensions: its flow is affine and its ELBO closed."""
    eye = torch.eye(d, dtype=F64)
    return ExactMixture(
        process, torch.ones(1), torch.full((1, d), mean, dtype=F64), variance * eye[None]
    )


def mixture(process, seed=0, components=3, d=2):
    """A mixture of unequal, tilted Gaussians."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, generator=g, dtype=F64)
    roots = 0.35 * torch.randn(components, d, d, generator=g, dtype=F64)
    covariances = roots @ roots.mT + 0.05 * torch.eye(d, dtype=F64)
    return ExactMixture(process, torch.arange(1.0, components + 1), means, covariances)


class Geometric(SDE):
    """Geometric Brownian motion dX = mu X dt + sigma X dW, with log X_0 ~ N(0, v0)."""

    def __init__(self, mu=0.4, sigma=0.6, v0=0.25):
        self.mu, self.sigma, self.v0, self.span = mu, sigma, v0, (0.0, 1.0)

    def drift(self, x, t):
        return self.mu * x

    def diffusion(self, x, t):
        return Diagonal(self.sigma * x)

    def log_moments(self, t):
        return (self.mu - self.sigma**2 / 2) * t, self.v0 + self.sigma**2 * t

    def score(self, x, t):
        m, v = self.log_moments(t)
        return -1 / x - (x.log() - m) / (v * x)

    def start(self, n, t, seed):
        """Exact samples of X_t."""
        m, v = self.log_moments(t)
        g = torch.Generator().manual_seed(seed)
        return torch.exp(m + math.sqrt(v) * torch.randn(n, 1, generator=g, dtype=F64))


class Reversible(SDE):
    """Dense, state-dependent G with stationary law N(0, I), by f = (∇·D + D ∇log pi) / 2.

    Its reverse drift is its own drift: the law that a missing divergence term breaks.
    """

    span = (0.0, 1.0)

    def __init__(self, seed=0, d=2):
        g = torch.Generator().manual_seed(seed)
        self.W = torch.randn(16, d, generator=g, dtype=F64)
        self.V = 0.5 * torch.randn(d * d, 16, generator=g, dtype=F64) / 4
        self.d = d

    def diffusion(self, x, t):
        G = (torch.tanh(x @ self.W.T) @ self.V.T).reshape(-1, self.d, self.d)
        return Dense(0.7 * torch.eye(self.d, dtype=x.dtype) + G)

    def score(self, x, t):
        return -x

    def drift(self, x, t):
        return (self.gram_divergence(x, t) + self.diffusion(x, t).gram(self.score(x, t))) / 2


class Curved(SDE):
    """A drift that turns in time and a dense G that depends on the state."""

    def drift(self, x, t):
        return -x + 0.8 * torch.sin(2 * x.flip(1)) * (1 + t.reshape(-1, 1))

    def diffusion(self, x, t):
        a, b = torch.sin(1.5 * x[:, 0] + x[:, 1]), torch.cos(x[:, 0] - x[:, 1])
        rows = [
            torch.stack([1 + 0.4 * a, 0.3 * b], 1),
            torch.stack([0.2 * a * b, 0.9 - 0.3 * b], 1),
        ]
        return Dense(torch.stack(rows, 1))


class Wide(Curved):
    """Three noises for two coordinates."""

    def diffusion(self, x, t):
        return Dense(torch.cat([super().diffusion(x, t).G, 0.3 * torch.cos(x).unsqueeze(-1)], -1))
