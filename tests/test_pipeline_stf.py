"""`STFPipeline`: the same folders as plain Diffusers, more solvers, and no garbage."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, EulerDiscreteScheduler

from stf_diffusers import EDM, STFPipeline
from stf_diffusers.export import diffusers_pipeline, read_metadata, save_pipeline
from test_export import PROCESSES, ExactUNet, small_unet


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_for(name, channels=1, size=4, classes=None):
    stock = diffusers_pipeline(small_unet(channels, size, classes), PROCESSES[name])
    return quiet(STFPipeline(stock.unet, stock.scheduler))


def seeds(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ["heun", "euler", "rk45", "scheduler"])
def test_every_solver_gives_the_points_of_the_exact_denoiser(name, solver):
    from scipy import stats

    points = (torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double() * 1.6 - 0.8
    unet = ExactUNet.from_config(small_unet().config).attach(name, points)
    pipeline = quiet(STFPipeline(unet, diffusers_pipeline(unet, PROCESSES[name]).scheduler))
    steps = 60 if solver == "euler" else 35
    generator = torch.Generator().manual_seed(1)
    output = pipeline(400, steps, solver=solver, generator=generator, output_type="pt")
    distance = torch.cdist((output.images.double() * 2 - 1).flatten(1), points.flatten(1))
    nearest, which = distance.min(1)
    assert nearest.max() < 2e-3
    # A right sampler fails one time in 10^4.
    assert stats.chisquare(torch.bincount(which, minlength=5).numpy()).pvalue > 1e-4
    if solver != "rk45":
        assert output.num_evaluations == {"heun": 2 * steps - 1}.get(solver, steps)
    assert output.num_evaluations < 2000


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_image_k_does_not_depend_on_the_batch(name, dtype, bound):
    pipeline = pipeline_for(name, channels=3)
    if name != "edm":  # an untrained noise predictor saturates every pixel
        points = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
        pipeline.register_modules(unet=ExactUNet.from_config(pipeline.unet.config).attach(name, points))
    pipeline.to(dtype=dtype)
    together = pipeline(3, 6, generator=seeds(3), output_type="pt").images
    alone = [pipeline(1, 6, generator=[seeds(3)[k]], output_type="pt").images for k in range(3)]
    assert (together - torch.cat(alone)).abs().max() < bound
    assert ((together > 0) & (together < 1)).double().mean() > 0.2, "not all saturated"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [4, (4, 8)])
def test_channels_and_shapes(channels, size):
    pipeline = pipeline_for("edm", channels, size)
    height, width = (size, size) if isinstance(size, int) else size
    assert pipeline(2, 3, output_type="np").images.shape == (2, height, width, channels)
    assert pipeline(2, 3, output_type="pt", return_dict=False)[0].shape == (2, channels, height, width)
    if channels in (1, 3, 4):
        assert pipeline(2, 3).images[1].size == (width, height)
    else:
        with pytest.raises(ValueError, match="output_type='np' or 'pt'"):
            pipeline(2, 3)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("classes", [None, 3])
def test_one_folder_two_readers(name, classes, tmp_path):
    """Saved by the trainer's function, read here, saved again here, read by plain Diffusers: one seed, one image."""
    stock = quiet(diffusers_pipeline(small_unet(3, classes=classes), PROCESSES[name], metadata={"steps": 3}))
    save_pipeline(stock, tmp_path / "first")
    ours = quiet(STFPipeline.from_pretrained(tmp_path / "first"))
    assert ours.process == PROCESSES[name]
    ours.save_pretrained(tmp_path / "second")
    assert "STF" not in json.loads((tmp_path / "second" / "model_index.json").read_text())["_class_name"]
    plain = quiet(DiffusionPipeline.from_pretrained(tmp_path / "second"))
    assert type(plain) is type(stock) and read_metadata(tmp_path / "second") == read_metadata(tmp_path / "first")
    labels = {} if classes is None else {"class_labels": [0, 2]}
    results = [
        pipe(batch_size=2, num_inference_steps=5, generator=seeds(2), output_type="np", **more, **labels).images
        for pipe, more in ((stock, {}), (plain, {}), (ours, {"solver": "scheduler"}))
    ]
    np.testing.assert_allclose(results[1], results[0], atol=1e-6)
    np.testing.assert_allclose(results[2], results[0], atol=1e-5)


def test_labels():
    pipeline = pipeline_for("edm", classes=3)
    by_label = [pipeline(1, 4, class_labels=k, generator=seeds(1), output_type="pt").images for k in range(3)]
    assert not torch.allclose(by_label[0], by_label[1])
    mixed = pipeline(2, 4, class_labels=torch.tensor([2, 0]), generator=[seeds(1)[0], seeds(1)[0]], output_type="pt")
    torch.testing.assert_close(mixed.images, torch.cat([by_label[2], by_label[0]]), rtol=0, atol=1e-5)


def test_callback_sees_and_replaces_the_state():
    pipeline, levels = pipeline_for("edm"), []

    def callback(pipe, step, level, tensors):
        levels.append(float(level))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = pipeline(2, 4, output_type="pt", callback_on_step_end=callback).images
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0 and len(levels) == 4
    assert torch.equal(images, torch.full_like(images, 0.5))


def test_an_edm_model_of_diffusers_is_read():
    assert STFPipeline(small_unet(), EDMEulerScheduler(sigma_data=0.7)).process == EDM(sigma_data=0.7)


def test_a_scheduler_that_cannot_serve_is_refused():
    edm, vp = pipeline_for("edm"), pipeline_for("vp")
    with pytest.raises(ValueError, match="does not say which noise process"):
        STFPipeline(edm.unet, DDPMScheduler())
    stf = {"_stf": {"process": {"name": "edm", "sigma_data": 0.6, "p_mean": -1.2, "p_std": 1.2}}}
    for scheduler in (EulerDiscreteScheduler(), EDMEulerScheduler(sigma_data=0.5), DDPMScheduler()):
        scheduler.register_to_config(**stf)
        with pytest.raises(ValueError, match="would give garbage"):
            STFPipeline(edm.unet, scheduler)
    linear = DDPMScheduler()
    linear.register_to_config(_stf=vp.scheduler.config["_stf"])
    with pytest.raises(ValueError, match="would give garbage"):
        STFPipeline(vp.unet, linear)


WRONG = {
    "solver": ({"solver": "magic"}, "solver must be"),
    "output type": ({"output_type": "jpeg"}, "output_type must be"),
    "latents": ({"latents": torch.zeros(2, 1, 5, 5)}, "latents must have shape"),
    "generators": ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
    "labels": ({"class_labels": 1}, "unconditional"),
    "guidance": ({"guidance_scale": 2.0}, "class_labels"),
    "callback": ({"solver": "rk45", "callback_on_step_end": print}, "solver='heun' or 'euler'"),
    "steps": ({"num_inference_steps": 0}, "at least one step"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pipeline_for("edm")(**{"batch_size": 2, "num_inference_steps": 3, **arguments})


def test_wrong_labels():
    pipeline = pipeline_for("edm", classes=3)
    for labels in (None, 3, -1, [0, 1, 2]):
        with pytest.raises(ValueError, match="class_labels"):
            pipeline(2, 3, class_labels=labels)
