r"""A neural ODE learns a density by maximum likelihood, and its paths are made straight.

A network v(x, t) moves data x_0 to x_1 along dx/dt = v(x, t), and x_1 is to be standard normal.
That makes a density of the data,

.. math:: \log p(x_0) = \log N(x_1; 0, I) + \int_0^1 \nabla \cdot v(x_t, t) \, dt ,

which is maximised over the weights of v, with no score, no noise and no schedule. Many flows have
the same density. Among them the penalty w ∫ |v|² dt prefers the ones that move data least, whose
paths are straight and of constant speed: for an adaptive solver, the fewest steps.

Data are eight Gaussians on a ring. Their own log-likelihood is known, and what is missing to it is
KL(data ‖ flow): no density can have more, but for chance.

    python examples/neural_ode.py --out neural-ode.png

References:
    FFJORD (Grathwohl et al., 2019), arXiv 1810.01367
    How to train your neural ODE: the world of Jacobian and kinetic regularization
        (Finlay et al., 2020), arXiv 2002.02798
"""

import argparse
import math
import time
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kakusan as kk
from kakusan.inference.likelihood import decode, log_prob
from kakusan.training.data.toys import eight_gaussians

CENTRES = 2 * torch.stack([f(torch.arange(8) * math.pi / 4) for f in (torch.cos, torch.sin)], 1)
STD = 0.2


def ring(n: int, seed: int) -> Tensor:
    """Samples of the eight Gaussians, (n, 2)."""
    return eight_gaussians(n, torch.Generator().manual_seed(seed))


def ring_log_prob(x: Tensor) -> Tensor:
    """Their log density, (B,)."""
    near = -0.5 * torch.cdist(x.double(), CENTRES.double()).square() / STD**2
    return near.logsumexp(1) - math.log(8 * 2 * math.pi * STD**2)


class Velocity(nn.Module):
    """v(x, t): three hidden layers, which see t as one more coordinate.

    Smooth units, since the divergence is differentiated again; and no sines of t, which would
    let v change in a hundredth of the way.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (3, width, width, width)
        pairs = zip(sizes, sizes[1:], strict=False)
        layers = [m for a, b in pairs for m in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocities like x, (B, 2), at one time or at a time each."""
        return self.layers(torch.cat([x, t.to(x).expand(len(x)).unsqueeze(1)], 1))


def flow_of(net: nn.Module) -> kk.SDE:
    """An ODE is an SDE without noise. Its span starts at the data."""
    return kk.SDE.of(net, kk.Zero(), span=(0.0, 1.0))


