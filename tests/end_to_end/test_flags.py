"""Each command-line flag changes what it says: a run without it and a run with it, compared."""

import hashlib
import json
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import train_unconditional_stf as script
from stf_diffusers.training.flags import READING_FLAGS, process_flags
from tiny import EXAMPLES, TINY, metadata, save_extractor, tiny_autoencoder, train

# flag: (what both runs have, what the second has too, what changes). Kinds of what changes: "weights" (raw), "average",
# "files" (their names), "grid", "card", "steps_logged", "evaluations", "validation", "tf32", "log" (a phrase that appears), "metadata"
# (a key), or "nothing", where the flag is a matter of speed or memory.
TF32 = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
WIDE = "--train_data_dir {wide} --resolution 8"
HALF = "--dataset_name {many} --split train[:40]"
CASES = {
    "dataset_name": ("", "--dataset_name {parquet}", "card"),
    "train_data_dir": ("", "--train_data_dir {wide} --resolution 8", "card"),
    "image_column": ("--dataset_name {two} --image_column image", "--image_column image2", "weights"),
    "label_column": ("--dataset_name {two} --image_column image --class_conditional --label_column label", "--label_column kind", "metadata num_classes"),
    "split": ("--dataset_name {parquet}", "--split train[:8]", "metadata num_images"),
    "skip_corrupt": ("--dataset_name {parquet}", "--skip_corrupt", "nothing"),
    "image_cache": ("", "--no-image_cache", "nothing"),
    "resolution": ("", "--resolution 16", "metadata image_shape"),
    "image_mode": ("", "--image_mode L", "metadata image_shape"),
    "center_crop": (WIDE, "--center_crop", "log kept in memory"),
    "random_flip": ("", "--random_flip", "weights"),
    "image_memory_gb": ("", "--image_memory_gb 1e-9", "log made as they are read"),
    "dataloader_num_workers": ("", "--dataloader_num_workers 1", "nothing"),
    "streaming": ("", "--streaming", "metadata reference"),
    "objective": ("--noise_process ve", "--objective dsm", "weights"),
    "reference": ("", "--reference batch", "log read with each batch"),
    "reference_batch_size": ("--noise_process ve", "--reference_batch_size 5", "weights"),
    "reference_memory_gb": ("", "--reference_memory_gb 1e-9", "log read with each batch"),
    "reference_device": ("--reference bank", "--reference_device disk", "files"),
    "noise_process": ("", "--noise_process vp", "metadata process"),
    "sigma_data": ("", "--sigma_data 0.7", "metadata process"),
    "p_mean": ("", "--p_mean 1", "weights"),
    "p_std": ("", "--p_std 3", "weights"),
    "sigma_min": ("--noise_process ve", "--sigma_min 0.5", "weights"),
    "sigma_max": ("--noise_process ve", "--sigma_max 5", "weights"),
    "beta_d": ("--noise_process vp", "--beta_d 5", "weights"),
    "beta_min": ("--noise_process vp", "--beta_min 1", "weights"),
    "epsilon_t": ("--noise_process vp", "--epsilon_t 0.3", "weights"),
    "time_distribution": ("--noise_process flow", "--time_distribution logit_normal", "weights"),
    "logit_mean": ("--noise_process flow --time_distribution logit_normal", "--logit_mean 1", "weights"),
    "logit_std": ("--noise_process flow --time_distribution logit_normal", "--logit_std 3", "weights"),
    "noise_distribution": ("", "--noise_distribution log_uniform", "weights"),
    "noise_mean": ("--noise_distribution log_normal", "--noise_mean 1", "weights"),
    "adaptive_power": ("--noise_distribution adaptive", "--adaptive_power 2", "weights"),
    "adaptive_floor": ("--noise_distribution adaptive --adaptive_power 2", "--adaptive_floor 1", "weights"),
    "importance_weights": ("--noise_distribution adaptive --adaptive_power 2", "--importance_weights", "weights"),
    "noise_std": ("--noise_distribution log_normal", "--noise_std 3", "weights"),
    "reorient": ("", "--reorient 0.5", "metadata reorient"),
    "class_dropout": ("--class_conditional", "--class_dropout 0.5", "metadata null_label"),
    "vae": ("", "--vae {vae} --noise_process vp", "metadata latent_std"),
    "latents": ("--vae {vae} --noise_process vp", "--latents mean", "weights"),
    "model_config": ("", "--model_config {larger}", "weights"),
    "pretrained_model_name_or_path": ("--model_config", "--pretrained_model_name_or_path {trained}", "weights"),
    "class_conditional": ("", "--class_conditional", "metadata num_classes"),
    "gradient_checkpointing": ("", "--gradient_checkpointing", "nothing"),
    "allow_tf32": ("", "--allow_tf32", "tf32"),
    "channels_last": ("", "--channels_last", "weights"),
    "mixed_precision": ("", "--mixed_precision bf16", "weights"),
    "seed": ("", "--seed 1", "weights"),
    "train_batch_size": ("", "--train_batch_size 6", "weights"),
    "num_epochs": ("--train_batch_size 12", "--num_epochs 2", "metadata steps"),
    "max_train_steps": ("", "--max_train_steps 4", "metadata steps"),
    "gradient_accumulation_steps": ("", "--gradient_accumulation_steps 2", "metadata images_seen"),
    "learning_rate": ("", "--learning_rate 5e-3", "weights"),
    "scale_lr": ("", "--scale_lr", "weights"),
    "lr_scheduler": ("", "--lr_scheduler linear", "weights"),
    "lr_warmup_steps": ("", "--lr_warmup_steps 2", "weights"),
    "adam_beta1": ("", "--adam_beta1 0.5", "weights"),
    "adam_beta2": ("", "--adam_beta2 0.5", "weights"),
    "adam_weight_decay": ("", "--adam_weight_decay 0.5", "weights"),
    "adam_epsilon": ("", "--adam_epsilon 0.1", "weights"),
    "max_grad_norm": ("", "--max_grad_norm 1e-9", "weights"),
    "use_ema": ("", "--no-use_ema", "files"),
    "ema_inv_gamma": ("", "--ema_inv_gamma 10", "average"),
    "ema_power": ("", "--ema_power 0.1", "average"),
    "ema_max_decay": ("", "--ema_max_decay 0.01", "average"),
    "post_hoc_ema": ("", "--post_hoc_ema", "files"),
    "checkpointing_steps": ("", "--checkpointing_steps 2", "files"),
    "checkpoints_total_limit": ("--checkpointing_steps 1", "--checkpoints_total_limit 1", "files"),
    "report_to": ("", "--report_to tensorboard", "files"),
    "logging_dir": ("--report_to tensorboard", "--logging_dir other", "files"),
    "logging_steps": ("--report_to tensorboard", "--logging_steps 1", "steps_logged"),
    "sample_steps": ("", "--sample_steps 1", "files"),
    "num_samples": ("", "--num_samples 4", "grid"),
    "num_inference_steps": ("", "--num_inference_steps 5", "grid"),
    "validation_split": (HALF, "--validation_split train[40:]", "files"),
    "validation_steps": (f"{HALF} --validation_split train[40:]", "--validation_steps 2", "validation"),
    "validation_images": (f"{HALF} --validation_split train[40:]", "--validation_images 32", "validation"),
    "eval_steps": ("--eval_extractor {extractor} --eval_num_samples 5 --eval_steps 3", "--eval_steps 1", "evaluations"),
    "eval_extractor": ("--eval_steps 3 --eval_num_samples 5 --eval_extractor {extractor}", "--eval_extractor {other}", "evaluations"),
    "eval_num_samples": ("--eval_extractor {extractor} --eval_steps 3 --eval_num_samples 5", "--eval_num_samples 6", "evaluations"),
    "model_license": ("", "--model_license mit", "card"),
}  # fmt: skip
ELSEWHERE = {
    "cache_dir": "where others' downloads go",
    "dataset_config_name": "tests/training/test_data_set.py",
    "output_dir": "everywhere",
    "overwrite_output_dir": "test_resume.py",
    "resume_from_checkpoint": "test_resume.py",
    "share_reference": "test_training.py, on two processes",
    "compile": "minutes on a CPU",
    "push_to_hub": "test_hub.py",
    "hub_steps": "test_hub.py",
    **dict.fromkeys(("prediction_type", "ddpm_num_steps", "ddpm_beta_schedule"), "test_discrete.py"),
    "save_images_epochs": "test_first_hour.py",
    "save_model_epochs": "test_first_hour.py",
    "eval_batch_size": "test_first_hour.py, where it changes no image",
    "hub_model_id": "test_hub.py",
    "hub_private_repo": "test_hub.py",
    "hub_token": "test_hub.py",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, image_folder):
    """Data sets, networks and a trained folder by name."""
    root = tmp_path_factory.mktemp("places")
    draw = np.random.default_rng(3)
    (root / "wide").mkdir()
    for index in range(8):
        Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(root / "wide" / f"{index}.png")
    pictures = [
        [Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(12)] for _ in range(2)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image2": datasets.Image(),
            "label": datasets.ClassLabel(3),
            "kind": datasets.ClassLabel(4),
        }
    )
    columns = {"image": pictures[0], "image2": pictures[1], "label": [0, 1, 2] * 4, "kind": [0, 1, 2, 3] * 3}
    two = datasets.Dataset.from_dict(columns, features=features)
    two.to_parquet(root / "two.parquet")
    two.select_columns(["image", "label"]).to_parquet(root / "one.parquet")
    many = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(76)]
    datasets.Dataset.from_dict({"image": many}, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        root / "many.parquet"
    )
    (root / "net.json").write_text(json.dumps(TINY))
    (root / "larger.json").write_text(json.dumps({**TINY, "block_out_channels": [8, 12]}))
    found = {
        "wide": root / "wide",
        "parquet": root / "one.parquet",
        "two": root / "two.parquet",
        "many": root / "many.parquet",
        "larger": root / "larger.json",
    }
    found |= {"net": root / "net.json", "images": image_folder, "trained": root / "trained"}
    tiny_autoencoder().save_pretrained(root / "vae")
    found["vae"] = root / "vae"
    for seed, name in enumerate(("extractor", "other")):
        found[name] = save_extractor(root / name, seed)
    train(base(found, root / "trained", ""))
    return found


