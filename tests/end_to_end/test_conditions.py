"""Training with classes and their dropout, orientations, latents and a transformer: what is trained, saved and sampled."""

import json

import numpy as np
import pytest

from stf_diffusers import STFPipeline
from tiny import (
    TINY,
    TINY_TRANSFORMER,
    generators,
    grid_of,
    sample_with_plain_diffusers,
    tiny_autoencoder,
    tiny_deep_compression_autoencoder,
    train,
)

# One process trains and keeps the folders for all the tests of this file.
pytestmark = pytest.mark.xdist_group("conditions")

CASES = {
    "class dropout, bank": (["--class_conditional", "--class_dropout", 0.5], "ConsistencyModelPipeline"),
    "class dropout, batch": (
        ["--class_conditional", "--class_dropout", 0.5, "--reference_batch_size", 12, "--noise_process", "flow"],
        "ConsistencyModelPipeline",
    ),
    "orientations": (["--reorient", 0.9, "--noise_process", "ve"], "ConsistencyModelPipeline"),
    "orientations and classes": (
        ["--reorient", 0.9, "--class_conditional", "--class_dropout", 0.3], "ConsistencyModelPipeline"
    ),
    "latents, edm": (["--vae", "{vae}"], "LDMPipeline"),
    "latents, flow, flips": (["--vae", "{vae}", "--noise_process", "flow", "--random_flip"], "LDMPipeline"),
    "latent means, ve": (["--vae", "{vae}", "--noise_process", "ve", "--latents", "mean"], "LDMPipeline"),
    "latents of another kind": (
        ["--vae", "{dc}", "--model_config", "{dit}", "--noise_process", "flow"], "DiTPipeline"
    ),
    "transformer, vp": (["--vae", "{vae}", "--model_config", "{dit}", "--noise_process", "vp"], "DiTPipeline"),
    "transformer, flow, classes": (
        ["--vae", "{vae}", "--model_config", "{dit}", "--noise_process", "flow", "--class_conditional",
         "--class_dropout", 0.2], "DiTPipeline"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder):
    """The folder of each case, trained in this process and sampled in another by plain Diffusers, and its pipeline's class."""
    root = tmp_path_factory.mktemp("conditions")
    (root / "net.json").write_text(json.dumps(TINY))
    (root / "dit.json").write_text(json.dumps(TINY_TRANSFORMER))
    tiny_autoencoder().save_pretrained(root / "vae")
    tiny_deep_compression_autoencoder().save_pretrained(root / "dc")
    places = {"{vae}": root / "vae", "{dit}": root / "dit.json", "{dc}": root / "dc"}
    folders = []
    for number, (more, _) in enumerate(CASES.values()):
        folders.append(root / str(number))
        flags = [
            "--train_data_dir", image_folder, "--model_config", root / "net.json", "--output_dir", folders[-1],
            "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 2, "--num_inference_steps", 4,
            "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none",
        ]  # fmt: skip
        train([*flags, *(places.get(flag, flag) for flag in more)])
    kinds = sample_with_plain_diffusers(folders, 0)
    return dict(zip(CASES, zip(folders, kinds, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_trained_saved_and_sampled(case, runs, tmp_path):
    """By plain Diffusers, as the card says, and by `STFPipeline`: the images of the training script's grid."""
    more, expected = CASES[case]
    run, kind = runs[case]
    plain = np.load(run / "plain.npy")
    assert kind == expected and plain.shape == (2, 8, 8, 3)
    levels = np.rint(plain * 255).astype(int)
    assert np.abs(levels - grid_of(run)).max() <= 1, "plain Diffusers against the training script"
    labels = {"class_labels": [0, 1]} if "--class_conditional" in more else {}

    def sample(pipeline, **how):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(2, 4, generator=generators(2), output_type="np", **labels, **how).images

    ours = STFPipeline.from_pretrained(run)
    images = sample(ours, solver="scheduler")
    np.testing.assert_allclose(images, plain, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    again = STFPipeline.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(sample(again, solver="scheduler"), images)
    if "--class_dropout" in more:
        guided = sample(ours, guidance_scale=3.0)
        assert np.isfinite(guided).all() and np.abs(guided - sample(ours)).max() > 1e-3


def test_a_transformer_without_dropout_is_not_guided(flags, tmp_path):
    (tmp_path / "dit.json").write_text(json.dumps(TINY_TRANSFORMER))
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    more = ["--model_config", tmp_path / "dit.json", "--vae", tmp_path / "vae", "--noise_process", "vp"]
    train(flags(*more, "--class_conditional", "--max_train_steps", 1))
    pipeline = STFPipeline.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="null_label"):
        pipeline(1, 2, class_labels=0, guidance_scale=2.0)
