"""Autoencoders: found and refused, their posteriors, and a normalisation folded into them."""

import json
import math
import os

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, LDMPipeline
from safetensors.torch import load_file, save_file

from exact_networks import small_unet
from stf_diffusers.training.autoencoder import (
    LatentScale,
    encode,
    fold_normalization,
    full_precision_convolutions,
    load_autoencoder,
)
from tiny_autoencoders import CONFIGS, PER_CHANNEL, autoencoder, encoded, image_column, moments64, scale_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("inside", ["", "vae", "vqvae"])
def test_autoencoders_are_found_by_their_config(kind, inside, tmp_path):
    vae = autoencoder(kind)
    vae.half().save_pretrained(tmp_path / inside)
    loaded = load_autoencoder(str(tmp_path))
    assert type(loaded) is type(vae) and not loaded.training and loaded.dtype == torch.float32
    assert not any(weights.requires_grad for weights in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vae.float().parameters(), strict=True))


def test_a_pipeline_on_the_hub(tmp_path, monkeypatch):
    # As the Hub's client leaves what it has downloaded.
    snapshot = tmp_path / "models--owner--pipe" / "snapshots" / ("0" * 40)
    autoencoder().save_pretrained(snapshot / "vae")
    (tmp_path / "models--owner--pipe" / "refs").mkdir()
    (tmp_path / "models--owner--pipe" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert type(load_autoencoder("owner/pipe", str(tmp_path))) is diffusers.AutoencoderKL
    with pytest.raises(ValueError, match=r"vae='owner/other': there is no config.json of an autoencoder.*\(.+\)"):
        load_autoencoder("owner/other", str(tmp_path))


def video(path):
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))


def unet(path):
    small_unet(3, 8).save_pretrained(path)


def text_encoder(path):
    (path / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))


def pickled(path):
    autoencoder().save_pretrained(path, safe_serialization=False)


def without_a_weight(path):
    autoencoder().save_pretrained(path)
    weights = load_file(path / WEIGHTS)
    del weights["quant_conv.bias"]
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})


def of_other_shapes(path):
    autoencoder(block_out_channels=(16, 16)).save_pretrained(path)
    autoencoder().save_config(path)


def cut_short(path):
    autoencoder().save_pretrained(path)
    os.truncate(path / WEIGHTS, 1000)


def not_a_number(path):
    vae = autoencoder()
    vae.decoder.conv_out.bias[1] = torch.nan
    vae.save_pretrained(path)


