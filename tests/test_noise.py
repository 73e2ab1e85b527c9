"""Forward processes: the rows of the design's table, their training distributions, every prediction type."""

import dataclasses
import math
from decimal import Decimal, localcontext

import pytest
import torch
from scipy import stats

from oracles import TABLE, images, normal, rows, worst
from processes import SCHEDULERS
from stf_diffusers import EDM, VE, VP, FlowMatching, NoiseProcess, SchedulerProcess
from stf_diffusers.forward_process import expand_as_rows
from stf_diffusers.prediction import recover_x0_and_noise

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Diffusers' own, of NumPy

# process, times, and the table's own formulas in float64: (alpha, sigma, input scale, timestep, (a, b) of the output).
NOISE_LEVELS = [0.002, 0.05, 0.5, 1.0, 7.0, 80.0]
TIMES = [1e-5, 1e-3, 0.1, 0.5, 0.9, 1.0]
CONTINUOUS = {
    "EDM": (
        EDM(),
        NOISE_LEVELS,
        lambda t: (1 + 0 * t, t, (t**2 + 0.25) ** -0.5, t.log() / 4),
        lambda t, a, s: (t / (0.5 * (t**2 + 0.25).sqrt()), -0.5 / (t**2 + 0.25).sqrt()),
    ),
    "EDM sigma_data=2": (
        EDM(sigma_data=2.0),
        NOISE_LEVELS,
        lambda t: (1 + 0 * t, t, (t**2 + 4) ** -0.5, t.log() / 4),
        lambda t, a, s: (t / (2 * (t**2 + 4).sqrt()), -2 / (t**2 + 4).sqrt()),
    ),
    "VE": (
        VE(),
        [0.02, 0.05, 0.5, 1.0, 7.0, 100.0],
        lambda t: (1 + 0 * t, t, (1 + t**2) ** -0.5, 999 * (t / 0.02).log() / math.log(5000)),
        lambda t, a, s: (0 * t, 1 + 0 * t),
    ),
    "VP": (
        VP(),
        TIMES,
        lambda t: (
            (-(19.9 * t**2 / 2 + 0.1 * t) / 2).exp(),
            (-(-(19.9 * t**2 / 2 + 0.1 * t)).expm1()).sqrt(),
            1 + 0 * t,
            1000 * t - 1,
        ),
        lambda t, a, s: (0 * t, 1 + 0 * t),
    ),
    "FlowMatching": (
        FlowMatching(),
        TIMES,
        lambda t: (1 - t, t, 1 + 0 * t, 1000 * t),
        lambda t, a, s: (-1 + 0 * t, 1 + 0 * t),
    ),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_of_the_table(name, dtype):
    process, times, row, output = CONTINUOUS[name]
    t = torch.tensor(times, dtype=dtype)
    exact = t.double()
    alpha, sigma, scale, timestep = row(exact)
    got = (process.alpha(t), process.sigma(t), process.input_scale(t), process.timestep(t))
    got += process.output_coefficients(t)
    for value, expected in zip(got, (alpha, sigma, scale, timestep, *output(exact, alpha, sigma)), strict=True):
        assert value.dtype == dtype and value.shape == t.shape
        # In float32 EDM's 1 - c_skip cancels at low noise; training takes the coefficients in float64.
        rtol, atol = {torch.float32: (1e-6, 5e-5), torch.float64: (1e-12, 1e-12)}[dtype]
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_add_noise(name):
    """alpha x0 + sigma noise by rows, with B = W where a wrong broadcast would pass."""
    process, times, row, _ = CONTINUOUS[name]
    t = torch.tensor(times)
    x0, noise = images(6, 2, 5, 6), normal(6, 2, 5, 6)
    alpha, sigma, _, _ = row(t.double())
    expected = rows(alpha, x0) * x0.double() + rows(sigma, x0) * noise.double()
    assert ((process.add_noise(x0, noise, t).double() - expected).abs() <= 1e-6 * (1 + rows(sigma, x0))).all()


def test_expand_as_rows():
    for shape in ((4,), (4, 3), (4, 3, 2, 4), (4, 1, 2, 3, 4)):
        assert expand_as_rows(torch.arange(4), torch.zeros(shape)).shape == (4, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-2, 0.5, 1.0])
def test_vp_is_exact_to_the_last_digits(t):
    """sigma and alpha in float32 against 50-digit decimals; 1 - alpha^2 would keep one digit at t = 1e-5."""
    t32 = torch.tensor([t])
    with localcontext() as context:
        context.prec = 50
        exact = Decimal(t32.item())
        integral = Decimal("19.9") * exact**2 / 2 + Decimal("0.1") * exact
        alpha, sigma = (-integral / 2).exp(), (1 - (-integral).exp()).sqrt()
    assert VP().alpha(t32).item() == pytest.approx(float(alpha), rel=1e-6)
    assert VP().sigma(t32).item() == pytest.approx(float(sigma), rel=5e-7)
    assert VP().sigma(t32.double()).item() == pytest.approx(float(sigma), rel=1e-14)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_noise_grows_with_time(name):
    process, times, _, _ = CONTINUOUS[name]
    t = torch.linspace(times[0], min(times[-1], 0.999 if times is TIMES else math.inf), 5000, dtype=torch.float64)
    ratio = process.sigma(t) / process.alpha(t)
    assert (ratio > 0).all() and (ratio.diff() > 0).all()


