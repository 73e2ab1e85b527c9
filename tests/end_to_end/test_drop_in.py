"""The scripts of examples/drop_in: each trains, alone where it is copied, and both sides of a pair are one run but for targets.

A pair is run on the same batches, so that with one reference it must end with the same weights, bit for bit.
"""

import functools
import importlib
import json
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from conftest import EXAMPLES
from oracles import TABLE, posterior, rows
from stf_diffusers import ReferenceBatchCollator, ReferenceBatchSampler, STFTrainingObjective

sys.path.append(str(EXAMPLES / "drop_in"))
import class_conditional_stf
import flow_stf

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

PAIRS, SIDES = ("unconditional", "class_conditional", "latent", "flow"), ("dsm", "stf")
# Of a StableDiffusion3Pipeline: what the folder of the flow scripts lacks.
MISSING = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
every_pair = pytest.mark.parametrize("pair", PAIRS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory):
    """16 grey images of 8x8: two captions of five images each, six of one."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(1)
    captions = ["a dark square"] * 5 + ["a noisy square"] * 5 + [f"square number {i}" for i in range(6)]
    with (folder / "metadata.jsonl").open("w") as lines:
        for index, caption in enumerate(captions):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index:02d}.png")
            lines.write(json.dumps({"file_name": f"{index:02d}.png", "text": caption}) + "\n")
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=2, scaling_factor=0.5,
    )  # fmt: skip
    vae.save_pretrained(folder := tmp_path_factory.mktemp("vae"))
    return folder


@pytest.fixture
def train(tmp_path, image_folder, captioned_folder, vae_folder):
    """train(pair, side, *flags): a run of three steps through `main(argv)`; returns the folder that it saved."""

    def run(pair, side, *flags):
        folder = tmp_path / f"run_{len(list(tmp_path.glob('run_*')))}"
        data = captioned_folder if pair == "flow" else image_folder
        own = {"latent": ("--vae", vae_folder, "--resolution", 16)}.get(pair, ("--resolution", 8))
        common = ("--train_data_dir", data, "--output_dir", folder, "--max_train_steps", 3, "--train_batch_size", 4)
        importlib.import_module(f"{pair}_{side}").main([str(flag) for flag in (*common, *own, *flags)])
        return folder

    return run


@pytest.fixture
def same_batches(monkeypatch):
    """same_batches(pair, n): both sides read the lists of one ReferenceBatchSampler, n images at a time."""

    def patch(pair, n):
        def loader(dataset, batch_size, shuffle):
            sampler = ReferenceBatchSampler(len(dataset), batch_size, n)
            return DataLoader(dataset, batch_sampler=sampler, collate_fn=ReferenceBatchCollator(batch_size))

        def sampler(num_examples, batch_size, reference_batch_size, seed):
            return ReferenceBatchSampler(num_examples, batch_size, n)

        monkeypatch.setattr(importlib.import_module(f"{pair}_dsm"), "DataLoader", loader)
        monkeypatch.setattr(importlib.import_module(f"{pair}_stf"), "ReferenceBatchSampler", sampler)

    return patch


@pytest.fixture
def targets(monkeypatch):
    """The arguments and results of the calls of `STFTrainingObjective.target`, as they are made."""
    calls, target = [], STFTrainingObjective.target

    @functools.wraps(target)
    def recorded(self, clean, noise, timesteps, **conditions):
        result = target(self, clean, noise, timesteps, **conditions)
        calls.append({"clean": clean, "noise": noise, "timesteps": timesteps, "target": result, **conditions})
        return result

    monkeypatch.setattr(STFTrainingObjective, "target", recorded)
    return calls


def weights(folder):
    (file,) = (*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors"))
    return load_file(file)


def same_weights(folder, other):
    one, two = weights(folder), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def sample(pair, pipe):
    """Two images (2, H, W, C) in few steps."""
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    if pair == "class_conditional":
        return pipe(batch_size=2, class_labels=[0, 1], output_type="np", **steps).images
    if pair != "flow":
        return pipe(batch_size=2, output_type="np", **steps).images
    (prompts, pooled), (empty, empty_pooled) = map(flow_stf.embed_captions, (["a dark square", "a cat"], [""] * 2))
    return pipe(
        prompt_embeds=prompts, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
        negative_pooled_prompt_embeds=empty_pooled, guidance_scale=3.0, output_type="latent", **steps,
    ).images.permute(0, 2, 3, 1).numpy()  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@every_pair
def test_trains_saves_loads_and_samples(train, pair, side):
    folder = train(pair, side)
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(MISSING if pair == "flow" else ()))
    result = sample(pair, pipe)
    size, channels = (16 if pair == "latent" else 8), (1 if pair == "flow" else 3)
    assert result.shape == (2, size, size, channels)
    assert np.isfinite(result).all() and result.std() > 0.01
    network = getattr(pipe, "transformer", None) or pipe.unet
    assert all(parameter.isfinite().all() for parameter in network.parameters())


COPIES = """
import json, os, runpy, sys
for script, *flags in json.loads(sys.argv[1]):
    os.chdir(os.path.dirname(script))
    sys.argv = [script, *flags, "--max_train_steps", "1", "--train_batch_size", "4", "--output_dir", "run"]
    runpy.run_path(script, run_name="__main__")
