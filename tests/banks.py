"""Images and data sets of reference banks, and what their posterior means must be."""

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oracles import normal, posterior, rows, worst
from stf_diffusers import PosteriorMean

SIGMA = torch.tensor([0.002, 0.02, 0.3, 1.0, 3.0, 10.0, 80.0])
SOURCES = torch.tensor([3, 17, 0, 28, 28, 5, 11])


def pixels(n: int = 30, shape: tuple[int, ...] = (2, 5, 6), seed: int = 0) -> Tensor:
    """Random images, two of them the same."""
    images = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[n - 1] = images[3]
    return images


def exact(images: Tensor) -> Tensor:
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()


def noised(images: Tensor, index: Tensor = SOURCES, sigma: Tensor = SIGMA) -> Tensor:
    x0 = exact(images)[index]
    return (x0 + rows(sigma, x0) * normal(*x0.shape, seed=1)).float()


def expected_mean(
    noisy: Tensor, images: Tensor, sigma: Tensor = SIGMA, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    weights, mean = posterior(noisy, exact(images), torch.ones_like(sigma), sigma, mask)
    return mean, 1 / weights.square().sum(1)


def compare(result: PosteriorMean, expected: tuple[Tensor, Tensor]) -> None:
    mean, effective_sample_size = expected
    assert worst(result.mean, mean) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), effective_sample_size, rtol=1e-4, atol=0)


def same(result: PosteriorMean, other: PosteriorMean, bound: float = 1e-6) -> None:
    assert worst(result.mean, other.mean) < bound
    torch.testing.assert_close(result.effective_sample_size, other.effective_sample_size, rtol=1e-5, atol=0)


def small_dataset(count: int = 20, seed: int = 0) -> datasets.Dataset:
    draw = np.random.default_rng(seed)
    images = [Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)
