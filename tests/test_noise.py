"""Forward processes: the rows of the design's table, and Diffusers' schedulers in their own arithmetic."""

import dataclasses
import math
from decimal import Decimal, localcontext

import pytest
import torch
from scipy import stats

from oracles import TABLE, images, normal, rows, worst
from stf_diffusers import EDM, VE, VP, FlowMatching, NoiseProcess, SchedulerProcess
from stf_diffusers.noise import expand_as_rows
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


SCHEDULERS = {
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddpm sample": lambda: diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False),
    "ddpm v zero-snr": lambda: diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "ddpm cosine": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddpm scaled": lambda: diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "ddpm short": lambda: diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction"),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "ddim v": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "pndm": lambda: diffusers.PNDMScheduler(),
    "dpm-solver": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm-solver karras": lambda: diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True, prediction_type="v_prediction"
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler v": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    "euler v zero-snr": lambda: diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "edm v": lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "edm dpm-solver": lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.7, sigma_max=20.0),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    return SCHEDULERS[request.param]()


def training_timesteps(scheduler):
    """The table of a fresh scheduler, ascending: integers for the schedulers that index alphas_cumprod with them."""
    if hasattr(scheduler, "alphas_cumprod") and scheduler.init_noise_sigma == 1:
        return torch.arange(len(scheduler.alphas_cumprod))
    return scheduler.timesteps.flip(0)


def some_timesteps(scheduler):
    """Nine of the table, both ends included."""
    table = training_timesteps(scheduler)
    return table[torch.linspace(0, len(table) - 1, 9).long()]


