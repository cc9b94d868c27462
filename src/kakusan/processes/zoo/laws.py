r"""Laws that several processes share: Gaussian kernels, and noncentral chi-square by Bessel.

The chi-square density needs log I_nu(z) for any real nu > -1, differentiable in nu and z alike.
Two forms meet where :math:`\mu = \sqrt{\nu^2 + z^2}` is 40: below, the power series; above,
Debye's uniform expansion, whose terms are polynomials in nu / mu over powers of mu. Both are good
to the last digits there, so they join smoothly.

References:
    NIST Digital Library of Mathematical Functions, 10.25 and 10.41, https://dlmf.nist.gov/10.41
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from kakusan.core.operators import NotElliptic
from kakusan.core.types import State
from kakusan.processes.zoo.parameters import Value


class Moments(NamedTuple):
    """Mean (B, d) and covariance (B, d, d) of X_t given X_0, on flattened states."""

    mean: Tensor
    covariance: Tensor


def per_coordinate(mean: Tensor, variance: Tensor, x: State) -> Moments:
    """Moments of independent coordinates, from what broadcasts to the state x."""
    mean, variance = (c.to(x).expand_as(x).flatten(1) for c in (mean, variance))
    return Moments(mean, torch.diag_embed(variance))


def total(terms: Tensor, x: State) -> Tensor:
    """The sum over all coordinates of x, (B,), of what broadcasts to x; in the dtype of x."""
    return terms.expand(torch.broadcast_shapes(terms.shape, x.shape)).flatten(1).sum(1).to(x.dtype)


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The logarithm of the normal density, in each coordinate."""
    return -0.5 * ((x - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))


def root(covariance: Tensor) -> Tensor:
    """A matrix L with L Lᵀ = covariance; triangular where the covariance has an inverse."""
    L, info = torch.linalg.cholesky_ex(covariance)
    if not info.any():
        return L
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def triangular(covariance: Tensor) -> Tensor:
    """The Cholesky factor; a law without it has no density."""
    L, info = torch.linalg.cholesky_ex(covariance)
    pivots, variance = (c.detach().diagonal(dim1=-2, dim2=-1) for c in (L, covariance))
    # rounding may leave a little of a pivot that is zero
    if info.any() or (pivots**2 <= 1e-14 * variance).any():
        raise NotElliptic(
            "the covariance of this law is singular, so it has no density: "
            "the noise does not reach every coordinate"
        )
    return L


