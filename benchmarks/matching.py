"""How noisy the losses of score matching are: spread of loss and gradient by noise level.

Data are a mixture of three Gaussians in the plane with standard deviation 0.3 each, noised by
EDM, x = x_0 + sigma eps. The score is a network of 16 hidden units with fixed random parameters,
s = (-y + net(y)) / R with y = x / R and R² = 1 + sigma². All losses have the gradient of the
explicit one in expectation; printed is the standard deviation, for one sample, of the loss and
of its gradient (the root of the trace of the covariance) in the 82 parameters. Each sample has
its own copy of the parameters, so that one backward pass gives all gradients.

    python benchmarks/matching.py --json matching.json --plot matching.png
"""

import argparse
import json

import torch

import kakusan as kk
from kakusan.objectives.score_matching import DenoisingAt, Explicit, Implicit, Sliced

F64 = torch.float64
HIDDEN, CHUNK = 16, 5000
PROCESS = kk.EDM()
LEVELS = torch.logspace(-2, 1, 7, dtype=F64)


def mixture():
    angle = torch.arange(3, dtype=F64) * (2 * torch.pi / 3)
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    covariances = 0.09 * torch.eye(2, dtype=F64).expand(3, 2, 2)
    return kk.ExactMixture(PROCESS, torch.tensor([1.0, 2.0, 3.0]), means, covariances)


def objectives(truth):
    return {
        "ESM": Explicit(PROCESS, truth),
        "ISM": Implicit(PROCESS),
        "SSM, 4 probes": Sliced(PROCESS, probes=4),
        "SSM, 1 probe": Sliced(PROCESS, probes=1),
        "SSM, 1, no control": Sliced(PROCESS, probes=1, control=0.0),
        "DSM": DenoisingAt(PROCESS),
    }


def parameters():
    g = torch.Generator().manual_seed(0)
    shapes = {"W": (HIDDEN, 2), "b": (HIDDEN,), "V": (2, HIDDEN), "c": (2,)}
    fan_in = {"W": 2, "b": 2, "V": HIDDEN, "c": HIDDEN}
    return {
        name: torch.randn(shape, generator=g, dtype=F64) / fan_in[name] ** 0.5
        for name, shape in shapes.items()
    }


def score_of(own):
    """The field whose sample i has parameters own[..][i]; batches may be repeated."""

    def score(x, t):
        many = {k: p.repeat(len(x) // len(p), *(1,) * (p.ndim - 1)) for k, p in own.items()}
        R = (1 + t**2).sqrt()
        y = x / R
        h = torch.tanh((many["W"] @ y[:, :, None]).squeeze(2) + many["b"])
        return (-y + (many["V"] @ h[:, :, None]).squeeze(2) + many["c"]) / R

    return score


def each_gradient(loss, x0, eps, t):
    """Losses (B,) and gradients (B, P) of the samples."""
    theta = parameters()
    own = {k: p.expand(len(x0), *p.shape).clone().requires_grad_() for k, p in theta.items()}
    value = loss(score_of(own), x0, eps, t)
    found = torch.autograd.grad(value.sum(), list(own.values()), materialize_grads=True)
    return value.detach(), torch.cat([g.flatten(1) for g in found], 1)


def at_level(t, n):
    """By objective: spreads of loss and gradient, and how far its mean gradient is from ESM's."""
    truth, rows = mixture(), {}
    x0 = truth.sample(n, torch.Generator().manual_seed(1))
    explicit = None
    for name, loss in objectives(truth).items():
        z = kk.Keyed(2).normal(0, loss.noise_shape(x0), x0)
        chunks = zip(x0.split(CHUNK), z.split(CHUNK), strict=True)
        parts = [each_gradient(loss, *some, t) for some in chunks]
        value, g = (torch.cat(p) for p in zip(*parts, strict=True))
        explicit = g if explicit is None else explicit
        gap = g - explicit
        error = gap.var(0).sum().sqrt() / n**0.5
        rows[name] = {
            "loss": value.std().item(),
            "gradient": g.var(0).sum().sqrt().item(),
            "size": g.mean(0).norm().item(),
            "gap": (gap.mean(0).norm() / error).item() if name != "ESM" else 0.0,
        }
    return rows


def plot(levels, rows, path):
    import matplotlib
    from matplotlib.figure import Figure

    ink, blue, red, grey = "#222222", "#2a6f97", "#d1495b", "#8a97a5"
    looks = {
        "DSM": (red, "-", 2.0), "SSM, 1 probe": (blue, ":", 1.8),
        "SSM, 4 probes": (blue, "--", 1.6), "ISM": (blue, "-", 1.8), "ESM": (ink, "-", 1.6),
    }  # fmt: skip
    style = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": grey, "xtick.color": "#555555", "ytick.color": "#555555",
        "axes.labelcolor": ink,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, key in zip(axes, ("loss", "gradient"), strict=True):
            for name, (color, line, width) in looks.items():
                axis.loglog(levels, [r[name][key] for r in rows], color=color, ls=line, lw=width)
            for name in ("DSM", "ESM", "ISM"):
                label = "ISM, SSM" if name == "ISM" else name  # which lie on one another
                at = (levels[0] / 1.15, rows[0][name][key])
                axis.annotate(label, at, ha="right", va="center", color=looks[name][0])
            below = (levels[0], rows[0]["ISM"][key] / 1.6)
            kinds = "solid ISM\ndashed SSM, 4 probes\ndotted SSM, 1 probe"
            axis.annotate(kinds, below, ha="left", va="top", color=blue)
            axis.set(xlabel="noise level σ", xlim=(levels[0] / 5, levels[-1]))
            axis.spines["bottom"].set_bounds(levels[0], levels[-1])
            axis.minorticks_off()
            axis.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
        axes[0].annotate("1/σ²", (levels[1] * 1.15, 1.3 / levels[1] ** 2), color=red)
        axes[1].annotate("∝ 1/σ", (levels[1] * 1.15, rows[1]["DSM"]["gradient"] * 1.2), color=red)
        axes[0].set_title("standard deviation of the loss", loc="left", fontsize=10)
        axes[1].set_title("standard deviation of its gradient", loc="left", fontsize=10)
        figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=40_000, help="samples a level")
    parser.add_argument("--json", help="where to write the numbers")
    parser.add_argument("--plot", help="where to write the picture")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [at_level(t, asked.n) for t in LEVELS]
    names = list(objectives(mixture()))
    for key in ("loss", "gradient"):
        print(f"\nstandard deviation of the {key}\n")
        print("| sigma | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
        for t, r in zip(LEVELS, rows, strict=True):
            print(f"| {t:.2g} | " + " | ".join(f"{r[name][key]:.3g}" for name in names) + " |")
    print("\nsize of the mean gradient:", " ".join(f"{r['ESM']['size']:.3g}" for r in rows))
    worst = max(r[name]["gap"] for r in rows for name in names)
    print(f"mean gradients differ from ESM's by at most {worst:.2f} standard errors")
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({"sigma": LEVELS.tolist(), "n": asked.n, "rows": rows}, file, indent=1)
    if asked.plot:
        plot(LEVELS.tolist(), rows, asked.plot)


if __name__ == "__main__":
    main()
