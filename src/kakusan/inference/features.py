r"""Named feature maps: what a distance between sample sets looks at.

A feature map turns samples (N, *shape) into vectors (N, d) and has a name, because a Fréchet or
kernel distance is a number about samples *and* features: on other features it is another number.
No map here is the Inception network of the literature, so none of these numbers compares with a
published FID.

* `Pixels` keeps the values, reduced by principal components: sees the coarse shape, blind to
  everything outside the leading 64 directions.
* `RandomConv` is a fixed random convolutional network: sees strokes and textures, knows no
  objects; needs no training and no download, and is the same for every data set.
* `Classifier` is a small network trained on the labels of the training split: sees what tells the
  classes apart. It knows its training data better than test data; the floor shows how much.

Pictures are (N, C, H, W) with values in about [-1, 1]. Features come out as float32 on the CPU.

References:
    GANs trained by a two time-scale update rule (Heusel et al., 2017)
    Reliable fidelity and diversity metrics for generative models (Naeem et al., 2020)
"""

import difflib
import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from kakusan.errors import KakusanError, UsageError

__all__ = [
    "Classifier",
    "Features",
    "Pixels",
    "RandomConv",
    "features_named",
]


class Features(Protocol):
    """A named map from samples (N, *shape) to features (N, d)."""

    @property
    def name(self) -> str:
        """What the features are called beside a number."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Maps samples (N, *shape) to features (N, d)."""
        ...


def _values(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32)


def _pictures(x: Tensor, least: int, name: str) -> Tensor:
    if x.ndim != 4 or min(x.shape[2:]) < least:
        raise KakusanError(
            f"{name} features need pictures (N, C, H, W) of at least {least} by {least} pixels, "
            f"not shape {tuple(x.shape)}; pixels-pca64 takes any shape"
        )
    return _values(x)


@torch.no_grad()
def _batched(net: Callable[[Tensor], Tensor], x: Tensor, size: int = 256) -> Tensor:
    return torch.cat([net(part) for part in x.split(size)])


