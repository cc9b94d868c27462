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

from kakusan.core.noise import Fresh
from kakusan.core.operators import NotElliptic, Operator
from kakusan.core.types import State, per_sample
from kakusan.errors import KakusanError
from kakusan.solvers.gaussian import GaussianSteps
from kakusan.solvers.solve import Path

Ahead: TypeAlias = Callable[[int], State]

PATHS = 2048  # how many paths choose a window
LOOKS = 8  # at how many times
PLACES = 16  # from how many places new paths start, where the others spread most
ROUNDS = 3  # how often


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
        x, dw = _ordinary(path.x[k]).requires_grad_(), _ordinary(path.dw[k])
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


def _ordinary(x: Tensor) -> Tensor:
    """A leaf that derivatives may hold on to: what was made in inference mode is copied."""
    return x.clone() if x.is_inference() else x.detach()


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
            return Window(_measured(steps, path, last))


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


# --- how long a window should be


def expansion(steps: GaussianSteps, x: State, k: int, most: int = 16) -> Tensor:
    r"""How fast neighbours of x part in step k: λ_max of the symmetric part of (∂m_k - 1) / h_k.

    The one-sided Lipschitz constant of the drift at the states x, (B,), in units of 1 / time;
    -inf where derivatives are not finite. Lanczos' method, a forward and a backward derivative
    for each of `most` directions: exact for states of no more numbers, else from below and close.

    Example:
        >>> from kakusan.processes.zoo.mechanics import DoubleWell
        >>> from kakusan.solvers.gaussian import EulerSteps
        >>> steps = EulerSteps(DoubleWell(v=5.0), torch.tensor([0.0, 0.01]))
        >>> expansion(steps, torch.tensor([[0.0], [1.0]], dtype=torch.float64), 0).round()
        tensor([ 20., -40.], dtype=torch.float64)
    """
    x, d, eps = _ordinary(x).contiguous(), x[0].numel(), torch.finfo(x.dtype).eps
    pull = torch.func.vjp(lambda y: steps.mean(y, k), x)[1]
    source = torch.Generator().manual_seed(0)
    q = torch.randn(len(x), d, generator=source, dtype=torch.float64).to(x)
    q, m = q / q.norm(dim=1, keepdim=True), min(d, most)
    basis, T = q.unsqueeze(0), x.new_zeros(len(x), m, m)
    for i in range(m):
        v = q.reshape(x.shape)
        push = torch.func.jvp(lambda y: steps.mean(y, k), (x,), (v,))[1]
        w = (((push + pull(v)[0]) / 2 - v) / steps.h(k)).flatten(1)
        # where there are no more directions q is zero, and 0 must not pass for an eigenvalue
        T[:, i, i] = (w * q).sum(1) + (1 - (q * q).sum(1)) * T[:, 0, 0]
        if i + 1 == m:
            break
        least = eps**0.5 * w.norm(dim=1)
        for _ in range(2):  # once is not enough, in floating point
            w = w - ((basis * w).sum(-1, keepdim=True) * basis).sum(0)
        beta = w.norm(dim=1)
        beta = torch.where(beta > least, beta, 0.0)
        T[:, i, i + 1] = T[:, i + 1, i] = beta
        q = torch.where(beta > 0, 1 / beta, 0.0)[:, None] * w
        basis = torch.cat([basis, q.unsqueeze(0)])
    size = T.abs().amax((1, 2))
    rates = torch.linalg.eigvalsh(T.nan_to_num(0.0, 0.0, 0.0))[:, -1]
    # what rounding may have made of a large contraction is no expansion
    return torch.where(size.isfinite(), rates - 4 * eps * size, -math.inf)


# a trial: paths on which weights are compared, and after how many steps each is looked at, (B,)
_Trial: TypeAlias = tuple[Path, Tensor]


