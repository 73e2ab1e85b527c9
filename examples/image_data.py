"""Images for the training script: found, checked, decoded, and read by lists of indices."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm


def load_digits_dataset() -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, padded with background to 12x12 grey images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(np.pad(image, 2)) for image in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def load_split(
    name: str | None,
    config_name: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    split: str = "train",
) -> datasets.Dataset | datasets.IterableDataset:
    """A split of a Hub data set, a local folder, a parquet file, or a folder of images; with `streaming` as an
    `IterableDataset`. Data without splits are "train".

    Raises:
        ValueError: there is no such split, or no such data set.
    """
    if name is None and data_dir is None and split == "train":
        digits = load_digits_dataset()
        return digits.to_iterable_dataset() if streaming else digits
    if name is None and data_dir is None:
        raise ValueError(f"scikit-learn's digits have no {split!r} split: use train.")
    how = {"cache_dir": cache_dir, "streaming": streaming}
    try:
        if name is None:
            loaded = datasets.load_dataset("imagefolder", data_dir=data_dir, **how)
        elif Path(name).is_file():
            loaded = datasets.load_dataset(Path(name).suffix.lstrip("."), data_files=name, **how)
        elif (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
            if streaming:
                splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
                loaded = {split: part.to_iterable_dataset() for split, part in splits.items()}
        else:
            loaded = datasets.load_dataset(with_owner(name), config_name, **how)
    # Anything may go wrong with files and servers; what goes wrong has to name the data set.
    except Exception as error:
        where = f"--train_data_dir {data_dir}" if name is None else f"--dataset_name {name}"
        raise ValueError(f"{where} cannot be read: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    if split not in loaded:
        raise ValueError(f"the data set has no {split!r} split; it has {sorted(loaded)}. Rename one, or pass a folder.")
    return loaded[split]


def with_owner(name: str) -> str:
    """A data set's name as Datasets can read it: the Hub still knows "cifar10", Datasets wants "uoft-cs/cifar10".

    Raises:
        ValueError: the Hub does not know the short name, or cannot be asked.
    """
    if "/" in name or Path(name).exists():
        return name
    try:
        return HfApi().dataset_info(name).id
    # The client's versions differ in their HTTP library and its errors.
    except Exception as error:
        raise ValueError(
            f"there is no such file or folder, and no data set of this old name on the Hub: {error} Pass a path, or the "
            f"owner too: owner/{name}."
        ) from error


def find_column(
    dataset: datasets.Dataset | datasets.IterableDataset, kind: type, requested: str | None, flag: str
) -> str | None:
    """The column that holds `kind` (datasets.Image or datasets.ClassLabel): the one requested, or the only one.

    Returns None where there is no candidate.

    Raises:
        ValueError: the requested column is missing, or there are several candidates.
    """
    if requested is not None:
        if requested not in dataset.column_names:
            raise ValueError(f"{flag} {requested}: the data set has the columns {dataset.column_names}.")
        return requested
    candidates = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(candidates) > 1:
        raise ValueError(f"the columns {candidates} all qualify; choose one with {flag}.")
    return candidates[0] if candidates else None


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
                    f"has {what}. Pass --image_mode RGBA to keep transparency, or RGB (L) to convert without it."
                )
            if self.mode == "L" and image.mode not in ("1", "L"):
                raise ValueError(
                    f"has mode {image.mode} where others are grey. Pass --image_mode RGB or --image_mode L."
                )
        width, height = image.size
        if not self.resize and (width, height) != (self.resolution, self.resolution):
            raise ValueError(
                f"is {width}x{height} where others are {self.resolution}x{self.resolution}: pass --resolution."
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
        raise ValueError(f"column {column!r} holds {type(first).__name__}, not images. Choose one with --image_column.")
    if resolution is None and first.width != first.height:
        raise ValueError(f"the images are not square ({first.width}x{first.height}): pass --resolution.")
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


class ImageColumn(torch.utils.data.Dataset):
    """Images and labels by lists of indices, as a dictionary of columns: what `ReferenceBatchCollator` reads.

    With `images` decoded beforehand (`decode_all`) reading is one gather; otherwise images are decoded as they are
    read, in the DataLoader's workers where there are any. Random crops are a function of `seed` and the list.
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
    ) -> None:
        self.dataset, self.column, self.reader, self.images, self.seed = dataset, column, reader, images, seed
        self.label_column = label_column
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, R, R) of each image."""
        return self.reader.channels, self.reader.resolution, self.reader.resolution

    @cached_property
    def crops_at_random(self) -> bool:
        """Whether an image is read differently each time."""
        if self.images is not None or self.reader.center_crop:
            return False
        return any(image.width != image.height for image in self.dataset[self.column])

    def digest(self, at_most: int = 256) -> str:
        """What tells this data set from another: a digest of all decoded images and labels, or, where they are decoded as
        they are read, of `at_most` evenly spaced ones.
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
