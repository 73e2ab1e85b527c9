"""Images from a stream, and the references that come with them: the buffer that shuffles it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from ..reference_bank import Augmentation, ReferenceBank
from ..reference_batch import ReferenceBatchSampler
from .data_set import find_columns, is_class
from .image_column import is_encoded, pixel_dtype, to_image, with_images
from .image_data import standard_deviation_of
from .image_reader import ImageReader, make_reader, named, read_row, undecodable
from .sources import TrainingImages


class ImageStream(TrainingImages):
    """A data set that is read in order, again and again, through a buffer of n images.

    At each step B places of the buffer are drawn uniformly: their images are the sources, all n images are the references,
    and then the next B of the stream take their places. So a source is any image of its reference set with the same
    probability, whatever the order of the stream: the condition under which the target is unbiased. (With a queue of past
    images instead, a stream in sorted order would be biased.) Every draw is a function of the seed and the step, and a
    stream can be entered anywhere by reading it up to there, without decoding.

    Args:
        dataset: the stream; each process reads its part of it.
        column: its column of images.
        label_column: its column of class labels, or None.
        reader: how images are read.
        batch_size: B.
        buffer_size: n; None: 4,096, or all images where there are fewer.
        seed: random seed for the order of shards, random crops and draws of places.
        process_index, num_processes: place of this process among those that read the stream.
        num_classes: labels must lie below it.
        class_names: names of the classes, or None.

    Where there are several processes, `agree` has to follow.

    Attributes:
        standard_deviation: in [-1, 1], over the pixels that the buffers hold before the first step.

    Raises:
        ValueError: fewer images than the buffer needs, or images and labels that cannot be read. Later ones are read when
            their turn comes.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        column: str,
        label_column: str | None,
        reader: ImageReader,
        batch_size: int,
        buffer_size: int | None,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.labels = None  # they come with the batches
        self._dtype = pixel_dtype(dataset.features[column])
        self._dataset = dataset
        if is_encoded(dataset.features[column]):
            self._dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.column, self.label_column, self.reader = column, label_column, reader
        self.batch_size, self.seed = batch_size, seed
        self._process_index, self._num_processes = process_index, num_processes
        self.num_classes, self.class_names = num_classes, class_names
        self._decoder = datasets.Image()
        first = [example for example, _ in zip(self._one_pass(0), range(buffer_size or 4096), strict=False)]
        self._num_references = buffer_size or len(first)
        if len(first) < max(batch_size, self._num_references):
            raise ValueError(
                f"the stream has {len(first)} images for each process, fewer than the {max(batch_size, self._num_references)} "
                "that its buffer holds. Lower buffer_size= or batch_size=."
            )
        self._examples = first
        self._pixels = torch.empty((len(first), *self.shape), dtype=torch.uint8, device="cpu")
        self._labels = torch.zeros(len(first), dtype=torch.int64, device="cpu")
        for place in range(len(first)):
            self._decode(place)
        self.agree([self.summary()])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.reader.shape

    @property
    def num_images(self) -> None:
        return None

    @property
    def in_memory(self) -> None:
        return None

    @property
    def num_references(self) -> int:
        return self._num_references

    @property
    def standard_deviation(self) -> float:
        return self._standard_deviation

    def __str__(self) -> str:
        return f"a stream of images of {self.shape}"

    def summary(self) -> dict[str, Any]:
        """What the processes have to agree on, of the images that the buffer holds before the first step."""
        content = hashlib.sha256(self._pixels.numpy().data)
        content.update(self._labels.numpy().data)
        levels = torch.bincount(self._pixels.flatten().to(torch.int64), minlength=256)
        return {"references": self.num_references, "digest": content.hexdigest(), "levels": levels}

    def agree(self, summaries: list[dict[str, Any]]) -> None:
        """Take one size of the buffer, one digest and one standard deviation from the summaries of all processes."""
        self._num_references = min(summary["references"] for summary in summaries)
        self._pixels, self._labels = self._pixels[: self.num_references], self._labels[: self.num_references]
        self._digest = hashlib.sha256(repr([summary["digest"] for summary in summaries]).encode()).hexdigest()[:16]
        self._standard_deviation = standard_deviation_of(
            torch.stack([summary["levels"] for summary in summaries]).sum(0)
        )

    def digest(self, at_most: int = 256) -> str:
        """A digest of the images and labels that the stream begins with."""
        return self._digest

    def manifest(self) -> dict[str, Any]:
        return {"num_images": None, "data_digest": self._digest, "image_shape": list(self.shape)}

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
        raise ValueError("a stream is not kept: its references are the buffer that comes with each batch.")

    def _one_pass(self, number: int) -> Iterator[dict[str, Any]]:
        """The examples of this process, as they are stored, with "index", their place in pass and process."""
        with torch.device("cpu"):  # Datasets makes tensors on the default device, and shares them between processes
            shards = self._dataset.shuffle(seed=random.Random(f"{self.seed}/{number}").getrandbits(31), buffer_size=1)
            part = split_dataset_by_node(shards, self._process_index, self._num_processes)
        for index, example in enumerate(part):
            yield {**example, "index": index, "pass": number}

    def _endless(self) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            yield from self._one_pass(number)
            number += 1

    def _decode(self, place: int) -> None:
        example = self._examples[place]
        index, draw = example["index"], random.Random(f"{self.seed}/{example['pass']}/{example['index']}")
        value = example[self.column]
        if value is not None and self._dtype is None:
            try:
                value = self._decoder.decode_example(value)
            except Exception as error:
                raise undecodable(index, error, " or leave it out") from error
        image = named(index, to_image, value, self._dtype)
        self._pixels[place] = read_row(self.reader, index, image, draw)
        if self.label_column is not None:
            label = example[self.label_column]
            if not is_class(label) or label >= (self.num_classes or label + 1):
                raise ValueError(
                    f"image {index} has the label {label!r}. Labels are integers from 0, below the {self.num_classes} "
                    "classes that the data set declares."
                )
            self._labels[place] = label

    def batches_from(
        self,
        position: int,
        sampler: ReferenceBatchSampler | None = None,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        if sampler is not None or num_workers:
            raise ValueError("a stream is read in order, by the training process: pass neither a sampler nor workers.")
        stream = self._endless()
        self._examples = [next(stream) for _ in range(self.num_references)]
        stale = set(range(self.num_references)) if position else set()
        step = 0
        while True:
            draw = random.Random(f"{self.seed}/{self._process_index}/{step}")
            sources = draw.sample(range(self.num_references), self.batch_size)
            if step >= position:
                for place in stale:
                    self._decode(place)
                stale = set()
                chosen = torch.tensor(sources, device="cpu")
                others = torch.ones(self.num_references, dtype=torch.bool, device="cpu").index_fill_(0, chosen, False)
                order = torch.cat([chosen, others.nonzero()[:, 0]])
                pixels = self._pixels[order]
                batch = {"images": pixels[: self.batch_size], "reference_images": pixels}
                batch["index"] = torch.tensor([self._examples[place]["index"] for place in sources], device="cpu")
                if self.label_column is not None:
                    labels = self._labels[order]
                    batch |= {"labels": labels[: self.batch_size], "reference_labels": labels}
                yield {key: value.pin_memory() for key, value in batch.items()} if pin_memory else batch
            for place in sources:
                self._examples[place] = next(stream)
            stale |= set(sources)
            step += 1


def open_stream(
    dataset: datasets.IterableDataset,
    *,
    batch_size: int,
    buffer_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_conditional: bool = False,
    image_mode: str | None = None,
    resolution: int | Sequence[int] | None = None,
    center_crop: bool = False,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> ImageStream:
    """The images of a streamed data set, checked.

    Args:
        dataset: the data set.
        image_column, label_column: names of its columns; detected if there is only one.
        class_conditional: whether labels are read.
        image_mode, resolution, center_crop: as for `make_reader`.
        batch_size, buffer_size, seed, process_index, num_processes: as for `ImageStream`.

    Raises:
        ValueError: there are no images, or no labels where they are needed; or they cannot be read.
    """
    if dataset.features is None:
        raise ValueError(
            "streaming=True: the data set does not declare its columns. Use parquet files or a folder of images."
        )
    column, label_column = find_columns(dataset, image_column, label_column, class_conditional)
    dataset = with_images(dataset, column)
    reader = make_reader(dataset, column, image_mode, resolution, center_crop)
    classes, names = None, None
    if label_column is not None:
        feature = dataset.features[label_column]
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(
                f"streaming=True: column {label_column!r} does not declare its classes (ClassLabel), and they are not known "
                "before all of it is read. Declare them, or leave streaming= out."
            )
        classes, names = feature.num_classes, feature.names
    with torch.device("cpu"):
        return ImageStream(
            dataset,
            column,
            label_column,
            reader,
            batch_size,
            buffer_size,
            seed,
            process_index,
            num_processes,
            classes,
            names,
        )
