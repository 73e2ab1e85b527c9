#!/usr/bin/env python
"""Train an unconditional image diffusion model with the Stable Target Field, and save it as a Diffusers pipeline.

    # scikit-learn's handwritten digits, a small network, on whatever hardware there is
    accelerate launch examples/train_unconditional_stf.py --output_dir digits-stf

    # the same without a checkout, after pip install
    accelerate launch -m stf_diffusers.examples.train_unconditional_stf --output_dir digits-stf

    # CIFAR-10 with Karras et al.'s DDPM++ on 8 GPUs in bf16
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/train_unconditional_stf.py \\
        --dataset_name cifar10 --model_config cifar10_32 --random_flip \\
        --noise_process edm --train_batch_size 64 --learning_rate 2e-4 \\
        --max_train_steps 200000 --checkpointing_steps 10000 --output_dir cifar10-stf

    # continue from the latest checkpoint, with the flags in a file, one or more per line
    accelerate launch examples/train_unconditional_stf.py @my_flags.txt --resume_from_checkpoint latest

On SIGTERM or SIGUSR1 the training processes save a checkpoint after the current step and end with exit code 75.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import shlex
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from stf_diffusers.noise import NOISE_PROCESSES
from stf_diffusers.training.command_line import Parser, errors_in_flags, run
from stf_diffusers.training.presets import PRESETS

# As a script this module is "__main__".
NAME = "train_unconditional_stf"
logger = logging.getLogger(NAME)

# The random streams of a micro-batch: each is a function of the seed, the process, the step, the micro-batch and its number.
NOISE, FLIPS, DROPOUT, CONDITIONS = range(4)

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

# Flags of Diffusers' train_unconditional.py that are refused, and what to do instead.
REFUSED_FLAGS = {
    "--enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is used; leave it out.",
    "--preserve_input_precision": "images are read with 8 bits a channel; leave it out.",
}

# Arguments of the package's functions that bear another name than the flag they come from.
FLAG_OF = {
    "batch_size": "train_batch_size",
    "buffer_size": "reference_batch_size",
    "num_workers": "dataloader_num_workers",
}


# ---- flags


def number(kind: type, low: float = -math.inf, *, above: bool = False, high: float = math.inf) -> Any:
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


class Refused(argparse.Action):
    """A flag that ends the run with what to do instead."""

    def __init__(self, option_strings: list[str], dest: str, instead: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=argparse.SUPPRESS)
        self.instead = instead

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None) -> None:
        parser.error(f"{flag}: {self.instead}")


def process_flags() -> dict[str, dict[str, Any]]:
    """The parameters of all noise processes as arguments of `add_argument`, by flag."""
    flags: dict[str, dict[str, Any]] = {}
    for name, process in NOISE_PROCESSES.items():
        types = get_type_hints(process)
        for field in dataclasses.fields(process):
            choices, above = get_args(types[field.name]), field.metadata["above"]
            low = field.metadata["at_least"] if above is None else above
            high = field.metadata["at_most"]
            bounds = {
                key: value
                for key, value in {"low": low, "high": high, "above": above is not None}.items()
                if value is not None
            }
            meaning = f"{name.upper()}: {field.metadata['help']}. Default: {field.default}."
            if field.name in flags:
                meaning = f"{flags[field.name]['help']} {meaning}"
            flags[field.name] = {
                "help": meaning,
                **({"choices": choices} if choices else {"type": number(float, **bounds)}),
            }
    measured = "EDM: standard deviation of the data in [-1, 1], or auto to measure it. Default: auto."
    flags["sigma_data"] |= {"type": sigma_data_value, "help": measured}
    flags["sigma_min"]["help"] += " EDM: smallest noise level in sampling. Default: 0.002."
    flags["sigma_max"]["help"] += " EDM: largest noise level in sampling. Default: 80."
    return flags


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.convert_arg_line_to_args = lambda arg_line: shlex.split(arg_line, comments=True)  # type: ignore[method-assign]
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, high=1)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name",
        help="A data set on the Hub, a local folder (images, parquet, or save_to_disk), or a file: parquet, .zip (a folder of "
             "images), .tar (WebDataset), .npz or .npy (arrays of pixels). Default, without --train_data_dir: "
             "scikit-learn's handwritten digits.")
    data.add_argument("--dataset_config_name", help="The configuration of the data set, if it has several.")
    data.add_argument("--train_data_dir", help="A folder of images, instead of --dataset_name.")
    data.add_argument("--split", default="train", help="Split to train on, such as train, train+test or train[:1000].")
    data.add_argument("--cache_dir",
        help="Folder for downloaded data sets and models, and for decoded images. Default: Hugging Face's cache.")
    data.add_argument("--image_column", help="Name of the image column; detected if there is only one.")
    data.add_argument("--label_column",
        help="Name of the class-label column, for --class_conditional; detected if there is only one.")
    data.add_argument("--resolution", type=count, nargs="+", metavar=("SIDE", "WIDTH"),
        help="Side length, or height and width, to which images are resized and cropped. Default: the images' own.")
    data.add_argument("--image_mode", choices=["L", "RGB", "RGBA"],
        help="Mode to which images are converted. Default: L for greyscale images, RGB for others.")
    data.add_argument("--center_crop", action="store_true",
        help="Crop the centre of non-square images instead of a random part.")
    data.add_argument("--skip_corrupt", action="store_true",
        help="Leave out images that are missing or cannot be decoded, and log how many. Default: an error.")
    data.add_argument("--random_flip", action="store_true",
        help="Flip images horizontally at random, sources and references alike.")
    data.add_argument("--image_memory_gb", type=number(float, 0), default=4.0,
        help="Memory per process, in GiB, for decoded images (uint8); larger data sets are decoded again each "
             "time they are read.")
    data.add_argument("--image_cache", action=argparse.BooleanOptionalAction, default=True,
        help="Keep decoded images on disk, for all processes of the machine and for later runs.")
    data.add_argument("--dataloader_num_workers", type=number(int, 0), default=0,
        help="Number of worker processes that read the data.")
    data.add_argument("--streaming", action="store_true",
        help="Read the data set in order, without storing it; needs --max_train_steps. The references are the shuffle "
             "buffer, which holds --reference_batch_size images.")

    method = parser.add_argument_group("method")
    method.add_argument("--objective", choices=["stf", "dsm"], default="stf",
        help="stf: the Stable Target Field; dsm: denoising score matching, without references.")
    method.add_argument("--reference", choices=["batch", "bank"],
        help="Where references come from: a batch read at each step, or a bank of all images. Default: bank, if the "
             "decoded images fit into --reference_memory_gb and --reference_batch_size is not given; otherwise batch.")
    method.add_argument("--reference_batch_size", type=count,
        help="Number of references per target, the batch itself included; per process, or of all processes together "
             "with --share_reference. Default: 4096, or all images if there are fewer.")
    method.add_argument("--reference_memory_gb", type=positive, default=2.0,
        help="Largest bank, in GiB, that is chosen by default.")
    method.add_argument("--reference_device", choices=["cuda", "cpu", "disk"],
        help="Where the bank is kept: on the GPU, in pinned memory, or, for data larger than memory, in a file in "
             "output_dir. Default: the training device.")
    method.add_argument("--share_reference", action="store_true",
        help="Spread the references over the processes: each holds a part of the bank, or of a common reference "
             "batch.")
    method.add_argument("--noise_process", choices=[*NOISE_PROCESSES, "discrete"],
        help="Forward process; discrete: the timesteps of a DDPM. Default: the pretrained pipeline's, otherwise edm.")
    method.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "sample"],
        help="DISCRETE: what the network predicts. Default: the pretrained pipeline's, otherwise epsilon.")
    method.add_argument("--ddpm_num_steps", type=count,
        help="DISCRETE: number of timesteps. Default: the pretrained pipeline's, otherwise 1000.")
    method.add_argument("--ddpm_beta_schedule", choices=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
        help="DISCRETE: schedule of the betas. Default: the pretrained pipeline's, otherwise linear.")
    for flag, how in process_flags().items():
        method.add_argument(f"--{flag}", **how)
    method.add_argument("--reorient", type=share, default=0.0,
        help="Share of images that are rotated or flipped and labelled as such; samples are upright.")

    network = parser.add_argument_group("network")
    network.add_argument("--model_config", "--model_config_name_or_path",
        help=f"A preset ({', '.join(PRESETS)}), or the config of a UNet2DModel or DiTTransformer2DModel: a JSON file, a "
             "folder or a repository on the Hub. Default: the preset for the images' size.")
    network.add_argument("--pretrained_model_name_or_path", help="A saved pipeline whose network is fine-tuned.")
    network.add_argument("--class_conditional", action="store_true",
        help="Condition the network on class labels; references come from the same class.")
    network.add_argument("--class_dropout", type=number(float, 0, high=0.99), default=0.0,
        help="Probability of dropping an image's class, for guidance; its references then come from all classes.")
    network.add_argument("--vae",
        help="Train on the latents of this Diffusers autoencoder: a folder, or a repository on the Hub.")
    network.add_argument("--latents", choices=["sample", "mean"], default="sample",
        help="Sample latents from the encoder's posterior each time they are read, or use its mean.")
    network.add_argument("--gradient_checkpointing", action="store_true",
        help="Recompute activations in the backward pass, to save memory.")
    network.add_argument("--compile", action="store_true", help="Compile the network with torch.compile.")
    network.add_argument("--allow_tf32", action="store_true", help="Use TF32 in the network; targets stay exact.")
    network.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Precision of the network. Default: that of `accelerate config`.")

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", default="stf-model",
        help="Folder for the pipeline, with checkpoints in checkpoint-N.")
    training.add_argument("--overwrite_output_dir", action="store_true", help="Replace the run in output_dir.")
    training.add_argument("--seed", type=number(int, 0), default=0,
        help="Random seed for weights, data order, noise and samples.")
    training.add_argument("--train_batch_size", type=count, default=64, help="Batch size per process and micro-batch.")
    training.add_argument("--num_epochs", type=count, default=100, help="Number of passes over the images as sources.")
    training.add_argument("--max_train_steps", type=count, help="Number of optimizer steps; overrides --num_epochs.")
    training.add_argument("--gradient_accumulation_steps", type=count, default=1,
        help="Number of micro-batches per optimizer step.")
    training.add_argument("--learning_rate", type=positive, default=1e-4,
        help="Peak learning rate, reached after warm-up.")
    training.add_argument("--scale_lr", action="store_true",
        help="Multiply the learning rate by the number of processes, the accumulation steps and the batch size.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    training.add_argument("--lr_scheduler", choices=schedules, default="cosine", help="Learning-rate schedule.")
    training.add_argument("--lr_warmup_steps", type=number(int, 0), default=500, help="Number of warm-up steps.")
    training.add_argument("--adam_beta1", type=share, default=0.95, help="AdamW: decay of the first moment.")
    training.add_argument("--adam_beta2", type=share, default=0.999, help="AdamW: decay of the second moment.")
    training.add_argument("--adam_weight_decay", type=number(float, 0), default=1e-6, help="AdamW: weight decay.")
    training.add_argument("--adam_epsilon", type=positive, default=1e-8, help="AdamW: epsilon.")
    training.add_argument("--max_grad_norm", type=positive, default=1.0, help="Norm to which gradients are clipped.")
    training.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True,
        help="Save an exponential moving average of the weights as `unet`, beside the raw weights.")
    training.add_argument("--ema_inv_gamma", type=positive, default=1.0,
        help="EMA decay: inv_gamma in 1 - (1 + step / inv_gamma)^-power.")
    training.add_argument("--ema_power", type=positive, default=3 / 4, help="EMA decay: power in that formula.")
    training.add_argument("--ema_max_decay", type=share, default=0.9999, help="Largest EMA decay.")
    training.add_argument("--post_hoc_ema", action="store_true",
        help="Save averages with each checkpoint, from which reconstruct_ema.py makes an average of any width.")
    training.add_argument("--checkpointing_steps", type=count, default=500,
        help="Save a checkpoint every this many steps.")
    training.add_argument("--checkpoints_total_limit", type=count, help="Number of checkpoints to keep. Default: all.")
    training.add_argument("--resume_from_checkpoint", help='Checkpoint to resume from: "latest", or a folder.')

    report = parser.add_argument_group("reports")
    report.add_argument("--report_to", "--logger",
        help='A tracker that Accelerate supports, "all" or "none". Default: tensorboard, if installed.')
    report.add_argument("--logging_dir", default="logs", help="Folder of the tracker's logs, in output_dir.")
    report.add_argument("--logging_steps", type=count, default=10, help="Log every this many steps.")
    report.add_argument("--sample_steps", type=count,
        help="Sample a grid every this many steps. Default: at the end only.")
    report.add_argument("--save_images_epochs", type=count, help="Sample a grid every this many epochs.")
    report.add_argument("--save_model_epochs", type=count, help="Save the pipeline every this many epochs.")
    report.add_argument("--eval_batch_size", type=count,
        help="Batch size for sampling, per process. Default: --train_batch_size.")
    report.add_argument("--num_samples", type=count, default=16, help="Number of images per grid.")
    report.add_argument("--num_inference_steps", "--ddpm_num_inference_steps", type=number(int, 2, high=1000), default=35,
        help="Number of sampling steps.")
    report.add_argument("--eval_steps", type=count,
        help="Measure the samples' distance from the training images every this many steps and at the end, and keep "
             "the pipeline with the smallest in `best`. Needs --eval_extractor.")
    report.add_argument("--eval_extractor",
        help="Vision model of transformers whose features are compared: a folder or a repository on the Hub, such as "
             "facebook/dinov2-base.")
    report.add_argument("--eval_num_samples", type=number(int, 5), default=1000,
        help="Number of samples per evaluation.")
    report.add_argument("--push_to_hub", action="store_true", help="Upload the pipeline to the Hub at the end.")
    report.add_argument("--hub_steps", type=count, help="Upload every this many steps as well.")
    report.add_argument("--model_license", help="License in the model card, for instance apache-2.0. Default: none.")
    report.add_argument("--hub_model_id", help="Repository on the Hub. Default: the name of output_dir.")
    report.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")
    report.add_argument("--hub_token", help="Access token for the Hub. Default: that of `hf auth login`.")

    # Flags of Diffusers' train_unconditional.py: one is accepted and ignored, the others have no counterpart here.
    report.add_argument("--local_rank", type=int, help="Set by old launchers; ignored, since LOCAL_RANK is used.")
    for flag, instead in REFUSED_FLAGS.items():
        parser.add_argument(flag, action=Refused, instead=instead)

    args = parser.parse_args(argv)
    del args.local_rank
    for wrong, message in check_flags(args):
        if wrong:
            parser.error(message)
    return args


def check_flags(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Combinations of flags that are refused: (whether this one is there, what to do about it)."""
    # Latents that are not the same each time they are read.
    drawn = bool(args.vae) and (args.latents == "sample" or args.random_flip)
    data = [
        (args.dataset_name and args.train_data_dir, "--dataset_name and --train_data_dir exclude each other."),
        (args.streaming and args.max_train_steps is None,
         "--streaming needs --max_train_steps: the length of a stream is not known."),
        (args.streaming and (args.reference or args.share_reference),
         "--streaming: references are the buffer of each process, from which its sources are drawn; others would bias "
         "the target. Leave --reference and --share_reference out."),
        (args.streaming and args.skip_corrupt,
         "--streaming reads images when their turn comes: leave --skip_corrupt out."),
        (args.streaming and (args.save_images_epochs or args.save_model_epochs),
         "--streaming has no epochs: pass --sample_steps instead of --save_images_epochs and --save_model_epochs."),
        (args.streaming and (args.vae or args.dataloader_num_workers),
         "--streaming reads images in the training process: leave --vae and --dataloader_num_workers out."),
    ]
    network = [
        (args.model_config and args.pretrained_model_name_or_path,
         "--model_config and --pretrained_model_name_or_path exclude each other."),
        (args.class_dropout and not args.class_conditional, "--class_dropout needs --class_conditional."),
    ]
    latents = [
        (args.latents == "mean" and not args.vae, "--latents needs --vae."),
        (args.vae and args.reorient,
         "--reorient turns images, and turned latents are not latents of turned images. Leave one out."),
        (drawn and args.reference == "bank",
         "--reference bank: latents are drawn, or flipped, anew each time. Use --reference batch, or --latents mean "
         "without --random_flip."),
        (drawn and args.train_batch_size == 1 and (args.objective == "dsm" or args.reference_batch_size == 1),
         "--train_batch_size 1: latents are drawn as a function of the images read together, so a single one would "
         "always be drawn the same. Use 2 or more, or --latents mean without --random_flip."),
        (args.vae and args.reference_device == "disk",
         "--reference_device disk keeps images, not latents. Leave it out."),
    ]
    references = [
        (args.objective == "dsm" and args.reference_batch_size is not None,
         "--reference_batch_size has no effect with --objective dsm; leave it out."),
        (args.objective == "dsm" and (args.reference or args.reference_device or args.share_reference),
         "--reference, --reference_device and --share_reference have no effect with --objective dsm."),
        (args.reference == "bank" and args.reference_batch_size is not None,
         "--reference bank uses all images: leave --reference_batch_size out, or pass --reference batch."),
        (args.reference_device and args.reference != "bank", "--reference_device needs --reference bank."),
        (args.reference_device == "cuda" and not torch.cuda.is_available(),
         "--reference_device cuda: there is no GPU."),
        (args.reference_batch_size is not None and args.reference_batch_size < args.train_batch_size,
         f"--reference_batch_size {args.reference_batch_size} includes the batch itself, so it must be at least "
         f"--train_batch_size {args.train_batch_size}."),
    ]
    reports = [
        (args.overwrite_output_dir and args.resume_from_checkpoint,
         "--overwrite_output_dir and --resume_from_checkpoint exclude each other."),
        (args.sample_steps and args.save_images_epochs, "--sample_steps and --save_images_epochs exclude each other."),
        (bool(args.eval_steps) != bool(args.eval_extractor), "--eval_steps and --eval_extractor need each other."),
        (args.eval_steps and args.streaming,
         "--eval_steps compares with all training images, which a stream does not keep. Leave one out."),
        (not args.push_to_hub and (args.hub_model_id or args.hub_private_repo or args.hub_token or args.hub_steps),
         "--hub_model_id, --hub_private_repo, --hub_token and --hub_steps need --push_to_hub."),
    ]
    return [(bool(wrong), message) for wrong, message in (*data, *network, *latents, *references, *reports)]
# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stf_diffusers import STFTrainingObjective
from stf_diffusers.export import diffusers_pipeline, process_to_config, read_metadata, save_pipeline
from stf_diffusers.model_card import model_card
from stf_diffusers.training import run_folder
from stf_diffusers.training.autoencoder import check_fit, check_same_autoencoder, load_autoencoder
from stf_diffusers.training.averages import ExponentialAverage, PostHocAverages
from stf_diffusers.training.checkpoints import check_finite, load_checkpoint, read_step, save_checkpoint
from stf_diffusers.training.conditioning import reoriented
from stf_diffusers.training.data_set import load_split, public_name
from stf_diffusers.training.evaluation import Evaluation
from stf_diffusers.training.hub_upload import HubUpload
from stf_diffusers.training.image_data import flip_at_random, open_images
from stf_diffusers.training.latents import load_latents
from stf_diffusers.training.launch import make_accelerator
from stf_diffusers.training.network import new_network, pretrained_network
from stf_diffusers.training.noise_process import DISCRETE_PARAMETERS, choose_process
from stf_diffusers.training.references import choose_references
from stf_diffusers.training.run_lock import RunLock
from stf_diffusers.training.sampling import sample_grid, seed_for, seeded_generator
from stf_diffusers.training.sources import TrainingImages
from stf_diffusers.training.stop_signal import REQUEUE_EXIT_CODE, StopSignal, settle_communication, stop_with_launcher
from stf_diffusers.training.streaming import open_stream
from stf_diffusers.training.training_log import (
    MetricsFile,
    TargetShare,
    TrainingLog,
    log_picture,
    save_profile,
    start_trackers,
    tracker_may_fail,
)

