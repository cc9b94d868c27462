"""Log-likelihoods against closed forms, and their error bars against the errors."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from kakusan import EDM, SDE, VP, Cosine, Denoiser, ExactEmpirical, KakusanError, SubVP, Zero
from kakusan.core.bits import bits_per_dim
from kakusan.core.trace import ExactTrace, Hutchinson, HutchPlusPlus, Orthogonal
from kakusan.core.types import as_time, per_sample
from kakusan.inference.likelihood import (
    Gaussian,
    Prior,
    decode,
    encode,
    flow_of,
    interpolate,
    log_prob,
)
from kakusan.processes.flow import Angle, AngularFlow
from kakusan.processes.linear import ScoreField
from kakusan.solvers.adaptive import DormandPrince, Tally
from kakusan.solvers.adjoint import Adjoint
from kakusan.solvers.methods import RK4
from problems import F64, PROCESSES, gaussian, mixture, time

by_name = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def tight(tol=1e-6, **kwargs):
    return DormandPrince(tol, tol, **kwargs)


def sample(model, n=8, seed=1):
    return model.sample(n, torch.Generator().manual_seed(seed))


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def no_grad_log_prob(*args, **kwargs):
    with torch.no_grad():
        return log_prob(*args, **kwargs)


class Noised(Prior):
    """The law of noised data itself, so that no gap is left."""

    def __init__(self, model):
        self.model, self.T = model, time(model.process.span[1])
        self.r = torch.hypot(model.process.alpha(self.T), model.process.sigma(self.T))

    def log_prob(self, x):
        return self.model.log_prob(x * self.r, self.T) + x.shape[1] * self.r.log()

    def slope(self, x):
        return self.r * self.model(x * self.r, self.T)


# --- against closed forms


@by_name
def test_log_prob_is_the_closed_form(process):
    for model in (gaussian(process, d=3), mixture(process)):
        x = sample(model)
        found = no_grad_log_prob(model, x, method=tight(), prior=Noised(model))
        truth = model.log_prob(x, time(0.0))
        assert (found.value - truth).abs().max() < 1e-5, (process, found.value - truth)
        assert found.std_error.abs().max() == 0 and found.prior_gap.isnan().all()


@by_name
def test_with_a_normal_prior_the_gap_at_the_end_is_what_is_left(process):
    model = mixture(process)
    x = sample(model)
    flow, method = flow_of(model), tight(1e-7)
    y = encode(model, x, method) * flow.end_std
    prior = Gaussian(flow.end_std)
    gap = prior.log_prob(y) - Noised(model).log_prob(y)
    found = no_grad_log_prob(model, x, method=method)
    assert (found.value - model.log_prob(x, time(0.0)) - gap).abs().max() < 1e-5, process


def test_errors_follow_the_tolerance_and_are_told():
    model = mixture(VP())
    x = sample(model, 24)
    truth, errors = model.log_prob(x, time(0.0)), []
    for tol in (1e-4, 1e-6, 1e-8):
        found = no_grad_log_prob(model, x, method=tight(tol), prior=Noised(model))
        error = (found.value - truth).abs()
        # an estimate, that of the lower of two orders: of single samples rarely half the error
        assert (found.solver_error > error / 3).all(), found.solver_error / error
        assert found.solver_error.mean() < 1000 * error.mean(), tol
        assert error.max() < 30 * tol, tol
        errors.append(error.mean().item())
    assert errors[0] > 20 * errors[1] > 400 * errors[2], errors


def test_a_given_grid_has_order_four_and_tells_its_error():
    model = mixture(Cosine())
    x, flow = sample(model, 6), flow_of(model)
    truth, errors = model.log_prob(x, time(0.0)), []
    for n in (48, 96):
        grid = torch.linspace(*flow.span, n + 1, dtype=F64)
        found = no_grad_log_prob(model, x, grid=grid, prior=Noised(model))
        errors.append((found.value - truth).abs())
        assert found.evaluations == 4 * n + 4 * n // 2  # the coarse run beside the fine one
        # the difference to twice the step is 15 times the error
        assert (found.solver_error / errors[-1]).median().sub(15).abs() < 5
    assert abs(math.log2(errors[0].mean() / errors[1].mean()) - 4) < 0.3, errors
    one = no_grad_log_prob(model, x, grid=flow_times(flow, 1))
    assert one.solver_error.isnan().all()


def flow_times(flow, n):
    return torch.linspace(*flow.span, n + 1, dtype=F64)


@dataclass(frozen=True)
class Late(SubVP):
    """A process whose scale r at its start is not one."""

    span: tuple = (0.3, 1.0)


@pytest.mark.parametrize("process", [Late(), EDM((1.0, 80.0))], ids=["SubVP", "EDM"])
def test_a_plain_score_starts_where_its_process_does(process):
    """The density there, of the state and not of the state over r."""
    model = mixture(process)
    flow = AngularFlow(process, lambda x, t: model(x, t))
    x = process.noised(sample(model), randn(8, 2), time(process.span[0]))
    found = no_grad_log_prob(flow, x, method=tight(), prior=Noised(model))
    assert abs(flow.start - 1) > 0.1
    assert (found.value - model.log_prob(x, time(process.span[0]))).abs().max() < 1e-5
    told = AngularFlow(process, model, start=process.span[0])
    again = no_grad_log_prob(told, x, method=tight(), prior=Noised(model))
    assert (found.value - again.value).abs().max() < 1e-5


def test_points_have_the_density_of_their_smallest_noise():
    """A finite data set has a density where the span of the process starts."""
    process = replace(VP(), span=(0.05, 1.0))
    points = randn(5, 2)
    model = ExactEmpirical(process, points)
    alpha, sigma = process.alpha(time(0.05)), process.sigma(time(0.05))
    x = alpha * points[[0, 3]] + sigma * randn(2, 2)
    law = Independent(Normal(alpha * points, sigma), 1)
    truth = law.log_prob(x.unsqueeze(1)).logsumexp(1) - math.log(5)
    found = no_grad_log_prob(model, x, method=tight())
    y = encode(model, x, tight(1e-7))
    law = Independent(Normal(process.alpha(time(1.0)) * points, process.sigma(time(1.0))), 1)
    end = law.log_prob(y.unsqueeze(1)).logsumexp(1) - math.log(5)
    assert (found.value - truth - Gaussian().log_prob(y) + end).abs().max() < 1e-5


# --- random probes


@pytest.mark.parametrize(
    "trace",
    [Hutchinson(2), Hutchinson(2, Orthogonal()), HutchPlusPlus(2, r=1)],
    ids=["signs", "orthogonal", "hutch++"],
)
def test_probes_are_unbiased_and_their_standard_error_covers(trace):
    model, n = gaussian3(), 400
    x = sample(model, 1)
    exact = no_grad_log_prob(model, x, method=tight(1e-5)).value
    many = x.expand(n, 3).contiguous()  # each with probes of its own
    found = no_grad_log_prob(model, many, trace, tight(1e-5))
    error = found.value - exact
    assert abs(error.mean()) < 4 * error.std() / n**0.5 + 1e-4
    difference = found.std_error.square() - error.square()
    assert abs(difference.mean()) < 4 * difference.std() / n**0.5 + 1e-4
    assert error.std() > 0.02


def gaussian3():
    """Correlated Gaussian data in three dimensions: the divergence has a variance."""
    from kakusan import ExactMixture

    root = randn(3, 3, seed=4)
    return ExactMixture(VP(), torch.ones(1), torch.zeros(1, 3), (root @ root.T)[None])


def test_all_orthogonal_probes_are_the_exact_trace():
    model = gaussian3()
    x = sample(model, 4)
    exact = no_grad_log_prob(model, x, ExactTrace(), tight(1e-8))
    found = no_grad_log_prob(model, x, Hutchinson(3, Orthogonal()), tight(1e-8))
    assert (found.value - exact.value).abs().max() < 1e-6
    assert found.std_error.abs().max() == 0


def test_probes_of_a_sample_are_the_same_in_any_batch():
    model = mixture(VP())
    x = sample(model, 6)
    whole = no_grad_log_prob(model, x, Hutchinson(2), seed=7)
    part = no_grad_log_prob(model, x[2:5], Hutchinson(2), seed=7, first=2)
    assert (whole.value[2:5] - part.value).abs().max() < 1e-10
    assert (whole.std_error[2:5] - part.std_error).abs().max() < 1e-10
    other = no_grad_log_prob(model, x[2:5], Hutchinson(2), seed=7)
    assert (other.value - part.value).abs().max() > 1e-3
    assert no_grad_log_prob(model, x, Hutchinson(1)).std_error.isnan().all()


# --- each sample on its own


class Net(nn.Module):
    """A small smooth network for denoisers of vectors, with labels."""

    def __init__(self, d=2, dtype=F64, gain=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(d + 2, 24), nn.SiLU(), nn.Linear(24, d)).to(dtype)
        self.f[0].weight.data *= gain
        self.dtype = dtype

    def forward(self, x, level, label=None):
        beside = torch.zeros(len(x)) if label is None else label
        columns = [c.to(self.dtype).expand(len(x)).unsqueeze(1) for c in (level, beside)]
        return self.f(torch.cat([x.to(self.dtype), *columns], 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_mates_in_a_batch_change_no_bit(kind, dtype):
    model = mixture(VP()) if kind == "mixture" else Denoiser(Net(dtype=dtype, gain=4.0), VP())
    x = randn(4, 2).to(dtype)
    stiff = x.clone()
    stiff[2:] *= 20
    method = tight(1e-3 if kind == "mixture" else 1e-5)
    a, b = (no_grad_log_prob(model, y, Hutchinson(2), method) for y in (x, stiff))
    assert b.evaluations > a.evaluations
    for p, q in ((a.value, b.value), (a.solver_error, b.solver_error), (a.std_error, b.std_error)):
        assert torch.equal(p[:2], q[:2])


def test_a_single_precision_network_adds_up_in_double():
    model = Denoiser(Net(dtype=torch.float32), VP())
    x = randn(4, 2).float()
    found = no_grad_log_prob(model, x, method=tight(1e-5))
    wide = no_grad_log_prob(Denoiser(Net().double(), VP()), x.double(), method=tight(1e-9))
    assert found.value.dtype == F64 and (found.value - wide.value).abs().max() < 1e-4
    assert encode(model, x).dtype == torch.float32


# --- denoisers


@pytest.mark.parametrize("predict", ["v", "edm", "epsilon", "flow"])
@pytest.mark.parametrize("process", [VP(), EDM((0.002, 5.0)), SubVP()], ids=["VP", "EDM", "SubVP"])
def test_denoisers_follow_the_flow_of_their_score(predict, process):
    """Their flow is taken in the angle alone; this is the one by time and scale."""
    model = Denoiser(Net(), process, predict=predict, data_std=0.7)
    label = torch.tensor([0.0, 1.0, 2.0]).double()
    score = model.given(label, guidance=1.5)
    flow, t = flow_of(score), torch.tensor([0.2, 0.5, 1.1], dtype=F64)
    slow = AngularFlow(process, score, data_std=0.7)
    assert isinstance(flow.process, Angle) and not isinstance(slow.process, Angle)
    x = randn(3, 2)
    assert (flow.drift(x, t) - slow.drift(x, t)).abs().max() < 1e-10
    assert (flow.span[1] - slow.span[1], flow.end_std) == (0, slow.end_std)
    one, other = (no_grad_log_prob(f, x, method=tight(1e-8)) for f in (flow, slow))
    assert (one.value - other.value).abs().max() < 1e-6
    assert torch.allclose(one.prior_gap, other.prior_gap, rtol=1e-6, atol=1e-9)


def test_labels_are_closed_over_per_sample():
    model, x = Denoiser(Net(), VP()), randn(1, 2).expand(3, 2).contiguous()
    label = torch.tensor([0.0, 1.0, 2.0]).double()
    value = no_grad_log_prob(model.given(label), x, method=tight(1e-7)).value
    for i in range(3):
        alone = no_grad_log_prob(model.given(label[i : i + 1]), x[:1], method=tight(1e-7))
        assert (alone.value - value[i]).abs().max() < 1e-6
    assert value.std() > 1e-3
    assert torch.equal(
        no_grad_log_prob(model, x).value, no_grad_log_prob(model.given(None), x).value
    )


@pytest.mark.parametrize("predict", ["x0", "score"])
def test_denoisers_that_are_singular_at_the_data_start_after_them(predict):
    process = replace(VP(), span=(0.05, 1.0))
    exact = mixture(process)

    def net(y, level, label):
        t = process.time_of_angle(level * (math.pi / 2))
        x = y * per_sample(torch.hypot(process.alpha(t), process.sigma(t)), y)
        return exact.denoised(x, t) if predict == "x0" else exact(x, t)

    model, x = Denoiser(net, process, predict=predict), sample(exact, 4)
    found = no_grad_log_prob(model, x, method=tight(), prior=Noised(exact))
    assert (found.value - exact.log_prob(x, time(0.05))).abs().max() < 1e-5


def test_images():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    flow = SDE.of(lambda x, t: conv(x), Zero())
    x = randn(3, 1, 4, 4)
    A = torch.autograd.functional.jacobian(lambda x: conv(x.reshape(1, 1, 4, 4)).flatten(),
                                           x[0].flatten())  # fmt: skip
    found = no_grad_log_prob(flow, x, method=tight(1e-10))
    end = x.flatten(1) @ torch.matrix_exp(A).T
    truth = Gaussian().log_prob(end) + A.trace()
    assert (found.value - truth).abs().max() < 1e-8


# --- any ODE

A = torch.tensor([[0.3, -1.0], [0.8, -0.7]], dtype=F64)


def ode(drift, span=(0.0, 1.0)):
    return SDE.of(drift, Zero(), span=span)


@pytest.mark.parametrize("span", [(0.0, 1.5), (1.5, 0.0), (-1.0, 1.0)], ids=str)
def test_a_linear_flow_has_its_closed_form(span):
    x, T = randn(5, 2), span[1] - span[0]
    found = no_grad_log_prob(ode(lambda x, t: x @ A.T, span), x, method=tight(1e-11))
    end = x @ torch.matrix_exp(A * T).T
    truth = Gaussian().log_prob(end) + A.trace() * T
    assert (found.value - truth).abs().max() < 1e-8, found.value - truth
    assert found.prior_gap.isnan().all() and found.energy is None
    wide = no_grad_log_prob(
        ode(lambda x, t: x @ A.T, span), x, method=tight(1e-11), prior=Gaussian(3.0)
    )
    law = Independent(Normal(torch.zeros(2, dtype=F64), 3.0), 1)
    assert (wide.value - law.log_prob(end) - A.trace() * T).abs().max() < 1e-8


def test_what_the_state_is_off_is_told():
    """The divergence of a linear flow is a constant, so all error comes by the state."""
    x, T = 2 * randn(20, 2), 1.5
    flow = ode(lambda x, t: x @ A.T, (0.0, T))
    truth = Gaussian().log_prob(x @ torch.matrix_exp(A * T).T) + A.trace() * T
    for tol in (1e-3, 1e-5):
        found = no_grad_log_prob(flow, x, method=tight(tol))
        error = (found.value - truth).abs()
        assert (found.solver_error > error / 3).all() and error.max() > tol / 100


def test_energy_is_the_integral_of_the_squared_speed():
    a, b, T = 0.4, 2.0, 1.5
    M = torch.tensor([[a, -b], [b, a]], dtype=F64)  # |exp(M t) x| = exp(a t) |x|
    x = randn(4, 2)
    flow = ode(lambda x, t: x @ M.T, (0.0, T))
    for trace in (ExactTrace(), Hutchinson(3)):
        found = no_grad_log_prob(flow, x, trace, tight(1e-10), energy=True)
        truth = (a * a + b * b) * x.square().sum(1) * math.expm1(2 * a * T) / (2 * a)
        assert (found.energy - truth).abs().max() < 1e-7
        end = Gaussian().log_prob(x @ torch.matrix_exp(M * T).T) + 2 * a * T
        # signs have no variance here: the symmetric part of M is diagonal
        assert (found.value - end).abs().max() < 1e-7


def test_gradients_by_parameters():
    """Through the steps, by the adjoint, and by differences; energy and probes among them."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    flow = ode(lambda x, t: f(torch.cat([x, t.expand(len(x), 1)], 1)))
    x, weight = randn(4, 2), f[0].weight
    grid = torch.linspace(0, 1, 11, dtype=F64)

    def loss(engine=None):
        found = log_prob(flow, x, Hutchinson(2), RK4(), grid, seed=3, engine=engine, energy=True)
        return (found.value + 0.1 * found.energy).sum()

    one, other = (torch.autograd.grad(loss(e), weight)[0] for e in (None, Adjoint()))
    assert (one - other).abs().max() < 1e-10 and one.abs().max() > 0.1
    direction, base, found = randn(*weight.shape), weight.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            weight.copy_(base + sign * 1e-5 * direction)
            found.append(loss())
        weight.copy_(base)
    assert abs((found[0] - found[1]) / 2e-5 - (one * direction).sum()) < 1e-6


