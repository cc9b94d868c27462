"""Simulated paths as a picture: what they do over time, and where they are.

One row a coordinate: bands between quantiles, a few paths, the mean and the standard deviation in
closed form where they are known, and beside them, on the same axis, histograms at three times.
Where the stationary density is known, it lies over the last. States in two or three dimensions are
also shown in their own space, and points of an outline in the plane.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kakusan.errors import KakusanError
from kakusan.simulation import SHOWN, Ensemble, counted
from kakusan.training import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BAND, PATH, LAW = "#222222", "#2a6f97", "#8a97a5", "#d1495b"
_PATHS = 20
_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
    "figure.facecolor": "#ffffff", "axes.edgecolor": "#8a97a5", "xtick.color": "#555555",
    "ytick.color": "#555555", "axes.labelcolor": INK,
}  # fmt: skip


def draw(found: Ensemble, path: Path) -> Path:
    """Draws a simulation as a PNG, and returns its path."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, grid, space, rows = _frame(found)
        laws = _stationary(found)
        for i in range(rows):
            fan = figure.add_subplot(grid[i, 0])
            _fan(fan, found, i, last=i == rows - 1)
            _histograms(figure, grid, fan, found, i, laws.get(i))
        if space:
            where: Any = grid[:, 4]
            _SPACES[space](figure, where, found)
        _legend(figure, found, laws)
        more = len(found.names) - rows
        r = found.request
        figure.suptitle(
            f"{found.title}:  {counted(r)}"
            + (f"  (the first {rows} of {rows + more} coordinates)" if more else ""),
            fontsize=10, x=0.01, ha="left",
        )  # fmt: skip
        with files.whole(path) as draft:
            figure.savefig(draft, format="png", dpi=130)
    return path


def _frame(found: Ensemble, more: float = 0.0) -> tuple[Figure, Any, str, int]:
    """A figure, `more` inches higher; its cells; where states are shown as they lie; its rows."""
    from matplotlib.figure import Figure

    space = _space(found)
    rows = min(SHOWN if space != "outline" else 4, len(found.names))
    height = max(1.9 * rows + 0.6, 4.4 if space else 3.6) + more
    wide = min(max(0.8 * height, 4.0), 7.5) if space else 0.0
    figure = Figure(figsize=(10 + wide, height), layout="constrained")
    ratios = [5.4, 1, 1, 1, *([wide / 1.2] if space else [])]
    return figure, figure.add_gridspec(rows, len(ratios), width_ratios=ratios), space, rows


def _space(found: Ensemble) -> str:
    """How states can be shown where they are: nothing, plane, room or outline."""
    shape = found.shape
    if len(shape) == 2 and shape[1] == 2 and shape[0] > 1:
        return "outline"
    return "plane" if shape == (2,) else "room" if shape == (3,) else ""


# --- over time


def _fan(axes: Axes, found: Ensemble, i: int, last: bool) -> None:
    """Bands of one coordinate over time."""
    t = found.times.numpy()
    q = found.quantiles.flatten(2)[:, :, i].numpy()
    lines = found.paths[:, :_PATHS].flatten(2)[:, :, i].numpy()
    axes.plot(t, lines, color=PATH, lw=0.5, alpha=0.55, zorder=1)
    for k, (a, b) in enumerate(_pairs(found)):
        axes.fill_between(t, q[:, a], q[:, b], color=BAND, alpha=0.17 + 0.13 * k, lw=0, zorder=2)
    if 0.5 in (levels := found.request.quantiles):
        axes.plot(t, q[:, levels.index(0.5)], color=BAND, lw=1.8, zorder=4)
    if found.exact_mean is not None and found.exact_std is not None:
        mean = found.exact_mean.flatten(1)[:, i].numpy()
        sd = found.exact_std.flatten(1)[:, i].numpy()
        axes.plot(t, mean, color=INK, lw=1.1, ls="--", zorder=5)
        for edge in (mean - sd, mean + sd):
            axes.plot(t, edge, color=INK, lw=0.8, ls=":", zorder=5)
    low, high = _range(q, lines)
    axes.set(xlim=(t[0], t[-1]), ylim=(low, high), ylabel=_label(found, i))
    if last:
        axes.set_xlabel("t")
    else:
        axes.tick_params(labelbottom=False)


