#!/usr/bin/env python
"""Generate many images from a trained pipeline, on any number of processes, and continue where it stopped.

    accelerate launch examples/generate.py --model digits-stf --output_dir digits-samples --num_images 50000

Image k is a function of the model, the settings and seed + k alone: not of the batch size, the number of processes or
of interruptions. Each is written as one PNG file, complete or not at all; `--npz` packs them into one array at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from stf_diffusers import STFPipeline

SETTINGS = "settings.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A folder or a Hub repository.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="Of the first image; image k has seed + k.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time on each process.")
    parser.add_argument("--num_inference_steps", type=int, default=18)
    parser.add_argument("--solver", choices=["heun", "euler", "rk45", "scheduler"], default="heun")
    parser.add_argument("--class_label", type=int, help="One class. Default for conditional models: all in turn.")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--npz", action="store_true", help="Pack `images` (N, H, W, C) and `labels` into samples.npz.")
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}.")
    if args.seed < 0:
        parser.error(f"--seed must not be negative; got {args.seed}.")
    return args


def image_path(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:06d}.png"


def check_settings(args: argparse.Namespace) -> dict[str, object]:
    """What decides an image; a folder begun with other settings is refused.

    Raises:
        ValueError: the folder holds images of another model or of other settings.
    """
    names = ("model", "seed", "num_inference_steps", "solver", "class_label", "guidance_scale")
    settings = {name: getattr(args, name) for name in names}
    path = args.output_dir / SETTINGS
    if path.is_file() and (before := json.loads(path.read_text())) != settings:
        differing = [
            f"{name} ({before.get(name)} there, {value} now)"
            for name, value in settings.items()
            if before.get(name) != value
        ]
        raise ValueError(
            f"{args.output_dir} was begun with other settings: {'; '.join(differing)}. Choose another folder."
        )
    return settings


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = PartialState()
    settings = check_settings(args)
    pipeline = STFPipeline.from_pretrained(args.model).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    classes = pipeline.unet.config["num_class_embeds"]
    if args.class_label is not None and (classes is None or not 0 <= args.class_label < classes):
        raise ValueError(f"--class_label {args.class_label}: the model knows {classes or 'no'} classes.")
    if state.is_main_process:
        (args.output_dir / "images").mkdir(parents=True, exist_ok=True)
        (args.output_dir / SETTINGS).write_text(json.dumps(settings, indent=2))
    state.wait_for_everyone()

    def label(index: int) -> int:
        return args.class_label if args.class_label is not None else (args.seed + index) % (classes or 1)

    missing = [index for index in range(args.num_images) if not image_path(args.output_dir, index).exists()]
    state.wait_for_everyone()  # every process has looked before one writes
    mine = missing[state.process_index :: state.num_processes]
    progress = tqdm(total=len(mine), desc="Generating", unit="image", disable=not state.is_local_main_process)
    for start in range(0, len(mine), args.batch_size):
        indices = mine[start : start + args.batch_size]
        images = pipeline(
            batch_size=len(indices),
            num_inference_steps=args.num_inference_steps,
            class_labels=None if classes is None else [label(index) for index in indices],
            guidance_scale=args.guidance_scale,
            solver=args.solver,
            generator=[torch.Generator().manual_seed(args.seed + index) for index in indices],
        ).images
        for index, image in zip(indices, images, strict=True):
            path = image_path(args.output_dir, index)
            partial = path.with_suffix(".partial")
            image.save(partial, format="PNG")
            os.replace(partial, path)
        progress.update(len(indices))
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        count = min(64, args.num_images)
        columns = math.isqrt(count)
        shown = [Image.open(image_path(args.output_dir, index)) for index in range(columns * columns)]
        make_image_grid(shown, columns, columns).save(args.output_dir / "grid.png")
        if args.npz:
            arrays = [np.asarray(Image.open(image_path(args.output_dir, index))) for index in range(args.num_images)]
            packed = np.stack(arrays).reshape(args.num_images, *arrays[0].shape[:2], -1)
            labels = np.array([label(index) for index in range(args.num_images)])
            np.savez(args.output_dir / ".partial.npz", images=packed, labels=labels)
            os.replace(args.output_dir / ".partial.npz", args.output_dir / "samples.npz")


if __name__ == "__main__":
    main()
