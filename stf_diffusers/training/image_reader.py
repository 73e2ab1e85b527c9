"""Images of a data set as uint8 tensors: decoded, converted, resized, cropped."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .image_column import pixel_dtype, to_image


@dataclass(frozen=True)
class ImageReader:
    """Turns images into uint8 tensors (C, H, W): mode, then size, then crop, as Diffusers' scripts do.

    Args:
        mode: "L", "RGB" or "RGBA".
        resolution: (H, W), or one number for both; images are resized to the smallest size that covers it (bilinear,
            antialiased).
        center_crop: crop the centre; otherwise the crop of an image of other proportions is random.
        resize: whether other sizes are resized and cropped; otherwise they are an error.
        convert: whether images of any mode are converted to `mode`; otherwise those that would lose something by it
            (colour, transparency) are an error.
    """

    mode: str
    resolution: int | tuple[int, int]
    center_crop: bool
    resize: bool = True
    convert: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is read."""
        return len(self.mode), *self.size

    def crops_at_random(self, image: Image.Image) -> bool:
        """Whether this image is read differently each time."""
        height, width = self.size
        return self.resize and not self.center_crop and image.width * height != image.height * width

    def __call__(self, value: Any, draw: random.Random) -> Tensor:
        """An entry of a column of images (a PIL image, or pixels), cropped by `draw`.

        Raises:
            ValueError: it is missing, or would lose something that it should not.
        """
        image = to_image(value)
        if image is None:
            raise ValueError("is missing. Leave the row out.")
        if image.mode == "F":
            raise ValueError("has mode 'F', values of no fixed range. Convert the images to 8 or 16 bits.")
        if not self.convert:
            transparent = "A" in image.getbands() or "transparency" in image.info
            if transparent or image.mode not in ("1", "L", "P", "RGB"):
                what = "transparency" if transparent else f"mode {image.mode}"
                raise ValueError(
                    f"has {what}. Pass image_mode='RGBA' to keep transparency, or image_mode='RGB' ('L') to convert without it."
                )
            if self.mode == "L" and image.mode not in ("1", "L"):
                raise ValueError(
                    f"has mode {image.mode} where others are grey. Pass image_mode='RGB' or image_mode='L'."
                )
        (height, width), (wide, high) = self.size, image.size
        if not self.resize and (wide, high) != (width, height):
            raise ValueError(f"is {wide}x{high} where others are {width}x{height}: pass resolution=.")
        image = image.convert(self.mode)
        scale = max(width / wide, height / high)
        if scale != 1:
            wide, high = max(width, round(wide * scale)), max(height, round(high * scale))
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
        spare_x, spare_y = wide - width, high - height
        if spare_x or spare_y:
            left, top = (
                (spare_x // 2, spare_y // 2)
                if self.center_crop
                else (draw.randint(0, spare_x), draw.randint(0, spare_y))
            )
            image = image.crop((left, top, left + width, top + height))
        pixels = np.array(image, dtype=np.uint8).reshape(height, width, len(self.mode))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def make_reader(
    dataset: datasets.Dataset | datasets.IterableDataset,
    column: str,
    mode: str | None,
    resolution: int | Sequence[int] | None,
    center_crop: bool,
) -> ImageReader:
    """A reader for this data set; mode and resolution, where not given, are those of its first image.

    `resolution` is a side, or (height, width).

    Raises:
        ValueError: the first image is missing or cannot be decoded, or is not square and no resolution is given.
    """
    sides = None if resolution is None else (resolution,) if isinstance(resolution, int) else tuple(resolution)
    if sides is not None and (len(sides) not in (1, 2) or min(sides) < 1):
        raise ValueError(f"resolution={sides}: pass one side, or height and width, each at least 1.")
    if isinstance(dataset, datasets.IterableDataset):
        try:
            value = next(iter(dataset), {column: None})[column]
        except Exception as error:
            raise undecodable(0, error, " or leave it out") from error
        first = named(0, to_image, value, pixel_dtype(dataset.features[column]))
    else:
        first = decode(dataset, column, [0])[0]
    if first is None:
        raise ValueError("image 0 is missing. Leave the row out.")
    if sides is None and first.width != first.height:
        raise ValueError(
            f"the images are not square ({first.width}x{first.height}): pass resolution=, one number to crop them to a square, "
            "or their height and width."
        )
    found = "L" if first.mode in ("1", "L", "LA") else "RGB"
    size = (first.height, first.width) if sides is None else (sides[0], sides[-1])
    return ImageReader(mode or found, size, center_crop, resize=sides is not None, convert=mode is not None)


def decode(dataset: datasets.Dataset, column: str, rows: list[int]) -> list[Image.Image | None]:
    """The images in `rows`; None where one is missing.

    Raises:
        ValueError: one cannot be decoded; names it.
    """
    try:
        values = dataset[rows][column]
    except Exception as error:
        if len(rows) > 1:
            for row in rows:
                decode(dataset, column, [row])
        raise undecodable(rows[0], error, ", or leave it out with skip_corrupt=True") from error
    return [named(row, to_image, value) for row, value in zip(rows, values, strict=True)]


def undecodable(row: int, error: Exception, otherwise: str) -> ValueError:
    """What to raise where PIL or Datasets fails."""
    return ValueError(f"image {row} cannot be decoded: {str(error).rstrip('.')}. Repair it{otherwise}.")


def decode_all(
    dataset: datasets.Dataset, column: str, reader: ImageReader, budget_bytes: float, quiet: bool
) -> Tensor | None:
    """All images as one uint8 tensor (N, C, H, W); None where that exceeds the budget or crops are to be random."""
    shape = torch.Size((len(dataset), *reader.shape))
    if shape.numel() > budget_bytes:
        return None
    pixels = torch.empty(shape, dtype=torch.uint8, device="cpu")
    fixed = random.Random(0)
    with tqdm(total=len(dataset), desc="Decoding images", unit="image", disable=quiet) as progress:
        for start in range(0, len(dataset), 256):
            rows = list(range(start, min(start + 256, len(dataset))))
            for row, image in zip(rows, decode(dataset, column, rows), strict=True):
                if image is not None and reader.crops_at_random(image):
                    return None
                pixels[row] = read_row(reader, row, image, fixed)
            progress.update(len(rows))
    return pixels


def read_row(reader: ImageReader, row: int, image: Any, draw: random.Random) -> Tensor:
    """`reader(image, draw)`, whose errors name the row."""
    pixels: Tensor = named(row, reader, image, draw)
    return pixels


def named(row: int, read: Callable[..., Any], *arguments: Any) -> Any:
    """`read(*arguments)`, whose errors name the row."""
    try:
        return read(*arguments)
    except (ValueError, OSError) as error:
        raise ValueError(f"image {row} {error}") from error
