"""A pipeline on the Hugging Face Hub: its folder of Diffusers' own classes, a grid of samples, and a model card."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image

from .export import METADATA_KEY, network_of, sampling_labels
from .image_grid import image_grid, names_of_labels
from .model_card import model_card


def upload_pipeline(
    pipeline: DiffusionPipeline,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | None,
    create_pr: bool,
    variant: str | None,
    dataset: str | None,
    license: str | None,
    metrics: dict[str, float] | None,
    num_samples: int,
) -> str:
    """What `STFPipeline.push_to_hub` does."""
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline.save_pretrained(folder, variant=variant)
        grid = None
        if num_samples > 0 and pipeline.channels in (1, 3, 4):
            grid = "samples/grid.png"
            (folder / "samples").mkdir()
            _grid(pipeline, num_samples).save(folder / grid)
        card = model_card(
            pipeline,
            repository=repository,
            num_inference_steps=35,
            dataset=dataset,
            grid=grid,
            license=license,
            metrics=metrics,
        )
        card.save(folder / "README.md")
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=commit_message, create_pr=create_pr
        )
    return commit.commit_url


def _grid(pipeline: DiffusionPipeline, count: int) -> Image.Image:
    metadata = pipeline.scheduler.config.get(METADATA_KEY) or {}
    known = sampling_labels(network_of(pipeline), metadata)
    labels = [known[k % len(known)] for k in range(count)] if known else []
    images = pipeline(
        count,
        class_labels=labels or None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
        return_dict=False,
    )[0]
    names = names_of_labels(labels, metadata.get("class_names"))
    return image_grid(images, math.ceil(math.sqrt(count)), names)
