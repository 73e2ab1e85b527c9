"""Images: read, cropped, measured and mirrored."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from stf_diffusers.training.data_set import find_label_column, load_digits_dataset
from stf_diffusers.training.image_data import ImageColumn, flip_at_random, measure_standard_deviation
from stf_diffusers.training.image_reader import ImageReader, decode_all, make_reader


def test_reader_crops_resizes_and_converts():
    wide = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8)[None, :, None], (8, 1, 3)))
    centre = ImageReader("RGB", 8, center_crop=True)(wide, random.Random(0))
    assert centre.shape == (3, 8, 8) and centre.dtype == torch.uint8
    assert torch.equal(centre[0, 0], torch.arange(8, 16, dtype=torch.uint8))
    lefts = {int(ImageReader("RGB", 8, center_crop=False)(wide, random.Random(seed))[0, 0, 0]) for seed in range(200)}
    assert lefts == set(range(17)), "random crops reach every position"
    assert ImageReader("L", 4, True)(Image.new("L", (8, 8), 7), random.Random(0)).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="values of no fixed range"):
        ImageReader("L", 8, True)(Image.fromarray(np.zeros((8, 8), np.float32)), random.Random(0))
    with pytest.raises(ValueError, match="image_mode="):
        ImageReader("L", 8, True, convert=False)(wide, random.Random(0))
    with pytest.raises(ValueError, match="resolution="):
        ImageReader("RGB", 8, True, resize=False)(wide, random.Random(0))


def test_digits_and_their_standard_deviation():
    digits = load_digits_dataset()
    assert len(digits) == 1797 and find_label_column(digits) == "label"
    reader = make_reader(digits, "image", None, None, True)
    images = decode_all(digits, "image", reader, 2**30, quiet=True)
    expected = (images.double() / 127.5 - 1).std(correction=0)
    column = ImageColumn(digits, "image", reader, images=images)
    assert measure_standard_deviation(column) == pytest.approx(float(expected), rel=1e-9)


def test_flips_are_fair_and_leave_their_input_alone():
    images = torch.arange(4000, dtype=torch.uint8).reshape(2000, 1, 1, 2)
    before = images.clone()
    flipped = flip_at_random(images, torch.Generator().manual_seed(0))
    which = (flipped != images).flatten(1).any(1)
    assert torch.equal(images, before)
    assert torch.equal(flipped[which], images[which].flip(-1))
    # 1000 expected, standard deviation 22: five of them.
    assert abs(int(which.sum()) - 1000) < 112
