"""The zoo: every law that a process claims, against its own equation.

The Fokker-Planck equation binds densities to coefficients, the moment equations bind moments to
them, Stratonovich's binds flows, and reversibility binds the divergence: none needs a second
formula for the answer.
"""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from kakusan import Dense, KakusanError, gram_divergence, reverse
from kakusan.core.operators import NotElliptic
from kakusan.processes.sde import KnownTransition, Splittable
from kakusan.processes.zoo import (
    CIR,
    Brownian,
    CellModel,
    CriticallyDamped,
    DoubleWell,
    FitzHughNagumo,
    GeometricBrownian,
    Heston,
    Jacobi,
    Landmarks,
    Langevin,
    Lorenz,
    OrnsteinUhlenbeck,
    Swirl,
    Underdamped,
)
from kakusan.processes.zoo.laws import log_bessel, log_chi_square
from problems import F64, time


def energy(x):
    """Two wells and a saddle, coupled: nothing about it is even."""
    return ((x**2 - 1) ** 2).sum(1) + 0.3 * x[:, 0] * x[:, -1] ** 2 / 2 + 0.2 * x.sum(1)


DEFAULTS = [
    Brownian(), OrnsteinUhlenbeck(), CriticallyDamped(), GeometricBrownian(), CIR(), Heston(),
    Jacobi(), DoubleWell(), Langevin(energy, dim=2), Underdamped(energy, dim=2), FitzHughNagumo(),
    CellModel(), Landmarks(), Lorenz(), Swirl(),
]  # fmt: skip
SPIRAL = OrnsteinUhlenbeck([[0.8, -1.5], [0.9, 0.3]], [[0.7, 0.0], [0.4, 0.5]], mean=[0.5, -1.0])
PUSHED = OrnsteinUhlenbeck([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.5]], [0.0, 0.0, 1.0])
CORRELATED = GeometricBrownian([0.3, -0.1], [0.4, 0.7], [[1.0, -0.6], [-0.6, 1.0]])
GAUSSIAN = [
    Brownian(0.7), Brownian([[1.0, 0.2], [0.0, 0.5]]), OrnsteinUhlenbeck(-0.4, 1.5, 0.3),
    OrnsteinUhlenbeck([0.5, 2.0], [1.0, 0.3]), SPIRAL, PUSHED, CriticallyDamped(dim=2),
]  # fmt: skip
SQUARES = [CIR(), CIR(2.0, 0.2, 1.3), CIR([0.5, 1.0], [2.0, 1.0], 0.4), CIR(1.0, 1.0, 0.05)]
WITH_DENSITY = [*GAUSSIAN, GeometricBrownian(0.4, 0.6), CORRELATED, *SQUARES]
SETTLED = [
    OrnsteinUhlenbeck(0.5, 1.5, 0.3), SPIRAL, CriticallyDamped(dim=2), *SQUARES,
    Jacobi(), Jacobi(2.0, 0.3, 1.4), DoubleWell(1.0, dim=2), Langevin(energy, 0.7, dim=2),
    Underdamped(energy, 0.8, 0.7, 1.3, dim=2), Swirl(), Swirl(2.0, 1.5, -0.7, 0.8),
]  # fmt: skip
REVERSIBLE = [
    OrnsteinUhlenbeck([[1.0, 0.3], [0.3, 0.5]], 0.8), CIR(), CIR(2.0, 0.2, 1.3),
    Jacobi(2.0, 0.3, 1.4), DoubleWell(), Langevin(energy, 0.7, dim=2), Swirl(rotation=0.0),
]  # fmt: skip
SPLIT = [
    GeometricBrownian([0.3, -0.1], [0.4, 0.7]), CORRELATED, CIR(), CIR(1.0, 0.25, 1.0),
    Jacobi(), Jacobi(2.0, 0.3, 1.4), Heston(), DoubleWell(1.0),
]  # fmt: skip
POLYNOMIAL = [*WITH_DENSITY, Jacobi(), Jacobi(2.0, 0.3, 1.4), Heston()]
ALL = [*DEFAULTS, *WITH_DENSITY, *SETTLED, *SPLIT]


