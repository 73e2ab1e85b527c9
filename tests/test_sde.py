"""Samplers of the reverse SDE, on exact denoisers: mean and covariance of a Gaussian, points and their frequencies."""

from functools import partial

import pytest
import torch
from scipy import stats

from exact_networks import ExactNetwork, denoise_gaussian, small_unet
from oracles import images, normal, worst
from stf_diffusers import EDM, VE, VP, network_denoiser
from stf_diffusers.sde import sample_ancestral, sample_predictor_corrector

float64 = torch.float64
SAMPLERS = {
    "ancestral": sample_ancestral,
    "predictor": partial(sample_predictor_corrector, correct_steps=0),
    "predictor_corrector": sample_predictor_corrector,
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mean_and_covariance_of_a_gaussian(sampler):
    """Correlated data of 48 values, eigenvalues 0.04 to 0.4; 1,000 samples of 1,000 steps.

    Whitened, the mean is 0 and the covariance is the identity: each mean within 4.5 standard errors, the variances of
    a third of the directions together within 3 % (the steps' own error; 0.011 is one standard error), each correlation
    within 6 standard errors (1,128 of them).
    """
    dimension, count = 48, 1000
    factor = 0.3 * normal(dimension, dimension, dtype=float64)
    covariance = factor @ factor.T / dimension + 0.04 * torch.eye(dimension, dtype=float64)
    mean = torch.linspace(-0.5, 0.5, dimension, dtype=float64)
    latents = normal(count, 3, 4, 4, seed=1, dtype=float64)
    samples = SAMPLERS[sampler](partial(denoise_gaussian, mean, covariance), latents, generator=seeded(1))
    eigenvalues, directions = torch.linalg.eigh(covariance)
    whitened = (samples.flatten(1) - mean) @ directions / eigenvalues.sqrt()
    assert whitened.mean(0).abs().max() < 4.5 / count**0.5
    result = torch.cov(whitened.T)
    assert (result.diag().reshape(3, -1).mean(1) - 1).abs().max() < 0.03 + 2 * 0.011
    assert (result - torch.diag(result.diag())).abs().max() < 6 / count**0.5


@pytest.mark.parametrize("name, process", [("edm", EDM(sigma_data=0.6)), ("ve", VE()), ("vp", VP())])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_the_points_with_equal_frequencies(sampler, name, process):
    points = (images(6, 1, 4, 4, seed=3, dtype=float64) > 0).double() * 1.6 - 0.8
    denoise = network_denoiser(ExactNetwork(name, points), process)
    latents = normal(600, 1, 4, 4, seed=7, dtype=float64)
    samples = SAMPLERS[sampler](denoise, latents, num_steps=200, generator=seeded(2))
    distance, which = torch.cdist(samples.flatten(1), points.flatten(1)).min(1)
    assert distance.max() < 1e-3
    # Chi-square against equal frequencies: a right sampler fails one time in 10^4.
    assert stats.chisquare(torch.bincount(which, minlength=6).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler):
    denoise, latents = network_denoiser(small_unet(size=8).double(), VE()), normal(4, 1, 8, 8, dtype=float64)

    def sample(rows):
        return SAMPLERS[sampler](denoise, latents[rows], num_steps=5, generator=[seeded(k) for k in rows])

    # The untrained network's images grow large: relative to them.
    whole = sample([0, 1, 2, 3])
    assert worst(sample([2]), whole[2:3]) < 1e-12 * whole.abs().max()
    assert worst(sample([3, 0]), whole[[3, 0]]) < 1e-12 * whole.abs().max()


def test_errors_say_the_fix():
    latents = torch.zeros(2, 1, 4, 4)
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="1 generators for 2 images"):
            sampler(lambda x, sigma: x, latents, generator=[seeded(0)])
    with pytest.raises(ValueError, match="at least 2"):
        sample_predictor_corrector(lambda x, sigma: x, latents, num_steps=1)
