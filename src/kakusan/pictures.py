"""Results as pictures, where people would rather look than read.

Images become a grid, points in the plane a scatter, everything else one panel a column. Every
function writes a PNG whole and returns its path.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kakusan.inference.judge import Evaluation
from kakusan.objectives.elbo import Bound
from kakusan.training import files
from kakusan.training.data.codecs import Codec, ImageCodec
from kakusan.training.data.images import MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kakusan.densities import Likelihoods

INK, PAPER, DATA, MODEL = "#222222", "#ffffff", "#9aa5b1", "#d1495b"


def samples(
    x: Tensor, codec: Codec, path: Path, beside: Tensor | None = None, title: str = ""
) -> Path:
    """Draws samples (n, *shape) in model units; others than images beside data where given."""
    if isinstance(codec, ImageCodec):
        return _save_image(grid(pixels(x, codec)), path)
    figure = _panels(codec.decode(x), None if beside is None else codec.decode(beside))
    figure.suptitle(title)
    return _save_figure(figure, path)


def trajectories(x: Tensor, codec: Codec, path: Path) -> Path:
    """Draws the way from noise to data, (steps + 1, n, *shape): a row a sample, or lines."""
    if isinstance(codec, ImageCodec):
        kept = np.linspace(0, len(x) - 1, min(len(x), 11)).round().astype(int)
        rows = x[kept].transpose(0, 1)[:12]
        flat = rows.reshape(-1, *codec.shape)
        return _save_image(grid(pixels(flat, codec), columns=len(kept)), path)
    return _save_figure(_lines(x), path)


def conditioned(
    x: Tensor, beside: tuple[Tensor, Tensor], words: str, codec: ImageCodec, path: Path
) -> Path:
    """Draws images given a part of one: the original, what was seen, the samples, their moments.

    Arguments:
        x: Samples, (n, *shape), in model units.
        beside: The original and what was seen of it, each (*shape).
        words: What was seen.
        codec: That of the model.
        path: Where to.
    """
    plt = _pyplot()
    figure = plt.figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    mean, std = x.mean(0), x.std(0, correction=min(1, len(x) - 1))
    # the standard deviation from black, 0, to white, half of the range
    panels = {"original": beside[0], "seen": beside[1], "mean": mean, "std": 2 * std - 1}
    for axes, (title, image) in zip(left.subplots(2, 2).flat, panels.items(), strict=True):
        _show(axes, pixels(image.unsqueeze(0), codec)[0])
        axes.set_title("standard deviation, white: 1" if title == "std" else title)
    axes = right.subplots()
    _show(axes, grid(pixels(x, codec)))
    axes.set_title(f"{len(x)} samples given\n{words}")
    return _save_figure(figure, path)


def _show(axes: Axes, image: np.ndarray) -> None:
    """An image (H, W, C) as it is, grey where it has fewer than three channels."""
    axes.imshow(image[..., 0] if image.shape[2] < 3 else image, cmap="gray", vmin=0, vmax=255)
    axes.axis("off")


def pixels(x: Tensor, codec: ImageCodec) -> np.ndarray:
    """Images as uint8, (n, H, W, C); of more channels than a picture has, the first."""
    images = np.ascontiguousarray(codec.pixels(x).transpose(0, 2, 3, 1))
    return images if images.shape[3] in MODES else images[..., :1]


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Sets images (n, H, W, C) in rows on paper; small ones are enlarged, pixel by pixel."""
    n, H, W, C = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    page = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, C), 255, np.uint8)
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        top, left = gap + r * (H + gap), gap + c * (W + gap)
        page[top : top + H, left : left + W] = image
    zoom = max(1, round(512 / page.shape[1]))
    return page.repeat(zoom, 0).repeat(zoom, 1)


def evaluation(found: Evaluation, codec: Codec, path: Path) -> Path:
    """Samples beside held-out data, each metric beside its floor, the loss over noise levels."""
    plt = _pyplot()
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    _both(left, found, codec)
    _metrics(middle, found)
    angle, loss = found.levels.angle, found.levels.loss
    right.errorbar(angle, loss, 2 * found.levels.std_error, color=MODEL, marker="o", ms=3)
    right.set(xlabel="angle in degrees: 0 data, 90 noise", ylabel="loss of v", ylim=(0, None))
    right.set_title(f"denoising loss, {found.levels.n} held-out samples")
    return _save_figure(figure, path)


