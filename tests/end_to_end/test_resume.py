"""Runs that go on from a checkpoint, and those that are refused: of another run, damaged, or in the way of one."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny import TINY, Trap, accelerate_launch, launch, metadata, same, tiny_autoencoder, train, weights


def test_resumed_run_ends_like_an_uninterrupted_one(flags, tmp_path):
    """Bit for bit, with dropout, flips, accumulation and the data's second epoch (6 batches each)."""
    more = ["--gradient_accumulation_steps", 2, "--random_flip", "--max_train_steps", 5, "--checkpointing_steps", 2]
    train(flags(*more))
    whole = tmp_path / "run"
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    shutil.copytree(whole / "checkpoint-2", interrupted / "checkpoint-2")
    train(flags(*more, "--output_dir", interrupted, "--resume_from_checkpoint", "latest"))
    for name in ("unet", "unet_raw"):
        assert same(weights(whole, name), weights(interrupted, name))


def test_noise_levels_resume_bit_for_bit_and_no_others(flags, tmp_path):
    drawn = ["--noise_distribution", "log_normal", "--noise_mean", 0.4, "--lr_scheduler", "constant"]
    train(flags(*drawn, "--checkpointing_steps", 2))
    resumed = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    for other in ([], ["--noise_distribution", "log_normal", "--noise_mean", 0.5]):
        with pytest.raises(ValueError, match=r"belongs to another run: noise_distribution"):
            train(flags("--lr_scheduler", "constant", *other, *resumed))
    train(flags(*drawn, *resumed))
    train(flags(*drawn, "--max_train_steps", 4, "--output_dir", tmp_path / "whole"))
    assert same(weights(tmp_path / "run", "unet_raw"), weights(tmp_path / "whole", "unet_raw"))


