"""Samples and their distances from the training images, shared out over the processes."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from huggingface_hub import cached_assets_path
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import said_where_it_fails
from image_data import ImageColumn
from stf_diffusers.export import METADATA_KEY, network_of, sampling_labels, save_pipeline
from stf_diffusers.metrics import FeatureStatistics
from stf_diffusers.model_card import model_card
from stf_diffusers.quality import FeatureExtractor, SampleQuality, sample_quality, transformers_features
from training_log import tracker_may_fail

logger = logging.getLogger("train_unconditional_stf")

# Below it precision and recall, with their three neighbours, cannot be computed.
SMALLEST = 5
RECORDS, BEST = "evaluations.json", "best"


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    indices: list[int],
    *,
    seed_of: Callable[[int], int],
    label_of: Callable[[int], int] | None = None,
    batch_size: int,
    num_inference_steps: int,
) -> list[Image.Image]:
    """The images of these numbers: each a function of the pipeline, its number's seed and its label alone."""
    pipeline.set_progress_bar_config(disable=True)
    labels = sampling_labels(network_of(pipeline), pipeline.scheduler.config[METADATA_KEY])
    images: list[Image.Image] = []
    for start in range(0, len(indices), batch_size):
        which = indices[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed_of(index)) for index in which]
        # `DiTPipeline` has no batch size, and guides by itself.
        how: dict[str, Any] = (
            {"guidance_scale": 1.0} if hasattr(pipeline, "transformer") else {"batch_size": len(which)}
        )
        if labels:
            how["class_labels"] = [label_of(index) if label_of else labels[index % len(labels)] for index in which]
        images += pipeline(generator=generators, num_inference_steps=num_inference_steps, **how).images
    return images


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """(n, C, H, W) uint8."""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays.reshape(*arrays.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()


def gathered(features: Tensor) -> Tensor:
    """Rows `rank::processes` of each process (k, d), put in order."""
    parts = gather_object([features.numpy()])
    # A process without rows does not know how wide they are.
    whole = np.empty((sum(map(len, parts)), max(part.shape[1] for part in parts)), dtype=np.float32)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return torch.from_numpy(whole)


def data_features(images: ImageColumn, extractor: FeatureExtractor, cache_dir: str | None, quiet: bool) -> Tensor:
    """Features of all images (N, d), each process computing a part; read from the cache where they were computed before."""
    state = PartialState()
    key = f"{images.digest(at_most=2048)} {len(images)} {extractor.name}"
    folder = cached_assets_path("stf_diffusers", "features", assets_dir=cache_dir)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    present = path.is_file()
    if all(gather_object([present])):
        return load_file(path)["features"]
    rows = list(range(len(images)))[state.process_index :: state.num_processes]
    parts = []
    for start in tqdm(range(0, len(rows), 256), desc="Features of the data", unit="batch", disable=quiet):
        parts.append(extractor(images.__getitems__(rows[start : start + 256])["images"]))
    features = gathered(torch.cat(parts) if parts else torch.empty(0, 1))
    if state.is_main_process:
        aside = path.with_name(f".{os.getpid()}-{path.name}")
        save_file({"features": features}, aside)
        os.replace(aside, path)
    return features


class Evaluation:
    """What `--eval_steps` does: samples are drawn and their features computed by all processes alike, and the main process
    compares, records, and keeps the pipeline with the least Fréchet distance in `best/`.

    Raises:
        ValueError: when made, before the training: there is no such extractor, or it does not take the images.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        images: ImageColumn,
        data: str,
        seed_of: Callable[[int], int],
        first_step: int,
    ) -> None:
        self.args, self.accelerator, self.seed_of = args, accelerator, seed_of
        self.reference, self.output_dir = f"{data}, training split", Path(args.output_dir)
        try:
            with accelerator.main_process_first():
                self.extractor = transformers_features(
                    args.eval_extractor, device=accelerator.device, cache_dir=args.cache_dir
                )
            self.extractor(images.__getitems__([0])["images"])
        # Whatever the Hub, a file or a model's own code says.
        except Exception as error:
            raise ValueError(f"--eval_extractor {args.eval_extractor}: {error}") from error
        self.data = data_features(images, self.extractor, args.cache_dir, not accelerator.is_main_process)
        self.statistics = FeatureStatistics.of(self.data)
        if images.labels is not None:
            # The classes of the data, in the data's proportions.
            drawn = torch.randint(
                len(images), (args.eval_num_samples,), generator=torch.Generator().manual_seed(seed_of(-1))
            )
            self.labels: list[int] | None = images.labels[drawn].tolist()
        else:
            self.labels = None
        # What was evaluated after the step that the run goes on from comes again.
        path = self.output_dir / RECORDS
        before = json.loads(path.read_text()) if first_step and path.is_file() else []
        # The main process's: another machine may not see its folder, and all must agree on what is due.
        self.records: list[dict[str, Any]] = broadcast_object_list(
            [[record for record in before if record["step"] <= first_step]]
        )[0]

    def due(self, step: int, max_steps: int) -> bool:
        """Whether there is to be an evaluation after this step, and has been none."""
        wanted = step > 0 and (step % self.args.eval_steps == 0 or step >= max_steps)
        return wanted and all(record["step"] != step for record in self.records)

    def __call__(self, pipeline: DiffusionPipeline, step: int) -> None:
        """Evaluate, record and log."""
        args, state = self.args, self.accelerator
        mine = list(range(args.eval_num_samples))[state.process_index :: state.num_processes]
        labels = self.labels
        images = sample_images(
            pipeline.to(state.device),
            mine,
            seed_of=self.seed_of,
            label_of=None if labels is None else labels.__getitem__,
            batch_size=args.train_batch_size,
            num_inference_steps=args.num_inference_steps,
        )
        samples = gathered(self.extractor(as_pixels(images)) if mine else torch.empty(0, self.data.shape[1]))
        self.records.append({"step": step})
        if not state.is_main_process:
            return
        quality = sample_quality(
            samples,
            self.data,
            data_statistics=self.statistics,
            extractor=self.extractor.name,
            reference=self.reference,
            sampler=f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}",
            evaluations=args.num_inference_steps,
            seeds=f"0 to {args.eval_num_samples - 1} of seed {args.seed}",
        )
        report = {
            "frechet_distance": quality.frechet_distance,
            "kernel_distance": quality.kernel_distance.value,
            "precision": quality.precision,
            "recall": quality.recall,
        }
        self.records[-1] |= report | {"measured": quality.stamp, "limits": quality.limits}
        with said_where_it_fails("the evaluation", self.output_dir):
            # In this order: what is on record is done with, and a run that dies before comes back to it.
            if self._is_best(quality):
                self._keep(pipeline)
            self._write(self.output_dir / RECORDS, self.records)
        logger.info("Step %d: Fréchet distance %.4g (%s).", step, quality.frechet_distance, quality.stamp)
        with tracker_may_fail():
            state.log({f"eval/{name}": value for name, value in report.items()}, step=step)

    def metrics(self, step: int) -> dict[str, float] | None:
        """What the model card says of the pipeline of this step."""
        record = next((record for record in self.records if record["step"] == step and "measured" in record), None)
        if record is None:
            return None
        return {
            f"Fréchet distance, {record['measured']}": record["frechet_distance"],
            "Kernel distance, likewise": record["kernel_distance"],
            "Precision, likewise": record["precision"],
            "Recall, likewise": record["recall"],
        }

    def _is_best(self, quality: SampleQuality) -> bool:
        """Among this run's evaluations that were measured alike; what else lies in the folder is no rival."""
        rivals = [record["frechet_distance"] for record in self.records[:-1] if record["measured"] == quality.stamp]
        present = (self.output_dir / BEST / "evaluation.json").is_file()
        return not present or quality.frechet_distance < min(rivals, default=math.inf)

    def _keep(self, pipeline: DiffusionPipeline) -> None:
        folder = self.output_dir / BEST
        (folder / "evaluation.json").unlink(missing_ok=True)  # it is not that of what comes now
        save_pipeline(pipeline, folder)
        card = model_card(
            pipeline,
            repository=str(folder),
            num_inference_steps=self.args.num_inference_steps,
            metrics=self.metrics(self.records[-1]["step"]),
        )
        card.save(folder / "README.md")
        self._write(folder / "evaluation.json", self.records[-1])

    @staticmethod
    def _write(path: Path, content: Any) -> None:
        aside = path.with_name(f".writing-{path.name}")
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False))
        os.replace(aside, path)
