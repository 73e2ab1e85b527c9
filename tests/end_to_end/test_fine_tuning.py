"""Training that starts from a saved pipeline: what it takes over, and what must agree."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline, LDMPipeline

from tiny import metadata, tiny_autoencoder, train, weights


@pytest.fixture
def tune(flags, tmp_path):
    """tune(*flags): fine-tune the pipeline in `run` into `second`."""
    without_config = flags()[:2] + flags()[4:]

    def run(*more):
        folders = ["--pretrained_model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "second"]
        train([*without_config, *folders, *more])
        return tmp_path / "second"

    return run


def test_weights_and_process_are_taken_from_the_pipeline(flags, tune, tmp_path):
    train(flags("--noise_process", "vp", "--beta_d", 12))
    second = tune("--learning_rate", 1e-12, "--resolution", 16)
    assert metadata(second)["process"] == {"name": "vp", "beta_d": 12.0, "beta_min": 0.1, "epsilon_t": 1e-5}
    assert DiffusionPipeline.from_pretrained(second).unet.config.sample_size == 16
    for key, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(weights(second, "unet_raw")[key], value, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="was trained on vp"):
        tune("--noise_process", "edm", "--overwrite_output_dir")


def test_the_sampling_range_is_kept(flags, tune):
    train(flags("--sigma_max", 20, "--max_train_steps", 1))
    assert DiffusionPipeline.from_pretrained(tune()).scheduler.config.sigma_max == 20


def test_a_latent_model_keeps_its_scale(flags, tune, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    train(flags("--vae", tmp_path / "vae", "--noise_process", "vp"))
    first = tmp_path / "run"
    second = tune("--vae", first, "--learning_rate", 1e-12)
    before, after = LDMPipeline.from_pretrained(first).vqvae, LDMPipeline.from_pretrained(second).vqvae
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scales = [part.config.scaling_factor for part in (before, after)]
    torch.testing.assert_close(before.decode(z / scales[0]).sample, after.decode(z / scales[1]).sample)
    with pytest.raises(ValueError, match=r"is not the autoencoder of the pretrained pipeline.* Pass --vae"):
        tune("--vae", tmp_path / "vae", "--overwrite_output_dir")
    with pytest.raises(ValueError, match=r"knows latents of its autoencoder, .* --vae"):
        tune("--image_mode", "RGBA", "--overwrite_output_dir")  # as many channels as its latents


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (["--class_conditional", "--class_dropout", 0.1], ["--class_conditional"], "class_dropout was 0.1 and is 0.0"),
        (["--reorient", 0.5], ["--reorient", 0.5, "--class_conditional"], "num_classes was None and is 2"),
        (["--class_conditional"], [], "num_classes was 2 and is None"),
    ],
)
def test_labels_keep_their_meaning(before, now, message, flags, tune, tmp_path):
    train(flags(*before, "--max_train_steps", 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        tune(*now)
    assert not (tmp_path / "second").exists()
