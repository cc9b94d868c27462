"""From configuration to objects: the one place where strings become types."""

from __future__ import annotations

import torch
from torch import nn

from kakusan.models.denoiser import Denoiser
from kakusan.models.nets.mlp import MLP
from kakusan.models.nets.unet import UNet, unet_defaults
from kakusan.objectives import matching
from kakusan.processes import linear
from kakusan.training.config import Config, ModelConfig, ObjectiveConfig, ProcessConfig

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


def resolved(config: ModelConfig, shape: tuple[int, ...]) -> ModelConfig:
    """The network's size, filled in from the shape of the data where it was left open."""
    if config.net == "auto":
        config = config.model_copy(update={"net": "unet" if len(shape) == 3 else "mlp"})
    if config.net == "mlp":
        filled = {"width": config.width or 256, "blocks": config.blocks or 4}
    else:
        size = unet_defaults((shape[1], shape[2]))
        filled = {
            "width": config.width or size["width"],
            "multipliers": config.multipliers or list(size["multipliers"]),
            "blocks": config.blocks or 1,
        }
    return config.model_copy(update=filled)


def network(config: ModelConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network, from a resolved configuration."""
    if config.net == "mlp":
        return MLP(shape, config.width or 256, config.blocks or 4, classes, config.dropout)
    return UNet(
        shape[0],
        (shape[1], shape[2]),
        config.width or 32,
        tuple(config.multipliers or (1, 2, 2)),
        config.blocks or 1,
        config.attention,
        classes,
        config.dropout,
    )


def denoiser(config: Config, shape: tuple[int, ...], classes: int, data_std: float) -> Denoiser:
    """The network with its meaning; its first weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = network(config.model, shape, classes)
    return Denoiser(net, process(config.process), config.model.predict, data_std)
