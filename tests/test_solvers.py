"""Solvers of the probability-flow ODE: reference numbers, closed forms of Gaussians, exact denoisers of a few points."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from exact_networks import ExactNetwork, denoise_gaussian, denoise_points, small_unet
from oracles import GOLDEN, images, normal, worst
from stf_diffusers import (
    EDM,
    VE,
    VP,
    Churn,
    Discretization,
    FlowMatching,
    log_likelihood,
    network_denoiser,
    sample_ode,
    sample_rk45,
)

float64 = torch.float64
PROCESSES = {"edm": EDM(sigma_data=0.6), "ve": VE(), "vp": VP(), "flow": FlowMatching()}
# Extremes of the noise-to-signal ratio that each network knows.
RANGES = {"edm": (0.002, 80.0), "ve": (0.02, 100.0), "vp": (0.01, 150.0), "flow": (0.002, 150.0)}
POINTS = (images(6, 1, 4, 4, seed=3, dtype=float64) > 0).double() * 1.6 - 0.8


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "samplers.npz").items()}


# The samplers of the reference implementation


@pytest.mark.parametrize(
    "name, discretization, method",
    [
        ("edm_heun_5", Discretization.edm(5), "heun"),
        ("edm_heun_18", Discretization.edm(18), "heun"),
        ("edm_heun_40", Discretization.edm(40), "heun"),
        ("edm_euler_18", Discretization.edm(18), "euler"),
        ("edm_heun_18_sigma_max_20", Discretization.edm(18, sigma_max=20.0), "heun"),
        ("ve_heun_18", Discretization.ve(18), "heun"),
        ("ve_euler_18", Discretization.ve(18), "euler"),
        ("vp_heun_18", Discretization.vp(18), "heun"),
        ("vp_euler_18", Discretization.vp(18), "euler"),
    ],
)
def test_golden_samples(golden, name, discretization, method):
    denoise = partial(denoise_points, golden["points"])
    assert worst(sample_ode(denoise, golden["latents"], discretization, method=method), golden[name]) < 1e-9


def test_golden_samples_with_churn(golden):
    result = sample_ode(
        partial(denoise_points, golden["points"]),
        golden["latents"],
        Discretization.edm(18),
        churn=Churn(s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
        step_noise=golden["edm_heun_18_churn_noises"],
    )
    assert worst(result, golden["edm_heun_18_churn"]) < 1e-9


def test_adaptive_solver_agrees_with_golden_samples(golden):
    result = sample_rk45(partial(denoise_points, golden["points"]), golden["latents"])
    assert worst(result.images, golden["edm_heun_40"]) < 1e-5


# Closed forms: data N(0, variance) has x(sigma) = x(sigma_max) sqrt((variance + sigma^2) / (variance + sigma_max^2))

VARIANCE = 0.25


def gaussian(x, sigma):
    return VARIANCE / (VARIANCE + sigma**2) * x


def gaussian_path(x, sigma_from, sigma_to):
    return x * ((VARIANCE + sigma_to**2) / (VARIANCE + sigma_from**2)) ** 0.5


@pytest.mark.parametrize("row, start", [("edm", 2.0), ("ve", 0.25), ("vp", 0.7)])
@pytest.mark.parametrize("method, order, tolerance", [("euler", 1.0, 0.05), ("heun", 2.0, 0.1)])
def test_convergence_order(row, start, method, order, tolerance):
    """Steps of equal length down to zero, along the three curves of Table 1."""
    latents, steps, errors = normal(32, 1, dtype=float64), [64, 128, 256, 512], []
    for num_steps in steps:
        times = torch.linspace(start, 0, num_steps + 1, dtype=float64)
        discretization = dataclasses.replace(getattr(Discretization, row)(num_steps), times=times)
        sigma = discretization.sigma(times[0])
        exact = gaussian_path(sigma * latents, sigma, 0)
        errors.append((sample_ode(gaussian, latents, discretization, method=method) - exact).norm().item())
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert abs(-slope - order) < tolerance


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
def test_adaptive_solver_meets_its_tolerance(tolerance):
    latents, calls = normal(32, 1, dtype=float64), []

    def denoise(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    result = sample_rk45(denoise, latents, rtol=tolerance, atol=tolerance)
    exact = gaussian(gaussian_path(80 * latents, 80, 0.002), 0.002)
    # The tolerance is that of one step; errors of the few tens of steps may add up.
    assert worst(result.images, exact) < 10 * tolerance
    assert result.evaluations == len(calls) < 300


def test_derivatives_and_inverse_of_every_row():
    for discretization in (Discretization.edm(9), Discretization.ve(9), Discretization.vp(9)):
        t = discretization.times[:-1].clone().requires_grad_()
        for function, derivative in (
            (discretization.sigma, discretization.sigma_derivative),
            (discretization.scale, discretization.scale_derivative),
        ):
            (slope,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)
            torch.testing.assert_close(derivative(t), slope, rtol=1e-10, atol=0)
        torch.testing.assert_close(discretization.time_of(discretization.sigma(t)), t, rtol=1e-10, atol=0)


# Noise


@pytest.mark.parametrize("row", ["edm", "ve", "vp"])
def test_churn_keeps_mean_and_variance(row):
    """Samples of N(0.3, 0.25) with much churn; the solver's own error in the variance is below 1 % at these steps."""
    latents, generator = normal(4000, 4, dtype=float64), torch.Generator().manual_seed(1)
    discretization = getattr(Discretization, row)(200)
    samples = sample_ode(
        lambda x, sigma: 0.3 + gaussian(x - 0.3, sigma), latents, discretization, churn=Churn(80), generator=generator
    )
    count = samples.numel()
    assert abs(samples.mean().item() - 0.3) < 4 * (VARIANCE / count) ** 0.5
    assert abs(samples.var().item() / VARIANCE - 1) < 0.01 + 4 * (2 / count) ** 0.5
    # It is noise: the latents no longer decide.
    assert abs(np.corrcoef(samples.flatten(), latents.flatten())[0, 1]) < 0.1


