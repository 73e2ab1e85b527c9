"""Figures of what `target_variance` and a training's log found, one function each.

They need matplotlib: ``pip install matplotlib``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .diagnostics import Estimate, TargetVariance
from .noise_distribution import Piecewise
from .noise_profile import entropy_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Variances this far below the largest are drawn as zero, where the axis ends.
_NEGLIGIBLE = 1e-6

_UNITS = {"sample": "x0", "score": "the score", "epsilon": "the noise", "v_prediction": "the velocity"}


def plot_variance(rows: Sequence[TargetVariance], *, prediction_type: str = "sample") -> Figure:
    """V_DSM and V_STF(n) against the noise level with standard errors (Xu et al. 2023, arXiv 2302.00670, Figure 3c).

    Args:
        rows: results of `target_variance`, one for each noise level.
        prediction_type: whose target's variance is shown; "sample" for x0.

    Returns:
        A figure that belongs to no window: ``figure.savefig(path)``.

    Raises:
        ValueError: fewer than two noise levels, or an unknown prediction type.
    """
    levels = _levels(rows)
    figure, (axis,) = _figure(1)
    factors = [row.factor(prediction_type) for row in rows]
    largest = max(factor * row.dsm.value for factor, row in zip(factors, rows, strict=True))
    for name, colour, found in _curves(rows):
        scaled = [Estimate(f * e.value, f * e.standard_error) for f, e in zip(factors, found, strict=True)]
        _draw(axis, levels, scaled, name, colour)
    if largest > 0:
        axis.set(yscale="log", ylim=(largest * _NEGLIGIBLE, largest * 3))
    axis.set_ylabel(f"variance of {_UNITS.get(prediction_type, prediction_type)}, summed over dimensions")
    axis.legend(frameon=False)
    return figure


def plot_noise_levels(
    rows: Sequence[TargetVariance], drawn: Tensor, recommended: Piecewise, by_variance: Piecewise | None = None
) -> Figure:
    """The data's entropy rate, the noise levels drawn in training, and recommendations, as densities in ln(level).

    Args:
        rows: results of `target_variance`, one for each noise level.
        drawn: (K,) noise levels sigma / alpha as they are drawn now.
        recommended: the noise levels to draw.
        by_variance: the same by `undecided_variance`, on the same pieces.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: fewer than two noise levels.
    """
    levels = torch.tensor(_levels(rows), dtype=torch.float64, device="cpu")
    figure, (axis,) = _figure(1)
    rate = torch.tensor(entropy_rate(rows), dtype=torch.float64, device="cpu")
    area = torch.trapezoid(rate, levels.log())
    edges = torch.tensor(recommended.levels, dtype=torch.float64, device="cpu")
    middles = (edges[:-1] * edges[1:]).sqrt()
    counts = torch.histogram(drawn.to("cpu", torch.float64).log(), edges.log()).hist
    axis.plot(levels, rate / area if area > 0 else rate, color="C1", label="entropy rate of the data")
    axis.plot(middles, counts / counts.sum() / edges.log().diff(), color="grey", label="drawn now")
    axis.plot(middles, recommended.log_density(middles.log()).exp(), color="C0", label="recommended")
    if by_variance is not None:
        density = by_variance.log_density(middles.log()).exp()
        axis.plot(middles, density, color="C2", linestyle="--", label="by undecided variance")
    axis.set(xscale="log", ylabel="density in ln(noise level)", xlabel="noise level sigma / alpha")
    axis.legend(frameon=False)
    return figure


def plot_phases(rows: Sequence[TargetVariance], *, prediction_type: str = "score") -> Figure:
    """V_DSM, V_STF(n) and D, each divided by its largest value (Xu et al. 2023, arXiv 2302.00670, Figures 2b, 3a and 3b).

    Low noise: one source is likely, and there is no variance. High noise: the posterior is nearly the data, D is small,
    and references remove the variance. Between them the variance of the score is largest. V_STF is divided by the
    largest V_DSM, so that the two can be compared.

    Args:
        rows: results of `target_variance`, one for each noise level.
        prediction_type: whose target's variance is shown; the paper's is the score.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: fewer than two noise levels, or an unknown prediction type.
    """
    levels = _levels(rows)
    figure, (axis,) = _figure(1)
    factors = [row.factor(prediction_type) for row in rows]
    largest = max(factor * row.dsm.value for factor, row in zip(factors, rows, strict=True)) or 1.0
    for name, colour, found in _curves(rows):
        pairs = zip(factors, found, strict=True)
        _draw(
            axis,
            levels,
            [Estimate(f * e.value / largest, f * e.standard_error / largest) for f, e in pairs],
            name,
            colour,
        )
    furthest = max(row.divergence.value for row in rows) or 1.0
    divergence = [Estimate(row.divergence.value / furthest, row.divergence.standard_error / furthest) for row in rows]
    _draw(axis, levels, divergence, "D(t)", "black", style="--")
    axis.set_ylabel(f"of the largest value (variances: of {_UNITS.get(prediction_type, prediction_type)})")
    axis.set_ylim(0, 1.25)
    axis.legend(frameon=False)
    return figure


def plot_remaining_share(rows: Sequence[TargetVariance], *, training_levels: Tensor | None = None) -> Figure:
    """Above: V_STF(n) / V_DSM against the noise level. Below: the effective sample size of the posterior over all images.

    Quotients are left out where V_DSM is negligible, or known to no more than a quarter of itself: there a few draws of
    x_t decide both numerator and denominator, and the quotient's standard error says nothing.

    Args:
        rows: results of `target_variance`, one for each noise level.
        training_levels: (K,) noise levels sigma / alpha drawn in training; their histogram is shown behind the quotients.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: fewer than two noise levels.
    """
    levels = _levels(rows)
    figure, (above, below) = _figure(2)
    largest = max(row.dsm.value for row in rows)
    negligible = largest * _NEGLIGIBLE
    kept = [i for i, row in enumerate(rows) if row.dsm.value > max(negligible, 4 * row.dsm.standard_error)]
    for number, n in enumerate(rows[0].stf):
        share = [rows[i].stf_share[n] for i in kept]
        _draw(above, [levels[i] for i in kept], share, f"STF, n = {n:,}", _colour(number, len(rows[0].stf)))
    above.axhline(1, color="tab:red", linewidth=1)
    above.text(levels[-1], 1.02, "DSM", color="tab:red", horizontalalignment="right")
    above.set(ylabel="variance that is left", ylim=(0, 1.6))
    if training_levels is not None:
        edges = torch.logspace(math.log10(levels[0]), math.log10(levels[-1]), 41, device="cpu")
        shares = torch.histogram(training_levels.cpu().float(), edges).hist / len(training_levels)
        behind = above.twinx()
        behind.bar(
            edges[:-1].tolist(),
            shares.tolist(),
            edges.diff().tolist(),
            align="edge",
            color="0.85",
            label="training draws",
        )
        behind.set(ylim=(0, 2.5 * max(float(shares.max()), 1e-9)), yticks=[])
        above.set_zorder(behind.get_zorder() + 1)
        above.patch.set_visible(False)
        lines, names = above.get_legend_handles_labels()
        bars, bar_names = behind.get_legend_handles_labels()
        above.legend(lines + bars, names + bar_names, frameon=False, ncols=3, loc="upper right")
    else:
        above.legend(frameon=False, ncols=3, loc="upper right")
    _draw(below, levels, [row.effective_sample_size for row in rows], None, "tab:blue")
    below.set(yscale="log", ylabel="effective number\nof sources")
    return figure


def _levels(rows: Sequence[TargetVariance]) -> list[float]:
    levels = [row.noise_level for row in rows]
    if len(levels) < 2 or any(later <= before for before, later in pairwise(levels)):
        raise ValueError(f"a figure needs two or more noise levels in ascending order; got {levels}.")
    return levels


def plot_training_levels(
    noise_level: Sequence[float],
    loss: Sequence[float],
    effective_sample_size: Sequence[float],
    variance_removed: Sequence[float],
    rows: Sequence[float],
) -> Figure:
    """Loss of a training and what references took from its targets' variance, against the noise level.

    Args:
        noise_level: (K,) sigma / alpha, ascending.
        loss: (K,) mean of the loss there.
        effective_sample_size: (K,) mean number of likely sources.
        variance_removed: (K,) V_DSM - V_STF, per dimension of x0.
        rows: (K,) number of images that were trained there; shown as bars behind the loss.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: no noise levels.
    """
    if not len(noise_level):
        raise ValueError("there are no noise levels to draw: the log has seen no image.")
    figure, (top, bottom) = _figure(2)
    behind = top.twinx()
    widths = [0.2 * level for level in noise_level]
    behind.bar(noise_level, rows, width=widths, color="0.88")
    behind.set(yticks=[], zorder=0)
    top.set(zorder=1, facecolor="none", ylabel="loss")
    top.plot(noise_level, loss, color="black", marker=".", label="loss (bars: images drawn)")
    top.legend(frameon=False)
    bottom.plot(noise_level, variance_removed, color="tab:blue", marker=".", label="variance removed, V_DSM − V_STF")
    bottom.set_ylabel("per dimension of x0")
    sizes = bottom.twinx()
    sizes.plot(noise_level, effective_sample_size, color="tab:orange", linestyle="--", label="effective references")
    sizes.set(yscale="log", ylabel="effective references")
    handles = [line for axis in (bottom, sizes) for line in axis.get_lines()]
    bottom.legend(handles=handles, labels=[str(line.get_label()) for line in handles], frameon=False)
    return figure


def plot_adaptive_levels(edges: Tensor, prior_weights: Tensor, weights: Tensor, errors: Tensor) -> Figure:
    """The noise levels that `AdaptiveNoise` draws, as densities in ln(level), and the error that it has found.

    Args:
        edges: (K + 1,) levels between its pieces; the outermost may be 0 and infinite.
        prior_weights, weights: (K,) probabilities of the pieces, under the prior and now.
        errors: (K,) mean errors; NaN where none are known.

    Returns:
        A figure that belongs to no window.
    """
    log_edges = edges.double().log()
    # The outermost pieces are drawn as wide as their neighbours.
    log_edges[0] = torch.maximum(log_edges[0], 2 * log_edges[1] - log_edges[2])
    log_edges[-1] = torch.minimum(log_edges[-1], 2 * log_edges[-2] - log_edges[-3])
    widths, ends = log_edges.diff(), log_edges.exp().tolist()
    figure, (top, bottom) = _figure(2)
    top.stairs((prior_weights / widths).tolist(), ends, color="0.8", fill=True, label="prior")
    top.stairs((weights / widths).tolist(), ends, color="tab:blue", label="drawn now")
    top.set_ylabel("density in ln(level)")
    top.legend(frameon=False)
    middle = ((log_edges[1:] + log_edges[:-1]) / 2).exp().tolist()
    bottom.plot(middle, errors.tolist(), color="black", marker=".")
    bottom.set_ylabel("error, per dimension of the output")
    return figure


def plot_validation(
    noise_level: Sequence[float],
    held_out: Sequence[Estimate],
    training: Sequence[Estimate],
    dsm_loss: Sequence[Estimate],
) -> Figure:
    """A network's errors against the posterior mean on held-out and on training images, and the DSM loss of the former.

    Args:
        noise_level: ascending noise levels sigma / alpha.
        held_out, training, dsm_loss: of each, per dimension of the output; error bars are standard errors.

    Returns:
        A figure that belongs to no window.
    """
    figure, (top, bottom) = _figure(2)
    _draw(top, noise_level, dsm_loss, "DSM loss, held out", "0.6", "--")
    _draw(top, noise_level, held_out, "error, held out", "tab:red")
    _draw(top, noise_level, training, "error, training", "tab:blue")
    top.set(yscale="log", ylabel="per dimension of the output")
    top.legend(frameon=False)
    ratios = [one.value / other.value for one, other in zip(held_out, training, strict=True)]
    bottom.plot(noise_level, ratios, color="black", marker=".")
    bottom.axhline(1, color="0.6", linewidth=1)
    bottom.set_ylabel("held out / training")
    return figure


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3 + 1.7 * panels), layout="constrained", dpi=100)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("noise level sigma / alpha")
    return figure, axes


def _curves(rows: Sequence[TargetVariance]) -> list[tuple[str, str, list[Estimate]]]:
    """Name, colour and estimates of DSM and of each reference batch size."""
    sizes = list(rows[0].stf)
    curves = [("DSM", "tab:red", [row.dsm for row in rows])]
    for number, n in enumerate(sizes):
        curves.append((f"STF, n = {n:,}", _colour(number, len(sizes)), [row.stf[n] for row in rows]))
    return curves


def _colour(number: int, count: int) -> str:
    """From light to dark, so that a larger n is a darker curve."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis_r"](0.25 + 0.7 * number / max(count - 1, 1)))


def _draw(
    axis: Axes, levels: Sequence[float], found: Sequence[Estimate], label: str | None, colour: str, style: str = "-"
) -> None:
    axis.errorbar(
        levels,
        [estimate.value for estimate in found],
        [estimate.standard_error for estimate in found],
        label=label,
        color=colour,
        linestyle=style,
        marker="o",
        markersize=3.5,
        capsize=2,
        linewidth=1.5,
    )
