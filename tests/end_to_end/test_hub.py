"""Pushing a trained pipeline with the real client to a local server that speaks the Hub's API, and loading it back."""

import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image
from test_training import tiny_autoencoder

from conftest import EXAMPLES, ROOT
from hub_server import Hub, serve
from stf_diffusers.export import read_metadata

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
        "--num_inference_steps", 2, "--report_to", "tensorboard", "--push_to_hub",
    ]  # fmt: skip
    return lambda endpoint, *more, **keywords: run(endpoint, *((*base, *more) if not keywords else more), **keywords)


def test_push_and_load_back(run, tmp_path):
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
        grid = {"samples/step-0000002.png"}
        assert files == weights | configs | grid, "the pipeline, its card and its grid, and nothing else"
        assert hub.private["somebody/blobs"]
        written = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
        assert not [path for path in written if hub.token.encode() in path.read_bytes()], "the token stays a secret"
        card = hub.files["somebody/blobs"]["README.md"].decode()
        assert card.count('from_pretrained("somebody/blobs")') == 2 and "library_name: diffusers" in card
        assert "(samples/step-0000002.png)" in card
        loaded = run(endpoint, script=LOAD)
        assert loaded.stdout.split() == ["ConsistencyModelPipeline", "2"], loaded.stderr[-2000:]


def test_a_latent_model_is_pushed_with_its_autoencoder(run, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    dit = {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1,
        "patch_size": 2, "norm_num_groups": 4,
    }  # fmt: skip
    (tmp_path / "dit.json").write_text(json.dumps(dit))
    hub = Hub()
    with serve(hub) as endpoint:
        more = [
            "--vae",
            tmp_path / "vae",
            "--noise_process",
            "vp",
            "--class_conditional",
            "--model_config",
            tmp_path / "dit.json",
        ]
        done = run(endpoint, "--hub_model_id", "somebody/blobs", "--hub_token", hub.token, *more)
        assert done.returncode == 0, done.stderr[-2000:]
        parts = {name.split("/")[0] for name in hub.files["somebody/blobs"]}
        assert {"transformer", "transformer_raw", "vae", "scheduler", "model_index.json"} <= parts
        loaded = run(endpoint, script=LOAD.replace("batch_size=2", "class_labels=[0, 1], guidance_scale=1.0"))
        assert loaded.stdout.split() == ["DiTPipeline", "2"], loaded.stderr[-2000:]


def test_a_refused_token_stops_the_run_before_it_starts(run, tmp_path):
    hub = Hub()
    with serve(hub) as endpoint:
        done = run(endpoint, "--hub_model_id", "somebody/blobs", "--hub_token", "wrong")
    assert done.returncode != 0
    assert "Invalid credentials" in done.stderr and "--hub_token" in done.stderr
    assert not (tmp_path / "blobs").exists()


@pytest.mark.parametrize("fault", [401, 403, 429, 500, 0])
def test_a_repository_that_cannot_be_made_says_what_to_do(fault, monkeypatch):
    hub = Hub()
    hub.faults["create"] = [fault] * 100
    refused = pytest.raises(ValueError, match=r"somebody/blobs cannot be made or opened.*--hub_token")
    with serve(hub) as endpoint, refused:
        uploader(endpoint, hub, monkeypatch)


def cifar10_like(num_train):
    """Files of a repository of a data set with the columns, the folders and the classes of CIFAR-10."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdefghij"))})
    draw = np.random.default_rng(0)
    files = {"README.md": b"---\nlicense: unknown\n---\n# Like CIFAR-10\n"}
    for split, length in (("train", num_train), ("test", 4)):
        images = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(length)]
        columns = {"img": images, "label": [row % 10 for row in range(length)]}
        buffer = io.BytesIO()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(buffer)
        files[f"plain_text/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    return files


def test_trains_on_a_data_set_of_the_hub_by_its_old_name(run, tmp_path):
    hub = Hub()
    hub.files["datasets/uoft-cs/cifar10"] = cifar10_like(num_train=12)
    hub.moved["cifar10"] = "uoft-cs/cifar10"
    arguments = [
        "--dataset_name", "cifar10", "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "out",
        "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 1, "--num_inference_steps", 2,
        "--report_to", "none", "--class_conditional",
    ]  # fmt: skip
    with serve(hub) as endpoint:
        done = run(endpoint, *arguments, script=EXAMPLES / "train_unconditional_stf.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 images of (3, 32, 32)" in done.stderr
    metadata = read_metadata(tmp_path / "out")
    assert (metadata["num_images"], metadata["num_classes"]) == (12, 10)


LOAD_DATA = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from image_data import load_split
for name in sys.argv[1:]:
    try:
        load_split(name)
    except Exception as error:
        print(name, "|", type(error).__name__, "|", str(error).replace(chr(10), " "))
"""


def test_a_data_set_that_cannot_be_read_is_named(run):
    hub = Hub()
    faults = [401, 403, 404, 500, 0]
    hub.broken = {f"somebody/answers-{fault}": fault for fault in faults} | {"/short": 500}
    with serve(hub) as endpoint:
        done = run(
            endpoint, *(f"somebody/answers-{fault}" for fault in faults), "short", "unheard-of", script=LOAD_DATA
        )
    lines = done.stdout.splitlines()
    assert len(lines) == len(faults) + 2, done.stderr[-2000:]
    for line in lines:
        name, _, message = line.split(" | ")
        assert name in message, line
    assert "owner/unheard-of" in lines[-1]


def test_commits_at_chosen_steps_onto_an_existing_repository(run, tmp_path):
    hub = Hub()
    hub.files["somebody/blobs"], hub.private["somebody/blobs"] = {}, False
    with serve(hub) as endpoint:
        more = ["--hub_model_id", "somebody/blobs", "--hub_token", hub.token, "--hub_steps", 1]
        assert run(endpoint, *more).returncode == 0
        assert [message for _, message in hub.commits] == ["Pipeline after 1 steps", "Pipeline after 2 steps"]
        more += ["--resume_from_checkpoint", "latest", "--max_train_steps", 3]
        assert run(endpoint, *more).returncode == 0
        assert hub.commits[-1] == ("somebody/blobs", "Pipeline after 3 steps")


@pytest.mark.parametrize("where", ["commit", "store"])
@pytest.mark.parametrize("fault", [500, 429, 409, 0])
def test_an_upload_that_fails_is_tried_again(fault, where, tmp_path, monkeypatch, caplog):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.png").write_bytes(b"picture")
    hub = Hub()
    with serve(hub) as endpoint:
        upload = uploader(endpoint, hub, monkeypatch)
        hub.faults[where] = [fault]
        upload.push(tmp_path, "message", tmp_path / "samples" / "grid.png")
        upload.report(tmp_path)
    assert hub.files["somebody/blobs"] == {"README.md": b"card", "samples/grid.png": b"picture"}
    assert not upload.missing and "NOT on the Hub" not in caplog.text
    assert not list(tmp_path.glob(".upload-*"))


# The client itself tries storing again for half a minute after each 500.
@pytest.mark.parametrize(
    "fault, where", [(401, "commit"), (403, "commit"), (500, "commit"), (401, "store"), (403, "store")]
)
def test_an_upload_that_never_succeeds_is_reported_not_raised(fault, where, tmp_path, monkeypatch, caplog):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.png").write_bytes(b"picture")
    hub = Hub()
    with serve(hub) as endpoint:
        upload = uploader(endpoint, hub, monkeypatch)
        hub.faults[where] = [fault] * 100
        upload.push(tmp_path, "message", tmp_path / "samples" / "grid.png")
        upload.report(tmp_path)
    assert hub.files["somebody/blobs"] == {}
    assert f"injected fault {fault}" in caplog.text and "NOT on the Hub" in caplog.text and "hf upload" in caplog.text


def test_a_commit_that_is_missing_is_told_although_later_ones_arrived(tmp_path, monkeypatch, caplog):
    grid = tmp_path / "samples" / "grid.png"
    hub = Hub()
    with serve(hub) as endpoint:
        upload = uploader(endpoint, hub, monkeypatch)
        hub.faults["commit"] = [403] * 3
        for step in (1, 2):
            (tmp_path / "README.md").write_text(f"after {step}")  # the snapshot keeps what was pushed
            upload.push(tmp_path, f"step {step}", grid)
        upload.report(tmp_path)
    assert hub.files["somebody/blobs"]["README.md"] == b"after 2"
    assert [message for _, message in hub.commits] == ["step 2"]
    assert "these commits before it are not: 'step 1'" in caplog.text


def test_a_hub_that_never_answers_holds_up_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "README.md").write_text("card")
    hub = Hub()
    with serve(hub) as endpoint:
        upload = uploader(endpoint, hub, monkeypatch)
        hub.faults["commit"] = ["silence"]
        upload.push(tmp_path, "message", tmp_path / "samples" / "grid.png")
        upload.report(tmp_path, patience=1)
        hub.silence.set()
    assert "NOT on the Hub: 'message' (not finished)" in caplog.text


