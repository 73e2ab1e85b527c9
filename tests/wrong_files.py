"""Files and folders that are there already, and flags of the scripts beside the trainer: what is refused, and how."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from PIL import Image

from exact_networks import small_unet
from stf_diffusers import EDM, SchedulerProcess
from stf_diffusers.export import diffusers_pipeline, process_to_config, save_pipeline
from tiny import TINY
from wrong_data import TRUNCATED, picture
from wrong_flags import PLACES, Row


def written(name: str, content: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)

    return make


def pretrained(channels: int = 3, *, broken: bool = False) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        unet = small_unet(channels)
        if broken:
            with torch.no_grad():
                unet.conv_in.weight[0, 0, 0, 0] = torch.nan
        save_pipeline(diffusers_pipeline(unet, EDM()), root / "saved")

    return make


def stock(scheduler: diffusers.SchedulerMixin, out_channels: int = 3, *, ours: bool = False) -> Callable[[Path], None]:
    """A pipeline that Diffusers saves, or that we did before variances were looked for."""

    def make(root: Path) -> None:
        if ours:
            scheduler.register_to_config(
                _stf={"process": process_to_config(SchedulerProcess(diffusers.DDPMScheduler()))}
            )
        network = diffusers.UNet2DModel.from_config(TINY | {"sample_size": 8, "out_channels": out_channels})
        diffusers.DDPMPipeline(network, scheduler).save_pretrained(root / "saved")

    return make


def copied(place: str, damage: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], None]:
    """A folder of `make_places` as the run's own, with something done to it."""

    def make(root: Path) -> None:
        shutil.copytree(root / PLACES / place, root / "run")
        damage(root / "run")

    return make


def emptied(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(b"")


LEARNED = {"variance_type": "learned_range"}
SAVED = "--pretrained_model_name_or_path {root}/saved"
LATEST = "--resume_from_checkpoint latest"
SAME = f"{LATEST} --lr_scheduler constant --post_hoc_ema"
OPTIMIZER, STATE = "checkpoint-2/optimizer.bin", "checkpoint-2/training_state.json"
FOLDERS = {
    "no network config": Row("--model_config {root}/no.json", "nor a readable JSON file"),
    "a broken network config": Row("--model_config {root}/a.json", "nor a readable JSON file", written("a.json", "{")),
    "the config of an autoencoder": Row(
        "--model_config {root}/a.json", "config of a UNet2DModel", written("a.json", '{"_class_name": "AutoencoderKL"}')
    ),
    "the output is a file": Row("--output_dir {root}/file", "is not a writable folder", written("file", "mine")),
    "the output is below a file": Row(
        "--output_dir {root}/file/below", "is not a writable folder", written("file", "mine")
    ),
    "pretrained on grey images": Row(SAVED, "has 1 channels and the images have 3", pretrained(1)),
    "pretrained weights that are not finite": Row(SAVED, "weights are not finite", pretrained(broken=True)),
    "pretrained on another process": Row(f"{SAVED} --noise_process vp", "was trained on edm", pretrained()),
    "pretrained without classes": Row(
        f"{SAVED} --class_conditional", "knows no classes and this run has 2", pretrained()
    ),
    "no pretrained pipeline": Row(SAVED, "--pretrained_model_name_or_path", written("saved/notes.txt", "")),
    "a pretrained folder that is not there": Row(SAVED, "--pretrained_model_name_or_path"),
    "pretrained with learned variances": Row(
        SAVED, "with variance_type 'learned_range'", stock(diffusers.DDPMScheduler(**LEARNED), 6)
    ),
    "learned variances in a folder of ours": Row(
        SAVED, "with variance_type 'learned_range'", stock(diffusers.DDPMScheduler(**LEARNED), 6, ours=True)
    ),
    "variances unsaid in a folder of ours": Row(
        SAVED, "predicts variances too", stock(diffusers.DDPMScheduler(), 6, ours=True)
    ),
    "pretrained with variances unsaid": Row(SAVED, "predicts variances too", stock(diffusers.DDPMScheduler(), 6)),
    "pretrained on other betas": Row(
        f"{SAVED} --ddpm_num_steps 50", "was trained with 1000", stock(diffusers.DDPMScheduler())
    ),
    "pretrained by an unknown scheduler": Row(
        SAVED, "does not say which noise process", stock(diffusers.ScoreSdeVeScheduler())
    ),
    "a run is there": Row("", "--overwrite_output_dir", copied("run")),
    "another seed on resuming": Row(f"--seed 1 {LATEST}", "belongs to another run: seed", copied("run")),
    "another batch size on resuming": Row(
        f"--train_batch_size 6 {LATEST}", "belongs to another run: train_batch_size", copied("run")
    ),
    "behind later checkpoints": Row(
        "--resume_from_checkpoint checkpoint-1", "later checkpoints than checkpoint-1", copied("run")
    ),
    "a damaged checkpoint": Row(SAME, ("checkpoint-2", "damaged"), copied("run", emptied(OPTIMIZER))),
    "a damaged record of a checkpoint": Row(SAME, ("checkpoint-2", "damaged"), copied("run", emptied(STATE))),
}

# ---- the other scripts

GENERATE, QUALITY, VARIANCE, RECONSTRUCT = "generate", "quality_report", "variance_report", "reconstruct_ema"


def samples(count: int = 5, **kinds: Image.Image) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / "samples").mkdir()
        for index in range(count):
            picture(seed=index).save(root / "samples" / f"{index}.png")
        for name, image in kinds.items():
            image.save(root / "samples" / f"{name}.png")

    return make


def a_broken_sample(root: Path) -> None:
    samples()(root)
    (root / "samples" / "5.png").write_bytes(TRUNCATED)


