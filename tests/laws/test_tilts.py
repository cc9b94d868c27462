"""Tilts in closed form: bridges of linear processes, and the pull of Brownian motion.

The reference is written down here once more, by other means: exponentials of matrices, and the
joint normal law of all that is seen.
"""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.func import grad, jacrev

from kakusan import (
    SDE,
    VP,
    Brownian,
    CriticallyDamped,
    Dense,
    Diagonal,
    DoubleWell,
    Fresh,
    GeometricBrownian,
    KakusanError,
    NotElliptic,
    OrnsteinUhlenbeck,
    Scale,
    Stratonovich,
    Underdamped,
    Zero,
    solve,
    tilt,
)
from kakusan.core import grids
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.pull import FEW, Pull, conjugate_gradients, solved
from kakusan.processes.observations import (
    Coordinates,
    Event,
    Measured,
    Series,
    Terminal,
)
from problems import F64, time

A = torch.tensor([[0.8, 1.5, 0.0], [-1.0, 0.3, 0.2], [0.1, 0.0, -0.4]], dtype=F64)
G = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.6, 0.0], [0.3, 0.0, 0.5]], dtype=F64)
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
H = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]], dtype=F64)

PROCESSES = {
    "brownian": Brownian(0.7),
    "brownian, coordinates": Brownian([0.5, 1.0, 2.0]),
    "brownian, matrix": Brownian(G),
    "number": OrnsteinUhlenbeck(1.3, 0.8, 0.4),
    "coordinates": OrnsteinUhlenbeck([0.5, -0.7, 2.0], [1.0, 0.5, 0.3], MEAN),
    "matrix": OrnsteinUhlenbeck(A, G, MEAN),
    "matrix, one mean": OrnsteinUhlenbeck(A, [1.0, 0.5, 0.3], 0.7),
    "against the clock": OrnsteinUhlenbeck(A, G, MEAN, span=(1.0, 0.0)),
}
SEEN = {
    "terminal": Terminal(),
    "coordinates": Coordinates([2, 0]),
    "projection": Measured(H),
    "noise": Measured(H, std=0.3),
    "function": Measured(lambda x: x.flatten(1).sum(1, keepdim=True), std=0.1),
}


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def states(n=4, d=3):
    return randn(n, d)


def factor_and_covariance(sde, x, tau):
    """exp(-A tau) and Q of a process, and where 0 goes, by Van Loan's block exponential."""
    d, one = x.shape[1], torch.zeros_like(x[:1])
    t = time(0.0)
    f0 = sde.drift(one, t)[0]
    B = sde.direction * torch.stack([sde.drift(e[None], t)[0] - f0 for e in torch.eye(d).to(x)], 1)
    operator = sde.diffusion(one, t)
    D = torch.stack([operator.gram(e[None])[0] for e in torch.eye(d).to(x)], 1)
    zero = torch.zeros(d, d, dtype=F64)
    M = torch.cat([torch.cat([B, D], 1), torch.cat([zero, -B.mT], 1)]) * tau
    E = torch.matrix_exp(B * tau)
    Q = torch.matrix_exp(M)[:d, d:] @ E.mT
    affine = torch.cat([torch.cat([B, sde.direction * f0[:, None]], 1), B.new_zeros(1, d + 1)])
    return E, (Q + Q.mT) / 2, torch.matrix_exp(affine * tau)[:d, d]


def joint(sde, seen, x, t):
    """The normal law of all that is seen after t, given X_t = x; one block a pair of times."""
    later = [(s, o) for s, o in sorted(seen.items(), key=lambda p: sde.direction * p[0])]
    later = [(s, o) for s, o in later if sde.direction * (s - t) > 0]
    means, blocks = [], []
    for s, o in later:
        E, Q, c = factor_and_covariance(sde, x, abs(s - t))
        means.append((x @ E.mT + c) @ o.matrix(x).mT)
        row = []
        for u, p in later:
            first, gap = min(abs(s - t), abs(u - t)), abs(u - s)
            _, Q, _ = factor_and_covariance(sde, x, first)
            E, _, _ = factor_and_covariance(sde, x, gap)
            C = Q @ E.mT if abs(s - t) <= abs(u - t) else E @ Q
            row.append(o.matrix(x) @ C @ p.matrix(x).mT)
            if u == s:
                row[-1] = row[-1] + o.std**2 * torch.eye(len(row[-1]), dtype=F64)
        blocks.append(torch.cat(row, 1))
    return MultivariateNormal(torch.cat(means, 1), torch.cat(blocks))


