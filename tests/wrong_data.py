"""Data that cannot be trained on, and what the training script says; and data that only looks so."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from pyarrow.parquet import ParquetWriter

from wrong_flags import Row


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode) if mode in ("CMYK", "LA") else Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **how: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def transparent_palette() -> bytes:
    image = picture().convert("P")
    image.info["transparency"] = 3
    return encoded(image, transparency=3)


def oversized_png() -> bytes:
    """A PNG header that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


GOOD = [encoded(picture(seed=seed)) for seed in range(8)]
TRUNCATED = encoded(picture(size=(8, 8), seed=9))[:-40]
FLOATS = encoded(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF")


def in_folder(
    name: str,
    content: bytes,
    says: str | tuple[str, ...],
    more: str = "",
    code: int = 2,
    *,
    others: Mapping[str, bytes] | None = None,
) -> Row:
    """Data: a folder of eight good images, this file, and others."""

    def make(root: Path) -> None:
        (root / "data").mkdir()
        good = {f"a{index}.png": image for index, image in enumerate(GOOD)}
        for file, image in (good | {name: content} | dict(others or {})).items():
            (root / "data" / file).write_bytes(image)

    return Row(f"--train_data_dir {{root}}/data {more}".strip(), says, make, code=code)


def in_parquet(says: str | tuple[str, ...], more: str = "", code: int = 2, **columns: list) -> Row:
    """Data: a parquet file with these columns; those that begin with bytes are images."""

    def make(root: Path) -> None:
        images = [name for name, values in columns.items() if isinstance(values[0], bytes)]
        encoded_images = {
            name: [value and {"bytes": value, "path": None} for value in columns[name]] for name in images
        }
        data = datasets.Dataset.from_dict(columns | encoded_images)
        for name in images:
            data = data.cast_column(name, datasets.Image())
        data.to_parquet(root / "data.parquet")

    return Row(f"--dataset_name {{root}}/data.parquet {more}".strip(), says, make, code=code)


def in_file(name: str, content: bytes, says: str | tuple[str, ...], more: str = "", code: int = 2) -> Row:
    """Data: this file."""

    def make(root: Path) -> None:
        (root / name).write_bytes(content)

    return Row(f"--dataset_name {{root}}/{name} {more}".strip(), says, make, code=code)


def arrays(**named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **named)
    return buffer.getvalue()


def without_rows(root: Path) -> None:
    features = datasets.Features({"image": datasets.Image()})
    # Not to_parquet, which earlier versions of Datasets cannot do without rows.
    ParquetWriter(root / "data.parquet", features.arrow_schema).close()


def only_a_test_split(root: Path) -> None:
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [picture()] * 8}, features=features)
    datasets.DatasetDict({"test": data}).save_to_disk(root / "data")


