r"""The pull of Brownian motion: a tilt that costs next to nothing.

Were the noise to stay what it is at (x, t), and the drift zero, the time left τ = |T - t| would
bring X_T ~ N(x, τ GGᵀ). What is seen of it, Y = H X_T + std eps, then has

.. math:: \nabla \log h = H^\top (\tau H G G^\top H^\top + std^2)^{-1} (y - H x), \qquad
          c = G^\top \nabla \log h .

This is exact for Brownian motion with any constant G. For other processes it pulls as strongly
near the end as the true tilt does, as far as the noise reaches, and is wrong by what the drift
does: a start for a learned tilt, or a proposal to be weighted.

The matrix A = H GGᵀ Hᵀ is met through G alone. Where it is diagonal (pixels of a picture, noise
that does not mix them) two products show it; a few observed numbers have it written out; many have
the equation solved by conjugate gradients. For the whole state c = G⁻¹ (y - x) / τ.

References:
    Simulation of conditioned diffusion and application to parameter estimation (Delyon and Hu,
        2006), Stochastic Processes and their Applications 116
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kakusan.core.operators import NotElliptic, Operator
from kakusan.core.types import State, Time, per_sample
from kakusan.inference.conditioning.linear import where_next
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.inference.conditioning.views import scaled_root
from kakusan.processes.observations import Linear, Observation, Terminal
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito

FEW = 32  # observed numbers for which A is written out


class Pull(Tilt):
    """The tilt of Brownian motion with the noise that the process has where it stands.

    Of a `Series` the next linear observation pulls. Observations that are not linear (`Event`,
    `Label`) and those that are past do not: their control is 0.

    Arguments:
        sde: Any process with noise; in the sense of Itô unless it is a `Stratonovich`.
        observation: What is seen.
        end: When the end is seen; the end of the span of `sde` by default.

    Raises:
        NotElliptic: When asked, if noise does not reach what is seen exactly.

    Example:
        >>> from kakusan import GeometricBrownian
        >>> pull = Pull(GeometricBrownian(sigma=0.5), Terminal())
        >>> t, y = torch.tensor(0.5, dtype=torch.float64), torch.tensor([[3.0]])
        >>> pull.control(torch.tensor([[2.0]]), t, y)  # (3 - 2) / (0.5 * 2 * 0.5)
        tensor([[2.]])
    """

    def __init__(self, sde: SDE, observation: Observation, end: float | None = None) -> None:
        self.sde, self.observation = ito(sde), observation
        self.end = float(self.sde.span[1] if end is None else end)

    def score(self, x: State, t: Time, y: Tensor) -> State:  # noqa: D102
        def score(seen: Linear, x: State, t: Time, tau: Tensor, r: Tensor) -> State:
            G = self.sde.diffusion(x, t)
            if isinstance(seen, Terminal):
                try:
                    return G.tsolve(G.solve(r.reshape(x.shape))) / per_sample(tau, x)
                except NotElliptic:  # G may have no inverse where GGᵀ has one
                    pass
            return self._reached(seen, x, G, tau, r)

        return self._towards(x, t, y, score, torch.zeros_like(x))

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        def control(seen: Linear, x: State, t: Time, tau: Tensor, r: Tensor) -> Tensor:
            G = self.sde.diffusion(x, t)
            if not isinstance(seen, Terminal):
                return G.tmv(self._reached(seen, x, G, tau, r))
            try:
                c = G.solve(r.reshape(x.shape))
            except NotElliptic as error:
                raise self._unreached(seen, str(error)) from None
            return c / per_sample(tau, c)

        nothing = x.new_zeros(self.sde.noise_shape(x))
        return self._towards(x, t, y, control, nothing)

    def _towards(
        self,
        x: State,
        t: Time,
        y: Tensor,
        pull: Callable[[Linear, State, Time, Tensor, Tensor], Tensor],
        nothing: Tensor,
    ) -> Tensor:
        """`pull(seen, x, t, time left, y - H x)` by what is seen next; `nothing` without it."""
        self.observation.size(x)  # a Series counts the numbers of its parts
        parts = sorted(self.observation.parts(self.end), key=lambda part: part[0])
        linear = [(s, seen, of_y) for s, seen, of_y in parts if isinstance(seen, Linear)]
        linear = linear[:: self.sde.direction]

        def part(i: int, rows: Tensor | slice) -> Tensor:
            s, seen, of_y = linear[i]
            at = t if isinstance(rows, slice) else t[rows.to(t.device)]
            z = x[rows]
            r = y[rows][:, of_y].to(x) - seen.forward(z)
            return pull(seen, z, at, (s - at).abs(), r)

        return where_next([s for s, *_ in linear], t, self.sde.direction, part, nothing)

    def _reached(self, seen: Linear, x: State, G: Operator, tau: Tensor, r: Tensor) -> State:
        """Hᵀ (tau H GGᵀ Hᵀ + std²)⁻¹ r."""
        tau = per_sample(tau, r)

        def A(v: Tensor) -> Tensor:
            return tau * seen.forward(G.gram(seen.transpose(v, x))) + seen.std**2 * v

        try:
            return seen.transpose(solved(A, r), x)
        except NotElliptic as error:
            raise self._unreached(seen, str(error)) from None

    def _unreached(self, seen: Linear, why: str) -> NotElliptic:
        return NotElliptic(
            f"the noise of {type(self.sde).__name__} does not reach all that {seen} sees ({why}): "
            "LinearTilt.around(sde, observation, x) finds ways through the drift, and a noise "
            "std > 0 on what is seen needs none"
        )

    def __repr__(self) -> str:
        return f"Pull({type(self.sde).__name__}, {self.observation})"


# --- A v = r for a matrix that is known by its products


def solved(A: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """The v with A v = r, one symmetric positive matrix for each row of r (B, k).

    Example:
        >>> solved(lambda v: torch.tensor([2.0, 4.0]) * v, torch.tensor([[1.0, 1.0]]))
        tensor([[0.5000, 0.2500]])
    """
    k = r.shape[1]
    diagonal = A(torch.ones_like(r))
    if _is_diagonal(A, diagonal):
        if ((diagonal == 0) & (r != 0)).any():
            raise NotElliptic("a number that is seen without noise does not move")
        return torch.where(diagonal == 0, 0.0, r / torch.where(diagonal == 0, 1.0, diagonal))
    if k > FEW:
        return conjugate_gradients(A, r)
    rows = torch.eye(k, dtype=r.dtype, device=r.device)
    L, regular = scaled_root(torch.stack([A(e.expand_as(r)) for e in rows], -1))
    if not regular.all():
        raise NotElliptic(
            f"the matrix of the {k} numbers that are seen is singular for "
            f"{int((~regular).sum())} of {len(r)} states"
        )
    return torch.cholesky_solve(r.unsqueeze(-1), L).squeeze(-1)


def _is_diagonal(A: Callable[[Tensor], Tensor], diagonal: Tensor) -> bool:
    """Whether A z = diagonal z, for a z that no other matrix with these sums of rows obeys.

    Such matrices exist, but for numbers as rough as these nobody meets one; what rounding hides
    is below it.
    """
    k = diagonal.shape[1]
    if k == 1:
        return True
    z = torch.arange(1, k + 1, dtype=torch.float64).square().cos().to(diagonal).expand_as(diagonal)
    with torch.no_grad():
        rounding = 16 * k**0.5 * torch.finfo(z.dtype).eps
        return bool(((A(z) - diagonal * z).abs() <= rounding * diagonal.abs()).all())


def conjugate_gradients(A: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """The v with A v = r by the method of Hestenes and Stiefel; one product an iteration."""
    eps, k = torch.finfo(r.dtype).eps, r.shape[1]
    v, left, p = torch.zeros_like(r), r, r
    size = rr = r.square().sum(1, keepdim=True)
    for _ in range(2 * k):
        Ap = A(p)
        pAp = (p * Ap).sum(1, keepdim=True)
        step = torch.where(pAp > 0, rr / torch.where(pAp > 0, pAp, 1.0), 0.0)
        v, left = v + step * p, left - step * Ap
        before, rr = rr, left.square().sum(1, keepdim=True)
        if bool((rr <= eps**1.5 * size).all()):
            break
        p = left + torch.where(before > 0, rr / torch.where(before > 0, before, 1.0), 0.0) * p
    far = (r - A(v)).norm(dim=1) > eps**0.5 * size[:, 0].sqrt()
    if bool(far.any()):
        raise NotElliptic(
            f"the matrix of the {k} numbers that are seen is singular, or nearly, for "
            f"{int(far.sum())} of {len(r)} states"
        )
    return v
