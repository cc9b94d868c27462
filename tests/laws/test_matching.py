"""Score matching: five losses, the constants between them, and one gradient.

Nothing here is drawn at random that an expectation is taken of: for mixture data x_t runs through
nodes of Gauss and Hermite, and given x_t the noise, whose square is the highest power in any of
the losses, through two nodes a coordinate, which are exact. Random signs run through all of them.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from kakusan import (
    SNR,
    Denoiser,
    Denoising,
    ExactMixture,
    Importance,
    KakusanError,
    Karras,
    Keyed,
    Likelihood,
    LogNormal,
    Stratified,
    Uniform,
    UniformTimes,
    UsageError,
    generate,
    probability_flow,
)
from kakusan.models.energy import Energy
from kakusan.objectives.score_matching import (
    Clean,
    DenoisingAt,
    Explicit,
    FlowMatching,
    Implicit,
    OverTime,
    Sliced,
)
from problems import F64, NAMES, PROCESSES, gaussian, mixture, time, times

each = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=F64)


def hermite(n, d):
    """Nodes and weights for N(0, I) in d dimensions."""
    z, w = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(n))
    w = w / w.sum()
    z, w = (torch.cartesian_prod(*[a] * d).view(-1, d) for a in (z, w))
    return z, w.prod(1)


def nodes(truth, t, n=40):
    """x_0, eps and weights that integrate what is smooth in x_t and quadratic in eps."""
    alpha, sigma, d = truth.process.alpha(t), truth.process.sigma(t), truth.means.shape[1]
    (z, wz), (y, wy) = hermite(n, d), hermite(2, d)
    found = []
    for k, weight in enumerate(truth.weights / truth.weights.sum()):  # they add up in float32
        V, S = truth.vectors[k], alpha**2 * truth.values[k] + sigma**2
        x = alpha * truth.means[k] + (z * S.sqrt()) @ V.T
        # eps given x_t: mean sigma S⁻¹ (x - alpha mu), covariance 1 - sigma² S⁻¹
        mean, spread = sigma * z / S.sqrt(), (alpha**2 * truth.values[k] / S).sqrt()
        eps = (mean[:, None] + spread * y) @ V.T
        x0 = (x[:, None] - sigma * eps) / alpha
        found.append((x0.flatten(0, 1), eps.flatten(0, 1), (weight * wz[:, None] * wy).flatten()))
    return (torch.cat(part) for part in zip(*found, strict=True))


def middle(process):
    """A time with signal and noise, where the nodes are good to ten digits: tan(angle) = 1.5."""
    return process.time_of_angle(torch.atan(time(1.5)))


def network(seed=0, out=2, d=2):
    """A small smooth network (x, t) -> (B, out), no gradient of anything."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(d, 8), torch.nn.Tanh(), torch.nn.Linear(8, out)]
    net = torch.nn.Sequential(*layers).double()
    return net, lambda x, t: net(x / 2)


def velocity_of(truth):
    return lambda x, t: probability_flow(truth.process, truth).drift(x, t)


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# --- constants and gradients


@each
def test_the_losses_differ_by_their_constants(process):
    """ISM = ESM - I/2, DSM = ESM + (d/sigma² - I)/2, FM = EFM + (E|dx/dt|² - E|v|²)/2."""
    truth, t, (_, score) = mixture(process), middle(process), network()
    x0, eps, w = nodes(truth, t)
    x, sigma2 = process.noised(x0, eps, t), process.variance(t)

    def mean(objective):
        return (w * objective(score, x0, eps, t)).sum()

    esm, ism, dsm = (
        mean(o) for o in (Explicit(process, truth), Implicit(process), DenoisingAt(process))
    )
    information = (w * truth(x, t).square().sum(1)).sum()
    assert torch.allclose(ism, esm - information / 2, rtol=1e-9), process
    assert torch.allclose(dsm, esm + (2 / sigma2 - information) / 2, rtol=1e-9), process
    flow = velocity_of(truth)
    h = 1e-5 * (process.span[1] - process.span[0])  # the constant by differences, not by autograd
    ahead, behind = (process.noised(x0, eps, t + k * h) for k in (1, -1))
    line = ((ahead - behind) / (2 * h)).square().sum(1)
    constant = (w * (line - flow(x, t).square().sum(1))).sum() / 2
    fm, efm = mean(FlowMatching(process)), mean(Explicit(process, flow))
    assert torch.allclose(fm, efm + constant, rtol=1e-6), process


