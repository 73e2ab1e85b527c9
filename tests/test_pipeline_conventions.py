"""What users of Diffusers' pipelines, and its common pipeline tests, expect of `STFPipeline`."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from diffusers.callbacks import PipelineCallback

from exact_networks import PROCESSES, small_unet
from stf_diffusers import STFPipeline
from stf_diffusers.export import diffusers_pipeline
from tiny import tiny_autoencoder

EVERY_SOLVER = ("heun", "euler", "rk45", "scheduler")


def pipeline_for(name="edm", channels=3, vae=None, classes=None):
    stock = diffusers_pipeline(small_unet(channels, classes=classes), PROCESSES[name], vae=vae)
    pipeline = STFPipeline(stock.unet, stock.scheduler, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(pipeline, **arguments):
    return pipeline(2, 3, generator=seeded(), output_type="pt", **arguments).images


# ---- components


def test_components_are_what_was_passed():
    parts = {"unet": small_unet(3), "scheduler": EDMEulerScheduler()}
    assert STFPipeline(**parts).components == parts
    vae = tiny_autoencoder()
    pipeline = pipeline_for(channels=4, vae=vae)
    assert set(pipeline.components) == {"unet", "scheduler", "vae"} and pipeline.components["vae"] is vae
    assert torch.equal(pictures(STFPipeline(**pipeline.components)), pictures(pipeline))
    assert torch.equal(pictures(STFPipeline.from_pipe(pipeline)), pictures(pipeline))


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_part_that_was_taken_out_is_missed_in_words(part, tmp_path):
    """Optional in Diffusers' sense, since a transformer may stand for the unet; one of the two is needed."""
    pipeline = pipeline_for()
    setattr(pipeline, part, None)
    for call in (pipeline, lambda: pipeline.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="needs a scheduler, and one network: a unet or a transformer"):
            call()
    assert not list(tmp_path.iterdir())


# ---- output


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_latents_are_what_the_pictures_are_made_of(solver):
    pipeline = pipeline_for(channels=4, vae=tiny_autoencoder())
    latents = pipeline(2, 3, generator=seeded(), output_type="latent", solver=solver).images
    assert latents.shape == (2, 4, 4, 4) and latents.dtype == torch.float32
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).double()
    assert (pictures(pipeline, solver=solver) - expected).abs().max() < 1e-6


