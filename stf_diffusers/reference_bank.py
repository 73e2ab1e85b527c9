"""All images of a data set as the reference set."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .bank_file import check_finite, compare_bank, parts, read_bank, write_bank
from .dataset_images import DatasetImages, pil_to_pixels
from .posterior import (
    PosteriorMean,
    PosteriorState,
    ReferenceRows,
    check_batch,
    coefficient_rows,
    pixels_to_float,
    reference_norms,
    state_with_mirrors,
    take_rows,
)
from .reference_classes import labels_among, rows_of_classes, same_class, state_by_class
from .reference_set import (
    ReferenceSet,
    check_integers,
    check_noisy_like,
    checked_labels,
    draw_subset,
    merged_over_processes,
    shard_rows,
)

Augmentation = Literal["none", "horizontal_flip"]


class ReferenceBank(ReferenceSet):
    """All images of a data set as the reference set: the exact empirical posterior.

    The source of each noisy image is one of the images and is counted once, like every other. Memory is that of the
    images as they are stored, and 8 bytes for each; posterior means take chunks of them at a time.

    Args:
        images: (N, ...) uint8 pixels (read as x / 127.5 - 1), or floating point in the data's range; copied.
        labels: (N,) integer classes, for posteriors within a class. The rows are kept sorted by class, so that other
            classes are not touched.
        device: where the images are kept. None: where they are. Chunks are moved to the noisy images' device.
        dtype: dtype in which they are kept: torch.uint8, float16, bfloat16 or float32. None: as they are. uint8 is
            exact for pixels and the fastest; half precision rounds the references themselves.
        augmentation: "horizontal_flip": the set is closed under flips; an image and its mirror are both in it (an
            image that equals its mirror is in it twice, as in training with random flips).
        process_shard: (index, count): keep only this part of the images, of a bank spread over `count` processes of the
            default process group. Its posterior means are collective: every process calls them, with its own images.
        pin_memory: keep the images in page-locked memory, from which a GPU reads faster.

    Attributes:
        images: (N, ...) the images that this process keeps, sorted by class; rows of a file are read when they are sliced.
        class_rows: the rows of each class among them, by class; empty without labels.

    Raises:
        TypeError: a dtype that is not images' or labels', or float images with ``dtype=torch.uint8``.
        ValueError: no images, labels that do not fit, an unknown augmentation or an impossible shard.
    """

    @torch.no_grad()
    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        augmentation: Augmentation = "none",
        process_shard: tuple[int, int] | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_batch("images", images, "(N, ...)")
        dtype = images.dtype if dtype is None else dtype
        pixels_to_float(images[:0])
        pixels_to_float(torch.empty(0, dtype=dtype, device="cpu"))
        if dtype == torch.uint8 != images.dtype:
            raise TypeError(
                f"the images are {images.dtype} and would be rounded to uint8. Pass uint8 pixels, or dtype=torch.float32."
            )
        order = None
        if labels is not None:
            labels = checked_labels(labels, len(images))
            labels, places = labels.sort(stable=True)  # a new tensor: the caller's may change
            order = places if bool((places.diff() < 0).any()) else None
        rows = shard_rows(len(images), process_shard)
        selected = images[rows.start : rows.stop] if order is None else images[order[rows.start : rows.stop]]
        if dtype != images.dtype:
            selected = pixels_to_float(selected).to(dtype)
        selected = selected.to(device or images.device).contiguous()
        if selected.untyped_storage().data_ptr() == images.untyped_storage().data_ptr():
            selected = selected.clone()  # the norms are of these values, whatever the caller does with theirs
        if pin_memory:
            selected = selected.pin_memory()
        norms = torch.cat([reference_norms(selected[part]) for part in parts(selected)])
        check_finite(norms, rows.start)
        self._attach(selected, len(images), norms, labels, order, augmentation, process_shard)

    def _attach(
        self,
        images: ReferenceRows,
        total: int,
        norms: Tensor,
        labels: Tensor | None,
        order: Tensor | None,
        augmentation: Augmentation,
        process_shard: tuple[int, int] | None,
    ) -> None:
        """Take this process's part of `total` images and their norms, all labels in the bank's order, and that order."""
        if augmentation not in ("none", "horizontal_flip"):
            raise ValueError(f"augmentation must be 'none' or 'horizontal_flip'; got {augmentation!r}.")
        if augmentation != "none" and len(images.shape) < 3:
            raise ValueError(f"flips need images (N, ..., H, W); got {tuple(images.shape)}. Pass augmentation='none'.")
        self.images: ReferenceRows = images
        self._norms = self._sent_norms = norms
        self._order = order
        self.augmentation, self.process_shard = augmentation, process_shard
        self._num_images, self._labels = total, labels
        self.class_rows = {} if labels is None else rows_of_classes(labels, shard_rows(total, process_shard))

    def __len__(self) -> int:
        """Number of images, over all processes; their mirrors not counted."""
        return self._num_images

    @property
    def _mirrored(self) -> bool:
        return self.augmentation == "horizontal_flip"

    @property
    def num_references(self) -> int:
        """Number of references that a posterior mean without labels is over, mirrors counted."""
        return self._num_images * (1 + self._mirrored)

    @property
    def device(self) -> torch.device:
        """Device on which the images are kept, which is the CPU for those in a file."""
        return self._norms.device

    @property
    def nbytes(self) -> int:
        """Bytes of the images that this process holds."""
        return self.images.shape.numel() * self.images.dtype.itemsize

    def rows_of(self, index: Tensor) -> Tensor:
        """The bank's rows of positions in the images it was made of: (k,) int64 to (k,) int64, on the CPU."""
        return index if self._rows is None else self._rows[index]

    @cached_property
    def _rows(self) -> Tensor | None:
        return None if self._order is None else self._order.argsort()

    @torch.no_grad()
    def posterior_mean(
        self,
        noisy: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        *,
        source_index: Tensor | None = None,
        labels: Tensor | None = None,
        subset_size: int | None = None,
        generator: torch.Generator | None = None,
        joined: Tensor | None = None,
    ) -> PosteriorMean:
        """Posterior mean of x0 given ``x_t = alpha x0 + sigma noise`` over the bank.

        Xu, Tong & Jaakkola 2023 (arXiv 2302.00670), eq. 5, with all data as the reference batch; with `subset_size`,
        over a uniform subset that contains the sources.

        Args:
            noisy: (B, ...) floating point, the noised images x_t.
            alpha, sigma: (B,) or a number.
            source_index: (B,) integers, the positions of the sources in the images the bank was made of. Needed for a
                subset; otherwise the source is in the set anyway.
            labels: (B,) integer classes: row i uses images of its class; -1 uses all.
            subset_size: n, of a subset drawn afresh: the sources and n - B others. Not with a sharded bank.
            generator: for the subset, on the CPU.
            joined: (B, ...) images, each a reference of its own row beside the bank: sources that are not in it. No subset.

        Returns:
            mean (B, ...) in float32, effective_sample_size (B,).

        Raises:
            ValueError: shapes that do not fit, a class without images, or a subset without its sources.
            TypeError: no tensors, noisy images that are not floating point, labels or positions that are not integers.
        """
        check_noisy_like(noisy, self.images.shape)
        alpha, sigma = coefficient_rows(alpha, sigma, noisy)
        labels = None if labels is None else self._known_labels(labels, noisy)
        if source_index is not None:
            check_integers("source_index", source_index, len(noisy))
            if subset_size is not None or source_index.device.type == "cpu":  # else a look would wait, for nothing
                source_index = self._known_sources(source_index)
        if joined is not None and subset_size is not None:
            raise ValueError("joined images are references beside the whole bank: leave subset_size out.")
        if subset_size is not None:
            return self._subset_posterior(noisy, alpha, sigma, source_index, labels, subset_size, generator)
        if self.process_shard is None:
            state = self._state(noisy, alpha, sigma, labels)
        else:
            state = merged_over_processes(self._state, noisy, alpha, sigma, labels)
        if joined is not None:
            state = state.merge(self._joined_state(noisy, alpha, sigma, joined))
        return state.result_like(noisy, self.images.dtype)

    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Raise ValueError unless each image of `clean` (B, ...) is in the bank, under its label.

        With `source_index`, those images are compared; without, or where the bank is sharded, all are searched: at a
        noise level far below the distance of two pixels' levels, the posterior mean is the nearest image.
        """
        if source_index is not None and self.process_shard is None:
            check_integers("source_index", source_index, len(clean))
            rows = self.rows_of(self._known_sources(source_index))
            nearest = pixels_to_float(take_rows(self.images, rows).to(clean.device))
            difference = (nearest - clean).flatten(1).abs().amax(1)
            if self._mirrored:
                difference = torch.minimum(difference, (nearest.flip(-1) - clean).flatten(1).abs().amax(1))
            if labels is not None and self._labels is not None:
                labels = self._known_labels(labels, clean)
                other_class = (labels != self._labels[rows]) & (labels != -1)
                difference = difference.masked_fill(other_class.to(clean.device), torch.inf)
        else:
            nearest = self.posterior_mean(clean, 1.0, 1e-5, labels=labels).mean
            difference = (nearest - clean).flatten(1).abs().amax(1)
        # float32 roundings are the same pixel; half-precision banks have rounded theirs.
        allowed = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(self.images.dtype, 1e-5)
        wrong = ~(difference <= allowed * clean.flatten(1).abs().amax(1).clamp_min(1))
        if bool(wrong.any()):
            raise ValueError(
                f"images {wrong.nonzero().flatten().tolist()[:8]} of the batch are not in the bank where they should be "
                f"(by source_index and label): they differ by up to {difference.max().item():.3g}. Without its source a "
                "target is biased. Make the bank of the training images, cropped, resized and flipped as they are "
                "(augmentation='horizontal_flip' for random flips)."
            )

    def _known_labels(self, labels: Tensor, noisy: Tensor) -> Tensor:
        return labels_among(self.class_rows, checked_labels(labels, len(noisy), minimum=-1))

    def _known_sources(self, source_index: Tensor) -> Tensor:
        index = source_index.cpu()
        if not bool(((index >= 0) & (index < self._num_images)).all()):
            raise ValueError(f"source_index must lie in [0, {self._num_images}); got {index.tolist()}.")
        return index

    def _state(self, noisy: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> PosteriorState:
        """The state of this process's images for (B, ...) noisy ones with labels (B,) on the CPU."""
        if self._sent_norms.device != noisy.device:  # once: sending them with each chunk would wait
            self._sent_norms = self._norms.to(noisy.device)
        norms = self._sent_norms
        if labels is None:
            return state_with_mirrors(noisy, self.images, alpha, sigma, self._mirrored, norms=norms)
        return state_by_class(
            noisy, self.images, self.class_rows, alpha, sigma, labels, mirrors=self._mirrored, norms=norms
        )

    def _joined_state(self, noisy: Tensor, alpha: Tensor, sigma: Tensor, joined: Tensor) -> PosteriorState:
        """The state of each row's own image alone."""
        if joined.shape != noisy.shape:
            raise ValueError(
                f"joined must have shape {tuple(noisy.shape)}, an image for each; got {tuple(joined.shape)}."
            )
        if joined.dtype != (dtype := self.images.dtype):
            if dtype == torch.uint8:
                raise TypeError(f"the bank holds uint8 pixels; joined images are {joined.dtype}. Pass uint8 pixels.")
            joined = pixels_to_float(joined).to(dtype)
        own = torch.eye(len(noisy), dtype=torch.bool, device=noisy.device)
        norms = reference_norms(joined)
        return state_with_mirrors(noisy, joined, alpha, sigma, self._mirrored, norms=norms, mask=own)

    def _subset_posterior(
        self,
        noisy: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        sources: Tensor | None,
        labels: Tensor | None,
        size: int,
        generator: torch.Generator | None,
    ) -> PosteriorMean:
        if self.process_shard is not None:
            raise ValueError("subset_size needs a bank that is not sharded; a sharded one is used whole.")
        if sources is None:
            raise ValueError("subset_size needs source_index: the subset must contain the sources.")
        rows = self.rows_of(draw_subset(sources, self._num_images, size, generator))
        images, norms = take_rows(self.images, rows), self._norms[rows.to(self.device, non_blocking=True)]
        mask = None if labels is None or self._labels is None else same_class(labels, self._labels[rows])
        state = state_with_mirrors(noisy, images, alpha, sigma, self._mirrored, norms=norms, mask=mask)
        return state.result_like(noisy, images.dtype)

    # ---- files

    def save(self, path: str | os.PathLike[str], fingerprint: str = "") -> None:
        """Write the bank as safetensors, complete or not at all. Not a sharded one.

        Args:
            path: path of the file.
            fingerprint: identifies the data and their preprocessing; `open` compares it.
        """
        if self.process_shard is not None:
            raise ValueError("a sharded bank holds a part of the images; save one that is not sharded.")
        chunks = (self.images[part].cpu() for part in parts(self.images))
        write_bank(Path(path), self.images.shape, self.images.dtype, chunks, self._labels, self._order, fingerprint)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        augmentation: Augmentation = "none",
        process_shard: tuple[int, int] | None = None,
        pin_memory: bool = False,
        fingerprint: str | None = None,
    ) -> ReferenceBank:
        """A bank that `save` or `from_dataset` wrote.

        Args:
            path: path of the file.
            device: where to keep the images. None: in the file, from which chunks are read as they are needed.
            augmentation, process_shard, pin_memory: as for the class.
            fingerprint: the one expected. None: not compared.

        Raises:
            ValueError: the file is not a bank, is damaged, or was made of other data or with other preprocessing.
            OSError: it cannot be read.
        """
        stored = read_bank(Path(path), fingerprint)
        images = stored.rows("images")
        rows = shard_rows(images.shape[0], process_shard)
        labels, order = (stored.rows(name)[:] if name in stored.names else None for name in ("labels", "order"))
        norms = stored.rows("norms")[rows.start : rows.stop]
        bank = cls.__new__(cls)
        kept: ReferenceRows = images.part(rows)
        if device is not None:
            tensor = kept[:].to(device)
            kept = tensor.pin_memory() if pin_memory else tensor
            norms = norms.to(device)
        bank._attach(kept, images.shape[0], norms, labels, order, augmentation, process_shard)
        return bank

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        image_key: str = "image",
        label_key: str | None = None,
        transform: Callable[[Any], Tensor] | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        augmentation: Augmentation = "none",
        process_shard: tuple[int, int] | None = None,
        pin_memory: bool = False,
        quiet: bool = False,
    ) -> ReferenceBank:
        """A bank of the images of a `datasets.Dataset`, decoded one by one with a progress bar.

        Args:
            dataset: the data set.
            image_key, label_key: its columns.
            transform: from an entry of the image column to a tensor; the same result each time. Default: a PIL image's
                pixels, uint8 (C, H, W).
            path: a file to write the bank to and to read chunks from, for data larger than memory. A file that is there
                already is used if it holds these images: as far as 16 of them tell where data set and `transform` have
                the fingerprint of those it was made of, and otherwise by comparing all.
            device: where to keep the images. None: in memory, or with `path` in the file.
            augmentation, process_shard, pin_memory: as for the class.
            quiet: no progress bar.

        Raises:
            ValueError: images of different shapes, or a file that was made of other data.
        """
        from datasets.fingerprint import Hasher

        images = DatasetImages(dataset, image_key, label_key, transform or pil_to_pixels)
        if path is None:
            bank = cls(
                images.whole(quiet), images.labels, device=device, augmentation=augmentation,
                process_shard=process_shard, pin_memory=pin_memory,
            )  # fmt: skip
            bank._order = images.order
            return bank
        path, fingerprint = Path(path), Hasher.hash([dataset._fingerprint, image_key, label_key, transform])
        if path.exists():
            compare_bank(path, images, fingerprint, quiet)
        else:
            chunks = images.chunks(quiet)
            write_bank(path, images.shape, images.dtype, chunks, images.labels, images.order, fingerprint)
        return cls.open(
            path, device=device, augmentation=augmentation, process_shard=process_shard, pin_memory=pin_memory
        )
