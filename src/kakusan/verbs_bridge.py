"""The verb `bridge`: its options, and what it prints."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kakusan.errors import KakusanError, UsageError
from kakusan.verbs import Json, Out, Quiet, Start, Words, _finite, _numbers, _with_error

if TYPE_CHECKING:
    from kakusan.bridging import Bridged, Request
    from kakusan.processes.sde import SDE

Process = Annotated[
    str,
    typer.Argument(
        metavar="PROCESS", help="A name, module:object or path/to/file.py:object, as simulate."
    ),
]
End = Annotated[
    str | None,
    typer.Option(
        help="What was seen at the end: -1 or 2,-0.1, or a file .npy .npz .csv of one state."
    ),
]
Observe = Annotated[
    str | None,
    typer.Option(help="Which numbers of a state are seen, as x1 or x1,x3.  \\[default: all]"),
]
At = Annotated[
    list[str] | None,
    typer.Option(metavar="T=VALUES", help="What was seen at another time, as 0.5=0.2; repeat it."),
]
Guided = Annotated[
    bool | None,
    typer.Option(
        "--guided/--no-guided",
        help="Draw paths towards the end while learning, for this end alone.  \\[default: where "
        "free paths do not come near it]",
    ),
]
Tilt = Annotated[
    Path | None,
    typer.Option(
        help="A file for what is learned; read where it was learned for the same request.  "
        "\\[default: NAME.bridge.safetensors beside the output]"
    ),
]


def bridge(
    process: Process,
    words: Words = None,
    end: End = None,
    start: Start = None,
    observe: Observe = None,
    std: Annotated[
        float, typer.Option(help="Noise on what is seen, as a standard deviation.")
    ] = 0.0,
    at: At = None,
    event: Annotated[
        str | None,
        typer.Option(metavar="'NAME>NUMBER'", help="An inequality at the end instead, as 'x1>1'."),
    ] = None,
    until: Annotated[
        float | None, typer.Option(help="When the end is.  \\[default: the process's own]")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Paths.")] = 1000,
    steps: Annotated[int, typer.Option(help="Steps, of equal length.")] = 200,
    guided: Guided = None,
    iterations: Annotated[
        int | None, typer.Option(help="Steps of training.  \\[default: 4000]")
    ] = None,
    tilt: Tilt = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Learn anew, whatever the file holds.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Fixes every path, and the training of a new tilt.")
    ] = 0,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw paths of a process given what was seen of their end.

    Learns what has to be added to the process so that its paths end there
    (a minute or two; kept in a file, which serves other ends as well), draws
    paths with the weights that make their law exact, and shows them beside
    free paths that came near by themselves, where there are any.

    Example:  kakusan bridge double-well v=1 --start 1 --end -1
    """
    from kakusan import bridging, catalogue, launch

    sde = _process(process, words or [])
    name = " ".join([process, *(words or [])])
    name = name if ":" in process else catalogue.kebab(type(sde).__name__)
    request = bridging.Request(
        end=None if end is None else _end(end, sde),
        observe=tuple(w.strip() for w in observe.split(",")) if observe is not None else (),
        std=std, at=tuple(_at(word) for word in at or []), event=event, until=until,
        start=None if start is None else launch.read_start(start, sde),
        n=n, steps=steps, guided=guided, iterations=iterations, seed=seed,
    )  # fmt: skip
    _bridge(sde, request, name, tilt, fresh, out, quiet, as_json)


