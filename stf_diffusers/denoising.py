"""A trained network as the denoiser D(x; sigma) that the solvers integrate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .forward_process import NoiseProcess, expand_as_rows
from .prediction import recover_x0_and_noise

# D(x; sigma): x (B, ...) float64, sigma () or (B,) float64 -> (B, ...), an estimate of E[x0 | x0 + sigma noise = x].
Denoiser = Callable[[Tensor, Tensor], Tensor]


def network_denoiser(
    network: nn.Module,
    process: NoiseProcess,
    *,
    class_labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
) -> Denoiser:
    """The denoiser D(x; sigma), for ``x = x0 + sigma noise``, of a network trained on `process`.

    Every process is seen in the same unscaled space: ``x = x_t / alpha(t)``, at the time where sigma(t) / alpha(t) is
    the `sigma` asked for. What the network sees there and what its output means are the process's own
    (`NoiseProcess.input_scale`, `timestep`, `output_coefficients`). The network runs in its parameters' dtype, all else
    in the dtype of x. The result can be differentiated; the samplers switch gradients off.

    Args:
        network: called as Diffusers' `UNet2DModel` is, ``network(sample, timestep, class_labels).sample``.
        process: `EDM`, `VE`, `VP` or `FlowMatching`.
        class_labels: (B,) integer classes, one for each image to be sampled.
        guidance_scale: w of classifier-free guidance, ``D_null + w (D_class - D_null)`` (Ho & Salimans 2022,
            arXiv 2207.12598, eq. 6, with w - 1 there for w here). 1: no guidance. Otherwise each evaluation runs the
            network on 2B rows.
        null_label: the class that stands for a dropped condition; needed for guidance.

    Raises:
        ValueError: guidance without labels or without a null label; as many labels as images are needed in each call.
    """
    if guidance_scale != 1 and (class_labels is None or null_label is None):
        raise ValueError(
            f"guidance_scale={guidance_scale} needs class_labels and null_label, the class that stands for no condition "
            "in training. Pass both, or guidance_scale=1.0."
        )
    # A module without parameters is a formula, and runs in the precision of the solver.
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float64)

    def output_of(model_input: Tensor, timestep: Tensor) -> Tensor:
        if class_labels is None:
            return network(model_input, timestep).sample
        labels = class_labels.to(model_input.device)
        if guidance_scale == 1 or null_label is None:
            return network(model_input, timestep, labels).sample
        both = torch.cat([torch.full_like(labels, null_label), labels])
        pair = network(torch.cat([model_input] * 2), torch.cat([timestep] * 2), both).sample
        null, conditional = pair.to(torch.float64).chunk(2)
        return null + guidance_scale * (conditional - null)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if class_labels is not None and len(class_labels) != len(x):
            raise ValueError(f"{len(class_labels)} class_labels for {len(x)} images: pass one label for each image.")
        t = process.time_of(torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)))
        noisy = expand_as_rows(process.alpha(t), x) * x
        model_input = (expand_as_rows(process.input_scale(t), x) * noisy).to(dtype)
        # Timesteps stay in float32 for a half-precision network, as in training.
        output = output_of(model_input, process.timestep(t).to(torch.promote_types(dtype, torch.float32)))
        coefficients = *process.output_coefficients(t), process.alpha(t), process.sigma(t)
        return recover_x0_and_noise(output.to(x.dtype), noisy, *(expand_as_rows(c, x) for c in coefficients))[0]

    return denoise
