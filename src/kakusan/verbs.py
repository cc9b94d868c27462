"""The verbs `simulate` and `likelihood`: their options, and what they print."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kakusan.errors import KakusanError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from kakusan.densities import Likelihoods
    from kakusan.pipeline import DiffusionModel
    from kakusan.simulation import Ensemble, Request

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Process = Annotated[
    str | None,
    typer.Argument(
        metavar="PROCESS",
        help="A name (--list shows them), module:object or path/to/file.py:object, where the "
        "object is an SDE, a class of them or a function that returns one.",
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Its parameters: sigma=0.5 mean=[0,1] rate=[[1,0],[0,2]]."
    ),
]
Span = Annotated[
    str | None,
    typer.Option(metavar="START,END", help="When.  \\[default: the process's own]"),
]
Start = Annotated[
    str | None,
    typer.Option(
        help="0.5 or 1,2, or a file .npy .npz .csv, one state a row; path i starts at row i "
        "modulo their number.  \\[default: the process's own]"
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="euler-maruyama, heun, ...  \\[default: euler-maruyama; splitting or exact for a "
        "process with a domain, where it knows them]",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Fixes every path. With the same seed and span, twice the steps are finer steps "
        "along the same paths, and more paths are the same ones and others."
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        help="FILE.npz, .parquet, .csv (and a picture beside it) or .png; a folder or any other "
        "name is a base for .png and .npz.  \\[default: the process's name]"
    ),
]


def simulate(
    process: Process = None,
    words: Words = None,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Paths.  \\[default: 10000, or the rows of a --start file]"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps, of equal length.")] = 500,
    span: Span = None,
    until: Annotated[float | None, typer.Option(help="The end alone, instead of --span.")] = None,
    start: Start = None,
    method: MethodName = None,
    engine: Annotated[
        str, typer.Option(help="eager, or compiled: faster, after seconds of compiling.")
    ] = "eager",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    seed: Seed = 0,
    out: Out = None,
    keep: Annotated[int, typer.Option(help="About how many times are kept.")] = 100,
    paths: Annotated[
        int | None,
        typer.Option(
            help="Paths that are kept; statistics are over all.  \\[default: up to 1000]"
        ),
    ] = None,
    quantiles: Annotated[str, typer.Option(help="Which.")] = "0.05,0.25,0.5,0.75,0.95",
    listing: Annotated[
        bool, typer.Option("--list", help="Print the processes that have names, and stop.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Simulate many paths of a stochastic differential equation.

    Prints mean, spread and quantiles at the end; draws a picture of them over time; keeps paths
    and statistics in a file. Numbers known in closed form stand beside.

    Example:  kakusan simulate double-well v=1 -n 20000 --until 5 --out well.npz
    """
    if listing:
        _list(as_json)
        return
    if process is None:
        raise UsageError("which process? kakusan simulate --list shows those with names")
    from kakusan import catalogue, launch, simulation

    sde = simulation.resolve(process, words)
    # a process of the user's is told by what was asked for, one with a name by its fields
    asked = " ".join([process, *(words or [])])
    name = asked if ":" in process else catalogue.kebab(type(sde).__name__)
    states = None if start is None else launch.read_start(start, sde)
    rows = 0 if states is None else len(states)
    request = simulation.Request(
        n=n if n is not None else rows if rows > 1 else 10_000,
        steps=steps, span=_span(sde.span, span, until), start=states, method=method, engine=engine,
        dtype=dtype, seed=seed, keep=keep, paths=paths, quantiles=_numbers(quantiles, "quantiles"),
    )  # fmt: skip
    _simulate(sde, request, name, out, quiet, as_json)


def _simulate(
    sde: Any, request: Request, name: str, out: str | None, quiet: bool, as_json: bool
) -> None:
    from kakusan import charts, launch, simulation

    places = simulation.places(out, name.split(":")[-1].split(" ")[0])  # refused before the work
    try:
        # what the process prints is not part of the answer
        with contextlib.redirect_stdout(sys.stderr):
            found = simulation.simulate(sde, request, name, quiet or as_json)
    except UsageError:
        raise
    except KakusanError as error:
        raise KakusanError(launch.options(str(error))) from error
    writers = {"arrays": simulation.write_arrays, "table": simulation.write_table,
               "picture": charts.draw}  # fmt: skip
    made = {kind: str(writers[kind](found, place)) for kind, place in places.items()}
    if as_json:
        answer = {**found.about(), "seconds": found.seconds, "end": found.end, **made}
        print(json.dumps(_finite(answer), allow_nan=False))
        return
    print(summary(found))
    for kind, place in made.items():
        print(f"  {kind:10}{place}")


