"""Pushing a trained pipeline with the real client to a local server that speaks the Hub's API, and loading it back."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi
from PIL import Image

from exact_networks import small_unet
from hub_server import Hub, serve
from stf_diffusers import VE, STFPipeline
from stf_diffusers.export import diffusers_pipeline, read_metadata
from stf_diffusers.training import hub_upload
from tiny import CPU, EXAMPLES, ROOT, TINY, TINY_TRANSFORMER, tiny_autoencoder

# One process trains for all the tests that ask for `runs`.
pytestmark = pytest.mark.xdist_group("hub")

# The client reads HF_ENDPOINT as it is imported: a process of its own, for all runs and data sets.
RUN = """
import json, sys
from unittest.mock import patch
from stf_diffusers.training.data_set import load_split
from tiny import train
runs, data_sets = json.loads(sys.argv[1])
said = {}
for name, argv in runs.items():
    try:
        said[name] = train(argv)
    except Exception as error:
        said[name] = str(error)
for name in data_sets:
    try:
        with patch("time.sleep"):  # the client waits longer and longer for a server that fails
            load_split(name)
    except Exception as error:
        said[name] = str(error)
print(json.dumps(said))
"""

LOAD = """
import sys
sys.modules["stf_diffusers"] = None
from diffusers import DiffusionPipeline
for name, labels in (("somebody/blobs", {"batch_size": 2}), ("somebody/latents", {"class_labels": [0, 1], "guidance_scale": 1.0})):
    pipe = DiffusionPipeline.from_pretrained(name)
    print(type(pipe).__name__, len(pipe(num_inference_steps=3, **labels).images))
