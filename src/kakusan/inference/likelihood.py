r"""The likelihood of data under a flow, with everything that is uncertain about it.

A flow dx/dt = v(x, t) takes data at t_0 to noise at t_1, whose density π is known, so

.. math:: \log p(x) = \log \pi(x_{t_1}) + \int_{t_0}^{t_1} \nabla \cdot v(x_t, t) \, dt .

For a diffusion model the flow is its probability flow, taken in the angle (`AngularFlow`). What
`log_prob` returns is the logarithm of the density from which the flow's own samples come, and
three numbers that say how far to trust it:

- `std_error`, where the divergence was found by random probes;
- `solver_error`, an estimate of what the steps leave: the sum of the errors of all steps in the
  integral, and of those in the state times the slope of log π (adaptive steps), or the difference
  to half as many steps (a given grid);
- `prior_gap`, KL(p(x_{t_1} | x) ‖ π). Its mean over the data bounds KL(p_{t_1} ‖ π) from above,
  and so tells how far π is from the law of noised data; where noise takes over, it is tiny.

References:
    Score-based generative modeling through SDEs (Song et al., 2021), section 4.3
    FFJORD (Grathwohl et al., 2019), arXiv 1810.01367
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Keyed
from kakusan.core.trace import ExactTrace, Trace
from kakusan.core.types import State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.models.denoiser import Conditioned, Denoiser
from kakusan.models.score import ExactEmpirical, ExactMixture
from kakusan.processes.flow import Angle, AngularFlow, LogDensity
from kakusan.processes.sde import SDE
from kakusan.solvers.adaptive import DormandPrince
from kakusan.solvers.methods import RK4
from kakusan.solvers.solve import Engine, Method, solve

PROBES = 13  # separates this use of a seed from all others


class LogProb(NamedTuple):
    """The logarithm of a density, and how well it is known; all in nats.

    Attributes:
        value: log p(x), (B,).
        std_error: Its standard error from random probes, (B,): 0 with the exact trace, NaN with
            a single probe.
        solver_error: An estimate of the error of the steps, (B,); NaN for a given grid where
            gradients are wanted, since it takes a second run.
        prior_gap: KL(p(x_{t_1} | x) ‖ π), (B,); NaN for a flow that is no diffusion's.
        evaluations: How often the field was evaluated, each time for the whole batch.
        energy: ∫ |v|² dt, (B,), where it was asked for; else None.
    """

    value: Tensor
    std_error: Tensor
    solver_error: Tensor
    prior_gap: Tensor
    evaluations: int
    energy: Tensor | None = None


class Prior(abc.ABC):
    """The law at the end of a flow."""

    @abc.abstractmethod
    def log_prob(self, x: State) -> Tensor:
        """Log density, (B,)."""

    @abc.abstractmethod
    def slope(self, x: State) -> State:
        """Its gradient, like x."""


class Gaussian(Prior):
    """N(0, std² I).

    Example:
        >>> Gaussian(2.0).log_prob(torch.zeros(1, 1))
        tensor([-1.6121])
    """

    def __init__(self, std: float = 1.0) -> None:
        self.std = std

    def log_prob(self, x: State) -> Tensor:  # noqa: D102
        z = x.flatten(1) / self.std
        constant = math.log(2 * math.pi) / 2 + math.log(self.std)
        return -0.5 * z.square().sum(1) - z.shape[1] * constant

    def slope(self, x: State) -> State:  # noqa: D102
        return -x / self.std**2


def flow_of(model: Any) -> SDE:
    """The flow of a model: a denoiser, a score that knows its process, or an ODE as it is.

    Raises:
        KakusanError: If it is none of these.
    """
    if isinstance(model, Denoiser):
        model = model.score
    if isinstance(model, Conditioned):
        return _denoising_flow(model)
    if isinstance(model, ExactMixture):
        return AngularFlow(model.process, model)
    if isinstance(model, ExactEmpirical):  # whose law at t = 0 has no density
        return AngularFlow(model.process, model, start=model.process.span[0])
    if isinstance(model, SDE):
        return model
    raise KakusanError(
        f"a likelihood needs a denoiser, its score or an ODE, not {type(model).__name__}; "
        "AngularFlow(process, score) makes a flow of any score, and a DiffusionModel has a "
        "log_prob of its own"
    )


class _Turned(Denoiser):
    """A denoiser with the angle for time."""

    def velocity(self, x: State, t: Time, label: Tensor | None = None) -> State:
        """The network's own output, where it predicts just that."""
        if self.predict == "v":
            return self.raw(x, t, label).to(x.dtype)
        return super().velocity(x, t, label)