REFUSED = [
    (video, "is of class AutoencoderKLWan, which is not an autoencoder of single images.*AutoencoderKL, Asymmetric"),
    (unet, "is of class UNet2DModel, which is not"),
    (text_encoder, "is of class CLIPTextModel, which is not"),
    (lambda path: None, "there is no config.json of an autoencoder"),
    (lambda path: (path / "config.json").write_text("{"), "there is no config.json.*not a valid JSON"),
    (lambda path: (path / "config.json").write_text("{}"), "has no _class_name"),
    (pickled, r"cannot be read as safetensors.*Pickled weights \(\.bin\) are not read"),
    (without_a_weight, "lacks quant_conv.bias"),
    (of_other_shapes, "cannot be read as safetensors"),
    (cut_short, "cannot be read as safetensors"),
    (not_a_number, "the weights are not finite"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_what_is_no_autoencoder_is_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)vae='{tmp_path}'.*{message}"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("kind", CONFIGS)
def test_encoding_is_that_of_float64(kind):
    vae, pixels = autoencoder(kind), image_column().images
    mean, std = encode(vae, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = encode(vae, pixels)
    expected_mean, expected_std = moments64(vae, pixels)
    assert mean.dtype == torch.float32 and (mean - expected_mean).abs().max() < 2e-5
    assert torch.equal(mean, in_autocast[0])
    assert (std is None) == (expected_std is None)
    if std is not None:
        assert torch.equal(std, in_autocast[1]) and (std / expected_std - 1).abs().max() < 2e-5
    with pytest.raises(TypeError, match="must be uint8"):
        encode(vae, pixels.float())


def test_precision_settings_come_back():
    before = [backend.fp32_precision for backend in (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)]
    with full_precision_convolutions():
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.mkldnn.conv.fp32_precision == "ieee"
    assert before == [backend.fp32_precision for backend in (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)]


MISFITS = [
    (dict(mode="L"), "the images have 1 channels and the autoencoder takes 3. Pass image_mode='RGB'"),
    (dict(mode="RGBA"), "the images have 4 channels and the autoencoder takes 3. Pass image_mode='RGB'"),
    (dict(size=9), "resolution 9 is not a multiple of 2, .* Pass resolution=8 or resolution=10"),
    (dict(size=1), "resolution 1 is not a multiple of 2, .* Pass resolution=2"),
]


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
@pytest.mark.parametrize("data, message", MISFITS)
def test_images_that_do_not_fit(kind, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        encoded(image_column(4, **data), autoencoder(kind), tmp_path / "latents")
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_that_gives_back_another_size(tmp_path):
    vae = autoencoder("AutoencoderTiny", num_encoder_blocks=(1,), encoder_block_out_channels=(8,))
    with pytest.raises(ValueError, match="does not give back what it takes"):
        encoded(image_column(4), vae, tmp_path / "latents")


def encoded_scale(vae, images, tmp_path):
    cache = encoded(images, vae, tmp_path / "latents")
    return cache, scale_of(vae, cache, True)


WITHOUT_CONVOLUTIONS = dict(use_quant_conv=False, use_post_quant_conv=False)


@pytest.mark.parametrize(
    "kind, config", [*((kind, {}) for kind in PER_CHANNEL), ("AutoencoderKL", WITHOUT_CONVOLUTIONS)]
)
def test_folded_autoencoders_speak_of_normalised_latents(kind, config, tmp_path):
    vae, images = autoencoder(kind, **config), image_column()
    _, scale = encoded_scale(vae, images, tmp_path)
    before = {name: weights.clone() for name, weights in vae.state_dict().items()}
    folded = fold_normalization(vae, scale)
    assert all(torch.equal(weights, before[name]) for name, weights in vae.state_dict().items())
    folded.save_pretrained(tmp_path / "folded")
    reloaded = load_autoencoder(str(tmp_path / "folded"))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (scale.mean, scale.std))
    raw_mean, raw_std = moments64(vae, images.images)
    normalised = ((raw_mean - mean) / std).float()
    expected = vae.decode(raw_mean.float()).sample
    for copy in (folded, reloaded):
        assert copy.config.scaling_factor == 1.0
        assert not copy.config.get("shift_factor") and copy.config.get("latents_mean") is None
        decoded = copy.decode(normalised).sample
        assert (decoded - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
        found_mean, found_std = encode(copy, images.images)
        assert (found_mean - normalised).abs().max() < 2e-5
        assert (found_std * std / raw_std - 1).abs().max() < 2e-5
    # Without the folding these would be other images.
    assert (vae.decode(normalised).sample - expected).abs().max() > 1e-2
    assert vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in PER_CHANNEL])
def test_other_autoencoders_have_one_factor(kind, tmp_path):
    vae, images = autoencoder(kind), image_column()
    _, scale = encoded_scale(vae, images, tmp_path)
    fold_normalization(vae, scale).save_pretrained(tmp_path / "folded")
    reloaded = load_autoencoder(str(tmp_path / "folded"))
    mean, _ = encode(vae, images.images)
    expected = vae.decode(mean).sample
    found = reloaded.decode(scale.normalize(mean) / reloaded.config.scaling_factor).sample
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)
    assert torch.equal(encode(reloaded, images.images)[0], mean)
    with pytest.raises(ValueError, match="takes one standard deviation for all channels"):
        fold_normalization(vae, LatentScale(scale.mean, (*scale.std[1:], 2.0)))
    with pytest.raises(ValueError, match="takes one standard deviation for all channels, and no shift"):
        fold_normalization(vae, LatentScale((1.0, *scale.mean[1:]), scale.std))


def test_scales_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"channels \[1\] have standard deviation \[0\.0\]"):
        LatentScale((0.0, 0.0), (1.0, 0.0))
    with pytest.raises(ValueError, match="one for each channel"):
        LatentScale((0.0,), (1.0, 1.0))
    with pytest.raises(ValueError, match="must be finite"):
        LatentScale((math.nan,), (1.0,))
    with pytest.raises(ValueError, match="the scale has 2 channels and the autoencoder's latents 4"):
        fold_normalization(autoencoder(), LatentScale((0.0, 0.0), (1.0, 1.0)))


def predicting(net, latents):
    """Have the network predict the noise that leads from anything to `latents` (n, c, h, w) at any timestep."""
    alphas = DDPMScheduler().alphas_cumprod

    def forward(sample, timestep, *args, **kwargs):
        alpha = alphas[int(timestep if torch.as_tensor(timestep).ndim == 0 else timestep[0])]
        noise = (sample - alpha.sqrt() * latents.repeat(len(sample) // len(latents), 1, 1, 1)) / (1 - alpha).sqrt()
        return type("Output", (tuple,), {"sample": noise})((noise,))

    net.forward = forward
    return net


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_pipelines_decode_with_it(kind, tmp_path):
    vae, images = autoencoder(kind), image_column()
    cache, scale = encoded_scale(vae, images, tmp_path)
    pipeline = LDMPipeline(
        fold_normalization(vae, scale), small_unet(cache.mean.shape[1], 4), DDIMScheduler(clip_sample=False)
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=True)
    assert type(pipeline) is LDMPipeline
    pipeline.set_progress_bar_config(disable=True)
    predicting(pipeline.unet, scale.normalize(cache.mean[5:7]))
    found = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    expected = (vae.decode(cache.mean[5:7]).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 1e-2
    assert np.abs(found - expected).max() < 1e-3
    if kind == "AutoencoderKL":
        network = DiTTransformer2DModel(2, 8, 4, 4, num_layers=1, sample_size=4, norm_num_groups=4)
        dit = DiTPipeline(
            predicting(network, scale.normalize(cache.mean[5:7])), pipeline.vqvae, DDIMScheduler(clip_sample=False)
        )
        dit.set_progress_bar_config(disable=True)
        found = dit([0, 1], num_inference_steps=3, guidance_scale=1.0, output_type="np").images
        assert np.abs(found - expected).max() < 1e-3
