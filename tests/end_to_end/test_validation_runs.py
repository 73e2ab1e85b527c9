"""`--validation_split` of the training script."""

import json
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from tiny import TINY, launch, mistake, same, train, weights

# One process trains the run that most tests read from.
pytestmark = pytest.mark.xdist_group("validation")
VALIDATED = ["--validation_split", "train[33:]", "--validation_steps", 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of four steps, validated after every second, and its flags."""
    root = tmp_path_factory.mktemp("validated")
    (root / "net.json").write_text(json.dumps(TINY))
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(70)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": images, "label": [index % 2 for index in range(70)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "images.parquet")
    argv = [
        "--dataset_name", root / "images.parquet", "--split", "train[:33]", "--model_config", root / "net.json",
        "--output_dir", root / "run", "--train_batch_size", 4, "--num_samples", 2, "--num_inference_steps", 2,
        "--learning_rate", 1e-3, "--report_to", "none", "--max_train_steps", 4, "--checkpointing_steps", 2,
        "--lr_scheduler", "constant", "--lr_warmup_steps", 0,
    ]  # fmt: skip
    train([*argv, *VALIDATED])
    return root, argv


def records(folder):
    return json.loads((folder / "validation.json").read_text())


def test_what_is_left(finished):
    folder = finished[0] / "run"
    assert [record["step"] for record in records(folder)] == [2, 4]
    assert Image.open(folder / "samples" / "validation.png").size[0] > 300
    for record in records(folder):
        assert record["num_images"] == 33 and len(record["noise_levels"]) == 12
        for name in ("held_out_error", "training_error", "held_out_dsm_loss"):
            assert len(record[name]["by_level"]) == len(record[name]["standard_errors"]) == 12
            assert 0 < record[name]["standard_error"] < record[name]["mean"]


def test_it_changes_nothing_in_the_training(finished, tmp_path):
    train([*finished[1], "--output_dir", tmp_path / "run"])
    assert same(weights(finished[0] / "run"), weights(tmp_path / "run"))


@pytest.mark.parametrize("recorded", [0, 1])
def test_stopped_runs_catch_up(recorded, finished, tmp_path):
    """What was due at the checkpoint's step and did not happen is done first; what came after it comes again."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    whole = records(finished[0] / "run")
    (tmp_path / "run" / "validation.json").write_text(json.dumps(whole[:recorded] if recorded == 0 else whole))
    train([*finished[1], *VALIDATED, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"])
    assert records(tmp_path / "run") == whole


@pytest.mark.parametrize("shared", [False, True])
def test_two_processes_agree_with_one(shared, finished, tmp_path):
    """On a network that is as good as untrained, so that both have the same; 33 images are not for two alike."""
    argv = finished[1]
    argv = [*argv, *VALIDATED, "--learning_rate", 1e-12, "--max_train_steps", 2]
    train([*argv, "--output_dir", tmp_path / "one"])
    more = ["--share_reference"] if shared else []
    said = launch([*argv, *more, "--output_dir", tmp_path / "two"], processes=2)
    assert said.count("on held-out images,") == 1
    (one,), (two,) = records(tmp_path / "one"), records(tmp_path / "two")
    assert one["num_images"] == two["num_images"] == 33
    for name in ("held_out_error", "training_error", "held_out_dsm_loss"):
        assert one[name]["by_level"] == pytest.approx(two[name]["by_level"], rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        "--class_conditional --class_dropout 0.5 --random_flip",
        "--objective dsm --reorient 0.5 --noise_process ve",
        "--noise_process discrete --ddpm_num_steps 50 --reference_batch_size 8",
        "--noise_distribution adaptive --noise_process flow --reference bank --reference_device disk",
        "--mixed_precision bf16 --gradient_accumulation_steps 2 --image_memory_gb 1 --use_ema",
    ],
)
def test_with_other_flags(more, finished, tmp_path):
    train([*finished[1], *VALIDATED, *more.split(), "--max_train_steps", 2, "--output_dir", tmp_path / "run"])
    (record,) = records(tmp_path / "run")
    assert all(0 < value < 100 for value in record["held_out_error"]["by_level"])


def test_a_split_that_is_in_the_training(finished, tmp_path, capsys):
    argv = [*finished[1], "--output_dir", tmp_path / "run", "--validation_split", "train[:33]"]
    said = mistake(argv, capsys)
    assert "the images of --validation_split are training images" in said and not (tmp_path / "run").exists()
