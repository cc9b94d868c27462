"""Conditioned processes beside closed forms, exact references and published numbers.

Sections, each a table; `--only` picks some:

    brownian   bridges of Brownian motion, d = 1 and 10: MV and Dist
    wells      a double well of v = 5 from 1 to -1, d = 1 and 10, one path in 5,800: MV and Dist
    scores     the slope of log p(X_1 = -1 | X_s = x) of double wells at five points
    linear     Ornstein-Uhlenbeck and linear-Gaussian bridges: means and variances
    cells      the cell model: normal, rare, several modes
    nerve      FitzHugh-Nagumo seen in its voltage: normal and rare
    shapes     an outline of 50 landmarks that grows from radius 1 to 1.5
    time       seconds to learn the bridge of a double well, and to draw 1,000 of 200 steps
    cost       path weights over the simulation of the paths
    variance   the path weights' variance by kind, at the barrier of a double well of v = 5

MV is the root of the mean over times of |mean - mean'|² + |sd - sd'|², Dist the mean distance of
the end to y, both over 15,000 paths *without* importance weights, as in tables 4 and 7 of
"Conditioning diffusions using Malliavin calculus" (Pidstrigach et al., ICML 2025), whose best rows
stand beside. Our last step is drawn given y, free of noise for a whole state, and the steps before
are narrowed (`ModifiedBridge`), so that Dist is 0; the distance that the tilt alone reaches, with
noise in the last step, is `Dist, free`: no tilt can be below sqrt(2 h / pi), 0.056 a coordinate
for 200 steps. Grids are the published ones, 200 Euler steps; published runs took 20,000 batches of
2,048 paths.

    python benchmarks/bridges.py --seeds 5 --json bridges.json
"""

import argparse
import json
import math
import time

import numpy as np
import torch

import kakusan as kk
from kakusan.bridges import learn_bridge
from kakusan.inference.conditioning.finish import Free
from kakusan.objectives.malliavin import Average, First, Last, Weighted, Window
from kakusan.processes.observations import Coordinates, Measured, Terminal
from kakusan.solvers.gaussian import EulerSteps
from kakusan.solvers.rosenbrock import RosenbrockSteps

F64 = torch.float64
PATHS, GRID = 15_000, kk.grids.uniform(0.0, 1.0, 200)
PUBLISHED = {  # the best row of each column: MV, Dist
    "Brownian, d=1": (0.076, 0.0022), "Brownian, d=10": (0.45, 0.023),
    "double well, d=1": (0.29, 0.084), "double well, d=10": (0.21, 0.30),
}  # fmt: skip
POINTS = [(0.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.8, 0.0), (0.9, -0.5)]


def say(title, rows):
    """Prints dictionaries as a table."""
    print(f"\n{title}")
    keys = list(rows[0])
    cells = [[show(row[k]) for k in keys] for row in rows]
    wide = [max(len(k), *(len(c[i]) for c in cells)) for i, k in enumerate(keys)]
    for line in [keys, *cells]:
        print("  " + "  ".join(v.ljust(w) for v, w in zip(line, wide, strict=True)).rstrip())


def show(v):
    return v if isinstance(v, str) else f"{v:.4g}" if isinstance(v, float) else str(v)


def over(values):
    """Mean and standard error over seeds."""
    v = np.array(values, dtype=float)
    return v.mean().item(), (v.std(ddof=1) / len(v) ** 0.5).item() if len(v) > 1 else math.nan


def both(values):
    mean, error = over(values)
    return f"{mean:.3g} ± {error:.1g}" if math.isfinite(error) else f"{mean:.3g}"


def fidelity(bridge, start, y, mean, sd, seed):
    """MV against means and standard deviations (200, d), and both Dists."""
    x = bridge.sample(start, y, PATHS, seed=seed).x[1:]
    far = (x.mean(1) - mean).square().sum(1) + (x.std(1) - sd).square().sum(1)
    free = bridge.sample(start, y, PATHS, seed=seed, end=Free()).end
    return (far.mean().sqrt().item(), (x[-1] - y).norm(dim=1).mean().item(),
            (free - y).norm(dim=1).mean().item())  # fmt: skip


