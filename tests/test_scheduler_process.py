"""Diffusers' schedulers as forward processes, in their own arithmetic."""

import math

import pytest
import torch
from scipy import stats

from oracles import images, normal, worst
from processes import SCHEDULERS
from stf_diffusers import EDM, NoiseProcess, SchedulerProcess
from stf_diffusers.forward_process import expand_as_rows

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Diffusers' own, of NumPy


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


INTEGER_TIMESTEPS = [name for name in SCHEDULERS if name.startswith(("dd", "pndm", "dpm"))]


@pytest.mark.parametrize("name", INTEGER_TIMESTEPS)
def test_between_the_timesteps(name):
    """The table at the timesteps, bit for bit; ln(sigma / alpha) linear between them, and its inverse; unit variance."""
    scheduler = SCHEDULERS[name]()
    strict, process = SchedulerProcess(scheduler), SchedulerProcess(scheduler, interpolate=True)
    t = strict.timesteps.double()
    for table in ("alpha", "sigma"):
        assert torch.equal(getattr(process, table)(t), getattr(strict, table)(t).double())
    low, high = process.sampling_range()
    ratio = torch.logspace(math.log10(low), math.log10(high), 200, dtype=torch.float64).clamp(low, high)
    t = process.time_of(ratio)
    assert ((t[1:] > t[:-1]) & (t[1:] <= process.last_time)).all() and t[0] == 0
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(sigma / alpha, ratio, rtol=2e-6, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=2e-6, atol=0)
    if not scheduler.config.get("rescale_betas_zero_snr"):
        middle = torch.tensor([9.5, 30.25], dtype=torch.float64)
        known = (
            (strict.sigma(torch.tensor([9, 10, 30, 31])) / strict.alpha(torch.tensor([9, 10, 30, 31]))).double().log()
        )
        expected = torch.stack([known[:2].mean(), known[2] * 0.75 + known[3] * 0.25]).exp()
        torch.testing.assert_close(process.sigma(middle) / process.alpha(middle), expected, rtol=1e-6, atol=0)


def test_what_cannot_be_interpolated():
    process = SchedulerProcess(diffusers.DDPMScheduler(), interpolate=True)
    with pytest.raises(ValueError, match=r"are not those of DDPMScheduler, whose network knows 0\.01 to 157\.4"):
        process.time_of(torch.tensor([0.001], dtype=torch.float64))
    with pytest.raises(ValueError, match="are not among the 1000 training timesteps"):
        process.alpha(torch.tensor([999.5], dtype=torch.float64))
    with pytest.raises(TypeError, match=r"solver='scheduler'\), pass interpolate=True"):
        SchedulerProcess(diffusers.DDPMScheduler()).time_of(torch.ones(1))
    with pytest.raises(TypeError, match="EulerDiscreteScheduler has no integer timesteps to interpolate between"):
        SchedulerProcess(diffusers.EulerDiscreteScheduler(), interpolate=True)
    with pytest.raises(TypeError, match="EulerDiscreteScheduler has no integer timesteps"):
        SchedulerProcess(diffusers.EulerDiscreteScheduler()).integer_times()


def test_flow_sigmas_are_refused():
    """Solvers that sample flow-matching models keep the table of another process."""
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction")
        with pytest.raises(TypeError, match=f"{name} with use_flow_sigmas.*FlowMatchEulerDiscreteScheduler"):
            SchedulerProcess(scheduler)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DDPM", "EulerDiscrete"])
def test_flow_predictions_without_flow_sigmas_are_refused(name):
    """DPM-Solver takes that prediction for flow sigmas alone; the table of any of these is a diffusion process's."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"keeps the noise of a diffusion process.*FlowMatchEulerDiscreteScheduler"):
        SchedulerProcess(scheduler)


def test_flow_maps_are_refused():
    scheduler = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)
    if scheduler is None:
        pytest.skip("this Diffusers has no flow maps")
    with pytest.raises(
        TypeError, match=r"samples flow maps, whose networks see two times.*stf_diffusers\.FlowMatching"
    ):
        SchedulerProcess(scheduler())


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        SchedulerProcess(diffusers.DDPMScheduler(prediction_type="x1"))
    with pytest.raises(ValueError, match="preconditions 'epsilon' or 'v_prediction'; got 'sample'"):
        SchedulerProcess(diffusers.EDMDPMSolverMultistepScheduler(prediction_type="sample"))


def test_repr_names_the_scheduler():
    assert repr(SchedulerProcess(SCHEDULERS["ddpm"]())) == "SchedulerProcess(DDPMScheduler, prediction_type='epsilon')"
