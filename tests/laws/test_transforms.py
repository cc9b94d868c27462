"""Reversal, probability flow and tilt: identities, and simulations against known laws."""

import pytest
import torch

from kakusan import (
    KakusanError,
    Recorded,
    Stratonovich,
    gram_divergence,
    ito,
    probability_flow,
    probed_gram_divergence,
    reverse,
    solve,
    stratonovich,
    tilt,
)
from kakusan.core import grids
from problems import F64, NAMES, PROCESSES, Geometric, Reversible, gaussian, mixture, time

each = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)


def _full_divergence(sde, x, t):
    """Σ_j ∂_j D_ij from the whole Jacobian of the whole matrix."""
    d = x.shape[1]

    def D(row):
        eye = torch.eye(d, dtype=x.dtype)
        return torch.stack([sde.diffusion(row[None], t).gram(e[None])[0] for e in eye], 1)

    jacobians = torch.stack([torch.func.jacrev(D)(row) for row in x])  # (B, i, j, k)
    return torch.einsum("bijj->bi", jacobians)


@pytest.mark.parametrize("sde", [Geometric(), Reversible(), Reversible(1, d=3)])
def test_divergence_equals_the_full_jacobian(sde):
    x = torch.rand(6, 1 if isinstance(sde, Geometric) else sde.d, dtype=F64) + 0.5
    exact = sde.gram_divergence(x, time(0.3))
    assert torch.allclose(exact, _full_divergence(sde, x, time(0.3)), atol=1e-13), sde


def test_divergence_by_hand_and_by_probes():
    x = torch.tensor([[0.5, -1.0]], dtype=F64)
    sde = Reversible()
    exact = gram_divergence(sde.diffusion, x, time(0.0))
    g = torch.Generator().manual_seed(1)
    probed = probed_gram_divergence(sde.diffusion, x, time(0.0), 20_000, g)
    assert ((probed.value - exact).abs() < 4 * probed.std_error).all()


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_reverse_twice_is_the_identity(noise):
    """With noise 1 it is the SDE itself; else the process of that noise with the same law."""
    sde, x, t = Reversible(), torch.randn(8, 2, dtype=F64), time(0.4)
    once = reverse(sde, sde.score, noise)
    twice = reverse(reverse(once, sde.score), sde.score)
    assert once.span == (1.0, 0.0) and twice.span == once.span
    assert torch.allclose(twice.drift(x, t), once.drift(x, t), atol=1e-13)
    back = reverse(once, sde.score)
    z = torch.randn(8, 2, dtype=F64)
    if noise == 1:
        assert torch.allclose(back.drift(x, t), sde.drift(x, t), atol=1e-13)
    assert torch.allclose(back.diffusion(x, t).mv(z), noise * sde.diffusion(x, t).mv(z))


def test_reversible_diffusions_run_backwards_as_they_run_forwards():
    """f = (∇·D + D∇log pi)/2 gives a reverse drift equal to minus f along its own time."""
    sde, x, t = Reversible(), torch.randn(50, 2, dtype=F64), time(0.4)
    forward, backward = sde.drift(x, t), reverse(sde, sde.score).drift(x, t)
    assert torch.allclose(backward, -forward, atol=1e-13)
    without = sde.drift(x, t) - sde.diffusion(x, t).gram(sde.score(x, t))
    assert (without + forward).abs().max() > 0.05  # the divergence is what makes it so


@each
def test_reverse_of_a_linear_sde_in_closed_form(process):
    x, t = torch.randn(5, 2, dtype=F64), time(sum(process.span) / 2)
    score = mixture(process)
    a, g2 = process.rates(t)
    assert torch.allclose(reverse(process, score).drift(x, t), a * x - g2 * score(x, t))
    flow = probability_flow(process, score)
    assert torch.allclose(flow.drift(x, t), a * x - g2 / 2 * score(x, t))
    assert flow.diffusion(x, t).deterministic


@each
def test_tilting_the_reverse_is_adding_to_the_score(process):
    x, t = torch.randn(5, 2, dtype=F64), time(sum(process.span) / 2)
    score, u = mixture(process), lambda x, t: torch.sin(x)
    tilted = tilt(reverse(process, score), u)
    summed = reverse(process, lambda x, t: score(x, t) + u(x, t))
    assert torch.allclose(tilted.drift(x, t), summed.drift(x, t), atol=1e-11), process


def test_a_tilt_of_an_ode_is_refused():
    process = PROCESSES[0]
    with pytest.raises(TypeError, match="add the tilt to its score"):
        tilt(probability_flow(process, gaussian(process)), lambda x, t: x)


