"""Diffusers' schedulers as the description of a training: in configs, and where another package saved them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from .forward_process import NoiseProcess
from .noise import EDM, NOISE_PROCESSES, FlowMatching
from .scheduler_process import SchedulerProcess

# The name of a `SchedulerProcess`, and the schedulers that a network trained on one is saved with: `DDPMPipeline` calls them
# as they need.
DISCRETE = "discrete"
DISCRETE_SCHEDULERS: dict[str, type[Any]] = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}


P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """The function, in which the tables of new schedulers are on the CPU whatever the default device is."""

    @wraps(function)
    def called(*arguments: P.args, **keywords: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*arguments, **keywords)

    return called


def scheduler_to_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's class and settings as JSON values, without keys that are private to a package."""
    config = json.loads(scheduler.to_json_string())
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


@on_cpu
def scheduler_from_config(config: dict[str, Any]) -> DDPMScheduler | DDIMScheduler:
    """The scheduler of a process named "discrete", the inverse of `scheduler_to_config`.

    Raises:
        ValueError: it is of another class.
    """
    name = config.get("_class_name")
    if name not in DISCRETE_SCHEDULERS:
        raise ValueError(f"the saved scheduler {name!r} is not one of {', '.join(DISCRETE_SCHEDULERS)}.")
    scheduler: DDPMScheduler | DDIMScheduler = DISCRETE_SCHEDULERS[name].from_config(config)
    return scheduler


def refuse_learned_variances(name: str, scheduler: Mapping[str, Any], network: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError where the config of a scheduler, or of the network beside it, tells of learned variances.

    Args:
        name: the scheduler's class.
        scheduler: its config.
        network: config of the network, where it is to be looked at.
    """
    if (variance := scheduler.get("variance_type")) in ("learned", "learned_range"):
        raise ValueError(
            f"this {name} with variance_type {variance!r} samples a network only if it predicts variances too, which is not "
            "trained here. Choose another pipeline. If its network returns as many channels as it takes, set variance_type to "
            "'fixed_small' in its scheduler_config.json."
        )
    if network and network.get("out_channels") and network["out_channels"] == 2 * network["in_channels"]:
        raise ValueError(
            f"the network returns {network['out_channels']} channels for images of {network['in_channels']}: it predicts "
            "variances too, which is not trained here. Choose another."
        )


@on_cpu
def process_of_scheduler(scheduler: Any) -> NoiseProcess:
    """What a network that another package trained was trained on, by the scheduler saved beside it.

    Flow-matching schedulers mean `FlowMatching`, those that precondition as Karras et al. do mean `EDM`, and those that
    can take a `DDPMScheduler`'s place mean that one's process.

    Raises:
        ValueError: it means none of these, or a network that returns variances too.
    """
    config, name = scheduler.config, type(scheduler).__name__
    refuse_learned_variances(name, config)
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)
    predicted = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
    if flow or config.get("use_flow_sigmas"):
        if predicted == "flow_prediction" and config["num_train_timesteps"] == 1000:  # what the network's timestep is
            return FlowMatching()
    elif hasattr(scheduler, "precondition_outputs"):
        if predicted == "epsilon":
            return EDM(sigma_data=config["sigma_data"])
    elif DDPMScheduler in getattr(scheduler, "compatibles", ()) and predicted in ("epsilon", "v_prediction", "sample"):
        kind = DISCRETE_SCHEDULERS.get(name, DDPMScheduler)
        # Not scheduler.config: from_config takes defaults of one class for those of the other, and betas differ in theirs.
        found = kind.from_config({"clip_sample": False, **scheduler_to_config(scheduler)})
        if torch.allclose(
            found.alphas_cumprod, torch.as_tensor(scheduler.alphas_cumprod, device="cpu").float(), atol=1e-6
        ):
            return SchedulerProcess(found, interpolate=True)
    raise ValueError(
        f"the config of this {name} (prediction_type {predicted!r}, num_train_timesteps "
        f"{config.get('num_train_timesteps')}) does not say which noise process the network was trained on, or it is none of "
        f"{', '.join((*NOISE_PROCESSES, DISCRETE))}. Load the folder that the training saved, with the scheduler in it, or "
        "sample in plain Diffusers."
    )


def trained_betas(sigmas: torch.Tensor) -> list[float]:
    """The betas of a discrete variance-preserving chain with the given noise-to-signal ratios.

    Args:
        sigmas: (T,) float64, positive, strictly increasing: sigma/alpha at timesteps 0 .. T - 1.

    Returns:
        T floats for a Diffusers scheduler's `trained_betas`: ``1 - abar_i / abar_{i-1}`` with
        ``abar = 1 / (1 + sigma^2)`` and ``abar_{-1} = 1``.
    """
    # log1p and expm1: as a difference of products of numbers near 1 the smallest betas would keep few digits.
    log_signal = -torch.log1p(sigmas.to(torch.float64) ** 2)
    return (-torch.expm1(torch.diff(log_signal, prepend=log_signal.new_zeros(1)))).tolist()
