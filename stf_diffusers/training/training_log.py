"""What a training step reports, gathered on the device and read once per logging interval."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..objective import PerturbedBatch
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
    """Around what is sent to a tracker: its failure is said, and the training goes on."""
    try:
        yield
    # Trackers share no error of their own, and none is worth a training run.
    except Exception as error:
        logger.warning("The tracker failed, and the training goes on without this report: %s", error)


def log_picture(accelerator: Accelerator, picture: Image.Image, step: int) -> None:
    """Send a grid of samples to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with tracker_may_fail():
                tracker.log_images({"samples": np.asarray(picture)[None]}, step=step, **layout)


class TrainingLog:
    """Means over the micro-batches of all processes since the last `flush`. `add` never waits for the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._edges = torch.tensor(_EDGES[1:-1], device=accelerator.device)
        self._reset()

    def _reset(self) -> None:
        # loss sum, micro-batches, then per noise level: sums of effective sample sizes, of variances removed, rows
        self._sums = torch.zeros(2 + 3 * len(NOISE_LEVELS), device=self.accelerator.device)
        self._images, self._wait, self._start = 0, 0.0, time.perf_counter()
        self._recent: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def waited(self, seconds: float) -> None:
        """Time the step stood still for data."""
        self._wait += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: its time does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, loss: Tensor, batch: PerturbedBatch, clean: Tensor, step: int, index: Tensor) -> None:
        """A micro-batch of optimizer step `step`, of the images `clean` (B, ...) at `index` (B,) in the data set."""
        level = torch.bucketize((batch.sigma / batch.alpha).to(self._edges.dtype), self._edges)
        self._recent.append((step, loss.detach(), (batch.sigma / batch.alpha).detach(), index))
        self._sums[0] += loss.detach()
        self._sums[1] += 1
        # Given the references and x_t the source is a draw of their posterior, so the mean of its squared distance from
        # the posterior mean is V_DSM - V_STF, by the law of total variance.
        removed = (pixels_to_float(clean) - batch.posterior_mean).flatten(1).square().mean(1)
        columns = batch.effective_sample_size, removed, torch.ones_like(removed)
        for place, values in enumerate(columns):
            self._sums.index_add_(0, 2 + place * len(NOISE_LEVELS) + level, values.to(self._sums.dtype))
        self._images += len(batch.t)

    def flush(self) -> dict[str, float]:
        """Loss, images per second, share of time spent waiting for data; by noise level the mean effective sample size,
        and the variance that references remove from the targets, V_DSM - V_STF per dimension of x0.

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
        sizes, removed, rows = (by_level[place * levels :][:levels] for place in range(3))
        for name, size, variance, seen in zip(NOISE_LEVELS, sizes, removed, rows, strict=True):
            if seen:
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


class TargetShare:
    """Says once what part of a step the targets take, from the second to the fourth step.

    Only there is the device waited for.
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
