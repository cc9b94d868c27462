"""Training throughput of our UNet beside other libraries' networks of about the same size.

One call is a training step: forward, mean squared error against noise, backward and a step of the
fused AdamW. Every network runs in each setting (float32 or bfloat16 autocast, contiguous or
channels last); the settings of all networks are timed in the same interleaved rounds, and each
network is judged by its own best setting. FLOPs are counted by torch for all alike, forward plus
backward: convolutions and matrix products, nothing elementwise.

    python benchmarks/training.py --json training.json

A peer that is not installed is skipped. Install azula and denoising-diffusion-pytorch with
`pip install --no-deps`: both ask for torchvision, which their networks do not use and which does
not import beside a CPU build of torch; an empty stand-in takes its place here. Besides, they need
einops, scipy, pillow, tqdm, ema-pytorch and accelerate; the third peer is diffusers.
"""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from measure import interleave

SETTINGS = {
    f"{name} {layout}": (dtype, memory)
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
    for layout, memory in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    )
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, target) -> ()


def ours(channels: int, size: int) -> tuple[nn.Module, Loss]:
    from kakusan.models.nets.unet import UNet, unet_defaults

    net = UNet(channels, size, **unet_defaults(size))
    return net, lambda x, t, target: F.mse_loss(net(x, t).float(), target)


def azula(channels: int, size: int) -> tuple[nn.Module, Loss]:
    from azula.nn.layers import SineEncoding
    from azula.nn.unet import UNet

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time = nn.Sequential(SineEncoding(64), nn.Linear(64, 64), nn.SiLU())
            self.unet = UNet(channels, channels, 0, (32, 64, 96), (1, 1, 1), mod_features=64)

        def forward(self, x, t):
            return self.unet(x, self.time(t))

    net = Net()
    return net, lambda x, t, target: F.mse_loss(net(x, t).float(), target)


def lucidrains(channels: int, size: int) -> tuple[nn.Module, Loss]:
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    net = Unet(20, channels=channels, dim_mults=(1, 2, 4))
    return net, lambda x, t, target: F.mse_loss(net(x, t * 1000).float(), target)


def lucidrains_diffusion(channels: int, size: int) -> tuple[nn.Module, Loss]:
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion

    net, _ = lucidrains(channels, size)
    diffusion = GaussianDiffusion(net, image_size=size)
    return net, lambda x, t, target: diffusion(x)


def diffusers(channels: int, size: int) -> tuple[nn.Module, Loss]:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
    )
    return net, lambda x, t, target: F.mse_loss(net(x, t * 1000).sample.float(), target)


MODELS = {
    "kakusan": ours,
    "azula": azula,
    "denoising-diffusion-pytorch": lucidrains,
    "denoising-diffusion-pytorch, GaussianDiffusion": lucidrains_diffusion,
    "diffusers": diffusers,
}


@contextlib.contextmanager
def stand_in_torchvision() -> Iterator[None]:
    """Lets a peer's `from torchvision import transforms, utils` pass where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        parts = ("", ".transforms", ".transforms.functional", ".utils", ".models", ".datasets")
        for name in [f"torchvision{part}" for part in parts]:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
            sys.modules[name] = module
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        if getattr(sys.modules[name], "__file__", None) is None:
            del sys.modules[name]


def step_of(net: nn.Module, loss: Loss, setting: str, x: Tensor) -> Callable[[], None]:
    """One training step of a network in a setting."""
    dtype, memory = SETTINGS[setting]
    net.to(memory_format=memory)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x = x.to(memory_format=memory)
    t, target = torch.rand(len(x)), torch.randn_like(x)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(x, t, target)
        value.backward()
        optimiser.step()

    return step


def candidates(names: list[str], settings: list[str], x: Tensor) -> tuple[dict, dict]:
    """The steps to time, by "model | setting", and what is known of each model."""
    steps, facts = {}, {}
    batch, channels, size, _ = x.shape
    for name in names:
        try:
            with stand_in_torchvision():
                build = [MODELS[name](channels, size) for _ in settings]
        except ImportError as error:
            print(f"skipped {name}: {error}")
            continue
        with FlopCounterMode(display=False) as counter:
            step_of(*build[0], "bf16 contiguous", x)()
        facts[name] = {
            "parameters": sum(p.numel() for p in build[0][0].parameters()),
            "flop_per_image": counter.get_total_flops() / batch,
        }
        for (net, loss), setting in zip(build, settings, strict=True):
            steps[f"{name} | {setting}"] = step_of(net, loss, setting, x)
    return steps, facts


def rows_of(seconds: dict[str, list[float]], facts: dict, batch: int) -> list[dict]:
    """One row for each model and setting, with each model's best setting marked."""
    rows = []
    for key, times in seconds.items():
        name, setting = key.split(" | ")
        rate = batch / median(times)
        gflops = rate * facts[name]["flop_per_image"] / 1e9
        rows.append(
            {"model": name, "setting": setting, "images_per_s": rate, "gflop_per_s": gflops}
            | facts[name]
            | {"seconds": times}
        )
    for row in rows:
        rival = max(r["images_per_s"] for r in rows if r["model"] == row["model"])
        row["best"] = row["images_per_s"] == rival
    return rows


def show(rows: list[dict]) -> None:
    """Prints the table; the ratios are ours over theirs, each in its best setting."""
    best = {row["model"]: row for row in rows if row["best"]}
    head = f"{'model':47}{'params':>9}{'MFLOP/img':>11}  {'setting':20}{'img/s':>8}{'GFLOP/s':>9}"
    print(head + "\n" + "-" * len(head))
    for row in rows:
        print(
            f"{row['model']:47}{row['parameters']:9d}{row['flop_per_image'] / 1e6:11.0f}  "
            f"{row['setting']:20}{row['images_per_s']:8.1f}{row['gflop_per_s']:9.1f}"
            + (" *" if row["best"] else "")
        )
    print("* the best setting of its model, used in the ratios")
    for name in [n for n in best if n != "kakusan" and "kakusan" in best]:
        images = best["kakusan"]["images_per_s"] / best[name]["images_per_s"]
        gflops = best["kakusan"]["gflop_per_s"] / best[name]["gflop_per_s"]
        print(f"kakusan / {name}: {images:.2f}x images/s, {gflops:.2f}x GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.rand(args.batch, args.channels, args.size, args.size)
    steps, facts = candidates(args.models, args.settings, x)
    rows = rows_of(interleave(steps, args.rounds), facts, args.batch)
    show(rows)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        record = {"torch": torch.__version__, "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
