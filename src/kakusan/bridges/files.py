"""Learned bridges in files: one safetensors file holds all that was learned, and no code.

A file holds the network, the pull that it corrects, the grid and the values that paths came to. It
holds no process and no function: a process is given again when the file is read, and so is an
observation that is a function (`Event`, `Label`, `Measured` by one). Whether the process is the
same is seen by its *marks*: the mean and the noise of three steps from a few states where paths
went. What is read gives the numbers of what was written, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path as File
from typing import Any

import safetensors
import torch
from torch import Tensor

from kakusan.bridges.bridge import Bridge, Report
from kakusan.errors import KakusanError
from kakusan.inference.conditioning.ahead import Linearised
from kakusan.inference.conditioning.learned import BridgeTilt
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.pull import Pull
from kakusan.inference.conditioning.tilts import Tilt, Untilted
from kakusan.models.bridgenet import BridgeNet
from kakusan.processes.observations import Coordinates, Measured, Observation, Series, Terminal
from kakusan.processes.sde import SDE
from kakusan.solvers.gaussian import EulerSteps, GaussianSteps
from kakusan.solvers.rosenbrock import RosenbrockSteps
from kakusan.training import files

HEADER = "kakusan.Bridge"
CHAINS = {kind.__name__: kind for kind in (EulerSteps, RosenbrockSteps)}
PULLS = {kind.__name__: kind for kind in (Pull, Linearised)}
ALIKE = 1e-5  # marks of one process on two machines differ by rounding alone

Tensors = dict[str, Tensor]


def save_bridge(bridge: Bridge, path: str | File, about: dict[str, Any] | None = None) -> None:
    """Writes a learned bridge to one safetensors file, whole or not at all.

    Arguments:
        bridge: What `learn_bridge` returned, with the network that it makes.
        path: The file.
        about: Words of your own about it, as JSON can hold them; `about_bridge` reads them.

    Raises:
        KakusanError: If the network or the base tilt is one that a file cannot build again, or the
            file cannot be written.

    Example:
        >>> import tempfile
        >>> from kakusan.bridges import learn_bridge
        >>> from kakusan.processes.zoo import DoubleWell
        >>> start, sde = torch.ones(1), DoubleWell(v=1.0)
        >>> bridge = learn_bridge(sde, start, iterations=2, steps=20, paths=64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_bridge(bridge, f"{folder}/well.safetensors", {"by": "me"})
        ...     again = load_bridge(f"{folder}/well.safetensors", sde)
        ...     about_bridge(f"{folder}/well.safetensors")
        {'by': 'me'}
        >>> a, b = (one.score(torch.zeros(1, 1), 0.5, -1.0) for one in (bridge, again))
        >>> torch.equal(a, b)
        True
    """
    tilt, net = bridge.tilt, bridge.tilt.net
    if net.own_net:
        raise KakusanError(
            "this bridge has a network of your own, which a file cannot build again: keep "
            "bridge.tilt.net.state_dict() and build the BridgeNet yourself"
        )
    tensors = {f"net.{name}": v for name, v in net.state_dict().items()}
    tensors |= {"grid": bridge.steps.grid, "values": bridge.values, **_marks(bridge.steps, net)}
    header = {
        "shape": net.shape, "noise": net.noise, "told": net.told, "width": net.width,
        "depth": net.depth, "end": tilt.end, "chain": type(bridge.steps).__name__,
        "guided": bridge.guided, "horizons": bridge.horizons,
        "report": None if bridge.report is None else bridge.report._asdict(),
        "base": _base_words(tilt.base, tensors),
        "observe": _observation_words(tilt.observation, tensors, "H"), "about": about or {},
    }  # fmt: skip
    files.write_tensors(File(path), tensors, {HEADER: json.dumps(header)})


def load_bridge(
    path: str | File,
    process: SDE | GaussianSteps,
    observe: Observation | None = None,
    device: torch.device | str = "cpu",
) -> Bridge:
    """Reads what `save_bridge` wrote.

    Arguments:
        path: The file.
        process: The process that was learned, or the chain of its steps.
        observe: What is seen; needed where it is a function, which a file cannot hold.
        device: Where the network is wanted.

    Raises:
        KakusanError: If the file is missing, damaged or no bridge's, or was learned for another
            process or observation.
    """
    header, tensors = _header(File(path)), files.read_tensors(File(path))
    observe = _observation(header["observe"], tensors, "H", observe, path)
    steps = process
    if isinstance(steps, SDE):
        if header["chain"] not in CHAINS:
            raise KakusanError(
                f"{path} was learned on {header['chain']}: give load_bridge these steps, "
                "not an SDE"
            )
        steps = CHAINS[header["chain"]](steps, tensors["grid"])
    with torch.random.fork_rng(devices=[]):  # the first weights of a network are drawn
        net = BridgeNet(
            tuple(header["shape"]), tuple(header["noise"]), (0.0, 1.0),
            torch.zeros(1, *header["shape"]), torch.zeros(1, header["told"]),
            header["width"], header["depth"],
        )  # fmt: skip
    net.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items() if k[:4] == "net."})
    net = net.eval().requires_grad_(False)
    _check(path, steps, tensors)
    base = _base(header["base"], tensors, steps.sde, observe)  # pyright: ignore
    tilt = BridgeTilt(base.along(steps), observe, net.to(device), header["end"], steps)
    return Bridge(
        tilt, steps, tensors["values"], header["guided"], header["horizons"],
        _report(header["report"]),
    )  # fmt: skip


def about_bridge(path: str | File) -> dict[str, Any]:
    """The words that were saved with a bridge."""
    return _header(File(path))["about"]


def _header(path: File) -> dict[str, Any]:
    if not path.is_file():
        raise KakusanError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "pt") as handle:
            words = (handle.metadata() or {}).get(HEADER, "{}")
        header = json.loads(words)
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise KakusanError(f"{path} is damaged or unreadable: {error}") from None
    if "about" not in header:
        raise KakusanError(f"{path} holds no learned bridge")
    return header


def _report(words: dict[str, Any] | None) -> Report | None:
    return Report(**words) if words and set(words) == set(Report._fields) else None


# --- the process, by its marks


def _marks(steps: GaussianSteps, net: BridgeNet) -> Tensors:
    """What a few steps do to a few states where paths went; nothing where they cannot be asked."""
    for dtype in (torch.float64, torch.float32):
        mean, std = net.x_mean.to(dtype), net.x_std.to(dtype)
        x = torch.stack([mean + c * std for c in (0.0, -1.0, -0.5, 0.5, 1.0)])
        inside = steps.inside(x).view(-1, *(1,) * mean.ndim)
        x = torch.where(inside, x, mean)
        try:
            return {"marks.x": x, "marks": _seen(steps, x)}
        except RuntimeError:  # a process may hold numbers of one dtype alone
            continue
    return {}


def _seen(steps: GaussianSteps, x: Tensor) -> Tensor:
    """Mean and noise of the first, a middle and the last step, (3, 2, n, *shape)."""
    one = torch.ones(steps.noise_shape(x)).to(x)
    ks = (0, len(steps) // 2, len(steps) - 1)
    with torch.no_grad():
        rows = [[steps.mean(x, k), steps.operator(x, k).mv(one).reshape(x.shape)] for k in ks]
    return torch.stack([torch.stack(row) for row in rows])


def _check(path: str | File, steps: GaussianSteps, tensors: Tensors) -> None:
    """Refuses a chain that does not do what that of the file did."""
    grid = tensors["grid"]
    if steps.grid.shape != grid.shape or not torch.allclose(steps.grid, grid, 0, 1e-9):
        raise KakusanError(
            f"{path} was learned on {len(grid) - 1} steps from t={grid[0]:g} to t={grid[-1]:g}, "
            f"and these are {len(steps)} from t={steps.grid[0]:g} to t={steps.grid[-1]:g}"
        )
    if "marks" not in tensors:
        return
    x, then = tensors["marks.x"].to(tensors["net.x_mean"].device), tensors["marks"]
    try:
        now = _seen(steps, x).cpu()
    except (RuntimeError, KakusanError):
        now = then[:0]
    size = then.abs().amax() + 1e-12
    same = now.shape == then.shape and torch.allclose(
        now, then, ALIKE, ALIKE * size.item(), equal_nan=True
    )
    if not same:
        kind = type(getattr(steps, "sde", steps)).__name__
        raise KakusanError(
            f"{path} was learned for another process: {kind} moves the states of the file in "
            "another way; give the process and the parameters that it was learned for"
        )


# --- the pull that the network corrects


def _base_words(base: Tilt, tensors: Tensors) -> dict[str, Any]:
    if type(base) is Untilted:
        return {"kind": "Untilted"}
    if type(base) is Pull or type(base) is Linearised:
        return {"kind": type(base).__name__, "end": base.end}
    if type(base) is LinearTilt:
        for name in ("slope", "offset", "sigma"):
            tensors[f"base.{name}"] = torch.as_tensor(getattr(base, name), dtype=torch.float64)
        return {"kind": "LinearTilt", "end": base.end, "own": base.own}
    raise KakusanError(
        f"the base of this bridge is a {type(base).__name__}, which a file cannot build again: "
        f"{', '.join(PULLS)}, LinearTilt and Untilted it can"
    )


def _base(words: dict[str, Any], tensors: Tensors, sde: SDE, observe: Observation) -> Tilt:
    if words["kind"] == "Untilted":
        return Untilted(sde)
    if words["kind"] in PULLS:
        return PULLS[words["kind"]](sde, observe, words["end"])
    parts = (tensors[f"base.{name}"] for name in ("slope", "offset", "sigma"))
    given = (v if v.ndim else v.item() for v in parts)
    linear = LinearTilt(sde, observe, *given, end=words["end"])
    linear.own = words.get("own", False)
    return linear


# --- what is seen


def _observation_words(observe: Observation, tensors: Tensors, name: str) -> dict[str, Any]:
    words: dict[str, Any] = {"kind": type(observe).__name__, "words": repr(observe)}
    if type(observe) is Coordinates:
        words |= {"at": observe.at.tolist(), "std": observe.std}
    elif type(observe) is Measured and isinstance(observe.H, Tensor):
        tensors[name] = observe.H
        words["std"] = observe.std
    elif type(observe) is Series:
        words["seen"] = [
            [t, _observation_words(part, tensors, f"{name}.{i}")]
            for i, (t, part) in enumerate(observe.seen.items())
        ]
    elif type(observe) is not Terminal:
        words["kind"] = "given"
    return words


def _observation(
    words: dict[str, Any], tensors: Tensors, name: str, given: Observation | None,
    path: str | File,
) -> Observation:  # fmt: skip
    """The observation given, if it is that of the file, or else that of the file."""
    if given is not None:
        if repr(given) != words["words"]:
            raise KakusanError(f"{path} was learned for {words['words']}, not for {given}")
        return given
    kind = words["kind"]
    if kind == "Terminal":
        return Terminal()
    if kind == "Coordinates":
        return Coordinates(words["at"], words["std"])
    if kind == "Measured" and name in tensors:
        return Measured(tensors[name], words["std"])
    if kind == "Series":
        seen = enumerate(words["seen"])
        return Series(
            {t: _observation(part, tensors, f"{name}.{i}", None, path) for i, (t, part) in seen}
        )
    raise KakusanError(
        f"{path} was learned for {words['words']}, a function that a file cannot hold: give it as "
        "load_bridge(..., observe=...)"
    )
