"""How good samples are: distances that say how they were measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import FeatureStatistics, KernelDistance, frechet_distance, kernel_distance, precision_recall

# Number of samples behind published Fréchet and kernel distances.
USUAL_SAMPLES = 50_000


@dataclass(frozen=True)
class SampleQuality:
    """Distances of samples from data, and all that another number must share to be compared with them.

    Attributes:
        frechet_distance: squared Fréchet distance of normal distributions; FID, on Inception's features.
        kernel_distance: squared kernel distance with its standard error, over fresh samples and data; KID, on Inception's
            features.
        precision: share of samples among the data, with 3 neighbours; as many of the data as samples, or all.
        recall: share of data among the samples, likewise.
        num_samples: how many samples.
        num_references: how many of the data.
        extractor: the network that computed the features.
        reference: which data: the set, and the split.
        sampler: how the samples were made.
        evaluations: number of network evaluations per sample.
        seeds: seeds of the samples.
        dimensions: number of dimensions of the features.
    """

    frechet_distance: float
    kernel_distance: KernelDistance
    precision: float
    recall: float
    num_samples: int
    num_references: int
    extractor: str
    reference: str
    sampler: str
    evaluations: int | None
    seeds: str
    dimensions: int

    @property
    def limits(self) -> list[str]:
        """Why the numbers must not be compared with others', in sentences; empty where nothing is known against it."""
        found = []
        if self.num_samples < USUAL_SAMPLES:
            found.append(
                f"{self.num_samples:,} samples: Fréchet distances fall with their number, so this one is not comparable with "
                f"those of {USUAL_SAMPLES:,}."
            )
        if min(self.num_samples, self.num_references) <= self.dimensions:
            found.append(
                f"No more images than the {self.dimensions:,} dimensions of the features: covariances are not of full rank."
            )
        return found

    @property
    def stamp(self) -> str:
        """How it was measured, in one line."""
        evaluations = "" if self.evaluations is None else f", {self.evaluations} evaluations"
        return (
            f"{self.extractor} features, {self.num_samples:,} samples ({self.sampler}{evaluations}, seeds {self.seeds}) against "
            f"{self.num_references:,} of {self.reference}" + (", not comparable with larger n" if self.limits else "")
        )

    def rows(self) -> dict[str, float]:
        """The numbers by names that say how they were measured: what `model_card(metrics=)` takes."""
        return {
            f"Fréchet distance, {self.stamp}": self.frechet_distance,
            "Kernel distance, likewise": self.kernel_distance.value,
            "Precision, likewise": self.precision,
            "Recall, likewise": self.recall,
        }


def sample_quality(
    samples: Tensor,
    data: Tensor,
    *,
    extractor: str,
    reference: str,
    sampler: str,
    seeds: str,
    evaluations: int | None = None,
    data_statistics: FeatureStatistics | None = None,
    generator: torch.Generator | None = None,
) -> SampleQuality:
    """Fréchet and kernel distance, precision and recall of samples from data, on their features.

    Args:
        samples, data: (n, d) and (m, d) features by the same extractor, at least 5 each.
        extractor, reference, sampler, seeds, evaluations: what is stamped on the numbers: see `SampleQuality`.
        data_statistics: those of `data`, where they are known already.
        generator: for the subsets of kernel distance and precision. Default: seed 0.

    Raises:
        TypeError, ValueError: features that do not fit, or an empty stamp.
    """
    for name, value in {"extractor": extractor, "reference": reference, "sampler": sampler, "seeds": seeds}.items():
        if not value:
            raise ValueError(f"{name} is empty: a number that does not say how it was measured cannot be compared.")
    generator = generator or torch.Generator("cpu").manual_seed(0)
    distance = frechet_distance(FeatureStatistics.of(samples), data_statistics or FeatureStatistics.of(data))
    kernel = kernel_distance(samples, data, generator=generator)
    # Recall depends on the two numbers, and precision on the density of the data: as many of both.
    chosen = data[torch.randperm(len(data), generator=generator, device=generator.device)[: len(samples)]]
    shares = precision_recall(samples, chosen)
    return SampleQuality(
        distance, kernel, *shares, len(samples), len(data), extractor, reference, sampler, evaluations, seeds, data.shape[1]
    )  # fmt: skip
