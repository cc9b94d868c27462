"""Weights by Malliavin's matrix: their mean, given X_s and Y, is the score of p(Y | X_s).

The strongest tests need no density. One is brute force, the divergence of U by autograd; the other
is E[psi(X_N) S_s | X_s = x] = ∂/∂x E[psi(X_N) | X_s = x] for smooth bounded psi, whose right side
is the mean of a pathwise derivative on the same paths.
"""

import pytest
import torch

from kakusan import SDE, Dense, Diagonal, Fresh, KakusanError, NotElliptic, Scale, Zero, solve
from kakusan.core import grids
from kakusan.objectives import covering
from kakusan.objectives.covering import Covering, Matched
from kakusan.processes.zoo.biology import FitzHughNagumo
from kakusan.processes.zoo.gaussian import Brownian, CriticallyDamped, OrnsteinUhlenbeck
from kakusan.processes.zoo.mechanics import DoubleWell, Underdamped
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from problems import F64, Curved, Wide


class Narrow(Curved):
    """One noise for two coordinates, along a direction that turns with the state."""

    def diffusion(self, x, t):
        angle = torch.sin(x[:, 0]) + 0.5 * x[:, 1]
        return Dense(torch.stack([angle.cos(), angle.sin()], 1).unsqueeze(-1))


KINETIC = Underdamped(lambda q: ((q**2 - 1) ** 2).sum(1), 1.0, 0.5)
HEAT = Underdamped(lambda q: (q**2).sum(1) / 2, 0.7, 0.5)  # linear
CASES = [
    (DoubleWell(1.0), [0.2]),
    (Curved(), [0.3, 0.3]),
    (Wide(), [0.3, 0.3]),
    (KINETIC, [0.1, 0.3]),
    (FitzHughNagumo(span=(0.0, 0.5)), [-0.5, -0.6]),
]
NAMES = [type(sde).__name__ for sde, _ in CASES]


def run(sde, start, n=10_000, steps=12, seed=1):
    grid = grids.uniform(*sde.span, steps)
    x = torch.as_tensor(start, dtype=F64).expand(n, *torch.as_tensor(start).shape)
    made = EulerSteps(sde, grid)
    return made, solve(sde, x, grid, noise=Fresh(seed), keep=True)


# --- brute force


def brute(sde, path, s, m, i):
    """The weight of one path from autograd alone: U = 𝒥ᵀΓ⁻¹J as a function of Z."""
    root = path.t.diff().abs().sqrt()
    shape = path.dw[s:m, i].shape

    def end(x, z):
        x, z = x[None], z.reshape(shape)
        for k in range(s, m):
            t, h = path.t[k], path.t[k + 1] - path.t[k]
            G = sde.diffusion(x, t)
            x = G.kick(x + h * sde.drift(x, t), root[k] * z[k - s : k - s + 1])
        return x[0]

    x = path.x[s, i]

    def U(z):
        J, noise = torch.func.jacrev(end, (0, 1))(x, z)
        return noise.mT @ torch.linalg.solve(noise @ noise.mT, J)

    z = (path.dw[s:m, i] / root[s:m, None]).flatten()
    divergence = torch.func.jacrev(U)(z).diagonal(dim1=0, dim2=2).sum(-1)
    return U(z).mT @ z - divergence


@pytest.mark.parametrize(
    "sde", [Curved(), Wide(), Narrow(), KINETIC], ids=lambda s: type(s).__name__
)
def test_the_divergence_is_that_of_autograd(sde):
    steps, path = run(sde, [0.3, -0.2], n=2, steps=6)
    for window in (None, 2, 3):
        S = Covering(window)(steps, path, [0, 1, 2])
        for s in (0, 1, 2):
            m = Covering(window).end(s, 6)
            exact = torch.stack([brute(sde, path, s, m, i) for i in range(2)])
            assert torch.allclose(S[s], exact, rtol=1e-8, atol=1e-8), (sde, window, s)


def test_a_window_of_one_step_is_the_score_of_its_kernel():
    """∇ log N(x'; x + h f, h GGᵀ) by autograd: the local weight, with its log-determinant."""
    sde = Curved()
    steps, path = run(sde, [0.3, 0.3], n=5)
    for s in (0, 7):
        t, h = path.t[s], (path.t[s + 1] - path.t[s]).item()
        x = path.x[s].clone().requires_grad_()
        G = sde.diffusion(x, t).G
        z = torch.linalg.solve(G, (path.x[s + 1] - x - h * sde.drift(x, t)).unsqueeze(-1))
        log_p = -z.square().sum() / (2 * h) - torch.linalg.slogdet(G).logabsdet.sum()
        exact = torch.autograd.grad(log_p, x)[0]
        assert torch.allclose(Covering(1)(steps, path, [s])[0], exact, rtol=1e-9)


