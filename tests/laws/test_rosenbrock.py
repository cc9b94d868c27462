"""Gaussian steps of weak order 2: densities against grids, moments against exact ones."""

import math

import pytest
import torch

import kakusan as kk
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from kakusan.solvers.rosenbrock import RosenbrockSteps


def crossing(kind: type[EulerSteps], v: float, n: int) -> tuple[float, float]:
    """P(X_1 = -1 | X_0 = 1) and its slope, by the kernels of the chain on a grid."""
    steps = kind(kk.DoubleWell(v=v), kk.grids.uniform(0.0, 1.0, n))
    x = torch.linspace(-2.6, 2.6, 1041, dtype=torch.float64)
    m = steps.mean(x[:, None], 0)[:, 0]
    z = steps.operator(x[:, None], 0).mv(torch.ones_like(x)[:, None])[:, 0] * steps.h(0) ** 0.5
    K = torch.exp(-((x - m[:, None]) ** 2) / (2 * z[:, None] ** 2)) / (z[:, None] * math.tau**0.5)
    h, dx, one = K[:, 320], x[1] - x[0], 720
    for _ in range(n - 1):
        h = K @ h * dx
    slope = (h[one + 1].log() - h[one - 1].log()) / (2 * dx)
    return h[one].item(), slope.item()


# from a finite-volume generator on 2,001 cells
@pytest.mark.parametrize(
    ("v", "p", "slope"), [(1.0, 6.7044e-2, -1.0463), (5.0, 4.9775e-4, -0.3565)]
)
def test_crossings_of_a_double_well_in_few_steps(v, p, slope):
    density, found = crossing(RosenbrockSteps, v, 200)
    assert abs(density / p - 1) < 0.025 and abs(found / slope - 1) < 0.02
    plain = crossing(EulerSteps, v, 200)[1]
    assert abs(plain / slope - 1) > 0.03


def test_weak_order_two():
    exact, errors = crossing(RosenbrockSteps, 2.0, 800)[0], []
    for n in (50, 100):
        errors.append(abs(crossing(RosenbrockSteps, 2.0, n)[0] - exact))
    # the rate of densities nears 2 from below: the pinned end sees one Gaussian step
    assert math.log2(errors[0] / errors[1]) > 1.2


def moments(steps: GaussianSteps, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of a linear chain from x (1, d)."""
    m, C = x, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    for k in range(len(steps)):
        J = torch.func.jacrev(lambda y, k=k: steps.mean(y[None], k)[0])(m[0])
        G = steps.operator(m, k).G[0]
        m, C = steps.mean(m, k), J @ C @ J.mT + steps.h(k) * G @ G.mT
    return m, C


def test_linear_processes_have_exact_means_and_covariances_of_order_two():
    A = torch.tensor([[1.0, 0.7], [-0.4, 2.0]], dtype=torch.float64)
    G = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=torch.float64)
    ou = kk.OrnsteinUhlenbeck(rate=A, sigma=G, mean=[0.3, -0.2])
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    want, errors = ou.moments(x, 1.0), []
    for n in (10, 20):
        m, C = moments(RosenbrockSteps(ou, kk.grids.uniform(0.0, 1.0, n)), x)
        assert torch.allclose(m, want.mean, atol=1e-12)
        errors.append((C - want.covariance[0]).abs().max().item())
    assert 1.85 < math.log2(errors[0] / errors[1]) < 2.15


def test_drifts_that_depend_on_time():
    """dX = t dt: the mean of a step is x + (s² - t²) / 2."""
    sde = kk.SDE.of(lambda x, t: torch.ones_like(x) * t.to(x), kk.Scale(1.0))
    steps = RosenbrockSteps(sde, torch.tensor([0.2, 0.7]))
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert math.isclose(steps.mean(x, 0).item(), (0.49 - 0.04) / 2, abs_tol=1e-7)


def test_noise_that_depends_on_the_state_is_refused():
    steps = RosenbrockSteps(kk.GeometricBrownian(), kk.grids.uniform(0.0, 1.0, 5))
    with pytest.raises(kk.KakusanError, match="does not depend on the state"):
        steps.operator(torch.ones(2, 1, dtype=torch.float64), 0)
