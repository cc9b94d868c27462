"""The verb `condition`: what is seen of a sample, in words, and what is drawn given it."""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kakusan.errors import KakusanError, UsageError
from kakusan.verbs import Json, Quiet, Run, _finite

if TYPE_CHECKING:
    from torch import Tensor

    from kakusan.conditioning import ConditionedSamples
    from kakusan.pipeline import DiffusionModel
    from kakusan.scenes import Scene

GUIDES = ("pigdm", "moments", "dps", "twisted", "learned")

Mask = Annotated[
    str | None,
    typer.Option(
        help="What is HIDDEN of a picture, the rest is seen: top, bottom, left, right (a half), "
        "centre, random:0.5 (a share of the pixels), or a file: a picture, white where hidden, or "
        ".npy, true where hidden."
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        help="What is measured of a picture instead: blur (blur:2 of two pixels), downsample:2, "
        "or project:16, so many random directions."
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=VALUE",
        help="A column of a table, or x1=0.5 of points; may be given several times.",
    ),
]
Happens = Annotated[
    str | None,
    typer.Option(
        "--event", metavar="A>B",
        help="What holds of a sample: ink>0.4, left>right of pictures (ink from 0 to 1), x1<0.5 "
        "of points.",
    ),
]  # fmt: skip
Std = Annotated[
    float | None,
    typer.Option(
        help="Noise of what is seen, in model units (pictures span -1 to 1).  "
        "\\[default: 0.05 of --measure, else 0: met exactly]"
    ),
]
Row = Annotated[int, typer.Option(help="Which held-out picture to look at, from 0.")]
Picture = Annotated[
    Path | None, typer.Option("--image", help="A picture of your own to look at instead.")
]
By = Annotated[
    str | None,
    typer.Option(
        help="pigdm, moments, dps; twisted: particles that correct pigdm, slower and exact with "
        "many; learned: a tilt learned from the model's own samples, a minute or more once, kept "
        "in RUN/conditions for all values.  \\[default: pigdm of pictures, else twisted]"
    ),
]


