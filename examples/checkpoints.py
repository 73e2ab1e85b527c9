"""Checkpoints of a training run: written aside, renamed when complete, found again, rotated."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from post_hoc_ema import PostHocAverages

logger = get_logger("train_unconditional_stf")

PREFIX = "checkpoint-"
MANIFEST = "training_state.json"
AVERAGE = "ema.safetensors"


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that have their manifest, oldest first. Names being written or removed do not start alike."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if (path / MANIFEST).is_file() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 where there is none."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else -1


def find_checkpoint(output_dir: Path, requested: str | None) -> Path | None:
    """The checkpoint to resume from: None when nothing was requested, or "latest" and there is none.

    Raises:
        ValueError: a checkpoint requested by name is not there or not complete, or is not the newest of `output_dir`:
            the run would leave the later ones behind as if they were its own.
    """
    if requested is None:
        return None
    complete = complete_checkpoints(output_dir)
    if requested == "latest":
        return complete[-1] if complete else None
    for path in (Path(requested), output_dir / requested):
        if (path / MANIFEST).is_file():
            later = [other.name for other in complete if step_of(other) > step_of(path)]
            if path.resolve().parent == output_dir.resolve() and later:
                raise ValueError(
                    f"{output_dir} holds later checkpoints than {path.name}: {', '.join(later)}. Move or delete them, or "
                    "resume into another --output_dir."
                )
            if path.resolve().parent != output_dir.resolve() and complete:
                raise ValueError(
                    f"{output_dir} holds checkpoints of its own ({', '.join(other.name for other in complete)}), among "
                    f"which those of a run that goes on from {path} would be lost. Choose another --output_dir."
                )
            return path
    names = ", ".join(path.name for path in complete) or "none"
    raise ValueError(f"--resume_from_checkpoint {requested}: no complete checkpoint there; in {output_dir}: {names}.")


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    unet: nn.Module,
    ema: EMAModel | None,
    post_hoc: PostHocAverages | None,
    manifest: dict[str, Any],
    limit: int | None,
) -> None:
    """Save the state after `step` optimizer steps from all processes, then drop the oldest beyond `limit`.

    `manifest` has what a resumed run must share with this one ("run") and what it should ("settings").
    """
    staging, final = output_dir / f".saving-{PREFIX}{step}", output_dir / f"{PREFIX}{step}"
    with said_where_it_fails(f"the checkpoint of step {step}", output_dir):
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(staging))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                scalars = ema.state_dict()
                averages = scalars.pop("shadow_params")
                named = {name: average for (name, _), average in zip(unet.named_parameters(), averages, strict=True)}
                save_file(named, staging / AVERAGE, metadata={"state": json.dumps(scalars)})
            if post_hoc is not None:
                post_hoc.save(staging, output_dir, step)
            (staging / MANIFEST).write_text(json.dumps({"step": step, **manifest}, indent=2))
            for path in staging.iterdir():
                sync(path)
            sync(staging)
            if final.exists():
                discard(final)
            os.replace(staging, final)
            sync(output_dir)
            if limit is not None:
                for path in complete_checkpoints(output_dir)[:-limit]:
                    if path != final:
                        discard(path)
    accelerator.wait_for_everyone()


@contextmanager
def said_where_it_fails(what: str, output_dir: Path) -> Iterator[None]:
    """Errors of writing say what was written where, and how much room there is: torch's own do not.

    Raises:
        OSError: whatever went wrong inside.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(output_dir).free / 2**20
        raise OSError(
            f"{what} cannot be written to {output_dir}, where {free:.1f} MiB are free: {error}. What was there before is "
            "whole. Where the disk is full, make room; --resume_from_checkpoint latest continues."
        ) from error


def sync(path: Path) -> None:
    """Have a file or folder on the disk before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed left half-written or half-removed."""
    for pattern in (".saving-*", ".removing-*", ".upload-*", ".writing-*"):
        for path in (*output_dir.glob(pattern), *output_dir.glob(f"best/{pattern}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first, so that a half-removed one is never taken for a whole one."""
    doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def read_step(checkpoint: Path, manifest: dict[str, Any]) -> int:
    """The step of a checkpoint. Warns where its run had other settings.

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
            f"{checkpoint} belongs to another run: {different}. Use the same values, or start anew in another --output_dir."
        )
    if different := differences(settings, manifest["settings"]):
        logger.warning(
            "Unlike before: %s. The run goes on, but does not end like one that was not interrupted.", different
        )
    return step


def differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """The values that are not what was saved, as a list for people; empty where there are none."""
    keys = [*now, *(key for key in saved if key not in now)]
    return "; ".join(
        f"{key} ({saved.get(key)} there, {now.get(key)} now)" for key in keys if saved.get(key) != now.get(key)
    )


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    unet: nn.Module,
    ema: EMAModel | None,
    post_hoc: PostHocAverages | None,
) -> None:
    """Load what `save_checkpoint` saved into the prepared objects and the averages. Torch files are read with weights_only.

    Raises:
        ValueError: something is missing, damaged, or does not fit.
    """
    try:
        accelerator.load_state(str(checkpoint), load_kwargs={"weights_only": True})
        if ema is not None:
            with safe_open(checkpoint / AVERAGE, framework="pt") as file:
                averages = [file.get_tensor(name) for name, _ in unet.named_parameters()]
                ema.load_state_dict({**json.loads(file.metadata()["state"]), "shadow_params": averages})
            ema.to(accelerator.device)
        if post_hoc is not None:
            post_hoc.load(checkpoint)
    except Exception as error:
        raise ValueError(
            f"{checkpoint} cannot be loaded: it is damaged, or of another network ({error}). Pass the run's own "
            "--model_config, or delete it to resume from an earlier one."
        ) from error
