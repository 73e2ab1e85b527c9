"""Few-step sampling of consistency models: closed forms, formulas written out, the same folder in plain Diffusers."""

import math
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from exact_networks import PROCESSES, ExactNetwork, ExactUNet, denoise_points, small_unet
from oracles import images, normal, worst
from stf_diffusers import STFPipeline, network_denoiser
from stf_diffusers.consistency_sampling import intermediate_levels, sample_consistency
from stf_diffusers.export import diffusers_pipeline, save_pipeline
from stf_diffusers.model_card import model_card

float64 = torch.float64
POINTS = (images(6, 1, 4, 4, seed=3, dtype=float64) > 0).double() * 1.6 - 0.8


def seeds(count, first=0):
    return [torch.Generator().manual_seed(seed) for seed in range(first, first + count)]


def pipeline_for(name="edm", channels=1, classes=None, dtype=float64, **metadata):
    stock = diffusers_pipeline(small_unet(channels, classes=classes), PROCESSES[name], metadata=metadata)
    pipeline = STFPipeline(stock.unet.to(dtype), stock.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(generators, shape=(1, 4, 4)):
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).double()


def edm_by_hand(network, x, sigma, data_std=0.6, labels=None):
    """c_skip x + c_out F(c_in x, ln(sigma) / 4): Karras et al. 2022, Table 1."""
    total = math.sqrt(sigma**2 + data_std**2)
    time = torch.full((len(x),), math.log(sigma) / 4, dtype=float64)
    with torch.no_grad():
        output = network((x / total).to(network.dtype), time.to(torch.float32), labels).sample.double()
    return data_std**2 / total**2 * x + sigma * data_std / total * output


# The algorithm


@pytest.mark.parametrize("levels", [[80.0], [80.0, 0.8], [80.0, 2.0, 0.3]])
def test_samples_of_a_gaussian_are_its_closed_form(levels):
    """Along the ODE of N(m, v), x - m is proportional to sqrt(v + sigma^2): f(x, s) = m + (x - m) sqrt(v / (v + s^2))."""
    mean, variance = 0.3, torch.linspace(0.01, 2.0, 16, dtype=float64).reshape(1, 4, 4)
    latents, noise = normal(5, 1, 4, 4, seed=1, dtype=float64), normal(len(levels) - 1, 5, 1, 4, 4, seed=2)
    called = []

    def consistency_function(x, sigma):
        called.append(float(sigma))
        return mean + (x - mean) * (variance / (variance + sigma**2)).sqrt()

    found = sample_consistency(consistency_function, latents, levels, step_noise=noise)
    # As a sum over levels: what of each level's noise is left at the end, by the products of the contractions.
    shrink = [torch.sqrt(variance / (variance + level**2)) for level in levels]
    expected = mean + (levels[0] * latents - mean) * math.prod(shrink)
    for k, level in enumerate(levels[1:], 1):
        expected = expected + level * noise[k - 1].double() * math.prod(shrink[k:])
    assert called == levels and found.dtype == float64
    assert worst(found, expected) < 1e-13


def test_noise_is_drawn_for_the_steps_in_between_as_diffusers_draws_it():
    latents = normal(3, 1, 4, 4, seed=1)
    for levels in ([80.0], [80.0, 1.0], [80.0, 1.0, 0.5]):
        generators, again = seeds(3), seeds(3)
        found = sample_consistency(lambda x, sigma: 0.5 * x, latents, levels, generator=generators)
        noise = torch.stack([drawn(again) for _ in levels[1:]] or [torch.empty(0, 3, 1, 4, 4)]).reshape(-1, 3, 1, 4, 4)
        assert worst(found, sample_consistency(lambda x, sigma: 0.5 * x, latents, levels, step_noise=noise)) == 0
        ahead = [torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, again, strict=True)]
        assert all(ahead), "drawn from once for each level in between"


