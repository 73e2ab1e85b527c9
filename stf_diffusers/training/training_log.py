"""What a training step reports, gathered on the device and read once per logging interval."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..files import replacing
from ..objective import PerturbedBatch
from ..plotting import plot_training_levels
from ..posterior import pixels_to_float

logger = logging.getLogger(__name__)

# Decades of the noise-to-signal ratio sigma / alpha, for images in [-1, 1].
_EDGES = (0.0, 0.1, 1.0, 10.0, float("inf"))
NOISE_LEVELS = tuple(
    f"sigma_above_{low:g}"
    if high == float("inf")
    else f"sigma_below_{high:g}"
    if low == 0
    else f"sigma_{low:g}_to_{high:g}"
    for low, high in pairwise(_EDGES)
)


@contextmanager
def tracker_may_fail() -> Iterator[None]:
    """Around what is sent to a tracker: a failure is logged, and the training goes on."""
    try:
        yield
    # Trackers share no error of their own, and none is worth a training run.
    except Exception as error:
        logger.warning("The tracker failed, and the training goes on without this report: %s", error)


def start_trackers(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Start the trackers, and show them the settings of the run.

    Raises:
        ValueError: one does not start.
    """
    try:
        accelerator.init_trackers("stf_diffusers", config={name: str(value) for name, value in settings.items()})
    # Whatever a tracker's client raises where its server or folder cannot be reached.
    except Exception as error:
        raise ValueError(
            f"report_to=: the tracker does not start: {error}. Make its server or folder reachable, or pass "
            "report_to='none'."
        ) from error


def log_picture(accelerator: Accelerator, picture: Image.Image, step: int, name: str = "samples") -> None:
    """Send a picture, such as a grid of samples, to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with tracker_may_fail():
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)


class TrainingLog:
    """Means over the micro-batches of all processes since the last `flush`. `add` never waits for the device.

    Attributes:
        profile: the same by fine noise levels, over all steps since the log was made.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.profile = LevelProfile(accelerator)
        self._edges = torch.tensor(_EDGES[1:-1], device=accelerator.device)
        self._reset()

    def _reset(self) -> None:
        # loss sum, micro-batches, then per noise level: sums of losses, of effective sample sizes, of variances removed, rows
        self._sums = torch.zeros(2 + 4 * len(NOISE_LEVELS), device=self.accelerator.device)
        self._images, self._wait, self._start = 0, 0.0, time.perf_counter()
        self._recent: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def waited(self, seconds: float) -> None:
        """Count seconds that the step waited for data."""
        self._wait += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is not training: its time does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, loss: Tensor, output: Tensor, batch: PerturbedBatch, clean: Tensor, step: int, index: Tensor) -> None:
        """A micro-batch of optimizer step `step`.

        Args:
            loss: its mean loss, a scalar.
            output: (B, ...) output of the network.
            batch: what the network was given, and its targets.
            clean: (B, ...) the images.
            step: number of the optimizer step.
            index: (B,) positions of the images in the data set.
        """
        error = (output.detach().to(batch.target.dtype) - batch.target).flatten(1).square().mean(1)
        found = (batch.effective_sample_size, batch.posterior_mean)
        self.add_rows(loss, error, batch.sigma / batch.alpha, *found, clean, step, index)

    def add_rows(
        self,
        loss: Tensor,
        error: Tensor,
        level: Tensor,
        effective_sample_size: Tensor,
        posterior_mean: Tensor,
        clean: Tensor,
        step: int,
        index: Tensor,
    ) -> None:
        """A micro-batch of any objective.

        Args:
            loss, clean, step, index: as for `add`.
            error: (B,) loss of each image.
            level: (B,) noise levels sigma / alpha.
            effective_sample_size: (B,) of the references.
            posterior_mean: (B, ...) over the references.
        """
        self._recent.append((step, loss.detach(), level.detach(), index))
        self._sums[0] += loss.detach()
        self._sums[1] += 1
        # Given the references and x_t the source is a draw of their posterior, so the mean of its squared distance from
        # the posterior mean is V_DSM - V_STF, by the law of total variance.
        removed = (pixels_to_float(clean) - posterior_mean).flatten(1).square().mean(1)
        columns = torch.stack(
            [error.detach().to(removed.dtype), effective_sample_size, removed, torch.ones_like(removed)]
        )
        place = torch.bucketize(level.to(self._edges.dtype), self._edges)
        by_level = self._sums[2:].view(len(columns), -1)
        by_level.index_add_(1, place, columns.to(self._sums.dtype))
        self.profile.add(level, columns)
        self._images += len(level)

    def flush(self) -> dict[str, float]:
        """Loss, images per second, share of time spent waiting for data; by noise level the mean loss and effective sample
        size, and the variance that references remove from the targets, V_DSM - V_STF per dimension of x0.

        Raises:
            FloatingPointError: a loss since the last call was not finite; on every process, naming its own micro-batch.
        """
        loss, count, *by_level = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        if not math.isfinite(loss):
            self._explain()
        elapsed = time.perf_counter() - self._start
        report = {
            "loss": loss / count,
            "images_per_second": self._images * self.accelerator.num_processes / elapsed,
            "data_wait_share": self._wait / elapsed,
        }
        levels = len(NOISE_LEVELS)
        losses, sizes, removed, rows = (by_level[place * levels :][:levels] for place in range(4))
        for name, error, size, variance, seen in zip(NOISE_LEVELS, losses, sizes, removed, rows, strict=True):
            if seen:
                report[f"loss/{name}"] = error / seen
                report[f"effective_sample_size/{name}"] = size / seen
                report[f"variance_removed/{name}"] = variance / seen
        self._reset()
        return report

    def _explain(self) -> None:
        for step, loss, level, index in self._recent:
            if not bool(loss.isfinite()):
                rows = ", ".join(
                    f"{row} (sigma {sigma:.3g})" for row, sigma in zip(index.tolist(), level.tolist(), strict=True)
                )
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step}. Nothing was saved after it; the last checkpoint is good. "
                    "Lower learning_rate=, or use bf16 instead of fp16. The images of the micro-batch and their noise "
                    f"levels: {rows}."
                )
        raise FloatingPointError("the loss of another process is not finite; see its message.")