class Pixels:
    """The values themselves, reduced to at most 64 principal components of the reference.

    Arguments:
        components: How many components are kept where a sample holds more values.

    Example:
        >>> Pixels()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 64])
    """

    def __init__(self, components: int = 64) -> None:
        self.components = components
        self.name = f"pixels-pca{components}"
        self._shape: torch.Size | None = None
        self._mean = self._axes = torch.empty(0)

    def fit(self, train: Tensor) -> "Pixels":
        """Finds the principal components of (at most 10,000 evenly spaced) samples (N, *shape)."""
        from sklearn.decomposition import PCA

        rows = _values(train[:: max(1, len(train) // 10_000)]).flatten(1)
        kept = min(self.components, *rows.shape)
        pca = PCA(kept, svd_solver="randomized", random_state=0).fit(rows.numpy())
        self._mean = torch.as_tensor(pca.mean_, dtype=torch.float32)
        self._axes = torch.as_tensor(pca.components_, dtype=torch.float32)
        self._shape = train.shape[1:]
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Maps samples (N, *shape) to features (N, at most `components`)."""
        rows = _values(x).reshape(len(x), -1)
        if rows.shape[1] <= self.components:
            return rows
        if self._shape is None:
            raise KakusanError(
                f"samples of shape {tuple(x.shape)} need principal components: "
                "call fit(train) on these pixel features first"
            )
        if x.shape[1:] != self._shape:
            raise KakusanError(
                f"samples of shape {tuple(x.shape)} do not fit pixel features of samples of "
                f"shape {tuple(self._shape)}; fit them anew"
            )
        return (rows - self._mean) @ self._axes.mT


class RandomConv:
    """A fixed, random, three-layer convolutional network, for any number of channels.

    Arguments:
        seed: Draws the weights; the same seed gives the same features on every machine.

    Example:
        >>> RandomConv(0)(torch.zeros(5, 3, 12, 8)).shape
        torch.Size([5, 128])
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.name = f"random-conv-{seed}"
        self._nets: dict[int, nn.Sequential] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Maps pictures (N, C, H, W) of at least 8 by 8 pixels to features (N, 128)."""
        x = _pictures(x, 8, self.name)
        channels = x.shape[1]
        if channels not in self._nets:
            with torch.random.fork_rng(devices=[]):  # layers draw weights that are not used
                self._nets[channels] = self._build(channels)
        return _batched(self._nets[channels], x)

    def _build(self, channels: int) -> nn.Sequential:
        net = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(2),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(2),  # keeps a little of where things are
            nn.Flatten(),
        )
        generator = torch.Generator().manual_seed(self.seed)
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                # He's scale, so that a signal keeps its size from layer to layer
                scale = (2 / layer.weight[0].numel()) ** 0.5
                with torch.no_grad():
                    layer.weight.copy_(
                        scale * torch.randn(layer.weight.shape, generator=generator)
                    )
                    layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))  # pyright: ignore[reportOptionalMemberAccess]
        return net


class Classifier:
    """The last hidden layer of a small network trained to tell the labels apart.

    Pictures of at least 8 by 8 pixels go through a convolutional network, everything else,
    flattened, through a perceptron.

    Arguments:
        seed: Draws the first weights and the order of the data.
        steps: The number of training steps, of 128 samples each.
    """

    name = "classifier"
    _width = 64

    def __init__(self, seed: int = 0, steps: int = 300) -> None:
        self.seed = seed
        self.steps = steps
        self._body: nn.Sequential | None = None
        self._shape = torch.Size()

    def fit(self, train: Tensor, labels: Tensor) -> "Classifier":
        """Trains for a few seconds on samples (N, *shape) and integer labels (N,)."""
        if labels.shape != (len(train),) or labels.is_floating_point():
            raise KakusanError(
                f"classifier features need one integer label a sample, got labels of shape "
                f"{tuple(labels.shape)} and {labels.dtype} for {len(train)} samples"
            )
        values, target = labels.cpu().unique(return_inverse=True)
        if len(values) < 2:
            raise KakusanError(
                f"classifier features need two classes at least, but every label is {values}; "
                "use pixels-pca64"
            )
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            body, head = self._build(train.shape[1:]), nn.Linear(self._width, len(values))
        net = nn.Sequential(body, head)
        optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=self.steps)
        for _ in range(self.steps):
            rows = torch.randint(len(train), (128,), generator=generator)
            logits = net(_values(train[rows.to(train.device)]))
            optimiser.zero_grad()
            nn.functional.cross_entropy(logits, target[rows]).backward()
            optimiser.step()
            schedule.step()
        self._body, self._shape = body.eval(), train.shape[1:]
        return self

    def _build(self, shape: torch.Size) -> nn.Sequential:
        if len(shape) == 3 and min(shape[1:]) >= 8:
            return nn.Sequential(
                nn.Conv2d(shape[0], 16, 3, padding=1),
                nn.SiLU(),
                nn.AvgPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(512, self._width),
                nn.SiLU(),
            )
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(shape.numel(), 128),
            nn.SiLU(),
            nn.Linear(128, self._width),
            nn.SiLU(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Maps samples (N, *shape) to features (N, 64)."""
        if self._body is None:
            raise KakusanError("classifier features are not trained; call fit(train, labels)")
        if x.shape[1:] != self._shape:
            raise KakusanError(
                f"samples of shape {tuple(x.shape)} do not fit a classifier of samples of shape "
                f"{tuple(self._shape)}; fit it anew"
            )
        return _batched(self._body, _values(x))


_NAMES = ("pixels-pca64", "random-conv-0", "classifier")


def features_named(
    name: str,
    train: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    seed: int = 0,
) -> Features:
    """The feature map of that name, fitted to the training split where it needs to be.

    Arguments:
        name: "pixels-pca64", "random-conv-<seed>" or "classifier".
        train: The training split, with shape (K, *shape); for pixels and classifier.
        labels: Its integer labels, with shape (K,); for the classifier.
        seed: The classifier's.

    Example:
        >>> features_named("random-conv-7").name
        'random-conv-7'
    """
    if name == "pixels-pca64":
        return Pixels() if train is None else Pixels().fit(train)
    if match := re.fullmatch(r"random-conv-(\d+)", name):
        return RandomConv(int(match[1]))
    if name == "classifier":
        if train is None or labels is None:
            raise UsageError("classifier features need labelled training data; use pixels-pca64")
        return Classifier(seed).fit(train, labels)
    nearest = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0)[0]
    raise UsageError(
        f"there are no features named {name!r}; did you mean {nearest!r}? "
        f"(there are {', '.join(_NAMES)})"
    )
