"""The training script as its users run it: in process through `main(argv)`, and launched in processes of its own."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tiny import ROOT, accelerate_launch, launch, metadata, same, train, weights

# Every pair of values of (process, objective, accumulation, precision) occurs in some row.
PAIRWISE = [
    ("edm", "stf", 1, "no"),
    ("edm", "dsm", 4, "bf16"),
    ("ve", "stf", 4, "bf16"),
    ("ve", "dsm", 1, "no"),
    ("vp", "stf", 4, "no"),
    ("vp", "dsm", 1, "bf16"),
    ("flow", "stf", 1, "bf16"),
    ("flow", "dsm", 4, "no"),
]


@pytest.mark.parametrize(("process", "objective", "accumulation", "precision"), PAIRWISE)
def test_train_save_load_sample(process, objective, accumulation, precision, flags, tmp_path):
    train(
        flags("--noise_process", process, "--objective", objective, "--gradient_accumulation_steps", accumulation,
              "--mixed_precision", precision, "--random_flip", "--checkpointing_steps", 1, "--sample_steps", 1)
    )  # fmt: skip
    run = tmp_path / "run"
    state = torch.load(run / "checkpoint-2" / "scheduler.bin", weights_only=True)
    assert state["last_epoch"] == 2, "the schedule counts optimizer steps, not micro-batches"
    assert not same(weights(run), weights(run, "unet_raw"))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights(run).values())
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "noise_levels.png",
        "step-0000001.png",
        "step-0000002.png",
    ]
    assert not list(run.glob(".*")), "nothing that was being written is left"
    said = metadata(run)
    assert said["process"]["name"] == process
    assert said["objective"] == objective
    assert said["images_seen"] == 2 * accumulation * 4
    assert "num_inference_steps" in (run / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(batch_size=2, num_inference_steps=3, output_type="np").images).all()


def test_objectives_share_data_and_noise(flags, tmp_path):
    """At low noise the posterior is its source, so STF and DSM take the very same step."""
    low = ["--noise_process", "ve", "--sigma_min", 0.01, "--sigma_max", 0.02, "--max_train_steps", 1]
    train(flags(*low, "--objective", "stf"))
    train(flags(*low, "--objective", "dsm", "--output_dir", tmp_path / "dsm"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "dsm"))
    high = ["--noise_process", "ve", "--sigma_min", 5, "--sigma_max", 50, "--max_train_steps", 1]
    train(flags(*high, "--output_dir", tmp_path / "high-stf"))
    train(flags(*high, "--output_dir", tmp_path / "high-dsm", "--objective", "dsm"))
    assert not same(weights(tmp_path / "high-stf"), weights(tmp_path / "high-dsm"))


def largest_difference(left, right):
    left, right = weights(left), weights(right)
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("more", [[], ["--random_flip"], ["--class_conditional", "--random_flip"]])
def test_bank_in_memory_and_on_disk(more, flags, tmp_path, caplog):
    """Without a flag the references are a bank; in a file it is the same; a batch of all images without flips too."""
    caplog.set_level("INFO")

    def run(name, *options):
        caplog.clear()
        train(flags("--output_dir", tmp_path / name, "--max_train_steps", 5, *more, *options))
        return tmp_path / name

    default = run("default")
    count = 48 if "--random_flip" in more else 24
    assert f"n = {count} references, a bank of all images" in caplog.text
    assert re.search(r"Targets take 0\.\d+ of the \d+\.\d+ seconds of a step", caplog.text)
    said = metadata(default)
    assert (said["reference"], said["reference_batch_size"]) == ("bank", count)
    assert f"| references per target | {count} (all of the data) |" in (default / "README.md").read_text()
    disk = run("disk", "--reference", "bank", "--reference_device", "disk")
    assert same(weights(default), weights(disk))
    assert (disk / "reference_bank.safetensors").is_file()
    batch = run("batch", "--reference_batch_size", 24)
    assert "read with each batch" in caplog.text
    if not more:
        assert largest_difference(default, batch) < 1e-5
    else:
        assert largest_difference(default, batch) > 1e-5, "flips are in the bank, not in the batch"


@pytest.mark.parametrize("options", [["--reference", "bank"], ["--reference_batch_size", 22]], ids=["bank", "batch"])
def test_references_shared_by_two_processes(options, flags, tmp_path):
    options = [*options, "--max_train_steps", 4]
    said = launch(flags("--output_dir", tmp_path / "shared", *options, "--share_reference"), processes=2)
    assert said.count("Targets take") == 1, "said once, by the main process"
    assert ("a part on each process" if "bank" in options else "shared by all processes") in said
    if "bank" in options:
        launch(flags("--output_dir", tmp_path / "whole", *options), processes=2)
        assert largest_difference(tmp_path / "shared", tmp_path / "whole") < 1e-5


def test_images_cropped_at_random_have_no_bank(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "wide"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    options = ["--train_data_dir", folder, "--resolution", 8]
    for device in ([], ["--reference_device", "disk"]):
        with pytest.raises(ValueError, match=r"--center_crop"):
            train(flags(*options, "--reference", "bank", *device))
    assert not (tmp_path / "run").exists()
    train(flags(*options, "--reference", "bank", "--center_crop", "--reference_device", "disk"))
    assert "read with each batch" not in caplog.text
    train(flags(*options, "--output_dir", tmp_path / "default"))
    assert "read with each batch" in caplog.text


def test_two_processes_train_checkpoint_and_resume(flags, tmp_path):
    """gloo, 2 processes: one schedule step per optimizer step, own random states, and an exact resume."""
    more = ["--gradient_accumulation_steps", 2, "--mixed_precision", "bf16", "--checkpointing_steps", 2]
    said = accelerate_launch(flags(*more, "--max_train_steps", 3), processes=2)
    run = tmp_path / "run"
    assert "3 steps of 16 images; processes: 2." in said
    assert torch.load(run / "checkpoint-2" / "scheduler.bin", weights_only=True)["last_epoch"] == 2
    assert len(list((run / "checkpoint-2").glob("random_states_*.pkl"))) == 2
    ended = weights(run)
    shutil.rmtree(run / "checkpoint-3")
    said = launch(flags(*more, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"), processes=2)
    assert "Resumed after step 2" in said
    assert same(ended, weights(run))
    assert DiffusionPipeline.from_pretrained(run).unet.config.in_channels == 3


def test_default_command_on_digits(tmp_path):
    """No data, no network, no process named: the digits, by `accelerate launch`, logged to tensorboard."""
    run = tmp_path / "digits"
    said = accelerate_launch(
        ["--output_dir", run, "--max_train_steps", 3, "--num_samples", 2, "--num_inference_steps", 2]
    )
    assert "1797 images of (1, 12, 12)" in said
    assert list((run / "logs").rglob("events.out.tfevents*"))
    assert DiffusionPipeline.from_pretrained(run).unet.config.sample_size == 12


def test_logged_values(flags, tmp_path):
    """What is reported: loss, learning rate as applied, gradient norm, effective sample size, speed, data wait."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--report_to", "tensorboard", "--logging_steps", 1, "--max_train_steps", 4, "--lr_scheduler", "linear"]
    train(flags(*more, "--lr_warmup_steps", 2, "--gradient_accumulation_steps", 2, "--p_mean", 1.0))
    events = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "learning_rate", "gradient_norm", "images_per_second", "data_wait_share"} <= tags
    rates = [event.value for event in events.Scalars("learning_rate")]
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 5e-4], rtol=1e-6)
    sizes = {tag: events.Scalars(tag)[-1].value for tag in tags if tag.startswith("effective_sample_size/")}
    assert sizes and all(1 - 1e-5 <= size <= 24 + 1e-3 for size in sizes.values())
    assert {tag.replace("effective_sample_size", "variance_removed") for tag in sizes} <= tags
    assert "samples" in events.Tags()["images"]


