#!/usr/bin/env python
"""Save a trained pipeline with an average of its weights whose width is chosen after training.

    accelerate launch examples/train_unconditional_stf.py --post_hoc_ema --checkpointing_steps 1000 --output_dir digits-stf
    python examples/reconstruct_ema.py --model digits-stf --sigma_rel 0.15 --output_dir digits-stf-0.15

The width sigma_rel is the average's standard deviation in time, relative to the length of the training (Karras et al.
2024, arXiv 2312.02696). Each checkpoint left a snapshot; the more there are, the closer the reconstruction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stf_diffusers.training.command_line import Parser, errors_in_flags, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="The output_dir of a training with --post_hoc_ema.")
    parser.add_argument("--sigma_rel", type=float, required=True, help="Relative width, above 0 and below 0.288.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

from diffusers import DiffusionPipeline

from stf_diffusers.export import network_of, save_pipeline
from stf_diffusers.training.averages import reconstruct, snapshots_of
from stf_diffusers.training.run_folder import check_writable


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output_dir.resolve() == args.model.resolve():
        raise ValueError("--output_dir is the trained model's own folder. Choose another.")
    with errors_in_flags(vars(args) | {"post_hoc_ema": None}):
        check_writable(args.output_dir)
        weights = reconstruct(snapshots_of(args.model), args.sigma_rel)
    try:
        pipeline = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model} cannot be loaded: {error}") from error
    network_of(pipeline).load_state_dict(weights)
    save_pipeline(pipeline, args.output_dir)


if __name__ == "__main__":
    run(main)
