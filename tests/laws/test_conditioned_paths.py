"""Paths that meet what was seen: exact weights, at any step size, whatever the tilt.

A linear process makes a Gaussian chain, whose joint law is known: densities, conditional means
and variances at all times.
"""

import functools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from kakusan import (
    SDE,
    Brownian,
    CriticallyDamped,
    Dense,
    Diagonal,
    Fresh,
    KakusanError,
    Keyed,
    NotElliptic,
    OrnsteinUhlenbeck,
    Scale,
    Underdamped,
    Zero,
    grids,
    reverse,
    solve,
    tilt,
)
from kakusan import FitzHughNagumo as Nerve
from kakusan.core.noise import Recorded, generator
from kakusan.inference.conditioning.ahead import Linearised
from kakusan.inference.conditioning.finish import Free, ModifiedBridge, Pinned
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.metropolis import metropolis
from kakusan.inference.conditioning.paths import conditioned, systematic
from kakusan.inference.conditioning.reach import Rows
from kakusan.inference.conditioning.tilts import Tilt, Untilted
from kakusan.inference.weights import path_log_weights
from kakusan.processes.observations import (
    Coordinates,
    Event,
    Label,
    Measured,
    Series,
    Terminal,
)
from kakusan.solvers.gaussian import EulerSteps
from problems import F64, Geometric, time


class Slope(Tilt):
    """Any field as a tilt, wrong ones too."""

    def __init__(self, sde, u, log_h=None):
        self.sde, self.u, self._log_h = sde, u, log_h

    def score(self, x, t, y):
        return self.u(x, t, y)

    def log_h(self, x, t, y):
        return self._log_h(x, t, y)


def toward(sde, strength=1.0):
    """Brownian motion's own pull to the end, wrong for everything else."""
    return Slope(sde, lambda x, t, y: strength * (y - x) / (sde.span[1] - t).abs())


class Law:
    """The joint normal law of the chain of a linear process, from one start; flat, (N + 1) d."""

    def __init__(self, steps, x0):
        self.steps, self.d, n = steps, x0.numel(), len(steps)
        d, x0, zero = self.d, x0.reshape(1, -1), torch.zeros(1, x0.numel(), dtype=F64)
        eye = torch.eye(d, dtype=F64)
        m = math.prod(steps.noise_shape(x0)[1:])
        self.A, self.b, self.Q = [], [], []
        means, cov = [x0[0]], torch.zeros((n + 1) * d, (n + 1) * d, dtype=F64)
        for k in range(n):
            b = steps.mean(zero, k)[0]
            A = (steps.mean(eye, k) - b).mT
            G = torch.stack(
                [steps.operator(x0, k).mv(e[None]).flatten() for e in torch.eye(m).to(x0)], 1
            )
            Q = steps.h(k) * G @ G.mT
            means.append(A @ means[-1] + b)
            now, new = slice(k * d, (k + 1) * d), slice((k + 1) * d, (k + 2) * d)
            cov[new] = A @ cov[now]
            cov[:, new] = cov[new].mT
            cov[new, new] = A @ cov[now, now] @ A.mT + Q
            self.A, self.b, self.Q = [*self.A, A], [*self.b, b], [*self.Q, Q]
        self.mean, self.cov = torch.cat(means), cov

    def seen(self, *parts):
        """The matrix from paths to what is seen: (index, H) each."""
        rows = []
        for k, H in parts:
            row = torch.zeros(len(H), len(self.mean), dtype=F64)
            row[:, k * self.d : (k + 1) * self.d] = H
            rows.append(row)
        return torch.cat(rows)

    def given(self, M, y, std=0.0):
        """Log p(y), and mean and covariance of paths given M X + std eps = y."""
        S = M @ self.cov @ M.mT + std**2 * torch.eye(len(M), dtype=F64)
        gain = torch.linalg.solve(S, M @ self.cov).mT
        log_p = MultivariateNormal(M @ self.mean, S).log_prob(y)
        return log_p, self.mean + gain @ (y - M @ self.mean), self.cov - gain @ M @ self.cov

    def tilt(self, sde, H, wrong=1.0):
        """The chain's own h, backwards from the end: exact where `wrong` is 1."""
        at = {t: k for k, t in enumerate(self.steps.grid.tolist())}

        def law(x, t, y):
            P, c, S = H, H.new_zeros(len(H)), H.new_zeros(len(H), len(H))
            for k in reversed(range(at[float(t)], len(self.A))):
                S, c, P = S + P @ self.Q[k] @ P.mT, c + P @ self.b[k], P @ self.A[k]
            return P, y - c - x @ P.mT, S

        def u(x, t, y):
            P, away, S = law(x, t, y)
            return wrong * torch.linalg.solve(S, away.mT).mT @ P

        def log_h(x, t, y):
            P, away, S = law(x, t, y)
            return MultivariateNormal(0 * away[0], S).log_prob(away)

        return Slope(sde, u, log_h)


def row(*numbers):
    return torch.tensor([numbers], dtype=F64)


def many(x0, n):
    return torch.as_tensor(x0, dtype=F64).reshape(1, -1).repeat(n, 1)


def check_mean(values, truth, name, z=4.5):
    se = values.std().item() / math.sqrt(len(values))
    assert se < 0.2 * abs(truth) and abs(values.mean().item() - truth) < z * se + 1e-9, (
        name, values.mean().item(), truth, se)  # fmt: skip


def check_paths(paths, law, log_p, mean, cov, name, z=4.5):
    """Density, and means and second moments at all times, against the joint law."""
    check_mean((paths.log_weights - log_p).exp(), 1.0, name)
    assert abs(paths.log_density.value - log_p) < z * paths.log_density.std_error + 1e-9, name
    for f, truth in (
        (lambda x: x.movedim(0, 1).flatten(1), mean),
        (lambda x: (x.movedim(0, 1).flatten(1) - mean) ** 2, cov.diagonal()),
    ):
        found = paths.expectation(f)
        gap = (found.value - truth).abs()
        assert (gap < z * found.std_error + 1e-9).all(), (name, gap / found.std_error)


def consistent(paths, steps):
    """Each state is the chain's own step from the one before it."""
    for k in range(len(steps)):
        made = steps.after(paths.x[k], k, paths.dw[k])
        assert (made - paths.x[k + 1]).abs().max() < 1e-9 * (1 + paths.x.abs().max()), k


# --- one observation at the end

