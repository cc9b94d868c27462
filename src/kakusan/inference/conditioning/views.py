r"""What will be seen of a linear process, carried back in time.

As seen from the time of the next observation, all that will be seen is N z + noise of covariance
S, with z = (X, 1) then. From a time before it is N E z, with the covariance N Q Nᵀ + S, by the
kernel (E, Q) between the two. One sweep from the last observation to the first has the views at
their times, and one kernel the law at any other; as z holds a constant, one exponential gives the
mean and its offset together. Along the grid of a chain the kernel is that of its Euler steps.

The best control of a chain is Gᵀ times the slope *after* the step, (N E')ᵀ S⁻¹ (y - N E z): noise
of a step moves the state behind it. In the limit of small steps the two are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.operators import NotElliptic
from kakusan.processes.zoo.laws import linear_kernel, linear_series, linear_steps

KEPT = 1 << 24  # numbers of matrices that are remembered: 128 MiB


class Seen(NamedTuple):
    """One observation: at the time t, H x + std eps; `columns` says which numbers of y it is."""

    t: float
    H: Tensor
    std: float
    columns: Tensor


class View(NamedTuple):
    """What will be seen, given z = (x, unit) now: N z with noise of covariance S.

    Attributes:
        N: (..., K, d + 1).
        S: (..., K, K).
    """

    N: Tensor
    S: Tensor

    def before(self, E: Tensor, Q: Tensor) -> View:
        """As seen a time earlier, by the factor and the covariance of that time."""
        return View(self.N @ E, self.N @ Q @ self.N.mT + self.S)

    def beside(self, H: Tensor, std: float) -> View:
        """With an observation now in front of the others."""
        H = torch.nn.functional.pad(H, (0, 1))
        noise = std**2 * torch.eye(len(H), dtype=H.dtype)
        return View(torch.cat([H, self.N]), torch.block_diag(noise, self.S))


class Law(NamedTuple):
    """The normal law of what will be seen, at U times.

    Attributes:
        N: (U, K, d + 1), the mean is N z.
        gain: (U, K, d), S⁻¹ of the part of N that acts on x.
        pull: (U, K, d), the same with the N after the next step.
        root: (U, K, K), the triangular L with L Lᵀ = S.
    """

    N: Tensor
    gain: Tensor
    pull: Tensor
    root: Tensor

    def log_density(self, away: Tensor) -> Tensor:
        """Log N(away; 0, S) for (U, n, K), with the shape (U, n, 1)."""
        u = torch.linalg.solve_triangular(self.root, away.mT, upper=False)
        scale = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None]
        constant = 0.5 * away.shape[-1] * math.log(2 * math.pi)
        return (-0.5 * u.square().sum(-2) - scale - constant).unsqueeze(-1)


class Ahead:
    """All that will be seen of dX = (B X + beta) dt + noise with GGᵀ = D, from any time.

    Arguments:
        B: (d, d), in time that runs forwards.
        beta: (d,).
        D: (d, d).
        seen: What is seen, in the order in which it is; `direct` where noise reaches it at once.
        device: Where laws are wanted; they are computed on the CPU.
        grid: The times of a chain.
    """

    def __init__(
        self, B: Tensor, beta: Tensor, D: Tensor, seen: Sequence[Seen], device: torch.device,
        grid: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.times, self.device, self.grid = [one.t for one in seen], device, grid
        # z holds a number of the size of the state, or the exponential would count time by beta
        size = B.abs().sum(1).max().item() or 1.0
        self.unit = beta.abs().max().item() / size or 1.0
        pad = torch.nn.functional.pad
        self.A = pad(torch.cat([B, beta[:, None] / self.unit], 1), (0, 0, 0, 1))
        self.D = pad(D, (0, 1, 0, 1))
        self.series = linear_series(self.A, self.D)
        view, later = View(self.A[:0], B.new_zeros(0, 0)), seen[-1].t
        views, columns = [], []
        for one in reversed(seen):
            now = torch.tensor(one.t, dtype=torch.float64)
            view = view.before(*self._kernel(now, later, grid)[:2]).beside(one.H, one.std)
            columns.append(torch.cat([one.columns, *columns[-1:]]))
            views.append(view)
            later = one.t
        self.direct = [bool(scaled_root(one.H @ D @ one.H.mT)[1]) for one in seen]
        self.views, self.columns = views[::-1], [c.to(device) for c in columns[::-1]]
        self._laws: dict[tuple[int, tuple[float, ...]], Law] = {}
        self._numbers = 0

    def law(self, i: int, times: tuple[float, ...]) -> Law:
        """The law of the observations from the i-th on, at some times before it."""
        if (i, times) not in self._laws:
            with torch.inference_mode(False), torch.no_grad():
                law = Law(*(part.to(self.device) for part in self._law(i, times, self.grid)))
            self._numbers += sum(part.numel() for part in law)
            while self._laws and self._numbers > KEPT:
                oldest = self._laws.pop(next(iter(self._laws)))
                self._numbers -= sum(part.numel() for part in oldest)
            self._laws[i, times] = law
        return self._laws[i, times]

    def _kernel(
        self, t: Tensor, s: float, grid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Factor and covariance from the times t to s, and the factor without the first step."""
        left = (s - t).abs()
        if grid is None:
            E, Q = linear_kernel(self.series, left)
            return E, Q, E
        n = between(grid, t, s).clamp(min=1)
        after, Q = linear_steps(self.A, self.D, left / n, n - 1)
        h = (left / n)[..., None, None]
        one = torch.eye(len(self.A)).to(self.A) + h * self.A
        return one @ after, one @ Q @ one.mT + h * self.D, after

    def _law(self, i: int, times: tuple[float, ...], grid: Tensor | None) -> Law:
        t = torch.tensor(times, dtype=torch.float64)
        E, Q, after = self._kernel(t, self.times[i], grid)
        N, S = self.views[i].before(E, Q)
        L, regular = scaled_root(S)
        after = self.views[i].N @ after[..., :-1]
        if not regular.all() and grid is not None:
            # too few steps are left for noise to arrive everywhere: it pulls where it does
            pull = torch.linalg.pinv(S, rtol=1e-9, hermitian=True) @ after
            return self._law(i, times, None)._replace(pull=pull)
        if not regular.all():
            at = times[int(regular.int().argmin())]
            raise NotElliptic(
                f"the noise of the linear process does not reach all {len(S[0])} numbers that are "
                f"seen after t={at:g} (their covariance is singular): observe less, or with a "
                "noise std > 0, or make the process linear at another state"
            )
        gain, pull = (torch.cholesky_solve(M, L) for M in (N[..., :-1], after))
        return Law(N, gain, pull, L)


def between(grid: Tensor, t: Tensor, s: float) -> Tensor:
    """How many times of a grid lie after t, () or (U,), and not after s."""
    gap = grid - t.unsqueeze(-1)
    near = 1e-9 * grid.diff().abs().min()
    ahead = (gap.abs() > near) & ((gap * (s - t).sign().unsqueeze(-1)) > 0)
    return (ahead & ((grid - s) * (s - t).sign().unsqueeze(-1) <= near)).sum(-1)


def scaled_root(S: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of covariances (..., K, K), and which of them have an inverse, (...).

    They are judged as correlations, so that units and short times do not count.
    """
    scale = S.diagonal(dim1=-2, dim2=-1).sqrt()
    units = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    L, info = torch.linalg.cholesky_ex(S / torch.where(units > 0, units, 1.0))
    least = L.diagonal(dim1=-2, dim2=-1).amin(-1) ** 2
    rounding = 100 * S.shape[-1] * torch.finfo(S.dtype).eps
    return scale.unsqueeze(-1) * L, (info == 0) & (least > rounding)
