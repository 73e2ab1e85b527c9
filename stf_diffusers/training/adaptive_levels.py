"""Noise levels that follow the network's error, as a training loop and its checkpoints use them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adaptive_noise import AdaptiveNoise
from ..diagnostics import target_variance
from ..forward_process import NoiseProcess
from ..objective import PerturbedBatch
from ..plotting import plot_adaptive_levels
from .references import References
from .sources import IndexedImages
from .training_log import log_picture, save_figure

logger = logging.getLogger(__name__)

# The errors seen, in a checkpoint.
ADAPTIVE_LEVELS = "noise_levels.safetensors"
# The measurement of the targets' variance: as many images at most, and draws at each level.
_IMAGES, _DRAWS = 50_000, 64


class AdaptiveLevels:
    """An `AdaptiveNoise` that all processes of a training keep alike.

    Args:
        accelerator: the training's Accelerator.
        distribution: what the objective draws from.
        importance_weights: whether the loss is weighted, so that the objective stays that of the prior.
    """

    def __init__(self, accelerator: Accelerator, distribution: AdaptiveNoise, *, importance_weights: bool) -> None:
        self.accelerator, self.distribution, self.weighted = accelerator, distribution, importance_weights
        self._sums: Tensor | None = None

    def weights(self, batch: PerturbedBatch) -> Tensor | None:
        """(B,) weights of the rows for `STFTrainingObjective.loss`; None without importance weights."""
        return self.distribution.importance_weights(batch.sigma / batch.alpha) if self.weighted else None

    def add(self, output: Tensor, batch: PerturbedBatch) -> None:
        """A micro-batch of this process: the network's output (B, ...) and what it was given."""
        error = (output.detach().to(batch.target.dtype) - batch.target).flatten(1).square().mean(1)
        sums = self.distribution.sums_of(batch.sigma / batch.alpha, error)
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self) -> None:
        """After each optimizer step. Collective."""
        if self._sums is not None:
            self.distribution.take(self.accelerator.reduce(self._sums, reduction="sum"))
        self._sums = None

    def save(self, checkpoint: Path, output_dir: Path, step: int) -> None:
        """Write the errors into a checkpoint, as `WeightAverage.save` does."""
        state = {name: value.contiguous() for name, value in self.distribution.state_dict().items()}
        save_file(state, checkpoint / ADAPTIVE_LEVELS)

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote."""
        self.distribution.load_state_dict(load_file(checkpoint / ADAPTIVE_LEVELS))

    def report(self) -> dict[str, float]:
        """The 10th, 50th and 90th percentile of the levels that are drawn."""
        shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=self.accelerator.device)
        found = self.distribution.quantile(shares).exp().tolist()
        return {f"noise_level/percentile_{percent}": level for percent, level in zip((10, 50, 90), found, strict=True)}

    def show(self, path: Path, step: int) -> None:
        """Draw the distribution, its prior and the errors by noise level into a PNG file and the trackers, where matplotlib is
        installed.
        """
        found = self.distribution
        if not self.accelerator.is_main_process:
            return
        tables = [table.cpu() for table in (found.edges, found.prior_weights, found.weights, found.errors)]
        if save_figure(lambda: plot_adaptive_levels(*tables), path):
            log_picture(self.accelerator, Image.open(path).convert("RGB"), step, "noise_distribution")


def subtract_known_variance(
    distribution: AdaptiveNoise,
    process: NoiseProcess,
    images: IndexedImages,
    references: References,
    *,
    mirrored: bool,
    seed: int,
    device: torch.device | str = "cpu",
    memory_gb: float = 4.0,
) -> None:
    """Measure the variance of a training's targets, where they have some, and have the distribution subtract it.

    With all images as references there is none. Otherwise it is measured on at most 50,000 of them at the edges of the
    distribution's pieces: on fewer than all, the variance where very many images are likely comes out too small. All processes
    get what the first one has measured. Collective.

    Args:
        distribution: what the training draws from.
        process: the noise process.
        images: the images of the training.
        references: its references.
        mirrored: whether images are flipped at random.
        seed: random seed for the choice of images and the noise.
        device: where to compute.
        memory_gb: GiB for the images, which are fewer where they would take more.

    Raises:
        ValueError: the variance of its targets is not known: classes whose references are read with the batch.
    """
    if references.bank is not None:
        return
    if references.kind == "batch" and images.labels is not None:
        raise ValueError(
            "noise_distribution='adaptive' subtracts the variance of the targets, and how many references of its class a "
            "target has differs from batch to batch. Pass reference='bank'."
        )
    if references.n >= len(images) and not mirrored:
        return
    draws = torch.Generator("cpu").manual_seed(seed)
    whole = math.prod(images.shape) * (2 if mirrored else 1)
    kept = min(max(_IMAGES, references.n), max(references.n, 2, int(memory_gb * 2**30 / whole)))
    found: list[tuple[list[float], list[float]] | None] = [None]
    if not PartialState().is_main_process:
        distribution.subtract(*broadcast_object_list(found)[0])
        return
    rows = torch.randperm(len(images), generator=draws, device="cpu")[:kept].sort().values
    pixels = images.__getitems__(rows.tolist())["images"]
    labels = None if images.labels is None else images.labels[rows]
    if mirrored:
        pixels = torch.cat([pixels, pixels.flip(-1)])
        labels = None if labels is None else labels.repeat(2)
    times = process.times_at(distribution.edges[1:-1].cpu()).unique()
    sizes = [references.n] if references.kind == "batch" else []
    if references.kind == "batch":
        logger.info("Measuring the variance of the targets on %d images at %d noise levels.", len(pixels), len(times))
    measured = target_variance(
        process, pixels, times, reference_batch_sizes=sizes, num_samples=_DRAWS, labels=labels, device=device,
        generator=draws,
    )  # fmt: skip
    dimension = pixels.shape[1:].numel()
    variances = [(row.stf[sizes[0]] if sizes else row.dsm).value * row.output_factor / dimension for row in measured]
    found = [([row.noise_level for row in measured], variances)]
    distribution.subtract(*broadcast_object_list(found)[0])