def brownian(seeds, quick):
    rows = []
    for d in (1, 10):
        y, found = torch.ones(d, dtype=F64), []
        for seed in range(seeds):
            bridge = learn_bridge(kk.Brownian(), torch.zeros(d), iterations=200, seed=seed)
            t = GRID[1:, None]
            sd = (t * (1 - t)).sqrt().expand(-1, d)
            found.append(fidelity(bridge, torch.zeros(d, dtype=F64), y, t * y, sd, seed))
        rows.append(scored(f"Brownian, d={d}", found, bridge.report))
    return rows


def scored(name, found, report):
    mv, dist, free = zip(*found, strict=True)
    published = PUBLISHED[name]
    return {
        "problem": name, "MV": both(mv), "Dist": both(dist), "Dist, free": both(free),
        "published MV": published[0], "published Dist": published[1],
        "paths": report.paths, "seconds": report.seconds,
    }  # fmt: skip


# --- a double well, exactly: a symmetric finite-volume generator and its exponentials


class Well:
    """P(X_t | X_0) of dX = -4 v X (X² - 1) dt + dW on 1,201 cells."""

    def __init__(self, v):
        x = np.linspace(-2.5, 2.5, 1201)
        dx, U = x[1] - x[0], lambda x: v * (x * x - 1) ** 2
        # rates of a reversible chain, exp(-2U) stationary
        up = np.exp(-(U(x[1:]) - U(x[:-1]))) / (2 * dx * dx)
        down = np.exp(U(x[1:]) - U(x[:-1])) / (2 * dx * dx)
        side = np.sqrt(up * down)
        out = np.zeros_like(x)
        out[:-1] += up
        out[1:] += down
        S = np.diag(-out) + np.diag(side, 1) + np.diag(side, -1)
        self.x, self.dx, self.root = x, dx, np.exp(-U(x))
        self.values, self.vectors = np.linalg.eigh(S)

    def at(self, x):
        """The cell of x."""
        return int(np.abs(self.x - x).argmin())

    def density(self, t):
        """p(X_t = x_j | X_0 = x_i)."""
        P = (self.vectors * np.exp(self.values * t)) @ self.vectors.T
        return np.clip(P, 1e-300, None) * self.root[None] / self.root[:, None] / self.dx

    def slope(self, s, x, y):
        """∂_x log p(X_1 = y | X_s = x)."""
        log_p, i = np.log(self.density(1 - s)[:, self.at(y)]), self.at(x)
        return (log_p[i + 1] - log_p[i - 1]) / (2 * self.dx)

    def bridge(self, x0, y, times):
        """Means and standard deviations of the bridge."""
        found = []
        for t in times:
            if t >= 1:
                found.append((y, 0.0))
                continue
            p = self.density(t)[self.at(x0)] * self.density(1 - t)[:, self.at(y)]
            p /= p.sum()
            mean = (p * self.x).sum()
            found.append((mean, ((p * (self.x - mean) ** 2).sum()) ** 0.5))
        return torch.tensor(found, dtype=F64).T


def wells(seeds, quick):
    well, rows = Well(5.0), []
    to, stay = (well.bridge(1.0, y, GRID[1:].tolist()) for y in (-1.0, 1.0))
    for d, iterations in ((1, 3000), (10, 6000)):
        y, found = torch.ones(d, dtype=F64), []
        y[0] = -1
        mean, sd = (torch.stack([to[i], *[stay[i]] * (d - 1)], 1) for i in (0, 1))
        for seed in range(seeds):
            bridge = learn_bridge(
                kk.DoubleWell(v=5.0, dim=d), torch.ones(d), ends=y, seed=seed,
                iterations=300 if quick else iterations,
            )  # fmt: skip
            found.append(fidelity(bridge, torch.ones(d, dtype=F64), y, mean, sd, seed))
            print(f"  d={d} seed {seed}: MV {found[-1][0]:.3f}, {bridge.report}", flush=True)
        rows.append(scored(f"double well, d={d}", found, bridge.report))
    return rows


