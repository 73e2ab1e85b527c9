"""Data sets in files and folders on a disk: arrays, archives, folders of images."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard, cached_assets_path
from huggingface_hub.utils import WeakFileLock

from ..files import replacing

logger = logging.getLogger(__name__)

# By the end of a file's name, the builder of Datasets that reads it.
_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".tar": "webdataset",
}
# What a folder of images may hold images in.
_IMAGES_OR_ARCHIVES = {*ImageFolder.EXTENSIONS, ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
# All that Datasets takes for the name of a split contains one of these.
_SPLIT_WORDS = ("train", "test", "val", "dev")
_SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


def is_array_file(path: Path) -> bool:
    return path.suffix in (".npy", ".npz") and path.is_file()


def file_builder(path: Path, cache_dir: str | None) -> datasets.DatasetBuilder:
    """The builder of Datasets for the data in a file.

    Raises:
        ValueError: a kind of file that is not known.
    """
    if path.suffix == ".zip":
        return folder_builder(_extracted(path, cache_dir), cache_dir)
    if path.suffix not in _BUILDERS:
        known = ", ".join([*_BUILDERS, ".zip", ".npz", ".npy"])
        raise ValueError(
            f"files that end in {path.suffix!r} are not read; pass a folder, or a file that ends in {known}."
        )
    return datasets.load_dataset_builder(_BUILDERS[path.suffix], data_files=str(path), cache_dir=cache_dir)


def folder_builder(
    path: Path, cache_dir: str | None, config_name: str | None = None, *, images: bool = False
) -> datasets.DatasetBuilder:
    """The builder of Datasets for the data in a folder.

    Datasets takes folders and files named like splits for splits, and leaves all others out. Where that would leave images
    out, the names are taken for those of classes, and all images are the split "train".

    Args:
        path: the folder.
        cache_dir: Datasets' cache.
        config_name: a configuration that the folder's card declares.
        images: read only images, whatever else is there.

    Raises:
        ValueError: only images are read, and there are none.
    """
    files = _visible_files(path)
    pictures = sum(file.suffix.lower() in ImageFolder.EXTENSIONS for file in files)
    if images and path.is_dir() and not any(file.suffix.lower() in _IMAGES_OR_ARCHIVES for file in files):
        found = f"its files end in {sorted({file.suffix for file in files})[:8]}" if files else "it has no files"
        raise ValueError(f"there is no image in this folder; {found}.")
    one_split = not any(word in str(file).lower() for word in _SPLIT_WORDS for file in files)
    if one_split and pictures and (images or (pictures == len(files) and config_name is None)):
        # What Datasets finds too, once it has listed all files for each of its 66 patterns: 34 s for 20,000 images, here 3.
        return _classes_builder(path, cache_dir)
    if images:
        builder = datasets.load_dataset_builder("imagefolder", data_dir=str(path), cache_dir=cache_dir)
    else:
        builder = datasets.load_dataset_builder(str(path), config_name, cache_dir=cache_dir)
    declared = (
        not images and (path / "README.md").is_file() and DatasetCard.load(path / "README.md").data.get("configs")
    )
    if not hasattr(builder, "EXTENSIONS") or config_name is not None or declared:
        return builder
    taken = [Path(file).suffix.lower() for split in builder.config.data_files.values() for file in split]
    if sum(suffix in ImageFolder.EXTENSIONS for suffix in taken) >= pictures:
        return builder
    logger.info("%s: folders are classes, since not every image is in a folder of a split.", path)
    return _classes_builder(path, cache_dir)


def _classes_builder(path: Path, cache_dir: str | None) -> datasets.DatasetBuilder:
    return datasets.load_dataset_builder(
        "imagefolder", data_dir=str(path), data_files={"train": "**"}, cache_dir=cache_dir
    )


def _visible_files(folder: Path) -> list[Path]:
    """The files that Datasets sees: none that begins with a dot, or in a folder that begins with one or with two underscores."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(place, name).relative_to(folder) for name in names if not name.startswith(".")]
    return found


def _stamp(path: Path) -> str:
    """Identifies this state of a file."""
    stat = path.stat()
    return hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]


def _extracted(path: Path, cache_dir: str | None) -> Path:
    """The folder in Hugging Face's cache that holds the files of an archive.

    (Not Datasets' `DownloadManager.extract`: it knows an archive by its path alone, and gives the old files of a new one.)
    """
    folder = cached_assets_path("stf_diffusers", "archives", assets_dir=cache_dir) / f"{path.stem}-{_stamp(path)}"
    with WeakFileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with zipfile.ZipFile(path) as archive, replacing(folder, durable=False) as place:
                place.mkdir()  # for an archive without files too
                archive.extractall(place)
    return folder


