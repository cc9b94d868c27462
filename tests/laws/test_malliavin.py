"""Weights of paths: their mean, given X_s and Y, is the slope of log p(Y | X_s), for the chain.

The strongest test needs no density: for smooth psi, psi(X_N) S_s and the derivative of psi(X_N)
along the path have the same mean given X_s.
"""

import math

import pytest
import torch

from kakusan import (
    SDE,
    VP,
    Brownian,
    Dense,
    Diagonal,
    DoubleWell,
    Fresh,
    GeometricBrownian,
    KakusanError,
    Landmarks,
    NotElliptic,
    OrnsteinUhlenbeck,
    Scale,
    Underdamped,
    reverse,
    solve,
)
from kakusan.objectives.local import Skorokhod
from kakusan.objectives.malliavin import (
    Average,
    Bootstrapped,
    First,
    Last,
    Mass,
    PathWeight,
    Weighted,
    Window,
)
from kakusan.objectives.windows import expansion
from kakusan.solvers.gaussian import AncestralSteps, EulerSteps
from kakusan.solvers.solve import Path
from problems import F64

PHI = (1 + 5**0.5) / 2
OPTIMAL = Weighted(lambda t, end: abs(end - t) ** (PHI - 1))


def uniform(steps, end=1.0):
    return torch.linspace(0, end, steps + 1, dtype=F64)


def walk(steps, x, seed=1):
    """A path of any chain."""
    g, xs, dws = torch.Generator().manual_seed(seed), [x], []
    for k in range(len(steps)):
        z = torch.randn(steps.noise_shape(x), generator=g, dtype=F64)
        dws.append((z * steps.h(k) ** 0.5).to(x))
        xs.append(steps.after(xs[-1], k, dws[-1]))
    return Path(steps.grid, torch.stack(xs), torch.stack(dws))


def some(n, d=2, seed=0):
    return 0.5 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def z_score(q):
    return (q.mean(0).abs() / (q.std(0) / len(q) ** 0.5)).max().item()


# --- exact for the chain, at any step size


def turning(x, t):
    return 0.8 * torch.sin(2 * x.flip(1)) * (1 + t) - x


def growth(x):
    return torch.exp(0.6 * torch.tanh(x.sum(1, keepdim=True)))


def diagonal(x, t):
    return Diagonal(growth(x) * (1 + 0.4 * torch.sin(x.flip(1) + x)) * (1 + t))


def dense(x, t):
    a, b = torch.sin(1.5 * x[:, 0] + x[:, 1]), torch.cos(x[:, 0] - x[:, 1])
    first = torch.stack([1 + 0.4 * a, 0.3 * b], 1)
    G = torch.stack([first, torch.stack([0.2 * a * b, 0.9 - 0.3 * b], 1)], 1)
    return Dense(growth(x)[:, :, None] * G)


CURVED = SDE.of(turning, dense)
GRID, UNEVEN = uniform(6), uniform(7) ** 1.7
CHAINS = {
    "additive": EulerSteps(SDE.of(turning, Scale(0.8)), GRID),
    "constant matrix": EulerSteps(
        SDE.of(turning, Dense(torch.tensor([[1.0, 0.5], [0.0, 0.7]], dtype=F64))), UNEVEN
    ),
    "diagonal": EulerSteps(SDE.of(turning, diagonal), UNEVEN),
    "dense": EulerSteps(CURVED, GRID),
    "dense, uneven": EulerSteps(CURVED, UNEVEN),
    "reversed": EulerSteps(reverse(CURVED, lambda x, t: -torch.sin(x)), UNEVEN.flip(0)),
    "ancestral": AncestralSteps(
        VP(), lambda x, t: -torch.tanh(2 * x), torch.linspace(0.6, 0.02, 6, dtype=F64)
    ),
}
KINDS = {
    "first": First(),
    "rho 0.6": Window(-(1 / 6) / math.log(0.6)),
    "average": Average(),
    "weighted": Weighted(lambda t, end: 1.5 - math.sin(3 * t)),
    "optimal": OPTIMAL,
    "last": Last(),
}


