"""What the rest of the package knows of a forward process ``x_t = alpha(t) x0 + sigma(t) noise``.

A process says what is noised and how (`alpha`, `sigma`, `sample_t`), and what its network sees and returns
(`input_scale`, `timestep`, `output_coefficients`). Training, saving and sampling read this one description.
In Diffusers a "scheduler" is the sampler; here t grows with the noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .noise_distribution import NoiseDistribution

SchedulerFamily = Literal["edm", "alphas_cumprod", "flow"]
Generator: TypeAlias = torch.Generator | None
Device: TypeAlias = torch.device | str | None
Levels: TypeAlias = NoiseDistribution | None

# Extremes of the noise at which EDM networks are sampled (Karras et al. 2022, Table 1).
EDM_SAMPLING_RANGE = (0.002, 80.0)


def expand_as_rows(vector: Tensor, like: Tensor) -> Tensor:
    """A (B,) vector as (B, 1, ..., 1), to multiply the rows of `like` (B, ...)."""
    return vector.reshape(-1, *[1] * (like.ndim - 1))


class NoiseProcess(ABC):
    """What the rest of the package knows of a forward process. All methods take t as (B,) and return (B,).

    A new process is one such class, a frozen dataclass whose fields are made by `parameter`, and one line in
    `NOISE_PROCESSES`: training, saving and sampling take it from there. Other attributes have no annotation.

    Attributes:
        last_time: the largest time.
        scheduler_family: which Diffusers schedulers sample a network trained on it, by what they know of the noise:
            "edm", those that precondition the network as Karras et al. do (the process has a `sigma_data`);
            "alphas_cumprod", those with integer timesteps (`integer_times`), at which the network returns `prediction_type`;
            "flow", those of flow matching. None: none.
    """

    last_time: float = math.inf
    scheduler_family: SchedulerFamily | None = None
    prediction_type: str = "epsilon"
    sigma_data: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of x0 at time t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise at time t."""

    @abstractmethod
    def sample_t(
        self, batch_size: int, generator: Generator = None, device: Device = None, distribution: Levels = None
    ) -> Tensor:
        """(batch_size,) times drawn from the process's own distribution, or `times_from` another; float32 unless said so."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The time at which sigma(t) / alpha(t) is `ratio`, (B,) positive."""

    @abstractmethod
    def input_scale(self, t: Tensor) -> Tensor:
        """What x_t is multiplied by before the network sees it."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What is passed to the network as its timestep."""

    @abstractmethod
    def output_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each (B,): the network's own output is ``a x0 + b noise``."""

    def integer_times(self) -> Tensor:
        """(T,) float64: the times whose `timestep` is 0, 1, ... T - 1, of 1,000 unless the process has its own number.

        For the family "alphas_cumprod".
        """
        raise TypeError(f"{type(self).__name__} has no integer timesteps.")

    def sampling_range(self) -> tuple[float, float]:
        """The extremes of sigma / alpha between which networks are sampled."""
        return EDM_SAMPLING_RANGE

    def training_range(self) -> tuple[float, float]:
        """The extremes of sigma / alpha that the process can be trained at: those it is sampled at, unless it has more."""
        return self.sampling_range()

    def times_from(
        self, distribution: NoiseDistribution, batch_size: int, generator: Generator = None, device: Device = None
    ) -> Tensor:
        """(batch_size,) times whose noise levels follow a distribution, cut off at `training_range`.

        Raises:
            ValueError: next to nothing of the distribution lies in that range.
        """
        low, high = self.training_range()
        levels = distribution.sample(batch_size, low=low, high=high, generator=generator, device=device)
        return self.times_at(levels)

    def times_at(self, levels: Tensor) -> Tensor:
        """Training times (B,) of noise levels sigma / alpha (B,) float64: the nearest, where not all levels have one."""
        return self.time_of(levels).to(torch.float32)

    def level_distribution(self) -> NoiseDistribution:
        """The distribution of ln(sigma / alpha) that `sample_t` draws from, where the process says it.

        Raises:
            TypeError: it does not.
        """
        raise TypeError(
            f"{type(self).__name__} does not say what noise levels its sample_t draws: define level_distribution(), for "
            "instance UniformTime(self, first, last) for times drawn uniformly."
        )

    def level_cells(self) -> Tensor | None:
        """(T + 1,) float64 edges between the levels that `times_at` rounds to; None: every level has a time of its own."""
        return None

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``alpha(t) x0 + sigma(t) noise`` for x0, noise (B, ...) and t (B,)."""
        return expand_as_rows(self.alpha(t), x0) * x0 + expand_as_rows(self.sigma(t), x0) * noise


def parameter(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field of a process, with what a command line needs to know of it, as the field's `metadata`.

    Args:
        default: default value.
        help: what it is, in a few words.
        above, at_least, at_most: the range that makes sense in training, by these names.
    """
    return field(default=default, metadata={"help": help, "above": above, "at_least": at_least, "at_most": at_most})


@dataclass(frozen=True)
class UniformTime(NoiseDistribution):
    """The noise levels of times that are drawn uniformly.

    Args:
        process: the process.
        first, last: the times between which they are drawn, of finite noise levels above 0.
    """

    process: NoiseProcess
    first: float
    last: float

    def _log_level(self, time: Tensor) -> Tensor:
        return (self.process.sigma(time) / self.process.alpha(time)).log()

    def cdf(self, log_level: Tensor) -> Tensor:
        x = log_level.to(torch.float64)
        low, high = self._log_level(x.new_tensor([self.first, self.last])).unbind()
        time = self.process.time_of(x.clamp(low, high).exp())
        return ((time - self.first) / (self.last - self.first)).clamp(0, 1)

    def quantile(self, probability: Tensor) -> Tensor:
        return self._log_level(self.first + probability.to(torch.float64) * (self.last - self.first))

    def log_density(self, log_level: Tensor) -> Tensor:
        with torch.enable_grad():
            x = log_level.detach().to(torch.float64).requires_grad_()
            slope = torch.autograd.grad(self.cdf(x).sum(), x)[0]
        return slope.log()
