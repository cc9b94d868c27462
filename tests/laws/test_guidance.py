"""Guidance: exact where it says so, measured where not; particles that are exact for the chain."""

import math

import pytest
import torch

from kakusan import (
    EDM,
    VP,
    Ancestral,
    Cosine,
    ExactMixture,
    Fresh,
    KakusanError,
    NotElliptic,
    angle_grid,
    generate,
    reverse,
    solve,
)
from kakusan.core.types import as_time
from kakusan.inference.guidance.classifier import Classifier
from kakusan.inference.guidance.common import Guided, Prior, conjugate_gradients, projected
from kakusan.inference.guidance.dps import DPS
from kakusan.inference.guidance.moments import MomentMatching
from kakusan.inference.guidance.pigdm import PiGDM
from kakusan.inference.guidance.twisted import Twisted, systematic
from kakusan.processes.linear import velocity_of
from kakusan.processes.observations import Coordinates, Event, Label, Measured
from kakusan.solvers.gaussian import AncestralSteps

F64 = torch.float64
PROCESSES = [VP(), Cosine(), EDM()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def posterior(mixture, H, std, y):
    """The mixture of x_0 given y = H x_0 + std eps, in closed form."""
    C = mixture.vectors @ torch.diag_embed(mixture.values) @ mixture.vectors.mT
    S = H @ C @ H.mT + std**2 * torch.eye(len(H), dtype=F64)
    away = (y - mixture.means @ H.mT).unsqueeze(-1)
    gain = C @ H.mT @ torch.linalg.inv(S)
    log_w = -0.5 * (away.mT @ torch.linalg.solve(S, away)).flatten() - 0.5 * torch.logdet(S)
    weights = (mixture.weights.log() + log_w).softmax(0)
    means = mixture.means + (gain @ away).squeeze(-1)
    return ExactMixture(mixture.process, weights, means, C - gain @ H @ C)


def gaussian(process, d=3, isotropic=None):
    A = draws(d, d, seed=1)
    C = A @ A.mT / 2 + 0.1 * torch.eye(d, dtype=F64)
    if isotropic:
        C = isotropic**2 * torch.eye(d, dtype=F64)
    return ExactMixture(process, torch.ones(1), draws(1, d, seed=2), C[None])


def three(process):
    """A mixture whose parts a measurement of x1 + x2 tells apart badly."""
    weights, means = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[2.0, 1], [-2, 0], [0, -2]])
    wide = torch.tensor([[0.2, 0.1], [0.1, 0.15]])
    C = torch.stack([0.1 * torch.eye(2), wide, 0.05 * torch.eye(2)])
    return ExactMixture(process, weights, means, C)


def spread(mixture):
    """The rms standard deviation of a number of the data."""
    x = mixture.sample(20_000, torch.Generator().manual_seed(9))
    return x.var(0).mean().sqrt().item()


# --- the ancestral chain


@each_process
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_ancestral_steps_are_those_of_ancestral(process, noise):
    score, x = three(process), draws(50, 2)
    grid = angle_grid(process, process.span[1], 0.0, 12)
    path = solve(reverse(process, score, noise), x, grid, Ancestral(), Fresh(1), keep=True)
    steps = AncestralSteps(process, score, grid, noise)
    dw = path.dw if path.dw is not None else torch.zeros(len(steps), *x.shape, dtype=F64)
    for k in range(len(steps)):
        made = steps.after(path.x[k], k, dw[k])
        assert torch.allclose(made, path.x[k + 1], rtol=1e-12, atol=1e-12), k
        v = score.velocity(path.x[k], grid[k])
        assert torch.equal(steps.turned(path.x[k], v, k), steps.mean(path.x[k], k))
    with pytest.raises(NotElliptic):  # the last step goes to the data: no noise, and no inverse
        steps.operator(x, len(steps) - 1).tsolve(x)


def test_ancestral_steps_refuse_grids_that_rise():
    with pytest.raises(KakusanError, match="from noise to data"):
        AncestralSteps(VP(), three(VP()), torch.tensor([0.1, 1.0]))


# --- guidance as a field, against the exact score given y