def uploader(endpoint, hub, monkeypatch):
    from hub_upload import HfApi, HubUpload

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("hub_upload.HfApi", lambda token: HfApi(endpoint=endpoint, token=token))
    return HubUpload("somebody/blobs", hub.token, private=True, first_delay=0.01)


def test_a_pipeline_pushes_itself(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from stf_diffusers import STFPipeline
    from stf_diffusers.export import diffusers_pipeline
    from test_export import PROCESSES, small_unet

    metadata = {"steps": 7, "images_seen": 70, "use_ema": True, "reference_batch_size": 4096}
    stock = diffusers_pipeline(small_unet(), PROCESSES["ve"], metadata=metadata)
    hub = Hub()
    with serve(hub) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("stf_diffusers.pipeline_stf.HfApi", lambda token: HfApi(endpoint=endpoint, token=token))
        pipeline = STFPipeline(stock.unet, stock.scheduler)
        pipeline.push_to_hub(
            "somebody/ve",
            private=True,
            token=hub.token,
            dataset="blobs",
            license="apache-2.0",
            metrics={"Fréchet distance of 64 samples": 12.34567},
        )
    files = hub.files["somebody/ve"]
    assert json.loads(files["model_index.json"])["_class_name"] == "DDPMPipeline" and hub.private["somebody/ve"]
    card = files["README.md"].decode()
    assert "| Fréchet distance of 64 samples | 12.35 |" in card
    assert "samples/grid.png" in files and "(samples/grid.png)" in card
    assert "license: apache-2.0" in card and "4,096" in card and "blobs" in card and "DDPMPipeline" not in card
