"""The file of a reference bank: images sorted by class, their norms, and where there are classes labels and order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .dataset_images import DatasetImages
from .posterior import ReferenceRows, reference_norms
from .stored_rows import RowReader, RowWriter


def write_bank(
    path: Path,
    shape: torch.Size,
    dtype: torch.dtype,
    chunks: Iterable[Tensor],
    labels: Tensor | None,
    order: Tensor | None,
    fingerprint: str,
) -> None:
    """Write a file that `ReferenceBank.open` reads, of images (N, ...) in chunks, complete or not at all.

    Args:
        path: path of the file.
        shape, dtype: those of all images together.
        chunks: the images, sorted by class where there are labels.
        labels: (N,) int64 in the same order.
        order: (N,) int64, the position of each image in the data. None: as they come.
        fingerprint: identifies the data and their preprocessing.

    Raises:
        ValueError: images that are not finite, or not of that shape and dtype.
    """
    columns = {name: tensor for name, tensor in (("labels", labels), ("order", order)) if tensor is not None}
    layout = {"images": (dtype, shape), "norms": (torch.float64, shape[:1])}
    layout |= {name: (tensor.dtype, tensor.shape) for name, tensor in columns.items()}
    metadata = {"fingerprint": fingerprint}
    with RowWriter(path, layout, metadata_bytes=len(json.dumps(metadata))) as file:
        done = 0
        for chunk in chunks:
            norms = reference_norms(chunk)
            check_finite(norms, done)
            file.write("images", chunk)
            file.write("norms", norms)
            done += len(chunk)
        for name, tensor in columns.items():
            file.write(name, tensor)
        file.finish(metadata)


def check_finite(norms: Tensor, start: int = 0) -> None:
    """Raise ValueError naming the images, counted from `start`, that are not finite, which their norms show."""
    wrong = (~norms.isfinite()).nonzero().flatten()
    if len(wrong):
        raise ValueError(f"images {(wrong[:8] + start).tolist()} of the bank are not finite.")


def read_bank(path: Path, fingerprint: str | None = None) -> RowReader:
    """The tensors of a file that `write_bank` wrote, with this fingerprint where one is given.

    Raises:
        ValueError: the file is damaged, is not a bank, contradicts itself, or has another fingerprint.
        OSError: it cannot be read.
    """
    stored = RowReader(path)
    missing = {"images", "norms"} - set(stored.names)
    if missing:
        raise ValueError(f"{path} is not a reference bank: it lacks {sorted(missing)}.")
    found = stored.metadata.get("fingerprint")
    if fingerprint is not None and found != fingerprint:
        raise ValueError(
            f"{path} was made of another data set or with other preprocessing (fingerprint {found!r}, expected "
            f"{fingerprint!r}). Delete it, or choose another path."
        )
    try:
        _check_columns(stored)
    except ValueError as error:
        raise ValueError(f"{path} is not a reference bank, or is damaged: {error}. Delete it.") from error
    return stored


def _check_columns(stored: RowReader) -> None:
    """Raise ValueError unless the tensors of a bank fit each other.

    Norms are checked for values that no image has, and compared with those of 16 images: reading all of a file that is
    larger than memory would take hours.
    """
    images = stored.rows("images")
    if not images.shape or not images.shape.numel() or images.dtype == torch.int64:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected (N, ...) pixels or floating point")
    total = images.shape[0]
    for name, dtype in (("norms", torch.float64), ("labels", torch.int64), ("order", torch.int64)):
        if name in stored.names:
            rows = stored.rows(name)
            if rows.dtype != dtype or rows.shape != (total,):
                raise ValueError(f"{name} are {rows.dtype} {tuple(rows.shape)}, expected {dtype} ({total},)")
    norms = stored.mapped("norms")
    wrong = (~norms.isfinite()).nonzero().flatten()
    if len(wrong):
        raise ValueError(f"norms of images {wrong[:8].tolist()} are not finite")
    wrong = (~_possible(norms, images.dtype, images.shape[1:].numel())).nonzero().flatten()
    if len(wrong):
        raise ValueError(
            f"norms of images {wrong[:8].tolist()} are none of {images.dtype} images {tuple(images.shape[1:])}"
        )
    for row in torch.linspace(0, total - 1, min(total, 16), device="cpu").long().tolist():
        expected = reference_norms(images[row : row + 1])[0]
        if not torch.isclose(norms[row], expected, rtol=1e-9, atol=0):
            raise ValueError(f"norm {row} is not that of the image")
    if "labels" in stored.names:
        labels = stored.mapped("labels")
        if labels[0] < 0 or bool((labels.diff() < 0).any()):
            raise ValueError("its labels are not sorted classes from 0 on")
    positions = torch.arange(total, device="cpu")
    if "order" in stored.names and not torch.equal(stored.mapped("order").sort().values, positions):
        raise ValueError("its order is not a permutation of the images")


def _possible(norms: Tensor, dtype: torch.dtype, values: int) -> Tensor:
    """Which of the `reference_norms` (N,) some image of this dtype, of so many values, can have."""
    if dtype == torch.uint8:
        # Sums of v (v + 1), an even number, for levels v from -128 to 127.
        return (norms >= 0) & (norms <= values * 127 * 128) & (norms % 2 == 0)
    largest = torch.finfo(dtype).max
    # A sum of squares is rounded.
    return (norms >= 0) & (norms <= values * (largest * largest) * (1 + 1e-9))


def compare_bank(path: Path, images: DatasetImages, fingerprint: str, quiet: bool) -> None:
    """Raise ValueError unless a bank's file holds those images.

    Fingerprints ignore what a transform imports, and differ where a transform has only moved to another module. So 16
    images are decoded and compared where the file has this fingerprint, and everything where it has another.
    """
    stored = read_bank(path)
    rows = stored.rows("images")
    other = f"{path} was made of another data set or with other preprocessing: {{}}. Delete it, or choose another path."
    if rows.shape != images.shape or rows.dtype != images.dtype:
        raise ValueError(
            other.format(f"it holds {rows.dtype} {tuple(rows.shape)}, expected {images.dtype} {tuple(images.shape)}")
        )
    if stored.metadata.get("fingerprint") == fingerprint:
        for row in torch.linspace(0, len(images) - 1, min(len(images), 16), device="cpu").long().tolist():
            if not torch.equal(rows[row : row + 1][0], images[row]):
                raise ValueError(other.format(f"image {images.position(row)} differs"))
        return
    for name, column in (("labels", images.labels), ("order", images.order)):
        held = stored.mapped(name) if name in stored.names else None
        same = held is column if held is None or column is None else torch.equal(held, column)
        if not same:
            raise ValueError(other.format(f"its {name} differ"))
    start = 0
    for chunk in images.chunks(quiet, "Comparing the reference bank"):
        equal = (rows[start : start + len(chunk)] == chunk).flatten(1).all(1)
        if not bool(equal.all()):
            raise ValueError(other.format(f"image {images.position(start + int(equal.int().argmin()))} differs"))
        start += len(chunk)


def parts(images: ReferenceRows) -> Iterator[slice]:
    """Slices of about 16 MiB in float32."""
    rows = max(1, 2**22 // max(images.shape[1:].numel(), 1))
    return (slice(start, start + rows) for start in range(0, images.shape[0], rows))