def test_no_churn_outside_its_range():
    latents = normal(3, 4, dtype=float64)
    plain = sample_ode(gaussian, latents, Discretization.edm(6))
    assert torch.equal(sample_ode(gaussian, latents, Discretization.edm(6), churn=Churn(5, s_min=81)), plain)
    assert not torch.equal(sample_ode(gaussian, latents, Discretization.edm(6), churn=Churn(5)), plain)
    assert Churn(100).gamma(1.0, 10) == math.sqrt(2) - 1
    assert Churn(1).gamma(1.0, 10) == 0.1


# Networks


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("ratio", [0.02, 0.7, 100.0])
def test_network_as_denoiser(name, ratio):
    x = POINTS.mean() + (1 + ratio) * normal(6, 1, 4, 4, dtype=float64)
    denoise = network_denoiser(ExactNetwork(name, POINTS), PROCESSES[name])
    expected = denoise_points(POINTS, x, ratio)
    assert worst(denoise(x, torch.tensor(ratio, dtype=float64)), expected) < 1e-9
    # A noise level for each row.
    levels = torch.linspace(0.5 * ratio, ratio, 6, dtype=float64)
    assert worst(denoise(x, levels)[-1:], expected[-1:]) < 1e-9


@pytest.mark.parametrize("name", PROCESSES)
def test_time_of_inverts_the_noise_level(name):
    ratio = torch.logspace(-4, 2, 50, dtype=float64)
    t = PROCESSES[name].time_of(ratio)
    torch.testing.assert_close(PROCESSES[name].sigma(t) / PROCESSES[name].alpha(t), ratio, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["edm", "vp"])
