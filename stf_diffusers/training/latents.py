"""The latents of training images: encoded once into a file, normalised, drawn by lists of indices."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from ..reference_bank import Augmentation, ReferenceBank
from ..stored_rows import RowReader, RowWriter, raw_bytes
from .autoencoder import (
    LatentScale,
    check_fit,
    choose_scale,
    digest_of_autoencoder,
    encode,
    fold_normalization,
    own_scale,
)
from .sources import IndexedImages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCache:
    """The posteriors of the latents of N images, as `encode` gives them: views of a file.

    Args:
        path: path of the file.
        mean, std: (N, c, h, w) float32; std is None where the latents are functions of the images.
        mirrored_mean, mirrored_std: the same of the mirrored images, whose latents are not mirrored latents; None where
            training does not mirror.
        origin: what the file was made of: digests of the images and of the autoencoder, and whether mirrored.
        mean_of_draws, std_of_draws, std_of_means: mean and standard deviation of each channel over all images (and
            mirrored ones, if any), for latents drawn from the posteriors, and for the posteriors' means alone.
    """

    path: Path
    mean: Tensor = field(repr=False)
    std: Tensor | None = field(repr=False)
    mirrored_mean: Tensor | None = field(repr=False)
    mirrored_std: Tensor | None = field(repr=False)
    origin: dict[str, str]
    mean_of_draws: tuple[float, ...]
    std_of_draws: tuple[float, ...]
    std_of_means: tuple[float, ...]

    @classmethod
    def open(cls, path: Path) -> LatentCache:
        """The file that `encode_all` wrote, all of it read once to compare its checksums.

        Raises:
            ValueError: the file is damaged, or is not one of latents.
            OSError: it cannot be read.
        """
        try:
            file = RowReader(path)
            origin, checksums = json.loads(file.metadata["origin"]), json.loads(file.metadata["crc32"])
            moments = {name: tuple(json.loads(file.metadata[name])) for name in ("mean", "std", "std_of_means")}
            tensors = {name: file.mapped(name) for name in checksums}
            for name, checksum in checksums.items():
                if zlib.crc32(raw_bytes(tensors[name])) != checksum:
                    raise ValueError(f"the checksum of {name} differs")
            mean = tensors["mean"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or is not a file of latents: {error}.") from error
        columns = {name: tensors.get(name) for name in ("std", "mirrored_mean", "mirrored_std")}
        return cls(
            path,
            mean,
            **columns,
            origin=origin,
            mean_of_draws=moments["mean"],
            std_of_draws=moments["std"],
            std_of_means=moments["std_of_means"],
        )


def encode_all(
    images: IndexedImages,
    vae: ModelMixin,
    path: Path,
    *,
    mirrored: bool,
    batch_size: int,
    device: torch.device | str,
    quiet: bool,
) -> LatentCache:
    """The latents of all images, from the file where it holds them, otherwise encoded into it once.

    With several processes one has to come first, within `accelerator.main_process_first()`; the others find its file.

    Args:
        images: (C, R, R) uint8, the same each time they are read.
        vae: an autoencoder from `load_autoencoder`; moved to `device` when it has to encode.
        path: path of the safetensors file. Written aside and renamed when it is complete and on the disk.
        mirrored: whether to encode the mirrored images too.
        batch_size: images encoded at a time.
        device: where to encode.
        quiet: no progress bar.

    Raises:
        ValueError: images that are cropped at random or do not fit the autoencoder, or latents that are not finite.
        OSError: the file cannot be written; says how much room it needs.
    """
    if not images.read_alike:
        raise ValueError(
            "latents are encoded once, and the images are not square and cropped at random, so that each has many. Pass "
            "center_crop=."
        )
    origin = {
        "images": digest_of_images(images),
        "autoencoder": digest_of_autoencoder(vae),
        "mirrored": "yes" if mirrored else "no",
    }
    if path.exists():
        try:
            cache = LatentCache.open(path)
        except ValueError as error:
            logger.warning("%s The images are encoded anew.", error)
        else:
            different = [name for name in origin if cache.origin.get(name) != origin[name]]
            if not different:
                return cache
            logger.warning("%s was made with different %s. The images are encoded anew.", path, ", ".join(different))
    vae.to(device)
    write_latents(images, vae, path, origin, mirrored, batch_size, quiet)
    return LatentCache.open(path)


def digest_of_images(images: IndexedImages) -> str:
    """Identifies these images. Where they are decoded as they are read, their own digest covers only a few of them, and
    their fingerprint stands for the others.
    """
    return images.digest() if images.in_memory is not None else f"{images.digest()}/{images.fingerprint}"


def write_latents(
    images: IndexedImages,
    vae: ModelMixin,
    path: Path,
    origin: dict[str, str],
    mirrored: bool,
    batch_size: int,
    quiet: bool,
) -> None:
    """Encode all images batch by batch into a file, which is put in its place when it is complete."""
    shape, stochastic = check_fit(vae, images.__getitems__([0])["images"])
    parts = ("mean", "std") if stochastic else ("mean",)
    prefixes = ("", "mirrored_") if mirrored else ("",)
    layout = {prefix + part: (torch.float32, (len(images), *shape)) for prefix in prefixes for part in parts}
    checksums, totals = dict.fromkeys(layout, 0), Moments.zero(shape[0])
    # The metadata are known only at the end: checksums, and three numbers for each channel.
    metadata_bytes = 8 * (512 + 16 * shape[0])
    try:
        with (
            RowWriter(path, layout, metadata_bytes) as file,
            tqdm(total=len(images), desc="Encoding images", unit="image", disable=quiet) as progress,
        ):
            for start in range(0, len(images), batch_size):
                rows = list(range(start, min(start + batch_size, len(images))))
                pixels = images.__getitems__(rows)["images"]
                for prefix in prefixes:
                    mean, std = encode(vae, pixels.flip(-1) if prefix else pixels)
                    check_latents(mean if std is None else mean + std, rows)
                    totals.add(mean, std)
                    for part, values in zip(parts, (mean, std), strict=False):
                        assert values is not None
                        values = values.cpu()
                        file.write(prefix + part, values)
                        checksums[prefix + part] = zlib.crc32(raw_bytes(values), checksums[prefix + part])
                progress.update(len(rows))
            moments = {name: json.dumps(values) for name, values in totals.result().items()}
            file.finish({"origin": json.dumps(origin), "crc32": json.dumps(checksums), **moments})
    except OSError as error:
        size = 4 * len(layout) * len(images) * math.prod(shape) / 2**20
        raise OSError(
            f"the latents cannot be written to {path}, for which {size:.1f} MiB are needed: {error}"
        ) from error


def check_latents(latents: Tensor, rows: list[int]) -> None:
    """Raise ValueError where the latents (k, ...) of the images `rows` are not finite; names them."""
    wrong = ~latents.flatten(1).isfinite().all(1)
    if bool(wrong.any()):
        bad = [rows[i] for i in wrong.nonzero().flatten().tolist()][:8]
        raise ValueError(f"the latents of images {bad} are not finite. Pass another vae=.")


@dataclass
class Moments:
    """Sums over all posteriors and pixels, of each channel: (c,) float64."""

    count: int
    values: Tensor
    squares: Tensor
    variances: Tensor

    @classmethod
    def zero(cls, channels: int) -> Moments:
        return cls(0, *torch.zeros(3, channels, dtype=torch.float64, device="cpu"))

    def add(self, mean: Tensor, std: Tensor | None) -> None:
        """Add posteriors (B, c, h, w)."""
        mean = mean.to("cpu", torch.float64)
        self.count += mean.numel() // mean.shape[1]
        self.values += mean.sum((0, 2, 3))
        self.squares += mean.square().sum((0, 2, 3))
        if std is not None:
            self.variances += std.to("cpu", torch.float64).square().sum((0, 2, 3))

    def result(self) -> dict[str, list[float]]:
        """Per channel, the mean, the standard deviation of draws, and that of the posteriors' means."""
        mean = self.values / self.count
        between = (self.squares / self.count - mean.square()).clamp_min(0)
        total = between + self.variances / self.count
        return {"mean": mean.tolist(), "std": total.sqrt().tolist(), "std_of_means": between.sqrt().tolist()}


