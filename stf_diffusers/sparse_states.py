"""The softmax on CPUs, where only references that matter are multiplied a second time; finding these waits for values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .chunk_states import (
    Arithmetic,
    PosteriorState,
    Queries,
    float64_product,
    level_sums,
    product_in_parts,
    square_sums,
)
from .integer_products import FULL_SCALE, centred_levels, digits_of, integer_product

# Logits this far below the largest add less than 2^-64 of the sum each.
_NEGLIGIBLE = -64 * math.log(2)

# Rows with at most this many references that matter are summed one by one, if 8-bit products are not faster.
_FEW, _FEW_INT8 = 16, 4

# Logits of references so light that a million of them add less to the error than the limit below are left in float32; the
# others are computed one by one where they are at most this share of all: more are faster in one product.
_LIGHT, _SHARE_OF_PAIRS = 2**20, 16

# Elements that are gathered at a time.
_GATHERED_ELEMENTS = 2**18

# Rounding errors of a float32 logit are counted in units of |x_t| |x_i| / sigma^2 times 2^-24. Measured for images, white noise,
# black and white and constants of 3 to 50,000 values at the noise levels where they are small: at most so many, and more where
# sums grow all along, in proportion to |x_i| / |x_t|. Where sums of so many terms are added in float64 they fall with the root
# of the number of sums.
_UNIT, _ERRORS, _OF_PARALLELS = 2.0**-24, 2.5, 6.0
_TERMS, _ERRORS_IN_PARTS, _OF_PARALLELS_IN_PARTS = 256, 3.5, 8.0

# With errors of at most this size float32 logits are used as they are: two groups of duplicates that are as far apart as
# images can be, whose errors do not average, still have their mean to 1e-5.
_SMALL = 2e-5

# Elements that are converted to float64 at a time: for a few rows, whose product takes less than reading them from memory, as
# many as stay in the innermost caches; for more, as many as a product needs to be fast.
_FEW_ROWS, _FEW_ROWS_ELEMENTS, _MANY_ROWS_ELEMENTS = 8, 2**17, 2**20

# References of a float32 sum, and how many of these are added in float32. Terms of less than half a unit of such a sum are lost,
# together at most 2^-24 of it for each that is added: 5e-6.
_BLOCK, _BLOCKS = 64, 16


class Room:
    """Memory for one chunk after the other: getting new memory takes as long as filling it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._held = torch.empty(0, 0, dtype=dtype, device="cpu")

    def like(self, values: Tensor) -> Tensor:
        """Room for (c, D), until it is next asked for."""
        if values.shape[0] > self._held.shape[0]:
            self._held = self._held.new_empty(values.shape)
        return self._held[: len(values)]


