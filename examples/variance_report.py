#!/usr/bin/env python
"""How much variance is there in the training targets of a data set, at which noise, and how many references remove it?

    python examples/variance_report.py --output_dir variance-digits
    python examples/variance_report.py --dataset_name cifar10 --max_images 5000 --output_dir variance-cifar10

Writes `index.html`, which holds all that it shows, its figures as PNG files, and the numbers as `variance.json`. The
measurement needs no network and no training. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from image_data import decode_all, find_column, load_split, make_reader
from stf_diffusers import EDM, VE, VP, FlowMatching, NoiseProcess, ReferenceBank, __version__, target_variance
from stf_diffusers.diagnostics import Estimate, TargetVariance
from stf_diffusers.plotting import plot_phases, plot_remaining_share, plot_variance

PROCESSES: dict[str, type[NoiseProcess]] = {"edm": EDM, "ve": VE, "vp": VP, "flow": FlowMatching}

# The two thresholds of the advice: the share of the loss's variance that a recommended n removes, and the share of the
# largest variance in the loss below which a noise level does not matter.
REMOVED, NOTICEABLE = 0.9, 0.01


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_name",
        help="A data set on the Hub, a local folder (images, parquet, or save_to_disk), or a parquet file. "
        "Neither this nor --train_data_dir: scikit-learn's handwritten digits.",
    )
    parser.add_argument("--dataset_config_name", help="The configuration of the data set, where it has several.")
    parser.add_argument("--train_data_dir", help="A folder of images. Not with --dataset_name.")
    parser.add_argument("--cache_dir", help="Where downloaded data sets are kept.")
    parser.add_argument("--image_column", help="The column of images; found by itself where there is one.")
    parser.add_argument("--label_column", help="The column of class labels; found by itself. For --class_conditional.")
    parser.add_argument("--class_conditional", action="store_true", help="Measure the law given the class.")
    parser.add_argument("--resolution", type=int, help="Side of the square images. Default: the images' own.")
    parser.add_argument("--image_mode", choices=["L", "RGB", "RGBA"], help="Default: L for grey images, else RGB.")
    parser.add_argument("--max_images", type=int, default=5000, help="Images drawn from the data set at random.")
    parser.add_argument("--noise_process", choices=list(PROCESSES), default="edm")
    parser.add_argument("--p_mean", type=float, help="EDM: mean of ln(sigma) in training. Default: -1.2.")
    parser.add_argument("--p_std", type=float, help="EDM: standard deviation of ln(sigma) in training. Default: 1.2.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--reference_batch_sizes",
        type=int,
        nargs="+",
        default=[16, 64, 256, 1024, 4096],
        help="The n to measure; those that exceed the number of images are left out.",
    )
    parser.add_argument("--num_samples", type=int, default=128, help="Draws of x_t at each noise level.")
    parser.add_argument("--num_levels", type=int, default=20, help="Noise levels sigma / alpha, evenly spaced in log.")
    parser.add_argument("--min_noise_level", type=float, default=0.1)
    parser.add_argument("--max_noise_level", type=float, default=80.0)
    parser.add_argument("--quiet", action="store_true", help="No progress bars.")
    args = parser.parse_args(argv)
    if args.dataset_name is not None and args.train_data_dir is not None:
        parser.error("--dataset_name and --train_data_dir exclude each other.")
    least = {"max_images": 2, "num_samples": 2, "num_levels": 2, "seed": 0, "resolution": 1}
    for name, minimum in least.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}; got {getattr(args, name)}.")
    if min(args.reference_batch_sizes) < 1:
        parser.error(f"--reference_batch_sizes must be at least 1; got {min(args.reference_batch_sizes)}.")
    if not 0 < args.min_noise_level < args.max_noise_level < math.inf:
        parser.error("--min_noise_level must be positive and below --max_noise_level, which is finite.")
    return args


@dataclass(frozen=True)
class Data:
    """The images that are measured, and where they are from."""

    name: str
    images: Tensor
    labels: Tensor | None
    available: int


def load_images(args: argparse.Namespace) -> Data:
    """`--max_images` images, uint8 (N, C, R, R), drawn at random by `--seed`.

    Raises:
        ValueError: no such data, image or label column; images that differ in size or mode, or are not square.
    """
    dataset = load_split(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
    column = find_column(dataset, datasets.Image, args.image_column, "--image_column")
    if column is None:
        raise ValueError(f"no column of images among {dataset.column_names}; choose one with --image_column.")
    label_column = None
    if args.class_conditional:
        label_column = find_column(dataset, datasets.ClassLabel, args.label_column, "--label_column")
        if label_column is None:
            raise ValueError("--class_conditional needs class labels, and the data set has none; see --label_column.")
    available = len(dataset)
    if available > args.max_images:
        rows = np.random.default_rng(args.seed).choice(available, args.max_images, replace=False)
        dataset = dataset.select(np.sort(rows).tolist())
    reader = make_reader(dataset, column, args.image_mode, args.resolution, center_crop=True)
    images = decode_all(dataset, column, reader, math.inf, args.quiet)
    if images is None or len(images) < 2:
        raise ValueError(f"the data set has {len(dataset)} images, and a variance needs two or more.")
    labels = None if label_column is None else torch.tensor(dataset[label_column])
    source = args.dataset_name or args.train_data_dir
    return Data(Path(source).name if source else "scikit-learn's digits", images, labels, available)


def make_process(args: argparse.Namespace) -> NoiseProcess:
    """The process with its defaults, and the noise distribution of the flags.

    Raises:
        ValueError: a flag that the process does not have, or a value out of its range.
    """
    given = {name: getattr(args, name) for name in ("p_mean", "p_std") if getattr(args, name) is not None}
    if given and args.noise_process != "edm":
        raise ValueError(
            f"--{next(iter(given))} is no parameter of --noise_process {args.noise_process}; leave it out."
        )
    try:
        return PROCESSES[args.noise_process](**given)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def measure(
    args: argparse.Namespace, process: NoiseProcess, data: Data, generator: torch.Generator
) -> list[TargetVariance]:
    """The variance at each noise level, in ascending order.

    Raises:
        ValueError: the process has no time for `--max_noise_level`, or fewer images than any n.
    """
    levels = torch.logspace(
        math.log10(args.min_noise_level), math.log10(args.max_noise_level), args.num_levels, dtype=torch.float64
    )
    times = process.time_of(levels)
    if float(times[-1]) > process.last_time:
        last = torch.tensor([process.last_time], dtype=torch.float64)
        raise ValueError(
            f"--max_noise_level {args.max_noise_level:g} is beyond the last time of --noise_process {args.noise_process}, "
            f"{float(process.sigma(last) / process.alpha(last)):.4g}."
        )
    sizes = [n for n in args.reference_batch_sizes if n <= len(data.images)]
    if not sizes:
        raise ValueError(f"--reference_batch_sizes: there are {len(data.images)} images, fewer than any n.")
    bank = ReferenceBank(data.images, data.labels, device="cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {"reference_batch_sizes": sizes, "num_samples": args.num_samples}
    found = []
    for moment in tqdm(times.tolist(), desc="Measuring variances", unit="level", disable=args.quiet):
        found += target_variance(process, bank, [moment], generator=generator, **settings)
    return found


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


def advice_lines(advice: Advice, data: Data, args: argparse.Namespace) -> list[str]:
    """What the report recommends, as HTML."""
    measured = ", ".join(f"{100 * share:.0f} % by {n:,}" for n, share in advice.removed.items())
    which = "references of the row's class" if data.labels is not None else "references"
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
        f"{args.min_noise_level:g} to {args.max_noise_level:g} measured). The rule: they remove at least half of the "
        f"variance, and it is at least {100 * NOTICEABLE:.0f} % of the largest in the loss.",
        f"<strong>{100 * advice.coverage:.1f} % of the noise levels that <code>{args.noise_process}</code> draws in training "
        "lie there.</strong> At the others there is little variance to remove.",
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


def draw(rows: Sequence[TargetVariance], drawn: Tensor) -> list[Picture]:
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
    pictures = []
    for name, figure, alt, caption in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pictures.append(Picture(f"{name}.png", file.getvalue(), alt, caption))
    return pictures


def report(
    args: argparse.Namespace,
    data: Data,
    rows: Sequence[TargetVariance],
    advice: Advice,
    pictures: Sequence[Picture],
    command: str,
) -> str:
    """The whole page; nothing in it refers to another file."""
    count, *shape = data.images.shape
    images = f"{count:,} images" + (f" of {data.available:,}, drawn at random" if count < data.available else "")
    law = ", within classes" if data.labels is not None else ""
    title = f"Variance of the training targets: {html.escape(data.name)}"
    subset = (
        "<p>The images that were measured stand for the data. With more of them the variance begins at lower noise: raise "
        "<code>--max_images</code> to see how much.</p>"
        if count < data.available
        else ""
    )
    advised = "\n".join(f"<p>{line}</p>" for line in advice_lines(advice, data, args))
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
<p>{images} of {" × ".join(map(str, shape))}{law}; noise process <code>{args.noise_process}</code>; {args.num_samples} draws of
x<sub>t</sub> at each of {len(rows)} noise levels; seed {args.seed}.</p>
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
<p><code>{html.escape(command)}</code><br>stf_diffusers {__version__}, torch {html.escape(torch.__version__)}</p>
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


def write_aside(path: Path, content: bytes) -> None:
    """Have `path` written complete or not at all."""
    aside = path.with_name(f".partial-{path.name}")
    aside.write_bytes(content)
    os.replace(aside, path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    begun = time.perf_counter()
    process = make_process(args)
    data = load_images(args)
    rows = measure(args, process, data, torch.Generator().manual_seed(args.seed))
    times = process.sample_t(100_000, generator=torch.Generator().manual_seed(args.seed))
    drawn = process.sigma(times) / process.alpha(times)
    advice = advise(rows, drawn)
    pictures = draw(rows, drawn)
    command = shlex.join(["python", "examples/variance_report.py", *(sys.argv[1:] if argv is None else argv)])
    numbers = {"command": command, "advice": asdict(advice), "rows": [asdict(row) for row in rows]}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_aside(args.output_dir / picture.name, picture.png)
    write_aside(args.output_dir / "variance.json", json.dumps(without_nan(numbers), indent=1).encode())
    page = report(args, data, rows, advice, pictures, command)
    write_aside(args.output_dir / "index.html", page.encode())
    recommended = f"n = {advice.n}" if advice.n else "all images"
    seconds = time.perf_counter() - begun
    print(f"{args.output_dir / 'index.html'}: {recommended} recommended; {seconds:.0f} s")


if __name__ == "__main__":
    main()
