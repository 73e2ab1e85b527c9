"""The forward process of a Diffusers scheduler."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .forward_process import NoiseProcess
from .noise_distribution import NoiseDistribution, Piecewise
from .prediction import edm_preconditioning, prediction_coefficients, raw_output_coefficients, vp_preconditioning


class _TrainingTable(NamedTuple):
    """A scheduler's coefficients at its training timesteps, and its family: how it adds noise and takes the input."""

    family: Literal["alphas_cumprod", "sigmas", "edm", "flow"]
    timesteps: Tensor
    alphas: Tensor
    sigmas: Tensor


def _training_table(scheduler: Any, fresh: Any) -> _TrainingTable | None:
    """What the tables of `scheduler` and of a `fresh` copy tell; None for a scheduler of none of the families."""
    if hasattr(fresh, "alphas_cumprod") and fresh.init_noise_sigma == 1:
        cumulative = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32, device="cpu")
        # The scheduler's own expressions, so that alpha and sigma agree with its add_noise to the last bit.
        timesteps = torch.arange(len(cumulative), device="cpu")
        return _TrainingTable("alphas_cumprod", timesteps, cumulative**0.5, (1 - cumulative) ** 0.5)
    if getattr(fresh, "timesteps", None) is None or getattr(fresh, "sigmas", None) is None:
        return None
    timesteps = torch.as_tensor(fresh.timesteps, device="cpu")
    sigmas = torch.as_tensor(fresh.sigmas, device="cpu")[: len(timesteps)].to(torch.float32)
    if hasattr(fresh, "scale_noise"):
        return _TrainingTable("flow", timesteps, 1.0 - sigmas, sigmas)
    if hasattr(fresh, "precondition_outputs"):
        return _TrainingTable("edm", timesteps, torch.ones_like(sigmas), sigmas)
    if hasattr(fresh, "alphas_cumprod"):
        return _TrainingTable("sigmas", timesteps, torch.ones_like(sigmas), sigmas)
    return None


def _velocity_is_backward(fresh: Any, table: _TrainingTable, prediction_type: str) -> bool:
    """Whether `get_velocity` takes another alpha than belongs to a timestep, for a scheduler that predicts velocities."""
    if table.family != "sigmas" or prediction_type != "v_prediction" or not hasattr(fresh, "get_velocity"):
        return False
    first = table.timesteps[-1:].to(torch.float32)
    own = fresh.get_velocity(torch.zeros(1, device="cpu"), torch.ones(1, device="cpu"), first)
    return not torch.allclose(own, (1 + table.sigmas[-1:] ** 2).rsqrt(), rtol=1e-3)


