r"""Weights of paths: random vectors whose mean is the slope of log p(Y | X_s), whatever Y is.

To condition a process on what is seen at the end, one needs h(x, s; y) = p(Y = y | X_s = x), of
which only draws of Y are had. Take a chain of Gaussian steps X_{k+1} = m_k(X_k) + G_k(X_k) dw_k,
dw_k ~ N(0, h_k), with the Jacobians J_{k|s} = ∂X_k/∂X_s. Integration by parts in step k ≥ s says

.. math:: h_k \nabla_{X_s} \log p(Y \mid X_s) = E[J_{k+1|s}^\top G_k^{-\top} dw_k
              - h_k J_{k|s}^\top \nabla \log|\det G_k(X_k)| \mid X_s, Y] ,

and any mean over the steps, with rates a_k that know nothing of what comes after s, says so too:

.. math:: S_s = \frac{1}{W_s} \sum_{k \ge s} a_k [J_{k+1|s}^\top G_k^{-\top} dw_k
              - h_k J_{k|s}^\top \nabla \log|\det G_k|] , \quad W_s = \sum_{k \ge s} a_k h_k ,
          \qquad E[S_s \mid X_s, Y] = \nabla_{X_s} \log p(Y \mid X_s) .

This is exact for the chain, at any step size: nothing waits for h -> 0. So the regression of S on
(s, X_s, Y), over free paths, gives the slopes for all values y at once; Y is drawn and never
differentiated. For additive noise and h -> 0 it is the formula of Bismut, Elworthy and Li. Where G
depends on the state, J has to lead to the *end* of step k and the term of log|det G| has to be
there: to leave out either is wrong by O(1), however small the steps.

The kinds differ in variance alone: `Average` (a = 1), `First` and `Last` (one step), `Window`
(a_k = exp(-(t_k - t_s) / tau)), `Weighted` (any function of time), and `Bootstrapped`, a window
that leans on an estimate of the slope.

Where paths spread at the rate λ, J grows like exp(λ t), and weights that look far ahead have heavy
tails; each step that is looked at takes noise away. A window of 1/λ has both. One sweep from the
end makes all S_s, with the vector-Jacobian product of one step at a time:

.. math:: R_k &= [\partial (m_k + G_k dw_k)]^\top (\rho_k R_{k+1} + a_k G_k^{-\top} dw_k
                  + q_k \bar u_{k+1}) - a_k h_k \nabla \log|\det G_k| , \\
          W_k &= \rho_k W_{k+1} + a_k h_k + q_k , \qquad S_k = R_k / W_k .

References:
    Conditioning diffusions using Malliavin calculus (Pidstrigach et al., 2025), arXiv 2504.03461
    Formulae for the derivatives of heat semigroups (Elworthy and Li, 1994),
        doi 10.1006/jfan.1994.1124
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kakusan.core.calculus import leaf
from kakusan.core.operators import NotElliptic, Operator
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.objectives.windows import length
from kakusan.solvers.gaussian import GaussianSteps
from kakusan.solvers.solve import Path

Ahead: TypeAlias = Callable[[int], State]


class Mass(NamedTuple):
    """What step k adds to the sums."""

    decay: float  # rho_k, how much of what comes after is kept
    rate: float  # a_k, the weight of the noise of the step, for each unit of time
    trust: float = 0.0  # q_k, the weight of an estimate of the slope at the end of the step


class PathWeight(abc.ABC):
    """A random vector whose mean, given X_s and Y, is the slope of log p(Y | X_s)."""

    @abc.abstractmethod
    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:
        """What step k adds, where Y is seen after `last` steps."""

    def chosen(self, steps: GaussianSteps, path: Path, last: int | None = None) -> PathWeight:
        """This weight with its numbers settled; see `Window.chosen`."""
        return self

    def __call__(
        self, steps: GaussianSteps, path: Path, at: Sequence[int] | None = None,
        last: int | None = None, ahead: Ahead | None = None,
    ) -> Tensor:  # fmt: skip
        """S at path.x[at], with the shape (len(at), B, *shape) and no gradients.

        Arguments:
            steps: The chain; m and G are differentiated in the state.
            path: Its states (N + 1, B, *shape) and increments (N, B, *noise): every step, as
                `solve(sde, x, grid, keep=True)` keeps them.
            at: Which times of the path, from 0 to last - 1; all by default.
            last: After how many steps Y is seen; all by default. One path serves many ends.
            ahead: What `Bootstrapped` leans on: k -> an estimate of the slope at X_k, like X_k,
                asked for 0 < k < last.

        Raises:
            NotElliptic: If G has no inverse at a step that counts.
            KakusanError: If the path is not one of this chain, or no step counts.
        """
        at, last = _checked(steps, path, at, last)
        mass = [self.mass(steps, k, last) for k in range(last)]
        if ahead is None and any(m.trust for m in mass):
            raise KakusanError(
                f"{self} leans on an estimate of the slope: pass ahead, k -> that at path.x[k]"
            )
        S = path.x.new_empty((len(at), *path.x.shape[1:]))
        R, W = torch.zeros_like(path.x[last]), 0.0
        for k in reversed(range(min(at), last)):
            if k not in at and not mass[k - 1].decay:
                continue  # nobody will look at this R
            R = _back(steps, path, k, mass[k], R, ahead)
            W = mass[k].decay * W + mass[k].rate * steps.h(k) + mass[k].trust
            if k in at:
                if not W:
                    raise KakusanError(
                        f"{self} gives the steps {k} to {last - 1} no weight (W = 0), and says "
                        f"nothing of the slope at time {k}: ask for other times"
                    )
                S[[i for i, j in enumerate(at) if j == k]] = R / W
        return S


def _back(
    steps: GaussianSteps, path: Path, k: int, mass: Mass, R: Tensor, ahead: Ahead | None
) -> Tensor:
    """R at step k, from R after it."""
    assert path.dw is not None
    with torch.inference_mode(False), torch.enable_grad():
        x, dw = leaf(path.x[k]).requires_grad_(), leaf(path.dw[k])
        mean, G = steps.mean(x, k), steps.operator(x, k)
        z, v = None, mass.decay * R
        if mass.rate:
            z = _tsolve(G, dw)
            v = torch.add(v, z.detach(), alpha=mass.rate)
        if mass.trust and ahead is not None:
            v = torch.add(v, ahead(k + 1).detach(), alpha=mass.trust)
        if z is not None and not z.requires_grad:
            return torch.autograd.grad(mean, x, v)[0]  # additive noise: only the drift bends
        out, back = [G.kick(mean, dw)], [v]
        if mass.rate and (log_det := G.logabsdet(x)).requires_grad:
            out, back = [*out, log_det], [v, torch.full_like(log_det, -mass.rate * steps.h(k))]
        return torch.autograd.grad(out, x, back)[0]


def _tsolve(G: Operator, dw: Tensor) -> State:
    try:
        return G.tsolve(dw)
    except NotElliptic as error:
        raise NotElliptic(
            f"weights of paths need G^-1, and {error}; Covering() weights, by the Malliavin "
            "matrix, do without, where the noise of a few steps reaches every coordinate"
        ) from None


def _checked(
    steps: GaussianSteps, path: Path, at: Sequence[int] | None, last: int | None
) -> tuple[Sequence[int], int]:
    """The times asked for, and the end; refuses what is not a path of the chain."""
    n = len(path.t) - 1
    same = torch.equal(path.t.cpu().double(), steps.grid[: n + 1])
    if path.dw is None or len(path.x) != n + 1 or not same:
        raise KakusanError(
            f"this path has {len(path.x)} states and {0 if path.dw is None else len(path.dw)} "
            f"increments, from t={path.t[0].item():g} to t={path.t[-1].item():g}; weights need "
            f"every step of the chain of {len(steps)} from t={steps.grid[0].item():g} to "
            f"t={steps.grid[-1].item():g}: solve a process with noise, with keep=True"
        )
    last = n if last is None else last
    if not 1 <= last <= n:
        raise KakusanError(f"Y is seen after 1 to {n} steps of this path, not after {last}")
    at = range(last) if at is None else at
    if not len(at) or min(at) < 0 or max(at) >= last:
        raise KakusanError(f"weights stand at the times 0 to {last - 1}, not {list(at)[:8]}")
    with torch.no_grad():
        x = path.x[last]
        gap = (steps.after(path.x[last - 1], last - 1, path.dw[last - 1]) - x).abs().max().item()
    # a path that is not finite passes: it says so by itself
    if gap > 10 * torch.finfo(x.dtype).eps ** 0.5 * (1 + x.abs().max().item()):
        raise KakusanError(
            f"step {last} of the path is {gap:.3g} away from that of the chain with the same "
            "increment: weights are those of the chain that made the path"
        )
    return at, last


# --- the kinds


@dataclass(frozen=True)
class Average(PathWeight):
    """All steps alike, a_k = 1: the formula of Bismut, Elworthy and Li.

    Example:
        >>> from kakusan import Brownian, Fresh, grids, solve
        >>> from kakusan.solvers.gaussian import EulerSteps
        >>> x, grid = torch.zeros(3, 1, dtype=torch.float64), grids.uniform(0.0, 1.0, 4)
        >>> path = solve(Brownian(), x, grid, noise=Fresh(0), keep=True)
        >>> S = Average()(EulerSteps(Brownian(), grid), path)
        >>> torch.allclose(S[2], (path.end - path.x[2]) / 0.5)  # ∇log N(y; x, T - s)
        True
    """

    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:  # noqa: D102
        return Mass(1.0, 1.0)


@dataclass(frozen=True)
class First(PathWeight):
    """The first step alone, rho = 0: its Gaussian score, whatever comes after.

    Times that are not asked for cost nothing; the variance is of order 1 / h.
    """

    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:  # noqa: D102
        return Mass(0.0, 1.0)


@dataclass(frozen=True)
class Last(PathWeight):
    """The last step before Y is seen alone."""

    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:  # noqa: D102
        return Mass(1.0, float(k == last - 1))


@dataclass(frozen=True)
class Window(PathWeight):
    r"""The steps ahead, forgotten at the rate 1 / tau: rho_k = exp(-h_k / tau).

    Arguments:
        tau: The length of the window, > 0, in units of time; infinity is `Average`. Without a
            number, `chosen` finds one.

    Example:
        >>> from kakusan import Fresh, grids, solve
        >>> from kakusan.processes.zoo.mechanics import DoubleWell
        >>> from kakusan.solvers.gaussian import EulerSteps
        >>> sde, grid = DoubleWell(v=5.0), grids.uniform(0.0, 1.0, 100)
        >>> path = solve(sde, torch.ones(512, 1), grid, noise=Fresh(0), keep=True)
        >>> tau = Window().chosen(EulerSteps(sde, grid), path).tau
        >>> 0.02 < tau < 0.2  # paths leave the barrier at the rate 4 v = 20
        True
    """

    tau: float | None = None

    def __post_init__(self) -> None:
        if self.tau is not None and not self.tau > 0:
            raise KakusanError(
                f"tau, the length of a window, is a time above 0, not {self.tau}; or First()"
            )

    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:  # noqa: D102
        if self.tau is None:
            raise KakusanError(
                "Window() has no length yet: choose one by Window().chosen(steps, path), or give "
                "one, as Window(tau=0.1)"
            )
        return Mass(math.exp(-steps.h(k) / self.tau), 1.0)

    def chosen(self, steps: GaussianSteps, path: Path, last: int | None = None) -> Window:
        """This window, with a length that was measured where it has none.

        With λ the largest `expansion` on the way, and what noise that depends on the state adds to
        it, the lengths 1/4, 1/2, 1, 2, 4 and infinitely many times 1/λ are compared; where nothing
        spreads, λ ≤ 0, it is infinite; two more, down to 1/64, where such noise is. All weights
        have the same mean, so the least second moment (T - s) E|GᵀS|² is the least variance. It
        is taken over the given paths (the first `PATHS`) and over as many that start where paths
        spread most: rare events depend on such places, and free paths hardly see them. Nothing is
        clipped, for tails are the point; of two halves of the paths the worse counts, as a tail
        may spare one of them.

        Raises:
            NotElliptic: If G has no inverse.
            KakusanError: If the paths are not of this chain.
        """
        if self.tau is not None:
            return self
        _, last = _checked(steps, path, None, last)
        First()(steps, path, [0], last)  # refuses a G without inverse, before the work
        with torch.no_grad():
            return Window(length(Window, steps, path, last))


@dataclass(frozen=True)
class Weighted(PathWeight):
    r"""Any function of time: a_k = α'(t_k).

    Arguments:
        alpha_dot: The function (t, end) -> α'; both times are those of the clock, and a constant
            factor does not matter. It must not be zero from some time to the end.

    Example:
        >>> optimal = Weighted(lambda t, end: abs(end - t) ** ((5**0.5 - 1) / 2))
    """

    alpha_dot: Callable[[float, float], float]

    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:  # noqa: D102
        t, end = steps.grid[k].item(), steps.grid[last].item()
        rate = float(self.alpha_dot(t, end))
        if not math.isfinite(rate):
            raise KakusanError(f"alpha_dot(t={t:g}, end={end:g}) is {rate}, not a finite number")
        return Mass(1.0, rate)


@dataclass(frozen=True)
class Bootstrapped(PathWeight):
    """A window that leans on an estimate ū of the slope, as of an averaged network.

    The slope at s is the mean of Jᵀ times the slope later on, so ū(X_{k+1}) may stand for the
    noise that comes after: less variance, for a share in the error of ū. The last step has no ū,
    for what is seen need have no slope.

    Arguments:
        window: How the noise of steps is weighed.
        trust: The weight of ū, against 1 for noise, for each unit of time: q_k = trust h_k.
    """

    window: PathWeight
    trust: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.trust < math.inf:
            raise KakusanError(f"trust is a number of at least 0, got {self.trust}")

    def mass(self, steps: GaussianSteps, k: int, last: int) -> Mass:  # noqa: D102
        trust = self.trust * steps.h(k) if k + 1 < last else 0.0
        return self.window.mass(steps, k, last)._replace(trust=trust)

    def chosen(self, steps: GaussianSteps, path: Path, last: int | None = None) -> Bootstrapped:
        """The same with a window whose length was measured."""
        return Bootstrapped(self.window.chosen(steps, path, last), self.trust)
