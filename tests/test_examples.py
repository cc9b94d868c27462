"""The worked examples run, shortened, and what they claim holds."""

import importlib.util
from pathlib import Path

import pytest
import torch

import kakusan as kk
from kakusan.inference.likelihood import decode, encode, log_prob

SHORT = {"steps": 80, "batch": 64, "rk4_steps": 5}


def example(name):
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ode():
    return example("neural_ode")


@pytest.fixture(scope="module")
def flows(ode):
    """Trained for a moment, without the penalty and with a strong one."""
    torch.set_num_threads(1)
    return {weight: ode.train(weight, **SHORT)[0] for weight in (0.0, 1.0)}


def test_the_densities_integrate_to_one(ode, flows):
    """That of the data and that of a flow: a sum over a mesh is exact to the tails."""
    side, reach = 80, 4.5
    h = 2 * reach / (side - 1)
    line = torch.linspace(-reach, reach, side)
    true = ode.ring_log_prob(torch.cartesian_prod(line, line)).exp().sum() * h**2
    assert abs(true - 1) < 1e-6
    assert abs(ode.density(flows[0.0], side, reach).sum() * h**2 - 1) < 2e-3


def test_the_likelihood_approaches_that_of_the_data_and_stays_below(ode, flows):
    """The mean of log p_data - log p is KL(data ‖ flow): not negative, and it falls."""
    before = ode.judge(ode.flow_of(ode.Velocity()), n=1000).missing
    after = ode.judge(flows[0.0], n=1000).missing
    assert after.mean() > -4 * after.std() / len(after) ** 0.5
    fall = before - after
    assert fall.mean() > 0.5 * before.mean() + 4 * fall.std() / len(fall) ** 0.5


def test_the_law_of_the_ring_is_that_of_its_samples(ode):
    """Eight Gaussians far apart have the entropy of one, and log 8."""
    found = ode.ring_log_prob(ode.ring(20_000, seed=3))
    entropy = torch.tensor(8 * 2 * torch.pi * torch.e * ode.STD**2).log()
    assert abs(found.mean() + entropy) < 4 * found.std() / len(found) ** 0.5


def test_straight_paths_need_the_least_energy_and_the_penalty_nears_it(ode, flows):
    """Jensen: ∫ |v|² dt >= |x_1 - x_0|², with equality for constant velocity."""
    free, held = (ode.judge(flow, n=500) for flow in flows.values())
    for found in (free, held):
        assert (found.energy >= found.straight - 1e-3).all()
    fall = free.energy - held.energy
    assert fall.mean() > 4 * fall.std() / len(fall) ** 0.5


def test_samples_and_codes_are_one_map(ode, flows):
    with torch.no_grad():
        x = ode.ring(100, seed=1)
        assert torch.allclose(decode(flows[0.0], encode(flows[0.0], x)), x, atol=1e-3)


def test_adjoint_gives_the_gradients_of_eager(ode):
    torch.manual_seed(0)
    net, x, grid = ode.Velocity(8).double(), ode.ring(5, 0).double(), kk.grids.uniform(0.0, 1.0, 4)
    for p in net.parameters():  # away from the start, where everything is small
        torch.nn.init.normal_(p, std=0.5)
    found = []
    for engine in (kk.Eager(), kk.Adjoint(net, checkpoints=2)):
        one = log_prob(ode.flow_of(net), x, grid=grid, engine=engine, energy=True)
        loss = (0.1 * one.energy - one.value).mean()
        found.append((loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_neural_ode_runs_from_its_command_line(ode, tmp_path, capsys):
    found = ode.main(["--steps", "2", "--out", str(tmp_path / "flow.png")])
    assert len(found) == 2 and (tmp_path / "flow.png").stat().st_size > 10_000
    assert "missing to the true one" in capsys.readouterr().out
