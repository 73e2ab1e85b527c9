"""The script that trains consistency models: its steps, what it goes on from and saves, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from oracles import images, normal
from stf_diffusers import EDM, ConsistencyTrainingObjective, STFPipeline
from stf_diffusers.feature_extractors import transformers_features
from stf_diffusers.metrics import FeatureStatistics, frechet_distance
from stf_diffusers.training.consistency_levels import CANDIDATES
from stf_diffusers.training.sampling import as_pixels
from tiny import (
    CPU,
    ROOT,
    TINY,
    Processes,
    generators,
    grid_of,
    launch,
    metadata,
    mistake,
    run_as_script,
    same,
    tiny_autoencoder,
    train,
    weights,
)
from train_consistency_stf import main

NAME = "train_consistency_stf.py"
FEW = ["--eval_num_samples", 6]


@pytest.fixture(scope="module")
def start(tmp_path_factory, image_folder):
    """start(*flags): the folder of an EDM model, trained for a step by the first script."""
    made = {}

    def make(*more):
        if more not in made:
            folder = tmp_path_factory.mktemp("start")
            (folder / "net.json").write_text(json.dumps(TINY))
            train([
                "--train_data_dir", image_folder, "--model_config", folder / "net.json", "--output_dir", folder / "run",
                "--train_batch_size", 4, "--max_train_steps", 1, "--num_samples", 1, "--num_inference_steps", 2,
                "--report_to", "none", *more,
            ])  # fmt: skip
            made[more] = folder / "run"
        return made[more]

    return make


@pytest.fixture
def flags(tmp_path, image_folder, start):
    """Flags of two steps from the EDM model into `run`, to which a test adds its own."""

    def make(*more, model=None):
        return [
            "--train_data_dir", image_folder, "--pretrained_model_name_or_path", model or start(),
            "--output_dir", tmp_path / "run", "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 2,
            "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none", "--logging_steps", 1,
            "--no-search_levels", *more,
        ]  # fmt: skip

    return make


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_on_the_digits(tmp_path):
    """From scratch, in one stage, so that losses are comparable."""
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    train([
        "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "run", "--max_train_steps", 80,
        "--num_stages", 1, "--learning_rate", 3e-3, "--lr_warmup_steps", 0, "--report_to", "none", "--no-search_levels",
    ], main)  # fmt: skip
    losses = [line["loss"] for line in metrics(tmp_path / "run")[1:]]  # means over ten steps
    assert 0 < losses[-1] < 0.8 * losses[0]
    said = metadata(tmp_path / "run")
    assert said["objective"] == "stf" and said["reference"] == "bank" and said["reference_batch_size"] == 1797
    assert said["consistency"]["num_stages"] == 1 and said["process"]["name"] == "edm"


def test_resumed_run_ends_like_an_uninterrupted_one(flags, start, tmp_path):
    """Bit for bit, with dropout, flips, classes, accumulation, several stages and the data's second epoch."""
    conditional = ["--class_conditional", "--class_dropout", 0.3]
    more = [*conditional, "--gradient_accumulation_steps", 2, "--random_flip", "--max_train_steps", 5]
    more += ["--checkpointing_steps", 2, "--num_stages", 4, "--reference_batch_size", 8]
    model, interrupted = start(*conditional), tmp_path / "interrupted"
    train(flags(*more, model=model), main)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", interrupted / "checkpoint-2")
    train(flags(*more, "--output_dir", interrupted, "--resume_from_checkpoint", "latest", model=model), main)
    for name in ("unet", "unet_raw"):
        assert same(weights(tmp_path / "run", name), weights(interrupted, name))
    labels = [0, 1]
    images = DiffusionPipeline.from_pretrained(interrupted)(batch_size=2, class_labels=labels, output_type="np").images
    assert np.isfinite(images).all()


def test_stopped_by_a_signal_and_resumed(flags, tmp_path):
    argv = flags("--max_train_steps", 120, "--checkpointing_steps", 120, "--num_stages", 3)
    run = Processes(run_as_script, argv, NAME)
    (process,) = run.members
    file, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 90
    while not (file.is_file() and file.read_text().count("\n") > 3):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)
    codes, said = run.wait(60)
    assert codes == [75] and "Stopped by a signal after step" in said, said[-2000:]
    train([*argv, "--resume_from_checkpoint", "latest"], main)
    train([*argv, "--output_dir", tmp_path / "whole"], main)
    assert same(weights(tmp_path / "run", "unet_raw"), weights(tmp_path / "whole", "unet_raw"))


