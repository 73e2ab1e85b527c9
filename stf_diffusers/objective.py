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

from .noise import NoiseProcess, expand_as_rows
from .posterior import PosteriorMean, check_tensor, full_precision, pixels_to_float
from .prediction import prediction_coefficients
from .reference_bank import ReferenceBank
from .reference_batch import refuse_dispatched_references
from .reference_set import ReferenceBatch, ReferenceSet, SharedReferences, check_integers
from .scheduler_process import SchedulerProcess


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

    Raises:
        TypeError: `process` is not a NoiseProcess.
        ValueError: unknown prediction type.
    """

    def __init__(self, process: NoiseProcess, prediction_type: str | None = None) -> None:
        if not isinstance(process, NoiseProcess):
            raise TypeError(
                f"process must be a NoiseProcess such as EDM(), VE() or VP(); got {type(process).__name__}. For a "
                "Diffusers scheduler use STFTrainingObjective.from_scheduler(scheduler)."
            )
        if prediction_type is not None:
            prediction_coefficients(prediction_type, torch.ones(1, device="cpu"), torch.ones(1, device="cpu"))
        self.process = process
        self.prediction_type = prediction_type
        # By kind of reference set, what the sources were last compared for.
        self._checked: dict[type, tuple[Any, ...]] = {}

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
        x0 = self._as_compute(clean)
        if t is None:
            t = self.process.sample_t(len(x0), generator=generator, device=x0.device)
        if noise is None:
            device = generator.device if generator is not None else x0.device
            noise = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype)
        references = self._reference_set(x0, reference, labels, reference_labels, source_index, num_unconditional)
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
        x0 = self._as_compute(clean)
        references = self._reference_set(x0, reference, labels, reference_labels, source_index, num_unconditional)
        return self._noised_batch(x0, noise, timesteps, references, labels, source_index).target

    def loss(self, output: Tensor, batch: PerturbedBatch) -> Tensor:
        """Mean squared error between the network's output (B, ...) and `batch.target`, a float32 scalar.

        For the preconditioned rows this unweighted error is the weighted loss of Karras et al. 2022 (Table 1).

        Raises:
            ValueError: the shapes differ (mean squared error would broadcast them).
        """
        if not isinstance(output, Tensor):
            raise TypeError(f"output must be a tensor; got {type(output).__name__}. Pass the network's `.sample`.")
        if output.shape != batch.target.shape:
            raise ValueError(
                f"the network returned {tuple(output.shape)} for a target of {tuple(batch.target.shape)}. Pass its "
                "`.sample`, and check the network's out_channels."
            )
        with full_precision(output.device.type):
            return F.mse_loss(output.to(batch.target.dtype), batch.target)

    @staticmethod
    def _as_compute(clean: Tensor) -> Tensor:
        if not isinstance(clean, Tensor):
            raise TypeError(f"clean must be a tensor (B, ...); got {type(clean).__name__}. Stack the images first.")
        if clean.ndim < 2:
            raise ValueError(f"clean must be a batch, (B, ...) with at least 2 dimensions; got {tuple(clean.shape)}.")
        return pixels_to_float(clean)

    def _noised_batch(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        references: ReferenceSet | None,
        labels: Tensor | None,
        source_index: Tensor | None,
    ) -> PerturbedBatch:
        check_tensor("noise", noise, f"of shape {tuple(x0.shape)}")
        check_tensor("times", t, f"({len(x0)},)")
        if noise.shape != x0.shape:
            raise ValueError(f"noise must have the images' shape {tuple(x0.shape)}; got {tuple(noise.shape)}.")
        if t.shape != x0.shape[:1]:
            raise ValueError(f"times must be one per image, shape ({len(x0)},); got {tuple(t.shape)}.")
        noise, t = noise.to(x0.device, x0.dtype), t.to(x0.device)
        with full_precision(x0.device.type):
            # Coefficients in float64: at low noise 1 - c_skip and a - b alpha / sigma cancel.
            exact_t = t.to(torch.float64)
            exact_alpha, exact_sigma = self.process.alpha(exact_t), self.process.sigma(exact_t)
            if x0.device.type == "cpu":
                inside = (exact_sigma > 0) & (exact_t <= self.process.last_time)
                if not bool(inside.all()):
                    raise ValueError(
                        f"times of {type(self.process).__name__} lie above 0 and up to {self.process.last_time:g}; got "
                        f"{t[~inside].tolist()[:4]}. Timesteps of a Diffusers scheduler belong to "
                        "STFTrainingObjective.from_scheduler."
                    )
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

    def _reference_set(
        self,
        x0: Tensor,
        reference: Tensor | ReferenceSet | None,
        labels: Tensor | None,
        reference_labels: Tensor | None,
        source_index: Tensor | None,
        num_unconditional: int | None,
    ) -> ReferenceSet | None:
        """The references as a set that is checked to contain the sources; None for the DSM target.

        Without its source a target is biased, and no loss curve shows it. Shapes are checked always. Values are
        compared at each call on the CPU; elsewhere at the first call and when shapes change, since comparing waits for
        the device.
        """
        for name, values in (("labels", labels), ("source_index", source_index)):
            if values is not None:
                check_integers(name, values, len(x0))
        if reference is None:
            return None
        if isinstance(reference, (Tensor, SharedReferences)):
            refuse_dispatched_references()
        if isinstance(reference, Tensor):
            reference = ReferenceBatch(reference, reference_labels, num_unconditional)
            reference.check_shapes(x0, source_index, labels)
            seen: tuple[Any, ...] = (reference.images.shape, reference.images.dtype, x0.shape, x0.device)
            seen += (labels is None, source_index is None)
            searched = False
        elif not isinstance(reference, ReferenceSet):
            raise TypeError(
                f"reference must be a tensor (n, ...), a ReferenceBank or None; got {type(reference).__name__}."
            )
        else:
            if reference_labels is not None:
                raise ValueError(f"a {type(reference).__name__} has its own labels: leave reference_labels out.")
            if num_unconditional is not None:
                raise ValueError(
                    f"num_unconditional counts the rows of a reference tensor; in a {type(reference).__name__}, rows of "
                    "label -1 use all. Leave it out."
                )
            # A bank that is searched is searched once, by all processes at their first call.
            searched = isinstance(reference, ReferenceBank) and (source_index is None or bool(reference.process_shard))
            seen = (reference, labels is None, None if searched else x0.shape)
        if (x0.device.type == "cpu" and not searched) or self._checked.get(type(reference)) != seen:
            reference.check_sources(x0, source_index, labels)
            self._checked[type(reference)] = seen
        return reference
