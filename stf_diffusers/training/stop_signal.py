"""How a run ends: signals as a request to save and stop, agreed over its processes; and communication that settles first."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

# EX_TEMPFAIL of sysexits.h: not finished, try again. Schedulers can be told to requeue on it.
REQUEUE_EXIT_CODE = 75
_PR_SET_PDEATHSIG = 1


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) within a `with` block: they raise SystemExit with `REQUEUE_EXIT_CODE` at
    once or, after `defer`, make `agreed` return True. A second Ctrl-C does not wait. Leaving the block by an error lets
    communication settle.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is not None:
            settle_communication()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self.received == signal.SIGINT
        self.received = signal.Signals(number)
        if again or not self._deferred:
            raise SystemExit(REQUEUE_EXIT_CODE)

    def defer(self) -> None:
        """From now on there is something to save: a signal waits for the next call of `agreed`. Collective.

        Processes agree through a group of their own on the CPU, so that asking does not wait for the training device.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._deferred = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective: every process calls it after the same steps."""
        if self._group is None:
            return self.received is not None
        asked = torch.tensor([self.received is not None], dtype=torch.int32, device="cpu")
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)


def settle_communication() -> None:
    """Let the threads of torch's gloo groups finish what they hold, before anything may destroy a group.

    They need the interpreter's lock to release tensors, and a group's destructor waits for them with that lock held: a
    process then hangs for ever, seen in torch 2.13 at a run's end and after another process had died.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.5)


def stop_with_launcher() -> None:
    """Ask this process to stop, by SIGTERM, when the `accelerate launch` that started it alone has ended.

    That launcher does not pass signals on: killed, it would leave the training behind. On Linux alone, where a process can
    ask for it (prctl's PR_SET_PDEATHSIG).
    """
    if not sys.platform.startswith("linux") or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    launcher = os.getppid()
    try:
        command = Path(f"/proc/{launcher}/cmdline").read_bytes()
    except OSError:
        return
    if b"accelerate" in command:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it has died meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