OU = OrnsteinUhlenbeck(rate=1.3, sigma=0.8)
TURNING = SDE.of(
    lambda x, t: x @ torch.tensor([[-1.0, 0.7], [-0.4, -0.5]], dtype=F64) + 0.3,
    Dense(torch.tensor([[0.9, 0.0], [0.5, 0.6]], dtype=F64)),
)
MEAN = row(0.6, -1.1)


@pytest.mark.parametrize("end", [Pinned(), ModifiedBridge()], ids=["pinned", "modified"])
@pytest.mark.parametrize("kind", ["exact", "wrong", "none"])
def test_ornstein_uhlenbeck_given_its_end(kind, end):
    steps, y = EulerSteps(OU, grids.uniform(0.0, 1.0, 8)), row(0.9)
    law = Law(steps, row(-0.4))
    M = law.seen((8, torch.eye(1, dtype=F64)))
    pull = {"exact": law.tilt(OU, torch.eye(1, dtype=F64)), "wrong": toward(OU, 0.6),
            "none": Untilted(OU)}[kind]  # fmt: skip
    x = many([-0.4], 20_000)
    paths = conditioned(steps, x, pull, Terminal(), y, noise=Fresh(1), end=end)
    assert torch.equal(paths.end, y.expand_as(paths.end)) and not paths.missed.any()
    check_paths(paths, law, *law.given(M, y[0]), (kind, end))
    consistent(paths, steps)
    if kind == "exact":  # the control acts for a whole step: not even then are weights equal
        assert paths.ess > 0.75 * len(x)
    end = conditioned(steps, x, pull, Terminal(), y, noise=Fresh(1), end=end, keep=False)
    assert torch.equal(end.log_weights, paths.log_weights) and end.dw is None


def test_a_brownian_bridge_weighs_its_density_and_nothing_else():
    """Drift (y - x) / (T - t) with narrowed noise is the bridge of the chain itself."""
    brownian = Brownian(sigma=0.7, span=(0.0, 2.0))
    steps, y = EulerSteps(brownian, grids.quadratic(0.0, 2.0, 9)), row(1.5, -1.0)
    exact = Slope(brownian, lambda x, t, y: (y - x) / (0.49 * (2.0 - t)))
    truth = Normal(time(0.0), 0.7 * math.sqrt(2.0)).log_prob(y).sum().item()
    paths = conditioned(
        steps, many([0.0, 0.0], 50), exact, Terminal(), y, noise=Fresh(0), end=ModifiedBridge()
    )
    assert (paths.log_weights - truth).abs().max() < 1e-11
    plain = conditioned(steps, many([0.0, 0.0], 20_000), exact, Terminal(), y, noise=Fresh(0))
    assert plain.log_weights.std() > 0.1
    check_mean((plain.log_weights - truth).exp(), 1.0, "pinned")


@pytest.mark.parametrize("end", [Pinned(), ModifiedBridge()], ids=["pinned", "modified"])
@pytest.mark.parametrize("what", ["coordinate", "both", "mixed", "noisy", "noisy coordinate"])
@pytest.mark.parametrize("kind", ["exact", "wrong", "none"])
def test_a_plane_given_what_is_seen_of_its_end(kind, what, end):
    seen, H, y = {
        "coordinate": (Coordinates([-1]), row(0.0, 1.0), row(0.8)),
        "both": (Terminal(), torch.eye(2, dtype=F64), row(0.5, 0.8)),
        "mixed": (Measured(MEAN), MEAN, row(-0.7)),
        "noisy": (Measured(MEAN, std=0.3), MEAN, row(-0.7)),
        "noisy coordinate": (Coordinates([0], std=0.4), row(1.0, 0.0), row(0.8)),
    }[what]
    steps, x0 = EulerSteps(TURNING, grids.uniform(0.0, 1.0, 6)), row(0.2, -0.3)
    law = Law(steps, x0)
    wrong = Slope(TURNING, lambda x, t, y: torch.cat([0.5 * (0.4 - x[:, :1]), x[:, 1:].cos()], 1))
    if kind == "exact" and seen.std:
        kind = "none"  # of the noiseless event; nothing else is exact here
    pull = {"exact": law.tilt(TURNING, H), "wrong": wrong, "none": Untilted(TURNING)}[kind]
    paths = conditioned(steps, x0.repeat(20_000, 1), pull, seen, y, noise=Fresh(2), end=end)
    check_paths(paths, law, *law.given(law.seen((6, H)), y[0], seen.std), (kind, what))
    if what in ("coordinate", "both"):
        assert torch.equal(seen.forward(paths.end), y.expand(20_000, -1))
    assert paths.missed.max() < 1e-12 or seen.std
    consistent(paths, steps)


def test_diagonal_noise_and_dense_noise_say_the_same():
    """Two ways to one law: the numbers of single coordinates, and matrices."""
    g = torch.tensor([0.5, 1.2, 0.8], dtype=F64)
    drift = lambda x, t: torch.sin(x).roll(1, 1) - x  # noqa: E731
    pair = [SDE.of(drift, G) for G in (Diagonal(g), Dense(g.diag()))]
    x, y = torch.randn(40, 3, dtype=F64, generator=generator(3)), torch.randn(40, 2).double()
    for seen, value in (
        (Coordinates([2, 0]), y), (Coordinates([2, 0], std=0.3), y),
        (Terminal(), torch.cat([y, y[:, :1]], 1)),
        (Measured(torch.eye(3, dtype=F64)[[2, 0]], std=0.3), y),
    ):  # fmt: skip
        for end in (Pinned(), ModifiedBridge()):
            a, b = (
                conditioned(EulerSteps(sde, grids.uniform(0, 1, 5)), x, toward_sum(sde), seen,
                            value, noise=Fresh(4), end=end)
                for sde in pair
            )  # fmt: skip
            assert torch.allclose(a.x, b.x, atol=1e-10) and torch.allclose(a.dw, b.dw, atol=1e-10)
            assert torch.allclose(a.log_weights, b.log_weights, atol=1e-9), seen


