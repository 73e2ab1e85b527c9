"""The entropy rate of a data set, and the noise levels that are drawn accordingly."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from stf_diffusers import EDM, VE, target_variance
from stf_diffusers.noise_distribution import distribution_from_config, distribution_to_config
from stf_diffusers.noise_profile import entropy_rate, recommended_distribution, undecided_variance


def error_of_two_points(level):
    """Mean squared error of E[x0 | x0 + level noise] for x0 = -1 or 1, by quadrature."""
    y = 1 / level**2

    def inside(z):
        return (1 - math.tanh(y + z / level)) * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    return quad(inside, -12, 12, epsabs=1e-12, limit=200)[0]


def rows_of(data, levels, num_samples=4000):
    draws = torch.Generator().manual_seed(0)
    return target_variance(EDM(), data, levels, num_samples=num_samples, generator=draws)


def test_the_rate_of_two_points():
    """Against quadrature, to five standard errors; it integrates to ln 2."""
    levels = np.geomspace(0.3, 10, 12)
    rows = rows_of(torch.tensor([[-1.0], [1.0]]), levels.tolist())
    for row, rate in zip(rows, entropy_rate(rows), strict=True):
        exact = error_of_two_points(row.noise_level) / row.noise_level**2
        assert abs(rate - exact) <= 5 * row.dsm.standard_error / row.noise_level**2 + 1e-9
    whole = quad(lambda log: error_of_two_points(math.exp(log)) * math.exp(-2 * log), math.log(0.05), math.log(1e4))[0]
    assert math.isclose(whole, math.log(2), abs_tol=1e-6)


def test_half_as_drawn_and_half_in_proportion_to_the_rate():
    levels = np.geomspace(0.05, 100, 24)
    rows = rows_of(torch.tensor([[-1.0], [1.0]]), levels.tolist(), num_samples=500)
    drawn = VE(0.02, 50.0).sample_t(50_000, generator=torch.Generator().manual_seed(0))
    parts = [recommended_distribution(rows, drawn, share) for share in (0.0, 1.0, 0.5)]
    own, rate, half = (np.array(part.weights) for part in parts)
    assert all(part.levels == parts[0].levels for part in parts)
    np.testing.assert_allclose(half, (own + rate) / 2, atol=1e-15)
    edges = np.array(parts[0].levels)
    inside = (edges[:-1] > 0.0202) & (edges[1:] < 49)
    # Log-uniform: equal pieces have equal shares of 50,000 draws, to five standard deviations.
    expected = np.diff(np.log(edges))[0] / math.log(50 / 0.02)
    assert abs(own[inside] - expected).max() < 5 * math.sqrt(expected / 50_000)
    at = np.sqrt(edges[:-1] * edges[1:])
    by_hand = np.interp(np.log(at), np.log(levels), entropy_rate(rows), left=0, right=0)
    np.testing.assert_allclose(rate, by_hand / by_hand.sum(), atol=1e-15)
    assert distribution_from_config(distribution_to_config(parts[2])) == parts[2]


def test_where_the_variance_is_undecided():
    """Of two points, by quadrature, to five standard errors; drawn in proportion to it."""
    levels = np.geomspace(0.1, 300, 20)
    rows = rows_of(torch.tensor([[-1.0], [1.0]]), levels.tolist())
    found = undecided_variance(rows)
    for row, share in zip(rows, found, strict=True):
        exact = error_of_two_points(row.noise_level)
        # d(4 v (1 - v)) is at most 4 dv, and the largest variance is 1 to 1e-4.
        assert abs(share - 4 * exact * (1 - exact)) <= 20 * row.dsm.standard_error + 1e-3
    assert found[0] < 1e-3 and found[-1] < 1e-3 and max(found) > 0.9
    drawn = VE(0.02, 50.0).sample_t(50_000, generator=torch.Generator().manual_seed(0))
    levels_drawn = recommended_distribution(rows, drawn, 1.0, found)
    at = np.sqrt(np.array(levels_drawn.levels[:-1]) * levels_drawn.levels[1:])
    by_hand = np.interp(np.log(at), np.log(levels), found, left=0, right=0)
    np.testing.assert_allclose(levels_drawn.weights, by_hand / by_hand.sum(), atol=1e-15)


def test_what_cannot_be_recommended():
    drawn = EDM().sample_t(1000, generator=torch.Generator().manual_seed(0))
    rows = rows_of(torch.tensor([[-1.0], [1.0]]), [0.5, 2.0], num_samples=16)
    for wrong in (rows[:1], rows[::-1]):
        with pytest.raises(ValueError, match="two or more finite noise levels in ascending order"):
            recommended_distribution(wrong, drawn)
    with pytest.raises(ValueError, match="share must lie between 0 and 1; got 2"):
        recommended_distribution(rows, drawn, 2)
    with pytest.raises(ValueError, match="a number for each of the 2 rows; got 3"):
        recommended_distribution(rows, drawn, profile=[1.0, 2.0, 3.0])
    same = rows_of(torch.ones(2, 1), [0.5, 2.0], num_samples=16)
    with pytest.raises(ValueError, match="0 at all measured noise levels"):
        recommended_distribution(same, drawn)
