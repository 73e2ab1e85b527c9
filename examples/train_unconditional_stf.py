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
import logging
import math
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from stf_diffusers.noise import NOISE_PROCESSES
from stf_diffusers.training import flags
from stf_diffusers.training.command_line import errors_in_flags, run

# As a script this module is "__main__".
NAME = "train_unconditional_stf"
logger = logging.getLogger(NAME)

# The random streams of a micro-batch: each is a function of the seed, the process, the step, the micro-batch and its number.
NOISE, FLIPS, DROPOUT, CONDITIONS = range(4)

# Flags that a resumed run must share with the one it continues.
KEPT_FLAGS = (*flags.KEPT_FLAGS, "reorient", "latents")

# ---- flags


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.make_parser(__doc__)
    count = flags.number(int, 1)

    data = flags.add_data_flags(parser)
    data.add_argument("--streaming", action="store_true",
        help="Read the data set in order, without storing it; needs --max_train_steps. The references are the shuffle "
             "buffer, which holds --reference_batch_size images.")

    method = parser.add_argument_group("method")
    method.add_argument("--objective", choices=["stf", "dsm"], default="stf",
        help="stf: the Stable Target Field; dsm: denoising score matching, without references.")
    flags.add_reference_flags(method)
    method.add_argument("--noise_process", choices=[*NOISE_PROCESSES, "discrete"],
        help="Forward process; discrete: the timesteps of a DDPM. Default: the pretrained pipeline's, otherwise edm.")
    method.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "sample"],
        help="DISCRETE: what the network predicts. Default: the pretrained pipeline's, otherwise epsilon.")
    method.add_argument("--ddpm_num_steps", type=count,
        help="DISCRETE: number of timesteps. Default: the pretrained pipeline's, otherwise 1000.")
    method.add_argument("--ddpm_beta_schedule", choices=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
        help="DISCRETE: schedule of the betas. Default: the pretrained pipeline's, otherwise linear.")
    for flag, how in flags.process_flags().items():
        method.add_argument(f"--{flag}", **how)
    method.add_argument("--noise_distribution",
        help="Noise levels sigma / alpha that are drawn: log_normal, logit_normal, log_uniform, profile (half of them where "
             "the data's entropy rate is, which is measured), adaptive (more of them where the network's error is), or a "
             "JSON file of a distribution. Default: the process's own.")
    method.add_argument("--noise_mean", type=flags.number(float, -20, high=20),
        help="Mean of ln(sigma / alpha) for log_normal (default: -1.2), of the logit for logit_normal (default: 0). For "
             "adaptive: start from log_normal instead of the process's own.")
    method.add_argument("--noise_std", type=flags.number(float, 0, above=True, high=10),
        help="Standard deviation of the same. Default: 1.2 and 1.")
    method.add_argument("--adaptive_power", type=flags.number(float, 0, high=2),
        help="ADAPTIVE: power of the error that levels are drawn in proportion to. Default: 0.5.")
    method.add_argument("--adaptive_floor", type=flags.number(float, 0, above=True, high=1),
        help="ADAPTIVE: share of the levels that is drawn without regard to the error. Default: 0.25.")
    method.add_argument("--importance_weights", action="store_true",
        help="ADAPTIVE: weight the loss so that the objective stays that of the levels it starts from.")
    method.add_argument("--reorient", type=flags.number(float, 0, high=1), default=0.0,
        help="Share of images that are rotated or flipped and labelled as such; samples are upright.")

    network = flags.add_network_flags(parser)
    network.add_argument("--vae",
        help="Train on the latents of this Diffusers autoencoder: a folder, or a repository on the Hub.")
    network.add_argument("--latents", choices=["sample", "mean"], default="sample",
        help="Sample latents from the encoder's posterior each time they are read, or use its mean.")
    flags.add_compute_flags(network)

    flags.add_training_flags(parser)

    report = flags.add_report_flags(parser)
    report.add_argument("--num_inference_steps", "--ddpm_num_inference_steps", type=flags.number(int, 2, high=1000), default=35,
        help="Number of sampling steps.")
    report.add_argument("--validation_split",
        help="Measure the error against the posterior mean on images of this split, such as test, and beside it on training "
             "images, and say where the network knows the latter.")
    report.add_argument("--validation_steps", type=count,
        help="Number of steps between these measurements. Default: --checkpointing_steps.")
    report.add_argument("--validation_images", type=flags.number(int, 32),
        help="Number of images of either split. Default: 512.")
    flags.add_evaluation_and_hub_flags(report)
    flags.add_refused_flags(parser, flags.REFUSED_FLAGS)

    args = parser.parse_args(argv)
    del args.local_rank
    for wrong, message in (*check_flags(args), *flags.check_flags(args, without_references="dsm")):
        if wrong:
            parser.error(message)
    return args


