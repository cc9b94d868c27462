r"""Derivatives of single steps of a chain, in the state and in the noise.

The step X_{k+1} = X_k + h f + G dB as a map of state and standard normal numbers. Derivatives are
those of rows of large batches, so that users' functions know nothing of vmap; and of many steps
at once, where these functions take times of shape (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from kakusan.core.types import State, Time, per_sample
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import Path

ROWS = 1 << 19  # numbers that are differentiated at once
FEW = 5  # paths that show what form of times a process takes


class Slopes(NamedTuple):
    """The derivatives of one step in the state and in the noise.

    Attributes:
        A: ∂X_{k+1}/∂X_k, (B, d, d).
        B: ∂X_{k+1}/∂Z_k, (B, d, m).
        xx: The second derivatives in the state, (B, d, d, d), the result first.
        xz: Those in state and noise, (B, d, d, m); in the noise there are none.
    """

    A: Tensor
    B: Tensor
    xx: Tensor
    xz: Tensor


class Step(NamedTuple):
    """Steps of the chain as a map from (x, z) to the next states, flattened."""

    sde: SDE
    t: Time
    h: Tensor
    x: State
    dw: Tensor

    @staticmethod
    def of(sde: SDE, path: Path, dw: Tensor, ks: Sequence[int]) -> Step:
        """Step k of a path, or several on top of each other, with times of shape (B,)."""
        lo, hi, n = ks[0], ks[-1] + 1, path.x.shape[1]
        t, h = path.t[lo:hi], path.t[lo + 1 : hi + 1] - path.t[lo:hi]
        t, h = (t[0], h[0]) if hi - lo == 1 else (t.repeat_interleave(n), h.repeat_interleave(n))
        # one time stays where it can be read without waiting for a device
        t = t.to(path.x.device) if t.ndim else t
        return Step(sde, t, h, path.x[lo:hi].flatten(0, 1), dw[lo:hi].flatten(0, 1))

    @property
    def z(self) -> Tensor:
        """The standard normal numbers, (B, m)."""
        return (self.dw / per_sample(self.h.abs().sqrt(), self.dw)).flatten(1)

    def map(self, x: Tensor, z: Tensor) -> Tensor:
        """X + h f + G dB, for x of shape (n B, d) and z of shape (n B, m)."""
        n = len(x) // len(self.x)
        t, h = (v.repeat(n, *(1,) * (v.ndim - 1)) if v.ndim else v for v in (self.t, self.h))
        x = x.reshape(-1, *self.x.shape[1:])
        dw = per_sample(h.abs().sqrt(), z) * z
        after = x + per_sample(h, x) * self.sde.drift(x, t)
        dw = dw.reshape(-1, *self.dw.shape[1:])
        return self.sde.diffusion(x, t).kick(after, dw).flatten(1)

    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        """(x, z), n times."""
        return self.x.flatten(1).repeat(n, 1), self.z.repeat(n, 1)


def slopes_of(sde: SDE, path: Path, dw: Tensor, ks: range) -> Iterator[Slopes]:
    """The derivatives of each step, computed for as many at once as the process lets."""
    n, d, m = path.x.shape[1], path.x[0, 0].numel(), dw[0, 0].numel()
    many = max(1, ROWS // (n * d * (d * (d + 1) // 2 + d * m)))
    form = _form_of_times(sde, path, dw) if many > 1 else None
    many = 1 if form is None else many
    for lo in range(ks.start, ks.stop, many):
        step = Step.of(sde, path, dw, range(lo, min(lo + many, ks.stop)))
        if form is not None and step.t.ndim:
            step = step._replace(t=form(step.t))
        parts = (v.unflatten(0, (-1, n)).unbind() for v in _both(step, d, m))
        yield from (Slopes(*part) for part in zip(*parts, strict=True))


def _form_of_times(sde: SDE, path: Path, dw: Tensor) -> Callable[[Time], Tensor] | None:
    """The form of many times in which drift and diffusion mean the same as one by one, if any.

    The contract says (B,), but `lambda x, t: -t * x` means the right thing by (B, 1, ..., 1), and
    by times that do not promote a state of single precision.
    """
    # few paths: (B, d) times (B,) may spread to (B, d, B)
    path, dw = path._replace(x=path.x[:, :FEW]), dw[:, :FEW]
    x, ks = path.x, sorted({0, len(dw) // 2, len(dw) - 1})
    ones = [Step.of(sde, path, dw, [k]) for k in ks]
    each = torch.cat([step.map(*step.rows(1)) for step in ones])
    beside = (-1, *(1,) * (x.ndim - 2))
    forms: list[Callable[[Time], Tensor]] = [
        lambda t: t,
        lambda t: t.view(beside),
        lambda t: t.view(beside).to(x.dtype),
        lambda t: t.to(x.dtype),
    ]
    t = torch.stack([o.t for o in ones]).repeat_interleave(x.shape[1]).to(x.device)
    h = torch.stack([o.h for o in ones]).repeat_interleave(x.shape[1])
    state, w = torch.cat([o.x for o in ones]), torch.cat([o.dw for o in ones])
    for form in forms:
        step = Step(sde, form(t), h, state, w)
        try:
            found = step.map(*step.rows(1))
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        alike = found.shape == each.shape and found.dtype == each.dtype
        if alike and torch.allclose(found, each, rtol=1e-4):
            return form
    return None


def _both(step: Step, d: int, m: int) -> Slopes:
    """First and second derivatives, from one pass over all pairs of directions."""
    pairs = [(i, j) for i in range(d) for j in range(i, d + m)]
    first, second = (torch.tensor(v, device=step.x.device) for v in zip(*pairs, strict=True))
    eye = torch.eye(d + m, dtype=step.x.dtype, device=step.x.device)
    u, v = (eye[i].repeat_interleave(len(step.x), 0) for i in (first, second))
    x, z = step.rows(len(pairs))

    def slope(x: Tensor, z: Tensor) -> Tensor:
        return jvp(lambda y: step.map(y, z), (x,), (u[:, :d].contiguous(),))[1]

    out = jvp(slope, (x, z), (v[:, :d].contiguous(), v[:, d:].contiguous()))
    a, second_order = (_columns(w, len(pairs)) for w in out[:2])
    at = {pair: k for k, pair in enumerate(pairs)}
    xx = [at[min(i, j), max(i, j)] for i in range(d) for j in range(d)]
    xz = [at[i, d + j] for i in range(d) for j in range(m)]
    return Slopes(
        a[..., [at[i, i] for i in range(d)]],
        along_noise(step),
        second_order[..., xx].unflatten(-1, (d, d)),
        second_order[..., xz].unflatten(-1, (d, m)),
    )


def times(M: Tensor, v: Tensor) -> Tensor:
    """M v of each sample."""
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _basis(n: int, like: Tensor) -> Tensor:
    """The n unit vectors, each for a whole batch: (n B, n)."""
    return torch.eye(n, dtype=like.dtype, device=like.device).repeat_interleave(len(like), 0)


def _columns(v: Tensor, n: int) -> Tensor:
    """Rows (n B, d) as matrices (B, d, n)."""
    return v.reshape(n, -1, v.shape[-1]).permute(1, 2, 0)


def along_state(step: Step) -> Tensor:
    """∂X_{k+1}/∂X_k, (B, d, d)."""
    d = step.x[0].numel()
    x, z = step.rows(d)
    return _columns(jvp(lambda y: step.map(y, z), (x,), (_basis(d, step.x),))[1], d)


def along_noise(step: Step) -> Tensor:
    """∂X_{k+1}/∂Z_k, (B, d, m); the step is linear in its noise."""
    m = step.dw[0].numel()
    x, z = step.rows(m)
    return _columns(step.map(x, _basis(m, step.dw)) - step.map(x, torch.zeros_like(z)), m)


def contracted(step: Step, probes: Tensor, matrix: Tensor) -> Tensor:
    """The sum over i of the second derivative along (e_i, row i of the matrix), (B, d)."""
    d, point = probes.shape[-1], step.rows(len(probes))
    u = probes.reshape(-1, d)
    v = (probes.unsqueeze(-2) @ matrix).reshape(-1, matrix.shape[-1])

    def slope(x: Tensor, z: Tensor) -> Tensor:
        return jvp(lambda y: step.map(y, z), (x,), (u,))[1]

    second = jvp(slope, point, (v[:, :d].contiguous(), v[:, d:].contiguous()))[1]
    return second.reshape(probes.shape).mean(0)


def bent(step: Step, probes: Tensor, ahead: Tensor, W: Tensor) -> Tensor:
    """Σ_l of the second derivative of (ahead X_{k+1})_l along the columns l and i of W, (B, d)."""
    d, point = probes.shape[-1], step.rows(len(probes))
    both = times(W, probes).reshape(-1, W.shape[1])
    u = (both[:, :d].contiguous(), both[:, d:].contiguous())
    weights = times(ahead.mT, probes).reshape(-1, d)

    def slope(x: Tensor, z: Tensor) -> Tensor:
        return (weights * jvp(step.map, (x, z), u)[1]).sum()

    down = torch.cat(grad(slope, (0, 1))(*point), 1)
    return times(W.mT, down.reshape(len(probes), -1, down.shape[-1]).mean(0))
