"""The tilt of a process made linear where it stands.

For linear processes it is Doob's, without drift the pull of Brownian motion, and otherwise that of
the linear process of each row, less what a look so far is not to be trusted.
"""

import math

import pytest
import torch
from torch.func import jacrev

from kakusan import (
    SDE,
    Brownian,
    CriticallyDamped,
    Dense,
    Diagonal,
    FitzHughNagumo,
    Fresh,
    GeometricBrownian,
    NotElliptic,
    OrnsteinUhlenbeck,
    Scale,
    Stratonovich,
    Underdamped,
)
from kakusan.core import grids
from kakusan.inference.conditioning.ahead import BEND, Linearised
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.paths import conditioned
from kakusan.inference.conditioning.pull import Pull
from kakusan.inference.conditioning.tilts import Untilted
from kakusan.processes.observations import Coordinates, Event, Measured, Series, Terminal
from kakusan.solvers.gaussian import EulerSteps
from problems import F64, time

A = torch.tensor([[0.8, 1.5, 0.0], [-1.0, 0.3, 0.2], [0.1, 0.0, -0.4]], dtype=F64)
G = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.6, 0.0], [0.3, 0.0, 0.5]], dtype=F64)
H = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]], dtype=F64)
CHAIN = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, -2.0], [0.3, 0.0, 1.0]], dtype=F64)
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)

LINEAR = {
    "number": OrnsteinUhlenbeck(1.3, 0.8, 0.4),
    "matrix": OrnsteinUhlenbeck(A, G, MEAN),
    "stiff": OrnsteinUhlenbeck([0.5, -0.7, 200.0], [1.0, 0.5, 0.3], MEAN),
    "against the clock": OrnsteinUhlenbeck(A, G, MEAN, span=(1.0, 0.0)),
    "noise in the last alone": OrnsteinUhlenbeck(CHAIN, [[0.0], [0.0], [0.7]], MEAN),
}
SEEN = {
    "terminal": Terminal(),
    "coordinates": Coordinates([2, 0]),
    "noise": Measured(H, std=0.3),
}


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def bent():
    """Drift, noise and time, none of them simple, in three numbers."""

    def drift(x, t):
        c = torch.as_tensor(1 + t, dtype=x.dtype).reshape(-1, 1)
        return c * torch.sin(x.roll(1, 1)) - 0.3 * x**3

    return SDE.of(drift, lambda x, t: Diagonal(0.5 + x.flip(1) ** 2), span=(0.0, 2.0))


# --- processes for which it is exact


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("process", LINEAR)
def test_linear_processes_have_their_exact_tilt(process, seen):
    """At any distance: what is linear is trusted from anywhere."""
    sde, seen, x = LINEAR[process], SEEN[seen], randn(5, 3)
    y = randn(5, seen.size(x), seed=2)
    local, exact = Linearised(sde, seen), LinearTilt.exact(sde, seen)
    for left in (1.0, 0.3, 1e-2):
        t = time(sde.span[1] - sde.direction * left)
        truth = exact.score(x, t, y)
        close = torch.allclose(
            local.score(x, t, y), truth, rtol=1e-8, atol=1e-8 * truth.abs().max()
        )
        assert close, left
        assert torch.allclose(local.control(x, t, y), exact.control(x, t, y), rtol=1e-7), left


@pytest.mark.parametrize(
    "seen", [Terminal(), Coordinates([0]), Coordinates([1], std=0.1)], ids=str
)
def test_kinetic_motion(seen):
    """Where the kick of the momentum moves what is seen as the cube of the time that is left."""
    sde, x = CriticallyDamped(beta=1.5, mass=0.5), randn(5, 2)
    local, exact, y = Linearised(sde, seen), LinearTilt.exact(sde, seen), randn(5, seen.size(x))
    for left in (0.9, 0.1, 1e-4):
        t = time(sde.span[1] - left)
        assert torch.allclose(local.control(x, t, y), exact.control(x, t, y), rtol=1e-8), left


def test_without_drift_it_is_the_pull_of_brownian_motion():
    x, t = randn(5, 3).abs() + 0.5, time(0.3)
    wide = Brownian(torch.cat([G, H.mT], 1))
    growth = SDE.of(lambda x, t: 0 * x, lambda x, t: Diagonal((1 + t) * x))
    for sde in (Brownian(0.7), wide, growth):
        for seen in SEEN.values():
            y = randn(5, seen.size(x), seed=2)
            ours, pull = Linearised(sde, seen), Pull(sde, seen)
            assert torch.allclose(ours.score(x, t, y), pull.score(x, t, y), rtol=1e-9), sde
            assert torch.allclose(ours.control(x, t, y), pull.control(x, t, y), rtol=1e-9), sde