def read_arrays(path: Path, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a NumPy file.

    A .npy file is images (N, H, W), (N, H, W, C) or (N, C, H, W). A .npz file holds such an array, with labels (N,) or
    (N, 1) where there are some; or several of them, whose names say the split ("x_train", "test_images").

    Raises:
        ValueError: no images, several arrays that could be the images, or not one label for each image.
    """
    arrays = {split: _images_and_labels(path, names) for split, names in _names_of_splits(path).items()}
    return {split: _as_dataset(path, *names, cache_dir) for split, names in arrays.items()}


def _array(path: Path, name: str) -> np.ndarray[Any, Any]:
    with _explained():
        file = _opened(path)
        array: np.ndarray[Any, Any] = file if path.suffix == ".npy" else file[name]
    return array


def _opened(path: Path) -> Any:
    file = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
    kind = ".npy" if isinstance(file, np.ndarray) else ".npz"
    if kind != path.suffix:
        raise _OtherKind(f"it is a {kind} file by its content. Rename it.")
    return file


class _OtherKind(ValueError):
    """The name and the content of a NumPy file contradict each other."""


@contextmanager
def _explained() -> Iterator[None]:
    """NumPy's errors would have the user load pickled objects."""
    try:
        yield
    except _OtherKind:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            "the file is damaged, or holds Python objects, which are not read. Save arrays of numbers or strings."
        ) from error


def _names_of_splits(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".npy":
        return {"train": ["images"]}
    with _explained(), _opened(path) as file:
        names = list(file)
    splits: dict[str, list[str]] = {}
    for name in names:
        said = [_SPLITS[part] for part in name.lower().split("_") if part in _SPLITS]
        splits.setdefault(said[0] if said else "train", []).append(name)
    return splits


def _images_and_labels(path: Path, names: list[str]) -> tuple[str, str | None]:
    """The names of the arrays of images and of labels."""
    shapes = {name: _array(path, name).shape for name in names}
    images = [name for name, shape in shapes.items() if len(shape) in (3, 4)]
    if len(images) != 1:
        raise ValueError(
            f"one array of images is needed, (N, H, W), (N, H, W, C) or (N, C, H, W); the file has {shapes}. Save the images "
            "under one name."
        )
    count = shapes[images[0]][0]
    if not count:
        raise ValueError(f"the array {images[0]!r} holds no images.")
    labels = [name for name, shape in shapes.items() if shape in ((count,), (count, 1))]
    others = sorted(set(shapes) - set(images) - set(labels))
    if len(labels) > 1 or others:
        raise ValueError(
            f"beside the images {images[0]!r}, one array of {count} labels, a class each, is read; the file has {shapes}. Leave the others out."
        )
    return images[0], labels[0] if labels else None


def _as_dataset(path: Path, image_name: str, label_name: str | None, cache_dir: str | None) -> datasets.Dataset:
    images = _array(path, image_name)
    shape = images.shape[1:]
    kind = datasets.Array2D if len(shape) == 2 else datasets.Array3D
    features: dict[str, Any] = {"image": kind(shape, images.dtype.name)}
    if label_name is not None:
        features["label"] = _label_feature(_labels(path, label_name))
    return datasets.Dataset.from_generator(
        _rows,
        features=datasets.Features(features),
        cache_dir=cache_dir,
        gen_kwargs={"path": path, "image_name": image_name, "label_name": label_name, "stamp": _stamp(path)},
    )


def _labels(path: Path, name: str) -> np.ndarray[Any, Any]:
    labels = _array(path, name).reshape(-1)
    return labels.astype(str) if labels.dtype.kind == "S" else labels


def _label_feature(labels: np.ndarray[Any, Any]) -> Any:
    if labels.dtype.kind == "U":
        return datasets.ClassLabel(names=np.unique(labels).tolist())
    return datasets.Value(labels.dtype.name)


def _rows(path: Path, image_name: str, label_name: str | None, stamp: str) -> Iterator[dict[str, Any]]:
    """The rows of a NumPy file; Datasets keeps them under its arguments, of which the stamp changes with the file."""
    images = _array(path, image_name)
    labels = None if label_name is None else _labels(path, label_name).tolist()
    for index, image in enumerate(images):
        yield {"image": image} if labels is None else {"image": image, "label": labels[index]}
