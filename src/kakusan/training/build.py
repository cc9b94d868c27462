"""From configuration to objects: the one place where strings become types."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kakusan.errors import UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.models.nets.mlp import MLP
from kakusan.models.nets.unet import UNet, unet_defaults
from kakusan.objectives import matching
from kakusan.processes import linear
from kakusan.training.config import Config, ModelConfig, ObjectiveConfig, ProcessConfig, Section

WEIGHTS = {
    "uniform": matching.Uniform,
    "likelihood": matching.Likelihood,
    "snr": matching.SNR,
    "edm": matching.Karras,
}


def process(config: ProcessConfig) -> linear.LinearSDE:
    """The forward SDE.

    Example:
        >>> process(ProcessConfig(name="vp"))
        VP(beta_min=0.1, beta_max=20.0, span=(0.001, 1.0))
    """
    c = config
    match c.name:
        case "vp":
            return linear.VP(c.beta_min, c.beta_max)
        case "subvp":
            return linear.SubVP(c.beta_min, c.beta_max)
        case "ve":
            return linear.VE(c.sigma_min, c.sigma_max)
        case "edm":
            return linear.EDM((c.sigma_min, c.sigma_max))
        case "cosine":
            return linear.Cosine()
        case "rectified":
            return linear.Rectified()
        case "ddpm":
            # the usual 1000-step table, stretched so that any length ends in the same noise
            first, last = (min(b * 1000 / c.steps, 0.999) for b in (1e-4, 2e-2))
            betas = torch.linspace(first, last, c.steps, dtype=torch.float64)
            return linear.VP.from_betas(betas)


def objective(config: ObjectiveConfig) -> matching.Denoising:
    """The loss."""
    weight = WEIGHTS[config.weight]()
    times: dict[str, matching.Times] = {
        "uniform": matching.UniformTimes(),
        "stratified": matching.Stratified(),
        "lognormal": matching.LogNormal(),
        "importance": matching.Importance(weight),
    }
    return matching.Denoising(weight, times[config.times])


def resolved(config: Config, shape: tuple[int, ...]) -> Config:
    """The configuration with what was left open filled in, from the shape of the data.

    Example:
        >>> done = resolved(Config(), (2,))
        >>> done.model.net, done.model.width, done.train.batch
        ('mlp', 256, 512)
    """
    model, train = config.model, config.train
    net = model.net if model.net != "auto" else "unet" if len(shape) == 3 else "mlp"
    if net == "unet" and len(shape) != 3:
        raise UsageError(f"model.net=unet needs images, and a sample here has shape {shape}")
    if net == "mlp":
        size: dict[str, Any] = {"width": 256, "blocks": 4}
        pace = {"batch": 512, "lr": 1e-3}
    else:
        size = {"blocks": 1, **unet_defaults((shape[1], shape[2]))}
        size["multipliers"] = list(size["multipliers"])
        pace = {"batch": 128, "lr": 2e-3}
    return config.model_copy(
        update={
            "model": model.model_copy(update={"net": net, **_open(model, size)}),
            "train": train.model_copy(update=_open(train, pace)),
        }
    )


def _open(section: Section, defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults of those keys that nobody set."""
    return {key: value for key, value in defaults.items() if getattr(section, key) is None}


def network(config: ModelConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network, from a resolved configuration."""
    assert config.width and config.blocks, "resolve the configuration first"
    if config.net == "mlp":
        return MLP(shape, config.width, config.blocks, classes, config.dropout)
    return UNet(
        shape[0],
        (shape[1], shape[2]),
        config.width,
        tuple(config.multipliers or ()),
        config.blocks,
        config.attention,
        classes,
        config.dropout,
    )


def denoiser(config: Config, shape: tuple[int, ...], classes: int, data_std: float) -> Denoiser:
    """The network with its meaning; its first weights are a function of the seed."""
    kind, ends = config.model.predict, config.process.name
    if kind in ("epsilon", "score") and ends in ("cosine", "rectified"):
        raise UsageError(
            f"model.predict={kind} says nothing about the data where alpha is almost 0, and there "
            f"process.name={ends} starts its samples; use model.predict=v, or process.name=vp"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = network(config.model, shape, classes)
    return Denoiser(net, process(config.process), config.model.predict, data_std)
