"""Runs that are killed, stopped, starved of disk space or bereft of a process: real processes, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tiny import CPU, EXAMPLES, ROOT, Processes, run_as_script, same, train, weights


@pytest.fixture
def flags(flags):
    return lambda *more: flags("--num_samples", 1, "--lr_scheduler", "constant", "--lr_warmup_steps", 500, *more)


def start_by_torchrun(argv):
    """The script in two processes of a launcher's, which sees to both; what they say goes to a pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(31500 + os.getpid() % 1000), str(EXAMPLES / "train_unconditional_stf.py"), *argv]
    environment = os.environ | CPU | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process, limit=90):
    end = time.monotonic() + limit
    while not condition():
        ended = process.poll() is not None if isinstance(process, subprocess.Popen) else not process.is_alive()
        assert not ended and time.monotonic() < end, "the run ended or hangs before what is waited for"
        time.sleep(0.02)


def children(pid):
    """Processes started by `pid`."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 3)])
def test_killed_at_random_moments(processes, kills, tmp_path):
    """A sample of what benchmarks/kill_and_resume.py does at length."""
    command = [sys.executable, ROOT / "benchmarks" / "kill_and_resume.py", "--kills", kills, "--processes", processes]
    command += ["--seed", 1, "--output", tmp_path / "counts.json"]
    subprocess.run([str(part) for part in command], env=os.environ | CPU, check=True, timeout=400)
    assert json.loads((tmp_path / "counts.json").read_text())["kills"] >= kills


def test_a_signal_before_the_first_step(flags, tmp_path):
    """There is nothing to save: the run ends at once, and the scheduler can requeue it."""
    run = Processes(run_as_script, flags("--max_train_steps", 400))
    (process,) = run.members
    usr1 = 1 << signal.SIGUSR1 - 1

    def catches():
        with open(f"/proc/{process.pid}/status") as status:
            return any(int(line.split()[1], 16) & usr1 for line in status if line.startswith("SigCgt"))

    wait_for(catches, process)
    os.kill(process.pid, signal.SIGUSR1)
    codes, said = run.wait(60)
    assert codes == [75], said[-2000:]
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
    started = Processes(run_as_script, [*argv, "--sample_steps", "1"])
    wait_for(lambda: (run / "samples" / "step-0000002.png").exists(), started.members[0])
    os.kill(started.members[0].pid, number)
    codes, output = started.wait(60)
    assert codes == [75], output[-2000:]
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
    process = start_by_torchrun(argv)
    wait_for(lambda: (run / "samples" / "step-0000002.png").exists(), process)
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    output = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "Stopped by a signal after step" in output, output[-2000:]
    (saved,) = run.glob("checkpoint-*")
    assert len(list(saved.glob("random_states_*.pkl"))) == 2, "both processes saved"


def test_one_of_two_processes_dies(flags, tmp_path):
    run = tmp_path / "run"
    argv = flags("--output_dir", run, "--max_train_steps", 4000, "--checkpointing_steps", 1)
    process = start_by_torchrun(argv)
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
    started = Processes(run_as_script, [*argv, "--checkpoints_total_limit", "1"])
    (process,) = started.members
    wait_for(lambda: any(run.glob("checkpoint-*/training_state.json")), process)
    workers = children(process.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    codes, output = started.wait(90)
    assert codes != [0] and "DataLoader worker" in output, output[-2000:]
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
