r"""The trainer, from top to bottom.

A step reads its batch, draws its times and noise, minimises the objective, and moves the average.
All its randomness is a function of (seed, step, sample): nothing random is carried from step to
step, so a run that was killed and resumed equals one that was not, bit for bit on one machine.

Losses are checked before they can harm: a value that is not finite stops the run with the last
good checkpoint in place. Ctrl-C ends the step under way, writes a checkpoint, and stops.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kakusan.core.noise import Keyed, mix
from kakusan.errors import KakusanError
from kakusan.inference.levels import loss_by_level
from kakusan.models.denoiser import Denoiser
from kakusan.objectives.matching import Denoising
from kakusan.training import checkpoint as ckpt
from kakusan.training import files
from kakusan.training.batches import batches
from kakusan.training.build import decoder, objective
from kakusan.training.config import Config, TrainConfig
from kakusan.training.data import Data, statistics
from kakusan.training.data.codecs import whole_cells
from kakusan.training.ema import Average
from kakusan.training.placement import arrange, arranged, device_of, placed, precision
from kakusan.training.progress import progress

NOISE, TIMES, LABELS, DROPOUT, CELLS = 2, 3, 4, 5, 12  # separate the uses of one seed


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was written where there is a run folder."""

    def __init__(self, step: int, folder: Path | None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.folder = step, folder


class Fitted(NamedTuple):
    """What training returns: the average to sample with, the configuration as it was resolved."""

    model: Denoiser
    config: Config
    seconds: float
    loss: float


class Work(NamedTuple):
    """What changes while training, and the run it belongs to."""

    config: Config
    goal: Denoising
    model: Denoiser
    average: Average[Denoiser]
    optimizer: torch.optim.Optimizer
    first: int
    cells: Tensor | None


def fit(
    config: Config,
    model: Denoiser,
    data: Data,
    folder: Path | None = None,
    resume: ckpt.Checkpoint | None = None,
    on_eval: Callable[[int, Denoiser], None] | None = None,
    quiet: bool = False,
) -> Fitted:
    """Trains a denoiser.

    Arguments:
        config: The run, resolved; `auto` in its train section is decided here.
        model: The denoiser to train, in place.
        data: What to learn from, and the held-out part that is watched.
        folder: The run folder; None keeps nothing.
        resume: A checkpoint to go on from.
        on_eval: Called with (step, average) at each evaluation, to draw pictures.
        quiet: Whether to show no progress.

    Raises:
        KakusanError: If the loss is not finite, or the disk is full.
        Interrupted: At Ctrl-C, once the checkpoint is written.
    """
    work = _prepare(config, model, data, resume)
    train, average = work.config.train, work.average
    if folder is not None:
        files.write_json(folder / "config.json", work.config.model_dump())
    stream = batches(data.train, train.pace[0], config.seed, work.first)
    began, value = time.perf_counter(), math.nan
    with (
        Stop() as stop,
        Log(folder, work.first, train.tensorboard) as log,
        progress("train", train.steps, work.first, quiet) as advance,
        _own_dropout(work.config),
    ):
        for step in range(work.first, train.steps):
            seen = _descend(work, *next(stream), step)
            average.update(model, step)
            # read the wish once: a signal may come between any two lines
            done, stopping = step + 1, stop.asked
            last = stopping or done == train.steps
            if last or any(done % n == 0 for n in (train.log_every, train.save_every)):
                value, norm = seen.tolist()  # the only place that waits for the device
                if not math.isfinite(value + norm):
                    raise _not_finite(value, norm, done, folder)
                seconds = round(time.perf_counter() - began, 3)
                log.write(step=done, loss=value, lr=_rate(train, step), seconds=seconds)
                advance(done, f"loss {value:.4f}")
            if folder is not None and (last or done % train.save_every == 0):
                _save(folder, done, work)
            if stopping and done < train.steps:
                raise Interrupted(done, folder)
            if last or done % train.eval_every == 0:
                log.write(step=done, test_loss=test_loss(average.model, data, work.config))
                if on_eval is not None:
                    on_eval(done, average.model)
            advance(done)
    return Fitted(average.model, work.config, time.perf_counter() - began, value)


def _prepare(config: Config, model: Denoiser, data: Data, resume: ckpt.Checkpoint | None) -> Work:
    """Decides where to train and how, and picks up where a checkpoint left off."""
    device = device_of(config.train.device)
    model.to(device)
    size, lr = config.train.pace
    x, _ = next(batches(data.train, size, config.seed, 0))
    config = _with(config, config.train.model_copy(update={"device": str(device)}))
    x = x.to(device)
    last = decoder(data.codec, config.data.dequantise)
    goal = objective(config.objective, config.model.variance, last)

    def descend(way: TrainConfig) -> None:
        _backward(_with(config, way), goal, model, arranged(x, way.layout), None, 0)

    with _own_dropout(config):
        train = placed(config.train, model, x.ndim == 4, descend)
    config = _with(config, train)
    arrange(model, train.layout)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, weight_decay=train.weight_decay, fused=True
    )
    average, first = Average(model, train.ema), 0
    if resume is not None:
        model.load_state_dict(resume.model)
        average.model.load_state_dict(resume.average)
        ckpt.restore_optimizer(model, optimizer, resume.optimizer)
        first = resume.step
    if train.compile:
        model.net.compile()  # type: ignore[operator]
    cells = whole_cells(data.codec).to(x) if config.data.dequantise == "uniform" else None
    return Work(config, goal, model, average, optimizer, first, cells)


