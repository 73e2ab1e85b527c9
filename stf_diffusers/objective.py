"""The training objective: a noised batch, its targets, its loss.

STF replaces x0 by the posterior mean in the target and leaves everything else alone. Every prediction type is
``a x0 + b noise``; the target is the type's own DSM value plus ``(a - b alpha / sigma) (posterior mean - x0)``, which
leaves the DSM target untouched, bit for bit, where the posterior mean is x0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forward_process import NoiseProcess, expand_as_rows
from .noise_distribution import NoiseDistribution
from .posterior import PosteriorMean
from .precision import without_autocast
from .prediction import prediction_coefficients
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
class PerturbedBatch:
    """What `STFTrainingObjective.perturb` returns. B rows throughout.

    `model_input` (B, ...) and `timestep` (B,) go into the network, `target` (B, ...) is what its output is compared
    with. `effective_sample_size` (B,) counts the references behind each target: 1 means the DSM target. The rest is
    for logging and for losses of your own: `noisy` (B, ...) is x_t, `posterior_mean` (B, ...) the estimate of
    E[x0 | x_t], `noise` (B, ...), and `t`, `alpha`, `sigma` (B,).
    """

    model_input: Tensor
    timestep: Tensor
    target: Tensor
    effective_sample_size: Tensor
    posterior_mean: Tensor
    noisy: Tensor
    noise: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor


class STFTrainingObjective:
    """Stable Target Field training on any forward process and prediction type (Xu et al. 2023, arXiv 2302.00670).

    Without references it is denoising score matching: the set of one.

    Args:
        process: the forward process.
        prediction_type: a row of the table in `prediction.py` ("epsilon", "sample", "v_prediction",
            "flow_prediction", "score"). None: what the process's network returns (for `EDM`, the raw output F).
        distribution: of the noise levels that `perturb` draws. None: the process's own.

    Raises:
        TypeError: `process` is not a NoiseProcess, or `distribution` not a NoiseDistribution.
        ValueError: unknown prediction type.
    """

    def __init__(
        self,
        process: NoiseProcess,
        prediction_type: str | None = None,
        *,
        distribution: NoiseDistribution | None = None,
    ) -> None:
        if not isinstance(process, NoiseProcess):
            raise TypeError(
                f"process must be a NoiseProcess such as EDM(), VE() or VP(); got {type(process).__name__}. For a "
                "Diffusers scheduler use STFTrainingObjective.from_scheduler(scheduler)."
            )
        if prediction_type is not None:
            prediction_coefficients(prediction_type, torch.ones(1, device="cpu"), torch.ones(1, device="cpu"))
        if distribution is not None and not isinstance(distribution, NoiseDistribution):
            raise TypeError(
                f"distribution must be a NoiseDistribution such as LogNormal(-0.4, 1.2); got "
                f"{type(distribution).__name__}."
            )
        self.process = process
        self.distribution = distribution
        self.prediction_type = prediction_type
        self._sources = SourceChecks()

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> STFTrainingObjective:
        """The objective of a Diffusers script that calls `noise_scheduler.add_noise`; prediction type from its config.

        Raises:
            TypeError, ValueError: as `SchedulerProcess`. Warnings say where the scheduler's `add_noise` is not usable, and
                where targets differ from its `get_velocity`.
        """
        process = SchedulerProcess(noise_scheduler)
        if process.add_noise_is_backward:
            warnings.warn(
                f"{process.scheduler_name}.add_noise, before set_timesteps, does not add the noise that belongs to a "
                "timestep. Add noise with DDPMScheduler.from_config(scheduler.config), or use perturb().",
                stacklevel=2,
            )
        if process.velocity_is_backward:
            warnings.warn(
                f"{process.scheduler_name}.get_velocity reads the noise of another timestep. Targets here belong to the "
                "noise that add_noise adds: a network that was trained on get_velocity has learnt others, so train it anew.",
                stacklevel=2,
            )
        return cls(process)

    @torch.no_grad()
    def perturb(
        self,
        clean: Tensor,
        *,
        reference: Tensor | ReferenceSet | None = None,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
        source_index: Tensor | None = None,
        num_unconditional: int | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PerturbedBatch:
        """Draw times and noise, noise the batch, and compute its targets.

        Args:
            clean: (B, ...) images, floating point in [-1, 1] or uint8 pixels (read as x / 127.5 - 1). Any shape.
            reference: (n, ...) references whose first B rows are `clean`, or a `ReferenceBank` that contains them.
                None: the DSM target.
            labels: (B,) integer classes: row i uses references of its class; -1 is a dropped condition and uses all,
                which must then be drawn from the whole data law. Needs `reference_labels`, or a bank with labels.
            reference_labels: (n,) integer classes of the references.
            source_index: (B,) integers, positions of the sources in `reference` where these are not its first B rows; of a
                bank, positions in the images it was made of. Without them a bank is searched for the images, once.
            num_unconditional: the first so many references are a draw of the whole data law; rows of label -1 use these
                and their own source. None: they use all. A class-aware `ReferenceBatchSampler(..., labels=)` has the
                number as an attribute of this name. That references are class-aware cannot be seen from them: without
                the number, the targets of rows of label -1 are then biased, and nothing says so. Ignored without
                references.
            t: (B,) times. None: drawn from the process's training distribution.
            noise: (B, ...) standard normal. None: drawn. Neither draw depends on the references.
            generator: for the draws.

        Returns:
            `PerturbedBatch`; `model_input` in the dtype of `clean` (float32 for uint8), `target` in float32 (float64
            for float64 images).

        Raises:
            ValueError: references without their sources, shapes or labels that do not fit; `num_unconditional` without
                labels, with a bank, or not in [B, n].
            TypeError: not tensors, or of the wrong dtype, or a `num_unconditional` that is not an integer.
        """
        x0 = batch_of_images(clean)
        if t is None:
            t = (
                self.process.sample_t(len(x0), generator=generator, device=x0.device)
                if self.distribution is None
                else self.process.times_from(self.distribution, len(x0), generator=generator, device=x0.device)
            )
        if noise is None:
            noise = standard_normal(x0, generator)
        references = self._sources.references(x0, reference, labels, reference_labels, source_index, num_unconditional)
        batch = self._noised_batch(x0, noise, t, references, labels, source_index)
        return replace(batch, model_input=batch.model_input.to(clean.dtype)) if clean.is_floating_point() else batch

    @torch.no_grad()
    def target(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        reference: Tensor | ReferenceSet | None = None,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
        source_index: Tensor | None = None,
        num_unconditional: int | None = None,
    ) -> Tensor:
        """The target for images that a script has noised itself: replaces its `noise`, velocity or clean images.

        Args:
            clean: (B, ...) images or latents as passed to `add_noise`.
            noise: (B, ...) the noise passed to it.
            timesteps: (B,) the timesteps passed to it: integers, or floating point for EDM and flow schedulers; for
                a continuous process, its times.
            reference, labels, reference_labels, source_index, num_unconditional: as for `perturb`.

        Returns:
            (B, ...) in float32 (float64 for float64 images); without references, the DSM target bit for bit.
        """
        x0 = batch_of_images(clean)
        references = self._sources.references(x0, reference, labels, reference_labels, source_index, num_unconditional)
        return self._noised_batch(x0, noise, timesteps, references, labels, source_index).target

    def loss(self, output: Tensor, batch: PerturbedBatch, weights: Tensor | None = None) -> Tensor:
        """Mean squared error between the network's output (B, ...) and `batch.target`, a float32 scalar.

        For the preconditioned rows this unweighted error is the weighted loss of Karras et al. 2022 (Table 1).

        Args:
            output: output of the network.
            batch: what `perturb` returned.
            weights: (B,) of the rows, for instance of `AdaptiveNoise.importance_weights`. Their sum is not divided by.

        Raises:
            ValueError: the shapes differ (mean squared error would broadcast them).
        """
        check_output(output, batch.target.shape)
        with without_autocast(output.device.type):
            output = output.to(batch.target.dtype)
            if weights is None:
                return F.mse_loss(output, batch.target)
            if weights.shape != batch.sigma.shape:
                raise ValueError(
                    f"weights must have shape {tuple(batch.sigma.shape)}, one for each row; got {tuple(weights.shape)}."
                )
            errors = (output - batch.target).flatten(1).square().mean(1)
            return (weights.to(errors.dtype) * errors).mean()

    def _noised_batch(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        references: ReferenceSet | None,
        labels: Tensor | None,
        source_index: Tensor | None,
    ) -> PerturbedBatch:
        noise, t = check_noise_and_times(x0, noise, t)
        with without_autocast(x0.device.type):
            # Coefficients in float64: at low noise 1 - c_skip and a - b alpha / sigma cancel.
            exact_t = t.to(torch.float64)
            exact_alpha, exact_sigma = alpha_and_sigma(self.process, exact_t)
            a, b = (
                self.process.output_coefficients(exact_t)
                if self.prediction_type is None
                else prediction_coefficients(self.prediction_type, exact_alpha, exact_sigma)
            )
            gain = a - b * exact_alpha / exact_sigma
            scale = self.process.input_scale(exact_t)
            alpha, sigma = exact_alpha.to(x0.dtype), exact_sigma.to(x0.dtype)

            def rows(vector: Tensor) -> Tensor:
                return expand_as_rows(vector.to(x0.dtype), x0)

            noisy = rows(alpha) * x0 + rows(sigma) * noise
            target = rows(a) * x0 + rows(b) * noise
            if references is None:
                posterior = PosteriorMean(x0, torch.ones_like(alpha))
            else:
                posterior = references.posterior_mean(noisy, alpha, sigma, source_index=source_index, labels=labels)
                target = target + rows(gain) * (posterior.mean - x0)
            return PerturbedBatch(
                model_input=rows(scale) * noisy,
                timestep=self.process.timestep(t),
                target=target,
                effective_sample_size=posterior.effective_sample_size,
                posterior_mean=posterior.mean,
                noisy=noisy,
                noise=noise,
                t=t,
                alpha=alpha,
                sigma=sigma,
            )
