"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

LOCK = ".run.lock"


class RunLock:
    """Holds an output folder within a `with` block, against other processes on this machine and, where the file system can,
    on others. The operating system lets go of it when the process dies, however it dies.

    The folder is made where it is missing; it is removed again where the block ends by an error and nothing is in it.

    Args:
        output_dir: the folder.

    Raises:
        ValueError: on entering: another run holds it.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOCK

    def __enter__(self) -> RunLock:
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a+")
            except OSError as error:
                raise ValueError(f"output_dir={str(folder)!r} cannot be used: {error}. Choose another.") from error
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise ValueError(
                    f"another run is at work in output_dir={str(folder)!r} ({holder}). Stop it, wait for its end, or choose "
                    "another output_dir=."
                ) from error
            # The run that held it may have removed the file that was opened here.
            if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                break
            self._file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()
        if kind is not None:
            for folder in self._made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()
