"""Files and folders that are on the disk whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which replaces `path` when the block has ended.

    The place has the name of `path`, in a temporary folder `.writing-*` of its own. An error in the block leaves `path` as
    it was, and nothing beside it; a process that is killed leaves `path` as it was, and the temporary folder.

    Args:
        path: where the file or folder belongs. Its parents are made.
        durable: wait until what was written is on the disk before it replaces `path`. False for what can be made again.

    Raises:
        OSError: the file cannot be written or replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        yield folder / path.name
        if durable:
            settle(folder / path.name, path)
        else:
            os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle(written: Path, path: Path) -> None:
    """Rename `written`, a file or a folder, to `path` once all of it is on the disk, and have the new name there too."""
    for part in (*written.rglob("*"), written):
        sync(part)
    if path.is_dir():
        discard(path)
    os.replace(written, path)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a folder; renamed to `.removing-*` first, so that a half-removed one is never taken for a whole one."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk, before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
