"""Images of a data set: checked, decoded, and read by lists of indices."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from ..reference_bank import Augmentation, ReferenceBank
from .data_set import find_columns, read_labels
from .image_cache import cached_images
from .image_column import to_image, with_images, without_corrupt
from .image_reader import ImageReader, decode, decode_all, make_reader, read_row
from .sources import IndexedImages


class ImageColumn(IndexedImages):
    """Images and labels of a data set, read by lists of indices, as a dictionary of columns.

    With `images` decoded beforehand (`decode_all`) reading is one gather; otherwise images are decoded as they are
    read, in the DataLoader's workers where there are any. Random crops are a function of `seed` and the list.

    Args:
        dataset: the data set.
        column: its column of images.
        reader: how they are read.
        labels: N classes, or None.
        images: (N, C, H, W) uint8, all images as the reader gives them, or None.
        seed: random seed for the crops.
        label_column: the column that `labels` are from.
        num_classes: number of classes, where there are labels.
        class_names: their names, where they have some.
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
        class_names: list[str] | None = None,
    ) -> None:
        self.dataset, self.column, self.reader, self.images, self.seed = dataset, column, reader, images, seed
        self.label_column, self.num_classes, self.class_names = label_column, num_classes, class_names
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.reader.shape

    @property
    def in_memory(self) -> Tensor | None:
        return self.images

    @cached_property
    def crops_at_random(self) -> bool:
        """Whether an image is read differently each time."""
        if self.images is not None or self.reader.center_crop:
            return False
        images = (to_image(value) for value in self.dataset[self.column])
        return any(image is not None and self.reader.crops_at_random(image) for image in images)

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

    @property
    def read_alike(self) -> bool:
        return not self.crops_at_random

    @property
    def fingerprint(self) -> str:
        return f"{self.dataset._fingerprint}/{self.column}/{self.reader}"

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
        index = torch.tensor(indices, device="cpu")
        if self.images is not None:
            columns = {"images": self.images.index_select(0, index)}  # five times as fast as indexing
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
    resolution: int | Sequence[int] | None = None,
    center_crop: bool = False,
    skip_corrupt: bool = False,
    image_memory_gb: float = 4.0,
    image_cache: bool = True,
    cache_dir: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> ImageColumn:
    """The images of a data set, checked, and decoded where they fit into memory.

    Args:
        dataset: the data set.
        image_column, label_column: names of its columns; detected if there is only one.
        class_conditional: whether labels are read.
        image_mode, resolution, center_crop: as for `make_reader`.
        skip_corrupt: leave out images that are missing or cannot be decoded; otherwise they are an error.
        image_memory_gb: GiB up to which decoded images are kept, as uint8.
        image_cache: keep them on the disk too, for other processes and later runs, as `cached_images` does.
        cache_dir: where; None: Hugging Face's cache.
        seed: random seed for the crops.
        quiet: no progress bar.

    Raises:
        ValueError: there are no images, or no labels where they are needed; or they cannot be read.
    """
    column, label_column = find_columns(dataset, image_column, label_column, class_conditional)
    dataset = with_images(dataset, column)
    if skip_corrupt:
        dataset = without_corrupt(dataset, column)
    if len(dataset) == 0:
        raise ValueError("the data set is empty.")
    reader = make_reader(dataset, column, image_mode, resolution, center_crop)
    labels = None if label_column is None else read_labels(dataset, label_column)
    if image_cache:
        decoded = cached_images(dataset, column, reader, image_memory_gb * 2**30, quiet, cache_dir)
    else:
        decoded = decode_all(dataset, column, reader, image_memory_gb * 2**30, quiet)
    if labels is None:
        return ImageColumn(dataset, column, reader, None, decoded, seed)
    if dataset.features[label_column].dtype != "int64":  # a bank on the disk reads the numbers from the column
        dataset = dataset.remove_columns(label_column).add_column(label_column, labels.values)
    return ImageColumn(
        dataset, column, reader, labels.values, decoded, seed, label_column, labels.num_classes, labels.class_names
    )


def measure_standard_deviation(images: ImageColumn, at_most: int = 10_000) -> float:
    """Standard deviation over all pixels in [-1, 1] of `at_most` evenly spaced images: EDM's sigma_data."""
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), at_most)).astype(int)).tolist()
    counts = torch.zeros(256, dtype=torch.int64, device="cpu")
    for start in range(0, len(rows), 500):
        batch = images.__getitems__(rows[start : start + 500])["images"]
        counts += torch.bincount(batch.flatten().to(torch.int64), minlength=256)
    return standard_deviation_of(counts)


def standard_deviation_of(levels: Tensor) -> float:
    """Standard deviation in [-1, 1] of uint8 pixels, of which there are `levels` (256,) of each level."""
    counts = levels.to(torch.float64)
    weights = counts / counts.sum()
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 127.5 - 1
    mean = (weights * values).sum()
    return math.sqrt(float((weights * (values - mean) ** 2).sum()))


def flip_at_random(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (n, C, H, W) mirrored with probability one half, by draws on the generator's device."""
    flips = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(flips.to(images.device)[:, None, None, None], images.flip(-1), images)