# --- one observation


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("process", PROCESSES)
def test_exact_tilts_of_linear_processes(process, seen):
    """Eᵀ Hᵀ (H Q Hᵀ + R)⁻¹ (y - H(E x + c)), and log h itself."""
    sde, seen, x = PROCESSES[process], SEEN[seen], states()
    one, y = LinearTilt.exact(sde, seen), randn(len(x), seen.size(x), seed=2)
    for left in (0.9, 0.3, 1e-3):
        t = sde.span[1] - sde.direction * left
        E, Q, c = factor_and_covariance(sde, x, left)
        h = seen.matrix(x)
        S = h @ Q @ h.mT + seen.std**2 * torch.eye(len(h), dtype=F64)
        exact = torch.linalg.solve(S, (y - (x @ E.mT + c) @ h.mT).mT).mT @ h @ E
        score = one.score(x, time(t), y)
        # the reference loses digits where little time is left
        assert torch.allclose(score, exact, rtol=1e-10, atol=1e-10 * exact.abs().max()), left
        truth = joint(sde, {sde.span[1]: seen}, x, t).log_prob(y)
        assert torch.allclose(one.log_h(x, time(t), y), truth, rtol=1e-9), left


def test_bridges_by_hand():
    """e^{-k tau} (y - e^{-k tau} x) / q, q = s² (1 - e^{-2 k tau}) / 2k, and (y - x) / s² tau."""
    x, y, k, s, tau = randn(5, 2), randn(5, 2, seed=2), 1.7, 0.6, 0.4
    decay = math.exp(-k * tau)
    q = s**2 * (1 - decay**2) / (2 * k)
    ou = LinearTilt.exact(OrnsteinUhlenbeck(k, s), Terminal())
    assert torch.allclose(ou.score(x, time(0.6), y), decay * (y - decay * x) / q, rtol=1e-12)
    brownian = LinearTilt.exact(Brownian(s), Terminal(), end=2.0)
    assert torch.allclose(brownian.score(x, time(1.6), y), (y - x) / (s**2 * tau), rtol=1e-12)
    assert torch.allclose(brownian.control(x, time(1.6), y), (y - x) / (s * tau), rtol=1e-12)


def test_noise_that_arrives_through_other_coordinates():
    """Kinetic motion seen in its position alone, with 1e-6 of time left."""
    sde = CriticallyDamped(beta=1.0, mass=1.0, gamma=1.0)
    x, y = torch.tensor([[0.3, -0.2]], dtype=F64), torch.tensor([[0.30000001]], dtype=F64)
    h = 1e-6
    one = LinearTilt.exact(sde, Coordinates([0]))
    score = one.score(x, time(1 - h), y)
    # x_T = x + h v + noise of variance 2 h³ / 3, to leading order
    away = y[0, 0] - x[0, 0] - h * x[0, 1]
    lead = away / (2 * h**3 / 3) * torch.tensor([1.0, h], dtype=F64)
    assert torch.allclose(score[0], lead, rtol=1e-5)


