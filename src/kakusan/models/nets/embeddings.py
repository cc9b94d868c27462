r"""What a network is told beside the state: the noise level and the label.

A noise level t in [0, 1] enters as sines and cosines,

.. math:: [\cos(\omega_k t), \sin(\omega_k t)]_{k < n}, \qquad
    \omega_k = \omega_0 (\omega_1 / \omega_0)^{k/(n-1)},

with frequencies from a quarter turn over the whole range to about a turn in a hundredth of it, so
that a linear layer behind can tell apart levels that are close together and still vary slowly.
The arguments reach several hundred: in half precision they would be off by a whole radian, so
they are computed in the precision of t, at least float32, and only the sines are rounded.

A label is a row of a table. The table has one row more than there are classes: the row for "no
label", which classifier-free guidance needs.

References:
    Attention is all you need (Vaswani et al., 2017), arXiv:1706.03762
    Classifier-free diffusion guidance (Ho and Salimans, 2022), arXiv:2207.12598
"""

import math

import torch
from torch import Tensor, nn


def sinusoids(
    t: Tensor, dim: int, lowest: float = math.pi / 2, highest: float = 200 * math.pi
) -> Tensor:
    """Writes each noise level as cosines and sines of `dim / 2` frequencies.

    Arguments:
        t: Noise levels in [0, 1], shape (B,), of any float dtype.
        dim: The number of features, even and at least 4.
        lowest: The smallest angular frequency.
        highest: The largest.

    Returns:
        The features, shape (B, dim), in the dtype of t but at least float32.

    Example:
        >>> sinusoids(torch.tensor([0.0, 1.0]), 4).shape
        torch.Size([2, 4])
    """
    if t.dtype in (torch.bfloat16, torch.float16):
        t = t.float()
    # made anew each time: as a buffer, net.to(torch.bfloat16) would round the frequencies
    steps = torch.linspace(0, 1, dim // 2, dtype=t.dtype, device=t.device)
    angles = t[:, None] * (lowest * (highest / lowest) ** steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Condition(nn.Module):
    """Turns a noise level and, with classes, a label into one vector per sample.

    Arguments:
        dim: The length of the vector, even.
        classes: The number of labels; 0 is a network without labels.

    Example:
        >>> Condition(16, classes=10)(torch.tensor(0.5), torch.tensor([3, -1]), 2).shape
        torch.Size([2, 16])
    """

    def __init__(self, dim: int, classes: int = 0) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        self.first = nn.Linear(dim, dim)
        self.second = nn.Linear(dim, dim)
        self.labels = nn.Embedding(classes + 1, dim) if classes else None
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=dim**-0.5)

    def forward(self, t: Tensor, label: Tensor | None, batch: int) -> Tensor:
        """Embeds.

        Arguments:
            t: Noise levels, shape (B,) or ().
            label: Class indices, shape (B,); -1, and None for all, mean "no label".
            batch: B, which t need not tell.

        Returns:
            The condition, shape (B, dim), in the dtype of the parameters.
        """
        weight = self.first.weight
        # a single time lives on the CPU, where it can be read without waiting for a device
        features = sinusoids(t.to(weight.device).reshape(-1), self.dim).to(weight.dtype)
        hidden = self.first(features).expand(batch, -1)
        if self.labels is not None:
            hidden = hidden + self.labels(self.rows(label, batch, weight.device))
        elif label is not None:
            raise ValueError("this network was built without labels; build it with classes=...")
        return nn.functional.silu(self.second(nn.functional.silu(hidden)))

    def rows(self, label: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """The rows of the table to read, shape (B,): the last one where there is no label."""
        if label is None:
            return torch.full((batch,), self.classes, device=device)
        return torch.where(label < 0, self.classes, label)
