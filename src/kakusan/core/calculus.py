r"""Divergences of operator fields, exact or by random probes.

The reverse of an SDE with state-dependent noise needs (∇·GGᵀ)_i = Σ_j ∂_j (GGᵀ)_ij: the sum over j
of the derivative of x ↦ GGᵀ(x) e_j along e_j. `gram_divergence` evaluates all d of them in one
batched forward-mode pass. With random signs z instead of the e_j, E[∂_z (GGᵀ z)] is the same
vector: `probed_gram_divergence` does that with a standard error, for large d.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.operators import Operator
from kakusan.core.types import State, Time, is_tracing

Diffusion = Callable[[State, Time], Operator]


def leaf(x: Tensor) -> Tensor:
    """The same numbers, for derivatives to hold on to: what inference mode made is copied."""
    return x.clone() if x.is_inference() else x.detach()


class Probed(NamedTuple):
    """A random estimate and its standard error, both like the state."""

    value: Tensor
    std_error: Tensor


def _along(diffusion: Diffusion, x: State, t: Time, z: Tensor) -> State:
    """∂_z (GGᵀ(x) z) for one direction z like x."""
    return torch.func.jvp(lambda y: diffusion(y, t).gram(z), (x,), (z,))[1]


def _along_each(diffusion: Diffusion, x: State, t: Time, z: Tensor) -> Tensor:
    """The same for k directions at once: z is (k, B, *shape), and so is the result."""
    k = len(z)
    # one large batch instead of vmap: the user's function needs to know nothing of transforms
    many = x.repeat(k, *(1,) * (x.ndim - 1))
    times = t.repeat(k) if t.ndim == 1 else t
    return _along(diffusion, many, times, z.reshape(many.shape)).reshape(z.shape)


def gram_divergence(diffusion: Diffusion, x: State, t: Time) -> State:
    r"""The vector Σ_j ∂_j (GGᵀ)_ij, by forward-mode differentiation in d directions.

    Arguments:
        diffusion: The field (x, t) -> Operator.
        x: States, with shape (B, *shape) of d numbers each.
        t: Times, with shape () or (B,).

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
        >>> gram_divergence(lambda x, t: Diagonal(1 + x**2), x, torch.tensor(0.0))
        tensor([[ 2.5000, -8.0000]], dtype=torch.float64)
    """
    d = math.prod(x.shape[1:])
    basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
    if is_tracing():
        # a compiler fuses d derivatives of one batch, and must see the samples stay apart
        each = (_along(diffusion, x, t, e.expand(x.shape)) for e in basis)
        return functools.reduce(torch.add, each)
    return _along_each(diffusion, x, t, basis.expand(d, *x.shape)).sum(0)


def noise_drift(diffusion: Diffusion, x: State, t: Time, noise_shape: tuple[int, ...]) -> State:
    r"""The vector Σ_j (∂G_j) G_j, with G_j = G e_j the columns of G.

    Half of it is what the drift of Itô has more than the drift of Stratonovich.

    Arguments:
        diffusion: The field (x, t) -> Operator.
        x: States, with shape (B, *shape).
        t: Times, with shape () or (B,).
        noise_shape: The shape of dw, (B, *noise shape) of m numbers each: m derivatives.

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> x = torch.tensor([[0.5, -1.0]])
        >>> noise_drift(lambda x, t: Diagonal(1 + x**2), x, torch.tensor(0.0), (1, 2))
        tensor([[ 1.2500, -4.0000]])
    """
    m = math.prod(noise_shape[1:])
    basis = torch.eye(m, dtype=x.dtype, device=x.device).reshape(m, 1, *noise_shape[1:])
    if is_tracing():
        return functools.reduce(
            torch.add, (_along_itself(diffusion, x, t, e.expand(noise_shape)) for e in basis)
        )
    basis = basis.expand(m, *noise_shape).reshape(m * len(x), *noise_shape[1:])
    many = x.repeat(m, *(1,) * (x.ndim - 1))
    times = t.repeat(m) if t.ndim == 1 else t
    return _along_itself(diffusion, many, times, basis).reshape(m, *x.shape).sum(0)


def _along_itself(diffusion: Diffusion, x: State, t: Time, z: Tensor) -> State:
    """∂_{Gz} (G(x) z)."""

    def moved(y: State) -> State:
        return diffusion(y, t).mv(z).reshape(y.shape)

    return torch.func.jvp(moved, (x,), (moved(x),))[1]


def probed_gram_divergence(
    diffusion: Diffusion, x: State, t: Time, probes: int, generator: torch.Generator | None = None
) -> Probed:
    """The same vector from random signs, with its standard error.

    Arguments:
        diffusion: The field (x, t) -> Operator.
        x: States, with shape (B, *shape).
        t: Times, with shape () or (B,).
        probes: How many random directions, at least 2.
        generator: Where the signs come from.
    """
    bits = torch.randint(
        0, 2, (probes, *x.shape), generator=generator, device=x.device, dtype=torch.int8
    )
    each = _along_each(diffusion, x, t, (2 * bits - 1).to(x.dtype))
    return Probed(each.mean(0), each.std(0) / probes**0.5)