def of(script: str, typed: str, says: str | tuple[str, ...], make: Callable[[Path], object] | None = None) -> Row:
    return Row(typed, says, make, script)


HOW = "--sampler x --seeds x --extractor {extractor}"
OTHER_SCRIPTS = {
    "no image": of(GENERATE, "--num_images 0", "--num_images must be at least 1; got 0"),
    "a negative seed": of(GENERATE, "--seed -1", "--seed must not be negative"),
    "half a batch": of(GENERATE, "--batch_size 1.5", "invalid int value"),
    "no sampling step": of(GENERATE, "--num_inference_steps 0", "--num_inference_steps must be at least 1"),
    "another solver": of(GENERATE, "--solver dopri5", "invalid choice"),
    "no model": of(GENERATE, "--model {root}/nothing", "--model"),
    "a folder that is no model": of(GENERATE, "--model {root}/saved", "--model", written("saved/notes.txt", "")),
    "a class beyond": of(GENERATE, "--class_label 3", "the model knows 2 classes"),
    "a class by a wrong name": of(GENERATE, "--class_label gloomy", "called bright, dark"),
    "a class where there is none": of(GENERATE, "--model {run} --class_label 0", "the model knows no classes"),
    "guidance without a dropped condition": of(GENERATE, "--guidance_scale 2", "--guidance_scale needs a model"),
    "guidance that is no number": of(GENERATE, "--guidance_scale nan", "--guidance_scale"),
    "samples of other settings": of(
        GENERATE, "", "was begun with other settings: model", written("run/settings.json", "{}")
    ),
    "damaged settings of samples": of(GENERATE, "", "settings.json", written("run/settings.json", "{")),
    "samples into a file": of(GENERATE, "", ("--output_dir", "is not a writable folder"), written("run", "mine")),
    "samples of learned variances": of(
        GENERATE,
        "--model {root}/saved",
        "with variance_type 'learned_range'",
        stock(diffusers.DDPMScheduler(**LEARNED), 6),
    ),
    "samples of learned variances in a folder of ours": of(
        GENERATE,
        "--model {root}/saved",
        "with variance_type 'learned_range'",
        stock(diffusers.DDPMScheduler(**LEARNED), 6, ours=True),
    ),
    "samples of variances unsaid": of(
        GENERATE, "--model {root}/saved", "predicts variances too", stock(diffusers.DDPMScheduler(), 6, ours=True)
    ),
    "more samples than asked for": of(GENERATE, "", "beyond the 2 asked for", written("run/images/000002.png", "")),
    "no extractor for a report": of(QUALITY, "", "pass one of --extractor and --inception_weights"),
    "two extractors": of(QUALITY, "--extractor x --inception_weights y", "pass one of"),
    "an extractor that is not there": of(
        QUALITY, "--extractor {root}/nothing --sampler x --seeds x", "nothing", samples()
    ),
    "no samples": of(QUALITY, HOW, "0 images found; at least 5 are needed"),
    "too few samples": of(QUALITY, HOW, "4 images found; at least 5 are needed", samples(4)),
    "samples of unknown origin": of(QUALITY, "--extractor x", "pass --sampler and --seeds", samples()),
    "samples of two sizes": of(QUALITY, HOW, "must be alike in size and in mode", samples(x=picture(size=(9, 8)))),
    "samples of two modes": of(QUALITY, HOW, "must be alike in size and in mode", samples(x=picture("L"))),
    "a broken sample": of(QUALITY, HOW, "5.png", a_broken_sample),
    "a report of samples into a file": of(
        QUALITY, HOW, "is not a writable folder", lambda root: (samples()(root), written("run", "")(root))
    ),
    "no reference split": of(QUALITY, f"{HOW} --reference_split test", "no 'test' split", samples()),
    "a batch of none": of(QUALITY, "--extractor x --batch_size 0", "--batch_size must be at least 1"),
    "a variance of one image": of(VARIANCE, "--max_images 1", "--max_images must be at least 2"),
    "one noise level": of(VARIANCE, "--num_levels 1", "--num_levels must be at least 2"),
    "levels upside down": of(VARIANCE, "--min_noise_level 5 --max_noise_level 1", "below --max_noise_level"),
    "n of none": of(VARIANCE, "--reference_batch_sizes 0 4", "--reference_batch_sizes must be at least 1"),
    "n above all images": of(VARIANCE, "--reference_batch_sizes 100", "there are 24 images, fewer than any n"),
    "levels beyond the process": of(
        VARIANCE, "--noise_process vp --max_noise_level 1e6", "beyond the last time of --noise_process vp"
    ),
    "a parameter of another process": of(
        VARIANCE, "--noise_process vp --p_mean 0", "--p_mean is not a parameter of --noise_process vp"
    ),
    "a spread of none": of(VARIANCE, "--p_std 0", "--p_std"),
    "a side of none": of(VARIANCE, "--resolution 0", "--resolution"),
    "data that is not there": of(VARIANCE, "--train_data_dir {root}/nothing", "--train_data_dir"),
    "a report into a file": of(VARIANCE, "", ("--output_dir", "is not a writable folder"), written("run", "mine")),
    "an average into its own model": of(RECONSTRUCT, "--output_dir {run}", "the trained model's own folder"),
    "an average into a file": of(RECONSTRUCT, "", "is not a writable folder", written("run", "mine")),
    "an average too wide": of(RECONSTRUCT, "--sigma_rel 0.5", "below 0.288; got 0.5"),
    "an average of no width": of(RECONSTRUCT, "--sigma_rel 0", "sigma_rel must lie above 0"),
    "an average of a width that is no number": of(RECONSTRUCT, "--sigma_rel nan", "got nan"),
    "an average without snapshots": of(RECONSTRUCT, "--model {classes}", "there are no snapshots"),
}
