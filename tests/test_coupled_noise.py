"""The weights assume that noise is independent of the images: on coupled noise, targets over references are biased.

Batches of two images, numbers that differ. Immiscible Diffusion (Li et al. 2024, arXiv 2406.12303) and minibatch optimal
transport (arXiv 2302.00482) hand out the two noises such that the sum of squared distances is least: of numbers, the larger
noise to the larger image. Then the law of (image, other image, x_t) is a finite sum of known densities.
"""

import math
from itertools import permutations

import pytest
import torch

from stf_diffusers import EDM, FlowMatching, STFTrainingObjective

float64 = torch.float64
POINTS = torch.tensor([-0.9, -0.2, 0.1, 0.8], dtype=float64)
PAIRS = torch.tensor(list(permutations(range(4), 2)))  # (image, other image)
QUERIES = [-1.5, -0.3, 0.4, 1.2]


def law(x_t, alpha, sigma, coupled):
    """(12,) probabilities of the pairs given x_t."""
    source, other = POINTS[PAIRS].T
    noise = (x_t - alpha * source) / sigma
    density = torch.exp(-(noise**2) / 2)
    if coupled:
        # Of two noises, this one is the larger with probability Phi.
        larger = (1 + torch.erf(noise / math.sqrt(2))) / 2
        density = density * 2 * torch.where(source > other, larger, 1 - larger)
    return density / density.sum()


def bias(process, prediction_type, t, x_t, coupled, references):
    """E[target over references | x_t] - E[target of the source | x_t], where `references(pair)` are positions of POINTS."""
    times = torch.tensor([t], dtype=float64)
    alpha, sigma = process.alpha(times).item(), process.sigma(times).item()
    objective, total = STFTrainingObjective(process, prediction_type), 0.0
    for probability, pair in zip(law(x_t, alpha, sigma, coupled), PAIRS.tolist(), strict=True):
        source = POINTS[pair[:1], None]
        noise = (x_t - alpha * source) / sigma
        over, alone = (
            objective.target(source, noise, times, reference=POINTS[positions, None])
            for positions in (references(pair), pair[:1])
        )
        total += (probability * (over - alone)).item()
    return total


REFERENCES = {
    "the batch": lambda pair: pair,
    "all data": lambda pair: [*pair, *(set(range(4)) - set(pair))],
}


@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize(
    "process, prediction_type, t",
    [(EDM(), "sample", 0.5), (EDM(), None, 1.0), (FlowMatching(), None, 0.5), (FlowMatching(), None, 0.8)],
)
def test_targets_are_unbiased_for_independent_noise_alone(process, prediction_type, t, references):
    def worst(coupled):
        return max(abs(bias(process, prediction_type, t, q, coupled, REFERENCES[references])) for q in QUERIES)

    assert worst(coupled=False) < 1e-12
    assert worst(coupled=True) > 0.04


def test_the_law_of_coupled_noise_is_that_of_sorted_pairs():
    """The densities above against a million batches: each pair's share of the x_t in a narrow interval."""
    generator = torch.Generator().manual_seed(0)
    pairs = PAIRS[torch.randint(12, (1_000_000,), generator=generator)]
    noise = torch.randn(1_000_000, 2, dtype=float64, generator=generator).sort(1).values
    source, other = POINTS[pairs].T
    own = torch.where(source > other, noise[:, 1], noise[:, 0])
    assert abs(own.mean()) < 0.005 and abs(own.std() - 1) < 0.005, "each image's noise alone is normal"
    inside = (source + own - 0.4).abs() < 0.02
    shares = torch.stack([(pairs[inside] == pair).all(1).double().mean() for pair in PAIRS])
    error = (shares * (1 - shares) / inside.sum()).sqrt()
    assert ((shares - law(0.4, 1.0, 1.0, coupled=True)).abs() < 4.5 * error + 1e-3).all()
