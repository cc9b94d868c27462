"""Each sample in its own steps: errors follow the tolerance, mates in a batch change nothing."""

import math

import pytest
import torch

from kakusan import (
    SDE,
    VP,
    Ancestral,
    Counter,
    CounterWithArea,
    Diagonal,
    EulerMaruyama,
    Fresh,
    Heun,
    KakusanError,
    Method,
    Scale,
    Zero,
    probability_flow,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.core.noise import Wants
from kakusan.solvers.adaptive import Bisection, DormandPrince, Tally
from problems import F64, PROCESSES, gaussian, mixture, time


def ode(drift):
    return SDE.of(drift, Zero())


def grid(*times):
    return torch.tensor(times, dtype=F64)


def rms(x):
    return x.square().mean().sqrt().item()


# --- DormandPrince


def turning(x, t):
    """A linear field that turns the plane at the rate 3 and contracts one axis at the rate 20."""
    return x @ A.T


A = torch.tensor([[0.0, -3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, -20.0]], dtype=F64)


def test_errors_follow_the_tolerance_and_steps_its_fifth_root():
    x = torch.randn(6, 3, dtype=F64)
    exact = x @ torch.matrix_exp(2 * A).T
    errors, steps = [], []
    for tol in (1e-5, 1e-7, 1e-9, 1e-11):
        tally = Tally()
        end = solve(ode(turning), x, grid(0, 2), DormandPrince(tol, tol, tally=tally)).end
        errors.append((end - exact).abs().max().item() / tol)
        steps.append(tally.accepted.double().mean().item())
    assert all(0.02 < e < 20 for e in errors), errors
    # where the contraction no longer binds the step, it is as long as order 5 allows
    slope = math.log(steps[3] / steps[1]) / math.log(1e4)
    assert abs(slope - 1 / 5) < 0.02, (steps, slope)


def test_fixed_lengths_show_order_five():
    """An enormous tolerance accepts every step, so the grid alone sets the lengths."""
    x, errors = torch.tensor([[1.0, 0.5]], dtype=F64), []
    flow = ode(lambda x, t: per(t.cos()) * x)
    for n in (32, 64):
        end = solve(flow, x, grids.uniform(0, 8, n), DormandPrince(1, 1e9)).end
        errors.append((end - x * math.exp(math.sin(8))).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - 5) < 0.3, errors


def per(t):
    return t[:, None]


@pytest.mark.parametrize("process", [p for p in PROCESSES[:6]], ids=lambda p: type(p).__name__)
def test_the_flow_of_gaussian_data_is_met_to_ten_tolerances(process):
    mean, variance, rtol = 0.7, 0.36, 1e-7
    T, end = process.span[1], process.span[0]
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None] * process.sigma(time(T))
    flow = probability_flow(process, gaussian(process, mean, variance))
    a = process.alpha(grid(T, end))
    v = a**2 * variance + process.variance(grid(T, end))
    truth = a[1] * mean + (v[1] / v[0]).sqrt() * (x - a[0] * mean)
    found = solve(flow, x, grid(T, end), DormandPrince(rtol, rtol)).end
    assert (found - truth).abs().max() < 10 * rtol * (1 + truth.abs().max()), process


def test_samples_of_all_scales_take_their_own_steps():
    rate = torch.tensor([1e-3, 1.0, 1e3], dtype=F64)
    tally, x = Tally(), torch.ones(3, 1, dtype=F64)
    end = solve(
        ode(lambda x, t: -per(rate) * (x - t.cos()[:, None])),
        x,
        grid(0, 1),
        DormandPrince(tally=tally),
    ).end
    # x = c exp(-rt) + (r² cos t + r sin t) / (1 + r²)
    r, s = per(rate), torch.tensor(1.0, dtype=F64)
    forced = (r**2 * s.cos() + r * s.sin()) / (1 + r**2)
    exact = forced + (1 - r**2 / (1 + r**2)) * torch.exp(-r)
    assert (end - exact).abs().max() < 1e-5, end - exact
    assert tally.accepted[2] > 20 * tally.accepted[0], tally
    assert tally.evaluations <= 2 + 6 * (tally.accepted + tally.rejected).max(), tally


