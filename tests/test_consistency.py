"""Consistency tuning on the stable target: the pair of points, f at both, the loss."""

import math

import pytest
import torch

from oracles import images, normal, posterior, rows, worst
from processes import four_processes, seeded
from stf_diffusers import (
    EDM,
    VE,
    VP,
    ConsistencySchedule,
    ConsistencyTrainingObjective,
    FlowMatching,
    ReferenceBank,
    SchedulerProcess,
    STFTrainingObjective,
    network_denoiser,
    sample_rk45,
)
from test_unbiasedness import POINTS, QUERIES, expectation, full_posterior, sets

diffusers = pytest.importorskip("diffusers")


def levels(process, t):
    """sigma / alpha, float64."""
    return process.sigma(t.double()) / process.alpha(t.double())


# ---- the points


def test_without_references_or_with_one_the_points_are_ects_bit_for_bit():
    x0 = images(6, 2, 5, 6)
    objective = ConsistencyTrainingObjective(EDM())
    for stage in (0, 3, 7.5):
        pair = objective.perturb(x0, stage=stage, generator=seeded(0))
        ect, noisy = (x0 + rows(times, x0).float() * pair.noise for times in (pair.r, pair.t))
        assert torch.equal(pair.earlier, ect) and torch.equal(pair.noisy, noisy)
        assert torch.equal(pair.posterior_mean, x0) and pair.effective_sample_size.tolist() == [1] * 6
        for i in range(6):  # a reference batch of one is the source
            own = slice(i, i + 1)
            one = objective.perturb(x0[own], reference=x0[own], t=pair.t[own], stage=stage, noise=pair.noise[own])
            assert torch.equal(one.earlier, pair.earlier[own]) and torch.equal(
                one.earlier_input, pair.earlier_input[own]
            )


