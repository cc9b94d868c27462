"""Whether the process, run forward and then backward by its score, comes back.

Starts are run to the end of the span and from there back by `reverse(sde, score)`: the law that
arrives must be the law that started. This takes all of it at once: drift, G, the divergence of
GGᵀ and the score. What is known decides which starts and which score:

* `score(x, t)` and given starts: those starts;
* `score_from(x0)` or `log_transition`: the path of each start is reversed by the score given that
  start, back to an eighth of the span, since the score of a point is infinite at the point;
* `log_stationary`: draws of it, and its gradient as the score at all times;
* nothing, and learn=True: a score is learned, and its error is allowed for.

Starts and returns are compared pairwise in means and covariances and by an energy distance between
separate halves, beyond the bias that halving the steps shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.certification.case import (
    Case,
    bias_of,
    called,
    finite_rows,
    flat,
    moments_of,
    score_of,
)
from kakusan.certification.certificate import Row, skipped
from kakusan.certification.conformance import told
from kakusan.certification.draws import stationary_draws
from kakusan.certification.laws import SIGMAS, gradient, known_score
from kakusan.core.types import Field, State
from kakusan.inference.metrics import energy_distance
from kakusan.processes.transforms import reverse
from kakusan.solvers.solve import EulerMaruyama

STEPS, EARLY = 256, 1 / 8
LEARNING, ITERATIONS = 200, 1500  # steps of the chain whose score is learned; of the optimiser
# a learned score is an estimate: means within a tenth, products within a sixth, of a deviation
LEARNED_MEAN, LEARNED_PRODUCT, LEARNED_ENERGY = 0.1, 0.17, 0.02


class Plan(NamedTuple):
    """Which way forward and back.

    Attributes:
        starts: Where paths start.
        score: The score given these starts.
        since: Where the comparison is made, as a fraction of the span.
        steps: How many steps the span has.
        name: What the score is, in words.
    """

    starts: State
    score: Field
    since: float
    steps: int
    name: str


def reversal_row(case: Case) -> Row:
    """The row on reversal."""
    check = "reversal"
    if case.sde.diffusion(case.near(2), case.t(0.3)).deterministic:
        return skipped(check, "an ODE runs backwards as it is")
    try:
        plan = planned(case)
        if isinstance(plan, Row):
            return plan
        return _compared(case, check, plan)
    except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
        return Row(check, "fail", "raises", "returns", f"running back raises {told(error)}")


def planned(case: Case) -> Plan | Row:
    """The plan, or the row that says why there is none."""
    score, name = known_score(case)
    enough = case.given and len(case.starts) >= 200
    if score is not None and name == "score" and enough:
        n = min(case.fewer(case.paths), len(case.starts))
        return Plan(case.x0(n), score(case.x0(n)), 0.0, STEPS, "its score(x, t)")
    if score is not None and name != "score":
        x0 = case.x0(case.fewer(case.paths))
        return Plan(x0, score(x0), EARLY, STEPS, f"its {name}")
    draws = stationary_draws(case, case.paths)
    if draws is not None:
        law: Callable[[State], Tensor] = case.sde.log_stationary  # pyright: ignore[reportAttributeAccessIssue]
        return Plan(draws, gradient(lambda x, t: law(x)), 0.0, STEPS, "its stationary score")
    if case.learn:
        return _learned(case)
    if score is not None:
        return skipped("reversal", "score(x, t) belongs to a law of starts: give at least 200 "
                                   "draws of it as starts")  # fmt: skip
    return skipped("reversal", "no score is known: learn=True (--learn) learns one, and so the "
                               "reverse is put to the test")  # fmt: skip


def _learned(case: Case) -> Plan | Row:
    from kakusan.learn import learn_score

    starts = case.starts if case.given and len(case.starts) > 1 else case.starts[0]
    score = learn_score(
        case.sde, starts, LEARNING, iterations=ITERATIONS, seed=case.seed, quiet=case.quiet
    )

    def field(x: State, t: Tensor) -> State:
        with torch.no_grad():
            return score(x, t).to(x.dtype)

    return Plan(case.x0(case.fewer(case.paths)), field, EARLY, LEARNING, "a learned score")


def there_and_back(case: Case, plan: Plan, steps: int) -> tuple[State, State]:
    """States at the fraction `since` of the span, and the same after the way there and back."""
    lo, n = plan.since, round(steps * (1 - plan.since))
    forth, back = (case.noise(steps if lo == 0 else 8 * steps, stream=k) for k in (8, 9))
    euler = EulerMaruyama()
    x = plan.starts
    if lo:
        x = case.march(x, case.grid(steps - n, 0.0, lo), forth, method=euler)
    end = case.march(x, case.grid(n, lo, 1.0), forth, method=euler)
    backward = reverse(case.sde, plan.score)
    return x, case.march(end, case.grid(n, 1.0, lo), back, sde=backward, method=euler)


def _compared(case: Case, check: str, plan: Plan) -> Row:
    x, y = there_and_back(case, plan, plan.steps)
    # learned for one grid, a score is biased on any other
    u, v = (
        (x, y) if plan.name == "a learned score" else there_and_back(case, plan, plan.steps // 2)
    )
    lost = 1 - len(finite_rows(x, y, u, v)[0]) / len(x)
    if lost > 0.01:
        return Row(check, "fail", f"{lost:.1%} of paths lost", "< 1%",
                   f"{lost:.1%} of the paths stop being finite on the way there and back by "
                   f"{plan.name}", lost)  # fmt: skip
    x, y, u, v = finite_rows(x, y, u, v)
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-12)
    away = moments_of(y, centre, scale) - moments_of(x, centre, scale)
    coarse = moments_of(v, centre, scale) - moments_of(u, centre, scale)
    bias = bias_of(away - coarse)
    if plan.name == "a learned score":
        bias[: x.shape[1]] += LEARNED_MEAN
        bias[x.shape[1] :] += LEARNED_PRODUCT
    z, at = score_of(away, bias)
    energy, energy_z = _energy(x / scale, y / scale, u / scale, v / scale, plan)
    shift, what = float(away[:, at].mean()), called("covariance", at, x.shape[1])
    measured = f"{shift:+.2g} sd (z {z:.1f}); energy {energy:.0e} (z {energy_z:.1f})"
    if max(z, energy_z) <= SIGMAS:
        return Row(check, "pass", measured, f"z <= {SIGMAS}", f"by {plan.name}", max(z, energy_z))
    return Row(
        check, "fail", measured, f"z <= {SIGMAS}",
        f"forward from the starts and back by {plan.name} arrives elsewhere: {what} is off by "
        f"{shift:+.3g} standard deviations ({len(x)} paths), beyond errors and the bias of "
        "steps: the score, the divergence of GGᵀ or the drift is not that of this process",
        max(z, energy_z),
    )  # fmt: skip


def _energy(x: Tensor, y: Tensor, u: Tensor, v: Tensor, plan: Plan) -> tuple[float, float]:
    """The energy distance between halves, and its z beyond the bias of the steps."""
    half = min(len(x) // 2, 2000)

    def distance(a: Tensor, b: Tensor) -> tuple[float, float]:
        found = energy_distance(flat(a[:half]), flat(b[half : 2 * half]))
        return found.value, found.std_error

    value, error = distance(x, y)
    bias = 2 * abs(value - distance(u, v)[0])
    bias += LEARNED_ENERGY if plan.name == "a learned score" else 0.0
    return value, max(0.0, value - bias) / max(error, 1e-12)
