"""What a call of a pipeline is given: each argument checked, in one sentence, before anything is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, SupportsFloat

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor


def check_counts(**counts: Any) -> None:
    """Raise TypeError or ValueError unless each is a positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer; got {value!r}.")
        if value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value}.")


def check_generator(generator: Any, batch_size: int) -> None:
    """Raise TypeError or ValueError unless it is None, a generator, or a list with one for each image."""
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator) and (one is not None or isinstance(generator, list)):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them; got {type(one).__name__}. Pass "
                "torch.Generator().manual_seed(seed)."
            )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for {batch_size} images: pass one, or one for each image.")


def check_solver(solver: str, guidance_scale: Any, callback: Any, sigmas: Any) -> None:
    """Raise TypeError or ValueError unless the solver is known, and has what is asked of it."""
    if solver not in ("heun", "euler", "rk45", "scheduler", "consistency"):
        raise ValueError(f"solver must be 'heun', 'euler', 'rk45', 'scheduler' or 'consistency'; got {solver!r}.")
    if not isinstance(guidance_scale, SupportsFloat) or not math.isfinite(guidance_scale):
        raise TypeError(f"guidance_scale must be a finite number; got {guidance_scale!r}. Pass 1.0 for no guidance.")
    if solver == "scheduler" and guidance_scale != 1:
        raise ValueError("solver='scheduler' has no guidance: pass guidance_scale=1.0, or another solver.")
    if callback is not None and solver == "rk45":
        raise ValueError("callback_on_step_end needs steps: pass solver='heun', 'euler' or 'scheduler'; got 'rk45'.")
    if sigmas is not None and solver != "consistency":
        raise ValueError(f"sigmas are the levels between the steps of solver='consistency'; got solver={solver!r}.")


def default_steps(solver: str, sigmas: Any) -> int:
    """N where a call does not say: 18 (Karras et al.'s for CIFAR-10), and for a consistency model one more than `sigmas`."""
    if solver != "consistency" or sigmas is None:
        return 18 if solver != "consistency" else 1
    if not isinstance(sigmas, Sized):
        raise TypeError(f"sigmas must be a list of noise levels; got {sigmas!r}.")
    return len(sigmas) + 1


def check_output_type(output_type: str, channels: int) -> None:
    """Raise ValueError unless images with that many channels can be returned in this form."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent'; got {output_type!r}.")
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(f"PIL has no images of {channels} channels: pass output_type='np' or 'pt'.")


def checked_class_labels(
    class_labels: Any, batch_size: int, classes: int, device: torch.device, names: Sequence[str] = ()
) -> Tensor:
    """(B,) int64 labels on the device, from one for each image or one for all, by number or by name.

    Raises:
        TypeError: they are not integers.
        ValueError: there are too few or too many, or one of them is not a class.
    """
    wanted = f"{batch_size} integers from 0 to {classes - 1}, or one for all"
    called = [class_labels] if isinstance(class_labels, str) else class_labels
    if isinstance(called, list | tuple) and called and all(isinstance(name, str) for name in called):
        unknown = sorted(set(called) - set(names))
        if unknown:
            raise ValueError(f"no class is called {unknown}; the model knows {list(names)[:20] or 'no names'}.")
        class_labels = [names.index(name) for name in called]
    try:
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels must be {wanted}; got {class_labels!r}.") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"class_labels must be {wanted}; got {class_labels!r}, which is {labels.dtype}.")
    labels = labels.to(torch.int64)
    labels = labels.expand(batch_size) if len(labels) == 1 else labels
    if len(labels) != batch_size or not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"class_labels must be {wanted}; got {class_labels!r}.")
    return labels


def callback_after_step(
    pipeline: DiffusionPipeline, callback: Any, names: Sequence[str]
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Diffusers' `callback_on_step_end` as a function of the step, its timestep and the state (B, ...) after it.

    It returns the state that the next step starts from.

    Raises:
        ValueError: `names` of tensors that the pipeline does not hand out.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    known = pipeline._callback_tensor_inputs
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}; got {unknown}.")

    def after_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        if callback is None:
            return latents
        returned = callback(pipeline, step, timestep, {"latents": latents} if names else {})
        if returned is not None and not isinstance(returned, Mapping):
            raise TypeError(
                f"callback_on_step_end returned {type(returned).__name__}: return the dict that it was given, or None."
            )
        replaced = (returned or {}).get("latents", latents)
        if replaced.shape != latents.shape:
            raise ValueError(
                f"callback_on_step_end returned latents {tuple(replaced.shape)}; they must stay {tuple(latents.shape)}."
            )
        return replaced.to(latents)

    return after_step
