"""`stf_diffusers.quality` as a module of `evaluate`: ``evaluate.load(".../stf_diffusers/evaluate_modules/sample_quality")``."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image

from stf_diffusers.feature_extractors import transformers_features
from stf_diffusers.metrics import nearest_neighbors
from stf_diffusers.quality import sample_quality

_DESCRIPTION = """
Fréchet distance, kernel distance, precision and recall of generated images from data, on the features of a vision model of
transformers, and the share of copies of data. Every result says what it was measured on, and why it may not be compared.
"""

_INPUTS = """
Args:
    predictions: generated PIL images, all of one size and mode.
    data: PIL images to compare with, of the same size and mode; as many as you like. (`references` must be as many as
        `predictions` in evaluate, so it is not used.)
    extractor: name or folder of a vision model of transformers.
    reference, sampler, seeds: stamped on the result: which data and split, how the images were made, and their seeds.
    evaluations: number of network evaluations per image, if known.
    device, batch_size: device and batch size for computing the features.
Returns:
    frechet_distance, kernel_distance, kernel_distance_standard_error (over fresh predictions and data), precision, recall,
    copies (share of predictions three times closer to one datum than to any other, in pixels), measured (how, in one line),
    limits (why not comparable).
"""

_CITATION = """
@inproceedings{heusel2017gans, title={GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={NeurIPS}, year={2017}}
"""


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(image) for image in images]
    if len({array.shape for array in arrays}) != 1 or arrays[0].dtype != np.uint8:
        raise ValueError("images must be of one size and mode, with 8 bits a channel.")
    stacked = np.stack(arrays)
    return torch.from_numpy(stacked.reshape(*stacked.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()


class SampleQualityMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Image()}),
        )

    def _compute(
        self,
        predictions: Sequence[Image.Image],
        data: Sequence[Image.Image],
        extractor: str,
        reference: str,
        sampler: str,
        seeds: str,
        evaluations: int | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> dict[str, Any]:
        samples, originals = _pixels(predictions), _pixels(data)
        if samples.shape[1:] != originals.shape[1:]:
            raise ValueError(
                f"predictions and data must be alike; got {tuple(samples.shape[1:])} and {tuple(originals.shape[1:])}."
            )
        features = transformers_features(extractor, device=device)
        quality = sample_quality(
            features(samples, batch_size),
            features(originals, batch_size),
            extractor=features.name,
            reference=reference,
            sampler=sampler,
            seeds=seeds,
            evaluations=evaluations,
        )
        nearest = nearest_neighbors(samples.flatten(1), originals.flatten(1))
        return {
            "frechet_distance": quality.frechet_distance,
            "kernel_distance": quality.kernel_distance.value,
            "kernel_distance_standard_error": quality.kernel_distance.standard_error,
            "precision": quality.precision,
            "recall": quality.recall,
            "copies": nearest.copies().double().mean().item(),
            "measured": quality.stamp,
            "limits": quality.limits,
        }
