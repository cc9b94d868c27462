"""Weights of paths are ratios of densities; sums of weights; and G z = v."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from kakusan import (
    SDE,
    VP,
    Ancestral,
    Brownian,
    Dense,
    Diagonal,
    Fresh,
    Heun,
    KakusanError,
    NotElliptic,
    OrnsteinUhlenbeck,
    Scale,
    Stratonovich,
    Underdamped,
    Zero,
    ito,
    probability_flow,
    reverse,
    solve,
    tilt,
)
from kakusan.core import grids
from kakusan.inference.weights import effective_sample_size, log_mean_exp, path_log_weights
from problems import F64, Reversible, mixture, time


def start(n, d=2, seed=1):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def plain(sde):
    """The same process, its kind forgotten: drifts differ, and nobody knows why."""
    return SDE.of(sde.drift, sde.diffusion, sde.span)


def log_densities(path, sde):
    """The log density of Euler's chain along a path, step by step."""
    total = 0.0
    for k in range(len(path.t) - 1):
        x, t = path.x[k], path.t[k]
        h = path.t[k + 1] - t
        G = sde.diffusion(x, t)
        columns = [G.mv(e.expand_as(x)) for e in torch.eye(x.shape[1], dtype=F64)]
        M = torch.stack(columns, -1)
        law = MultivariateNormal(x + h * sde.drift(x, t), h.abs() * M @ M.mT)
        total = total + law.log_prob(path.x[k + 1])
    return total


def _pairs():
    """Two processes with one G: general drifts, forwards and backwards."""
    base, m = Reversible(), mixture(VP())
    other = SDE.of(lambda x, t: -2 * x + t, base.diffusion)
    u = lambda x, t: torch.tanh(x) - 0.3  # noqa: E731
    cosine = lambda x, t: m(x, t) + x.cos()  # noqa: E731
    diagonal = [
        SDE.of(f, lambda x, t: Diagonal(0.5 + x.sigmoid()))
        for f in (lambda x, t: -x, lambda x, t: x.cos() * (1 + t))
    ]
    ou = [OrnsteinUhlenbeck(rate=r, sigma=[[1.0, 0.4], [0.0, 0.7]]) for r in (0.5, 1.5)]
    vp = VP()
    full, back = ([reverse(vp, s, noise=k) for s in (m, cosine)] for k in (1.0, 0.7))
    return {
        "dense G(x)": (base, other),
        "diagonal G(x)": diagonal,
        "dense G": ou,
        "tilt": (base, tilt(base, u)),
        "two tilts": (tilt(base, u), tilt(tilt(base, u), u)),
        "reverse, two scores": full,
        "reverse, less noise": back,
        "reverse, tilt": (full[0], tilt(full[0], u)),
        "reverse, tilt of another score": (back[0], tilt(back[1], u)),
        "reverse, anything": (plain(back[0]), plain(back[1])),
    }


@pytest.mark.parametrize("name", _pairs())
def test_weights_are_ratios_of_the_densities_of_the_chains(name):
    frm, to = _pairs()[name]
    a, b = frm.span
    grid = torch.linspace(a, a + 0.3 * (b - a), 7, dtype=F64)
    path = solve(frm, start(20), grid, noise=Fresh(0), keep=True)
    log_w = path_log_weights(path, frm, to)
    truth = log_densities(path, to) - log_densities(path, frm)
    assert log_w.shape == (20,) and truth.abs().max() > 0.1
    assert (log_w - truth).abs().max() < 1e-10 * (1 + truth.abs().max()), name
    # the way that knows about tilts and scores, and the way that does not
    assert torch.allclose(path_log_weights(path, plain(frm), plain(to)), log_w, atol=1e-9)


def test_noise_of_momenta_alone_can_be_tilted():
    """No inverse, and yet a weight: the ratio of the densities of the momenta."""
    sde = Underdamped(lambda q: (q**2).sum(1) / 2, friction=0.8)
    u = lambda x, t: 0.7 * torch.cos(x)  # noqa: E731
    to, grid = tilt(sde, u), grids.uniform(0, 1, 10)
    path = solve(sde, start(30, 4), grid, noise=Fresh(0), keep=True)
    truth, spread = 0.0, math.sqrt(2 * 0.8 * 0.1)
    for k in range(10):
        x, p = path.x[k], path.x[k + 1][:, 2:]
        for sign, law in ((1, to), (-1, sde)):
            mean = (x + 0.1 * law.drift(x, path.t[k]))[:, 2:]
            truth = truth + sign * Normal(mean, spread).log_prob(p).sum(1)
    log_w = path_log_weights(path, sde, to)
    assert torch.allclose(log_w, truth, atol=1e-10)
    assert torch.allclose(path_log_weights(path, plain(sde), plain(to)), truth, atol=1e-10)
    stiffer = Underdamped(lambda q: 2 * (q**2).sum(1), friction=0.8)
    assert path_log_weights(path, sde, stiffer).isfinite().all()
    lighter = SDE.of(lambda x, t: x, sde.diffusion)
    with pytest.raises(NotElliptic, match="for 30 of 30 states: no noise reaches them"):
        path_log_weights(path, sde, lighter)


