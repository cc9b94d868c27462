r"""The variational bound of a diffusion model on log p(x_0), term by term.

For a chain x_1, ..., x_T (`objectives.chain`) the bound of each sample is

.. math:: \log p(x_0) \ge
          \underbrace{E \log p(x_0 | x_1)}_{decoder}
          - \sum_{k=2}^{T} \underbrace{E \, KL(q(x_{k-1} | x_k, x_0) \| p(x_{k-1} | x_k))}_{terms}
          - \underbrace{KL(q(x_T | x_0) \| p(x_T))}_{prior} ,

with a minus before every divergence: all of them are losses. `bound` draws one noised state for
each term, so each is unbiased, and a sample sees the same noise for every batch size.

As the steps become fine the sum becomes an integral over gamma = -log(alpha²/sigma²),

.. math:: \frac12 \int \|\epsilon - \hat\epsilon\|^2 \, d\gamma
          = \int \cot\phi \, \|v - \hat v\|^2 \, d\phi
          = \frac12 \int g^2 \, \|\hat s - \nabla \log p(x_t | x_0)\|^2 \, dt ,

which depends on the process only through the angles at its two ends (`continuous_bound`). How the
levels are drawn changes the variance alone. `LogSine` draws them evenly in log sin(phi), which
makes the integrand ||v - v_hat||², the same at all levels for N(0, I) data; `Clock` evenly in t.

References:
    Denoising diffusion probabilistic models (Ho et al., 2020), arXiv:2006.11239
    Variational diffusion models (Kingma et al., 2021), arXiv:2107.00630
    Maximum likelihood training of score-based diffusion models (Song et al., 2021)
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kakusan.core.bits import Bits, bits_per_dim
from kakusan.core.noise import Keyed
from kakusan.core.types import State, Time, as_time, per_sample
from kakusan.errors import UsageError
from kakusan.objectives.chain import (
    Ask,
    Chain,
    Large,
    Model,
    Small,
    Variance,
    asking,
    divergence,
    miss,
    prior,
    process_of,
)
from kakusan.objectives.decoders import Decoder, GaussianDecoder
from kakusan.processes.linear import DDPM, LinearSDE

TERMS, SOME, LEVELS = 23, 24, 25  # separate these uses of a seed from all others


# --- the bound


@dataclass(frozen=True, eq=False)
class Bound:
    """A lower bound on log p(x_0), in nats: value = decoder - divergence - prior.

    Attributes:
        prior: KL(q(x_T | x_0) || p(x_T)) of each sample, float64 (B,).
        divergence: The sum of all terms between, of each sample, (B,).
        decoder: log p(x_0 | x_1) of each sample, (B,).
        times: Where the terms are, rising, (L,).
        terms: Each of them, a mean over the samples, (L,).
        std_error: The standard errors of the terms, (L,).
        dims: The number of entries of a sample.
    """

    prior: Tensor
    divergence: Tensor
    decoder: Tensor
    times: Tensor
    terms: Tensor
    std_error: Tensor
    dims: int

    @property
    def value(self) -> Tensor:
        """The bound of each sample, (B,)."""
        return self.decoder - self.divergence - self.prior

    @property
    def mean(self) -> float:
        """The mean bound."""
        return self.value.mean().item()

    @property
    def mean_std_error(self) -> float:
        """Its standard error: samples and noise together."""
        return _error(self.value).item()

    @property
    def bits_per_dim(self) -> Bits:
        """-log2 p an entry, an upper bound; see `kakusan.core.bits` for densities."""
        return bits_per_dim(self.value, self.dims)

    def __str__(self) -> str:
        scale = self.dims * math.log(2)
        parts = (
            v.mean().item() / scale for v in (-self.decoder, self.divergence, self.prior)
        )  # fmt: skip
        bits, error, _ = self.bits_per_dim
        return f"{bits:.4f} +- {error:.4f} bits/dim = " + " + ".join(
            f"{v:.4f} ({name})"
            for v, name in zip(parts, ("decoder", "chain", "prior"), strict=True)
        )


def _error(values: Tensor) -> Tensor:
    """The standard error of a mean; 0 for a single sample, which has none."""
    return values.std(0, correction=min(1, len(values) - 1)) / math.sqrt(len(values))


class _Sums:
    """Adds up what batches say."""

    def __init__(self, n: int) -> None:
        self.sample: list[tuple[Tensor, Tensor, Tensor]] = []
        self.first = torch.zeros(n, dtype=torch.float64)
        self.second = torch.zeros(n, dtype=torch.float64)

    def add(self, prior: Tensor, terms: Tensor, decoder: Tensor) -> None:
        """Terms are (b, L)."""
        self.sample.append((prior.cpu(), terms.sum(1).cpu(), decoder.cpu()))
        self.first += terms.sum(0).cpu()
        self.second += terms.square().sum(0).cpu()

    def bound(self, times: Tensor, dims: int) -> Bound:
        """The whole."""
        prior, total, decoder = (torch.cat(c) for c in zip(*self.sample, strict=True))
        n = len(prior)
        mean = self.first / n
        spread = (self.second / n - mean**2).clamp(min=0) / max(n - 1, 1)
        return Bound(prior, total, decoder, times.cpu(), mean, spread.sqrt(), dims)


def _slices(x0: State, batch: int, label: Tensor | None) -> list[tuple[int, State, Tensor | None]]:
    if not len(x0) or batch < 1:
        raise UsageError(f"a bound needs samples, got {len(x0)} in batches of {batch}")
    return [
        (i, x0[i : i + batch], None if label is None else label[i : i + batch])
        for i in range(0, len(x0), batch)
    ]


@torch.no_grad()
def bound(
    model: Model,
    x0: State,
    chain: Chain | None = None,
    variance: Variance | None = None,
    decoder: Decoder | None = None,
    seed: int = 0,
    times: int | None = None,
    batch: int = 256,
    label: Tensor | None = None,
) -> Bound:
    """The bound of a chain, of each sample and term by term.

    Arguments:
        model: The denoiser, or a score of a linear SDE.
        x0: Data, (N, *shape).
        chain: The times; by default the knots of DDPM, or 1000 times even in angle from where the
            decoder starts.
        variance: That of the model's steps; by default `Small` for the decoder of whole numbers,
            and `Large` for that of reals, which `Small` never reaches.
        decoder: `GaussianDecoder` by default.
        seed: Fixes the noise of each sample, for every batch size.
        times: How many terms to draw for each sample, by importance and unbiased; all by default.
        batch: How many samples at a time.
        label: Class indices, (N,).

    Raises:
        KakusanError: If the data are not what the decoder takes.

    Example:
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import VP
        >>> vp = VP.from_betas([0.1, 0.2, 0.3])
        >>> exact = ExactMixture(vp, torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> from kakusan.objectives.chain import Large
        >>> found = bound(exact, torch.randn(5, 1), variance=Large())
        >>> found.value.shape, found.terms.shape
        (torch.Size([5]), torch.Size([2]))
    """
    decoder = decoder or GaussianDecoder()
    if variance is None:
        variance = Large() if isinstance(decoder, GaussianDecoder) else Small()
    if chain is None:
        process = process_of(model)
        own = isinstance(process, DDPM)
        chain = Chain(process, start=None if own else decoder.start(process))
    decoder.check(x0)
    if times is not None and times < 1:
        raise UsageError(
            f"times is how many terms to draw for each sample, at least 1; got {times}"
        )
    ask, std = asking(chain.process, model), getattr(model, "data_std", 1.0)
    sums, shares = _Sums(len(chain) - 1), expected(chain, std)[1:]
    for i, x, given in _slices(x0, batch, label):
        decoded = _decoded(chain, ask, x, variance, decoder, Keyed(seed, i, TERMS), given)
        if times is None or len(chain) == 1:
            terms = _all_terms(chain, ask, x, variance, Keyed(seed, i, TERMS), given)
        else:
            noise = Keyed(seed, i, SOME)
            terms = _some_terms(chain, ask, x, variance, noise, given, times, shares)
        sums.add(chain.prior(x), terms, decoded)
    return sums.bound(chain.times[1:], x0[0].numel())


def _decoded(
    chain: Chain, ask: Ask, x0: State, variance: Variance, decoder: Decoder, noise: Keyed,
    label: Tensor | None,
) -> Tensor:  # fmt: skip
    step = chain.steps(torch.tensor(0))
    eps = noise.normal(0, tuple(x0.shape), x0)
    v, spread = ask(chain.process.noised(x0, eps, step.t), step.t, label)
    e = miss(step, x0, eps, v).double()
    # E[x_0 | x_1], from the error: without loss where sigma is small
    mean = x0 + per_sample(step.sigma / torch.hypot(step.alpha, step.sigma), e) * e
    return decoder.log_prob(x0, mean, variance.log(step, spread, e))


def _term(
    chain: Chain, k: Tensor, ask: Ask, x0: State, eps: State, variance: Variance,
    label: Tensor | None,
) -> Tensor:  # fmt: skip
    """The divergence of step k of each sample, float64 (b,)."""
    step = chain.steps(k)
    v, spread = ask(chain.process.noised(x0, eps, step.t), step.t, label)
    e = miss(step, x0, eps, v).double()
    return divergence(step, e, variance.log(step, spread, e)).flatten(1).sum(1)


def _all_terms(
    chain: Chain, ask: Ask, x0: State, variance: Variance, noise: Keyed, label: Tensor | None
) -> Tensor:
    rows = []
    for k in range(1, len(chain)):
        eps = noise.normal(k, tuple(x0.shape), x0)
        rows.append(_term(chain, torch.tensor(k), ask, x0, eps, variance, label))
    return torch.stack(rows, 1) if rows else x0.new_zeros((len(x0), 0), dtype=torch.float64)


def _some_terms(
    chain: Chain, ask: Ask, x0: State, variance: Variance, noise: Keyed, label: Tensor | None,
    n: int, shares: Tensor,
) -> Tensor:  # fmt: skip
    """N terms a sample, one in each of n equal shares of probability, over that probability."""
    clock = x0.new_empty(0, dtype=torch.float64)
    shares = shares.to(x0.device)
    u = (noise.uniform(0, (len(x0), n), clock) + torch.arange(n, device=x0.device)) / n
    k = torch.searchsorted(shares.cumsum(0), u, right=True).clamp(max=len(shares) - 1)
    terms = clock.new_zeros((len(x0), len(shares)))
    for j in range(n):
        eps = noise.normal(j + 1, tuple(x0.shape), x0)
        found = _term(chain, k[:, j] + 1, ask, x0, eps, variance, label)
        terms.scatter_add_(1, k[:, j : j + 1], (found / (n * shares[k[:, j]]))[:, None])
    return terms


def expected(chain: Chain, data_std: float = 1.0, even: float = 0.1) -> Tensor:
    """The share of each step in the bound for N(0, s²) data and the exact score, (T,).

    A density to draw steps from: the first entry, 0, is the decoder's, and the others add up to 1.

    Arguments:
        chain: The chain.
        data_std: The standard deviation s.
        even: How much of it is spread evenly, so that no step is drawn too seldom.
    """
    step = chain.table()
    left = data_std**2 / (step.alpha**2 * data_std**2 + step.sigma**2)
    terms = (step.c0 * step.sigma) ** 2 * left / step.floor
    terms[0] = 0
    shares = (1 - even) * terms / terms.sum() + even / max(len(chain) - 1, 1)
    shares[0] = 0
    return shares / shares.sum()


# --- in continuous time


class Law(abc.ABC):
    """How noise levels are drawn between two times."""

    @abc.abstractmethod
    def draw(self, process: LinearSDE, lo: Time, hi: Time, u: Tensor) -> tuple[Time, Tensor]:
        """Times from numbers u in [0, 1), and the factor on ||v - v_hat||²: each like u."""


class LogSine(Law):
    """Evenly in log sin(phi): the integrand is the same everywhere for N(0, I) data.

    Below a right angle it is half the log-signal-to-noise ratio; near it, where there is nothing
    to learn any more, few levels are spent. On a small model of the digits the noise of one level
    a sample is 100 nats so, 246 evenly in the log-signal-to-noise ratio, and 1,900 evenly in the
    angle; of 16 levels, 12, 17 and 430 (docs/bound.md).
    """

    def draw(  # noqa: D102
        self, process: LinearSDE, lo: Time, hi: Time, u: Tensor
    ) -> tuple[Time, Tensor]:
        least, most = (process.angle(t).sin().to(u.device) for t in (lo, hi))
        depth = (most / least).log()
        t = process.time_of_angle(torch.asin((least * (u * depth).exp()).clamp(max=1)))
        return t.clamp(lo.item(), hi.item()), depth.expand(u.shape)


class Clock(Law):
    """Evenly in t: what varies is then up to the process (Kingma et al. 2021)."""

    def draw(  # noqa: D102
        self, process: LinearSDE, lo: Time, hi: Time, u: Tensor
    ) -> tuple[Time, Tensor]:
        length = (hi - lo).item()
        t = lo.item() + length * u
        alpha2, variance = process.alpha(t) ** 2, process.variance(t)
        # g² / sigma² is the slope of gamma
        return t, length / 2 * process.rates(t)[1] / variance * alpha2 / (alpha2 + variance)


@torch.no_grad()
def continuous_bound(
    model: Model,
    x0: State,
    times: int = 32,
    process: LinearSDE | None = None,
    start: float | None = None,
    decoder: Decoder | None = None,
    law: Law | None = None,
    seed: int = 0,
    batch: int = 256,
    label: Tensor | None = None,
) -> Bound:
    """The bound of infinitely many steps, for any linear SDE and any score.

    The decoder sees the least noised state alone, N(x_t / alpha, sigma² / alpha²): no network.

    Arguments:
        model: The denoiser, or a score.
        x0: Data, (N, *shape).
        times: How many levels to draw for each sample, one in each of so many equal strata.
        process: The process; by default the model's.
        start: Where to stop above the data; by default where the decoder says.
        decoder: `GaussianDecoder` by default.
        law: How levels are drawn; `LogSine` by default.
        seed: Fixes levels and noise of each sample, for every batch size.
        batch: How many samples at a time.
        label: Class indices, (N,).

    Returns:
        A bound whose terms are the strata, each at the mean of its times.

    Example:
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import Cosine
        >>> exact = ExactMixture(Cosine(), torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> x0 = torch.zeros(2000, 1, dtype=torch.float64)
        >>> abs(continuous_bound(exact, x0).mean - exact.log_prob(x0, torch.tensor(0.0))[0]) < 0.2
        tensor(True)
    """
    process, law = process or process_of(model), law or LogSine()
    decoder = decoder or GaussianDecoder()
    decoder.check(x0)
    lo, hi = as_time(decoder.start(process) if start is None else start), as_time(process.span[1])
    if times < 1 or not lo < hi or not process.sigma(lo) > 0:
        raise UsageError(
            f"a continuous bound draws at least one level between a start with noise and "
            f"t={hi.item():g}; got times={times} and start={lo.item():g}"
        )
    ask, sums = asking(process, model), _Sums(times)
    seen, clock = torch.zeros(times, dtype=torch.float64), x0.new_empty(0, dtype=torch.float64)
    for i, x, given in _slices(x0, batch, label):
        noise = Keyed(seed, i, LEVELS)
        u = noise.uniform(0, (len(x), times), clock) + torch.arange(times, device=x.device)
        t, weight = law.draw(process, lo, hi, (u / times).flatten())
        t, weight = t.view(u.shape), weight.view(u.shape) / times
        terms = torch.empty_like(weight)
        for j in range(times):
            eps = noise.normal(j + 1, tuple(x.shape), x)
            terms[:, j] = weight[:, j] * _square(process, ask, x, t[:, j], eps, given)
        sums.add(prior(process, hi, x), terms, _last(process, lo, x, decoder, noise))
        seen += t.sum(0).cpu()
    return sums.bound(seen / len(x0), x0[0].numel())


def _square(
    process: LinearSDE, ask: Ask, x0: State, t: Time, eps: State, label: Tensor | None
) -> Tensor:
    """||v - v_hat||² of each sample, float64 (b,)."""
    v, _ = ask(process.noised(x0, eps, t), t, label)
    alpha, sigma = process.alpha(t), process.sigma(t)
    r = torch.hypot(alpha, sigma)
    e = per_sample(alpha / r, x0) * eps - per_sample(sigma / r, x0) * x0 - v
    return e.double().square().flatten(1).sum(1)


def _last(process: LinearSDE, t: Time, x0: State, decoder: Decoder, noise: Keyed) -> Tensor:
    """Log p(x_0 | x_t) with x_t / alpha for its mean, and sigma / alpha for its spread."""
    ratio = process.sigma(t) / process.alpha(t)
    mean = x0.double() + ratio.item() * noise.normal(-1, tuple(x0.shape), x0).double()
    log_variance = (2 * ratio.log()).to(x0.device)
    return decoder.log_prob(x0, mean, log_variance)
