r"""The last steps of a chain, given what is seen after them.

One step is Gaussian, so what is seen of it is normal: with z = dw / √h ~ N(0, 1), J = √h H G and
S = J Jᵀ + std²,

.. math:: Y = H m + J z + std \, \epsilon, \qquad p(y \mid x) = N(y; H m, S),

and a draw of z given Y = y is a free draw, corrected by the shortest step that meets y (Matheron):

.. math:: z = z_0 + J^\top S^{-1} (y - H m - J z_0 - std \, \epsilon_0) .

Where S is singular the noise of one step does not reach what is seen: a position whose momentum
is kicked moves a step later. Then the last L steps are taken together, L the least number that
reaches. H X_N is a function F of their noise; a free draw z_0 is corrected until F(z) = y, and the
factor N(J z; 0, J Jᵀ), J = F'(z), is the density at y of F's tangent at z. Both are exact where F
is affine, as for two steps of kinetic motion in any energy; elsewhere the weights are off by O(h).

References:
    The intrinsic random functions and their applications (Matheron, 1973)
    Pathwise conditioning of Gaussian processes (Wilson et al., 2021)
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from kakusan.core.noise import Fresh
from kakusan.core.operators import NotElliptic, Scale
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.reach import Reach, Rows, Single, Whole
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.processes.observations import Coordinates, Linear, Observation, Terminal
from kakusan.solvers.gaussian import GaussianSteps

MOST = 4  # steps that are taken together
TRIES = 20  # corrections of F(z) = y; where steps are small the third or fourth is at rounding
HALVINGS = 60  # of one correction: from where F is flat the first goes far astray


class Seen(NamedTuple):
    """One observation of a chain.

    Attributes:
        at: The index of the state that is seen.
        what: What is seen of it.
        rows: Which numbers of y are these.
    """

    at: int
    what: Observation
    rows: slice


class Landed(NamedTuple):
    """Steps that meet what was seen.

    Attributes:
        x: The states after each of them.
        dw: Their increments.
        log_p: Log p(y | x) of the state before them, (B,) in float64.
    """

    x: list[State]
    dw: list[Tensor]
    log_p: Tensor


class Finish:
    """Steps `first` to `at` - 1 of a chain, given what is seen of the state after them.

    Arguments:
        steps: The chain.
        first: The index of the state before them.
        at: That of the state that is seen.
        what: What is seen of it.
    """

    def __init__(self, steps: GaussianSteps, first: int, at: int, what: Linear) -> None:
        self.steps, self.first, self.at, self.what = steps, first, at, what

    def land(self, x: State, y: Tensor, dw: Sequence[Tensor], eps: Tensor | float) -> Landed:
        """The steps from x to y, (B, k), by correcting free increments dw and noise eps of y."""
        if self.at - self.first > 1:
            return self._many(x, y, dw)
        return self._one(x, y, dw[0], eps)

    def bad(self, x: State) -> Tensor:
        """Which states see their noise not reach what is seen, (B,)."""
        return (self.reach(x) if self.at - self.first == 1 else self._slopes(x)[0]).bad

    def _one(self, x: State, y: Tensor, dw: Tensor, eps: Tensor | float) -> Landed:
        k, H = self.first, self.what
        reach, m, G = self.reach(x), self.steps.mean(x, k), self.steps.operator(x, k)
        if reach.bad.any():
            raise NotElliptic(_unreached(H, 1, reach.bad))
        away = y - H.forward(m)
        short = away - H.forward(G.mv(dw).reshape(x.shape)) - H.std * eps
        dw = dw + self.steps.h(k) ** 0.5 * reach.lift(short).reshape(dw.shape)
        end = G.kick(m, dw)
        if not H.std:
            far = (H.forward(end) - y).abs() > torch.finfo(x.dtype).eps ** 0.5 * _size(x, y, short)
            if far.any():
                raise NotElliptic(
                    f"G is nearly singular at t={self.steps.grid[k].item():g}: {far.any(1).sum()} "
                    f"of {len(x)} paths miss what {H} sees; take float64, or a noise of what is "
                    "seen, std > 0"
                )
        return Landed([settled(end, H, y)], [dw], reach.log_density(away))

    def _many(self, x: State, y: Tensor, dw: Sequence[Tensor]) -> Landed:
        z = torch.cat([w.flatten(1) / r for w, r in zip(dw, self._roots, strict=True)], 1)
        reach, made = self._slopes(x, z)
        near, tries = 100 * torch.finfo(x.dtype).eps * _size(x, y, y - made), 0
        while ((short := y - made).abs() > near).any():
            if reach.bad.any():
                raise NotElliptic(_unreached(self.what, self.at - self.first, reach.bad))
            if tries == TRIES:
                raise KakusanError(
                    f"{self.at - self.first} steps to what {self.what} sees at "
                    f"t={self.steps.grid[self.at].item():g} still miss it by up to "
                    f"{short.abs().max().item():.3g} after {TRIES} corrections: take smaller steps"
                )
            z, tries = self._corrected(x, y, z, reach.lift(short), near), tries + 1
            reach, made = self._slopes(x, z)
        states, dws = self._walked(x, z)
        states[-1] = settled(states[-1], self.what, y)
        return Landed(states, dws, reach.log_density((reach.A @ z.double().unsqueeze(-1))[..., 0]))

    def _corrected(self, x: State, y: Tensor, z: Tensor, dz: Tensor, near: Tensor) -> Tensor:
        """Z + dz, halved on paths that it would lead further away."""
        short = (y - self._seen(x, z)).norm(dim=1)
        for _ in range(HALVINGS):
            left = y - self._seen(x, z + dz)
            worse = (left.norm(dim=1) > short) & (left.abs() > near).any(1)
            if not worse.any():
                break
            dz = torch.where(worse.unsqueeze(1), dz / 2, dz)
        return z + dz

    @property
    def _roots(self) -> list[float]:
        return [self.steps.h(k) ** 0.5 for k in range(self.first, self.at)]

    def reach(self, x: State, noisy: float = 1.0) -> Reach:
        """One step's map J from noise to what is seen, in the form that costs least.

        With `noisy` times the noise of what is seen.
        """
        k, H, d = self.first, self.what, x[0].numel()
        G, root, shape = self.steps.operator(x, k), self.steps.h(k) ** 0.5, self.steps.noise_shape
        m = math.prod(shape(x)[1:])
        if isinstance(H, Terminal) and m == d:
            return Whole(G, root, x)
        if isinstance(H, Coordinates) and isinstance(G, Scale):
            at = H.at % d
            if len(at.unique()) == len(at):
                return Single(G, root, H, x, noisy * H.std)
        rows = torch.eye(H.size(x)).to(x).unsqueeze(1).expand(-1, len(x), -1)
        A = [root * G.tmv(H.transpose(e, x)).reshape(len(x), m) for e in rows]
        return Rows(torch.stack(A, 1), (noisy * H.std) ** 2)

    def _slopes(self, x: State, z: Tensor | None = None) -> tuple[Rows, Tensor]:
        """The slope of H X_at in the noise of all steps, and its value."""
        m = math.prod(self.steps.noise_shape(x)[1:])
        z = x.new_zeros(len(x), m * len(self._roots)) if z is None else z

        # one direction at a time: the process may know how many paths there are
        directions = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        columns = [
            jvp(lambda z: self._seen(x, z), (z,), (e.expand_as(z).contiguous(),))[1]
            for e in directions
        ]
        return Rows(torch.stack(columns, -1), 0.0), self._seen(x, z)

    def _seen(self, x: State, z: Tensor) -> Tensor:
        return self.what.forward(self._walked(x, z)[0][-1])

    def _walked(self, x: State, z: Tensor) -> tuple[list[State], list[Tensor]]:
        shape, states, dws = self.steps.noise_shape(x), [], []
        for k, (root, w) in enumerate(
            zip(self._roots, z.chunk(len(self._roots), 1), strict=True), start=self.first
        ):
            dws.append(root * w.reshape(shape))
            states.append(x := self.steps.after(x, k, dws[-1]))
        return states, dws


class End(abc.ABC):
    """How paths come to what is seen."""

    @abc.abstractmethod
    def finishes(self, steps: GaussianSteps, x: State, seen: Sequence[Seen]) -> dict[int, Finish]:
        """The last steps to what is seen, by the index of the state before them."""

    def narrowed(
        self, steps: GaussianSteps, k: int, x: State, seen: Seen | None, tilt: Tilt, dw: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The noise of step k, where `seen` comes next, and log |∂ narrowed / ∂ dw|."""
        return dw, 0.0


