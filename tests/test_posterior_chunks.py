"""The posterior mean depends on the set alone: not on chunks, order, arithmetic or grouping."""

import pytest
import torch

from oracles import SIGMAS, images, normal, posterior, problem, rows, worst
from stf_diffusers import posterior_mean
from stf_diffusers.posterior import PosteriorState

# ---- the result depends on the set alone


@pytest.mark.parametrize("chunk_size", [1, 7, 49, 50, 10_000])
def test_chunks_do_not_matter(chunk_size):
    noisy, reference, alpha, sigma = problem()
    whole = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, chunk_size=50)
    chunked = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, chunk_size=chunk_size)
    assert worst(chunked.mean, whole.mean) < 1e-6
    torch.testing.assert_close(chunked.effective_sample_size, whole.effective_sample_size, rtol=1e-6, atol=0)


def test_default_chunks():
    """Without a chunk size, images of 2^21 pixels are read one at a time."""
    noisy, reference, alpha, sigma = problem(n=6, shape=(2**21,), sigmas=torch.tensor([1.0, 800.0, 3000.0]))
    expected = posterior(noisy, reference, alpha, sigma)[1]
    assert worst(posterior_mean(noisy, reference, alpha=alpha, sigma=sigma).mean, expected) < 1e-5


@pytest.mark.parametrize("arithmetic", ["int8", "float32", "float64"])
@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("alpha", [1.0, 0.02])
@pytest.mark.parametrize("kind", ["uniform", "black and white", "nearly constant"])
def test_pixels(kind, alpha, chunk_size, arithmetic):
    """uint8 references in both arithmetics, with masks and rows that some chunks have nothing for."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 9, 7), generator=generator, dtype=torch.uint8)
    if kind == "black and white":
        pixels = (pixels > 127).to(torch.uint8) * 255
    if kind == "nearly constant":
        pixels = 255 - (pixels > 250).to(torch.uint8)
    exact = pixels.double() / 127.5 - 1
    sigma, alphas = SIGMAS, torch.full_like(SIGMAS, alpha)
    noisy = (alpha * exact[: len(sigma)] + rows(sigma, exact) * normal(len(sigma), 3, 9, 7, seed=1)).float()
    mask = torch.rand(len(sigma), 60, generator=generator) < 0.7
    mask[torch.arange(len(sigma)), torch.arange(len(sigma))] = True
    result = posterior_mean(
        noisy, pixels, alpha=alphas, sigma=sigma, mask=mask, chunk_size=chunk_size, arithmetic=arithmetic
    )
    weights, expected = posterior(noisy, exact, alphas, sigma, mask)
    assert worst(result.mean, expected) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)
    alone = posterior_mean(noisy[:1], pixels[:1], alpha=alpha, sigma=sigma[:1], arithmetic=arithmetic)
    assert torch.equal(alone.mean, pixels[:1].float() / 127.5 - 1), "one reference: that image, bit for bit"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_many_like_references(batch, dtype):
    """The mean of 30,000 equal images is that image, also in a batch with a single row that all of them matter to."""
    pixel = torch.tensor([[230]], dtype=torch.uint8).expand(30_000, 64)
    reference = pixel if dtype == torch.uint8 else (pixel.float() / 127.5 - 1)
    exact = 230 / 127.5 - 1
    sigma = torch.ones(batch)
    sigma[1:-1] = 0.002
    noisy = exact + sigma[:, None] * normal(batch, 64)
    for arithmetic in (None, "float32", "float64"):
        result = posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, arithmetic=arithmetic)
        assert (result.mean - exact).abs().max() < 4e-6


def test_ties_between_distant_pixels():
    """A query half way between two far images at low noise: its last bits decide."""
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exact = pixels.double() / 127.5 - 1
    sigma = torch.full((3,), 0.002)
    noisy = ((exact[:3] + exact[3:]) / 2).float()
    expected = posterior(noisy, exact, torch.ones(3), sigma)[1]
    for chunk_size in (1, None):
        assert worst(posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma, chunk_size=chunk_size).mean, expected) < 1e-5


def test_chunks_that_integers_have_no_room_for():
    """32-bit sums of more than 2^17 products wrap, and rounding of weights adds up before."""
    pixels = torch.zeros(300_000, 4, dtype=torch.uint8)
    for chunk_size in (131_000, 300_000):
        found = posterior_mean(
            -torch.ones(2, 4), pixels, alpha=1.0, sigma=1.0, chunk_size=chunk_size, arithmetic="int8"
        )
        assert (found.mean + 1).abs().max() < 4e-6


@pytest.mark.parametrize("arithmetic", ["int8", "float32", "float64"])
@pytest.mark.parametrize("bits", [24, 32.05, 40])
def test_many_small_weights(bits, arithmetic):
    """One near image and 65,535 others of small weights, down to the unit of integers and below: together they matter."""
    pixels = torch.zeros(65_536, 64, dtype=torch.uint8)
    pixels[1:, 0] = 128
    exact = pixels[[0, 1]].double() / 127.5 - 1
    distance = (exact[1] - exact[0]).square().sum()
    sigma = (distance / (2 * bits * torch.tensor(2.0).log())).sqrt().view(1).float()
    noisy = exact[:1].float()
    weights = torch.tensor([0.0, -distance / (2 * sigma.double() ** 2)]).double().exp() * torch.tensor([1.0, 65_535.0])
    expected = (weights / weights.sum()) @ exact
    for batch, chunk_size in ((1, None), (1, 65_536), (5, 1000), (32, None)):
        rows = noisy.expand(batch, -1)
        found = posterior_mean(rows, pixels, alpha=1.0, sigma=sigma[0], chunk_size=chunk_size, arithmetic=arithmetic)
        assert worst(found.mean, expected.expand(batch, -1)) < 1e-5


def test_a_reference_that_is_not_a_number_is_not_passed_over():
    reference = images(10, 3)
    reference[9] = torch.nan
    for chunk_size in (5, None):
        assert posterior_mean(reference[:2], reference, alpha=1.0, sigma=1.0, chunk_size=chunk_size).mean.isnan().all()


@pytest.mark.parametrize("sigma", [0.1, 100.0])
@pytest.mark.parametrize("n", [1, 2, 17, 18, 19, 36, 40])
def test_slivers_of_pixels(n, sigma):
    """Chunks and batches of one, few or many references that matter, at the bounds between them."""
    pixels = torch.randint(0, 256, (n, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exact = pixels.double() / 127.5 - 1
    for batch in {1, min(2, n), n}:
        level = torch.full((batch,), sigma)
        noisy = (exact[:batch] + sigma * normal(batch, 7)).float()
        expected = posterior(noisy, exact, torch.ones(batch), level)[1]
        for chunk_size in (1, 17, 18, None):
            result = posterior_mean(noisy, pixels, alpha=1.0, sigma=level, chunk_size=chunk_size, arithmetic="int8")
            assert worst(result.mean, expected) < 1e-5


@pytest.mark.parametrize("dimension", [1, 511, 513, 2**17 + 5])
def test_pixels_of_any_number(dimension):
    """More than 2^17 pixels would overflow 32-bit sums of 8-bit products: float64 takes over."""
    pixels = (torch.rand(5, dimension, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8) * 255
    pixels[3], pixels[4] = 0, 255
    exact = pixels.double() / 127.5 - 1
    sigma = torch.tensor([0.5, 50.0, 5000.0, 0.5, 0.5])
    noisy = (exact + rows(sigma, exact) * normal(5, dimension)).float()
    expected = posterior(noisy, exact, torch.ones(5), sigma)[1]
    assert worst(posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma).mean, expected) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter(seed):
    noisy, reference, alpha, sigma = problem()
    permutation = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    first = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma)
    second = posterior_mean(noisy, reference[permutation], alpha=alpha, sigma=sigma, chunk_size=13)
    assert worst(first.mean, second.mean) < 1e-6


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_mask(chunk_size):
    """Masked references have weight 0, also where whole chunks are masked: the first, the last, all but one."""
    noisy, reference, alpha, sigma = problem()
    mask = torch.rand(10, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, :8], mask[1, -12:], mask[2], mask[3] = False, False, False, True
    mask[2, 27] = True
    mask[0, 20] = True
    result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, mask=mask, chunk_size=chunk_size)
    weights, expected = posterior(noisy, reference, alpha, sigma, mask)
    assert worst(result.mean, expected) < 1e-5
    assert torch.equal(result.mean[2], reference[27]) and result.effective_sample_size[2] == 1
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_states_merge_in_any_grouping(seed):
    """(max, normaliser, squares, sum) of random parts, merged along a random tree, is the whole softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 12, generator=generator, dtype=torch.float64) * 300 - 5000
    logits[0, :6] = -torch.inf
    values = torch.randn(12, 5, generator=generator, dtype=torch.float64)

    def state(part):
        maximum = logits[:, part].amax(1)
        weights = (logits[:, part] - maximum[:, None]).exp().nan_to_num(0)  # -inf - -inf: all masked
        return PosteriorState(maximum, weights.sum(1), weights.square().sum(1), weights @ values[part])

    states = [state(part) for part in torch.randperm(12, generator=generator).split([1, 4, 2, 5])]
    states.append(state([0]))  # row 0 masked in it; its other rows count index 0 twice
    while len(states) > 1:
        left, right = torch.randperm(len(states), generator=generator)[:2].tolist()
        merged = states[left].merge(states[right])
        states = [s for i, s in enumerate(states) if i not in (left, right)] + [merged]
    doubled = logits.clone()
    doubled[:, 0] += torch.tensor(2.0).log()
    weights = torch.cat([logits, logits[:, :1]], 1).softmax(1)
    result = states[0].result(torch.float64)
    assert worst(result.mean, doubled.softmax(1) @ values) < 1e-12
    torch.testing.assert_close(result.effective_sample_size, 1 / weights.square().sum(1), rtol=1e-10, atol=0)


def test_inputs_are_not_modified():
    noisy, reference, alpha, sigma = problem()
    mask = torch.ones(10, 50, dtype=torch.bool)
    inputs = (noisy, reference, alpha, sigma, mask)
    copies = [tensor.clone() for tensor in inputs]
    result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, mask=mask, chunk_size=9)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    result.mean.zero_()
    assert torch.equal(reference, copies[1]) and torch.equal(noisy, copies[0])


def test_nothing_is_recorded_for_gradients():
    noisy, reference, alpha, sigma = problem()
    result = posterior_mean(noisy.requires_grad_(), reference.requires_grad_(), alpha=alpha, sigma=sigma)
    assert not result.mean.requires_grad and not result.effective_sample_size.requires_grad
