"""The search of levels finds what a loop over samples written out finds, alone and on two processes."""

import json

import pytest
import torch
from accelerate import Accelerator

from exact_networks import PROCESSES, ExactUNet, denoise_points, small_unet
from stf_diffusers import STFPipeline
from stf_diffusers.export import diffusers_pipeline, read_metadata, save_pipeline
from stf_diffusers.feature_extractors import FeatureExtractor
from stf_diffusers.metrics import FeatureStatistics, frechet_distance
from stf_diffusers.training.consistency_levels import pixel_features, save_levels, search_levels
from stf_diffusers.training.sampling import seed_for
from tiny import Processes

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

POINTS = (torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.5).double() * 1.6 - 0.8
PIXELS = ((POINTS / 2 + 0.5) * 255).round().to(torch.uint8)
EXTRACTOR = FeatureExtractor("pixels", lambda images: images[:, 0].float() / 255)
CANDIDATES = (0.2, 1.0, 5.0, 30.0)


def pipeline():
    """Not a consistency model: from large levels its samples are blurred, and from small ones they are few."""
    unet = ExactUNet.from_config(small_unet().config).attach("edm", POINTS).double()
    return diffusers_pipeline(unet, PROCESSES["edm"], metadata={"consistency": {"stage": 8}})


def search(**changed):
    settings = {"candidates": CANDIDATES, "num_samples": 40, "seed": 7, "batch_size": 16, **changed}
    return search_levels(pipeline(), EXTRACTOR, FeatureStatistics.of(EXTRACTOR(PIXELS)), **settings)


def by_hand(levels):
    """The distance of the 40 samples, without the package's sampler."""
    generators = [torch.Generator().manual_seed(seed_for(7, index)) for index in range(40)]

    def noise():
        return torch.stack([torch.randn(1, 4, 4, generator=generator) for generator in generators]).double()

    x = denoise_points(POINTS, 80 * noise(), 80.0)
    for level in levels:
        x = denoise_points(POINTS, x + level * noise(), level)
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return frechet_distance(FeatureStatistics.of(EXTRACTOR(pixels)), FeatureStatistics.of(EXTRACTOR(PIXELS)))


def test_the_search_finds_the_nearest_samples():
    found = search(num_inference_steps=3)
    alone = {level: by_hand([level]) for level in CANDIDATES}
    assert found.distances[1] == pytest.approx(by_hand([]), rel=1e-3)
    assert found.sigmas[2] == [min(alone, key=alone.get)] == [1.0]
    assert found.distances[2] == pytest.approx(alone[1.0], rel=1e-3)
    pairs = {level: by_hand(sorted([1.0, level], reverse=True)) for level in (0.2, 5.0, 30.0)}
    best = min(pairs, key=pairs.get)
    assert found.sigmas[3] == sorted([1.0, best], reverse=True)
    assert found.distances[3] == pytest.approx(pairs[best], rel=1e-3)
    assert len(found.tried) == 4 + 3 and found.tried[0][0] == [30.0]
    assert search(num_inference_steps=3) == found, "the same seeds, the same samples"
    assert search(batch_size=40).distances[2] == pytest.approx(found.distances[2], rel=1e-3)
    assert search(seed=8).distances != found.distances


def search_and_write(path):
    state = Accelerator(cpu=True)
    assert state.num_processes == 2
    found = search()
    path.with_suffix(f".{state.process_index}").write_text(json.dumps([found.sigmas[2], found.tried]))


def test_two_processes_find_the_same(tmp_path):
    codes, said = Processes(search_and_write, tmp_path / "found", processes=2).wait()
    assert codes == [0, 0], said[-3000:]
    first, second = ((tmp_path / f"found.{rank}").read_text() for rank in range(2))
    expected = search()
    assert first == second and json.loads(first)[0] == expected.sigmas[2]
    for (levels, distance), (ours, value) in zip(json.loads(first)[1], expected.tried, strict=True):
        assert levels == ours and distance == pytest.approx(value, rel=1e-3)


def test_a_folder_keeps_the_levels_and_samples_with_them(tmp_path):
    stock = diffusers_pipeline(small_unet(3), PROCESSES["edm"], metadata={"consistency": {}, "steps": 5})
    save_levels(stock, {2: [0.7], 3: [2.0, 0.5]})
    save_pipeline(stock, tmp_path / "first")
    STFPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert read_metadata(tmp_path / "second")["consistency_sigmas"] == {"2": [0.7], "3": [2.0, 0.5]}
    assert read_metadata(tmp_path / "second")["steps"] == 5
    pipe = STFPipeline.from_pretrained(tmp_path / "second")
    images = [
        pipe(2, 3, generator=[torch.Generator().manual_seed(seed) for seed in range(2)], output_type="pt", **how).images
        for how in ({}, {"sigmas": [2.0, 0.5]}, {"sigmas": [2.0, 0.6]})
    ]
    assert images[0].equal(images[1]) and not images[0].equal(images[2])


def test_labels_are_those_asked_for():
    unet, seen = small_unet(classes=3), []
    stock = diffusers_pipeline(unet, PROCESSES["edm"], metadata={"consistency": {}})
    unet.register_forward_pre_hook(lambda _, args: seen.extend(args[2].tolist()))
    how = {"candidates": [1.0], "num_samples": 6, "batch_size": 6}
    search_levels(stock, EXTRACTOR, FeatureStatistics.of(EXTRACTOR(PIXELS)), labels=[2, 2, 1, 0, 1, 1], **how)
    assert seen == [2, 2, 1, 0, 1, 1] * 3, "one step, and two"


def test_pixel_features_are_means_of_fields():
    images = torch.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8).to(torch.uint8)
    features = pixel_features(side=4)(images)
    assert features.shape == (2, 3 * 4 * 4)
    assert features[1, 17].item() == pytest.approx((images[1, 1, 0, 2:4].float().mean() / 127.5 - 1).item(), abs=1e-6)


WRONG = {
    "one step": ({"num_inference_steps": 1}, "a single step has no levels"),
    "too few candidates": (
        {"candidates": [1.0, 1.0], "num_inference_steps": 3},
        r"2 different candidates; got \[1\.0\]",
    ),
    "too few samples": ({"num_samples": 4}, "num_samples must be at least 5"),
    "too few labels": ({"labels": [0] * 39}, "with a label for each; got 40 and 39 labels"),
    "a level too high": ({"candidates": [100.0]}, "sigmas must decrease, between 80 and 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changed, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        search(**changed)
