"""Settings of autocast and of matrix products under which float32 is float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, in this thread: enough around elementwise arithmetic and products of float64 or of integers."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


class _ExactProducts:
    """Float32 matrix products in IEEE float32 while anyone is inside: a setting of the process, not of a thread.

    The first thread that enters keeps the settings and the last one that leaves restores them, so that threads whose stays
    overlap leave behind what was there before.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.previous: list[str] = []

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.previous = [backend.fp32_precision for backend in self._backends()]
                for backend in self._backends():
                    backend.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for backend, precision in zip(self._backends(), self.previous, strict=True):
                    # "none" inherits from torch.backends.fp32_precision; what was inherited must go on following it.
                    backend.fp32_precision = "none"
                    if backend.fp32_precision != precision:
                        backend.fp32_precision = precision

    @staticmethod
    def _backends() -> tuple[Any, ...]:
        return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


_EXACT_PRODUCTS = _ExactProducts()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Autocast off, float32 matrix products in IEEE float32; the caller's settings are restored afterwards.

    ``autocast(enabled=False)`` alone leaves TF32 (CUDA) and bf16 (oneDNN) products on.
    """
    with _EXACT_PRODUCTS, without_autocast(device_type):
        yield
