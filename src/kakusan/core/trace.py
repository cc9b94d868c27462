r"""The divergence of a field, exact or by random probes, and differentiable.

For a field v with Jacobian J the divergence is tr J. One backward pass gives Jᵀz for a direction
z, and with E[z zᵀ] = I

.. math:: \operatorname{tr} J = E[z^\top J z],

so k directions give k estimates, whose mean is better and whose spread tells how good. All k go
through the graph of one forward pass, as one batch. `ExactTrace` sends the d unit vectors, and
there is nothing random about it. `Hutchinson` draws k probes: random signs, with the variance
2 (‖A‖² - Σ A_ii²) for A the symmetric part of J; normal numbers, with 2 ‖A‖²; or k orthogonal
directions of length √d, with less than either for many of them. `HutchPlusPlus` finds the range
of Jᵀ on r random directions, takes the trace there exactly, and probes the rest.

Probes are drawn once for a path and held fixed along it: the estimate is then a function like any
other to a solver, and the integral of k unbiased estimates is k unbiased estimates of the
integral.

References:
    A stochastic estimator of the trace of the influence matrix (Hutchinson, 1989)
    FFJORD (Grathwohl et al., 2019), arXiv 1810.01367, for probes held fixed along a path
    Hutch++: optimal stochastic trace estimation (Meyer et al., 2021), arXiv 2010.09649
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Keyed
from kakusan.core.types import State
from kakusan.errors import KakusanError

Pull = Callable[[Tensor], Tensor]  # directions (k, B, d) to Jᵀ of each, (k, B, d)


class Traced(NamedTuple):
    """A field and estimates of its divergence.

    Attributes:
        v: The field, like x.
        values: Estimates of the divergence, (B, k); their mean over k is the best.
    """

    v: State
    values: Tensor


class Trace(abc.ABC):
    """How a divergence is found."""

    @abc.abstractmethod
    def probes(self, x: State, noise: Keyed) -> tuple[Tensor, ...]:
        """What is random about it, to be drawn once: tensors (k, B, d)."""

    @abc.abstractmethod
    def estimates(self, d: int) -> int:
        """How many estimates there are, k."""

    @abc.abstractmethod
    def values(self, pull: Pull, probes: tuple[Tensor, ...]) -> Tensor:
        """Estimates (B, k), from Jᵀ on any directions."""

    def std_error(self, values: Tensor, d: int) -> Tensor:
        """The standard error of the mean of values (B, k), (B,); NaN where k is 1."""
        k = values.shape[1]
        return values.std(1) / k**0.5 if k > 1 else values.new_full((len(values),), math.nan)

    def check(self, d: int) -> None:  # noqa: B027 - most suit any
        """Refuses dimensions that it does not suit."""

    def __call__(
        self, field: Callable[[State], State], x: State, probes: tuple[Tensor, ...]
    ) -> Traced:
        """The field and the estimates of its divergence at x, (B, *shape).

        Gradients flow through both where they are enabled.
        """
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            y = x if outer and x.requires_grad else x.detach().requires_grad_()
            v = field(y)
            if v.shape != x.shape:
                raise KakusanError(
                    f"the field is {tuple(v.shape)}, and the state {tuple(x.shape)}"
                )
            if v.grad_fn is None:
                raise KakusanError(
                    "autograd sees no way from the state to the field: was it computed without "
                    "gradients?"
                )

        def pull(z: Tensor) -> Tensor:
            k = len(z)
            directions = z.reshape(k, *v.shape).to(v.dtype)
            if k == 1:
                found = torch.autograd.grad(
                    v, y, directions[0], retain_graph=True, create_graph=outer
                )
            else:
                found = torch.autograd.grad(
                    v, y, directions, retain_graph=True, create_graph=outer, is_grads_batched=True
                )
            return found[0].reshape(z.shape).to(z.dtype)

        values = self.values(pull, probes)
        return Traced(v if outer else v.detach(), values)


class ExactTrace(Trace):
    """The sum of all d derivatives: d directions through the graph of one forward pass.

    Arguments:
        most: The most dimensions it is asked for; more is refused, since every one of the hundred
            evaluations of a likelihood takes d backward passes.
        chunk: How many directions go through the graph at a time, which bounds the memory; by
            default as many as make some two thousand rows, beyond which caches overflow.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> with torch.no_grad():
        ...     ExactTrace()(lambda x: x * x.flip(1), x, ExactTrace().probes(x, Keyed(0))).values
        tensor([[3.],
                [7.]])
    """

    def __init__(self, most: int = 256, chunk: int | None = None) -> None:
        self.most, self.chunk = most, chunk

    def probes(self, x: State, noise: Keyed) -> tuple[Tensor, ...]:  # noqa: D102
        d = math.prod(x.shape[1:])
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        return (eye.unsqueeze(1).expand(d, len(x), d),)

    def estimates(self, d: int) -> int:  # noqa: D102
        return 1

    def values(self, pull: Pull, probes: tuple[Tensor, ...]) -> Tensor:  # noqa: D102
        total, chunk = 0, self.chunk or max(2048 // probes[0].shape[1], 1)
        for i, part in enumerate(probes[0].split(chunk)):
            rows = pull(part)  # (c, B, d): the rows of J with these numbers
            start = i * chunk
            total = total + rows[:, :, start : start + len(part)].diagonal(dim1=0, dim2=2).sum(1)
        assert isinstance(total, Tensor)
        return total.unsqueeze(1)

    def std_error(self, values: Tensor, d: int) -> Tensor:
        """Zero: nothing is random."""
        return torch.zeros_like(values[:, 0])

    def check(self, d: int) -> None:  # noqa: D102
        if d > self.most:
            raise KakusanError(
                f"the exact trace in {d} dimensions takes {d} backward passes an evaluation, and "
                f"a likelihood some hundred evaluations: {100 * d:,} passes a batch; "
                f"Hutchinson(8) takes 800 and tells its standard error; ExactTrace(most={d}) "
                "insists"
            )


class Law(abc.ABC):
    """What probes are drawn from: mean zero, and E[z zᵀ] = I."""

    @abc.abstractmethod
    def draw(self, k: int, x: State, noise: Keyed) -> Tensor:
        """Probes (k, B, d): those of a sample are a function of its place in the seed."""

    def left(self, k: int, d: int) -> float:
        """The factor on the variance of the mean of k, for probes that know of each other."""
        return 1.0


class Signs(Law):
    """Random signs (Rademacher): the least variance of all with independent coordinates."""

    def draw(self, k: int, x: State, noise: Keyed) -> Tensor:  # noqa: D102
        # in one precision always, so that a float64 run checks a float32 one on the same probes
        u = noise.uniform(0, (len(x), k, math.prod(x.shape[1:])), x.new_empty(0).float())
        return torch.where(u < 0.5, -1.0, 1.0).to(x.dtype).transpose(0, 1).contiguous()


class Normals(Law):
    """Standard normal numbers."""

    def draw(self, k: int, x: State, noise: Keyed) -> Tensor:  # noqa: D102
        z = noise.normal(0, (len(x), k, math.prod(x.shape[1:])), x)
        return z.transpose(0, 1).contiguous()


class Orthogonal(Law):
    """Orthogonal directions of length √d, at most d of them; all d of them are exact."""

    def draw(self, k: int, x: State, noise: Keyed) -> Tensor:  # noqa: D102
        d = math.prod(x.shape[1:])
        if k > d:
            raise KakusanError(f"in {d} dimensions at most {d} probes are orthogonal, got {k}")
        z = noise.normal(0, (len(x), d, k), x)
        # without the signs of R, the law of Q would not be the same in all directions
        Q, R = torch.linalg.qr(z)
        Q = Q * R.diagonal(dim1=1, dim2=2).sign().unsqueeze(1) * d**0.5
        return Q.permute(2, 0, 1).contiguous()

    def left(self, k: int, d: int) -> float:
        """(d - k) / d: of a basis, the part that was not seen, as in sampling from few."""
        return (d - k) / d


class Hutchinson(Trace):
    """The mean over k random probes z of zᵀ J z.

    Arguments:
        k: How many; with one there is no standard error.
        law: What they are drawn from: `Signs()` by default, `Normals()` or `Orthogonal()`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> trace = Hutchinson(2)
        >>> with torch.no_grad():
        ...     trace(lambda x: x**2, x, trace.probes(x, Keyed(0))).values
        tensor([[6., 6.]])
    """

    def __init__(self, k: int = 1, law: Law | None = None) -> None:
        if k < 1:
            raise KakusanError(f"Hutchinson needs at least one probe, got {k}")
        self.k, self.law = k, law or Signs()

    def probes(self, x: State, noise: Keyed) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.law.draw(self.k, x, noise),)

    def estimates(self, d: int) -> int:  # noqa: D102
        return self.k

    def values(self, pull: Pull, probes: tuple[Tensor, ...]) -> Tensor:  # noqa: D102
        (z,) = probes
        return (pull(z) * z).sum(2).T

    def std_error(self, values: Tensor, d: int) -> Tensor:  # noqa: D102
        return super().std_error(values, d) * self.law.left(self.k, d) ** 0.5


class HutchPlusPlus(Trace):
    """Exact on the directions where J is large, probes for the rest; for J that falls off.

    With Q an orthonormal basis of Jᵀ S for r random directions S, and P = I - QQᵀ,
    tr J = tr(QᵀJQ) + E[(Pz)ᵀ J (Pz)]. An evaluation takes 2 r + k backward passes.

    Arguments:
        k: How many probes of the rest; with one there is no standard error.
        r: How many directions are exact; k of them by default.

    Example:
        >>> x, trace = torch.tensor([[1.0, 2.0, 3.0]]), HutchPlusPlus(2, r=1)
        >>> ones = torch.ones(3, 3)  # of rank one: nothing is left to probe
        >>> with torch.no_grad():
        ...     trace(lambda x: x @ ones, x, trace.probes(x, Keyed(0))).values.round(decimals=4)
        tensor([[3., 3.]])
    """

    def __init__(self, k: int = 2, r: int | None = None) -> None:
        r = k if r is None else r
        if k < 1 or r < 1:
            raise KakusanError(f"HutchPlusPlus needs k >= 1 and r >= 1, got k={k} and r={r}")
        self.k, self.r = k, r

    def probes(self, x: State, noise: Keyed) -> tuple[Tensor, ...]:  # noqa: D102
        both = Signs().draw(self.r + self.k, x, noise)
        return both[: self.r], both[self.r :]

    def estimates(self, d: int) -> int:  # noqa: D102
        return self.k

    def check(self, d: int) -> None:  # noqa: D102
        if self.r >= d:
            raise KakusanError(
                f"HutchPlusPlus with r={self.r} directions has nothing left to probe in {d} "
                "dimensions; ExactTrace() is cheaper"
            )

    def values(self, pull: Pull, probes: tuple[Tensor, ...]) -> Tensor:  # noqa: D102
        S, z = probes
        Q = torch.linalg.qr(pull(S).permute(1, 2, 0))[0].permute(2, 0, 1)  # (r, B, d)
        rest = z - torch.einsum("rbd,rbe,kbe->kbd", Q, Q, z)
        both = torch.cat([Q, rest])
        each = (pull(both) * both).sum(2)  # (r + k, B)
        return (each[: self.r].sum(0) + each[self.r :]).T
