"""Images of a data set: checked, decoded, and read by lists of indices."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..reference_bank import Augmentation, ReferenceBank
from .data_set import find_image_column, find_label_column, read_labels
from .sources import IndexedImages


@dataclass(frozen=True)
class ImageReader:
    """PIL images to uint8 tensors (C, R, R): mode, then size, then crop, as Diffusers' scripts do.

    Args:
        mode: "L", "RGB" or "RGBA".
        resolution: R; the shorter side is resized to it (bilinear, antialiased).
        center_crop: crop the centre; otherwise the crop of an image that is not square is random.
        resize: whether other sizes than R x R are resized and cropped; otherwise they are an error.
        convert: whether images of any mode are converted to `mode`; otherwise those that would lose something by it
            (colour, transparency) are an error.
    """

    mode: str
    resolution: int
    center_crop: bool
    resize: bool = True
    convert: bool = True

    @property
    def channels(self) -> int:
        return len(self.mode)

    def __call__(self, image: Image.Image, draw: random.Random) -> Tensor:
        if image.mode in ("I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
            raise ValueError(f"has mode {image.mode!r}, more than 8 bits a channel. Convert the images to 8 bits.")
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
        width, height = image.size
        if not self.resize and (width, height) != (self.resolution, self.resolution):
            raise ValueError(
                f"is {width}x{height} where others are {self.resolution}x{self.resolution}: pass resolution=."
            )
        image = image.convert(self.mode)
        scale = self.resolution / min(width, height)
        if scale != 1:
            width, height = max(self.resolution, round(width * scale)), max(self.resolution, round(height * scale))
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        spare_x, spare_y = width - self.resolution, height - self.resolution
        if spare_x or spare_y:
            left, top = (
                (spare_x // 2, spare_y // 2)
                if self.center_crop
                else (draw.randint(0, spare_x), draw.randint(0, spare_y))
            )
            image = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = np.array(image, dtype=np.uint8).reshape(self.resolution, self.resolution, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def make_reader(
    dataset: datasets.Dataset | datasets.IterableDataset,
    column: str,
    mode: str | None,
    resolution: int | None,
    center_crop: bool,
) -> ImageReader:
    """A reader for this data set; mode and resolution, where not given, are those of its first image.

    Raises:
        ValueError: the first image is not square and no resolution is given.
    """
    if isinstance(dataset, datasets.IterableDataset):
        first = next(iter(dataset), {column: None})[column]
    else:
        first = decode(dataset, column, [0])[0]
    if not isinstance(first, Image.Image):
        raise ValueError(f"column {column!r} holds {type(first).__name__}, not images. Choose one with image_column=.")
    if resolution is None and first.width != first.height:
        raise ValueError(f"the images are not square ({first.width}x{first.height}): pass resolution=.")
    found = "L" if first.mode in ("1", "L", "LA") else "RGB"
    return ImageReader(
        mode or found, resolution or first.width, center_crop, resize=resolution is not None, convert=mode is not None
    )


def decode(dataset: datasets.Dataset, column: str, rows: list[int]) -> list[Image.Image]:
    """The images in `rows`.

    Raises:
        ValueError: one cannot be decoded; names it.
    """
    try:
        images: list[Image.Image] = dataset[rows][column]
        return images
    except Exception as error:
        if len(rows) > 1:
            for row in rows:
                decode(dataset, column, [row])
        raise ValueError(f"image {rows[0]} cannot be decoded: {error}. Repair it or leave it out.") from error


class ImageColumn(IndexedImages):
    """Images and labels of a data set by lists of indices, as a dictionary of columns.

    With `images` decoded beforehand (`decode_all`) reading is one gather; otherwise images are decoded as they are
    read, in the DataLoader's workers where there are any. Random crops are a function of `seed` and the list.

    Args:
        dataset: the data set.
        column: its column of images.
        reader: how they are read.
        labels: N classes, or None.
        images: (N, C, R, R) uint8, all images as the reader gives them, or None.
        seed: of random crops.
        label_column: the column that `labels` are from.
        num_classes: number of classes, where there are labels.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        column: str,
        reader: ImageReader,
        labels: Sequence[int] | None = None,
        images: Tensor | None = None,
        seed: int = 0,
        label_column: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.dataset, self.column, self.reader, self.images, self.seed = dataset, column, reader, images, seed
        self.label_column, self.num_classes = label_column, num_classes
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __str__(self) -> str:
        where = "kept in memory" if self.images is not None else "made as they are read"
        return f"{len(self)} images of {self.shape}, {where}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.reader.channels, self.reader.resolution, self.reader.resolution

    @property
    def in_memory(self) -> Tensor | None:
        return self.images

    @cached_property
    def crops_at_random(self) -> bool:
        """Whether an image is read differently each time."""
        if self.images is not None or self.reader.center_crop:
            return False
        return any(image.width != image.height for image in self.dataset[self.column])

    @cached_property
    def standard_deviation(self) -> float:
        """Standard deviation over all pixels in [-1, 1] of at most 10,000 evenly spaced images."""
        return measure_standard_deviation(self)

    def digest(self, at_most: int = 256) -> str:
        """A digest of all decoded images and labels or, where they are decoded as they are read, of `at_most` evenly
        spaced ones.
        """
        content = hashlib.sha256(f"{len(self)} {tuple(self.shape)}".encode())
        if self.images is not None:
            content.update(self.images.numpy().data)
        else:
            rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), at_most)).astype(int)).tolist()
            content.update(self.__getitems__(rows)["images"].numpy().tobytes())
        if self.labels is not None:
            content.update(self.labels.numpy().data)
        return content.hexdigest()[:16]

    def manifest(self) -> dict[str, Any]:
        return {"num_images": len(self), "data_digest": self.digest(), "image_shape": list(self.shape)}

    def bank_in_file(
        self, path: Path, augmentation: Augmentation, process_shard: tuple[int, int] | None, quiet: bool
    ) -> ReferenceBank:
        if self.crops_at_random:
            raise ValueError(
                "reference='bank': the images are not square and cropped at random, so that no set contains the sources. "
                "Pass center_crop=, or reference='batch'."
            )
        return ReferenceBank.from_dataset(
            self.dataset,
            self.column,
            self.label_column,
            partial(self.reader, draw=random.Random(0)),
            path=path,
            augmentation=augmentation,
            process_shard=process_shard,
            quiet=quiet,
        )

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices)
        if self.images is not None:
            columns = {"images": self.images[index]}
        else:
            draw = random.Random(f"{self.seed}/{indices}")
            images = decode(self.dataset, self.column, indices)
            columns = {
                "images": torch.stack(
                    [read_row(self.reader, *pair, draw) for pair in zip(indices, images, strict=True)]
                )
            }
        columns["index"] = index
        if self.labels is not None:
            columns["label"] = self.labels[index]
        return columns