@pytest.mark.parametrize("d", [1, 3])
@each
def test_the_constants_of_gaussian_data_in_closed_form(process, d):
    """I = d / (alpha² s² + sigma²); the score s = 0 has ESM = I/2, ISM = 0, DSM = d / 2sigma²."""
    truth, t = gaussian(process, d=d), middle(process)
    x0, eps, w = nodes(truth, t, n=3)
    sigma2 = process.variance(t)
    information = d / (process.alpha(t) ** 2 * 0.36 + sigma2)

    def zero(x, t):
        return 0 * x

    for objective, exact in (
        (Explicit(process, truth), information / 2),
        (Implicit(process), 0 * sigma2),
        (DenoisingAt(process), d / sigma2 / 2),
    ):
        assert torch.allclose((w * objective(zero, x0, eps, t)).sum(), exact), objective
        # and at the score itself: 0, -I/2, (d/sigma² - I)/2
        least = (w * objective(truth, x0, eps, t)).sum()
        assert torch.allclose(least, exact - information / 2, atol=1e-12), objective


@each
def test_one_gradient(process):
    """Explicit, implicit, denoising: the same derivative in every parameter of a network."""
    truth, t, (net, score) = mixture(process), middle(process), network()
    x0, eps, w = nodes(truth, t)
    found = [
        gradient((w * objective(score, x0, eps, t)).sum(), net)
        for objective in (Explicit(process, truth), Implicit(process), DenoisingAt(process))
    ]
    scale = found[0].abs().max()
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-8, atol=1e-8 * scale), process
    flow = velocity_of(truth)
    fm, efm = (
        gradient((w * objective(score, x0, eps, t)).sum(), net)
        for objective in (FlowMatching(process), Explicit(process, flow))
    )
    assert torch.allclose(fm, efm, rtol=1e-8, atol=1e-8 * efm.abs().max()), process


@each
def test_the_truth_is_where_each_loss_is_least(process):
    """The derivative at the truth is 0 in any direction, and the loss rises by ½|direction|²."""
    truth, t, (_, direction) = mixture(process), middle(process), network(1)
    x0, eps, w = nodes(truth, t)
    rise = (w * direction(process.noised(x0, eps, t), t).square().sum(1)).sum() / 2
    flow = velocity_of(truth)
    for objective, best in (
        (Explicit(process, truth), truth),
        (Implicit(process), truth),
        (DenoisingAt(process), truth),
        (FlowMatching(process), flow),
    ):
        c = torch.zeros((), dtype=F64, requires_grad=True)

        def loss(c, objective=objective, best=best):
            def moved(x, t):
                return best(x, t) + c * direction(x, t)

            return (w * objective(moved, x0, eps, t)).sum()

        (slope,) = torch.autograd.grad(loss(c), c)
        assert abs(slope) < 1e-6 * rise, (objective, slope)
        assert torch.allclose(loss(c + 1) - loss(c), rise, rtol=1e-6), objective


# --- the trace, exact and sliced


