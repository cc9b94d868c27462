"""One schema for the command line, `config.json` and YAML files.

A configuration is a frozen pydantic model in six sections. Every default is visible here; a file
or a `section.key=value` holds only the differences; an unknown key is an error that names the
nearest known one. Strings become objects in `build.py`, nowhere below.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from kakusan.errors import UsageError


class Section(BaseModel):
    """Frozen, complete and strict: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """What to learn from."""

    source: str = Field(
        default="digits", description="digits, a toy, a file, a folder, or hub:NAME"
    )
    test_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="held out where no test set exists"
    )
    size: int | None = Field(default=None, ge=4, description="side to bring images to, in pixels")
    fit: Literal["refuse", "crop", "resize", "pad"] = Field(
        default="refuse", description="what to do with images of another shape than size x size"
    )
    channels: Literal[1, 2, 3, 4] | None = Field(
        default=None,
        description="1 grey, 2 grey+alpha, 3 colour, 4 colour+alpha; default: as stored",
    )
    labels: str | None = Field(
        default=None, description="table column or npz key with class labels"
    )
    columns: list[str] | None = Field(
        default=None, description="table columns to learn; default: all"
    )
    missing: Literal["refuse", "drop", "impute"] = Field(
        default="refuse", description="table rows with missing values"
    )
    split: str = Field(default="train", description="hub data sets: the split to train on")
    column: str = Field(default="image", description="hub data sets: the column to learn")
    streaming: bool = Field(default=False, description="hub data sets: read while training")
    limit: int | None = Field(default=None, ge=2, description="use only the first so many samples")
    dequantise: Literal["none", "uniform"] = Field(
        default="none",
        description="uniform noise over the cell of each whole number: for likelihoods",
    )


class ProcessConfig(Section):
    """The forward SDE that turns data into noise."""

    name: Literal["vp", "subvp", "ve", "cosine", "rectified", "edm", "ddpm"] = "cosine"
    beta_min: float = Field(default=0.1, gt=0, description="vp, subvp")
    beta_max: float = Field(default=20.0, gt=0, description="vp, subvp")
    sigma_min: float = Field(default=0.002, gt=0, description="ve, edm")
    sigma_max: float = Field(default=80.0, gt=0, description="ve, edm")
    steps: int = Field(default=1000, ge=1, description="ddpm: length of the table of betas")
    table: Literal["linear", "cosine", "sigmoid"] = Field(
        default="linear", description="ddpm: the table of betas"
    )

    @model_validator(mode="after")
    def _rising(self) -> ProcessConfig:
        for low, high in (("beta_min", "beta_max"), ("sigma_min", "sigma_max")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} must lie below {high}={getattr(self, high)}"
                )
        return self


class ModelConfig(Section):
    """The network, and what it predicts."""

    net: Literal["auto", "unet", "mlp"] = "auto"
    predict: Literal["v", "epsilon", "x0", "edm", "score", "flow"] = "v"
    variance: Literal["fixed", "learned"] = Field(
        default="fixed", description="of reverse steps: learned takes twice the output channels"
    )
    width: int | None = Field(default=None, ge=8, description="channels (unet) or units (mlp)")
    multipliers: list[PositiveInt] | None = Field(
        default=None, min_length=1, description="unet: channels per level / width"
    )
    blocks: int | None = Field(
        default=None, ge=1, description="unet: residual blocks per level; mlp: layers"
    )
    attention: int = Field(default=8, ge=0, description="unet: self-attention at sides up to this")
    fourier: list[int] = Field(
        default=[], description="unet: sines of 2^n pi x beside x; 7,8 for likelihoods of 8 bits"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    labels: Literal["auto", "none"] = Field(
        default="auto", description="condition on labels where known"
    )
    label_dropout: float = Field(
        default=0.1, ge=0, le=1, description="for classifier-free guidance"
    )


class ObjectiveConfig(Section):
    """The loss: denoising score matching with a weight over time, or the bound of a chain."""

    loss: Literal["denoising", "simple", "vlb", "hybrid"] = Field(
        default="denoising", description="the last three are DDPM's, on the knots of the chain"
    )
    weight: Literal["uniform", "likelihood", "snr", "edm"] = "uniform"
    times: Literal["uniform", "stratified", "lognormal", "importance"] = "stratified"


class TrainConfig(Section):
    """The optimisation."""

    steps: int = Field(default=1500, ge=1)
    batch: int | None = Field(default=None, ge=1, description="default: 128 (unet), 512 (mlp)")
    accumulate: int = Field(
        default=1, ge=1, description="micro-batches a step; batch is their sum"
    )
    lr: float | None = Field(default=None, gt=0, description="default: 2e-3 (unet), 1e-3 (mlp)")
    warmup: int = Field(default=100, ge=0)
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of a gradient")
    ema: float = Field(default=0.999, ge=0, lt=1, description="decay of the weight average")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    compile: bool = False
    log_every: int = Field(default=50, ge=1)
    eval_every: int = Field(default=500, ge=1)
    save_every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1, description="how many checkpoints stay")
    tensorboard: bool = False

    @property
    def pace(self) -> tuple[int, float]:
        """Batch size and learning rate, once they are decided."""
        assert self.batch and self.lr, "resolve the configuration first"
        return self.batch, self.lr