def scores(seeds, quick):
    """A bridge from each point to -1 over the time that is left, asked for its slope there.

    Of the network, and as measured on paths that it guides, with the standard error of that.
    """
    rows = []
    for v in (0.5, 1.0, 2.0, 5.0):
        well, began = Well(v), time.perf_counter()
        for s, x in POINTS:
            found, exact = [], well.slope(s, x, -1.0)
            sde = kk.DoubleWell(v=v, span=(s, 1.0))
            n = max(20, round((200 if v > 2 else 100) * (1 - s)))
            for seed in range(seeds):
                bridge = learn_bridge(
                    RosenbrockSteps(sde, kk.grids.uniform(s, 1.0, n)), torch.tensor([x]),
                    ends=-1.0, seed=seed, iterations=100 if quick else 1000, paths=4096,
                )  # fmt: skip
                u = bridge.score(torch.tensor([[x]], dtype=F64), s, -1.0).item()
                paths = 4000 if quick else 40_000
                measured = bridge.measured_score(torch.tensor([x]), s, -1.0, paths, seed=seed)
                off = measured.value.item() / exact - 1
                found.append([u / exact - 1, off, measured.std_error.item() / abs(exact)])
            network, measured, error = np.abs(np.array(found)).mean(0)
            rows.append({
                "v": v, "s": s, "x": x, "exact": exact, "network off by": f"{network:.1%}",
                "measured off by": f"{measured:.1%}", "its standard error": f"{error:.1%}",
            })  # fmt: skip
            print("  ", *rows[-1].values(), flush=True)
        print(f"  v={v}: {time.perf_counter() - began:.0f} s", flush=True)
    return rows


def linear(seeds, quick):
    """Marginals of learned and closed-form bridges against the law of the process."""
    rows = []
    ou = kk.OrnsteinUhlenbeck(rate=2.0, sigma=0.8, mean=0.3)
    x0, t = torch.tensor([1.0], dtype=F64), GRID[1:-1]
    E, q = (-2 * t).exp(), 0.16 * (1 - (-4 * t).exp())
    E1, q1, left = math.exp(-2.0), 0.16 * (1 - math.exp(-4.0)), 0.16 * (1 - (-4 * (1 - t)).exp())
    gain = (-2 * (1 - t)).exp() * q / q1
    mean = 0.3 + E * 0.7 + gain * (0.9 - 0.3 - E1 * 0.7)
    laws = {"Ornstein-Uhlenbeck, X_1 = 0.9": (ou, Terminal(), x0, 0.9, mean, q * left / q1)}
    A = torch.tensor([[1.0, 0.5], [-0.8, 1.5]], dtype=F64)
    turn = kk.OrnsteinUhlenbeck(rate=A, sigma=[0.6, 0.9])
    H, z0 = torch.tensor([[1.0, 1.0]], dtype=F64), torch.tensor([1.0, -0.5], dtype=F64)
    m, C = [], []
    for s in t:
        a, b = turn.moments(z0[None], s), turn.moments(z0[None], 1.0)
        F = H @ torch.linalg.matrix_exp(-A * (1 - s))
        K = a.covariance[0] @ F.mT / (H @ b.covariance[0] @ H.mT + 0.04)
        m.append(a.mean[0] + (K * (0.4 - H @ b.mean[0])).flatten())
        C.append((a.covariance[0] - K @ F @ a.covariance[0]).diagonal())
    laws["a plane, x1 + x2 seen with noise"] = (
        turn, Measured(H, std=0.2), z0, 0.4, torch.stack(m), torch.stack(C)
    )  # fmt: skip
    for name, (sde, observe, start, y, mean, var) in laws.items():
        for how in ("learned", "closed form"):
            errors = []
            for seed in range(seeds):
                base = None if how == "closed form" else kk.Pull(sde, observe)
                bridge = learn_bridge(
                    sde, start, observe, base=base, iterations=200 if quick else 2000, seed=seed
                )
                x = bridge.sample(start, y, 160_000, seed=seed).x[1:-1]
                mean_, var_ = mean.reshape(len(t), -1), var.reshape(len(t), -1)
                errors.append([
                    ((x.mean(1) - mean_).abs() / var_.max().sqrt()).max().item(),
                    ((x.var(1) - var_).abs() / var_.max()).max().item(),
                ])  # fmt: skip
            far = np.array(errors).mean(0)
            rows.append({"bridge": name, "tilt": how, "mean off by (sd)": f"{far[0]:.2%}",
                         "variance off by": f"{far[1]:.2%}"})  # fmt: skip
    return rows


