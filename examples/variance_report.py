#!/usr/bin/env python
"""How much variance is there in the training targets, at which noise levels, and how many references remove it?

    python examples/variance_report.py --output_dir variance-digits
    python examples/variance_report.py --dataset_name cifar10 --max_images 5000 --output_dir variance-cifar10

Writes `index.html`, a page that needs no other file, its figures as PNG files, the numbers as `variance.json`, and the noise
levels that it recommends as `noise_distribution.json`, for --noise_distribution of the training script. The
measurement needs matplotlib, but neither a network nor training.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stf_diffusers.noise import NOISE_PROCESSES
from stf_diffusers.training.command_line import Parser, errors_in_flags, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_name",
        help="A data set on the Hub, a local folder or a file, as for the training script. Default, without "
        "--train_data_dir: scikit-learn's handwritten digits.",
    )
    parser.add_argument("--dataset_config_name", help="The configuration of the data set, if it has several.")
    parser.add_argument("--train_data_dir", help="A folder of images, instead of --dataset_name.")
    parser.add_argument("--split", default="train", help="Split to measure.")
    parser.add_argument("--cache_dir", help="Folder for downloaded data sets.")
    parser.add_argument("--image_column", help="Name of the image column; detected if there is only one.")
    parser.add_argument(
        "--label_column", help="Name of the class-label column, for --class_conditional; detected if there is only one."
    )
    parser.add_argument("--class_conditional", action="store_true", help="Measure the variance given the class.")
    parser.add_argument(
        "--resolution",
        type=int,
        nargs="+",
        metavar=("SIDE", "WIDTH"),
        help="Side length, or height and width, to which images are resized and cropped. Default: the images' own.",
    )
    parser.add_argument(
        "--skip_corrupt", action="store_true", help="Leave out images that are missing or cannot be decoded."
    )
    parser.add_argument(
        "--image_mode",
        choices=["L", "RGB", "RGBA"],
        help="Mode to which images are converted. Default: L for greyscale images, RGB for others.",
    )
    parser.add_argument(
        "--max_images", type=int, default=5000, help="Number of images, drawn from the data set at random."
    )
    parser.add_argument("--noise_process", choices=list(NOISE_PROCESSES), default="edm", help="Noise process.")
    parser.add_argument("--p_mean", type=float, help="EDM: mean of ln(sigma) in training. Default: -1.2.")
    parser.add_argument("--p_std", type=float, help="EDM: standard deviation of ln(sigma) in training. Default: 1.2.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the report.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed for the choice of images and the noise.")
    parser.add_argument(
        "--reference_batch_sizes",
        type=int,
        nargs="+",
        default=[16, 64, 256, 1024, 4096],
        help="Values of n to measure; those above the number of images are left out.",
    )
    parser.add_argument("--num_samples", type=int, default=128, help="Number of draws of x_t at each noise level.")
    parser.add_argument(
        "--num_levels", type=int, default=20, help="Number of noise levels sigma / alpha, evenly spaced on a log scale."
    )
    parser.add_argument("--min_noise_level", type=float, default=0.1, help="Smallest noise level.")
    parser.add_argument("--max_noise_level", type=float, default=80.0, help="Largest noise level.")
    parser.add_argument("--quiet", action="store_true", help="Show no progress bars.")
    args = parser.parse_args(argv)
    if args.dataset_name is not None and args.train_data_dir is not None:
        parser.error("--dataset_name and --train_data_dir exclude each other.")
    least = {"max_images": 2, "num_samples": 2, "num_levels": 2, "seed": 0}
    for name, minimum in least.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}; got {getattr(args, name)}.")
    if min(args.reference_batch_sizes) < 1:
        parser.error(f"--reference_batch_sizes must be at least 1; got {min(args.reference_batch_sizes)}.")
    if not 0 < args.min_noise_level < args.max_noise_level < math.inf:
        parser.error("--min_noise_level must be positive and below --max_noise_level, which is finite.")
    return args


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from stf_diffusers import ReferenceBank, __version__, target_variance
from stf_diffusers.diagnostics import TargetVariance
from stf_diffusers.files import replacing
from stf_diffusers.forward_process import NoiseProcess
from stf_diffusers.noise_distribution import distribution_to_config
from stf_diffusers.noise_profile import entropy_rate, recommended_distribution, undecided_variance
from stf_diffusers.training.data_set import find_image_column, find_label_column, load_split, read_labels
from stf_diffusers.training.image_column import with_images, without_corrupt
from stf_diffusers.training.image_reader import decode_all, make_reader
from stf_diffusers.training.run_folder import check_writable
from stf_diffusers.variance_report import MeasuredData, advise, draw, report_page, without_nan


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor | None, MeasuredData]:
    """`--max_images` images, uint8 (N, C, H, W), drawn at random by `--seed`; their labels; and what the report says of them.

    Raises:
        ValueError: no such data, image or label column; images that differ in size or mode, or are not square.
    """
    dataset = load_split(
        args.dataset_name, args.dataset_config_name, args.train_data_dir, cache_dir=args.cache_dir, split=args.split
    )
    column = find_image_column(dataset, args.image_column)
    dataset = with_images(dataset, column)
    if args.skip_corrupt:
        dataset = without_corrupt(dataset, column)
    labels = None
    if args.class_conditional:
        labels = torch.tensor(read_labels(dataset, find_label_column(dataset, args.label_column)).values)
    available = len(dataset)
    if available > args.max_images:
        rows = np.sort(np.random.default_rng(args.seed).choice(available, args.max_images, replace=False))
        dataset = dataset.select(rows.tolist())
        labels = None if labels is None else labels[torch.from_numpy(rows)]
    reader = make_reader(dataset, column, args.image_mode, args.resolution, center_crop=True)
    images = decode_all(dataset, column, reader, math.inf, args.quiet)
    if images is None or len(images) < 2:
        raise ValueError(f"the data set has {len(dataset)} images, and a variance needs two or more.")
    source = args.dataset_name or args.train_data_dir
    name = Path(source).name if source else "scikit-learn's digits"
    shape = tuple(images.shape[1:])
    return (
        images,
        labels,
        MeasuredData(name, len(images), available, shape, labels is not None, args.noise_process, args.seed),
    )


def make_process(args: argparse.Namespace) -> NoiseProcess:
    """The process with its defaults, and the noise distribution of the flags.

    Raises:
        ValueError: a flag that the process does not have, or a value out of its range.
    """
    given = {name: getattr(args, name) for name in ("p_mean", "p_std") if getattr(args, name) is not None}
    if given and args.noise_process != "edm":
        raise ValueError(
            f"--{next(iter(given))} is not a parameter of --noise_process {args.noise_process}; leave it out."
        )
    try:
        return NOISE_PROCESSES[args.noise_process](**given)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def measure(args: argparse.Namespace, process: NoiseProcess, bank: ReferenceBank) -> list[TargetVariance]:
    """The variance at each noise level, in ascending order.

    Raises:
        ValueError: the process has no time for `--max_noise_level`, or fewer images than any n.
    """
    levels = torch.logspace(
        math.log10(args.min_noise_level), math.log10(args.max_noise_level), args.num_levels, dtype=torch.float64
    )
    times = process.time_of(levels)
    if float(times[-1]) > process.last_time:
        last = torch.tensor([process.last_time], dtype=torch.float64)
        raise ValueError(
            f"--max_noise_level {args.max_noise_level:g} is beyond the last time of --noise_process {args.noise_process}, "
            f"{float(process.sigma(last) / process.alpha(last)):.4g}."
        )
    sizes = [n for n in args.reference_batch_sizes if n <= len(bank)]
    if not sizes:
        raise ValueError(f"--reference_batch_sizes: there are {len(bank)} images, fewer than any n.")
    generator = torch.Generator().manual_seed(args.seed)
    settings: dict[str, Any] = {"reference_batch_sizes": sizes, "num_samples": args.num_samples}
    found = []
    for moment in tqdm(times.tolist(), desc="Measuring variances", unit="level", disable=args.quiet):
        found += target_variance(process, bank, [moment], generator=generator, **settings)
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    begun = time.perf_counter()
    process = make_process(args)
    with errors_in_flags(vars(args)):
        check_writable(args.output_dir)
        images, labels, data = load_images(args)
    bank = ReferenceBank(images, labels, device="cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(args, process, bank)
    times = process.sample_t(100_000, generator=torch.Generator().manual_seed(args.seed))
    drawn = process.sigma(times) / process.alpha(times)
    advice = advise(rows, drawn)
    # Where all levels tell their source there is nothing to recommend.
    recommended = recommended_distribution(rows, drawn) if any(entropy_rate(rows)) else None
    by_variance = None
    if any(undecided := undecided_variance(rows)):
        by_variance = recommended_distribution(rows, drawn, profile=undecided)
    pictures = draw(rows, drawn, recommended, by_variance)
    command = shlex.join(["python", "examples/variance_report.py", *(sys.argv[1:] if argv is None else argv)])
    versions = f"stf_diffusers {__version__}, torch {torch.__version__}"
    numbers = {"command": command, "advice": asdict(advice), "rows": [asdict(row) for row in rows]}
    contents = {picture.name: picture.png for picture in pictures}
    contents["variance.json"] = json.dumps(without_nan(numbers), indent=1).encode()
    contents["index.html"] = report_page(data, rows, advice, recommended, pictures, command, versions).encode()
    for name, found in (("noise_distribution", recommended), ("noise_distribution_variance", by_variance)):
        if found is not None:
            contents[f"{name}.json"] = json.dumps(distribution_to_config(found), indent=1).encode()
    for name, content in contents.items():
        with replacing(args.output_dir / name) as file:
            file.write_bytes(content)
    count = f"n = {advice.n}" if advice.n else "all images"
    seconds = time.perf_counter() - begun
    print(f"{args.output_dir / 'index.html'}: {count} recommended; {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
