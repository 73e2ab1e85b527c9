"""Noise levels drawn where the network is wrong: the draws, the error found, the weights that keep the objective."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from scipy import stats

from stf_diffusers import EDM, VE, VP, FlowMatching, SchedulerProcess, STFTrainingObjective, target_variance
from stf_diffusers.adaptive_noise import AdaptiveNoise
from stf_diffusers.forward_process import UniformTime
from stf_diffusers.noise_distribution import LogitNormal, LogNormal, Piecewise

PROCESSES = [EDM(), VE(), VP(), FlowMatching(), FlowMatching("logit_normal", 0.4, 1.3)]
# A false alarm once in 10^5 draws.
RARE = 1e-5


def discrete(steps=1000):
    return SchedulerProcess(DDPMScheduler(num_train_timesteps=steps))


def planted(distribution, at=None, seed=0, rounds=40, size=512):
    """`distribution` after batches of an error that is 1 near one level and 0.01 elsewhere."""
    draws = torch.Generator().manual_seed(seed)
    at = distribution.prior.quantile(torch.tensor([0.6])).exp().item() if at is None else at
    for _ in range(rounds):
        level = distribution.sample(size, generator=draws)
        distribution.update(level, torch.where((level.log() - math.log(at)).abs() < 0.3, 1.0, 0.01))
    return distribution


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_processes_say_what_levels_they_draw(process):
    """Kolmogorov-Smirnov on 20,000 times of `sample_t`; the density is the slope of the distribution function."""
    times = process.sample_t(20_000, torch.Generator().manual_seed(0)).double()
    levels = (process.sigma(times) / process.alpha(times)).log()
    own = process.level_distribution()
    found = stats.kstest(levels[levels.isfinite()].numpy(), lambda x: own.cdf(torch.from_numpy(x)).numpy())
    assert found.pvalue > RARE
    middle = own.quantile(torch.linspace(0.02, 0.98, 25, dtype=torch.float64))
    torch.testing.assert_close(own.cdf(middle), torch.linspace(0.02, 0.98, 25, dtype=torch.float64))
    slope = (own.cdf(middle + 1e-5) - own.cdf(middle - 1e-5)) / 2e-5
    torch.testing.assert_close(own.log_density(middle).exp(), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_scheduler_draws_its_timesteps_alike(steps):
    """Every timestep is one cell of the distribution, the outermost too."""
    process = discrete(steps)
    own = process.level_distribution()
    uniform = (torch.arange(20 * steps, dtype=torch.float64) + 0.5) / (20 * steps)
    found = process.times_at(own.quantile(uniform).exp())
    assert found.bincount(minlength=steps).tolist() == [20] * steps
    low, high = process.training_range()
    assert own.cdf(torch.tensor([low, high], dtype=torch.float64).log()).tolist() == pytest.approx([0, 1], abs=1e-12)


def test_a_scheduler_of_pure_noise_at_the_end():
    process = SchedulerProcess(DDPMScheduler(rescale_betas_zero_snr=True))
    if math.isfinite(float(process.sigma(process.timesteps[-1:]) / process.alpha(process.timesteps[-1:]))):
        pytest.skip("this Diffusers keeps the last level finite")
    with pytest.raises(TypeError, match=r"pure noise.*noise_distribution='adaptive'.*noise_mean="):
        AdaptiveNoise(process)
    levels = AdaptiveNoise(process, LogNormal()).sample(1000)
    assert levels.isfinite().all() and (process.times_at(levels) < 999).all()


def test_levels_that_do_not_increase():
    """Diffusers cuts the last one of these off at 4096, below those before it."""
    process = SchedulerProcess(EulerDiscreteScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match=r"do not increase with its timesteps.*4096.*noise_distribution="):
        AdaptiveNoise(process)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_too_few_timesteps(steps):
    process = discrete(steps)
    if steps == 3:
        AdaptiveNoise(process).subtract([0.1, 1.0], [0.0, 0.0])
        return
    with pytest.raises(ValueError, match=f"the process has {steps} timesteps.*3 or more"):
        AdaptiveNoise(process)


def test_a_process_that_does_not_say():
    class Silent(VE):
        def level_distribution(self):
            return super(VE, self).level_distribution()

    with pytest.raises(TypeError, match=r"define level_distribution.*UniformTime"):
        AdaptiveNoise(Silent())
    assert AdaptiveNoise(Silent(), LogNormal()).prior == LogNormal()


@pytest.mark.parametrize("process", [*PROCESSES, discrete(), discrete(5)], ids=str)
def test_the_distribution(process):
    """After an error at one level: draws match the distribution function, the density is its slope and integrates to one."""
    adaptive = planted(AdaptiveNoise(process))
    drawn = adaptive.sample(20_000, generator=torch.Generator().manual_seed(1)).log()
    assert stats.kstest(drawn.numpy(), lambda x: adaptive.cdf(torch.from_numpy(x)).numpy()).pvalue > RARE
    prior = adaptive.prior
    assert stats.kstest(drawn.numpy(), lambda x: prior.cdf(torch.from_numpy(x)).numpy()).pvalue < RARE, "it has moved"
    middle = adaptive.quantile((torch.arange(50, dtype=torch.float64) + 0.5) / 50)
    torch.testing.assert_close(adaptive.cdf(middle), (torch.arange(50, dtype=torch.float64) + 0.5) / 50)
    away = (middle[:, None] - adaptive.edges.log()).abs().min(1).values > 1e-3
    slope = (adaptive.cdf(middle + 1e-6) - adaptive.cdf(middle - 1e-6)) / 2e-6
    torch.testing.assert_close(adaptive.log_density(middle).exp()[away], slope[away], rtol=1e-3, atol=0)
    low, high = process.training_range()
    assert adaptive.cdf(torch.tensor([low, high], dtype=torch.float64).log()).tolist() == pytest.approx(
        [0, 1], abs=1e-12
    )
    assert adaptive.weights.sum().item() == pytest.approx(1) and adaptive.prior_weights.sum().item() == pytest.approx(1)


def test_before_any_error_it_is_the_prior():
    prior = LogNormal(-0.4, 1.2)
    adaptive = AdaptiveNoise(EDM(), prior)
    x = torch.linspace(-6, 5, 100, dtype=torch.float64)
    torch.testing.assert_close(adaptive.cdf(x), prior.cdf(x))
    torch.testing.assert_close(adaptive.log_density(x), prior.log_density(x))
    assert adaptive.errors.isnan().all()


@pytest.mark.parametrize("process", [EDM(), VE(), VP(), FlowMatching(), discrete()], ids=str)
def test_the_analytic_denoiser_has_no_error_and_the_prior_stays(process):
    """With all images as references the output that the posterior mean gives is the target, at every level."""
    images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    adaptive = AdaptiveNoise(process)
    objective = STFTrainingObjective(process, distribution=adaptive)
    draws = torch.Generator().manual_seed(1)
    for _ in range(20):
        rows = torch.randperm(50, generator=draws)
        batch = objective.perturb(images[rows], reference=images[rows], generator=draws)
        # The optimum, in float64 and from x_t alone.
        noisy, alpha, sigma = batch.noisy.double(), batch.alpha.double(), batch.sigma.double()
        flat = alpha[:, None, None] * images.double().flatten(1)
        logits = -(noisy.flatten(1)[:, None] - flat).square().sum(2) / (2 * sigma.square()[:, None])
        optimum = (logits.softmax(1) @ images.double().flatten(1)).view_as(noisy)
        a, b = process.output_coefficients(batch.t.double())
        shape = (-1, 1, 1, 1)
        output = a.view(shape) * optimum + b.view(shape) * (noisy - alpha.view(shape) * optimum) / sigma.view(shape)
        adaptive.update(batch.sigma / batch.alpha, (output - batch.target).flatten(1).square().mean(1))
    assert adaptive.errors.nan_to_num().max() < 1e-5
    torch.testing.assert_close(adaptive.weights, adaptive.prior_weights, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("at", [0.05, 1.5, 20.0])
@pytest.mark.parametrize("process", [VE(), discrete()], ids=str)
def test_it_finds_a_planted_error(process, at):
    adaptive = planted(AdaptiveNoise(process, power=1.0), at)
    gain = adaptive.weights / adaptive.prior_weights
    found = adaptive.edges[:-1][gain == gain.max()].log().mean().item()
    assert abs(found - math.log(at)) < 0.7
    near = (adaptive.edges[:-1].log() - math.log(at)).abs() < 1
    assert gain[near].max() > 4 * gain[~near].max()
    assert gain.min() >= adaptive.floor


def test_the_error_is_that_of_the_latest_rows():
    """Independent: the mean over an exponential window, row group by row group, and a change of the error is followed."""
    adaptive = AdaptiveNoise(VE(), memory=64)
    level, sums, rows = torch.full((16,), 1.0), 0.0, 0.0
    for step in range(30):
        error = torch.rand(16, generator=torch.Generator().manual_seed(step)) + step
        adaptive.update(level, error)
        keep = (1 - 1 / 64) ** 16
        sums, rows = keep * sums + error.double().sum().item(), keep * rows + 16
    found = adaptive.errors[~adaptive.errors.isnan()]
    assert found.tolist() == [pytest.approx(sums / rows)]
    assert abs(found.item() - 26.5) < 1.5


@pytest.mark.parametrize("process", [VE(), discrete(12)], ids=str)
def test_importance_weights_keep_the_expectation_of_the_gradient(process):
    """By enumeration over fine levels: a network whose gradient depends on the level in an arbitrary way."""
    adaptive = planted(AdaptiveNoise(process))
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def gradient(distribution, weights):
        times = process.times_at(distribution.quantile(uniform).exp()).double()
        level = process.sigma(times).double() / process.alpha(times).double()
        parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        features = torch.stack([level.log(), level.log().square(), (3 * level.log()).sin()], 1)
        loss = ((features @ parameter) - level.log().cos()).square()
        (weights(level) * loss).mean().backward()
        return parameter.grad

    plain = gradient(adaptive.prior, torch.ones_like)
    torch.testing.assert_close(gradient(adaptive, adaptive.importance_weights), plain, rtol=2e-3, atol=1e-3)
    assert (gradient(adaptive, torch.ones_like) - plain).abs().max() > 0.05, "without weights it is another"
    weights = adaptive.importance_weights(adaptive.sample(1000, generator=torch.Generator().manual_seed(0)))
    assert weights.max() <= 1 / adaptive.floor and weights.dtype == torch.float32


def test_the_loss_with_weights():
    objective = STFTrainingObjective(EDM(), distribution=AdaptiveNoise(EDM()))
    batch = objective.perturb(torch.rand(6, 1, 3, 3), generator=torch.Generator().manual_seed(0))
    output, weights = torch.randn(6, 1, 3, 3), torch.rand(6)
    expected = sum(
        float(weight) * (row - target).double().square().mean()
        for weight, row, target in zip(weights, output, batch.target, strict=True)
    )
    assert objective.loss(output, batch, weights).item() == pytest.approx(float(expected) / 6, rel=1e-5)
    torch.testing.assert_close(objective.loss(output, batch, torch.ones(6)), objective.loss(output, batch))
    with pytest.raises(ValueError, match=r"weights must have shape \(6,\)"):
        objective.loss(output, batch, torch.ones(6, 1))


def test_the_known_variance_is_subtracted():
    """DSM of the optimal network: its loss is V_DSM, and no error is left once that is subtracted."""
    images = torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    process, draws = EDM(), torch.Generator().manual_seed(1)
    levels = torch.logspace(-2, 1.5, 40, dtype=torch.float64)
    rows = target_variance(process, images, levels, num_samples=4000, generator=draws)
    adaptive = AdaptiveNoise(process, LogNormal(-0.5, 1.0), memory=20_000)
    adaptive.subtract(levels.tolist(), [row.dsm.value * row.output_factor / 4 for row in rows])
    bare = AdaptiveNoise(process, LogNormal(-0.5, 1.0), memory=20_000)
    objective = STFTrainingObjective(process, distribution=LogNormal(-0.5, 1.0))
    for _ in range(300):
        clean = images[torch.randint(30, (100,), generator=draws)]
        dsm = objective.perturb(clean, generator=draws)
        logits = -(dsm.noisy.flatten(1)[:, None] - images.flatten(1)).double().square().sum(2)
        optimum = (logits / (2 * dsm.sigma[:, None].double().square())).softmax(1) @ images.double().flatten(1)
        a, b = process.output_coefficients(dsm.t.double())
        gain = a - b / dsm.sigma.double()
        error = (gain[:, None] * (optimum - clean.double().flatten(1))).square().mean(1)
        for found in (adaptive, bare):
            found.update(dsm.sigma, error)
    often = adaptive.prior_weights > 0.01
    assert bare.errors[often].max() > 0.5
    assert adaptive.errors[often].max() < 0.1 * bare.errors[often].max()


def test_saved_and_loaded():
    adaptive, other = planted(AdaptiveNoise(VP())), AdaptiveNoise(VP())
    adaptive.subtract([0.1, 1.0], [0.2, 0.3])
    other.load_state_dict(adaptive.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(d.state_dict().values() for d in (adaptive, other)), strict=True))
    for distribution in (adaptive, other):
        distribution.update(torch.tensor([0.3, 5.0]), torch.tensor([0.5, 0.1]))
    draws = (d.sample(100, generator=torch.Generator().manual_seed(3)) for d in (adaptive, other))
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match="the state has 32 pieces; this distribution 8"):
        AdaptiveNoise(VP(), num_pieces=8).load_state_dict(adaptive.state_dict())


def test_parts_of_a_step_are_taken_together():
    """Processes that share their sums end with the same distribution as one that sees all rows."""
    level, error = VE().sample_t(64, torch.Generator().manual_seed(0)), torch.rand(64)
    whole, first, second = AdaptiveNoise(VE()), AdaptiveNoise(VE()), AdaptiveNoise(VE())
    whole.update(level, error)
    sums = first.sums_of(level[:40], error[:40]) + second.sums_of(level[40:], error[40:])
    first.take(sums)
    second.take(sums)
    torch.testing.assert_close(first.weights, whole.weights)
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": -1}, "power must lie between 0 and 2; got -1"),
        ({"power": math.nan}, "power must lie"),
        ({"floor": 0.0}, "floor must be above 0 and at most 1; got 0.0"),
        ({"num_pieces": 1}, "num_pieces must be at least 2; got 1"),
        ({"memory": 0}, "memory must be at least 1; got 0"),
        ({"prior": LogNormal(20, 0.1)}, r"has 0 of its probability at the noise levels 0\.02 to 100"),
    ],
)
def test_wrong_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveNoise(VE(), **arguments)


def test_wrong_known_variances():
    adaptive = AdaptiveNoise(VE())
    for levels, variances in (([1.0], [0.1]), ([1.0, 1.0], [0.1, 0.1]), ([1.0, 2.0], [0.1])):
        with pytest.raises(ValueError, match="levels must ascend"):
            adaptive.subtract(levels, variances)


@pytest.mark.parametrize(
    "prior", [LogitNormal(), Piecewise((0.1, 1.0, 5.0, 20.0), (1, 0, 2)), UniformTime(VP(), 0.1, 0.9)]
)
def test_other_priors(prior):
    """A piece without probability under the prior is never drawn, whatever its error."""
    adaptive = planted(AdaptiveNoise(EDM(), prior), at=2.0)
    drawn = adaptive.sample(5000, generator=torch.Generator().manual_seed(0)).log()
    assert stats.kstest(drawn.numpy(), lambda x: adaptive.cdf(torch.from_numpy(x)).numpy()).pvalue > RARE
    assert prior.log_density(drawn).isfinite().all() and adaptive.log_density(drawn).isfinite().all()


def test_errors_that_are_not_finite_do_not_count():
    """As in a step that fp16 skips; the others of its rows do."""
    levels, errors = torch.tensor([0.1, 0.5, 2.0]), torch.tensor([0.3, 0.2, 0.1])
    spoilt, clean = AdaptiveNoise(EDM()), AdaptiveNoise(EDM())
    for bad in (torch.inf, torch.nan):
        spoilt.update(torch.cat([levels, torch.tensor([1.0])]), torch.cat([errors, torch.tensor([bad])]))
        clean.update(levels, errors)
    assert torch.equal(spoilt.weights, clean.weights) and spoilt.weights.isfinite().all()