# --- linear processes: the closed form, and no noise


RATE = torch.tensor([[1.0, -2.0], [1.0, 0.5]], dtype=F64)
SIGMA = torch.tensor([[1.0, 0.4], [0.0, 0.6]], dtype=F64)
DRIVEN = torch.tensor([[1.0], [0.0]], dtype=F64)
LINEAR = {
    "Brownian": (Brownian(SIGMA), [0.5, -1.0]),
    "rotation": (OrnsteinUhlenbeck(RATE, SIGMA, mean=torch.tensor([1.0, 2.0])), [0.5, -1.0]),
    "one noise": (OrnsteinUhlenbeck(RATE, DRIVEN), [0.5, -1.0]),
    "CriticallyDamped": (CriticallyDamped(dim=2, beta=2.0), [0.5, -1.0, 0.3, 0.1]),
    "Underdamped": (HEAT, [0.5, -1.0]),
    "in time": (SDE.of(lambda x, t: (1 + t) * (2 - x), Scale(0.5)), [[0.5], [1.0]]),
}


def chain_score(sde, path, s):
    """∇ log p(X_N | X_s) of the chain, from the means and covariances of its steps."""
    x = path.x[s].flatten(1)
    d = x.shape[1]

    def on(field, y, *rest):
        return field(y.reshape(-1, *path.x.shape[2:]), *rest).flatten(1)

    m, C, E = x, torch.zeros(d, d, dtype=F64), torch.eye(d, dtype=F64)
    for k in range(s, len(path.t) - 1):
        t, h = path.t[k], path.t[k + 1] - path.t[k]
        c = on(sde.drift, torch.zeros(1, d, dtype=F64), t)
        A = torch.eye(d, dtype=F64) + h * (on(sde.drift, torch.eye(d, dtype=F64), t) - c).mT
        unit = torch.eye(d, dtype=F64).reshape(d, *path.x.shape[2:])
        GG = sde.diffusion(path.x[k, :1], t).gram(unit).flatten(1)
        m, C, E = m @ A.mT + h * c, A @ C @ A.mT + h * GG, A @ E
    return torch.linalg.solve(C, (path.end.flatten(1) - m).mT).mT @ E


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_process_leaves_the_weight_no_noise(name):
    sde, start = LINEAR[name]
    steps, path = run(sde, start, n=50)
    at = range(Matched().latest(steps, path) + 1)
    exact = torch.stack([chain_score(sde, path, s) for s in at])
    for weights in (Covering(), Matched()):
        S = weights(steps, path)
        assert S.shape == (len(at), *path.x.shape[1:])
        assert torch.allclose(S.flatten(2), exact, rtol=1e-8, atol=1e-8), (name, weights)


def test_what_is_seen_early_ends_the_steps():
    sde, start = LINEAR["rotation"]
    steps, path = run(sde, start, n=20)
    cut = path._replace(t=path.t[:8], x=path.x[:8], dw=path.dw[:7])
    for s in (0, 3, 6):
        exact = chain_score(sde, cut, s)
        for weights in (Covering(), Matched()):
            assert torch.allclose(weights(steps, path, [s], last=7)[0], exact), (weights, s)


def test_matched_is_cheap_for_many_coordinates():
    """Fifty coordinates that all mix, twenty of them without noise of their own."""
    g = torch.Generator().manual_seed(0)
    rate = torch.randn(50, 50, generator=g, dtype=F64) / 50**0.5
    sde = OrnsteinUhlenbeck(rate, torch.eye(50, 30, dtype=F64))
    steps, path = run(sde, [0.1] * 50, n=2000, steps=40)
    exact = chain_score(sde, path, 10)
    assert torch.allclose(Matched()(steps, path, [10])[0], exact, rtol=1e-6, atol=1e-8)


# --- exact in the mean


