"""Images and captions for the scripts of this folder: a data set that Datasets can read, or scikit-learn's digits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_split(dataset_name: str | None, train_data_dir: str | None) -> datasets.Dataset:
    """The training split, its images in the column "image"; without a name or a folder, the digits with captions.

    Raises:
        ValueError: it has no column of images.
    """
    if dataset_name is None and train_data_dir is None:
        return load_digits()
    dataset = datasets.load_dataset(dataset_name or "imagefolder", data_dir=train_data_dir, split="train")
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"the data set has the columns {dataset.column_names}, and none of images. Pass another one.")
    return dataset if columns[0] == "image" else dataset.rename_column(columns[0], "image")


def load_digits() -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 and grey, with their classes and with captions."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NUMERALS), "text": datasets.Value("string")}
    )
    columns = {
        "image": [Image.fromarray(image) for image in pixels],
        "label": digits.target.tolist(),
        "text": [f"a handwritten {NUMERALS[digit]}" for digit in digits.target],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def column(dataset: datasets.Dataset, name: str) -> list:
    """The values of a column.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in dataset.column_names:
        raise ValueError(f"this script needs a column {name!r}; the data set has {dataset.column_names}. Rename one.")
    return list(dataset[name])


def to_pixels(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """uint8 (C, R, R): the shorter side resized to R, then the centre."""
    image = image.convert("L" if channels == 1 else "RGB")
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image).reshape(resolution, resolution, channels)).permute(2, 0, 1)


def read_pixels(dataset: datasets.Dataset, resolution: int, channels: int | None = None) -> Tensor:
    """All images, uint8 (N, C, R, R); grey ones have one channel unless told otherwise."""
    channels = channels or channels_of(dataset)
    return torch.stack([to_pixels(image, resolution, channels) for image in dataset["image"]])


def channels_of(dataset: datasets.Dataset) -> int:
    return 1 if dataset[0]["image"].mode in ("1", "L") else 3


def embed_captions(captions: Sequence[str], length: int = 16, width: int = 32) -> tuple[Tensor, Tensor]:
    """Word embeddings (N, length, width), zero where a caption has ended, and their sums (N, width).

    Stands in for a text encoder: a word's embedding is drawn with the word as the seed, so that it is the same in training
    and in sampling.
    """
    embeddings = torch.zeros(len(captions), length, width)
    for row, caption in zip(embeddings, captions, strict=True):
        for position, word in enumerate(caption.lower().split()[:length]):
            row[position] = torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
    return embeddings, embeddings.sum(1)