def _pairs(found: Ensemble) -> list[tuple[int, int]]:
    """Quantiles that belong together, the outer first: (0.05, 0.95), (0.25, 0.75)."""
    levels = found.request.quantiles
    return [(k, len(levels) - 1 - k) for k in range(len(levels) // 2)]


def _range(q: np.ndarray, lines: np.ndarray) -> tuple[float, float]:
    """What to show: the bands, and of the paths what is not far away."""
    low, high = q.min(), q.max()
    reach = 1.5 * (high - low) or abs(low) * 0.1 or 1.0
    if lines.size:
        low, high = (
            min(low, max(lines.min(), low - reach)),
            max(high, min(lines.max(), high + reach)),
        )
    room = 0.06 * (high - low) or 0.5 * reach
    return float(low - room), float(high + room)


def _label(found: Ensemble, i: int) -> str:
    if _space(found) == "outline":
        return f"point {i // 2 + 1}, {'xy'[i % 2]}"
    return "x" if len(found.names) == 1 else f"x{i + 1}"


def _histograms(
    figure: Figure, grid: Any, fan: Axes, found: Ensemble, i: int, law: Any
) -> None:  # fmt: skip
    """Three histograms on the axis of the fan, and the stationary density over the last."""
    low, high = fan.get_ylim()
    edges = np.linspace(low, high, 61)
    looks = sorted(found.looks.items())[-3:]
    for k, (at, states) in enumerate(looks):
        axes = figure.add_subplot(grid[i, 1 + k], sharey=fan)
        values = states[:, i].double().numpy()
        density = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
        axes.stairs(density, edges, orientation="horizontal", fill=True, color=BAND, alpha=0.45)
        top = density.max()
        if law is not None and k == len(looks) - 1:
            axes.plot(law[1], law[0], color=LAW, lw=1.3)
            inside = (law[0] >= low) & (law[0] <= high)
            top = max(top, min(law[1][inside].max(initial=0.0), 2 * top))
        t = found.times[at].item()
        axes.set(xlim=(0, 1.08 * top or 1.0), xticks=[])
        axes.tick_params(labelleft=False, length=0)
        axes.spines["bottom"].set_visible(False)
        if i == 0:
            axes.set_title(f"t = {t:.3g}")
        fan.axvline(t, color=BAND, lw=0.6, ls=(0, (2, 3)), zorder=0)


def _legend(figure: Figure, found: Ensemble, laws: dict[int, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    levels = found.request.quantiles
    marks: list[Any] = [
        Patch(color=BAND, alpha=0.25 + 0.2 * k, lw=0,
              label=f"{100 * levels[a]:g} to {100 * levels[b]:g} %")
        for k, (a, b) in enumerate(_pairs(found))
    ]  # fmt: skip
    if 0.5 in levels:
        marks.append(Line2D([], [], color=BAND, lw=1.8, label="median"))
    if found.exact_mean is not None:
        marks += [Line2D([], [], color=INK, lw=1.1, ls="--", label="mean in closed form"),
                  Line2D([], [], color=INK, lw=0.8, ls=":", label="± sd")]  # fmt: skip
    if laws:
        marks.append(Line2D([], [], color=LAW, lw=1.3, label="stationary density"))
    figure.legend(handles=marks, loc="outside lower left", ncols=len(marks), frameon=False,
                  fontsize=8)  # fmt: skip


# --- the stationary density


def _stationary(found: Ensemble) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Values and stationary density of each coordinate, for processes of one or two.

    `log_stationary` need not be normalised: it is summed over a range far beyond the paths.
    """
    law = getattr(found.sde, "log_stationary", None)
    if law is None or len(found.shape) != 1 or found.shape[0] > 2:
        return {}
    d = found.shape[0]
    points = 20_001 if d == 1 else 601
    reach = 8 if d == 1 else 3
    values = []
    last = found.looks[max(found.looks)].double()
    for i in range(d):
        q = found.quantiles[..., i]
        low, high = min(q.min(), last[:, i].min()), max(q.max(), last[:, i].max())
        middle, half = (low + high).item() / 2, reach * (high - low).item() / 2 or 1.0
        values.append(torch.linspace(middle - half, middle + half, points, dtype=torch.float64))
    p = _density(law, values)
    if p is None:
        return {}
    out = {}
    for i, y in enumerate(values):
        marginal = p if d == 1 else p.sum(1 - i) * (values[1 - i][1] - values[1 - i][0])
        out[i] = (y.numpy(), marginal.numpy())
    return out


def _density(law: Any, values: list[Tensor]) -> Tensor | None:
    """The density on a grid, normalised; None where it does not fade out in it."""
    x = torch.cartesian_prod(*values).reshape(-1, len(values))
    try:
        with torch.no_grad():
            log_p = law(x).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    except KakusanError:
        return None  # no stationary law for these parameters
    p = (log_p - log_p[log_p.isfinite()].max()).exp() if log_p.isfinite().any() else log_p
    p = torch.where(p.isfinite(), p, 0.0).reshape([len(v) for v in values])
    cell = float(np.prod([(v[1] - v[0]).item() for v in values]))
    edges = [p.select(i, j) for i in range(p.ndim) for j in (0, -1)]
    if not p.sum() > 0 or max(e.max() for e in edges) > 1e-3 * p.max():
        return None
    return p / (p.sum() * cell)


# --- in space


def _plane(figure: Figure, where: Any, found: Ensemble) -> None:
    """Two coordinates against each other: the drift, a few paths, the states at the end."""
    axes = figure.add_subplot(where)
    end = found.looks[max(found.looks)].double().numpy()[:3000]
    lines = found.paths[:, :6].double().numpy()
    around = np.concatenate([lines.reshape(-1, 2), np.quantile(end, (0.002, 0.998), axis=0)])
    room = 0.08 * np.ptp(around, axis=0) + 1e-9
    low, high = around.min(0) - room, around.max(0) + room
    _arrows(axes, found, low, high)
    axes.plot(lines[..., 0], lines[..., 1], color=BAND, lw=0.7, alpha=0.6, zorder=2)
    many = len(end) > 200
    axes.scatter(
        *end.T, s=4 if many else 16, color=LAW, alpha=0.3 if many else 0.8, lw=0, zorder=3
    )
    first = found.paths[0, :_PATHS].double().numpy()
    axes.scatter(*first.T, s=24, color=INK, zorder=4)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="x1", ylabel="x2")
    if 0.4 < (high[0] - low[0]) / (high[1] - low[1]) < 2.5:
        axes.set_aspect("equal", adjustable="box")
    axes.set_title("black: start; red: end; blue: a few paths; grey: the drift")


def _arrows(axes: Axes, found: Ensemble, low: Any, high: Any) -> None:
    """Streamlines of the drift at the end."""
    u, v = (torch.linspace(low[i], high[i], 30, dtype=torch.float64) for i in range(2))
    x = torch.cartesian_prod(u, v).to(found.paths.dtype)
    with torch.no_grad():
        f = found.sde.drift(x, found.times[-1]).double().reshape(30, 30, 2)
    if f.isfinite().all() and f.abs().max() > 0:
        f = f.transpose(0, 1).numpy()
        axes.streamplot(u.numpy(), v.numpy(), f[..., 0], f[..., 1], color="#c9d1d9",
                        linewidth=0.6, arrowsize=0.7, density=1.1, zorder=0)  # fmt: skip


def _room(figure: Figure, where: Any, found: Ensemble) -> None:
    """Paths in three dimensions."""
    axes: Any = figure.add_subplot(where, projection="3d")
    lines = found.paths[:, :_PATHS].double().numpy()
    for k in range(lines.shape[1]):
        axes.plot(*lines[:, k].T, color=BAND, lw=0.6, alpha=0.5)
    end = found.looks[max(found.looks)].double().numpy()[:1500]
    axes.scatter(*end.T, s=3, color=LAW, alpha=0.4, lw=0)
    if lines.size:
        axes.scatter(*lines[0, :1].T, s=22, color=INK)
    axes.set(
        xlabel="x1", ylabel="x2", zlabel="x3", title="black: start; red: end; blue: a few paths"
    )
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_visible(False)
        axis._axinfo["grid"].update(color="#dfe4e8", linewidth=0.5)


def _outline(figure: Figure, where: Any, found: Ensemble) -> None:
    """Points in the plane as closed outlines: where they start, and some paths' ends."""
    axes = figure.add_subplot(where)
    paths = found.paths[:, :8].double()
    closed = torch.cat([paths, paths[:, :, :1]], 2).numpy()
    colors = _colors(closed.shape[1])
    for k in range(closed.shape[1]):
        if k == 0:
            axes.plot(*paths[:, 0].permute(2, 0, 1).numpy(), color=PATH, lw=0.5, zorder=1)
        axes.plot(*closed[-1, k].T, color=colors[k], lw=1.3 if k == 0 else 0.9,
                  alpha=1 if k == 0 else 0.6, marker="o", ms=3, zorder=3 - (k > 0))  # fmt: skip
    if closed.size:
        axes.plot(*closed[0, 0].T, color=INK, lw=1.6, marker="o", ms=4, zorder=4)
    axes.set(aspect="equal", xlabel="x", ylabel="y")
    axes.set_title("black: start; colours: the end of a few paths; grey: the way of the red one")


def _colors(n: int) -> list[Any]:
    import matplotlib

    return [LAW, *(matplotlib.colormaps["viridis"](0.1 + 0.8 * k / max(1, n)) for k in range(n))]


_SPACES = {"plane": _plane, "room": _room, "outline": _outline}
