"""The softmax over a chunk of references: states of noisy images, which merge exactly, as in streaming softmax."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .integer_products import (
    FULL_SCALE,
    TERMS,
    FixedPoint,
    cpu_multiplies_int8,
    digits_of,
    fixed_point,
    full_scale,
    integer_product,
    powers_of_256,
)

Arithmetic = Literal["int8", "float32", "float64"]

_LOWEST = torch.finfo(torch.float64).min


class PosteriorMean(NamedTuple):
    """Result of `posterior_mean`: `mean` (B, ...) and `effective_sample_size` (B,), 1 / sum of squared weights."""

    mean: Tensor
    effective_sample_size: Tensor


@dataclass
class PosteriorState:
    """A softmax-weighted sum that can be merged with that of other references.

    `maximum` (B,): the largest logit; `normalizer`, `squares` (B,): the sums of exp(logit - maximum) and of its
    square; `weighted_sum` (B, D): the sum of exp(logit - maximum) x_i, of uint8 references in centred levels, u - 128.
    All are float64: sums of many like terms lose digits in float32.
    """

    maximum: Tensor
    normalizer: Tensor
    squares: Tensor
    weighted_sum: Tensor

    @staticmethod
    def empty(batch_size: int, dimension: int, device: torch.device) -> PosteriorState:
        """That of no references."""
        sizes = (batch_size,), (batch_size,), (batch_size, dimension)
        sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
        return PosteriorState(torch.full_like(sums[0], -torch.inf), *sums)

    def __getitem__(self, rows: Tensor | slice) -> PosteriorState:
        return PosteriorState(*(field[rows] for field in vars(self).values()))

    @staticmethod
    def cat(states: Iterable[PosteriorState]) -> PosteriorState:
        """The rows of several states, in order."""
        return PosteriorState(*map(torch.cat, zip(*(vars(state).values() for state in states), strict=True)))

    def merge(self, other: PosteriorState) -> PosteriorState:
        """The state of both sets of references together."""
        maximum = torch.maximum(self.maximum, other.maximum)
        # A row for which every logit is -inf (all masked) has no maximum to subtract.
        base = maximum.clamp_min(_LOWEST)
        left, right = self._relative_to(base), other._relative_to(base)
        return PosteriorState(
            maximum,
            left.normalizer + right.normalizer,
            left.squares + right.squares,
            left.weighted_sum + right.weighted_sum,
        )

    def raise_to(self, rows: Tensor, maximum: Tensor) -> Tensor:
        """Make `rows`, distinct, relative to at least `maximum` (b,) in place.

        Returns:
            (b,), what sums relative to `maximum` are then to be multiplied with.
        """
        before = self.maximum[rows]
        after = torch.maximum(before, maximum)
        self.maximum.index_copy_(0, rows, after)
        factor = torch.ones_like(self.maximum).index_copy_(0, rows, (before - after).exp_())
        if bool((factor != 1).any()):
            self.normalizer.mul_(factor)
            self.squares.mul_(factor.square())
            self.weighted_sum.mul_(factor[:, None])
        return (maximum - after).exp_()

    def _relative_to(self, base: Tensor) -> PosteriorState:
        """The same state relative to another (larger) `base` (B,)."""
        factor = (self.maximum - base).exp_()
        return PosteriorState(
            base, self.normalizer * factor, self.squares * factor.square(), self.weighted_sum * factor[:, None]
        )

    def result(self, dtype: torch.dtype = torch.float32, centred_levels: bool = False) -> PosteriorMean:
        """The normalised mean, (B, D), and the effective sample size, (B,), in `dtype`.

        Args:
            dtype: dtype of both.
            centred_levels: the sum is of levels u - 128 and the mean is to be in [-1, 1].
        """
        mean = (self.weighted_sum / self.normalizer[:, None]).to(dtype)
        if centred_levels:
            # As `pixels_to_float` does it: a mean that is one of the references equals that image bit for bit.
            mean = mean.add_(128).div_(127.5).sub_(1)
        return PosteriorMean(mean, (self.normalizer**2 / self.squares).to(dtype))

    def result_like(self, noisy: Tensor, reference_dtype: torch.dtype) -> PosteriorMean:
        """The result in the shape of `noisy` (B, ...), in float64 where `noisy` and the references are, else float32."""
        dtype = torch.float64 if noisy.dtype == reference_dtype == torch.float64 else torch.float32
        mean, effective_sample_size = self.result(dtype, centred_levels=reference_dtype == torch.uint8)
        return PosteriorMean(mean.reshape(noisy.shape), effective_sample_size)


# Of so many 8-bit levels the sum of squares is at most 2^22: the square of its root in float32 is off by less than 1/2.
_EXACT_TERMS = 256


def level_sums(levels: Tensor) -> Tensor:
    """(n,) float64, the exact sum of v^2 + v of 8-bit levels (n, D), as int8 or in float32."""
    size = levels.shape[1]
    if levels.dtype != torch.int8:
        whole = size // _EXACT_TERMS * _EXACT_TERMS
        parts = levels[:, :whole].unflatten(1, (whole // _EXACT_TERMS, _EXACT_TERMS)), levels[:, None, whole:]
        roots = torch.cat([torch.linalg.vector_norm(part, dim=2) for part in parts], 1).to(torch.float64)
        return roots.square_().round_().add_(torch.cat([part.sum(2) for part in parts], 1)).sum(1)
    if size in TERMS and cpu_multiplies_int8():
        # Of the products of some rows with each other only the diagonal is used; a product still takes less than a conversion.
        squares = [torch._int_mm(rows, rows.T).diagonal() for rows in levels.split(32)]
        sums = torch._int_mm(levels, torch.ones_like(levels[:1]).T).flatten()
        return torch.cat(squares).to(torch.float64).add_(sums)
    # 2 MiB in float32 at a time.
    return torch.cat([level_sums(rows.to(torch.float32)) for rows in levels.split(max(1, 2**19 // max(size, 1)))])


def squared_norms(images: Tensor) -> Tensor:
    """What the logits need of the references (n, D): |x|^2 in float64, of int8 levels the exact sum of v^2 + v.

    A pixel is (v + 1/2) / 127.5 for its level v, so its squared norm is that sum over 127.5^2 plus a constant.
    """
    if images.dtype != torch.int8:
        return square_sums(images)
    return level_sums(images) if images.device.type == "cpu" else level_norms(images)


# Terms of a float64 sum: more in one go lose digits that decide at low noise.
_LONGEST_SUM = 2**13


def square_sums(values: Tensor) -> Tensor:
    """(n,) float64, sums of squares of floating point (n, D)."""
    parts = values.split(_LONGEST_SUM, 1)
    sums = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square_() for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def float64_product(query: Tensor, images: Tensor) -> Tensor:
    """(b, c) of float64 (b, D) and (c, D)."""
    return query @ images.T if query.shape[1] <= 8 * _LONGEST_SUM else product_in_parts(query, images, _LONGEST_SUM)


def product_in_parts(query: Tensor, images: Tensor, longest: int) -> Tensor:
    """(b, c) float64 of (b, D) and (c, D), of sums of at most `longest` terms in their dtype."""
    product: Tensor | None = None
    for part, some in zip(query.split(longest, 1), images.split(longest, 1), strict=True):
        summed = part @ some.T
        product = summed.to(torch.float64) if product is None else product.add_(summed)
    return query.new_zeros(len(query), len(images), dtype=torch.float64) if product is None else product


def level_norms(levels: Tensor) -> Tensor:
    """`squared_norms` of int8 levels (n, D) in few launches, where a CPU's cache does not matter."""
    wide = levels.to(torch.int16)
    return (wide * (wide + 1)).sum(1, dtype=torch.int64).to(torch.float64)


