"""Distributions of the noise level: densities, draws, what processes make of them."""

import json
import math
from itertools import pairwise

import pytest
import torch
from scipy import integrate, stats

from processes import seeded
from stf_diffusers import EDM, VE, VP, FlowMatching, SchedulerProcess, STFTrainingObjective
from stf_diffusers.noise_distribution import (
    LogitNormal,
    LogNormal,
    Piecewise,
    distribution_from_config,
    distribution_to_config,
)

diffusers = pytest.importorskip("diffusers")

DISTRIBUTIONS = {
    "log-normal": LogNormal(-1.2, 1.2),
    "wide": LogNormal(-0.4, 1.8),
    "logit-normal": LogitNormal(0.01, 50.0, 0.3, 1.4),
    "log-uniform": Piecewise.log_uniform(0.03, 60.0),
    "piecewise": Piecewise((0.03, 0.1, 1.0, 10.0, 50.0), (1, 0, 3, 2)),
}
each = pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
PROCESSES = [EDM(), VE(), VP(), FlowMatching()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


@each
def test_densities_integrate_to_one_and_are_the_slope_of_the_cdf(distribution):
    def density(x):
        return distribution.log_density(torch.tensor(x, dtype=torch.float64)).exp().item()

    edges = [math.log(level) for level in (0.01, 0.03, 0.1, 1.0, 10.0, 50.0, 60.0)]
    parts = [(-25.0, edges[0]), *pairwise(edges), (edges[-1], 25.0)]
    total = sum(integrate.quad(density, low, high)[0] for low, high in parts)
    assert abs(total - 1) < 1e-8
    for x in (-2.9, -1.3, 0.4, 2.1, 3.3):
        below = integrate.quad(density, -25, x, points=[edge for edge in edges if edge < x])[0]
        assert abs(distribution.cdf(torch.tensor(x)).item() - below) < 1e-6


@each
def test_quantile_inverts_the_cdf(distribution):
    p = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(distribution.cdf(distribution.quantile(p)), p, rtol=0, atol=1e-12)


@each
@each_process
def test_draws_follow_the_distribution_cut_off_at_the_processs_range(distribution, process):
    """Kolmogorov-Smirnov over 20,000 draws: a right sampler fails one time in 10^6."""
    t = process.sample_t(20_000, seeded(1), distribution=distribution)
    assert t.dtype == torch.float32 and bool((t > 0).all()) and bool((t <= process.last_time).all())
    t = t.double()
    low, high = process.training_range()
    below, above = distribution.cdf(torch.tensor([low, high], dtype=torch.float64).log()).tolist()

    def truncated(x):
        return ((distribution.cdf(torch.as_tensor(x)) - below) / (above - below)).clamp(0, 1).numpy()

    assert stats.kstest((process.sigma(t) / process.alpha(t)).log().numpy(), truncated).pvalue > 1e-6


def test_log_normal_is_edms_own_and_on_flows_the_logit_normal_one():
    n = 20_000
    own, drawn = (EDM().sample_t(n, seeded(seed), distribution=d) for seed, d in ((1, None), (2, LogNormal(-1.2, 1.2))))
    assert stats.ks_2samp(own.numpy(), drawn.numpy()).pvalue > 1e-6
    flow = FlowMatching("logit_normal", 0.2, 1.1)
    own, drawn = (flow.sample_t(n, seeded(seed), distribution=d) for seed, d in ((1, None), (2, LogNormal(0.2, 1.1))))
    assert stats.ks_2samp(own.numpy(), drawn.numpy()).pvalue > 1e-6


def test_integer_timesteps_are_the_nearest():
    process = SchedulerProcess(diffusers.DDPMScheduler())
    t = process.sample_t(5000, seeded(1), distribution=LogNormal(0.0, 1.0))
    levels = LogNormal(0.0, 1.0).sample(
        5000, low=process.training_range()[0], high=process.training_range()[1], generator=seeded(1)
    )
    table = (process.sigma(process.timesteps) / process.alpha(process.timesteps)).double().log()
    nearest = (levels.log()[:, None] - table).abs().argmin(1)
    assert torch.equal(t, process.timesteps[nearest]) and t.dtype == process.timesteps.dtype


def test_own_distributions_are_unchanged():
    """The draws of the flags that there were, from the same numbers, bit for bit."""
    normal, uniform = (draw(64, generator=seeded(3)) for draw in (torch.randn, torch.rand))
    assert torch.equal(EDM().sample_t(64, seeded(3)), (-1.2 + 1.2 * normal).exp())
    assert torch.equal(VE().sample_t(64, seeded(3)), 0.02 * (math.log(5000) * uniform).exp())
    assert torch.equal(VP().sample_t(64, seeded(3)), 1e-5 + (1 - 1e-5) * uniform)
    assert torch.equal(FlowMatching().sample_t(64, seeded(3)), uniform)


@each
def test_saved_and_read_again(distribution):
    again = distribution_from_config(json.loads(json.dumps(distribution_to_config(distribution))))
    assert again == distribution
    assert torch.equal(again.sample(10, generator=seeded(0)), distribution.sample(10, generator=seeded(0)))


def test_objective_draws_from_its_distribution():
    x0 = torch.zeros(2000, 1, 2, 2)
    objective = STFTrainingObjective(EDM(), distribution=LogNormal(1.0, 0.1))
    batch = objective.perturb(x0, generator=seeded(0))
    assert torch.equal(batch.t, EDM().sample_t(2000, seeded(0), distribution=LogNormal(1.0, 0.1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(std=0.0), "std"),
        (lambda: LogNormal(mean=math.inf), "mean"),
        (lambda: LogitNormal(low=0.0), "0 < low < high"),
        (lambda: Piecewise.log_uniform(2.0, 1.0), "0 < low < high"),
        (lambda: Piecewise((1.0,), ()), "one more than weights"),
        (lambda: Piecewise((1.0, 0.5), (1.0,)), "increasing"),
        (lambda: Piecewise((1.0, 2.0), (0.0,)), "not all 0"),
        (lambda: Piecewise((1.0, 2.0), (math.nan,)), "finite"),
        (lambda: VE().sample_t(4, distribution=LogNormal(-20.0, 1.0)), "Choose another"),
        (lambda: distribution_from_config({"name": "triangular"}), "triangular"),
    ],
)
def test_wrong_distributions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_kinds():
    with pytest.raises(TypeError, match="can be saved"):
        distribution_to_config(3)
    with pytest.raises(TypeError, match="NoiseDistribution"):
        STFTrainingObjective(EDM(), distribution="log_normal")