def pathwise(steps, path, s, last):
    """For six functions psi: psi(X_last), and its derivative in X_s along the path."""
    directions = torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    y = path.x[s].clone().requires_grad_()
    x = y
    for k in range(s, last):
        x = steps.after(x, k, path.dw[k])
    values = [f(x @ w) for w in directions for f in (torch.sin, torch.tanh)]
    slopes = [torch.autograd.grad(v.sum(), y, retain_graph=True)[0] for v in values]
    return [(v.detach()[:, None], g) for v, g in zip(values, slopes, strict=True)]


def worst(weights, steps, path, last=None):
    """The largest |z| of E[(psi(X_N) S_s - ∂psi(X_N)/∂X_s) phi(X_s)], for each weight."""
    last, zs = last or len(steps), [0.0] * len(weights)
    for s in (0, last // 2, last - 1):
        x, pairs = path.x[s], pathwise(steps, path, s, last)
        phis = (torch.ones_like(x[:, :1]), x.sum(1, keepdim=True).sin(), x[:, :1].cos())
        for i, weight in enumerate(weights):
            S = weight(steps, path, [s], last)[0]
            found = (z_score((psi * S - slope) * phi) for psi, slope in pairs for phi in phis)
            zs[i] = max(zs[i], *found)
    return zs


@pytest.mark.parametrize("chain", CHAINS)
def test_the_mean_of_the_weight_is_the_slope(chain):
    steps = CHAINS[chain]
    zs = worst(KINDS.values(), steps, walk(steps, some(6000)))
    assert max(zs) < 4.5, dict(zip(KINDS, zs, strict=True))


@pytest.mark.parametrize("chain", ["diagonal", "dense"])
def test_it_is_not_without_the_determinant(chain, monkeypatch):
    steps = CHAINS[chain]
    path = walk(steps, some(40_000))
    for form in (Scale, Dense):
        whole = form.logabsdet
        monkeypatch.setattr(form, "logabsdet", lambda G, x, f=whole: f(G, x).detach())
    zs = worst([First(), KINDS["rho 0.6"], Average()], steps, path)
    assert min(zs) > 30, zs


def test_first_is_the_score_of_one_normal_step():
    steps, k = CHAINS["dense, uneven"], 3
    path = walk(steps, some(50))
    x = path.x[k].clone().requires_grad_()
    G = dense(x, steps.grid[k]).G
    law = torch.distributions.MultivariateNormal(steps.mean(x, k), steps.h(k) * G @ G.mT)
    exact = torch.autograd.grad(law.log_prob(path.x[k + 1]).sum(), x)[0]
    assert torch.allclose(First()(steps, path, [k])[0], exact)
    # a window far shorter than a step
    assert torch.allclose(Window(1e-4)(steps, path, [k])[0], exact)


def test_a_weight_is_its_sum():
    """S of one path by full Jacobians, for windows on an uneven grid."""
    steps, tau = CHAINS["dense, uneven"], 0.4
    path, n = walk(steps, some(1)), len(steps)

    def along(k):  # J_{k|2}
        def run(x):
            for j in range(2, k):
                x = steps.after(x, j, path.dw[j])
            return x[0]

        return torch.func.jacrev(run)(path.x[2])[:, 0]

    total, mass = torch.zeros(2, dtype=F64), 0.0
    for k in range(2, n):
        a = math.exp(-(steps.grid[k] - steps.grid[2]) / tau)
        G = dense(path.x[k], steps.grid[k])
        turn = torch.func.grad(lambda x, t=steps.grid[k]: dense(x, t).logabsdet(x).sum())
        kick = torch.linalg.solve(G.G[0].mT, path.dw[k][0])
        total += a * (along(k + 1).mT @ kick - steps.h(k) * along(k).mT @ turn(path.x[k])[0])
        mass += a * steps.h(k)
    assert torch.allclose(Window(tau)(steps, path, [2])[0, 0], total / mass)


class Forgetful(PathWeight):
    """A kind of one's own: what comes after step 2 does not count for steps before it."""

    def mass(self, steps, k, last):
        return Mass(float(k != 2), 1.0)


def test_a_kind_of_ones_own():
    steps = CHAINS["dense, uneven"]
    path = walk(steps, some(6000))
    assert max(worst([Forgetful()], steps, path)) < 4.5
    whole, cut = Forgetful()(steps, path), Average()(steps, path, last=3)
    assert torch.allclose(whole[:3], cut)
    for k in range(len(steps)):
        assert torch.equal(Forgetful()(steps, path, [k])[0], whole[k]), k


def test_one_path_serves_many_ends():
    steps = CHAINS["dense, uneven"]
    path = walk(steps, some(10_000))
    cut = Path(path.t[:5], path.x[:5], path.dw[:4])
    for weight in KINDS.values():
        early = weight(steps, path, last=4)
        assert early.shape == (4, 10_000, 2)
        assert torch.equal(early, weight(steps, cut)), weight
        assert torch.equal(early[[3, 1, 3]], weight(steps, path, [3, 1, 3], last=4)), weight
    assert worst([Window(0.3)], steps, path, last=4)[0] < 4.5


# --- chains whose slopes are known


def exact_score(steps, path, last=None):
    """∇log p(X_N | X_s) of a linear chain in one dimension, for all s, like the weights."""
    n, one = last or len(steps), torch.ones(1, 1, dtype=F64)
    a, v, out = 1.0, 0.0, []
    for k in reversed(range(n)):
        v = v + a**2 * steps.h(k) * steps.operator(one, k).mv(one).item() ** 2
        a = a * (steps.mean(one, k) - steps.mean(0 * one, k)).item()
        out.append(a * (path.x[n] - a * path.x[k]) / v)
    return torch.stack(out[::-1])


def slope_and_error(S, u):
    """The regression of S on u through 0, with its standard error."""
    slope = (S * u).mean() / (u * u).mean()
    return slope.item(), (((S - slope * u) * u).std() / (u * u).mean() / len(u) ** 0.5).item()


def normal_data(x, t):
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    return -x / (0.3 * alpha**2 + sigma**2)


LINEAR = {
    "brownian": EulerSteps(Brownian(), uniform(12)),
    "ou": EulerSteps(OrnsteinUhlenbeck(rate=2.0, sigma=0.7), uniform(12)),
    "ou, uneven": EulerSteps(OrnsteinUhlenbeck(rate=2.0, sigma=0.7), uniform(12) ** 2),
    "spreading": EulerSteps(SDE.of(lambda x, t: 2 * t * x, Scale(0.7)), uniform(12)),
    "reversed": EulerSteps(reverse(VP(), normal_data), torch.linspace(1, 0.05, 21, dtype=F64)),
    "ancestral": AncestralSteps(VP(), normal_data, torch.linspace(1, 0.05, 21, dtype=F64)),
}


@pytest.mark.parametrize("chain", LINEAR)
def test_the_regression_of_weights_is_the_score(chain):
    steps = LINEAR[chain]
    path = walk(steps, some(20_000, 1))
    exact = exact_score(steps, path)
    for name, weight in KINDS.items():
        for s in (0, 5, len(steps) - 1):
            slope, error = slope_and_error(weight(steps, path, [s])[0], exact[s])
            assert abs(slope - 1) < 4.5 * error + 1e-9, (name, s)


def test_brownian_motion_leaves_the_average_no_noise():
    for grid in (uniform(10), uniform(10) ** 2):
        steps = EulerSteps(Brownian(), grid)
        path = walk(steps, some(20, 3))
        left = (1 - grid[:-1]).reshape(-1, 1, 1)
        assert torch.allclose(Average()(steps, path), (path.end - path.x[:-1]) / left)
        assert torch.equal(Average()(steps, path), Window(math.inf)(steps, path))


def test_matched_weights_leave_a_linear_chain_no_noise():
    """α' proportional to J⁻¹ GGᵀ J⁻ᵀ: denoising score matching, seen from the other side."""
    steps = LINEAR["ou"]
    path, h, rate = walk(steps, some(20, 1)), 1 / 12, 2.0
    # dw enters X_N as (1 - rate h)^(N - k - 1), and S as (1 - rate h)^(k + 1)
    matched = Weighted(lambda t, end: (1 - rate * h) ** (-2 * t / h))
    assert torch.allclose(matched(steps, path), exact_score(steps, path))


# --- what is often printed


def test_trap_the_rate_of_the_optimal_weights_and_their_variance():
    """α' = φ (1 - t)^(φ - 1), not α; its variance is not the least: that of the average is 0."""
    steps = EulerSteps(Brownian(), uniform(200))
    path = walk(steps, torch.zeros(4000, 1, dtype=F64))

    def variance(weight):
        return (weight(steps, path, [0])[0] - path.end).square()

    printed = Weighted(lambda t, end: 1 - (1 - t) ** PHI)
    for weight, exact in (
        (OPTIMAL, PHI**2 / (2 * PHI - 1) - 1),
        (printed, 0.2361),
        (First(), 199),
    ):
        q = variance(weight)
        # and a sum over 200 steps for an integral
        assert abs(q.mean() - exact) < 4.5 * q.std() / 4000**0.5 + 0.01 * exact, weight
    assert variance(Average()).max() < 1e-20


def test_trap_rates_multiply_new_terms_alone():
    """Differences of the average's sums hold later increments, too: a slope of 2.2, not 1."""
    steps = EulerSteps(OrnsteinUhlenbeck(rate=2.0, sigma=1.0), uniform(100))
    path, h = walk(steps, some(20_000, 1)), 0.01
    exact = exact_score(steps, path)[0]
    slope, error = slope_and_error(Weighted(lambda t, end: t)(steps, path, [0])[0], exact)
    assert abs(slope - 1) < 4.5 * error
    left, rate = (v.reshape(-1, 1, 1) for v in (1 - path.t, path.t[:-1]))
    printed = -(Average()(steps, path) * left[:-1]).diff(
        dim=0, append=torch.zeros(1, *exact.shape)
    )
    slope, error = slope_and_error((rate * printed).sum(0) / (rate.sum() * h), exact)
    # the mean of S_k, given X_0 and the end, is the score at 0 times 0.98^-k
    grown = -(left * 0.98 ** -torch.arange(101).reshape(-1, 1, 1)).diff(dim=0)
    expected = ((rate * grown).sum() / (rate.sum() * h)).item()
    assert abs(slope - expected) < 4.5 * error and expected > 2.2


@pytest.mark.parametrize("n", [10, 80])
def test_trap_the_end_of_a_step_owes_the_determinant(n, monkeypatch):
    """E[X_T S] = ∂E[X_T]/∂x for geometric Brownian motion; twice that without, at any h."""
    steps = EulerSteps(GeometricBrownian(0.1, 0.4), uniform(n))
    path, exact = walk(steps, torch.ones(20_000, 1, dtype=F64)), (1 + 0.1 / n) ** n
    q = path.end * Average()(steps, path, [0])[0]
    assert abs(q.mean() - exact) < 4.5 * q.std() / len(q) ** 0.5
    monkeypatch.setattr(Scale, "logabsdet", lambda G, x: x.new_zeros(len(x)))
    wrong = path.end * Average()(steps, path, [0])[0]
    assert abs(wrong.mean() - 2 * exact) < 4.5 * wrong.std() / len(wrong) ** 0.5


def test_trap_the_sign_at_the_other_end():
    """p(y | x) of Brownian motion knows y - x alone: the score at y is minus the slope at x."""
    steps = EulerSteps(Brownian(), uniform(10))
    path = walk(steps, some(20))
    score = Skorokhod()(steps.sde, path, [10])[0]
    assert torch.allclose(score, -Average()(steps, path, [0])[0], atol=1e-6)


def test_trap_the_score_at_the_end_is_no_sum_of_ito():
    """E[S phi(X)] = -E[phi'(X)] for Skorokhod's integral; J⁻¹ dw as it stands looks ahead."""
    steps = EulerSteps(SDE.of(lambda x, t: 2 * (x - x**3), Scale(1.0)), uniform(40))
    path = walk(steps, torch.full((20_000, 1), 0.5, dtype=F64))
    slopes = 1 + steps.h(0) * 2 * (1 - 3 * path.x[:-1] ** 2)
    after = torch.cat([slopes[1:], torch.ones_like(slopes[:1])]).flip(0).cumprod(0).flip(0)
    naive = -(path.dw / after).sum(0)
    x = path.end
    tests = ((x, torch.ones_like(x)), (x.sin(), x.cos()), (x.tanh(), 1 - x.tanh() ** 2))
    right = Skorokhod()(steps.sde, path, [40])[0]
    assert max(z_score(right * phi + slope) for phi, slope in tests) < 4.5
    assert max(z_score(naive * phi + slope) for phi, slope in tests) > 9


def test_trap_weights_are_divided_by_their_mass_from_s_on():
    """Only the shape of α' counts, at every s: 1 / T instead of 1 / (T - s) would be too small."""
    steps = CHAINS["dense"]
    path = walk(steps, some(20))
    seven = Weighted(lambda t, end: -7.0)(steps, path)
    assert torch.allclose(seven, Average()(steps, path))


# --- variance: what the kinds are for


@pytest.mark.parametrize(
    ("x", "first", "window", "average"), [(0.0, 216, 12.3, 6.3e3), (0.2, 224, 12.8, 2.5e3),
                                          (0.5, 210, 8.8, 27)]
)  # fmt: skip
def test_variance_at_the_barrier(x, first, window, average):
    """E Var(S | X_s = x, X_T) half a unit of time before the end, barrier 5."""
    steps = EulerSteps(DoubleWell(5.0), uniform(100, 0.5))
    path = walk(steps, torch.full((60_000, 1), x, dtype=F64))
    bins = path.end.flatten().argsort().reshape(200, -1)
    var = lambda weight: weight(steps, path, [0]).flatten()[bins].var(1).mean().item()  # noqa: E731
    found = [var(weight) for weight in (First(), Window(0.05), Average())]
    assert abs(found[0] / first - 1) < 0.1 and abs(found[1] / window - 1) < 0.1, found
    assert found[2] > average / 3, found  # the tails are heavy
    if x == 0:
        assert found[0] > 10 * found[1] and found[2] > 100 * found[1], found


@pytest.mark.parametrize("window", [Window(0.1), First()], ids=repr)
def test_leaning_on_the_exact_slope(window):
    """No bias, and less variance with more trust."""
    steps = EulerSteps(OrnsteinUhlenbeck(rate=1.0, sigma=1.0), uniform(40) ** 1.3)
    path = walk(steps, some(20_000, 1))
    exact, variances = exact_score(steps, path), []
    for trust in (0.0, 1.0, 4.0):
        S = Bootstrapped(window, trust)(steps, path, [10], ahead=lambda k: exact[k])[0]
        slope, error = slope_and_error(S, exact[10])
        assert abs(slope - 1) < 4.5 * error, trust
        variances.append((S - exact[10]).var().item())
    assert torch.allclose(
        Bootstrapped(window, 0.0)(steps, path), window(steps, path)
    )  # no trust needs no estimate
    assert variances[0] > 1.5 * variances[1] > 2 * variances[2], variances


def test_leaning_is_a_mean_of_noise_and_estimate():
    steps = CHAINS["diagonal"]
    path = walk(steps, some(20))
    noise = First()(steps, path, [3])[0]
    u = torch.sin(path.x)
    S = Bootstrapped(First(), 3.0)(steps, path, [3, 6], ahead=lambda k: u[k])
    pull = torch.func.vjp(lambda x: steps.after(x, 3, path.dw[3]), path.x[3])[1]
    assert torch.allclose(S[0], (noise + 3 * pull(u[4])[0]) / 4)
    # what is seen need have no slope: the last step leans on nothing
    assert torch.equal(S[1], First()(steps, path, [6])[0])


# --- how long a window should be


def test_a_window_looks_as_far_as_paths_stay_together():
    grid = uniform(100)
    for d, dtype in ((1, F64), (2, torch.float32)):
        steps = EulerSteps(DoubleWell(5.0, d), grid)
        path = walk(steps, torch.ones(2048, d, dtype=dtype))  # the barrier is hardly seen
        tau = Window().chosen(steps, path).tau
        assert 0.02 < tau < 0.15, (d, tau)
    steps = EulerSteps(DoubleWell(0.5), grid)
    assert Window().chosen(steps, walk(steps, torch.ones(2048, 1, dtype=F64))).tau > 0.4


def test_a_window_is_infinite_where_nothing_spreads():
    for chain in ("brownian", "ou", "ou, uneven"):
        steps = LINEAR[chain]
        path = walk(steps, some(64, 3))
        assert Window().chosen(steps, path) == Window(math.inf)
        assert Bootstrapped(Window(), 2.0).chosen(steps, path, 4) == Bootstrapped(
            Window(math.inf), 2.0
        )


def test_a_window_is_short_where_noise_parts_neighbours():
    """No drift at all: landmarks that drive each other about, and those that hardly do."""
    for points, alpha, kappa in ((4, 2.0, 0.3), (8, 0.3, 0.5)):
        sde = Landmarks(points=points, alpha=alpha, kappa=kappa)
        steps = EulerSteps(sde, uniform(50))
        x = sde.start.expand(1024, points, 2)
        path, fresh = walk(steps, x), solve(sde, x, steps.grid, noise=Fresh(9), keep=True)
        chosen, at = Window().chosen(steps, path), [0, 10, 20, 30, 40]

        def size(weight, steps=steps, x=fresh, at=at):
            S = [
                steps.operator(x.x[k], k).tmv(s)
                for k, s in zip(at, weight(steps, x, at), strict=True)
            ]
            return sum(
                (50 - k) * s.square().sum((1, 2)).mean() for k, s in zip(at, S, strict=True)
            )

        assert size(chosen) < 1.3 * min(size(Window(t)) for t in (0.02, 0.1, 0.5, math.inf))
        assert (chosen.tau < 0.2) == (alpha == 2.0)


def test_other_weights_choose_themselves():
    path = walk(LINEAR["ou"], some(4, 1))
    for weight in (*KINDS.values(), Window(0.3)):
        assert weight.chosen(LINEAR["ou"], path) is weight


def test_expansion_is_the_largest_eigenvalue():
    g = torch.Generator().manual_seed(3)
    for d, dtype in ((1, F64), (7, F64), (7, torch.float32), (16, F64)):
        A = 2 * torch.randn(d, d, generator=g, dtype=F64).to(dtype)
        steps = EulerSteps(SDE.of(lambda x, t, A=A: torch.sin(x @ A), Scale(1.0)), uniform(8))
        x = torch.randn(5, d, generator=g, dtype=F64).to(dtype)
        J = torch.stack([torch.func.jacrev(lambda y, A=A: torch.sin(y @ A))(row) for row in x])
        exact = torch.linalg.eigvalsh((J + J.mT).double() / 2)[:, -1]
        error = (expansion(steps, x, 2) - exact).abs().max() / exact.abs().max()
        assert error < 100 * torch.finfo(dtype).eps, d
    # repeated eigenvalues, all of them negative, and pictures
    still = EulerSteps(SDE.of(lambda x, t: -3 * x, Scale(1.0)), uniform(8))
    assert torch.allclose(expansion(still, x.reshape(5, 1, 4, 4), 0), x.new_tensor(-3.0))
    # many numbers: a stiff contraction hides a slow expansion
    rates = torch.linspace(-500, 2, 60, dtype=F64)
    stiff = EulerSteps(SDE.of(lambda x, t: rates * x, Scale(1.0)), uniform(8))
    found = expansion(stiff, torch.ones(5, 60, dtype=F64), 0)
    assert ((found <= 2) & (found > -15)).all(), found


# --- one sweep, no parameters, any mode


def test_the_drift_is_evaluated_once_a_step():
    calls = []

    def drift(x, t):
        calls.append(t.item())
        return -x

    steps = EulerSteps(SDE.of(drift, Scale(1.0)), uniform(10))
    path = walk(steps, some(3))
    for weight, at, most in ((Average(), None, 10), (Window(0.1), [7], 3), (First(), [2, 8], 2)):
        calls.clear()
        weight(steps, path, at)
        assert len(calls) == most + 1, weight  # and once to see that the path is of this chain


def test_no_gradient_reaches_the_chain_and_modes_do_not_matter():
    net = torch.nn.Linear(4, 4)
    sde = SDE.of(
        lambda x, t: net(x.flatten(1)).reshape(x.shape),
        lambda x, t: Diagonal(1 + net.weight[0, 0] ** 2 + 0.3 * torch.sin(x)),
    )
    steps = EulerSteps(sde, uniform(5))
    with torch.inference_mode():
        path = walk(steps, torch.ones(3, 1, 2, 2))
        inside = Window(0.2)(steps, path)
    with torch.no_grad():
        outside = Window(0.2)(steps, path)
    assert torch.equal(inside, outside) and not outside.requires_grad
    assert inside.shape == (5, 3, 1, 2, 2) and inside.dtype == torch.float32
    assert net.weight.grad is None


# --- refusals


def test_noise_that_does_not_reach_everything_is_refused():
    kinetic = EulerSteps(Underdamped(lambda q: (q**2).sum(1)), uniform(5))
    path = walk(kinetic, torch.ones(4, 2, dtype=F64))
    for weight in (First(), Average(), Window(0.1), Last()):
        with pytest.raises(NotElliptic, match=r"need G\^-1.*Covering"):
            weight(kinetic, path)
    with pytest.raises(NotElliptic, match="Covering"):
        Window().chosen(kinetic, path)
    # a step that does not count needs no inverse
    steps = EulerSteps(SDE.of(lambda x, t: -x, lambda x, t: Scale(2 * t)), uniform(4))
    path = walk(steps, some(4))
    assert Weighted(lambda t, end: float(t > 0))(steps, path).isfinite().all()
    with pytest.raises(NotElliptic, match="zero"):
        Average()(steps, path)


def test_refusals_say_what_to_do():
    steps = CHAINS["dense"]
    path = walk(steps, some(4))
    other = walk(CHAINS["additive"], some(4))
    cases = [
        (lambda: Window()(steps, path), "no length yet: choose one by"),
        (lambda: Window(0.0), "a time above 0"),
        (lambda: Window(math.nan), "a time above 0"),
        (lambda: Bootstrapped(First())(steps, path), "pass ahead"),
        (lambda: Bootstrapped(First(), -1.0), "at least 0"),
        (lambda: Average()(steps, path._replace(dw=None)), "keep=True"),
        (lambda: Average()(steps, path._replace(x=path.x[-1:])), "has 1 states"),
        (lambda: Average()(CHAINS["dense, uneven"], path), "every step of the chain of 7"),
        (lambda: Average()(steps, other), "away from that of the chain"),
        (lambda: Average()(steps, path, last=0), "after 1 to 6 steps"),
        (lambda: Average()(steps, path, [4], last=4), r"times 0 to 3, not \[4\]"),
        (lambda: Average()(steps, path, []), "times 0 to 5"),
        (lambda: Weighted(lambda t, end: float(t < 0.4))(steps, path), "no weight"),
        (lambda: Weighted(lambda t, end: math.inf)(steps, path), "not a finite number"),
    ]
    for call, sentence in cases:
        with pytest.raises(KakusanError, match=sentence):
            call()
