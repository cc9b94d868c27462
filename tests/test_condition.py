"""Conditioning a trained model: the door in Python, and the verb `condition`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kakusan import DiffusionModel, KakusanError, UsageError, conditioning
from kakusan.cli import _run
from kakusan.inference.guidance.classifier import Classifier
from kakusan.inference.guidance.moments import MomentMatching
from kakusan.inference.guidance.pigdm import PiGDM
from kakusan.inference.guidance.twisted import Twisted
from kakusan.learned_conditions import Learned, learn_condition
from kakusan.processes.observations import Coordinates, Event, Label, Measured, Series, Terminal

TINY = ["model.width=16", "model.attention=0", "train.batch=16", "train.steps=20",
        "train.warmup=1", "train.precision=float32", "train.layout=contiguous"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A digits run of a few steps."""
    folder = tmp_path_factory.mktemp("condition") / "digits"
    assert _run(["train", "-q", "--out", str(folder), *TINY]) == 0
    return folder


@pytest.fixture(scope="module")
def model(trained):
    return DiffusionModel.load(trained)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A table of two kinds, a length that tells them apart, and a count."""
    folder = tmp_path_factory.mktemp("birds")
    g = np.random.default_rng(0)
    rows = [f"{'ab'[i % 2]},{g.normal(40 + 10 * (i % 2)):.1f},{g.integers(9)},{'mf'[i // 2 % 2]}"
            for i in range(200)]  # fmt: skip
    (folder / "birds.csv").write_text("\n".join(["kind,length,count,sex", *rows]) + "\n")
    for name, words in (("plain", []), ("kinds", ["data.labels=kind"])):
        done = _run(["train", "-q", "--data", str(folder / "birds.csv"), "--out",
                     str(folder / name), "train.steps=60", "train.batch=64", *words])  # fmt: skip
        assert done == 0
    return folder


@pytest.fixture
def kakusan(capsys, tmp_path, monkeypatch):
    """Runs `condition` in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = _run(["condition", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


# --- in Python


def test_sample_i_is_the_same_for_any_n_and_batch(model):
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    y, options = model.sample(1, steps=3), {"steps": 4, "seed": 3}
    whole = model.condition(Coordinates(mask), y, 7, batch=7, **options)
    part = model.condition(Coordinates(mask), y, 5, batch=2, **options)
    assert torch.allclose(whole.samples[:5], part.samples, atol=2e-4)
    other = model.condition(Coordinates(mask), y, 5, steps=4, seed=4)
    assert not torch.allclose(other.samples, part.samples, atol=1e-2)
    assert torch.equal(whole.mean, whole.samples.mean(0)) and whole.std.shape == (1, 8, 8)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("how", [PiGDM(), MomentMatching(), Twisted(PiGDM(), 8)], ids=repr)
def test_seen_pixels_come_out_to_the_last_bit(model, how, noise):
    if isinstance(how, Twisted) and not noise:
        return
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    x = model.rows(None, 1)[0][0]
    found = model.condition(Coordinates(mask), x, 4, how=how, steps=4, noise=noise)
    assert torch.equal(found.samples[:, mask], x[mask].expand(4, -1))
    assert (found.missed == 0).all() and (found.mended > 0).all()
    assert (model.to_data(found.samples)[:, mask] == model.to_data(x[None])[0][mask]).all()
    # the values alone, and a row a sample, say the same
    again = model.condition(Coordinates(mask), x[mask], 4, how=how, steps=4, noise=noise)
    assert torch.equal(found.samples, again.samples)


def test_guidance_leads_towards_what_was_seen(model):
    """Before anything is put in, conditioned samples are nearer to y than blind ones."""
    see = Measured(lambda x: torch.nn.functional.avg_pool2d(x, 2), std=0.05)
    x = model.rows(None, 1)[0]
    y = see.forward(x)
    blind = (see.forward(model.sample(8, steps=20)) - y).square().mean().sqrt()
    found = model.condition(see, y, 8, steps=20)
    assert found.missed.square().mean().sqrt() < 0.5 * blind
    assert torch.equal(found.missed, found.mended)  # y has noise, so nothing is put in


def test_each_observation_has_its_guidance(model):
    bright = Event(lambda x: x.flatten(1).mean(1) > -0.5)
    soft = Label(lambda x: torch.stack([x.flatten(1).mean(1), -x.flatten(1).mean(1)], 1), 2)
    hard = Label(lambda x: (x.flatten(1).mean(1) > -0.5).long(), 2)
    quick = {"n": 2, "steps": 2}
    assert model.condition(Terminal(), model.sample(1, steps=2), **quick).how == repr(PiGDM())
    assert model.condition(soft, 0, **quick).how == repr(Classifier())
    for see in (bright, hard):
        found = model.condition(see, 1, **quick)
        assert found.how == repr(Twisted()) and (found.missed == 0).all()
        assert found.log_weights is not None and len(found.log_weights) == 256
        assert abs(found.log_weights.exp().sum() - 1) < 1e-9 and 1 <= found.ess <= 256


def test_labels_join_measurements(model):
    x = model.rows(None, 1)[0]
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :2] = True
    one, two = (model.condition(Coordinates(mask), x, 3, steps=3, label=c, guidance=2.0)
                for c in ("3", "7"))  # fmt: skip
    assert not torch.equal(one.samples, two.samples)
    led = Twisted(particles=4)
    model.condition(Coordinates(mask), x, 3, how=led, steps=3, label="3")
    with pytest.raises(UsageError, match="compete for one value and one class"):
        model.condition(Coordinates(mask), x, 2, how=led, steps=3, label=["3", "7"])
    with pytest.raises(UsageError, match="no class 'x'"):
        model.condition(Coordinates(mask), x, 2, label="x")


def test_requests_that_make_no_sense_are_refused(model):
    see = Coordinates([0, 1])
    for y, said in ((torch.zeros(3), "sees 2 numbers"), ([float("nan"), 0.0], "must be finite")):
        with pytest.raises(KakusanError, match=said):
            model.condition(see, y)
    for bad in ({"n": 0}, {"steps": 0}, {"batch": 0}, {"noise": 2.0}):
        with pytest.raises(UsageError):
            model.condition(see, [0.0, 0.0], **bad)
    with pytest.raises(UsageError, match="a Series is seen along a path"):
        model.condition(Series({0.5: see}), [0.0, 0.0])
    with pytest.raises(KakusanError, match="needs a linear measurement"):
        model.condition(Event(lambda x: x[:, 0, 0, 0] > 0), 1, how=PiGDM())
    with pytest.raises(KakusanError, match="does not fit states"):
        model.condition(Coordinates(torch.ones(3, 3, dtype=torch.bool)), torch.zeros(9))
    assert conditioning.ConditionedSamples.__doc__


def test_a_tilt_that_was_learned_conditions(model):
    """Once for all values, or on the way; by itself or by a label."""
    how, left = Learned(steps=4, paths=64, iterations=20, particles=40), slice(0, 4)
    ink = Measured(lambda x: x[..., left].flatten(1).mean(1, keepdim=True))
    tilt = learn_condition(model, ink, how)
    for y in (-0.5, -0.3):
        found = model.condition(ink, y, 3, how=tilt, seed=2)
        assert found.missed.max() < 1e-6 and found.log_weights.shape == (40,)
        assert torch.equal(found.samples, tilt.sample(y, 3, seed=2).samples)
        assert torch.equal(found.samples, model.condition(ink, y, 3, how=how, seed=2).samples)
    bright = Event(lambda x: x.flatten(1).mean(1) > -0.5)
    assert (model.condition(bright, 1, 3, how=how, label="3").missed == 0).all()
    for see, options, said in (
        (bright, {"how": tilt}, "the tilt was learned for"),
        (ink, {"how": tilt, "label": "3"}, "has its class from learn_condition"),
        (ink, {"how": how, "label": ["3", "7"]}, "one value and one class at a time"),
    ):
        with pytest.raises(UsageError, match=said):
            model.condition(see, 1, 2, **options)


# --- the verb


def test_a_masked_picture_is_completed(kakusan, trained, tmp_path):
    code, out, _ = kakusan(trained, "--mask", "top", "-n", 3, "--row", 2, "--steps", 4)
    assert code == 0 and "row 2 of the held-out data without its top half" in out
    assert "missed    0 from what was seen" in out and "of samples given nothing" in out
    made = trained / "conditioned" / "top-row2-pigdm-0"
    picture = Image.open(made.with_suffix(".png"))
    assert picture.size[0] > 800
    found = np.load(made.with_suffix(".npz"), allow_pickle=False)
    seen = ~found["open"]
    assert found["x"].shape == (3, 1, 8, 8) and not seen[:, :4].any() and seen[:, 4:].all()
    assert (found["x"][:, seen] == found["original"][seen]).all()
    assert len(found["y"][0]) == 32


@pytest.mark.parametrize(
    ("words", "k"),
    [(("--mask", "random:0.25"), None), (("--mask", "centre"), 48), (("--measure", "blur"), 64),
     (("--measure", "downsample:2", "--std", 0), 16), (("--measure", "project:5"), 5)],
    ids=["random", "centre", "blur", "downsample", "project"],
)  # fmt: skip
def test_ways_to_see(kakusan, trained, tmp_path, words, k):
    words = (trained, *words, "-n", 2, "--steps", 3, "--out", "a.npz", "--json")
    code, out, _ = kakusan(*words, "--by", "moments")
    record = json.loads(out)
    assert code == 0 and record["n"] == 2 and record["how"].startswith("MomentMatching"), out
    assert record["samples"] == "a.npz" and record["picture"] == "a.png"
    assert all(record[key] >= 0 for key in ("missed", "mended", "spread", "distance"))
    y = np.load(tmp_path / "a.npz")["y"]
    assert k is None or y.shape == (1, k)
    if "--std" in words:
        assert record["missed"] < 1e-4


def test_masks_and_pictures_of_ones_own(kakusan, trained, tmp_path):
    white_left = np.zeros((8, 8), np.uint8)
    white_left[:, :4] = 255
    Image.fromarray(white_left).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", white_left > 0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    for mask in ("left", "mask.png", "mask.npy"):
        words = ("--mask", mask, "--image", "mine.png", "-n", 2, "--steps", 2, "--out", "b.png")
        assert kakusan(trained, *words)[0] == 0
        found = np.load(tmp_path / "b.npz")
        assert (found["open"][0] == (white_left > 0)).all(), mask
        assert (abs(found["original"][0] - pixels / 255 * 16) <= 0.51).all()


def test_columns_of_a_table_are_given(kakusan, birds, tmp_path):
    words = ("--steps", 10, "-n", 40, "--particles", 64)
    code, out, err = kakusan(birds / "plain", "--given", "kind=b", "--given", "count=3", *words,
                             "--out", "x.csv")  # fmt: skip
    assert code == 0 and "given kind=b, count=3, by Twisted" in out, err
    head, *rows = (tmp_path / "x.csv").read_text().splitlines()
    assert head == '"kind","length","count","sex"' and len(rows) == 40
    assert all(r.startswith('"b",') and r.split(",")[2] == "3" for r in rows), rows
    assert (tmp_path / "x.png").is_file()
    # a column that serves as the label goes with others
    words = ("--steps", 4, "-n", 2, "--by", "pigdm", "--out", "y.csv")
    code, out, _ = kakusan(birds / "kinds", "--given", "kind=b", "--given", "sex=f", *words)
    assert code == 0 and "class b" in out
    code, _, err = kakusan(birds / "kinds", "--given", "kind=b")
    assert code == 2 and "kakusan sample RUN --label b draws it" in err


def test_numbers_of_points_are_given(kakusan, tmp_path):
    model = DiffusionModel.fit(
        3 * torch.randn(100, 2) + 1, train={"steps": 2, "batch": 16}, quiet=True
    )
    model.save(tmp_path / "points")
    words = ("--steps", 4, "-n", 3, "--particles", 8)
    assert kakusan("points", "--given", "x2=1.5", *words, "--out", "p.npz")[0] == 0
    x = np.load(tmp_path / "p.npz")["x"]
    assert x.shape == (3, 2) and np.allclose(x[:, 1], 1.5, atol=1e-5)
    for word, said in (("x3=1", "has x1 to x2"), ("x1=a", "takes a number")):
        code, _, err = kakusan("points", "--given", word)
        assert code == 2 and said in err
    code, _, err = kakusan("points", "--mask", "top")
    assert code == 2 and "look at pictures, and this model draws vectors" in err
    code, _, err = kakusan("points", "--given", "x1=0", "--label", "3")
    assert code == 2 and "trained without labels" in err


def test_a_learned_tilt_is_kept_and_used_again(kakusan, trained):
    words = ("--by", "learned", "-n", 2, "--rehearse", 32, "--particles", 32, "--json")
    event = ("--event", "ink>0.3")
    first, again, other = (json.loads(kakusan(trained, *ask, *words)[1])
                           for ask in (event, event, ("--event", "left<right")))  # fmt: skip
    assert (first["reused"], again["reused"], other["reused"]) == (False, True, False)
    assert {**again, "reused": False} == first and first["missed"] == 0
    assert first["learned"]["paths"] == 32 and len([*(trained / "conditions").iterdir()]) == 2
    # one file for all values of a measurement
    rows = [json.loads(kakusan(trained, "--measure", "project:2", "--row", i, *words)[1])
            for i in (0, 1)]  # fmt: skip
    assert [row["reused"] for row in rows] == [False, True]
    code, out, _ = kakusan(trained, *event, "-n", 2, "--steps", 3, "--particles", 64)
    assert code == 0 and "given ink>0.3, by Twisted(base=None, particles=64" in out
    assert (trained / "conditioned" / "ink-above-0.3-learned-0.png").is_file()
    for text, said in (("ink", "compares, as ink>0.4"), ("fog>1", "not 'fog' of images")):
        code, _, err = kakusan(trained, "--event", text)
        assert code == 2 and said in err


def test_mistakes_are_sentences(kakusan, trained, birds, tmp_path):
    Image.new("L", (5, 8)).save(tmp_path / "small.png")
    np.save(tmp_path / "none.npy", np.zeros((8, 8)))
    (tmp_path / "no.png").write_text("words")
    mask = ("--mask", "top")
    for words, said in (
        ((), "what was seen? --mask top hides"),
        (("--label", "3"), "kakusan sample RUN --label 3 draws a class alone"),
        ((*mask, "--measure", "blur"), "--mask and --measure are different things to see"),
        (("--mask", "up"), "no mask 'up': it is top, bottom"),
        (("--mask", "random:2"), "hides a share between 0 and 1, got random:2"),
        (("--mask", "random:x"), "takes a number, got 'x'"),
        (("--mask", "small.png"), "a mask of shape (8, 5), and pictures of this model are 8 rows"),
        (("--mask", "none.npy"), "none.npy hides nothing of a picture"),
        (("--measure", "fog"), "no measurement 'fog'; known are blur"),
        (("--measure", "blur:0"), "a number above 0"),
        (("--measure", "downsample:3"), "8x8 pixels do not come apart so for K=3"),
        (("--measure", "project:64"), "takes 1 to 63 directions of 64 numbers, got 64"),
        ((*mask, "--row", 999), "there is no row 999: held-out data end at row 269"),
        ((*mask, "--row", -1), "rows are counted from 0, got -1"),
        ((*mask, "--image", "small.png"), "small.png is 5x8 pixels, and this model draws 8x8"),
        ((*mask, "--by", "magic"), "no guidance named 'magic'; known are pigdm"),
        ((*mask, "--label", "11"), "no class '11'"),
        ((*mask, "--out", "x.csv"), "written as .npz and .png, not x.csv"),
        (("--given", "a=1"), "this model draws pictures: --mask hides"),
    ):
        code, _, err = kakusan(trained, *words, "--steps", 1, "-n", 1)
        assert code == 2 and said in err and err.count("\n") == 1, (words, err)
    for words, said in (
        ((*mask, "--image", "no.png"), "no.png cannot be read as a picture"),
        (("--mask", "no.png"), "no.png cannot be read as a mask"),
    ):
        code, _, err = kakusan(trained, *words, "--steps", 1, "-n", 1)
        assert code == 1 and said in err and err.count("\n") == 1, (words, err)
    for word, said in (
        ("kind=z", "kind is never 'z'; it is a, b"),
        ("wings=2", "no column 'wings'; this model knows kind, length"),
        ("length", "--given is COLUMN=VALUE, got 'length'"),
        ("length=long", "length takes a number, got 'long'"),
    ):
        code, _, err = kakusan(birds / "plain", "--given", word)
        assert code == 2 and said in err and err.count("\n") == 1, (word, err)
    code, _, err = kakusan(birds / "plain", "--given", "count=1", "--given", "count=2")
    assert code == 2 and "count was given twice" in err
