"""Learned bridges against closed forms and against the exact chain on a grid."""

import math
import warnings

import pytest
import torch

import kakusan as kk
from kakusan.bridges import learn_bridge
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.pull import Pull
from kakusan.processes.observations import (
    Coordinates,
    Event,
    Label,
    Measured,
    Series,
    Terminal,
)

QUICK = {"steps": 20, "paths": 4096, "times": 8, "visits": 1, "batch": 2048, "quiet": True}


def spread(n):
    return 3 * torch.rand(n, 1) - 1.5


def test_brownian_bridges_need_no_network():
    """The mean of all increments has no variance, and the pull is exact: nothing is left over."""
    bridge = learn_bridge(kk.Brownian(0.7), torch.zeros(2), iterations=20, **QUICK)
    assert "inf" in bridge.report.weights and float(bridge.tilt.net.trust) == 0.0
    x = torch.randn(9, 2, dtype=torch.float64)
    want = (torch.tensor([1.0, -2.0]) - x) / (0.49 * 0.75)
    assert torch.allclose(bridge.score(x, 0.25, [1.0, -2.0]), want, rtol=1e-6)


def test_an_ornstein_uhlenbeck_bridge_has_its_moments():
    ou, y = kk.OrnsteinUhlenbeck(rate=2.0, sigma=0.8, mean=0.3), 0.9
    bridge = learn_bridge(ou, spread, base=Pull(ou, Terminal()), iterations=700, **QUICK)
    exact = LinearTilt.exact(ou, Terminal())
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).unsqueeze(1)
    far, size = 0.0, 0.0
    for t in (0.1, 0.5, 0.8):
        u = exact.score(x, torch.tensor(t, dtype=torch.float64), torch.full_like(x, y))
        far += (bridge.score(x, t, y) - u).square().mean().item()
        size += u.square().mean().item()
    assert far / size < 0.02  # the mean square over states and times
    found = bridge.sample(torch.tensor([1.0], dtype=torch.float64), y, n=4000)
    assert (found.end == y).all() and found.ess > 3000
    # of the chain itself: m_k = a^k, and variances of its steps
    a, q, h = 1 - 2.0 / 20, 0.64 / 20, 10
    v = q * sum(a ** (2 * i) for i in range(h))
    mean_mid, mean_end = 0.3 + a**10 * 0.7, 0.3 + a**20 * 0.7
    gain = a**10 * v / (q * sum(a ** (2 * i) for i in range(20)))
    mid = found.expectation(lambda x: x[10, :, 0])
    square = found.expectation(lambda x: (x[10, :, 0] - mid.value) ** 2)
    assert abs(mid.value - (mean_mid + gain * (y - mean_end))) < 4 * mid.std_error
    assert abs(square.value - (v - gain * a**10 * v)) < 4 * square.std_error


def chain_of(sde, n):
    """Log p(X_T = y | X_k = x) of an Euler chain in one dimension, for all k, x and y."""
    x = torch.linspace(-2.6, 2.6, 521, dtype=torch.float64)
    h = 1 / n
    m = x + h * sde.drift(x[:, None], torch.tensor(0.0))[:, 0]
    K = torch.exp(-((x - m[:, None]) ** 2) / (2 * h)) / math.sqrt(math.tau * h)
    kernels = [K]
    for _ in range(n - 1):
        kernels.append(K @ kernels[-1] * (x[1] - x[0]))
    return x, [k.log() for k in kernels]  # steps left - 1


@pytest.fixture(scope="module")
def well():
    return learn_bridge(kk.DoubleWell(v=1.0), spread, iterations=900, **QUICK)


def test_a_double_well_is_learned_for_all_ends(well):
    """Slopes of the chain itself, which a grid gives, at ends that paths come to."""
    grid, kernels = chain_of(kk.DoubleWell(v=1.0), 20)
    near = []
    for k, at, y in ((0, -1.0, 1.0), (5, 0.0, -1.0), (10, 0.5, -1.0), (16, 0.0, -1.0)):
        i, j = (int((grid - v).abs().argmin()) for v in (at, y))
        log_p = kernels[19 - k]
        exact = ((log_p[i + 1, j] - log_p[i - 1, j]) / (grid[i + 1] - grid[i - 1])).item()
        found = well.score(torch.tensor([[at]], dtype=torch.float64), k / 20, y).item()
        near.append(abs(found - exact) / max(1.0, abs(exact)))
    assert max(near) < 0.15 and sum(near) / len(near) < 0.08


