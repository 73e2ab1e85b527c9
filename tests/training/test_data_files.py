"""Files and folders: archives, arrays, and folders whose names say classes or splits."""

import shutil
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
from datasets.data_files import SPLIT_KEYWORDS
from PIL import Image

from stf_diffusers.training.data_files import _SPLIT_WORDS
from stf_diffusers.training.data_set import load_split, read_labels
from stf_diffusers.training.image_data import open_images


def pictures(folder, *names):
    """Images 8x8 at these places; the red value is the place's number."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return str(folder)


@pytest.fixture
def load(tmp_path):
    """load(...): as `load_split`, with a cache of its own."""
    return lambda *args, **how: load_split(*args, cache_dir=str(tmp_path / "cache"), **how)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/0.png", "cat/1.png", "dog/2.png"], ["cat", "dog"]),
        (["animals/cat/0.png", "animals/cat/1.png", "animals/dog/2.png"], ["cat", "dog"]),
        (["train/0.png", "car/1.png", "bus/2.png"], ["bus", "car", "train"]),
        (["cat/0.png", "dog/1.png", "test/2.png"], ["cat", "dog", "test"]),
        (["train/cat/0.png", "train/dog/1.png", "car/bmw/2.png"], ["bmw", "cat", "dog"]),
    ],
)
@pytest.mark.parametrize("how", ["dataset_name", "train_data_dir"])
def test_folders_of_classes_whatever_their_names(names, classes, how, load, tmp_path):
    """Datasets takes "train" and "test" for splits, and leaves the other folders out."""
    data = load(**{how: pictures(tmp_path / "data", *names)})
    assert data.features["label"].names == classes and len(data) == 3


@pytest.mark.parametrize(
    "names", [["b/1.png", "a/0.png", "a/x/2.JPG"], ["1.png", "0.jpg", "10.png"], ["b/1.png", "a/2.png", ".x/0.png"]]
)
@pytest.mark.parametrize("note", [None, "notes.txt"])
def test_what_is_found_without_looking_for_splits_is_what_datasets_finds(names, note, load, tmp_path):
    folder = pictures(tmp_path / "data", *names)
    if note:
        (tmp_path / "data" / note).write_text("not an image")
    plain = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=str(tmp_path / "plain"))
    for how in ("dataset_name", "train_data_dir"):
        found = load(**{how: folder})
        assert found.features == plain.features
        assert [np.asarray(image).tolist() for image in found["image"]] == [
            np.asarray(image).tolist() for image in plain["image"]
        ]


def test_every_name_of_a_split_is_known_by_its_letters():
    words = [word for words in SPLIT_KEYWORDS.values() for word in words]
    assert all(any(part in word for part in _SPLIT_WORDS) for word in words)


def test_an_image_outside_of_every_split_makes_all_of_them_training_images(load, tmp_path):
    assert len(load(pictures(tmp_path / "data", "img_test_0.png", "img_1.png"))) == 2


def test_folders_of_splits(load, tmp_path):
    folder = pictures(tmp_path / "data", "train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png")
    (tmp_path / "data" / "notes.txt").write_text("not an image")
    for split, reds in (("train", [0, 1]), ("test", [2, 3]), ("train+test", [0, 1, 2, 3]), ("train[:1]", [0])):
        found = load(folder, split=split)
        assert [image.getpixel((0, 0))[0] for image in found["image"]] == reds
        assert found.features["label"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"no 'dev' split; it has \['test', 'train'\]\. Choose one with split="):
        load(folder, split="dev")
    with pytest.raises(ValueError, match=r"no 'dev' split; it has \['test', 'train'\]\. Choose one with split="):
        load(folder, split="dev", streaming=True)
    with pytest.raises(ValueError, match="no 'test' split; it has"):
        load(split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_zip_archives_are_folders(streaming, load, tmp_path):
    pictures(tmp_path / "data", "cat/0.png", "dog/1.png", "test/2.png")
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
    data = load(archive, streaming=streaming)
    assert data.features["label"].names == ["cat", "dog", "test"] and len(list(data)) == 3
    assert len(load(train_data_dir=archive)) == 3


def test_a_new_archive_of_the_same_name_is_read_anew(load, tmp_path):
    for count in (2, 5):
        pictures(tmp_path / "data", *(f"{number}.png" for number in range(count)))
        assert len(load(shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data"))) == count


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_archives_are_web_datasets(streaming, load, tmp_path):
    pictures(tmp_path / "data", *(f"{number}.png" for number in range(4)))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for number in range(4):
            (tmp_path / "data" / f"{number}.cls").write_text(str(number % 2))
            for kind in ("png", "cls"):
                archive.add(tmp_path / "data" / f"{number}.{kind}", f"{number}.{kind}")
    data = load(str(tmp_path / "data.tar"), streaming=streaming)
    assert [row["png"].getpixel((0, 0))[0] for row in data] == [0, 1, 2, 3]
    if not streaming:
        assert open_images(data, class_conditional=True, image_cache=False).labels.tolist() == [0, 1, 0, 1]


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (IMAGES, IMAGES.transpose(0, 3, 1, 2)),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES.transpose(0, 3, 1, 2)),
        (IMAGES[..., 0], IMAGES[:, None, :, :, 0]),
        (IMAGES[..., :1], IMAGES[:, None, :, :, 0]),
        (IMAGES[..., 0].astype(np.int64), IMAGES[:, None, :, :, 0]),
        (IMAGES[..., 0].astype(np.uint16) * 257, IMAGES[:, None, :, :, 0]),
    ],
)
def test_arrays_of_images(array, expected, load, tmp_path):
    path = str(tmp_path / "images.npy")
    np.save(path, array)
    assert np.array_equal(open_images(load(path), image_cache=False).images, expected)
    assert len(list(load(path, streaming=True))) == 6


def test_arrays_with_labels(load, tmp_path):
    path = str(tmp_path / "data.npz")
    np.savez(path, images=IMAGES, labels=np.array([[2], [0], [1], [1], [0], [2]]))
    images = open_images(load(path), class_conditional=True, image_cache=False)
    assert images.labels.tolist() == [2, 0, 1, 1, 0, 2] and images.class_names is None
    np.savez(
        path, images=IMAGES[:4], labels=np.array(["dog", "cat", "dog", "cat"])
    )  # the file of that name has changed
    data = load(path)
    assert read_labels(data, "label") == ([1, 0, 1, 0], 2, ["cat", "dog"])


@pytest.mark.parametrize("names", ["x_{}", "{}_images"])
def test_arrays_of_splits(names, load, tmp_path):
    """As Keras and MedMNIST name them."""
    path, labels = str(tmp_path / "mnist.npz"), names.replace("x", "y").replace("images", "labels")
    arrays = {}
    for split, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        arrays |= {names.format(split): IMAGES[rows], labels.format(split): np.arange(6)[rows]}
    np.savez(path, **arrays)
    assert Counter(load(path)["label"]) == Counter(range(4)) and list(load(path, split="test")["label"]) == [4, 5]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": IMAGES, "b": IMAGES}, "one array of images is needed"),
        ({"a": np.zeros((4, 9))}, "one array of images is needed"),
        ({"a": IMAGES, "y": np.zeros(5, int)}, "one array of 6 labels, a class each, is read"),
        ({"a": IMAGES, "y": np.zeros(6, int), "z": np.zeros(6, int)}, "one array of 6 labels, a class each, is read"),
        ({"a": IMAGES[:0]}, "'a' holds no images"),
        ({"a": IMAGES, "y": np.array([{}] * 6)}, "is damaged, or holds Python objects, which are not read"),
    ],
)
def test_arrays_that_are_refused(arrays, message, load, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=rf"data\.npz.* cannot be read: .*{message}"):
        load(str(tmp_path / "data.npz"))


@pytest.mark.parametrize("kind", ["arrays", "save_to_disk", "parquet"])
def test_parts_of_splits(kind, load, tmp_path):
    path = tmp_path / {"arrays": "data.npz", "save_to_disk": "data", "parquet": "data.parquet"}[kind]
    if kind == "arrays":
        np.savez(path, x_train=IMAGES[:4], x_test=IMAGES[4:])
    else:
        rows = datasets.Dataset.from_dict({"image": IMAGES.tolist()})
        parts = datasets.DatasetDict(train=rows.select(range(4)), test=rows.select(range(4, 6)))
        parts.save_to_disk(path) if kind == "save_to_disk" else rows.to_parquet(path)
    every = 2 if kind == "parquet" else 1
    sizes = {"train[1:3]": 2, "train[:50%]": 2 + (every - 1), "train": 4 + 2 * (every - 1), "all": 6}
    for split, size in sizes.items():
        assert len(load(str(path), split=split)) == size
    if kind != "parquet":
        assert len(load(str(path), split="test+train[:1]")) == 3
    with pytest.raises(ValueError, match=r"split='train\[x\]': Unrecognized instruction format"):
        load(str(path), split="train[x]")
    with pytest.raises(ValueError, match="the data set has no 'dev' split"):
        load(str(path), split="dev")


def test_other_files_are_refused(load, tmp_path):
    (tmp_path / "data.rar").write_bytes(b"what is this")
    with pytest.raises(ValueError, match=r"'\.rar' are not read; pass a folder, or a file that ends in \.parquet"):
        load(str(tmp_path / "data.rar"))
    (tmp_path / "data.zip").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"data\.zip' cannot be read: File is not a zip file"):
        load(str(tmp_path / "data.zip"))
    pictures(tmp_path / "data", "0.png")
    datasets.load_dataset(str(tmp_path / "data"), split="train").to_parquet(tmp_path / "data.parquet")
    assert len(load(str(tmp_path / "data.parquet"))) == 1
