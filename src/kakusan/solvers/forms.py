r"""What kind of noise an SDE has: the question on which strong orders hang.

With G_j the columns of G, the expansion of a step holds the iterated integrals of the noise, each
beside a derivative (∂G_j) G_i of column j along column i:

===============  ===============================================  ==============================
form             means                                            iterated integrals needed
===============  ===============================================  ==============================
``ADDITIVE``     G(t) does not depend on the state                none
``SCALAR``       one Brownian motion, m = 1                       known from w
``DIAGONAL``     diag(g) with g_i a function of x_i alone         known from w
``COMMUTATIVE``  (∂G_j) G_i = (∂G_i) G_j for all i, j             only in sums known from w
``GENERAL``      anything else                                    Lévy's areas, hard to draw
===============  ===============================================  ==============================

`noise_form` decides by derivatives of G along random directions, at the given states and at states
near them: a form that holds there by accident only has probability zero. The random numbers are
the same each time.

References:
    Numerical Solution of Stochastic Differential Equations (Kloeden and Platen, 1992), 10.3
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from kakusan.core.noise import generator
from kakusan.core.operators import Scale
from kakusan.core.types import State, Time
from kakusan.processes.sde import SDE


class NoiseForm(enum.Enum):
    """The forms of noise, from the simplest to the most general; see the head of this module."""

    ADDITIVE = "additive"
    SCALAR = "scalar"
    DIAGONAL = "diagonal"
    COMMUTATIVE = "commutative"
    GENERAL = "general"


_ORDER = list(NoiseForm)


@torch.no_grad()
def noise_form(sde: SDE, x: State, t: Time) -> NoiseForm:
    """The form of an SDE's noise, judged at some states and near them; an ODE counts as additive.

    Arguments:
        sde: The process.
        x: States to judge at, (B, *shape); what is not finite there is ignored.
        t: The time.

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> x, t = torch.tensor([[0.5, -1.0]]), torch.tensor(0.0)
        >>> noise_form(SDE.of(lambda x, t: -x, lambda x, t: Diagonal(1 + x**2)), x, t).value
        'diagonal'
        >>> noise_form(SDE.of(lambda x, t: -x, lambda x, t: Diagonal(1 + x.flip(1))), x, t).value
        'general'
    """
    source, x = generator(0), x.detach().contiguous()
    # the start may be a special place, or an edge beyond which G is not finite
    away = 0.1 * (x.abs() + 0.1) * _normal(source, x.shape, x).abs()
    return max((_form_at(sde, y, t, source) for y in (x, x + away, x - away)), key=_ORDER.index)


def form_along(sde: SDE, x: State, grid: Tensor) -> NoiseForm:
    """The most general form at the first time of a grid, the one in the middle and the last."""
    times = {0: grid[0], len(grid) // 2: grid[len(grid) // 2], len(grid) - 1: grid[-1]}
    return max((noise_form(sde, x, t) for t in times.values()), key=_ORDER.index)


def _form_at(sde: SDE, x: State, t: Time, source: torch.Generator) -> NoiseForm:
    G = sde.diffusion(x, t)
    if G.deterministic:
        return NoiseForm.ADDITIVE
    shape = G.noise_shape(x)
    u, v = (_normal(source, shape, x) for _ in range(2))
    y, z = ((1 + x.abs()) * _normal(source, x.shape, x) for _ in range(2))

    def moved(p: State, noise: Tensor) -> State:
        return sde.diffusion(p, t).mv(noise).reshape(x.shape)

    def along(direction: State, noise: Tensor) -> State:
        return torch.func.jvp(lambda p: moved(p, noise), (x,), (direction,))[1]

    Gu = moved(x, u)
    if _small(along(y, u), Gu):
        return NoiseForm.ADDITIVE
    if u[0].numel() == 1:
        return NoiseForm.SCALAR
    if isinstance(G, Scale):
        one = torch.ones_like(u)
        # a diagonal matrix is one number a coordinate, whatever the direction
        a, b = along(y, one) * z, along(z, one) * y
        if _small(a - b, a.abs() + b.abs()):
            return NoiseForm.DIAGONAL
    a, b = along(Gu, v), along(moved(x, v), u)
    return NoiseForm.COMMUTATIVE if _small(a - b, a.abs() + b.abs()) else NoiseForm.GENERAL


def _normal(source: torch.Generator, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=source, dtype=like.dtype).to(like.device)


def _small(a: Tensor, beside: Tensor) -> bool:
    """Whether a is rounding error, sample by sample; what is not finite is ignored."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    a, beside = (v.abs().flatten(1).amax(1) for v in (a, beside))
    # NaN and infinity compare as false
    return not bool((a > tolerance * beside)[a.isfinite() & beside.isfinite()].any())
