r"""Log-likelihoods of data under a trained model, in the units of the data.

A model knows the density p of model values x = (raw - shift) · unit, so a density in raw units is
log p(x) + Σ log unit. Whole numbers have no density. What they have is a mass, that of the cell
around them, which has no unit, and it is bounded below by spreading each number over its cell,

.. math:: \log P(k) \ge E_{u \sim q} [\log p(x + u) - \log q(u \mid x)],

with q uniform, or learned. This is a choice, not a detail: the density of the bare lattice points
can be made as large as one likes. Where data lie on the lattice it must therefore be made, by the
caller or when the model was trained (`data.dequantise`).

References:
    A note on the evaluation of generative models (Theis et al., 2016), arXiv 1511.01844
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kakusan.core.bits import Bits, bits_per_dim
from kakusan.core.noise import Keyed
from kakusan.core.trace import ExactTrace, Hutchinson, Trace
from kakusan.errors import KakusanError, UsageError
from kakusan.inference import judge, likelihood
from kakusan.inference.dequantise import (
    AsIs,
    Dequantiser,
    Uniform,
    Variational,
)
from kakusan.inference.metrics import Row
from kakusan.inference.offsets import fit_variational
from kakusan.objectives.chain import Chain, Interpolated, Variance
from kakusan.objectives.decoders import GaussianDecoder
from kakusan.objectives.elbo import Bound, bound, continuous_bound
from kakusan.solvers.adaptive import DormandPrince
from kakusan.training import build, files
from kakusan.training.data import Codec, Source, Stream, statistics
from kakusan.training.progress import progress

if TYPE_CHECKING:
    from kakusan.pipeline import DiffusionModel

CELLS = 14  # separates this use of a seed from all others
SMALL = 32  # up to so many dimensions the exact trace is the cheaper of the two
FEW = 8  # samples that are done again with finer steps
LATTICE = 1e-3  # how far from a lattice point, in cells, rounding leaves one
MOST = 20_000  # samples that learned noise is learned from
RECORD, WEIGHTS, MODEL = "dequantiser.json", "dequantiser.safetensors", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods of n samples, in nats and in the units of the data.

    Attributes:
        value: log p of each, (n,): a mass where data are whole numbers, a density where not.
        std_error: From random probes of the divergence, (n,); NaN with a single probe.
        solver_error: An estimate of what the steps leave, (n,).
        prior_gap: KL(p(x_T | x) ‖ prior) of each, (n,); see `kakusan.inference.likelihood`.
        d: The number of dimensions.
        how: How it was done, in words.
        left: By how much the first few values move, in the mean, with a tenth of the tolerance;
            NaN where that was not tried. Steps that pass over what they should have seen
            underestimate their error; this does not.
    """

    value: Tensor
    std_error: Tensor
    solver_error: Tensor
    prior_gap: Tensor
    d: int
    how: str
    left: float = math.nan

    @property
    def bits_per_dim(self) -> Bits:
        """-value / (d ln 2), its mean and standard error over the samples."""
        return bits_per_dim(self.value, self.d)

    def __str__(self) -> str:
        bits, nats = self.bits_per_dim, self.value
        scale, probes = self.d * math.log(2), self.std_error.mean()
        return (
            f"log p {nats.mean():.5g} +- {bits.std_error * scale:.2g} nats, {bits.value:.4g} +- "
            f"{bits.std_error:.2g} bits a dimension ({len(nats)} samples, {self.how})\n"
            f"  in the mean: probes {'unknown' if probes.isnan() else f'+- {probes:.2g}'}, steps "
            f"{self.solver_error.mean():.2g} (finer ones: {self.left:+.2g}), prior gap "
            f"{self.prior_gap.mean():.2g} nats a sample"
        )


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with the likelihoods that were found before."""

    def __init__(self, found: Likelihoods) -> None:
        super().__init__(f"stopped after {len(found.value)} samples")
        self.found = found


def log_prob(
    model: DiffusionModel,
    x: Tensor,
    label: Tensor | None = None,
    dequantise: str | Dequantiser | None = None,
    trace: Trace | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
    batch: int = 128,
    quiet: bool = True,
) -> Likelihoods:
    """The likelihood of data by the probability flow; see `DiffusionModel.log_prob`."""
    check_values(x, model.codec)
    if batch < 1 or not 0 < tolerance < math.inf:
        raise UsageError(f"batch and tolerance must be positive, got {batch} and {tolerance}")
    spread = dequantiser(model, x, dequantise, quiet)
    d = math.prod(model.codec.shape)
    trace = trace or (ExactTrace() if d <= SMALL else Hutchinson(2))
    how, few = _words(trace, spread, d), x[:FEW]
    rows, done = [], 0
    with progress("likelihood", len(x), quiet=quiet) as advance:
        try:
            for part in _parts(model, x, label, spread, trace, tolerance, seed, batch):
                rows.append(part)
                done += part.shape[1]
                advance(done)
            given = None if label is None else label[:FEW]
            finer = next(_parts(model, few, given, spread, trace, tolerance / 10, seed, FEW))
        except KeyboardInterrupt:
            if not rows:
                raise
            raise Stopped(_found(rows, d, how)) from None
    moved = finer[0] - torch.cat(rows, 1)[0, :FEW]
    found = _found(rows, d, how, moved.mean().item())
    _warn(found, moved, tolerance)
    return found


def _found(rows: list[Tensor], d: int, how: str, left: float = math.nan) -> Likelihoods:
    value, error, steps, gap = torch.cat(rows, 1)
    return Likelihoods(value, error, steps, gap, d, how, left)


def _warn(found: Likelihoods, moved: Tensor, tolerance: float) -> None:
    """Of steps that leave more than the samples' own spread, and of samples that are far off."""
    scale = found.d * math.log(2)
    blur = max(2 * found.bits_per_dim.std_error, 0.01) * scale
    if len(moved) > 1 and abs(found.left) > max(blur, 3 * moved.std().item() / len(moved) ** 0.5):
        warnings.warn(
            f"the steps are too long: a tenth of tolerance={tolerance:g} moves the first "
            f"{len(moved)} values by {found.left:+.3g} nats in the mean, "
            f"{-found.left / scale:+.2g} bits a dimension",
            stacklevel=3,
        )
    if found.prior_gap[far := int(found.prior_gap.argmax())] > 1:
        warnings.warn(
            f"sample {far} is {found.prior_gap[far]:.2g} nats from where the process ends in "
            "noise, too far for its value to say more than that",
            stacklevel=3,
        )