def each(processes):
    names = [f"{type(p).__name__}{i}" for i, p in enumerate(processes)]
    return pytest.mark.parametrize("process", processes, ids=names)


def states(process, n=7, seed=0, dtype=F64):
    """Random states inside the domain, away from its edge."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, *process.start.shape, generator=g, dtype=F64)
    if isinstance(process, (CIR, GeometricBrownian)):
        z = process.start * (0.4 * z).exp()
    elif isinstance(process, Jacobi):
        z = 0.1 + 0.8 * torch.special.ndtr(z)
    elif isinstance(process, Heston):
        z = torch.stack([z[:, 0], process.mean * (0.5 * z[:, 1]).exp()], 1)
    elif isinstance(process, DoubleWell):
        z = process.start + 0.3 * z
    else:
        z = process.start + 0.5 * z
    return z.to(dtype)


def increments(process, x, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(process.noise_shape(x), generator=g, dtype=F64).to(x.dtype)


def stationary_score(process):
    def score(x, t):
        y = x.detach().requires_grad_()
        return torch.autograd.grad(process.log_stationary(y).sum(), y)[0]

    return score


# --- conformance ------------------------------------------------------------------------------


@each(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_process_keeps_shapes_and_dtypes(process, dtype):
    assert process.start.dtype == F64 and process.start.ndim >= 1
    assert process.inside(process.start[None]).tolist() == [True], process
    assert process.span[1] > process.span[0] and repr(process).startswith(type(process).__name__)
    x, t = states(process, dtype=dtype), time(0.3)
    G, dw = process.diffusion(x, t), increments(process, x)
    for out in (process.drift(x, t), G.mv(dw), process.gram_divergence(x, t)):
        assert out.shape == x.shape and out.dtype == dtype, process
    assert G.tmv(x).shape == dw.shape
    if isinstance(process, KnownTransition):
        y = process.exact(x, t, time(0.5), 0.2**0.5 * dw, torch.Generator().manual_seed(0))
        assert y.shape == x.shape and y.dtype == dtype and y.isfinite().all(), process
    if isinstance(process, Splittable) and process != SQUARES[1]:  # which refuses: see below
        y = process.kick(process.flow(x, t, time(0.5)), t, 0.2**0.5 * dw)
        assert y.shape == x.shape and y.dtype == dtype, process
    for name, given in (("moments", (x, 0.5)), ("log_transition", (x, x, 0.5)),
                        ("log_stationary", (x,))):  # fmt: skip
        if hasattr(process, name) and process not in UNSETTLED:
            out = getattr(process, name)(*given)
            for part in out if isinstance(out, tuple) else (out,):
                assert part.dtype == dtype and len(part) == len(x), (process, name)


UNSETTLED = [PUSHED, OrnsteinUhlenbeck(-0.4, 1.5, 0.3), *GAUSSIAN]  # no law, or tested below


@each(DEFAULTS)
def test_euler_steps_stay_finite_and_trace_without_branches(process):
    """A tracer stops at any question to a tensor: no step depends on values in Python."""

    def step(x, t, dw):
        f = process.drift(x, t) + process.gram_divergence(x, t)
        return x + 1e-3 * f + process.diffusion(x, t).mv(dw)

    x, t = states(process), time(0.3)
    graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = graph(x, t, increments(process, x))
    for i in range(20):
        dw = 1e-3**0.5 * increments(process, x, seed=i)
        y = step(x, t, dw)
        assert torch.allclose(graph(x, t, dw), y, atol=1e-14)
        x = y
    assert x.isfinite().all(), process


@each(ALL)
def test_divergences_in_closed_form(process):
    x, t = states(process), time(0.3)
    exact = gram_divergence(process.diffusion, x, t)
    assert torch.allclose(process.gram_divergence(x, t), exact, atol=1e-13), process


def test_parameters_follow_to_single_precision_without_loss():
    x = torch.ones(1, 1, dtype=F64)
    assert Brownian(0.1).diffusion(x, time(0.0)).mv(x).item() == 0.1


# --- densities --------------------------------------------------------------------------------


def fokker_planck(process, log_p, x, t):
    """(∂_t p + ∇·(v p)) / p with v the velocity of the probability flow, over its own size."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    log = log_p(x, t)
    score = torch.autograd.grad(log.sum(), x, create_graph=True)[0]
    rate = torch.autograd.grad(log.sum(), t, retain_graph=True, allow_unused=True)[0]
    rate = torch.zeros(len(x), dtype=F64) if rate is None else rate
    v = process.gram_divergence(x, t) + process.diffusion(x, t).gram(score)
    v = process.drift(x, t) - v / 2
    spread = torch.zeros(len(x), dtype=F64)
    for i in range(x.shape[1]):
        if v.requires_grad:
            (grad,) = torch.autograd.grad(v[:, i].sum(), x, retain_graph=True, allow_unused=True)
            spread = spread + (0 if grad is None else grad[:, i])
    carried = v * score
    size = 1 + rate.abs() + spread.abs() + carried.abs().sum(1)
    return (rate + spread + carried.sum(1)) / size


