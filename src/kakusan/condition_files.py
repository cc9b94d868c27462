"""Learned conditions in files: one safetensors file holds all that was learned, and no code.

A file holds the network, the principal axes and how far each step is trusted. The model and the
observation are given again when it is read; what was seen is no part of it, since a tilt serves
all values. What is read draws the samples of what was written, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from kakusan.errors import KakusanError
from kakusan.inference.guidance.axes import Axes
from kakusan.inference.guidance.learned import AtEnd, ReverseChain, ShiftTilt
from kakusan.learned_conditions import (
    Learned,
    LearnedCondition,
    Report,
    chain_of,
    learn_condition,
)
from kakusan.models.bridgenet import BridgeNet
from kakusan.processes.observations import Observation
from kakusan.training import files

if TYPE_CHECKING:
    from kakusan.pipeline import DiffusionModel

HEADER = "kakusan.LearnedCondition"


def save_condition(
    learned: LearnedCondition, path: str | Path, about: dict[str, Any] | None = None
) -> None:
    """Writes what was learned to one safetensors file, whole or not at all.

    The model and the observation are given again when it is read.

    Arguments:
        learned: What `learn_condition` returned.
        path: The file.
        about: Words about it; where it is read with other words it is refused.
    """
    tilt, how = learned.tilt, learned.how
    assert tilt.axes is not None
    tensors = {f"axes.{name}": v for name, v in tilt.axes._asdict().items()}
    tensors |= {"grid": tilt.chain.whole.grid, "trust": tilt.trust}
    if tilt.net is not None:
        tensors |= {f"net.{name}": v for name, v in tilt.net.state_dict().items()}
    header = {
        "how": {f.name: getattr(how, f.name) for f in dataclasses.fields(how)} | {
            "goal": repr(how.goal)},
        "told": tilt.net.told if tilt.net is not None else None,
        "report": None if learned.report is None else learned.report._asdict(),
        "observation": repr(learned.observation), "about": about or {},
    }  # fmt: skip
    files.write_tensors(Path(path), tensors, {HEADER: json.dumps(header)})


def load_condition(
    path: str | Path, model: DiffusionModel | ReverseChain, observation: Observation,
    how: Learned | None = None, *, about: dict[str, Any] | None = None,
    label: int | str | None = None, guidance: float = 1.0,
) -> LearnedCondition:  # fmt: skip
    """Reads what `save_condition` wrote; its samples are the same, bit for bit.

    Arguments:
        path: The file.
        model: The model, or the chain, that it was learned for.
        observation: What is seen.
        how: How it was learned.
        about: The words it was written with.
        label: The class it was learned for.
        guidance: The weight of that label.

    Raises:
        KakusanError: If the file is missing or damaged, or was learned for something else.
    """
    path, how = Path(path), how or Learned()
    tensors = files.read_tensors(path)
    with safetensors.safe_open(path, "pt") as handle:
        header = json.loads((handle.metadata() or {}).get(HEADER, "{}"))
    if "how" not in header:
        raise KakusanError(f"{path} holds no learned condition")
    chain = model if isinstance(model, ReverseChain) else chain_of(
        model, how.steps, label, guidance
    )  # fmt: skip
    asked = {f.name: getattr(how, f.name) for f in dataclasses.fields(how)}
    asked = asked | {"goal": repr(how.goal)}
    for word, then, now in (("observation", header["observation"], repr(observation)),
                            ("settings", header["how"], asked),
                            ("words", header["about"], about or {})):  # fmt: skip
        if then != now:
            raise KakusanError(f"{path} was learned for other {word}: {then}, not {now}")
    if not torch.equal(tensors["grid"], chain.whole.grid):
        raise KakusanError(f"{path} was learned on other steps than these {len(chain) + 1}")
    axes = Axes(*(tensors[f"axes.{name}"] for name in Axes._fields)).to(chain.like.device)
    net, q = None, axes.Q.shape[1]
    if header["told"] is not None:
        with torch.random.fork_rng(devices=[]):  # the first weights of a network are drawn
            net = BridgeNet((q,), (q,), (0.0, 1.0), torch.zeros(1, q),
                            torch.zeros(1, header["told"]), how.width, how.depth)  # fmt: skip
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k[:4] == "net."})
        net = net.to(chain.like.device).eval().requires_grad_(False)
    tilt = ShiftTilt(chain, AtEnd(observation, chain), axes, net, tensors["trust"])
    report = None if header["report"] is None else Report(**header["report"])
    return LearnedCondition(tilt, how, report)


def kept_condition(
    folder: Path, model: DiffusionModel, observation: Observation, how: Learned, words: str, *,
    label: int | str | None = None, guidance: float = 1.0, quiet: bool = True,
) -> tuple[LearnedCondition, bool]:  # fmt: skip
    """What was learned of a run for the same words, from its file, or else learned and written.

    Arguments:
        folder: The run; files go to its folder `conditions`.
        model: Its model.
        observation: What is seen.
        how: How it is learned.
        words: What is seen, in words that stand for it alone.
        label: A class the model was trained with.
        guidance: The weight of that label.
        quiet: Whether to show no progress.
    """
    about = {"words": words, "model": files.checksum(folder / "model.safetensors"),
             "label": None if label is None else str(label), "guidance": guidance}  # fmt: skip
    key = zlib.crc32(json.dumps([about, repr(how)]).encode())
    path = folder / "conditions" / f"{key:08x}.safetensors"
    if path.exists():
        return load_condition(path, model, observation, how, about=about, label=label,
                              guidance=guidance), True  # fmt: skip
    learned = learn_condition(model, observation, how, label=label, guidance=guidance, quiet=quiet)
    save_condition(learned, path, about)
    return learned, False