def _finest(codec: Codec) -> float:
    """What a tolerance is measured by: the smallest cell, within reason, or 1.

    Between whole numbers that were spread over their cells, a density has the edges of these.
    """
    cells = codec.cells[codec.whole]
    return float(cells.min().clamp(1 / 256, 1)) if len(cells) else 1.0


def log_units(codec: Codec, spread: Dequantiser) -> float:
    """What turns a density over model values into one over raw ones.

    Numbers that were spread over cells count the mass of these, which has no unit.
    """
    spread_out = codec.whole & (not isinstance(spread, AsIs))
    return codec.units[~spread_out].log().sum().item()


def _words(trace: Trace, spread: Dequantiser, d: int) -> str:
    k = trace.estimates(d)
    probes = "exact trace" if isinstance(trace, ExactTrace) else f"{k} probe{'s' * (k > 1)}"
    if isinstance(spread, AsIs):
        return f"ODE, {probes}"
    kind = "uniform" if isinstance(spread, Uniform) else "variational"
    return f"ODE, {probes}, {kind} dequantisation"


@torch.no_grad()
def _parts(
    model: DiffusionModel,
    x: Tensor,
    label: Tensor | None,
    spread: Dequantiser,
    trace: Trace,
    tolerance: float,
    seed: int,
    batch: int,
) -> Iterator[Tensor]:
    """Value, standard error, solver error and prior gap of each batch, (4, b), on the CPU."""
    net, codec = model.denoiser, model.codec
    weight = next(net.parameters())  # where the network lives, and its precision
    step, unit = tolerance * _finest(codec), log_units(codec, spread)
    for i in range(0, len(x), batch):
        part = x[i : i + batch].to(weight)
        given = None if label is None else label[i : i + batch].to(weight.device)
        # the offsets within the cells are part of what is random about the value
        moved = spread(part, codec.cells, Keyed(seed, i, CELLS), 0)
        try:
            found = likelihood.log_prob(
                net.given(given), moved.x, trace, DormandPrince(step, step), seed=seed, first=i
            )
        except KakusanError as error:
            raise KakusanError(f"in the samples from number {i} on: {error}") from None
        value = found.value - moved.log_q + unit
        errors = (found.std_error, found.solver_error, found.prior_gap)
        yield torch.stack([value, *errors]).cpu()