@each(WITH_DENSITY)
@pytest.mark.parametrize("t", [0.05, 0.7, 3.0])
def test_transitions_solve_fokker_planck(process, t):
    x0, t = states(process, seed=3), torch.full((7,), t, dtype=F64)
    x = process.moments(x0, t).mean + 0.1 * states(process, seed=4)  # where the law is
    x = torch.where(process.inside(x)[:, None], x, states(process))
    out = fokker_planck(process, lambda x, t: process.log_transition(x, x0, t), x, t)
    assert out.abs().max() < 2e-9, process


@each(SETTLED)
def test_stationary_laws_solve_fokker_planck(process):
    x = states(process)
    out = fokker_planck(process, lambda x, t: process.log_stationary(x), x, x.new_zeros(len(x)))
    assert out.abs().max() < 1e-10, process


@each(WITH_DENSITY)
def test_scores_are_gradients_of_log_densities(process):
    x, x0, t = states(process), states(process, seed=3), torch.linspace(0.2, 3.0, 7, dtype=F64)
    y = x.clone().requires_grad_()
    (auto,) = torch.autograd.grad(process.log_transition(y, x0, t).sum(), y)
    assert torch.allclose(process.score_from(x0)(x, t), auto, rtol=1e-8, atol=1e-9), process


@pytest.mark.parametrize(
    "log_p, low, high",
    [
        (CIR(1.0, 1.0, 0.5).log_stationary, 0.0, 12.0),
        (Jacobi(2.0, 0.3, 0.7).log_stationary, 0.0, 1.0),
        (DoubleWell(5.0).log_stationary, -3.0, 3.0),
        (DoubleWell(0.1).log_stationary, -6.0, 6.0),
        (OrnsteinUhlenbeck(0.5, 1.5, 0.3).log_stationary, -15.0, 15.0),
        (lambda x: CIR().log_transition(x, torch.full_like(x, 0.3), 0.4), 0.0, 12.0),
        (lambda x: CIR().log_transition(x, torch.zeros_like(x), 0.4), 0.0, 12.0),
        (lambda x: GeometricBrownian().log_transition(x, torch.ones_like(x), 0.4), 0.0, 12.0),
    ],
)
def test_densities_integrate_to_one(log_p, low, high):
    u, w = np.polynomial.legendre.leggauss(400)
    x = torch.tensor((low + high) / 2 + (high - low) / 2 * u)[:, None]
    mass = (log_p(x).exp() * torch.tensor(w)).sum().item() * (high - low) / 2
    assert abs(mass - 1) < 1e-8


@each(REVERSIBLE)
def test_reversible_processes_run_backwards_as_forwards(process):
    x, t = states(process, n=20), time(0.3)
    backward = reverse(process, stationary_score(process)).drift(x, t)
    assert torch.allclose(backward, -process.drift(x, t), atol=1e-10), process


