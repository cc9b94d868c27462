r"""Steps that follow the path: methods of high strong order.

f is the drift, G_j are the columns of G, w is the increment and z = ∫ w du the area under the
path. Everything counts elapsed time: f h is the displacement by the drift whatever the sign of
h = s - t, and the noise sees a = |h|. Itô's iterated integrals of one Brownian motion are
I11 = (w² - a) / 2, I111 = (w³ - 3 a w) / 6 and I10 = z; those of several are polynomials in w and
z only as far as `forms.NoiseForm` says, and that decides who may step.

References:
    Runge-Kutta methods for the strong approximation of solutions of stochastic differential
        equations (Rößler, 2010), doi 10.1137/09076636X
    Numerical Solution of Stochastic Differential Equations (Kloeden and Platen, 1992), 10.3
"""

from typing import Any

import torch
from torch import Tensor

from kakusan.core.calculus import noise_drift
from kakusan.core.noise import Wants
from kakusan.core.operators import Operator
from kakusan.core.types import State, Time, advanced, elapsed
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.solvers.forms import NoiseForm, form_along
from kakusan.solvers.solve import Method


def moved(G: Operator, z: Tensor, x: State) -> State:
    """G z, with the shape of the state."""
    return G.mv(z).reshape(x.shape)


def beside(z: Tensor, x: State) -> Tensor:
    """Numbers of the noise beside the state: one a coordinate, or one a sample."""
    return z if z.shape == x.shape else z.reshape(len(x), *(1,) * (x.ndim - 1))


class Milstein(Method):
    r"""Euler's step and the first iterated integrals: strong order 1 for commutative noise.

    .. math:: x + f h + G \, dw + \tfrac12 \Big( \partial_{G dw} [G \, dw]
              - |h| \sum_j \partial_{G_j} [G_j] \Big)

    Derivatives are exact, by forward mode. Scalar and diagonal noise takes one; commutative noise
    one and one a column; additive noise none, and is Euler's step.
    """

    def init(self, sde: SDE, x: State, grid: Tensor) -> NoiseForm:
        """The form of the noise; refuses general noise."""
        form = form_along(sde, x, grid)
        if form is NoiseForm.GENERAL:
            raise KakusanError(
                "Milstein takes commutative noise, and the columns of this G do not commute: its "
                "strong order 1 would need Lévy's areas. EulerMaruyama follows paths of any noise "
                "with order 1/2; for laws StratonovichHeun, or WeakSecond with order 2"
            )
        return form

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: NoiseForm
    ) -> tuple[State, NoiseForm]:
        """One step."""
        h = elapsed(t, s)
        x_s = advanced(x, sde.drift(x, t), h)
        if dw is None:
            return x_s, state
        G = sde.diffusion(x, t)
        if state is NoiseForm.ADDITIVE:
            return G.kick(x_s, dw), state
        if state is NoiseForm.COMMUTATIVE:
            Gdw = moved(G, dw, x)
            trace = noise_drift(sde.diffusion, x, t, tuple(dw.shape))
            bend = _along(sde, x, t, Gdw, dw) - abs(h) * trace
            return x_s + Gdw + bend / 2, state
        one = torch.ones_like(dw)
        g, w = moved(G, one, x), beside(dw, x)
        return x_s + g * w + _along(sde, x, t, g, one) * ((w * w - abs(h)) / 2), state


def _along(sde: SDE, x: State, t: Time, direction: State, z: Tensor) -> State:
    """The derivative of G z along a direction."""
    return torch.func.jvp(lambda y: moved(sde.diffusion(y, t), z, y), (x,), (direction,))[1]


class StratonovichHeun(Method):
    r"""Heun's step on drift and diffusion, read in the sense of Stratonovich.

    .. math:: \tilde x = x + f h + G \, dw, \qquad
              x + \tfrac12 (f + \tilde f) h + \tfrac12 (G + \tilde G) \, dw

    Strong order 1 for commutative noise and 1/2 for any other; weak order 1, and 2 for additive
    noise and for ODEs. `solve` subtracts ½ Σ_j (∂G_j) G_j from the drift of Itô, which takes one
    derivative a column and evaluation; a process that is Stratonovich's already costs none.
    """

    stratonovich = True

    def step(
        self, sde: SDE, x: State, t: Time, s: Time, dw: Tensor | None, state: Any
    ) -> tuple[State, Any]:
        """One step: predict by Euler, then average drift and diffusion of both ends."""
        h = elapsed(t, s)
        f = sde.drift(x, t)
        if dw is None:
            return advanced(x, f + sde.drift(advanced(x, f, h), s), h / 2), state
        Gdw = moved(sde.diffusion(x, t), dw, x)
        end = advanced(x, f, h) + Gdw
        kick = (Gdw + moved(sde.diffusion(end, s), dw, x)) / 2
        return advanced(x + kick, f + sde.drift(end, s), h / 2), state


