"""Many paths of a process, and what they tell: looked at while they run, not stored.

`simulate` steps all n paths at once and looks at the live state at about `keep` times: mean,
standard deviation and exact quantiles over all paths, and the first few paths themselves. Where
the process knows its moments in closed form, they stand beside. Besides the live state there is
only the tree of the noise, some four states for each halving of the span: a million paths of one
number need about a gigabyte, and ten thousand steps hardly more than a hundred.

The noise is one Brownian path a sample and seed, in cells that do not depend on how often they are
halved: twice the steps are finer steps along the same paths, for every method that follows paths.
"""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kakusan.catalogue import described, named
from kakusan.catalogue import resolve as resolve
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError, UsageError
from kakusan.launch import DTYPES, ENGINES, chosen, path_of, starts_of
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import Method, solve
from kakusan.training import files
from kakusan.training.progress import Advance, progress

SHOWN, DRAWN = 6, 50_000  # coordinates in pictures, and most paths in their histograms


@dataclass(frozen=True)
class Request:
    """What to simulate of a process.

    Attributes:
        n: How many paths.
        steps: How many steps of equal length.
        span: Where time starts and ends; the process's own by default.
        start: States (m, *shape); path i starts at number i mod m. The process's by default.
        method: The name of a method; by default euler-maruyama, or one that stays inside where
            the process has a domain and a closed form that keeps it.
        engine: eager or compiled.
        dtype: float64 or float32.
        seed: Fixes every path.
        keep: About how many times are looked at.
        paths: How many paths are kept; at most 1000 by default.
        quantiles: Which, between 0 and 1.
    """

    n: int = 10_000
    steps: int = 500
    span: tuple[float, float] | None = None
    start: Tensor | None = None
    method: str | None = None
    engine: str = "eager"
    dtype: str = "float64"
    seed: int = 0
    keep: int = 100
    paths: int | None = None
    quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)

    def __post_init__(self) -> None:
        for word, value in (("n", self.n), ("steps", self.steps), ("keep", self.keep)):
            if value < 1:
                raise UsageError(f"{word} must be at least 1, got {value}")
        if self.paths is not None and self.paths < 0:
            raise UsageError(f"paths must be at least 0, got {self.paths}")
        if not self.quantiles or not all(0 <= q <= 1 for q in self.quantiles):
            raise UsageError(f"quantiles lie between 0 and 1, got {self.quantiles}")
        object.__setattr__(self, "quantiles", tuple(sorted(set(self.quantiles))))
        object.__setattr__(self, "dtype", named(self.dtype, DTYPES, "dtype"))
        object.__setattr__(self, "engine", named(self.engine, ENGINES, "engine"))


def counted(r: Request) -> str:
    """How much work a request is, in words."""
    return f"{r.n:,} {'paths' if r.n > 1 else 'path'}, {r.steps:,} steps of {r.method}"