def test_the_swirl_turns_the_other_way():
    sde, other = Swirl(rotation=1.3), Swirl(rotation=-1.3)
    x, t = states(sde, n=20), time(0.3)
    backward = reverse(sde, stationary_score(sde)).drift(x, t)
    assert torch.allclose(backward, -other.drift(x, t), atol=1e-13)
    assert not torch.allclose(backward, -sde.drift(x, t), atol=0.1)


def test_underdamped_motion_is_reversible_when_momenta_change_sign():
    sde = Underdamped(energy, 0.8, 0.7, 1.3, dim=2)
    x, t, flip = states(sde, n=20), time(0.3), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)
    backward = reverse(sde, stationary_score(sde)).drift(x, t)
    assert torch.allclose(backward, -flip * sde.drift(flip * x, t), atol=1e-12)


def test_geometric_brownian_motion_backwards_in_closed_form():
    mu, sigma, v0, t = 0.4, 0.6, 0.25, 0.7
    sde, x = GeometricBrownian(mu, sigma), torch.tensor([[0.3], [1.0], [2.5]], dtype=F64)
    m, v = (mu - sigma**2 / 2) * t, v0 + sigma**2 * t
    back = reverse(sde, lambda x, t: -1 / x - (x.log() - m) / (v * x)).drift(x, time(t))
    closed = x * (mu - sigma**2 + sigma**2 * (x.log() - m) / v)
    assert torch.allclose(back, closed, atol=1e-14)


def test_the_expected_price_of_heston_grows_at_mu():
    """exp(X) is mapped by the generator to mu exp(X): f_X + D_XX / 2 = mu."""
    sde = Heston(mu=0.13)
    x, unit = states(sde), torch.tensor([[1.0, 0.0]], dtype=F64)
    D = sde.diffusion(x, time(0.0)).gram(unit.expand(len(x), 2))
    assert torch.allclose((sde.drift(x, time(0.0)) + D / 2)[:, 0], x.new_tensor(0.13))
    v = CIR(sde.rate, sde.mean, sde.sigma).moments(x[:, 1:], 0.7)
    both = sde.moments(x, 0.7)
    assert torch.allclose(v.mean[:, 0], both.mean[:, 1])
    assert torch.allclose(v.covariance[:, 0, 0], both.covariance[:, 1, 1])


# --- moments and draws ------------------------------------------------------------------------


@each(POLYNOMIAL)
def test_moments_solve_their_equations(process):
    """m' = f(m), C' = A C + C Aᵀ + E[D]: drifts are affine here, and D is quadratic at most."""
    x0, t, d = states(process, n=1), time(0.6), process.start.numel()

    def D(x):
        G = process.diffusion(x[None], t)
        return torch.stack([G.gram(e[None])[0] for e in torch.eye(d, dtype=F64)], 1)

    m, C = process.moments(x0, t)
    dm, dC = torch.func.jvp(lambda t: tuple(process.moments(x0, t)), (t,), (time(1.0),))[1]
    A = torch.func.jacrev(lambda x: process.drift(x[None], t)[0])(m[0])
    curvature = torch.func.jacfwd(torch.func.jacfwd(D))(m[0])
    mean_D = D(m[0]) + torch.einsum("ijkl,kl->ij", curvature, C[0]) / 2
    assert torch.allclose(dm, process.drift(m, t), atol=1e-10), process
    assert torch.allclose(dC[0], A @ C[0] + C[0] @ A.mT + mean_D, atol=1e-9), process
    start = process.moments(x0, 1e-9)
    assert torch.allclose(start.mean, x0, atol=1e-7)
    assert start.covariance.abs().max() < 1e-7


@each(POLYNOMIAL)
def test_moments_take_one_time_or_one_for_each(process):
    x0 = states(process, n=2)
    one = [process.moments(x0, t) for t in (0.3, 1.1)]
    both = process.moments(x0, torch.tensor([0.3, 1.1], dtype=F64))
    for i in range(2):
        assert torch.allclose(both.mean[i], one[i].mean[i], rtol=1e-12)
        assert torch.allclose(both.covariance[i], one[i].covariance[i], rtol=1e-10)


