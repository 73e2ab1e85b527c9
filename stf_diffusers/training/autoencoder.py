"""Diffusers' autoencoders: loading and checking them, encoding images, folding a scale of the latents into them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn

from ..posterior import pixels_to_float
from ..precision import full_precision

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


def load_autoencoder(vae: str, cache_dir: str | None = None) -> ModelMixin:
    """A Diffusers autoencoder of images, in float32, for inference.

    Args:
        vae: a folder or Hub repository that holds an autoencoder, or a pipeline with one as `vae` or `vqvae`.
            Only safetensors are read.
        cache_dir: folder for downloads.

    Raises:
        ValueError: there is none, it is of another kind, or its weights are missing, damaged or not finite.
    """
    source, subfolder, kind = find_autoencoder(vae, cache_dir)
    if kind not in IMAGE_AUTOENCODERS:
        raise ValueError(
            f"vae={vae!r} is of class {kind}, which is not an autoencoder of single images that Diffusers' latent "
            f"pipelines decode with. Pass one of {', '.join(IMAGE_AUTOENCODERS)}."
        )
    try:
        autoencoder, loaded = getattr(diffusers, kind).from_pretrained(
            source,
            subfolder=subfolder,
            cache_dir=cache_dir,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    # Missing files, damaged ones and wrong shapes each raise another error; all of them have to name the autoencoder.
    except Exception as error:
        raise ValueError(
            f"vae={vae!r}: its weights cannot be read as safetensors: {error} Pickled weights (.bin) are not read: load "
            "and save_pretrained them once where you trust them."
        ) from error
    # Diffusers would leave these on the meta device.
    if loaded["missing_keys"]:
        raise ValueError(f"vae={vae!r}: the file of weights lacks {', '.join(loaded['missing_keys'][:8])}.")
    if not all(bool(weights.isfinite().all()) for weights in autoencoder.state_dict().values()):
        raise ValueError(f"vae={vae!r}: the weights are not finite. Choose another autoencoder.")
    frozen: ModelMixin = autoencoder.eval().requires_grad_(False)
    return frozen


def check_same_autoencoder(vae: ModelMixin, pretrained_model_name_or_path: str, cache_dir: str | None = None) -> None:
    """Raise ValueError unless a pipeline that is trained further has this autoencoder, whose latents its network knows."""
    own = load_autoencoder(pretrained_model_name_or_path, cache_dir)
    if digest_of_autoencoder(own) != digest_of_autoencoder(vae):
        raise ValueError(
            "vae= is not the autoencoder of the pretrained pipeline, whose latents the network knows, with their scale "
            f"folded in. Pass vae={pretrained_model_name_or_path!r}."
        )


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
        f"vae={name!r}: there is no config.json of an autoencoder, and none in a subfolder vae or vqvae"
        + (f" ({problems[0]})" if problems else "")
        + ". Pass the folder or the Hub name of a Diffusers autoencoder, or of a pipeline that has one."
    )


@contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """Float32 convolutions in IEEE float32, whatever the caller's settings, which are restored afterwards."""
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


def check_fit(vae: ModelMixin, pixels: Tensor) -> tuple[tuple[int, int, int], bool]:
    """Check that an autoencoder takes these images, and decodes to images of the same shape.

    Args:
        vae: an autoencoder from `load_autoencoder`.
        pixels: (B, C, H, W) uint8, one image or more.

    Returns:
        ((c, h, w) of the latents, whether they have a standard deviation).

    Raises:
        ValueError: the autoencoder takes images with other channels or of other sizes.
    """
    _, channels, resolution, width = pixels.shape
    if resolution != width:
        raise ValueError(
            f"the images are {resolution}x{width}. Diffusers' latent pipelines only make square images: pass one side "
            "as resolution=, or leave vae= out."
        )
    takes = vae.config.in_channels
    if takes != channels:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(takes)
        fix = f"Pass image_mode={mode!r}, or another vae=." if mode else "Pass another vae=."
        raise ValueError(f"the images have {channels} channels and the autoencoder takes {takes}. {fix}")
    device = next(vae.parameters()).device
    latent_channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    with torch.inference_mode():
        decoded = vae.decode(torch.zeros(1, latent_channels, 2, 2, device=device)).sample
    factor = decoded.shape[-1] // 2
    if resolution % factor:
        below = resolution // factor * factor
        sizes = " or ".join(f"resolution={size}" for size in (below, below + factor) if size)
        raise ValueError(
            f"the images' resolution {resolution} is not a multiple of {factor}, by which the autoencoder shrinks "
            f"them. Pass {sizes}."
        )
    mean, std = encode(vae, pixels[:1])
    expected = (latent_channels, resolution // factor, resolution // factor)
    if tuple(mean.shape[1:]) != expected or decoded.shape[1] != channels:
        raise ValueError(
            f"the autoencoder encodes images {tuple(pixels.shape[1:])} to {tuple(mean.shape[1:])} and decodes {expected} "
            f"to {(decoded.shape[1], resolution, resolution)}: it does not give back what it takes. Pass another vae=."
        )
    return expected, std is not None


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
                "images. Pass more images, or another vae=."
            )

    def normalize(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std of each channel of (..., c, h, w)."""
        mean, std = (latents.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (latents - mean) / std


def choose_scale(vae: ModelMixin, mean: Sequence[float], std: Sequence[float]) -> LatentScale:
    """The scale that gives latents zero mean and unit variance: for each channel where `fold_normalization` can fold that
    into this autoencoder, otherwise one standard deviation for all channels and no shift.

    Args:
        vae: the autoencoder.
        mean, std: those of each channel's latents, as training reads them.
    """
    if IMAGE_AUTOENCODERS[type(vae).__name__]:
        return LatentScale(tuple(mean), tuple(std))
    channels = len(std)
    grand = sum(mean) / channels
    square = sum(s * s + (m - grand) ** 2 for m, s in zip(mean, std, strict=True)) / channels
    return LatentScale((0.0,) * channels, (math.sqrt(square),) * channels)


def own_scale(vae: ModelMixin) -> LatentScale:
    """The scale at which a pipeline's network sees its autoencoder's latents: the config's `scaling_factor`."""
    channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
    return LatentScale((0.0,) * channels, (1 / (vae.config.get("scaling_factor") or 1.0),) * channels)


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
    mean, std = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (scale.mean, scale.std))
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
        found = nn.Conv2d(channels, channels, 1, device="cpu")
        found.to(next(vae.parameters())).requires_grad_(False)
        set_affine(
            found,
            torch.eye(channels, dtype=torch.float64, device="cpu"),
            torch.zeros(channels, dtype=torch.float64, device="cpu"),
        )
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


def digest_of_autoencoder(vae: ModelMixin) -> str:
    """Digest of an autoencoder's class, config and weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    content = hashlib.sha256(f"{type(vae).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, weights in sorted(vae.state_dict().items()):
        content.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        content.update(weights.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]
