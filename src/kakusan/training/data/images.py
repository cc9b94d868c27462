"""Folders of pictures (PNG, JPEG, ...), any depth; the immediate sub-folders are the labels.

All pictures must come to one shape (C, H, W). Where they are not of one shape already, the user
chooses how: `data.size` and `data.fit` crop (scale the shorter side, cut the middle), resize
(stretch) or pad (scale the longer side, add black or transparent borders); `data.channels`
converts between grey, colour and alpha. Dropping alpha lays the picture on white, for the colours
under transparent pixels mean nothing. Rotation marks of cameras are obeyed.

A folder with exactly the sub-folders train and test brings its own test set. A single sub-folder,
or none, means no labels. Headers are read at once, so a wrong size is known at the start; pixels
are decoded at once if they fill at most `HELD_BYTES`, otherwise batch by batch.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kakusan.errors import KakusanError, UsageError
from kakusan.training.config import DataConfig
from kakusan.training.data import arrays
from kakusan.training.data.codecs import Codec, PixelCodec
from kakusan.training.data.sources import Found, Rows

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
CHANNELS = {"1": 1, "L": 1, "LA": 2, "La": 2, "RGBA": 4, "RGBa": 4, "PA": 4, "RGB": 3}
CHANNELS |= {"P": 3, "CMYK": 3, "YCbCr": 3, "LAB": 3, "HSV": 3}
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
WAYS = "data.size=N with data.fit=crop, resize or pad"


@dataclass(frozen=True)
class Target:
    """The one shape that every picture is brought to."""

    channels: int
    height: int
    width: int
    fit: str = "refuse"

    def bring(self, image: Image, name: str) -> np.ndarray:
        """The pixels of an opened picture as uint8 (C, H, W)."""
        from PIL import ImageOps

        turned = ImageOps.exif_transpose(image)
        fitted = self._fitted(_converted(turned, self.channels, name), name)
        pixels = np.asarray(fitted, np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def _fitted(self, image: Image, name: str) -> Image:
        from PIL import Image, ImageOps

        size = (self.width, self.height)
        if image.size == size:
            return image
        if self.fit == "crop":
            return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        if self.fit == "pad":
            return ImageOps.pad(image, size, Image.Resampling.LANCZOS)
        if self.fit == "resize":
            return image.resize(size, Image.Resampling.LANCZOS)
        raise KakusanError(
            f"{name} is {image.width}x{image.height} pixels, expected {self.width}x{self.height}: "
            f"give {WAYS}"
        )


class FolderRows(Rows):
    """Pictures decoded when they are asked for, by a few threads."""

    def __init__(self, paths: list[Path], target: Target, name: str) -> None:
        self.paths, self.target, self.name = paths, target, name

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: np.ndarray) -> np.ndarray:
        """The pictures with these numbers as uint8 (B, C, H, W)."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._decoded, index)))

    def fit(self, index: np.ndarray) -> Codec:
        """Pixels with 255 levels; nothing is read."""
        return PixelCodec((self.target.channels, self.target.height, self.target.width))

    def _decoded(self, number: int) -> np.ndarray:
        path = self.paths[number]
        with _opening(path) as image:
            return self.target.bring(image, str(path))