def test_another_number_of_steps_moves_the_stages_and_is_said(flags, caplog):
    train(flags("--checkpointing_steps", 1), main)
    train(flags("--max_train_steps", 3, "--resume_from_checkpoint", "latest"), main)
    assert "stage_steps (0.25 there, 0.375 now)" in caplog.text
    with pytest.raises(ValueError, match=r"belongs to another run: .*num_stages \(8 there, 2 now\)"):
        train(flags("--num_stages", 2, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"), main)


OWN_FLAGS = {
    "--objective": "ect", "--num_stages": 2, "--stage_steps": 1, "--schedule_q": 3, "--schedule_k": 2, "--schedule_b": 3,
    "--p_mean": 0.5, "--p_std": 1, "--huber_c": 1, "--sigma_data": 0.3,
}  # fmt: skip


def test_each_flag_of_its_own_changes_the_training(flags, tmp_path):
    train(flags(), main)
    (tmp_path / "run").rename(tmp_path / "base")
    for flag, value in OWN_FLAGS.items():
        train(flags(flag, value, "--overwrite_output_dir"), main)
        assert not same(weights(tmp_path / "base", "unet_raw"), weights(tmp_path / "run", "unet_raw")), flag
    train(flags("--sigma_max", 20, "--sigma_min", 0.01, "--overwrite_output_dir"), main)
    config = DiffusionPipeline.from_pretrained(tmp_path / "run").scheduler.config
    assert (config.sigma_min, config.sigma_max) == (0.01, 20)


def test_one_reference_is_easy_consistency_tuning(flags, tmp_path):
    """Bit for bit: n = 1 and no references; and more references are another training, if as many as the batch."""
    outcomes = {}
    for name, more in {
        "ect": ["--objective", "ect"],
        "one": ["--reference_batch_size", 1],
        "two": ["--reference_batch_size", 2],
    }.items():
        train(flags(*more, "--train_batch_size", 1, "--p_mean", 3, "--output_dir", tmp_path / name), main)
        outcomes[name] = weights(tmp_path / name, "unet_raw")
    assert same(outcomes["ect"], outcomes["one"]) and not same(outcomes["ect"], outcomes["two"])
    train(flags("--reference_batch_size", 4), main)
    assert metadata(tmp_path / "run")["reference_batch_size"] == 4


def first_loss(argv, folder):
    train([*argv, "--overwrite_output_dir"], main)
    return metrics(folder)[0]["loss"]


def test_both_points_get_the_same_dropout(flags, start, tmp_path):
    """Close points: with other masks the loss, a difference quotient, would be hundreds of times as large."""
    argv = flags("--schedule_q", 1000, "--schedule_k", 0, "--num_stages", 1, "--max_train_steps", 1)
    model = tmp_path / "model"
    shutil.copytree(start(), model)
    found = {}
    for dropout in (0.0, 0.5):
        path = model / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": dropout}))
        found[dropout] = first_loss([*argv, "--pretrained_model_name_or_path", model], tmp_path / "run")
    assert found[0.5] < 3 * found[0.0]


def test_recomputed_activations_change_nothing(flags, tmp_path):
    """With dropout, whose masks the recomputation repeats too."""
    for name, more in {"kept": [], "recomputed": ["--gradient_checkpointing"]}.items():
        train(flags(*more, "--output_dir", tmp_path / name), main)
    kept, recomputed = (weights(tmp_path / name, "unet_raw") for name in ("kept", "recomputed"))
    assert max(float((kept[key] - recomputed[key]).abs().max()) for key in kept) < 1e-6


def test_both_points_are_computed_in_the_same_precision(flags, tmp_path):
    """Points so close that bfloat16 does not tell their inputs apart: else the rounding of one would be all of the loss."""
    argv = flags("--schedule_q", 50000, "--schedule_k", 0, "--num_stages", 1, "--max_train_steps", 1)
    exact, rounded = (first_loss([*argv, "--mixed_precision", p], tmp_path / "run") for p in ("no", "bf16"))
    assert rounded < 10 * exact


def toy():
    torch.manual_seed(0)
    unet = UNet2DModel.from_config({**TINY, "dropout": 0.0, "sample_size": 8, "in_channels": 3, "out_channels": 3})
    return unet, torch.optim.SGD(unet.parameters(), lr=0.01)


def one_step(accelerator, unet, optimizer, part):
    """The step of the script's loop on some rows of a batch of 8."""
    reference, noise, t = images(20, 3, 8, 8), normal(8, 3, 8, 8), torch.exp(normal(8, seed=2) * 1.2)
    objective = ConsistencyTrainingObjective(EDM())
    model, optimizer = accelerator.prepare(unet, optimizer)
    pair = objective.perturb(
        reference[part], reference=reference, source_index=torch.arange(8)[part], stage=1, t=t[part], noise=noise[part]
    )
    with torch.no_grad():
        earlier = unet(pair.earlier_input, pair.earlier_timestep).sample
    with accelerator.accumulate(model):
        output = model(pair.model_input, pair.timestep).sample
        accelerator.backward(objective.losses(output, earlier, pair).mean())
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])


