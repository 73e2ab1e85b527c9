"""How a training was launched: an Accelerator for its loop, and launches that cannot work refused before anything is touched."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

# How long processes wait for each other: the first one downloads, decodes, encodes and writes banks while the others wait,
# for hours where data are large. PyTorch's own ten minutes would end such a run before its first step.
PATIENCE = timedelta(hours=12)


def make_accelerator(
    *,
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    report_to: str | None = None,
    project_dir: Path | None = None,
) -> Accelerator:
    """The Accelerator of a training whose loop counts optimizer steps and brings its own batches.

    Args:
        gradient_accumulation_steps: micro-batches of an optimizer step.
        mixed_precision: "no", "fp16" or "bf16". None: what the launcher says.
        report_to: a tracker, "all" or "none". None: tensorboard, if installed.
        project_dir: folder of the tracker's logs.

    Raises:
        ValueError: a distributed mode or device that trainings are not tested on, fewer processes than announced, or a
            tracker that is not installed.
    """
    for mode in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        # What `accelerate launch` sets; Accelerate itself passes over some of them in silence, on a CPU for instance.
        if os.environ.get(f"ACCELERATE_USE_{mode}", "false").lower() == "true":
            raise ValueError(f"{mode} is not supported. Use data parallelism: choose it in `accelerate config`.")
    trackers = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if report_to not in (None, "all", "none", *trackers):
        raise ValueError(f"report_to={report_to!r}: installed trackers are {', '.join(trackers) or 'none'}.")
    log_with = report_to or ("tensorboard" if "tensorboard" in trackers else "none")
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        mixed_precision=mixed_precision,
        log_with=None if log_with == "none" else log_with,
        project_dir=None if project_dir is None else str(project_dir),
        # The schedule counts optimizer steps and is stepped once for each, whatever the number of processes.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    check_mode(accelerator.distributed_type, accelerator.device)
    check_number_of_processes(accelerator.num_processes)
    return accelerator


def start_logging(accelerator: Accelerator, *names: str) -> None:
    """Have these loggers, and the package's, say on the main process what they do, and on others what goes wrong."""
    logging.basicConfig(format="%(message)s")
    for name in (*names, "stf_diffusers"):
        logging.getLogger(name).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)


def check_mode(mode: DistributedType, device: torch.device) -> None:
    """Raise ValueError for a distributed mode or device that trainings are not tested on."""
    if mode not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f"{mode.value} is not supported. Use data parallelism: choose it in `accelerate config`.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device {device.type} is not supported: targets need float64. Pass --cpu to `accelerate launch`."
        )


def check_number_of_processes(running: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError unless the run has as many processes as its launcher announced.

    Args:
        running: number of processes of the run, as Accelerate found it.
        environment: what the launcher has set.
    """
    cure = (
        "On CPUs set ACCELERATE_USE_CPU=true, and launch with `accelerate launch --multi_gpu --num_processes N` or "
        "`torchrun --nproc_per_node N`; on GPUs pass no more processes than there are GPUs."
    )
    announced = int(environment.get("WORLD_SIZE", "1"))
    if announced != running:
        raise ValueError(
            f"the launcher announced {announced} processes (WORLD_SIZE), and this run has {running}: each would train "
            f"alone. {cure}"
        )
    # `accelerate launch --num_processes N` without --multi_gpu sets an address for N processes, and starts one.
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if launched and "WORLD_SIZE" not in environment and running == 1 and "OMPI_COMM_WORLD_SIZE" not in environment:
        raise ValueError(
            f"`accelerate launch` was given several processes (it has set MASTER_ADDR), and started one. {cure}"
        )
