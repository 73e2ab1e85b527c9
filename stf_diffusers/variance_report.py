"""The report on the variance of a data set's training targets: advice, figures, and one HTML page with all of it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .diagnostics import Estimate, TargetVariance
from .noise_distribution import Piecewise
from .plotting import plot_noise_levels, plot_phases, plot_remaining_share, plot_variance

# The two thresholds of the advice: the share of the loss's variance that a recommended n removes, and the share of the
# largest variance in the loss below which a noise level does not matter.
REMOVED, NOTICEABLE = 0.9, 0.01


@dataclass(frozen=True)
class MeasuredData:
    """What a report says about its data.

    Attributes:
        name: the data, as a person would recognise them.
        num_images: number of images that were measured.
        available: number of images in the data set.
        image_shape: (C, H, W).
        within_classes: whether the law given the class was measured.
        noise_process: name of the noise process.
        seed: random seed for the draws.
    """

    name: str
    num_images: int
    available: int
    image_shape: tuple[int, ...]
    within_classes: bool
    noise_process: str
    seed: int


@dataclass(frozen=True)
class Advice:
    """What the measurement recommends.

    Attributes:
        removed: by n, the share of the variance in the training loss that references remove.
        n: the smallest n that removes `REMOVED` of it; None where only all images do.
        low, high: the noise levels between which references matter; None where they do nowhere.
        coverage: share of the noise levels drawn in training that lie between them.
    """

    removed: dict[int, float]
    n: int | None
    low: float | None
    high: float | None
    coverage: float


def advise(rows: Sequence[TargetVariance], drawn: Tensor) -> Advice:
    """Advice from variances at several noise levels and the levels (K,) drawn in training.

    The loss is an unweighted mean of squares of the network's own output, so x0's variance enters it times `output_factor`.
    Between measured levels the product is interpolated along the logarithm of the level.
    """
    logs = np.log([row.noise_level for row in rows])
    at = np.log(drawn.double().numpy())

    def in_loss(values: list[float]) -> np.ndarray:
        return np.array([row.output_factor * value for row, value in zip(rows, values, strict=True)])

    dsm = in_loss([row.dsm.value for row in rows])
    total = np.interp(at, logs, dsm).mean()
    removed = {}
    for size in rows[0].stf:
        left = np.interp(at, logs, in_loss([row.stf[size].value for row in rows])).mean()
        removed[size] = float(1 - left / total) if total > 0 else 0.0
    enough = [n for n, share in sorted(removed.items()) if share >= REMOVED]
    n = enough[0] if enough else None
    matters = [
        row.noise_level
        for row, variance in zip(rows, dsm, strict=True)
        if variance >= NOTICEABLE * dsm.max() > 0 and (n is None or row.stf[n].value <= row.dsm.value / 2)
    ]
    if not matters:
        return Advice(removed, n, None, None, 0.0)
    low, high = min(matters), max(matters)
    inside = (drawn >= low * (1 - 1e-6)) & (drawn <= high * (1 + 1e-6))
    return Advice(removed, n, low, high, inside.double().mean().item())


def shown(estimate: Estimate) -> list[str]:
    """An estimate and its standard error as the report prints them."""
    return [f"{value:.{digits}g}" if value >= 1e-9 else "0" for value, digits in zip(estimate, (4, 2), strict=True)]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: 0.9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; line-height: 1.25; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; } .advice { background: #f3f6fa; border-left: 4px solid #4477aa; padding: 0.5rem 1rem; }
small { color: #666; } code { overflow-wrap: anywhere; }
"""


def advice_lines(
    advice: Advice, data: MeasuredData, rows: Sequence[TargetVariance], recommended: Piecewise | None
) -> list[str]:
    """What the report recommends, as HTML."""
    measured = ", ".join(f"{100 * share:.0f} % by {n:,}" for n, share in advice.removed.items())
    which = "references of the row's class" if data.within_classes else "references"
    count = f"n = {advice.n:,} {which}" if advice.n else f"all {which}, as a bank (<code>--reference bank</code>)"
    lines = [
        f"<strong>Recommended: {count}.</strong> Of the variance that targets bring into the training loss, {measured} "
        f"{which} is removed. The rule: the smallest n that was measured and removes {100 * REMOVED:.0f} %, averaged over "
        "the noise levels that training draws; all images remove all of it, and where they fit into memory they are "
        "the better choice."
    ]
    if advice.low is None or advice.high is None:
        return [*lines, "<strong>At no measured noise level do references matter.</strong>"]
    return [
        *lines,
        f"<strong>References matter at noise levels from {advice.low:.3g} to {advice.high:.3g}</strong> (of "
        f"{rows[0].noise_level:.3g} to {rows[-1].noise_level:.3g} measured). The rule: they remove at least half of the "
        f"variance, and it is at least {100 * NOTICEABLE:.0f} % of the largest in the loss.",
        f"<strong>{100 * advice.coverage:.1f} % of the noise levels that <code>{data.noise_process}</code> draws in training "
        "lie there.</strong> At the others there is little variance to remove.",
        *(
            [
                "<strong>Noise levels to try: <code>--noise_distribution noise_distribution.json</code></strong>, half of "
                "them where the data's entropy rate is; the last figure shows them. With STF, samples were better by them for VE "
                "and VP, and for EDM on digits, but worse for EDM on CIFAR-10 at 16x16: compare both."
            ]
            if recommended is not None
            else []
        ),
    ]


