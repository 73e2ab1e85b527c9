"""Tensors on the CPU work whatever the default device is. The meta device stands for a GPU: nothing can be read from it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from exact_networks import small_unet
from oracles import images
from stf_diffusers import (
    EDM,
    VE,
    VP,
    EDMHeunScheduler,
    FlowMatching,
    ReferenceBank,
    ReferenceBatchCollator,
    ReferenceBatchSampler,
    STFPipeline,
    STFTrainingObjective,
    posterior_mean,
    target_variance,
)
from stf_diffusers.denoising import network_denoiser
from stf_diffusers.metrics import kernel_distance
from stf_diffusers.solvers import Discretization, log_likelihood, sample_ode, sample_rk45

X, LABELS = images(12, 3, 4, 4), torch.arange(12) % 3
PIXELS = ((X + 1) * 127).to(torch.uint8)
UNET = small_unet()
SCHEDULERS = [DDPMScheduler(), EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()]


@pytest.fixture(autouse=True)
def other_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("sigma", [0.01, 2.0])
@pytest.mark.parametrize("references", [X, PIXELS], ids=["float", "uint8"])
def test_posterior_mean(references, sigma):
    assert posterior_mean(X, references, alpha=1.0, sigma=sigma).mean.isfinite().all()


@pytest.mark.parametrize("process", [EDM(), VE(), VP(), FlowMatching()], ids=lambda process: type(process).__name__)
def test_objective(process):
    for more in ({}, {"labels": LABELS, "reference_labels": LABELS}):
        batch = STFTrainingObjective(process).perturb(X, reference=X, **more)
        assert batch.target.device.type == "cpu" and batch.target.isfinite().all()


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_schedulers(scheduler):
    assert STFTrainingObjective.from_scheduler(scheduler).perturb(X, reference=X).target.isfinite().all()


def test_bank():
    bank = ReferenceBank(PIXELS, LABELS, augmentation="horizontal_flip")
    index = torch.arange(12, device="cpu")
    for more in ({}, {"labels": LABELS}, {"subset_size": 12, "source_index": index, "labels": LABELS}):
        assert bank.posterior_mean(X, 1.0, 2.0, **more).mean.isfinite().all()


def test_lists_and_batches():
    assert len(next(iter(ReferenceBatchSampler(12, 2, 6)))) == 6
    assert len(next(iter(ReferenceBatchSampler(12, 2, 6, labels=LABELS)))) == 6
    batch = ReferenceBatchCollator(2)([{"images": np.zeros((3, 4, 4), np.float32), "label": 1}] * 4)
    assert {tensor.device.type for tensor in batch.values()} == {"cpu"}


@pytest.mark.parametrize("labels", [None, LABELS])
def test_target_variance(labels):
    found = target_variance(EDM(), X, [2.0], reference_batch_sizes=[2], num_samples=4, labels=labels)[0]
    assert found.factor("epsilon") > 0 and found.dsm.value > 0


def test_kernel_distance():
    assert kernel_distance(X.flatten(1), X.flatten(1) + 1, num_subsets=2).value > 0


def test_bank_of_a_file(tmp_path):
    ReferenceBank(PIXELS, LABELS).save(tmp_path / "bank.safetensors")
    bank = ReferenceBank.open(tmp_path / "bank.safetensors")
    assert bank.posterior_mean(X, 1.0, 2.0, labels=LABELS).mean.isfinite().all()


@pytest.mark.parametrize("row", [Discretization.edm, Discretization.ve, Discretization.vp])
@pytest.mark.parametrize("method", ["heun", "euler"])
def test_fixed_steps(row, method):
    assert sample_ode(lambda x, sigma: x / (1 + sigma**2), X, row(4), method=method).isfinite().all()


def test_adaptive_steps_and_likelihood():
    denoise = network_denoiser(UNET, EDM())
    x = X[:2, :1].double()
    assert sample_rk45(denoise, x, rtol=0.1, atol=0.1).images.isfinite().all()
    assert log_likelihood(denoise, x, rtol=0.1, atol=0.1).nats.isfinite().all()


@pytest.mark.parametrize("solver", ["heun", "euler", "rk45", "consistency"])
def test_pipeline(solver):
    pipeline = STFPipeline(UNET, EDMHeunScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    call = {"num_inference_steps": 2, "solver": solver, "tolerance": 0.1, "generator": generator, "output_type": "pt"}
    seen = []
    if solver != "rk45":
        call["callback_on_step_end"] = lambda _, step, timestep, tensors: seen.append(float(timestep))
    assert pipeline(1, **call).images.isfinite().all()
    assert len(seen) == (0 if solver == "rk45" else 2)


def test_heun_scheduler():
    scheduler = EDMHeunScheduler(sigma_schedule="exponential")
    scheduler.set_timesteps(3)
    x = X * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps.tolist():
        x = scheduler.step(scheduler.scale_model_input(x, timestep), timestep, x).prev_sample
    assert x.isfinite().all()