def open_images(
    dataset: datasets.Dataset,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_conditional: bool = False,
    image_mode: str | None = None,
    resolution: int | None = None,
    center_crop: bool = False,
    image_memory_gb: float = 4.0,
    seed: int = 0,
    quiet: bool = False,
) -> ImageColumn:
    """The images of a data set, checked, and decoded where they fit into memory.

    Args:
        dataset: the data set.
        image_column, label_column: its columns; found where there is only one of the kind.
        class_conditional: whether labels are read.
        image_mode, resolution, center_crop: as for `make_reader`.
        image_memory_gb: GiB up to which decoded images are kept, as uint8.
        seed: of random crops.
        quiet: no progress bar.

    Raises:
        ValueError: there are no images, or no labels where they are needed; or they cannot be read.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty.")
    column = find_image_column(dataset, image_column)
    if class_conditional or label_column:
        label_column = find_label_column(dataset, label_column)
    if not class_conditional:
        label_column = None
    reader = make_reader(dataset, column, image_mode, resolution, center_crop)
    labels, num_classes = (None, None) if label_column is None else read_labels(dataset, label_column)
    decoded = decode_all(dataset, column, reader, image_memory_gb * 2**30, quiet)
    return ImageColumn(dataset, column, reader, labels, decoded, seed, label_column, num_classes)


def decode_all(
    dataset: datasets.Dataset, column: str, reader: ImageReader, budget_bytes: float, quiet: bool
) -> Tensor | None:
    """All images as one uint8 tensor (N, C, R, R); None where that exceeds the budget or crops are to be random."""
    size = len(dataset) * reader.channels * reader.resolution**2
    if size > budget_bytes:
        return None
    pixels = torch.empty((len(dataset), reader.channels, reader.resolution, reader.resolution), dtype=torch.uint8)
    fixed = random.Random(0)
    with tqdm(total=len(dataset), desc="Decoding images", unit="image", disable=quiet) as progress:
        for start in range(0, len(dataset), 256):
            rows = list(range(start, min(start + 256, len(dataset))))
            for row, image in zip(rows, decode(dataset, column, rows), strict=True):
                if image is not None and image.width != image.height and reader.resize and not reader.center_crop:
                    return None
                pixels[row] = read_row(reader, row, image, fixed)
            progress.update(len(rows))
    return pixels


def read_row(reader: ImageReader, row: int, image: Image.Image | None, draw: random.Random) -> Tensor:
    """`reader(image, draw)`, whose errors name the row."""
    if image is None:
        raise ValueError(f"image {row} is missing. Leave the row out.")
    try:
        return reader(image, draw)
    except (ValueError, OSError) as error:
        raise ValueError(f"image {row} {error}") from error


def measure_standard_deviation(images: ImageColumn, at_most: int = 10_000) -> float:
    """Standard deviation over all pixels in [-1, 1] of `at_most` evenly spaced images: EDM's sigma_data."""
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), at_most)).astype(int)).tolist()
    counts = torch.zeros(256, dtype=torch.int64)
    for start in range(0, len(rows), 500):
        batch = images.__getitems__(rows[start : start + 500])["images"]
        counts += torch.bincount(batch.flatten().to(torch.int64), minlength=256)
    return standard_deviation_of(counts)


def standard_deviation_of(levels: Tensor) -> float:
    """Standard deviation in [-1, 1] of uint8 pixels, of which there are `levels` (256,) of each level."""
    counts = levels.to(torch.float64)
    weights = counts / counts.sum()
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean = (weights * values).sum()
    return math.sqrt(float((weights * (values - mean) ** 2).sum()))


def flip_at_random(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (n, C, H, W) mirrored with probability one half, by draws on the generator's device."""
    flips = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(flips.to(images.device)[:, None, None, None], images.flip(-1), images)