@each(WITH_DENSITY)
def test_draws_have_the_exact_moments(process):
    n, t, s = 20_000, time(0.2), time(1.1)
    x = states(process, n=1).expand(n, -1).contiguous()
    dw = (s - t).sqrt() * increments(process, x)
    y = process.exact(x, t, s, dw, torch.Generator().manual_seed(7))
    m, C = (c[0] for c in process.moments(x[:1], s - t))
    away = y - m
    assert (away.mean(0).abs() < 4 * (C.diagonal() / n).sqrt() + 1e-12).all(), process
    products = away[:, :, None] * away[:, None]
    error = 4 * products.std(0) / n**0.5 + 1e-12
    assert ((products.mean(0) - C).abs() < error).all(), process


@each([SPIRAL, PUSHED, CriticallyDamped(dim=2)])
@pytest.mark.parametrize("t, s", [(1e-4, 3e-4), (0.3, 0.9), (2.0, 30.0)])
def test_gaussian_transitions_compose(process, t, s):
    d = process.start.numel()
    zero, unit = torch.zeros(d, d, dtype=F64), torch.eye(d, dtype=F64)

    def kernel(t):
        E = (process.moments(unit, t).mean - process.moments(zero, t).mean).mT
        return E, process.moments(zero, t).covariance[0]

    (E, Q), (F, R), (H, S) = kernel(t), kernel(s), kernel(t + s)
    assert torch.allclose(F @ E, H, rtol=1e-10, atol=1e-13), process
    scale = S.diagonal().sqrt()
    error = (F @ Q @ F.mT + R - S) / (scale[:, None] * scale)
    assert error.abs().max() < 1e-11, process


