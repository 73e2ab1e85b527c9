#!/usr/bin/env python
"""What do references of other classes do to the target of a class-conditional network?

    python benchmarks/conditional_toy.py --output docs/images/conditional_toy.png

Two classes, each a mixture of Gaussians along an arc of the plane, so that E[x0 | x_t, class] has a closed form. At each
point x_t of a grid, sources are drawn from p(x0 | x_t, upper class), and for each of them a reference batch of n images:

- DSM: the source alone;
- references of all classes: the source and n - 1 images of both classes, for a network that sees the class;
- references of the class: the list of `ReferenceBatchSampler(..., labels=)`, the source, half of the rest of both
  classes and half of the source's, of which those of the source's class are used.

Printed: squared bias and variance of the target, averaged over x_t ~ p(x_t | upper class), with standard errors over
independent blocks of draws (the squared bias is a product of different blocks' means: its expectation is 0 where there is
none). The figure shows both at each point.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stf_diffusers import posterior_mean

METHODS = {
    "dsm": "DSM (the source alone)",
    "naive": "STF, references of all classes",
    "ours": "STF, references of the class",
}


@dataclass(frozen=True)
class Arc:
    """A class: equally likely Gaussians of standard deviation `spread` around `centres` (k, 2)."""

    centres: Tensor
    spread: float = 0.06

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Images of the class, (count, 2)."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[which] + self.spread * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def log_density(self, noisy: Tensor, sigma: float) -> Tensor:
        """log p(x_t | class) of noisy (G, 2) by centre, (G, k), up to a constant; its logsumexp is the density's."""
        return -torch.cdist(noisy, self.centres).square() / (2 * (self.spread**2 + sigma**2))

    def _by_centre(self, noisy: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Weights (G, k) and means (G, k, 2) of p(x0 | x_t, class), a mixture again."""
        shrink = self.spread**2 / (self.spread**2 + sigma**2)
        return self.log_density(noisy, sigma).softmax(1), torch.lerp(self.centres[None], noisy[:, None], shrink)

    def posterior_mean(self, noisy: Tensor, sigma: float) -> Tensor:
        """E[x0 | x_t, class], (G, 2), in closed form."""
        weights, means = self._by_centre(noisy, sigma)
        return (weights[:, :, None] * means).sum(1)

    def draw_sources(self, noisy: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """One draw of p(x0 | x_t, class) for each x_t, (G, 2)."""
        weights, means = self._by_centre(noisy, sigma)
        which = torch.multinomial(weights, 1, generator=generator)[:, 0]
        deviation = self.spread * sigma / math.hypot(self.spread, sigma)
        draws = deviation * torch.randn(len(noisy), 2, generator=generator, dtype=torch.float64)
        return means[torch.arange(len(noisy)), which] + draws


def two_arcs() -> tuple[Arc, Arc]:
    angle = torch.linspace(0, math.pi, 24, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    return Arc(upper), Arc(torch.tensor([1.0, 0.5], dtype=torch.float64) - upper)


def targets(
    upper: Arc, lower: Arc, noisy: Tensor, sigma: float, n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """One draw of every method's target at every x_t, (G, 2) each."""
    sources = upper.draw_sources(noisy, sigma, generator)
    both = torch.rand(n - 1, generator=generator) < 0.5
    others = torch.where(both[:, None], upper.draw(n - 1, generator), lower.draw(n - 1, generator))
    uniform = (n - 1) // 2
    same_class = torch.cat([others[:uniform][both[:uniform]], upper.draw(n - 1 - uniform, generator)])

    def mean_over(references: Tensor) -> Tensor:
        # All points share the other references; each has its own source, drawn given its x_t, and must not see theirs.
        own = torch.eye(len(noisy), dtype=torch.bool)
        shared = torch.ones(len(noisy), len(references), dtype=torch.bool)
        reference, mask = torch.cat([sources, references]), torch.cat([own, shared], 1)
        return posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, mask=mask).mean

    return {"dsm": sources, "naive": mean_over(others), "ours": mean_over(same_class)}


def squared_norm_of_mean(blocks: Tensor, weights: Tensor) -> Tensor:
    """Unbiased estimate, from independent blocks' means (K, G, 2), of the average squared norm of their expectation."""
    count = len(blocks)
    pairs = blocks.sum(0).square().sum(1) - blocks.square().sum((0, 2))
    return weights @ pairs / (count * (count - 1))


def measure(errors: Tensor, squares: Tensor, weights: Tensor) -> dict[str, float]:
    """Squared bias and variance with standard errors, from blocks' mean errors (K, G, 2) and squared errors (K, G)."""
    count = len(errors)

    def estimate(kept: Tensor) -> Tensor:
        bias = squared_norm_of_mean(errors[kept], weights)
        return torch.stack([bias, weights @ squares[kept].mean(0) - bias])

    whole = torch.arange(count)
    leave_one_out = torch.stack([estimate(whole[whole != k]) for k in range(count)])
    standard_error = ((count - 1) / count * (leave_one_out - leave_one_out.mean(0)).square().sum(0)).sqrt()
    names = ("bias", "variance")
    values = dict(zip(names, estimate(whole).tolist(), strict=True))
    return values | {f"{name}_se": e for name, e in zip(names, standard_error.tolist(), strict=True)}


