"""A DDPM of Diffusers trained further on its own process, and one trained from scratch."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from stf_diffusers import EDM, STFPipeline, STFTrainingObjective
from stf_diffusers.export import process_to_config
from tiny import TINY, grid_of, metadata, mistake, same, sample_with_plain_diffusers, train, weights

GREY = 191 / 127.5 - 1


@pytest.fixture
def losses(monkeypatch):
    """The losses of a run, in order."""
    found, loss = [], STFTrainingObjective.loss

    def recorded(self, output, batch, weights=None):
        value = loss(self, output, batch, weights)
        found.append(float(value))
        return value

    monkeypatch.setattr(STFTrainingObjective, "loss", recorded)
    return found


@pytest.fixture
def stock(tmp_path):
    """stock(scheduler): a folder of Diffusers' own whose network returns GREY for anything."""

    def save(scheduler):
        torch.manual_seed(0)
        network = UNet2DModel.from_config(TINY | {"sample_size": 8})
        with torch.no_grad():
            network.conv_out.weight.zero_()
            network.conv_out.bias.fill_(GREY)
        DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "stock")
        (tmp_path / "stock" / "scheduler" / "scheduler_config.json").unlink()
        scheduler.save_pretrained(tmp_path / "stock" / "scheduler")
        return tmp_path / "stock"

    return save


@pytest.fixture
def tune(flags, stock, tmp_path):
    """tune(scheduler, *flags): train such a folder further into `run`."""
    without_config = flags()[:2] + flags()[4:]

    def run(scheduler, *more):
        train([*without_config, "--pretrained_model_name_or_path", stock(scheduler), *more])
        return tmp_path / "run"

    return run


@pytest.fixture
def grey_images(tmp_path):
    folder = tmp_path / "grey"
    for index in range(8):
        path = folder / "train" / "only" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 191, dtype=np.uint8)).save(path)
    return folder


