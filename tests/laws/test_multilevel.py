"""Expectations with error bars that can be believed, and cheaper than plain ones."""

import math

import pytest
import torch

from kakusan import (
    SDE,
    Counter,
    Diagonal,
    EulerMaruyama,
    Heun,
    KakusanError,
    Method,
    Scale,
    Zero,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.core.noise import Wants
from kakusan.solvers.multilevel import expectation
from problems import F64

MU, SIGMA, N = 0.4, 0.6, 100
ONE = torch.ones(1, 1, dtype=F64)
growth = SDE.of(lambda x, t: MU * x, lambda x, t: Diagonal(SIGMA * x))
ou = SDE.of(lambda x, t: -x, Scale(1.0))
well = SDE.of(lambda x, t: -2 * x * (x * x - 1), Scale(1.0))


class Milstein(Method):
    """For `growth`."""

    def step(self, sde, x, t, s, dw, state):
        h = (s - t).item()
        return x * (1 + MU * h + SIGMA * dw + SIGMA**2 / 2 * (dw**2 - h)), state


def first(x):
    return x[:, 0]


def _of_the_well(g):
    """E[g(X_1)] from X_0 = 1, by the reversible walk on a fine lattice: an error of its square."""
    x = torch.linspace(-3.5, 3.5, 701, dtype=F64)
    h, U = x[1] - x[0], 0.5 * (x**2 - 1) ** 2
    rate = torch.exp(U[:, None] - U) / (2 * h**2)  # to a neighbour, from energies U: 2 U / sigma²
    L = torch.triu(torch.tril(rate, 1), -1)
    L = L - torch.diag(L.sum(1))
    return (torch.matrix_exp(L) @ g(x[:, None]))[450].item()


CASES = {
    "growth": (growth, first, math.exp(MU), EulerMaruyama(), 2, 0.03),
    "growth-milstein": (growth, first, math.exp(MU), Milstein(), 2, 0.03),
    "call": (
        growth,
        lambda x: (x[:, 0] - 1).clamp(min=0),
        None,
        EulerMaruyama(),
        2,
        0.03,
    ),
    "ou": (ou, lambda x: x[:, 0] ** 2, math.exp(-2) + (1 - math.exp(-2)) / 2, EulerMaruyama(),
           2, 0.02),
    "well": (well, lambda x: x[:, 0] ** 2, None, Heun(), 16, 0.02),
}  # fmt: skip


def _truth(name, g, truth):
    if name == "call":  # Black and Scholes, without discount
        d = (MU + SIGMA**2 / 2) / SIGMA
        phi = lambda v: 0.5 * math.erfc(-v / math.sqrt(2))  # noqa: E731
        return math.exp(MU) * phi(d) - phi(d - SIGMA)
    return _of_the_well(g) if truth is None else truth


@pytest.mark.parametrize("name", CASES)
def test_error_bars_are_honest(name):
    """Of 100 seeds, and within four standard errors of what a normal error has."""
    sde, g, truth, method, steps, tol = CASES[name]
    truth = _truth(name, g, truth)
    found = [expectation(sde, ONE, g, tol, method=method, steps=steps, seed=seed,
                         first_samples=200) for seed in range(N)]  # fmt: skip
    errors = torch.tensor([e.value - truth for e in found])
    bars = torch.tensor([e.error for e in found])
    covered = (errors.abs() <= 2 * bars).double().mean().item()
    assert covered >= 0.954 - 2 * (0.954 * 0.046 / N) ** 0.5, (name, covered)
    assert (bars <= tol).all() and errors.square().mean().sqrt() < tol * (1 + 4 / (2 * N) ** 0.5)
    # neither are they wide: the spread is what the standard errors say
    std = torch.tensor([e.std_error for e in found]).square().mean().sqrt()
    assert abs(errors.std() / std - 1) < 4 / (2 * N) ** 0.5, (name, errors.std(), std)
    # and the bias is no larger than said
    bias = torch.tensor([e.bias for e in found]).mean()
    assert abs(errors.mean()) < bias + 4 * errors.std() / N**0.5, (name, errors.mean(), bias)


@pytest.mark.parametrize(
    ("sde", "method", "beta", "steps"),
    [
        (growth, EulerMaruyama(), 1, 8),
        (growth, Milstein(), 2, 64),
        (ou, EulerMaruyama(), 2, 8),
        (well, EulerMaruyama(), 2, 64),
    ],
    ids=["growth-euler", "growth-milstein", "ou-euler", "well-euler"],
)
def test_variances_and_means_of_the_terms_fall_as_theory_says(sde, method, beta, steps):
    """h for Euler's steps of noise that depends on the state, h² for Milstein's and additive."""
    g = first if sde is growth else lambda x: x[:, 0] ** 2
    found = expectation(sde, ONE, g, 0.02, method=method, steps=steps, first_samples=100_000)
    assert abs(found.variance_rate - beta) < 0.15, found
    _, one, two = found.levels[:3]
    rate = math.log2(one.mean / two.mean)
    error = math.hypot(*((n.variance / n.samples) ** 0.5 / n.mean for n in (one, two)))
    assert abs(rate - 1) < 0.15 + 4 * error, (rate, error)
    assert abs(found.weak_rate - 1) < 0.25, found


def test_levels_refine_by_other_numbers_too():
    truth = math.exp(MU)
    found = expectation(growth, ONE, first, 0.02, steps=3, refine=3, seed=1)
    assert [n.steps for n in found.levels[:3]] == [3, 9, 27] and found.levels[1].cost == 12
    assert abs(found.value - truth) < 3 * found.error, found


def test_it_is_cheaper_than_samples_of_the_last_level_alone():
    found = expectation(growth, ONE, first, 0.003)
    last = found.levels[-1]
    x = ONE.expand(4000, 1)
    plain = solve(growth, x, grids.uniform(0, 1, last.steps),
                  noise=Counter(0, cell=1 / last.steps)).end.var().item()  # fmt: skip
    assert abs(plain / last.plain - 1) < 0.5
    assert found.cost == sum(n.samples * n.cost for n in found.levels)
    assert found.plain_cost > 3 * found.cost, (found.plain_cost, found.cost)


def test_a_seed_gives_one_result_and_batches_change_only_the_draw(monkeypatch):
    a, b, c = (expectation(ou, ONE, first, 0.05, seed=s) for s in (3, 3, 4))
    assert a == b and a.value != c.value
    monkeypatch.setattr("kakusan.solvers.multilevel._NUMBERS", 500)
    largest = [0]

    def g(x):
        largest[0] = max(largest[0], len(x))
        return x[:, 0]

    d = expectation(ou, ONE, g, 0.05, seed=3)
    assert largest[0] == 250 and abs(d.value - math.exp(-1)) < 3 * d.error


class WithArea(Method):
    """The solution of dX = -X dt + dw to order 3/2."""

    wants = Wants.AREA

    def step(self, sde, x, t, s, dw, state):
        h, (w, z) = (s - t).item(), dw
        return x * (1 - h + h * h / 2) + w - z, state


def test_paths_with_areas_are_nested_too():
    found = expectation(ou, ONE, lambda x: x[:, 0] ** 2, 0.01, method=WithArea(), steps=2)
    assert abs(found.value - math.exp(-2) - (1 - math.exp(-2)) / 2) < 3 * found.error
    V = [n.variance for n in found.levels[1:]]
    assert V[0] > 7 * V[1], found  # h³


def test_random_starts_reversed_spans_and_odes():
    n01 = lambda n, source: torch.randn(n, 2, generator=source, dtype=F64)  # noqa: E731
    square = lambda x: x.square().sum(1)  # noqa: E731
    ou2 = SDE.of(lambda x, t: -x, Scale(2**0.5), span=(0.0, 1.0))
    back = reverse(ou2, lambda x, t: -x)  # N(0, I) is stationary
    assert back.span == (1.0, 0.0)
    found = expectation(back, n01, square, 0.05, steps=4)
    assert abs(found.value - 2) < 3 * found.error, found
    decay = SDE.of(lambda x, t: -x, Zero())
    found = expectation(decay, n01, square, 0.02, steps=4, method=Heun())
    assert abs(found.value - 2 * math.exp(-2)) < 3 * found.error, found
    found = expectation(decay, ONE, first, 1e-3, span=(0.0, 2.0), steps=4, method=Heun())
    assert found.std_error < 1e-12 and abs(found.value - math.exp(-2)) < 1e-3, found


def test_the_table_is_for_reading():
    words = str(expectation(ou, ONE, first, 0.05)).splitlines()
    assert "+-" in words[0] and words[1].split() == ["level", "steps", "samples", "mean",
                                                     "variance"]  # fmt: skip
    assert len(words) == 2 + 3


class Wild(Method):
    wants = Wants.THREE_POINT

    def step(self, sde, x, t, s, dw, state):
        return x, state


def test_what_is_refused():
    with pytest.raises(KakusanError, match="takes about .* more than max_samples=5000; 3000 samp"):
        expectation(growth, ONE, first, 0.001, max_samples=5000)
    with pytest.raises(KakusanError, match=r"5000 samples reach a tolerance of about 0\.\d"):
        expectation(growth, ONE, first, 0.001, max_samples=5000)
    with pytest.raises(KakusanError, match="not met with 8 steps .* falls as h"):
        expectation(growth, ONE, first, 0.005, max_level=2)
    with pytest.raises(KakusanError, match="wants three_point, of which a coarse step cannot"):
        expectation(growth, ONE, first, 0.1, method=Wild())
    with pytest.raises(KakusanError, match=r"one number each, \(1000,\), and gave \(1000, 1\)"):
        expectation(growth, ONE, lambda x: x, 0.1)
    with pytest.raises(KakusanError, match="tolerance is > 0"):
        expectation(growth, ONE, first, 0.0)
    with pytest.raises(KakusanError, match="refine >= 2; got steps=2 and refine=1"):
        expectation(growth, ONE, first, 0.1, refine=1)
    with pytest.raises(KakusanError, match="3000 in all, and max_samples is 10"):
        expectation(growth, ONE, first, 0.1, max_samples=10)
