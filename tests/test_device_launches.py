"""What a step asks of an accelerator, walked through on tensors without data: no waiting, few launches, one device.

Reading a value back from such a tensor is an error, as is a sum of tensors on two devices.
"""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from stf_diffusers import EDM, VE, VP, FlowMatching, ReferenceBank, ReferenceBatchSampler, STFTrainingObjective
from stf_diffusers.arithmetic_choice import VARIABLE
from stf_diffusers.chunk_states import level_norms, level_sums, squared_norms
from stf_diffusers.consistency import ConsistencyTrainingObjective
from stf_diffusers.noise_distribution import LogNormal, Piecewise
from stf_diffusers.reference_set import ReferenceBatch
from stf_diffusers.training.conditioning import orient
from stf_diffusers.training.device_images import DeviceImages

# What only makes another view of a tensor, or finds memory for one.
VIEWS = (
    "view", "slice", "expand", "unsqueeze", "aten.select.", "permute", "transpose", "alias", "detach", "as_strided", "split",
    "aten.t.", "unbind", "squeeze", "reshape", "empty",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations on the device."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes_sent = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) and result else result
        on_device = isinstance(first, torch.Tensor) and first.device.type == "meta"
        self.count += on_device and not any(name in str(function) for name in VIEWS)
        if on_device and "copy" in str(function):
            sent = any(torch.is_tensor(part) and part.device.type == "cpu" for part in args)
            self.waits += sent and not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            self.bytes_sent += sum(part.nbytes for part in args if torch.is_tensor(part) and part.device.type == "cpu")
        return result


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """The first call compares the values of sources and references, which waits; these are later ones."""
    for kind in (ReferenceBatch, ReferenceBank):
        monkeypatch.setattr(kind, "check_sources", lambda *arguments: None)


@pytest.fixture(params=["float64", "int8"])
def arithmetic(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def images(n, dtype=torch.uint8):
    return torch.empty(n, 3, 32, 32, dtype=dtype, device="meta")


def bank(n, dtype=torch.uint8, labels=None, augmentation="none"):
    """A bank on the device, of images without data."""
    made = ReferenceBank(torch.zeros(n, 1, 1, 2, dtype=dtype), labels, augmentation=augmentation)
    made._norms = made._sent_norms = made._norms.to("meta")
    made.images = images(n, dtype)
    return made


def launches(step):
    """Of the second call. Copies from the CPU that wait, and tensors made of numbers there, are errors."""
    step()
    with pytest.MonkeyPatch.context() as patched, Launches() as launched:
        for name in ("tensor", "as_tensor"):
            patched.setattr(torch, name, on_cpu_alone(getattr(torch, name)))
        step()
    assert not launched.waits
    return launched.count


def on_cpu_alone(make):
    def made(data, *arguments, **keywords):
        assert torch.is_tensor(data) or torch.device(keywords.get("device") or "cpu").type == "cpu", "sends numbers"
        return make(data, *arguments, **keywords)

    return made


@pytest.mark.parametrize("process", [EDM(), VE(), VP(), FlowMatching()], ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_batch_of_4096(process, dtype, arithmetic):
    objective, reference = STFTrainingObjective(process), images(4096, dtype)
    assert launches(lambda: objective.perturb(reference[:64], reference=reference)) <= 150


def test_batch_with_classes(arithmetic):
    objective, reference = STFTrainingObjective(EDM()), images(4096)
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    more = {"reference_labels": labels, "labels": labels[:64], "num_unconditional": 2048}
    assert launches(lambda: objective.perturb(reference[:64], reference=reference, **more)) <= 150


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("augmentation", ["none", "horizontal_flip"])
def test_bank_of_50000(dtype, augmentation, arithmetic):
    """60 for each chunk of 2^24 elements beside what a step without references launches.

    72 where the products of six digits with six are made in two parts, for twice as many queries.
    """
    objective, references = STFTrainingObjective(EDM()), bank(50_000, dtype, augmentation=augmentation)
    source = images(64, dtype)
    alone = launches(lambda: objective.perturb(source))
    chunks = -(-50_000 * 3072 // 2**24)
    in_parts = arithmetic == "int8" and dtype != torch.uint8 and augmentation != "none"
    ceiling = 72 if in_parts else 60
    assert launches(lambda: objective.perturb(source, reference=references)) - alone <= ceiling * chunks


@pytest.mark.parametrize(("classes", "in_question"), [(10, range(10)), (1000, range(0, 640, 10))])
@pytest.mark.parametrize("dropped", [False, True])
def test_bank_with_classes(classes, in_question, dropped, arithmetic):
    """One pass over the images of the classes in question, and one over all where a class is dropped, however many there are."""
    references = bank(50_000, labels=torch.arange(50_000) % classes)
    noisy, level = images(64, torch.float32), torch.empty(64, device="meta")
    labels = torch.tensor(list(in_question)).repeat(64)[:64]
    labels[:5] = torch.where(torch.tensor(dropped), -1, labels[:5])
    step = lambda: references.posterior_mean(noisy, 1.0, level, labels=labels)  # noqa: E731
    chunks = -(-50_000 * 3072 // 2**24)
    in_classes = -(-50 * 64 * 3072 // 2**24) if classes == 1000 else chunks
    assert launches(step) <= 60 * (in_classes + dropped * chunks) + 40


def test_bank_on_the_cpu():
    """Of what is sent at a second call, all but the images is small: their norms lie on the device."""
    references = ReferenceBank(torch.zeros(10_000, 3, 2, 2, dtype=torch.uint8))
    noisy, level = torch.empty(4, 3, 2, 2, device="meta"), torch.empty(4, device="meta")
    for allowed in (100_000, 1000):
        with Launches() as launched:
            references.posterior_mean(noisy, 1.0, level)
        assert launched.bytes_sent <= references.nbytes + allowed
    assert launched.bytes_sent >= references.nbytes


@pytest.mark.parametrize("classes", [False, True])
def test_subset_of_a_bank(arithmetic, classes):
    """Drawn on the CPU, as are the positions of the sources."""
    labels = torch.arange(50_000) % 10
    references, noisy = bank(50_000, labels=labels if classes else None), images(64, torch.float32)
    index, level = torch.arange(64), torch.empty(64, device="meta")
    more = {"labels": labels[index]} if classes else {}
    step = lambda: references.posterior_mean(noisy, 1.0, level, source_index=index, subset_size=4096, **more)  # noqa: E731
    assert launches(step) <= 100


def test_loss_and_target():
    objective, reference = STFTrainingObjective(EDM()), images(256)
    batch = objective.perturb(reference[:64], reference=reference)
    assert launches(lambda: objective.loss(batch.target, batch)) <= 10
    step = lambda: objective.target(reference[:64], batch.noise, batch.t, reference=reference)  # noqa: E731
    assert launches(step) <= 150


@pytest.mark.parametrize("distribution", [Piecewise.log_uniform(0.01, 50), LogNormal(0, 1)], ids=["uniform", "normal"])
@pytest.mark.parametrize("process", [EDM(), VE(), VP(), FlowMatching()], ids=lambda process: type(process).__name__)
def test_given_distributions(process, distribution):
    objective, source = STFTrainingObjective(process, distribution=distribution), images(64)
    assert launches(lambda: objective.perturb(source)) <= 110


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(), EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)  # fmt: skip
def test_schedules_of_diffusers(scheduler, arithmetic):
    objective, reference = STFTrainingObjective.from_scheduler(scheduler), images(4096)
    alone = launches(lambda: objective.perturb(reference[:64]))
    assert launches(lambda: objective.perturb(reference[:64], reference=reference)) <= alone + 80


def test_consistency(arithmetic):
    objective, reference = ConsistencyTrainingObjective(EDM()), images(4096)
    alone = launches(lambda: objective.perturb(reference[:64], stage=1))
    assert launches(lambda: objective.perturb(reference[:64], reference=reference, stage=1)) <= alone + 80


def test_turned_images():
    turns = torch.empty(64, dtype=torch.int64, device="meta")
    orient(images(64), turns)  # its table is made once
    assert launches(lambda: orient(images(64), turns)) <= 4


@pytest.mark.parametrize("rows", [None, torch.empty(50_000, dtype=torch.int64, device="meta")])
def test_batches_of_images_on_the_device(rows):
    """A step sends 4,096 positions and gathers images, those of a bank through its order."""
    labels = torch.arange(50_000) % 10
    resident = DeviceImages(images(50_000), labels, rows)
    sampler = ReferenceBatchSampler(50_000, 64, 4096, labels=labels)
    batches = resident.batches_from(3, sampler)
    with Launches() as launched:
        batch = next(batches)
    assert batch["reference_images"].shape == (4096, 3, 32, 32) and batch["images"].device.type == "meta"
    assert launched.bytes_sent == 4096 * 8 and launched.count == 2 + (rows is not None)


def test_a_wait_would_be_seen():
    with pytest.raises(RuntimeError, match="meta"):
        images(1).float().sum().item()


def test_norms_in_few_launches_are_those_of_the_cpu():
    levels = torch.randint(-128, 128, (50, 1000), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    levels[0], levels[1] = -128, 127
    assert level_norms(levels).equal(squared_norms(levels))
    assert level_norms(levels)[0] == 1000 * (128**2 - 128)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize("dimension", [1, 2, 255, 256, 257, 3072, 50_001, 2**17 + 5])
def test_norms_on_a_cpu_are_exact(dimension, dtype):
    """With and without 8-bit products, and of the largest magnitudes."""
    draws = torch.Generator().manual_seed(0)
    levels = torch.randint(-128, 128, (37, dimension), generator=draws, dtype=torch.int8)
    levels[0], levels[1], levels[2, ::2], levels[3, 1:] = -128, 127, -128, 127
    assert level_sums(levels.to(dtype)).equal(level_norms(levels))
