"""The training script as its users run it: in process through `main(argv)`, and launched in processes of its own."""

import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from image_data import ImageReader, find_column, flip_at_random, load_digits_dataset, measure_standard_deviation
from PIL import Image
from safetensors.torch import load_file

import train_unconditional_stf as script
from conftest import EXAMPLES, ROOT

TINY = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.1,
}


def tiny_autoencoder():
    """Of colour images, halving their sides; its weights are drawn, so that its latents mean nothing."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip


# Loads and samples a folder in a process that cannot import stf_diffusers.
PLAIN_DIFFUSERS = """
import sys
sys.modules["stf_diffusers"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipe(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
np.save(sys.argv[2], images)
assert not [name for name in sys.modules if name.startswith("stf_diffusers.")]
"""


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture
def flags(tmp_path, image_folder):
    """Flags of a run of a few steps on the small folder of images, to which a test adds its own."""
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    base = [
        "--train_data_dir", image_folder, "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "run",
        "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 2, "--num_inference_steps", 2,
        "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none",
    ]  # fmt: skip
    return lambda *more: [str(flag) for flag in (*base, *more)]


def launch(argv, *, processes=1):
    """`accelerate launch` in processes of its own on the CPU (gloo); returns their output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    if processes > 1:
        # What Accelerate calls multi_gpu is its torchrun launcher; ACCELERATE_USE_CPU keeps the processes on the CPU.
        command += ["--multi_gpu", "--main_process_port", str(29500 + os.getpid() % 1000)]
    done = subprocess.run(
        [*command, str(EXAMPLES / "train_unconditional_stf.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def weights(folder, name="unet"):
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# Every pair of values of (process, objective, accumulation, precision) occurs in some row.
PAIRWISE = [
    ("edm", "stf", 1, "no"),
    ("edm", "dsm", 4, "bf16"),
    ("ve", "stf", 4, "bf16"),
    ("ve", "dsm", 1, "no"),
    ("vp", "stf", 4, "no"),
    ("vp", "dsm", 1, "bf16"),
    ("flow", "stf", 1, "bf16"),
    ("flow", "dsm", 4, "no"),
]


@pytest.mark.parametrize(("process", "objective", "accumulation", "precision"), PAIRWISE)
def test_train_save_load_sample(process, objective, accumulation, precision, flags, tmp_path):
    script.main(
        flags("--noise_process", process, "--objective", objective, "--gradient_accumulation_steps", accumulation,
              "--mixed_precision", precision, "--random_flip", "--checkpointing_steps", 1, "--sample_steps", 1)
    )  # fmt: skip
    run = tmp_path / "run"
    state = torch.load(run / "checkpoint-2" / "scheduler.bin", weights_only=True)
    assert state["last_epoch"] == 2, "the schedule counts optimizer steps, not micro-batches"
    assert not same(weights(run), weights(run, "unet_raw"))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights(run).values())
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0000001.png", "step-0000002.png"]
    assert not list(run.glob(".*")), "nothing that was being written is left"
    metadata = json.loads((run / "scheduler" / "scheduler_config.json").read_text())["_stf"]
    assert metadata["process"]["name"] == process
    assert metadata["objective"] == objective
    assert metadata["images_seen"] == 2 * accumulation * 4
    assert "num_inference_steps" in (run / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(batch_size=2, num_inference_steps=3, output_type="np").images).all()


@pytest.mark.parametrize("process", ["edm", "ve", "vp", "flow"])
def test_plain_diffusers_gives_the_same_images(process, flags, tmp_path):
    """In a process that cannot import the package, one seed gives what it gives here."""
    script.main(flags("--noise_process", process, "--max_train_steps", 1))
    run = tmp_path / "run"
    subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, str(run), str(tmp_path / "images.npy")],
        cwd=tmp_path,
        check=True,
        timeout=200,
    )
    pipe = DiffusionPipeline.from_pretrained(run)
    generator = torch.Generator().manual_seed(3)
    here = pipe(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), here, atol=1e-5)


def test_resumed_run_ends_like_an_uninterrupted_one(flags, tmp_path):
    """Bit for bit, with dropout, flips, accumulation and the data's second epoch (6 batches each)."""
    more = ["--gradient_accumulation_steps", 2, "--random_flip", "--max_train_steps", 5, "--checkpointing_steps", 2]
    script.main(flags(*more))
    whole = tmp_path / "run"
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    shutil.copytree(whole / "checkpoint-2", interrupted / "checkpoint-2")
    AcceleratorState._reset_state(True)
    script.main(flags(*more, "--output_dir", interrupted, "--resume_from_checkpoint", "latest"))
    for name in ("unet", "unet_raw"):
        assert same(weights(whole, name), weights(interrupted, name))


def test_what_may_change_on_resuming_is_said(flags, tmp_path, caplog):
    argv = flags("--checkpointing_steps", 1, "--lr_scheduler", "linear")
    script.main(argv)
    AcceleratorState._reset_state(True)
    (tmp_path / "net.json").write_text(json.dumps({**TINY, "dropout": 0.3}))
    caplog.clear()
    script.main([*argv, "--resume_from_checkpoint", "latest", "--max_train_steps", "3", "--mixed_precision", "bf16"])
    assert "mixed_precision (no there, bf16 now)" in caplog.text and "dropout (0.1 there, 0.3 now)" in caplog.text
    assert "steps_of_schedule (2 there, 3 now)" in caplog.text and "does not end like one" in caplog.text
    AcceleratorState._reset_state(True)
    caplog.clear()
    before = weights(tmp_path / "run")
    again = ["--resume_from_checkpoint", "latest", "--mixed_precision", "bf16", "--lr_scheduler", "linear"]
    script.main([*flags("--max_train_steps", 2), *again])
    assert "All 2 steps are done" in caplog.text
    assert same(before, weights(tmp_path / "run"))


def test_rotation_keeps_the_newest(flags, tmp_path):
    script.main(flags("--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_objectives_share_data_and_noise(flags, tmp_path):
    """At low noise the posterior is its source, so STF and DSM take the very same step."""
    low = ["--noise_process", "ve", "--sigma_min", 0.01, "--sigma_max", 0.02, "--max_train_steps", 1]
    script.main(flags(*low, "--objective", "stf"))
    AcceleratorState._reset_state(True)
    script.main(flags(*low, "--objective", "dsm", "--output_dir", tmp_path / "dsm"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "dsm"))
    AcceleratorState._reset_state(True)
    high = ["--noise_process", "ve", "--sigma_min", 5, "--sigma_max", 50, "--max_train_steps", 1]
    script.main(flags(*high, "--output_dir", tmp_path / "high-stf"))
    AcceleratorState._reset_state(True)
    script.main(flags(*high, "--output_dir", tmp_path / "high-dsm", "--objective", "dsm"))
    assert not same(weights(tmp_path / "high-stf"), weights(tmp_path / "high-dsm"))


def test_class_conditional(flags, tmp_path):
    script.main(flags("--class_conditional", "--noise_process", "vp"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.config.num_class_embeds == 2
    assert len(pipe(batch_size=2, class_labels=[0, 1], num_inference_steps=2).images) == 2


def largest_difference(left, right):
    left, right = weights(left), weights(right)
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("more", [[], ["--random_flip"], ["--class_conditional", "--random_flip"]])
def test_bank_in_memory_and_on_disk(more, flags, tmp_path, caplog):
    """Without a flag the references are a bank; in a file it is the same; a batch of all images without flips too."""
    caplog.set_level("INFO")

    def train(name, *options):
        script.main(flags("--output_dir", tmp_path / name, "--max_train_steps", 5, *more, *options))
        AcceleratorState._reset_state(True)
        return tmp_path / name

    default = train("default")
    count = 48 if "--random_flip" in more else 24
    assert f"n = {count} references, a bank of all images" in caplog.text
    assert re.search(r"Targets take 0\.\d+ of the \d+\.\d+ seconds of a step", caplog.text)
    metadata = json.loads((default / "scheduler" / "scheduler_config.json").read_text())["_stf"]
    assert (metadata["reference"], metadata["reference_batch_size"]) == ("bank", count)
    assert f"| references per target | {count} (all of the data) |" in (default / "README.md").read_text()
    disk = train("disk", "--reference", "bank", "--reference_device", "disk")
    assert same(weights(default), weights(disk))
    assert (disk / "reference_bank.safetensors").is_file()
    batch = train("batch", "--reference_batch_size", 24)
    assert "read with each batch" in caplog.text
    if not more:
        assert largest_difference(default, batch) < 1e-5
    else:
        assert largest_difference(default, batch) > 1e-5, "flips are in the bank, not in the batch"


@pytest.mark.parametrize("options", [["--reference", "bank"], ["--reference_batch_size", 22]], ids=["bank", "batch"])
def test_references_shared_by_two_processes(options, flags, tmp_path):
    options = [*map(str, options), "--max_train_steps", "3", "--share_reference"]
    output = launch(flags("--output_dir", tmp_path / "shared", *options, "--max_train_steps", 4), processes=2)
    assert output.count("Targets take") == 1, "said once, by the main process"
    assert ("a part on each process" if "bank" in options else "shared by all processes") in output
    if "bank" in options:
        launch(flags("--output_dir", tmp_path / "whole", *options[:-1], "--max_train_steps", 4), processes=2)
        assert largest_difference(tmp_path / "shared", tmp_path / "whole") < 1e-5


def test_images_cropped_at_random_have_no_bank(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "wide"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    options = ["--train_data_dir", folder, "--resolution", 8]
    for device in ([], ["--reference_device", "disk"]):
        with pytest.raises(ValueError, match=r"--center_crop"):
            script.main(flags(*options, "--reference", "bank", *device))
        AcceleratorState._reset_state(True)
    assert not (tmp_path / "run").exists()
    script.main(flags(*options, "--reference", "bank", "--center_crop", "--reference_device", "disk"))
    AcceleratorState._reset_state(True)
    script.main(flags(*options, "--output_dir", tmp_path / "default"))
    assert "read with each batch" in caplog.text


def test_fine_tuning_takes_weights_and_process_from_the_pipeline(flags, tmp_path):
    script.main(flags("--noise_process", "vp", "--beta_d", 12))
    first = tmp_path / "run"
    AcceleratorState._reset_state(True)
    without_config = [flag for flag in flags() if flag not in ("--model_config", str(tmp_path / "net.json"))]
    second = tmp_path / "second"
    more = ["--pretrained_model_name_or_path", str(first), "--output_dir", str(second), "--learning_rate", "1e-12"]
    more += ["--resolution", "16"]
    script.main([*without_config, *more])
    metadata = json.loads((second / "scheduler" / "scheduler_config.json").read_text())["_stf"]
    assert metadata["process"] == {"name": "vp", "beta_d": 12.0, "beta_min": 0.1, "epsilon_t": 1e-5}
    assert DiffusionPipeline.from_pretrained(second).unet.config.sample_size == 16
    for key, value in weights(first).items():
        torch.testing.assert_close(weights(second, "unet_raw")[key], value, rtol=0, atol=1e-9)
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="was trained on vp"):
        script.main([*without_config, *more, "--noise_process", "edm", "--overwrite_output_dir"])


def test_two_processes_train_checkpoint_and_resume(flags, tmp_path):
    """gloo, 2 processes: one schedule step per optimizer step, own random states, and an exact resume."""
    more = ["--gradient_accumulation_steps", 2, "--mixed_precision", "bf16", "--checkpointing_steps", 2]
    output = launch(flags(*more, "--max_train_steps", 3), processes=2)
    run = tmp_path / "run"
    assert "3 steps of 16 images on 2 process(es)" in output
    assert torch.load(run / "checkpoint-2" / "scheduler.bin", weights_only=True)["last_epoch"] == 2
    assert len(list((run / "checkpoint-2").glob("random_states_*.pkl"))) == 2
    ended = weights(run)
    shutil.rmtree(run / "checkpoint-3")
    output = launch(flags(*more, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"), processes=2)
    assert "Resumed after step 2" in output
    assert same(ended, weights(run))
    assert DiffusionPipeline.from_pretrained(run).unet.config.in_channels == 3


def test_default_command_on_digits(tmp_path):
    """No data, no network, no process named: the digits, by `accelerate launch`, logged to tensorboard."""
    run = tmp_path / "digits"
    output = launch(
        ["--output_dir", str(run), "--max_train_steps", "3", "--num_samples", "2", "--num_inference_steps", "2"]
    )
    assert "1797 images of (1, 12, 12)" in output
    assert list((run / "logs").rglob("events.out.tfevents*"))
    assert DiffusionPipeline.from_pretrained(run).unet.config.sample_size == 12


def test_flags_from_a_file(flags, tmp_path):
    (tmp_path / "flags.txt").write_text("# comment\n--noise_process ve --sigma_max 50\n--objective dsm\n")
    args = script.parse_args(flags(f"@{tmp_path / 'flags.txt'}"))
    assert (args.noise_process, args.sigma_max, args.objective) == ("ve", 50.0, "dsm")


@pytest.mark.parametrize("name", ["train_unconditional_stf", "generate", "quality_report"])
def test_every_flag_is_read(name):
    module = __import__(name)
    source = (EXAMPLES / f"{name}.py").read_text().split("args = parser.parse_args(argv)")[1]
    source += "".join((EXAMPLES / f"{sibling}.py").read_text() for sibling in ("references", "evaluation"))
    by_name = {parameter for names in script.PROCESS_PARAMETERS.values() for parameter in names}
    required = {"generate": ["--model", "m"], "quality_report": ["--samples", "s", "--extractor", "e"]}.get(name, [])
    required += ["--output_dir", "d"]
    for flag in vars(module.parse_args(required)):
        assert flag in by_name or re.search(rf"args\.{flag}\b", source), flag


def test_logged_values(flags, tmp_path):
    """What is reported: loss, learning rate as applied, gradient norm, effective sample size, speed, data wait."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--report_to", "tensorboard", "--logging_steps", 1, "--max_train_steps", 4, "--lr_scheduler", "linear"]
    script.main(flags(*more, "--lr_warmup_steps", 2, "--gradient_accumulation_steps", 2, "--p_mean", 1.0))
    events = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "learning_rate", "gradient_norm", "images_per_second", "data_wait_share"} <= tags
    rates = [event.value for event in events.Scalars("learning_rate")]
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 5e-4], rtol=1e-6)
    sizes = {tag: events.Scalars(tag)[-1].value for tag in tags if tag.startswith("effective_sample_size/")}
    assert sizes and all(1 - 1e-5 <= size <= 24 + 1e-3 for size in sizes.values())
    assert {tag.replace("effective_sample_size", "variance_removed") for tag in sizes} <= tags
    assert "samples" in events.Tags()["images"]


def test_sigma_data_is_measured(flags, tmp_path, caplog):
    script.main(flags("--sigma_data", 0.2))
    assert "more than 20 % from sigma_data = 0.2" in caplog.text
    AcceleratorState._reset_state(True)
    caplog.clear()
    script.main(flags("--sigma_data", "auto", "--overwrite_output_dir"))
    assert "more than 20 %" not in caplog.text
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    # Two uniform bands of 100 levels around 60 and 180: between and within variance.
    expected = np.sqrt(60**2 + 100**2 / 12) / 127.5
    assert config["sigma_data"] == config["_stf"]["process"]["sigma_data"] == pytest.approx(expected, rel=0.05)


def test_resuming_behind_later_checkpoints_is_refused(flags, tmp_path):
    """Rotation and `latest` would take an abandoned branch's checkpoints for the newest."""
    script.main(flags("--max_train_steps", 3, "--checkpointing_steps", 1))
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="later checkpoints than checkpoint-1: checkpoint-2, checkpoint-3"):
        script.main(flags("--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-1"))
    (tmp_path / "run" / "checkpoint-notes").mkdir()
    (tmp_path / "run" / "checkpoint-notes" / "training_state.json").write_text("{}")
    AcceleratorState._reset_state(True)
    older = tmp_path / "run" / "checkpoint-1"
    script.main(flags("--resume_from_checkpoint", older, "--output_dir", tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model_index.json").exists()


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_every_schedule_runs(schedule, flags):
    script.main(flags("--lr_scheduler", schedule, "--max_train_steps", 1))
    AcceleratorState._reset_state(True)
    with pytest.raises(SystemExit):
        script.parse_args(["--lr_scheduler", "piecewise_constant"])


def test_colour_images_become_grey_when_asked(flags, tmp_path):
    script.main(flags("--image_mode", "L", "--max_train_steps", 1))
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").unet.config.in_channels == 1


WRONG = {
    "sampling range": (["--sigma_min", "10", "--sigma_max", "1"], "sigma_min < sigma_max"),
    "batch above images": (["--train_batch_size", "25"], "--train_batch_size 25"),
    "references above images": (["--reference_batch_size", "25"], "exceeds the 24 images"),
    "references below batch": (["--reference_batch_size", "3"], "includes the batch itself"),
    "bank for dsm": (["--objective", "dsm", "--reference", "bank"], "no effect with --objective dsm"),
    "bank of n": (["--reference", "bank", "--reference_batch_size", "8"], "uses all images"),
    "device of a batch": (["--reference_device", "disk"], "needs --reference bank"),
    "references for dsm": (["--objective", "dsm", "--reference_batch_size", "8"], "no effect"),
    "foreign parameter": (["--noise_process", "vp", "--p_mean", "0"], "--p_mean is no parameter"),
    "unknown process": (["--noise_process", "cosine"], "invalid choice"),
    "negative rate": (["--learning_rate", "-1"], "above 0"),
    "not a number": (["--learning_rate", "nan"], "above 0"),
    "range upside down": (["--noise_process", "ve", "--sigma_min", "5", "--sigma_max", "1"], "sigma_min < sigma_max"),
    "noise lost in float32": (["--noise_process", "ve", "--sigma_min", "1e-4"], "Raise sigma_min"),
    "missing column": (["--image_column", "picture"], "has the columns"),
    "no labels there": (["--class_conditional", "--label_column", "kind"], "has the columns"),
    "resolution and network": (["--resolution", "9"], "multiple of 2"),
    "named checkpoint missing": (["--resume_from_checkpoint", "checkpoint-7"], "no complete checkpoint"),
    "unknown tracker": (["--report_to", "abacus"], "installed trackers"),
    "two data sets": (["--dataset_name", "cifar10"], "exclude each other"),
    "hub flags alone": (["--hub_model_id", "a/b"], "need --push_to_hub"),
    "missing data": (["--train_data_dir", "/no/such/folder"], "no/such/folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_anything_is_written(case, flags, tmp_path, capsys):
    more, message = WRONG[case]
    with pytest.raises((ValueError, SystemExit, FileNotFoundError)) as refusal:
        script.main(flags(*more))
    assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_trained_folder_is_not_overwritten_unasked(flags, tmp_path):
    script.main(flags("--max_train_steps", 1))
    before = weights(tmp_path / "run")
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        script.main(flags("--max_train_steps", 1, "--seed", 1))
    assert same(before, weights(tmp_path / "run"))
    AcceleratorState._reset_state(True)
    script.main(flags("--max_train_steps", 1, "--seed", 1, "--overwrite_output_dir"))
    assert not same(before, weights(tmp_path / "run"))


def test_resuming_another_run_is_refused(flags):
    script.main(flags("--checkpointing_steps", 1))
    others = [
        ("--train_batch_size", 2), ("--learning_rate", 1e-2), ("--resolution", 16), ("--image_mode", "L"), ("--seed", 1),
        ("--class_conditional",), ("--objective", "dsm"), ("--noise_process", "vp"), ("--random_flip",),
    ]  # fmt: skip
    names = [
        "train_batch_size",
        "learning_rate",
        "image_shape",
        "image_shape",
        "seed",
        "num_classes",
        "objective",
        "process",
        "random_flip",
    ]
    for other, name in zip(others, names, strict=True):
        AcceleratorState._reset_state(True)
        with pytest.raises(ValueError, match=f"belongs to another run: .*{name}"):
            script.main(flags("--resume_from_checkpoint", "latest", *other))


def test_fine_tuning_keeps_the_sampling_range(flags, tmp_path):
    script.main(flags("--sigma_max", 20, "--max_train_steps", 1))
    AcceleratorState._reset_state(True)
    without_config = [flag for flag in flags() if flag not in ("--model_config", str(tmp_path / "net.json"))]
    more = ["--pretrained_model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "second")]
    script.main([*without_config, *more])
    assert DiffusionPipeline.from_pretrained(tmp_path / "second").scheduler.config.sigma_max == 20


@pytest.mark.parametrize(
    ("config", "millions"), [("cifar10_32", (55, 57)), ("celeba_64", (60, 64)), ("digits_12", (0.5, 1.5))]
)
def test_presets_have_the_stated_size(config, millions):
    with torch.device("meta"):
        unet = UNet2DModel.from_config(json.loads((EXAMPLES / "configs" / f"{config}.json").read_text()))
    assert millions[0] < unet.num_parameters() / 1e6 < millions[1]


def test_cifar10_columns_are_found(flags, tmp_path):
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not beside the checkout")
    small = datasets.load_dataset(str(folder), split="train[:64]")
    assert small.column_names == ["img", "label"]
    small.to_parquet(tmp_path / "small.parquet")
    script.main([*flags()[2:], "--dataset_name", str(tmp_path / "small.parquet"), "--class_conditional"])
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").unet.config.sample_size == 32


def test_streamed_images_are_the_cached_ones(flags, tmp_path):
    """Images that exceed the memory budget are read by workers; the run is the same."""
    script.main(flags("--max_train_steps", 2))
    AcceleratorState._reset_state(True)
    more = ["--image_memory_gb", 0, "--dataloader_num_workers", 2, "--output_dir", tmp_path / "streamed"]
    script.main(flags("--max_train_steps", 2, *more))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "streamed"))


def test_reader_crops_resizes_and_converts():
    import random

    wide = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8)[None, :, None], (8, 1, 3)))
    centre = ImageReader("RGB", 8, center_crop=True)(wide, random.Random(0))
    assert centre.shape == (3, 8, 8) and centre.dtype == torch.uint8
    assert torch.equal(centre[0, 0], torch.arange(8, 16, dtype=torch.uint8))
    lefts = {int(ImageReader("RGB", 8, center_crop=False)(wide, random.Random(seed))[0, 0, 0]) for seed in range(200)}
    assert lefts == set(range(17)), "random crops reach every position"
    assert ImageReader("L", 4, True)(Image.new("L", (8, 8), 7), random.Random(0)).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="8 bits"):
        ImageReader("L", 8, True)(Image.fromarray(np.zeros((8, 8), np.uint16)), random.Random(0))
    with pytest.raises(ValueError, match="--image_mode"):
        ImageReader("L", 8, True, convert=False)(wide, random.Random(0))
    with pytest.raises(ValueError, match="--resolution"):
        ImageReader("RGB", 8, True, resize=False)(wide, random.Random(0))


def test_digits_and_their_standard_deviation():
    from image_data import ImageColumn, decode_all, make_reader

    digits = load_digits_dataset()
    assert len(digits) == 1797 and find_column(digits, datasets.ClassLabel, None, "--label_column") == "label"
    reader = make_reader(digits, "image", None, None, True)
    images = decode_all(digits, "image", reader, 2**30, quiet=True)
    expected = (images.double() / 127.5 - 1).std(correction=0)
    column = ImageColumn(digits, "image", reader, images=images)
    assert measure_standard_deviation(column) == pytest.approx(float(expected), rel=1e-9)


def test_flips_are_fair_and_leave_their_input_alone():
    images = torch.arange(4000, dtype=torch.uint8).reshape(2000, 1, 1, 2)
    before = images.clone()
    flipped = flip_at_random(images, torch.Generator().manual_seed(0))
    which = (flipped != images).flatten(1).any(1)
    assert torch.equal(images, before)
    assert torch.equal(flipped[which], images[which].flip(-1))
    # 1000 expected, standard deviation 22: five of them.
    assert abs(int(which.sum()) - 1000) < 112
