"""Wrong data, flags, files and weights, through the real `main(argv)`: a message that names the fix, nothing written."""

import io
import json
import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_training import TINY

import train_unconditional_stf as script
from stf_diffusers.export import diffusers_pipeline, save_pipeline
from test_export import PROCESSES, small_unet

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def picture(mode="RGB", size=(8, 8), seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode) if mode in ("CMYK", "LA") else Image.fromarray(pixels)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def transparent_palette():
    image = picture().convert("P")
    image.info["transparency"] = 3
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=3)
    return buffer.getvalue()


def oversized_png():
    """A PNG header that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


GOOD = [encoded(picture(seed=seed)) for seed in range(8)]


def folder_of(*files):
    """Data: a folder of eight good images and then these files (name, bytes)."""

    def make(path):
        path.mkdir()
        for index, content in enumerate(GOOD):
            (path / f"a{index}.png").write_bytes(content)
        for name, content in files:
            (path / name).write_bytes(content)
        return ["--train_data_dir", path]

    return make


def parquet_of(**columns):
    """Data: a parquet file with these columns; `image` is of bytes."""

    def make(path):
        features = {
            name: datasets.Image() if name.startswith("image") and not isinstance(values[:1], str) else None
            for name, values in columns.items()
        }
        rows = {
            name: [{"bytes": value, "path": None} if isinstance(value, bytes) else value for value in values]
            for name, values in columns.items()
        }
        data = datasets.Dataset.from_dict(rows)
        for name, feature in features.items():
            if feature is not None and columns[name] and isinstance(columns[name][0], bytes):
                data = data.cast_column(name, feature)
        path.mkdir()
        data.to_parquet(path / "data.parquet")
        return ["--dataset_name", path / "data.parquet"]

    return make


def empty(path):
    path.mkdir()
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(path / "data.parquet")
    return ["--dataset_name", path / "data.parquet"]


def only_test_split(path):
    data = datasets.Dataset.from_dict(
        {"image": [picture()] * 8}, features=datasets.Features({"image": datasets.Image()})
    )
    datasets.DatasetDict({"test": data}).save_to_disk(path)
    return ["--dataset_name", path]


SIXTEEN_BITS = encoded(Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)))
TRUNCATED = encoded(picture(size=(8, 8), seed=9))[:-40]

DATA = {
    "truncated image": (folder_of(("b.png", TRUNCATED)), "image 8 cannot be decoded"),
    "first image truncated": (folder_of(("0.png", TRUNCATED)), "image 0 cannot be decoded"),
    "no image at all": (folder_of(("b.png", b"hello")), "image 8 cannot be decoded"),
    "claims to be enormous": (folder_of(("b.png", oversized_png())), "image 8 cannot be decoded"),
    "mixed sizes": (folder_of(("b.png", encoded(picture(size=(9, 9))))), "image 8 is 9x9 where others are 8x8"),
    "not square": (folder_of(("0.png", encoded(picture(size=(9, 8))))), "pass --resolution"),
    "16 bits": (folder_of(("b.png", SIXTEEN_BITS)), "image 8 has mode 'I;16', more than 8 bits a channel"),
    "alpha": (folder_of(("b.png", encoded(picture("RGBA")))), "image 8 has transparency. Pass --image_mode RGBA"),
    "alpha of grey": (folder_of(("b.png", encoded(picture("LA")))), "image 8 has transparency"),
    "palette with transparency": (folder_of(("b.png", transparent_palette())), "image 8 has transparency"),
    "CMYK": (folder_of(("b.jpg", encoded(picture("CMYK"), "JPEG"))), "image 8 has mode CMYK"),
    "colour among grey": (
        folder_of(("0.png", encoded(picture("L")))),
        "image 1 has mode RGB where others are grey. Pass --image_mode RGB",
    ),
    "empty set": (empty, "corresponds to no data"),
    "no training split": (only_test_split, "no 'train' split; it has ['test']"),
    "missing image": (parquet_of(image=[*GOOD, None]), "image 8 is missing"),
    "no images": (parquet_of(text=["a"] * 8), "no column holds images among ['text']"),
    "two columns of images": (parquet_of(image=GOOD, image2=GOOD), "choose one with --image_column"),
    "fewer images than the batch": (parquet_of(image=GOOD[:3]), "exceeds the 3 images there are. Lower it"),
    "no data": (lambda path: ["--dataset_name", path / "nothing"], "nothing cannot be read"),
    "a broken parquet file": (
        lambda path: (path.mkdir(), (path / "x.parquet").write_bytes(b"no"), ["--dataset_name", path / "x.parquet"])[2],
        "x.parquet cannot be read",
    ),
}
LABELS = {
    "label missing": ([0, 1] * 3 + [None, 1], "must be integers from 0"),
    "label out of range": ([0, 1] * 3 + [-1, 1], "must be integers from 0"),
    "labels of text": (["cat", "dog"] * 4, "must be integers from 0"),
    "fractional labels": ([0.5, 1.0] * 4, "must be integers from 0"),
}
DATA |= {
    name: (
        lambda path, labels=labels: [*parquet_of(image=GOOD, label=labels)(path), "--class_conditional", "--label_column", "label"],
        message,
    )
    for name, (labels, message) in LABELS.items()
}  # fmt: skip
DATA["no labels"] = (
    lambda path: [*parquet_of(image=GOOD)(path), "--class_conditional"],
    "no class labels among ['image']",
)


def refused(argv, tmp_path, capsys, output="run"):
    """Run `main` and return what it said; nothing may have been written."""
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    base = ["--output_dir", tmp_path / output, "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 1]
    base += ["--report_to", "none", "--num_inference_steps", 2]
    if "--model_config" not in argv and "--pretrained_model_name_or_path" not in argv:
        base += ["--model_config", tmp_path / "net.json"]
    with pytest.raises((ValueError, SystemExit)) as refusal:
        train([str(flag) for flag in (*base, *argv)])
    assert not isinstance(refusal.value, SystemExit) or refusal.value.code != 0
    assert not (tmp_path / "run").exists()
    return str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize("case", DATA)
def test_data(case, tmp_path, capsys):
    make, message = DATA[case]
    assert message in refused(make(tmp_path / "data"), tmp_path, capsys)


FLAGS = {
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
    "--mixed_precision fp8": "invalid choice",
    "--image_mode CMYK": "invalid choice",
    "--resolution 0": "at least 1",
    "--reference_memory_gb 0": "above 0",
    "--dataloader_num_workers -1": "at least 0",
    "--learning_rate inf": "above 0",
    "--p_mean nan": "at least -20 and at most 20",
    "--p_std 1e6": "at most 10",
    "--num_inference_steps 2000": "at most 1000",
    "--epsilon_t 0.9 --noise_process vp": "at most 0.5",
    "--no_such_flag 1": "unrecognized arguments",
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, tmp_path, capsys):
    argv = folder_of()(tmp_path / "data") + case.split()
    assert FLAGS[case] in refused(argv, tmp_path, capsys)


def test_no_network_config(tmp_path, capsys):
    data = folder_of()(tmp_path / "data")
    assert "not a readable JSON file" in refused([*data, "--model_config", tmp_path / "no.json"], tmp_path, capsys)
    (tmp_path / "text.json").write_text("{")
    assert "not a readable JSON file" in refused([*data, "--model_config", tmp_path / "text.json"], tmp_path, capsys)
    (tmp_path / "vae.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "config of a UNet2DModel" in refused([*data, "--model_config", tmp_path / "vae.json"], tmp_path, capsys)


def test_places_that_cannot_be_written(tmp_path, capsys):
    data = folder_of()(tmp_path / "data")
    (tmp_path / "file").write_text("mine")
    assert "no folder that can be written to" in refused(data, tmp_path, capsys, output="file")
    assert "no folder that can be written to" in refused(data, tmp_path, capsys, output="file/below")
    assert (tmp_path / "file").read_text() == "mine"


def test_pretrained_weights(tmp_path, capsys):
    data = folder_of()(tmp_path / "data")
    grey, broken = tmp_path / "grey", tmp_path / "broken"
    save_pipeline(diffusers_pipeline(small_unet(1, 8), PROCESSES["edm"]), grey)
    unet = small_unet(3, 8)
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    save_pipeline(diffusers_pipeline(unet, PROCESSES["edm"]), broken)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    flag = "--pretrained_model_name_or_path"
    assert "has 1 channels and the images have 3" in refused([*data, flag, grey], tmp_path, capsys)
    assert "weights are not finite" in refused([*data, flag, broken], tmp_path, capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


def test_modes_that_are_converted_when_asked(tmp_path):
    files = ("b.png", encoded(picture("RGBA"))), ("c.jpg", encoded(picture("CMYK"), "JPEG")), ("d.png", GOOD[0])
    data = folder_of(*files, ("e.png", transparent_palette()))(tmp_path / "data")
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    for mode in ("RGB", "RGBA", "L"):
        argv = [*data, "--image_mode", mode, "--output_dir", tmp_path / mode, "--train_batch_size", 4]
        argv += ["--model_config", tmp_path / "net.json", "--max_train_steps", 1, "--num_samples", 1]
        train([str(flag) for flag in (*argv, "--report_to", "none", "--num_inference_steps", 2)])
        assert (tmp_path / mode / "model_index.json").is_file()


def test_a_class_of_one_image_is_told(tmp_path, caplog):
    data = parquet_of(image=GOOD, label=[0, 0, 0, 1, 1, 1, 1, 5])(tmp_path / "data")
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    argv = [*data, "--class_conditional", "--label_column", "label", "--output_dir", tmp_path / "run"]
    argv += ["--train_batch_size", 4, "--model_config", tmp_path / "net.json", "--max_train_steps", 1]
    train([str(flag) for flag in (*argv, "--num_samples", 1, "--report_to", "none", "--num_inference_steps", 2)])
    assert "Classes of a single image have the targets of denoising score matching: [5]" in caplog.text


def run_argv(tmp_path, *more):
    data = (
        folder_of()(tmp_path / "data") if not (tmp_path / "data").exists() else ["--train_data_dir", tmp_path / "data"]
    )
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    argv = [*data, "--output_dir", tmp_path / "run", "--model_config", tmp_path / "net.json", "--train_batch_size", 4]
    argv += ["--report_to", "none", "--num_samples", 1, "--num_inference_steps", 2, "--lr_warmup_steps", 0]
    return [str(flag) for flag in (*argv, *more)]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 1\. They were not saved"):
        train(
            run_argv(tmp_path, "--learning_rate", "1e38", "--adam_weight_decay", "1e38", "--max_train_steps", 1)
        )
    assert not list((tmp_path / "run").glob("*"))


DAMAGES = {
    "cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
    "without averages": lambda folder: (folder / "ema.safetensors").unlink(),
    "without optimizer": lambda folder: (folder / "optimizer.bin").unlink(),
    "garbled manifest": lambda folder: (folder / "training_state.json").write_text("{garb"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints_are_named(case, tmp_path):
    argv = run_argv(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    train(argv)
    DAMAGES[case](tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2.*damaged.*(Delete|delete)"):
        train(argv)


def test_a_checkpoint_from_elsewhere_needs_a_folder_without_any(tmp_path):
    argv = run_argv(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    train(argv)
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-1")
    from_there = ["--resume_from_checkpoint", str(tmp_path / "elsewhere" / "checkpoint-1")]
    with pytest.raises(ValueError, match="holds checkpoints of its own"):
        train([*argv, *from_there])
    train([*argv, *from_there, "--output_dir", str(tmp_path / "new")])
    assert (tmp_path / "new" / "checkpoint-2").is_dir()


def test_an_overwriting_run_that_cannot_start_loses_nothing(tmp_path):
    argv = run_argv(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    train(argv)
    (tmp_path / "run" / "logs").write_text("in the way of the tracker")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"tracker does not start: .*logs.* --report_to none"):
        train([*argv, "--overwrite_output_dir", "--report_to", "tensorboard"])
    assert sorted(tmp_path.rglob("*")) == before


def test_enormous_labels(tmp_path, capsys):
    make = parquet_of(image=GOOD, label=[3] * 7 + [10**6])
    argv = [*make(tmp_path / "data"), "--class_conditional", "--label_column", "label"]
    assert "Number the classes from 0" in refused(argv, tmp_path, capsys)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_names_its_images_and_keeps_the_last_checkpoint(accumulation, tmp_path):
    data = folder_of()(tmp_path / "data")
    (tmp_path / "net.json").write_text(json.dumps(TINY))
    argv = [*data, "--output_dir", tmp_path / "run", "--model_config", tmp_path / "net.json", "--train_batch_size", 4]
    argv += ["--learning_rate", 1e30, "--lr_warmup_steps", 0, "--max_train_steps", 50, "--checkpointing_steps", 1]
    argv += ["--report_to", "none", "--gradient_accumulation_steps", accumulation, "--lr_scheduler", "constant"]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+.*\d \(sigma [\d.e+-]+\)") as stop:
        train([str(flag) for flag in argv])
    failed = int(str(stop.value).split("at step ")[1].split(".")[0])
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert max(int(path.name.split("-")[1]) for path in kept) == failed - 1
    assert not (tmp_path / "run" / "model_index.json").exists()
