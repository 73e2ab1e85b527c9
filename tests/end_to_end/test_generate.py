"""`examples/generate.py`: restartable, independent of batches and processes."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

import generate
from exact_networks import small_unet
from stf_diffusers import EDM, STFPipeline
from stf_diffusers.export import diffusers_pipeline, save_pipeline
from tiny import Processes


def network(channels, classes=None):
    torch.manual_seed(0)
    config = {name: value for name, value in small_unet(channels, 4).config.items() if not name.startswith("_")}
    return UNet2DModel(**config | {"num_class_embeds": classes})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pipeline(diffusers_pipeline(network(3, classes=3), EDM()), folder)
    return folder


def run(model, folder, *more):
    base = ["--model", model, "--output_dir", folder, "--num_images", 7, "--num_inference_steps", 3]
    return [str(flag) for flag in (*base, *more)]


def pixels(folder, count=7):
    return np.stack([np.asarray(Image.open(generate.image_path(folder, index))) for index in range(count)])


def test_images_do_not_depend_on_batches_processes_or_interruptions(model, tmp_path):
    generate.main(run(model, tmp_path / "one", "--batch_size", 7, "--npz"))
    expected = pixels(tmp_path / "one")
    packed = np.load(tmp_path / "one" / "samples.npz")
    assert np.array_equal(packed["images"], expected) and packed["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert Image.open(tmp_path / "one" / "grid.png").size == (8, 8)

    generate.main(run(model, tmp_path / "two", "--batch_size", 2))
    # One level of 255: a float32 network's rounding depends on the batch.
    assert np.abs(pixels(tmp_path / "two").astype(int) - expected).max() <= 1
    gone = [generate.image_path(tmp_path / "two", index) for index in (1, 5)]
    kept = generate.image_path(tmp_path / "two", 0).stat().st_mtime_ns
    for path in gone:
        path.unlink()
    generate.main(run(model, tmp_path / "two"))
    assert np.abs(pixels(tmp_path / "two").astype(int) - expected).max() <= 1
    assert generate.image_path(tmp_path / "two", 0).stat().st_mtime_ns == kept, "finished images are not redone"

    codes, said = Processes(generate.main, run(model, tmp_path / "three"), processes=2).wait()
    assert codes == [0, 0], said[-3000:]
    assert np.abs(pixels(tmp_path / "three").astype(int) - expected).max() <= 1


def test_other_settings_are_refused(model, tmp_path):
    generate.main(run(model, tmp_path, "--num_images", 1))
    with pytest.raises(ValueError, match=r"solver \(heun there, euler now\)"):
        generate.main(run(model, tmp_path, "--solver", "euler"))
    with pytest.raises(ValueError, match="knows 3 classes"):
        generate.main(run(model, tmp_path / "other", "--class_label", 3))
    assert not (tmp_path / "other").exists()
    generate.main(run(model, tmp_path / "more", "--num_images", 3))
    with pytest.raises(ValueError, match="beyond the 2 asked for"):
        generate.main(run(model, tmp_path / "more", "--num_images", 2))
    retrained = tmp_path / "retrained"
    other = network(3, classes=3)
    torch.nn.init.ones_(other.conv_out.bias)
    save_pipeline(diffusers_pipeline(other, EDM()), retrained)
    with pytest.raises(ValueError, match="begun with other settings: model"):
        generate.main(run(retrained, tmp_path / "more", "--num_images", 4))
    with pytest.raises(ValueError, match="--guidance_scale"):
        generate.main(run(model, tmp_path / "other", "--guidance_scale", 2))
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        generate.main(run(model, tmp_path / "other", "--num_images", 0))


def test_channels_that_png_lacks(tmp_path):
    save_pipeline(diffusers_pipeline(network(5), EDM()), tmp_path / "model")
    generate.main(run(tmp_path / "model", tmp_path / "five", "--num_images", 2, "--npz"))
    assert np.load(tmp_path / "five" / "samples.npz")["images"].shape == (2, 4, 4, 5)
    generate.main(run(tmp_path / "model", tmp_path / "five", "--num_images", 3))
    assert not (tmp_path / "five" / "samples.npz").exists(), "an array of fewer images is not left behind"


def test_the_null_class_is_not_generated(tmp_path):
    pipeline = diffusers_pipeline(network(3, classes=4), EDM(), metadata={"null_label": 3})
    save_pipeline(pipeline, tmp_path / "model")
    generate.main(run(tmp_path / "model", tmp_path / "out", "--npz", "--guidance_scale", 2))
    assert np.load(tmp_path / "out" / "samples.npz")["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_consistency_model_is_sampled_as_one(tmp_path):
    metadata = {"consistency": {"stage": 8}, "consistency_sigmas": {"2": [0.7]}}
    save_pipeline(diffusers_pipeline(network(3), EDM(), metadata=metadata), tmp_path / "model")

    def images(name, *flags):
        folder = tmp_path / name
        generate.main(
            [str(flag) for flag in ("--model", tmp_path / "model", "--output_dir", folder, "--num_images", 5, *flags)]
        )
        return pixels(folder, 5).astype(int), json.loads((folder / "settings.json").read_text())

    one, settings = images("one")
    assert (settings["solver"], settings["num_inference_steps"], settings["sigmas"]) == ("consistency", 1, [])
    two, settings = images("two", "--num_inference_steps", 2, "--batch_size", 2)
    assert (settings["num_inference_steps"], settings["sigmas"]) == (2, [0.7])
    pipeline = STFPipeline.from_pretrained(tmp_path / "model")
    for found, how in ((one, {}), (two, {"num_inference_steps": 2})):
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
        expected = np.stack([np.asarray(image) for image in pipeline(5, generator=generators, **how).images])
        assert np.abs(found - expected).max() <= 1
    assert images("own", "--sigmas", 2, 0.5)[1]["num_inference_steps"] == 3
    for flags, message in (
        (("--sigmas", 0.5, 2), "sigmas must decrease"),
        (("--sigmas", 0.5, "--solver", "euler"), "the steps of --solver consistency; got --solver euler"),
        (("--sigmas", 0.5, "--num_inference_steps", 3), "one less than --num_inference_steps 3"),
    ):
        with pytest.raises(ValueError, match=message):
            images("refused", *flags)
    assert not (tmp_path / "refused").exists()
