"""Batches from a position, and the references that go with them."""

import itertools
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from stf_diffusers import ReferenceBatchSampler
from stf_diffusers.training.image_data import open_images
from stf_diffusers.training.references import choose_references, reference_memory


@pytest.fixture(scope="module")
def images():
    """Twelve grey images of 2x2, all of whose pixels are the image's number, in three classes."""
    pictures = [Image.fromarray(np.full((2, 2), index, dtype=np.uint8)) for index in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    data = datasets.Dataset.from_dict(
        {"image": pictures, "label": [index % 3 for index in range(12)]}, features=features
    )
    return open_images(data, class_conditional=True, quiet=True)


def sampler(images, n=8):
    return ReferenceBatchSampler(len(images), 4, n, seed=3, labels=images.labels)


def test_layout(images):
    for batch in itertools.islice(images.batches_from(0, sampler(images)), 4):
        assert batch["reference_images"].shape[1:] == images.shape and len(batch["images"]) == 4
        assert torch.equal(batch["reference_images"][:4], batch["images"])
        assert torch.equal(batch["index"], batch["images"][:, 0, 0, 0].long())
        assert torch.equal(batch["reference_labels"], batch["reference_images"][:, 0, 0, 0].long() % 3)
        assert torch.equal(batch["labels"], batch["reference_labels"][:4])


def test_an_epoch_is_one_pass_over_the_sources(images):
    batches = list(itertools.islice(images.batches_from(0, sampler(images)), 6))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat([batch["index"] for batch in epoch]).tolist()) == list(range(12))


@pytest.mark.parametrize("position", [1, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_entered_anywhere(position, num_workers, images):
    whole = list(itertools.islice(images.batches_from(0, sampler(images)), 8))
    entered = images.batches_from(position, sampler(images), num_workers=num_workers)
    for here, there in zip(whole[position:], entered, strict=False):
        assert here.keys() == there.keys() and here.pop("num_unconditional") == there.pop("num_unconditional")
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_a_quarter_of_what_is_free(images, monkeypatch, caplog):
    """On a CPU that its processes share; said with the reason."""
    caplog.set_level("INFO")
    free = psutil.virtual_memory().available / 2**30
    assert 0.1 * free < reference_memory("cpu") < 0.5 * free
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 47))
    assert choose_references(images, 4).kind == "batch"
    assert "would take 4.47e-08 GiB on cpu, and 4.38e-08 GiB are allowed" in caplog.text
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 48))
    assert choose_references(images, 4).kind == "bank" and "it takes 4.47e-08 GiB" in caplog.text
    assert reference_memory("cpu", 2) == 24 / 2**30


def test_the_references_that_are_chosen(images, tmp_path):
    """A bank where it fits, batches otherwise, none for DSM."""
    bank = choose_references(images, 4, augmentation="horizontal_flip")
    assert (bank.kind, bank.n, len(next(iter(bank.sampler)))) == ("bank", 24, 4)
    small = choose_references(images, 4, reference_memory_gb=47 / 2**30)
    assert (small.kind, small.n, small.bank) == ("batch", 12, None)
    assert choose_references(images, 4, reference_memory_gb=48 / 2**30).kind == "bank", "of 48 bytes"
    assert choose_references(images, 4, reference_batch_size=6).n == 6
    none = choose_references(images, 4, objective="dsm")
    assert (none.kind, none.n) == ("none", 1) and none.of({}, None) == {"reference": None}
    disk = choose_references(
        images, 4, reference="bank", reference_device="disk", bank_file=tmp_path / "bank", quiet=True
    )
    assert disk.bank.num_references == 12 and (tmp_path / "bank").is_file()
    shared = choose_references(images, 4, reference_batch_size=8, share_reference=True, num_processes=2)
    assert shared.shared and shared.n == 8 and "shared by all processes" in str(shared)
    assert not choose_references(images, 4, share_reference=True).shared, "with one process there is nothing to share"
    with pytest.raises(ValueError, match="batch_size=4 times the number of processes, 4, exceeds the 12 images"):
        choose_references(images, 4, num_processes=4)
