"""The softmax on CPUs, where only references that matter are multiplied a second time; finding these waits for values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk_states import (
    Arithmetic,
    PosteriorState,
    Queries,
    float64_product,
    level_sums,
    square_sums,
)
from .integer_products import FULL_SCALE, centred_levels, digits_of, integer_product
from .logit_errors import LogitErrors, is_allowed

# Logits this far below the largest add less than 2^-64 of the sum each.
_NEGLIGIBLE = -64 * math.log(2)

# Rows with at most this many references that matter are summed one by one, if 8-bit products are not faster.
_FEW, _FEW_INT8 = 16, 4

# Logits are computed again one by one where they are fewer than this share of the references and of all pairs of a row and a
# reference: more are faster in one product.
_SHARE_OF_REFERENCES, _SHARE_OF_PAIRS = 2, 32

# Elements that are gathered at a time: what is made of them stays in the innermost caches.
_GATHERED_ELEMENTS = 2**15

# Terms of a float32 sum of a logit, and how many such sums are added in float32.
_TERMS, _SUMS = 256, 16

# Rounding errors of float32 logits are counted in units of |x_t| |x_i| / sigma^2 times 2^-24, and fall with the root of the
# number of sums. Measured for images, white noise, black and white, ramps and constants of 3 to 200,000 values and sigma from
# 0.05 to 80, with white noise: at most so many, and more where sums grow all along, in proportion to |x_i| / |x_t|. Float32
# norms are right to so many units.
_UNIT, _ERRORS, _OF_PARALLELS, _OF_NORMS = 2.0**-24, 3.0, 25.0, 6.0
_NORM_TERMS = 64

# Weights that have been corrected exceed 1 by as much as errors are that change them in proportion.
_FULL = 15 / 16

# Smaller exponents stand for nothing: exponentials take ten times as long for -inf, a hundred where they are denormal.
_SLOW = -80.0

# A larger exponent would overflow.
_OVERFLOW = 500.0

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


class _Chunk(NamedTuple):
    """References as `read` (c, D), and their `norms` (c,)."""

    images: Tensor
    norms: Tensor


class SparseQueries(Queries):
    """Noisy images against chunks of references on a CPU, all of which are added to one state.

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
        # Logarithms of what was left rounded (`LogitErrors.left`), by row.
        self._left = sigma.new_full((len(sigma), 2), -torch.inf)
        self._room = Room(torch.float32 if arithmetic == "float32" else torch.float64)
        self._levels_room, self._exact_room = Room(torch.int8), Room(torch.float64)
        if arithmetic == "int8":
            # What is rounded off of each element, times |x_i|: no sum exceeds it.
            self.unit = self.product_scale / 2 * math.sqrt(noisy.shape[1])
        if arithmetic == "float32":
            self.rounded = self.query.to(torch.float32)
            self.length = torch.linalg.vector_norm(self.query, dim=1)
            self.unit = _UNIT * self.length * self.inverse_variance
            self.parallel = (self.half_scale / self.inverse_variance * 2 / self.length).nan_to_num(torch.inf)

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
        whole = images.shape[1] // _NORM_TERMS * _NORM_TERMS
        parts = images[:, :whole].unflatten(1, (whole // _NORM_TERMS, _NORM_TERMS)), images[:, None, whole:]
        roots = torch.cat([torch.linalg.vector_norm(part, dim=2) for part in parts], 1)
        return roots.to(torch.float64).square_().sum(1)

    def add(self, state: PosteriorState, images: Tensor, norms: Tensor, mask: Tensor | None) -> None:
        """Add a chunk of references to the state, in place.

        Those that add less than 2^-64 of the sum are left out where few others are: only these are read. Rounded logits
        find them with room for their errors (of float32 the probabilistic bound of Higham & Mary 2019, sqrt(D) units,
        and 8). As many logits are then computed again in float64 as the mean depends on.

        Args:
            state: in which the rows that some of these references matter to are changed.
            images: a chunk of references (c, D), as `read`.
            norms: (c,) their `norms`, or their `squared_norms`.
            mask: (B, c) bool, which references each row may use.
        """
        chunk = _Chunk(images, norms)
        logits, errors, slack = self._rounded_logits(chunk)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        harmless = errors.is_harmless()
        slack = slack.masked_fill(harmless, 0)
        maximum = logits.amax(1)
        threshold = torch.maximum(maximum, state.maximum) + _NEGLIGIBLE - slack
        # Nothing of a row without references here, everything of one that is NaN.
        used = (logits < threshold.masked_fill_(maximum.isneginf(), torch.inf)[:, None]).logical_not_()
        counts = used.sum(1)
        rounded = errors.is_proportional()
        if len(some := (rounded.logical_not() & (counts > 0)).nonzero().flatten()):
            pairs = used[some].nonzero()
            values = torch.full_like(logits[some], -torch.inf)
            values[tuple(pairs.T)] = self._exact_logits(some, pairs, chunk)
            logits[some], maximum[some] = values, values.amax(1)
        if not len(rows := (counts > 0).nonzero().flatten()):
            return
        maximum = maximum[rows]
        weights = _rows_of(logits, rows).sub_(maximum[:, None]).clamp_(min=_SLOW).exp_()
        torch.threshold_(weights, math.exp(_SLOW + 1), 0)
        if self.arithmetic != "float64":
            self._correct(state, rows, maximum, weights, errors, rounded[rows], harmless[rows], chunk)
        few = counts <= torch.where(harmless, _FEW_INT8 if self.arithmetic == "int8" else _FEW, _FEW)
        if len(many := few[rows].logical_not_().nonzero().flatten()):
            self._add_many(state, rows[many], maximum[many], _rows_of(weights, many), images)
        if len(some := few[rows].nonzero().flatten()):
            self._add_few(state, rows[some], maximum[some], weights[some], used[rows[some]].nonzero(), images)

    def _rounded_logits(self, chunk: _Chunk) -> tuple[Tensor, LogitErrors, Tensor]:
        """(B, c), bounds of their errors, and how much one may be too small in comparison with another (B,)."""
        images, norms = chunk
        lengths, zero = self._lengths(images, norms), torch.zeros_like(self.half_scale)
        if self.arithmetic == "float64":
            return self.logits(images, norms), LogitErrors(zero, zero, lengths), zero
        longest = lengths.amax()
        if self.arithmetic == "int8":
            # Twice, as errors can be as large as that, and of both signs.
            return self.logits(images, norms), LogitErrors(2 * self.unit, zero, lengths), 2 * self.unit * longest
        product = _product_in_blocks(self.rounded, images)
        # Cosines with the references tell of noise that is not white.
        cosine = (product.abs() * lengths.reciprocal().masked_fill_(lengths == 0, 0)).amax(1) / self.length
        parallel = torch.fmax(self.parallel * longest, cosine).clamp(max=1)
        of_product = self.unit * (_ERRORS + _OF_PARALLELS * parallel) / math.sqrt(max(1, images.shape[1] / _TERMS))
        of_norms = zero if self.norms_are_exact else _OF_NORMS * _UNIT * self.half_scale
        slack = 2 * (8 + math.sqrt(images.shape[1])) * self.unit * longest + 2 * of_norms * longest**2
        return self.reduced(product, norms), LogitErrors(of_product, of_norms, lengths), slack

    def _correct(
        self,
        state: PosteriorState,
        rows: Tensor,
        maximum: Tensor,
        weights: Tensor,
        errors: LogitErrors,
        rounded: Tensor,
        harmless: Tensor,
        chunk: _Chunk,
    ) -> None:
        """Compute weights again, in place, those that the mean depends on.

        Args:
            state: of the references before.
            rows: (b,) of the state.
            maximum, weights: (b,), (b, c); exp(maximum) weights is what will be added.
            errors: of the logits of all rows.
            rounded: (b,) bool, rows that are not exact.
            harmless: (b,) bool, rows that need not be.
            chunk: the references.
        """
        before = (self._left[rows] - maximum[:, None]).clamp_(max=_OVERFLOW).exp_()
        total = (state.maximum[rows] - maximum).clamp_(max=_OVERFLOW).exp_().mul_(state.normalizer[rows])
        here = errors.left(rows, weights)
        total += here[:, 0]
        left = before + here.mul_(rounded[:, None])
        wrong = is_allowed(left, total).logical_not_() & rounded & ~harmless
        if len(wrong := wrong.nonzero().flatten()):
            some = _rows_of(weights, wrong)
            decisive, left[wrong] = errors.decisive(rows[wrong], some, before[wrong], total[wrong])
            pairs = decisive.nonzero()
            row, column = pairs.unbind(1)
            exact = self._exact_logits(rows[wrong], pairs, chunk)
            weights[wrong[row], column] = exact.sub_(maximum[wrong[row]]).exp_()
        self._left[rows] = torch.maximum(self._left[rows], left.log_().add_(maximum[:, None]))

    def _add_many(self, state: PosteriorState, rows: Tensor, maximum: Tensor, weights: Tensor, images: Tensor) -> None:
        """Add references (c, D) with exp(maximum) (b,) times weights (b, c), which are changed, to some rows (b,)."""
        scale = 1.0
        if self.arithmetic == "int8":
            # In units of the largest of each chunk, so that many chunks of small weights lose no more than one.
            scale = 1 / (_FULL * FULL_SCALE)
            weights.mul_(_FULL * FULL_SCALE).round_()
            total = integer_product(digits_of(weights.to(torch.int32)), images.T).mul_(scale)
        else:
            total = weights @ images if self.arithmetic == "float64" else _product_by_blocks(weights, images)
        norm = torch.linalg.vector_norm(weights, dim=1)
        _add(state, rows, maximum, weights.sum(1).mul_(scale), norm.mul_(scale).square_(), total)

    def _add_few(
        self, state: PosteriorState, rows: Tensor, maximum: Tensor, weights: Tensor, pairs: Tensor, images: Tensor
    ) -> None:
        """As `_add_many`, of the pairs (k, 2) of a position among `rows` and a reference alone."""
        row, column = pairs.unbind(1)
        values = weights[row, column]
        normalizer = torch.zeros_like(maximum).index_add_(0, row, values)
        squares = torch.zeros_like(maximum).index_add_(0, row, values.square())
        total = values.new_zeros(len(rows), images.shape[1])
        size = max(1, _GATHERED_ELEMENTS // images.shape[1])
        for to, some, weight in zip(row.split(size), column.split(size), values.split(size), strict=True):
            total.index_add_(0, to, images.index_select(0, some).to(torch.float64).mul_(weight[:, None]))
        _add(state, rows, maximum, normalizer, squares, total)

    def _exact_logits(self, rows: Tensor, pairs: Tensor, chunk: _Chunk) -> Tensor:
        """(k,) float64, of pairs (k, 2) of a position among `rows` (b,) and a reference."""
        row, column = pairs.unbind(1)
        used, where = column.unique(return_inverse=True)
        count = len(chunk.images)
        if len(pairs) > count // _SHARE_OF_REFERENCES + count * len(rows) // _SHARE_OF_PAIRS:
            some = slice(None) if len(used) > count // 2 else used
            logits = self._all_exact_logits(rows, chunk.images[some], chunk.norms[some])
            return logits[row, column if len(used) > count // 2 else where]
        size = max(1, _GATHERED_ELEMENTS // chunk.images.shape[1])
        row = rows[row]
        # Two references far from each other and as far from the query are told apart by its last bits alone.
        products = [
            self.query.index_select(0, some).mul_(chunk.images.index_select(0, others)).sum(1)
            for some, others in zip(row.split(size), column.split(size), strict=True)
        ]
        exact = []
        if not self.norms_are_exact:
            exact = [square_sums(chunk.images.index_select(0, some).to(torch.float64)) for some in used.split(size)]
        norms = _exact_norms(exact, chunk.norms[used])[where]
        return torch.cat(products).mul_(self.inverse_variance[row]).sub_(self.half_scale[row] * norms)

    def _all_exact_logits(self, rows: Tensor, images: Tensor, norms: Tensor) -> Tensor:
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

    def _lengths(self, images: Tensor, norms: Tensor) -> Tensor:
        """(c,) bounds of the references' norms |x_i|, in the units of `images`; 0 of those that are not finite."""
        finite = norms.nan_to_num(0, 0, 0)
        if not self.levels:
            return finite.sqrt_()
        # |v + 1/2|^2 is the sum of v^2 + v and of 1/4.
        quarter = images.shape[1] / 4
        return finite.add_(quarter).sqrt_().add_(math.sqrt(quarter))


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Some distinct rows, in order: `values` itself if these are all."""
    return values if len(rows) == len(values) else values[rows]


def _add(
    state: PosteriorState, rows: Tensor, maximum: Tensor, normalizer: Tensor, squares: Tensor, total: Tensor
) -> None:
    """Add sums of weights (b,), of their squares (b,) and of references (b, D), relative to exp(maximum), to some rows."""
    factor = state.raise_to(rows, maximum)
    state.normalizer.index_add_(0, rows, normalizer * factor)
    state.squares.index_add_(0, rows, squares * factor.square())
    if len(rows) == len(state.maximum):
        state.weighted_sum.addcmul_(total, factor[:, None])
    else:
        state.weighted_sum.index_add_(0, rows, total.mul_(factor[:, None]))


def _exact_norms(parts: list[Tensor], norms: Tensor) -> Tensor:
    """The norms (c,) in parts, NaN where the rounded ones (c,) are; without parts these, which are exact."""
    return torch.cat(parts).masked_fill_(norms.isnan(), torch.nan) if parts else norms


def _product_in_blocks(query: Tensor, images: Tensor) -> Tensor:
    """(B, c) float64, of float32 (B, D) and (c, D)."""
    total: Tensor | None = None
    run = _TERMS * _SUMS
    for some, those in zip(query.split(run, 1), images.split(run, 1), strict=True):
        partial: Tensor | None = None
        for part, block in zip(some.split(_TERMS, 1), those.split(_TERMS, 1), strict=True):
            partial = part @ block.T if partial is None else partial.addmm_(part, block.T)
        if partial is not None:
            wide = partial.to(torch.float64)
            total = wide if total is None else total.add_(wide)
    return query.new_zeros(len(query), len(images), dtype=torch.float64) if total is None else total


def _product_by_blocks(weights: Tensor, images: Tensor) -> Tensor:
    """(b, D) float64, weights (b, c) times images (c, D) in float32."""
    # Smaller ones would only be slow, where float32 is denormal.
    weights = torch.threshold_(weights.to(torch.float32), 1e-30, 0)
    total: Tensor | None = None
    run = _BLOCK * _BLOCKS
    for some, rows in zip(weights.split(run, 1), images.split(run), strict=True):
        partial: Tensor | None = None
        for part, block in zip(some.split(_BLOCK, 1), rows.split(_BLOCK), strict=True):
            if partial is None:
                partial = part @ block
            else:
                # A product with a vector would be added term by term.
                partial = partial.addmm_(part, block) if len(part) > _FEW_ROWS else partial.add_(part @ block)
        if partial is not None:
            wide = partial.to(torch.float64)
            total = wide if total is None else total.add_(wide)
    return weights.new_zeros(len(weights), images.shape[1], dtype=torch.float64) if total is None else total
