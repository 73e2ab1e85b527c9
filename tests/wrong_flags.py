"""Flags of the training script that are wrong, or wrong together, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TRAINER = "train_unconditional_stf"
# Where the folders of `make_places` are reached from the folder of an attempt.
PLACES = ".places"


@dataclass(frozen=True)
class Row:
    """A command line and what it leads to.

    Args:
        typed: flags after those of a short run of the script, where ``{root}`` is the folder of the attempt and other
            names are those of `make_places`.
        says: words of the message, or, of a run that goes through, of its log.
        make: lays out files in the folder before.
        script: the script's name.
        without: flags, each with a value, of the short run that are left out.
        code: exit code.
    """

    typed: str
    says: str | tuple[str, ...]
    make: Callable[[Path], object] | None = None
    script: str = TRAINER
    without: tuple[str, ...] = ()
    code: int = 2


VALUES = {
    "--train_batch_size 0": "at least 1",
    "--max_train_steps 0": "at least 1",
    "--num_epochs -1": "at least 1",
    "--gradient_accumulation_steps 0": "at least 1",
    "--seed -1": "at least 0",
    "--p_std 0": "above 0",
    "--sigma_data 0": "above 0",
    "--sigma_data many": "invalid",
    "--adam_beta1 1.5": "at most 1",
    "--ema_max_decay 2": "at most 1",
    "--ema_power 0": "above 0",
    "--num_samples 0": "at least 1",
    "--num_inference_steps 1": "at least 2",
    "--checkpoints_total_limit 0": "at least 1",
    "--checkpointing_steps 0": "at least 1",
    "--logging_steps 0": "at least 1",
    "--lr_warmup_steps -1": "at least 0",
    "--lr_scheduler sawtooth": "invalid choice",
    "--lr_scheduler piecewise_constant": "invalid choice",
    "--mixed_precision fp8": "invalid choice",
    "--image_mode CMYK": "invalid choice",
    "--noise_process cosine": "invalid choice",
    "--resolution 0": "at least 1",
    "--reference_memory_gb 0": "above 0",
    "--dataloader_num_workers -1": "at least 0",
    "--learning_rate -1": "above 0",
    "--learning_rate inf": "above 0",
    "--learning_rate nan": "above 0",
    "--p_mean nan": "at least -20 and at most 20",
    "--p_std 1e6": "at most 10",
    "--num_inference_steps 2000": "at most 1000",
    "--epsilon_t 0.9": "at most 0.5",
    "--noise_std 0": "above 0",
    "--noise_mean 30": "at most 20",
    "--class_dropout 1": "at most 0.99",
    "--eval_num_samples 4": "must be at least 5",
}

COMBINATIONS = {
    "no such flag": Row("--no_such_flag 1", "unrecognized arguments: --no_such_flag"),
    "a flag of Diffusers' script that has no counterpart": Row(
        "--enable_xformers_memory_efficient_attention", "memory-efficient attention is used; leave it out"
    ),
    "a file of flags that is not there": Row("@{root}/no.txt", "no.txt"),
    "sampling range": Row("--sigma_min 10 --sigma_max 1", "sigma_min < sigma_max"),
    "batch above images": Row("--train_batch_size 25", "--train_batch_size 25"),
    "references above images": Row("--reference_batch_size 25", "exceeds the 24 images"),
    "references below batch": Row("--reference_batch_size 3", "includes the batch itself"),
    "bank for dsm": Row("--objective dsm --reference bank", "no effect with --objective dsm"),
    "bank of n": Row("--reference bank --reference_batch_size 8", "uses all images"),
    "device of a batch": Row("--reference_device disk", "needs --reference bank"),
    "references for dsm": Row("--objective dsm --reference_batch_size 8", "no effect with --objective dsm"),
    "foreign parameter": Row("--noise_process vp --p_mean 0", "--p_mean is not a parameter of --noise_process vp"),
    "range upside down": Row("--noise_process ve --sigma_min 5 --sigma_max 1", "sigma_min < sigma_max"),
    "noise lost in float32": Row("--noise_process ve --sigma_min 1e-4", "Raise sigma_min"),
    "two sources of noise levels": Row(
        "--noise_distribution log_uniform --p_mean 0", "--p_mean and --noise_distribution both say"
    ),
    "two priors": Row(
        "--noise_distribution adaptive --noise_mean 0 --p_mean 1", "--p_mean and --noise_distribution both say"
    ),
    "no such distribution": Row("--noise_distribution normal", ("--noise_distribution normal is none of", "log_normal")),
    "a profile of a stream": Row("--noise_distribution profile --streaming", "leave --streaming and --vae out"),
    "a mean without a distribution": Row("--noise_mean 0", "--noise_mean needs --noise_distribution log_normal"),
    "adaptive on a stream": Row(
        "--noise_distribution adaptive --streaming --max_train_steps 9", "which a stream does not know"
    ),
    "adaptive on drawn latents": Row("--noise_distribution adaptive --vae here", "pass --latents mean and --reference bank"),
    "a floor that is not adaptive": Row("--adaptive_floor 0.5", "need --noise_distribution adaptive"),
    "weights that are not adaptive": Row("--importance_weights", "need --noise_distribution adaptive"),
    "adaptive classes without a bank": Row(
        "--noise_distribution adaptive --class_conditional --reference batch", "Pass --reference bank"
    ),
    "levels that the process does not have": Row(
        "--noise_process ve --noise_distribution log_normal --noise_mean 15", "at which the process is trained"
    ),
    "missing column": Row("--image_column picture", "has the columns"),
    "no labels there": Row("--class_conditional --label_column kind", "has the columns"),
    "resolution and network": Row("--resolution 9", "multiple of 2"),
    "three sides": Row("--resolution 8 8 8", "--resolution 8 8 8: pass one side, or height and width"),
    "no such split": Row("--split validation", "no 'validation' split; it has ['train']"),
    "an empty split": Row("--split train[:0]", "corresponds to no data"),
    "named checkpoint missing": Row("--resume_from_checkpoint checkpoint-7", "no complete checkpoint"),
    "resumed and overwritten": Row("--resume_from_checkpoint latest --overwrite_output_dir", "exclude each other"),
    "unknown tracker": Row("--report_to abacus", "installed trackers"),
    "two data sets": Row(
        "--dataset_name cifar10 --train_data_dir x", "--dataset_name and --train_data_dir exclude each other"
    ),
    "hub flags alone": Row("--hub_model_id a/b", "need --push_to_hub"),
    "missing data": Row("--train_data_dir /no/such/folder", "/no/such/folder"),
    # Conditions and latents.
    "dropout without classes": Row("--class_dropout 0.1", "needs --class_conditional"),
    "latents without autoencoder": Row("--latents mean", "needs --vae"),
    "turned latents": Row("--vae {vae} --reorient 0.5", "turned latents are not latents"),
    "latents on disk": Row("--vae {vae} --latents mean --reference bank --reference_device disk", "keeps images"),
    "bank of drawn latents": Row("--vae {vae} --reference bank --noise_process vp", "latents are drawn"),
    "always the same draw": Row(
        "--vae {vae} --train_batch_size 1 --objective dsm", "would always be drawn the same"
    ),
    "classes of latents in a unet": Row("--vae {vae} --class_conditional", "Use a DiTTransformer2DModel"),
    "transformer of pixels": Row("--model_config {dit} --noise_process vp", "pass --vae"),
    "transformer on edm": Row("--model_config {dit} --vae {vae}", "--noise_process vp or --noise_process flow"),
    "transformer turned": Row("--model_config {dit} --reorient 0.5", "needs a UNet2DModel"),
    "logit of uniform times": Row("--noise_process flow --logit_mean 1", "needs --time_distribution"),
    "times of another process": Row("--time_distribution uniform", "not a parameter of --noise_process edm"),
    "timesteps of another process": Row(
        "--noise_process vp --ddpm_num_steps 50", "--ddpm_num_steps is not a parameter of --noise_process vp"
    ),
    "more sampling steps than timesteps": Row(
        "--noise_process discrete --ddpm_num_steps 20 --num_inference_steps 35",
        "--num_inference_steps 35 is more than the 20 timesteps",
    ),
    "no autoencoder": Row("--vae /no/such/folder", "/no/such/folder"),
    "grey images": Row("--vae {vae} --image_mode L", "--image_mode RGB"),
    "unknown network": Row("--model_config {vae}/config.json", "must be the config of a UNet2DModel or a DiT"),
    "a network and a pretrained one": Row(
        "--model_config {dit} --pretrained_model_name_or_path {run}",
        "--model_config and --pretrained_model_name_or_path exclude each other",
    ),
    # Evaluations.
    "no extractor": Row("--eval_steps 2", "need each other"),
    "no steps": Row("--eval_extractor x", "need each other"),
    "no such extractor": Row("--eval_steps 2 --eval_extractor /nowhere", "--eval_extractor /nowhere"),
    "evaluation of a stream": Row("--eval_steps 2 --eval_extractor x --streaming", "does not keep"),
    "variances with dropped classes": Row(
        "--noise_distribution adaptive --objective dsm --class_conditional --class_dropout 0.1",
        ("has two of", "--class_dropout"),
    ),
    "held-out images of a stream": Row("--validation_split test --streaming", "leave --streaming and --vae out"),
    "held-out images of latents": Row("--validation_split test --vae {vae}", "leave --streaming and --vae out"),
    "no held-out images": Row("--validation_steps 2", "need --validation_split"),
    "no such held-out split": Row("--validation_split nosuch", ("--validation_split nosuch", "it has ['train']")),
    "few held-out images": Row("--validation_split train", ("24 images are too few", "--validation_split")),
    # Streams.
    "no end": Row(
        "--streaming", "--streaming needs --max_train_steps", without=("--max_train_steps",)
    ),
    "a bank of a stream": Row("--streaming --reference bank", "would bias"),
    "a stream shared": Row("--streaming --share_reference", "would bias"),
    "a stream of latents": Row("--streaming --vae x", "leave --vae"),
    "a stream of workers": Row("--streaming --dataloader_num_workers 2", "--dataloader_num_workers out"),
    "too short a stream": Row("--streaming --reference_batch_size 25", "the stream has 24 images for each process"),
}  # fmt: skip

VALUE_ROWS = {
    case: Row(case, (f"error: argument {case.split()[0]}", case.split()[1], says)) for case, says in VALUES.items()
}
