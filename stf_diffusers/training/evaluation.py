"""Distances of samples from the training images, computed by all processes, and the pipeline with the smallest."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..export import save_pipeline
from ..feature_extractors import FeatureExtractor, transformers_features
from ..files import replacing
from ..metrics import FeatureStatistics, frechet_distance
from ..model_card import model_card
from ..pipeline_stf import STFPipeline
from ..quality import SampleQuality, sample_quality
from .run_folder import BEST, RECORDS, explained_write_errors
from .sampling import as_pixels, sample_images, seed_for
from .sources import IndexedImages
from .training_log import tracker_may_fail

logger = logging.getLogger(__name__)

# Below it precision and recall, with their three neighbours, cannot be computed.
SMALLEST = 5


def gathered(features: Tensor) -> Tensor:
    """Rows `rank::processes` of each process (k, d), put in order."""
    parts = gather_object([features.numpy()])
    # A process without rows does not know how wide they are.
    whole = np.empty((sum(map(len, parts)), max(part.shape[1] for part in parts)), dtype=np.float32)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return torch.from_numpy(whole)


def data_features(
    images: IndexedImages, extractor: FeatureExtractor, cache_dir: str | None = None, quiet: bool = False
) -> Tensor:
    """Features of all images (N, d), each process computing a part; read from the cache where they were computed before.

    Collective.

    Args:
        images: the images.
        extractor: the network that computes the features.
        cache_dir: where features are kept. None: Hugging Face's cache.
        quiet: no progress bar.
    """
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
    features = gathered(torch.cat(parts) if parts else torch.empty(0, 1, device="cpu"))
    if state.is_main_process:
        with replacing(path) as file:
            save_file({"features": features}, file)
    return features


def labels_like(images: IndexedImages, count: int, seed: int) -> list[int] | None:
    """Classes of `count` samples, drawn in the data's proportions; None for images without classes."""
    if images.labels is None:
        return None
    generator = torch.Generator("cpu").manual_seed(seed_for(seed, -1))
    rows = torch.randint(len(images), (count,), generator=generator, device="cpu")
    drawn: list[int] = images.labels[rows].tolist()
    return drawn


