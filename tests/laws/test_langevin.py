"""Langevin samplers: exact moments, detailed balance, acceptance, levels, and the corrector."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from kakusan import (
    EDM,
    SDE,
    VE,
    VP,
    Ancestral,
    CounterWithArea,
    Diagonal,
    DoubleWell,
    EulerMaruyama,
    ExactMixture,
    Fresh,
    KakusanError,
    Keyed,
    Langevin,
    Multistep,
    NotElliptic,
    Recorded,
    Scale,
    Underdamped,
    angle_grid,
    probability_flow,
    reverse,
    solve,
    tilt,
)
from kakusan.core import grids
from kakusan.core.noise import Wants
from kakusan.inference.metrics.distances import energy_distance
from kakusan.solvers.corrector import (
    NoiseLevel,
    PredictorCorrector,
    SignalToNoise,
    annealed_langevin,
    further_normals,
)
from kakusan.solvers.langevin import (
    BAOAB,
    MALA,
    Acceptance,
    Point,
    kinetic_langevin,
    langevin,
    log_ratio,
    second_normal,
)
from problems import F64, Reversible, gaussian, mixture, time

T0 = time(0.0)  # the time of the data


def normal_score(v):
    return lambda x: -x / v


def normal_log_density(v):
    return lambda x: -(x**2).flatten(1).sum(1) / (2 * v)


def column(*values):
    return torch.tensor(values, dtype=F64)[:, None]


def start(n, d=2, seed=1):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Balanced(Reversible):
    """Noise that is dense and depends on the state, with the stationary law N(0, I)."""

    def log_stationary(self, x):
        return -(x**2).sum(1) / 2


# --- the unadjusted sampler


@pytest.mark.parametrize("eps", [0.05, 0.5, 1.5])
def test_the_unadjusted_sampler_settles_in_a_wider_normal(eps):
    """v' = a² v' + b² with the a and b of the step itself: v / (1 - ε/2v)."""
    v = 1.3
    z = column(0.0, 0.0, 1.0)  # increments of variance ε
    moved = langevin(
        normal_score(v), column(0.0, 1.0, 0.0), 1, eps, noise=Recorded(math.sqrt(eps) * z[None])
    ).x.flatten()
    zero, a, b = moved.tolist()
    assert zero == 0
    assert math.isclose(b**2 / (1 - a**2), v / (1 - eps / (2 * v)), rel_tol=1e-12), (a, b)


def test_a_field_is_asked_at_one_time():
    process = VP()
    m, x = mixture(process), start(50)
    chain = langevin(m, x, 20, 0.01, at=0.3, noise=Fresh(0), keep=True, every=4)
    fixed = langevin(lambda x: m(x, time(0.3)), x, 20, 0.01, noise=Fresh(0))
    assert torch.equal(chain.x, fixed.x) and torch.equal(chain.trace[-1], chain.x)
    assert len(chain.trace) == 5 and (chain.acceptance == 1).all() and (chain.size == 0.01).all()
    late = langevin(m, x, 12, 0.01, at=0.3, warmup=8, noise=Fresh(0), keep=True, every=4)
    assert torch.equal(late.trace, chain.trace[2:])


# --- the adjusted sampler


@pytest.mark.parametrize("h", [0.05, 0.4])
def test_detailed_balance(h):
    """The ratio is that of densities of normal laws, and changes sign with the direction."""
    sde, n = Balanced(), 40
    x, y = start(n), start(n, seed=2)
    point = lambda x: Point(x, sde.drift(x, T0), sde.log_stationary(x))  # noqa: E731
    G, steps = (sde.diffusion(x, T0), sde.diffusion(y, T0)), torch.full((n,), h, dtype=F64)
    r = log_ratio(point(x), point(y), G, steps)
    back = log_ratio(point(y), point(x), G[::-1], steps)
    assert (r + back).abs().max() < 1e-12 * r.abs().max()

    def log_q(a, b):
        D = h * sde.diffusion(a, T0).G @ sde.diffusion(a, T0).G.mT
        return MultivariateNormal(a + h * sde.drift(a, T0), D).log_prob(b)

    truth = sde.log_stationary(y) + log_q(y, x) - sde.log_stationary(x) - log_q(x, y)
    assert torch.allclose(r, truth, rtol=1e-9)


def test_steps_are_taken_with_the_probability_of_the_ratio():
    """One step from one state: the share taken, near a given y, is min(1, e^r) on average."""
    n, v, eps = 200_000, 1.0, 1.6
    x = torch.full((n, 1), 0.4, dtype=F64)
    chain = langevin(normal_score(v), x, 1, eps, log_density=normal_log_density(v), noise=Fresh(0))
    # by quadrature over the proposal: r = ε (|s(x)|² - |s(y)|²) / 4 for the normal law
    z = torch.linspace(-9, 9, 20_001, dtype=F64)
    y = 0.4 * (1 - eps) + math.sqrt(2 * eps) * z
    a = (eps / 4 * (0.4**2 - y**2)).clamp(max=0).exp()
    share = torch.trapezoid(a * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), z).item()
    se = math.sqrt(share * (1 - share) / n)
    assert abs(chain.acceptance.mean().item() - share) < 4 * se, share
    stayed = (chain.x == x).double().mean().item()
    assert math.isclose(stayed, 1 - chain.acceptance.mean().item(), abs_tol=1e-12)


def _moments_are_those_of(x, truth, what):
    """Means of x, x² and cos(3x) of independent chains, against exact samples': 4 SE of both."""
    for name, g in (("x", lambda x: x), ("x²", lambda x: x * x), ("cos", lambda x: (3 * x).cos())):
        a, b = g(x), g(truth)
        se = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * se).all(), (what, name, a.mean(0), b.mean(0))


