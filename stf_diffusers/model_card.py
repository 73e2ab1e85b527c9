"""The README of a trained pipeline's folder: what it is, how it was trained, how to load it."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from .export import METADATA_KEY, process_from_config, stock_pipeline_class

_TEMPLATE = """---
{header}
---

# {title}

{kind} image diffusion model, {resolution}×{resolution}, {channels} channel(s), {parameters:.1f} M parameters, trained
{target} with `stf_diffusers`.

| | |
|---|---|
{rows}

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}")
images = pipe(batch_size=4, num_inference_steps={steps}{labels}).images
```

{advice}

With `stf_diffusers` installed, Heun's method (Karras et al. 2022) in 18 steps, 35 evaluations of the network:

```python
from stf_diffusers import STFPipeline

pipe = STFPipeline.from_pretrained("{repository}")
images = pipe(batch_size=4, num_inference_steps=18{labels}).images
```
{picture}{measured}
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

_ADVICE = {
    "ConsistencyModelPipeline": "Always pass `num_inference_steps`: this pipeline class takes a single step without it, "
    "which is far too few for this model.",
    "DDPMPipeline": "Without `num_inference_steps` the pipeline takes 1,000 steps; the multistep solver that is saved "
    "needs a few tens.",
}


def model_card(
    pipeline: DiffusionPipeline,
    *,
    repository: str,
    dataset: str,
    num_inference_steps: int,
    grid: str | None = None,
    license: str | None = None,
    metrics: dict[str, float] | None = None,
) -> ModelCard:
    """The card of a pipeline made by `diffusers_pipeline`, from the metadata in its scheduler.

    Args:
        pipeline: the pipeline with its metadata.
        repository: what `from_pretrained` is to be given: a repository id or a folder.
        dataset: name of the training data, as a person would recognise it.
        num_inference_steps: number of sampling steps shown.
        grid: path of a sample grid beside the card, to be shown in it.
        license: an identifier the Hub knows. None: no licence is claimed.
        metrics: what was measured on samples, by names that say how: "Fréchet distance, DINOv2 features, 50,000 samples
            (Heun, 18 steps, seeds 0 to 49,999) against the training split".
    """
    metadata: dict[str, Any] = pipeline.scheduler.config[METADATA_KEY]
    process = dict(metadata["process"])
    stf = metadata.get("objective", "stf") == "stf"
    conditional = pipeline.unet.config["num_class_embeds"] is not None
    rows = {
        "data": dataset,
        "noise process": f"{process.pop('name').upper()} ({', '.join(f'{k} = {v}' for k, v in process.items())})",
        "references per target": f"{metadata['reference_batch_size']:,}" if stf else "none (denoising score matching)",
        "optimizer steps": f"{metadata['steps']:,}",
        "images seen": f"{metadata['images_seen']:,}",
        "weights": "`unet/` averaged over the training (EMA)" if metadata["use_ema"] else "`unet/` as trained",
    }
    header = ModelCardData(
        library_name="diffusers",
        license=license,
        pipeline_tag="unconditional-image-generation",
        tags=["stable-target-field" if stf else "denoising-score-matching", "diffusion"],
    )
    return ModelCard(
        _TEMPLATE.format(
            header=header.to_yaml(),
            title=repository.rstrip("/").split("/")[-1],
            kind="A class-conditional" if conditional else "An unconditional",
            resolution=pipeline.unet.config["sample_size"],
            channels=pipeline.unet.config["in_channels"],
            parameters=pipeline.unet.num_parameters() / 1e6,
            target="on the Stable Target Field (Xu et al., ICLR 2023)" if stf else "by denoising score matching",
            rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
            repository=repository,
            steps=num_inference_steps,
            labels=", class_labels=[0, 1, 2, 3]" if conditional else "",
            advice=_ADVICE[stock_pipeline_class(pipeline.unet, process_from_config(metadata["process"])).__name__],
            measured="\n## Measured\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v:.4g} |\n" for k, v in metrics.items())
            if metrics
            else "",
            picture=f"\n## Samples\n\n![Samples, not selected]({grid})\n" if grid else "",
        ),
        ignore_metadata_errors=False,
    )
