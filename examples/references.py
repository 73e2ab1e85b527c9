"""Where the references of the training script's targets come from: the batch, a bank of all images, all processes."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from image_data import ImageColumn
from latents import LatentColumn
from stf_diffusers import ReferenceBank, ReferenceBatchSampler, SharedReferences
from stf_diffusers.reference_bank import Augmentation
from streaming import ImageStream

BANK_FILE = "reference_bank.safetensors"


@dataclass(frozen=True)
class References:
    """The references of a run.

    `kind` is "none" (DSM), "batch", "bank" or "stream"; `n` the number of references behind each target; `sampler` lists the
    images of each micro-batch, sources first, and is None where a stream brings them; `bank` is the bank, where there is one.
    """

    kind: str
    n: int
    sampler: ReferenceBatchSampler | None
    bank: ReferenceBank | None
    shared: bool
    place: str = ""

    def of(self, batch: dict[str, Tensor], labels: Tensor | None) -> dict[str, Any]:
        """The arguments of `STFTrainingObjective.perturb` for a collated batch, flipped where images are, and the classes
        (B,) of its sources, -1 where they are dropped.
        """
        if self.kind == "none":
            return {"reference": None}
        if self.bank is not None:
            return {"reference": self.bank, "labels": labels}
        if self.shared:
            return {
                "reference": SharedReferences(batch["reference_images"], batch.get("reference_labels")),
                "labels": labels,
            }
        return {
            "reference": batch["reference_images"],
            "labels": labels,
            "reference_labels": batch.get("reference_labels"),
            "num_unconditional": None if labels is None or self.sampler is None else self.sampler.num_unconditional,
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


def choose_references(
    args: argparse.Namespace, images: ImageColumn | LatentColumn | ImageStream, accelerator: Accelerator
) -> References:
    """The references that the flags ask for; by default a bank where one fits, else batches of up to 4,096.

    Raises:
        ValueError: a bank of images that are cropped at random, or more references than there are images.
    """
    if isinstance(images, ImageStream):
        kind = "none" if args.objective == "dsm" else "stream"
        return References(kind, images.num_references if kind == "stream" else 1, None, None, False)
    rank, world = accelerator.process_index, accelerator.num_processes
    size, total = args.train_batch_size, len(images)
    shared = args.share_reference and world > 1
    parts = world if shared else 1
    if size * world > total:
        raise ValueError(
            f"--train_batch_size {size} on {world} process(es) exceeds the {total} images there are. Lower it."
        )
    kind = "none"
    if args.objective == "stf":
        fits = images.images is not None and images.images.nbytes / parts <= args.reference_memory_gb * 2**30
        kind = args.reference or ("batch" if args.reference_batch_size or not fits else "bank")
    if kind != "batch":
        sampler = ReferenceBatchSampler(total, size, size, args.seed, world, rank)
        bank = make_bank(args, images, accelerator, shared) if kind == "bank" else None
        place = args.reference_device or accelerator.device.type
        place = {"disk": "in a file", "cpu": "in memory", "cuda": "of GPU memory"}[place]
        return References(kind, bank.num_references if bank else 1, sampler, bank, shared, place)
    n = args.reference_batch_size or max(size * parts, min(4096, total))
    labels = None if shared else images.labels
    sampler = ReferenceBatchSampler(total, size, n, args.seed, world, rank, share_references=shared, labels=labels)
    return References(kind, n, sampler, None, shared)


def make_bank(
    args: argparse.Namespace, images: ImageColumn | LatentColumn, accelerator: Accelerator, shared: bool
) -> ReferenceBank:
    """All images, where `--reference_device` says; with `shared` this process's part of them."""
    shard = (accelerator.process_index, accelerator.num_processes) if shared else None
    augmentation: Augmentation = "horizontal_flip" if args.random_flip and not args.vae else "none"
    place = args.reference_device or accelerator.device.type
    if place == "disk" and isinstance(images, ImageColumn):
        if images.crops_at_random:
            raise ValueError(
                "--reference bank: the images are not square and cropped at random, so that no set contains the sources. "
                "Pass --center_crop, or --reference batch."
            )
        # The main process decodes; the others find the file.
        path = Path(args.output_dir) / BANK_FILE
        with accelerator.main_process_first():
            if args.overwrite_output_dir and accelerator.is_main_process:
                path.unlink(missing_ok=True)
            return ReferenceBank.from_dataset(
                images.dataset,
                images.column,
                images.label_column,
                partial(images.reader, draw=random.Random(0)),
                path=path,
                augmentation=augmentation,
                process_shard=shard,
                quiet=not accelerator.is_main_process,
            )
    if images.images is None:
        raise ValueError(
            "--reference bank: the images do not fit into --image_memory_gb, or are cropped at random. Raise it, pass "
            "--center_crop or --reference_device disk, or use --reference batch."
        )
    return ReferenceBank(
        images.images,
        images.labels,
        device=accelerator.device if place == accelerator.device.type else torch.device(place),
        augmentation=augmentation,
        process_shard=shard,
        pin_memory=place == "cpu" and accelerator.device.type == "cuda",
    )