def test_noise_levels_of_the_data_are_the_same_on_all_processes_and_resumed(flags, tmp_path):
    profile = ["--noise_distribution", "profile", "--lr_scheduler", "constant", "--checkpointing_steps", 2]
    train(flags(*profile, "--max_train_steps", 4))
    run = tmp_path / "run"
    levels = metadata(run)["noise_distribution"]
    assert levels["name"] == "piecewise" and max(levels["weights"]) > 0
    (tmp_path / "half").mkdir()
    shutil.copytree(run / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    resumed = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    train(flags(*profile, *resumed, "--output_dir", tmp_path / "half"))
    assert same(weights(run, "unet_raw"), weights(tmp_path / "half", "unet_raw"))
    accelerate_launch(flags(*profile, "--output_dir", tmp_path / "two"), processes=2)
    assert metadata(tmp_path / "two")["noise_distribution"] == levels


ADAPTIVE = ["--noise_distribution", "adaptive", "--adaptive_power", 2, "--lr_scheduler", "constant"]


@pytest.mark.parametrize("more", [[], ["--importance_weights"], ["--objective", "dsm"], ["--reference_batch_size", 8]])
def test_adapted_noise_levels_resume_bit_for_bit(more, flags, tmp_path):
    """The errors that were seen, and the measured variance of the targets, go on where they were."""
    run, half = tmp_path / "run", tmp_path / "half"
    adaptive = [*ADAPTIVE, *more, "--checkpointing_steps", 2, "--max_train_steps", 5]
    train(flags(*adaptive))
    half.mkdir()
    shutil.copytree(run / "checkpoint-2", half / "checkpoint-2")
    train(flags(*adaptive, "--resume_from_checkpoint", "latest", "--output_dir", half))
    assert same(weights(run, "unet_raw"), weights(half, "unet_raw"))
    states = [load_file(folder / "checkpoint-5" / "noise_levels.safetensors") for folder in (run, half)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("sums", "floor_levels", "floor_values"))
    assert len(states[0]["floor_levels"]) == (0 if more in ([], ["--importance_weights"]) else 31)
    with pytest.raises(ValueError, match=r"belongs to another run: noise_distribution"):
        train(flags(*adaptive, "--adaptive_floor", 0.5, "--resume_from_checkpoint", "latest"))


def test_the_variance_is_measured_once_for_all_processes(flags):
    said = launch(
        flags(*ADAPTIVE, "--objective", "dsm", "--max_train_steps", 2, "--reference_memory_gb", 1), processes=2
    )
    assert "processes: 2." in said


def test_adapted_noise_levels_are_the_same_on_all_processes(flags, tmp_path):
    """Two processes of half the batch see as many rows as one, and go on from one table."""
    adaptive = [*ADAPTIVE, "--max_train_steps", 4, "--train_batch_size", 4]
    accelerate_launch(flags(*adaptive), processes=2)
    state = load_file(tmp_path / "run" / "checkpoint-4" / "noise_levels.safetensors")
    rows = state["sums"][1].sum().item()
    assert 30 < rows <= 32, "four steps of two processes of four images, a little less by the exponential average"
    # A process with a table of its own would draw other levels, and after resuming from the one that is saved end elsewhere.
    half = tmp_path / "half"
    accelerate_launch(flags(*adaptive, "--checkpointing_steps", 2, "--output_dir", half), processes=2)
    shutil.rmtree(half / "checkpoint-4")
    accelerate_launch(flags(*adaptive, "--resume_from_checkpoint", "latest", "--output_dir", half), processes=2)
    assert same(weights(tmp_path / "run", "unet_raw"), weights(half, "unet_raw"))


def test_latent_runs_resume_bit_for_bit(flags, tmp_path):
    """Drawn latents and mirrored images too; the latents are encoded once."""
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    more = ["--vae", tmp_path / "vae", "--random_flip", "--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    train(flags(*more))
    (cache,) = (tmp_path / "run").glob("latents-*.safetensors")
    encoded = cache.stat()
    train(flags(*more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"))
    assert cache.stat().st_mtime_ns == encoded.st_mtime_ns
    train(flags(*more, "--max_train_steps", 4, "--output_dir", tmp_path / "whole"))
    assert same(weights(tmp_path / "run", "unet_raw"), weights(tmp_path / "whole", "unet_raw"))


def test_a_refused_run_replaces_no_latents(flags, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    more = ["--vae", tmp_path / "vae", "--noise_process", "vp"]
    train(flags(*more))
    (cache,) = (tmp_path / "run").glob("latents-*.safetensors")
    with pytest.raises(ValueError, match="belongs to another run"):
        train(flags(*more, "--random_flip", "--resume_from_checkpoint", "latest"))
    assert cache.exists()
    train(flags(*more, "--resume_from_checkpoint", "latest", "--max_train_steps", 3))
    assert list((tmp_path / "run").glob("latents-*.safetensors")) == [cache]
    assert str(tmp_path) not in (tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text()


def test_what_may_change_on_resuming_is_said(flags, tmp_path, caplog):
    argv = flags("--checkpointing_steps", 1, "--lr_scheduler", "linear")
    train(argv)
    (tmp_path / "net.json").write_text(json.dumps({**TINY, "dropout": 0.3}))
    caplog.clear()
    train([*argv, "--resume_from_checkpoint", "latest", "--max_train_steps", 3, "--mixed_precision", "bf16"])
    assert "mixed_precision (no there, bf16 now)" in caplog.text and "dropout (0.1 there, 0.3 now)" in caplog.text
    assert "steps_of_schedule (2 there, 3 now)" in caplog.text and "will not end like" in caplog.text
    caplog.clear()
    before = weights(tmp_path / "run")
    again = ["--resume_from_checkpoint", "latest", "--mixed_precision", "bf16", "--lr_scheduler", "linear"]
    train(flags("--max_train_steps", 2, *again))
    assert "All 2 steps are done" in caplog.text
    assert same(before, weights(tmp_path / "run"))


def test_rotation_keeps_the_newest(flags, tmp_path):
    train(flags("--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_resuming_behind_later_checkpoints_is_refused(flags, tmp_path):
    """Rotation and `latest` would take an abandoned branch's checkpoints for the newest."""
    train(flags("--max_train_steps", 3, "--checkpointing_steps", 1))
    with pytest.raises(ValueError, match="later checkpoints than checkpoint-1: checkpoint-2, checkpoint-3"):
        train(flags("--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-1"))
    (tmp_path / "run" / "checkpoint-notes").mkdir()
    (tmp_path / "run" / "checkpoint-notes" / "training_state.json").write_text("{}")
    older = tmp_path / "run" / "checkpoint-1"
    train(flags("--resume_from_checkpoint", older, "--output_dir", tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model_index.json").exists()


def test_a_checkpoint_from_elsewhere_needs_a_folder_without_any(flags, tmp_path):
    train(flags("--checkpointing_steps", 1))
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-1")
    from_there = ["--checkpointing_steps", 1, "--resume_from_checkpoint", tmp_path / "elsewhere" / "checkpoint-1"]
    with pytest.raises(ValueError, match="holds checkpoints of its own"):
        train(flags(*from_there))
    train(flags(*from_there, "--output_dir", tmp_path / "new"))
    assert (tmp_path / "new" / "checkpoint-2").is_dir()


def test_a_trained_folder_is_not_overwritten_unasked(flags, tmp_path):
    train(flags("--max_train_steps", 1))
    before = weights(tmp_path / "run")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        train(flags("--max_train_steps", 1, "--seed", 1))
    assert same(before, weights(tmp_path / "run"))
    train(flags("--max_train_steps", 1, "--seed", 1, "--overwrite_output_dir"))
    assert not same(before, weights(tmp_path / "run"))


def test_an_overwriting_run_that_cannot_start_loses_nothing(flags, tmp_path):
    train(flags("--checkpointing_steps", 1))
    (tmp_path / "run" / "logs").write_text("in the way of the tracker")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"tracker does not start: .*logs.* --report_to none"):
        train(flags("--checkpointing_steps", 1, "--overwrite_output_dir", "--report_to", "tensorboard"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_another_run_is_refused(flags, image_folder, tmp_path):
    train(flags("--checkpointing_steps", 1))
    # As many images, of the same shape, but others.
    shutil.copytree(image_folder, tmp_path / "other")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(next((tmp_path / "other").rglob("00.png")))
    others = {
        ("--train_batch_size", 2): "train_batch_size",
        ("--learning_rate", 1e-2): "learning_rate",
        ("--resolution", 16): "image_shape",
        ("--image_mode", "L"): "image_shape",
        ("--seed", 1): "seed",
        ("--class_conditional",): "num_classes",
        ("--objective", "dsm"): "objective",
        ("--noise_process", "vp"): "process",
        ("--random_flip",): "random_flip",
        ("--train_data_dir", tmp_path / "other"): "data_digest",
    }
    for other, name in others.items():
        with pytest.raises(ValueError, match=rf"belongs to another run: (.*; )?{name} \("):
            train(flags("--resume_from_checkpoint", "latest", *other))


@pytest.fixture
def checkpoint(flags, tmp_path):
    """The last checkpoint of a run."""
    train(flags("--checkpointing_steps", 1))
    return tmp_path / "run" / "checkpoint-2"


DAMAGES = {
    "cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
    "without averages": lambda folder: (folder / "ema.safetensors").unlink(),
    "without optimizer": lambda folder: (folder / "optimizer.bin").unlink(),
    "garbled manifest": lambda folder: (folder / "training_state.json").write_text("{garb"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints_are_named(case, checkpoint, flags):
    DAMAGES[case](checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-2.*damaged.*(Delete|delete)"):
        train(flags("--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"))


@pytest.mark.parametrize("file", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_a_checkpoint_with_a_trap_is_not_sprung(file, checkpoint, flags, tmp_path):
    torch.save(Trap(tmp_path / "sprung"), checkpoint / file)
    # Accelerate goes on without random states that it cannot read. The script does not need them.
    refused = pytest.raises(ValueError, match="cannot be loaded: it is damaged")
    with nullcontext() if file.startswith("random") else refused:
        train(flags("--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"))
    assert not (tmp_path / "sprung").exists()
    torch.load(checkpoint / file, weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap works where it is loaded as a pickle"


def test_references_stay_those_of_the_run(flags, tmp_path, caplog):
    """Where they were chosen by the memory that was free; asked for otherwise they are refused, as before."""
    caplog.set_level("INFO")
    begun = ["--max_train_steps", 2, "--reference_memory_gb", 1e-9]
    train(flags(*begun))
    caplog.clear()
    train(flags("--max_train_steps", 3, "--resume_from_checkpoint", "latest"))
    assert "read with each batch" in caplog.text and "Resumed after step" in caplog.text
    with pytest.raises(ValueError, match="reference"):
        train(flags("--max_train_steps", 4, "--resume_from_checkpoint", "latest", "--reference", "bank"))


@pytest.mark.parametrize(
    "begun",
    [["log_normal", "--noise_mean", 0.4], ["adaptive"], ["log_uniform"], ["a file"]],
    ids=lambda begun: begun[0],
)
def test_a_profile_does_not_take_over_other_noise_levels(begun, flags, tmp_path):
    if begun == ["a file"]:
        (tmp_path / "levels.json").write_text('{"name": "piecewise", "levels": [0.1, 1, 10], "weights": [1, 2]}')
        begun = [str(tmp_path / "levels.json")]
    train(flags("--noise_distribution", *begun))
    with pytest.raises(ValueError, match=r"belongs to another run: noise_distribution.* noise_profile"):
        train(flags("--noise_distribution", "profile", "--resume_from_checkpoint", "latest", "--max_train_steps", 3))