def dequantiser(
    model: DiffusionModel, x: Tensor, choice: str | Dequantiser | None, quiet: bool = True
) -> Dequantiser:
    """How whole numbers are spread over their cells; refuses to choose for the caller.

    Raises:
        UsageError: If the data are whole numbers and nobody chose.
    """
    if isinstance(choice, Dequantiser):
        return choice
    whole, lattice = bool(model.codec.whole.any()), on_lattice(x, model.codec)
    if choice is None and whole and lattice:
        choice = model.config.data.dequantise
        if choice == "none":
            raise UsageError(
                "these data are whole numbers, which have no density; choose a dequantisation: "
                "uniform (noise over the cell of each, a bound on its mass), variational (learned "
                "noise, a better bound) or none (the density at the bare points, comparable "
                "within this model alone)"
            )
    choice = choice or "none"
    if choice == "none":
        return AsIs()
    if choice not in ("uniform", "variational"):
        raise UsageError(f"dequantise is 'uniform', 'variational' or 'none', not {choice!r}")
    if not whole:
        raise UsageError(f"dequantise={choice!r} is for whole numbers, and these data have none")
    if not lattice:
        raise UsageError(
            f"dequantise={choice!r} spreads whole numbers over their cells, and these data lie "
            "between them (samples of a model do): use 'none', or round them"
        )
    return Uniform() if choice == "uniform" else variational(model, quiet)


def on_lattice(x: Tensor, codec: Codec) -> bool:
    """Whether the entries that hold whole numbers in the data do so in x."""
    away = (rounded(x, codec) - x).abs() / codec.units.to(x)
    return bool((away[:, codec.whole] <= LATTICE).all())


def rounded(x: Tensor, codec: Codec) -> Tensor:
    """Samples as the data would hold them: whole numbers where those do, within their range."""
    return torch.where(codec.whole.to(x.device), codec.encode(codec.decode(x)).to(x), x)


