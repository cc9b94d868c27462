"""The doors: train, sample, evaluate on every kind of data, and one sentence for every mistake."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from kakusan import DiffusionModel, KakusanError, UsageError
from kakusan.cli import _run

TINY = ["model.width=16", "model.attention=0", "train.batch=16", "train.steps=4",
        "train.warmup=1", "train.precision=float32", "train.layout=contiguous"]  # fmt: skip


@pytest.fixture
def kakusan(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = _run([str(w) for w in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A digits run of a few steps."""
    folder = tmp_path_factory.mktemp("cli") / "digits"
    assert _run(["train", "-q", "--out", str(folder), *TINY]) == 0
    return folder


def _png(path):
    image = Image.open(path)
    image.load()
    return image


# --- the verbs


def test_help_shows_the_verbs_and_an_example(kakusan):
    code, out, _ = kakusan()
    assert code == 0 and all(verb in out for verb in ("train", "sample", "evaluate"))
    for verb in ("train", "sample", "evaluate"):
        code, out, _ = kakusan(verb, "--help")
        assert code == 0 and "Example:" in out, verb


def test_version(kakusan):
    import kakusan as package

    assert kakusan("--version")[:2] == (0, f"kakusan {package.__version__}\n")


def test_dry_run_prints_the_whole_configuration_and_makes_nothing(kakusan, tmp_path):
    import yaml

    code, out, _ = kakusan("train", "--dry-run", "train.steps=7")
    assert code == 0 and yaml.safe_load(out)["train"]["steps"] == 7
    assert not list(tmp_path.iterdir())
    code, out, _ = kakusan("train", "--dry-run", "--json", "--data", "two-moons")
    assert json.loads(out)["data"]["source"] == "two-moons"


def test_json_results_are_one_object(kakusan, trained):
    code, out, _ = kakusan("sample", trained, "-n", 4, "--steps", 2, "--json")
    assert code == 0 and json.loads(out)["n"] == 4
    code, out, _ = kakusan("evaluate", trained, "-n", 60, "--steps", 2, "--json")
    record = json.loads(out)
    assert code == 0 and record == json.loads((trained / "evaluation.json").read_text()) | {
        k: record[k] for k in ("file", "picture", "bound")
    }  # fmt: skip
    for row in record["metrics"].values():
        assert {"value", "std_error", "n", "floor", "floor_std_error"} <= set(row)
    assert len(record["levels"]["loss"]) == 10
    _png(trained / "evaluation.png")


def test_samples_as_png_npz_and_trajectory(kakusan, trained, tmp_path):
    code, out, _ = kakusan("sample", trained, "-n", 9, "--steps", 3, "--trajectory")
    assert code == 0
    made = re.findall(r"\S+\.png", out)
    assert len(made) == 2 and all(_png(p).mode == "L" for p in made)
    assert kakusan("sample", trained, "-n", 5, "--steps", 2, "--out", "x.npz")[0] == 0
    x = np.load(tmp_path / "x.npz", allow_pickle=False)["x"]
    assert x.shape == (5, 1, 8, 8) and x.min() >= 0 and x.max() <= 16


def test_labels_and_guidance(kakusan, trained):
    model = DiffusionModel.load(trained)
    three = model.sample(4, label="3", steps=3, guidance=2.0)
    assert torch.equal(three, model.sample(4, label=3, steps=3, guidance=2.0))
    assert not torch.equal(three, model.sample(4, label=[4], steps=3, guidance=2.0))
    assert kakusan("sample", trained, "-n", 3, "--steps", 2, "--label", "0,1")[0] == 0
    code, _, err = kakusan("sample", trained, "--label", "11")
    assert code == 2 and "no class '11'; this model knows 0, 1, 2" in err