def half_of_a_step(path):
    """One process of two."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    result = one_step(accelerator, *toy(), slice(4 * rank, 4 * rank + 4))
    if accelerator.is_main_process:
        torch.save(result, path)
    accelerator.end_training()


def test_two_processes_equal_one(tmp_path, fresh_accelerate_state):
    expected = one_step(Accelerator(cpu=True), *toy(), slice(0, 8))
    codes, said = Processes(half_of_a_step, tmp_path / "weights.pt", processes=2).wait()
    assert codes == [0, 0], said[-3000:]
    assert (torch.load(tmp_path / "weights.pt", weights_only=True) - expected).abs().max() < 1e-5
    assert (expected - torch.cat([p.detach().flatten() for p in toy()[0].parameters()])).abs().max() > 1e-3


def test_a_bank_shared_by_two_processes_is_the_bank(flags, tmp_path):
    for name, more in {"shared": ["--share_reference"], "whole": []}.items():
        argv = flags("--reference", "bank", *more, "--output_dir", tmp_path / name, "--search_levels", *FEW)
        assert "2 steps of 8 images; processes: 2." in launch(argv, processes=2, name=NAME)
    shared, whole = (weights(tmp_path / name, "unet_raw") for name in ("shared", "whole"))
    assert metadata(tmp_path / "shared")["consistency_sigmas"] == metadata(tmp_path / "whole")["consistency_sigmas"]
    assert max(float((shared[key] - whole[key]).abs().max()) for key in whole) < 1e-5


# f at sigma_max by its equations in float64, and the default call of plain Diffusers, where stf_diffusers cannot be imported.
PLAIN = r"""
import sys
sys.modules["stf_diffusers"] = None
import math, numpy as np, torch
from diffusers import DiffusionPipeline
folder, *seeds = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
generators = lambda: [torch.Generator().manual_seed(int(seed)) for seed in seeds]
np.save(folder + "/plain.npy", pipe(batch_size=len(seeds), generator=generators(), output_type="np").images)
config, unet = pipe.scheduler.config, pipe.unet.double()
sigma, data = config.sigma_max, config.sigma_data
x = sigma * torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators()]).double()
t = torch.full((len(seeds),), math.log(sigma) / 4, dtype=torch.float64)
root = math.sqrt(sigma**2 + data**2)
with torch.no_grad():
    f = (data / root) ** 2 * x + sigma * data / root * unet(x / root, t).sample
