"""Trained networks as folders of Diffusers' own classes, which plain Diffusers loads and samples."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    UNet2DModel,
)

from .noise import EDM, VE, VP, NoiseProcess

# Key of the training metadata in the saved scheduler's config. Diffusers keeps keys that start with an underscore
# through loading and saving, and does not warn of them.
METADATA_KEY = "_stf"

# Extremes of the noise at which EDM networks are sampled (Karras et al. 2022, Table 1).
EDM_SAMPLING_RANGE = (0.002, 80.0)

_PROCESSES: dict[str, type[EDM] | type[VE] | type[VP]] = {"edm": EDM, "ve": VE, "vp": VP}


def process_to_config(process: NoiseProcess) -> dict[str, Any]:
    """A noise process as a JSON dictionary, ``{"name": "edm", "sigma_data": 0.5, ...}``."""
    for name, kind in _PROCESSES.items():
        if isinstance(process, kind):
            return {"name": name, **dataclasses.asdict(process)}
    raise TypeError(f"only {', '.join(_PROCESSES)} processes can be saved; got {type(process).__name__}.")


def process_from_config(config: dict[str, Any]) -> EDM | VE | VP:
    """The inverse of `process_to_config`."""
    parameters = dict(config)
    name = parameters.pop("name", None)
    if name not in _PROCESSES:
        raise ValueError(f"the saved noise process {name!r} is none of {', '.join(_PROCESSES)}.")
    return _PROCESSES[name](**parameters)


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
    return (-torch.expm1(torch.diff(log_signal, prepend=torch.zeros(1, dtype=torch.float64)))).tolist()


def sampling_scheduler(
    process: NoiseProcess, sigma_min: float | None = None, sigma_max: float | None = None
) -> EDMDPMSolverMultistepScheduler | DPMSolverMultistepScheduler:
    """The Diffusers scheduler whose samples follow `process`: what is saved beside a network trained on it.

    EDM networks get the EDM variant of DPM-Solver++. VE and VP networks get DPM-Solver++ with `trained_betas` that are
    the process's own noise levels at the thousand integer timesteps, visited at Karras et al.'s spacing.

    Args:
        process: `EDM`, `VE` or `VP`.
        sigma_min, sigma_max: EDM alone: extremes of the noise when sampling (default 0.002 and 80).

    Raises:
        TypeError: another process.
        ValueError: a range for a process that has its own, an impossible range, or noise levels that Diffusers cannot represent.
    """
    if isinstance(process, EDM):
        low = EDM_SAMPLING_RANGE[0] if sigma_min is None else sigma_min
        high = EDM_SAMPLING_RANGE[1] if sigma_max is None else sigma_max
        if not 0 < low < high:
            raise ValueError(f"sampling needs 0 < sigma_min < sigma_max; got {low} and {high}.")
        return EDMDPMSolverMultistepScheduler(sigma_min=low, sigma_max=high, sigma_data=process.sigma_data)
    if sigma_min is not None or sigma_max is not None:
        raise ValueError(f"sigma_min and sigma_max of {type(process).__name__} are those it was trained with.")
    if isinstance(process, VE):
        ratio = torch.logspace(math.log10(process.sigma_min), math.log10(process.sigma_max), 1000, dtype=torch.float64)
    elif isinstance(process, VP):
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        ratio = process.sigma(t) / process.alpha(t)
    else:
        raise TypeError(f"no Diffusers scheduler is known here for {type(process).__name__}; use EDM, VE or VP.")
    scheduler = DPMSolverMultistepScheduler(trained_betas=trained_betas(ratio), use_karras_sigmas=True)
    # Diffusers multiplies a thousand factors near 1 in float32, which loses noise levels below about 0.002.
    kept = (1 / scheduler.alphas_cumprod.double() - 1).sqrt()
    if not bool(((kept / ratio - 1).abs() < 0.01).all()):
        raise ValueError(
            f"the smallest noise levels of {process} (from {ratio[0].item():.2g}) are lost in the float32 tables of "
            "Diffusers' schedulers. Raise sigma_min (VE) or beta_min (VP)."
        )
    return scheduler


def stock_pipeline_class(unet: UNet2DModel, process: NoiseProcess) -> type[ConsistencyModelPipeline | DDPMPipeline]:
    """`DDPMPipeline` where it can serve (VE and VP without classes), else `ConsistencyModelPipeline`: the one pipeline
    of Diffusers that scales the network's input as EDM schedulers need and takes class labels.
    """
    conditional = unet.config["num_class_embeds"] is not None
    return ConsistencyModelPipeline if conditional or isinstance(process, EDM) else DDPMPipeline


def diffusers_pipeline(
    unet: UNet2DModel,
    process: NoiseProcess,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    metadata: dict[str, Any] | None = None,
) -> ConsistencyModelPipeline | DDPMPipeline:
    """A network trained on `process` as a pipeline of Diffusers' own classes.

    The class is that of `stock_pipeline_class`. `ConsistencyModelPipeline` takes a single step by default, which is
    too few: always pass `num_inference_steps`.

    Args:
        unet: the network. It is used as it is, not copied; its config is told the process.
        process: `EDM`, `VE` or `VP`; as for `sampling_scheduler`, with `sigma_min` and `sigma_max`.
        metadata: JSON values to keep in the saved folder, beside the process's own parameters.
    """
    scheduler = sampling_scheduler(process, sigma_min, sigma_max)
    scheduler.register_to_config(**{METADATA_KEY: {**(metadata or {}), "process": process_to_config(process)}})
    # Beside the weights too: a scheduler is exchanged more easily than a network.
    unet.register_to_config(**{METADATA_KEY: {"process": process_to_config(process)}})
    return stock_pipeline_class(unet, process)(unet=unet, scheduler=scheduler)


def read_metadata(
    pretrained_model_name_or_path: str | os.PathLike[str], cache_dir: str | None = None
) -> dict[str, Any] | None:
    """The training metadata of a saved pipeline, a folder or a Hub repository; None where another package trained it.

    Raises:
        OSError: there is no such pipeline.
    """
    # Any scheduler class reads the file; none is constructed.
    config = DPMSolverMultistepScheduler.load_config(
        pretrained_model_name_or_path, subfolder="scheduler", cache_dir=cache_dir
    )
    return config.get(METADATA_KEY)


def save_pipeline(
    pipeline: DiffusionPipeline, folder: str | os.PathLike[str], raw_unet: UNet2DModel | None = None
) -> None:
    """Write a pipeline to `folder`; other files in the folder stay.

    Everything is written aside and synced first, then moved into place file by file, `model_index.json` last. A write that
    fails (a full disk, say) leaves an earlier pipeline whole; a process that dies while files are moved leaves each of them
    whole, some of the new pipeline and some of the earlier one.

    Args:
        pipeline: as from `diffusers_pipeline`.
        folder: made where missing; an earlier pipeline in it is replaced.
        raw_unet: a second network for `unet_raw/` (the weights without averaging, where `unet/` has the average).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        pipeline.save_pretrained(staging)
        if raw_unet is not None:
            raw_unet.save_pretrained(Path(staging) / "unet_raw")
        new = [path.relative_to(staging) for path in Path(staging).rglob("*") if path.is_file()]
        for name in new:
            with open(Path(staging) / name, "rb") as file:
                os.fsync(file.fileno())
        for name in sorted(new, key=lambda name: name == Path("model_index.json")):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(Path(staging) / name, folder / name)
    for kind in ("unet", "unet_raw", "scheduler"):
        for path in (folder / kind).glob("*"):
            if path.relative_to(folder) not in new:
                path.unlink()
    if raw_unet is None and (folder / "unet_raw").is_dir():
        (folder / "unet_raw").rmdir()
