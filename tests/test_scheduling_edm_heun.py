"""The Heun scheduler: reference numbers through the loop of stock pipelines, configurations, churn, precision."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)

import stf_diffusers.scheduling_edm_heun as module
from exact_networks import denoise_points, small_unet
from oracles import GOLDEN, images, normal, worst
from stf_diffusers import (
    EDM,
    Churn,
    Discretization,
    EDMHeunScheduler,
    SchedulerProcess,
    STFTrainingObjective,
    network_denoiser,
    sample_ode,
)
from stf_diffusers.export import METADATA_KEY, diffusers_pipeline, save_pipeline

float64 = torch.float64
CHURN = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "samplers.npz").items()}


def raw_output(denoise, model_input, timestep, sigma_data=0.5):
    """F of a network whose denoiser is exact: D = c_skip x + c_out F, from the formulas of the paper."""
    sigma = (4 * timestep.double()).exp()
    total = sigma**2 + sigma_data**2
    x = model_input.double() * total.sqrt()
    output = (denoise(x, sigma) - sigma_data**2 / total * x) * total.sqrt() / (sigma * sigma_data)
    return output.to(model_input.dtype)


def sample(scheduler, network, latents, num_steps, generator=None):
    """The loop of Diffusers' pipelines."""
    scheduler.set_timesteps(num_steps)
    x = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        assert output.dtype == latents.dtype
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        assert x.dtype == latents.dtype
    return x


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Reference numbers


@pytest.mark.parametrize("dtype, tolerance", [(float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "name, num_steps, options",
    [
        ("edm_heun_5", 5, {}),
        ("edm_heun_18", 18, {}),
        ("edm_heun_40", 40, {}),
        ("edm_heun_18_sigma_max_20", 18, {"sigma_max": 20.0}),
        ("edm_heun_18_churn", 18, CHURN),
    ],
)
def test_golden_samples(golden, monkeypatch, dtype, tolerance, name, num_steps, options):
    if options is CHURN:
        # Diffusers' source of noise gives that of the reference, from the first step that adds any: 80 and 57.6 are
        # above s_max.
        noises = iter(golden["edm_heun_18_churn_noises"][2:])
        monkeypatch.setattr(module, "randn_tensor", lambda shape, dtype, **_: next(noises).to(dtype))
    network = partial(raw_output, partial(denoise_points, golden["points"]))
    result = sample(EDMHeunScheduler(**options), network, golden["latents"].to(dtype), num_steps)
    assert worst(result, golden[name]) < tolerance


@pytest.mark.parametrize("dtype", [float64, torch.float32])
@pytest.mark.parametrize("options", [{}, CHURN])
def test_stock_pipeline_gives_the_solver_s_images(dtype, options):
    """Diffusers' own pipeline, unchanged, against `sample_ode` from the same seeds, one for each image."""
    pipeline = ConsistencyModelPipeline(unet=small_unet(size=8).to(dtype), scheduler=EDMHeunScheduler(**options))
    pipeline.set_progress_bar_config(disable=True)
    generators = [seeded(k) for k in range(3)]
    result = pipeline(batch_size=3, num_inference_steps=6, generator=generators, output_type="pt").images
    generators = [seeded(k) for k in range(3)]
    latents = torch.cat([torch.randn(1, 1, 8, 8, generator=g, dtype=dtype) for g in generators])
    # The scheduler draws its noise in the network's dtype.
    churn, noises = Churn(**options), []
    for level in Discretization.edm(6).times[:-1].tolist():
        draw = torch.zeros_like(latents)
        if churn.gamma(level, 6) > 0:
            draw = torch.cat([torch.randn(1, 1, 8, 8, generator=g, dtype=dtype) for g in generators])
        noises.append(draw)
    denoise = network_denoiser(pipeline.unet, EDM())
    expected = sample_ode(denoise, latents, Discretization.edm(6), churn=churn, step_noise=torch.stack(noises))
    assert worst(result, (expected / 2 + 0.5).clamp(0, 1)) < (1e-9 if dtype == float64 else 1e-5)


def test_first_step_s_churn_is_folded_into_the_latents():
    """One step is D at the raised noise level, of latents with the variance that the paper's noise would give."""
    scheduler, latents = EDMHeunScheduler(s_churn=0.3, s_noise=1.1, sigma_max=10.0), normal(2, 3, 4, 4, dtype=float64)
    seen = []

    def network(model_input, timestep):
        seen.append((model_input, timestep))
        return raw_output(lambda x, sigma: x / (1 + sigma**2), model_input, timestep)

    result = sample(scheduler, network, latents, 1)
    raised = 10 * 1.3
    x = latents * (10**2 + 1.1**2 * (raised**2 - 10**2)) ** 0.5
    (model_input, timestep), *_ = seen
    assert math.isclose(timestep.item(), math.log(raised) / 4, rel_tol=1e-12)
    assert worst(model_input, x / (raised**2 + 0.25) ** 0.5) < 1e-12
    assert worst(result, x / (1 + raised**2)) < 1e-12
    assert scheduler.init_noise_sigma == pytest.approx(scheduler.sigmas[0].item(), rel=1e-12) == 10


def test_churn_everywhere_keeps_the_variance():
    """Data N(0, 0.25), no limit on churn: the solver's own error is below 1 % at these steps."""
    network = partial(raw_output, lambda x, sigma: 0.25 / (0.25 + sigma**2) * x)
    samples = sample(EDMHeunScheduler(s_churn=60.0), network, normal(4000, 4, dtype=float64), 150, seeded(0))
    assert abs(samples.var().item() / 0.25 - 1) < 0.01 + 4 * (2 / samples.numel()) ** 0.5


def test_an_image_does_not_depend_on_its_batch():
    unet, latents = small_unet(size=8).double(), normal(4, 1, 8, 8, dtype=float64)

    @torch.no_grad()
    def network(model_input, timestep):
        return unet(model_input, timestep).sample

    def run(rows):
        return sample(EDMHeunScheduler(**CHURN), network, latents[rows], 6, [seeded(k) for k in rows])

    whole = run([0, 1, 2, 3])
    assert worst(run([2]), whole[2:3]) < 1e-12
    assert worst(run([3, 0]), whole[[3, 0]]) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 5e-3)])
