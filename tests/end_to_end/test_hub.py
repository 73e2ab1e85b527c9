"""Pushing a trained pipeline with the real client to a local server that speaks the Hub's API, and loading it back."""

import json
import os
import subprocess
import sys

import pytest

from conftest import EXAMPLES, ROOT
from hub_server import Hub, serve

TINY = {
    "_class_name": "UNet2DModel", "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip

LOAD = """
import sys
sys.modules["stf_diffusers"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("somebody/blobs")
print(type(pipe).__name__, len(pipe(batch_size=2, num_inference_steps=3).images))
"""


@pytest.fixture
def run(tmp_path, image_folder):
    """Runs the training script against a server, in a process of its own with an empty cache."""
    (tmp_path / "net.json").write_text(json.dumps(TINY))

    def run(endpoint, *argv, script=EXAMPLES / "train_unconditional_stf.py"):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        environment.pop("HF_TOKEN", None)
        command = [sys.executable, "-c", script] if isinstance(script, str) else [sys.executable, str(script)]
        return subprocess.run(
            [*command, *map(str, argv)], env=environment, cwd=ROOT, text=True, capture_output=True, timeout=240
        )

    base = [
        "--train_data_dir", image_folder, "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "blobs",
        "--train_batch_size", 4, "--max_train_steps", 2, "--checkpointing_steps", 1, "--num_samples", 1,
        "--num_inference_steps", 2, "--report_to", "none", "--push_to_hub",
    ]  # fmt: skip
    return lambda endpoint, *more, **keywords: run(endpoint, *((*base, *more) if not keywords else more), **keywords)


def test_push_and_load_back(run):
    hub = Hub()
    with serve(hub) as endpoint:
        done = run(endpoint, "--hub_model_id", "somebody/blobs", "--hub_private_repo", "--hub_token", hub.token)
        assert done.returncode == 0, done.stderr[-2000:]
        files = set(hub.files["somebody/blobs"])
        weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "unet_raw")}
        configs = {
            "README.md",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet_raw/config.json",
        }
        assert files == weights | configs, "the pipeline and its card, and nothing else"
        assert hub.private["somebody/blobs"]
        card = hub.files["somebody/blobs"]["README.md"].decode()
        assert 'from_pretrained("somebody/blobs")' in card and "library_name: diffusers" in card
        loaded = run(endpoint, script=LOAD)
        assert loaded.stdout.split() == ["ConsistencyModelPipeline", "2"], loaded.stderr[-2000:]


def test_a_refused_token_stops_the_run_before_it_starts(run, tmp_path):
    hub = Hub()
    with serve(hub) as endpoint:
        done = run(endpoint, "--hub_model_id", "somebody/blobs", "--hub_token", "wrong")
    assert done.returncode != 0
    assert "Invalid credentials" in done.stderr
    assert not (tmp_path / "blobs").exists()
