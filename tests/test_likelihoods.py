"""The doors of the likelihood: units and masses against closed forms, and the verb's sentences.

Most models here are exact: a network that is the angular velocity of N(m, s²) data, so that every
number a door returns is known.
"""

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import kakusan.inference.likelihood
from kakusan import DiffusionModel, KakusanError, UsageError, densities, judging
from kakusan.cli import _run
from kakusan.core.trace import ExactTrace, Hutchinson
from kakusan.inference.dequantise import Uniform
from kakusan.models.denoiser import Denoiser
from kakusan.processes.linear import EDM, VP, Cosine
from kakusan.training import files
from kakusan.training.config import DataConfig, configure
from kakusan.training.data import PixelCodec, VectorCodec, as_data, load, rows_of
from kakusan.training.data.columns import Category, Number, TableCodec

S = 0.6  # the standard deviation of the exact models, in model units


class Exactly(torch.nn.Module):
    """The velocity of N(m, s²) data, where m is 0 without label; asked, it counts."""

    def __init__(self, s, means=()):
        super().__init__()
        self.s, self.asked = s, 0
        self.means = torch.nn.Parameter(torch.tensor([*means, 0.0]))

    def forward(self, x, level, label=None):
        self.asked += 1
        phi = (level * math.pi / 2).to(x.dtype)
        phi, s = phi.reshape(phi.shape + (1,) * (x.ndim - phi.ndim)), self.s
        m = 0.0 if label is None else self.means[label].reshape(-1, *(1,) * (x.ndim - 1))
        q = (phi.cos() ** 2 / s**2 + phi.sin() ** 2).sqrt()
        return phi.sin() / q * (phi.cos() * (1 / s - s) * x - m * q**2)


def exact(codec, s=S, process=None, means=(), **settings):
    """A whole model whose law is known: N(0, s²) in model units, N(m, s²) given a class."""
    net = Denoiser(Exactly(s, means), process or Cosine(), "v", s).eval()
    names = tuple("abcdef"[: len(means)]) or None
    shares = tuple(1 / len(means) for _ in means) or None
    return DiffusionModel(configure(base=settings), net, codec, names, shares)


