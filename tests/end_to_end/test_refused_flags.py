"""Flags that are wrong, or wrong together: a message that names the fix, before anything is written."""

import json

import pytest
import torch
from accelerate.utils import DistributedType

import train_unconditional_stf as script
from stf_diffusers.training.launch import check_mode
from tiny import TINY_TRANSFORMER, mistake, tiny_autoencoder, train

OUT_OF_RANGE = {
    "--train_batch_size 0": "at least 1",
    "--max_train_steps 0": "at least 1",
    "--num_epochs -1": "at least 1",
    "--gradient_accumulation_steps 0": "at least 1",
    "--seed -1": "at least 0",
    "--p_std 0": "above 0",
    "--sigma_data 0": "above 0",
    "--sigma_data many": "invalid",
    "--adam_beta1 1.5": "at most 1",
    "--ema_max_decay 2": "at most 1",
    "--ema_power 0": "above 0",
    "--num_samples 0": "at least 1",
    "--num_inference_steps 1": "at least 2",
    "--checkpoints_total_limit 0": "at least 1",
    "--checkpointing_steps 0": "at least 1",
    "--logging_steps 0": "at least 1",
    "--lr_warmup_steps -1": "at least 0",
    "--lr_scheduler sawtooth": "invalid choice",
    "--lr_scheduler piecewise_constant": "invalid choice",
    "--mixed_precision fp8": "invalid choice",
    "--image_mode CMYK": "invalid choice",
    "--noise_process cosine": "invalid choice",
    "--resolution 0": "at least 1",
    "--reference_memory_gb 0": "above 0",
    "--dataloader_num_workers -1": "at least 0",
    "--learning_rate -1": "above 0",
    "--learning_rate inf": "above 0",
    "--learning_rate nan": "above 0",
    "--p_mean nan": "at least -20 and at most 20",
    "--p_std 1e6": "at most 10",
    "--num_inference_steps 2000": "at most 1000",
    "--epsilon_t 0.9": "at most 0.5",
    "--class_dropout 1": "at most 0.99",
    "--eval_num_samples 4": "must be at least 5",
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_values_out_of_range(case, capsys):
    flag, value = case.split()
    with pytest.raises(SystemExit) as refusal:
        script.parse_args([f"{flag}={value}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert refusal.value.code == 2
    assert f"error: argument {flag}" in said and value in said and OUT_OF_RANGE[case] in said


def test_a_flag_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--no_such_flag", "1"])
    assert "unrecognized arguments: --no_such_flag" in capsys.readouterr().err


WRONG = {
    "sampling range": (["--sigma_min", 10, "--sigma_max", 1], "sigma_min < sigma_max"),
    "batch above images": (["--train_batch_size", 25], "--train_batch_size 25"),
    "references above images": (["--reference_batch_size", 25], "exceeds the 24 images"),
    "references below batch": (["--reference_batch_size", 3], "includes the batch itself"),
    "bank for dsm": (["--objective", "dsm", "--reference", "bank"], "no effect with --objective dsm"),
    "bank of n": (["--reference", "bank", "--reference_batch_size", 8], "uses all images"),
    "device of a batch": (["--reference_device", "disk"], "needs --reference bank"),
    "references for dsm": (["--objective", "dsm", "--reference_batch_size", 8], "no effect with --objective dsm"),
    "foreign parameter": (["--noise_process", "vp", "--p_mean", 0], "--p_mean is not a parameter of --noise_process vp"),
    "range upside down": (["--noise_process", "ve", "--sigma_min", 5, "--sigma_max", 1], "sigma_min < sigma_max"),
    "noise lost in float32": (["--noise_process", "ve", "--sigma_min", "1e-4"], "Raise sigma_min"),
    "missing column": (["--image_column", "picture"], "has the columns"),
    "no labels there": (["--class_conditional", "--label_column", "kind"], "has the columns"),
    "resolution and network": (["--resolution", 9], "multiple of 2"),
    "named checkpoint missing": (["--resume_from_checkpoint", "checkpoint-7"], "no complete checkpoint"),
    "unknown tracker": (["--report_to", "abacus"], "installed trackers"),
    "two data sets": (["--dataset_name", "cifar10"], "--dataset_name and --train_data_dir exclude each other"),
    "hub flags alone": (["--hub_model_id", "a/b"], "need --push_to_hub"),
    "missing data": (["--train_data_dir", "/no/such/folder"], "/no/such/folder"),
    # Conditions and latents.
    "dropout without classes": (["--class_dropout", 0.1], "needs --class_conditional"),
    "latents without autoencoder": (["--latents", "mean"], "needs --vae"),
    "turned latents": (["--vae", "{vae}", "--reorient", 0.5], "turned latents are not latents"),
    "latents on disk": (
        ["--vae", "{vae}", "--latents", "mean", "--reference", "bank", "--reference_device", "disk"], "keeps images"
    ),
    "bank of drawn latents": (["--vae", "{vae}", "--reference", "bank", "--noise_process", "vp"], "latents are drawn"),
    "always the same draw": (
        ["--vae", "{vae}", "--train_batch_size", 1, "--objective", "dsm"], "would always be drawn the same"
    ),
    "classes of latents in a unet": (["--vae", "{vae}", "--class_conditional"], "Use a DiTTransformer2DModel"),
    "transformer of pixels": (["--model_config", "{dit}", "--noise_process", "vp"], "pass --vae"),
    "transformer on edm": (["--model_config", "{dit}", "--vae", "{vae}"], "--noise_process vp or --noise_process flow"),
    "transformer turned": (["--model_config", "{dit}", "--reorient", 0.5], "needs a UNet2DModel"),
    "logit of uniform times": (["--noise_process", "flow", "--logit_mean", 1], "needs --time_distribution"),
    "times of another process": (["--time_distribution", "uniform"], "not a parameter of --noise_process edm"),
    "no autoencoder": (["--vae", "/no/such/folder"], "/no/such/folder"),
    "grey images": (["--vae", "{vae}", "--image_mode", "L"], "--image_mode RGB"),
    "unknown network": (["--model_config", "{vae}/config.json"], "must be the config of a UNet2DModel or a DiT"),
    # Evaluations.
    "no extractor": (["--eval_steps", 2], "need each other"),
    "no steps": (["--eval_extractor", "x"], "need each other"),
    "no such extractor": (["--eval_steps", 2, "--eval_extractor", "/nowhere"], "--eval_extractor /nowhere"),
    "evaluation of a stream": (["--eval_steps", 2, "--eval_extractor", "x", "--streaming"], "does not keep"),
    # Streams.
    "no end": (["--streaming", "--max_train_steps"], "--streaming needs --max_train_steps"),
    "a bank of a stream": (["--streaming", "--reference", "bank"], "would bias"),
    "a stream shared": (["--streaming", "--share_reference"], "would bias"),
    "a stream of latents": (["--streaming", "--vae", "x"], "leave --vae"),
    "a stream of workers": (["--streaming", "--dataloader_num_workers", 2], "--dataloader_num_workers out"),
    "too short a stream": (["--streaming", "--reference_batch_size", 25], "the stream has 24 images for each process"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    tiny_autoencoder().save_pretrained(root / "vae")
    (root / "dit.json").write_text(json.dumps(TINY_TRANSFORMER))
    return {"vae": root / "vae", "dit": root / "dit.json"}


@pytest.mark.parametrize("case", WRONG)
def test_refused_before_anything_is_written(case, flags, places, tmp_path, capsys):
    more, message = WRONG[case]
    argv = flags(*(flag.format(**places) if isinstance(flag, str) else flag for flag in more))
    if argv[-1] == "--max_train_steps":
        at = argv.index("--max_train_steps")
        argv = argv[:at] + argv[at + 2 : -1]
    assert message in mistake(argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_modes_that_are_not_supported(mode, flags, tmp_path, monkeypatch):
    """As `accelerate launch` asks for them."""
    monkeypatch.setenv(f"ACCELERATE_USE_{mode}", "true")
    with pytest.raises(ValueError, match=rf"{mode} is not supported\. Use data parallelism"):
        train(flags())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "device", "word"),
    [(DistributedType.NO, "mps", "targets need float64"), (DistributedType.NO, "xpu", "targets need float64"),
     (DistributedType.FSDP, "cuda", "data parallelism"), (DistributedType.DEEPSPEED, "cuda", "data parallelism")],
)  # fmt: skip
def test_modes_and_devices_that_are_checked(mode, device, word):
    with pytest.raises(ValueError, match=word):
        check_mode(mode, torch.device(device))
    check_mode(DistributedType.MULTI_GPU, torch.device("cuda", 1))