"""
PLAIN_DIFFUSERS = f"""
import sys
sys.modules["stf_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], **dict.fromkeys({MISSING}))
embeddings = dict(prompt_embeds=torch.randn(2, 16, 32), pooled_prompt_embeds=torch.randn(2, 32))
images = pipe(**embeddings, guidance_scale=1.0, num_inference_steps=2, output_type="latent").images
assert images.shape == (2, 1, 16, 16) and images.isfinite().all()
"""


def test_each_runs_where_it_is_copied_alone(tmp_path, vae_folder):
    """On the digits, in a process that starts outside the checkout; what is saved needs Diffusers alone."""
    runs = []
    for script in sorted((EXAMPLES / "drop_in").glob("*.py")):
        (folder := tmp_path / script.stem).mkdir()
        flags = ("--vae", str(vae_folder), "--resolution", "16") if script.stem.startswith("latent") else ()
        runs.append([str(shutil.copy(script, folder)), *flags])
    subprocess.run([sys.executable, "-c", COPIES, json.dumps(runs)], cwd=tmp_path, check=True, timeout=300)
    assert all((tmp_path / f"{pair}_{side}" / "run" / "model_index.json").exists() for pair in PAIRS for side in SIDES)
    saved = tmp_path / "flow_stf" / "run"
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, saved], cwd=tmp_path, check=True, timeout=120)


def test_data_that_lack_a_column_are_refused(train, tmp_path, captioned_folder, image_folder):
    (tmp_path / "table" / "part").mkdir(parents=True)
    (tmp_path / "table" / "part" / "train.csv").write_text("number\n1\n2\n")
    with pytest.raises(ValueError, match=r"columns \['number'\], none of them images"):
        train("unconditional", "stf", "--dataset_name", tmp_path / "table", "--train_data_dir", "part")
    with pytest.raises(ValueError, match=r"No column of \['image', 'text'\] is 'label'"):
        train("class_conditional", "stf", "--train_data_dir", captioned_folder)
    with pytest.raises(ValueError, match=r"columns \['image', 'label'\]: pass one of them to --caption_column"):
        train("flow", "stf", "--train_data_dir", image_folder)


# ---- one reference is denoising score matching


@pytest.mark.parametrize("flags", [
    ("--prediction_type", "epsilon"),
    ("--prediction_type", "sample", "--random_flip"),
    ("--prediction_type", "v_prediction", "--snr_gamma", "5"),
    ("--prediction_type", "v_prediction", "--mixed_precision", "bf16"),
], ids=" ".join)  # fmt: skip
def test_one_reference_trains_the_same_weights(train, same_batches, flags):
    same_batches("unconditional", 1)
    before = train("unconditional", "dsm", *flags, "--train_batch_size", 1)
    after = train("unconditional", "stf", *flags, "--train_batch_size", 1)
    assert same_weights(before, after)
    assert not same_weights(before, train("unconditional", "stf", *flags, "--train_batch_size", 1, "--seed", 1))


def test_one_latent_trains_the_same_weights(train, same_batches):
    same_batches("latent", 1)
    before, after = (train("latent", side, "--train_batch_size", 1) for side in ("dsm", "stf"))
    assert same_weights(before, after)


@pytest.mark.parametrize("pair", ["class_conditional", "flow"])
def test_a_bank_of_one_image_trains_the_same_weights(train, pair, tmp_path, captioned_folder):
    """Whether the condition is dropped or not."""
    dropout = {"class_conditional": "--label_dropout", "flow": "--caption_dropout"}[pair]
    folder = tmp_path / "one" / "train"
    folder.mkdir(parents=True)
    shutil.copy(captioned_folder / "00.png", folder)
    row = {"file_name": "00.png", "text": "a square", "label": 0}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    flags = ("--train_data_dir", tmp_path / "one", dropout, 0.5, "--max_train_steps", 6)
    before, after = (train(pair, side, *flags) for side in ("dsm", "stf"))
    assert same_weights(before, after)


def test_unique_captions_train_the_same_weights(train, tmp_path, captioned_folder, targets):
    """Free text of which nothing is dropped: every row is alone with its caption. What is dropped makes the difference."""
    folder = tmp_path / "unique"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as lines:
        for index in range(16):
            shutil.copy(captioned_folder / f"{index:02d}.png", folder)
            lines.write(json.dumps({"file_name": f"{index:02d}.png", "text": f"square number {index}"}) + "\n")

    def run(side, dropout):
        return train("flow", side, "--train_data_dir", folder, "--caption_dropout", dropout)

    assert same_weights(run("dsm", 0), run("stf", 0))
    assert all(torch.equal(call["target"], call["noise"] - call["clean"]) for call in targets)
    assert not same_weights(run("dsm", 1), run("stf", 1))


# ---- more references: the targets are the posterior mean's, and nothing else differs


@pytest.mark.parametrize("pair", ["unconditional", "latent"])
def test_more_references_train_other_weights(train, same_batches, pair):
    same_batches(pair, 12)
    before, again, after = (train(pair, side) for side in ("dsm", "dsm", "stf"))
    assert same_weights(before, again) and not same_weights(before, after)


@pytest.mark.parametrize("pair", ["class_conditional", "flow"])
def test_a_bank_trains_other_weights(train, pair):
    before, again, after = (train(pair, side) for side in ("dsm", "dsm", "stf"))
    assert same_weights(before, again) and not same_weights(before, after)


def ddpm_coefficients(scheduler, timesteps):
    cumulative = scheduler.alphas_cumprod.double()[timesteps]
    return cumulative.sqrt(), (1 - cumulative).sqrt()


def assert_targets(calls, prediction_type, coefficients, reference=None, mask=None):
    """Every recorded target is y(posterior mean) in float64; some are far from the DSM target, some equal it."""
    changes = []
    for call in calls:
        clean, noise = call["clean"].double(), call["noise"].double()
        alpha, sigma = coefficients(call["timesteps"])
        noisy = rows(alpha, clean) * clean + rows(sigma, clean) * noise
        references = call["reference"] if reference is None else reference
        mean = posterior(noisy, references, alpha, sigma, mask and mask(call["labels"]))[1]
        a, b = (rows(coefficient, clean) for coefficient in TABLE[prediction_type](alpha, sigma))
        expected = a * mean + b * (noisy - rows(alpha, clean) * mean) / rows(sigma, clean)
        gain = a - b * rows(alpha / sigma, clean)
        assert ((call["target"] - expected).abs() <= 2e-5 * (1 + gain.abs())).all()
        changes.append((mean - clean).flatten(1).abs().amax(1))
    changes = torch.cat(changes)
    assert (changes > 0.1).any(), changes
    return changes


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_targets_of_the_unconditional_script(train, same_batches, targets, prediction_type):
    same_batches("unconditional", 12)
    train("unconditional", "stf", "--prediction_type", prediction_type, "--random_flip")
    coefficients = functools.partial(ddpm_coefficients, DDPMScheduler())
    changes = assert_targets(targets, prediction_type, coefficients)
    assert (changes < 1e-3).any(), changes  # at low noise
    assert all(torch.equal(call["reference"][:4], call["clean"]) and len(call["reference"]) == 12 for call in targets)


def test_targets_of_the_latent_script(train, same_batches, targets):
    """The latents that are noised are the first references, the very draws; another step's draws are others."""
    same_batches("latent", 24)
    train("latent", "stf", "--max_train_steps", 8)
    assert_targets(targets, "epsilon", functools.partial(ddpm_coefficients, DDIMScheduler()))
    assert all(torch.equal(call["reference"][:4], call["clean"]) for call in targets)
    sets = [{latent.numpy().tobytes() for latent in call["reference"]} for call in targets]
    assert len(set.union(*sets)) == 24 * len(sets)
    with pytest.raises(ValueError, match="do not contain the images they belong to"):
        objective = STFTrainingObjective.from_scheduler(DDIMScheduler())
        first, other = targets[:2]
        objective.target(first["clean"], first["noise"], first["timesteps"], reference=other["reference"])


def test_targets_of_the_class_conditional_script(train, targets, image_folder):
    """A row uses the images of its class, and all where its label was dropped."""
    train("class_conditional", "stf", "--label_dropout", 0.4, "--max_train_steps", 8)
    split = class_conditional_stf.load_images(None, str(image_folder))
    classes = torch.tensor(split["label"][:])
    reference = (
        torch.stack([class_conditional_stf.to_pixels(image, 8, 3) for image in split["image"]]).double() / 127.5 - 1
    )

    def mask(labels):
        return (labels[:, None] == classes) | (labels == -1)[:, None]

    def coefficients(timesteps):
        return torch.ones(len(timesteps), dtype=torch.float64), (4 * timesteps.double()).exp()

    assert_targets(targets, "sample", coefficients, reference, mask)
    labels = torch.cat([call["labels"] for call in targets])
    assert set(labels.tolist()) == {-1, 0, 1}
    with pytest.raises(AssertionError):  # the classes matter
        assert_targets(targets, "sample", coefficients, reference)


def test_targets_of_the_flow_script(train, targets, captioned_folder):
    """A row uses the images of its caption, which may be itself alone, and all where the caption was dropped."""
    train("flow", "stf", "--caption_dropout", 0.4, "--max_train_steps", 8)
    split = flow_stf.load_images(None, str(captioned_folder))
    captions = split["text"][:]
    reference = torch.stack([flow_stf.to_pixels(image, 8, 1) for image in split["image"]]).double() / 127.5 - 1
    numbers = torch.tensor([list(dict.fromkeys(captions)).index(caption) for caption in captions])

    def mask(labels):
        return (labels[:, None] == numbers) | (labels == -1)[:, None]

    def coefficients(timesteps):
        return 1 - timesteps.double() / 1000, timesteps.double() / 1000

    assert_targets(targets, "flow_prediction", coefficients, reference, mask)
    seen = torch.cat([call["labels"] for call in targets])
    unique = torch.cat([(call["target"] == call["noise"] - call["clean"]).flatten(1).all(1) for call in targets])
    assert unique[seen > 1].all() and (seen > 1).any()
    assert (~unique)[seen == -1].any() and (~unique)[(seen == 0) | (seen == 1)].any()
    with pytest.raises(AssertionError):
        assert_targets(targets, "flow_prediction", coefficients, reference)
