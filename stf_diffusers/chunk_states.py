"""The softmax over a chunk of references: states of noisy images, which merge exactly, as in streaming softmax."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .integer_products import FULL_SCALE, TERMS, cpu_multiplies_int8, digits_of, integer_product

Arithmetic = Literal["int8", "float64"]


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
        left, right = self.rescaled(maximum), other.rescaled(maximum)
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

    def rescaled(self, maximum: Tensor) -> PosteriorState:
        """The same state relative to another (larger) `maximum` (B,)."""
        # A row for which every logit is -inf (all masked) has no maximum to subtract.
        factor = (self.maximum - maximum.masked_fill(maximum.isneginf(), 0)).exp()
        weighted_sum = self.weighted_sum * factor[:, None]
        return PosteriorState(maximum, self.normalizer * factor, self.squares * factor**2, weighted_sum)

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


def choose_arithmetic(device_type: str, dtype: torch.dtype, dimension: int) -> Arithmetic:
    """The fastest arithmetic that was measured to be accurate for references of `dtype` (n, dimension) on a device."""
    fits = dtype == torch.uint8 and dimension in TERMS
    if device_type == "cpu" and fits and cpu_multiplies_int8():
        return "int8"
    return "float64"


# Logits this far below the largest add less than 2^-64 of the sum each.
_NEGLIGIBLE = -64 * math.log(2)

# Rows with at most this many references that matter are summed one by one.
_FEW = 16


class Queries:
    """Noisy images against chunks of references, in one arithmetic.

    The logit is reduced by |x_t|^2 / (2 sigma^2), which is common to all references:
    ``(alpha x_t . x_i - alpha^2 |x_i|^2 / 2) / sigma^2``. Its two terms nearly cancel before the division, so a float32
    product errs by up to 8e-3 in the mean when references lie within a few sigma of each other.
    """

    def __init__(self, noisy: Tensor, alpha: Tensor, sigma: Tensor, levels: bool, arithmetic: Arithmetic) -> None:
        self.arithmetic, self.levels = arithmetic, levels
        step = 1 / 127.5 if levels else 1.0
        self.query = noisy.to(torch.float64) * alpha[:, None]
        self.inverse_variance = step / sigma**2
        self.half_scale = (alpha * step / sigma) ** 2 / 2
        if arithmetic == "int8":
            scale = self.query.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny) / FULL_SCALE
            self.query_digits = digits_of((self.query / scale[:, None]).round().to(torch.int64))
            self.levels_scale = self.inverse_variance
            self.inverse_variance = self.inverse_variance * scale

    def exact(self, images: Tensor) -> Tensor:
        """A chunk (c, D) as the two products want it: int8 levels as they are, anything else in float64."""
        return images if self.arithmetic == "int8" else images.to(torch.float64)

    def logits(self, images: Tensor, norms: Tensor) -> Tensor:
        """(B, c) float64, of references (c, D) from `exact`."""
        exactly = self.arithmetic == "int8"
        product = integer_product(self.query_digits, images.T) if exactly else self.query @ images.T
        return product * self.inverse_variance[:, None] - self.half_scale[:, None] * norms

    def state(self, logits: Tensor, images: Tensor) -> PosteriorState:
        """The state of references (c, D) with the given logits (B, c)."""
        maximum = logits.amax(1)
        weights = (logits - maximum.masked_fill(maximum.isneginf(), 0)[:, None]).exp_()
        total, normalizer = self._weighted_sum(weights, images)
        return PosteriorState(maximum, normalizer, weights.square_().sum(1), total)

    def sparse_states(
        self, logits: Tensor, images: Tensor, norms: Tensor, floor: Tensor
    ) -> list[tuple[Tensor, PosteriorState]]:
        """The rows (b,) for which some of these references matter, and the states of those rows, in at most two parts.

        References that add less than 2^-64 of the sum, `floor` (B,) being the largest logit so far, are left out; of
        rows with a few others only those are read. Finding them waits for the device: for CPUs.
        """
        maximum = logits.amax(1)
        used = logits >= (torch.maximum(maximum, floor) + _NEGLIGIBLE)[:, None]
        used &= ~maximum.isneginf()[:, None]
        used |= maximum.isnan()[:, None]
        counts = used.sum(1)
        many, few = ((counts > _FEW).nonzero().flatten(), ((counts > 0) & (counts <= _FEW)).nonzero().flatten())
        found = []
        if len(many):
            found.append((many, self.state(logits[many].masked_fill_(~used[many], -torch.inf), images)))
        if len(few):
            found.append((few, self._few_state(few, logits[few], used[few], images, norms)))
        return found

    def _few_state(self, rows: Tensor, logits: Tensor, used: Tensor, images: Tensor, norms: Tensor) -> PosteriorState:
        """The state of some rows (b,) over the references that each uses of (b, c), one by one."""
        row, column = used.nonzero().unbind(1)
        chosen = images[column].to(torch.float64)
        values = logits[row, column]
        if self.arithmetic == "int8":
            # Two references far from each other and as far from the query are told apart by its last bits alone.
            which = rows[row]
            product = (self.query[which] * chosen).sum(1) * self.levels_scale[which]
            values = product - self.half_scale[which] * norms[column]
        logits = torch.full_like(logits, -torch.inf).index_put_((row, column), values)
        maximum = logits.amax(1)
        weights = (logits - maximum[:, None]).exp_()
        total = chosen.new_zeros(len(rows), images.shape[1])
        total.index_add_(0, row, chosen.mul_(weights[row, column][:, None]))
        return PosteriorState(maximum, weights.sum(1), weights.square().sum(1), total)

    def _weighted_sum(self, weights: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the references (c, D) under weights (B, c) in [0, 1], and the sum of those weights."""
        if self.arithmetic != "int8":
            return weights @ images, weights.sum(1)
        rounded = (weights * FULL_SCALE).round().to(torch.int64)
        total = integer_product(digits_of(rounded), images).div_(FULL_SCALE)
        return total, rounded.sum(1).to(torch.float64) / FULL_SCALE
