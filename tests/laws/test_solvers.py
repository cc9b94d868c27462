"""Orders of convergence, laws of the data, DDPM's posterior, and the loop's refusals."""

import math

import pytest
import torch

import kakusan
from kakusan import (
    CIR,
    DDPM,
    SDE,
    VP,
    Ancestral,
    Cosine,
    Dense,
    EulerMaruyama,
    Exact,
    ExactEmpirical,
    Fresh,
    Heun,
    KakusanError,
    Multistep,
    Recorded,
    Scale,
    Zero,
    angle_grid,
    generate,
    log_snr_grid,
    probability_flow,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.core.noise import Keyed
from kakusan.solvers.exponential import integral_weights
from problems import F64, NAMES, PROCESSES, gaussian, mixture, time

each = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)


def _order(errors):
    """The slope of log error against log step over the last halving."""
    return math.log2(errors[-2] / errors[-1])


def _flow_of_gaussian(process, x, t, s, mean=0.7, variance=0.36):
    """The probability flow of N(mean, variance) data is affine: a closed form."""
    a_t, a_s = process.alpha(t), process.alpha(s)
    v_t = a_t**2 * variance + process.variance(t)
    v_s = a_s**2 * variance + process.variance(s)
    return a_s * mean + (v_s / v_t).sqrt() * (x - a_t * mean)


@pytest.mark.parametrize(
    ("method", "order", "steps"),
    [
        (Ancestral(), 1, (192, 384)),
        (Multistep(1), 2, (192, 384)),
        (Multistep(2), 3, (192, 384)),
        (EulerMaruyama(), 1, (256, 512)),
        (Heun(), 2, (256, 512)),
    ],
    ids=lambda v: f"{type(v).__name__}{getattr(v, 'order', '')}" if hasattr(v, "step") else "",
)
@each
def test_flow_methods_reach_their_order_on_gaussian_data(process, method, order, steps):
    if isinstance(process, DDPM) and isinstance(method, (EulerMaruyama, Heun)):
        pytest.skip("its rates jump at every knot, and these methods meet the rates")
    T, end = process.span[1], process.span[0]
    angular = isinstance(method, (Ancestral, Multistep))
    end = 0.0 if angular else end
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None] * process.sigma(time(T))
    truth = _flow_of_gaussian(process, x, time(T), time(end))
    flow = probability_flow(process, gaussian(process))
    errors = []
    for n in steps:
        # steps of the general methods follow log sigma, where the flow is smooth
        grid = angle_grid(process, T, end, n) if angular else log_snr_grid(process, T, end, n)
        errors.append((solve(flow, x, grid, method).end - truth).abs().max().item())
    assert abs(_order(errors) - order) < 0.3, (process, method, errors)


def test_more_velocities_make_the_error_smaller():
    """On the mixture at 20 steps: each Adams method beats the one before it."""
    process = Cosine()
    flow = probability_flow(process, mixture(process))
    x = torch.randn(100, 2, dtype=F64)
    truth = solve(flow, x, angle_grid(process, 0.999, 0.0, 2000, 1.5), Multistep(4)).end
    grid = angle_grid(process, 0.999, 0.0, 20, 1.5)
    errors = [
        (solve(flow, x, grid, m).end - truth).square().mean().sqrt().item()
        for m in (Ancestral(), Multistep(1), Multistep(2), Multistep(3))
    ]
    assert all(b < a / 2 for a, b in zip(errors, errors[1:], strict=False)), errors


