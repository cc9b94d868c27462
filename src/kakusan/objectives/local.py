r"""Targets whose regression gives the score of a process that has no kernel in closed form.

Along the Euler-Maruyama chain X_{k+1} = X_k + h f + G(X_k) dB_k each target S_k is a random
variable with

.. math:: E[S_k \mid X_k = x] = \nabla \log p_k(x)

*exactly*, whatever the step h: p_k is the density of the chain, not of the limit h -> 0. So the
function of (x, t) with the least squared error to the targets is the score.

`Local` looks at the last step alone, whose kernel is Gaussian: -G⁻ᵀ dB / |h| at X_{k-1}. It costs
one solve and has variance of order 1 / |h|.

`Skorokhod` looks at the last L steps. With X_k = F(Z), Z their standard normal numbers, J = ∂F/∂Z,
Γ = JJᵀ and U = JᵀΓ⁻¹, integration by parts on Gaussian space gives

.. math:: S = -(U^\top Z - \nabla_Z \cdot U) .

J looks into the future, so UᵀZ alone, the sum of an Itô integral, is *not* unbiased; the
divergence is what makes it so. The variance is about L times smaller than that of `Local`, and Γ
may be regular where G is not: noise that enters a momentum reaches the position a step later.

The divergence is exact. With H^l the second derivatives of F_l, only H^l as seen through J counts,
the d x d matrices K^l = J H^l Jᵀ, and the traces λ_l = tr H^l:

.. math:: U^\top Z - \nabla \cdot U
              = \Gamma^{-1} [J Z - \lambda + \Gamma^{-1} : K + \kappa] ,
          \qquad \kappa_l = \textstyle\sum_{ij} \Gamma^{-1}_{ij} K^i_{jl} .

JZ, Γ, λ and K each follow from step to step, from the first two derivatives of one step: one sweep
along the path gives the targets at all of its times.

References:
    Simulating diffusion bridges with score matching (Heng et al., 2021), arXiv 2111.07243
    Malliavin calculus for score-based diffusion models (Mirafzali et al., 2025), arXiv 2503.16917
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from kakusan.core.noise import generator
from kakusan.core.operators import NotElliptic
from kakusan.core.types import State, Time, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito
from kakusan.solvers.solve import Path

ROWS = 1 << 19  # numbers that are differentiated at once
FEW = 5  # paths that show what form of times a process takes


class Target(abc.ABC):
    """A random variable whose mean, given X_k, is the score of the chain at X_k."""

    def __call__(self, sde: SDE, path: Path, at: Sequence[int] | None = None) -> Tensor:
        """The targets at path.x[at], with the shape (len(at), B, *shape).

        Arguments:
            sde: The process, in the sense of Itô unless it is a `Stratonovich`.
            path: What `solve(sde, x, grid, keep=True)` returns: every step, by Euler-Maruyama.
            at: Which times of the path, from 1 to the number of steps; all by default.
        """
        last = len(path.t) - 1
        at = range(1, last + 1) if at is None else at
        if path.dw is None or len(path.x) != len(path.t):
            raise NotElliptic(
                "this path holds no increments, and a target is made of them: solve a process "
                "with noise, with keep=True"
            )
        if not at or min(at) < 1 or max(at) > last:
            raise KakusanError(f"targets stand at the times 1 to {last} of this path, not {at}")
        return self.along(ito(sde), path, path.dw, at)

    @abc.abstractmethod
    def along(self, sde: SDE, path: Path, dw: Tensor, at: Sequence[int]) -> Tensor:
        """The same, for arguments that have been checked and a process in the sense of Itô."""


class Local(Target):
    """-G⁻ᵀ dB / |h| of the step that led to X_k; G must have an inverse.

    Example:
        >>> from kakusan.core.noise import Fresh
        >>> from kakusan.core.operators import Scale
        >>> from kakusan.solvers.solve import solve
        >>> sde = SDE.of(lambda x, t: -x, Scale(2.0))
        >>> grid = torch.linspace(0, 1, 6)
        >>> path = solve(sde, torch.zeros(3, 2), grid, noise=Fresh(0), keep=True)
        >>> Local()(sde, path, [1, 5]).shape
        torch.Size([2, 3, 2])
    """

    def along(self, sde: SDE, path: Path, dw: Tensor, at: Sequence[int]) -> Tensor:  # noqa: D102
        return torch.stack([self._one(sde, path, dw, k - 1) for k in at])

    @staticmethod
    def _one(sde: SDE, path: Path, dw: Tensor, k: int) -> State:
        h = float(path.t[k + 1] - path.t[k])
        try:
            return -sde.diffusion(path.x[k], path.t[k]).tsolve(dw[k]) / abs(h)
        except NotElliptic as error:
            raise NotElliptic(
                f"local score matching needs G^-1, and {error}; Skorokhod(window=...) does "
                "without, where the noise of a few steps reaches every coordinate"
            ) from None

    def __repr__(self) -> str:
        return "Local()"


class Skorokhod(Target):
    """-(UᵀZ - ∇·U) over the last steps; drift and diffusion must have two derivatives.

    All times of a path cost one sweep: for states of d numbers and m noises, d(d + 1)/2 + dm
    second derivatives a step. With probes each time costs a sweep of its own, of d + 5 p first
    and second derivatives: for states of more than ten numbers or so.

    Arguments:
        window: Look back at least so many steps and fewer than twice as many (all there are where
            the path is younger); None for all. Long windows have less variance where the drift
            contracts or is nearly linear, and heavy tails where paths spread.
        probes: How many random directions estimate the divergence, without bias; None is exact.
        seed: Where the directions come from.

    Example:
        >>> from kakusan.core.noise import Fresh
        >>> from kakusan.core.operators import Scale
        >>> from kakusan.solvers.solve import solve
        >>> sde = SDE.of(lambda x, t: -x, Scale(1.0))
        >>> grid = torch.linspace(0, 1, 6, dtype=torch.float64)
        >>> path = solve(sde, torch.ones(3, 2), grid, noise=Fresh(0), keep=True)
        >>> mean, variance = 0.8**5, sum(0.2 * 0.64**k for k in range(5))
        >>> exact = (mean - path.end) / variance  # a linear process leaves the target no noise
        >>> torch.allclose(Skorokhod()(sde, path, [5])[0], exact, atol=1e-5)
        True
    """

    def __init__(
        self, window: int | None = None, probes: int | None = None, seed: int = 0
    ) -> None:
        for name, value in (("window", window), ("probes", probes)):
            if value is not None and value < 1:
                raise KakusanError(f"{name} must be at least 1, or None; got {value}")
        self.window, self.probes, self.seed = window, probes, seed

    def first(self, at: int) -> int:
        """The time at which the window of time `at` opens."""
        return 0 if self.window is None else max(0, (at // self.window - 1) * self.window)

    def along(self, sde: SDE, path: Path, dw: Tensor, at: Sequence[int]) -> Tensor:  # noqa: D102
        if self.probes is not None:
            found = {k: self._probed(sde, path, dw, k) for k in set(at)}
        else:
            found = self._swept(sde, path, dw, set(at))
        return torch.stack([found[k].reshape(path.x.shape[1:]) for k in at])

    def _swept(self, sde: SDE, path: Path, dw: Tensor, at: set[int]) -> dict[int, Tensor]:
        first, last, found = min(map(self.first, at)), max(at), {}
        live: list[tuple[int, Variation]] = []
        for k, slopes in enumerate(_slopes(sde, path, dw, range(first, last)), start=first):
            if k == first or self.window is not None and k % self.window == 0:
                # two windows are open at a time: a young one, and one that is long enough
                live = [*live[-1:], (k, Variation.start(slopes.A))]
            z = dw[k].flatten(1) / abs(float(path.t[k + 1] - path.t[k])) ** 0.5
            live = [(opened, variation.after(slopes, z)) for opened, variation in live]
            if k + 1 in at:
                opened, variation = next(v for v in live if v[0] == self.first(k + 1))
                found[k + 1] = variation.target(k + 1 - opened)
        return found

    def _probed(self, sde: SDE, path: Path, dw: Tensor, at: int) -> Tensor:
        r"""-UᵀZ + Γ⁻¹ tr[(1 - P) H] - Σ_l (Uᵀ H^l U)_l, P = UJ, as a sum over the steps.

        H is a sum of the second derivatives of single steps. Each is contracted with matrices of
        the size of one state, along random directions v with the mean E[v vᵀ] = 1.
        """
        steps = [_Step.of(sde, path, dw, [k]) for k in range(self.first(at), at)]
        A, B = ([f(step) for step in steps] for f in (_along_state, _along_noise))
        gammas = [torch.zeros_like(A[0])]
        for a, b in zip(A, B, strict=True):
            gammas.append(a @ gammas[-1] @ a.mT + b @ b.mT)
        inverse = _inverse(gammas[-1], len(steps))
        ahead = torch.eye(A[0].shape[-1]).to(A[0]).expand_as(A[0])  # ∂X_N/∂X_{k+1}
        integral = trace = bend = ahead.new_zeros(ahead.shape[:2])
        for k in reversed(range(len(steps))):
            step, gamma, J, back = steps[k], gammas[k], ahead @ B[k], ahead @ A[k]
            U = J.mT @ inverse
            integral = integral + _times(U.mT, step.z)
            if k:  # the first state is given: the first step is Gaussian
                v = self._directions(at, k, ahead)
                W = gamma @ back.mT @ inverse  # ∂X_k/∂Z U
                matrix = torch.cat([gamma - W @ back @ gamma, -2 * W @ J], 2)
                trace = trace + _times(ahead, _contracted(step, v, matrix))
                bend = bend + _bent(step, v, ahead, torch.cat([W, U], 1))
            ahead = back
        return _times(inverse, trace) - bend - integral

    def _directions(self, at: int, k: int, like: Tensor) -> Tensor:
        """Random signs, (probes, B, d)."""
        g = generator(self.seed, at, k, device=like.device)
        shape = (self.probes or 1, *like.shape[:2])
        bits = torch.randint(0, 2, shape, generator=g, device=like.device, dtype=torch.int8)
        return (2 * bits - 1).to(like)

    def __repr__(self) -> str:
        return f"Skorokhod(window={self.window}, probes={self.probes})"


def reached(target: Target, sde: SDE, path: Path, most: int = 64) -> int:
    """The first time of a path at which a target is defined.

    Raises:
        NotElliptic: If it is at none of the first `most` times.
    """
    refusal = None
    for at in range(1, min(most, len(path.t) - 1) + 1):
        try:
            target(sde, path, [at])
        except NotElliptic as error:
            refusal = error
        else:
            return at
    raise refusal or KakusanError("this path has no steps")


class Slopes(NamedTuple):
    """The derivatives of one step in the state and in the noise.

    Attributes:
        A: ∂X_{k+1}/∂X_k, (B, d, d).
        B: ∂X_{k+1}/∂Z_k, (B, d, m).
        xx: The second derivatives in the state, (B, d, d, d), the result first.
        xz: Those in state and noise, (B, d, d, m); in the noise there are none.
    """

    A: Tensor
    B: Tensor
    xx: Tensor
    xz: Tensor


class Variation(NamedTuple):
    """What is known of X_N = F(Z) as a function of the noise since the window opened.

    Attributes:
        JZ: J Z, (B, d).
        gamma: Γ = J Jᵀ, (B, d, d).
        trace: λ_l = tr H^l, (B, d).
        K: K^l = J H^l Jᵀ, (B, d, d, d).
    """

    JZ: Tensor
    gamma: Tensor
    trace: Tensor
    K: Tensor

    @staticmethod
    def start(like: Tensor) -> Variation:
        """Of a state that is given."""
        n, d = like.shape[:2]
        return Variation(*(like.new_zeros((n, *[d] * r)) for r in (1, 2, 1, 3)))

    def after(self, step: Slopes, z: Tensor) -> Variation:
        """One step later."""
        A, B, xx, xz = step
        back = (A @ self.gamma).unsqueeze(1)
        mixed = back @ (xz @ B.mT.unsqueeze(1))
        K = A.unsqueeze(1) @ self.K @ A.mT.unsqueeze(1)
        K = (A @ K.flatten(2)).view_as(K) + back @ xx @ back.mT + mixed + mixed.mT
        return Variation(
            _times(A, self.JZ) + _times(B, z),
            back.squeeze(1) @ A.mT + B @ B.mT,
            _times(A, self.trace) + _times(xx.flatten(2), self.gamma.flatten(1)),
            K,
        )

    def target(self, steps: int) -> Tensor:
        """-(UᵀZ - ∇·U), (B, d)."""
        inverse = _inverse(self.gamma, steps)
        kappa = _times(self.K.flatten(1, 2).mT, inverse.flatten(1))
        seen = _times(self.K.flatten(2), inverse.flatten(1))
        return _times(inverse, self.trace - self.JZ - seen - kappa)


def _inverse(gamma: Tensor, steps: int) -> Tensor:
    """Γ⁻¹, where the noise reaches every coordinate."""
    if not gamma.isfinite().all():
        raise KakusanError(
            f"the derivatives of {int((~gamma.flatten(1).isfinite().all(1)).sum())} of "
            f"{len(gamma)} paths are not finite after {steps} steps: take smaller steps, or a "
            "shorter window"
        )
    scale = gamma.diagonal(dim1=1, dim2=2).sqrt()
    units = scale.unsqueeze(2) * scale.unsqueeze(1)
    # as correlations, so that units and small steps do not count
    root, info = torch.linalg.cholesky_ex(torch.where(units > 0, gamma / units, 0.0))
    least = root.diagonal(dim1=1, dim2=2).amin(1) ** 2
    bad = (info != 0) | ~(least > 100 * gamma.shape[-1] * torch.finfo(gamma.dtype).eps)
    if bad.any():
        raise NotElliptic(
            f"the noise of {steps} step{'s' * (steps != 1)} does not reach every coordinate (its "
            f"matrix is singular for {int(bad.sum())} of {len(gamma)} paths): window and path "
            "must be at least as long as noise needs to do so; Skorokhod(window=None) takes all "
            "steps there are"
        )
    return torch.cholesky_inverse(root) / units


# --- derivatives of single steps: rows of large batches, so that users' functions know nothing of
# vmap, and derivatives of many steps at once where they take times of shape (B,)


class _Step(NamedTuple):
    """Steps of the chain as a map from (x, z) to the next states, flattened."""

    sde: SDE
    t: Time
    h: Tensor
    x: State
    dw: Tensor

    @staticmethod
    def of(sde: SDE, path: Path, dw: Tensor, ks: Sequence[int]) -> _Step:
        """Step k of a path, or several on top of each other, with times of shape (B,)."""
        lo, hi, n = ks[0], ks[-1] + 1, path.x.shape[1]
        t, h = path.t[lo:hi], path.t[lo + 1 : hi + 1] - path.t[lo:hi]
        t, h = (t[0], h[0]) if hi - lo == 1 else (t.repeat_interleave(n), h.repeat_interleave(n))
        # one time stays where it can be read without waiting for a device
        t = t.to(path.x.device) if t.ndim else t
        return _Step(sde, t, h, path.x[lo:hi].flatten(0, 1), dw[lo:hi].flatten(0, 1))

    @property
    def z(self) -> Tensor:
        """The standard normal numbers, (B, m)."""
        return (self.dw / per_sample(self.h.abs().sqrt(), self.dw)).flatten(1)

    def map(self, x: Tensor, z: Tensor) -> Tensor:
        """X + h f + G dB, for x of shape (n B, d) and z of shape (n B, m)."""
        n = len(x) // len(self.x)
        t, h = (v.repeat(n, *(1,) * (v.ndim - 1)) if v.ndim else v for v in (self.t, self.h))
        x = x.reshape(-1, *self.x.shape[1:])
        dw = per_sample(h.abs().sqrt(), z) * z
        after = x + per_sample(h, x) * self.sde.drift(x, t)
        dw = dw.reshape(-1, *self.dw.shape[1:])
        return self.sde.diffusion(x, t).kick(after, dw).flatten(1)

    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        """(x, z), n times."""
        return self.x.flatten(1).repeat(n, 1), self.z.repeat(n, 1)


def _slopes(sde: SDE, path: Path, dw: Tensor, ks: range) -> Iterator[Slopes]:
    """The derivatives of each step, computed for as many at once as the process lets."""
    n, d, m = path.x.shape[1], path.x[0, 0].numel(), dw[0, 0].numel()
    many = max(1, ROWS // (n * d * (d * (d + 1) // 2 + d * m)))
    form = _form_of_times(sde, path, dw) if many > 1 else None
    many = 1 if form is None else many
    for lo in range(ks.start, ks.stop, many):
        step = _Step.of(sde, path, dw, range(lo, min(lo + many, ks.stop)))
        if form is not None and step.t.ndim:
            step = step._replace(t=form(step.t))
        parts = (v.unflatten(0, (-1, n)).unbind() for v in _both(step, d, m))
        yield from (Slopes(*part) for part in zip(*parts, strict=True))


def _form_of_times(sde: SDE, path: Path, dw: Tensor) -> Callable[[Time], Tensor] | None:
    """The form of many times in which drift and diffusion mean the same as one by one, if any.

    The contract says (B,), but `lambda x, t: -t * x` means the right thing by (B, 1, ..., 1), and
    by times that do not promote a state of single precision.
    """
    # few paths: (B, d) times (B,) may spread to (B, d, B)
    path, dw = path._replace(x=path.x[:, :FEW]), dw[:, :FEW]
    x, ks = path.x, sorted({0, len(dw) // 2, len(dw) - 1})
    ones = [_Step.of(sde, path, dw, [k]) for k in ks]
    each = torch.cat([step.map(*step.rows(1)) for step in ones])
    beside = (-1, *(1,) * (x.ndim - 2))
    forms: list[Callable[[Time], Tensor]] = [
        lambda t: t,
        lambda t: t.view(beside),
        lambda t: t.view(beside).to(x.dtype),
        lambda t: t.to(x.dtype),
    ]
    t = torch.stack([o.t for o in ones]).repeat_interleave(x.shape[1]).to(x.device)
    h = torch.stack([o.h for o in ones]).repeat_interleave(x.shape[1])
    state, w = torch.cat([o.x for o in ones]), torch.cat([o.dw for o in ones])
    for form in forms:
        step = _Step(sde, form(t), h, state, w)
        try:
            found = step.map(*step.rows(1))
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        alike = found.shape == each.shape and found.dtype == each.dtype
        if alike and torch.allclose(found, each, rtol=1e-4):
            return form
    return None


def _both(step: _Step, d: int, m: int) -> Slopes:
    """First and second derivatives, from one pass over all pairs of directions."""
    pairs = [(i, j) for i in range(d) for j in range(i, d + m)]
    first, second = (torch.tensor(v, device=step.x.device) for v in zip(*pairs, strict=True))
    eye = torch.eye(d + m, dtype=step.x.dtype, device=step.x.device)
    u, v = (eye[i].repeat_interleave(len(step.x), 0) for i in (first, second))
    x, z = step.rows(len(pairs))

    def slope(x: Tensor, z: Tensor) -> Tensor:
        return jvp(lambda y: step.map(y, z), (x,), (u[:, :d].contiguous(),))[1]

    out = jvp(slope, (x, z), (v[:, :d].contiguous(), v[:, d:].contiguous()))
    a, second_order = (_columns(w, len(pairs)) for w in out[:2])
    at = {pair: k for k, pair in enumerate(pairs)}
    xx = [at[min(i, j), max(i, j)] for i in range(d) for j in range(d)]
    xz = [at[i, d + j] for i in range(d) for j in range(m)]
    return Slopes(
        a[..., [at[i, i] for i in range(d)]],
        _along_noise(step),
        second_order[..., xx].unflatten(-1, (d, d)),
        second_order[..., xz].unflatten(-1, (d, m)),
    )


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _basis(n: int, like: Tensor) -> Tensor:
    """The n unit vectors, each for a whole batch: (n B, n)."""
    return torch.eye(n, dtype=like.dtype, device=like.device).repeat_interleave(len(like), 0)


def _columns(v: Tensor, n: int) -> Tensor:
    """Rows (n B, d) as matrices (B, d, n)."""
    return v.reshape(n, -1, v.shape[-1]).permute(1, 2, 0)


def _along_state(step: _Step) -> Tensor:
    """∂X_{k+1}/∂X_k, (B, d, d)."""
    d = step.x[0].numel()
    x, z = step.rows(d)
    return _columns(jvp(lambda y: step.map(y, z), (x,), (_basis(d, step.x),))[1], d)


def _along_noise(step: _Step) -> Tensor:
    """∂X_{k+1}/∂Z_k, (B, d, m); the step is linear in its noise."""
    m = step.dw[0].numel()
    x, z = step.rows(m)
    return _columns(step.map(x, _basis(m, step.dw)) - step.map(x, torch.zeros_like(z)), m)


def _contracted(step: _Step, probes: Tensor, matrix: Tensor) -> Tensor:
    """The sum over i of the second derivative along (e_i, row i of the matrix), (B, d)."""
    d, point = probes.shape[-1], step.rows(len(probes))
    u = probes.reshape(-1, d)
    v = (probes.unsqueeze(-2) @ matrix).reshape(-1, matrix.shape[-1])

    def slope(x: Tensor, z: Tensor) -> Tensor:
        return jvp(lambda y: step.map(y, z), (x,), (u,))[1]

    second = jvp(slope, point, (v[:, :d].contiguous(), v[:, d:].contiguous()))[1]
    return second.reshape(probes.shape).mean(0)


def _bent(step: _Step, probes: Tensor, ahead: Tensor, W: Tensor) -> Tensor:
    """Σ_l of the second derivative of (ahead X_{k+1})_l along the columns l and i of W, (B, d)."""
    d, point = probes.shape[-1], step.rows(len(probes))
    both = _times(W, probes).reshape(-1, W.shape[1])
    u = (both[:, :d].contiguous(), both[:, d:].contiguous())
    weights = _times(ahead.mT, probes).reshape(-1, d)

    def slope(x: Tensor, z: Tensor) -> Tensor:
        return (weights * jvp(step.map, (x, z), u)[1]).sum()

    down = torch.cat(grad(slope, (0, 1))(*point), 1)
    return _times(W.mT, down.reshape(len(probes), -1, down.shape[-1]).mean(0))
