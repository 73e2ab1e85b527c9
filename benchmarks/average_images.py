#!/usr/bin/env python
"""Smaller images of a data set, each pixel the mean of a square of pixels: for studies that a CPU can finish.

    python benchmarks/average_images.py --dataset_name cifar10 --factor 2 --output_dir cifar10-16

Writes a Parquet file of PNG images for each split; other columns stay. `--dataset_name cifar10-16` then trains on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from stf_diffusers.training.data_set import find_image_column


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="As for the training script.")
    parser.add_argument("--factor", type=int, default=2, help="Side length of the squares, in pixels.")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    splits = load_dataset(args.dataset_name)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        column = find_image_column(split)

        def averaged(row: dict[str, Any], column: str = column) -> dict[str, Any]:
            return {column: row[column].convert("RGB").reduce(args.factor)}

        path = args.output_dir / f"{name}-00000-of-00001.parquet"
        split.map(averaged, features=split.features, keep_in_memory=True, desc=name).to_parquet(str(path))


if __name__ == "__main__":
    main()
