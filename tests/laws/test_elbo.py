"""DDPM in full: tables, chains, and the bound, against closed forms for Gaussian data."""

import math

import pytest
import torch

from kakusan import (
    DDPM,
    EDM,
    MLP,
    VE,
    VP,
    Cosine,
    Denoiser,
    Denoising,
    DiffusionModel,
    ExactMixture,
    KakusanError,
    Keyed,
    Likelihood,
    UNet,
    UniformTimes,
    UsageError,
)
from kakusan.objectives.chain import (
    Analytic,
    Chain,
    Interpolated,
    Large,
    Small,
    asking,
    divergence,
    miss,
)
from kakusan.objectives.decoders import DiscretisedGaussian, GaussianDecoder
from kakusan.objectives.elbo import Clock, LogSine, bound, continuous_bound, expected
from kakusan.objectives.variational import (
    Hybrid,
    ImportanceTimes,
    Knots,
    Simple,
    StratifiedKnots,
    Variational,
    WeightedKnots,
)
from kakusan.pictures import elbo_terms
from kakusan.processes import betas
from kakusan.processes.betas import LearnedSchedule
from kakusan.training.config import configure
from problems import F64, NAMES, PROCESSES, gaussian, mixture, time

MU, S2 = 0.7, 0.36
TABLES = (betas.linear, betas.cosine, betas.sigmoid)
each = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
each_table = pytest.mark.parametrize("table", TABLES)


def ddpm(T, table=betas.linear):
    return VP.from_betas(table(T))


