"""Columns of images, encoded and as pixels; 16 bits; images that cannot be decoded."""

import io
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stf_diffusers.training.data_set import find_image_column
from stf_diffusers.training.image_column import described, to_image
from stf_diffusers.training.image_data import open_images
from stf_diffusers.training.image_reader import ImageReader
from stf_diffusers.training.streaming import open_stream

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


FILES = [encoded(Image.fromarray(image)) for image in PIXELS]
DEEP = {
    "Array3D": datasets.Array3D((5, 5, 3), "uint8"),
    "List": datasets.List(datasets.List(datasets.List(datasets.Value("uint8")))),
}
COLUMNS = {
    "bytes": (FILES, datasets.Value("binary")),
    "large bytes": (FILES, datasets.Value("large_binary")),
    "structures": (
        [{"bytes": file, "path": None} for file in FILES],
        {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    ),
    "structures without paths": ([{"bytes": file, "path": None} for file in FILES], None),
    "arrays": (PIXELS, DEEP["Array3D"]),
    "arrays, channels first": (PIXELS.transpose(0, 3, 1, 2), datasets.Array3D((3, 5, 5), "uint8")),
    "lists": (PIXELS.tolist(), DEEP["List"]),
    "lists of undeclared integers": (PIXELS.tolist(), None),
    "images": ([Image.fromarray(image) for image in PIXELS], datasets.Image()),
}


def table(column, feature, name="picture"):
    rows = {name: list(column), "number": list(range(len(column)))}
    data = datasets.Dataset.from_dict(rows) if feature is None else None
    features = datasets.Features({name: feature, "number": datasets.Value("int64")})
    return data or datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("requested", [None, "picture"])
def test_columns_of_images(kind, requested):
    images = open_images(table(*COLUMNS[kind]), image_column=requested, image_cache=False)
    assert np.array_equal(images.images, PIXELS.transpose(0, 3, 1, 2))
    bank = images.make_bank()
    assert np.array_equal(bank.images, PIXELS.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_images_that_are_read_again(kind, tmp_path):
    images = open_images(table(*COLUMNS[kind]), image_memory_gb=0)
    assert np.array_equal(images.__getitems__([4, 1])["images"], PIXELS[[4, 1]].transpose(0, 3, 1, 2))
    bank = images.make_bank(path=tmp_path / "bank.safetensors", quiet=True)
    assert np.array_equal(bank.images[0:6], PIXELS.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", COLUMNS)
def test_streamed_columns_of_images(kind):
    stream = open_stream(table(*COLUMNS[kind]).to_iterable_dataset(), batch_size=2)
    batch = next(stream.batches_from(0))
    assert np.array_equal(batch["images"], PIXELS[batch["index"]].transpose(0, 3, 1, 2))


def test_a_declared_column_of_images_comes_before_bytes_and_lists():
    files, _ = COLUMNS["bytes"]
    data = table(COLUMNS["images"][0], datasets.Image()).add_column("thumbnail", files)
    assert find_image_column(data) == "picture"
    assert find_image_column(data, "thumbnail") == "thumbnail"
    with pytest.raises(ValueError, match=r"\['picture', 'thumbnail'\] all qualify; choose one with image_column="):
        find_image_column(table(*COLUMNS["bytes"]).add_column("thumbnail", files))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (["a", "b"], "'picture' holds string, not images"),
        ([1, 2], "'picture' holds int64, not images"),
        ([[1, 2], [3, 4]], "'picture' holds lists of int64, not images"),
        ([{"x": 1}, {"x": 2}], r"'picture' holds structures of \['x'\], not images"),
        ([[["a"]], [["b"]]], "'picture' holds lists of lists of string, not images"),
    ],
)
def test_a_column_that_is_named_and_holds_something_else(column, says):
    data = table(column, None)
    with pytest.raises(ValueError, match=rf"{says}\. Choose another column .*, or convert this one"):
        open_images(data, image_column="picture")
    with pytest.raises(ValueError, match=rf"no column holds images among .*{described(data.features['picture'])[:5]}"):
        open_images(data)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.zeros((4, 4), np.float32), r"pixels of float32\. Convert them to uint8"),
        (np.full((4, 4), 300), "values from 300 to 300. Pixels are 0 to 255, or uint16"),
        (np.full((4, 4), -1), "values from -1 to -1"),
        (np.zeros((5, 6, 7), np.uint8), r"has shape \(5, 6, 7\)\. Images are"),
        (np.zeros((2, 2, 2, 3), np.uint8), "has shape"),
        (np.zeros((0, 4), np.uint8), "has shape"),
    ],
)
def test_pixels_that_are_refused(pixels, says):
    with pytest.raises(ValueError, match=says):
        to_image(pixels)