@pytest.mark.parametrize("ends", [(0.25, 1.5), (1.5, 0.25)], ids=["up", "down"])
def test_fields_are_asked_within_the_step_and_states_stand_on_its_end(ends):
    seen, kept = [], []

    def drift(x, t):
        assert t.shape == (4,)
        seen.append(t)
        return x.sin() * per(1 / t.sqrt())

    x = torch.linspace(-3, 3, 4, dtype=F64)[:, None] * torch.tensor([1.0, 10.0], dtype=F64)
    method, times = DormandPrince(), torch.linspace(*ends, 5, dtype=F64)
    solve(ode(drift), x, times, method, on_step=lambda k, t, x: kept.append(len(seen)))
    for k, (lo, hi) in enumerate(zip([0, *kept], kept, strict=False)):
        at, (a, b) = torch.stack(seen[lo:hi]), sorted(times[k : k + 2].tolist())
        assert at.min() >= a and at.max() <= b, (k, at)
        assert (at[-1] == times[k + 1]).all()


def test_mates_in_a_batch_change_no_bit():
    x = torch.tensor([[0.1, 0.2, 3.0], [2.0, -1.0, 0.3], [30.0, 1.0, -20.0]], dtype=F64)
    for size in (1, 3, 17):
        y = x.repeat(1, 6)[:, :size]
        flow = ode(lambda x, t: x.sin() * per(t.cos()) - x * x * x / 100)
        together = solve(flow, y, grids.uniform(0, 2, 4), DormandPrince()).end
        for i in range(3):
            alone = solve(flow, y[i : i + 1], grids.uniform(0, 2, 4), DormandPrince()).end
            assert torch.equal(together[i : i + 1], alone), (size, i)


def test_there_and_back():
    process = VP()
    flow = probability_flow(process, mixture(process))
    x = torch.randn(20, 2, dtype=F64)
    there = solve(flow, x, grid(1, 1e-3), DormandPrince(1e-9, 1e-9)).end
    back = solve(flow, there, grid(1e-3, 1), DormandPrince(1e-9, 1e-9)).end
    assert (there - x).abs().max() > 0.1 and (back - x).abs().max() < 1e-6


def test_a_grid_costs_little_and_changes_little():
    """Lengths travel from one interval to the next, and so does the last drift."""
    counts, ends = [], []
    for n in (1, 20):
        tally = Tally()
        x = torch.ones(1, 2, dtype=F64)
        ends.append(solve(ode(lambda x, t: -x), x, grids.uniform(0, 20, n),
                          DormandPrince(tally=tally)).end)  # fmt: skip
        counts.append(tally.evaluations)
    assert (ends[0] - ends[1]).abs().max() < 1e-6 and counts[1] < 2 * counts[0] + 120, counts


def test_infinities_of_an_attempt_shorten_the_step():
    """The root has no value beyond 1: attempts that look there are tried again."""
    flow = ode(lambda x, t: (1 - x).sqrt())
    x = torch.tensor([[0.0], [0.96]], dtype=F64)
    tally = Tally()
    end = solve(flow, x, grid(0, 0.39), DormandPrince(tally=tally)).end
    exact = 1 - ((1 - x).sqrt() - 0.195) ** 2
    assert (end - exact).abs().max() < 1e-5 and tally.rejected[1] > 0, (end, exact, tally)


