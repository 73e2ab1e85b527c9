"""The flags that the training scripts share: each is defined, checked and described once.

A script adds the groups that it needs to its parser, with defaults of its own (`parser.set_defaults`). Nothing slow is
imported here: `--help` does not wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import torch

from ..noise import NOISE_PROCESSES
from .command_line import Parser
from .presets import PRESETS

# Flags that a resumed run must share with the one it continues: they decide the data's order, the shapes, the target, or
# are held by the state of the optimizer, the schedule and the averaged weights.
KEPT_FLAGS = (
    "objective", "train_batch_size", "gradient_accumulation_steps", "seed", "random_flip", "center_crop",
    "learning_rate", "max_grad_norm", "scale_lr", "lr_scheduler", "lr_warmup_steps",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "class_dropout", "use_ema", "ema_inv_gamma", "ema_power", "ema_max_decay", "post_hoc_ema",
)  # fmt: skip
# A resumed run may change these; it is told that it does.
NOTICED_FLAGS = ("allow_tf32", "channels_last", "compile", "gradient_checkpointing")

# How images are read: arguments of `open_images` and `open_stream`.
READING_FLAGS = (
    "image_column", "label_column", "class_conditional", "image_mode", "resolution", "center_crop", "seed",
)  # fmt: skip

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


# Parameters of processes that describe what noise levels are drawn: `noise_distribution` takes their place.
OWN_DISTRIBUTION = ("p_mean", "p_std", "time_distribution", "logit_mean", "logit_std")


def make_parser(description: str | None) -> Parser:
    """A parser for which ``@file`` stands for the flags in a file, one or more per line, with comments."""
    parser = Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.convert_arg_line_to_args = lambda arg_line: shlex.split(arg_line, comments=True)  # type: ignore[method-assign]
    return parser


# fmt: off
def add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of what is trained on, and how it is read."""
    count = number(int, 1)
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
    return data


def add_reference_flags(method: argparse._ArgumentGroup) -> None:
    """Flags of `choose_references`."""
    count, positive = number(int, 1), number(float, 0, above=True)
    method.add_argument("--reference", choices=["batch", "bank"],
        help="Where references come from: a batch read at each step, or a bank of all images. Default: bank, if the "
             "decoded images fit into --reference_memory_gb and --reference_batch_size is not given; otherwise batch.")
    method.add_argument("--reference_batch_size", type=count,
        help="Number of references per target, the batch itself included; per process, or of all processes together "
             "with --share_reference. Default: 4096, or all images if there are fewer.")
    method.add_argument("--reference_memory_gb", type=positive,
        help="Largest bank, in GiB, that is chosen by default, or largest copy of the images on a GPU without one. Default: "
             "a quarter of the memory that is free.")
    method.add_argument("--reference_device", choices=["cuda", "cpu", "disk"],
        help="Where the bank is kept: on the GPU, in pinned memory, or, for data larger than memory, in a file in "
             "output_dir. Default: the training device.")
    method.add_argument("--share_reference", action="store_true",
        help="Spread the references over the processes: each holds a part of the bank, or of a common reference "
             "batch.")


def references_of_run(args: argparse.Namespace, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Which references were asked for, or else those of the run that is resumed: what is free may have changed since.

    Args:
        args: the flags.
        begun: "run" of the checkpoint's manifest; {} for a new run.
    """
    kind, n = args.reference, args.reference_batch_size
    if kind is None and n is None and begun.get("reference") in ("batch", "bank"):
        kind = begun["reference"]
        n = begun.get("reference_batch_size") if kind == "batch" else None
    return {"reference": kind, "reference_batch_size": n}


def add_network_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of what the network is and knows."""
    network = parser.add_argument_group("network")
    network.add_argument("--model_config", "--model_config_name_or_path",
        help=f"A preset ({', '.join(PRESETS)}), or the config of a UNet2DModel or DiTTransformer2DModel: a JSON file, a "
             "folder or a repository on the Hub. Default: the preset for the images' size.")
    network.add_argument("--pretrained_model_name_or_path", help="A saved pipeline whose network is fine-tuned.")
    network.add_argument("--class_conditional", action="store_true",
        help="Condition the network on class labels; references come from the same class.")
    network.add_argument("--class_dropout", type=number(float, 0, high=0.99), default=0.0,
        help="Probability of dropping an image's class, for guidance; its references then come from all classes.")
    return network


def add_compute_flags(network: argparse._ArgumentGroup) -> None:
    """Flags of how the network is computed."""
    network.add_argument("--gradient_checkpointing", action="store_true",
        help="Recompute activations in the backward pass, to save memory.")
    network.add_argument("--compile", action="store_true", help="Compile the network with torch.compile.")
    network.add_argument("--allow_tf32", action="store_true", help="Use TF32 in the network; targets stay exact.")
    network.add_argument("--channels_last", action="store_true",
        help="Compute the network with the channels of each pixel side by side in memory; what is saved is not.")
    network.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Precision of the network. Default: that of `accelerate config`.")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the run, its steps, the optimizer, the averages and the checkpoints."""
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, high=1)
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


def add_report_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of what is logged, sampled and measured during the run."""
    count = number(int, 1)
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
    return report


def add_evaluation_and_hub_flags(report: argparse._ArgumentGroup) -> None:
    """Flags of evaluations, the model card and uploads."""
    count = number(int, 1)
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
    report.add_argument("--local_rank", type=int, help="Set by old launchers; ignored, since LOCAL_RANK is used.")


def add_refused_flags(parser: argparse.ArgumentParser, refused: Mapping[str, str]) -> None:
    """Flags of other scripts that have no counterpart, with what to do instead."""
    for flag, instead in refused.items():
        parser.add_argument(flag, action=Refused, instead=instead)


def check_flags(args: argparse.Namespace, without_references: str) -> list[tuple[bool, str]]:
    """Combinations of shared flags that are refused: (whether this one is there, what to do about it).

    Args:
        args: the flags.
        without_references: the value of --objective that has no references.
    """
    none = args.objective == without_references
    data = [
        (args.dataset_name and args.train_data_dir, "--dataset_name and --train_data_dir exclude each other."),
    ]
    network = [
        (args.model_config and args.pretrained_model_name_or_path,
         "--model_config and --pretrained_model_name_or_path exclude each other."),
        (args.class_dropout and not args.class_conditional, "--class_dropout needs --class_conditional."),
    ]
    references = [
        (none and args.reference_batch_size is not None,
         f"--reference_batch_size has no effect with --objective {without_references}; leave it out."),
        (none and (args.reference or args.reference_device or args.share_reference),
         f"--reference, --reference_device and --share_reference have no effect with --objective {without_references}."),
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
        (not args.push_to_hub and (args.hub_model_id or args.hub_private_repo or args.hub_token or args.hub_steps),
         "--hub_model_id, --hub_private_repo, --hub_token and --hub_steps need --push_to_hub."),
    ]
    return [(bool(wrong), message) for wrong, message in (*data, *network, *references, *reports)]


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


def noticed(args: argparse.Namespace, max_steps: int) -> dict[str, Any]:
    """What a resumed run should share with this one."""
    settings = {name: getattr(args, name) for name in NOTICED_FLAGS}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["steps_of_schedule"] = max_steps
    return settings
