"""Rounded logits: bounds of their errors, and which of them the mean needs exactly."""

import math

import pytest
import torch

from oracles import normal, posterior, worst
from stf_diffusers import posterior_mean
from stf_diffusers.chunk_states import PosteriorState
from stf_diffusers.logit_errors import LogitErrors, is_allowed
from stf_diffusers.sparse_states import SparseQueries

LIMIT = 2e-5


def references(kind, n, dimension):
    draws = torch.Generator().manual_seed(dimension)
    if kind == "white noise":
        return torch.randint(0, 256, (n, dimension), generator=draws, dtype=torch.uint8)
    if kind == "black and white":
        return torch.randint(0, 2, (n, dimension), generator=draws, dtype=torch.uint8) * 255
    if kind == "nearly black":
        return torch.randint(0, 8, (n, dimension), generator=draws, dtype=torch.uint8)
    if kind == "constant":
        return torch.randint(0, 256, (n, 1), generator=draws, dtype=torch.uint8).repeat(1, dimension)
    if kind == "normal":
        return torch.randn(n, dimension, generator=draws)
    if kind == "constant float":
        return (torch.rand(n, 1, generator=draws) * 2 - 1).repeat(1, dimension)
    return torch.rand(n, dimension, generator=draws)


@pytest.mark.parametrize(
    "kind", ["white noise", "black and white", "nearly black", "constant", "normal", "constant float", "positive"]
)
@pytest.mark.parametrize(
    ("noise", "dimension"),
    [*(("white", dimension) for dimension in (3, 100, 768, 3072, 50_000)), ("one value", 100), ("one value", 3072)],
)
def test_float32_logits_are_within_their_bounds(kind, dimension, noise):
    reference = references(kind, max(16, min(256, 2**20 // dimension)), dimension)
    levels = reference.dtype == torch.uint8
    clean = reference.double() / 127.5 - 1 if levels else reference.double()
    rows = torch.arange(8)
    for level in (0.05, 0.5, 3.0, 10.0, 80.0):
        sigma, alpha = torch.full((8,), level, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
        draws = normal(8, dimension) if noise == "white" else normal(8, 1).abs().expand(8, dimension)
        noisy = (clean[rows] + level * draws).float().double()
        queries = SparseQueries(noisy, alpha, sigma, levels, "float32", norms_are_known=False)
        images = queries.read(reference)
        norms = queries.norms(images)
        exact = clean.square().sum(1)
        if levels:  # in levels, and without the constant that is common to all
            exact = (reference.double() - 128).square().sum(1) + (reference.double() - 128).sum(1)
        logits, errors, _ = queries._rounded_logits((images, norms))
        truth = queries.reduced(queries.query @ images.double().T, exact)
        bounds = torch.outer(errors.of_length, errors.lengths) + torch.outer(errors.of_square, errors.lengths**2)
        assert bool(((logits - truth).abs() <= bounds).all()), level


def test_what_is_allowed_changes_no_mean_by_more_than_the_limit():
    """The worst case, values of -1 and 1 and errors that push both ways, of any division of the weights."""
    mass_below, mass_above, error = torch.meshgrid(
        torch.linspace(0, 1, 51), torch.linspace(0, 1, 51), torch.logspace(-7, -3, 60), indexing="ij"
    )
    left = torch.stack([mass_below + mass_above, (mass_below + mass_above) * error], -1).double()
    possible = (left[..., 0] <= 1) & (left[..., 0] > 0)
    allowed = is_allowed(left, torch.ones_like(left[..., 0])) & possible
    # Whatever is exact is 1 as well: the mean is 1 - 2 mass_below.
    change = error * (mass_below * 2 * (1 - mass_below) + mass_above * 2 * mass_below)
    assert change[allowed].max() <= LIMIT * (1 + 1e-6)
    assert change[allowed].max() > 0.99 * LIMIT
    assert bool(allowed[possible & (error <= 0.99 * LIMIT)].all())


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_as_few_weights_as_possible_are_decisive(spread):
    weights = (spread * normal(20, 300, seed=3).double()).softmax(1)
    lengths = 1 + normal(300, seed=4).double().abs()
    errors = LogitErrors(torch.logspace(-6, -3, 20).double(), torch.logspace(-6, -4, 20).double(), lengths)
    rows, before, total = torch.arange(20), torch.zeros(20, 2).double(), torch.ones(20).double()
    decisive, left = errors.decisive(rows, weights, before, total)
    kept = weights.masked_fill(decisive, 0)
    torch.testing.assert_close(left, errors.left(rows, kept), rtol=1e-9, atol=1e-15)
    assert bool(is_allowed(left, total).all())
    product = weights * (torch.outer(errors.of_length, lengths) + torch.outer(errors.of_square, lengths**2))
    one_less = decisive & (product > product.masked_fill(~decisive, torch.inf).amin(1, keepdim=True))
    wrong = is_allowed(errors.left(rows, weights), total).logical_not()
    told = wrong & (decisive.sum(1) <= 32)
    assert bool(told.any())
    assert not bool(is_allowed(errors.left(rows, weights.masked_fill(one_less, 0)), total)[told].any())


def test_a_row_whose_weights_are_all_alike_is_exact():
    weights = torch.full((2, 400), 1 / 400).double()
    errors = LogitErrors(torch.tensor([1e-3, 1e-2]).double(), torch.zeros(2).double(), torch.ones(400).double())
    decisive, left = errors.decisive(torch.arange(2), weights, torch.zeros(2, 2).double(), torch.ones(2).double())
    assert bool(decisive.all())
    assert bool((left == 0).all())


def likely_images(n, sigma):
    """Images of which, at such noise, some are likely to each noisy one and most matter a little; (n, 768) uint8."""
    coarse = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    fine = torch.nn.functional.interpolate(coarse.repeat(1, 3, 1, 1), size=16, mode="bilinear").flatten(1)
    images = fine.mul(255).to(torch.uint8)
    clean = images[:40].double() / 127.5 - 1
    return images, (clean + sigma * normal(40, 768, seed=6)).float()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("chunk_size", [None, 150])
@pytest.mark.parametrize("level", [0.3, 2.0, 3.0, 4.0, 8.0])
def test_chunks_together_stay_within_the_limit(level, chunk_size, dtype):
    images, noisy = likely_images(2000, level)
    exact = images.double() / 127.5 - 1
    reference = images if dtype == torch.uint8 else exact.float()
    sigma = torch.full((40,), level)
    values = exact if dtype == torch.uint8 else reference
    expected = posterior(noisy, values, torch.ones(40), sigma)[1]
    found = posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, arithmetic="float32", chunk_size=chunk_size).mean
    assert worst(found, expected) < 1e-5


def test_the_account_is_kept_over_chunks():
    """Rounded weights of all chunks together: what is left of one leaves less room to the next."""
    images, noisy = likely_images(2000, 3.0)
    alpha, sigma = torch.ones(40).double(), torch.full((40,), 3.0).double()
    queries = SparseQueries(noisy.double(), alpha, sigma, True, "float32", norms_are_known=False)
    state = PosteriorState.empty(40, 768, noisy.device)
    wrong = torch.zeros(40)
    for some in images.split(250):
        read = queries.read(some)
        queries.add(state, read, queries.norms(read), None)
        left = (queries._left - state.maximum[:, None]).exp()
        wrong = left[:, 1] / state.normalizer
        assert bool(is_allowed(left, state.normalizer * (1 + 1e-3)).all())
    assert float(wrong.max()) > LIMIT / 2
    assert math.isfinite(float(wrong.sum()))


@pytest.mark.parametrize(("arithmetic", "sigma"), [("int8", 0.01), ("int8", 0.1), ("float32", 0.1), ("float32", 1.0)])
def test_masked_references_stay_out_where_many_are_computed_again(arithmetic, sigma):
    """More than are told one by one, all near each other: those that are masked are as likely."""
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(20, 236, (1, 3072), generator=draws).repeat(400, 1)
    changed = max(1, int((sigma * 127.5) ** 2 / 4))
    for row in range(400):
        pixels[row, torch.randint(0, 3072, (changed,), generator=draws)] += 1 if row < 200 else 4
    pixels = pixels.to(torch.uint8)
    exact = pixels.double() / 127.5 - 1
    mask = torch.ones(3, 400, dtype=torch.bool)
    mask[:2, 200:] = False
    level = torch.full((3,), sigma)
    noisy = (exact[:3] + sigma * normal(3, 3072, seed=1)).float()
    weights, expected = posterior(noisy, exact, torch.ones(3), level, mask)
    found = posterior_mean(noisy, pixels, alpha=1.0, sigma=level, mask=mask, arithmetic=arithmetic)
    assert worst(found.mean, expected) < 1e-5
    torch.testing.assert_close(found.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dimension", "offset", "sigma"), [(64, 10, 0.002), (3072, 10, 0.002), (3072, 100, 0.05)])
def test_references_that_only_rounded_norms_tell_apart(dimension, offset, sigma):
    """Of a noisy image that is black, all references are as likely: they are one image, with its pixels in another order."""
    draws = torch.Generator().manual_seed(1)
    values = torch.rand(dimension, generator=draws) * 2 - 1 + offset
    reference = torch.stack([values[torch.randperm(dimension, generator=draws)] for _ in range(40)])
    found = posterior_mean(torch.zeros(1, dimension), reference, alpha=1.0, sigma=sigma, arithmetic="float32")
    assert worst(found.mean, reference.double().mean(0, keepdim=True)) < 1e-5 * offset
    assert found.effective_sample_size.item() == pytest.approx(40, rel=1e-3)


@pytest.mark.parametrize("copies", [1, 50])
@pytest.mark.parametrize("dimension", [3, 64, 3072])
def test_what_8_bit_products_round_off_all_in_one_direction(dimension, copies):
    """Pixels just below half a unit of the last digit, and two images that differ in all of them."""
    pixels = torch.full((2 * copies, dimension), 255, dtype=torch.uint8)
    pixels[copies:, 1:] = 0
    unit = 0.3 / (127 * (256**4 - 1) / 255)
    noisy = torch.full((1, dimension), 0.499 * unit, dtype=torch.float64)
    noisy[0, 0] = 0.3
    exact = pixels.double() / 127.5 - 1
    for part in torch.linspace(0.5, 3, 26).tolist():
        sigma = (unit / 2 * dimension / (part * 1e-5)) ** 0.5
        expected = posterior(noisy, exact, torch.ones(1), torch.tensor([sigma], dtype=torch.float64))[1]
        found = posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma, arithmetic="int8")
        assert worst(found.mean, expected) <= 1.05e-5, part


@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("dimension", [1024, 3072, 16384])
def test_images_without_noise(dimension, copies):
    """Half-way between two groups of constant images, whose sums grow all along: at any sigma both are as likely."""
    for middle, half in ((0.05, 0.9), (0.14, 0.49), (0.3, 0.66), (0.6, 0.4)):
        values = torch.tensor([middle + half, middle - half])
        reference = values.repeat_interleave(copies)[:, None].repeat(1, dimension)
        noisy = reference.double().mean(0, keepdim=True)
        for sigma in torch.logspace(-1.5, 1.9, 25).tolist():
            found = posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, arithmetic="float32")
            assert worst(found.mean, noisy) < 1e-5, (middle, sigma)