def test_state_is_float64_between_steps(dtype, tolerance):
    """Rounding of the samples handed back and forth does not add up: one rounding's error after 79 evaluations."""
    points, latents = images(4, 1, 2, 2), normal(6, 1, 2, 2).to(dtype)

    def network(model_input, timestep):
        return raw_output(partial(denoise_points, points), model_input, timestep)

    results = [sample(EDMHeunScheduler(), network, latents.to(kind), 40) for kind in (dtype, float64)]
    assert worst(*results) < tolerance


def test_a_sample_changed_between_steps_is_used():
    """A pipeline that replaces part of the sample (inpainting) continues from what it put there."""
    network = partial(raw_output, lambda x, sigma: 0.25 / (0.25 + sigma**2) * x)

    def run(change):
        scheduler = EDMHeunScheduler()
        scheduler.set_timesteps(6)
        x = normal(2, 3, 4, 4) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            if i == 6:
                x = change(x)
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x

    plain = run(lambda x: x)
    # The flow of a Gaussian is linear.
    assert worst(run(lambda x: 3 * x), 3 * plain) < 1e-6
    assert worst(run(lambda x: x.mul_(3)), 3 * plain) < 1e-6


# Starting in the middle


@pytest.mark.parametrize("by_index", [False, True])
def test_starts_from_a_noised_image(by_index):
    points = images(4, 1, 2, 2, dtype=float64)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    start = 16
    noisy = scheduler.add_noise(points, normal(4, 1, 2, 2, dtype=float64), scheduler.timesteps[start : start + 1])
    x = noisy
    if by_index:
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        output = raw_output(partial(denoise_points, points), scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    assert scheduler.step_index == 35
    times = Discretization.edm(18).times[start // 2 :]
    assert times[0] == pytest.approx(scheduler.sigmas[start].item(), rel=1e-12)
    rest = Discretization.edm(18)
    rest = type(rest)(times, rest.sigma, rest.sigma_derivative, rest.scale, rest.scale_derivative, rest.time_of)
    assert worst(x, sample_ode(partial(denoise_points, points), noisy / times[0], rest)) < 1e-12


# What users of EDMEulerScheduler expect


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
def test_agrees_with_diffusers_euler_scheduler(prediction_type, sigma_schedule):
    theirs = EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction_type, sigma_schedule=sigma_schedule)
    ours = EDMHeunScheduler.from_config(theirs.config)
    assert worst(ours.timesteps, theirs.timesteps) < 1e-6
    assert ((ours.sigmas[:-1] / theirs.sigmas[:-1]) - 1).abs().max() < 1e-5
    x, output = images(3, 1, 4, 4), normal(3, 1, 4, 4)
    for sigma in (0.01, torch.tensor(2.0)):
        assert worst(ours.precondition_inputs(x, sigma), theirs.precondition_inputs(x, sigma)) < 1e-6
        assert worst(ours.precondition_noise(sigma).reshape(1), theirs.precondition_noise(sigma).reshape(1)) < 1e-6
        assert worst(ours.precondition_outputs(x, output, sigma), theirs.precondition_outputs(x, output, sigma)) < 1e-6
    timesteps = theirs.timesteps[[3, 500, 999]]
    assert worst(ours.add_noise(x, output, timesteps), theirs.add_noise(x, output, timesteps)) < 1e-4
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert worst(ours.timesteps[::2], theirs.timesteps) < 1e-6
    assert len(ours.timesteps) == 19 and len(ours.sigmas) == 20 and ours.order == 2


def test_training_with_it_is_training_with_euler():
    x0, noise = images(4, 1, 4, 4), normal(4, 1, 4, 4)
    process = SchedulerProcess(EDMEulerScheduler())
    t = process.timesteps[[0, 300, 600, 1000]]
    objectives = [STFTrainingObjective.from_scheduler(kind()) for kind in (EDMEulerScheduler, EDMHeunScheduler)]
    targets = [objective.target(x0, noise, t, reference=x0) for objective in objectives]
    assert worst(*targets) < 1e-4


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_config_round_trip(kind, recwarn):
    theirs = kind(sigma_min=0.01, sigma_max=50.0, sigma_data=0.7, rho=5.0, sigma_schedule="exponential")
    theirs.register_to_config(**{METADATA_KEY: {"images_seen": 7}})
    ours = EDMHeunScheduler.from_config(theirs.config, s_churn=3.0)
    assert ours.config["s_churn"] == 3 and ours.config["s_max"] is None
    back = kind.from_config(ours.config)
    for name in ("sigma_min", "sigma_max", "sigma_data", "rho", "sigma_schedule", "prediction_type", METADATA_KEY):
        assert ours.config[name] == theirs.config[name] == back.config[name]


def test_save_and_load(tmp_path):
    scheduler = EDMHeunScheduler(sigma_max=50.0, s_churn=2.0, s_max=math.inf)
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    # Standard JSON: no Infinity.
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    loaded = EDMHeunScheduler.from_pretrained(tmp_path)
    for name in ("sigma_min", "sigma_max", "sigma_data", "rho", "s_churn", "s_min", "s_max", "s_noise"):
        assert loaded.config[name] == scheduler.config[name]
    assert loaded.churn == Churn(s_churn=2.0)


def test_reads_the_scheduler_of_a_saved_pipeline(tmp_path):
    save_pipeline(
        diffusers_pipeline(small_unet(size=8), EDM(sigma_data=0.6), sigma_max=40.0, metadata={"steps": 3}), tmp_path
    )
    scheduler = EDMHeunScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (scheduler.config["sigma_data"], scheduler.config["sigma_max"]) == (0.6, 40.0)
    assert scheduler.config[METADATA_KEY]["steps"] == 3


# Errors


@pytest.mark.parametrize(
    "options, match",
    [
        ({"prediction_type": "sample"}, "prediction_type 'epsilon' or 'v_prediction'; got 'sample'"),
        ({"sigma_schedule": "beta"}, "sigma_schedule 'karras' or 'exponential'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type 'zero'"),
        ({"sigma_min": 90.0}, "below the largest"),
        ({"s_churn": -1.0}, "must not be negative"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_min must not be above"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        EDMHeunScheduler(**options)


def test_misuse_is_an_error():
    x, scheduler = torch.zeros(2, 1, 4, 4), EDMHeunScheduler(**CHURN)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="at least one step"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="not an index; got 0"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match=r"timesteps\[::2\]"):
        scheduler.step(x, scheduler.timesteps[5], x)  # with churn no step starts there
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[seeded(0)])
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="start at an even one"):
        scheduler.step(x, scheduler.timesteps[3], x)
    scheduler.set_timesteps(1)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="sampling has ended"):
        scheduler.step(x, scheduler.timesteps[0], x)
