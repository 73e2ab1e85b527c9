"""Reference sets: one batch, or the batches that the processes of a run share.

The only collectives of the package are here: with the references spread over processes, the noisy images of all
processes are gathered, each process computes the state of its own references for them, and sends each process the states of
its rows, which that merges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from functools import cache, reduce

import torch
import torch.distributed as dist
from torch import Tensor

from .posterior import (
    PosteriorMean,
    PosteriorState,
    check_noisy,
    check_tensor,
    coefficient_rows,
    pixels_to_float,
    posterior_mean,
    posterior_state,
)
from .reference_classes import same_class


class ReferenceSet(ABC):
    """What stands behind a target: references that contain the sources of the rows."""

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


class ReferenceBatch(ReferenceSet):
    """The references of one batch, which contain its sources.

    Args:
        images: (n, ...) references, floating point in the data's range or uint8 pixels.
        labels: (n,) integer classes.
        num_unconditional: the first so many are a draw of the whole data law; rows of label -1 use these and their own
            source. None: they use all.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, num_unconditional: int | None = None) -> None:
        check_tensor("images", images, "(n, ...)")
        self.images, self.labels, self.num_unconditional = images, labels, num_unconditional

    def posterior_mean(
        self,
        noisy: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        *,
        source_index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PosteriorMean:
        """As the function of that name. Without `source_index`, the sources are the first rows.

        Raises:
            ValueError: as that function and `check_shapes`, or a `source_index` outside the references.
            TypeError: as that function and `check_shapes`.
        """
        check_noisy(noisy)
        self.check_shapes(noisy, source_index, labels)
        if noisy.device.type == "cpu" and source_index is not None:
            self._check_range(source_index)
        mask = self._usable(_own_rows(noisy, source_index), labels)
        return posterior_mean(noisy, self.images, alpha=alpha, sigma=sigma, mask=mask)

    def _usable(self, own: Tensor, labels: Tensor | None) -> Tensor | None:
        """(B, n) bool, which references each row may use; None for all. `own` (B,) are the rows' sources."""
        if labels is None or self.labels is None:
            return None
        labels, reference_labels = labels.to(own.device), self.labels.to(own.device)
        position = torch.arange(len(self.images), device=own.device)[None]
        # Not `labels == reference_labels` for -1: references of that label may lie beyond the unconditional ones.
        of_whole_law = position < (len(self.images) if self.num_unconditional is None else self.num_unconditional)
        same_condition = torch.where((labels == -1)[:, None], of_whole_law, labels[:, None] == reference_labels[None])
        return same_condition | (own[:, None] == position)

    def _check_range(self, own: Tensor) -> None:
        if not bool(((own >= 0) & (own < len(self.images))).all()):
            raise ValueError(f"source_index must lie in [0, {len(self.images)}); got {own.tolist()}.")

    def check_shapes(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Check all that needs no value of a tensor.

        Raises:
            ValueError: shapes or labels that do not fit, or a `num_unconditional` without labels or not in [B, n].
            TypeError: labels or indices that are not integers.
        """
        if self.images.shape[1:] != clean.shape[1:]:
            raise ValueError(
                f"references {tuple(self.images.shape[1:])} and images {tuple(clean.shape[1:])} must have one shape. Resize "
                "and crop them alike: references under another law than the sources bias the target."
            )
        batch_size, n = clean.shape[0], self.images.shape[0]
        if n < batch_size:
            raise ValueError(
                f"got {n} references for {batch_size} images: the references must contain the images themselves. "
                "Pass torch.cat([clean, others]), as ReferenceBatchCollator does."
            )
        if (labels is None) != (self.labels is None):
            given, missing = ("labels", "reference_labels") if self.labels is None else ("reference_labels", "labels")
            raise ValueError(f"{given} need {missing}: rows use references of their own class only.")
        for name, values, length in (
            ("labels", labels, batch_size),
            ("reference_labels", self.labels, n),
            ("source_index", source_index, batch_size),
        ):
            if values is not None:
                check_integers(name, values, length)
        if self.num_unconditional is None:
            return
        if not isinstance(self.num_unconditional, int):
            raise TypeError(f"num_unconditional must be an int; got {type(self.num_unconditional).__name__}.")
        if labels is None:
            raise ValueError(
                "num_unconditional needs labels and reference_labels: it says what rows of label -1 use. Pass them "
                "(class-aware references without labels bias every row), or leave it out."
            )
        if not batch_size <= self.num_unconditional <= n:
            raise ValueError(
                f"num_unconditional must lie in [B, n] = [{batch_size}, {n}]; got {self.num_unconditional}. Pass that of "
                "the ReferenceBatchSampler."
            )

    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Raise ValueError unless the references of the rows' sources are `clean` (B, ...), under their labels."""
        own = _own_rows(clean, source_index)
        self._check_range(own)
        own = own.to(self.images.device)
        sources = pixels_to_float(self.images[own].to(clean.device)).to(clean.dtype)
        # One float32 rounding apart is the same pixel: u / 127.5 - 1 and (u / 255 - 0.5) / 0.5 differ by that much.
        if not torch.allclose(sources, clean, rtol=1e-6, atol=1e-6, equal_nan=True):
            raise ValueError(
                "the references do not contain the images they belong to: reference[:B] (or reference[source_index]) "
                f"must equal clean; the largest difference is {(sources - clean).abs().max().item():.3g}. Without its "
                "source a target is biased. Pass reference=torch.cat([clean, others]), or clean=reference[:B], after "
                "any augmentation and in the same dtype."
            )
        if labels is not None and self.labels is not None:
            of_sources = self.labels.to(self.images.device)[own].to(labels.device)
            if not bool(((labels == of_sources) | (labels == -1)).all()):
                raise ValueError(
                    "labels differ from reference_labels of the sources. Pass reference_labels with the true classes, "
                    "and labels with the same classes or -1 where the condition is dropped."
                )


def _own_rows(rows: Tensor, source_index: Tensor | None) -> Tensor:
    """(B,) the references that are the rows' sources, on the device of the rows."""
    return torch.arange(len(rows), device=rows.device) if source_index is None else source_index.to(rows.device)


class SharedReferences(ReferenceSet):
    """The reference batches of all processes as one: n is then the number of references of all processes together.

    Every process of the default process group makes one at each step, of its part of one list without repeats
    (`ReferenceBatchSampler(..., share_references=True)`), and computes its posterior means at the same time as the others.

    Args:
        images: (n', ...) this process's references, its sources first.
        labels: (n',) integer classes.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        check_tensor("images", images, "(n', ...)")
        pixels_to_float(images[:0])  # raises TypeError for other kinds of numbers
        self.images = images
        self.labels = None if labels is None else checked_labels(labels, len(images)).to(images.device)

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
        """Posterior mean over the references of all processes. Collective. Arguments as for `ReferenceBank`.

        Raises:
            ValueError: shapes that do not fit, labels on one side only, or no process group.
            TypeError: no tensors, noisy images that are not floating point, labels or positions that are not integers.
        """

        def state(noisy: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> PosteriorState:
            mask = None
            if labels is not None and self.labels is not None:
                mask = same_class(labels.to(self.labels.device), self.labels)
            return posterior_state(noisy.flatten(1), self.images, alpha, sigma, mask=mask)

        check_noisy_like(noisy, self.images.shape)
        if source_index is not None:
            check_integers("source_index", source_index, len(noisy))
        if (labels is None) != (self.labels is None):
            raise ValueError("labels and SharedReferences(labels=...) go together: rows use references of their class.")
        if labels is not None:
            labels = checked_labels(labels, len(noisy), minimum=-1)
        alpha, sigma = coefficient_rows(alpha, sigma, noisy)
        return merged_over_processes(state, noisy, alpha, sigma, labels).result_like(noisy, self.images.dtype)

    def check_sources(self, clean: Tensor, source_index: Tensor | None, labels: Tensor | None) -> None:
        """Raise ValueError unless the first rows of the references are `clean`, under their labels."""
        index = torch.arange(len(clean), device=self.images.device) if source_index is None else source_index
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
    sizes, of_all = _sizes_and_labels(len(noisy), labels)
    exact = torch.stack([alpha, sigma], 1)
    mine = _packed(exact, noisy.flatten(1))
    everyones = _gathered(mine, sizes)
    exact, rows = _unpacked(everyones, 2, noisy.dtype)
    local = state(rows.view(-1, *noisy.shape[1:]), exact[:, 0], exact[:, 1], of_all)

    # Each process gets its rows' states of all, and merges them in one order: the sums are the same on every backend.
    dtype = torch.float64 if noisy.dtype == torch.float64 else torch.float32
    scalars = torch.stack([local.maximum, local.normalizer, local.squares], 1)
    sent = _packed(scalars, local.weighted_sum.to(dtype))
    received = sent.new_empty(len(sizes) * len(noisy), sent.shape[1])
    dist.all_to_all_single(received, sent, [len(noisy)] * len(sizes), sizes)
    states = []
    for part in received.split(len(noisy)):
        scalars, weighted_sum = _unpacked(part, 3, dtype)
        maximum, normalizer, squares = scalars.unbind(1)
        states.append(PosteriorState(maximum, normalizer, squares, weighted_sum.to(torch.float64)))
    return reduce(PosteriorState.merge, states)


def _packed(exact: Tensor, values: Tensor) -> Tensor:
    """Rows of float64 (B, k) and of another dtype (B, D) side by side, as bytes, for one collective."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in (exact, values)], 1)


def _unpacked(rows: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `_packed` has put side by side."""
    # Copies: what has one row is contiguous as it is, and bytes of another width beside it cannot be viewed.
    exact, values = (
        part.clone(memory_format=torch.contiguous_format) for part in rows.split([8 * k, rows.shape[1] - 8 * k], 1)
    )
    return exact.view(torch.float64), values.view(dtype)


def _gathered(mine: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, of which each has so many."""
    padded = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _sizes_and_labels(size: int, labels: Tensor | None) -> tuple[list[int], Tensor | None]:
    """The number of rows of each process, and the labels of all on the CPU; exchanged there, without waiting for a device."""
    group = None if dist.get_backend() == dist.Backend.GLOO else _gloo_group(dist.group.WORLD)
    one_each = [1] * dist.get_world_size()
    sizes = _gathered(torch.tensor([size], device="cpu"), one_each, group).tolist()
    return sizes, None if labels is None else _gathered(labels.cpu(), sizes, group)


@cache
def _gloo_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group of the same processes as the default one, `world`, for tensors on the CPU."""
    # Longer than whatever one process may do alone between two steps.
    return dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def shard_rows(total: int, process_shard: tuple[int, int] | None) -> range:
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


# ---- subsets, shapes and labels


def draw_subset(sources: Tensor, total: int, size: int, generator: torch.Generator | None) -> Tensor:
    """Positions (size,) of the sources (B,) and of size - B others, drawn uniformly from the rest of `total` images.

    Raises:
        ValueError: sources with repeats, or a size below their number or above `total`.
        TypeError: a size that is not an int.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"subset_size must be an int; got {type(size).__name__}.")
    if len(sources.unique()) != len(sources):
        raise ValueError("source_index has repeats: an image counted twice would bias the target.")
    if not len(sources) <= size <= total:
        raise ValueError(f"subset_size must lie in [{len(sources)}, {total}]; got {size}.")
    rest = torch.ones(total, dtype=torch.bool, device="cpu").index_fill_(0, sources, False).nonzero().flatten()
    others = rest[torch.randperm(len(rest), generator=generator, device="cpu")[: size - len(sources)]]
    return torch.cat([sources, others])


def check_noisy_like(noisy: Tensor, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `noisy` is floating point, (B, ...) for references of `shape` (n, ...)."""
    check_noisy(noisy)
    if noisy.shape[1:] != tuple(shape[1:]):
        raise ValueError(
            f"noisy must be (B, {', '.join(map(str, shape[1:]))}) as the references are; got {tuple(noisy.shape)}."
        )


def check_integers(name: str, values: Tensor, length: int) -> None:
    """Raise TypeError or ValueError unless `values` is a tensor of as many integers."""
    check_tensor(name, values, f"({length},) of integers")
    if values.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), one for each image; got {tuple(values.shape)}.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(
            f"{name} must be integers; got {values.dtype}. Pass class numbers, or positions, as torch.int64."
        )


def checked_labels(labels: Tensor, length: int, minimum: int = 0) -> Tensor:
    """Labels as int64 on the CPU."""
    check_integers("labels", labels, length)
    labels = labels.to("cpu", torch.int64)
    if bool((labels < minimum).any()):
        raise ValueError(f"labels must be at least {minimum}; got {labels.min().item()}.")
    return labels
