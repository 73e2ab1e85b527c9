#!/usr/bin/env python
"""Does the stable target make better one-step and two-step models? ECT against STF, equal networks, equal images seen.

    # scikit-learn's digits on one CPU thread: about two hours in all, in slices; repeat until it says that all is done
    python benchmarks/study_consistency.py --output_dir study-consistency --minutes 9

    # CIFAR-10 at 16x16 on one CPU thread, a network of 0.49 M parameters, one seed
    python benchmarks/average_images.py --dataset_name cifar10 --output_dir cifar10-16
    python benchmarks/study_consistency.py --output_dir study-consistency-16 --dataset_name cifar10-16 \\
        --channels 24 32 48 --start_steps 4000 --start_learning_rate 5e-4 --seeds 1 --minutes 9

    # CIFAR-10 on a GPU with the preset of 55.7 M parameters
    python benchmarks/study_consistency.py --output_dir study-consistency-32 --dataset_name cifar10 \\
        --preset cifar10_32 --start_steps 100000 --start_learning_rate 2e-4 --steps 20000 --learning_rate 1e-4 --minutes 60

Each call goes on where the last one stopped, killed or not. For each seed an EDM model is trained on the STF target with all
images, and tuned in four ways: Easy Consistency Tuning (ECT), and its points on the line to the posterior mean over n = 256,
1,024 and all images. The last call writes results.md and figures: the distances of samples in one and two steps, those
of the start model in 35 evaluations; the noise of the gradient by noise level; and samples of the same seeds. Distances are as in study_cifar10.py; of
two steps the least over the intermediate levels, which are the same for all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from study_cifar10 import ROOT, data_statistics, load_images, train, train_extractor, write
from study_results import spread
from torch import Tensor

from stf_diffusers import ConsistencyTrainingObjective, ReferenceBank, STFPipeline
from stf_diffusers.export import network_of
from stf_diffusers.feature_extractors import FeatureExtractor, transformers_features
from stf_diffusers.metrics import FeatureStatistics, frechet_distance
from stf_diffusers.training.averages import AVERAGE
from stf_diffusers.training.evaluation import data_features
from stf_diffusers.training.image_data import ImageColumn
from stf_diffusers.training.run_folder import METRICS
from stf_diffusers.training.sampling import as_pixels

# Between the first and the second step.
INTERMEDIATE_LEVELS = (0.3, 0.5, 0.8, 1.2, 2.0, 3.0)
# Number of references: 0 for ECT, None for all images.
SIZES: tuple[int | None, ...] = (0, 256, 1024, None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="Default: scikit-learn's digits.")
    parser.add_argument("--channels", type=int, nargs=3, default=[16, 32, 32], help="Of the digits' preset.")
    parser.add_argument("--preset", help="Another preset, instead of --channels; in bf16, with flips.")
    parser.add_argument("--start_steps", type=int, default=1000, help="Of the start models, with 64 images.")
    parser.add_argument("--start_learning_rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=2000, help="Of each tuning, with 64 images.")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000, help="For each distance.")
    parser.add_argument("--minutes", type=float, default=9, help="Stop after this time, at the latest a minute later.")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Tuning:
    """One run of the consistency trainer, or the start model of a seed. `references`: as in SIZES."""

    references: int | None
    seed: int
    start: bool = False

    @property
    def target(self) -> str:
        if self.start:
            return "start model"
        return "ECT" if self.references == 0 else f"STF, n = {self.references or 'all'}"

    def folder(self, args: argparse.Namespace) -> Path:
        name = "start" if self.start else "all" if self.references is None else str(self.references)
        return Path(args.output_dir / "runs" / f"{name}-{self.seed}")

    def steps(self, args: argparse.Namespace) -> int:
        return int(args.start_steps if self.start else args.steps)

    def command(self, args: argparse.Namespace) -> list[str]:
        """The trainer and its flags."""
        steps = self.steps(args)
        flags = ["--train_batch_size", "64", "--max_train_steps", str(steps), "--seed", str(self.seed)]
        flags += ["--checkpointing_steps", str(steps // 2), "--report_to", "none"]
        if args.dataset_name:
            flags += ["--dataset_name", args.dataset_name]
        if args.preset:
            flags += ["--mixed_precision", "bf16", "--random_flip"]
        if self.references is None or self.start:
            flags += ["--reference", "bank"]
        elif self.references:
            flags += ["--reference", "batch", "--reference_batch_size", str(self.references)]
        flags += ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", str(min(steps // 20, 100))]
        if self.start:
            flags += ["--noise_process", "edm", "--learning_rate", str(args.start_learning_rate)]
            flags += ["--model_config", args.preset or str(network(args))]
            return [str(ROOT / "examples" / "train_unconditional_stf.py"), *flags]
        flags += ["--learning_rate", str(args.learning_rate), "--objective", "stf" if self.references != 0 else "ect"]
        flags += ["--pretrained_model_name_or_path", str(Tuning(None, self.seed, start=True).folder(args))]
        return [str(ROOT / "examples" / "train_consistency_stf.py"), *flags]


def network(args: argparse.Namespace) -> Path:
    """The config of the small network."""
    path = Path(args.output_dir / "network.json")
    if not path.exists():
        config = json.loads((ROOT / "examples" / "configs" / "digits_12.json").read_text())
        config |= {"block_out_channels": args.channels, "attention_head_dim": args.channels[1]}
        if args.dataset_name:
            channels, height, width = load_images(args.dataset_name).shape
            config |= {"in_channels": channels, "out_channels": channels, "sample_size": [height, width]}
        write(path, config)
    return path


def tunings(args: argparse.Namespace) -> list[Tuning]:
    """All runs: the start models, then the two ends of the comparison, then what lies between."""
    seeds = range(args.seeds)
    tuned = [Tuning(n, seed) for n in (0, None, 1024, 256) for seed in seeds]
    return [*(Tuning(None, seed, start=True) for seed in seeds), *tuned]


def averaged(run: Tuning, step: int, args: argparse.Namespace) -> STFPipeline:
    """The pipeline of a checkpoint's averaged weights."""
    folder = run.folder(args)
    pipeline = STFPipeline.from_pretrained(folder).to(DEVICE)
    network_of(pipeline).load_state_dict(load_file(folder / f"checkpoint-{step}" / AVERAGE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def evaluate(
    run: Tuning, step: int, args: argparse.Namespace, extractor: FeatureExtractor, data: Tensor
) -> dict[str, Any]:
    """Distances by number of steps: 35 evaluations of the start model; one, and two by intermediate level, of others."""
    pipeline = averaged(run, step, args)
    batch = 100 if args.preset is None else 500

    def distance(**call: Any) -> float:
        samples: list[Any] = []
        for first in range(0, args.num_samples, batch):
            seeds = range(first, min(first + batch, args.num_samples))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            samples += pipeline(batch_size=len(seeds), generator=generators, return_dict=False, **call)[0]
        features = FeatureStatistics.of(extractor(as_pixels(samples)))
        return frechet_distance(features, data_statistics(data))

    if run.start:
        found: dict[str, Any] = {"distance_35": distance(solver="heun", num_inference_steps=18)}
    else:
        two = {
            str(level): distance(solver="consistency", num_inference_steps=2, sigmas=[level])
            for level in INTERMEDIATE_LEVELS
        }
        found = {"distance_1": distance(solver="consistency", num_inference_steps=1), "by_level": two}
        found |= {"distance_2": min(two.values()), "level": min(two, key=lambda level: two[level])}
    rates = [
        json.loads(line).get("images_per_second") for line in (run.folder(args) / METRICS).read_text().splitlines()
    ]
    return {
        **found, "references": run.references, "seed": run.seed, "start": run.start, "target": run.target, "step": step,
        "images_seen": 64 * step, "images_per_second": median(rate for rate in rates if rate),
    }  # fmt: skip


def gradient_noise(args: argparse.Namespace, images: ImageColumn) -> list[dict[str, Any]]:
    """Noise of the gradient by noise level, for the half-tuned ECT network of seed 0, half-way through the stages.

    Trace of the covariance of the gradient of batches of 16 images, over 64 batches. All get the same images, times, noise
    and dropout.
    """
    batch_size, num_batches = 16, 64
    pipeline = averaged(Tuning(0, 0), args.steps // 2, args)
    assert images.images is not None  # decoded without a budget
    trained, pixels = network_of(pipeline), images.images.to(DEVICE)
    objective, bank = ConsistencyTrainingObjective(pipeline.process), ReferenceBank(pixels)
    levels, found = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, None], []
    for level in levels:
        draws = torch.Generator(DEVICE).manual_seed(0)
        gradients: dict[int | None, list[Tensor]] = {n: [] for n in SIZES}
        for _ in range(num_batches):
            order = torch.randperm(len(pixels), generator=draws, device=DEVICE)
            clean = pixels[order[:batch_size]]
            t = objective.sample_t(batch_size, generator=draws, device=DEVICE)
            t = t if level is None else torch.full_like(t, level)
            noise = torch.randn(clean.shape, generator=draws, device=DEVICE)
            for n in SIZES:
                reference = bank if n is None else pixels[order[:n]] if n else None
                source = order[:batch_size] if n is None else None
                pair = objective.perturb(clean, reference=reference, source_index=source, stage=4, t=t, noise=noise)
                output = trained(pair.model_input, pair.timestep).sample
                with torch.no_grad():
                    earlier = trained(pair.earlier_input, pair.earlier_timestep).sample
                loss = objective.loss(output, earlier, pair)
                parts = torch.autograd.grad(loss, list(trained.parameters()))
                gradients[n].append(torch.cat([part.flatten() for part in parts]).cpu())
        for n in SIZES:
            stacked = torch.stack(gradients[n]).double()
            found.append(
                {
                    "level": level, "references": n, "gradient_noise": float(stacked.var(0).sum()),
                    "gradient_norm_squared": float(stacked.mean(0).square().sum()),
                }
            )  # fmt: skip
    return found


def report(args: argparse.Namespace) -> None:
    """results.md and the figures."""
    results = [json.loads(path.read_text()) for path in sorted((args.output_dir / "evaluations").glob("*.json"))]
    noise: list[dict[str, Any]] = json.loads((args.output_dir / "noise.json").read_text())

    def select(n: int | None, step: int, key: str, start: bool = False) -> list[float]:
        found = [row for row in results if (row["references"], row["step"], row["start"]) == (n, step, start)]
        return [row[key] for row in sorted(found, key=lambda row: row["seed"])]

    lines = [
        f"Seeds 0 to {args.seeds - 1}; squared Fréchet distance of {args.num_samples} samples; start model, 35 "
        f"evaluations: {spread(select(None, args.start_steps, 'distance_35', start=True))}.", "",
        "| points | images seen | 1 step | minus ECT's | 2 steps | minus ECT's | images / s |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for n, step in product(SIZES, (args.steps // 2, args.steps)):
        cells = [Tuning(n, 0).target, f"{64 * step:,}"]
        for key in ("distance_1", "distance_2"):
            values, ect = select(n, step, key), select(0, step, key)
            differences = [value - other for value, other in zip(values, ect, strict=True)]
            cells += [spread(values), spread(differences, error=True) if n != 0 else ""]
        lines.append("| " + " | ".join([*cells, f"{median(select(n, step, 'images_per_second')):.0f}"]) + " |")
    lines += ["", "± is the standard deviation over seeds; of differences, the standard error of their mean.", ""]
    lines += [
        "| noise level t | points | gradient noise / ECT's | squared gradient norm / ECT's |",
        "|---|---|---|---|",
    ]
    for row in noise:
        if row["references"] != 0:
            base = next(r for r in noise if (r["level"], r["references"]) == (row["level"], 0))
            level = "as trained" if row["level"] is None else f"{row['level']:g}"
            ratios = [f"{row[name] / base[name]:.3f}" for name in ("gradient_noise", "gradient_norm_squared")]
            lines.append("| " + " | ".join([level, Tuning(row["references"], 0).target, *ratios]) + " |")
    (args.output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(args, select, noise)
    draw_samples(args)


def draw(args: argparse.Namespace, select: Callable[..., list[float]], noise: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    start = mean(select(None, args.start_steps, "distance_35", start=True))
    steps = (args.steps // 2, args.steps)
    for name, label in (("images", "images seen"), ("time", "seconds of tuning")):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for n in SIZES:
            rate = median(select(n, args.steps, "images_per_second"))
            seen = [64 * step / (rate if name == "time" else 1) for step in steps]
            for key, style, what in (("distance_1", "-", "1 step"), ("distance_2", "--", "2 steps")):
                means = [mean(select(n, step, key)) for step in steps]
                axis.plot(
                    seen, means, style, marker="o", label=f"{Tuning(n, 0).target}, {what}", color=f"C{SIZES.index(n)}"
                )
        axis.axhline(start, color="grey", lw=0.8, label="start model, 35 evaluations")
        axis.set(
            xlabel=label, ylabel="squared Fréchet distance", xticks=seen if name == "images" else axis.get_xticks()
        )
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(args.output_dir / f"distance_against_{name}.png", dpi=110)
    figure = Figure(figsize=(4.5, 3.6), layout="constrained")
    axis = figure.subplots()
    for n in SIZES:
        rows = [row for row in noise if row["references"] == n and row["level"] is not None]
        axis.plot(
            [row["level"] for row in rows],
            [row["gradient_noise"] for row in rows],
            label=Tuning(n, 0).target,
            marker=".",
        )
    axis.set(xscale="log", yscale="log", xlabel="noise level t", ylabel="gradient: trace of the covariance")
    axis.legend(frameon=False)
    figure.savefig(args.output_dir / "noise.png", dpi=110)


def draw_samples(args: argparse.Namespace, count: int = 12) -> None:
    """Rows of samples of the same seeds, by the models of seed 0."""
    start, ect, stf = (
        averaged(run, run.steps(args), args) for run in (Tuning(None, 0, start=True), Tuning(0, 0), Tuning(None, 0))
    )
    level = json.loads((args.output_dir / "evaluations" / f"all-0-{args.steps}.json").read_text())["level"]
    two = {"num_inference_steps": 2, "solver": "consistency", "sigmas": [float(level)]}
    one = {"num_inference_steps": 1, "solver": "consistency"}
    rows: dict[str, tuple[STFPipeline, dict[str, Any]]] = {
        "start model, 35 evaluations": (start, {"num_inference_steps": 18, "solver": "heun"}),
        "start model, 1": (start, {"num_inference_steps": 1, "solver": "euler"}),
        "ECT, 1": (ect, one), "STF on all images, 1": (stf, one), "STF on all images, 2": (stf, two),
    }  # fmt: skip
    width = 40
    picture = Image.new("RGB", (190 + count * width, len(rows) * width), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, (pipeline, call)) in enumerate(rows.items()):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        pen.text((4, row * width + 14), name, fill="black")
        for column, image in enumerate(pipeline(count, generator=generators, return_dict=False, **call)[0]):
            picture.paste(
                image.resize((width - 2, width - 2), Image.Resampling.NEAREST), (190 + column * width, row * width)
            )
    picture.save(args.output_dir / "samples.png")


def main() -> None:
    args = parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "minutes")}
    path = args.output_dir / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        raise ValueError(f"{args.output_dir} was begun with {before}; got {settings}. Choose another --output_dir.")
    write(path, settings)
    deadline = time.monotonic() + 60 * args.minutes
    for run in tunings(args):
        if time.monotonic() > deadline or not train(run.folder(args), run.steps(args), run.command(args), deadline):
            print(f"Stopped in {run.folder(args).name}. Call again.")
            return
    extractor = transformers_features(train_extractor(args.output_dir, args.dataset_name), device=DEVICE)
    images = load_images(args.dataset_name)
    data = data_features(images, extractor, None, quiet=True)
    work: list[tuple[Path, Any]] = [(args.output_dir / "noise.json", lambda: gradient_noise(args, images))]
    for run in tunings(args):
        for step in [run.steps(args)] if run.start else [args.steps // 2, args.steps]:
            path = args.output_dir / "evaluations" / f"{run.folder(args).name}-{step}.json"
            work.append((path, lambda run=run, step=step: evaluate(run, step, args, extractor, data)))
    for path, compute in work:
        if time.monotonic() > deadline:
            print(f"Stopped before {path.name}. Call again.")
            return
        if not path.exists():
            write(path, compute())
    report(args)


if __name__ == "__main__":
    main()