def _denoising_flow(score: Conditioned) -> AngularFlow:
    model, process, s = score.model, score.model.process, score.model.data_std
    if model.predict in ("x0", "score"):  # not regular at t = 0
        return AngularFlow(process, score, s, start=process.span[0])
    zero = as_time(0.0)
    if type(model) is not Denoiser or process.alpha(zero) != 1 or process.sigma(zero) != 0:
        return AngularFlow(process, score, s)
    # the same velocities without the detour by time and scale
    end = process.angle(as_time(process.span[1])).item()
    turned = _Turned(model.net, Angle((0.0, end)), model.predict, s)
    return AngularFlow(turned.process, Conditioned(turned, score.label, score.guidance), s)


def log_prob(
    model: Any,
    x: State,
    trace: Trace | None = None,
    method: Method | None = None,
    grid: Tensor | None = None,
    prior: Prior | None = None,
    seed: int = 0,
    first: int = 0,
    engine: Engine | None = None,
    energy: bool = False,
) -> LogProb:
    """Log p(x) under the flow of a model.

    Gradients flow to the parameters of the model, and to x where it needs one: through the steps,
    or with `engine=Adjoint()` and a `grid` in the memory of a few states.

    Arguments:
        model: A denoiser, its score (`denoiser.given(label)` for that of a class), or any ODE as
            an SDE without noise, whose span starts at the data.
        x: Data, (B, *shape).
        trace: How the divergence is found: `ExactTrace()` by default, `Hutchinson(k)` for many
            dimensions.
        method: How to step; `DormandPrince(1e-5, 1e-5)` by default, which takes its own steps.
        grid: Times to step at, from the data to the noise, for methods that take what they are
            given. The flow of a diffusion model has the angle for time.
        prior: The law at the end; normal by default, with the variance of noised data.
        seed: Fixes the probes: those of sample i are a function of seed and i.
        first: The number of the first sample of this batch.
        engine: How to run the steps.
        energy: Whether to integrate |v|² as well.

    Raises:
        KakusanError: If the steps do not get there, or a divergence is not finite.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> one = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> log_prob(one, torch.zeros(1, 2, dtype=torch.float64)).value  # -log(2 pi)
        tensor([-1.8379], dtype=torch.float64)
    """
    flow, trace = flow_of(model), trace or ExactTrace()
    method = method or (DormandPrince(1e-5, 1e-5) if grid is None else RK4())
    _check(flow, x, method, grid)
    trace.check(math.prod(x.shape[1:]))
    angular = isinstance(flow, AngularFlow)
    y = x / flow.start if angular else x
    prior = prior or Gaussian(flow.end_std if angular else 1.0)
    times = torch.tensor(flow.span, dtype=torch.float64) if grid is None else grid
    with torch.set_grad_enabled(_differentiable(flow, y, times)):
        probes = trace.probes(y.detach(), Keyed(seed, first, PROBES))
        ode = LogDensity(flow, trace, probes, y, energy)
        run = _Run(ode, times, method, engine, prior)
        z = run.end(y)
        value, values = run.total(z)
    return LogProb(
        value - ode.d * math.log(flow.start) if angular else value,
        trace.std_error(values.detach(), ode.d),
        run.error(y, z.detach(), value.requires_grad),
        _prior_gap(flow, x, prior) if angular else torch.full_like(values[:, 0], math.nan),
        ode.evaluations,
        z[:, -1] if energy else None,
    )