@each_process
@pytest.mark.parametrize(
    ("guidance", "isotropic"),
    [(PiGDM(), 0.7), (MomentMatching(2), 0.7), (MomentMatching(2), None)],
    ids=["pigdm", "moments-round", "moments-any"],
)
@pytest.mark.parametrize("std", [0.3, 0.0])
def test_exact_for_gaussian_data(process, guidance, isotropic, std):
    """Score and velocity are those of the posterior, at all times, to rounding."""
    prior = Prior(process, gaussian(process, isotropic=isotropic), 0.7)
    H, y = draws(2, 3, seed=3), draws(1, 2, seed=4)
    truth = posterior(prior.score, H, std, y)
    guided = Guided(prior, guidance, Measured(H, std), y)
    near = 1e-9 if std else 1e-3  # the floor in the place of no noise
    for phi in (0.1, 0.7, 1.4):
        t = process.time_of_angle(as_time(phi))
        x = process.noised(draws(20, 3), draws(20, 3, seed=5), t)
        for got, wanted in (
            (guided(x, t), truth(x, t)), (guided.velocity(x, t), truth.velocity(x, t))
        ):  # fmt: skip
            assert (got - wanted).norm() < near * wanted.norm(), (guidance, phi)
    one = torch.full((20,), t.item(), dtype=F64)  # a time a state
    assert torch.allclose(guided.velocity(x, one), guided.velocity(x, t), rtol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_samples_of_gaussian_data_have_the_posterior_moments(noise):
    process, n = VP(), 4000
    prior = Prior(process, gaussian(process), 0.7)
    H, y = draws(2, 3, seed=3), draws(1, 2, seed=4)
    truth = posterior(prior.score, H, 0.3, y)
    guided = Guided(prior, MomentMatching(2), Measured(H, 0.3), y)
    x = generate(process, guided, draws(n, 3, seed=6), 200 if noise else 50, noise, Fresh(7))
    C = (truth.vectors @ torch.diag_embed(truth.values) @ truth.vectors.mT)[0]
    std = C.diagonal().sqrt()
    assert ((x.mean(0) - truth.means[0]).abs() < 5 * std / n**0.5).all()
    # 4 standard errors of a covariance, and 1% for the length of the steps
    error = 4 * ((C**2 + std[:, None] ** 2 * std**2) / n).sqrt() + 0.01 * std[:, None] * std
    assert ((x.T.cov() - C).abs() < error).all(), (x.T.cov(), C)


def test_moments_come_closest_on_a_mixture():
    """The relative error of u over x_t given y; exact is 0, no guidance 1.

    Measured: 0.20 for MomentMatching, 0.66 for PiGDM, 0.71 and 2.4 for DPS of strength 0.3 and 1.
    """
    process = VP()
    prior = Prior(process, three(process), spread(three(process)))
    H, y = torch.tensor([[1.0, 1.0]], dtype=F64), torch.tensor([[-1.5]], dtype=F64)
    truth, errors = posterior(prior.score, H, 0.5, y), {}
    for guidance in (MomentMatching(1), PiGDM(), DPS(0.3), DPS(1.0)):
        guided, away, size = Guided(prior, guidance, Measured(H, 0.5), y), 0.0, 0.0
        for phi in torch.linspace(0.1, 1.5, 15):
            t = process.time_of_angle(phi)
            x = process.noised(truth.sample(500), draws(500, 2, seed=8), t)
            wanted = truth.velocity(x, t) - prior.score.velocity(x, t)
            away += (guided.velocity(x, t) - truth.velocity(x, t)).square().sum().item()
            size += wanted.square().sum().item()
        errors[repr(guidance)] = (away / size) ** 0.5
    moments, *others = errors.values()
    assert moments < 0.25 and moments < 0.4 * min(others), errors


@each_process
def test_velocity_and_score_of_guidance_agree(process):
    prior = Prior(process, three(process), 1.5)
    see = Coordinates([1], std=0.2)
    for guidance in (DPS(0.7), PiGDM(), MomentMatching(1)):
        guided = Guided(prior, guidance, see, torch.tensor([[0.4]]))
        x, t = draws(9, 2), process.time_of_angle(as_time(0.8))
        plain = velocity_of(process, lambda x, t: guided(x, t))  # noqa: B023
        assert torch.allclose(guided.velocity(x, t), plain(x, t), rtol=1e-9), guidance


def test_dps_and_classifier_are_slopes_through_the_denoiser():
    """Against central differences of what they go downhill in."""
    process = VP()
    score, t = three(process), as_time(0.4)
    alpha, sigma = process.alpha(t), process.sigma(t)
    H, y = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[0.3]], dtype=F64)

    def missed(x):
        return ((score.denoised(x, t) @ H.mT - y) ** 2).sum(1)

    def log_p(x0):
        return (3 * x0[:, 0]).sigmoid().log() - x0[:, 1] ** 2

    x, prior = draws(7, 2), Prior(process, score)
    rms = missed(x).sqrt().unsqueeze(1)
    pull = -2.0 * alpha / (sigma * torch.hypot(alpha, sigma)) * slope_of(missed, x) / rms
    assert torch.allclose(Guided(prior, DPS(2.0), Measured(H), y).tilt(x, t), pull, rtol=1e-6)
    led = Guided(prior, Classifier(log_p, 0.5), Event(lambda x: x[:, 0] > 0), torch.ones(1, 1))
    wanted = 0.5 * slope_of(lambda x: log_p(score.denoised(x, t)), x)
    assert torch.allclose(led.tilt(x, t), wanted, rtol=1e-6)


