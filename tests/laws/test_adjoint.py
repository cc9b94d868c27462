"""The same gradients as autograd's, in the memory of a few states."""

import weakref
from itertools import pairwise
from math import comb

import pytest
import torch
from torch import nn

from kakusan import (
    SDE,
    VP,
    Ancestral,
    Counter,
    Dense,
    Diagonal,
    EulerMaruyama,
    Fresh,
    Heun,
    KakusanError,
    Keyed,
    Multistep,
    Recorded,
    Scale,
    Zero,
    probability_flow,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.solvers.adjoint import Adjoint, marks
from problems import F64, gaussian, time


def start(n=5, d=2):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(1))


def leaf(*numbers):
    return torch.tensor(numbers, dtype=F64).squeeze().requires_grad_()


def both(sde, x, grid, parameters, loss=None, **kwargs):
    """Gradients by the adjoint and by autograd through every step."""
    loss = loss or (lambda path: path.end.sin().sum())
    x, found = x.clone().requires_grad_(), []
    for engine in (Adjoint(checkpoints=4), None):
        path = solve(sde, x, grid, engine=engine, **kwargs)
        found.append(torch.autograd.grad(loss(path), (x, *parameters)))
    return found


def agree(found, other, tol=1e-12):
    for a, b in zip(found, other, strict=True):
        assert b.abs().max() > 1e-6  # a gradient of zeros would prove nothing
        assert (a - b).abs().max() <= tol * b.abs().max(), (a, b)
    return True


class Net(nn.Module):
    """A neural SDE with dense noise."""

    span, domain = (0.0, 1.0), ""

    def __init__(self, d=2, m=3):
        super().__init__()
        self.d, self.m = d, m
        self.f = nn.Sequential(nn.Linear(d + 1, 16), nn.Tanh(), nn.Linear(16, d)).double()
        self.g = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, d * m)).double()


class NeuralSDE(Net, SDE):
    def drift(self, x, t):
        return self.f(torch.cat([x, t.expand(len(x), 1)], 1))

    def diffusion(self, x, t):
        return Dense(self.g(x).reshape(-1, self.d, self.m))


@pytest.mark.parametrize("method", [EulerMaruyama(), Heun()], ids=["euler", "heun"])
@pytest.mark.parametrize("noise", [Counter(0, cell=1 / 37), Keyed(0)], ids=["counter", "keyed"])
def test_gradients_are_those_of_autograd(method, noise):
    rate, sigma = leaf(0.7), leaf(0.4, 0.9)
    x, grid = start(), grids.uniform(0, 1, 37)
    for f, G in (
        (lambda x, t: -rate * x + (sigma * t).cos(), lambda x, t: Zero()),
        (lambda x, t: -rate * x, lambda x, t: Diagonal(sigma.expand_as(x))),
        (lambda x, t: rate * x, lambda x, t: Diagonal(sigma * x)),
    ):
        sde = SDE.of(f, G)
        used = (rate, sigma)
        assert agree(*both(sde, x, grid, used, method=method, noise=noise)), sde


@pytest.mark.parametrize("method", [EulerMaruyama(), Heun()], ids=["euler", "heun"])
def test_gradients_of_a_neural_sde_with_dense_noise(method):
    torch.manual_seed(0)
    sde = NeuralSDE()
    dw = torch.randn(50, 5, 3, dtype=F64) / 50**0.5
    found = both(sde, start(), grids.uniform(0, 1, 50), tuple(sde.parameters()), method=method,
                 noise=Recorded(dw))  # fmt: skip
    assert agree(*found)


def test_a_linear_ode_has_the_transposed_exponential():
    A = leaf([-0.5, -2.0], [2.0, 0.1])
    x, v = start(), start(d=2).flip(0)
    grid = grids.uniform(0, 1, 4000)
    sde = SDE.of(lambda x, t: x @ A.T, Zero())
    x = x.requires_grad_()
    end = solve(sde, x, grid, Heun(), engine=Adjoint()).end
    dx, dA = torch.autograd.grad((end * v).sum(), (x, A))
    with torch.enable_grad():
        exact = ((x @ torch.matrix_exp(A).T) * v).sum()
    for found, truth in zip((dx, dA), torch.autograd.grad(exact, (x, A)), strict=True):
        assert (found - truth).abs().max() < 1e-6, found - truth


