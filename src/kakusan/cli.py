"""The command line: train, sample, evaluate, condition, likelihood, simulate, bridge, check.

Every verb prints what it made and where; `--json` prints one JSON object instead. Errors are one
sentence: exit code 2 where the request is wrong, 1 where the work failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kakusan import verbs, verbs_condition
from kakusan.errors import KakusanError, UsageError
from kakusan.verbs import Json, Quiet
from kakusan.verbs_bridge import bridge

if TYPE_CHECKING:
    from kakusan.pipeline import DiffusionModel
    from kakusan.training.config import Config


class Stopped(Exception):
    """Ctrl-C during training, in words: exit code 130."""


app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Diffusion models written as what they are: stochastic differential equations.",
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as train makes it.")]
Steps = Annotated[int | None, typer.Option(help="Evaluations of the network a sample.")]
Noise = Annotated[
    float | None,
    typer.Option(help="0: probability-flow ODE; 1: Anderson's reverse SDE."),
]
Label = Annotated[
    str | None, typer.Option(help="Classes to draw, as 3 or cat,dog; default: as in the data.")
]
Guidance = Annotated[float | None, typer.Option(help="Weight of the label; 1 is plain.")]
Seed = Annotated[int, typer.Option(help="Fixes every sample.")]
Batch = Annotated[int, typer.Option(help="Samples at a time; bounds the memory.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"kakusan {version('kakusan')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, two-moons, ..., a file (.npy .npz .csv .parquet), a folder "
            "(pictures, IDX, CIFAR-10), or hub:NAME.  \\[default: digits]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.  \\[default: runs/NAME]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a diffusion model on data.

    Example:  kakusan train --data digits --out runs/digits train.steps=500
    """  # fmt: skip
    from kakusan.training.config import configure
    from kakusan.training.run import resumed

    words = [*(overrides or []), *([f"data.source={json.dumps(data)}"] if data else [])]
    settings = configure(config, words)
    if resume and out is None:
        raise UsageError("--resume needs --out, the run folder to go on with")
    if dry_run:
        _print_settings(_shown(resumed(out, settings) if resume and out else settings), as_json)
        return
    folder = out or Path("runs") / _name(settings.data.source)
    from kakusan.pipeline import DiffusionModel
    from kakusan.training.fit import Interrupted

    try:
        model = DiffusionModel.fit(settings, out=folder, resume=resume, quiet=quiet or as_json)
    except Interrupted as stop:
        raise Stopped(
            f"stopped after step {stop.step}; a checkpoint is kept, go on with: "
            f"kakusan train --resume --out {folder}"
        ) from None
    _report(model, folder, as_json)


