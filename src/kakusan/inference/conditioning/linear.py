r"""Tilts of linear processes: h in closed form.

A process whose drift is affine and whose noise is constant has normal laws,

.. math:: d\tilde X = (B \tilde X + \beta) \, dt + \tilde G \, dW, \qquad
          \tilde X_T \mid x \sim N(E_\tau x + c_\tau, Q_\tau), \quad \tau = T - t,

so that what is seen of it, Y = H X_T + std eps, is normal too, and so is h:

.. math:: h(x, t; y) = N(y; \, H (E_\tau x + c_\tau), \, S), \quad
          \nabla \log h = E_\tau^\top H^\top S^{-1} (y - H (E_\tau x + c_\tau)), \quad
          S = H Q_\tau H^\top + std^2 .

Observations at several times are jointly normal; `views` carries them back in time.

Where the process is itself linear this is exact. Otherwise it is the guided proposal of Schauer,
van der Meulen and van Zanten: the tilt of a linear process that resembles it, which ends where it
should if both have the same GGᵀ there. An observation at the time t itself is past: h = 1 where
none is left. Matrices are (d, d), in float64: for states of some hundreds of numbers.

References:
    Guided proposals for simulating multi-dimensional diffusion bridges (Schauer, van der Meulen
        and van Zanten, 2017), doi 10.3150/16-BEJ833
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.types import State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.reach import Reach, Rows
from kakusan.inference.conditioning.tilts import LinearLaw
from kakusan.inference.conditioning.views import Ahead, Law, Seen
from kakusan.processes.observations import Linear, Observation
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito
from kakusan.processes.zoo.gaussian import Brownian, CriticallyDamped, OrnsteinUhlenbeck
from kakusan.processes.zoo.parameters import Given, Value, common_size, parameter, square


class LinearTilt(LinearLaw):
    r"""The tilt of dX = (slope X + offset) dt + sigma dW towards what was seen, for any process.

    Arguments:
        sde: The process that is tilted; in the sense of Itô unless it is a `Stratonovich`.
        observation: What is seen: `Terminal`, `Coordinates`, `Measured`, or a `Series` of them.
        slope: B, per unit of the process's clock: a number, one for each coordinate, or a matrix
            (d, d) on flattened states. As in the drift of a process that is run against the
            clock, a step adds B x h with a negative h.
        offset: β: a number, or one for each coordinate.
        sigma: G̃: a number, one for each coordinate, or a matrix (d, m).
        end: When the end is seen; the end of the span of `sde` by default.

    Raises:
        KakusanError: If the observation is not linear, or sizes do not fit.
        NotElliptic: When asked, if the linear process never reaches what was seen.

    References:
        Guided proposals for simulating multi-dimensional diffusion bridges (Schauer et al., 2017)

    Example:
        >>> from kakusan import DoubleWell
        >>> from kakusan.processes.observations import Terminal
        >>> well = LinearTilt(DoubleWell(), Terminal(), sigma=2.0)
        >>> x, t, y = torch.zeros(1, 1), torch.tensor(0.5), torch.tensor([[1.0]])
        >>> well.score(x, t, y)  # (y - x) / (4 * 0.5)
        tensor([[0.5000]])
    """

    def __init__(
        self,
        sde: SDE,
        observation: Observation,
        slope: Given = 0.0,
        offset: Given = 0.0,
        sigma: Given = 1.0,
        end: float | None = None,
    ) -> None:
        self.sde, self.observation = ito(sde), observation
        self.end = float(self.sde.span[1] if end is None else end)
        self.slope = square("slope", parameter("slope", slope, dims=2))
        self.offset = parameter("offset", offset, dims=1)
        self.sigma = parameter("sigma", sigma, dims=2)
        common_size(slope=self.slope, offset=self.offset, sigma=self.sigma)
        self.own = False  # whether the process is the linear one
        self._ahead: dict[Any, Ahead] = {}

    def until(self, end: float) -> LinearTilt:
        """The same for another end."""
        twin = super().until(end)
        twin._ahead = {}
        return twin

    @classmethod
    def exact(cls, sde: SDE, observation: Observation, end: float | None = None) -> LinearTilt:
        """The tilt of a process that is itself linear: Doob's.

        Arguments:
            sde: `Brownian`, `OrnsteinUhlenbeck` or `CriticallyDamped`.
            observation: What is seen.
            end: When the end is seen; the end of the span by default.

        Example:
            >>> from kakusan import Brownian
            >>> from kakusan.processes.observations import Terminal
            >>> bridge = LinearTilt.exact(Brownian(), Terminal())
            >>> bridge.score(torch.zeros(1, 1), torch.tensor(0.5), torch.tensor([[1.0]]))
            tensor([[2.]])
        """
        if not isinstance(sde, Brownian | OrnsteinUhlenbeck | CriticallyDamped):
            raise KakusanError(
                "an exact tilt is that of Brownian, OrnsteinUhlenbeck or CriticallyDamped, got "
                f"{type(sde).__name__}; LinearTilt.around(sde, observation, x) is that of any "
                "process made linear at the state x"
            )
        A, m = sde.rate, sde.mean
        if isinstance(A, Tensor) and A.ndim == 2:
            offset = A @ torch.as_tensor(m, dtype=A.dtype).to(A).expand(len(A))
        else:
            offset = A * m
        one = cls(sde, observation, -A, offset, sde.sigma, end)
        one.own = True
        return one

    @classmethod
    def around(
        cls,
        sde: SDE,
        observation: Observation,
        x: Tensor | Sequence[float],
        end: float | None = None,
        t: float | None = None,
    ) -> LinearTilt:
        """The tilt of a process made linear at a state: B = ∇f(x), β = f(x) - B x, G̃ = G(x).

        Arguments:
            sde: Any process whose drift has a derivative.
            observation: What is seen.
            x: The state, (*shape): one that was seen, or where paths spend their time.
            end: When the end is seen; the end of the span by default.
            t: The time at which f and G are taken; `end` by default.

        Example:
            >>> from kakusan import DoubleWell
            >>> from kakusan.processes.observations import Terminal
            >>> LinearTilt.around(DoubleWell(v=1.0), Terminal(), [1.0]).slope  # -4 v (3 x² - 1)
            tensor([[-8.]], dtype=torch.float64)
        """
        sde = ito(sde)
        x = x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
        end = float(sde.span[1] if end is None else end)
        at, d = as_time(end if t is None else t), x.numel()
        # d rows of one batch: the user's function needs to know nothing of vmap
        basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *x.shape)
        rows = x.expand(d, *x.shape).contiguous()
        f, columns = torch.func.jvp(lambda u: sde.drift(u, at), (rows,), (basis,))[:2]
        B = columns.detach().flatten(1).mT.double()
        offset = f[0].detach().flatten().double() - B @ x.flatten().double()
        G = sde.diffusion(x[None], at)
        shape = G.noise_shape(x[None])
        noises = torch.eye(math.prod(shape[1:]), dtype=x.dtype, device=x.device)
        sigma = torch.cat([G.mv(e.reshape(shape)).detach().reshape(1, d) for e in noises]).mT
        return cls(sde, observation, B.cpu(), offset.cpu(), sigma.double().cpu(), end)

    def score(self, x: State, t: Time, y: Tensor) -> State:  # noqa: D102
        gained = self._over(x, t, y, lambda law, away: away @ law.gain, x[0].numel())
        return gained.reshape(x.shape).to(x.dtype)

    def control(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        if self.grid is None:
            return super().control(x, t, y)
        pulled = self._over(x, t, y, lambda law, away: away @ law.pull, x[0].numel())
        return self.sde.diffusion(x, t).tmv(pulled.reshape(x.shape).to(x.dtype))

    def log_h(self, x: State, t: Time, y: Tensor) -> Tensor:  # noqa: D102
        return self._over(x, t, y, Law.log_density, 1)[:, 0].to(x.dtype)

    def foresight(
        self, seen: Linear, x: State, t: Time, s: Time, end: float
    ) -> tuple[Reach, Tensor | float] | None:
        """J = √h N G, where noise comes by way of the drift, or all of the law is the chain's."""
        ahead, known = self._of(x), self.own and self.grid is not None
        i = min(range(len(ahead.times)), key=lambda i: abs(ahead.times[i] - end))
        if ahead.direct[i] and not known:
            return None
        x = x[:1] if known else x  # G is the same for all
        law, G = ahead.law(i, (s.item(),)), self.sde.diffusion(x, t)
        rows = law.N[0, :, :-1].to(x).reshape(-1, 1, *x.shape[1:])
        J = torch.stack([G.tmv(row.expand_as(x)).flatten(1) for row in rows], 1)
        return Rows(
            abs(s - t).item() ** 0.5 * J, (law.root @ law.root.mT).expand(len(x), -1, -1)
        ), 1.0

    def _over(
        self, x: State, t: Time, y: Tensor, use: Callable[[Law, Tensor], Tensor], width: int
    ) -> Tensor:
        """`use` of the law of what is seen and of y minus its mean; 0 where nothing is left."""
        ahead, z, y = self._of(x), x.flatten(1).double(), y.double()
        z = torch.cat([z, z.new_full((len(z), 1), ahead.unit)], 1)

        def part(i: int, rows: Tensor | slice) -> Tensor:
            same = Same.of(t if isinstance(rows, slice) else t[rows.to(t.device)], x.device)
            law = ahead.law(i, same.times)
            away = same.stacked(y[rows][:, ahead.columns[i]]) - same.stacked(z[rows]) @ law.N.mT
            return same.rows(use(law, away))

        nothing = z.new_zeros(len(x), width)
        return where_next(ahead.times, t, self.sde.direction, part, nothing)

    def _of(self, x: State) -> Ahead:
        """What all calls with states of one kind share."""
        kind = (x.shape[1:], x.dtype, x.device)
        if kind not in self._ahead:
            with torch.inference_mode(False), torch.no_grad():
                self._ahead[kind] = self._made(x)
        return self._ahead[kind]

    def _made(self, x: State) -> Ahead:
        size, direction = self.observation.size(x), self.sde.direction
        seen = []
        for t, part, of_y in sorted(self.observation.parts(self.end), key=lambda p: p[0]):
            if not isinstance(part, Linear):
                raise KakusanError(
                    "a linear tilt knows Terminal, Coordinates, Measured and a Series of them, "
                    f"and {part} is no linear function of the state"
                )
            H = part.matrix(torch.zeros_like(x[:1])).double().cpu()
            seen.append(Seen(t, H, part.std, torch.arange(size)[of_y]))
        B, G = _matrix("slope", self.slope, x), _matrix("sigma", self.sigma, x)
        beta = _vector("offset", self.offset, x)
        # time left runs forwards whatever the clock does
        seen = seen[::direction]
        return Ahead(direction * B, direction * beta, G @ G.mT, seen, x.device, self.grid)

    def __repr__(self) -> str:
        return f"LinearTilt({type(self.sde).__name__}, {self.observation})"