def worst(sde, path, S, s=0, seed=5):
    """The largest |z| of psi(X_N) S - ∂psi(X_N)/∂x, over 24 functions and all coordinates."""
    x = path.x[s].clone().requires_grad_()
    y = x
    for k in range(s, len(path.t) - 1):
        t, h = path.t[k], path.t[k + 1] - path.t[k]
        y = sde.diffusion(y, t).kick(y + h * sde.drift(y, t), path.dw[k])
    assert torch.allclose(y, path.end)
    spread, zs = y.detach().std(0), []
    for w in torch.randn(8, y.shape[1], generator=torch.Generator().manual_seed(seed), dtype=F64):
        p = (y - y.detach().mean(0)) @ (w / spread)
        for psi in (p.sin(), p.cos(), p.tanh()):
            slope = torch.autograd.grad(psi.sum(), x, retain_graph=True)[0]
            # E[S | x] = 0, so that any constant may be taken off
            q = (psi - psi.mean()).detach()[:, None] * S - slope
            zs.append((q.mean(0) / (q.std(0) / len(q) ** 0.5)).abs().max())
    return max(zs).item()


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize(("sde", "start"), CASES, ids=NAMES)
def test_the_mean_of_psi_times_the_weight_is_the_slope_of_the_mean_of_psi(sde, start, window):
    """All paths from one x; windows that end before X_N is seen say the same as all steps."""
    steps, path = run(sde, start)
    S = Covering(window)(steps, path, [0])[0]
    assert worst(sde, path, S) < 4.5, (sde, window)
    # E[S | x] = 0
    assert (S.mean(0).abs() < 4.5 * S.std(0) / len(S) ** 0.5).all(), (sde, window)


@pytest.mark.parametrize(("sde", "start"), [CASES[1], CASES[4], (Narrow(), [0.3, 0.3])],
                         ids=["Curved", "FitzHughNagumo", "Narrow"])  # fmt: skip
def test_all_terms_of_the_divergence_count(sde, start, monkeypatch):
    """The sum over increments alone is biased; so it is without the divergence of J."""
    steps, path = run(sde, start)
    exact = covering.Ahead.weight

    def without(*terms):
        def weight(ahead, inverse):
            zero = {name: torch.zeros_like(getattr(ahead, name)) for name in terms}
            return exact(ahead._replace(**zero), inverse)

        return weight

    for terms in (("trace", "M", "K"), ("M",)):
        monkeypatch.setattr(covering.Ahead, "weight", without(*terms))
        assert worst(sde, path, Covering()(steps, path, [0])[0]) > 8, (sde, terms)


# --- windows


def test_windows_are_at_least_as_long_as_asked():
    """What comes after the window does not count: the path that ends there says the same."""
    steps, path = run(Curved(), [0.3, 0.3], n=5)
    weights = Covering(3)
    for s in range(12):
        m = weights.end(s, 12)
        assert min(3, 12 - s) <= m - s < 6 and (12 - m) % 3 == 0
        alone = Covering()(steps, path, [s], last=m)
        assert torch.allclose(alone, weights(steps, path, [s])), s
    assert torch.equal(weights(steps, path)[[7, 2]], weights(steps, path, [7, 2]))


def test_paths_are_taken_a_few_at_a_time(monkeypatch):
    steps, path = run(Curved(), [0.3, 0.3], n=7)
    whole = Covering(4)(steps, path)
    monkeypatch.setattr(covering, "ROWS", 50)
    assert torch.allclose(Covering(4)(steps, path), whole)


def control(steps, path, weights, s):
    S = weights(steps, path, [s])[0]
    return steps.operator(path.x[s], s).tmv(S).square().mean().item()


def test_longer_windows_have_less_variance():
    steps, path = run(DoubleWell(1.0), [1.0], n=4000, steps=100)
    first, five, twelve, all_ = (control(steps, path, Covering(w), 0) for w in (1, 5, 12, None))
    assert first > 3 * five and five > 1.5 * twelve, (first, five, twelve, all_)


def test_the_window_is_chosen_by_the_size_of_the_weights():
    """A linear process takes all steps, the top of a barrier of curvature -20 some of 0.05."""
    sde, start = LINEAR["one noise"]
    steps, path = run(sde, start, n=400, steps=24)
    assert Covering().chosen(steps, path).window is None
    assert Covering(7).chosen(steps, path).window == 7
    assert Matched().chosen(steps, path).latest(steps, path) == 22
    steps, path = run(DoubleWell(5.0), [0.0], n=300, steps=100)
    chosen = Covering().chosen(steps, path)
    assert chosen.window in (4, 8, 16), chosen
    # all steps seem better still: the few paths that carry their second moment are not here
    assert control(steps, path, Covering(), 0) < 0.1 * control(steps, path, chosen, 0)


# --- types, shapes, arrows


