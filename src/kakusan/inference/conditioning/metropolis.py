r"""Paths of equal weight given what was seen, by a Markov chain on paths.

A path of `conditioned` is a function of the normal numbers z it was made of, and its weight w(z)
is the density of the conditioned law against theirs. So a chain on z that leaves N(0, 1) alone,

.. math:: z' = \sqrt{1 - \beta^2} \, z + \beta \, \zeta, \qquad \zeta \sim N(0, 1),

and accepts z' with probability min(1, w(z') / w(z)), has the conditioned law as its limit, however
poor the tilt is: a poor one costs sweeps, where it would cost weights most of their worth.
(β = 1 proposes a path of its own each time.)

References:
    MCMC methods for functions: modifying old algorithms to make them faster (Cotter et al., 2013)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kakusan.core.noise import Fresh, Noise, generator, mix
from kakusan.core.types import State
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.paths import Conditioned, End, conditioned
from kakusan.inference.conditioning.tilts import Tilt
from kakusan.processes.observations import Observation
from kakusan.solvers.gaussian import GaussianSteps

MOVES, CHOICES = 18, 19  # separate these uses of a seed from all others


@dataclass(frozen=True, eq=False)
class Moved(Conditioned):
    """Paths that were moved until they have the conditioned law; all weights are equal.

    Attributes:
        acceptance: The share of proposals that each path accepted, (n,).
    """

    acceptance: Tensor


class Normals(Noise):
    """Normal numbers that are drawn once, kept, and moved afterwards.

    Arguments:
        source: Where they come from.
    """

    def __init__(self, source: Noise) -> None:
        self.source, self.z = source, dict[int, Tensor]()

    def normal(  # noqa: D102
        self, step: int, shape: tuple[int, ...], like: Tensor, std: float = 1.0
    ) -> Tensor:
        if step not in self.z:
            self.z[step] = self.source.normal(step, shape, like)
        return std * self.z[step]

    def moved(self, beta: float, source: Noise) -> Normals:
        """Each number turned towards a new one."""
        out = Normals(source)
        keep = (1 - beta**2) ** 0.5
        for k, z in self.z.items():
            out.z[k] = keep * z + source.normal(k, tuple(z.shape), z, beta)
        return out

    def take(self, other: Normals, rows: Tensor) -> None:
        """Takes some rows of another's numbers."""
        for k, z in self.z.items():
            z[rows] = other.z[k][rows]


def metropolis(
    steps: GaussianSteps,
    x: State,
    tilt: Tilt,
    observation: Observation,
    y: Tensor,
    *,
    n: int,
    sweeps: int,
    beta: float = 0.3,
    seed: int = 0,
    end: End | None = None,
) -> Moved:
    """Paths of equal weight given what is seen: n independent chains of paths.

    Arguments:
        steps: The chain.
        x: One state at steps.grid[0], (1, *shape), or one for each path, (n, *shape).
        tilt: What pulls paths to y.
        observation: What is seen.
        y: The value seen, (1, k) or (n, k).
        n: How many paths.
        sweeps: How often all of them are moved: enough for each to be accepted several times.
        beta: How far a proposal moves, in (0, 1]; less where few are accepted.
        seed: Where the numbers come from.
        end: How paths come to y; `Pinned()` by default.

    Raises:
        KakusanError: If arguments are no good, or some paths never met what was seen.

    Example:
        >>> from kakusan import Brownian, grids
        >>> from kakusan.inference.conditioning.tilts import Untilted
        >>> from kakusan.processes.observations import Terminal
        >>> from kakusan.solvers.gaussian import EulerSteps
        >>> brownian = Brownian()
        >>> steps = EulerSteps(brownian, grids.uniform(0.0, 1.0, 4))
        >>> paths = metropolis(
        ...     steps, torch.zeros(1, 1), Untilted(brownian), Terminal(), torch.ones(1, 1),
        ...     n=1000, sweeps=20, beta=0.7)
        >>> round(paths.expectation(lambda x: x[2]).value.item(), 1)  # half way at half time
        0.5
    """
    if n < 1 or sweeps < 1 or not 0 < beta <= 1:
        raise KakusanError(
            "metropolis takes n >= 1 paths, sweeps >= 1 and beta in (0, 1], got "
            f"n={n}, sweeps={sweeps} and beta={beta}"
        )
    if x.ndim < 2 or len(x) not in (1, n):
        raise KakusanError(
            f"{n} paths start at one state, (1, *shape), or at {n}; got shape {tuple(x.shape)}"
        )
    x = x.expand(n, *x.shape[1:])

    def drawn(noise: Noise, keep: bool) -> Conditioned:
        with torch.no_grad():
            return conditioned(steps, x, tilt, observation, y, noise=noise, end=end, keep=keep)

    now = Normals(Fresh(seed))
    log_w = drawn(now, keep=False).log_weights
    accepted = torch.zeros_like(log_w)
    for sweep in range(sweeps):
        then = now.moved(beta, Fresh(mix(seed, MOVES, sweep)))
        proposed = drawn(then, keep=False).log_weights
        choice = generator(seed, CHOICES, sweep, device=log_w.device)
        u = torch.rand(n, generator=choice, dtype=log_w.dtype, device=log_w.device)
        # not (<=), so that paths that weigh nothing wander until they weigh something
        yes = ~(proposed - log_w <= u.log())
        now.take(then, yes)
        log_w, accepted = torch.where(yes, proposed, log_w), accepted + yes
    lost = log_w == -torch.inf
    if lost.any():
        raise KakusanError(
            f"{int(lost.sum())} of {n} paths have not met {observation} in {sweeps} sweeps: take "
            "more of them, or a tilt that pulls paths there"
        )
    paths = replace(drawn(now, keep=True), log_weights=torch.zeros_like(log_w), estimates=False)
    return Moved(**vars(paths), acceptance=accepted / sweeps)