def test_what_is_seen_is_narrowed_and_nothing_else():
    """Brownian motion in space: with the exact pull and narrowed noise all weights are p(y)."""
    brownian, x = Brownian(sigma=0.7, span=(0.0, 2.0)), many([0.0, 0.3, 0.0], 200)
    steps = EulerSteps(brownian, grids.quadratic(0.0, 2.0, 9))
    H = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=F64)
    for seen, rows in (
        (Coordinates([2, 0]), torch.eye(3, dtype=F64)[[2, 0]]),
        (Coordinates([2, 0], std=0.2), torch.eye(3, dtype=F64)[[2, 0]]),
        (Measured(H), H), (Measured(H, std=0.2), H), (Measured(H[:1], std=0.2), H[:1]),
    ):  # fmt: skip
        y, exact = torch.full((1, len(rows)), 0.8, dtype=F64), LinearTilt.exact(brownian, seen)
        S = 0.98 * rows @ rows.mT + seen.std**2 * torch.eye(len(rows), dtype=F64)
        truth = MultivariateNormal(rows @ x[0], S).log_prob(y)
        paths = conditioned(steps, x, exact, seen, y, noise=Fresh(0), end=ModifiedBridge())
        assert (paths.log_weights - truth).abs().max() < 1e-9, seen
        # what is not seen keeps its noise
        blind = torch.linalg.svd(rows)[2][len(rows) :]
        plain = conditioned(steps, x, exact, seen, y, noise=Fresh(0))
        assert torch.allclose(paths.dw @ blind.mT, plain.dw @ blind.mT, atol=1e-9)


@pytest.mark.parametrize("how", [LinearTilt.exact, Linearised], ids=["linear", "linearised"])
def test_a_kicked_position_is_narrowed_by_way_of_its_momentum(how):
    sde = CriticallyDamped(beta=1.0, dim=1)
    steps, x0 = EulerSteps(sde, grids.uniform(0.0, 1.0, 40)), row(1.0, 0.3)
    seen, H, y = Coordinates([0]), row(1.0, 0.0), row(0.6)
    law, x = Law(steps, x0), x0.repeat(20_000, 1)
    paths, wide = (
        conditioned(steps, x, how(sde, seen), seen, y, noise=Fresh(0), end=end)
        for end in (ModifiedBridge(), Pinned())
    )
    check_paths(paths, law, *law.given(law.seen((40, H)), y[0]), how)
    assert 0.3 * len(x) > wide.ess


@pytest.mark.parametrize("how", [LinearTilt.exact, Linearised], ids=["linear", "linearised"])
@pytest.mark.parametrize("arrow", [1, -1])
def test_steps_of_a_linear_process_leave_nothing_to_the_weights(how, arrow):
    """Each path weighs p(y | x) of Euler's chain, which at 20 steps is far from the process."""
    forward = CriticallyDamped(beta=2.0, dim=1)
    x0, grid = row(1.0, 0.3), grids.uniform(0.0, 1.0, 20)
    back = SDE.of(lambda x, t: -forward.drift(x, t), forward.diffusion(x0, grid[0]), span=(1, 0))
    sde = forward if arrow == 1 else back
    steps, x = EulerSteps(sde, grid if arrow == 1 else grid.flip(0)), x0.repeat(50, 1)
    if sde is back and how is not Linearised:
        how = functools.partial(LinearTilt.around, x=x0[0])
    eye, law = torch.eye(2, dtype=F64), Law(EulerSteps(forward, grid), x0)
    for seen, H, y in (
        (Terminal(), eye, row(0.6, -0.2)),
        (Coordinates([0]), eye[:1], row(0.6)),
        (Coordinates([0], std=0.1), eye[:1], row(0.6)),
    ):
        tilt = how(sde, seen)
        paths = conditioned(steps, x, tilt, seen, y, noise=Fresh(0), end=ModifiedBridge())
        log_p = law.given(law.seen((20, H)), y[0], seen.std)[0]
        assert (paths.log_weights - log_p).abs().max() < 1e-9, (seen, arrow)
        one = tilt.along(steps)
        assert one.along(steps) is one
        # the last step's noise does not reach the position, and that is no reason to refuse
        free, plain = (
            conditioned(steps, x, one, seen, y, noise=Fresh(0), end=Free()).missed.mean()
            for one in (tilt, Untilted(sde))
        )
        assert free < 0.7 * plain, (free, plain)


@pytest.mark.parametrize("how", [LinearTilt.exact, Linearised], ids=["linear", "linearised"])
def test_nor_where_noise_is_direct(how):
    sde = OrnsteinUhlenbeck(rate=torch.tensor([[1.0, 0.5], [-0.8, 1.5]]), sigma=[0.6, 0.9])
    steps, x0 = EulerSteps(sde, grids.uniform(0.0, 1.0, 10)), row(1.0, -0.5)
    law, x, sum_ = Law(steps, x0), x0.repeat(50, 1), row(1.0, 1.0)
    for seen, H, y in (
        (Terminal(), torch.eye(2, dtype=F64), row(0.6, -0.2)),
        (Measured(sum_), sum_, row(0.4)),
        (Measured(sum_, std=0.2), sum_, row(0.4)),
    ):
        paths = conditioned(
            steps, x, how(sde, seen), seen, y, noise=Fresh(0), end=ModifiedBridge()
        )
        log_p = law.given(law.seen((10, H)), y[0], seen.std)[0]
        assert (paths.log_weights - log_p).abs().max() < 1e-9, seen


def test_the_root_of_what_is_left_of_the_noise():
    """√(I - share Jᵀ S⁻¹ J) squared, and its determinant, for all kinds of reach."""
    A = torch.randn(6, 2, 3, dtype=F64, generator=generator(0))
    A[5] = 0  # reaches nothing: its noise stays as it is
    for R, share in ((0.3, 0.7), (torch.tensor([[0.5, 0.1], [0.1, 0.2]], dtype=F64), 1.0),
                     (0.0, torch.linspace(0.0, 0.9, 6, dtype=F64)[:, None])):  # fmt: skip
        reach = Rows(A, R)
        eye = torch.eye(3, dtype=F64)
        root = torch.stack([reach.narrowed(e.expand(6, 3), share)[0] for e in eye], 2)
        S = A @ A.mT + torch.as_tensor(R) * (1 if isinstance(R, torch.Tensor) else torch.eye(2))
        K = torch.as_tensor(share).reshape(-1, 1, 1) * (A.mT @ torch.linalg.pinv(S) @ A)
        assert torch.allclose(root @ root.mT, eye - K, atol=1e-12)
        log_det = torch.linalg.slogdet(eye - K).logabsdet / 2
        assert torch.allclose(reach.narrowed(eye[:1].expand(6, 3), share)[1], log_det, atol=1e-12)