@pytest.mark.parametrize("process", [VP(), EDM()], ids=["VP", "EDM"])
def test_the_gradient_by_the_data_is_the_score(process):
    model = mixture(process)
    x = sample(model, 5).requires_grad_()
    found = log_prob(model, x, method=tight(1e-7), prior=Noised(model))
    (slope,) = torch.autograd.grad(found.value.sum(), x)
    truth = model(x.detach(), time(0.0))
    assert (slope - truth).abs().max() < 1e-4 and truth.abs().max() > 1
    assert not found.solver_error.requires_grad and not found.std_error.requires_grad
    assert not found.prior_gap.requires_grad


def test_gradients_reach_a_network_through_adaptive_steps():
    model, x = Denoiser(Net(), VP()), randn(3, 2)
    weight = model.net.f[0].weight
    (slope,) = torch.autograd.grad(log_prob(model, x, method=tight(1e-8)).value.sum(), weight)
    direction, base, found = randn(*weight.shape), weight.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            weight.copy_(base + sign * 1e-3 * direction)
            found.append(log_prob(model, x, method=tight(1e-10)).value.sum())
    assert abs((found[0] - found[1]) / 2e-3 - (slope * direction).sum()) < 1e-5
    frozen = Denoiser(Net().requires_grad_(False), VP())
    assert not log_prob(frozen, x).value.requires_grad


