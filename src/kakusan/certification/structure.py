r"""The noise of a process: its form, whether G has an inverse, and the divergence of GGᵀ.

The divergence is measured in three ways that fail apart. The process's own `gram_divergence` may
be a formula with an error in it. Forward-mode derivatives of G are exact, but blind to whatever is
hidden from them: `detach`, numpy, a table. Differences see all that a simulation sees:

* central differences of fourth order, over a thousandth of the size of a state, see derivatives
  that autograd does not;
* differences over a quarter of that size, against the integral of the derivative in between, see
  steps of a table whose derivative is zero wherever it exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kakusan.certification.case import F64, Case, finite_rows, flat
from kakusan.certification.certificate import Row, judged, skipped
from kakusan.certification.conformance import told
from kakusan.core import calculus
from kakusan.core.types import State, Time
from kakusan.processes.linear import LinearSDE
from kakusan.solvers.forms import NoiseForm, noise_form

MOST = 64  # numbers in a state, for checks that take a few passes for each of them
STATES = 64
EXACT, CLOSE, ROUGH = 1e-8, 1e-3, 0.1

MEANS = {
    NoiseForm.ADDITIVE: "Euler-Maruyama has strong order 1, SRK 3/2",
    NoiseForm.SCALAR: "Milstein has strong order 1, SRK 3/2",
    NoiseForm.DIAGONAL: "Milstein has strong order 1, SRK 3/2",
    NoiseForm.COMMUTATIVE: "Milstein and StratonovichHeun have strong order 1; SRK refuses it",
    NoiseForm.GENERAL: "no method here has a strong order above 1/2; WeakSecond has weak order 2",
}


def form_of(case: Case) -> NoiseForm:
    """The most general form along the paths that were looked at."""
    if case.form is None:
        case.form = _form_of(case)
    return case.form


def _form_of(case: Case) -> NoiseForm:
    if isinstance(case.sde, LinearSDE):
        return NoiseForm.ADDITIVE  # by construction; its rates are derivatives already
    x, t = case.look.some(STATES, case.seed)
    # a process may change its form with time, not within a batch
    every = [noise_form(case.sde, x[t == u], u) for u in t.unique()]
    return max(every, key=list(NoiseForm).index)


def noise_row(case: Case) -> Row:
    """The form of the noise, and what it means."""
    if case.sde.diffusion(case.near(2), case.t(0.3)).deterministic:
        return Row("noise", "pass", "none", "any", "an ODE: Heun, RK4 and DormandPrince solve it")
    form = form_of(case)
    return Row("noise", "pass", form.value, "any", MEANS[form])


def matrices(case: Case, x: State, t: Time) -> Tensor:
    """G as matrices, (B, d, m)."""
    G, shape = case.sde.diffusion(x, t), case.sde.noise_shape(x)
    basis = torch.eye(x.new_empty(shape[1:]).numel(), dtype=x.dtype)
    columns = [flat(G.mv(e.reshape(1, *shape[1:]).expand(shape).contiguous())) for e in basis]
    return torch.stack(columns, 2)


def ellipticity_row(case: Case) -> Row:
    """How far G is from having no inverse, along paths."""
    check = "ellipticity"
    x, t = case.look.some(256, case.seed)
    if case.sde.diffusion(x[:1], t[0]).deterministic:
        return skipped(check, "an ODE has no noise: nothing that needs it (tilts, Malliavin "
                              "weights, learned scores) applies")  # fmt: skip
    if case.size > MOST:
        return skipped(check, f"the condition of G takes {case.size} products a state")
    G = matrices(case, x, t)
    if not G.isfinite().all():
        return Row(check, "fail", "not finite", "finite", "G is not finite along simulated paths")
    size = torch.linalg.svdvals(G)
    most, least = size[:, 0], size[:, -1] if G.shape[2] >= G.shape[1] else 0 * size[:, 0]
    condition = (most / least).nan_to_num(nan=float("inf"))
    worst, bad = float(condition.max()), int((condition > 1e10).sum())
    measured = f"condition up to {worst:.3g}"
    if not bad:
        note = "" if worst < 1e4 else "G is nearly singular: its inverse loses digits"
        return Row(check, "pass", measured, "any", note, worst)
    d, m = G.shape[1:]
    shape = f"{m} noises drive {d} numbers" if m < d else f"at {bad} of {len(x)} states"
    return Row(check, "pass", f"G singular ({shape})", "any",
               "what asks for the inverse of G raises NotElliptic: the target Local, "
               "Operator.tsolve; Skorokhod(window=...) looks over several steps and may still "
               "learn the score", worst)  # fmt: skip


# --- divergence


def divergence_rows(case: Case) -> list[Row]:
    """The derivatives of G against differences, and `gram_divergence` against the better one."""
    checks = ("derivatives of G", "divergence")
    if case.size > MOST:
        return [
            skipped(c, f"takes several passes for each of {case.size} numbers") for c in checks
        ]
    if isinstance(case.sde, LinearSDE):
        return [skipped(c, "a LinearSDE has additive noise by construction") for c in checks]
    x, t = case.look.some(STATES, case.seed)
    fine, size = differences(case, x, t)
    try:
        auto = calculus.gram_divergence(case.sde.diffusion, x, t)
    except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
        auto = None
        why = (
            f"autograd cannot differentiate G, which raises {told(error)}: write it in torch, or "
            "give gram_divergence and use methods without derivatives"
        )
        first = Row(checks[0], "fail", "raises", "differentiable", why)
    else:
        first = _derivatives_row(case, checks[0], x, t, auto, fine, size)
    return [first, _divergence_row(case, checks[1], x, t, auto, fine, size, first)]


def _derivatives_row(
    case: Case, check: str, x: State, t: Time, auto: State, fine: State, size: Tensor
) -> Row:
    error, jump = _upper(_relative(auto, fine, size)), _jumps(case, x, t)
    expected = f"<= {CLOSE:.0e}; <= {ROUGH}"
    measured = f"{error:.1e}; over long ways {jump:.1e}"
    if not error <= CLOSE:
        return Row(check, "fail", measured, expected,
                   "autograd does not see all that G does with the state: a detach, numpy or "
                   "another way around torch inside G; reverse and Milstein would be wrong",
                   error)  # fmt: skip
    return judged(
        check, jump <= ROUGH, measured, expected,
        "GGᵀ changes over a quarter of the size of a state by other than the integral of its "
        "derivative: it jumps, as a table look-up or a rounded state does; interpolate the table",
        max(error, jump),
    )  # fmt: skip


def _divergence_row(
    case: Case, check: str, x: State, t: Time, auto: State | None, fine: State, size: Tensor,
    first: Row,
) -> Row:  # fmt: skip
    own = case.sde.gram_divergence(x, t)
    if (
        auto is None
        or first.verdict == "fail"
        and not _upper(_relative(auto, fine, size)) <= CLOSE
    ):
        against, truth, least = "differences", fine, CLOSE
    elif first.verdict == "fail":
        return skipped(check, "GGᵀ jumps, so it has no divergence to compare with")
    else:
        against, truth, least = "autograd", auto, EXACT
    errors = _relative(own, truth, size)
    error = _upper(errors) if truth is fine else float(errors.max())
    row = int(errors.nan_to_num(nan=-1.0).argmax())
    i = int(flat((own - truth).abs())[row].argmax())
    here = [float(flat(v)[row, i]) for v in (own, fine)]
    return judged(
        check, error <= least, f"{error:.1e} from {against}", f"<= {least:.0e}",
        f"gram_divergence is not the divergence of GGᵀ: at x = {_short(flat(x)[row].tolist())} "
        f"number {i} is {here[0]:.4g}, and differences of GGᵀ give {here[1]:.4g}; a reversed "
        "process would settle in another law (leave gram_divergence out, and autograd does it)",
        error,
    )  # fmt: skip


def _short(x: list[float]) -> str:
    return "[" + ", ".join(f"{v:.3g}" for v in x[:4]) + (", ...]" if len(x) > 4 else "]")


def _relative(a: State, b: State, size: Tensor) -> Tensor:
    """The largest difference at each state, over the size of the terms there, (B,)."""
    error = flat((a - b).abs()).amax(1) / size
    # differences that reach beyond the domain are NaN, and say nothing
    return torch.where(flat(b).isfinite().all(1), error.nan_to_num(nan=torch.inf), torch.nan)


def _upper(errors: Tensor) -> float:
    """What most errors stay below: differences across a kink are wrong, but at few states."""
    good = errors[~errors.isnan()]
    return float(good.quantile(0.75)) if len(good) else float("nan")


def _lengths(x: State) -> Tensor:
    """The size of the numbers of a state, like the state: their own, or that of all of them."""
    common = x.abs().mean(0, keepdim=True) + x.std(0, keepdim=True)
    return torch.maximum(x.abs(), 0.1 * common).clamp(min=1e-8)


def _column(case: Case, x: State, t: Time, j: int) -> tuple[State, State]:
    """The direction e_j beside the states, and GGᵀ e_j."""
    e = torch.zeros_like(flat(x))
    e[:, j] = 1
    e = e.reshape(x.shape)
    return e, case.sde.diffusion(x, t).gram(e)


def differences(case: Case, x: State, t: Time) -> tuple[State, Tensor]:
    """The divergence by differences, NaN beyond the domain; and the size of its terms, (B,)."""
    total, length = torch.zeros_like(x), _lengths(x)
    size = torch.zeros(len(x), dtype=F64)
    for j in range(case.size):
        e, D = _column(case, x, t, j)
        h = (1e-3 * length * e).flatten(1).sum(1).reshape(-1, *(1,) * (x.ndim - 1))
        near, far = (
            (_column(case, x + c * h * e, t, j)[1] - _column(case, x - c * h * e, t, j)[1])
            for c in (1, 2)
        )
        term = (8 * near - far) / (12 * h)
        ok = case.sde.inside(x + 2 * h * e) & case.sde.inside(x - 2 * h * e)
        term = torch.where(ok.reshape(h.shape), term, torch.nan)
        total = total + term
        # beside a divergence that vanishes, what counts is how fast G might change
        scale = flat(D).abs().amax(1) / flat(h)[:, 0] * 1e-3
        size = size + flat(term).abs().amax(1).nan_to_num() + 1e-3 * scale
    return total, size.clamp(min=1e-12)


def _jumps(case: Case, x: State, t: Time) -> float:
    """Differences of GGᵀ over long ways against the integral of its derivative, relative."""
    nodes, weights = (torch.tensor(v, dtype=F64) for v in _GAUSS)
    length, found, due = 0.25 * _lengths(x), [], []
    scale = torch.zeros((), dtype=F64)
    for j in range(case.size):
        e, D = _column(case, x, t, j)
        H = length * e
        up, down = x + H, x - H
        ok = case.sde.inside(up) & case.sde.inside(down)
        if not ok.any():
            continue
        x_ok, e_ok, H_ok, t_ok = x[ok], e[ok], H[ok], t[ok]
        found.append(flat(_column(case, up[ok], t_ok, j)[1] - _column(case, down[ok], t_ok, j)[1]))
        total = torch.zeros_like(found[-1])
        for u, w in zip(nodes, weights, strict=True):
            slope = torch.func.jvp(
                lambda y, e=e_ok, t=t_ok: case.sde.diffusion(y, t).gram(e),
                (x_ok + u * H_ok,), (H_ok,),
            )[1]  # fmt: skip
            total = total + w * flat(slope)
        due.append(total)
        scale = torch.maximum(scale, flat(D).abs().max())
    if not found:
        return 0.0
    a, b = finite_rows(torch.cat(found), torch.cat(due))
    return float(
        (a - b).square().mean().sqrt() / (b.square().mean().sqrt() + 1e-3 * scale + 1e-12)
    )


# Gauss and Legendre's rule with eight nodes on [-1, 1]
_HALF = (0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363)
_BESIDE = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)
_GAUSS = ([*_HALF, *(-u for u in _HALF)], [*_BESIDE, *_BESIDE])
