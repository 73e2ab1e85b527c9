"""The arithmetic of accelerators, in the shapes and with the padding that these need, computed on the CPU."""

import numpy as np
import pytest
import torch

from oracles import SIGMAS, images, normal, posterior, rows, worst
from stf_diffusers.integer_products import digits_of, fixed_point, full_scale, integer_product, powers_of_256
from stf_diffusers.posterior import posterior_state

ARITHMETICS = ["int8", "float64"]
DTYPES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]


def dense_mean(noisy, reference, alpha, sigma, arithmetic, **more):
    """As `posterior_mean` has it on an accelerator."""
    state = posterior_state(
        noisy.flatten(1), reference, alpha.double(), sigma.double(), arithmetic=arithmetic, dense=True, **more
    )
    return state.result_like(noisy, reference.dtype)


def references(n, *shape, dtype, seed=0):
    """In a dtype, and exactly what they are in float64."""
    if dtype != torch.uint8:
        values = images(n, *shape, seed=seed).to(dtype)
        return values, values.double()
    pixels = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return pixels, pixels.double() / 127.5 - 1


# ---- integers


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("right_count", [1, 4, 6])
@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize(("b", "k", "m"), [(1, 2, 1), (1, 33, 5), (3, 31, 64), (40, 64, 7)])
def test_products_are_those_of_integers(b, k, m, count, right_count, multiple):
    """Against Python's integers, of any length; also those of the largest magnitude."""
    draws = torch.Generator().manual_seed(count)
    largest, right_largest = full_scale(count), 128 if right_count == 1 else full_scale(right_count)
    left = torch.randint(-largest, largest + 1, (b, k), generator=draws)
    right = torch.randint(-right_largest, right_largest, (m, k), generator=draws)
    left[0, :2] = torch.tensor([-largest, largest])
    right[0, :2] = torch.tensor([-right_largest, right_largest - 1])
    parts = right.to(torch.int8) if right_count == 1 else digits_of(right, right_count)
    powers = powers_of_256(count, right_count, left.device)
    assert powers.tolist() == [[256.0 ** (i + j) for j in range(right_count)] for i in range(count)]
    product = integer_product(digits_of(left, count), parts, powers, multiple=multiple)
    exact = [[sum(x * y for x, y in zip(p, q, strict=True)) for q in right.tolist()] for p in left.tolist()]
    bound = k * largest * right_largest * 2.0**-52
    assert worst(product, torch.tensor(exact, dtype=torch.float64)) <= bound


@pytest.mark.parametrize("right_count", [1, 4])
def test_products_in_parts(monkeypatch, right_count):
    """Large results are made a part of the columns at a time."""
    left = torch.randint(-1000, 1000, (3, 50), generator=torch.Generator().manual_seed(0))
    right = torch.randint(-100, 100, (13, 50), generator=torch.Generator().manual_seed(1))
    parts = right.to(torch.int8) if right_count == 1 else digits_of(right)
    powers = powers_of_256(4, right_count, left.device)
    whole = integer_product(digits_of(left), parts, powers)
    monkeypatch.setattr("stf_diffusers.integer_products._MOST_RESULTS", 12 * right_count * 4)
    assert torch.equal(integer_product(digits_of(left), parts, powers, multiple=32), whole)
    assert torch.equal(whole, (left @ right.T).double())


def test_fixed_point():
    """24-bit numbers are held exactly down to 2^-22 of the largest in a row, whatever the size of that."""
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    values[1] *= 1e30
    values[2] *= 1e-20
    values[3] = 0
    values[4, 0] = 1e-38  # beside ordinary numbers
    digits, scale = fixed_point(values)
    integers = sum(part.double() * 256.0**power for power, part in enumerate(digits.view(6, 5, 40)))
    held = integers * scale[:, None]
    largest = values.double().abs().amax(1, keepdim=True)
    assert ((held - values.double()).abs() <= largest * 2.0**-45).all()
    assert held[values.double().abs() >= largest * 2.0**-22].equal(
        values.double()[values.double().abs() >= largest * 2.0**-22]
    )


