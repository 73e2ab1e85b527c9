"""The forward processes that the package knows: EDM, VE, VP, flow matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .forward_process import Device, Generator, Levels, NoiseProcess, UniformTime, parameter
from .noise_distribution import LogNormal, NoiseDistribution, Piecewise
from .prediction import (
    edm_preconditioning,
    prediction_coefficients,
    raw_output_coefficients,
    ve_preconditioning,
    vp_preconditioning,
)

# VP networks have seen next to no times below this one: Song et al. 2021 (arXiv 2011.13456), appendix C.
_VP_FIRST_TIME = 1e-3


def _rand(batch_size: int, generator: Generator, device: Device, normal: bool = False) -> Tensor:
    # A generator draws on its own device, so that one seed gives the same times whatever the training device.
    draw = torch.randn if normal else torch.rand
    source = generator.device if generator is not None else device
    return draw(batch_size, generator=generator, device=source, dtype=torch.float32).to(device or source)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class EDM(NoiseProcess):
    """Karras et al. 2022 (arXiv 2206.00364): t is the noise level, ln t is normal, the network is preconditioned.

    Args:
        sigma_data: standard deviation of the data in [-1, 1].
        p_mean, p_std: mean and standard deviation of ln t in training.
    """

    sigma_data: float = parameter(0.5, "standard deviation of the data in [-1, 1]", above=0)
    p_mean: float = parameter(-1.2, "mean of ln(sigma) in training", at_least=-20, at_most=20)
    p_std: float = parameter(1.2, "standard deviation of ln(sigma) in training", above=0, at_most=10)

    scheduler_family = "edm"

    def __post_init__(self) -> None:
        _require(
            self.sigma_data > 0, f"sigma_data must be positive; got {self.sigma_data}. Images in [-1, 1] have 0.5."
        )
        _require(self.p_std > 0, f"p_std must be positive; got {self.p_std}. Karras et al. use 1.2.")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sample_t(
        self, batch_size: int, generator: Generator = None, device: Device = None, distribution: Levels = None
    ) -> Tensor:
        if distribution is not None:
            return self.times_from(distribution, batch_size, generator, device)
        return (self.p_mean + self.p_std * _rand(batch_size, generator, device, normal=True)).exp()

    def level_distribution(self) -> NoiseDistribution:
        return LogNormal(self.p_mean, self.p_std)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio

    def training_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def input_scale(self, t: Tensor) -> Tensor:
        return edm_preconditioning(t, self.sigma_data).c_in

    def timestep(self, t: Tensor) -> Tensor:
        return edm_preconditioning(t, self.sigma_data).c_noise

    def output_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return raw_output_coefficients(edm_preconditioning(t, self.sigma_data), t)


@dataclass(frozen=True)
class VE(NoiseProcess):
    """Song et al. 2021 (arXiv 2011.13456), variance exploding: t is the noise level, log-uniform; predicts the noise.

    The network sees x_t / sqrt(1 + t^2) and the position of ln t between the extremes, from 0 to 999.

    Args:
        sigma_min, sigma_max: extremes of the noise level, for images in [-1, 1].
    """

    sigma_min: float = parameter(0.02, "smallest noise level", above=0)
    sigma_max: float = parameter(100.0, "largest noise level", above=0)

    scheduler_family = "alphas_cumprod"

    def __post_init__(self) -> None:
        _require(
            0 < self.sigma_min < self.sigma_max,
            f"VE needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}.",
        )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sample_t(
        self, batch_size: int, generator: Generator = None, device: Device = None, distribution: Levels = None
    ) -> Tensor:
        if distribution is not None:
            return self.times_from(distribution, batch_size, generator, device)
        span = math.log(self.sigma_max / self.sigma_min)
        return self.sigma_min * (span * _rand(batch_size, generator, device)).exp()

    def level_distribution(self) -> NoiseDistribution:
        return Piecewise.log_uniform(self.sigma_min, self.sigma_max)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio

    def input_scale(self, t: Tensor) -> Tensor:
        return vp_preconditioning(t).c_in

    def timestep(self, t: Tensor) -> Tensor:
        return 999 * (t / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def integer_times(self) -> Tensor:
        return torch.logspace(
            math.log10(self.sigma_min), math.log10(self.sigma_max), 1000, dtype=torch.float64, device="cpu"
        )

    def sampling_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def output_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # The noise; the output of the column "VE" is minus it.
        a, b = raw_output_coefficients(ve_preconditioning(t), t)
        return -a, -b


@dataclass(frozen=True)
class VP(NoiseProcess):
    """Song et al. 2021 (arXiv 2011.13456), variance preserving, continuous time in (0, 1]; predicts the noise.

    ``alpha(t) = exp(-(beta_d t^2 / 2 + beta_min t) / 2)``, ``sigma^2 = 1 - alpha^2``. The network's timestep is
    1000 t - 1, which at t = (i + 1) / 1000 is the integer i of a thousand-step Diffusers scheduler.

    Args:
        beta_d, beta_min: beta(t) = beta_min + beta_d t.
        epsilon_t: smallest time drawn in training.
    """

    beta_d: float = parameter(19.9, "slope of beta(t)", above=0)
    beta_min: float = parameter(0.1, "beta(0)", at_least=0)
    epsilon_t: float = parameter(1e-5, "smallest training time", above=0, at_most=0.5)

    last_time = 1.0
    scheduler_family = "alphas_cumprod"

    def __post_init__(self) -> None:
        _require(self.beta_d > 0, f"beta_d must be positive; got {self.beta_d}. Song et al. use 19.9.")
        _require(self.beta_min >= 0, f"beta_min must not be negative; got {self.beta_min}. Song et al. use 0.1.")
        _require(0 < self.epsilon_t < 1, f"epsilon_t must lie in (0, 1); got {self.epsilon_t}.")

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_d * t**2 / 2 + self.beta_min * t

    def alpha(self, t: Tensor) -> Tensor:
        return (-self._integral(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        # 1 - alpha^2 would cancel at small t: at t = 1e-5 float32 keeps one digit of it.
        return (-torch.expm1(-self._integral(t))).sqrt()

    def sample_t(
        self, batch_size: int, generator: Generator = None, device: Device = None, distribution: Levels = None
    ) -> Tensor:
        if distribution is not None:
            return self.times_from(distribution, batch_size, generator, device)
        return self.epsilon_t + (1 - self.epsilon_t) * _rand(batch_size, generator, device)

    def level_distribution(self) -> NoiseDistribution:
        return UniformTime(self, self.epsilon_t, self.last_time)

    def time_of(self, ratio: Tensor) -> Tensor:
        # The root of beta_d t^2 / 2 + beta_min t = log(1 + ratio^2), in the form that does not cancel at small t.
        integral = torch.log1p(ratio**2)
        return 2 * integral / ((self.beta_min**2 + 2 * self.beta_d * integral).sqrt() + self.beta_min)

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def timestep(self, t: Tensor) -> Tensor:
        return 1000 * t - 1

    def integer_times(self) -> Tensor:
        return torch.arange(1, 1001, dtype=torch.float64, device="cpu") / 1000

    def _levels(self, first_time: float) -> tuple[float, float]:
        t = torch.tensor([first_time, self.last_time], dtype=torch.float64, device="cpu")
        low, high = (self.sigma(t) / self.alpha(t)).tolist()
        return low, high

    def sampling_range(self) -> tuple[float, float]:
        return self._levels(_VP_FIRST_TIME)

    def training_range(self) -> tuple[float, float]:
        return self._levels(self.epsilon_t)

    def output_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return prediction_coefficients("epsilon", self.alpha(t), self.sigma(t))


@dataclass(frozen=True)
class FlowMatching(NoiseProcess):
    """Lipman et al. 2023 (arXiv 2210.02747) with time reversed, as in Diffusers: x_t = (1 - t) x0 + t noise.

    The network predicts noise - x0.

    Args:
        time_distribution: "uniform", or "logit_normal" (Esser et al. 2024, arXiv 2403.03206, section 3.1).
        logit_mean, logit_std: mean and standard deviation of logit(t), used by "logit_normal" alone.
    """

    time_distribution: Literal["uniform", "logit_normal"] = parameter("uniform", "distribution of training times")
    logit_mean: float = parameter(0.0, "mean of logit(t), for logit-normal times", at_least=-20, at_most=20)
    logit_std: float = parameter(1.0, "standard deviation of logit(t), for logit-normal times", above=0, at_most=10)

    last_time = 1.0
    scheduler_family = "flow"

    def __post_init__(self) -> None:
        _require(
            self.time_distribution in ("uniform", "logit_normal"),
            f"time_distribution must be 'uniform' or 'logit_normal'; got {self.time_distribution!r}.",
        )
        _require(self.logit_std > 0, f"logit_std must be positive; got {self.logit_std}.")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sample_t(
        self, batch_size: int, generator: Generator = None, device: Device = None, distribution: Levels = None
    ) -> Tensor:
        if distribution is not None:
            return self.times_from(distribution, batch_size, generator, device)
        if self.time_distribution == "uniform":
            # rand() is 0 once in 2^24 draws, where there is no noise to predict.
            return _rand(batch_size, generator, device).clamp_(min=2**-25)
        normal = _rand(batch_size, generator, device, normal=True)
        return (self.logit_mean + self.logit_std * normal).sigmoid().clamp_(min=2**-25)

    def level_distribution(self) -> NoiseDistribution:
        if self.time_distribution == "uniform":
            return UniformTime(self, 2.0**-25, 1 - 2.0**-24)
        return LogNormal(self.logit_mean, self.logit_std)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def training_range(self) -> tuple[float, float]:
        # Up to float32's last time before 1, where there is no image.
        return 2.0**-25, 2.0**24

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def timestep(self, t: Tensor) -> Tensor:
        return 1000 * t

    def output_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return prediction_coefficients("flow_prediction", self.alpha(t), self.sigma(t))


# The processes in continuous time that can be trained on, saved and sampled, by the names that they have on a command line
# and in saved folders. The one of integer timesteps, "discrete", is described by a Diffusers scheduler: `SchedulerProcess`.
NOISE_PROCESSES: dict[str, type[Any]] = {"edm": EDM, "ve": VE, "vp": VP, "flow": FlowMatching}