# --- the prior


@by_name
def test_the_gap_is_the_divergence_from_the_prior(process):
    model, x = gaussian(process, d=3), randn(4, 3)
    T = time(process.span[1])
    alpha, sigma = process.alpha(T), process.sigma(T)
    for prior in (None, Gaussian(1.3)):
        found = no_grad_log_prob(model, x, method=tight(1e-2), prior=prior)
        r, std = torch.hypot(alpha, sigma), (prior or Gaussian(flow_of(model).end_std)).std
        kernel = Independent(Normal(alpha * x / r, sigma / r), 1)
        truth = kl_divergence(kernel, Independent(Normal(torch.zeros(3, dtype=F64), std), 1))
        assert torch.allclose(found.prior_gap, truth, rtol=1e-6, atol=1e-10), process


def test_the_mean_gap_bounds_the_divergence_of_noised_data():
    for process in (VP(), EDM((0.002, 5.0)), VP(0.1, 3.0)):
        model = gaussian(process, mean=0.7, variance=0.36)
        x = sample(model, 2000)
        found = no_grad_log_prob(model, x, method=tight(1e-2)).prior_gap
        T = time(process.span[1])
        alpha, sigma = process.alpha(T), process.sigma(T)
        r = torch.hypot(alpha, sigma)
        law = Normal(alpha * 0.7 / r, (alpha**2 * 0.36 + sigma**2).sqrt() / r)
        truth = kl_divergence(law, Normal(time(0.0), time(1.0)))
        assert found.mean() + 4 * found.std() / 2000**0.5 > truth > 0, process
        assert found.mean() < 100 * truth, process  # a bound that says something


