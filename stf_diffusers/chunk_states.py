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
    FixedPoint,
    digits_of,
    fixed_point,
    full_scale,
    integer_product,
    integer_product_by_float32,
    powers_of_256,
)

Arithmetic = Literal["int8", "float32", "float64"]


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
        base = maximum.masked_fill(maximum.isneginf(), 0)
        left, right = self._relative_to(base), other._relative_to(base)
        return PosteriorState(
            maximum,
            left.normalizer + right.normalizer,
            left.squares + right.squares,
            left.weighted_sum + right.weighted_sum,
        )

    def merge_rows(self, rows: Tensor, other: PosteriorState) -> PosteriorState:
        """The state in which `other` is merged into `rows` alone, distinct and ascending."""
        if len(rows) == len(self.maximum):
            return self.merge(other)
        merged = self[rows].merge(other)
        fields = zip(vars(self).values(), vars(merged).values(), strict=True)
        return PosteriorState(*(mine.index_copy(0, rows, new) for mine, new in fields))

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


# Logits this far below the largest add less than 2^-64 of the sum each.
_NEGLIGIBLE = -64 * math.log(2)

# Rows with at most this many references that matter are summed one by one.
_FEW = 16

# Rounding errors of a float32 logit are counted in units of |x_t| |x_i| / sigma^2 times this. Measured for images, white noise
# and constants of 3 to 50,000 values: at most 2.5 units, and 8 where x_t and x_i are nearly parallel.
_UNIT, _ERRORS, _OF_PARALLELS = 2.0**-24, 2.5, 6.0

# With errors of at most this size float32 logits are used as they are: two groups of duplicates that are as far apart as
# images can be, whose errors do not average, still have their mean to 1e-5.
_SMALL = 2e-5

# So many rows of pixels are faster as integers of four digits than by having all references converted to float64.
_FEW_ROWS = 8

# References of a float32 sum: of 30,000 like terms, one after the other, digits get lost.
_BLOCK = 256


