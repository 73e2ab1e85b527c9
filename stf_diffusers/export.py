"""Trained networks as folders of Diffusers' own classes, which plain Diffusers loads and samples."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)

from .files import sync
from .forward_process import EDM_SAMPLING_RANGE, NoiseProcess
from .noise import NOISE_PROCESSES
from .scheduler_process import SchedulerProcess
from .stock_schedulers import (
    DISCRETE,
    DISCRETE_SCHEDULERS,
    on_cpu,
    process_of_scheduler,
    refuse_learned_variances,
    scheduler_from_config,
    scheduler_to_config,
    trained_betas,
)

# Key of the training metadata in the saved scheduler's config. Diffusers keeps keys that start with an underscore
# through loading and saving, and does not warn of them.
METADATA_KEY = "_stf"

# Every folder that a saved pipeline may have.
PIPELINE_PARTS = ("unet", "unet_raw", "transformer", "transformer_raw", "vae", "vqvae", "scheduler")

# The denoisers that are saved here.
Network: TypeAlias = UNet2DModel | DiTTransformer2DModel

# sigma / alpha above which there is next to no signal: levels are not told apart there.
_NO_SIGNAL = 1000.0

# `DiTPipeline` takes this class for a dropped condition, whatever the network's number of classes.
DIT_NULL_LABEL = 1000


def process_to_config(process: NoiseProcess) -> dict[str, Any]:
    """A noise process as a JSON dictionary, ``{"name": "edm", "sigma_data": 0.5, ...}``.

    That of a scheduler is ``{"name": "discrete", "scheduler": {"_class_name": "DDPMScheduler", ...}}``, with its config.

    Raises:
        TypeError: the process is not in `NOISE_PROCESSES`, nor that of a `DDPMScheduler` or `DDIMScheduler`.
    """
    if isinstance(process, SchedulerProcess) and process.scheduler_name in DISCRETE_SCHEDULERS:
        return {"name": DISCRETE, "scheduler": scheduler_to_config(process.scheduler)}
    for name, kind in NOISE_PROCESSES.items():
        # One that derives from it is another process.
        if isinstance(process, kind) and type(process) is kind:
            return {"name": name, **dataclasses.asdict(process)}
    raise TypeError(
        f"only {', '.join(NOISE_PROCESSES)} processes and those of {' and '.join(DISCRETE_SCHEDULERS)} can be saved; got "
        f"{process}."
    )


def process_from_config(config: dict[str, Any]) -> NoiseProcess:
    """The inverse of `process_to_config`.

    Raises:
        ValueError: the name is neither "discrete" nor in `NOISE_PROCESSES`.
    """
    parameters = dict(config)
    name = parameters.pop("name", None)
    if name == DISCRETE:
        return SchedulerProcess(scheduler_from_config(parameters["scheduler"]), interpolate=True)
    if name not in NOISE_PROCESSES:
        raise ValueError(f"the saved noise process {name!r} is not one of {', '.join((*NOISE_PROCESSES, DISCRETE))}.")
    process: NoiseProcess = NOISE_PROCESSES[name](**parameters)
    return process


@on_cpu
def sampling_scheduler(
    process: NoiseProcess, sigma_min: float | None = None, sigma_max: float | None = None, *, scales_input: bool = False
) -> (
    EDMDPMSolverMultistepScheduler
    | DPMSolverMultistepScheduler
    | FlowMatchEulerDiscreteScheduler
    | DDPMScheduler
    | DDIMScheduler
):
    """The Diffusers scheduler whose samples follow `process`: what is saved beside a network trained on it.

    It depends on the process's `scheduler_family`. EDM networks get the EDM variant of DPM-Solver++. Networks with integer
    timesteps (VE, VP) get DPM-Solver++ with `trained_betas` that are the process's own noise levels there, visited at Karras
    et al.'s spacing. Flow-matching networks get Euler's method for flows. A `SchedulerProcess` has its own scheduler.

    Args:
        process: a process of `NOISE_PROCESSES`, or that of a `DDPMScheduler` or `DDIMScheduler`.
        sigma_min, sigma_max: EDM alone: extremes of the noise when sampling (default 0.002 and 80).
        scales_input: the pipeline calls `scale_model_input`, which Euler's method for flows lacks: flow-matching networks
            get DPM-Solver++ with the noise levels of flows, which rounds timesteps down to integers. Such pipelines draw no
            noise from a generator, or take labels and few steps: there a `SchedulerProcess` gets DPM-Solver++ as VP does.

    Raises:
        TypeError: a process that no scheduler of Diffusers is known to sample.
        ValueError: a range for a process that has its own, an impossible range, or noise levels that Diffusers cannot represent.
    """
    if process.scheduler_family == "edm":
        low = EDM_SAMPLING_RANGE[0] if sigma_min is None else sigma_min
        high = EDM_SAMPLING_RANGE[1] if sigma_max is None else sigma_max
        if not 0 < low < high:
            raise ValueError(f"sampling needs 0 < sigma_min < sigma_max; got {low} and {high}.")
        return EDMDPMSolverMultistepScheduler(sigma_min=low, sigma_max=high, sigma_data=process.sigma_data)
    if sigma_min is not None or sigma_max is not None:
        raise ValueError(f"sigma_min and sigma_max of {type(process).__name__} are those it was trained with.")
    if process.scheduler_family == "flow":
        if scales_input:
            return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        return FlowMatchEulerDiscreteScheduler()
    if process.scheduler_family is None:
        raise TypeError(f"no Diffusers scheduler is known here for {process}; use EDM, VE, VP or FlowMatching.")
    if isinstance(process, SchedulerProcess) and not scales_input:
        return scheduler_from_config(scheduler_to_config(process.scheduler))
    ratio = _noise_to_signal(process)
    # Where the last levels lie far apart (cosine, zero terminal SNR), several of Karras et al.'s would be rounded to one
    # timestep, and the solver would lose its place.
    spacing = {"use_karras_sigmas": True} if ratio[-1] < 1.02 * ratio[-2] else {"timestep_spacing": "trailing"}
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(ratio),
        trained_betas=trained_betas(ratio),
        prediction_type=process.prediction_type,
        **spacing,
    )
    # Diffusers multiplies a thousand factors near 1 in float32, which loses noise levels below about 0.002.
    kept = (1 / scheduler.alphas_cumprod.double() - 1).sqrt()
    if not bool(((kept / ratio - 1).abs() < 0.01).all()):
        raise ValueError(
            f"the smallest noise levels of {process} (from {ratio[0].item():.2g}) are lost in the float32 tables of "
            "Diffusers' schedulers. Raise sigma_min (VE) or beta_min (VP)."
        )
    return scheduler


def _noise_to_signal(process: NoiseProcess) -> torch.Tensor:
    """(T,) float64: sigma / alpha at a process's integer timesteps, finite also at a zero terminal SNR."""
    t = process.integer_times()
    ratio = process.sigma(t).double() / process.alpha(t).double()
    return torch.where(ratio.isinf(), 2 * ratio[-2], ratio)


