"""The trainer's promises: resumed equals uninterrupted, files whole or absent, nothing lost."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import kakusan
from kakusan import DiffusionModel, KakusanError, UsageError
from kakusan.training import checkpoint, files
from kakusan.training.batches import Order, batches
from kakusan.training.config import Config, configure
from kakusan.training.data import load
from kakusan.training.ema import Average
from kakusan.training.fit import _rate

TINY = [
    "model.width=16",
    "model.attention=4",
    "train.batch=32",
    "train.precision=float32",
    "train.save_every=5",
    "train.eval_every=1000",
    "train.log_every=1",
    "train.warmup=4",
]


def _weights(folder):
    return files.read_tensors(folder / "model.safetensors")


def _run(folder, *words, check=True, **options):
    command = [sys.executable, "-m", "kakusan", "train", "--quiet", "--out", str(folder), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=check, env=env, timeout=120, **options
    )


@pytest.fixture(scope="module", params=["contiguous", "channels_last"])
def layout(request):
    return f"train.layout={request.param}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    _run(folder, *TINY, "train.steps=20", "model.dropout=0.1", layout)
    return folder


def test_a_run_folder_holds_what_it_promises(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    promised = {"config.json", "data.json", "split.safetensors", "model.safetensors",
                "checkpoints", "metrics.jsonl", "samples"}  # fmt: skip
    assert promised <= names
    assert (uninterrupted / "samples" / "step-20.png").read_bytes()[:4] == b"\x89PNG"
    Config.model_validate(json.loads((uninterrupted / "config.json").read_text()))
    lines = [json.loads(s) for s in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in lines if "loss" in s] == list(range(1, 21))
    assert not [
        p for p in uninterrupted.rglob("*") if p.suffix in (".pt", ".pkl", ".pth", ".draft")
    ]
    assert [p.name for p in checkpoint.existing(uninterrupted)] == ["step-20", "step-15"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_resumed_after_a_kill_equals_the_uninterrupted_one(
    uninterrupted, tmp_path, how, layout
):
    """The digits run, killed at step 8 or later and resumed: bit for bit the same."""
    folder, words = tmp_path / "run", [*TINY, "train.steps=20", "model.dropout=0.1", layout]
    command = [sys.executable, "-m", "kakusan", "train", "-q", "--out", str(folder), *words]
    child = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 8):
        assert child.poll() is None and time.monotonic() < deadline, "too fast to be killed"
        time.sleep(0.002)
    child.send_signal(how)
    said = child.communicate(timeout=60)[1]
    if how == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
    else:
        assert child.returncode == 130 and "go on with: kakusan train --resume --out" in said, said
    assert checkpoint.newest(folder).step < 20
    _run(folder, "--resume")
    mine, theirs = _weights(folder), _weights(uninterrupted)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    steps = [json.loads(s)["step"] for s in log.read_text().splitlines() if '"loss"' in s]
    assert steps == list(range(1, 21))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", uninterrupted, folder], check=True)
    part = folder / "checkpoints" / "step-20" / "average.safetensors"
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="step-20/average.safetensors is damaged"):
        assert checkpoint.newest(folder).step == 15
    done = _run(folder, "--resume")
    assert "step-20/average.safetensors is damaged" in done.stderr
    mine, theirs = _weights(folder), _weights(uninterrupted)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    for path in checkpoint.existing(folder):
        (path / "state.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KakusanError, match="none of the 2 checkpoints"):
            checkpoint.newest(folder)


def test_damaged_weights_fall_back_to_the_checkpoint(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", uninterrupted, folder], check=True)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"model.safetensors is damaged.*checkpoint of step 20"):
        again = DiffusionModel.load(folder)
    whole = DiffusionModel.load(uninterrupted)
    assert torch.equal(again.sample(4, steps=3), whole.sample(4, steps=3))


def test_saved_and_loaded_models_sample_the_same(uninterrupted, tmp_path):
    model = DiffusionModel.load(uninterrupted)
    again = DiffusionModel.load(model.save(tmp_path / "copy"))
    assert torch.equal(model.sample(5, steps=4, seed=3), again.sample(5, steps=4, seed=3))
    assert again.classes == model.classes and again.codec == model.codec


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_sample_i_is_the_same_for_every_batch_size(uninterrupted, noise):
    model = DiffusionModel.load(uninterrupted)
    whole = model.sample(70, steps=4, seed=1, noise=noise)
    for n, batch in ((70, 32), (70, 1), (9, 256)):
        part = model.sample(n, steps=4, seed=1, noise=noise, batch=batch)
        # the numbers fed in are equal to the bit; kernels may round differently by batch
        assert (part - whole[:n]).abs().max() < 2e-5, (n, batch)
    assert not torch.equal(model.sample(9, steps=4, seed=2), whole[:9])


def test_accumulation_changes_the_memory_not_the_gradient():
    data = load(configure().data, 0)
    words = [*TINY, "train.steps=3", "train.clip=1e9"]
    runs = []
    for parts in (1, 4):
        config = configure(overrides=[*words, f"train.accumulate={parts}"])
        model = DiffusionModel._fit(config, data, None, None, True)
        runs.append(model.denoiser.state_dict())
    for name, value in runs[0].items():
        assert torch.allclose(value, runs[1][name], atol=2e-4), name


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own():
    order = Order(10, seed=3)
    epochs = [order.places(10 * k, 10 * k + 10) for k in range(3)]
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    across = Order(10, seed=3).places(7, 24)
    assert torch.equal(across, torch.cat(epochs)[7:24])


def test_batches_read_on_where_they_stopped():
    data = load(configure().data, 0)
    first = batches(data.train, 16, 0, 0)
    skipped = [next(first) for _ in range(4)][3]
    resumed = next(batches(data.train, 16, 0, 3))
    assert torch.equal(skipped[0], resumed[0]) and torch.equal(skipped[1], resumed[1])


def test_the_average_warms_up_and_then_forgets_slowly():
    layer = torch.nn.Linear(1, 1)
    average, mirror = Average(layer, 0.9), layer.weight.item()
    for step in range(200):
        with torch.no_grad():
            layer.weight.fill_(step)
        average.update(layer, step)
        d = min(0.9, (1 + step) / (10 + step))
        mirror = d * mirror + (1 - d) * step
    assert abs(average.model.weight.item() - mirror) < 1e-3


def test_learning_rate_warms_up_and_decays_to_zero():
    train = configure(
        overrides=["train.steps=100", "train.warmup=10", "train.lr=1.0", "train.batch=1"]
    ).train
    rates = [_rate(train, k) for k in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[99] < 1e-3
    assert all(b < a for a, b in zip(rates[10:], rates[11:], strict=False))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    config = configure(overrides=[*TINY, "train.steps=30", "train.lr=1e30", "train.warmup=0"])
    with pytest.raises(
        KakusanError, match=r"the loss is \S+ and its gradient \S+ at step \d+.*smaller"
    ):
        DiffusionModel.fit(config, out=tmp_path / "run", quiet=True)


# --- files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.whole(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1} and os.listdir(path.parent) == ["x.json"]


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KakusanError, match="no space left on the disk while writing .*x.json"):
        files.write_json(path, 2)
    monkeypatch.undo()
    assert files.read_json(path) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_safetensors_is_known(tmp_path, monkeypatch):
    with pytest.raises(KakusanError, match="no space left"), files.whole(tmp_path / "w") as draft:
        draft.symlink_to("/dev/full")
        with draft.open("wb") as handle:
            handle.write(b"0" * 100_000)


# --- configuration


def test_configuration_merges_in_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 7, lr: 0.5}\nseed: 2\n")
    config = configure(file, ["train.steps=9", "data.source=two-moons"], {"seed": 1})
    assert (config.train.steps, config.train.lr, config.seed) == (9, 0.5, 2)
    assert configure(base=config.model_dump()) == config


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.step=3", "did you mean train.steps"),
        ("steps=3", "did you mean train.steps"),
        ("trian.steps=3", r"did you mean train\?"),
        ("train.steps", "is no override"),
        ("train.steps=0", "train.steps = 0 does not fit.*greater than or equal to 1"),
        ("train.batch=-4", "greater than or equal to 1"),
        ("train.lr=abc", "valid number"),
        ("train.lr=.inf", "finite"),
        ("process.name=vpp", "'vp', 'subvp'"),
        ("train=3", "train = 3 does not fit"),
        ("train.steps=[", "not YAML"),
    ],
)
def test_bad_settings_get_a_sentence(word, said):
    with pytest.raises(UsageError, match=said):
        configure(overrides=[word])


def test_a_bad_yaml_file_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: [")
    with pytest.raises(UsageError, match="c.yaml is not YAML"):
        configure(file)
    file.write_text("- 1")
    with pytest.raises(UsageError, match="must hold sections"):
        configure(file)
    with pytest.raises(UsageError, match="cannot read .*nothing.yaml"):
        configure(tmp_path / "nothing.yaml")


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert kakusan.__version__ == version("kakusan")


def test_the_newest_checkpoint_survives_damaged_later_ones(tmp_path):
    """Going back to step 5 of a run whose step 10 is damaged, and saving step 7 with keep=1."""
    one = {"w": torch.ones(2)}
    for step in (5, 10):
        checkpoint.save(tmp_path, checkpoint.Checkpoint(step, one, one, one), keep=2)
    (tmp_path / "checkpoints" / "step-10" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / ".step-9.77.draft").mkdir()
    checkpoint.save(tmp_path, checkpoint.Checkpoint(7, one, one, one), keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-7"]
    assert checkpoint.newest(tmp_path).step == 7


def test_moments_come_back_in_the_layout_of_their_parameters():
    layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    kept = {
        k: v.clone().contiguous()
        for k, v in checkpoint.optimizer_tensors(layer, optimizer).items()
    }
    again = torch.optim.AdamW(layer.parameters(), fused=True)
    checkpoint.restore_optimizer(layer, again, kept)
    for p in layer.parameters():
        for name, value in optimizer.state[p].items():
            assert torch.equal(again.state[p][name], value)
            assert again.state[p][name].stride() == value.stride(), name


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    config = configure(overrides=[*TINY, "train.steps=3", "train.layout=contiguous"])
    clip = torch.nn.utils.clip_grad_norm_

    def broken(parameters, *rest, **options):
        return clip(parameters, *rest, **options) * math.inf

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(KakusanError, match="its gradient inf at step 1"):
        DiffusionModel.fit(config, quiet=True)


def test_resuming_in_python_is_resuming(tmp_path):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    train = {"steps": 6, "batch": 8, "save_every": 3, "precision": "float32"}
    whole = DiffusionModel.fit(x, out=tmp_path / "a", train=train, seed=3, quiet=True)
    DiffusionModel.fit(x, out=tmp_path / "b", train=train, seed=3, quiet=True)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-6")
    again = DiffusionModel.fit(x, out=tmp_path / "b", resume=True, quiet=True)
    theirs = whole.denoiser.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in again.denoiser.state_dict().items())
    for options, said in (
        ({"seed": 4}, "seed cannot change"),
        ({"model": {"width": 32}}, "model cannot change"),
        ({}, "6 steps already"),
    ):
        with pytest.raises(UsageError, match=said):
            DiffusionModel.fit(x, out=tmp_path / "b", resume=True, quiet=True, **options)
    again.save(tmp_path / "c")
    with pytest.raises(KakusanError, match="no checkpoint that training could go on from"):
        DiffusionModel.fit(x, out=tmp_path / "c", resume=True, quiet=True)
    # the copy judges by the same held-out points, with the array given again
    mine, copy = whole.data_of_run(), DiffusionModel.load(tmp_path / "c").data_of_run(x)
    assert torch.equal(mine.test_index, copy.test_index)


def test_data_of_other_classes_do_not_resume_a_run(tmp_path):
    from PIL import Image

    for i in range(60):
        place = tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(place)
    options = {"model": {"width": 16}, "train": {"steps": 2, "batch": 4}, "quiet": True}
    DiffusionModel.fit(tmp_path / "pets", out=tmp_path / "run", **options)
    (tmp_path / "pets" / "cow").mkdir()
    Image.new("L", (8, 8), 9).save(tmp_path / "pets" / "cow" / "1.png")
    before = (tmp_path / "run" / "data.json").read_bytes()
    with pytest.raises(KakusanError):
        DiffusionModel.fit(
            tmp_path / "pets", out=tmp_path / "run", resume=True, train={"steps": 4}
        )
    assert (tmp_path / "run" / "data.json").read_bytes() == before
    assert DiffusionModel.load(tmp_path / "run").sample(2, steps=2).shape == (2, 1, 8, 8)


def test_labels_can_be_left_out():
    config = configure(overrides=[*TINY, "train.steps=2", "model.labels=none"])
    model = DiffusionModel.fit(config, quiet=True)
    assert model.classes is None and model.sample(2, steps=2).shape == (2, 1, 8, 8)


def test_images_of_five_channels_are_drawn_by_their_first(tmp_path):
    x = torch.rand(60, 5, 8, 8)
    options = {"model": {"width": 16}, "train": {"steps": 1, "batch": 4}, "quiet": True}
    model = DiffusionModel.fit(x, out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "samples" / "step-1.png").exists()
    assert model.show(model.sample(3, steps=2), tmp_path / "x.png").exists()


def test_the_users_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    config = configure(overrides=[*TINY, "train.steps=2", "model.dropout=0.2"])
    DiffusionModel.fit(config, quiet=True).sample(2, steps=2)
    sde = kakusan.SDE.of(lambda x, t: -x, kakusan.Scale(1.0))
    kakusan.solve(sde, torch.ones(2, 1), kakusan.grids.uniform(0, 1, 3))
    assert torch.equal(torch.rand(1), expected)


def test_guidance_needs_samples_without_labels():
    config = configure(overrides=[*TINY, "train.steps=1", "model.label_dropout=0"])
    model = DiffusionModel.fit(config, quiet=True)
    with pytest.raises(UsageError, match="label_dropout=0"):
        model.sample(2, guidance=2.0)
    with pytest.raises(UsageError, match="no class to draw was named"):
        model.sample(2, label=[])
