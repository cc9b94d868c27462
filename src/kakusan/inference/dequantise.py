r"""Dequantisation: a density can speak of integers once each is spread over a cell of its own.

A diffusion model has a density p on reals. A whole number k, at x in model units, stands for its
cell: the box around x whose sides are `cells`, c_i on the coordinates that hold integers and 0 on
those that hold reals. Its probability, and a bound for any density q of an offset u in the cell,
are

.. math:: P(k) = \int_{cell} p(x + u) \, du, \qquad
    \log P(k) \ge E_{q(u | x)} [\log p(x + u) - \log q(u | x)],

with equality where q is p restricted to the cell. The average of K such weights inside the
logarithm closes the gap as K grows, whatever q is:

.. math:: \log P(k) \ge E \log \tfrac1K \sum_{j \le K} w_j, \qquad w_j = p(x + u_j) / q(u_j | x).

`Uniform` has log q = -Σ log c_i. `Variational` learns q: with v uniform and l = logit(v), which is
logistic,

.. math:: u_i = c_i (\sigma(\mu_i + e^{s_i} l_i) - \tfrac12), \qquad
    \log q = \sum_i \log \frac{\sigma'(l_i)}{e^{s_i} \, \sigma'(\mu_i + e^{s_i} l_i) \, c_i},

where a small network gives mu(x) and s(x). Logistic and not normal l, because mu = s = 0 is then
the uniform law itself: fitting starts from the uniform bound and can only leave it upwards. Given
x, coordinates are independent under q.

All densities here are in model units, and log p - log q of a whole number is the logarithm of a
mass, which has none. For each coordinate that holds reals, add log(unit) to have a density in raw
units.

`inference.offsets` learns q.

References:
    A note on the evaluation of generative models (Theis et al., 2016), arXiv:1511.01844
    Flow++ (Ho et al., 2019): variational dequantisation, arXiv:1902.00275
    Importance weighted autoencoders (Burda et al., 2016), arXiv:1509.00519
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kakusan.core.noise import Keyed
from kakusan.core.types import State
from kakusan.errors import KakusanError

LIMIT = 6.0  # of |mu| and |s|: an offset can be confined to about 1/500 of its cell


class Dequantised(NamedTuple):
    """Data spread over their cells.

    Attributes:
        x: The spread data, (B, *shape), like what was given.
        log_q: The log density of the offset over the whole coordinates, in model units, float64
            (B,); 0 where no coordinate is whole.
    """

    x: State
    log_q: Tensor


class Dequantiser(abc.ABC):
    """A law q(u | x) of the offset in a cell; real coordinates are left alone."""

    @abc.abstractmethod
    def __call__(self, x: State, cells: Tensor, noise: Keyed, draw: int = 0) -> Dequantised:
        """Spreads a batch.

        Arguments:
            x: Encoded data, (B, *shape): the middles of the cells.
            cells: The sides of a cell in model units, of shape `shape`; 0 for reals.
            noise: Keyed numbers, so that sample i has one offset whatever the batch.
            draw: Numbers the repetitions: each has offsets of its own.
        """


class Uniform(Dequantiser):
    """Uniform over the cell: log q = -Σ log c.

    Example:
        >>> y = Uniform()(torch.zeros(3, 2), torch.tensor([0.5, 0.0]), Keyed(0))
        >>> bool((y.x[:, 0].abs() < 0.25).all()), y.x[:, 1].tolist(), y.log_q.exp().tolist()
        (True, [0.0, 0.0, 0.0], [2.0, 2.0, 2.0])
    """

    def __call__(  # noqa: D102
        self, x: State, cells: Tensor, noise: Keyed, draw: int = 0
    ) -> Dequantised:
        c = _fitting(cells, x)
        u = c * (noise.uniform(draw, tuple(x.shape), x) - 0.5).to(c.dtype)
        return Dequantised(_placed(x, u, c), -_log_volume(c).expand(len(x)))


class AsIs(Dequantiser):
    """No noise: the density of the encoded values themselves.

    On integers this is no mass, and no bound of one: a model can raise it without limit by
    putting a peak on each value. It compares samples of one model and nothing else.

    Example:
        >>> AsIs()(torch.ones(1, 2), torch.ones(2), Keyed(0)).x
        tensor([[1., 1.]])
    """

    def __call__(  # noqa: D102
        self, x: State, cells: Tensor, noise: Keyed, draw: int = 0
    ) -> Dequantised:
        _fitting(cells, x)
        return Dequantised(x, torch.zeros(len(x), dtype=torch.float64, device=x.device))


class VectorShape(nn.Module):
    """The network of mu and s for vectors: three linear layers; zero at the start.

    Arguments:
        shape: The shape of one state, flattened inside.
        width: The number of hidden units.
    """

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape, self.width = tuple(shape), width
        d = math.prod(self.shape)
        self.layers = nn.Sequential(
            nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            _silent(nn.Linear(width, 2 * d)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, s) of states (B, *shape), each like x."""
        mu, s = self.layers(x.flatten(1)).chunk(2, 1)
        return mu.view(x.shape), s.view(x.shape)