def process_of(scheduler: Any, network: Any = None) -> NoiseProcess:
    """The process that the network was trained on, by its own config or that of the scheduler beside it.

    Raises:
        ValueError: neither config says, or the scheduler's noise levels or prediction type are not those of the process;
            or the network predicts variances too.
    """
    refuse_learned_variances(type(scheduler).__name__, scheduler.config, None if network is None else network.config)
    metadata = scheduler.config.get(METADATA_KEY) or {}
    if network is not None:
        metadata = network.config.get(METADATA_KEY) or metadata
    process = process_from_config(metadata["process"]) if "process" in metadata else process_of_scheduler(scheduler)
    if not _follows(scheduler, process):
        raise ValueError(
            f"{type(scheduler).__name__} does not follow {process}, which the network was trained on, and would give "
            "garbage. Keep the scheduler that was saved, or make one with stf_diffusers.export.sampling_scheduler."
        )
    return process


def _samples_flows(scheduler: Any) -> bool:
    return bool(scheduler.config.get("use_flow_sigmas")) or hasattr(scheduler, "scale_noise")


def _follows(scheduler: Any, process: NoiseProcess) -> bool:
    """Whether a scheduler has the noise levels of a process, and expects what its network returns."""
    if _samples_flows(scheduler):
        expected = scheduler.config.get("prediction_type", "flow_prediction")
        return process.scheduler_family == "flow" and expected == "flow_prediction"
    table = SchedulerProcess(scheduler)
    if table.family != process.scheduler_family or table.prediction_type != process.prediction_type:
        return False
    if table.family == "edm":
        return table.sigma_data == process.sigma_data
    found, wanted = (_noise_to_signal(of).clamp(max=_NO_SIGNAL) for of in (table, process))
    return len(found) == len(wanted) and bool(((found / wanted - 1).abs() < 0.01).all())


