#!/usr/bin/env python
"""Measure samples: distances from the data, precision and recall, and which of them are copies of training images.

    accelerate launch examples/generate.py --model digits-stf --output_dir digits-samples --num_images 1000
    accelerate launch examples/quality_report.py --samples digits-samples --extractor facebook/dinov2-base \\
        --output_dir digits-quality

Writes quality.json, quality.md, and memorization.png, which shows the samples most like a single training image, each
above that image. Every number says what it was measured on. Features of the data are computed
once and kept in Hugging Face's cache.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stf_diffusers.training.command_line import Parser, errors_in_flags, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="Output of generate.py, or a folder of images.")
    parser.add_argument("--extractor", help="Vision model of transformers: a folder or a Hub repository.")
    parser.add_argument(
        "--inception_weights",
        help="File of torch-fidelity's Inception weights, instead of --extractor; for FID and KID.",
    )
    parser.add_argument("--dataset_name", help="The training data, as for the training script. Default: digits.")
    parser.add_argument("--dataset_config_name", help="The configuration of the data set, if it has several.")
    parser.add_argument("--train_data_dir", help="A folder of training images, instead of --dataset_name.")
    parser.add_argument("--image_column", help="Name of the image column; detected if there is only one.")
    parser.add_argument("--split", default="train", help="Split that was trained on; copies are looked for in it.")
    parser.add_argument("--reference_split", help="Split that distances are measured from. Default: --split.")
    parser.add_argument(
        "--skip_corrupt", action="store_true", help="Leave out images that are missing or cannot be decoded."
    )
    parser.add_argument(
        "--random_flip", action="store_true", help="Count copies of flipped images too: the training flipped them."
    )
    parser.add_argument("--sampler", help="How the samples were made, if not by generate.py.")
    parser.add_argument("--seeds", help="Seeds of the samples, if not made by generate.py.")
    parser.add_argument("--batch_size", type=int, default=64, help="Batch size for the extractor.")
    parser.add_argument(
        "--cache_dir", help="Folder for downloaded models and data, and for features. Default: Hugging Face's cache."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the report.")
    args = parser.parse_args(argv)
    if bool(args.extractor) == bool(args.inception_weights):
        parser.error("pass one of --extractor and --inception_weights.")
    if args.dataset_name and args.train_data_dir:
        parser.error("--dataset_name and --train_data_dir exclude each other.")
    args.reference_split = args.reference_split or args.split
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1; got {args.batch_size}.")
    return args


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from torch import Tensor

from stf_diffusers.feature_extractors import FeatureExtractor, inception_features, transformers_features
from stf_diffusers.metrics import NearestNeighbors, nearest_neighbors
from stf_diffusers.quality import sample_quality
from stf_diffusers.training.data_set import load_split
from stf_diffusers.training.evaluation import SMALLEST, data_features, gathered
from stf_diffusers.training.image_data import ImageColumn, open_images
from stf_diffusers.training.run_folder import check_writable
from stf_diffusers.training.sampling import SETTINGS, as_pixels
from stf_diffusers.training.stop_signal import settle_communication


def find_samples(args: argparse.Namespace) -> tuple[list[Path], dict[str, Any]]:
    """The image files, in order, and how they were made.

    Raises:
        ValueError: too few, or nothing says how they were made.
    """
    folder = args.samples / "images" if (args.samples / "images").is_dir() else args.samples
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(paths) < SMALLEST:
        raise ValueError(f"--samples {args.samples}: {len(paths)} images found; at least {SMALLEST} are needed.")
    settings = args.samples / SETTINGS
    if settings.is_file():
        how = json.loads(settings.read_text())
        steps, first = how["num_inference_steps"], how["seed"]
        sampler = f"{how['solver']}, {steps} steps"
        if how.get("sigmas"):
            sampler += f" over {', '.join(f'{sigma:g}' for sigma in how['sigmas'])}"
        if how["guidance_scale"] != 1:
            sampler += f", guidance {how['guidance_scale']:g}"
        if how["class_label"] is not None:
            sampler += f", class {how['class_label']}"
        found = {"sampler": sampler, "seeds": f"{first} to {first + len(paths) - 1}"}
        evaluations = {"heun": 2 * steps - 1, "rk45": None}.get(how["solver"], steps)
        return paths, found | {"evaluations": evaluations}
    if not args.sampler or not args.seeds:
        raise ValueError(f"{args.samples} has no {SETTINGS} to say how they were made: pass --sampler and --seeds.")
    return paths, {"sampler": args.sampler, "seeds": args.seeds, "evaluations": None}


def load(args: argparse.Namespace, split: str, shape: tuple[int, ...], quiet: bool) -> ImageColumn:
    """The images of a split, as large and as coloured as the samples."""
    dataset = load_split(
        args.dataset_name, args.dataset_config_name, args.train_data_dir, cache_dir=args.cache_dir, split=split
    )
    return open_images(
        dataset,
        image_column=args.image_column,
        image_mode={1: "L", 3: "RGB", 4: "RGBA"}[shape[0]],
        resolution=(shape[1], shape[2]),
        center_crop=True,
        skip_corrupt=args.skip_corrupt,
        image_memory_gb=math.inf,
        cache_dir=args.cache_dir,
        quiet=quiet,
    )


def read(paths: list[Path]) -> Tensor:
    """(n, C, H, W) uint8 pixels.

    Raises:
        ValueError: images of different sizes or modes, or that cannot be decoded.
    """
    images = []
    for path in paths:
        try:
            images.append(Image.open(path))
            images[-1].load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be decoded: {error}. Remove it, or generate it again.") from error
    kinds = {(image.size, image.mode) for image in images}
    if len(kinds) > 1 or images[0].mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"samples must be alike in size and in mode, L, RGB or RGBA; got {sorted(kinds)}.")
    return as_pixels(images)


def make_extractor(args: argparse.Namespace, device: torch.device) -> FeatureExtractor:
    if args.inception_weights:
        return inception_features(args.inception_weights, device=device)
    try:
        return transformers_features(args.extractor, device=device, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--extractor {args.extractor} cannot be loaded: {error}") from error


def picture(samples: Tensor, train: Tensor, found: NearestNeighbors, chosen: Tensor) -> Image.Image:
    """The chosen samples, each above its nearest training image, in rows of twelve."""
    pairs = torch.cat([samples[chosen], train[found.neighbor[chosen]]], 2).permute(0, 2, 3, 1).numpy()
    pairs = np.pad(pairs, ((0, 0), (1, 3), (1, 1), (0, 0)), constant_values=255)
    pairs = np.concatenate([pairs, np.full_like(pairs[: -len(pairs) % 12], 255)])
    rows = np.concatenate([np.concatenate(list(row), 1) for row in np.split(pairs, len(pairs) // 12)], 0)
    image = Image.fromarray(rows.squeeze())
    scale = max(1, 64 // samples.shape[-1])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with errors_in_flags(vars(args)):
        report(args)
    settle_communication()


def report(args: argparse.Namespace) -> None:
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_writable(args.output_dir)
    paths, how = find_samples(args)
    samples = read(paths)
    train = load(args, args.split, tuple(samples.shape[1:]), not state.is_main_process)
    same = args.reference_split == args.split
    data = train if same else load(args, args.reference_split, tuple(samples.shape[1:]), not state.is_main_process)
    with state.main_process_first():
        extractor = make_extractor(args, state.device)
    mine = samples[state.process_index :: state.num_processes]
    features = gathered(extractor(mine, args.batch_size))
    references = data_features(data, extractor, args.cache_dir, not state.is_main_process)
    if not state.is_main_process:
        return
    name = args.dataset_name or args.train_data_dir
    quality = sample_quality(
        features,
        references,
        extractor=extractor.name,
        reference=f"{Path(name).name if name else 'the digits'}, {args.reference_split} split",
        **how,
    )
    images = train.__getitems__(list(range(len(train))))["images"]
    if args.random_flip:
        images = torch.cat([images, images.flip(-1)])
    found = nearest_neighbors(samples.flatten(1), images.flatten(1))
    copies = [paths[index].name for index in found.copies().nonzero()[:, 0].tolist()]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    content = asdict(quality) | {"limits": quality.limits, "copies": copies}
    content["ratio_quantiles"] = {str(q): found.ratio.quantile(q).item() for q in (0.0, 0.01, 0.05, 0.25, 0.5)}
    chosen = found.ratio.argsort()[:24]
    content["nearest"] = [
        {
            "sample": paths[index].name,
            "training_image": found.neighbor[index].item() % len(train),
            "mirrored": found.neighbor[index].item() >= len(train),
            "ratio": found.ratio[index].item(),
        }
        for index in chosen.tolist()
    ]
    (args.output_dir / "quality.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))
    picture(samples, images, found, chosen).save(args.output_dir / "memorization.png")
    lines = ["| | |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in quality.rows().items())]
    lines += [f"| Kernel distance, standard error | {quality.kernel_distance.standard_error:.2g} |"]
    lines += ["", *quality.limits, ""] if quality.limits else [""]
    lines += [
        f"Copies: {len(copies)} of {len(paths)} samples are more than three times closer to one image of the training split than to "
        f"any other, in pixels (smallest ratio {found.ratio.min():.3f}; Yoon et al. 2023 draw the line at 1/3). The picture shows the "
        "smallest ratios, each sample above its nearest training image.",
        "",
        "![Samples above their nearest training images](memorization.png)",
    ]
    (args.output_dir / "quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
