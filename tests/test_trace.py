"""The divergence of a field: exact against autograd's Jacobian, probes against their laws."""

import itertools

import pytest
import torch
from torch import nn

from kakusan import KakusanError
from kakusan.core.noise import Keyed
from kakusan.core.trace import (
    ExactTrace,
    Hutchinson,
    HutchPlusPlus,
    Normals,
    Orthogonal,
    Signs,
)
from problems import F64


def net(d, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d + 2, 16), nn.SiLU(), nn.Linear(16, d)).double()


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def field_of(d, t, label):
    """A network of a state of any shape, with a time and a label for each sample."""
    f = net(d)
    return lambda x: f(torch.cat([x.flatten(1), t[:, None], label[:, None]], 1)).reshape(x.shape)


def jacobian_trace(field, x):
    """Of each sample, from the Jacobian of the whole batch."""
    J = torch.autograd.functional.jacobian(field, x).reshape(len(x), x[0].numel(), *x.shape)
    return torch.stack([J[i, :, i].flatten(1).trace() for i in range(len(x))])


def estimate(trace, field, x, seed=0):
    with torch.no_grad():
        return trace(field, x, trace.probes(x, Keyed(seed)))


# --- exact


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
def test_exact_is_the_trace_of_the_jacobian(shape, chunk):
    x, t, label = randn(3, *shape), randn(3, seed=2), torch.tensor([0.0, 1.0, 2.0]).double()
    field = field_of(x[0].numel(), t, label)
    v, values = estimate(ExactTrace(chunk=chunk), field, x)
    truth = jacobian_trace(field, x)
    assert values.shape == (3, 1) and (values[:, 0] - truth).abs().max() < 1e-10
    assert truth.std() > 1e-3 and torch.equal(v, field(x).detach())


@pytest.mark.parametrize(
    "trace", [ExactTrace(), Hutchinson(2), HutchPlusPlus(2, r=1)], ids=lambda v: type(v).__name__
)
def test_it_is_differentiable_once_more(trace):
    """Gradients of divergence and field, by state and by parameters, against differences."""
    f, x = net(3), randn(2, 3)
    probes = trace.probes(x, Keyed(3))
    extra = randn(2, 2)
    weight = f[0].weight

    def loss(x):
        v, values = trace(lambda y: f(torch.cat([y, extra], 1)), x, probes)
        return values.mean(1).sin().sum() + v.square().sum()

    y = x.clone().requires_grad_()
    dx, dw = torch.autograd.grad(loss(y), (y, weight))
    eps, base = 1e-5, weight.detach().clone()
    for i, j in itertools.product(range(2), range(3)):
        step = torch.zeros_like(x)
        step[i, j] = eps
        with torch.no_grad():
            slope = (loss(x + step) - loss(x - step)) / (2 * eps)
        assert abs(slope - dx[i, j]) < 1e-6, (slope, dx[i, j])
    direction = randn(*weight.shape)
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.copy_(base + sign * eps * direction)
            found.append(loss(x))
    assert abs((found[0] - found[1]) / (2 * eps) - (dw * direction).sum()) < 1e-6
    assert dx.abs().max() > 1e-2 and dw.abs().max() > 1e-2


def test_without_gradients_nothing_is_held():
    f = net(3)
    extra = randn(2, 2)
    v, values = estimate(ExactTrace(), lambda y: f(torch.cat([y, extra], 1)), randn(2, 3))
    assert not v.requires_grad and not values.requires_grad


# --- probes


def linear(d, seed=0):
    """A matrix J that is not symmetric, its field, and its symmetric part A."""
    J = randn(d, d, seed=seed)
    return J, (lambda x: x @ J.T), (J + J.T) / 2


def pull_of(J):
    return lambda z: z @ J  # Jᵀ z, of rows