StockPipeline: TypeAlias = ConsistencyModelPipeline | DDPMPipeline | DiTPipeline | LDMPipeline


def stock_pipeline_class(network: Network, process: NoiseProcess, vae: ModelMixin | None = None) -> type[StockPipeline]:
    """The pipeline class of Diffusers that can sample a network trained on `process`.

    For images: `DDPMPipeline` where it can serve (no classes, not EDM), else `ConsistencyModelPipeline`, the only one
    that scales the network's input as EDM schedulers need and takes class labels. For latents, with their `vae`:
    `LDMPipeline` for a `UNet2DModel` without classes, `DiTPipeline` for a `DiTTransformer2DModel`.

    Raises:
        ValueError: Diffusers has no pipeline for the combination.
    """
    if isinstance(network, DiTTransformer2DModel):
        if vae is None:
            raise ValueError("Diffusers samples a DiTTransformer2DModel with an autoencoder only: pass vae=.")
        if math.isinf(process.last_time):
            raise ValueError(
                f"DiTPipeline starts from noise of variance 1, which {type(process).__name__} lacks. Train a "
                "DiTTransformer2DModel on noise_process='vp' or noise_process='flow'."
            )
        return DiTPipeline
    conditional = network.config["num_class_embeds"] is not None
    if vae is not None:
        if conditional:
            raise ValueError(
                "Diffusers has no pipeline for latents of a UNet2DModel with classes. Use a DiTTransformer2DModel "
                "(model_config='dit_latents'), or leave the classes out."
            )
        return LDMPipeline
    if not conditional and process.scheduler_family != "edm":
        return DDPMPipeline
    if not isinstance(network.config["sample_size"], int):
        height, width = network.config["sample_size"]
        raise ValueError(
            f"the images are {height}x{width}. Diffusers samples EDM networks, and networks with classes, by "
            "ConsistencyModelPipeline, which only makes square images. Pass noise_process='vp', noise_process='ve' or "
            "noise_process='flow' without classes, or one side as resolution=."
        )
    return ConsistencyModelPipeline


def diffusers_pipeline(
    network: Network,
    process: NoiseProcess,
    *,
    vae: ModelMixin | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    metadata: dict[str, Any] | None = None,
) -> StockPipeline:
    """A network trained on `process` as a pipeline of Diffusers' own classes.

    The class is that of `stock_pipeline_class`. `ConsistencyModelPipeline` takes a single step by default, which is
    too few: always pass `num_inference_steps`.

    Args:
        network: the network. It is used as it is, not copied; the process is written into its config.
        process, sigma_min, sigma_max: as for `sampling_scheduler`.
        vae: for a network of latents, the autoencoder that decodes them, divided by its config's `scaling_factor`.
        metadata: JSON values to keep in the saved folder, beside the process's own parameters.

    Raises:
        ValueError: as `sampling_scheduler` and `stock_pipeline_class`.
    """
    kind = stock_pipeline_class(network, process, vae)
    scheduler = sampling_scheduler(process, sigma_min, sigma_max, scales_input=kind is not DDPMPipeline)
    scheduler.register_to_config(**{METADATA_KEY: {**(metadata or {}), "process": process_to_config(process)}})
    # Beside the weights too: a scheduler is exchanged more easily than a network.
    network.register_to_config(**{METADATA_KEY: {"process": process_to_config(process)}})
    if kind is DiTPipeline:
        return DiTPipeline(transformer=network, vae=vae, scheduler=scheduler)
    if kind is LDMPipeline:
        return LDMPipeline(vqvae=vae, unet=network, scheduler=scheduler)
    return kind(unet=network, scheduler=scheduler)


def network_of(pipeline: DiffusionPipeline) -> Network:
    """The denoiser of a pipeline: its `unet`, or its `transformer`."""
    unet = getattr(pipeline, "unet", None)
    return pipeline.transformer if unet is None else unet