class SRK(Method):
    r"""Rößler's stochastic Runge-Kutta methods of strong order 3/2: SRA1 and SRI1W1.

    SRA1 is for additive noise, with two evaluations of f and of G; SRI1W1 for scalar and diagonal
    noise, with two of f and four of G. For an ODE both are Ralston's method of order 2. SRA1 has
    weak order 2; SRI1W1 in general only 3/2 (for dX = X dt + dW, dY = X² dW one step errs in E[XY]
    by h^(5/2)), and 2 where G is linear. The areas under the path come from `CounterWithArea`,
    `Fresh`, `Keyed`, or `Recorded(dw, times, dz)`.
    """

    wants = Wants.AREA

    def init(self, sde: SDE, x: State, grid: Tensor) -> NoiseForm:
        """The form of the noise; refuses all but additive, scalar and diagonal noise."""
        form = form_along(sde, x, grid)
        if form in (NoiseForm.COMMUTATIVE, NoiseForm.GENERAL):
            best = (
                "Milstein follows paths of commutative noise with order 1"
                if form is NoiseForm.COMMUTATIVE
                else "EulerMaruyama follows paths of any noise with order 1/2"
            )
            raise KakusanError(
                "SRK takes noise that is additive, scalar (one Brownian motion) or diagonal "
                f"(with g_i a function of x_i alone), and this noise is {form.value}. {best}; "
                "WeakSecond has order 2 for laws"
            )
        return form

    def step(
        self,
        sde: SDE,
        x: State,
        t: Time,
        s: Time,
        dw: tuple[Tensor, Tensor] | None,
        state: NoiseForm,
    ) -> tuple[State, NoiseForm]:
        """One step."""
        fh = elapsed(t, s) * sde.drift(x, t)
        if dw is None:
            return self._ended(sde, x, t, s, fh, x + fh * 0.75, 0.0), state
        if state is NoiseForm.ADDITIVE:
            return self._additive(sde, x, t, s, fh, *dw), state
        return self._one_by_one(sde, x, t, s, fh, *dw), state

    def _ended(
        self, sde: SDE, x: State, t: Time, s: Time, fh: State, stage: State, kick: State | float
    ) -> State:
        """X + (f h + 2 f(stage) h) / 3 + kick."""
        f = sde.drift(stage, t + (s - t) * 0.75)
        return x + (fh + 2 * elapsed(t, s) * f) / 3 + kick

    def _additive(
        self, sde: SDE, x: State, t: Time, s: Time, fh: State, w: Tensor, z: Tensor
    ) -> State:
        """SRA1."""
        mean = z / abs(elapsed(t, s))
        G_t, G_s = sde.diffusion(x, t), sde.diffusion(x, s)
        stage = G_s.kick(x + 0.75 * fh, 1.5 * mean)
        kick = moved(G_s, w - mean, x) + moved(G_t, mean, x)
        return self._ended(sde, x, t, s, fh, stage, kick)

    def _one_by_one(
        self, sde: SDE, x: State, t: Time, s: Time, fh: State, w: Tensor, z: Tensor
    ) -> State:
        """SRI1W1, where each coordinate has one Brownian motion, its own or that of all."""
        one, a, quarter = torch.ones_like(w), abs(elapsed(t, s)), t + (s - t) * 0.25
        root = a**0.5

        def g(y: State, u: Time) -> State:
            return moved(sde.diffusion(y, u), one, x)

        g1 = g(x, t)
        g2 = g(x + fh / 4 + root / 2 * g1, quarter)
        g3 = g(x + fh - root * g1, s)
        g4 = g(x + fh / 4 + root * (3 * g2 - 5 * g1 + g3 / 2), quarter)
        w, z = beside(w, x), beside(z, x)
        I10, I11, I111 = z / a, (w * w - a) / (2 * root), (w * w / (6 * a) - 0.5) * w
        kick = (
            g1 * (2 * I10 - w - I11 - 2 * I111)
            + g2 * ((w + I11 - I10) * (4 / 3) + I111 * (5 / 3))
            + g3 * ((2 * w - I11 - 2 * I10 - 2 * I111) / 3)
            + g4 * I111
        )
        return self._ended(sde, x, t, s, fh, x + 0.75 * fh + 1.5 * I10 * g1, kick)
