r"""Certifies a process of your own: is it what every routine here takes it for?

`certify` runs checks against identities that hold for any Itô SDE dx = f dt + G dw, and so needs
no second formula for any answer:

===================  =============================================================================
shapes, dtypes,      drift and G dw are like the state and finite, for batches of 1 and 5, in
finite               float32 and float64, with one time or one for each sample
samples apart,       row i of a batch is the row alone; t of shape (B,) gives each its time; the
a time each,         same input gives the same output
repetition
noise, ellipticity   the form of the noise, and how far G is from having no inverse
derivatives of G     autograd against differences, over short ways and over long ones
divergence           `gram_divergence` against both
strong order,        of the solver on this process, on one Brownian path, with error bars
limit, weak order
stationary law,      residuals of the Fokker-Planck equation; moments against simulation;
transition law,      identities that a score obeys under its law
moments, score
reversal             starts run forward, and back by the score, must be the starts
domain               how many paths leave it
===================  =============================================================================

A check that a process gives no hold for is skipped, with what would enable it. A row fails only
beyond its error bars, and its tolerances are in its module. What is no number of the process, but
of the solver with these steps, is a row on the solver: the certificate is that of the pair.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kakusan.certification.case import F64, STEPS, Case
from kakusan.certification.certificate import Certificate as Certificate
from kakusan.certification.certificate import Row as Row
from kakusan.certification.certificate import judged, skipped
from kakusan.certification.conformance import conformance, told
from kakusan.certification.laws import law_rows
from kakusan.certification.orders import order_rows
from kakusan.certification.reversal import reversal_row
from kakusan.certification.structure import divergence_rows, ellipticity_row, noise_row
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import EulerMaruyama, Method
from kakusan.training.progress import progress


def certify(
    sde: SDE,
    starts: Tensor | None = None,
    method: Method | None = None,
    promised: tuple[float, float] | None = None,
    learn: bool = False,
    paths: int = 4096,
    seed: int = 0,
    quiet: bool = False,
) -> Certificate:
    """Checks a process, and a solver on it, against what must hold for any process.

    Arguments:
        sde: The process.
        starts: Where paths start: one state (*shape), or draws (n, *shape) of a law;
            `sde.start` by default.
        method: The solver to measure; Euler-Maruyama by default.
        promised: The strong and weak order of a method of your own; those of the methods here
            are known.
        learn: Whether to learn a score for the reversal where none is known, in half a minute.
        paths: How many paths statistics are made of.
        seed: All randomness is a function of it.
        quiet: Whether to show no progress.

    Raises:
        KakusanError: If the process is none, or nothing says where it starts.

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> class Wrong(SDE):
        ...     start = torch.zeros(2)
        ...     def drift(self, x, t):
        ...         return x.mean(0) - x
        ...     def diffusion(self, x, t):
        ...         return Diagonal(1 + x.sin() ** 2)
        >>> found = certify(Wrong(), paths=256, quiet=True)
        >>> found.ok, found["samples apart"].verdict, found["divergence"].verdict
        (False, 'fail', 'pass')
    """
    began = time.perf_counter()
    case = _case(sde, starts, method, promised, learn, paths, seed, quiet)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken process warns in many ways; rows say it
        torch.manual_seed(seed)
        rows = _rows(case)
    seconds = time.perf_counter() - began
    return Certificate(type(sde).__name__, case.solver, tuple(rows), seconds)


def _case(
    sde: SDE, starts: Tensor | None, method: Method | None,
    promised: tuple[float, float] | None, learn: bool, paths: int, seed: int, quiet: bool,
) -> Case:  # fmt: skip
    """The process and its starts, once they are fit to be checked."""
    if not isinstance(sde, SDE):
        raise KakusanError(
            f"certify takes an SDE, got a {type(sde).__name__}; SDE.of(drift, diffusion) makes one"
        )
    if paths < 64:
        raise KakusanError(f"statistics need at least 64 paths, got {paths}")
    start = getattr(sde, "start", None)
    given = starts is not None
    if starts is None:
        if not isinstance(start, Tensor):
            raise KakusanError(
                f"{type(sde).__name__} does not say where it starts: pass starts=, one state or "
                "draws (n, *shape), or give it an attribute `start`"
            )
        starts = start.detach()[None]
    elif starts.ndim == 1 or isinstance(start, Tensor) and starts.shape == start.shape:
        starts, given = starts[None], False
    starts = starts.detach().cpu().to(F64).contiguous()
    if starts.ndim < 2 or not len(starts) or not starts.isfinite().all():
        raise KakusanError(f"starts are finite states (n, *shape), got {tuple(starts.shape)}")
    solver = method or EulerMaruyama()
    return Case(sde, starts, given, solver, promised, learn, paths, seed, quiet)


def _rows(case: Case) -> list[Row]:
    """All rows, in their order."""
    checks: list[tuple[str, Callable[[Case], list[Row]]]] = [
        ("noise", lambda c: [noise_row(c)]),
        ("ellipticity", lambda c: [ellipticity_row(c)]),
        ("divergence", divergence_rows),
        ("orders", order_rows),
        ("laws", law_rows),
        ("reversal", lambda c: [reversal_row(c)]),
    ]
    label = f"certify {type(case.sde).__name__}"
    with progress(label, len(checks) + 2, quiet=case.quiet) as advance:
        advance(0, "shapes")
        rows = conformance(case)
        if rows[-1].verdict == "skipped":
            why = "nothing can be run before drift and G are like the state"
            return rows + [skipped(check, why) for check, _ in checks]
        advance(1, "domain")
        domain = _made(case, "domain", _domain_rows)
        if not hasattr(case, "look") or len(case.look.x) < 16:
            why = "too few paths stay finite and inside to look at"
            return rows + [skipped(check, why) for check, _ in checks] + domain
        for k, (check, made) in enumerate(checks):
            advance(k + 2, check)
            rows += _made(case, check, made)
    return rows + domain


def _made(case: Case, check: str, made: Callable[[Case], list[Row]]) -> list[Row]:
    """The rows of a check; a process may raise anywhere."""
    try:
        return made(case)
    except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
        return [Row(check, "fail", "raises", "numbers", f"{case.solver} on this process raises "
                                                        f"{told(error)}")]  # fmt: skip


def _domain_rows(case: Case) -> list[Row]:
    """Simulates once for all, and says who left."""
    case.look = look = case.looked()
    h, rows, where = case.length / STEPS, [], case.sde.domain or "anywhere"
    if look.lost:
        cause = "the drift grows faster than the state (TamedEuler), or steps are too long"
        if case.sde.domain:
            cause = f"a step that looks beyond {case.sde.domain}, or {cause}; {case.better()}"
        why = (f"{look.lost:.2%} of paths stop being finite under {case.solver} with steps of "
               f"{h:.2g}: {cause}")  # fmt: skip
        rows = [Row("explosion", "fail", f"{look.lost:.2%} of paths", "0", why, look.lost)]
    why = (f"{look.left:.2%} of paths leave {case.sde.domain or 'the domain'} under {case.solver} "
           f"with steps of {h:.2g}; {case.better()}")  # fmt: skip
    return [*rows, judged("domain", not look.left, f"{look.left:.2%} leave", f"0 ({where})", why,
                          look.left)]  # fmt: skip