def test_the_adjusted_law_is_exact_where_the_unadjusted_is_not():
    """A mixture, started in its law: 40 long steps leave it there."""
    m, n = mixture(VP()), 20_000
    x, truth = (m.sample(n, torch.Generator().manual_seed(k)) for k in (0, 1))
    log_density = lambda x: m.log_prob(x, T0)  # noqa: E731
    score = lambda x: m(x, T0)  # noqa: E731
    chain = langevin(score, x, 40, 0.1, log_density=log_density, noise=Fresh(0))
    assert 0.3 < chain.acceptance.mean() < 0.9
    _moments_are_those_of(chain.x, truth, "adjusted")
    plain = langevin(score, x, 40, 0.1, noise=Fresh(0)).x
    with pytest.raises(AssertionError):
        _moments_are_those_of(plain, truth, "unadjusted")


def test_noise_that_depends_on_the_state_is_adjusted_too():
    sde, n = Balanced(), 4_000
    report = Acceptance()
    x = solve(sde, start(n), grids.uniform(0, 4, 8), MALA(report=report), Fresh(0)).end
    assert 0.3 < report.rate.mean() < 0.9
    for k, m in ((1, 0), (2, 1), (4, 3)):
        se = (x**k).std(0) / math.sqrt(n)
        assert (((x**k).mean(0) - m).abs() < 4 * se).all(), (k, (x**k).mean(0), se)


def test_an_energy_is_sampled_from_a_far_start():
    """A double well by its zoo process; the second moment by quadrature."""
    well, n = DoubleWell(v=1.0), 4_000
    x = torch.full((n, 1), 3.0, dtype=F64)
    x = solve(well, x, grids.uniform(0, 100, 400), MALA(warmup=100), Fresh(0)).end
    y = torch.linspace(-4, 4, 20_001, dtype=F64)
    p = well.log_stationary(y[:, None]).exp()
    second = torch.trapezoid(y**2 * p, y).item()
    assert abs((x**2).mean() - second) < 4 * (x**2).std() / math.sqrt(n)
    assert abs(x.mean()) < 4 * x.std() / math.sqrt(n)


