"""The known variance of a training's targets: what it is, on as many images as memory allows."""

import pytest
import torch
from accelerate import PartialState

from oracles import posterior
from stf_diffusers import EDM, VP
from stf_diffusers.adaptive_noise import AdaptiveNoise
from stf_diffusers.noise_distribution import LogNormal
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


@pytest.mark.parametrize(
    ("process", "mirrored"), [(EDM(sigma_data=0.4), False), (EDM(sigma_data=0.4), True), (VP(), False)]
)
def test_what_is_subtracted_is_the_variance_of_the_targets(process, mirrored):
    """In the units of the loss, by 500 targets made in float64, which are right to a tenth, as are 64 of the measurement. The
    lowest level has too little variance to compare.
    """
    PartialState()
    images = open_images(load_digits_dataset().select(range(60)), quiet=True)
    references = choose_references(images, 4, reference_batch_size=16)
    distribution = AdaptiveNoise(process, LogNormal(0.5, 0.4), num_pieces=4)
    subtract_known_variance(distribution, process, images, references, mirrored=mirrored, seed=0)
    state, draws, one = distribution.state_dict(), torch.Generator().manual_seed(0), torch.ones(1, dtype=torch.float64)
    pixels = images.__getitems__(list(range(60)))["images"].double() / 127.5 - 1
    everything = torch.cat([pixels, pixels.flip(-1)]) if mirrored else pixels
    for level, found in zip(state["floor_levels"][1:].exp(), state["floor_values"][1:], strict=True):
        # alpha, sigma, and how many times larger the network's output is than x0.
        if isinstance(process, EDM):
            alpha, sigma, scale = one, level * one, (level**2 + 0.4**2).sqrt() / (level * 0.4)
        else:
            alpha, sigma, scale = one / (1 + level**2).sqrt(), one * level / (1 + level**2).sqrt(), 1 / level
        squares = []
        for _ in range(500):
            batch = pixels[torch.randperm(60, generator=draws)[:16]]
            if mirrored:
                flipped = torch.rand(16, 1, 1, 1, generator=draws) < 0.5
                batch = torch.where(flipped, batch.flip(-1), batch)
            noisy = alpha * batch[:1] + sigma * torch.randn(batch[:1].shape, generator=draws, dtype=torch.float64)
            (_, target), (_, mean) = (posterior(noisy, some, alpha, sigma) for some in (batch, everything))
            squares.append(((target - mean) * scale).square().mean())
        assert float(found) == pytest.approx(float(torch.stack(squares).mean()), rel=0.3)
