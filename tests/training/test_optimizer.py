"""Skipped steps of fp16 are seen; the average is the same by many launches and by few."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel

from exact_networks import small_unet
from stf_diffusers.training.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
SETTINGS = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "epsilon": 1e-8}


@pytest.mark.parametrize("finite", [True, False])
def test_a_step_that_fp16_skips_is_seen(finite):
    Accelerator()
    network = small_unet()
    optimizer = AcceleratedOptimizer(
        make_optimizer(network, mixed_precision="fp16", **SETTINGS), scaler=torch.amp.GradScaler("cpu")
    )
    before = network.conv_in.weight.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 if finite else torch.inf)
    optimizer.scaler.scale(torch.ones(()))  # the scaler makes its scale
    optimizer.step()
    assert optimizer.step_was_skipped != finite
    assert torch.equal(before, network.conv_in.weight) != finite


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_others_are_fused(precision):
    assert make_optimizer(small_unet(), mixed_precision=precision, **SETTINGS).defaults["fused"]


def test_averages_by_few_launches_are_the_same():
    """What `ExponentialAverage` has on CUDA, on the CPU: to a rounding of float32."""
    network = small_unet()
    averages = [EMAModel(network.parameters(), use_ema_warmup=True, foreach=foreach) for foreach in (False, True)]
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draws))
        for average in averages:
            average.step(network.parameters())
    for one, other in zip(*(average.shadow_params for average in averages), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