class Pinned(End):
    """The last step is drawn from the chain's own step given what is seen; all others are tilted.

    Where the noise of one step does not reach what is seen, the last two, three or four steps are.
    """

    def finishes(  # noqa: D102
        self, steps: GaussianSteps, x: State, seen: Sequence[Seen]
    ) -> dict[int, Finish]:
        return finishes(steps, x, seen)


class ModifiedBridge(End):
    """Like `Pinned`, with the steps before narrowed as those of a bridge of Brownian motion are.

    By s_k² = (T - t_{k+1}) / (T - t_k) for a whole state, and for less in the directions that are
    seen; noise that does not reach what is seen in one step is left as it is. Otherwise paths are
    spread too widely for the last step: each number that is pinned costs a quarter of them.
    """

    def finishes(  # noqa: D102
        self, steps: GaussianSteps, x: State, seen: Sequence[Seen]
    ) -> dict[int, Finish]:
        return finishes(steps, x, seen)

    def narrowed(  # noqa: D102
        self, steps: GaussianSteps, k: int, x: State, seen: Seen | None, tilt: Tilt, dw: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        if seen is None or not isinstance(seen.what, Linear):
            return dw, 0.0
        t, end = steps.grid[k], steps.grid[seen.at]
        share = steps.h(k) / abs(end - t).item()
        ahead = tilt.foresight(seen.what, x, t, steps.grid[k + 1], end.item())
        if ahead is None and isinstance(seen.what, Terminal):
            return (1 - share) ** 0.5 * dw, dw[0].numel() / 2 * math.log1p(-share)
        if ahead is None:
            ahead = Finish(steps, k, k + 1, seen.what).reach(x, share**0.5), share
        z, log_det = ahead[0].narrowed(dw.flatten(1), ahead[1])
        return z.reshape(dw.shape), log_det


class Free(End):
    """Nothing is pinned: the steps of Euler-Maruyama with the tilted drift.

    Of what has a likelihood, log p(y | x) joins the weights. A singular event has none: then the
    weights are those of the steps alone, dP/dQ, and paths end near y as far as the tilt brings
    them there.
    """

    def finishes(  # noqa: D102
        self, steps: GaussianSteps, x: State, seen: Sequence[Seen]
    ) -> dict[int, Finish]:
        return {}


def placed(steps: GaussianSteps, observation: Observation) -> list[Seen]:
    """The observations in the order in which paths meet them."""
    grid, seen = steps.grid, []
    for t, what, rows in observation.parts(grid[-1].item()):
        at = int((grid - t).abs().argmin())
        if not abs(grid[at] - t) <= 1e-9 * abs(grid[-1] - grid[0]) or not at:
            raise KakusanError(
                f"{what} is seen at t={t:g}, which is not a time of the grid after its start; the "
                f"nearest is t={grid[max(at, 1)].item():g}"
            )
        seen.append(Seen(at, what, rows))
    return sorted(seen, key=lambda s: s.at)


def finishes(steps: GaussianSteps, x: State, seen: Sequence[Seen]) -> dict[int, Finish]:
    """The steps that meet linear observations, by the index of the state before them.

    Arguments:
        steps: The chain.
        x: States at its start, (B, *shape).
        seen: What is seen of it, in the order of time.

    Raises:
        NotElliptic: If the noise of the last steps does not reach what is seen.
    """
    out, free = {}, 0
    for at, what, _ in seen:
        if isinstance(what, Linear):
            finish = _shortest(steps, x, at, what, min(MOST, at - free))
            out[finish.first], free = finish, at
    return out


def settled(x: State, what: Linear, y: Tensor) -> State:
    """X with the numbers that are seen without noise set to y."""
    if isinstance(what, Terminal):
        return y.reshape(x.shape).contiguous()
    if isinstance(what, Coordinates) and not what.std:
        flat = x.flatten(1)
        return flat.index_copy(1, what.at.to(x.device) % flat.shape[1], y).reshape(x.shape)
    return x


def _shortest(steps: GaussianSteps, x: State, at: int, what: Linear, most: int) -> Finish:
    one = Finish(steps, at - 1, at, what)
    if not one.bad(x).any():
        return one
    # the start may be a special point: ask again where a free path has come to
    noise = Fresh(0)
    for k in range(at - most):
        t, s = steps.grid[k : k + 2].tolist()
        x = steps.after(x, k, noise.increment(k, t, s, steps.noise_shape(x), x))
    bad = torch.ones(len(x), dtype=torch.bool)
    for length in range(1, most + 1):
        finish = Finish(steps, at - length, at, what)
        if not (bad := finish.bad(x)).any():
            return finish
    raise NotElliptic(_unreached(what, most, bad))


def _unreached(what: Linear, length: int, bad: Tensor) -> str:
    return (
        f"the noise of {length} step{'s' * (length != 1)} does not reach what {what} sees (its "
        f"matrix is singular for {int(bad.sum())} of {len(bad)} paths): take more steps before "
        "it, see less of the state, or see it with a noise, std > 0"
    )


def _size(*numbers: Tensor) -> Tensor:
    """How large the numbers of each path are, (B, 1)."""
    return sum((v.flatten(1).abs().amax(1, keepdim=True) for v in numbers), torch.tensor(0.0))