def test_geometric_brownian_motion_has_pathwise_derivatives():
    mu, sigma, n = leaf(0.4), leaf(0.6), 500
    x, grid, path = torch.ones(200, 1, dtype=F64), grids.uniform(0, 1, n), Counter(3, cell=1 / n)
    sde = SDE.of(lambda x, t: mu * x, lambda x, t: Diagonal(sigma * x))
    end = solve(sde, x, grid, noise=path, engine=Adjoint()).end
    found = torch.autograd.grad(end.sum(), (mu, sigma))
    # of Euler's product, to rounding
    dw = torch.stack([path.increment(0, *e, (200, 1), x) for e in pairwise(grid.tolist())])
    factors = 1 + mu.detach() / n + sigma.detach() * dw
    discrete = [(factors.prod(0) * (d / factors).sum(0)).sum() for d in (time(1 / n), dw)]
    assert agree(found, discrete, 1e-11)
    # of the solution X, with the error of Euler's steps: dX/dmu = T X, dX/dsigma = (w - sigma T) X
    w = dw.sum(0)
    X = torch.exp(0.4 - 0.18 + 0.6 * w)
    exact = torch.stack([X, X * (w - 0.6)]).squeeze(-1)
    error = torch.stack([f / 200 for f in found]) - exact.mean(1)
    # Euler's error is a martingale of size sigma² sqrt(h T / 2) beside X
    assert (error.abs() < 4 * exact.std(1) * 0.36 * (0.5 / n) ** 0.5 + 2 / n).all(), error


def test_gradients_are_finite_differences():
    theta = leaf(0.3, -0.8, 0.5)
    sde = SDE.of(
        lambda x, t: theta[0] * x.sin() + theta[1] * x, lambda x, t: Diagonal(theta[2] * x.cos())
    )

    def loss():
        return solve(sde, start(), grids.uniform(0, 1, 20), Heun(), Keyed(0), engine=Adjoint()).end

    (found,) = torch.autograd.grad(loss().square().sum(), theta)
    with torch.no_grad():
        for i, step in enumerate(torch.eye(3, dtype=F64) * 1e-5):
            values = []
            for sign in (1, -1):
                theta += sign * step
                values.append(loss().square().sum())
                theta -= sign * step
            assert abs((values[0] - values[1]) / 2e-5 - found[i]) < 1e-6, i


def test_states_on_the_way_carry_gradients_too():
    rate = leaf(0.7)
    sde = SDE.of(lambda x, t: -rate * x, Scale(0.5))
    grid, noise = grids.uniform(0, 1, 23), Counter(0, cell=1 / 23)
    x = start().requires_grad_()
    paths, shown = [], []
    for engine in (Adjoint(), None):
        seen = []
        paths.append(solve(sde, x, grid, Heun(), noise, keep=True, every=5, engine=engine,
                           on_step=lambda k, t, x, seen=seen: seen.append((k, t, x))))  # fmt: skip
        shown.append(seen)
    for a, b in zip(*paths, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a[2], b[2]) and a[:2] == b[:2] for a, b in zip(*shown, strict=True))
    losses = [(p.x[1:3].sin().sum() + p.end.sum()) for p in paths]
    assert agree(*(torch.autograd.grad(loss, (x, rate)) for loss in losses))