def test_the_state_can_be_seen_and_replaced():
    states = []

    def replace_the_first(step, state):
        states.append(state)
        return torch.zeros_like(state) if step == 0 else None

    noise = torch.ones(1, 2, 1, 4, 4)
    found = sample_consistency(
        lambda x, sigma: x + 1, torch.ones(2, 1, 4, 4), [3.0, 2.0], step_noise=noise, on_step_end=replace_the_first
    )
    assert [float(state.mean()) for state in states] == [6.0, 1.0] and float(found.mean()) == 1.0


@pytest.mark.parametrize("levels", [[], [80.0, 80.0], [1.0, 2.0], [80.0, 0.0], [math.inf], [math.nan], [[80.0]], 80.0])
def test_levels_that_do_not_fall_are_refused(levels):
    with pytest.raises(ValueError, match="finite, positive and decreasing"):
        sample_consistency(lambda x, sigma: x, torch.zeros(1, 1, 4, 4), levels)


def test_noise_and_generators_must_fit():
    with pytest.raises(ValueError, match=r"step_noise must have shape \(1, 2, 1, 4, 4\)"):
        sample_consistency(lambda x, s: x, torch.zeros(2, 1, 4, 4), [80.0, 1.0], step_noise=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="3 generators for 2 images"):
        sample_consistency(lambda x, s: x, torch.zeros(2, 1, 4, 4), [80.0, 1.0], generator=seeds(3))


# Levels


def test_levels_are_the_callers_or_those_saved_or_spread():
    saved = {"2": [0.8], "3": [2.0, 0.5]}
    assert intermediate_levels(1, 80.0, saved=saved) == []
    assert intermediate_levels(2, 80.0, saved=saved) == [0.8]
    assert intermediate_levels(2, 80.0, sigmas=[1.5], saved=saved) == [1.5]
    assert intermediate_levels(2, 80.0, sigmas=torch.tensor([1.5]), saved=saved) == [1.5]
    assert intermediate_levels(2, 80.0) == [0.5] and intermediate_levels(4, 80.0, saved=saved) == [2.0, 1.0, 0.5]
    for sigma_max, steps in ((80.0, 40), (1.0, 40), (80.0, 2), (1.0, 2)):
        levels = [sigma_max, *intermediate_levels(steps, sigma_max), 0.0]
        assert len(levels) == steps + 1 and all(high > low for high, low in pairwise(levels))


WRONG_LEVELS = {
    "too few": (3, [0.8], "must be 2 noise levels, one less than num_inference_steps=3"),
    "too many": (1, [0.8], "must be 0 noise levels"),
    "rising": (3, [0.5, 0.8], "sigmas must decrease, between 80 and 0"),
    "zero": (2, [0.0], "sigmas must decrease"),
    "above the largest": (2, [80.0], "sigmas must decrease"),
    "not a number": (2, [math.nan], "sigmas must decrease"),
    "a table": (3, [[0.8], [0.5]], "sigmas must be 2 noise levels"),
}


@pytest.mark.parametrize("case", WRONG_LEVELS)
def test_wrong_levels(case):
    steps, sigmas, message = WRONG_LEVELS[case]
    with pytest.raises(ValueError, match=message):
        pipeline_for()(2, steps, solver="consistency", sigmas=sigmas)


def test_wrong_levels_in_the_folder_are_named():
    pipeline = pipeline_for(consistency={}, consistency_sigmas={"2": [0.8, 0.5]})
    with pytest.raises(ValueError, match="the levels saved for num_inference_steps=2 must be 1 noise levels"):
        pipeline(2, 2)


@pytest.mark.parametrize("sigmas", ["0.8", [None], 0.8, [[1.0], [2.0, 3.0]]])
def test_levels_that_are_not_numbers(sigmas):
    with pytest.raises(TypeError, match="sigmas must be"):
        pipeline_for()(2, solver="consistency", sigmas=sigmas)


def test_levels_are_for_consistency_models():
    with pytest.raises(ValueError, match="solver='consistency'; got solver='heun'"):
        pipeline_for()(2, 3, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"sigmas must decrease, between 100 and 0\.02; got"):
        pipeline_for("ve")(2, solver="consistency", sigmas=[0.01])


# The pipeline