@four_processes
def test_earlier_point_is_an_euler_step_towards_the_posterior_mean(process):
    """x_r = alpha_r m + sigma_r / sigma_t (x_t - alpha_t m), in float64; the time r by its noise level."""
    reference = images(40, 2, 5, 6)
    reference[20] = reference[1] + 2e-3
    x0 = reference[:6]
    objective = ConsistencyTrainingObjective(process, p_mean=0.0)
    pair = objective.perturb(x0, reference=reference, stage=3, generator=seeded(1))
    t, r = pair.t.double(), pair.r.double()
    alpha_t, sigma_t, alpha_r, sigma_r = process.alpha(t), process.sigma(t), process.alpha(r), process.sigma(r)
    _, mean = posterior(pair.noisy, reference, alpha_t, sigma_t)
    expected = rows(alpha_r, x0) * mean + rows(sigma_r / sigma_t, x0) * (pair.noisy.double() - rows(alpha_t, x0) * mean)
    scale = 1 + rows(sigma_r, x0)
    assert ((pair.earlier.double() - expected).abs() / scale).max() < 1e-6
    level = levels(process, t)
    wanted = level * (1 - 2.0**-4 * (1 + 8 / (1 + level.exp()))).clamp(min=0)
    torch.testing.assert_close(levels(process, r), wanted, rtol=1e-5, atol=1e-7)
    assert pair.effective_sample_size.max() > 2
    for name in ("noisy", "earlier", "model_input", "earlier_input", "timestep", "earlier_timestep", "t", "r"):
        assert getattr(pair, name).dtype == torch.float32 and bool(getattr(pair, name).isfinite().all())
    torch.testing.assert_close(
        pair.earlier_input.double(), rows(process.input_scale(r), x0) * pair.earlier.double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(pair.earlier_timestep.double(), process.timestep(r), rtol=1e-5, atol=1e-4)


@four_processes
def test_at_r_0_the_earlier_point_is_the_posterior_mean_and_f_is_the_identity(process):
    reference = images(40, 2, 5, 6)
    x0 = reference[:6]
    objective = ConsistencyTrainingObjective(process)
    pair = objective.perturb(x0, reference=reference, r=torch.zeros(6), stage=None, generator=seeded(2))
    stf = STFTrainingObjective(process, "sample").perturb(x0, reference=reference, t=pair.t, noise=pair.noise)
    assert worst(pair.earlier, stf.target) < 1e-6
    anything = normal(6, 2, 5, 6, seed=9)
    assert torch.equal(objective.earlier(anything, pair), pair.earlier)
    assert bool(pair.earlier_timestep.isfinite().all() and pair.earlier_input.isfinite().all())


def test_schedule():
    t = torch.tensor([1e-3, 0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    for q, k, b, stage in ((2.0, 8.0, 1.0, 0), (2.0, 8.0, 1.0, 5), (4.0, 0.0, 1.0, 1), (2.0, 2.0, 0.5, 2.5)):
        expected = [max(0.0, x * (1 - q ** -(stage + 1) * (1 + k / (1 + math.exp(b * x))))) for x in t.tolist()]
        got = ConsistencySchedule(q, k, b).earlier_level(t, stage)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    constant = ConsistencySchedule(k=0).earlier_level(t, 2) / t
    torch.testing.assert_close(constant, torch.full_like(t, 1 - 2.0**-3))
    assert ConsistencySchedule().earlier_level(t, 0)[0] == 0  # the first stage is the STF target at low noise


def test_drawn_levels_are_log_normal():
    """Mean and deviation of ln t within five standard errors of 100,000 draws; a wrong mean would be 30 off."""
    n = 100_000
    log_t = ConsistencyTrainingObjective(EDM()).sample_t(n, generator=seeded(3)).double().log()
    assert abs(log_t.mean() + 1.1) < 5 * 2 / n**0.5 and abs(log_t.std() - 2) < 5 * 2 / (2 * n) ** 0.5
    for process in (EDM(), VE(), VP(), FlowMatching()):
        t = ConsistencyTrainingObjective(process).sample_t(1000, generator=seeded(3))
        assert bool(((t > 0) & (t <= process.last_time)).all()) and t.dtype == torch.float32


def test_draws_do_not_depend_on_references():
    reference = images(40, 2, 5, 6)
    objective = ConsistencyTrainingObjective(EDM())
    with_references = objective.perturb(reference[:6], reference=reference, stage=1, generator=seeded(4))
    without = objective.perturb(reference[:6], stage=1, generator=seeded(4))
    assert torch.equal(with_references.noise, without.noise) and torch.equal(with_references.t, without.t)


@pytest.mark.parametrize("kind", ["bank", "labelled bank", "labels"])
def test_references_are_those_of_the_stf_objective(kind):
    pixels = (images(40, 2, 5, 6) * 60 + 128).clamp(0, 255).to(torch.uint8)
    labels = torch.arange(40) % 3
    clean, given = pixels[:6], {}
    if kind == "labels":
        given = {"reference": pixels, "labels": labels[:6], "reference_labels": labels}
    else:
        with_labels = {"labels": labels} if kind == "labelled bank" else {}
        given = {"reference": ReferenceBank(pixels, **with_labels), "source_index": torch.arange(6)}
        if with_labels:
            given["labels"] = labels[:6]
    pair = ConsistencyTrainingObjective(EDM()).perturb(clean, stage=2, generator=seeded(5), **given)
    stf = STFTrainingObjective(EDM()).perturb(clean, t=pair.t, noise=pair.noise, **given)
    assert torch.equal(pair.posterior_mean, stf.posterior_mean) and torch.equal(pair.noisy, stf.noisy)
    assert torch.equal(pair.effective_sample_size, stf.effective_sample_size)
    assert torch.equal(pair.model_input, stf.model_input) and torch.equal(pair.timestep, stf.timestep)


# ---- what is proved of the points: by enumeration, as in test_unbiasedness.py


def enumerate_earlier(process, x_t, t, r, with_source=True):
    """{(set, source): x_r} over reference sets of three; without the source, over the two others."""
    alpha, sigma = (float(f(torch.tensor([t], dtype=torch.float64))) for f in (process.alpha, process.sigma))
    objective, found = ConsistencyTrainingObjective(process), {}
    for members in sets(3):
        for source in members:
            x0 = POINTS[[source]]
            others = [m for m in members if m != source]
            pair = objective.perturb(
                x0,
                reference=POINTS[[source, *others]],
                noise=(x_t - alpha * x0) / sigma,
                t=torch.tensor([t], dtype=torch.float64),
                r=torch.tensor([r], dtype=torch.float64),
            )
            earlier = pair.earlier[0]
            if not with_source:
                _, mean = posterior(x_t[None], POINTS[others], torch.tensor([alpha]), torch.tensor([sigma]))
                alpha_r, sigma_r = (
                    float(f(torch.tensor([r], dtype=torch.float64))) for f in (process.alpha, process.sigma)
                )
                earlier = alpha_r * mean[0] + sigma_r / sigma * (x_t - alpha * mean[0])
            found[tuple(members), source] = earlier
    return found


@four_processes
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
def test_mean_of_the_earlier_point_given_x_t_is_that_of_ects(process, fraction):
    times = {VP: [0.1, 0.6], FlowMatching: [0.2, 0.8]}.get(type(process), [0.3, 1.0])
    for t in times:
        r = fraction * t
        at_t, at_r = (torch.tensor([x], dtype=torch.float64) for x in (t, r))
        alpha, sigma = process.alpha(at_t), process.sigma(at_t)
        for x_t in QUERIES:
            weights = full_posterior(x_t, alpha[0], sigma[0])
            noise = (x_t - alpha * POINTS) / sigma  # that of each source
            ect = weights @ (process.alpha(at_r) * POINTS + process.sigma(at_r) * noise)
            got = expectation(enumerate_earlier(process, x_t, t, r), weights)
            assert worst(got, ect) < 1e-12 * (1 + ect.abs().max())


def test_leaving_the_source_out_is_biased():
    x_t, t, r = QUERIES[0], 1.0, 0.3
    weights = full_posterior(x_t, torch.tensor(1.0), torch.tensor(t))
    ect = weights @ (POINTS + r * (x_t - POINTS) / t)
    assert worst(expectation(enumerate_earlier(EDM(), x_t, t, r, with_source=False), weights), ect) > 1e-2


# ---- f and the loss


@four_processes
def test_f_is_the_networks_denoiser(process):
    """`denoise` and `earlier` are D at both points, by the samplers' own `network_denoiser`."""
    x0 = images(6, 2, 5, 6, dtype=torch.float64)
    objective = ConsistencyTrainingObjective(process)
    pair = objective.perturb(x0, stage=4, r=None, generator=seeded(6))

    class Network(torch.nn.Module):
        def forward(self, x, timestep):
            return type("Output", (), {"sample": (2 * x + rows(timestep.double(), x) / 100).sin()})

    network = Network()
    denoise = network_denoiser(network, process)
    for point, times, output, f in (
        (pair.noisy, pair.t, network(pair.model_input, pair.timestep).sample, objective.denoise),
        (pair.earlier, pair.r, network(pair.earlier_input, pair.earlier_timestep).sample, objective.earlier),
    ):
        expected = denoise(point / rows(process.alpha(times), x0), levels(process, times))
        exact = torch.where(rows(times, x0) > 0, expected, point)
        torch.testing.assert_close(f(output, pair), exact, rtol=1e-7, atol=1e-7)


def output_for(objective, f, noisy, t):
    """The network's output that makes f(x, t) what is given."""
    coefficient = objective.process.output_coefficients(t)
    alpha, sigma = objective.process.alpha(t), objective.process.sigma(t)
    a, b = (rows(c, noisy) for c in coefficient)
    return a * f + b * (noisy - rows(alpha, noisy) * f) / rows(sigma, noisy)


@pytest.mark.parametrize("huber_c", [None, 0.0, 0.5])
def test_loss_is_the_pseudo_huber_distance_over_the_step(huber_c):
    x0 = images(6, 2, 5, 6, dtype=torch.float64)
    objective = ConsistencyTrainingObjective(EDM(), huber_c=huber_c)
    pair = objective.perturb(x0, stage=2, generator=seeded(7), t=torch.linspace(0.5, 30, 6, dtype=torch.float64))
    u, v = normal(6, 2, 5, 6, seed=1).double(), normal(6, 2, 5, 6, seed=2).double()
    c = 0.00054 * math.sqrt(60) if huber_c is None else huber_c
    distance = ((u - v).flatten(1).square().sum(1) + c**2).sqrt() - c
    expected = (distance / (pair.t - pair.r)).mean()
    outputs = [output_for(objective, f, x, t) for f, x, t in ((u, pair.noisy, pair.t), (v, pair.earlier, pair.r))]
    torch.testing.assert_close(objective.loss(*outputs, pair), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("huber_c", [None, 0.0])
def test_gradient_reaches_the_later_output_alone_and_is_finite_where_both_agree(huber_c):
    x0 = images(4, 1, 3, 3)
    objective = ConsistencyTrainingObjective(EDM(), huber_c=huber_c)
    pair = objective.perturb(x0, stage=0, t=torch.tensor([0.01, 0.5, 3.0, 30.0]), generator=seeded(8))
    assert pair.r[0] == 0 and pair.r[3] > 0
    outputs = [normal(4, 1, 3, 3, seed=seed).requires_grad_() for seed in (1, 2)]
    objective.loss(*outputs, pair).backward()
    assert outputs[1].grad is None and bool((outputs[0].grad.flatten(1).norm(dim=1) > 0).all())
    nothing = torch.zeros_like(x0)
    pair = objective.perturb(nothing, r=torch.zeros(4), t=pair.t, noise=nothing)
    output = nothing.clone().requires_grad_()
    objective.loss(output, nothing, pair).backward()
    assert torch.equal(output.grad, nothing)


def test_loss_of_the_consistency_function_of_the_empirical_ode_vanishes_with_the_step():
    """f by integrating the ODE of a point set at 1e-10: |f(x_t) - f(x_r)| is an Euler step's error, of order 2 in t - r.

    So the loss, which divides by t - r, is of order 1. f ends with D at the level 0.3, a function of the trajectory as
    its end is: at no noise each trajectory ends in a point, and f would be constant between their basins.
    """
    points = images(5, 1, 2, 2, seed=3, dtype=torch.float64)
    process = EDM()

    def denoise(x, sigma):
        level = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        return posterior(x, points, torch.ones_like(level), level)[1].reshape(x.shape)

    def consistency_function(x, t):
        found = [
            sample_rk45(denoise, row[None] / level, sigma_min=0.3, sigma_max=level, rtol=1e-10, atol=1e-12)[0]
            for row, level in zip(x, t.tolist(), strict=True)
        ]
        return torch.cat(found)

    objective = ConsistencyTrainingObjective(process, huber_c=0.0)
    t = torch.tensor([0.6, 0.9, 1.3, 2.0], dtype=torch.float64)
    noise = normal(4, 1, 2, 2, seed=5).double()
    steps, losses = [0.05, 0.025, 0.0125], []
    for step in steps:
        pair = objective.perturb(points[:4], reference=points, t=t, r=t * (1 - step), noise=noise)
        f_t, f_r = consistency_function(pair.noisy, pair.t), consistency_function(pair.earlier, pair.r)
        outputs = [output_for(objective, f, x, s) for f, x, s in ((f_t, pair.noisy, t), (f_r, pair.earlier, pair.r))]
        losses.append(objective.loss(*outputs, pair).item())
        ect = objective.perturb(points[:4], t=t, r=t * (1 - step), noise=noise)
    order = (math.log(losses[0]) - math.log(losses[-1])) / math.log(steps[0] / steps[-1])
    assert 0.85 < order < 1.15
    # ECT's own points lie on other trajectories: its loss does not vanish.
    f_ect = consistency_function(ect.earlier, ect.r)
    outputs = [output_for(objective, f, x, s) for f, x, s in ((f_t, ect.noisy, t), (f_ect, ect.earlier, ect.r))]
    assert objective.loss(*outputs, ect) > 20 * losses[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_the_objectives_whatever_autocast_says(dtype):
    reference = images(40, 2, 5, 6).to(dtype)
    objective = ConsistencyTrainingObjective(EDM())
    outputs = [normal(6, 2, 5, 6, seed=seed).to(dtype) for seed in (1, 2)]
    plain = objective.perturb(reference[:6], reference=reference, stage=2, generator=seeded(4))
    with torch.autocast("cpu", torch.bfloat16):
        cast = objective.perturb(reference[:6], reference=reference, stage=2, generator=seeded(4))
        assert torch.equal(plain.earlier, cast.earlier) and cast.earlier.dtype == torch.float32
        assert cast.model_input.dtype == cast.earlier_input.dtype == dtype
        loss = objective.loss(*outputs, cast)
    assert loss.dtype == torch.float32 and torch.equal(loss, objective.loss(*outputs, plain))


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"process": "edm"}, TypeError, "process must be EDM"),
        ({"schedule": "sigmoid"}, TypeError, "ConsistencySchedule"),
        ({"p_std": 0.0}, ValueError, "p_std"),
        ({"p_mean": math.nan}, ValueError, "p_mean"),
        ({"huber_c": -1.0}, ValueError, "huber_c"),
    ],
)
def test_wrong_objectives(arguments, error, message):
    with pytest.raises(error, match=message):
        ConsistencyTrainingObjective(**{"process": EDM(), **arguments})


def test_scheduler_processes_are_refused_by_name():
    with pytest.raises(TypeError, match="SchedulerProcess"):
        ConsistencyTrainingObjective(SchedulerProcess(diffusers.DDPMScheduler()))


@pytest.mark.parametrize("arguments", [{"q": 1.0}, {"q": math.inf}, {"k": -1.0}, {"b": math.nan}])
def test_wrong_schedules(arguments):
    with pytest.raises(ValueError, match="must"):
        ConsistencySchedule(**arguments)


X0 = images(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "one of stage and r"),
        ({"stage": 1, "r": torch.zeros(4)}, ValueError, "one of stage and r"),
        ({"stage": -1}, ValueError, "stage must lie"),
        ({"stage": 20}, ValueError, "15.6"),
        ({"stage": math.nan}, ValueError, "stage must lie"),
        ({"r": torch.ones(4), "t": torch.ones(4)}, ValueError, "below t"),
        ({"r": -torch.ones(4)}, ValueError, "below t"),
        ({"r": torch.zeros(3)}, ValueError, "one time per image"),
        ({"r": [0.0] * 4}, TypeError, "r must be a tensor"),
        ({"stage": 1, "t": torch.zeros(4)}, ValueError, "lie above 0"),
        ({"stage": 1, "noise": torch.zeros(4, 1, 3, 2)}, ValueError, "noise must have"),
        ({"stage": 1, "reference": X0[1:]}, ValueError, "reference"),
        ({"stage": 1, "reference": X0.flip(0)}, ValueError, "source"),
        ({"stage": 1, "labels": torch.zeros(4, dtype=torch.long), "reference": X0}, ValueError, "reference_labels"),
    ],
)
def test_wrong_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        ConsistencyTrainingObjective(EDM()).perturb(X0, **arguments)


def test_times_without_signal_are_refused():
    with pytest.raises(ValueError, match="alpha"):
        ConsistencyTrainingObjective(FlowMatching()).perturb(X0, stage=1, t=torch.ones(4))


def test_wrong_outputs():
    objective = ConsistencyTrainingObjective(EDM())
    pair = objective.perturb(X0, stage=1)
    with pytest.raises(ValueError, match="out_channels"):
        objective.loss(X0[:, :, :2], X0, pair)
    with pytest.raises(TypeError, match=r"\.sample"):
        objective.loss(X0, (X0,), pair)
