r"""A step for laws rather than paths: weak order 2 without derivatives.

Means of functions of X need no Brownian increments, only numbers with their moments up to the
fifth: w_j = ±sqrt(3a) with probability 1/6 each, else 0, with a = |h|. With f h the displacement
by the drift and Gw the kick, all steps here average the drift over both ends,
½ h (f + f(x + f h + Gw)), and differ in how they differentiate G.

Scalar and diagonal noise (Kloeden and Platen 15.1.1), with y± = x + f h ± sqrt(a) g:

.. math:: \tfrac14 (g(y_+) + 2 g + g(y_-)) \, w
          + \tfrac14 (g(y_+) - g(y_-)) \, (w^2 - a) / \sqrt a .

Any other noise wants, in the sum Σ_ij J_ij ∂_{G_i} G_j, numbers J_ij with the moments of the
iterated integrals: besides ½ (w_i w_j - a δ_ij) an antisymmetric part in the place of Lévy's
areas. With signs e_j = ±1, independent of w and of each other, and η = sqrt(a) e,

.. math:: J_{ij} = \tfrac12 (w_i w_j - a \delta_{ij})
                   + \tfrac{1}{\sqrt 8} (w_i \eta_j - \eta_i w_j)

has them: E[J_ij J_kl] = a²/2 where (i, j) = (k, l), else 0, and E[J_ij w_k w_l] is that of the
symmetric part. J has rank 3, so its columns P_j = Σ_i G_i J_ij take Gw, Gη and G_j alone, and
2 m + 3 evaluations of G make the step, as in Abdulle, Vilmart and Zygalakis:

.. math:: \tfrac12 \sum_j (G_j(x + P_j) - G_j(x - P_j))
          + \tfrac12 (G(y + k) + G(y - k)) \, w, \qquad
          y = x + \tfrac12 f h, \quad k = \sqrt{a/2} \, G e .

References:
    Numerical Solution of Stochastic Differential Equations (Kloeden and Platen, 1992), 15.1
    Weak second order explicit stabilized methods for stiff stochastic differential equations
        (Abdulle, Vilmart and Zygalakis, 2013), doi 10.1137/12088954X
"""

import functools

import torch
from torch import Tensor

from kakusan.core.noise import Wants, Weak
from kakusan.core.operators import Operator
from kakusan.core.types import State, Time, advanced, elapsed, is_tracing
from kakusan.processes.sde import SDE
from kakusan.solvers.forms import NoiseForm, form_along
from kakusan.solvers.solve import Method
from kakusan.solvers.strong import beside, moved


class WeakSecond(Method):
    """Weak order 2 for any noise, without derivatives of f or G.

    Evaluates f twice, and G twice for additive noise, three times for scalar and diagonal noise,
    2 m + 3 times for any other noise of m numbers.
    """

    wants = Wants.WEAK

    def init(self, sde: SDE, x: State, grid: Tensor) -> NoiseForm:
        """The form of the noise."""
        return form_along(sde, x, grid)

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Weak | None, state: NoiseForm
    ) -> tuple[State, NoiseForm]:
        """One step."""
        h = elapsed(t, s)
        f = sde.drift(x, t)
        x_f = advanced(x, f, h)
        if dw is None:
            return advanced(x, f + sde.drift(x_f, s), h / 2), state
        (w, signs), G = dw, sde.diffusion(x, t)
        f_s = sde.drift(G.kick(x_f, w), s)
        if state is NoiseForm.ADDITIVE:
            kick = (moved(G, w, x) + moved(sde.diffusion(x, s), w, x)) / 2
        elif state in (NoiseForm.SCALAR, NoiseForm.DIAGONAL):
            kick = _one_by_one(sde, x_f, s, abs(h), G, w)
        else:
            areas = state is NoiseForm.GENERAL
            kick = _twisted(sde, x, t, abs(h), G, w, signs if areas else None)
            middle = advanced(x, f, h / 2)
            k = (abs(h) / 2) ** 0.5 * moved(G, signs, x)
            at = (t + s) / 2
            kick = kick + moved(sde.diffusion(middle + k, at), w, x) / 2
            kick = kick + moved(sde.diffusion(middle - k, at), w, x) / 2
        return advanced(x + kick, f + f_s, h / 2), state


def _one_by_one(sde: SDE, x_f: State, s: Time, a: float | Tensor, G: Operator, w: Tensor) -> State:
    """The kick where each coordinate has one Brownian motion, its own or that of all."""
    one, root = torch.ones_like(w), a**0.5
    g, w = moved(G, one, x_f), beside(w, x_f)
    up = moved(sde.diffusion(x_f + root * g, s), one, x_f)
    down = moved(sde.diffusion(x_f - root * g, s), one, x_f)
    return ((up + 2 * g + down) * w + (up - down) * ((w * w - a) / root)) / 4


def _twisted(
    sde: SDE, x: State, t: Time, a: float | Tensor, G: Operator, w: Tensor, e: Tensor | None
) -> State:
    """Σ_ij J_ij ∂_{G_i} G_j, by central differences; commutative noise needs no signs e."""
    m = w[0].numel()
    basis = torch.eye(m, dtype=x.dtype, device=x.device).reshape(m, 1, *w.shape[1:])
    columns = [each.expand(w.shape) for each in basis]
    Gw, flat = moved(G, w, x), w.reshape(len(x), m)
    turns = [beside(flat[:, j], x) for j in range(m)]
    shifts = [(turns[j] * Gw - a * moved(G, columns[j], x)) / 2 for j in range(m)]
    if e is not None:
        Geta, signs = moved(G, e, x), e.reshape(len(x), m)
        c = (a / 8) ** 0.5
        shifts = [
            shifts[j] + c * (beside(signs[:, j], x) * Gw - turns[j] * Geta) for j in range(m)
        ]
    return _differences(sde, x, t, shifts, columns)


def _differences(sde: SDE, x: State, t: Time, shifts: list[State], columns: list[Tensor]) -> State:
    """½ Σ_j (G(x + shift_j) - G(x - shift_j)) column_j."""
    if is_tracing():
        # a compiler fuses them, and must see the samples stay apart
        each = [
            moved(sde.diffusion(x + P, t), c, x) - moved(sde.diffusion(x - P, t), c, x)
            for P, c in zip(shifts, columns, strict=True)
        ]
        return functools.reduce(torch.add, each) / 2
    P, c, m = torch.cat(shifts), torch.cat(columns), len(shifts)
    many = x.repeat(m, *(1,) * (x.ndim - 1))
    times = t.repeat(m) if t.ndim == 1 else t
    up, down = (moved(sde.diffusion(y, times), c, many) for y in (many + P, many - P))
    return (up - down).reshape(m, *x.shape).sum(0) / 2
