r"""Self-attention, softmax(Q Kᵀ / √d) V, in one place.

The default is torch's fused kernel. It forms no N x N matrix, but it can be differentiated only
once and only backwards: a forward-mode derivative (`torch.func.jvp`, an exact divergence) and a
second backward (implicit score matching, the curvature of a log density) are refused. Inside

    with explicit_attention():
        ...

the same function is written out as two matrix products and a softmax, which can be
differentiated in every mode and any number of times. The two agree to rounding.

Attention sees a set: permuting the tokens permutes the output.

References:
    Attention is all you need (Vaswani et al., 2017), arXiv:1706.03762
"""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# on a CPU in bfloat16 the fused kernel took 75 ms, forward and backward, where the two products
# took 12 (49 tokens, 128 samples of 4 heads); at 256 tokens 303 against 222, and then it wins
FEW = 256


def explicit_attention() -> AbstractContextManager[object]:
    """Every attention computed inside is differentiable in every mode, any number of times.

    Only the forward pass has to run inside.

    Example:
        >>> q = torch.randn(1, 1, 4, 8)
        >>> with explicit_attention():
        ...     _, tangent = torch.func.jvp(lambda q: attend(q, q, q), (q,), (q,))
        >>> tangent.shape
        torch.Size([1, 1, 4, 8])
    """
    return sdpa_kernel(SDPBackend.MATH)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Averages the values with the softmax of the scaled products of queries and keys.

    Arguments:
        q: Queries, shape (B, heads, N, d).
        k: Keys, shape (B, heads, M, d).
        v: Values, shape (B, heads, M, d).

    Returns:
        The averages, shape (B, heads, N, d).
    """
    few = max(q.shape[-2], k.shape[-2]) <= FEW
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and few:
        return written_out(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, as the formula says it."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return weights.softmax(dim=-1) @ v


class SelfAttention(nn.Module):
    """Multi-head self-attention among the pixels of an image, added to its input.

    Arguments:
        channels: The number of channels of the image.
        head: Channels of one head; fewer where `channels` does not divide by it.
    """

    def __init__(self, channels: int, head: int = 32) -> None:
        super().__init__()
        self.heads = max(1, channels // head) if channels % head == 0 else 1
        # the mean of a key is a constant within each softmax, so its bias would never learn
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attends.

        Arguments:
            x: Tokens, shape (B, N, channels).

        Returns:
            What to add to x, shape (B, N, channels).
        """
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).unbind(2)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(y.transpose(1, 2).reshape(B, N, C))
