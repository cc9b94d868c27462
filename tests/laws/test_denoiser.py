"""One network, many views: exact oracles under every process and every kind of prediction."""

import pytest
import torch

from kakusan import (
    SNR,
    Denoiser,
    Denoising,
    Importance,
    Karras,
    Likelihood,
    LogNormal,
    Stratified,
    Uniform,
    UniformTimes,
    UsageError,
)
from kakusan.inference.levels import loss_by_level
from kakusan.models.denoiser import ROWS
from problems import F64, NAMES, PROCESSES, gaussian, mixture, time, times

each = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
every_row = pytest.mark.parametrize("predict", ROWS)


def _oracle(process, predict, data_std=0.8):
    """A denoiser whose network answers exactly, for mixture data, in the units of its row."""
    truth = mixture(process)
    model = Denoiser(None, process, predict, data_std)
    now = {}

    def net(x_in, level, label):
        x, t = now["x"], now["t"]
        alpha, sigma = process.alpha(t), process.sigma(t)
        a, b = model.row(alpha, sigma)
        shape = (-1, 1) if t.ndim else ()
        a, b = (torch.as_tensor(c, dtype=F64).expand(t.shape).reshape(shape) for c in (a, b))
        eps = -sigma.reshape(shape) * truth(x, t)
        return a * truth.denoised(x, t) + b * eps

    model.net = net

    def ask(view, x, t):
        now.update(x=x, t=t)
        return view(x, t)

    return model, truth, ask


@every_row
@each
def test_every_view_of_every_row_is_exact(process, predict):
    model, truth, ask = _oracle(process, predict)
    mid = times(process, 9)[1:-1]
    x = process.noised(torch.randn(7, 2, dtype=F64), torch.randn(7, 2, dtype=F64), mid)
    for t in (mid, mid[3]):
        sigma = process.sigma(t)[:, None] if t.ndim else process.sigma(t)
        # small sigma or alpha amplify rounding in the rows that divide by them
        near = {"rtol": 1e-6, "atol": 1e-6}
        assert torch.allclose(ask(model, x, t), truth.denoised(x, t), **near), (process, predict)
        assert torch.allclose(ask(model.noise, x, t), -sigma * truth(x, t), **near)
        assert torch.allclose(ask(model.velocity, x, t), truth.velocity(x, t), **near)
        assert torch.allclose(ask(model.score, x, t), truth(x, t), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("predict", ["v", "edm"])
@each
def test_regular_rows_are_finite_at_both_ends(process, predict):
    model = Denoiser(lambda x, t, label: torch.ones_like(x), process, predict, 0.5)
    x = torch.randn(3, 2, dtype=F64)
    for t in (time(0.0), time(process.span[0]), time(process.span[1])):
        for view in (model, model.noise, model.velocity):
            assert view(x, t).isfinite().all(), (process, predict, t)


def test_the_network_sees_unit_variance_and_a_level_between_0_and_1():
    seen = {}

    def net(x, level, label):
        seen.update(x=x, level=level)
        return x

    for process in PROCESSES:
        model = Denoiser(net, process, "v", data_std=0.5)
        t = times(process)
        x0 = 0.5 * torch.randn(7, 4000, dtype=F64)
        model.raw(process.noised(x0, torch.randn(7, 4000, dtype=F64), t), t)
        # the variance of 4000 numbers, within four standard errors
        assert (seen["x"].var(1) - 1).abs().max() < 4 * (2 / 4000) ** 0.5, process
        assert (seen["level"].diff() > 0).all() and seen["level"].dtype == F64
        assert seen["level"].min() >= 0 and seen["level"].max() <= 1


def test_guidance_mixes_with_and_without_label():
    def net(x, level, label):
        return label.to(x.dtype)[:, None].expand_as(x)

    model = Denoiser(net, PROCESSES[0])
    x, label, t = torch.zeros(3, 2), torch.tensor([0, 1, 2]), time(0.5)
    given = model.given(label, guidance=3.0).velocity(x, t)
    assert torch.allclose(given[:, 0], -1 + 3.0 * (label.float() + 1))
    assert torch.allclose(model.given(label).velocity(x, t)[:, 0], label.float())


def test_an_unknown_kind_of_prediction_is_refused():
    with pytest.raises(UsageError, match="x0, epsilon, v"):
        Denoiser(None, PROCESSES[0], "velocity")


# --- the objective


@every_row
@each
def test_loss_is_the_weighted_error_of_the_score(process, predict):
    """lambda(t) |s - ∇log p(x_t|x_0)|² / d, computed from the definition, for each weight."""
    model = Denoiser(lambda x, level, label: 0.3 * x, process, predict, 0.7)
    t = times(process, 7)[1:-1]
    x0, eps = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    alpha, sigma, g2 = process.alpha(t), process.sigma(t), process.rates(t)[1]
    target = -eps / sigma[:, None]
    error = (model.score(process.noised(x0, eps, t), t) - target).square().mean(1)
    s2 = model.data_std**2
    lambdas = {
        SNR(): sigma**2,
        Likelihood(): g2,
        # on x_0 it is (s² + u²) / (s u)² with u = sigma/alpha, and x_0 is sigma²/alpha scores
        Karras(): (s2 + (sigma / alpha) ** 2) / (s2 * (sigma / alpha) ** 2) * sigma**4 / alpha**2,
    }
    for weight, value in lambdas.items():
        loss = Denoising(weight).at(model, x0, eps, t)
        assert torch.allclose(loss, value * error, rtol=1e-6), (process, predict, weight)


@each
def test_the_posterior_mean_is_where_the_loss_is_least(process):
    """E loss(oracle) < E loss(oracle + delta), by |delta|² exactly, on the same draws."""
    truth, n = mixture(process), 40_000
    x0 = truth.sample(n, torch.Generator().manual_seed(0))
    eps, t = torch.randn(n, 2, dtype=F64), time(sum(process.span) / 2)
    x = process.noised(x0, eps, t)
    best = (truth.denoised(x, t) - x0).square().mean(1)
    moved = (truth.denoised(x, t) + 0.1 - x0).square().mean(1)
    gap = moved - best
    assert abs(gap.mean() - 0.01) < 4 * gap.std() / n**0.5, process


@pytest.mark.parametrize("times_", [UniformTimes(), Stratified(), Importance(Likelihood())])
def test_every_distribution_of_times_gives_the_same_mean(times_):
    """E[weight f(t)] is the mean of f over the span, whatever the density."""
    model, n = Denoiser(None, PROCESSES[0]), 100_000
    lo, hi = model.process.span
    u = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(0))
    t, weight = times_.draw(model, u)
    assert t.min() >= lo and t.max() <= hi
    for f, mean in (
        (lambda t: t, (lo + hi) / 2),
        (lambda t: t**2, (hi**3 - lo**3) / (hi - lo) / 3),
    ):
        values = weight * f(t)
        assert abs(values.mean() - mean) < 4 * values.std() / n**0.5 + 1e-6, times_