def test_the_trace_is_that_of_the_jacobian():
    """Of a field on images, at times of their own; vᵀ∇s v as well."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    x0, eps = torch.randn(2, 4, 1, 2, 3, dtype=F64)
    t = times(PROCESSES[0], 6)[1:-1]

    def score(x, t):
        return torch.tanh(net(x)) * t[:, None, None, None] + x**2

    x = PROCESSES[0].noised(x0, eps, t)
    J = torch.stack(
        [
            torch.func.jacrev(lambda y, t=t: score(y[None], t[None])[0].flatten())(y).flatten(1)
            for y, t in zip(x, t, strict=True)
        ]
    ).detach()
    half = score(x, t).square().flatten(1).sum(1).detach() / 2
    exact = half + J.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(Implicit(PROCESSES[0])(score, x0, eps, t), exact, rtol=1e-10)
    sliced = Sliced(PROCESSES[0], probes=3)
    z = torch.cat([eps[:, None], torch.randn(4, 3, 1, 2, 3, dtype=F64)], 1)
    v = z[:, 1:].sign().flatten(2)
    by_hand = half + torch.einsum("bki,bij,bkj->bk", v, J, v).mean(1)
    assert torch.allclose(sliced(score, x0, z, t), by_hand, rtol=1e-10)
    plain = Sliced(PROCESSES[0], probes=3, control=0.0)
    dots = torch.einsum("bki,bi->bk", v, score(x, t).flatten(1)).detach()
    by_hand = by_hand - half + dots.square().mean(1) / 2
    assert torch.allclose(plain(score, x0, z, t), by_hand, rtol=1e-10)


@pytest.mark.parametrize("control", [0.0, 0.3, 1.0])
def test_slices_average_to_the_trace(control):
    """Over all signs SSM is ISM, in its value and in its gradient, at each state."""
    process, (net, score) = PROCESSES[0], network()
    x0, eps = torch.randn(2, 5, 2, dtype=F64)
    t, signs = times(process, 5), SIGNS.expand(5, 4, 2)
    sliced = Sliced(process, 4, control)(score, x0, torch.cat([eps[:, None], signs], 1), t)
    exact = Implicit(process)(score, x0, eps, t)
    assert torch.allclose(sliced, exact, rtol=1e-12)
    a, b = gradient(sliced.sum(), net), gradient(exact.sum(), net)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_variance_of_slices():
    """Of one probe Σ_{i<j} (A_ij + A_ji)² with A = ∇s: the diagonal costs nothing."""
    A = torch.randn(2, 2, dtype=F64)
    x0, eps, t = torch.randn(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64), time(0.0)

    def spread(probes, control):
        """The variance over all signs of all probes."""
        loss = Sliced(Clean(), probes, control)
        every = [
            loss(lambda x, t: x @ A.T, x0, torch.cat([eps[:, None], torch.stack(v)[None]], 1), t)
            for v in itertools.product(SIGNS, repeat=probes)
        ]
        return torch.cat(every).detach().var(correction=0)

    exact = (A[0, 1] + A[1, 0]) ** 2
    assert torch.allclose(spread(1, 1.0), exact)
    assert torch.allclose(spread(2, 1.0), exact / 2) and torch.allclose(spread(3, 1.0), exact / 3)
    s = (x0 @ A.T)[0]
    # ½(v·s)² moves by v_1 v_2 s_1 s_2, as vᵀAv does by v_1 v_2 (A_12 + A_21)
    assert torch.allclose(spread(1, 0.0), (A[0, 1] + A[1, 0] + s[0] * s[1]) ** 2)


def test_the_control_variate_reduces_the_variance():
    """On mixture data, at the score itself, over states and signs alike."""
    process = PROCESSES[3]
    truth, n = mixture(process), 20_000
    x0 = truth.sample(n, torch.Generator().manual_seed(0))
    t = middle(process)
    losses = {c: Sliced(process, control=c) for c in (0.0, 1.0)}
    z = Keyed(0).normal(0, losses[1.0].noise_shape(x0), x0)
    with torch.no_grad():
        std = {c: loss(truth, x0, z, t).std() for c, loss in losses.items()}
        exact = Implicit(process)(truth, x0, z[:, 0], t).std()
    assert exact < std[1.0] < 0.95 * std[0.0], (exact, std)


# --- flows, and times that are drawn


@each
def test_flow_matching_is_denoising_in_other_units(process):
    """v = a x - ½ g² s makes FM = (½ g²)² DSM of each sample; on images and at many times."""
    t = times(process, 7)[1:-1]
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=F64)
    a, g2 = (c.view(-1, 1, 1, 1) for c in process.rates(t))

    def score(x, t):
        return torch.sin(x)

    def velocity(x, t):
        return a * x - g2 / 2 * score(x, t)

    fm = FlowMatching(process)(velocity, x0, eps, t)
    dsm = DenoisingAt(process)(score, x0, eps, t)
    assert torch.allclose(fm, (g2.flatten() / 2) ** 2 * dsm, rtol=1e-8), process


@each
def test_a_time_for_all_is_that_time_for_each(process):
    t, truth = middle(process), mixture(process)
    x0, eps = torch.randn(2, 3, 2, dtype=F64)
    for objective in (
        Explicit(process, truth),
        Implicit(process),
        DenoisingAt(process),
        FlowMatching(process),
    ):
        one = objective(truth, x0, eps, t)
        assert torch.allclose(one, objective(truth, x0, eps, t.expand(3))), objective
        assert torch.allclose(one, objective(truth, x0, eps, t.item())), objective
        small = objective(truth, x0.float(), eps.float(), t)
        assert small.dtype == torch.float32 and torch.allclose(small.double(), one, rtol=1e-3)


@pytest.mark.parametrize(
    "times_", [UniformTimes(), Stratified(), LogNormal(), Importance(Likelihood())]
)
@pytest.mark.parametrize("weight", [Uniform(), SNR(), Likelihood(), Karras()])
@each
def test_over_time_it_is_the_loss_the_trainer_uses(process, weight, times_):
    """lambda(t) DSM at drawn times is d/2 times `Denoising`, sample by sample."""
    model = Denoiser(lambda x, level, label: torch.cos(x), process, "score", 0.7)
    x0, eps = torch.randn(2, 6, 3, dtype=F64)
    u = torch.rand(6, dtype=F64)
    trained = Denoising(weight, times_)(model, x0, eps, u)
    found = OverTime(DenoisingAt(process), weight, times_, 0.7)(model.score, x0, eps, u)
    assert torch.allclose(found, 1.5 * trained, rtol=1e-8), (process, weight)


def test_over_time_every_objective_takes_what_it_wants():
    process = PROCESSES[0]
    truth, x0 = mixture(process), torch.randn(4, 2, dtype=F64)
    u = torch.rand(4, dtype=F64)
    t, _ = Stratified().draw(Denoiser(None, process), u)  # pyright: ignore[reportArgumentType]
    for objective in (Explicit(process, truth), Implicit(process), Sliced(process, 2)):
        eps = Keyed(0).normal(0, objective.noise_shape(x0), x0)
        found = OverTime(objective)(truth, x0, eps, u)
        assert torch.allclose(found, process.rates(t)[1] * objective(truth, x0, eps, t))


def test_clean_data_are_left_alone():
    """`Clean` keeps x_0, so implicit matching on it is Hyvärinen's, with any noise and time."""
    x0, (_, score) = torch.randn(5, 2, dtype=F64), network()
    losses = [
        Implicit(Clean())(score, x0, torch.randn(5, 2, dtype=F64), t) for t in (0.0, time(0.7))
    ]
    assert torch.equal(*losses)
    assert torch.equal(Clean().noised(x0, 9 * x0, time(1.0)), x0)
    a, g2 = Clean().rates(time(0.3))
    assert a == 0 and g2 == 0


