"""Features against the networks themselves, stamps, and the module of `evaluate`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import stf_diffusers
from oracles import normal
from stf_diffusers.feature_extractors import inception_features, transformers_features
from stf_diffusers.metrics import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from stf_diffusers.quality import sample_quality

MODULE = Path(stf_diffusers.__file__).parent / "evaluate_modules" / "sample_quality"
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
STAMP = {"extractor": "a network", "reference": "data, train split", "sampler": "Heun, 18 steps", "seeds": "0 to 99"}


def networks():
    torch.manual_seed(0)
    patches = {"image_size": 16, "patch_size": 8, **VISION}
    text = CLIPTextConfig(vocab_size=10, max_position_embeddings=4, eos_token_id=9, bos_token_id=8, **VISION)
    return {
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        "dinov2": Dinov2Model(Dinov2Config(**patches)),
        # Its pooling is no part of a classifier, so it would be drawn at random.
        "classifier": ViTForImageClassification(ViTConfig(**patches)),
        "clip": CLIPModel(
            CLIPConfig(
                text_config=text.to_dict(), vision_config=CLIPVisionConfig(**patches).to_dict(), projection_dim=12
            )
        ),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(network, folder) by name; images are doubled in size and scaled to [-1, 1]."""
    root, found = tmp_path_factory.mktemp("models"), networks()
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name, network in found.items():
        network.eval().save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: (network, root / name) for name, network in found.items()}


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def expected_features(name, network, images):
    inputs = [
        torch.from_numpy(np.array(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)))
        for image in images.permute(0, 2, 3, 1).contiguous().numpy()
    ]
    inputs = torch.stack(inputs).permute(0, 3, 1, 2).float() / 127.5 - 1
    if name == "resnet":
        return network(inputs).last_hidden_state.mean((2, 3))
    if name == "dinov2":
        return network(inputs).last_hidden_state[:, 0]
    if name == "classifier":
        return network.vit(inputs).last_hidden_state.mean(1)
    return network.visual_projection(network.vision_model(pixel_values=inputs).pooler_output)


@pytest.mark.parametrize("name", ["resnet", "dinov2", "classifier", "clip"])
def test_features_are_the_network_s(name, models):
    network, folder = models[name]
    images = pixels(5, 3, 8, 8)
    extractor = transformers_features(folder)
    with torch.no_grad():
        expected = expected_features(name, network, images)
    found = extractor(images, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(extractor(images), found, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32 and transformers_features(folder).name == extractor.name
    assert name in extractor.name and str(folder.parent) not in extractor.name


def test_other_weights_have_another_name(models, tmp_path):
    network, folder = models["dinov2"]
    other = Dinov2Model(network.config)
    other.save_pretrained(tmp_path / "dinov2")
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    assert transformers_features(tmp_path / "dinov2").name != transformers_features(folder).name


def test_grey_and_transparent_images(models):
    extractor = transformers_features(models["resnet"][1])
    grey, colour = pixels(2, 1, 8, 8), pixels(2, 3, 8, 8)
    assert extractor(grey).equal(extractor(grey.expand(-1, 3, -1, -1)))
    assert extractor(torch.cat([colour, grey], 1)).equal(extractor(colour))


def broken(folder, tmp_path, change):
    """A copy of a saved network without some of its weights, or with none in safetensors."""
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        state = {name: value for name, value in state.items() if "layer.1" not in name}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    return tmp_path


def test_networks_that_are_refused(models, tmp_path):
    (tmp_path / "missing").mkdir()
    (tmp_path / "pickle").mkdir()
    with pytest.raises(ValueError, match="lacks weights"):
        transformers_features(broken(models["dinov2"][1], tmp_path / "missing", "missing"))
    with pytest.raises(OSError, match="safetensors"):
        transformers_features(broken(models["dinov2"][1], tmp_path / "pickle", "pickle"))
    BertModel(BertConfig(vocab_size=10, **VISION)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="not images"):
        transformers_features(tmp_path / "text")
    with pytest.raises(OSError):
        transformers_features(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(2, 3, 8, 8), TypeError),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), ValueError),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), ValueError),
    ],
)
def test_images_that_are_refused(images, error, models):
    with pytest.raises(error, match="images must"):
        transformers_features(models["resnet"][1])(images)


