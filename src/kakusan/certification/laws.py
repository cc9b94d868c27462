r"""Whether the laws that a process claims are its own.

A density p and coefficients belong together where the Fokker-Planck equation holds. With the
velocity v = f - ½ (∇·D + D ∇log p) of the probability flow, D = GGᵀ, it reads

.. math:: \partial_t \log p + \nabla \cdot v + v \cdot \nabla \log p = 0,

and is measured at states along paths, relative to the size of its terms. ∇·D is autograd's, not
the process's own, which has a row of its own. The equation does not know where paths start; a
score does, through its moments under the law it belongs to, which hold for any law:

.. math:: E[s_i(X)] = 0, \qquad E[s_i(X) X_j] = -\delta_{ij} .

Means and covariances are compared with simulation, beyond the bias that halving the steps shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kakusan.certification.case import (
    F64,
    Case,
    bias_of,
    called,
    finite_rows,
    flat,
    moments_of,
    score_of,
)
from kakusan.certification.certificate import Row, judged, skipped
from kakusan.certification.conformance import told
from kakusan.certification.structure import MOST
from kakusan.core import calculus
from kakusan.core.types import Field, State, Time, as_time, per_sample
from kakusan.errors import KakusanError
from kakusan.processes.linear import LinearSDE

RESIDUAL = 1e-5
SIGMAS = 4.5  # of many columns the largest: this is beyond all of them by chance once in 10^4
STEPS = 256
LOST = 1e-3  # of the paths, before means are bent

LogDensity = Callable[[State, Time], Tensor]


def law_rows(case: Case) -> list[Row]:
    """A row for each law: stationary, transition, moments, score."""
    return [
        _guarded(case, "stationary law", "log_stationary", _stationary_row),
        _guarded(case, "transition law", "log_transition", _transition_row),
        _guarded(case, "moments", "moments", _moments_row),
        _score_row(case),
    ]


def _guarded(case: Case, check: str, name: str, row: Callable[[Case, str, Any], Row]) -> Row:
    claimed = getattr(case.sde, name, None)
    given = {"log_stationary": "x", "log_transition": "x, x0, t", "moments": "x0, t"}[name]
    if not callable(claimed):
        return skipped(check, f"not claimed: define {name}({given}) to have it checked")
    try:
        return row(case, check, claimed)
    except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
        if isinstance(error, KakusanError):
            return skipped(check, f"{name} refuses these parameters: {error}")
        return Row(check, "fail", "raises", "a law", f"{name} raises {told(error)}")


# --- Fokker and Planck


def gradient(log_p: LogDensity) -> Field:
    """The gradient of a log-density, by autograd; each sample on its own."""

    def score(x: State, t: Time) -> State:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return torch.autograd.grad(log_p(y, t).sum(), y)[0]

    return score


def fokker_planck(case: Case, log_p: LogDensity, x: State, t: Time, elapsed: Time) -> Tensor:
    """The residual over the size of its terms, (B,); NaN where the law is not defined.

    Arguments:
        case: The process.
        log_p: The log-density at states and elapsed times.
        x: States, (B, *shape).
        t: Their times on the clock of the process, (B,).
        elapsed: Their elapsed times, (B,).
    """
    score, way = gradient(log_p), case.sde.direction

    def velocity(y: State) -> State:
        D = case.sde.diffusion(y, t).gram(score(y, elapsed))
        return way * case.sde.drift(y, t) - (calculus.gram_divergence(case.sde.diffusion, y, t)
                                             + D) / 2  # fmt: skip

    with torch.enable_grad():
        u = elapsed.detach().clone().requires_grad_()
        log = log_p(x, u)
        rate = (
            torch.autograd.grad(log.sum(), u, allow_unused=True)[0] if log.requires_grad else None
        )
    spread, size = torch.zeros(len(x), dtype=F64), torch.zeros(len(x), dtype=F64)
    length = 1e-3 * (flat(x).abs().mean(0) + flat(x).std(0)).clamp(min=1e-3)
    for j in range(case.size):
        e = torch.zeros_like(flat(x))
        e[:, j] = torch.minimum(length[j], 0.01 * flat(x)[:, j].abs() + 0.1 * length[j])
        h, e = e[:, j].clone(), e.reshape(x.shape)
        near, far = (flat(velocity(x + c * e) - velocity(x - c * e))[:, j] for c in (1, 2))
        term = (8 * near - far) / (12 * h)
        spread, size = spread + term, size + term.abs()
    carried = flat(velocity(x) * score(x, elapsed))
    rate = torch.zeros_like(spread) if rate is None else rate
    size = size + carried.abs().sum(1) + rate.abs() + 1e-3 / case.length
    return (rate + spread + carried.sum(1)) / size


def _residual_row(check: str, residual: Tensor, name: str) -> Row:
    residual = residual[residual.isfinite()]
    if not len(residual):
        return Row(check, "fail", "not finite", f"<= {RESIDUAL:.0e}",
                   f"{name} is not finite at any of the states that paths came by")  # fmt: skip
    worst = float(residual.abs().max())
    return judged(
        check, worst <= RESIDUAL, f"residual {worst:.1e}", f"<= {RESIDUAL:.0e}",
        f"{name} does not solve the Fokker-Planck equation of drift and G (residual up to "
        f"{worst:.2g} of the size of its terms): it is the law of another process", worst,
    )  # fmt: skip


def _stationary_row(case: Case, check: str, log_stationary: Callable[[State], Tensor]) -> Row:
    if case.size > MOST:
        return skipped(check, f"takes several passes for each of {case.size} numbers")
    x, t = case.look.some(64, case.seed)

    def log_p(x: State, t: Time) -> Tensor:
        return log_stationary(x)

    out = fokker_planck(case, log_p, x, t, (t - case.sde.span[0]).abs())
    return _residual_row(check, out, "log_stationary")


def _transition_row(case: Case, check: str, log_transition: Callable[..., Tensor]) -> Row:
    if case.size > MOST:
        return skipped(check, f"takes several passes for each of {case.size} numbers")
    x, t = case.look.some(64, case.seed)
    x0, elapsed = case.x0(len(x)), (t - case.sde.span[0]).abs()

    def log_p(x: State, t: Time) -> Tensor:
        return log_transition(x, x0, t)

    return _residual_row(check, fokker_planck(case, log_p, x, t, elapsed), "log_transition")


# --- against simulation


def halved(case: Case, x0: State, hi: float, stream: int) -> tuple[State, State]:
    """The ends of paths in STEPS steps and in half as many, on one path."""
    noise = case.noise(round(STEPS / hi), stream)
    fine, coarse = (case.march(x0, case.grid(n, 0.0, hi), noise) for n in (STEPS, STEPS // 2))
    return fine, coarse


def _spoilt(case: Case) -> str:
    """Why means are not compared where some paths are missing."""
    return f"paths that {case.solver} loses would bend all means; {case.better()}"


def _moments_row(case: Case, check: str, moments: Callable[..., Any]) -> Row:
    x0 = case.x0(1).expand(case.fewer(case.paths), *case.starts.shape[1:]).contiguous()
    fine, coarse = finite_rows(*halved(case, x0, 1.0, stream=5))
    if len(fine) < (1 - LOST) * len(x0):
        return skipped(check, _spoilt(case))
    mean, covariance = (c[0].flatten(0) if i == 0 else c[0]
                        for i, c in enumerate(moments(x0[:1], case.length)))  # fmt: skip
    d = len(mean)
    covariance = covariance.reshape(d, d)
    scale = covariance.diagonal().clamp(min=1e-12).sqrt()
    g, g_coarse = (moments_of(v, mean, scale) for v in (fine, coarse))
    i, j = torch.triu_indices(min(d, 16), min(d, 16))
    due = torch.cat([torch.zeros(d, dtype=F64), covariance[i, j] / (scale[i] * scale[j])])
    z, at = score_of(g - due, bias_of(g - g_coarse))
    return judged(
        check, z <= SIGMAS, f"{z:.1f} standard errors", f"<= {SIGMAS}",
        f"{called('covariance', at, d)} differs from that of {len(g)} simulated paths by {z:.1f} "
        "standard errors beyond the bias of the steps: the formula belongs to other coefficients",
        z,
    )  # fmt: skip


def _linear_score(sde: LinearSDE, x0: State) -> Field:
    """The score of the kernel from the start of the span."""
    begin = as_time(sde.span[0])

    def score(x: State, t: Time) -> State:
        factor, variance = (per_sample(c, x) for c in sde.transition(begin, t))
        return (factor * x0 - x) / variance

    return score


def known_score(case: Case) -> tuple[Callable[[State], Field] | None, str]:
    """The score of the law of X_t given starts x0, where the process tells it; and its name."""
    sde: Any = case.sde
    if callable(getattr(sde, "score", None)):
        return lambda x0: sde.score, "score"
    begin = sde.span[0]
    if isinstance(sde, LinearSDE):
        return lambda x0: _linear_score(sde, x0), "transition"
    if callable(getattr(sde, "score_from", None)):

        def told_score(x0: State) -> Field:
            inner = sde.score_from(x0)
            return lambda x, t: inner(x, (t - begin).abs())

        return told_score, "score_from"
    if callable(getattr(sde, "log_transition", None)):
        return lambda x0: gradient(
            lambda x, t: sde.log_transition(x, x0, (t - begin).abs())
        ), "log_transition"
    return None, ""


def _score_row(case: Case) -> Row:
    check = "score"
    score, name = known_score(case)
    if score is None:
        return skipped(check, "not claimed: define score(x, t) for the law of your starts, or "
                              "score_from(x0), to have it checked")  # fmt: skip
    if name == "score" and (not case.given or len(case.starts) < 200):
        return skipped(check, "score(x, t) belongs to a law of starts: give at least 200 draws of "
                              "it as starts")  # fmt: skip
    n = case.fewer(case.paths)
    n = min(n, len(case.starts)) if name == "score" else n
    x0 = case.x0(n)
    try:
        fine, coarse = halved(case, x0, 0.5, stream=6)
        t = case.t(0.5)
        s, s_coarse = (score(x0)(v, t) for v in (fine, coarse))
    except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
        return Row(check, "fail", "raises", "a score", f"{name} raises {told(error)}")
    if s.shape != fine.shape:
        return Row(check, "fail", f"shape {tuple(s.shape)}", f"{tuple(fine.shape)}",
                   f"{name} must give vectors like the state")  # fmt: skip
    x, s, y, r = finite_rows(fine, s, coarse, s_coarse)
    if len(x) < (1 - LOST) * n:
        return skipped(check, _spoilt(case))
    d = min(x.shape[1], 16)
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-12)

    def stein(x: Tensor, s: Tensor) -> Tensor:
        s, x = s * scale, (x - centre) / scale
        products = s[:, :d, None] * x[:, None, :d] + torch.eye(d, dtype=F64)
        return torch.cat([s, products.flatten(1)], 1)

    here = stein(x, s)
    z, at = score_of(here, bias_of(here - stein(y, r)))
    k = x.shape[1]
    i, j = (at, -1) if at < k else divmod(at - k, d)
    found, due = float(here[:, at].mean()), 0
    if j >= 0:
        found, due = found - (i == j), -int(i == j)
    what = f"E[s[{i}]]" if j < 0 else f"E[s[{i}] x[{j}]]"
    sign = " (its sign is wrong)" if j == i and found > 0.5 else ""
    return judged(
        check, z <= SIGMAS, f"{what} off by {z:.1f} standard errors", f"<= {SIGMAS}",
        f"{name} is not the score of the simulated law: {what} is {found:.3g} over {len(x)} "
        f"paths half-way, where {due} is due{sign}", z,
    )  # fmt: skip