np.save(folder + "/f.npy", (f / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
assert not [name for name in sys.modules if name.startswith("stf_diffusers.")]
"""


def test_plain_diffusers_makes_the_images_of_the_script_in_one_step(flags, tmp_path):
    train(flags("--seed", 3), main)
    seeds = [str(generator.initial_seed()) for generator in generators(2, seed=3)]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "run"), *seeds]
    done = subprocess.run(command, env=os.environ | CPU, cwd=ROOT.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, f = (np.load(tmp_path / "run" / name) for name in ("plain.npy", "f.npy"))
    assert np.abs(plain - f).max() < 1e-4
    assert np.abs(np.rint(plain * 255).astype(int) - grid_of(tmp_path / "run")).max() <= 1


def test_two_steps_are_searched_for_and_evaluated(flags, extractor, image_folder, tmp_path):
    """The last record's distance in two steps, computed here from the saved folder, at the level that was found."""
    run, more = tmp_path / "run", ["--eval_steps", 1, "--eval_extractor", extractor, *FEW]
    train(flags("--search_levels", *more), main)
    first, last = json.loads((run / "evaluations.json").read_text())
    (level,) = metadata(run)["consistency_sigmas"]["2"]
    assert level in CANDIDATES and last["sigmas_2_steps"] == [level] and first["sigmas_2_steps"] == [0.5]
    pipe = STFPipeline.from_pretrained(run)
    images = pipe(6, num_inference_steps=2, generator=generators(6)).images
    compute = transformers_features(str(extractor), device="cpu")
    data = [Image.open(path) for path in sorted(image_folder.rglob("*.png"))]
    statistics = [FeatureStatistics.of(compute(as_pixels(part))) for part in (images, data)]
    assert last["frechet_distance_2_steps"] == pytest.approx(frechet_distance(*statistics), rel=1e-3)
    assert last["frechet_distance_2_steps"] != last["frechet_distance"]
    assert (
        f"Fréchet distance in 2 steps, likewise | {last['frechet_distance_2_steps']:.4g}"
        in (run / "README.md").read_text()
    )
    kept = min((first, last), key=lambda record: record["frechet_distance"])
    assert json.loads((run / "best" / "evaluation.json").read_text()) == kept


def test_a_level_is_found_by_pixels_and_by_a_run_that_has_no_step_left(flags, tmp_path):
    train(flags(), main)
    assert "consistency_sigmas" not in metadata(tmp_path / "run")
    train(flags("--search_levels", *FEW, "--resume_from_checkpoint", "latest"), main)
    (level,) = metadata(tmp_path / "run")["consistency_sigmas"]["2"]
    assert level in CANDIDATES


REFUSED = {
    "--vae x": "--vae: consistency models are trained on pixels; leave it out.",
    "--streaming": "--streaming: consistency models are trained on images that can be read in any order",
    "--reorient 0.5": "--reorient: consistency models are trained on upright images",
    "--num_inference_steps 2": "--num_inference_steps: samples during the training are made in one step",
    "--noise_process vp": "invalid choice: 'vp'",
    "--num_stages 17": "--num_stages 17 with --schedule_q 2: in the last stages float32 does not tell the two points apart",
    "--schedule_q 1": "must be above 1",
    "--objective dsm": "invalid choice: 'dsm'",
    "--objective ect --reference bank": "have no effect with --objective ect",
    "--objective ect --reference_batch_size 8": "no effect with --objective ect",
    "--sigma_min 10 --sigma_max 1": "0 < sigma_min < sigma_max",
    "--pretrained_model_name_or_path /nowhere": "--pretrained_model_name_or_path /nowhere cannot be read",
    "--class_conditional": "num_classes was None and is 2",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_refused_in_one_line(typed, flags, capsys, tmp_path):
    said = mistake(flags(*typed.split()), capsys, main)
    assert REFUSED[typed] in said and ": error: " in said
    assert not (tmp_path / "run").exists()


def test_a_pipeline_of_another_process_is_refused_by_name(flags, start, capsys):
    said = mistake(flags(model=start("--noise_process", "vp")), capsys, main)
    assert re.search(r"--pretrained_model_name_or_path .* was trained on vp, and consistency models are", said)


def test_a_pipeline_of_turned_images_is_refused_by_name(flags, start, capsys):
    said = mistake(flags(model=start("--reorient", 0.5)), capsys, main)
    assert "was trained with --reorient" in said and said.endswith("Pass a pipeline that was trained without.")


def test_a_pipeline_of_latents_is_refused_also_where_images_have_as_many_channels(flags, start, capsys, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    argv = flags("--image_mode", "RGBA", model=start("--vae", tmp_path / "vae"))
    assert "knows latents of its autoencoder, and this run trains on images" in mistake(argv, capsys, main)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_process_is_refused_in_one_line(flags, start, capsys, tmp_path):
    shutil.copytree(start("--noise_process", "vp"), tmp_path / "run")
    said = mistake(flags("--resume_from_checkpoint", "latest"), capsys, main)
    assert re.search(r"checkpoint-1 belongs to another run: .*process \(\{'name': 'vp'", said)
