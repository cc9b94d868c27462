r"""Guidance that is learned: a tilt of a trained model, from nothing but the model's own paths.

The ancestral steps of a model with noise 1, the last of them left out, are a chain of Gaussian
steps X_{k+1} = m_k(X_k) + z_k dw_k, dw_k ~ N(0, h_k); the last one makes of X_K a sample of data,
X_0 = m_K(X_K), and Y is drawn from that. Nothing is asked of Y but to be drawn: it may be a class
that a program decides, a set, or a number that has to be met.

Of all controls, c_k = E[dw_k | X_k, Y] / h_k makes the chain of Gaussian steps that is nearest to
the chain given Y in relative entropy, *at any step size*: steps of a sampler are long, and the
slope of log p(Y | X_k) at their start is not what they want. By parts, with the path weights of
`objectives.malliavin`,

.. math:: c_k = E[z_k (\rho R_{k+1} + a_k z_k^{-1} dw_k) / W_k \mid X_k, Y] , \qquad
          R_k = [\partial m_k]^\top (\rho R_{k+1} + a_k z_k^{-1} dw_k) ,

W_k = rho W_{k+1} + a_k h_k: one vector-Jacobian product of the denoiser a step, none of Y
(`PathNoise`). For Gaussian data of one variance a_k h_k ∝ b_k / (J_0 ... J_k)², b_k = z_k² h_k and
J_k the slope of m_k, makes the weight a function of the two ends alone; a forgetting rho < 1 takes
the tails from other data.

DDPM's posterior says what a step does in the denoised state: if x̂_0 moves by δ, the mean of step k
moves by z_k h_k g_k δ, g_k = alpha_{k+1} z_k / sigma_{k+1}². So c = g_k δ, and what is learned is

.. math:: \delta_k = E[X_0 \mid X_k, Y] - \hat x_0(X_k) ,

in units of the spread r_k of x_0 given x_t. Were the model perfect and its steps short, δ could be
learned from X_0 - x̂_0(X_k) itself (`Denoised`); of a model's own chain that is biased, by as much
as chain and score disagree. It takes no product and, in many directions, has far less noise,
which may count for more. With some 2,000 paths both found the same on two moons; of a model of
8 x 8 digits, where `PathNoise` is noisy in all 64 directions, `Denoised` told ten classes apart by
2.0 nats of 2.3, and `PathNoise` could learn next to nothing.

A linear measurement moves x̂_0 by Kalman's formula with the covariance V_k that X_0 - x̂_0 has along
the paths, in the principal axes Q of the samples (`Axes`): exact for Gaussian data in short steps.
What is learned comes on top, along the first of these axes.

Either way the weights of `inference.conditioning.paths` make the result exact for the chain. A
measurement without noise is one through the noise r_K that the last step removes.

References:
    Conditioning diffusions using Malliavin calculus (Pidstrigach et al., 2025), arXiv 2504.03461
    Denoising diffusion probabilistic models (Ho et al., 2020), equation 7
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Noise
from kakusan.core.types import Field, State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.inference.guidance.axes import Axes, Lens
from kakusan.inference.guidance.common import Prior
from kakusan.models.bridgenet import BridgeNet
from kakusan.processes.observations import Linear, Observation
from kakusan.solvers.gaussian import AncestralSteps


class ReverseChain:
    """The ancestral steps of a model, from noise to the step before the last.

    Arguments:
        prior: The model.
        grid: Falling times; the last may be 0.
        shape: The shape of one state.
        like: A tensor with the dtype and the device of states.

    Attributes:
        steps: The Gaussian steps, K = len(grid) - 2 of them.
        gain: g_k, what a shift of x̂_0 is in the control, (K,).
        spread: r_k, the standard deviation of x_0 given x_t, (K + 1,).
        levels: How far from the noise the states are, in [0, 1], (K + 1,).

    Example:
        >>> from kakusan.models.score import ExactMixture
        >>> from kakusan.processes.linear import VP, angle_grid
        >>> normal = ExactMixture(VP(), torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> chain = ReverseChain(Prior(VP(), normal), angle_grid(VP(), 1.0, 0.0, 10), (1,))
        >>> len(chain.steps), chain.shape
        (9, (1,))
    """

    def __init__(
        self, prior: Prior, grid: Tensor, shape: tuple[int, ...], like: Tensor | None = None
    ) -> None:
        if len(grid) < 3:
            raise KakusanError(
                f"a tilt is learned for 2 steps or more, the last of them without noise; got "
                f"{len(grid) - 1}"
            )
        self.prior, self.shape, process = prior, tuple(shape), prior.process
        self.like = torch.zeros(1, *shape) if like is None else like[:1]
        self.whole = AncestralSteps(process, prior.score, grid)
        self.steps = AncestralSteps(process, prior.score, grid[:-1])
        self.steps.velocity = _Remembered(self.steps.velocity)
        self.alpha, self.sigma = (c(self.whole.grid[:-1]) for c in (process.alpha, process.sigma))
        s = prior.data_std
        self.size = torch.hypot(self.alpha * s, self.sigma)
        self.spread = self.sigma * s / self.size
        self.z = torch.tensor([level.z for level in self.steps.plan], dtype=torch.float64)
        self.h = self.steps.grid.diff().abs()
        self.gain = self.alpha[1:] * self.z / self.sigma[1:] ** 2
        self.levels = 1 - torch.atan2(self.sigma, self.alpha) / (math.pi / 2)

    def __len__(self) -> int:
        """The number K of steps with noise."""
        return len(self.steps)

    @property
    def left(self) -> float:
        """r_K, the noise that the last step removes."""
        return self.spread[-1].item()

    def start(self, n: int, noise: Noise, like: Tensor) -> State:
        """States at the first time, (n, *shape)."""
        return noise.normal(0, (n, *self.shape), like, self.size[0].item())

    def denoised(self, x: State, k: int) -> State:
        """x̂_0 of states before step k."""
        v = self.steps.velocity(x, self.steps.points[k])
        r2 = self.alpha[k] ** 2 + self.sigma[k] ** 2
        return (self.alpha[k] / r2).item() * x - (self.sigma[k] / r2.sqrt()).item() * v

    def end(self, x: State) -> State:
        """X_0 of states before the last step."""
        return self.whole.turned(x, self.steps.velocity(x, self.whole.points[-2]), len(self))

    def index(self, t: Time) -> int:
        """The step that starts at a time."""
        return int((self.steps.grid - as_time(t).cpu()).abs().argmin())

    @property
    def weight(self) -> Tensor:
        """h_k g_k² r_k², (K,): twice the relative entropy of an error of 1 in the units of δ."""
        return self.h * (self.gain * self.spread[:-1]) ** 2


class _Remembered:
    """A velocity that is asked once for a state: by the tilt and by the step."""

    def __init__(self, velocity: Field) -> None:
        self.velocity = velocity
        self.last: tuple[State, float, State] | None = None

    def __call__(self, x: State, t: Time) -> State:
        if torch.is_grad_enabled():
            return self.velocity(x, t)
        if self.last is None or self.last[0] is not x or self.last[1] != float(t):
            self.last = x, float(t), self.velocity(x, t)
        return self.last[2]


class AtEnd(Observation):
    """What is seen of X_0, by the state before the last step.

    Arguments:
        observation: What is seen of X_0; of a `Linear` one without noise, through that which the
            last step removes.
        chain: The steps.
    """

    def __init__(self, observation: Observation, chain: ReverseChain) -> None:
        self.observation, self.chain = observation, chain
        self.singular = isinstance(observation, Linear) and not observation.std
        self.lens: Lens | None = None

    def draw(self, x: State, source: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return self.drawn(self.chain.end(x), source)

    def drawn(self, x0: State, source: torch.Generator | None = None) -> Tensor:
        """Y of ends of paths, (B, k)."""
        if self.singular:
            z = torch.randn(x0.shape, generator=source, dtype=x0.dtype, device=x0.device)
            x0 = x0 + self.chain.left * z
        return self.observation.draw(x0, source)

    def log_likelihood(self, y: Tensor, x: State) -> Tensor:  # noqa: D102
        x0 = self.chain.end(x)
        if not self.singular:
            return self.observation.log_likelihood(y, x0)
        if self.lens is None:
            assert isinstance(self.observation, Linear)
            self.lens = Lens(self.observation, self.chain.spread.tolist(), None, x0)
        return self.lens.log_likelihood(y, x0)

    def size(self, x: State) -> int:  # noqa: D102
        return self.observation.size(x)

    def told(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.observation.told(y)

    def value(self, y: object, x: State) -> Tensor:  # noqa: D102
        return self.observation.value(y, x)

    def __repr__(self) -> str:
        return repr(self.observation)


class ShiftTilt(Tilt):
    """C = g_k r_k (pull + trust_k net): the control of a chain, by what x̂_0 is shifted.

    Arguments:
        chain: The steps.
        observation: What is seen of their end.
        axes: Principal axes; without them x_0 strays from x̂_0 by r_k in all directions.
        net: What was learned; None leaves the pull alone.
        trust: What the network is multiplied by at each step, (K,).
    """

    def __init__(
        self, chain: ReverseChain, observation: AtEnd, axes: Axes | None = None,
        net: BridgeNet | None = None, trust: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.chain, self.observation, self.axes, self.net = chain, observation, axes, net
        self.trust = torch.ones(len(chain)) if trust is None else trust
        self.sde = chain.steps.sde
        self.lens: Lens | None = None

    def pull(self, x0: State, k: int, y: Tensor) -> State:
        """The shift by a linear measurement, in units of r_k; 0 of anything else."""
        seen = self.observation.observation
        if not isinstance(seen, Linear):
            return torch.zeros_like(x0)
        if self.lens is None:
            self.lens = Lens(seen, self.chain.spread.tolist(), self.axes, x0)
        return self.lens.shift(y, x0, k)

    def shift(self, x: State, k: int, y: Tensor) -> State:
        """δ / r_k, like x."""
        x0 = self.chain.denoised(x, k)
        pull, trust = self.pull(x0, k, y), self.trust[k].item()
        if self.net is None or self.axes is None or not trust:
            return pull
        axes, told, at = self.axes, self.observation.told(y), torch.tensor([k]).expand(len(x))
        along = pull.flatten(1) @ axes.Q.to(x0)
        out = corrected(self.net, self.chain, axes, axes.along(x0), along, told, at)
        return pull + trust * (out @ axes.Q.mT).to(pull).reshape(x.shape)

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        k = self.chain.index(t)
        return (self.chain.gain[k] * self.chain.spread[k]).item() * self.shift(x, k, y)

    def score(self, x: State, t: Time, y: Tensor) -> State:  # noqa: D102
        return self.sde.diffusion(x, t).tsolve(self.control(x, t, y))


def corrected(
    net: BridgeNet, chain: ReverseChain, axes: Axes, x0: Tensor, pull: Tensor, told: Tensor,
    k: Tensor,
) -> Tensor:  # fmt: skip
    """What a network adds to a pull, along the axes, (B, q): it sees x̂_0 and the pull along them.

    Its numbers are in units of the spread of X_0 - x̂_0 along each axis: what is learned stays
    where samples vary.
    """
    level, root = chain.levels[k.cpu()], axes.variance[k.to(axes.variance.device)].sqrt()
    return root * net(x0, pull.float() / root.clamp(min=1e-3), told.float(), level, 1 - level)


# --- what is regressed on


class Rehearsal(NamedTuple):
    """Paths of a model, without any condition, and what they say: of use to all observations.

    Attributes:
        x0: What states were denoised to before each step, (K, P, *shape).
        goal: A random number with the mean δ_k / r_k given X_k and Y, likewise.
        end: X_0, (P, *shape).
    """

    x0: Tensor
    goal: Tensor
    end: Tensor


class Goal(abc.ABC):
    """What the shift of x̂_0 is learned from."""

    @abc.abstractmethod
    def __call__(self, chain: ReverseChain, x: Tensor, x0: Tensor, dw: Tensor,
                 end: State) -> Tensor:  # fmt: skip
        """Goals at all steps of paths, (K, P, *shape), in units of r_k.

        Arguments:
            chain: The steps.
            x: The states before each step, (K, P, *shape).
            x0: What they were denoised to.
            dw: The increments.
            end: X_0, (P, *shape).
        """


@dataclass(frozen=True)
class PathNoise(Goal):
    """The path weights: exact for the chain, by one vector-Jacobian product a step.

    Attributes:
        keep: rho, how much of what comes later is kept at each step.
    """

    keep: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise KakusanError(f"keep is a share in [0, 1], got {self.keep}")

    def __call__(  # noqa: D102
        self, chain: ReverseChain, x: Tensor, x0: Tensor, dw: Tensor, end: State
    ) -> Tensor:
        goals, steps = torch.empty_like(x), chain.steps
        R, W = torch.zeros_like(end), 0.0
        slopes = _slopes(chain)
        for k in reversed(range(len(chain))):
            # in units of a_k, which would overflow: a_{k+1} / a_k = (b_{k+1} / b_k) / J²
            ratio = 0.0 if k + 1 == len(chain) else self.keep * _ratio(chain, slopes, k)
            z, h = chain.z[k].item(), chain.h[k].item()
            v, W = ratio * R + dw[k] / z, ratio * W + h
            goals[k] = (z / W / (chain.gain[k] * chain.spread[k]).item()) * v
            if k:
                with torch.inference_mode(False), torch.enable_grad():
                    leaf = x[k].detach().clone().requires_grad_()
                    R = torch.autograd.grad(steps.mean(leaf, k), leaf, v)[0]
        return goals


@dataclass(frozen=True)
class Denoised(Goal):
    """X_0 - x̂_0(X_k): without any product, and exact for a perfect model in short steps."""

    def __call__(  # noqa: D102
        self, chain: ReverseChain, x: Tensor, x0: Tensor, dw: Tensor, end: State
    ) -> Tensor:
        return torch.stack([(end - x0[k]) / chain.spread[k].item() for k in range(len(chain))])


def _slopes(chain: ReverseChain) -> Tensor:
    """The slopes J_k of the means for Gaussian data of the standard deviation of the model."""
    alpha, sigma, s = chain.alpha, chain.sigma, chain.prior.data_std
    step = chain.z**2 * chain.h / sigma[1:] ** 2  # the share of x_0 in a step
    denoised = alpha[:-1] * s**2 / chain.size[:-1] ** 2
    kept = alpha[:-1] * sigma[1:] ** 2 / (alpha[1:] * sigma[:-1] ** 2)
    return alpha[1:] * step * denoised + kept


def _ratio(chain: ReverseChain, slopes: Tensor, k: int) -> float:
    """a_{k+1} / a_k."""
    rate = chain.z[k + 1] ** 2 / chain.z[k] ** 2
    return (rate / slopes[k + 1] ** 2).item()


def rehearsed(chain: ReverseChain, goal: Goal, start: State, noise: Noise) -> Rehearsal:
    """Free paths of a chain, with what they say at each step.

    Arguments:
        chain: The steps.
        goal: What is to be regressed on.
        start: Where paths start, (P, *shape).
        noise: Where increments come from.
    """
    xs, x0s, dws, x, steps = [], [], [], start, chain.steps
    with torch.no_grad():
        for k in range(len(chain)):
            t, s = steps.grid[k].item(), steps.grid[k + 1].item()
            xs.append(x)
            x0s.append(chain.denoised(x, k))
            dws.append(noise.increment(k, t, s, tuple(x.shape), x))
            x = steps.after(x, k, dws[-1])
        end = chain.end(x)
    path, x0, dw = (torch.stack(column) for column in (xs, x0s, dws))
    return Rehearsal(x0, goal(chain, path, x0, dw, end), end)
