#!/usr/bin/env python
"""What does a new user see in the first hour?

    python benchmarks/first_hour.py --output_dir first-hour

Runs the commands of a first hour one after another, each as a user types it, in a fresh folder with caches of its own:
training on parquet, on folders of PNG files and on a zip archive; in two processes; Ctrl-C, sampling what was stopped and
continuing; a DDPM of Diffusers trained further; an old command line of Diffusers' `train_unconditional.py`; samples; the
report of variances; and a push to a Hub, which is a server of this process. scikit-learn's digits stand in for MNIST; nothing
is downloaded. For each command it prints the exit code, the seconds to the first step and in all, the losses, and the last
lines that were seen; the pictures are left to look at. Exit code 1 if a command ended otherwise than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import Hub, serve  # noqa: E402
from stf_diffusers.training.data_set import load_digits_dataset  # noqa: E402

TRAINER = "train_unconditional_stf.py"
SHORT = "--lr_warmup_steps 20 --learning_rate 1e-3 --checkpointing_steps 100 --report_to none"


@dataclass(frozen=True)
class Command:
    """A line that is typed, and how it should end.

    Args:
        title: what it is for.
        script: of examples/.
        flags: as typed, in the folder of the series.
        processes: how many are launched.
        run: the run's folder, whose metrics.jsonl tells of its steps.
        stop_at: step at which Ctrl-C is typed.
        code: exit code.
        environment: variables that are set for it.
    """

    title: str
    script: str
    flags: str
    processes: int = 1
    run: str = ""
    stop_at: int = 0
    code: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def typed(self) -> str:
        """As a user types it."""
        launcher = "--multi_gpu --num_processes 2" if self.processes > 1 else "--num_processes 1"
        on_cpu = "ACCELERATE_USE_CPU=true " if self.processes > 1 else ""
        line = f"{on_cpu}accelerate launch {launcher} examples/{self.script} {self.flags}"
        return line if self.script in (TRAINER, "generate.py") else f"python examples/{self.script} {self.flags}"

    def arguments(self) -> list[str]:
        """The same, with this interpreter, and the launcher's questions answered."""
        script = [str(ROOT / "examples" / self.script), *shlex.split(self.flags)]
        if self.script not in (TRAINER, "generate.py"):
            return [sys.executable, *script]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(self.processes)]
        launcher += ["--multi_gpu", "--main_process_port", "0"] if self.processes > 1 else []
        return [*launcher, *script]


@dataclass
class Seen:
    """What happened: exit code, seconds to the first step and in all, losses of the first and the last step, output."""

    code: int
    first_step: float | None
    seconds: float
    losses: tuple[float, float] | None
    lines: list[str]


def metrics(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def see(command: Command, folder: Path, environment: dict[str, str]) -> Seen:
    """Run a command in the folder; Ctrl-C goes to its process group, as a terminal sends it."""
    log, record = folder / "log.txt", folder / command.run / "metrics.jsonl"
    before, first, typed = len(metrics(record)) if command.run else 0, None, False
    begun = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command.arguments(), cwd=folder, env=environment | command.environment, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            time.sleep(0.05)
            if not command.run:
                continue
            found = metrics(record)
            if first is None and len(found) > before:
                first = time.monotonic() - begun
            if command.stop_at and not typed and found and found[-1]["step"] >= command.stop_at:
                os.killpg(process.pid, signal.SIGINT)
                typed = True
    while (folder / command.run / ".run.lock").exists() and time.monotonic() - begun < 600:
        time.sleep(0.05)
    found = metrics(record) if command.run else []
    losses = (found[before]["loss"], found[-1]["loss"]) if len(found) > before else None
    return Seen(process.returncode, first, time.monotonic() - begun, losses, lines_of(log))


def lines_of(log: Path) -> list[str]:
    """The lines as a terminal shows them at the end: of a progress bar the last state."""
    lines = [line.split("\r")[-1].rstrip() for line in log.read_bytes().decode(errors="replace").split("\n")]
    return [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line) for line in lines if line.strip()]