def train(
    weight: float, steps: int, seed: int = 0, batch: int = 256, rk4_steps: int = 10
) -> tuple[kk.SDE, list[float]]:
    """A flow fitted with this weight of the energy, and log p of each batch on the way."""
    torch.manual_seed(seed)
    net, curve = Velocity(), []
    flow, adjoint = flow_of(net), kk.Adjoint(net)
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    grid, start = kk.grids.uniform(0.0, 1.0, rk4_steps), time.perf_counter()
    for step in range(steps):
        x = ring(batch, seed=1_000_003 * (seed + 1) + step)  # never that of held-out data
        found = log_prob(flow, x, grid=grid, engine=adjoint, energy=True)
        loss = -found.value.mean() + weight * found.energy.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        curve.append(found.value.mean().item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            print(f"  step {step + 1:4}: log p {curve[-1]:7.3f}, energy "
                  f"{found.energy.mean():5.2f}, {seconds:4.0f} s")  # fmt: skip
    return flow, curve


class Judged(NamedTuple):
    """What is measured of a flow on held-out data, (n,) each."""

    log_p: Tensor
    missing: Tensor  # to the log density of the data themselves
    energy: Tensor  # ∫ |v|² dt
    straight: Tensor  # |x_1 - x_0|², the energy of a straight path between the same ends
    steps: Tensor  # that an adaptive solver tried


@torch.no_grad()
def judge(flow: kk.SDE, n: int = 2000, tolerance: float = 1e-5) -> Judged:
    """Held-out likelihood and energy, by steps of an adaptive solver."""
    x = ring(n, seed=0)
    method = kk.DormandPrince(tolerance, tolerance)
    found = log_prob(flow, x, method=method, energy=True)
    z = kk.solve(flow, x, torch.tensor(flow.span), method).end
    straight = (z - x).square().sum(1)
    missing = ring_log_prob(x) - found.value
    steps = (method.tally.accepted + method.tally.rejected).double()
    return Judged(found.value, missing, found.energy, straight, steps)


def told(name: str, found: Judged) -> str:
    """A line of what was measured, with standard errors."""
    both = ((x.mean(), x.std() / len(x) ** 0.5) for x in (found.log_p, found.missing))
    words = ", missing to the true one ".join(f"{m:.3f} +- {e:.3f}" for m, e in both)
    energy, straight, steps = (v.mean() for v in (found.energy, found.straight, found.steps))
    return (f"{name:10} log p {words}\n{'':10} energy {energy:.3f}, straight lines would need "
            f"{straight:.3f}; {steps:.2f} adaptive steps")  # fmt: skip


@torch.no_grad()
def density(flow: kk.SDE, side: int = 120, reach: float = 3.2) -> Tensor:
    """The density on a mesh, (side, side), y before x."""
    line = torch.linspace(-reach, reach, side)
    mesh = torch.cartesian_prod(line, line).flip(1)
    return log_prob(flow, mesh, method=kk.DormandPrince(1e-4, 1e-4)).value.exp().view(side, side)


@torch.no_grad()
def draw(flows: dict[str, kk.SDE], found: dict[str, Judged], curves: dict, path: str) -> None:
    """Paths, density and samples of each flow, and how the likelihood rose."""
    figure = Figure(figsize=(12.4, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1.35))
    for row, (name, flow) in zip(left.subplots(2, 3), flows.items(), strict=True):
        z = torch.randn(1500, 2, generator=torch.Generator().manual_seed(1))
        way = kk.solve(flow, z[:150], torch.linspace(1, 0, 61), kk.RK4(), keep=True).x
        x, box = decode(flow, z), (-3.2, 3.2)
        row[0].plot(*way.permute(2, 0, 1).numpy(), color="#1f6a99", lw=0.5, alpha=0.6)
        row[0].scatter(*way[0].T.numpy(), s=3, color="#9aa5b1", zorder=3)
        row[0].scatter(*way[-1].T.numpy(), s=3, color="#d1495b", zorder=3)
        row[1].imshow(density(flow).numpy(), extent=(*box, *box), origin="lower", cmap="magma")
        row[2].scatter(*x.T.numpy(), s=2, color="#d1495b", lw=0)
        row[0].set_ylabel(name)
        steps, missing = (v.mean() for v in (found[name].steps, found[name].missing))
        row[0].set_title(f"from noise to data: {steps:.1f} adaptive steps", size=10)
        row[1].set_title(f"density: {missing:.3f} nats missing", size=10)
        row[2].set_title("samples", size=10)
        for axes in row:
            axes.set(xlim=box, ylim=box, xticks=[], yticks=[], aspect="equal")
    axes = right.subplots()
    truth = ring_log_prob(ring(100_000, seed=1)).mean().item()
    axes.axhline(truth, color="#222222", lw=1, label="the data's own")
    for (name, curve), color in zip(curves.items(), ("#9aa5b1", "#1f6a99"), strict=True):
        axes.plot(curve, color=color, lw=1, label=name)
    axes.set(xlabel="steps of Adam", ylim=(truth - 1.6, truth + 0.2))
    axes.set_title("log p of a batch, nats", size=10)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main(words: list[str] | None = None) -> dict[str, Judged]:
    """Trains both flows, prints what was measured, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of Adam, for each flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--energy", type=float, default=0.3, help="weight of the energy")
    parser.add_argument("--out", default="neural-ode.png")
    chosen = parser.parse_args(words)
    torch.manual_seed(chosen.seed)
    print(told("untrained", judge(flow_of(Velocity()))))
    flows, curves, found = {}, {}, {}
    for weight in (0.0, chosen.energy):
        name = f"w = {weight:g}"
        print(name)
        flows[name], curves[name] = train(weight, chosen.steps, chosen.seed)
        found[name] = judge(flows[name])
    for name, one in found.items():
        print(told(name, one))
    draw(flows, found, curves, chosen.out)
    return found


if __name__ == "__main__":
    main()
