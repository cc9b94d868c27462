"""A process that can be conditioned."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.bridges.walks import check_inside
from kakusan.core import grids
from kakusan.core.noise import Keyed, Noise
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.finish import End, ModifiedBridge, placed
from kakusan.inference.conditioning.learned import BridgeTilt
from kakusan.inference.conditioning.paths import Conditioned, Expectation, conditioned
from kakusan.objectives.covering import Covering
from kakusan.objectives.malliavin import PathWeight, Window
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps

SLACK = 0.05  # standard deviations that are near anyhow


class Report(NamedTuple):
    """What training has to say.

    Attributes:
        explained: The share of the weights' mean square, beyond the pull, that the tilt explains
            on held-out paths. The rest is mostly the weights' own variance, which no tilt can.
        ess: The effective share of the last paths drawn towards the ends; 1 without ends.
        weights: The path weights that were used.
        iterations: Steps of the optimiser.
        paths: Paths that were simulated.
        seconds: How long it took.
    """

    explained: float
    ess: float
    weights: str
    iterations: int
    paths: int
    seconds: float


@dataclass(frozen=True)
class Bridge:
    """A process that can be conditioned: what `learn_bridge` returns.

    Attributes:
        tilt: ∇log p(Y = y | X_t = x), as a `Tilt`.
        steps: The chain it was learned on.
        values: What was told of values that paths came to, (n, j).
        guided: Whether it serves those alone that it was drawn towards.
        horizons: Whether it serves earlier ends.
        report: What training had to say.
    """

    tilt: BridgeTilt
    steps: GaussianSteps
    values: Tensor
    guided: bool = False
    horizons: bool = False
    report: Report | None = None

    def score(self, x: State, t: float | Time, y: Any) -> State:
        """∇_x log p(Y = y | X_t = x), like x; t is () or (B,), before the end."""
        t = self._checked(x, t)
        return self.tilt.score(x, t, self.tilt.observation.value(y, x))

    def control(self, x: State, t: float | Time, y: Any) -> Tensor:
        """Gᵀ∇_x log p(Y = y | X_t = x), in units of the noise."""
        t = self._checked(x, t)
        return self.tilt.control(x, t, self.tilt.observation.value(y, x))

    def _checked(self, x: State, t: float | Time) -> Time:
        """Times as a tensor; refuses what no tilt is known for."""
        shape, t = self.tilt.net.shape, torch.as_tensor(t, dtype=torch.float64)
        if x.ndim < 1 or tuple(x.shape[1:]) != shape:
            raise KakusanError(f"states are (B, {', '.join(map(str, shape))}), got "
                               f"{tuple(x.shape)}: x[None] makes one state a batch")  # fmt: skip
        first, arrow = self.steps.grid[0].item(), self.steps.sde.direction
        inside = ((t - first) * arrow >= 0) & ((self.tilt.end - t) * arrow > 0)
        if not inside.all():
            raise KakusanError(f"t={t.flatten().tolist()[:4]} is not within the times of this "
                               f"bridge, from {first:g} to before {self.tilt.end:g}")  # fmt: skip
        if not x.isfinite().all():
            raise KakusanError("states must be finite")
        return t

    def until(self, end: float) -> Bridge:
        """The bridge that ends earlier; learned with `horizons=True`."""
        if not self.horizons and end != self.tilt.end:
            raise KakusanError(
                f"this bridge ends at t={self.tilt.end:g} alone; learn_bridge(..., horizons=True) "
                "serves all earlier ends"
            )
        start, last = self.steps.grid[0].item(), self.steps.grid[-1].item()
        if not 0 < (end - start) * (last - start) <= (last - start) ** 2:
            raise KakusanError(f"a bridge ends after t={start:g} and up to t={last:g}, not {end}")
        base = self.tilt.base.until(end)
        tilt = BridgeTilt(base, self.tilt.observation, self.tilt.net, end, self.tilt.steps)
        share = (end - start) / (last - start)
        grid = grids.uniform(start, end, max(1, round(share * len(self.steps))))
        return Bridge(tilt, self._along(grid), self.values, self.guided, True, self.report)

    def sample(
        self,
        x0: Tensor,
        y: Any,
        n: int = 1000,
        *,
        steps: int | None = None,
        grid: Tensor | None = None,
        end: End | None = None,
        seed: int = 0,
        noise: Noise | None = None,
        keep: bool = True,
    ) -> Conditioned:
        """Draws n paths from x0 given Y = y, with the weights that make their law exact.

        Arguments:
            x0: Where they start: a state (*shape), or n of them.
            y: The value: one for all, or (n, k).
            n: How many.
            steps: A number of equal steps instead of those it was learned on.
            grid: Times instead.
            end: How they come to y; `ModifiedBridge()` by default: in y exactly, narrowed before.
            seed: Fixes each path, whatever n.
            noise: Where the numbers come from, instead of a seed.
            keep: Whether to keep all states or the last alone.
        """
        shape = self.tilt.net.shape
        if not isinstance(n, int) or n < 1:
            raise KakusanError(f"n must be a whole number of at least 1, got {n!r}")
        if end is not None and not isinstance(end, End):
            raise KakusanError(f"end is Pinned(), ModifiedBridge() or Free(), got {end!r}")
        x = torch.as_tensor(x0)
        x = x.expand(n, *shape) if tuple(x.shape) == shape else x
        if tuple(x.shape) != (n, *shape) or not x.is_floating_point():
            raise KakusanError(
                f"a start is a state of shape {shape}, or {n} of them, in floating point; got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise KakusanError("the start must be finite")
        if steps is not None:
            grid = grids.uniform(self.steps.grid[0].item(), self.steps.grid[-1].item(), steps)
        chain = self.steps if grid is None else self._along(grid)
        observe = self.tilt.observation
        values = observe.value(y, x)
        check_inside(chain, observe, values, x)
        self._warn(values)
        with torch.no_grad():
            return conditioned(
                chain, x.contiguous(), self.tilt, observe, values, noise=noise or Keyed(seed),
                end=end or ModifiedBridge(), keep=keep,
            )  # fmt: skip

    def measured_score(
        self, x: Tensor, t: float, y: Any, n: int = 20_000, *, seed: int = 0,
        weights: PathWeight | Covering | None = None,
    ) -> Expectation:  # fmt: skip
        r"""∇_x log p(Y = y | X_t = x) at one state from n paths, with a standard error.

        The network is left with the place of a guide: Σ w S / Σ w, over paths from (t, x) to y
        with weights w and with path weights S, is exact for the chain whatever guided them. For
        the few states where the score itself is wanted, not paths.

        Arguments:
            x: The state, (*shape).
            t: Its time, on the clock of the process.
            y: The value.
            n: How many paths.
            seed: Fixes them.
            weights: What is averaged; `Window()` by default, of the length of least variance.

        Raises:
            KakusanError: If t is not before the end.
            NotElliptic: If G has no inverse, without `Covering()` for weights.

        Example:
            >>> from kakusan import Brownian
            >>> from kakusan.bridges import learn_bridge
            >>> bridge = learn_bridge(Brownian(), torch.zeros(1), iterations=1, steps=10)
            >>> found = bridge.measured_score(torch.tensor([0.5]), 0.5, 2.0, 100)
            >>> found.value  # (y - x) / (T - t)
            tensor([3.], dtype=torch.float64)
        """
        grid, arrow = self.steps.grid, self.steps.sde.direction
        x = torch.as_tensor(x, dtype=torch.float64)
        if tuple(x.shape) != self.tilt.net.shape:
            raise KakusanError(f"x is one state of shape {self.tilt.net.shape}, got "
                               f"{tuple(x.shape)}")  # fmt: skip
        if not 0 < (self.tilt.end - t) * arrow <= abs(self.tilt.end - grid[0].item()):
            raise KakusanError(
                f"t={t:g} is not a time of this bridge, from {grid[0]:g} to before "
                f"{self.tilt.end:g}"
            )
        later = grid[(grid - t) * arrow > 1e-9]
        grid = None if t == grid[0] else torch.cat([grid.new_tensor([t]), later])
        chain = self.steps if grid is None else self._along(grid)
        paths = self.sample(x, y, n, grid=grid, seed=seed)
        last = placed(chain, self.tilt.observation)[0].at
        weights = (weights or Window()).chosen(chain, paths.path, last)
        S = weights(chain, paths.path, [0], last)[0]
        return paths.expectation(lambda _: S)

    def _along(self, grid: Tensor) -> GaussianSteps:
        """Steps of the same kind along other times."""
        if not isinstance(self.steps, EulerSteps):
            raise KakusanError(
                f"{type(self.steps).__name__} are steps along one grid, that of their process"
            )
        return type(self.steps)(self.steps.sde, grid)

    def _warn(self, y: Tensor) -> None:
        """Says so where a value is far from all that paths came to."""
        told = self.tilt.observation.told(y[:64]).float().cpu()
        scale = self.tilt.net.y_std.cpu()
        known = self.values / scale
        gap, usual = nearest(told / scale, known), 0.0
        if len(known) > 2:
            usual = nearest(known[:512], known[512:] if len(known) > 1024 else known[1:]).max()
        if gap.max() > 3 * usual + SLACK:
            i = int(gap.argmax())
            kind = "the values it was learned for" if self.guided else "all that paths came to"
            warnings.warn(
                f"the value {[round(v, 4) for v in y[i].tolist()[:6]]} is {gap.max():.3g} "
                f"standard deviations away from {kind}, where nothing was learned: look at the "
                "effective sample size, and learn_bridge(..., ends=y) draws paths towards it",
                stacklevel=3,
            )


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """The distance of each row of a to the nearest row of b."""
    return torch.cdist(a, b).amin(1)