def test_reversed_processes_derivatives_in_the_drift_and_samplers():
    """Forward-mode derivatives within a step, a network in a score, a method with a plan."""
    process, shift = VP(), leaf(0.3)
    truth = gaussian(process, d=2)
    score = lambda x, t: truth(x, t) + shift * x.sin()  # noqa: E731
    grid = grids.uniform(0.9, 0.1, 12)
    flow, back = probability_flow(process, score), reverse(process, score)
    assert agree(*both(flow, start(), grid, (shift,), method=Ancestral()))
    assert agree(*both(back, start(), grid, (shift,), method=Ancestral(), noise=Keyed(0)))
    curved = SDE.of(lambda x, t: -x, lambda x, t: Diagonal(1 + shift * x.sin()))
    back = reverse(curved, lambda x, t: -x)
    assert agree(*both(back, start(), grid, (shift,), noise=Keyed(0)))


def test_parameters_are_found_and_given():
    raw = leaf(0.2)
    rate, unused = raw.exp(), leaf(1.0)
    sde = SDE.of(lambda x, t: -rate * x, Zero())
    args = (sde, start(), grids.uniform(0, 1, 9))
    truth = torch.autograd.grad(solve(*args).end.sum(), raw, retain_graph=True)
    for given in ((), (rate,), (raw,), (rate, unused)):
        end = solve(*args, engine=Adjoint(given)).end
        assert agree(torch.autograd.grad(end.sum(), raw, retain_graph=True), truth)
    module = NeuralSDE()
    assert len(Adjoint(module).parameters) == 8


def test_without_gradients_nothing_is_built():
    rate = leaf(0.2)
    args = (SDE.of(lambda x, t: -rate * x, Scale(1.0)), start(), grids.uniform(0, 1, 9))
    with torch.no_grad():
        end = solve(*args, noise=Fresh(0), engine=Adjoint()).end
        assert not end.requires_grad and torch.equal(end, solve(*args, noise=Fresh(0)).end)
    free = (SDE.of(lambda x, t: -x, Scale(1.0)), *args[1:])
    end = solve(*free, noise=Fresh(0), engine=Adjoint()).end
    assert not end.requires_grad and torch.equal(end, solve(*free, noise=Fresh(0)).end)


# --- the price


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16])
def test_states_are_found_again_as_rarely_as_can_be(slots):
    """Runs of drift against the least number for n steps and s checkpoints."""
    for n in (1, 2, 9, 40, 150):
        if slots == 1 and n > 40:
            continue
        calls, rate = [0], leaf(0.1)

        def drift(x, t, calls=calls, rate=rate):
            calls[0] += 1
            return -rate * x

        engine = Adjoint(checkpoints=slots)
        end = solve(SDE.of(drift, Zero()), start(), grids.uniform(0, 1, n), engine=engine).end
        assert calls[0] == n + 1  # one to see which tensors the step uses
        end.sum().backward()
        r = next(r for r in range(1000) if comb(slots + r, slots) >= n)
        least = r * n - comb(slots + r, r - 1) if r else 0
        last = n - (marks(0, n, slots) or [0])[-1]
        # to the end and not to the step before it; and the way to that from the last checkpoint
        assert calls[0] - (n + 1) - n <= least - (n - 1) + last - 1, (n, calls, least)
        assert calls[0] - 1 - n <= max(r, 1) * n + 1


def _live_states(steps, engine):
    """The largest number of states that are alive at a time, there and back."""
    alive, most, rate = weakref.WeakValueDictionary(), [0], leaf(0.1)

    def drift(x, t):
        alive[id(x)] = x
        most[0] = max(most[0], len(alive))
        return -rate * x

    end = solve(SDE.of(drift, Zero()), start(), grids.uniform(0, 1, steps), engine=engine).end
    end.sum().backward()
    return most[0]


def _saved(steps, engine):
    """How many numbers autograd holds for the way back."""
    held, rate = {}, leaf(0.1)
    sde = SDE.of(lambda x, t: -rate * x.sin(), lambda x, t: Scale(0.3))

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        args = (start(100), grids.uniform(0, 1, steps))
        end = solve(sde, *args, noise=Counter(0, cell=1e-3), engine=engine).end
        total = sum(held.values())
        end.sum().backward()
    return total


