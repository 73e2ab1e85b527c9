"""Where the references of a training's targets come from: the batch, a bank of all images, a stream, all processes."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from ..reference_bank import Augmentation, ReferenceBank
from ..reference_batch import ReferenceBatchSampler
from ..reference_set import SharedReferences
from .sources import TrainingImages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class References:
    """The references of a run.

    Attributes:
        kind: "none" (DSM), "batch", "bank" or "stream".
        n: number of references behind each target.
        sampler: lists the images of each micro-batch, sources first; None where they come with the batch.
        bank: the bank, where there is one.
        shared: whether they are spread over the processes.
        place: where a bank is kept, in words.
    """

    kind: Literal["none", "batch", "bank", "stream"]
    n: int
    sampler: ReferenceBatchSampler | None
    bank: ReferenceBank | None = None
    shared: bool = False
    place: str = ""

    def of(self, batch: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments of `STFTrainingObjective.perturb` that say what the references of a collated batch are.

        Args:
            batch: "reference_images" (n, ...), flipped where images are, and with classes "reference_labels" (n,).
            labels: (B,) classes of the sources, -1 where they are dropped; on the CPU, so that a bank need not wait for them.
        """
        if self.kind == "none":
            return {"reference": None}
        if self.bank is not None:
            return {"reference": self.bank, "labels": labels}
        images, reference_labels = batch["reference_images"], batch.get("reference_labels")
        labels = None if labels is None else labels.to(images.device, non_blocking=True)
        if self.shared:
            return {"reference": SharedReferences(images, reference_labels), "labels": labels}
        return {
            "reference": images,
            "labels": labels,
            "reference_labels": reference_labels,
            "num_unconditional": None if labels is None else batch.get("num_unconditional"),
        }

    def __str__(self) -> str:
        if self.kind == "none":
            return "no references"
        where = {
            "batch": "shared by all processes" if self.shared else "read with each batch",
            "stream": "the buffer of the stream",
            "bank": "a bank of all images" + (", a part on each process" if self.shared else ""),
        }[self.kind]
        size = f", {self.bank.nbytes / 2**20:.1f} MiB {self.place} for each process" if self.bank is not None else ""
        return f"n = {self.n:,} references, {where}{size}"


# Share of what is free that a bank may take where nobody says how much.
_SHARE = 0.25


def reference_memory(device: torch.device | str, num_processes: int = 1) -> float:
    """GiB for a bank that nobody asked for: a quarter of what is free on a GPU, or of a CPU's available memory for each process.

    Args:
        device: where the bank would be.
        num_processes: number of processes that share a CPU's memory.
    """
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0] * _SHARE / 2**30
    return psutil.virtual_memory().available * _SHARE / num_processes / 2**30


def choose_references(
    images: TrainingImages,
    batch_size: int,
    *,
    objective: Literal["stf", "dsm"] = "stf",
    reference: Literal["batch", "bank"] | None = None,
    reference_batch_size: int | None = None,
    reference_memory_gb: float | None = None,
    reference_device: Literal["cuda", "cpu", "disk"] | None = None,
    share_reference: bool = False,
    augmentation: Augmentation = "none",
    bank_file: Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    quiet: bool = False,
) -> References:
    """The references that are asked for; by default a bank where it fits, else batches of up to 4,096.

    Args:
        images: the images.
        batch_size: B, sources of each process.
        objective: "dsm" has no references.
        reference: "batch": read with each batch; "bank": all images. None: a bank where the images in memory fit into
            `reference_memory_gb` and no `reference_batch_size` is given.
        reference_batch_size: n of batches, of one process or, shared, of all. None: 4,096, or all images.
        reference_memory_gb: GiB for a bank that was not asked for, the same on all processes. None: `reference_memory`.
        reference_device: where a bank is kept; "disk": in `bank_file`. None: on `device`.
        share_reference: spread the references over the processes.
        augmentation: augmentation under which a bank is closed.
        bank_file: file of a bank on disk.
        device: the device that trains.
        seed: random seed for the order of sources and the draws of references.
        process_index, num_processes: place of this process among those of the training.
        quiet: no progress bar.

    Raises:
        ValueError: a bank of images that are cropped at random, or more references than there are images.
    """
    if images.num_references is not None:
        return References("none", 1, None) if objective == "dsm" else References("stream", images.num_references, None)
    if images.num_images is None:
        raise ValueError("images whose number is not known have to bring their references: num_references is None.")
    total, shared = images.num_images, share_reference and num_processes > 1
    parts = num_processes if shared else 1
    if batch_size * num_processes > total:
        raise ValueError(
            f"batch_size={batch_size} times the number of processes, {num_processes}, exceeds the {total} images "
            "there are. Lower it."
        )
    kind = "none"
    if objective == "stf":
        kind = reference or (
            "batch" if reference_batch_size else _kind_that_fits(images, parts, device, reference_memory_gb)
        )
    if kind != "none" and images.labels is not None:
        _warn_of_single_images(images.labels)
    if kind == "batch":
        n = reference_batch_size or max(batch_size * parts, min(4096, total))
        labels = None if shared else images.labels
        sampler = ReferenceBatchSampler(
            total, batch_size, n, seed, num_processes, process_index, share_references=shared, labels=labels
        )
        return References("batch", n, sampler, shared=shared)
    sampler = ReferenceBatchSampler(total, batch_size, batch_size, seed, num_processes, process_index)
    if kind == "none":
        return References("none", 1, sampler, shared=shared)
    training_device = torch.device(device)
    place = reference_device or training_device.type
    bank = images.make_bank(
        training_device if place == training_device.type else None if place == "disk" else place,
        path=bank_file if place == "disk" else None,
        augmentation=augmentation,
        process_shard=(process_index, num_processes) if shared else None,
        pin_memory=place == "cpu" and training_device.type == "cuda",
        quiet=quiet,
    )
    where = {"disk": "in a file", "cpu": "in memory"}.get(place, "of GPU memory")
    return References("bank", bank.num_references, sampler, bank, shared, where)


def _kind_that_fits(
    images: TrainingImages, parts: int, device: torch.device | str, reference_memory_gb: float | None
) -> Literal["batch", "bank"]:
    """A bank where it fits, else batches; said with the reason."""
    whole = images.in_memory
    if whole is None:
        logger.info("References are read with each batch: the images are not in memory, decoded and always the same.")
        return "batch"
    allowed = reference_memory(device, parts) if reference_memory_gb is None else reference_memory_gb
    needed = whole.nbytes / parts / 2**30
    where = f"{needed:.3g} GiB on {torch.device(device).type}, and {allowed:.3g} GiB are allowed"
    if needed > allowed:
        logger.info("References are read with each batch: a bank of all images would take %s.", where)
        return "batch"
    logger.info("References are a bank of all images: it takes %s.", where)
    return "bank"


def _warn_of_single_images(labels: Tensor) -> None:
    alone = [label for label, count in Counter(labels.tolist()).items() if count == 1]
    if alone:
        logger.warning("Classes of a single image have the targets of denoising score matching: %s.", alone)
