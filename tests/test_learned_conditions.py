"""Tilts of trained models that are learned from the models' own paths."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from kakusan import KakusanError, UsageError
from kakusan.condition_files import load_condition, save_condition
from kakusan.core.noise import Fresh
from kakusan.inference.guidance.axes import Axes
from kakusan.inference.guidance.common import Prior
from kakusan.inference.guidance.learned import (
    AtEnd,
    Denoised,
    PathNoise,
    ReverseChain,
    ShiftTilt,
    rehearsed,
)
from kakusan.learned_conditions import (
    Learned,
    LearnedCondition,
    learn_condition,
    rehearse,
)
from kakusan.models.score import ExactMixture
from kakusan.processes.linear import Cosine, angle_grid
from kakusan.processes.observations import Coordinates, Event, Label, Measured, Series

PROCESS = Cosine()
MEANS = torch.tensor([[-1.0, -0.3], [0.9, 0.6]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.1, 0.03], [0.03, 0.2]], [[0.15, -0.05], [-0.05, 0.1]]], dtype=torch.float64
)
WEIGHTS = torch.tensor([0.6, 0.4], dtype=torch.float64)
KINDS = Label(lambda x: (x[:, 0] > 0.2).long() + (x[:, 1] > 0.5).long(), 3)
SUM = Measured(torch.tensor([[1.0, 1.0]], dtype=torch.float64))


def chain_of(means, covariances, weights, steps, data_std=1.0):
    exact = ExactMixture(PROCESS, weights, means, covariances)
    grid = angle_grid(PROCESS, PROCESS.span[1], 0.0, steps, rho=1.5)
    like = torch.zeros(1, means.shape[1], dtype=torch.float64)
    return ReverseChain(Prior(PROCESS, exact, data_std), grid, (means.shape[1],), like)


@pytest.fixture(scope="module")
def chain():
    return chain_of(MEANS, COVARIANCES, WEIGHTS, 25)


@pytest.fixture(scope="module")
def ends(chain):
    """Many free samples of the chain: the truth."""
    x = chain.start(60_000, Fresh(91), chain.like)
    return rehearsed(chain, Denoised(), x, Fresh(92)).end


@pytest.fixture(scope="module")
def learned(chain):
    """A tilt for three classes."""
    with torch.random.fork_rng():
        torch.set_num_threads(1)
        return learn_condition(chain, KINDS, Learned(iterations=400, lr=3e-3))


# --- what is regressed on


def _gaps(goal, steps=5):
    """E[(ĉ_k - dw_k / h_k) f(X_k, X_0)] in standard errors, which is 0 for all f."""
    chain, n = chain_of(MEANS, COVARIANCES, WEIGHTS, steps), 15_000
    start = chain.start(n, Fresh(1), chain.like)
    told, again, out = rehearsed(chain, goal, start, Fresh(2)), Fresh(2), []
    for k in range(len(chain)):
        t, s = chain.steps.grid[k].item(), chain.steps.grid[k + 1].item()
        dw = again.increment(k, t, s, tuple(start.shape), start)
        c = (chain.gain[k] * chain.spread[k]).item() * told.goal[k]
        for f in (told.end, told.end.tanh() * told.x0[k], (told.end[:, :1] > 0.2).double()):
            gap = (c - dw / chain.h[k].item()) * f
            gap = gap[:, gap.std(0) > 1e-9]  # of the last step it is that noise itself
            out += [] if not gap.numel() else (gap.mean(0) / (gap.std(0) / n**0.5)).abs().tolist()
    return torch.tensor(out)


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_path_noise_has_the_mean_of_the_chains_own_noise(keep):
    assert _gaps(PathNoise(keep)).max() < 4.5


def test_denoised_goals_are_biased_on_a_coarse_chain():
    assert _gaps(Denoised()).max() > 8
    assert _gaps(Denoised(), 40).max() < 6  # and by next to nothing on a fine one


def test_later_noise_takes_variance_away(chain):
    start = chain.start(2000, Fresh(3), chain.like)
    sizes = [
        (chain.weight * rehearsed(chain, goal, start, Fresh(4)).goal.square().sum(2).mean(1)).sum()
        for goal in (PathNoise(0.0), PathNoise(1.0), Denoised())
    ]
    assert sizes[0] > 2.5 * sizes[1] > 2.5 * sizes[2]


def test_the_pull_is_exact_for_gaussian_data():
    """δ = σ² C Hᵀ (H C_t Hᵀ)⁻¹ (y - H x̂_0) with the covariance C_t of x_0 given x_t."""
    C = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    chain = chain_of(torch.zeros(1, 2).double(), C[None], torch.ones(1).double(), 400)
    start = chain.start(4000, Fresh(5), chain.like)
    told = rehearsed(chain, Denoised(), start, Fresh(6))
    axes = Axes.of(told.end, told.x0, chain.spread.tolist())
    see = Measured(torch.tensor([[1.0, -0.5]], dtype=torch.float64), std=0.3)
    tilt, H = ShiftTilt(chain, AtEnd(see, chain), axes), see.H
    x0, y = torch.randn(4, 2).double(), torch.ones(1, 1).double()
    for k in (100, 200, 300):
        a, v = chain.alpha[k] ** 2, chain.sigma[k] ** 2
        V = v * C @ torch.linalg.inv(a * C + v * torch.eye(2))
        true = (y - x0 @ H.mT) @ torch.linalg.inv(H @ V @ H.mT + 0.09) @ H @ V
        got = tilt.pull(x0, k, y) * chain.spread[k]
        assert torch.allclose(got, true, rtol=0.08, atol=0.02), k


# --- what is drawn


def _agree(found, truth, n):
    """Log-evidence and mean of samples against free samples of the chain with their weights."""
    end, w = truth
    p, size = w.mean(), len(w)
    error = math.hypot(
        (w.std() / p / size**0.5).item(),
        (found.log_weights.exp() * n).std().item() / len(found.log_weights) ** 0.5,
    )
    assert abs(found.log_evidence - p.log().item()) < 4.5 * error
    mean = (w[:, None] * end).sum(0) / w.sum()
    x, count = found.samples.unique(dim=0, return_counts=True)
    both = ((w, end), (count, x))
    errors = [(v[:, None] / v.sum() * (z - mean)).square().sum(0) for v, z in both]
    assert ((found.mean - mean).abs() < 4.5 * torch.stack(errors).sum(0).sqrt()).all()


@pytest.mark.parametrize("y", [0, 1, 2])
@pytest.mark.parametrize("trained", [True, False])
def test_weights_are_exact_whatever_the_tilt(chain, ends, learned, y, trained):
    tilt = learned if trained else _spoilt(learned)
    found = tilt.sample(y, 3000, seed=7, particles=3000)
    assert (KINDS.draw(found.samples)[:, 0] == y).all() and (found.missed == 0).all()
    _agree(found, (ends, (KINDS.draw(ends)[:, 0] == y).double()), 3000)
    # and the chain is nearly the model
    exact = ExactMixture(PROCESS, WEIGHTS, MEANS, COVARIANCES).sample(200_000)
    p = (KINDS.draw(exact)[:, 0] == y).double().mean().log().item()
    assert abs(found.log_evidence - p) < 0.25


def _spoilt(learned):
    """The same with a network of noise that nobody trained."""
    net = type(learned.tilt.net)((2,), (2,), (0.0, 1.0), torch.randn(9, 2), torch.randn(9, 3), 16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tilt = learned.tilt
    return LearnedCondition(
        ShiftTilt(tilt.chain, tilt.observation, tilt.axes, net.eval()), learned.how
    )


def test_what_is_learned_makes_samples_count(chain, learned):
    """One tilt for all classes: each has a larger effective number than without it."""
    report = learned.report
    assert 0.4 < report.nats < report.entropy < math.log(3) and report.pull == 0
    free = LearnedCondition(ShiftTilt(chain, learned.tilt.observation), learned.how)
    for y in range(3):
        sizes = [tilt.sample(y, 10, 3, particles=1000).ess for tilt in (learned, free)]
        assert sizes[0] > 1.3 * sizes[1], y


@pytest.mark.parametrize("y", [-1.0, 1.5])
def test_measurements_without_noise_are_met(chain, ends, y):
    tilt = learn_condition(chain, SUM, Learned(paths=512, iterations=0))
    assert tilt.report and tilt.report.pull > 1.0 and tilt.tilt.net is None
    # paths are seen as weights take them to be seen: through the noise of the last step
    blur = AtEnd(SUM, chain).drawn(torch.zeros(20_000, 2).double()).std().item()
    assert abs(blur / (chain.left * 2**0.5) - 1) < 5 / 40_000**0.5
    found = tilt.sample(y, 4000, seed=5, particles=4000)
    assert found.missed.max() < 1e-9 and 0 < found.mended.mean() < 0.05
    std = chain.left * 2**0.5  # the noise that the last step removes, seen through H
    w = torch.exp(-0.5 * ((SUM.forward(ends)[:, 0] - y) / std) ** 2) / (std * (2 * math.pi) ** 0.5)
    _agree(found, (ends, w), 4000)
    S = torch.stack([C.sum() for C in COVARIANCES])
    parts = torch.distributions.Normal(MEANS.sum(1), S.sqrt()).log_prob(torch.tensor(y).double())
    assert abs(found.log_evidence - (WEIGHTS.log() + parts).logsumexp(0)) < 0.35


def test_samples_are_the_same_for_any_batch(learned):
    other = LearnedCondition(learned.tilt, dataclasses.replace(learned.how, batch=70))
    a, b = (one.sample(1, 20, seed=2) for one in (learned, other))
    assert torch.allclose(a.samples, b.samples) and torch.allclose(a.log_weights, b.log_weights)
    assert not torch.allclose(a.samples, learned.sample(1, 20, seed=3).samples)


# --- files, and what is refused


def test_a_file_gives_the_same_samples_bit_for_bit(chain, learned, tmp_path):
    path = tmp_path / "kinds.safetensors"
    save_condition(learned, path, {"by": "me"})
    again = load_condition(path, chain, KINDS, learned.how, about={"by": "me"})
    assert torch.equal(again.sample(2, 9).samples, learned.sample(2, 9).samples)
    assert again.report == learned.report
    asked: dict[str, Any] = {"model": chain, "observation": KINDS, "how": learned.how}
    asked |= {"about": {"by": "me"}}
    wrong: list[tuple[str, Any, str]] = [
        ("observation", SUM, "for other observation"), ("how", Learned(seed=1), "settings"),
        ("about", {}, "other words"),
        ("model", chain_of(MEANS, COVARIANCES, WEIGHTS, 9), "other steps"),
    ]  # fmt: skip
    for name, value, said in wrong:
        with pytest.raises(KakusanError, match=said):
            load_condition(path, **(asked | {name: value}))
    with pytest.raises(KakusanError, match="missing"):
        load_condition(tmp_path / "no", chain, KINDS)


def test_the_same_seed_learns_the_same(chain):
    how = Learned(paths=64, iterations=30)
    a, b = (learn_condition(chain, KINDS, how) for _ in range(2))
    c = learn_condition(chain, KINDS, how, rehearsal=rehearse(chain, how))
    for other in (b, c):
        assert torch.equal(a.sample(1, 5).samples, other.sample(1, 5).samples)


def test_requests_that_make_no_sense_are_refused(chain, learned):
    few = Learned(paths=20, iterations=2)
    with pytest.raises(KakusanError, match="all 20 paths of the model have"):
        learn_condition(chain, Event(lambda x: x[:, 0] > 99), few)
    twice = Measured(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(KakusanError, match="some follow from the others"):
        learn_condition(chain, twice, few)
    with pytest.raises(UsageError, match="a Series is seen along a path"):
        learn_condition(chain, Series({0.5: SUM}), few)
    with pytest.raises(KakusanError, match="does not fit states"):
        learn_condition(chain, Coordinates([7]), few)
    with pytest.raises(KakusanError, match="a class is a whole number"):
        learned.sample(5)
    rare = learn_condition(chain, Event(lambda x: x[:, 0] > 1.2), few)
    with pytest.raises(KakusanError, match="none of 2 paths came to agree"):
        dataclasses.replace(rare, how=dataclasses.replace(few, particles=2)).sample(1, 1, seed=1)
    bad: dict[str, Any]
    for bad in ({"steps": 1}, {"paths": 3}, {"particles": 0}, {"width": 0}):
        with pytest.raises(UsageError):
            Learned(**bad)
    with pytest.raises(KakusanError, match="keep is a share"):
        PathNoise(2.0)
    wide = ReverseChain(chain.prior, chain.whole.grid, (5000,))
    with pytest.raises(KakusanError, match="of at most 4096 numbers"):
        rehearse(wide)
