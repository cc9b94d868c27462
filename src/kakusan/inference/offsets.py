r"""Learning how to spread whole numbers over their cells: see `inference.dequantise`.

`fit_variational` ascends E_q[log p(x + u) - log q] with the model frozen and the denoising bound
in the place of log p: its gradient reaches u through x_t at all times. For an exact score the
score at the start of the span would do instead, without noise; that of a network is off there by
its error over sigma(t0), and a q that follows it falls below the uniform one.

References:
    Maximum likelihood training of score-based diffusion models (Song et al., 2021)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kakusan.core.noise import Keyed, generator, mix
from kakusan.core.types import Field, State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.inference.dequantise import Variational
from kakusan.models.denoiser import ROWS
from kakusan.objectives.matching import Denoising, Importance, Likelihood
from kakusan.processes.linear import LinearSDE, velocity_of

ROWS_OF_STEP, OFFSETS, NOISE, TIMES, WEIGHTS = 30, 31, 32, 33, 34  # separate the uses of one seed
WATCH = 25  # steps between looks at the value, each of which waits for the device


class DenoisingBound:
    r"""The evidence bound of the reverse SDE, from one time and one noise a sample.

    With x_t = alpha x + sigma eps over the span [t0, T], and the prior N(0, sigma_T² I) at T,

    .. math:: E \log p_{t_0}(\alpha_0 x + \sigma_0 \epsilon) \ge
        - \tfrac{d}{2} \log(2 \pi e \sigma_0^2) - \tfrac12 \frac{\alpha_T^2}{\sigma_T^2} \|x\|^2
        - \tfrac12 \int_{t_0}^T g^2 \, E \| s_\theta(x_t) - \nabla \log p(x_t | x) \|^2 \, dt ,

    an equality where s_theta is the score of a diffusion that ends in this prior. The integral is
    d (T - t0) times the mean loss of `Denoising(Likelihood())`.

    Arguments:
        process: The forward process.
        field: The score of the model.
    """

    def __init__(self, process: LinearSDE, field: Field) -> None:
        self.process = process
        # the losses ask a model for its process, row and raw output, and no more
        self.model: Any = _AsDenoiser(process, field)
        self.loss = Denoising(Likelihood(), Importance(Likelihood()))

    def __call__(self, x: State, seed: int, step: int) -> Tensor:
        """Unbiased in nats, float64 (B,), differentiable in x; noise is keyed by (seed, step)."""
        lo, hi = self.process.span
        t0, T = as_time(lo), as_time(hi)
        clock = torch.empty(0, dtype=torch.float64, device=x.device)
        eps = Keyed(seed, stream=NOISE).normal(step, tuple(x.shape), x)
        # a rotated grid: the times of one step are spread evenly, each is uniform by itself
        u = Keyed(seed, stream=TIMES).uniform(step, (1,), clock)
        u = (u + torch.arange(len(x), dtype=u.dtype, device=u.device) / len(x)) % 1
        loss = self.loss(self.model, x, eps, u).double()
        d = x[0].numel()
        entropy = d / 2 * (math.log(2 * math.pi * math.e) + self.process.variance(t0).log().item())
        prior = (self.process.alpha(T) / self.process.sigma(T)).item() ** 2 / 2
        x2 = x.flatten(1).double().square().sum(1)
        return -entropy - prior * x2 - d * (hi - lo) / 2 * loss


class _AsDenoiser:
    """Any score as the losses know a model: it predicts the angular velocity."""

    data_std = 1.0

    def __init__(self, process: LinearSDE, field: Field) -> None:
        self.process, self.velocity = process, velocity_of(process, field)

    def row(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return ROWS["v"](alpha, sigma, 1.0)

    def raw(self, x: State, t: Time, label: None = None) -> Tensor:
        return self.velocity(x, t)


def fit_variational(
    process: LinearSDE,
    field: Field,
    x0: State | Callable[[int], State],
    cells: Tensor,
    *,
    q: Variational | None = None,
    steps: int = 500,
    batch: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    tick: Callable[[int, str], None] | None = None,
) -> Variational:
    """Learns q(u | x) for a model that stays as it is.

    Arguments:
        process: The forward process.
        field: The score of the model, `model.score` of a `Denoiser` in `eval` mode; labels need
            not be given, since any q bounds any model.
        x0: Encoded data (N, *shape), or the batch (B, *shape) of each step.
        cells: The sides of a cell in model units, of shape `shape`; 0 for reals.
        q: One to go on with, in place; a new one by default.
        steps: How many.
        batch: Samples a step.
        lr: The learning rate of the first step; it falls to 0 along half a cosine.
        seed: Fixes weights, rows, offsets and noise: the same seed gives the same q.
        tick: Called with the number of steps done and a few words, now and then.

    Raises:
        KakusanError: No entry is whole, or the bound is not finite.

    Example:
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import VP
        >>> one = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> x0, cells = torch.randn(64, 2).round(), torch.ones(2)
        >>> q = fit_variational(VP(), one, x0, cells, steps=3)
        >>> q(x0, cells, Keyed(1)).x.shape
        torch.Size([64, 2])
    """
    if not bool((cells > 0).any()):
        raise KakusanError("no coordinate holds whole numbers, so there is no offset to learn")
    rows = x0 if callable(x0) else _rows(x0, batch, seed)
    bound = DenoisingBound(process, field)
    if q is None:
        x = rows(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(seed, WEIGHTS) >> 1)
            q = Variational.for_shape(tuple(x.shape[1:])).to(x.device)
    weights = list(q.parameters())
    optimizer = torch.optim.Adam(weights, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr / 2 * (1 + math.cos(math.pi * step / steps))
        y, log_q = q(rows(step), cells, Keyed(seed, stream=OFFSETS), step)
        value = (bound(y, seed, step) - log_q).mean()
        # of the weights of q alone: the model must not collect gradients
        for p, g in zip(weights, torch.autograd.grad(-value, weights), strict=True):
            p.grad = g
        optimizer.step()
        if (step + 1) % WATCH == 0 or step + 1 == steps:
            _watch(value.item(), step + 1, tick)
    return q


def _watch(value: float, step: int, tick: Callable[[int, str], None] | None) -> None:
    # weights that met one NaN stay NaN, so a look now and then misses none
    if not math.isfinite(value):
        raise KakusanError(
            f"the bound of the dequantiser is {value} by step {step}: look for states where the "
            "model's score is not finite, or try a smaller lr"
        )
    if tick is not None:
        tick(step, f"bound {value:.3f} nats")


def _rows(x0: State, batch: int, seed: int) -> Callable[[int], State]:
    """Random rows, with replacement; those of a step are a function of (seed, step)."""

    def rows(step: int) -> State:
        g = generator(seed, ROWS_OF_STEP, step)
        return x0[torch.randint(len(x0), (min(batch, len(x0)),), generator=g).to(x0.device)]

    return rows