class LatentColumn(IndexedImages):
    """Normalised latents and labels by lists of indices, in place of the images.

    Each reading of a list draws its latents from their posteriors, and with mirrored latents each from the image's or its
    mirror's, all as a function of `seed` and the list: a run that is resumed reads what it would have read. Sources and
    references are in one list, so that a source is among its references as it was drawn. (A list of the same indices in
    the same order is drawn the same again, which batches of a single image without references always are.)

    Args:
        cache: the latents.
        scale: as from `choose_scale`, for the same `sample`.
        labels: N classes.
        sample: draw from the posteriors; otherwise their means are read.
        seed: random seed for the draws.
        num_classes: number of classes, where there are labels.
    """

    def __init__(
        self,
        cache: LatentCache,
        scale: LatentScale,
        labels: Sequence[int] | Tensor | None = None,
        *,
        sample: bool = True,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        self.cache, self.scale, self.seed, self.num_classes = cache, scale, seed, num_classes
        self.sample = sample and cache.std is not None
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device="cpu")
        if self.labels is not None and len(self.labels) != len(cache.mean):
            raise ValueError(f"there are {len(self.labels)} labels for {len(cache.mean)} images' latents.")

    def __len__(self) -> int:
        return len(self.cache.mean)

    @property
    def read_alike(self) -> bool:
        return not self.sample and self.cache.mirrored_mean is None

    @property
    def fingerprint(self) -> str:
        return self.digest()

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.cache.mean.shape
        return channels, height, width

    @property
    def standard_deviation(self) -> float:
        """1, since the latents are normalised."""
        return 1.0

    @property
    def in_memory(self) -> Tensor | None:
        """(N, c, h, w) float32, all normalised latents; None where they are drawn.

        Made anew for who asks, since a bank or a device has its own copy and batches are read from the file.
        """
        return self.scale.normalize(self.cache.mean) if self.read_alike else None

    def digest(self, at_most: int = 256) -> str:
        content = hashlib.sha256(f"{sorted(self.cache.origin.items())} {self.sample} {self.scale}".encode())
        if self.labels is not None:
            content.update(raw_bytes(self.labels))
        return content.hexdigest()[:16]

    def manifest(self) -> dict[str, Any]:
        return {
            "num_images": len(self),
            "data_digest": self.digest(),
            "image_shape": list(self.shape),
            "latent_mean": list(self.scale.mean),
            "latent_std": list(self.scale.std),
        }

    def bank_in_file(
        self, path: Path, augmentation: Augmentation, process_shard: tuple[int, int] | None, quiet: bool
    ) -> ReferenceBank:
        raise ValueError("reference_device='disk' keeps images, not latents. Leave it out.")

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices, device="cpu")
        generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed}/{indices}").getrandbits(63))
        cache = self.cache
        mean, std = cache.mean[index], cache.std[index] if self.sample and cache.std is not None else None
        if cache.mirrored_mean is not None:
            flips = (torch.rand(len(index), generator=generator, device="cpu") < 0.5)[:, None, None, None]
            mean = torch.where(flips, cache.mirrored_mean[index], mean)
            if std is not None and cache.mirrored_std is not None:
                std = torch.where(flips, cache.mirrored_std[index], std)
        if std is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator, device="cpu")
        columns = {"images": self.scale.normalize(mean), "index": index}
        if self.labels is not None:
            columns["label"] = self.labels[index]
        return columns


