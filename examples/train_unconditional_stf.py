#!/usr/bin/env python
"""Train an unconditional image diffusion model with the Stable Target Field, and save it as a Diffusers pipeline.

    # scikit-learn's handwritten digits, a small network, on whatever is there
    accelerate launch examples/train_unconditional_stf.py --output_dir digits-stf

    # CIFAR-10 with Karras et al.'s DDPM++ on 8 GPUs in bf16
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/train_unconditional_stf.py \\
        --dataset_name cifar10 --model_config examples/configs/cifar10_32.json --random_flip \\
        --noise_process edm --train_batch_size 64 --learning_rate 2e-4 \\
        --max_train_steps 200000 --checkpointing_steps 10000 --output_dir cifar10-stf

    # SIGTERM or SIGUSR1 to the training processes: a checkpoint after the current step, exit code 75
    # the flags from a file, one or more per line
    accelerate launch examples/train_unconditional_stf.py @my_flags.txt --resume_from_checkpoint latest
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import random
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, gather_object
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from checkpoints import (
    complete_checkpoints,
    discard,
    find_checkpoint,
    load_checkpoint,
    read_step,
    remove_leftovers,
    said_where_it_fails,
    save_checkpoint,
    step_of,
)
from conditioning import Conditioning, reoriented
from evaluation import BEST, RECORDS, SMALLEST, Evaluation, sample_images
from hub_upload import HubUpload
from image_data import (
    ImageColumn,
    decode_all,
    find_column,
    flip_at_random,
    load_split,
    make_reader,
    measure_standard_deviation,
)
from latents import (
    LatentColumn,
    LatentScale,
    check_fit,
    choose_scale,
    digest_of_autoencoder,
    digest_of_images,
    encode_all,
    fold_normalization,
    load_autoencoder,
)
from post_hoc_ema import SNAPSHOTS, PostHocAverages
from references import References, choose_references
from stf_diffusers import EDM, VE, VP, FlowMatching, ReferenceBatchCollator, ReferenceBatchSampler, STFTrainingObjective
from stf_diffusers.export import (
    DIT_NULL_LABEL,
    Network,
    diffusers_pipeline,
    process_to_config,
    read_metadata,
    save_pipeline,
)
from stf_diffusers.model_card import model_card
from stop_signal import REQUEUE_EXIT_CODE, StopSignal, settle_communication
from streaming import ImageStream
from training_log import TargetShare, TrainingLog, log_picture, tracker_may_fail

# As a script this module is "__main__"; its siblings log under its name.
NAME = "train_unconditional_stf"
logger = get_logger(NAME)

# Which parameters each noise process has; the flags bear the same names.
PROCESS_PARAMETERS = {
    "edm": ("sigma_data", "p_mean", "p_std"),
    "ve": ("sigma_min", "sigma_max"),
    "vp": ("beta_d", "beta_min", "epsilon_t"),
    "flow": ("time_distribution", "logit_mean", "logit_std"),
}


# Flags that a resumed run must share with the one it continues: they decide the data's order, the shapes, the target, or
# are held by the state of the optimizer, the schedule and the averaged weights.
KEPT_FLAGS = (
    "objective", "train_batch_size", "gradient_accumulation_steps", "seed", "random_flip", "center_crop",
    "learning_rate", "max_grad_norm", "scale_lr", "lr_scheduler", "lr_warmup_steps",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "class_dropout", "reorient", "latents", "use_ema", "ema_inv_gamma", "ema_power", "ema_max_decay", "post_hoc_ema",
)  # fmt: skip
# A resumed run may change these; it is told that it does.
NOTICED_FLAGS = ("allow_tf32", "compile", "gradient_checkpointing")


def number(kind: type, low: float, *, above: bool = False, high: float = math.inf) -> Any:
    """An argparse type: a finite `kind` of at least (with `above`: more than) `low`, and at most `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or value < low or (above and value == low) or value > high:
            bound = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    parse.__name__ = kind.__name__
    return parse


def sigma_data_value(text: str) -> float | str:
    return text if text == "auto" else number(float, 0, above=True)(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.convert_arg_line_to_args = lambda arg_line: shlex.split(arg_line, comments=True)  # type: ignore[method-assign]
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, high=1)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name",
        help="A data set on the Hub, a local folder (images, parquet, or save_to_disk), or a parquet file. "
        "Neither this nor --train_data_dir: scikit-learn's handwritten digits.",
    )
    data.add_argument("--dataset_config_name", help="The configuration of the data set, where it has several.")
    data.add_argument("--train_data_dir", help="A folder of images. Not with --dataset_name.")
    data.add_argument("--cache_dir", help="Where downloaded data sets and models are kept.")
    data.add_argument("--image_column", help="The column of images; found by itself where there is one.")
    data.add_argument("--label_column", help="The column of class labels; found by itself. For --class_conditional.")
    data.add_argument("--resolution", type=count, help="Side of the square training images. Default: the images' own.")
    data.add_argument("--image_mode", choices=["L", "RGB", "RGBA"], help="Default: L for grey images, else RGB.")
    data.add_argument(
        "--center_crop", action="store_true", help="Crop the centre of images that are not square, not at random."
    )
    data.add_argument(
        "--random_flip", action="store_true", help="Mirror images at random, sources and references alike."
    )
    data.add_argument(
        "--image_memory_gb",
        type=number(float, 0),
        default=4.0,
        help="Decoded images are kept as uint8 by each process up to this size, else read anew each time.",
    )
    data.add_argument("--dataloader_num_workers", type=number(int, 0), default=0, help="Processes that read the data.")

    data.add_argument(
        "--streaming",
        action="store_true",
        help="Read the data set in order, without keeping it; needs --max_train_steps. References are the buffer, of "
        "--reference_batch_size images, through which it is shuffled.",
    )

    method = parser.add_argument_group("method")
    method.add_argument("--objective", choices=["stf", "dsm"], default="stf", help="dsm: without references.")
    method.add_argument(
        "--reference",
        choices=["batch", "bank"],
        help="Where references come from: read with each batch, or a bank of all images. Default: a bank, where the "
        "decoded images fit into --reference_memory_gb and no --reference_batch_size is given.",
    )
    method.add_argument(
        "--reference_batch_size",
        type=count,
        help="Of reference batches: n behind each target, per process (with --share_reference of all processes), the "
        "batch itself included. Default: 4096, or all images.",
    )
    method.add_argument("--reference_memory_gb", type=positive, default=2.0, help="GiB for a bank chosen by default.")
    method.add_argument(
        "--reference_device",
        choices=["cuda", "cpu", "disk"],
        help="Where a bank is kept: on the GPU, in pinned memory, or in a file of output_dir for data larger than memory. "
        "Default: the device that trains.",
    )
    method.add_argument(
        "--share_reference",
        action="store_true",
        help="Spread the references over the processes: each holds a part of the bank, or of one reference batch.",
    )
    method.add_argument("--noise_process", choices=list(PROCESS_PARAMETERS), help="Default: edm.")
    method.add_argument(
        "--sigma_data",
        type=sigma_data_value,
        help="EDM: standard deviation of the data, or auto: measured. Default: 0.5.",
    )
    method.add_argument(
        "--p_mean", type=number(float, -20, high=20), help="EDM: mean of ln(sigma) in training. Default: -1.2."
    )
    method.add_argument(
        "--p_std",
        type=number(float, 0, above=True, high=10),
        help="EDM: standard deviation of ln(sigma) in training. Default: 1.2.",
    )
    method.add_argument(
        "--sigma_min", type=positive, help="VE: smallest noise level (0.02). EDM: when sampling (0.002)."
    )
    method.add_argument("--sigma_max", type=positive, help="VE: largest noise level (100). EDM: when sampling (80).")
    method.add_argument("--beta_d", type=positive, help="VP: slope of beta(t). Default: 19.9.")
    method.add_argument("--beta_min", type=number(float, 0), help="VP: beta(0). Default: 0.1.")
    method.add_argument(
        "--epsilon_t", type=number(float, 0, above=True, high=0.5), help="VP: smallest training time. Default: 1e-5."
    )

    method.add_argument(
        "--time_distribution", choices=["uniform", "logit_normal"], help="Flow: of training times. Default: uniform."
    )
    method.add_argument(
        "--logit_mean", type=number(float, -20, high=20), help="Flow, logit-normal times: mean of logit(t). Default: 0."
    )
    method.add_argument(
        "--logit_std",
        type=number(float, 0, above=True, high=10),
        help="Flow, logit-normal times: standard deviation of logit(t). Default: 1.",
    )
    method.add_argument(
        "--reorient",
        type=share,
        default=0.0,
        help="Share of images shown to the network turned or mirrored, and labelled so; samples are upright.",
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--model_config", help="A UNet2DModel or DiTTransformer2DModel config file, as in examples/configs."
    )
    network.add_argument("--pretrained_model_name_or_path", help="A saved pipeline whose network is trained further.")
    network.add_argument(
        "--class_conditional", action="store_true", help="Condition on labels; references of the same class."
    )
    network.add_argument(
        "--class_dropout",
        type=number(float, 0, high=0.99),
        default=0.0,
        help="Probability of training an image without its class, for guidance; its references are then all images.",
    )
    network.add_argument(
        "--vae", help="Train on the latents of this autoencoder of Diffusers: a folder, or on the Hub."
    )
    network.add_argument(
        "--latents",
        choices=["sample", "mean"],
        default="sample",
        help="Draw latents anew from the encoder's posterior each time, or use its means.",
    )
    network.add_argument("--gradient_checkpointing", action="store_true", help="Trade time for memory in the network.")
    network.add_argument("--compile", action="store_true", help="torch.compile the network.")
    network.add_argument("--allow_tf32", action="store_true", help="TF32 in the network; targets stay exact.")
    network.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Of the network. Default: what `accelerate config` says.",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--output_dir", default="stf-model", help="The pipeline is saved here, checkpoints in checkpoint-N."
    )
    training.add_argument("--overwrite_output_dir", action="store_true", help="Replace the run that output_dir holds.")
    training.add_argument("--seed", type=number(int, 0), default=0, help="Of weights, data order, noise and samples.")
    training.add_argument("--train_batch_size", type=count, default=64, help="Images per process and micro-batch.")
    training.add_argument("--num_epochs", type=count, default=100, help="Passes over the images as sources.")
    training.add_argument("--max_train_steps", type=count, help="Optimizer steps; overrides --num_epochs.")
    training.add_argument("--gradient_accumulation_steps", type=count, default=1, help="Micro-batches per step.")
    training.add_argument("--learning_rate", type=positive, default=1e-4, help="After warm-up.")
    training.add_argument(
        "--scale_lr", action="store_true", help="Multiply the learning rate by processes, accumulation and batch size."
    )
    training.add_argument(
        "--lr_scheduler",
        choices=[kind.value for kind in SchedulerType if kind.value != "piecewise_constant"],
        default="cosine",
    )
    training.add_argument("--lr_warmup_steps", type=number(int, 0), default=500, help="Optimizer steps.")
    training.add_argument("--adam_beta1", type=share, default=0.95)
    training.add_argument("--adam_beta2", type=share, default=0.999)
    training.add_argument("--adam_weight_decay", type=number(float, 0), default=1e-6)
    training.add_argument("--adam_epsilon", type=positive, default=1e-8)
    training.add_argument("--max_grad_norm", type=positive, default=1.0, help="Gradients are clipped to this norm.")
    training.add_argument(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Average the weights; the average is what is saved as `unet`.",
    )
    training.add_argument(
        "--ema_inv_gamma", type=positive, default=1.0, help="Of the warm-up 1 - (1 + step / inv_gamma)^-power."
    )
    training.add_argument("--ema_power", type=positive, default=3 / 4)
    training.add_argument("--ema_max_decay", type=share, default=0.9999)
    training.add_argument(
        "--post_hoc_ema",
        action="store_true",
        help="Keep averages with each checkpoint from which reconstruct_ema.py makes one of any width afterwards.",
    )
    training.add_argument("--checkpointing_steps", type=count, default=500, help="Save the training state this often.")
    training.add_argument("--checkpoints_total_limit", type=count, help="Keep only the newest.")
    training.add_argument("--resume_from_checkpoint", help='"latest", or a checkpoint folder.')

    report = parser.add_argument_group("reports")
    report.add_argument(
        "--report_to", help='A tracker that Accelerate knows, "all" or "none". Default: tensorboard if installed.'
    )
    report.add_argument("--logging_dir", default="logs", help="Inside output_dir.")
    report.add_argument("--logging_steps", type=count, default=10, help="Report every this many steps.")
    report.add_argument(
        "--sample_steps", type=count, help="Sample a grid every this many steps. Default: at the end only."
    )
    report.add_argument("--num_samples", type=count, default=16, help="Images per grid.")
    report.add_argument(
        "--num_inference_steps", type=number(int, 2, high=1000), default=35, help="Sampling steps per image."
    )
    report.add_argument(
        "--eval_steps",
        type=count,
        help="Measure the samples' distance from the training images every this many steps and at the end; the pipeline "
        "with the least is kept in `best`. Needs --eval_extractor.",
    )
    report.add_argument(
        "--eval_extractor",
        help="A vision model of transformers, a folder or on the Hub, for instance facebook/dinov2-base: distances are "
        "of its features.",
    )
    report.add_argument("--eval_num_samples", type=number(int, SMALLEST), default=1000, help="Images per evaluation.")
    report.add_argument("--push_to_hub", action="store_true", help="Upload the pipeline at the end.")
    report.add_argument("--hub_steps", type=count, help="Upload every this many steps too.")
    report.add_argument(
        "--model_license", help="Named in the model card, for instance apache-2.0. Default: none claimed."
    )
    report.add_argument("--hub_model_id", help="Repository on the Hub. Default: the name of output_dir.")
    report.add_argument("--hub_private_repo", action="store_true")
    report.add_argument("--hub_token", help="Default: that of `hf auth login`.")

    args = parser.parse_args(argv)
    if args.dataset_name and args.train_data_dir:
        parser.error("--dataset_name and --train_data_dir exclude each other.")
    if args.model_config and args.pretrained_model_name_or_path:
        parser.error("--model_config and --pretrained_model_name_or_path exclude each other.")
    if args.streaming and args.max_train_steps is None:
        parser.error("--streaming needs --max_train_steps: the length of a stream is not known.")
    if args.streaming and (args.reference or args.share_reference):
        parser.error(
            "--streaming: references are the buffer of each process, from which its sources are drawn; others would bias "
            "the target. Leave --reference and --share_reference out."
        )
    if args.streaming and (args.vae or args.dataloader_num_workers):
        parser.error("--streaming reads images in the training process: leave --vae and --dataloader_num_workers out.")
    if args.class_dropout and not args.class_conditional:
        parser.error("--class_dropout needs --class_conditional.")
    if args.latents == "mean" and not args.vae:
        parser.error("--latents needs --vae.")
    if args.vae and args.reorient:
        parser.error("--reorient turns images, and turned latents are no latents of turned images. Leave one out.")
    drawn = args.vae and (args.latents == "sample" or args.random_flip)
    if drawn and args.reference == "bank":
        parser.error(
            "--reference bank: latents are drawn, or mirrored, anew each time. Use --reference batch, or --latents mean "
            "without --random_flip."
        )
    if drawn and args.train_batch_size == 1 and (args.objective == "dsm" or args.reference_batch_size == 1):
        parser.error(
            "--train_batch_size 1: latents are drawn as a function of the images read together, so a single one would "
            "always be drawn the same. Use 2 or more, or --latents mean without --random_flip."
        )
    if args.vae and args.reference_device == "disk":
        parser.error("--reference_device disk keeps images, not latents. Leave it out.")
    if args.objective == "dsm" and args.reference_batch_size is not None:
        parser.error("--reference_batch_size has no effect with --objective dsm; leave it out.")
    if args.objective == "dsm" and (args.reference or args.reference_device or args.share_reference):
        parser.error("--reference, --reference_device and --share_reference have no effect with --objective dsm.")
    if args.reference == "bank" and args.reference_batch_size is not None:
        parser.error("--reference bank uses all images: leave --reference_batch_size out, or pass --reference batch.")
    if args.reference_device and args.reference != "bank":
        parser.error("--reference_device needs --reference bank.")
    if args.reference_device == "cuda" and not torch.cuda.is_available():
        parser.error("--reference_device cuda: there is no GPU.")
    if args.reference_batch_size is not None and args.reference_batch_size < args.train_batch_size:
        parser.error(
            f"--reference_batch_size {args.reference_batch_size} includes the batch itself, so it must be at least "
            f"--train_batch_size {args.train_batch_size}."
        )
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        parser.error("--overwrite_output_dir and --resume_from_checkpoint exclude each other.")
    if args.report_to not in (None, "all", "none") and args.report_to not in available_trackers():
        parser.error(
            f"--report_to {args.report_to}: installed trackers are {', '.join(available_trackers()) or 'none'}."
        )
    if bool(args.eval_steps) != bool(args.eval_extractor):
        parser.error("--eval_steps and --eval_extractor need each other.")
    if args.eval_steps and args.streaming:
        parser.error("--eval_steps compares with all training images, which a stream does not keep. Leave one out.")
    if not args.push_to_hub and (args.hub_model_id or args.hub_private_repo or args.hub_token or args.hub_steps):
        parser.error("--hub_model_id, --hub_private_repo, --hub_token and --hub_steps need --push_to_hub.")
    return args


def available_trackers() -> list[str]:
    return [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]


def choose_process(
    args: argparse.Namespace, images: ImageColumn | ImageStream
) -> tuple[EDM | VE | VP | FlowMatching, dict[str, Any]]:
    """The noise process, and the sampling range where the flags set one. A fine-tuned pipeline's own is the default.

    Raises:
        ValueError: a flag that the process does not have, or that contradicts the pipeline being fine-tuned.
    """
    pretrained = args.pretrained_model_name_or_path
    saved = read_metadata(pretrained, cache_dir=args.cache_dir) if pretrained else None
    saved_process = dict(saved["process"]) if saved else {}
    name = args.noise_process or saved_process.pop("name", "edm")
    saved_process.pop("name", None)
    if saved and saved["process"]["name"] != name:
        raise ValueError(
            f"--noise_process {name}, but the pretrained pipeline was trained on {saved['process']['name']}."
        )
    if pretrained and saved is None:
        logger.warning("The pretrained pipeline does not say how it was trained: its network must adapt to %s.", name)
    every = {flag for flags in PROCESS_PARAMETERS.values() for flag in flags}
    given: dict[str, Any] = {flag: getattr(args, flag) for flag in every if getattr(args, flag) is not None}
    ranges: dict[str, Any] = dict(saved.get("sampling_range", {})) if saved else {}
    ranges |= {flag: given.pop(flag) for flag in ("sigma_min", "sigma_max") if name == "edm" and flag in given}
    foreign = sorted(given.keys() - PROCESS_PARAMETERS[name])
    if foreign:
        raise ValueError(f"--{foreign[0]} is no parameter of --noise_process {name}; leave it out.")
    measured = 1.0  # latents are normalised
    if isinstance(images, ImageStream):
        measured = images.standard_deviation
    elif name == "edm" and not args.vae:
        measured = measure_standard_deviation(images)
    if args.vae and name == "edm" and "sigma_data" not in saved_process:
        given.setdefault("sigma_data", "auto")
    if given.get("sigma_data") == "auto":
        given["sigma_data"] = round(measured, 4)
    if name == "flow" and given.get("time_distribution", saved_process.get("time_distribution")) != "logit_normal":
        for flag in ("logit_mean", "logit_std"):
            if flag in given:
                raise ValueError(f"--{flag} needs --time_distribution logit_normal.")
    process = {"edm": EDM, "ve": VE, "vp": VP, "flow": FlowMatching}[name](**{**saved_process, **given})
    if isinstance(process, EDM) and abs(measured / process.sigma_data - 1) > 0.2:
        logger.warning(
            "The standard deviation of the data is %.3f, more than 20 %% from sigma_data = %g: --sigma_data auto uses "
            "the measured value.", measured, process.sigma_data,
        )  # fmt: skip
    return process, ranges


def build_network(
    args: argparse.Namespace, shape: tuple[int, int, int], num_classes: int | None
) -> tuple[Network, Conditioning]:
    """The network: pretrained, from a config file, or by the images' size from the presets beside this script.

    Raises:
        ValueError: it does not fit images or latents of `shape` (C, R, R), or the classes.
    """
    channels, resolution, _ = shape
    pretrained, where = args.pretrained_model_name_or_path, {"cache_dir": args.cache_dir}
    if pretrained:
        transformer = "transformer" in DiffusionPipeline.load_config(pretrained, **where)
        kind = DiTTransformer2DModel if transformer else UNet2DModel
        network = kind.from_pretrained(
            pretrained, subfolder="transformer" if transformer else "unet", use_safetensors=True, **where
        )
        conditioning = Conditioning(num_classes, args.class_dropout, args.reorient, transformer)
        saved = read_metadata(pretrained, cache_dir=args.cache_dir) or {}
        now = {"num_classes": num_classes, "class_dropout": args.class_dropout, "reorient": args.reorient}
        for flag, value in now.items():
            same = saved.get(flag) == value if flag == "num_classes" else bool(saved.get(flag)) == bool(value)
            if flag in saved and not same:
                raise ValueError(
                    f"--{flag.replace('num_classes', 'class_conditional')}: the pretrained network's labels have other "
                    f"meanings: {flag} was {saved[flag]} and is {value} now. Use the same."
                )
    else:
        preset = "digits_12" if resolution <= 16 else "cifar10_32" if resolution <= 32 else "celeba_64"
        path = Path(args.model_config or Path(__file__).parent / "configs" / f"{preset}.json")
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--model_config {path} is not a readable JSON file: {error}") from error
        kinds = {"UNet2DModel": UNet2DModel, "DiTTransformer2DModel": DiTTransformer2DModel}
        name = config.get("_class_name", "UNet2DModel") if isinstance(config, dict) else None
        if name not in kinds:
            raise ValueError(
                f"--model_config {path} must be the config of a {' or a '.join(kinds)}, as in examples/configs."
            )
        transformer = kinds[name] is DiTTransformer2DModel
        conditioning = Conditioning(num_classes, args.class_dropout, args.reorient, transformer)
        table = "num_embeds_ada_norm" if transformer else "num_class_embeds"
        fitted = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
        network = kinds[name].from_config({**config, **fitted, table: conditioning.embeddings})
    if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
        raise ValueError(f"{pretrained}: the weights are not finite. Choose another checkpoint.")
    config = network.config
    if (config["in_channels"], config["out_channels"]) != (channels, channels):
        raise ValueError(
            f"the pretrained network has {config['in_channels']} channels and the images have {channels}. "
            "Choose with --image_mode."
        )
    if transformer:
        if resolution != config["sample_size"] or resolution % config["patch_size"]:
            raise ValueError(
                f"latents of {resolution}x{resolution} do not fit this DiTTransformer2DModel: sample_size "
                f"{config['sample_size']}, patch_size {config['patch_size']}. See --resolution."
            )
        if config["num_embeds_ada_norm"] != DIT_NULL_LABEL:
            raise ValueError(f"the network's num_embeds_ada_norm must be {DIT_NULL_LABEL}, as DiTPipeline assumes.")
        for module in network.modules():
            if isinstance(module, LabelEmbedding):
                # It would drop classes by itself, unseen by the targets, in each block anew.
                module.dropout_prob = 0.0
    else:
        network.register_to_config(sample_size=resolution)
        if config["num_class_embeds"] != conditioning.embeddings:
            raise ValueError(
                f"the pretrained network knows {config['num_class_embeds']} classes and this run has "
                f"{conditioning.embeddings}. Pass or leave out --class_conditional, --class_dropout and --reorient accordingly."
            )
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        if resolution % factor:
            what = "the latents' side" if args.vae else "--resolution"
            raise ValueError(f"{what} {resolution} must be a multiple of {factor} for this network.")
        if config["time_embedding_type"] != "positional":
            raise ValueError(
                f"time_embedding_type {config['time_embedding_type']!r} takes the logarithm of timesteps that are negative "
                "or 0 here; use 'positional'."
            )
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network, conditioning


def load_latents(
    args: argparse.Namespace, images: ImageColumn, vae: ModelMixin, accelerator: Accelerator
) -> tuple[LatentColumn, ModelMixin]:
    """The normalised latents of the images, encoded once, and the autoencoder that decodes them.

    Raises:
        ValueError: images that are cropped at random.
    """
    # Named by what is in it: a run that is refused later has replaced nothing.
    key = f"{digest_of_images(images)} {digest_of_autoencoder(vae)} {args.random_flip}"
    name = f"latents-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    with accelerator.main_process_first():
        cache = encode_all(
            images,
            vae,
            Path(args.output_dir) / name,
            mirrored=args.random_flip,
            batch_size=args.train_batch_size,
            device=accelerator.device,
            quiet=not accelerator.is_main_process,
        )
    sample = args.latents == "sample"
    scale = choose_scale(vae, cache, sample)
    if args.pretrained_model_name_or_path:
        # The network knows the latents of its own autoencoder as they are.
        factor = vae.config.get("scaling_factor") or 1.0
        scale = LatentScale((0.0,) * len(scale.std), (1 / factor,) * len(scale.std))
    latents = LatentColumn(cache, scale, images.labels, sample=sample, seed=args.seed)
    return latents, fold_normalization(vae, scale)


def load_vae(args: argparse.Namespace, device: torch.device) -> ModelMixin:
    """The autoencoder.

    Raises:
        ValueError: it is none, or not that of the pipeline that is trained further.
    """
    vae = load_autoencoder(args.vae, args.cache_dir).to(device)
    pretrained = args.pretrained_model_name_or_path
    if pretrained:
        own = load_autoencoder(pretrained, args.cache_dir).to(device)
        if digest_of_autoencoder(own) != digest_of_autoencoder(vae):
            raise ValueError(
                f"--vae {args.vae}: the pretrained network knows the latents of its own pipeline's autoencoder, with their "
                f"scale folded in. Pass --vae {pretrained}."
            )
    return vae


def load_images(args: argparse.Namespace, accelerator: Accelerator) -> tuple[ImageColumn | ImageStream, int | None]:
    """The training images, decoded in memory where they fit, and the number of classes of a conditional run.

    Raises:
        ValueError: there are no images, or no labels where they are needed.
    """
    where = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    with accelerator.main_process_first():
        dataset = load_split(*where, streaming=args.streaming)
    if args.streaming and dataset.features is None:
        raise ValueError("--streaming: the data set does not declare its columns. Use parquet or a folder of images.")
    if not args.streaming and len(dataset) == 0:
        raise ValueError("the data set is empty.")
    column = find_column(dataset, datasets.Image, args.image_column, "--image_column")
    if column is None:
        raise ValueError(f"no column holds images among {dataset.column_names}; name one with --image_column.")
    label_column = None
    if args.class_conditional or args.label_column:
        label_column = find_column(dataset, datasets.ClassLabel, args.label_column, "--label_column")
        if label_column is None:
            raise ValueError(f"--class_conditional: no class labels among {dataset.column_names}; see --label_column.")
    if not args.class_conditional:
        label_column = None
    reader = make_reader(dataset, column, args.image_mode, args.resolution, args.center_crop)
    if args.streaming:
        classes = None if label_column is None else getattr(dataset.features[label_column], "num_classes", None)
        if label_column is not None and classes is None:
            raise ValueError(
                f"--streaming: column {label_column!r} does not declare its number of classes (ClassLabel)."
            )
        stream = ImageStream(
            dataset, column, label_column, reader, args.train_batch_size, args.reference_batch_size, args.seed,
            accelerator.process_index, accelerator.num_processes, classes,
        )  # fmt: skip
        stream.agree(gather_object([stream.summary()]))
        return stream, classes
    labels, num_classes = (None, None) if label_column is None else read_labels(args, dataset, label_column)
    quiet = not accelerator.is_local_main_process
    decoded = decode_all(dataset, column, reader, args.image_memory_gb * 2**30, quiet)
    return ImageColumn(dataset, column, reader, labels, decoded, args.seed, label_column), num_classes


def describe_images(images: ImageColumn | LatentColumn | ImageStream) -> str:
    """How many images there are, and where they are kept."""
    if isinstance(images, ImageStream):
        return f"a stream of images of {images.shape}"
    where = "kept in memory" if images.images is not None else "made as they are read"
    return f"{len(images)} images of {images.shape}, {where}"


def read_labels(args: argparse.Namespace, dataset: datasets.Dataset, column: str) -> tuple[list[int], int]:
    """The labels of all images, and the number of classes.

    Raises:
        ValueError: they are not integers from 0, or there are more classes than images.
    """
    labels = list(dataset[column])
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"labels in {column!r} must be integers from 0; remove rows without a label.")
    num_classes = max(labels) + 1
    if num_classes > len(labels):
        raise ValueError(
            f"labels in {column!r} go up to {max(labels)}, for {len(labels)} images. Number the classes from 0."
        )
    alone = [label for label, count in Counter(labels).items() if count == 1]
    if alone and args.objective == "stf":
        logger.warning("Classes of a single image have the targets of denoising score matching: %s.", alone)
    return labels, num_classes


def seed_for(*parts: int) -> int:
    """A seed that is a function of its parts, so that every draw can be repeated from the step it belongs to."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def seeded_generator(device: torch.device, *parts: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_for(*parts))


def sample_grid(accelerator: Accelerator, pipeline: DiffusionPipeline, args: argparse.Namespace) -> Image.Image:
    """A grid of `--num_samples` images, shared out over the processes; image k depends on the seed and k alone."""
    mine = list(range(args.num_samples))[accelerator.process_index :: accelerator.num_processes]
    images = sample_images(
        pipeline.to(accelerator.device),
        mine,
        seed_of=partial(seed_for, args.seed),
        batch_size=args.train_batch_size,
        num_inference_steps=args.num_inference_steps,
    )
    gathered = gather_object(list(zip(mine, images, strict=True)))
    ordered = [image for _, image in sorted(gathered, key=lambda pair: pair[0])]
    columns = math.ceil(math.sqrt(len(ordered)))
    rows = math.ceil(len(ordered) / columns)
    ordered += [Image.new("RGB", ordered[0].size)] * (rows * columns - len(ordered))
    grid = make_image_grid(ordered, rows, columns)
    scale = max(1, 64 // ordered[0].width)
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def collate(collator: ReferenceBatchCollator, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collated batch, and the positions of its sources in the data set."""
    return {**collator(columns), "index": columns["index"][: collator.batch_size]}


def batches_from(
    position: int,
    args: argparse.Namespace,
    images: ImageColumn | LatentColumn | ImageStream,
    sampler: ReferenceBatchSampler | None,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this process from the given one on, epoch after epoch without end."""
    if isinstance(images, ImageStream):
        yield from images.batches_from(position)
    elif sampler is not None:
        loader = DataLoader(
            images,
            batch_sampler=sampler,
            collate_fn=partial(collate, ReferenceBatchCollator(args.train_batch_size)),
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_num_workers > 0,
            pin_memory=device.type == "cuda",
        )
        epoch, start = divmod(position, len(sampler))
        while True:
            sampler.set_epoch(epoch, start)
            try:
                yield from loader
            except (EOFError, OSError, RuntimeError) as error:
                if not args.dataloader_num_workers:
                    raise
                # A worker that dies while it hands over a batch shows as a broken connection, and as nothing else.
                raise RuntimeError(
                    f"a DataLoader worker died, perhaps for want of memory: {error!r}. Lower --dataloader_num_workers or "
                    "--train_batch_size; --resume_from_checkpoint latest continues."
                ) from error
            epoch, start = epoch + 1, 0


def make_evaluation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    images: ImageColumn | LatentColumn | ImageStream,
    resume: Path | None,
) -> Evaluation | None:
    """What `--eval_steps` asks for, where it does."""
    if args.eval_steps is None or not isinstance(images, ImageColumn):
        return None
    first_step = 0 if resume is None else step_of(resume)
    return Evaluation(args, accelerator, images, data_name(args), partial(seed_for, args.seed), first_step)


def make_optimizer(
    args: argparse.Namespace, network: Network, images_per_step: int, max_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its learning-rate schedule, in optimizer steps."""
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=args.learning_rate * (images_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
    )
    return optimizer, schedule


def make_average(args: argparse.Namespace, network: Network) -> EMAModel | None:
    """The exponential moving average of the weights, where one is wanted."""
    if not args.use_ema:
        return None
    return EMAModel(
        network.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
    )


def describe_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    network: Network,
    images: ImageColumn | LatentColumn | ImageStream,
    references: References,
    conditioning: Conditioning,
    max_steps: int,
) -> dict[str, dict[str, Any]]:
    """What a resumed run must share with this one ("run"), and what it should ("settings")."""
    run = {
        **{name: getattr(args, name) for name in KEPT_FLAGS},
        "reference": references.kind,
        "reference_batch_size": references.n,
        "share_reference": references.shared,
        "num_processes": accelerator.num_processes,
        "num_images": None if isinstance(images, ImageStream) else len(images),
        "data_digest": images.digest(),
        "num_classes": conditioning.num_classes,
        "null_label": conditioning.null_label if args.class_dropout else None,
        "image_shape": list(images.shape),
    }
    if isinstance(images, LatentColumn):
        run |= {"latent_mean": list(images.scale.mean), "latent_std": list(images.scale.std)}
    settings = {name: getattr(args, name) for name in NOTICED_FLAGS} | {"mixed_precision": accelerator.mixed_precision}
    settings |= {name: value for name, value in network.config.items() if not name.startswith("_")}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["steps_of_schedule"] = max_steps
    return {"run": run, "settings": json.loads(json.dumps(settings))}


def end(accelerator: Accelerator, hub: HubUpload | None, output_dir: Path, patience: float = 1800) -> None:
    """Say what is on the Hub, waiting so many seconds for uploads, and end processes and trackers in order."""
    if hub is not None:
        hub.report(output_dir, patience)
    settle_communication()
    with tracker_may_fail():
        accelerator.end_training()


def start_trackers(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Start the trackers; they get the flags, without the token, which opens the user's account.

    Raises:
        ValueError: one does not start.
    """
    flags = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
    try:
        accelerator.init_trackers("stf_diffusers", config=flags)
    # Whatever a tracker's client raises where its server or folder cannot be reached.
    except Exception as error:
        raise ValueError(
            f"--report_to: the tracker does not start: {error}. Make its server or folder reachable, or pass --report_to none."
        ) from error


def data_name(args: argparse.Namespace) -> str:
    """The data as the model card calls it."""
    return public_name(args.dataset_name or args.train_data_dir) or "scikit-learn's handwritten digits"


def public_name(name: str | None) -> str | None:
    """A name on the Hub as it is; of a local path, the last part only."""
    return Path(name).resolve().name if name is not None and Path(name).exists() else name


def refuse_occupied(output_dir: Path, requested: str | None) -> None:
    """Raise ValueError where `output_dir` holds a trained run, and say what can be done with it."""
    if complete_checkpoints(output_dir) or (output_dir / "model_index.json").exists():
        how = (
            "It has no checkpoint to continue from; r"
            if requested
            else "Continue it with --resume_from_checkpoint latest, r"
        )
        raise ValueError(
            f"{output_dir} holds a trained run. {how}eplace it with --overwrite_output_dir, or choose another --output_dir."
        )


def clear(output_dir: Path) -> None:
    """Remove the earlier run's checkpoints, samples and claim to be a pipeline."""
    (output_dir / "model_index.json").unlink(missing_ok=True)
    for path in complete_checkpoints(output_dir):
        discard(path)
    (output_dir / RECORDS).unlink(missing_ok=True)
    for name in ("samples", SNAPSHOTS, BEST):
        shutil.rmtree(output_dir / name, ignore_errors=True)


def check_finite(network: Network, step: int) -> None:
    """Raise FloatingPointError where a weight is not a number: before anything is saved."""
    if not bool(torch.stack([parameter.isfinite().all() for parameter in network.parameters()]).all()):
        raise FloatingPointError(
            f"the weights are not finite after step {step}. They were not saved; the last checkpoint is good. Lower "
            "--learning_rate, or use bf16 instead of fp16."
        )


def check_writable(output_dir: Path) -> None:
    """Raise ValueError unless `output_dir` is a folder that can be written to, or can be made."""
    existing = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {output_dir}: {existing} is no folder that can be written to. Choose another.")


def check_mode(mode: DistributedType, device: torch.device) -> None:
    """Raise ValueError for a distributed mode or device that this script is not tested on."""
    if mode not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f"{mode.value} is not supported. Use data parallelism: choose it in `accelerate config`.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device {device.type} is not supported: targets need float64. Pass --cpu to `accelerate launch`."
        )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator of this run.

    Raises:
        ValueError: a distributed mode or device that this script is not tested on.
    """
    for mode in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        # What `accelerate launch` sets; Accelerate itself passes over some of them in silence, on a CPU for instance.
        if os.environ.get(f"ACCELERATE_USE_{mode}", "false").lower() == "true":
            raise ValueError(f"{mode} is not supported. Use data parallelism: choose it in `accelerate config`.")
    report_to = args.report_to or ("tensorboard" if "tensorboard" in available_trackers() else "none")
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(Path(args.output_dir) / args.logging_dir),
        # The schedule counts optimizer steps and is stepped once for each, whatever the number of processes.
        step_scheduler_with_optimizer=False,
    )
    check_mode(accelerator.distributed_type, accelerator.device)
    return accelerator


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(NAME).setLevel(logging.INFO)
    with StopSignal() as stop:
        try:
            train(args, stop)
        except BaseException:
            settle_communication()
            raise


def train(args: argparse.Namespace, stop: StopSignal) -> None:
    """The run that the flags describe.

    Raises:
        SystemExit: with `REQUEUE_EXIT_CODE`, stopped by a signal.
        ValueError: something is wrong that can be known before the first step.
        FloatingPointError: the loss or the weights are not finite.
        OSError: something cannot be written.
    """
    output_dir = Path(args.output_dir)
    accelerator = make_accelerator(args)
    process_index, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # Everything that is known to be wrong is said before anything on disk changes.
    check_writable(output_dir)
    resume = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest" and resume is None:
        logger.info("No checkpoint in %s yet: starting at step 0.", output_dir)
    if resume is None and not args.overwrite_output_dir:
        refuse_occupied(output_dir, args.resume_from_checkpoint)
    images: ImageColumn | LatentColumn | ImageStream
    images, num_classes = load_images(args, accelerator)
    process, sampling_range = choose_process(args, images)
    objective = STFTrainingObjective(process)
    vae, shape = load_vae(args, device) if args.vae else None, images.shape
    if isinstance(images, ImageColumn) and vae is not None:
        shape, _ = check_fit(vae, images)

    torch.manual_seed(seed_for(args.seed))
    network, conditioning = build_network(args, shape, num_classes)
    # An impossible range or combination fails now, not after the training.
    diffusers_pipeline(network, process, vae=vae, **sampling_range)
    evaluation = make_evaluation(args, accelerator, images, resume)
    if isinstance(images, ImageColumn) and vae is not None:
        images, vae = load_latents(args, images, vae, accelerator)
    references = choose_references(args, images, accelerator)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images_per_step = args.gradient_accumulation_steps * args.train_batch_size * num_processes
    batches_per_epoch = 0 if references.sampler is None else len(references.sampler)
    max_steps = args.max_train_steps or math.ceil(
        args.num_epochs * batches_per_epoch / args.gradient_accumulation_steps
    )
    optimizer, lr_scheduler = make_optimizer(args, network, images_per_step, max_steps)
    model, optimizer, lr_scheduler = accelerator.prepare(network, optimizer, lr_scheduler)
    if args.compile:
        network.compile()
    ema, post_hoc = make_average(args, network), PostHocAverages(network) if args.post_hoc_ema else None
    manifest = describe_run(args, accelerator, network, images, references, conditioning, max_steps)
    manifest["run"] |= {"process": process_to_config(process), "sampling_range": sampling_range}
    first_step = 0
    if resume is not None:
        first_step = read_step(resume, manifest)
        load_checkpoint(accelerator, resume, network, ema, post_hoc)
        logger.info("Resumed after step %d from %s.", first_step, resume)
        if first_step >= max_steps:
            logger.warning("All %d steps are done: only the pipeline is saved. See --max_train_steps.", max_steps)
    hub = None
    if args.push_to_hub and accelerator.is_main_process:
        hub = HubUpload(args.hub_model_id or output_dir.resolve().name, args.hub_token, args.hub_private_repo)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
    accelerator.wait_for_everyone()
    start_trackers(args, accelerator)
    if accelerator.is_main_process:  # nothing at the start can fail any more
        if args.overwrite_output_dir:
            clear(output_dir)
        for path in output_dir.glob("latents-*.safetensors"):
            if not isinstance(images, LatentColumn) or path != images.cache.path:
                path.unlink()
    logger.info(
        "%s on %s with %s; %s; %.1f M parameters; %d steps of %d images on %d process(es).",
        args.objective.upper(), process, references, describe_images(images),
        network.num_parameters() / 1e6, max_steps, images_per_step, num_processes,
    )  # fmt: skip

    def averaged_pipeline(step: int) -> DiffusionPipeline:
        """The pipeline of copied weights: sampling and saving leave the trained ones alone."""
        averaged = type(network).from_config(network.config).to(device).eval()
        averaged.load_state_dict(network.state_dict())
        if ema is not None:
            ema.copy_to(averaged.parameters())
        metadata = {**manifest["run"], "steps": step, "images_seen": step * images_per_step}
        metadata |= {"dataset": data_name(args), "license": args.model_license, "vae": public_name(args.vae)}
        return diffusers_pipeline(averaged, process, vae=vae, metadata=metadata, **sampling_range)

    def save_grid(pipeline: DiffusionPipeline, step: int) -> Path:
        grid = sample_grid(accelerator, pipeline, args)
        path = output_dir / "samples" / f"step-{step:07d}.png"
        if accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
            logger.info("Samples: %s", path)
            log_picture(accelerator, grid, step)
        return path

    def save(step: int) -> None:
        """The pipeline, a grid of its samples, its card, and where asked for all of it on the Hub."""
        pipeline = averaged_pipeline(step)
        if accelerator.is_main_process:
            with said_where_it_fails("the pipeline", output_dir):
                save_pipeline(pipeline, output_dir, raw_network=None if ema is None else network)
        grid = save_grid(pipeline, step)
        if accelerator.is_main_process:
            card = model_card(
                pipeline,
                repository=hub.repository if hub else str(output_dir),
                num_inference_steps=args.num_inference_steps,
                grid=str(grid.relative_to(output_dir)),
                metrics=evaluation.metrics(step) if evaluation else None,
            )
            card.save(output_dir / "README.md")
            logger.info("Saved: %s", output_dir)
            if hub:
                hub.push(output_dir, f"Pipeline after {step} steps", grid)
        accelerator.wait_for_everyone()

    def evaluate(step: int) -> None:
        if evaluation is not None and evaluation.due(step, max_steps):
            with log.paused():
                evaluation(averaged_pipeline(step), step)

    log, target_share = TrainingLog(accelerator), TargetShare(device)
    position = first_step * args.gradient_accumulation_steps
    batches = batches_from(position, args, images, references.sampler, device)
    progress = tqdm(
        initial=first_step, total=max_steps, desc="Training", unit="step", disable=not accelerator.is_local_main_process
    )
    evaluate(first_step)  # where the run was stopped before it could
    model.train()
    stop.defer()
    for step in range(first_step + 1, max_steps + 1):
        for micro in range(args.gradient_accumulation_steps):
            started = time.perf_counter()
            batch = next(batches)
            log.waited(time.perf_counter() - started)
            draws = partial(seeded_generator, device, args.seed, process_index, step, micro)
            torch.manual_seed(seed_for(args.seed, process_index, step, micro, 2))  # dropout
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            if args.random_flip and vae is None:  # of latents the mirror images' are read
                batch["reference_images"] = flip_at_random(batch["reference_images"], draws(1))
            sources = batch["reference_images"][: args.train_batch_size]
            labels, classes, orientation = conditioning.draw(batch.get("labels"), len(sources), draws(3))
            with target_share.targets():
                perturbed = objective.perturb(sources, generator=draws(0), **references.of(batch, classes))
                perturbed = reoriented(perturbed, orientation)
            with accelerator.accumulate(model):
                output = model(perturbed.model_input, perturbed.timestep, class_labels=labels).sample
                loss = objective.loss(output, perturbed)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            log.add(loss, perturbed, sources, step, batch["index"])
        learning_rate = lr_scheduler.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            if ema is not None:
                ema.step(network.parameters())
            if post_hoc is not None:
                post_hoc.step()
        progress.update()
        target_share.step_done()
        # The last one, and one with each upload, so that a killed run never has a pipeline and nothing to go on from.
        hub_due = bool(args.hub_steps) and step % (args.hub_steps or 1) == 0
        checkpoint_due = step % args.checkpointing_steps == 0 or step == max_steps or hub_due
        stopping = stop.agreed() and step < max_steps
        if step in (first_step + 1, max_steps) or step % args.logging_steps == 0 or checkpoint_due or stopping:
            report = log.flush() | {"learning_rate": learning_rate, "gradient_norm": float(gradient_norm)}
            progress.set_postfix(loss=f"{report['loss']:.4f}", lr=f"{learning_rate:.2e}")
            with tracker_may_fail():
                accelerator.log(report, step=step)
        if checkpoint_due or stopping:
            check_finite(network, step)
            save_checkpoint(
                accelerator, output_dir, step, network, ema, post_hoc, manifest, args.checkpoints_total_limit
            )
        if stopping:
            logger.info("Stopped by a signal after step %d; --resume_from_checkpoint latest continues.", step)
            end(accelerator, hub, output_dir, patience=20)
            raise SystemExit(REQUEUE_EXIT_CODE)
        evaluate(step)
        if step < max_steps and hub_due:
            save(step)
        elif step < max_steps and args.sample_steps and step % args.sample_steps == 0:
            save_grid(averaged_pipeline(step), step)
    progress.close()

    save(max(first_step, max_steps))
    end(accelerator, hub, output_dir)


if __name__ == "__main__":
    main()