def toward_sum(sde):
    return Slope(sde, lambda x, t, y: y.sum(1, keepdim=True) - x)


def test_pictures_and_single_precision():
    """Known pixels of Brownian pictures: the density factorises over them."""
    brownian, mask = Brownian(), torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[:, 0] = True
    steps, seen = EulerSteps(brownian, grids.uniform(0.0, 1.0, 5)), Coordinates(mask)
    x, y = torch.zeros(4000, 2, 3, 3), torch.linspace(-0.5, 0.5, 6).reshape(1, -1)
    pull = Slope(brownian, lambda x, t, y: seen.transpose(y - seen.forward(x), x) / (1 - t))
    paths = conditioned(steps, x, pull, seen, y, noise=Fresh(0))
    assert paths.x.shape == (6, 4000, 2, 3, 3) and paths.x.dtype == torch.float32
    assert torch.equal(paths.end[:, mask], y.expand(4000, -1))
    assert paths.log_weights.dtype == F64
    truth = Normal(0.0, 1.0).log_prob(y).sum().item()
    check_mean((paths.log_weights - truth).exp(), 1.0, "pixels")


def test_each_row_has_a_start_and_a_value_of_its_own():
    steps = EulerSteps(OU, grids.uniform(0.0, 1.0, 5))
    x, y = row(-1.0, 0.0, 1.0).mT.contiguous(), row(0.5, 0.3, -0.2).mT.contiguous()
    both = conditioned(steps, x.repeat(7000, 1), toward(OU), Terminal(), y.repeat(7000, 1),
                       noise=Fresh(5))  # fmt: skip
    w = both.log_weights.exp().reshape(7000, 3)
    for i in range(3):
        law = Law(steps, x[i])
        truth = law.given(law.seen((5, torch.eye(1, dtype=F64))), y[i])[0]
        check_mean(w[:, i], truth.exp().item(), i)
    with pytest.raises(KakusanError, match="all paths share one start and one value"):
        both.log_density  # noqa: B018


# --- the arrow of time, and noise that depends on the state


def test_the_tilt_is_that_of_the_tilted_process():
    """Free paths are Euler-Maruyama's of `tilt(sde, u)`, forwards and backwards in time."""
    y, G = row(0.7), lambda x, t: Diagonal(0.6 + 0.2 * x.sin())
    forward = SDE.of(lambda x, t: -x * (1 + t), G)
    back = reverse(SDE.of(lambda x, t: -x, Scale(1.1)), lambda x, t: -x + 0.2, noise=0.8)
    for sde in (forward, back, reverse(back, lambda x, t: -x)):
        a, b = sde.span
        grid, x = grids.uniform(a, b, 7), torch.randn(30, 1, dtype=F64, generator=generator(0))
        pull = toward(sde, 0.9)
        tilted = tilt(sde, pull.given(y))
        path = solve(tilted, x, grid, noise=Fresh(3), keep=True)
        free = conditioned(EulerSteps(sde, grid), x, pull, Terminal(), y, noise=Fresh(3),
                           end=Free())  # fmt: skip
        assert torch.allclose(free.x, path.x, atol=1e-12), sde
        truth = path_log_weights(path, tilted, sde)
        assert truth.std() > 0.1 and torch.allclose(free.log_weights, truth, atol=1e-10), sde
        assert path_log_weights(free.path, sde, sde).abs().max() == 0  # dw is the chain's own
        assert torch.allclose(free.missed, (path.end - y).abs()[:, 0])
        with pytest.raises(KakusanError, match="meet it"):
            free.log_density  # noqa: B018


@pytest.mark.parametrize("end", [Pinned(), ModifiedBridge()], ids=["pinned", "modified"])
def test_a_reversed_process_given_its_end(end):
    """Reversed Ornstein-Uhlenbeck from N(0.5, 0.3) data: linear, and time runs down."""
    m = lambda t: 0.5 * torch.exp(-t)  # noqa: E731
    v = lambda t: 0.5 - 0.2 * torch.exp(-2 * t)  # noqa: E731
    back = reverse(OrnsteinUhlenbeck(rate=1.0, sigma=1.0), lambda x, t: (m(t) - x) / v(t))
    steps, y = EulerSteps(back, grids.uniform(1.0, 0.0, 8)), row(1.4)
    law = Law(steps, row(-0.6))
    M = law.seen((8, torch.eye(1, dtype=F64)))
    pull = Slope(back, lambda x, t, y: 0.8 * (y - x) / t)
    x = many([-0.6], 20_000)
    paths = conditioned(steps, x, pull, Terminal(), y, noise=Fresh(0), end=end)
    check_paths(paths, law, *law.given(M, y[0]), end)
    consistent(paths, steps)


def test_geometric_brownian_motion_given_its_end():
    """The density of the chain by quadrature, a step at a time."""
    sde, n, y, x0 = Geometric(0.4, 0.6), 5, row(1.9), 1.0
    steps, h = EulerSteps(sde, grids.uniform(0.0, 1.0, n)), 1 / n
    grid = torch.linspace(-1, 6, 1400, dtype=F64)
    p = Normal(x0 * (1 + 0.4 * h), 0.6 * x0 * h**0.5).log_prob(grid).exp()
    for k in range(1, n):
        to = y[0] if k == n - 1 else grid
        kernel = Normal(grid * (1 + 0.4 * h), 0.6 * grid.abs() * h**0.5)
        p = (p * kernel.log_prob(to[:, None]).exp()).sum(1) * (grid[1] - grid[0])
    pull = Slope(sde, lambda x, t, y: (y - x) / (0.36 * x.abs().clamp(min=0.3) ** 2 * (1 - t)))
    dense = SDE.of(sde.drift, lambda x, t: Dense(0.6 * x[:, :, None]))
    for chain in (steps, EulerSteps(dense, steps.grid)):
        for end in (Pinned(), ModifiedBridge()):
            paths = conditioned(chain, many([x0], 20_000), pull, Terminal(), y, noise=Fresh(0),
                                end=end)  # fmt: skip
            check_mean((paths.log_weights - p.log().item()).exp(), 1.0, end)
            consistent(paths, steps)


# --- noise that takes several steps to arrive