def test_linear_processes_are_fitted_through_whatever_came_before():
    rate = torch.tensor([[1.0, 0.2], [0.0, 0.5]], dtype=F64, requires_grad=True)
    fitted, fixed, x = OrnsteinUhlenbeck(rate), OrnsteinUhlenbeck(rate.detach()), torch.ones(3, 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            fitted.moments(x.double(), 0.5), fixed.moments(x.double(), 0.5)
    assert torch.autograd.grad(fitted.log_transition(x, x, 0.5).sum(), rate)[0].abs().max() > 0
    t = time(0.5).requires_grad_()
    assert torch.autograd.grad(fixed.log_transition(x, x, t).sum(), t)[0].abs() > 0


def test_long_times_reach_the_stationary_law():
    x = states(SPIRAL)
    assert torch.allclose(SPIRAL.log_transition(x, x, 1e3), SPIRAL.log_stationary(x))
    cir = CIR()
    x = states(cir)
    assert torch.allclose(cir.log_transition(x, x, 60.0), cir.log_stationary(x))


@pytest.mark.parametrize("process", [Brownian(0.7), CORRELATED], ids=["Brownian", "GBM"])
def test_solutions_along_the_path_compose(process):
    x, g = states(process), torch.Generator()
    a, b = 0.3 * increments(process, x), 0.2 * increments(process, x, 2)
    t, s, r = time(0.1), time(0.4), time(0.8)
    twice = process.exact(process.exact(x, t, s, a, g), s, r, b, g)
    assert torch.allclose(twice, process.exact(x, t, r, a + b, g), rtol=1e-12)


def test_a_law_without_density_is_refused():
    flat = OrnsteinUhlenbeck(1.0, [[1.0], [1.0]])
    x = states(flat)
    y = flat.exact(x, time(0.0), time(0.5), increments(flat, x), torch.Generator())
    assert torch.allclose(
        (y - x)[:, 0], (y - x)[:, 1] + (x[:, 1] - x[:, 0]) * (1 - math.exp(-0.5))
    )
    with pytest.raises(NotElliptic, match="no density"):
        flat.log_transition(x, x, 0.5)


# --- Bessel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [-0.99, -0.5, -0.1, 0.0, 0.3, 1.0, 5.5, 20.0, 39.0, 41.0, 300.0])
def test_bessel_functions_agree_with_scipy(nu):
    z = np.r_[1e-8, 1e-3, 0.1, np.linspace(0.5, 60, 120), 1e2, 1e3, 1e4]
    ours = log_bessel(nu, torch.tensor(z) ** 2 / 4).numpy() + nu * np.log(z / 2) - z
    scaled = special.ive(nu, z)
    seen = scaled > 1e-290
    # both lose the digits that z has before the point
    error = np.abs(ours - np.log(scaled, where=seen, out=np.zeros_like(z)))[seen]
    assert (error < 1e-12 * (10 + z + abs(nu))[seen]).all(), nu


@pytest.mark.parametrize("df", [0.1, 1.0, 4.0, 31.0, 500.0])
@pytest.mark.parametrize("shift", [1e-12, 0.1, 30.0, 1e3, 1e6])
def test_chi_square_densities_as_mixtures_and_by_bessel_functions(df, shift):
    y = np.maximum(df + shift + np.linspace(-5, 5, 41) * math.sqrt(2 * (df + 2 * shift)), 1e-3)
    if shift <= 30:
        j = np.arange(300)[:, None]
        mixture = stats.poisson.logpmf(j, shift / 2) + stats.chi2.logpdf(y, df + 2 * j)
        truth = special.logsumexp(mixture, axis=0)
    else:
        nu, root = df / 2 - 1, np.sqrt(y * shift)
        truth = -((np.sqrt(y) - np.sqrt(shift)) ** 2) / 2 + np.log(special.ive(nu, root) / 2)
        truth += nu / 2 * np.log(y / shift)
    ours = log_chi_square(torch.tensor(y), df, torch.full((41,), shift, dtype=F64)).numpy()
    assert (np.abs(ours - truth) < 1e-10 * (1 + np.abs(truth))).all(), (df, shift)


@each(SQUARES[:2])
def test_cir_against_scipy(process):
    k, theta, sigma = process.rate, process.mean, process.sigma
    x, x0, t = np.linspace(0.01, 3, 50), 0.7, 0.4
    c = sigma**2 * (1 - math.exp(-k * t)) / (4 * k)
    law = stats.ncx2(4 * k * theta / sigma**2, x0 * math.exp(-k * t) / c, scale=c)
    ours = process.log_transition(torch.tensor(x)[:, None], torch.full((50, 1), x0), t)
    assert np.allclose(ours, law.logpdf(x), atol=1e-8), process
    start = torch.full((4000, 1), x0, dtype=F64)
    g = torch.Generator().manual_seed(2)
    draws = process.exact(start, time(0.0), time(t), start, g)
    # Kolmogorov's distance exceeds 1.95 / sqrt(n) once in a thousand
    assert stats.kstest(draws[:, 0].numpy(), law.cdf).statistic < 1.95 / 4000**0.5, process


@pytest.mark.parametrize("x0", [0.0, 0.7, 200.0])
def test_cir_is_differentiable_in_its_parameters(x0):
    x = torch.tensor([[0.4], [x0 + 0.1]], dtype=F64)
    start = torch.full_like(x, x0)

    def log_p(kappa, theta, sigma):
        return CIR(kappa, theta, sigma).log_transition(x, start, 0.5)

    given = [torch.tensor(c, dtype=F64, requires_grad=True) for c in (1.2, 0.8, 0.6)]
    assert torch.autograd.gradcheck(log_p, given, rtol=1e-5)


def test_cir_scores_in_the_parameters_average_to_zero():
    """E[∂ log p] = 0 at the truth: what maximum likelihood solves."""
    given = [torch.tensor(c, dtype=F64, requires_grad=True) for c in (1.2, 0.8, 0.6)]
    x0 = torch.full((4000, 1), 0.5, dtype=F64)
    x = CIR(1.2, 0.8, 0.6).exact(x0, time(0), time(0.5), x0, torch.Generator().manual_seed(0))
    log_p = CIR(*given).log_transition(x, x0, 0.5)
    for parameter in given:
        parts = [
            torch.autograd.grad(log_p[i::40].mean(), parameter, retain_graph=True)[0]
            for i in range(40)
        ]
        grads = torch.stack(parts)
        assert grads.mean().abs() < 4 * grads.std() / 40**0.5


# --- splittings -------------------------------------------------------------------------------


def noise_drift(process, x, t):
    """Σ_j (∂G_j) G_j, which is twice what Itô's drift has more than Stratonovich's."""
    shape = process.noise_shape(x)
    out = torch.zeros_like(x)
    for j in range(shape[1]):
        e = torch.zeros(shape, dtype=F64)
        e[:, j] = 1
        along = process.diffusion(x, t).mv(e)
        out += torch.func.jvp(lambda y, e=e: process.diffusion(y, t).mv(e), (x,), (along,))[1]
    return out


@each(SPLIT)
def test_splittings_solve_stratonovichs_equation(process):
    x, t = states(process), time(0.3)
    flowed, velocity = torch.func.jvp(lambda s: process.flow(x, t, s), (t,), (time(1.0),))
    assert torch.allclose(flowed, x, atol=1e-14)
    assert torch.allclose(velocity, process.drift(x, t) - noise_drift(process, x, t) / 2), process
    z = increments(process, x)
    kicked, velocity = torch.func.jvp(lambda w: process.kick(x, t, w), (0 * z,), (z,))
    assert torch.allclose(kicked, x, atol=1e-14)
    assert torch.allclose(velocity, process.diffusion(x, t).mv(z)), process


@each(SPLIT)
def test_splittings_are_flows(process):
    """Two steps are one step, so what holds at their start holds all along."""
    x, t, s, r = states(process), time(0.1), time(0.5), time(1.3)
    twice = process.flow(process.flow(x, t, s), s, r)
    assert torch.allclose(twice, process.flow(x, t, r), rtol=1e-12), process
    z = 0.1 * increments(process, x)
    twice = process.kick(process.kick(x, t, z), t, 2 * z)
    assert torch.allclose(twice, process.kick(x, t, 3 * z), rtol=1e-12), process


@each(SPLIT)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_splittings_keep_the_domain(process, dtype):
    x = states(process, n=500, dtype=dtype)
    for i in range(10):
        x = process.flow(x, time(0.0), time(0.5))
        assert process.inside(x).all(), process
        x = process.kick(x, time(0.0), 2 * increments(process, x, seed=i))
        assert process.inside(x).all() and x.isfinite().all(), process


def test_outside_the_domain_the_diffusion_is_not_a_number():
    for process, bad in ((CIR(), [-0.1]), (Jacobi(), [1.1]), (Heston(), [0.0, -0.1])):
        x = torch.tensor([bad], dtype=F64)
        assert process.inside(x).tolist() == [False] and process.domain
        assert process.diffusion(x, time(0.0)).mv(torch.ones_like(x)).isnan().any(), process


def test_flows_that_would_leave_the_domain_are_refused():
    for process in (CIR(1.0, 0.1, 1.0), Heston(rate=0.5), Jacobi(1.0, 0.1, 1.0)):
        with pytest.raises(KakusanError, match="only where"):
            process.flow(states(process), time(0.0), time(0.1))


# --- energies and shapes ----------------------------------------------------------------------


def test_energies_need_no_gradient_mode_and_keep_theirs():
    sde, well = (
        Langevin(lambda x: 5 * ((x**2 - 1) ** 2).sum(1), temperature=0.5),
        DoubleWell(dim=3),
    )
    x, t = states(well), time(0.0)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(sde.drift(x, t), well.drift(x, t), atol=1e-12)
            assert torch.allclose(sde.drift(x + 0, t), well.drift(x, t), atol=1e-12)
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sde.drift(y, t).sum(), y)
    assert torch.allclose(slope, 20 - 60 * x**2)
    for mode in (torch.no_grad, torch.enable_grad):  # and inside other derivatives
        with mode():
            along = torch.func.jvp(lambda x: sde.drift(x, t), (x,), (torch.ones_like(x),))[1]
            assert torch.allclose(along, slope)
            back = torch.func.vjp(lambda x: sde.drift(x, t), x)[1](torch.ones_like(x))[0]
            assert torch.allclose(back, slope)
        with mode(), forward_ad.dual_level():
            dual = sde.drift(forward_ad.make_dual(x, torch.ones_like(x)), t)
            assert torch.allclose(forward_ad.unpack_dual(dual).tangent, slope)
    assert torch.allclose(sde.diffusion(x, t).mv(x), well.diffusion(x, t).mv(x))


