"""What a sampler costs outside the network: microseconds a step, with a free network.

Ours and the peers' samplers run 50 steps on the same state; the network returns its input. CPU
seconds of one thread, interleaved rounds, medians. Peers that are not installed are left out with
a line that says so. The time to import is measured in fresh processes.

    python benchmarks/sampling.py --json sampling.json
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch

import kakusan as kk
from measure import interleave

STEPS = 50
SHAPES = {"64x2": (64, 2), "64x3x32x32": (64, 3, 32, 32)}
LIMITS = {"64x2": 30.0, "64x3x32x32": 100.0}


def ours(shape):
    """Our samplers behind a Denoiser, as `generate` runs them."""
    process = kk.VP()
    model = kk.Denoiser(lambda x, t, label: x, process)
    grid = kk.angle_grid(process, 1.0, 0.0, STEPS, rho=1.5)
    x = torch.randn(shape)

    def run(method, noise=0.0):
        def call():
            with torch.inference_mode():
                sde = kk.reverse(process, model.score, noise)
                kk.solve(sde, x, grid, method, kk.Fresh(0))

        return call

    return {
        "kakusan Ancestral (DDIM)": run(kk.Ancestral()),
        "kakusan Multistep(2)": run(kk.Multistep(2)),
        "kakusan Ancestral, noise 1": run(kk.Ancestral(), 1.0),
        "(normal numbers alone)": lambda: [torch.randn(shape) for _ in range(STEPS)],
    }


def diffusers(shape):
    """DDIM, DPM-Solver++ 2M and DDPM schedulers of diffusers."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    x = torch.randn(shape)

    def run(scheduler):
        def call():
            scheduler.set_timesteps(STEPS)
            y = x
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    y = scheduler.step(y, t, y).prev_sample

        return call

    return {
        "diffusers DDIM": run(DDIMScheduler(clip_sample=False)),
        "diffusers DPM++ 2M": run(DPMSolverMultistepScheduler()),
        "diffusers DDPM": run(DDPMScheduler(clip_sample=False)),
    }


def azula(shape):
    """DDIM of azula with a zero-cost denoiser."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VPSchedule
    from azula.sample import DDIMSampler

    class Free(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = VPSchedule()

        def forward(self, x, t, **_):
            return DiracPosterior(mean=x)

    x = torch.randn(shape)
    sampler = DDIMSampler(Free(), steps=STEPS, silent=True)
    return {"azula DDIM": lambda: sampler(x)}


def imports():
    """CPU seconds that `import kakusan` adds to `import torch`, in fresh processes."""
    code = (
        "import time, torch; a = time.process_time(); import {0}; print(time.process_time() - a)"
    )
    found = {}
    for name in ("kakusan", "azula.sample", "diffusers"):
        runs = [
            subprocess.run(
                [sys.executable, "-c", code.format(name)], capture_output=True, text=True
            )
            for _ in range(5)
        ]
        if all(r.returncode == 0 for r in runs):
            found[name] = statistics.median(float(r.stdout) for r in runs)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {"import_seconds": imports()}
    for name, shape in SHAPES.items():
        candidates = ours(shape)
        for peer in (diffusers, azula):
            try:
                candidates |= peer(shape)
            except ImportError as error:
                print(f"{peer.__name__} is left out: {error}")
        seconds = interleave(candidates, args.rounds)
        micro = {k: statistics.median(v) / STEPS * 1e6 for k, v in seconds.items()}
        record[name] = micro
        print(f"\n{name}: microseconds a step (limit for ours: {LIMITS[name]:.0f})")
        for label, value in micro.items():
            ratio = value / micro["kakusan Multistep(2)"]
            print(f"  {label:28}{value:10.1f}{ratio:10.2f}x")
    print("\nimport, CPU seconds beyond torch")
    for name, value in record["import_seconds"].items():
        print(f"  {name:28}{value:10.3f}")
    if args.json:
        with open(args.json, "w") as handle:
            json.dump(record, handle, indent=2)


if __name__ == "__main__":
    main()
