"""A U-shaped convolutional network for images, (x, t, label) -> like x.

Going down, each level halves the sides of the image; coming up, each level receives what the way
down saw at its size (the skips). A level runs residual blocks

    x + W_2 * silu(W_1 * ((1 + scale) norm(x) + shift)),

with 3x3 convolutions W, whose scale and shift for each channel are linear in the embedded noise
level and label. Small images also pass through self-attention. The last layer is zero at the
start, and so is the output.

Where the time goes decides the form: a convolution runs near the speed of the machine, anything
elementwise at the speed of memory. So there is one normalisation per block and not two, and skips
are added, not concatenated, which also spares the convolutions of twice the channels. Channels
last with bfloat16 autocast is the fastest setting on a CPU.

References:
    U-Net: Convolutional networks for biomedical image segmentation (Ronneberger et al., 2015),
    arXiv:1505.04597
    Denoising diffusion probabilistic models (Ho et al., 2020), arXiv:2006.11239
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kakusan.models.nets.attention import SelfAttention
from kakusan.models.nets.embeddings import Condition


def normalise(x: Tensor, modulation: Tensor) -> Tensor:
    """Normalises each image as a whole, then scales and shifts each of its channels.

    The formula is one, the fastest way to it depends on how the image lies in memory. Channels
    last, it is a layer norm over everything and one multiply-add. Otherwise the batch is folded
    into the channels, so that the scales and shifts of all samples are the affine weights of one
    group norm: one pass over the images instead of three.

    Arguments:
        x: Images, shape (B, C, H, W).
        modulation: What to scale by, less one, and to shift by, shape (B, 2 C).

    Returns:
        Images, shape (B, C, H, W).
    """
    B, C, H, W = x.shape
    scale, shift = modulation.to(x.dtype).chunk(2, dim=1)
    if x.is_contiguous():
        y = x.reshape(1, B * C, H, W)
        return F.group_norm(y, B, 1 + scale.reshape(-1), shift.reshape(-1)).view(B, C, H, W)
    y = F.layer_norm(x.permute(0, 2, 3, 1), (H, W, C))
    y = torch.addcmul(shift[:, None, None], y, 1 + scale[:, None, None])
    return y.permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions behind one modulated normalisation.

    Arguments:
        channels: The number of channels.
        dropout: The share of activations dropped in training.
    """

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Maps x (B, C, H, W) and modulation (B, 2 C) to (B, C, H, W)."""
        h = F.silu(self.first(normalise(x, modulation)))
        return x + self.second(F.dropout(h, self.dropout, self.training))


class Attention(nn.Module):
    """Self-attention among the pixels of an image, behind a modulated normalisation, added to it.

    Arguments:
        channels: The number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = SelfAttention(channels)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Maps x (B, C, H, W) and modulation (B, 2 C) to (B, C, H, W)."""
        tokens = normalise(x, modulation).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """The blocks of one level, one way, each with attention behind it where it is wanted.

    Arguments:
        channels: The number of channels.
        blocks: The number of residual blocks.
        attention: Whether pixels attend to each other here.
        dropout: The share of activations dropped in training.
    """

    def __init__(self, channels: int, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for _ in range(blocks):
            self.parts.append(Block(channels, dropout))
            if attention:
                self.parts.append(Attention(channels))
        self.modulations = [2 * channels] * len(self.parts)

    def forward(self, h: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        """Maps h (B, C, H, W) to itself; each part takes its modulation (B, 2 C)."""
        for part in self.parts:
            h = part(h, next(modulations))
        return h


class UNet(nn.Module):
    """A U-shaped convolutional network.

    Arguments:
        channels: Channels of the image.
        size: Its side, or its height and width; any size works, this one says where attention is.
        width: Channels at full size.
        multipliers: Channels of each level, as multiples of `width`.
        blocks: Residual blocks of each level, each way.
        attention: The largest side at which pixels attend to each other; 0 is no attention.
        classes: The number of labels; 0 is a network without labels.
        dropout: The share of activations dropped in training.
        out_channels: Channels of the output; those of the input by default.
        fourier: Exponents n: the network sees sin and cos of 2^n pi x beside x. Half precision
            rounds x to 8 bits; these keep the bits below, which likelihoods of 8-bit data need
            (7 and 8 there).

    Example:
        >>> UNet(1, 8)(torch.randn(5, 1, 8, 8), torch.rand(5)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 1,
        attention: int = 8,
        classes: int = 0,
        dropout: float = 0.0,
        out_channels: int | None = None,
        fourier: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.fourier = fourier
        side = max(size) if isinstance(size, tuple) else size
        sides = [-(-side // 2**i) for i in range(len(multipliers))]
        widths = [width * m for m in multipliers]
        self.condition = Condition(4 * (width // 2), classes)
        self.stem = nn.Conv2d(channels * (1 + 2 * len(fourier)), width, 3, padding=1)
        down: list[Level] = []
        up: list[Level] = []
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, (w, s) in enumerate(zip(widths, sides, strict=True)):
            if i:
                self.shrink.append(nn.Conv2d(widths[i - 1], w, 3, stride=2, padding=1))
                self.grow.append(nn.Conv2d(w, widths[i - 1], 1, bias=False))
            down.append(Level(w, blocks, s <= attention, dropout))
            up.append(Level(w, blocks, s <= attention, dropout))
        levels = [*down, *reversed(up)]  # in the order they run
        self.parts = [n for level in levels for n in level.modulations] + [2 * width]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.modulation = nn.Linear(self.condition.dim, sum(self.parts))
        self.last = nn.Conv2d(width, out_channels or channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Evaluates the network.

        Arguments:
            x: Images, shape (B, channels, H, W).
            t: Noise levels in [0, 1], shape (B,) or ().
            label: Class indices, shape (B,); -1, and None for all, mean "no label".

        Returns:
            Images like x, with `out_channels` channels.
        """
        condition = self.condition(t, label, len(x))
        modulations = iter(self.modulation(condition).split(self.parts, dim=-1))
        h, skips = self.stem(self._detailed(x)), []
        for i, level in enumerate(self.down):
            h = level(self.shrink[i - 1](h) if i else h, modulations)
            skips.append(h)
        skips.pop()
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h, modulations)
            if i:
                skip = skips.pop()
                h = F.interpolate(self.grow[i - 1](h), size=skip.shape[-2:]) + skip
        return self.last(F.silu(normalise(h, next(modulations)))).to(x.dtype)

    def _detailed(self, x: Tensor) -> Tensor:
        angles = [x * (2.0**n * math.pi) for n in self.fourier]
        return torch.cat([x, *(f(a) for a in angles for f in (torch.sin, torch.cos))], 1)


def unet_defaults(size: int | tuple[int, int]) -> dict[str, Any]:
    """The arguments of a network that suits images of a size and trains on a CPU.

    About 0.3 million parameters for images of 8x8, about 1.1 million for 28x28 and 32x32.

    Example:
        >>> net = UNet(1, 8, **unet_defaults(8))
        >>> round(sum(p.numel() for p in net.parameters()) / 1e6, 1)
        0.3
    """
    side = max(size) if isinstance(size, tuple) else size
    if side <= 12:
        return {"width": 32, "multipliers": (1, 2)}
    return {"width": 32, "multipliers": (1, 2, 4)}
