"""Flags that are wrong, or wrong together: a message that names the fix, before anything is written."""

import pytest
import torch
from accelerate.utils import DistributedType

from stf_diffusers.training.launch import check_mode
from tiny import train
from wrong_flags import COMBINATIONS, VALUE_ROWS
from wrong_inputs import attempt, complaint


@pytest.mark.parametrize("case", VALUE_ROWS)
def test_values_out_of_range(case, tmp_path, places):
    assert not complaint(VALUE_ROWS[case], attempt(VALUE_ROWS[case], tmp_path, places))


@pytest.mark.parametrize("case", COMBINATIONS)
def test_refused_before_anything_is_written(case, tmp_path, places):
    assert not complaint(COMBINATIONS[case], attempt(COMBINATIONS[case], tmp_path, places))


@pytest.mark.parametrize("mode", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_modes_that_are_not_supported(mode, flags, tmp_path, monkeypatch):
    """As `accelerate launch` asks for them."""
    monkeypatch.setenv(f"ACCELERATE_USE_{mode}", "true")
    with pytest.raises(ValueError, match=rf"{mode} is not supported\. Use data parallelism"):
        train(flags())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "device", "word"),
    [(DistributedType.NO, "mps", "targets need float64"), (DistributedType.NO, "xpu", "targets need float64"),
     (DistributedType.FSDP, "cuda", "data parallelism"), (DistributedType.DEEPSPEED, "cuda", "data parallelism")],
)  # fmt: skip
def test_modes_and_devices_that_are_checked(mode, device, word):
    with pytest.raises(ValueError, match=word):
        check_mode(mode, torch.device(device))
    check_mode(DistributedType.MULTI_GPU, torch.device("cuda", 1))
