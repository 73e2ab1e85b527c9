"""Runs on a stream: what they reach, an exact resume, two processes, and a broken image on the way."""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from tiny import launch, metadata, same, train, weights


@pytest.fixture
def flags(flags):
    return lambda *more: flags("--streaming", "--max_train_steps", 4, "--lr_scheduler", "constant", *more)


def test_trains_resumes_and_matches_what_is_not_interrupted(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    more = ["--reference_batch_size", 9, "--random_flip", "--class_conditional", "--class_dropout", 0.3]
    more += ["--checkpointing_steps", 2]
    train(flags(*more, "--max_train_steps", 9))
    assert (
        "n = 9 references, the buffer of the stream" in caplog.text and "a stream of images of (3, 8, 8)" in caplog.text
    )
    train(flags(*more, "--max_train_steps", 4, "--output_dir", tmp_path / "stopped"))
    argv = [*more, "--output_dir", tmp_path / "stopped", "--resume_from_checkpoint", "latest"]
    train(flags(*argv, "--max_train_steps", 9))
    assert same(weights(tmp_path / "run", "unet_raw"), weights(tmp_path / "stopped", "unet_raw"))
    said = metadata(tmp_path / "run")
    assert said["reference"] == "stream" and said["reference_batch_size"] == 9


def test_two_processes(flags, image_folder, tmp_path):
    """One noise process and one buffer size, measured on the images of both; and an exact resume."""
    more = ["--sigma_data", "auto", "--checkpointing_steps", 2]
    output = launch(flags(*more), processes=2)
    assert "n = 12 references, the buffer of the stream" in output
    levels = np.concatenate([np.asarray(Image.open(path)).ravel() for path in image_folder.rglob("*.png")])
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert config["sigma_data"] == pytest.approx(np.std(levels / 127.5 - 1), abs=1e-4)
    ended = weights(tmp_path / "run", "unet_raw")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert "Resumed after step 2" in launch(flags(*more, "--resume_from_checkpoint", "latest"), processes=2)
    assert same(ended, weights(tmp_path / "run", "unet_raw"))


def test_a_broken_image_late_in_the_stream_is_named(flags, tmp_path):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}} for _ in range(30)]
    rows[25]["image"]["bytes"] = b"no image"
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"image 25 cannot be decoded: .* Repair it or leave it out"):
        train(
            [
                *flags()[2:],
                "--dataset_name",
                tmp_path / "data.parquet",
                "--reference_batch_size",
                8,
                "--max_train_steps",
                20,
            ]
        )
