"""Properties of the mathematical core over shapes, dtypes and extremes, searched for counterexamples by hypothesis."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from oracles import posterior, worst
from stf_diffusers import EDM, VE, VP, FlowMatching, ReferenceBank, STFTrainingObjective, posterior_mean
from stf_diffusers.prediction import prediction_coefficients

settings.register_profile("short", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("short")

SIGMA = st.floats(-6, 6).map(lambda power: 10.0**power)
ALPHA = st.one_of(st.just(1.0), st.floats(-4, 0).map(lambda power: 10.0**power))
SHAPES = st.sampled_from([(1,), (7,), (2, 3), (1, 4, 4), (3, 5, 2), (2, 2, 2, 2)])
KINDS = st.sampled_from(["random", "constant", "duplicated", "black and white", "one level apart"])


@st.composite
def references(draw, dtypes=(torch.uint8, torch.float32, torch.float64, torch.bfloat16)):
    """(n, ...) images of every kind that has made trouble."""
    n, shape, kind, dtype = draw(st.integers(1, 24)), draw(SHAPES), draw(KINDS), draw(st.sampled_from(dtypes))
    pixels = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if kind == "constant":
        pixels = pixels.flatten(1)[:, 0].view(n, *[1] * len(shape)).expand(n, *shape).clone()
    if kind == "duplicated":
        pixels = pixels[torch.arange(n) % max(1, n // 3)]
    if kind == "black and white":
        pixels = (pixels > 127) * 255
    if kind == "one level apart":
        pixels = 128 + (pixels > 250).to(torch.int64)
    pixels = pixels.to(torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels.double() / 127.5 - 1).to(dtype)


def exact(images):
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()


def noised(images, alpha, sigma, rows, seed):
    """Noisy images of the first `rows`, as float32 can hold them."""
    clean = exact(images)[torch.arange(rows) % len(images)]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (alpha * clean + sigma * noise).float()


@given(references(), ALPHA, SIGMA, st.integers(1, 6), st.integers(0, 99), st.sampled_from([None, 1, 5]))
def test_mean_is_that_of_float64(images, alpha, sigma, rows, seed, chunk_size):
    """1e-5, as long as the noisy image in float32 says where it came from: sigma above its rounding."""
    noisy = noised(images, alpha, sigma, rows, seed)
    alphas, sigmas = torch.full((rows,), alpha, dtype=torch.float64), torch.full((rows,), sigma, dtype=torch.float64)
    result = posterior_mean(noisy, images, alpha=alphas, sigma=sigmas, chunk_size=chunk_size)
    weights, mean = posterior(noisy, exact(images), alphas, sigmas)
    assert result.mean.isfinite().all() and result.mean.shape == noisy.shape
    low, high = exact(images).amin(0), exact(images).amax(0)
    assert ((result.mean >= low - 1e-6) & (result.mean <= high + 1e-6)).all(), "a mean of references lies among them"
    assert ((result.effective_sample_size > 0.999) & (result.effective_sample_size < len(images) * 1.001)).all()
    if sigma >= 1e-3 * alpha:
        assert worst(result.mean, mean) < 1e-5
        torch.testing.assert_close(
            result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-3, atol=0
        )


@given(references(), ALPHA, SIGMA, st.integers(0, 99), st.randoms(use_true_random=False))
def test_order_and_chunks_change_nothing(images, alpha, sigma, seed, draw):
    noisy = noised(images, alpha, sigma, 3, seed)
    order = list(range(len(images)))
    draw.shuffle(order)
    whole = posterior_mean(noisy, images, alpha=alpha, sigma=sigma).mean
    shuffled = posterior_mean(noisy, images[order], alpha=alpha, sigma=sigma, chunk_size=draw.randint(1, 30)).mean
    assert worst(shuffled, whole) < 2e-6


@given(references(), SIGMA, st.integers(0, 99))
def test_repeating_every_reference_changes_nothing(images, sigma, seed):
    noisy = noised(images, 1.0, sigma, 2, seed)
    once = posterior_mean(noisy, images, alpha=1.0, sigma=sigma)
    twice = posterior_mean(noisy, torch.cat([images, images]), alpha=1.0, sigma=sigma)
    assert worst(twice.mean, once.mean) < 2e-6
    torch.testing.assert_close(twice.effective_sample_size, 2 * once.effective_sample_size, rtol=1e-4, atol=0)


@given(references(dtypes=(torch.uint8, torch.float32)), ALPHA, SIGMA, st.integers(0, 99))
def test_a_bank_is_the_references(images, alpha, sigma, seed):
    noisy = noised(images, alpha, sigma, 3, seed)
    bank = ReferenceBank(images).posterior_mean(noisy, alpha, sigma)
    batch = posterior_mean(noisy, images, alpha=alpha, sigma=sigma)
    assert worst(bank.mean, batch.mean) < 2e-6
    if images.ndim < 3:
        return
    flipped = ReferenceBank(images, augmentation="horizontal_flip").posterior_mean(noisy, alpha, sigma)
    doubled = posterior_mean(noisy, torch.cat([images, images.flip(-1)]), alpha=alpha, sigma=sigma)
    assert worst(flipped.mean, doubled.mean) < 2e-6


@given(
    st.sampled_from([EDM(), VE(), VP(), FlowMatching()]),
    st.sampled_from([None, "epsilon", "sample", "v_prediction", "flow_prediction", "score"]),
    references(dtypes=(torch.uint8, torch.float32)),
    st.integers(0, 99),
)
def test_targets_are_the_table_at_the_posterior_mean(process, prediction_type, images, seed):
    """y = a x0 + b noise at the posterior mean and the noise that goes with it, in float64."""
    rows = min(4, len(images))
    objective = STFTrainingObjective(process, prediction_type)
    generator = torch.Generator().manual_seed(seed)
    batch = objective.perturb(images[:rows], reference=images, generator=generator)
    t = batch.t.double()
    alpha, sigma = process.alpha(t), process.sigma(t)
    a, b = (
        process.output_coefficients(t)
        if prediction_type is None
        else prediction_coefficients(prediction_type, alpha, sigma)
    )

    def per_row(vector):
        return vector.view(-1, *[1] * (images.ndim - 1))

    x0, noise = exact(images[:rows]).float().double(), batch.noise.double()
    mean = batch.posterior_mean.double()
    # The noise that leads from the mean to the same noisy image.
    its_noise = noise + per_row(alpha / sigma) * (x0 - mean)
    expected = per_row(a) * mean + per_row(b) * its_noise
    scale = (per_row(a).abs() + per_row(b).abs() * (1 + per_row(alpha / sigma))).clamp_min(1)
    assert ((batch.target.double() - expected).abs() / scale).max() < 1e-5
