"""Independent draws of a stationary law, from its log-density alone.

A multivariate Student law is fitted by importance sampling, in a few rounds that start from where
simulated paths were, and rejection makes draws of it exact ones, up to the bound found by trying.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kakusan.certification.case import F64, Case, flat
from kakusan.core.noise import generator
from kakusan.core.types import State


def stationary_draws(case: Case, n: int) -> State | None:
    """Independent draws by rejection from a fitted Student law; None where that is hopeless."""
    log_p: Any = getattr(case.sde, "log_stationary", None)
    if not callable(log_p) or case.size > 12:
        return None
    try:
        log_p(case.near(2))
    except Exception:  # noqa: BLE001 - its own row says so
        return None
    source, shape = generator(case.seed, 11), case.starts.shape[1:]
    rows = flat(case.look.x)
    mean, cov = rows.mean(0), 4 * _covariance(rows)
    x, log_w = rows, torch.zeros(len(rows), dtype=F64)
    for m in (2**13, 2**13, 2**14, 2**14, 2**17):
        x, log_q = _student(mean, cov, m, source)
        states = x.reshape(m, *shape)
        log_w = torch.full((m,), -torch.inf, dtype=F64)
        ok = case.sde.inside(states)
        with torch.no_grad():
            log_w[ok] = torch.as_tensor(log_p(states[ok]), dtype=F64)
        log_w = (log_w - log_q).nan_to_num(nan=-torch.inf)
        w = (log_w - log_w.max()).exp()
        w = w / w.sum()
        if 1 / float(w.square().sum()) > 4 * case.size:
            mean = w @ x
            cov = 1.3 * ((x - mean).mT * w) @ (x - mean)
        else:
            cov = 2 * cov
    bound = log_w.max()
    keep = torch.rand(len(x), generator=source, dtype=F64).log() < log_w - bound
    drawn = x[keep][:n]
    return drawn.reshape(-1, *shape).contiguous() if len(drawn) >= min(n, 1000) else None


def _covariance(rows: Tensor) -> Tensor:
    d = rows.shape[1]
    cov = torch.cov(rows.T).reshape(d, d)
    return cov + 1e-9 * (1e-9 + cov.diagonal().mean()) * torch.eye(d, dtype=F64)


def _student(mean: Tensor, cov: Tensor, m: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws of the multivariate Student law with 5 degrees of freedom, and log-densities."""
    d, df = len(mean), 5
    L = torch.linalg.cholesky(cov + 1e-12 * cov.diagonal().mean() * torch.eye(d, dtype=F64))
    z = torch.randn(m, d, generator=source, dtype=F64)
    chi = torch.randn(m, df, generator=source, dtype=F64).square().sum(1, keepdim=True)
    y = z * (df / chi).sqrt()
    return mean + y @ L.mT, -(df + d) / 2 * torch.log1p(y.square().sum(1) / df)