def condition(
    run: Run,
    mask: Mask = None,
    measure: Measure = None,
    given: Given = None,
    event: Happens = None,
    row: Row = 0,
    image: Picture = None,
    std: Std = None,
    label: Annotated[
        str | None, typer.Option(help="Of which class as well, of a model with labels.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Weight of the label; 1 is plain.")] = 1.0,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 8,
    by: By = None,
    particles: Annotated[
        int, typer.Option(help="Those of --by twisted, and the paths of --by learned.")
    ] = 512,
    rehearse: Annotated[int, typer.Option(help="Samples that --by learned learns from.")] = 2048,
    steps: Annotated[int, typer.Option(help="Evaluations of the network a sample.")] = 50,
    noise: Annotated[
        float, typer.Option(help="1: Anderson's reverse SDE; 0: probability-flow ODE.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Fixes every sample.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples at a time; bounds the memory.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            help="FILE.png, .npz or .csv: a picture and the numbers, under this name.  "
            "\\[default: RUN/conditioned/...]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw from a trained model given a part of a picture, a measurement, columns or an event.

    The model is not trained. --mask hides a part of a held-out picture and draws what may have
    been there; --given fixes columns of a table; --event asks for what holds of a sample.

    Example:  kakusan condition runs/digits --mask top -n 8
    """
    from kakusan.pipeline import DiffusionModel

    asked = [word for word, value in (("--mask", mask), ("--measure", measure), ("--given", given),
                                 ("--event", event)) if value]  # fmt: skip
    if len(asked) != 1:
        raise UsageError(_which(asked, label))
    model = DiffusionModel.load(run, device)
    by = by or ("twisted" if given or event else "pigdm")
    how = _guide(by, bool(event), particles, rehearse)
    scene = _scene(model, mask, measure, given, event, (row, image, seed), std, label)
    name = _name(mask or measure or given or [event or ""], image, row)
    name += "" if label is None else f"-label{label}"
    name += "" if std is None else f"-std{std:g}"
    place = out or run / "conditioned" / f"{name}-{by}-{seed}"
    places = _places(model, place)  # refused before the work
    options: dict[str, Any] = {"seed": seed, "batch": batch, "quiet": quiet or as_json}
    found, more = _drawn(model, run, scene, event, how, n, guidance, steps, noise, options)
    numbers = _numbers(found, scene)
    if scene.original is not None:
        blind = model.sample(n, **options)  # the model's own steps: it saw nothing
        numbers["distance_unseen"] = _away(blind, scene)
    made = _write(model, found, scene, places)
    if as_json:
        about = {"n": n, "seed": seed, "given": scene.words, **more, "how": found.how}
        print(json.dumps(_finite({**about, **numbers, **made}), allow_nan=False))
        return
    print(_summary(scene, found, numbers))
    for word, path in made.items():
        print(f"  {word:10}{path}")


def _scene(
    model: DiffusionModel, mask: str | None, measure: str | None, given: list[str] | None,
    event: str | None, looked: tuple[int, Path | None, int], std: float | None, label: str | None,
) -> Scene:  # fmt: skip
    """What was seen, of options."""
    from kakusan import scenes

    if event:
        return scenes.happening(model, event, label)
    if given:
        return scenes.columns(model, given, std or 0.0, label)
    row, image, seed = looked
    original, name = scenes.looked_at(model, row, image)
    scene = scenes.pictured(model, original, name, mask, measure, std, seed)
    return scene._replace(label=label)


def _drawn(
    model: DiffusionModel, run: Path, scene: Scene, event: str | None, how: Any, n: int,
    guidance: float, steps: int, noise: float, options: dict[str, Any],
) -> tuple[ConditionedSamples, dict[str, Any]]:  # fmt: skip
    """The samples, and what there is to say of a tilt that was learned for them."""
    from kakusan.condition_files import kept_condition
    from kakusan.learned_conditions import Learned

    label, quiet = scene.label, options["quiet"]
    if not isinstance(how, Learned):
        found = model.condition(scene.observation, scene.y, n, how=how, steps=steps, noise=noise,
                                label=label, guidance=guidance, **options)  # fmt: skip
        return found, {}
    words = _words(scene, event, model.codec.shape)
    tilt, reused = kept_condition(run, model, scene.observation, how, words, label=label,
                                  guidance=guidance, quiet=quiet)  # fmt: skip
    found = tilt.sample(scene.y, n, options["seed"], quiet=quiet)
    return found, {"reused": reused, "learned": tilt.report and tilt.report._asdict()}


def _which(asked: list[str], label: str | None) -> str:
    if asked:
        return f"{' and '.join(asked)} are different things to see; choose one"
    if label is not None:
        return ("--label goes with --mask, --measure, --given or --event here; kakusan sample RUN "
                f"--label {label} draws a class alone")  # fmt: skip
    return (
        "what was seen? --mask top hides a half of a picture, --measure blur blurs it, --given "
        "column=value fixes a column, --event 'ink>0.3' says what holds"
    )


def _guide(by: str, event: bool, particles: int, rehearse: int) -> Any:
    """The guidance of a name."""
    from kakusan.inference.guidance.dps import DPS
    from kakusan.inference.guidance.moments import MomentMatching
    from kakusan.inference.guidance.pigdm import PiGDM
    from kakusan.inference.guidance.twisted import Twisted
    from kakusan.learned_conditions import Learned

    if by not in GUIDES:
        raise UsageError(f"no guidance named {by!r}; known are {', '.join(GUIDES)}")
    if event and by not in ("twisted", "learned"):
        raise UsageError(f"--by {by} follows what is linear in a sample, and an event is not: "
                         "--by twisted or --by learned")  # fmt: skip
    if by == "learned":
        return Learned(paths=rehearse, particles=particles)
    if by == "twisted":
        return Twisted(particles=particles) if event else Twisted(PiGDM(), particles)
    return {"pigdm": PiGDM(), "moments": MomentMatching(), "dps": DPS()}[by]


def _words(scene: Scene, event: str | None, shape: tuple[int, ...]) -> str:
    """What stands for an observation alone, whatever was seen."""
    if event is not None:
        return f"event {event}"
    import torch

    H = scene.observation.matrix(torch.zeros(1, *shape)).numpy()  # pyright: ignore
    return f"linear {zlib.crc32(H.tobytes()):08x} {H.shape} {scene.observation.std}"  # pyright: ignore


# --- results


def _away(x: Tensor, scene: Scene) -> float:
    """The rms distance from the original, over what nobody saw."""
    assert scene.original is not None
    return (x - scene.original)[:, scene.open].square().mean().sqrt().item()


def _numbers(found: ConditionedSamples, scene: Scene) -> dict[str, float]:
    """Missed, spread and distance, in model units."""
    numbers = {
        "missed": found.missed.square().mean().sqrt().item(),
        "mended": found.mended.square().mean().sqrt().item(),
        "spread": found.std[scene.open].square().mean().sqrt().item(),
    }
    if found.ess is not None:
        numbers["ess"] = found.ess
    if scene.original is not None:
        numbers["distance"] = _away(found.samples, scene)
    return numbers


def _summary(scene: Scene, found: ConditionedSamples, numbers: dict[str, float]) -> str:
    """What came out, in words; all numbers are root mean squares in model units."""
    label = "" if scene.label is None else f", class {scene.label}"
    lines = [f"{len(found.samples)} samples given {scene.words}{label}, by {found.how}"]
    missed = f"  missed    {numbers['missed']:.3g} from what was seen"
    if getattr(scene.observation, "std", None) == 0:
        missed += f"; {numbers['mended']:.3g} before it was put in"
    spread = (
        f"{numbers['spread']:.3g} of what was not seen" if scene.open.any() else "all was seen"
    )
    lines += [missed, f"  spread    {spread}"]
    if "distance" in numbers:
        lines.append(f"  distance  {numbers['distance']:.3g} from the original where not seen; "
                     f"{numbers['distance_unseen']:.3g} of samples given nothing")  # fmt: skip
    if found.log_weights is not None:
        few = "" if (found.ess or 0) > 10 else ": so few that spread means little"
        different = len(found.samples.flatten(1).unique(dim=0))
        lines.append(f"  particles {found.ess:.3g} of {len(found.log_weights)} counted where it "
                     f"was the fewest{few}; {different} of the {len(found.samples)} samples "
                     "differ")  # fmt: skip
    return "\n".join(lines)


def _name(what: str | list[str] | None, image: Path | None, row: int) -> str:
    """A file name for what was asked."""
    words = "-".join(what) if isinstance(what, list) else f"{Path(what or '').stem}"
    where = "" if isinstance(what, list) else f"-{image.stem if image else f'row{row}'}"
    words = words.replace(">", "-above-").replace("<", "-below-")
    return "".join(c if c.isalnum() or c in "-_.=" else "-" for c in words + where)


def _places(model: DiffusionModel, place: Path) -> tuple[Path, Path]:
    """Where the numbers go and where the picture; refuses other endings."""
    suffix = ".csv" if model.codec.kind == "table" else ".npz"
    if place.suffix in (".png", ".npz", ".csv"):
        if place.suffix not in (".png", suffix):
            raise UsageError(f"these samples are written as {suffix} and .png, not {place.name}")
        place = place.with_suffix("")
    return place.with_name(place.name + suffix), place.with_name(place.name + ".png")


def _write(
    model: DiffusionModel, found: ConditionedSamples, scene: Scene, places: tuple[Path, Path]
) -> dict[str, str]:
    """The numbers, and the picture beside them."""
    import numpy as np

    from kakusan import pictures
    from kakusan.training import files
    from kakusan.training.data import ImageCodec

    numbers, picture = places
    x, codec = found.samples, model.codec
    if isinstance(codec, ImageCodec) and scene.original is not None and scene.seen is not None:
        pictures.conditioned(x, (scene.original, scene.seen), scene.words, codec, picture)
    else:
        held = None
        with contextlib.suppress(KakusanError):  # data that the run cannot find again
            held = None if isinstance(codec, ImageCodec) else model.rows(None, 1000)[0]
        pictures.samples(x, codec, picture, held, f"given {scene.words}")
    drawn = model.to_data(found.samples)
    if numbers.suffix == ".csv":
        files.write_table(numbers, drawn)
    else:
        arrays = {"x": drawn, "y": found.y[:1].numpy(), "missed": found.missed.numpy()}
        if scene.original is not None:
            arrays["original"] = model.to_data(scene.original.unsqueeze(0))[0]
            arrays["open"] = scene.open.numpy()
        with files.whole(numbers) as draft, draft.open("wb") as handle:
            np.savez_compressed(handle, allow_pickle=False, **arrays)
    return {"samples": str(numbers), "picture": str(picture)}