def check_values(x: Tensor, codec: Codec) -> None:
    """Refuses what are no model values of this codec.

    Raises:
        UsageError: If there is no sample, its shape is another, or a number is not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(
            f"samples are floating-point tensors in model units, not {kind}: codec.encode(...) "
            "makes them from data"
        )
    if tuple(x.shape[1:]) != tuple(codec.shape):
        expected = ", ".join(map(str, ("n", *codec.shape)))
        raise UsageError(f"data of shape {tuple(x.shape)} do not fit this model: ({expected})")
    if len(x) == 0:
        raise UsageError("there is no sample to find the likelihood of")
    bad = ~x.flatten(1).isfinite().all(1)
    if bad.any():
        raise UsageError(f"sample {int(bad.nonzero()[0])} of the data is not finite")


def carried(
    model: DiffusionModel, way: Callable[..., Tensor], x: Tensor, given: Tensor | None
) -> Tensor:
    """Codes of samples, or samples of codes, some at a time; see `DiffusionModel.encode`."""
    check_values(x, model.codec)
    weight, parts = next(model.denoiser.parameters()), []
    with torch.no_grad():
        for i in range(0, len(x), 256):
            label = None if given is None else given[i : i + 256].to(weight.device)
            score = model.denoiser.given(label)
            parts.append(way(score, x[i : i + 256].to(weight)).cpu().to(x.dtype))
    return torch.cat(parts)


def some(source: Source | Stream, most: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """At most so many samples with their labels: drawn by seed, or the first of a stream."""
    if isinstance(source, Stream):
        return statistics.first(source, most)
    return judge.gather(source, most, seed)


# --- the bound


def elbo(
    model: DiffusionModel,
    x: Tensor,
    label: Tensor | None = None,
    dequantise: str | Dequantiser | None = None,
    steps: int | None = None,
    variance: Variance | None = None,
    times: int = 32,
    seed: int = 0,
    batch: int = 256,
) -> Bound:
    """The variational bound on log p(x); see `DiffusionModel.elbo`."""
    check_values(x, model.codec)
    net, codec = model.denoiser, model.codec
    weight = next(net.parameters())
    lattice = bool(codec.whole.any()) and on_lattice(x, codec)
    if dequantise is None:
        dequantise = model.config.data.dequantise if lattice else "none"
    if dequantise == "none" and lattice:
        # the decoder gives whole numbers their mass, which has no unit
        decoder, offset = build.decoder(codec), codec.units[~codec.whole].log().sum()
    else:
        spread = dequantiser(model, x, dequantise)
        with torch.no_grad():
            moved = spread(x.to(weight), codec.cells, Keyed(seed, 0, CELLS), 0)
        x, decoder = moved.x, GaussianDecoder()
        offset = log_units(codec, spread) - moved.log_q.cpu()
    x, given = x.to(weight), None if label is None else label.to(weight.device)
    options: dict[str, Any] = {"decoder": decoder, "seed": seed, "batch": batch, "label": given}
    if steps is None:
        found = continuous_bound(net, x, times, **options)
    else:
        if variance is None and model.config.model.variance == "learned":
            variance = Interpolated()
        chain = Chain(net.process, steps, decoder.start(net.process))
        found = bound(net, x, chain, variance, **options)
    return dataclasses.replace(found, decoder=found.decoder + offset)


# --- both, for `evaluate`


def rows(
    model: DiffusionModel,
    test: tuple[Tensor, Tensor | None],
    train: tuple[Tensor, Tensor | None],
    seed: int,
    quiet: bool,
) -> tuple[dict[str, Row], Bound]:
    """Bits per dimension of held-out data in two ways, each beside that of training data.

    Returns:
        The two rows, and the bound of the held-out data with its terms.
    """
    spread = "uniform" if model.codec.whole.any() else "none"
    found: dict[str, list[Bits]] = {"bits_per_dim_flow": [], "bits_per_dim_bound": []}
    how, bounds = [], []
    for x, label in (test, train):
        flow = log_prob(model, x, label, spread, None, 1e-2, seed, quiet=quiet)
        bounds.append(below := elbo(model, x, label, seed=seed))
        found["bits_per_dim_flow"].append(flow.bits_per_dim)
        found["bits_per_dim_bound"].append(bits_per_dim(below.value, flow.d))
        given = "" if label is None else ", given the label"
        how = [flow.how + given, f"bound, 32 levels{given}"]
    rows = {
        name: Row(a.value, a.std_error, len(test[0]), b.value, b.std_error, words)
        for (name, (a, b)), words in zip(found.items(), how, strict=True)
    }
    return rows, bounds[0]


# --- learned noise


def variational(model: DiffusionModel, quiet: bool = True) -> Variational:
    """The learned dequantiser of a run: read from its folder, or learned from its data, once."""
    if model.learned is None:
        q = _stored(model.folder) if model.folder is not None else None
        if q is None:
            q = _learned(model, quiet)
        device = next(model.denoiser.parameters()).device
        model.learned = q.eval().requires_grad_(False).to(device)
    return model.learned


def _stored(folder: Path) -> Variational | None:
    """That which was learned for the weights as they are now, if any."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record, weights = files.read_json(path), files.read_tensors(folder / WEIGHTS)
    try:
        if record["model"] != files.checksum(folder / MODEL):
            return None  # the run was trained on
        q = Variational.from_json(record)
        q.load_state_dict(weights)
    except (KakusanError, KeyError, TypeError, RuntimeError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise KakusanError(
            f"{path} and {WEIGHTS} are damaged, remove both to learn them again: {words}"
        ) from None
    return q


def _learned(model: DiffusionModel, quiet: bool) -> Variational:
    """Learned in 500 steps of 128 samples, and kept in the run folder where there is one."""
    net = model.denoiser
    train, _ = some(model.data_of_run().train, MOST, model.config.seed)
    device, steps = next(net.parameters()).device, 500
    x0, cells = train.to(device), model.codec.cells.to(device)
    with progress("dequantiser", steps, quiet=quiet) as advance:
        q = fit_variational(
            net.process, net.score, x0, cells, steps=steps, seed=model.config.seed, tick=advance
        )
    if model.folder is not None:
        try:
            record = {**q.to_json(), "model": files.checksum(model.folder / MODEL)}
            files.write_tensors(model.folder / WEIGHTS, q.state_dict())
            files.write_json(model.folder / RECORD, record)
        except (KakusanError, OSError) as error:  # what was learned is good all the same
            warnings.warn(f"the dequantiser is not kept: {error}", stacklevel=2)
    return q