def test_folder_of_pictures_csv_npy_and_idx(kakusan, tmp_path):
    """The same three verbs on a folder of colour PNGs, a table, an array and IDX files."""
    g = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(50):
            pixels = g.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    rows = [f"{g.normal():.3f},{g.integers(0, 9)},{g.choice(['a', 'b'])}" for _ in range(100)]
    (tmp_path / "table.csv").write_text("\n".join(["height,count,kind", *rows]) + "\n")
    np.save(tmp_path / "points.npy", g.normal(size=(100, 3)).astype(np.float32))
    (tmp_path / "idx").mkdir()
    for part, n in (("train", 50), ("t10k", 20)):
        images = g.integers(0, 256, (n, 10, 10), dtype=np.uint8)
        head = b"\x00\x00\x08\x03" + np.array([n, 10, 10], ">i4").tobytes()
        (tmp_path / "idx" / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    for data, out in (
        ("pets", "png"),
        ("table.csv", "csv"),
        ("points.npy", "npz"),
        ("idx", "png"),
    ):
        width = ["model.width=16"] if out != "png" else []
        code, text, err = kakusan("train", "-q", "--data", data, *TINY, *width)
        folder = tmp_path / "runs" / data.split(".")[0]
        assert code == 0 and str(folder.relative_to(tmp_path)) in text, err
        assert kakusan("sample", folder, "-n", 6, "--steps", 2, "--out", f"x.{out}")[0] == 0, data
        few = ("--steps", 2, "-n", 14, "--likelihoods", 4)
        code, text, err = kakusan("evaluate", folder, *few)
        assert code == 0 and "sliced wasserstein" in text, err
    head, *body = (tmp_path / "x.csv").read_text().splitlines()
    assert head == '"height","count","kind"' and len(body) == 6
    assert all(re.fullmatch(r'-?\d+(\.\d+)?(e-?\d+)?,\d,"[ab]"', row) for row in body), body
    assert _png(tmp_path / "runs" / "pets" / "samples" / "step-4.png").mode == "RGB"


def test_the_python_door(tmp_path):
    x = torch.randn(80, 2)
    options = {"steps": 3, "batch": 16}
    model = DiffusionModel.fit(x, labels=torch.arange(80) % 2, train=options, quiet=True)
    drawn = model.sample(7, steps=3, seed=0)
    assert drawn.shape == (7, 2) and model.classes == ("0", "1")
    assert model.to_data(drawn).shape == (7, 2)
    assert model.trajectory(4, steps=3).shape == (4, 4, 2)
    assert _png(model.show(drawn, tmp_path / "x.png")).size[0] > 100
    found = model.evaluate(12, steps=2)
    assert found.metrics["energy_distance"].n == 12 and "energy distance" in str(found)
    again = DiffusionModel.load(model.save(tmp_path / "run"))
    assert torch.equal(again.sample(7, steps=3, seed=0), drawn)


# --- one sentence for every mistake


def test_unknown_words_name_the_nearest_known(kakusan):
    for words, said in (
        (("trian",), "unknown verb 'trian'; did you mean train?"),
        (("train", "--dta", "digits"), "No such option: --dta"),
        (("train", "train.step=3"), "unknown key 'train.step'; did you mean train.steps?"),
        (("train", "--data", "digts"), "did you mean 'digits'?"),
        (("train", "steps"), "'steps' is no override"),
        (("sample",), "Missing argument 'RUN'"),
        (("train", "train.steps=0"), "greater than or equal to 1"),
        (("train", "model.net=unet", "--data", "two-moons"), "unet needs images"),
        (("train", "model.multipliers=[0]"), "greater than 0"),
        (("train", "process.sigma_min=90"), "sigma_min=90.0 must lie below sigma_max=80.0"),
        (("train", "model.predict=epsilon"), "use model.predict=v, or process.name=vp"),
        (("train", "train.device=abacus"), "device 'abacus' cannot be used here"),
    ):
        code, _, err = kakusan(*words)
        assert code == 2 and said in err and err.count("\n") == 1, (words, err)


def test_missing_and_damaged_things_are_named(kakusan, trained, tmp_path):
    for words, said in (
        (("sample", "runs/none"), "there is no run folder runs/none; kakusan train makes one"),
        (("sample", tmp_path), "is no run folder: it holds no config.json"),
        (("train", "--data", "no/such.csv"), "there is no file or folder no/such.csv"),
        (("train", "--resume", "--out", "none"), "there is no run to resume in none"),
    ):
        code, _, err = kakusan(*words)
        assert code == 1 and said in err and err.count("\n") == 1, (words, err)
    for words, said in (
        (("train", "--out", trained), "already holds a run; go on with it by --resume"),
        (("train", "--resume"), "--resume needs --out"),
        (
            ("train", "--resume", "--out", trained, "model.width=8"),
            "model cannot change when a run resumes",
        ),
        (("sample", trained, "--out", "x.doc"), "written as .png, .npz, not x.doc"),
        (("sample", trained, "-n", 0), "n must be at least 1, got 0"),
        (("sample", trained, "--steps", -1), "steps must be at least 1, got -1"),
        (
            ("sample", trained, "--noise", 2),
            "noise must lie between 0 and 1, got 2.0",
        ),
        (("evaluate", trained, "--features", "inception"), "no features named inception"),
    ):
        code, _, err = kakusan(*words)
        assert code == 2 and said in err.replace("'", ""), (words, err)


def test_bad_data_are_named_with_file_and_row(kakusan, tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2))
    x[17, 1] = np.nan
    np.save(tmp_path / "nan.npy", x)
    code, _, err = kakusan("train", "--data", "nan.npy", *TINY)
    assert code == 1 and "nan.npy" in err and "row 17" in err
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    code, _, err = kakusan("train", "--data", "objects.npy", *TINY)
    assert code == 1 and "objects.npy" in err and "pickle" in err
    (tmp_path / "cut.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:200])
    code, _, err = kakusan("train", "--data", "cut.npy", *TINY)
    assert code == 1 and "cut.npy" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # nothing half-made is left


def test_a_model_without_labels_follows_none(tmp_path):
    model = DiffusionModel.fit(torch.randn(40, 2), train={"steps": 1, "batch": 8}, quiet=True)
    with pytest.raises(UsageError, match="without labels"):
        model.sample(2, label=1)
    for bad in ({"n": 0}, {"steps": 0}, {"batch": -1}):
        with pytest.raises(UsageError, match="at least 1"):
            model.sample(**{"n": 2, **bad})
    with pytest.raises(UsageError, match="between 0 and 1"):
        model.sample(2, noise=1.5)
    with pytest.raises(KakusanError, match="labels"):
        DiffusionModel.fit(torch.randn(40, 2), labels=[0, 1], quiet=True)


def test_python_mistakes_are_sentences_too(tmp_path, trained):
    for arguments, said in (
        (([[1.0, 2.0]],), "not from list"),
        (("digits", [1, 2]), "labels go with a tensor or array"),
    ):
        with pytest.raises(UsageError, match=said):
            DiffusionModel.fit(*arguments, quiet=True)
    with pytest.raises(UsageError, match="already holds a run"):
        DiffusionModel.fit("digits", out=trained, quiet=True)
    with pytest.raises(UsageError, match="4 steps already, and train.steps is 4"):
        DiffusionModel.fit("digits", out=trained, resume=True, train={"steps": 4}, quiet=True)
    model = DiffusionModel.fit(torch.randn(90, 2), train={"steps": 1, "batch": 8}, quiet=True)
    with pytest.raises(UsageError, match="at least 12 samples and held-out points, got n=5"):
        model.evaluate(5)
    again = DiffusionModel.load(model.save(tmp_path / "run"))
    with pytest.raises(UsageError, match="trained on an array"):
        again.evaluate()
    with pytest.raises(UsageError, match="guidance 2.0 needs labels"):
        again.sample(2, guidance=2.0)


def test_a_table_comes_back_with_its_label_column(kakusan, tmp_path):
    rows = [f"{i % 7},{'ab'[i % 2]},{i / 10}" for i in range(100)]
    (tmp_path / "t.csv").write_text("\n".join(["count,kind,height", *rows]) + "\n")
    words = ["data.labels=kind", "train.steps=2", "train.batch=16"]
    assert kakusan("train", "-q", "--data", "t.csv", *words)[0] == 0
    assert kakusan("sample", "runs/t", "-n", 4, "--label", "b", "--out", "x.csv")[0] == 0
    head, *body = (tmp_path / "x.csv").read_text().splitlines()
    assert head == '"count","kind","height"'
    assert all(row.split(",")[1] == '"b"' for row in body) and len(body) == 4


def test_a_failed_start_is_no_run(kakusan, tmp_path):
    words = ["train.lr=1e30", "train.warmup=0", *TINY[:3]]
    code, _, err = kakusan("train", "-q", "--out", "r", *words, "train.steps=60")
    assert code == 1 and "the loss is" in err
    assert kakusan("train", "-q", "--out", "r", *TINY)[0] == 0


def test_weights_of_another_network_are_refused(trained, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["width"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KakusanError, match="does not fit the network of config.json"):
        DiffusionModel.load(folder)
    (folder / "data.json").write_text("{}")
    with pytest.raises(KakusanError, match="data.json"):
        DiffusionModel.load(folder)
