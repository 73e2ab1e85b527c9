"""The noise process of a training, from a name and its parameters, and from the pipeline that is trained further."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..noise import EDM, NOISE_PROCESSES, NoiseProcess

logger = logging.getLogger(__name__)


def choose_process(
    noise_process: str | None,
    parameters: Mapping[str, float | str],
    *,
    standard_deviation: Callable[[], float],
    saved: Mapping[str, Any] | None = None,
) -> tuple[NoiseProcess, dict[str, Any]]:
    """The noise process, and the sampling range where one is given. A fine-tuned pipeline's own is the default.

    Args:
        noise_process: a name in `NOISE_PROCESSES`. None: that of `saved`, else "edm".
        parameters: parameters of the process that are given; "auto" for sigma_data: measured, which is the default. EDM
            takes sigma_min and sigma_max too, for sampling.
        standard_deviation: measures that of the data, where it is needed.
        saved: metadata of the pipeline that is trained further (`read_metadata`).

    Raises:
        ValueError: a parameter that the process does not have, or that contradicts the pipeline.
    """
    saved_process = dict(saved["process"]) if saved else {}
    saved_name = saved_process.pop("name", None)
    name = noise_process or saved_name or "edm"
    if saved_name is not None and saved_name != name:
        raise ValueError(f"noise_process={name!r}, but the pretrained pipeline was trained on {saved_name}.")
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