@app.command()
def sample(
    run: Run,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 64,
    steps: Steps = None,
    noise: Noise = None,
    seed: Seed = 0,
    label: Label = None,
    guidance: Guidance = None,
    batch: Batch = 256,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to: .png, .npz, .csv or .parquet.  \\[default: RUN/samples/...]"),
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Draw the way from noise to data as well.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw samples from a trained model.

    Example:  kakusan sample runs/digits -n 64 --steps 20 --seed 0 --out x.png
    """
    from kakusan.pipeline import DiffusionModel

    model = DiffusionModel.load(run, device)
    path = out or run / "samples" / f"seed-{seed}.{_suffix(model)}"
    _check_suffix(path, model)
    options: dict[str, Any] = {
        "steps": steps, "noise": noise, "seed": seed, "label": _labels(label),
        "guidance": guidance, "batch": batch,
    }  # fmt: skip
    x = model.sample(n, **options, quiet=quiet or as_json)
    made = {"samples": str(_write(model, x, model.labels(n, _labels(label), seed), path))}
    if model.codec.kind != "images" and path.suffix != ".png":
        made["picture"] = str(model.show(x, path.with_suffix(".png")))
    if trajectory:
        way = model.trajectory(min(n, 8 if model.codec.kind == "images" else 200), **options)
        picture = path.with_name(f"{path.stem}-trajectory.png")
        made["trajectory"] = str(model.show(way, picture))
    if as_json:
        _print_json(n=n, seed=seed, **made)
        return
    for word, place in made.items():
        print(f"  {word:11}{place}")


@app.command()
def evaluate(
    run: Run,
    n: Annotated[
        int | None,
        typer.Option("-n", help="How many samples.  \\[default: as held-out data]"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the data are now, if they have moved.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="pixels-pca64, random-conv-0 or classifier."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Most held-out points to use.")] = 5000,
    likelihoods: Annotated[
        int, typer.Option(help="Held-out and training points whose bits are found; 0: none.")
    ] = 64,
    steps: Steps = None,
    noise: Noise = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    batch: Batch = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Judge a trained model against held-out data.

    Every number stands beside its error bar and its floor: the same number for training data in
    the place of samples.

    Example:  kakusan evaluate runs/digits
    """
    from kakusan import pictures
    from kakusan.pipeline import DiffusionModel
    from kakusan.training import files

    model = DiffusionModel.load(run, device)
    found = model.evaluate(
        n, data=data, features=features, seed=seed, limit=limit, likelihoods=likelihoods,
        steps=steps, noise=noise, guidance=guidance, batch=batch, quiet=quiet or as_json,
    )  # fmt: skip
    record = found.to_json()
    files.write_json(run / "evaluation.json", record)
    made = {
        "file": run / "evaluation.json",
        "picture": pictures.evaluation(found, model.codec, run / "evaluation.png"),
    }
    if found.bound is not None:
        made["bound"] = pictures.elbo_terms(found.bound, run / "bound.png")
    if as_json:
        _print_json(**record, **{word: str(place) for word, place in made.items()})
        return
    print(found)
    for word, place in made.items():
        print(f"  {word:10}{place}")


app.command()(verbs_condition.condition)
app.command()(verbs.likelihood)
app.command()(verbs.simulate)
app.command()(bridge)


@app.command()
def check(
    process: Annotated[
        str,
        typer.Argument(metavar="PROCESS", help="A name, module:object or path/to/file.py:object."),
    ],
    words: verbs.Words = None,
    start: Annotated[
        str | None, typer.Option(help="1,0.5, or a file of draws .npy .npz .csv, one a row.")
    ] = None,
    method: Annotated[str, typer.Option(help="Which solver to measure.")] = "euler-maruyama",
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn a score to run backwards with (a minute).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Fixes every number.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a process of your own: coefficients, noise, orders, laws, the way back.

    Exit code 1 where a check fails; each says why.

    Example:  kakusan check swirl rotation=2
    """
    import torch

    from kakusan import catalogue, certification, launch, simulation

    sde, known = simulation.resolve(process, words), catalogue.methods()
    solver = known[catalogue.named(method, known, "method")]()
    # as simulate reads and refuses them
    states = None if start is None else launch.read_start(start, sde)
    starts = launch.starts_of(sde, states, torch.float64)
    starts = starts if len(starts) > 1 else starts[0]  # one state, not draws of one
    found = certification.certify(
        sde, starts, solver, learn=learn, seed=seed, quiet=quiet or as_json
    )
    print(json.dumps(found.to_json()) if as_json else found)
    if not found.ok:
        raise typer.Exit(1)


# --- small helpers


def _report(model: DiffusionModel, folder: Path, as_json: bool) -> None:
    """What training made, and where."""
    count = sum(p.numel() for p in model.denoiser.parameters())
    pictures = sorted((folder / "samples").glob("step-*.png"), key=lambda p: p.stat().st_mtime)
    if as_json:
        _print_json(out=str(folder), parameters=count, **model.report)
        return
    t = model.config.train
    seconds = model.report["seconds"]
    print(f"trained {count:,} parameters for {t.steps} steps in {seconds:.0f} s ({t.precision}, "
          f"{t.device}); last loss {model.report['loss']:.4f}")  # fmt: skip
    print(f"  weights   {folder / 'model.safetensors'}")
    if pictures:
        print(f"  samples   {pictures[-1]}")
    print(f"  next      kakusan sample {folder}   or   kakusan evaluate {folder}")


def _shown(settings: Config) -> Config:
    """The settings with what the shape of the data decides."""
    from kakusan.training.build import resolved
    from kakusan.training.data import load

    return resolved(settings, load(settings.data, settings.seed).codec.shape)


def _name(source: str) -> str:
    """A folder name for a data source: its last word, without ending."""
    return Path(source.removeprefix("hub:")).name.split(".")[0] or "run"


def _labels(words: str | None) -> list[int | str] | None:
    return None if words is None else [w.strip() for w in words.split(",") if w.strip()]


def _suffix(model: Any) -> str:
    return {"images": "png", "vectors": "npz", "table": "csv"}[model.codec.kind]


def _check_suffix(path: Path, model: Any) -> None:
    fits = {
        "images": (".png", ".npz"),
        "vectors": (".npz", ".png"),
        "table": (".csv", ".parquet", ".npz", ".png"),
    }[model.codec.kind]
    if path.suffix.lower() not in fits:
        raise UsageError(
            f"samples of {model.codec.kind} are written as {', '.join(fits)}, not {path.name!r}"
        )


def _write(model: Any, x: Any, labels: Any, path: Path) -> Path:
    import numpy as np

    from kakusan.training import files

    suffix = path.suffix.lower()
    if suffix == ".png":
        return model.show(x, path)
    decoded = model.to_data(x, labels)
    if suffix != ".npz":
        return files.write_table(path, decoded)
    with files.whole(path) as draft, draft.open("wb") as handle:
        if isinstance(decoded, np.ndarray):
            named = {} if labels is None else {"labels": labels.numpy()}
            np.savez_compressed(handle, allow_pickle=False, x=decoded, **named)
        else:
            columns = {c: np.asarray(decoded[c].to_pylist()) for c in decoded.column_names}
            np.savez_compressed(handle, allow_pickle=False, **columns)
    return path


def _print_settings(settings: Any, as_json: bool) -> None:
    import yaml

    tree = settings.model_dump()
    print(json.dumps(tree) if as_json else yaml.safe_dump(tree, sort_keys=False).rstrip())


def _print_json(**values: Any) -> None:
    print(json.dumps(values))


def main(args: list[str] | None = None) -> None:
    """The entry point: runs a verb, and turns every error into one sentence and an exit code."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    args = sys.argv[1:] if args is None else args
    try:
        code = app(args or ["--help"], standalone_mode=False) or 0
        # typer turns Ctrl-C into its exit code without a word
        return _fail("stopped by Ctrl-C", 130) if code == 130 else code
    except Stopped as error:
        return _fail(str(error), 130)
    except SystemExit as error:  # not ours: nothing here ends the program so
        if isinstance(error.__context__, BrokenPipeError):
            return 141  # the reader, as head, has seen enough; typer ends the program then
        return _fail(f"the process of yours ended the program ({error!r})", 1)
    except typer.TyperException as error:
        return _fail(_typer_sentence(error), error.exit_code)
    except UsageError as error:
        return _fail(str(error), 2)
    except KakusanError as error:
        return _fail(str(error), 1)
    except Exception as error:  # noqa: BLE001 - a person gets a sentence, never a traceback
        if "KAKUSAN_DEBUG" in os.environ:
            raise
        words = " ".join(str(error).split()) or "no further words"
        return _fail(f"unexpected {type(error).__name__}: {words[:400]} "
                     "(KAKUSAN_DEBUG=1 shows where)", 1)  # fmt: skip


def _typer_sentence(error: typer.TyperException) -> str:
    """Typer's message, with the nearest known verb or option."""
    message = error.format_message().rstrip(".")
    if message.startswith("No such command"):
        word = message.split("'")[1]
        verbs = [c.callback.__name__ for c in app.registered_commands if c.callback]
        near = difflib.get_close_matches(word, verbs, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(verbs)}"
        return f"unknown verb {word!r}; {hint}"
    return message


def _fail(message: str, code: int) -> int:
    print(f"kakusan: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