@pytest.mark.parametrize("what", ["position", "both", "sum"])
def test_linear_kinetic_motion(what):
    """Two steps together are affine in their noise: exact weights."""
    sde = CriticallyDamped(beta=1.0, dim=1)
    steps, x0 = EulerSteps(sde, grids.uniform(0.0, 1.0, 10)), row(1.0, 0.3)
    seen, H, y = {
        "position": (Coordinates([0]), row(1.0, 0.0), row(0.6)),
        "both": (Terminal(), torch.eye(2, dtype=F64), row(0.6, -0.2)),
        "sum": (Measured(row(1.0, 0.5)), row(1.0, 0.5), row(0.5)),
    }[what]
    law = Law(steps, x0)
    pull = law.tilt(sde, H, wrong=0.9)
    paths = conditioned(steps, x0.repeat(20_000, 1), pull, seen, y, noise=Fresh(0))
    check_paths(paths, law, *law.given(law.seen((10, H)), y[0]), what)
    made = steps.after(paths.x[-2], 9, paths.dw[-1])
    assert (seen.forward(made) - y).abs().max() < 1e-12 and not paths.missed.max() > 1e-12
    if what == "both":
        modified = conditioned(steps, x0.repeat(20_000, 1), law.tilt(sde, H), seen, y,
                               noise=Fresh(0), end=ModifiedBridge())  # fmt: skip
        check_paths(modified, law, *law.given(law.seen((10, H)), y[0]), "modified")
    consistent(paths, steps)


def test_an_integral_of_an_integral_takes_three_steps():
    A = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=F64)
    sde = SDE.of(lambda x, t: x @ A - 0.1 * x, Dense(row(0.0, 0.0, 1.0).mT))
    eye = torch.eye(3, dtype=F64)
    for n, seen, H, y in (
        (3, Terminal(), eye, row(0.1, 0.2, -0.1)),
        (4, Terminal(), eye, row(0.1, 0.2, -0.1)),
        (7, Coordinates([0]), eye[:1], row(0.1)),
    ):
        steps = EulerSteps(sde, grids.uniform(0.0, 1.0, n))
        law, x = Law(steps, row(0.0, 0.0, 0.0)), torch.zeros(20_000, 3, dtype=F64)
        paths = conditioned(steps, x, law.tilt(sde, H), seen, y, noise=Fresh(0))
        check_paths(paths, law, *law.given(law.seen((n, H)), y[0]), (n, seen))
        consistent(paths, steps)


def test_a_nerve_seen_in_its_voltage():
    """Given the state two steps before the end the voltage is normal: by hand, on free paths."""
    sde = Nerve(sigma=0.8)
    steps, n, y = EulerSteps(sde, grids.uniform(0.0, 0.6, 12)), 40_000, row(-0.9)
    x, h = sde.start.repeat(n, 1), 0.05
    noise, seen = Fresh(7), Coordinates([0])
    paths = conditioned(steps, x, Untilted(sde), seen, y, noise=Fresh(0))
    made = steps.after(paths.x[-2], 11, paths.dw[-1])
    assert (made[:, :1] - y).abs().max() < 1e-12 and (paths.end[:, 0] == -0.9).all()
    consistent(paths, steps)
    free = solve(sde, x, steps.grid, noise=noise, keep=True)
    inside = free.x[-3]
    v, w = (inside + h * sde.drift(inside, time(0.0))).unbind(1)
    p = Normal(v + h / 0.1 * (v - v**3 - w), 10 * h * 0.8 * h**0.5).log_prob(y[0]).exp()
    difference = paths.log_weights.exp().mean() - p.mean()
    se = math.hypot(paths.log_weights.exp().std().item(), p.std().item()) / n**0.5
    assert abs(difference) < 4.5 * se and se < 0.05 * p.mean()
    # a window around y, with no formula at all, and a tilt that helps
    near = (free.end[:, 0] - y[0, 0]).abs() < 0.02
    se = (near.double().mean() / n).sqrt() / 0.04
    assert abs(near.double().mean() / 0.04 - p.mean()) < 4.5 * se + 0.01 * p.mean()
    u = lambda x, t, y: torch.cat([0 * y, 0.4 + 0 * y], 1).expand_as(x)  # noqa: E731
    tilted = conditioned(steps, x, Slope(sde, u), seen, y, noise=Fresh(1))
    check_mean(tilted.log_weights.exp() / p.mean(), 1.0, "tilted", z=6.5)  # p has an error too
    a, b = (q.expectation(lambda x: x[6, :, 1]) for q in (paths, tilted))
    assert abs(a.value - b.value) < 4.5 * math.hypot(a.std_error, b.std_error)


def test_motion_in_a_double_well_pinned_in_both():
    """Underdamped, in any energy: the density of two steps by hand, the weights on free paths."""
    sde = Underdamped(lambda q: ((q**2 - 1) ** 2).sum(1), friction=0.7)
    steps, x0, y = EulerSteps(sde, grids.uniform(0.0, 0.4, 4)), row(-0.5, 0.4), row(-0.35, 0.5)
    x, h, g = x0.repeat(40_000, 1), 0.1, math.sqrt(1.4)
    paths = conditioned(steps, x, Untilted(sde), Terminal(), y, noise=Fresh(0))
    made = steps.after(paths.x[-2], 3, paths.dw[-1])
    assert (made - y).abs().max() < 1e-9 and torch.equal(paths.end, y.expand_as(x))
    consistent(paths, steps)
    force = lambda q, p: -4 * q * (q**2 - 1) - 0.7 * p  # noqa: E731
    # by quadrature over the momenta after one step and two: what comes after is decided
    grid = torch.linspace(-4, 4, 801, dtype=F64)
    q0, p0 = x0[0]
    p1, p2 = torch.meshgrid(grid, grid, indexing="ij")
    q1 = q0 + h * p0
    q2, q3 = q1 + h * p1, q1 + h * p1 + h * p2
    p3 = (y[0, 0] - q3) / h
    density = sum(
        Normal(p + h * force(q, p), g * h**0.5).log_prob(after)
        for q, p, after in ((q0, p0, p1), (q1, p1, p2), (q2, p2, p3), (q3, p3, y[0, 1]))
    )
    truth = density.exp().sum().item() * 0.01**2 / h
    check_mean(paths.log_weights.exp() / truth, 1.0, "underdamped")