def test_the_prior_has_the_spread_of_noised_data():
    model = Denoiser(Net(), EDM((0.002, 5.0)), data_std=2.0)
    assert abs(flow_of(model).end_std - ((4 + 25) / (1 + 25)) ** 0.5) < 1e-12
    x = randn(3, 2)
    told = no_grad_log_prob(model, x, prior=Gaussian(flow_of(model).end_std)).value
    assert torch.equal(no_grad_log_prob(model, x).value, told)
    assert (told - no_grad_log_prob(model, x, prior=Gaussian(1.0)).value).abs().max() > 0.01
    law = Independent(Normal(torch.zeros(2, dtype=F64), 1.7), 1)
    assert (Gaussian(1.7).log_prob(x) - law.log_prob(x)).abs().max() < 1e-12
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(law.log_prob(y).sum(), y)
    assert (Gaussian(1.7).slope(x) - slope).abs().max() < 1e-12


# --- codes


@pytest.mark.parametrize("process", [VP(), EDM(), SubVP()], ids=["VP", "EDM", "SubVP"])
def test_codes_lead_back(process):
    model = mixture(process)
    x = sample(model, 6)
    z = encode(model, x, tight(1e-7))
    assert (decode(model, z, tight(1e-7)) - x).abs().max() < 1e-5
    assert (z - x).abs().max() > 0.1
    grid = flow_times(flow_of(model), 100)
    assert (encode(model, x, grid=grid) - z).abs().max() < 1e-3
    assert (decode(model, z, grid=grid) - x).abs().max() < 1e-3


