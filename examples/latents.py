"""The latents of a training script's images: encoded once into a file, normalised, drawn by lists of indices."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import random
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from checkpoints import sync
from image_data import ImageColumn
from stf_diffusers.posterior import full_precision, pixels_to_float

logger = logging.getLogger("train_unconditional_stf")

# Diffusers' autoencoders of single images whose config has the `scaling_factor` by which its pipelines divide, and
# whether 1x1 convolutions on both sides of the latents can take a shift and a scale for each channel.
IMAGE_AUTOENCODERS = {
    "AutoencoderKL": True,
    "AsymmetricAutoencoderKL": True,
    "AutoencoderKLHunyuanImage": False,
    "AutoencoderTiny": False,
    "AutoencoderDC": False,
    # Its codebook's distances, and with them its images, would not survive a scale for each channel.
    "VQModel": False,
}


# ---- the autoencoder


def load_autoencoder(name: str, cache_dir: str | None = None) -> ModelMixin:
    """A Diffusers autoencoder of images, in float32, for inference.

    Args:
        name: a folder or a repository on the Hub: of an autoencoder, or of a pipeline that has one as `vae` or `vqvae`.
            Only safetensors are read.
        cache_dir: for downloads.

    Raises:
        ValueError: there is none, it is of another kind, or its weights are missing, damaged or not finite.
    """
    source, subfolder, kind = find_autoencoder(name, cache_dir)
    if kind not in IMAGE_AUTOENCODERS:
        raise ValueError(
            f"--vae {name} is of class {kind}, which is not an autoencoder of single images that Diffusers' latent "
            f"pipelines decode with. Pass one of {', '.join(IMAGE_AUTOENCODERS)}."
        )
    try:
        vae, loaded = getattr(diffusers, kind).from_pretrained(
            source,
            subfolder=subfolder,
            cache_dir=cache_dir,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    # Missing files, damaged ones and wrong shapes each raise another error; all of them have to name the flag.
    except Exception as error:
        raise ValueError(
            f"--vae {name}: its weights cannot be read as safetensors: {error} Pickled weights (.bin) are not read: load "
            "and save_pretrained them once where you trust them."
        ) from error
    # Diffusers would leave these on the meta device.
    if loaded["missing_keys"]:
        raise ValueError(f"--vae {name}: the file of weights lacks {', '.join(loaded['missing_keys'][:8])}.")
    if not all(bool(weights.isfinite().all()) for weights in vae.state_dict().values()):
        raise ValueError(f"--vae {name}: the weights are not finite. Choose another autoencoder.")
    frozen: ModelMixin = vae.eval().requires_grad_(False)
    return frozen


def find_autoencoder(name: str, cache_dir: str | None) -> tuple[str, str | None, str]:
    """(what to load from, its subfolder or None, the class's name) of the autoencoder called `name`.

    Raises:
        ValueError: neither `name` nor its `vae` or `vqvae` has a readable config.
    """
    local = Path(name).is_dir()
    problems = []
    for subfolder in (None, "vae", "vqvae"):
        # Diffusers reads a folder's own config before that of a subfolder, so that local ones are named in full.
        source = str(Path(name, subfolder or ".")) if local else name
        within = None if local else subfolder
        if local and not Path(source, "config.json").is_file():
            continue
        try:
            config = AutoencoderKL.load_config(source, subfolder=within, cache_dir=cache_dir)
        # The client's errors are many, and a repository without this file may have that of the next subfolder.
        except Exception as error:
            problems.append(str(error).splitlines()[0] if str(error) else repr(error))
            continue
        kind = config.get("_class_name")
        if kind is None:
            kind = ", ".join(config.get("architectures") or ["unknown: its config has no _class_name"])
        return source, within, kind
    raise ValueError(
        f"--vae {name}: there is no config.json of an autoencoder, and none in a subfolder vae or vqvae"
        + (f" ({problems[0]})" if problems else "")
        + ". Pass the folder or the Hub name of a Diffusers autoencoder, or of a pipeline that has one."
    )


@contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """Float32 convolutions in IEEE float32, whatever the caller's settings, which come back after."""
    backends: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    previous = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, previous, strict=True):
            # "none" inherits from the general setting; what was inherited must go on following it.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