def test_the_first_loss_is_that_of_the_network_on_its_own_process(tune, grey_images, losses):
    """All images are GREY, which the network of this DDPM predicts exactly: its loss is 0. On EDM it is not."""
    scheduler = DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2")
    folder = tune(scheduler, "--train_data_dir", grey_images)
    assert losses[0] < 1e-12
    process = metadata(folder)["process"]
    assert process["name"] == "discrete" and process["scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    objective = STFTrainingObjective(EDM())
    batch = objective.perturb(torch.full((64, 3, 8, 8), GREY), generator=torch.Generator().manual_seed(0))
    assert objective.loss(torch.full_like(batch.target, GREY), batch) > 0.3


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_ddpm_comes_back_as_it_was(name, tune):
    betas = np.linspace(2e-4, 0.015, 1000).tolist()
    settings = {
        "prediction_type": "v_prediction",
        "trained_betas": betas,
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }
    folder = tune(getattr(diffusers, name)(**settings, rescale_betas_zero_snr=True))
    plain = DiffusionPipeline.from_pretrained(folder)
    assert type(plain) is DDPMPipeline and type(plain.scheduler).__name__ == name
    assert {key: plain.scheduler.config[key] for key in settings} == settings
    assert plain.scheduler.config.rescale_betas_zero_snr
    sample_with_plain_diffusers([folder], seed=0)
    ours = STFPipeline.from_pretrained(folder)
    assert process_to_config(ours.process) == metadata(folder)["process"]
    assert ours(2, 4, output_type="np").images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("conditional", [False, True])
def test_from_scratch_saved_and_resumed(conditional, flags, tmp_path):
    asked = ["--prediction_type", "v_prediction", "--ddpm_num_steps", 200, "--ddpm_beta_schedule", "squaredcos_cap_v2"]
    asked += ["--class_conditional"] * conditional
    train(flags(*asked, "--noise_process", "discrete", "--output_dir", tmp_path / "whole", "--num_inference_steps", 12))
    found = metadata(tmp_path / "whole")["process"]["scheduler"]
    assert (found["prediction_type"], found["num_train_timesteps"]) == ("v_prediction", 200)
    assert found["beta_schedule"] == "squaredcos_cap_v2" and not found["clip_sample"]
    (kind,) = sample_with_plain_diffusers([tmp_path / "whole"], seed=0)
    assert kind == ("ConsistencyModelPipeline" if conditional else "DDPMPipeline")
    plain = np.rint(np.load(tmp_path / "whole" / "plain.npy") * 255).astype(int)
    assert np.abs(plain - grid_of(tmp_path / "whole")).max() <= 1, "plain Diffusers against the training script"
    # The flags of this process choose it.
    train(flags(*asked, "--lr_scheduler", "constant", "--max_train_steps", 1))
    train(flags(*asked, "--lr_scheduler", "constant", "--resume_from_checkpoint", "latest"))
    train(flags(*asked, "--lr_scheduler", "constant", "--output_dir", tmp_path / "again"))
    assert same(weights(tmp_path / "run", "unet_raw"), weights(tmp_path / "again", "unet_raw"))
    with pytest.raises(ValueError, match=r"belongs to another run: process \(.*'v_prediction'.* there, .*'sample'"):
        train(
            flags(
                *asked,
                "--lr_scheduler",
                "constant",
                "--prediction_type",
                "sample",
                "--resume_from_checkpoint",
                "latest",
            )
        )


@pytest.mark.parametrize(
    ("scheduler", "asked", "message"),
    [
        (DDPMScheduler(), ["--noise_process", "edm"], "--noise_process edm, but the pretrained pipeline was trained on discrete"),
        (DDPMScheduler(), ["--noise_process", "vp"], "would have to be trained anew. Leave --noise_process out, or train a new"),
        (DDPMScheduler(prediction_type="v_prediction"), ["--prediction_type", "epsilon"],
         "--prediction_type epsilon, but the pretrained pipeline was trained with 'v_prediction'. Leave --prediction_type out"),
        (DDPMScheduler(), ["--ddpm_num_steps", 50], "--ddpm_num_steps 50, but the pretrained pipeline was trained with 1000"),
        (DDPMScheduler(trained_betas=[0.01] * 900, num_train_timesteps=900), ["--ddpm_beta_schedule", "linear"],
         "--ddpm_beta_schedule linear, but the pretrained pipeline was trained with 'trained_betas'"),
        (DDPMScheduler(), ["--p_mean", -1], "--p_mean is not a parameter of --noise_process discrete"),
        (diffusers.EDMEulerScheduler(), ["--noise_process", "discrete"], "was trained on edm"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), ["--noise_process", "vp"], "was trained on flow"),
        (diffusers.ScoreSdeVeScheduler(), [], "does not say which noise process"),
        (diffusers.ScoreSdeVeScheduler(), ["--noise_process", "ve"], "does not say which noise process"),
    ],
    ids=lambda part: type(part).__name__ if hasattr(part, "config") else "",
)  # fmt: skip
def test_contradictions_are_refused(scheduler, asked, message, tune, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        tune(scheduler, *asked)
    assert not (tmp_path / "run").exists()


def test_what_the_folder_says_may_be_said_again(tune):
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    asked = [
        "--noise_process",
        "discrete",
        "--prediction_type",
        "v_prediction",
        "--ddpm_beta_schedule",
        "scaled_linear",
    ]
    assert metadata(tune(scheduler, *asked))["process"]["scheduler"]["prediction_type"] == "v_prediction"


def test_other_families_are_taken_as_what_they_are(tune):
    edm = metadata(tune(diffusers.EDMEulerScheduler(sigma_data=0.55, sigma_max=20.0)))
    assert edm["process"]["name"] == "edm" and edm["process"]["sigma_data"] == 0.55
    assert edm["sampling_range"] == {"sigma_min": 0.002, "sigma_max": 20.0}
    flow = metadata(tune(diffusers.FlowMatchEulerDiscreteScheduler(), "--overwrite_output_dir"))
    assert flow["process"]["name"] == "flow"
    euler = metadata(tune(diffusers.EulerDiscreteScheduler(), "--overwrite_output_dir"))
    assert euler["process"]["scheduler"]["_class_name"] == "DDPMScheduler"


def test_more_sampling_steps_than_timesteps_are_refused_at_the_start(flags, tmp_path):
    with pytest.raises(ValueError, match="--num_inference_steps 35 is more than the 20 timesteps of the process"):
        train(flags("--noise_process", "discrete", "--ddpm_num_steps", 20, "--num_inference_steps", 35))
    assert not (tmp_path / "run").exists()


def test_too_few_timesteps_for_pure_noise_are_told(flags, caplog):
    train(flags("--noise_process", "discrete", "--ddpm_num_steps", 20, "--max_train_steps", 1))
    assert "samples start from pure noise, which the network has not seen" in caplog.text


def test_networks_that_predict_variances_are_refused(tune, tmp_path, stock, flags):
    folder = stock(DDPMScheduler(variance_type="learned_range"))
    network = UNet2DModel.from_config(TINY | {"sample_size": 8, "out_channels": 6})
    network.save_pretrained(folder / "unet")
    assert json.loads((folder / "unet" / "config.json").read_text())["out_channels"] == 6
    without_config = flags()[:2] + flags()[4:]
    with pytest.raises(ValueError, match="it predicts variances too, which is not trained here"):
        train([*without_config, "--pretrained_model_name_or_path", str(folder)])


def test_learned_variances_are_refused_before_anything_is_written(flags, stock, tmp_path, capsys):
    folder = stock(DDPMScheduler(variance_type="learned_range"))
    said = mistake([*flags()[:2], *flags()[4:], "--pretrained_model_name_or_path", folder], capsys)
    assert "with variance_type 'learned_range'" in said and not (tmp_path / "run").exists()
