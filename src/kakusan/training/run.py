"""The files of a run folder that make a model whole again: see `checkpoint` for the list."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from kakusan.errors import KakusanError, UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.training import checkpoint, files
from kakusan.training.config import Config, configure, merge
from kakusan.training.data import Codec, codec_from_json


def described(folder: Path) -> dict[str, Any]:
    """What `data.json` of a run holds, complete."""
    path = folder / "data.json"
    record = files.read_json(path)
    missing = {"codec", "classes", "shares", "rms"} - set(record)
    if missing:
        raise KakusanError(f"{path} is damaged: it has no {' and no '.join(sorted(missing))}")
    return record


def same_classes(before: list[str] | None, now: tuple[str, ...] | None, folder: Path) -> None:
    """Refuses data whose classes are not those that a run was started with."""
    if list(before or ()) != list(now or ()):
        raise KakusanError(
            f"the data have the classes {', '.join(now or ()) or '(none)'}, but {folder} was "
            f"started with {', '.join(before or ()) or '(none)'}; a run goes on with its own data"
        )


def load_weights(net: Denoiser, folder: Path) -> None:
    """Reads the weights that sample; damaged ones are named and a checkpoint takes their place."""
    path = folder / "model.safetensors"
    try:
        weights = files.read_tensors(path)
    except KakusanError as error:
        point = checkpoint.newest(folder)
        if point is None:
            raise
        warnings.warn(f"{error}; using the checkpoint of step {point.step}", stacklevel=3)
        weights = point.average
    own = net.state_dict()
    for name in (*own, *weights):
        here, there = (tuple(w[name].shape) if name in w else "missing" for w in (weights, own))
        if here != there:
            raise KakusanError(
                f"{path} does not fit the network of config.json: {name} is {here}, not {there}"
            )
    net.load_state_dict(weights)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds weights that a new run would destroy."""
    return (folder / "model.safetensors").exists() or bool(checkpoint.existing(folder))


def resumed(folder: Path, asked: Config) -> Config:
    """The stored configuration of a run, with what was asked for, which must leave it that run.

    Arguments:
        folder: The run folder.
        asked: A configuration; only what was set in it explicitly counts.

    Raises:
        KakusanError: There is no run here, or none that can go on.
        UsageError: More than the train and sample sections would change.
    """
    if not (folder / "config.json").is_file():
        raise KakusanError(f"there is no run to resume in {folder}; start it without --resume")
    before = configure(base=files.read_json(folder / "config.json"))
    now = configure(
        base=merge(before.model_dump(), asked.model_dump(exclude_unset=True, exclude_none=True))
    )
    for name in type(now).model_fields:
        if name not in ("train", "sample") and getattr(now, name) != getattr(before, name):
            raise UsageError(
                f"{name} cannot change when a run resumes; train and sample can, anything else is "
                "a new run: use another --out"
            )
    if not checkpoint.existing(folder) and (folder / "model.safetensors").exists():
        raise KakusanError(
            f"{folder} holds a model but no checkpoint that training could go on from"
        )
    return now


def stored(folder: Path) -> tuple[Tensor | None, Codec]:
    """The split and the codec that a run folder keeps."""
    record = described(folder)
    split = folder / "split.safetensors"
    index = files.read_tensors(split)["test"] if split.exists() else None
    return index, codec_from_json(record["codec"])