def test_signs_enumerated_have_the_mean_and_variance_of_the_formula():
    for d in (2, 4, 6):
        J, _, A = linear(d, seed=d)
        z = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=F64).unsqueeze(1)
        values = Hutchinson(len(z)).values(pull_of(J), (z,))[0]
        variance = 2 * (A.square().sum() - A.diagonal().square().sum())
        assert values.shape == (2**d,)
        assert abs(values.mean() - J.trace()) < 1e-12
        assert abs(values.var(unbiased=False) - variance) < 1e-12, d


@pytest.mark.parametrize("law", [Signs(), Normals(), Orthogonal()], ids=lambda v: type(v).__name__)
def test_each_law_has_its_mean_and_variance(law):
    d, n = 5, 20_000
    J, field, A = linear(d)
    values = estimate(Hutchinson(2, law), field, torch.zeros(n, d, dtype=F64)).values
    squares, diagonal = A.square().sum(), A.diagonal()
    variance = {
        Signs: 2 * (squares - diagonal.square().sum()),
        Normals: 2 * squares,
        # of d (q·A q) for q uniform on the sphere
        Orthogonal: 2 * d / (d + 2) * (squares - A.trace() ** 2 / d),
    }[type(law)]
    for one in values.T:
        assert abs(one.mean() - J.trace()) < 4 * one.std() / n**0.5
        squared = (one - J.trace()).square()
        assert abs(squared.mean() - variance) < 4 * squared.std() / n**0.5, (squared, variance)
    # two of a basis know of each other: together with all others they would be exact
    both = (values[:, 0] - J.trace()) * (values[:, 1] - J.trace())
    covariance = -variance / (d - 1) if isinstance(law, Orthogonal) else 0.0
    assert abs(both.mean() - covariance) < 4 * both.std() / n**0.5


def test_probes_have_the_identity_for_covariance():
    for law in (Signs(), Normals(), Orthogonal()):
        z = law.draw(1, torch.zeros(20_000, 3, dtype=F64), Keyed(5))[0]
        products = z.unsqueeze(2) * z.unsqueeze(1)
        error = products.std(0) / len(z) ** 0.5
        assert ((products.mean(0) - torch.eye(3)).abs() <= 4 * error + 1e-12).all(), law
        assert (z.mean(0).abs() < 4 / len(z) ** 0.5).all(), law


def test_all_orthogonal_probes_are_exact():
    J, field, _ = linear(6)
    trace = Hutchinson(6, Orthogonal())
    values = estimate(trace, field, torch.zeros(50, 6, dtype=F64)).values
    assert (values.mean(1) - J.trace()).abs().max() < 1e-10 and values.std() > 0.1
    assert trace.std_error(values, 6).abs().max() == 0


@pytest.mark.parametrize(
    "trace",
    [Hutchinson(3), Hutchinson(3, Normals()), Hutchinson(3, Orthogonal()), HutchPlusPlus(3, r=1)],
    ids=["signs", "normals", "orthogonal", "hutch++"],
)
def test_the_square_of_the_standard_error_is_the_variance_on_average(trace):
    d, n = 5, 20_000
    J, field, _ = linear(d)
    values = estimate(trace, field, torch.zeros(n, d, dtype=F64)).values
    error = values.mean(1) - J.trace()
    assert abs(error.mean()) < 4 * error.std() / n**0.5  # unbiased
    difference = trace.std_error(values, d).square() - error.square()
    assert abs(difference.mean()) < 4 * difference.std() / n**0.5
    assert abs(difference.mean()) < 0.1 * error.square().mean()  # the bound says something


@pytest.mark.parametrize(
    "trace",
    [Hutchinson(48), Hutchinson(48, Normals()), HutchPlusPlus(48, r=3)],
    ids=["signs", "normals", "hutch++"],
)
def test_standard_errors_cover(trace):
    """Errors over their standard errors have Student's variance, (k - 1) / (k - 3)."""
    d, n = 12, 2000
    J, field, _ = linear(d)
    values = estimate(trace, field, torch.zeros(n, d, dtype=F64)).values
    z = (values.mean(1) - J.trace()) / trace.std_error(values, d)
    # a chi-square of n degrees over n has variance 2 / n
    assert abs(z.square().mean() / (47 / 45) - 1) < 4 * (2 / n) ** 0.5, z.square().mean()


