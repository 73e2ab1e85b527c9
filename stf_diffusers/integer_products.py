"""Exact products of integers of 32 bits with 8-bit levels of pixels, from the 8-bit products that a processor has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Magnitude of the integers that a vector's largest element is rounded to.
FULL_SCALE = 0x7F7F7F7F

# How many terms a product may have: 32-bit sums of products of two 8-bit numbers. A product over one term is wrong on CPUs
# (pytorch issue 195066).
TERMS = range(2, 2**17)


def centred_levels(pixels: Tensor) -> Tensor:
    """uint8 pixels u as int8 levels u - 128."""
    return pixels.view(torch.int8) ^ -128


def digits_of(values: Tensor) -> Tensor:
    """Integers of at most `FULL_SCALE` in magnitude, int64 (B, k), as balanced base-256 digits, int8 (4 B, k).

    The lowest digits of all rows come first.
    """
    # Into a new tensor: elementwise results keep odd strides in dimensions of one, which cannot be viewed as bytes.
    shifted = torch.add(values, 0x80808080, out=torch.empty(values.shape, dtype=torch.int64, device=values.device))
    digits = shifted.view(torch.uint8).view(*values.shape, 8)[..., :4]
    return centred_levels(digits.permute(2, 0, 1).reshape(-1, values.shape[1]))


def integer_product(digits: Tensor, levels: Tensor) -> Tensor:
    """The product of integers given by `digits_of` (4 B, k) with int8 levels (k, m), exactly, as float64 (B, m)."""
    parts = torch._int_mm(digits, levels).view(4, -1, levels.shape[1])
    product = parts[0].to(torch.float64)
    for power in (1, 2, 3):
        product.add_(parts[power], alpha=256**power)
    return product


def integer_product_by_float32(digits: Tensor, levels: Tensor) -> Tensor:
    """`integer_product` of levels that are in float32 (k, m), by float32 products that are exact: for a few integers."""
    total = torch.zeros(len(digits), levels.shape[1], dtype=torch.float64, device=levels.device)
    # 512 terms of at most 2^14 each are summed exactly.
    for part, block in zip(digits.to(torch.float32).split(512, 1), levels.split(512), strict=True):
        total.add_(part @ block)
    return torch.stack([part * 256**power for power, part in enumerate(total.view(4, -1, levels.shape[1]))]).sum(0)


@cache
def cpu_multiplies_int8() -> bool:
    """Whether this CPU's int8 products are fast (VNNI instructions) and exact: 8-bit sums saturate on some older ones."""
    if not torch.cpu._is_vnni_supported():
        return False
    left, right = (torch.full(shape, -128, dtype=torch.int8, device="cpu") for shape in ((4, 4096), (4096, 4)))
    return bool((torch._int_mm(left, right) == 4096 * 2**14).all())
