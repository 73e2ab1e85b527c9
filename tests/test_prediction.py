"""The linear table y = a x0 + b noise, and the preconditionings of Karras et al. 2022, Table 1."""

import numpy as np
import pytest
import torch

from oracles import GOLDEN, SHARED, TABLE, images, normal, rows, worst
from stf_diffusers.prediction import (
    PREDICTION_TYPES,
    edm_preconditioning,
    prediction_coefficients,
    raw_output_coefficients,
    recover_x0_and_noise,
    ve_preconditioning,
    vp_preconditioning,
)

PRECONDITIONINGS = {"edm": edm_preconditioning, "ve": ve_preconditioning, "vp": vp_preconditioning}
SIGMA = torch.tensor([0.002, 0.02, 0.3, 0.5, 1.0, 5.0, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table(prediction_type, dtype):
    alpha, sigma = torch.tensor([1.0, 0.8, 0.1], dtype=dtype), torch.tensor([0.002, 0.6, 0.9], dtype=dtype)
    a, b = prediction_coefficients(prediction_type, alpha, sigma)
    assert a.dtype == b.dtype == dtype and a.shape == b.shape == alpha.shape
    for got, expected in zip((a, b), TABLE[prediction_type](alpha, sigma), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_table_is_complete():
    assert set(PREDICTION_TYPES) == set(TABLE)


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"must be one of epsilon, sample, .*got 'eps'"):
        prediction_coefficients("eps", torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("prediction_type", TABLE)
@pytest.mark.parametrize("process", ["ve", "vp", "flow"])
def test_recovers_x0_and_noise(prediction_type, process):
    """The map (x0, noise) -> (y, x_t) is inverted wherever it is invertible."""
    sigma = torch.linspace(0.1, 0.95, 8, dtype=torch.float64)
    alpha = {"ve": torch.ones_like(sigma), "vp": (1 - sigma**2).sqrt(), "flow": 1 - sigma}[process]
    x0, noise = images(8, 3, 8, 8, dtype=torch.float64), normal(8, 3, 8, 8, dtype=torch.float64)
    alpha, sigma = rows(alpha, x0), rows(sigma, x0)
    a, b = TABLE[prediction_type](alpha, sigma)
    got = recover_x0_and_noise(a * x0 + b * noise, alpha * x0 + sigma * noise, a, b, alpha, sigma)
    assert worst(got[0], x0) < 1e-12 and worst(got[1], noise) < 1e-12


@pytest.mark.parametrize("name", PRECONDITIONINGS)
@pytest.mark.parametrize("folder", [GOLDEN, SHARED / "oracle"], ids=["slice", "whole"])
def test_golden_preconditioning(name, folder):
    """D = c_skip x + c_out F(c_in x, c_noise) for F(z, c) = 0.3 z + 0.01 c + 0.1, as NVlabs/edm computes it."""
    path = folder / "preconditioning.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    sigma, x, expected = (torch.from_numpy(np.load(path)[f"{name}_{part}"]) for part in ("sigma", "input", "denoised"))
    x, expected = x.flatten(1), expected.flatten(1)
    c_skip, c_out, c_in, c_noise = (c[:, None] for c in PRECONDITIONINGS[name](sigma))
    denoised = c_skip * x + c_out * (0.3 * c_in * x + 0.01 * c_noise + 0.1)
    error = (denoised - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() < 1e-5


def test_edm_preconditioning_has_unit_variances():
    """Karras et al. 2022, eqs. 114 and 117: network inputs and targets have unit variance; c_out = sigma sigma_data c_in."""
    for sigma_data in (0.5, 1.7):
        c_skip, c_out, c_in, c_noise = edm_preconditioning(SIGMA, sigma_data)
        torch.testing.assert_close(c_in**2 * (sigma_data**2 + SIGMA**2), torch.ones_like(SIGMA))
        target_variance = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMA**2) / c_out**2
        torch.testing.assert_close(target_variance, torch.ones_like(SIGMA))
        torch.testing.assert_close(c_noise, SIGMA.log() / 4)


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_raw_output_is_a_row_of_the_table(name):
    """F = (x0 - c_skip x) / c_out equals a x0 + b noise; its plain squared error is the loss weighted by 1 / c_out^2."""
    x0, noise = images(7, 12, dtype=torch.float64), normal(7, 12, dtype=torch.float64)
    c_skip, c_out, _, _ = (rows(c, x0) for c in PRECONDITIONINGS[name](SIGMA))
    a, b = (rows(c, x0) for c in raw_output_coefficients(PRECONDITIONINGS[name](SIGMA), SIGMA))
    raw = (x0 - c_skip * (x0 + rows(SIGMA, x0) * noise)) / c_out
    torch.testing.assert_close(a * x0 + b * noise, raw, rtol=1e-10, atol=1e-9)
    if name != "edm":  # VE's raw output is minus the noise, VP's the noise (c_out = -sigma)
        torch.testing.assert_close(raw, -noise if name == "ve" else noise, rtol=1e-10, atol=1e-9)


def test_karras_weights_are_one_in_raw_output_space():
    """Table 1's loss weights, lambda(sigma), times c_out^2 are 1 for EDM, VE and VP."""
    weights = {"edm": (SIGMA**2 + 0.25) / (0.5 * SIGMA) ** 2, "ve": SIGMA**-2, "vp": SIGMA**-2}
    for name, weight in weights.items():
        torch.testing.assert_close(weight * PRECONDITIONINGS[name](SIGMA).c_out ** 2, torch.ones_like(SIGMA))