def log_gaussian(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Log N(x; mean, covariance) for vectors (B, d), with shape (B,)."""
    L = triangular(covariance)
    u = torch.linalg.solve_triangular(L, (x - mean).unsqueeze(-1), upper=False).squeeze(-1)
    scale = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (u**2).sum(-1) - scale - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def gaussian_score(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """The gradient of `log_gaussian` in x."""
    away = (mean - x).unsqueeze(-1)
    return torch.cholesky_solve(away, triangular(covariance)).squeeze(-1)


def decayed(rate: Value, h: Tensor) -> Tensor:
    """(1 - exp(-rate h)) / rate, the integral of exp(-rate s) up to h; for any sign of the rate.

    Example:
        >>> h = torch.tensor(2.0, dtype=torch.float64)
        >>> decayed(0.0, h), decayed(0.5, h)
        (tensor(2., dtype=torch.float64), tensor(1.2642, dtype=torch.float64))
    """
    if not isinstance(rate, Tensor):
        return -torch.expm1(-rate * h) / rate if rate else h
    u = rate * h
    near = u.abs() < 1e-4
    far = torch.where(near, 1.0, u)  # a branch not taken must not spoil the gradient
    series = 1 - u / 2 * (1 - u / 3 * (1 - u / 4))
    return h * torch.where(near, series, -torch.expm1(-far) / far)


_DEGREE = 18  # 1 / 19! is below the last digit


class LinearSeries(NamedTuple):
    """The terms of `linear_kernel`, (k, d, d) each, for time in units of 1 / size."""

    size: float
    E: Tensor
    Q: Tensor


def linear_series(A: Tensor, D: Tensor) -> LinearSeries:
    """A^k / k! and L^k(D) / (k + 1)! with L(S) = A S + S Aᵀ, and A scaled to |L| <= 1."""
    size = 2 * A.detach().abs().sum(1).max().item() or 1.0
    A = A / size
    E, Q = [torch.eye(len(A), dtype=A.dtype, device=A.device)], [D]
    for k in range(1, _DEGREE + 1):
        E.append(A @ E[-1] / k)
        Q.append((A @ Q[-1] + Q[-1] @ A.mT) / (k + 1))
    return LinearSeries(size, torch.stack(E), torch.stack(Q))


def linear_kernel(series: LinearSeries, h: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor exp(A h) and covariance of dx = A x dt + G dw with D = GGᵀ, after the time h.

    .. math:: Q_h = \sum_k \frac{h^{k+1}}{(k+1)!} L^k(D), \qquad L(S) = A S + S A^\top

    over a step with |L| h <= 1, then doubled by Q_2h = Q_h + E_h Q_h E_hᵀ. Nothing grows or
    cancels, A and D need not be invertible, and where noise arrives through other coordinates its
    high powers of h are as exact as the low ones, which a block exponential drops.

    Arguments:
        series: Of A and D, both (d, d).
        h: () or (B,).
    """
    reach = series.size * h.detach().max().item()
    doublings = math.ceil(math.log2(reach)) if reach > 1 else 0
    h = h / 2**doublings
    k = torch.arange(_DEGREE + 1, dtype=h.dtype, device=h.device)
    powers = (series.size * h).unsqueeze(-1) ** k
    E = torch.einsum("...k,kij->...ij", powers, series.E)
    Q = torch.einsum("...k,kij->...ij", powers * h.unsqueeze(-1), series.Q)
    for _ in range(doublings):
        E, Q = E @ E, Q + E @ Q @ E.mT
    return E, (Q + Q.mT) / 2


def linear_steps(A: Tensor, D: Tensor, h: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor (I + h A)^n and covariance of n Euler steps of dx = A x dt + G dw with D = GGᵀ.

    .. math:: Q = \sum_{j < n} (I + h A)^j \, h D \, (I + h A)^{j \top}

    by squaring, in as many products as n has binary digits.

    Arguments:
        A: (d, d).
        D: (d, d).
        h: Their length, () or (B,).
        n: Whole numbers, () or (B,).
    """
    e, q = torch.eye(len(A)).to(A) + h[..., None, None] * A, h[..., None, None] * D
    E, Q = torch.eye(len(A)).to(A).expand_as(e), torch.zeros_like(q)
    while n.any():
        odd = (n % 2 == 1)[..., None, None]
        E, Q = torch.where(odd, e @ E, E), torch.where(odd, e @ Q @ e.mT + q, Q)
        e, q, n = e @ e, e @ q @ e.mT + q, n // 2
    return E, (Q + Q.mT) / 2


def lyapunov(A: Tensor, D: Tensor) -> Tensor:
    """The solution S of A S + S Aᵀ + D = 0, for a stable A."""
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    S = torch.linalg.solve(torch.kron(A, eye) + torch.kron(eye, A), -D.flatten())
    S = S.reshape(A.shape)
    return (S + S.mT) / 2


# --- Bessel ---------------------------------------------------------------------------------

_TERMS, _SEAM, _ORDER = 64, 40.0, 10  # of the series, of mu, of Debye's expansion


@functools.lru_cache(maxsize=1)
def _debye() -> tuple[tuple[float, ...], ...]:
    """c[k][m] with U_k(p) = Σ_m c[k][m] p^(k + 2m), by the recurrence DLMF 10.41.9."""
    u = {0: Fraction(1)}
    rows = []
    for k in range(_ORDER + 1):
        rows.append(tuple(float(u.get(k + 2 * m, 0)) for m in range(_ORDER + 1)))
        new: dict[int, Fraction] = {}
        for n, c in u.items():
            # p²(1 - p²) U'/2, and the integral of (1 - 5p²) U over eight
            for power, term in (
                (n + 1, c * Fraction(n, 2) + c / (8 * (n + 1))),
                (n + 3, -c * Fraction(n, 2) - 5 * c / (8 * (n + 3))),
            ):
                new[power] = new.get(power, Fraction(0)) + term
        u = new
    return tuple(rows)


def _series(nu: Tensor, w: Tensor) -> Tensor:
    """Log Σ_j w^j / (j! Γ(j + nu + 1)), for w up to 400."""
    j = torch.arange(_TERMS, dtype=w.dtype, device=w.device)
    # 0 log 0 must read as 0
    powers = j * w.clamp(min=1e-300).log().unsqueeze(-1)
    nu = nu.unsqueeze(-1)
    return (powers - torch.lgamma(j + 1) - torch.lgamma(j + nu + 1)).logsumexp(-1)


def _log_debye_sum(nu: Tensor, mu: Tensor) -> Tensor:
    """Log Σ_k U_k(nu / mu) / nu^k: a sum of (nu / mu)^2m / mu^k, for mu of at least 40."""
    k = torch.arange(_ORDER + 1, dtype=mu.dtype, device=mu.device)
    c = torch.tensor(_debye(), dtype=mu.dtype, device=mu.device)
    q = ((nu / mu) ** 2).unsqueeze(-1) ** k
    r = (1 / mu).unsqueeze(-1) ** k
    return ((r @ c) * q).sum(-1).log()


def log_bessel(nu: Value, w: Tensor) -> Tensor:
    r"""Log Σ_j w^j / (j! Γ(j + nu + 1)), for nu > -1 and w >= 0, in float64.

    With z = 2√w this is log I_nu(z) - nu log(z / 2), and unlike these it is regular at z = 0. Its
    derivative in w is exp(log_bessel(nu + 1, w) - log_bessel(nu, w)).

    Example:
        >>> z = torch.tensor(2.0, dtype=torch.float64)
        >>> log_bessel(0.0, z**2 / 4).exp()  # I_0(2)
        tensor(2.2796, dtype=torch.float64)
    """
    order = torch.as_tensor(nu, dtype=w.dtype, device=w.device)
    n, w = torch.broadcast_tensors(order, w)
    far = n**2 + 4 * w > _SEAM**2
    # a branch not taken must not spoil the gradient
    near = _series(n, torch.where(far, 1.0, w))
    w = torch.where(far, w, _SEAM**2)
    mu = (n**2 + 4 * w).sqrt()
    out = mu - n * ((n + mu) / 2).log() - 0.5 * (2 * math.pi * mu).log()
    return torch.where(far, out + _log_debye_sum(n, mu), near)


def log_chi_square(y: Tensor, df: Value, shift: Tensor) -> Tensor:
    """The log-density of the noncentral chi-square law, at y > 0; float64.

    It is a mixture over j ~ Poisson(shift / 2) of chi-square laws with df + 2j degrees of freedom:
    the series of I_nu with nu = df / 2 - 1. Differentiable in all three, at shift = 0 as well.

    Arguments:
        y: Where.
        df: Degrees of freedom, > 0.
        shift: The noncentrality, >= 0.

    Example:
        >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> log_chi_square(y, 2.0, torch.zeros_like(y))  # exponential
        tensor([-1.1931, -1.6931], dtype=torch.float64)
    """
    nu = torch.as_tensor(df, dtype=y.dtype, device=y.device) / 2 - 1
    nu, y, shift = torch.broadcast_tensors(nu, y, shift)
    far = nu**2 + shift * y > _SEAM**2
    w = torch.where(far, 1.0, shift * y / 4)
    near = _series(nu, w) + nu * (y / 2).log() - (y + shift) / 2
    mu = torch.where(far, nu**2 + shift * y, _SEAM**2).sqrt()
    # mu - (y + shift) / 2 without cancelling what may be millions
    out = (nu**2 - (y - shift) ** 2 / 4) / (mu + (y + shift) / 2)
    out = out + nu * (y / (nu + mu)).log() - 0.5 * (2 * math.pi * mu).log()
    return torch.where(far, out + _log_debye_sum(nu, mu), near) - math.log(2)