@pytest.mark.parametrize("sigmas", [None, [1.5]])
def test_two_steps_are_the_formula(sigmas):
    pipeline = pipeline_for(consistency={"stage": 8}, consistency_sigmas={"2": [0.7]})
    seen = []
    output = pipeline(
        3, 2, sigmas=sigmas, generator=seeds(3), output_type="latent",
        callback_on_step_end=lambda pipe, step, t, state: seen.append((step, float(t), state["latents"])),
    )  # fmt: skip
    generators, level = seeds(3), 0.7 if sigmas is None else 1.5
    first = edm_by_hand(pipeline.unet, 80 * drawn(generators), 80.0)
    noisy = first + level * drawn(generators)
    assert worst(output.images, edm_by_hand(pipeline.unet, noisy, level)) < 1e-10
    assert output.num_evaluations == pipeline.num_timesteps == 2
    assert [step for step, *_ in seen] == [0, 1] and worst(seen[0][2], noisy) < 1e-10
    assert [time for _, time, _ in seen] == pytest.approx([math.log(80) / 4, math.log(level) / 4])


def test_the_number_of_steps_and_the_solver_have_defaults():
    plain, tuned = pipeline_for(), pipeline_for(consistency={"stage": 8})
    assert plain.default_solver == "heun" and tuned.default_solver == "consistency"
    assert plain(1).num_evaluations == 35 and tuned(1).num_evaluations == 1
    assert plain(1, solver="consistency").num_evaluations == 1
    assert tuned(1, solver="heun").num_evaluations == 35 and tuned(1, sigmas=[2.0, 1.0]).num_evaluations == 3


@pytest.mark.parametrize(("dtype", "bound"), [(float64, 1e-12), (torch.float32, 1e-5)])
def test_image_k_does_not_depend_on_the_batch(dtype, bound):
    pipeline = pipeline_for(channels=3, dtype=dtype)
    call = {"num_inference_steps": 3, "solver": "consistency", "output_type": "latent"}
    together = pipeline(3, generator=seeds(3), **call).images
    alone = [pipeline(1, generator=[generator], **call).images for generator in seeds(3)]
    assert (together - torch.cat(alone)).abs().max() < bound
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_is_sampled_in_its_own_range(name):
    network, latents = ExactNetwork(name, POINTS), normal(4, 1, 4, 4, seed=5, dtype=float64)
    unet = ExactUNet.from_config(small_unet().config).attach(name, POINTS).double()
    pipeline = STFPipeline(unet, diffusers_pipeline(unet, PROCESSES[name]).scheduler)
    found = pipeline(
        4, solver="consistency", sigmas=[0.9], latents=latents, generator=seeds(4), output_type="latent"
    ).images
    high = PROCESSES[name].sampling_range()[1]
    noisy = denoise_points(POINTS, high * latents, high) + 0.9 * drawn(seeds(4))
    assert worst(found, denoise_points(POINTS, noisy, 0.9)) < 1e-5  # timesteps are float32
    denoise = network_denoiser(network, PROCESSES[name])
    assert worst(sample_consistency(denoise, latents, [high]), denoise_points(POINTS, high * latents, high)) < 1e-9


def test_guidance_goes_through():
    pipeline = pipeline_for(classes=3, null_label=2)
    call = {"solver": "consistency", "latents": normal(2, 1, 4, 4, seed=5), "output_type": "latent"}
    null, one, guided = (
        pipeline(2, class_labels=label, guidance_scale=scale, **call).images
        for label, scale in ((2, 1), (1, 1), (1, 3))
    )
    assert worst(guided, null + 3 * (one - null)) < 1e-10 and worst(guided, one) > 1e-3


# The folder

PLAIN = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
if sys.argv[2] == "2":
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", sigma_min=float(sys.argv[3])
    )
    images = pipe(batch_size=4, num_inference_steps=2, generator=generators, output_type="np").images
else:
    images = pipe(batch_size=4, generator=generators, output_type="np").images
