"""The training objective: what is noised, what the target is, that it is unbiased, and that its variance falls."""

import warnings
from itertools import combinations, pairwise

import pytest
import torch

from oracles import TABLE, images, normal, posterior, rows, worst
from stf_diffusers import (
    EDM,
    VE,
    VP,
    FlowMatching,
    PerturbedBatch,
    ReferenceBank,
    ReferenceBatchCollator,
    ReferenceBatchSampler,
    SchedulerProcess,
    STFTrainingObjective,
    posterior_mean,
)

diffusers = pytest.importorskip("diffusers")

PROCESSES = {
    "EDM": EDM(),
    "VE": VE(),
    "VP": VP(),
    "FlowMatching": FlowMatching(),
    "logit-normal": FlowMatching("logit_normal"),
    "DDPM": SchedulerProcess(diffusers.DDPMScheduler()),
    "DDPM v": SchedulerProcess(diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "DDPM sample": SchedulerProcess(diffusers.DDPMScheduler(prediction_type="sample")),
    "Euler": SchedulerProcess(diffusers.EulerDiscreteScheduler()),
    "Euler v": SchedulerProcess(diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")),
    "EDM-Euler": SchedulerProcess(diffusers.EDMEulerScheduler()),
    "FlowMatch": SchedulerProcess(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
TYPES = [None, *TABLE]
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_type = pytest.mark.parametrize("prediction_type", TYPES)
four_processes = pytest.mark.parametrize("process", [EDM(), VE(), VP(), FlowMatching()], ids=lambda p: type(p).__name__)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def coefficients(process, prediction_type, t):
    """(alpha, sigma, a, b) in float64; the process's own row is tested in test_noise.py."""
    t = t.double()
    alpha, sigma = process.alpha(t).double(), process.sigma(t).double()
    a, b = TABLE[prediction_type](alpha, sigma) if prediction_type else process.output_coefficients(t)
    return alpha, sigma, a, b


# ---- the target


@every_type
@every_process
def test_dsm_target(process, prediction_type):
    """Without references: x_t = alpha x0 + sigma noise and y = a x0 + b noise, up to float32 rounding."""
    x0 = images(6, 2, 5, 6)
    batch = STFTrainingObjective(process, prediction_type).perturb(x0, generator=seeded(0))
    alpha, sigma, a, b = (rows(c, x0) for c in coefficients(process, prediction_type, batch.t))
    torch.testing.assert_close(batch.noisy.double(), alpha * x0 + sigma * batch.noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch.target.double(), a * x0 + b * batch.noise, rtol=1e-5, atol=1e-6)
    scale = rows(process.input_scale(batch.t.double()), x0)
    torch.testing.assert_close(batch.model_input.double(), scale * batch.noisy, rtol=1e-6, atol=1e-6)
    assert torch.equal(batch.timestep, process.timestep(batch.t))
    assert torch.equal(batch.posterior_mean, x0) and batch.effective_sample_size.tolist() == [1] * 6
    assert all(
        v.dtype == torch.float32 for v in (batch.model_input, batch.target, batch.noisy, batch.alpha, batch.sigma)
    )


@every_type
@every_process
def test_stf_target_has_the_posterior_mean_for_x0(process, prediction_type):
    """y(x̂0, (x_t - alpha x̂0) / sigma), for every type: the target converted back to x0 is the posterior mean."""
    reference = images(40, 2, 5, 6)
    reference[20] = reference[1] + 2e-3  # a near duplicate
    x0 = reference[:6]
    batch = STFTrainingObjective(process, prediction_type).perturb(x0, reference=reference, generator=seeded(0))
    alpha, sigma, a, b = coefficients(process, prediction_type, batch.t)
    weights, mean = posterior(batch.noisy, reference, alpha, sigma)
    assert worst(batch.posterior_mean, mean) < 1e-5
    torch.testing.assert_close(batch.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-3, atol=0)
    gain = rows(a - b * alpha / sigma, x0)
    expected = rows(a, x0) * x0 + rows(b, x0) * batch.noise + gain * (mean - x0)
    error = (batch.target.double() - expected).abs()
    assert (error <= 1e-5 * (1 + gain.abs()) + 1e-6 * expected.abs()).all()
    assert batch.effective_sample_size.max() > 2  # or this test would say nothing


@every_type
@every_process
def test_one_reference_is_dsm_bit_for_bit(process, prediction_type):
    objective, x0 = STFTrainingObjective(process, prediction_type), images(1, 3, 4, 4)
    for seed in range(10):
        dsm = objective.perturb(x0, generator=seeded(seed))
        stf = objective.perturb(x0, reference=x0, generator=seeded(seed))
        for name in PerturbedBatch.__dataclass_fields__:
            assert torch.equal(getattr(stf, name), getattr(dsm, name)), name


@every_type
@every_process
def test_lone_classes_are_dsm_bit_for_bit(process, prediction_type):
    """Every row has a class of its own: it falls back to itself."""
    objective, x0, labels = STFTrainingObjective(process, prediction_type), images(5, 3, 4, 4), torch.arange(5)
    dsm = objective.perturb(x0, generator=seeded(0))
    stf = objective.perturb(x0, reference=x0, labels=labels, reference_labels=labels, generator=seeded(0))
    assert torch.equal(stf.target, dsm.target) and stf.effective_sample_size.tolist() == [1] * 5


def test_target_is_what_a_ddpm_script_has():
    """epsilon: the script's own noise; v: the scheduler's velocity; sample: the images. Bit for bit."""
    x0, noise, t = images(8, 3, 4, 8), normal(8, 3, 4, 8), torch.tensor([0, 1, 10, 200, 500, 700, 998, 999])
    for config in ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "scaled_linear"}):
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, **config)
            velocity = scheduler.get_velocity(x0, noise, t)
            expected = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction_type]
            objective = STFTrainingObjective.from_scheduler(scheduler)
            assert torch.equal(objective.target(x0, noise, t), expected)
            low = t[:3]  # low noise: no other reference has any weight
            assert torch.equal(objective.target(x0[:3], noise[:3], low, reference=images(40, 3, 4, 8)), expected[:3])
            batch = objective.perturb(x0, t=t, noise=noise)
            assert torch.equal(batch.noisy, scheduler.add_noise(x0, noise, t)) and torch.equal(batch.timestep, t)
            assert batch.timestep.dtype == torch.int64


