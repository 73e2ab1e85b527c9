"""Every process, number of channels and kind of condition: two steps of training, then the folder in other hands."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from stf_diffusers import STFPipeline
from tiny import TINY, Trap, generators, grid_of, sample_with_plain_diffusers, train

# One process trains and keeps the folders for all the tests of this file.
pytestmark = pytest.mark.xdist_group("trained_folders")

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
RUNS = [
    (process, channels, conditional)
    for process in ("edm", "ve", "vp", "flow")
    for channels in MODES
    for conditional in (False, True)
]
SEED, STEPS = 5, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory, image_folder):
    """All the runs, trained in this process by the script and sampled in another by plain Diffusers."""
    root = tmp_path_factory.mktemp("runs")
    (root / "net.json").write_text(json.dumps(TINY))
    found = {}
    for process, channels, conditional in RUNS:
        found[process, channels, conditional] = folder = root / f"{process}-{channels}-{conditional}"
        flags = [
            "--train_data_dir", image_folder, "--model_config", root / "net.json", "--output_dir", folder,
            "--noise_process", process, "--image_mode", MODES[channels], "--train_batch_size", 4, "--seed", SEED,
            "--max_train_steps", 2, "--num_samples", 2, "--num_inference_steps", STEPS, "--report_to", "none",
        ]  # fmt: skip
        train([*flags, *["--class_conditional"] * conditional])
    sample_with_plain_diffusers(list(found.values()), SEED)
    return found


def as_grid(images):
    """Images (2, 8, 8, C) in [0, 1] as the grid shows them: three channels, without alpha."""
    levels = np.rint(images * 255).astype(int)[..., :3]
    return np.broadcast_to(levels, (2, 8, 8, 3))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_all_readers_give_the_images_of_the_training_script(run, folders):
    _, channels, conditional = run
    folder = folders[run]
    plain = np.load(folder / "plain.npy")
    assert plain.shape == (2, 8, 8, channels)
    assert np.abs(as_grid(plain) - grid_of(folder)).max() <= 1, "plain Diffusers against the training script"

    labels = {"class_labels": [0, 1]} if conditional else {}

    def sample(pipeline, steps, **solver):
        pipeline.set_progress_bar_config(disable=True)
        draws = generators(2, SEED)
        return pipeline(
            batch_size=2, num_inference_steps=steps, generator=draws, output_type="np", **labels, **solver
        ).images

    stock, ours = DiffusionPipeline.from_pretrained(folder), STFPipeline.from_pretrained(folder)
    assert stock.unet.config.num_class_embeds == (2 if conditional else None)
    np.testing.assert_allclose(sample(stock, STEPS), plain, atol=1e-5)
    assert np.abs(sample(ours, STEPS, solver="scheduler") - plain).max() < 1e-4
    if channels == 3:
        # Other solver, other steps, same flow: both converge to it.
        heun, saved = sample(ours, 60, solver="heun"), sample(ours, 120, solver="scheduler")
        assert np.sqrt(np.mean((heun - saved) ** 2)) < 0.01


def test_no_pickle_is_loaded(folders, tmp_path, image_folder):
    folder, sprung = tmp_path / "trapped", tmp_path / "sprung"
    shutil.copytree(folders["edm", 3, False], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Trap(sprung), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        STFPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="pickles"):
        STFPipeline.from_pretrained(folder, use_safetensors=False)
    flags = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "out", "--report_to", "none"]
    flags += ["--train_batch_size", 4, "--image_mode", "RGB", "--resolution", 8]
    with pytest.raises(OSError, match="safetensors"):
        train([*flags, "--pretrained_model_name_or_path", folder])
    assert not sprung.exists()


def test_the_flow_is_not_trivial(folders):
    """The runs above compare pictures that differ between images and are not all black and white."""
    for (process, *_), folder in folders.items():
        images = np.load(folder / "plain.npy")
        assert np.abs(images[0] - images[1]).mean() > 0.1
        if process == "edm":
            assert np.mean((images > 0.01) & (images < 0.99)) > 0.5