def in_thousandths(found: dict[str, float], name: str) -> str:
    value, error = 1000 * found[name], 1000 * found[f"{name}_se"]
    return f"{value:.3f} ± {error:.3f}"


def plot(
    path: Path,
    upper: Arc,
    lower: Arc,
    grid: tuple[Tensor, Tensor],
    seen: Tensor,
    bias: dict[str, Tensor],
    deviation: dict[str, Tensor],
    results: dict[str, dict[str, float]],
    title: str,
) -> None:
    """Bias (arrows, and colour for their length) above standard deviation (colour), one column for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    xs, ys = (axis.numpy() for axis in grid)

    def on_grid(values: Tensor) -> Any:
        """Values of the points that are `seen` as an image, nothing elsewhere."""
        full = torch.full(seen.shape, torch.nan, dtype=torch.float64)
        full[seen] = values
        return full.view(len(ys), len(xs)).numpy()

    figure, axes = plt.subplots(2, len(METHODS), figsize=(11, 6.6), sharex=True, sharey=True, layout="constrained")
    largest = max(float(values.norm(dim=1).max()) for values in bias.values())
    widest = max(float(values.max()) for values in deviation.values())
    for column, (name, label) in enumerate(METHODS.items()):
        top, bottom = axes[0, column], axes[1, column]
        length = top.pcolormesh(
            xs, ys, on_grid(bias[name].norm(dim=1)), vmin=0, vmax=largest, cmap="OrRd", rasterized=True
        )
        width = bottom.pcolormesh(xs, ys, on_grid(deviation[name]), vmin=0, vmax=widest, cmap="Blues", rasterized=True)
        every = (slice(1, None, 2), slice(0, None, 3))
        u, v = on_grid(bias[name][:, 0]), on_grid(bias[name][:, 1])
        top.quiver(
            xs[every[1]],
            ys[every[0]],
            u[every],
            v[every],
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.006,
            minlength=0,
        )
        for axis in (top, bottom):
            axis.plot(*upper.centres.T.numpy(), color="tab:green", lw=2.5, label="upper class, which the network sees")
            axis.plot(*lower.centres.T.numpy(), color="tab:gray", lw=2.5, ls=(0, (2, 1)), label="lower class")
            axis.set(aspect="equal", xlim=(-2.2, 3.2), ylim=(-1.75, 2.15))
        found = results[name]
        top.set_title(f"{label}\nsquared bias {in_thousandths(found, 'bias')}", fontsize=10)
        bottom.set_title(f"variance {in_thousandths(found, 'variance')}", fontsize=10)
        bottom.set_xlabel("first coordinate of x_t")
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(f"{('bias', 'standard deviation')[row]}\nsecond coordinate of x_t")
    figure.colorbar(length, ax=axes[0], label="length of the bias (arrows to scale)", shrink=0.85)
    figure.colorbar(width, ax=axes[1], label="standard deviation", shrink=0.85)
    figure.suptitle(title, fontsize=12)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the figure; without it, the table alone")
    parser.add_argument("--sigma", type=float, default=0.5, help="noise level")
    parser.add_argument("--n", type=int, default=64, help="images in a reference batch, the source included")
    parser.add_argument("--draws", type=int, default=2000, help="of source and references, at each x_t")
    parser.add_argument("--blocks", type=int, default=40, help="into which the draws are parted for standard errors")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    upper, lower = two_arcs()
    xs, ys = torch.linspace(-2.0, 2.2, 25).double(), torch.linspace(-1.2, 2.0, 19).double()
    points = torch.cartesian_prod(ys, xs).flip(1)
    density = upper.log_density(points, args.sigma).logsumexp(1).exp()
    seen = density > 0.02 * density.max()
    noisy, weights = points[seen], density[seen] / density[seen].sum()
    exact = upper.posterior_mean(noisy, args.sigma)

    size = args.draws // args.blocks
    errors = {name: torch.zeros(args.blocks, len(noisy), 2, dtype=torch.float64) for name in METHODS}
    squares = {name: torch.zeros(args.blocks, len(noisy), dtype=torch.float64) for name in METHODS}
    for block in range(args.blocks):
        for _ in range(size):
            for name, target in targets(upper, lower, noisy, args.sigma, args.n, generator).items():
                errors[name][block] += (target - exact) / size
                squares[name][block] += (target - exact).square().sum(1) / size

    results = {name: measure(errors[name], squares[name], weights) for name in METHODS}
    print(f"sigma = {args.sigma}, n = {args.n}, {size * args.blocks} draws at each of {len(noisy)} points x_t\n")
    print("| target, in units of 0.001 | squared bias | variance |\n|---|---|---|")
    for name, label in METHODS.items():
        found = results[name]
        print(f"| {label} | {in_thousandths(found, 'bias')} | {in_thousandths(found, 'variance')} |")
    if args.output:
        bias = {name: errors[name].mean(0) for name in METHODS}
        deviation = {name: (squares[name].mean(0) - bias[name].square().sum(1)).sqrt() for name in METHODS}
        title = f"Targets of a class-conditional network: noise level {args.sigma}, {args.n} images read (numbers in units of 0.001)"
        plot(args.output, upper, lower, (xs, ys), seen, bias, deviation, results, title)
        print(f"\n{args.output}: {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
