"""Paths between a start and what was seen, as a picture.

One row a coordinate: bands between weighted quantiles over time, paths drawn by their weights, and
beside them histograms of three times between. The free paths that came near by themselves stand
in grey beside all of it: where their lines lie on the edges of the bands, both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kakusan import simulation
from kakusan.bridge_luck import NEAR
from kakusan.bridge_request import index
from kakusan.bridging import Bridged
from kakusan.charts import (
    _SPACES,
    _STYLE,
    BAND,
    INK,
    LAW,
    PATH,
    _fan,
    _frame,
    _pairs,
)
from kakusan.processes.observations import Coordinates, Event
from kakusan.simulation import SHOWN, Ensemble
from kakusan.training import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LUCK = "#4d5660"  # the rejection sample
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BUNDLE = 200  # paths that are handed on to be drawn
BETWEEN = 5  # outlines between the first and the last


def draw(found: Bridged, path: Path) -> Path:
    """Draws conditioned paths as a PNG, and returns its path."""
    import matplotlib

    many = ensemble(found)
    with matplotlib.rc_context(_STYLE):
        figure, grid, space, rows = _frame(many, more=0.3)
        for i in range(rows):
            fan = figure.add_subplot(grid[i, 0])
            _fan(fan, many, i, last=i == rows - 1)
            _luck(fan, found, i)
            _marks(fan, found, i)
            _histograms(figure, grid, fan, found, i)
        if space:
            where: Any = grid[:, 4]
            _outlines(figure, where, many) if space == "outline" else _SPACES[space](
                figure, where, many
            )
        _legend(figure, found, many)
        figure.suptitle(_title(found, rows), fontsize=10, x=0.01, ha="left")
        with files.whole(path) as draft:
            figure.savefig(draft, format="png", dpi=130)
    return path


def ensemble(found: Bridged) -> Ensemble:
    """The same as a simulation: bands are weighted, and paths drawn by their weights."""
    x, log_w, r = found.paths.x, found.paths.log_weights, found.request
    q = torch.stack([weighted_quantiles(v.flatten(1), log_w, LEVELS) for v in x])
    w, shape = log_w.softmax(0), x.shape[2:]
    mean = torch.einsum("n,tnd->td", w, x.flatten(2).double())
    std = (w[:, None] * (x.flatten(2) - mean[:, None]).square()).sum(1).sqrt()
    drawn = found.paths.resampled(r.seed).x
    # neighbours have common ancestors where few paths count: take them from all over
    drawn = drawn[:, torch.linspace(0, r.n - 1, min(BUNDLE, r.n)).long()]
    looks = {len(x) - 1: drawn[-1].flatten(1)[:, :SHOWN]}
    request = simulation.Request(n=r.n, steps=len(x) - 1, quantiles=LEVELS, seed=r.seed)
    return Ensemble(
        found.posed.steps.sde, found.title, request, found.paths.t, drawn,
        q.unflatten(2, shape), mean.view(-1, *shape), std.view(-1, *shape), None, None, looks,
        found.seconds,
    )  # fmt: skip


def weighted_quantiles(x: Tensor, log_w: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles of each column of x (n, d) under weights, (Q, d), float64.

    A sample stands in the middle of its weight, and quantiles are linear between samples.

    Example:
        >>> x, log_w = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 0.0, -800.0])
        >>> weighted_quantiles(x, log_w, (0.5,))
        tensor([[0.5000]], dtype=torch.float64)
    """
    w = log_w.double().softmax(0)
    x, order = x.double().sort(0)
    middle = w[order].cumsum(0) - w[order] / 2
    columns = zip(middle.mT.numpy(), x.mT.numpy(), strict=True)
    return torch.from_numpy(np.stack([np.interp(levels, p, v) for p, v in columns], 1))


def _title(found: Bridged, rows: int) -> str:
    free, more = found.free, len(found.names) - rows
    luck = (
        f"{free.near:,} of {free.of:,} free paths came {found.nearness}"
        if free.enough
        else f"of {free.of:,} free paths {free.near or 'none'} came near"
        f"{'' if found.request.event else f' (within {NEAR:g} standard deviations)'}"
    )
    given = f"{found.title}:  {found.request.n:,} paths given {found.posed.words}"
    count = f"  (the first {rows} of {rows + more} coordinates)" if more else ""
    return (
        f"{given}{count}\n{100 * found.share:.0f}% effective;  "
        f"log p = {found.log_density.value:.3f} ± {found.log_density.std_error:.2g};  {luck}"
    )


def _luck(axes: Axes, found: Bridged, i: int) -> None:
    """The rejection sample over time: its median, and where the outer band should end."""
    if not found.free.enough:
        return
    t, x = found.paths.t.numpy(), found.free.x.flatten(2)[:, :, i]
    q = torch.cat([simulation.quantiles(v[:, None], (0.05, 0.5, 0.95)).mT for v in x]).numpy()
    for k, style in enumerate((":", "--", ":")):
        axes.plot(t, q[:, k], color=LUCK, lw=1.1, ls=style, zorder=5)