@dataclass(frozen=True)
class Ensemble:
    """What `simulate` returns; T times, P kept paths, Q quantiles.

    Attributes:
        sde: The process.
        title: The process in words.
        request: What was asked for, with every default filled in.
        times: (T,), float64.
        paths: The first P paths, (T, P, *shape).
        quantiles: Over all paths, (T, Q, *shape).
        mean: Over all paths, (T, *shape), float64; so is `std`.
        std: The standard deviation.
        exact_mean: In closed form, where it is known.
        exact_std: In closed form, where it is known.
        looks: States of many paths at a few times, for histograms: index in `times` -> (m, d).
        seconds: What it took.
    """

    sde: SDE
    title: str
    request: Request
    times: Tensor
    paths: Tensor
    quantiles: Tensor
    mean: Tensor
    std: Tensor
    exact_mean: Tensor | None
    exact_std: Tensor | None
    looks: dict[int, Tensor]
    seconds: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a state."""
        return tuple(self.mean.shape[1:])

    @property
    def names(self) -> list[str]:
        """x1, x2, ...: the coordinates of flattened states."""
        return [f"x{i + 1}" for i in range(math.prod(self.shape))]

    @cached_property
    def end(self) -> list[dict[str, Any]]:
        """What is known at the last time: one row a coordinate."""
        rows, n = [], self.request.n
        for i, name in enumerate(self.names):
            mean, std = (v[-1].flatten()[i].item() for v in (self.mean, self.std))
            q = self.quantiles[-1].flatten(1)[:, i].tolist()
            levels = map(str, self.request.quantiles)
            row = {
                "name": name,
                "mean": mean,
                "std_error": std / math.sqrt(n) if n > 1 else None,
                "std": std,
                "quantiles": dict(zip(levels, q, strict=True)),
            }
            if self.exact_mean is not None and self.exact_std is not None:
                row["exact_mean"] = self.exact_mean[-1].flatten()[i].item()
                row["exact_std"] = self.exact_std[-1].flatten()[i].item()
            rows.append(row)
        return rows

    def about(self) -> dict[str, Any]:
        """What was asked for, as JSON can hold it."""
        keys = ("n", "steps", "span", "method", "engine", "dtype", "seed")
        return {"process": self.title} | {k: getattr(self.request, k) for k in keys}


def simulate(
    sde: SDE, request: Request | None = None, name: str = "", quiet: bool = True
) -> Ensemble:
    """Simulates many paths of a process.

    Arguments:
        sde: The process.
        request: What to simulate of it.
        name: What to call it.
        quiet: Whether to show no progress.

    Raises:
        UsageError: If the process does not take such states, or the method not such a process.
        KakusanError: If the states stop being finite or leave the domain.

    Example:
        >>> from kakusan.processes.zoo import OrnsteinUhlenbeck
        >>> found = simulate(OrnsteinUhlenbeck(), Request(n=100, steps=10))
        >>> found.mean.shape, found.quantiles.shape
        (torch.Size([11, 1]), torch.Size([11, 5, 1]))
    """
    request = request or Request()
    span = (float(sde.span[0]), float(sde.span[1])) if request.span is None else request.span
    began = time.monotonic()
    with torch.no_grad():
        starts = starts_of(sde, request.start, DTYPES[request.dtype])
        grid = torch.linspace(*span, request.steps + 1, dtype=torch.float64)
        method, stepper = chosen(sde, request.method, starts, grid, request.seed)
        at = torch.arange(request.n) % len(starts)
        x = starts[at].contiguous()
        watch = _Watch(request, x)
        _run(sde, x, grid, stepper, watch, request, quiet)
        times = grid[watch.at]
        exact = _closed_form(sde, starts, torch.bincount(at), times - span[0])
    request = replace(request, span=span, method=method, paths=watch.paths)
    return Ensemble(
        sde, described(sde, name), request, times, *watch.found(), *exact, watch.looks,
        time.monotonic() - began,
    )  # fmt: skip


def _run(
    sde: SDE, x: State, grid: Tensor, method: Method, watch: _Watch, request: Request, quiet: bool
) -> None:
    """Runs all steps, watched."""
    engine, noise = ENGINES[request.engine](), path_of(method, request.seed, grid)
    watch(-1, grid[0], x)
    try:
        with progress("steps", request.steps, quiet=quiet) as watch.advance:
            solve(sde, x, grid, method, noise, on_step=watch, every=watch.every, engine=engine)
    except _NotFinite as stop:
        # no use in going on: run to where it was seen, for the sentence that says what happened
        try:
            solve(sde, x, grid[: stop.k + 2], method, noise, engine=engine)
        except KakusanError as error:
            part, whole = f" of {stop.k + 1} of ", f" of {request.steps} of "
            raise KakusanError(str(error).replace(part, whole)) from None
        raise KakusanError(
            f"states are not finite at t={grid[stop.k + 1]:g}, but were when the same steps were "
            "run again: drift or diffusion draw numbers of their own"
        ) from None


# --- what is looked at on the way


class _NotFinite(Exception):
    """Raised to stop a run whose states are lost."""

    def __init__(self, k: int) -> None:
        self.k = k


class _Watch:
    """Sees the live state at some times; keeps numbers, and a few paths."""

    def __init__(self, request: Request, x: State) -> None:
        self.levels, self.every = request.quantiles, math.ceil(request.steps / request.keep)
        count = math.ceil(request.steps / self.every) + 1
        asked = request.paths
        if asked is None:  # of large states fewer, so that the paths take half a gigabyte
            asked = min(1000, max(1, (1 << 26) // (count * x[0].numel())))
        self.paths = min(len(x), asked)
        # a histogram of one point says nothing: look a little later
        spread = bool((x != x[:1]).any()) or count < 4
        self.wanted = {0 if spread else max(1, count // 10), (count - 1) // 2, count - 1}
        self.at: list[int] = []
        self.kept: dict[str, list[Tensor]] = {}
        self.looks: dict[int, Tensor] = {}
        self.advance: Advance = lambda done, words="": None

    def __call__(self, k: int, t: Time, x: State) -> None:
        flat, shape = x.flatten(1), x.shape[1:]
        var, mean = torch.var_mean(flat.double(), 0, correction=min(1, len(flat) - 1))
        if not mean.isfinite().all() and not flat.isfinite().all():
            raise _NotFinite(k)
        found = {
            "paths": x[: self.paths].clone(),
            "quantiles": quantiles(flat, self.levels).reshape(-1, *shape),
            "mean": mean.reshape(shape),
            "std": var.sqrt().reshape(shape),
        }
        for key, value in found.items():
            self.kept.setdefault(key, []).append(value.cpu())
        if len(self.at) in self.wanted:
            self.looks[len(self.at)] = flat[:DRAWN, :SHOWN].to("cpu", copy=True)
        self.at.append(k + 1)
        self.advance(k + 1)

    def found(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Paths, quantiles, mean and standard deviation, over the times."""
        p, q, m, s = (torch.stack(self.kept[k]) for k in ("paths", "quantiles", "mean", "std"))
        return p, q, m, s