# ---- posterior means


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1.0, 0.02])
@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_masks_chunks_and_duplicates(dtype, alpha, chunk_size, arithmetic):
    """Sources with copies that differ in one bit of one value; some chunks have nothing for some rows; sizes are odd."""
    reference, _ = references(60, 3, 9, 7, dtype=dtype)
    for row in range(10):
        reference[20 + 4 * row : 24 + 4 * row] = reference[row]
        bits = reference.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
        bits[22 + 4 * row : 24 + 4 * row, 0, row % 9, 0] ^= 1
    exact = reference.double() / 127.5 - 1 if dtype == torch.uint8 else reference.double()
    sigma, alphas = SIGMAS, torch.full_like(SIGMAS, alpha)
    noisy = (alpha * exact[:10] + rows(sigma, exact) * normal(10, 3, 9, 7, seed=1)).float()
    mask = torch.rand(10, 60, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[torch.arange(10), torch.arange(10)] = True
    found = dense_mean(noisy, reference, alphas, sigma, arithmetic, mask=mask, chunk_size=chunk_size)
    weights, expected = posterior(noisy, exact, alphas, sigma, mask)
    assert worst(found.mean, expected) < 1e-5
    torch.testing.assert_close(found.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dimension", [2, 48, 3072])
def test_ties_between_distant_references(dimension, dtype, arithmetic):
    """A query half way between two far ones at low noise: its last bits decide, and theirs."""
    reference, exact = references(6, dimension, dtype=dtype)
    sigma = torch.tensor([0.002, 0.02, 0.2])
    noisy = ((exact[:3] + exact[3:]) / 2).float()
    expected = posterior(noisy, exact, torch.ones(3), sigma)[1]
    assert worst(dense_mean(noisy, reference, torch.ones(3), sigma, arithmetic).mean, expected) < 1e-5


@pytest.mark.parametrize("arithmetic", ["float64", None])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dimension", [49_152, 2**17 - 1, 500_000])
def test_ties_of_large_images(dimension, dtype, arithmetic):
    """Half way between a bright image and a dark one, in longer floating point: long sums decide; None: as on this CPU."""
    draws = torch.Generator().manual_seed(dimension)
    for sigma in (0.002, 0.005, 0.01):
        pair = torch.stack([torch.randint(low, low + 64, (dimension,), generator=draws) for low in (192, 0)])
        reference = pair.to(torch.uint8) if dtype == torch.uint8 else (pair / 127.5 - 1).float()
        exact = (
            (pair.double() / 127.5 - 1 if dtype == torch.uint8 else reference.double()).numpy().astype(np.longdouble)
        )
        noisy = torch.from_numpy(((exact[0] + exact[1]) / 2).astype(np.float32))
        query = noisy.numpy().astype(np.longdouble)
        gap = (((query - exact[1]) ** 2).sum() - ((query - exact[0]) ** 2).sum()) / (
            2 * np.longdouble(np.float64(sigma)) ** 2
        )
        weight = 1 / (1 + np.exp(-gap))
        expected = torch.from_numpy((weight * exact[0] + (1 - weight) * exact[1]).astype(np.float64))
        level = torch.tensor([sigma], dtype=torch.float64)
        more = {"dense": bool(arithmetic), "arithmetic": arithmetic}
        found = posterior_state(noisy[None], reference, torch.ones_like(level), level, **more)
        assert worst(found.result(torch.float64, dtype == torch.uint8).mean[0], expected) < 1e-5


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("batch", "n", "dimension"), [(1, 1, 2), (1, 2, 3), (5, 33, 2), (3, 40, 2**17 - 1), (1, 3000, 31)]
)
def test_odd_sizes(batch, n, dimension, dtype, arithmetic):
    reference, exact = references(n, dimension, dtype=dtype)
    sigma = torch.logspace(-2, 2, batch)
    noisy = (exact[:1] + rows(sigma, exact) * normal(batch, dimension)).float()
    expected = posterior(noisy, exact, torch.ones(batch), sigma)[1]
    assert worst(dense_mean(noisy, reference, torch.ones(batch), sigma, arithmetic).mean, expected) < 1e-5


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_many_like_references(dtype, arithmetic):
    """The mean of 30,000 equal images is that image."""
    pixel = torch.tensor([[230]], dtype=torch.uint8).expand(30_000, 64)
    reference = pixel if dtype == torch.uint8 else pixel.float() / 127.5 - 1
    noisy = 230 / 127.5 - 1 + normal(3, 64)
    found = dense_mean(noisy, reference, torch.ones(3), torch.tensor([1.0, 0.002, 5.0]), arithmetic).mean
    assert (found - (230 / 127.5 - 1)).abs().max() < 4e-6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_many_small_weights(dtype):
    """One near image and 65,535 others of weight about 2^-32: together they matter."""
    pixels = torch.zeros(65_536, 64, dtype=torch.uint8)
    pixels[1:, 0] = 128
    reference = pixels if dtype == torch.uint8 else pixels.float() / 127.5 - 1
    exact = pixels[[0, 1]].double() / 127.5 - 1
    distance = (exact[1] - exact[0]).square().sum()
    sigma = (distance / (2 * 32.05 * torch.tensor(2.0).log())).sqrt().view(1).float()
    weights = torch.tensor([0.0, -distance / (2 * sigma.double() ** 2)]).double().exp() * torch.tensor([1.0, 65_535.0])
    expected = (weights / weights.sum()) @ exact
    assert worst(dense_mean(exact[:1].float(), reference, torch.ones(1), sigma, "int8").mean[0], expected) < 1e-5


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_references_of_any_scale_beside_an_outlier(scale):
    """Latents have no range; one that is far larger than the rest takes no digits from them."""
    reference = scale * images(50, 40)
    reference[49] *= 1e4
    reference[48] = 0
    sigma = scale * torch.tensor([0.01, 0.1, 0.5, 3.0])
    noisy = reference[:4] + sigma[:, None] * normal(4, 40)
    expected = posterior(noisy, reference, torch.ones(4), sigma)[1]
    found = dense_mean(noisy, reference, torch.ones(4), sigma, "int8").mean
    assert worst(found / scale, expected / scale) < 1e-5


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_seen(arithmetic, wrong):
    """A row is NaN if its image, or a reference that it uses, is not finite; and no other row is."""
    reference = images(10, 5)
    reference[9, 2] = wrong
    noisy = reference[:3].clone()
    noisy[1, 0] = torch.nan
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, 9] = False
    for chunk_size in (4, None):
        found = dense_mean(noisy, reference, torch.ones(3), torch.ones(3), arithmetic, mask=mask, chunk_size=chunk_size)
        assert found.mean.isnan().all(1).tolist() == [False, True, True]
    pixels = torch.zeros(10, 5, dtype=torch.uint8)
    assert dense_mean(noisy, pixels, torch.ones(3), torch.ones(3), arithmetic).mean.isnan().all(1).tolist() == [
        False,
        True,
        False,
    ]
