r"""Score matching: five losses with one minimiser, the score of the noised data.

Data x_0 are noised to x = x_t = alpha x_0 + sigma eps, whose density is p_t; a field s is to
become ∇log p_t. What one would like to minimise asks for the answer, and three others do not:

.. math::
    ESM(s) &= E \tfrac12 \| s(x) - \nabla \log p_t(x) \|^2 \\
    ISM(s) &= E [ \tfrac12 \| s(x) \|^2 + \operatorname{tr} \nabla s(x) ] = ESM(s) - \tfrac12 I \\
    SSM(s) &= E [ \tfrac12 \| s(x) \|^2 + v^\top \nabla s(x) \, v ] = ISM(s) ,
              \qquad E \, v v^\top = 1 \\
    DSM(s) &= E \tfrac12 \| s(x) + \epsilon / \sigma \|^2
            = ESM(s) + \tfrac12 (d / \sigma^2 - I)

with the Fisher information I = E |∇log p_t|² and d numbers in a state. The constants do not know
s, so all four have the gradient of ESM in expectation; they differ in variance and in cost.
Integration by parts, E s·∇log p = -E tr ∇s, makes ISM of ESM: p s must vanish far away. It looks
at x alone, so that it works on data as they are (`Clean`), where DSM has no noise to predict.

The velocity of the probability flow is the mean velocity of the lines t -> alpha x_0 + sigma eps
through x, so that flow matching is the same regression,

.. math::
    FM(v) = E \tfrac12 \| v(x) - (\dot\alpha x_0 + \dot\sigma \epsilon) \|^2 ,
    \qquad v^* = a x - \tfrac12 g^2 \nabla \log p_t .

Every objective is called as `loss(score, x0, eps, t)` and gives one number a sample. Randomness is
an argument: eps are standard normal numbers of the shape `loss.noise_shape(x0)`, which is that of
x0 but for `Sliced`, whose probes are further slices of the same tensor. So
`Keyed(seed).normal(step, loss.noise_shape(x0), x0)` serves any of them and resumes anywhere, and
nodes of a quadrature may stand in the place of random numbers.

References:
    Estimation of non-normalized statistical models by score matching (Hyvärinen, 2005)
    A connection between score matching and denoising autoencoders (Vincent, 2011)
    Sliced score matching (Song, Garg, Shi, Ermon, 2019), arXiv 1905.07088
    Flow matching for generative modeling (Lipman et al., 2023), arXiv 2210.02747
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kakusan.core.types import Field, State, Time, as_time, per_sample
from kakusan.errors import KakusanError, UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.objectives.matching import Likelihood, Stratified, Times, Weight
from kakusan.processes.linear import LinearSDE


@dataclass(frozen=True)
class Clean(LinearSDE):
    """The process that stands still, alpha = 1 and sigma = 0: data as they are, at any t.

    Example:
        >>> Clean().noised(torch.ones(1, 2), torch.randn(1, 2), as_time(0.5))
        tensor([[1., 1.]])
    """

    span: tuple[float, float] = (0.0, 1.0)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.ones_like(t)

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return torch.zeros_like(t)


class Objective(abc.ABC):
    """A loss of each sample, called as `loss(score, x0, eps, t)`."""

    def noise_shape(self, x0: State) -> tuple[int, ...]:
        """The shape of the standard normal numbers that a call wants."""
        return tuple(x0.shape)

    def __call__(self, score: Field, x0: State, eps: Tensor, t: Time | float) -> Tensor:
        """The loss of each sample, (B,).

        Arguments:
            score: What is being fitted, a field (x, t) -> like x.
            x0: Data, (B, *shape).
            eps: Standard normal numbers of the shape `noise_shape(x0)`.
            t: Times, () or (B,).
        """
        t = as_time(t)
        if x0.ndim < 2:
            raise KakusanError(f"data are a batch (B, *shape), got {tuple(x0.shape)}")
        if tuple(eps.shape) != self.noise_shape(x0):
            raise KakusanError(
                f"{type(self).__name__} wants normal numbers of the shape "
                f"{self.noise_shape(x0)}, its noise_shape(x0), and got {tuple(eps.shape)}"
            )
        if t.ndim and t.shape != x0.shape[:1]:
            raise KakusanError(
                f"times are one for all or one a sample, () or ({len(x0)},), not {tuple(t.shape)}"
            )
        return self.each(score, x0, eps, t)

    @abc.abstractmethod
    def each(self, score: Field, x0: State, eps: Tensor, t: Time) -> Tensor:
        """The same, for arguments that have been checked."""


@dataclass(frozen=True)
class Explicit(Objective):
    r"""ESM, ½|s(x_t) - truth(x_t)|²: the distance itself, where the answer is known.

    Arguments:
        process: What noises the data.
        truth: The field s should become: the exact score, or for a velocity the exact velocity.

    Example:
        >>> normal = Explicit(Clean(), truth=lambda x, t: -x)
        >>> normal(lambda x, t: 1 - x, torch.zeros(1, 3), torch.zeros(1, 3), 0.0)
        tensor([1.5000])
    """

    process: LinearSDE
    truth: Field

    def each(self, score: Field, x0: State, eps: Tensor, t: Time) -> Tensor:  # noqa: D102
        x = self.process.noised(x0, eps, t)
        return _half(_asked(score, x, t) - self.truth(x, t))


@dataclass(frozen=True)
class Implicit(Objective):
    r"""ISM, ½|s(x_t)|² + tr ∇s(x_t), with the exact trace: a batch d times as large.

    Arguments:
        process: What noises the data; `Clean()` takes them as they are.

    Raises:
        KakusanError: The score carries no gradient in x.

    Example:
        >>> x0 = torch.full((1, 3), 2.0)
        >>> Implicit(Clean())(lambda x, t: -x, x0, torch.zeros(1, 3), 0.0).detach()
        tensor([3.])
    """

    process: LinearSDE

    def each(self, score: Field, x0: State, eps: Tensor, t: Time) -> Tensor:  # noqa: D102
        x = self.process.noised(x0, eps, t)
        d = math.prod(x.shape[1:])
        basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
        s, slope = _slopes(score, x, t, basis.expand(d, *x.shape))
        return _half(s) + slope.sum(0)


@dataclass(frozen=True)
class Sliced(Objective):
    r"""SSM, ½|s(x_t)|² + vᵀ∇s(x_t) v, a mean over random signs v: d need not be small.

    The probes are the signs of eps[:, 1:]. ½|s|² is the mean of ½(v·s)², which the loss contained
    at first: their difference is a control variate. Signs see the diagonal of ∇s without error,
    and so have less variance than normal numbers.

    Arguments:
        process: What noises the data; `Clean()` takes them as they are.
        probes: How many probes v a sample.
        control: 1 puts ½|s|² for ½(v·s)² ("variance reduced"), 0 keeps what is sliced; both are
            unbiased, and so is all between.

    Raises:
        KakusanError: The score carries no gradient in x.

    Example:
        >>> loss, x0 = Sliced(Clean(), probes=2), torch.full((1, 3), 2.0)
        >>> eps = torch.randn(loss.noise_shape(x0))
        >>> eps.shape, loss(lambda x, t: -x, x0, eps, 0.0).detach()
        (torch.Size([1, 3, 3]), tensor([3.]))
    """

    process: LinearSDE
    probes: int = 1
    control: float = 1.0

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise UsageError(f"Sliced wants at least one probe a sample, got {self.probes}")

    def noise_shape(self, x0: State) -> tuple[int, ...]:
        """(B, 1 + probes, *shape): numbers that noise the data, and the probes."""
        return (len(x0), 1 + self.probes, *x0.shape[1:])

    def each(self, score: Field, x0: State, eps: Tensor, t: Time) -> Tensor:  # noqa: D102
        x = self.process.noised(x0, eps[:, 0], t)
        z = eps[:, 1:].transpose(0, 1)
        v = torch.copysign(torch.ones_like(z), z)
        s, slope = _slopes(score, x, t, v)
        sliced = 0.5 * (v * s).flatten(2).sum(2).square().mean(0)
        return sliced + self.control * (_half(s) - sliced) + slope.mean(0)


@dataclass(frozen=True)
class DenoisingAt(Objective):
    r"""DSM, ½|s(x_t) + eps/sigma|², at times that are given; `Denoising` draws and weighs them.

    Arguments:
        process: What noises the data.

    Raises:
        KakusanError: sigma is 0 at a time, where there is no noise to predict.

    Example:
        >>> from kakusan.processes.linear import EDM
        >>> x0, eps = torch.zeros(1, 3), torch.ones(1, 3)
        >>> DenoisingAt(EDM())(lambda x, t: 0 * x, x0, eps, 0.5)
        tensor([6.])
    """

    process: LinearSDE

    def __post_init__(self) -> None:
        if isinstance(self.process, Clean):
            raise UsageError(
                "clean data have no noise that DenoisingAt could predict; "
                "Implicit(Clean()) and Sliced(Clean()) fit their score"
            )

    def each(self, score: Field, x0: State, eps: Tensor, t: Time) -> Tensor:  # noqa: D102
        x, sigma = self.process.noised(x0, eps, t), self.process.sigma(t)
        # on a GPU the question would wait for it; a loss that is infinite stops training as well
        if sigma.device.type == "cpu" and not (sigma > 0).all():
            raise KakusanError(
                f"sigma is 0 at t={t[sigma <= 0].flatten()[0]:g}: there is no noise to predict; "
                f"the span of this process starts at {self.process.span[0]:g}"
            )
        return _half(_asked(score, x, t) + eps / per_sample(sigma, x))


@dataclass(frozen=True)
class FlowMatching(Objective):
    r"""FM, ½|v(x_t) - dx_t/dt|² along x_t = alpha x_0 + sigma eps; called with a velocity.

    The least loss is at the velocity of the probability flow, a x - ½ g² ∇log p_t; with
    `Rectified()` the lines are straight, dx_t/dt = eps - x_0.

    Arguments:
        process: The lines from data to noise.

    Example:
        >>> from kakusan.processes.linear import Rectified
        >>> x0, eps = torch.ones(1, 3), torch.zeros(1, 3)
        >>> FlowMatching(Rectified())(lambda x, t: 0 * x, x0, eps, 0.5)
        tensor([1.5000])
    """

    process: LinearSDE

    def each(self, score: Field, x0: State, eps: Tensor, t: Time) -> Tensor:  # noqa: D102
        t = t.contiguous()  # forward mode refuses expanded tensors
        one = torch.ones_like(t)
        line = torch.func.jvp(lambda t: self.process.noised(x0, eps, t), (t,), (one,))
        x, dx = line[0], line[1]  # the value and its slope
        if not dx.sum().isfinite():
            raise KakusanError(
                f"dx_t/dt is infinite at t={t.min().item():g}, where sigma starts like a root; "
                f"take times from {self.process.span[0]:g} on"
            )
        return _half(_asked(score, x, t) - dx)


@dataclass(frozen=True)
class OverTime:
    r"""An objective at times that are drawn, weighted: lambda(t) loss(score, x0, eps, t).

    With `DenoisingAt` it is `Denoising`, but for a factor: that one is a mean over the d numbers
    of the error, this one half of their sum. `Uniform` is lambda = 1 here, in the units of the
    score.

    Arguments:
        objective: Explicit, Implicit, Sliced, DenoisingAt or FlowMatching.
        weight: lambda(t).
        times: How times are drawn.
        data_std: The standard deviation of the data, which the weight `Karras` asks for.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> loss, x0 = OverTime(DenoisingAt(VP())), torch.zeros(4, 2)
        >>> u = torch.rand(4, dtype=torch.float64)
        >>> loss(lambda x, t: -x, x0, torch.randn(loss.noise_shape(x0)), u).shape
        torch.Size([4])
    """

    objective: Explicit | Implicit | Sliced | DenoisingAt | FlowMatching
    weight: Weight = field(default_factory=Likelihood)
    times: Times = field(default_factory=Stratified)
    data_std: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.objective.process, Clean):
            raise UsageError(
                "clean data are the same at all times, so there is nothing to draw or to weigh; "
                "call the objective itself"
            )

    @functools.cached_property
    def _model(self) -> Denoiser:
        # weights are factors on a network's own error: for the row "score" that is lambda itself
        return Denoiser(_nothing, self.objective.process, "score", self.data_std)

    def noise_shape(self, x0: State) -> tuple[int, ...]:
        """The shape of the standard normal numbers that a call wants."""
        return self.objective.noise_shape(x0)

    def __call__(self, score: Field, x0: State, eps: Tensor, u: Tensor) -> Tensor:
        """The loss of each sample, (B,).

        Arguments:
            score: What is being fitted, a field (x, t) -> like x.
            x0: Data, (B, *shape).
            eps: Standard normal numbers of the shape `noise_shape(x0)`.
            u: Numbers in [0, 1) that choose the times, float64 (B,).
        """
        t, importance = self.times.draw(self._model, u)
        factor = importance * self.weight.factor(self._model, t)
        return factor.to(x0) * self.objective(score, x0, eps, t)


# --- parts


def _nothing(x: State, level: Tensor, label: Tensor | None) -> Tensor:
    raise UsageError("this denoiser only tells weights of times; it has no network")


def _half(v: State) -> Tensor:
    """½|v|² of each sample, (B,)."""
    return 0.5 * v.square().flatten(1).sum(1)


def _asked(score: Field, x: State, t: Time) -> State:
    """s(x), which must be like x: what broadcasts would be something else than was meant."""
    s = score(x, t)
    if s.shape != x.shape:
        raise KakusanError(f"the score is {tuple(s.shape)}, and the state {tuple(x.shape)}")
    return s


def _slopes(score: Field, x: State, t: Time, v: Tensor) -> tuple[State, Tensor]:
    """s(x) and vᵀ∇s(x) v of k directions v (k, B, *shape): (B, *shape) and (k, B).

    Reverse mode, which attention has twice and forward mode not; one large batch instead of vmap:
    the user's network needs to know nothing of transforms.
    """
    k, trains = len(v), torch.is_grad_enabled()
    # what was made in inference mode cannot be differentiated: copies can
    with torch.inference_mode(False), torch.enable_grad():
        many, v = x.repeat(k, *(1,) * (x.ndim - 1)), v.clone()
        many = many if many.requires_grad else many.requires_grad_()
        s = _asked(score, many, t.repeat(k) if t.ndim else t.clone())
        if not s.requires_grad:
            raise KakusanError(
                "the trace of ∇s is made of derivatives of the score in x, and this score "
                "carries none: it is a constant, or computed under no_grad; DenoisingAt needs "
                "no derivative"
            )
        aim = (s * v.reshape(many.shape)).sum()
        (back,) = torch.autograd.grad(aim, many, create_graph=trains, materialize_grads=True)
    slope = (back.reshape(v.shape) * v).flatten(2).sum(2)
    s = s.reshape(v.shape)[0]
    return (s, slope) if trains else (s.detach(), slope.detach())
