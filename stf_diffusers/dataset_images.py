"""Images of a `datasets.Dataset` as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .reference_set import checked_labels

# Images decoded at a time.
_CHUNK = 256


def pil_to_pixels(image: Any) -> Tensor:
    """A PIL image of 8 bits a channel as uint8 (C, H, W); black-and-white and palettes as what they show.

    Raises:
        ValueError: another mode.
    """
    import numpy as np

    if image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"an image has mode {image.mode!r}. Pass a transform that makes uint8 pixels of it.")
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class DatasetImages:
    """The images of a data set, sorted by class where there are labels, decoded when they are read.

    Args:
        dataset: a `datasets.Dataset`.
        image_key, label_key: its columns.
        read: from an entry of the image column to a tensor.

    Attributes:
        shape, dtype: those of all images together, if all are like the first.
        labels: (N,) int64, sorted; None without `label_key`.
        order: (N,) int64, the position of each image in the data set; None without `label_key`.

    Raises:
        ValueError: there are no images, or not one class for each.
    """

    def __init__(self, dataset: Any, image_key: str, label_key: str | None, read: Callable[[Any], Tensor]) -> None:
        if len(dataset) == 0:
            raise ValueError("the data set is empty.")
        self.dataset, self.image_key, self.read = dataset, image_key, read
        self.labels: Tensor | None = None
        self.order: Tensor | None = None
        if label_key is not None:
            labels = checked_labels(torch.tensor(list(dataset[label_key]), device="cpu"), len(dataset))
            self.labels, self.order = labels.sort(stable=True)
        first = self[0]
        self.shape, self.dtype = torch.Size((len(dataset), *first.shape)), first.dtype

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Tensor:
        return self.read(self.dataset[self.position(row)][self.image_key])

    def position(self, row: int) -> int:
        """Where an image lies in the data set."""
        return row if self.order is None else int(self.order[row])

    def chunks(self, quiet: bool, purpose: str = "Building the reference bank") -> Iterator[Tensor]:
        """All images in order, `_CHUNK` at a time, with a progress bar that says the `purpose` unless `quiet`.

        Raises:
            ValueError: images of different shapes or dtypes.
        """
        from tqdm.auto import tqdm

        with tqdm(total=len(self), desc=purpose, unit="image", disable=quiet) as progress:
            for start in range(0, len(self), _CHUNK):
                positions = [self.position(row) for row in range(start, min(start + _CHUNK, len(self)))]
                images = [self.read(image) for image in self.dataset[positions][self.image_key]]
                for position, image in zip(positions, images, strict=True):
                    if image.shape != self.shape[1:] or image.dtype != self.dtype:
                        raise ValueError(
                            f"image {position} is {image.dtype} {tuple(image.shape)} and others are {self.dtype} "
                            f"{tuple(self.shape[1:])}. Pass a transform that makes them alike."
                        )
                progress.update(len(positions))
                yield torch.stack(images)

    def whole(self, quiet: bool) -> Tensor:
        """All images (N, ...) in order."""
        images = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for rows, chunk in zip(images.split(_CHUNK), self.chunks(quiet), strict=True):
            rows.copy_(chunk)
        return images
