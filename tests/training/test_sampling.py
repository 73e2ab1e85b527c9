"""Seeds and images by number: the same in any batch, and laid out in a grid."""

import numpy as np
import pytest
import torch
from PIL import Image

from exact_networks import small_unet
from stf_diffusers import EDM
from stf_diffusers.export import diffusers_pipeline
from stf_diffusers.training.sampling import as_pixels, sample_grid, sample_images, seed_for, seeded_generator

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture
def pipeline():
    return diffusers_pipeline(small_unet(3, size=8), EDM(), metadata={})


def test_seeds_are_functions_of_their_parts():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (10,), (1, 0, 0)]
    seeds = [seed_for(*each) for each in parts]
    assert seeds == [seed_for(*each) for each in parts] and len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.randn(3, generator=seeded_generator(torch.device("cpu"), 4, 5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(draws[0], torch.randn(3, generator=torch.Generator().manual_seed(seed_for(4, 5))))


def test_an_image_depends_on_its_seed_alone(pipeline):
    how = {"seed_of": lambda index: 100 + index, "num_inference_steps": 3}
    together = as_pixels(sample_images(pipeline, [0, 1, 2, 3, 4], batch_size=5, **how)).int()
    apart = as_pixels(sample_images(pipeline, [4, 2, 0], batch_size=2, **how)).int()
    # One level of 255: a float32 network's rounding depends on the batch.
    assert (together[[4, 2, 0]] - apart).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 1
    alone = pipeline(generator=torch.Generator().manual_seed(103), num_inference_steps=3).images
    assert (as_pixels(alone).int()[0] - together[3]).abs().max() <= 1


def test_a_grid_has_its_images_in_rows_and_blanks_at_the_end(pipeline):
    grid = np.asarray(sample_grid(pipeline, 5, seed=7, batch_size=2, num_inference_steps=3)).astype(int)
    assert grid.shape == (2 * 64, 3 * 64, 3), "eightfold, so that small images can be seen"
    cells = grid[::8, ::8].reshape(2, 8, 3, 8, 3).transpose(0, 2, 1, 3, 4).reshape(6, 8, 8, 3)
    images = sample_images(pipeline, range(5), seed_of=lambda k: seed_for(7, k), batch_size=5, num_inference_steps=3)
    assert np.abs(cells[:5] - np.stack([np.asarray(image) for image in images]).astype(int)).max() <= 1
    assert not cells[5].any()


def test_pixels_of_pictures():
    levels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    assert torch.equal(
        as_pixels([Image.fromarray(each) for each in levels]), torch.from_numpy(levels).permute(0, 3, 1, 2)
    )
    grey = as_pixels([Image.fromarray(levels[0, ..., 0])])
    assert torch.equal(grey, torch.from_numpy(levels[:1, ..., :1]).permute(0, 3, 1, 2))