def no_images(root: Path) -> None:
    (root / "data").mkdir()
    (root / "data" / "notes.txt").write_text("nothing to see")


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
LABELLED = "--class_conditional --label_column label"
DATA = {
    "truncated image": in_folder("b.png", TRUNCATED, "image 8 cannot be decoded"),
    "first image truncated": in_folder("0.png", TRUNCATED, "image 0 cannot be decoded"),
    "no image at all": in_folder("b.png", b"hello", "image 8 cannot be decoded"),
    "an empty file": in_folder("b.png", b"", "image 8 cannot be decoded"),
    "claims to be enormous": in_folder("b.png", oversized_png(), "image 8 cannot be decoded"),
    "mixed sizes": in_folder("b.png", encoded(picture(size=(9, 9))), "image 8 is 9x9 where others are 8x8"),
    "not square": in_folder("0.png", encoded(picture(size=(9, 8))), "pass --resolution"),
    "32 bits, floating point": in_folder("b.tiff", FLOATS, "image 8 has mode 'F', values of no fixed range"),
    "alpha": in_folder(
        "b.png", encoded(picture("RGBA")), "image 8 has transparency. Pass --image_mode RGBA"
    ),
    "alpha of grey": in_folder("b.png", encoded(picture("LA")), "image 8 has transparency"),
    "palette with transparency": in_folder("b.png", transparent_palette(), "image 8 has transparency"),
    "CMYK": in_folder("b.jpg", encoded(picture("CMYK"), "JPEG"), "image 8 has mode CMYK"),
    "colour among grey": in_folder(
        "0.png", encoded(picture("L")), "image 1 has mode RGB where others are grey. Pass --image_mode RGB"
    ),
    "empty set": Row("--dataset_name {root}/data.parquet", "corresponds to no data", without_rows),
    "no training split": Row("--dataset_name {root}/data", "no 'train' split; it has ['test']", only_a_test_split),
    "a folder without images": Row(
        "--train_data_dir {root}/data", "there is no image in this folder; its files end in ['.txt']", no_images
    ),
    "an empty folder": Row(
        "--train_data_dir {root}/data", "it has no files", lambda root: (root / "data").mkdir()
    ),
    "missing image": in_parquet("image 8 is missing", image=[*GOOD, None]),
    "no images": in_parquet("no column holds images among ['text']", text=["a"] * 8),
    "two columns of images": in_parquet("choose one with --image_column", image=GOOD, image2=GOOD),
    "a column of numbers named as the image": in_parquet(
        "Choose another column", "--image_column size", image=GOOD, size=[8] * 8
    ),
    "fewer images than the batch": in_parquet("exceeds the 3 images there are. Lower it", image=GOOD[:3]),
    "no data": Row("--dataset_name {root}/nothing", "nothing cannot be read"),
    "a broken parquet file": in_file("x.parquet", b"no", "x.parquet cannot be read"),
    "a broken archive": in_file("x.zip", b"no", "File is not a zip file"),
    "an archive of another kind": in_file("x.rar", b"no", "pass a folder, or a file that ends in .parquet"),
    "a broken file of arrays": in_file("x.npz", b"no", "x.npz cannot be read"),
    "arrays of floats": in_file("x.npz", arrays(images=np.zeros((8, 8, 8))), "pixels of float64. Convert them to uint8"),
    "arrays under another name": in_file("x.npy", arrays(images=PIXELS), "it is a .npz file by its content. Rename it."),
    "an array of one image": in_file("x.npz", arrays(images=np.zeros((8, 8), np.uint8)), "one array of images is needed"),
    "enormous labels": in_parquet("Number the classes from 0", LABELLED, image=GOOD, label=[3] * 7 + [10**6]),
    "label missing": in_parquet("must be integers from 0", LABELLED, image=GOOD, label=[0, 1] * 3 + [None, 1]),
    "label out of range": in_parquet("must be integers from 0", LABELLED, image=GOOD, label=[0, 1] * 3 + [-1, 1]),
    "labels of text and none": in_parquet(
        "must be integers from 0, or all strings", LABELLED, image=GOOD, label=[*["cat", "dog"] * 3, "cat", None]
    ),
    "fractional labels": in_parquet("must be integers from 0", LABELLED, image=GOOD, label=[0.5, 1.0] * 4),
    "no labels": in_parquet("no class labels among ['image']", "--class_conditional", image=GOOD),
    "two columns of labels": in_parquet(
        "choose one with --label_column", "--class_conditional", image=GOOD, label=[0, 1] * 4, cls=[0, 1] * 4
    ),
}  # fmt: skip

# What looks wrong and is not: one step is trained.
STEP = "--max_train_steps 1"
EVERY_KIND = {"c.jpg": encoded(picture("CMYK"), "JPEG"), "d.png": GOOD[0], "e.png": transparent_palette()}
UNUSUAL = {
    **{
        f"images of all kinds as {mode}": in_folder(
            "b.png", encoded(picture("RGBA")), f"12 images of ({len(mode)}, 8, 8)", f"{STEP} --image_mode {mode}", 0,
            others=EVERY_KIND,
        )
        for mode in ("RGB", "RGBA", "L")
    },
    "an image left out": in_folder("b.png", TRUNCATED, "Left out 1 of 9 images", f"{STEP} --skip_corrupt", code=0),
    "images that are not square": in_folder("b.png", encoded(picture(size=(9, 12))), "9 images of (3, 8, 4)", f"{STEP} --resolution 8 4 --noise_process vp", code=0),
    "pixels in an array": in_file("x.npz", arrays(x=PIXELS), "8 images of (3, 8, 8)", STEP, code=0),
    "16 bits": in_file("x.npz", arrays(x=np.uint16(257) * PIXELS), "8 images of (3, 8, 8)", STEP, code=0),
    "string labels": in_parquet("8 images of (3, 8, 8)", f"{STEP} {LABELLED}", 0, image=GOOD, label=["cat", "dog"] * 4),
    "a class of one image": in_parquet(
        "Classes of a single image have the targets of denoising score matching: [5]", f"{STEP} {LABELLED}", 0,
        image=GOOD, label=[0, 0, 0, 1, 1, 1, 1, 5],
    ),
    "settings without effect": Row(
        f"{STEP} --lr_warmup_steps 5 --sample_steps 9 --num_epochs 3",
        ("--lr_warmup_steps 5 of 1", "--sample_steps 9 has no effect", "--num_epochs has no effect"), code=0,
    ),
}  # fmt: skip
