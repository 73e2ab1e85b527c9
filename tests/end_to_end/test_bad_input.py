"""Wrong data, files and weights, through the real `main(argv)`: a message that names the fix, nothing written."""

import io
import json
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from exact_networks import small_unet
from stf_diffusers import EDM
from stf_diffusers.export import diffusers_pipeline, save_pipeline
from tiny import mistake, train


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
    """Data: a parquet file with these columns; those that begin with bytes are images."""

    def make(path):
        path.mkdir()
        images = [name for name, values in columns.items() if isinstance(values[0], bytes)]
        rows = columns | {
            name: [value and {"bytes": value, "path": None} for value in columns[name]] for name in images
        }
        data = datasets.Dataset.from_dict(rows)
        for name in images:
            data = data.cast_column(name, datasets.Image())
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


FLOATS = encoded(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF")
TRUNCATED = encoded(picture(size=(8, 8), seed=9))[:-40]

DATA = {
    "truncated image": (folder_of(("b.png", TRUNCATED)), "image 8 cannot be decoded"),
    "first image truncated": (folder_of(("0.png", TRUNCATED)), "image 0 cannot be decoded"),
    "no image at all": (folder_of(("b.png", b"hello")), "image 8 cannot be decoded"),
    "claims to be enormous": (folder_of(("b.png", oversized_png())), "image 8 cannot be decoded"),
    "mixed sizes": (folder_of(("b.png", encoded(picture(size=(9, 9))))), "image 8 is 9x9 where others are 8x8"),
    "not square": (folder_of(("0.png", encoded(picture(size=(9, 8))))), "pass --resolution"),
    "32 bits, floating point": (folder_of(("b.tiff", FLOATS)), "image 8 has mode 'F', values of no fixed range"),
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
    "enormous labels": ([3] * 7 + [10**6], "Number the classes from 0"),
    "label missing": ([0, 1] * 3 + [None, 1], "must be integers from 0"),
    "label out of range": ([0, 1] * 3 + [-1, 1], "must be integers from 0"),
    "labels of text and none": ([*["cat", "dog"] * 3, "cat", None], "must be integers from 0, or all strings"),
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


@pytest.fixture
def refused(flags, tmp_path, capsys):
    """refused(*flags): what a run without data of its own says that cannot start; nothing may have been written."""

    def run(*argv):
        said = mistake([*flags()[2:], *argv], capsys)
        assert not (tmp_path / "run").exists()
        return said

    return run


@pytest.mark.parametrize("case", DATA)
def test_data(case, refused, tmp_path):
    make, message = DATA[case]
    assert message in refused(*make(tmp_path / "data"))


def test_no_network_config(refused, image_folder, tmp_path):
    data = ["--train_data_dir", image_folder]
    assert "nor a readable JSON file" in refused(*data, "--model_config", tmp_path / "no.json")
    (tmp_path / "text.json").write_text("{")
    assert "nor a readable JSON file" in refused(*data, "--model_config", tmp_path / "text.json")
    (tmp_path / "vae.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "config of a UNet2DModel" in refused(*data, "--model_config", tmp_path / "vae.json")


def test_places_that_cannot_be_written(refused, image_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        said = refused("--train_data_dir", image_folder, "--output_dir", tmp_path / output)
        assert "is not a writable folder" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_pretrained_weights(flags, tmp_path):
    grey, broken = tmp_path / "grey", tmp_path / "broken"
    save_pipeline(diffusers_pipeline(small_unet(1), EDM()), grey)
    unet = small_unet(3)
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    save_pipeline(diffusers_pipeline(unet, EDM()), broken)
    argv = flags()[:2] + flags()[4:]
    for folder, message in ((grey, "has 1 channels and the images have 3"), (broken, "weights are not finite")):
        with pytest.raises(ValueError, match=message):
            train([*argv, "--pretrained_model_name_or_path", folder])
    assert not (tmp_path / "run").exists()


def test_modes_that_are_converted_when_asked(flags, tmp_path):
    files = ("b.png", encoded(picture("RGBA"))), ("c.jpg", encoded(picture("CMYK"), "JPEG")), ("d.png", GOOD[0])
    data = folder_of(*files, ("e.png", transparent_palette()))(tmp_path / "data")
    for mode in ("RGB", "RGBA", "L"):
        train(flags(*data, "--image_mode", mode, "--output_dir", tmp_path / mode, "--max_train_steps", 1))
        config = json.loads((tmp_path / mode / "unet" / "config.json").read_text())
        assert config["in_channels"] == len(mode)


def test_a_class_of_one_image_is_told(flags, tmp_path, caplog):
    data = parquet_of(image=GOOD, label=[0, 0, 0, 1, 1, 1, 1, 5])(tmp_path / "data")
    train([*flags()[2:], *data, "--class_conditional", "--label_column", "label", "--max_train_steps", 1])
    assert "Classes of a single image have the targets of denoising score matching: [5]" in caplog.text


def test_weights_that_are_not_finite_are_not_saved(flags, tmp_path):
    enormous = ["--learning_rate", 1e38, "--adam_weight_decay", 1e38]
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 1\. They were not saved"):
        train(flags(*enormous, "--max_train_steps", 1))
    assert [path.name for path in (tmp_path / "run").glob("*")] == ["metrics.jsonl"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_names_its_images_and_keeps_the_last_checkpoint(accumulation, flags, tmp_path):
    more = ["--learning_rate", 1e30, "--max_train_steps", 50, "--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+.*\d \(sigma [\d.e+-]+\)") as stop:
        train(flags(*more, "--gradient_accumulation_steps", accumulation))
    failed = int(str(stop.value).split("at step ")[1].split(".")[0])
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert max(int(path.name.split("-")[1]) for path in kept) == failed - 1
    assert not (tmp_path / "run" / "model_index.json").exists()
