"""Tiny autoencoders of every class that is supported, images for them, and their posteriors in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from stf_diffusers.training.autoencoder import LatentScale, choose_scale
from stf_diffusers.training.image_data import ImageColumn
from stf_diffusers.training.image_reader import ImageReader, decode_all
from stf_diffusers.training.latents import LatentCache, encode_all

BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": dict(**BLOCKS, block_out_channels=(8, 8), shift_factor=0.3, latents_mean=[1.0] * 4),
    "AsymmetricAutoencoderKL": dict(**BLOCKS, down_block_out_channels=(8, 8), up_block_out_channels=(8, 8)),
    "AutoencoderTiny": dict(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "VQModel": dict(**BLOCKS, block_out_channels=(8, 8), vq_embed_dim=5, num_vq_embeddings=16),
    "AutoencoderDC": dict(
        latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    ),
    "AutoencoderKLHunyuanImage": dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16,
    ),
}  # fmt: skip
PER_CHANNEL = ("AutoencoderKL", "AsymmetricAutoencoderKL")


def autoencoder(kind: str = "AutoencoderKL", seed: int = 0, **config: Any) -> ModelMixin:
    """A tiny one of factor 2 whose latents' channels differ in mean and standard deviation."""
    torch.manual_seed(seed)
    vae = getattr(diffusers, kind).from_config({**CONFIGS[kind], **config}).eval().requires_grad_(False)
    with torch.no_grad():
        if getattr(vae, "quant_conv", None) is not None:
            channels = vae.quant_conv.out_channels
            vae.quant_conv.weight.mul_(torch.linspace(1, 6, channels)[:, None, None, None])
            vae.quant_conv.bias.copy_(torch.linspace(-2, 2, channels))
            if kind in PER_CHANNEL:
                vae.quant_conv.bias[channels // 2 :] = torch.linspace(-6, 0, channels // 2)
        if kind == "VQModel":
            vae.quantize.embedding.weight.normal_(0, 2)
    return vae


def image_column(
    count: int = 24, size: int = 8, mode: str = "RGB", change: int | None = None, decoded: bool = True
) -> ImageColumn:
    shape = (count, size, size, len(mode)) if len(mode) > 1 else (count, size, size)
    pixels = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    # Images that differ in brightness, so that the means of the latents do too.
    pixels = (pixels * np.linspace(0.2, 1, count).reshape(-1, *[1] * (len(shape) - 1))).astype(np.uint8)
    if change is not None:
        pixels[change].flat[0] ^= 1
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]}, features=features)
    reader = ImageReader(mode, size, False)
    return ImageColumn(
        data, "image", reader, None, decode_all(data, "image", reader, math.inf, True) if decoded else None
    )


def encoded(
    images: ImageColumn, vae: ModelMixin, path: Path, mirrored: bool = False, batch_size: int = 7
) -> LatentCache:
    return encode_all(images, vae, path, mirrored=mirrored, batch_size=batch_size, device="cpu", quiet=True)


def moments64(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the posteriors by the network's parts in float64."""
    double = type(vae).from_config(vae.config)
    double.load_state_dict(vae.state_dict())
    double = double.double().eval()
    with torch.no_grad():
        out = double.encoder(pixels.double() / 127.5 - 1)
        if getattr(double, "quant_conv", None) is not None:
            out = double.quant_conv(out)
    if "KL" not in type(vae).__name__:
        return out, None
    mean, logvar = out.chunk(2, 1)
    return mean, (logvar.clamp(-30, 20) / 2).exp()


def scale_of(vae: ModelMixin, cache: LatentCache, sample: bool) -> LatentScale:
    """The scale for a cache's latents, drawn from their posteriors or not."""
    return choose_scale(vae, cache.mean_of_draws, cache.std_of_draws if sample else cache.std_of_means)
