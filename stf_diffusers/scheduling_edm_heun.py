"""The stochastic Heun sampler of Karras et al. 2022 (arXiv 2206.00364, Algorithm 2) as a Diffusers scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# Diffusers' loaders look for the name SchedulerMixin in a scheduler's module.
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .forward_process import expand_as_rows
from .prediction import edm_preconditioning
from .solvers import Churn, check_generators, check_noise_levels, karras_sigmas

# Default number of steps, STFPipeline's too: what Karras et al. use for CIFAR-10.
_DEFAULT_STEPS = 18


def _precision(device: torch.device | str | None) -> torch.dtype:
    # Apple's devices have no float64.
    return torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64


def _float64(sigma: float | Tensor) -> Tensor:
    # torch would make a number float32.
    return sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64, device="cpu")


def _falling(sigmas: Sequence[float] | Tensor) -> list[float]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim == 1 and len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    if (
        levels.ndim != 1
        or not len(levels)
        or not bool((levels.diff() < 0).all() and 0 < levels[-1] <= levels[0] < math.inf)
    ):
        raise ValueError(
            f"sigmas must be noise levels that fall, all positive but for a 0 at the end; got {levels.flatten()[:8].tolist()}."
        )
    return levels.tolist()


def _check_no_index(timesteps: Tensor) -> None:
    if not timesteps.is_floating_point():
        raise ValueError(
            f"timestep must be one of scheduler.timesteps, not an index; got {timesteps.tolist()}. Use "
            "scheduler.timesteps[index]."
        )


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """Heun's method with churn for networks in EDM preconditioning, for any loop that `EDMEulerScheduler` serves.

    N steps are 2N - 1 evaluations of the network, so ``set_timesteps(N)`` gives 2N - 1 timesteps: at even positions a
    step starts (a prediction), at odd ones it is corrected, and the last step, to zero noise, is not corrected. Churn
    noise is drawn from the generator passed to `step`, at the end of the step before the one it belongs to, so that it
    is there when the network is called next. Before the very first evaluation no generator is at hand: there the noise
    of Algorithm 2 is folded into the latents, which are scaled to the standard deviation that they would have had with
    it. For normal latents that is the same law. (With Karras et al.'s s_max of 50 and sigma_max of 80 there is none.)

    Sampling starts from ``latents * init_noise_sigma``, which is ``latents * sigmas[0]``. The state between calls is
    kept in float64; the network and the samples returned have the dtype of the sample passed in. A sample that is
    changed between two steps (inpainting, say) continues as changed; between a step's two evaluations a change affects
    the second slope alone. Where sampling starts at an odd position, there is nothing to correct: the sample stays, but
    for the churn of the step that follows.

    Args:
        sigma_min, sigma_max: extremes of the noise level when sampling.
        sigma_data: standard deviation of the data, for the network's preconditioning.
        sigma_schedule: "karras" (eq. 5) or "exponential" (geometric progression).
        num_train_timesteps: length of the tables `timesteps` and `sigmas` before `set_timesteps`.
        prediction_type: "epsilon" for EDM's own preconditioning; "v_prediction" flips the sign of the output, as in
            `EDMEulerScheduler`.
        rho: exponent of the Karras schedule.
        final_sigmas_type: only "zero": the sampler ends without noise.
        s_churn, s_min, s_max, s_noise: the noise added before each step, as in `Churn`. s_max=None: no upper limit.

    Raises:
        ValueError: an unknown option, or extremes or other parameters out of order.
    """

    _compatibles: ClassVar = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
    ) -> None:
        for name, value, known in (
            ("sigma_schedule", sigma_schedule, ("karras", "exponential")),
            ("prediction_type", prediction_type, ("epsilon", "v_prediction")),
            # "sigma_min" would leave noise in the images.
            ("final_sigmas_type", final_sigmas_type, ("zero",)),
        ):
            if value not in known:
                raise ValueError(f"EDMHeunScheduler has {name} {' or '.join(map(repr, known))}; got {value!r}.")
        for name, number in (("sigma_data", sigma_data), ("rho", rho)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {number}.")
        if s_max == math.inf:
            self.register_to_config(s_max=None)  # JSON has no infinity
        self.churn = Churn(s_churn, s_min, math.inf if s_max is None else s_max, s_noise)
        # Until set_timesteps is called: the noise levels of training, as Diffusers' EDM schedulers have them.
        levels = self._noise_levels(num_train_timesteps + 1)
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])
        self.timesteps = self.precondition_noise(self.sigmas[:-1]).to(torch.float32)
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def _noise_levels(self, num_steps: int) -> Tensor:
        config = self.config
        check_noise_levels(num_steps, config.sigma_min, config.sigma_max)
        if config.sigma_schedule == "karras":
            return karras_sigmas(num_steps, config.sigma_min, config.sigma_max, config.rho)
        # The limit of Karras et al.'s eq. 5 for large rho.
        ends = math.log(config.sigma_max), math.log(config.sigma_min)
        return torch.linspace(*ends, num_steps, dtype=torch.float64, device="cpu").exp()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal latents are multiplied by: the highest noise level."""
        return self.sigmas[0].item()

    @property
    def step_index(self) -> int | None:
        """The position in `timesteps` of the next evaluation; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The position to start at, where `set_begin_index` gave one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this position of `timesteps`; without it the position is found from the timestep."""
        if not 0 <= begin_index < len(self.timesteps):
            raise ValueError(f"begin_index must lie in [0, {len(self.timesteps)}); got {begin_index}.")
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Prepare to sample in N steps.

        Sets `timesteps` (2N - 1,), ln(sigma) / 4 at each evaluation in float32, and `sigmas` (2N,), the noise level of
        the sample that goes into each evaluation, and 0. The two agree but at the first position, where `sigmas` has the
        highest level and `timesteps` that after churn.

        Args:
            num_inference_steps: N. Default: 18.
            device: device for `timesteps`.
            sigmas: N falling noise levels instead of the configured ones, with or without a 0 at the end. (Not a ramp
                from 0 to 1, as `EDMEulerScheduler` takes.)

        Raises:
            TypeError: a number of steps that is not an integer.
            ValueError: less than one step, levels that do not fall to 0, or both arguments.
        """
        if sigmas is not None and num_inference_steps is not None:
            raise ValueError("num_inference_steps and sigmas exclude each other: a step starts at each of the sigmas.")
        if sigmas is None:
            num_inference_steps = _DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
            levels = self._noise_levels(num_inference_steps).tolist()
        else:
            levels = _falling(sigmas)
            num_inference_steps = len(levels)
        evaluations = []
        for level in levels:
            evaluations += [level, (1 + self.churn.gamma(level, num_inference_steps)) * level]
        # The level before churn is where the step before is corrected; before the first step there is none.
        self._levels = evaluations[1:]
        self._fold = math.hypot(1.0, self._added_noise(levels[0], self._levels[0]) / levels[0])
        self.sigmas = torch.tensor([levels[0], *self._levels[1:], 0.0], dtype=torch.float64, device="cpu")
        self.timesteps = self.precondition_noise(torch.tensor(self._levels, dtype=torch.float64, device="cpu"))
        self.timesteps = self.timesteps.to(device=device, dtype=torch.float32)
        self.num_inference_steps = num_inference_steps
        self._begin_index = self._step_index = None
        self._rounding: Tensor | float = 0.0
        # State and slope at the start of a step that is not corrected yet.
        self._begun: tuple[Tensor, Tensor] | None = None

    def _added_noise(self, level: float, raised: float) -> float:
        return self.churn.s_noise * math.sqrt(raised**2 - level**2)

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """``c_in x`` (Karras et al. 2022, Table 1)."""
        return edm_preconditioning(_float64(sigma), self.config.sigma_data).c_in * sample

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """``ln(sigma) / 4``: the timestep of a noise level."""
        return edm_preconditioning(_float64(sigma), self.config.sigma_data).c_noise

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: float | Tensor) -> Tensor:
        """``D = c_skip x + c_out F`` for the network's output F."""
        c_skip, c_out, _, _ = edm_preconditioning(_float64(sigma), self.config.sigma_data)
        sign = -1 if self.config.prediction_type == "v_prediction" else 1
        return c_skip * sample + sign * c_out * model_output

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x0 + sigma noise`` for x0, noise (B, ...) and timesteps (B,) or (1,), ln(sigma) / 4.

        Raises:
            ValueError: timesteps that are indices, or whose noise is far from any between sigma_min and sigma_max.
        """
        _check_no_index(timesteps)
        sigma = (4 * timesteps.to(original_samples.device, _precision(original_samples.device))).exp()
        low, high = self.config.sigma_min / 10, 10 * self.config.sigma_max
        if not bool(((sigma >= low) & (sigma <= high)).all()):
            raise ValueError(
                f"timesteps are ln(sigma) / 4, of sigma from {self.config.sigma_min} to {self.config.sigma_max}; got "
                f"{timesteps.flatten()[:8].tolist()}. Use scheduler.timesteps."
            )
        return original_samples + expand_as_rows(sigma.to(original_samples.dtype), original_samples) * noise

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The position in `timesteps` (or `schedule_timesteps`) of one of them: where a step starts, if one does there.

        Raises:
            ValueError: an index, or a timestep that is not one of them.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        timestep = torch.as_tensor(timestep, device=schedule.device)
        _check_no_index(timestep)
        found = (schedule == timestep.to(schedule)).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"timestep {timestep.item():.6g} is not one of scheduler.timesteps.")
        # Without churn, the position where the step before is corrected has an equal timestep.
        return next((position for position in found if position % 2 == 0), found[0])

    def _current_index(self, timestep: float | Tensor) -> int:
        """The position in `timesteps` of this evaluation, found from `timestep` when sampling starts."""
        if self.num_inference_steps is None:
            raise ValueError("the number of steps is not set: call set_timesteps(num_inference_steps) before sampling.")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= len(self._levels):
            raise ValueError("sampling has ended: call set_timesteps(num_inference_steps) before sampling again.")
        return self._step_index

    def _state(self, sample: Tensor, index: int) -> Tensor:
        """`sample` in float64, with what was lost when it was rounded to the caller's dtype."""
        state = sample.to(_precision(sample.device)) + self._rounding
        return self._fold * state if index == 0 else state

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network sees of `sample` at `timestep`: ``c_in x``, in the sample's dtype.

        Before `set_timesteps`, `sample` is a noised image at one of the training timesteps.
        """
        if self.num_inference_steps is None:
            level = self.sigmas[self.index_for_timestep(timestep)]
            return self.precondition_inputs(sample.to(_precision(sample.device)), level.item()).to(sample.dtype)
        index = self._current_index(timestep)
        return self.precondition_inputs(self._state(sample, index), self._levels[index]).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """One evaluation's part of a step: its prediction or its correction, and the churn of the step that follows.

        Args:
            model_output: (B, ...) raw output F of the network for ``scale_model_input(sample, timestep)``.
            timestep: the entry of `timesteps`.
            sample: (B, ...) as the step before returned it; at first the latents times `init_noise_sigma`.
            generator: source of the churn noise, one or a sequence with one for each image. Drawn from only where noise
                is added.
            return_dict: False: a tuple (prev_sample, pred_original_sample).

        Returns:
            `prev_sample` (B, ...), the sample for the next evaluation, and `pred_original_sample` (B, ...), the
            denoised image, both in the dtype of `sample`.

        Raises:
            ValueError: `set_timesteps` was not called, or not since sampling ended; an integer timestep, or none of
                `timesteps`; not one generator for each image.
        """
        check_generators(generator, len(sample))
        index = self._current_index(timestep)
        state, level = self._state(sample, index), self._levels[index]
        denoised = self.precondition_outputs(state, model_output.to(state.dtype), level)
        slope = (state - denoised) / level
        following = self._levels[index + 1] if index + 1 < len(self._levels) else 0.0
        if index % 2 == 0:
            # Algorithm 2, lines 7 and 8.
            self._begun = state, slope
            state = state + (following - level) * slope
        else:
            # Lines 10 and 11, then 4 to 6 of the next step.
            if self._begun is not None:
                start, first = self._begun
                state = start + (level - self._levels[index - 1]) * (first + slope) / 2
                self._begun = None
            added = self._added_noise(level, following)
            if added > 0:
                dtype = torch.promote_types(sample.dtype, torch.float32)
                generators = list(generator) if isinstance(generator, Sequence) else generator
                noise = randn_tensor(tuple(state.shape), generator=generators, device=state.device, dtype=dtype)
                state = state + added * noise
        self._step_index = index + 1
        rounded = state.to(sample.dtype)
        self._rounding = state - rounded
        if not return_dict:
            return rounded, denoised.to(sample.dtype)
        return EDMEulerSchedulerOutput(prev_sample=rounded, pred_original_sample=denoised.to(sample.dtype))
