"""Decoded images on the disk: made once, mapped, checked, and never torn."""

import multiprocessing
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stf_diffusers.training import image_cache
from stf_diffusers.training.data_set import load_split
from stf_diffusers.training.image_data import open_images
from stf_diffusers.training.image_reader import decode_all


@pytest.fixture
def data(tmp_path):
    """40 images in a folder, as Datasets keeps them: their paths in an Arrow file."""
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / f"{number:02d}.png")
    return load_split(str(tmp_path / "images"), cache_dir=str(tmp_path / "datasets"))


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the data sets that were decoded."""
    sizes = []

    def counted(dataset, *args):
        sizes.append(len(dataset))
        return decode_all(dataset, *args)

    monkeypatch.setattr(image_cache, "decode_all", counted)
    return sizes


def files(folder):
    return sorted((folder / "stf_diffusers" / "decoded").rglob("*.safetensors"))


def test_images_are_decoded_once_and_mapped(data, decoded, tmp_path):
    first, second = (open_images(data, cache_dir=str(tmp_path), quiet=True) for _ in range(2))
    plain = open_images(data, image_cache=False, quiet=True)
    assert decoded == [40] and len(files(tmp_path)) == 1
    assert torch.equal(first.images, plain.images) and torch.equal(second.images, plain.images)
    assert first.digest() == second.digest() == plain.digest()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or files(tmp_path)[0].name in maps.read_text()


def test_other_readers_and_other_rows_have_files_of_their_own(data, decoded, tmp_path):
    for how in ({}, {"image_mode": "L"}, {"resolution": 4}, {"resolution": (4, 6), "center_crop": True}):
        open_images(data, cache_dir=str(tmp_path), quiet=True, **how)
    open_images(data.select(range(20)), cache_dir=str(tmp_path), quiet=True)
    assert decoded == [40] * 4 + [20] and len(files(tmp_path)) == 5


def test_what_is_not_kept(data, decoded, tmp_path):
    """Random crops, more than the memory allows, a data set that is nowhere on the disk."""
    assert open_images(data, resolution=(4, 6), cache_dir=str(tmp_path), quiet=True).images is None
    assert open_images(data, image_memory_gb=0, cache_dir=str(tmp_path), quiet=True).images is None
    in_memory = datasets.Dataset.from_dict({"image": [np.zeros((4, 4), np.uint8)] * 3})
    assert open_images(in_memory, cache_dir=str(tmp_path), quiet=True).images.shape == (3, 1, 4, 4)
    assert not files(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "another header", "other images", "emptied"])
def test_a_damaged_file_is_made_again(damage, data, decoded, tmp_path, caplog):
    open_images(data, cache_dir=str(tmp_path), quiet=True)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    harm = {
        "truncated": whole[:-5],
        "another header": whole.replace(b'"images"', b'"pixels"'),
        "other images": whole[:-7680] + bytes(7680),
        "emptied": b"",
    }
    file.write_bytes(harm[damage])
    images = open_images(data, cache_dir=str(tmp_path), quiet=True).images
    assert torch.equal(images, open_images(data, image_cache=False, quiet=True).images)
    assert decoded == [40, 40] and "Decoded images are made again" in caplog.text
    assert file.read_bytes() == whole


@pytest.mark.parametrize("rows", [range(40), [1, 5, 0, 3]], ids=["all", "some"])
@pytest.mark.parametrize("row", [0, 1])
def test_an_image_file_that_was_replaced(row, rows, data, decoded, tmp_path):
    """Datasets' fingerprint is of the paths it has read, not of what they hold now."""
    data = data.select(rows)
    replaced = data.cast_column("image", datasets.Image(decode=False))[row]["image"]["path"]
    open_images(data, cache_dir=str(tmp_path), quiet=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(replaced)
    images = open_images(data, cache_dir=str(tmp_path), quiet=True).images
    assert decoded == [len(data)] * 2 and images[row, :, 0, 0].tolist() == [1, 2, 3]


def test_a_replaced_file_of_the_same_size_and_time(data, decoded, tmp_path):
    """The file of the images is not named after what it holds: a few rows are compared."""
    open_images(data, cache_dir=str(tmp_path), quiet=True)
    path = tmp_path / "images" / "00.png"
    before = path.stat()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    images = open_images(data, cache_dir=str(tmp_path), quiet=True).images
    assert decoded == [40, 40] and images[0, :, 0, 0].tolist() == [1, 2, 3]


def test_a_column_of_paths_and_bytes(decoded, tmp_path):
    """Structures of bytes and a path: a row without bytes is a file."""
    for name in "ab":
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / f"{name}.png")
    cells = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": "gone.png"}]
    cells += [{"bytes": None, "path": str(tmp_path / f"{name}.png")} for name in "ab"] * 20
    datasets.Dataset.from_dict({"image": cells}).to_parquet(tmp_path / "data.parquet")
    data = datasets.Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path / "datasets"))
    for _ in range(2):
        open_images(data, cache_dir=str(tmp_path), quiet=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    images = open_images(data, cache_dir=str(tmp_path), quiet=True).images
    assert decoded == [41, 41] and images[:4, 0, 0, 0].tolist() == [9, 1, 9, 1]


@pytest.mark.parametrize("where", ["no folder", "no room"])
def test_images_are_decoded_where_nothing_can_be_kept(where, data, decoded, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    if where == "no room":
        monkeypatch.setattr(image_cache.RowWriter, "write", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    place = tmp_path / ("file/below" if where == "no folder" else "cache")
    images = open_images(data, cache_dir=str(place), quiet=True).images
    assert images.shape == (40, 3, 8, 8) and decoded == [40]
    assert "Decoded images are not kept: " in caplog.text
    assert not list(tmp_path.glob("cache/**/*.safetensors")) and not list(tmp_path.glob("cache/**/.writing-*"))


def in_a_process(folder, cache, barrier, queue):
    decoded = []

    def counted(*args):
        decoded.append(True)
        return decode_all(*args)

    image_cache.decode_all = counted
    data = load_split(str(folder), cache_dir=str(cache))
    barrier.wait()
    images = open_images(data, cache_dir=str(cache), quiet=True)
    queue.put((len(decoded), images.digest()))


def test_of_processes_that_start_together_one_decodes(data, tmp_path):
    fork = multiprocessing.get_context("spawn")
    barrier, queue = fork.Barrier(3), fork.Queue()
    places = (tmp_path / "images", tmp_path / "datasets", barrier, queue)
    processes = [fork.Process(target=in_a_process, args=places) for _ in range(3)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(count for count, _ in said) == 1 and len({digest for _, digest in said}) == 1
