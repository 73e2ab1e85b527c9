"""The known variance of a training's targets is measured on as many images as memory allows."""

import pytest
import torch
from accelerate import PartialState

from stf_diffusers import EDM
from stf_diffusers.adaptive_noise import AdaptiveNoise
from stf_diffusers.training.adaptive_levels import subtract_known_variance
from stf_diffusers.training.data_set import load_digits_dataset
from stf_diffusers.training.image_data import open_images
from stf_diffusers.training.references import choose_references

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.mark.parametrize(
    ("images_allowed", "mirrored", "measured"), [(1e9, False, 300), (100, False, 100), (100, True, 100)]
)
def test_no_more_images_than_fit(images_allowed, mirrored, measured, caplog):
    caplog.set_level("INFO")
    PartialState()
    images = open_images(load_digits_dataset().select(range(300)), quiet=True)
    references = choose_references(images, 4, reference_batch_size=8)
    distribution = AdaptiveNoise(EDM(), num_pieces=4)
    memory = images_allowed * 144 / 2**30
    subtract_known_variance(distribution, EDM(), images, references, mirrored=mirrored, seed=0, memory_gb=memory)
    # Mirrors are counted.
    assert f"on {measured} images" in caplog.text
    assert (distribution.state_dict()["floor_values"] > 0).any()
    assert torch.equal(distribution.weights, AdaptiveNoise(EDM(), num_pieces=4).weights)