def test_a_negative_noise_scale_is_refused():
    with pytest.raises(KakusanError, match="must be >= 0, got -1"):
        reverse(PROCESSES[0], lambda x, t: x, noise=-1)


def _reversed_log_moments(sde, n=40_000, steps=400):
    """Geometric Brownian motion, run back from exact samples of X_1; moments of log X_0."""
    g = torch.Generator().manual_seed(5)
    grid = grids.uniform(1.0, 0.0, steps)
    dw = torch.randn(steps, n, 1, generator=g, dtype=F64) / steps**0.5
    x0 = solve(reverse(sde, sde.score), sde.start(n, 1.0, seed=4), grid, noise=Recorded(dw)).end
    y = x0.clamp(min=1e-6).log()
    return y.mean().item(), y.var().item(), n


def test_geometric_brownian_motion_reverses_to_its_start():
    sde = Geometric()
    mean, variance, n = _reversed_log_moments(sde)
    # four standard errors, and the O(h) bias of 400 Euler steps, about g² h / 2 = 5e-4 each way
    assert abs(mean) < 4 * (sde.v0 / n) ** 0.5 + 2e-3
    assert abs(variance - sde.v0) < 4 * sde.v0 * (2 / n) ** 0.5 + 4e-3


def test_without_the_divergence_it_does_not():
    class Forgetful(Geometric):
        def gram_divergence(self, x, t):
            return torch.zeros_like(x)

    mean, _, _ = _reversed_log_moments(Forgetful(), n=4000, steps=100)
    assert abs(mean) > 0.2


def test_dense_noise_reverses_to_its_start():
    """N(0, I) is stationary under `Reversible`, so its reverse must keep it as well."""
    sde, n, steps = Reversible(), 20_000, 60
    g = torch.Generator().manual_seed(2)
    x1 = torch.randn(n, 2, generator=g, dtype=F64)
    dw = torch.randn(steps, n, 2, generator=g, dtype=F64) / steps**0.5
    x0 = solve(reverse(sde, sde.score), x1, grids.uniform(1, 0, steps), noise=Recorded(dw)).end
    # standard errors of mean and variance, and an O(h) bias with h = 1/60
    assert x0.mean(0).abs().max() < 4 / n**0.5 + 0.005
    assert (x0.T.cov() - torch.eye(2)).abs().max() < 4 * (2 / n) ** 0.5 + 0.01


def test_the_two_senses_of_an_equation():
    """Ito's drift is Stratonovich's plus half of the sum of (dG_j) G_j, column by column."""
    sde = Reversible(seed=4)
    x, t = torch.randn(5, 2, dtype=F64), time(0.3)

    def columns(y):
        return sde.diffusion(y[None], t).G[0]

    by_hand = torch.stack([
        torch.einsum("ijk,kj->i", torch.func.jacfwd(columns)(y), columns(y)) for y in x
    ])  # fmt: skip
    shift = stratonovich(sde).drift(x, t) - sde.drift(x, t)
    assert torch.allclose(shift, -by_hand / 2, atol=1e-12)
    read = ito(Stratonovich(sde))
    assert torch.allclose(read.drift(x, t) - sde.drift(x, t), by_hand / 2, atol=1e-12)


def test_round_trips_between_the_senses_change_nothing():
    sde, x, t = Reversible(seed=5), torch.randn(5, 2, dtype=F64), time(0.3)
    assert ito(sde) is sde and ito(stratonovich(sde)) is sde
    held = Stratonovich(sde)
    assert stratonovich(held) is held
    again = stratonovich(ito(held))
    assert torch.allclose(again.drift(x, t), held.drift(x, t), atol=1e-14)
    with pytest.raises(KakusanError, match="Stratonovich already"):
        Stratonovich(held)


def test_the_senses_of_a_reversed_process_follow_its_clock():
    """A reversed process runs against the clock, which turns the correction around."""
    back = reverse(Geometric(), Geometric().score)
    x, t = torch.rand(5, 1, dtype=F64) + 0.5, time(0.3)
    shift = stratonovich(back).drift(x, t) - back.drift(x, t)
    assert torch.allclose(shift, 0.36 * x / 2, atol=1e-14)


def test_reversing_reads_either_sense():
    sde, x, t = Reversible(seed=6), torch.randn(5, 2, dtype=F64), time(0.3)
    one = reverse(stratonovich(sde), sde.score).drift(x, t)
    assert torch.allclose(one, reverse(sde, sde.score).drift(x, t), atol=1e-12)
    u = tilt(stratonovich(sde), lambda x, t: -x).drift(x, t)
    assert torch.allclose(u, tilt(sde, lambda x, t: -x).drift(x, t), atol=1e-12)
