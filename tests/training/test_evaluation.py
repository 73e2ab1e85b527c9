"""Features of the data are computed once, and evaluations fall due when they should, a resumed run's too."""

import json

import pytest
import torch
from accelerate import Accelerator

from stf_diffusers.feature_extractors import FeatureExtractor
from stf_diffusers.training.data_set import load_digits_dataset
from stf_diffusers.training.evaluation import Evaluation, data_features, gathered
from stf_diffusers.training.image_data import open_images

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture(scope="module")
def images():
    return open_images(load_digits_dataset().select(range(300)), quiet=True)


def corners(pixels):
    """(B, 2) features that a test can compute by itself."""
    return torch.stack([pixels[:, 0, 5, 5], pixels[:, 0, 6, 6]], 1).float()


def test_features_of_one_process_are_in_order(images, tmp_path):
    asked = []

    def compute(pixels):
        asked.append(len(pixels))
        return corners(pixels)

    found = data_features(images, FeatureExtractor("corners", compute), str(tmp_path), quiet=True)
    assert found.equal(corners(images.in_memory)) and sum(asked) == 300
    assert data_features(images, FeatureExtractor("corners", compute), str(tmp_path), quiet=True).equal(found)
    assert sum(asked) == 300, "the second time they are read"
    other = data_features(images, FeatureExtractor("others", lambda x: corners(x) + 1), str(tmp_path), quiet=True)
    assert other.equal(found + 1), "another extractor has others"
    assert gathered(found).equal(found)


def evaluation(images, folder, extractor, **more):
    return Evaluation(
        Accelerator(), images, folder, eval_extractor=str(extractor), eval_steps=3, eval_num_samples=5, data_name="digits",
        cache_dir=str(folder / "cache"), **more,
    )  # fmt: skip


def test_what_is_due(images, extractor, tmp_path):
    found = evaluation(images, tmp_path, extractor)
    assert [step for step in range(9) if found.due(step, max_steps=8)] == [3, 6, 8]
    records = [{"step": 3}, {"step": 6}, {"step": 8}]
    (tmp_path / "evaluations.json").write_text(json.dumps(records))
    assert evaluation(images, tmp_path, extractor).records == [], "a new run begins anew"
    resumed = evaluation(images, tmp_path, extractor, first_step=6)
    assert resumed.records == records[:2], "what came after the checkpoint comes again"
    assert [step for step in range(6, 9) if resumed.due(step, max_steps=8)] == [8]


def test_an_extractor_that_is_none_is_named(images, tmp_path):
    with pytest.raises(ValueError, match=r"eval_extractor='.*nowhere'"):
        evaluation(images, tmp_path, tmp_path / "nowhere")
