"""A run's output folder: the names in it, whether it can be used, and what a run that was killed left there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import discard

logger = logging.getLogger(__name__)

# A checkpoint is a folder of this prefix and its step; it is complete when it has its manifest.
CHECKPOINT_PREFIX, MANIFEST = "checkpoint-", "training_state.json"
# What was logged, a JSON object a line.
METRICS = "metrics.jsonl"
# Pictures, snapshots of the averages, evaluations and the best pipeline, the bank on disk, the latents.
SAMPLES, SNAPSHOTS, RECORDS, BEST = "samples", "post_hoc_ema", "evaluations.json", "best"
# Errors on held-out images.
VALIDATION = "validation.json"
BANK_FILE, LATENT_FILES = "reference_bank.safetensors", "latents-*.safetensors"


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that have their manifest, oldest first. Those being written or removed have other names."""
    found = [
        path for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if (path / MANIFEST).is_file() and step_of(path) >= 0
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 where there is none."""
    number = checkpoint.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number.isdecimal() else -1


def run_of(checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint's manifest says of its run ("run" of `save_checkpoint`); {} without one, or where it is damaged."""
    try:
        run = json.loads((checkpoint / MANIFEST).read_text())["run"] if checkpoint else {}
    except (OSError, ValueError, KeyError, TypeError):
        run = {}
    return dict(run)


def find_checkpoint(output_dir: Path, requested: str | None) -> Path | None:
    """The checkpoint to resume from; None when none was requested, or "latest" was and there is none.

    Args:
        output_dir: the folder of the run that resumes.
        requested: "latest", a path, or a name in `output_dir`.

    Raises:
        ValueError: the requested checkpoint is missing or incomplete, or the run would leave checkpoints of `output_dir`
            behind as if they were its own: later ones, or any beside a checkpoint from elsewhere.
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
                    "resume into another output_dir=."
                )
            if path.resolve().parent != output_dir.resolve() and complete:
                raise ValueError(
                    f"{output_dir} holds checkpoints of its own ({', '.join(other.name for other in complete)}), among "
                    f"which those of a run that goes on from {path} would be lost. Choose another output_dir=."
                )
            return path
    names = ", ".join(path.name for path in complete) or "none"
    raise ValueError(
        f"resume_from_checkpoint={requested!r}: no complete checkpoint is there; {output_dir} has: {names}."
    )


def checkpoint_to_resume(output_dir: Path, requested: str | None, overwrite: bool = False) -> Path | None:
    """`find_checkpoint`, and a folder that holds a trained run is refused where it is neither resumed nor overwritten.

    Raises:
        ValueError: as `find_checkpoint` and `refuse_occupied`.
    """
    found = find_checkpoint(output_dir, requested)
    if requested == "latest" and found is None:
        logger.info("No checkpoint in %s yet: starting at step 0.", output_dir)
    if found is None and not overwrite:
        refuse_occupied(output_dir, resuming=requested is not None)
    return found


def check_writable(output_dir: Path) -> None:
    """Raise ValueError unless `output_dir` is a writable folder, or can be made."""
    existing = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={str(output_dir)!r}: {existing} is not a writable folder. Choose another.")


def refuse_occupied(output_dir: Path, resuming: bool) -> None:
    """Raise ValueError where `output_dir` holds a trained run, and say what can be done with it.

    Args:
        output_dir: the folder.
        resuming: whether a checkpoint was asked for (and not found).
    """
    if complete_checkpoints(output_dir) or (output_dir / "model_index.json").exists():
        how = (
            "It has no checkpoint to continue from; r"
            if resuming
            else "Continue it with resume_from_checkpoint='latest', r"
        )
        raise ValueError(
            f"{output_dir} holds a trained run. {how}eplace it with overwrite_output_dir=, or choose another output_dir=."
        )


def clear(output_dir: Path) -> None:
    """Remove an earlier run's checkpoints, samples, snapshots and evaluations, and its claim to be a pipeline."""
    (output_dir / "model_index.json").unlink(missing_ok=True)
    for path in complete_checkpoints(output_dir):
        discard(path)
    for name in (RECORDS, VALIDATION, METRICS):
        (output_dir / name).unlink(missing_ok=True)
    for name in (SAMPLES, SNAPSHOTS, BEST):
        shutil.rmtree(output_dir / name, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed left half-written or half-removed."""
    for pattern in (".saving-*", ".removing-*", ".upload-*", ".writing-*"):
        for path in (*output_dir.glob(pattern), *output_dir.glob(f"*/{pattern}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove_latents(output_dir: Path, kept: Path | None) -> None:
    """Remove the latents of earlier runs, all files but `kept`."""
    for path in output_dir.glob(LATENT_FILES):
        if path != kept:
            path.unlink()


@contextmanager
def explained_write_errors(what: str, output_dir: Path) -> Iterator[None]:
    """Errors in the block say what could not be written where, and how much room there is: torch's own do not.

    Raises:
        OSError: whatever went wrong inside.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(output_dir).free / 2**20
        raise OSError(
            f"{what} cannot be written to {output_dir}, where {free:.1f} MiB are free: {error}. What was there before is "
            "whole. Where the disk is full, make room; resume_from_checkpoint='latest' continues."
        ) from error
