"""Consistency tuning: a denoiser becomes a map from any noise level to the data, in one evaluation.

``f(x_t, t)`` is the network's denoiser D. A step compares it with itself at an earlier point of the way to the data. In
Easy Consistency Tuning (Geng et al. 2024, arXiv 2406.14548) that way is the line to the source, here the one to the
posterior mean over the references: an Euler step of the probability-flow ODE of the data set itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward_process import NoiseProcess, expand_as_rows
from .posterior import PosteriorMean, check_tensor
from .precision import without_autocast
from .reference_set import ReferenceSet
from .scheduler_process import SchedulerProcess
from .source_checks import (
    SourceChecks,
    alpha_and_sigma,
    batch_of_images,
    check_noise_and_times,
    check_output,
    standard_normal,
)


@dataclass(frozen=True)
class ConsistencySchedule:
    """How far back the earlier point lies: ``r / t = 1 - q^-(stage + 1) (1 + k sigmoid(-b t))``, at least 0.

    t and r are noise levels sigma / alpha. Geng et al. 2024 (arXiv 2406.14548), section 3; the defaults are theirs. With
    ``k=0`` the ratio is the same at all levels. Where it is 0 the network learns the STF (or DSM) target.

    Args:
        q: above 1; by how much a stage divides what lies between r and t.
        k, b: at levels below 1 / b the earlier point lies up to 1 + k / 2 times as far back.
    """

    q: float = 2.0
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.q) and self.q > 1):
            raise ValueError(f"q must be above 1; got {self.q}. Geng et al. use 2.")
        if not (math.isfinite(self.k) and self.k >= 0 and math.isfinite(self.b) and self.b >= 0):
            raise ValueError(f"k and b must not be negative; got {self.k} and {self.b}.")

    def earlier_level(self, level: Tensor, stage: float) -> Tensor:
        """r for the noise levels t (B,): (B,) in [0, t).

        Raises:
            ValueError: a negative stage, or one at which r and t are next to equal in float32.
        """
        if not 0 <= stage < math.inf or self.q ** -(stage + 1) < 1e-5:
            last = -math.log(1e-5) / math.log(self.q) - 1
            raise ValueError(
                f"stage must lie between 0 and {last:.1f}, the last that float32 tells apart; got {stage}."
            )
        return level * (1 - self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * level))).clamp(min=0)


@dataclass(frozen=True)
class ConsistencyPair:
    """What `ConsistencyTrainingObjective.perturb` returns. B rows throughout.

    `model_input` (B, ...) and `timestep` (B,) go into the network that learns; `earlier_input` and `earlier_timestep`, of
    the same shapes, into the same network without gradient and with the same dropout. `effective_sample_size` (B,) counts
    the references behind each earlier point: 1 means the source's line. The rest is for logging and for losses of your
    own: `noisy` and `earlier` (B, ...), x_t and x_r; their times `t` and `r` (B,); `posterior_mean` and `noise` (B, ...).
    """

    model_input: Tensor
    timestep: Tensor
    earlier_input: Tensor
    earlier_timestep: Tensor
    effective_sample_size: Tensor
    posterior_mean: Tensor
    noisy: Tensor
    earlier: Tensor
    noise: Tensor
    t: Tensor
    r: Tensor


class ConsistencyTrainingObjective:
    """Consistency tuning on the stable target: pairs of points, f at both, and the loss between them.

    ``x_r = alpha_r m + (sigma_r / sigma_t) (x_t - alpha_t m)`` with m the posterior mean over the references; for `EDM`,
    ``m + (r / t) (x_t - m)``. Without references m is the source and x_r is Easy Consistency Tuning's
    ``x0 + r noise``. Given x_t, m is the conditional mean of the source, so x_r is that of the source's earlier point.
    The loss is not linear in x_r: no unbiasedness is claimed for it.

    Args:
        process: `EDM`, `VE`, `VP` or `FlowMatching`.
        schedule: where the earlier point lies.
        p_mean, p_std: mean and standard deviation of ln(sigma / alpha) of the later point; levels at which the process is
            not sampled are drawn as its nearest (EDM is at all levels).
        huber_c: c of the pseudo-Huber loss. None: 0.00054 times the root of the images' number of values, as Song &
            Dhariwal 2024 (arXiv 2310.14189, section 3.3). 0: the distance itself.

    Raises:
        TypeError: `process` is not a NoiseProcess, or has integer timesteps, between which there are no points.
        ValueError: parameters out of range.
    """

    def __init__(
        self,
        process: NoiseProcess,
        *,
        schedule: ConsistencySchedule | None = None,
        p_mean: float = -1.1,
        p_std: float = 2.0,
        huber_c: float | None = None,
    ) -> None:
        if not isinstance(process, NoiseProcess) or isinstance(process, SchedulerProcess):
            raise TypeError(
                f"process must be EDM(), VE(), VP() or FlowMatching(); got {type(process).__name__}. A scheduler with "
                "integer timesteps has no points between them."
            )
        if schedule is not None and not isinstance(schedule, ConsistencySchedule):
            raise TypeError(f"schedule must be a ConsistencySchedule; got {type(schedule).__name__}.")
        if not (math.isfinite(p_mean) and 0 < p_std < math.inf):
            raise ValueError(f"p_mean must be finite and p_std positive; got {p_mean} and {p_std}.")
        if huber_c is not None and not 0 <= huber_c < math.inf:
            raise ValueError(f"huber_c must not be negative; got {huber_c}.")
        self.process = process
        self.schedule = schedule or ConsistencySchedule()
        self.p_mean, self.p_std, self.huber_c = p_mean, p_std, huber_c
        self._sources = SourceChecks()

    def sample_t(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """(batch_size,) float32 times of later points."""
        draw_on = generator.device if generator is not None else device
        normal = torch.randn(batch_size, generator=generator, device=draw_on, dtype=torch.float32).to(device or draw_on)
        level = (self.p_mean + self.p_std * normal.to(torch.float64)).exp()
        if self.process.scheduler_family != "edm":
            level = level.clamp(*self.process.sampling_range())
        return self.process.time_of(level).to(torch.float32)

    @torch.no_grad()
    def perturb(
        self,
        clean: Tensor,
        *,
        reference: Tensor | ReferenceSet | None = None,
        stage: float | None = None,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
        source_index: Tensor | None = None,
        num_unconditional: int | None = None,
        t: Tensor | None = None,
        r: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ConsistencyPair:
        """Draw times and noise, and compute both points of each pair.

        Args:
            clean, reference, labels, reference_labels, source_index, num_unconditional, noise, generator: as for
                `STFTrainingObjective.perturb`. Without references, the points of Easy Consistency Tuning.
            stage: the schedule's, from 0; it rises through the training. Needed unless `r` is given.
            t: (B,) times of the later points. None: drawn, `sample_t`.
            r: (B,) times of the earlier points, from 0 to below t. None: the schedule's.

        Returns:
            `ConsistencyPair`; inputs in the dtype of `clean` (float32 for uint8), points and times in float32 (float64 for
            float64 images).

        Raises:
            ValueError, TypeError: as `STFTrainingObjective.perturb`; neither or both of `stage` and `r`; r not below t.
        """
        x0 = batch_of_images(clean)
        if t is None:
            t = self.sample_t(len(x0), generator=generator, device=x0.device)
        if noise is None:
            noise = standard_normal(x0, generator)
        noise, t = check_noise_and_times(x0, noise, t)
        references = self._sources.references(x0, reference, labels, reference_labels, source_index, num_unconditional)
        t = t.to(x0.dtype)
        with without_autocast(x0.device.type):
            exact_t = t.to(torch.float64)
            alpha_t, sigma_t = alpha_and_sigma(self.process, exact_t)
            if x0.device.type == "cpu" and not bool((alpha_t > 0).all()):
                raise ValueError(f"t must leave some of the image: alpha(t) is 0 at {t[alpha_t <= 0].tolist()[:4]}.")
            r = self._earlier_times(exact_t, sigma_t / alpha_t, stage, r, x0)
            exact_r = r.to(torch.float64)
            alpha_r, sigma_r = self.process.alpha(exact_r), self.process.sigma(exact_r)
            # In float64, since these cancel where r is close to t; 0 at r = t, and alpha_r at r = 0.
            gain = alpha_r - sigma_r * alpha_t / sigma_t

            def rows(vector: Tensor) -> Tensor:
                return expand_as_rows(vector.to(x0.dtype), x0)

            noisy = rows(alpha_t) * x0 + rows(sigma_t) * noise
            earlier = rows(alpha_r) * x0 + rows(sigma_r) * noise
            posterior = PosteriorMean(x0, torch.ones_like(t))
            if references is not None:
                posterior = references.posterior_mean(
                    noisy, alpha_t.to(x0.dtype), sigma_t.to(x0.dtype), source_index=source_index, labels=labels
                )
                earlier = earlier + rows(gain) * (posterior.mean - x0)
            # At r = 0 f is the identity, and what the network makes of the point is left out: any level that it knows.
            lowest = torch.full_like(exact_r, self.process.sampling_range()[0])
            seen_r = torch.where(exact_r > 0, exact_r, self.process.time_of(lowest))
            dtype = clean.dtype if clean.is_floating_point() else torch.float32
            return ConsistencyPair(
                model_input=(rows(self.process.input_scale(exact_t)) * noisy).to(dtype),
                timestep=self.process.timestep(exact_t).to(x0.dtype),
                earlier_input=(rows(self.process.input_scale(seen_r)) * earlier).to(dtype),
                earlier_timestep=self.process.timestep(seen_r).to(x0.dtype),
                effective_sample_size=posterior.effective_sample_size,
                posterior_mean=posterior.mean,
                noisy=noisy,
                earlier=earlier,
                noise=noise,
                t=t,
                r=r,
            )

    def denoise(self, output: Tensor, pair: ConsistencyPair) -> Tensor:
        """f(x_t, t), (B, ...) float32 or better, from the network's output (B, ...) for `model_input`."""
        return self._f(output, pair.noisy, pair.t)

    def earlier(self, output: Tensor, pair: ConsistencyPair) -> Tensor:
        """f(x_r, r), (B, ...) float32 or better, from the network's output (B, ...) for `earlier_input`; x_r where r = 0."""
        return self._f(output, pair.earlier, pair.r)

    def loss(self, output: Tensor, earlier_output: Tensor, pair: ConsistencyPair) -> Tensor:
        """Mean over the batch of ``d(f(x_t, t), f(x_r, r)) / (t - r)``, a float32 scalar; f(x_r, r) gets no gradient.

        d is the pseudo-Huber distance ``sqrt(|u - v|^2 + c^2) - c`` of whole images, and t and r are noise levels
        sigma / alpha.

        Args:
            output: (B, ...) the network's output for `pair.model_input`.
            earlier_output: (B, ...) its output for `pair.earlier_input`.
            pair: as from `perturb`.

        Raises:
            ValueError, TypeError: outputs that are not tensors of the images' shape.
        """
        return self.losses(output, earlier_output, pair).mean()

    def losses(self, output: Tensor, earlier_output: Tensor, pair: ConsistencyPair) -> Tensor:
        """(B,) of which `loss` is the mean."""
        with without_autocast(pair.noisy.device.type):
            difference = (self.denoise(output, pair) - self.earlier(earlier_output, pair).detach()).flatten(1)
            c = 0.00054 * math.sqrt(difference.shape[1]) if self.huber_c is None else self.huber_c
            if c > 0:
                distance = (difference.square().sum(1) + c**2).sqrt() - c
            else:  # whose gradient where both are equal is 0, where that of a root of squares is not a number
                distance = torch.linalg.vector_norm(difference, dim=1)
            return distance / (self._level(pair.t) - self._level(pair.r)).to(distance.dtype)

    def _level(self, t: Tensor) -> Tensor:
        exact = t.to(torch.float64)
        return self.process.sigma(exact) / self.process.alpha(exact)

    def _earlier_times(
        self, exact_t: Tensor, level: Tensor, stage: float | None, r: Tensor | None, x0: Tensor
    ) -> Tensor:
        """(B,) times of the earlier points, in the dtype of x0."""
        if (stage is None) == (r is None):
            raise ValueError("one of stage and r is needed: stage=0 at the start of the training, or the times r (B,).")
        if r is None:
            earlier = self.schedule.earlier_level(level, stage or 0)
            # A process's times at no noise need not be a number.
            times = torch.where(earlier > 0, self.process.time_of(torch.where(earlier > 0, earlier, level)), 0.0)
            return times.to(x0.dtype)
        check_tensor("r", r, f"({len(x0)},)")
        if r.shape != x0.shape[:1]:
            raise ValueError(f"r must be one time per image, shape ({len(x0)},); got {tuple(r.shape)}.")
        r = r.to(x0.device, x0.dtype)
        if r.device.type == "cpu" and not bool(((r >= 0) & (r < exact_t)).all()):
            raise ValueError(f"r must lie between 0 and below t; got {r.tolist()[:4]} for {exact_t.tolist()[:4]}.")
        return r

    def _f(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """x0 by the process's linear table, ``noisy = alpha x0 + sigma noise`` and ``output = a x0 + b noise``."""
        check_output(output, noisy.shape)
        with without_autocast(noisy.device.type):
            exact = t.to(torch.float64)
            # At t = 0, where the table is 0 / 0, any other time stands in.
            exact = torch.where(exact > 0, exact, torch.ones_like(exact) * self.process.time_of(exact + 1))
            alpha, sigma = self.process.alpha(exact), self.process.sigma(exact)
            a, b = self.process.output_coefficients(exact)
            determinant = b * alpha - a * sigma
            skip, scale = (
                expand_as_rows(coefficient.to(noisy.dtype), noisy)
                for coefficient in (b / determinant, -sigma / determinant)
            )
            denoised = skip * noisy + scale * output.to(noisy.dtype)
            return torch.where(expand_as_rows(t > 0, noisy), denoised, noisy)