def test_corrections_of_a_map_that_bends():
    """q' = tanh p: Newton finds the noise, and the density is that of a function of it."""
    sde = SDE.of(lambda x, t: torch.cat([x[:, 1:].tanh(), 0 * x[:, :1]], 1),
                 Diagonal(torch.tensor([0.0, 1.0], dtype=F64)))  # fmt: skip
    steps, x, y = EulerSteps(sde, grids.uniform(0.0, 1.0, 2)), many([0.0, 0.2], 100), row(0.37)
    paths = conditioned(steps, x, Untilted(sde), Coordinates([0]), y, noise=Fresh(0))
    made = steps.after(paths.x[1], 1, paths.dw[1])
    assert (made[:, :1] - y).abs().max() < 1e-12
    slope = (0.37 - 0.5 * math.tanh(0.2)) / 0.5  # tanh of the momentum after one step
    z = math.atanh(slope) - 0.2
    truth = Normal(time(0.0), math.sqrt(0.5)).log_prob(time(z)) - math.log(0.5 * (1 - slope**2))
    assert (paths.log_weights - truth).abs().max() < 1e-9
    assert (paths.dw[0] - row(0.0, z))[:, 1].abs().max() < 1e-9
    with pytest.raises(KakusanError, match="still miss it by up to|does not reach"):
        conditioned(steps, x, Untilted(sde), Coordinates([0]), row(3.0), noise=Fresh(0))


# --- several times, events, labels


def test_a_path_seen_at_two_times():
    steps, x0 = EulerSteps(TURNING, grids.uniform(0.0, 1.0, 8)), row(0.2, -0.3)
    law, eye = Law(steps, x0), torch.eye(2, dtype=F64)
    y = row(0.5, -0.1, 0.4)
    for seen, M in (
        (Series({0.5: Coordinates([1]), 1.0: Terminal()}), ((4, eye[1:]), (8, eye))),
        (Series({1.0: Terminal(), 0.25: Coordinates([0])}), ((8, eye), (2, eye[:1]))),
    ):
        pull = law.tilt(TURNING, eye)
        at_end = y[:, 1:] if M[0][0] == 4 else y[:, :2]
        aimed = Slope(TURNING, lambda x, t, y, p=pull, e=at_end: p.score(x, t, e.expand_as(x)))
        paths = conditioned(steps, x0.repeat(20_000, 1), aimed, seen, y, noise=Fresh(0))
        check_paths(paths, law, *law.given(law.seen(*M), y[0]), seen)
        assert not paths.missed.any()
        consistent(paths, steps)


def test_positions_of_kinetic_motion_at_two_times():
    """Each takes two steps, which must not be those of the other."""
    sde = CriticallyDamped(beta=1.0, dim=1)
    steps, x0 = EulerSteps(sde, grids.uniform(0.0, 1.0, 6)), row(1.0, 0.3)
    law, x, at = Law(steps, x0), x0.repeat(20_000, 1), row(1.0, 0.0)
    seen, y = Series({1.0: Coordinates([0]), 2 / 3: Coordinates([0])}), row(0.75, 0.7)
    pull = Slope(sde, lambda x, t, y: 0.6 * (y[:, 1:] - x - 0.3).roll(1, 1))
    paths = conditioned(steps, x, pull, seen, y, noise=Fresh(0))
    check_paths(paths, law, *law.given(law.seen((6, at), (4, at)), y[0]), "two positions")
    close = Series({5 / 6: Coordinates([0]), 1.0: Coordinates([0])})
    with pytest.raises(NotElliptic, match="noise of 1 step does not reach"):
        conditioned(steps, x, pull, close, y)


def test_a_noisy_series_and_one_that_ends_early():
    steps, law = EulerSteps(OU, grids.uniform(0.0, 1.0, 6)), None
    law = Law(steps, row(-0.4))
    one = torch.ones(1, 1, dtype=F64)
    seen = Series({1 / 3: Measured(one, std=0.4), 2 / 3: Measured(one, std=0.4)})
    y, M = row(0.3, -0.2), law.seen((2, one), (4, one))
    truth = law.given(M, y[0], 0.4)
    for end in (Pinned(), Free()):
        paths = conditioned(steps, many([-0.4], 20_000), Untilted(OU), seen, y, noise=Fresh(0),
                            end=end)  # fmt: skip
        check_paths(paths, law, *truth, end)
        assert 0.2 < paths.missed.mean() < 1.5


def test_an_event_and_a_label():
    steps, x = EulerSteps(OU, grids.uniform(0.0, 1.0, 6)), many([-0.4], 20_000)
    law = Law(steps, row(-0.4))
    m, s = law.mean[-1], law.cov[-1, -1].sqrt()
    pull = Slope(OU, lambda x, t, y: torch.full_like(x, 1.5))
    above = Event(lambda x: x[:, 0] > 0.8)
    paths = conditioned(steps, x, pull, above, row(1.0), noise=Fresh(0))
    truth = 1 - Normal(m, s).cdf(time(0.8))
    check_mean(paths.log_weights.exp(), truth.item(), "event")
    hit = paths.end[:, 0] > 0.8
    assert torch.equal(paths.missed == 1, ~hit) and torch.equal(
        paths.log_weights == -math.inf, ~hit
    )
    below = conditioned(steps, x, Untilted(OU), above, row(0.0), noise=Fresh(0))
    check_mean(below.log_weights.exp(), 1 - truth.item(), "no event")
    logits = Label(lambda x: torch.cat([0 * x, 2 * x - 1], 1), 2)
    labelled = conditioned(steps, x, pull, logits, row(1.0), noise=Fresh(0))
    z = torch.linspace(-8, 8, 4001, dtype=F64)
    truth = (Normal(0.0, 1.0).log_prob(z).exp() * (2 * (m + s * z) - 1).sigmoid()).sum() * 0.004
    check_mean(labelled.log_weights.exp(), truth.item(), "label")
    # an event on the way, and the end
    half = Series({0.5: Event(lambda x: x[:, 0] > 0.0), 1.0: Terminal()})
    pull = Slope(OU, lambda x, t, y: (y[:, 1:] - x) / (1 - t))
    both = conditioned(steps, x, pull, half, row(1.0, 0.5), noise=Fresh(0))
    one = torch.ones(1, 1, dtype=F64)
    log_p, mean, cov = law.given(law.seen((6, one)), row(0.5)[0])
    there = 1 - Normal(mean[3], cov[3, 3].sqrt()).cdf(time(0.0))
    check_mean(both.log_weights.exp(), (log_p.exp() * there).item(), "on the way")


# --- resampling, and moving


