"""What a training script knows of its images, whatever their kind: which they are, and batches from a position on.

A new kind of data is one class: a `TrainingImages`, or an `IndexedImages` where any image can be read at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..reference_bank import Augmentation, ReferenceBank
from ..reference_batch import ReferenceBatchCollator, ReferenceBatchSampler


class TrainingImages(ABC):
    """The images of a training, or their latents, and what the rest of a script asks of them.

    Attributes:
        labels: (N,) int64 classes on the CPU; None without classes, or if they only come with the batches.
        num_classes: number of classes of a conditional training; None of an unconditional one.
        class_names: what the classes are called, by number; None where the data do not say.
    """

    labels: Tensor | None
    num_classes: int | None
    class_names: list[str] | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image, as the network sees it."""

    @property
    @abstractmethod
    def num_images(self) -> int | None:
        """Number of images; None where it is not known."""

    @property
    @abstractmethod
    def standard_deviation(self) -> float:
        """Standard deviation over all values as the network sees them, which is EDM's sigma_data."""

    @property
    @abstractmethod
    def num_references(self) -> int | None:
        """Number of references that come with each batch, its sources among them; None where a sampler chooses them."""

    @property
    @abstractmethod
    def in_memory(self) -> Tensor | None:
        """(N, C, H, W), all images as they are read each time; None where they are not in memory, or read differently."""

    @abstractmethod
    def digest(self, at_most: int = 256) -> str:
        """Identifies these images and labels, by `at_most` of those that are not in memory."""

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """JSON values that a resumed training must share with the one it continues."""

    @abstractmethod
    def make_bank(
        self,
        device: torch.device | str | None = None,
        *,
        path: Path | None = None,
        augmentation: Augmentation = "none",
        process_shard: tuple[int, int] | None = None,
        pin_memory: bool = False,
        quiet: bool = False,
    ) -> ReferenceBank:
        """All images as references, on a device, or in the file `path`. Arguments as for `ReferenceBank`.

        Raises:
            ValueError: no bank can hold all that training reads.
        """

    @abstractmethod
    def batches_from(
        self, position: int, sampler: ReferenceBatchSampler | None, *, num_workers: int = 0, pin_memory: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of this process from the given one on, epoch after epoch without end.

        As `ReferenceBatchCollator` lays them out, "images", "reference_images", with classes "labels" and
        "reference_labels"; and "index" (B,), the sources' positions in the data set.

        Args:
            position: number of batches that this process has had before.
            sampler: chooses the images of each batch; None where `num_references` come with it.
            num_workers: processes that read.
            pin_memory: whether batches are kept in page-locked memory.
        """

    @abstractmethod
    def __str__(self) -> str:
        """How many images there are and where they are kept, for the log."""


class IndexedImages(TrainingImages, Dataset):
    """Images that are read by lists of indices, in any order."""

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """{"images": (n, C, H, W), "index": (n,), and with classes "label": (n,)}; a function of the list alone."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def read_alike(self) -> bool:
        """Whether an image is the same each time it is read."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies all images without reading them, as far as that is known."""

    def __str__(self) -> str:
        where = "made as they are read" if self.in_memory is None else "kept in memory"
        return f"{len(self)} images of {self.shape}, {where}"

    @abstractmethod
    def bank_in_file(
        self, path: Path, augmentation: Augmentation, process_shard: tuple[int, int] | None, quiet: bool
    ) -> ReferenceBank:
        """`make_bank` with a path."""

    @property
    def num_images(self) -> int:
        return len(self)

    @property
    def num_references(self) -> None:
        return None

    def make_bank(
        self,
        device: torch.device | str | None = None,
        *,
        path: Path | None = None,
        augmentation: Augmentation = "none",
        process_shard: tuple[int, int] | None = None,
        pin_memory: bool = False,
        quiet: bool = False,
    ) -> ReferenceBank:
        if path is not None:
            return self.bank_in_file(path, augmentation, process_shard, quiet)
        whole = self.in_memory
        if whole is None:
            raise ValueError(
                "reference='bank': the images do not fit into image_memory_gb=, or are cropped at random. Raise it, pass "
                "center_crop= or reference_device='disk', or use reference='batch'."
            )
        return ReferenceBank(
            whole,
            self.labels,
            device=device,
            augmentation=augmentation,
            process_shard=process_shard,
            pin_memory=pin_memory,
        )

    def batches_from(
        self, position: int, sampler: ReferenceBatchSampler | None, *, num_workers: int = 0, pin_memory: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        sampler = required(sampler)
        loader = DataLoader(
            self,
            batch_sampler=sampler,
            collate_fn=collator_of(sampler),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )
        yield from epochs_from(loader, sampler, position)


def required(sampler: ReferenceBatchSampler | None) -> ReferenceBatchSampler:
    """The sampler. Raises ValueError where there is none."""
    if sampler is None:
        raise ValueError("images that are read by indices need a sampler that lists them.")
    return sampler


def epochs_from(loader: DataLoader, sampler: ReferenceBatchSampler, position: int) -> Iterator[Any]:
    """What a loader with this sampler gives from the batch `position` on, epoch after epoch without end.

    Raises:
        RuntimeError: a worker died.
    """
    epoch, start = divmod(position, len(sampler))
    while True:
        sampler.set_epoch(epoch, start)
        try:
            with torch.device("cpu"):  # where the loader draws its seed, whatever the default device is
                batches = iter(loader)
            yield from batches
        except (EOFError, OSError, RuntimeError) as error:
            if not loader.num_workers:
                raise
            # A worker that dies while it hands over a batch shows as a broken connection, and as nothing else.
            raise RuntimeError(
                f"a DataLoader worker died, perhaps because memory ran out: {error!r}. Lower num_workers= or "
                "batch_size=; resume_from_checkpoint='latest' continues."
            ) from error
        epoch, start = epoch + 1, 0


def collator_of(sampler: ReferenceBatchSampler) -> Callable[[Any], dict[str, Tensor]]:
    """Lays out the columns of a list of the sampler."""
    return partial(collate, ReferenceBatchCollator(sampler.num_sources, num_unconditional=sampler.num_unconditional))


def collate(collator: ReferenceBatchCollator, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collated batch, and the positions of its sources in the data set."""
    return {**collator(columns), "index": columns["index"][: collator.batch_size]}