def base(places, folder, more):
    argv = ["--output_dir", folder, "--train_batch_size", 4, "--num_samples", 2, "--num_inference_steps", 3]
    argv += ["--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none"]
    if "--num_epochs" not in more:
        argv += ["--max_train_steps", 3] if "--train_batch_size 12" not in more else ["--num_epochs", 1]
    if "--dataset_name" not in more and "--train_data_dir" not in more:
        argv += ["--train_data_dir", places["images"]]
    if "--pretrained_model_name_or_path" not in more and "--model_config" not in more.split():
        argv += ["--model_config", places["net"]]
    if more.endswith("--model_config"):
        more = f"{more} {places['net']}"
    return [*argv, *more.format(**places).split()]


def steps_logged(folder):
    """The steps whose loss the tracker has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulators = [EventAccumulator(str(path)).Reload() for path in folder.rglob("events.out*")]
    return [event.step for each in accumulators if "loss" in each.Tags()["scalars"] for event in each.Scalars("loss")]


def outcome(places, folder, argv, caplog):
    """What a run leaves, by kind."""

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    caplog.clear()
    for backend in TF32:
        backend.fp32_precision = "ieee"
    train(base(places, folder, argv))
    raw = folder / "unet_raw" if (folder / "unet_raw").is_dir() else folder / "unet"
    (grid,) = sorted((folder / "samples").glob("*.png"))[-1:]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {
        "weights": digest(raw / "diffusion_pytorch_model.safetensors"),
        "average": digest(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        # The names of the tracker's files have the time in them.
        "files": {re.sub(r"events\.out.*|\d{10}\.\d+", "", name) for name in files},
        "grid": digest(grid),
        "card": (folder / "README.md").read_text().replace(str(folder), "").replace(f"# {folder.name}", ""),
        "steps_logged": steps_logged(folder),
        "evaluations": digest(folder / "evaluations.json"),
        "validation": digest(folder / "validation.json"),
        "metadata": metadata(folder),
        "tf32": [backend.fp32_precision for backend in TF32],
        "log": caplog.text,
    }


@pytest.fixture(scope="module")
def without(places, tmp_path_factory):
    """without(flags, caplog): what a run with these flags leaves; those that several cases share are run once."""
    found = {}

    def run(common, caplog):
        if common not in found:
            found[common] = outcome(places, tmp_path_factory.mktemp("without") / "run", common, caplog)
        return found[common]

    return run


@pytest.fixture(autouse=True)
def precision():
    """--allow_tf32 is a setting of the whole process."""
    before = [backend.fp32_precision for backend in TF32]
    yield
    for backend, precision in zip(TF32, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("flag", CASES)
def test_flag(flag, places, without, tmp_path, caplog):
    caplog.set_level("INFO")
    common, more, kind = CASES[flag]
    before = without(common, caplog)
    after = outcome(places, tmp_path / "run", f"{common} {more}".replace("--model_config --pre", "--pre"), caplog)
    what, _, detail = kind.partition(" ")
    if what == "nothing":
        assert before["files"] == after["files"] and before["weights"] == after["weights"]
    elif what == "log":
        assert detail in after["log"] and detail not in before["log"]
    elif what == "metadata":
        assert before["metadata"].get(detail) != after["metadata"].get(detail)
    else:
        assert before[what] != after[what]


def test_every_flag_is_in_the_table():
    assert set(CASES) | set(ELSEWHERE) == set(vars(script.parse_args([])))
    assert not set(CASES) & set(ELSEWHERE)


@pytest.mark.parametrize("name", ["train_unconditional_stf", "train_consistency_stf", "generate", "quality_report"])
def test_every_flag_is_read(name):
    module = __import__(name)
    source = (EXAMPLES / f"{name}.py").read_text().split("args = parser.parse_args(argv)")[1]
    # A flag that is only checked, or said to have no effect, is not read.
    source = re.sub(r"\ndef (check_flags|notices)\(.*?\n# fmt: on\n", "\n", source, flags=re.DOTALL)
    required = {"generate": ["--model", "m"], "quality_report": ["--samples", "s", "--extractor", "e"]}.get(name, [])
    required += ["--output_dir", "d"]
    for flag in vars(module.parse_args(required)):
        read = re.search(rf"args\.{flag}\b|\"{flag}\"", source)
        shared = name.startswith("train") and flag in {*READING_FLAGS, *process_flags(), *script.DISCRETE_PARAMETERS}
        assert read or shared, flag


def test_flags_from_a_file(flags, tmp_path):
    (tmp_path / "flags.txt").write_text("# comment\n--noise_process ve --sigma_max 50\n--objective dsm\n")
    args = script.parse_args(flags(f"@{tmp_path / 'flags.txt'}"))
    assert (args.noise_process, args.sigma_max, args.objective) == ("ve", 50.0, "dsm")


@pytest.mark.parametrize("common", ["--random_flip", "--report_to tensorboard"])
def test_runs_are_repeatable(common, places, tmp_path, caplog):
    """Without which the comparisons above would say nothing."""
    one, two = (outcome(places, tmp_path / name / "run", common, caplog) for name in ("one", "two"))
    assert one | {"log": ""} == two | {"log": ""}
