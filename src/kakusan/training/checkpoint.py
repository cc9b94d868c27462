"""What a run needs to go on: checkpoints, as safetensors and JSON.

A run folder holds

* `config.json`: the configuration, resolved and complete; `data.json`: how data become numbers;
  `split.safetensors`: which samples are held out;
* `model.safetensors`: the weights that sample (the average);
* `checkpoints/step-N/`: `model`, `average` and `optimizer` as safetensors, and `state.json` with
  the step and the checksum of each file, so that damage is found before it is used;
* `metrics.jsonl`, `samples/`, `evaluation.json`.

No pickle is ever read or written.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kakusan.errors import KakusanError
from kakusan.training import files

PARTS = ("model", "average", "optimizer")


class Checkpoint(NamedTuple):
    """The tensors of one moment, by name."""

    step: int
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state under the names of the parameters: `exp_avg.weight`, ..."""
    return {
        f"{key}/{name}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        key, name = full.split("/", 1)
        p = parameters[name]
        if value.shape == p.shape:
            # the fused kernels walk moments and parameter alike, so their strides must agree
            value = torch.empty_like(p).copy_(value)
        optimizer.state[p][key] = value.to(p.device)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `checkpoints/step-N` whole, then removes all but the newest `keep`."""
    target = folder / "checkpoints" / f"step-{checkpoint.step}"
    # later steps are of a run that this one leaves behind; drafts, of one that was killed
    stale = [p for p in existing(folder) if int(p.name[5:]) > checkpoint.step]
    for old in (*stale, *target.parent.glob(".step-*.draft")):
        shutil.rmtree(old, ignore_errors=True)
    with files.whole(target) as draft:
        draft.mkdir()
        for part in PARTS:
            files.save_tensors(draft / f"{part}.safetensors", getattr(checkpoint, part))
        sums = {f"{p}.safetensors": files.checksum(draft / f"{p}.safetensors") for p in PARTS}
        files.write_json(draft / "state.json", {"step": checkpoint.step, "checksums": sums})
    for old in existing(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def existing(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def read(path: Path) -> Checkpoint:
    """One checkpoint, checked against its checksums."""
    state = files.read_json(path / "state.json")
    try:
        step, sums = int(state["step"]), dict(state["checksums"])
    except (KeyError, TypeError, ValueError):
        raise KakusanError(
            f"{path / 'state.json'} is damaged: step or checksums missing"
        ) from None
    for name, crc in sums.items():
        part = path / name
        if not part.is_file():
            raise KakusanError(f"{part} is missing")
        if files.checksum(part) != crc:
            raise KakusanError(f"{part} is damaged: its checksum does not match")
    return Checkpoint(step, *(files.read_tensors(path / f"{p}.safetensors") for p in PARTS))


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning and passed over.

    Raises:
        KakusanError: If there are checkpoints and none is whole.
    """
    found = existing(folder)
    for path in found:
        try:
            return read(path)
        except KakusanError as error:
            warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    if found:
        raise KakusanError(f"none of the {len(found)} checkpoints in {folder} is whole")
    return None