@pytest.mark.parametrize("target", [0.574, 0.85])
@pytest.mark.parametrize("guess", [1e-3, 20.0])
def test_the_warm_up_finds_the_acceptance_wanted(target, guess):
    fields = {"log_density": normal_log_density(1.3), "target": target, "warmup": 500}
    chain = langevin(normal_score(1.3), start(200, 8), 300, guess, **fields, noise=Fresh(0))
    assert abs(chain.acceptance.mean() - target) < 0.02, chain.acceptance.mean()
    assert chain.size.std() / chain.size.mean() < 0.3


def test_the_warm_up_finds_the_acceptance_wanted_on_a_mixture():
    m = mixture(VP())
    fields = {"log_density": m.log_prob, "at": 0.05, "warmup": 300}
    chain = langevin(m, m.sample(200), 200, 1.0, **fields, noise=Fresh(0))
    assert abs(chain.acceptance.mean() - 0.574) < 0.02, chain.acceptance.mean()


def test_a_chain_does_not_depend_on_its_batch_mates():
    """States, step sizes and acceptances, bit for bit."""
    x = start(130)

    def run(x, first):
        options = {"log_density": normal_log_density(1.0), "warmup": 20}
        return langevin(normal_score(1.0), x, 20, 0.3, **options, noise=Keyed(0, first=first))

    whole, part = run(x, 0), run(x[50:], 50)
    for a, b in zip(whole[:3], part[:3], strict=True):
        assert torch.equal(a[50:], b)


def test_steps_that_fail_are_refused_and_sizes_stay_after_the_warm_up():
    """A density that ends: proposals beyond it have no density, or no finite one."""
    half = lambda x: torch.where(x[:, 0] > 0, -x[:, 0], float("nan"))  # noqa: E731
    x = torch.ones(2000, 1, dtype=F64)
    chain = langevin(lambda x: -torch.ones_like(x), x, 400, 1.0, log_density=half, warmup=100,
                     noise=Fresh(0), keep=True)  # fmt: skip
    assert (chain.trace > 0).all()
    assert abs(chain.x.mean() - 1) < 4 * chain.x.std() / math.sqrt(len(x))
    moved = (chain.trace[1:] != chain.trace[:-1]).double().mean((0, 2))
    assert (moved - chain.acceptance).abs().max() < 1 / 300


def test_the_area_gives_a_second_normal():
    for noise in (Fresh(0), Keyed(0), CounterWithArea(0, cell=0.25)):
        dw = noise.want(Wants.AREA, 3, 1.0, 0.75, (20_000, 2), torch.empty(0, dtype=F64))
        y = second_normal(dw, -0.25)
        n = y.numel()
        assert abs(y.mean()) < 4 / math.sqrt(n) and abs(y.var() - 1) < 4 * math.sqrt(2 / n), noise
        assert abs((y * dw[0]).mean()) < 4 * 0.5 / math.sqrt(n), noise


# --- inertia


def _affine(method, k, m, gamma, T, h):
    """The matrix and the noise column of a step in the energy k q² / 2, found by doing it."""
    sde = Underdamped(lambda q: k * (q**2).sum(1) / 2, gamma, T, m)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=F64)
    dw = torch.zeros(1, 3, 2, dtype=F64)
    dw[0, 2, 1] = math.sqrt(h)
    end = solve(sde, x, torch.tensor([0.0, h], dtype=F64), method, Recorded(dw)).end
    return end[:2].mT, end[2]


def _settled(A, b):
    """The S with S = A S Aᵀ + b bᵀ."""
    n = len(b)
    S = torch.linalg.solve(torch.eye(n * n, dtype=F64) - torch.kron(A, A), torch.kron(b, b))
    return S.reshape(n, n)


@pytest.mark.parametrize("h", [0.1, 0.7, 1.4])
def test_positions_of_baoab_have_the_exact_law_in_a_quadratic_energy(h):
    k, m, gamma, T = 1.7, 1.2, 0.8, 0.6
    S = _settled(*_affine(BAOAB(), k, m, gamma, T, h))
    truth = torch.tensor([[T / k, 0], [0, m * T * (1 - h**2 * k / (4 * m))]], dtype=F64)
    assert torch.allclose(S, truth, rtol=1e-11, atol=1e-12), (S, truth)


