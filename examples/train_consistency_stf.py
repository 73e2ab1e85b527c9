#!/usr/bin/env python
"""Tune a diffusion model into one that makes images in one step, on the stable target, and save it as a Diffusers pipeline.

    # the digits: an EDM model, and a consistency model from it
    accelerate launch examples/train_unconditional_stf.py --output_dir digits-stf
    accelerate launch examples/train_consistency_stf.py --pretrained_model_name_or_path digits-stf \\
        --output_dir digits-consistency

    # the same without a checkout, after pip install
    accelerate launch -m stf_diffusers.examples.train_consistency_stf --pretrained_model_name_or_path digits-stf \\
        --output_dir digits-consistency

    # Easy Consistency Tuning, without references, to compare with
    accelerate launch examples/train_consistency_stf.py --pretrained_model_name_or_path digits-stf --objective ect \\
        --output_dir digits-ect

    # CIFAR-10 on 8 GPUs in bf16, from the model that train_unconditional_stf.py's example saved
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/train_consistency_stf.py \\
        --pretrained_model_name_or_path cifar10-stf --dataset_name cifar10 --random_flip --train_batch_size 16 \\
        --learning_rate 1e-4 --max_train_steps 100000 --checkpointing_steps 10000 --output_dir cifar10-consistency

    # continue from the latest checkpoint, with the flags in a file, one or more per line
    accelerate launch examples/train_consistency_stf.py @my_flags.txt --resume_from_checkpoint latest

The network's denoiser becomes a map f(x, t) from any noise level to the data. Each step compares f at two points of the way
from noise to data (docs/consistency.md); the stages of the training bring the two closer. Flags and files are those of
train_unconditional_stf.py; EDM alone is trained. On SIGTERM or SIGUSR1 the training processes save a checkpoint after the
current step and end with exit code 75.
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

from stf_diffusers.training import flags
from stf_diffusers.training.command_line import errors_in_flags, run

# As a script this module is "__main__".
NAME = "train_consistency_stf"
logger = logging.getLogger(NAME)

# The random streams of a micro-batch: each is a function of the seed, the process, the step, the micro-batch and its number.
NOISE, FLIPS, DROPOUT, CONDITIONS = range(4)

# Flags that a resumed run must share with the one it continues.
SCHEDULE_FLAGS = ("num_stages", "schedule_q", "schedule_k", "schedule_b", "p_mean", "p_std", "huber_c")
KEPT_FLAGS = (*flags.KEPT_FLAGS, *SCHEDULE_FLAGS)

# Flags of train_unconditional_stf.py that are refused, and what to do instead.
REFUSED_FLAGS = {
    "--streaming": "consistency models are trained on images that can be read in any order; leave it out.",
    "--vae": "consistency models are trained on pixels; leave it out.",
    "--latents": "consistency models are trained on pixels; leave it out.",
    "--reorient": "consistency models are trained on upright images; leave it out.",
    "--num_inference_steps": "samples during the training are made in one step; leave it out.",
    **flags.REFUSED_FLAGS,
}

# ---- flags


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.make_parser(__doc__)
    count, positive, nonnegative = (
        flags.number(int, 1), flags.number(float, 0, above=True), flags.number(float, 0)
    )

    flags.add_data_flags(parser)

    method = parser.add_argument_group("method")
    method.add_argument("--objective", choices=["stf", "ect"], default="stf",
        help="stf: the earlier point lies on the line to the posterior mean over the references; ect: Easy Consistency "
             "Tuning, on the line to the source, without references.")
    flags.add_reference_flags(method)
    method.add_argument("--num_stages", type=count, default=8,
        help="Number of stages, in each of which the two points lie closer.")
    method.add_argument("--stage_steps", type=count,
        help="Number of optimizer steps of a stage; the last one goes on. Default: all stages are equally long.")
    method.add_argument("--schedule_q", type=flags.number(float, 1, above=True), default=2.0,
        help="Factor by which a stage brings the two points closer.")
    method.add_argument("--schedule_k", type=nonnegative, default=8.0,
        help="At small noise levels the earlier point lies up to 1 + k / 2 times as far back.")
    method.add_argument("--schedule_b", type=nonnegative, default=1.0, help="Levels below 1 / b count as small.")
    method.add_argument("--p_mean", type=flags.number(float), default=-1.1,
        help="Mean of the logarithm of the later point's noise level.")
    method.add_argument("--p_std", type=flags.number(float, 0, above=True, high=10), default=2.0, help="Standard deviation of that logarithm.")
    method.add_argument("--huber_c", type=nonnegative,
        help="c of the pseudo-Huber loss. Default: 0.00054 times the root of the number of values of an image.")
    method.add_argument("--noise_process", choices=["edm"], default="edm", help="Forward process.")
    method.add_argument("--sigma_data", type=flags.sigma_data_value,
        help="Standard deviation of the data in [-1, 1], or auto to measure it. Default: the pretrained pipeline's, "
             "otherwise auto.")
    method.add_argument("--sigma_min", type=positive,
        help="Smallest noise level in sampling. Default: the pretrained pipeline's, otherwise 0.002.")
    method.add_argument("--sigma_max", type=positive,
        help="Noise level that samples start from. Default: the pretrained pipeline's, otherwise 80.")

    flags.add_compute_flags(flags.add_network_flags(parser))

    flags.add_training_flags(parser)

    report = flags.add_report_flags(parser)
    report.add_argument("--search_levels", action=argparse.BooleanOptionalAction, default=True,
        help="At the end, search for the noise level between two steps whose samples are nearest to the training images, "
             "by --eval_extractor or by pixels.")
    flags.add_evaluation_and_hub_flags(report)
    flags.add_refused_flags(parser, REFUSED_FLAGS)
    parser.set_defaults(
        output_dir="consistency-model", learning_rate=3e-4, lr_scheduler="constant_with_warmup", lr_warmup_steps=100
    )

    args = parser.parse_args(argv)
    del args.local_rank
    too_close = args.schedule_q ** -args.num_stages < 1e-5
    for wrong, message in (
        *flags.check_flags(args, without_references="ect"),
        (too_close, f"--num_stages {args.num_stages} with --schedule_q {args.schedule_q:g}: in the last stages float32 does "
                    "not tell the two points apart. Lower one."),
    ):
        if wrong:
            parser.error(message)
    return args
# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a mistyped flag do not wait for the imports below, which take seconds

from accelerate.utils import broadcast_object_list, send_to_device
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stf_diffusers import ConsistencySchedule, ConsistencyTrainingObjective
from stf_diffusers.export import Network, diffusers_pipeline, process_to_config
from stf_diffusers.training import run_folder
from stf_diffusers.training.averages import ExponentialAverage, PostHocAverages
from stf_diffusers.training.checkpoints import (
    check_finite,
    due,
    load_checkpoint,
    make_manifest,
    read_step,
    save_checkpoint,
)
from stf_diffusers.training.consistency_levels import search_for_images
from stf_diffusers.training.data_set import load_split, public_name
from stf_diffusers.training.device_images import images_on_device
from stf_diffusers.training.evaluation import Evaluation
from stf_diffusers.training.hub_upload import HubUpload
from stf_diffusers.training.image_data import flip_at_random, open_images
from stf_diffusers.training.launch import make_accelerator, start_logging
from stf_diffusers.training.network import choose_network, compute_channels_last, pretrained_metadata
from stf_diffusers.training.noise_process import choose_process
from stf_diffusers.training.optimizer import allow_tf32, make_optimizer
from stf_diffusers.training.pipeline_saver import PipelineSaver
from stf_diffusers.training.references import choose_references, reference_memory
from stf_diffusers.training.run_lock import RunLock
from stf_diffusers.training.sampling import seed_for, seeded_generator
from stf_diffusers.training.stop_signal import REQUEUE_EXIT_CODE, StopSignal, stop_with_launcher
from stf_diffusers.training.training_log import (
    MetricsFile,
    TargetShare,
    TrainingLog,
    save_profile,
    start_trackers,
    tracker_may_fail,
)


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
        stack.enter_context(errors_in_flags(vars(args), flags.FLAG_OF, printed=("sigma_data", "p_mean", "p_std")))
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
                cache_dir=args.cache_dir, split=args.split,
            )  # fmt: skip
        reading = {name: getattr(args, name) for name in flags.READING_FLAGS}
        images = open_images(
            dataset, skip_corrupt=args.skip_corrupt, image_memory_gb=args.image_memory_gb,
            image_cache=args.image_cache, cache_dir=args.cache_dir, quiet=quiet, **reading,
        )  # fmt: skip
        class_names = images.class_names
        data_name = public_name(args.dataset_name or args.train_data_dir) or "scikit-learn's handwritten digits"

        # ---- noise process and network
        pretrained = args.pretrained_model_name_or_path
        saved = pretrained_metadata(pretrained, args.cache_dir)
        if saved and saved["process"]["name"] != "edm":
            raise ValueError(
                f"--pretrained_model_name_or_path {pretrained} was trained on {saved['process']['name']}, and consistency "
                "models are trained on EDM alone. Pass a pipeline that was trained with --noise_process edm."
            )
        if saved and saved.get("reorient"):
            raise ValueError(
                f"--pretrained_model_name_or_path {pretrained} was trained with --reorient, and consistency models are trained "
                "on upright images alone. Pass a pipeline that was trained without."
            )
        given = {name: getattr(args, name) for name in ("sigma_data", "sigma_min", "sigma_max", "p_mean", "p_std")}
        given = {name: value for name, value in given.items() if value is not None}
        begun = run_folder.run_of(resume)
        begun_on = begun.get("process", {})
        if "sigma_data" in begun_on:  # where not, the checkpoint is of another process, and is refused below
            given.setdefault("sigma_data", begun_on["sigma_data"])
        process, sampling_range = choose_process(
            args.noise_process, given, standard_deviation=lambda: images.standard_deviation, saved=saved
        )
        objective = ConsistencyTrainingObjective(
            process,
            schedule=ConsistencySchedule(args.schedule_q, args.schedule_k, args.schedule_b),
            p_mean=args.p_mean,
            p_std=args.p_std,
            huber_c=args.huber_c,
        )
        torch.manual_seed(seed_for(args.seed))
        network, conditioning = choose_network(
            images.shape, pretrained_model_name_or_path=pretrained, model_config=args.model_config,
            num_classes=images.num_classes, class_dropout=args.class_dropout, cache_dir=args.cache_dir,
        )  # fmt: skip
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if args.channels_last:
            compute_channels_last(network)
        diffusers_pipeline(network, process, **sampling_range)  # an impossible range fails now, not after the training
        sampling = {
            "seed": args.seed, "batch_size": args.eval_batch_size or args.train_batch_size, "num_inference_steps": 1,
        }  # fmt: skip
        evaluation = None
        if args.eval_steps:
            evaluation = Evaluation(
                accelerator, images, output_dir, eval_extractor=args.eval_extractor, eval_steps=args.eval_steps,
                eval_num_samples=args.eval_num_samples, data_name=data_name, first_step=first_step,
                consistency_steps=(2,), cache_dir=args.cache_dir, **sampling,
            )  # fmt: skip

        # ---- references
        bank_file = output_dir / run_folder.BANK_FILE
        asked = flags.references_of_run(args, begun)
        # The main process's: what is free differs, and all must choose alike.
        memory_gb = args.reference_memory_gb or broadcast_object_list([reference_memory(device, num_processes)])[0]
        with accelerator.main_process_first():
            if args.overwrite_output_dir and args.reference_device == "disk" and accelerator.is_main_process:
                bank_file.unlink(missing_ok=True)
            references = choose_references(
                images, args.train_batch_size, objective="dsm" if args.objective == "ect" else "stf", **asked,
                reference_memory_gb=memory_gb,
                reference_device=args.reference_device, share_reference=args.share_reference, bank_file=bank_file,
                augmentation="horizontal_flip" if args.random_flip else "none", device=device, seed=args.seed, quiet=quiet, **places,
            )  # fmt: skip
        batched = images_on_device(images, device, memory_gb=memory_gb, bank=references.bank)
        batches_per_epoch = len(references.sampler or ())
        images_per_step = args.gradient_accumulation_steps * args.train_batch_size * num_processes
        max_steps = args.max_train_steps or math.ceil(
            args.num_epochs * batches_per_epoch / args.gradient_accumulation_steps
        )

        steps_per_epoch = max(1, batches_per_epoch // args.gradient_accumulation_steps)
        sample_steps = args.sample_steps or steps_per_epoch * (args.save_images_epochs or 0)
        save_steps = steps_per_epoch * (args.save_model_epochs or 0)
        stage_steps = args.stage_steps or max_steps / args.num_stages
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
            network.compile()  # not DDP's wrapper: the step calls the network itself too
        ema = None
        if args.use_ema:
            ema = ExponentialAverage(
                network, inv_gamma=args.ema_inv_gamma, power=args.ema_power, max_decay=args.ema_max_decay
            )
        averages = [average for average in (ema, PostHocAverages(network) if args.post_hoc_ema else None) if average]

        # ---- resume
        manifest = make_manifest(
            accelerator, network, settings=flags.noticed(args, max_steps) | {"stage_steps": stage_steps},
            run={
                **{name: getattr(args, name) for name in KEPT_FLAGS}, **images.manifest(),
                "num_classes": images.num_classes, "reference": references.kind, "reference_batch_size": references.n,
                "num_processes": num_processes, "share_reference": references.shared,
                "process": process_to_config(process), "sampling_range": sampling_range,
                "null_label": conditioning.null_label if args.class_dropout else None,
            },
        )  # fmt: skip
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
            metrics_file = MetricsFile(output_dir / run_folder.METRICS, first_step)
        logger.info(
            "%s on %s with %s; %s; %.1f M parameters; %d steps of %d images; processes: %d.",
            args.objective.upper(), process, references, batched,
            network.num_parameters() / 1e6, max_steps, images_per_step, num_processes,
        )  # fmt: skip

        # ---- what is shown and saved
        levels: dict[str, list[float]] = {}  # between the steps, by their number; found at the end

        def make_pipeline(averaged: Network, step: int) -> DiffusionPipeline:
            metadata = {**manifest["run"], "steps": step, "images_seen": step * images_per_step}
            metadata |= {"dataset": data_name, "license": args.model_license, "class_names": class_names}
            metadata |= {"consistency": {name: getattr(args, name) for name in SCHEDULE_FLAGS}}
            metadata |= {"consistency_sigmas": levels} if levels else {}
            return diffusers_pipeline(averaged, process, metadata=metadata, **sampling_range)

        saver = PipelineSaver(
            accelerator, output_dir, network, make_pipeline, ema=ema, evaluation=evaluation, hub=hub,
            num_samples=args.num_samples, sampling=sampling,
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
        if first_step < max_steps:
            saver.evaluate(first_step, max_steps, log)  # where the run was stopped before it could
        model.train()
        stop.defer()
        for step in range(first_step + 1, max_steps + 1):
            stage = min(int((step - 1) / stage_steps), args.num_stages - 1)
            for micro in range(args.gradient_accumulation_steps):
                started = time.perf_counter()
                batch = next(batches)
                log.waited(time.perf_counter() - started)
                draws = partial(seeded_generator, device, args.seed, process_index, step, micro)
                # On the CPU: a bank finds the classes in question without waiting for the device.
                conditions = seeded_generator(torch.device("cpu"), args.seed, process_index, step, micro, CONDITIONS)
                labels, classes, _ = conditioning.draw(batch.get("labels"), args.train_batch_size, conditions)
                batch, labels = send_to_device((batch, labels), device, non_blocking=True)
                if args.random_flip:
                    batch["reference_images"] = flip_at_random(batch["reference_images"], draws(FLIPS))
                sources = batch["reference_images"][: args.train_batch_size]
                with target_share.targets():
                    pair = objective.perturb(
                        sources, stage=stage, generator=draws(NOISE), **references.of(batch, classes)
                    )
                dropout = seed_for(args.seed, process_index, step, micro, DROPOUT)
                # On the network that was prepared, not its DDP wrapper, which expects a backward pass; with its autocast.
                with torch.no_grad():
                    torch.manual_seed(dropout)
                    earlier = network(pair.earlier_input, pair.earlier_timestep, class_labels=labels).sample
                with accelerator.accumulate(model):
                    torch.manual_seed(dropout)
                    output = model(pair.model_input, pair.timestep, class_labels=labels).sample
                    losses = objective.losses(output, earlier, pair)
                    loss = losses.mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                log.add_rows(
                    loss, losses, pair.t, pair.effective_sample_size, pair.posterior_mean, sources, step, batch["index"]
                )
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
                saver.save_weights(saver.averaged(step))
                logger.info(
                    "Stopped by a signal after step %d; %s can be sampled, and --resume_from_checkpoint latest continues.",
                    step, output_dir,
                )  # fmt: skip
                saver.end(patience=20)
                raise SystemExit(REQUEUE_EXIT_CODE)
            if step < max_steps:
                saver.evaluate(step, max_steps, log)
                if save_due:
                    saver.save(step)
                elif due(step, sample_steps):
                    saver.save_grid(saver.averaged(step), step)
        progress.close()

        # ---- save
        last = max(first_step, max_steps)
        if args.search_levels:
            search = search_for_images(
                saver.averaged(last), images, evaluation.extractor if evaluation else None, seed=args.seed + 1,
                num_samples=args.eval_num_samples, batch_size=sampling["batch_size"], cache_dir=args.cache_dir, quiet=quiet,
            )  # fmt: skip
            levels |= {str(steps): between for steps, between in search.sigmas.items()}
            logger.info("Between two steps: noise of level %g, the best of %d.", *search.sigmas[2], len(search.tried))
        saver.evaluate(last, max_steps, log)
        saver.save(last)
        profile = log.profile.result()
        if accelerator.is_main_process and profile["rows"]:
            save_profile(profile, output_dir / run_folder.SAMPLES / "noise_levels.png")
        saver.end()


if __name__ == "__main__":
    run(main)
