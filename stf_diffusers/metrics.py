"""Distances between sets of images, on features that are computed elsewhere.

Distances are comparable only where the features, the number of samples, the reference set and the sampler are
the same; Fréchet and kernel distances of few samples say little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def _features(features: Tensor, name: str, at_least: int = 2) -> Tensor:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor (n, d); got {type(features).__name__}.")
    if features.ndim != 2 or len(features) < at_least:
        raise ValueError(f"{name} must have shape (n, d) with n of at least {at_least}; got {tuple(features.shape)}.")
    features = features.to(torch.float64)
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} are not all finite.")
    return features


@dataclass(frozen=True)
class FeatureStatistics:
    """Number, mean (d,) and scatter matrix (d, d) of features, float64: what a Fréchet distance needs.

    Statistics of parts merge into those of the whole: over batches, or over processes.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (n, d), n at least 1.

        Raises:
            TypeError, ValueError: they are not such a tensor, or not finite.
        """
        features = _features(features, "features", at_least=1)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan, Golub & LeVeque 1979).

        Raises:
            ValueError: the features differ in their dimension.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged.")
        count, difference = self.count + other.count, other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(d, d), with n - 1.

        Raises:
            ValueError: there is a single feature vector.
        """
        if self.count < 2:
            raise ValueError("a covariance needs at least 2 features; got 1.")
        return self.scatter / (self.count - 1)


def frechet_distance(left: FeatureStatistics, right: FeatureStatistics) -> float:
    """Squared Fréchet distance of two normal distributions (Dowson & Landau 1982): on Inception features, FID.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``. The last trace is the sum of the singular values of C1^(1/2) C2^(1/2),
    which covariances that are not of full rank do not disturb.

    Raises:
        ValueError: the features differ in their dimension, or there is a single one.
    """
    if left.mean.shape != right.mean.shape:
        raise ValueError(f"features of {len(left.mean)} and {len(right.mean)} dimensions cannot be compared.")
    cross = torch.linalg.svdvals(_root(left.covariance) @ _root(right.covariance)).sum()
    means = (left.mean - right.mean).square().sum()
    distance = means + left.covariance.trace() + right.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class KernelDistance(NamedTuple):
    """Squared kernel distance, and its standard error: over fresh sets of both sides, and the draw of the subsets."""

    value: float
    standard_error: float


