"""Latents of images: the file, its law, and the draws."""

import os
import random
import signal

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stf_diffusers.training import latents
from stf_diffusers.training.autoencoder import LatentScale, encode
from stf_diffusers.training.device_images import DeviceImages
from stf_diffusers.training.image_data import ImageColumn
from stf_diffusers.training.image_reader import ImageReader
from stf_diffusers.training.latents import LatentCache, LatentColumn
from tiny import Processes
from tiny_autoencoders import CONFIGS, PER_CHANNEL, autoencoder, encoded, image_column, moments64, scale_of


def test_random_crops_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (12, 8))] * 3}, features=features)
    with pytest.raises(ValueError, match=r"cropped at random.*center_crop="):
        encoded(ImageColumn(data, "image", ImageReader("RGB", 8, False)), autoencoder(), tmp_path / "latents")
    assert (
        len(encoded(ImageColumn(data, "image", ImageReader("RGB", 8, True)), autoencoder(), tmp_path / "x").mean) == 3
    )


def test_latents_that_are_not_finite_name_their_images(tmp_path):
    vae, images = autoencoder(), image_column(12)
    images.images[9] = 255
    # Only the white image is so bright.
    vae.encoder.register_forward_pre_hook(
        lambda _, x: (torch.where(x[0].amin((1, 2, 3), True) > 0.99, torch.inf, x[0]),)
    )
    with pytest.raises(ValueError, match=r"latents of images \[9\] are not finite. Pass another vae="):
        encoded(images, vae, tmp_path / "latents")
    assert not list(tmp_path.iterdir())


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
        scale = scale_of(vae, cache, sample)
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
        return messages[0].split("different ")[1].split(".")[0] if anew else ""

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


def die_after_three_batches(path):
    calls, encode_batch = [], latents.encode

    def encode_thrice(*arguments):
        calls.append(1)
        if len(calls) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_batch(*arguments)

    latents.encode = encode_thrice
    encoded(image_column(), autoencoder(), path)


def test_killed_while_writing(tmp_path):
    path = tmp_path / "latents"
    old = encoded(image_column(change=0), autoencoder(), path).mean.clone()
    before = path.read_bytes()
    codes, said = Processes(die_after_three_batches, path).wait()
    assert codes == [-signal.SIGKILL], said[-3000:]
    assert path.read_bytes() == before
    # What is left has the name of leftovers, which the script removes; nothing is read from it.
    assert [name.startswith(".writing-") for name in sorted(os.listdir(tmp_path))] == [True, False]
    assert torch.equal(encoded(image_column(change=0), autoencoder(), path).mean, old)
    assert not torch.equal(encoded(image_column(), autoencoder(), path).mean, old)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "latents"
    encoded(image_column(change=0), autoencoder(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot be written to .*0\.0 MiB are needed.*No space left"):
        encoded(image_column(), autoencoder(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["latents"]


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
        scale = scale_of(vae, cache, True)
        column = LatentColumn(cache, scale, list(range(24)), seed=1)
        assert len(column) == 24 and column.shape == (4, 4, 4) and column.in_memory is None
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
    column = LatentColumn(cache, scale_of(vae, cache, True))
    draws = column.__getitems__(list(range(24)) * repeats)["images"].double().view(repeats, 24, 4, 4, 4)
    # Each repeat is an independent draw of all images: 5 standard errors of what is measured from repeat to repeat.
    for values, expected in ((draws, 0), (draws.square(), 1)):
        measured = values.mean((1, 3, 4))
        standard_error = measured.std(0) / repeats**0.5
        assert standard_error.max() < 0.01
        assert ((measured.mean(0) - expected) / standard_error).abs().max() < 5
    # The same of the posteriors' means alone, exactly.
    scale = scale_of(vae, cache, False)
    values = scale.normalize(cache.mean if not mirrored else torch.cat([cache.mean, cache.mirrored_mean]))
    assert values.mean((0, 2, 3)).abs().max() < 1e-5
    assert (values.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_latents_that_are_not_drawn(kind, caches):
    vae, cache, mirrored = caches[kind]
    scale = scale_of(vae, cache, False)
    column = LatentColumn(cache, scale, sample=kind == "AutoencoderTiny")
    rows = [5, 2, 19]
    whole = column.in_memory
    assert torch.equal(column.__getitems__(rows)["images"], whole[rows]) and column.read_alike
    gathered = DeviceImages.of_bank(column.make_bank(), None).columns(torch.tensor(rows))
    assert torch.equal(column.__getitems__(rows)["images"], gathered["images"])
    assert column.in_memory is not whole, "nobody keeps a copy of the file"
    assert torch.equal(column.__getitems__(rows)["images"], column.__getitems__(rows[::-1])["images"].flip(0))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (scale.mean, scale.std))
    expected = (moments64(vae, image_column().images)[0] - mean) / std
    assert (column.in_memory - expected).abs().max() < 2e-5
    # Mirrors are chosen image by image, half the time.
    column = LatentColumn(mirrored, scale, sample=False)
    assert column.in_memory is None and not column.read_alike
    draws = column.__getitems__([4] * 2000)["images"]
    plain, flipped = (scale.normalize(part[4]) for part in (mirrored.mean, mirrored.mirrored_mean))
    is_plain, is_flipped = ((draws == part).flatten(1).all(1) for part in (plain, flipped))
    assert (is_plain ^ is_flipped).all()
    assert abs(is_flipped.double().mean().item() - 0.5) < 5 * 0.5 / 2000**0.5


def test_digests_tell_latents_apart(caches):
    vae, cache, mirrored = caches["AutoencoderKL"]
    scale = scale_of(vae, cache, True)
    other_scale = scale_of(vae, cache, False)
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
