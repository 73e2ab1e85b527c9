"""Held-out error without noise: how far a network is from the posterior mean on images that it was not trained on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch import Tensor

from ..adaptive_noise import AdaptiveNoise
from ..diagnostics import Estimate
from ..export import network_of
from ..forward_process import NoiseProcess
from ..noise_distribution import NoiseDistribution, Piecewise
from ..objective import STFTrainingObjective
from ..plotting import plot_validation
from ..posterior import PosteriorMean, pixels_to_float
from ..reference_bank import ReferenceBank
from ..reference_set import ReferenceSet
from .conditioning import Conditioning
from .data_set import NoSuchSplit, load_split
from .evaluation import gathered, write_json
from .image_data import ImageColumn, open_images
from .references import References
from .run_folder import SAMPLES, VALIDATION, explained_write_errors
from .sampling import seed_for, seeded_generator
from .sources import IndexedImages
from .training_log import save_figure, tracker_may_fail

logger = logging.getLogger(__name__)

NUM_LEVELS = 12
# Fewer images say nothing about a mean error.
SMALLEST = 32
# Probability of a false alarm at an evaluation, over all its noise levels.
FALSE_ALARM = 1e-3
# Random streams of the validation beside those of the training.
_ROWS, _NOISE = -2, -3


class JoinedReferences(ReferenceSet):
    """A bank, and beside it for each row the row's own image, which the bank lacks.

    Args:
        bank: the bank.
        images: (B, ...) the sources.
    """

    def __init__(self, bank: ReferenceBank, images: Tensor) -> None:
        self.bank, self.images = bank, images

    def posterior_mean(
        self,
        noisy: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        *,
        source_index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PosteriorMean:
        return self.bank.posterior_mean(noisy, alpha, sigma, labels=labels, joined=self.images)

    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """The sources are what is joined."""


def open_held_out(
    validation_split: str,
    images: IndexedImages,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    cache_dir: str | None = None,
    skip_corrupt: bool = False,
    **reading: Any,
) -> ImageColumn:
    """The images of another split, read as the training images are.

    Args:
        validation_split: the split, as for `load_split`.
        images: the training images.
        dataset_name, dataset_config_name, train_data_dir, cache_dir: as for `load_split`.
        skip_corrupt, reading: as for `open_images`.

    Raises:
        ValueError: there is no such split, or its images or classes are not like those of the training.
    """
    try:
        dataset = load_split(
            dataset_name, dataset_config_name, train_data_dir, cache_dir=cache_dir, split=validation_split
        )
    except NoSuchSplit as error:
        raise ValueError(
            f"validation_split={validation_split!r}: {error}".replace(" split=", " validation_split=")
        ) from error
    held_out = open_images(
        dataset, skip_corrupt=skip_corrupt, image_memory_gb=0, image_cache=False, quiet=True, **reading
    )
    found, needed = (
        f"{kind.shape}" + (f" in {kind.num_classes} classes" if kind.num_classes is not None else "")
        for kind in (held_out, images)
    )
    unknown: list[int] = []
    if held_out.labels is not None and images.labels is not None:
        unknown = sorted(set(held_out.labels.tolist()) - set(images.labels.tolist()))
    if found != needed or held_out.class_names != images.class_names or unknown:
        raise ValueError(
            f"validation_split={validation_split!r} has images of {found}, the training images are of {needed}; both must have "
            f"the same shape and classes{f', and no training image is of class {unknown}' if unknown else ''}. Choose another."
        )
    if held_out.crops_at_random or not images.read_alike:
        raise ValueError(
            "images that are cropped at random are never the same twice, and validation_split= compares them each time. Pass "
            "center_crop=True."
        )
    return held_out


def bank_for(
    images: IndexedImages,
    references: References,
    *,
    reference_memory_gb: float,
    mirrored: bool,
    device: torch.device | str,
    quiet: bool = False,
) -> ReferenceBank:
    """All training images as references: the run's own bank, or one that is made for the validation.

    Args:
        images: the training images.
        references: the references of the run.
        reference_memory_gb: GiB up to which one is made.
        mirrored: whether images are flipped at random.
        device: where.
        quiet: no progress bar.

    Raises:
        ValueError: it is too large.
    """
    if references.bank is not None:
        return references.bank
    size = len(images) * math.prod(images.shape) / 2**30
    if size > reference_memory_gb:
        raise ValueError(
            f"validation_split= measures errors against the posterior mean over all training images, {size:.1f} GiB of them, "
            f"and reference_memory_gb={reference_memory_gb:g}. Raise it, or pass reference='bank', with "
            "reference_device='disk' where memory is short."
        )
    return images.make_bank(device, augmentation="horizontal_flip" if mirrored else "none", quiet=quiet)


def validation_times(process: NoiseProcess, distribution: NoiseDistribution | None) -> Tensor:
    """Times of `NUM_LEVELS` noise levels, one in the middle of each of as many equally likely parts of those drawn.

    Of an adaptive distribution those of its prior, so that all evaluations have the same. Ascending, float32; fewer where the
    process has fewer timesteps, of which those of pure noise are left out.
    """
    if isinstance(distribution, AdaptiveNoise):
        distribution = distribution.prior
    if distribution is None:
        cells = process.level_cells()  # without timesteps of pure noise, which have no level
        distribution = (
            process.level_distribution()
            if cells is None
            else Piecewise(tuple(cells.tolist()), (1.0,) * (len(cells) - 1))
        )
    ends = torch.tensor(process.training_range(), dtype=torch.float64, device="cpu")
    below, above = distribution.cdf(ends.log()).tolist()
    middles = (torch.arange(NUM_LEVELS, dtype=torch.float64, device="cpu") + 0.5) / NUM_LEVELS
    levels = distribution.quantile(below + (above - below) * middles).exp().clamp(*ends.tolist())
    return process.times_at(levels).unique()


class Validation:
    """Errors of the averaged network against the posterior mean, on held-out and on training images, by noise level.

    A held-out image is joined to the training images, so that the target of its noisy image is unbiased: the posterior mean
    over N + 1 images. A training image is one of the N. For a network that treats the two alike the mean errors are equal, up
    to the share of one image in N + 1; where the held-out one is larger, the network knows its training images. That is said
    from a difference on which chance decides with a probability of at most `FALSE_ALARM` at each evaluation: one-sided normal
    tests of the paired differences at all noise levels, with Bonferroni's bound.

    Both have the same noise, at every evaluation, in float32 and without dropout. Errors are squared, means over the
    dimensions of the network's output: the units of the loss. Neither the training's random draws nor its network are touched.

    Args:
        accelerator: the training's Accelerator.
        held_out: the held-out images, as from `open_held_out`.
        images: the training images.
        bank: all of these as references, as from `bank_for`.
        process: the noise process.
        distribution: of the noise levels drawn in training. None: the process's own.
        conditioning: what the network is told.
        output_dir: the run's folder.
        validation_steps: optimizer steps between evaluations; one more follows the last step.
        validation_images: number of images of either kind, or all there are if there are fewer.
        batch_size: images at a time.
        seed: random seed for the choice of images and the noise.
        first_step: the step that the run goes on from; evaluations after it are made again.

    Raises:
        ValueError: fewer held-out images than `SMALLEST`, or all of them are training images.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        held_out: IndexedImages,
        images: IndexedImages,
        bank: ReferenceBank,
        process: NoiseProcess,
        distribution: NoiseDistribution | None = None,
        *,
        conditioning: Conditioning,
        output_dir: Path,
        validation_steps: int,
        validation_images: int = 512,
        batch_size: int = 64,
        seed: int = 0,
        first_step: int = 0,
    ) -> None:
        self.accelerator, self.output_dir, self.validation_steps = accelerator, output_dir, validation_steps
        self.bank, self.conditioning, self.batch_size, self.seed = bank, conditioning, batch_size, seed
        self.objective = STFTrainingObjective(process)
        self.times = validation_times(process, distribution).to(accelerator.device)
        self.noise_levels = (process.sigma(self.times) / process.alpha(self.times)).tolist()
        count = min(validation_images, len(held_out), len(images))
        if count < SMALLEST:
            raise ValueError(
                f"{count} images are too few for a mean error; validation_split= needs {SMALLEST} of either split, and of "
                f"validation_images={validation_images}."
            )
        draws = torch.Generator("cpu").manual_seed(seed_for(seed, _ROWS))
        self.sources = [
            (kind, torch.randperm(len(kind), generator=draws, device="cpu")[:count]) for kind in (held_out, images)
        ]
        self.count = count
        self._check_overlap()
        path = output_dir / VALIDATION
        before = json.loads(path.read_text()) if first_step and path.is_file() else []
        # The main process's: all must agree on what is due.
        self.records: list[dict[str, Any]] = broadcast_object_list(
            [[record for record in before if record["step"] <= first_step]]
        )[0]

    def _rows(self) -> list[Tensor]:
        """Batches of this process's rows, as many on all processes: sharded banks are asked together. Rows that the last
        process lacks are another's.
        """
        state = self.accelerator
        mine = torch.arange(
            state.process_index, self.count + state.num_processes - 1, state.num_processes, device="cpu"
        )
        return list((mine[: math.ceil(self.count / state.num_processes)] % self.count).split(self.batch_size))

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        """Results of `_rows` (b, d), of all processes and in order."""
        mine = len(range(self.accelerator.process_index, self.count, self.accelerator.num_processes))
        return gathered(torch.cat(parts)[:mine])

    def _read(self, kind: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        images, chosen = self.sources[kind]
        batch = images.__getitems__(chosen[rows].tolist())
        device = self.accelerator.device
        return batch["images"].to(device), batch["label"].to(device) if "label" in batch else None

    def _check_overlap(self) -> None:
        """Say how many of the held-out images are training images, which is found at a noise level far below a pixel's."""
        distances = []
        for rows in self._rows():
            clean = pixels_to_float(self._read(0, rows)[0])
            nearest = self.bank.posterior_mean(clean, 1.0, 1e-5).mean
            distances.append((nearest - clean).flatten(1).abs().amax(1, keepdim=True).cpu())
        copies = int((self._gathered(distances) < 1e-4).sum())
        if copies == self.count:
            raise ValueError(
                "the images of validation_split= are training images. Choose a split that is not in split=, such as "
                "validation_split='test', or split='train[1000:]' and validation_split='train[:1000]'."
            )
        if copies:
            logger.warning("%d of %d images of the validation split are training images too.", copies, self.count)

    def due(self, step: int, max_steps: int) -> bool:
        """Whether an evaluation is due after this step, and has not been made yet."""
        wanted = step > 0 and (step % self.validation_steps == 0 or step >= max_steps)
        return wanted and all(record["step"] != step for record in self.records)

    def __call__(self, pipeline: DiffusionPipeline, step: int) -> None:
        """Evaluate, record and log. Collective."""
        errors = self._errors(network_of(pipeline.to(self.accelerator.device)).eval())
        self.records.append({"step": step})
        if not self.accelerator.is_main_process:
            return
        record = self.records[-1]
        record |= {"num_images": self.count, "noise_levels": self.noise_levels} | compare(*errors)
        larger = zip(self.noise_levels, record.pop("larger"), strict=True)
        record["memorized_levels"] = [level for level, found in larger if found]
        with explained_write_errors("the validation", self.output_dir):
            write_json(self.output_dir / VALIDATION, self.records)
        logger.info(
            "Step %d: error %.4g ± %.2g on held-out images, %.4g ± %.2g on training images; the DSM loss of the former is "
            "%.4g ± %.2g.", step, *(record[name][part] for name in KINDS for part in ("mean", "standard_error")),
        )  # fmt: skip
        if record["memorized_levels"]:
            logger.info("%s", self._memorization(record))
        estimates = [list(map(Estimate, record[name]["by_level"], record[name]["standard_errors"])) for name in KINDS]
        save_figure(
            lambda: plot_validation(self.noise_levels, *estimates), self.output_dir / SAMPLES / "validation.png"
        )
        report = {f"validation/{name}": record[name]["mean"] for name in KINDS}
        report |= {
            f"validation_{name}/level_{level:.3g}": value
            for name in KINDS[:2]
            for level, value in zip(self.noise_levels, record[name]["by_level"], strict=True)
        }
        with tracker_may_fail():
            self.accelerator.log(report, step=step)

    def _memorization(self, record: dict[str, Any]) -> str:
        """One line on where the network knows its training images."""
        levels = record["memorized_levels"]
        held_out, training = (record[name]["by_level"] for name in KINDS[:2])
        ratio = max(held_out[k] / training[k] for k in (self.noise_levels.index(level) for level in levels))
        first = next(earlier["step"] for earlier in self.records if earlier.get("memorized_levels"))
        between = f"{levels[0]:.3g}" + (f" to {levels[-1]:.3g}" if len(levels) > 1 else "")
        return (
            f"Memorization, seen since step {first}: at noise levels {between} the error on held-out images is up to "
            f"{ratio:.2f} times that on training images."
        )

    @torch.no_grad()
    def _errors(self, network: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(M, L) squared errors of held-out images, of training images, and of the former against their DSM targets."""
        found = []
        for rows in self._rows():
            pairs = [self._read(kind, rows) for kind in (0, 1)]
            shape = (len(self.times), *pairs[0][0].shape[1:])
            generators = [seeded_generator(torch.device("cpu"), self.seed, _NOISE, row) for row in rows.tolist()]
            noise = torch.stack([torch.randn(shape, generator=own, device="cpu") for own in generators])
            noise = noise.to(self.accelerator.device)
            columns = []
            for kind, (images, labels) in enumerate(pairs):
                references = self.bank if kind else JoinedReferences(self.bank, images)
                told = self.conditioning.upright(labels, len(images), images.device)
                for level, time in enumerate(self.times):
                    t = time.expand(len(images))
                    batch = self.objective.perturb(
                        images, reference=references, labels=labels, t=t, noise=noise[:, level]
                    )
                    output = network(batch.model_input, batch.timestep, class_labels=told).sample
                    columns.append(_mean_square(output - batch.target))
                    if not kind:
                        dsm = self.objective.target(images, noise[:, level], t)
                        columns.append(_mean_square(output - dsm))
            found.append(torch.stack(columns, 1).cpu())
        held_out, training = self._gathered(found).split([2 * len(self.times), len(self.times)], 1)
        return held_out[:, ::2], training, held_out[:, 1::2]


# What is measured, in the order of `Validation._errors`.
KINDS = ("held_out_error", "training_error", "held_out_dsm_loss")


def _mean_square(errors: Tensor) -> Tensor:
    return errors.flatten(1).square().mean(1)


def compare(held_out: Tensor, training: Tensor, dsm: Tensor) -> dict[str, Any]:
    """Means and standard errors of (M, L) squared errors, and in which columns `held_out` is larger."""
    report: dict[str, Any] = {}
    root = math.sqrt(len(held_out))
    for name, errors in zip(KINDS, (held_out, training, dsm), strict=True):
        errors, overall = errors.double(), errors.double().mean(1)
        report[name] = {
            "mean": float(overall.mean()),
            "standard_error": float(overall.std() / root),
            "by_level": errors.mean(0).tolist(),
            "standard_errors": (errors.std(0) / root).tolist(),
        }
    difference = held_out.double() - training.double()
    threshold = NormalDist().inv_cdf(1 - FALSE_ALARM / held_out.shape[1])
    larger = difference.mean(0) > threshold * difference.std(0) / root
    return report | {"larger": larger.tolist()}