class SparseQueries(Queries):
    """Noisy images against chunks of references on a CPU.

    Args:
        noisy, alpha, sigma, levels, arithmetic: as for `Queries`.
        norms_are_known: whether the norms of references are, exactly; for float32 those that matter are computed again, but
            of levels, whose norms are exact.
    """

    def __init__(
        self, noisy: Tensor, alpha: Tensor, sigma: Tensor, levels: bool, arithmetic: Arithmetic, norms_are_known: bool
    ) -> None:
        super().__init__(noisy, alpha, sigma, levels, arithmetic)
        self.norms_are_exact = norms_are_known or levels or arithmetic != "float32"
        self._room = Room(torch.float32 if arithmetic == "float32" else torch.float64)
        self._levels_room, self._exact_room = Room(torch.int8), Room(torch.float64)
        if arithmetic == "int8":
            # What is rounded off of each element, times |x_i|: no sum exceeds it.
            self.unit = self.product_scale / 2 * math.sqrt(noisy.shape[1])
        if arithmetic == "float32":
            self.rounded = self.query.to(torch.float32)
            length = torch.linalg.vector_norm(self.query, dim=1)
            self.unit = _UNIT * length * self.inverse_variance
            self.parallel = (self.half_scale / self.inverse_variance * 2 / length).nan_to_num(torch.inf)

    def read(self, images: Tensor) -> Tensor:
        """A chunk of references (c, D), uint8 pixels or floating point, as the products read it, until the next is read."""
        if self.levels:
            images = centred_levels(images, self._levels_room.like(images))
            return images if self.arithmetic == "int8" else self._room.like(images).copy_(images)
        wanted = torch.float32 if self.arithmetic == "float32" else torch.float64
        return images.contiguous() if images.dtype == wanted else self._room.like(images).copy_(images)

    def norms(self, images: Tensor) -> Tensor:
        """(c,) float64, `squared_norms` of references as `read`; of floating point for float32 as accurate as float32 sums."""
        if self.levels:
            return level_sums(images)
        return torch.linalg.vector_norm(images, dim=1).to(torch.float64).square_()

    def add(self, state: PosteriorState, images: Tensor, norms: Tensor, mask: Tensor | None) -> None:
        """Add a chunk of references to a state, in place.

        Those that add less than 2^-64 of the sum are left out where few others are: only these are read. Float32 logits
        find them with room for their errors (the probabilistic bound of Higham & Mary 2019, sqrt(D) units, and 8), and are
        computed again in float64 unless the errors are small.

        Args:
            state: in which the rows that some of these references matter to are changed.
            images: a chunk of references (c, D), as `read`.
            norms: (c,) their `norms`, or their `squared_norms`.
            mask: (B, c) bool, which references each row may use.
        """
        logits, size, slack = self._rounded_logits(images, norms)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        small = size <= _SMALL
        slack = slack.masked_fill(small, 0)
        maximum = logits.amax(1)
        threshold = torch.maximum(maximum, state.maximum) + _NEGLIGIBLE - slack
        # Nothing of a row without references here, everything of one that is NaN.
        used = (logits < threshold.masked_fill_(maximum.isneginf(), torch.inf)[:, None]).logical_not_()
        counts = used.sum(1)
        enough = torch.where(small, _FEW_INT8, _FEW) if self.arithmetic == "int8" else _FEW
        few = (counts > 0) & (counts <= enough)
        exactly = (counts > _FEW) & ~small
        if len(rows := (small & (counts > enough)).nonzero().flatten()):
            self._add_many(state, rows, logits if len(rows) == len(logits) else logits[rows], images)
        if len(rows := exactly.nonzero().flatten()):
            values = logits[rows]
            light = -_NEGLIGIBLE - math.log(_LIGHT) - (size[rows] / _SMALL).log()
            decisive = values >= (threshold[rows] + light)[:, None]
            if int(decisive.sum()) <= values.numel() // _SHARE_OF_PAIRS:
                for some in decisive.nonzero().split(max(1, _GATHERED_ELEMENTS // images.shape[1])):
                    row, column = some.unbind(1)
                    values[row, column] = self._pair_logits(rows[row], column, images, norms)[0]
                self._add_many(state, rows, values.masked_fill_(~used[rows], -torch.inf), images)
            else:
                self._add_exactly(state, rows, used[rows], images, norms)
        if bool(few.any()):
            pairs = used.logical_and_(few[:, None]).nonzero()
            for some in pairs.split(max(1, _GATHERED_ELEMENTS // images.shape[1])):
                self._add_few(state, some, images, norms)

    def _rounded_logits(self, images: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, c), a bound of their errors (B,), and for float32 how much one may be too small in comparison."""
        if self.arithmetic == "float64":
            zero = torch.zeros_like(self.half_scale)
            return self.logits(images, norms), zero, zero
        largest = self._largest(images, norms)
        if self.arithmetic == "int8":
            return self.logits(images, norms), self.unit * largest, 2 * self.unit * largest
        unit = self.unit * largest
        parallel = (self.parallel * largest).clamp(max=1)
        size = unit * (_ERRORS + _OF_PARALLELS * parallel)
        in_parts = unit * (_ERRORS_IN_PARTS + _OF_PARALLELS_IN_PARTS * parallel)
        in_parts /= math.sqrt(max(1, images.shape[1] / _TERMS))
        terms = images.shape[1]
        if bool(((size > _SMALL) & (in_parts <= _SMALL)).any()):
            size, terms = in_parts, _TERMS
        product = product_in_parts(self.rounded, images, terms)
        return self.reduced(product, norms), size, 2 * (8 + math.sqrt(images.shape[1])) * unit

    def _add_many(self, state: PosteriorState, rows: Tensor, logits: Tensor, images: Tensor) -> None:
        """Add references (c, D) with the given logits (b, c), which are changed, to some rows (b,)."""
        maximum = logits.amax(1)
        factor = state.raise_to(rows, maximum)
        weights = logits.sub_(maximum[:, None]).exp_()
        if self.arithmetic == "int8":
            # In units of the largest of each chunk, so that many chunks of small weights lose no more than one.
            weights.mul_(FULL_SCALE).round_()
            factor = factor / FULL_SCALE
            total = integer_product(digits_of(weights.to(torch.int32)), images.T)
        else:
            total = weights @ images if self.arithmetic == "float64" else _product_by_blocks(weights, images)
        state.normalizer.index_add_(0, rows, weights.sum(1) * factor)
        state.squares.index_add_(0, rows, (torch.linalg.vector_norm(weights, dim=1) * factor).square_())
        if len(rows) == len(state.maximum):
            state.weighted_sum.addcmul_(total, factor[:, None])
        else:
            state.weighted_sum.index_add_(0, rows, total.mul_(factor[:, None]))

    def _add_exactly(self, state: PosteriorState, rows: Tensor, used: Tensor, images: Tensor, norms: Tensor) -> None:
        """Add references (c, D) to some rows (b,), those `used` (b, c), with float64 logits."""
        columns = used.any(0).nonzero().flatten()
        if len(columns) <= len(images) // 2:
            used, images, norms = used[:, columns], images[columns], norms[columns]
        values = self._exact_logits(rows, images, norms)
        self._add_many(state, rows, values.masked_fill_(~used, -torch.inf), images)

    def _pair_logits(self, row: Tensor, column: Tensor, images: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """The float64 logits (k,) of pairs of a row and a reference, and those references (k, D) in float64."""
        chosen = images[column].to(torch.float64)
        values = (self.query[row] * chosen).sum(1).mul_(self.inverse_variance[row])
        exact = [] if self.norms_are_exact else [square_sums(chosen)]
        return values.sub_(self.half_scale[row] * _exact_norms(exact, norms[column])), chosen

    def _add_few(self, state: PosteriorState, pairs: Tensor, images: Tensor, norms: Tensor) -> None:
        """Add one reference to one row for each of the pairs (k, 2) of a row and a reference."""
        row, column = pairs.unbind(1)
        # Two references far from each other and as far from the query are told apart by its last bits alone.
        values, chosen = self._pair_logits(row, column, images, norms)
        maximum = torch.full_like(state.maximum, -torch.inf).scatter_reduce_(0, row, values, "amax")
        rows = maximum.isneginf().logical_not_().nonzero().flatten()
        state.raise_to(rows, maximum[rows])
        weights = values.sub_(state.maximum[row]).exp_()
        state.normalizer.index_add_(0, row, weights)
        state.squares.index_add_(0, row, weights.square())
        state.weighted_sum.index_add_(0, row, chosen.mul_(weights[:, None]))

    def _exact_logits(self, rows: Tensor, images: Tensor, norms: Tensor) -> Tensor:
        """Those of some rows (b,) over references (c, D) in float32, in float64."""
        query = self.query[rows]
        elements = _FEW_ROWS_ELEMENTS if len(rows) <= _FEW_ROWS else _MANY_ROWS_ELEMENTS
        size = max(1, elements // images.shape[1])
        products, exact_norms = [], []
        for some in images.split(size):
            exact = self._exact_room.like(some).copy_(some)
            products.append(float64_product(query, exact))
            if not self.norms_are_exact:
                exact_norms.append(square_sums(exact))
        logits = torch.cat(products, 1).mul_(self.inverse_variance[rows, None])
        return logits.addcmul_(self.half_scale[rows, None], _exact_norms(exact_norms, norms), value=-1)

    def _largest(self, images: Tensor, norms: Tensor) -> Tensor:
        """A bound of the references' norms |x_i|, in the units of `images`; those that are not finite do not count."""
        finite = norms.nan_to_num(0, 0, 0).amax()
        if not self.levels:
            return finite.sqrt()
        # |v + 1/2|^2 is the sum of v^2 + v and of 1/4.
        quarter = images.shape[1] / 4
        return (finite + quarter).sqrt() + math.sqrt(quarter)


def _exact_norms(parts: list[Tensor], norms: Tensor) -> Tensor:
    """The norms (c,) in parts, NaN where the rounded ones (c,) are; without parts these, which are exact."""
    return torch.cat(parts).masked_fill_(norms.isnan(), torch.nan) if parts else norms


def _product_by_blocks(weights: Tensor, images: Tensor) -> Tensor:
    """(b, D) float64, weights (b, c) times images (c, D) in float32."""
    # Smaller ones would only be slow, where float32 is denormal.
    weights = torch.threshold_(weights.to(torch.float32), 1e-30, 0)
    total = torch.zeros(len(weights), images.shape[1], dtype=torch.float64, device=weights.device)
    run = _BLOCK * _BLOCKS
    for some, rows in zip(weights.split(run, 1), images.split(run), strict=True):
        partial = total.new_zeros(total.shape, dtype=torch.float32)
        for part, block in zip(some.split(_BLOCK, 1), rows.split(_BLOCK), strict=True):
            # A product with a vector would be added term by term.
            partial.addmm_(part, block) if len(part) > _FEW_ROWS else partial.add_(part @ block)
        total.add_(partial)
    return total