def test_hutch_plus_plus_is_exact_on_low_rank():
    x = torch.zeros(7, 10, dtype=F64)
    J = randn(10, 3) @ randn(3, 10, seed=2)
    for k, r in ((1, 3), (2, 3), (2, 5)):
        values = estimate(HutchPlusPlus(k, r), lambda x: x @ J.T, x).values
        assert values.shape == (7, k) and (values - J.trace()).abs().max() < 1e-10, (k, r)
    assert estimate(HutchPlusPlus(2, 2), lambda x: x @ J.T, x).values.std() > 1e-3


def test_hutch_plus_plus_beats_plain_probes_where_j_falls_off():
    d, n = 30, 500
    Q = torch.linalg.qr(randn(d, d))[0]
    J = (Q * 2.0 ** -torch.arange(d, dtype=F64)) @ Q.T
    x = torch.zeros(n, d, dtype=F64)
    # equal costs: 2 · 4 + 4 and 12 backward passes
    a, b = (
        (estimate(trace, lambda x: x @ J.T, x).values.mean(1) - J.trace()).square().mean()
        for trace in (HutchPlusPlus(4), Hutchinson(12))
    )
    assert a < b / 10, (a, b)


def test_probes_belong_to_samples():
    x = torch.zeros(6, 2, 3, dtype=F64)
    for trace in (Hutchinson(2), Hutchinson(2, Normals()), Hutchinson(2, Orthogonal())):
        (z,), (late,) = trace.probes(x, Keyed(1)), trace.probes(x[:2], Keyed(1, 3))
        assert z.shape == (2, 6, 6) and torch.equal(late, z[:, 3:5])
        assert not torch.equal(z[:, :5], z[:, 1:])
        assert not torch.equal(trace.probes(x, Keyed(2))[0], z)
    single = Signs().draw(2, x.float(), Keyed(1))
    assert torch.equal(single.double(), Signs().draw(2, x, Keyed(1)))


# --- what is refused


def test_one_probe_has_no_standard_error_and_the_exact_trace_none():
    values = torch.zeros(3, 1)
    assert Hutchinson(1).std_error(values, 4).isnan().all()
    assert torch.equal(ExactTrace().std_error(values, 4), torch.zeros(3))


def test_refusals():
    with pytest.raises(KakusanError, match=r"3072 dimensions takes 3072 backward .* 307,200"):
        ExactTrace().check(3072)
    with pytest.raises(KakusanError, match=r"Hutchinson\(8\) takes 800 .*ExactTrace\(most=3072\)"):
        ExactTrace().check(3072)
    ExactTrace(most=3072).check(3072)
    with pytest.raises(KakusanError, match="at most 2 probes are orthogonal, got 3"):
        Hutchinson(3, Orthogonal()).probes(torch.zeros(1, 2), Keyed(0))
    with pytest.raises(KakusanError, match="at least one probe, got 0"):
        Hutchinson(0)
    with pytest.raises(KakusanError, match="k >= 1 and r >= 1, got k=2 and r=0"):
        HutchPlusPlus(2, 0)
    with pytest.raises(KakusanError, match=r"r=2 .* 2 dimensions; ExactTrace\(\) is cheaper"):
        HutchPlusPlus(2).check(2)
    with pytest.raises(KakusanError, match="no way from the state to the field"):
        estimate(ExactTrace(), lambda x: torch.ones_like(x), torch.zeros(1, 2))
    with pytest.raises(KakusanError, match=r"the field is \(1, 1\), and the state \(1, 2\)"):
        estimate(ExactTrace(), lambda x: x[:, :1], torch.zeros(1, 2))
