"""Compiled steps give what eager steps give, and fall back in words where they cannot."""

import warnings

import numpy as np
import pytest
import torch

from kakusan import (
    SDE,
    SRK,
    Compiled,
    Counter,
    CounterWithArea,
    Dense,
    Diagonal,
    EulerMaruyama,
    Fresh,
    KakusanError,
    Milstein,
    Scale,
    WeakSecond,
    Zero,
    reverse,
    solve,
)
from kakusan.core import grids
from kakusan.solvers import compiled
from kakusan.solvers.columns import Batch, Columns, NoColumns, cells, tidied

F64 = torch.float64


def _dense(x, t):
    a, b = x[:, 0], x[:, 1]
    top = torch.stack([1 + 0.1 * torch.sin(b), 0.3 * a * torch.cos(t)], -1)
    return Dense(torch.stack([top, torch.stack([0.2 * b, 1 + 0.1 * torch.cos(a)], -1)], -2))


SWIRL = SDE.of(lambda x, t: -x, _dense)
PROCESSES = {
    "diagonal": SDE.of(lambda x, t: 0.4 * x, lambda x, t: Diagonal(0.6 * x)),
    "dense": SWIRL,
    "constant": SDE.of(lambda x, t: -x / (1 + (x**2).sum(1, keepdim=True)),
                       Dense(torch.tensor([[1.0, 0.5, 0.1], [0.0, 2.0, 0.3]], dtype=F64))),
    "reversed, with its divergence": reverse(SWIRL, lambda x, t: -x),
    "ode": SDE.of(lambda x, t: torch.sin(t) * x, Zero()),
}  # fmt: skip


@pytest.fixture
def _plain_backend(monkeypatch):
    """Runs the chained graph as it is: what the compiler makes of it is tested once below."""
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, example, options: graph)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    compiled._PROGRAMS.clear()
    yield
    compiled._PROGRAMS.clear()


def _agree(sde, method, noise, every=3, **kind):
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    a, b = sde.span
    grid = grids.uniform(a + (b - a) * 3 / 32, b, 29)  # the first chunk starts late, one is left
    one = solve(sde, x, grid, method, noise, keep=True, every=every)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        many = solve(sde, x, grid, method, noise, keep=True, every=every, engine=Compiled(**kind))
        end = solve(sde, x, grid, method, noise, engine=Compiled(**kind)).end
    assert torch.allclose(one.x, many.x, atol=1e-12), (method, noise)
    assert torch.allclose(end, one.end, atol=1e-12), (method, noise)
    if one.dw is not None:
        assert torch.allclose(one.dw, many.dw, atol=1e-12), (method, noise)


@pytest.mark.parametrize("columns", [0, 8])
@pytest.mark.parametrize("noise", [Counter(3, cell=1 / 32), Counter(3, cell=0.3), Fresh(3)])
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.usefixtures("_plain_backend")
def test_chunks_equal_steps(name, noise, columns):
    _agree(PROCESSES[name], EulerMaruyama(), noise, chunk=4, columns=columns)


@pytest.mark.parametrize("method", [Milstein(), SRK(), WeakSecond()])
@pytest.mark.usefixtures("_plain_backend")
def test_every_kind_of_noise_reaches_the_chunk(method):
    _agree(PROCESSES["diagonal"], method, CounterWithArea(3, cell=1 / 32), chunk=4)


def test_the_compiler_agrees_too():
    sde, noise = PROCESSES["diagonal"], Counter(3, cell=1 / 8)
    x, grid = torch.linspace(0.5, 2, 40)[:, None], grids.uniform(0, 1, 8)
    many = solve(sde, x, grid, noise=noise, engine=Compiled(2)).end
    assert compiled._PROGRAMS
    assert torch.allclose(many, solve(sde, x, grid, noise=noise).end, rtol=1e-5)


def test_a_changed_parameter_is_seen():
    """A process is traced by each solve: no stale code."""
    x, grid = torch.ones(4, 1, dtype=F64), grids.uniform(0, 1, 8)
    rate = [1.0]
    sde = SDE.of(lambda x, t: -rate[0] * x, Zero())
    before = solve(sde, x, grid, engine=Compiled(2)).end
    rate[0] = 2.0
    after = solve(sde, x, grid, engine=Compiled(2)).end
    assert torch.allclose(before, torch.full_like(x, (1 - 1 / 8) ** 8))
    assert torch.allclose(after, torch.full_like(x, (1 - 2 / 8) ** 8))


def _filled(x, t):
    out = torch.zeros_like(x)
    out[:, 0], out[:, 1] = -x[:, 1], x[:, 0]
    return out


TRICKY = {
    "filled in place": _filled,
    "samples against coordinates": lambda x, t: (
        (x[:, 0] - x[:, :1]).sin().mean(1, keepdim=True) + x
    ),
    "sums of booleans": lambda x, t: x * (x > 0).sum(1, keepdim=True),
    "means in another precision": lambda x, t: x.mean(1, True, dtype=torch.float64) * x,
}