def _finite(tree: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {k: _finite(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _list(as_json: bool) -> None:
    from kakusan import catalogue

    print(json.dumps(catalogue.listing()) if as_json else catalogue.table())


def _span(
    own: tuple[float, float], span: str | None, until: float | None
) -> tuple[float, float] | None:
    if span is not None and until is not None:
        raise UsageError("--span and --until say the same thing twice; choose one")
    if until is not None:
        return float(own[0]), until
    if span is None:
        return None
    ends = _numbers(span, "a span")
    if len(ends) != 2:
        raise UsageError(f"a span is START,END, as 0,5; got {span!r}")
    return ends[0], ends[1]


def _numbers(text: str, what: str) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in text.strip(" []()").split(","))
    except ValueError:
        raise UsageError(f"{what} must be numbers with commas between, got {text!r}") from None


def summary(found: Ensemble) -> str:
    """The end in words: a row a coordinate, with numbers in closed form where they are known."""
    from kakusan.simulation import counted

    r = found.request
    span = f"t={found.times[0]:g} to t={found.times[-1]:g}"
    lines = [f"{found.title}: {counted(r)} from {span}, {r.dtype}, seed {r.seed}, "
             f"{found.seconds:.1f} s", ""]  # fmt: skip
    exact = found.exact_mean is not None
    head = ["", "mean ± std. error", *(["exact"] if exact else []), "std",
            *(["exact"] if exact else []), *(f"{100 * q:g}%" for q in r.quantiles)]  # fmt: skip
    shown = found.end[:12]
    rows = [head]
    for row in shown:
        q = [f"{v:.4g}" for v in row["quantiles"].values()]
        mean, std = [_with_error(row["mean"], row["std_error"])], [f"{row['std']:.4g}"]
        if exact:
            mean.append(f"{row['exact_mean']:.5g}")
            std.append(f"{row['exact_std']:.4g}")
        rows.append([row["name"], *mean, *std, *q])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    ]
    if len(found.end) > len(shown):
        lines.append(f"  and {len(found.end) - len(shown)} coordinates more, in the files")
    return "\n".join([*lines, ""])


def _with_error(mean: float, error: float | None) -> str:
    """A mean to the digits its error allows.

    Example:
        >>> _with_error(1.23456, 0.0123)
        '1.235 ± 0.012'
    """
    if error is None:  # of one path nobody knows
        return f"{mean:.5g}"
    if not 0 < error < math.inf:
        return f"{mean:.5g} ± {error:.2g}"
    digits = 1 - math.floor(math.log10(error))
    if not 0 <= digits <= 8:
        return f"{mean:.5g} ± {error:.2g}"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as train makes it.")]
Rows = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        help="What train --data takes; of data with a test set of their own, that set.  "
        "\\[default: the run's held-out data]",
    ),
]
Dequantise = Annotated[
    str | None,
    typer.Option(
        help="For whole numbers, which have no density: uniform or variational (noise over "
        "the cell of each: bounds on its mass), or none.  \\[default: as the run was trained]"
    ),
]
Probes = Annotated[
    int | None,
    typer.Option(help="Random probes of the divergence; 0: exact.  \\[default: by dimension]"),
]
Tolerance = Annotated[
    float, typer.Option(help="Of a step of the solver; of whole numbers, in their cells.")
]
Beside = Annotated[
    int | None,
    typer.Option(
        help="Held-out samples to draw beside, where DATA are others.  "
        "\\[default: as many, at most 256]"
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(
        help="FILE.csv, a row a sample, and a picture beside it.  "
        "\\[default: RUN/likelihood/NAME.csv]"
    ),
]


def likelihood(
    run: Run,
    data: Rows = None,
    n: Annotated[int | None, typer.Option("-n", help="The first so many rows.")] = None,
    dequantise: Dequantise = None,
    probes: Probes = None,
    tolerance: Tolerance = 1e-3,
    label: Annotated[str | None, typer.Option(help="Of which class, log p(x | label).")] = None,
    beside: Beside = None,
    seed: Annotated[int, typer.Option(help="Fixes probes and dequantisation.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples at a time; bounds the memory.")] = 128,
    out: Csv = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the log-likelihood of each row of DATA under a trained model.

    In nats, and in the units of the data. The picture shows DATA beside the
    run's held-out data: rows far to the right of those are unlike what the
    model learned. Rows to the left may be so too: a likelihood is a density,
    and simple data can be denser than typical ones.

    Example:  kakusan likelihood runs/digits --dequantise uniform
    """
    from kakusan import densities, pictures
    from kakusan.core.trace import ExactTrace, Hutchinson
    from kakusan.pipeline import DiffusionModel

    if probes is not None and probes < 0:
        raise UsageError(f"--probes is how many, or 0 for the exact divergence; got {probes}")
    model, quiet = DiffusionModel.load(run, device), quiet or as_json
    x, name = model.rows(data, n)
    path = out or run / "likelihood" / f"{name}.csv"
    _check_place(path, data)
    # one choice for both, which the data make
    spread = densities.dequantiser(model, x, dequantise, quiet)
    trace = None if probes is None else Hutchinson(probes) if probes else ExactTrace(most=10**9)
    options: dict[str, Any] = {
        "label": label, "dequantise": spread, "trace": trace, "tolerance": tolerance,
        "seed": seed, "batch": batch, "quiet": quiet,
    }  # fmt: skip
    held = None
    beside = min(len(x), 256) if beside is None else beside
    if data is not None and beside > 0 and (rows := _beside(model, beside)) is not None:
        held = model.log_prob(rows, **options)
    stopped = False
    try:
        found = model.log_prob(x, **options)
    except densities.Stopped as early:
        found, stopped = early.found, True
    _write_rows(found, path)
    picture = pictures.likelihoods(found, held, name, path.with_suffix(".png"))
    _tell(found, len(x), held, {"rows": str(path), "picture": str(picture)}, as_json)
    if stopped:
        raise KeyboardInterrupt


def _beside(model: DiffusionModel, n: int) -> Tensor | None:
    """Held-out samples of the run, where they can still be found."""
    try:
        return model.rows(None, n)[0]
    except KakusanError as error:
        warnings.warn(f"no held-out data beside: {error}", stacklevel=2)
        return None


def _check_place(path: Path, data: str | None) -> None:
    """Refuses a place for likelihoods before the work."""
    if path.suffix.lower() != ".csv":
        raise UsageError(f"likelihoods are written as .csv, not {path.name!r}")
    if data is not None and Path(data).resolve() in (
        path.resolve(),
        path.with_suffix(".png").resolve(),
    ):
        raise UsageError(f"{path} would be written over the data; choose another --out")
    folder = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        where = "it is a folder" if path.is_dir() else f"{folder} is no folder to write to"
        raise KakusanError(f"cannot write {path}: {where}")


def _write_rows(found: Likelihoods, path: Path) -> None:
    from kakusan.training import files

    columns = (found.value, found.std_error, found.solver_error, found.prior_gap)
    bits = -found.value / (found.d * math.log(2))
    with files.whole(path) as draft:
        lines = ["row,log_prob,probe_std_error,solver_error,prior_gap,bits_per_dim"]
        for i, row in enumerate(zip(*(c.tolist() for c in (*columns, bits)), strict=True)):
            lines.append(",".join([str(i), *(f"{v:.9g}" for v in row)]))
        draft.write_text("\n".join(lines) + "\n")


def _tell(
    found: Likelihoods,
    asked: int,
    held: Likelihoods | None,
    made: dict[str, str],
    as_json: bool,
) -> None:
    """Prints means, and how well DATA and held-out data can be told apart."""
    from kakusan.judging import told_apart

    bits, nats = found.bits_per_dim, found.value
    apart = None if held is None else told_apart(found, held)
    if as_json:
        numbers: dict[str, Any] = {
            "n": bits.n, "asked": asked, "how": found.how, "log_prob": nats.mean().item(),
            "bits_per_dim": bits.value, "std_error": bits.std_error, "d": found.d,
            "probe_std_error": found.std_error.mean().item(),
            "solver_error": found.solver_error.mean().item(), "finer_steps": found.left,
            "prior_gap": found.prior_gap.mean().item(),
        }  # fmt: skip
        if held is not None and apart is not None:
            other = held.bits_per_dim
            numbers |= {
                "held_out": {"n": other.n, "bits_per_dim": other.value,
                             "std_error": other.std_error},
                "told_apart": {"value": apart[0], "std_error": apart[1]},
            }  # fmt: skip
        print(json.dumps(_finite({**numbers, **made}), allow_nan=False))
        return
    if bits.n < asked:
        print(f"stopped after {bits.n} of {asked} samples")
    print(found)
    if held is not None and apart is not None:
        other = held.bits_per_dim
        print(f"held-out data of the run: {other.value:.4g} +- {other.std_error:.2g} bits a "
              f"dimension ({other.n} samples)\n"
              f"  a held-out sample is the likelier of a pair in {100 * apart[0]:.1f} +- "
              f"{100 * apart[1]:.1f}% (50%: alike)")  # fmt: skip
    for word, place in made.items():
        print(f"  {word:10}{place}")
