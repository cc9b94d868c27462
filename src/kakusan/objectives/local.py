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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import generator
from kakusan.core.operators import NotElliptic
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.objectives.steps import (
    Slopes,
    Step,
    along_noise,
    along_state,
    bent,
    contracted,
    slopes_of,
    times,
)
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito
from kakusan.solvers.solve import Path


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
        for k, slopes in enumerate(slopes_of(sde, path, dw, range(first, last)), start=first):
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
        steps = [Step.of(sde, path, dw, [k]) for k in range(self.first(at), at)]
        A, B = ([f(step) for step in steps] for f in (along_state, along_noise))
        gammas = [torch.zeros_like(A[0])]
        for a, b in zip(A, B, strict=True):
            gammas.append(a @ gammas[-1] @ a.mT + b @ b.mT)
        inverse = _inverse(gammas[-1], len(steps))
        ahead = torch.eye(A[0].shape[-1]).to(A[0]).expand_as(A[0])  # ∂X_N/∂X_{k+1}
        integral = trace = bend = ahead.new_zeros(ahead.shape[:2])
        for k in reversed(range(len(steps))):
            step, gamma, J, back = steps[k], gammas[k], ahead @ B[k], ahead @ A[k]
            U = J.mT @ inverse
            integral = integral + times(U.mT, step.z)
            if k:  # the first state is given: the first step is Gaussian
                v = self._directions(at, k, ahead)
                W = gamma @ back.mT @ inverse  # ∂X_k/∂Z U
                matrix = torch.cat([gamma - W @ back @ gamma, -2 * W @ J], 2)
                trace = trace + times(ahead, contracted(step, v, matrix))
                bend = bend + bent(step, v, ahead, torch.cat([W, U], 1))
            ahead = back
        return times(inverse, trace) - bend - integral

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
            times(A, self.JZ) + times(B, z),
            back.squeeze(1) @ A.mT + B @ B.mT,
            times(A, self.trace) + times(xx.flatten(2), self.gamma.flatten(1)),
            K,
        )

    def target(self, steps: int) -> Tensor:
        """-(UᵀZ - ∇·U), (B, d)."""
        inverse = _inverse(self.gamma, steps)
        kappa = times(self.K.flatten(1, 2).mT, inverse.flatten(1))
        seen = times(self.K.flatten(2), inverse.flatten(1))
        return times(inverse, self.trace - self.JZ - seen - kappa)


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
