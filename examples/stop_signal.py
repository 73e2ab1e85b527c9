"""SIGTERM and SIGUSR1 as a request to save and stop, agreed over the processes of a run."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

# EX_TEMPFAIL of sysexits.h: not finished, try again. Schedulers can be told to requeue on it.
REQUEUE_EXIT_CODE = 75


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 from now on until `restore`.

    Processes agree through a group of their own on the CPU, so that asking does not wait for the training device.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective: every process calls it after the same steps."""
        if self._group is None:
            return self.received is not None
        asked = torch.tensor([self.received is not None], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
