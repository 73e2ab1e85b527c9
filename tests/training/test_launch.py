"""As many processes as were announced, in modes and on devices that were tested."""

import pytest

from stf_diffusers.training.launch import check_number_of_processes, make_accelerator
from tiny import Processes

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("running", "environment"),
    [
        (1, {}),
        (1, LAUNCHED),
        (1, {"MASTER_ADDR": "10.0.0.1"}),  # of a cluster's own making
        (2, {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **LAUNCHED}),
        (1, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_as_many_processes_as_announced(running, environment):
    check_number_of_processes(running, environment)


@pytest.mark.parametrize(
    ("running", "environment", "message"),
    [
        (1, {"WORLD_SIZE": "2", **LAUNCHED}, "announced 2 processes"),
        (1, {"MASTER_ADDR": "127.0.0.1", **LAUNCHED}, "was given several processes"),
    ],
)
def test_fewer_processes_than_announced(running, environment, message):
    with pytest.raises(ValueError, match=message):
        check_number_of_processes(running, environment)


def say_how_long_it_waits():
    import torch
    import torch.distributed as dist

    accelerator = make_accelerator(report_to="none")
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    print(f"hours: {backend.options._timeout.total_seconds() / 3600}\n", end="")  # in one piece: both processes write
    accelerator.end_training()


def test_processes_wait_for_hours():
    """While the first one downloads, encodes, or writes a bank."""
    codes, said = Processes(say_how_long_it_waits, processes=2).wait()
    assert codes == [0, 0], said
    assert said.count("hours: 12.0") == 2