def test_gradients_flow_through_accepted_steps_only():
    x = torch.tensor([[0.5], [0.96]], dtype=F64, requires_grad=True)
    c = torch.tensor(1.0, dtype=F64, requires_grad=True)
    flow, tally = ode(lambda x, t: c * (1 - x).sqrt()), Tally()
    end = solve(flow, x, grid(0, 0.3), DormandPrince(1e-9, 1e-9, tally=tally)).end
    dx, dc = torch.autograd.grad(end.sum(), (x, c))
    root = (1 - x).sqrt().detach()  # x(t) = 1 - (root - c t / 2)²
    assert (dx - (root - 0.15) / root).abs().max() < 1e-6, dx
    assert abs(dc - (0.3 * (root - 0.15)).sum()) < 1e-6, dc
    # an attempt from a state beside the edge has no value at all
    y = torch.tensor([[0.5], [0.9999]], dtype=F64, requires_grad=True)
    end = solve(flow, y, grid(0, 0.015), DormandPrince(atol=1e-3, tally=tally)).end
    assert torch.autograd.grad(end.sum(), y)[0].isfinite().all() and tally.rejected[1] > 0


def test_what_dormand_prince_refuses():
    x = torch.ones(3, 1, dtype=F64)
    with pytest.raises(KakusanError, match="is for ODEs, and this process has noise; Bisection"):
        solve(SDE.of(lambda x, t: -x, Scale(1.0)), x, grid(0, 1), DormandPrince())
    blow_up = ode(lambda x, t: torch.where(x > 1, 1.0, 0.0) * x * x)
    y = torch.tensor([[0.5], [2.0]], dtype=F64)
    with pytest.raises(
        KakusanError, match=r"sample 1 of 2 did not get to t=1 .* reached t=0\.[45]"
    ):
        solve(blow_up, y, grid(0, 1), DormandPrince())
    with pytest.raises(KakusanError, match="in 3 steps of"):
        solve(ode(lambda x, t: -50 * x), x, grid(0, 1), DormandPrince(max_steps=3))
    with pytest.raises(KakusanError, match="sample 0 of 3 did not get"):
        solve(ode(lambda x, t: x * math.nan), x, grid(0, 1), DormandPrince())
    with pytest.raises(KakusanError, match="atol > 0, got 1e-06 and 0"):
        DormandPrince(atol=0)


# --- bridges and Bisection


@pytest.mark.parametrize("path", [Counter, CounterWithArea])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.77), (5000.0, 5001.0)])
def test_bridges_are_the_path(path, ends):
    """Halves of halves, of some samples, are what the path itself says of these times."""
    like = torch.empty(0, dtype=F64)

    def check(bridge, samples, depth):
        other = path(3, cell=0.25)
        dw = other.increment(0, bridge.t, bridge.s, (7, 2), like)[samples]
        assert torch.allclose(bridge.dw, dw, rtol=0, atol=1e-13)
        if bridge.area is not None:
            area = other.area(0, bridge.t, bridge.s, (7, 2), like)[1][samples]
            assert torch.allclose(bridge.area, area, rtol=0, atol=1e-8)
        if depth:
            for half in bridge.halves():
                some = torch.tensor([1, 0])
                check(half.of(some), samples[some], depth - 1)

    check(path(3, cell=0.25).bridge(0, *ends, (7, 2), like), torch.arange(7), 3)


def test_imagined_numbers_have_the_variance_of_true_ones_and_differ_in_a_sign():
    n = 40_000
    bridge = CounterWithArea(0, cell=0.5).bridge(0, 0.5, 1.0, (n, 1), torch.empty(0, dtype=F64))
    whole, early, late = bridge.imagined()
    for dw, h in ((early.dw, 0.25), (late.dw, 0.25), (whole.dw, 0.5)):
        assert abs(dw.mean()) < 4 * (h / n) ** 0.5
        assert abs(dw.var() / h - 1) < 4 * (1 / n) ** 0.5
    assert early.dw.abs().min() >= 0.5 * 0.5 and torch.allclose(whole.dw, early.dw + late.dw)
    assert (early.dw[:n] * early.dw[n:] < 0).all() and (late.dw[:n] * late.dw[n:] > 0).all()
    # ∫w has variance h³/3 and covariance h²/2 with w
    assert abs(whole.area.var() / (0.5**3 / 3) - 1) < 4 * (2 / n) ** 0.5
    assert abs((whole.area * whole.dw).mean() / (0.5**2 / 2) - 1) < 4 * (2 / n) ** 0.5


