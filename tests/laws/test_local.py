"""Targets along the Euler-Maruyama chain: their mean, given the state, is the score of the chain.

The strongest test needs no score: for smooth bounded phi, E[S phi(X)] = -E[∇phi(X)].
"""

import math

import pytest
import torch

from kakusan import (
    SDE,
    Dense,
    Diagonal,
    Fresh,
    KakusanError,
    NotElliptic,
    Scale,
    Stratonovich,
    Zero,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.objectives.local import Local, Skorokhod, Variation, _inverse, reached
from kakusan.objectives.steps import times
from kakusan.processes.zoo.mechanics import DoubleWell, Underdamped
from problems import F64, Curved, Reversible, Wide

STEPS = 8


class Curl(SDE):
    """States of the shape (2, 1), and functions that know nothing of times of shape (B,)."""

    def drift(self, x, t):
        return -x * t + torch.sin(x.flip(1))

    def diffusion(self, x, t):
        return Diagonal(1 + 0.3 * t * torch.sin(x.flip(1)))


def run(sde, start, n=8000, steps=STEPS, seed=1):
    grid = grids.uniform(*sde.span, steps)
    x = torch.as_tensor(start, dtype=F64).expand(n, *torch.as_tensor(start).shape)
    return solve(sde, x, grid, noise=Fresh(seed), keep=True)


def worst(x, S, seed=5):
    """The largest |z| of E[S phi(X)] + E[∇phi(X)] over 36 functions and all coordinates."""
    x, S, zs = x.flatten(1), S.flatten(1), []
    for w in torch.randn(
        12, x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=F64
    ) / x.std(0):  # fmt: skip
        p = (x - x.mean(0)) @ w
        tests = ((p.sin(), p.cos()), (p.cos(), -p.sin()), (p.tanh(), 1 - p.tanh() ** 2))
        for phi, slope in tests:
            q = S * phi[:, None] + slope[:, None] * w
            zs.append((q.mean(0) / (q.std(0) / len(q) ** 0.5)).abs().max())
    return max(zs).item()


def naive(sde, path, at, monkeypatch):
    """The Itô sum -UᵀZ without its divergence."""
    plain = lambda v, steps: -times(_inverse(v.gamma, steps), v.JZ)  # noqa: E731
    with monkeypatch.context() as m:
        m.setattr(Variation, "target", plain)
        return Skorokhod()(sde, path, at)


TARGETS = [Local(), Skorokhod(2), Skorokhod(3), Skorokhod(), Skorokhod(4, probes=2)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_mean_of_the_target_is_the_score(target):
    path = run(Curved(), [0.3, 0.3])
    for at in (3, STEPS):
        assert worst(path.x[at], target(Curved(), path, [at])[0]) < 4, (target, at)


def test_the_sum_of_ito_is_not(monkeypatch):
    path = run(Curved(), [0.3, 0.3])
    assert worst(path.x[-1], naive(Curved(), path, [STEPS], monkeypatch)[0]) > 12


HYPO = Underdamped(lambda q: (q**2 - 1).square().sum(1) / 2, 1.0, 0.5)
BACK = reverse(Curved(), lambda x, t: -x)


@pytest.mark.parametrize(
    ("sde", "start", "target"),
    [
        (Wide(), [0.3, 0.3], Skorokhod(1)),
        (Wide(), [0.3, 0.3], Skorokhod()),
        (Curl(), [[0.3], [0.1]], Local()),
        (Curl(), [[0.3], [0.1]], Skorokhod(3)),
        (HYPO, [0.2, 0.0], Skorokhod(3)),
        (HYPO, [0.2, 0.0], Skorokhod()),
        (HYPO, [0.2, 0.0], Skorokhod(4, probes=1)),
        (Stratonovich(Curved()), [0.3, 0.3], Skorokhod(3)),
        (Stratonovich(Curved()), [0.3, 0.3], Local()),
        (BACK, [0.3, 0.3], Skorokhod(4)),
        (BACK, [0.3, 0.3], Local()),
    ],
)  # fmt: skip
def test_any_process_with_noise_for_every_coordinate(sde, start, target):
    path = run(sde, start)
    S = target(sde, path, [STEPS])[0]
    assert S.shape == path.end.shape
    assert worst(path.end, S) < 4, (sde, target)


def test_the_divergence_is_that_of_autograd():
    """One path, Z -> U = JᵀΓ⁻¹ by brute force and its divergence."""
    sde, path = Curved(), run(Curved(), [0.3, 0.3], n=3, steps=4)
    grid, z0 = path.t, path.dw / 0.5

    def end(z):
        x = path.x[0, :1]
        for k, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
            x = sde.diffusion(x, t).kick(x + (s - t) * sde.drift(x, t), 0.5 * z[k : k + 1])
        return x[0]

    def U(z):
        J = torch.func.jacrev(end)(z).flatten(1)
        return J.mT @ torch.linalg.inv(J @ J.mT)

    for i in range(3):
        z = z0[:, i]
        slopes = torch.func.jacrev(U)(z).reshape(8, 2, 8)
        divergence = slopes.diagonal(dim1=0, dim2=2).sum(-1)
        exact = divergence - U(z).mT @ z.flatten()
        assert torch.allclose(Skorokhod()(sde, path, [4])[0, i], exact, rtol=1e-9)


def test_probes_are_unbiased():
    """Each path many times over, with directions of its own."""
    path, times = run(Curved(), [0.3, 0.3], n=50), 60
    many = path._replace(x=path.x.repeat(1, times, 1), dw=path.dw.repeat(1, times, 1))
    exact = Skorokhod(3)(Curved(), path, [STEPS])[0]
    some = Skorokhod(3, 2)(Curved(), many, [STEPS])[0].view(times, 50, 2)
    z = (some.mean(0) - exact) / (some.std(0) / times**0.5)
    # Student's t with 59 degrees has variance 59/57 and kurtosis 3.1
    assert abs(z.square().mean() - 59 / 57) < 4 * (2.2 / z.numel()) ** 0.5


# --- chains whose law is known


A = torch.tensor([[-1.0, 2.0], [-1.0, -0.5]], dtype=F64)
G = torch.tensor([[1.0, 0.4], [0.0, 0.6]], dtype=F64)
LINEAR = SDE.of(lambda x, t: x @ A.mT, Dense(G))


def gaussian_chain(x0, steps):
    """Mean and covariance of the Euler-Maruyama chain of LINEAR."""
    h, m, C = 1 / steps, x0, torch.zeros(2, 2, dtype=F64)
    one = torch.eye(2, dtype=F64) + h * A
    for _ in range(steps):
        m, C = one @ m, one @ C @ one.mT + h * G @ G.mT
    return m, C


@pytest.mark.parametrize("target", [Local(), Skorokhod(2), Skorokhod(5), Skorokhod(3, probes=1)],
                         ids=str)  # fmt: skip
def test_a_gaussian_chain(target):
    """The regression of S on x is the score of the chain, -C⁻¹(x - m)."""
    x0 = torch.tensor([0.5, -1.0], dtype=F64)
    path = run(LINEAR, x0, n=20_000, steps=12)
    m, C = gaussian_chain(x0, 12)
    y = path.end - m
    error = target(LINEAR, path, [12])[0] + y @ torch.linalg.inv(C)
    for phi in (torch.ones(len(y), dtype=F64), y[:, 0], y[:, 1]):
        q = error * phi[:, None]
        assert (q.mean(0).abs() < 4 * q.std(0) / len(q) ** 0.5).all(), target


def test_a_gaussian_chain_leaves_the_long_window_no_noise():
    x0 = torch.tensor([0.5, -1.0], dtype=F64)
    path = run(LINEAR, x0, n=20, steps=12)
    m, C = gaussian_chain(x0, 12)
    for target in (Skorokhod(), Skorokhod(probes=1)):
        S = target(LINEAR, path, [12])[0]
        assert torch.allclose(S, -(path.end - m) @ torch.linalg.inv(C)), target


WELL = DoubleWell(1.0)
SPREAD = SDE.of(lambda x, t: 0.4 * x, lambda x, t: Diagonal(0.6 * (0.2 + x**2).sqrt()))


def quadrature(sde, x0, steps, lo=-5.0, hi=7.0, n=2401):
    """The density of a chain in one dimension, by products with the matrix of its kernel."""
    y, h = torch.linspace(lo, hi, n, dtype=F64)[:, None], 1 / steps
    t = torch.tensor(0.0, dtype=F64)

    def kernel(x):
        g = sde.diffusion(x, t).mv(torch.ones_like(x)).abs() * h**0.5
        return torch.exp(-0.5 * ((y.mT - x - h * sde.drift(x, t)) / g) ** 2) / g

    p, K = kernel(torch.tensor([[x0]], dtype=F64))[0], kernel(y)
    for _ in range(steps - 1):
        p = p @ K / K.sum(1).mean()  # any constant: the score does not see it
    return y[:, 0], torch.gradient(p.log(), spacing=(y[1] - y[0]).item())[0]


@pytest.mark.parametrize("sde", [WELL, SPREAD], ids=["double well", "spread"])
@pytest.mark.parametrize("target", [Local(), Skorokhod(3), Skorokhod()], ids=str)
def test_a_chain_known_by_quadrature(sde, target):
    # the cubic drift runs away on coarser grids
    path = run(sde, [1.0], n=20_000, steps=20)
    y, score = quadrature(sde, 1.0, 20)
    x = path.end[:, 0]
    at = ((x - y[0]) / (y[1] - y[0])).clamp(0, len(y) - 1.001)
    exact = torch.lerp(score[at.long()], score[at.long() + 1], at - at.long())
    error = target(sde, path, [20])[0, :, 0] - exact
    # only where the table is good
    error = torch.where((x > y[0] + 1) & (x < y[-1] - 1), error, 0.0)
    for phi in (torch.ones_like(x), x.sin(), x.cos(), (2 * x).sin(), (x > 0.3).double(), x.tanh()):
        q = error * phi
        assert q.mean().abs() < 4 * q.std() / len(q) ** 0.5, (sde, target)


# --- windows, and how much they save


def test_a_window_of_one_step_is_local():
    path = run(Curved(), [0.3, 0.3], n=50)
    assert torch.allclose(Local()(Curved(), path), Skorokhod(1)(Curved(), path))


def test_windows_are_at_least_as_long_as_asked():
    """What came before the window does not count: the chain that starts there says the same."""
    path, target = run(Curved(), [0.3, 0.3], n=5, steps=12), Skorokhod(3)
    for at in range(1, 13):
        first = target.first(at)
        assert at - first >= min(3, at) and at - first < 6
        rest = path._replace(t=path.t[first:], x=path.x[first:], dw=path.dw[first:])
        alone = Skorokhod()(Curved(), rest, [at - first])
        assert torch.allclose(alone, target(Curved(), path, [at])), at


def test_longer_windows_have_less_variance():
    path = run(WELL, [1.0], n=4000, steps=100)
    variance = [
        target(WELL, path, [99]).var().item()
        for target in (Local(), Skorokhod(5), Skorokhod(12), Skorokhod(25))
    ]
    # measured: 105, 26, 15, 14; the mean square of the score itself is about 5
    assert variance[0] > 3 * variance[1] and variance[0] > 5 * variance[2], variance
    assert variance[3] < 1.2 * variance[2], variance


def test_noise_that_takes_its_time_needs_long_windows():
    path = run(HYPO, [0.2, 0.0], n=1000, steps=50)
    variance = [Skorokhod(w)(HYPO, path, [49]).var().item() for w in (3, 10, 24)]
    # measured: 13000, 120, 53
    assert variance[0] > 30 * variance[1] and variance[0] > 100 * variance[2], variance


def test_a_nearly_singular_noise_gives_local_heavy_tails():
    sde = Reversible()
    path = solve(
        sde, torch.randn(300, 2, dtype=F64), grids.uniform(0, 1, 20), noise=Fresh(1), keep=True
    )
    local, window = (target(sde, path, [19]).var().item() for target in (Local(), Skorokhod(9)))
    assert local > 8 * window, (local, window)


def test_single_precision_and_times_of_any_form():
    """Processes written for one time, or for times (B,), in float64 or in the dtype of x."""
    forms = [lambda t: t, lambda t: t.reshape(-1, 1), lambda t: t.float().reshape(-1, 1),
             lambda t: float(t)]  # fmt: skip
    for dtype in (torch.float32, F64):
        found = []
        for form in forms:
            sde = SDE.of(
                lambda x, t, form=form: (-x * form(t)).to(x.dtype),
                lambda x, t, form=form: Diagonal(1 + 0.2 * form(t) * torch.sin(x.flip(1))),
            )
            x = torch.full((6, 2), 0.3, dtype=dtype)
            path = solve(sde, x, grids.uniform(0, 1, 5), noise=Fresh(0), keep=True)
            found.append(Skorokhod(2)(sde, path))
            assert found[-1].dtype == dtype
        assert all(torch.allclose(found[0], other, rtol=1e-3) for other in found)


# --- refusals


def test_refusals_say_what_to_do():
    path = run(HYPO, [0.2, 0.0], n=3)
    with pytest.raises(NotElliptic, match=r"local score matching needs G\^-1.*Skorokhod"):
        Local()(HYPO, path, [2])
    with pytest.raises(NotElliptic, match="local score matching needs"):
        Local()(Wide(), run(Wide(), [0.1, 0.1], n=3), [2])
    for target in (Skorokhod(1), Skorokhod(1, probes=1)):
        with pytest.raises(NotElliptic, match="does not reach every coordinate.*window"):
            target(HYPO, path, [5])
    assert reached(Skorokhod(4), HYPO, path) == 2
    still = SDE.of(lambda x, t: -x, Zero())
    with pytest.raises(NotElliptic, match="no increments"):
        Local()(still, solve(still, torch.ones(2, 2), path.t, keep=True))
    with pytest.raises(KakusanError, match="stand at the times 1 to 8"):
        Local()(HYPO, path, [0])
    with pytest.raises(KakusanError, match="window must be at least 1"):
        Skorokhod(0)


def test_additive_noise_and_one_number():
    sde = SDE.of(lambda x, t: x - x**3, Scale(0.7))
    path = run(sde, [0.1], n=20_000)
    assert math.isfinite(worst(path.end, Skorokhod()(sde, path, [STEPS])[0]))
    assert worst(path.end, Skorokhod()(sde, path, [STEPS])[0]) < 4