@pytest.mark.parametrize("name", TRICKY)
@pytest.mark.usefixtures("_plain_backend")
def test_what_columns_cannot_say_is_still_right(name):
    _agree(SDE.of(TRICKY[name], Scale(0.5)), EulerMaruyama(), Fresh(3), chunk=4)


@pytest.mark.usefixtures("_plain_backend")
def test_values_that_a_trace_cannot_see_are_found_out():
    table = SDE.of(lambda x, t: x * float(np.interp(t.numpy(), [0, 1], [0, 5])), Zero())
    x, grid = torch.ones(4, 1, dtype=F64), grids.uniform(0, 1, 16)
    compiled._SAID.clear()
    with pytest.warns(UserWarning, match="does not repeat it elsewhere"):
        end = solve(table, x, grid, engine=Compiled(4)).end
    assert torch.equal(end, solve(table, x, grid).end)


def test_parameters_that_ask_for_gradients_get_them():
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    sde, x = SDE.of(lambda x, t: -rate * x, Zero()), torch.ones(4, 1, dtype=F64)
    compiled._SAID.clear()
    with pytest.warns(UserWarning, match="parameters ask for gradients"):
        solve(sde, x, grids.uniform(0, 1, 16), engine=Compiled(4)).end.sum().backward()
    assert rate.grad is not None


@pytest.mark.usefixtures("_plain_backend")
def test_what_cannot_be_compiled_runs_and_says_so_once():
    peeking = SDE.of(lambda x, t: x if x.sum().item() > 0 else -x, Scale(1.0))
    x, grid = torch.ones(4, 1, dtype=F64), grids.uniform(0, 1, 8)
    compiled._SAID.clear()
    with pytest.warns(UserWarning, match="cannot be compiled .*one by one"):
        end = solve(peeking, x, grid, noise=Fresh(0), engine=Compiled(2)).end
    assert torch.equal(end, solve(peeking, x, grid, noise=Fresh(0)).end)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        solve(peeking, x, grid, noise=Fresh(0), engine=Compiled(2))


def test_no_compiler_is_no_obstacle(monkeypatch):
    import torch._inductor

    def missing(*_, **__):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch._inductor, "compile", missing)
    compiled._PROGRAMS.clear()
    compiled._SAID.clear()
    sde, x, grid = PROCESSES["diagonal"], torch.ones(4, 1), grids.uniform(0, 1, 8)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found"):
        end = solve(sde, x, grid, noise=Fresh(0), engine=Compiled(2)).end
    assert torch.equal(end, solve(sde, x, grid, noise=Fresh(0)).end)


def test_gradients_are_left_to_eager():
    compiled._SAID.clear()
    x = torch.ones(4, 1, dtype=F64, requires_grad=True)
    with pytest.warns(UserWarning, match="computes no gradients"):
        solve(
            PROCESSES["diagonal"], x, grids.uniform(0, 1, 8), engine=Compiled(2)
        ).end.sum().backward()
    assert x.grad is not None


def test_failures_name_the_path_as_with_eager():
    sde = SDE.of(lambda x, t: x**3, Scale(0.1))
    x = torch.tensor([[0.0], [9.0]], dtype=F64)
    with pytest.raises(KakusanError, match=r"path 1 of 2 is no longer finite at t=.*TamedEuler"):
        solve(sde, x, grids.uniform(0, 8, 16), noise=Counter(0, cell=0.5), engine=Compiled(2))


def test_a_chunk_is_a_power_of_two():
    with pytest.raises(KakusanError, match="power of two of steps, got 6"):
        Compiled(chunk=6)


STEPS = {
    "indexing": lambda x: x[:, 1:] * x[:, :1] + x[..., 0, None],
    "stacking": lambda x: torch.stack([x[:, 0], x[:, 1] ** 2], -1),
    "products": lambda x: (x @ torch.arange(6.0).reshape(2, 3)).sum(-1, True) * x.mean(1)[:, None],
    "shapes": lambda x: x.reshape(-1, 1, 2).mT.expand(-1, 2, 3).permute(0, 2, 1).sum(1),
    "joining": lambda x: torch.cat([x, torch.zeros_like(x)], 1).split(2, 1)[0] + torch.ones(2),
    "matrices": lambda x: torch.bmm(x[:, :, None], x[:, None, :]).sum(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_columns_compute_what_tensors_do(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(5, 2)
    graph = tidied(make_fx(STEPS[name])(x))
    found = Columns(graph, 5).run(Batch(cells(x))).tensor(5)
    assert torch.allclose(found, STEPS[name](x), atol=1e-6)


@pytest.mark.parametrize("mixing", [lambda x: x.sum(0), lambda x: x[1:], lambda x: x.T @ x])
def test_columns_refuse_to_mix_samples(mixing):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(5, 2)
    with pytest.raises(NoColumns):
        Columns(tidied(make_fx(mixing)(x)), 5).run(Batch(cells(x)))
