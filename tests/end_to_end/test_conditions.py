"""Training with classes and their dropout, orientations, latents and a transformer: what is trained, saved and sampled."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderDC, DiTTransformer2DModel, LDMPipeline
from PIL import Image
from test_training import TINY, same, tiny_autoencoder, weights

import train_unconditional_stf as script
from conditioning import Conditioning, orient
from oracles import images
from stf_diffusers import STFPipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

DIT = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
    "patch_size": 2, "norm_type": "ada_norm_zero", "attention_bias": True, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture
def flags(tmp_path, image_folder):
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    (tmp_path / "dit.json").write_text(json.dumps(DIT))
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    base = [
        "--train_data_dir", image_folder, "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "run",
        "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 2, "--num_inference_steps", 4,
        "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none",
    ]  # fmt: skip
    return lambda *more: [str(flag) for flag in (*base, *more)]


def seeds(count, seed=0):
    return [torch.Generator().manual_seed(script.seed_for(seed, index)) for index in range(count)]


def grid_of(folder):
    pixels = np.asarray(Image.open(folder / "samples" / "step-0000002.png"))[::8, ::8]
    return np.stack([pixels[:, :8], pixels[:, 8:16]]).astype(int)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Loads a folder where the package cannot be imported and samples it as its card says.
PLAIN = """
import json, re, sys
sys.modules["stf_diffusers"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
folder, seeds = json.loads(sys.argv[1])
card = open(folder + "/README.md").read()
(call,) = re.findall(r"images = pipe\\((.*num_inference_steps=4)\\).images", card)
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
call = call.replace("batch_size=4", "batch_size=2")
call = re.sub(r"class_labels=\\[(.*?)\\]", lambda m: "class_labels=[" + ", ".join(m[1].split(", ")[:2]) + "]", call)
call = re.sub(r"^(class_labels=\\[.*?\\]), num", r"\\1, guidance_scale=1.0, num", call)
generators = [torch.Generator().manual_seed(seed) for seed in seeds]
images = eval(f"pipe({call}, generator=generators, output_type='np')").images
np.save(folder + "/plain.npy", images)
print(type(pipe).__name__, call)
"""


def sampled_by_plain_diffusers(folder):
    arguments = json.dumps([str(folder), [script.seed_for(0, index) for index in range(2)]])
    done = subprocess.run([sys.executable, "-c", PLAIN, arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "plain.npy"), done.stdout


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


@pytest.mark.parametrize("case", CASES)
def test_trained_saved_and_sampled(case, flags, tmp_path):
    """By plain Diffusers, as the card says, and by `STFPipeline`: the images of the training script's grid."""
    more, kind = CASES[case]
    names = {"{vae}": tmp_path / "vae", "{dit}": tmp_path / "dit.json", "{dc}": tmp_path / "dc"}
    if "{dc}" in more:
        torch.manual_seed(0)
        AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        ).save_pretrained(tmp_path / "dc")  # fmt: skip
    train(flags(*(names.get(flag, flag) for flag in more)))
    run = tmp_path / "run"
    plain, said = sampled_by_plain_diffusers(run)
    assert said.startswith(kind) and plain.shape == (2, 8, 8, 3)
    levels = np.rint(plain * 255).astype(int)
    assert np.abs(levels - grid_of(run)).max() <= 1, "plain Diffusers against the training script"
    ours = quiet(STFPipeline.from_pretrained(run))
    labels = {"class_labels": [0, 1]} if "--class_conditional" in more else {}
    output = ours(2, 4, solver="scheduler", generator=seeds(2), output_type="np", **labels)
    np.testing.assert_allclose(output.images, plain, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    again = quiet(STFPipeline.from_pretrained(tmp_path / "again"))
    np.testing.assert_array_equal(
        again(2, 4, solver="scheduler", generator=seeds(2), output_type="np", **labels).images, output.images
    )
    if "--class_dropout" in more:
        guided = ours(2, 4, guidance_scale=3.0, generator=seeds(2), output_type="np", **labels).images
        unguided = ours(2, 4, generator=seeds(2), output_type="np", **labels).images
        assert np.isfinite(guided).all() and np.abs(guided - unguided).max() > 1e-3


def test_latent_runs_resume_bit_for_bit(flags, tmp_path):
    """Drawn latents and mirrored images too; the latents are encoded once."""
    more = ["--vae", tmp_path / "vae", "--random_flip", "--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    train(flags(*more))
    (cache,) = (tmp_path / "run").glob("latents-*.safetensors")
    encoded = cache.stat()
    train(flags(*more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"))
    assert cache.stat().st_mtime_ns == encoded.st_mtime_ns
    train(flags(*more, "--max_train_steps", 4, "--output_dir", tmp_path / "whole"))
    assert same(weights(tmp_path / "run", "unet_raw"), weights(tmp_path / "whole", "unet_raw"))


def test_fine_tuning_a_latent_model_keeps_its_scale(flags, tmp_path):
    train(flags("--vae", tmp_path / "vae", "--noise_process", "vp"))
    argv = [flag for flag in flags() if flag not in ("--model_config", str(tmp_path / "net.json"))]
    first, second = tmp_path / "run", tmp_path / "second"
    more = ["--pretrained_model_name_or_path", first, "--vae", first, "--output_dir", second, "--learning_rate", 1e-12]
    train([*argv, *map(str, more)])
    before, after = LDMPipeline.from_pretrained(first).vqvae, LDMPipeline.from_pretrained(second).vqvae
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scales = [part.config.scaling_factor for part in (before, after)]
    torch.testing.assert_close(before.decode(z / scales[0]).sample, after.decode(z / scales[1]).sample)
    with pytest.raises(ValueError, match=r"knows the latents of its own .* Pass --vae"):
        train([*argv, *map(str, more), "--vae", str(tmp_path / "vae"), "--overwrite_output_dir"])


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (["--class_conditional", "--class_dropout", 0.1], ["--class_conditional"], "class_dropout was 0.1 and is 0.0"),
        (["--reorient", 0.5], ["--reorient", 0.5, "--class_conditional"], "num_classes was None and is 2"),
        (["--class_conditional"], [], "num_classes was 2 and is None"),
    ],
)
def test_labels_keep_their_meaning_in_fine_tuning(before, now, message, flags, tmp_path):
    train(flags(*before, "--max_train_steps", 1))
    argv = [flag for flag in flags() if flag not in ("--model_config", str(tmp_path / "net.json"))]
    more = ["--pretrained_model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "second", *now]
    with pytest.raises(ValueError, match=re.escape(message)):
        train([*argv, *map(str, more)])


def test_a_transformer_without_dropout_is_not_guided(flags, tmp_path):
    more = ["--model_config", tmp_path / "dit.json", "--vae", tmp_path / "vae", "--noise_process", "vp"]
    train(flags(*more, "--class_conditional", "--max_train_steps", 1))
    pipeline = quiet(STFPipeline.from_pretrained(tmp_path / "run"))
    with pytest.raises(ValueError, match="null_label"):
        pipeline(1, 2, class_labels=0, guidance_scale=2.0)


def test_a_refused_run_replaces_no_latents(flags, tmp_path):
    more = ["--vae", tmp_path / "vae", "--noise_process", "vp"]
    train(flags(*more))
    (cache,) = (tmp_path / "run").glob("latents-*.safetensors")
    with pytest.raises(ValueError, match="belongs to another run"):
        train(flags(*more, "--random_flip", "--resume_from_checkpoint", "latest"))
    assert cache.exists()
    train(flags(*more, "--resume_from_checkpoint", "latest", "--max_train_steps", 3))
    assert list((tmp_path / "run").glob("latents-*.safetensors")) == [cache]
    assert str(tmp_path) not in (tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text()


def test_conditioning_draws():
    """Frequencies within five standard errors; the classes of the references follow the network's labels."""
    count = 20_000
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(3, class_dropout=0.2, reorient=0.6)
    network, classes, orientation = conditioning.draw(labels, count, torch.Generator().manual_seed(1))
    assert conditioning.embeddings == 32 and conditioning.null_label == 3
    dropped = classes == -1
    assert abs(dropped.double().mean() - 0.2) < 5 * (0.16 / count) ** 0.5
    assert torch.equal(classes[~dropped], labels[~dropped])
    assert torch.equal(network % 4, torch.where(dropped, 3, labels))
    assert torch.equal(network // 4, orientation)
    share = torch.bincount(orientation, minlength=8).double() / count
    expected = torch.tensor([0.4 + 0.6 / 8] + [0.6 / 8] * 7, dtype=torch.float64)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert Conditioning(None).draw(None, 4, torch.Generator()) == (None, None, None)
    network, classes, _ = Conditioning(None, transformer=True).draw(None, 4, torch.Generator())
    assert classes is None and network.tolist() == [1000] * 4


def test_orientations_are_the_eight_of_the_square():
    picture = images(1, 3, 4, 4).expand(8, -1, -1, -1)
    turned = orient(picture, torch.arange(8)).numpy()
    for number in range(8):
        plain = picture[0].numpy()
        plain = plain[:, :, ::-1] if number >= 4 else plain
        np.testing.assert_array_equal(turned[number], np.rot90(plain, number % 4, (1, 2)))
    assert len({turned[number].tobytes() for number in range(8)}) == 8


def test_a_transformer_does_not_drop_labels_by_itself(flags, tmp_path):
    """Diffusers' drops a tenth of them in training, in each block anew, unseen by the targets."""
    args = script.parse_args(flags("--model_config", tmp_path / "dit.json", "--class_conditional", "--vae", "x"))
    network, _ = script.build_network(args, (4, 4, 4), 2)
    stock = DiTTransformer2DModel.from_config(network.config)
    x, t, labels = torch.randn(64, 4, 4, 4), torch.full((64,), 500.0), torch.zeros(64, dtype=torch.int64)

    def embeddings(model):
        model.train()
        embed = model.transformer_blocks[0].norm1.emb
        return embed(t, labels, hidden_dtype=x.dtype)

    assert torch.equal(embeddings(network), embeddings(network)[:1].expand(64, -1))
    assert not torch.equal(embeddings(stock), embeddings(stock)[:1].expand(64, -1))


WRONG = {
    "dropout without classes": (["--class_dropout", 0.1], "needs --class_conditional"),
    "all classes dropped": (["--class_conditional", "--class_dropout", 1], "at most 0.99"),
    "latents without autoencoder": (["--latents", "mean"], "needs --vae"),
    "turned latents": (["--vae", "{vae}", "--reorient", 0.5], "turned latents are no latents"),
    "latents on disk": (
        ["--vae", "{vae}", "--latents", "mean", "--reference", "bank", "--reference_device", "disk"],
        "keeps images",
    ),
    "bank of drawn latents": (["--vae", "{vae}", "--reference", "bank", "--noise_process", "vp"], "latents are drawn"),
    "always the same draw": (
        ["--vae", "{vae}", "--train_batch_size", 1, "--objective", "dsm"],
        "would always be drawn the same",
    ),
    "classes of latents in a unet": (["--vae", "{vae}", "--class_conditional"], "Use a DiTTransformer2DModel"),
    "transformer of pixels": (["--model_config", "{dit}", "--noise_process", "vp"], "pass --vae"),
    "transformer on edm": (["--model_config", "{dit}", "--vae", "{vae}"], "--noise_process vp or flow"),
    "transformer turned": (["--model_config", "{dit}", "--reorient", 0.5], "needs a UNet2DModel"),
    "logit of uniform times": (["--noise_process", "flow", "--logit_mean", 1], "needs --time_distribution"),
    "times of another process": (["--time_distribution", "uniform"], "no parameter of --noise_process edm"),
    "no autoencoder": (["--vae", "/no/such/folder"], "/no/such/folder"),
    "grey images": (["--vae", "{vae}", "--image_mode", "L"], "--image_mode RGB"),
    "unknown network": (["--model_config", "{vae}/config.json"], "must be the config of a UNet2DModel or a DiT"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, flags, tmp_path, capsys):
    more, message = WRONG[case]
    places = {"vae": tmp_path / "vae", "dit": tmp_path / "dit.json"}
    argv = flags(*(flag.format(**places) if isinstance(flag, str) else flag for flag in more))
    with pytest.raises((ValueError, OSError, SystemExit)) as refusal:
        train(argv)
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "said before anything is encoded"
