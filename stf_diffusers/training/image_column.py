"""Columns of a data set that hold images: encoded ones, and arrays of pixels."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

# PIL's modes of more than 8 bits a channel whose values are 0 to 65,535.
_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def pixel_dtype(feature: Any) -> np.dtype[Any] | None:
    """The dtype of a column of pixels, which are arrays or lists of two or three dimensions; None of any other column."""
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return np.dtype(feature.dtype)
    depth = 0
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature, depth = feature.feature, depth + 1
    if depth not in (2, 3) or not isinstance(feature, datasets.Value):
        return None
    try:
        dtype = np.dtype(feature.dtype)
    except TypeError:  # strings, times
        return None
    return dtype if dtype.kind in "uif" else None


def is_encoded(feature: Any) -> bool:
    """Whether a column holds encoded images: Datasets' own, bytes, or structures of bytes and a path."""
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def may_hold_images(feature: Any) -> bool:
    return is_encoded(feature) or pixel_dtype(feature) is not None


def check_holds_images(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> None:
    """Raise ValueError unless a column holds images."""
    feature = dataset.features[column]
    if not may_hold_images(feature):
        raise ValueError(
            f"column {column!r} holds {described(feature)}, not images. Choose another column with image_column=, or convert "
            "this one to datasets.Image, bytes of image files, or arrays of uint8 pixels (H, W), (H, W, C) or (C, H, W)."
        )


def with_images(
    dataset: datasets.Dataset | datasets.IterableDataset, column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """The data set with its column of images as `to_image` reads its entries."""
    feature = dataset.features[column]
    if is_encoded(feature):
        return dataset if isinstance(feature, datasets.Image) else dataset.cast_column(column, datasets.Image())
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    # Lists of Python's integers would take a hundred times the memory.
    return dataset.with_format("numpy", columns=[column], output_all_columns=True, dtype=pixel_dtype(feature))


def without_corrupt(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The data set of `with_images` without the rows whose image is missing or cannot be decoded; logs which those are."""
    stored = (
        dataset.cast_column(column, datasets.Image(decode=False)) if is_encoded(dataset.features[column]) else dataset
    )
    # Datasets keeps the result of `map`: images are tried once.
    readable = stored.with_format(None).map(
        _readable, input_columns=[column], remove_columns=stored.column_names, desc="Looking for corrupt images"
    )
    mask = np.asarray(readable.with_format("numpy")["readable"], dtype=bool)
    corrupt = np.flatnonzero(~mask).tolist()
    if not corrupt:
        return dataset
    listed = ", ".join(map(str, corrupt[:20])) + (", ..." if len(corrupt) > 20 else "")
    logger.warning(
        "Left out %d of %d images, which are missing or cannot be decoded: %s.", len(corrupt), len(mask), listed
    )
    return dataset.select(np.flatnonzero(mask).tolist())


def _readable(value: Any) -> dict[str, bool]:
    try:
        if isinstance(value, dict):
            datasets.Image().decode_example(value)
        else:  # pixels, of which those that fit no array are corrupt
            return {"readable": value is not None and np.asarray(value).dtype != object}
    # PIL's decoders raise errors of many kinds.
    except Exception:
        return {"readable": False}
    return {"readable": True}


def described(feature: Any) -> str:
    """What a column holds, for messages."""
    if isinstance(feature, datasets.Value):
        return str(feature.dtype)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return f"lists of {described(feature.feature)}"
    return f"structures of {sorted(feature)}" if isinstance(feature, dict) else type(feature).__name__


def to_image(value: Any, dtype: np.dtype[Any] | None = None) -> Image.Image | None:
    """An entry of a column of images as a PIL image of at most 8 bits a channel, or of the mode "F"; None where it is missing.

    Values of 16 bits, in images and in arrays, are scaled by 255 / 65,535 and rounded.

    Args:
        value: a PIL image, pixels, or None.
        dtype: dtype for pixels that are lists.

    Raises:
        ValueError: values that are not such pixels.
    """
    if value is None:
        return None
    if not isinstance(value, Image.Image):
        try:
            array = np.asarray(value, dtype)
        except ValueError as error:
            raise ValueError("has rows of different lengths. Repair it, or leave the row out.") from error
        return Image.fromarray(_pixels(array))
    if value.mode not in _SIXTEEN_BITS:
        return value
    levels = np.asarray(value)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(
            f"has values from {levels.min()} to {levels.max()}, and 16 bits hold 0 to 65535. Convert the images to 8 bits."
        )
    return Image.fromarray(_eight_bits(levels))


def _eight_bits(levels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # 65535 / 255 is 257, so that nothing lies half-way between two levels.
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _pixels(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pixels as PIL reads them: uint8 (H, W) or (H, W, C)."""
    if array.dtype == object:  # as NumPy's format of Datasets gives them
        raise ValueError("has rows of different lengths. Repair it, or leave the row out.")
    if array.dtype.kind not in "ui":
        raise ValueError(f"has pixels of {array.dtype}. Convert them to uint8, 0 to 255.")
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}. Images are (H, W), (H, W, C) or (C, H, W), of 1, 3 or 4 channels.")
    if array.dtype == np.uint16:
        array = _eight_bits(array)
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"has values from {array.min()} to {array.max()}. Pixels are 0 to 255, or uint16.")
    array = np.ascontiguousarray(array, dtype=np.uint8)
    return array[:, :, 0] if array.ndim == 3 and array.shape[-1] == 1 else array
