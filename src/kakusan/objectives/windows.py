r"""How long a window of path weights should be: how fast neighbours part, and what it costs.

A path weight (`objectives.malliavin`) is a mean of noise that is carried back by the Jacobians
J of a path. Where neighbours part at the rate λ these grow like exp(λ t), and weights that look
further ahead than 1/λ have heavy tails. λ has two sources: the drift, by its one-sided Lipschitz
constant (`expansion`), and noise that depends on the state, which parts neighbours at random.
Rates give the scale; which length is best is measured (`length`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from kakusan.core.calculus import leaf
from kakusan.core.noise import Fresh
from kakusan.core.types import State, per_sample
from kakusan.solvers.gaussian import GaussianSteps
from kakusan.solvers.solve import Path

if TYPE_CHECKING:
    from kakusan.objectives.malliavin import PathWeight

PATHS = 2048  # how many paths choose a window
LOOKS = 8  # at how many times
PLACES = 16  # from how many places new paths start, where the others spread most
ROUNDS = 3  # how often


def expansion(steps: GaussianSteps, x: State, k: int, most: int = 16) -> Tensor:
    r"""How fast neighbours of x part in step k: λ_max of the symmetric part of (∂m_k - 1) / h_k.

    The one-sided Lipschitz constant of the drift at the states x, (B,), in units of 1 / time;
    -inf where derivatives are not finite. Lanczos' method, a forward and a backward derivative
    for each of `most` directions: exact for states of no more numbers, else from below and close.

    Example:
        >>> from kakusan.processes.zoo.mechanics import DoubleWell
        >>> from kakusan.solvers.gaussian import EulerSteps
        >>> steps = EulerSteps(DoubleWell(v=5.0), torch.tensor([0.0, 0.01]))
        >>> expansion(steps, torch.tensor([[0.0], [1.0]], dtype=torch.float64), 0).round()
        tensor([ 20., -40.], dtype=torch.float64)
    """
    x, d, eps = leaf(x).contiguous(), x[0].numel(), torch.finfo(x.dtype).eps
    pull = torch.func.vjp(lambda y: steps.mean(y, k), x)[1]
    source = torch.Generator().manual_seed(0)
    q = torch.randn(len(x), d, generator=source, dtype=torch.float64).to(x)
    q, m = q / q.norm(dim=1, keepdim=True), min(d, most)
    basis, T = q.unsqueeze(0), x.new_zeros(len(x), m, m)
    for i in range(m):
        v = q.reshape(x.shape)
        push = torch.func.jvp(lambda y: steps.mean(y, k), (x,), (v,))[1]
        w = (((push + pull(v)[0]) / 2 - v) / steps.h(k)).flatten(1)
        # where there are no more directions q is zero, and 0 must not pass for an eigenvalue
        T[:, i, i] = (w * q).sum(1) + (1 - (q * q).sum(1)) * T[:, 0, 0]
        if i + 1 == m:
            break
        least = eps**0.5 * w.norm(dim=1)
        for _ in range(2):  # once is not enough, in floating point
            w = w - ((basis * w).sum(-1, keepdim=True) * basis).sum(0)
        beta = w.norm(dim=1)
        beta = torch.where(beta > least, beta, 0.0)
        T[:, i, i + 1] = T[:, i + 1, i] = beta
        q = torch.where(beta > 0, 1 / beta, 0.0)[:, None] * w
        basis = torch.cat([basis, q.unsqueeze(0)])
    size = T.abs().amax((1, 2))
    rates = torch.linalg.eigvalsh(T.nan_to_num(0.0, 0.0, 0.0))[:, -1]
    # what rounding may have made of a large contraction is no expansion
    return torch.where(size.isfinite(), rates - 4 * eps * size, -math.inf)


# a trial: paths on which weights are compared, and after how many steps each is looked at, (B,)
_Trial: TypeAlias = tuple[Path, Tensor]


def length(
    window: Callable[[float], PathWeight], steps: GaussianSteps, path: Path, last: int
) -> float:
    """The length of a window with the least second moment; see `Window.chosen`.

    Arguments:
        window: A length -> weights with that window.
        steps: The chain.
        path: Paths of it, with all increments.
        last: After how many steps Y is seen.
    """
    assert path.dw is not None
    at, dw = sorted({last * i // LOOKS for i in range(LOOKS)}), path.dw[:last, :PATHS]
    path = Path(path.t[: last + 1], path.x[: last + 1, :PATHS], dw)
    looks = torch.tensor(at, device=path.x.device)
    given = wild = path, looks.repeat(path.x.shape[1])[: path.x.shape[1]]
    rate = -math.inf
    # paths from where the given ones spread most come to places that these have missed
    for seed in range(ROUNDS):
        found, wild = _from_the_fastest(steps, wild, at, last, seed)
        rate = max(rate, found)
    turned = max(_turned(steps, path.x[k], dw[k], k) for k in at)
    rate = max(rate, 0.0) + turned
    if not rate > 0:
        return math.inf
    scale = min(1 / rate, abs(steps.grid[last] - steps.grid[0]).item())
    # noise parts the nearest much faster than most
    shares = (*((1 / 64, 1 / 16) if turned else ()), 0.25, 0.5, 1.0, 2.0, 4.0, math.inf)

    def size(tau: float) -> float:
        return sum(_size(window(tau), steps, trial, at, last) for trial in (given, wild))

    return min((scale * c for c in shares), key=size)


def _from_the_fastest(
    steps: GaussianSteps, trial: _Trial, at: list[int], last: int, seed: int
) -> tuple[float, _Trial]:
    """The largest rate on the way, and as many paths again from the places with the largest."""
    x, B = trial[0].x, len(trial[1])
    rates = torch.cat([expansion(steps, x[k], k).masked_fill(trial[1] > k, -math.inf) for k in at])
    fastest = rates.max()
    if bool(((rates == fastest) | (rates == -math.inf)).all()):
        return fastest.item(), trial  # no place is faster than another
    top = rates.topk(min(PLACES, len(rates))).indices.repeat(max(2, B // PLACES))
    first = torch.tensor(at, device=x.device)[top // B]
    path = _walked(steps, x[first, top % B], first, last, Fresh(seed))
    return fastest.item(), (path, first)


def _turned(steps: GaussianSteps, x: State, dw: Tensor, k: int) -> float:
    """How fast noise that depends on the state parts neighbours: the mean of Σ_l |∂G_l v|² / 2.

    Over states and unit vectors v, in units of 1 / time: what noise adds to the growth of J.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, dw = leaf(x).requires_grad_(), leaf(dw)
        out = steps.operator(x, k).kick(torch.zeros_like(x), dw)
        if not out.requires_grad:
            return 0.0
        source = torch.Generator().manual_seed(0)
        v = torch.randn(x.shape, generator=source, dtype=torch.float64).to(x)
        back = torch.autograd.grad(out, x, v)[0].double().flatten(1).square().sum(1)
    return back.nanmean().item() / (2 * x[0].numel() * steps.h(k))


