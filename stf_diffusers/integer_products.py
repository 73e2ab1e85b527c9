"""Exact products of integers of many 8-bit digits, from the 8-bit products that a processor has."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# How many terms a product may have: 32-bit sums of products of two 8-bit numbers. A product over one term is wrong on CPUs
# (pytorch issue 195066).
TERMS = range(2, 2**17)

# Values of an int32 result, 64 MiB; larger products are made in parts.
_MOST_RESULTS = 2**24


def full_scale(count: int) -> int:
    """Magnitude of the integers that a vector's largest element is rounded to, for so many digits."""
    return int.from_bytes(b"\x7f" * count, "big")


FULL_SCALE = full_scale(4)


class FixedPoint(NamedTuple):
    """Floating point rows (m, k) as int8 `digits` (6 m, k), lowest first as of `digits_of`, times `scale` (m,), float64."""

    digits: Tensor
    scale: Tensor

    def columns(self) -> Tensor:
        """The upper four digits of the columns, (4 k, m): in units of 2^16 scales, rounded."""
        return self.digits.view(6, len(self.scale), -1)[2:].transpose(1, 2).reshape(-1, len(self.scale))


def fixed_point(values: Tensor) -> FixedPoint:
    """Finite float32 rows (m, k), as multiples of 2^-46 of a power of two above each row's largest magnitude."""
    # Powers of two by their bits: what a device makes of powers is not always exact. Field 127 stands for 2^0.
    largest = torch.linalg.vector_norm(values, math.inf, dim=1)
    field = (largest.view(torch.int32) >> 23).clamp(45, 254)
    factor = ((299 - field) << 23).view(torch.float32)
    integers = (values * factor[:, None]).to(torch.int64)
    return FixedPoint(digits_of(integers, 6), factor.to(torch.float64).reciprocal())


def centred_levels(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 pixels u as int8 levels u - 128."""
    return torch.bitwise_xor(pixels.view(torch.int8), -128, out=out)


def digits_of(values: Tensor, count: int = 4) -> Tensor:
    """Integers, int64 or int32 (b, k), as balanced base-256 digits, int8 (count b, k).

    The lowest digits of all rows come first. Magnitudes are at most `full_scale(count)`.
    """
    # Half of its range added to each digit but the highest, which has a sign already; then taken from each without carrying.
    halves = sum(128 << 8 * place for place in range(count - 1))
    # Into a new tensor: elementwise results keep odd strides in dimensions of one, which cannot be viewed as bytes.
    shifted = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    torch.add(values, halves, out=shifted).bitwise_xor_(halves)
    digits = shifted.view(torch.int8).view(*values.shape, values.element_size())[..., :count]
    return digits.permute(2, 0, 1).reshape(-1, values.shape[1]).contiguous()


def integer_product(digits: Tensor, right: Tensor, powers: Tensor | None = None, *, multiple: int = 1) -> Tensor:
    """The products of integer rows with other integer rows, exactly but for a last rounding, as float64 (b, m).

    Args:
        digits: (4 b, k) int8, of `digits_of`.
        right: (m, k) int8.
        powers: `powers_of_256` of other numbers of digits, of which `right` then has several as well.
        multiple: zeros are added until all sides are multiples of this, and terms lie side by side in memory, as
            GPUs need it; 1: neither.
    """
    count, right_count = (4, 1) if powers is None else powers.shape
    m = right.shape[0] // right_count
    block = max(1, _MOST_RESULTS // max(1, digits.shape[0] * right_count))
    if m > block:
        parts = right.unflatten(0, (right_count, m)).split(block, 1)
        return torch.cat([integer_product(digits, part.flatten(0, 1), powers, multiple=multiple) for part in parts], 1)
    sizes = digits.shape[0], right.shape[0]
    if multiple > 1:
        digits, right = _padded(digits, multiple), _padded(right, multiple)
    sums = torch._int_mm(digits, right.T)[: sizes[0], : sizes[1]]
    if powers is not None:
        sums = sums.unflatten(0, (count, -1)).unflatten(2, (right_count, m))
        return (sums * powers[:, None, :, None]).sum((0, 2))
    sums = sums.unflatten(0, (count, -1))
    product = sums[0].to(torch.float64)
    for power in range(1, count):
        product.add_(sums[power], alpha=256**power)
    return product


def _padded(values: Tensor, multiple: int) -> Tensor:
    rows, columns = (-size % multiple for size in values.shape)
    return (F.pad(values, (0, columns, 0, rows)) if rows or columns else values).contiguous()


def powers_of_256(count: int, right_count: int, device: torch.device) -> Tensor:
    """(count, right_count) float64, 256^(i + j), made on the device."""
    places = torch.arange(0, 8 * count, 8, device=device)[:, None]
    if right_count > 1:
        places = places + torch.arange(0, 8 * right_count, 8, device=device)
    # By their bits: what a device makes of powers is not always exact.
    return (1023 + places << 52).view(torch.float64)


@cache
def cpu_multiplies_int8() -> bool:
    """Whether this CPU's int8 products are fast (VNNI instructions) and exact: 8-bit sums saturate on some older ones."""
    if not torch.cpu._is_vnni_supported():
        return False
    left, right = (torch.full(shape, -128, dtype=torch.int8, device="cpu") for shape in ((4, 4096), (4096, 4)))
    return bool((torch._int_mm(left, right) == 4096 * 2**14).all())
