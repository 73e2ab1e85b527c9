"""Reference batches through Accelerate's loaders: whole, or refused on every process."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from oracles import images
from stf_diffusers import EDM, ReferenceBank, ReferenceBatchCollator, ReferenceBatchSampler, STFTrainingObjective

pytest.importorskip("accelerate")

DATA = images(40, 1, 2, 2)
ROWS = [{"images": x, "label": i} for i, x in enumerate(DATA)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def prepared(dispatch, split, kind):
    from accelerate import Accelerator, DataLoaderConfiguration

    settings = DataLoaderConfiguration(dispatch_batches=dispatch, split_batches=split)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    if kind == "sampler":
        loader = DataLoader(ROWS, batch_sampler=ReferenceBatchSampler(40, 4, 8), collate_fn=ReferenceBatchCollator(4))
    else:
        loader = DataLoader(
            Stream(),
            batch_size=8,
            drop_last=True,
            collate_fn=ReferenceBatchCollator(4),
            num_workers=kind == "stream of a worker",
        )
    return accelerator, accelerator.prepare(loader)


def run(dispatch, split, kind, message):
    """Reference batches of eight that hold their sources, or else the message before or with the first."""
    objective = STFTrainingObjective(EDM())
    try:
        accelerator, loader = prepared(dispatch, split, kind)
        for batch in loader:
            objective.perturb(batch["images"], reference=batch["reference_images"])
            assert len(batch["images"]) == 4 and len(batch["reference_images"]) == (8 if message is None else None)
        accelerator.wait_for_everyone()
    except ValueError as error:
        assert message is not None and message in str(error), error
        assert "DataLoaderConfiguration" in str(error)
    else:
        assert message is None


CASES = {
    "whole": (False, False, "sampler", None),
    "dispatched": (True, False, "sampler", "dispatch_batches=True"),
    "dispatched and split": (True, True, "sampler", "dispatch_batches=True"),
    # Accelerate dispatches the batches of iterable data unless it is told not to.
    "a stream": (None, False, "stream", "dispatch_batches=True"),
    "a stream that a worker collates": (None, False, "stream of a worker", "dispatch_batches=True"),
    "a stream of each process": (False, False, "stream", None),
}


@pytest.mark.parametrize("case", CASES)
def test_one_process(case, fresh_accelerate_state):
    run(*CASES[case])


def test_one_process_splits_nothing(fresh_accelerate_state):
    run(False, True, "sampler", None)


@pytest.mark.parametrize("case", [*CASES, "split"])
def test_two_processes(case):
    from tiny import Processes

    codes, said = Processes(
        run, *{**CASES, "split": (False, True, "sampler", "split_batches=True")}[case], processes=2
    ).wait(60)
    assert codes == [0, 0], said[-3000:]


def test_other_references_may_come_with_dispatched_batches(fresh_accelerate_state):
    """A bank does not travel with the batches, and the loader of another data set is none of the sampler's business."""
    _, loader = prepared(None, False, "stream")
    objective, bank = STFTrainingObjective(EDM()), ReferenceBank(DATA)
    for batch in loader:
        objective.perturb(batch["images"], reference=bank)
        assert len(list(ReferenceBatchSampler(40, 4, 8))) == 10
        assert torch.equal(objective.perturb(DATA[:4]).posterior_mean, DATA[:4])