# --- energies


def bowl(d=2):
    """½ xᵀAx - b·x as a network of one vector of natural parameters: A above its diagonal, b."""
    i, j = torch.triu_indices(d, d)

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.zeros(len(i) + d, dtype=F64))

        def forward(self, x, t):
            # an entry off the diagonal stands for two
            pairs = torch.where(i == j, 0.5, 1.0) * x[:, i] * x[:, j]
            return pairs @ self.theta[: len(i)] - x @ self.theta[len(i) :]

    return Bowl(), (i, j)


def minimiser(energy, net, loss):
    """Where a loss that is quadratic in the parameters is least: one step of Newton's."""

    def of(theta):
        def score(x, t):
            return functional_call(energy, {"net.theta": theta}, (x, t))

        return loss(score)

    theta = net.theta.detach()
    H = torch.autograd.functional.hessian(of, theta)
    g = torch.autograd.functional.jacobian(of, theta)
    return -torch.linalg.solve(H, g)


def test_score_matching_of_a_gaussian_energy_finds_the_moments():
    """On any data the minimiser of ISM is A = C⁻¹, b = C⁻¹ m, with the data's own moments."""
    net, (i, j) = bowl()
    x = torch.randn(50, 2, dtype=F64) ** 3 @ torch.randn(2, 2, dtype=F64) + 1
    P = torch.linalg.inv(x.T.cov(correction=0))
    exact = torch.cat([P[i, j], P @ x.mean(0)])
    z = torch.cat([0 * x[:, None], SIGNS.expand(50, 4, 2)], 1)
    for loss in (
        lambda score: Implicit(Clean())(score, x, 0 * x, 0.0).mean(),
        lambda score: Sliced(Clean(), 4)(score, x, z, 0.0).mean(),
        lambda score: Sliced(Clean(), 4, control=0.0)(score, x, z, 0.0).mean(),
    ):
        assert torch.allclose(minimiser(Energy(net), net, loss), exact, rtol=1e-8), loss


