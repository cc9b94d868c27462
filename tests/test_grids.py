import math

import pytest
import torch

from kakusan import KakusanError, grids

F64 = torch.float64
KINDS = [grids.uniform, grids.power, grids.quadratic, grids.cosine]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.002, 80.0), (0.7, 0.1)])
def test_grids_hit_both_ends_and_go_one_way(kind, start, end):
    grid = kind(start, end, 13)
    assert grid.shape == (14,) and grid.dtype == F64
    assert grid[0].item() == start and grid[-1].item() == end
    assert (grid.diff() * (end - start) > 0).all(), kind


def test_grids_are_even_in_their_own_coordinate():
    """Second differences vanish in t, t^(1/rho) and arccos(1 - 2u)."""
    flat = {"rtol": 0, "atol": 1e-12}
    assert torch.allclose(grids.uniform(0, 3, 9).diff(n=2), torch.zeros(8, dtype=F64), **flat)
    for rho in (2.0, 7.0):
        even = grids.power(80.0, 0.002, 9, rho) ** (1 / rho)
        assert torch.allclose(even.diff(n=2), torch.zeros(8, dtype=F64), **flat)
    assert torch.equal(grids.quadratic(1.0, 0.0, 9), grids.power(1.0, 0.0, 9, rho=2.0))
    turned = torch.arccos(1 - 2 * grids.cosine(0.0, 1.0, 9)) / math.pi
    assert torch.allclose(turned, torch.linspace(0, 1, 10, dtype=F64), **flat)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_of_no_steps_is_refused(kind):
    with pytest.raises(KakusanError, match="at least one step, got n=0"):
        kind(1.0, 0.0, 0)
    with pytest.raises(KakusanError, match="times >= 0"):
        grids.power(-1.0, 1.0, 4)