def test_codes_of_a_plain_score_are_of_the_state():
    """With a scale at the start that is not one."""
    process = Late()
    model = mixture(process)
    flow = AngularFlow(process, model, start=process.span[0])
    x = process.noised(sample(model), randn(8, 2), time(process.span[0]))
    z = encode(flow, x, tight(1e-9))
    assert (decode(flow, z, tight(1e-9)) - x).abs().max() < 1e-6
    # the flow from the data themselves meets the same states on its way
    far = gaussian(process, d=2)
    flow = AngularFlow(process, far, start=process.span[0])
    x0 = randn(4, 2)
    t = as_time(0.3)
    a, s = process.alpha(t), process.sigma(t)
    there = a * 0.7 + ((a**2 * 0.36 + s**2) / 0.36).sqrt() * (x0 - 0.7)
    assert (encode(flow, there, tight(1e-9)) - encode(far, x0, tight(1e-9))).abs().max() < 1e-6


@pytest.mark.parametrize("process", [VP(), EDM()], ids=["VP", "EDM"])
def test_codes_of_gaussian_data_are_normal(process):
    """The flow is affine: (x - mean) / std, but for what noise leaves of the data."""
    model = gaussian(process, d=2)
    x = sample(model, 16)
    T, flow = time(process.span[1]), flow_of(model)
    alpha, sigma = process.alpha(T), process.sigma(T)
    r, v = torch.hypot(alpha, sigma), alpha**2 * 0.36 + sigma**2
    truth = (alpha * 0.7 + v.sqrt() * (x - 0.7) / 0.6) / r / flow.end_std
    z = encode(model, x, tight(1e-8))
    assert (z - truth).abs().max() < 1e-6
    assert (z - (x - 0.7) / 0.6).abs().max() < 0.05


