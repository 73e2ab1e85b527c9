"""Checkpoints of a training: written aside, renamed when complete, compared with the run that resumes, rotated."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..export import Network
from ..files import discard, settle
from .run_folder import CHECKPOINT_PREFIX, MANIFEST, complete_checkpoints, explained_write_errors

logger = logging.getLogger(__name__)


class CheckpointPart(Protocol):
    """A file or more in a checkpoint, of what all processes have alike: a `WeightAverage`, for instance."""

    def save(self, checkpoint: Path, output_dir: Path, step: int) -> None:
        """Write it into the checkpoint of `step`, which is being written, in the run's folder `output_dir`."""

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote. Raises whatever the reader raises."""


def due(step: int, every: int | None) -> bool:
    """Whether what is done every so many steps is to be done after this one."""
    return bool(every) and step % (every or 1) == 0


def make_manifest(
    accelerator: Accelerator, network: Network, run: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The manifest of a run's checkpoints.

    Args:
        accelerator: the training's Accelerator, whose precision is among the settings.
        network: the network, whose config is among the settings.
        run: JSON values that a resumed run must share with this one.
        settings: those that it should.
    """
    own = {name: value for name, value in network.config.items() if not name.startswith("_")}
    settings = {**settings, "mixed_precision": accelerator.mixed_precision, **own}
    return {"run": dict(run), "settings": json.loads(json.dumps(settings))}


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    parts: Iterable[CheckpointPart],
    manifest: dict[str, dict[str, Any]],
    limit: int | None = None,
) -> None:
    """Save the state after `step` optimizer steps from all processes, then drop the oldest checkpoints beyond `limit`.

    Args:
        accelerator: has the model, optimizer and schedule prepared. Every process calls this.
        output_dir: the run's folder.
        step: number of optimizer steps done.
        parts: the averages of the weights, and whatever else a run needs to go on.
        manifest: as from `make_manifest`.
        limit: number of checkpoints to keep. None: all.

    Raises:
        OSError: it cannot be written; says where, and how much room there is.
    """
    # One name on all processes.
    staging, final = output_dir / f".saving-{CHECKPOINT_PREFIX}{step}", output_dir / f"{CHECKPOINT_PREFIX}{step}"
    with explained_write_errors(f"the checkpoint of step {step}", output_dir):
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(staging))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for part in parts:
                part.save(staging, output_dir, step)
            (staging / MANIFEST).write_text(json.dumps({"step": step, **manifest}, indent=2))
            settle(staging, final)
            if limit is not None:
                for path in complete_checkpoints(output_dir)[:-limit]:
                    if path != final:
                        discard(path)
    accelerator.wait_for_everyone()


def check_finite(network: nn.Module, step: int) -> None:
    """Raise FloatingPointError if a weight is not finite, before anything is saved."""
    if not bool(torch.stack([parameter.isfinite().all() for parameter in network.parameters()]).all()):
        raise FloatingPointError(
            f"the weights are not finite after step {step}. They were not saved; the last checkpoint is good. Lower "
            "learning_rate=, or use bf16 instead of fp16."
        )


def read_step(checkpoint: Path, manifest: dict[str, Any]) -> int:
    """The step of a checkpoint. Warns if its run had other settings.

    Raises:
        ValueError: it belongs to a run that differs in what decides the data's order, the weights' shapes or the target.
    """
    try:
        saved = json.loads((checkpoint / MANIFEST).read_text())
        run, settings, step = saved["run"], saved["settings"], int(saved["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / MANIFEST} is damaged: {error!r}. Delete {checkpoint} to resume earlier."
        ) from error
    if different := differences(run, manifest["run"]):
        raise ValueError(
            f"{checkpoint} belongs to another run: {different}. Use the same values, or start anew in another output_dir=."
        )
    if different := differences(settings, manifest["settings"]):
        logger.warning(
            "Changed since the checkpoint: %s. The run goes on, but will not end like an uninterrupted one.", different
        )
    return step


def differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """The values that are not what was saved, as a list for people; empty where there are none."""
    keys = [*now, *(key for key in saved if key not in now)]
    return "; ".join(
        f"{key} ({saved.get(key)} there, {now.get(key)} now)" for key in keys if saved.get(key) != now.get(key)
    )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, parts: Iterable[CheckpointPart]) -> None:
    """Load what `save_checkpoint` saved into the prepared objects and the parts. Torch files are read with weights_only.

    Raises:
        ValueError: something is missing, damaged, or does not fit.
    """
    try:
        accelerator.load_state(str(checkpoint), load_kwargs={"weights_only": True})
        for part in parts:
            part.load(checkpoint)
    except Exception as error:
        raise ValueError(
            f"{checkpoint} cannot be loaded: it is damaged, or of another network ({error}). Pass the run's own "
            "model_config=, or delete it to resume from an earlier one."
        ) from error
