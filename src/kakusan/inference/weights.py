r"""Weights of paths: Girsanov's formula, exact for the steps that were made.

Euler's step of dx = f dt + G dw from t to s, h = s - t, is x' = x + f h + G dw with
dw ~ N(0, |h|). A second process with the drift g and the same G makes the same step with another
increment, dw - δ where G δ = (g - f) h, so that the densities of the two chains at one path have
the ratio

.. math:: \log w = \sum_k \frac{\delta_k \cdot dw_k - \tfrac12 |\delta_k|^2}{|h_k|} .

For h → 0 this is Girsanov's formula; for the chain itself it is exact, at any step size, and for
reversed processes, whose h is negative, too. E[w] = 1, and means of the second process are means
of the first weighted by w: rare events from tilted paths, or one set of paths for many
parameters.

Where one process is a `tilt` of the other, or both reverse one process with two scores, the
difference of drifts is GGᵀ u and δ = Gᵀ u h takes no inverse: kinetic motion, whose noise enters
momenta alone, can be tilted and weighted. Otherwise G must reach the
difference, which `Operator.solve` checks; noise that does not reach it leaves the two laws without
a common density.

References:
    Stochastic differential equations (Øksendal, 2003), section 8.6
    A note on importance sampling by effective sample size (Kong, 1992)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.operators import Operator
from kakusan.core.types import Field, State, Time
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import Reverse, Tilted, ito
from kakusan.solvers.solve import Path


def path_log_weights(path: Path, frm: SDE, to: SDE) -> Tensor:
    r"""Log dP_to/dP_frm along recorded paths of Euler-Maruyama, (B,) in float64.

    Gradients flow to the parameters of both processes.

    Arguments:
        path: What `solve(frm, ..., EulerMaruyama(), keep=True)` returned: each step kept.
        frm: The process that made the paths.
        to: The process whose law is wanted, with the same G.

    Raises:
        KakusanError: If the path has no increments, its steps are not Euler's of `frm`, or the two
            processes differ in G.
        NotElliptic: If G does not reach the difference of the drifts.

    Example:
        >>> from kakusan import Brownian, Fresh, OrnsteinUhlenbeck, grids, solve
        >>> x, grid = torch.zeros(20_000, 1, dtype=torch.float64), grids.uniform(0.0, 1.0, 50)
        >>> path = solve(Brownian(), x, grid, noise=Fresh(0), keep=True)
        >>> log_w = path_log_weights(path, Brownian(), OrnsteinUhlenbeck(rate=1.0, sigma=1.0))
        >>> round(log_w.exp().mean().item(), 1)
        1.0
        >>> round((log_w.exp() * path.end[:, 0] ** 2).mean().item(), 1)  # (1 - e^-2) / 2
        0.4
    """
    if path.dw is None or len(path.x) != len(path.t):
        raise KakusanError(
            f"weights need states and increments of each step, and this path has {len(path.x)} "
            f"states at {len(path.t)} times{'' if path.dw is not None else ' and no increments'}: "
            "record it with solve(..., keep=True), of a process with noise"
        )
    frm, to = ito(frm), ito(to)
    log_w = path.x.new_zeros(path.x.shape[1], dtype=torch.float64)
    for k, dw in enumerate(path.dw):
        t, s = path.t[k], path.t[k + 1]
        h = (s - t).item()
        G = _common(frm, to, path.x[k], t, dw)
        _check_step(frm, G, path, k)
        delta = h * _shift(frm, to, G, path.x[k], t)
        term = delta * dw - delta * delta / 2
        log_w = log_w + term.double().flatten(1).sum(1) / abs(h)
    return log_w


def _common(frm: SDE, to: SDE, x: State, t: Time, dw: Tensor) -> Operator:
    """The operator of both processes; refuses two different ones."""
    G, H = frm.diffusion(x, t), to.diffusion(x, t)
    if H.deterministic or to.noise_shape(x) != dw.shape:
        same = False
    else:
        Gdw, Hdw = G.mv(dw), H.mv(dw)
        same = torch.allclose(Gdw, Hdw, rtol=_near(x), atol=_near(x) * float(Gdw.abs().max()))
    if not same:
        raise KakusanError(
            f"{type(frm).__name__} and {type(to).__name__} differ in G at t={t.item():g}: paths "
            "with another G have no density with respect to these; only drifts may differ"
        )
    return G


def _near(x: State) -> float:
    """What rounding may do to a step."""
    return torch.finfo(x.dtype).eps ** 0.5


def _check_step(frm: SDE, G: Operator, path: Path, k: int) -> None:
    """Refuses steps that are not Euler's of `frm`."""
    assert path.dw is not None
    x, after, t = path.x[k], path.x[k + 1], path.t[k]
    with torch.no_grad():
        made = G.kick(x + (path.t[k + 1] - t).item() * frm.drift(x, t), path.dw[k])
        gap, scale = (made - after).abs().max(), torch.maximum(x.abs().max(), made.abs().max())
    if not gap <= 10 * _near(x) * scale:
        raise KakusanError(
            f"step {k + 1} of the path is {gap.item():.3g} away from Euler-Maruyama's step of "
            f"{type(frm).__name__} with its increment; record each step (every=1) of "
            "EulerMaruyama() on the process that the path is weighted from"
        )