@pytest.mark.parametrize("mode", ["I;16", "I", "pixels"])
def test_sixteen_bits_are_scaled_and_rounded(mode):
    levels = np.array([[0, 127, 128, 129], [257, 32767, 32768, 385], [386, 65406, 65407, 65535]], dtype=np.uint16)
    value = {
        "I;16": Image.open(io.BytesIO(encoded(Image.fromarray(levels)))),
        "I": Image.fromarray(levels.astype(np.int32)),
        "pixels": levels,
    }[mode]
    image = to_image(value)
    assert image.mode == "L" and np.array_equal(image, np.rint(levels / 65535 * 255))
    with pytest.raises(ValueError, match="16 bits hold 0 to 65535"):
        to_image(Image.fromarray(levels.astype(np.int32) * 2))


def test_sixteen_bits_beside_eight_and_floats_that_are_refused():
    grey = [Image.new("L", (4, 4), 7), Image.fromarray(np.full((4, 4), 7 * 257, np.uint16))]
    files = [encoded(image, "TIFF") for image in grey]
    images = open_images(table(files, datasets.Value("binary")), image_cache=False)
    assert (images.images == 7).all() and images.shape == (1, 4, 4)
    files.append(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="image 2 has mode 'F'"):
        open_images(table(files, datasets.Value("binary")), image_cache=False)


@pytest.mark.parametrize("image_memory_gb", [0, 4])
def test_corrupt_images_are_left_out_where_that_is_asked(image_memory_gb, caplog):
    files = [FILES[0][:60], *FILES, b"hello", None]
    data = table([{"bytes": file, "path": None} for file in files], None).cast_column("picture", datasets.Image())
    data = data.add_column("label", ["lost", *"abcabc", "lost", "lost"])
    with pytest.raises(ValueError, match=r"image 0 cannot be decoded.* or leave it out with skip_corrupt="):
        open_images(data, image_memory_gb=image_memory_gb)
    images = open_images(
        data, image_memory_gb=image_memory_gb, skip_corrupt=True, class_conditional=True, label_column="label"
    )
    read = images.__getitems__(list(range(6)))
    assert np.array_equal(read["images"], PIXELS.transpose(0, 3, 1, 2))
    assert read["label"].tolist() == [0, 1, 2, 0, 1, 2] and images.class_names == ["a", "b", "c"]
    assert "Left out 3 of 9 images, which are missing or cannot be decoded: 0, 7, 8." in caplog.text
    with pytest.raises(ValueError, match="the data set is empty"):
        open_images(data.select([0, 7]), skip_corrupt=True)


def test_streamed_images_that_cannot_be_read_are_named():
    """The first one too, which says how the others are read."""
    for files, says in (
        ([b"no image", FILES[0]], "image 0 cannot be decoded"),
        ([FILES[0], b"no image"], "image 1 cannot"),
    ):
        with pytest.raises(ValueError, match=rf"{says}.*\. Repair it or leave it out\."):
            open_stream(table(files, datasets.Value("binary")).to_iterable_dataset(), batch_size=2)
    lists = [PIXELS[0].tolist(), [[[1], [2]], [[3]]]]
    with pytest.raises(ValueError, match="image 1 has rows of different lengths"):
        open_stream(table(lists, None).to_iterable_dataset(), batch_size=2)
    with pytest.raises(ValueError, match="image 1 has rows of different lengths"):
        open_images(table(lists, None))
    assert len(open_images(table(lists, None), skip_corrupt=True)) == 1


def test_pixels_of_another_kind_are_no_corrupt_images():
    data = table(list(PIXELS / np.float32(255)), datasets.Array3D((5, 5, 3), "float32"))
    with pytest.raises(ValueError, match=r"image 0 has pixels of float32\. Convert them to uint8, 0 to 255\.$"):
        open_images(data, skip_corrupt=True)


def test_images_that_are_not_square():
    """They cover height and width, and are cropped to them."""
    wide = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8)[None, :, None], (8, 1, 3)))
    read = ImageReader("RGB", (8, 12), center_crop=True)(wide, random.Random(0))
    assert torch.equal(read[1, 3], torch.arange(6, 18, dtype=torch.uint8))
    assert ImageReader("RGB", (16, 48), False)(wide, random.Random(0)).shape == (3, 16, 48)
    assert not ImageReader("RGB", (16, 48), False).crops_at_random(wide)
    assert ImageReader("RGB", (8, 12), False).crops_at_random(wide)
    high = wide.transpose(Image.Transpose.ROTATE_90)
    assert ImageReader("RGB", (12, 8), True)(high, random.Random(0)).shape == (3, 12, 8)