class Milstein(Method):
    """For dX = 0.4 X dt + 0.6 X dw."""

    def step(self, sde, x, t, s, dw, state):
        h = (s - t).item()
        return x * (1 + 0.4 * h + 0.6 * dw + 0.18 * (dw**2 - h)), state


ou = SDE.of(lambda x, t: -x, Scale(1.0))
well = SDE.of(lambda x, t: 4 * (x - x**3), Scale(1.0))
growth = SDE.of(lambda x, t: 0.4 * x, lambda x, t: Diagonal(0.6 * x))


def bisected(sde, x, method, tol, **kwargs):
    path = Counter(0, cell=0.25)
    return solve(sde, x, grids.uniform(0, 1, 4), Bisection(method, tol, tol), path, **kwargs).end


@pytest.mark.parametrize(
    ("sde", "method", "tolerances"),
    [
        (ou, EulerMaruyama(), (0.1, 0.01)),
        (ou, Heun(), (0.03, 0.004)),
        (growth, EulerMaruyama(), (0.04, 0.015)),
        (growth, Milstein(), (0.02, 0.002)),
        (well, EulerMaruyama(), (0.4, 0.05)),
        (well, Heun(), (0.1, 0.015)),
    ],
    ids=["ou-euler", "ou-heun", "growth-euler", "growth-milstein", "well-euler", "well-heun"],
)
def test_the_error_on_one_path_is_proportional_to_the_tolerance(sde, method, tolerances):
    n = 60
    x = torch.linspace(-8, 8, n, dtype=F64)[:, None] if sde is well else torch.ones(n, 1).double()
    if sde is growth:
        w = Counter(0, cell=0.25).increment(0, 0.0, 1.0, (n, 1), x)
        truth = torch.exp(0.4 - 0.18 + 0.6 * w)
    else:
        truth = solve(sde, x, grids.uniform(0, 1, 2**12), Heun(), Counter(0, cell=0.25)).end
    # of nine samples in ten: a trial is wrong about a long step once in many
    errors = [
        (bisected(sde, x, method, tol) - truth).abs().quantile(0.9).item() for tol in tolerances
    ]
    assert all(e < 5 * tol for e, tol in zip(errors, tolerances, strict=True)), errors
    ratio = math.log(errors[0] / errors[1]) / math.log(tolerances[0] / tolerances[1])
    assert abs(ratio - 1) < 0.35, (errors, ratio)


def test_lengths_are_chosen_without_a_look_at_the_path():
    """Steps chosen by the path made Euler's growth 5% too large; the mean stays what it is."""
    n = 2000
    x = torch.ones(n, 1, dtype=F64)
    truth = torch.exp(0.22 + 0.6 * Counter(0, cell=0.25).increment(0, 0.0, 1.0, (n, 1), x))
    error = bisected(growth, x, EulerMaruyama(), 0.04) / truth - 1
    assert abs(error.mean()) < 4 * error.std() / n**0.5 + 0.005, error.mean()


def test_bisection_survives_where_fixed_steps_run_away():
    x, path = torch.tensor([[9.0], [0.5]], dtype=F64), Counter(1, cell=0.5)
    with pytest.raises(KakusanError, match="no longer finite"):
        solve(well, x, grids.uniform(0, 4, 8), noise=path)
    end = solve(well, x, grids.uniform(0, 1, 2), Bisection(rtol=0.05, atol=0.05), path).end
    fine = solve(well, x, grids.uniform(0, 1, 2**12), Heun(), path).end
    assert (end - fine).abs().max() < 0.1, (end, fine)