@each
def test_every_objective_finds_the_gaussian_of_a_noised_gaussian(process):
    """N(alpha mu, alpha² C + sigma²), from the pairs (x_0, eps) alone."""
    C = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    mu, t = torch.tensor([0.7, -0.2], dtype=F64), middle(process)
    truth = ExactMixture(process, torch.ones(1), mu[None], C[None])
    x0, eps, w = nodes(truth, t, n=4)
    net, (i, j) = bowl()
    alpha = process.alpha(t)
    P = torch.linalg.inv(alpha**2 * C + process.variance(t) * torch.eye(2, dtype=F64))
    exact = torch.cat([P[i, j], P @ (alpha * mu)])
    for objective in (Explicit(process, truth), Implicit(process), DenoisingAt(process)):

        def loss(score, objective=objective):
            return (w * objective(score, x0, eps, t)).sum()

        assert torch.allclose(minimiser(Energy(net), net, loss), exact, rtol=1e-8), objective


def test_an_energy_has_no_curl():
    net, _ = network(out=1, d=3)
    energy = Energy(lambda x, t: net(x).squeeze(1))
    t = time(0.0)
    for x in torch.randn(4, 3, dtype=F64):
        J = torch.func.jacrev(lambda y: energy(y[None], t)[0])(x).detach()
        assert torch.allclose(J, J.T, rtol=1e-12) and J.abs().max() > 1e-3
    free, _ = network(out=3, d=3)
    J = torch.func.jacrev(lambda y: free(y))(torch.randn(3, dtype=F64)).detach()
    assert not torch.allclose(J, J.T, rtol=0.1)  # what the energy is spared


@each
def test_the_energy_of_a_mixture_has_its_score(process):
    """Whether gradients are on, off or impossible; with times for each sample."""
    truth = mixture(process)
    energy = Energy(lambda x, t: -truth.log_prob(x, t))
    t = times(process, 5)
    x = process.noised(*torch.randn(2, 5, 2, dtype=F64), t)
    exact, near = truth(x, t), {"rtol": 1e-8, "atol": 1e-9}
    assert torch.allclose(energy(x, t), exact, **near), process
    assert torch.equal(energy.log_density(x, t), truth.log_prob(x, t))
    with torch.no_grad():
        assert torch.allclose(energy(x, t), exact, **near)
    with torch.inference_mode():
        assert torch.allclose(energy(1 * x, 1 * t), exact, **near)
    start = torch.randn(4, 2, dtype=F64)
    flows = [generate(process, score, start, steps=5) for score in (energy, truth)]
    assert torch.allclose(*flows, rtol=1e-5, atol=1e-6), process


