"""Grids of images, with the names of classes beneath them where there are some."""

import numpy as np
import pytest
from diffusers.utils import make_image_grid
from PIL import Image

from stf_diffusers.image_grid import image_grid, names_of_labels


def pictures(count, mode="RGB", size=(8, 8)):
    shape = (count, *size[::-1], {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(image.squeeze()) for image in pixels]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize(("count", "columns", "size"), [(4, 2, (8, 8)), (5, 3, (12, 8)), (1, 1, (100, 90))])
def test_without_names_it_is_diffusers_own_grid_enlarged(mode, count, columns, size):
    images = pictures(count, mode, size)
    rows = -(-count // columns)
    expected = make_image_grid(images + [Image.new("RGB", size)] * (rows * columns - count), rows, columns)
    scale = max(1, 64 // size[0])
    larger = expected.resize((expected.width * scale, expected.height * scale), Image.Resampling.NEAREST)
    for found, wanted in ((image_grid(images, columns), expected), (image_grid(images, columns, min_width=64), larger)):
        assert found.mode == wanted.mode and found.size == wanted.size and found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (64, 64), (256, 256)])
def test_each_name_stands_beneath_its_image_and_nowhere_else(size):
    images = pictures(5, size=size)
    scale = max(1, 64 // size[0])
    width, height = size[0] * scale, size[1] * scale
    grid = np.asarray(image_grid(images, 3, ["one", "three", "one", "", "w" * 80]))
    margin = grid.shape[0] // 2 - height
    assert grid.shape[1] == 3 * width and margin >= 10
    strips = []
    for index, image in enumerate(images):
        top, left = index // 3 * (height + margin), index % 3 * width
        assert np.array_equal(grid[top : top + height : scale, left : left + width : scale], np.asarray(image))
        strips.append(grid[top + height : top + height + margin, left : left + width])
    assert np.array_equal(strips[0], strips[2]) and not np.array_equal(strips[0], strips[1])
    assert (strips[3] == 255).all(), "nothing is written where there is no name"
    for strip in (strips[0], strips[1], strips[4]):
        ink = strip.min(-1) < 128
        assert ink.sum() > 20 and not ink[:, [0, -1]].any() and not ink[[0, -1]].any(), "within its cell"
    assert (grid[height + margin :, 2 * width :] == 0).all(), "no sixth image"


def test_names_that_the_font_can_write():
    names = ["tabby cat", "Fähre, alt", "猫", "", "a\nb"]
    assert names_of_labels([1, 0, 2, 3, 4, 7], names) == ["Fahre, alt", "tabby cat", "2", "3", "4", "7"]
    assert (
        names_of_labels([0, 1], None) is None and names_of_labels([0], []) is None and names_of_labels([], names) == []
    )