def _walked(steps: GaussianSteps, x: State, first: Tensor, last: int, noise: Fresh) -> Path:
    """Paths that stand still until their first step."""
    xs, dws = [x], []
    for k in range(last):
        dws.append(noise.normal(k, steps.noise_shape(x), x, steps.h(k) ** 0.5))
        x = torch.where(per_sample(first <= k, x) > 0, steps.after(x, k, dws[k]), x)
        xs.append(x)
    return Path(steps.grid[: last + 1], torch.stack(xs), torch.stack(dws))


def _size(
    weight: PathWeight, steps: GaussianSteps, trial: _Trial, at: list[int], last: int
) -> float:
    """(T - s) E|GᵀS|² over the worse half of the paths."""
    (path, first), x = trial, trial[0].x
    size = torch.zeros(len(first), dtype=torch.float64, device=x.device)
    for k, v in zip(at, weight(steps, path, at, last), strict=True):
        here, left = first == k, abs(steps.grid[last] - steps.grid[k]).item()
        c = steps.operator(x[k, here], k).tmv(v[here])
        size[here] = left * c.double().flatten(1).square().sum(1)
    # paths that blow up say nothing of weights; weights that blow up do
    size = size[x[-1].flatten(1).isfinite().all(1)]
    halves = [half.mean().item() for half in size.chunk(2)]
    return max(halves) if all(map(math.isfinite, halves)) else math.inf
