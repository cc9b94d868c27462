"""Everything `evaluate` says about a model, in one record.

Each number stands beside its error bar, the number of samples it comes from, and its floor: the
same number for training data in the place of samples, which is what a perfect model would score.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kakusan.inference.features import Features, features_named
from kakusan.inference.levels import Levels, evenly, loss_by_level
from kakusan.inference.metrics import Row, compare
from kakusan.inference.metrics.comparison import Tick
from kakusan.models.denoiser import Denoiser
from kakusan.objectives.elbo import Bound


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: Each metric by name, with its floor.
        levels: The denoising loss by noise level, on held-out data.
        samples: The samples that were judged, (n, *shape), in model units.
        test: The held-out data they were judged against.
        bound: The variational bound on the likelihood of held-out data, where it was found.
    """

    metrics: dict[str, Row]
    levels: Levels
    samples: Tensor
    test: Tensor
    bound: Bound | None = None

    def to_json(self) -> dict[str, Any]:
        """Numbers alone, for a file."""
        levels = {
            "t": self.levels.t.tolist(),
            "angle": self.levels.angle.tolist(),
            "loss": self.levels.loss.tolist(),
            "std_error": self.levels.std_error.tolist(),
            "n": self.levels.n,
        }
        return {"metrics": {k: r._asdict() for k, r in self.metrics.items()}, "levels": levels}

    def __str__(self) -> str:
        lines = [f"{'':22}{'value':>12}{'+-':>11}{'floor':>12}{'+-':>11}{'n':>7}  measured on"]
        for name, r in self.metrics.items():
            words = name.replace("_", " ")
            lines.append(
                f"{words:22}{r.value:12.4g}{r.std_error:11.2g}{r.floor:12.4g}"
                f"{r.floor_std_error:11.2g}{r.n:7d}  {r.features}"
            )
        levels = self.levels
        spread = levels.std_error.square().sum().sqrt().item() / len(levels.t)
        lines.append(
            f"{'denoising loss':22}{levels.mean:12.4g}{spread:11.2g}{'':23}"
            f"{levels.n:7d}  {len(levels.t)} noise levels"
        )
        table = {"at angle, degrees": levels.angle, "loss": levels.loss, "+-": levels.std_error}
        for name, row in table.items():
            form = "8.0f" if name.startswith("at") else "#8.2g"
            lines.append(f"  {name:20}" + "".join(f"{value:{form}}" for value in row.tolist()))
        return "\n".join(lines)


def gather(source: Any, most: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """At most so many samples of a data source, drawn by seed, with their labels."""
    n = len(source)
    if n <= most:
        return source.batch(torch.arange(n))
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most]
    return source.batch(drawn.sort().values)


def features_of(name: str | None, train: Tensor, label: Tensor | None = None) -> Features:
    """A named feature map; by default pixels for vectors, a random network for images."""
    images = train.ndim == 4 and min(train.shape[2:]) >= 8
    return features_named(name or ("random-conv-0" if images else "pixels-pca64"), train, label)


def evaluate(
    model: Denoiser,
    samples: Tensor,
    test: Tensor,
    train: Tensor,
    label: Tensor | None = None,
    features: Features | None = None,
    seed: int = 0,
    limit: int = 5000,
    tick: Tick = lambda name: None,
) -> Evaluation:
    """Judges samples and their model against held-out data.

    Arguments:
        model: The denoiser, for its loss by noise level.
        samples: Its samples, (n, *shape).
        test: Held-out data, (M, *shape).
        train: Training data, (K, *shape).
        label: The labels of the held-out data, where the model knows labels.
        features: A feature map; that of `features_of` by default.
        seed: Draws subsets, directions and folds.
        limit: The most samples and held-out points to use.
        tick: Called before each measurement with its name.
    """
    named = features_of(None, train) if features is None else features
    metrics = compare(samples, test, train, named, seed, limit, tick)
    device = next(model.parameters()).device
    some = evenly(len(test), 1024)
    known = None if label is None else label[some].to(device)
    levels = loss_by_level(model, test[some].to(device), known, seed=seed)
    return Evaluation(metrics, levels, samples, test)