def as_multiplied(images: Tensor, arithmetic: Arithmetic) -> Tensor | FixedPoint:
    """A chunk of references (c, D), int8 levels or finite floating point, as the products of an arithmetic read it."""
    if arithmetic == "float64":
        return images.to(torch.float64)
    return images if images.dtype == torch.int8 else fixed_point(images.to(torch.float32))


class Queries:
    """Noisy images against chunks of references, in one arithmetic.

    The logit is reduced by |x_t|^2 / (2 sigma^2), which is common to all references:
    ``(alpha x_t . x_i - alpha^2 |x_i|^2 / 2) / sigma^2``. Its two terms nearly cancel before the division, so a float32
    product errs by up to 8e-3 in the mean when references lie within a few sigma of each other.

    Args:
        noisy: (B, D) floating point.
        alpha, sigma: (B,) float64.
        levels: whether the references are int8 levels.
        arithmetic: that of the products.
        dense: for devices that are not to be waited for: shapes do not depend on values, and integers are padded as GPUs
            need them and have enough digits that nothing has to be computed again.
    """

    def __init__(
        self,
        noisy: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        levels: bool,
        arithmetic: Arithmetic,
        dense: bool = False,
    ) -> None:
        self.arithmetic, self.levels = arithmetic, levels
        self.dense, self.multiple = dense, 32 if dense else 1
        step = 1 / 127.5 if levels else 1.0
        self.query = noisy.to(torch.float64) * alpha[:, None]
        self.inverse_variance = self.product_scale = step / sigma**2
        self.half_scale = (alpha * step / sigma) ** 2 / 2
        if arithmetic == "int8":
            count = 6 if dense else 4
            integers, scale = self._integers(count)
            self.query_digits = digits_of(integers, count)
            self.product_scale = self.inverse_variance * scale
            # Of the first product, and of the second.
            self.powers: tuple[Tensor | None, Tensor | None] = (None, None)
            if dense:
                powers = powers_of_256(6, 1 if levels else 6, noisy.device)
                self.powers = powers, powers[:4, :4]

    def _integers(self, count: int) -> tuple[Tensor, Tensor]:
        """The queries (B, D) as integers of so many digits, and (B,) what these are to be multiplied with."""
        scale = torch.linalg.vector_norm(self.query, math.inf, dim=1).clamp_min(
            torch.finfo(torch.float64).tiny
        ) / full_scale(count)
        return (self.query / scale[:, None]).round().to(torch.int32 if count == 4 else torch.int64), scale

    def logits(self, images: Tensor | FixedPoint, norms: Tensor) -> Tensor:
        """(B, c) float64, of references (c, D) `as_multiplied`."""
        if isinstance(images, FixedPoint):
            product = integer_product(self.query_digits, images.digits, self.powers[0], multiple=self.multiple)
            product = product.mul_(images.scale)
        elif self.arithmetic == "int8":
            product = integer_product(self.query_digits, images, self.powers[0], multiple=self.multiple)
        else:
            product = float64_product(self.query, images)
        return self.reduced(product, norms)

    def reduced(self, product: Tensor, norms: Tensor) -> Tensor:
        """The logits, in place of the product (B, c) with references of those norms (c,)."""
        return product.mul_(self.product_scale[:, None]).addcmul_(self.half_scale[:, None], norms, value=-1)

    def state(self, logits: Tensor, images: Tensor | FixedPoint) -> PosteriorState:
        """The state of references (c, D) with the given logits (B, c)."""
        maximum = logits.amax(1)
        weights = (logits - maximum.clamp_min(_LOWEST)[:, None]).exp_()
        total, normalizer = self._weighted_sum(weights, images)
        return PosteriorState(maximum, normalizer, weights.square_().sum(1), total)

    def _weighted_sum(self, weights: Tensor, images: Tensor | FixedPoint) -> tuple[Tensor, Tensor]:
        """The sum of the references (c, D) under weights (B, c) in [0, 1], and the sum of those weights."""
        if isinstance(images, FixedPoint):
            scaled = weights * images.scale
            step = scaled.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) / FULL_SCALE
            digits = digits_of((scaled / step).round().to(torch.int64))
            total = integer_product(digits, images.columns(), self.powers[1], multiple=self.multiple)
            return total.mul_(step * 2**16), weights.sum(1)
        if self.arithmetic == "float64":
            return weights @ images, weights.sum(1)
        digits = digits_of((weights * FULL_SCALE).round().to(torch.int64))
        # Integers do not know NaN: the normalizer is summed in floating point.
        total = integer_product(digits, images.T, self.powers[1], multiple=self.multiple)
        return total.div_(FULL_SCALE), weights.sum(1)
