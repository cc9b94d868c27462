"""Orders of the general-purpose methods, strong and weak, in both directions of time; refusals.

Strong orders are slopes on one Brownian path, against the exact solution on that path where there
is one, else between one grid and the next finer. Weak orders know no sampling error: the nodes of
Gauss and Hermite stand for Gaussian noise, three-point noise is enumerated, and the moments of a
linear SDE after N steps are powers of one matrix.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kakusan import (
    SDE,
    Counter,
    Dense,
    Diagonal,
    EulerMaruyama,
    Fresh,
    Heun,
    KakusanError,
    Keyed,
    Recorded,
    Scale,
    Zero,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.core.noise import Wants
from kakusan.core.types import as_time, tracing
from kakusan.processes.sde import KnownTransition, Splittable
from kakusan.processes.transforms import Stratonovich, ito, stratonovich
from kakusan.solvers.forms import NoiseForm, noise_form
from kakusan.solvers.methods import RK4, Exact, Splitting, TamedEuler
from kakusan.solvers.strong import SRK, Milstein, StratonovichHeun
from kakusan.solvers.weak import WeakSecond
from problems import F64, Geometric

EULER, TAMED, HEUN, MILSTEIN = EulerMaruyama(), TamedEuler(), Heun(), Milstein()
STRAT, SRK15, SECOND, SPLIT = StratonovichHeun(), SRK(), WeakSecond(), Splitting()


def name(value):
    return type(value).__name__ if hasattr(value, "wants") else None


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


# --- the problems: one for each form of noise


class Linear(SDE):
    """dX = A X dt + Σ_j B_j X dW_j; the columns of G commute where the B_j do."""

    def __init__(self, A, *B):
        self.A, self.B, self.d = A, torch.stack(B), len(A)

    def drift(self, x, t):
        return x @ self.A.T.to(x)

    def diffusion(self, x, t):
        return Dense(torch.einsum("jik,bk->bij", self.B.to(x), x))

    def exact(self, x, T, w):
        """The solution where all matrices commute."""
        M = (self.A - (self.B @ self.B).sum(0) / 2) * T + torch.einsum("jik,bj->bik", self.B, w)
        return (torch.matrix_exp(M) @ x[..., None])[..., 0]


class Growth(SDE):
    """Geometric Brownian motions, each with its own: diagonal noise, solved exactly."""

    mu, sigma, d = tensor(0.5, -0.3, 0.2), tensor(0.6, 0.4, -0.8), 3

    def drift(self, x, t):
        return self.mu.to(x) * x

    def diffusion(self, x, t):
        return Diagonal(self.sigma.to(x) * x)

    def exact(self, x, T, w):
        return x * torch.exp((self.mu - self.sigma**2 / 2) * T + self.sigma * w)


def turn(growth, angle):
    """A growth and a turn of the plane; any two commute."""
    return tensor([growth, -angle], [angle, growth])


def shake(x, t):
    """Additive noise in the plane, of three numbers, that depends on time."""
    rows = [[1 + t, 0.3, t.sin()], [-0.5, (2 * t).cos(), 0.2]]
    return Dense(torch.stack([torch.stack([as_time(c) for c in row]) for row in rows]))


def pull(x, t):
    """A drift that couples the coordinates and depends on time."""
    return torch.sin(x.flip(1)) - x + 0.3 * torch.cos(t)


A = tensor([-0.6, 0.9], [-0.4, 0.3])
SCALAR = Linear(turn(-0.2, 0.4), turn(0.5, 0.4))
COMMUTATIVE = Linear(turn(-0.2, 0.4), turn(0.4, 0.3), turn(-0.2, 0.5))
GENERAL = Linear(A, tensor([0.4, 0.5], [0.0, 0.2]), tensor([0.1, 0.0], [-0.6, 0.3]))
ADDITIVE = SDE.of(lambda x, t: torch.sin(2 * x.flip(1)) + 0.3 * torch.cos(t), shake)
COUPLED = SDE.of(pull, lambda x, t: Diagonal(torch.cos(x + t) + 0.1))
TURNING = SDE.of(
    pull,
    lambda x, t: Dense(torch.stack([0.3 + torch.sin(x[:, 1]), t.cos() * x[:, 0]], 1)[..., None]),
)


class SquareRoot(Splittable):
    """dX = k (m - X) dt + s sqrt(X) dW in each coordinate."""

    k, m, s, domain = 2.0, 1.0, 0.7, "x >= 0"

    def drift(self, x, t):
        return self.k * (self.m - x)

    def diffusion(self, x, t):
        return Diagonal(self.s * x.sqrt())

    def flow(self, x, t, s):
        rest = self.m - self.s**2 / (4 * self.k)
        return rest + (x - rest) * torch.exp(-self.k * (s - t)).to(x)

    def kick(self, x, t, dw):
        return (x.sqrt() + self.s / 2 * dw) ** 2


WELL = SDE.of(lambda x, t: 4 * (x - x**3), Scale(1.0))
PROBLEMS = {
    "additive": ADDITIVE, "scalar": SCALAR, "scalar_t": TURNING, "diagonal": Growth(),
    "diagonal_t": COUPLED, "commutative": COMMUTATIVE, "general": GENERAL,
    "root": SquareRoot(), "well": WELL,
}  # fmt: skip


def start(sde, n):
    return tensor(*[[1.0, 0.5, -0.8][: getattr(sde, "d", 2)]] * n)


# --- strong orders


def strong_errors(method, sde, levels=(3, 4, 5, 6, 7), paths=1000):
    """Root mean square errors at time 1 with 2^level steps, all on the same paths."""
    N = 2 ** levels[-1]
    x, grid = start(sde, paths), grids.uniform(0, 1, N)
    shape = tuple(sde.noise_shape(x))
    source = Fresh(0)
    drawn = [source.area(k, 0.0, 1 / N, shape, x) for k in range(N)]
    dw, dz = (torch.stack(part) for part in zip(*drawn, strict=True))
    path = Recorded(dw, grid, dz)
    ends = [solve(sde, x, grids.uniform(0, 1, 2**n), method, path).end for n in levels]
    if hasattr(sde, "exact") and sde is not GENERAL:
        truth = [sde.exact(x, 1.0, dw.sum(0))] * len(ends)
    else:
        ends, truth = ends[:-1], ends[1:]
    return [(a - b).square().sum(1).mean().sqrt().item() for a, b in zip(ends, truth, strict=True)]


def slope(errors, base=2.0):
    """The order: of log error over log step, by least squares."""
    y = np.log(errors) / math.log(base)
    return -np.polyfit(np.arange(len(y)), y, 1)[0]


# the strong order of every method for every form it takes
STRONG = {
    (m, p): order
    for m, orders in (
        (EULER, [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (TAMED, [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (HEUN, [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (MILSTEIN, [1, 1, 1, 1, 1, 1]),
        (STRAT, [1, 1, 1, 1, 1, 1, 0.5]),
        (SRK15, [1.5, 1.5, 1.5, 1.5, 1.5]),
    )
    for p, order in zip(PROBLEMS, orders, strict=False)
} | {(SPLIT, "root"): 1, (TAMED, "well"): 1}


@pytest.mark.parametrize(("method", "problem"), STRONG, ids=name)
def test_strong_orders(method, problem):
    errors = strong_errors(method, PROBLEMS[problem])
    order = STRONG[method, problem]
    assert abs(slope(errors) - order) < 0.15, (method, problem, slope(errors), errors)


# --- weak orders, without sampling error


def as_solve_does(method, sde):
    return stratonovich(sde) if method.stratonovich else ito(sde)


def outcomes(wants, m, a, nodes):
    """Weights (K,) and noise (K, m) that have the expectations of what a method wants."""
    y, p = np.polynomial.hermite_e.hermegauss(nodes)
    values, p = y * a**0.5, p / p.sum()
    if wants is Wants.WEAK:
        values, p = (3 * a) ** 0.5 * np.array([-1, 0, 1]), np.array([1, 4, 1]) / 6
    extra = {Wants.AREA: (values, p), Wants.WEAK: (np.array([-1, 1]), np.array([1, 1]) / 2)}
    parts = [(values, p)] * m + [extra[wants]] * m if wants in extra else [(values, p)] * m
    z = torch.tensor(list(itertools.product(*(v for v, _ in parts))), dtype=F64)
    weight = torch.tensor(list(itertools.product(*(q for _, q in parts))), dtype=F64).prod(1)
    w, other = z[:, :m], z[:, m:]
    if wants is Wants.AREA:
        other = a / 2 * (w + other / 3**0.5)
    return weight, (w, other) if wants in extra else w


def all_ends(method, sde, x, t, s, nodes=4):
    """Every end of one step from each of n states, (K, n, d), with weights (K,)."""
    sde, grid, n = as_solve_does(method, sde), tensor(t, s), len(x)
    weight, dw = outcomes(method.wants, sde.noise_shape(x)[1], abs(s - t), nodes)
    dw = tuple(v.repeat_interleave(n, 0) for v in (dw if isinstance(dw, tuple) else (dw,)))
    state = method.init(sde, x, grid)
    end, _ = method.step(sde, x.repeat(len(weight), 1), *grid, dw if len(dw) > 1 else dw[0], state)
    return weight, end.reshape(len(weight), n, -1)


def second_moments(method, sde, N):
    """E[X_N ⊗ X_N] as a matrix on X_0 ⊗ X_0, for a linear SDE in N steps to time 1."""
    d = start(sde, 1).shape[1]
    weight, rows = all_ends(method, sde, torch.eye(d, dtype=F64), 0.0, 1.0 / N)
    step = torch.einsum("k,kia,kjb->abij", weight, rows, rows).reshape(d * d, d * d)
    return torch.linalg.matrix_power(step, N)


def true_second_moments(sde):
    """The same for the solution: exp of A ⊗ I + I ⊗ A + Σ_j B_j ⊗ B_j."""
    if isinstance(sde, Stratonovich):
        inner = sde.sde
        return true_second_moments(Linear(inner.A + (inner.B @ inner.B).sum(0) / 2, *inner.B))
    A, B = (sde.A, sde.B) if isinstance(sde, Linear) else (
        sde.mu.diag(), torch.diag_embed(sde.sigma.diag()))  # fmt: skip
    eye = torch.eye(len(A), dtype=F64)
    L = torch.kron(A, eye) + torch.kron(eye, A) + sum(torch.kron(b, b) for b in B)
    return torch.matrix_exp(L)


LINEAR = {name: PROBLEMS[name] for name in ("scalar", "diagonal", "commutative", "general")}
LINEAR |= {f"stratonovich_{n}": Stratonovich(LINEAR[n]) for n in ("scalar", "general")}
TRIPLE = Linear(
    tensor([-0.5, 0.2, 0.1], [0.3, 0.1, -0.2], [0.0, 0.4, -0.3]),
    *torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=F64) / 3,
)


# polynomials in t, x, y: {(i, j, k): c} is the sum of c t^i x^j y^k


def product(p, q):
    out = {}
    for (a, c), (b, e) in itertools.product(p.items(), q.items()):
        n = tuple(i + j for i, j in zip(a, b, strict=True))
        out[n] = out.get(n, 0.0) + c * e
    return out


def total(*parts):
    out = {}
    for p in parts:
        for n, c in p.items():
            out[n] = out.get(n, 0.0) + c
    return out


def derivative(p, i):
    return {tuple(e - (k == i) for k, e in enumerate(n)): c * n[i] for n, c in p.items() if n[i]}


def value(p, t, x):
    zero = 0 * x[:, 0]
    return sum((c * t**i * x[:, 0] ** j * x[:, 1] ** k for (i, j, k), c in p.items()), zero)


class Polynomial(SDE):
    """Coefficients are polynomials of degree 1 for x and, counting y twice, 2 for y.

    So the generator leaves the degree of a polynomial as it is, and means have power series.
    """

    def __init__(self, f, G, form=Dense):
        self.f, self.G, self.form = f, G, form

    def drift(self, x, t):
        return torch.stack([value(p, t, x) for p in self.f], 1)

    def diffusion(self, x, t):
        G = torch.stack([torch.stack([value(p, t, x) for p in row], 1) for row in self.G], 1)
        return Diagonal(G.diagonal(dim1=1, dim2=2)) if self.form is Diagonal else Dense(G)

    def mean(self, p, t, x, h):
        """E[p(t + h, X_{t+h})] given X_t = x: the series of exp(h L) p."""
        out, factor = value(p, t, x), 1.0
        for n in range(1, 12):
            p, factor = self.generator(p), factor * h / n
            out = out + factor * value(p, t, x)
        return out

    def generator(self, p):
        first = [derivative(p, 0)]
        first += [product(f, derivative(p, i + 1)) for i, f in enumerate(self.f)]
        for i, j in itertools.product(range(2), repeat=2):
            D = total(*(product(a, b) for a, b in zip(self.G[i], self.G[j], strict=True)))
            first.append(
                product({(0, 0, 0): 0.5}, product(D, derivative(derivative(p, i + 1), j + 1)))
            )
        return total(*first)


T, X, Y, ONE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)
XX, TX, TT = (0, 2, 0), (1, 1, 0), (2, 0, 0)
CURVED = [{ONE: 0.3, X: -0.6, T: 0.5}, {XX: 0.7, Y: -0.4, TX: 0.6, X: 0.2}]
POLYNOMIAL = {
    "additive": Polynomial(
        CURVED, [[{ONE: 0.5, T: 0.7}, {ONE: 0.2}], [{T: 0.4}, {TT: 1.0, ONE: 0.6}]]
    ),
    "constant": Polynomial(CURVED, [[{ONE: 0.5}, {ONE: 0.2}], [{ONE: 0.4}, {ONE: 0.6}]]),
    "scalar": Polynomial(
        CURVED, [[{ONE: 0.4, X: 0.3, T: 0.2}], [{XX: 0.6, Y: 0.4, X: -0.2, TX: 0.3}]]
    ),
    "diagonal": Polynomial(
        CURVED, [[{ONE: 0.4, X: 0.5, T: 0.3}, {}], [{}, {Y: 0.6, ONE: 0.2, T: 0.3}]], Diagonal
    ),
    "commutative": Polynomial(
        CURVED,
        # x and y - x² are multiplied by numbers: a linear SDE with diagonal matrices, bent
        [[{X: 0.5}, {X: -0.3}], [{Y: 0.4, XX: 2 * 0.5 - 0.4}, {Y: 0.6, XX: -2 * 0.3 - 0.6}]],
    ),
    "general": Polynomial(
        CURVED,
        [
            [{ONE: 0.4, X: 0.3}, {ONE: 0.3, T: 0.2}],
            [{XX: 0.5, Y: 0.3}, {X: 0.6, XX: -0.4, TX: 0.2}],
        ],
    ),
}
# test functions
FUNCTIONS = [{X: 1.0}, {Y: 1.0}, {XX: 1.0}, {(0, 1, 1): 1.0}, {(0, 3, 0): 1.0}, {(0, 0, 2): 1.0}]


def weak_errors_of_a_step(method, sde, count=4):
    """The largest error of a mean after one step, for h = 0.08 and its halves."""
    x, errors = tensor([0.7, -0.4], [-0.3, 0.8]), []
    for h in 0.08 / 2 ** torch.arange(count, dtype=F64):
        weight, end = all_ends(method, sde, x, 0.3, 0.3 + h.item(), nodes=9)
        flat = end.reshape(-1, 2)
        means = [weight @ value(p, 0.0, flat).reshape(len(weight), -1) for p in FUNCTIONS]
        truth = [sde.mean(p, 0.3, x, h.item()) for p in FUNCTIONS]
        errors.append(max((a - b).abs().max().item() for a, b in zip(means, truth, strict=True)))
    return errors


WEAK = {  # after many steps, for linear equations
    EULER: (1, list(LINEAR)),
    HEUN: (1, list(LINEAR)),
    MILSTEIN: (1, ["scalar", "diagonal", "commutative", "stratonovich_scalar"]),
    STRAT: (1, list(LINEAR)),
    SRK15: (2, ["scalar", "diagonal", "stratonovich_scalar"]),
    SECOND: (2, list(LINEAR)),
}


@pytest.mark.parametrize(
    ("method", "problem"), [(m, p) for m in WEAK for p in WEAK[m][1]], ids=name
)
def test_second_moments_of_linear_equations_converge_to_the_right_limit(method, problem):
    sde, order = LINEAR[problem], WEAK[method][0]
    truth = true_second_moments(sde)
    errors = [(second_moments(method, sde, N) - truth).abs().max().item() for N in (8, 16, 32, 64)]
    assert abs(slope(errors) - order) < 0.15, (method, problem, slope(errors), errors)


WEAK_STEP = {
    (m, p): order
    for m, orders in (
        (EULER, [1, 1, 1, 1, 1, 1]),
        (TAMED, [1, 1, 1, 1, 1, 1]),
        (HEUN, [1, 2, 1, 1, 1, 1]),
        (MILSTEIN, [1, 1, 1, 1, 1]),
        (STRAT, [2, 2, 1, 1, 1, 1]),
        (SRK15, [2, 2, 1.5, 2]),
        (SECOND, [2, 2, 2, 2, 2, 2]),
    )
    for p, order in zip(POLYNOMIAL, orders, strict=False)
}


@pytest.mark.parametrize(("method", "problem"), WEAK_STEP, ids=name)
def test_one_step_keeps_means_to_one_order_more(method, problem):
    """Noise and drift bent and moved by time, so that no derivative of theirs is zero."""
    errors = weak_errors_of_a_step(method, POLYNOMIAL[problem])
    order = WEAK_STEP[method, problem]
    assert abs(slope(errors) - 1 - order) < 0.15, (method, problem, slope(errors) - 1, errors)


def test_weak_order_2_with_three_brownian_motions():
    """Where every pair of them has an area of its own."""
    truth = true_second_moments(TRIPLE)
    errors = [(second_moments(SECOND, TRIPLE, N) - truth).abs().max() for N in (8, 16, 32)]
    assert abs(slope(errors) - 2) < 0.15, errors


def test_second_moment_of_euler_in_closed_form():
    mu, sigma, N = 0.4, 0.7, 10
    sde = Linear(tensor([mu]), tensor([sigma]))
    moment = second_moments(EULER, sde, N).item()
    assert math.isclose(moment, ((1 + mu / N) ** 2 + sigma**2 / N) ** N, rel_tol=1e-13)


def test_splitting_of_the_square_root_process_has_weak_order_2():
    """The step takes polynomials to polynomials: its moments are powers of a matrix."""
    sde = SquareRoot()
    k, pull, g = sde.k, sde.k * sde.m, sde.s**2
    truth = torch.matrix_exp(tensor([0, 0, 0], [pull, -k, 0], [0, 2 * pull + g, -2 * k]))
    x = tensor([0.5], [1.0], [2.0])
    powers = x ** torch.arange(3)
    errors = []
    for N in (4, 8, 16, 32):
        weight, end = all_ends(SPLIT, sde, x, 0.0, 1 / N)
        means = torch.einsum("k,kni->ni", weight, end ** torch.arange(3))
        step = torch.linalg.solve(powers, means).T
        errors.append((torch.linalg.matrix_power(step, N) - truth).abs().max().item())
    assert abs(slope(errors) - 2) < 0.15, errors


# --- exact steps


class ExactGrowth(Growth, KnownTransition):
    def exact(self, x, t, s, dw, source):
        return Growth.exact(self, x, s - t, dw)


class Waiting(KnownTransition):
    """A process with gamma increments on top of nothing: its law needs the generator."""

    def drift(self, x, t):
        return 0 * x

    def diffusion(self, x, t):
        return Scale(1.0)

    def exact(self, x, t, s, dw, source):
        return x + torch.empty_like(x).exponential_(1.0, generator=source)


def test_exact_steps_follow_the_path_whatever_the_grid():
    sde, path = ExactGrowth(), Counter(0, cell=0.25)
    coarse, fine = (
        solve(sde, start(sde, 20), grids.uniform(0, 1, N), Exact(), path).end for N in (1, 4)
    )
    w = path.increment(0, 0.0, 1.0, (20, 3), coarse)
    assert (coarse - fine).abs().max() < 1e-13
    assert (coarse - Growth.exact(sde, start(sde, 20), 1.0, w)).abs().max() < 1e-13


def test_exact_steps_hand_over_a_generator_for_each_step():
    x = torch.zeros(20_000, 1, dtype=F64)
    end = solve(Waiting(), x, grids.uniform(0, 1, 4), Exact(), Fresh(0)).end
    se = (4 / len(x)) ** 0.5
    assert abs(end.mean() - 4) < 4 * se and abs(end.var() - 4) < 4 * 4 * (3.5 / len(x)) ** 0.5


# --- both directions of time


class Mirror(SDE):
    """The same process with time running from 1 to 0."""

    span = (1.0, 0.0)

    def __init__(self, sde):
        self.sde, self.d = sde, getattr(sde, "d", 2)

    def drift(self, x, t):
        return -self.sde.drift(x, 1 - t)

    def diffusion(self, x, t):
        return self.sde.diffusion(x, 1 - t)


class MirrorSplit(Mirror, Splittable):
    def flow(self, x, t, s):
        return self.sde.flow(x, 1 - t, 1 - s)

    def kick(self, x, t, dw):
        return self.sde.kick(x, 1 - t, dw)


EVERY = [*STRONG, *((SECOND, p) for p in list(PROBLEMS)[:7])]
TWO = tensor([1.0, 0.5, -0.8], [0.3, 0.9, 0.4])


@pytest.mark.parametrize(("method", "problem"), EVERY, ids=name)
def test_a_step_back_in_time_is_a_step_of_the_mirrored_process(method, problem):
    sde = PROBLEMS[problem]
    x = TWO[:, : getattr(sde, "d", 2)].contiguous()
    mirrored = (MirrorSplit if isinstance(sde, Splittable) else Mirror)(sde)
    noise = Fresh(3).want(method.wants, 0, 0.3, 0.35, sde.noise_shape(x), x)
    ends = []
    for process, (t, s) in ((sde, (0.3, 0.35)), (mirrored, (0.7, 0.65))):
        process, grid = as_solve_does(method, process), tensor(t, s)
        state = method.init(process, x, grid)
        ends.append(method.step(process, x, *grid, noise, state)[0])
    assert (ends[0] - ends[1]).abs().max() < 1e-13, (method, problem, ends)
    assert (ends[0] - x).abs().min() > 1e-6, "nothing moved"


@pytest.mark.parametrize("method", [EULER, TAMED, HEUN, MILSTEIN, STRAT, SRK15, SECOND], ids=name)
def test_reversed_geometric_brownian_motion_returns_to_its_start(method):
    process, n = Geometric(), 4000
    back = reverse(process, process.score)
    end = solve(back, process.start(n, 1.0, 0), grids.uniform(1, 0, 64), method, Fresh(1)).end
    y, v = end.log(), process.v0
    # and the bias of the first order methods, of one step's size
    assert abs(y.mean()) < 4 * (v / n) ** 0.5 + 0.01, (method, y.mean())
    assert abs(y.var() / v - 1) < 4 * (2 / n) ** 0.5 + 0.03, (method, y.var())


# --- steps as graphs, gradients, shapes, dtypes


@pytest.mark.parametrize(("method", "problem"), EVERY, ids=name)
def test_a_traced_step_serves_all_times_and_keeps_the_dtype(method, problem):
    sde = as_solve_does(method, PROBLEMS[problem])
    x = TWO[:, : getattr(PROBLEMS[problem], "d", 2)].float().contiguous()
    shape, state = sde.noise_shape(x), method.init(sde, x, tensor(0.2, 0.3))

    def step(x, t, s, *dw):
        return method.step(sde, x, t, s, dw if len(dw) > 1 else dw[0], state)[0]

    def noise(t, s):
        dw = Fresh(3).want(method.wants, 0, t, s, shape, x)
        return dw if isinstance(dw, tuple) else (dw,)

    with tracing():
        graph = make_fx(step)(x, *tensor(0.2, 0.3), *noise(0.2, 0.3))
    other = (x.flip(0).contiguous(), *tensor(0.5, 0.54), *noise(0.5, 0.54))
    assert graph(*other).dtype == step(*other).dtype == torch.float32, (method, problem)
    assert (graph(*other) - step(*other)).abs().max() < 1e-5, (method, problem)


@pytest.mark.parametrize("method", [MILSTEIN, STRAT, SRK15, SECOND, TAMED], ids=name)
def test_gradients_flow_through_a_step(method):
    x = tensor([0.8, 0.4])
    noise = Fresh(3).want(method.wants, 0, 0.3, 0.35, (1, 2), x)

    def end(sigma):
        sde = SDE.of(lambda x, t: -x, lambda x, t: Diagonal(sigma * torch.sin(x)))
        sde = as_solve_does(method, sde)
        return method.step(sde, x, *tensor(0.3, 0.35), noise, NoiseForm.DIAGONAL)[0].sum()

    sigma = torch.tensor(0.7, dtype=F64, requires_grad=True)
    end(sigma).backward()
    by_hand = (end(sigma.detach() + 1e-5) - end(sigma.detach() - 1e-5)) / 2e-5
    assert abs(sigma.grad - by_hand) < 1e-8 and by_hand.abs() > 1e-3, method


@pytest.mark.parametrize("method", [TAMED, MILSTEIN, STRAT, SRK15, SECOND], ids=name)
@pytest.mark.parametrize("problem", ["additive", "scalar_t", "commutative", "general"])
def test_images_are_stepped_as_vectors_are(method, problem):
    if (method, problem) not in EVERY:
        pytest.skip("refused")
    sde, x = PROBLEMS[problem], TWO[:, :2].contiguous()

    class Images(SDE):
        def drift(self, x, t):
            return sde.drift(x.flatten(1), t).reshape(x.shape)

        def diffusion(self, x, t):
            return sde.diffusion(x.flatten(1), t)

        def noise_shape(self, x):
            return sde.noise_shape(x.flatten(1))

    grid = grids.uniform(0, 0.1, 2)
    flat = solve(sde, x, grid, method, Fresh(0)).end
    images = solve(Images(), x.reshape(2, 1, 1, 2), grid, method, Fresh(0)).end
    assert images.shape == (2, 1, 1, 2)
    assert (images.flatten(1) - flat).abs().max() < 1e-13, (method, problem)


# --- equations without noise, and drifts that are too strong


@pytest.mark.parametrize(
    ("method", "order"),
    [(RK4(), 4), (HEUN, 2), (STRAT, 2), (SRK15, 2), (SECOND, 2), (MILSTEIN, 1), (TAMED, 1)],
    ids=name,
)
@pytest.mark.parametrize("way", [1, -1])
def test_orders_for_odes(method, order, way):
    """x' = x cos t, both ways."""
    sde = SDE.of(lambda x, t: x * torch.cos(t), Zero())
    x, errors = tensor([0.3], [-0.7]), []
    for N in (32, 64, 128):
        grid = grids.uniform(0, 2, N) if way > 0 else grids.uniform(2, 0, N)
        growth = math.exp(way * math.sin(2))
        errors.append((solve(sde, x, grid, method).end - x * growth).abs().max().item())
    assert abs(slope(errors) - order) < 0.15, (method, errors)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_taming_saves_where_euler_explodes(dtype):
    far = 1e7  # where the square of the drift is beyond float32
    x = tensor(10.0, far).to(dtype).repeat_interleave(200)[:, None]
    grid = grids.uniform(0, 100, 1000)
    with pytest.raises(KakusanError, match=r"no longer finite .* TamedEuler\(\)"):
        solve(WELL, x, grid, EULER, Fresh(0))
    end = solve(WELL, x, grid, TAMED, Fresh(0)).end
    assert (end[:200].abs() < 4).all()
    assert ((end[200:] - (far - len(grid) + 1)).abs() < 100).all(), "in by one a step"


