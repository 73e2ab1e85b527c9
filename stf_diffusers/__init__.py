"""Train diffusion models on low-variance targets with Hugging Face Diffusers: the Stable Target Field."""

from .noise import EDM, VE, VP, FlowMatching, NoiseProcess, SchedulerProcess
from .objective import PerturbedBatch, STFTrainingObjective
from .posterior import PosteriorMean, posterior_mean
from .reference import ReferenceBatchCollator, ReferenceBatchSampler

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "VE",
    "VP",
    "FlowMatching",
    "NoiseProcess",
    "PerturbedBatch",
    "PosteriorMean",
    "ReferenceBatchCollator",
    "ReferenceBatchSampler",
    "STFTrainingObjective",
    "SchedulerProcess",
    "posterior_mean",
]
