"""All images on the device that trains: batches are gathered there, and a step sends positions alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..reference_bank import ReferenceBank
from ..reference_batch import ReferenceBatchSampler
from .sources import IndexedImages, TrainingImages, collator_of, epochs_from, required

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceImages:
    """The images of a training on a device, in place of those that are read: the same batches, made there.

    Attributes:
        images: (N, C, H, W) as they are read each time, which may be those of a bank.
        labels: (N,) int64 classes on the CPU, by position in the data set; None without classes.
        rows: (N,) int64 on the same device, the row of `images` at which each position of the data set is. None: the same.
    """

    images: Tensor
    labels: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of_bank(cls, bank: ReferenceBank, labels: Tensor | None) -> DeviceImages:
        """The images that a bank holds, without a copy.

        Args:
            bank: all images on one device, not sharded.
            labels: (N,) classes by position in the data set.

        Raises:
            ValueError: the bank holds a part of the images, or reads them from a file.
        """
        if bank.process_shard is not None or not isinstance(bank.images, Tensor):
            raise ValueError(
                "batches are made of a bank that holds all images on a device, and this one is sharded or in a file. "
                "Pass DeviceImages a tensor of all images."
            )
        if labels is None:  # only a bank with classes has another order
            return cls(bank.images)
        rows = bank.rows_of(torch.arange(len(bank), device="cpu"))
        return cls(bank.images, labels, rows.to(bank.device))

    def columns(self, index: Tensor) -> dict[str, Tensor]:
        """What `IndexedImages.__getitems__` gives for the positions (n,) int64 on the CPU, the images on their device."""
        there = index.to(self.images.device, non_blocking=True)
        rows = there if self.rows is None else self.rows.index_select(0, there)
        columns = {"images": self.images.index_select(0, rows), "index": index}
        if self.labels is not None:
            columns["label"] = self.labels.index_select(0, index)
        return columns

    def batches_from(
        self, position: int, sampler: ReferenceBatchSampler | None, *, num_workers: int = 0, pin_memory: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """As `TrainingImages.batches_from`, the images on their device. Workers would have nothing to read: there are none.

        Raises:
            ValueError: there is no sampler.
        """
        sampler = required(sampler)
        if num_workers:
            logger.info(
                "Batches are gathered on %s: num_workers=%d has nothing to do.", self.images.device, num_workers
            )
        collated = collator_of(sampler)
        positions: DataLoader[Tensor] = DataLoader(
            range(len(self.images)),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=partial(torch.tensor, device="cpu"),
            pin_memory=pin_memory,
        )
        for index in epochs_from(positions, sampler, position):
            yield collated(self.columns(index))

    def __str__(self) -> str:
        return f"{len(self.images)} images of {tuple(self.images.shape[1:])}, kept on {self.images.device}"


def images_on_device(
    images: TrainingImages,
    device: torch.device | str,
    *,
    memory_gb: float,
    bank: ReferenceBank | None = None,
) -> TrainingImages | DeviceImages:
    """The images on the device that trains, where they fit: those of a bank that lies there, or a copy. Otherwise as given.

    They stay as they are for training on a CPU, where they are not in memory or read differently each time, where they bring
    their references, and where a bank was put elsewhere.

    Args:
        images: the images, or their latents.
        device: the device that trains.
        memory_gb: GiB of it that images may take, together with what a sharded bank takes. A bank of all is there anyway.
        bank: a bank of these images, of the training's references or of its validation.
    """
    kind = torch.device(device).type  # "cuda" and "cuda:0" are one device to a process
    listed = isinstance(images, IndexedImages) and images.num_references is None
    if kind == "cpu" or not listed or (bank is not None and bank.device.type != kind):
        return images
    if bank is not None and bank.process_shard is None:
        return DeviceImages.of_bank(bank, images.labels)
    whole = images.in_memory
    if whole is None or whole.nbytes + (0 if bank is None else bank.nbytes) > memory_gb * 2**30:
        return images
    return DeviceImages(whole.to(device), images.labels)
