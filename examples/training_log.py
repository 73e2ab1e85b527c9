"""What a training step reports, gathered on the device and read once per logging interval."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from stf_diffusers import PerturbedBatch

logger = get_logger("train_unconditional_stf")

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


class TrainingLog:
    """Means over the micro-batches of all processes since the last `flush`. `add` never waits for the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._edges = torch.tensor(_EDGES[1:-1], device=accelerator.device)
        self._reset()

    def _reset(self) -> None:
        # loss sum, micro-batches, then per noise level: sum of effective sample sizes, rows
        self._sums = torch.zeros(2 + 2 * len(NOISE_LEVELS), device=self.accelerator.device)
        self._images, self._wait, self._start = 0, 0.0, time.perf_counter()
        self._recent: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def waited(self, seconds: float) -> None:
        """Time the step stood still for data."""
        self._wait += seconds

    def add(self, loss: Tensor, batch: PerturbedBatch, step: int, index: Tensor) -> None:
        """A micro-batch of optimizer step `step`, of the images at `index` (B,) in the data set."""
        level = torch.bucketize((batch.sigma / batch.alpha).to(self._edges.dtype), self._edges)
        self._recent.append((step, loss.detach(), (batch.sigma / batch.alpha).detach(), index))
        self._sums[0] += loss.detach()
        self._sums[1] += 1
        ones = torch.ones_like(batch.effective_sample_size, dtype=self._sums.dtype)
        self._sums.index_add_(0, 2 + level, batch.effective_sample_size.to(self._sums.dtype))
        self._sums.index_add_(0, 2 + len(NOISE_LEVELS) + level, ones)
        self._images += len(batch.t)

    def flush(self) -> dict[str, float]:
        """Loss, images per second, share of time spent waiting for data, mean effective sample size by noise level.

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
        for name, total, rows in zip(NOISE_LEVELS, by_level[:levels], by_level[levels:], strict=True):
            if rows:
                report[f"effective_sample_size/{name}"] = total / rows
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
                    "Lower --learning_rate, or use bf16 instead of fp16. The images of the micro-batch and their noise "
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
