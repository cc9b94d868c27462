r"""Losses on the knots of a chain: L_simple, L_vlb, and their hybrid, which learns the variance.

With L_k the k-th term of the bound (`objectives.elbo`) divided by the number d of entries, in
nats, and the decoder's -log p(x_0 | x_1) / d for the first,

.. math:: L_{simple} = E_k \| \epsilon - \hat\epsilon \|^2 / d , \qquad
          L_{vlb} = E_k \, T L_k , \qquad
          L_{hybrid} = L_{simple} + w \, L_{vlb} ,

so that L_vlb is the negative bound an entry, but for the prior. In the hybrid the mean is taken as
given by L_vlb: its gradient there is stopped, so that L_simple alone teaches the mean and the
bound teaches the variance. w = 0.001 is small because the bound must not outshout the rest.

L_k is largest near the data by orders of magnitude, so an even k makes L_vlb noisy. Three ways to
draw it are here: evenly (`Knots`, `StratifiedKnots`); by the share each step has for N(0, s²) data
(`WeightedKnots`), a table known beforehand, so that a run can be resumed; and by the losses seen
so far (`ImportanceTimes`), for training loops of one's own, which tell it what they saw. All are
unbiased.

References:
    Denoising diffusion probabilistic models (Ho et al., 2020), arXiv:2006.11239
    Improved denoising diffusion probabilistic models (Nichol, Dhariwal, 2021), arXiv:2102.09672
"""

from __future__ import annotations

import torch
from torch import Tensor

from kakusan.core.types import State, Time, per_sample
from kakusan.errors import UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.objectives.chain import (
    Chain,
    Interpolated,
    Step,
    Variance,
    chain_of,
    divergence,
    miss,
)
from kakusan.objectives.decoders import Decoder, GaussianDecoder
from kakusan.objectives.elbo import expected
from kakusan.objectives.matching import SNR, Denoising, Drawn, Times


class Knots(Times):
    """Independent and uniform over the knots of a chain.

    Arguments:
        chain: The chain; that of the model's process by default.
    """

    def __init__(self, chain: Chain | None = None) -> None:
        self.chain = chain

    def of(self, model: Denoiser) -> Chain:
        """The chain whose knots are drawn."""
        return self.chain or chain_of(model.process)

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        knots = self.of(model).times.to(u.device)
        return Drawn(knots[(u * len(knots)).long()], torch.ones_like(u))


class StratifiedKnots(Knots):
    """Uniform over the knots, one in each of B equal strata."""

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        strata = torch.arange(len(u), dtype=u.dtype, device=u.device)
        # (B - 1 + u) / B rounds to 1 for the largest u
        return super().draw(model, ((strata + u) / len(u)).clamp(max=1 - 2**-53))


class WeightedKnots(Knots):
    """By the share that each step has in the bound of N(0, s²) data, and divided by it again.

    The first step, the decoder's, is drawn as often as the second.
    """

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        chain = self.of(model)
        shares = expected(chain, model.data_std).detach().to(u.device)
        shares[0] = shares[1] if len(shares) > 1 else 1
        return _drawn(chain, shares / shares.sum(), u)


class ImportanceTimes(Times):
    """By the root mean square of the last losses at each knot (Nichol and Dhariwal 2021).

    What it knows are two tensors, `history` and `seen`, that a training loop keeps with its own
    state; `kakusan train` keeps none and draws by `WeightedKnots`. Uniform until every knot has
    seen `length` losses.

    Arguments:
        chain: The chain.
        length: How many losses to remember of each knot.
        even: The share drawn evenly, so that no knot is forgotten.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> times = ImportanceTimes(Chain(VP.from_betas([0.1, 0.2])), length=1, even=0.0)
        >>> times.update(times.chain.times, torch.tensor([3.0, 1.0]))
        >>> times.probabilities.tolist()
        [0.75, 0.25]
    """

    def __init__(self, chain: Chain, length: int = 10, even: float = 0.001) -> None:
        if length < 1 or not 0 <= even <= 1:
            raise UsageError(f"length is at least 1 and even in [0, 1], got {length} and {even}")
        self.chain, self.even = chain, even
        self.history = torch.zeros(len(chain), length, dtype=torch.float64)
        self.seen = torch.zeros(len(chain), dtype=torch.long)

    @property
    def probabilities(self) -> Tensor:
        """How likely each knot is drawn, (T,)."""
        T = len(self.chain)
        if bool((self.seen < self.history.shape[1]).any()):
            return torch.full((T,), 1 / T, dtype=torch.float64)
        size = self.history.square().mean(1).sqrt()
        return (1 - self.even) * size / size.sum() + self.even / T

    def draw(self, model: Denoiser, u: Tensor) -> Drawn:  # noqa: D102
        return _drawn(self.chain, self.probabilities.to(u.device), u)

    def update(self, t: Time, loss: Tensor) -> None:
        """Tells it the losses (B,) at the times (B,), without their importance weights."""
        for k, value in zip(self.chain.index(t).tolist(), loss.detach().tolist(), strict=True):
            self.history[k, int(self.seen[k]) % self.history.shape[1]] = value
            self.seen[k] += 1