def tried(name, sde, start, observe, y, seeds, iterations, guided=True, **options):
    """Learns a bridge and tells what it is worth."""
    sizes, missed, logs, ends = [], [], [], torch.as_tensor(y, dtype=F64)
    for seed in range(seeds):
        bridge = learn_bridge(
            sde, start, observe, ends if guided else None, iterations=iterations, seed=seed,
            **options,
        )  # fmt: skip
        found = bridge.sample(start, ends, 2000, seed=seed)
        sizes.append(100 * found.ess / 2000)
        missed.append(found.missed.max().item())
        logs.append(found.log_density.value)
    free = kk.solve(sde, start.expand(20_000, *start.shape), bridge.steps.grid, noise=kk.Fresh(0))
    away = (observe.forward(free.end) - ends.reshape(1, -1)).norm(dim=1)
    print(f"  {name}: {bridge.report}", flush=True)
    return {
        "problem": name, "effective %": both(sizes), "end missed by": f"{max(missed):.1e}",
        "log p(y)": both(logs), "free paths within 0.1": f"{(away < 0.1).double().mean():.2%}",
        "seconds": bridge.report.seconds,
    }  # fmt: skip


def cells(seeds, quick):
    its, rows = 200 if quick else 3000, []
    start = torch.tensor([0.1, -0.1], dtype=F64)
    for name, y in (("normal", [2.0, -0.1]), ("rare", [1.0, -0.1])):
        rows.append(tried(f"cell model, {name}", kk.CellModel(), start, Terminal(), y, seeds, its))
    both_on = torch.tensor([-1.0, -1.0], dtype=F64)
    rows.append(tried("cell model, several modes", kk.CellModel(span=(0.0, 5.0)), both_on,
                      Terminal(), [-1.0, -1.0], seeds, its))  # fmt: skip
    return rows


def nerve(seeds, quick):
    its, rows, sde = 100 if quick else 1500, [], kk.FitzHughNagumo()
    for name, y in (("normal", -1.0), ("rare", 1.1)):
        rows.append(tried(f"FitzHugh-Nagumo, {name}", sde, sde.start, Coordinates([0]), y, seeds,
                          its, paths=512, times=32))  # fmt: skip
    return rows


def shapes(seeds, quick):
    """Published for 50: 0.085 mean distance of a landmark to its place (average of path weights).

    Beside the distance that the tilt alone reaches stands that of the last step's noise.
    """
    rows, grid = [], kk.grids.uniform(0.0, 1.0, 100)
    few, many = kk.Landmarks(points=8), kk.Landmarks(points=50, alpha=2.0, kappa=0.1)
    problems = [("8, reach 0.5", few, 1), ("8, reach 0.5", few, 1500), ("50, reach 0.1", many, 1)]
    for name, sde, iterations in problems:
        start, found = sde.start[None], []
        end = 1.5 * start
        K = sde.diffusion(end, torch.tensor(1.0)).K
        noise = (math.pi / 2 * 0.01) ** 0.5 * K.norm(dim=-1).mean().item()
        for seed in range(seeds):
            bridge = learn_bridge(
                sde, start, ends=end.flatten(1), grid=grid, seed=seed, paths=256, times=50,
                batch=512, iterations=min(iterations, 100) if quick else iterations,
            )  # fmt: skip
            free = bridge.sample(start[0], end.flatten(1), 512, end=Free(), seed=seed).end
            pinned = bridge.sample(start[0], end.flatten(1), 512, seed=seed)
            found.append([
                (free - end).norm(dim=-1).mean().item(),
                (pinned.end - end).norm(dim=-1).mean().item(),
                pinned.ess / 512,
            ])  # fmt: skip
        free, met, ess = zip(*found, strict=True)
        rows.append({"landmarks": name, "tilt": "learned" if iterations > 1 else "pull alone",
                     "Dist": both(met), "Dist, free": both(free), "noise": noise,
                     "effective": f"{np.mean(ess):.1%}", "paths": bridge.report.paths,
                     "seconds": bridge.report.seconds})  # fmt: skip
    return rows