def test_baoab_has_weak_order_two():
    """Mean and covariance after a time of 2, against the matrix exponential."""
    k, m, gamma, T = 1.7, 1.2, 0.8, 0.6
    M = torch.tensor([[0, 1 / m], [-k, -gamma]], dtype=F64)
    E = torch.linalg.matrix_exp(2.0 * M)
    rest = torch.diag(torch.tensor([T / k, m * T], dtype=F64))
    C = rest - E @ rest @ E.mT  # from a point
    errors = []
    for n in (16, 32, 64):
        A, b = _affine(BAOAB(), k, m, gamma, T, 2.0 / n)
        P, S = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
        for _ in range(n):
            P, S = A @ P, A @ S @ A.mT + b[:, None] * b
        errors.append([(P - E).abs().max().item(), (S - C).abs().max().item()])
    for before, after in zip(errors, errors[1:], strict=False):
        orders = [math.log2(a / b) for a, b in zip(before, after, strict=True)]
        assert all(abs(order - 2) < 0.1 for order in orders), orders


def test_kinetic_langevin_is_baoab_in_the_energy_of_the_target():
    m, x = mixture(VP()), start(40)
    log_density = lambda q: m.log_prob(q, time(0.1))  # noqa: E731
    chain = kinetic_langevin(m, x, 30, 0.2, friction=1.5, mass=0.7, at=0.1, noise=Fresh(0))
    sde = Underdamped(lambda q: -log_density(q), 1.5, mass=0.7)
    still = torch.cat([x, 0 * x], 1)
    with torch.no_grad():
        truth = solve(sde, still, grids.uniform(0, 6, 30), BAOAB(), Fresh(0)).end[:, :2]
    assert torch.allclose(chain.x, truth, atol=1e-10)


def test_kinetic_langevin_samples_a_mixture_in_few_steps():
    m, n = mixture(VP()), 10_000
    x, truth = m.sample(n, torch.Generator().manual_seed(0)), m.sample(n)
    chain = kinetic_langevin(m, x, 40, 0.1, at=0.0, noise=Fresh(0), keep=True, every=20)
    _moments_are_those_of(chain.x, truth, "kinetic")
    assert chain.trace.shape == (2, n, 2)
    image = kinetic_langevin(normal_score(1.0), torch.ones(3, 2, 4, 4), 3, keep=True)
    assert image.x.shape == (3, 2, 4, 4) and image.trace.shape == (3, 3, 2, 4, 4)


# --- annealing


def far_modes(process):
    means = torch.tensor([[-6.0, 0.0], [6.0, 0.0]], dtype=F64)
    return ExactMixture(
        process, torch.tensor([0.8, 0.2]), means, 0.09 * torch.eye(2).repeat(2, 1, 1)
    )


def test_annealing_finds_the_weights_that_plain_steps_never_do():
    """Modes 40 standard deviations apart; 0.2 of the mass is right."""
    process, n = EDM(), 1500
    m = far_modes(process)
    times = torch.logspace(math.log10(20), -2, 25, dtype=F64)
    x = annealed_langevin(process, m, 20 * start(n), times, steps=20, noise=Fresh(0))
    share = (x[:, 0] > 0).double().mean().item()
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n), share
    # widths within modes: 0.3, up to what the last levels have not forgotten
    offset = (x - torch.tensor([6.0, 0.0]) * x[:, :1].sign()).std(0)
    assert ((offset - 0.3).abs() < 0.05).all(), offset
    left = torch.tensor([-6.0, 0.0], dtype=F64).expand(n, 2)
    plain = langevin(m, left, 500, 0.02, at=1e-2, noise=Fresh(0)).x
    assert (plain[:, 0] < 0).all()