def test_integral_weights_are_exact_for_polynomials():
    nodes, a, b = [0.3, 0.55, 0.9, 1.4], 0.3, 0.1
    w = integral_weights(nodes, a, b)
    for k in range(4):
        exact = (b ** (k + 1) - a ** (k + 1)) / (k + 1)
        assert math.isclose(sum(wi * n**k for wi, n in zip(w, nodes, strict=True)), exact), k


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@each
def test_samplers_reach_the_law_of_a_mixture(process, noise):
    """Mean and covariance of 20,000 samples, within four standard errors and 1% of bias."""
    truth, n = mixture(process), 20_000
    start = process.alpha(time(process.span[1])) ** 2 + process.variance(time(process.span[1]))
    x1 = start.sqrt() * Keyed(0).normal(0, (n, 2), torch.empty(0, dtype=F64))
    x0 = generate(process, truth, x1, steps=60, noise=noise, source=Fresh(1))
    mean, cov = _moments(truth)
    se = (cov.diag() / n).sqrt()
    assert ((x0.mean(0) - mean).abs() < 4 * se + 0.01).all(), (process, noise)
    spread = 4 * cov.diag().max() * (2 / n) ** 0.5 + 0.02 * cov.diag().max()
    assert (x0.T.cov() - cov).abs().max() < spread, (process, noise, x0.T.cov(), cov)


def _moments(m):
    mean = m.weights @ m.means
    within = m.vectors @ torch.diag_embed(m.values) @ m.vectors.mT
    spread = m.means - mean
    cov = (m.weights[:, None, None] * within).sum(0) + spread.T @ (m.weights[:, None] * spread)
    return mean, cov


def test_euler_maruyama_samples_the_law_too():
    process, n = VP(), 10_000
    truth = mixture(process)
    x1 = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    grid = grids.quadratic(1.0, 1e-3, 300)
    x0 = solve(reverse(process, truth), x1, grid, noise=Fresh(0)).end
    mean, cov = _moments(truth)
    assert ((x0.mean(0) - mean).abs() < 4 * (cov.diag() / n).sqrt() + 0.02).all()
    assert (x0.T.cov() - cov).abs().max() < 4 * cov.diag().max() * (2 / n) ** 0.5 + 0.04


def test_ancestral_steps_are_ddpm_posteriors():
    """Mean and variance of q(x_{t-1} | x_t, x_0) at x_0 = E[x_0 | x_t], to 1e-12."""
    betas = torch.linspace(1e-3, 0.05, 100, dtype=F64)
    process = VP.from_betas(betas)
    knots, alpha_bar = process.knots(), (1 - betas).cumprod(0)
    score = gaussian(process)
    x = torch.randn(6, 1, dtype=F64)
    for i in (99, 50, 1):
        t, s = knots[99 - i], knots[100 - i]
        before = alpha_bar[i - 1]
        x0 = score.denoised(x, t)
        coef = (before.sqrt() * betas[i], (1 - betas[i]).sqrt() * (1 - before))
        mean = (coef[0] * x0 + coef[1] * x) / (1 - alpha_bar[i])
        variance = betas[i] * (1 - before) / (1 - alpha_bar[i])
        grid, dw = torch.stack([t, s]), torch.ones(1, 6, 1, dtype=F64) * (t - s).sqrt()
        sde = reverse(process, score)
        still = solve(sde, x, grid, Ancestral(), Recorded(0 * dw)).end
        moved = solve(sde, x, grid, Ancestral(), Recorded(dw)).end
        assert (still - mean).abs().max() < 1e-12, i
        assert ((moved - still) ** 2 - variance).abs().max() < 1e-12, i


def test_ddim_is_exact_where_the_data_are_one_point():
    process = VP()
    point = torch.tensor([[1.0, -2.0]], dtype=F64)
    score = ExactEmpirical(process, point)
    x = torch.randn(5, 2, dtype=F64)
    end = solve(probability_flow(process, score), x, angle_grid(process, 1.0, 0.0, 1), Ancestral())
    assert torch.allclose(end.end, point.expand(5, 2), atol=1e-10)


@each
def test_the_exact_score_of_a_data_set_leads_back_to_it(process):
    """Memorisation: every sample is a training point."""
    data = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    x1 = process.sigma(time(process.span[1])) * torch.randn(40, 2, dtype=F64)
    x0 = generate(process, ExactEmpirical(process, data), x1, steps=100)
    assert torch.cdist(x0, data).amin(1).max() < 0.02, process