def test_energies_that_are_networks_are_fitted_through():
    net = torch.nn.Linear(2, 1, dtype=F64)
    x = torch.ones(3, 2, dtype=F64)
    force = Langevin(lambda x: net(x).squeeze(1) ** 2).drift(x, time(0.0))
    (grad,) = torch.autograd.grad(force.sum(), net.weight)
    assert grad.isfinite().all() and grad.abs().max() > 0


def test_pointwise_matrices_are_dense_ones():
    process = Landmarks(points=5)
    x, v = states(process), increments(process, states(process))
    G = process.diffusion(x, time(0.0))
    D = Dense(G.G)
    for name in ("mv", "tmv", "gram", "tsolve", "logabsdet"):
        assert torch.allclose(getattr(G, name)(v), getattr(D, name)(v), rtol=1e-7), name
    assert torch.allclose(G.scaled(2.0).mv(v), 2 * D.mv(v))
    assert process.start.shape == (5, 2) and Landmarks([[0.0, 1.0]]).start.tolist() == [[0.0, 1.0]]


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Brownian("far"), "sigma must be a number, a vector or a matrix, got 'far'"),
        (lambda: Brownian(math.nan), "sigma must be finite"),
        (lambda: Brownian(torch.ones(1, 1, 1)), r"got shape \(1, 1, 1\)"),
        (lambda: OrnsteinUhlenbeck([[1.0, 0.0]]), "rate must be a square matrix"),
        (lambda: OrnsteinUhlenbeck([1.0, 2.0], [1.0, 2.0, 3.0]), "rate has 2, sigma has 3"),
        (lambda: OrnsteinUhlenbeck(-1.0).log_stationary(torch.ones(1, 1)), "rate > 0, got -1.0"),
        (lambda: PUSHED.log_stationary(torch.ones(1, 3)), "eigenvalues have positive real"),
        (lambda: CriticallyDamped(beta=0.0), "beta must be larger than 0, got 0.0"),
        (lambda: CriticallyDamped(dim=0), "dim must be a whole number"),
        (lambda: GeometricBrownian(sigma=-0.2), "sigma must be larger than 0, got -0.2"),
        (lambda: GeometricBrownian(correlation=[[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: GeometricBrownian(correlation=[[1.0, 0.2], [0.1, 1.0]]), "symmetric"),
        (lambda: GeometricBrownian(correlation=0.5), "square matrix"),
        (lambda: CIR(mean=0.0), "mean must be larger than 0, got 0.0"),
        (lambda: Heston(rho=1.0), "rho must be smaller than 1, got 1.0"),
        (lambda: Heston(rate=[1.0, 2.0]), "rate must be one number"),
        (lambda: Jacobi(mean=1.5), "mean must be smaller than 1, got 1.5"),
        (lambda: DoubleWell(v=0), "v must be larger than 0"),
        (lambda: Langevin(3.0), "energy must be a function"),
        (lambda: Langevin(energy).start, "give it dim"),
        (lambda: Underdamped(energy, friction=0.0), "friction must be larger than 0"),
        (lambda: Lorenz(noise=-1.0), "noise must be at least 0, got -1.0"),
        (lambda: Landmarks(points=0), "points must be a whole number"),
        (lambda: Landmarks(points=[1.0, 2.0]), r"places in the plane \(N, 2\)"),
        (lambda: Swirl(ratio=0.0), "ratio must be larger than 0"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(KakusanError, match=message):
        make()


def test_processes_do_not_change():
    with pytest.raises(AttributeError):
        CIR().rate = 2.0
