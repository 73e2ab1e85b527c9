"""Distances against scipy's matrix square root, closed forms, brute force and planted copies."""

import numpy as np
import pytest
import torch
from scipy import linalg

from oracles import normal
from stf_diffusers.metrics import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
)


def features(count, dimensions, seed=0):
    mixing = normal(dimensions, dimensions, seed=seed + 100).double()
    return normal(count, dimensions, seed=seed).double() @ mixing + seed


@pytest.mark.parametrize(("count", "dimensions"), [(200, 5), (300, 64), (40, 64)])
def test_frechet_distance_against_scipy(count, dimensions):
    """(40, 64): covariances that are not of full rank, where the matrix square root itself is worth 1e-6 only."""
    left, right = features(count, dimensions), features(count, dimensions, seed=1)
    found = frechet_distance(FeatureStatistics.of(left), FeatureStatistics.of(right))
    covariances = [np.cov(part.numpy(), rowvar=False) for part in (left, right)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((left.mean(0) - right.mean(0)) ** 2).sum().item() + np.trace(sum(covariances)) - 2 * np.trace(root)
    assert found == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2, exactly."""
    mean, s1, s2 = normal(6).double(), normal(6, seed=1).double().abs() + 0.1, normal(6, seed=2).double().abs()
    left = FeatureStatistics(11, torch.zeros(6, dtype=torch.float64), torch.diag(s1**2) * 10)
    right = FeatureStatistics(21, mean, torch.diag(s2**2) * 20)
    expected = (mean**2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(left, left) < 1e-12


def test_merged_statistics_are_those_of_the_whole():
    whole = features(101, 7) + 1e4
    parts = [FeatureStatistics.of(part) for part in whole.split([1, 60, 40])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    expected = FeatureStatistics.of(whole)
    assert merged.count == 101
    torch.testing.assert_close(merged.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.scatter, expected.scatter, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.covariance.numpy(), np.cov(whole.numpy(), rowvar=False), rtol=1e-8)


def test_kernel_distance_against_its_definition():
    left, right = features(30, 4) / 5, features(30, 4, seed=1) / 5

    def kernel(x, y):
        return (float(x @ y) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(30) for j in range(30)]
    within = sum(kernel(part[i], part[j]) for part in (left, right) for i, j in pairs if i != j) / (30 * 29)
    expected = within - 2 * sum(kernel(left[i], right[j]) for i, j in pairs) / 900
    found = kernel_distance(left, right, subset_size=30, num_subsets=2)
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_one_law_is_zero_on_average():
    """Mean over independent pairs within four standard errors of 0; of shifted ones far from it."""
    values = [
        kernel_distance(normal(60, 3, seed=k), normal(60, 3, seed=1000 + k), num_subsets=2).value for k in range(200)
    ]
    mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
    assert abs(mean) < 4 * error
    assert kernel_distance(normal(60, 3), normal(60, 3, seed=1) + 1, num_subsets=2).value > 20 * error


SETS = {
    # of samples, of data, shift of the samples, options
    "one law": (100, 100, 0.0, {}),
    "one law, subsets": (60, 240, 0.0, {"subset_size": 40, "num_subsets": 20}),
    "near": (100, 100, 0.3, {}),
    "near, few subsets": (200, 100, 0.3, {"subset_size": 40, "num_subsets": 5}),
    "far, other numbers": (100, 400, 1.0, {"num_subsets": 10}),
    "far, many subsets": (200, 200, 1.0, {"subset_size": 40, "num_subsets": 50}),
}


def distance_of_normals(shift, dimensions):
    """Of N(0, I) and N(shift, I): the cubic kernel's mean by the cumulants of a product of two coordinates."""

    def kernel(m, n):
        first, second, third = m * n, (1 + m**2) * (1 + n**2), (3 * m + m**3) * (3 * n + n**3)
        mean, variance = dimensions * (1 + first), dimensions * (second - first**2)
        return (
            mean**3 + 3 * mean * variance + dimensions * (third - 3 * first * second + 2 * first**3)
        ) / dimensions**3

    return kernel(0, 0) + kernel(shift, shift) - 2 * kernel(0, shift)


@pytest.mark.parametrize("case", SETS)
def test_standard_error_of_the_kernel_distance_is_that_of_fresh_sets(case):
    """Over 200 pairs of fresh normal sets: the mean squared error of the value, and how often it lies within two errors."""
    count, others, shift, options = SETS[case]
    expected, found = distance_of_normals(shift, 16), []
    for k in range(200):
        sets = normal(count, 16, seed=k) + shift, normal(others, 16, seed=5000 + k)
        draws = torch.Generator().manual_seed(k)
        found.append(kernel_distance(*sets, generator=draws, **{"num_subsets": 2, **options}))
    values, errors = (torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True))
    assert abs(values.mean() - expected) < 4 * values.std() / 200**0.5
    assert 0.85 < (errors.square().mean() / (values - expected).square().mean()).sqrt() < 1.3
    assert ((values - expected).abs() < 2 * errors).double().mean() > 0.9


