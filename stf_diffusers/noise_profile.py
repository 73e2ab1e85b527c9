"""Where the noise levels of a data set decide something: its conditional entropy rate, and noise levels drawn accordingly.

By the I-MMSE relation (Guo, Shamai & Verdu 2005, arXiv cs/0412108, theorem 1), the uncertainty about x0 given
``x_t = x0 + s noise`` grows along ln s as the mean squared error of the posterior mean over s^2:

    d H(x0 | x_t) / d ln s = V_DSM(s) / s^2  nats.

It is the rate at which the noise erases the data, nil where x_t tells its source and where it tells nothing. For N
distinct images it integrates to ln N. Training where it is large is the proposal of InfoNoise (arXiv 2602.18647), which
estimates it from losses during a training; `target_variance` knows it for the data, before any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .diagnostics import TargetVariance
from .noise_distribution import Piecewise

_PIECES = 64


def entropy_rate(rows: Sequence[TargetVariance]) -> list[float]:
    """d H(x0 | x_t) / d ln(sigma / alpha) in nats at each measured level."""
    return [row.dsm.value / row.noise_level**2 for row in rows]


def undecided_variance(rows: Sequence[TargetVariance]) -> list[float]:
    """``4 v (1 - v)`` at each measured level, v being V_DSM as a share of the largest one measured: 1 where half of the data's
    variance is decided by x_t, and 0 where none or all of it is.

    Xu et al. 2023 (arXiv 2302.00670), Section 3, call these levels the intermediate phase. They lie above those of the
    `entropy_rate`. The highest level measured is to be one where nothing is decided.
    """
    largest = max((row.dsm.value for row in rows), default=0.0)
    shares = [row.dsm.value / largest if largest > 0 else 0.0 for row in rows]
    return [4 * share * (1 - share) for share in shares]


def recommended_distribution(
    rows: Sequence[TargetVariance], drawn: Tensor, share: float = 0.5, profile: Sequence[float] | None = None
) -> Piecewise:
    """Noise levels drawn in part where a profile of the data is, the rest as they are drawn now.

    The profile alone would be a bad choice: at the levels below it a network still has to learn the one likely source of an
    image that it has not seen.

    Args:
        rows: variances at several noise levels, ascending, which cover the profile: it is taken as 0 beyond them, and as
            linear in the logarithm of the level between them.
        drawn: (K,) noise levels sigma / alpha as the process draws them, K in the thousands; all but the outermost
            thousandths at either end are covered.
        share: of the draws that follow the profile, 0 to 1.
        profile: a number for each row, in proportion to the density in ln(sigma / alpha), such as `undecided_variance`. None:
            the `entropy_rate`.

    Raises:
        ValueError: fewer than two rows, levels that do not ascend, a profile of another length or of 0 everywhere, or a share
            outside 0 to 1.
    """
    levels = np.array([row.noise_level for row in rows])
    rate = np.array(entropy_rate(rows) if profile is None else profile)
    if rate.shape != levels.shape:
        raise ValueError(f"profile must have a number for each of the {len(levels)} rows; got {len(rate)}.")
    if len(levels) < 2 or not (np.diff(levels) > 0).all() or not np.isfinite(levels).all():
        raise ValueError(
            f"rows must be measured at two or more finite noise levels in ascending order; got {levels.tolist()}."
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie between 0 and 1; got {share}.")
    if not rate.sum() > 0:
        raise ValueError(
            "the variance of the targets is 0 at all measured noise levels, as for a single image. Measure at higher ones."
        )
    now = np.log(np.quantile(drawn.double().cpu().numpy(), [0.001, 0.999]))
    low, high = min(now[0], np.log(levels[0])), max(now[1], np.log(levels[-1]))
    edges = np.linspace(low, high, _PIECES + 1)
    own = np.histogram(np.log(drawn.double().cpu().numpy()), edges)[0].astype(float)
    ahead = np.interp((edges[1:] + edges[:-1]) / 2, np.log(levels), rate, left=0.0, right=0.0)
    weights = (1 - share) * own / own.sum() + share * ahead / ahead.sum()
    return Piecewise(tuple(np.exp(edges).tolist()), tuple(weights.tolist()))