def test_scores_are_measured_beyond_the_network(well):
    """At a grid time, from the start, and of a bridge whose network has learned nothing."""
    grid, kernels = chain_of(kk.DoubleWell(v=1.0), 20)
    raw = learn_bridge(kk.DoubleWell(v=1.0), spread, iterations=1, **QUICK)
    for bridge, k, at, y in ((well, 0, 1.0, -1.0), (well, 5, 0.0, -1.0), (raw, 5, 0.0, -1.0)):
        i, j = (int((grid - v).abs().argmin()) for v in (at, y))
        log_p = kernels[19 - k]
        exact = ((log_p[i + 1, j] - log_p[i - 1, j]) / (grid[i + 1] - grid[i - 1])).item()
        found = bridge.measured_score(torch.tensor([at]), k / 20, y, 20_000)
        assert abs(found.value.item() - exact) < 4 * found.std_error.item() + 1e-3
        assert found.std_error.item() < 0.05 * abs(exact)
    with pytest.raises(kk.KakusanError, match="not a time of this bridge"):
        well.measured_score(torch.zeros(1), 1.0, -1.0)


def test_weights_make_the_law_of_learned_paths_exact(well):
    grid, kernels = chain_of(kk.DoubleWell(v=1.0), 20)
    i, j = (int((grid - v).abs().argmin()) for v in (1.0, -1.0))
    found = well.sample(torch.ones(1, dtype=torch.float64), -1.0, n=4000)
    log_p = found.log_density
    assert found.ess > 0.25 * 4000
    assert abs(log_p.value - kernels[19][i, j].item()) < 4 * log_p.std_error + 1e-3
    # the middle of the bridge: p(x_10 | x_0) p(y | x_10)
    p = (kernels[9][i] + kernels[9][:, j]).softmax(0)
    middle = found.expectation(lambda x: x[10, :, 0])
    assert abs(middle.value - (p * grid).sum()) < 4 * middle.std_error + 1e-3


def test_paths_depend_on_seed_and_number_alone(well):
    a = well.sample(torch.ones(1), -1.0, n=70, seed=3)
    b = well.sample(torch.ones(1), -1.0, n=5, seed=3)
    assert torch.allclose(a.x[:, :5], b.x, atol=1e-4)  # kernels round by the size of a batch
    assert not torch.allclose(b.x, well.sample(torch.ones(1), -1.0, n=5, seed=4).x, atol=1e-2)