def likelihoods(found: Likelihoods, held: Likelihoods | None, name: str, path: Path) -> Path:
    """How many bits a dimension samples take, beside the run's held-out data where given."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    parts = [(found, MODEL, name)]
    if held is not None:
        parts.insert(0, (held, DATA, "held-out data of the run"))
    bits = [(-p.value / (p.d * math.log(2))).numpy() for p, _, _ in parts]
    together = np.concatenate(bits)
    columns = min(max(round(len(together) ** 0.5), 10), 40)  # of few samples, more are noise
    edges = np.histogram_bin_edges(together, columns).tolist()
    for values, (_, color, word) in zip(bits, parts, strict=True):
        axes.hist(
            values, edges, density=True, color=color, alpha=0.6, label=f"{word}: {len(values)}"
        )
        axes.axvline(values.mean(), color=color, lw=1.5)
    axes.set(xlabel="bits a dimension: -log p / (d ln 2); more is less likely", yticks=[])
    axes.set_title(found.how)
    axes.legend(frameon=False)
    return _save_figure(figure, path)


def _both(axes: Axes, found: Evaluation, codec: Codec) -> None:
    n = 36
    if isinstance(codec, ImageCodec):
        real, drawn = (grid(pixels(x[:n], codec), 6) for x in (found.test, found.samples))
        high = min(len(real), len(drawn))
        bar = np.full((high, 12, real.shape[2]), 255, np.uint8)
        both = np.concatenate([real[:high], bar, drawn[:high]], 1)
        axes.imshow(both[..., 0] if both.shape[2] < 3 else both, cmap="gray")
        axes.set(title="held-out data  |  samples", xticks=[], yticks=[])
        return
    for x, color, name in ((found.test, DATA, "held-out data"), (found.samples, MODEL, "samples")):
        flat = x.flatten(1)[:2000]
        # the first two numbers: a glance, not the whole of a high dimension
        other = flat[:, 1] if flat.shape[1] > 1 else flat[:, 0]
        axes.scatter(flat[:, 0], other, s=4, color=color, label=name, alpha=0.6)
    axes.set(title="first two coordinates, in model units")
    axes.legend(frameon=False)


def _metrics(axes: Axes, found: Evaluation) -> None:
    """Each metric's distance from its floor, in standard errors: one scale for all of them."""
    names = [name for name, row in found.metrics.items() if row.std_error > 0]
    rows = [found.metrics[name] for name in names]
    z = [(r.value - r.floor) / math.hypot(r.std_error, r.floor_std_error) for r in rows]
    axes.axvspan(-2, 2, color=DATA, alpha=0.25, lw=0)
    axes.axvline(0, color=INK, lw=1)
    axes.hlines(names, 0, z, color=MODEL, lw=1.5)
    axes.plot(z, names, "o", color=MODEL, ms=5)
    axes.invert_yaxis()
    reach = max(4.0, *(1.1 * abs(v) for v in z))
    axes.set(xlim=(-reach, reach), title="metric minus floor, in standard errors")


def _panels(drawn: Any, data: Any) -> Figure:
    """Decoded vectors or tables: a scatter of two columns, or a histogram of each."""
    plt = _pyplot()
    columns, beside = _columns(drawn), _columns(data) if data is not None else {}
    names = list(columns)
    numeric = all(c.dtype.kind in "fiu" for c in columns.values())
    if len(names) == 2 and numeric:
        figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
        for source, color, word in ((beside, DATA, "data"), (columns, MODEL, "samples")):
            if source:
                axes.scatter(*source.values(), s=4, color=color, alpha=0.6, label=word)
        axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
        axes.legend(frameon=False)
        return figure
    names = names[:12]  # more panels than a page holds tell less
    across = min(4, len(names))
    down = math.ceil(len(names) / across)
    figure, grid_ = plt.subplots(
        down, across, figsize=(3.2 * across, 2.6 * down), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid_.flat, names, strict=False):
        _marginal(axes, name, columns[name], beside.get(name))
    for axes in list(grid_.flat)[len(names) :]:
        axes.axis("off")
    return figure


def _marginal(axes: Axes, name: str, drawn: np.ndarray, data: np.ndarray | None) -> None:
    parts = [(data, DATA, "data")] if data is not None else []
    parts.append((drawn, MODEL, "samples"))
    if drawn.dtype.kind in "fiu":
        both = np.concatenate([p for p, _, _ in parts])
        bins = np.histogram_bin_edges(both[np.isfinite(both)], 30).tolist()
        for values, color, word in parts:
            axes.hist(values, bins, density=True, color=color, alpha=0.6, label=word)
    else:
        levels = sorted({str(v) for p, _, _ in parts for v in p})
        for k, (values, color, word) in enumerate(parts):
            share = [np.mean(values.astype(str) == level) for level in levels]
            axes.bar(np.arange(len(levels)) + 0.4 * k, share, 0.4, color=color, label=word)
        middle = np.arange(len(levels)) + 0.2 * (len(parts) - 1)
        axes.set_xticks(middle, levels, rotation=30, ha="right")
        axes.set_xlim(middle[0] - 0.8, middle[-1] + 0.8)
    axes.set(title=name, yticks=[])
    if name:
        axes.legend(frameon=False, fontsize=7)


