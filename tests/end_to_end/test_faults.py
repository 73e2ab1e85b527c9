"""Runs that are killed, stopped, starved of disk space or bereft of a process: real processes, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import kill_and_resume
import pytest
from accelerate.state import AcceleratorState, GradientState
from test_training import TINY, same, weights

import train_unconditional_stf as script
from conftest import EXAMPLES, ROOT

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture
def flags(tmp_path, image_folder):
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    base = [
        "--train_data_dir", image_folder, "--model_config", tmp_path / "net.json", "--train_batch_size", 4,
        "--num_samples", 1, "--num_inference_steps", 2, "--report_to", "none", "--lr_scheduler", "constant",
    ]  # fmt: skip
    return lambda *more: [str(flag) for flag in (*base, *more)]


def start(argv, *, processes=1):
    """The script in processes of its own; what it says goes to a pipe."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port"]
        command += [str(31500 + os.getpid() % 1000)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, str(EXAMPLES / "train_unconditional_stf.py"), *argv], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition, process, limit=90):
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run ended or hangs before what is waited for"
        time.sleep(0.02)


def children(pid):
    """Processes started by `pid`."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 3)])
def test_killed_at_random_moments(processes, kills, tmp_path):
    """A sample of what benchmarks/kill_and_resume.py does at length."""
    counts = kill_and_resume.trial(kills, seed=1, folder=tmp_path, world=processes)
    assert counts["kills"] >= kills


def test_a_signal_before_the_first_step(flags, tmp_path):
    """There is nothing to save: the run ends at once, and the scheduler can requeue it."""
    process = start(flags("--output_dir", tmp_path / "run", "--max_train_steps", 400))
    usr1 = 1 << signal.SIGUSR1 - 1

    def catches():
        with open(f"/proc/{process.pid}/status") as status:
            return any(int(line.split()[1], 16) & usr1 for line in status if line.startswith("SigCgt"))

    wait_for(catches, process)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output[-2000:]
    assert not list(tmp_path.glob("run/checkpoint-*"))


# The tracker's own thread dies of it too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_fails_midway_is_said_and_survived(small_disk, flags, tmp_path, caplog):
    """Its log folder is full after a moment."""
    logs = small_disk(16)
    argv = flags("--max_train_steps", 300, "--logging_steps", 1, "--report_to", "tensorboard", "--logging_dir", logs)
    train([*argv, "--output_dir", str(tmp_path / "run")])
    assert "The tracker failed, and the training goes on" in caplog.text
    train([*argv, "--output_dir", str(tmp_path / "untracked"), "--report_to", "none"])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "untracked"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_to_be_requeued(number, flags, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    argv = flags("--output_dir", run, "--max_train_steps", 400, "--checkpointing_steps", 1000, "--random_flip")
    process = start([*argv, "--sample_steps", "1"])
    wait_for(lambda: (run / "samples" / "step-0000002.png").exists(), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output[-2000:]
    saved = [path.name for path in run.glob("checkpoint-*")]
    assert len(saved) == 1 and "--resume_from_checkpoint latest continues" in output
    stopped = int(saved[0].split("-")[1])
    steps = ["--max_train_steps", str(stopped + 3)]
    train([*argv, *steps, "--resume_from_checkpoint", "latest"])
    train([*argv, *steps, "--output_dir", str(whole)])
    assert same(weights(run), weights(whole)) and same(weights(run, "unet_raw"), weights(whole, "unet_raw"))


def test_a_signal_to_one_process_stops_both(flags, tmp_path):
    run = tmp_path / "run"
    argv = flags("--output_dir", run, "--max_train_steps", 400, "--checkpointing_steps", 1000, "--sample_steps", 1)
    process = start(argv, processes=2)
    wait_for(lambda: (run / "samples" / "step-0000002.png").exists(), process)
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    output = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "Stopped by a signal after step" in output, output[-2000:]
    (saved,) = run.glob("checkpoint-*")
    assert len(list(saved.glob("random_states_*.pkl"))) == 2, "both processes saved"


def test_one_of_two_processes_dies(flags, tmp_path):
    run = tmp_path / "run"
    argv = flags("--output_dir", run, "--max_train_steps", 4000, "--checkpointing_steps", 1)
    process = start(argv, processes=2)
    wait_for(lambda: (run / "checkpoint-2" / "training_state.json").exists(), process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Signal 9" in output, output[-2000:]
    assert time.monotonic() - began < 90, "the other does not wait for ever"


def test_a_worker_of_the_loader_dies(flags, tmp_path):
    run = tmp_path / "run"
    argv = flags(
        "--output_dir", run, "--max_train_steps", 100000, "--checkpointing_steps", 1, "--dataloader_num_workers", 1
    )
    process = start([*argv, "--checkpoints_total_limit", "1"])
    wait_for(lambda: any(run.glob("checkpoint-*/training_state.json")), process)
    workers = children(process.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=90)[0]
    assert process.returncode not in (0, None) and "DataLoader worker" in output, output[-2000:]
    assert any(run.glob("checkpoint-*/training_state.json"))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts of a given size; skipped where mounting is not allowed."""
    mounted = []

    def mount(kibibytes):
        folder = tmp_path / f"disk-{kibibytes}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("cannot mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_at_each_write(small_disk, flags, tmp_path):
    """From a disk too small for anything to one that takes all: a message, no half-written file taken for a whole one."""
    whole = tmp_path / "whole"
    argv = flags("--max_train_steps", 3, "--checkpointing_steps", 1, "--random_flip")
    train([*argv, "--output_dir", str(whole)])
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024
    ended = []
    for kibibytes in sorted({4, *(needed * share // 12 for share in range(1, 19))}):
        run = small_disk(max(kibibytes, 4)) / "run"
        try:
            train([*argv, "--output_dir", str(run)])
            ended.append("done")
        except OSError as error:
            assert "MiB are free" in str(error) or "No space left" in str(error)
            ended.append("full")
        for path in run.glob("checkpoint-*"):
            if (path / "training_state.json").is_file():
                assert same_files(path, whole / path.name)
        if (run / "model_index.json").is_file():
            assert same(weights(run), weights(whole))
    assert ended[0] == "full" and ended[-1] == "done" and ended.count("full") > 5


def same_files(left, right):
    names = [path.name for path in right.iterdir() if path.suffix in (".safetensors", ".bin", ".json")]
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_the_run_goes_on_with_space(small_disk, flags, tmp_path):
    disk = small_disk(4000)
    run, filler = disk / "run", disk / "filler"
    argv = flags("--output_dir", run, "--checkpointing_steps", 1)
    train([*argv, "--max_train_steps", "2"])
    before = weights(run)
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 20_000))
    with pytest.raises(OSError, match=r"checkpoint of step 3 cannot be written .* make room"):
        train([*argv, "--max_train_steps", "4", "--resume_from_checkpoint", "latest"])
    assert same(before, weights(run)), "the pipeline of before is whole"
    filler.unlink()
    train([*argv, "--max_train_steps", "4", "--resume_from_checkpoint", "latest"])
    train([*argv, "--output_dir", str(tmp_path / "whole"), "--max_train_steps", "4"])
    assert same(weights(run), weights(tmp_path / "whole"))
    assert not list(run.glob(".*")), "what was half-written is gone"