assert not any(name.startswith("stf_diffusers") for name in sys.modules)
np.save(sys.argv[-1], images)
"""


def in_plain_diffusers(folder, tmp_path, *arguments):
    command = [sys.executable, "-I", "-c", PLAIN, str(folder), *map(str, arguments), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "images.npy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned")
    metadata = {"objective": "stf", "consistency": {"stage": 8}, "consistency_sigmas": {"2": [0.7], "3": [2.0, 0.5]}}
    save_pipeline(diffusers_pipeline(small_unet(3), PROCESSES["edm"], metadata=metadata), path)
    return path


def test_one_step_of_plain_diffusers_is_the_consistency_function(folder, tmp_path):
    found = in_plain_diffusers(folder, tmp_path, "1")
    pipeline = STFPipeline.from_pretrained(folder)
    # The EDM schedulers of Diffusers start from noise of variance sigma_max^2 + 1.
    start = math.sqrt(80**2 + 1) * drawn(seeds(4), (3, 4, 4))
    output = edm_by_hand(pipeline.unet, start, 80.0)
    np.testing.assert_allclose(found, as_images(output), atol=2e-6)
    ours = pipeline(4, generator=seeds(4), output_type="np").images
    np.testing.assert_allclose(found, ours, atol=5e-4)


def test_two_steps_of_plain_diffusers_are_near(folder, tmp_path):
    """Its SDE solver keeps (level / sigma_max)^2 of the first noise, and draws the rest as we do."""
    found = in_plain_diffusers(folder, tmp_path, "2", 0.7)
    unet, generators = STFPipeline.from_pretrained(folder).unet, seeds(4)
    start = math.sqrt(80**2 + 1) * drawn(generators, (3, 4, 4))
    first, share = edm_by_hand(unet, start, 80.0), (0.7 / 80) ** 2
    noisy = first + share * (start - first) + 0.7 * math.sqrt(1 - share) * drawn(generators, (3, 4, 4))
    np.testing.assert_allclose(found, as_images(edm_by_hand(unet, noisy, 0.7)), atol=1e-5)


def as_images(x):
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_the_consistency_scheduler_of_diffusers_differs_by_a_factor_in_the_timestep(folder):
    """All else can be set to ours. No weight of a UNet2DModel undoes the factor, so that no folder is saved with it."""
    pipeline = STFPipeline.from_pretrained(folder)
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=3, sigma_min=0.0, sigma_data=0.6, rho=math.log2(80 / 0.7), clip_denoised=False
    )
    stock = ConsistencyModelPipeline(pipeline.unet, scheduler)
    call = {"batch_size": 4, "num_inference_steps": 2, "output_type": "np"}
    exact, found = (pipe(generator=seeds(4), **call).images for pipe in (pipeline, stock))

    def mend(_, arguments, named):
        return (arguments[0], arguments[1] / 1000), named

    handle = pipeline.unet.register_forward_pre_hook(mend, with_kwargs=True)
    mended = stock(generator=seeds(4), **call).images
    handle.remove()
    assert np.abs(mended - exact).max() < 1e-5 and np.abs(found - exact).max() > 1e-3


def test_the_card_says_how_a_consistency_model_is_sampled(folder):
    card = model_card(STFPipeline.from_pretrained(folder), repository=str(folder), num_inference_steps=35).content
    assert "An unconditional image consistency model, 4×4" in card and "- consistency-model" in card
    assert "| noise levels between steps | 2 steps: 0.7; 3 steps: 2, 0.5 |" in card
    assert "Heun" not in card and "num_inference_steps=35" not in card and "takes a single step without it" not in card
    results, seen = [], []
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        load, call = snippet.split("images = ")
        names = {"seeds": seeds(4)}
        exec(load, names)  # noqa: S102
        names["pipe"].unet.register_forward_pre_hook(lambda *_: seen.append(1))
        exec("images = " + call.replace("batch_size=4", "batch_size=4, generator=seeds"), names)  # noqa: S102
        results.append((len(seen), np.stack([np.asarray(image) for image in names["images"]]).astype(int)))
        seen.clear()
    assert [evaluations for evaluations, _ in results] == [1, 2, 2]
    assert np.abs(results[1][1] - results[2][1]).max() < np.abs(results[1][1] - results[0][1]).max()