def _own_dropout(config: Config) -> AbstractContextManager:
    """Dropout draws from the global generator; the user's numbers stay as they were."""
    return torch.random.fork_rng(enabled=config.model.dropout > 0)


def _with(config: Config, train: TrainConfig) -> Config:
    return config.model_copy(update={"train": train})


def _descend(work: Work, x: Tensor, label: Tensor | None, step: int) -> Tensor:
    """One step of the optimiser; returns loss and norm of its gradient, (2,), on the device."""
    train, optimizer = work.config.train, work.optimizer
    device = torch.device(train.device)
    for group in optimizer.param_groups:
        group["lr"] = _rate(train, step)
    if work.config.model.dropout:
        # dropout draws from the global generator: give it the step's own stream
        torch.manual_seed(mix(work.config.seed, DROPOUT, step))
    x = x.to(device, non_blocking=True)
    if work.cells is not None:
        # uniform over the cell of each whole number: integers have no density of their own
        u = Keyed(work.config.seed, stream=CELLS).uniform(step, tuple(x.shape), x)
        x = x + (u - 0.5) * work.cells
    x = arranged(x, train.layout)
    if label is not None:
        used = work.config.model.labels != "none"
        label = label.to(device, non_blocking=True) if used else None
    loss = _backward(work.config, work.goal, work.model, x, label, step)
    norm = torch.nn.utils.clip_grad_norm_(work.model.parameters(), train.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((loss, norm))


def _backward(
    config: Config, goal: Denoising, model: Denoiser, x: Tensor, label: Tensor | None, step: int
) -> Tensor:
    """The mean loss with the step's own randomness, after its gradients were added up."""
    n = len(x)
    eps = arranged(
        Keyed(config.seed, stream=NOISE).normal(step, tuple(x.shape), x), config.train.layout
    )
    # times are drawn where the clock lives, in float64
    clock = torch.empty(0, dtype=torch.float64, device=x.device)
    t, importance = goal.times.draw(
        model, Keyed(config.seed, stream=TIMES).uniform(step, (n,), clock)
    )
    if label is not None:
        dropped = Keyed(config.seed, stream=LABELS).uniform(step, (n,), clock)
        label = label.masked_fill(dropped < config.model.label_dropout, -1)
    total = x.new_zeros(())
    size = -(-n // config.train.accumulate)
    for start in range(0, n, size):
        at = slice(start, start + size)
        with precision(x.device, config.train.precision):
            given = None if label is None else label[at]
            losses = goal.at(model, x[at], eps[at], t[at], given)
        loss = (importance[at].to(losses.dtype) * losses).sum() / n
        loss.backward()
        total += loss.detach()
    return total


def _rate(train: TrainConfig, step: int) -> float:
    """The learning rate: a linear warm-up, then constant or half a cosine down to zero."""
    _, lr = train.pace
    if step < train.warmup:
        return lr * (step + 1) / train.warmup
    if train.decay == "constant":
        return lr
    rest = (step - train.warmup) / max(1, train.steps - train.warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * rest))


def test_loss(model: Denoiser, data: Data, config: Config, most: int = 512) -> float:
    """The mean denoising loss over noise levels, on evenly spread held-out samples."""
    x, label = statistics.spread(data.test, most)
    device = next(model.parameters()).device
    if label is not None:
        used = data.classes is not None and config.model.labels != "none"
        label = label.to(device) if used else None
    return loss_by_level(model, x.to(device), label).mean


def _save(folder: Path, step: int, work: Work) -> None:
    """A checkpoint to go on from, then the weights to sample with."""
    tensors = ckpt.optimizer_tensors(work.model, work.optimizer)
    states = (work.model.state_dict(), work.average.model.state_dict(), tensors)
    ckpt.save(folder, ckpt.Checkpoint(step, *states), work.config.train.keep)
    files.write_tensors(folder / "model.safetensors", work.average.model.state_dict())


def _not_finite(value: float, norm: float, step: int, folder: Path | None) -> KakusanError:
    kept = ckpt.existing(folder)[:1] if folder is not None else []
    rest = f"; the last good checkpoint is {kept[0]}" if kept else ""
    return KakusanError(
        f"the loss is {value} and its gradient {norm} at step {step}{rest}; try a smaller "
        "train.lr, or train.precision=float32"
    )


class Stop:
    """Turns Ctrl-C and SIGTERM into a wish that the loop fulfils at the end of a step.

    A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # signals reach the main thread alone; elsewhere the caller has its own ways
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Log:
    """`metrics.jsonl`, a line an entry, and TensorBoard where it is asked for.

    Arguments:
        folder: The run folder, or None.
        first: The step to go on from: lines beyond it belong to work that was lost.
        tensorboard: Whether to write events as well.
    """

    def __init__(self, folder: Path | None, first: int, tensorboard: bool) -> None:
        self.file, self.board = None, None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["step"] <= first]
        with files.whole(path) as draft:
            draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a")
        if tensorboard:
            self.board = _tensorboard(folder)

    def write(self, step: int, **values: float) -> None:
        """Adds a line."""
        if self.file is not None:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
                self.file.flush()
            except OSError as error:
                raise files.said(error, Path(self.file.name)) from error
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that a kill cut short
        if isinstance(entry, dict) and "step" in entry:
            yield entry


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise KakusanError(
            'train.tensorboard needs the tensorboard package: pip install "kakusan[logging]"'
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
