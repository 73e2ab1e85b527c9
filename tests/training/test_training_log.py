"""What a training reports: means of all micro-batches since the last time, and how much variance STF removed."""

import re
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from oracles import images, normal
from stf_diffusers import VE, STFTrainingObjective, target_variance
from stf_diffusers.training.training_log import TargetShare, TrainingLog, tracker_may_fail

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_means_are_of_what_was_added_since_the_last_flush():
    log, clean = TrainingLog(Accelerator(cpu=True)), images(4, 1, 2, 2)
    batch = STFTrainingObjective(VE()).perturb(clean, reference=None, t=torch.tensor([0.05, 0.5, 0.5, 50.0]))
    for losses, mean in (([1.0, 2.0, 6.0], 3.0), ([5.0], 5.0)):
        for loss in losses:
            log.add(torch.tensor(loss), batch.target + loss**0.5, batch, clean, 1, torch.arange(4))
        found = log.flush()
        assert found["loss"] == pytest.approx(mean)
        sizes = {name for name in found if name.startswith("effective_sample_size/")}
        assert len(sizes) == 3, "of the noise levels that occurred"
        assert all(found[name] == pytest.approx(1) for name in sizes), "without references"


def test_a_loss_that_is_not_finite_names_its_step_and_images():
    log, clean = TrainingLog(Accelerator(cpu=True)), images(2, 1, 2, 2)
    batch = STFTrainingObjective(VE()).perturb(clean, reference=None, t=torch.tensor([0.25, 4.0]))
    log.add(torch.tensor(1.0), batch.target, batch, clean, 6, torch.tensor([3, 5]))
    log.add(torch.tensor(torch.nan), batch.target, batch, clean, 7, torch.tensor([8, 9]))
    log.add(torch.tensor(1.0), batch.target, batch, clean, 8, torch.tensor([1, 2]))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7.*8 \(sigma 0\.25\), 9 \(sigma 4\)"):
        log.flush()


def test_a_tracker_that_fails_is_said_and_survived(caplog):
    Accelerator(cpu=True)
    with tracker_may_fail():
        raise RuntimeError("the server is gone")
    assert "The tracker failed" in caplog.text and "the server is gone" in caplog.text


def test_the_share_of_targets_is_said_once(caplog):
    caplog.set_level("INFO")
    Accelerator(cpu=True)
    share = TargetShare(torch.device("cpu"))
    for _ in range(6):
        with share.targets():
            time.sleep(0.002)
        share.step_done()
    assert caplog.text.count("Targets take") == 1
    targets, step = map(float, re.findall(r"\d+\.\d+", caplog.text.split("Targets take")[1]))
    assert 0.002 <= targets <= step


def test_variance_removed_is_that_of_the_report():
    """What training logs has the expectation V_DSM - V_STF(n): within four combined standard errors."""
    data, process, n, level = normal(12, 1, 2, 2), VE(), 5, 1.5
    (row,) = target_variance(
        process,
        data,
        [level],
        reference_batch_sizes=[n],
        num_samples=20_000,
        generator=torch.Generator().manual_seed(1),
    )
    expected = (row.dsm.value - row.stf[n].value) / 4
    accelerator = Accelerator(cpu=True)
    objective, draws, values = STFTrainingObjective(process), torch.Generator().manual_seed(2), []
    for _ in range(150):
        log = TrainingLog(accelerator)
        for _ in range(10):
            reference = data[torch.randperm(len(data), generator=draws)[:n]]
            batch = objective.perturb(reference, reference=reference, t=torch.full((n,), level), generator=draws)
            log.add(torch.zeros(()), batch.target, batch, reference, 1, torch.arange(n))
        values.append(log.flush()["variance_removed/sigma_1_to_10"])
    error = (np.var(values) / len(values) + (row.dsm.standard_error / 4) ** 2) ** 0.5
    assert abs(np.mean(values) - expected) < 4 * error and error < 0.03 * expected
