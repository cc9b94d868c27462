r"""One network, and everything it can be asked.

A noised state is x = alpha x_0 + sigma eps. Whatever a network is trained to predict is a
combination F = a x_0 + b eps: the *row* of its kind in this table (with s the standard deviation
of the data and R² = sigma² + alpha² s²):

========  ==================  ==================
predict   a                   b
========  ==================  ==================
x0        1                   0
epsilon   0                   1
v         -sigma / r          alpha / r             r² = alpha² + sigma²
edm       sigma / (R s)       -alpha s / R
flow      -1                  1
score     0                   -1 / sigma
========  ==================  ==================

From x and F both x_0 and eps follow, by one 2x2 system with determinant alpha b - sigma a, and so
does every other combination: x_0, eps, v and the score are *views* of one network. The kinds v and
edm are regular at all times; epsilon is not at alpha = 0, x0 and score not at sigma = 0.

References:
    Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
    Progressive distillation for fast sampling of diffusion models (Salimans, Ho, 2022)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kakusan.core.types import State, Time, per_sample
from kakusan.errors import UsageError
from kakusan.processes.linear import LinearSDE, ScoreField

ROUNDING = 1e-12
Number = Any  # a float, or a float64 tensor of shape (B,): the formulas are the same
Row = Callable[[Number, Number, float], tuple[Number, Number]]


def _hypot(a: Number, b: Number) -> Number:
    return torch.hypot(a, b) if isinstance(a, Tensor) else math.hypot(a, b)


def _v(alpha: Number, sigma: Number, s: float) -> tuple[Number, Number]:
    r = _hypot(alpha, sigma)
    return -sigma / r, alpha / r


def _edm(alpha: Number, sigma: Number, s: float) -> tuple[Number, Number]:
    R = _hypot(sigma, alpha * s)
    return sigma / (R * s), -alpha * s / R


ROWS: dict[str, Row] = {
    "x0": lambda alpha, sigma, s: (1.0, 0.0),
    "epsilon": lambda alpha, sigma, s: (0.0, 1.0),
    "v": _v,
    "edm": _edm,
    "flow": lambda alpha, sigma, s: (-1.0, 1.0),
    "score": lambda alpha, sigma, s: (0.0, -1.0 / sigma),
}


class Denoiser(nn.Module):
    """A network for a linear SDE: called, it returns E[x_0 | x_t].

    Arguments:
        net: A network (x, level, label) -> like x, or with twice its channels where it also learns
            a spread; the level is atan2(sigma, alpha s) over pi/2, in [0, 1].
        process: The forward process.
        predict: What the network's output means: a row of the table above.
        data_std: The standard deviation s of the data.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> zero = Denoiser(lambda x, t, label: torch.zeros_like(x), VP(), predict="x0")
        >>> zero(torch.ones(2, 3), torch.tensor(0.5))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        process: LinearSDE,
        predict: str = "v",
        data_std: float = 1.0,
    ) -> None:
        super().__init__()
        if predict not in ROWS:
            raise UsageError(f"predict must be one of {', '.join(ROWS)}; got {predict!r}")
        self.net, self.process, self.predict, self.data_std = net, process, predict, data_std

    def row(self, alpha: Number, sigma: Number) -> tuple[Number, Number]:
        """The combination (a, b) of x_0 and eps that the network predicts."""
        return ROWS[self.predict](alpha, sigma, self.data_std)

    def raw(self, x: State, t: Time, label: Tensor | None = None) -> Tensor:
        """The network's own output F, on its input brought to unit variance."""
        return self._raw(*self.process.coefficients(t), x, t, label)[0]

    def _raw(
        self, alpha: Number, sigma: Number, x: State, t: Time, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """F and the spread, which is None where the network has no second half."""
        signal = alpha * self.data_std
        level = _level(sigma, signal, t)
        out = self.net(_times(1 / _hypot(sigma, signal), x), level, label)
        if x.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
            F, spread = out.chunk(2, 1)
            return F, spread
        return out, None

    def view(self, a: Number, b: Number, x: State, t: Time, label: Tensor | None = None) -> State:
        """The estimate of a x_0 + b eps: (a, b) = (1, 0) denoises, (0, 1) finds the noise."""
        return self._view(a, b, *self.process.coefficients(t), x, t, label)[0]

    def _view(
        self, a: Number, b: Number, alpha: Number, sigma: Number,
        x: State, t: Time, label: Tensor | None,
    ) -> tuple[State, Tensor | None]:  # fmt: skip
        p, q = self.row(alpha, sigma)
        det = alpha * q - sigma * p
        F, spread = self._raw(alpha, sigma, x, t, label)
        F = F.to(x.dtype)
        from_x, from_F = (a * q - b * p) / det, (b * alpha - a * sigma) / det
        if isinstance(from_x, float) and abs(from_x) < ROUNDING:
            return _times(from_F, F), spread  # the network predicts just what is asked
        return _times(from_x, x).add(_times(from_F, F)), spread

    def forward(self, x: State, t: Time, label: Tensor | None = None) -> State:
        """E[x_0 | x_t = x], with the shape of x; t is () or (B,)."""
        return self.view(1.0, 0.0, x, t, label)

    def noise(self, x: State, t: Time, label: Tensor | None = None) -> State:
        """E[eps | x_t = x]."""
        return self.view(0.0, 1.0, x, t, label)

    def velocity(self, x: State, t: Time, label: Tensor | None = None) -> State:
        """E[cos(phi) eps - sin(phi) x_0 | x_t = x], the angular velocity of the flow."""
        return self.velocity_and_spread(x, t, label)[0]

    def velocity_and_spread(
        self, x: State, t: Time, label: Tensor | None = None
    ) -> tuple[State, Tensor | None]:
        """The velocity, and the network's second half like x where it has one, in one look."""
        alpha, sigma = self.process.coefficients(t)
        return self._view(*_v(alpha, sigma, 1.0), alpha, sigma, x, t, label)

    @property
    def score(self) -> Conditioned:
        """The field ∇log p_t(x); it passes its velocity on to the samplers."""
        return Conditioned(self)

    def given(self, label: Tensor | None, guidance: float = 1.0) -> Conditioned:
        """The score of p_t(x | label), sharpened by classifier-free guidance.

        Arguments:
            label: Class indices, (B,); None or -1 for no label.
            guidance: The weight w in F = F_no_label + w (F_label - F_no_label).
        """
        return Conditioned(self, label, guidance)


class Conditioned(ScoreField):
    """The score of a denoiser for given labels, with classifier-free guidance.

    References:
        Classifier-free diffusion guidance (Ho, Salimans, 2022)
    """

    def __init__(
        self, model: Denoiser, label: Tensor | None = None, guidance: float = 1.0
    ) -> None:
        self.model, self.label, self.guidance = model, label, guidance

    def _ask(self, view: Callable[..., State], x: State, t: Time) -> State:
        if self.label is None or self.guidance == 1.0:
            return view(x, t, self.label)
        twice = torch.cat([x, x])
        times = torch.cat([t, t]) if t.ndim else t
        labels = torch.cat([self.label, torch.full_like(self.label, -1)])
        given, free = view(twice, times, labels).chunk(2)
        return torch.lerp(free, given, self.guidance)

    def __call__(self, x: State, t: Time) -> State:
        """∇log p_t(x | label) = -E[eps | x_t] / sigma."""
        _, sigma = self.model.process.coefficients(t)
        return _times(-1.0 / sigma, self._ask(self.model.noise, x, t))

    def velocity(self, x: State, t: Time) -> State:
        """The angular velocity of the flow."""
        return self._ask(self.model.velocity, x, t)


def _times(c: Number, x: State) -> State:
    if not isinstance(c, Tensor):
        # one pass through memory less where the factor is 1 but for its last digit
        return x if abs(c - 1.0) < ROUNDING else x * c
    return per_sample(c, x) * x


def _level(sigma: Number, alpha: Number, t: Time) -> Tensor:
    """The angle over pi/2, a float64 tensor with the shape of t."""
    if isinstance(sigma, Tensor):
        return torch.atan2(sigma, alpha) / (math.pi / 2)
    return _one_level(sigma, alpha)


@functools.lru_cache(maxsize=4096)
def _one_level(sigma: float, alpha: float) -> Tensor:
    # a sampler comes back to its levels; an inference tensor must not outlive its mode
    with torch.inference_mode(False):
        return torch.tensor(math.atan2(sigma, alpha) / (math.pi / 2), dtype=torch.float64)
