"""References of a class: which they are, and posterior means within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .posterior import DENSE_CHUNK_ELEMENTS, PosteriorState, ReferenceRows, state_with_mirrors


def same_class(labels: Tensor, reference_labels: Tensor) -> Tensor:
    """(B, n) bool: which references a row of each label uses, those of its class, and of label -1 all."""
    return (labels[:, None] == reference_labels[None]) | (labels == -1)[:, None]


def rows_of_classes(labels: Tensor, part: range) -> dict[int, range]:
    """The rows of each class within `part` of (N,) sorted labels, counted from its start."""
    classes, counts = labels.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    found = {}
    for label, *bounds in zip(classes.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
        start, end = (min(max(bound, part.start), part.stop) - part.start for bound in bounds)
        found[label] = range(start, end)
    return found


def labels_among(class_rows: Mapping[int, range], labels: Tensor) -> Tensor:
    """The same labels (B,). Raises ValueError if one is neither -1 nor that of a class."""
    if not class_rows:
        raise ValueError("the bank has no labels: make it with labels=, or leave them out here.")
    unknown = sorted(set(labels.tolist()) - {-1, *class_rows})
    if unknown:
        raise ValueError(f"no image of the bank has a label of {unknown}; it has {sorted(class_rows)}.")
    return labels


class SelectedRows:
    """Parts of references (n, ...), one after the other, joined on a device when they are sliced.

    Args:
        reference: the references.
        ranges: rows of them, ascending and apart.
        device: where parts are sent before they are joined: page-locked memory stays in use.
    """

    def __init__(self, reference: ReferenceRows, ranges: Sequence[range], device: torch.device) -> None:
        self.reference, self.dtype, self.device = reference, reference.dtype, device
        self.ranges: list[range] = []
        for rows in ranges:  # neighbours are read together
            if self.ranges and self.ranges[-1].stop == rows.start:
                rows = range(self.ranges.pop().start, rows.stop)
            self.ranges.append(rows)
        self.shape = torch.Size((sum(map(len, ranges)), *reference.shape[1:]))

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        parts, first = [], 0
        for part in self.ranges:
            inside = part[max(start - first, 0) : max(stop - first, 0)]
            if len(inside):
                parts.append(self.reference[inside.start : inside.stop].to(self.device, non_blocking=True))
            first += len(part)
        if not parts:
            return self.reference[0:0].to(self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def state_by_class(
    noisy: Tensor,
    reference: ReferenceRows,
    class_rows: Mapping[int, range],
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor,
    *,
    mirrors: bool,
    norms: Tensor,
    together: int | None = None,
) -> PosteriorState:
    """The state of references (n, ...) sorted by class, of which each noisy image (B, ...) uses those of its own.

    Args:
        noisy, reference, alpha, sigma, mirrors, norms: as for `state_with_mirrors`.
        class_rows: the rows of each class.
        labels: (B,) int64 on the CPU, classes of `class_rows`; -1 uses all references.
        together: how many images of small classes one product goes through, so that there are few launches. Default: as many
            as a chunk has elsewhere than on CPUs, and there the least arithmetic, each class by itself.
    """
    if together is None:
        together = 1 if noisy.device.type == "cpu" else max(1, DENSE_CHUNK_ELEMENTS // noisy[0].numel())
    groups = _groups(sorted(set(labels.tolist()) - {-1}), class_rows, together)
    where, states = [], []
    for group in [[-1], *groups] if bool((labels == -1).any()) else groups:
        rows = torch.isin(labels, torch.tensor(group, device="cpu")).nonzero().flatten()
        where.append(rows)
        images, known, mask = reference, norms, None
        if group != [-1]:
            ranges = [class_rows[label] for label in group]
            images, known = SelectedRows(reference, ranges, noisy.device), SelectedRows(norms, ranges, noisy.device)[:]
            if len(group) > 1:
                sizes = torch.tensor([group, [len(part) for part in ranges]], device="cpu")
                of_images = torch.repeat_interleave(*sizes.to(noisy.device, non_blocking=True), output_size=len(known))
                mask = same_class(labels[rows].to(noisy.device, non_blocking=True), of_images)
        there = rows.to(noisy.device, non_blocking=True)
        rows_of_group = noisy[there], images, alpha[there], sigma[there], mirrors
        states.append(state_with_mirrors(*rows_of_group, norms=known, mask=mask))
    return PosteriorState.cat(states)[torch.cat(where).argsort().to(noisy.device, non_blocking=True)]


def _groups(classes: Sequence[int], class_rows: Mapping[int, range], most: int) -> list[list[int]]:
    """Classes in order, in groups of at most so many images, or of one class."""
    groups: list[list[int]] = []
    images = 0
    for label in classes:
        size = len(class_rows[label])
        if groups and images + size <= most:
            groups[-1].append(label)
            images += size
        else:
            groups.append([label])
            images = size
    return groups
