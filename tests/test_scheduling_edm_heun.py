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
from stf_diffusers.sampling_call import default_steps

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


def exact(scheduler, timestep):
    """The timestep in float64, of the level of the sample."""
    level = scheduler.sigmas[scheduler.step_index]
    assert timestep.dtype == torch.float32 and timestep == scheduler.precondition_noise(level).float()
    return level.log() / 4


def sample(scheduler, network, latents, num_steps=None, generator=None, sigmas=None):
    """The loop of Diffusers' pipelines, with the level that a timestep of float32 rounds."""
    scheduler.set_timesteps(num_steps, sigmas=sigmas)
    x = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        # Before the first evaluation, `sigmas` has the level of the latents, without churn.
        output = network(model_input, t if i == 0 and scheduler.churn.s_churn else exact(scheduler, t))
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
    assert math.isclose(timestep.item(), math.log(raised) / 4, rel_tol=1e-7)
    assert worst(model_input, x / (raised**2 + 0.25) ** 0.5) < 1e-12
    assert worst(result, x / (1 + raised**2)) < 1e-6
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


def resumed(scheduler, points, noisy, start):
    """The images of an exact network, from position `start` on."""
    x = noisy
    for t in scheduler.timesteps[start:]:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(
            raw_output(partial(denoise_points, points), model_input, exact(scheduler, t)), t, x, return_dict=False
        )[0]
    assert scheduler.step_index == len(scheduler.timesteps)
    return x


@pytest.mark.parametrize("start", [16, 15])
@pytest.mark.parametrize("by_index", [False, True])
def test_starts_from_a_noised_image(by_index, start):
    """At an odd position the level is that of the next even one, and there is nothing to correct yet."""
    points = images(4, 1, 2, 2, dtype=float64)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    noisy = scheduler.add_noise(points, normal(4, 1, 2, 2, dtype=float64), scheduler.timesteps[start : start + 1])
    if by_index:
        scheduler.set_begin_index(start)
    else:
        start = 16
    x = resumed(scheduler, points, noisy, start)
    rest = Discretization.edm(18)
    times = rest.times[8:]
    assert times[0] == pytest.approx(scheduler.sigmas[start].item(), rel=1e-12)
    rest = type(rest)(times, rest.sigma, rest.sigma_derivative, rest.scale, rest.scale_derivative, rest.time_of)
    assert worst(x, sample_ode(partial(denoise_points, points), noisy / times[0], rest)) < 1e-12


@pytest.mark.parametrize("by_index", [False, True])
def test_churn_is_added_where_sampling_starts_before_it(by_index):
    """With churn an odd position has a timestep of its own: the level before the noise, which is added there."""
    scheduler, x = EDMHeunScheduler(**CHURN), images(2, 1, 4, 4, dtype=float64)
    scheduler.set_timesteps(18)
    level, raised = scheduler.sigmas[15:17]
    assert raised > level
    if by_index:
        scheduler.set_begin_index(15)
    t = scheduler.timesteps[15]
    scheduler.scale_model_input(x, t)
    result = scheduler.step(torch.zeros_like(x), t, x, generator=seeded(0)).prev_sample
    noise = torch.randn(x.shape, generator=seeded(0), dtype=float64)
    assert worst(result, x + CHURN["s_noise"] * (raised**2 - level**2).sqrt() * noise) < 1e-12
    assert scheduler.step_index == 16


def test_a_second_run_does_not_correct_the_first():
    scheduler, x = EDMHeunScheduler(), normal(2, 1, 4, 4)
    scheduler.set_timesteps(6)
    scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    assert torch.equal(scheduler.step(x, scheduler.timesteps[3], x).prev_sample, x)


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


def test_timesteps_are_those_of_diffusers_in_any_form():
    """float32 like those of every scheduler, and found as Python floats, float64, and on their own."""
    theirs, ours = EDMEulerScheduler(), EDMHeunScheduler()
    assert ours.timesteps.dtype == theirs.timesteps.dtype == torch.float32
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        assert scheduler.timesteps.dtype == torch.float32
    x = normal(2, 1, 4, 4)
    for form in (float, lambda t: t, lambda t: t.double(), lambda t: t[None], lambda t: np.float32(t)):
        for place in (0, 8, 18):
            ours.set_timesteps(10)
            t = form(ours.timesteps[place])
            assert ours.index_for_timestep(t) == place
            ours.scale_model_input(x, t)
            ours.step(x, t, x)
            assert ours.step_index == place + 1
    # The level itself, as a script computes it.
    assert ours.index_for_timestep(ours.sigmas[8].log() / 4) == 8
    assert ours.index_for_timestep(ours.timesteps[7]) == 8 and theirs.index_for_timestep(theirs.timesteps[4]) == 4
    assert ours.index_for_timestep(theirs.timesteps[4], theirs.timesteps) == 4


def test_input_is_scaled_before_set_timesteps():
    theirs, ours, x = EDMEulerScheduler(), EDMHeunScheduler(), normal(2, 1, 4, 4)
    t = theirs.timesteps[500]
    assert worst(ours.scale_model_input(x, ours.timesteps[500]), theirs.scale_model_input(x, t)) < 1e-6


@pytest.mark.parametrize("ending", [[], [0.0]])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda levels: torch.tensor(levels, dtype=float64)])
def test_noise_levels_of_the_caller(golden, kind, ending):
    """The same samples as by the configured levels; a 0 at the end changes nothing."""
    levels = Discretization.edm(5).times[:-1].tolist()
    network = partial(raw_output, partial(denoise_points, golden["points"]))
    scheduler = EDMHeunScheduler(sigma_max=3.0)
    result = sample(scheduler, network, golden["latents"].double(), sigmas=kind([*levels, *ending]))
    assert scheduler.num_inference_steps == 5 and scheduler.init_noise_sigma == pytest.approx(80)
    assert worst(result, golden["edm_heun_5"]) < (1e-5 if kind is torch.tensor else 1e-9)


def test_default_number_of_steps_is_the_pipeline_s():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps()
    assert scheduler.num_inference_steps == 18 and len(scheduler.timesteps) == 35
    assert default_steps("heun", None) == 18


def test_generators_may_be_a_tuple():
    network = partial(raw_output, lambda x, sigma: 0.25 / (0.25 + sigma**2) * x)
    as_list, as_tuple = (
        sample(EDMHeunScheduler(**CHURN), network, normal(2, 1, 4, 4), 6, kind(seeded(k) for k in range(2)))
        for kind in (list, tuple)
    )
    assert torch.equal(as_list, as_tuple)


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