def test_the_mean_weight_is_one():
    for name in ("dense G(x)", "reverse, two scores", "reverse, tilt of another score"):
        frm, to = _pairs()[name]
        a, b = frm.span
        grid = torch.linspace(a, a + 0.04 * (b - a), 9, dtype=F64)
        path = solve(frm, start(20_000), grid, noise=Fresh(2), keep=True)
        w = path_log_weights(path, frm, to).exp()
        se = w.std() / math.sqrt(len(w))
        assert se < 0.05 and abs(w.mean() - 1) < 4 * se, (name, w.mean(), se)


def test_weighted_brownian_paths_are_ornstein_uhlenbeck():
    """Mean and second moment at the end: those of the chain of n steps, in closed form."""
    n, steps, rate, x0 = 40_000, 40, 0.8, 1.3
    brownian, ou = Brownian(), OrnsteinUhlenbeck(rate=rate, sigma=1.0)
    x, h = torch.full((n, 1), x0, dtype=F64), 1 / steps
    path = solve(brownian, x, grids.uniform(0, 1, steps), noise=Fresh(0), keep=True)
    w = path_log_weights(path, brownian, ou).exp()
    mean, variance = x0 * (1 - rate * h) ** steps, 0.0
    for _ in range(steps):
        variance = (1 - rate * h) ** 2 * variance + h
    end = path.end[:, 0]
    for g, truth in ((end, mean), (end**2, variance + mean**2)):
        se = (w * g).std() / math.sqrt(n)
        assert abs((w * g).mean() - truth) < 4 * se, ((w * g).mean(), truth, se)
        assert abs(g.mean() - truth) > 10 * se
    # the continuous process is as close as 40 steps are
    assert abs(mean - x0 * math.exp(-rate)) < 0.02


def test_a_rare_event_from_tilted_paths():
    """P(w_1 > 4) = 3.2e-5: one in 30,000 paths gets there, half of the tilted ones do."""
    brownian = Brownian()
    pushed = tilt(brownian, lambda x, t: torch.full_like(x, 4.0))
    x = torch.zeros(20_000, 1, dtype=F64)
    path = solve(pushed, x, grids.uniform(0, 1, 8), noise=Fresh(0), keep=True)
    hit = (path.end[:, 0] > 4).double() * path_log_weights(path, pushed, brownian).exp()
    truth = 0.5 * math.erfc(4 / math.sqrt(2))
    se = hit.std().item() / math.sqrt(len(hit))
    assert abs(hit.mean().item() - truth) < 4 * se and se < 0.03 * truth


def test_gradients_flow_to_parameters():
    """With δ = -(r - 0.9) x h the derivative by r is -Σ x dw at r = 0.9."""
    rate = torch.tensor(0.9, dtype=F64, requires_grad=True)
    frm = SDE.of(lambda x, t: -0.9 * x, Scale(1.0))
    to = SDE.of(lambda x, t: -rate * x, Scale(1.0))
    path = solve(frm, start(50, 1), grids.uniform(0, 1, 20), noise=Fresh(0), keep=True)
    path_log_weights(path, frm, to).sum().backward()
    truth = -(path.x[:-1] * path.dw).sum()
    assert torch.allclose(rate.grad, truth, atol=1e-10)


def test_the_sense_of_stratonovich_is_known():
    """Both are turned into Itô, where the same shift is in both drifts."""
    G = lambda x, t: Diagonal(1 + 0.3 * x.sin())  # noqa: E731
    bare = [SDE.of(lambda x, t, k=k: -k * x, G) for k in (1, 2)]
    frm, to = (Stratonovich(sde) for sde in bare)
    path = solve(frm, start(10), grids.uniform(0, 1, 10), noise=Fresh(0), keep=True)
    truth = log_densities(path, ito(to)) - log_densities(path, ito(frm))
    assert torch.allclose(path_log_weights(path, frm, to), truth, atol=1e-9)
    with pytest.raises(KakusanError, match="away from Euler-Maruyama's step"):
        path_log_weights(path, *bare)


# --- refusals


def test_what_has_no_weight_is_refused():
    x, grid = start(8), grids.uniform(0, 1, 6)
    ou, brownian = OrnsteinUhlenbeck(rate=1.0, sigma=1.0), Brownian()
    path = solve(brownian, x, grid, noise=Fresh(0), keep=True)
    words = r"Brownian and OrnsteinUhlenbeck differ in G at t=0: .* only drifts may differ"
    with pytest.raises(KakusanError, match=words):
        path_log_weights(path, brownian, OrnsteinUhlenbeck(rate=1.0, sigma=1.01))
    with pytest.raises(KakusanError, match="differ in G"):
        path_log_weights(path, brownian, SDE.of(lambda x, t: -x, Zero()))
    with pytest.raises(KakusanError, match="differ in G"):
        path_log_weights(path, brownian, SDE.of(lambda x, t: -x, Dense(torch.ones(2, 3))))
    some = solve(ou, x, grid, noise=Fresh(0), keep=True, every=2)
    for wrong in (some, solve(ou, x, grid, Heun(), Fresh(0), keep=True)):
        with pytest.raises(KakusanError, match=r"step 1 of the path is .* record each step"):
            path_log_weights(wrong, ou, brownian)
    with pytest.raises(KakusanError, match=r"1 states at 7 times and no increments: record it"):
        path_log_weights(solve(ou, x, grid, noise=Fresh(0)), ou, brownian)
    back, m = torch.linspace(1.0, 0.5, 5, dtype=F64), mixture(VP())
    flow = solve(probability_flow(VP(), m), x, back, keep=True)
    with pytest.raises(KakusanError, match=r"no increments"):
        path_log_weights(flow, reverse(VP(), m), reverse(VP(), m))
    ancestral = solve(reverse(VP(), m), x, back, Ancestral(), Fresh(0), keep=True)
    with pytest.raises(KakusanError, match=r"record each step \(every=1\) of EulerMaruyama"):
        path_log_weights(ancestral, reverse(VP(), m), reverse(VP(), m))