def test_zero_snr_timestep():
    """Where x_t is noise alone (alpha = 0), v's target is minus the mean of all references; epsilon's is the noise."""
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    reference, t, noise = images(50, 3, 4, 4), torch.tensor([999, 999]), normal(2, 3, 4, 4)
    mean = reference.double().mean(0).expand(2, -1, -1, -1)
    assert SchedulerProcess(scheduler).alpha(t).tolist() == [0, 0]
    objective = STFTrainingObjective.from_scheduler(scheduler)
    assert worst(objective.target(reference[:2], noise, t, reference=reference), -mean) < 1e-5
    epsilon = STFTrainingObjective(SchedulerProcess(scheduler), "epsilon")
    assert torch.equal(epsilon.target(reference[:2], noise, t, reference=reference), noise)


def test_perturb_and_target_agree():
    reference = images(30, 3, 4, 4)
    for process in PROCESSES.values():
        objective = STFTrainingObjective(process)
        batch = objective.perturb(reference[:6], reference=reference, generator=seeded(3))
        assert torch.equal(objective.target(reference[:6], batch.noise, batch.t, reference=reference), batch.target)


@every_process
def test_draws_do_not_depend_on_the_references(process):
    """Nor does what is left of the generator, so that a whole run sees the same times and noise with and without STF."""
    objective, reference = STFTrainingObjective(process), images(30, 3, 4, 4)
    labels = torch.arange(30) % 3
    conditions = {"labels": labels[:6], "reference_labels": labels}
    cases = ({}, {"reference": reference}, {"reference": reference, **conditions})
    generators = [seeded(0) for _ in cases]
    dsm, *others = (
        objective.perturb(reference[:6], generator=generator, **case)
        for generator, case in zip(generators, cases, strict=True)
    )
    for other, generator in zip(others, generators[1:], strict=True):
        assert torch.equal(generator.get_state(), generators[0].get_state())
        for name in ("model_input", "timestep", "noisy", "noise", "t", "alpha", "sigma"):
            assert torch.equal(getattr(other, name), getattr(dsm, name)), name
    another = objective.perturb(reference[:6], generator=seeded(1))
    assert not torch.equal(another.noise, dsm.noise) and not torch.equal(another.t, dsm.t)


def test_given_times_and_noise_are_used():
    x0, t, noise = images(4, 3, 4, 4), torch.tensor([0.1, 1.0, 5.0, 80.0]), normal(4, 3, 4, 4)
    state = torch.get_rng_state()
    batch = STFTrainingObjective(EDM()).perturb(x0, t=t, noise=noise)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    assert torch.equal(batch.t, t) and torch.equal(batch.noise, noise)
    torch.testing.assert_close(batch.noisy, x0 + t.view(-1, 1, 1, 1) * noise)


# ---- labels and source_index

CLASSES = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2, 0, 0, 1, 5, 0, 1, 2])


def conditional_batch(labels, **arguments):
    reference = images(15, 2, 3, 3)
    objective = STFTrainingObjective(EDM(), "sample")
    batch = objective.perturb(
        reference[:4], reference=reference, labels=labels, reference_labels=CLASSES,
        t=torch.full((4,), 3.0), generator=seeded(0), **arguments,
    )  # fmt: skip
    return batch, reference


def test_labels_restrict_the_references_to_the_class():
    batch, reference = conditional_batch(CLASSES[:4])
    expected = posterior(batch.noisy, reference, batch.alpha, batch.sigma, CLASSES[:4, None] == CLASSES)[1]
    assert worst(batch.target, expected) < 1e-5
    assert worst(batch.target, posterior(batch.noisy, reference, batch.alpha, batch.sigma)[1]) > 1e-2


