"""The choice of an arithmetic: measured on the device, kept in a file, or named in the environment."""

import json

import pytest
import torch

from stf_diffusers import integer_products
from stf_diffusers.arithmetic_choice import VARIABLE, choose_arithmetic, chosen_by_file, measured, worst_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("levels", [True, False])
def test_both_are_accurate_here(levels):
    assert worst_error(CPU, levels, "float64") < 1e-9
    assert worst_error(CPU, levels, "int8") < 1e-7
    assert set(measured(CPU, levels)) == {"float64", "int8"}


@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("place", ["digit", "carry"])
def test_products_that_err_are_left_out(monkeypatch, caplog, levels, place):
    """As of a library that saturates sums, or that gets one bit wrong: it is said, and the result is float64's."""
    product = torch._int_mm

    def wrong(left, right):
        sums = product(left, right)
        return sums.clamp(-(2**15), 2**15 - 1) if place == "carry" else sums ^ 1

    monkeypatch.setattr(integer_products.torch, "_int_mm", wrong)
    assert set(measured(CPU, levels)) == {"float64"}
    assert "int8 is not used on cpu: its worst error is" in caplog.text


def test_products_that_a_device_lacks_are_left_out(monkeypatch, caplog, tmp_path):
    def missing(left, right):
        raise NotImplementedError("no int8 here\nand more")

    monkeypatch.setattr(integer_products.torch, "_int_mm", missing)
    with caplog.at_level("INFO"):
        assert chosen_by_file({"device": "old"}, CPU, True, str(tmp_path)) == "float64"
    assert "int8 is not used on cpu: no int8 here\n" in caplog.text


def test_the_choice_is_kept(tmp_path, caplog):
    """It is measured once; another device, and a file of something else, are measured anew."""
    with caplog.at_level("INFO"):
        first = chosen_by_file({"device": "a"}, CPU, True, str(tmp_path))
        assert len(caplog.records) == 1 and "Products with uint8 references are in" in caplog.text
        assert chosen_by_file({"device": "a"}, CPU, True, str(tmp_path)) == first
        assert len(caplog.records) == 1, "the second time nothing is measured"
        (path,) = tmp_path.rglob("*.json")
        found = json.loads(path.read_text())
        assert found["device"] == "a" and set(found["milliseconds"]) == {"float64", "int8"}
        path.write_text(json.dumps(found | {"chosen": "int8" if first == "float64" else "float64"}))
        assert chosen_by_file({"device": "a"}, CPU, True, str(tmp_path)) != first, "what the file says is used"
        for broken in ("[]", '{"chosen": 3}'):
            path.write_text(broken)
            again = chosen_by_file({"device": "a"}, CPU, True, str(tmp_path))
            assert json.loads(path.read_text())["chosen"] == again
        chosen_by_file({"device": "b"}, CPU, True, str(tmp_path))
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_cache_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert chosen_by_file({"device": "a"}, CPU, True, str(tmp_path / "file")) in ("int8", "float64")
    assert "What is measured is not kept: " in caplog.text and f"{VARIABLE} says it" in caplog.text


def test_no_room_is_not_kept(monkeypatch, caplog, tmp_path):
    """A full GPU is one of today, and its arithmetic for long."""
    product = torch._int_mm

    def full(left, right):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(integer_products.torch, "_int_mm", full)
    assert chosen_by_file({"device": "a"}, CPU, True, str(tmp_path)) == "float64"
    assert "no room to measure others: CUDA out of memory" in caplog.text and not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(integer_products.torch, "_int_mm", product)
    chosen_by_file({"device": "a"}, CPU, True, str(tmp_path))
    assert list(tmp_path.rglob("*.json"))


def test_named_in_the_environment(monkeypatch):
    elsewhere = torch.device("cuda", 0)  # nothing of it is asked
    for name in ("int8", "float64"):
        monkeypatch.setenv(VARIABLE, name)
        assert choose_arithmetic(elsewhere, torch.uint8, 3072) == name
        assert choose_arithmetic(elsewhere, torch.bfloat16, 3072) == name
        assert choose_arithmetic(elsewhere, torch.float64, 3072) == "float64"
        assert choose_arithmetic(elsewhere, torch.uint8, 1) == "float64"
        assert choose_arithmetic(CPU, torch.float32, 3072) == "float32", "it is for accelerators"
    monkeypatch.setenv(VARIABLE, "float16")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be one of float64, int8, or not set; got 'float16'"):
        choose_arithmetic(elsewhere, torch.uint8, 3072)


def test_other_devices_are_not_measured():
    assert choose_arithmetic(torch.device("meta"), torch.uint8, 3072) == "float64"
