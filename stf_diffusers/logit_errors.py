"""How far rounded logits may be from the true ones, and which of them have to be exact for the posterior mean to be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# With errors of at most this size, averaged over the weights, logits are used as they are. The mean of two groups of duplicates
# that are as far apart as images can be, whose errors do not average, is off by as much if both are at their bounds, with
# opposite signs; bounds by measurements are never attained like that, and the mean is right to half of it.
_SMALL = 2e-5

# Errors of at most this size change weights in proportion, to a few per cent.
_PROPORTIONAL = 0.05

# So many references of a row and a chunk may be told from the others, which stay rounded.
_HEAVIEST = 32


class LogitErrors(NamedTuple):
    """Bounds of the errors of the logits of B rows and c references, a |x_i| + b |x_i|^2.

    `of_length`, `of_square` (B,): a and b; `lengths` (c,): the |x_i|. All are float64.
    """

    of_length: Tensor
    of_square: Tensor
    lengths: Tensor

    def largest(self) -> Tensor:
        """(B,), over all references."""
        longest = self.lengths.amax()
        return self.of_length * longest + self.of_square * longest**2

    def is_proportional(self) -> Tensor:
        """(B,) bool, whether weights change in proportion to the errors."""
        return self.largest() <= _PROPORTIONAL

    def is_harmless(self) -> Tensor:
        """(B,) bool, whether no weights need to be exact."""
        return self.largest() <= _SMALL

    def left(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(b, 2), the sum of weights (b, c) of some rows (b,), and that of weights times errors."""
        powers = torch.stack([torch.ones_like(self.lengths), self.lengths, self.lengths**2], 1)
        mass, by_length, by_square = (weights @ powers).unbind(1)
        errors = (by_length * self.of_length[rows]).addcmul_(by_square, self.of_square[rows])
        return torch.stack([mass, errors], 1)

    def decisive(self, rows: Tensor, weights: Tensor, before: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Which weights (b, c) of some rows (b,) have to be exact, and what is `left` then.

        Args:
            before: (b, 2), what is left of other references.
            total: (b,), the sum of the weights of all.

        Returns:
            (b, c) bool, and (b, 2).
        """
        errors = (
            torch.outer(self.of_length[rows], self.lengths).addr_(self.of_square[rows], self.lengths**2).mul_(weights)
        )
        heaviest, columns = errors.topk(min(_HEAVIEST, errors.shape[1]), 1)
        taken = torch.stack([weights.gather(1, columns), heaviest], 2).cumsum_(1)
        here = torch.stack([weights.sum(1), errors.sum(1)], 1)
        left = (before + here)[:, None].sub(taken).clamp_min_(0)
        enough = is_allowed(left, total[:, None])
        last = enough.to(torch.uint8).argmax(1, keepdim=True)
        decisive = torch.zeros_like(weights, dtype=torch.bool)
        decisive.scatter_(1, columns, torch.arange(columns.shape[1], device=columns.device) <= last)
        missed = enough.any(1, keepdim=True).logical_not_()
        decisive.logical_or_(missed.logical_and(weights > 0))
        return decisive, torch.where(missed, before, left.take_along_dim(last[:, :, None], 1).squeeze(1))


def is_allowed(left: Tensor, total: Tensor) -> Tensor:
    """Whether so much may be `left` (..., 2), of weights whose sum is `total` (...), for the mean to be right.

    Errors of at most e of a share u of all weights change a mean of values in [-1, 1] by at most e (1 + u)^2 / 4, and by
    2 e u (1 - u) where u is below 1/3: by no more than the same errors of all weights if e is smaller in this proportion.
    """
    mass, errors = left.unbind(-1)
    share = mass / total
    room = torch.where(share > 1 / 3, 4 * share / (1 + share).square_(), 0.5 / (1 - share))
    return errors <= room.mul_(total).mul_(_SMALL)
