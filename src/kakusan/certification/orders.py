r"""How fast a solver converges on this process: strong and weak order, with error bars.

All grids see one Brownian motion. With X_h the end of a path in steps of h, an error of size
C h^p makes E|X_h - X_{h/2}| = C (1 - 2^-p) h^p: the slope of its logarithm is p, without the bias
that a comparison with one finest grid has. The weak order is the slope of E g(X_h) - E g(X_{h/2})
with g a coordinate or a product of two, where it stands out of its standard error; the differences
along common paths are what makes it stand out at all. Error bars are those of a jackknife over
groups of paths.

Only an order that is too low fails: less noise, or a lucky process, converges faster than
promised. A method is compared with Euler-Maruyama as well, for it may converge fast to the
solution of another equation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.certification.case import Case, flat, moments_of
from kakusan.certification.certificate import Row, judged, skipped
from kakusan.certification.structure import form_of
from kakusan.core.noise import Wants
from kakusan.inference.metrics.common import jackknife
from kakusan.solvers.forms import NoiseForm
from kakusan.solvers.solve import EulerMaruyama, Method

GROUPS = 20
SLACK, BARS = 0.15, 2.5  # pass down to promised - SLACK - BARS standard errors
FINEST, PATHS = 512, 512
ROUNDING = 1e-11  # relative to the size of states
GRIDS = (64, 512)  # means want long steps to stand out, and stiff drifts short ones
TAME = 0.1  # standard deviations that a mean may still move, where steps are short enough
STEADY = 0.75  # between orders of neighbouring halvings
STANDS_OUT = 5.0  # standard errors, for a difference of means to have a slope


class Slope(NamedTuple):
    """A measured order and its standard error; infinite where errors are those of rounding."""

    value: float
    error: float

    def __str__(self) -> str:
        """Both numbers."""
        if self.value == math.inf:
            return "exact"
        return f"{self.value:.2f} ± {self.error:.2f}"


def promised(method: Method, form: NoiseForm | None) -> tuple[float | None, float | None]:
    """The strong and the weak order of the methods of this library; None where none is known.

    Arguments:
        method: The solver.
        form: The form of the noise; None for an ODE.
    """
    name, additive = type(method).__name__, form is NoiseForm.ADDITIVE
    one = 1.0 if form is not NoiseForm.GENERAL else 0.5
    if form is None:
        order = {"EulerMaruyama": 1.0, "TamedEuler": 1.0, "Milstein": 1.0, "RK4": 4.0,
                 "Heun": 2.0, "StratonovichHeun": 2.0, "SRK": 2.0, "WeakSecond": 2.0}  # fmt: skip
        return order.get(name), None
    table: dict[str, tuple[float | None, float | None]] = {
        "EulerMaruyama": (1.0 if additive else 0.5, 1.0),
        "TamedEuler": (1.0 if additive else 0.5, 1.0),
        "Heun": (1.0 if additive else 0.5, 1.0),
        "Milstein": (1.0, 1.0),
        "StratonovichHeun": (one, 2.0 if additive else 1.0),
        "SRK": (1.5, 1.0),
        "Splitting": (one, 2.0),
        "WeakSecond": (None, 2.0),
    }
    return table.get(name, (None, None))


def order_rows(case: Case) -> list[Row]:
    """The rows on strong order, on the limit, and on weak order."""
    checks = ["strong order", "weak order"]
    if case.method.wants is Wants.DRAW:
        why = f"{case.solver} draws from the law itself: there is no error to shrink"
        return [skipped(check, why) for check in checks]
    if case.method.wants is Wants.BRIDGE:
        why = f"{case.solver} chooses its own steps, so halving those of the grid says nothing"
        return [skipped(check, why) for check in checks]
    ode = case.sde.diffusion(case.near(2), case.t(0.3)).deterministic
    form = None if ode else form_of(case)
    strong, weak = case.promised or promised(case.method, form)
    name = form.value + " noise" if form else "an ODE"
    rows = []
    if case.method.wants in (Wants.INCREMENT, Wants.AREA) or ode:
        rows.append(_strong_row(case, strong, name))
    else:
        rows.append(skipped(checks[0], f"{case.solver} follows laws, not paths"))
    if type(case.method) is not EulerMaruyama and case.method.wants is Wants.INCREMENT:
        rows.append(_limit_row(case))
    why = "an ODE has no law but its path"
    return [*rows, skipped(checks[1], why) if ode else _weak_row(case, weak, name)]


# --- strong


def _strong_row(case: Case, due: float | None, name: str) -> Row:
    slope, words, h = Slope(math.nan, 0.0), "", 0.0
    for part in (1.0, 1 / 16):
        x, h = case.x0(case.fewer(PATHS)), case.length * part / FINEST
        ends = _ends(case, x, [FINEST >> k for k in range(5)], part, stream=2)
        slope = _slope(_apart(ends[:-1], ends[1:]))
        words = f"{slope} over {part:g} of the span" if part < 1 else str(slope)
        if _enough(slope, due):
            break
    least = due if due is not None else 0.25
    return judged(
        "strong order", _enough(slope, due), words, _due(due, name),
        f"{case.solver} promises order {least:g} for {name}, and halving its steps from "
        f"{16 * h:.2g} down to {h:.2g} of time shows {slope}: coefficients are not smooth (a "
        "jump, a root at an edge, growth faster than linear), or the steps are too long, or "
        "something other than dw is random",
        slope.value,
        f"higher than promised: noise is weak at steps of {h:.1g}"
        if due is not None and 9 > slope.value > due + SLACK + BARS * slope.error + 0.1 else "",
    )  # fmt: skip


def _enough(slope: Slope, due: float | None) -> bool:
    if due is None:
        return slope.value - BARS * slope.error > 0.25
    return slope.value >= due - SLACK - BARS * slope.error


def _ends(
    case: Case, x: Tensor, steps: list[int], part: float, stream: int, method: Method | None = None
) -> list[Tensor]:
    """The ends of the same paths in each number of steps, finest first."""
    noise = case.noise(round(max(steps) / part), stream, method)
    return [case.march(x, case.grid(n, 0.0, part), noise, method=method) for n in steps]


def _apart(ends: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """How far the ends of paths are apart, (B, 1), in units of the size of all states."""
    rows = flat(ends[0])
    size = rows[rows.isfinite().all(1)].abs().mean().clamp(min=1e-12)
    return [(flat(a) - flat(b)).norm(dim=1)[:, None] / size
            for a, b in zip(ends, others, strict=True)]  # fmt: skip


def _slope(differences: list[Tensor], where: int = 0) -> Slope:
    """The slope of log2 |mean| over halvings, finest first, with a jackknife over paths."""
    good = torch.stack([d.isfinite().all(1) for d in differences]).all(0)
    table = torch.stack([d[good, where] for d in differences])
    if table.shape[1] < 2 * GROUPS:
        return Slope(math.nan, math.nan)
    if float(table.abs().max()) < ROUNDING:
        return Slope(math.inf, 0.0)
    k = torch.arange(len(table), dtype=table.dtype)
    k = (k - k.mean()) / (k - k.mean()).square().sum()

    def fitted(means: Tensor) -> float:
        return float((k * means.abs().clamp(min=1e-300).log2()).sum())

    n = table.shape[1] // GROUPS * GROUPS
    groups = table[:, :n].reshape(len(table), GROUPS, -1).mean(2)
    total = groups.mean(1)
    left_out = [fitted((total * GROUPS - groups[:, g]) / (GROUPS - 1)) for g in range(GROUPS)]
    return Slope(fitted(total), jackknife(left_out))


def _limit_row(case: Case) -> Row:
    """Whether a method and Euler-Maruyama approach each other on the same path."""
    steps = [FINEST >> k for k in range(4)]
    euler, x = EulerMaruyama(), case.x0(case.fewer(PATHS))
    mine = _ends(case, x, steps, 1.0, stream=3)
    other = _ends(case, x, steps, 1.0, stream=3, method=euler)
    apart = _apart(mine, other)
    slope = _slope(apart)
    gap = float(apart[0][apart[0].isfinite()].mean())
    return judged(
        "limit", slope.value >= 0.35 - BARS * slope.error, f"{slope}, {gap:.1e} apart at the end",
        ">= 0.35 to Euler-Maruyama",
        f"{case.solver} and EulerMaruyama stay {gap:.2g} apart on the same path however short the "
        "steps: one of them solves another equation, as a step in the sense of Stratonovich does "
        "that does not say `stratonovich = True`", slope.value,
    )  # fmt: skip


# --- weak


def _weak_row(case: Case, due: float | None, name: str) -> Row:
    paths = min(2**15, 8 * case.paths, max(1024, 2**18 // case.size))
    bound, finest = math.nan, 0
    for finest in GRIDS:
        x = case.x0(paths)
        ends = _ends(case, x, [finest >> k for k in range(6)], 1.0, stream=4)
        good = torch.stack([flat(e).isfinite().all(1) for e in ends]).all(0)
        if good.double().mean() < 0.5:
            continue
        last = flat(ends[0])[good]
        g = [moments_of(flat(e)[good], last.mean(0), last.std(0).clamp(min=1e-12)) for e in ends]
        differences = [a - b for a, b in zip(g[:-1], g[1:], strict=True)]
        found = _stands_out(differences)
        if found is not None:
            first, where = found
            slope = _slope(differences[first : first + 3], where)
            row = _weak_judged(case, slope, due, name, where)
            if row.verdict == "pass" or finest == GRIDS[-1]:
                return row
            continue  # long steps may show less than the order; finer ones decide
        errors = differences[0].std(0) / len(last) ** 0.5
        bound = float((differences[0].mean(0).abs() + 3 * errors).max())
        if bound < TAME:
            break  # finer steps would only be closer
    if bound < ROUNDING:
        return Row("weak order", "pass", "exact", _due(due, name), "", math.inf)
    if not bound < TAME:
        return skipped("weak order", f"{finest} steps are too long for this process to show an "
                                     "order; a shorter span may")  # fmt: skip
    return skipped(
        "weak order",
        f"means differ between grids by less than their statistical errors at {paths} paths, so "
        f"no order can be read; at {finest} steps the bias of means and of products is below "
        f"about {bound:.1g} of a standard deviation (paths= asks for more)",
        f"|bias| < {bound:.1g}", bound,
    )  # fmt: skip


def _due(due: float | None, name: str) -> str:
    return f"{due:g} ({name})" if due is not None else "> 0.25 (no theory known)"


def _stands_out(differences: list[Tensor]) -> tuple[int, int] | None:
    """Three halvings in a row that stand out of their errors, as fine as possible; of what."""
    mean = torch.stack([d.mean(0) for d in differences])
    error = torch.stack([d.std(0) for d in differences]) / len(differences[0]) ** 0.5
    z = mean.abs() / error.clamp(min=1e-15)
    for first in range(len(differences) - 2):
        part = mean[first : first + 3]
        slopes = (part[1:].abs() / part[:-1].abs().clamp(min=1e-300)).log2()
        # a slope that still changes is none yet
        steady = (part.sign() == part[0].sign()).all(0) & (slopes.diff(dim=0).abs()[0] < STEADY)
        least = z[first : first + 3].amin(0) * (steady & (slopes < 3.5).all(0))
        where = int(least.argmax())
        if least[where] > STANDS_OUT:
            return first, where
    return None


def _weak_judged(case: Case, slope: Slope, due: float | None, name: str, where: int) -> Row:
    least = due if due is not None else 0.25 + 2 * SLACK
    i = "mean" if where < case.size else "second moment"
    # three coarse halvings: the next term of the expansion shows
    return judged(
        "weak order", slope.value >= least - 2 * SLACK - BARS * slope.error,
        f"{slope} (of a {i})", _due(due, name),
        f"{case.solver} promises weak order {least:g} for {name}, and halving long steps shows "
        f"{slope}: coefficients are not smooth enough, or the steps are too long for this process "
        "(a shorter span shows its order)", slope.value,
    )  # fmt: skip