def _measured(steps: GaussianSteps, path: Path, last: int) -> float:
    """The length with the least second moment."""
    assert path.dw is not None
    at = sorted({last * i // LOOKS for i in range(LOOKS)})
    path = Path(path.t[: last + 1], path.x[: last + 1, :PATHS], path.dw[:last, :PATHS])
    looks = torch.tensor(at, device=path.x.device)
    given = wild = path, looks.repeat(path.x.shape[1])[: path.x.shape[1]]
    rate = -math.inf
    # paths from where the given ones spread most come to places that these have missed
    for seed in range(ROUNDS):
        found, wild = _from_the_fastest(steps, wild, at, last, seed)
        rate = max(rate, found)
    turned = max(_turned(steps, path.x[k], path.dw[k], k) for k in at)
    rate = max(rate, 0.0) + turned
    if not rate > 0:
        return math.inf
    scale = min(1 / rate, abs(steps.grid[last] - steps.grid[0]).item())
    # noise parts the nearest much faster than most
    shares = (*((1 / 64, 1 / 16) if turned else ()), 0.25, 0.5, 1.0, 2.0, 4.0, math.inf)

    def size(tau: float) -> float:
        return sum(_size(Window(tau), steps, trial, at, last) for trial in (given, wild))

    return min((scale * c for c in shares), key=size)


def _from_the_fastest(
    steps: GaussianSteps, trial: _Trial, at: list[int], last: int, seed: int
) -> tuple[float, _Trial]:
    """The largest rate on the way, and as many paths again from the places with the largest."""
    x, B = trial[0].x, len(trial[1])
    rates = torch.cat([expansion(steps, x[k], k).masked_fill(trial[1] > k, -math.inf) for k in at])
    fastest = rates.max()
    if bool(((rates == fastest) | (rates == -math.inf)).all()):
        return fastest.item(), trial  # no place is faster than another
    top = rates.topk(min(PLACES, len(rates))).indices.repeat(max(2, B // PLACES))
    first = torch.tensor(at, device=x.device)[top // B]
    path = _walked(steps, x[first, top % B], first, last, Fresh(seed))
    return fastest.item(), (path, first)


def _turned(steps: GaussianSteps, x: State, dw: Tensor, k: int) -> float:
    """How fast noise that depends on the state parts neighbours: the mean of Σ_l |∂G_l v|² / 2.

    Over states and unit vectors v, in units of 1 / time: what noise adds to the growth of J.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, dw = _ordinary(x).requires_grad_(), _ordinary(dw)
        out = steps.operator(x, k).kick(torch.zeros_like(x), dw)
        if not out.requires_grad:
            return 0.0
        source = torch.Generator().manual_seed(0)
        v = torch.randn(x.shape, generator=source, dtype=torch.float64).to(x)
        back = torch.autograd.grad(out, x, v)[0].double().flatten(1).square().sum(1)
    return back.nanmean().item() / (2 * x[0].numel() * steps.h(k))


def _walked(steps: GaussianSteps, x: State, first: Tensor, last: int, noise: Fresh) -> Path:
    """Paths that stand still until their first step."""
    xs, dws = [x], []
    for k in range(last):
        dws.append(noise.normal(k, steps.noise_shape(x), x, steps.h(k) ** 0.5))
        x = torch.where(per_sample(first <= k, x) > 0, steps.after(x, k, dws[k]), x)
        xs.append(x)
    return Path(steps.grid[: last + 1], torch.stack(xs), torch.stack(dws))


def _size(
    weight: PathWeight, steps: GaussianSteps, trial: _Trial, at: list[int], last: int
) -> float:
    """(T - s) E|GᵀS|² over the worse half of the paths."""
    (path, first), x = trial, trial[0].x
    size = torch.zeros(len(first), dtype=torch.float64, device=x.device)
    for k, v in zip(at, weight(steps, path, at, last), strict=True):
        here, left = first == k, abs(steps.grid[last] - steps.grid[k]).item()
        c = steps.operator(x[k, here], k).tmv(v[here])
        size[here] = left * c.double().flatten(1).square().sum(1)
    # paths that blow up say nothing of weights; weights that blow up do
    size = size[x[-1].flatten(1).isfinite().all(1)]
    halves = [half.mean().item() for half in size.chunk(2)]
    return max(halves) if all(map(math.isfinite, halves)) else math.inf
