"""Train diffusion models on low-variance targets with Hugging Face Diffusers: the Stable Target Field."""

from .denoising import network_denoiser
from .noise import EDM, VE, VP, FlowMatching, NoiseProcess, SchedulerProcess
from .objective import PerturbedBatch, STFTrainingObjective
from .posterior import PosteriorMean, posterior_mean
from .reference import ReferenceBatchCollator, ReferenceBatchSampler
from .solvers import Churn, Discretization, log_likelihood, sample_ode, sample_rk45

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Churn",
    "Discretization",
    "FlowMatching",
    "NoiseProcess",
    "PerturbedBatch",
    "PosteriorMean",
    "ReferenceBatchCollator",
    "ReferenceBatchSampler",
    "STFTrainingObjective",
    "SchedulerProcess",
    "log_likelihood",
    "network_denoiser",
    "posterior_mean",
    "sample_ode",
    "sample_rk45",
]
