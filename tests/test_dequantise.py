"""Laws of dequantisation: offsets stay in their cell and fill it, and the bound is one."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from kakusan.core.noise import Keyed
from kakusan.core.types import as_time
from kakusan.errors import KakusanError, UsageError
from kakusan.inference.dequantise import (
    AsIs,
    Uniform,
    Variational,
    importance_weighted,
    log_weights,
)
from kakusan.inference.offsets import DenoisingBound, fit_variational
from kakusan.models.denoiser import Denoiser
from kakusan.models.score import ExactMixture
from kakusan.processes.linear import EDM, VE, VP
from kakusan.training import data as kd
from kakusan.training import files
from kakusan.training.data import as_data, codec_from_json
from kakusan.training.data.codecs import FloatImageCodec, whole_cells
from kakusan.training.data.columns import Category, Number, TableCodec

RNG = np.random.default_rng(0)
CELL = 0.5


def bent(shape, seed=0, scale=1.0):
    """A variational law far from uniform, as fitting might leave it; float64."""
    torch.manual_seed(seed)
    q = Variational.for_shape(shape, 16).double()
    with torch.no_grad():
        for w in q.parameters():
            w.add_(scale * torch.randn_like(w) / max(1, w[0].numel()) ** 0.5)
    return q.requires_grad_(False)


def laws(shape):
    return [Uniform(), Variational.for_shape(shape, 16), bent(shape), bent(shape, 1, 4.0)]


# --- offsets and cells --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 16, 255, 65535])
def test_offsets_stay_strictly_inside_and_decode_to_the_integers(dtype, levels):
    codec = kd.PixelCodec((1, 16, 16), levels)
    raw = RNG.integers(0, levels + 1, (64, 1, 16, 16))
    x = codec.encode(raw).to(dtype)
    with torch.no_grad():
        for q in laws(codec.shape):
            y = q(x, codec.cells, Keyed(1))
            assert y.x.dtype == dtype and y.log_q.isfinite().all() and (y.x != x).any()
            assert ((y.x - x).abs().double() < codec.cells / 2).all(), q
            assert (codec.decode(y.x) == raw).all(), (q, levels)


def test_the_last_offsets_of_a_cell_are_kept_off_its_edges():
    class Ends(Keyed):
        def uniform(self, step, shape, like):
            u = torch.rand(shape, dtype=like.dtype)
            ends = torch.tensor([0.0, 1 - torch.finfo(like.dtype).eps / 2], dtype=like.dtype)
            return torch.where(torch.rand(shape) < 0.5, ends[0], ends[1]) + 0 * u

    codec = kd.PixelCodec((1, 16, 16), 255)
    raw = np.arange(256).reshape(1, 1, 16, 16)
    x = codec.encode(raw)
    with torch.no_grad():
        for q in laws(codec.shape):
            y = q(x, codec.cells, Ends(0))
            assert ((y.x - x).abs().double() < codec.cells / 2).all() and y.log_q.isfinite().all()
            assert (codec.decode(y.x) == raw).all(), q


def test_uniform_offsets_are_uniform_and_reals_stay():
    cells = torch.tensor([0.25, 0.0, 2.0], dtype=torch.float64)
    x = torch.tensor([-1.0, 0.3, 1.0], dtype=torch.float64).expand(20000, 3)
    fresh = Variational.for_shape((3,), 8).double()
    for q in (Uniform(), fresh):
        y = q(x, cells, Keyed(3))
        u = (y.x - x).detach() / torch.where(cells > 0, cells, 1.0) + 0.5
        for i in (0, 2):
            assert stats.kstest(u[:, i].numpy(), "uniform").pvalue > 1e-3, q
        assert torch.equal(y.x[:, 1], x[:, 1]), q
        assert torch.allclose(y.log_q, torch.tensor(-math.log(0.5)).double(), atol=1e-7), q
    offsets = [Uniform()(x, cells, Keyed(3), j).x for j in (0, 1)]
    assert (offsets[0][:, 0] != offsets[1][:, 0]).all(), "each draw has offsets of its own"


def test_a_new_variational_law_is_the_uniform_one():
    for shape in ((5,), (2, 3), (3, 6, 5)):
        x = torch.randn(8, *shape)
        cells = torch.rand(shape).double() + 0.1
        with torch.no_grad():
            a, b = (q(x, cells, Keyed(2)) for q in (Uniform(), Variational.for_shape(shape, 8)))
        assert torch.allclose(a.x, b.x, atol=1e-6) and torch.allclose(a.log_q, b.log_q, atol=1e-4)


class Fixed(torch.nn.Module):
    """The same mu and s at every x."""

    def __init__(self, mu, s):
        super().__init__()
        self.mu, self.s = mu, s

    def forward(self, x):
        return torch.full_like(x, self.mu), torch.full_like(x, self.s)


@pytest.mark.parametrize("mu, s", [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.4), (0.3, -3.0)])
def test_the_variational_density_integrates_to_one_and_is_that_of_its_draws(mu, s):
    q, cells = Variational(Fixed(mu, s)), torch.tensor([0.5, 0.0], dtype=torch.float64)
    x = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    # nodes dense at both edges, where the density may be steep: u = c (sigma(a) - 1/2)
    a = torch.linspace(-32, 32, 100001, dtype=torch.float64)
    u = torch.stack([0.5 * 0.5 * torch.tanh(a / 2), torch.zeros_like(a)], 1)
    f = q.log_density(u, x.expand(len(a), 2), cells).exp()
    slope = 0.5 * torch.sigmoid(a) * torch.sigmoid(-a)
    assert abs(torch.trapezoid(f * slope, a) - 1) < 1e-6
    many = x.expand(5000, 2)
    y = q(many, cells, Keyed(4))
    inner = (y.x - x)[:, 0].abs() < 0.2499
    again = q.log_density(y.x - x, many, cells)
    assert inner.sum() > 1000 and torch.allclose(again[inner], y.log_q[inner], atol=1e-6)
    # the draws follow that density: their distribution function is uniform on them
    v = (y.x[:, 0] - 0.4) / 0.5 + 0.5
    mu, s = (p[0, 0] for p in q.parameters_at(x))
    assert (
        stats.kstest(torch.sigmoid((torch.logit(v) - mu) / s.exp()).numpy(), "uniform")[1] > 0.01
    )


def test_a_sample_has_the_same_offset_in_any_batch():
    x, cells = torch.randn(150, 3), torch.tensor([0.5, 0.0, 1.0])
    with torch.no_grad():
        for q in laws((3,)):
            whole = q(x, cells, Keyed(7), 2)
            for lo, hi in ((0, 10), (60, 130), (149, 150)):
                part = q(x[lo:hi], cells, Keyed(7, lo), 2)
                assert torch.allclose(part.x, whole.x[lo:hi], atol=1e-6), q
                assert torch.allclose(part.log_q, whole.log_q[lo:hi], atol=1e-5), q
    first = Uniform()(x[60:], cells, Keyed(7, 60))
    assert torch.equal(first.x, Uniform()(x, cells, Keyed(7)).x[60:])


def test_cells_too_narrow_for_the_dtype_collapse_to_their_middle():
    x = torch.full((4, 1), 3.0)
    y = Uniform()(x, torch.tensor([1e-8]), Keyed(0))
    assert torch.equal(y.x, x) and torch.allclose(y.log_q, -torch.tensor(1e-8).double().log())


def test_as_is_changes_nothing():
    x = torch.randn(3, 2)
    y = AsIs()(x, torch.ones(2), Keyed(0))
    assert torch.equal(y.x, x) and (y.log_q == 0).all()


def test_cells_that_do_not_fit_are_refused():
    x = torch.zeros(2, 3)
    for q in (Uniform(), AsIs(), Variational.for_shape((3,), 4)):
        with pytest.raises(KakusanError, match=r"\(3,\); got \(2,\)"):
            q(x, torch.ones(2), Keyed(0))
        with pytest.raises(KakusanError, match="finite widths"):
            q(x, torch.tensor([1.0, -1.0, 0.0]), Keyed(0))


# --- the codecs ---------------------------------------------------------------------------------

CODECS = [
    (kd.PixelCodec((1, 2, 2), 16), RNG.integers(0, 16, (3, 1, 2, 2))),
    (FloatImageCodec((1, 2, 2), -3.0, 5.0), RNG.random((3, 1, 2, 2))),
    (kd.VectorCodec((2,), (1.0, 40.0), (3.0, 0.25)), RNG.random((3, 2))),
    (kd.VectorCodec((2,), (1.0, 40.0), (3.0, 7.0), True), RNG.integers(-9, 9, (3, 2))),
]


@pytest.mark.parametrize("codec, raw", CODECS)
def test_units_are_the_slope_of_encode(codec, raw):
    slope = (codec.encode(raw + 1) - codec.encode(raw)).double()
    assert torch.allclose(slope, codec.units.expand_as(slope), rtol=1e-5, atol=3e-5), codec
    assert codec.units.dtype == codec.cells.dtype == torch.float64
    assert torch.equal(codec.cells, codec.units * codec.whole)
    assert bool(codec.whole.any()) == np.issubdtype(raw.dtype, np.integer), codec


def test_units_of_a_table_and_one_hot_cells_that_do_not_meet():
    number, real = Number("n", "int64", 2.0, 4.0), Number("r", "double", 0.0, 0.5)
    codec = TableCodec((number, real, Category("c", "string", ("a", "b", "c"))))
    table = pa.table({"n": [1, 5, 6], "r": [0.5, 1.5, 2.5], "c": ["a", "b", "c"]})
    moved = pa.table({"n": [2, 6, 7], "r": [1.5, 2.5, 3.5], "c": ["a", "b", "c"]})
    x = codec.encode(table)
    slope = (codec.encode(moved) - x)[:, :2].double()
    assert torch.allclose(slope, codec.units[:2].expand_as(slope), atol=1e-6)
    assert codec.whole.tolist() == [True, False, True, True, True]
    x = x.repeat(2000, 1)
    for q in (Uniform(), bent((5,))):
        with torch.no_grad():
            y = q(x, codec.cells, Keyed(5)).x
        assert torch.equal(y[:, 2:] > 0, x[:, 2:] > 0), "a level's cell reaches over zero"
        back, rows = codec.decode(y), codec.decode(x)
        assert back["n"] == rows["n"] and back["c"] == rows["c"]


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool", "uint16"])
def test_integer_vectors_are_whole_and_come_back_as_integers(dtype):
    raw = RNG.integers(0, 2 if dtype == "bool" else 100, (40, 3)).astype(dtype)
    codec = as_data(raw, test_fraction=0.25).codec
    assert codec.integer and codec.whole.all() and codec.cells.shape == (3,)
    back = codec.decode(Uniform()(codec.encode(raw), codec.cells, Keyed(0)).x)
    assert back.dtype == np.int64 and (back == raw).all()
    assert codec_from_json(json.loads(json.dumps(codec.to_json()))) == codec
    real = as_data(raw.astype(np.float32), test_fraction=0.25).codec
    assert not real.integer and not real.whole.any() and real.layout == codec.layout
    assert codec.decode(torch.full((1, 3), 1e30)).min() > 0, "wrapped around"


def test_large_integers_survive():
    raw = 10**9 + RNG.integers(-8 * 10**6, 8 * 10**6, (500, 2))
    codec = as_data(raw).codec
    assert (codec.decode(codec.encode(raw)) == raw).all()


def test_a_record_from_before_integer_vectors_still_loads():
    old = {"form": "vectors", "original": [2], "mean": [1.0, 2.0], "std": [3.0, 4.0]}
    codec = codec_from_json(old)
    assert codec.decode(torch.zeros(1, 2)).dtype == np.float32 and not codec.whole.any()


def test_nothing_whole_is_refused_in_a_sentence():
    with pytest.raises(UsageError, match=r"vectors of shape \(2,\) hold none"):
        whole_cells(CODECS[2][0])
    assert torch.equal(whole_cells(CODECS[3][0]), CODECS[3][0].cells)


# --- the bound ----------------------------------------------------------------------------------


def mixture(process):
    weights, means = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-1.2], [0.1], [1.1]])
    return ExactMixture(process, weights, means, torch.tensor([0.04, 0.01, 0.2])[:, None, None])


def log_density(y):
    return mixture(VP()).log_prob(y, as_time(0.0))


def integers(n):
    """Whole numbers drawn from the mixture, at their model values."""
    x = mixture(VP()).sample(n, torch.Generator().manual_seed(0))
    return (x / CELL).round() * CELL


def log_mass(x):
    """Log P(k), the exact integral of the mixture over each cell."""
    p = mixture(VP())
    m, s = p.means.squeeze(1), p.values.squeeze(1).sqrt()
    upper, lower = (torch.special.ndtr((x + h - m) / s) for h in (CELL / 2, -CELL / 2))
    return (p.weights * (upper - lower)).sum(1).log()


CELLS = torch.tensor([CELL], dtype=torch.float64)


def gap(q, x):
    """The mean of log P(k) less the bound, and its standard error."""
    with torch.no_grad():
        d = log_mass(x) - log_weights(log_density, q, x, CELLS, Keyed(9))[0]
    return d.mean().item(), (d.std() / len(d) ** 0.5).item()


def test_the_masses_are_right_by_quadrature():
    k = torch.arange(-4, 5, dtype=torch.float64)[:, None] * CELL
    u = torch.linspace(-0.5, 0.5, 4001, dtype=torch.float64) * CELL
    p = log_density((k + u).reshape(-1, 1)).exp().reshape(9, -1)
    assert torch.allclose(torch.trapezoid(p, u).log(), log_mass(k), atol=1e-5)


def test_each_cell_is_bounded_by_its_mass():
    for k in (-2, 0, 1, 3):
        x = torch.full((4000, 1), k * CELL, dtype=torch.float64)
        for q in (Uniform(), bent((1,)), bent((1,), 1, 2.0)):
            mean, error = gap(q, x)
            assert mean > -4 * error, (q, k)


def test_a_fitted_law_closes_most_of_the_gap():
    process, x = VP(), integers(4000)
    ticks = []
    q = fit_variational(
        process, mixture(process), x, CELLS, steps=200, lr=1e-2, seed=1,
        tick=lambda step, text: ticks.append((step, text)),
    )  # fmt: skip
    (plain, _), (fitted, error) = gap(Uniform(), x), gap(q, x)
    # measured: 0.48 nats of a uniform offset become 0.08 to 0.10, and 0.02 after 1000 steps
    assert -4 * error < fitted < plain / 4, (plain, fitted, error)
    assert ticks[-1][0] == 200 and "nats" in ticks[-1][1]


@pytest.mark.parametrize("process", [VP(), VE(0.01, 30.0), EDM()])
def test_the_denoising_bound_is_an_equality_for_an_exact_score(process):
    p, x = mixture(process), mixture(process).sample(20000, torch.Generator().manual_seed(3))
    bound = DenoisingBound(process, p)(x, 0, 0)
    t0 = as_time(process.span[0])
    truth = p.log_prob(process.noised(x, torch.randn_like(x), t0), t0)
    d = bound - truth
    assert d.mean().abs() < 4 * d.std() / len(d) ** 0.5, (process, d.mean())


def test_the_denoising_bound_has_the_gradient_of_the_log_density():
    process = VP(span=(0.05, 1.0))
    p, n, t0 = mixture(process), 100000, as_time(0.05)
    x = torch.full((n, 1), 0.4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(DenoisingBound(process, p)(x, 0, 0).sum(), x)
    # it speaks of x noised to t0: its gradient is alpha times the mean score there
    y = process.noised(x.detach(), torch.randn_like(g), t0)
    smooth = process.alpha(t0) * p(y, t0)
    error = (g.var() / n + smooth.var() / n).sqrt()
    assert (g.mean() - smooth.mean()).abs() < 4 * error, (g.mean(), smooth.mean(), error)


def test_more_draws_raise_the_bound_to_the_mass():
    x = integers(1000)
    with torch.no_grad():
        log_w = log_weights(log_density, Uniform(), x, CELLS, Keyed(2), 64)
    values = [importance_weighted(log_w[:K]).value.mean() for K in (1, 4, 16, 64)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False)), values
    k = torch.full((8, 1), 2 * CELL, dtype=torch.float64)
    with torch.no_grad():
        many = log_weights(log_density, Uniform(), k, CELLS, Keyed(3), 1024)
    value, error = importance_weighted(many)
    assert ((value - log_mass(k)).abs() < 4 * error).all() and (error < 0.1).all()


def test_the_standard_error_of_the_weighted_bound_is_its_spread():
    g = torch.Generator().manual_seed(0)
    log_w = 0.5 * torch.randn(64, 4000, generator=g, dtype=torch.float64)
    value, error = importance_weighted(log_w)
    assert abs(error.square().mean().sqrt() / value.std() - 1) < 0.05
    # and the value lies low by half its square
    bias = value.mean() - 0.125
    assert abs(bias + error.square().mean() / 2) < 4 * value.std() / 4000**0.5
    assert torch.allclose(importance_weighted(log_w + 1e4).value, value + 1e4, atol=1e-9)
    assert importance_weighted(log_w[:1]).std_error.isinf().all()
    with pytest.raises(KakusanError, match="draws"):
        importance_weighted(log_w[0])


# --- fitting ------------------------------------------------------------------------------------


def test_fitting_is_a_function_of_the_seed_and_leaves_the_model_alone():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    model = Denoiser(lambda x, t, label: net(x), VP())
    model.inner = net
    x, cells = torch.randn(50, 2).round(), torch.ones(2)

    def once(seed):
        q = fit_variational(VP(), model.score, x, cells, steps=4, seed=seed)
        return torch.cat([w.detach().flatten() for w in q.parameters()])

    before = torch.random.get_rng_state()
    a = once(0)
    assert torch.equal(torch.random.get_rng_state(), before), "the user's numbers moved"
    torch.rand(3)
    assert torch.equal(a, once(0)) and not torch.equal(a, once(1))
    assert all(w.grad is None and w.requires_grad for w in model.parameters())


def test_fitting_goes_on_with_a_law_and_takes_batches_of_any_source():
    shape = (1, 4, 4)
    cells = torch.full(shape, 0.25)
    q = Variational.for_shape(shape, 8)
    seen = []

    def rows(step):
        seen.append(step)
        return torch.zeros(6, *shape)

    score = ExactImage()
    assert fit_variational(VP(), score, rows, cells, q=q, steps=5) is q and seen == [*range(5)]


class ExactImage:
    """The score of standard normal images."""

    def __call__(self, x, t):
        return -x


def test_what_cannot_be_fitted_is_refused():
    x = torch.zeros(8, 2)
    with pytest.raises(KakusanError, match="no coordinate"):
        fit_variational(VP(), ExactImage(), x, torch.zeros(2), steps=1)
    with pytest.raises(KakusanError, match="bound of the dequantiser is nan by step 2"):
        fit_variational(VP(), lambda x, t: x * torch.nan, x, torch.ones(2), steps=2)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 5, 4)])
def test_a_law_is_written_down_and_read_again(tmp_path, shape):
    q = bent(shape).float()
    files.write_json(tmp_path / "q.json", q.to_json())
    files.write_tensors(tmp_path / "q.safetensors", q.state_dict())
    again = Variational.from_json(files.read_json(tmp_path / "q.json"))
    again.load_state_dict(files.read_tensors(tmp_path / "q.safetensors"))
    x, cells = torch.randn(4, *shape), torch.ones(shape)
    with torch.no_grad():
        a, b = (p(x, cells, Keyed(0)) for p in (q, again))
    assert torch.equal(a.x, b.x) and torch.equal(a.log_q, b.log_q)
    for record in ({"shape": [2]}, {"shape": 2, "width": 3}, {"shape": [2], "width": "x"}):
        with pytest.raises(KakusanError, match="damaged"):
            Variational.from_json(record)
    with pytest.raises(KakusanError, match="Linear cannot be written"):
        Variational(torch.nn.Linear(2, 2)).to_json()
