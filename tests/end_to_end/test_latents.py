"""Latents of images: autoencoders found and refused, the file, its law, the folded normalisation, the draws."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap

import datasets
import diffusers
import huggingface_hub
import latents
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, LDMPipeline
from image_data import ImageColumn, ImageReader, decode_all
from latents import (
    LatentCache,
    LatentColumn,
    LatentScale,
    choose_scale,
    encode,
    encode_all,
    fold_normalization,
    load_autoencoder,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import EXAMPLES
from test_export import small_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)
CONFIGS = {
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


def autoencoder(kind="AutoencoderKL", seed=0, **config):
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


def image_column(count=24, size=8, mode="RGB", change=None, decoded=True, labels=None):
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
        data, "image", reader, labels, decode_all(data, "image", reader, math.inf, True) if decoded else None
    )


def encoded(images, vae, path, mirrored=False, batch_size=7):
    return encode_all(images, vae, path, mirrored=mirrored, batch_size=batch_size, device="cpu", quiet=True)


def moments64(vae, pixels):
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


# ---- autoencoders


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
    with pytest.raises(ValueError, match=r"--vae owner/other: there is no config.json of an autoencoder.*\(.+\)"):
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
    with pytest.raises(ValueError, match=f"(?s)--vae {tmp_path}.*{message}"):
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
    with latents.full_precision_convolutions():
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.mkldnn.conv.fp32_precision == "ieee"
    assert before == [backend.fp32_precision for backend in (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)]


MISFITS = [
    (dict(mode="L"), "the images have 1 channels and the autoencoder takes 3. Pass --image_mode RGB"),
    (dict(mode="RGBA"), "the images have 4 channels and the autoencoder takes 3. Pass --image_mode RGB"),
    (dict(size=9), "resolution 9 is not a multiple of 2, .* Pass --resolution 8 or 10"),
    (dict(size=1), "resolution 1 is not a multiple of 2, .* Pass --resolution 2"),
]


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
@pytest.mark.parametrize("data, message", MISFITS)
def test_images_that_do_not_fit(kind, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        encoded(image_column(4, **data), autoencoder(kind), tmp_path / "latents")
    assert not list(tmp_path.iterdir())


def test_random_crops_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (12, 8))] * 3}, features=features)
    with pytest.raises(ValueError, match=r"cropped at random.*--center_crop"):
        encoded(ImageColumn(data, "image", ImageReader("RGB", 8, False)), autoencoder(), tmp_path / "latents")
    assert (
        len(encoded(ImageColumn(data, "image", ImageReader("RGB", 8, True)), autoencoder(), tmp_path / "x").mean) == 3
    )


def test_an_autoencoder_that_gives_back_another_size(tmp_path):
    vae = autoencoder("AutoencoderTiny", num_encoder_blocks=(1,), encoder_block_out_channels=(8,))
    with pytest.raises(ValueError, match="does not give back what it takes"):
        encoded(image_column(4), vae, tmp_path / "latents")


def test_latents_that_are_not_finite_name_their_images(tmp_path):
    vae, images = autoencoder(), image_column(12)
    images.images[9] = 255
    # Only the white image is so bright.
    vae.encoder.register_forward_pre_hook(
        lambda _, x: (torch.where(x[0].amin((1, 2, 3), True) > 0.99, torch.inf, x[0]),)
    )
    with pytest.raises(ValueError, match=r"latents of images \[9\] are not finite. Pass another --vae"):
        encoded(images, vae, tmp_path / "latents")
    assert not list(tmp_path.iterdir())


# ---- the file


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_file_holds_all_latents_and_their_law(kind, mirrored, tmp_path):
    images, vae = image_column(), autoencoder(kind)
    cache = encoded(images, vae, tmp_path / "folder" / "latents", mirrored)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["latents"]
    stored = load_file(tmp_path / "folder" / "latents")
    parts = {"": images.images, "mirrored_": images.images.flip(-1)} if mirrored else {"": images.images}
    means, variances = [], []
    for prefix, pixels in parts.items():
        mean, std = moments64(vae, pixels)
        assert (stored.pop(prefix + "mean") - mean).abs().max() < 2e-5
        means.append(mean)
        if std is not None:
            assert (stored.pop(prefix + "std") / std - 1).abs().max() < 2e-5
            variances.append(std.square())
    assert not stored
    if mirrored:
        # What is stored is not the mirrored latents, which would do without a second encoding.
        assert (cache.mirrored_mean - cache.mean.flip(-1)).abs().max() > 1e-2
    means = torch.cat(means)
    between = means.var((0, 2, 3), correction=0)
    within = torch.cat(variances).mean((0, 2, 3)) if variances else torch.zeros_like(between)
    expected = [means.mean((0, 2, 3)), (between + within).sqrt(), between.sqrt()]
    for found, wanted in zip((cache.mean_of_draws, cache.std_of_draws, cache.std_of_means), expected, strict=True):
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-5, atol=1e-5)
    for sample in (True, False):
        scale = choose_scale(vae, cache, sample)
        if kind in PER_CHANNEL:
            assert scale.mean == cache.mean_of_draws
            assert scale.std == (cache.std_of_draws if sample else cache.std_of_means)
        else:
            pooled = (means.var(correction=0) + (within.mean() if sample else 0)).sqrt().item()
            assert scale.mean == (0.0,) * means.shape[1]
            assert np.allclose(scale.std, pooled, rtol=1e-5)


def test_the_file_is_found_again_or_made_anew(tmp_path, caplog):
    path, images, vae = tmp_path / "latents", image_column(), autoencoder()

    def made_anew(images, vae, mirrored=False):
        before, told = (path.stat().st_ino, path.stat().st_mtime_ns), len(caplog.records)
        cache = encoded(images, vae, path, mirrored)
        anew = (path.stat().st_ino, path.stat().st_mtime_ns) != before
        messages = [record.message for record in caplog.records[told:]]
        assert len(messages) == anew and all("The images are encoded anew" in message for message in messages)
        again = cache.mean.clone()
        assert torch.equal(again, torch.cat([encode(vae, part)[0] for part in images.images.split(7)]))
        return messages[0].split("other: ")[1].split(".")[0] if anew else ""

    encoded(images, vae, path)
    assert not caplog.records
    assert made_anew(images, vae) == ""
    assert made_anew(image_column(), autoencoder(), False) == ""
    assert made_anew(image_column(change=5), vae) == "images"
    assert made_anew(images, vae) == "images"
    assert made_anew(images, autoencoder(scaling_factor=0.5)) == "autoencoder"
    vae.encoder.conv_in.bias[3] += 1e-3
    assert made_anew(images, vae) == "autoencoder"
    assert made_anew(images, vae, True) == "mirrored"
    assert made_anew(images, vae, True) == ""
    assert made_anew(image_column(change=1), autoencoder()) == "images, autoencoder, mirrored"


def test_images_decoded_as_they_are_read(tmp_path):
    images, lazy, vae = image_column(), image_column(decoded=False), autoencoder()
    whole, read = encoded(images, vae, tmp_path / "a"), encoded(lazy, vae, tmp_path / "b")
    assert torch.equal(whole.mean, read.mean)
    before = (tmp_path / "b").stat().st_ino
    encoded(lazy, vae, tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == before
    # The digest of images that are not in memory is of some of them; the others must count too.
    lazy.dataset = lazy.dataset.map(lambda row: {"other": 1})
    encoded(lazy, vae, tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino != before


def truncated(path):
    os.truncate(path, path.stat().st_size - 100)


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)


def of_something_else(path):
    save_file({"weight": torch.ones(3)}, path)


def long_header(path):
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    "damage", [truncated, one_bit, of_something_else, long_header, lambda path: path.write_bytes(b"")]
)
def test_a_damaged_file_is_never_used(damage, tmp_path, caplog):
    path, images, vae = tmp_path / "latents", image_column(), autoencoder()
    whole = encoded(images, vae, path).mean.clone()
    damage(path)
    with pytest.raises(ValueError, match="is damaged, or is not a file of latents"):
        LatentCache.open(path)
    assert torch.equal(encoded(images, vae, path).mean, whole)
    assert "damaged" in caplog.text and "encoded anew" in caplog.text


def test_killed_while_writing(tmp_path):
    path = tmp_path / "latents"
    old = encoded(image_column(change=0), autoencoder(), path).mean.clone()
    before = path.read_bytes()
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(EXAMPLES)!r}, {os.path.dirname(__file__)!r}, {os.path.dirname(os.path.dirname(__file__))!r}]
        import latents, test_latents
        from pathlib import Path
        encode, calls = latents.encode, []
        def encode_thrice(*args):
            calls.append(1)
            if len(calls) > 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)
        latents.encode = encode_thrice
        test_latents.encoded(test_latents.image_column(), test_latents.autoencoder(), Path({str(path)!r}))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert path.read_bytes() == before
    # What is left has the name of leftovers, which the script removes; nothing is read from it.
    assert [name.startswith(".writing-") for name in sorted(os.listdir(tmp_path))] == [True, False]
    assert torch.equal(encoded(image_column(change=0), autoencoder(), path).mean, old)
    assert not torch.equal(encoded(image_column(), autoencoder(), path).mean, old)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "latents"
    encoded(image_column(change=0), autoencoder(), path)
    before = path.read_bytes()
    monkeypatch.setattr(latents.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot be written to .*0\.0 MiB are needed.*No space left"):
        encoded(image_column(), autoencoder(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["latents"]


# ---- normalisation


def scale_of(vae, images, tmp_path, sample=True):
    cache = encoded(images, vae, tmp_path / "latents")
    return cache, choose_scale(vae, cache, sample)


WITHOUT_CONVOLUTIONS = dict(use_quant_conv=False, use_post_quant_conv=False)


@pytest.mark.parametrize(
    "kind, config", [*((kind, {}) for kind in PER_CHANNEL), ("AutoencoderKL", WITHOUT_CONVOLUTIONS)]
)
def test_folded_autoencoders_speak_of_normalised_latents(kind, config, tmp_path):
    vae, images = autoencoder(kind, **config), image_column()
    _, scale = scale_of(vae, images, tmp_path)
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
    _, scale = scale_of(vae, images, tmp_path)
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
    cache, scale = scale_of(vae, images, tmp_path)
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


# ---- draws


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """(autoencoder, cache without mirrors, cache with) of AutoencoderKL and AutoencoderTiny."""
    folder = tmp_path_factory.mktemp("latents")
    made = {}
    for kind in ("AutoencoderKL", "AutoencoderTiny"):
        vae = autoencoder(kind)
        made[kind] = vae, *(encoded(image_column(), vae, folder / f"{kind}{flag}", flag) for flag in (False, True))
    return made


def test_draws_are_a_function_of_the_seed_and_the_list(caches):
    vae, plain, mirrored = caches["AutoencoderKL"]
    for cache in (plain, mirrored):
        scale = choose_scale(vae, cache, True)
        column = LatentColumn(cache, scale, list(range(24)), seed=1)
        assert len(column) == 24 and column.shape == (4, 4, 4) and not column.crops_at_random and column.images is None
        rows = random.Random(0).sample(range(24), 10)
        first = column.__getitems__(rows)
        assert sorted(first) == ["images", "index", "label"]
        assert first["index"].tolist() == first["label"].tolist() == rows
        assert first["images"].dtype == torch.float32 and first["images"].shape == (10, 4, 4, 4)
        again = LatentColumn(cache, scale, seed=1).__getitems__(list(rows))
        assert torch.equal(first["images"], again["images"]) and "label" not in again
        for other in (
            LatentColumn(cache, scale, seed=2).__getitems__(rows)["images"],
            column.__getitems__([*rows[:9], rows[9] - 1])["images"],
            column.__getitems__(rows[::-1])["images"].flip(0),
        ):
            assert ((other - first["images"])[:9].flatten(1).abs().amax(1) > 1e-3).all()
    # An image that is in a list twice is drawn twice.
    twice = column.__getitems__([3, 3])["images"]
    assert not torch.equal(twice[0], twice[1])


def test_draws_have_the_posteriors_law(caches):
    _, cache, _ = caches["AutoencoderKL"]
    column, count = LatentColumn(cache, LatentScale((0.0,) * 4, (1.0,) * 4)), 4000
    draws = column.__getitems__([7] * count)["images"].double()
    errors = (draws - cache.mean[7].double()) / cache.std[7].double()
    # 64 independent means with standard error 1/sqrt(count), and as many variances with sqrt(2/count): 5 of them.
    assert errors.mean(0).abs().max() < 5 / count**0.5
    assert (errors.var(0) - 1).abs().max() < 5 * (2 / count) ** 0.5
    correlations = torch.corrcoef(errors.flatten(1).T).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / count**0.5


@pytest.mark.parametrize("mirrored", [False, True])
def test_draws_have_zero_mean_and_unit_variance(mirrored, caches):
    vae, *both = caches["AutoencoderKL"]
    cache, repeats = both[mirrored], 400
    column = LatentColumn(cache, choose_scale(vae, cache, True))
    draws = column.__getitems__(list(range(24)) * repeats)["images"].double().view(repeats, 24, 4, 4, 4)
    # Each repeat is an independent draw of all images: 5 standard errors of what is measured from repeat to repeat.
    for values, expected in ((draws, 0), (draws.square(), 1)):
        measured = values.mean((1, 3, 4))
        standard_error = measured.std(0) / repeats**0.5
        assert standard_error.max() < 0.01
        assert ((measured.mean(0) - expected) / standard_error).abs().max() < 5
    # The same of the posteriors' means alone, exactly.
    scale = choose_scale(vae, cache, False)
    values = scale.normalize(cache.mean if not mirrored else torch.cat([cache.mean, cache.mirrored_mean]))
    assert values.mean((0, 2, 3)).abs().max() < 1e-5
    assert (values.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_latents_that_are_not_drawn(kind, caches):
    vae, cache, mirrored = caches[kind]
    scale = choose_scale(vae, cache, False)
    column = LatentColumn(cache, scale, sample=kind == "AutoencoderTiny")
    rows = [5, 2, 19]
    assert torch.equal(column.__getitems__(rows)["images"], column.images[rows])
    assert torch.equal(column.__getitems__(rows)["images"], column.__getitems__(rows[::-1])["images"].flip(0))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (scale.mean, scale.std))
    expected = (moments64(vae, image_column().images)[0] - mean) / std
    assert (column.images - expected).abs().max() < 2e-5
    # Mirrors are chosen image by image, half the time.
    column = LatentColumn(mirrored, scale, sample=False)
    assert column.images is None
    draws = column.__getitems__([4] * 2000)["images"]
    plain, flipped = (scale.normalize(part[4]) for part in (mirrored.mean, mirrored.mirrored_mean))
    is_plain, is_flipped = ((draws == part).flatten(1).all(1) for part in (plain, flipped))
    assert (is_plain ^ is_flipped).all()
    assert abs(is_flipped.double().mean().item() - 0.5) < 5 * 0.5 / 2000**0.5


def test_digests_tell_latents_apart(caches):
    vae, cache, mirrored = caches["AutoencoderKL"]
    scale = choose_scale(vae, cache, True)
    other_scale = choose_scale(vae, cache, False)
    columns = [
        LatentColumn(cache, scale),
        LatentColumn(mirrored, scale),
        LatentColumn(cache, other_scale),
        LatentColumn(cache, scale, sample=False),
        LatentColumn(cache, scale, [0] * 24),
        LatentColumn(cache, scale, [0] * 23 + [1]),
    ]
    assert len({column.digest() for column in columns}) == len(columns)
    assert LatentColumn(LatentCache.open(cache.path), scale, seed=5).digest() == columns[0].digest()
    with pytest.raises(ValueError, match="23 labels for 24 images"):
        LatentColumn(cache, scale, [0] * 23)


def test_mirrored_latents_are_those_of_mirrored_images(caches):
    vae, _, cache = caches["AutoencoderKL"]
    mean, std = encode(vae, image_column().images.flip(-1))
    assert torch.allclose(cache.mirrored_mean, mean, atol=1e-6) and torch.allclose(cache.mirrored_std, std, rtol=1e-5)
    # A mirrored image is drawn with its own mean and its own standard deviation.
    draws = LatentColumn(cache, LatentScale((0.0,) * 4, (1.0,) * 4)).__getitems__([2] * 4000)["images"].double()
    parts = [(cache.mean[2], cache.std[2]), (cache.mirrored_mean[2], cache.mirrored_std[2])]
    mean = sum(part[0] for part in parts).double() / 2
    square = sum(part[0].double() ** 2 + part[1].double() ** 2 for part in parts) / 2
    spread = (square - mean**2).sqrt()
    assert ((draws.mean(0) - mean) / spread).abs().max() < 5 / 4000**0.5
    fourth = ((draws - mean) ** 4).mean(0) / spread**4
    assert ((draws.var(0) / spread**2 - 1) / ((fourth - 1) / 4000).sqrt()).abs().max() < 5
