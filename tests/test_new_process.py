"""A process that the package does not know needs its class and a line in `NOISE_PROCESSES`, and nothing else."""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from scipy import stats

from exact_networks import ExactUNet, small_unet
from stf_diffusers import VP, NoiseProcess, STFPipeline, STFTrainingObjective
from stf_diffusers.export import diffusers_pipeline, process_from_config, process_to_config, save_pipeline
from stf_diffusers.forward_process import parameter
from stf_diffusers.noise import NOISE_PROCESSES
from stf_diffusers.prediction import prediction_coefficients


@dataclass(frozen=True)
class Cosine(NoiseProcess):
    """Cosine and sine of an angle that grows with t, as in Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""

    first: float = parameter(0.008, "Angle at t = 0, of a right one", above=0, at_most=0.1)
    last: float = parameter(0.992, "Angle at t = 1, of a right one", above=0.9, at_most=0.999)

    last_time: ClassVar[float] = 1.0
    scheduler_family: ClassVar[str] = "alphas_cumprod"

    def _angle(self, t):
        return (self.first + (self.last - self.first) * t) * math.pi / 2

    def alpha(self, t):
        return self._angle(t).cos()

    def sigma(self, t):
        return self._angle(t).sin()

    def sample_t(self, batch_size, generator=None, device=None):
        return torch.rand(batch_size, generator=generator, device=device)

    def time_of(self, ratio):
        return (ratio.atan() * 2 / math.pi - self.first) / (self.last - self.first)

    def input_scale(self, t):
        return torch.ones_like(t)

    def timestep(self, t):
        return 999 * t

    def output_coefficients(self, t):
        return prediction_coefficients("epsilon", self.alpha(t), self.sigma(t))

    def integer_times(self):
        return torch.arange(1000, dtype=torch.float64) / 999

    def sampling_range(self):
        return math.tan(self._angle(0)), math.tan(self._angle(1))


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setitem(NOISE_PROCESSES, "cosine", Cosine)


def are_the_points(images, points):
    """Each sample is one of the points; a right sampler fails one time in 10^4."""
    distance = torch.cdist((images.double() * 2 - 1).flatten(1), points.flatten(1))
    nearest, which = distance.min(1)
    counts = torch.bincount(which, minlength=len(points)).numpy()
    return nearest.max() < 2e-3 and stats.chisquare(counts).pvalue > 1e-4


def test_saved_and_sampled_by_diffusers_and_by_all_solvers():
    points = (torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double() * 1.6 - 0.8
    unet = ExactUNet.from_config(small_unet().config).attach("cosine", points)
    stock = diffusers_pipeline(unet, Cosine())
    ours = STFPipeline(stock.unet, stock.scheduler)
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images = stock(400, generator=generator, num_inference_steps=35, output_type="np").images
    assert are_the_points(torch.from_numpy(images).permute(0, 3, 1, 2), points)
    for solver in ("heun", "rk45", "scheduler"):
        assert are_the_points(ours(400, 35, solver=solver, generator=generator, output_type="pt").images, points)


def test_one_folder_two_readers(tmp_path):
    process = Cosine(first=0.02)
    stock = diffusers_pipeline(small_unet(), process, metadata={"steps": 3})
    save_pipeline(stock, tmp_path)
    plain, ours = DiffusionPipeline.from_pretrained(tmp_path), STFPipeline.from_pretrained(tmp_path)
    assert type(plain) is DDPMPipeline and ours.process == process
    results = []
    for pipeline in (stock, plain):
        pipeline.set_progress_bar_config(disable=True)
        call = {"generator": torch.Generator().manual_seed(1), "num_inference_steps": 4, "output_type": "np"}
        results.append(pipeline(**call).images)
    assert np.array_equal(*results)
    ours.save_pretrained(tmp_path / "again")
    assert STFPipeline.from_pretrained(tmp_path / "again").process == process
    with pytest.raises(ValueError, match="would give garbage"):
        STFPipeline(plain.unet, diffusers_pipeline(small_unet(), Cosine(first=0.05)).scheduler)


def test_trained_on():
    process = Cosine()
    objective, clean = STFTrainingObjective(process), torch.rand(8, 1, 4, 4) * 2 - 1
    batch = objective.perturb(clean, reference=clean)
    assert batch.target.isfinite().all() and batch.target.shape == clean.shape
    assert process_from_config(process_to_config(process)) == process
    t = process.integer_times()
    torch.testing.assert_close(process.timestep(t), torch.arange(1000, dtype=torch.float64))
    torch.testing.assert_close(process.time_of(process.sigma(t) / process.alpha(t)), t)


@pytest.mark.parametrize("name", ["edm", "ve", "vp", "flow", "cosine"])
def test_every_parameter_tells_what_a_command_line_needs(name):
    hints = typing.get_type_hints(NOISE_PROCESSES[name])
    for field in dataclasses.fields(NOISE_PROCESSES[name]):
        assert set(field.metadata) == {"help", "above", "at_least", "at_most"} and field.metadata["help"]
        assert hints[field.name] is float or set(typing.get_args(hints[field.name])) == {"uniform", "logit_normal"}


@pytest.mark.parametrize("name", ["ve", "vp", "cosine"])
def test_integer_times_are_the_inverse_of_the_timestep(name):
    process = NOISE_PROCESSES[name]()
    expected = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(process.timestep(process.integer_times()), expected, rtol=1e-9, atol=1e-9)
    low, high = process.sampling_range()
    assert 0 < low < 0.1 < 50 < high


def test_a_process_without_integer_timesteps():
    with pytest.raises(TypeError, match="EDM has no integer timesteps"):
        NOISE_PROCESSES["edm"]().integer_times()


def test_a_process_that_derives_from_another_is_not_saved_as_that(monkeypatch):
    """Its samples would be those of its parent, silently."""

    class Slower(VP):
        def alpha(self, t):
            return super().alpha(t / 2)

    with pytest.raises(TypeError, match="can be saved"):
        process_to_config(Slower())
    monkeypatch.setitem(NOISE_PROCESSES, "slower", Slower)
    assert process_to_config(Slower())["name"] == "slower"
    assert type(process_from_config(process_to_config(Slower()))) is Slower