def quantiles(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles of each column of x (n, d), shape (Q, d), float64; linear between samples.

    They are `torch.quantile`'s, which refuses more than 16 million numbers, at the cost of a
    partition of one column at a time.

    Example:
        >>> quantiles(torch.tensor([[4.0], [0.0], [1.0]]), (0.25, 0.5))
        tensor([[0.5000],
                [1.0000]], dtype=torch.float64)
    """
    n = len(x)
    at = [q * (n - 1) for q in levels]
    low = np.array([math.floor(p) for p in at])
    high = np.minimum(low + 1, n - 1)
    share = np.array(at) - low
    out = np.empty((len(levels), x.shape[1]))
    where = np.unique(np.concatenate([low, high]))
    for j, column in enumerate(x.unbind(1)):
        part = np.partition(column.cpu().numpy(), where)
        a, b = part[low].astype(np.float64), part[high].astype(np.float64)
        out[:, j] = a + share * (b - a)
    return torch.from_numpy(out)


def _closed_form(
    sde: SDE, starts: Tensor, weights: Tensor, elapsed: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation at each time, over all starts; None where not known."""
    moments = getattr(sde, "moments", None)
    if moments is None or (elapsed < 0).any():
        return None, None
    share = (weights[: len(starts)] / weights.sum()).unsqueeze(1).to(starts)
    starts = starts[: len(weights)]
    means, stds = [], []
    for t in elapsed:
        if t == 0:
            mean, var = starts.flatten(1), torch.zeros_like(starts.flatten(1))
        else:
            found = moments(starts, t)
            mean, var = found.mean, found.covariance.diagonal(dim1=-2, dim2=-1)
        whole = (share * mean).sum(0)
        # the law of total variance
        std = (share * (var + (mean - whole) ** 2)).sum(0).sqrt()
        means.append(whole.reshape(starts.shape[1:]).double())
        stds.append(std.reshape(starts.shape[1:]).double())
    return torch.stack(means), torch.stack(stds)


# --- files


def places(out: str | None, name: str) -> dict[str, Path]:
    """Where things go, by what they are: a picture always, numbers beside it where asked.

    A file with a known ending is that file (and a picture beside it); a folder, or any other name,
    is a base for a picture and an npz file.

    Example:
        >>> places("out/run.csv", "cir")
        {'table': PosixPath('out/run.csv'), 'picture': PosixPath('out/run.png')}
    """
    base = Path(out or name)
    if base.is_dir() or (out or "").endswith("/"):
        base = base / name
    kind = {".npz": "arrays", ".parquet": "table", ".csv": "table", ".png": "picture"}
    suffix = base.suffix.lower()
    if suffix in kind:
        return {
            kind[suffix]: base,
            "picture": base if suffix == ".png" else base.with_suffix(".png"),
        }
    if re.fullmatch(r"\.[a-z]{2,7}", suffix):
        raise UsageError(f"results are written as .png, .npz, .parquet or .csv, not {base.name!r}")
    return {"picture": Path(f"{base}.png"), "arrays": Path(f"{base}.npz")}


def write_arrays(found: Ensemble, path: Path) -> Path:
    """times, paths (times, paths, ...), levels, quantiles, mean, std, ... as npz, no pickle.

    `about` is what was asked for, as a string of JSON.
    """
    arrays = {
        "times": found.times, "paths": found.paths, "quantiles": found.quantiles,
        "levels": torch.tensor(found.request.quantiles, dtype=torch.float64),
        "mean": found.mean, "std": found.std,
        "exact_mean": found.exact_mean, "exact_std": found.exact_std,
    }  # fmt: skip
    given = {k: v.numpy() for k, v in arrays.items() if v is not None}
    with files.whole(path) as draft, draft.open("wb") as handle:
        about = np.array(json.dumps(found.about()))
        np.savez_compressed(handle, allow_pickle=False, about=about, **given)
    return path


def write_table(found: Ensemble, path: Path) -> Path:
    """The kept paths as a table, one row for each path and time: path, t, x1, x2, ..."""
    import pyarrow as pa

    T, P = found.paths.shape[:2]
    columns = {
        "path": np.repeat(np.arange(P), T),
        "t": np.tile(found.times.numpy(), P),
    }
    each = math.prod(found.paths.shape[2:])
    flat = found.paths.reshape(T, P, each).transpose(0, 1).reshape(T * P, each).numpy()
    columns |= {name: flat[:, i] for i, name in enumerate(found.names)}
    return files.write_table(path, pa.table(columns))
