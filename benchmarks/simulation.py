"""What simulating an SDE costs, beside torchsde: CPU seconds of one thread, interleaved, medians.

Four processes, 1,000 Euler-Maruyama steps in float32, the last state wanted: geometric Brownian
motion (100,000 paths), a double well (10,000 x 2), constant noise with a full 10 x 10 matrix, and
noise with a full matrix that depends on the state (10,000 x 2). torchsde runs with its default
Brownian motion and with one that is told the step (`dt=`). Then: path-consistent noise against
fresh noise, strong order 3/2 at equal error, and the peak memory of a process of its own.

    pip install --no-deps torchsde==0.2.6 trampoline scipy
    python benchmarks/simulation.py --json simulation.json
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings

import torch

import kakusan as kk
from measure import interleave

STEPS = 1000
H = 1.0 / STEPS
A = 0.1 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))


def _matrix(x):
    a, b = x[:, 0], x[:, 1]
    top = torch.stack([1 + 0.1 * torch.sin(b), 0.3 * a], -1)
    return torch.stack([top, torch.stack([0.2 * b, 1 + 0.1 * torch.cos(a)], -1)], -2)


def _well(x):
    return 20 * x * (1 - x * x)


# name: paths, coordinates, drift, G as kakusan has it, G as torchsde has it, torchsde's noise
# type, the least ratios to torchsde's default and to its dt=
CASES = {
    "geometric Brownian": (100_000, 1, lambda x, t: 0.4 * x,
                           lambda x, t: kk.Diagonal(0.6 * x), lambda x: 0.6 * x, "diagonal",
                           (25, 8)),
    "double well": (10_000, 2, lambda x, t: _well(x), kk.Scale(1.0), torch.ones_like,
                    "diagonal", (13, 4.5)),
    "constant 10 x 10 G": (10_000, 10, lambda x, t: -x, kk.Dense(A),
                           lambda x: A.expand(len(x), 10, 10), "general", (6.5, 3)),
    "dense G(x)": (10_000, 2, lambda x, t: -x, lambda x, t: kk.Dense(_matrix(x)), _matrix,
                   "general", (14, 6)),
}  # fmt: skip


def ours(name):
    """Compiled with hashed noise, and the default: eager with torch's normal numbers."""
    B, d, drift, G, *_ = CASES[name]
    sde, x, grid = kk.SDE.of(drift, G), torch.full((B, d), 0.9), kk.grids.uniform(0, 1, STEPS)

    def run(noise, engine):
        return lambda: kk.solve(sde, x, grid, noise=noise, engine=engine)

    def normals():
        for _ in range(STEPS):
            torch.empty(B, d).normal_()

    return {
        "kakusan, Compiled + Counter": run(kk.Counter(0, cell=H), kk.Compiled()),
        "kakusan, Compiled + Fresh": run(kk.Fresh(0), kk.Compiled()),
        "kakusan, default (Eager + Fresh)": run(kk.Fresh(0), kk.Eager()),
        "(normal numbers alone)": normals,
    }


def torchsde(name, method="euler", steps=STEPS, noise="general"):
    """The same with torchsde: its default noise, and noise that is told the step."""
    import torchsde as peer

    B, d, drift, _, G, kind, _ = CASES[name]

    class Problem(torch.nn.Module):
        noise_type, sde_type = kind, "ito"

        def f(self, t, x):
            return drift(x, t)

        def g(self, t, x):
            return G(x)

    x, problem, times = torch.full((B, d), 0.9), Problem(), torch.tensor([0.0, 1.0])

    def run(told):
        def call():
            bm = peer.BrownianInterval(0.0, 1.0, size=(B, d), dt=1 / steps) if told else None
            with torch.no_grad():
                peer.sdeint(problem, x, times, bm=bm, method=method, dt=1 / steps)

        return call

    return {"torchsde, default": run(False), "torchsde, dt=": run(True)}


def throughput(rounds):
    """Million path-steps a second, and ratios to torchsde."""
    record = {}
    for name, (B, *_, limits) in CASES.items():
        candidates = ours(name) | torchsde(name)
        seconds = {k: statistics.median(v) for k, v in interleave(candidates, rounds).items()}
        record[name] = {k: B * STEPS / v / 1e6 for k, v in seconds.items()}
        slow, told = seconds["torchsde, default"], seconds["torchsde, dt="]
        print(f"\n{name}: M path-steps/s, ratio to torchsde default / dt= (at least {limits})")
        for label, value in seconds.items():
            rate = B * STEPS / value / 1e6
            print(f"  {label:36}{rate:9.1f}{slow / value:9.1f}x{told / value:9.1f}x", flush=True)
    return record


