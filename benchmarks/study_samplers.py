#!/usr/bin/env python
"""The samplers of the paper's largest gains, RK45 and the predictor-corrector on VE, with and without STF.

    # after study_noise_levels.py with --runs ... ve-dsm ve-stf, on its output_dir; a minute for 1,000 samples of the digits by
    # one sampler, 4 at 16x16 and RK45, 9 by the predictor-corrector
    python benchmarks/study_samplers.py --output_dir study-levels-digits --steps 1000 --minutes 9

Each call goes on where the last one stopped. Samples of all runs start from the same noise: 18 steps of Heun's method on Karras
et al.'s noise levels (35 evaluations), RK45 at the tolerance of Song et al. 2021 (1e-5), and their predictor-corrector with 250
levels and one corrector step at each (500 evaluations; they have 1,000 levels). The last call writes samplers.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from study_cifar10 import data_statistics, load_images, train_extractor, write
from study_noise_levels import DEVICE, Run, averaged
from study_results import spread
from torch import Tensor

from stf_diffusers import VE, STFPipeline
from stf_diffusers.denoising import network_denoiser
from stf_diffusers.export import network_of
from stf_diffusers.feature_extractors import FeatureExtractor, transformers_features
from stf_diffusers.metrics import FeatureStatistics, frechet_distance
from stf_diffusers.pipeline_stf import STFPipelineOutput
from stf_diffusers.sde import sample_predictor_corrector
from stf_diffusers.training.evaluation import data_features

SAMPLERS = ("heun", "rk45", "predictor_corrector")
LEVELS = 250


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="That of study_noise_levels.py.")
    parser.add_argument("--dataset_name", help="As in that study.")
    parser.add_argument("--steps", type=int, default=4000, help="As in that study: the step of the weights.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=["ve-dsm", "ve-stf", "ve-stf@profile"], help="Runs on VE.")
    parser.add_argument("--num_samples", type=int, default=1000, help="For each distance.")
    parser.add_argument(
        "--minutes", type=float, default=9, help="Stop after this time, at the latest ten minutes later."
    )
    return parser.parse_args(argv)


def samples_of(pipeline: STFPipeline, sampler: str, seeds: Sequence[int]) -> tuple[Tensor, int]:
    """uint8 images (B, C, H, W) of these seeds, and the number of evaluations."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if sampler != "predictor_corrector":
        found = cast(
            STFPipelineOutput,
            pipeline(batch_size=len(seeds), generator=generators, solver=cast(Any, sampler), output_type="pt"),
        )
        return as_uint8(2 * found.images - 1), found.num_evaluations
    process, network = pipeline.process, network_of(pipeline)
    assert isinstance(process, VE)
    latents = pipeline._initial_noise(len(seeds), generators, None)
    images = sample_predictor_corrector(
        network_denoiser(network, process), latents, num_steps=LEVELS, sigma_min=process.sigma_min,
        sigma_max=process.sigma_max, generator=generators,
    )  # fmt: skip
    return as_uint8(images), 2 * LEVELS


def as_uint8(images: Tensor) -> Tensor:
    """Pixels of images in [-1, 1]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@torch.no_grad()
def evaluate(
    run: Run, sampler: str, args: argparse.Namespace, extractor: FeatureExtractor, data: Tensor
) -> dict[str, Any]:
    pipeline, parts, evaluations = averaged(run, args.steps, args), [], []
    for first in range(0, args.num_samples, 100):
        images, count = samples_of(pipeline, sampler, range(first, min(first + 100, args.num_samples)))
        parts.append(extractor(images))
        evaluations.append(count)
    distance = frechet_distance(FeatureStatistics.of(torch.cat(parts)), data_statistics(data))
    return {"run": run.name, "seed": run.seed, "sampler": sampler, "distance": distance, "evaluations": mean(evaluations)}  # fmt: skip


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """samplers.md."""
    first = args.runs[0]
    lines = [
        f"Squared Fréchet distance of {args.num_samples} samples; seeds 0 to {args.seeds - 1}.", "",
        f"| sampler | run | evaluations | distance | minus {first}'s |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for sampler in SAMPLERS:
        for name in args.runs:
            rows, others = (
                sorted(
                    (row for row in results if (row["run"], row["sampler"]) == (which, sampler)),
                    key=lambda row: row["seed"],
                )
                for which in (name, first)
            )
            differences = [row["distance"] - other["distance"] for row, other in zip(rows, others, strict=True)]
            cells = [sampler, name, f"{mean(row['evaluations'] for row in rows):.0f}"]
            cells += [spread([row["distance"] for row in rows])]
            cells += [spread(differences, error=True) if name != first else ""]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "± is the standard deviation over seeds; of differences, the standard error of their mean."]
    (args.output_dir / "samplers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    extractor = transformers_features(train_extractor(args.output_dir, args.dataset_name), device=DEVICE)
    data = data_features(load_images(args.dataset_name), extractor, None, quiet=True)
    results = []
    for sampler in SAMPLERS:
        for run in [Run(name, seed) for seed in range(args.seeds) for name in args.runs]:
            path = (
                args.output_dir / "samplers" / f"{run.folder(args).name}-{args.steps}-{sampler}-{args.num_samples}.json"
            )
            if not path.exists():
                if time.monotonic() > deadline:
                    print(f"Stopped before {path.name}. Call again.")
                    return
                write(path, evaluate(run, sampler, args, extractor, data))
            results.append(json.loads(path.read_text()))
    report(results, args)


if __name__ == "__main__":
    main()
