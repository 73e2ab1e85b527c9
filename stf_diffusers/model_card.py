"""The README of a trained pipeline's folder: what it is, how it was trained, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from .consistency_sampling import intermediate_levels, is_consistency_model
from .export import (
    METADATA_KEY,
    image_shape,
    network_of,
    process_from_config,
    process_to_config,
    sampling_labels,
    stock_pipeline_class,
)
from .forward_process import NoiseProcess
from .scheduler_process import SchedulerProcess
from .stock_schedulers import DISCRETE_SCHEDULERS

_TEMPLATE = """---
{header}
---

# {title}

{kind} image {what}, {height}×{width}, {channels} channel(s), {parameters:.1f} M parameters,
{target}.

| | |
|---|---|
{rows}

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}")
images = pipe({arguments}, num_inference_steps={steps}).images
```

{advice}

With `stf_diffusers` installed, {solver}:

```python
from stf_diffusers import STFPipeline

pipe = STFPipeline.from_pretrained("{repository}")
images = pipe(batch_size=4, num_inference_steps={more_steps}{more}).images
```
{two_steps}{picture}{measured}
## Citation

```bibtex
@inproceedings{{xu2023stable,
  title     = {{Stable Target Field for Reduced Variance Score Estimation in Diffusion Models}},
  author    = {{Xu, Yilun and Tong, Shangyuan and Jaakkola, Tommi}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2023}}
}}
```
"""

_HEUN = "Heun's method (Karras et al. 2022) in 18 steps, 35 evaluations of the network"
_TWO_STEPS = "two steps (Song et al. 2023, Algorithm 1), with fresh noise of level {level:g} between them"

_PLAIN_TWO_STEPS = """
Nearly the same two steps in plain Diffusers, whose SDE solver keeps a share ({level:g} / {sigma_max:g})² of the first noise:

```python
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler

