"""From configuration to objects: the one place where strings become types."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from kakusan.errors import UsageError
from kakusan.models.denoiser import Denoiser
from kakusan.models.nets.mlp import MLP
from kakusan.models.nets.unet import UNet, unet_defaults
from kakusan.objectives import chain, decoders, matching, variational
from kakusan.processes import betas, linear
from kakusan.training.config import Config, ModelConfig, ObjectiveConfig, ProcessConfig, Section
from kakusan.training.data.codecs import Codec

WEIGHTS = {
    "uniform": matching.Uniform,
    "likelihood": matching.Likelihood,
    "snr": matching.SNR,
    "edm": matching.Karras,
}
TABLES = {"linear": betas.linear, "cosine": betas.cosine, "sigmoid": betas.sigmoid}
KNOTS = {
    "uniform": variational.Knots,
    "stratified": variational.StratifiedKnots,
    "importance": variational.WeightedKnots,
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
            return linear.VP.from_betas(TABLES[c.table](c.steps))


def objective(
    config: ObjectiveConfig,
    variance: str = "fixed",
    last: decoders.Decoder | None = None,
) -> matching.Denoising:
    """The loss.

    Arguments:
        config: Which, and how its times are drawn.
        variance: That of the reverse steps, fixed or learned.
        last: For the bound, log p(x_0 | x_1); `decoder` gives it.
    """
    if config.loss != "denoising":
        knots = KNOTS[config.times]()
        spread = chain.Interpolated() if variance == "learned" else chain.Small()
        match config.loss:
            case "simple":
                return variational.Simple(knots)
            case "vlb":
                return variational.Variational(spread, last, knots)
            case "hybrid":
                return variational.Hybrid(variance=spread, decoder=last, times=knots)
    weight = WEIGHTS[config.weight]()
    times: dict[str, matching.Times] = {
        "uniform": matching.UniformTimes(),
        "stratified": matching.Stratified(),
        "lognormal": matching.LogNormal(),
        "importance": matching.Importance(weight),
    }
    return matching.Denoising(weight, times[config.times])


def decoder(codec: Codec, dequantise: str = "none") -> decoders.Decoder:
    """Log p(x_0 | x_1) for data of a codec: of levels where they are integers, else a density."""
    cells = codec.cells
    if dequantise != "none" or not bool((cells > 0).any()):
        return decoders.GaussianDecoder()
    # pixels end at -1 and 1; whole numbers of a table end nowhere
    end = 1.0 if codec.kind == "images" else math.inf
    return decoders.DiscretisedGaussian(cells, -end, end)


def check(config: Config) -> None:
    """Refuses losses, variances and times that do not go together, and what a net has not."""
    loss, learned = config.objective.loss, config.model.variance == "learned"
    if config.model.fourier and config.model.net == "mlp":
        raise UsageError(
            f"model.fourier={config.model.fourier} is for model.net=unet; mlp has no such inputs"
        )
    if learned and config.process.name != "ddpm":
        raise UsageError(
            "model.variance=learned is that of the steps of a chain, which needs "
            f"process.name=ddpm; got process.name={config.process.name}"
        )
    if learned and loss in ("denoising", "simple"):
        raise UsageError(
            f"objective.loss={loss} teaches no variance; with model.variance=learned use "
            "objective.loss=hybrid or vlb"
        )
    if loss == "hybrid" and not learned:
        raise UsageError(
            "objective.loss=hybrid teaches the variance, and model.variance=fixed has none to "
            "teach; set model.variance=learned, or objective.loss=simple"
        )
    if loss != "denoising" and config.objective.weight != "uniform":
        raise UsageError(
            f"objective.weight={config.objective.weight} belongs to objective.loss=denoising; the "
            f"weights of objective.loss={loss} are its own"
        )
    if loss != "denoising" and config.objective.times not in KNOTS:
        raise UsageError(
            f"objective.times={config.objective.times} draws between the knots of a chain, where "
            f"objective.loss={loss} is not defined; use {', '.join(KNOTS)}"
        )


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
    outputs = 2 if config.variance == "learned" else 1
    if config.net == "mlp":
        return MLP(shape, config.width, config.blocks, classes, config.dropout, outputs)
    return UNet(
        shape[0],
        (shape[1], shape[2]),
        config.width,
        tuple(config.multipliers or ()),
        config.blocks,
        config.attention,
        classes,
        config.dropout,
        outputs * shape[0],
        fourier=tuple(config.fourier),
    )


def denoiser(config: Config, shape: tuple[int, ...], classes: int, data_std: float) -> Denoiser:
    """The network with its meaning; its first weights are a function of the seed."""
    check(config)
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
