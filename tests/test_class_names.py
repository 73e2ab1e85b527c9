"""Classes by their names: in the card, in a call of the pipeline, and in generate.py."""

from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import generate
from exact_networks import small_unet
from stf_diffusers import EDM, STFPipeline
from stf_diffusers.export import diffusers_pipeline, save_pipeline
from stf_diffusers.image_grid import image_grid
from stf_diffusers.model_card import model_card
from stf_diffusers.training.sampling import sample_grid, sample_images, seed_for
from stf_diffusers.upload import _grid

NAMES = ["cat", "dog", "7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    network = small_unet(1, 8, classes=3)
    metadata = {"num_classes": 3, "class_names": NAMES}
    pipeline = diffusers_pipeline(network, EDM(), metadata=metadata)
    assert "| classes | 0 cat, 1 dog, 2 7 |" in str(model_card(pipeline, repository="x", num_inference_steps=2))
    folder = tmp_path_factory.mktemp("named")
    save_pipeline(pipeline, folder)
    return folder


def test_names_in_a_call(folder):
    pipe = STFPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def images(labels):
        how = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        return pipe(batch_size=2, class_labels=labels, **how).images

    assert images(["dog", "cat"]).equal(images([1, 0])) and images("7").equal(images(2))
    assert not images("cat").equal(images("dog"))
    with pytest.raises(ValueError, match=r"no class is called \['cow'\]; the model knows \['cat', 'dog', '7'\]"):
        images(["cow", "cat"])


def test_names_for_generate(folder, tmp_path):
    def images(label, out):
        generate.main(
            ["--model", str(folder), "--output_dir", str(tmp_path / out), "--num_images", "1", "--num_inference_steps", "2",
             "--class_label", label]
        )  # fmt: skip
        return (tmp_path / out / "images" / "000000.png").read_bytes()

    assert images("dog", "a") == images("1", "b")
    assert images("7", "c") == images("2", "d"), "a name comes before a number"
    with pytest.raises(ValueError, match="--class_label cow: the model knows 3 classes, called cat, dog, 7"):
        images("cow", "e")


def test_names_beneath_the_images_of_grids(folder, tmp_path):
    names = ["cat", "dog", "7", "cat"]
    generate.main(
        ["--model", str(folder), "--output_dir", str(tmp_path), "--num_images", "4", "--num_inference_steps", "2"]
    )
    images = [Image.open(generate.image_path(tmp_path, index)) for index in range(4)]
    assert Image.open(tmp_path / "grid.png").tobytes() == image_grid(images, 2, names).tobytes()

    pipe = STFPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    draws = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = pipe(4, class_labels=names, generator=draws).images
    assert _grid(pipe, 4).tobytes() == image_grid(images, 2, names).tobytes()

    plain = DiffusionPipeline.from_pretrained(folder)
    how = {"batch_size": 2, "num_inference_steps": 2}
    images = sample_images(plain, range(4), seed_of=partial(seed_for, 5), **how)
    assert sample_grid(plain, 4, seed=5, **how).tobytes() == image_grid(images, 2, names).tobytes()