def check_flags(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Combinations of its own flags that are refused: (whether this one is there, what to do about it)."""
    # Latents that are not the same each time they are read.
    drawn = bool(args.vae) and (args.latents == "sample" or args.random_flip)
    data = [
        (args.streaming and args.max_train_steps is None,
         "--streaming needs --max_train_steps: the length of a stream is not known."),
        (args.streaming and (args.reference or args.share_reference),
         "--streaming: references are the buffer of each process, from which its sources are drawn; others would bias "
         "the target. Leave --reference and --share_reference out."),
        (args.streaming and args.skip_corrupt,
         "--streaming reads images when their turn comes: leave --skip_corrupt out."),
        (args.streaming and (args.save_images_epochs or args.save_model_epochs),
         "--streaming has no epochs: pass --sample_steps instead of --save_images_epochs and --save_model_epochs."),
        (args.eval_steps and args.streaming,
         "--eval_steps compares with all training images, which a stream does not keep. Leave one out."),
        (args.validation_split and (args.streaming or args.vae),
         "--validation_split needs all training images as references, pixel by pixel: leave --streaming and --vae out."),
        (not args.validation_split and (args.validation_steps or args.validation_images),
         "--validation_steps and --validation_images need --validation_split."),
        (args.streaming and (args.vae or args.dataloader_num_workers),
         "--streaming reads images in the training process: leave --vae and --dataloader_num_workers out."),
    ]
    twice = next((flag for flag in flags.OWN_DISTRIBUTION if getattr(args, flag) is not None), None)
    noise = [
        (args.noise_distribution == "profile" and (args.streaming or args.vae),
         "--noise_distribution profile measures the images before the training: leave --streaming and --vae out, or pass "
         "a file of variance_report.py."),
        (args.noise_distribution == "adaptive" and args.streaming,
         "--noise_distribution adaptive subtracts the known variance of the targets, which a stream does not know. Leave one "
         "out."),
        (args.noise_distribution == "adaptive" and args.vae and not (args.latents == "mean" and args.reference == "bank"),
         "--noise_distribution adaptive subtracts the known variance of the targets: with --vae pass --latents mean and "
         "--reference bank, whose targets have none."),
        (args.noise_distribution == "adaptive" and args.objective == "dsm" and args.class_dropout,
         "--noise_distribution adaptive subtracts the known variance of the targets, which --objective dsm has two of where "
         "--class_dropout drops classes: leave it out."),
        (args.noise_distribution != "adaptive"
         and (args.importance_weights or (args.adaptive_power, args.adaptive_floor) != (None, None)),
         "--adaptive_power, --adaptive_floor and --importance_weights need --noise_distribution adaptive."),
        (twice and (args.noise_distribution not in (None, "adaptive") or (args.noise_mean, args.noise_std) != (None, None)),
         f"--{twice} and --noise_distribution both say what noise levels are drawn. Leave one out."),
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
    return [(bool(wrong), message) for wrong, message in (*data, *noise, *latents)]
# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stf_diffusers import STFTrainingObjective
from stf_diffusers.adaptive_noise import AdaptiveNoise
from stf_diffusers.export import Network, diffusers_pipeline, process_to_config
from stf_diffusers.training import run_folder
from stf_diffusers.training.adaptive_levels import AdaptiveLevels, subtract_known_variance
from stf_diffusers.training.autoencoder import check_fit, check_same_autoencoder, load_autoencoder
from stf_diffusers.training.averages import ExponentialAverage, PostHocAverages
from stf_diffusers.training.checkpoints import (
    check_finite,
    due,
    load_checkpoint,
    make_manifest,
    read_step,
    save_checkpoint,
)
from stf_diffusers.training.conditioning import reoriented
from stf_diffusers.training.data_set import load_split, public_name
from stf_diffusers.training.device_images import images_on_device
from stf_diffusers.training.evaluation import Evaluation
from stf_diffusers.training.hub_upload import HubUpload
from stf_diffusers.training.image_data import flip_at_random, open_images
from stf_diffusers.training.latents import load_latents
from stf_diffusers.training.launch import make_accelerator, start_logging
from stf_diffusers.training.network import choose_network, compute_channels_last, pretrained_metadata
from stf_diffusers.training.noise_process import (
    DISCRETE_PARAMETERS,
    choose_distribution,
    choose_process,
    distribution_settings,
    profile_of,
)
from stf_diffusers.training.optimizer import allow_tf32, make_optimizer
from stf_diffusers.training.pipeline_saver import PipelineSaver
from stf_diffusers.training.references import choose_references, reference_memory
from stf_diffusers.training.run_lock import RunLock
from stf_diffusers.training.sampling import seed_for, seeded_generator
from stf_diffusers.training.sources import TrainingImages
from stf_diffusers.training.stop_signal import REQUEUE_EXIT_CODE, StopSignal, stop_with_launcher
from stf_diffusers.training.streaming import open_stream
from stf_diffusers.training.training_log import (
    MetricsFile,
    TargetShare,
    TrainingLog,
    save_profile,
    start_trackers,
    tracker_may_fail,
)
from stf_diffusers.training.validation import Validation, bank_for, open_held_out


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
        stack.enter_context(errors_in_flags(vars(args), flags.FLAG_OF, printed=flags.process_flags()))
        accelerator = make_accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            report_to=args.report_to,
            project_dir=Path(args.output_dir) / args.logging_dir,
        )
        process_index, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        start_logging(accelerator, NAME)
        stack.enter_context(logging_redirect_tqdm())  # lines stand above the progress bar, not within it
        places = {"process_index": process_index, "num_processes": num_processes}
        quiet, output_dir = not accelerator.is_main_process, Path(args.output_dir)

        # Everything that is known to be wrong is said before anything on disk changes.
        run_folder.check_writable(output_dir)
        if accelerator.is_main_process:
            stack.enter_context(RunLock(output_dir))
        resume = run_folder.checkpoint_to_resume(output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
        first_step = 0 if resume is None else run_folder.step_of(resume)

        # ---- data
        with accelerator.main_process_first():
            dataset = load_split(
                args.dataset_name, args.dataset_config_name, args.train_data_dir,
                cache_dir=args.cache_dir, streaming=args.streaming, split=args.split,
            )  # fmt: skip
        reading = {name: getattr(args, name) for name in flags.READING_FLAGS}
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
        held_out = None
        if args.validation_split:
            with accelerator.main_process_first():
                held_out = open_held_out(
                    args.validation_split, pixels, args.dataset_name, args.dataset_config_name, args.train_data_dir,
                    cache_dir=args.cache_dir, skip_corrupt=args.skip_corrupt, **reading,
                )  # fmt: skip
        class_names = images.class_names
        data_name = public_name(args.dataset_name or args.train_data_dir) or "scikit-learn's handwritten digits"

        # ---- noise process and network
        pretrained = args.pretrained_model_name_or_path
        saved = pretrained_metadata(pretrained, args.cache_dir)
        parameters = (*flags.process_flags(), *DISCRETE_PARAMETERS)
        given = {flag: getattr(args, flag) for flag in parameters if getattr(args, flag) is not None}
        begun = run_folder.run_of(resume)
        begun_on = begun.get("process", {})
        if "sigma_data" in begun_on and args.noise_process in (None, begun_on["name"]):
            given.setdefault("sigma_data", begun_on["sigma_data"])
        process, sampling_range = choose_process(
            args.noise_process,
            given,
            standard_deviation=(lambda: 1.0) if args.vae else (lambda: images.standard_deviation),
            saved=saved,
        )
        distribution = choose_distribution(
            args.noise_distribution, process, noise_mean=args.noise_mean, noise_std=args.noise_std,
            profile=lambda: profile_of(pixels, process, seed=args.seed, device=device),
            begun_with=begun.get("noise_distribution") if begun.get("noise_profile") else None, sampling_range=sampling_range,
            adaptive_power=args.adaptive_power, adaptive_floor=args.adaptive_floor, device=device,
        )  # fmt: skip
        objective = STFTrainingObjective(process, distribution=distribution)
        vae, shape = load_autoencoder(args.vae, args.cache_dir).to(device) if args.vae else None, images.shape
        if vae is not None:
            if pretrained:
                check_same_autoencoder(vae, pretrained, args.cache_dir)
            shape, _ = check_fit(vae, pixels.__getitems__([0])["images"])
        torch.manual_seed(seed_for(args.seed))
        network, conditioning = choose_network(
            shape, pretrained_model_name_or_path=pretrained, model_config=args.model_config,
            num_classes=images.num_classes, class_dropout=args.class_dropout, reorient=args.reorient,
            latents=vae is not None, cache_dir=args.cache_dir,
        )  # fmt: skip
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if args.channels_last:
            compute_channels_last(network)
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
        asked = flags.references_of_run(args, begun)
        # The main process's: what is free differs, and all must choose alike.
        memory_gb = args.reference_memory_gb or broadcast_object_list([reference_memory(device, num_processes)])[0]
        with accelerator.main_process_first():
            if args.overwrite_output_dir and args.reference_device == "disk" and accelerator.is_main_process:
                bank_file.unlink(missing_ok=True)
            references = choose_references(
                images, args.train_batch_size, objective=args.objective, reference_memory_gb=memory_gb, **asked,
                reference_device=args.reference_device, share_reference=args.share_reference, bank_file=bank_file,
                augmentation="horizontal_flip" if flips else "none", device=device, seed=args.seed, quiet=quiet, **places,
            )  # fmt: skip
        adaptive = None
        if isinstance(distribution, AdaptiveNoise):
            adaptive = AdaptiveLevels(accelerator, distribution, importance_weights=args.importance_weights)
            if resume is None:
                subtract_known_variance(
                    distribution, process, pixels, references, mirrored=flips, seed=args.seed, device=device,
                    memory_gb=memory_gb,
                )  # fmt: skip
        bank, validation = references.bank, None
        if held_out is not None:
            bank = bank_for(
                pixels,
                references,
                reference_memory_gb=memory_gb,
                mirrored=flips,
                device=device,
                quiet=quiet,
            )
            validation = Validation(
                accelerator, held_out, pixels, bank, process, distribution, conditioning=conditioning, output_dir=output_dir,
                validation_steps=args.validation_steps or args.checkpointing_steps,
                validation_images=args.validation_images or 512, batch_size=sampling["batch_size"], seed=args.seed,
                first_step=first_step,
            )  # fmt: skip
        batched = images_on_device(images, device, memory_gb=memory_gb, bank=bank)
        batches_per_epoch = 0 if references.sampler is None else len(references.sampler)
        images_per_step = args.gradient_accumulation_steps * args.train_batch_size * num_processes
        max_steps = args.max_train_steps or math.ceil(
            args.num_epochs * batches_per_epoch / args.gradient_accumulation_steps
        )

        steps_per_epoch = max(1, batches_per_epoch // args.gradient_accumulation_steps)
        sample_steps = args.sample_steps or steps_per_epoch * (args.save_images_epochs or 0)
        save_steps = steps_per_epoch * (args.save_model_epochs or 0)
        for notice in flags.notices(args, max_steps):
            logger.warning(notice)

        # ---- optimizer
        if args.allow_tf32:
            allow_tf32()
        optimizer = make_optimizer(
            network, learning_rate=args.learning_rate * (images_per_step if args.scale_lr else 1),
            betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon,
            mixed_precision=accelerator.mixed_precision,
        )  # fmt: skip
        lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
        )
        model, optimizer, lr_scheduler = accelerator.prepare(network, optimizer, lr_scheduler)
        if args.compile:
            model.compile()
        ema = None
        if args.use_ema:
            ema = ExponentialAverage(
                network, inv_gamma=args.ema_inv_gamma, power=args.ema_power, max_decay=args.ema_max_decay
            )
        averages = [average for average in (ema, PostHocAverages(network) if args.post_hoc_ema else None) if average]
        parts = [*averages, *([adaptive] if adaptive else [])]

        # ---- resume
        manifest = make_manifest(
            accelerator, network, settings=flags.noticed(args, max_steps),
            run={
                **{name: getattr(args, name) for name in KEPT_FLAGS}, **images.manifest(),
                "num_classes": images.num_classes, "reference": references.kind, "reference_batch_size": references.n,
                "num_processes": num_processes, "share_reference": references.shared,
                "process": process_to_config(process), "sampling_range": sampling_range,
                "noise_distribution": distribution_settings(distribution, importance_weights=args.importance_weights),
                "noise_profile": args.noise_distribution == "profile" or None,
                "null_label": conditioning.null_label if args.class_dropout else None,
            },
        )  # fmt: skip
        if resume is not None:
            first_step = read_step(resume, manifest)
            load_checkpoint(accelerator, resume, parts)
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
            "%s on %s at %s noise levels with %s; %s; %.1f M parameters; %d steps of %d images; processes: %d.",
            args.objective.upper(), process, distribution or "its own", references, batched,
            network.num_parameters() / 1e6, max_steps, images_per_step, num_processes,
        )  # fmt: skip

        # ---- what is shown and saved
        def make_pipeline(averaged: Network, step: int) -> DiffusionPipeline:
            metadata = {**manifest["run"], "steps": step, "images_seen": step * images_per_step}
            metadata |= {"dataset": data_name, "license": args.model_license, "vae": public_name(args.vae)}
            metadata |= {"class_names": class_names}
            return diffusers_pipeline(averaged, process, vae=vae, metadata=metadata, **sampling_range)

        saver = PipelineSaver(
            accelerator, output_dir, network, make_pipeline, ema=ema, evaluation=evaluation, validation=validation,
            hub=hub, num_samples=args.num_samples, sampling=sampling,
        )  # fmt: skip

        # ---- the loop
        log, target_share = TrainingLog(accelerator), TargetShare(device)
        batches = batched.batches_from(
            first_step * args.gradient_accumulation_steps,
            references.sampler,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        )
        progress = tqdm(
            initial=first_step, total=max_steps, desc="Training", unit="step",
            disable=not accelerator.is_local_main_process,
        )  # fmt: skip
        saver.evaluate(first_step, max_steps, log)  # where the run was stopped before it could
        model.train()
        stop.defer()
        for step in range(first_step + 1, max_steps + 1):
            for micro in range(args.gradient_accumulation_steps):
                started = time.perf_counter()
                batch = next(batches)
                log.waited(time.perf_counter() - started)
                draws = partial(seeded_generator, device, args.seed, process_index, step, micro)
                torch.manual_seed(seed_for(args.seed, process_index, step, micro, DROPOUT))
                # On the CPU: a bank finds the classes in question without waiting for the device.
                conditions = seeded_generator(torch.device("cpu"), args.seed, process_index, step, micro, CONDITIONS)
                labels, classes, orientation = conditioning.draw(batch.get("labels"), args.train_batch_size, conditions)
                batch, labels, orientation = send_to_device((batch, labels, orientation), device, non_blocking=True)
                if flips:
                    batch["reference_images"] = flip_at_random(batch["reference_images"], draws(FLIPS))
                sources = batch["reference_images"][: args.train_batch_size]
                with target_share.targets():
                    perturbed = objective.perturb(sources, generator=draws(NOISE), **references.of(batch, classes))
                    perturbed = reoriented(perturbed, orientation)
                with accelerator.accumulate(model):
                    output = model(perturbed.model_input, perturbed.timestep, class_labels=labels).sample
                    loss = objective.loss(output, perturbed, adaptive.weights(perturbed) if adaptive else None)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                log.add(loss, output, perturbed, sources, step, batch["index"])
                if adaptive:
                    adaptive.add(output, perturbed)
            learning_rate = lr_scheduler.get_last_lr()[0]
            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
                for average in averages:
                    average.step()
            if adaptive:
                adaptive.step()
            progress.update()
            target_share.step_done()

            # A checkpoint with the last step and with each pipeline too, so that a killed run never has a pipeline and
            # nothing to go on from.
            save_due = due(step, args.hub_steps) or due(step, save_steps)
            checkpoint_due = due(step, args.checkpointing_steps) or step == max_steps or save_due
            stopping = stop.agreed() and step < max_steps
            if step in (first_step + 1, max_steps) or due(step, args.logging_steps) or checkpoint_due or stopping:
                report = log.flush() | {"learning_rate": learning_rate, "gradient_norm": float(gradient_norm)}
                report |= adaptive.report() if adaptive else {}
                progress.set_postfix(loss=f"{report['loss']:.4f}", lr=f"{learning_rate:.2e}")
                if metrics_file is not None:
                    metrics_file.append(step, report)
                with tracker_may_fail():
                    accelerator.log(report, step=step)
            if checkpoint_due or stopping:
                check_finite(network, step)
                save_checkpoint(accelerator, output_dir, step, parts, manifest, args.checkpoints_total_limit)
                if adaptive:
                    adaptive.show(output_dir / run_folder.SAMPLES / "noise_distribution.png", step)
            if stopping:
                saver.save_weights(saver.averaged(step))
                logger.info(
                    "Stopped by a signal after step %d; %s can be sampled, and --resume_from_checkpoint latest continues.",
                    step, output_dir,
                )  # fmt: skip
                saver.end(patience=20)
                raise SystemExit(REQUEUE_EXIT_CODE)
            saver.evaluate(step, max_steps, log)
            if step < max_steps and save_due:
                saver.save(step)
            elif step < max_steps and due(step, sample_steps):
                saver.save_grid(saver.averaged(step), step)
        progress.close()

        # ---- save
        saver.save(max(first_step, max_steps))
        profile = log.profile.result()
        if accelerator.is_main_process and profile["rows"]:
            save_profile(profile, output_dir / run_folder.SAMPLES / "noise_levels.png")
        saver.end()


if __name__ == "__main__":
    run(main)