class SchedulerProcess(NoiseProcess):
    """The forward process of a Diffusers scheduler, at its training timesteps, in the scheduler's own arithmetic.

    Three families are told apart by how the scheduler adds noise: by `alphas_cumprod` (DDPM, DDIM, DPM-Solver, ...),
    by `sigmas` alone (Euler, LMS, Heun, EDM), or by interpolation (flow matching). What the network sees and returns
    is what Diffusers' training scripts use with it.

    The multistep solvers of the first family (DPM-Solver, DEIS, UniPC) read their noise table backwards in `add_noise`
    until `set_timesteps` is called (`add_noise_is_backward`). Here they have the process that they sample. So does
    `EulerDiscreteScheduler`, whose `get_velocity` reads its table backwards (`velocity_is_backward`).

    Args:
        scheduler: an instance of a Diffusers scheduler. It is read, not changed; timesteps set for sampling on it do
            not matter.
        interpolate: also times between the timesteps, as solvers need: ln(sigma / alpha) is linear between them. For the
            first family. In training, a time that is not a timestep is a mistake, and raises ValueError without this.

    Raises:
        TypeError: the scheduler belongs to none of the families, is one of flow maps, or cannot be interpolated.
        ValueError: its `prediction_type` is unknown or of another process (flow_prediction without flow sigmas), or its
            tables do not describe growing noise.
    """

    def __init__(self, scheduler: Any, *, interpolate: bool = False) -> None:
        config = getattr(scheduler, "config", None)
        if config is None or not hasattr(scheduler, "timesteps"):
            raise TypeError(f"SchedulerProcess needs a Diffusers scheduler; got {type(scheduler).__name__}.")
        # A fresh copy: set_timesteps() replaces the training tables by those of a sampling run.
        with torch.device("cpu"):  # a default device is not where its tables are made
            fresh = type(scheduler).from_config(config)
        self.scheduler, self.scheduler_name = fresh, type(scheduler).__name__
        self.interpolate = interpolate
        self.prediction_type = config.get("prediction_type", "epsilon")
        self.sigma_data: float = config.get("sigma_data", 0.5)
        self.add_noise_is_backward = False
        if config.get("use_flow_sigmas"):
            raise TypeError(
                f"{self.scheduler_name} with use_flow_sigmas samples flow-matching models; it has no table to train on. "
                "Use FlowMatchEulerDiscreteScheduler, or stf_diffusers.FlowMatching."
            )
        found = _training_table(scheduler, fresh)
        if found is None:
            raise TypeError(
                f"{self.scheduler_name} has no forward process that SchedulerProcess knows. Use the scheduler that the "
                "training script calls add_noise on, for instance DDPMScheduler.from_config(scheduler.config)."
            )
        self.family, timesteps, alphas, sigmas = found
        if self.family == "alphas_cumprod":
            self.scheduler_family, self.last_time = self.family, float(len(timesteps) - 1)
        elif interpolate:
            raise TypeError(
                f"{self.scheduler_name} has no integer timesteps to interpolate between. Leave interpolate out, or describe "
                "the process as EDM, VE, VP or FlowMatching."
            )
        if self.family == "flow":
            if "r_timestep" in inspect.signature(fresh.step).parameters:
                raise TypeError(
                    f"{self.scheduler_name} samples flow maps, whose networks see two times and are not trained on a target "
                    "of one. Use FlowMatchEulerDiscreteScheduler, or stf_diffusers.FlowMatching."
                )
            self.prediction_type = "flow_prediction"
        if self.family == "alphas_cumprod" and hasattr(fresh, "index_for_timestep"):
            own = fresh.add_noise(torch.zeros(1, device="cpu"), torch.ones(1, device="cpu"), timesteps[-1:])
            self.add_noise_is_backward = not torch.allclose(own, sigmas[-1:])
        self.velocity_is_backward = _velocity_is_backward(fresh, found, self.prediction_type)
        if self.family in ("alphas_cumprod", "sigmas"):
            if self.prediction_type == "flow_prediction":
                raise ValueError(
                    f"{self.scheduler_name} with prediction_type='flow_prediction' keeps the noise of a diffusion process, "
                    "which flow matching does not have. Use FlowMatchEulerDiscreteScheduler, or "
                    "stf_diffusers.FlowMatching; for this prediction on this noise pass prediction_type= to the objective."
                )
            prediction_coefficients(self.prediction_type, alphas, sigmas)  # an unknown type is an error here
        elif self.family == "edm" and self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{self.scheduler_name} preconditions 'epsilon' or 'v_prediction'; got {self.prediction_type!r}."
            )
        order = timesteps.argsort(stable=True)
        timesteps, alphas, sigmas = timesteps[order], alphas[order], sigmas[order]
        keep = torch.ones_like(timesteps, dtype=torch.bool)
        keep[1:] = timesteps[1:] != timesteps[:-1]
        self._timesteps, self._alphas, self._sigmas = timesteps[keep], alphas[keep], sigmas[keep]
        ratio = self._sigmas.double() / self._alphas.double()
        # The last entry may fall back: EulerDiscreteScheduler caps the infinite noise of a zero terminal SNR.
        if not bool((ratio[1:-1] > ratio[:-2]).all()):
            raise ValueError(
                f"the noise of this {self.scheduler_name} does not grow with its timesteps, so it cannot be trained on. "
                "Use its training counterpart, for instance DDPMScheduler.from_config(scheduler.config)."
            )
        self._log_ratios = ratio.log()
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    def __repr__(self) -> str:
        return f"SchedulerProcess({self.scheduler_name}, prediction_type={self.prediction_type!r})"

    @property
    def timesteps(self) -> Tensor:
        """The training timesteps, ascending: integers for most schedulers, floating point for EDM and flow ones."""
        return self._timesteps

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Timesteps, alphas, sigmas and ln(sigma / alpha) on `device`, copied there once: a copy waits for the device."""
        if device not in self._tables:
            tables = (self._timesteps, self._alphas, self._sigmas, self._log_ratios)
            self._tables[device] = tuple(table.to(device) for table in tables)
        return self._tables[device]

    def _lookup(self, which: int, t: Tensor) -> Tensor:
        """Entries of a table at timesteps t; on the CPU a timestep that is not in the schedule raises ValueError."""
        tables = self._on(t.device)
        values, wanted = tables[0].to(torch.float64), t.to(torch.float64)
        right = torch.searchsorted(values, wanted).clamp_(max=len(values) - 1)
        left = (right - 1).clamp_(min=0)
        index = torch.where((wanted - values[left]).abs() < (values[right] - wanted).abs(), left, right)
        # Elsewhere than on the CPU the check would wait for the device.
        if t.device.type == "cpu":
            inside = (values[index] - wanted).abs() <= 1e-5 * wanted.abs() + 1e-6
            if self.interpolate:
                inside |= (wanted >= values[0]) & (wanted <= values[-1])
            if not bool(inside.all()):
                raise ValueError(
                    f"timesteps {t[~inside].tolist()[:4]} are not among the {len(values)} training timesteps of "
                    f"{self.scheduler_name} ({values[0].item():g} to {values[-1].item():g}). Draw them with "
                    "SchedulerProcess.sample_t, or from `scheduler.timesteps` before set_timesteps(), in float32."
                )
        if not self.interpolate:
            return tables[which][index]
        ratio = torch.lerp(tables[3][left], tables[3][right], (wanted - left).clamp(0, 1)).exp()
        between = (1 + ratio**2).rsqrt() * (1 if which == 1 else ratio)
        return torch.where(values[index] == wanted, tables[which][index], between)

    def alpha(self, t: Tensor) -> Tensor:
        return self._lookup(1, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._lookup(2, t)

    def sample_t(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        distribution: NoiseDistribution | None = None,
    ) -> Tensor:
        """Training timesteps drawn uniformly, or from a distribution of noise levels, in the scheduler's dtype."""
        if distribution is not None:
            return self.times_from(distribution, batch_size, generator, device)
        source = generator.device if generator is not None else device
        index = torch.randint(len(self._timesteps), (batch_size,), generator=generator, device=source)
        return self._on(index.device)[0][index].to(device or source)

    def time_of(self, ratio: Tensor) -> Tensor:
        if not self.interpolate:
            raise TypeError(
                f"{self.scheduler_name} has noise levels at its training timesteps alone, and a solver needs those between. "
                "Sample with a Diffusers scheduler (STFPipeline: solver='scheduler'), pass interpolate=True, or describe the "
                "process as EDM, VE, VP or FlowMatching."
            )
        levels, wanted = self._on(ratio.device)[3], ratio.to(torch.float64).log()
        if ratio.device.type == "cpu":
            low, high = self.sampling_range()
            outside = (ratio < low * (1 - 1e-5)) | (ratio > high * (1 + 1e-5))
            if bool(outside.any()):
                raise ValueError(
                    f"noise levels {ratio[outside].tolist()[:4]} are not those of {self.scheduler_name}, whose network "
                    f"knows {low:.4g} to {high:.4g}. Stay between them."
                )
        right = torch.searchsorted(levels, wanted).clamp_(1, len(levels) - 1)
        return right - 1 + ((wanted - levels[right - 1]) / (levels[right] - levels[right - 1])).clamp(0, 1)

    def times_at(self, levels: Tensor) -> Tensor:
        timesteps, _, _, log_ratios = self._on(levels.device)
        between = (log_ratios[:-1] + log_ratios[1:]) / 2
        return timesteps[torch.searchsorted(between, levels.to(torch.float64).log())]

    def level_cells(self) -> Tensor:
        levels = self._log_ratios[self._log_ratios.isfinite()]  # a zero terminal SNR is left out
        if bool((levels.diff() <= 0).any()):
            raise ValueError(
                f"the noise levels of {self.scheduler_name} do not increase with its timesteps: with rescale_betas_zero_snr "
                f"Diffusers sets the last to {levels[-1].exp():.4g}. Train at its own timesteps, without noise_distribution= and "
                "validation_split=."
            )
        halves = levels.diff() / 2 if len(levels) > 1 else torch.ones_like(levels)
        return torch.cat([levels[:1] - halves[:1], levels[:-1] + levels.diff() / 2, levels[-1:] + halves[-1:]]).exp()

    def level_distribution(self) -> NoiseDistribution:
        cells = self.level_cells()
        if len(cells) <= len(self._timesteps):
            raise TypeError(
                f"the last timestep of {self.scheduler_name} is pure noise, of no finite level (rescale_betas_zero_snr), so that "
                "its timesteps have no distribution of noise levels, from which noise_distribution='adaptive' starts. Leave it "
                "out, or pass noise_mean= and noise_std= with it, which draw finite levels alone."
            )
        return Piecewise(tuple(cells.tolist()), (1.0,) * (len(cells) - 1))

    def training_range(self) -> tuple[float, float]:
        cells = self.level_cells()
        return float(cells[0]), float(cells[-1])

    def integer_times(self) -> Tensor:
        if self.family != "alphas_cumprod":
            raise TypeError(f"{self.scheduler_name} has no integer timesteps.")
        return self._timesteps.to(torch.float64)

    def sampling_range(self) -> tuple[float, float]:
        levels = self._log_ratios[self._log_ratios.isfinite()].exp()  # a zero terminal SNR is left out
        return float(levels[0]), float(levels[-1])

    def input_scale(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        if self.family == "edm":
            return edm_preconditioning(sigma, self.sigma_data).c_in
        return vp_preconditioning(sigma).c_in if self.family == "sigmas" else torch.ones_like(sigma)

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def output_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha(t).to(torch.float64), self.sigma(t).to(torch.float64)
        if self.family == "edm":
            a, b = raw_output_coefficients(edm_preconditioning(sigma, self.sigma_data), sigma)
            # Diffusers' EDM schedulers flip the sign of c_out for v_prediction.
            return (-a, -b) if self.prediction_type == "v_prediction" else (a, b)
        if self.family == "sigmas" and self.prediction_type == "v_prediction":
            # The velocity belongs to the unit-variance sample that the network sees, x_t / sqrt(1 + sigma^2).
            scale = vp_preconditioning(sigma).c_in
            alpha, sigma = scale * alpha, scale * sigma
        return prediction_coefficients(self.prediction_type, alpha, sigma)
