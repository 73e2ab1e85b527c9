"""Banks in files, and banks of data sets."""

import importlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from banks import SIGMA, SOURCES, exact, noised, pixels, small_dataset
from stf_diffusers import ReferenceBank
from stf_diffusers.dataset_images import pil_to_pixels
from stf_diffusers.posterior import reference_norms
from wrong_calls import BANK_FILES, contents

# ---- files and data sets


def test_a_replaced_file_does_not_change_an_open_bank(tmp_path):
    path, noisy = tmp_path / "bank.safetensors", noised(pixels())
    ReferenceBank(pixels()).save(path)
    bank = ReferenceBank.open(path)
    expected = bank.posterior_mean(noisy, 1.0, SIGMA)
    copy = pickle.loads(pickle.dumps(bank))  # noqa: S301
    ReferenceBank(pixels(seed=1)).save(path)
    assert torch.equal(bank.posterior_mean(noisy, 1.0, SIGMA).mean, expected.mean)
    assert torch.equal(copy.posterior_mean(noisy, 1.0, SIGMA).mean, expected.mean)
    with pytest.raises(ValueError, match="was replaced after it was opened"):
        pickle.loads(pickle.dumps(bank))  # noqa: S301


def test_a_transform_that_changed_inside_is_noticed(tmp_path, monkeypatch):
    """Its name stays, what it does does not: the fingerprint alone would not tell."""
    (tmp_path / "my_transform.py").write_text(
        "import torch\ndef read(image):\n    return torch.full((1, 2, 2), 7, dtype=torch.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_transform

    path = tmp_path / "bank.safetensors"
    ReferenceBank.from_dataset(small_dataset(), transform=my_transform.read, path=path, quiet=True)
    ReferenceBank.from_dataset(small_dataset(), transform=my_transform.read, path=path, quiet=True)
    (tmp_path / "my_transform.py").write_text(
        "import torch\ndef read(image):\n    return torch.full((1, 2, 2), 8, dtype=torch.uint8)\n\n"
    )
    importlib.reload(my_transform)
    with pytest.raises(ValueError, match="image 0 differs"):
        ReferenceBank.from_dataset(small_dataset(), transform=my_transform.read, path=path, quiet=True)


def test_two_processes_write_one_file(tmp_path):
    """Neither reads what the other has half written."""
    script = (
        "import sys; sys.path[:0] = [sys.argv[1]]; import torch, banks as t;"
        "from stf_diffusers import ReferenceBank; from stf_diffusers.dataset_images import pil_to_pixels;"
        "b = ReferenceBank.from_dataset(t.small_dataset(600), path=sys.argv[2] + '/bank.safetensors', quiet=True);"
        "assert (b.images[:] == torch.stack([pil_to_pixels(i) for i in t.small_dataset(600)['image']])).all()"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_default_transform_of_unusual_modes():
    square = np.array([[0, 1], [1, 0]], dtype=bool)
    assert pil_to_pixels(Image.fromarray(square)).flatten().tolist() == [0, 255, 255, 0]
    palette = Image.new("RGB", (2, 2), (10, 20, 30)).quantize(2)
    assert palette.mode == "P" and pil_to_pixels(palette)[:, 0, 0].tolist() == [10, 20, 30]
    for mode in ("I;16", "F", "CMYK"):
        with pytest.raises(ValueError, match=f"mode '{mode}'"):
            pil_to_pixels(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("labelled", [False, True])
def test_saved_and_reopened(labelled, dtype, tmp_path):
    images = pixels() if dtype == torch.uint8 else exact(pixels()).to(dtype)
    labels = torch.arange(30) % 4 if labelled else None
    bank = ReferenceBank(images, labels)
    bank.save(tmp_path / "bank.safetensors", fingerprint="abc")
    noisy, asked = noised(pixels()), labels[SOURCES] if labelled else None
    expected = bank.posterior_mean(noisy, 1.0, SIGMA, labels=asked)
    for device in (None, "cpu"):
        opened = ReferenceBank.open(tmp_path / "bank.safetensors", device=device, fingerprint="abc")
        result = opened.posterior_mean(noisy, 1.0, SIGMA, labels=asked)
        assert torch.equal(result.mean, expected.mean)
        opened.check_sources(exact(images)[SOURCES].float(), SOURCES, asked)
    with pytest.raises(ValueError, match="made of another data set or with other preprocessing"):
        ReferenceBank.open(tmp_path / "bank.safetensors", fingerprint="other")
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "bank.safetensors", framework="pt") as file:
        assert file.get_tensor("images").shape == images.shape, "the file is safetensors to others too"


def test_damaged_files(tmp_path):
    path = tmp_path / "bank.safetensors"
    ReferenceBank(pixels()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="damaged"):
        ReferenceBank.open(path)
    path.write_bytes(b"not a bank at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        ReferenceBank.open(path)


@pytest.mark.parametrize("case", BANK_FILES)
def test_a_bank_that_contradicts_itself_is_refused(case, tmp_path):
    change, message = BANK_FILES[case]
    path, tensors = tmp_path / "bank.safetensors", contents()
    save_file(tensors, path, {"fingerprint": "abc"})
    ReferenceBank.open(path, fingerprint="abc").check_sources(exact(pixels())[SOURCES].float(), SOURCES, None)
    change(tensors)
    save_file(tensors, path, {"fingerprint": "abc"})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ReferenceBank.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [0, 127, 128, 255])
def test_extreme_pixels_have_possible_norms(value, tmp_path):
    ReferenceBank(torch.full((30, 1, 3, 3), value, dtype=torch.uint8)).save(tmp_path / "bank.safetensors")
    assert len(ReferenceBank.open(tmp_path / "bank.safetensors")) == 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_that_no_floating_point_image_has(dtype, tmp_path):
    path, images = tmp_path / "bank.safetensors", exact(pixels()).to(dtype)
    images[5] = torch.finfo(dtype).max if dtype != torch.float64 else 1e150
    norms = reference_norms(images)
    save_file({"images": images, "norms": norms}, path, {"fingerprint": "abc"})
    ReferenceBank.open(path)
    for wrong in (-1e-300, norms[5] * 1.1) if dtype != torch.float64 else (-1e-300,):
        save_file({"images": images, "norms": changed_norm(norms, wrong)}, path, {"fingerprint": "abc"})
        with pytest.raises(ValueError, match=rf"norms of images \[3\] are none of {dtype} images"):
            ReferenceBank.open(path)


def changed_norm(norms, value):
    norms = norms.clone()
    norms[3] = value
    return norms


def test_what_is_not_finite_is_not_written(tmp_path):
    data = datasets.Dataset.from_dict({"image": [[0.0, 1.0], [0.0, float("nan")]]})
    with pytest.raises(ValueError, match=r"images \[1\] of the bank are not finite"):
        ReferenceBank.from_dataset(data, transform=torch.tensor, path=tmp_path / "bank.safetensors", quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_shared_bank_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        ReferenceBank(pixels()).save(tmp_path / "bank.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "bank.safetensors").stat().st_mode & 0o777 == 0o644


def crop(image):
    return torch.from_numpy(np.array(image)[:, :4].copy()).permute(2, 0, 1)


def test_from_a_dataset(tmp_path, capsys):
    data = small_dataset()
    images = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in data])
    labels = torch.tensor(data["label"])
    reference = ReferenceBank(images, labels)
    noisy, asked = noised(images, SOURCES % 20), labels[SOURCES % 20]
    expected = reference.posterior_mean(noisy, 1.0, SIGMA, labels=asked)
    path = tmp_path / "bank.safetensors"
    for where in (None, path, path):
        bank = ReferenceBank.from_dataset(data, "image", "label", path=where)
        assert torch.equal(bank.posterior_mean(noisy, 1.0, SIGMA, labels=asked).mean, expected.mean)
        bank.check_sources(exact(images)[SOURCES % 20].float(), SOURCES % 20, asked)
    assert capsys.readouterr().err.count("Building the reference bank: 100%") == 2, "the file is used again"
    for changed in (
        lambda: ReferenceBank.from_dataset(data, "image", "label", crop, path=path),
        lambda: ReferenceBank.from_dataset(small_dataset(seed=1), "image", "label", path=path),
        lambda: ReferenceBank.from_dataset(data, "image", path=path),
    ):
        with pytest.raises(ValueError, match="made of another data set or with other preprocessing"):
            changed()


def test_images_of_different_shapes_leave_no_file(tmp_path):
    images = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))]
    data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match=r"image 1 is torch.uint8 \(3, 5, 4\)"):
        ReferenceBank.from_dataset(data, path=tmp_path / "bank.safetensors", quiet=True)
    assert not list(tmp_path.iterdir())
