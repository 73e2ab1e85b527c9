"""`benchmarks/gpu_check.py`, which measures on a GPU, runs on a CPU at small sizes, and goes on where it stopped."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tiny import CPU, ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes")
def test_it_runs_and_goes_on(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu_check.py",
        "--output_dir",
        tmp_path,
        "--pairs",
        "1",
        "--steps",
        "1",
    ]
    environment = os.environ | CPU | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    report = (tmp_path / "report.md").read_text()
    parts = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert set(parts) == {"accuracy", "choice", "waits", "steps", "speed", "trainings"}
    assert all(f"## {name}" in report for name in parts)
    assert all(row["worst"] < 1e-5 for row in parts["accuracy"])
    assert all(row["exit_code"] == 0 and (tmp_path / row["grid"]).is_file() for row in parts["trainings"])
    (tmp_path / "waits.json").unlink()
    begun = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    assert (tmp_path / "waits.json").is_file()
    assert all((tmp_path / name).stat().st_mtime_ns == written for name, written in begun.items())