def test_levels_of_vp_are_those_of_ve():
    """In y = x / alpha the two are one sampler."""
    vp, edm = VP(), EDM()
    times = torch.tensor([0.8, 0.5, 0.2, 0.05], dtype=F64)
    levels = vp.sigma(times) / vp.alpha(times)
    x = levels[0] * start(50)
    a, b = (
        annealed_langevin(p, mixture(p), x1, at, steps=5, noise=Fresh(0))
        for p, x1, at in ((vp, vp.alpha(times[0]) * x, times), (edm, x, levels))
    )
    assert torch.allclose(a / vp.alpha(times[-1]), b, atol=1e-10)


def test_steps_at_a_level_are_those_of_ncsn():
    """ε_i = ε (sigma_i / sigma_L)² with ε = c sigma_L²."""
    edm, c = EDM(), 0.07
    m, x = mixture(edm), start(6)
    times, dw = torch.tensor([2.0, 0.3], dtype=F64), torch.randn(4, 6, 2, dtype=F64)
    end = annealed_langevin(edm, m, x, times, 2, NoiseLevel(c), Recorded(dw))
    smallest = c * 0.3**2
    for k, z in enumerate(dw):
        t = times[k // 2]
        eps = smallest * (t / 0.3) ** 2
        x = x + eps * m(x, t) + (2 * eps).sqrt() * z
    assert torch.allclose(end, x, atol=1e-12)


# --- the corrector


def _reverse(process, seed=0, n=50):
    grid = angle_grid(process, process.span[1], 0.0, 10, 1.5)
    return (
        reverse(process, mixture(process)),
        process.sigma(time(process.span[1])) * start(n),
        grid,
    )


def test_a_corrector_of_no_length_is_the_predictor():
    sde, x, grid = _reverse(VP())
    h = grid.diff().abs().reshape(-1, 1, 1)
    dw, y = (h.sqrt() * torch.randn(10, 50, 2, dtype=F64) for _ in range(2))
    given = Recorded(dw, dz=h / 2 * (dw + y / math.sqrt(3)))
    for predictor in (Ancestral(), EulerMaruyama()):
        alone = solve(sde, x, grid[:-1], predictor, given).end
        for rule in (SignalToNoise(0.0), NoiseLevel(0.0)):
            both = PredictorCorrector(predictor, rule, steps=2)
            assert torch.equal(solve(sde, x, grid[:-1], both, given).end, alone), (predictor, rule)
        rest = [alone]
        for r in (1e-3, 1e-4):
            both = PredictorCorrector(predictor, SignalToNoise(r))
            rest.append((solve(sde, x, grid[:-1], both, given).end - alone).abs().max())
        assert rest[2] < rest[1] / 5, rest[1:]


@pytest.mark.parametrize("process", [VP(), VE(0.01, 5.0)], ids=["VP", "VE"])
def test_a_corrector_leaves_the_variance_up_to_its_square(process):
    """Affine by doing it: (1 - ε/v)² of what the predictor gives, and 2ε."""
    t, s, c, K = time(0.6), time(0.5), 0.3, 2
    v0 = 0.36
    score = gaussian(process, mean=0.0, variance=v0)
    v = process.alpha(s) ** 2 * v0 + process.variance(s)
    eps = c * process.variance(s)
    x, grid, h = column(1.0, 0.0, 0.0, 0.0), torch.stack([t, s]), (t - s).item()
    w, y = column(0.0, 1.0, 0.0, 0.0)[None], column(0.0, 0.0, 1.0, 0.0)[None]
    given = Recorded(w, dz=h / 2 * (w + y * math.sqrt(h) / math.sqrt(3)))
    sde = reverse(process, score)
    a, b, _, _ = solve(sde, x, grid, Ancestral(), given).end.flatten()
    A, B, first, _ = solve(
        sde, x, grid, PredictorCorrector(Ancestral(), NoiseLevel(c)), given
    ).end.flatten()
    shrink = 1 - eps / v
    for found, truth in ((A, a * shrink), (B, b * shrink), (first, (2 * eps).sqrt())):
        assert torch.allclose(found, truth, atol=1e-12)
    after = shrink**2 * v + first**2
    assert torch.allclose(after, v + eps**2 / v)  # v again, up to ε²
    # K corrections draw K numbers: the variance of many samples
    n = 40_000
    start_x = (process.alpha(t) ** 2 * v0 + process.variance(t)).sqrt() * start(n, 1)
    end = solve(
        sde, start_x, grid, PredictorCorrector(Ancestral(), NoiseLevel(c), K), Fresh(0)
    ).end
    before = a**2 * start_x.var() + b**2 * h
    truth = before
    for _ in range(K):
        truth = shrink**2 * truth + 2 * eps
    assert abs(end.var() / truth - 1) < 4 * math.sqrt(2 / n), (end.var(), truth)


def test_the_signal_to_noise_rule_is_of_each_sample():
    """Song's formula by hand, and the same bits in any batch."""
    s, z = start(5, 6), start(5, 6, seed=2)
    size = SignalToNoise(0.16).size(s, z, None)
    for i in range(5):
        assert math.isclose(size[i], 2 * (0.16 * z[i].norm() / s[i].norm()) ** 2, rel_tol=1e-12)
    sde, x, grid = _reverse(VP(), n=130)
    for rule in (SignalToNoise(), NoiseLevel()):
        method = PredictorCorrector(rule=rule, steps=3)
        whole = solve(sde, x, grid, method, Keyed(0)).end
        part = solve(sde, x[70:], grid, method, Keyed(0, first=70)).end
        assert torch.equal(whole[70:], part), rule


def test_a_corrector_mends_coarse_steps():
    """10 steps of DDPM's sampler on a mixture: the energy distance before and after."""
    process, n = VP(), 2_500
    m = mixture(process)
    data = m.sample(n, torch.Generator().manual_seed(5))
    grid = angle_grid(process, 1.0, 0.0, 10, 1.5)

    def distance(method):
        x = solve(reverse(process, m), start(n), grid, method, Fresh(3)).end
        return energy_distance(x, data)

    alone, mended = distance(Ancestral()), distance(PredictorCorrector(rule=NoiseLevel(0.5)))
    gap = 3 * math.hypot(alone.std_error, mended.std_error)
    assert alone.value - mended.value > gap, (alone, mended)
    assert mended.value < 0.3 * alone.value, (alone, mended)


def test_further_normals_are_normal_and_independent():
    z = start(60_000, 3)
    for dtype in (F64, torch.float32):
        many = [z.to(dtype), *(further_normals(z.to(dtype), k) for k in (1, 2))]
        flat = torch.cat(many, 1).double()
        n = len(flat)
        assert (flat.mean(0).abs() < 4.5 / math.sqrt(n)).all()
        assert (flat.T.cov() - torch.eye(9)).abs().max() < 4.5 * math.sqrt(2 / n)
        squares = (flat**2).T.corrcoef() - torch.eye(9)
        assert squares.abs().max() < 4.5 / math.sqrt(n)
        assert ((flat**4).mean(0) - 3).abs().max() < 4.5 * math.sqrt(96 / n)
        assert many[1].dtype == dtype and torch.equal(further_normals(many[0][7:], 2), many[2][7:])


def test_tilts_are_corrected_by_the_tilted_score():
    process, m = VP(), mixture(VP())
    u = lambda x, t: -0.3 * x  # noqa: E731
    grid, x = torch.linspace(1.0, 0.1, 8, dtype=F64), start(20)
    method = PredictorCorrector(EulerMaruyama(), NoiseLevel(0.1))
    a = solve(tilt(reverse(process, m), u), x, grid, method, Fresh(0)).end
    b = solve(reverse(process, lambda x, t: m(x, t) + u(x, t)), x, grid, method, Fresh(0)).end
    assert torch.allclose(a, b, atol=1e-10)


# --- what is refused, and in which words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0.0}, r"the step size must be larger than 0, got 0"),
        ({"size": -0.1}, r"the step size must be larger than 0, got -0.1"),
        ({"target": 1.0}, r"the acceptance target must be smaller than 1, got 1"),
        ({"target": 0.0}, r"the acceptance target must be larger than 0, got 0"),
        ({"steps": 0}, r"steps must be a whole number of at least 1, got 0"),
        ({"warmup": -1}, r"warmup must be a whole number"),
    ],
)
def test_bad_numbers_are_refused(options, words):
    given = {"steps": 5, "size": 0.1, **options}
    with pytest.raises(KakusanError, match=words):
        langevin(normal_score(1.0), start(4), **given)


