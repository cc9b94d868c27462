r"""Flows: ODEs that carry data to noise, and the density along with them.

Along dx/dt = v(x, t) the density of the states obeys

.. math:: \frac{d}{dt} \log p_t(x_t) = -\nabla \cdot v(x_t, t)

(the instantaneous change of variables), so that log p at the data is that at the noise plus the
integral of the divergence. `LogDensity` carries this integral beside the state, as one more
coordinate a probe, and any method of `solvers` integrates both.

`AngularFlow` is the probability flow of a linear SDE in the coordinates in which it is regular at
both ends: with alpha, sigma = r (cos phi, sin phi), the state y = x / r moves by dy/dphi = v, the
velocity that samplers use. It starts at the data themselves, phi = 0, where the flow in t has
the rate 1/sigma: nothing is cut off, and no smallest noise level is left to choose.

References:
    Neural ordinary differential equations (Chen et al., 2018), arXiv 1806.07366
    Score-based generative modeling through SDEs (Song et al., 2021), appendix D.2
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kakusan.core.operators import Zero
from kakusan.core.trace import Trace
from kakusan.core.types import Field, State, Time, as_time, per_sample
from kakusan.processes.linear import LinearSDE, ScoreField, velocity_of
from kakusan.processes.sde import SDE


@dataclass(frozen=True)
class Angle(LinearSDE):
    """The process with the angle for time and r = 1: all others are this one, scaled."""

    span: tuple[float, float] = (0.0, math.pi / 2)

    def alpha(self, t: Time) -> Tensor:  # noqa: D102
        return torch.cos(t)

    def sigma(self, t: Time) -> Tensor:  # noqa: D102
        return torch.sin(t)

    def _time_of_angle(self, phi: Tensor) -> Time:
        return phi


class AngularFlow(SDE):
    """The probability flow of a linear SDE in the angle: dy/dphi = v, y = x / r.

    Its time is the angle; the span goes from the data to the noise, and it runs both ways.

    Arguments:
        process: The forward process.
        score: Its score.
        data_std: The standard deviation of the data, for that of the noise at the end.
        start: The time that data stand at. By default 0 for a score that knows its velocity, and
            where the span of the process starts for any other field.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> flow = AngularFlow(VP(), lambda x, t: -x)  # standard normal data stay where they are
        >>> flow.drift(torch.ones(1, 2), as_time(0.5))
        tensor([[0., 0.]])
    """

    def __init__(
        self,
        process: LinearSDE,
        score: Field,
        data_std: float = 1.0,
        start: float | None = None,
    ) -> None:
        self.process, self.score, self.velocity = process, score, velocity_of(process, score)
        if start is None:
            start = 0.0 if isinstance(score, ScoreField) else process.span[0]
        ends = as_time(torch.tensor([start, process.span[1]], dtype=torch.float64))
        self.span = tuple(process.angle(ends).tolist())
        self.start = torch.hypot(process.alpha(ends), process.sigma(ends))[0].item()
        self.end_std = math.hypot(math.sin(self.span[1]), math.cos(self.span[1]) * data_std)

    def drift(self, x: State, t: Time) -> State:
        """The velocity at y and the angle t."""
        if isinstance(self.process, Angle):
            return self.velocity(x, t)
        time = self.process.time_of_angle(t)
        r = torch.hypot(self.process.alpha(time), self.process.sigma(time))
        return self.velocity(per_sample(r, x) * x, time)

    def diffusion(self, x: State, t: Time) -> Zero:  # noqa: D102
        return Zero()


class Integrating(SDE):
    """A process whose last coordinates are integrals along it, on which nothing depends.

    Attributes:
        moving: How many coordinates come before them.
    """

    moving: int

    @abc.abstractmethod
    def motion(self, x: State, t: Time) -> State:
        """The drift, with zeros for that of the integrals; cheaper than the drift."""


class LogDensity(Integrating):
    """An ODE with the integral of its divergence beside the state.

    States are (B, d + k) in float64: the flattened state, then k estimates of ∫ ∇·v dt, one a
    probe; with `energy`, ∫ |v|² dt is one more. The field itself is evaluated in the precision of
    `like`, so that a network in float32 adds up in float64.

    Arguments:
        ode: A process without noise.
        trace: How the divergence is found.
        probes: What is random about it.
        like: A batch of states of the ODE, for their shape and precision.
        energy: Whether to carry the kinetic energy.
    """

    def __init__(
        self, ode: SDE, trace: Trace, probes: tuple[Tensor, ...], like: State, energy: bool = False
    ) -> None:
        self.ode, self.trace, self.probes, self.energy = ode, trace, probes, energy
        self.span, self.shape, self.dtype = ode.span, like.shape, like.dtype
        self.d = self.moving = math.prod(like.shape[1:])
        self.evaluations = 0
        self.bad: tuple[int, float] | None = None  # sample and time of a divergence not finite

    def begin(self, x: State) -> State:
        """The state of this process at the start, nothing integrated yet."""
        more = self.trace.estimates(self.d) + self.energy
        return torch.cat([x.flatten(1).double(), x.new_zeros(len(x), more).double()], 1)

    def motion(self, x: State, t: Time) -> State:  # noqa: D102
        self.evaluations += 1
        v = self.ode.drift(self._state(x), t).flatten(1).double()
        return torch.cat([v, x.new_zeros(len(x), x.shape[1] - self.d)], 1)

    def _state(self, x: State) -> State:
        """The state of the ODE itself."""
        return x[:, : self.d].to(self.dtype).reshape(self.shape)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        y = self._state(x)
        v, values = self.trace(lambda y: self.ode.drift(y, t), y, self.probes)
        self.evaluations += 1
        if not values.sum().isfinite():
            self._remember(y.flatten(1).isfinite().all(1) & ~values.isfinite().all(1), t)
        v = v.flatten(1).double()
        energy = [v.square().sum(1, keepdim=True)] if self.energy else []
        return torch.cat([v, values.double(), *energy], 1)

    def _remember(self, bad: Tensor, t: Time) -> None:
        """The first on the way: steps that are tried again come nearer to it from beyond."""
        start = self.span[0]
        for i in bad.nonzero().flatten().tolist():
            at = t[i].item() if t.ndim else t.item()
            if self.bad is None or abs(at - start) < abs(self.bad[1] - start):
                self.bad = i, at

    def diffusion(self, x: State, t: Time) -> Zero:  # noqa: D102
        return Zero()
