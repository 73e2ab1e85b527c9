#!/usr/bin/env python
"""Does a run that is killed at any moment end as if it had not been?

    python benchmarks/kill_and_resume.py --kills 200
    python benchmarks/kill_and_resume.py --kills 50 --processes 2

Trains a small network in processes of their own, kills each with SIGKILL at a random moment (during start, steps,
checkpoints, rotation, the final save), and starts it again with `--resume_from_checkpoint latest` until it has ended; then
the next chain begins, until there were that many kills. After each kill every checkpoint that counts as complete is
compared with the same step's of a run that was not killed, and at the end of each chain the saved pipeline, the best
pipeline and the evaluations: bit by bit.
Of several processes (gloo) one is killed, and the others have to end by themselves; while they start and wait for each
other they are killed too, as launchers do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path

from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

TINY = {
    "_class_name": "UNet2DModel", "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.1,
}  # fmt: skip
STEPS = 6
VARIANTS = (
    ["--random_flip", "--reference", "bank"],
    ["--gradient_accumulation_steps", "2", "--mixed_precision", "bf16", "--reference_batch_size", "64"],
    ["--class_conditional", "--no-use_ema"],
    ["--eval_steps", "1", "--eval_num_samples", "5"],
)


def flags(folder: Path, output: Path, variant: list[str]) -> list[str]:
    if "--eval_steps" in variant:
        variant = [*variant, "--eval_extractor", str(folder / "extractor"), "--cache_dir", str(folder / "cache")]
    return [
        "--model_config", str(folder / "net.json"), "--output_dir", str(output), "--train_batch_size", "8",
        "--max_train_steps", str(STEPS), "--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--num_samples",
        "1", "--num_inference_steps", "2", "--report_to", "none", "--resume_from_checkpoint", "latest", *variant,
    ]  # fmt: skip


def train(argv: list[str], log: Path, rank: int, world: int, port: int) -> None:
    """One run, of which this process is number `rank`."""
    import train_unconditional_stf as script

    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        script.main(argv)


class Run:
    """A run of the script in `world` processes of its own."""

    def __init__(self, context: BaseContext, argv: list[str], log: Path, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            context.Process(target=train, args=(argv, log, rank, world, port))  # type: ignore[attr-defined]
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def join(self, seconds: float | None = None) -> None:
        """Wait for all processes to end, at most that long."""
        end = None if seconds is None else time.monotonic() + seconds
        for process in self.processes:
            process.join(None if end is None else max(0.0, end - time.monotonic()))

    def kill_one(self, number: int, started: bool) -> bool:
        """Kill a process, and before they have `started` the others too; whether it was still alive.

        Raises:
            AssertionError: the others are still alive two minutes later.
        """
        self.processes[number].kill()
        for process in self.processes:
            if not started:
                process.kill()
        self.join(120)
        if not self.ended():
            raise AssertionError("a process hangs after another was killed")
        return bool(self.processes[number].exitcode == -signal.SIGKILL)

    def succeeded(self) -> bool:
        return all(process.exitcode == 0 for process in self.processes)


def digest(folder: Path) -> dict[str, str]:
    """What decides how a run goes on from a checkpoint, or what a pipeline is: digests by file."""
    kept = (
        ".safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "config.json",
        "model_index.json",
        "evaluation.json",
        "evaluations.json",
    )
    paths = [path for path in sorted(folder.rglob("*")) if path.name.endswith(kept) and path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def pipeline_digest(output: Path) -> dict[str, str]:
    return {name: value for name, value in digest(output).items() if not name.startswith("checkpoint-")}


def check_checkpoints(output: Path, expected: dict[str, dict[str, str]]) -> int:
    """Compare every complete checkpoint; the number of them.

    Raises:
        AssertionError: one differs from that of the run that was not killed.
    """
    complete = [path for path in output.glob("checkpoint-*") if (path / "training_state.json").is_file()]
    for path in complete:
        if digest(path) != expected[path.name]:
            raise AssertionError(f"{path} differs from that of the run that was not killed")
    return len(complete)


def trial(kills: int, seed: int, folder: Path, world: int = 1) -> dict[str, int]:
    """Chains of killed runs of `world` processes until there were `kills`; counts of what happened."""
    (folder / "net.json").write_text(json.dumps(TINY))
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")).save_pretrained(
        folder / "extractor"
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "extractor")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # The server that processes are forked from has imported everything; it finds modules by this alone.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_unconditional_stf", "torch", "datasets", "diffusers"])
    draw, log = random.Random(seed), folder / "log.txt"
    expected, pipelines, durations = [], [], []
    for number, variant in enumerate(VARIANTS):
        output = folder / f"whole-{number}"
        # Every step's checkpoint is kept. The schedule is constant.
        argv = [*flags(folder, output, variant), "--checkpoints_total_limit", str(STEPS), "--lr_scheduler", "constant"]
        start = time.perf_counter()
        run = Run(context, argv, log, world)
        run.join()
        if not run.succeeded():
            raise RuntimeError(log.read_text()[-3000:])
        expected.append({path.name: digest(path) for path in output.glob("checkpoint-*")})
        pipelines.append(pipeline_digest(output))
        durations.append(time.perf_counter() - start)
    counts = {"kills": 0, "chains": 0, "runs": 0, "checkpoints_compared": 0, "leftovers_seen": 0}
    while counts["kills"] < kills:
        number = counts["chains"] % len(VARIANTS)
        output = folder / f"chain-{counts['chains']}"
        argv = [*flags(folder, output, VARIANTS[number]), "--lr_scheduler", "constant"]
        for attempt in range(1000):
            said = log.stat().st_size
            run = Run(context, argv, log, world)
            counts["runs"] += 1
            if attempt >= 30:  # after many kills one is let through
                run.join()
            elif draw.random() < 0.2:
                run.join(draw.uniform(0, durations[number]))
            else:  # from the first step on, where all the writing is
                while not run.ended() and b"references, " not in log.read_bytes()[said:]:
                    time.sleep(0.002)
                run.join(draw.uniform(0, 0.5 * world))
            if run.kill_one(draw.randrange(world), started=b"references, " in log.read_bytes()[said:]):
                counts["kills"] += 1
            elif not run.succeeded():
                raise RuntimeError(log.read_text()[-3000:])
            counts["checkpoints_compared"] += check_checkpoints(output, expected[number])
            counts["leftovers_seen"] += len(list(output.glob(".*")))
            if run.succeeded():
                break
        if pipeline_digest(output) != pipelines[number]:
            raise AssertionError(f"{output} ended differently from the run that was not killed")
        if leftovers := [path.name for path in output.glob(".*")]:
            raise AssertionError(f"{output}: left behind {leftovers}")
        counts["chains"] += 1
        shutil.rmtree(output)
        print(counts, flush=True)
    return counts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("kill_and_resume.json"))
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = trial(args.kills, args.seed, Path(folder), args.processes)
    args.output.write_text(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