def _columns(decoded: Any) -> dict[str, np.ndarray]:
    if isinstance(decoded, np.ndarray):
        flat = decoded.reshape(len(decoded), -1)
        return {f"x{i + 1}": flat[:, i] for i in range(flat.shape[1])}
    return {name: np.asarray(decoded.column(name).to_pylist()) for name in decoded.column_names}


def _lines(x: Tensor) -> Figure:
    plt = _pyplot()
    flat = x.flatten(2).numpy()
    if flat.shape[2] == 2:
        figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
        axes.plot(flat[..., 0], flat[..., 1], color=DATA, lw=0.6)
        axes.scatter(*flat[0].T, s=8, color=INK, label="noise", zorder=2)
        axes.scatter(*flat[-1].T, s=8, color=MODEL, label="samples", zorder=3)
        axes.set(xlabel="x1", ylabel="x2", title="from noise to data, in model units")
        axes.legend(frameon=False)
        return figure
    shown = min(6, flat.shape[2])
    figure, panels = plt.subplots(
        1, shown, figsize=(3 * shown, 3), layout="constrained", squeeze=False
    )
    for i, axes in enumerate(panels[0]):
        axes.plot(flat[..., i], color=MODEL, lw=0.6, alpha=0.7)
        axes.set(title=f"coordinate {i + 1}", xlabel="step (noise to data)")
    return figure


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 9, "figure.facecolor": PAPER,
    })  # fmt: skip
    return plt


def _save_figure(figure: Figure, path: Path) -> Path:
    with files.whole(path) as draft:
        figure.savefig(draft, format="png", dpi=120)
    _pyplot().close(figure)
    return path


def _save_image(page: np.ndarray, path: Path) -> Path:
    from PIL import Image

    channels = page.shape[2]
    image = Image.fromarray(page[..., 0] if channels == 1 else page, MODES[channels])
    with files.whole(path) as draft:
        image.save(draft, format="png")
    return path


def elbo_terms(found: Bound, path: Path) -> Path:
    """Draws a variational bound: each term over time, and how they add up to the whole."""
    from matplotlib.ticker import LogLocator

    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=(2.4, 1)
    )
    scale = found.dims * math.log(2)
    t, terms, error = _grouped(*(v.numpy() for v in (found.times, found.terms, found.std_error)))
    terms, error = terms / scale, 2 * error / scale
    left.fill_between(t, np.maximum(terms - error, 0), terms + error, color=MODEL, alpha=0.3, lw=0)
    left.plot(t, terms, color=MODEL, lw=1.2)
    top = terms.max()
    # what is below a hundred-thousandth of the largest term adds nothing to the whole
    left.set(xscale="log", yscale="log", ylim=(max(1e-5 * top, 0.5 * terms.min()), 2 * top))
    left.set(xlabel="t: 0 data, end noise", ylabel="bits/dim of each term, +- 2 standard errors")
    for axis in (left.xaxis, left.yaxis):
        # matplotlib writes 3 x 10^-2 at each mark of a short logarithmic axis, one over the other
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    left.set_title(f"{len(found.terms)} terms of the bound, {len(found.prior)} samples")
    parts = {"decoder": -found.decoder, "chain": found.divergence, "prior": found.prior}
    values = [v.mean().item() / scale for v in parts.values()]
    bits = found.bits_per_dim
    names = [*parts, "whole"]
    low = np.cumsum([0.0, *values[:-1]])
    right.bar(names[:-1], values, bottom=low, color=[DATA, MODEL, INK], width=0.7)
    right.bar(names[-1:], [bits.value], yerr=2 * bits.std_error, color=INK, alpha=0.25, width=0.7)
    for i, (value, bottom) in enumerate(zip([*values, bits.value], [*low, 0.0], strict=True)):
        place = (i, max(bottom, bottom + value) + (2 * bits.std_error if i == 3 else 0))
        right.annotate(f"{value:.3f}", place, (0, 3), "data", "offset points", ha="center")
    right.axhline(0, color=INK, lw=0.8)
    right.margins(y=0.12)
    right.set(title="-log2 p, at most", ylabel="bits/dim")
    return _save_figure(figure, path)


def _grouped(t: np.ndarray, *rows: np.ndarray, most: int = 60) -> tuple[np.ndarray, ...]:
    """Means of a long curve and of its errors, over groups of times evenly spread in log t."""
    if len(t) <= most:
        return (t, *rows)
    edges = np.geomspace(t[0], t[-1], most + 1)[1:-1]
    _, group, count = np.unique(np.digitize(t, edges), return_inverse=True, return_counts=True)
    t, value, error = (np.bincount(group, w) / count for w in (t, rows[0], rows[1] ** 2))
    return t, value, np.sqrt(error / count)