@pytest.mark.parametrize("process", ["edm", "ve", "vp", "flow", "discrete"])
def test_noise_levels_are_drawn_from_the_distribution_asked_for(process, flags, tmp_path):
    """On every process: between 20 and 90 alone, which none draws by itself; said in the folder."""
    levels = {"name": "piecewise", "levels": [20.0, 90.0], "weights": [1.0]}
    (tmp_path / "levels.json").write_text(json.dumps(levels))
    train(flags("--noise_process", process, "--noise_distribution", tmp_path / "levels.json", "--max_train_steps", 4))
    reports = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {name for report in reports for name in report if name.startswith("loss/")}
    assert seen == {"loss/sigma_above_10"}
    assert metadata(tmp_path / "run")["noise_distribution"] == levels


@pytest.mark.parametrize("process", ["edm", "ve", "vp", "flow", "discrete"])
def test_noise_levels_move_to_where_the_error_is(process, flags, tmp_path):
    """On every process the pieces where the network does worse than on the average are drawn more often than at first."""
    train(
        flags(
            "--noise_process",
            process,
            "--noise_distribution",
            "adaptive",
            "--adaptive_power",
            1,
            "--max_train_steps",
            12,
        )
    )
    run = tmp_path / "run"
    _, rows = load_file(run / "checkpoint-12" / "noise_levels.safetensors")["sums"]
    assert 46 < rows.sum() <= 48, "12 steps of 4 images"
    settings = metadata(run)["noise_distribution"]
    assert settings == {"name": "adaptive", "power": 1, "floor": 0.25, "prior": None, "importance_weights": False}
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: [report[f"noise_level/percentile_{name}"] for report in reports] for name in (10, 50, 90)}
    assert all(0 < low < middle < high for low, middle, high in zip(*found.values(), strict=True))
    assert len(set(found[50])) > 1, "the levels have moved"
    assert (run / "samples" / "noise_distribution.png").is_file()


