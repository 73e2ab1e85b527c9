#!/usr/bin/env python
"""What the noise levels drawn in training do for DSM and STF, on natural images that a CPU can finish.

    # CIFAR-10 at 16x16 with a network of 0.49 M parameters: about fifteen hours of one CPU thread in all, in slices
    python benchmarks/average_images.py --dataset_name cifar10 --output_dir cifar10-16
    python benchmarks/study_noise_levels.py --output_dir study-levels --dataset_name cifar10-16 --minutes 9

    # scikit-learn's digits: about an hour
    python benchmarks/study_noise_levels.py --output_dir study-levels-digits --channels 16 32 32 --steps 1000 \\
        --learning_rate 1e-3 --num_samples 1000 --minutes 9

    # CIFAR-10 on a GPU with the preset of 55.7 M parameters
    python benchmarks/study_noise_levels.py --output_dir study-levels-32 --dataset_name cifar10 --preset cifar10_32 \\
        --steps 100000 --learning_rate 2e-4 --minutes 60

Each call goes on where the last one stopped, killed or not. A run is PROCESS-TARGET[@LEVELS]: the target is dsm, or stf with
all images; the levels are the process's own, `profile`, `adaptive`, `adaptive-weighted` (with importance weights), or the mean
and the deviation of ln(sigma / alpha). Runs of a seed share weights, data order and the generators of noise. The last call
writes results.md, a figure of the distances, and samples of the same seeds. Distances are as in study_cifar10.py, half-way and
at the end; with `--checkpoints 11` at nine more in between, which tells how much they vary from one to the next.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from study_cifar10 import TRAINER, data_statistics, load_images, train, train_extractor, write
from study_consistency import network
from study_results import spread
from torch import Tensor

from stf_diffusers import NoiseProcess, ReferenceBank, STFPipeline, STFTrainingObjective
from stf_diffusers.adaptive_noise import AdaptiveNoise
from stf_diffusers.export import network_of, read_metadata
from stf_diffusers.feature_extractors import FeatureExtractor, transformers_features
from stf_diffusers.metrics import FeatureStatistics, frechet_distance
from stf_diffusers.noise_distribution import NoiseDistribution, distribution_from_config
from stf_diffusers.training.adaptive_levels import ADAPTIVE_LEVELS
from stf_diffusers.training.averages import AVERAGE
from stf_diffusers.training.evaluation import data_features
from stf_diffusers.training.image_data import ImageColumn
from stf_diffusers.training.run_folder import METRICS
from stf_diffusers.training.sampling import as_pixels

RUNS = (
    "edm-dsm", "edm-stf", "edm-dsm@profile", "edm-stf@profile", "edm-stf@adaptive",
    "ve-dsm", "ve-stf", "ve-dsm@profile", "ve-stf@profile", "vp-dsm", "vp-stf", "vp-dsm@profile", "vp-stf@profile",
)  # fmt: skip
RUN = re.compile(r"(edm|ve|vp)-(dsm|stf)(@(profile|adaptive(-weighted)?|-?[0-9.]+,[0-9.]+))?")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="Default: scikit-learn's digits.")
    parser.add_argument("--channels", type=int, nargs=3, default=[24, 32, 48], help="Of the digits' preset.")
    parser.add_argument("--preset", help="Another preset, instead of --channels; in bf16.")
    parser.add_argument("--steps", type=int, default=4000, help="Of each training, with 64 images.")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs", nargs="+", default=list(RUNS), help="PROCESS-dsm is what the others of a process are compared with."
    )
    parser.add_argument("--num_samples", type=int, default=5000, help="For each distance.")
    parser.add_argument(
        "--checkpoints", type=int, default=2, help="Distances at so many, equally far apart, from half-way to the end."
    )
    parser.add_argument("--minutes", type=float, default=9, help="Stop after this time, at the latest a minute later.")
    args = parser.parse_args(argv)
    if args.checkpoints < 2 or args.steps % 4 or args.steps % (2 * (args.checkpoints - 1)):
        parser.error(
            f"--steps {args.steps} must be a multiple of 4, and its half of --checkpoints {args.checkpoints} less one, which are "
            "at least 2."
        )
    wrong = [name for name in args.runs if not RUN.fullmatch(name)]
    if wrong:
        parser.error(f"--runs {' '.join(wrong)}: a run is PROCESS-TARGET[@LEVELS], such as {' '.join(RUNS[-4:])}.")
    return args


def evaluated_steps(args: argparse.Namespace) -> range:
    half = args.steps // 2
    return range(half, args.steps + 1, half // (args.checkpoints - 1))


@dataclass(frozen=True)
class Run:
    """A training: its name among `--runs`, and its seed."""

    name: str
    seed: int

    def folder(self, args: argparse.Namespace) -> Path:
        return Path(args.output_dir / "runs" / f"{self.name}-{self.seed}")

    def command(self, args: argparse.Namespace) -> list[str]:
        """The trainer and its flags."""
        what, _, levels = self.name.partition("@")
        process, target = what.split("-")
        flags = ["--train_batch_size", "64", "--max_train_steps", str(args.steps), "--seed", str(self.seed)]
        flags += ["--checkpointing_steps", str(min(args.steps // 4, evaluated_steps(args).step)), "--report_to", "none"]
        flags += ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", str(args.steps // 20)]
        flags += ["--learning_rate", str(args.learning_rate), "--model_config", args.preset or str(network(args))]
        flags += ["--dataset_name", args.dataset_name] if args.dataset_name else []
        flags += ["--mixed_precision", "bf16"] if args.preset else []
        flags += ["--noise_process", process, *(["--sigma_data", "auto"] if process == "edm" else [])]
        flags += ["--objective", "dsm"] if target == "dsm" else ["--reference", "bank"]
        if levels.startswith("adaptive"):
            flags += ["--noise_distribution", "adaptive"]
            flags += ["--importance_weights"] if levels == "adaptive-weighted" else []
        elif levels == "profile":
            flags += ["--noise_distribution", "profile"]
        elif levels:
            middle, deviation = levels.split(",")
            flags += ["--noise_distribution", "log_normal", f"--noise_mean={middle}", f"--noise_std={deviation}"]
        return [str(TRAINER), *flags]


def averaged(run: Run, step: int, args: argparse.Namespace) -> STFPipeline:
    """The pipeline of a checkpoint's averaged weights."""
    folder = run.folder(args)
    pipeline = STFPipeline.from_pretrained(folder).to(DEVICE)
    network_of(pipeline).load_state_dict(load_file(folder / f"checkpoint-{step}" / AVERAGE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples_of(pipeline: STFPipeline, count: int, batch: int) -> list[Image.Image]:
    """Images of the seeds 0 to `count` - 1 in 35 evaluations."""
    samples: list[Image.Image] = []
    for first in range(0, count, batch):
        seeds = range(first, min(first + batch, count))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        samples += pipeline(
            batch_size=len(seeds), generator=generators, num_inference_steps=18, solver="heun", return_dict=False
        )[0]
    return samples


@torch.no_grad()
def evaluate(
    run: Run, step: int, args: argparse.Namespace, extractor: FeatureExtractor, data: Tensor
) -> dict[str, Any]:
    pipeline = averaged(run, step, args)
    samples = samples_of(pipeline, args.num_samples, 100 if args.preset is None else 500)
    distance = frechet_distance(FeatureStatistics.of(extractor(as_pixels(samples))), data_statistics(data))
    lines = [json.loads(line) for line in (run.folder(args) / METRICS).read_text().splitlines()]
    rates = sorted(line["images_per_second"] for line in lines if line.get("images_per_second"))
    return {"run": run.name, "seed": run.seed, "step": step, "distance": distance, "images_per_second": rates[len(rates) // 2]}  # fmt: skip


def levels_drawn(run: Run, step: int, args: argparse.Namespace, process: NoiseProcess) -> NoiseDistribution | None:
    """What a run drew its noise levels from at a checkpoint; None: the process's own."""
    config = read_metadata(run.folder(args)).get("noise_distribution")
    if not config or config["name"] != "adaptive":
        return distribution_from_config(config) if config else None
    distribution = AdaptiveNoise(process, power=config["power"], floor=config["floor"], device=DEVICE)
    distribution.load_state_dict(load_file(run.folder(args) / f"checkpoint-{step}" / ADAPTIVE_LEVELS))
    return distribution


def edm_runs(args: argparse.Namespace) -> list[str]:
    return [name for name in args.runs if name.startswith("edm-")]


def gradient_noise(name: str, args: argparse.Namespace, images: ImageColumn) -> dict[str, Any]:
    """Noise of the gradient as drawn, by the target and the levels of an EDM run.

    Trace of the covariance of the gradient of batches of 16 images, over 64 batches, and the squared norm of its mean; for all
    runs in the half-trained network of the first EDM run's seed 0.
    """
    batch_size, num_batches = 16, 64
    pipeline = averaged(Run(edm_runs(args)[0], 0), args.steps // 2, args)
    assert images.images is not None  # decoded without a budget
    trained, pixels = network_of(pipeline), images.images.to(DEVICE)
    distribution = levels_drawn(Run(name, 0), args.steps // 2, args, pipeline.process)
    objective = STFTrainingObjective(pipeline.process, distribution=distribution)
    bank = ReferenceBank(pixels) if "-stf" in name else None
    draws, gradients = torch.Generator(DEVICE).manual_seed(0), []
    for _ in range(num_batches):
        rows = torch.randperm(len(pixels), generator=draws, device=DEVICE)[:batch_size]
        references: dict[str, Any] = {"reference": bank, "source_index": rows} if bank else {}
        perturbed = objective.perturb(pixels[rows], generator=draws, **references)
        weights = None
        if isinstance(distribution, AdaptiveNoise) and name.endswith("weighted"):
            weights = distribution.importance_weights(perturbed.sigma / perturbed.alpha)
        output = trained(perturbed.model_input, perturbed.timestep).sample
        loss = objective.loss(output, perturbed, weights)
        parts = torch.autograd.grad(loss, list(trained.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]).cpu())
    stacked = torch.stack(gradients).double()
    noise, norm = float(stacked.var(0).sum()), float(stacked.mean(0).square().sum())
    return {"run": name, "gradient_noise": noise, "gradient_norm_squared": norm}


def report(args: argparse.Namespace) -> None:
    """results.md and the figures."""
    results = [json.loads(path.read_text()) for path in sorted((args.output_dir / "evaluations").glob("*.json"))]
    noise = {
        name: json.loads((args.output_dir / f"noise-{name}.json").read_text())["gradient_noise"]
        for name in edm_runs(args)
    }
    steps, first = evaluated_steps(args), next(iter(noise), "")

    def select(name: str, step: int, key: str = "distance") -> list[float]:
        found = [row for row in results if (row["run"], row["step"]) == (name, step)]
        return [row[key] for row in sorted(found, key=lambda row: row["seed"])]

    def curves(name: str) -> list[list[float]]:
        """Of each seed, the distances at the evaluated steps."""
        return [list(curve) for curve in zip(*(select(name, step) for step in steps), strict=True)]

    heads = [f"{64 * step:,} images{what}" for step in (steps[0], steps[-1]) for what in ("", " minus DSM's")]
    heads += ["of DSM's images", *(["between checkpoints"] if args.checkpoints > 3 else [])]
    heads += ["images / s", *([f"gradient noise / {first}'s"] if noise else [])]
    lines = [
        f"Squared Fréchet distance of {args.num_samples} samples in 35 evaluations; seeds 0 to {args.seeds - 1}.", "",
        "| run | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|",
    ]  # fmt: skip
    for name in args.runs:
        cells, dsm = [name], f"{name.split('-')[0]}-dsm"
        for step in (steps[0], steps[-1]):
            values = select(name, step)
            differences = [value - other for value, other in zip(values, select(dsm, step), strict=False)]
            cells += [spread(values), spread(differences, error=True) if differences and name != dsm else ""]
        pairs = list(zip(curves(name), select(dsm, args.steps), strict=False))
        cells += [shares(steps, pairs) if name != dsm else ""]
        if args.checkpoints > 3:
            cells += [spread([variation(steps, curve) for curve in curves(name)])]
        cells += [f"{mean(select(name, args.steps, 'images_per_second')):.0f}"]
        if noise:
            cells += [f"{noise[name] / noise[first]:.3f}" if name in noise else ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "± is the standard deviation over seeds; of differences and shares, the standard error of their mean.",
    ]
    lines += [
        "of DSM's images: the share of them that a run needs for the distance that DSM of its process and seed has at the end."
    ]
    if args.checkpoints > 3:
        lines += ["between checkpoints: the standard deviation of ln(distance) about a parabola in ln(images)."]
    (args.output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    draw_distances(args, results)
    draw_samples(args)


def shares(steps: Sequence[int], pairs: Sequence[tuple[Sequence[float], float]]) -> str:
    """What share of the last of the steps it takes to wanted distances, mean and standard error.

    Linear between steps in the logarithms of both. Runs that have the distance at the first step already, or never, are counted.

    Args:
        steps: where distances were measured.
        pairs: of each seed, the distances and the wanted one.
    """
    between = [share_of_images(steps, curve, wanted) for curve, wanted in pairs if curve[0] > wanted >= min(curve)]
    early = sum(curve[0] <= wanted for curve, wanted in pairs)
    never = len(pairs) - len(between) - early
    found = [spread(between, error=True)] if between else []
    found += [f"{early} below {steps[0] / steps[-1]:.2g}"] if early else []
    return ", ".join(found + ([f"{never} not reached"] if never else []))


def share_of_images(steps: Sequence[int], distances: Sequence[float], wanted: float) -> float:
    """That of one curve, which first is above the wanted distance, and then is not."""
    i = next(i for i, distance in enumerate(distances) if distance <= wanted)
    done = math.log(distances[i - 1] / wanted) / math.log(distances[i - 1] / distances[i])
    return steps[i - 1] / steps[-1] * (steps[i] / steps[i - 1]) ** done


def variation(steps: Sequence[int], distances: Sequence[float]) -> float:
    """The standard deviation of ln(distance) about its best parabola in ln(step)."""
    places = torch.tensor(steps, dtype=torch.float64).log()
    values = torch.tensor(distances, dtype=torch.float64).log()
    powers = (places - places.mean())[:, None] ** torch.arange(3)
    rest = values - powers @ torch.linalg.lstsq(powers, values[:, None]).solution[:, 0]
    return math.sqrt(float(rest.square().sum()) / (len(steps) - 3))


def draw_distances(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Mean distances of each run against images seen and against seconds of training, a panel for each process."""
    from matplotlib.figure import Figure

    processes = list(dict.fromkeys(name.split("-")[0] for name in args.runs))
    figure = Figure(figsize=(4 * len(processes), 6), layout="constrained")
    panels = figure.subplots(2, len(processes), squeeze=False)
    for column, process in enumerate(processes):
        for name in (name for name in args.runs if name.split("-")[0] == process):
            found = [row for row in results if row["run"] == name]
            steps = sorted({row["step"] for row in found})
            distances = [mean(row["distance"] for row in found if row["step"] == step) for step in steps]
            rate = mean(row["images_per_second"] for row in found)
            style = {"marker": "o", "color": "tab:red" if "-dsm" in name else "tab:blue", "label": name}
            style["linestyle"] = {"": "-", "profile": "--"}.get(name.partition("@")[2], ":")
            panels[0][column].plot([64 * step for step in steps], distances, **style)
            panels[1][column].plot([64 * step / rate for step in steps], distances, **style)
        panels[0][column].set(xlabel="images seen", title=process.upper())
        panels[1][column].set(xlabel="seconds of training")
        panels[0][column].legend(frameon=False, fontsize=8)
    for row in panels:
        row[0].set_ylabel("squared Fréchet distance")
    figure.savefig(args.output_dir / "distance.png", dpi=110)


def draw_samples(args: argparse.Namespace, count: int = 12, width: int = 40) -> None:
    """Rows of samples of the same seeds, by the models of seed 0."""
    picture = Image.new("RGB", (130 + count * width, len(args.runs) * width), "white")
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(args.runs):
        pen.text((4, row * width + 14), name, fill="black")
        for column, image in enumerate(samples_of(averaged(Run(name, 0), args.steps, args), count, count)):
            enlarged = image.resize((width - 2, width - 2), Image.Resampling.NEAREST)
            picture.paste(enlarged, (130 + column * width, row * width))
    picture.save(args.output_dir / "samples.png")


def main() -> None:
    args = parse_args()
    # More seeds and runs only add to what there is.
    settings = {
        name: value for name, value in vars(args).items() if name not in ("output_dir", "minutes", "seeds", "runs")
    }
    path = args.output_dir / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(name, value) != value for name, value in settings.items()):
        raise ValueError(f"{args.output_dir} was begun with {before}; got {settings}. Choose another --output_dir.")
    write(path, settings)
    deadline = time.monotonic() + 60 * args.minutes
    runs = [Run(name, seed) for seed in range(args.seeds) for name in args.runs]
    for run in runs:
        if time.monotonic() > deadline or not train(run.folder(args), args.steps, run.command(args), deadline):
            print(f"Stopped in {run.folder(args).name}. Call again.")
            return
    extractor = transformers_features(train_extractor(args.output_dir, args.dataset_name), device=DEVICE)
    images = load_images(args.dataset_name)
    data = data_features(images, extractor, None, quiet=True)
    work: list[tuple[Path, Any]] = [
        (args.output_dir / f"noise-{name}.json", lambda name=name: gradient_noise(name, args, images))
        for name in edm_runs(args)
    ]
    for run in runs:
        for step in evaluated_steps(args):
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