def read_image_folder(folder: Path, config: DataConfig) -> Found:
    """The pictures of a folder, in the order of their paths.

    Raises:
        KakusanError: No picture, a damaged one, or pictures of different shapes without a choice
            of how to bring them to one.
    """
    inner = {p.name: p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if set(inner) == {"train", "test"}:
        train, test = _labelled(inner["train"]), _labelled(inner["test"])
        if train[2] != test[2]:
            raise KakusanError(
                f"{inner['train']} has the classes {train[2]} but {inner['test']} has {test[2]}"
            )
        target = _target([*train[0], *test[0]], config)
        held = _found(inner["test"], test, target, config)
        return _found(inner["train"], train, target, config, held)
    labelled = _labelled(folder)
    return _found(folder, labelled, _target(labelled[0][: config.limit], config), config)


def channels_of(image: Image, name: str) -> int:
    """How many channels a picture has, as stored."""
    if image.mode not in CHANNELS:
        raise KakusanError(
            f"{name} has pixels of mode {image.mode}, pictures of 8 bits a channel are read: "
            "convert it, or give the images as a uint16 or float .npy array"
        )
    return 4 if image.mode == "P" and "transparency" in image.info else CHANNELS[image.mode]


def target_of(image: Image, config: DataConfig, name: str) -> Target:
    """The shape that one picture and the user's choices ask for."""
    width, height = _turned_size(image)
    if config.size is not None:
        width = height = config.size
    return Target(config.channels or channels_of(image, name), height, width, config.fit)


Labelled = tuple[list[Path], np.ndarray | None, tuple[str, ...] | None]


def _found(
    folder: Path, labelled: Labelled, target: Target, config: DataConfig, test: Found | None = None
) -> Found:
    paths, labels, classes = labelled
    paths = paths[: config.limit]
    labels = None if labels is None else labels[: config.limit]
    rows = FolderRows(paths, target, str(folder))
    if len(paths) * target.channels * target.height * target.width <= arrays.HELD_BYTES:
        held = arrays.HeldRows(rows.read(np.arange(len(paths))), str(folder))
        return Found(held, labels, classes, test)
    return Found(rows, labels, classes, test)


def _labelled(folder: Path) -> Labelled:
    paths = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not paths:
        raise KakusanError(
            f"{folder} holds nothing that can be learned: pictures (.png, .jpg, ...), IDX files "
            "(train-images-idx3-ubyte) or CIFAR-10 files (data_batch_1.bin) are looked for"
        )
    names = [p.relative_to(folder).parts[0] for p in paths]
    classes = tuple(sorted(set(n for n, p in zip(names, paths, strict=True) if n != p.name)))
    loose = next((p for n, p in zip(names, paths, strict=True) if n == p.name), None)
    if len(classes) < 2:
        return paths, None, None
    if loose is not None:
        raise KakusanError(
            f"{loose} lies beside the sub-folders {', '.join(classes[:3])} that name the labels: "
            "move it into one of them"
        )
    numbers = {name: k for k, name in enumerate(classes)}
    return paths, np.array([numbers[n] for n in names], np.int64), classes


def _target(paths: list[Path], config: DataConfig) -> Target:
    """Reads every header; refuses if the pictures do not come to one shape."""
    if config.fit != "refuse" and config.size is None:
        raise UsageError(f"data.fit={config.fit} needs data.size, the side in pixels")
    first: Target | None = None
    for path in paths:
        with _opening(path) as image:
            target = target_of(image, config, str(path))
            size = _turned_size(image)
        first = first or target
        if target.channels != first.channels:
            raise KakusanError(
                f"{paths[0]} has {first.channels} channels but {path} has {target.channels}: "
                "give data.channels=1 (grey), 2 (grey and alpha), 3 (colour) or 4 (colour, alpha)"
            )
        if config.size is None and (target.height, target.width) != (first.height, first.width):
            raise KakusanError(
                f"{paths[0]} is {first.width}x{first.height} pixels but {path} is "
                f"{target.width}x{target.height}: give {WAYS}"
            )
        if config.fit == "refuse" and size != (target.width, target.height):
            raise KakusanError(
                f"{path} is {size[0]}x{size[1]} pixels, but data.size asks for {config.size}x"
                f"{config.size}: give data.fit=crop, resize or pad"
            )
    assert first is not None
    return first


def _turned_size(image: Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(0x0112) in TURNED else (width, height)


def _converted(image: Image, channels: int, name: str) -> Image:
    from PIL import Image

    stored = channels_of(image, name)
    if image.mode not in MODES.values():
        image = image.convert(MODES[stored])
    if image.mode == MODES[channels]:
        return image
    if stored in (2, 4) and channels in (1, 3):
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert(MODES[channels])


class _opening:  # noqa: N801 - reads as a verb: with _opening(path) as image
    """Opens a picture and turns what goes wrong inside into a sentence that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.image: Any = None

    def __enter__(self) -> Image:
        from PIL import Image

        try:
            self.image = Image.open(self.path)
        except Exception as error:
            self.__exit__(type(error), error, None)
            raise
        return self.image

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from PIL import Image

        if self.image is not None:
            self.image.close()
        broken = (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError)
        if isinstance(error, broken) and not isinstance(error, KakusanError):
            reason = str(error).replace(str(self.path), "it")
            raise KakusanError(f"{self.path} is damaged or no picture: {reason}") from None