def slope_of(f, x, h=1e-5):
    steps = h * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.stack([(f(x + e) - f(x - e)) / (2 * h) for e in steps], 1)


def test_faint_states_are_damped():
    """U is halved in size where alpha / r is `faint`, and untouched near the data."""
    process = Cosine()
    bold, shy = (Prior(process, three(process), 1.5, faint) for faint in (0.0, 0.05))
    x = draws(5, 2)
    for cos, factor in ((0.05, 0.5), (0.9, 0.9**2 / (0.9**2 + 0.05**2))):
        t = process.time_of_angle(torch.tensor(math.acos(cos), dtype=F64))
        u, v = (Guided(p, PiGDM(), Coordinates([0]), torch.ones(1, 1)).tilt(x, t)
                for p in (bold, shy))  # fmt: skip
        assert torch.allclose(v, factor * u, rtol=1e-9), cos


def test_what_cannot_be_guided_is_refused():
    prior = Prior(VP(), three(VP()))
    right = Event(lambda x: x[:, 0] > 0)
    for guidance in (DPS(), PiGDM(), MomentMatching()):
        with pytest.raises(KakusanError, match="needs a linear measurement"):
            Guided(prior, guidance, right, torch.ones(1, 1))
    hard = Label(lambda x: (x[:, 0] > 0).long(), 2)
    with pytest.raises(KakusanError, match="has no slope"):
        Guided(prior, Classifier(), hard, torch.ones(1, 1)).tilt(draws(3, 2), as_time(0.5))
    with pytest.raises(KakusanError, match="1 iteration or more, got 0"):
        MomentMatching(0)


# --- linear systems


def test_conjugate_gradients_solve():
    B = draws(6, 6)
    A, b = B @ B.mT + 0.1 * torch.eye(6, dtype=F64), draws(4, 6, seed=1)
    z = conjugate_gradients(lambda z: z @ A, b, 60, 1e-12)
    assert torch.allclose(z, torch.linalg.solve(A, b.mT).mT, rtol=1e-8)
    # a singular system that has solutions: the shortest; a row of zeros: zeros
    P = B[:, :3] @ B[:, :3].mT
    b = draws(4, 6, seed=2) @ P
    b[2] = 0
    z = conjugate_gradients(lambda z: z @ P, b, 60, 1e-12)
    assert torch.allclose(z, b @ torch.linalg.pinv(P, hermitian=True), atol=1e-8)
    # directions in which the map falls are left alone
    D = torch.tensor([2.0, -1.0], dtype=F64)
    z = conjugate_gradients(lambda z: z * D, torch.eye(2, dtype=F64), 9)
    assert torch.equal(z, torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=F64))


