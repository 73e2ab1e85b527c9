"""`STFPipeline`: the same folders as plain Diffusers, more solvers, and no garbage."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)

from exact_networks import PROCESSES, ExactUNet, small_unet
from stf_diffusers import EDM, EDMHeunScheduler, STFPipeline
from stf_diffusers.export import diffusers_pipeline, read_metadata, save_pipeline
from stf_diffusers.model_card import model_card


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
    pipeline = pipeline_for("edm" if isinstance(size, int) else "vp", channels, size)
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


def test_an_edm_model_of_diffusers_is_read():
    assert STFPipeline(small_unet(), EDMEulerScheduler(sigma_data=0.7)).process == EDM(sigma_data=0.7)


def test_a_scheduler_that_cannot_serve_is_refused():
    unknown = small_unet()
    with pytest.raises(ValueError, match="does not say which noise process"):
        STFPipeline(unknown, ScoreSdeVeScheduler())
    edm, vp = pipeline_for("edm"), pipeline_for("vp")
    for scheduler in (EulerDiscreteScheduler(), EDMEulerScheduler(sigma_data=0.7), DDPMScheduler()):
        with pytest.raises(ValueError, match="would give garbage"):
            STFPipeline(edm.unet, scheduler)
    wrong_type = DPMSolverMultistepScheduler.from_config(vp.scheduler.config, prediction_type="sample")
    for scheduler in (DDPMScheduler(), EDMEulerScheduler(), wrong_type):
        with pytest.raises(ValueError, match="would give garbage"):
            STFPipeline(vp.unet, scheduler)
    # Exchanged in place, as is usual in Diffusers.
    edm.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="would give garbage"):
        edm(2, 3, solver="scheduler")


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_exchanged_schedulers_that_can_serve(name):
    pipeline = pipeline_for(name)
    for kind in (UniPCMultistepScheduler, DEISMultistepScheduler):  # whose step takes no generator
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        assert pipeline(2, 4, solver="scheduler", generator=seeds(2), output_type="pt").images.isfinite().all()


def test_our_scheduler_is_counted_right_and_saved_as_one_of_diffusers(tmp_path):
    pipeline = pipeline_for("edm", channels=3)
    pipeline.scheduler = EDMHeunScheduler.from_config(pipeline.scheduler.config)
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    output = pipeline(2, 6, solver="scheduler", output_type="pt")
    assert output.num_evaluations == len(calls) == 11
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EDMDPMSolverMultistepScheduler"]
    assert STFPipeline.from_pretrained(tmp_path).process == pipeline.process


@pytest.mark.parametrize("solver", ["heun", "scheduler"])
def test_half_precision_networks_give_pictures(solver):
    pipeline = pipeline_for("edm", channels=3).to(dtype=torch.bfloat16)
    assert pipeline(2, 3, solver=solver, generator=tuple(seeds(2))).images[1].size == (4, 4)


def test_the_card_of_every_pipeline_parses_and_its_snippets_run(tmp_path):
    for channels, size, classes in ((3, 4, 2), (5, (4, 8), None), (1, 4, 7)):
        pipeline = pipeline_for("edm" if isinstance(size, int) else "vp", channels, size, classes)
        folder = tmp_path / f"{channels}"
        pipeline.save_pretrained(folder)
        card = model_card(pipeline, repository=str(folder), num_inference_steps=3)
        height, width = (size, size) if isinstance(size, int) else size
        assert (
            card.data.to_dict()["library_name"] == "diffusers"
            and f"{height}×{width}, {channels} channel(s)" in card.content
        )
        snippets = re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)
        assert len(snippets) == 2
        # Diffusers' pipeline takes a size that is a number.
        for snippet in snippets if isinstance(size, int) else snippets[1:]:
            names = {}
            exec(snippet, names)  # noqa: S102
            assert len(names["images"]) == 4


WRONG = {
    "solver": ({"solver": "magic"}, "solver must be"),
    "callback's tensors": ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among \['latents'\]; got"),
    "output type": ({"output_type": "jpeg"}, "output_type must be"),
    "latents": ({"latents": torch.zeros(2, 1, 5, 5)}, "latents must have shape"),
    "generators": ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
    "labels": ({"class_labels": 1}, "unconditional"),
    "guidance": ({"guidance_scale": 2.0}, "class_labels"),
    "callback": ({"solver": "rk45", "callback_on_step_end": print}, "solver='heun', 'euler' or 'scheduler'"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be"),
    "no steps of the scheduler": ({"num_inference_steps": 0, "solver": "scheduler"}, "num_inference_steps must be"),
    "no images": ({"batch_size": 0}, "batch_size must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pipeline_for("edm")(**{"batch_size": 2, "num_inference_steps": 3, **arguments})


WRONG_TYPES = {
    "float steps": ({"num_inference_steps": 3.0}, "num_inference_steps must be an integer; got 3.0"),
    "boolean steps": ({"num_inference_steps": True}, "num_inference_steps must be an integer; got True"),
    "text steps": ({"num_inference_steps": "3"}, "num_inference_steps must be an integer; got '3'"),
    "float images": ({"batch_size": 2.0}, "batch_size must be an integer; got 2.0"),
    "guidance": ({"guidance_scale": "2"}, "guidance_scale must be a finite number; got '2'"),
    "guidance that is none": ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number; got nan"),
    "a seed": (
        {"generator": 0},
        r"generator must be a torch.Generator or a list of them; got int. Pass torch.Generator\(\)",
    ),
    "seeds": ({"generator": [0, 1]}, "list of them; got int"),
    "a list of latents": ({"latents": [[0.0]]}, "latents must be a tensor .* got list"),
    "a callback's return": ({"callback_on_step_end": lambda *_: torch.zeros(1)}, "returned Tensor: return the dict"),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types(case):
    arguments, message = WRONG_TYPES[case]
    with pytest.raises(TypeError, match=message):
        pipeline_for("edm")(**{"batch_size": 2, "num_inference_steps": 3, **arguments})


def test_wrong_labels():
    pipeline = pipeline_for("edm", classes=3)
    for labels in (None, 3, -1, [0, 1, 2]):
        with pytest.raises(ValueError, match="class_labels"):
            pipeline(2, 3, class_labels=labels)
    for labels in (1.0, [0.5, 1.5], torch.tensor([0.0, 1.0]), True, [True, False], [None, 1]):
        with pytest.raises(TypeError, match="class_labels must be 2 integers from 0 to 2, or one for all; got"):
            pipeline(2, 3, class_labels=labels)
    with pytest.raises(ValueError, match=r"no class is called \['cat'\]; the model knows no names"):
        pipeline(2, 3, class_labels="cat")
    assert len(pipeline(2, 3, class_labels=np.array([0, 1])).images) == 2