def test_resampled_paths_keep_the_density_and_vary_less():
    """A twisted particle filter, over many repetitions: unbiased, less variance."""
    sde = OrnsteinUhlenbeck(rate=4.0, sigma=1.0, span=(0.0, 2.0))
    steps, y = EulerSteps(sde, grids.uniform(0.0, 2.0, 32)), row(0.8)
    law, one = Law(steps, row(0.8)), torch.ones(1, 1, dtype=F64)
    log_p, mean, cov = law.given(law.seen((32, one)), y[0])
    good = law.tilt(sde, one)
    # pushed the wrong way, with weights that know better
    bad = Slope(sde, lambda x, t, y: 2.5 + 0 * x, good.log_h)
    x, found = many([0.8], 200), {0.0: [], 0.5: []}
    for share, values in found.items():
        for seed in range(40):
            paths = conditioned(steps, x, bad, Terminal(), y, noise=Fresh(seed), resample=share)
            values.append(paths.log_density.value - log_p.item())
    w = {share: torch.tensor(values).exp() for share, values in found.items()}
    check_mean(w[0.5], 1.0, "resampled")
    assert w[0.5].std() < 0.6 * w[0.0].std(), (w[0.5].std(), w[0.0].std())
    paths = conditioned(
        steps, many([0.8], 20_000), bad, Terminal(), y, noise=Fresh(0), resample=0.9
    )
    consistent(paths, steps)
    assert len(paths.x[1].unique()) < 15_000 and (paths.x[0] == 0.8).all()
    for k in (8, 16, 24):
        middle = paths.expectation(lambda x, k=k: x[k, :, 0])
        # common ancestors make this larger than its standard error
        assert abs(middle.value - mean[k]) < 12 * middle.std_error, k
        spread = paths.expectation(lambda x, k=k: (x[k, :, 0] - mean[k]) ** 2)
        assert abs(spread.value - cov[k, k]) < 12 * spread.std_error, k


def test_metropolis_finds_the_law_whatever_the_tilt():
    steps, y = EulerSteps(OU, grids.uniform(0.0, 1.0, 8)), row(0.9)
    law, one = Law(steps, row(-0.4)), torch.ones(1, 1, dtype=F64)
    mean, cov = law.given(law.seen((8, one)), y[0])[1:]
    bad = Slope(OU, lambda x, t, y: -1.0 + 0.3 * x)
    for beta, sweeps, pull in ((0.6, 60, bad), (1.0, 60, toward(OU, 0.3))):
        paths = metropolis(steps, row(-0.4), pull, Terminal(), y, n=4000, sweeps=sweeps, beta=beta)
        assert 0.1 < paths.acceptance.mean() < 0.9 and paths.ess == pytest.approx(4000)
        assert not paths.log_weights.any() and torch.equal(paths.end, y.expand(4000, 1))
        inner = paths.x[1:-1, :, 0]
        se = (cov.diagonal()[1:-1] / 4000).sqrt()
        assert ((inner.mean(1) - mean[1:-1]).abs() < 4.5 * se).all(), beta
        ratio = inner.var(1) / cov.diagonal()[1:-1]
        assert ((ratio - 1).abs() < 4.5 * math.sqrt(2 / 4000)).all(), (beta, ratio)
        consistent(paths, steps)
    start = conditioned(steps, many([-0.4], 4000), bad, Terminal(), y, noise=Fresh(0)).x[4].mean()
    assert abs(start - mean[4]) > 20 * se[3]  # where the chains began


def test_metropolis_of_noisy_and_of_rare_things():
    """The noise of what is seen is moved as well; paths that weigh nothing find their way."""
    steps, x0 = EulerSteps(OU, grids.uniform(0.0, 1.0, 6)), row(-0.4)
    law, one = Law(steps, x0), torch.ones(1, 1, dtype=F64)
    seen, y = Measured(one, std=0.5), row(1.0)
    _, mean, cov = law.given(law.seen((6, one)), y[0], 0.5)
    paths = metropolis(steps, x0, Untilted(OU), seen, y, n=4000, sweeps=30, beta=0.7)
    end = paths.end[:, 0]
    assert abs(end.mean() - mean[-1]) < 4.5 * (cov[-1, -1] / 4000).sqrt()
    assert abs(end.var() / cov[-1, -1] - 1) < 4.5 * math.sqrt(2 / 4000)
    above = Event(lambda x: x[:, 0] > 0.4)
    paths = metropolis(steps, x0, Untilted(OU), above, row(1.0), n=200, sweeps=150, beta=0.7)
    assert (paths.end > 0.4).all() and not paths.missed.any()
    with pytest.raises(KakusanError, match=r"of 50 paths have not met Event"):
        metropolis(
            steps, x0, Untilted(OU), Event(lambda x: x[:, 0] > 40), row(1.0), n=50, sweeps=2
        )


def test_systematic_resampling():
    log_w = torch.randn(500, dtype=F64, generator=generator(1)) * 2
    share = 500 * log_w.softmax(0)
    counts = torch.zeros(500, dtype=F64)
    for seed in range(300):
        n = systematic(log_w, generator(seed)).bincount(minlength=500)
        assert ((n >= share.floor()) & (n <= share.ceil())).all()
        counts += n / 300
    se = (share.frac() * (1 - share.frac()) / 300).sqrt()
    assert ((counts - share).abs() < 5 * se + 1e-9).all()


def test_equal_weights_by_resampling():
    steps, y = EulerSteps(OU, grids.uniform(0.0, 1.0, 5)), row(0.9)
    paths = conditioned(steps, many([-0.4], 3000), toward(OU, 0.3), Terminal(), y, noise=Fresh(0))
    even = paths.resampled(3)
    a, b = paths.expectation(lambda x: x[2, :, 0]), even.expectation(lambda x: x[2, :, 0])
    assert abs(a.value - b.value) < 4.5 * b.std_error and not even.log_weights.any()
    consistent(even, steps)
    with pytest.raises(KakusanError, match="have not been resampled"):
        even.log_density  # noqa: B018


def test_the_error_of_a_weighted_mean():
    """The standard error is the spread between repetitions."""
    steps, y = EulerSteps(OU, grids.uniform(0.0, 1.0, 4)), row(0.9)
    found = [
        conditioned(steps, many([-0.4], 400), toward(OU, 0.3), Terminal(), y, noise=Fresh(seed))
        .expectation(lambda x: x[2, :, 0])
        for seed in range(200)
    ]  # fmt: skip
    values = torch.stack([e.value for e in found])
    errors = torch.stack([e.std_error for e in found])
    assert abs(errors.mean() / values.std() - 1) < 5 / math.sqrt(400)


