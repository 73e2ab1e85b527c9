"""The noise levels between the steps of a consistency model, searched for on samples and saved in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline

from ..export import METADATA_KEY
from ..feature_extractors import FeatureExtractor
from ..metrics import FeatureStatistics, frechet_distance
from ..pipeline_stf import STFPipeline
from .evaluation import SMALLEST, data_features, gathered, labels_like
from .sampling import as_pixels, sample_images, seed_for
from .sources import IndexedImages

CANDIDATES = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0, 5.0)


class LevelSearch(NamedTuple):
    """`sigmas` by number of steps from 2, and the `distances` by number of steps from 1, ``{1: 5.1, 2: 4.5}``.

    `tried` has all levels whose samples were compared, with their distances.
    """

    sigmas: dict[int, list[float]]
    distances: dict[int, float]
    tried: list[tuple[list[float], float]]


def search_levels(
    pipeline: DiffusionPipeline,
    extractor: FeatureExtractor,
    data: FeatureStatistics,
    *,
    num_inference_steps: int = 2,
    candidates: Sequence[float] = CANDIDATES,
    labels: Sequence[int] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
) -> LevelSearch:
    """The levels whose samples are nearest to the data in squared Fréchet distance. Collective.

    Greedy: the best level for two steps stays, and the best to go with it makes three. All levels are tried on the same
    seeds. Which is best is decided on these samples, so that its distance is a little too small: measure on other seeds.

    Args:
        pipeline: a consistency model, as `diffusers_pipeline` makes it or an `STFPipeline`; moved to this process's device.
        extractor: what computes features; `pixel_features` where there is no network.
        data: statistics of the same features of the training images.
        num_inference_steps: N, at least 2. All numbers of steps up to it are searched.
        candidates: levels to choose from; those of `EDM` may lie anywhere below the largest.
        labels: class of each sample. None: all that the network knows in turn.
        num_samples: samples for each distance, at least 5.
        seed: random seed for the samples: image k depends on it and k alone.
        batch_size: samples at a time.

    Raises:
        ValueError: N below 2, too few samples, labels or candidates, or candidates that the network does not know.
    """
    different = sorted(set(candidates), reverse=True)
    if num_inference_steps < 2:
        raise ValueError(
            f"a single step has no levels: num_inference_steps must be at least 2; got {num_inference_steps}."
        )
    if len(different) < num_inference_steps - 1:
        raise ValueError(
            f"{num_inference_steps} steps need {num_inference_steps - 1} different candidates; got {different}."
        )
    if num_samples < SMALLEST or (labels is not None and len(labels) < num_samples):
        raise ValueError(
            f"num_samples must be at least {SMALLEST}, with a label for each; got {num_samples}"
            + ("." if labels is None else f" and {len(labels)} labels.")
        )
    state = PartialState()
    model = STFPipeline(**pipeline.components).to(state.device)
    mine = list(range(num_samples))[state.process_index :: state.num_processes]

    def distance(levels: list[float]) -> float:
        images = sample_images(
            model,
            mine,
            seed_of=partial(seed_for, seed),
            label_of=None if labels is None else labels.__getitem__,
            batch_size=batch_size,
            num_inference_steps=len(levels) + 1,
            sigmas=levels,
        )
        features = gathered(extractor(as_pixels(images)) if mine else torch.empty(0, len(data.mean)))
        # The main process's: sums on other machines may differ in their last bits, and all must choose alike.
        return float(broadcast_object_list([frechet_distance(FeatureStatistics.of(features), data)])[0])

    best: list[float] = []
    sigmas, distances, tried = {}, {1: distance([])}, []
    for steps in range(2, num_inference_steps + 1):
        options = [sorted([*best, level], reverse=True) for level in different if level not in best]
        results = [(levels, distance(levels)) for levels in options]
        best, distances[steps] = min(results, key=lambda result: result[1])
        sigmas[steps] = best
        tried += results
    return LevelSearch(sigmas, distances, tried)


def search_for_images(
    pipeline: DiffusionPipeline,
    images: IndexedImages,
    extractor: FeatureExtractor | None = None,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    cache_dir: str | None = None,
    quiet: bool = False,
) -> LevelSearch:
    """`search_levels` for the training images, with their classes in their proportions. Collective.

    Args:
        pipeline, num_samples, seed, batch_size: as for `search_levels`.
        images: the training images.
        extractor: what computes features. None: `pixel_features`.
        cache_dir, quiet: as for `data_features`.
    """
    extractor = extractor or pixel_features()
    data = FeatureStatistics.of(data_features(images, extractor, cache_dir, quiet))
    labels = labels_like(images, num_samples, seed)
    return search_levels(
        pipeline, extractor, data, labels=labels, num_samples=num_samples, seed=seed, batch_size=batch_size
    )


def save_levels(pipeline: DiffusionPipeline, sigmas: dict[int, list[float]]) -> None:
    """Write levels by number of steps into the pipeline's scheduler, which takes them along when it is saved."""
    metadata = pipeline.scheduler.config.get(METADATA_KEY) or {}
    saved = {str(steps): list(levels) for steps, levels in sigmas.items()}
    pipeline.scheduler.register_to_config(**{METADATA_KEY: {**metadata, "consistency_sigmas": saved}})


def pixel_features(side: int = 8) -> FeatureExtractor:
    """Colours of images averaged over at most `side` x `side` fields: features for a search where no network is at hand.

    On the digits the level that they choose is the best or next to it; distances in them say little about how images look.
    """

    def compute(images: torch.Tensor) -> torch.Tensor:
        height, width = (min(side, length) for length in images.shape[2:])
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, (height, width)).flatten(1)

    return FeatureExtractor(f"{side}x{side} pixels", compute)
