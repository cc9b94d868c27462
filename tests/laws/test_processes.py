"""Kernels and rates of the linear SDEs, against closed forms and against each other."""

import math

import pytest
import torch

from kakusan import (
    DDPM,
    EDM,
    SDE,
    VE,
    VP,
    Cosine,
    KakusanError,
    Rectified,
    Scale,
    SubVP,
    angle_grid,
    log_snr_grid,
)
from problems import F64, NAMES, PROCESSES, time, times

each = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)


@each
def test_kernel_solves_its_own_moment_equations(process):
    """alpha' = a alpha and (sigma²)' = 2 a sigma² + g², by central differences."""
    t = times(process, 9)[1:-1] + 1e-4 * (process.span[1] - process.span[0])  # off DDPM's knots
    h = 1e-6 * t
    a, g2 = process.rates(t)
    d_alpha = (process.alpha(t + h) - process.alpha(t - h)) / (2 * h)
    d_variance = (process.variance(t + h) - process.variance(t - h)) / (2 * h)
    assert torch.allclose(d_alpha, a * process.alpha(t), rtol=1e-6, atol=1e-9), process
    assert torch.allclose(d_variance, 2 * a * process.variance(t) + g2, rtol=1e-5), process


@each
def test_nothing_is_nan_at_either_end(process):
    for t in (time(0.0), time(process.span[0]), time(process.span[1])):
        x = torch.ones(2, 3, dtype=F64)
        values = [*process.rates(t), process.alpha(t), process.sigma(t), process.angle(t)]
        values += [process.drift(x, t), process.diffusion(x, t).mv(x), process.noised(x, x, t)]
        assert all(v.isfinite().all() for v in values), (process, t)
        assert (process.rates(t)[1] >= 0).all()


@each
def test_transitions_compose(process):
    r, s, t = times(process, 3)
    (f1, v1), (f2, v2), (f, v) = (process.transition(*p) for p in ((r, s), (s, t), (r, t)))
    assert torch.allclose(f1 * f2, f, rtol=1e-12), process
    assert torch.allclose(f2**2 * v1 + v2, v, rtol=1e-9), process


@each
def test_float_and_tensor_coefficients_agree(process):
    t = times(process)
    alpha, sigma = process.coefficients(t)
    for i, one in enumerate(t):
        assert process.coefficients(one) == (alpha[i].item(), sigma[i].item()), process


@each
def test_time_of_angle_inverts_angle(process):
    t = times(process)
    assert torch.allclose(process.time_of_angle(process.angle(t)), t, rtol=1e-7, atol=1e-9), (
        process
    )


@each
def test_grids_end_where_they_are_told(process):
    T = process.span[1]
    grid = angle_grid(process, T, 0.0, 7)
    assert grid[0] == T and grid[-1] == 0 and (grid.diff() < 0).all() and grid.dtype == F64
    gaps = process.angle(grid).diff()
    assert torch.allclose(gaps, gaps.mean().expand(7), rtol=1e-5), process
    grid = log_snr_grid(process, T, process.span[0], 7)
    gaps = process.angle(grid).tan().log().diff()
    assert torch.allclose(gaps, gaps.mean().expand(7), rtol=1e-4), process
    with pytest.raises(KakusanError, match="infinite"):
        log_snr_grid(process, T, 0.0, 7)


def test_vp_rates_are_minus_half_beta_and_beta():
    t = times(VP(), 33)
    a, g2 = VP().rates(t)
    beta = 0.1 + 19.9 * t
    assert torch.allclose(a, -beta / 2, rtol=1e-13) and torch.allclose(g2, beta, rtol=1e-13)


def test_closed_forms():
    t = times(VP(), 9)
    B = 0.1 * t + 0.5 * 19.9 * t**2
    assert torch.allclose(VP().alpha(t) ** 2 + VP().sigma(t) ** 2, torch.ones_like(t), rtol=1e-15)
    assert torch.allclose(SubVP().sigma(t), 1 - torch.exp(-B), rtol=1e-13)
    assert torch.allclose(
        SubVP().rates(t)[1], (0.1 + 19.9 * t) * (1 - torch.exp(-2 * B)), rtol=1e-10
    )
    s = 0.01 * (5000.0**t)
    assert torch.allclose(VE().sigma(t), (s**2 - 0.01**2).sqrt(), rtol=1e-12)
    assert torch.allclose(VE().rates(t)[1], s**2 * 2 * math.log(5000), rtol=1e-12)
    assert torch.allclose(EDM().rates(t)[1], 2 * t, rtol=1e-13)
    assert torch.allclose(Rectified().alpha(t) + Rectified().sigma(t), torch.ones_like(t))
    assert torch.allclose(Cosine().angle(t), t * math.pi / 2, rtol=1e-13)


def test_ddpm_is_vp_exactly_at_its_knots():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    process = VP.from_betas(betas)
    assert isinstance(process, DDPM)
    knots = torch.arange(1001, dtype=F64) / 1000
    factor, variance = process.transition(knots[:-1], knots[1:])
    assert (factor - (1 - betas).sqrt()).abs().max() < 1e-12
    assert (variance - betas).abs().max() < 1e-12
    assert (process.alpha(knots[1:]) ** 2 - (1 - betas).cumprod(0)).abs().max() < 1e-12
    assert torch.equal(process.knots(), knots.flip(0))
    assert len(process.knots(50)) == 51


@pytest.mark.parametrize("table", [[], [0.5, 1.0], [0.0], [-0.1], [float("nan")]])
def test_betas_outside_their_range_are_refused(table):
    with pytest.raises(KakusanError, match="strictly between 0 and 1"):
        VP.from_betas(table)


def test_sde_of_two_functions():
    sde = SDE.of(lambda x, t: -x, lambda x, t: Scale(2.0), span=(0.0, 3.0))
    x = torch.randn(4, 2, dtype=F64)
    assert sde.span == (0.0, 3.0) and sde.direction == 1
    assert torch.equal(sde.drift(x, time(0.0)), -x)
    assert (sde.gram_divergence(x, time(0.0)) == 0).all()
