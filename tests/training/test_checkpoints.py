"""Checkpoints: what is saved comes back, the oldest go, and what differs from this run is said."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from exact_networks import small_unet
from stf_diffusers.training.averages import ExponentialAverage
from stf_diffusers.training.checkpoints import check_finite, differences, load_checkpoint, read_step, save_checkpoint
from tiny import same

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

MANIFEST = {"run": {"seed": 0, "shape": [3, 8, 8]}, "settings": {"tf32": False}}


def start(accelerator, seed):
    """A network, its average, and a function that takes a step, whose optimizer the accelerator has prepared."""
    network = small_unet()
    torch.manual_seed(seed)
    nn.init.normal_(network.conv_out.weight)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    accelerator.free_memory()
    accelerator.prepare(network, optimizer)
    average = ExponentialAverage(network)

    def step(number):
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(number))
        network(x, number).sample.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step()

    return network, average, step


def averaged(network, average):
    copy = type(network).from_config(network.config)
    average.copy_to(copy)
    return copy.state_dict()


def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    accelerator = Accelerator(cpu=True)
    network, average, step = start(accelerator, seed=0)
    for number in (1, 2):
        step(number)
        save_checkpoint(accelerator, tmp_path, number, [average], MANIFEST, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"], "rotated, and nothing half-written"
    step(3)
    again, its_average, its_step = start(accelerator, seed=1)
    assert not torch.equal(again.conv_out.weight, network.conv_out.weight)
    load_checkpoint(accelerator, tmp_path / "checkpoint-2", [its_average])
    its_step(3)
    assert same(network.state_dict(), again.state_dict())
    assert same(averaged(network, average), averaged(again, its_average))
    assert not same(network.state_dict(), averaged(network, average))
    assert read_step(tmp_path / "checkpoint-2", MANIFEST) == 2
    (tmp_path / "checkpoint-2" / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="checkpoint-2 cannot be loaded: it is damaged"):
        load_checkpoint(accelerator, tmp_path / "checkpoint-2", [its_average])


def test_what_differs_is_refused_or_told(tmp_path, caplog):
    Accelerator(cpu=True)  # whose logger says it once for all processes
    (tmp_path / "training_state.json").write_text(json.dumps({"step": 7, **MANIFEST}))
    assert read_step(tmp_path, MANIFEST) == 7 and not caplog.records
    with pytest.raises(ValueError, match=r"another run: seed \(0 there, 1 now\); new \(None there, 2 now\)\."):
        read_step(tmp_path, MANIFEST | {"run": MANIFEST["run"] | {"seed": 1, "new": 2}})
    assert read_step(tmp_path, MANIFEST | {"settings": {"tf32": True}}) == 7
    assert "Changed since the checkpoint: tf32 (False there, True now)" in caplog.text
    (tmp_path / "training_state.json").write_text("{garb")
    with pytest.raises(ValueError, match="is damaged"):
        read_step(tmp_path, MANIFEST)


def test_differences_in_both_directions():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == "c (None there, 3 now); b (2 there, None now)"
    assert differences({"a": [1]}, {"a": [1]}) == ""


def test_weights_that_are_not_finite():
    network = nn.Linear(2, 2)
    check_finite(network, 3)
    with torch.no_grad():
        network.bias[1] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite after step 3"):
        check_finite(network, 3)