def _bridge(
    sde: SDE, request: Request, name: str, tilt: Path | None, fresh: bool, out: str | None,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    from kakusan import bridge_charts, bridging, simulation

    base = name.split(":")[-1].split(" ")[0]
    places = simulation.places(out, f"{base}-bridge")
    beside = places["picture"]
    stem = beside.stem.removesuffix("-bridge")
    tilt = tilt or beside.with_name(f"{stem}.bridge.safetensors")
    for place in (*places.values(), tilt):
        _check_place(place)
    bridging.pose(sde, request)  # refused before the work
    shown = sys.stdout

    def say(line: str) -> None:
        if not as_json:
            print(line, file=shown, flush=True)

    try:
        # what the process prints is not part of the answer
        with contextlib.redirect_stdout(sys.stderr):
            found = bridging.bridged(
                sde, request, name, tilt, fresh, quiet=quiet or as_json, say=say
            )
    except UsageError:
        raise
    except KakusanError as error:
        # smaller steps are all that a bridge offers
        said = re.sub(r"(; \w+\(\) or \w+\(\), |, or [A-Z]\w+\(\) )where .*$", ": more --steps",
                      str(error))  # fmt: skip
        raise KakusanError(said) from error
    writers = {"arrays": bridging.write_arrays, "table": bridging.write_table,
               "picture": bridge_charts.draw}  # fmt: skip
    made = {kind: str(writers[kind](found, place)) for kind, place in places.items()}
    made["tilt"] = str(tilt)
    if as_json:
        print(json.dumps(_finite({**found.to_json(), **made}), allow_nan=False))
        return
    print(summary(found))
    for kind, place in made.items():
        print(f"  {kind:10}{place}")


def _process(name: str, words: list[str]) -> SDE:
    """The process behind a name; one of the zoo over its own span, which is that of bridges."""
    from kakusan import catalogue

    if not re.search(r":|\.py$", name) and not any(w.startswith("span=") for w in words):
        zoo = catalogue.zoo()
        cls = zoo[catalogue.named(name, zoo, "process")]
        span = inspect.signature(cls).parameters["span"].default
        words = [f"span={list(span)}", *words]
    return catalogue.resolve(name, words)


def _end(text: str, sde: SDE) -> tuple[float, ...]:
    """Numbers, or the one state of a file."""
    from kakusan import launch

    try:
        found = launch.read_start(text, sde)
    except UsageError as error:
        said = re.sub(r"\b(a|the) start\b", lambda m: "an end" if m[1] == "a" else "the end",
                      str(error))  # fmt: skip
        raise UsageError(said) from None
    if len(found) > 1 and found.shape[1] > 1:
        raise UsageError(f"paths end in one state, and {text} holds {len(found)}")
    return tuple(found.flatten().tolist())


def _at(word: str) -> tuple[float, tuple[float, ...]]:
    t, mark, values = word.partition("=")
    if not mark:
        raise UsageError(f"--at is TIME=VALUES, as 0.5=0.2 or 0.5=1,2; got {word!r}")
    return _numbers(t, "the time of --at")[0], _numbers(values, "the values of --at")


def _check_place(path: Path) -> None:
    """Refuses a place that cannot be written, before minutes of work."""
    folder = next(p for p in path.absolute().parents if p.exists())
    where = "it is a folder" if path.is_dir() else f"{folder} is no folder to write to"
    try:
        # only an attempt tells, for some users and some file systems
        if not path.is_dir() and tempfile.TemporaryFile(dir=folder).close() is None:
            return
    except OSError:
        pass
    raise UsageError(f"cannot write {path}: {where}")


# --- in words


def summary(found: Bridged) -> str:
    """What was learned, how well paths meet what was seen, and what they do half way."""
    r, grid, learned = found.request, found.paths.t, found.bridge.report
    span = f"t={grid[0]:g} to t={grid[-1]:g}"
    lines = [f"{found.title}: {r.n:,} paths given {found.posed.words}, {len(grid) - 1:,} steps "
             f"from {span}, seed {r.seed}, {found.seconds:.1f} s", ""]  # fmt: skip
    rows = []
    if learned is not None:
        towards = "towards this end" if found.guided else "that are free"
        before = " before" if found.reused else ""
        rows.append(("learned", f"in {learned.seconds:.0f} s{before}: {learned.iterations:,} "
                     f"iterations on {learned.paths:,} paths {towards}"))  # fmt: skip
    if found.missed is not None:
        rows.append(("end", f"missed by at most {found.missed:.2g}"))
    if r.event:
        rows.append(("end", f"met by {100 * (found.paths.missed == 0).double().mean():.0f}% of "
                     "the paths; the others weigh nothing"))  # fmt: skip
    density, over = found.log_density, ", over all starts" if len(found.posed.starts) > 1 else ""
    rows += [
        ("effective", f"{found.paths.ess:,.0f} of {r.n:,} paths ({100 * found.share:.3g}%)"),
        ("log p", f"{_with_error(density.value, density.std_error)}{over}"),
        ("free paths", _luck(found)),
    ]
    lines += [f"  {word:12}{text}" for word, text in rows]
    return "\n".join([*lines, "", *_table(found), ""])


def _luck(found: Bridged) -> str:
    free = found.free
    if free.enough:
        log_p = found.free_log_density
        like = "" if log_p is None else f": log p is {log_p.value:.3f} ± {log_p.std_error:.2g}"
        return f"{free.near:,} of {free.of:,} came {found.nearness} by themselves{like}"
    few, where = free.near or "none", "there" if found.request.event else "near"
    return f"{few} of {free.of:,} came {where} by themselves: too few to compare with"


def _table(found: Bridged) -> list[str]:
    """Means and standard deviations half way; those of the free paths beside them."""
    shown, free = found.middle[:12], found.free.enough
    t = found.paths.t[len(found.paths.t) // 2].item()
    head = [f"at t={t:g}", "mean ± std. error", "std"]
    rows = [[*head, *(["free paths near", "std"] if free else [])]]
    for row in shown:
        mean = _with_error(row["mean"], row["std_error"])
        rows.append([row["name"], mean, f"{row['std']:.4g}"])
        if free:
            mean = _with_error(row["free_mean"], row["free_std_error"])
            rows[-1] += [mean, f"{row['free_std']:.4g}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    if len(found.middle) > len(shown):
        lines.append(f"  and {len(found.middle) - len(shown)} coordinates more, in the files")
    return lines
