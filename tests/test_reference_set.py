"""Reference sets that are spread over processes, against one process."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from banks import SIGMA, SOURCES, compare, exact, expected_mean, noised, pixels
from oracles import normal, worst
from stf_diffusers import EDM, ReferenceBank, ReferenceBatchSampler, SharedReferences, STFTrainingObjective

# ---- shared reference batches


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shared_lists_are_one_list_without_repeats(processes):
    samplers = [
        ReferenceBatchSampler(40, 4, 23, seed=5, num_processes=processes, process_index=rank, share_references=True)
        for rank in range(processes)
    ]
    unshared = [ReferenceBatchSampler(40, 4, 4, 5, processes, rank) for rank in range(processes)]
    for lists, sources in zip(
        zip(*samplers, strict=True), zip(*unshared, strict=True), strict=True
    ):  # fmt: skip
        together = [index for one in lists for index in one]
        assert len(together) == 23 and len(set(together)) == 23
        assert [one[:4] for one in lists] == list(sources), "the sources are those without sharing"
        assert [len(one) for one in lists] == [sampler.batch_size for sampler in samplers]
    with pytest.raises(ValueError, match="hold the sources of all processes"):
        ReferenceBatchSampler(40, 4, 7, num_processes=2, share_references=True)


# ---- processes


def distributed_results(rank, world, folder):
    """Everything that is compared over processes, computed by one of them. Uneven shards, uneven batches."""
    images, labels = pixels(), torch.arange(30) % 4
    mine = torch.arange(7)[rank * 7 // world : (rank + 1) * 7 // world] if world < 4 else None
    noisy, sigma = noised(images)[mine], SIGMA[mine]
    asked = labels[SOURCES].clone()
    asked[[1, 6]] = -1
    shard = (rank, world) if world > 1 else None
    results = {}
    for flips in ("none", "horizontal_flip"):
        bank = ReferenceBank(images, augmentation=flips, process_shard=shard)
        results[f"bank {flips}"] = bank.posterior_mean(noisy, 1.0, sigma)
        bank.check_sources(exact(images)[SOURCES[mine]].float(), None, None)
        classes = ReferenceBank(images, labels, augmentation=flips, process_shard=shard)
        results[f"classes {flips}"] = classes.posterior_mean(noisy, 1.0, sigma, labels=asked[mine])
    # A row for each process, of an odd number of values.
    narrow, one = images[:, :1, :, :5].contiguous(), slice(3, 4)
    found = ReferenceBank(narrow, process_shard=shard).posterior_mean(noised(narrow)[one], 1.0, SIGMA[one])
    compare(found, expected_mean(noised(narrow)[one], narrow, SIGMA[one]))
    opened = ReferenceBank.open(Path(folder) / "bank.safetensors", process_shard=shard)
    results["file"] = opened.posterior_mean(noisy, 1.0, sigma, labels=asked[mine])
    batch = STFTrainingObjective(EDM()).perturb(
        images[SOURCES[mine]], reference=bank, t=sigma, noise=normal(7, 2, 5, 6)[mine]
    )
    results["objective"] = batch.posterior_mean, batch.effective_sample_size
    if world > 1:
        order = torch.cat([SOURCES.unique(), torch.tensor([i for i in range(30) if i not in SOURCES])])
        part = torch.cat([order[: len(SOURCES.unique())][rank::world], order[len(SOURCES.unique()) :][rank::world]])
        shared = SharedReferences(images[part], labels[part])
        results["shared"] = shared.posterior_mean(noisy, 1.0, sigma, labels=asked[mine])
        with pytest.raises(ValueError, match="must be its images"):
            shared.check_sources(torch.zeros(2, 2, 5, 6), None, None)
    torch.save({name: (value[0], value[1]) for name, value in results.items()}, f"{folder}/{world}-{rank}.pt")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same_targets(world, tmp_path):
    images, labels = pixels(), torch.arange(30) % 4
    ReferenceBank(images, labels).save(tmp_path / "bank.safetensors")
    distributed_results(0, 1, tmp_path)
    single = torch.load(tmp_path / "1-0.pt", weights_only=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port"]
    command += [str(free_port()), __file__, str(tmp_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    assert len({len(part["file"][0]) for part in parts}) == 2, "the batches are uneven"
    single["shared"] = single["classes none"]
    for name, (mean, effective_sample_size) in single.items():
        assert worst(torch.cat([part[name][0] for part in parts]), mean) < 1e-6, name
        torch.testing.assert_close(
            torch.cat([part[name][1] for part in parts]), effective_sample_size, rtol=1e-5, atol=0
        )


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    random.seed(0)
    if (
        torch.distributed.get_world_size() == 3
    ):  # as on GPUs, where what the CPU has to know goes over a group of its own
        torch.distributed.get_backend = lambda: "nccl"
    distributed_results(torch.distributed.get_rank(), torch.distributed.get_world_size(), sys.argv[1])
    torch.distributed.destroy_process_group()
