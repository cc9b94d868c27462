"""The six-line door: `DiffusionModel` fits, samples, judges, saves and loads.

Samples are tensors in model units: images in [-1, 1], vectors and tables standardised. `decode`
takes them back to the units, columns and types of the data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kakusan import conditioning, densities, judging, pictures, sampling
from kakusan.core.trace import Trace
from kakusan.errors import KakusanError, UsageError
from kakusan.inference import judge, likelihood
from kakusan.inference.dequantise import Dequantiser, Variational
from kakusan.models.denoiser import Denoiser
from kakusan.objectives.chain import Variance
from kakusan.objectives.elbo import Bound
from kakusan.processes.observations import Observation
from kakusan.training import checkpoint, files, run
from kakusan.training.build import denoiser, resolved
from kakusan.training.config import Config, configure
from kakusan.training.data import Data, TableCodec, load, rows_of, statistics
from kakusan.training.data.codecs import Codec, codec_from_json, whole_cells
from kakusan.training.fit import fit
from kakusan.training.given import Array, again, of_array, wanted
from kakusan.training.placement import device_of
from kakusan.training.progress import progress


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
        learned: The variational dequantiser, once it was learned or read.
    """

    config: Config
    denoiser: Denoiser
    codec: Codec
    classes: tuple[str, ...] | None = None
    shares: tuple[float, ...] | None = None
    data: Data | None = None
    folder: Path | None = None
    report: dict[str, float] = field(default_factory=dict)
    learned: Variational | None = field(default=None, repr=False, compare=False)

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
        config, array = wanted(source, labels, options)
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
            data = of_array(config, array, labels, index, codec)
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
        if config.data.dequantise != "none":
            whole_cells(data.codec)  # refused where nothing is whole, before a folder is made
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
        set_ = self.config.sample
        steps = set_.steps if steps is None else steps
        noise = set_.noise if noise is None else noise
        guidance = set_.guidance if guidance is None else guidance
        how = sampling.Draw(n, steps, noise, seed, None, guidance, batch, keep)
        sampling.check(how, self.classes is not None, self.config.model.label_dropout > 0)
        how = how._replace(labels=self.labels(n, label, seed))
        return sampling.batches(self.denoiser, self.codec.shape, how)

    def labels(self, n: int, label: Any = None, seed: int = 0) -> Tensor | None:
        """The classes that `sample` with the same arguments draws, (n,); None without labels."""
        return sampling.labels(self.classes, self.shares, n, label, seed)

    def condition(
        self, observation: Observation, y: Any, n: int = 16, **options: Any
    ) -> conditioning.ConditionedSamples:
        """Draws n samples given that `observation` of them was y: see `conditioning.condition`."""
        return conditioning.condition(self, observation, y, n, **options)

    def trajectory(self, n: int = 8, **options: Any) -> Tensor:
        """The way from noise to data of n samples, (steps + 1, n, *shape)."""
        return torch.cat(list(self.batches(n, keep=True, **options)), 1)

    def to_data(self, x: Tensor, labels: Tensor | None = None) -> Any:
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

    # --- likelihoods and codes

    def log_prob(
        self,
        x: Tensor,
        *,
        label: int | str | Tensor | None = None,
        dequantise: str | Dequantiser | None = None,
        trace: Trace | None = None,
        tolerance: float = 1e-3,
        seed: int = 0,
        batch: int = 128,
        quiet: bool = True,
    ) -> densities.Likelihoods:
        """Log p(x) by the probability flow, in nats and in the units of the data.

        Arguments:
            x: Samples in model units, (n, *shape).
            label: Their class, or classes (n,), for log p(x | label).
            dequantise: Whole numbers have no density: `uniform` spreads each over its cell, for a
                bound on its mass; `variational` does so by noise that is learned once a run;
                `none` takes the density at the bare points. To be chosen where x holds whole
                numbers, unless the model was trained with `data.dequantise`.
            trace: How the divergence is found; exact in few dimensions, by two probes in many.
            tolerance: The error of a step of the solver, relative and absolute; of whole numbers,
                in units of their cells.
            seed: Fixes probes and dequantisation, sample by sample.
            batch: How many samples at a time.
            quiet: Whether to show no progress.

        Raises:
            UsageError: If x does not fit the model, or a choice is missing.
        """
        given = self._given(label, len(x))
        return densities.log_prob(self, x, given, dequantise, trace, tolerance, seed, batch, quiet)

    def elbo(
        self,
        x: Tensor,
        *,
        label: int | str | Tensor | None = None,
        dequantise: str | Dequantiser | None = None,
        steps: int | None = None,
        variance: Variance | None = None,
        times: int = 32,
        seed: int = 0,
        batch: int = 256,
    ) -> Bound:
        """A lower bound on log p(x), in nats and in the units of the data, term by term.

        Arguments:
            x: Samples in model units, (n, *shape).
            label: Their class, or classes (n,).
            dequantise: As in `log_prob`; by default as the model was trained, and for one trained
                without the mass that the decoder gives to each whole number.
            steps: The length of a chain (DDPM's bound, a term a step); without, the bound of
                infinitely many steps.
            variance: That of the model's steps in a chain: as `kakusan.bound` by default, or what
                was learned; `Analytic.matched(model.denoiser, data, chain)` is the best of all.
            times: How many levels to draw for each sample where the steps are infinitely many.
            seed: Fixes the noise of each sample.
            batch: How many samples at a time.
        """
        given = self._given(label, len(x))
        return densities.elbo(self, x, given, dequantise, steps, variance, times, seed, batch)

    def encode(self, x: Tensor, *, label: int | str | Tensor | None = None) -> Tensor:
        """The noise that the flow takes x to, standard normal if the model is good; like x."""
        return densities.carried(self, likelihood.encode, x, self._given(label, len(x)))

    def decode(self, z: Tensor, *, label: int | str | Tensor | None = None) -> Tensor:
        """The sample that the flow takes noise to: the inverse of `encode`; like z."""
        return densities.carried(self, likelihood.decode, z, self._given(label, len(z)))

    def interpolate(self, a: Tensor, b: Tensor, n: int = 8) -> Tensor:
        """Samples between a and b, (n, B, *shape), along the circle between their codes."""
        weight = next(self.denoiser.parameters())
        self._given(None, len(a))
        for x in (a, b):
            densities.check_values(x, self.codec)
        with torch.no_grad():
            return likelihood.interpolate(self.denoiser, a.to(weight), b.to(weight), n).cpu()

    def _given(self, label: Any, n: int) -> Tensor | None:
        """Classes (n,), where any were named."""
        return sampling.given(self.classes, n, label, self.config.model.label_dropout > 0)

    # --- judging

    def evaluate(
        self,
        n: int | None = None,
        *,
        data: Data | Array | str | None = None,
        features: str | None = None,
        seed: int = 0,
        limit: int = 5000,
        likelihoods: int = 64,
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
            likelihoods: Of how many held-out and training points to find the bits per dimension;
                0 for none.
            quiet: Whether to show no progress.
            **options: As in `sample`.
        """
        draw = functools.partial(self.sample, seed=seed, quiet=quiet, **options)
        data = self.data_of_run(data)
        return judging.evaluate(self, n, draw, data, features, seed, limit, likelihoods, quiet)

    def rows(self, source: str | None = None, n: int | None = None) -> tuple[Tensor, str]:
        """The samples that a source names, or the held-out ones, in model units; and a name.

        Arguments:
            source: What `fit` takes as a name or path; the run's held-out data by default.
            n: The first so many; all by default.
        """
        if n is not None and n < 1:
            raise UsageError(f"the number of rows must be at least 1, got {n}")
        if source is None:
            part, name = self.data_of_run().test, "held-out"
        else:
            part, name = rows_of(self.config.data, source, self.config.seed, self.codec)
        return part.batch(torch.arange(min(len(part), n or len(part))))[0], name

    def data_of_run(self, data: Data | Array | str | None = None) -> Data:
        """The data it was trained on, split and encoded as then; see `evaluate`."""
        if isinstance(data, Data):
            return data
        if data is None and self.data is not None:
            return self.data
        return again(self.config, data, self._held_out(), self.codec)

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
