"""Runs on data as people have it: archives, arrays, string labels, corrupt files, images that are not square."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stf_diffusers import STFPipeline
from tiny import metadata, tiny_autoencoder, train


def test_a_zip_archive_with_classes_and_a_corrupt_file(flags, tmp_path, caplog):
    draw = np.random.default_rng(0)
    for number in range(9):
        path = tmp_path / "data" / ("cat", "dog", "test")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    (tmp_path / "data" / "dog" / "9.png").write_bytes(b"no image")
    data = ["--dataset_name", shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")]
    data += ["--cache_dir", tmp_path / "cache", "--class_conditional"]
    with pytest.raises(ValueError, match=r"cannot be decoded.*leave it out with --skip_corrupt"):
        train([*flags()[2:], *data])
    train([*flags()[2:], *data, "--skip_corrupt"])
    assert metadata(tmp_path / "run")["class_names"] == ["cat", "dog", "test"]
    assert metadata(tmp_path / "run")["num_images"] == 9
    assert "Left out 1 of 10 images" in caplog.text
    train([*flags()[2:], *data, "--skip_corrupt", "--max_train_steps", 3, "--resume_from_checkpoint", "latest"])


def test_arrays(flags, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=[0, 1, 2] * 3, x_test=images[:2])
    data = ["--dataset_name", tmp_path / "data.npz", "--cache_dir", tmp_path / "cache", "--class_conditional"]
    train([*flags()[2:], *data])
    found = metadata(tmp_path / "run")
    assert (found["num_classes"], found["class_names"], found["image_shape"]) == (3, None, [1, 8, 8])


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_images_that_are_not_square(process, flags, tmp_path):
    """Plain Diffusers loads and samples them."""
    train(flags("--resolution", 8, 12, "--center_crop", "--noise_process", process, "--random_flip"))
    config = json.loads((tmp_path / "run" / "unet" / "config.json").read_text())
    assert config["sample_size"] == [8, 12] and metadata(tmp_path / "run")["image_shape"] == [3, 8, 12]
    for kind in (DiffusionPipeline, STFPipeline):
        pipeline = kind.from_pretrained(tmp_path / "run")
        images = pipeline(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        assert [image.size for image in images] == [(12, 8)] * 2
    assert Image.open(next((tmp_path / "run" / "samples").glob("*.png"))).width % 12 == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            [],
            "the images are 8x12.* ConsistencyModelPipeline, which only makes square images. Pass --noise_process vp",
        ),
        (["--noise_process", "vp", "--class_conditional"], "the images are 8x12.* without classes, or one side"),
        (["--noise_process", "vp", "--reorient", 0.5], "quarter turns need square images; got 8x12. Leave it out"),
        (
            ["--noise_process", "vp", "--vae", "vae"],
            "the images are 8x12.* one side as --resolution, or leave --vae out",
        ),
    ],
)
def test_what_diffusers_samples_square_alone_is_refused(more, says, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_autoencoder().save_pretrained("vae")
    with pytest.raises(ValueError, match=says):
        train(flags("--resolution", 8, 12, "--center_crop", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resolution", [["8", "12", "4"], ["0"]])
def test_other_resolutions_are_refused(resolution, flags, tmp_path):
    with pytest.raises((ValueError, SystemExit)):
        train(flags("--resolution", *resolution))
    assert not (tmp_path / "run").exists()