def _vector(name: str, c: Value, x: State) -> Tensor:
    """A parameter as (d,), on the CPU: one for each number, or what broadcasts with the state."""
    c = torch.as_tensor(c, dtype=torch.float64).detach().cpu()
    if c.numel() == x[0].numel():
        return c.flatten()
    try:
        return c.expand(x.shape[1:]).flatten()
    except RuntimeError:
        raise _misfit(name, c, x) from None


def _matrix(name: str, c: Value, x: State) -> Tensor:
    """A parameter as a matrix (d, ·), on the CPU."""
    if not isinstance(c, Tensor) or c.ndim < 2:
        return torch.diag(_vector(name, c, x))
    if len(c) != x[0].numel():
        raise _misfit(name, c, x)
    return c.detach().cpu()


def _misfit(name: str, c: Tensor, x: State) -> KakusanError:
    return KakusanError(
        f"{name} has shape {tuple(c.shape)}, and states of shape {tuple(x.shape[1:])} have "
        f"{x[0].numel()} numbers: give one number, one for each coordinate, or a matrix with a "
        "row for each"
    )


# --- many times at once


class Same(NamedTuple):
    """Rows with the same time, side by side.

    Attributes:
        times: The U different times.
        n: How many rows the most frequent of them has.
        place: (B,), where each row stands among (U, n); None where all have one time.
    """

    times: tuple[float, ...]
    n: int
    place: Tensor | None

    @staticmethod
    def of(t: Time, device: torch.device) -> Same:
        """The rows of one time (), or of times (B,)."""
        if not t.ndim:
            return Same((float(t),), 0, None)
        times, which, counts = t.double().unique(return_inverse=True, return_counts=True)
        order = which.argsort(stable=True)
        slot = torch.arange(len(t), device=t.device) - (counts.cumsum(0) - counts)[which[order]]
        n = int(counts.max())
        place = torch.empty_like(which).index_copy_(0, order, which[order] * n + slot)
        return Same(tuple(times.tolist()), n, place.to(device))

    def stacked(self, v: Tensor) -> Tensor:
        """Rows (B, k) as (U, n, k), with zeros where a time has fewer rows than n."""
        if self.place is None:
            return v.unsqueeze(0)
        blank = v.new_zeros(len(self.times) * self.n, v.shape[1])
        return blank.index_copy(0, self.place, v).unflatten(0, (-1, self.n))

    def rows(self, v: Tensor) -> Tensor:
        """The inverse of `stacked`."""
        return v[0] if self.place is None else v.flatten(0, 1)[self.place]


def where_next(
    times: Sequence[float],
    t: Time,
    direction: int,
    part: Callable[[int, Tensor | slice], Tensor],
    nothing: Tensor,
) -> Tensor:
    """`part(i, rows)` of the rows for which times[i] comes next, `nothing` where none is left.

    Arguments:
        times: In the order in which they come.
        t: () or (B,).
        direction: +1 where times grow, -1 where they fall.
        part: From the number of a time and a selection of rows to their part of the result.
        nothing: Like the result.
    """
    at = t.reshape(1, -1)
    s = torch.tensor(times, dtype=torch.float64, device=t.device)[:, None]
    # what a grid's time misses by rounding is not ahead
    ahead = direction * (s - at) > 1e-12 * torch.maximum(s.abs(), at.abs())
    passed = (~ahead).sum(0)
    if not t.ndim:
        i = int(passed)
        return part(i, slice(None)) if i < len(times) else nothing
    for i in passed.unique().tolist():
        if i < len(times):
            rows = (passed == i).nonzero()[:, 0].to(nothing.device)
            nothing = nothing.index_copy(0, rows, part(i, rows))
    return nothing