def test_latents_without_an_autoencoder_are_images_that_are_not_clipped():
    pipeline = pipeline_for(channels=5)
    latents = pipeline(2, 3, generator=seeded(), output_type="latent", return_dict=False)[0]
    assert (pictures(pipeline) - (latents / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-6


def test_latents_are_in_the_networks_dtype():
    assert pipeline_for().to(dtype=torch.bfloat16)(1, 2, output_type="latent").images.dtype == torch.bfloat16


# ---- callbacks


@pytest.mark.parametrize("solver", ["heun", "euler", "scheduler"])
@pytest.mark.parametrize("name", PROCESSES)
def test_callbacks_see_each_step_and_the_networks_timesteps(name, solver):
    pipeline, seen, by_network = pipeline_for(name), [], []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: by_network.append(float(inputs[1][0])))

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline and set(tensors) == {"latents"} and tensors["latents"].shape == (2, 3, 4, 4)
        seen.append((step, float(timestep)))
        return tensors

    changed = pictures(pipeline, solver=solver, callback_on_step_end=callback)
    evaluations = by_network[::2] if solver == "heun" else by_network
    assert pipeline.num_timesteps == len(seen) and [step for step, _ in seen] == list(range(len(seen)))
    assert [timestep for _, timestep in seen] == pytest.approx(evaluations, rel=1e-6)
    assert torch.equal(changed, pictures(pipeline, solver=solver))


@pytest.mark.parametrize("solver", ["heun", "euler", "scheduler"])
def test_the_latents_that_a_callback_returns_are_used(solver):
    pipeline = pipeline_for()

    def clear_at_the_end(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"], dtype=torch.float16)
        return tensors

    def clear_at_the_start(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else None

    last = pipeline(2, 3, output_type="latent", solver=solver, callback_on_step_end=clear_at_the_end).images
    assert last.abs().sum() == 0
    if solver != "scheduler":  # a multistep solver remembers the steps before
        arguments = {"output_type": "latent", "solver": solver, "callback_on_step_end": clear_at_the_start}
        first = [pipeline(2, 3, generator=seeded(seed), **arguments).images for seed in (0, 1)]
        assert torch.equal(*first) and first[0].abs().sum() > 0


def test_a_callback_gets_the_tensors_that_it_asks_for():
    class Count(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            calls.append(set(callback_kwargs))
            return callback_kwargs

    calls, pipeline = [], pipeline_for()
    pipeline(1, 2, callback_on_step_end=Count())
    pipeline(
        1, 2, callback_on_step_end=lambda *given: calls.append(set(given[3])), callback_on_step_end_tensor_inputs=[]
    )
    assert calls == [{"latents"}, {"latents"}, set(), set()]


def test_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"returned latents \(1, 3, 4, 4\); they must stay \(2, 3, 4, 4\)"):
        pipeline_for()(2, 3, callback_on_step_end=lambda *given: {"latents": given[3]["latents"][:1]})


# ---- files


def test_pickles_are_neither_saved_nor_read(tmp_path):
    pipeline = pipeline_for()
    with pytest.raises(ValueError, match=r"safe_serialization=False saves pickles.*Leave it out"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_and_load(variant, tmp_path):
    pipeline = pipeline_for("vp")
    pipeline.save_pretrained(tmp_path, safe_serialization=True, variant=variant)
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert f"diffusion_pytorch_model{'.' + variant if variant else ''}.safetensors" in names
    loaded = STFPipeline.from_pretrained(tmp_path, variant=variant)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pictures(loaded), pictures(pipeline))
    assert DiffusionPipeline.from_pretrained(tmp_path, variant=variant).unet.config.in_channels == 3
    assert (
        STFPipeline.from_pretrained(tmp_path, variant=variant, torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    )
    replaced = STFPipeline.from_pretrained(tmp_path, variant=variant, unet=pipeline.unet)
    assert replaced.unet is pipeline.unet
    assert "transformer" not in json.loads((tmp_path / "model_index.json").read_text())


# ---- the rest of what Diffusers' common tests look at


def test_batches_generators_and_dtypes():
    pipeline = pipeline_for()
    assert torch.equal(pictures(pipeline), pictures(pipeline)), "one seed, one image"
    together = pipeline(2, 3, generator=[seeded(0), seeded(1)], output_type="pt").images
    for k in range(2):
        alone = pipeline(1, 3, generator=[seeded(k)], output_type="pt").images
        assert (together[k : k + 1] - alone).abs().max() < 1e-5
    as_dict, as_tuple = pipeline(1, 2, generator=seeded()), pipeline(1, 2, generator=seeded(), return_dict=False)
    assert as_dict.images[0].tobytes() == as_tuple[0][0].tobytes()
    pipeline.to(dtype=torch.bfloat16)
    assert pipeline.dtype == pipeline.unet.dtype == torch.bfloat16 and pictures(pipeline).isfinite().all()


def test_guidance_changes_no_shape():
    """Of a network that knows a dropped condition; without labels there is nothing to guide, and that is said."""
    stock = diffusers_pipeline(small_unet(3, classes=3), PROCESSES["edm"], metadata={"null_label": 2})
    pipeline = STFPipeline(stock.unet, stock.scheduler)
    plain, guided = (pictures(pipeline, class_labels=1, guidance_scale=scale) for scale in (1.0, 7.5))
    assert plain.shape == guided.shape and not torch.equal(plain, guided)
    with pytest.raises(ValueError, match=r"guidance_scale=7\.5 needs class_labels"):
        pictures(pipeline_for(), guidance_scale=7.5)