def test_bad_targets_are_refused():
    x, grid = start(4), grids.uniform(0, 1, 3)
    with pytest.raises(KakusanError, match=r"has no log_stationary\(x\): give langevin a log_den"):
        solve(SDE.of(lambda x, t: -x, Scale(1.0)), x, grid, MALA())
    lost = lambda x: torch.where(x[:, 0] > x[2, 0] - 1e-9, -math.inf, 0.0)  # noqa: E731
    words = r"chain \d of 4 starts where the log density is -inf; start where"
    with pytest.raises(KakusanError, match=words):
        langevin(normal_score(1.0), x, 3, log_density=lost)
    with pytest.raises(KakusanError, match=r"one number a state, \(4,\), got \(4, 2\)"):
        langevin(normal_score(1.0), x, 3, log_density=lambda x: -(x**2))
    with pytest.raises(NotElliptic, match="noise in every direction, and G, a Diagonal"):
        solve(Underdamped(lambda q: (q**2).sum(1)), x, grid, MALA())
    with pytest.raises(KakusanError, match="BAOAB steps Underdamped, .* got Langevin; Euler"):
        solve(Langevin(lambda q: (q**2).sum(1)), x, grid, BAOAB())


def test_a_chain_that_runs_away_is_named():
    words = (
        r"with Langevin steps of size 3, path 1 of 2 is no longer finite at t=\d+ \(step \d+ of "
        r"400 of EulerMaruyama\); its last good state was .*; take smaller steps"
    )
    x = torch.tensor([[0.0], [1.0]], dtype=F64)
    with pytest.raises(KakusanError, match=words):
        langevin(lambda x: -(x**3), x, 400, 3.0, noise=Recorded(torch.zeros(400, 2, 1)))