class SampleConfig(Section):
    """Sampling, where a command does not say otherwise."""

    steps: int = Field(default=20, ge=1)
    noise: float = Field(
        default=0.0, ge=0, le=1, description="0: flow ODE; 1: Anderson's reverse SDE"
    )
    guidance: float = Field(
        default=1.0, ge=0, description="weight of the label; 1: plain conditional"
    )


class Config(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0)
    data: DataConfig = Field(default_factory=DataConfig)
    process: ProcessConfig = Field(default_factory=ProcessConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)


def configure(
    file: Path | None = None,
    overrides: list[str] | None = None,
    base: dict[str, Any] | None = None,
) -> Config:
    """A configuration from a base, a YAML file and `section.key=value` words; the last wins.

    Arguments:
        file: A YAML file that holds the differences from the defaults, by section.
        overrides: Words such as `train.steps=100` or `seed=3`; values are read as YAML.
        base: Where to start, instead of the defaults: a stored configuration, say.

    Raises:
        UsageError: For an unknown key (naming the nearest known one) or a value that does not fit.

    Example:
        >>> configure(overrides=["train.steps=10", "seed=3"]).train.steps
        10
    """
    tree: dict[str, Any] = {}
    if base is not None and not isinstance(base, dict):
        raise UsageError(f"a configuration holds sections with keys, not {type(base).__name__}")
    merge(tree, base or {})
    if file is not None:
        merge(tree, _read_yaml(file))
    for word in overrides or []:
        key, mark, value = word.partition("=")
        if not mark or not key:
            raise UsageError(
                f"{word!r} is no override; write section.key=value, as train.steps=100"
            )
        try:
            leaf: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"the value of {key} is not YAML: {value!r}") from None
        for name in reversed(key.strip().split(".")):
            leaf = {name: leaf}
        merge(tree, leaf)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_said(error)) from None


def merge(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Lays more settings over a tree of them, in place, and returns it."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value
    return tree


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UsageError(f"{file} must hold sections with keys, got {type(tree).__name__}")
    return tree or {}


def known_keys() -> list[str]:
    """Every key, as `section.key`."""
    keys = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def _said(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, as a sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys()
        # compare whole keys first; a bare key ("steps") is looked for in every section
        near = difflib.get_close_matches(key, [*known, *_sections()], 1, 0.6) or [
            k for k in known if difflib.get_close_matches(key, [k.split(".")[-1]], 1, 0.7)
        ]
        hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(_sections())}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "value_error":
        return f"{key}: {first['msg'].removeprefix('Value error, ')}"
    return f"{key} = {first['input']!r} does not fit: {first['msg'][0].lower()}{first['msg'][1:]}"


def _sections() -> list[str]:
    return list(Config.model_fields)