def test_guidance_extrapolates_from_the_null_class(name):
    x, sigma = normal(5, 1, 4, 4, dtype=float64), torch.tensor(1.5, dtype=float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    owner = torch.arange(6) % 3 == labels[:, None]
    conditional, null = denoise_points(POINTS, x, 1.5, owner), denoise_points(POINTS, x, 1.5)
    network = ExactNetwork(name, POINTS, classes=3)
    make = partial(network_denoiser, network, PROCESSES[name], class_labels=labels, null_label=3)
    assert worst(make()(x, sigma), conditional) < 1e-9
    assert worst(make(guidance_scale=2.5)(x, sigma), null + 2.5 * (conditional - null)) < 1e-9
    assert network.evaluations == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_runs_in_its_own_dtype(dtype):
    network = small_unet(size=8).to(dtype)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    denoised = network_denoiser(network, VE())(normal(2, 1, 8, 8, dtype=float64), torch.tensor(2.0, dtype=float64))
    assert [tensor.dtype for tensor in seen] == [dtype, torch.float32]
    assert denoised.dtype == float64 and denoised.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("churn", [None, Churn(20)])
@pytest.mark.parametrize("dtype, tolerance", [(float64, 1e-12), (torch.float32, 1e-5)])
def test_an_image_does_not_depend_on_its_batch(churn, dtype, tolerance):
    denoise, latents = network_denoiser(small_unet(size=8).to(dtype), EDM()), normal(5, 1, 8, 8, dtype=float64)

    def sample(rows):
        generators = [torch.Generator().manual_seed(k) for k in rows]
        return sample_ode(denoise, latents[rows], Discretization.edm(6), churn=churn, generator=generators)

    whole = sample([0, 1, 2, 3, 4])
    assert worst(sample([2]), whole[2:3]) < tolerance
    assert worst(sample([4, 1]), whole[[4, 1]]) < tolerance


# Exact denoisers of a few points: every sampler gives the points, each as often as the others

SAMPLERS = {
    "heun": lambda denoise, latents, low, high: sample_ode(denoise, latents, Discretization.edm(40, low, high)),
    "euler": lambda denoise, latents, low, high: sample_ode(
        denoise, latents, Discretization.edm(80, low, high), method="euler"
    ),
    "churn": lambda denoise, latents, low, high: sample_ode(
        denoise, latents, Discretization.edm(40, low, high), churn=Churn(30, 0.05, 50, 1.003), generator=seeded(5)
    ),
    "ve": lambda denoise, latents, low, high: sample_ode(denoise, latents, Discretization.ve(40, low, high)),
    "vp": lambda denoise, latents, low, high: sample_ode(denoise, latents, Discretization.vp(200)),
    "rk45": lambda denoise, latents, low, high: (
        sample_rk45(denoise, latents, sigma_min=low, sigma_max=high, rtol=1e-4, atol=1e-4).images
    ),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_the_points_with_equal_frequencies(name, sampler):
    denoise = network_denoiser(ExactNetwork(name, POINTS), PROCESSES[name])
    samples = SAMPLERS[sampler](denoise, normal(600, 1, 4, 4, seed=7, dtype=float64), *RANGES[name])
    distance, which = torch.cdist(samples.flatten(1), POINTS.flatten(1)).min(1)
    # The last step of VE's and VP's own curves, Euler's along sigma ~ sqrt(t), leaves half of the smallest noise.
    assert distance.max() < (0.1 if sampler in ("ve", "vp") else 1e-3)
    # Chi-square against equal frequencies: a right sampler fails one time in 10^4.
    assert stats.chisquare(torch.bincount(which, minlength=6).numpy()).pvalue > 1e-4


# Likelihood


def correlated_gaussian(dimension):
    factor = 0.3 * normal(dimension, dimension, seed=2, dtype=float64)
    covariance = factor @ factor.T / dimension + 0.01 * torch.eye(dimension, dtype=float64)
    return torch.linspace(-0.5, 0.5, dimension, dtype=float64), covariance


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_log_likelihood_of_a_gaussian(divergence):
    """Within 0.01 bits per dimension of the closed form; Hutchinson's as the mean over 20,000 probes."""
    dimension, repeats = 12, 20_000
    mean, covariance = correlated_gaussian(dimension)
    law = torch.distributions.MultivariateNormal(mean, covariance)
    x = (mean + normal(3, dimension, seed=4, dtype=float64) @ torch.linalg.cholesky(covariance).T).reshape(3, 1, 3, 4)
    if divergence == "hutchinson":
        x = x[:1].expand(repeats, -1, -1, -1)
    result = log_likelihood(
        partial(denoise_gaussian, mean, covariance), x, divergence=divergence, generator=seeded(1), sigma_min=1e-3
    )
    expected = -law.log_prob(x.flatten(1)) / (dimension * math.log(2)) + math.log2(127.5)
    error = result.bits_per_dimension - expected
    if divergence == "hutchinson":
        assert error.std() > 0
        # The probes themselves scatter: 0.01 must be several standard errors.
        assert error.std() / repeats**0.5 < 0.0025
        error = error.mean()
    assert error.abs().max() < 0.01
    torch.testing.assert_close(
        result.bits_per_dimension, -result.nats / (dimension * math.log(2)) + math.log2(127.5), rtol=1e-12, atol=0
    )


def test_encoding_and_sampling_are_inverse():
    """The latents of an image lead back to it."""
    mean, covariance = correlated_gaussian(12)
    denoise = partial(denoise_gaussian, mean, covariance)
    x = (mean + 0.1 * normal(2, 12, dtype=float64)).reshape(2, 1, 3, 4)
    latents = log_likelihood(denoise, x, generator=seeded(0), rtol=1e-8, atol=1e-8).latents
    again = sample_rk45(denoise, latents, rtol=1e-8, atol=1e-8).images
    assert worst(again, denoise(x, 0.002)) < 1e-6


def test_likelihood_of_a_network_is_per_image():
    denoise = network_denoiser(small_unet(size=8), EDM())
    x = images(2, 1, 8, 8)
    generators = [seeded(k) for k in range(2)]
    both = log_likelihood(denoise, x, generator=generators, rtol=1e-3, atol=1e-3)
    one = log_likelihood(denoise, x[1:], generator=[seeded(1)], rtol=1e-3, atol=1e-3)
    assert both.nats.shape == (2,) and both.latents.shape == x.shape
    assert worst(both.bits_per_dimension[1:], one.bits_per_dimension) < 0.05


# Errors


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: Discretization.edm(0), "at least one step"),
        (lambda: Discretization.ve(5, sigma_min=2.0, sigma_max=1.0), "below the largest"),
        (lambda: Discretization.vp(5, epsilon_s=0.0), "must be positive"),
        (lambda: Churn(-1), "must not be negative"),
        (lambda: Churn(1, s_min=2, s_max=1), "s_min must not be above"),
        (lambda: sample_ode(gaussian, torch.zeros(2, 1), Discretization.edm(3), method="rk4"), "one of euler, heun"),
        (
            lambda: sample_ode(gaussian, torch.zeros(2, 1), Discretization.edm(3), generator=[seeded(0)]),
            "1 generators for 2 images",
        ),
        (lambda: sample_rk45(gaussian, torch.zeros(2, 1), sigma_min=0.0), "must be positive"),
        (lambda: log_likelihood(gaussian, torch.zeros(2, 1), divergence="skilling"), "'hutchinson' or 'exact'"),
        (lambda: log_likelihood(gaussian, torch.zeros(2, 1), generator=[seeded(0)]), "1 generators for 2 images"),
        (lambda: network_denoiser(small_unet(size=8), EDM(), guidance_scale=2.0), "needs class_labels and null_label"),
    ],
)
def test_errors_say_the_fix(call, match):
    with pytest.raises(ValueError, match=match):
        call()


