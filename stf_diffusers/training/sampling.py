"""Images by seed: the same on any number of processes and in any batch; and grids of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from torch import Tensor

from ..export import METADATA_KEY, network_of, sampling_labels
from ..image_grid import image_grid, names_of_labels

# The file beside many generated images that says how they were made.
SETTINGS = "settings.json"


def seed_for(*parts: int) -> int:
    """A seed below 2^63 that is a function of its parts, so that every draw can be repeated from the step it belongs to."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def seeded_generator(device: torch.device, *parts: int) -> torch.Generator:
    """A generator on `device` with `seed_for(*parts)`."""
    return torch.Generator(device).manual_seed(seed_for(*parts))


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    indices: Sequence[int],
    *,
    seed_of: Callable[[int], int],
    label_of: Callable[[int], int] | None = None,
    batch_size: int,
    num_inference_steps: int,
    sigmas: Sequence[float] | None = None,
) -> list[Image.Image]:
    """The images with these numbers, each a function of the pipeline, its number's seed and its label alone.

    Args:
        pipeline: as `diffusers_pipeline` makes it, or an `STFPipeline`, which samples by its `default_solver`.
        indices: numbers of the images.
        seed_of: an image's seed, by its number.
        label_of: an image's class, by its number. None: all that the network knows in turn.
        batch_size: images at a time.
        num_inference_steps: sampling steps.
        sigmas: for the `STFPipeline` of any network, sampled as a consistency model: levels between the steps.
    """
    pipeline.set_progress_bar_config(disable=True)
    labels = sampling_labels(network_of(pipeline), pipeline.scheduler.config[METADATA_KEY])
    images: list[Image.Image] = []
    for start in range(0, len(indices), batch_size):
        which = indices[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed_of(index)) for index in which]
        # `DiTPipeline` has no batch size, and guides by itself.
        how: dict[str, Any] = (
            {"guidance_scale": 1.0} if isinstance(pipeline, DiTPipeline) else {"batch_size": len(which)}
        )
        if sigmas is not None:
            how |= {"solver": "consistency", "sigmas": sigmas}
        if labels:
            how["class_labels"] = [label_of(index) if label_of else labels[index % len(labels)] for index in which]
        with torch.device("cpu"):  # Diffusers makes tensors on the default device, whatever that of the pipeline is
            images += pipeline(generator=generators, num_inference_steps=num_inference_steps, **how).images
    return images


def sample_grid(
    pipeline: DiffusionPipeline, num_samples: int, *, seed: int, batch_size: int, num_inference_steps: int
) -> Image.Image:
    """A grid of images, shared out over the processes; image k depends on the seed and k alone. Collective.

    Where the classes have names, the name of its class stands beneath each image.

    Args:
        pipeline: as `diffusers_pipeline` makes it; moved to this process's device.
        num_samples: images in the grid; small ones are enlarged.
        seed: random seed for the grid.
        batch_size, num_inference_steps: as for `sample_images`.
    """
    state = PartialState()
    mine = list(range(num_samples))[state.process_index :: state.num_processes]
    images = sample_images(
        pipeline.to(state.device),
        mine,
        seed_of=partial(seed_for, seed),
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
    )
    gathered_pairs = gather_object(list(zip(mine, images, strict=True)))
    ordered = [image for _, image in sorted(gathered_pairs, key=lambda pair: pair[0])]
    metadata = pipeline.scheduler.config[METADATA_KEY]
    labels = sampling_labels(network_of(pipeline), metadata)
    of_images = [labels[index % len(labels)] for index in range(num_samples)] if labels else []
    names = names_of_labels(of_images, metadata.get("class_names"))
    return image_grid(ordered, math.ceil(math.sqrt(num_samples)), names, min_width=64)


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size and mode as (n, C, H, W) uint8."""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays.reshape(*arrays.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
