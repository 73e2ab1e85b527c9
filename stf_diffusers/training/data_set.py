"""A data set of images: loaded from the Hub or a disk, its columns of images and labels found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from PIL import Image

from .data_files import file_builder, folder_builder, is_array_file, read_arrays
from .image_column import check_holds_images, described, may_hold_images

# Columns that hold labels by convention, WebDataset's "cls" among them.
_USUAL_LABELS = ("label", "labels", "class", "cls")


def load_digits_dataset() -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, padded with background to 12x12 grey images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(np.pad(image, 2)) for image in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def load_split(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    cache_dir: str | None = None,
    streaming: bool = False,
    split: str = "train",
) -> datasets.Dataset | datasets.IterableDataset:
    """A split of a data set of images.

    Args:
        dataset_name: a data set on the Hub, a local folder (images, parquet, or `save_to_disk`), or a file: parquet, an
            archive of images (.zip) or of a WebDataset (.tar), or arrays (.npz, .npy). Without this or
            `train_data_dir`: scikit-learn's digits.
        dataset_config_name: the configuration of the data set, where it has several.
        train_data_dir: a folder of images.
        cache_dir: where downloads are kept.
        streaming: return an `IterableDataset`.
        split: name of the split; data without splits are "train". Where the data are stored also "train[:1000]",
            "train+test" or "all".

    Raises:
        ValueError: there is no such data set, or no such split.
    """
    if dataset_name is None and train_data_dir is None:
        return _of_splits({"train": load_digits_dataset()}, split, streaming)
    try:
        found = _read(dataset_name, dataset_config_name, train_data_dir, cache_dir)
        if isinstance(found, dict):
            return _of_splits(found, split, streaming)
        return _of_builder(found, split, streaming)
    except NoSuchSplit:
        raise
    # Anything may go wrong with files and servers; what goes wrong has to name the data set.
    except Exception as error:
        where = f"train_data_dir={train_data_dir!r}" if dataset_name is None else f"dataset_name={dataset_name!r}"
        # Datasets' own error says no more than that there was one.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise ValueError(f"{where} cannot be read: {cause}") from error


class NoSuchSplit(ValueError):
    """The data set exists, but lacks the split."""


def _read(
    name: str | None, config_name: str | None, data_dir: str | None, cache_dir: str | None
) -> dict[str, datasets.Dataset] | datasets.DatasetBuilder:
    """The splits that are there, or the builder of Datasets that makes them."""
    place = name if name is not None else str(data_dir)
    path = Path(place)
    if is_array_file(path):
        return read_arrays(path, cache_dir)
    if path.is_file():
        return file_builder(path, cache_dir)
    if name is None:
        return folder_builder(path, cache_dir, images=True)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(name)
        return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    if path.is_dir():
        return folder_builder(path, cache_dir, config_name)
    return datasets.load_dataset_builder(with_owner(name), config_name, cache_dir=cache_dir)


def _of_splits(
    splits: dict[str, datasets.Dataset], split: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    _check_split(split, splits)
    sizes = {name: len(part) for name, part in splits.items()}
    with _split_errors(split):
        parts = datasets.ReadInstruction.from_spec("+".join(splits) if split == "all" else split).to_absolute(sizes)
        found = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    whole = splits[split] if split in splits else datasets.concatenate_datasets(found)
    return whole.to_iterable_dataset() if streaming else whole


def _of_builder(
    builder: datasets.DatasetBuilder, split: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if streaming:
        streams = builder.as_streaming_dataset()
        if split not in streams:
            raise NoSuchSplit(
                f"the data set has no {split!r} split; it has {sorted(streams)}. Choose one with split=; a stream is read whole."
            )
        return streams[split]
    builder.download_and_prepare()
    _check_split(split, builder.info.splits)
    with _split_errors(split):
        return builder.as_dataset(split=split)


@contextmanager
def _split_errors(split: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise NoSuchSplit(f"split={split!r}: {error}") from error


def _check_split(split: str, splits: Iterable[str]) -> None:
    # Anything but a name is an expression, which Datasets reads.
    if split.isidentifier() and split != "all" and split not in splits:
        raise NoSuchSplit(f"the data set has no {split!r} split; it has {sorted(splits)}. Choose one with split=.")


def with_owner(name: str) -> str:
    """A data set's name as Datasets can read it: the Hub still knows "cifar10", Datasets wants "uoft-cs/cifar10".

    Raises:
        ValueError: the Hub does not know the short name, or cannot be asked.
    """
    if "/" in name or Path(name).exists():
        return name
    try:
        return HfApi().dataset_info(name).id
    # The client's versions differ in their HTTP library and its errors.
    except Exception as error:
        raise ValueError(
            f"there is no such file or folder, and no data set of this old name on the Hub: {error} Pass a path, or the "
            f"owner too: owner/{name}."
        ) from error


def find_column(
    dataset: datasets.Dataset | datasets.IterableDataset, candidates: list[str], requested: str | None, argument: str
) -> str | None:
    """The column requested, or the only candidate.

    Args:
        dataset: the data set.
        candidates: columns that qualify.
        requested: a column's name, or None.
        argument: the name under which a caller passes `requested`, for messages.

    Returns:
        Its name; None where there is no candidate.

    Raises:
        ValueError: the requested column is missing, or there are several candidates.
    """
    if requested is not None:
        if requested not in dataset.column_names:
            raise ValueError(f"{argument}={requested!r}: the data set has the columns {dataset.column_names}.")
        return requested
    if len(candidates) > 1:
        raise ValueError(f"the columns {candidates} all qualify; choose one with {argument}=.")
    return candidates[0] if candidates else None


def find_image_column(dataset: datasets.Dataset | datasets.IterableDataset, requested: str | None = None) -> str:
    """The column of images: the one requested, or the only one; where Datasets declares none, the only one of bytes or arrays.

    Raises:
        ValueError: there is none, or there are several candidates, or the one requested holds something else.
    """
    declared = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    possible = [name for name, feature in dataset.features.items() if may_hold_images(feature)]
    column = find_column(dataset, declared or possible, requested, "image_column")
    if column is None:
        held = ", ".join(f"{name}: {described(feature)}" for name, feature in dataset.features.items())
        raise ValueError(
            f"no column holds images among {dataset.column_names} ({held}). Convert one to datasets.Image, bytes of image "
            "files, or arrays of uint8 pixels (H, W), (H, W, C) or (C, H, W)."
        )
    check_holds_images(dataset, column)
    return column


def find_label_column(dataset: datasets.Dataset | datasets.IterableDataset, requested: str | None = None) -> str:
    """The column of class labels: the one requested, or the only one; where Datasets declares none, one of a usual name.

    Raises:
        ValueError: there is none, or there are several candidates.
    """
    declared = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in dataset.column_names if name in _USUAL_LABELS]
    column = find_column(dataset, declared or usual, requested, "label_column")
    if column is None:
        raise ValueError(
            f"class_conditional=True: no class labels among {dataset.column_names}; name a column of integers or strings with label_column=, or leave class_conditional= out."
        )
    return column


def find_columns(
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_column: str | None,
    label_column: str | None,
    class_conditional: bool,
) -> tuple[str, str | None]:
    """The columns of images and, if labels are read, of labels. A label column that is named is checked in any case.

    Raises:
        ValueError: as `find_image_column` and `find_label_column`.
    """
    images = find_image_column(dataset, image_column)
    labels = find_label_column(dataset, label_column) if class_conditional or label_column else None
    return images, labels if class_conditional else None


class Labels(NamedTuple):
    """The classes of all images.

    Attributes:
        values: the class of each image.
        num_classes: how many there are, up to the largest that occurs.
        class_names: their names; None where the data set has none.
    """

    values: list[int]
    num_classes: int
    class_names: list[str] | None


def read_labels(dataset: datasets.Dataset, column: str) -> Labels:
    """The labels of all images; strings are numbered in sorted order.

    Raises:
        ValueError: they are neither strings nor integers from 0, or there are more classes than images.
    """
    labels, feature = list(dataset[column]), dataset.features[column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    strings = isinstance(labels[0], str)
    fits = (lambda label: isinstance(label, str)) if strings else is_class
    wrong = next((row for row, label in enumerate(labels) if not fits(label)), None)
    if wrong is not None:
        raise ValueError(
            f"labels in {column!r} must be integers from 0, or all strings; that of row {wrong} is {labels[wrong]!r}. Remove "
            "rows without a label, or choose another column with label_column=."
        )
    if strings:
        names = sorted(set(labels))
        number_of = {name: number for number, name in enumerate(names)}
        labels = [number_of[label] for label in labels]
    num_classes = max(labels) + 1
    if num_classes > len(labels):
        raise ValueError(
            f"labels in {column!r} go up to {max(labels)}, for {len(labels)} images. Number the classes from 0."
        )
    return Labels(labels, num_classes, None if names is None else names[:num_classes])


def is_class(label: object) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and label >= 0


def public_name(name: str | None) -> str | None:
    """A name on the Hub as it is; of a local path, the last part only."""
    return Path(name).resolve().name if name is not None and Path(name).exists() else name
