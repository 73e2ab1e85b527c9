"""Decoded images on the disk: decoded once per machine, mapped into memory by all its processes."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from contextlib import ExitStack
from pathlib import Path

import datasets
import numpy as np
import PIL
import pyarrow.compute as pc
import torch
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock
from torch import Tensor

from ..stored_rows import RowReader, RowWriter
from .image_reader import ImageReader, decode, decode_all, read_row

logger = logging.getLogger(__name__)

# Changes with the meaning of a file.
_VERSION = 1


def cached_images(
    dataset: datasets.Dataset,
    column: str,
    reader: ImageReader,
    budget_bytes: float,
    quiet: bool,
    cache_dir: str | None = None,
) -> Tensor | None:
    """The images as `decode_all` gives them, from a file in Hugging Face's cache; it is written if it is missing.

    The file is named after the data set's fingerprint, the column, the reader, the versions of the decoders, and path,
    size and time of each image file that the data set refers to. A process that comes while another decodes waits for its
    file. A data set that lies in memory alone is decoded each time.

    Returns:
        (N, C, H, W) uint8, of which the system reads the pages that are used; None where `decode_all` gives None.
    """
    shape = torch.Size((len(dataset), *reader.shape))
    if not dataset.cache_files or shape.numel() > budget_bytes:
        return decode_all(dataset, column, reader, budget_bytes, quiet)
    with ExitStack() as stack:
        try:
            path = _place(dataset, column, reader, cache_dir)
            stack.enter_context(WeakFileLock(path.with_suffix(".lock")))
        # A cache whose place is taken by a file is a ValueError of huggingface_hub's.
        except (OSError, ValueError) as error:
            logger.warning("Decoded images are not kept: %s. Pass another cache_dir=, or image_cache=False.", error)
            return decode_all(dataset, column, reader, budget_bytes, quiet)
        images = _read(path, dataset, column, reader)
        if images is None:
            images = decode_all(dataset, column, reader, budget_bytes, quiet)
            images = None if images is None else _written(path, images)
        return images


def _place(dataset: datasets.Dataset, column: str, reader: ImageReader, cache_dir: str | None) -> Path:
    key = (_VERSION, dataset._fingerprint, len(dataset), column, reader, PIL.__version__, datasets.__version__)
    digest = hashlib.sha256(repr(key).encode())
    # A data set of files keeps its fingerprint when one of them is replaced.
    for file in _image_files(dataset, column):
        try:
            found = os.stat(file)
            digest.update(repr((file, found.st_size, found.st_mtime_ns)).encode())
        except OSError:  # missing, or an address: decoding tells
            digest.update(repr((file,)).encode())
    name = digest.hexdigest()[:32]
    folder: Path = cached_assets_path("stf_diffusers", "decoded", assets_dir=cache_dir)
    return folder / f"{name}.safetensors"


def _image_files(dataset: datasets.Dataset, column: str) -> list[str]:
    """The paths of a column of images where it holds no bytes, those of rows that are left out too."""
    if not isinstance(dataset.features[column], datasets.Image):
        return []
    # The whole table: a selection of rows would copy the bytes.
    stored = dataset.data.column(column)
    paths = pc.filter(pc.struct_field(stored, "path"), pc.is_null(pc.struct_field(stored, "bytes")))
    return [path for path in paths.to_pylist() if path is not None]


def _read(path: Path, dataset: datasets.Dataset, column: str, reader: ImageReader) -> Tensor | None:
    """The images of a file; None where there is none, or where it holds something else."""
    if not path.is_file():
        return None
    try:
        images = RowReader(path).mapped("images")
    except (ValueError, KeyError) as error:
        logger.warning("Decoded images are made again: %s", error)
        return None
    shape = torch.Size((len(dataset), *reader.shape))
    # A file replaced by one of its size and time keeps its name: a few rows are compared.
    rows = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int)).tolist()
    if images.dtype == torch.uint8 and images.shape == shape:
        fresh = zip(rows, decode(dataset, column, rows), strict=True)
        if all(torch.equal(read_row(reader, row, image, random.Random(0)), images[row]) for row, image in fresh):
            return images
    logger.warning("Decoded images are made again: %s is not of these images.", path)
    return None


def _written(path: Path, images: Tensor) -> Tensor:
    """The same images, from the file that they are written to."""
    try:
        with RowWriter(path, {"images": (torch.uint8, images.shape)}, metadata_bytes=64) as file:
            file.write("images", images)
            file.finish({})
    except OSError as error:
        logger.warning(
            "Decoded images are not kept: %s. Make room in %s, or pass image_cache=False.", error, path.parent
        )
        return images
    return RowReader(path).mapped("images")
