"""Conditioning of a network beside the noise level: class, dropped class, orientation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..export import DIT_NULL_LABEL
from ..objective import PerturbedBatch

ORIENTATIONS = 8


@dataclass(frozen=True)
class Conditioning:
    """Classes, their dropout for guidance, and orientations, as labels of one embedding table.

    Label ``orientation * base + class``, where base counts the classes and, with dropout, the null class after them (of a
    transformer always 1000): the labels below base mean upright images, in plain Diffusers too.

    Args:
        num_classes: number of classes of the data; None for an unconditional network.
        class_dropout: probability of the null class.
        reorient: probability of one of the eight orientations (quarter turns, mirrored or not) at random.
        transformer: whether the network is a `DiTTransformer2DModel`, which always takes a label.

    Raises:
        ValueError: a combination that the network has no labels for.
    """

    num_classes: int | None
    class_dropout: float = 0.0
    reorient: float = 0.0
    transformer: bool = False

    def __post_init__(self) -> None:
        if self.transformer and self.reorient:
            raise ValueError("reorient= needs a UNet2DModel: a DiTTransformer2DModel has no labels left.")
        if self.transformer and (self.num_classes or 0) > DIT_NULL_LABEL:
            raise ValueError(f"a DiTTransformer2DModel has {DIT_NULL_LABEL} classes; the data have {self.num_classes}.")

    @property
    def null_label(self) -> int | None:
        """The label of a dropped or missing condition, where there is one."""
        if self.transformer:
            return DIT_NULL_LABEL
        return self.num_classes if self.class_dropout else None

    @property
    def _base(self) -> int:
        return (self.num_classes or 1) + bool(self.class_dropout)

    @property
    def embeddings(self) -> int | None:
        """`num_class_embeds` of a `UNet2DModel`, `num_embeds_ada_norm` of a transformer, without the null class."""
        if self.transformer:
            return DIT_NULL_LABEL
        if self.num_classes is None and not self.reorient:
            return None
        return self._base * (ORIENTATIONS if self.reorient else 1)

    def upright(self, labels: Tensor | None, batch_size: int, device: torch.device) -> Tensor | None:
        """(B,) labels for the network of upright images with the classes `labels` (B,), or None where it takes none."""
        if labels is None and self.embeddings is not None:
            return torch.full((batch_size,), self.null_label or 0, device=device)
        return labels

    def draw(
        self, labels: Tensor | None, batch_size: int, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Drop classes and turn images at random, on the generator's device.

        Args:
            labels: (B,) classes, or None.
            batch_size: B.

        Returns:
            (B,) labels for the network; (B,) classes for the references, -1 where dropped; (B,) orientations. Each is
            None if there is none.
        """
        device = generator.device
        network_labels, classes, orientation = self.upright(labels, batch_size, device), labels, None
        if labels is not None and self.class_dropout:
            dropped = torch.rand(batch_size, generator=generator, device=device) < self.class_dropout
            classes = labels.masked_fill(dropped, -1)
            network_labels = labels.masked_fill(dropped, self.null_label or 0)
        if self.reorient and network_labels is not None:
            turned = torch.rand(batch_size, generator=generator, device=device) < self.reorient
            orientation = torch.randint(ORIENTATIONS, (batch_size,), generator=generator, device=device) * turned
            network_labels = network_labels + orientation * self._base
        return network_labels, classes, orientation


def orient(images: Tensor, orientation: Tensor) -> Tensor:
    """Square images (B, C, H, H), each in one of eight orientations (B,): 0 upright, k and k + 4 turned by k quarters,
    the latter mirrored first.
    """
    place = _pixels_of_orientations(images.shape[-1], images.device)[orientation]
    flat = images.flatten(2)
    return flat.gather(2, place[:, None].expand_as(flat)).view(images.shape)


@cache
def _pixels_of_orientations(size: int, device: torch.device) -> Tensor:
    """(8, H * H) int64: which pixel of an upright image each pixel of a turned one is."""
    upright = torch.arange(size**2, device="cpu").view(size, size)
    turned = [torch.rot90(upright.flip(-1) if number >= 4 else upright, number % 4) for number in range(ORIENTATIONS)]
    return torch.stack(turned).flatten(1).to(device)


def reoriented(batch: PerturbedBatch, orientation: Tensor | None) -> PerturbedBatch:
    """The batch with network input and target turned alike.

    Turning is orthogonal, so the turned noisy image is the noised turned image, and its target given the orientation is the
    turned target: references stay as they are.
    """
    if orientation is None:
        return batch
    return replace(batch, model_input=orient(batch.model_input, orientation), target=orient(batch.target, orientation))
