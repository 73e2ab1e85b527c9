"""Every process, number of channels and kind of condition: two steps of training, then the folder in other hands."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from test_training import TINY

import train_unconditional_stf as script
from conftest import ROOT
from stf_diffusers import STFPipeline

# One process trains and keeps the folders for all the tests of this file.
pytestmark = [pytest.mark.xdist_group("trained_folders"), pytest.mark.usefixtures("fresh_accelerate_state")]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
RUNS = [
    (process, channels, conditional)
    for process in ("edm", "ve", "vp", "flow")
    for channels in MODES
    for conditional in (False, True)
]
SEED, STEPS = 5, 12

# Samples each folder with the generators of the training script's grid, where stf_diffusers cannot be imported.
PLAIN_DIFFUSERS = """
import json, sys
sys.modules["stf_diffusers"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
folders, seeds, steps = json.loads(sys.argv[1])
for folder in folders:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = {} if pipe.unet.config.num_class_embeds is None else {"class_labels": [0, 1]}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(batch_size=2, generator=generators, num_inference_steps=steps, output_type="np", **labels).images
    np.save(folder + "/plain.npy", images)
assert not [name for name in sys.modules if name.startswith("stf_diffusers.")]
"""


@pytest.fixture(scope="module")
def seeds():
    return [script.seed_for(SEED, index) for index in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, image_folder, seeds):
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
        train([str(flag) for flag in flags] + ["--class_conditional"] * conditional)
    arguments = json.dumps([[str(folder) for folder in found.values()], seeds, STEPS])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, arguments], cwd=ROOT.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def grid_of(folder):
    """The two images of the grid that the training saved, (2, 8, 8, 3) uint8, from its eightfold enlargement."""
    pixels = np.asarray(Image.open(folder / "samples" / "step-0000002.png"))[::8, ::8]
    return np.stack([pixels[:, :8], pixels[:, 8:16]])


def as_grid(images):
    """Images (2, 8, 8, C) in [0, 1] as the grid shows them: three channels, without alpha."""
    levels = np.rint(images * 255).astype(int)[..., :3]
    return np.broadcast_to(levels, (2, 8, 8, 3))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_all_readers_give_the_images_of_the_training_script(run, folders, seeds):
    _, channels, conditional = run
    folder = folders[run]
    plain = np.load(folder / "plain.npy")
    assert plain.shape == (2, 8, 8, channels)
    assert np.abs(as_grid(plain) - grid_of(folder)).max() <= 1, "plain Diffusers against the training script"

    pipeline = STFPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    labels = {"class_labels": [0, 1]} if conditional else {}

    def sample(solver, steps):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = pipeline(2, steps, solver=solver, generator=generators, output_type="np", **labels)
        return output.images

    assert np.abs(sample("scheduler", STEPS) - plain).max() < 1e-4, "STFPipeline with the saved scheduler"
    # Other solver, other steps, same flow: both converge to it.
    assert np.sqrt(np.mean((sample("heun", 60) - sample("scheduler", 120)) ** 2)) < 0.01


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_loaded(folders, tmp_path, image_folder):
    folder, sprung = tmp_path / "trapped", tmp_path / "sprung"
    shutil.copytree(folders["edm", 3, False], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Trap(sprung), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        STFPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="pickles"):
        STFPipeline.from_pretrained(folder, use_safetensors=False)
    flags = ["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    flags += ["--train_batch_size", "4", "--image_mode", "RGB", "--resolution", "8"]
    with pytest.raises(OSError, match="safetensors"):
        train([*flags, "--pretrained_model_name_or_path", str(folder)])
    assert not sprung.exists()


@pytest.mark.parametrize("file", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_a_checkpoint_with_a_trap_is_not_sprung(file, tmp_path, image_folder):
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    flags = [
        "--train_data_dir", image_folder, "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "out",
        "--train_batch_size", 4, "--max_train_steps", 1, "--checkpointing_steps", 1, "--num_samples", 1,
        "--num_inference_steps", 2, "--report_to", "none", "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    flags = [str(flag) for flag in flags]
    train(flags)
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "out" / "checkpoint-1" / file)
    # Accelerate goes on without random states that it cannot read. The script does not need them.
    refused = (
        nullcontext()
        if file.startswith("random")
        else pytest.raises(ValueError, match="cannot be loaded: it is damaged")
    )
    with refused:
        train(flags)
    assert not (tmp_path / "sprung").exists()


def test_the_flow_is_not_trivial(folders):
    """The runs above compare pictures that differ between images and are not all black and white."""
    for (process, *_), folder in folders.items():
        images = np.load(folder / "plain.npy")
        assert np.abs(images[0] - images[1]).mean() > 0.1
        if process == "edm":
            assert np.mean((images > 0.01) & (images < 0.99)) > 0.5