# --- a barrier


def test_the_density_across_a_barrier():
    """Double well, v = 1, from 1 to -1 in unit time: 6.7044e-2 of the continuous process."""
    sde = SDE.of(lambda x, t: -4 * x * (x * x - 1), Scale(1.0))
    steps, x = EulerSteps(sde, grids.uniform(0.0, 1.0, 400)), many([1.0], 8000)
    paths = conditioned(steps, x, toward(sde), Terminal(), row(-1.0), noise=Fresh(0), keep=False)
    value, error = paths.log_density
    assert error < 0.02 and abs(value - math.log(6.7044e-2)) < 4.5 * error + 0.02


def test_samples_do_not_know_their_batch():
    """Keyed numbers, of a noisy observation too."""
    steps, seen, y = (
        EulerSteps(OU, grids.uniform(0.0, 1.0, 4)),
        Coordinates([0], std=0.2),
        row(0.5),
    )
    whole = conditioned(steps, many([0.1], 100), toward(OU), seen, y, noise=Keyed(3))
    part = conditioned(steps, many([0.1], 30), toward(OU), seen, y, noise=Keyed(3, first=70))
    assert torch.equal(whole.x[:, 70:], part.x)
    again = conditioned(steps, many([0.1], 30), Untilted(OU), Terminal(), y,
                        noise=Recorded(part.dw))  # fmt: skip
    assert torch.equal(again.dw[:-1], part.dw[:-1])
    steps_seen = []
    conditioned(
        steps, many([0.1], 3), toward(OU), seen, y, on_step=lambda *s: steps_seen.append(s)
    )
    assert [k for k, _, _ in steps_seen] == [0, 1, 2, 3] and steps_seen[-1][1] == 1.0


def test_gradients_reach_the_parameters():
    """d/dθ of log p(y | x0) of one step, whose noise is used up."""
    theta = torch.tensor(0.7, dtype=F64, requires_grad=True)
    sde = SDE.of(lambda x, t: -theta * x, Scale(1.0))
    steps = EulerSteps(sde, grids.uniform(0.0, 0.5, 1))
    paths = conditioned(steps, row(1.2), Untilted(sde), Terminal(), row(0.4), noise=Fresh(0))
    (slope,) = torch.autograd.grad(paths.log_weights.sum(), theta)
    assert torch.allclose(slope, (0.4 - 1.2 * (1 - 0.5 * theta)) * -1.2)


# --- refusals


def test_what_cannot_be_conditioned_is_refused():
    steps, x, y = EulerSteps(OU, grids.uniform(0.0, 1.0, 4)), many([0.1], 5), row(0.5)
    go = lambda steps=steps, x=x, pull=None, seen=None, y=y, **kw: conditioned(  # noqa: E731
        steps, x, pull or Untilted(steps.sde), seen or Terminal(), y, noise=Fresh(0), **kw
    )
    ode = EulerSteps(SDE.of(lambda x, t: -x, Zero()), steps.grid)
    still = EulerSteps(SDE.of(lambda x, t: -x, Dense(row(1.0, 0.0).mT)), steps.grid)
    positive = Geometric()
    positive.inside, positive.domain = lambda x: (x > 0).all(1), "x > 0"
    wild = SDE.of(lambda x, t: 1e200 * x**3, Scale(1.0))
    late = EulerSteps(wild, steps.grid)
    for words, error, call in (
        ("a tilt moves an SDE by its noise", KakusanError, lambda: go(ode)),
        (r"or \(5, 1\) for 5 states; got shape \(3, 1\)", KakusanError,
         lambda: go(y=y.expand(3, 1))),
        (r"shape \(n, \*shape\), got torch.int64", KakusanError, lambda: go(x=x.long())),
        (r"t=0.3, which is not a time of the grid after its start; the nearest is t=0.25",
         KakusanError, lambda: go(seen=Series({0.3: Terminal()}))),
        (r"t=0, which is not .* the nearest is t=0.25", KakusanError,
         lambda: go(seen=Series({0.0: Terminal()}))),
        (r"noise of 4 steps does not reach what Coordinates\(\[1\]\) sees .* for 5 of 5",
         NotElliptic, lambda: go(still, many([0.1, 0.2], 5), seen=Coordinates([1]))),
        ("noise of 1 step does not reach", NotElliptic,
         lambda: go(EulerSteps(Underdamped(lambda q: q[:, 0] ** 2), grids.uniform(0, 1, 1)),
                    many([0.1, 0.2], 5), seen=Terminal(), y=row(0.0, 0.0))),
        (r"y = \[-1.0\], .* outside the domain of the process, x > 0", KakusanError,
         lambda: go(EulerSteps(positive, steps.grid), y=row(-1.0))),
        (r"left the domain of the process, x > 0: it is at", KakusanError,
         lambda: go(EulerSteps(positive, steps.grid), pull=Slope(OU, lambda x, t, y: -90 / x),
                    y=row(1.0))),
        (r"path 0 of 5 is no longer finite after step [23] of 4", KakusanError, lambda: go(late)),
        (r"paths are resampled among one start", KakusanError,
         lambda: go(x=torch.arange(5.0)[:, None].double(), resample=0.5)),
        (r"a share in \[0, 1\), got 1.5", KakusanError, lambda: go(resample=1.5)),
        ("knows the slope of log h, not its value", KakusanError,
         lambda: go(pull=NoValue(OU), resample=0.5)),
        (r"control of Slope is \(5, 2\), and the noise of the chain \(5, 1\)", KakusanError,
         lambda: go(pull=Slope(OU, lambda x, t, y: torch.cat([x, x], 1)))),
        (r"f gives one value a path, \(5, ...\)", KakusanError,
         lambda: go().expectation(lambda x: x.sum())),
        ("beta in", KakusanError,
         lambda: metropolis(steps, x, Untilted(OU), Terminal(), y, n=5, sweeps=1, beta=0.0)),
        (r"5 paths start at one state, .* got shape \(3, 1\)", KakusanError,
         lambda: metropolis(steps, x[:3], Untilted(OU), Terminal(), y, n=5, sweeps=1)),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


class NoValue(Tilt):
    def __init__(self, sde):
        self.sde = sde

    def score(self, x, t, y):
        return 0 * x