class LevelProfile:
    """Loss, effective sample size and variance removed by noise level, three levels an octave, summed on the device."""

    LOWEST, HIGHEST, PER_OCTAVE = -10, 10, 3

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        count = (self.HIGHEST - self.LOWEST) * self.PER_OCTAVE
        self._sums = torch.zeros(4, count, dtype=torch.float64, device=accelerator.device)

    def add(self, level: Tensor, columns: Tensor) -> None:
        """Rows at noise levels sigma / alpha (B,), with their losses, effective sample sizes, variances removed and ones
        (4, B).
        """
        place = ((level.log2() - self.LOWEST) * self.PER_OCTAVE).floor().clamp(0, self._sums.shape[1] - 1)
        self._sums.index_add_(1, place.long(), columns.double())

    def result(self) -> dict[str, list[float]]:
        """Columns over the levels drawn, in ascending order: "noise_level" (the middle, on a log scale), "loss",
        "effective_sample_size", "variance_removed" and "rows". Collective.
        """
        sums = self.accelerator.reduce(self._sums, reduction="sum").cpu()
        seen = sums[3].nonzero()[:, 0]
        means = sums[:3, seen] / sums[3, seen]
        middle = 2.0 ** ((seen + 0.5) / self.PER_OCTAVE + self.LOWEST)
        names = ("noise_level", "loss", "effective_sample_size", "variance_removed", "rows")
        return {name: values.tolist() for name, values in zip(names, (middle, *means, sums[3, seen]), strict=True)}


class MetricsFile:
    """What was logged, one JSON object a line; a run that resumes continues the file from its checkpoint's step.

    Args:
        path: path of the file.
        first_step: lines after it are dropped: these steps come again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        kept = (
            [line for line in path.read_text().splitlines() if _step_in(line) <= first_step] if path.is_file() else []
        )
        with replacing(path) as file:
            file.write_text("".join(line + "\n" for line in kept if first_step))

    def append(self, step: int, report: Mapping[str, float]) -> None:
        """Write the report of a step."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **report}) + "\n")


def _step_in(line: str) -> float:
    """The step of a line; infinity where a process died while it wrote it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TargetShare:
    """Logs once which share of a step the targets take, measured from the second to the fourth step.

    Only then does it wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._steps, self._targets, self._start = device, 0, 0.0, 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def targets(self) -> Iterator[None]:
        """Around the computation of a micro-batch's targets."""
        if not 1 <= self._steps <= 3:
            yield
            return
        start = self._now()
        yield
        self._targets += self._now() - start

    def step_done(self) -> None:
        """After each step."""
        self._steps += 1
        if self._steps == 1:
            self._start = self._now()
        elif self._steps == 4:
            step = (self._now() - self._start) / 3
            logger.info("Targets take %.4f of the %.4f seconds of a step.", self._targets / 3, step)


def save_figure(make: Callable[[], Any], path: Path) -> bool:
    """Draw a figure, as a function of `plotting` makes it, into a PNG file; whether matplotlib is installed."""
    try:
        figure = make()
    except ImportError:
        return False
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file)
    return True


def save_profile(profile: dict[str, list[float]], path: Path) -> None:
    """Draw a `LevelProfile`'s result into a PNG file, where matplotlib is installed."""
    if save_figure(lambda: plot_training_levels(**profile), path):
        logger.info("Loss and variance removed by noise level: %s", path)
    else:
        logger.info("Loss and variance by noise level are drawn where matplotlib is installed: pip install matplotlib.")