def test_inception_of_a_file_that_is_no_data(tmp_path):
    """A pickle that would run something is refused before the library sees it."""
    pytest.importorskip("torch_fidelity")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), tmp_path / "weights.pth")
    with pytest.raises(Exception, match="weights_only"):
        inception_features(tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()


def test_every_number_says_how_it_was_measured():
    data = normal(300, 6)
    quality = sample_quality(normal(100, 6, seed=1), data, evaluations=35, **STAMP)
    expected = frechet_distance(FeatureStatistics.of(normal(100, 6, seed=1)), FeatureStatistics.of(data))
    assert quality.frechet_distance == expected
    draws = torch.Generator().manual_seed(0)
    kernel = kernel_distance(normal(100, 6, seed=1), data, generator=draws)
    as_many = data[torch.randperm(300, generator=draws)[:100]]
    assert quality.kernel_distance == kernel
    assert (quality.precision, quality.recall) == precision_recall(normal(100, 6, seed=1), as_many)
    stamp = quality.stamp
    for part in ("a network", "100 samples", "300 of data, train split", "Heun, 18 steps", "35 evaluations", "0 to 99"):
        assert part in stamp
    assert "not comparable" in stamp and len(quality.limits) == 1 and "50,000" in quality.limits[0]
    assert any(stamp in name for name in quality.rows())
    assert len(sample_quality(data[:5], data, **STAMP).limits) == 2  # fewer than dimensions
    alike = sample_quality(data, data, **STAMP)
    assert alike.frechet_distance < 1e-9 and alike.precision == alike.recall == 1
    again = sample_quality(normal(100, 6, seed=1), data, evaluations=35, **STAMP)
    assert again == quality
    with pytest.raises(ValueError, match="seeds is empty"):
        sample_quality(data, data, **STAMP | {"seeds": ""})
    many = replace(quality, num_samples=50_000)
    assert not many.limits and "not comparable" not in many.stamp


EVALUATE = """
import json, sys
import datasets, evaluate
images = datasets.load_from_disk(sys.argv[2])
module = evaluate.load(sys.argv[1], num_process=int(sys.argv[4]), process_id=int(sys.argv[5]), experiment_id="together")
mine = images["samples"][int(sys.argv[5])::int(sys.argv[4])]["image"]
for start in range(0, len(mine), 4):
    module.add_batch(predictions=mine[start : start + 4])
found = module.compute(
    data=images["data"]["image"], extractor=sys.argv[3], reference="data, train split", sampler="Heun, 18 steps", seeds="0 to 8"
)
print("FOUND" + json.dumps(found))
"""


def test_module_of_evaluate_works_offline_and_on_two_processes(models, tmp_path):
    """The same numbers as by the functions; with two processes, each of which has seen half of the samples."""
    import datasets

    samples, data = pixels(9, 3, 8, 8, seed=1), pixels(20, 3, 8, 8, seed=2)
    samples[4] = data[7]
    columns = {
        name: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]},
            features=datasets.Features({"image": datasets.Image()}),
        )
        for name, images in {"samples": samples, "data": data}.items()
    }
    datasets.DatasetDict(columns).save_to_disk(tmp_path / "images")
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    folder = models["resnet"][1]

    def together(processes):
        arguments = [sys.executable, "-c", EVALUATE, str(MODULE), str(tmp_path / "images"), str(folder), str(processes)]
        started = [
            subprocess.Popen([*arguments, str(rank)], env=environment, text=True, stdout=subprocess.PIPE)
            for rank in range(processes)
        ]
        outputs = [process.communicate(timeout=200)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes
        found = [json.loads(output.split("FOUND")[1].splitlines()[0]) for output in outputs]
        assert found[1:] == [None] * (processes - 1)
        return found[0]

    extractor = transformers_features(folder)
    stamp = {"reference": "data, train split", "sampler": "Heun, 18 steps", "seeds": "0 to 8"}
    expected = sample_quality(extractor(samples), extractor(data), extractor=extractor.name, **stamp)
    one, two = together(1), together(2)
    for found in (one, two):
        assert found["frechet_distance"] == pytest.approx(expected.frechet_distance, rel=1e-5)
        assert (found["precision"], found["recall"]) == (expected.precision, expected.recall)
        assert found["measured"] == expected.stamp and found["limits"] == expected.limits
        assert found["copies"] == pytest.approx(1 / 9)
