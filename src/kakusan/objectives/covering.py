r"""Weights for conditioning where noise does not enter every coordinate.

Along the Euler-Maruyama chain X_{k+1} = X_k + h f + G(X_k) dB_k a weight S_s is a random variable
with

.. math:: E[S_s \mid X_s = x, Y] = \nabla_x \log p(Y \mid X_s = x)

*exactly*, for any h and for whatever is seen of the path at its end T: its regression on (X_s, Y)
is what steers a path to Y. Weights from single increments take G⁻¹. Kinetic motion has none: noise
enters momenta, and reaches positions a step later. So look at several steps at once.

From X_s = x the steps s, ..., m - 1 lead to X_m = F(x, Z), with Z their standard normal numbers.
With J = ∂F/∂x, 𝒥 = ∂F/∂Z, Γ = 𝒥𝒥ᵀ (Malliavin's matrix) and V = 𝒥ᵀΓ⁻¹, the fields U = VJ *cover*
the directions of x: moving Z along U_i moves X_m as moving x_i does, since 𝒥U = J. Integration by
parts on Gaussian space then gives

.. math:: S_i = U_i^\top Z - \nabla_Z \cdot U_i, \qquad
          S = J^\top (V^\top Z - \nabla \cdot V) - \textstyle\sum_{lz} V_{zl} \,
              \partial J_{l \cdot} / \partial Z_z .

It needs Γ to be regular, not G. With H^l the second derivatives of F_l, only the matrices
K^l = 𝒥 H^l_{zz} 𝒥ᵀ and M^l = H^l_{xz} 𝒥ᵀ count, and the traces λ_l = tr H^l_{zz}:

.. math:: S = J^\top \Gamma^{-1} [\mathcal{J} Z - \lambda + \Gamma^{-1} : K + \kappa]
              - \textstyle\sum_l M^l (\Gamma^{-1})_l, \qquad
          \kappa_l = \textstyle\sum_{ij} \Gamma^{-1}_{ij} K^i_{jl} .

F_s = F_{s+1} ∘ Φ_s, with Φ_s one step: J, 𝒥Z, Γ, λ, K, M and H_xx each follow from those one step
later and the first two derivatives of that step, so that one sweep backwards gives the weights at
all times before m.

A linear process (affine drift, G free of the state) has no second derivatives. Then S is a
function of X_s and X_m alone, without any other noise, the score JᵀΓ⁻¹(X_m - E X_m) of its
Gaussian kernel: conditioning on X_T by `Matched` is denoising score matching.

References:
    Conditioning diffusions using Malliavin calculus (Pidstrigach et al., 2025), arXiv 2504.03461
    Malliavin calculus for score-based diffusion models (Mirafzali et al., 2025), arXiv 2503.16917
    Applications of Malliavin calculus to Monte Carlo methods in finance (Fournié et al., 1999)
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.operators import NotElliptic
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.objectives.local import _inverse
from kakusan.objectives.steps import (
    ROWS,
    Slopes,
    Step,
    along_noise,
    along_state,
    slopes_of,
    times,
)
from kakusan.processes.sde import SDE
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from kakusan.solvers.solve import Path

MOST = 64  # steps that noise may take to reach every coordinate
PILOT = 512  # paths that choose a window


class _Weights(abc.ABC):
    """What `Covering` and `Matched` share: the door, and where the last weight stands."""

    def __call__(
        self,
        steps: GaussianSteps,
        path: Path,
        at: Sequence[int] | None = None,
        last: int | None = None,
    ) -> Tensor:
        """The weights S at path.x[at], with the shape (len(at), B, *shape) and no gradients.

        Arguments:
            steps: The steps of Euler-Maruyama that made the path.
            path: What `solve(steps.sde, x, steps.grid, keep=True)` returns: every step.
            at: Which times of the path, from 0 to `latest`; all of these by default.
            last: The number of the time at which Y is seen, or the first of several; the end of
                the path by default. Steps after it do not count.

        Raises:
            NotElliptic: If noise does not reach every coordinate from there, or there is none.
            KakusanError: If the path is not one of these steps, or has no such times.
        """
        last = _last(path, last)
        if not isinstance(steps, EulerSteps):
            raise KakusanError(
                f"{self} differentiates the drift and G of an SDE twice, and "
                f"{type(steps).__name__} has none: give EulerSteps(sde, grid)"
            )
        if path.dw is None or len(path.x) != len(path.t):
            raise NotElliptic(
                "this path holds no increments, and a weight is made of them: solve a process "
                "with noise, with keep=True"
            )
        _check_steps(steps, path, path.dw, last)
        at = range(self.latest(steps, path, last) + 1) if at is None else at
        if not len(at) or min(at) < 0 or max(at) >= last:
            raise KakusanError(
                f"weights stand at the times 0 to {last - 1} of this path, before Y is seen at "
                f"{last}; not at {list(at)[:8]}"
            )
        with torch.no_grad():
            found = self.along(steps.sde, path, path.dw, set(at), last)
        return torch.stack([found[s].reshape(path.x.shape[1:]) for s in at])

    @abc.abstractmethod
    def along(
        self, sde: SDE, path: Path, dw: Tensor, at: set[int], last: int
    ) -> dict[int, Tensor]:
        """The weights at each time, (B, d), for arguments that have been checked."""

    def chosen(self, steps: GaussianSteps, path: Path, last: int | None = None) -> _Weights:
        """The weights with what is left open chosen by a path: here nothing is."""
        return self

    def latest(self, steps: GaussianSteps, path: Path, last: int | None = None) -> int:
        """The number of the last time with a weight: from there noise reaches every coordinate.

        Raises:
            NotElliptic: If there is none: at none of the `MOST` times before the last one, or
                none that is no further from it than a window is long.
        """
        last, refusal = _last(path, last), None
        for s in range(last - 1, max(last - self._most, 0) - 1, -1):
            try:
                self(steps, path, [s], last)
            except NotElliptic as error:
                refusal = error
            else:
                return s
        raise refusal or KakusanError("this path has no steps")

    @property
    def _most(self) -> int:
        return MOST


class Covering(_Weights):
    r"""UᵀZ - ∇·U over the next steps; drift and diffusion must have two derivatives.

    All times of a path cost one sweep: for states of d numbers and m noises d(d + 1)/2 + dm second
    derivatives a step.

    Arguments:
        window: Look ahead at least so many steps and fewer than twice as many (all there are where
            fewer are left); None for all. Short windows have a large variance, of order 1 over
            their length (its third power in coordinates that noise reaches later); long ones have
            tails where paths spread, so heavy that a sample may not show them. `chosen` measures.

    Example:
        >>> from kakusan.core.noise import Fresh
        >>> from kakusan.processes.zoo.mechanics import Underdamped
        >>> from kakusan.solvers.solve import solve
        >>> kinetic = Underdamped(lambda q: ((q**2 - 1) ** 2).sum(1))
        >>> steps = EulerSteps(kinetic, torch.linspace(0, 1, 21, dtype=torch.float64))
        >>> x = torch.zeros(5, 2, dtype=torch.float64)
        >>> path = solve(steps.sde, x, steps.grid, noise=Fresh(0), keep=True)
        >>> Covering(window=5)(steps, path, [0, 10]).shape
        torch.Size([2, 5, 2])
        >>> Covering().latest(steps, path)  # the last step moves momenta alone
        18
    """

    def __init__(self, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise KakusanError(f"window must be at least 1, or None; got {window}")
        self.window = window

    def end(self, s: int, last: int) -> int:
        """The time at which the window of time s ends."""
        if self.window is None:
            return last
        return last - max(0, ((last - s) // self.window - 1) * self.window)

    @property
    def _most(self) -> int:
        # a longer wait would be longer than the windows of earlier times
        return MOST if self.window is None else self.window

    def along(  # noqa: D102
        self, sde: SDE, path: Path, dw: Tensor, at: set[int], last: int
    ) -> dict[int, Tensor]:
        d, m, n = path.x[0, 0].numel(), dw[0, 0].numel(), path.x.shape[1]
        many = max(1, ROWS // (d * d * (d + m)))
        cuts = (slice(lo, lo + many) for lo in range(0, n, many))
        parts = [
            self._swept(sde, path._replace(x=path.x[:, cut]), dw[:, cut], at, last) for cut in cuts
        ]
        return {s: torch.cat([part[s] for part in parts]) for s in at}

    def _swept(
        self, sde: SDE, path: Path, dw: Tensor, at: set[int], last: int
    ) -> dict[int, Tensor]:
        first, final, found = min(at), max(self.end(s, last) for s in at), {}
        live: list[tuple[int, Ahead]] = []
        ks = range(first, final)
        for s, slopes in zip(reversed(ks), _backwards(sde, path, dw, ks), strict=True):
            closing = last - s - 1  # how far from the last time the step s ends
            if s == final - 1 or self.window is not None and closing % self.window == 0:
                # two windows are open at a time: a young one, and one that is long enough
                live = [*live[-1:], (s + 1, Ahead.start(slopes.A))]
            z = dw[s].flatten(1) / abs(float(path.t[s + 1] - path.t[s])) ** 0.5
            live = [(end, ahead.before(slopes, z)) for end, ahead in live]
            if s in at:
                end, ahead = next(a for a in live if a[0] == self.end(s, last))
                found[s] = ahead.weight(_regular(ahead.gamma, s, end))
        return found

    def chosen(self, steps: GaussianSteps, path: Path, last: int | None = None) -> Covering:
        """Itself where it has a window, else a window whose weights are small on a path.

        The mean of a weight given (X_s, Y) is the same for all windows, so their second moments
        differ by their variances. Measured is Σ h (T - s) |Gᵀ S_s|², the square of the control
        beside its growth towards the end, for windows of 1, 2, 4, ... times the steps that noise
        needs, and at last all there are. The first that is better than its neighbours is taken,
        not the best: where paths spread, the moments of longer windows grow, and then a sample no
        longer shows them, as a few paths carry them that it does not hold.
        """
        if self.window is not None:
            return self
        last = _last(path, last)
        few = path._replace(
            x=path.x[:, :PILOT], dw=None if path.dw is None else path.dw[:, :PILOT]
        )
        shortest, best, least = last - self.latest(steps, few, last), self, math.inf
        # windows of more than half of the steps are all of them
        doublings = (last // (2 * shortest)).bit_length()
        for choice in [*(Covering(shortest << j) for j in range(doublings)), self]:
            size = choice._size(steps, few, last)
            if size > least:
                break
            best, least = choice, size
        return best

    def _size(self, steps: GaussianSteps, path: Path, last: int) -> float:
        """The second moment of the controls and two standard errors; inf if there is none."""
        try:
            S = self(steps, path, None, last)
        except KakusanError:  # a long window whose derivatives overflow
            return math.inf
        total = path.x.new_zeros(path.x.shape[1], dtype=torch.float64)
        for s, weight in enumerate(S):
            control = steps.operator(path.x[s], s).tmv(weight).flatten(1).double()
            left = abs(path.t[last] - path.t[s]).item()
            total += steps.h(s) * left * control.square().sum(1)
        size = total.mean() + 2 * total.std(correction=0) / len(total) ** 0.5
        return size.item() if size.isfinite() else math.inf

    def __repr__(self) -> str:
        return f"Covering(window={self.window})"


class Matched(_Weights):
    r"""JᵀΓ⁻¹𝒥Z over all steps that are left, for a linear process: no noise given X_T.

    J, 𝒥 and Γ are the same for all paths, so that a step costs d + m evaluations of the process
    for a single state and one product of a matrix with the states.

    Example:
        >>> from kakusan.core.noise import Fresh
        >>> from kakusan.processes.zoo.gaussian import Brownian
        >>> from kakusan.solvers.solve import solve
        >>> steps = EulerSteps(Brownian(2.0), torch.linspace(0, 1, 11, dtype=torch.float64))
        >>> x = torch.zeros(5, 1, dtype=torch.float64)
        >>> path = solve(steps.sde, x, steps.grid, noise=Fresh(0), keep=True)
        >>> pull = (path.end - path.x[5]) / (2.0**2 * 0.5)  # (X_T - X_s) / σ²(T - s)
        >>> torch.allclose(Matched()(steps, path, [5])[0], pull)
        True
    """

    def along(  # noqa: D102
        self, sde: SDE, path: Path, dw: Tensor, at: set[int], last: int
    ) -> dict[int, Tensor]:
        x, found = path.x.flatten(2), {}
        J, JZ = torch.eye(x.shape[2]).to(x), torch.zeros_like(x[0])
        gamma = torch.zeros_like(J)
        for s in reversed(range(min(at), last)):
            z = dw[s].flatten(1) / abs(float(path.t[s + 1] - path.t[s])) ** 0.5
            A, B = _affine(sde, path, dw, s, z)
            JB = J @ B
            J, JZ, gamma = J @ A, JZ + z @ JB.mT, gamma + JB @ JB.mT
            if s in at:
                found[s] = JZ @ _regular(gamma.unsqueeze(0), s, last)[0] @ J
        return found

    def __repr__(self) -> str:
        return "Matched()"


class Ahead(NamedTuple):
    """What is known of X_m = F(x, Z) as a function of the state at time s and the noise since.

    Attributes:
        J: ∂F/∂x, (B, d, d).
        JZ: 𝒥Z, (B, d).
        gamma: Γ = 𝒥𝒥ᵀ, (B, d, d).
        trace: λ_l = tr H^l_zz, (B, d).
        xx: H^l_xx, (B, d, d, d), the result l first.
        M: M^l = H^l_xz 𝒥ᵀ, (B, d, d, d).
        K: K^l = 𝒥 H^l_zz 𝒥ᵀ, (B, d, d, d).
    """

    J: Tensor
    JZ: Tensor
    gamma: Tensor
    trace: Tensor
    xx: Tensor
    M: Tensor
    K: Tensor

    @staticmethod
    def start(like: Tensor) -> Ahead:
        """At time m itself: F(x) = x."""
        n, d = like.shape[:2]
        eye = torch.eye(d).to(like).expand(n, d, d)
        return Ahead(eye, *(like.new_zeros((n, *[d] * r)) for r in (1, 2, 1, 3, 3, 3)))

    def before(self, step: Slopes, z: Tensor) -> Ahead:
        """One step earlier, by the chain rule for F(Φ(x, z), Z)."""
        A, B, xx, xz = step
        D, JB, At = B @ B.mT, self.J @ B, A.mT.unsqueeze(1)
        C = (JB @ B.mT).unsqueeze(1)
        bent, mixed = self.xx @ C.mT, C @ self.M
        curved = [(self.J @ v.flatten(2)).view_as(v) for v in (xx, xz)]
        return Ahead(
            self.J @ A,
            self.JZ + times(JB, z),
            self.gamma + JB @ JB.mT,
            self.trace + times(self.xx.flatten(2), D.flatten(1)),
            At @ self.xx @ At.mT + curved[0],
            At @ (self.M + bent) + curved[1] @ JB.mT.unsqueeze(1),
            self.K + C @ bent + mixed + mixed.mT,
        )

    def weight(self, inverse: Tensor) -> Tensor:
        """UᵀZ - ∇·U, (B, d), given Γ⁻¹."""
        flat = inverse.flatten(1)
        seen, kappa = times(self.K.flatten(2), flat), times(self.K.flatten(1, 2).mT, flat)
        v = times(inverse, self.JZ - self.trace + seen + kappa)
        return times(self.J.mT, v) - times(self.M.transpose(1, 2).flatten(2), flat)


def _backwards(sde: SDE, path: Path, dw: Tensor, ks: range) -> Iterator[Slopes]:
    """The derivatives of each step, the last first; of few steps at a time, to bound memory."""
    n, d, m = path.x.shape[1], path.x[0, 0].numel(), dw[0, 0].numel()
    many = max(1, ROWS // (n * d * d * (d + m)))
    for hi in range(ks.stop, ks.start, -many):
        yield from reversed(list(slopes_of(sde, path, dw, range(max(ks.start, hi - many), hi))))


def _affine(sde: SDE, path: Path, dw: Tensor, s: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """A (d, d) and B (d, m) of the step A x + B z + c; refuses one that is not of this form."""
    origin = path._replace(x=torch.zeros_like(path.x[:, :1]))
    step = Step.of(sde, origin, torch.zeros_like(dw[:, :1]), [s])
    A, B, c = along_state(step)[0], along_noise(step)[0], step.map(*step.rows(1))
    x, after = path.x[s].flatten(1), path.x[s + 1].flatten(1)
    gap = (x @ A.mT + z @ B.mT + c - after).abs().max()
    scale = (x.abs() @ A.abs().mT + z.abs() @ B.abs().mT + c.abs()).max()
    if not gap <= 4 * sum(B.shape) * torch.finfo(x.dtype).eps * scale:
        raise KakusanError(
            f"Matched needs a drift that is affine in the state and a G that is free of it, and "
            f"step {s + 1} of this path is {gap.item():.3g} away from such a step: Covering() "
            "takes any process"
        )
    return A, B


def _regular(gamma: Tensor, s: int, end: int) -> Tensor:
    """Γ⁻¹ of the steps from s to `end`."""
    many = end - s
    try:
        return _inverse(gamma, many)
    except NotElliptic:
        raise NotElliptic(
            f"there is no weight at time {s}: the noise of the {many} step{'s' * (many != 1)} "
            f"from there to time {end} does not reach every coordinate; latest(steps, path) is "
            "the last time with a weight, and a window must be as long as its way to the end"
        ) from None


# --- the door


def _last(path: Path, last: int | None) -> int:
    most = len(path.t) - 1
    last = most if last is None else last
    if not 1 <= last <= most:
        raise KakusanError(
            f"Y is seen at one of the times 1 to {most} of this path, not at {last}"
        )
    return last


def _check_steps(steps: GaussianSteps, path: Path, dw: Tensor, last: int) -> None:
    """Refuses paths of another process: a look at the first step and at the last."""
    if not torch.equal(path.t.cpu().double(), steps.grid):
        raise KakusanError(
            f"the path has {len(path.t)} times from t={path.t[0]:g} to t={path.t[-1]:g}, and the "
            f"steps {len(steps.grid)} from t={steps.grid[0]:g} to t={steps.grid[-1]:g}: record "
            "every step of one grid"
        )
    for k in {0, last - 1}:
        made: State = steps.after(path.x[k], k, dw[k])
        gap = (made - path.x[k + 1]).abs().max()
        near = 10 * torch.finfo(made.dtype).eps ** 0.5
        if not gap <= near * torch.maximum(made.abs().max(), path.x[k].abs().max()):
            raise KakusanError(
                f"step {k + 1} of the path is {gap.item():.3g} away from Euler-Maruyama's step "
                "with its increment: weights belong to the process that made the path, "
                "solve(steps.sde, x, steps.grid, keep=True)"
            )