# --- others: the linear process of each row, and how far it is trusted


def trust(sde, x, t, tau):
    """The factor w of a row, by other means."""
    f, J = sde.drift(x[None], t)[0], jacrev(lambda u: sde.drift(u[None], t)[0])(x)
    d = len(x)
    D = torch.stack([sde.diffusion(x[None], t).gram(e[None])[0] for e in torch.eye(d, dtype=F64)])
    s, w = torch.linspace(0, tau, 2001, dtype=F64), torch.full((2001,), tau / 2000, dtype=F64)
    w[[0, -1]] /= 2
    E = torch.matrix_exp(J * s[:, None, None])
    moved = torch.einsum("s,sij,j->i", w, E, f)
    Q = torch.einsum("s,sij,jk,slk->il", w, E, D, E)
    r = sde.drift((x + moved)[None], t)[0] - f - J @ moved
    return 1 / (1 + ((tau * r / 2) ** 2 / Q.diagonal()).sum() / BEND**2)


@pytest.mark.parametrize("seen", SEEN)
def test_each_row_has_its_own_linear_process(seen):
    sde, seen, x = bent(), SEEN[seen], randn(6, 3)
    t = torch.tensor([0.2, 0.9, 0.2, 1.5, 1.99, 2.0], dtype=F64)
    local, y = Linearised(sde, seen), randn(6, seen.size(x), seed=2)
    score, w = local.score(x, t, y), []
    for i in range(5):
        around = LinearTilt.around(sde, seen, x[i], t=t[i].item())
        w.append(trust(sde, x[i], t[i], 2 - t[i].item()))
        expected = w[-1] * around.score(x[[i]], t[i], y[[i]])
        assert torch.allclose(score[[i]], expected, rtol=1e-4), i
    assert not score[5].any()  # its time is past
    assert min(w) < 0.9 and w[4] > 0.999
    assert torch.allclose(local.control(x, t, y), sde.diffusion(x, t).tmv(score))


def test_trust_comes_with_the_cube_of_the_time_left():
    """The drift of a voltage is off by τ², its mean by τ³, and its spread is τ^(3/2)."""
    sde = FitzHughNagumo()
    x, y = torch.tensor([[-0.3, 0.1]], dtype=F64), torch.tensor([[0.2]], dtype=F64)
    lost = []
    for left in (0.02, 0.01, 0.005):
        around = LinearTilt.around(sde, Coordinates([0]), x[0]).control(x, time(2 - left), y)
        local = Linearised(sde, Coordinates([0])).control(x, time(2 - left), y)
        lost.append(1 - (local / around)[0, 1].item())
    orders = [math.log2(a / b) for a, b in zip(lost, lost[1:], strict=False)]
    assert all(abs(order - 3) < 0.3 for order in orders), (orders, lost)


def test_the_sense_of_ito_and_the_arrow_of_time():
    drift = lambda x, t: torch.sin(2 * x) + x.flip(1)  # noqa: E731
    back = SDE.of(drift, Dense(G[:2, :2]), span=(1.0, 0.0))
    forth = SDE.of(lambda x, t: -drift(x, t), Dense(G[:2, :2]))
    x, seen = randn(4, 2), Coordinates([1], 0.1)
    y = randn(4, 1, seed=2)
    for s in (0.1, 0.8):
        a = Linearised(back, seen).control(x, time(1 - s), y)
        b = Linearised(forth, seen).control(x, time(s), y)
        assert torch.allclose(a, b, rtol=1e-12) and a.any(), s
    circle = Stratonovich(SDE.of(lambda x, t: 0 * x, lambda x, t: Diagonal(x)))
    geometric, one = GeometricBrownian(0.5, 1.0), torch.ones(1, 1, dtype=F64)
    a, b = (Linearised(sde, Terminal()).score(one, time(0.2), 2 * one)
            for sde in (circle, geometric))  # fmt: skip
    assert torch.allclose(a, b)


# --- what it can be asked