# --- sums of weights


def test_effective_sample_size():
    log_w = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=F64)
    w = log_w.exp()
    assert math.isclose(effective_sample_size(log_w), w.sum() ** 2 / (w**2).sum(), rel_tol=1e-12)
    assert math.isclose(effective_sample_size(log_w + 900), effective_sample_size(log_w))
    assert math.isclose(effective_sample_size(torch.zeros(7) - 1e3), 7.0)
    # weights exp(s z - s²/2) of normal z: B e^{-s²}
    z = torch.randn(400_000, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert abs(effective_sample_size(0.5 * z) / (len(z) * math.exp(-0.25)) - 1) < 0.01


def test_the_log_of_a_mean():
    """Its standard error is that seen between repetitions."""
    z = torch.randn(4000, 500, dtype=F64, generator=torch.Generator().manual_seed(0))
    log_w = 0.6 * z - 0.18 + 900
    means = [log_mean_exp(row) for row in log_w]
    values = torch.tensor([m.value for m in means], dtype=F64)
    errors = torch.tensor([m.std_error for m in means], dtype=F64)
    assert abs(values.mean() - 900) < 0.003
    assert abs(errors.mean() / values.std() - 1) < 0.06
    direct = (log_w[0] - 900).exp().mean().log() + 900
    assert math.isclose(means[0].value, direct, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("log_w", "words"),
    [
        (torch.zeros(2, 2), r"got shape \(2, 2\)"),
        (torch.tensor([0.0, float("nan")]), "none of them nan"),
        (torch.zeros(0), r"got shape \(0,\)"),
        (torch.full((3,), -math.inf), "all 3 weights are zero"),
    ],
)
def test_bad_weights_are_refused(log_w, words):
    for summary in (effective_sample_size, log_mean_exp):
        with pytest.raises(KakusanError, match=words):
            summary(log_w)


# --- G z = v


def test_operators_solve():
    r = lambda *s: torch.randn(*s, dtype=F64, generator=torch.Generator().manual_seed(3))  # noqa: E731
    B, d = 5, 3
    for G, m in (
        (Scale(1.7), d), (Scale(r(B)), d), (Diagonal(r(B, d)), d), (Dense(r(d, d)), d),
        (Dense(r(B, d, d)), d), (Dense(r(B, d, 2)), 2), (Dense(r(d, 4)), 4),
        (Dense(r(B, d, 5)), 5),
    ):  # fmt: skip
        v = G.mv(r(B, m))
        z = G.solve(v)
        assert z.shape == (B, m) and torch.allclose(G.mv(z), v, atol=1e-10), G
        # the shortest: in the range of Gᵀ
        if isinstance(G, Dense):
            truth = (torch.linalg.pinv(G.G.expand(B, d, m)) @ v[..., None])[..., 0]
            assert torch.allclose(z, truth, atol=1e-9), (G, m)
    image = r(B, 2, 4, 4)
    assert torch.allclose(Scale(torch.arange(1.0, B + 1)).solve(image)[2], image[2] / 3)
    assert (Dense(r(4, 4)).solve(r(B, 2, 2))).shape == (B, 2, 2)


def test_operators_say_what_they_do_not_reach():
    v = torch.ones(4, 2, dtype=F64)
    half = Diagonal(torch.tensor([2.0, 0.0], dtype=F64))
    kept = v * torch.tensor([1.0, 0.0])
    assert torch.equal(half.solve(kept), kept / 2)
    assert torch.equal(Zero().solve(0 * v), 0 * v)
    line = Dense(torch.ones(2, 2, dtype=F64))
    assert torch.allclose(line.solve(v), v / 2)
    tall = Dense(torch.ones(2, 1, dtype=F64))
    for G, words in (
        (half, "for 4 of 4 states"), (Zero(), "reaches no state but 0"),
        (Scale(0.0), "for 4 of 4"), (line, "2 x 2, and its columns"), (tall, "2 x 1, and its col"),
    ):  # fmt: skip
        with pytest.raises(NotElliptic, match=words):
            G.solve(v * torch.tensor([1.0, -1.0], dtype=F64))
    assert time(0.0).dtype == F64