def lay_out_data(folder: Path, images: int) -> None:
    """The digits as parquet, as folders of PNG files by class, and as a zip archive of these folders."""
    data = load_digits_dataset().select(range(images))
    data.to_parquet(folder / "digits.parquet")
    for index, row in enumerate(data):
        path = folder / "digits" / str(row["label"]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    shutil.make_archive(str(folder / "digits"), "zip", folder / "digits")


def save_stock_pipeline(folder: Path, steps: int) -> float:
    """A DDPM that Diffusers alone trained and saved; the loss of its last steps."""
    images = (
        torch.tensor(np.stack([np.asarray(image) for image in load_digits_dataset()["image"]]))[:, None] / 127.5 - 1
    )
    torch.manual_seed(0)
    network, scheduler = UNet2DModel(
        sample_size=12, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ), DDPMScheduler()  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        clean = images[torch.randint(len(images), (64,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (64,))
        loss = torch.nn.functional.mse_loss(network(scheduler.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    return float(np.mean(losses[-20:]))


def first_hour(steps: int, hub: dict[str, str]) -> list[Command]:
    train = f"--max_train_steps {steps} {SHORT}"
    parquet = f"--dataset_name digits.parquet --class_conditional {train} --output_dir from-parquet"
    stopped = f"--dataset_name digits.zip --max_train_steps {10 * steps} {SHORT} --logging_steps 1 --output_dir stopped"
    old = (
        "--dataset_name=digits --resolution=12 --center_crop --random_flip --output_dir=old --train_batch_size=16 "
        "--num_epochs=4 --gradient_accumulation_steps=1 --use_ema --learning_rate=1e-3 --lr_warmup_steps=50 "
        "--mixed_precision=no --prediction_type=epsilon --ddpm_num_steps=1000 --ddpm_num_inference_steps=50 "
        "--ddpm_beta_schedule=linear --logger=tensorboard --save_images_epochs=2 --save_model_epochs=4"
    )
    return [
        Command("Train on parquet, with classes", TRAINER, parquet, run="from-parquet"),
        Command("Train on a folder of PNG files", TRAINER,
                f"--train_data_dir digits {train} --output_dir from-folder", run="from-folder"),
        Command("Train on a zip archive", TRAINER, f"--dataset_name digits.zip {train} --output_dir from-zip", run="from-zip"),
        Command("Train in two processes", TRAINER,
                f"--train_data_dir digits --train_batch_size 32 {train} --output_dir two", 2, "two",
                environment={"ACCELERATE_USE_CPU": "true"}),
        # The launcher ends by the signal, with a traceback of its own; the training then saves what it has.
        Command("Stop with Ctrl-C", TRAINER, stopped, run="stopped", stop_at=20, code=-signal.SIGINT),
        Command("Sample what was stopped", "generate.py", "--model stopped --output_dir stopped-samples --num_images 16"),
        Command("Continue it", TRAINER,
                f"{stopped} --resume_from_checkpoint latest".replace(f"steps {10 * steps}", f"steps {steps}"), run="stopped"),
        Command("Train a DDPM of Diffusers further", TRAINER,
                f"--train_data_dir digits --pretrained_model_name_or_path stock {train} --output_dir tuned", run="tuned"),
        Command("An old command line of Diffusers", TRAINER, old, run="old"),
        Command("Samples", "generate.py", "--model from-parquet --output_dir samples --num_images 64 --npz"),
        Command("How much variance there is", "variance_report.py", "--train_data_dir digits --max_images 1000 --output_dir variance"),
        Command("Push to the Hub", TRAINER,
                f"{parquet} --resume_from_checkpoint latest --push_to_hub --hub_model_id somebody/digits", run="from-parquet",
                environment=hub),
    ]  # fmt: skip


def show(number: int, command: Command, seen: Seen, lines: int) -> bool:
    """Print what was seen; whether it ended as it should."""
    right = seen.code == command.code
    print(f"## {number}. {command.title}\n\n    {command.typed()}\n")
    facts = [f"exit code {seen.code}" + ("" if right else f" **instead of {command.code}**"), f"{seen.seconds:.1f} s"]
    if seen.first_step is not None:
        facts.append(f"first step after {seen.first_step:.1f} s")
    if seen.losses is not None:
        facts.append("loss {:.3f} at first, {:.3f} at last".format(*seen.losses))
    print("; ".join(facts) + f"; {len(seen.lines)} lines, of which the last:\n")
    print("\n".join(f"    {line[:200]}" for line in seen.lines[-lines:]) + "\n", flush=True)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("first-hour"), help="Fresh folder for the series.")
    parser.add_argument("--steps", type=int, default=200, help="Steps of each training.")
    parser.add_argument("--images", type=int, default=1797, help="Number of digits.")
    parser.add_argument("--lines", type=int, default=6, help="Last lines of output to print.")
    parser.add_argument("--only", type=int, nargs="+", help="Numbers of the commands to run, from 1. Default: all.")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True)
    lay_out_data(folder, args.images)
    stock_loss = save_stock_pipeline(folder / "stock", args.steps)
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    hub, right = Hub(), True
    with serve(hub) as address:
        access = {"HF_ENDPOINT": address, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        for number, command in enumerate(first_hour(args.steps, access), 1):
            if not args.only or number in args.only:
                right &= show(number, command, see(command, folder, environment), args.lines)
    print(f"The DDPM of Diffusers had a loss of {stock_loss:.3f} on its own process.")
    for name, files in hub.files.items():
        print(f"On the Hub, {name}: {', '.join(sorted(files))}.")
    for path in sorted(folder.rglob("*.png")):
        if not {"cache", "digits", "images"} & set(path.relative_to(folder).parts):
            with Image.open(path) as picture:
                print(f"{path.relative_to(folder)}: {picture.width}x{picture.height}")
    sys.exit(not right)


if __name__ == "__main__":
    main()