def _shift(frm: SDE, to: SDE, G: Operator, x: State, t: Time) -> Tensor:
    """The z with G z = f_to - f_frm: without an inverse where the difference is GGᵀ u."""
    (base, ours), (other, theirs) = _split(frm), _split(to)
    zero = torch.zeros_like(x)
    u = sum((u(x, t) for u in theirs), zero) - sum((u(x, t) for u in ours), zero)
    if isinstance(base, Reverse) and isinstance(other, Reverse) and base.sde is other.sde:
        # a score moves the drift by (1 + λ²)/2 D s, a tilt by GGᵀ u = λ² D u
        u = u + (1 + base.noise**2) / (2 * base.noise**2) * (other.score(x, t) - base.score(x, t))
    elif base is not other:
        return G.solve(to.drift(x, t) - frm.drift(x, t))
    return base.direction * G.tmv(u)


def _split(sde: SDE) -> tuple[SDE, list[Field]]:
    """A process without its tilts, and the tilts."""
    tilts = []
    while isinstance(sde, Tilted):
        tilts.append(sde.u)
        sde = sde.sde
    return sde, tilts


# --- sums of weights


class LogMean(NamedTuple):
    """The logarithm of a mean, and its standard error.

    Attributes:
        value: log mean w.
        std_error: That of the value: the relative error of the mean of w.
    """

    value: float
    std_error: float


def log_mean_exp(log_w: Tensor) -> LogMean:
    r"""Log of the mean of exp(log_w), with its standard error, sd(w) / (mean(w) sqrt(B)).

    The error is itself an estimate, and too small where few weights carry the mean: look at
    `effective_sample_size`.

    Example:
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        LogMean(value=1000.0, std_error=0.0)
    """
    log_w = _weights(log_w)
    n = len(log_w)
    value = log_w.logsumexp(0) - math.log(n)
    relative = (log_w - value).exp()
    error = relative.std().item() / math.sqrt(n) if n > 1 else math.inf
    return LogMean(value.item(), error)


def effective_sample_size(log_w: Tensor) -> float:
    r"""(Σ w)² / Σ w²: how many samples of equal weight say as much.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -800.0]))
        2.0
    """
    log_w = _weights(log_w)
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().item()


def _weights(log_w: Tensor) -> Tensor:
    log_w = log_w.detach().double()
    if log_w.ndim != 1 or not len(log_w) or log_w.isnan().any() or log_w.max() == math.inf:
        raise KakusanError(f"log weights are numbers of shape (B,), none of them nan or +inf; got "
                           f"shape {tuple(log_w.shape)}")  # fmt: skip
    if log_w.max() == -math.inf:
        raise KakusanError(f"all {len(log_w)} weights are zero (log weight -inf)")
    return log_w
