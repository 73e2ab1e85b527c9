"""The first hour of a user: several processes, Ctrl-C, a second run in the same folder, what a run leaves to look at."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from diffusers import DiffusionPipeline

from stf_diffusers.training.run_folder import METRICS
from tiny import CPU, EXAMPLES, ROOT, Processes, metadata, run_as_script, same, train, weights

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
TRAINER = str(EXAMPLES / "train_unconditional_stf.py")


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


LAUNCHES = {
    "--cpu": (["--cpu", "--num_processes", "2"], "was given several processes"),
    "--multi_gpu without a GPU": (["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"], "announced 2 processes"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHES)
def test_processes_that_would_train_alone_are_refused(case, flags, tmp_path):
    launch, message = LAUNCHES[case]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [*LAUNCH, *launch, TRAINER, *flags()], env=environment | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stdout and "ACCELERATE_USE_CPU=true" in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_what_can_be_sampled_and_continued(flags, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    argv = flags(
        "--max_train_steps", 400, "--checkpointing_steps", 1000, "--logging_steps", 1, "--lr_scheduler", "constant"
    )
    started = Processes(run_as_script, argv)
    wait_for(lambda: (run / METRICS).is_file() and len((run / METRICS).read_text().splitlines()) > 2)
    # While it runs, nobody else may use the folder.
    with pytest.raises(ValueError, match="another run is at work"):
        train([*argv, "--overwrite_output_dir"])
    os.kill(started.members[0].pid, signal.SIGINT)
    codes, said = started.wait(60)
    assert codes == [75] and "can be sampled" in said, said[-2000:]
    pipe = DiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(batch_size=2, num_inference_steps=2).images) == 2
    (checkpoint,) = run.glob("checkpoint-*")
    stopped = int(checkpoint.name.split("-")[1])
    assert metadata(run)["steps"] == stopped
    more = ["--max_train_steps", str(stopped + 2)]
    train([*argv, *more, "--resume_from_checkpoint", "latest"])
    train([*argv, *more, "--output_dir", str(whole)])
    assert same(weights(run), weights(whole))
    # What was logged continues too: each step once, and the same numbers.
    left, right = ([json.loads(line) for line in (path / METRICS).read_text().splitlines()] for path in (run, whole))
    assert [line["step"] for line in left] == [line["step"] for line in right] == list(range(1, stopped + 3))
    assert [line["loss"] for line in left] == [line["loss"] for line in right]
    assert (run / "samples" / "noise_levels.png").is_file() and not (run / ".run.lock").exists()


def test_any_checkpoint_becomes_a_pipeline(flags, tmp_path):
    """The command of the docs: resume with no step left to do."""
    constant = ["--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    train(flags(*constant, "--max_train_steps", 3))
    train(flags(*constant, "--max_train_steps", 2, "--output_dir", tmp_path / "two"))
    older = ["--resume_from_checkpoint", tmp_path / "run" / "checkpoint-2", "--output_dir", tmp_path / "elsewhere"]
    train(flags(*constant, "--max_train_steps", 1, *older))
    for name in ("unet", "unet_raw"):
        assert same(weights(tmp_path / "two", name), weights(tmp_path / "elsewhere", name))
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "model_index.json").unlink()
    train(flags(*constant, "--max_train_steps", 1, "--resume_from_checkpoint", "latest"))
    assert same(weights(tmp_path / "run"), before)


def test_a_second_ctrl_c_stops_at_once(flags, tmp_path):
    """The first waits for the end of a step, which does not come: the loader of the data sleeps."""
    program = """
import os, signal, sys, time
from stf_diffusers.training.stop_signal import StopSignal
with StopSignal() as stop:
    stop.defer()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.agreed()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=50)
    assert done.returncode == 75


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_the_end_of_the_launcher_stops_the_training(flags, tmp_path):
    run = tmp_path / "run"
    argv = flags("--max_train_steps", 4000, "--checkpointing_steps", 100000, "--logging_steps", 1)
    launcher = subprocess.Popen(
        [*LAUNCH, "--num_processes", "1", TRAINER, *argv], env=os.environ | CPU, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: (run / METRICS).is_file() and (run / METRICS).read_text().count("\n") > 1)
    holder = int((run / ".run.lock").read_text().split()[1])
    launcher.terminate()
    launcher.wait(30)
    wait_for(lambda: not alive(holder), 60)
    assert list(run.glob("checkpoint-*")) and (run / "model_index.json").is_file()


def test_sigma_data_is_measured_and_a_run_keeps_what_it_began_with(flags, tmp_path, caplog):
    train(flags("--max_train_steps", 1, "--checkpointing_steps", 1))
    measured = metadata(tmp_path / "run")["process"]["sigma_data"]
    assert 0.2 < measured < 0.8 and measured != 0.5
    # As a run before sigma_data was measured: 0.5, and no flag.
    other = ["--output_dir", tmp_path / "other"]
    train(flags("--max_train_steps", 1, "--checkpointing_steps", 1, *other, "--sigma_data", 0.5))
    train(flags("--max_train_steps", 2, *other, "--resume_from_checkpoint", "latest"))
    assert metadata(tmp_path / "other")["process"]["sigma_data"] == 0.5


def test_settings_without_effect_are_said(flags, caplog):
    train(flags("--max_train_steps", 1, "--lr_warmup_steps", 5, "--sample_steps", 9, "--num_epochs", 3))
    for flag in ("--lr_warmup_steps 5 of 1", "--sample_steps 9 has no effect", "--num_epochs has no effect"):
        assert flag in caplog.text


def test_epochs_of_grids_and_pipelines(flags, tmp_path):
    """24 images in batches of 4: six steps an epoch."""
    train(flags("--max_train_steps", 13, "--save_images_epochs", 1, "--save_model_epochs", 2, "--eval_batch_size", 1))
    grids = {path.name for path in (tmp_path / "run" / "samples").glob("step-*.png")}
    assert grids == {f"step-{step:07d}.png" for step in (6, 12, 13)}
    assert (tmp_path / "run" / "checkpoint-12").is_dir()
