"""Samples of a consistency model in a few evaluations: denoise, add fresh noise of a lower level, denoise again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .solvers import Generators, check_generators, draw_noise


@torch.no_grad()
def sample_consistency(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    generator: Generators = None,
    step_noise: Tensor | None = None,
    on_step_end: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Samples of a consistency model: Song et al. 2023 (arXiv 2303.01469), Algorithm 1, with f(x, 0) = x.

    N levels call `denoise` N times. Image k depends on row k of `latents` and its own generator alone, not on the batch.

    Args:
        denoise: the consistency function f(x; sigma), x (B, ...) float64 and sigma () float64 on the CPU; for a network,
            `network_denoiser`.
        latents: (B, ...), standard normal.
        sigmas: (N,) noise levels, decreasing: the largest, and those that the samples are brought back to.
        generator: source of the fresh noise: one generator, or a sequence with one for each image. Drawn from N - 1 times,
            in float32 as Diffusers does.
        step_noise: (N - 1, B, ...) standard normal noise to use instead, one slice for each level but the first.
        on_step_end: called after step i with (i, state): the state is (B, ...) float64, noisy but for the last. A tensor
            that it returns is the state from there on.

    Returns:
        (B, ...) float64 images.

    Raises:
        ValueError: levels that are not finite, positive and decreasing, not one generator for each image, or too little
            `step_noise`.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim != 1 or not len(levels) or not _decreasing([math.inf, *levels.tolist(), 0.0]):
        raise ValueError(
            f"sigmas must be noise levels that are finite, positive and decreasing; got {levels.flatten().tolist()[:8]}."
        )
    check_generators(generator, len(latents))
    if step_noise is not None and step_noise.shape != (len(levels) - 1, *latents.shape):
        raise ValueError(
            f"step_noise must have shape {(len(levels) - 1, *latents.shape)}, one slice for each level but the first; got "
            f"{tuple(step_noise.shape)}."
        )
    x = levels[0] * latents.to(torch.float64)
    for i, sigma in enumerate(levels):
        x = denoise(x, sigma).to(torch.float64)
        if i + 1 < len(levels):
            noise = draw_noise(x.to(torch.float32), generator) if step_noise is None else step_noise[i]
            x = x + levels[i + 1] * noise.to(x)
        replaced = None if on_step_end is None else on_step_end(i, x)
        x = x if replaced is None else replaced.to(x)
    return x


def intermediate_levels(
    num_inference_steps: int,
    sigma_max: float,
    *,
    sigmas: Sequence[float] | Tensor | None = None,
    saved: Mapping[str, Sequence[float]] | None = None,
    sigma_min: float = 0.0,
) -> list[float]:
    """The N - 1 noise levels that samples are brought back to in N steps.

    Args:
        num_inference_steps: N.
        sigma_max: the level that sampling starts from.
        sigmas: levels of the caller's choice.
        saved: levels by number of steps, ``{"2": [0.8]}``, used where `sigmas` is None and that number is there. Without
            either, the last is 0.5 and those before it double: 1 and 0.5 in three steps (closer than that where they
            would reach sigma_max, and from sigma_max / 160 where that is below 0.5).
        sigma_min: the least level that the network knows.

    Raises:
        TypeError: `sigmas` that are not numbers.
        ValueError: another number of levels, or levels that do not decrease between sigma_max and sigma_min.
    """
    name, chosen = "sigmas", sigmas
    if chosen is None and saved and str(num_inference_steps) in saved:
        name, chosen = (
            f"the levels saved for num_inference_steps={num_inference_steps}",
            saved[str(num_inference_steps)],
        )
    if chosen is None:
        last, count = max(min(0.5, sigma_max / 160), sigma_min), num_inference_steps - 1
        ratio = min(2.0, (sigma_max / last) ** (1 / max(count, 1)))
        return [last * ratio**k for k in reversed(range(count))]
    try:
        found = torch.as_tensor(chosen, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be noise levels; got {chosen!r}.") from error
    levels: list[float] = found.tolist()
    if found.shape != (num_inference_steps - 1,):
        raise ValueError(
            f"{name} must be {num_inference_steps - 1} noise levels, one less than num_inference_steps="
            f"{num_inference_steps}: the first step starts from sigma_max. Got {levels}."
        )
    if not _decreasing([sigma_max, *levels, 0.0]) or any(level < sigma_min for level in levels):
        raise ValueError(f"{name} must decrease, between {sigma_max:g} and {sigma_min:g}; got {levels}.")
    return levels


def is_consistency_model(metadata: dict[str, Any]) -> bool:
    """Whether a saved folder's metadata say that its network is a consistency model, which samples in one step."""
    return metadata.get("consistency") is not None


def _decreasing(levels: Sequence[float]) -> bool:
    return all(high > low for high, low in pairwise(levels))