def test_mates_in_a_batch_change_no_bit_of_a_bisected_path():
    x = torch.tensor([[0.3, 6.0], [-1.0, 0.1], [9.0, -9.0]], dtype=F64)
    together = bisected(well, x, Heun(), 0.05)
    for i in range(3):
        path = Counter(0, cell=0.25, first=i)
        alone = solve(well, x[i : i + 1], grids.uniform(0, 1, 4), Bisection(Heun(), 0.05, 0.05),
                      path).end  # fmt: skip
        assert torch.equal(together[i : i + 1], alone), i


def test_bisection_keeps_increments_and_runs_backwards():
    x, path = torch.zeros(3, 2, dtype=F64), Counter(0, cell=0.25)
    back = SDE.of(lambda x, t: x, Scale(1.0), span=(1.0, 0.0))
    times = grids.uniform(1, 0, 4)
    kept = solve(back, x, times, Bisection(), path, keep=True)
    assert torch.equal(kept.dw, solve(back, x, times, noise=path, keep=True).dw)
    fine = solve(back, x, grids.uniform(1, 0, 2**12), noise=path).end
    assert (kept.x[-1] - fine).abs().max() < 0.03


def test_gradients_flow_through_bisected_steps():
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    sde = SDE.of(lambda x, t: -rate * x, Scale(1.0))
    x = torch.tensor([[1.0], [40.0]], dtype=F64, requires_grad=True)
    end = bisected(sde, x, EulerMaruyama(), 0.01)
    dx, drate = torch.autograd.grad(end.sum(), (x, rate))
    assert (dx - math.exp(-1)).abs().max() < 0.02, dx
    # lengths count as given: those of a slightly larger rate are the same
    with torch.no_grad():
        rate += 1e-7
        assert abs((bisected(sde, x, EulerMaruyama(), 0.01) - end).sum() / 1e-7 - drate) < 1e-3


class WithArea(Method):
    """The solution of dX = -X dt + dw to order 3/2: x - (h - h²/2) x + w - z."""

    wants = Wants.AREA

    def step(self, sde, x, t, s, dw, state):
        h, (w, z) = (s - t).item(), dw
        return x - (h - h * h / 2) * x + w - z, state


def test_methods_that_want_areas_bisect_too():
    x, truth = torch.ones(50, 1, dtype=F64), None
    path = CounterWithArea(0, cell=0.25)
    truth = solve(ou, x, grids.uniform(0, 1, 2**11), WithArea(), path).end
    method = Bisection(WithArea(), 1e-3, 1e-3)
    end = solve(ou, x, grids.uniform(0, 1, 4), method, path).end
    assert rms(end - truth) < 1e-3


def test_what_bisection_refuses():
    x, times = torch.ones(3, 1, dtype=F64), grids.uniform(0, 1, 4)
    with pytest.raises(KakusanError, match="any time: Counter.*, for one; Fresh is none"):
        solve(ou, x, times, Bisection(), Fresh(0))
    with pytest.raises(KakusanError, match="DormandPrince.* adapts the steps of an ODE"):
        solve(ode(lambda x, t: -x), x, times, Bisection())
    with pytest.raises(KakusanError, match="the area under the path, which Counter does not"):
        solve(ou, x, times, Bisection(WithArea()), Counter(0))
    back = reverse(VP(), gaussian(VP()))
    with pytest.raises(KakusanError, match="takes them back, and Ancestral remembers each"):
        solve(back, x, grid(1, 0.1), Bisection(Ancestral()), Counter(0))
    rough = SDE.of(lambda x, t: 1e6 * torch.where(x > 2, x, 0 * x), Scale(1.0))
    y = torch.tensor([[-50.0], [7.0]], dtype=F64)
    words = r"sample 1 does not meet .* halved 6 times to 3.9e-03; its state was \[7\]"
    with pytest.raises(KakusanError, match=words):
        solve(rough, y, times, Bisection(max_depth=6), Counter(0, cell=0.25))