class _Run(NamedTuple):
    """One integration of state and density."""

    ode: LogDensity
    times: Tensor
    method: Method
    engine: Engine | None
    prior: Prior

    def end(self, y: State) -> State:
        """The state of `ode` at the noise."""
        try:
            return solve(
                self.ode, self.ode.begin(y), self.times, self.method, engine=self.engine
            ).end
        except KakusanError as error:
            if self.ode.bad is None:
                raise
            i, t = self.ode.bad
            raise KakusanError(
                f"the divergence of the flow is not finite for sample {i} at t={t:.6g}: {error}"
            ) from None

    def state(self, z: State) -> State:
        """The state of the flow, like its data."""
        return z[:, : self.ode.d].reshape(self.ode.shape)

    def total(self, z: State) -> tuple[Tensor, Tensor]:
        """Log π plus the mean integral of the divergence, (B,); and all integrals, (B, k)."""
        values = z[:, self.ode.d :]
        values = values[:, :-1] if self.ode.energy else values
        return self.prior.log_prob(self.state(z)) + values.mean(1), values

    @torch.no_grad()
    def error(self, y: State, z: State, training: bool) -> Tensor:
        """An estimate of what the steps leave, (B,); of a given grid not while training."""
        if isinstance(self.method, DormandPrince):
            parts = self.method.tally.error
            slope = self.prior.slope(self.state(z)).flatten(1)
            return self.total(parts)[1].mean(1) + (slope.abs() * parts[:, : self.ode.d]).sum(1)
        if training or len(self.times) < 3:
            return z.new_full((len(z),), math.nan)
        coarse = torch.cat([self.times[:-1:2], self.times[-1:]])
        other = self._replace(times=coarse, engine=None).end(y)
        return (self.total(z)[0] - self.total(other)[0]).abs()


def _differentiable(flow: SDE, y: State, times: Tensor) -> bool:
    """Whether anything but the time along the flow needs a gradient."""
    if not torch.is_grad_enabled():
        return False
    return y.requires_grad or flow.drift(y.detach(), times[0]).requires_grad


def _prior_gap(flow: AngularFlow, x: State, prior: Prior) -> Tensor:
    """KL(p(y_1 | x) ‖ N(0, std²)), (B,); NaN for a prior of another form."""
    x = x.detach().flatten(1).double()
    if not isinstance(prior, Gaussian):
        return torch.full_like(x[:, 0], math.nan)
    process = flow.process
    start, end = (process.time_of_angle(as_time(phi)) for phi in flow.span)
    factor, variance = process.transition(start, end)
    # both over what the prior has: the scale r of the state, and its own
    scale = (process.alpha(end) ** 2 + process.variance(end)) * prior.std**2
    ratio = (variance / scale).item()
    mean = x.square().sum(1) * (factor**2 / scale).item()
    return 0.5 * (mean + x.shape[1] * (ratio - 1 - math.log(ratio)))