@torch.no_grad()
def image_shape(network: Network, vae: ModelMixin | None) -> tuple[int, int, int]:
    """(C, H, W) of the images of a network, by a decode where `vae` decodes its latents."""
    size, channels = network.config["sample_size"], network.config["in_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    if vae is None:
        return channels, height, width
    latents = torch.zeros((1, channels, height, width), dtype=vae.dtype, device=vae.device)
    _, channels, height, width = vae.decode(latents).sample.shape
    return channels, height, width


def sampling_labels(network: Network, metadata: dict[str, Any]) -> list[int]:
    """The labels that a network can be sampled with: its classes, or [] for a network that takes none.

    A network that saw orientations, or a transformer without classes, has one label that stands for plain images.

    Args:
        network: the network.
        metadata: how it was trained, as saved by the training script; {} where that is unknown.
    """
    embeddings = network.config[
        "num_embeds_ada_norm" if isinstance(network, DiTTransformer2DModel) else "num_class_embeds"
    ]
    if embeddings is None:
        return []
    if "num_classes" in metadata:
        count = metadata["num_classes"]
        if count:
            return list(range(count))
        return [DIT_NULL_LABEL if isinstance(network, DiTTransformer2DModel) else 0]
    return [label for label in range(embeddings) if label != metadata.get("null_label")]


@on_cpu
def read_metadata(
    pretrained_model_name_or_path: str | os.PathLike[str], cache_dir: str | None = None
) -> dict[str, Any]:
    """The training metadata of a saved pipeline, a folder or a Hub repository.

    For a pipeline that another package trained: its process and the range of noise levels that it is sampled at.

    Raises:
        OSError: there is no such pipeline.
        ValueError: another package trained it, and its scheduler does not say on which process; or it predicts variances.
    """
    where: dict[str, Any] = {"cache_dir": cache_dir}
    # Any scheduler class, any model class reads the file.
    config = DDPMScheduler.load_config(pretrained_model_name_or_path, subfolder="scheduler", **where)
    parts = DiffusionPipeline.load_config(pretrained_model_name_or_path, **where)
    part = "transformer" if "transformer" in parts else "unet"
    network = UNet2DModel.load_config(pretrained_model_name_or_path, subfolder=part, **where)
    try:
        refuse_learned_variances(str(config.get("_class_name")), config, network)
    except ValueError as error:
        raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
    for described in (config, network):
        if METADATA_KEY in described:
            return dict(described[METADATA_KEY])
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise ValueError(
            f"{pretrained_model_name_or_path}: {config.get('_class_name')} is not a scheduler of Diffusers, so the "
            "noise process that the network was trained on is not known. Save the pipeline with one."
        )
    try:
        process = process_of_scheduler(kind.from_config(config))
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
    limits = ("sigma_min", "sigma_max") if process.scheduler_family == "edm" else ()
    return {
        "process": process_to_config(process),
        "sampling_range": {limit: config[limit] for limit in limits if limit in config},
    }


def save_pipeline(
    pipeline: DiffusionPipeline, folder: str | os.PathLike[str], raw_network: Network | None = None
) -> None:
    """Write a pipeline to `folder`; other files in the folder stay.

    Everything is written aside and synced first, then moved into place file by file, `model_index.json` last. A write that
    fails (a full disk, say) leaves an earlier pipeline whole; a process that dies while files are moved leaves each of them
    whole, some of the new pipeline and some of the earlier one.

    Args:
        pipeline: as from `diffusers_pipeline`.
        folder: made where missing; an earlier pipeline in it is replaced.
        raw_network: a second network for `unet_raw/` or `transformer_raw/` (the weights without averaging, where `unet/`
            or `transformer/` has the average).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        pipeline.save_pretrained(staging)
        if raw_network is not None:
            name = "unet" if isinstance(raw_network, UNet2DModel) else "transformer"
            raw_network.save_pretrained(Path(staging) / f"{name}_raw")
        new = [path.relative_to(staging) for path in Path(staging).rglob("*") if path.is_file()]
        for path in new:
            sync(Path(staging) / path)
        for path in sorted(new, key=lambda path: path == Path("model_index.json")):
            (folder / path).parent.mkdir(exist_ok=True)
            os.replace(Path(staging) / path, folder / path)
    for kind in PIPELINE_PARTS:
        for path in (folder / kind).glob("*"):
            if path.relative_to(folder) not in new:
                path.unlink()
        if (folder / kind).is_dir() and not any((folder / kind).iterdir()):
            (folder / kind).rmdir()
