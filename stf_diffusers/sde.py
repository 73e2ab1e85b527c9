"""Samplers of the reverse SDE of Song et al. 2021 (arXiv 2011.13456), on Diffusers' own schedulers.

Like the solvers of the ODE they know a model only as ``denoise(x, sigma)`` in unscaled space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, ScoreSdeVeScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .export import trained_betas
from .noise import VP
from .solvers import Generators, check_generators


def _for_diffusers(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    return generator if generator is None or isinstance(generator, torch.Generator) else list(generator)


@torch.no_grad()
def sample_ancestral(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    num_steps: int = 1000,
    process: VP | None = None,
    generator: Generators = None,
) -> Tensor:
    """Ancestral sampling of the VP process (Song et al. 2021, eq. 4; Ho et al. 2020, Algorithm 2).

    `num_steps` times are evenly spaced in (0, 1]; each step draws the sample at the one below, with variance beta, the
    larger of Ho et al.'s two (measured on Gaussian data at 1,000 steps: with the smaller, variances come out up to 5 %
    too small; with this one they are right to 2 %). Diffusers' `DDPMScheduler` makes the step, on betas that are the
    process's own.

    Args:
        denoise: D(x; sigma), x (B, ...) float64 and sigma () float64.
        latents: (B, ...), standard normal.
        num_steps: how many steps, one evaluation each.
        process: the forward process; None: `VP()`.
        generator: source of the noise: one generator, or a sequence with one for each image.

    Returns:
        (B, ...) float64 images.

    Raises:
        ValueError: not one generator for each image.
    """
    check_generators(generator, len(latents))
    process = process or VP()
    t = torch.arange(1, num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    betas = trained_betas(process.sigma(t) / process.alpha(t))
    with torch.device("cpu"):  # where its tables are made, whatever the default device is
        scheduler = DDPMScheduler(
            num_steps, trained_betas=betas, clip_sample=False, prediction_type="sample", variance_type="fixed_large"
        )
        scheduler.set_timesteps(num_steps)
    # The scheduler's own levels, which it keeps in float32.
    signal = scheduler.alphas_cumprod.to(torch.float64)
    x = latents.to(torch.float64)
    for index in scheduler.timesteps:
        sigma = ((1 - signal[index]) / signal[index]).sqrt()
        denoised = denoise(x / signal[index].sqrt(), sigma).to(torch.float64)
        with torch.device("cpu"):
            x = scheduler.step(denoised, index, x, generator=_for_diffusers(generator)).prev_sample
    return x


@torch.no_grad()
def sample_predictor_corrector(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    num_steps: int = 1000,
    sigma_min: float = 0.02,
    sigma_max: float = 100.0,
    correct_steps: int = 1,
    snr: float = 0.16,
    generator: Generators = None,
) -> Tensor:
    """Reverse-diffusion predictor with a Langevin corrector, for the VE process (Song et al. 2021, appendix G).

    At each of `num_steps` noise levels in geometric progression, `correct_steps` Langevin steps and then one reverse
    diffusion step to the level below, the last of them without noise. Diffusers' `ScoreSdeVeScheduler` makes the
    predictor's step. Not the corrector's: its step size, Song et al.'s ``2 (r |z| / |score|)^2``, has both norms
    averaged over the batch, so that an image depends on those sampled with it; and from an image's own norms a step
    size that varies with the image biases the law. Here both are what they are for pure noise, sqrt(D) and
    sqrt(D) / sigma, hence a step of ``2 (r sigma)^2``. It leaves a variance too large by at most r^2, relatively.

    Args:
        denoise: D(x; sigma), x (B, ...) float64 and sigma () float64.
        latents: (B, ...), standard normal.
        num_steps: noise levels; evaluations are num_steps (1 + correct_steps).
        sigma_min, sigma_max: extremes of the noise level.
        correct_steps: Langevin steps at each level. 0: the predictor alone.
        snr: r, the signal-to-noise ratio of a Langevin step.
        generator: source of the noise: one generator, or a sequence with one for each image.

    Returns:
        (B, ...) float64 images.

    Raises:
        ValueError: fewer than two levels, or not one generator for each image.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, one for each extreme of the noise; got {num_steps}.")
    check_generators(generator, len(latents))
    source = _for_diffusers(generator)
    with torch.device("cpu"):
        scheduler = ScoreSdeVeScheduler(num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
    levels = scheduler.discrete_sigmas.to(torch.float64).flip(0)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return (denoise(x, sigma).to(torch.float64) - x) / sigma**2

    x = levels[0] * latents.to(torch.float64)
    for sigma, t in zip(levels, scheduler.timesteps, strict=True):
        for _ in range(correct_steps):
            step = 2 * (snr * sigma) ** 2
            noise = randn_tensor(tuple(x.shape), source, x.device, x.dtype)
            x = x + step * score(x, sigma) + (2 * step).sqrt() * noise
        slope = score(x, sigma)
        with torch.device("cpu"):
            predicted = scheduler.step_pred(slope, t, x, generator=source)
        x = predicted.prev_sample
    return predicted.prev_sample_mean