# --- the forms of noise, and refusals


def tilting(x, t):
    """The fields (1, 1) and (0, x)."""
    return Dense(torch.stack([torch.ones_like(x), torch.stack([0 * x[:, 0], x[:, 0]], 1)], 2))


def bending(x, t):
    """(y, 0) and (0, x) are fields that do not commute."""
    return Dense(torch.diag_embed(x.flip(1)))


FORMS = {
    "zero": (Zero(), "additive"),
    "constant": (Dense(torch.ones(2, 5)), "additive"),
    "of time": (lambda x, t: Scale(1 + t), "additive"),
    "one motion": (lambda x, t: Dense(x[..., None] ** 2), "scalar"),
    "diagonal": (lambda x, t: Diagonal(1 + x**2), "diagonal"),
    "diagonal later": (lambda x, t: Diagonal(1 + t * x), "diagonal"),
    "diagonal and coupled": (lambda x, t: Diagonal(1 + x.flip(1) ** 2), "general"),
    "one number for all": (lambda x, t: Scale(1 + x.square().sum(1)), "general"),
    "the same twice": (lambda x, t: Dense(torch.stack([x, 2 * x], 2)), "commutative"),
    "columns of diagonals": (lambda x, t: Dense(torch.diag_embed(x.sin())), "commutative"),
    "bending": (bending, "general"),
    "tilting": (tilting, "general"),
    "not everywhere": (lambda x, t: Diagonal(x.sqrt()), "diagonal"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x", [tensor([0.0, 0.0]), tensor([0.4, 1.2], [-2.0, 3.0])], ids=str)
def test_forms_of_noise(form, x):
    G, expected = FORMS[form]
    sde = SDE.of(lambda x, t: -x, G)
    for dtype in (F64, torch.float32):
        assert noise_form(sde, x.to(dtype), as_time(0.5)).value == expected, (form, x)


def test_the_form_is_judged_along_the_whole_grid():
    late = SDE.of(lambda x, t: -x, lambda x, t: Diagonal(1 + t * x.flip(1)))
    assert noise_form(late, tensor([1.0, 2.0]), as_time(0.0)) is NoiseForm.ADDITIVE
    with pytest.raises(KakusanError, match="Milstein"):
        solve(late, tensor([1.0, 2.0]), grids.uniform(0, 1, 2), MILSTEIN, Fresh(0))


@pytest.mark.parametrize(
    ("method", "G", "words"),
    [
        (MILSTEIN, bending, r"do not commute.* EulerMaruyama .*StratonovichHeun, or WeakSecond"),
        (SRK15, bending, r"noise is general. EulerMaruyama .*order 1/2; WeakSecond"),
        (
            SRK15,
            FORMS["the same twice"][0],
            r"noise is commutative. Milstein .*order 1; WeakSecond",
        ),
        (RK4(), Scale(1.0), r"has noise, a Scale: SRK, Milstein or EulerMaruyama"),
        (Exact(), Scale(1.0), r"needs a KnownTransition, .* got _Additive; EulerMaruyama"),
        (SPLIT, Scale(1.0), r"needs a Splittable, .* got _Additive; EulerMaruyama"),
    ],
    ids=name,
)
def test_refusals_name_another_way(method, G, words):
    with pytest.raises(KakusanError, match=words):
        solve(SDE.of(lambda x, t: -x, G), tensor([1.0, 2.0]), grids.uniform(0, 1, 2), method)


def test_a_splittable_in_another_sense_is_another_process():
    with pytest.raises(KakusanError, match="needs a Splittable"):
        solve(Stratonovich(SquareRoot()), tensor([1.0, 2.0]), grids.uniform(0, 1, 2), SPLIT)


@pytest.mark.parametrize(
    "source", [Fresh(0), Keyed(0), Counter(0)], ids=lambda s: type(s).__name__
)
def test_three_values_and_signs_are_independent(source):
    n, h = 60_000, 0.25
    dw, sign = source.want(Wants.WEAK, 0, 0.0, h, (n, 1), torch.empty(0))
    three = dw / (3 * h) ** 0.5
    for v, p in ((-1, 1 / 6), (0, 2 / 3), (1, 1 / 6)):
        for e in (-1, 1):
            share = (((three - v).abs() < 1e-6) & (sign == e)).double().mean()
            assert abs(share - p / 2) < 4 * (p / 2 * (1 - p / 2) / n) ** 0.5, (source, v, e)