def test_projection_meets_a_measurement_by_the_smallest_change():
    x, H = draws(5, 6), draws(2, 6, seed=1)
    y = draws(5, 2, seed=2)
    found = projected(Measured(H), y, x)
    wanted = x + (y - x @ H.mT) @ torch.linalg.pinv(H).mT
    assert torch.allclose(found, wanted, atol=1e-8)
    # pixels come out to the last bit, in single precision too, and the others stay
    x, mask = (1e3 * draws(5, 2, 3)).float(), draws(2, 3, seed=3) > 0
    seen = Coordinates(mask)
    y = draws(5, int(mask.sum()), seed=4).float()
    found = projected(seen, y, x)
    assert torch.equal(seen.forward(found), y)
    assert torch.equal(found[:, ~mask], x[:, ~mask])


# --- particles


STEPS, PARTICLES, RUNS = 16, 128, 40


def chain(score, n, seed=0, steps=STEPS):
    """States that the ancestral chain draws when it is left alone."""
    grid = angle_grid(score.process, score.process.span[1], 0.0, steps, rho=1.5)
    chain, x = AncestralSteps(score.process, score, grid), draws(n, 2, seed=seed)
    source = Fresh(seed + 1)
    for k in range(len(chain)):
        x = chain.after(x, k, source.normal(k, (n, 2), x, chain.h(k) ** 0.5))
    return x