def test_far_ends_are_warned_of(well):
    with pytest.warns(UserWarning, match="ends=y"):
        well.sample(torch.ones(1), 9.0, n=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        well.sample(torch.ones(1), -1.0, n=3)


def test_rare_ends_are_drawn_towards():
    """From one well of v = 3 to the other: 1 of some 100 free paths comes near."""
    sde = kk.DoubleWell(v=3.0)
    bridge = learn_bridge(
        sde, torch.ones(1), ends=-1.0, iterations=400, steps=50, paths=1024, times=16, quiet=True
    )
    grid, kernels = chain_of(sde, 50)
    i, j = (int((grid - v).abs().argmin()) for v in (1.0, -1.0))
    found = bridge.sample(torch.ones(1, dtype=torch.float64), -1.0, n=4000)
    log_p = found.log_density
    assert bridge.guided and bridge.report.ess > 0.12 and found.ess > 0.12 * 4000
    assert abs(log_p.value - kernels[49][i, j].item()) < 4 * log_p.std_error + 1e-3


def test_an_event_of_brownian_motion():
    """{X_1 > 1}: the slope of log Φ((x - 1) / √τ)."""
    bridge = learn_bridge(
        kk.Brownian(), spread, Event(lambda x: x[:, 0] > 1), iterations=500, **QUICK
    )
    for x, t in ((0.0, 0.0), (0.5, 0.5), (1.0, 0.75)):
        tau = 1 - t
        z = torch.tensor((x - 1) / tau**0.5, dtype=torch.float64)
        log_phi = torch.distributions.Normal(0.0, 1.0).log_prob(z)
        exact = (log_phi - torch.special.log_ndtr(z)).exp().item() / tau**0.5
        found = bridge.score(torch.tensor([[x]], dtype=torch.float64), t, 1.0).item()
        assert abs(found - exact) < 0.12 * max(1.0, abs(exact)), (x, t, found, exact)


def test_a_class_of_the_end():
    """Left or right of zero, told by a classifier with probabilities: the weights know it."""
    label = Label(lambda x: torch.cat([-2 * x, 2 * x], 1), 2)
    bridge = learn_bridge(kk.Brownian(), spread, label, iterations=300, **QUICK)
    found = bridge.sample(torch.zeros(1), 1, n=3000)
    # p(right | x_T) = logistic(4 x_T), and x_T is standard normal
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    p = torch.exp(-x * x / 2) * torch.sigmoid(4 * x)
    mean = found.expectation(lambda x: x[-1, :, 0])
    assert abs(mean.value - (p * x).sum() / p.sum()) < 4 * mean.std_error
    assert found.ess > 2000


def test_noisy_views_and_several_times():
    seen = Series({0.5: Coordinates([0]), 1.0: Measured(torch.tensor([[0.0, 1.0]]), std=0.3)})
    ou = kk.OrnsteinUhlenbeck(rate=[1.0, 2.0], sigma=[0.5, 0.7])
    bridge = learn_bridge(ou, torch.zeros(2), seen, iterations=200, **QUICK)
    x0, y = torch.zeros(2, dtype=torch.float64), [0.4, -0.6]
    found = bridge.sample(x0, y, n=2000)
    assert (found.x[10, :, 0] == 0.4).all() and found.ess > 500
    # coordinates are independent: the density is a product of two of the chain
    q1 = 0.25 / 20 * sum((1 - 1 / 20) ** (2 * i) for i in range(10))
    q2 = 0.49 / 20 * sum((1 - 2 / 20) ** (2 * i) for i in range(20)) + 0.09
    exact = sum(-(v**2) / 2 / q - 0.5 * math.log(math.tau * q) for v, q in ((0.4, q1), (0.6, q2)))
    log_p = found.log_density
    assert abs(log_p.value - exact) < 4 * log_p.std_error + 1e-3


def test_noise_that_reaches_one_coordinate_alone():
    """FitzHugh-Nagumo: weights by the Malliavin matrix, and the voltage is met all the same."""
    sde = kk.FitzHughNagumo(span=(0.0, 0.5))
    bridge = learn_bridge(
        sde, sde.start, Coordinates([0]), steps=25, paths=256, times=12, iterations=60, quiet=True
    )
    assert "Covering" in bridge.report.weights
    found = bridge.sample(sde.start, -0.6, n=300)
    assert found.missed.max() < 1e-6 and found.ess > 3
    with pytest.raises(kk.NotElliptic, match="control"):
        bridge.score(sde.start[None], 0.1, -0.6)


def test_earlier_ends():
    bridge = learn_bridge(
        kk.OrnsteinUhlenbeck(rate=2.0), spread, horizons=True, iterations=600, **QUICK
    )
    short = bridge.until(0.5)
    exact = LinearTilt.exact(kk.OrnsteinUhlenbeck(rate=2.0, span=(0.0, 0.5)), Terminal())
    x = torch.linspace(-1, 1, 9, dtype=torch.float64).unsqueeze(1)
    u = exact.score(x, torch.tensor(0.1, dtype=torch.float64), torch.full_like(x, 0.3))
    assert (short.score(x, 0.1, 0.3) - u).square().mean() < 0.02 * u.square().mean()
    assert short.sample(torch.zeros(1), 0.3, n=2).t[-1] == 0.5
    with pytest.raises(kk.KakusanError, match="up to t=1"):
        bridge.until(2.0)


def test_a_reversed_process():
    """The reverse of Brownian motion from a point is the bridge to it, whatever came before."""
    back = kk.reverse(kk.Brownian(), lambda x, t: -x / t.clamp(min=0.05).to(x))
    grid = kk.grids.uniform(1.0, 0.1, 18)
    bridge = learn_bridge(
        back, torch.ones(1), grid=grid, iterations=300, paths=4096, times=8, visits=1, quiet=True
    )
    found = bridge.sample(torch.ones(1, dtype=torch.float64), 0.5, n=500)
    assert (found.end == 0.5).all() and found.ess > 300


def test_what_is_refused():
    ode = kk.SDE.of(lambda x, t: -x, kk.Zero())
    with pytest.raises(kk.KakusanError, match="has none"):
        learn_bridge(ode, torch.ones(1))
    with pytest.raises(kk.KakusanError, match="needs time"):
        learn_bridge(kk.Brownian(span=(0.0, 0.0)), torch.ones(1))
    with pytest.raises(kk.KakusanError, match="outside the domain"):
        learn_bridge(kk.CIR(), torch.ones(1), ends=-1.0)
    with pytest.raises(kk.KakusanError, match="does not fit"):
        learn_bridge(kk.Brownian(), torch.ones(1), Coordinates(torch.ones(3, dtype=torch.bool)))
    with pytest.raises(kk.KakusanError, match="do not lie between"):
        learn_bridge(kk.Brownian(), torch.ones(1), Series({2.0: Terminal()}))
    with pytest.raises(kk.KakusanError, match="iterations must be at least 1"):
        learn_bridge(kk.Brownian(), torch.ones(1), iterations=0)
    silent = kk.SDE.of(lambda x, t: -x, lambda x, t: kk.Diagonal(0 * x))
    with pytest.raises(kk.KakusanError, match="has none"):
        learn_bridge(silent, torch.ones(1))
    with pytest.raises(kk.KakusanError, match="this one is not"):
        learn_bridge(kk.Brownian(), torch.ones(1), Measured(lambda x: x**2))
    with pytest.raises(kk.KakusanError, match="booleans"):
        learn_bridge(kk.Brownian(), torch.ones(1), Event(lambda x: x[:, 0]))
    for ends in (None, 1.0):
        with pytest.raises(kk.KakusanError, match="holds for none of .* observe a value instead"):
            learn_bridge(kk.Brownian(), torch.ones(1), Event(lambda x: x[:, 0] > 99), ends)
    with pytest.raises(kk.KakusanError, match="of an SDE and an Observation.*got None and"):
        learn_bridge(None, torch.ones(1))
    with pytest.raises(kk.KakusanError, match="got .*Brownian.* and 'x1'"):
        learn_bridge(kk.Brownian(), torch.ones(1), "x1")


@pytest.mark.parametrize(
    ("words", "ask"),
    [
        (r"states are \(B, 1\), got \(1,\)", lambda b, x: b.score(x, 0.0, 0.0)),
        (r"from 0 to before 1", lambda b, x: b.score(x[None], 1.0, 0.0)),
        (r"from 0 to before 1", lambda b, x: b.control(x[None], -0.5, 0.0)),
        ("states must be finite", lambda b, x: b.score(x[None] * math.nan, 0.0, 0.0)),
        ("the start must be finite", lambda b, x: b.sample(x * math.nan, 0.0)),
        ("a number, or 1 in a list, got 'a'", lambda b, x: b.sample(x, "a")),
        ("n must be a whole number of at least 1, got 0", lambda b, x: b.sample(x, 0.0, n=0)),
        ("got 'pinned'", lambda b, x: b.sample(x, 0.0, end="pinned")),
        (r"one state of shape \(1,\), got", lambda b, x: b.measured_score(x[None], 0.0, 0.0)),
    ],
    ids=range(9),
)
def test_what_a_bridge_refuses(well, words, ask):
    with pytest.raises(kk.KakusanError, match=words):
        ask(well, torch.ones(1, dtype=torch.float64))


def test_one_path_says_nothing_of_its_error(well):
    one = well.sample(torch.ones(1, dtype=torch.float64), -1.0, n=1)
    assert one.expectation(lambda x: x[10, :, 0]).std_error == math.inf


def test_noise_after_an_observation_says_nothing_of_it():
    """Brownian motion seen at 1/2 and at 1: before 1/2 what comes later does not matter."""
    seen = Series({0.5: Terminal(), 1.0: Terminal()})
    far = LinearTilt(kk.Brownian(), seen, slope=-3.0)  # a wrong pull, for the network to mend
    bridge = learn_bridge(kk.Brownian(), spread, seen, base=far, iterations=500, **QUICK)
    x = torch.zeros(1, 1, dtype=torch.float64)
    for y, t, exact in (([1.0, 0.0], 0.0, 2.0), ([0.0, 1.0], 0.0, 0.0), ([0.0, 0.5], 0.75, 2.0)):
        assert abs(bridge.score(x, t, y).item() - exact) < 0.35, (y, t)


def test_steps_of_weak_order_two_have_the_slope_of_the_process():
    """A stiff well: Euler's chain of as many steps has another slope, by a sixth."""
    well = kk.DoubleWell(v=2.0)
    steps = kk.RosenbrockSteps(well, kk.grids.uniform(0.0, 1.0, 40))
    bridge = learn_bridge(
        steps, torch.zeros(1), ends=-1.0, iterations=300, paths=2048, times=16, quiet=True
    )
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert abs(bridge.score(x, 0.0, -1.0).item() / -2.9460 - 1) < 0.06  # finite volumes
    with pytest.raises(kk.KakusanError, match="one time at once"):
        bridge.score(x, torch.zeros(1, dtype=torch.float64), -1.0)