def test_the_ode_runs_both_ways():
    process = Cosine()
    flow = probability_flow(process, mixture(process))
    x = torch.randn(20, 2, dtype=F64)
    grid = angle_grid(process, 0.999, 1e-3, 400)
    there = solve(flow, x, grid, Multistep(3)).end
    assert (solve(flow, there, grid.flip(0), Multistep(3)).end - x).abs().max() < 1e-3


# --- the loop


def test_euler_maruyama_on_a_given_path():
    """dX = mu X dt + s X dw by hand on two recorded increments."""
    sde = SDE.of(lambda x, t: 0.1 * x, lambda x, t: Dense(0.5 * x[..., None]))
    dw = torch.tensor([[[0.3]], [[-0.2]]], dtype=F64)
    path = solve(
        sde, torch.ones(1, 1, dtype=F64), grids.uniform(0, 1, 2), noise=Recorded(dw), keep=True
    )
    by_hand = [1.0, 1 + 0.05 + 0.15]
    by_hand.append(by_hand[1] * (1 + 0.05 - 0.1))
    assert torch.allclose(path.x.flatten(), torch.tensor(by_hand, dtype=F64), atol=1e-15)
    assert path.dw.shape == (2, 1, 1) and path.t.shape == (3,)


def test_noise_of_another_dimension_than_the_state():
    sde = SDE.of(lambda x, t: 0 * x, Dense(torch.ones(2, 5)))
    end = solve(sde, torch.zeros(3, 2), grids.uniform(0, 1, 4), noise=Fresh(0)).end
    assert torch.allclose(end[:, 0], end[:, 1])


def test_gradients_flow_through_the_loop():
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    sde = SDE.of(lambda x, t: -rate * x, Zero())
    solve(sde, torch.ones(1, 1, dtype=F64), grids.uniform(0, 1, 1000)).end.sum().backward()
    assert abs(rate.grad + math.exp(-0.5)) < 1e-3


def test_callbacks_see_every_step():
    seen = []
    sde = SDE.of(lambda x, t: x, Zero())
    solve(
        sde,
        torch.ones(1, 1),
        grids.uniform(0, 1, 3),
        on_step=lambda k, t, x: seen.append((k, t.item())),
    )
    assert [k for k, _ in seen] == [0, 1, 2] and seen[-1][1] == 1.0


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (torch.linspace(1, 0, 5), "goes the other way"),
        (torch.tensor([0.0]), "at least two"),
        (torch.tensor([0.0, 0.5, 0.5]), "all rise or all fall"),
        (torch.tensor([0.0, float("nan")]), "finite"),
        (torch.zeros(2, 2), "1-D"),
    ],
)
def test_bad_grids_are_refused(grid, words):
    with pytest.raises(KakusanError, match=words):
        solve(SDE.of(lambda x, t: -x, Scale(1.0)), torch.ones(1, 1), grid)


def test_bad_states_are_refused():
    sde = SDE.of(lambda x, t: x**3, Zero())
    with pytest.raises(KakusanError, match=r"torch.int64 of shape \(2, 1\)"):
        solve(sde, torch.ones(2, 1, dtype=torch.int64), grids.uniform(0, 1, 3))
    with pytest.raises(
        KakusanError,
        match=r"path 1 of 2 .* t=1.33333 \(step 4 of 30.*\[5.06036e\+19\] at t=1; .*TamedEuler",
    ):
        solve(sde, torch.tensor([[0.0], [9.0]]), grids.uniform(0, 10, 30))


def test_angular_methods_need_the_reverse_of_a_linear_sde():
    other = SDE.of(lambda x, t: -x, Scale(1.0))
    with pytest.raises(TypeError, match="EulerMaruyama takes any SDE"):
        solve(
            reverse(other, lambda x, t: -x), torch.ones(1, 1), grids.uniform(1, 0, 3), Ancestral()
        )
    with pytest.raises(KakusanError, match="1 to 4 velocities"):
        Multistep(5)
    with pytest.raises(KakusanError, match="at least one step"):
        grids.uniform(0, 1, 0)


