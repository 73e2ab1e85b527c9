"""`--eval_steps` of the training script and `examples/quality_report.py`."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import quality_report
from stf_diffusers.feature_extractors import transformers_features
from stf_diffusers.quality import sample_quality
from stf_diffusers.training import evaluation
from stf_diffusers.training.sampling import as_pixels
from tiny import TINY, generators, launch, same, tiny_autoencoder, train, weights

# One process trains the run that most tests read from.
pytestmark = pytest.mark.xdist_group("evaluations")

# Runs of a constant learning rate: one that is longer goes through the steps of a shorter one.
EVALUATED = ["--max_train_steps", 6, "--checkpointing_steps", 2, "--lr_scheduler", "constant", "--lr_warmup_steps", 0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder, extractor):
    """The folder of a run of six steps, evaluated after every second; with it its flags and its cache of features."""
    root = tmp_path_factory.mktemp("evaluated")
    (root / "net.json").write_text(json.dumps(TINY))
    argv = [
        "--train_data_dir", image_folder, "--model_config", root / "net.json", "--output_dir", root / "run",
        "--train_batch_size", 4, "--num_samples", 2, "--num_inference_steps", 2, "--learning_rate", 1e-3,
        "--report_to", "none", *EVALUATED, "--eval_steps", 2, "--eval_extractor", extractor, "--eval_num_samples", 7,
        "--cache_dir", root / "cache",
    ]  # fmt: skip
    train(argv)
    return root, argv


@pytest.fixture
def evaluated(finished, tmp_path):
    """Flags of the same run in `run`, to which a test adds its own."""
    return lambda *more: [*finished[1], "--output_dir", tmp_path / "run", *more]


@pytest.fixture
def stopped(finished, tmp_path):
    """That run as it was after step 4, copied to `run`; no evaluation has been recorded yet."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    for name in ("checkpoint-6", "best"):
        shutil.rmtree(tmp_path / "run" / name)
    for name in ("evaluations.json", "model_index.json"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


def records(folder):
    return json.loads((folder / "evaluations.json").read_text())


def test_evaluations_are_recorded_and_the_best_is_kept(finished, extractor, image_folder):
    run = finished[0] / "run"
    found = records(run)
    assert [record["step"] for record in found] == [2, 4, 6]
    best = json.loads((run / "best" / "evaluation.json").read_text())
    assert best == min(found, key=lambda record: record["frechet_distance"])
    assert "7 samples" in best["measured"] and f"24 of {image_folder.name}, training split" in best["measured"]
    assert best["limits"]
    kept = DiffusionPipeline.from_pretrained(run / "best")
    assert kept.scheduler.config["_stf"]["steps"] == best["step"]
    assert f"{best['frechet_distance']:.4g}" in (run / "best" / "README.md").read_text()
    # The last pipeline's card has its own numbers, and they are those of its images.
    assert f"{found[-1]['frechet_distance']:.4g}" in (run / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(run)
    images = [pipeline(generator=draw, num_inference_steps=2).images[0] for draw in generators(7)]
    features = transformers_features(extractor)
    data = torch.cat([as_pixels([Image.open(path)]) for path in sorted(image_folder.rglob("*.png"))])
    stamp = {"extractor": "x", "reference": "x", "sampler": "x", "seeds": "x"}
    expected = sample_quality(features(as_pixels(images)), features(data), **stamp)
    assert found[-1]["frechet_distance"] == pytest.approx(expected.frechet_distance, rel=1e-3)
    assert found[-1]["recall"] == expected.recall


def test_evaluation_changes_nothing_in_the_training(finished, flags, tmp_path):
    train(flags(*EVALUATED))
    assert same(weights(finished[0] / "run"), weights(tmp_path / "run"))


def test_stopped_runs_catch_up_on_evaluations(finished, stopped, evaluated):
    """What was due at the checkpoint's step and did not happen is done first; what came after it comes again."""
    whole = records(finished[0] / "run")
    # Killed between the checkpoint of step 4 and its evaluation.
    (stopped / "evaluations.json").write_text(json.dumps(whole[:1]))
    train(evaluated("--resume_from_checkpoint", "latest"))
    assert records(stopped) == whole


def test_a_run_that_dies_while_the_best_is_saved_comes_back_to_it(finished, stopped, evaluated, monkeypatch):
    """A full disk, after a first evaluation that went well."""
    save = evaluation.save_pipeline

    def full(*arguments, **keywords):
        save(*arguments, **keywords)
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluation, "save_pipeline", full)
    with pytest.raises(OSError, match="evaluation cannot be written"):
        train(evaluated("--resume_from_checkpoint", "latest"))
    assert not (stopped / "evaluations.json").exists()
    monkeypatch.setattr(evaluation, "save_pipeline", save)
    train(evaluated("--resume_from_checkpoint", "latest"))
    found = records(stopped)
    assert found == records(finished[0] / "run")[1:]
    best = json.loads((stopped / "best" / "evaluation.json").read_text())
    assert best == min(found, key=lambda record: record["frechet_distance"])


def test_the_best_of_another_run_is_no_rival_and_features_are_computed_once(finished, evaluated, tmp_path):
    """Of a run that left no checkpoint, in the same folder, measured alike."""
    root = finished[0]
    (cached,) = (root / "cache" / "stf_diffusers" / "features").rglob("*.safetensors")
    before = cached.stat().st_mtime_ns
    expected = (root / "run" / "best" / "evaluation.json").read_text()
    stale = json.loads(expected) | {"step": 1, "frechet_distance": 1e-9}
    (tmp_path / "run" / "best").mkdir(parents=True)
    for path in ("evaluations.json", "best/evaluation.json"):
        (tmp_path / "run" / path).write_text(json.dumps([stale] if path == "evaluations.json" else stale))
    train(evaluated())
    assert (tmp_path / "run" / "best" / "evaluation.json").read_text() == expected
    assert records(tmp_path / "run") == records(root / "run")
    assert cached.stat().st_mtime_ns == before


def test_overwriting_forgets_the_evaluations(stopped, finished, flags):
    shutil.copytree(finished[0] / "run" / "best", stopped / "best")
    shutil.copy(finished[0] / "run" / "evaluations.json", stopped)
    train(flags("--overwrite_output_dir"))
    assert not (stopped / "best").exists() and not (stopped / "evaluations.json").exists()


def test_two_processes_share_an_evaluation(evaluated, tmp_path):
    """Of the same network, so before any training moves them apart: a learning rate of nearly nothing."""
    still = ("--learning_rate", 1e-30, "--no-use_ema", "--max_train_steps", 2)
    for count in (1, 2):
        own = ["--output_dir", tmp_path / str(count), "--cache_dir", tmp_path / f"cache-{count}"]
        launch(evaluated(*still, *own), processes=count)
    found = [records(tmp_path / str(count)) for count in (1, 2)]
    for left, right in zip(*found, strict=True):
        assert left["measured"] == right["measured"]
        assert left["frechet_distance"] == pytest.approx(right["frechet_distance"], rel=1e-4)
    (features,) = (tmp_path / "cache-1" / "stf_diffusers" / "features").rglob("*.safetensors")
    (others,) = (tmp_path / "cache-2" / "stf_diffusers" / "features").rglob("*.safetensors")
    assert features.name == others.name
    assert features.read_bytes() == others.read_bytes()


@pytest.mark.parametrize(
    "mode",
    ["--class_conditional", "--class_conditional --reorient 0.5", "--reorient 0.5", "--vae {vae} --noise_process vp"],
)
def test_evaluations_in_other_modes(mode, evaluated, tmp_path):
    """The data are pixels in all of them, and orientations are no classes."""
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    train(evaluated("--max_train_steps", 2, *mode.format(vae=tmp_path / "vae").split()))
    (record,) = records(tmp_path / "run")
    assert "against 24 of" in record["measured"] and record["frechet_distance"] > 0


def test_labels_are_drawn_from_the_data(image_folder, extractor, evaluated, tmp_path, monkeypatch):
    """One image in four is dark: so are a quarter of the labels, where cycling through the classes would give a half."""
    folder = tmp_path / "uneven"
    shutil.copytree(image_folder, folder)
    for path in sorted((folder / "train" / "dark").glob("*.png"))[4:]:
        path.unlink()
    drawn = []
    sample = evaluation.sample_images
    monkeypatch.setattr(
        evaluation,
        "sample_images",
        lambda pipeline, indices, **how: (
            drawn.extend(map(how["label_of"], indices)) or sample(pipeline, indices, **how)
        ),
    )
    more = ["--class_conditional", "--train_data_dir", folder, "--eval_num_samples", 400, "--max_train_steps", 2]
    train(evaluated(*more))
    # 0 is bright. Four standard errors of a share of 1/4 among 400.
    assert abs(np.mean(drawn) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def samples_folder(folder, data, copies):
    """Noise, and some of the data with a little noise on it."""
    rng = np.random.default_rng(5)
    (folder / "images").mkdir(parents=True)
    for index in range(12):
        image = rng.integers(0, 256, data[0].shape)
        if index in copies:
            image = np.clip(data[copies[index]].astype(int) + rng.integers(-3, 4, image.shape), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{index:06d}.png")


def test_few_steps_are_reported_with_their_levels(tmp_path):
    samples_folder(tmp_path, [np.zeros((8, 8), np.uint8)], {})
    settings = {
        "num_inference_steps": 3,
        "seed": 0,
        "solver": "consistency",
        "guidance_scale": 1.0,
        "class_label": None,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"sigmas": [2.0, 0.5]}))
    _, found = quality_report.find_samples(argparse.Namespace(samples=tmp_path))
    assert found == {"sampler": "consistency, 3 steps over 2, 0.5", "evaluations": 3, "seeds": "0 to 11"}


def test_report_names_planted_copies_and_only_them(image_folder, extractor, tmp_path, capsys):
    data = [np.asarray(Image.open(path)) for path in sorted(image_folder.rglob("*.png"))]
    samples_folder(tmp_path / "samples", data, {2: 5, 7: 20})
    settings = {"num_inference_steps": 18, "seed": 3, "solver": "heun", "guidance_scale": 1.0, "class_label": None}
    (tmp_path / "samples" / "settings.json").write_text(json.dumps(settings))
    argv = ["--samples", tmp_path / "samples", "--train_data_dir", image_folder, "--extractor", extractor]
    argv += ["--output_dir", tmp_path / "report", "--cache_dir", tmp_path / "cache"]
    quality_report.main([str(part) for part in argv])
    found = json.loads((tmp_path / "report" / "quality.json").read_text())
    assert found["copies"] == ["000002.png", "000007.png"]
    assert (found["sampler"], found["evaluations"], found["seeds"]) == ("heun, 18 steps", 35, "3 to 14")
    first, second = sorted(found["nearest"][:2], key=lambda pair: pair["sample"])
    assert (first["training_image"], second["training_image"]) == (5, 20) and not first["mirrored"]
    assert found["ratio_quantiles"]["0.0"] == min(first["ratio"], second["ratio"]) < 1 / 3
    text = (tmp_path / "report" / "quality.md").read_text()
    assert "2 of 12 samples" in text and "not comparable" in text and "12 samples (heun, 18 steps" in text
    # Pairs of the samples with the least ratios come first: those that were planted.
    picture = np.asarray(Image.open(tmp_path / "report" / "memorization.png"))[::8, ::8]
    shown = [picture[1:9, 1 + 10 * place : 9 + 10 * place] for place in range(2)]
    below = [picture[9:17, 1 + 10 * place : 9 + 10 * place] for place in range(2)]
    assert {bytes(image.tobytes()) for image in below} == {data[5].tobytes(), data[20].tobytes()}
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 3 for a, b in zip(shown, below, strict=True))
    # A copy of a mirrored image is one where the training mirrored them.
    mirrored = [image[:, ::-1] for image in data]
    samples_folder(tmp_path / "mirrored", mirrored, {1: 4})
    argv[1], plain = tmp_path / "mirrored", ["--sampler", "s", "--seeds", "0"]
    for more, copies in (([], []), (["--random_flip"], ["000001.png"])):
        quality_report.main([str(part) for part in [*argv, *plain, *more]])
        found = json.loads((tmp_path / "report" / "quality.json").read_text())
        assert found["copies"] == copies
    assert found["nearest"][0] | {"ratio": 0} == {
        "sample": "000001.png", "training_image": 4, "mirrored": True, "ratio": 0,
    }  # fmt: skip


def test_wrong_input_to_the_report(image_folder, extractor, tmp_path):
    base = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "report"]

    def report(*more):
        quality_report.main([str(part) for part in (*base, *more)])

    with pytest.raises(ValueError, match="0 images found"):
        report("--samples", tmp_path, "--extractor", extractor)
    with pytest.raises(SystemExit):
        report("--samples", tmp_path)
    samples_folder(tmp_path / "samples", [np.zeros((8, 8, 3), dtype=np.uint8)], {})
    with pytest.raises(ValueError, match="--sampler and --seeds"):
        report("--samples", tmp_path / "samples", "--extractor", extractor)
    Image.new("RGB", (8, 9)).save(tmp_path / "samples" / "images" / "x.png")
    with pytest.raises(ValueError, match="alike in size"):
        report("--samples", tmp_path / "samples", "--extractor", extractor, "--sampler", "s", "--seeds", "0")
    assert not (tmp_path / "report").exists()
