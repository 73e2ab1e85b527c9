"""The optimizer of a training, and the precision of the network's products."""

from __future__ import annotations

import torch

from ..export import Network


def make_optimizer(
    network: Network,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    mixed_precision: str,
) -> torch.optim.AdamW:
    """AdamW for a network that is on its device.

    Fused, except with fp16: a fused optimizer skips steps of infinite gradients by itself, and Accelerate, which looks whether
    it was called, would report none, so that the learning rate's schedule and the averages went on.

    Args:
        network: the network.
        learning_rate: its peak.
        betas, weight_decay, epsilon: as AdamW has them.
        mixed_precision: that of the Accelerator: "no", "fp16" or "bf16".
    """
    return torch.optim.AdamW(
        network.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon,
        fused=mixed_precision != "fp16",
    )  # fmt: skip


def allow_tf32() -> None:
    """Have float32 products and convolutions on CUDA use TF32. Targets are not among them."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