def table(rows: Sequence[TargetVariance]) -> str:
    heads = ["noise level", "t", "effective sources", "D(t)", "V_DSM", *(f"V_STF, n = {n:,}" for n in rows[0].stf)]
    lines = ["".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)]
    for row in rows:
        estimates = [row.effective_sample_size, row.divergence, row.dsm, *row.stf.values()]
        cells = [f"{row.noise_level:.4g}", f"{row.time:.4g}"]
        cells += ["{}<br><small>± {}</small>".format(*shown(estimate)) for estimate in estimates]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    head, *body = (f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>"


@dataclass(frozen=True)
class Picture:
    """A figure of the report."""

    name: str
    png: bytes
    alt: str
    caption: str

    def __str__(self) -> str:
        source = "data:image/png;base64," + base64.b64encode(self.png).decode()
        return (
            f'<figure>\n<img src="{source}" alt="{html.escape(self.alt)}">\n'
            f"<figcaption>{html.escape(self.caption)}</figcaption>\n</figure>"
        )


def draw(
    rows: Sequence[TargetVariance],
    drawn: Tensor,
    recommended: Piecewise | None,
    by_variance: Piecewise | None = None,
) -> list[Picture]:
    figures = [
        (
            "variance",
            plot_variance(rows),
            "Variance of DSM targets and of STF targets for several n against the noise level",
            "Variance of the target's x0 given x_t, summed over dimensions, with standard errors; for several reference "
            "batch sizes (Figure 3c of the paper).",
        ),
        (
            "phases",
            plot_phases(rows),
            "Variance of the score target and divergence of the posterior against the noise level, scaled to one",
            "Three phases, in the units of the paper: variance of the score, and the divergence D(t) of the data from the "
            "posterior, divided by their largest values (Figures 2b, 3a and 3b). Low noise: one source is likely. High "
            "noise: the posterior is nearly the data, and few references do. Between them lies the largest variance.",
        ),
        (
            "remaining",
            plot_remaining_share(rows, training_levels=drawn),
            "Share of the variance that STF leaves, and effective number of sources, against the noise level",
            "Above: the share of the variance that n references leave, over the noise levels that training draws. Below: how "
            "many images are likely sources of one x_t.",
        ),
    ]
    if recommended is not None:
        figures.append(
            (
                "noise_levels",
                plot_noise_levels(rows, drawn, recommended, by_variance),
                "Densities of the noise levels: entropy rate of the data, levels drawn now, levels recommended",
                "Where the noise erases the data: the conditional entropy rate V_DSM / level², which is nil where x_t tells its "
                "source and where it tells nothing. Recommended: half of the levels as they are drawn now, half in "
                "proportion to this rate (noise_distribution.json). Dashed: the same where V_DSM is neither nil nor all of the "
                "data's (noise_distribution_variance.json).",
            )
        )
    pictures = []
    for name, figure, alt, caption in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pictures.append(Picture(f"{name}.png", file.getvalue(), alt, caption))
    return pictures


def report_page(
    data: MeasuredData,
    rows: Sequence[TargetVariance],
    advice: Advice,
    recommended: Piecewise | None,
    pictures: Sequence[Picture],
    command: str,
    versions: str,
) -> str:
    """The whole report as an HTML page that needs no other file.

    Args:
        data: what was measured.
        rows: the variance at each noise level, in ascending order.
        advice, pictures: results of `advise` and `draw`.
        recommended: noise levels to draw, where the data have an entropy rate.
        command: the command that makes the report again.
        versions: versions of the software that made it.
    """
    count = data.num_images
    images = f"{count:,} images" + (f" of {data.available:,}, drawn at random" if count < data.available else "")
    law = ", within classes" if data.within_classes else ""
    title = f"Variance of the training targets: {html.escape(data.name)}"
    subset = (
        "<p>The images that were measured stand for the data. With more of them the variance begins at lower noise: raise "
        "<code>--max_images</code> to see how much.</p>"
        if count < data.available
        else ""
    )
    advised = "\n".join(f"<p>{line}</p>" for line in advice_lines(advice, data, rows, recommended))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{images} of {" × ".join(map(str, data.image_shape))}{law}; noise process <code>{data.noise_process}</code>; {rows[0].num_samples} draws of
x<sub>t</sub> at each of {len(rows)} noise levels; seed {data.seed}.</p>
<div class="advice">
{advised}
</div>
{subset}
<h2>Figures</h2>
{chr(10).join(map(str, pictures))}
<h2>Numbers</h2>
<p>Estimates, and below them their standard errors over the draws; below 10⁻⁹ printed as 0. Variances are traces over the dimensions of an image, in units of x0², for
pixels in [−1, 1].</p>
<div class="wide">
{table(rows)}
</div>
<h2>What was measured</h2>
<p>Given a noisy image x<sub>t</sub>, denoising score matching (DSM) trains on its source, a draw of p(x0 | x<sub>t</sub>);
the Stable Target Field (STF) on the posterior mean over n images that contain the source. Both are unbiased.
V<sub>DSM</sub> and V<sub>STF</sub> are their variances given x<sub>t</sub>, averaged over x<sub>t</sub>; D is the
f-divergence of the data from the posterior; the effective number of sources is one over the sum of squared posterior
weights (Xu, Tong &amp; Jaakkola 2023, arXiv 2302.00670).</p>
<p><code>{html.escape(command)}</code><br>{html.escape(versions)}</p>
</main>
</body>
</html>
"""


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