def test_memory_does_not_grow_with_the_number_of_steps():
    # the checkpoints, the last state and the rate
    assert max(_saved(n, Adjoint(checkpoints=8)) for n in (100, 1000)) <= 9 * 200 + 202
    assert _saved(1000, None) > 9 * _saved(100, None) > 9 * 100 * 200
    # on the way back those of the way there, and as many again
    assert max(_live_states(n, Adjoint(checkpoints=8)) for n in (100, 1000)) <= 2 * 8 + 3


def test_checkpoints_of_a_thousand_steps():
    found = marks(0, 1000, 16)
    assert len(found) == 15 and found == sorted(set(found))
    assert marks(0, 1, 16) == [] == marks(0, 9, 1) and marks(0, 3, 16) == [1, 2]


# --- use


def test_rate_and_noise_of_a_process_are_learned_from_its_moments():
    """OU at rate 1.5 and sigma 0.8: mean and variance at three times."""
    times = torch.tensor([0.25, 0.5, 1.0], dtype=F64)
    mean = 2 * torch.exp(-1.5 * times)
    variance = 0.64 / 3 * (1 - torch.exp(-3 * times))
    rate, sigma = leaf(0.5), leaf(0.3)
    sde = SDE.of(lambda x, t: -rate * x, lambda x, t: Scale(sigma))
    x, n = torch.full((1000, 1), 2.0, dtype=F64), 32
    engine, optimizer = Adjoint((rate, sigma)), torch.optim.Adam([rate, sigma], lr=0.1)
    for _ in range(60):
        path = solve(sde, x, grids.uniform(0, 1, n), Heun(), Keyed(0), keep=True, every=n // 4,
                     engine=engine)  # fmt: skip
        states = path.x[[1, 2, 4], :, 0]
        loss = (states.mean(1) - mean).square().sum() + (states.var(1) - variance).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # the standard error of sigma from 1000 variances is sigma / sqrt(2000)
    assert abs(rate.item() - 1.5) < 0.1 and abs(sigma.item() - 0.8) < 0.08, (rate, sigma)


def test_what_the_adjoint_refuses():
    rate = leaf(0.7)
    x, grid = start(), grids.uniform(0, 1, 8)
    noisy = SDE.of(lambda x, t: -rate * x, Scale(1.0))
    with pytest.raises(KakusanError, match=r"Fresh gives other numbers .*=Counter\(seed\)"):
        solve(noisy, x, grid, engine=Adjoint())
    flow = probability_flow(VP(), lambda x, t: -rate * x)
    with pytest.raises(KakusanError, match="Multistep remembers tensors; Eager"):
        solve(flow, x, grids.uniform(1, 0.1, 8), Multistep(), engine=Adjoint())
    with pytest.raises(KakusanError, match="at least one checkpoint, got 0"):
        Adjoint(checkpoints=0)
    dropout = SDE.of(lambda x, t: -rate * nn.functional.dropout(x, 0.5), Zero())
    with pytest.raises(KakusanError, match="run again, the step to t=1 leads elsewhere"):
        solve(dropout, x, grid, engine=Adjoint()).end.sum().backward()
    late = leaf(1.0)
    switch = SDE.of(lambda x, t: -(rate if t < 0.5 else late) * x, Zero())
    with pytest.raises(KakusanError, match=r"step 8 uses a tensor of shape \(\) that needs a"):
        solve(switch, x, grid, engine=Adjoint()).end.sum().backward()
    assert agree(*_switched(switch, rate, late, x, grid))
    with pytest.raises(KakusanError, match="first derivatives, .* Eager"):
        end = solve(SDE.of(lambda x, t: -rate * x, Zero()), x, grid, engine=Adjoint()).end
        torch.autograd.grad(end.sum(), rate, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        end = solve(SDE.of(lambda x, t: -rate * x, Zero()), x, grid, engine=Adjoint()).end
        with torch.no_grad():
            rate += 1
        end.sum().backward()


def _switched(sde, rate, late, x, grid):
    for engine in (Adjoint((late,)), None):
        yield torch.autograd.grad(solve(sde, x, grid, engine=engine).end.sum(), (rate, late))
