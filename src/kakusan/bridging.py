"""Paths from a start to what was seen of their end: asked for, learned or read, drawn, compared.

`bridged` is what `kakusan bridge` does. A trial of free paths says whether any come near what was
seen. Where they do, one tilt is learned for all values that they come to; where they do not, paths
are drawn towards this one value and learned from by their weights. Then paths are drawn with
importance weights, and compared with the few of very many free paths that came near by themselves:
rejection sampling, which needs no tilt, and is exact but for how near "near" is.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kakusan.bridge_luck import Free, Trial, rejected, tried
from kakusan.bridge_request import ITERATIONS, Posed, pose
from kakusan.bridge_request import Request as Request
from kakusan.bridges import Bridge, learn_bridge
from kakusan.bridges.files import about_bridge, load_bridge, save_bridge
from kakusan.catalogue import described
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.paths import Conditioned
from kakusan.inference.weights import LogMean, log_mean_exp
from kakusan.processes.observations import Event
from kakusan.processes.sde import SDE
from kakusan.training import files
from kakusan.training.regress import Stopped

FEW = 20  # of the free paths that are tried must come near
LEAST = 0.05  # the effective share below which a warning is due


@dataclass(frozen=True, eq=False)
class Bridged:
    """What `bridged` returns.

    Attributes:
        title: The process in words.
        request: What was asked for.
        posed: The same, as it fits the process.
        bridge: What was learned.
        paths: Paths with weights.
        trial: What free paths do.
        free: Those of many free paths that came near.
        guided: Whether paths were drawn towards the end while learning.
        reused: Whether the tilt was read from a file.
        tilt: The file of the tilt.
        seconds: What everything took.
    """

    title: str
    request: Request
    posed: Posed
    bridge: Bridge
    paths: Conditioned
    trial: Trial
    free: Free
    guided: bool
    reused: bool
    tilt: File | None
    seconds: float

    @property
    def share(self) -> float:
        """The effective share of the paths."""
        return self.paths.ess / self.request.n

    @property
    def names(self) -> list[str]:
        """x1, x2, ...: the coordinates of flattened states."""
        return [f"x{i + 1}" for i in range(self.posed.starts[0].numel())]

    @cached_property
    def log_density(self) -> LogMean:
        """Log p(y | start), its mean over starts where there are several, with its error."""
        return log_mean_exp(self.paths.log_weights)

    @property
    def free_log_density(self) -> LogMean | None:
        """The same by the share of free paths that came near; None where that tells nothing."""
        return None if self.request.std else self.free.log_density(self.trial.scale)

    @property
    def missed(self) -> float | None:
        """How far the worst path is from what was seen; None where that has noise."""
        return None if self.request.std or self.request.event else self.paths.missed.max().item()

    @property
    def nearness(self) -> str:
        """How near the rejection sample came, in words."""
        scale = self.trial.scale
        if self.request.event:
            return "there"
        if len(scale) == 1:
            return f"within {self.free.within * scale.item():.2g}"
        return f"within {self.free.within:.2g} standard deviations"

    @cached_property
    def middle(self) -> list[dict[str, Any]]:
        """What is known half way: one row a coordinate, with the rejection sample's beside it."""
        k = len(self.paths.t) // 2
        found = self.paths.expectation(lambda x: x[k].flatten(1))
        squares = self.paths.expectation(lambda x: (x[k].flatten(1) - found.value).square())
        x = self.free.x[k].flatten(1).double() if self.free.enough else None
        rows = []
        for i, name in enumerate(self.names):
            row = {"name": name, "mean": found.value[i].item(),
                   "std_error": found.std_error[i].item(),
                   "std": squares.value[i].sqrt().item()}  # fmt: skip
            if x is not None:
                std = x[:, i].std().item()
                row |= {"free_mean": x[:, i].mean().item(),
                        "free_std_error": std / math.sqrt(len(x)), "free_std": std}  # fmt: skip
            rows.append(row)
        return rows

    def about(self) -> dict[str, Any]:
        """What was asked for, as JSON can hold it."""
        r, grid = self.request, self.posed.steps.grid
        return {
            "process": self.title, "given": self.posed.words, "y": self.posed.y[0].tolist(),
            "start": self.posed.starts[:8].flatten(1).tolist(), "starts": len(self.posed.starts),
            "span": [grid[0].item(), grid[-1].item()], "n": r.n, "steps": len(grid) - 1,
            "seed": r.seed, "guided": self.guided,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """All that was found, as JSON can hold it."""
        learned, free, luck = self.bridge.report, self.free, self.free_log_density
        return self.about() | {
            "learned": learned and learned._asdict(), "reused": self.reused,
            "trial": {"near": self.trial.near, "of": self.trial.of}, "missed": self.missed,
            "ess": self.paths.ess, "ess_share": self.share,
            "log_p": self.log_density._asdict(),
            "free": {"near": free.near, "of": free.of, "within": free.within,
                     "log_p": luck and luck._asdict()},
            "middle": {"t": self.paths.t[len(self.paths.t) // 2].item(), "rows": self.middle},
            "seconds": self.seconds,
        }  # fmt: skip


def bridged(
    sde: SDE,
    request: Request,
    name: str = "",
    tilt: File | None = None,
    fresh: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Bridged:
    """Paths of a process given what was seen of them.

    Arguments:
        sde: The process.
        request: What was seen, and of how many paths.
        name: What to call the process.
        tilt: A file for what is learned: read where it was learned for the same request, else
            written.
        fresh: Whether to learn anew whatever the file holds.
        quiet: Whether to show no progress.
        say: Called with sentences on what is done.

    Raises:
        UsageError: If the request does not fit the process.
        KakusanError: If paths leave the domain or stop being finite, training fails, or noise does
            not reach what is seen.

    Example:
        >>> from kakusan.processes.zoo import OrnsteinUhlenbeck
        >>> asked = Request(end=(1.0,), n=20, steps=10, iterations=5)
        >>> found = bridged(OrnsteinUhlenbeck(), asked)
        >>> found.paths.x.shape, found.guided, found.free.enough
        (torch.Size([11, 20, 1]), False, True)
    """
    began, title = time.monotonic(), described(sde, name)
    posed = pose(sde, request)
    then = _then(tilt) if tilt is not None and tilt.exists() and not fresh else {}
    trial = tried(posed)
    guided = _decided(request, posed, trial, say)
    bridge, reused = _tilt(title, request, posed, guided, tilt, then, quiet, say)
    paths = _drawn(request, posed, bridge)
    free = rejected(posed, trial.scale, quiet)
    found = Bridged(title, request, posed, bridge, paths, trial, free, guided, reused, tilt,
                    time.monotonic() - began)  # fmt: skip
    _warn(found)
    return found


# --- the tilt


def _decided(request: Request, posed: Posed, trial: Trial, say: Callable[[str], None]) -> bool:
    """Whether paths are drawn towards the end while learning."""
    event = isinstance(posed.observe, Event)
    if event and not trial.near:
        raise KakusanError(
            f"none of {trial.of:,} free paths ends with {posed.words}, and an event is learned "
            "from paths that meet it: name a value instead, as --observe x1 --end 1.5"
        )
    if trial.near < FEW:
        one = "s" * (trial.near == 1)
        came = f"end{one} with" if event else f"come{one} near"
        few = f"{trial.near or 'none'} of {trial.of:,} free paths {came} {posed.words}"
        if request.guided is None:
            say(f"{few}: paths are drawn towards it while learning (--no-guided: free ones)")
        elif not request.guided:
            say(f"{few}: little is learned of it (--guided draws paths towards it)")
    return trial.near < FEW if request.guided is None else request.guided


def _tilt(
    title: str, request: Request, posed: Posed, guided: bool, tilt: File | None,
    then: dict[str, Any], quiet: bool, say: Callable[[str], None],
) -> tuple[Bridge, bool]:  # fmt: skip
    """A tilt from a file, or learned anew."""
    iterations = request.iterations or ITERATIONS
    about = _about(title, posed, guided)
    if tilt is not None and then:
        bridge, why = _kept(tilt, then, about, request, posed)
        if bridge is not None:
            r = bridge.report
            when = f"in {r.seconds:.0f} s, {r.iterations:,} iterations" if r else "before"
            say(f"reusing {tilt}, learned {when} (--fresh learns it anew)")
            return bridge, True
        say(f"{tilt} {why}: learning anew")
    try:
        bridge = learn_bridge(
            posed.steps, posed.starts, posed.observe, posed.y if guided else None,
            iterations=iterations, seed=request.seed, quiet=quiet,
        )  # fmt: skip
    except Stopped as early:
        if tilt is not None:
            save_bridge(early.learned, tilt, {**about, "iterations": early.steps})
            say(f"{tilt} keeps what {early.steps:,} iterations have taught: without --iterations, "
                "the same command draws with it")  # fmt: skip
        raise
    if tilt is not None:
        save_bridge(bridge, tilt, {**about, "iterations": iterations})
    return bridge, False


def _about(title: str, posed: Posed, guided: bool) -> dict[str, Any]:
    """What a tilt is learned for."""
    grid = posed.steps.grid
    return {
        "process": title, "span": [grid[0].item(), grid[-1].item()], "steps": len(grid) - 1,
        "observation": repr(posed.observe), "start": _told(posed.starts),
        "ends": _told(posed.y) if guided else None,
    }  # fmt: skip


def _told(x: Tensor) -> list[float] | str:
    """Numbers, or of very many what tells them from others."""
    if x.numel() <= 64:
        return x.flatten().tolist()
    return f"{tuple(x.shape)} {hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]}"


def _then(tilt: File) -> dict[str, Any]:
    """What a tilt in a file was learned for."""
    try:
        then = about_bridge(tilt)
    except KakusanError as error:
        raise KakusanError(f"{error}; --fresh writes over it") from None
    if "process" not in then:
        raise KakusanError(
            f"{tilt} does not say what it was learned for; --fresh writes over it, and "
            "kakusan.bridges.files.load_bridge reads it"
        )
    return then


def _kept(
    tilt: File, then: dict[str, Any], about: dict[str, Any], request: Request, posed: Posed
) -> tuple[Bridge | None, str]:
    """What a file holds, or why it is of no use here."""
    if request.iterations is not None:
        about = {**about, "iterations": request.iterations}
    words = {"process": "process", "span": "span of time", "steps": "number of steps",
             "observation": "observation", "start": "start", "ends": "end",
             "iterations": "number of iterations"}  # fmt: skip
    other = [words[key] for key, value in about.items() if then.get(key) != value]
    if other:
        return None, f"was learned for another {' and another '.join(other)}"
    try:
        return load_bridge(tilt, posed.steps, posed.observe), ""
    except KakusanError as error:  # the same words for another process, in the user's own file
        return None, str(error).removeprefix(f"{tilt} ").partition(":")[0]


# --- paths


def _drawn(request: Request, posed: Posed, bridge: Bridge) -> Conditioned:
    """Paths with weights."""
    x, n = posed.starts[torch.arange(request.n) % len(posed.starts)], request.n
    with warnings.catch_warnings():
        # what free paths do is said in words of the command line
        warnings.filterwarnings("ignore", "the value ", UserWarning)
        found = bridge.sample(x, posed.y, n=n, seed=request.seed)
    if found.log_weights.max() == -math.inf:
        raise KakusanError(f"none of {n:,} paths ends with {posed.words}: take more --iterations, "
                           "or more paths")  # fmt: skip
    return found


def _warn(found: Bridged) -> None:
    """Says what to do where few paths count."""
    if found.share >= LEAST:
        return
    ways = ["more --iterations", "more --steps"]
    if not found.guided:
        ways.insert(0, "--guided, which draws paths towards this end while learning")
    warnings.warn(
        f"only {found.paths.ess:.0f} of {found.request.n:,} paths count, "
        f"{100 * found.share:.2g}%, and all numbers are rougher than their errors say; try "
        f"{', or '.join(ways)}",
        stacklevel=3,
    )


# --- files


def write_arrays(found: Bridged, path: File) -> File:
    """Times, paths (times, paths, ...) and log_weights as npz, no pickle.

    `about` is what was asked for, as a string of JSON.
    """
    arrays = {"times": found.paths.t, "paths": found.paths.x,
              "log_weights": found.paths.log_weights}  # fmt: skip
    with files.whole(path) as draft, draft.open("wb") as handle:
        given = {name: v.numpy() for name, v in arrays.items()}
        about = np.array(json.dumps(found.about()))
        np.savez_compressed(handle, allow_pickle=False, about=about, **given)
    return path


def write_table(found: Bridged, path: File) -> File:
    """One row for each path and time: path, log_weight, t, x1, x2, ..."""
    import pyarrow as pa

    T, n = found.paths.x.shape[:2]
    columns = {
        "path": np.repeat(np.arange(n), T),
        "log_weight": np.repeat(found.paths.log_weights.numpy(), T),
        "t": np.tile(found.paths.t.numpy(), n),
    }
    flat = found.paths.x.flatten(2).transpose(0, 1).flatten(0, 1).numpy()
    columns |= {name: flat[:, i] for i, name in enumerate(found.names)}
    return files.write_table(path, pa.table(columns))