def kernel_distance(
    left: Tensor,
    right: Tensor,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3`` (Bińkowski et al. 2018, arXiv
    1801.01401): on Inception features, KID. A mean over random subsets; it can be negative.

    Its variance is that of the estimate on all features, plus what the draw of the subsets adds, which alone falls with
    their number. (The spread over subsets divided by the root of their number, often given as the error, is the latter.)

    Args:
        left, right: (n, d) and (m, d) features, at least 4 each.
        subset_size: size of each subset, at most n and m.
        num_subsets: at least 2.
        generator: for the subsets.

    Raises:
        TypeError, ValueError: features or numbers that do not fit.
    """
    left, right = _features(left, "left", at_least=4), _features(right, "right", at_least=4)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"features of {left.shape[1]} and {right.shape[1]} dimensions cannot be compared.")
    size = min(subset_size, len(left), len(right))
    if size < 4 or num_subsets < 2:
        raise ValueError(
            f"subset_size must be at least 4 and num_subsets at least 2; got {subset_size} and {num_subsets}."
        )
    drawn_on = "cpu" if generator is None else generator.device
    values, components = [], []
    for _ in range(num_subsets):
        x, y = (
            part[torch.randperm(len(part), generator=generator, device=drawn_on)[:size].to(part.device)]
            for part in (left, right)
        )
        kernels = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = sum((kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1)) for kernel in kernels[:2])
        values.append(within - 2 * kernels[2].mean())
        components.append(_variance_components(*kernels))
    distances = torch.stack(values)
    first_x, first_y, second_x, second_y, crossed = torch.stack(components).mean(0)
    n, m = len(left), len(right)
    # The exact variance of this two-sample U-statistic: the terms of its Hoeffding decomposition are uncorrelated.
    variance = 4 * first_x.clamp(min=0) / n + 4 * first_y.clamp(min=0) / m
    variance += 2 * second_x / (n * (n - 1)) + 2 * second_y / (m * (m - 1)) + 4 * crossed / (n * m)
    variance += distances.var() / num_subsets
    return KernelDistance(float(distances.mean()), float(variance.sqrt()))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _variance_components(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """(5,), unbiased, of kernels (s, s): the variance of the witness function at x and at y, and the mean squares of the
    centred kernels of two x, of two y, and of x with y.
    """
    size = len(xx)
    crossed = (xy - xy.mean(0) - xy.mean(1, keepdim=True) + xy.mean()).square().sum() / (size - 1) ** 2
    first, second = [], []
    for within, across in ((xx, xy), (yy, xy.T)):
        others = within - within.diagonal().diag()
        sums = others.sum(1) / (size - 2)
        # U-centring (Székely & Rizzo 2014): without the diagonal, sums over rows are of s - 1 terms, and s - 2 unbias.
        centred = others - sums - sums[:, None] + sums.sum() / (size - 1)
        square = (centred.square().sum() - centred.diagonal().square().sum()) / (size * (size - 3))
        second.append(square)
        first.append((sums - across.mean(1)).var() - square / (size - 2) - crossed / size)
    return torch.stack([*first, *second, crossed])


class PrecisionRecall(NamedTuple):
    """Share of the samples that lie among the data, and of the data that lie among the samples."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, data: Tensor, *, neighbors: int = 3, chunk_size: int = 1024) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A point lies among a set if, for some member of it, it is not further away than that member's `neighbors`-th nearest
    neighbour in the set.

    Args:
        samples, data: (n, d) and (m, d) features.
        neighbors: k, at least 1 and below n and m.
        chunk_size: rows of distances computed at a time.

    Raises:
        TypeError, ValueError: features or numbers that do not fit.
    """
    samples, data = _features(samples, "samples"), _features(data, "data")
    if samples.shape[1] != data.shape[1]:
        raise ValueError(f"features of {samples.shape[1]} and {data.shape[1]} dimensions cannot be compared.")
    if not 1 <= neighbors < min(len(samples), len(data)):
        raise ValueError(f"neighbors must be at least 1 and below {min(len(samples), len(data))}; got {neighbors}.")

    # Not the mean, which one outlier moves, and with it what products lose of the distances between all others.
    centre = data.median(0).values
    samples, data = samples - centre, data - centre
    return PrecisionRecall(
        _share_within(samples, data, neighbors, chunk_size), _share_within(data, samples, neighbors, chunk_size)
    )


def _share_within(points: Tensor, members: Tensor, neighbors: int, chunk_size: int) -> float:
    """The share of the points that lie among the members: by products, and where their error could decide by differences."""

    def exact(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
        """Between which the squared distances of x to the members lie."""
        norms = x.square().sum(1)[:, None] + members.square().sum(1)
        distances = (-2 * x @ members.T).add_(norms)
        return distances - 1e-13 * norms, distances + 1e-13 * norms

    # The nearest of all is the member itself.
    radii = [
        torch.stack([bound.kthvalue(neighbors + 1, 1).values for bound in bounds(part)])
        for part in members.split(chunk_size)
    ]
    least, most = torch.cat(radii, 1)
    inside = []
    for part in points.split(chunk_size):
        below, above = bounds(part)
        within = (above <= least).any(1)
        open_pairs = ~(below > most) & ~within[:, None]
        for row in open_pairs.any(1).nonzero().flatten():
            reach = members[open_pairs[row]]
            exact_radii = torch.cat(
                [exact(some, members).kthvalue(neighbors + 1, 1).values for some in reach.split(chunk_size)]
            )
            within[row] = (exact(part[row : row + 1], reach)[0] <= exact_radii).any()
        inside.append(within)
    return float(torch.cat(inside).double().mean())


class NearestNeighbors(NamedTuple):
    """The nearest of the data to each of n samples: its index `neighbor` (n,), its `distance` (n,), and `ratio` (n,),
    that distance over the second nearest's.
    """

    neighbor: Tensor
    distance: Tensor
    ratio: Tensor

    def copies(self, threshold: float = 1 / 3) -> Tensor:
        """(n,) bool: which samples are three times closer to one datum than to any other (Yoon et al. 2023)."""
        return self.ratio < threshold


def nearest_neighbors(samples: Tensor, data: Tensor, *, chunk_size: int = 1024) -> NearestNeighbors:
    """Which data the samples resemble, and how much more than any other: a ratio near 0 is a copy (Yoon et al. 2023).

    Data that are in the set twice count once. Beyond the arguments, memory is that of chunks: pixels may stay uint8.

    Args:
        samples, data: (n, d) and (m, d) features or flattened images, with at least two different data.
        chunk_size: samples, and data, at a time.

    Raises:
        TypeError, ValueError: features that do not fit.
    """
    for name, rows in (("samples", samples), ("data", data)):
        _features(rows[:1], name, at_least=1)
    if samples.shape[1] != data.shape[1]:
        raise ValueError(f"features of {samples.shape[1]} and {data.shape[1]} dimensions cannot be compared.")
    first = _first_of_each(data)
    if len(first) < 2:
        raise ValueError("data must hold two different images at least; all are equal.")
    nearest, distances = [], []
    for part in samples.split(chunk_size):
        part = _features(part, "samples", at_least=1)
        # Products find the candidates; their differences are exact, 0 for a copy.
        found = torch.empty(len(part), 0, dtype=torch.float64, device=part.device)
        candidates = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for rows in first.split(chunk_size):
            values = _features(data[rows], "data", at_least=1)
            found = torch.cat([found, values.square().sum(1) - 2 * part @ values.T], 1)
            candidates = torch.cat([candidates, rows.expand(len(part), -1)], 1)
            found, kept = found.topk(min(8, found.shape[1]), largest=False)
            candidates = candidates.gather(1, kept)
        exact = torch.stack([(part - data[column]).square().sum(1).sqrt() for column in candidates.T], 1)
        values, order = exact.topk(2, largest=False)
        nearest.append(candidates.gather(1, order[:, :1])[:, 0])
        distances.append(values)
    both = torch.cat(distances)
    return NearestNeighbors(torch.cat(nearest), both[:, 0], both[:, 0] / both[:, 1])


def _first_of_each(data: Tensor) -> Tensor:
    """Positions of the different rows (k,), each where it stands first."""
    distinct, inverse = torch.unique(data, dim=0, return_inverse=True)
    positions = torch.arange(len(data), device=data.device)
    first = torch.full((len(distinct),), len(data), device=data.device)
    return first.scatter_reduce(0, inverse, positions, "amin").sort().values
