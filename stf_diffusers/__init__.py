"""Train diffusion models on low-variance targets with Hugging Face Diffusers: the Stable Target Field."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .consistency import ConsistencySchedule, ConsistencyTrainingObjective
from .denoising import network_denoiser
from .diagnostics import target_variance
from .forward_process import NoiseProcess
from .noise import EDM, VE, VP, FlowMatching
from .objective import PerturbedBatch, STFTrainingObjective
from .posterior import PosteriorMean, posterior_mean
from .reference_bank import ReferenceBank
from .reference_batch import ReferenceBatchCollator, ReferenceBatchSampler
from .reference_set import SharedReferences
from .scheduler_process import SchedulerProcess
from .solvers import Churn, Discretization, log_likelihood, sample_ode, sample_rk45

if TYPE_CHECKING:
    from .pipeline_stf import STFPipeline
    from .scheduling_edm_heun import EDMHeunScheduler

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Churn",
    "ConsistencySchedule",
    "ConsistencyTrainingObjective",
    "Discretization",
    "EDMHeunScheduler",
    "FlowMatching",
    "NoiseProcess",
    "PerturbedBatch",
    "PosteriorMean",
    "ReferenceBank",
    "ReferenceBatchCollator",
    "ReferenceBatchSampler",
    "STFPipeline",
    "STFTrainingObjective",
    "SchedulerProcess",
    "SharedReferences",
    "log_likelihood",
    "network_denoiser",
    "posterior_mean",
    "sample_ode",
    "sample_rk45",
    "target_variance",
]

# What needs Diffusers is imported at first use: importing the package needs torch alone.
_MODULE_OF = {"EDMHeunScheduler": "scheduling_edm_heun", "STFPipeline": "pipeline_stf"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