def test_codes_and_densities_know_the_spread_of_the_data():
    """A zero network that predicts `edm` is that of N(0, s²) data, whose noised law is known."""
    model = Denoiser(lambda x, t, label: 0 * x, EDM((0.002, 5.0)), "edm", data_std=2.0)
    x = 2 * randn(6, 3)
    z = encode(model, x, tight(1e-8))
    assert (z - x / 2).abs().max() < 1e-6
    assert (decode(model, z, tight(1e-8)) - x).abs().max() < 1e-6
    law = Independent(Normal(torch.zeros(3, dtype=F64), 2.0), 1)
    assert (no_grad_log_prob(model, x, method=tight()).value - law.log_prob(x)).abs().max() < 1e-5


def test_interpolation_goes_from_a_to_b_along_a_great_circle():
    model = mixture(VP())
    a, b = sample(model, 2), sample(model, 2, seed=2)
    between = interpolate(model, a, b, 4, tight(1e-6))
    assert between.shape == (4, 2, 2)
    assert (between[0] - a).abs().max() < 1e-4 and (between[-1] - b).abs().max() < 1e-4
    codes = torch.stack([encode(model, x, tight(1e-6)) for x in between])
    lengths = codes.norm(dim=2)
    blended = torch.lerp(lengths[0], lengths[-1], torch.linspace(0, 1, 4, dtype=F64)[:, None])
    assert (lengths - blended).abs().max() < 1e-4
    turned = (codes[1:] * codes[:-1]).sum(2) / (lengths[1:] * lengths[:-1])
    angles = turned.clamp(-1, 1).acos()
    assert (angles - angles[0]).abs().max() < 1e-3  # equal turns
    same = interpolate(model, a, a, 2, tight(1e-6))
    assert (same - a).abs().max() < 1e-4


# --- bits


