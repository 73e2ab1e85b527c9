"""Float64 oracles written from the mathematics, and where the golden numbers are. Nothing here calls the package."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("STF_SHARED", Path(__file__).parents[2] / "shared"))

# Noise levels of `problem`, and the settings under which it is solved.
SIGMAS = torch.tensor([0.002, 0.02, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0, 80.0])
CONTEXTS = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}

# y = a x0 + b noise: (a, b) of every prediction type, for float64 alpha and sigma.
TABLE = {
    "epsilon": lambda alpha, sigma: (0 * alpha, 1 + 0 * sigma),
    "sample": lambda alpha, sigma: (1 + 0 * alpha, 0 * sigma),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1 + 0 * alpha, 1 + 0 * sigma),
    "score": lambda alpha, sigma: (0 * alpha, -1 / sigma),
}


def rows(vector: Tensor, like: Tensor) -> Tensor:
    """A (B,) vector in float64, shaped to multiply the rows of `like`."""
    return vector.double().view(len(vector), *[1] * (like.ndim - 1))


def posterior(
    noisy: Tensor, reference: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax_i(-|x_t - alpha x_i|^2 / 2 sigma^2) by exact differences: weights (B, n) and mean (B, ...), float64."""
    flat, refs, softmax = noisy.double().flatten(1), reference.double().flatten(1), []
    for i, x in enumerate(flat):
        logits = -(x - alpha[i].double() * refs).square_().sum(1) / (2 * sigma[i].double() ** 2)
        softmax.append((logits if mask is None else logits.masked_fill(~mask[i], -torch.inf)).softmax(0))
    weights = torch.stack(softmax)
    return weights, (weights @ refs).view(noisy.shape)


def worst(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    assert result.shape == expected.shape
    return (result.double() - expected.double()).abs().max().item()


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2 - 1


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(
    n: int = 50,
    shape: tuple[int, ...] = (3, 8, 8),
    dtype: torch.dtype = torch.float32,
    sigmas: Tensor = SIGMAS,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noisy, reference, alpha, sigma): one row per sigma, sources first, two references duplicated."""
    reference = images(n, *shape, dtype=dtype)
    if n > len(sigmas) + 1:
        reference[-1], reference[-2] = reference[0], reference[3] + 1e-3
    x0, alphas = reference[: len(sigmas)], torch.full_like(sigmas, alpha)
    if n < len(sigmas):
        x0 = reference[:1].expand(len(sigmas), *shape)
    noisy = (rows(alphas, x0) * x0 + rows(sigmas, x0) * normal(*x0.shape, seed=1)).to(dtype)
    return noisy, reference, alphas, sigmas


def load_golden(whole: bool) -> dict[str, Any]:
    """`posterior_mean.npz` of the reference implementations: the slice kept here, or the `whole` file in ../shared.

    Both hold all 96 references and 12 rows; the slice has every 16th element of the targets. The noise is torch's of
    seed 1, checked against the file, so that the slice need not hold it.
    """
    path = (SHARED / "oracle" if whole else GOLDEN) / "posterior_mean.npz"
    data: dict[str, Any] = {key: torch.from_numpy(value) for key, value in np.load(path).items() if value.ndim}
    if not whole:
        pixels = data.pop("reference_deltas").numpy().cumsum(-1, dtype=np.uint8)  # differences compress better
        data["reference"] = torch.from_numpy((pixels.astype(np.float32) / np.float32(127.5)) - 1)
        data["reference"][40], data["reference"][41] = data["reference"][3], data["near_duplicate"]
        data["noise"] = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(data["noise"][:, 0, 0, :4], data["noise_check"]), "this torch draws other noise for seed 1"
    data["stride"] = 1 if whole else 16
    return data