def test_stratified_times_visit_every_stratum():
    model, n = Denoiser(None, PROCESSES[0]), 64
    lo, hi = model.process.span
    t = Stratified().draw(model, torch.rand(n, dtype=F64)).t
    assert torch.equal(((t - lo) / (hi - lo) * n).floor(), torch.arange(n, dtype=F64))


def test_importance_times_make_the_weighted_loss_flat():
    model, weight = Denoiser(None, PROCESSES[0]), Likelihood()
    u = torch.rand(5000, dtype=F64)
    t, importance = Importance(weight).draw(model, u)
    flat = importance * weight.factor(model, t)
    assert flat.std() / flat.mean() < 0.01
    plain = weight.factor(model, UniformTimes().draw(model, u).t)
    assert plain.std() / plain.mean() > 1


def test_lognormal_levels():
    for process in PROCESSES:
        model = Denoiser(None, process)
        u = torch.linspace(0.02, 0.98, 401, dtype=F64)
        t = LogNormal(-0.5, 0.7).draw(model, u).t
        level = process.angle(t).tan().log()
        assert abs(level.median() + 0.5) < 1e-6, process
        assert abs(level[(u - 0.8413447).abs().argmin()] - 0.2) < 0.02, process


def test_uniform_weight_is_plain_error():
    model = Denoiser(lambda x, level, label: 0 * x, PROCESSES[0], "epsilon")
    eps = torch.randn(4, 6)
    loss = Denoising(Uniform()).at(model, torch.zeros(4, 6), eps, torch.full((4,), 0.5, dtype=F64))
    assert torch.allclose(loss, eps.square().mean(1))


@each
def test_log_density_and_score_of_the_mixture_belong_together(process):
    """The oracle itself: its score is the gradient of a log-density that integrates to 1."""
    m = mixture(process)
    for t in times(process, 4):
        x = (m.sample(20, torch.Generator().manual_seed(1)) * process.alpha(t)).requires_grad_()
        (gradient,) = torch.autograd.grad(m.log_prob(x, t).sum(), x)
        assert torch.allclose(gradient, m(x.detach(), t), rtol=1e-8, atol=1e-10), (process, t)
    t = time(process.span[1] * 0.02)
    wide = 9 * torch.hypot(process.alpha(t), process.sigma(t)).item()
    axis = torch.linspace(-wide, wide, 401, dtype=F64)
    cell = (axis[1] - axis[0]) ** 2
    mass = m.log_prob(torch.cartesian_prod(axis, axis), t).exp().sum() * cell
    assert abs(mass - 1) < 1e-3, (process, mass)


def test_loss_by_level_of_the_oracle_is_the_posterior_spread():
    """For N(mu, s²) data E|v - v_hat|² is Var(x_0 | x_t) / sin² of the angle, at every level."""
    process, s2, n = PROCESSES[3], 0.36, 20_000
    truth = gaussian(process, variance=s2)

    class Oracle(Denoiser):
        def velocity(self, x, t, label=None):
            return truth.velocity(x, t)

    x0 = truth.sample(n, torch.Generator().manual_seed(0))
    found = loss_by_level(Oracle(None, process), x0, levels=6, batch=5000)
    alpha2, sigma2 = process.alpha(found.t) ** 2, process.variance(found.t)
    spread = s2 * sigma2 / (alpha2 * s2 + sigma2)  # Var(x_0 | x_t)
    # v = (alpha eps - sigma x_0) / r and eps = (x_t - alpha x_0) / sigma: v moves by -r/sigma dx_0
    exact = spread * (alpha2 + sigma2) / sigma2
    assert ((found.loss - exact).abs() < 4 * found.std_error).all(), (found.loss, exact)
    assert found.n == n