def strong(rounds):
    """Strong order 3/2 on geometric Brownian motion: seconds at torchsde srk's error."""
    # ours takes more steps, so that its error is not above theirs
    name, steps, more = "geometric Brownian", 128, 160
    B, d, drift, G, *_ = CASES[name]
    x = torch.full((B, d), 0.9)

    def error(end, w):
        truth = 0.9 * torch.exp((0.4 - 0.18) + 0.6 * w)
        return (end - truth).square().mean().sqrt().item()

    import torchsde as peer

    class Problem(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"
        f, g = staticmethod(lambda t, x: 0.4 * x), staticmethod(lambda t, x: 0.6 * x)

    def theirs():
        # srk wants the area under the path, which this Brownian motion can give
        bm = peer.BrownianInterval(
            0.0, 1.0, size=(B, d), dt=1 / steps, levy_area_approximation="space-time"
        )
        with torch.no_grad():
            ts = torch.tensor([0.0, 1.0])
            end = peer.sdeint(Problem(), x, ts, bm=bm, method="srk", dt=1 / steps)[-1]
        return end, bm(0.0, 1.0)

    def mine():
        noise = kk.CounterWithArea(0, cell=1 / more)
        sde, grid = kk.SDE.of(drift, G), kk.grids.uniform(0, 1, more)
        end = kk.solve(sde, x, grid, kk.SRK(), noise, engine=kk.Compiled()).end
        return end, noise.increment(0, 0.0, 1.0, (B, d), x)

    errors = {"torchsde srk": error(*theirs()), "kakusan SRK": error(*mine())}
    seconds = interleave({"torchsde srk": theirs, "kakusan SRK": mine}, rounds)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    print(f"\nstrong order 3/2, {B:,} paths x {steps} steps ({more} of ours): error, seconds")
    for label, value in medians.items():
        print(f"  {label:36}{errors[label]:12.2e}{value:9.3f}")
    ratio = medians["kakusan SRK"] / medians["torchsde srk"]
    print(f"  time of kakusan / torchsde: {ratio:.2f} (at most 0.33)")
    return {"errors": errors, "seconds": medians, "ratio": ratio}


MEMORY = """
import torch
torch.set_num_threads(1)
B, N, kind = {B}, {N}, {kind!r}
x = torch.full((B, 1), 0.9)
h = 1 / N
if kind == "loop":
    z = torch.empty_like(x)
    for _ in range(N):
        z.normal_().mul_(0.6 * h**0.5).add_(1 + 0.4 * h)
        x.mul_(z)
else:
    import kakusan as kk
    sde = kk.SDE.of(lambda x, t: 0.4 * x, lambda x, t: kk.Diagonal(0.6 * x))
    sums = []
    engine = kk.Compiled() if kind == "compiled" else kk.Eager()
    noise = kk.Counter(0, cell=h) if kind == "compiled" else kk.Fresh(0)
    kk.solve(sde, x, kk.grids.uniform(0, 1, N), noise=noise, engine=engine,
             every=max(N // 100, 1), on_step=lambda k, t, x: sums.append((x.mean(), x.var())))
    assert len(sums) == 100
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(int(status['VmHWM'].split()[0]) / 1024)
"""


def memory(B, N):
    """Peak MB of a fresh process that streams mean and variance at 100 times."""
    print(f"\npeak memory, {B:,} paths x {N:,} steps, statistics streamed: MB, wall seconds")
    found = {}
    for kind in ("loop", "eager", "compiled"):
        code = MEMORY.format(B=B, N=N, kind=kind)
        begun = time.time()
        # the second run finds compiled code on disk, as any later run of a user does
        for _ in range(2 if kind == "compiled" and N <= 1000 else 1):
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(out.stderr)
        found[kind] = float(out.stdout.split()[-1])
        print(f"  {kind:36}{found[kind]:9.0f}{time.time() - begun:9.1f}", flush=True)
    print(f"  compiled / in-place loop: {found['compiled'] / found['loop']:.2f}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="a million paths x 10,000 steps")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*Should have.*")
    try:
        import torchsde as _  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}: pip install --no-deps torchsde==0.2.6 trampoline scipy")
    record = {"throughput": throughput(args.rounds), "strong": strong(args.rounds)}
    record["memory"] = memory(100_000, 1000)
    if args.large:
        record["large"] = memory(1_000_000, 10_000)
    assert math.isfinite(record["strong"]["ratio"])
    if args.json:
        with open(args.json, "w") as handle:
            json.dump(record, handle, indent=2)


if __name__ == "__main__":
    main()
