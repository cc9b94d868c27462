r"""The tilt of a process made linear where it stands: for noise that takes a way round.

With J = ∇f, D = GGᵀ and the drift f at (x, t) itself, each state has a linear process of its own,

.. math:: d\tilde X = [f + J (\tilde X - x)] \, ds + G \, dW, \qquad
          \tilde X_T \mid x \sim N(m, Q), \quad \tau = |T - t|,

.. math:: m = x + \int_0^\tau e^{Js} f \, ds, \qquad
          Q = \int_0^\tau e^{Js} D e^{J^\top s} ds, \qquad E = e^{J\tau},

and what is seen of it, Y = H X_T + std eps, pulls by

.. math:: \nabla \log h = w \, E^\top H^\top (H Q H^\top + std^2)^{-1} (y - H m) .

J carries noise to where G has none: a voltage that is driven by a noisy current, a position whose
momentum is kicked. There the pull grows as τ^(-3/2) or faster, at a rate that depends on the
state, which is more than a constant G or one linear process for all states can say.

The factor w in [0, 1] is 1 for a process that is linear, and says how far to look. Where the mean
comes to, the drift is f(m) and not f + J (m - x), and the difference r would move X_T by about
r τ / 2. Beside the spread it has there this is a number e, and

.. math:: w = \frac{1}{1 + (e / 2)^2}, \qquad
          e^2 = \sum_i \frac{(\tau r_i / 2)^2}{Q_{ii}} .

As e falls at least as τ^(3/2), near the end w is 1. A horizon in time would have to be chosen for
each process, and by the state: a stable one may be looked at from afar, an unstable one not, and a
nerve is both in turn.

E, m and Q are sums of powers of J over a short time, doubled as in `zoo.laws.linear_kernel`; for
states of a few numbers.

References:
    Improved bridge constructs for stochastic differential equations (Whitaker et al., 2017)
    Guided proposals for simulating multi-dimensional diffusion bridges (Schauer et al., 2017)
    Simulation of elliptic and hypo-elliptic conditional diffusions (Bierkens et al., 2020)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from kakusan.core.operators import NotElliptic
from kakusan.core.types import State, Time, as_time
from kakusan.inference.conditioning.linear import where_next
from kakusan.inference.conditioning.reach import Reach, Rows
from kakusan.inference.conditioning.tilts import LinearLaw
from kakusan.inference.conditioning.views import between, scaled_root
from kakusan.processes.observations import Linear, Observation
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito

BEND = 2.0  # the error of the mean, in standard deviations, at which half of the pull is left
DEGREE = 12  # of the powers of J, over a time in which |J| is at most a quarter
DOUBLINGS = 24  # at most: rounding doubles with each


class Linearised(LinearLaw):
    """The tilt of the process made linear at (x, t), for each row its own.

    Of a `Series` the next linear observation pulls. Observations that are not linear (`Event`,
    `Label`) and those that are past do not: their control is 0.

    Arguments:
        sde: Any process whose drift has a derivative; in the sense of Itô unless it is a
            `Stratonovich`.
        observation: What is seen.
        end: When the end is seen; the end of the span of `sde` by default.

    Raises:
        NotElliptic: When asked, if noise does not reach what is seen exactly, not even by way of
            the drift.

    Example:
        >>> from kakusan import Underdamped
        >>> from kakusan.processes.observations import Coordinates
        >>> kinetic = Underdamped(lambda q: 0 * q.sum(1), friction=1.0)
        >>> pull = Linearised(kinetic, Coordinates([0]))  # a position, whose momentum is kicked
        >>> t = torch.tensor(0.9, dtype=torch.float64)
        >>> pull.control(torch.tensor([[0.0, 0.0]]), t, torch.tensor([[0.1]]))
        tensor([[ 0.0000, 21.7444]])
    """

    def __init__(self, sde: SDE, observation: Observation, end: float | None = None) -> None:
        self.sde, self.observation = ito(sde), observation
        self.end = float(self.sde.span[1] if end is None else end)
        self._seen: tuple[State, Time, Slopes] | None = None
        self._looked: tuple[Slopes, float, Looks] | None = None

    def until(self, end: float) -> Linearised:
        """The same for another end."""
        twin = super().until(end)
        twin._looked = None  # a twin may go along another grid
        return twin

    def score(self, x: State, t: Time, y: Tensor) -> State:  # noqa: D102
        return self._pulled(x, t, y, behind=False)

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        # noise of a step moves the state behind it: see `views`
        pulled = self._pulled(x, t, y, behind=self.grid is not None)
        return self.sde.diffusion(x, t).tmv(pulled)

    def _pulled(self, x: State, t: Time, y: Tensor, behind: bool) -> State:
        """The slope of log h at x, or behind the next step."""
        self.observation.size(x)  # a Series counts the numbers of its parts
        direction, t = self.sde.direction, as_time(t)
        parts = sorted(self.observation.parts(self.end), key=lambda part: part[0])[::direction]
        linear = [(s, seen, of_y) for s, seen, of_y in parts if isinstance(seen, Linear)]

        def part(i: int, rows: Tensor | slice) -> Tensor:
            s, seen, of_y = linear[i]
            at = t if isinstance(rows, slice) else t[rows.to(t.device)]
            return self._towards(seen, x[rows], at, s, y[rows][:, of_y], behind)

        return where_next([s for s, *_ in linear], t, direction, part, torch.zeros_like(x))

    def _towards(
        self, seen: Linear, x: State, t: Time, s: float, y: Tensor, behind: bool
    ) -> State:  # fmt: skip
        """W Eᵀ Hᵀ (H Q Hᵀ + std²)⁻¹ (y - H m)."""
        here, H = self._slopes(x, t), seen.matrix(x).double()
        tau, look, rest = self._looks(here, t, s)
        m = x.double() + look.moved.mT.view_as(x)
        L, regular = scaled_root(_covariance(seen, H, look.Q))
        trust = self._trust(here, look, x, t, tau)
        if not regular.all():
            self._check_reach(seen, H, here, tau)
            # so much stretched that one direction is all that is left of it: nothing to go by
            trust, L = torch.where(regular, trust, 0.0), torch.where(_beside(regular, L), L, 1.0)
        v = torch.cholesky_solve((y.double() - seen.forward(m)).unsqueeze(-1), L).squeeze(-1)
        u = times((rest if behind else look).E.transpose(0, 1), (v @ H).mT).mT
        u = torch.where(_beside(trust > 0, u), _beside(trust, u) * u, 0.0)
        return u.reshape(x.shape).to(x.dtype)

    def foresight(
        self, seen: Linear, x: State, t: Time, s: Time, end: float
    ) -> tuple[Reach, Tensor | float]:
        """J = √h H exp(J (τ - h)) G of the next step, beside the covariance after it."""
        h = abs(s - t).item()
        here, H = self._slopes(x, t), seen.matrix(x).double()
        tau, look, rest = self._looks(here, t, end, h)
        G, E = self.sde.diffusion(x, t), rest.E.permute(2, 0, 1)
        columns = [G.tmv(row.to(x).reshape(x.shape)).flatten(1) for row in (H @ E).unbind(1)]
        reach = Rows(h**0.5 * torch.stack(columns, 1), _covariance(seen, H, rest.Q))
        return reach, self._trust(here, look, x, t, tau).unsqueeze(1)

    def _looks(self, here: Slopes, t: Time, s: float, h: float = 0.0) -> Looks:
        """The laws from t to s, and without the next step: of a process, without the time h."""
        n, device = here.f.shape[1], here.f.device
        tau = (s - t).abs().double().to(device).expand(n)
        if self.grid is None:
            look = here.after(tau)
            return Looks(tau, look, here.after(tau - h) if h else look)
        # a step asks for its pull and for what is left of its noise
        if self._looked is None or self._looked[0] is not here or self._looked[1] != s:
            left = between(self.grid, t.double().cpu(), s).to(device).expand(n).clamp(min=1)
            one = tau / left
            rest = here.stepped(one, left - 1)
            self._looked = here, s, Looks(tau, here.stepped(one, left), rest)
        return self._looked[2]

    def _slopes(self, x: State, t: Time) -> Slopes:
        """The process at (x, t); a step asks twice."""
        if self._seen is None or self._seen[0] is not x or not torch.equal(self._seen[1], t):
            self._seen = (x, t, Slopes.at(self.sde, x, t))
        return self._seen[2]

    def _trust(self, here: Slopes, look: Look, x: State, t: Time, tau: Tensor) -> Tensor:
        """The factor w, (B,), in the words of the lecture; 0 where it is not even a number."""
        m = (x.double() + look.moved.mT.view_as(x)).to(x.dtype)
        there = self.sde.direction * self.sde.drift(m, t).double().flatten(1).mT
        r = there - here.f - times(here.J, look.moved)
        variance = look.Q.diagonal(dim1=0, dim2=1).mT
        e = torch.where(variance > 0, (tau * r / 2).square() / variance, 0.0).sum(0) / BEND**2
        return (1 / (1 + e)).nan_to_num(0.0)

    def _check_reach(self, seen: Linear, H: Tensor, here: Slopes, tau: Tensor) -> None:
        """Refuses what no noise reaches; a short look tells, as little is stretched there."""
        near = here.after(torch.minimum(tau, 0.25 / here.size.clamp(min=1e-300)))
        _, regular = scaled_root(_covariance(seen, H, near.Q))
        if not regular.any():
            raise NotElliptic(
                f"the noise of {type(self.sde).__name__} does not reach all that {seen} sees, not "
                f"even by way of the drift, for any of {len(tau)} states: see less of it, or with "
                "a noise, std > 0"
            )

    def __repr__(self) -> str:
        return f"Linearised({type(self.sde).__name__}, {self.observation})"


def _covariance(seen: Linear, H: Tensor, Q: Tensor) -> Tensor:
    """H Q Hᵀ + std², (B, k, k)."""
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return H @ Q.permute(2, 0, 1) @ H.mT + seen.std**2 * eye


def _beside(c: Tensor, v: Tensor) -> Tensor:
    """Numbers (B,) beside (B, ...)."""
    return c.reshape(-1, *(1,) * (v.ndim - 1))


# --- small matrices, one for each row: (d, d, B), the rows last, which is several times faster


class Look(NamedTuple):
    """The linear process of each row after some time.

    Attributes:
        E: exp(J τ), (d, d, B).
        moved: m - x, (d, B).
        Q: The covariance, (d, d, B).
    """

    E: Tensor
    moved: Tensor
    Q: Tensor


class Looks(NamedTuple):
    """The time that is left, (B,), the law after all of it, and without the next step."""

    tau: Tensor
    look: Look
    rest: Look


class Slopes(NamedTuple):
    """The process at (x, t), in float64 and in time that runs forwards.

    Attributes:
        f: The drift, (d, B).
        J: Its derivative, (d, d, B).
        D: GGᵀ, (d, d, B).
        size: A bound of |J|, (B,).
    """

    f: Tensor
    J: Tensor
    D: Tensor
    size: Tensor

    @staticmethod
    def at(sde: SDE, x: State, t: Time) -> Slopes:
        """Of each row; the directions are rows of one batch: users need to know no vmap."""
        n, d = len(x), x[0].numel()
        eye = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *x.shape[1:])
        x_rows, t_rows = x.repeat(d, *(1,) * (x.ndim - 1)), t.repeat(d) if t.ndim else t
        f, J = jvp(lambda u: sde.drift(u, t_rows), (x_rows,), (eye.repeat_interleave(n, 0),))[:2]
        G = sde.diffusion(x, t)
        D = torch.stack([G.gram(e.expand_as(x).contiguous()).flatten(1) for e in eye])
        f = sde.direction * f[:n].flatten(1).double().mT.contiguous()
        J = sde.direction * J.reshape(d, n, d).double().permute(2, 0, 1).contiguous()
        return Slopes(f, J, D.double().permute(2, 0, 1).contiguous(), J.abs().sum(1).amax(0))

    def after(self, tau: Tensor) -> Look:
        """The law after the times tau (B,): over short ones by powers, then doubled."""
        reach = (4 * self.size * tau).nan_to_num(math.inf)
        # a look so long is trusted by none; it must not cost the others their digits
        tau = torch.where(reach < 2.0**DOUBLINGS, tau, math.nan)
        longest = torch.where(tau.isnan(), 0.0, reach).max().item()
        doublings = math.ceil(math.log2(longest)) if longest > 1 else 0
        A, f, D = (v * (tau / 2**doublings) for v in (self.J, self.f, self.D))
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device).unsqueeze(-1).expand_as(A)
        E, moved, Q = eye, f, D
        e, v, q = eye, f, D
        for k in range(1, DEGREE + 1):
            e, v, Aq = product(A, e) / k, times(A, v) / (k + 1), product(A, q)
            q = (Aq + Aq.transpose(0, 1)) / (k + 1)
            E, moved, Q = E + e, moved + v, Q + q
        for _ in range(doublings):
            Q = Q + product(product(E, Q), E.transpose(0, 1))
            moved, E = moved + times(E, moved), product(E, E)
        return Look(E, moved, (Q + Q.transpose(0, 1)) / 2)

    def stepped(self, h: Tensor, n: Tensor) -> Look:
        """The law after n (B,) Euler steps of the length h (B,), by squaring."""
        eye = torch.eye(len(self.J), dtype=h.dtype, device=h.device).unsqueeze(-1)
        e, v, q = eye + self.J * h, self.f * h, self.D * h
        E, moved, Q = eye.expand_as(e), torch.zeros_like(v), torch.zeros_like(q)
        while n.any():
            odd = n % 2 == 1
            turned = product(product(e, Q), e.transpose(0, 1)) + q
            E, Q = torch.where(odd, product(e, E), E), torch.where(odd, turned, Q)
            moved = torch.where(odd, times(e, moved) + v, moved)
            q, v = product(product(e, q), e.transpose(0, 1)) + q, times(e, v) + v
            e, n = product(e, e), n // 2
        return Look(E, moved, (Q + Q.transpose(0, 1)) / 2)


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B of each row, (d, d, B)."""
    return (A.unsqueeze(2) * B.unsqueeze(0)).sum(1)


def times(A: Tensor, v: Tensor) -> Tensor:
    """A v of each row, (d, B)."""
    return (A * v.unsqueeze(0)).sum(1)