def test_sigma_data_is_measured(flags, tmp_path, caplog):
    train(flags("--sigma_data", 0.2))
    assert "more than 20 % from sigma_data = 0.2" in caplog.text
    caplog.clear()
    train(flags("--sigma_data", "auto", "--overwrite_output_dir"))
    assert "more than 20 %" not in caplog.text
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    # Two uniform bands of 100 levels around 60 and 180: between and within variance.
    expected = np.sqrt(60**2 + 100**2 / 12) / 127.5
    assert config["sigma_data"] == config["_stf"]["process"]["sigma_data"] == pytest.approx(expected, rel=0.05)


# The others' learning rates are followed step by step in test_right_numbers.py.
@pytest.mark.parametrize("schedule", ["cosine_with_restarts", "polynomial", "constant"])
def test_every_schedule_runs(schedule, flags):
    train(flags("--lr_scheduler", schedule, "--max_train_steps", 1))


def test_colour_images_become_grey_when_asked(flags, tmp_path):
    train(flags("--image_mode", "L", "--max_train_steps", 1))
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").unet.config.in_channels == 1


def test_cifar10_columns_are_found(flags, tmp_path):
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not beside the checkout")
    small = datasets.load_dataset(str(folder), split="train[:64]")
    assert small.column_names == ["img", "label"]
    small.to_parquet(tmp_path / "small.parquet")
    train([*flags()[2:], "--dataset_name", tmp_path / "small.parquet", "--class_conditional"])
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").unet.config.sample_size == 32


def test_images_that_are_not_kept_in_memory_give_the_same_run(flags, tmp_path, caplog):
    """Images that exceed the memory budget are read by workers."""
    caplog.set_level("INFO")
    train(flags())
    assert "kept in memory" in caplog.text
    caplog.clear()
    more = ["--image_memory_gb", 0, "--dataloader_num_workers", 2, "--output_dir", tmp_path / "read"]
    train(flags(*more))
    assert "made as they are read" in caplog.text
    assert same(weights(tmp_path / "run"), weights(tmp_path / "read"))


def test_sampling_and_saving_leave_the_weights_alone(flags, tmp_path):
    train(flags("--max_train_steps", 4))
    busy = ["--sample_steps", 1, "--checkpointing_steps", 1, "--logging_steps", 1]
    train(flags("--max_train_steps", 4, "--output_dir", tmp_path / "busy", *busy))
    for name in ("unet", "unet_raw"):
        assert same(weights(tmp_path / "run", name), weights(tmp_path / "busy", name))
