r"""Particles in an energy, with the temperature as their noise; and Lorenz's weather.

Where the law of a process settles in exp(-U / T), its `log_stationary` says so; for an energy
given as a function the constant is not known.

References:
    Stochastic processes and applications (Pavliotis, 2014), doi 10.1007/978-1-4939-1323-7
    Conditioning diffusions using Malliavin calculus (Pidstrigach et al., 2025), arXiv 2504.03461
    Deterministic nonperiodic flow (Lorenz, 1963)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kakusan.core.operators import Diagonal, Operator, Scale
from kakusan.core.types import State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE, Splittable
from kakusan.processes.zoo.laws import log_bessel
from kakusan.processes.zoo.parameters import (
    Value,
    beside,
    count,
    filled,
    frozen,
    keep,
    like,
    parameter,
)

Energy: TypeAlias = Callable[[State], Tensor]


def gradient(energy: Energy, x: State) -> State:
    """∇U(x), whether or not gradients are on; differentiable again where they are.

    Example:
        >>> with torch.inference_mode():
        ...     gradient(lambda x: (x**2).sum(1), torch.ones(1, 2))
        tensor([[2., 2.]])
    """
    # a solver's path: a third of the time of the other, which nests in any derivative and compiles
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        y = _leaf(x)
        if y is not None:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(energy(y).sum(), y)[0]
    return torch.func.grad(lambda y: energy(y).sum())(x)


def _leaf(x: State) -> State | None:
    """A copy of x to differentiate by; None inside another derivative, which it would cut off."""
    if forward_ad.unpack_dual(x).tangent is not None:
        return None
    with torch.inference_mode(False):
        try:
            return x.detach().clone().requires_grad_()
        except RuntimeError:  # torch.func says so
            return None


def _callable(energy: Energy) -> Energy:
    if not callable(energy):
        raise KakusanError(
            f"energy must be a function from states (B, ...) to energies (B,), got {energy!r}"
        )
    return energy


def _origin(owner: str, dim: int | None) -> Tensor:
    if dim is None:
        raise KakusanError(
            f"{owner} does not know how many coordinates its energy takes; give it "
            "dim, or a start of your own"
        )
    return torch.zeros(dim, dtype=torch.float64)


@frozen
class DoubleWell(Splittable):
    r"""Two wells at -1 and +1 in each coordinate: :math:`U = v (x^2 - 1)^2`, unit noise.

    .. math:: dX = -4 v X (X^2 - 1) \, dt + dW

    Stationary density exp(-2U), reversible; crossing takes a time of order exp(2v). Euler's step
    may run away where h is large, as the drift is cubic: the splitting does not.

    Arguments:
        v: The height of the barrier, > 0.
        dim: The number of coordinates.
        span: Where time starts and ends.

    References:
        Conditioning diffusions using Malliavin calculus (Pidstrigach et al., 2025)

    Example:
        >>> DoubleWell(v=1.0).drift(torch.tensor([[2.0]]), torch.tensor(0.0))
        tensor([[-24.]])
    """

    v: Value
    dim: int
    span: tuple[float, float]

    def __init__(
        self, v: float | Tensor = 5.0, dim: int = 1, span: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        keep(self, v=parameter("v", v, above=0.0), dim=count("dim", dim), span=span)

    @property
    def start(self) -> Tensor:
        """The well at +1."""
        return torch.ones(self.dim, dtype=torch.float64)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return x * (x * x - 1) * like(-4 * self.v, x)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Scale(x.new_ones(()))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def flow(self, x: State, t: Time, s: Time) -> State:
        """x² follows the logistic equation at the rate 8v."""
        left = torch.exp(-8 * self.v * beside(as_time(s) - as_time(t), x)).to(x)
        return x / (x * x + (1 - x * x) * left).sqrt()

    def kick(self, x: State, t: Time, dw: Tensor) -> State:  # noqa: D102
        return x + dw

    def log_stationary(self, x: State) -> Tensor:
        r"""The logarithm of the stationary density, (B,), normalised.

        .. math:: \int e^{-a (x^2 - 1)^2} dx
                  = \tfrac{\pi}{2} e^{-a/2} [I_{-1/4}(a/2) + I_{1/4}(a/2)], \qquad a = 2v
        """
        y = x.double().flatten(1)
        a = filled(2 * self.v, y)
        z = a / 2
        bessel = torch.stack(
            [log_bessel(nu, z**2 / 4) + nu * (z / 2).log() for nu in (-0.25, 0.25)]
        )
        constant = math.log(math.pi / 2) - z + bessel.logsumexp(0)
        return (-a * (y**2 - 1) ** 2 - constant).sum(1).to(x.dtype)


@frozen
class Langevin(SDE):
    r"""Overdamped motion in any energy: :math:`dX = -\nabla U(X) \, dt + \sqrt{2T} \, dW`.

    Reversible, with stationary density proportional to exp(-U / T). The drift is taken by autograd
    and works without gradients, in inference mode, and under another derivative.

    Arguments:
        energy: U, from states (B, *shape) to (B,).
        temperature: T > 0.
        dim: The number of coordinates, which only `start` asks for.
        span: Where time starts and ends.

    References:
        Exponential convergence of Langevin distributions and their discrete approximations
            (Roberts and Tweedie, 1996), doi 10.2307/3318418

    Example:
        >>> well = Langevin(lambda x: (x**2).sum(1) / 2)
        >>> well.drift(torch.ones(1, 2), torch.tensor(0.0))
        tensor([[-1., -1.]])
    """

    energy: Energy
    temperature: Value
    dim: int | None
    span: tuple[float, float]

    def __init__(
        self,
        energy: Energy,
        temperature: float | Tensor = 1.0,
        dim: int | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        T = parameter("temperature", temperature, above=0.0)
        d = None if dim is None else count("dim", dim)
        keep(self, energy=_callable(energy), temperature=T, dim=d, span=span)

    @property
    def start(self) -> Tensor:
        """The origin."""
        return _origin("Langevin", self.dim)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return -gradient(self.energy, x)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Scale(filled((2 * self.temperature) ** 0.5, x))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def log_stationary(self, x: State) -> Tensor:
        """-U / T, (B,): the logarithm of the stationary density but for a constant."""
        return -self.energy(x) / like(self.temperature, x)


@frozen
class Underdamped(SDE):
    r"""Motion with inertia in any energy: positions q and momenta p in one state (B, 2d).

    .. math:: dq = p / m \, dt, \qquad
              dp = -(\nabla U(q) + \gamma p) \, dt + \sqrt{2 \gamma m T} \, dW

    Stationary density proportional to exp(-(U(q) + p² / 2m) / T); reversible once p changes sign.
    Noise enters p alone, so G has no inverse: its rows for q are zero.

    Arguments:
        energy: U, from positions (B, d) to (B,).
        friction: gamma > 0, per unit of time.
        temperature: T > 0.
        mass: m > 0.
        dim: The number d of positions, which only `start` asks for.
        span: Where time starts and ends.

    References:
        Stochastic processes and applications (Pavliotis, 2014), chapter 6

    Example:
        >>> Underdamped(lambda q: (q**2).sum(1) / 2).drift(torch.ones(1, 2), torch.tensor(0.0))
        tensor([[ 1., -2.]])
    """

    energy: Energy
    friction: Value
    temperature: Value
    mass: Value
    dim: int | None
    span: tuple[float, float]

    def __init__(
        self,
        energy: Energy,
        friction: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
        mass: float | Tensor = 1.0,
        dim: int | None = None,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        g = parameter("friction", friction, above=0.0)
        T = parameter("temperature", temperature, above=0.0)
        m = parameter("mass", mass, above=0.0)
        d = None if dim is None else count("dim", dim)
        keep(self, energy=_callable(energy), friction=g, temperature=T, mass=m, dim=d, span=span)

    @property
    def start(self) -> Tensor:
        """The origin, at rest."""
        return _origin("Underdamped", self.dim).repeat(2)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        q, p = x.chunk(2, 1)
        force = -gradient(self.energy, q) - like(self.friction, x) * p
        return torch.cat([p / like(self.mass, x), force], 1)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        g = filled((2 * self.friction * self.mass * self.temperature) ** 0.5, x)
        half = x.shape[1] // 2
        return Diagonal(torch.cat([x.new_zeros(half), g.expand(half)]))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)

    def log_stationary(self, x: State) -> Tensor:
        """-(U(q) + p² / 2m) / T, (B,): the logarithm of the density but for a constant."""
        q, p = x.chunk(2, 1)
        kinetic = (p * p).sum(1) / like(2 * self.mass, x)
        return -(self.energy(q) + kinetic) / like(self.temperature, x)


@frozen
class Lorenz(SDE):
    r"""Lorenz's convection, the first chaos, with noise of the same size in all directions.

    .. math:: dx = s (y - x) \, dt + a \, dW_1, \quad dy = (x (r - z) - y) \, dt + a \, dW_2, \quad
              dz = (x y - b z) \, dt + a \, dW_3

    No law is known in closed form; volumes shrink at the rate s + 1 + b.

    Arguments:
        sigma: s, Prandtl's number.
        rho: r, Rayleigh's number over the critical one; chaos at 28.
        beta: b, the shape of the rolls.
        noise: a >= 0.
        span: Where time starts and ends.

    References:
        Deterministic nonperiodic flow (Lorenz, 1963)

    Example:
        >>> Lorenz().drift(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor(0.0))
        tensor([[10., 23., -6.]])
    """

    sigma: Value
    rho: Value
    beta: Value
    noise: Value
    span: tuple[float, float]

    def __init__(
        self,
        sigma: float | Tensor = 10.0,
        rho: float | Tensor = 28.0,
        beta: float | Tensor = 8 / 3,
        noise: float | Tensor = 1.0,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        keep(self, sigma=parameter("sigma", sigma), rho=parameter("rho", rho), span=span)
        keep(self, beta=parameter("beta", beta), noise=parameter("noise", noise, least=0.0))

    @property
    def start(self) -> Tensor:
        """A point near the attractor."""
        return torch.ones(3, dtype=torch.float64)

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        s, r, b = (like(c, x) for c in (self.sigma, self.rho, self.beta))
        u, v, w = x[:, :1], x[:, 1:2], x[:, 2:]
        return torch.cat([s * (v - u), u * (r - w) - v, u * v - b * w], 1)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return Scale(filled(self.noise, x))

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return torch.zeros_like(x)