def test_bits_by_hand():
    log_p = torch.tensor([-3.0, -5.0, -4.0])
    bits = bits_per_dim(log_p, d=2, log_unit=-1.0)
    assert abs(bits.value - 5 / (2 * math.log(2))) < 1e-9 and bits.n == 3
    assert abs(bits.std_error - 1 / (2 * math.log(2)) / 3**0.5) < 1e-9
    assert math.isnan(bits_per_dim(log_p[:1], 2).std_error)


def test_units_of_bits():
    """Uniform 8-bit pixels have 8 bits a dimension, in whichever units the density is."""
    d = 784
    scaled = torch.full((2,), -d * math.log(2.0))  # uniform on [-1, 1]
    raw = torch.full((2,), -d * math.log(256.0))
    unit = d * math.log(2 / 256)
    assert abs(bits_per_dim(scaled, d, unit).value - bits_per_dim(raw, d).value) < 1e-6


# --- what is refused


def test_bad_data():
    model = mixture(VP())
    with pytest.raises(KakusanError, match="sample 1 of the data is not finite"):
        log_prob(model, torch.tensor([[0.0, 1.0], [0.0, math.nan]]))
    with pytest.raises(KakusanError, match=r"floating-point .* torch.int64 of shape \(1, 2\)"):
        log_prob(model, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(KakusanError, match=r"of shape \(2,\)"):
        encode(model, torch.zeros(2))
    with pytest.raises(KakusanError, match=r"got \(1, 2\), \(2, 2\) and n=8"):
        interpolate(model, torch.zeros(1, 2), torch.zeros(2, 2))
    with pytest.raises(KakusanError, match="n=1"):
        interpolate(model, torch.zeros(1, 2), torch.zeros(1, 2), n=1)


def test_bad_requests():
    model, x = mixture(VP()), torch.zeros(1, 2, dtype=F64)
    with pytest.raises(KakusanError, match=r"RK4 steps from time to time .*linspace\(\*flow.span"):
        log_prob(model, x, method=RK4())
    with pytest.raises(KakusanError, match="needs a denoiser, its score or an ODE, not float"):
        log_prob(3.0, x)
    with pytest.raises(KakusanError, match=r"AngularFlow\(process, score\) makes a flow"):
        encode(lambda x, t: x, x)
    with pytest.raises(KakusanError, match=r"exact trace in 3072 .* Hutchinson\(8\)"):
        log_prob(ode(lambda x, t: -x), torch.zeros(2, 3, 32, 32))
    with pytest.raises(KakusanError, match="there is no sample"):
        log_prob(model, x[:0])
    for ends in ((0.0, 0.5), (1.0, 0.0)):
        grid = torch.linspace(*ends, 11, dtype=F64)
        with pytest.raises(KakusanError, match=r"from the data at t=0 to the noise at t=1, and"):
            log_prob(ode(lambda x, t: -x), x, grid=grid)
    with pytest.raises(KakusanError, match="at most 2 probes are orthogonal, got 3"):
        log_prob(model, x, Hutchinson(3, Orthogonal()))
    for ask in (log_prob, encode):
        with pytest.raises(KakusanError, match=r"of an ODE, and VP has noise; .*AngularFlow"):
            ask(VP(), x)
    with pytest.raises(KakusanError, match="to the field: was it computed without gradients"):
        log_prob(ode(lambda x, t: x.detach()), x)


def test_bad_flows():
    x = torch.tensor([[4.0, 4.0], [0.0, 1.0]], dtype=F64)
    with pytest.raises(KakusanError, match=r"divergence .* not finite for sample 1 at t=0: "):
        # a root has a value at zero, and no slope
        no_grad_log_prob(ode(lambda x, t: x.abs().sqrt()), x)
    grid = torch.linspace(0, 1, 5, dtype=F64)
    with pytest.raises(KakusanError, match=r"divergence .* not finite for sample 1 at t=0: "):
        no_grad_log_prob(ode(lambda x, t: x.abs().sqrt()), x, grid=grid)
    with pytest.raises(KakusanError, match="did not get to t=1 in 3 steps .* it reached t=0"):
        no_grad_log_prob(ode(lambda x, t: -50 * x), x, method=DormandPrince(max_steps=3))


def test_a_tally_may_be_read_afterwards():
    tally, model = Tally(), mixture(VP())
    found = no_grad_log_prob(model, sample(model), method=tight(tally=tally))
    assert tally.evaluations == found.evaluations
    assert isinstance(model, ScoreField) and (tally.error >= 0).all()