def times(seeds, quick):
    began = time.perf_counter()
    bridge = learn_bridge(kk.DoubleWell(v=1.0), torch.ones(1), iterations=300 if quick else 4000)
    learned = time.perf_counter() - began
    began = time.perf_counter()
    found = bridge.sample(torch.ones(1), -1.0, 1000)
    return [{"learn (s)": learned, "draw 1,000 of 200 steps (s)": time.perf_counter() - began,
             "effective %": found.ess / 10}]  # fmt: skip


def cost(seeds, quick):
    rows, n = [], 10_000 if quick else 100_000
    for d in (1, 10):
        sde = kk.DoubleWell(v=5.0, dim=d)
        steps, x = EulerSteps(sde, GRID), torch.ones(n // d, d)
        path = kk.solve(sde, x, GRID, noise=kk.Fresh(0), keep=True)
        spent = {"simulation": [], "weights": []}
        for _ in range(5):  # interleaved
            began = time.perf_counter()
            kk.solve(sde, x, GRID, noise=kk.Fresh(0))
            spent["simulation"].append(time.perf_counter() - began)
            began = time.perf_counter()
            Window(0.05)(steps, path)
            spent["weights"].append(time.perf_counter() - began)
        a, b = (float(np.median(spent[k])) for k in ("simulation", "weights"))
        rows.append(
            {"d": d, "paths": n // d, "simulation (s)": a, "weights (s)": b, "ratio": b / a}
        )
    return rows


def variance(seeds, quick):
    """E Var(S | X_s, X_T): the spread of S around its mean in bins of X_T, T - s = 0.5."""
    sde, n, rows = kk.DoubleWell(v=5.0), 20_000 if quick else 200_000, []
    grid = kk.grids.uniform(0.0, 0.5, 100)
    golden = (5**0.5 - 1) / 2
    kinds = {
        "first": First(), "window 0.02": Window(0.02), "window 0.05": Window(0.05),
        "window 0.1": Window(0.1), "average": Average(), "last": Last(),
        "published optimum": Weighted(lambda t, end: (1 - t / end + 1e-9) ** golden),
    }  # fmt: skip
    steps = EulerSteps(sde, grid)
    for x in (0.5, 0.2, 0.0):
        path = kk.solve(sde, torch.full((n, 1), x, dtype=F64), grid, noise=kk.Fresh(1), keep=True)
        bins = path.end[:, 0].argsort().reshape(-1, 500)
        row = {"x": x}
        for name, kind in kinds.items():
            S = kind(steps, path, [0])[0, :, 0]
            row[name] = S[bins].var(1).mean().item()
        rows.append(row)
    return rows


SECTIONS = {
    "brownian": brownian, "wells": wells, "scores": scores, "linear": linear, "cells": cells,
    "nerve": nerve, "shapes": shapes, "time": times, "cost": cost, "variance": variance,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of the training, to try")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="where to write the numbers")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = {}
    for name in asked.only:
        began = time.perf_counter()
        found[name] = SECTIONS[name](asked.seeds, asked.quick)
        say(f"{name} ({time.perf_counter() - began:.0f} s)", found[name])
        if asked.json:
            with open(asked.json, "w") as file:
                json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