def test_pictures_times_of_each_state_and_series():
    sde, x = bent(), randn(6, 2, 3)
    picture = SDE.of(lambda x, t: torch.sin(x.flip(1)) - x**2, Scale(0.7))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    both = Series({0.6: Coordinates(mask), 1.0: Terminal()})
    t = torch.tensor([0.2, 0.9, 0.2, 0.5, 1.0, 0.2], dtype=F64)
    for seen in (Terminal(), Coordinates(mask, 0.2), both):
        y, one = randn(6, seen.size(x), seed=3), Linearised(picture, seen)
        many = one.score(x, t, y)
        each = torch.cat([one.score(x[[i]], t[i], y[[i]]) for i in range(6)])
        assert torch.allclose(many, each, rtol=1e-10) and not many[4].any(), seen
        assert many.shape == x.shape and many[0].any()
    first = Linearised(picture, Coordinates(mask), end=0.6)
    y = randn(6, both.size(x), seed=3)
    ahead = Linearised(picture, both).score(x, time(0.1), y)
    assert torch.equal(ahead, first.score(x, time(0.1), y[:, :3]))
    event = Linearised(sde, Event(lambda x: x[:, 0] > 0))
    assert not event.score(randn(4, 3), time(0.1), torch.ones(4, 1)).any()


def test_single_precision_sees_what_double_does():
    sde, seen, x = FitzHughNagumo(), Coordinates([0]), 0.5 * randn(50, 2)
    y = randn(50, 1, seed=2)
    for left in (1.0, 0.1, 1e-3):
        exact = Linearised(sde, seen).control(x, time(2 - left), y)
        single = Linearised(sde, seen).control(x.float(), time(2 - left), y.float())
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max())


def test_what_no_noise_reaches_is_refused():
    still = SDE.of(lambda x, t: torch.sin(x), Diagonal(torch.tensor([0.0, 1.0], dtype=F64)))
    x, y = randn(4, 2), randn(4, 1)
    with pytest.raises(NotElliptic, match=r"noise of _Additive does not reach .* Coordinates"):
        Linearised(still, Coordinates([0])).score(x, time(0.5), y)
    assert Linearised(still, Coordinates([0], std=0.1)).score(x, time(0.5), y).any()
    assert Linearised(still, Coordinates([1])).score(x, time(0.5), y).any()


def test_a_look_too_long_is_no_pull_and_harms_no_other_row():
    """A row that explodes, beside one that does not."""
    sde = SDE.of(lambda x, t: x**3 + x.flip(1), Diagonal(torch.tensor([0.0, 1.0], dtype=F64)))
    calm, y = torch.tensor([[0.1, 0.2]], dtype=F64), torch.tensor([[0.3, 0.1]], dtype=F64)
    for wild in (30.0, 1e4, 1e100):
        x = torch.cat([calm, calm * wild])
        score = Linearised(sde, Terminal()).score(x, time(0.2), y.expand(2, 2))
        alone = Linearised(sde, Terminal()).score(calm, time(0.2), y)
        assert torch.allclose(score[:1], alone, rtol=1e-6) and alone.any(), wild
        assert not score[1].any(), wild


# --- what it is for


def effective(sde, seen, y, start, steps=100, n=400):
    """Effective sample sizes and densities by tilt."""
    chain, x = EulerSteps(sde, grids.uniform(*sde.span, steps)), start.expand(n, -1).contiguous()
    y = torch.tensor([y], dtype=F64)
    tilts = {
        "none": Untilted(sde),
        "local": Linearised(sde, seen),
        "start": LinearTilt.around(sde, seen, start),
    }
    with torch.no_grad():
        return {k: conditioned(chain, x, one, seen, y, noise=Fresh(3)) for k, one in tilts.items()}


def test_a_nerve_seen_in_its_voltage():
    """Noise enters the recovery alone; half of all paths end in -0.96 to -0.80."""
    sde = FitzHughNagumo()
    paths = effective(sde, Coordinates([0]), [-1.0], sde.start)
    ess = {k: p.ess for k, p in paths.items()}
    assert ess["local"] > 60 and ess["local"] > 2.5 * max(ess["none"], ess["start"]), ess
    a, b = paths["local"].log_density, paths["none"].log_density
    assert abs(a.value - b.value) < 4 * math.hypot(a.std_error, b.std_error), (a, b)


def test_kinetic_motion_in_two_wells():
    sde = Underdamped(lambda q: (q**2 - 1).square().sum(1), temperature=0.5)
    start = torch.tensor([-1.0, 0.0], dtype=F64)
    ess = {k: p.ess for k, p in effective(sde, Coordinates([0]), [-0.8], start).items()}
    assert ess["local"] > 50 and ess["local"] > 10 * ess["none"], ess