"""

FAULTS = (401, 403, 404, 500, 0)


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder):
    """What lies in the folder and on the server after several runs with an empty cache, and what they and a reader said."""
    root, hub = tmp_path_factory.mktemp("hub"), Hub()
    hub.files["datasets/uoft-cs/cifar10"] = cifar10_like(num_train=12)
    hub.moved["cifar10"] = "uoft-cs/cifar10"
    hub.broken = {f"somebody/answers-{fault}": fault for fault in FAULTS} | {"/short": 500}
    (root / "net.json").write_text(json.dumps(TINY))
    (root / "dit.json").write_text(json.dumps(TINY_TRANSFORMER))
    tiny_autoencoder().save_pretrained(root / "vae")
    base = ["--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 1, "--num_inference_steps", 2]
    images = ["--train_data_dir", image_folder, "--checkpointing_steps", 1, "--report_to", "tensorboard"]
    token = ["--push_to_hub", "--hub_token", hub.token]
    blobs = [*base, *images, *token, "--model_config", root / "net.json", "--output_dir", root / "blobs"]
    blobs += ["--hub_model_id", "somebody/blobs", "--hub_steps", 1]
    latents = [
        "--vae",
        root / "vae",
        "--noise_process",
        "vp",
        "--class_conditional",
        "--model_config",
        root / "dit.json",
    ]
    cifar = ["--dataset_name", "cifar10", "--class_conditional", "--model_config", root / "net.json"]
    argvs = {
        "private": [*blobs, "--hub_private_repo"],
        "resumed": [*blobs, "--resume_from_checkpoint", "latest", "--max_train_steps", 3],
        "latents": [
            *base,
            *images,
            *token,
            *latents,
            "--hub_model_id",
            "somebody/latents",
            "--output_dir",
            root / "latents",
        ],
        "refused": [
            *blobs,
            "--hub_model_id",
            "somebody/refused",
            "--hub_token",
            "wrong",
            "--output_dir",
            root / "refused",
        ],
        "cifar10": [*base, *cifar, "--report_to", "none", "--output_dir", root / "cifar10"],
    }
    data_sets = [*(f"somebody/answers-{fault}" for fault in FAULTS), "short", "unheard-of"]
    argument = json.dumps([{name: [str(part) for part in argv] for name, argv in argvs.items()}, data_sets])
    environment = os.environ | CPU | {"HF_HOME": str(root / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN", None)
    paths = [str(EXAMPLES), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    with serve(hub) as endpoint:
        printed = []
        for command in ([RUN, argument], [LOAD]):
            done = subprocess.run(
                [sys.executable, "-c", *command], cwd=ROOT, text=True, capture_output=True, timeout=300,
                env=environment | {"HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            printed.append(done.stdout)
    said = json.loads(printed[0].splitlines()[-1])
    return SimpleNamespace(root=root, hub=hub, said=said, data_sets=data_sets, loaded=printed[1].splitlines())


def test_push_and_load_back(runs):
    hub = runs.hub
    assert runs.said["private"] is None, "no error"
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "unet_raw")}
    configs = {"scheduler/scheduler_config.json", "unet/config.json", "unet_raw/config.json", "model_index.json"}
    grids = {f"samples/step-000000{step}.png" for step in (1, 2, 3)}
    found = set(hub.files["somebody/blobs"])
    assert found == weights | configs | grids | {"README.md"}, "the pipeline, its card and its grids, and nothing else"
    assert hub.private["somebody/blobs"] and not hub.private["somebody/latents"]
    written = [path for path in runs.root.rglob("*") if path.is_file()]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()], "the token stays a secret"
    card = hub.files["somebody/blobs"]["README.md"].decode()
    assert card.count('from_pretrained("somebody/blobs")') == 2 and "library_name: diffusers" in card
    assert "(samples/step-0000003.png)" in card
    assert runs.loaded[0] == "ConsistencyModelPipeline 2"


def test_commits_at_chosen_steps_and_onto_an_existing_repository(runs):
    assert runs.said["resumed"] is None
    found = [message for repository, message in runs.hub.commits if repository == "somebody/blobs"]
    assert found == [f"Pipeline after {step} steps" for step in (1, 2, 3)]


def test_a_latent_model_is_pushed_with_its_autoencoder(runs):
    assert runs.said["latents"] is None
    parts = {name.split("/")[0] for name in runs.hub.files["somebody/latents"]}
    assert {"transformer", "transformer_raw", "vae", "scheduler", "model_index.json"} <= parts
    assert runs.loaded[1] == "DiTPipeline 2"


def test_a_refused_token_stops_the_run_before_it_starts(runs):
    assert "Invalid credentials" in runs.said["refused"] and "--hub_token" in runs.said["refused"]
    assert not (runs.root / "refused").exists()


def test_trains_on_a_data_set_of_the_hub_by_its_old_name(runs):
    assert runs.said["cifar10"] is None
    metadata = read_metadata(runs.root / "cifar10")
    assert (metadata["num_images"], metadata["num_classes"]) == (12, 10)
    assert metadata["image_shape"] == [3, 32, 32]


def test_a_data_set_that_cannot_be_read_is_named(runs):
    for name in runs.data_sets:
        assert name in runs.said[name]
    assert "owner/unheard-of" in runs.said["unheard-of"]


@pytest.mark.parametrize("fault", [401, 403, 429, 500, 0])
def test_a_repository_that_cannot_be_made_says_what_to_do(fault, monkeypatch):
    hub = Hub()
    hub.faults["create"] = [fault] * 100
    refused = pytest.raises(ValueError, match=r"somebody/blobs cannot be made or opened.*hub_token=")
    with serve(hub) as endpoint, refused:
        uploader(endpoint, hub, monkeypatch)


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
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_upload, "HfApi", lambda token: HfApi(endpoint=endpoint, token=token))
    return hub_upload.HubUpload("somebody/blobs", hub.token, private=True, first_delay=0.01)


def test_a_pipeline_pushes_itself(tmp_path, monkeypatch):
    metadata = {"steps": 7, "images_seen": 70, "use_ema": True, "reference_batch_size": 4096}
    stock = diffusers_pipeline(small_unet(), VE(), metadata=metadata)
    hub = Hub()
    with serve(hub) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("stf_diffusers.upload.HfApi", lambda token: HfApi(endpoint=endpoint, token=token))
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
