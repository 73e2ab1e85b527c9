"""Batches that are made on a device are those that a loader reads; the meta device stands for a GPU."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stf_diffusers import ReferenceBank, ReferenceBatchSampler
from stf_diffusers.training.device_images import DeviceImages, images_on_device
from stf_diffusers.training.image_data import open_images

PICTURES = np.random.default_rng(0).integers(0, 256, (13, 2, 2), dtype=np.uint8)
LABELS = [index % 3 for index in range(13)]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
DATA = datasets.Dataset.from_dict(
    {"image": [Image.fromarray(picture) for picture in PICTURES], "label": LABELS}, features=FEATURES
)


def images(classes=True, memory=4.0):
    """Thirteen grey images, which are not in the order of their classes."""
    return open_images(DATA, class_conditional=classes, image_memory_gb=memory, quiet=True)


def on_meta(bank):
    """A bank without data, which the making of one would read."""
    bank.images, bank._norms = bank.images.to("meta"), bank._norms.to("meta")
    return bank


KINDS = {
    "copy": lambda found: DeviceImages(found.in_memory.clone(), found.labels),
    "bank": lambda found: DeviceImages.of_bank(found.make_bank(), found.labels),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("n", [4, 8, 13])
@pytest.mark.parametrize("position", [0, 2, 3, 7])
def test_bit_identical_to_what_is_read(kind, classes, n, position):
    """From any position, over the ends of epochs of three batches, on one process of one and on the second of two."""
    found = images(classes)
    for processes in ({}, {"num_processes": 2, "process_index": 1}):
        samplers = [ReferenceBatchSampler(13, 4, n, seed=5, labels=found.labels, **processes) for _ in range(2)]
        read = found.batches_from(position, samplers[0])
        made = KINDS[kind](found).batches_from(position, samplers[1], num_workers=1)
        for there, here in itertools.islice(zip(read, made, strict=False), 7):
            assert list(here) == list(there) and here.pop("num_unconditional", 0) == there.pop("num_unconditional", 0)
            for key, value in there.items():
                assert here[key].dtype == value.dtype and here[key].equal(value), key
            assert here["images"].data_ptr() == here["reference_images"].data_ptr(), "sources are a view"


def test_nothing_else_draws_differently():
    """The loader takes one number from the global generator at each epoch, either way."""
    found, states = images(), []
    for source in (found, KINDS["bank"](found)):
        torch.manual_seed(0)
        list(itertools.islice(source.batches_from(1, ReferenceBatchSampler(13, 4, 8)), 6))
        states.append(torch.get_rng_state())
    assert states[0].equal(states[1])


def test_a_bank_is_not_copied():
    found = images()
    bank = found.make_bank()
    resident = DeviceImages.of_bank(bank, found.labels)
    assert resident.images is bank.images and not bank.images.equal(found.in_memory)
    assert bank.images[bank.rows_of(torch.arange(13))].equal(found.in_memory)
    assert DeviceImages.of_bank(images(False).make_bank(), None).rows is None
    there = on_meta(found.make_bank())
    assert images_on_device(found, "meta", memory_gb=0, bank=there).images is there.images
    assert images_on_device(found, "meta:0", memory_gb=0, bank=there).rows.shape == (13,)


def test_banks_that_do_not_hold_all_on_a_device(tmp_path):
    found = images()
    found.make_bank().save(tmp_path / "bank")
    for bank in (found.make_bank(process_shard=(0, 2)), ReferenceBank.open(tmp_path / "bank")):
        with pytest.raises(ValueError, match=r"sharded or in a file\. Pass DeviceImages a tensor of all images"):
            DeviceImages.of_bank(bank, found.labels)


def test_where_images_are():
    """On the device where they fit and nobody put a bank elsewhere, and said so."""
    found, whole = images(), 13 * 4 / 2**30
    there = images_on_device(found, "meta", memory_gb=whole)
    assert str(there) == "13 images of (1, 2, 2), kept on meta" and there.labels.device.type == "cpu"
    assert images_on_device(images(False), "meta", memory_gb=whole).labels is None
    for stay in (
        images_on_device(found, "meta", memory_gb=whole * 0.99),
        images_on_device(found, "cpu", memory_gb=1),
        images_on_device(found, "meta", memory_gb=1, bank=found.make_bank()),
    ):
        assert stay is found
    read = images(memory=0)
    assert images_on_device(read, "meta", memory_gb=1) is read


def test_beside_a_part_of_a_bank():
    """Seven of the thirteen images are in it."""
    found = images()
    part = on_meta(found.make_bank(process_shard=(1, 2)))
    assert images_on_device(found, "meta", memory_gb=19 * 4 / 2**30, bank=part) is found
    assert images_on_device(found, "meta", memory_gb=20 * 4 / 2**30, bank=part).images.shape == (13, 1, 2, 2)


def test_lists_are_needed():
    with pytest.raises(ValueError, match="need a sampler"):
        next(KINDS["copy"](images()).batches_from(0, None))


def test_data_that_bring_their_references_stay():
    found = images()

    class Buffered(type(found)):
        num_references = 8

    found.__class__ = Buffered
    assert images_on_device(found, "meta", memory_gb=1) is found