# ---- the parts of a run that need its flags


def due(step: int, every: int | None) -> bool:
    """Whether what is done every so many steps is to be done after this one."""
    return bool(every) and step % (every or 1) == 0


# fmt: off
def notices(args: argparse.Namespace, max_steps: int) -> list[str]:
    """What the flags ask for and will not get."""
    rows = [
        (args.lr_warmup_steps >= max_steps and args.lr_scheduler != "constant",
         f"The learning rate does not reach its peak: --lr_warmup_steps {args.lr_warmup_steps} of {max_steps} steps."),
        (args.sample_steps and args.sample_steps >= max_steps,
         f"--sample_steps {args.sample_steps} has no effect in {max_steps} steps; a grid is sampled at the end."),
        (args.checkpoints_total_limit and args.checkpointing_steps >= max_steps,
         f"--checkpoints_total_limit has no effect: --checkpointing_steps {args.checkpointing_steps} of {max_steps} steps."),
        (args.label_column and not args.class_conditional, "--label_column has no effect without --class_conditional."),
        (not args.use_ema and (args.ema_inv_gamma, args.ema_power, args.ema_max_decay) != (1.0, 3 / 4, 0.9999),
         "--ema_inv_gamma, --ema_power and --ema_max_decay have no effect with --no-use_ema."),
        (args.max_train_steps and args.num_epochs != 100, "--num_epochs has no effect with --max_train_steps."),
        (args.share_reference and int(os.environ.get("WORLD_SIZE", "1")) == 1,
         "--share_reference has no effect in a single process."),
    ]
    return [message for wrong, message in rows if wrong]