def test_more_subsets_do_not_make_the_sets_larger():
    left, right = normal(400, 3), normal(400, 3, seed=1) + 0.5
    few, many = (
        kernel_distance(left, right, subset_size=100, num_subsets=k, generator=torch.Generator().manual_seed(0))
        for k in (20, 500)
    )
    whole = kernel_distance(left, right, num_subsets=2)
    assert few.standard_error > many.standard_error > 0.9 * whole.standard_error > 0.0


def test_precision_and_recall_by_brute_force():
    samples, data = normal(40, 3), normal(50, 3, seed=1) * 1.5
    found = precision_recall(samples, data, neighbors=2, chunk_size=7)

    def share(points, members):
        radii = [sorted((member - other).norm().item() for other in members)[2] for member in members]
        inside = [any((p - m).norm() <= r for m, r in zip(members, radii, strict=True)) for p in points]
        return np.mean(inside)

    assert found == (
        pytest.approx(share(samples.double(), data.double())),
        pytest.approx(share(data.double(), samples.double())),
    )
    assert 0 < found.recall < found.precision
    assert precision_recall(data, data) == (1.0, 1.0)
    assert precision_recall(samples + 100, data) == (0.0, 0.0)


def test_an_outlier_changes_precision_by_itself_alone():
    data, samples = normal(300, 8), normal(300, 8, seed=1) + 30
    samples[0] = 1e8
    assert precision_recall(samples, data).precision == 0
    # Far clusters are resolved too: of two samples near one, the one that equals a member lies in it.
    data[:5] = 1e8 + 8 * torch.arange(40).view(5, 8)
    samples[0], samples[1] = 1e8 + 5000, data[2]
    assert precision_recall(samples, data).precision == 1 / 300


def test_planted_copies_and_only_they_have_ratios_near_zero():
    data = normal(500, 48)
    samples = normal(40, 48, seed=1)
    copies = [3, 17, 39]
    for place, source in zip(copies, (7, 400, 123), strict=True):
        samples[place] = data[source] + 1e-3 * normal(48, seed=place)
    found = nearest_neighbors(samples, data, chunk_size=9)
    assert sorted(torch.nonzero(found.ratio < 1 / 3)[:, 0].tolist()) == copies
    assert found.neighbor[copies].tolist() == [7, 400, 123]
    brute = (samples[0].double() - data.double()).norm(dim=1).sort()
    assert found.distance[0].item() == pytest.approx(brute.values[0].item())
    assert found.ratio[0].item() == pytest.approx((brute.values[0] / brute.values[1]).item())
    exact = nearest_neighbors(data[:1], data)
    assert exact.distance.item() == exact.ratio.item() == 0
    # Twice in the data, it is a copy still; of the two the first is named.
    twice = nearest_neighbors(samples, torch.cat([data, data]))
    torch.testing.assert_close(twice.ratio, found.ratio, rtol=1e-9, atol=0)
    assert twice.neighbor.tolist() == found.neighbor.tolist()
    assert twice.copies().nonzero()[:, 0].tolist() == copies


WRONG = {
    "one dimension": lambda: FeatureStatistics.of(torch.zeros(3)),
    "not finite": lambda: FeatureStatistics.of(torch.full((3, 2), torch.nan)),
    "other dimension": lambda: frechet_distance(*(FeatureStatistics.of(normal(9, d)) for d in (2, 3))),
    "single feature": lambda: frechet_distance(*(FeatureStatistics.of(normal(1, 2)),) * 2),
    "merged dimensions": lambda: FeatureStatistics.of(normal(9, 2)).merge(FeatureStatistics.of(normal(9, 3))),
    "kernel dimensions": lambda: kernel_distance(normal(9, 2), normal(9, 3)),
    "three features": lambda: kernel_distance(normal(3, 2), normal(9, 2)),
    "one subset": lambda: kernel_distance(normal(9, 2), normal(9, 2), num_subsets=1),
    "too many neighbours": lambda: precision_recall(normal(9, 2), normal(9, 2), neighbors=9),
    "one datum": lambda: nearest_neighbors(normal(9, 2), normal(1, 2).expand(3, -1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    with pytest.raises(ValueError):
        WRONG[case]()


def test_no_tensor():
    with pytest.raises(TypeError, match="must be a tensor"):
        FeatureStatistics.of([[1.0, 2.0]])