def test_what_does_not_fit_the_state_is_refused_with_the_three_shapes():
    x, grid = torch.zeros(4, 1, 3), grids.uniform(0, 1, 2)
    wide = SDE.of(lambda x, t: 0 * x, Dense(torch.ones(5, 2)))
    words = r"state is \(4, 1, 3\) .* drift \(4, 1, 3\) .* noise \(4, 2\)"
    with pytest.raises(KakusanError, match=words):
        solve(wide, x, grid)
    flat = SDE.of(lambda x, t: x.flatten(1).sum(1), Scale(1.0))
    words = r"state is \(4, 1, 3\) .* drift \(4,\) .* noise \(4, 1, 3\) to \(4, 1, 3\)"
    with pytest.raises(KakusanError, match=words):
        solve(flat, x, grid)
    narrow = SDE.of(lambda x, t: x[..., :1], Scale(1.0))
    with pytest.raises(KakusanError, match=r"drift \(4, 1, 1\) in"):
        solve(narrow, x, grid)
    comes = SDE.of(lambda x, t: 0 * x, lambda x, t: Zero() if t < 0.5 else Scale(1.0))
    with pytest.raises(KakusanError, match=r"Zero at some times .*Scale\(0.0\)"):
        solve(comes, x, grid)
    double = SDE.of(lambda x, t: x.double(), Scale(1.0))
    with pytest.raises(KakusanError, match=r"drift \(4, 1, 3\) in torch.float64"):
        solve(double, x, grid)
    bare = SDE.of(lambda x, t: x, lambda x, t: x)
    with pytest.raises(KakusanError, match=r"gives a Tensor, not an operator: wrap it in Scale"):
        solve(bare, x, grid)


def test_states_are_kept_and_shown_as_often_as_asked():
    sde, x, grid = SDE.of(lambda x, t: -x, Scale(1.0)), torch.ones(3, 2), grids.uniform(0, 1, 10)
    full = solve(sde, x, grid, noise=Fresh(0), keep=True)
    seen = []
    some = solve(
        sde, x, grid, noise=Fresh(0), keep=True, every=4, on_step=lambda k, t, x: seen.append(k)
    )
    assert seen == [3, 7, 9] and torch.equal(some.t, grid[[0, 4, 8, 10]])
    assert torch.equal(some.x, full.x[[0, 4, 8, 10]])
    sums = torch.stack([full.dw[:4].sum(0), full.dw[4:8].sum(0), full.dw[8:].sum(0)])
    assert torch.allclose(some.dw, sums, atol=1e-6)
    with pytest.raises(KakusanError, match="every says .* got 0"):
        solve(sde, x, grid, every=0)


def test_what_would_not_fit_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(kakusan.solvers.solve, "_free_memory", lambda x: 1e5)
    sde, grid = SDE.of(lambda x, t: -x, Scale(1.0)), grids.uniform(0, 1, 1000)
    words = r"keeping 1000 states of shape \(50, 2\).* every=32 keeps fewer, on_step"
    with pytest.raises(KakusanError, match=words):
        solve(sde, torch.ones(50, 2), grid, keep=True)
    solve(sde, torch.ones(50, 2), grid, keep=True, every=32)


def test_paths_that_leave_the_domain_are_named():
    cir, x = CIR(rate=1.0, mean=0.05, sigma=1.0), torch.full((500, 1), 0.05, dtype=F64)
    words = r"path \d+ of 500 left the domain x >= 0 at t=.* of EulerMaruyama.*Exact\(\)"
    with pytest.raises(KakusanError, match=words):
        solve(cir, x, grids.uniform(0, 1, 20), noise=Fresh(0))
    assert (solve(cir, x, grids.uniform(0, 1, 20), Exact(), Fresh(0)).end >= 0).all()