def _marks(axes: Axes, found: Bridged, i: int) -> None:
    """The start in black, and in red what was seen."""
    posed, std = found.posed, found.request.std
    t, starts = posed.steps.grid, posed.starts[:20].flatten(1)[:, i]
    axes.scatter(t[:1].expand(len(starts)), starts, s=26, color=INK, zorder=7, clip_on=False)
    for s, part, own in posed.observe.parts(t[-1].item()):
        if isinstance(part, Event):
            name, op, number = posed.words.split()
            edge = axes.get_ylim()[int(op[0] == ">")]
            if index(name, posed.starts) == i:
                axes.plot([s, s], [float(number), edge], color=LAW, lw=4, zorder=6, clip_on=False)
            continue
        at = part.at.tolist() if isinstance(part, Coordinates) else range(len(found.names))
        for j, value in zip(at, posed.y[0, own].tolist(), strict=True):
            if j == i:
                axes.errorbar([s], [value], yerr=std or None, fmt="o", ms=5, color=LAW, zorder=7,
                              clip_on=False)  # fmt: skip


def _histograms(figure: Figure, grid: Any, fan: Axes, found: Bridged, i: int) -> None:
    """States at three times between, on the axis of the fan."""
    edges, T = np.linspace(*fan.get_ylim(), 51), len(found.paths.t) - 1
    w = found.paths.log_weights.softmax(0).numpy()
    for k in (1, 2, 3):
        at = round(k * T / 4)
        axes = figure.add_subplot(grid[i, k], sharey=fan)
        values = found.paths.x[at].flatten(1)[:, i].double().numpy()
        density = np.histogram(values, edges, weights=w)[0] / np.diff(edges)
        axes.stairs(density, edges, orientation="horizontal", fill=True, color=BAND, alpha=0.45)
        top = density.max()
        if found.free.enough:
            x = found.free.x[at].flatten(1)[:, i].numpy()
            luck = np.histogram(x, edges)[0] / (len(x) * np.diff(edges))
            axes.stairs(luck, edges, orientation="horizontal", color=LUCK, lw=1.0)
            top = max(top, luck.max())
        axes.set(xlim=(0, 1.08 * top or 1.0), xticks=[])
        axes.tick_params(labelleft=False, length=0)
        axes.spines["bottom"].set_visible(False)
        t = found.paths.t[at].item()
        if i == 0:
            axes.set_title(f"t = {t:.3g}")
        fan.axvline(t, color=BAND, lw=0.6, ls=(0, (2, 3)), zorder=0)


def _outlines(figure: Figure, where: Any, many: Ensemble) -> None:
    """One path of an outline, from the start to the end."""
    import matplotlib

    axes = figure.add_subplot(where)
    x = many.paths[:, 0].double()
    axes.plot(*x.permute(2, 0, 1).numpy(), color=PATH, lw=0.6, zorder=1)
    closed = torch.cat([x, x[:, :1]], 1).numpy()
    for k, at in enumerate(np.linspace(0, len(x) - 1, BETWEEN + 2).round().astype(int)):
        first, last = k == 0, k == BETWEEN + 1
        color = matplotlib.colormaps["viridis"](k / (BETWEEN + 1))
        axes.plot(*closed[at].T, color=INK if first else LAW if last else color, marker="o",
                  lw=1.8 if first or last else 0.9, ms=4 if first or last else 2.5,
                  zorder=3 + first + last)  # fmt: skip
    axes.set(aspect="equal", xlabel="x", ylabel="y")
    axes.set_title("one path; black: start; red: end; colours: times between")


def _legend(figure: Figure, found: Bridged, many: Ensemble) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [
        Patch(color=BAND, alpha=0.25 + 0.2 * k, lw=0,
              label=f"{100 * LEVELS[a]:g} to {100 * LEVELS[b]:g} %")
        for k, (a, b) in enumerate(_pairs(many))
    ]  # fmt: skip
    marks += [
        Line2D([], [], color=BAND, lw=1.8, label="median"),
        Line2D([], [], color=INK, ls="", marker="o", ms=5, label="start"),
        Line2D([], [], color=LAW, ls="", marker="o", ms=5, label="seen"),
    ]
    if found.free.enough:
        marks += [Line2D([], [], color=LUCK, lw=1.1, ls="--", label="free paths: median"),
                  Line2D([], [], color=LUCK, lw=1.1, ls=":", label="5, 95 %")]  # fmt: skip
    figure.legend(handles=marks, loc="outside lower left", ncols=len(marks), frameon=False,
                  fontsize=8)  # fmt: skip
