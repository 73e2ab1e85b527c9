"""Data sets: their configurations, columns and labels."""

import json

import datasets
import pytest
from PIL import Image

from stf_diffusers.training.data_set import find_image_column, find_label_column, load_split, read_labels


def test_data_sets_with_configurations(tmp_path):
    """--dataset_config_name chooses among the configurations of a folder's card."""
    for name, count in (("small", 3), ("large", 5)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    configs = [{"config_name": name, "data_dir": name} for name in ("small", "large")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert [len(load_split(str(tmp_path), name)) for name in ("small", "large")] == [3, 5]
    with pytest.raises(ValueError, match="Config name is missing"):
        load_split(str(tmp_path))


def table(**features):
    """An empty data set with these columns."""
    return datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))


def test_columns_are_found_where_there_is_one_of_the_kind():
    picture, label, number = datasets.Image(), datasets.ClassLabel(2), datasets.Value("int64")
    data = table(number=number, photo=picture, kind=label)
    assert (find_image_column(data), find_label_column(data)) == ("photo", "kind")
    assert find_label_column(data, "number") == "number"
    with pytest.raises(ValueError, match=r"\['a', 'b'\] all qualify; choose one with image_column="):
        find_image_column(table(a=picture, b=picture))
    with pytest.raises(ValueError, match="no column holds images among"):
        find_image_column(table(kind=label))
    with pytest.raises(ValueError, match="no class labels among"):
        find_label_column(table(photo=picture, number=number))
    with pytest.raises(ValueError, match="label_column='other': the data set has the columns"):
        find_label_column(data, "other")


def test_strings_are_classes_in_sorted_order_and_names_are_kept():
    features = datasets.Features({"kind": datasets.ClassLabel(names=["b", "a", "z"]), "text": datasets.Value("string")})
    rows = {"kind": [1, 0, 1, 0], "text": ["fox", "cat", "fox", "Ant"]}
    data = datasets.Dataset.from_dict(rows, features=features)
    assert read_labels(data, "kind") == ([1, 0, 1, 0], 2, ["b", "a"])
    assert read_labels(data, "text") == ([2, 1, 2, 0], 3, ["Ant", "cat", "fox"])


def test_label_columns_of_a_usual_name_are_found():
    text = datasets.Value("string")
    assert find_label_column(table(photo=datasets.Image(), label=text, caption=text)) == "label"
    assert find_label_column(table(png=datasets.Image(), cls=datasets.Value("int64"), __key__=text)) == "cls"
    assert find_label_column(table(label=text, kind=datasets.ClassLabel(2))) == "kind"
    with pytest.raises(ValueError, match=r"\['label', 'cls'\] all qualify; choose one with label_column="):
        find_label_column(table(label=text, cls=text))


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ([0, -1, 1], "row 1 is -1"),
        ([0.5] * 3, "row 0 is 0.5"),
        ([True] * 3, "row 0 is True"),
        (["a", None, "b"], "row 1 is None"),
    ],
)
def test_labels_that_are_refused(labels, wrong):
    data = datasets.Dataset.from_dict({"label": labels})
    with pytest.raises(ValueError, match=rf"must be integers from 0, or all strings; that of {wrong}\. Remove rows"):
        read_labels(data, "label")


def test_labels_count_the_classes_up_to_the_largest():
    data = datasets.Dataset.from_dict({"label": [0, 3, 1, 1], "sparse": [0, 0, 0, 4], "part": [0.5] * 4})
    assert read_labels(data, "label") == ([0, 3, 1, 1], 4, None)
    with pytest.raises(ValueError, match="go up to 4, for 4 images"):
        read_labels(data, "sparse")
    with pytest.raises(ValueError, match="must be integers from 0"):
        read_labels(data, "part")