def test_dropped_labels_use_all_references():
    labels = torch.tensor([0, -1, 2, -1])
    batch, reference = conditional_batch(labels)
    mask = (labels[:, None] == CLASSES) | (labels == -1)[:, None]
    assert mask.sum(1).tolist() == [6, 15, 3, 15]
    assert worst(batch.target, posterior(batch.noisy, reference, batch.alpha, batch.sigma, mask)[1]) < 1e-5


@pytest.mark.parametrize("unconditional", [4, 9, 15])
def test_dropped_labels_use_the_unconditional_references(unconditional):
    """And rows of a class all of their class, also those beyond."""
    labels = torch.tensor([0, -1, 2, -1])
    batch, reference = conditional_batch(labels, num_unconditional=unconditional)
    mask = labels[:, None] == CLASSES
    mask[labels == -1, :unconditional] = True
    assert mask.sum(1).tolist() == [6, unconditional, 3, unconditional]
    assert worst(batch.target, posterior(batch.noisy, reference, batch.alpha, batch.sigma, mask)[1]) < 1e-5
    same = {"labels": labels, "reference_labels": CLASSES, "num_unconditional": unconditional}
    target = STFTrainingObjective(EDM(), "sample").target(
        reference[:4], batch.noise, batch.t, reference=reference, **same
    )
    assert torch.equal(target, batch.target)


def test_unconditional_references_and_a_source_elsewhere():
    """Dropped rows keep their own source, and use no other reference beyond, whatever its label."""
    reference, index = images(15, 2, 3, 3), torch.tensor([2, 11])
    classes = CLASSES.masked_fill(torch.arange(15) == 13, -1)
    objective = STFTrainingObjective(EDM(), "sample")
    batch = objective.perturb(
        reference[index], reference=reference, labels=torch.tensor([-1, -1]), reference_labels=classes,
        source_index=index, num_unconditional=6, t=torch.full((2,), 3.0), generator=seeded(0),
    )  # fmt: skip
    mask = (torch.arange(15) < 6).repeat(2, 1)
    mask[1, 11] = True
    assert worst(batch.target, posterior(batch.noisy, reference, batch.alpha, batch.sigma, mask)[1]) < 1e-5


@pytest.mark.parametrize("labelled", [False, True])
def test_source_index(labelled):
    """Sources anywhere among the references give the same targets as sources in front."""
    reference, index = images(15, 2, 3, 3), torch.tensor([11, 3, 7, 0])
    front = torch.cat([index, torch.tensor([i for i in range(15) if i not in index])])
    objective = STFTrainingObjective(VP())
    labels = [
        {"labels": CLASSES[index], "reference_labels": classes} if labelled else {}
        for classes in (CLASSES, CLASSES[front])
    ]
    scattered = objective.perturb(
        reference[index], reference=reference, source_index=index, generator=seeded(0), **labels[0]
    )
    in_front = objective.perturb(reference[index], reference=reference[front], generator=seeded(0), **labels[1])
    assert worst(scattered.target, in_front.target) < 1e-5
    if labelled:  # image 11 is alone in class 5
        assert scattered.effective_sample_size[0] == 1


# ---- dtypes, precision, and what is left alone


def test_uint8():
    """uint8 images and references mean x / 127.5 - 1; the references of float images may stay uint8."""
    pixels = torch.randint(0, 256, (20, 3, 4, 4), generator=seeded(0), dtype=torch.uint8)
    floats = pixels.float() / 127.5 - 1
    objective = STFTrainingObjective(EDM())
    expected = objective.perturb(floats[:5], reference=floats, generator=seeded(1))
    for clean, reference in ((pixels[:5], pixels), (floats[:5], pixels), (pixels[:5], floats)):
        batch = objective.perturb(clean, reference=reference, generator=seeded(1))
        assert batch.model_input.dtype == batch.target.dtype == torch.float32
        assert torch.equal(batch.model_input, expected.model_input)
        torch.testing.assert_close(batch.target, expected.target, rtol=0, atol=1e-5)
    # Scaled in float64, pixels differ in the last bit of float32: still the same images.
    rounded = (pixels.double() / 127.5 - 1).float()
    assert not torch.equal(rounded, floats)
    objective.perturb(rounded[:5], reference=pixels)