def data(n, d=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return MU + math.sqrt(S2) * torch.randn(n, d, generator=g, dtype=F64)


def normal_kl(mean, variance, other):
    """KL(N(mean, variance) || N(0, other))."""
    return 0.5 * (math.log(other / variance) + (variance + mean**2) / other - 1)


def exact_variance(chain):
    """Cov(x_s | x_t) of N(MU, S2) data: beta v_s / v_t."""
    step = chain.table()
    v = step.alpha**2 * S2 + step.sigma**2
    before = torch.cat([torch.tensor([S2], dtype=F64), v[:-1]])
    # the first step leads to the data, whatever alpha is at the first knot
    factor = torch.cat([step.alpha[:1], step.alpha[1:] / step.alpha[:-1]])
    assert torch.allclose(factor**2 * before + step.beta, v)
    return step.beta * before / v


def closed_form(chain, variance):
    """E[-bound] for N(MU, S2) data and the exact score, of any table of variances."""
    step, best = chain.table(), exact_variance(chain)
    T = chain.times[-1]
    alpha, sigma2 = (c.item() for c in (chain.process.alpha(T), chain.process.variance(T)))
    gap = normal_kl(alpha * MU, alpha**2 * S2 + sigma2, alpha**2 + sigma2)
    steps = 0.5 * ((variance / best).log() + best / variance - 1).sum().item()
    assert step.t.shape == variance.shape
    return 0.5 * math.log(2 * math.pi * math.e * S2) + gap + steps


def limit(process):
    """The same for infinitely many steps, from the start of the span."""
    lo, hi = (process.span[0], process.span[1])
    g0, g1 = ((process.variance(time(t)) / process.alpha(time(t)) ** 2).item() for t in (lo, hi))
    alpha, sigma2 = process.alpha(time(hi)).item(), process.variance(time(hi)).item()
    whole = alpha**2 + sigma2
    prior = 0.5 * (alpha**2 / whole * (MU**2 + S2) + sigma2 / whole - 1 - math.log(sigma2 / whole))
    terms = 0.5 * (math.log(g1 / g0) - math.log((S2 + g1) / (S2 + g0)))
    decoder = 0.5 * math.log(2 * math.pi * math.e * g0)
    return prior + terms + decoder


# --- tables


@each_table
def test_tables_rise_and_end_in_noise_at_any_length(table):
    ends = []
    for N in (10, 50, 1000):
        b = table(N)
        assert b.shape == (N,) and b.dtype == F64 and (0 < b).all() and (b < 1).all(), table
        process = VP.from_betas(b)
        assert isinstance(process, DDPM)
        ends.append(process.alpha(time(1.0)).item())
        assert torch.allclose(process.alpha(process.knots().flip(0)[1:]) ** 2, (1 - b).cumprod(0))
    assert max(ends) < 0.07, (table, ends)
    with pytest.raises(KakusanError, match="at least one step"):
        table(0)


def test_tables_are_their_formulas():
    f = torch.cos((torch.linspace(0, 1, 101, dtype=F64) + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha2 = (1 - betas.cosine(100)).cumprod(0)
    assert torch.allclose(alpha2[:-1], (f / f[0])[1:-1])
    assert betas.cosine(100)[-1] == betas.sigmoid(100)[-1] == 0.999
    alpha2 = (1 - betas.sigmoid(100)).cumprod(0)
    assert abs(alpha2[49] - 0.5) < 1e-12  # a logistic curve is odd about its middle
    assert torch.equal(betas.linear(1000), torch.linspace(1e-4, 0.02, 1000, dtype=F64))


# --- the chain


@each
def test_the_posterior_is_bayes_rule(process):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0), by the moments of x_s, x_t."""
    chain = Chain(process, 12)
    step = chain.table()
    for k in range(1, 12):
        s, t = chain.times[k - 1], chain.times[k]
        a, beta = process.transition(s, t)
        vs, vt = process.variance(s), process.variance(t)
        gain = a * vs / vt  # of x_s on x_t
        assert torch.allclose(step.ct[k], gain) and torch.allclose(step.beta[k], beta), process
        c0 = process.alpha(s) - gain * process.alpha(t)
        assert torch.allclose(step.c0[k], c0, rtol=1e-6, atol=1e-12), process
        assert torch.allclose(step.tilde[k], vs - gain * a * vs, rtol=1e-6, atol=1e-12), process
    # the first step leads to the data: its mean is x_0 itself, without noise
    assert step.c0[0] == 1 and step.ct[0] == 0 == step.tilde[0] and step.floor[0] > 0


def test_ddpm_is_a_case_of_it():
    b = betas.linear(50)
    chain = Chain(VP.from_betas(b))
    step, alpha2 = chain.table(), (1 - b).cumprod(0)
    before = torch.cat([alpha2.new_ones(1), alpha2[:-1]])
    assert torch.allclose(step.beta, b)
    assert torch.allclose(step.tilde, b * (1 - before) / (1 - alpha2))
    assert torch.allclose(step.c0, before.sqrt() * b / (1 - alpha2))
    assert torch.allclose(step.ct, (1 - b).sqrt() * (1 - before) / (1 - alpha2))
    assert torch.equal(chain.index(chain.times), torch.arange(50))
    assert len(Chain(VP.from_betas(b), 10)) == 10 and len(Chain(Cosine())) == 1000


def test_bad_times_are_refused():
    with pytest.raises(KakusanError, match="rise"):
        Chain(VP(), torch.tensor([0.5, 0.2]))
    with pytest.raises(KakusanError, match="no noise yet"):
        Chain(Cosine(), torch.tensor([0.0, 0.5]))
    with pytest.raises(KakusanError, match="at least 2 times"):
        Chain(Cosine(), 1)
    with pytest.raises(KakusanError, match="which linear SDE"):
        bound(lambda x, t: -x, torch.zeros(1, 1))


@pytest.mark.parametrize("process", [ddpm(50), Cosine(), EDM()], ids=lambda p: type(p).__name__)
def test_ancestral_sampling_with_the_exact_variance_has_the_exact_law(process):
    """A Gaussian chain with the right mean and variance is exact at every number of steps."""
    n, chain = 20_000, Chain(process, 10)
    exact = exact_variance(chain)
    T = chain.times[-1]
    alpha, sigma2 = process.alpha(T), process.variance(T)
    z = Keyed(1).normal(0, (n, 1), torch.empty(0, dtype=F64))
    x = alpha * MU + (alpha**2 * S2 + sigma2).sqrt() * z
    x0 = chain.sample(gaussian(process, MU, S2), x, Analytic(exact, 0 * exact), Keyed(2))
    # DDPM's last step adds no noise: what is missing is the variance of that step
    wanted = S2 - exact[0].item()
    assert abs(x0.mean() - MU) < 4 * (S2 / n) ** 0.5, process
    assert abs(x0.var() - wanted) < 4 * wanted * (2 / n) ** 0.5, process


# --- variances


@pytest.mark.parametrize("process", [ddpm(20), VE(), Cosine()], ids=lambda p: type(p).__name__)
def test_analytic_variances_are_exact_for_gaussian_data(process):
    chain, model = Chain(process, 20), gaussian(process, MU, S2)
    exact, x0 = exact_variance(chain), data(4000)
    for found in (Analytic.estimate(model, x0, chain), Analytic.matched(model, x0, chain)):
        off = (found.variance - exact).abs()
        assert (off[1:] < 4 * found.std_error[1:] + 1e-12).all(), (process, off / found.std_error)
        step = chain.table()
        assert (found.variance >= step.floor).all() and (
            found.variance[1:] <= 1.2 * exact[1:]
        ).all()


def test_interpolated_lies_between_the_two():
    step = Chain(ddpm(10)).steps(torch.tensor([3, 7]))
    like = torch.zeros(2, 3, dtype=F64)
    ends = Small().log(step, None, like), Large().log(step, None, like)
    for spread, end in zip((-1.0, 1.0), ends, strict=True):
        found = Interpolated().log(step, torch.full((2, 3), spread), like)
        assert torch.allclose(found, end.expand(2, 3))
    middle = Interpolated().log(step, torch.zeros(2, 3), like)
    assert torch.allclose(middle, (ends[0] + ends[1]).expand(2, 3) / 2)
    with pytest.raises(KakusanError, match="second half"):
        Interpolated().log(step, None, like)


def test_the_divergence_of_two_normal_laws():
    """Against torch's own KL, for errors and variances of any size."""
    chain = Chain(ddpm(20))
    k = torch.tensor([1, 5, 12, 19])
    step, g = chain.steps(k), torch.Generator().manual_seed(0)
    x0, eps, v = (torch.randn(4, 3, generator=g, dtype=F64) for _ in range(3))
    log_variance = torch.randn(4, 3, generator=g, dtype=F64)
    x = chain.process.noised(x0, eps, step.t)
    alpha, sigma = step.alpha[:, None], step.sigma[:, None]
    guess = alpha * x - sigma * v  # r = 1 for VP
    c0, ct, tilde = (c[:, None] for c in (step.c0, step.ct, step.tilde))
    q = torch.distributions.Normal(c0 * x0 + ct * x, tilde.sqrt().expand(4, 3))
    p = torch.distributions.Normal(c0 * guess + ct * x, (log_variance / 2).exp())
    wanted = torch.distributions.kl_divergence(q, p)
    found = divergence(step, miss(step, x0, eps, v), log_variance)
    assert torch.allclose(found, wanted)


# --- the bound in discrete time


@pytest.mark.parametrize("T", [10, 50, 200])
def test_the_bound_of_gaussian_data_in_closed_form(T):
    """Every choice of variance, within four standard errors."""
    process = ddpm(T)
    chain, model, n = Chain(process), gaussian(process, MU, S2), 1500
    exact, step = exact_variance(chain), chain.table()
    first = GaussianDecoder(exact[0].sqrt().item())
    cases = [
        (Large(), None, step.beta),
        (Small(), None, step.floor),
        (Small(), first, torch.cat([exact[:1], step.floor[1:]])),
        (Analytic(exact, 0 * exact), None, exact),
    ]
    for i, (variance, decoder, table) in enumerate(cases):
        # a common random bound would hide errors of the samples in all cases alike
        found = bound(model, data(n, seed=i), chain, variance, decoder, seed=i, batch=n)
        wanted = closed_form(chain, table)
        off = (-found.mean - wanted) / found.mean_std_error
        assert abs(off) < 4, (T, variance, -found.mean, wanted)
        # the signs: decoder minus divergence minus prior, and divergences are positive
        assert torch.equal(found.value, found.decoder - found.divergence - found.prior)
        assert (found.prior > 0).all() and (found.terms > 0).all()
        assert abs(found.terms.sum() - found.divergence.mean()) < 1e-9
    exact_bound = closed_form(chain, exact)
    assert all(closed_form(chain, table) >= exact_bound for *_, table in cases)


def test_the_closed_form_agrees_with_numbers_computed_elsewhere():
    """T = 50, beta from 0.001 to 0.2: 0.91741 nats for beta, 0.90922 for the exact variance."""
    chain = Chain(VP.from_betas(torch.linspace(1e-3, 0.2, 50, dtype=F64)))
    assert round(closed_form(chain, chain.table().beta), 5) == 0.91741
    assert round(closed_form(chain, exact_variance(chain)), 5) == 0.90922


def test_the_bound_tends_to_the_likelihood_at_rate_one_over_T():
    """Large: in closed form, halved where steps are doubled; with the exact variance at once."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * S2)
    gaps = []
    for T in (1000, 2000, 4000):
        chain = Chain(ddpm(T))
        exact = exact_variance(chain)
        gaps.append(closed_form(chain, chain.table().beta) - closed_form(chain, exact))
        assert abs(closed_form(chain, exact) - entropy) < 1e-4
    ratios = [a / b for a, b in zip(gaps, gaps[1:], strict=False)]
    assert all(abs(r - 2) < 0.1 for r in ratios), (gaps, ratios)


def test_small_stays_half_of_eulers_constant_below():
    """With the exact first step: sum_k (1/(k-1) - log(k/(k-1))) / 2, in the first few steps."""
    gaps = []
    for T in (10_000, 40_000):
        chain = Chain(ddpm(T))
        exact = exact_variance(chain)
        small = torch.cat([exact[:1], chain.table().floor[1:]])
        gaps.append(closed_form(chain, small) - closed_form(chain, exact))
    assert abs(gaps[1] - 0.5772156649 / 2) < 0.01, gaps
    assert abs(gaps[1] - 0.5772156649 / 2) < abs(gaps[0] - 0.5772156649 / 2)


def test_a_sample_has_the_same_bound_in_every_batch():
    process = ddpm(12)
    model, x0 = mixture(process), data(150, d=2)
    for times in (None, 3):
        whole = bound(model, x0, times=times, batch=150)
        parts = bound(model, x0, times=times, batch=37)
        assert torch.allclose(whole.value, parts.value, rtol=1e-12)
        assert torch.allclose(whole.terms, parts.terms)
        assert torch.allclose(whole.std_error, parts.std_error)
    whole, part = (continuous_bound(model, x0, times=5, batch=b) for b in (150, 37))
    assert torch.allclose(whole.value, part.value, rtol=1e-12)


def test_some_terms_are_an_unbiased_estimate_of_all():
    process = ddpm(100)
    model, x0 = mixture(process), data(3000, d=2)
    every = bound(model, x0, batch=3000)
    for n in (1, 8):
        some = bound(model, x0, times=n, seed=n, batch=3000)
        gap = some.divergence - every.divergence
        assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5, n
    # terms that were drawn a few dozen times at least know their own error
    off = (some.terms - every.terms).abs() / (some.std_error + every.std_error)
    often = expected(Chain(process))[1:] * 8 * 3000 > 100
    assert often.sum() > 20 and off[often].max() < 4, off[often]


def test_expected_shares_are_those_of_gaussian_data():
    """For N(0, s²) and exact score, but for the part that is spread evenly."""
    process = ddpm(30)
    chain, n = Chain(process), 3000
    x0 = 0.6 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = bound(gaussian(process, 0.0, S2), x0, chain, Small(), batch=n)
    shares = expected(chain, 0.6, even=0.0)[1:]
    total = found.terms.sum()
    assert ((shares * total - found.terms).abs() < 5 * found.std_error).all()
    assert abs(expected(chain).sum() - 1) < 1e-12 and expected(chain)[0] == 0


@each
def test_the_bound_is_below_the_likelihood_of_a_mixture(process):
    """Any linear SDE at any times; and within a few hundredths of it with fine steps."""
    model = mixture(process)
    x0 = model.sample(200, torch.Generator().manual_seed(0))
    truth = model.log_prob(x0, time(0.0)).mean().item()
    chain = Chain(process, 60)
    found = bound(model, x0, chain, Analytic.matched(model, x0, chain), seed=1)
    assert found.mean - truth < 4 * found.mean_std_error, process
    assert found.mean - truth > -0.35, (process, found.mean, truth)


# --- decoders


def test_masses_of_all_levels_add_up_to_one():
    levels = torch.linspace(-1, 1, 17, dtype=F64)[:, None]
    decoder = DiscretisedGaussian(2 / 16)
    for mean in (-5.0, -1.0, 0.33, 0.999, 40.0):
        for std in (1e-3, 0.1, 3.0):
            log_p = decoder.log_prob(levels, time(mean), time(2 * math.log(std)))
            assert abs(log_p.exp().sum() - 1) < 1e-12, (mean, std)
            assert log_p.isfinite().all() or std == 1e-3


def test_a_narrow_cell_has_its_density():
    x, mean, log_variance = time(0.25).reshape(1, 1), time(0.1), time(-1.0)
    fine = DiscretisedGaussian(1e-5, -math.inf, math.inf)
    log_p = fine.log_prob(x, mean, log_variance) - math.log(1e-5)
    density = GaussianDecoder().log_prob(x, mean, log_variance)
    assert abs(log_p - density) < 1e-6
    # and an entry with cell 0 counts as one
    both = DiscretisedGaussian(torch.tensor([0.5, 0.0])).log_prob(
        x.expand(1, 2), mean, log_variance
    )
    one = DiscretisedGaussian(0.5).log_prob(x, mean, log_variance)
    assert torch.allclose(both, one + density)


def test_far_tails_keep_their_digits_and_their_slope():
    mean = time(0.9).requires_grad_()
    log_p = DiscretisedGaussian(0.125).log_prob(time(-0.5).reshape(1, 1), mean, time(-8.0))
    (slope,) = torch.autograd.grad(log_p.sum(), mean)
    assert log_p.isfinite().all() and log_p < -1000 and slope.isfinite() and slope < 0


def test_where_a_decoder_takes_over():
    """Sigma / alpha is a third of a cell there, and every start gives a bound."""
    for process in (VP(), Cosine(), EDM()):
        decoder = DiscretisedGaussian(torch.tensor([0.3, 0.6], dtype=F64))
        t = time(decoder.start(process))
        assert abs(process.sigma(t) / process.alpha(t) - 0.1) < 1e-9, process
        assert GaussianDecoder().start(process) == process.span[0]
        assert DiscretisedGaussian(torch.tensor([0.0, 0.6])).start(process) == process.span[0]
        points = torch.tensor([[-0.9, -0.3], [0.3, 0.9]], dtype=F64)
        model = ExactMixture(process, torch.ones(2), points, torch.zeros(2, 2, 2))
        x0 = model.sample(200, torch.Generator().manual_seed(0))
        ends = DiscretisedGaussian(0.6, -0.9, 0.9)
        for start in (None, decoder.start(process), 3 * decoder.start(process)):
            found = continuous_bound(model, x0, 16, decoder=ends, start=start)
            # two points: at least one bit
            assert found.mean - math.log(0.5) < 4 * found.mean_std_error, (process, start)
    with pytest.raises(KakusanError, match="starts before"):
        Chain(Cosine(), start=2.0)


def test_values_between_levels_are_refused():
    decoder = DiscretisedGaussian(0.5)
    decoder.check(torch.tensor([[-1.0, 0.5, 1.0]]))
    for wrong in (0.3, 2.0):
        with pytest.raises(KakusanError, match=f"{wrong:g} is no level"):
            bound(gaussian(ddpm(3)), torch.tensor([[0.5], [wrong]]), decoder=decoder)
    with pytest.raises(UsageError, match="cells of width"):
        DiscretisedGaussian(-1.0)
    with pytest.raises(UsageError, match="positive"):
        GaussianDecoder(0.0)


@pytest.mark.parametrize("continuous", [False, True])
def test_integers_have_probabilities(continuous):
    """Two levels, drawn 1 to 3, with the exact score: the bound meets -H where steps are fine."""
    process = VP(span=(1e-4, 1.0))
    points, p = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.25, 0.75], dtype=F64)
    model = ExactMixture(process, p, points, torch.zeros(2, 1, 1))
    x0 = model.sample(600, torch.Generator().manual_seed(0))
    truth = model.weights.log()[(x0[:, 0] > 0).long()]
    decoder = DiscretisedGaussian(2.0)
    if continuous:
        found = continuous_bound(model, x0, 32, decoder=decoder, start=1e-4)
    else:
        found = bound(model, x0, Chain(process, 200), decoder=decoder, times=40)
    gap = found.value - truth
    assert abs(gap.mean()) < 4 * gap.std() / 600**0.5 + (0.001 if continuous else 0.02), gap.mean()


# --- in continuous time


@pytest.mark.parametrize(
    "process", [VP(), Cosine(), VE(), EDM(), ddpm(1000)], ids=lambda p: type(p).__name__
)
def test_the_continuous_bound_of_gaussian_data_in_closed_form(process):
    model, n = gaussian(process, MU, S2), 4000
    for law in (LogSine(), Clock()):
        if isinstance(law, Clock) and isinstance(process, EDM):
            continue  # evenly in t from 0.002 to 80 hardly ever meets the data
        found = continuous_bound(model, data(n), 16, law=law, batch=n)
        off = (-found.mean - limit(process)) / found.mean_std_error
        assert abs(off) < 4, (process, law, -found.mean, limit(process))
        assert found.terms.shape == (16,) and (found.times.diff() > 0).all()


def test_fine_chains_tend_to_the_continuous_bound():
    """Closed forms, over one span: the gap is halved where the steps are doubled."""
    process = VP(span=(0.01, 1.0))
    gaps = []
    for T in (500, 1000, 2000):
        chain = Chain(process, T)
        exact = exact_variance(chain)
        # the decoder of the continuous bound: x_t / alpha, with the spread of the kernel
        step = chain.table()
        v = step.alpha**2 * S2 + step.sigma**2
        steps = 0.5 * ((step.floor / exact).log() + exact / step.floor - 1)[1:].sum()
        # E KL for a known x_0 = KL of the marginals + the information that x_0 adds
        info = 0.5 * (exact / step.tilde).log()[1:].sum()
        prior = 0.5 * (step.alpha[-1] ** 2 * (MU**2 + S2 - 1) - (step.sigma[-1] ** 2).log())
        decoder = 0.5 * torch.log(2 * math.pi * math.e * step.sigma[0] ** 2 / step.alpha[0] ** 2)
        assert v.isfinite().all()
        gaps.append((prior + steps + info + decoder).item() - limit(process))
    ratios = [a / b for a, b in zip(gaps, gaps[1:], strict=False)]
    assert all(abs(r - 2) < 0.1 for r in ratios), (gaps, ratios)


def test_only_the_ends_of_the_schedule_matter():
    """One model, given by the angle alone, under schedules with equal ends (VDM)."""
    plain = VP()
    ends = [(2 * plain.angle(time(t)).tan().log()).item() for t in plain.span]
    learned = LearnedSchedule(*ends)
    bent = LearnedSchedule(*ends)
    with torch.no_grad():
        bent.scale += torch.linspace(0, 9, 32, dtype=F64)
    n, found = 1000, {}
    x0 = data(n, d=2)
    for name, process in (("plain", plain), ("learned", learned), ("bent", bent)):
        wrong = mixture(process)  # not the law of the data: the model need not be right
        by_level = continuous_bound(wrong, x0, 2, batch=n)
        found[name] = continuous_bound(wrong, x0, 2, law=Clock(), batch=n), by_level
    first, levels = found["plain"]
    for clock, level in found.values():
        # drawn by the angle, nothing is left of the schedule but its ends
        assert torch.allclose(level.value, levels.value, rtol=1e-6)
        error = math.hypot(clock.mean_std_error, first.mean_std_error)
        assert abs(clock.mean - first.mean) < 4 * error, (clock.mean, first.mean)
    # drawn by the clock, the variance is the schedule's
    spread = {name: clock.divergence.std().item() for name, (clock, _) in found.items()}
    assert spread["learned"] < 0.5 * spread["plain"], spread
    assert abs(spread["bent"] / spread["learned"] - 1) > 0.2, spread


def test_even_levels_in_log_sine_have_no_variance_for_standard_normal_data():
    """E||v - v_hat||² is then 1 at all levels; even times are noisier by far."""
    process = VP()
    model, x0 = gaussian(process, 0.0, 1.0, d=50), torch.randn(400, 50, dtype=F64)
    even, clock = (continuous_bound(model, x0, 1, law=law) for law in (LogSine(), Clock()))
    assert even.divergence.std() < 0.35 * clock.divergence.std()
    # what is left is the chi-square of the noise
    depth = even.divergence.mean() / 50
    assert abs(even.divergence.std() / (depth * (2 * 50) ** 0.5) - 1) < 0.2


def test_bad_requests_are_refused():
    model, x0 = gaussian(Cosine()), data(3)
    with pytest.raises(UsageError, match="start with noise"):
        continuous_bound(model, x0, start=0.0)
    with pytest.raises(UsageError, match="at least 1"):
        bound(model, x0, times=0)
    with pytest.raises(UsageError, match="needs samples"):
        bound(model, x0[:0])
    with pytest.raises(KakusanError, match="labels go to a Denoiser"):
        bound(model, x0, label=torch.zeros(3, dtype=torch.long))


# --- a learned schedule


def test_a_learned_schedule_is_a_linear_sde():
    process = LearnedSchedule(-8.0, 4.0)
    with torch.no_grad():
        process.scale += torch.randn(32, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 101, dtype=F64)
    gamma = process.gamma(t)
    assert (gamma.diff() > 0).all() and abs(gamma[0] + 8) < 1e-12 and abs(gamma[-1] - 4) < 1e-12
    assert torch.allclose(process.alpha(t) ** 2 + process.variance(t), torch.ones_like(t))
    # g² / sigma² is the slope of gamma
    h, mid = 1e-6, time(0.37)
    slope = (process.gamma(mid + h) - process.gamma(mid - h)) / (2 * h)
    assert abs(process.rates(mid)[1] / process.variance(mid) / slope - 1) < 1e-6
    table = process.betas(200)
    chain = VP.from_betas(table.detach())
    assert torch.allclose(chain.alpha(t[::50][1:]), process.alpha(t[::50][1:]))
    with pytest.raises(KakusanError, match="rises"):
        LearnedSchedule(3.0, 3.0)


def test_the_bound_teaches_the_ends_and_the_variance_the_middle():
    """E[loss] has no slope in what lies between the ends; its square has."""
    process = LearnedSchedule(-6.0, 4.0)
    truth = mixture(LearnedSchedule(-6.0, 4.0))
    model = Denoiser(lambda x, level, label: 0.3 * x, process, "v")
    assert {"process.low", "process.scale"} <= set(dict(model.named_parameters()))
    n = 20_000
    x0 = truth.sample(n, torch.Generator().manual_seed(0))
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    u = u[torch.randperm(n, generator=torch.Generator().manual_seed(2))]
    loss = Denoising(Likelihood(), UniformTimes())(model, x0, eps, u)
    middle, end = (process.scale, process.log_rise)
    mean = torch.autograd.grad(loss.mean(), (*(middle,), end), retain_graph=True)
    square = torch.autograd.grad(loss.square().mean() / 2 / loss.mean().detach(), (middle, end))
    assert mean[1].abs() > 1e-3 and square[0].abs().max() > 1e-2, (mean, square)
    assert mean[0].abs().max() < 0.1 * square[0].abs().max(), (mean[0], square[0])


# --- losses


def _net(spread, d=2):
    """F = w x and a constant spread, as a network of twice the channels."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))
            self.v = torch.nn.Parameter(torch.tensor(spread, dtype=F64))

        def forward(self, x, level, label):
            return torch.cat([self.w * x, self.v.expand_as(x)], 1)

    return Net()


def test_the_losses_are_the_terms_of_the_bound():
    """Averaged over all knots L_vlb is -(bound + prior) / d, on the same noise."""
    process, n, d = ddpm(15), 40, 3
    chain, model = Chain(process), Denoiser(_net(0.2), process)
    x0 = data(n, d)
    for variance in (Interpolated(), Small(), Large()):
        found, total = bound(model, x0, chain, variance, seed=5), 0
        for k in range(15):
            eps = Keyed(5, 0, 23).normal(k, (n, d), x0)  # the stream of the bound
            t = chain.times[k].expand(n)
            loss = Variational(variance).at(model, x0, eps, t)
            wanted = -found.decoder.mean() if k == 0 else found.terms[k - 1]
            assert abs(loss.mean().item() * d / 15 - wanted) < 1e-9, (variance, k)
            total = total + loss.detach() / 15
        assert torch.allclose(total * d, -(found.value + found.prior)), variance


def test_simple_is_the_plain_error_of_the_noise():
    process = ddpm(15)
    model, x0 = Denoiser(_net(0.2), process, "epsilon"), data(50, 2)
    eps, t = torch.randn(50, 2, dtype=F64), Chain(process).times[torch.arange(50) % 15]
    wanted = (model.noise(process.noised(x0, eps, t), t) - eps).square().mean(1)
    assert torch.allclose(Simple().at(model, x0, eps, t), wanted)
    hybrid = Hybrid(0.01).at(model, x0, eps, t)
    assert torch.allclose(hybrid, wanted + 0.01 * Variational().at(model, x0, eps, t))
    with pytest.raises(UsageError, match="positive"):
        Hybrid(0.0)


def test_the_hybrid_loss_stops_the_bound_at_the_mean():
    process = ddpm(15)
    model, x0 = Denoiser(_net(0.2), process), data(64, 2)
    eps = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = Chain(process).times[torch.arange(64) % 15]
    w, v = model.net.w, model.net.v

    def slopes(loss):
        return torch.autograd.grad(loss.at(model, x0, eps, t).mean(), (w, v), allow_unused=True)

    simple, whole, hybrid = slopes(Simple()), slopes(Variational()), slopes(Hybrid(0.001))
    assert simple[1] is None or simple[1] == 0
    assert torch.allclose(hybrid[0], simple[0]) and whole[0].abs() > 0
    assert torch.allclose(hybrid[1], 0.001 * whole[1]) and whole[1].abs() > 0


def test_the_bound_is_least_at_the_exact_variance():
    """The slope of L_vlb in the variance vanishes at Analytic's, averaged over Gaussian data."""
    process = ddpm(30)
    chain, n = Chain(process), 20_000
    truth, x0 = gaussian(process, MU, S2), data(n)
    step = chain.steps(torch.tensor(12))
    eps = Keyed(0).normal(0, (n, 1), x0)
    v, _ = asking(process, truth)(process.noised(x0, eps, step.t), step.t, None)
    log_variance = exact_variance(chain)[12].log().requires_grad_()
    kl = divergence(step, miss(step, x0, eps, v), log_variance)
    (slope,) = torch.autograd.grad(kl.mean(), log_variance)
    each_slope = 0.5 * (1 - 2 * (kl - kl.min()).detach())  # affine in the square of the error
    assert abs(slope) < 4 * each_slope.std() / n**0.5
    # and for x_0 itself in the place of the guess, at beta tilde, nothing diverges at all
    assert divergence(step, 0 * x0, step.tilde.log()).abs().max() == 0


@pytest.mark.parametrize("kind", [Knots, StratifiedKnots, WeightedKnots, ImportanceTimes])
def test_every_way_to_draw_knots_gives_the_same_mean(kind):
    process, n = ddpm(20), 40_000
    model, chain = Denoiser(None, process, data_std=0.6), Chain(process)
    times = kind(chain)
    if kind is ImportanceTimes:
        for _ in range(10):
            times.update(chain.times, torch.linspace(1, 5, 20, dtype=F64))
    u = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(0))
    t, weight = times.draw(model, u)
    values = weight * (1 + t) ** 2
    wanted = (1 + chain.times).square().mean()
    assert abs(values.mean() - wanted) < 4 * values.std() / n**0.5, kind
    assert torch.isin(t, chain.times).all() and torch.isin(chain.times, t).all()
    edge = torch.full((3,), 1 - 2**-53, dtype=F64)
    assert torch.isin(times.draw(model, edge).t, chain.times).all()


def test_importance_times_forget_the_oldest():
    times = ImportanceTimes(Chain(ddpm(2)), length=2, even=0.0)
    for value in (9.0, 1.0, 1.0):
        assert times.probabilities.tolist() == [0.5, 0.5]
        times.update(times.chain.times[:1], torch.tensor([value]))
    times.update(times.chain.times[[1, 1]], torch.tensor([3.0, 3.0]))
    assert times.probabilities.tolist() == [0.25, 0.75]
    with pytest.raises(UsageError, match="length"):
        ImportanceTimes(Chain(ddpm(2)), length=0)


def test_the_second_half_is_the_spread():
    net = MLP((3,), 16, 1, outputs=2)
    with torch.no_grad():
        net.last.bias.copy_(torch.arange(6.0))
    x = torch.randn(5, 3)
    model = Denoiser(net, ddpm(10))
    velocity, spread = model.velocity_and_spread(x, time(0.5))
    assert torch.equal(spread, torch.tensor([3.0, 4.0, 5.0]).expand(5, 3))
    assert torch.equal(velocity, model.velocity(x, time(0.5))) and model(x, time(0.5)).shape == (
        5,
        3,
    )
    image = UNet(1, 8, width=8, multipliers=(1,), out_channels=2)
    v, spread = Denoiser(image, ddpm(10)).velocity_and_spread(torch.randn(2, 1, 8, 8), time(0.5))
    assert v.shape == spread.shape == (2, 1, 8, 8)


# --- by configuration

CHAIN = {"process": {"name": "ddpm", "steps": 50, "table": "cosine"}}


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_a_learned_variance_is_trained_by_configuration(loss, tmp_path):
    model = DiffusionModel.fit(
        "digits", quiet=True, out=tmp_path / "run", **CHAIN,
        train={"steps": 20, "batch": 32, "precision": "float32", "warmup": 5},
        model={"net": "mlp", "variance": "learned", "width": 32, "blocks": 1, "labels": "none"},
        objective={"loss": loss, "times": "importance"},
    )  # fmt: skip
    again = DiffusionModel.load(tmp_path / "run")
    assert again.sample(2, steps=3).shape == (2, 64) or again.sample(2, steps=3).ndim == 4
    x0, _ = again.data.test.batch(torch.arange(40)) if again.data else (None, None)
    if x0 is None:
        x0, _ = model.data.test.batch(torch.arange(40))
    cells = model.codec.cells
    chain = Chain(again.denoiser.process)
    found = bound(again.denoiser, x0, chain, Interpolated(), DiscretisedGaussian(cells), batch=40)
    _, spread = again.denoiser.velocity_and_spread(x0, time(0.02))
    assert spread is not None and spread.abs().max() > 0
    bits = found.bits_per_dim
    # 17 levels: a model that knows nothing at all needs log2(17) bits
    assert bits.value < math.log2(17) + 3 and bits.std_error > 0, str(found)
    path = elbo_terms(found, tmp_path / "terms.png")
    assert path.stat().st_size > 10_000
    assert str(found).startswith(f"{bits.value:.4f} +- ")


def test_what_does_not_go_together_is_refused():
    from kakusan.training import build

    small = {"net": "mlp", "width": 16, "blocks": 1}
    cases = [
        ({"model": {"variance": "learned"}, "objective": {"loss": "hybrid"}}, "process.name=ddpm"),
        ({**CHAIN, "model": {"variance": "learned"}}, "teaches no variance"),
        ({**CHAIN, "objective": {"loss": "hybrid"}}, "model.variance=learned"),
        ({**CHAIN, "objective": {"loss": "simple", "weight": "snr"}}, "objective.weight=snr"),
        ({**CHAIN, "objective": {"loss": "vlb", "times": "lognormal"}}, "objective.times"),
    ]
    for tree, words in cases:
        tree = {**tree, "model": {**small, **tree.get("model", {})}}
        config = configure(base=tree)
        with pytest.raises(UsageError, match=words):
            build.denoiser(config, (2,), 0, 1.0)
    table = configure(base=CHAIN).process
    assert torch.allclose(torch.tensor(build.process(table).betas, dtype=F64), betas.cosine(50))


def test_bits_are_nats_over_d_log_2():
    found = bound(gaussian(ddpm(5)), data(30), seed=3)
    bits = found.bits_per_dim
    assert abs(bits.value + found.mean / math.log(2)) < 1e-11
    assert abs(bits.std_error - found.mean_std_error / math.log(2)) < 1e-12 and bits.n == 30
