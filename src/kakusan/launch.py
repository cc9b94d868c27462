"""What a simulation needs before its first step: states, a method, a path of noise, an engine.

Everything that is asked for wrongly is refused here, in the words of the command line, after one
step of two paths: what fails later is the work.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kakusan.catalogue import kebab, methods, named
from kakusan.core.counter import TOP, Counter, CounterWithArea
from kakusan.core.noise import Wants
from kakusan.core.operators import Operator
from kakusan.core.types import State, Time
from kakusan.errors import KakusanError, UsageError
from kakusan.processes.sde import SDE
from kakusan.processes.transforms import ito, stratonovich
from kakusan.solvers.solve import Eager, Engine, Method

DTYPES = {"float32": torch.float32, "float64": torch.float64}


# --- what runs


def _compiled() -> Engine:
    import kakusan

    if not hasattr(kakusan, "Compiled"):
        raise UsageError("this kakusan has no compiled engine; use --engine eager")
    return getattr(kakusan, "Compiled")()  # noqa: B009 - may be absent


ENGINES = {"eager": Eager, "compiled": _compiled}


class _Path(Counter):
    """A Brownian path whose first cell starts where the grid does."""

    origin = 0.0

    def tick(self, t: float) -> int:
        return super().tick(t - self.origin)


class _PathWithArea(_Path, CounterWithArea):
    """The same, with areas."""


def path_of(method: Method, seed: int, grid: Tensor) -> Counter:
    """A path with cells that stay as they are when all steps are halved.

    They depend on the span and the odd part of the number of steps alone, so that all steps are
    halves of halves of the largest cells, which are as long as the span or a little longer.
    """
    steps = len(grid) - 1
    odd = steps // (steps & -steps)
    largest = (grid[-1] - grid[0]).abs().item() / odd * 2 ** (odd - 1).bit_length()
    kind = _PathWithArea if method.wants is Wants.AREA else _Path
    path = kind(seed, cell=largest / 2**TOP)
    path.origin = grid[0].item()
    return path


def chosen(
    sde: SDE, word: str | None, starts: Tensor, grid: Tensor, seed: int
) -> tuple[str, Method]:
    """The method of that name, tried on two states before all of them run.

    Without a name it is Euler-Maruyama's, but for a process with a domain one that stays inside,
    where the process has the closed forms for it.
    """
    if not grid.isfinite().all() or grid[0] == grid[-1]:
        raise UsageError(f"a span needs two different times, got {grid[0]:g} and {grid[-1]:g}")
    if (grid[-1] - grid[0]) * sde.direction < 0:
        (a, b), (t0, t1) = sde.span, (grid[0].item(), grid[-1].item())
        raise UsageError(
            f"this process runs from t={a:g} to t={b:g}, so it cannot go from t={t0:g} to t={t1:g}"
        )
    known = methods()
    if word is not None:
        word = named(word, known, "method")
        method = known[word]()
        _try(sde, method, starts, grid, seed)
        return word, method
    closed = ("splitting", "exact") if sde.domain else ()
    for word in (*(w for w in closed if w in known), "euler-maruyama"):
        try:
            _try(sde, known[word](), starts, grid, seed)
        except UsageError:
            if word == "euler-maruyama":
                raise
            continue
        return word, known[word]()
    raise AssertionError("euler-maruyama is always known")


def _try(sde: SDE, method: Method, starts: Tensor, grid: Tensor, seed: int) -> None:
    """One step of a few paths: what is refused is a wrong request, not failed work."""
    x = starts[torch.arange(2) % len(starts)].contiguous()
    sde = stratonovich(sde) if method.stratonovich else ito(sde)
    noise = path_of(method, seed, grid)
    t, s = grid[0], grid[1]
    try:
        _fits(sde, x, t)
        G = sde.diffusion(x, t)
        state = method.init(sde, x, grid)
        shape = tuple(sde.noise_shape(x))
        dw = None
        if not G.deterministic:
            dw = noise.want(method.wants, 0, t.item(), s.item(), shape, x)
        method.step(sde, x, t, s, dw, state)
    except UsageError:
        raise
    except (KakusanError, TypeError) as error:
        raise UsageError(options(" ".join(str(error).split()))) from error
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the process fails on states of shape {tuple(x.shape)} in {_name(x.dtype)}: "
            f"{type(error).__name__}: {words}"
        ) from error


def _fits(sde: SDE, x: State, t: Time) -> None:
    """Refuses a process whose drift or G dw is not like the state."""
    f, G = sde.drift(x, t), sde.diffusion(x, t)
    if not isinstance(G, Operator):
        raise UsageError(
            f"diffusion(x, t) gives a {type(G).__name__}, not an operator: wrap it in Scale(g), "
            "Diagonal(g) or Dense(G)"
        )
    moved = {"the drift": f}
    if not G.deterministic:
        moved["G dw"] = G.kick(x, x.new_zeros(tuple(sde.noise_shape(x))))
    for what, y in moved.items():
        if y.shape != x.shape or y.dtype != x.dtype:
            raise UsageError(
                f"for states of shape {tuple(x.shape)} in {_name(x.dtype)}, {what} has shape "
                f"{tuple(y.shape)} in {_name(y.dtype)}; is the start of the right length?"
            )


def options(message: str) -> str:
    """A sentence of the library in words of the command line: Exact() is --method exact."""
    known = set(methods())
    return re.sub(
        r"\b([A-Z]\w+)\(\)",
        lambda m: f"--method {kebab(m[1])}" if kebab(m[1]) in known else m[0],
        message,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- where paths start


def starts_of(sde: SDE, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    """States (m, *shape) where paths start: those given, in the shape of the process, or its own.

    Raises:
        UsageError: If the process does not take them, or has none of its own.
    """
    own = own_start(sde)
    if start is None:
        if isinstance(own, KakusanError) or own is None:
            why = f" ({own})" if own is not None else ""
            raise UsageError(f"this process does not say where it starts{why}; say --start 0,0")
        return own.to(dtype).unsqueeze(0)
    if isinstance(own, Tensor) and start[0].numel() == own.numel():
        start = start.reshape(-1, *own.shape)
    elif isinstance(own, Tensor) and own.numel() > 1:
        raise UsageError(
            f"a state of this process is {own.numel()} numbers, as "
            f"{','.join(f'{v:.3g}' for v in own.flatten()[:6].tolist())}"
            f"{',...' if own.numel() > 6 else ''}, and the start has {start[0].numel()}"
        )
    if not start.isfinite().all():
        row = int((~start.flatten(1).isfinite().all(1)).nonzero()[0])
        raise UsageError(f"the start is not finite: row {row} is {start[row].flatten().tolist()}")
    if not (inside := sde.inside(start.to(dtype))).all():
        row = start[int((~inside).nonzero()[0])].flatten().tolist()
        raise UsageError(f"the start {row} is outside the domain {sde.domain}")
    return start.to(dtype)


def own_start(sde: SDE) -> Tensor | KakusanError | None:
    """The start of a process, or why it has none."""
    try:
        start = getattr(sde, "start", None)
    except KakusanError as error:
        return error
    if start is None:
        return None
    start = torch.as_tensor(start, dtype=torch.float64)
    return start if start.ndim else start.reshape(1)


def read_start(text: str, sde: SDE) -> Tensor:
    """States (m, d) from words as 0.5 or 1,2, or from a file .npy, .npz or .csv.

    A file holds one state a row, or one state alone.
    """
    if Path(text).suffix.lower() in (".npy", ".npz", ".csv"):
        try:
            found = _read_array(Path(text))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UsageError(f"cannot read the start from {text}: {why}") from None
    else:
        try:
            found = np.array([[float(v) for v in text.strip(" []").split(",")]])
        except ValueError:
            raise UsageError(
                f"a start is numbers, as 0.5 or 1,2, or a file .npy, .npz or .csv; got {text!r}"
            ) from None
    if found.dtype.kind not in "fiub" or not found.size:
        what = "no state" if not found.size else f"{found.dtype} and not real numbers"
        raise UsageError(f"there is {what} in {text}")
    own = own_start(sde)
    d = own.numel() if isinstance(own, Tensor) else None
    if isinstance(own, Tensor) and found.shape == own.shape:
        found = found.reshape(1, -1)  # one state
    elif found.ndim < 2:
        found = found.reshape(-1, 1) if d in (1, None) else found.reshape(1, -1)
    found = found.reshape(len(found), -1)
    return torch.from_numpy(found.astype(np.float64))


def _read_array(path: Path) -> np.ndarray:
    """The one array of a file."""
    if path.suffix.lower() == ".csv":
        with path.open() as lines:
            head = lines.readline()
        named_columns = re.search(r"[a-zA-Z]", re.sub(r"nan|inf|\de", "", head.lower()))
        return np.loadtxt(path, delimiter=",", skiprows=1 if named_columns else 0, ndmin=2)
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found:
        names = list(found.files)
        if "x" not in names and len(names) != 1:
            raise ValueError(f"it holds {', '.join(names)}, and no array named x")
        return found["x" if "x" in names else names[0]]