@pytest.mark.parametrize("process", [EDM(), VP(), FlowMatching()], ids=repr)
def test_float64(process):
    reference = images(20, 2, 3, 3, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    batch = STFTrainingObjective(process).perturb(reference[:4], reference=reference, t=t, generator=seeded(0))
    assert all(v.dtype == torch.float64 for v in (batch.model_input, batch.target, batch.posterior_mean, batch.noise))
    alpha, sigma, a, b = coefficients(process, None, t)
    mean = posterior(batch.noisy, reference, alpha, sigma)[1]
    expected = rows(a, mean) * mean + rows(b / sigma, mean) * (batch.noisy - rows(alpha, mean) * mean)
    assert worst(batch.target, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images(dtype):
    """The network's input comes in the images' dtype; the target is computed from their values in float32."""
    reference = images(20, 3, 4, 4).to(dtype)
    objective = STFTrainingObjective(EDM())
    batch = objective.perturb(reference[:5], reference=reference, generator=seeded(0))
    exact = objective.perturb(reference[:5].float(), reference=reference.float(), generator=seeded(0))
    assert batch.model_input.dtype == dtype and batch.target.dtype == batch.noisy.dtype == torch.float32
    assert torch.equal(batch.target, exact.target) and torch.equal(batch.model_input, exact.model_input.to(dtype))


@pytest.mark.parametrize("process", [EDM(), VP(), PROCESSES["DDPM v"]], ids=repr)
def test_autocast_changes_nothing(process):
    reference = images(64, 3, 8, 8)
    objective = STFTrainingObjective(process)
    for arguments in ({}, {"reference": reference}):
        plain = objective.perturb(reference[:8], generator=seeded(0), **arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batch = objective.perturb(reference[:8], generator=seeded(0), **arguments)
            target = objective.target(reference[:8], batch.noise, batch.t, **arguments)
            loss = objective.loss(batch.noisy, batch)
        for name in PerturbedBatch.__dataclass_fields__:
            assert torch.equal(getattr(batch, name), getattr(plain, name)), name
        assert torch.equal(target, plain.target)
        assert loss.dtype == torch.float32 and torch.equal(loss, objective.loss(batch.noisy, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_the_plain_mean_squared_error(dtype):
    """In float32 whatever the network returns, differentiable with gradient 2 (output - target) / numel."""
    objective = STFTrainingObjective(EDM())
    batch = objective.perturb(images(4, 3, 4, 4), generator=seeded(0))
    output = normal(4, 3, 4, 4, seed=5).to(dtype).requires_grad_()
    loss = objective.loss(output, batch)
    error = output.detach().double() - batch.target.double()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(output.grad.double(), 2 * error / error.numel(), rtol=1e-2, atol=1e-4)


def test_inputs_are_not_modified():
    reference, t, noise = images(20, 3, 4, 4), torch.linspace(0.1, 1, 5), normal(5, 3, 4, 4)
    labels, index = torch.zeros(20, dtype=torch.int64), torch.arange(5)
    for process in (EDM(), VP(), FlowMatching()):
        inputs = (reference, t, noise, labels, index)
        copies = [tensor.clone() for tensor in inputs]
        objective = STFTrainingObjective(process)
        arguments = {"reference": reference, "labels": labels[:5], "reference_labels": labels, "source_index": index}
        batch = objective.perturb(reference[:5], t=t, noise=noise, **arguments)
        objective.target(reference[:5], noise, t, **arguments)
        objective.loss(batch.noisy, batch)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


def test_nothing_is_recorded_for_gradients():
    reference = images(20, 3, 4, 4).requires_grad_()
    batch = STFTrainingObjective(EDM()).perturb(reference[:5], reference=reference)
    assert not any(getattr(batch, name).requires_grad for name in PerturbedBatch.__dataclass_fields__)


# ---- errors, each with its remedy

X = images(4, 3, 4, 4)
R = torch.cat([X, images(8, 3, 4, 4, seed=1)])
ONE_PIXEL = R.clone()
ONE_PIXEL[2, 1, 3, 0] += 1e-3
I4, I12 = torch.zeros(4, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
CAT = r"reference=torch.cat\(\[clean, others\]\)"
ERRORS = {
    "other images": (dict(reference=R[4:]), ValueError, CAT),
    "permuted sources": (dict(reference=torch.cat([X.flip(0), R[4:]])), ValueError, f"must equal clean.*{CAT}"),
    "sources at the end": (dict(reference=R.flip(0)), ValueError, f"(?s)source_index.*{CAT}"),
    "one pixel changed": (dict(reference=ONE_PIXEL), ValueError, "largest difference is 0.001"),
    "one pixel of float64": (dict(clean=X.double(), reference=ONE_PIXEL.double()), ValueError, CAT),
    "horizontally flipped": (dict(clean=X.flip(-1), reference=R), ValueError, "after any augmentation"),
    "too few": (dict(reference=X[:3]), ValueError, r"got 3 references for 4 images.*torch.cat\(\[clean, others\]\)"),
    "other size": (dict(reference=R[..., :2]), ValueError, "must have one shape. Resize and crop them alike"),
    "no tensor": (dict(reference=[X]), TypeError, "reference must be a tensor .* got list"),
    "integer images": (dict(clean=X.int()), TypeError, "floating point in .* or uint8 pixels"),
    "integer references": (dict(reference=R.int()), TypeError, "floating point in .* or uint8 pixels"),
    "images no tensor": (dict(clean=[X]), TypeError, "clean must be a tensor .* got list. Stack the images first"),
    "no batch": (dict(clean=X[0, 0, 0]), ValueError, "clean must be a batch"),
    "index to others": (dict(reference=R, source_index=I4 + 5), ValueError, r"reference\[source_index\]"),
    "index beyond": (dict(reference=R, source_index=I4 + 12), ValueError, r"source_index must lie in \[0, 12\)"),
    "index negative": (dict(reference=R, source_index=I4 - 1), ValueError, r"source_index must lie in \[0, 12\)"),
    "index shape": (dict(reference=R, source_index=I12), ValueError, r"source_index must have shape \(4,\)"),
    "index bool": (dict(reference=R, source_index=I4.bool()), TypeError, "source_index must be integers; got torch.bool"),
    "labels alone": (dict(reference=R, labels=I4), ValueError, "labels need reference_labels: rows use references of"),
    "reference labels alone": (dict(reference=R, reference_labels=I12), ValueError, "reference_labels need labels"),
    "labels shape": (dict(reference=R, labels=I4[:3], reference_labels=I12), ValueError, r"labels must have shape \(4,"),
    "reference labels shape": (
        dict(reference=R, labels=I4, reference_labels=I4), ValueError, r"reference_labels must have shape \(12,\)"
    ),
    "float labels": (
        dict(reference=R, labels=I4.float(), reference_labels=I12), TypeError, "labels must be integers; got torch.float32"
    ),
    "one-hot labels": (
        dict(reference=R, labels=torch.eye(4).long(), reference_labels=I12), ValueError, "labels must have shape"
    ),
    "mismatched labels": (
        dict(reference=R, labels=I4 + 1, reference_labels=I12), ValueError, "labels differ from .* or -1 where the condition"
    ),
    "mismatched labels by index": (
        dict(reference=R, labels=I4, source_index=torch.arange(4), reference_labels=I12 + 1), ValueError, "labels differ"
    ),
    "unconditional without labels": (
        dict(reference=R, num_unconditional=8), ValueError, "num_unconditional needs labels and reference_labels"
    ),
    "unconditional below B": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=3), ValueError, r"\[B, n\] = \[4, 12\]; got 3"
    ),
    "unconditional above n": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=13), ValueError, r"\[4, 12\]; got 13"
    ),
    "unconditional no number": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=8.0), TypeError, "must be an int; got float"
    ),
    "unconditional of a bank": (
        dict(reference=ReferenceBank(R, I12), labels=I4, num_unconditional=8),
        ValueError, "in a ReferenceBank, rows of label -1 use all. Leave it out"
    ),
    "noise shape": (dict(noise=normal(4, 1, 4, 4)), ValueError, r"noise must have the images' shape \(4, 3, 4, 4\)"),
    "one time": (dict(t=torch.tensor(1.0)), ValueError, r"one per image, shape \(4,\); got \(\)"),
    "times expanded": (dict(t=torch.ones(4, 1, 1, 1)), ValueError, r"one per image, shape \(4,\)"),
    "no noise": (dict(t=torch.tensor([1.0, 0.0, 1.0, 1.0])), ValueError, r"times of EDM lie above 0 .*got \[0.0\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    """At the first call, and after any number of good ones; by perturb and by target."""
    change, error, message = ERRORS[case]
    objective = STFTrainingObjective(EDM())
    arguments = {"clean": X, "noise": torch.zeros_like(X), "t": torch.ones(4), **change}
    for _ in range(2):
        with pytest.raises(error, match=message):
            objective.perturb(**arguments)
        with pytest.raises(error, match=message):
            objective.target(**{"timesteps" if key == "t" else key: value for key, value in arguments.items()})
        objective.perturb(X, reference=R)
        objective.perturb(X, reference=R, labels=I4, reference_labels=I12)


@pytest.mark.parametrize("process", [VP(), FlowMatching()], ids=repr)
def test_times_beyond_the_end_are_refused(process):
    """As the integer timesteps of a scheduler would be."""
    objective = STFTrainingObjective(process)
    objective.target(X, torch.zeros_like(X), torch.ones(4))
    for t in (torch.tensor([0.5, 1.01, 0.5, 0.5]), torch.tensor([1, 20, 300, 999])):
        with pytest.raises(ValueError, match=r"lie above 0 and up to 1; got .*STFTrainingObjective.from_scheduler"):
            objective.target(X, torch.zeros_like(X), t)


ADD_NOISE = [
    "DDPM",
    "DDIM",
    "PNDM",
    "LCM",
    "EulerDiscrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DEISMultistep",
]


@pytest.mark.parametrize("name", [*ADD_NOISE, "UniPCMultistep", "SASolver"])
def test_warns_where_add_noise_is_not_the_schedulers_process(name):
    """Some solvers read their noise table backwards until set_timesteps is called."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    process, t = SchedulerProcess(scheduler), torch.tensor([0, 10, 500, 999])
    wrong = worst(scheduler.add_noise(X, R[4:8], t), process.add_noise(X, R[4:8], t)) > 1e-3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        STFTrainingObjective.from_scheduler(scheduler)
    said = [w for w in caught if "does not add the noise that belongs to a timestep" in str(w.message)]
    assert bool(said) == wrong


def test_unknown_timesteps_of_a_scheduler_are_refused():
    objective = STFTrainingObjective(PROCESSES["DDPM"])
    with pytest.raises(ValueError, match="are not among the 1000 training timesteps"):
        objective.target(X, torch.zeros_like(X), torch.tensor([0, 1, 2, 1000]))


@pytest.mark.parametrize("shape", [(4, 1, 4, 4), (4, 6, 4, 4), (1, 3, 4, 4), (4, 3, 4), (4, 48)])
def test_loss_refuses_to_broadcast(shape):
    objective = STFTrainingObjective(EDM())
    with pytest.raises(ValueError, match=r"the network returned .* for a target of .*`.sample`.*out_channels"):
        objective.loss(torch.zeros(shape), objective.perturb(X))


def test_constructor_errors():
    with pytest.raises(TypeError, match=r"got DDPMScheduler.*STFTrainingObjective.from_scheduler\(scheduler\)"):
        STFTrainingObjective(diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        STFTrainingObjective(EDM(), "eps")
    with pytest.raises(TypeError, match="needs a Diffusers scheduler"):
        STFTrainingObjective.from_scheduler(EDM())


# ---- exact unbiasedness, by enumeration
#
# Six points, references of three: given x_t, the source is s with probability w_s (the full posterior) and the set is
# {s, two others}, uniform. Every expectation below is the finite sum over all of these.

POINTS = normal(6, 2, seed=8, dtype=torch.float64)
POINT_CLASSES = torch.tensor([0, 0, 1, 0, 1, 1])
QUERIES = [torch.tensor(q, dtype=torch.float64) for q in ([0.1, -0.2], [1.0, 0.5])]
TIMES = {EDM: [0.3, 1.0, 4.0], VE: [0.3, 1.0, 4.0], VP: [0.1, 0.3, 0.6], FlowMatching: [0.2, 0.5, 0.8]}


def sets(n):
    return [list(s) for s in combinations(range(6), n)]


def full_posterior(x_t, alpha, sigma, members=None):
    """Weights (6,) over all points, or over those that `members` (6,) allows."""
    mask = None if members is None else members[None]
    return posterior(x_t[None], POINTS, alpha[None], sigma[None], mask)[0][0]


def enumerate_targets(process, prediction_type, x_t, t, labels=None):
    """{(set, source): target} by the objective itself: all rows of a set are noised to the same x_t."""
    alpha, sigma = (float(f(torch.tensor([t], dtype=torch.float64))) for f in (process.alpha, process.sigma))
    objective = STFTrainingObjective(process, prediction_type)
    targets = {}
    for members in sets(3):
        x0 = POINTS[members]
        classes = {} if labels is None else {"labels": labels[members], "reference_labels": POINT_CLASSES[members]}
        target = objective.target(
            x0, (x_t - alpha * x0) / sigma, torch.full((3,), t, dtype=torch.float64), reference=x0, **classes
        )
        targets |= {(tuple(members), s): target[i] for i, s in enumerate(members)}
    return targets


def expectation(targets, weights):
    """E over source ~ weights and the two others uniform, C(5, 2) = 10 choices."""
    return sum(weights[source] * target / 10 for (_, source), target in targets.items())


@every_type
@four_processes
def test_target_is_exactly_unbiased(process, prediction_type):
    """E[target | x_t] = E[y | x_t] for n = 3, to rounding: Bertrand et al. 2025, Prop. 2."""
    for t in TIMES[type(process)]:
        alpha, sigma, a, b = (
            c[0] for c in coefficients(process, prediction_type, torch.tensor([t], dtype=torch.float64))
        )
        for x_t in QUERIES:
            weights = full_posterior(x_t, alpha, sigma)
            mean = weights @ POINTS
            expected = a * mean + b * (x_t - alpha * mean) / sigma
            got = expectation(enumerate_targets(process, prediction_type, x_t, t), weights)
            assert worst(got, expected) < 1e-12 * (1 + expected.abs().max())


@four_processes
def test_class_conditional_target_is_exactly_unbiased(process):
    """Given the class of the source, and given a dropped class, for sets drawn from the whole data."""
    for t in TIMES[type(process)]:
        alpha, sigma, *_ = (c[0] for c in coefficients(process, None, torch.tensor([t], dtype=torch.float64)))
        for x_t in QUERIES:
            everything = full_posterior(x_t, alpha, sigma)
            by_class = [full_posterior(x_t, alpha, sigma, label == POINT_CLASSES) for label in (0, 1)]
            conditional = enumerate_targets(process, "sample", x_t, t, labels=POINT_CLASSES)
            dropped = enumerate_targets(process, "sample", x_t, t, labels=torch.full((6,), -1))
            for targets, weights in ((conditional, by_class[0]), (conditional, by_class[1]), (dropped, everything)):
                assert worst(expectation(targets, weights), weights @ POINTS) < 1e-12
            if t == TIMES[type(process)][1]:  # references of every class would be a bias
                assert worst(expectation(dropped, by_class[1]), by_class[1] @ POINTS) > 0.01


def mean_over(reference_sets, x_t, sigma):
    """Posterior means (len(sets), 2) by the package, each over its own rows of POINTS (repeats allowed)."""
    sigma = torch.tensor([sigma], dtype=torch.float64)
    return torch.stack([posterior_mean(x_t[None], POINTS[s], alpha=1.0, sigma=sigma).mean[0] for s in reference_sets])


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_the_traps_are_biases(sigma):
    """The source left out, counted twice, or added to a fixed subset: biases clearly above 0.01; otherwise none."""
    x_t, one = QUERIES[0], torch.tensor(1.0, dtype=torch.float64)
    weights = full_posterior(x_t, one, one * sigma)
    exact = weights @ POINTS

    def bias(sets_of):
        targets = [mean_over(sets_of(s), x_t, sigma).mean(0) for s in range(6)]
        return (weights @ torch.stack(targets) - exact).norm().item()

    def others(source, n):
        return [list(o) for o in combinations([i for i in range(6) if i != source], n)]

    assert bias(lambda s: [[s, *o] for o in others(s, 2)]) < 1e-12
    assert bias(lambda s: others(s, 3)) > 0.05  # left out
    assert bias(lambda s: [[*range(6), s]]) > 0.01  # the whole data set and the source once more
    assert bias(lambda s: [list({0, 1, 2, s})]) > 0.01  # a fixed subset, and the source
    assert bias(lambda s: [list(range(6))]) < 1e-12  # the whole data set, the source once


# ---- variance, by enumeration


@pytest.mark.parametrize("x_t", QUERIES, ids=str)
@pytest.mark.parametrize("sigma", [0.4, 1.0, 4.0])
def test_variance_falls_with_every_reference(sigma, x_t):
    """Var(target | x_t) is strictly decreasing in n, from V_DSM at n = 1 to 0 at n = N (Rao-Blackwell)."""
    one = torch.tensor(1.0, dtype=torch.float64)
    weights = full_posterior(x_t, one, one * sigma)
    exact = weights @ POINTS
    variances = []
    for n in range(1, 7):
        means = mean_over(sets(n), x_t, sigma)
        # P(set | x_t) = sum over its members of w_s / C(5, n - 1)
        probability = torch.stack([weights[s].sum() for s in sets(n)])
        probability /= probability.sum()
        variances.append((probability @ (means - exact).square().sum(1)).item())
    v_dsm = (weights @ (POINTS - exact).square().sum(1)).item()
    assert variances[0] == pytest.approx(v_dsm, rel=1e-12)
    assert variances[5] < 1e-24
    assert all(later < 0.999 * earlier for earlier, later in pairwise(variances)), variances


# ---- Gaussian data, where everything has a closed form
#
# x0 ~ N(mu, s² I): Var(x0 | x_t) = v = s² sigma² / (alpha² s² + sigma²), E[x0 | x_t] = mu + alpha v (x_t - alpha mu) / sigma²,
# and y given x_t is (a - b alpha / sigma) x0 plus what x_t fixes: the least DSM loss is (a - b alpha / sigma)² v.

MU, S = torch.tensor([0.4, -0.3, 0.1]).double(), 0.6


def gaussian_data(count, seed):
    return (MU + S * normal(count, 3, seed=seed, dtype=torch.float64)).float()


def analytic_network(process, prediction_type, model_input, t):
    """The optimal network: it sees its input and the time alone. Returns its output and the least loss, per row."""
    alpha, sigma, a, b = (rows(c, model_input) for c in coefficients(process, prediction_type, t))
    x_t = model_input.double() / rows(process.input_scale(t.double()), model_input)
    v = S**2 * sigma**2 / (alpha**2 * S**2 + sigma**2)
    x0 = MU + alpha * v * (x_t - alpha * MU) / sigma**2
    return a * x0 + b * (x_t - alpha * x0) / sigma, (a - b * alpha / sigma) ** 2 * v


GAUSSIAN = [
    (EDM(p_mean=0.0), None),
    (EDM(p_mean=0.0), "sample"),
    (EDM(p_mean=0.0), "score"),
    (VE(sigma_min=0.1, sigma_max=20.0), None),
    (VP(), None),
    (VP(), "v_prediction"),
    (VP(), "sample"),
    (FlowMatching(), None),
    (FlowMatching("logit_normal"), "epsilon"),
    (PROCESSES["DDPM"], None),
    (PROCESSES["DDPM v"], None),
    (PROCESSES["Euler"], None),
    (PROCESSES["Euler v"], None),
    (PROCESSES["EDM-Euler"], None),
    (PROCESSES["FlowMatch"], None),
]
gaussian = pytest.mark.parametrize(("process", "prediction_type"), GAUSSIAN, ids=str)


@gaussian
def test_analytic_network_has_the_loss_of_theory(process, prediction_type):
    """Errors over theory's variance are chi-square with one degree of freedom, over the process's own times: |z| < 4."""
    x0 = gaussian_data(20_000, seed=0)
    objective = STFTrainingObjective(process, prediction_type)
    batch = objective.perturb(x0, generator=seeded(1))
    output, least = analytic_network(process, prediction_type, batch.model_input, batch.t)
    informative = (least > 1e-8).squeeze(1)  # where rounding is not what is left
    ratio = ((output - batch.target) ** 2 / least)[informative]
    assert ratio.numel() > 40_000
    z = (ratio.mean() - 1) * (ratio.numel() / 2) ** 0.5
    assert abs(z) < 4, z.item()


@pytest.mark.parametrize(("process", "prediction_type", "time"), [
    (EDM(), None, 1.0), (EDM(), "sample", 3.0), (VE(), None, 1.0), (VP(), None, 0.4), (VP(), "v_prediction", 0.5),
    (FlowMatching(), None, 0.5), (PROCESSES["DDPM"], None, 400),
], ids=str)  # fmt: skip
def test_loss_at_one_time_and_its_fall_with_references(process, prediction_type, time):
    """The scalar loss is theory's to |z| < 4 for DSM, and falls towards 0 with the references at the rate of n."""
    t = torch.full((4096,), time)
    objective = STFTrainingObjective(process, prediction_type)
    losses = {}
    for n in (1, 16, 256, 4096):
        size = 2048 if n == 1 else 8
        total, repeats = 0.0, 2 if n == 1 else 64
        for repeat in range(repeats):
            reference = gaussian_data(max(n, size), seed=1000 * n + repeat)
            batch = objective.perturb(
                reference[:size], reference=None if n == 1 else reference, t=t[:size], generator=seeded(repeat)
            )
            output, least = analytic_network(process, prediction_type, batch.model_input, batch.t)
            total += objective.loss(output.float(), batch).item() / repeats
        losses[n] = total / least[0].item()
    assert abs(losses[1] - 1) < 4 * (2 / (2 * 2048 * 3)) ** 0.5, losses
    assert losses[16] < 0.8 and losses[256] < 0.25 * losses[16] and losses[4096] < 0.25 * losses[256], losses
    assert losses[4096] < 0.01, losses


@gaussian
def test_analytic_network_is_the_minimiser(process, prediction_type):
    """The gradient of a constant offset is 0 in the mean over batches, |z| < 4, with STF; of an offset network it is not.

    The references of a batch are shared by its rows, so batches are the independent units. Rows are weighted by theory's
    standard deviation, since low noise and high noise differ by orders of magnitude.
    """
    objective = STFTrainingObjective(process, prediction_type)
    gradients = []
    for seed in range(400):
        reference = gaussian_data(24, seed=seed)
        batch = objective.perturb(reference[:8], reference=reference, generator=seeded(seed))
        output, least = analytic_network(process, prediction_type, batch.model_input, batch.t)
        gradients.append(((output - batch.target) / (least.sqrt() + 1e-3)).mean(0))
    gradients = torch.stack(gradients)
    z = gradients.mean(0) / (gradients.std(0) / 20)
    assert z.abs().max() < 4, z
    assert ((gradients.mean(0) + 0.1) / (gradients.std(0) / 20)).min() > 4


def test_a_training_run_with_sampler_and_collator_is_unbiased():
    """ReferenceBatchSampler -> collator -> objective: target minus full posterior mean is 0 in the mean, |z| < 4.

    And uncorrelated with x_t; the same run without the sources among the references is far off.
    """
    data = normal(60, 2, seed=3)
    full = data.double()
    sampler, collate = ReferenceBatchSampler(60, batch_size=4, reference_batch_size=10), ReferenceBatchCollator(4)
    objective, generator = STFTrainingObjective(EDM(), "sample"), seeded(0)
    moments = {"stf": [], "without sources": []}
    for _ in range(100):
        for indices in sampler:
            batch = collate([{"images": data[i]} for i in indices])
            clean, reference = batch["images"], batch["reference_images"]
            perturbed = objective.perturb(clean, reference=reference, t=torch.full((4,), 1.0), generator=generator)
            exact = posterior(perturbed.noisy, full, perturbed.alpha, perturbed.sigma)[1]
            biased = posterior(perturbed.noisy, reference[4:], perturbed.alpha, perturbed.sigma)[1]
            for name, target in (("stf", perturbed.target), ("without sources", biased)):
                error = target.double() - exact
                moments[name].append(torch.cat([error.mean(0), (error * perturbed.noisy).mean(0)]))
    z = {}
    for name, values in moments.items():
        values = torch.stack(values)
        z[name] = (values.mean(0) / (values.std(0) / len(values) ** 0.5)).abs().max().item()
    assert z["stf"] < 4 < 10 < z["without sources"], z