def test_single_precision_and_states_of_any_shape():
    sde = SDE.of(lambda x, t: -x * t + torch.sin(x.flip(1)),
                 lambda x, t: Diagonal(1 + 0.3 * t * torch.sin(x.flip(1))))  # fmt: skip
    steps, path = run(sde, [[0.3], [0.1]], n=6, steps=5)
    exact = Covering()(steps, path)
    single = path._replace(x=path.x.float(), dw=path.dw.float())
    found = Covering()(steps, single)
    assert found.dtype == torch.float32 and found.shape == exact.shape == (5, 6, 2, 1)
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_time_may_run_backwards():
    """The reverse of a process has negative steps."""
    sde = SDE.of(lambda x, t: torch.sin(2 * x.flip(1)) * (1 + t), Scale(0.8), span=(1.0, 0.0))
    steps, path = run(sde, [0.3, 0.1])
    assert worst(sde, path, Covering(5)(steps, path, [0])[0]) < 4.5


def test_no_gradients_are_kept():
    rate = torch.ones((), dtype=F64, requires_grad=True)
    sde = SDE.of(lambda x, t: -rate * x, Scale(1.0))
    steps, path = run(sde, [1.0], n=3)
    for weights in (Covering(), Matched()):
        assert not weights(steps, path).requires_grad


# --- refusals


def test_the_last_weight_stands_where_noise_reaches_every_coordinate():
    steps, path = run(KINETIC, [0.1, 0.3], n=4)
    for window in (None, 2, 5):
        assert Covering(window).latest(steps, path) == 10
        assert Covering(window).latest(steps, path, last=6) == 4
        assert len(Covering(window)(steps, path)) == 11
    assert Covering(1).latest(*run(Curved(), [0.3, 0.3], n=4)) == 11
    chain = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=F64)
    third = OrnsteinUhlenbeck(-chain, torch.tensor([[0.0], [0.0], [1.0]], dtype=F64))
    steps, path = run(third, [0.0, 0.0, 0.0], n=4)
    assert Matched().latest(steps, path) == Covering().latest(steps, path) == 9


def test_too_few_steps_are_refused():
    steps, path = run(KINETIC, [0.1, 0.3], n=4)
    with pytest.raises(
        NotElliptic, match="no weight at time 11: the noise of the 1 step from.*12"
    ):
        Covering()(steps, path, [3, 11])
    for refused in (lambda: Covering(1)(steps, path, [5]), lambda: Covering(1)(steps, path),
                    lambda: Covering(1).latest(steps, path)):  # fmt: skip
        with pytest.raises(NotElliptic, match="a window must be as long as"):
            refused()
    with pytest.raises(NotElliptic, match="does not reach every coordinate"):
        Matched()(*run(HEAT, [0.1, 0.3], n=4), [11])


class Other(GaussianSteps):
    grid = torch.linspace(0, 1, 13, dtype=F64)

    def mean(self, x, k):
        return x

    def operator(self, x, k):
        return Scale(1.0)

    def noise_shape(self, x):
        return tuple(x.shape)


def test_refusals_say_what_to_do():
    steps, path = run(Curved(), [0.3, 0.3], n=4)
    for weights in (Covering(), Matched()):
        with pytest.raises(KakusanError, match=r"give EulerSteps\(sde, grid\)"):
            weights(Other(), path)
        with pytest.raises(NotElliptic, match="no increments.*keep=True"):
            weights(steps, path._replace(dw=None))
        with pytest.raises(KakusanError, match="stand at the times 0 to 11"):
            weights(steps, path, [12])
        with pytest.raises(KakusanError, match="seen at one of the times 1 to 12"):
            weights(steps, path, last=13)
        with pytest.raises(KakusanError, match="every step of one grid"):
            weights(EulerSteps(Curved(), grids.uniform(0, 1, 6)), path)
        with pytest.raises(KakusanError, match="weights belong to the process that made the path"):
            weights(EulerSteps(DoubleWell(1.0), path.t), path)
    still = SDE.of(lambda x, t: -x, Zero())
    with pytest.raises(NotElliptic, match="no increments"):
        Covering()(*run(still, [1.0], n=2))
    with pytest.raises(KakusanError, match="window must be at least 1"):
        Covering(0)
    grown = SDE.of(lambda x, t: 0.1 * x, lambda x, t: Diagonal(0.5 * x))
    for sde in (Curved(), DoubleWell(0.1), grown, KINETIC):
        start = [0.7] * (2 if sde in (KINETIC,) or isinstance(sde, Curved) else 1)
        with pytest.raises(KakusanError, match=r"affine.*Covering\(\) takes any process"):
            Matched()(*run(sde, start, n=4))