def test_sampled_timesteps_are_uniform_over_the_table(scheduler):
    """Chi-square over 25 equal bins of the training table: p > 0.001. All draws can be noised."""
    process = SchedulerProcess(scheduler)
    t = process.sample_t(25_000, torch.Generator().manual_seed(0))
    assert t.dtype == process.timesteps.dtype and torch.isin(t, process.timesteps).all()
    assert (process.sigma(t) > 0).all()
    rank = torch.searchsorted(process.timesteps, t)
    size = len(process.timesteps)
    counts = (rank * 25 // size).bincount(minlength=25)
    expected = (torch.arange(size) * 25 // size).bincount(minlength=25).double() * 25_000 / size
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


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


# ---- Diffusers' schedulers


def test_forward_process_is_the_schedulers_own(scheduler):
    """add_noise / scale_noise of the fresh scheduler, in float32, bit for bit."""
    t = some_timesteps(scheduler)
    x0, noise = images(9, 3, 4, 9), normal(9, 3, 4, 9)
    got = SchedulerProcess(scheduler).add_noise(x0, noise, t)
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        # Before set_timesteps its add_noise takes the noise levels in reverse; it uses 1 / sqrt(1 + sigma^2) for alpha.
        scheduler.set_timesteps(9)
        t = scheduler.timesteps
        got = SchedulerProcess(scheduler).add_noise(x0, noise, t)
        if not scheduler.config.use_karras_sigmas:
            torch.testing.assert_close(got, scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
        scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)  # the same process, and the one to train with
    if hasattr(scheduler, "scale_noise"):
        assert torch.equal(got, scheduler.scale_noise(x0, t, noise))
    else:
        assert torch.equal(got, scheduler.add_noise(x0, noise, t))


def test_whole_training_table_is_covered(scheduler):
    process = SchedulerProcess(scheduler)
    assert torch.equal(process.timesteps, training_timesteps(scheduler))
    assert process.alpha(process.timesteps).dtype == process.sigma(process.timesteps).dtype == torch.float32


def test_network_input_is_the_schedulers_own(scheduler):
    """scale_model_input (EDM: precondition_inputs), and the timestep itself."""
    process = SchedulerProcess(scheduler)
    sample = normal(9, 3, 4, 4)
    for t, x in zip(some_timesteps(scheduler), sample, strict=True):
        if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            expected = x  # flow networks see x_t itself
        else:
            scheduler._step_index = None
            expected = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(process.input_scale(t[None]) * x, expected, rtol=1e-6, atol=1e-7)
    t = some_timesteps(scheduler)
    assert process.timestep(t) is t or torch.equal(process.timestep(t), t)


def denoised_by(scheduler, y, noisy, t):
    """What the scheduler itself takes the network output y for: its estimate of x0."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return noisy - scheduler.sigmas[scheduler.index_for_timestep(t)] * y
    if hasattr(scheduler, "precondition_outputs"):
        return scheduler.precondition_outputs(noisy, y, scheduler.sigmas[scheduler.index_for_timestep(t)])
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler.sigmas, scheduler._step_index = (1 / scheduler.alphas_cumprod - 1).sqrt(), int(t)
        return scheduler.convert_model_output(y, sample=noisy)
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler):
        scheduler._step_index = None
        scheduler.is_scale_input_called = True
        return scheduler.step(y, t, noisy).pred_original_sample
    if isinstance(scheduler, diffusers.PNDMScheduler):
        alpha = scheduler.alphas_cumprod[int(t)] ** 0.5
        return (noisy - (1 - scheduler.alphas_cumprod[int(t)]) ** 0.5 * y) / alpha
    plain = type(scheduler).from_config(scheduler.config, clip_sample=False)
    plain.set_timesteps(len(scheduler.timesteps))
    return plain.step(y, int(t), noisy).pred_original_sample


def test_network_output_is_the_schedulers_own(scheduler):
    """a x0 + b noise is what the scheduler's own step reads as x0."""
    process = SchedulerProcess(scheduler)
    t = some_timesteps(scheduler)[:-1]  # at the last of a zero-SNR schedule x_t says nothing of x0
    x0, noise = images(8, 3, 4, 4), normal(8, 3, 4, 4)
    noisy = process.add_noise(x0, noise, t)
    a, b = (expand_as_rows(c.float(), x0) for c in process.output_coefficients(t))
    y = a * x0 + b * noise
    for i in range(len(t)):
        ratio = (process.sigma(t) / process.alpha(t))[i].item()
        error = worst(denoised_by(scheduler, y[i], noisy[i], t[i]), x0[i])
        assert error < 3e-6 * (1 + ratio), (t[i], error)


def test_sampling_timesteps_change_nothing(scheduler):
    """The training tables are used, whatever set_timesteps has put in their place; the scheduler is left alone."""
    fresh = SchedulerProcess(scheduler)
    scheduler.set_timesteps(10)
    kept = scheduler.timesteps.clone()
    used = SchedulerProcess(scheduler)
    assert torch.equal(used.timesteps, fresh.timesteps)
    for table in (NoiseProcess.alpha, NoiseProcess.sigma):
        method = table.__name__
        assert torch.equal(getattr(used, method)(used.timesteps), getattr(fresh, method)(fresh.timesteps))
    assert torch.equal(scheduler.timesteps, kept) and len(kept) < len(fresh.timesteps)


def test_timesteps_outside_the_table_raise(scheduler):
    process = SchedulerProcess(scheduler)
    table = process.timesteps
    outside = [table[-1] + 1, table[0] - 1, (table[3] + table[4]).double() / 2, torch.tensor(float("nan"))]
    for t in outside:
        with pytest.raises(ValueError, match=r"are not among the \d+ training timesteps.*SchedulerProcess.sample_t"):
            process.sigma(t[None].double())
    # A float32 rounding away is the same timestep.
    assert torch.equal(process.sigma(table.double() * (1 + 1e-7)), process.sigma(table))


@pytest.mark.parametrize(
    "thing", [object(), None, 3, diffusers.DDPMScheduler, EDM()], ids=lambda thing: type(thing).__name__
)
def test_not_a_scheduler(thing):
    with pytest.raises(TypeError, match="needs a Diffusers scheduler; got"):
        SchedulerProcess(thing)


def test_schedulers_without_a_known_forward_process():
    for name in ("ScoreSdeVeScheduler", "IPNDMScheduler", "CMStochasticIterativeScheduler"):
        with pytest.raises(
            TypeError, match=f"{name} has no forward process.*Use the scheduler that the training script"
        ):
            SchedulerProcess(getattr(diffusers, name)())
    with pytest.raises(
        ValueError, match=r"does not grow with its timesteps.*training counterpart, for instance DDPMScheduler"
    ):
        SchedulerProcess(diffusers.KDPM2DiscreteScheduler())


def test_flow_sigmas_are_refused():
    """Solvers that sample flow-matching models keep the table of another process."""
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction")
        with pytest.raises(TypeError, match=f"{name} with use_flow_sigmas.*FlowMatchEulerDiscreteScheduler"):
            SchedulerProcess(scheduler)


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        SchedulerProcess(diffusers.DDPMScheduler(prediction_type="x1"))
    with pytest.raises(ValueError, match="preconditions 'epsilon' or 'v_prediction'; got 'sample'"):
        SchedulerProcess(diffusers.EDMDPMSolverMultistepScheduler(prediction_type="sample"))


def test_repr_names_the_scheduler():
    assert repr(SchedulerProcess(SCHEDULERS["ddpm"]())) == "SchedulerProcess(DDPMScheduler, prediction_type='epsilon')"


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
