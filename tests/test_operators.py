import math

import pytest
import torch

from kakusan import Dense, Diagonal, NotElliptic, Scale, Zero

F64 = torch.float64
B, D = 5, 3


def _operators():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=F64)  # noqa: E731
    return {
        "scale": Scale(1.7),
        "scale per sample": Scale(r(B)),
        "diagonal": Diagonal(r(B, D)),
        "dense": Dense(r(D, D)),
        "dense per sample": Dense(r(B, D, D)),
        "dense m < d": Dense(r(B, D, 2)),
        "dense m > d": Dense(r(B, D, 4)),
    }


def _matrix(op, m):
    """G as (B, d, m), column by column."""
    columns = torch.eye(m, dtype=F64)
    return torch.stack([op.mv(c.expand(B, m)) for c in columns], -1)


@pytest.mark.parametrize("name", _operators())
def test_each_form_is_the_matrix_it_says(name):
    op = _operators()[name]
    x = torch.randn(B, D, dtype=F64)
    m = op.noise_shape(x)[1]
    G = _matrix(op, m)
    z = torch.randn(B, m, dtype=F64)
    assert torch.allclose(op.mv(z), (G @ z[..., None])[..., 0], atol=1e-13), name
    assert torch.allclose(op.tmv(x), (G.mT @ x[..., None])[..., 0], atol=1e-13), name
    assert torch.allclose(op.gram(x), (G @ G.mT @ x[..., None])[..., 0], atol=1e-13), name
    assert torch.allclose(op.scaled(0.3).mv(z), 0.3 * op.mv(z), atol=1e-13), name
    if m == D:
        solved = torch.linalg.solve(G.mT, z[..., None])[..., 0]
        assert torch.allclose(op.tsolve(z), solved, atol=1e-10), name
        assert torch.allclose(op.logabsdet(x), torch.linalg.slogdet(G).logabsdet), name
    else:
        with pytest.raises(NotElliptic, match=f"{D} x {m}"):
            op.tsolve(z)


def test_scale_and_diagonal_act_on_states_of_any_shape():
    x = torch.randn(4, 2, 3, 3)
    assert torch.allclose(Scale(torch.arange(4.0)).mv(x), torch.arange(4.0).view(4, 1, 1, 1) * x)
    assert torch.allclose(Diagonal(x).mv(x), x * x)


def test_zero_is_deterministic_and_has_no_inverse():
    x = torch.randn(B, D)
    assert Zero().deterministic and not Scale(1.0).deterministic
    assert (Zero().gram(x) == 0).all() and (Zero().logabsdet(x) == -math.inf).all()
    with pytest.raises(NotElliptic, match="no noise"):
        Zero().tsolve(x)


def test_singular_operators_are_refused():
    with pytest.raises(NotElliptic, match="zero"):
        Scale(0.0).tsolve(torch.ones(1, 2))
    with pytest.raises(NotElliptic, match="singular for 2 of 2"):
        Dense(torch.zeros(2, 2)).tsolve(torch.ones(2, 2))