def test_a_picture_and_times_of_each_state():
    """States of any shape, times (B,) in any order, twice the same, with and without a rest."""
    sde, x = OrnsteinUhlenbeck([0.5, 1.0, 2.0], 0.7, 0.3), randn(6, 2, 3)
    t = torch.tensor([0.2, 0.9, 0.2, 0.5, 1.0, 0.2], dtype=F64)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    both = Series({0.6: Coordinates(mask), 1.0: Terminal()})
    for seen in (Terminal(), Coordinates(mask, 0.2), both):
        y = randn(6, seen.size(x), seed=3)
        for one in (LinearTilt.exact(sde, seen), Pull(sde, seen)):
            many, each = one.score(x, t, y), [one.score(x[[i]], t[i], y[[i]]) for i in range(6)]
            assert torch.allclose(many, torch.cat(each), rtol=1e-12), one
            assert not many[4].any() and many[[0, 1, 2, 3, 5]].flatten(1).any(1).all()
            control = [one.control(x[[i]], t[i], y[[i]]) for i in range(6)]
            assert torch.allclose(one.control(x, t, y), torch.cat(control), rtol=1e-12), one
    one = LinearTilt.exact(sde, both)
    each = torch.cat([one.log_h(x[[i]], t[i], y[[i]]) for i in range(6)])
    assert torch.allclose(one.log_h(x, t, y), each, rtol=1e-12) and each[4] == 0


# --- several observations


SERIES = {
    0.3: Coordinates([1]),
    0.55: Measured(H, std=0.4),
    0.8: Terminal(),
    1.0: Coordinates([0, 2], std=0.1),
}


@pytest.mark.parametrize("process", ["brownian, matrix", "matrix", "against the clock"])
def test_several_times_are_jointly_normal(process):
    """Against the whole covariance, pair by pair; y is in the order in which it was given."""
    sde, x = PROCESSES[process], states()
    given = dict(sorted(SERIES.items(), key=lambda p: (p[0] * 7) % 1))
    if sde.direction < 0:
        given = {1 - s: o for s, o in given.items()}
    seen = Series(given)
    y = randn(len(x), seen.size(x), seed=2)
    of = {s: part for s, _, part in seen.parts(1.0)}
    one = LinearTilt.exact(sde, seen)
    for at in (0.0, 0.2, 0.3, 0.6, 0.8, 0.95):
        t = at if sde.direction > 0 else 1 - at
        later = sorted((s for s in given if sde.direction * (s - t) > 1e-9), key=abs)
        later = later[:: sde.direction]
        rows = torch.cat([y[:, of[s]] for s in later], 1)
        law = lambda x, t=t, later=later: joint(sde, {s: given[s] for s in later}, x, t)  # noqa: E731
        truth = law(x).log_prob(rows)
        assert torch.allclose(one.log_h(x, time(t), y), truth, rtol=1e-9), at
        slope = grad(lambda x: law(x).log_prob(rows).sum())(x)  # noqa: B023
        assert torch.allclose(one.score(x, time(t), y), slope, rtol=1e-8, atol=1e-8), at


def test_what_is_seen_whole_hides_what_comes_after():
    sde, x = PROCESSES["matrix"], states()
    seen = Series({0.5: Terminal(), 1.0: Terminal()})
    y = randn(len(x), seen.size(x), seed=2)
    both, first = LinearTilt.exact(sde, seen), LinearTilt.exact(sde, Terminal(), end=0.5)
    assert torch.allclose(both.score(x, time(0.2), y), first.score(x, time(0.2), y[:, :3]))
    last = LinearTilt.exact(sde, Terminal())
    for t in (0.5, 0.5 - 2e-16, 0.7):  # at its time an observation is past
        assert torch.allclose(both.score(x, time(t), y), last.score(x, time(t), y[:, 3:])), t
    assert not both.score(x, time(1.0), y).any() and not both.log_h(x, time(1.0), y).any()


