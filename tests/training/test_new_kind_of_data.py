"""A kind of data that the package has not seen is one class: references, batches, evaluations and latents take it."""

import pytest
import torch
from accelerate import Accelerator

from stf_diffusers.reference_bank import ReferenceBank
from stf_diffusers.training.autoencoder import load_autoencoder
from stf_diffusers.training.evaluation import Evaluation
from stf_diffusers.training.latents import load_latents
from stf_diffusers.training.references import choose_references
from stf_diffusers.training.sources import IndexedImages
from tiny import tiny_autoencoder

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


class Ramps(IndexedImages):
    """40 colour images of 8x8, each of one level, made when they are read."""

    labels, num_classes = None, None
    shape, standard_deviation, in_memory, read_alike, fingerprint = (3, 8, 8), 0.5, None, True, "ramps"

    def __len__(self):
        return 40

    def __getitems__(self, indices):
        index = torch.tensor(indices)
        return {"images": (index * 6).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8), "index": index}

    def digest(self, at_most=256):
        return "ramps"

    def manifest(self):
        return {"data": "ramps"}

    def bank_in_file(self, path, augmentation, process_shard, quiet):
        return ReferenceBank(self.__getitems__(list(range(40)))["images"])


def test_batches_and_references():
    references = choose_references(Ramps(), 4, reference_batch_size=12)
    batch = next(Ramps().batches_from(3, references.sampler))
    assert batch["reference_images"].shape == (12, 3, 8, 8) and batch["images"].equal(batch["reference_images"][:4])
    assert batch["index"].tolist() == (batch["images"][:, 0, 0, 0] / 6).int().tolist()
    assert references.of(batch)["reference"] is batch["reference_images"]
    assert "40 images of (3, 8, 8)" in str(Ramps())
    with pytest.raises(ValueError, match="do not fit into image_memory_gb"):
        choose_references(Ramps(), 4, reference="bank")


class WithReferences(Ramps):
    """Data of known size may bring their references too."""

    num_references = 12


def test_data_that_bring_their_references_get_no_sampler():
    found = choose_references(WithReferences(), 4, reference_memory_gb=1)
    assert (found.kind, found.n, found.sampler, found.bank) == ("stream", 12, None, None)


def test_evaluations_and_latents(extractor, tmp_path):
    evaluation = Evaluation(
        Accelerator(), Ramps(), tmp_path, eval_extractor=str(extractor), eval_steps=1, eval_num_samples=5,
        data_name="ramps", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert evaluation.data.shape[0] == 40
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    latents, _, path = load_latents(
        Ramps(), load_autoencoder(str(tmp_path / "vae")), tmp_path, sample=False, quiet=True
    )
    assert len(latents) == 40 and path.is_file()
