"""The six-line door: `DiffusionModel` fits, samples, judges, saves and loads.

Samples are tensors in model units: images in [-1, 1], vectors and tables standardised. `decode`
takes them back to the units, columns and types of the data.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kakusan import pictures
from kakusan.core.noise import Keyed
from kakusan.errors import KakusanError, UsageError
from kakusan.inference import judge
from kakusan.inference.metrics.comparison import MEASUREMENTS
from kakusan.models.denoiser import Denoiser
from kakusan.solvers.exponential import generate
from kakusan.training import checkpoint, files, run
from kakusan.training.build import denoiser, resolved
from kakusan.training.config import Config, configure
from kakusan.training.data import (
    Codec,
    Data,
    Stream,
    TableCodec,
    as_data,
    codec_from_json,
    load,
    statistics,
)
from kakusan.training.fit import fit
from kakusan.training.placement import device_of
from kakusan.training.progress import progress

START, PATH, CLASS = 6, 7, 8  # separate the uses of one seed
ARRAY = "array"  # what a configuration names data that came as a tensor or array
LEAST = 12  # samples that the metrics need, on each side
Array = Tensor | np.ndarray


@dataclass
class DiffusionModel:
    """A trained denoiser, and what its numbers mean.

    Attributes:
        config: The run it comes from, resolved and complete.
        denoiser: The network with its process; in evaluation mode.
        codec: How data become numbers and back.
        classes: The names of the labels, or None.
        shares: The share of each label in the training data.
        data: What it was trained on, where that is at hand.
        folder: The run folder it was read from, where there is one.
        report: What training had to say: seconds, loss.
    """

    config: Config
    denoiser: Denoiser
    codec: Codec
    classes: tuple[str, ...] | None = None
    shares: tuple[float, ...] | None = None
    data: Data | None = None
    folder: Path | None = None
    report: dict[str, float] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        source: str | Path | Array | Config = "digits",
        labels: Any = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        quiet: bool = False,
        **options: Any,
    ) -> DiffusionModel:
        """Trains a model.

        Arguments:
            source: A name (`digits`, `two-moons`), a file or folder, a tensor, an array, or a
                whole `Config`.
            labels: Class labels of a tensor or array, one a sample.
            out: A run folder to keep checkpoints, metrics and pictures in.
            resume: Whether to go on with the run in `out`.
            quiet: Whether to show no progress.
            **options: Sections of the configuration: `train={"steps": 500}`, `seed=3`.

        Example:
            >>> model = DiffusionModel.fit(
            ...     torch.randn(200, 2), train={"steps": 2, "batch": 16}, quiet=True
            ... )
            >>> model.sample(3, seed=0).shape
            torch.Size([3, 2])
        """
        config, array = _wanted(source, labels, options)
        folder, point = None if out is None else Path(out), None
        if resume:
            if folder is None:
                raise UsageError("resume needs out, the run folder to go on with")
            config, point = run.resumed(folder, config), checkpoint.newest(folder)
        elif folder is not None and run.holds_run(folder):
            raise UsageError(
                f"{folder} already holds a run; go on with it by --resume --out {folder}, choose "
                "another --out, or remove it"
            )
        if point and point.step >= config.train.steps:
            raise UsageError(
                f"{folder} has been trained for {point.step} steps already, and train.steps is "
                f"{config.train.steps}; set it higher to go on"
            )
        index, codec = run.stored(folder) if folder and point else (None, None)
        if array is None:
            data = load(config.data, config.seed, index, codec)
        else:
            data = _of_array(config, array, labels, index, codec)
        return cls._fit(config, data, folder, point, quiet)

    @classmethod
    def _fit(
        cls,
        config: Config,
        data: Data,
        folder: Path | None,
        point: checkpoint.Checkpoint | None,
        quiet: bool,
    ) -> DiffusionModel:
        shape, names = data.codec.shape, data.classes if config.model.labels == "auto" else None
        config = resolved(config, shape)
        if folder is not None and point is not None:
            # what the network was built for, not what the data would say today
            record = run.described(folder)
            run.same_classes(record["classes"], names, folder)
            rms, shares = record["rms"], record["shares"]
        else:
            rms = statistics.rms(data)
            shares = statistics.shares(data, len(names)) if names else None
        net = denoiser(config, shape, len(names or ()), rms)
        model = cls(config, net, data.codec, names, shares, data, folder)
        if folder is not None and point is None:
            model._describe(folder)

        def draw(step: int, average: Denoiser) -> None:
            if folder is None:
                return
            # a few samples of the average, beside nothing else: how far along are we
            now = DiffusionModel(config, average, data.codec, names, model.shares)
            path = folder / "samples" / f"step-{step}.png"
            try:
                now.show(now.sample(64, seed=config.seed), path)
            except KakusanError as error:  # a picture is not worth a run
                warnings.warn(f"no picture at step {step}: {error}", stacklevel=2)

        done = fit(config, model.denoiser, data, folder, point, draw, quiet)
        model.config, model.denoiser = done.config, done.model
        model.report = {"seconds": round(done.seconds, 2), "loss": done.loss}
        return model

    # --- sampling

    def sample(
        self,
        n: int = 64,
        *,
        steps: int | None = None,
        noise: float | None = None,
        seed: int = 0,
        label: int | str | list[int | str] | None = None,
        guidance: float | None = None,
        batch: int = 256,
        quiet: bool = True,
    ) -> Tensor:
        """Draws n samples, (n, *shape), in model units and on the CPU.

        Sample i of a seed is the same for every n and batch, up to the rounding of the network's
        kernels.

        Arguments:
            n: How many.
            steps: Evaluations of the network a sample.
            noise: 0 follows the probability flow, 1 Anderson's reverse SDE.
            seed: Fixes every sample.
            label: A class, by name or index, or a list that is repeated; by default classes are
                drawn as often as the data has them.
            guidance: The weight of the label; 1 is plain conditional sampling.
            batch: How many at a time: it bounds the memory.
            quiet: Whether to show no progress.
        """
        parts = self.batches(
            n, steps=steps, noise=noise, seed=seed, label=label, guidance=guidance, batch=batch
        )
        done, xs = 0, []
        with progress("sample", n, quiet=quiet) as advance:
            for x in parts:
                xs.append(x)
                done += len(x)
                advance(done)
        return torch.cat(xs)

    def batches(
        self,
        n: int,
        *,
        steps: int | None = None,
        noise: float | None = None,
        seed: int = 0,
        label: int | str | list[int | str] | None = None,
        guidance: float | None = None,
        batch: int = 256,
        keep: bool = False,
    ) -> Iterator[Tensor]:
        """The batches of `sample` one after the other; with `keep`, their whole paths.

        Kept paths are (steps + 1, b, *shape), from noise to data.
        """
        if n < 1 or batch < 1 or (steps is not None and steps < 1):
            raise UsageError(f"n, batch and steps must be at least 1, got {n}, {batch}, {steps}")
        set_ = self.config.sample
        steps, noise = steps or set_.steps, set_.noise if noise is None else noise
        guidance = set_.guidance if guidance is None else guidance
        if not 0 <= noise <= 1 or not 0 <= guidance < float("inf"):
            raise UsageError(
                f"noise must lie between 0 and 1 and guidance be at least 0, got {noise} and "
                f"{guidance}"
            )
        if guidance != 1 and self.classes is None:
            raise UsageError(f"guidance {guidance} needs labels, and this model knows none")
        if guidance != 1 and self.config.model.label_dropout == 0:
            raise UsageError(
                f"guidance {guidance} needs a model that has seen samples without label, and this "
                "one was trained with model.label_dropout=0"
            )
        wanted = self.labels(n, label, seed)
        return self._batches(n, steps, noise, seed, wanted, guidance, batch, keep)

    @torch.no_grad()
    def _batches(
        self,
        n: int,
        steps: int,
        noise: float,
        seed: int,
        labels: Tensor | None,
        guidance: float,
        batch: int,
        keep: bool,
    ) -> Iterator[Tensor]:
        process, net = self.denoiser.process, self.denoiser
        like = torch.empty(0, device=next(net.parameters()).device)
        end = torch.tensor(process.span[1], dtype=torch.float64)
        # x_T has the variance of its kernel and what is left of the data's
        size = torch.hypot(process.sigma(end), process.alpha(end) * net.data_std).item()
        for i in range(0, n, batch):
            shape = (min(batch, n - i), *self.codec.shape)
            x1 = size * Keyed(seed, i, START).normal(0, shape, like)
            given = None if labels is None else labels[i : i + batch].to(like.device)
            score = net.given(given, guidance)
            yield generate(process, score, x1, steps, noise, Keyed(seed, i, PATH), keep).cpu()

    def labels(self, n: int, label: Any = None, seed: int = 0) -> Tensor | None:
        """The classes that `sample` with the same arguments draws, (n,); None without labels."""
        if self.classes is None or self.shares is None:
            if label is not None:
                raise UsageError("this model was trained without labels, so it cannot follow one")
            return None
        if label is None:
            shares = torch.tensor(self.shares, dtype=torch.float64)
            u = Keyed(seed, 0, CLASS).uniform(0, (n,), shares)
            return torch.searchsorted(shares.cumsum(0), u).clamp(max=len(self.classes) - 1)
        wanted = label if isinstance(label, (list, tuple)) else [label]
        if not wanted:
            raise UsageError(f"no class to draw was named; this model knows {self._known}")
        index = torch.tensor([self._class(w) for w in wanted])
        return index.repeat(-(-n // len(index)))[:n]

    def _class(self, name: int | str) -> int:
        names = self.classes or ()
        if str(name) in names:
            return names.index(str(name))
        if str(name).isdigit() and int(name) < len(names):
            return int(name)
        raise UsageError(f"no class {name!r}; this model knows {self._known}")

    @property
    def _known(self) -> str:
        return ", ".join(self.classes or ())

    def trajectory(self, n: int = 8, **options: Any) -> Tensor:
        """The way from noise to data of n samples, (steps + 1, n, *shape)."""
        return torch.cat(list(self.batches(n, keep=True, **options)), 1)

    def decode(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Samples in the data's own units: integer pixels, numbers, or a table.

        Arguments:
            x: Samples, (n, *shape).
            labels: Their classes, (n,); a table gets its label column back.
        """
        decoded = self.codec.decode(x)
        if isinstance(self.codec, TableCodec) and labels is not None:
            return self.codec.with_labels(decoded, labels)
        return decoded

    def show(self, x: Tensor, path: str | Path) -> Path:
        """Draws samples, (n, *shape), or a trajectory, (steps + 1, n, *shape), to a PNG."""
        path = Path(path)
        if x.ndim == len(self.codec.shape) + 2:
            return pictures.trajectories(x, self.codec, path)
        return pictures.samples(x, self.codec, path)

    # --- judging

    def evaluate(
        self,
        n: int | None = None,
        *,
        data: Data | Array | str | None = None,
        features: str | None = None,
        seed: int = 0,
        limit: int = 5000,
        quiet: bool = True,
        **options: Any,
    ) -> judge.Evaluation:
        """Compares samples with held-out data, beside the floor: training data in their place.

        Arguments:
            n: How many samples; as many as there are held-out data by default, at most `limit`.
            data: Where the run's own data are now, if they have moved, or the array again that
                the model was trained on; or other data, as `Data`.
            features: A named feature map; see `kakusan.inference.features`.
            seed: Fixes samples, subsets and directions.
            limit: The most samples, held-out and training points to use.
            quiet: Whether to show no progress.
            **options: As in `sample`.
        """
        data = self._data(data)
        test, label = judge.gather(data.test, limit, seed)
        n = len(test) if n is None else n
        if min(n, len(test), limit) < LEAST:
            raise UsageError(
                f"the metrics need at least {LEAST} samples and held-out points, got n={n} and "
                f"{len(test)} held-out points"
            )
        if isinstance(data.train, Stream):
            train, train_label = statistics.first(data.train, limit)
        else:
            # enough to find copies in, but never more than a gigabyte
            most = max(limit, min(20 * n, 250_000_000 // test[0].numel()))
            train, train_label = judge.gather(data.train, most, seed)
        # a wrong name should not cost the time of sampling
        named = judge.features_of(features, train, train_label)
        x = self.sample(n, seed=seed, quiet=quiet, **options)
        known = label if self.classes else None
        with progress("measure", MEASUREMENTS, quiet=quiet) as advance:
            count = itertools.count()
            found = judge.evaluate(
                self.denoiser, x, test, train, known, named, seed, limit,
                tick=lambda name: advance(next(count), name),
            )  # fmt: skip
            advance(MEASUREMENTS)
            return found

    def _data(self, data: Data | Array | str | None) -> Data:
        """The data to be judged by, split and encoded as in training."""
        if isinstance(data, Data):
            return data
        if data is None and self.data is not None:
            return self.data
        index = self._held_out()
        if isinstance(data, Array):
            return _of_array(self.config, data, None, index, self.codec)
        section = self.config.data
        if data is not None:
            section = section.model_copy(update={"source": str(data)})
        if section.source == ARRAY:
            raise UsageError("this model was trained on an array, which no run folder keeps; "
                             "give it again as evaluate(data=...)")  # fmt: skip
        return load(section, self.config.seed, index, self.codec)

    def _held_out(self) -> Tensor | None:
        """The numbers of the samples that were kept from training, where they are known."""
        if self.data is not None:
            return self.data.test_index
        return run.stored(self.folder)[0] if self.folder is not None else None

    # --- files

    def _describe(self, folder: Path) -> None:
        files.write_json(folder / "config.json", self.config.model_dump())
        index = self._held_out() if self.data is not None or self.folder != folder else None
        if index is not None:
            files.write_tensors(folder / "split.safetensors", {"test": index})
        record = {
            "codec": self.codec.to_json(),
            "classes": self.classes,
            "shares": self.shares,
            "rms": self.denoiser.data_std,
        }
        files.write_json(folder / "data.json", record)

    def save(self, folder: str | Path) -> Path:
        """Writes what `load` needs: configuration, codec, split and weights."""
        folder = Path(folder)
        self._describe(folder)
        files.write_tensors(folder / "model.safetensors", self.denoiser.state_dict())
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> DiffusionModel:
        """Reads a run folder; the data are looked up when `evaluate` needs them.

        Raises:
            KakusanError: If a file is missing or damaged, or the weights do not fit.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise KakusanError(f"there is no run folder {folder}; kakusan train makes one")
        if not (folder / "config.json").is_file():
            raise KakusanError(f"{folder} is no run folder: it holds no config.json")
        config = configure(base=files.read_json(folder / "config.json"))
        record = run.described(folder)
        codec = codec_from_json(record["codec"])
        names, shares = (tuple(record[k]) if record[k] else None for k in ("classes", "shares"))
        net = denoiser(config, codec.shape, len(names or ()), record["rms"])
        run.load_weights(net, folder)
        net = net.eval().requires_grad_(False).to(device_of(device))
        return cls(config, net, codec, names, shares, folder=folder)


def _of_array(
    config: Config, array: Array, labels: Any, index: Tensor | None, codec: Codec | None
) -> Data:
    """An array, split and encoded as the configuration says, or as a run did before."""
    share = config.data.test_fraction
    return as_data(
        array, labels, test_fraction=share, seed=config.seed, test_index=index, codec=codec
    )


def _wanted(source: Any, labels: Any, options: dict[str, Any]) -> tuple[Config, Array | None]:
    """The configuration and, where the data came as one, the array."""
    if isinstance(source, Config):
        if options:
            raise UsageError(f"a Config leaves no room for {', '.join(options)}; put them into it")
        return source, None
    if isinstance(source, (str, Path)):
        name, array = str(source), None
    elif isinstance(source, Array):
        name, array = ARRAY, source
    else:
        raise UsageError(
            f"fit learns from a name, a path, a tensor, an array or a Config, not from "
            f"{type(source).__name__}; torch.as_tensor(...) makes a tensor of it"
        )
    if labels is not None and array is None:
        raise UsageError(f"labels go with a tensor or array; for {name} set data.labels")
    config = configure(base=options)
    given = config.data.model_fields_set - {"test_fraction"}
    if array is not None and given:
        raise UsageError(f"data.{min(given)} does not apply to a tensor or array")
    section = config.data.model_copy(update={"source": name})
    return config.model_copy(update={"data": section}), array