def load_latents(
    images: IndexedImages,
    vae: ModelMixin,
    folder: Path,
    *,
    sample: bool = True,
    mirrored: bool = False,
    own: bool = False,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    quiet: bool = False,
) -> tuple[LatentColumn, ModelMixin, Path]:
    """The normalised latents of the images, encoded once into a file; the autoencoder that decodes them; and that file.

    Args:
        images: the images.
        vae: an autoencoder from `load_autoencoder`.
        folder: where the file is kept. It is named after its content: a run that is refused later has replaced nothing.
        sample: draw latents from their posteriors; otherwise their means are read.
        mirrored: whether training mirrors images.
        own: keep the autoencoder's own scale instead of normalising: for a network that was trained with it.
        batch_size, device, quiet: as for `encode_all`.
        seed: random seed for the draws.

    Raises:
        ValueError, OSError: as `encode_all`.
    """
    key = f"{digest_of_images(images)} {digest_of_autoencoder(vae)} {mirrored}"
    path = folder / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    cache = encode_all(images, vae, path, mirrored=mirrored, batch_size=batch_size, device=device, quiet=quiet)
    std = cache.std_of_draws if sample else cache.std_of_means
    scale = own_scale(vae) if own else choose_scale(vae, cache.mean_of_draws, std)
    column = LatentColumn(cache, scale, images.labels, sample=sample, seed=seed, num_classes=images.num_classes)
    return column, fold_normalization(vae, scale), path
