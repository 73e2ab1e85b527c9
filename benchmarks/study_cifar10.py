#!/usr/bin/env python
"""Does STF train better models than DSM? Equal networks, equal images seen, several seeds; the answer as it comes out.

    # scikit-learn's digits on one CPU thread: about two hours in all, in slices; repeat until it says that all is done
    python benchmarks/study_cifar10.py --output_dir study-digits --minutes 9

    # CIFAR-10 on a GPU
    python benchmarks/study_cifar10.py --output_dir study --dataset_name cifar10 --steps 20000 --minutes 9

Each call goes on where the last one stopped, killed or not: trainings from their checkpoints, evaluations from their files.
The last one writes results.md and three figures. Trained are all of EDM, VE, VP x DSM, STF with n = 256, 1,024, 4,096 (where
there are as many images), all x seeds. Distances are those of the averaged weights' samples (Heun, 18 steps, 35 evaluations,
the same seeds for all) from the training images, in the features of a small ResNet that is trained on their labels first, or
of --extractor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from study_results import Training, evaluated_steps, report, trainings
from torch import Tensor

from stf_diffusers import ReferenceBank, STFPipeline, STFTrainingObjective
from stf_diffusers.export import network_of
from stf_diffusers.feature_extractors import FeatureExtractor, transformers_features
from stf_diffusers.metrics import FeatureStatistics, nearest_neighbors
from stf_diffusers.quality import sample_quality
from stf_diffusers.training.averages import AVERAGE
from stf_diffusers.training.data_set import find_image_column, load_split
from stf_diffusers.training.evaluation import data_features
from stf_diffusers.training.image_data import ImageColumn
from stf_diffusers.training.image_reader import decode_all, make_reader
from stf_diffusers.training.sampling import as_pixels

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "examples" / "train_unconditional_stf.py"
PROCESSES = ("edm", "ve", "vp")
# The trainer's exit codes after a signal: its checkpoint is complete; it had not begun.
STOPPED = (75, -signal.SIGTERM)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="Default: scikit-learn's digits, with a network of 0.28 M parameters.")
    parser.add_argument("--steps", type=int, default=1000, help="Of each training, with 64 images.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", nargs="+", choices=PROCESSES, default=list(PROCESSES))
    parser.add_argument("--all_or_none", action="store_true", help="Only DSM and STF with all images.")
    parser.add_argument("--num_samples", type=int, default=1000, help="For each distance.")
    parser.add_argument("--extractor", help="A vision model of transformers. Default: a ResNet trained on the labels.")
    parser.add_argument("--minutes", type=float, default=9, help="Stop after this time, at the latest a minute later.")
    return parser.parse_args(argv)


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


def train(folder: Path, steps: int, command: Sequence[str], deadline: float) -> bool:
    """Train until the end, or until the deadline: whether it has ended.

    Raises:
        RuntimeError: the trainer failed.
    """
    if (folder / "model_index.json").exists() and (folder / f"checkpoint-{steps}").exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *command, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            code = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    if code not in (0, *STOPPED):
        raise RuntimeError(f"the training {folder.name} failed with exit code {code}: see {folder}.log")
    return code == 0


def load_images(dataset_name: str | None) -> ImageColumn:
    dataset = load_split(dataset_name)
    column = find_image_column(dataset)
    reader = make_reader(dataset, column, None, None, False)
    return ImageColumn(dataset, column, reader, images=decode_all(dataset, column, reader, math.inf, quiet=True))


def train_extractor(output_dir: Path, dataset_name: str | None) -> Path:
    """The feature extractor, trained in a process of its own at the first call."""
    folder = output_dir / "classifier"
    if not (folder / "accuracy.json").exists():
        command = [sys.executable, str(ROOT / "benchmarks" / "train_classifier.py"), "--output_dir", str(folder)]
        command += ["--dataset_name", dataset_name] if dataset_name else []
        subprocess.run(command, check=True)
    return folder


def averaged(run: Training, step: int, args: argparse.Namespace, device: torch.device) -> STFPipeline:
    """The pipeline of a checkpoint's averaged weights."""
    folder = run.folder(args.output_dir)
    pipeline = STFPipeline.from_pretrained(folder).to(device)
    network_of(pipeline).load_state_dict(load_file(folder / f"checkpoint-{step}" / AVERAGE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def evaluate(
    run: Training, step: int, args: argparse.Namespace, images: ImageColumn, extractor: FeatureExtractor, data: Tensor
) -> dict[str, Any]:
    """Distances of a checkpoint's samples, and the share of them that are copies of training images."""
    pipeline = averaged(run, step, args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    batch = 64 if args.dataset_name is None else 500
    samples: list[Any] = []
    while len(samples) < args.num_samples:
        seeds = range(len(samples), min(len(samples) + batch, args.num_samples))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        samples += pipeline(batch_size=len(seeds), generator=generators, return_dict=False)[0]
    pixels = as_pixels(samples)
    quality = sample_quality(
        extractor(pixels),
        data,
        data_statistics=data_statistics(data),
        extractor=extractor.name,
        reference=f"{args.dataset_name or 'digits'}, training split",
        sampler="Heun, 18 steps",
        evaluations=35,
        seeds=f"0 to {args.num_samples - 1}",
    )
    assert images.images is not None  # decoded without a budget
    nearest = nearest_neighbors(pixels.flatten(1), images.images.flatten(1))
    return {
        **asdict(run), "target": run.target, "step": step, "images_seen": 64 * step,
        "images_per_second": images_per_second(run, args), "frechet_distance": quality.frechet_distance,
        "kernel_distance": quality.kernel_distance.value, "precision": quality.precision, "recall": quality.recall,
        "copies": nearest.copies().double().mean().item(), "measured": quality.stamp, "limits": quality.limits,
    }  # fmt: skip


@cache
def data_statistics(data: Tensor) -> FeatureStatistics:
    return FeatureStatistics.of(data)


def images_per_second(run: Training, args: argparse.Namespace) -> float:
    """Median over the reports of the training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in (run.folder(args.output_dir) / "logs").rglob("events.out.*"):
        events = EventAccumulator(str(path)).Reload()
        if "images_per_second" in events.Tags()["scalars"]:
            found += [event.value for event in events.Scalars("images_per_second")]
    return median(found)


def gradient_noise(process_name: str, args: argparse.Namespace, images: ImageColumn) -> list[dict[str, Any]]:
    """Noise of the gradient and of the loss by noise level, for the half-trained DSM network of seed 0.

    Batches of 16 images; trace of the covariance of their gradient, and variance of their loss, over 64 of them. All targets
    get the same images, times and noise.
    """
    batch_size, num_batches = 16, 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = averaged(Training(process_name, 0, 0), args.steps // 2, args, device)
    assert images.images is not None  # decoded without a budget
    network, process, pixels = network_of(pipeline), pipeline.process, images.images.to(device)
    objective, bank = STFTrainingObjective(process), ReferenceBank(pixels)
    sizes = [*sorted({run.references for run in trainings(args) if run.references is not None}), None]
    found = []
    levels = torch.logspace(-1, math.log10(50), 9, dtype=torch.float64).tolist()
    for level in [*levels, None]:  # None: the process's own distribution
        draws = torch.Generator(device).manual_seed(0)
        gradients: dict[int | None, list[Tensor]] = {n: [] for n in sizes}
        losses: dict[int | None, list[float]] = {n: [] for n in sizes}
        for _ in range(num_batches):
            order = torch.randperm(len(pixels), generator=draws, device=device)
            clean = pixels[order[:batch_size]]
            if level is None:
                t = process.sample_t(batch_size, generator=draws, device=device)
            else:
                t = process.time_of(torch.full((batch_size,), level, dtype=torch.float64)).to(device, torch.float32)
            noise = torch.randn(clean.shape, generator=draws, device=device)
            output = None
            for n in sizes:
                reference = bank if n is None else pixels[order[:n]] if n else None
                source = order[:batch_size] if n is None else None
                perturbed = objective.perturb(clean, reference=reference, source_index=source, t=t, noise=noise)
                if output is None:
                    output = network(perturbed.model_input, perturbed.timestep).sample
                loss = objective.loss(output, perturbed)
                parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=n is not None)
                gradients[n].append(torch.cat([part.flatten() for part in parts]))
                losses[n].append(loss.item())
        for n in sizes:
            stacked = torch.stack(gradients[n]).double()
            found.append(
                {
                    "process": process_name, "references": n, "level": level,
                    "gradient_noise": float(stacked.var(0).sum()), "gradient_norm_squared": float(stacked.mean(0).square().sum()),
                    "loss": mean(losses[n]), "loss_variance": stdev(losses[n]) ** 2,
                }
            )  # fmt: skip
    return found


def main() -> None:
    args = parse_args()
    settings = {
        name: getattr(args, name)
        for name in ("dataset_name", "steps", "seeds", "processes", "all_or_none", "num_samples", "extractor")
    }
    path = args.output_dir / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        raise ValueError(f"{args.output_dir} was begun with {before}; got {settings}. Choose another --output_dir.")
    write(path, settings)
    deadline = time.monotonic() + 60 * args.minutes
    for run in trainings(args):
        folder, command = run.folder(args.output_dir), [str(TRAINER), *common_flags(args), *run.flags()]
        if time.monotonic() > deadline or not train(folder, args.steps, command, deadline):
            print(f"Stopped in {folder.name}. Call again.")
            return
    chosen = args.extractor or train_extractor(args.output_dir, args.dataset_name)
    extractor = transformers_features(chosen, device="cuda" if torch.cuda.is_available() else "cpu")
    images = load_images(args.dataset_name)
    data = data_features(images, extractor, None, quiet=True)
    work: list[tuple[Path, Any]] = [
        (args.output_dir / f"noise-{process}.json", lambda process=process: gradient_noise(process, args, images))
        for process in args.processes
    ]
    for run, step in product(trainings(args), evaluated_steps(args)):
        path = args.output_dir / "evaluations" / f"{run.folder(args.output_dir).name}-{step}.json"
        work.append((path, lambda run=run, step=step: evaluate(run, step, args, images, extractor, data)))
    for path, compute in work:
        if time.monotonic() > deadline:
            print(f"Stopped before {path.name}. Call again.")
            return
        if not path.exists():
            write(path, compute())
    report(args)


if __name__ == "__main__":
    main()
