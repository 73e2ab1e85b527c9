"""Forward processes that tests of the objective run through, by name."""

import pytest
import torch
from torch import Tensor

from oracles import TABLE
from stf_diffusers import (
    EDM,
    VE,
    VP,
    FlowMatching,
    NoiseProcess,
    SchedulerProcess,
)

diffusers = pytest.importorskip("diffusers")

PROCESSES = {
    "EDM": EDM(),
    "VE": VE(),
    "VP": VP(),
    "FlowMatching": FlowMatching(),
    "logit-normal": FlowMatching("logit_normal"),
    "DDPM": SchedulerProcess(diffusers.DDPMScheduler()),
    "DDPM v": SchedulerProcess(diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "DDPM sample": SchedulerProcess(diffusers.DDPMScheduler(prediction_type="sample")),
    "Euler": SchedulerProcess(diffusers.EulerDiscreteScheduler()),
    "Euler v": SchedulerProcess(diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")),
    "EDM-Euler": SchedulerProcess(diffusers.EDMEulerScheduler()),
    "FlowMatch": SchedulerProcess(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
TYPES = [None, *TABLE]
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_type = pytest.mark.parametrize("prediction_type", TYPES)
four_processes = pytest.mark.parametrize("process", [EDM(), VE(), VP(), FlowMatching()], ids=lambda p: type(p).__name__)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coefficients(
    process: NoiseProcess, prediction_type: str | None, t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma, a, b) in float64; the process's own row is tested in test_noise.py."""
    t = t.double()
    alpha, sigma = process.alpha(t).double(), process.sigma(t).double()
    a, b = TABLE[prediction_type](alpha, sigma) if prediction_type else process.output_coefficients(t)
    return alpha, sigma, a, b


# A row for each kind of Diffusers scheduler that can be trained on.
SCHEDULERS = {
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddpm sample": lambda: diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False),
    "ddpm v zero-snr": lambda: diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "ddpm cosine": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddpm scaled": lambda: diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "ddpm short": lambda: diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction"),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "ddim v": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "pndm": lambda: diffusers.PNDMScheduler(),
    "dpm-solver": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm-solver karras": lambda: diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True, prediction_type="v_prediction"
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler v": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    "euler v zero-snr": lambda: diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "edm v": lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "edm dpm-solver": lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.7, sigma_max=20.0),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