def test_vp_timestep_is_the_integer_of_a_thousand_step_scheduler():
    index = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(VP().timestep((index + 1) / 1000), index)
    assert VE().timestep(torch.tensor([0.02, 100.0])).tolist() == pytest.approx([0, 999], abs=1e-3)


# ---- training distributions

DISTRIBUTIONS = {
    "EDM": (EDM(), stats.lognorm(1.2, scale=math.exp(-1.2)).cdf),
    "EDM shifted": (EDM(p_mean=0.5, p_std=0.7), stats.lognorm(0.7, scale=math.exp(0.5)).cdf),
    "VE": (VE(), stats.loguniform(0.02, 100).cdf),
    "VE other range": (VE(sigma_min=0.1, sigma_max=50), stats.loguniform(0.1, 50).cdf),
    "VP": (VP(), stats.uniform(1e-5, 1 - 1e-5).cdf),
    "VP epsilon": (VP(epsilon_t=0.2), stats.uniform(0.2, 0.8).cdf),
    "FlowMatching": (FlowMatching(), stats.uniform().cdf),
    "logit-normal": (FlowMatching("logit_normal"), lambda t: stats.norm.cdf(torch.logit(torch.as_tensor(t)).numpy())),
    "logit-normal shifted": (
        FlowMatching("logit_normal", logit_mean=-1.0, logit_std=2.0),
        lambda t: stats.norm.cdf(torch.logit(torch.as_tensor(t)).numpy(), -1, 2),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_times_follow_the_training_distribution(name):
    """Kolmogorov-Smirnov with 50,000 draws: p > 0.001; a shift by 3 % of a standard deviation fails."""
    process, cdf = DISTRIBUTIONS[name]
    t = process.sample_t(50_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.shape == (50_000,)
    assert (process.sigma(t) > 0).all() and (t > 0).all()
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("process", [*(row[0] for row in CONTINUOUS.values()), FlowMatching("logit_normal"), "ddpm"])
def test_draws_belong_to_the_generator(process):
    """The same seed gives the same times, another seed others; the global generator is neither read nor advanced."""
    process = SchedulerProcess(SCHEDULERS[process]()) if isinstance(process, str) else process
    state = torch.get_rng_state()
    first, again, other = (process.sample_t(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(process.sample_t(64), first)  # without one the global generator is used
    assert len(process.sample_t(3, device="cpu")) == 3


# ---- validation

INVALID = {
    "EDM sigma_data": (lambda: EDM(sigma_data=0.0), r"sigma_data must be positive; got 0.0. Images in \[-1, 1\] have"),
    "EDM p_std": (lambda: EDM(p_std=-1.0), "p_std must be positive; got -1.0"),
    "VE order": (lambda: VE(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max; got 2.0 and 1.0"),
    "VE zero": (lambda: VE(sigma_min=0.0), "0 < sigma_min"),
    "VP beta_d": (lambda: VP(beta_d=0.0), "beta_d must be positive"),
    "VP beta_min": (lambda: VP(beta_min=-0.1), "beta_min must not be negative"),
    "VP epsilon_t zero": (lambda: VP(epsilon_t=0.0), r"epsilon_t must lie in \(0, 1\); got 0.0"),
    "VP epsilon_t one": (lambda: VP(epsilon_t=1.0), r"epsilon_t must lie in \(0, 1\); got 1.0"),
    "flow distribution": (lambda: FlowMatching("beta"), "'uniform' or 'logit_normal'; got 'beta'"),
    "flow logit_std": (lambda: FlowMatching(logit_std=0.0), "logit_std must be positive"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_parameters_are_refused(case):
    make, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("process", [row[0] for row in CONTINUOUS.values()])
def test_processes_are_frozen_values(process):
    assert isinstance(process, NoiseProcess)
    assert process == dataclasses.replace(process) and hash(process) == hash(dataclasses.replace(process))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(process, dataclasses.fields(process)[0].name, 1.0)


# ---- every process with every prediction type


def every_process():
    """Each with a few of its times."""
    for name, (process, times, _, _) in CONTINUOUS.items():
        yield pytest.param(process, torch.tensor(times[:-1], dtype=torch.float64), id=name)
    for name in SCHEDULERS:
        process = SchedulerProcess(SCHEDULERS[name]())
        yield pytest.param(process, process.timesteps[[0, 7, 20, 35, -2]], id=name)


@pytest.mark.parametrize("prediction_type", [None, *TABLE])
@pytest.mark.parametrize(("process", "t"), list(every_process()))
def test_round_trip(process, t, prediction_type):
    """y -> (x0, noise) to 1e-6 for every process and prediction type, in float64."""
    x0, noise = images(5, 3, 4, 4, dtype=torch.float64), normal(5, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = rows(process.alpha(t), x0), rows(process.sigma(t), x0)
    if prediction_type is None:
        a, b = (rows(c, x0) for c in process.output_coefficients(t))
    else:
        a, b = TABLE[prediction_type](alpha, sigma)
    got = recover_x0_and_noise(a * x0 + b * noise, alpha * x0 + sigma * noise, a, b, alpha, sigma)
    assert worst(got[0], x0) < 1e-6 and worst(got[1], noise) < 1e-6
