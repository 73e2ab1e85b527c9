"""One run at a time in an output folder, and as many processes in a run as its launcher announced."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
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
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = open(self.path, "a+")
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


def check_number_of_processes(running: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError unless the run has as many processes as its launcher announced.

    Args:
        running: number of processes of the run, as Accelerate found it.
        environment: what the launcher has set.
    """
    cure = (
        "On CPUs set ACCELERATE_USE_CPU=true and pass --multi_gpu --num_processes N to `accelerate launch`, or use "
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