@torch.inference_mode()
def encode(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The posteriors of images' latents as the autoencoder gives them, neither scaled nor shifted.

    Args:
        vae: a float32 autoencoder of `IMAGE_AUTOENCODERS`.
        pixels: (B, C, H, W) uint8, on any device.

    Returns:
        float32 means (B, c, h, w) and standard deviations (B, c, h, w), on the autoencoder's device; None for the latter
        where the latents are a function of the image.

    Raises:
        TypeError: pixels that are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, which are read as x / 127.5 - 1; got {pixels.dtype}.")
    device = next(vae.parameters()).device
    with full_precision(device.type), full_precision_convolutions():
        output = vae.encode(pixels_to_float(pixels.to(device)))
    if "latent_dist" in output:
        return output.latent_dist.mean.float(), output.latent_dist.std.float()
    # Called latents or latent, as the class has it; it is the only entry.
    return output[0].float(), None


def check_fit(vae: ModelMixin, images: ImageColumn) -> tuple[tuple[int, int, int], bool]:
    """((c, h, w) of the latents of `images`, whether they have a standard deviation).

    Raises:
        ValueError: the autoencoder takes images of other channels or of other sizes.
    """
    channels, resolution, _ = images.shape
    takes = vae.config.in_channels
    if takes != channels:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(takes)
        fix = f"Pass --image_mode {mode}, or another --vae." if mode else "Pass another --vae."
        raise ValueError(f"the images have {channels} channels and the autoencoder takes {takes}. {fix}")
    device = next(vae.parameters()).device
    latent_channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    with torch.inference_mode():
        decoded = vae.decode(torch.zeros(1, latent_channels, 2, 2, device=device)).sample
    factor = decoded.shape[-1] // 2
    if resolution % factor:
        below = resolution // factor * factor
        sizes = " or ".join(str(size) for size in (below, below + factor) if size)
        raise ValueError(
            f"the images' resolution {resolution} is not a multiple of {factor}, by which the autoencoder shrinks "
            f"them. Pass --resolution {sizes}."
        )
    mean, std = encode(vae, images.__getitems__([0])["images"])
    expected = (latent_channels, resolution // factor, resolution // factor)
    if tuple(mean.shape[1:]) != expected or decoded.shape[1] != channels:
        raise ValueError(
            f"the autoencoder encodes images {images.shape} to {tuple(mean.shape[1:])} and decodes {expected} to "
            f"{(decoded.shape[1], resolution, resolution)}: it does not give back what it takes. Pass another --vae."
        )
    return expected, std is not None


# ---- normalisation


@dataclass(frozen=True)
class LatentScale:
    """What is subtracted from each channel of the latents, and what it is then divided by, for training."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean and std must be finite, one for each channel; got {self.mean} and {self.std}.")
        dead = [channel for channel, std in enumerate(self.std) if not 0 < std < math.inf]
        if dead:
            raise ValueError(
                f"the latents' channels {dead} have standard deviation {[self.std[channel] for channel in dead]} over the "
                "images. Pass more images, or another --vae."
            )

    def normalize(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std of each channel of (..., c, h, w)."""
        mean, std = (latents.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (latents - mean) / std


def choose_scale(vae: ModelMixin, cache: LatentCache, sample: bool) -> LatentScale:
    """The scale that gives the latents zero mean and unit variance: per channel where `fold_normalization` can fold that
    into this autoencoder, otherwise one standard deviation for all channels and no shift.

    Args:
        vae: the autoencoder.
        cache: of the images.
        sample: whether training draws from the posteriors, or reads their means.
    """
    std = cache.std_of_draws if sample else cache.std_of_means
    if IMAGE_AUTOENCODERS[type(vae).__name__]:
        return LatentScale(cache.mean_of_draws, std)
    channels = len(std)
    grand = sum(cache.mean_of_draws) / channels
    square = sum(s * s + (m - grand) ** 2 for m, s in zip(cache.mean_of_draws, std, strict=True)) / channels
    return LatentScale((0.0,) * channels, (math.sqrt(square),) * channels)


@torch.no_grad()
def fold_normalization(vae: ModelMixin, scale: LatentScale) -> ModelMixin:
    """A copy of the autoencoder for normalised latents, with which Diffusers' pipelines need to know nothing of the scale.

    Pipelines decode ``latents / config.scaling_factor``. A scale for each channel goes into the 1x1 convolutions next to
    the latents, identities where an AutoencoderKL has none, and the factor is 1: encode and decode both speak of
    normalised latents (except that Diffusers' clamp of the log-variance to [-30, 20] then acts on theirs). For other
    autoencoders the factor is 1 / std, and encode and decode are what they were.

    Raises:
        ValueError: the scale has other channels, or is not one number where the autoencoder has no such convolutions.
    """
    folded = copy.deepcopy(vae)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (scale.mean, scale.std))
    channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    if len(mean) != channels:
        raise ValueError(f"the scale has {len(mean)} channels and the autoencoder's latents {channels}.")
    if IMAGE_AUTOENCODERS[type(vae).__name__]:
        one = torch.ones_like(std)
        decoding = convolution_or_identity(folded, "post_quant_conv", channels)
        encoding = convolution_or_identity(folded, "quant_conv", 2 * channels)
        weight, bias = affine(decoding)
        set_affine(decoding, weight * std, bias + weight @ mean)
        weight, bias = affine(encoding)
        scales, shifts = torch.cat([std, one]), torch.cat([-mean / std, -2 * std.log()])
        set_affine(encoding, weight / scales[:, None], bias / scales + shifts)
        factor = 1.0
    else:
        if len(set(scale.std)) != 1 or any(scale.mean):
            raise ValueError(
                f"{type(vae).__name__} takes one standard deviation for all channels, and no shift; got {scale}."
            )
        factor = 1 / scale.std[0]
    neutral = {"shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    known = {name: value for name, value in neutral.items() if folded.config.get(name) is not None}
    folded.register_to_config(scaling_factor=factor, **known)
    return folded


def convolution_or_identity(vae: ModelMixin, name: str, channels: int) -> nn.Conv2d:
    """The 1x1 convolution of this name; where the autoencoder has none, one that changes nothing is put there."""
    found = getattr(vae, name)
    if found is None:
        found = nn.Conv2d(channels, channels, 1)
        found.to(next(vae.parameters())).requires_grad_(False)
        set_affine(found, torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))
        setattr(vae, name, found)
        vae.register_to_config(**{f"use_{name}": True})
    convolution: nn.Conv2d = found
    return convolution


def affine(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Matrix (out, in) and bias (out,) of a 1x1 convolution, float64 on the CPU."""
    weight = convolution.weight.detach()[:, :, 0, 0].to("cpu", torch.float64)
    assert convolution.bias is not None
    return weight, convolution.bias.detach().to("cpu", torch.float64)


def set_affine(convolution: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Have a 1x1 convolution compute ``weight @ z + bias``."""
    assert convolution.bias is not None
    convolution.weight.copy_(weight[:, :, None, None])
    convolution.bias.copy_(bias)


# ---- the file


@dataclass(frozen=True)
class LatentCache:
    """The posteriors of the latents of N images, as `encode` gives them: views of a file.

    Args:
        path: of the file.
        mean, std: (N, c, h, w) float32; std is None where the latents are functions of the images.
        mirrored_mean, mirrored_std: the same of the mirrored images, whose latents are not mirrored latents; None where
            training does not mirror.
        origin: what the file was made of: digests of the images and of the autoencoder, and whether mirrored.
        mean_of_draws, std_of_draws, std_of_means: of each channel's values over all images (and their mirrors, where
            there are): of latents drawn from the posteriors, and of the posteriors' means alone.
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
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
            origin, checksums = json.loads(metadata["origin"]), json.loads(metadata["crc32"])
            moments = {name: tuple(json.loads(metadata[name])) for name in ("mean", "std", "std_of_means")}
            for name, checksum in checksums.items():
                if zlib.crc32(raw_bytes(tensors[name])) != checksum:
                    raise ValueError(f"the checksum of {name} differs")
            columns = {name: tensors.get(name) for name in ("std", "mirrored_mean", "mirrored_std")}
            mean = tensors["mean"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or is not a file of latents: {error}.") from error
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
    images: ImageColumn,
    vae: ModelMixin,
    path: Path,
    *,
    mirrored: bool,
    batch_size: int,
    device: torch.device | str,
    quiet: bool,
) -> LatentCache:
    """The latents of all images, from the file where it holds them, otherwise encoded into it once.

    Of several processes one has to come first, within `accelerator.main_process_first()`; the others find its file.

    Args:
        images: (C, R, R) uint8, the same each time they are read.
        vae: of `load_autoencoder`; moved to `device` when it has to encode.
        path: of the file, safetensors. Written aside and renamed when it is complete and on the disk.
        mirrored: whether to encode the mirrored images too.
        batch_size: images encoded at a time.
        device: where to encode.
        quiet: no progress bar.

    Raises:
        ValueError: images that are cropped at random or do not fit the autoencoder, or latents that are not finite.
        OSError: the file cannot be written; says how much room it needs.
    """
    if images.crops_at_random:
        raise ValueError(
            "latents are encoded once, and the images are not square and cropped at random, so that each has many. Pass "
            "--center_crop."
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
            logger.warning("%s was made of other: %s. The images are encoded anew.", path, ", ".join(different))
    vae.to(device)
    write_latents(images, vae, path, origin, mirrored, batch_size, quiet)
    return LatentCache.open(path)


def digest_of_images(images: ImageColumn) -> str:
    """What tells these images from others. Where they are decoded as they are read their own digest is of a few of them,
    and Datasets' fingerprint stands for the others.
    """
    if images.images is not None:
        return images.digest()
    return f"{images.digest()}/{images.dataset._fingerprint}/{images.column}/{images.reader}"


def digest_of_autoencoder(vae: ModelMixin) -> str:
    """Of class, config and weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    content = hashlib.sha256(f"{type(vae).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, weights in sorted(vae.state_dict().items()):
        content.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        content.update(raw_bytes(weights.cpu()))
    return content.hexdigest()[:16]


def write_latents(
    images: ImageColumn,
    vae: ModelMixin,
    path: Path,
    origin: dict[str, str],
    mirrored: bool,
    batch_size: int,
    quiet: bool,
) -> None:
    """Encode all images batch by batch into a file beside `path`, which replaces it when complete."""
    shape, stochastic = check_fit(vae, images)
    parts = ("mean", "std") if stochastic else ("mean",)
    names = [prefix + part for prefix in (("", "mirrored_") if mirrored else ("",)) for part in parts]
    row_bytes = 4 * math.prod(shape)
    offsets = {name: k * len(images) * row_bytes for k, name in enumerate(names)}
    header: dict[str, Any] = {
        name: {
            "dtype": "F32",
            "shape": [len(images), *shape],
            "data_offsets": [offset, offset + len(images) * row_bytes],
        }
        for name, offset in offsets.items()
    }
    # Room for what is only known at the end: three numbers for each channel and the checksums.
    reserved = 8 * (512 + 16 * shape[0])
    checksums = dict.fromkeys(names, 0)
    totals = Moments.zero(shape[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another run may be writing the same file.
    descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    aside = Path(name)
    try:
        with (
            open(descriptor, "wb") as file,
            tqdm(total=len(images), desc="Encoding images", unit="image", disable=quiet) as progress,
        ):
            for start in range(0, len(images), batch_size):
                rows = list(range(start, min(start + batch_size, len(images))))
                pixels = images.__getitems__(rows)["images"]
                for prefix in ("", "mirrored_") if mirrored else ("",):
                    mean, std = encode(vae, pixels.flip(-1) if prefix else pixels)
                    wrong = ~(mean if std is None else mean + std).flatten(1).isfinite().all(1)
                    if bool(wrong.any()):
                        bad = [rows[i] for i in wrong.nonzero().flatten().tolist()][:8]
                        raise ValueError(f"the latents of images {bad} are not finite. Pass another --vae.")
                    totals.add(mean, std)
                    for part, values in (("mean", mean), ("std", std)):
                        if values is not None:
                            data = raw_bytes(values.cpu())
                            checksums[prefix + part] = zlib.crc32(data, checksums[prefix + part])
                            file.seek(8 + reserved + offsets[prefix + part] + start * row_bytes)
                            file.write(data)
                progress.update(len(rows))
            header["__metadata__"] = {
                "origin": json.dumps(origin),
                "crc32": json.dumps(checksums),
                **{name: json.dumps(values) for name, values in totals.result().items()},
            }
            file.seek(0)
            file.write(reserved.to_bytes(8, "little") + json.dumps(header).encode().ljust(reserved))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        size = len(names) * len(images) * row_bytes / 2**20
        raise OSError(
            f"the latents cannot be written to {path}, for which {size:.1f} MiB are needed: {error}"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


@dataclass
class Moments:
    """Sums over all posteriors and pixels, of each channel: (c,) float64."""

    count: int
    values: Tensor
    squares: Tensor
    variances: Tensor

    @classmethod
    def zero(cls, channels: int) -> Moments:
        return cls(0, *torch.zeros(3, channels, dtype=torch.float64))

    def add(self, mean: Tensor, std: Tensor | None) -> None:
        """Add posteriors (B, c, h, w)."""
        mean = mean.to("cpu", torch.float64)
        self.count += mean.numel() // mean.shape[1]
        self.values += mean.sum((0, 2, 3))
        self.squares += mean.square().sum((0, 2, 3))
        if std is not None:
            self.variances += std.to("cpu", torch.float64).square().sum((0, 2, 3))

    def result(self) -> dict[str, list[float]]:
        """Of each channel: the mean, the standard deviation of draws, and that of the posteriors' means."""
        mean = self.values / self.count
        between = (self.squares / self.count - mean.square()).clamp_min(0)
        total = between + self.variances / self.count
        return {"mean": mean.tolist(), "std": total.sqrt().tolist(), "std_of_means": between.sqrt().tolist()}


def raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


# ---- what training reads


class LatentColumn(torch.utils.data.Dataset):
    """Normalised latents and labels by lists of indices, in place of an `ImageColumn`.

    Each reading of a list draws its latents from their posteriors, and with mirrored latents each from the image's or its
    mirror's, all as a function of `seed` and the list: a run that is resumed reads what it would have read. Sources and
    references are in one list, so that a source is among its references as it was drawn. (A list of the same indices in
    the same order is drawn the same again, which batches of a single image without references always are.)

    Args:
        cache: the latents.
        scale: of `choose_scale`, with the same `sample`.
        labels: N classes.
        sample: draw from the posteriors; otherwise their means are read.
        seed: of the draws.
    """

    crops_at_random = False

    def __init__(
        self,
        cache: LatentCache,
        scale: LatentScale,
        labels: Sequence[int] | Tensor | None = None,
        *,
        sample: bool = True,
        seed: int = 0,
    ) -> None:
        self.cache, self.scale, self.seed = cache, scale, seed
        self.sample = sample and cache.std is not None
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if self.labels is not None and len(self.labels) != len(cache.mean):
            raise ValueError(f"there are {len(self.labels)} labels for {len(cache.mean)} images' latents.")

    def __len__(self) -> int:
        return len(self.cache.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of each image's latents."""
        _, channels, height, width = self.cache.mean.shape
        return channels, height, width

    @cached_property
    def images(self) -> Tensor | None:
        """(N, c, h, w) float32, all normalised latents, in memory; None where they are drawn."""
        if self.sample or self.cache.mirrored_mean is not None:
            return None
        return self.scale.normalize(self.cache.mean)

    def digest(self) -> str:
        """What tells these latents and labels from others."""
        content = hashlib.sha256(f"{sorted(self.cache.origin.items())} {self.sample} {self.scale}".encode())
        if self.labels is not None:
            content.update(raw_bytes(self.labels))
        return content.hexdigest()[:16]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """{"images": (n, c, h, w) float32, "index": (n,), "label": (n,) where there are labels}."""
        index = torch.tensor(indices)
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{indices}").getrandbits(63))
        cache = self.cache
        mean, std = cache.mean[index], cache.std[index] if self.sample and cache.std is not None else None
        if cache.mirrored_mean is not None:
            flips = (torch.rand(len(index), generator=generator) < 0.5)[:, None, None, None]
            mean = torch.where(flips, cache.mirrored_mean[index], mean)
            if std is not None and cache.mirrored_std is not None:
                std = torch.where(flips, cache.mirrored_std[index], std)
        if std is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator)
        columns = {"images": self.scale.normalize(mean), "index": index}
        if self.labels is not None:
            columns["label"] = self.labels[index]
        return columns
