"""What a log-likelihood costs, beside torchdiffeq: CPU seconds, interleaved, medians.

A network with three hidden layers of 256 units is trained for a moment on a mixture of eight
Gaussians in 64 dimensions under the VP process. Log p of 100 samples, in float32, is found by
kakusan (`log_prob`: Dormand and Prince in the angle, one step size a sample), and by torchdiffeq
(dopri5 in t over state and log p, one step size for all, in the loop that FFJORD and score_sde
write), with the divergence by one random probe, the same for both, or exactly: by
`ExactTrace()`, and by `torch.func.vmap(jacfwd)`.

Both flows start at t = 0.001, where the other must, and mean the same network, so both tend to
the same numbers, which is checked. The truth is the same network in float64 at a tolerance of
1e-9 (1e-7 where the trace is exact). Each side is run at several tolerances, and compared where
its error is that of torchdiffeq at 1e-5: tolerances mean different things, error and time do not.

    pip install --no-deps torchdiffeq==0.2.5
    python benchmarks/likelihood.py --json likelihood.json
"""

import argparse
import copy
import json
import math
import statistics
import sys

import torch

import kakusan as kk
from kakusan.core.noise import Keyed
from kakusan.core.trace import ExactTrace, Hutchinson
from kakusan.inference.likelihood import PROBES, flow_of, log_prob
from kakusan.processes.flow import AngularFlow
from kakusan.solvers.adaptive import DormandPrince
from measure import interleave

D, WIDTH, B, START = 64, 256, 100, 1e-3
OURS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 5e-5, 2e-5, 1e-5)
THEIRS = (1e-3, 1e-4, 1e-5, 1e-6)


class Net(torch.nn.Module):
    """Three hidden layers with the level appended."""

    def __init__(self):
        super().__init__()
        sizes = (D + 1, WIDTH, WIDTH, WIDTH)
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False)
                  for m in (torch.nn.Linear(a, b), torch.nn.SiLU())]  # fmt: skip
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, D))

    def forward(self, x, level, label=None):
        """F of states, levels and labels, which it ignores."""
        return self.layers(torch.cat([x, level.to(x.dtype).expand(len(x)).unsqueeze(1)], 1))


def trained(steps):
    """A denoiser of a mixture of eight Gaussians, and samples of the mixture."""
    g = torch.Generator().manual_seed(0)
    means = 0.65 * torch.randn(8, D, generator=g).double()
    Q = torch.linalg.qr(torch.randn(8, D, D, generator=g).double())[0]
    spread = torch.logspace(-2, math.log10(0.3), D).double()  # variances from 0.01 to 0.3
    covariances = Q * spread @ Q.mT
    process = kk.VP()
    mixture = kk.ExactMixture(process, torch.ones(8), means, covariances)
    torch.manual_seed(0)
    model = kk.Denoiser(Net(), process, predict="v")
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        x0, eps = mixture.sample(256, g).float(), torch.randn(256, D, generator=g)
        t = torch.rand(256, generator=g).double()
        alpha, sigma = (c(t).float().unsqueeze(1) for c in (process.alpha, process.sigma))
        wanted = alpha * eps - sigma * x0
        loss = (model.velocity(alpha * x0 + sigma * eps, t) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"network: {steps} steps, loss {loss.item():.3f}")
    return model.requires_grad_(False), mixture.sample(B, g).float()


class Loop(torch.nn.Module):
    """The loop as FFJORD and score_sde write it: d/dt of the state, and of log p."""

    def __init__(self, model, probe):
        super().__init__()
        self.net, self.probe, self.evaluations = model.net, probe, 0

    def field(self, x, t):
        """The probability flow in t: f - g² score / 2, with -epsilon / sigma for the score."""
        beta = 0.1 + t * (20.0 - 0.1)
        log_alpha = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        v = self.net(x, torch.atan2(sigma, alpha) / (math.pi / 2))
        epsilon = sigma * x + alpha * v
        return -0.5 * beta * (x - epsilon / sigma)

    def forward(self, t, state):
        """Both derivatives at t."""
        x, _ = state
        self.evaluations += 1
        if self.probe is None:
            with torch.no_grad():
                f = self.field(x, t)
                J = torch.func.vmap(torch.func.jacfwd(lambda u: self.field(u.unsqueeze(0), t)[0]))
                return f, J(x).diagonal(dim1=1, dim2=2).sum(1)
        with torch.enable_grad():
            x = x.requires_grad_(True)
            f = self.field(x, t)
            (pulled,) = torch.autograd.grad(f, x, self.probe)
        return f.detach(), (pulled * self.probe).sum(1)


