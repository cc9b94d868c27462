r"""A score field as a Gaussian's, and a network for what the Gaussian leaves over.

With the mean m_t and the covariance C_t = R_t R_tᵀ of the process, and y = R_t⁻¹ (x - m_t),

.. math:: s(x, t) = R_t^{-\top} [-y + a \, net(y, t)] .

The network sees states of unit size at all times and is zero at the start, where s is the score of
the Gaussian N(m_t, C_t): exact for linear processes, and at any process' first steps away from a
point. What it has to learn stays bounded while the score itself blows up.

The tables m and C stand at grid times and are linear between, which is exact for a Brownian
motion. A point has C = 0 and no score: near it the covariance is never less than that of a tenth
of the way to the next time of the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kakusan.core.types import State, Time, as_time
from kakusan.errors import KakusanError
from kakusan.models.nets.embeddings import sinusoids

TENTH = 0.1


def stacked(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """Layers with SiLU between them, the last of them zero at the start."""
    units = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for a, b in zip(units[:-1], units[1:], strict=True):
        layers += [nn.Linear(a, b), nn.SiLU()]
    last = nn.Linear(units[-1], outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def octaves(level: Tensor, frequencies: int) -> Tensor:
    """Cosines and sines of a level, (n, 2 frequencies), from a quarter turn on in octaves."""
    highest = math.pi / 2 * 2 ** (frequencies - 1)
    return sinusoids(level.reshape(-1), 2 * frequencies, highest=highest)


class Perceptron(nn.Module):
    """A plain multilayer perceptron (y, level) -> like y, zero at the start.

    Few and low frequencies of the level: targets are noisy, and what varies fast in time would
    follow the noise.

    Arguments:
        shape: The shape of one state.
        width: The number of hidden units.
        depth: The number of hidden layers.
        frequencies: The number of sines and of cosines of the level.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int = 128, depth: int = 3, frequencies: int = 4
    ) -> None:
        super().__init__()
        size, self.frequencies = math.prod(shape), frequencies
        self.layers = stacked(size + 2 * frequencies, size, width, depth)

    def forward(self, y: Tensor, level: Tensor) -> Tensor:
        """Evaluates the network, on y of shape (B, *shape) and levels in [0, 1], () or (B,)."""
        told = octaves(level, self.frequencies).to(y.dtype).expand(len(y), -1)
        return self.layers(torch.cat([y.flatten(1), told], 1)).view(y.shape)


class ScoreNet(nn.Module):
    """The field (x, t) -> ∇log p_t(x), from tables of moments and a network.

    Arguments:
        shape: The shape of one state, of d numbers.
        times: The times of the tables, (n,), rising or falling; the first is nearest the start.
        mean: m at these times, (n, d).
        covariance: C at these times, (n, d, d), or its diagonal, (n, d). C may be singular at the
            first time alone.
        width: The number of hidden units of the network.
        depth: The number of its hidden layers.
        net: A network (y, level) -> like y of your own instead; levels are in [0, 1].

    Attributes:
        trust: The number a, 1 unless training found that less is better.
        report: What training has to say, where there was any.

    Example:
        >>> times, C = torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [4.0]])
        >>> brownian = ScoreNet((1,), times, torch.zeros(2, 1), C)
        >>> brownian(torch.tensor([[1.0]]), torch.tensor(0.5)).detach()
        tensor([[-0.5000]])
    """

    times: Tensor
    mean: Tensor
    covariance: Tensor
    trust: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        times: Tensor,
        mean: Tensor,
        covariance: Tensor,
        width: int = 128,
        depth: int = 3,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        n, d = len(times), math.prod(shape)
        if n < 2 or mean.shape != (n, d) or covariance.shape not in ((n, d), (n, d, d)):
            raise KakusanError(
                f"{n} times and states of {d} numbers go with means (n, d) and covariances "
                f"(n, d, d) or (n, d), and n of 2 or more; got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}"
            )
        self.shape, self.width, self.depth = tuple(shape), width, depth
        self.own_net = net is not None
        self.net: nn.Module = net if net is not None else Perceptron(self.shape, width, depth)
        for name, table in (("times", times), ("mean", mean), ("covariance", covariance)):
            self.register_buffer(name, torch.as_tensor(table).detach().double())
        self.register_buffer("trust", torch.ones((), dtype=torch.float64))
        self.report: Any = None

    def level(self, t: Time) -> Tensor:
        """The square root of the share of time that has passed, in [0, 1]; the shape of t.

        What leaves a point changes its shape fast at first: the root gives these times room.
        """
        t = as_time(t).to(self.times.device)
        share = (t - self.times[0]) / (self.times[-1] - self.times[0])
        return share.clamp(0, 1).sqrt()

    def gaussian(self, t: Time) -> tuple[Tensor, Tensor]:
        """M_t and a root R_t: (d,) and (d, d), or with (B,) in front; a diagonal R_t is (d,)."""
        # as float64 even where the module was cast to something smaller
        times, means, table = (v.double() for v in (self.times, self.mean, self.covariance))
        t = as_time(t).to(times.device)
        sign = 1 if times[-1] > times[0] else -1
        i = torch.searchsorted(sign * times, sign * t.contiguous(), right=True)
        i = i.clamp(1, len(times) - 1)
        w = ((t - times[i - 1]) / (times[i] - times[i - 1])).clamp(0, 1)
        mean = torch.lerp(means[i - 1], means[i], w.unsqueeze(-1))
        near = torch.where(i == 1, w.clamp(min=TENTH), w)
        full = table.ndim == 3
        near = near.reshape(near.shape + (1,) * (2 if full else 1))
        C = torch.lerp(table[i - 1], table[i], near)
        return mean, torch.linalg.cholesky(C) if full else C.sqrt()

    def forward(self, x: State, t: Time) -> State:
        """∇log p_t(x), like x; t is () or (B,)."""
        if tuple(x.shape[1:]) != self.shape:
            raise KakusanError(
                f"this score was made for states of shape {self.shape}, got {tuple(x.shape[1:])}"
            )
        m, R = (v.to(x.dtype) for v in self.gaussian(t))
        y = self.whitened(x.flatten(1) - m, R)
        out = self.corrected(y.float().view(x.shape), self.level(t).float())
        return self.whitened(out.flatten(1).to(x.dtype) - y, R, transpose=True).view(x.shape)

    def corrected(self, y: Tensor, level: Tensor) -> Tensor:
        """A net(y, t): what is added to the Gaussian's -y."""
        return self.trust.to(y) * self.net(y, level)

    def whitened(self, v: Tensor, R: Tensor, transpose: bool = False) -> Tensor:
        """R⁻¹ v or R⁻ᵀ v, for rows v (B, d) and a root R as `gaussian` gives it."""
        if self.covariance.ndim == 2:
            return v / R
        if R.ndim == 3:
            root = R.mT if transpose else R
            return torch.linalg.solve_triangular(root, v.unsqueeze(-1), upper=transpose).squeeze(
                -1
            )
        root = R if transpose else R.mT
        return torch.linalg.solve_triangular(root, v, upper=not transpose, left=False)