LIKELIHOOD_OF = {
    # uint8 is pixels everywhere else; read as values 0 to 255 they had a likelihood.
    "pixels": (torch.zeros(2, 1, dtype=torch.uint8), TypeError, r"got torch\.uint8\. Pass .*/ 127\.5 - 1"),
    "integers": (torch.zeros(2, 1, dtype=torch.int64), TypeError, r"got torch\.int64"),
    "no images": (torch.zeros(0, 1), ValueError, r"one image at least; got \(0, 1\)"),
    "a number": (torch.tensor(0.5), ValueError, r"one image at least; got \(\)"),
}


@pytest.mark.parametrize("case", LIKELIHOOD_OF)
def test_images_that_have_no_likelihood(case):
    images, error, match = LIKELIHOOD_OF[case]
    with pytest.raises(error, match=match):
        log_likelihood(gaussian, images)


def test_a_likelihood_needs_gradients():
    x = normal(2, 1)
    with torch.no_grad():
        expected = log_likelihood(gaussian, x).nats
    with torch.inference_mode():
        made_there = x.clone()
        with pytest.raises(RuntimeError, match=r"takes gradients.*torch\.no_grad\(\)"):
            log_likelihood(gaussian, x)
    assert torch.equal(log_likelihood(gaussian, made_there).nats, expected)


def test_labels_must_fit_the_batch():
    denoise = network_denoiser(ExactNetwork("ve", POINTS, 3), VE(), class_labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 class_labels for 3 images"):
        denoise(torch.zeros(3, 1, 4, 4, dtype=float64), torch.tensor(1.0))


def test_a_network_that_gives_nan_is_an_error():
    def rough(x, sigma):
        return gaussian(x, sigma) * float("nan")

    with pytest.raises(RuntimeError, match="not finite at sigma = 80"):
        sample_rk45(rough, normal(2, 1, dtype=float64))


def test_a_tolerance_out_of_reach_is_an_error():
    def singular(x, sigma):
        return x + 1 / (sigma - 10) ** 2

    with pytest.raises(RuntimeError, match=r"stopped at angle 1\.47.*Loosen rtol"):
        sample_rk45(singular, normal(2, 1, dtype=float64))


def test_one_step_is_the_denoised_noise():
    latents = normal(2, 3, dtype=float64)
    assert worst(sample_ode(gaussian, latents, Discretization.edm(1)), gaussian(80 * latents, 80)) < 1e-12
