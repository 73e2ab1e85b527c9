"""What every training objective is given: clean images, their noise and times, and references that contain them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .forward_process import NoiseProcess
from .posterior import check_tensor, pixels_to_float
from .reference_bank import ReferenceBank
from .reference_batch import refuse_dispatched_references
from .reference_set import ReferenceBatch, ReferenceSet, SharedReferences, check_integers


def batch_of_images(clean: Any) -> Tensor:
    """(B, ...) images in the dtype that is computed in: float32, or float64 as they are.

    Raises:
        TypeError: not a tensor, or of a dtype whose range is not known.
        ValueError: no batch.
    """
    if not isinstance(clean, Tensor):
        raise TypeError(f"clean must be a tensor (B, ...); got {type(clean).__name__}. Stack the images first.")
    if clean.ndim < 2:
        raise ValueError(f"clean must be a batch, (B, ...) with at least 2 dimensions; got {tuple(clean.shape)}.")
    return pixels_to_float(clean)


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise of the shape and dtype of `like`, drawn where the generator is."""
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)


def check_noise_and_times(x0: Tensor, noise: Any, t: Any) -> tuple[Tensor, Tensor]:
    """The noise (B, ...) and the times (B,) on the device of x0, the noise in its dtype.

    Raises:
        TypeError, ValueError: not tensors, or not of these shapes.
    """
    check_tensor("noise", noise, f"of shape {tuple(x0.shape)}")
    check_tensor("times", t, f"({len(x0)},)")
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the images' shape {tuple(x0.shape)}; got {tuple(noise.shape)}.")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"times must be one per image, shape ({len(x0)},); got {tuple(t.shape)}.")
    return noise.to(x0.device, x0.dtype), t.to(x0.device)


def alpha_and_sigma(process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t), (B,) float64, for t (B,) float64.

    Raises:
        ValueError: times that are not the process's; where looking at them waits for the device, they are not looked at.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    if t.device.type == "cpu":
        inside = (sigma > 0) & (t <= process.last_time)
        if not bool(inside.all()):
            raise ValueError(
                f"times of {type(process).__name__} lie above 0 and up to {process.last_time:g}; got "
                f"{t[~inside].tolist()[:4]}. Timesteps of a Diffusers scheduler belong to "
                "STFTrainingObjective.from_scheduler."
            )
    return alpha, sigma


def check_output(output: Any, shape: torch.Size) -> None:
    """Raise TypeError or ValueError unless what the network returned is a tensor of this shape."""
    if not isinstance(output, Tensor):
        raise TypeError(f"output must be a tensor; got {type(output).__name__}. Pass the network's `.sample`.")
    if output.shape != shape:
        raise ValueError(
            f"the network returned {tuple(output.shape)} for a target of {tuple(shape)}. Pass its `.sample`, and check "
            "the network's out_channels."
        )


class SourceChecks:
    """That references contain the sources: without its source a target is biased, and no loss curve shows it.

    Shapes are checked always. Values are compared at each call on the CPU; elsewhere at the first call and when shapes
    change, since comparing waits for the device.
    """

    def __init__(self) -> None:
        # By kind of reference set, what the sources were last compared for.
        self._checked: dict[type, tuple[Any, ...]] = {}

    def references(
        self,
        x0: Tensor,
        reference: Tensor | ReferenceSet | None,
        labels: Tensor | None,
        reference_labels: Tensor | None,
        source_index: Tensor | None,
        num_unconditional: int | None,
    ) -> ReferenceSet | None:
        """The references as a set that is checked to contain the sources; None for the source alone.

        Args:
            x0: (B, ...) the sources, as from `batch_of_images`.
            reference, labels, reference_labels, source_index, num_unconditional: as for `STFTrainingObjective.perturb`.

        Raises:
            ValueError, TypeError: as `STFTrainingObjective.perturb`.
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