def level_sums(levels: Tensor) -> Tensor:
    """(n,) float64, the exact sum of v^2 + v of 8-bit levels (n, D), as int8 or in float32."""
    sums = []
    for block in levels.split(max(1, 2**19 // max(levels.shape[1], 1))):  # 2 MiB in float32
        values = block.to(torch.float32)
        # 512 terms of at most 2^14 each are summed exactly in float32.
        parts = [part.sum(1) for part in values.split(512, dim=1)]
        parts += [part.sum(1) for part in values.square().split(512, dim=1)]
        sums.append(torch.stack(parts).to(torch.float64).sum(0))
    return torch.cat(sums)


def squared_norms(images: Tensor) -> Tensor:
    """What the logits need of the references (n, D): |x|^2 in float64, of int8 levels the exact sum of v^2 + v.

    A pixel is (v + 1/2) / 127.5 for its level v, so its squared norm is that sum over 127.5^2 plus a constant.
    """
    if images.dtype != torch.int8:
        return torch.linalg.vector_norm(images, dim=1, dtype=torch.float64).square()
    return level_sums(images) if images.device.type == "cpu" else level_norms(images)


def level_norms(levels: Tensor) -> Tensor:
    """`squared_norms` of int8 levels (n, D) in few launches, where a CPU's cache does not matter."""
    wide = levels.to(torch.int16)
    return (wide * (wide + 1)).sum(1, dtype=torch.int64).to(torch.float64)


def rounded_norms(values: Tensor, levels: bool) -> Tensor:
    """`squared_norms` of float32 references (n, D), or of levels in float32, as accurate as float32 sums."""
    norms = torch.linalg.vector_norm(values, dim=1).to(torch.float64).square_()
    return norms.add_(values.sum(1)) if levels else norms


def as_multiplied(images: Tensor, arithmetic: Arithmetic) -> Tensor | FixedPoint:
    """A chunk of references (c, D), int8 levels or finite floating point, as the products of an arithmetic read it."""
    if arithmetic == "float32":
        return images.to(torch.float32).contiguous()
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
        norms_are_exact: whether the norms of references are; float32 computes those that matter again.
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
        norms_are_exact: bool = True,
        dense: bool = False,
    ) -> None:
        self.arithmetic, self.levels, self.norms_are_exact = arithmetic, levels, norms_are_exact
        self.dense, self.multiple = dense, 32 if dense else 1
        self._room: Tensor | None = None
        step = 1 / 127.5 if levels else 1.0
        self.query = noisy.to(torch.float64) * alpha[:, None]
        self.inverse_variance = step / sigma**2
        self.half_scale = (alpha * step / sigma) ** 2 / 2
        self.levels_scale = self.inverse_variance
        if arithmetic == "float32":
            self.rounded = self.query.to(torch.float32)
            length = torch.linalg.vector_norm(self.query, dim=1)
            self.unit = _UNIT * length * self.inverse_variance
            self.parallel = (alpha**2 * step / length).nan_to_num(torch.inf)
        if arithmetic == "int8":
            count = 6 if dense else 4
            integers, scale = self._integers(slice(None), count)
            self.query_digits = digits_of(integers, count)
            self.inverse_variance = self.inverse_variance * scale
            # Of the first product, and of the second.
            self.powers: tuple[Tensor | None, Tensor | None] = (None, None)
            if dense:
                powers = powers_of_256(6, 1 if levels else 6, noisy.device)
                self.powers = powers, powers[:4, :4]

    def _integers(self, rows: Tensor | slice, count: int) -> tuple[Tensor, Tensor]:
        """Some queries (b, D) as integers of so many digits, and (b,) what these are to be multiplied with."""
        query = self.query[rows]
        scale = query.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny) / full_scale(count)
        return (query / scale[:, None]).round().to(torch.int64), scale

    def logits(self, images: Tensor | FixedPoint, norms: Tensor) -> Tensor:
        """(B, c) float64, of references (c, D) `as_multiplied`."""
        if isinstance(images, FixedPoint):
            product = integer_product(self.query_digits, images.digits, self.powers[0], multiple=self.multiple)
            product = product.mul_(images.scale)
        elif self.arithmetic == "int8":
            product = integer_product(self.query_digits, images, self.powers[0], multiple=self.multiple)
        else:
            product = self.query @ images.T
        return product * self.inverse_variance[:, None] - self.half_scale[:, None] * norms

    def _exact_logits(self, rows: Tensor, images: Tensor, norms: Tensor) -> Tensor:
        """Those of some rows (b,) over references (c, D) in float32, in float64."""
        if self.levels and len(rows) <= _FEW_ROWS:
            query, scale = self._integers(rows, 4)
            product = integer_product_by_float32(digits_of(query), images.T).mul_(scale[:, None])
            norms = self._exact_norms(images, images, norms)
            product.mul_(self.inverse_variance[rows, None])
            return product.sub_(self.half_scale[rows, None] * norms)
        if self._room is None or len(self._room) < len(images):
            self._room = images.new_empty(images.shape, dtype=torch.float64)
        exact = self._room[: len(images)].copy_(images)  # new memory for each chunk would take longer than the product
        logits = (self.query[rows] @ exact.T).mul_(self.inverse_variance[rows, None])
        return logits.sub_(self.half_scale[rows, None] * self._exact_norms(images, exact, norms))

    def _exact_norms(self, images: Tensor, exact: Tensor, norms: Tensor) -> Tensor:
        """Of references (c, D) in float32 and in float64, whose `norms` (c,) may be rounded; NaN where they are."""
        if self.norms_are_exact:
            return norms
        if self.levels:
            return level_sums(images)
        return torch.linalg.vector_norm(exact, dim=1).square_().masked_fill_(norms.isnan(), torch.nan)

    def _largest(self, images: Tensor, norms: Tensor) -> Tensor:
        """A bound of the references' norms |x_i|, in the units of `images`; those that are not finite do not count."""
        finite = norms.nan_to_num(0, 0, 0).amax()
        if not self.levels:
            return finite.sqrt()
        # |v + 1/2|^2 is the sum of v^2 + v and of 1/4.
        quarter = images.shape[1] / 4
        return (finite + quarter).sqrt() + math.sqrt(quarter)

    def state(self, logits: Tensor, images: Tensor | FixedPoint) -> PosteriorState:
        """The state of references (c, D) with the given logits (B, c)."""
        maximum = logits.amax(1)
        weights = (logits - maximum.masked_fill(maximum.isneginf(), 0)[:, None]).exp_()
        total, normalizer = self._weighted_sum(weights, images)
        return PosteriorState(maximum, normalizer, weights.square_().sum(1), total)

    def sparse_states(
        self, images: Tensor, norms: Tensor, mask: Tensor | None, floor: Tensor
    ) -> list[tuple[Tensor, PosteriorState]]:
        """The rows (b,) for which some of these references matter, and the states of those rows, in at most three parts.

        References that add less than 2^-64 of the sum, `floor` (B,) being the largest logit so far, are left out; of
        rows with a few others only those are read. Float32 logits find them with room for their errors (the
        probabilistic bound of Higham & Mary 2019, sqrt(D) units, and 8), and are computed again in float64 unless the errors are
        small. Finding them waits for the device: for CPUs.

        Args:
            images: a chunk of references (c, D): int8 levels, float64, or for the arithmetic of that name float32.
            norms: (c,) their `squared_norms`, or for float32 `rounded_norms`.
            mask: (B, c) bool, which references each row may use.
            floor: (B,).
        """
        size = unit = torch.zeros_like(floor)
        if self.arithmetic == "float32":
            largest = self._largest(images, norms)
            unit = self.unit * largest
            size = unit * (_ERRORS + _OF_PARALLELS * (self.parallel * largest).clamp(max=1))
            logits = (self.rounded @ images.T).to(torch.float64).mul_(self.inverse_variance[:, None])
            logits.sub_(self.half_scale[:, None] * norms)
        else:
            logits = self.logits(images, norms)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        small = size <= _SMALL
        slack = (2 * (8 + math.sqrt(images.shape[1])) * unit).masked_fill(small, 0)
        maximum = logits.amax(1)
        used = logits >= (torch.maximum(maximum, floor) + _NEGLIGIBLE - slack)[:, None]
        used &= ~maximum.isneginf()[:, None]
        used |= maximum.isnan()[:, None]
        counts = used.sum(1)
        few = (counts > 0) & (counts <= _FEW)
        many = counts > _FEW
        exactly = many & ~small
        # One by one is slower for each, and faster while they are few in all: only they are converted to float64.
        if int(counts[exactly].sum()) <= len(images) // 4:
            few, many, exactly = few | exactly, many & small, exactly & small
        found = []
        for chosen in (many & ~exactly, exactly):
            if len(rows := chosen.nonzero().flatten()):
                values = self._exact_logits(rows, images, norms) if chosen is exactly else logits[rows]
                found.append((rows, self.state(values.masked_fill_(~used[rows], -torch.inf), images)))
        if len(rows := few.nonzero().flatten()):
            found.append((rows, self._few_state(rows, logits[rows], used[rows], images, norms)))
        return found

    def _few_state(self, rows: Tensor, logits: Tensor, used: Tensor, images: Tensor, norms: Tensor) -> PosteriorState:
        """The state of some rows (b,) over the references that each uses of (b, c), one by one."""
        row, column = used.nonzero().unbind(1)
        few = images[column]
        chosen = few.to(torch.float64)
        values = logits[row, column]
        if self.arithmetic != "float64":
            # Two references far from each other and as far from the query are told apart by its last bits alone.
            which, known = rows[row], norms[column]
            product = (self.query[which] * chosen).sum(1) * self.levels_scale[which]
            known = self._exact_norms(few, chosen, known) if self.arithmetic == "float32" else known
            values = product - self.half_scale[which] * known
        logits = torch.full_like(logits, -torch.inf).index_put_((row, column), values)
        maximum = logits.amax(1)
        weights = (logits - maximum[:, None]).exp_()
        total = chosen.new_zeros(len(rows), images.shape[1])
        total.index_add_(0, row, chosen.mul_(weights[row, column][:, None]))
        return PosteriorState(maximum, weights.sum(1), weights.square().sum(1), total)

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
        if self.arithmetic == "float32":
            total = torch.zeros(len(weights), images.shape[1], dtype=torch.float64, device=weights.device)
            for part, block in zip(weights.to(torch.float32).split(_BLOCK, 1), images.split(_BLOCK), strict=True):
                total.add_(part @ block)
            return total, weights.sum(1)
        rounded = (weights * FULL_SCALE).round().to(torch.int64)
        total = integer_product(digits_of(rounded), images.T, self.powers[1], multiple=self.multiple).div_(FULL_SCALE)
        if self.dense:
            return total, weights.sum(1)  # integers do not know NaN; sparse states get it when they are merged
        return total, rounded.sum(1).to(torch.float64) / FULL_SCALE