def test_an_energy_trains():
    """Its loss reaches the parameters through three derivatives; without grad it has no graph."""
    net, _ = network(out=1)
    energy = Energy(lambda x, t: net(x).squeeze(1))
    energy.inner = net  # so that the parameters are its own
    x0 = torch.randn(6, 2, dtype=F64)
    for loss in (Implicit(Clean()), Sliced(Clean(), 2)):
        eps = Keyed(0).normal(0, loss.noise_shape(x0), x0)
        value = loss(energy, x0, eps, 0.0)
        slopes = torch.autograd.grad(value.sum(), list(net.parameters()), allow_unused=True)
        assert all(g.abs().max() > 0 for g in slopes[:-1])  # an energy's last bias is its constant
        with torch.no_grad():
            quiet = loss(energy, x0, eps, 0.0)
        with torch.inference_mode():
            still = loss(energy, 1 * x0, 1 * eps, time(0.0))
        assert not quiet.requires_grad
        assert torch.equal(quiet, value.detach()) and torch.equal(still, quiet)


# --- refusals


def test_what_cannot_be_meant_is_refused():
    vp, x0 = PROCESSES[0], torch.zeros(3, 2)

    def score(x, t):
        return -x

    with pytest.raises(KakusanError, match=r"\(3, 5, 2\).*got \(3, 2\)"):
        Sliced(vp, probes=4)(score, x0, x0, 0.5)
    with pytest.raises(KakusanError, match=r"\(\) or \(3,\), not \(2,\)"):
        Implicit(vp)(score, x0, x0, torch.tensor([0.1, 0.2]))
    with pytest.raises(KakusanError, match=r"a batch \(B, \*shape\), got \(3,\)"):
        Implicit(vp)(score, x0[:, 0], x0[:, 0], 0.5)
    with pytest.raises(KakusanError, match=r"the score is \(3,\)"):
        DenoisingAt(vp)(lambda x, t: x.sum(1), x0, x0, 0.5)
    with pytest.raises(KakusanError, match="sigma is 0 at t=0:"):
        DenoisingAt(vp)(score, x0, x0, torch.tensor([0.5, 0.0, 0.5]))
    with pytest.raises(KakusanError, match="under no_grad"):
        Implicit(vp)(torch.no_grad()(score), x0, x0, 0.5)
    with pytest.raises(UsageError, match="Implicit"):
        DenoisingAt(Clean())
    with pytest.raises(UsageError, match="same at all times"):
        OverTime(Implicit(Clean()))
    with pytest.raises(UsageError, match="at least one probe a sample, got 0"):
        Sliced(vp, probes=0)
    with pytest.raises(KakusanError, match=r"one number a state, \(3,\), .* \(3, 1\)"):
        Energy(lambda x, t: x.sum(1, keepdim=True))(x0, time(0.5))


def test_a_score_that_does_not_look_at_x_has_no_trace():
    """Parameters alone, no x: the trace is 0, and the gradient is still there."""
    c = torch.ones(2, dtype=F64, requires_grad=True)
    x0 = torch.randn(3, 2, dtype=F64)
    loss = Implicit(Clean())(lambda x, t: c.expand(x.shape), x0, x0, 0.0)
    assert torch.equal(loss, torch.ones(3, dtype=F64)) and math.isclose(loss.sum().item(), 3)
    assert torch.equal(torch.autograd.grad(loss.sum(), c)[0], 3 * c.detach())
