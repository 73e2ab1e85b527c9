"""References beyond one batch: all images of a data set, and reference batches shared by the processes of a run.

Both compute the same posterior mean as `posterior_mean` over the set they stand for. The only collectives of the package
are here: with the references spread over processes, the noisy images of all processes are gathered, each process
computes the state of its own references for them, and the states are merged.
"""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .posterior import (
    PosteriorMean,
    PosteriorState,
    ReferenceRows,
    centred_levels,
    coefficient_rows,
    pixels_to_float,
    posterior_state,
    squared_norms,
)

Augmentation = Literal["none", "horizontal_flip"]

_STORED = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_STORED |= {torch.float64: "F64"}


class ReferenceSet(ABC):
    """References that are not one tensor, as `STFTrainingObjective` takes them."""

    @abstractmethod
    def posterior_mean(
        self,
        noisy: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        *,
        source_index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PosteriorMean:
        """As the function of that name, over this set; rows with a label use references of their class, -1 all."""

    @abstractmethod
    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Raise ValueError unless `clean` (B, ...) are among the references that their rows use."""


class ReferenceBank(ReferenceSet):
    """All images of a data set as the reference set: the exact empirical posterior.

    The source of each noisy image is one of the images and is counted once, like every other. Memory is that of the
    images as they are stored, and 8 bytes for each; posterior means take chunks of them at a time.

    Args:
        images: (N, ...) uint8 pixels (read as x / 127.5 - 1), or floating point in the data's range.
        labels: (N,) integer classes, for posteriors within a class. The rows are kept sorted by class, so that other
            classes are not touched.
        device: where the images are kept. None: where they are. Chunks are moved to the noisy images' device.
        dtype: in which they are kept: torch.uint8, float16, bfloat16 or float32. None: as they are. uint8 is exact for
            pixels and the fastest; half precision rounds the references themselves.
        augmentation: "horizontal_flip": the set is closed under flips; an image and its mirror are both in it (an
            image that equals its mirror is in it twice, as in training with random flips).
        process_shard: (index, count): keep only this part of the images, of a bank spread over `count` processes of the
            default process group. Its posterior means are collective: every process calls them, with its own images.
        pin_memory: keep the images in page-locked memory, from which a GPU reads faster.

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
        dtype = images.dtype if dtype is None else dtype
        pixels_to_float(images[:0])
        pixels_to_float(torch.empty(0, dtype=dtype))
        if dtype == torch.uint8 != images.dtype:
            raise TypeError(
                f"the images are {images.dtype} and would be rounded to uint8. Pass uint8 pixels, or dtype=torch.float32."
            )
        order = None
        if labels is not None:
            labels = _checked_labels(labels, len(images))
            if bool((labels.diff() < 0).any()):
                order = labels.sort(stable=True).indices
        rows = _shard_rows(len(images), process_shard)
        selected = images[rows.start : rows.stop] if order is None else images[order[rows.start : rows.stop]]
        if dtype != images.dtype:
            selected = pixels_to_float(selected).to(dtype)
        selected = selected.to(device or images.device).contiguous()
        if pin_memory:
            selected = selected.pin_memory()
        norms = torch.cat([_norms(selected[part]) for part in _parts(selected)])
        if not bool(norms.isfinite().all()):
            raise ValueError(
                f"images {(~norms.isfinite()).nonzero().flatten().tolist()[:8]} of the bank are not finite."
            )
        if labels is not None and order is not None:
            labels = labels[order]
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
        self._images, self._norms, self._order = images, norms, order
        self.augmentation, self.process_shard = augmentation, process_shard
        self._num_images, self._labels = total, labels
        rows = _shard_rows(total, process_shard)
        self._class_rows: dict[int, range] = {}
        if labels is not None:
            classes, counts = labels.unique_consecutive(return_counts=True)
            ends = counts.cumsum(0)
            for label, start, end in zip(classes.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
                start, end = (min(max(bound, rows.start), rows.stop) - rows.start for bound in (start, end))
                self._class_rows[label] = range(start, end)

    def __len__(self) -> int:
        """Number of images, over all processes; their mirrors not counted."""
        return self._num_images

    @property
    def num_references(self) -> int:
        """Number of references that a posterior mean without labels is over, mirrors counted."""
        return self._num_images * (2 if self.augmentation == "horizontal_flip" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the images that this process holds."""
        return self._images.shape.numel() * self._images.dtype.itemsize

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

        Returns:
            mean (B, ...) in float32, effective_sample_size (B,).

        Raises:
            ValueError: shapes that do not fit, a class without images, or a subset without its sources.
        """
        if noisy.shape[1:] != self._images.shape[1:]:
            raise ValueError(
                f"noisy must be (B, {', '.join(map(str, self._images.shape[1:]))}) as the bank's images are; got "
                f"{tuple(noisy.shape)}."
            )
        alpha, sigma = coefficient_rows(alpha, sigma, noisy)
        if labels is not None:
            labels = self._known_labels(labels, noisy)
        if source_index is not None:
            source_index = self._known_sources(source_index, noisy)
        if subset_size is not None:
            return self._subset_posterior(noisy, alpha, sigma, source_index, labels, subset_size, generator)
        if self.process_shard is None:
            state = self._state(noisy, alpha, sigma, labels)
        else:
            state = merged_over_processes(self._state, noisy, alpha, sigma, labels)
        return _result(state, noisy, self._images.dtype)

    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Raise ValueError unless each image of `clean` (B, ...) is in the bank, under its label.

        With `source_index`, those images are compared; without, or where the bank is sharded, all are searched: at a
        noise level far below the distance of two pixels' levels, the posterior mean is the nearest image.
        """
        if source_index is not None and self.process_shard is None:
            rows = self._rows_of(self._known_sources(source_index, clean))
            nearest = pixels_to_float(_take(self._images, rows).to(clean.device))
            difference = (nearest - clean).flatten(1).abs().amax(1)
            if self.augmentation == "horizontal_flip":
                difference = torch.minimum(difference, (nearest.flip(-1) - clean).flatten(1).abs().amax(1))
            if labels is not None and self._labels is not None:
                labels = self._known_labels(labels, clean)
                other_class = (labels != self._labels[rows]) & (labels != -1)
                difference = difference.masked_fill(other_class.to(clean.device), torch.inf)
        else:
            nearest = self.posterior_mean(clean, 1.0, 1e-5, labels=labels).mean
            difference = (nearest - clean).flatten(1).abs().amax(1)
        # float32 roundings are the same pixel; half-precision banks have rounded theirs.
        allowed = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(self._images.dtype, 1e-5)
        wrong = ~(difference <= allowed * clean.flatten(1).abs().amax(1).clamp_min(1))
        if bool(wrong.any()):
            raise ValueError(
                f"images {wrong.nonzero().flatten().tolist()[:8]} of the batch are not in the bank where they should be "
                f"(by source_index and label): they differ by up to {difference.max().item():.3g}. Without its source a "
                "target is biased. Make the bank of the training images, cropped, resized and flipped as they are "
                "(augmentation='horizontal_flip' for random flips)."
            )

    def _known_labels(self, labels: Tensor, noisy: Tensor) -> Tensor:
        if not self._class_rows:
            raise ValueError("the bank has no labels: make it with labels=, or leave them out here.")
        labels = _checked_labels(labels, len(noisy), minimum=-1)
        unknown = sorted(set(labels.tolist()) - {-1, *self._class_rows})
        if unknown:
            raise ValueError(f"no image of the bank has a label of {unknown}; it has {sorted(self._class_rows)}.")
        return labels

    def _known_sources(self, source_index: Tensor, noisy: Tensor) -> Tensor:
        index = source_index.cpu()
        if index.shape != noisy.shape[:1] or index.is_floating_point():
            raise ValueError(f"source_index must be {len(noisy)} integers; got {index.dtype} {tuple(index.shape)}.")
        if not bool(((index >= 0) & (index < self._num_images)).all()):
            raise ValueError(f"source_index must lie in [0, {self._num_images}); got {index.tolist()}.")
        return index

    def _rows_of(self, index: Tensor) -> Tensor:
        """The bank's rows of positions in the images it was made of."""
        return index if self._order is None else self._order.argsort()[index]

    def _state(self, noisy: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> PosteriorState:
        """The state of this process's images for (B, ...) noisy ones, class by class."""
        if labels is None:
            return self._flip_closed_state(noisy, alpha, sigma, self._images, self._norms, None, None)
        parts = []
        for label in sorted(set(labels.tolist())):
            which = (labels == label).nonzero().flatten().to(noisy.device)
            rows = None if label == -1 else self._class_rows[label]
            state = self._flip_closed_state(
                noisy[which], alpha[which], sigma[which], self._images, self._norms, rows, None
            )
            parts.append((which, state))
        back = torch.cat([which for which, _ in parts]).argsort()
        fields = zip(*(vars(state).values() for _, state in parts), strict=True)
        return PosteriorState(*(torch.cat(field)[back] for field in fields))

    def _flip_closed_state(
        self,
        noisy: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        images: ReferenceRows,
        norms: Tensor,
        rows: range | None,
        mask: Tensor | None,
    ) -> PosteriorState:
        if self.augmentation == "none":
            return posterior_state(noisy.flatten(1), images, alpha, sigma, norms=norms, rows=rows, mask=mask)
        # A mirrored image against x_t is the image against the mirrored x_t: one pass over the images serves both.
        both = torch.cat([noisy, noisy.flip(-1)]).flatten(1)
        mask = None if mask is None else mask.repeat(2, 1)
        state = posterior_state(both, images, alpha.repeat(2), sigma.repeat(2), norms=norms, rows=rows, mask=mask)
        plain, mirrored = (
            PosteriorState(*half) for half in zip(*(field.chunk(2) for field in vars(state).values()), strict=True)
        )
        mirrored.weighted_sum = mirrored.weighted_sum.view(noisy.shape).flip(-1).flatten(1)
        return plain.merge(mirrored)

    def _subset_posterior(
        self,
        noisy: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        source_index: Tensor | None,
        labels: Tensor | None,
        size: int,
        generator: torch.Generator | None,
    ) -> PosteriorMean:
        if self.process_shard is not None:
            raise ValueError("subset_size needs a bank that is not sharded; a sharded one is used whole.")
        if source_index is None:
            raise ValueError("subset_size needs source_index: the subset must contain the sources.")
        if len(source_index.unique()) != len(source_index):
            raise ValueError("source_index has repeats: an image counted twice would bias the target.")
        if not len(source_index) <= size <= self._num_images:
            raise ValueError(f"subset_size must lie in [{len(source_index)}, {self._num_images}]; got {size}.")
        rest = torch.ones(self._num_images, dtype=torch.bool).index_fill_(0, source_index, False).nonzero().flatten()
        others = rest[torch.randperm(len(rest), generator=generator)[: size - len(source_index)]]
        rows = self._rows_of(torch.cat([source_index, others]))
        images, norms = _take(self._images, rows), self._norms[rows.to(self._norms.device)]
        mask = None
        if labels is not None and self._labels is not None:
            mask = (labels[:, None] == self._labels[rows][None]) | (labels == -1)[:, None]
        state = self._flip_closed_state(noisy, alpha, sigma, images, norms, None, mask)
        return _result(state, noisy, images.dtype)

    # ---- files

    def save(self, path: str | os.PathLike[str], fingerprint: str = "") -> None:
        """Write the bank as safetensors, complete or not at all. Not a sharded one.

        Args:
            path: of the file.
            fingerprint: of the data and their preprocessing, which `open` compares.
        """
        if self.process_shard is not None:
            raise ValueError("a sharded bank holds a part of the images; save one that is not sharded.")
        chunks = (self._images[part].cpu() for part in _parts(self._images))
        _write_bank(
            Path(path), self._images.shape, self._images.dtype, chunks, self._labels, self._order,
            {"fingerprint": fingerprint},
        )  # fmt: skip

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
            path: of the file.
            device: where to keep the images. None: in the file, from which chunks are read as they are needed.
            augmentation, process_shard, pin_memory: as for the class.
            fingerprint: the one expected. None: not compared.

        Raises:
            ValueError: the file is not a bank, or was made of other data or with other preprocessing.
            OSError: it cannot be read.
        """
        path = Path(path)
        stored = _StoredTensors(path)
        if fingerprint is not None and stored.metadata.get("fingerprint") != fingerprint:
            raise ValueError(
                f"{path} was made of another data set or with other preprocessing (fingerprint "
                f"{stored.metadata.get('fingerprint')!r}, expected {fingerprint!r}). Delete it, or choose another path."
            )
        images = stored["images"]
        rows = _shard_rows(images.shape[0], process_shard)
        part = slice(rows.start, rows.stop)
        labels, order = (stored[name][:] if name in stored.names else None for name in ("labels", "order"))
        norms = stored["norms"][part]
        bank = cls.__new__(cls)
        kept: ReferenceRows = images.part(rows)
        if device is not None:
            tensor = kept[slice(0, len(rows))].to(device)
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
                already is used, if data set and `transform` are those it was made of, as far as their fingerprint and
                16 images tell.
            device: where to keep the images. None: in memory, or with `path` in the file.
            augmentation, process_shard, pin_memory: as for the class.
            quiet: no progress bar.

        Raises:
            ValueError: images of different shapes, or a file that was made of other data.
        """
        from datasets.fingerprint import Hasher

        if len(dataset) == 0:
            raise ValueError("the data set is empty.")
        read = transform or pil_to_pixels
        labels = None
        order = torch.arange(len(dataset))
        if label_key is not None:
            labels = _checked_labels(torch.tensor(list(dataset[label_key])), len(dataset))
            labels, order = labels.sort(stable=True)
        first = read(dataset[int(order[0])][image_key])
        shape = torch.Size((len(dataset), *first.shape))
        images = _decoded(dataset, image_key, order.tolist(), read, first, quiet)
        if path is None:
            whole = torch.empty(shape, dtype=first.dtype)
            start = 0
            for chunk in images:
                whole[start : start + len(chunk)] = chunk
                start += len(chunk)
            bank = cls(
                whole, labels, device=device, augmentation=augmentation, process_shard=process_shard,
                pin_memory=pin_memory,
            )  # fmt: skip
            bank._order = order if label_key is not None else None
            return bank
        fingerprint = Hasher.hash([dataset._fingerprint, image_key, label_key, transform])
        there = Path(path).exists()
        if not there:
            kept = order if label_key is not None else None
            _write_bank(Path(path), shape, first.dtype, images, labels, kept, {"fingerprint": fingerprint})
        if there:
            # Fingerprints pass over what a transform imports: a few images are decoded and compared.
            stored = _StoredTensors(Path(path))["images"]
            for row in torch.linspace(0, len(order) - 1, min(len(order), 16)).long().tolist():
                image = read(dataset[int(order[row])][image_key])
                if stored.shape != shape or not torch.equal(stored[row : row + 1][0], image.to(stored.dtype)):
                    raise ValueError(
                        f"{path} was made of another data set or with other preprocessing: image {int(order[row])} differs. "
                        "Delete it, or choose another path."
                    )
        return cls.open(
            path, device=device, augmentation=augmentation, process_shard=process_shard, pin_memory=pin_memory,
            fingerprint=fingerprint,
        )  # fmt: skip


class SharedReferences(ReferenceSet):
    """The reference batches of all processes as one: n is then the number of references of all processes together.

    Every process of the default process group makes one at each step, of its part of one list without repeats
    (`ReferenceBatchSampler(..., share_references=True)`), and computes its posterior means at the same time as the others.

    Args:
        images: (n', ...) this process's references, its sources first.
        labels: (n',) integer classes.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images = images
        self.labels = None if labels is None else _checked_labels(labels, len(images)).to(images.device)

    @torch.no_grad()
    def posterior_mean(
        self,
        noisy: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        *,
        source_index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PosteriorMean:
        """Posterior mean over the references of all processes. Collective. Arguments as for `ReferenceBank`."""

        def state(noisy: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> PosteriorState:
            mask = None
            if labels is not None and self.labels is not None:
                labels = labels.to(self.labels.device)
                mask = (labels[:, None] == self.labels[None]) | (labels == -1)[:, None]
            return posterior_state(noisy.flatten(1), self.images, alpha, sigma, mask=mask)

        if (labels is None) != (self.labels is None):
            raise ValueError("labels and SharedReferences(labels=...) go together: rows use references of their class.")
        if labels is not None:
            labels = _checked_labels(labels, len(noisy), minimum=-1)
        alpha, sigma = coefficient_rows(alpha, sigma, noisy)
        return _result(merged_over_processes(state, noisy, alpha, sigma, labels), noisy, self.images.dtype)

    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Raise ValueError unless the first rows of the references are `clean`, under their labels."""
        index = torch.arange(len(clean)) if source_index is None else source_index
        sources = pixels_to_float(self.images[index.to(self.images.device)]).to(clean.device)
        if not torch.allclose(sources, clean, rtol=1e-6, atol=1e-6):
            raise ValueError("the first references of this process must be its images, in order.")
        if labels is not None and self.labels is not None:
            own = self.labels[index.to(self.labels.device)].to(labels.device)
            if not bool(((labels == own) | (labels == -1)).all()):
                raise ValueError("labels differ from those of the references; pass -1 where a condition is dropped.")


# ---- processes


def merged_over_processes(
    state: Callable[[Tensor, Tensor, Tensor, Tensor | None], PosteriorState],
    noisy: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
) -> PosteriorState:
    """The state of this process's rows over the references of all processes.

    Args:
        state: this process's references' state for any rows (noisy, alpha, sigma, labels).
        noisy: (B, ...); B may differ between processes.
        alpha, sigma: (B,) float64.
        labels: (B,) int64, on all processes or on none.
    """
    if not dist.is_initialized():
        raise ValueError(
            "references are spread over processes, and there is no process group. Start with `accelerate launch` (or "
            "torchrun) and make an Accelerator first, or leave process_shard out."
        )
    rank, sizes = dist.get_rank(), _gather_sizes(len(noisy), noisy.device)
    longest = max(sizes)

    def everyones(rows: Tensor) -> Tensor:
        padded = torch.cat([rows, rows.new_ones(longest - len(rows), *rows.shape[1:])]).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    everyones_labels = None if labels is None else everyones(labels.to(noisy.device)).cpu()
    local = state(everyones(noisy), everyones(alpha), everyones(sigma), everyones_labels)
    maximum = local.maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    local = local.rescaled(maximum)
    for field in (local.normalizer, local.squares, local.weighted_sum):
        dist.all_reduce(field)
    start = sum(sizes[:rank])
    return PosteriorState(*(field[start : start + len(noisy)] for field in vars(local).values()))


def _gather_sizes(size: int, device: torch.device) -> list[int]:
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([size], device=device))
    return torch.cat(sizes).tolist()


def _shard_rows(total: int, process_shard: tuple[int, int] | None) -> range:
    """The rows of one part of `total`; sizes differ by at most one."""
    if total == 0:
        raise ValueError("a bank needs at least one image.")
    if process_shard is None:
        return range(total)
    index, count = process_shard
    if not 0 <= index < count <= total:
        raise ValueError(
            f"process_shard must be (index, count) with 0 <= index < count <= {total}; got {process_shard}."
        )
    return range(index * total // count, (index + 1) * total // count)


# ---- images and labels


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


def _decoded(
    dataset: Any, image_key: str, order: list[int], read: Callable[[Any], Tensor], first: Tensor, quiet: bool
) -> Iterable[Tensor]:
    """The images in `order`, in chunks of 256."""
    from tqdm.auto import tqdm

    with tqdm(total=len(order), desc="Building the reference bank", unit="image", disable=quiet) as progress:
        for start in range(0, len(order), 256):
            rows = order[start : start + 256]
            images = [read(image) for image in dataset[rows][image_key]]
            for row, image in zip(rows, images, strict=True):
                if image.shape != first.shape or image.dtype != first.dtype:
                    raise ValueError(
                        f"image {row} is {image.dtype} {tuple(image.shape)} and others are {first.dtype} "
                        f"{tuple(first.shape)}. Pass a transform that makes them alike."
                    )
            progress.update(len(rows))
            yield torch.stack(images)


def _checked_labels(labels: Tensor, length: int, minimum: int = 0) -> Tensor:
    """Labels as int64 on the CPU."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {labels.dtype}.")
    if labels.shape != (length,):
        raise ValueError(f"labels must have shape ({length},), one for each image; got {tuple(labels.shape)}.")
    labels = labels.to("cpu", torch.int64)
    if bool((labels < minimum).any()):
        raise ValueError(f"labels must be at least {minimum}; got {labels.min().item()}.")
    return labels


def _parts(images: ReferenceRows) -> Iterator[slice]:
    """Slices of about 16 MiB in float32."""
    rows = max(1, 2**22 // max(images.shape[1:].numel(), 1))
    return (slice(start, start + rows) for start in range(0, images.shape[0], rows))


def _norms(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    return squared_norms(centred_levels(flat) if flat.dtype == torch.uint8 else pixels_to_float(flat))


def _take(images: ReferenceRows, rows: Tensor) -> Tensor:
    if isinstance(images, Tensor):
        return images[rows.to(images.device)]
    return torch.cat([images[slice(row, row + 1)] for row in rows.tolist()])


def _result(state: PosteriorState, noisy: Tensor, dtype: torch.dtype) -> PosteriorMean:
    result_dtype = torch.float64 if noisy.dtype == dtype == torch.float64 else torch.float32
    mean, effective_sample_size = state.result(result_dtype, centred_levels=dtype == torch.uint8)
    return PosteriorMean(mean.view(noisy.shape), effective_sample_size)


# ---- files: safetensors, whose layout (a length, a JSON header, the tensors' bytes) lets one be written and read by rows


def _write_bank(
    path: Path,
    shape: torch.Size,
    dtype: torch.dtype,
    chunks: Iterable[Tensor],
    labels: Tensor | None,
    order: Tensor | None,
    metadata: dict[str, str],
) -> None:
    """Write images chunk by chunk, with their norms, all to a file beside `path` that replaces it when complete."""
    small = {name: tensor for name, tensor in (("labels", labels), ("order", order)) if tensor is not None}
    layout = {"images": (dtype, shape), "norms": (torch.float64, shape[:1])}
    layout |= {name: (tensor.dtype, tensor.shape) for name, tensor in small.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (kind, size) in layout.items():
        begin, end = end, end + size.numel() * kind.itemsize
        header[name] = {"dtype": _STORED[kind], "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be writing the same bank.
    descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    aside = Path(name)
    try:
        with open(descriptor, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            norms = []
            for chunk in chunks:
                file.write(_bytes(chunk))
                norms.append(_norms(chunk))
            for tensor in (torch.cat(norms), *small.values()):
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class _StoredTensors:
    """The tensors of a safetensors file, by name."""

    def __init__(self, path: Path) -> None:
        self.file = _OpenFile(path)
        length = int.from_bytes(self.file.read(0, 8), "little") if self.file.size >= 8 else 0
        if not 0 < length < 2**27 or length + 8 > self.file.size:
            raise ValueError(f"{path} is not a safetensors file.")
        header = json.loads(self.file.read(8, length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.names = header
        self._start = 8 + length
        missing = {"images", "norms"} - header.keys()
        if missing:
            raise ValueError(f"{path} is not a reference bank: it lacks {sorted(missing)}.")
        if self._start + max(entry["data_offsets"][1] for entry in header.values()) != self.file.size:
            raise ValueError(f"{path} is damaged: its size is not what its header says. Delete it.")

    def __getitem__(self, name: str) -> _FileRows:
        entry = self.names[name]
        dtype = {stored: dtype for dtype, stored in _STORED.items()}[entry["dtype"]]
        return _FileRows(self.file, self._start + entry["data_offsets"][0], torch.Size(entry["shape"]), dtype)


class _OpenFile:
    """A file held open: replacing it on the disk does not change what is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._identity())

    def _identity(self) -> tuple[int, ...]:
        stat = os.fstat(self._file.fileno())
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            if not count:
                raise OSError(f"{self.path} ended early: it was truncated after it was opened.")
            done += count


def _reopened(path: Path, identity: tuple[int, ...]) -> _OpenFile:
    """What `_OpenFile` is unpickled as."""
    file = _OpenFile(path)
    if file._identity() != identity:
        raise ValueError(f"{path} was replaced after the bank was opened. Open it again.")
    return file


class _FileRows:
    """Rows (n, ...) in a file, read when they are sliced."""

    def __init__(self, file: _OpenFile, offset: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype

    def part(self, rows: range) -> _FileRows:
        row_bytes = self.shape[1:].numel() * self.dtype.itemsize
        shape = torch.Size((len(rows), *self.shape[1:]))
        return _FileRows(self.file, self.offset + rows.start * row_bytes, shape, self.dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        tensor = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype)
        self.file.read_into(_bytes(tensor), self.offset + start * self.shape[1:].numel() * self.dtype.itemsize)
        return tensor
