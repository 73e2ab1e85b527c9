"""One run at a time in a folder."""

import os
import signal
import subprocess
import sys

import pytest

from stf_diffusers.training.run_lock import LOCK, RunLock
from tiny import ROOT

HOLD = """
import sys, time
from pathlib import Path
from stf_diffusers.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    folder = tmp_path / "run"
    process = hold(folder)
    with pytest.raises(ValueError, match=rf"another run is at work in .*process {process.pid} on"), RunLock(folder):
        pass
    assert folder.is_dir(), "it is the other run's"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (folder / LOCK).exists(), "nobody was there to remove it"
    with RunLock(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path / "a" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError), RunLock(tmp_path / "mine"):
        raise KeyError
    assert (tmp_path / "mine").is_dir()
