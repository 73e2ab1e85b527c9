#!/usr/bin/env python
"""Does STF train better models than DSM? Equal networks, equal images seen, several seeds; the answer as it comes out.

    # scikit-learn's digits on one CPU thread: about two hours in all, in slices; repeat until it says that all is done
    python benchmarks/study_cifar10.py --output_dir study-digits --minutes 9

    # CIFAR-10 on a GPU
    python benchmarks/study_cifar10.py --output_dir study --dataset_name cifar10 --steps 20000 --minutes 9

Each call goes on where the last one stopped, killed or not: trainings from their checkpoints, evaluations from their files.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "examples" / "train_unconditional_stf.py"
PROCESSES = ("edm", "ve", "vp")
# The trainer's exit codes after a signal: its checkpoint is complete; it had not begun.
STOPPED = (75, -signal.SIGTERM)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="Default: scikit-learn's digits, with a network of 0.28 M parameters.")
    parser.add_argument("--steps", type=int, default=1000, help="Of each training, with 64 images.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9, help="Stop after this time, at the latest a minute later.")
    return parser.parse_args()


@dataclass(frozen=True)
class Training:
    """One run of the trainer. `references`: 0 for DSM, n, or None for all images."""

    process: str
    references: int | None
    seed: int

    @property
    def target(self) -> str:
        return "DSM" if self.references == 0 else f"STF, n = {self.references or 'all'}"

    def folder(self, output_dir: Path) -> Path:
        return (
            output_dir / "runs" / f"{self.process}-{'all' if self.references is None else self.references}-{self.seed}"
        )

    def flags(self) -> list[str]:
        flags = ["--noise_process", self.process, "--seed", str(self.seed)]
        if self.process == "edm":
            flags += ["--sigma_data", "auto"]
        if self.references == 0:
            return [*flags, "--objective", "dsm"]
        if self.references is None:
            return [*flags, "--reference", "bank"]
        return [*flags, "--reference", "batch", "--reference_batch_size", str(self.references)]


def trainings(args: argparse.Namespace) -> list[Training]:
    """All of them, seed by seed."""
    sizes = (0, 256, 1024, None) if args.dataset_name is None else (0, 256, 1024, 4096, None)
    return [Training(process, n, seed) for seed, process, n in product(range(args.seeds), PROCESSES, sizes)]


def evaluated_steps(args: argparse.Namespace) -> list[int]:
    return [args.steps // 4, args.steps // 2, args.steps]


def common_flags(args: argparse.Namespace) -> list[str]:
    """What all trainings share."""
    flags = ["--train_batch_size", "64", "--max_train_steps", str(args.steps), "--lr_scheduler", "constant_with_warmup"]
    flags += ["--checkpointing_steps", str(args.steps // 4), "--report_to", "tensorboard"]
    if args.dataset_name is not None:
        preset = str(ROOT / "examples" / "configs" / "cifar10_32.json")
        flags += ["--dataset_name", args.dataset_name, "--model_config", preset, "--mixed_precision", "bf16"]
        return [*flags, "--random_flip", "--learning_rate", "2e-4", "--lr_warmup_steps", str(args.steps // 20)]
    config = args.output_dir / "network.json"
    if not config.exists():
        preset = json.loads((ROOT / "examples" / "configs" / "digits_12.json").read_text())
        write(config, preset | {"block_out_channels": [16, 32, 32], "attention_head_dim": 32})
    return [*flags, "--model_config", str(config), "--learning_rate", "1e-3", "--lr_warmup_steps", "50"]


def write(path: Path, content: Any) -> None:
    """JSON, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{path.name}")
    aside.write_text(json.dumps(content, indent=2))
    os.replace(aside, path)


def train(run: Training, args: argparse.Namespace, deadline: float) -> bool:
    """Train until the end, or until the deadline: whether it has ended.

    Raises:
        RuntimeError: the trainer failed.
    """
    folder = run.folder(args.output_dir)
    if (folder / "model_index.json").exists() and (folder / f"checkpoint-{args.steps}").exists():
        return True
    command = [sys.executable, str(TRAINER), *common_flags(args), *run.flags(), "--output_dir", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen([*command, "--resume_from_checkpoint", "latest"], stdout=log, stderr=log)
        try:
            code = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    if code not in (0, *STOPPED):
        raise RuntimeError(f"the training {folder.name} failed with exit code {code}: see {folder}.log")
    return code == 0


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    for run in trainings(args):
        if time.monotonic() > deadline or not train(run, args, deadline):
            print(f"Stopped in {run.folder(args.output_dir).name}. Call again.")
            return


if __name__ == "__main__":
    main()