# fmt: on


def describe_run(args: argparse.Namespace, images: TrainingImages, **known: Any) -> dict[str, Any]:
    """What a resumed run must share with this one."""
    flags = {name: getattr(args, name) for name in KEPT_FLAGS}
    return {**flags, **images.manifest(), "num_classes": images.num_classes, **known}


def describe_settings(
    args: argparse.Namespace, accelerator: Accelerator, network: ModelMixin, max_steps: int
) -> dict[str, Any]:
    """What a resumed run should share with this one."""
    settings = {name: getattr(args, name) for name in NOTICED_FLAGS} | {"mixed_precision": accelerator.mixed_precision}
    settings |= {name: value for name, value in network.config.items() if not name.startswith("_")}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["steps_of_schedule"] = max_steps
    as_saved: dict[str, Any] = json.loads(json.dumps(settings))
    return as_saved


def end(accelerator: Accelerator, hub: HubUpload | None, output_dir: Path, patience: float = 1800) -> None:
    """Say what is on the Hub, waiting so many seconds for uploads, and end processes and trackers in order."""
    if hub is not None:
        hub.report(output_dir, patience)
    settle_communication()
    with tracker_may_fail():
        accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    """The run that the flags describe.

    Raises:
        SystemExit: with `REQUEUE_EXIT_CODE`, stopped by a signal.
        ValueError: something is wrong that can be known before the first step.
        FloatingPointError: the loss or the weights are not finite.
        OSError: something cannot be written.
    """
    args = parse_args(argv)
    stop_with_launcher()
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(errors_in_flags(vars(args), FLAG_OF, printed=process_flags()))
        accelerator = make_accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            report_to=args.report_to,
            project_dir=Path(args.output_dir) / args.logging_dir,
        )
        process_index, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        logging.basicConfig(format="%(message)s")
        for name in (NAME, "stf_diffusers"):
            logging.getLogger(name).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
        stack.enter_context(logging_redirect_tqdm())  # lines stand above the progress bar, not within it
        places = {"process_index": process_index, "num_processes": num_processes}
        quiet, output_dir = not accelerator.is_main_process, Path(args.output_dir)

        # Everything that is known to be wrong is said before anything on disk changes.
        run_folder.check_writable(output_dir)
        if accelerator.is_main_process:
            stack.enter_context(RunLock(output_dir))
        resume = run_folder.find_checkpoint(output_dir, args.resume_from_checkpoint)
        first_step = 0 if resume is None else run_folder.step_of(resume)
        if args.resume_from_checkpoint == "latest" and resume is None:
            logger.info("No checkpoint in %s yet: starting at step 0.", output_dir)
        if resume is None and not args.overwrite_output_dir:
            run_folder.refuse_occupied(output_dir, resuming=args.resume_from_checkpoint is not None)

        # ---- data
        with accelerator.main_process_first():
            dataset = load_split(
                args.dataset_name, args.dataset_config_name, args.train_data_dir,
                cache_dir=args.cache_dir, streaming=args.streaming, split=args.split,
            )  # fmt: skip
        reading = {
            name: getattr(args, name)
            for name in (
                "image_column",
                "label_column",
                "class_conditional",
                "image_mode",
                "resolution",
                "center_crop",
                "seed",
            )
        }
        images: TrainingImages
        if args.streaming:
            buffer = {"batch_size": args.train_batch_size, "buffer_size": args.reference_batch_size}
            images = stream = open_stream(dataset, **buffer, **places, **reading)
            stream.agree(gather_object([stream.summary()]))
        else:
            images = pixels = open_images(
                dataset, skip_corrupt=args.skip_corrupt, image_memory_gb=args.image_memory_gb,
                image_cache=args.image_cache, cache_dir=args.cache_dir, quiet=quiet, **reading,
            )  # fmt: skip
            if args.objective == "stf" and images.labels is not None:
                alone = [label for label, count in Counter(images.labels.tolist()).items() if count == 1]
                if alone:
                    logger.warning("Classes of a single image have the targets of denoising score matching: %s.", alone)
        class_names = images.class_names
        data_name = public_name(args.dataset_name or args.train_data_dir) or "scikit-learn's handwritten digits"

        # ---- noise process and network
        pretrained = args.pretrained_model_name_or_path
        try:
            saved = read_metadata(pretrained, cache_dir=args.cache_dir) if pretrained else None
        except OSError as error:
            raise ValueError(f"--pretrained_model_name_or_path {pretrained} cannot be read: {error}") from error
        parameters = (*process_flags(), *DISCRETE_PARAMETERS)
        given = {flag: getattr(args, flag) for flag in parameters if getattr(args, flag) is not None}
        begun_on = run_folder.run_of(resume).get("process", {})
        if "sigma_data" in begun_on and args.noise_process in (None, begun_on["name"]):
            given.setdefault("sigma_data", begun_on["sigma_data"])
        process, sampling_range = choose_process(
            args.noise_process,
            given,
            standard_deviation=(lambda: 1.0) if args.vae else (lambda: images.standard_deviation),
            saved=saved,
        )
        objective = STFTrainingObjective(process)
        vae, shape = load_autoencoder(args.vae, args.cache_dir).to(device) if args.vae else None, images.shape
        if vae is not None:
            if pretrained:
                check_same_autoencoder(vae, pretrained, args.cache_dir)
            shape, _ = check_fit(vae, pixels.__getitems__([0])["images"])
        torch.manual_seed(seed_for(args.seed))
        labelled = {"num_classes": images.num_classes, "class_dropout": args.class_dropout, "reorient": args.reorient}
        if pretrained:
            network, conditioning = pretrained_network(pretrained, shape, cache_dir=args.cache_dir, **labelled)
        else:
            network, conditioning = new_network(
                shape, model_config=args.model_config, cache_dir=args.cache_dir, **labelled
            )
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        # An impossible range, combination or number of steps fails now, not after the training.
        timesteps = diffusers_pipeline(network, process, vae=vae, **sampling_range).scheduler.config[
            "num_train_timesteps"
        ]
        if args.num_inference_steps > timesteps:
            raise ValueError(
                f"--num_inference_steps {args.num_inference_steps} is more than the {timesteps} timesteps of the process. Use "
                "at most as many."
            )
        sampling = {
            "seed": args.seed,
            "batch_size": args.eval_batch_size or args.train_batch_size,
            "num_inference_steps": args.num_inference_steps,
        }
        evaluation = None
        if args.eval_steps:
            evaluation = Evaluation(
                accelerator, pixels, output_dir, eval_extractor=args.eval_extractor, eval_steps=args.eval_steps,
                eval_num_samples=args.eval_num_samples, data_name=data_name, first_step=first_step,
                cache_dir=args.cache_dir, **sampling,
            )  # fmt: skip
        latent_file = None
        if vae is not None:
            with accelerator.main_process_first():
                images, vae, latent_file = load_latents(
                    pixels, vae, output_dir, sample=args.latents == "sample", mirrored=args.random_flip,
                    own=bool(pretrained), batch_size=args.train_batch_size, device=device, seed=args.seed, quiet=quiet,
                )  # fmt: skip

        # ---- references
        flips = args.random_flip and vae is None  # latents are read flipped
        bank_file = output_dir / run_folder.BANK_FILE
        with accelerator.main_process_first():
            if args.overwrite_output_dir and args.reference_device == "disk" and accelerator.is_main_process:
                bank_file.unlink(missing_ok=True)
            references = choose_references(
                images, args.train_batch_size, objective=args.objective, reference=args.reference,
                reference_batch_size=args.reference_batch_size, reference_memory_gb=args.reference_memory_gb,
                reference_device=args.reference_device, share_reference=args.share_reference, bank_file=bank_file,
                augmentation="horizontal_flip" if flips else "none", device=device, seed=args.seed, quiet=quiet, **places,
            )  # fmt: skip
        batches_per_epoch = 0 if references.sampler is None else len(references.sampler)
        images_per_step = args.gradient_accumulation_steps * args.train_batch_size * num_processes
        max_steps = args.max_train_steps or math.ceil(
            args.num_epochs * batches_per_epoch / args.gradient_accumulation_steps
        )

        steps_per_epoch = max(1, batches_per_epoch // args.gradient_accumulation_steps)
        sample_steps = args.sample_steps or steps_per_epoch * (args.save_images_epochs or 0)
        save_steps = steps_per_epoch * (args.save_model_epochs or 0)
        for notice in notices(args, max_steps):
            logger.warning(notice)

        # ---- optimizer
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=args.learning_rate * (images_per_step if args.scale_lr else 1),
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            fused=True,
        )
        lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
        )
        model, optimizer, lr_scheduler = accelerator.prepare(network, optimizer, lr_scheduler)
        if args.compile:
            network.compile()
        ema = None
        if args.use_ema:
            ema = ExponentialAverage(
                network, inv_gamma=args.ema_inv_gamma, power=args.ema_power, max_decay=args.ema_max_decay
            )
        averages = [average for average in (ema, PostHocAverages(network) if args.post_hoc_ema else None) if average]

        # ---- resume
        manifest = {
            "run": describe_run(
                args, images, reference=references.kind, reference_batch_size=references.n, num_processes=num_processes,
                share_reference=references.shared, process=process_to_config(process), sampling_range=sampling_range,
                null_label=conditioning.null_label if args.class_dropout else None,
            ),
            "settings": describe_settings(args, accelerator, network, max_steps),
        }  # fmt: skip
        if resume is not None:
            first_step = read_step(resume, manifest)
            load_checkpoint(accelerator, resume, averages)
            logger.info("Resumed after step %d from %s.", first_step, resume)
            if first_step >= max_steps:
                logger.warning("All %d steps are done: only the pipeline is saved. See --max_train_steps.", max_steps)
        hub = None
        if args.push_to_hub and accelerator.is_main_process:
            hub = HubUpload(args.hub_model_id or output_dir.resolve().name, args.hub_token, args.hub_private_repo)
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            run_folder.remove_leftovers(output_dir)
        accelerator.wait_for_everyone()
        # The token opens the user's account.
        start_trackers(accelerator, {name: value for name, value in vars(args).items() if name != "hub_token"})
        metrics_file = None
        if accelerator.is_main_process:  # nothing at the start can fail any more
            if args.overwrite_output_dir:
                run_folder.clear(output_dir)
            run_folder.remove_latents(output_dir, kept=latent_file)
            metrics_file = MetricsFile(output_dir / run_folder.METRICS, first_step)
        logger.info(
            "%s on %s with %s; %s; %.1f M parameters; %d steps of %d images; processes: %d.",
            args.objective.upper(), process, references, images,
            network.num_parameters() / 1e6, max_steps, images_per_step, num_processes,
        )  # fmt: skip

        # ---- what is shown and saved
        def averaged_pipeline(step: int) -> DiffusionPipeline:
            """The pipeline of copied weights: sampling and saving leave the trained ones alone."""
            averaged = type(network).from_config(network.config).to(device).eval()
            averaged.load_state_dict(network.state_dict())
            if ema is not None:
                ema.copy_to(averaged)
            metadata = {**manifest["run"], "steps": step, "images_seen": step * images_per_step}
            metadata |= {"dataset": data_name, "license": args.model_license, "vae": public_name(args.vae)}
            metadata |= {"class_names": class_names}
            return diffusers_pipeline(averaged, process, vae=vae, metadata=metadata, **sampling_range)

        def save_grid(pipeline: DiffusionPipeline, step: int) -> Path:
            grid = sample_grid(pipeline, args.num_samples, **sampling)
            path = output_dir / run_folder.SAMPLES / f"step-{step:07d}.png"
            if accelerator.is_main_process:
                path.parent.mkdir(exist_ok=True)
                grid.save(path)
                logger.info("Samples: %s", path)
                log_picture(accelerator, grid, step)
            return path

        def save_weights(pipeline: DiffusionPipeline) -> None:
            if accelerator.is_main_process:
                with run_folder.explained_write_errors("the pipeline", output_dir):
                    save_pipeline(pipeline, output_dir, raw_network=None if ema is None else network)

        def save(step: int) -> None:
            """The pipeline, a grid of its samples, its card, and where asked for all of it on the Hub."""
            pipeline = averaged_pipeline(step)
            save_weights(pipeline)
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

        # ---- the loop
        log, target_share = TrainingLog(accelerator), TargetShare(device)
        batches = images.batches_from(
            first_step * args.gradient_accumulation_steps,
            references.sampler,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        )
        progress = tqdm(
            initial=first_step, total=max_steps, desc="Training", unit="step",
            disable=not accelerator.is_local_main_process,
        )  # fmt: skip
        evaluate(first_step)  # where the run was stopped before it could
        model.train()
        stop.defer()
        for step in range(first_step + 1, max_steps + 1):
            for micro in range(args.gradient_accumulation_steps):
                started = time.perf_counter()
                batch = next(batches)
                log.waited(time.perf_counter() - started)
                draws = partial(seeded_generator, device, args.seed, process_index, step, micro)
                torch.manual_seed(seed_for(args.seed, process_index, step, micro, DROPOUT))
                batch = send_to_device(batch, device, non_blocking=True)
                if flips:
                    batch["reference_images"] = flip_at_random(batch["reference_images"], draws(FLIPS))
                sources = batch["reference_images"][: args.train_batch_size]
                labels, classes, orientation = conditioning.draw(batch.get("labels"), len(sources), draws(CONDITIONS))
                with target_share.targets():
                    perturbed = objective.perturb(sources, generator=draws(NOISE), **references.of(batch, classes))
                    perturbed = reoriented(perturbed, orientation)
                with accelerator.accumulate(model):
                    output = model(perturbed.model_input, perturbed.timestep, class_labels=labels).sample
                    loss = objective.loss(output, perturbed)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                log.add(loss, output, perturbed, sources, step, batch["index"])
            learning_rate = lr_scheduler.get_last_lr()[0]
            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
                for average in averages:
                    average.step()
            progress.update()
            target_share.step_done()

            # A checkpoint with the last step and with each pipeline too, so that a killed run never has a pipeline and
            # nothing to go on from.
            save_due = due(step, args.hub_steps) or due(step, save_steps)
            checkpoint_due = due(step, args.checkpointing_steps) or step == max_steps or save_due
            stopping = stop.agreed() and step < max_steps
            if step in (first_step + 1, max_steps) or due(step, args.logging_steps) or checkpoint_due or stopping:
                report = log.flush() | {"learning_rate": learning_rate, "gradient_norm": float(gradient_norm)}
                progress.set_postfix(loss=f"{report['loss']:.4f}", lr=f"{learning_rate:.2e}")
                if metrics_file is not None:
                    metrics_file.append(step, report)
                with tracker_may_fail():
                    accelerator.log(report, step=step)
            if checkpoint_due or stopping:
                check_finite(network, step)
                save_checkpoint(accelerator, output_dir, step, averages, manifest, args.checkpoints_total_limit)
            if stopping:
                save_weights(averaged_pipeline(step))
                logger.info(
                    "Stopped by a signal after step %d; %s can be sampled, and --resume_from_checkpoint latest continues.",
                    step, output_dir,
                )  # fmt: skip
                end(accelerator, hub, output_dir, patience=20)
                raise SystemExit(REQUEUE_EXIT_CODE)
            evaluate(step)
            if step < max_steps and save_due:
                save(step)
            elif step < max_steps and due(step, sample_steps):
                save_grid(averaged_pipeline(step), step)
        progress.close()

        # ---- save
        save(max(first_step, max_steps))
        profile = log.profile.result()
        if accelerator.is_main_process and profile["rows"]:
            save_profile(profile, output_dir / run_folder.SAMPLES / "noise_levels.png")
        end(accelerator, hub, output_dir)


if __name__ == "__main__":
    run(main)