def theirs(model, x, probe, tol):
    """Log p, and how often the field was evaluated."""
    from torchdiffeq import odeint

    loop = Loop(model, probe)
    times = torch.tensor([START, 1.0], dtype=x.dtype)
    with torch.no_grad():
        z, total = odeint(
            loop, (x, x.new_zeros(len(x))), times, rtol=tol, atol=tol, method="dopri5"
        )
    prior = -0.5 * z[-1].square().sum(1) - 0.5 * D * math.log(2 * math.pi)
    return prior + total[-1], loop.evaluations


def ours(model, x, trace, tol):
    """The same by kakusan."""
    flow = flow_of(model)  # from t = 0, where the other cannot start; its time is the angle
    start = model.process.angle(torch.tensor(START).double()).item()
    flow = AngularFlow(flow.process, flow.score, start=start)
    with torch.no_grad():
        found = log_prob(flow, x, trace, DormandPrince(tol, tol))
    return found.value, found.evaluations


def measure(name, candidates, truth, rounds):
    """Errors and medians of CPU seconds, by name and tolerance."""
    calls, errors, counts = {}, {}, {}
    for key, call in candidates.items():
        value, counts[key] = call()
        errors[key] = (value.double() - truth).abs().mean().item()
        calls[key] = call
    seconds = {k: statistics.median(v) for k, v in interleave(calls, rounds, warmup=0).items()}
    print(f"\n{name}: mean error in nats, evaluations, ms, ms an evaluation")
    for who, tol in candidates:
        key = who, tol
        ms = seconds[key] * 1e3
        print(f"  {who:12}{tol:8.0e}{errors[key]:12.1e}{counts[key]:6d}{ms:9.1f}"
              f"{ms / counts[key]:8.2f}", flush=True)  # fmt: skip
    return errors, counts, seconds


def at_equal_error(errors, seconds, goal):
    """Our seconds at their error at 1e-5: the fastest of ours that is at least as exact."""
    limit = errors["torchdiffeq", 1e-5]
    fit = [key for key in errors if key[0] == "kakusan" and errors[key] <= limit]
    best = min(fit, key=lambda key: seconds[key])
    ratio = seconds["torchdiffeq", 1e-5] / seconds[best]
    print(f"  at an error of {limit:.1e} or less: kakusan at {best[1]:.0e} is {ratio:.2f}x as "
          f"fast (at least {goal})")  # fmt: skip
    return ratio


def compare(model, x, exact, rounds, goal):
    """One kind of divergence, side by side."""
    trace = ExactTrace() if exact else Hutchinson(1)
    probe = None if exact else trace.probes(x, Keyed(0, 0, PROBES))[0][0]
    wide = copy.deepcopy(model).double()
    truth, _ = ours(wide, x.double(), trace, 1e-7 if exact else 1e-9)
    if not exact:
        other, _ = theirs(wide, x.double(), probe.double(), 1e-9)
        apart = (truth - other).abs().max().item()
        print(f"\nlog p of {B} samples: {truth.mean():.3f} ± {truth.std():.3f}; at 1e-9 in "
              f"float64 both agree to {apart:.1e} nats")  # fmt: skip
        assert apart < 1e-4, "these are not the same flow"
    # the exact trace takes long, and the tolerances that matter are known by then
    mine, other = (OURS[4:7], (1e-5,)) if exact else (OURS, THEIRS)
    candidates = {("torchdiffeq", tol): lambda tol=tol: theirs(model, x, probe, tol)
                  for tol in other}  # fmt: skip
    candidates |= {("kakusan", tol): lambda tol=tol: ours(model, x, trace, tol) for tol in mine}
    name = "exact trace" if exact else "one probe"
    errors, counts, seconds = measure(name, candidates, truth, rounds)
    ratio = at_equal_error(errors, seconds, goal)
    rows = [
        {"who": k[0], "tol": k[1], "error": errors[k], "evaluations": counts[k], "s": seconds[k]}
        for k in candidates
    ]
    return {"rows": rows, "ratio": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600, help="training steps of the network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe-only", action="store_true", help="leaves out the exact trace")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        import torchdiffeq as _  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}: pip install --no-deps torchdiffeq==0.2.5")
    model, x = trained(args.steps)
    record = {"probe": compare(model, x, False, args.rounds, goal=2)}
    if not args.probe_only:
        record["exact"] = compare(model, x, True, min(args.rounds, 2), goal=5)
    if args.json:
        with open(args.json, "w") as handle:
            json.dump(record, handle, indent=2)


if __name__ == "__main__":
    main()