def _check(flow: SDE, x: State, method: Method, grid: Tensor | None) -> None:
    if not x.is_floating_point() or x.ndim < 2:
        raise KakusanError(
            f"data are floating-point tensors of shape (B, *shape), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    if len(x) == 0:
        raise KakusanError("there is no sample to find the likelihood of")
    if grid is not None:
        ends, span = grid.flatten()[[0, -1]].tolist(), flow.span
        if any(
            abs(a - b) > 1e-6 * abs(span[1] - span[0]) for a, b in zip(ends, span, strict=True)
        ):
            raise KakusanError(
                f"a grid goes from the data at t={span[0]:g} to the noise at t={span[1]:g}, and "
                f"this one from {ends[0]:g} to {ends[1]:g}"
            )
    bad = ~x.detach().flatten(1).isfinite().all(1)
    if bad.any():
        raise KakusanError(f"sample {int(bad.nonzero()[0])} of the data is not finite")
    if not flow.diffusion(x, as_time(flow.span[0])).deterministic:
        raise KakusanError(
            f"a likelihood is that of an ODE, and {type(flow).__name__} has noise; its "
            "probability flow has the same marginals: AngularFlow(process, score) for a linear "
            "SDE, probability_flow(sde, score) for any"
        )
    if grid is None and not isinstance(method, DormandPrince):
        raise KakusanError(
            f"{type(method).__name__} steps from time to time of a grid, and none is given: "
            "grid=torch.linspace(*flow.span, 101, dtype=torch.float64), say, or "
            "method=DormandPrince(), which takes its own steps"
        )


# --- codes


def encode(
    model: Any, x: State, method: Method | None = None, grid: Tensor | None = None
) -> State:
    """The noise that the flow takes data to: standard normal, if the model is good; like x.

    Arguments:
        model: As in `log_prob`.
        x: Data, (B, *shape).
        method: How to step; `DormandPrince(1e-5, 1e-5)` by default.
        grid: Times to step at, for methods that take what they are given.
    """
    return _carried(model, x, method, grid, back=False)


def decode(
    model: Any, z: State, method: Method | None = None, grid: Tensor | None = None
) -> State:
    """The data that the flow takes noise to: the inverse of `encode`, like z."""
    return _carried(model, z, method, grid, back=True)


def _carried(
    model: Any, x: State, method: Method | None, grid: Tensor | None, back: bool
) -> State:
    flow = flow_of(model)
    method = method or (DormandPrince(1e-5, 1e-5) if grid is None else RK4())
    _check(flow, x, method, grid)
    angular = isinstance(flow, AngularFlow)
    start, end = (flow.start, flow.end_std) if angular else (1.0, 1.0)
    times = torch.tensor(flow.span, dtype=torch.float64) if grid is None else grid
    if back:
        return solve(flow, x * end, times.flip(0), method).end * start
    return solve(flow, x / start, times, method).end / end


def interpolate(
    model: Any, a: State, b: State, n: int = 8, method: Method | None = None
) -> Tensor:
    """States between a and b, along the great circle between their codes.

    Normal numbers in many dimensions lie near a sphere, and the straight line between two of them
    leaves it; codes on the way are therefore turned, their lengths blended.

    Arguments:
        model: As in `log_prob`.
        a: Data, (B, *shape).
        b: Data like a.
        n: How many states, a and b among them.
        method: How to step.

    Returns:
        (n, B, *shape).
    """
    if n < 2 or a.shape != b.shape:
        raise KakusanError(
            f"interpolation goes from a to b of one shape in n >= 2 states, got "
            f"{tuple(a.shape)}, {tuple(b.shape)} and n={n}"
        )
    za, zb = encode(model, torch.cat([a, b]), method).chunk(2)
    la, lb = (z.flatten(1).norm(dim=1) for z in (za, zb))
    cos = (za * zb).flatten(1).sum(1) / (la * lb)
    angle = cos.clamp(-1, 1).acos()
    codes = []
    for w in torch.linspace(0, 1, n, dtype=torch.float64).tolist():
        length = (1 - w) * la + w * lb
        p, q = torch.sin((1 - w) * angle), torch.sin(w * angle)
        # where both point the same way, turning is blending
        flat = torch.sin(angle) < 1e-6
        p, q = (torch.where(flat, v, u / torch.sin(angle)) for u, v in ((p, 1 - w), (q, w)))
        codes.append(per_sample(length * p / la, za) * za + per_sample(length * q / lb, zb) * zb)
    return torch.stack([decode(model, z, method) for z in codes])