def normal(x, m=0.0, s=S):
    """Log N(x; m, s²), summed over all but the first axis, in float64."""
    z = (x.double() - m) / s
    return (-0.5 * z**2 - math.log(s) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def log_masses(x, cells):
    """Log of the mass of N(0, s²) in the cell around each entry of x."""
    up, down = (torch.special.ndtr((x.double() + h * cells) / S) for h in (0.5, -0.5))
    return (up - down).log()


def close(a, b, atol):
    return torch.allclose(a.double(), b.double(), rtol=0, atol=atol)


REALS = VectorCodec((2,), (10.0, -3.0), (4.0, 0.25))
WHOLE = VectorCodec((2,), (10.0, -3.0), (4.0, 2.0), True)
PIXELS = PixelCodec((1, 2, 2), 8)
TABLE = TableCodec(
    (
        Number("n", "int64", 2.0, 4.0),
        Number("r", "double", 1.0, 0.5),
        Category("c", "string", ("a", "b", "c")),
    )
)


def drawn(codec, n, seed=0):
    """Samples of N(0, s²), as the data of a codec would be: rounded where those are whole."""
    x = S * torch.randn(n, *codec.shape, generator=torch.Generator().manual_seed(seed))
    return codec.encode(codec.decode(x)) if codec.whole.any() else x


# --- units and masses -------------------------------------------------------------------------


@pytest.mark.parametrize("process", [Cosine(), VP(), EDM()])
def test_real_vectors_have_the_density_of_their_own_units(process):
    x = drawn(REALS, 40)
    found = exact(REALS, process=process).log_prob(x, tolerance=1e-6)
    # raw values are x std + mean: a density is divided by every std
    truth = normal(x) - math.log(4.0 * 0.25)
    assert close(found.value, truth, 5e-3), (process, found.value - truth)
    assert found.how == "ODE, exact trace" and (found.std_error == 0).all()
    assert found.solver_error.mean() < 1e-3 and found.prior_gap.mean() < 1e-2
    bits = found.bits_per_dim
    assert abs(bits.value + truth.mean().item() / (2 * math.log(2))) < 5e-3 and bits.n == 40
    # the same data in other units: grams for kilograms take log 1000 a dimension from a density
    grams = VectorCodec((2,), (1e4, -3e3), (4e3, 250.0))
    other = exact(grams, process=process).log_prob(x, tolerance=1e-6)
    assert close(found.value - other.value, torch.full((40,), 2 * math.log(1000)), 1e-5)


@pytest.mark.parametrize("codec", [WHOLE, PIXELS, TABLE])
def test_whole_numbers_have_masses_and_uniform_noise_bounds_them(codec):
    model, x = exact(codec), drawn(codec, 300)
    whole, log_unit = codec.whole, codec.units[~codec.whole].log().sum()
    each = torch.where(whole, log_masses(x, codec.cells), 0.0)
    reals = x[:, ~whole] if (~whole).any() else torch.zeros(len(x), 1)
    truth = each.flatten(1).sum(1) + (normal(reals) if (~whole).any() else 0) + log_unit
    found = model.log_prob(x, dequantise="uniform", trace=ExactTrace())
    gap = truth - found.value
    # the bound holds in the mean over offsets, and one offset may lie above
    assert -4 * gap.std() / len(gap) ** 0.5 < gap.mean(), (codec, gap.mean())
    # what it loses is KL(uniform || p in the cell), known from moments: c² / 24 s² an entry at 0
    spread = Uniform()(x, codec.cells, densities.Keyed(0, 0, densities.CELLS), 0)
    bare = normal(spread.x) - spread.log_q + log_unit
    assert close(found.value, bare, 5e-3), codec
    assert "uniform dequantisation" in found.how and found.d == math.prod(codec.shape)


def test_bits_of_pixels_by_hand():
    codec = PixelCodec((1, 1, 1), 255)
    x = codec.encode(np.array([[[[128]]], [[[10]]]], np.uint8))
    found = exact(codec).log_prob(x, dequantise="uniform", tolerance=1e-6)
    # a cell is 2/255 wide, and the density hardly changes over it
    truth = normal(x) + math.log(2 / 255)
    assert close(found.value, truth, 0.02)
    assert abs(found.bits_per_dim.value + truth.mean().item() / math.log(2)) < 0.02


def test_bare_points_have_the_density_of_raw_numbers():
    x = drawn(WHOLE, 20)
    found = exact(WHOLE).log_prob(x, dequantise="none", tolerance=1e-6)
    assert close(found.value, normal(x) - math.log(8.0), 5e-3)
    # samples between the lattice points are given as they are, and none is asked to choose
    y = S * torch.randn(20, 2)
    assert close(exact(WHOLE).log_prob(y, tolerance=1e-6).value, normal(y) - math.log(8.0), 5e-3)


def test_the_choice_comes_from_training_and_is_asked_for_otherwise():
    x = drawn(PIXELS, 5)
    with pytest.raises(UsageError, match="whole numbers, which have no density; choose"):
        exact(PIXELS).log_prob(x)
    trained = exact(PIXELS, data={"dequantise": "uniform"})
    asked = exact(PIXELS).log_prob(x, dequantise="uniform")
    assert torch.equal(trained.log_prob(x).value, asked.value)
    y = x + 0.03
    assert trained.log_prob(y).how == "ODE, exact trace"
    assert trained.elbo(y).value.isfinite().all()
    for choice, said in (
        ("unifrom", "'uniform', 'variational' or 'none', not 'unifrom'"),
        ("uniform", "use 'none', or round them"),
    ):
        with pytest.raises(UsageError, match=said):
            trained.log_prob(y, dequantise=choice)
    with pytest.raises(UsageError, match="for whole numbers, and these data have none"):
        exact(REALS).log_prob(drawn(REALS, 3), dequantise="uniform")


def test_labels_by_name_index_list_and_tensor():
    model, x = exact(REALS, means=(-0.5, 0.7)), drawn(REALS, 12)
    options = {"tolerance": 1e-5}
    # the units of REALS cancel; a mean leaves a trace in the prior, which knows none
    for name, index, m in (("a", 0, -0.5), ("b", 1, 0.7)):
        found = model.log_prob(x, label=name, **options).value
        assert close(found, normal(x, m), 2e-2), name
        assert torch.equal(found, model.log_prob(x, label=index, **options).value)
    each = model.log_prob(x, label=torch.arange(12) % 2, batch=5, **options).value
    m = torch.tensor([-0.5, 0.7]).repeat(6)[:, None]
    assert close(each, normal(x, m), 2e-2)
    assert torch.equal(each, model.log_prob(x, label=["a", "b"] * 6, batch=5, **options).value)
    assert close(model.log_prob(x, **options).value, normal(x), 5e-3)
    z = model.encode(x, label="b")
    assert close(z, (x - 0.7) / S, 1e-2) and close(model.decode(z, label="b"), x, 1e-3)
    for label, said in (
        ("z", "no class 'z'"), (2, "no class 2"), (torch.zeros(3).long(), r"12 samples.*\(12,\)"),
        (torch.zeros(12), "float32"), (torch.full((12,), 2), "from 0 to 1"), (["a"], r"\(12,\)"),
    ):  # fmt: skip
        for door in (model.log_prob, model.elbo, model.encode, model.decode):
            with pytest.raises(UsageError, match=said):
                door(x, label=label)
    with pytest.raises(UsageError, match="without labels"):
        exact(REALS).log_prob(x, label=torch.zeros(12).long())
    with pytest.raises(UsageError, match="no sample without label.*one of a, b"):
        exact(REALS, means=(0, 1), model={"label_dropout": 0.0}).log_prob(x)


def test_sample_i_is_the_same_in_any_batch_and_number():
    model, x = exact(PIXELS), drawn(PIXELS, 30)
    options = {"dequantise": "uniform", "trace": Hutchinson(2), "seed": 3}
    whole = model.log_prob(x, **options)
    bound = model.elbo(x, seed=3)
    for n, batch in ((30, 7), (11, 128), (1, 1)):
        part = model.log_prob(x[:n], batch=batch, **options)
        assert close(part.value, whole.value[:n], 1e-4), (n, batch)
        assert close(part.std_error, whole.std_error[:n], 1e-4)
        assert close(model.elbo(x[:n], seed=3, batch=batch).value, bound.value[:n], 1e-4)
    other = model.log_prob(x, **{**options, "seed": 4})
    assert not close(other.value, whole.value, 1e-2)


def test_samples_of_another_kind_are_refused_in_a_sentence():
    model, x = exact(REALS), drawn(REALS, 4)
    hole = x.clone()
    hole[2, 1] = torch.nan
    for bad, said in (
        (torch.zeros(4, 3), r"\(4, 3\) do not fit this model: \(n, 2\)"),
        (torch.zeros(0, 2), "there is no sample"),
        (torch.zeros(4, 2).long(), "not torch.int64: codec.encode"),
        (np.zeros((4, 2)), "not ndarray"),
        (hole, "sample 2 of the data is not finite"),
    ):
        for door in (model.log_prob, model.elbo, model.encode, model.decode):
            with pytest.raises(UsageError, match=said):
                door(bad)
    for options in ({"tolerance": 0.0}, {"tolerance": -1e-3}, {"batch": 0}):
        with pytest.raises(UsageError, match="must be positive"):
            model.log_prob(x, **options)
    for options in ({"steps": 1}, {"steps": 0}, {"times": 0}, {"batch": 0}):
        with pytest.raises(KakusanError, match="at least|batches of 0"):
            model.elbo(x, **options)
    assert model.log_prob(x.double()).value.isfinite().all()


# --- the bound --------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [REALS, TABLE])
def test_the_bound_of_an_exact_model_is_its_likelihood(codec):
    model, x = exact(codec, data={"dequantise": "uniform"}), drawn(codec, 1500)
    below = model.elbo(x, times=16).value
    flow = model.log_prob(x, batch=1500, tolerance=1e-5).value
    d = flow - below
    error = d.std() / len(d) ** 0.5
    # the decoder of the least noise loses little: 1e-3 nats a dimension
    assert -4 * error < d.mean() < 4 * error + 5e-3 * flow.shape[0] / 1500, (codec, d.mean())


def test_the_bound_of_whole_numbers_is_below_their_mass():
    for codec in (PIXELS, WHOLE, TABLE):
        x = drawn(codec, 600)
        each = torch.where(codec.whole, log_masses(x, codec.cells), 0.0).flatten(1).sum(1)
        reals = x[:, ~codec.whole]
        truth = each + codec.units[~codec.whole].log().sum()
        truth = truth + (normal(reals) if reals.numel() else 0)
        d = truth - exact(codec).elbo(x).value
        assert d.mean() > -4 * d.std() / len(d) ** 0.5, (codec, d.mean())


def test_a_chain_tends_to_the_likelihood_as_its_steps_become_fine():
    model, x = exact(REALS), drawn(REALS, 4000)
    flow = model.log_prob(x, batch=4000).value
    gaps = [flow - model.elbo(x, steps=T, batch=4000).value for T in (3, 10, 100)]
    means = [d.mean().item() for d in gaps]
    error = gaps[2].std().item() / 4000**0.5
    assert means[0] > means[1] > means[2] > -4 * error, (means, error)
    assert means[0] > 5 * error and means[2] < 4 * error, (means, error)


# --- codes ------------------------------------------------------------------------------------


def test_codes_are_normal_and_lead_back():
    model, x = exact(REALS), drawn(REALS, 600)
    z = model.encode(x)
    assert close(z, x / S, 2e-2), "the flow of a normal law is a scaling"
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5 + 0.02
    assert close(model.decode(z), x, 1e-3)
    between = model.interpolate(x[:5], x[5:10], 6)
    assert between.shape == (6, 5, 2)
    assert close(between[0], x[:5], 1e-3) and close(between[-1], x[5:10], 1e-3)
    with pytest.raises(UsageError, match="do not fit"):
        model.interpolate(torch.zeros(3, 5), torch.zeros(3, 5))


# --- evaluate ---------------------------------------------------------------------------------


def judged(codec_of, n=80, **settings):
    g = np.random.default_rng(0)
    data = as_data(codec_of(g.normal(size=(n, 2))), test_fraction=0.25)
    model = exact(data.codec, s=1.0, **settings)
    model.data = data
    return model


def test_evaluate_tells_bits_in_two_ways_with_floors():
    model = judged(lambda x: 5 * x)
    found = model.evaluate(steps=3, likelihoods=40)
    flow, below = (found.metrics[f"bits_per_dim_{k}"] for k in ("flow", "bound"))
    x = model.data.test.batch(torch.arange(20))[0]
    truth = -(normal(x, s=1.0) - sum(map(math.log, model.codec.std))).mean() / (2 * math.log(2))
    assert abs(flow.value - truth) < 5e-3 and flow.n == 20 and flow.std_error > 0
    assert abs(below.value - flow.value) < 0.5 and below.floor != flow.floor
    assert "bits per dim flow" in str(found) and "exact trace" in flow.features
    json.dumps(found.to_json(), allow_nan=False)
    asked = model.denoiser.net.asked
    without = model.evaluate(steps=3, likelihoods=0)
    assert not [k for k in without.metrics if k.startswith("bits")]
    assert model.denoiser.net.asked - asked < 50
    for bad in (1, -3):
        with pytest.raises(UsageError, match="2 points or more, or 0"):
            model.evaluate(likelihoods=bad)


def test_samples_of_a_dequantised_model_are_judged_rounded():
    def whole(x):
        return (3 * x).round().astype(int)

    plain, spread = judged(whole), judged(whole, data={"dequantise": "uniform"})
    on = [densities.on_lattice(m.evaluate(steps=3).samples, m.codec) for m in (plain, spread)]
    assert on == [False, True]
    # real columns stay as they are
    x = S * torch.randn(9, 5)
    y = densities.rounded(x, TABLE)
    assert torch.equal(y[:, 1], x[:, 1]) and densities.on_lattice(y, TABLE)


def test_a_flow_that_fails_costs_the_bits_and_nothing_else(monkeypatch):
    def broken(*_, **__):
        raise KakusanError("the steps do not get there")

    model = judged(lambda x: x)
    monkeypatch.setattr(kakusan.inference.likelihood, "log_prob", broken)
    with pytest.warns(UserWarning, match="no bits per dimension: in the samples from number 0"):
        found = model.evaluate(steps=3)
    assert "energy_distance" in found.metrics and "bits_per_dim_flow" not in found.metrics


# --- rows of other data -------------------------------------------------------------------------


def test_rows_of_other_files_are_read_as_the_run_would(tmp_path):
    g = np.random.default_rng(0)
    dark, bright = (g.integers(0, top, (4, 6, 6), dtype=np.uint8) for top in (17, 200))
    np.savez(tmp_path / "dark.npz", x=dark)
    np.save(tmp_path / "bright.npy", bright)
    np.save(tmp_path / "bits.npy", bright > 100)
    # the size of pictures is the run's: it means nothing to a file of numbers
    run = DataConfig(source="pictures", size=6, fit="resize", limit=2)
    part, name = rows_of(run, str(tmp_path / "dark.npz"), 0, PixelCodec((1, 6, 6), 16))
    x = part.batch(torch.arange(4))[0]
    assert (
        name == "dark"
        and len(part) == 4
        and (PixelCodec((1, 6, 6), 16).decode(x)[:, 0] == dark).all()
    )
    part, _ = rows_of(run, str(tmp_path / "bright.npy"), 0, PixelCodec((1, 6, 6), 16))
    with pytest.raises(KakusanError, match="expected 0 to 16"):
        part.batch(torch.arange(4))
    with pytest.raises(KakusanError, match="from 0 to 255, but .* from 0 to 1"):
        rows_of(run, str(tmp_path / "bits.npy"), 0, PixelCodec((1, 6, 6), 255))
    x = TABLE.encode(pa.table({"n": [1, 2], "r": [0.5, 1.5], "c": ["a", "b"]}))
    assert densities.on_lattice(x, TABLE) and not densities.on_lattice(x + 0.2, TABLE)


# --- the verb ---------------------------------------------------------------------------------

TINY = ["model.width=16", "model.attention=0", "train.batch=16", "train.steps=4",
        "train.warmup=1", "train.precision=float32", "train.layout=contiguous"]  # fmt: skip
FAST = ["--tolerance", "0.01"]


@pytest.fixture
def kakusan_(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = _run([str(w) for w in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a few steps: digits with labels, reals, and a table of a number and a category."""
    folder = tmp_path_factory.mktemp("likelihoods")
    g = np.random.default_rng(0)
    np.save(folder / "points.npy", g.normal(size=(60, 2)))
    rows = [f"{g.normal():.3f},{g.integers(0, 9)},{g.choice(['a', 'b'])}" for _ in range(60)]
    (folder / "rows.csv").write_text("\n".join(["height,count,kind", *rows]) + "\n")
    for data in ("digits", folder / "points.npy", folder / "rows.csv"):
        name = str(data).split("/")[-1].split(".")[0]
        words = ["train", "-q", "--data", str(data), "--out", str(folder / name), *TINY]
        assert _run(words) == 0
    return folder


def read(path):
    with open(path) as handle:
        return list(csv.DictReader(handle))


def test_held_out_rows_are_written_as_the_python_door_finds_them(kakusan_, runs):
    code, out, err = kakusan_("likelihood", runs / "points")
    assert code == 0, err
    assert "nats" in out and "bits a dimension" in out and "prior gap" in out
    rows = read(runs / "points" / "likelihood" / "held-out.csv")
    model = DiffusionModel.load(runs / "points")
    x, name = model.rows()
    assert name == "held-out" and len(rows) == len(x) == 9
    found = model.log_prob(x, tolerance=1e-3)
    # samples of a higher precision than the network's are brought to that
    assert torch.equal(found.value, model.log_prob(x.double(), tolerance=1e-3).value)
    assert (
        model.elbo(x.double()).value.shape == (9,)
        and model.encode(x.double()).dtype == x.double().dtype
    )
    columns = ("log_prob", "probe_std_error", "solver_error", "prior_gap")
    kept = (found.value, found.std_error, found.solver_error, found.prior_gap)
    for key, values in zip(columns, kept, strict=True):
        assert np.allclose([float(r[key]) for r in rows], values.numpy(), rtol=1e-6), key
    bits = -found.value / (2 * math.log(2))
    assert np.allclose([float(r["bits_per_dim"]) for r in rows], bits.numpy(), rtol=1e-6)
    assert [r["row"] for r in rows] == list(map(str, range(9)))
    Image.open(runs / "points" / "likelihood" / "held-out.png").load()


def test_a_file_stands_beside_held_out_data(kakusan_, runs, tmp_path):
    np.save(tmp_path / "far.npy", 30 + np.random.default_rng(1).normal(size=(5, 2)))
    code, out, err = kakusan_(
        "likelihood", runs / "points", "far.npy", "--json", "--out", "a/b.csv"
    )
    said = json.loads(out)
    assert code == 0 and said["n"] == said["asked"] == 5 and said["held_out"]["n"] == 5, err
    assert said["told_apart"]["value"] == 1.0 and 0 < said["told_apart"]["std_error"] < 0.1
    assert said["bits_per_dim"] > said["held_out"]["bits_per_dim"]
    assert len(read("a/b.csv")) == 5 and said["rows"] == "a/b.csv"
    assert Image.open("a/b.png").size[0] > 300
    code, out, _ = kakusan_("likelihood", runs / "points", "far.npy", "-n", 2, "--beside", 0)
    assert code == 0 and "held-out" not in out
    assert len(read(runs / "points" / "likelihood" / "far.csv")) == 2


def test_held_out_data_that_are_lost_are_done_without(kakusan_, runs, tmp_path):
    model = DiffusionModel.fit(torch.randn(40, 2), train={"steps": 1, "batch": 8}, quiet=True)
    model.save(tmp_path / "run")
    np.save("x.npy", np.zeros((3, 2)))
    with pytest.warns(UserWarning, match="no held-out data beside: this model was trained on an"):
        code, out, err = kakusan_("likelihood", "run", "x.npy", *FAST)
    assert code == 0 and "likelier" not in out, err
    code, _, err = kakusan_("likelihood", "run")
    assert code == 2 and "give it again" in err


def test_digits_by_the_verb(kakusan_, runs, tmp_path):
    """Held-out digits, samples of the model in a file of bytes, a class, and other data."""
    run = runs / "digits"
    options = ["--dequantise", "uniform", "--beside", 8, *FAST]
    code, out, err = kakusan_("likelihood", run, "-n", 5, *options)
    assert code == 0 and "2 probes, uniform dequantisation" in out, err
    assert kakusan_("sample", run, "-n", 6, "--steps", 2, "--out", "x.npz")[0] == 0
    code, out, err = kakusan_("likelihood", run, "x.npz", "--label", "3", "--probes", 1, *options)
    assert code == 0 and "a held-out sample is the likelier of a pair" in out, err
    assert "1 probe," in out and "probes unknown" in out
    code, out, err = kakusan_(
        "likelihood", run, "x.npz", "--probes", 0, "-n", 1, *options, "--beside", 0
    )
    assert code == 0 and "exact trace" in out, err
    code, out, err = kakusan_("likelihood", run, "digits", "-n", 3, "--json", *options)
    assert code == 0 and json.loads(out)["n"] == 3, err


def test_tables_by_the_verb(kakusan_, runs, tmp_path):
    run = runs / "rows"
    code, out, err = kakusan_("likelihood", run, "--dequantise", "uniform")
    assert code == 0 and "exact trace, uniform" in out, err
    (tmp_path / "new.csv").write_text("height,count,kind\n0.5,3,a\n-0.1,4,b\n")
    code, out, err = kakusan_("likelihood", run, "new.csv", "--dequantise", "uniform")
    assert code == 0 and len(read(run / "likelihood" / "new.csv")) == 2, err
    (tmp_path / "level.csv").write_text("height,count,kind\n0.5,3,a\n-0.1,4,z\n")
    code, _, err = kakusan_("likelihood", run, "level.csv", "--dequantise", "uniform")
    assert code == 1 and err.count("\n") == 1, err


def test_every_mistake_is_a_sentence(kakusan_, runs, tmp_path):
    points, digits, rows = (runs / name for name in ("points", "digits", "rows"))
    u = ("--dequantise", "uniform")
    g = np.random.default_rng(0)
    np.save("bright.npy", g.integers(100, 255, (4, 8, 8), dtype=np.uint8))
    np.save("large.npy", g.integers(0, 16, (4, 9, 9), dtype=np.uint8))
    np.save("wide.npy", g.normal(size=(4, 3)))
    np.save("none.npy", np.zeros((0, 2)))
    hole = g.normal(size=(4, 2))
    hole[1, 0] = np.nan
    np.save("hole.npy", hole)
    np.save("ok.npy", g.normal(size=(4, 2)))
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "fine.csv").write_text("height,count,kind\n0.1,3,a\n")
    (tmp_path / "black.csv").write_text("height,count,kind\n0.1,3,c\n")
    (tmp_path / "file").write_text("")
    for code, words, said in (
        (2, (digits,), "whole numbers, which have no density; choose a dequantisation: uniform"),
        (2, (points, *u), "dequantise='uniform' is for whole numbers"),
        (2, (digits, "--dequantise", "unifrom"), "'uniform', 'variational' or 'none'"),
        (2, (points, "--dequantise", "unifrom"), "'uniform', 'variational' or 'none'"),
        (1, (points, "wide.npy"), "vectors of shape (2,), but wide.npy holds vectors of"),
        (1, (digits, "large.npy", *u), "from 0 to 16, but large.npy holds images of shape (1, 9"),
        (1, (digits, "bright.npy", *u), "expected 0 to 16"),
        (1, (digits, "t.csv", *u), "the model was trained on images"),
        (1, (points, "digits"), "the model was trained on vectors"),
        (1, (points, "hole.npy"), "row 1"),
        (1, (points, "none.npy"), "empty"),
        (1, (points, "no.npy"), "there is no file or folder no.npy"),
        (2, (points, "digts"), "did you mean 'digits'?"),
        (1, ("runs/none",), "there is no run folder runs/none"),
        (1, (tmp_path,), "is no run folder"),
        (2, (points, "-n", 0), "must be at least 1, got 0"),
        (2, (points, "--tolerance", 0), "must be positive, got 128 and 0.0"),
        (2, (points, "--tolerance", -0.1), "must be positive"),
        (2, (points, "--batch", 0), "must be positive, got 0"),
        (2, (points, "--probes", -1), "--probes is how many, or 0"),
        (2, (points, "--out", "x.txt"), "written as .csv, not x.txt"),
        (1, (points, "--out", "file/x.csv"), "cannot write file/x.csv"),
        (2, (points, "--label", "a"), "trained without labels"),
        (2, (digits, "--label", "11", *u), "no class '11'; this model knows 0, 1"),
        (1, (rows, "black.csv", *u), "column 'kind' holds 'c', which is none of the 2 levels"),
        (1, (rows, "t.csv", *u), "but t.csv holds tables with the columns a (int64)"),
        (2, (rows, "fine.csv", "--out", "fine.csv", *u), "written over the data"),
    ):
        got, out, err = kakusan_("likelihood", *words)
        assert (got, out, err.count("\n")) == (code, "", 1), (words, got, out, err)
        assert said in err or said in err.replace("'", ""), (words, err)
    assert not (points / "likelihood" / "hole.csv").exists()


def test_tables_may_hold_fewer_levels_and_other_orders(kakusan_, runs, tmp_path):
    (tmp_path / "one.csv").write_text("kind,other,height,count\nb,7,0.3,4\n")
    (tmp_path / "two.csv").write_text("height,count,kind\n0.3,4,b\n-0.2,1,a\n")
    words = ("-q", "--dequantise", "uniform", "--beside", 0, "--tolerance", 0.1, "--probes", 0)
    for name in ("one", "two"):
        code, _, err = kakusan_("likelihood", runs / "rows", f"{name}.csv", *words)
        assert code == 0, err
    one, two = (read(runs / "rows" / "likelihood" / f"{name}.csv") for name in ("one", "two"))
    assert len(two) == 2 and abs(float(one[0]["log_prob"]) - float(two[0]["log_prob"])) < 1e-3


def test_ctrl_c_keeps_the_rows_that_are_done(kakusan_, runs, monkeypatch):
    true, calls = kakusan.inference.likelihood.log_prob, []

    def impatient(*words, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*words, **options)

    words = ("likelihood", runs / "points", "--batch", 2, "--out", "x.csv")
    with monkeypatch.context() as patch:
        patch.setattr(kakusan.inference.likelihood, "log_prob", impatient)
        code, out, err = kakusan_(*words)
    assert code == 130 and "stopped after 4 of 9 samples" in out and "Ctrl-C" in err, (out, err)
    rows = read("x.csv")
    assert len(rows) == 4 and kakusan_(*words)[0] == 0
    assert read("x.csv")[:4] == rows


def test_ctrl_c_in_the_finer_steps_loses_no_row(runs, monkeypatch):
    model, calls = DiffusionModel.load(runs / "points"), []
    true = kakusan.inference.likelihood.log_prob

    def impatient(*words, **options):
        calls.append(1)
        if len(calls) == 2:  # all rows were one batch: this is what is done again
            raise KeyboardInterrupt
        return true(*words, **options)

    monkeypatch.setattr(kakusan.inference.likelihood, "log_prob", impatient)
    x, _ = model.rows()
    with pytest.raises(densities.Stopped) as stopped:
        model.log_prob(x, tolerance=0.1)
    assert len(stopped.value.found.value) == len(x) and math.isnan(stopped.value.found.left)


def test_the_help_reads(kakusan_):
    code, out, _ = kakusan_("likelihood", "--help")
    assert code == 0 and "Example:" in out and "dequantise" in out


def test_samples_may_be_less_likely_where_told_apart_says_so():
    def of(values):
        v = torch.tensor(values)
        return densities.Likelihoods(v, v * 0, v * 0, v * 0, 1, "")

    # four pairs that all agree do not prove that the fifth would
    always, never = (
        judging.told_apart(of(a), of(b))
        for a, b in (([0.0, 1.0], [2.0, 3.0]), ([2.0, 3.0], [0.0, 1.0]))
    )
    assert always[0] == 1.0 and never[0] == 0.0 and min(always[1], never[1]) > 0.1
    value, error = judging.told_apart(of([0.0, 1.0]), of([0.0, 1.0]))
    assert value == 0.5 and error > 0
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(300, 60, generator=g).tolist()
    found = [judging.told_apart(of(d[:30]), of(d[30:])) for d in draws]
    values, errors = (torch.tensor(v) for v in zip(*found, strict=True))
    assert abs(values.mean() - 0.5) < 4 * values.std() / 300**0.5
    assert abs(errors.mean() / values.std() - 1) < 0.15


# --- training with dequantisation, and Fourier inputs -------------------------------------------


def test_a_dequantised_run_resumes_bit_for_bit(tmp_path):
    words = [*TINY, "train.save_every=2", "data.dequantise=uniform"]

    def train(name, steps, *more):
        run = ["train", "-q", "--out", str(tmp_path / name), *words, f"train.steps={steps}", *more]
        assert _run(run) == 0
        return files.read_tensors(tmp_path / name / "model.safetensors")

    # a rate that does not know the end, so that a run of 2 is the start of one of 4
    flat = ["train.decay=constant"]
    whole, half = train("whole", 4, *flat), train("half", 2, *flat)
    again = train("half", 4, "--resume")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert not all(torch.equal(whole[k], half[k]) for k in whole)
    bare = [w for w in words if not w.startswith("data.")]
    run = ["train", "-q", "--out", str(tmp_path / "bare"), *bare, *flat]
    assert _run(run) == 0
    other = files.read_tensors(tmp_path / "bare" / "model.safetensors")
    assert not all(torch.equal(whole[k], other[k]) for k in whole)


def test_dequantisation_is_refused_where_nothing_is_whole(kakusan_, tmp_path):
    np.save("x.npy", np.random.default_rng(0).normal(size=(40, 2)))
    code, _, err = kakusan_("train", "--data", "x.npy", "data.dequantise=uniform", *TINY)
    assert code == 2 and "hold none: leave it out (data.dequantise=none)" in err
    assert not (tmp_path / "runs").exists(), "nothing half-made is left"
    assert kakusan_("train", "data.dequantise=variational")[0] == 2


def test_arrays_of_whole_numbers_can_be_dequantised():
    x = np.random.default_rng(0).integers(0, 9, (60, 2))
    train = {"steps": 2, "batch": 16}
    model = DiffusionModel.fit(x, data={"dequantise": "uniform"}, train=train, quiet=True)
    held = model.rows()[0]
    assert "uniform dequantisation" in model.log_prob(held).how
    assert model.elbo(held).value.isfinite().all()
    with pytest.raises(UsageError, match="hold none"):
        options = {"data": {"dequantise": "uniform"}, "train": train, "quiet": True}
        DiffusionModel.fit(x.astype(float), **options)


def test_fourier_inputs_change_the_stem_and_are_refused_for_an_mlp(kakusan_, tmp_path):
    code, _, err = kakusan_("train", "-q", "--out", "run", *TINY, "model.fourier=[7,8]")
    assert code == 0, err
    wide = DiffusionModel.load("run").denoiser
    plain = DiffusionModel._fit
    config = configure(overrides=[*TINY, "train.steps=1"])
    narrow = plain(config, load(config.data, 0), None, None, True).denoiser
    shapes = [
        {k: tuple(v.shape) for k, v in m.state_dict().items() if v.ndim} for m in (wide, narrow)
    ]
    changed = [k for k in shapes[0] if shapes[0][k] != shapes[1].get(k)]
    assert len(changed) == 1 and shapes[0][changed[0]][1] == 5 * shapes[1][changed[0]][1], changed
    code, _, err = kakusan_("train", "--data", "two-moons", "model.fourier=[7]", *TINY)
    assert code == 2 and "model.fourier=[7] is for model.net=unet; mlp has no" in err


# --- learned noise ------------------------------------------------------------------------------


def test_learned_noise_is_learned_once_and_read_again(monkeypatch, tmp_path):
    true, learned = densities.fit_variational, []

    def quick(*words, **options):
        ticks = []
        learned.append(ticks)
        options |= {"steps": 30, "tick": lambda *said: ticks.append(said)}
        return true(*words, **options)

    monkeypatch.setattr(densities, "fit_variational", quick)
    x = np.random.default_rng(0).integers(0, 3, (80, 2))
    folder, options = tmp_path / "run", {"train": {"steps": 2, "batch": 16}, "quiet": True}
    model = DiffusionModel.fit(x, out=folder, **options)
    held = model.rows()[0]
    first = model.log_prob(held, dequantise="variational")
    assert "variational dequantisation" in first.how and learned[0][-1][0] == 30
    assert model.elbo(held, dequantise="variational").value.isfinite().all()
    assert {"dequantiser.json", "dequantiser.safetensors"} <= {p.name for p in folder.iterdir()}
    again = DiffusionModel.load(folder).log_prob(held, dequantise="variational")
    assert torch.equal(first.value, again.value) and len(learned) == 1
    # a model in memory learns once as well
    bare = DiffusionModel.fit(x, **options)
    values = [bare.log_prob(held, dequantise="variational").value for _ in range(2)]
    assert torch.equal(*values) and len(learned) == 2
    # weights that changed since ask for another law
    net = model.denoiser.state_dict()
    files.write_tensors(folder / "model.safetensors", {k: 1.1 * v for k, v in net.items()})
    other = DiffusionModel.load(folder)
    with pytest.raises(KakusanError, match="no run folder keeps; give it again"):
        other.log_prob(held, dequantise="variational")
    other.data = other.data_of_run(x)
    other.log_prob(held, dequantise="variational")
    assert len(learned) == 3
    for name, content in (
        ("dequantiser.safetensors", b"nothing"), ("dequantiser.json", b"{"),
        ("dequantiser.json", b"[]"), ("dequantiser.json", b'{"model": 1}'),
    ):  # fmt: skip
        keep = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        if content != b'{"model": 1}':
            with pytest.raises(KakusanError, match=f"{name}.*damaged|damaged.*{name}"):
                DiffusionModel.load(folder).log_prob(held, dequantise="variational")
        (folder / name).write_bytes(keep)
    (folder / "dequantiser.safetensors").unlink()
    with pytest.raises(KakusanError, match=r"dequantiser.safetensors is missing"):
        DiffusionModel.load(folder).log_prob(held, dequantise="variational")
    # what was learned is used where it cannot be kept
    monkeypatch.setattr(files, "write_tensors", _full)
    fresh = DiffusionModel.load(folder)
    fresh.data = fresh.data_of_run(x)
    (folder / "dequantiser.json").unlink()
    with pytest.warns(UserWarning, match="the dequantiser is not kept: cannot write"):
        assert fresh.log_prob(held, dequantise="variational").value.isfinite().all()


def _full(path, tensors):
    raise KakusanError(f"cannot write {path}: read-only")


def test_learned_noise_is_a_better_bound_than_uniform():
    x = drawn(VectorCodec((1,), (0.0,), (1.0,), True), 4000)
    codec = VectorCodec((1,), (0.0,), (1.0,), True)
    model = exact(codec)
    q = densities.fit_variational(
        model.denoiser.process, model.denoiser.score, x, codec.cells, steps=200, lr=1e-2
    )
    values = [model.log_prob(x[:1000], dequantise=w, batch=1000).value for w in ("uniform", q)]
    truth = log_masses(x[:1000], codec.cells).sum(1)
    (plain, learned), error = ((truth - v).mean() for v in values), truth.std() / 1000**0.5
    assert -0.02 < learned < plain / 2, (plain, learned, error)