def _drawn(chain: Chain, shares: Tensor, u: Tensor) -> Drawn:
    k = torch.searchsorted(shares.cumsum(0), u, right=True).clamp(max=len(shares) - 1)
    return Drawn(chain.times.to(u.device)[k], 1 / (len(shares) * shares[k]))


class Simple(Denoising):
    """L_simple: the plain error of eps, at the knots of the chain.

    Arguments:
        times: How knots are drawn; `StratifiedKnots` by default.
    """

    def __init__(self, times: Times | None = None) -> None:
        super().__init__(SNR(), times or StratifiedKnots())


class Variational(Denoising):
    """L_vlb: the term of a knot, times the number of terms.

    Arguments:
        variance: That of the model's steps; `Interpolated`, as the network learns it, by default.
        decoder: `GaussianDecoder` by default.
        times: How knots are drawn; `WeightedKnots` by default.
        chain: The chain; that of the model's process by default.

    Example:
        >>> from kakusan.objectives.chain import Small
        >>> from kakusan.processes.linear import VP
        >>> zero = Denoiser(lambda x, t, label: torch.zeros_like(x), VP.from_betas([0.1, 0.2]))
        >>> u = torch.rand(4, dtype=torch.float64)
        >>> Variational(Small())(zero, torch.zeros(4, 2), torch.ones(4, 2), u).shape
        torch.Size([4])
    """

    def __init__(
        self,
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        times: Times | None = None,
        chain: Chain | None = None,
    ) -> None:
        super().__init__(times=times or WeightedKnots(chain))
        self.variance, self.decoder = variance or Interpolated(), decoder or GaussianDecoder()
        self.chain = chain

    def at(  # noqa: D102
        self, model: Denoiser, x0: State, eps: State, t: Time, label: Tensor | None = None
    ) -> Tensor:
        chain, step, e, spread = self._asked(model, x0, eps, t, label)
        return self._term(chain, step, x0, e, spread)

    def _asked(
        self, model: Denoiser, x0: State, eps: State, t: Time, label: Tensor | None
    ) -> tuple[Chain, Step, State, Tensor | None]:
        """The chain, the steps that end at t, and there the error of v beside the spread."""
        chain = self.chain or chain_of(model.process)
        step = chain.steps(chain.index(t))
        v, spread = model.velocity_and_spread(model.process.noised(x0, eps, step.t), step.t, label)
        return chain, step, miss(step, x0, eps, v), spread

    def _term(
        self, chain: Chain, step: Step, x0: State, e: State, spread: Tensor | None
    ) -> Tensor:
        """T L_k of each sample, (B,), in the dtype of e."""
        log_variance = self.variance.log(step, spread, e)
        inner = divergence(step, e, log_variance).flatten(1).mean(1)
        mean = x0 + per_sample(step.sigma / torch.hypot(step.alpha, step.sigma), e) * e
        last = -self.decoder.log_prob(x0, mean, log_variance) / x0[0].numel()
        return len(chain) * torch.where(step.k == 0, last.to(e.dtype), inner)


class Hybrid(Variational):
    """L_simple + w L_vlb, whose mean L_vlb takes as given: the loss that learns the variance.

    Arguments:
        weight: w.
        variance: As for `Variational`, and so are the others.
        decoder: log p(x_0 | x_1).
        times: How knots are drawn; `StratifiedKnots` by default.
        chain: The chain.
    """

    def __init__(
        self,
        weight: float = 0.001,
        variance: Variance | None = None,
        decoder: Decoder | None = None,
        times: Times | None = None,
        chain: Chain | None = None,
    ) -> None:
        if not weight > 0:
            raise UsageError(f"the weight of L_vlb must be positive, got {weight}; Simple() is 0")
        super().__init__(variance, decoder, times or StratifiedKnots(chain), chain)
        self.share = weight

    def at(  # noqa: D102
        self, model: Denoiser, x0: State, eps: State, t: Time, label: Tensor | None = None
    ) -> Tensor:
        chain, step, e, spread = self._asked(model, x0, eps, t, label)
        # eps is off by alpha/r times what v is
        factor = step.alpha**2 / (step.alpha**2 + step.sigma**2)
        simple = factor.to(device=e.device, dtype=e.dtype) * e.square().flatten(1).mean(1)
        return simple + self.share * self._term(chain, step, x0, e.detach(), spread)
