"""Scores learned from paths: against exact ones, and by running backwards."""

import math

import pytest
import torch

from kakusan import (
    SDE,
    Dense,
    Diagonal,
    Fresh,
    KakusanError,
    NotElliptic,
    Scale,
    Stratonovich,
    Zero,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.learn import learn_score, load_score, save_score
from kakusan.models.scorenet import ScoreNet
from kakusan.objectives.local import Local, Skorokhod
from kakusan.processes.zoo.mechanics import Underdamped
from problems import F64, Reversible, time

BROWNIAN = SDE.of(lambda x, t: 0 * x, Scale(2.0))
SHORT = {"steps": 10, "iterations": 20, "batch": 64, "paths": 128, "times": 4}


class Quick(Reversible):
    """The same process, with the divergence by hand: derivatives of derivatives cost."""

    def drift(self, x, t):
        a, eye = torch.tanh(x @ self.W.T), 0.7 * torch.eye(2, dtype=x.dtype)
        G = eye + (a @ self.V.T).reshape(-1, 2, 2)
        slope = (((1 - a**2).unsqueeze(1) * self.V) @ self.W).reshape(-1, 2, 2, 2)
        divergence = torch.einsum("bikj,bjk->bi", slope, G) + torch.einsum(
            "bik,bjkj->bi", G, slope
        )
        return (divergence - torch.einsum("bik,bjk,bj->bi", G, G, x)) / 2


def relative(score, exact, x, t):
    s = score(x, time(t))
    return ((s - exact).square().sum() / exact.square().sum()).sqrt().item()


def test_a_reversible_process_is_learned_and_runs_backwards():
    sde, x = Quick(), torch.randn(2000, 2, dtype=F64)
    assert torch.allclose(sde.drift(x, time(0.0)), Reversible().drift(x, time(0.0)))
    score = learn_score(
        sde, lambda n: torch.randn(n, 2, dtype=F64), steps=10, iterations=150, paths=1024, times=10
    )
    for t in (0.2, 0.5, 1.0):
        assert relative(score, -x, x, t) < 0.15, score.report
    assert score.report.identity < 0.15 and abs(score.report.loss - 1) < 0.02, score.report
    end = solve(reverse(sde, score), x, grids.uniform(1, 0, 40), noise=Fresh(3)).end
    # 15% of the score for one unit of time, at noises of about a half
    assert (end.mean(0).abs() < 4 / 2000**0.5 + 0.05).all(), end.mean(0)
    assert ((end.T.cov() - torch.eye(2)).abs() < 4 * (2 / 2000) ** 0.5 + 0.1).all(), end.T.cov()


# two wells, and a drift that grows no faster than the state
WELLS = SDE.of(lambda x, t: 5 * torch.tanh(2 * x) - 4 * x, Scale(1.0))


@pytest.fixture(scope="module")
def well():
    torch.set_num_threads(1)
    return learn_score(WELLS, torch.full((1,), 0.2), steps=50, iterations=500)


def test_a_point_start_between_two_wells(well):
    """Against the density of the chain, by products with the matrix of its kernel."""
    h, y = 1 / 50, torch.linspace(-4, 4, 1601, dtype=F64)[:, None]

    def kernel(x):
        mean = x + h * WELLS.drift(x, time(0.0))
        return torch.exp(-0.5 * (y.mT - mean) ** 2 / h) / (2 * math.pi * h) ** 0.5

    p, K = kernel(torch.tensor([[0.2]], dtype=F64))[0], kernel(y) * 0.005
    for k in range(2, 51):
        p = p @ K
        if k in (5, 12, 25, 37, 50):
            exact = torch.gradient(p.log(), spacing=0.005)[0]
            error = (well(y, time(k * h))[:, 0] - exact).square()
            good = p > 1e-8 * p.max()
            relative = ((p * error)[good].sum() / (p * exact**2)[good].sum()).sqrt()
            assert relative < 0.2, (k, relative, well.report)
    assert well.report.loss < 0.5 and well.report.first == h, well.report
    assert well.report.identity < 4 * well.report.error, well.report


def test_it_runs_back_to_its_point(well):
    grid = grids.uniform(0, 1, 50)
    there = solve(WELLS, torch.full((2000, 1), 0.2), grid, noise=Fresh(5), keep=True)
    back = reverse(WELLS, well)
    here = solve(back, there.end, grid.flip(0), noise=Fresh(6), keep=True)
    for k in (25, 40):
        a, b = there.x[50 - k, :, 0], here.x[k, :, 0]
        gap = (a.mean() - b.mean()).abs()
        assert gap < 4 * (2 / 2000) ** 0.5 * a.std() + 0.04, (k, gap)
        assert abs(b.std() / a.std() - 1) < 0.15, (k, a.std(), b.std())
    # the last step leaves its own noise, 1 / sqrt(50) = 0.14
    assert (here.end.mean() - 0.2).abs() < 0.03 and here.end.std() < 0.2, here.end.std()


def test_a_linear_process_needs_no_network():
    G = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    sde = SDE.of(lambda x, t: -x * t, Dense(G))
    score = learn_score(sde, torch.tensor([1.0, -1.0]), **SHORT | {"paths": 4000})
    path = solve(
        sde, torch.tensor([[1.0, -1.0]]).expand(500, 2), grids.uniform(0, 1, 10), keep=True
    )
    for k in (1, 5, 10):
        exact = Skorokhod()(sde, path, [k])[0]
        assert relative(score, exact, path.x[k], k / 10) < 0.1, score.report


def test_noise_that_does_not_reach_at_once():
    sde = Underdamped(lambda q: (q**2).sum(1) / 2)
    score = learn_score(sde, torch.tensor([0.5, 0.0]), **SHORT | {"paths": 4000})
    assert score.report.first == pytest.approx(0.2)
    path = solve(
        sde, torch.tensor([[0.5, 0.0]]).expand(500, 2), grids.uniform(0, 1, 10), keep=True
    )
    exact = Skorokhod()(sde, path, [10])[0]
    assert relative(score, exact, path.end, 1.0) < 0.1, score.report
    assert score(path.x[0], time(0.0)).isfinite().all()


@pytest.mark.parametrize("shape", [(1,), (2, 3), (70,)])
@pytest.mark.parametrize("target", [Local(), None])
def test_states_of_any_shape_and_dtype(shape, target):
    if target is None and shape == (70,):
        target = Skorokhod(2, probes=1)
    x0 = torch.randn(5, *shape, dtype=F64)
    sde = SDE.of(lambda x, t: -x, lambda x, t: Diagonal(1 + 0.1 * torch.sin(x)), (0.5, 1.0))
    settings = SHORT | {"steps": 4, "iterations": 3, "paths": 96}
    score = learn_score(sde, x0, target=target, **settings)
    for dtype, t in ((F64, time(0.7)), (torch.float32, torch.full((5,), 0.5, dtype=F64))):
        s = score(x0.to(dtype), t)
        assert s.shape == x0.shape and s.dtype == dtype and s.isfinite().all()


def test_the_sense_of_stratonovich_is_known():
    """Both are E[target | x] of one process: dx = x ∘ dw, with drift x/2 by Itô."""
    f, G = lambda x, t: 0 * x, lambda x, t: Diagonal(0.5 * x)
    same = SDE.of(lambda x, t: x / 8, G)
    one, other = (
        learn_score(sde, torch.ones(1), target=Local(), **SHORT)
        for sde in (Stratonovich(SDE.of(f, G)), same)
    )
    assert torch.allclose(one.mean, other.mean)
    assert torch.allclose(one(torch.ones(1, 1), time(0.5)), other(torch.ones(1, 1), time(0.5)))


def test_one_seed_one_score(tmp_path):
    state = torch.get_rng_state()
    starts = lambda n: torch.rand(n, 2)  # noqa: E731
    a, b, c = (learn_score(BROWNIAN, starts, seed=s, **SHORT) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    x = torch.randn(4, 2)
    at = [score(x, time(0.3)) for score in (a, b, c)]
    assert torch.equal(at[0], at[1]) and not torch.equal(at[0], at[2])
    save_score(a, tmp_path / "score.safetensors")
    assert torch.equal(load_score(tmp_path / "score.safetensors")(x, time(0.3)), at[0])
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(KakusanError, match="damaged"):
        load_score(tmp_path / "bad")


def test_a_net_of_your_own(tmp_path):
    net = torch.nn.Bilinear(2, 1, 2)
    wrapped = type("Net", (torch.nn.Module,), {
        "forward": lambda self, y, t: self.inner(y, t.reshape(-1, 1).expand(len(y), 1)),
    })()  # fmt: skip
    wrapped.inner = net
    score = learn_score(BROWNIAN, torch.zeros(2), net=wrapped, **SHORT)
    assert score(torch.ones(3, 2), time(0.5)).shape == (3, 2)
    with pytest.raises(KakusanError, match="network of your own"):
        save_score(score, tmp_path / "score")


def test_what_a_score_net_is_at_its_ends():
    times, mean = torch.tensor([0.0, 0.1, 1.0]), torch.zeros(3, 1)
    score = ScoreNet((1,), times, mean, torch.tensor([0.0, 0.1, 1.0])[:, None])
    x = torch.ones(1, 1, dtype=F64)
    for t in (0.05, 0.1, 0.6, 1.0):
        assert score(x, time(t)).item() == pytest.approx(-1 / t), t
    assert score(x, time(0.0)).item() == pytest.approx(-100)  # a tenth of the first step
    dense = ScoreNet((1,), times, mean, torch.tensor([0.0, 0.1, 1.0])[:, None, None])
    t = torch.tensor([0.05, 0.7], dtype=F64)
    x = torch.randn(2, 1, dtype=F64)
    assert torch.allclose(dense(x, t), score(x, t)) and torch.allclose(
        score(x, t), -x / t[:, None]
    )
    assert torch.allclose(dense.float()(x, t), score(x, t))
    with pytest.raises(KakusanError, match="states of shape"):
        score(torch.ones(1, 2), time(0.5))


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        (torch.tensor(1.0), "floating-point states"),
        (torch.ones(3, 2, dtype=torch.int64), "floating-point states"),
        (torch.ones(0, 2), "floating-point states"),
        (torch.tensor([[1.0], [math.nan], [math.inf]]), "2 of 3 starts are not finite"),
        (lambda n: torch.ones(3, 1), "must give 512 states, got 3"),
        (lambda n: None, "floating-point states"),
        ("here", "a tensor of states or a function"),
    ],
)
def test_starts_are_checked(starts, words):
    with pytest.raises(KakusanError, match=words):
        learn_score(BROWNIAN, starts, **SHORT)


def test_refusals():
    with pytest.raises(KakusanError, match="iterations must be at least 1"):
        learn_score(BROWNIAN, torch.zeros(1), iterations=0)
    with pytest.raises(NotElliptic, match=r"local score matching needs G\^-1"):
        sde = Underdamped(lambda q: (q**2).sum(1) / 2)
        learn_score(sde, torch.zeros(2), target=Local(), **SHORT)
    with pytest.raises(NotElliptic, match="no increments"):
        learn_score(SDE.of(lambda x, t: -x, Zero()), torch.zeros(1), **SHORT)
    with pytest.raises(KakusanError, match="no longer finite"):
        learn_score(SDE.of(lambda x, t: x**9, Scale(9.0)), torch.ones(1), **SHORT)