LEFT = Event(lambda x: (x[:, 0] < -2.2) | (x[:, 1] > 1.3))
SUM = Measured(torch.tensor([[1.0, 1.0]], dtype=F64), 0.1)
CASES = {
    "weights-alone": (Twisted(None, PARTICLES), SUM, 2.2),
    "led-by-pigdm": (Twisted(PiGDM(), PARTICLES), SUM, 2.2),
    "led-badly": (Twisted(DPS(0.2), PARTICLES), SUM, 2.2),
    "event": (Twisted(None, PARTICLES), LEFT, 1.0),
    "hard-label": (Twisted(None, PARTICLES, 4),
                   Label(lambda x: (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), 3), 2.0),
    "soft-label": (Twisted(Classifier(), PARTICLES),
                   Label(lambda x: torch.stack([x[:, 0], x[:, 1], -x[:, 1]], 1), 3), 2.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """The chain's own draws: what all particles must come to."""
    return chain(three(VP()), 50_000)


@pytest.mark.parametrize("case", CASES)
def test_particles_are_exact_for_the_chain(case, alone):
    """Evidence and moments of few particles, over many runs, are those of the weighted chain.

    The evidence and the sum of weighted functions are unbiased for any number of particles.
    """
    how, see, value = CASES[case]
    score, y = three(VP()), torch.tensor([[value]], dtype=F64)
    grid = angle_grid(VP(), 1.0, 0.0, STEPS, rho=1.5)

    def seen_in(x):  # which of the mixture's parts, and where
        part = torch.nn.functional.one_hot(torch.cdist(x, score.means).argmin(1), 3)
        return torch.cat([torch.ones(len(x), 1), part, x], 1).to(F64)

    likely = see.log_likelihood(y.expand(len(alone), 1), alone).exp().unsqueeze(1)
    exact = likely * seen_in(alone)
    sums = []
    for seed in range(RUNS):
        start = draws(PARTICLES, 2, seed=100 + seed)
        found = how.run(Prior(VP(), score, 1.5), see, y, start, grid, seed=seed, batch=PARTICLES)
        assert found.ess.min() >= 1 and len(found.ess) == STEPS + 1
        weights = (found.log_weights + found.log_evidence).exp().unsqueeze(1)
        sums.append((weights * seen_in(found.x)).sum(0))
    sums = torch.stack(sums)
    error = (sums.var(0) / RUNS + exact.var(0) / len(exact)).sqrt()
    away = (sums.mean(0) - exact.mean(0)).abs()
    assert (away < 4.5 * error + 1e-12).all(), (case, away / error)
    # and the twist is worth it: not so noisy that everything agrees
    assert error[0] < 0.1 * exact.mean(0)[0], case


def test_class_weights_of_a_mixture_are_those_of_the_posterior():
    """With short steps the chain is the process: particles against the closed form."""
    score, y, P = three(VP()), torch.tensor([[-1.5]], dtype=F64), 4000
    truth = posterior(score, SUM.H, SUM.std, y)
    grid = angle_grid(VP(), 1.0, 0.0, 200, rho=1.5)
    x1 = draws(P, 2, seed=5)
    found = Twisted(PiGDM()).run(Prior(VP(), score, 1.5), SUM, y, x1, grid, seed=3, batch=P)
    x = found.draw(P)
    share = torch.bincount(torch.cdist(x, score.means).argmin(1), minlength=3) / P
    # particles that were drawn anew count less: measured over runs, about a tenth of them
    error = 4 * (truth.weights * (1 - truth.weights) / (P / 10)).sqrt() + 0.01
    assert ((share - truth.weights).abs() < error).all(), (share, truth.weights)


def test_an_event_against_rejection_from_the_exact_law():
    score, P = three(VP()), 4000
    exact = score.sample(400_000, torch.Generator().manual_seed(0))
    kept = exact[LEFT.holds(exact)]
    grid = angle_grid(VP(), 1.0, 0.0, 200, rho=1.5)
    found = Twisted().run(Prior(VP(), score, 1.5), LEFT, torch.ones(1, 1), draws(P, 2, seed=5),
                          grid, seed=3, batch=P)  # fmt: skip
    x = found.draw(P)
    assert LEFT.holds(x).all()
    assert abs(math.exp(found.log_evidence) * len(exact) / len(kept) - 1) < 0.15
    assert ((x.mean(0) - kept.mean(0)).abs() < 4 * kept.std(0) / (P / 10) ** 0.5).all()


def test_a_measurement_without_noise_is_met():
    process, P = VP(), 500
    prior = Prior(process, gaussian(process, isotropic=0.9), 0.9)
    H, y = draws(1, 3, seed=3), draws(1, 1, seed=4)
    truth, moments = posterior(prior.score, H, 0.0, y), []
    grid = angle_grid(process, 1.0, 0.0, 60, rho=1.5)
    for seed in range(12):
        start = draws(P, 3, seed=5 + seed)
        found = Twisted(PiGDM()).run(prior, Measured(H), y, start, grid, seed=seed, batch=P)
        left = prior.look(start, grid[-2]).variance.sqrt()
        x = found.draw(P)
        # what the last step still removes
        assert (x @ H.mT - y).square().mean().sqrt() < 2 * left
        x = projected(Measured(H), y, x)
        assert (x @ H.mT - y).abs().max() < 1e-9
        moments.append(torch.cat([x.mean(0), (x - truth.means).square().sum(1).mean()[None]]))
    moments, wanted = torch.stack(moments), torch.cat([truth.means[0], truth.values.sum()[None]])
    error = 4.5 * moments.std(0) / len(moments) ** 0.5
    # steps have a length: 2% of a standard deviation, 4% of a variance
    error += torch.tensor([0.02, 0.02, 0.02, 0.04 * truth.values.sum()])
    assert ((moments.mean(0) - wanted).abs() < error).all(), (moments.mean(0), wanted, error)


def test_systematic_draws_are_each_as_often_as_they_should_be():
    log_w = draws(50).double()
    expected = 1000 * log_w.softmax(0)
    counts = torch.stack(
        [torch.bincount(systematic(log_w, 1000, u), minlength=50) for u in (0.0, 0.37, 0.99)]
    )
    assert ((counts - expected).abs() <= 1).all()


def test_particles_that_cannot_be_led_are_refused():
    score, grid = three(VP()), angle_grid(VP(), 1.0, 0.0, 5)
    nowhere = Event(lambda x: x[:, 0] > 100)
    with pytest.raises(KakusanError, match="none of 8 particles came to agree with Event"):
        Twisted().run(Prior(VP(), score), nowhere, torch.ones(1, 1), draws(8, 2), grid)
    with pytest.raises(KakusanError, match="needs a linear measurement"):
        Twisted(PiGDM()).run(Prior(VP(), score), nowhere, torch.ones(1, 1), draws(8, 2), grid)
    with pytest.raises(KakusanError, match="spread by noise"):
        Twisted().run(Prior(VP(), score), SUM, torch.ones(1, 1), draws(8, 2), grid, noise=0.0)
    with pytest.raises(KakusanError, match="2 particles and 1 draw or more, got 1"):
        Twisted(particles=1)