class Evaluation:
    """Evaluations during a training: samples are drawn and their features computed by all processes alike, and the main
    process compares, records, and keeps the pipeline with the smallest Fréchet distance in `best/`.

    Args:
        accelerator: the training's Accelerator.
        images: the training images.
        output_dir: the run's folder.
        eval_extractor: a vision model of transformers, in a folder or on the Hub.
        eval_steps: optimizer steps between evaluations.
        eval_num_samples: images per evaluation, at least `SMALLEST`.
        num_inference_steps: sampling steps.
        consistency_steps: for a consistency model, numbers of steps whose Fréchet distance is recorded too.
        batch_size: images sampled at a time.
        seed: random seed for the samples: image k depends on it and k alone.
        data_name: the data, as a person would recognise them.
        first_step: the step that the run goes on from; evaluations after it are done again.
        cache_dir: where models and features are kept.

    Raises:
        ValueError: there is no such extractor, or it does not take the images.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images: IndexedImages,
        output_dir: Path,
        *,
        eval_extractor: str,
        eval_steps: int,
        eval_num_samples: int = 1000,
        num_inference_steps: int = 35,
        consistency_steps: Sequence[int] = (),
        batch_size: int = 64,
        seed: int = 0,
        data_name: str,
        first_step: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        self.accelerator, self.output_dir, self.seed = accelerator, output_dir, seed
        self.eval_steps, self.num_samples = eval_steps, eval_num_samples
        self.num_inference_steps, self.batch_size = num_inference_steps, batch_size
        self.consistency_steps = tuple(consistency_steps)
        self.reference = f"{data_name}, training split"
        try:
            with accelerator.main_process_first():
                self.extractor = transformers_features(eval_extractor, device=accelerator.device, cache_dir=cache_dir)
            self.extractor(images.__getitems__([0])["images"])
        # Whatever the Hub, a file or a model's own code says.
        except Exception as error:
            raise ValueError(f"eval_extractor={eval_extractor!r}: {error}") from error
        self.data = data_features(images, self.extractor, cache_dir, not accelerator.is_main_process)
        self.statistics = FeatureStatistics.of(self.data)
        self.labels = labels_like(images, self.num_samples, seed)
        path = output_dir / RECORDS
        before = json.loads(path.read_text()) if first_step and path.is_file() else []
        # The main process's: another machine may not see its folder, and all must agree on what is due.
        self.records: list[dict[str, Any]] = broadcast_object_list(
            [[record for record in before if record["step"] <= first_step]]
        )[0]

    def due(self, step: int, max_steps: int) -> bool:
        """Whether an evaluation is due after this step, and has not been made yet."""
        wanted = step > 0 and (step % self.eval_steps == 0 or step >= max_steps)
        return wanted and all(record["step"] != step for record in self.records)

    def __call__(self, pipeline: DiffusionPipeline, step: int) -> None:
        """Evaluate, record and log. Collective."""
        state = self.accelerator
        samples = self._features(pipeline, self.num_inference_steps)
        few: dict[str, Any] = {}
        if self.consistency_steps:
            model = STFPipeline(**pipeline.components)
            for steps in self.consistency_steps:
                levels = model.consistency_levels(steps)[1:]
                distance = frechet_distance(FeatureStatistics.of(self._features(model, steps, levels)), self.statistics)
                few |= {f"frechet_distance_{steps}_steps": distance, f"sigmas_{steps}_steps": levels}
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
            evaluations=self.num_inference_steps,
            seeds=f"0 to {self.num_samples - 1} of seed {self.seed}",
        )
        report = {
            "frechet_distance": quality.frechet_distance,
            "kernel_distance": quality.kernel_distance.value,
            "precision": quality.precision,
            "recall": quality.recall,
        }
        self.records[-1] |= report | few | {"measured": quality.stamp, "limits": quality.limits}
        with explained_write_errors("the evaluation", self.output_dir):
            # In this order: an evaluation on record is finished, and a run that dies before repeats it.
            if self._is_best(quality):
                self._keep(pipeline)
            write_json(self.output_dir / RECORDS, self.records)
        logger.info("Step %d: Fréchet distance %.4g (%s).", step, quality.frechet_distance, quality.stamp)
        report |= {name: value for name, value in few.items() if name.startswith("frechet")}
        for steps in self.consistency_steps:
            distance, levels = (few[f"{name}_{steps}_steps"] for name in ("frechet_distance", "sigmas"))
            between = ", ".join(f"{level:g}" for level in levels)
            logger.info("In %d steps, with noise of level %s between them: %.4g.", steps, between, distance)
        with tracker_may_fail():
            state.log({f"eval/{name}": value for name, value in report.items()}, step=step)

    def _features(self, pipeline: DiffusionPipeline, steps: int, sigmas: Sequence[float] | None = None) -> Tensor:
        """Features of the samples (N, d)."""
        state = self.accelerator
        mine = list(range(self.num_samples))[state.process_index :: state.num_processes]
        images = sample_images(
            pipeline.to(state.device),
            mine,
            seed_of=partial(seed_for, self.seed),
            label_of=None if self.labels is None else self.labels.__getitem__,
            batch_size=self.batch_size,
            num_inference_steps=steps,
            sigmas=sigmas,
        )
        return gathered(self.extractor(as_pixels(images)) if mine else torch.empty(0, self.data.shape[1], device="cpu"))

    def metrics(self, step: int) -> dict[str, float] | None:
        """What the model card says about this step's pipeline."""
        record = next((record for record in self.records if record["step"] == step and "measured" in record), None)
        if record is None:
            return None
        return {
            f"Fréchet distance, {record['measured']}": record["frechet_distance"],
            "Kernel distance, likewise": record["kernel_distance"],
            "Precision, likewise": record["precision"],
            "Recall, likewise": record["recall"],
        } | {
            f"Fréchet distance in {steps} steps, likewise": record[f"frechet_distance_{steps}_steps"]
            for steps in self.consistency_steps
        }

    def _is_best(self, quality: SampleQuality) -> bool:
        """Whether it is the best of this run's evaluations measured alike; others in the folder do not count."""
        rivals = [record["frechet_distance"] for record in self.records[:-1] if record["measured"] == quality.stamp]
        present = (self.output_dir / BEST / "evaluation.json").is_file()
        return not present or quality.frechet_distance < min(rivals, default=math.inf)

    def _keep(self, pipeline: DiffusionPipeline) -> None:
        folder = self.output_dir / BEST
        (folder / "evaluation.json").unlink(missing_ok=True)  # it belongs to the earlier pipeline
        save_pipeline(pipeline, folder)
        card = model_card(
            pipeline,
            repository=str(folder),
            num_inference_steps=self.num_inference_steps,
            metrics=self.metrics(self.records[-1]["step"]),
        )
        card.save(folder / "README.md")
        write_json(folder / "evaluation.json", self.records[-1])


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False))
