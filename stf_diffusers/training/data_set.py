"""A data set of images: loaded from the Hub or a disk, its columns of images and labels found."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import HfApi
from PIL import Image


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
        dataset_name: a data set on the Hub, a local folder (images, parquet, or `save_to_disk`), or a parquet file. Neither
            this nor `train_data_dir`: scikit-learn's digits.
        dataset_config_name: the configuration of the data set, where it has several.
        train_data_dir: a folder of images.
        cache_dir: where downloads are kept.
        streaming: return an `IterableDataset`.
        split: name of the split; data without splits are "train".

    Raises:
        ValueError: there is no such data set, or no such split.
    """
    if dataset_name is None and train_data_dir is None:
        if split != "train":
            raise ValueError(f"scikit-learn's digits have no {split!r} split: use train.")
        digits = load_digits_dataset()
        return digits.to_iterable_dataset() if streaming else digits
    try:
        splits = _read_splits(dataset_name, dataset_config_name, train_data_dir, cache_dir, streaming)
    # Anything may go wrong with files and servers; what goes wrong has to name the data set.
    except Exception as error:
        where = f"train_data_dir={train_data_dir!r}" if dataset_name is None else f"dataset_name={dataset_name!r}"
        raise ValueError(f"{where} cannot be read: {error}") from error
    if split not in splits:
        raise ValueError(f"the data set has no {split!r} split; it has {sorted(splits)}. Rename one, or pass a folder.")
    return splits[split]


def _read_splits(
    name: str | None, config_name: str | None, data_dir: str | None, cache_dir: str | None, streaming: bool
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    how = {"cache_dir": cache_dir, "streaming": streaming}
    if name is None:
        loaded = datasets.load_dataset("imagefolder", data_dir=data_dir, **how)
    elif Path(name).is_file():
        loaded = datasets.load_dataset(Path(name).suffix.lstrip("."), data_files=name, **how)
    elif (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
        if streaming:
            splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            loaded = {split: part.to_iterable_dataset() for split, part in splits.items()}
    else:
        loaded = datasets.load_dataset(with_owner(name), config_name, **how)
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded


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
    dataset: datasets.Dataset | datasets.IterableDataset, kind: type, requested: str | None, argument: str
) -> str | None:
    """The column that holds `kind` (datasets.Image or datasets.ClassLabel): the one requested, or the only one.

    Args:
        dataset: the data set.
        kind: type of the column's feature.
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
    candidates = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(candidates) > 1:
        raise ValueError(f"the columns {candidates} all qualify; choose one with {argument}=.")
    return candidates[0] if candidates else None


def find_image_column(dataset: datasets.Dataset | datasets.IterableDataset, requested: str | None = None) -> str:
    """The column of images: the one requested, or the only one.

    Raises:
        ValueError: there is none, or there are several candidates.
    """
    column = find_column(dataset, datasets.Image, requested, "image_column")
    if column is None:
        raise ValueError(f"no column holds images among {dataset.column_names}; name one with image_column=.")
    return column


def find_label_column(dataset: datasets.Dataset | datasets.IterableDataset, requested: str | None = None) -> str:
    """The column of class labels: the one requested, or the only one.

    Raises:
        ValueError: there is none, or there are several candidates.
    """
    column = find_column(dataset, datasets.ClassLabel, requested, "label_column")
    if column is None:
        raise ValueError(
            f"class_conditional=True: no class labels among {dataset.column_names}; name a column with label_column=."
        )
    return column


def read_labels(dataset: datasets.Dataset, column: str) -> tuple[list[int], int]:
    """The labels of all images, and the number of classes.

    Raises:
        ValueError: they are not integers from 0, or there are more classes than images.
    """
    labels = list(dataset[column])
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"labels in {column!r} must be integers from 0; remove rows without a label.")
    num_classes = max(labels) + 1
    if num_classes > len(labels):
        raise ValueError(
            f"labels in {column!r} go up to {max(labels)}, for {len(labels)} images. Number the classes from 0."
        )
    return labels, num_classes
