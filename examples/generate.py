#!/usr/bin/env python
"""Generate many images from a trained pipeline, on any number of processes, and resume where an earlier run stopped.

    accelerate launch examples/generate.py --model digits-stf --output_dir digits-samples --num_images 50000

Image k depends on the model, the settings and seed + k alone, not on the batch size, the number of processes or
interruptions (with `--solver rk45`, up to a multiple of its tolerance). Each image is written as one PNG file, complete
or not at all (as a .npy array unless it has 1, 3 or 4 channels); `--npz` packs them into one array at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

from stf_diffusers.training.command_line import Parser, errors_in_flags, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A saved pipeline: a folder or a Hub repository.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the images.")
    parser.add_argument("--num_images", type=int, default=64, help="Number of images.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed for the first image; image k has seed + k.")
    parser.add_argument("--batch_size", type=int, default=64, help="Batch size per process.")
    parser.add_argument(
        "--num_inference_steps", type=int, help="Number of sampling steps. Default: 18, or 1 for consistency models."
    )
    parser.add_argument(
        "--solver",
        choices=["heun", "euler", "rk45", "scheduler", "consistency"],
        help="Solver of the probability-flow ODE, or few steps of a consistency model. Default: what the model was trained "
        "for, heun or consistency.",
    )
    parser.add_argument(
        "--sigmas",
        type=float,
        nargs="+",
        help="Noise levels between the steps of a consistency model, decreasing. Default: those saved with it.",
    )
    parser.add_argument(
        "--class_label",
        help="Class of all images, its number or its name. Default for conditional models: all classes in turn.",
    )
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="Scale of classifier-free guidance; 1: none.")
    parser.add_argument("--npz", action="store_true", help="Pack `images` (N, H, W, C) and `labels` into samples.npz.")
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}.")
    if args.seed < 0:
        parser.error(f"--seed must not be negative; got {args.seed}.")
    return args


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm.auto import tqdm

from stf_diffusers import STFPipeline
from stf_diffusers.export import METADATA_KEY, network_of, sampling_labels
from stf_diffusers.files import replacing
from stf_diffusers.image_grid import image_grid, names_of_labels
from stf_diffusers.sampling_call import check_solver, default_steps
from stf_diffusers.training.run_folder import check_writable
from stf_diffusers.training.sampling import SETTINGS


def image_path(folder: Path, index: int, suffix: str = ".png") -> Path:
    return folder / "images" / f"{index:06d}{suffix}"


def fingerprint(pipeline: STFPipeline) -> str:
    """A digest of the weights and the scheduler: what a model is, wherever it lies."""
    digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for part in (network_of(pipeline), pipeline.autoencoder):
        for name, value in sorted({} if part is None else part.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_folder(args: argparse.Namespace, model: str) -> dict[str, object]:
    """What decides an image; a folder begun with other settings is refused.

    Raises:
        ValueError: the folder holds images of another model, of other settings, or more than are asked for; or cannot be
            written.
    """
    with errors_in_flags(vars(args)):
        check_writable(args.output_dir)
    names = ("seed", "num_inference_steps", "solver", "class_label", "guidance_scale")
    settings = {"model": model, **{name: getattr(args, name) for name in names}}
    if args.solver == "consistency":
        settings["sigmas"] = args.sigmas
    path = args.output_dir / SETTINGS
    try:
        before = json.loads(path.read_text()) if path.is_file() else settings
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Choose another folder.") from error
    if before != settings:
        differing = [
            f"{name} ({before.get(name)} there, {value} now)"
            for name, value in settings.items()
            if before.get(name) != value
        ]
        raise ValueError(
            f"{args.output_dir} was begun with other settings: {'; '.join(differing)}. Choose another folder."
        )
    found = sorted((args.output_dir / "images").glob("[0-9]*[0-9].*"))
    if found and int(found[-1].stem) >= args.num_images:
        raise ValueError(
            f"{args.output_dir} holds images beyond the {args.num_images} asked for, up to {found[-1].name}. Raise "
            "--num_images, or choose another folder."
        )
    return settings


def read(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        pipeline = STFPipeline.from_pretrained(args.model).to(state.device)
    # Missing folders, missing files and what is not a pipeline each raise another error in Diffusers and the Hub's client.
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    metadata = pipeline.scheduler.config.get(METADATA_KEY) or {}
    null_label, classes = metadata.get("null_label"), sampling_labels(network_of(pipeline), metadata)
    if args.class_label is not None:
        names = metadata.get("class_names") or []
        number = names.index(args.class_label) if args.class_label in names else args.class_label
        if not str(number).isdecimal() or int(number) not in classes:
            known = f", called {', '.join(names[:20])}" if names else ""
            raise ValueError(
                f"--class_label {args.class_label}: the model knows {len(classes) or 'no'} classes{known}."
            )
        args.class_label = int(number)
    if args.guidance_scale != 1 and null_label is None:
        raise ValueError("--guidance_scale needs a model that was trained with a dropped condition; this one was not.")
    args.solver = args.solver or pipeline.default_solver
    args.num_inference_steps = args.num_inference_steps or default_steps(args.solver, args.sigmas)
    with errors_in_flags(vars(args)):
        check_solver(args.solver, args.guidance_scale, None, args.sigmas)
        if args.solver == "consistency":
            args.sigmas = pipeline.consistency_levels(args.num_inference_steps, args.sigmas)[1:]
    settings = check_folder(args, fingerprint(pipeline))
    suffix = ".png" if pipeline.channels in (1, 3, 4) else ".npy"
    missing = [index for index in range(args.num_images) if not image_path(args.output_dir, index, suffix).exists()]
    state.wait_for_everyone()  # every process has looked before one writes
    if state.is_main_process:
        (args.output_dir / "images").mkdir(parents=True, exist_ok=True)
        with replacing(args.output_dir / SETTINGS) as file:
            file.write_text(json.dumps(settings, indent=2))
        if missing:
            (args.output_dir / "samples.npz").unlink(missing_ok=True)
    state.wait_for_everyone()

    def label(index: int) -> int:
        if args.class_label is not None:
            return int(args.class_label)
        return classes[(args.seed + index) % len(classes)] if classes else 0

    mine = missing[state.process_index :: state.num_processes]
    progress = tqdm(total=len(mine), desc="Generating", unit="image", disable=not state.is_local_main_process)
    for start in range(0, len(mine), args.batch_size):
        indices = mine[start : start + args.batch_size]
        images = pipeline(
            batch_size=len(indices),
            num_inference_steps=args.num_inference_steps,
            class_labels=[label(index) for index in indices] if classes else None,
            guidance_scale=args.guidance_scale,
            solver=args.solver,
            sigmas=args.sigmas,
            generator=[torch.Generator().manual_seed(args.seed + index) for index in indices],
            output_type="pil" if suffix == ".png" else "np",
        ).images
        for index, image in zip(indices, images, strict=True):
            # One that is lost is generated again.
            with replacing(image_path(args.output_dir, index, suffix), durable=False) as file:
                if isinstance(image, Image.Image):
                    image.save(file)
                else:
                    np.save(file, np.rint(image * 255).astype(np.uint8))
        progress.update(len(indices))
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        paths = [image_path(args.output_dir, index, suffix) for index in range(args.num_images)]
        if suffix == ".png":
            columns = math.isqrt(min(64, args.num_images))
            shown = [Image.open(path) for path in paths[: columns * columns]]
            names = names_of_labels([label(index) for index in range(len(shown))], metadata.get("class_names"))
            image_grid(shown, columns, names).save(args.output_dir / "grid.png")
        if args.npz:
            arrays = [read(path) for path in paths]
            packed = np.stack(arrays).reshape(args.num_images, *arrays[0].shape[:2], -1)
            labels = np.array([label(index) for index in range(args.num_images)])
            with replacing(args.output_dir / "samples.npz") as file:
                np.savez(file, images=packed, labels=labels)


if __name__ == "__main__":
    run(main)
