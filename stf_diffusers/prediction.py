"""What a network may be asked to predict: every prediction type is linear in (x0, noise).

With ``x_t = alpha * x0 + sigma * noise``, each type is ``y = a * x0 + b * noise``. One table of (a, b) replaces the
pairwise conversions between types, and a preconditioned network's raw output is one more row of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# name -> (a, b) as functions of (alpha, sigma); names as Diffusers spells them.
_COEFFICIENTS = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(sigma)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(sigma)),
    # Salimans & Ho 2022, appendix D.
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    # Lipman et al. 2023 with t growing towards the noise, as in Stable Diffusion 3.
    "flow_prediction": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(sigma)),
    # Song et al. 2021: the conditional score is -(x_t - alpha x0) / sigma^2.
    "score": lambda alpha, sigma: (torch.zeros_like(alpha), -1 / sigma),
}

PREDICTION_TYPES = tuple(_COEFFICIENTS)


def prediction_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The row (a, b) of the linear table ``y = a * x0 + b * noise``.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        alpha: (B,) signal coefficient of the forward process.
        sigma: (B,) noise coefficient of the forward process.

    Returns:
        a, b: each (B,), in the dtype of the inputs.

    Raises:
        ValueError: the type is not in the table.
    """
    if prediction_type not in _COEFFICIENTS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}.")
    return _COEFFICIENTS[prediction_type](alpha, sigma)


def recover_x0_and_noise(
    output: Tensor, noisy: Tensor, a: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve ``output = a x0 + b noise, noisy = alpha x0 + sigma noise`` for (x0, noise).

    Args:
        output, noisy: (B, ...).
        a, b, alpha, sigma: broadcastable to `output`, for instance (B, 1, 1, 1).
    """
    determinant = b * alpha - a * sigma
    return (b * noisy - sigma * output) / determinant, (alpha * output - a * noisy) / determinant


class Preconditioning(NamedTuple):
    """``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`` for ``x = x0 + sigma noise`` (Karras et al. 2022, eq. 7)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_preconditioning(sigma: Tensor, sigma_data: float = 0.5) -> Preconditioning:
    """Karras et al. 2022, Table 1, column "Ours". `sigma`: (B,), positive; `sigma_data`: the data's standard deviation."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return Preconditioning(sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total, sigma.log() / 4)


def ve_preconditioning(sigma: Tensor) -> Preconditioning:
    """Karras et al. 2022, Table 1, column "VE": F is minus the noise. `sigma`: (B,), positive."""
    one = torch.ones_like(sigma)
    return Preconditioning(one, sigma, one, (sigma / 2).log())


def vp_preconditioning(sigma: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Preconditioning:
    """Karras et al. 2022, Table 1, column "VP", with M = 1000. `sigma`: (B,), positive (noise over signal)."""
    time = ((beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt() - beta_min) / beta_d
    return Preconditioning(torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), 999 * time)


def raw_output_coefficients(preconditioning: Preconditioning, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the raw network output ``F = (x0 - c_skip x) / c_out`` for ``x = x0 + sigma noise``.

    In this space the losses of Karras et al. 2022 (Table 1) are an unweighted mean squared error: their weight times
    c_out squared is 1.
    """
    c_skip, c_out, _, _ = preconditioning
    return (1 - c_skip) / c_out, -c_skip * sigma / c_out