pipe = DiffusionPipeline.from_pretrained("{repository}")
pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(
    pipe.scheduler.config, algorithm_type="sde-dpmsolver++", sigma_min={level:g}
)
images = pipe({arguments}, num_inference_steps=2).images
```
"""

_CONSISTENCY_ADVICE = (
    "It is a consistency model: one step is how it samples, and what this pipeline class takes by default. More steps of the "
    "saved scheduler follow an ODE, for which this network was not made."
)
_ADVICE = {
    "ConsistencyModelPipeline": "Always pass `num_inference_steps`: this pipeline class takes a single step without it, "
    "which is far too few for this model.",
    "DDPMPipeline": "Without `num_inference_steps` the pipeline takes 1,000 steps; the multistep solver that is saved "
    "needs a few tens.",
    "discrete": "`num_inference_steps` can be at most the number of timesteps above, with which the images are best: the "
    "scheduler is that of the training. In a few tens of steps, use a multistep solver or `stf_diffusers`.",
    "LDMPipeline": "The pipeline decodes with the autoencoder in `vqvae/`: the scale of the latents that the network was trained "
    "on is part of it.",
    "DiTPipeline": "Class 1000 stands for no class. The pipeline decodes with the autoencoder in `vae/`: the scale of the latents "
    "that the network was trained on is part of it.",
}


_PICTURE = """
## Samples

![Samples, not selected]({grid})
"""

_MEASURED = """
## Measured

| | |
|---|---|
{rows}
"""

_TARGETS = {
    "ect": "tuned by Easy Consistency Tuning (Geng et al., 2024) with `stf_diffusers`",
    "stf": "trained on the Stable Target Field (Xu et al., ICLR 2023) with `stf_diffusers`",
    "dsm": "trained by denoising score matching with `stf_diffusers`",
    None: "sampled with `stf_diffusers`",
}
_TAGS = {"stf": ["stable-target-field"], "dsm": ["denoising-score-matching"], "ect": [], None: []}


def model_card(
    pipeline: DiffusionPipeline,
    *,
    repository: str,
    num_inference_steps: int,
    dataset: str | None = None,
    grid: str | None = None,
    license: str | None = None,
    metrics: dict[str, float] | None = None,
) -> ModelCard:
    """The card of a pipeline made by `diffusers_pipeline`, from the metadata in its scheduler.

    Args:
        pipeline: the pipeline; rows of the card that its metadata does not tell are left out.
        repository: what `from_pretrained` is to be given: a repository id or a folder.
        num_inference_steps: number of sampling steps shown; for a consistency model, one is.
        dataset: name of the training data, as a person would recognise it. None: that in the metadata.
        grid: path of a sample grid beside the card, to be shown in it.
        license: an identifier the Hub knows. None: that in the metadata; without one, no licence is claimed.
        metrics: what was measured on samples, by names that say how: "Fréchet distance, DINOv2 features, 50,000 samples
            (Heun, 18 steps, seeds 0 to 49,999) against the training split".
    """
    network = network_of(pipeline)
    metadata: dict[str, Any] = pipeline.scheduler.config.get(METADATA_KEY) or {}
    process = process_from_config(metadata["process"]) if "process" in metadata else pipeline.process
    classes = sampling_labels(network, metadata)
    vae = next(
        (part for part in (getattr(pipeline, name, None) for name in ("vae", "vqvae")) if part is not None), None
    )
    channels, height, width = image_shape(network, vae)
    objective = metadata.get("objective", "stf" if "reference_batch_size" in metadata else None)
    stock = stock_pipeline_class(network, process, vae)
    labels = f"class_labels={[classes[k % len(classes)] for k in range(4)]}" if classes else ""
    arguments = [] if stock.__name__ == "DiTPipeline" else ["batch_size=4"]
    arguments += [labels] if labels else []
    if stock.__name__ == "DiTPipeline" and not metadata.get("class_dropout"):
        arguments.append("guidance_scale=1.0")
    more = [labels] if labels else []
    if channels not in (1, 3, 4):
        more.append('output_type="np"')
        arguments.append('output_type="np"')
    advice = _ADVICE["discrete" if type(pipeline.scheduler).__name__ in DISCRETE_SCHEDULERS else stock.__name__]
    fields = {
        "what": "diffusion model",
        "tag": "diffusion",
        "steps": num_inference_steps,
        "advice": advice,
        "solver": _HEUN,
        "more_steps": 18,
    }
    if is_consistency_model(metadata):
        fields |= _consistency_fields(pipeline.scheduler.config, process, repository, ", ".join(arguments))
    header = ModelCardData(
        library_name="diffusers",
        license=license or metadata.get("license"),
        pipeline_tag="unconditional-image-generation",
        tags=[*_TAGS[objective], fields["tag"]],
    )
    return ModelCard(
        _TEMPLATE.format(
            **{"two_steps": "", **fields},
            header=header.to_yaml(),
            title=repository.rstrip("/").split("/")[-1],
            kind="A class-conditional" if metadata.get("num_classes", len(classes)) else "An unconditional",
            height=height,
            width=width,
            channels=channels,
            parameters=network.num_parameters() / 1e6,
            target=_TARGETS[objective],
            rows=_table(_training_rows(metadata, process, objective, dataset)),
            repository=repository,
            more="".join(f", {argument}" for argument in more),
            arguments=", ".join(arguments),
            picture=_PICTURE.format(grid=grid) if grid else "",
            measured=_MEASURED.format(rows=_table({k: f"{v:.4g}" for k, v in metrics.items()})) if metrics else "",
        ),
        ignore_metadata_errors=False,
    )


def _consistency_fields(
    config: Mapping[str, Any], process: NoiseProcess, repository: str, arguments: str
) -> dict[str, Any]:
    """What the card of a consistency model says of sampling."""
    sigma_max = config.get("sigma_max") or process.sampling_range()[1]
    (level,) = intermediate_levels(2, sigma_max, saved=config[METADATA_KEY].get("consistency_sigmas"))
    numbers = {"level": level, "sigma_max": sigma_max}
    plain = _PLAIN_TWO_STEPS.format(**numbers, repository=repository, arguments=arguments)
    return {
        "what": "consistency model",
        "tag": "consistency-model",
        "steps": 1,
        "advice": _CONSISTENCY_ADVICE,
        "solver": _TWO_STEPS.format(level=level),
        "more_steps": 2,
        "two_steps": plain if process.scheduler_family == "edm" else "",
    }


def _training_rows(
    metadata: dict[str, Any], process: NoiseProcess, objective: str | None, dataset: str | None
) -> dict[str, str | None]:
    """How the network was trained, by what it is called; None where the metadata do not tell."""
    parameters = process_to_config(process)
    name = parameters.pop("name").upper()
    if isinstance(process, SchedulerProcess):
        config = process.scheduler.config
        betas = "trained_betas" if config["trained_betas"] is not None else config["beta_schedule"]
        parameters = {
            "timesteps": config["num_train_timesteps"],
            "betas": betas,
            "prediction": config["prediction_type"],
        }
    references = {
        "stf": f"{metadata.get('reference_batch_size', 0):,}"
        + (" (all of the data)" if metadata.get("reference") == "bank" else ""),
        "dsm": "none (denoising score matching)",
        "ect": "none (Easy Consistency Tuning)",
    }
    return {
        "data": dataset or metadata.get("dataset"),
        "classes": _list_of(metadata.get("class_names") or []),
        "noise process": f"{name} ({', '.join(f'{k} = {v}' for k, v in parameters.items())})",
        "references per target": references.get(objective or ""),
        "optimizer steps": f"{metadata['steps']:,}" if "steps" in metadata else None,
        "images seen": f"{metadata['images_seen']:,}" if "images_seen" in metadata else None,
        "noise levels between steps": "; ".join(
            f"{steps} steps: {', '.join(f'{level:g}' for level in levels)}"
            for steps, levels in (metadata.get("consistency_sigmas") or {}).items()
        ),
        "weights": {True: "averaged over the training (EMA)", False: "as trained"}.get(metadata.get("use_ema", "")),
    }


def _list_of(class_names: Sequence[str], at_most: int = 20) -> str:
    """The names of the classes by number, not more than so many of them."""
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(class_names[:at_most]))
    return shown + (f", ... ({len(class_names):,} in all)" if len(class_names) > at_most else "")


def _table(rows: Mapping[str, str | None]) -> str:
    """Rows of a Markdown table, of what is known."""
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
