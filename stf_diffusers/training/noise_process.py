"""The noise process of a training, from a name and its parameters, and from the pipeline that is trained further; and the
distribution of the noise levels drawn.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler

from ..adaptive_noise import AdaptiveNoise
from ..diagnostics import target_variance
from ..forward_process import NoiseProcess
from ..noise import EDM, NOISE_PROCESSES
from ..noise_distribution import (
    LogitNormal,
    LogNormal,
    NoiseDistribution,
    Piecewise,
    distribution_from_config,
    distribution_to_config,
)
from ..noise_profile import recommended_distribution
from ..scheduler_process import SchedulerProcess
from ..stock_schedulers import DISCRETE, on_cpu, scheduler_from_config
from .sources import IndexedImages

logger = logging.getLogger(__name__)


# Parameters of "discrete", by the names of Diffusers' training script, and what its schedulers call them.
DISCRETE_PARAMETERS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "prediction_type": "prediction_type",
}


def choose_process(
    noise_process: str | None,
    parameters: Mapping[str, float | str],
    *,
    standard_deviation: Callable[[], float],
    saved: Mapping[str, Any] | None = None,
) -> tuple[NoiseProcess, dict[str, Any]]:
    """The noise process, and the sampling range where one is given. A fine-tuned pipeline's own is the default.

    Args:
        noise_process: a name in `NOISE_PROCESSES`, or "discrete". None: that of `saved`; else "discrete" where one of its
            parameters is given; else "edm".
        parameters: parameters of the process that are given; "auto" for sigma_data: measured, which is the default. EDM
            takes sigma_min and sigma_max too, for sampling.
        standard_deviation: measures that of the data, where it is needed.
        saved: metadata of the pipeline that is trained further (`read_metadata`).

    Raises:
        ValueError: a parameter that the process does not have, or that contradicts the pipeline.
    """
    saved_process = dict(saved["process"]) if saved else {}
    saved_name = saved_process.pop("name", None)
    name = noise_process or saved_name or (DISCRETE if parameters.keys() & DISCRETE_PARAMETERS.keys() else "edm")
    if saved_name is not None and saved_name != name:
        raise ValueError(
            f"noise_process={name!r}, but the pretrained pipeline was trained on {saved_name}: on {name} its network would "
            "have to be trained anew. Leave noise_process= out, or train a new network of its shape: pass the config.json of "
            "its unet as model_config=, without pretrained_model_name_or_path=."
        )
    if name == DISCRETE:
        return _discrete_process(parameters, saved_process.get("scheduler")), {}
    given, ranges = dict(parameters), dict(saved.get("sampling_range", {})) if saved else {}
    if name == "edm":
        if "sigma_data" not in saved_process:
            given.setdefault("sigma_data", "auto")
        ranges |= {limit: given.pop(limit) for limit in ("sigma_min", "sigma_max") if limit in given}
    kind = NOISE_PROCESSES[name]
    if foreign := sorted(given.keys() - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{foreign[0]}= is not a parameter of noise_process={name!r}; leave it out.")
    if given.get("sigma_data") == "auto":
        given["sigma_data"] = round(standard_deviation(), 4)
        if not given["sigma_data"]:
            raise ValueError(
                "the images that sigma_data is measured on are all of one level. Pass sigma_data=, for instance 0.5."
            )
    if given.get("time_distribution", saved_process.get("time_distribution")) != "logit_normal":
        for parameter in ("logit_mean", "logit_std"):
            if parameter in given:
                raise ValueError(f"{parameter}= needs time_distribution='logit_normal'.")
    process = kind(**{**saved_process, **given})
    if isinstance(process, EDM) and abs((measured := standard_deviation()) / process.sigma_data - 1) > 0.2:
        logger.warning(
            "The standard deviation of the data is %.3f, more than 20 %% from sigma_data = %g: sigma_data 'auto' uses the "
            "measured value.", measured, process.sigma_data,
        )  # fmt: skip
    return process, ranges


@on_cpu
def _discrete_process(parameters: Mapping[str, Any], saved: Mapping[str, Any] | None) -> SchedulerProcess:
    """The process of a new `DDPMScheduler`, or of the `saved` config, which the parameters must not contradict."""
    if foreign := sorted(parameters.keys() - DISCRETE_PARAMETERS.keys()):
        raise ValueError(f"{foreign[0]}= is not a parameter of noise_process={DISCRETE!r}; leave it out.")
    if saved is None:
        settings = {DISCRETE_PARAMETERS[name]: value for name, value in parameters.items()}
        process = SchedulerProcess(DDPMScheduler(**settings, clip_sample=False))
        if (largest := process.sampling_range()[1]) < 10:
            logger.warning(
                "At the last of %d timesteps sigma / alpha is %.2g: samples start from pure noise, which the network has not "
                "seen. Use more timesteps (ddpm_num_steps), or the beta schedule squaredcos_cap_v2.",
                len(process.timesteps), largest,
            )  # fmt: skip
        return process
    for name, value in parameters.items():
        own = saved[DISCRETE_PARAMETERS[name]]
        if name == "ddpm_beta_schedule" and saved.get("trained_betas") is not None:
            own = "trained_betas"
        if value != own:
            raise ValueError(
                f"{name}={value!r}, but the pretrained pipeline was trained with {own!r}. Leave {name}= out."
            )
    return SchedulerProcess(scheduler_from_config(dict(saved)))


def choose_distribution(
    noise_distribution: str | None,
    process: NoiseProcess,
    *,
    noise_mean: float | None = None,
    noise_std: float | None = None,
    profile: Callable[[], NoiseDistribution] | None = None,
    begun_with: Mapping[str, Any] | None = None,
    sampling_range: Mapping[str, float] | None = None,
    adaptive_power: float | None = None,
    adaptive_floor: float | None = None,
    device: torch.device | str = "cpu",
) -> NoiseDistribution | None:
    """The distribution of the noise levels sigma / alpha that a training draws, cut off at the process's own range.

    Args:
        noise_distribution: "log_normal"; "logit_normal" or "log_uniform" between the levels at which the process is sampled;
            "profile": what `profile` finds; "adaptive": an `AdaptiveNoise`; or a JSON file of `distribution_to_config`. None: the
            process's own distribution.
        process: the noise process.
        noise_mean, noise_std: of ln(sigma / alpha) for "log_normal", by default Karras et al.'s -1.2 and 1.2; of the logit
            for "logit_normal", by default 0 and 1. For "adaptive" they make "log_normal" its prior, which by default is the
            process's own distribution.
        profile: measures the data, for instance by `profile_of`.
        begun_with: config of the profile of the run that is resumed, which is not measured again.
        sampling_range: "sigma_min" and "sigma_max" of sampling, where they are not the process's own, as from `choose_process`.
        adaptive_power, adaptive_floor: of "adaptive". None: those of `AdaptiveNoise`.
        device: where an adaptive distribution keeps its tables.

    Returns:
        The distribution; None for the process's own.

    Raises:
        ValueError: a parameter that the distribution does not have, a file that is none, or a distribution that has next to
            nothing where the process is trained.
    """
    given = {key: value for key, value in (("mean", noise_mean), ("std", noise_std)) if value is not None}
    if given and noise_distribution not in ("log_normal", "logit_normal", "adaptive"):
        raise ValueError(
            f"noise_{next(iter(given))}= needs noise_distribution='log_normal', 'logit_normal' or 'adaptive'."
        )
    distribution: NoiseDistribution
    low, high = process.sampling_range()
    low, high = ((sampling_range or {}).get(name, own) for name, own in (("sigma_min", low), ("sigma_max", high)))
    if noise_distribution is None:
        return None
    if noise_distribution == "log_normal":
        distribution = LogNormal(**given)
    elif noise_distribution == "logit_normal":
        distribution = LogitNormal(low, high, **given)
    elif noise_distribution == "log_uniform":
        distribution = Piecewise.log_uniform(low, high)
    elif noise_distribution == "profile" and profile is not None:
        distribution = profile() if begun_with is None else distribution_from_config(dict(begun_with))
    elif noise_distribution == "adaptive":
        settings: dict[str, Any] = {"power": adaptive_power, "floor": adaptive_floor, "device": device}
        chosen = {name: value for name, value in settings.items() if value is not None}
        return AdaptiveNoise(process, LogNormal(**given) if given else None, **chosen)
    else:
        distribution = _saved_distribution(Path(noise_distribution))
    process.times_from(distribution, 1, device="cpu")  # one that does not fit fails here
    return distribution


def distribution_settings(
    distribution: NoiseDistribution | None, *, importance_weights: bool = False
) -> dict[str, Any] | None:
    """What a resumed run must share: the config of a distribution; of an adaptive one how it adapts, and its prior's config,
    None for the process's own.
    """
    if not isinstance(distribution, AdaptiveNoise):
        return None if distribution is None else distribution_to_config(distribution)
    return {
        "name": "adaptive",
        "power": distribution.power,
        "floor": distribution.floor,
        "prior": None if distribution.prior_is_own else distribution_to_config(distribution.prior),
        "importance_weights": importance_weights,
    }


def _saved_distribution(path: Path) -> NoiseDistribution:
    try:
        return distribution_from_config(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"noise_distribution={str(path)!r} is none of log_normal, logit_normal, log_uniform, profile and adaptive, and no "
            f'JSON file of a distribution such as {{"name": "piecewise", "levels": [0.1, 1, 10], "weights": [1, 2]}}: {error}.'
        ) from error


# The measurement for a distribution: as many images at most, noise levels, and draws at each.
PROFILE_IMAGES, PROFILE_LEVELS, PROFILE_DRAWS = 5_000, 24, 64


def profile_of(
    images: IndexedImages, process: NoiseProcess, *, seed: int, device: torch.device | str = "cpu"
) -> Piecewise:
    """Half of the noise levels as a process draws them, half in proportion to the data's conditional entropy rate.

    Measured on at most `PROFILE_IMAGES` images, within their classes where they have some, at noise levels from 0.05 to 100.
    All processes of a launch get what the first one has measured.

    Args:
        images: the images of the training.
        process: the noise process.
        seed: random seed for the choice of images and the noise.
        device: where to compute.
    """
    draws = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randperm(len(images), generator=draws, device="cpu")[:PROFILE_IMAGES].sort().values
    labels = None if images.labels is None else images.labels[rows]
    levels = torch.logspace(math.log10(0.05), 2, PROFILE_LEVELS, dtype=torch.float64, device="cpu")
    # Of x_t only the noise level matters here, and every process's levels are times of EDM.
    measured = target_variance(
        EDM(), images.__getitems__(rows.tolist())["images"], levels,
        num_samples=PROFILE_DRAWS, labels=labels, device=device, generator=draws,
    )  # fmt: skip
    times = process.sample_t(100_000, generator=draws)
    drawn = process.sigma(times) / process.alpha(times)
    found = [distribution_to_config(recommended_distribution(measured, drawn[drawn.isfinite()]))]
    broadcast_object_list(found)
    distribution = distribution_from_config(found[0])
    assert isinstance(distribution, Piecewise)
    return distribution
