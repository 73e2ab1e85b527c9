"""Saved pipelines: plain Diffusers, fed the exact denoiser of a few points, must give back those points."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from scipy import stats

from exact_networks import PROCESSES, ExactUNet, noise_to_signal, small_unet
from stf_diffusers import EDM, VE, VP, FlowMatching, SchedulerProcess
from stf_diffusers.export import (
    METADATA_KEY,
    diffusers_pipeline,
    process_from_config,
    process_to_config,
    read_metadata,
    sampling_scheduler,
    save_pipeline,
    trained_betas,
)


@pytest.mark.parametrize("name", PROCESSES)
def test_samples_of_the_exact_denoiser_are_the_points(name):
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(6, 1, 4, 4, generator=generator) > 0.5).double() * 1.6 - 0.8
    unet = ExactUNet.from_config(small_unet().config).attach(name, points)
    pipeline = diffusers_pipeline(unet, PROCESSES[name])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=600, generator=generator, num_inference_steps=35, output_type="np").images
    samples = torch.from_numpy(images).double() * 2 - 1
    distance = torch.cdist(samples.flatten(1), points.flatten(1))
    nearest, which = distance.min(1)
    assert nearest.max() < 1e-3
    # Frequencies: chi-square against equal weights; a right sampler fails one time in 10^4.
    assert stats.chisquare(torch.bincount(which, minlength=6).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_trained_betas_reproduce_the_process_at_integer_timesteps(name):
    scheduler = sampling_scheduler(PROCESSES[name])
    ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()
    expected = noise_to_signal(name, torch.arange(1000))
    # Diffusers multiplies a thousand float32 factors.
    torch.testing.assert_close(ratio, expected, rtol=3e-4, atol=0)


def test_trained_betas_are_exact_in_float64():
    sigmas = torch.logspace(-3, 3, 500, dtype=torch.float64)
    signal = torch.cumprod(1 - torch.tensor(trained_betas(sigmas), dtype=torch.float64), 0)
    torch.testing.assert_close(((1 - signal) / signal).sqrt(), sigmas, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "process", [*PROCESSES.values(), EDM(p_mean=-0.4), FlowMatching("logit_normal", 0.5, 2.0), VP(beta_d=10.0)]
)
def test_process_config_round_trip(process):
    assert process_from_config(json.loads(json.dumps(process_to_config(process)))) == process


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("classes", [None, 3])
def test_saved_folder_loads_and_samples_as_the_one_in_memory(name, channels, classes, tmp_path):
    pipeline = diffusers_pipeline(small_unet(channels, classes=classes), PROCESSES[name], metadata={"steps": 7})
    save_pipeline(pipeline, tmp_path, raw_network=small_unet(channels, classes=classes))
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipeline)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    if classes:
        call["class_labels"] = [0, 2]
    results = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        results.append(pipe(generator=torch.Generator().manual_seed(1), **call).images)
    assert np.array_equal(*results)
    # The metadata is there, and survives being saved again by Diffusers alone.
    loaded.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        assert read_metadata(folder) == {"steps": 7, "process": process_to_config(PROCESSES[name])}
    assert METADATA_KEY.startswith("_")


def test_saving_replaces_the_pipeline_and_keeps_other_files(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "kept").write_text("kept")
    save_pipeline(diffusers_pipeline(small_unet(), VE()), tmp_path, raw_network=small_unet())
    save_pipeline(diffusers_pipeline(small_unet(), EDM()), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-5", "model_index.json", "scheduler", "unet"}
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"


def test_a_failed_save_leaves_the_earlier_pipeline(tmp_path, monkeypatch):
    save_pipeline(diffusers_pipeline(small_unet(), VE()), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = diffusers_pipeline(small_unet(), EDM())
    monkeypatch.setattr(broken.unet, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pipeline(broken, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_errors_say_what_is_supported():
    with pytest.raises(TypeError, match="EDM, VE, VP or FlowMatching"):
        sampling_scheduler(SchedulerProcess(EulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="trained with"):
        sampling_scheduler(VE(), sigma_max=50.0)
    with pytest.raises(TypeError, match="can be saved"):
        process_to_config(SchedulerProcess(EulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="not one of edm, ve, vp, flow, discrete"):
        process_from_config({"name": "cosine"})