class ImageShape(nn.Module):
    """The network of mu and s for images: three 3x3 convolutions; zero at the start.

    Arguments:
        shape: (C, H, W); C counts, any height and width pass.
        width: The number of hidden channels.
    """

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape, self.width = tuple(shape), width
        C = self.shape[0]
        self.layers = nn.Sequential(
            nn.Conv2d(C, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            _silent(nn.Conv2d(width, 2 * C, 3, padding=1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, s) of images (B, C, H, W), each like x."""
        mu, s = self.layers(x).chunk(2, 1)
        return mu, s


class Variational(nn.Module, Dequantiser):
    """A learned q(u | x): see the head of this module. A new one is uniform.

    Arguments:
        net: A network x -> (mu, s), each like x; `for_shape` makes one that suits.

    Example:
        >>> q = Variational.for_shape((2,), width=8)
        >>> x, cells, noise = torch.randn(5, 2), torch.ones(2), Keyed(0)
        >>> bool((q(x, cells, noise).x - Uniform()(x, cells, noise).x).abs().max() < 1e-6)
        True
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], width: int = 64) -> Variational:
        """Convolutions for images (C, H, W), linear layers for all else."""
        return cls((ImageShape if len(shape) == 3 else VectorShape)(tuple(shape), width))

    def forward(self, x: State, cells: Tensor, noise: Keyed, draw: int = 0) -> Dequantised:
        """Spreads a batch, as any `Dequantiser`; differentiable in the weights."""
        c = _fitting(cells, x)
        v = noise.uniform(draw, tuple(x.shape), x)
        z = torch.logit(v, eps=torch.finfo(v.dtype).eps / 4)  # v = 0 has no logit
        mu, s = self.parameters_at(x)
        a = mu + s.exp() * z
        u = c * 0.5 * torch.tanh(a / 2).to(c.dtype)  # sigma(a) - 1/2 without cancellation
        return Dequantised(_placed(x, u, c), _sum_whole(_log_slope(z) - s - _log_slope(a), c))

    def log_density(self, u: Tensor, x: State, cells: Tensor) -> Tensor:
        """Log q(u | x) of offsets u strictly inside the cells, like x; float64 (B,)."""
        c = _fitting(cells, x)
        v = torch.where(c > 0, u / torch.where(c > 0, c, 1.0), 0.0) + 0.5
        a = torch.logit(v)
        mu, s = self.parameters_at(x)
        z = (a - mu) * (-s).exp()
        return _sum_whole(_log_slope(z) - s - _log_slope(a), c)

    def parameters_at(self, x: State) -> tuple[Tensor, Tensor]:
        """(mu, s) at x, each like x and within ±LIMIT, so that no cell is left uncovered."""
        own = next(self.net.parameters(), x).dtype
        mu, s = (p.to(x.dtype) for p in self.net(x.to(own)))
        return LIMIT * torch.tanh(mu / LIMIT), LIMIT * torch.tanh(s / LIMIT)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to build it again; the weights are its `state_dict`."""
        if not isinstance(self.net, VectorShape | ImageShape):
            raise KakusanError(
                f"a dequantiser with the network {type(self.net).__name__} cannot be written "
                "down: Variational.for_shape makes one that can"
            )
        return {"shape": list(self.net.shape), "width": self.net.width}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Variational:
        """A new one of the shape that `to_json` wrote; load its `state_dict` next."""
        try:
            return cls.for_shape(tuple(map(int, record["shape"])), int(record["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise KakusanError(
                f"the stored dequantiser is damaged: {error!r} in {record}"
            ) from None


# --- the bound ----------------------------------------------------------------------------------


def log_weights(
    log_density: Callable[[State], Tensor],
    q: Dequantiser,
    x: State,
    cells: Tensor,
    noise: Keyed,
    draws: int = 1,
) -> Tensor:
    """Log w = log p(x + u) - log q(u | x) of several draws, float64 (draws, B).

    Arguments:
        log_density: States (B, *shape) to log p, (B,), in model units.
        q: How to spread.
        x: Encoded data, (B, *shape).
        cells: The sides of a cell, of shape `shape`.
        noise: Keyed numbers.
        draws: How many offsets a sample.
    """
    rows = []
    for j in range(draws):
        y, log_q = q(x, cells, noise, j)
        rows.append(log_density(y).double() - log_q)
    return torch.stack(rows)


class Weighted(NamedTuple):
    """An importance-weighted bound.

    Attributes:
        value: The logarithm of the mean weight, (B,): on average at most log P(k).
        std_error: Its standard error over the draws, (B,); infinite for a single draw, which
            says nothing about its own spread.
    """

    value: Tensor
    std_error: Tensor


def importance_weighted(log_w: Tensor) -> Weighted:
    r"""Log of the mean of K weights, and its standard error by the delta method.

    .. math:: \log \tfrac1K \sum_j w_j, \qquad
        \frac{1}{\sqrt K} \frac{\operatorname{std}(w)}{\operatorname{mean}(w)} .

    It lies below log P(k) by about half the square of the standard error.

    Arguments:
        log_w: Log weights, (K, B).

    Example:
        >>> importance_weighted(torch.tensor([[1.0], [3.0]]).log()).value.exp()
        tensor([2.])
    """
    if log_w.ndim != 2 or len(log_w) == 0:
        raise KakusanError(f"log weights have the shape (draws, B), got {tuple(log_w.shape)}")
    K = len(log_w)
    value = log_w.logsumexp(0) - math.log(K)
    if K == 1:
        return Weighted(value, torch.full_like(value, torch.inf))
    relative = K * log_w.softmax(0)  # w / mean(w), without overflow
    return Weighted(value, relative.std(0) / K**0.5)


# --- small things -------------------------------------------------------------------------------


def _fitting(cells: Tensor, x: State) -> Tensor:
    """The cells beside x, in float64: of shape `shape`, finite and not negative."""
    if cells.shape != x.shape[1:]:
        raise KakusanError(
            f"cells have the shape of one sample, {tuple(x.shape[1:])}; got {tuple(cells.shape)}"
        )
    if not bool((cells.isfinite() & (cells >= 0)).all()):
        raise KakusanError("cells are finite widths: positive for whole numbers, 0 for reals")
    return cells.to(x.device, torch.float64)


def _placed(x: State, u: Tensor, c: Tensor) -> State:
    """X + u strictly inside the cell, in the dtype of x.

    The middle x was rounded when it was encoded, to float32 whatever its dtype is now, and x + u
    is again: that much room is left at the edges. A cell too narrow to leave any collapses to its
    middle, where P(k) is p(x) c up to terms that float32 cannot see.
    """
    eps = max(torch.finfo(t).eps for t in (x.dtype, torch.float32))
    room = (c / 2 - eps * (1 + x.detach().abs().to(c.dtype))).clamp(min=0)
    return x + torch.where(c > 0, u.clamp(-room, room), 0.0).to(x.dtype)


def _log_volume(c: Tensor) -> Tensor:
    return torch.where(c > 0, c, 1.0).log().sum()


def _log_slope(a: Tensor) -> Tensor:
    """Log sigma'(a) = log sigma(a) + log sigma(-a), which is also the logistic log density."""
    return F.logsigmoid(a) + F.logsigmoid(-a)


def _sum_whole(terms: Tensor, c: Tensor) -> Tensor:
    """The sum over the whole coordinates, less the log volume of the cell; float64 (B,)."""
    return torch.where(c > 0, terms.double(), 0.0).flatten(1).sum(1) - _log_volume(c)


def _silent(layer: nn.Linear | nn.Conv2d) -> Any:
    """A layer that starts at zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