def test_bad_correctors_are_refused():
    sde, x, grid = _reverse(VP())
    with pytest.raises(KakusanError, match=r"Multistep extrapolates velocities of states that"):
        PredictorCorrector(Multistep(2))
    with pytest.raises(KakusanError, match=r"takes Itô increments alone, and MALA wants more"):
        PredictorCorrector(MALA())
    with pytest.raises(KakusanError, match=r"a flow brings none: reverse\(sde, score, noise=1e-6"):
        solve(probability_flow(VP(), mixture(VP())), x, grid, PredictorCorrector())
    with pytest.raises(KakusanError, match=r"the score of a reversed process, .* got VP"):
        solve(VP(), x, grid.flip(0)[1:], PredictorCorrector(EulerMaruyama()))
    with pytest.raises(KakusanError, match=r"c of NoiseLevel must be smaller than 2, got 2"):
        NoiseLevel(2.0)
    with pytest.raises(KakusanError, match=r"r of SignalToNoise must be at least 0, got -1"):
        SignalToNoise(-1.0)
    other = SDE.of(lambda x, t: -x, Diagonal(torch.ones(2)))
    back = reverse(other, lambda x, t: -x)
    with pytest.raises(KakusanError, match=r"which a LinearSDE has; SignalToNoise takes any"):
        solve(back, x, grids.uniform(1, 0, 4), PredictorCorrector(EulerMaruyama()))
    method = PredictorCorrector(EulerMaruyama(), SignalToNoise())
    assert solve(back, x, grids.uniform(1, 0, 4), method, Fresh(0)).end.isfinite().all()


@pytest.mark.parametrize("times", [[], [0.1, 0.5], [0.5, 0.0]])
def test_bad_levels_are_refused(times):
    with pytest.raises(KakusanError, match=r"levels are falling times with some noise"):
        annealed_langevin(VP(), mixture(VP()), start(4), times)