@pytest.mark.parametrize("process", ["number", "matrix", "against the clock"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_h_solves_the_backward_equation(process, several):
    """With u = log h: ∂u + f·∇u + (tr D∇²u + |Gᵀ∇u|²) / 2 = 0, along the process's own time."""
    sde, x = PROCESSES[process], states()
    given = SERIES if several else {1.0: Measured(H, std=0.3)}
    given = given if sde.direction > 0 else {1 - s: o for s, o in given.items()}
    seen = Series(given)
    one, y = LinearTilt.exact(sde, seen), randn(4, seen.size(x), seed=2)
    for at in (0.1, 0.41, 0.7, 0.87):
        t = time(at if sde.direction > 0 else 1 - at)
        row = lambda x, y, t=t: one.log_h(x[None], t, y[None])[0]  # noqa: E731
        slope = torch.stack([grad(row)(x, y) for x, y in zip(x, y, strict=True)])
        assert torch.allclose(one.score(x, t, y), slope, rtol=1e-10), at
        curve = torch.stack([jacrev(grad(row))(x, y) for x, y in zip(x, y, strict=True)])
        h = 4e-4  # of differences of order four, along the process's time
        u = {k: one.log_h(x, t + sde.direction * k * h, y) for k in (-2, -1, 1, 2)}
        forward = (8 * (u[1] - u[-1]) - (u[2] - u[-2])) / (12 * h)
        drift = sde.direction * (sde.drift(x, t) * slope).sum(1)
        G = sde.diffusion(x, t)
        D = torch.stack([G.gram(e.expand_as(x)) for e in torch.eye(3, dtype=F64)], 1)
        noise = (D * curve).sum((1, 2)) + G.tmv(slope).square().sum(1)
        terms = torch.stack([forward, drift, noise / 2])
        assert (terms.sum(0).abs() < 1e-8 * terms.abs().sum(0)).all(), (at, terms)
        assert (terms.abs() > 1e-3).any(1).all()


# --- other processes made linear


def test_around_is_the_linear_process_with_that_slope():
    """A double well at x: rate 4v (3x² - 1), and the mean where that line crosses zero."""
    v, at = 1.5, torch.tensor([1.2, -0.8], dtype=F64)
    well, x = DoubleWell(v, dim=2), randn(5, 2)
    rate = 4 * v * (3 * at**2 - 1)
    ou = OrnsteinUhlenbeck(rate, 1.0, at - 4 * v * at * (at**2 - 1) / rate)
    seen = Measured(H[:, :2], std=0.2)
    y = randn(5, 2, seed=2)
    for s in (0.1, 0.7):
        around = LinearTilt.around(well, seen, at).score(x, time(s), y)
        assert torch.allclose(around, LinearTilt.exact(ou, seen).score(x, time(s), y)), s


def test_around_takes_noise_time_and_sense():
    """G at the state and the time that are given, for pictures too, and the drift of Itô."""
    sde = SDE.of(
        lambda x, t: -(1 + t) * x.flip(2) ** 2,
        lambda x, t: Diagonal((1 + t) * x),
        span=(0.0, 2.0),
    )
    at = randn(2, 3).abs() + 0.5
    one = LinearTilt.around(sde, Terminal(), at)
    swapped = torch.eye(3, dtype=F64).flip(0)
    B = torch.block_diag(*(-6 * torch.diag(row) @ swapped for row in at.flip(1)))
    assert torch.allclose(one.slope, B)
    assert torch.allclose(one.offset, (3 * at.flip(1) ** 2).flatten())
    assert torch.allclose(one.sigma, torch.diag(3 * at.flatten()))
    early = LinearTilt.around(sde, Terminal(), at, t=0.5)
    assert torch.allclose(early.slope, B / 2) and early.end == 2.0
    wide = SDE.of(lambda x, t: x, Dense(H))
    x = torch.ones(2, dtype=F64)
    assert torch.equal(LinearTilt.around(wide, Terminal(), x).sigma, H)
    # x ∘ dw has the drift x / 2 in the sense of Itô
    circle = Stratonovich(SDE.of(lambda x, t: 0 * x, lambda x, t: Diagonal(x)))
    assert LinearTilt.around(circle, Terminal(), [2.0]).slope.item() == 0.5
    for one in (LinearTilt(circle, Terminal()), Pull(circle, Terminal())):
        assert one.sde.drift(2 * x[:1, None], time(0.0)).item() == 1, one


def test_a_process_against_the_clock_is_the_other_one_along_it():
    """dx = f dt with a falling t is dx = -f ds with s = 1 - t growing."""
    drift = lambda x, t: torch.sin(2 * x) + x.flip(1)  # noqa: E731
    back = SDE.of(drift, Dense(G[:2, :2]), span=(1.0, 0.0))
    forth = SDE.of(lambda x, t: -drift(x, t), Dense(G[:2, :2]))
    x, at = randn(4, 2), [0.4, 0.1]
    for seen, other in (
        (Coordinates([1], 0.1), Coordinates([1], 0.1)),
        (Series({0.7: Terminal(), 0.2: Coordinates([0])}),
         Series({0.3: Terminal(), 0.8: Coordinates([0])})),
    ):  # fmt: skip
        y = randn(4, seen.size(x), seed=2)
        for kind in (lambda *a: LinearTilt.around(*a, at), Pull):
            for s in (0.1, 0.5):
                ours, theirs = kind(back, seen), kind(forth, other)
                a, b = ours.control(x, time(1 - s), y), theirs.control(x, time(s), y)
                assert torch.allclose(a, b) and a.any(), ours


# --- the pull of Brownian motion


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(
    "sigma", [0.7, [0.5, 1.0, 2.0], G, torch.cat([G, H.mT], 1)],
    ids=["scale", "diagonal", "dense", "wide"],
)  # fmt: skip
def test_pull_is_exact_for_brownian_motion(sigma, seen):
    sde, seen, x = Brownian(sigma), SEEN[seen], states()
    exact, pull, y = LinearTilt.exact(sde, seen), Pull(sde, seen), randn(4, seen.size(x), seed=2)
    for t in (0.1, 0.999, torch.tensor([0.1, 0.5, 0.1, 0.99], dtype=F64)):
        t = torch.as_tensor(t, dtype=F64)
        score, control = exact.score(x, t, y), exact.control(x, t, y)
        assert torch.allclose(pull.score(x, t, y), score, rtol=1e-10, atol=1e-10), t
        assert torch.allclose(pull.control(x, t, y), control, rtol=1e-10, atol=1e-10), t


def test_pull_by_the_noise_where_it_stands():
    """Geometric Brownian motion by hand, and a G that turns with the state."""
    x, y, tau, s = randn(5, 2).exp(), randn(5, 2, seed=2).exp(), 0.3, 0.6
    pull = Pull(GeometricBrownian(sigma=s), Terminal())
    assert torch.allclose(pull.control(x, time(0.7), y), (y - x) / (s * x * tau))
    assert torch.allclose(pull.score(x, time(0.7), y), (y - x) / ((s * x) ** 2 * tau))
    one, g = Pull(GeometricBrownian(sigma=s), Coordinates([1], 0.2)), s * x[:, 1]
    c = one.control(x, time(0.7), y[:, :1])
    assert torch.allclose(c[:, 1], g / (tau * g**2 + 0.04) * (y[:, 0] - x[:, 1]))
    assert not c[:, 0].any()

    def turned(x, t):
        rows = [torch.stack([2 + x[:, 0].sin(), x[:, 1]], 1),
                torch.stack([0.3 * x[:, 0], 1 + t + 0 * x[:, 1]], 1)]  # fmt: skip
        return Dense(torch.stack(rows, 1))

    t = torch.tensor([0.1, 0.2, 0.1, 0.5, 0.9], dtype=F64)
    sde, seen = SDE.of(lambda x, t: x**3, turned), Measured(H[:, :2], std=0.3)
    M, h = turned(x, t).G, H[:, :2]
    S = (1 - t)[:, None, None] * h @ M @ M.mT @ h.mT + 0.09 * torch.eye(2, dtype=F64)
    c = M.mT @ h.mT @ torch.linalg.solve(S, (y - x @ h.mT).unsqueeze(-1))
    assert torch.allclose(Pull(sde, seen).control(x, t, y), c.squeeze(-1))
    exact = torch.linalg.solve(M, (y - x).unsqueeze(-1)).squeeze(-1) / (1 - t)[:, None]
    assert torch.allclose(Pull(sde, Terminal()).control(x, t, y), exact)


def test_pull_towards_what_is_linear_and_next():
    x, above = states(), Event(lambda x: x[:, 0] > 0)
    sde = Brownian(G)
    seen = Series({0.9: Coordinates([1]), 0.4: above, 0.6: Measured(H, std=0.2)})
    y = randn(4, seen.size(x), seed=2)
    pull = Pull(sde, seen)
    first, last = Pull(sde, Measured(H, std=0.2), end=0.6), Pull(sde, Coordinates([1]), end=0.9)
    for t in (0.1, 0.5):  # the event in between does not pull
        assert torch.equal(pull.control(x, time(t), y), first.control(x, time(t), y[:, 2:]))
    for t in (0.6, 0.8):
        assert torch.equal(pull.control(x, time(t), y), last.control(x, time(t), y[:, :1]))
    assert not pull.control(x, time(0.9), y).any()
    none = Pull(Brownian(torch.cat([G, H.mT], 1)), above)
    c = none.control(x, time(0.1), torch.ones(4, 1, dtype=F64))
    assert c.shape == (4, 5) and not c.any()
    assert not none.score(x, torch.zeros(4, dtype=F64), torch.ones(4, 1)).any()


class Counted(Diagonal):
    """Counts how often it is asked."""

    def gram(self, v):
        CALLS.append(1)
        return super().gram(v)


CALLS = []


def test_many_pixels_cost_few_products():
    """392 of 784 pixels, by noise of each, of all, or by what blurs them."""
    x = randn(3, 1, 28, 28)
    mask = torch.zeros(1, 28, 28, dtype=torch.bool)
    mask[:, :14] = True
    g = 0.5 + x.sigmoid()
    y = randn(3, 392, seed=2)
    for operator, most in ((Counted(g), 2), (Counted(torch.full_like(g, 2.0)), 2)):
        CALLS.clear()
        pull = Pull(SDE.of(lambda x, t: -x, operator), Coordinates(mask))
        c = pull.control(x, time(0.8), y).flatten(1)
        wanted = (y - x.flatten(1)[:, :392]) / (operator.g.flatten(1)[:, :392] * 0.2)
        assert torch.allclose(c[:, :392], wanted, rtol=1e-10) and not c[:, 392:].any()
        assert len(CALLS) <= most, operator
    blur = lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1)  # noqa: E731
    seen, CALLS[:] = Measured(blur, std=0.3), []
    y = randn(3, 784, seed=3)
    score = Pull(SDE.of(lambda x, t: -x, Counted(g)), seen).score(x, time(0.8), y)
    assert len(CALLS) < 60
    h = seen.matrix(x)
    S = 0.2 * h @ torch.diag_embed(g.flatten(1) ** 2) @ h.mT + 0.09 * torch.eye(784, dtype=F64)
    exact = torch.linalg.solve(S, (y - seen.forward(x)).unsqueeze(-1)).squeeze(-1) @ h
    assert torch.allclose(score.flatten(1), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k", [1, 5, FEW, FEW + 1, 90])
def test_equations_known_by_their_products(k):
    """Matrices of each state: full, diagonal, and nearly diagonal, which is not diagonal."""
    root = randn(3, k, k) / k**0.5
    full = root @ root.mT + 0.5 * torch.eye(k, dtype=F64)
    near = torch.diag_embed(randn(3, k).exp())
    near[:, 0, -1] = near[:, -1, 0] = 1e-6
    zero = near * torch.eye(k, dtype=F64)
    laplace = 2.1 * torch.eye(k) - torch.eye(k).roll(1, 0) - torch.eye(k).roll(-1, 0)
    for M in (full, near, zero, laplace.double().expand(3, k, k)):
        r = randn(3, k, seed=2)
        A = lambda v, M=M: (M @ v.unsqueeze(-1)).squeeze(-1)  # noqa: E731
        v = torch.linalg.solve(M, r.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(solved(A, r), v, rtol=1e-9, atol=1e-9)
        assert torch.allclose(conjugate_gradients(A, r), v, rtol=1e-9, atol=1e-9)
        one = r * torch.tensor([[1.0], [0.0], [1e-30]], dtype=F64)  # rows end at different times
        assert torch.allclose(conjugate_gradients(A, one)[:2], (v * (one / r))[:2], atol=1e-9)


def test_single_precision_stays_single():
    x, y = states().float(), randn(4, 2).float()
    for kind in (LinearTilt.exact, Pull):
        double = kind(Brownian(G), Measured(H, std=0.1)).control(
            x.double(), time(0.999), y.double()
        )
        single = kind(Brownian(G), Measured(H, std=0.1)).control(x, time(0.999), y)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), double, rtol=1e-4), kind


def test_laws_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr("kakusan.inference.conditioning.views.KEPT", 100)
    one, x = LinearTilt.exact(Brownian(), Terminal()), states()
    y = torch.zeros_like(x)
    with torch.inference_mode():
        one.score(x, time(0.5), y)
    ahead = one._of(x)
    for t in (0.5, 0.1, 0.2, 0.3, 0.4):
        leaf = x.clone().requires_grad_()
        one.score(leaf, time(t), y).sum().backward()  # what inference made serves gradients
        assert torch.allclose(leaf.grad, torch.full_like(x, -1 / (1 - t)))
    assert len(ahead._laws) == 2 and ahead._numbers <= 100


# --- paths


def chain(sde, x0, grid):
    """Mean and covariance of Euler's chain of a linear process, tilted or not: no sampling."""
    d, m, P = len(x0), x0, torch.zeros(len(x0), len(x0), dtype=F64)
    eye = torch.eye(d, dtype=F64)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        f = sde.drift(torch.cat([m[None], m + eye]), t)
        M = eye + (s - t) * (f[1:] - f[0]).mT
        m, P = m + (s - t) * f[0], M @ P @ M.mT + (s - t) * sde.diffusion(m[None], t).gram(eye)
    return m, P


def check(sde, one, y, x0, at, mean, variance):
    """Paths have the law of the chain, and the chain is within 1% of that of the bridge."""
    grid = grids.uniform(0.0, 1.0, 400)[: round(at * 400) + 1]
    x0, n = torch.as_tensor(x0, dtype=F64), 10_000
    tilted = tilt(sde, one.given(torch.as_tensor(y, dtype=F64)[None]))
    m, P = chain(tilted, x0, grid)
    v = P.diagonal()
    assert ((m - mean).abs() < 0.01 * variance.sqrt()).all(), (m, mean)
    assert ((v / variance - 1).abs() < 0.01).all(), (v, variance)
    end = solve(tilted, x0.expand(n, -1), grid, noise=Fresh(0)).end
    assert ((end.mean(0) - m).abs() < 4 * (v / n).sqrt()).all(), (end.mean(0), m)
    assert ((end.var(0) / v - 1).abs() < 4 * (2 / n) ** 0.5).all(), (end.var(0), v)


@pytest.mark.parametrize("kind", [LinearTilt.exact, Pull], ids=["linear", "pull"])
def test_brownian_bridges(kind):
    """N(x0 + (y - x0) t / T, s² t (T - t) / T)."""
    sde, x0, y, t, s = Brownian([0.5, 2.0]), [0.3, -1.0], [1.0, 2.0], 0.75, torch.tensor([0.5, 2])
    x0, y = torch.tensor(x0, dtype=F64), torch.tensor(y, dtype=F64)
    check(sde, kind(sde, Terminal()), y, x0, t, x0 + (y - x0) * t, s**2 * t * (1 - t))


def test_ornstein_uhlenbeck_bridges():
    """e^{-kt} x0 + e^{-k tau} (q_t / q_T) (y - e^{-kT} x0), q_t q_tau / q_T."""
    k, s, x0, y, t = 2.0, 0.8, 1.0, -0.5, 0.625
    sde = OrnsteinUhlenbeck(k, s)
    q = lambda t: s**2 * (1 - math.exp(-2 * k * t)) / (2 * k)  # noqa: E731
    mean = math.exp(-k * t) * x0
    mean += math.exp(-k * (1 - t)) * q(t) / q(1) * (y - math.exp(-k) * x0)
    variance = torch.tensor([q(t) * q(1 - t) / q(1)])
    check(sde, LinearTilt.exact(sde, Terminal()), [y], [x0], t, mean, variance)


def test_linear_and_noisy_observations_of_a_linear_process():
    """The law of X_t given H X_T + noise = y is that of a Kalman smoother."""
    sde = OrnsteinUhlenbeck(A[:2, :2], G[:2, :2], MEAN[:2])
    seen, t, x0, y = Measured(H[:1, :2], std=0.5), 0.75, torch.tensor([[1.0, 0.5]]).double(), 3.0
    early, late = (factor_and_covariance(sde, x0, tau) for tau in (t, 1 - t))
    m, P, h = x0[0] @ early[0].mT + early[2], early[1], H[:1, :2] @ late[0]
    S = h @ P @ h.mT + H[:1, :2] @ late[1] @ H[:1, :2].mT + 0.25
    away = y - h @ m - H[:1, :2] @ late[2]
    mean = m + (P @ h.mT / S @ away[:, None])[:, 0]
    variance = (P - P @ h.mT @ h @ P / S).diagonal()
    assert ((mean - m).abs() > 0.1).all()
    check(sde, LinearTilt.exact(sde, seen), [y], x0[0], t, mean, variance)


# --- refusals


def test_refusals_say_what_to_do():
    x, y = states(2, 2), torch.zeros(2, 2, dtype=F64)
    with pytest.raises(KakusanError, match="exact tilt is that of.*got DoubleWell.*around"):
        LinearTilt.exact(DoubleWell(), Terminal())
    with pytest.raises(KakusanError, match="got VP"):
        LinearTilt.exact(VP(), Terminal())
    event = LinearTilt.exact(Brownian(), Series({1.0: Event(lambda x: x[:, 0] > 1)}))
    with pytest.raises(KakusanError, match=r"Event\(.*\) is no linear function of the state"):
        event.score(x, time(0.5), y)
    with pytest.raises(KakusanError, match=r"sigma has shape \(3,\).*shape \(2,\) have 2 numbers"):
        LinearTilt(Brownian(), Terminal(), sigma=[1.0, 2.0, 3.0]).score(x, time(0.5), y)
    with pytest.raises(KakusanError, match=r"slope has shape \(3, 3\)"):
        LinearTilt.exact(PROCESSES["matrix"], Terminal()).score(x, time(0.5), y)
    with pytest.raises(KakusanError, match="slope must be a square matrix"):
        LinearTilt(Brownian(), Terminal(), slope=H)
    with pytest.raises(NotElliptic, match="does not reach all 2 numbers.*after t=0.5.*std > 0"):
        LinearTilt.exact(Brownian([1.0, 0.0]), Terminal()).score(x, time(0.5), y)
    # one number too many, exactly and but for rounding
    planes = [Measured(randn(3, 2, seed=s) @ randn(2, 3, seed=100 + s)) for s in range(20)]
    for twice in planes:
        with pytest.raises(NotElliptic, match="reach all 3 numbers.*observe less"):
            LinearTilt.exact(Brownian(), twice).score(randn(2, 3), time(0.5), randn(2, 3))


def test_pull_refuses_what_noise_does_not_reach():
    sde = Underdamped(lambda q: (q**2).sum(1) / 2)
    x, y, t = states(2, 2), torch.ones(2, 2, dtype=F64), time(0.5)
    for seen in (Coordinates([0]), Terminal(), Coordinates([0, 1]), Measured(torch.ones(2, 2))):
        with pytest.raises(NotElliptic, match="noise of Underdamped does not.*LinearTilt.around"):
            Pull(sde, seen).control(x, t, y[:, : seen.size(x)])
    with pytest.raises(NotElliptic, match="LinearTilt.around"):
        Pull(sde, Terminal()).score(x, t, y)
    # noise on what is seen leaves some uncertainty, and no way to lessen it
    assert not Pull(sde, Coordinates([0], 0.1)).control(x, t, y[:, :1]).any()
    way = LinearTilt.around(sde, Coordinates([0]), x[0])
    assert way.control(x, t, y[:, :1]).any()
    still = SDE.of(lambda x, t: -x, Zero())
    with pytest.raises(NotElliptic, match="no noise"):
        Pull(still, Terminal()).control(x, t, y)
    many = torch.cat([torch.eye(FEW + 2, dtype=F64)] * 2)
    z = randn(2, FEW + 2)
    with pytest.raises(NotElliptic, match="singular, or nearly, for 2 of 2"):
        seen = Measured(many)
        Pull(SDE.of(lambda x, t: -x, Scale(1.0)), seen).control(z, t, randn(2, len(many), seed=3))
