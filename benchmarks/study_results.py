"""The trainings of `study_cifar10.py`, and the table and figures of their results."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any


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
    sizes: tuple[int | None, ...] = (0, 256, 1024, *(() if args.dataset_name is None else (4096,)), None)
    if args.all_or_none:
        sizes = (0, None)
    return [Training(process, n, seed) for seed, process, n in product(range(args.seeds), args.processes, sizes)]


def evaluated_steps(args: argparse.Namespace) -> list[int]:
    return [args.steps // 4, args.steps // 2, args.steps]


def report(args: argparse.Namespace) -> None:
    """results.md and the figures."""
    results = [json.loads(path.read_text()) for path in sorted((args.output_dir / "evaluations").glob("*.json"))]
    noise = [
        row for process in args.processes for row in json.loads((args.output_dir / f"noise-{process}.json").read_text())
    ]
    lines = [f"{results[0]['measured']}; seeds of training 0 to {args.seeds - 1}, {64 * args.steps:,} images seen.", ""]
    lines += [
        "| process | target | distance | minus DSM's of the same seed | kernel distance | precision | recall | copies | images / s |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for process, n in dict.fromkeys((run.process, run.references) for run in trainings(args)):
        rows = select(results, process, n, args.steps)
        pairs = zip(rows, select(results, process, 0, args.steps), strict=True)
        differences = [row["frechet_distance"] - dsm["frechet_distance"] for row, dsm in pairs]
        cells = [process.upper(), rows[0]["target"], spread([row["frechet_distance"] for row in rows])]
        cells += [spread(differences, error=True) if n != 0 else ""]
        cells += [spread([row[name] for row in rows]) for name in ("kernel_distance", "precision", "recall", "copies")]
        cells += [f"{median([row['images_per_second'] for row in rows]):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "± is the standard deviation over seeds; of differences, the standard error of their mean.", ""]
    lines += [
        "| process | noise level | target | gradient noise / DSM's | variance of the loss / DSM's | loss / DSM's |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in noise:
        if row["references"] != 0:
            dsm = next(
                r for r in noise if (r["process"], r["level"], r["references"]) == (row["process"], row["level"], 0)
            )
            level = "as trained" if row["level"] is None else f"{row['level']:.2f}"
            target = Training(row["process"], row["references"], 0).target
            ratios = [f"{row[name] / dsm[name]:.3f}" for name in ("gradient_noise", "loss_variance", "loss")]
            lines.append("| " + " | ".join([row["process"].upper(), level, target, *ratios]) + " |")
    (args.output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(args, results, noise)


def select(results: list[dict[str, Any]], process: str, n: int | None, step: int) -> list[dict[str, Any]]:
    """Those of all seeds, in order."""
    wanted = (process, n, step)
    found = [row for row in results if (row["process"], row["references"], row["step"]) == wanted]
    return sorted(found, key=lambda row: row["seed"])


def spread(values: list[float], error: bool = False) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ± {stdev(values) / (math.sqrt(len(values)) if error else 1):.2g}"


def draw(args: argparse.Namespace, results: list[dict[str, Any]], noise: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(run.references for run in trainings(args)))
    colours = {n: f"C{place}" for place, n in enumerate(targets)}
    for name, label in (("images", "images seen"), ("time", "seconds of training")):
        figure = Figure(figsize=(4 * len(args.processes), 3.6), layout="constrained")
        for process, axis in zip(
            args.processes, figure.subplots(1, len(args.processes), squeeze=False)[0], strict=True
        ):
            for n in targets:
                steps = [select(results, process, n, step) for step in evaluated_steps(args)]
                seen = [64 * step for step in evaluated_steps(args)]
                if name == "time":
                    rate = median([row["images_per_second"] for row in steps[-1]])
                    seen = [images / rate for images in seen]
                values = [[row["frechet_distance"] for row in group] for group in steps]
                axis.plot(
                    seen, [mean(group) for group in values], color=colours[n], label=steps[0][0]["target"], marker="o"
                )
                axis.fill_between(
                    seen, [min(v) for v in values], [max(v) for v in values], color=colours[n], alpha=0.15
                )
            axis.set(title=process.upper(), xlabel=label, yscale="log")
        figure.axes[0].set_ylabel("Fréchet distance (range over seeds)")
        figure.axes[0].legend(frameon=False)
        figure.savefig(args.output_dir / f"distance_against_{name}.png", dpi=110)
    figure = Figure(figsize=(4 * len(args.processes), 6.4), layout="constrained")
    axes = figure.subplots(2, len(args.processes), sharex=True, squeeze=False)
    for column, process in enumerate(args.processes):
        for n in targets:
            rows = [
                row for row in noise if (row["process"], row["references"]) == (process, n) and row["level"] is not None
            ]
            for axis, quantity in zip(axes[:, column], ("gradient_noise", "loss_variance"), strict=True):
                label = Training(process, n, 0).target
                axis.plot(
                    [row["level"] for row in rows], [row[quantity] for row in rows], color=colours[n], label=label
                )
                axis.set(xscale="log", yscale="log")
        axes[0, column].set_title(process.upper())
        axes[1, column].set_xlabel("noise level sigma / alpha")
    axes[0, 0].set_ylabel("gradient: trace of the covariance")
    axes[1, 0].set_ylabel("loss: variance over batches")
    axes[0, 0].legend(frameon=False)
    figure.savefig(args.output_dir / "noise.png", dpi=110)
