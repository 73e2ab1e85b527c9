"""The training objective: what is noised, and what the target is."""

import pytest
import torch

from oracles import images, normal, posterior, rows, worst
from processes import PROCESSES, coefficients, every_process, every_type, seeded
from stf_diffusers import (
    EDM,
    VP,
    FlowMatching,
    PerturbedBatch,
    SchedulerProcess,
    STFTrainingObjective,
)

diffusers = pytest.importorskip("diffusers")


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
