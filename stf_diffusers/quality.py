"""How good samples are: features of images by somebody else's network, and distances that say how they were measured."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from .metrics import FeatureStatistics, KernelDistance, frechet_distance, kernel_distance, precision_recall
from .posterior import full_precision

# What published Fréchet and kernel distances are of.
USUAL_SAMPLES = 50_000


@dataclass(frozen=True)
class FeatureExtractor:
    """Features of images by a network that stays as it is.

    Attributes:
        name: which network, with a digest of its weights: two numbers are comparable only where this is equal.
        compute: (B, 3, H, W) uint8 RGB images to (B, d) features.
    """

    name: str
    compute: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features of images, `batch_size` at a time.

        Args:
            images: (n, C, H, W) uint8 pixels; C of 1 (grey) or 3 (RGB), or 4, whose transparency is left out.

        Returns:
            (n, d) float32, on the CPU.

        Raises:
            TypeError: images that are not uint8.
            ValueError: another shape, or features that are not finite.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 pixels; got {images.dtype}.")
        if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or not len(images):
            raise ValueError(f"images must have shape (n, C, H, W) with C of 1, 3 or 4; got {tuple(images.shape)}.")
        colours = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        parts = colours.split(batch_size)
        features = torch.cat([self.compute(part).flatten(1).float().cpu() for part in parts])
        if not bool(features.isfinite().all()):
            raise ValueError(f"features of {self.name} are not all finite.")
        return features


def _digest(network: nn.Module, without: Collection[str] = ()) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(item for item in network.state_dict().items() if item[0] not in without):
        digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def transformers_features(
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> FeatureExtractor:
    """Features by a vision model of `transformers`, such as ``facebook/dinov2-base``, a CLIP, or a folder of your own.

    They are the image embedding of models that have one, such as CLIP; else the pooled output; else, and where the weights of the
    pooling are not saved with the model, the mean of the last hidden states. Images are prepared by the model's own processor.
    Weights are read from safetensors only.

    Raises:
        OSError: there is no such model, or no weights in safetensors.
        ValueError: it is no vision model, or weights are missing in it.
    """
    local = Path(pretrained_model_name_or_path)
    if not local.exists() and len(local.parts) > 2:
        raise FileNotFoundError(f"{local} is neither a folder that exists nor a name on the Hub (owner/name).")
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    network, loading = AutoModel.from_pretrained(
        pretrained_model_name_or_path, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **where
    )
    if network.main_input_name != "pixel_values" and not hasattr(network, "get_image_features"):
        raise ValueError(f"{pretrained_model_name_or_path} takes {network.main_input_name}, not images.")
    missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"{pretrained_model_name_or_path} lacks weights: {sorted(missing)[:5]}. Its features are random."
        )
    pooled = not loading["missing_keys"]
    processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **where)
    place = torch.device(device)
    network = network.to(place).eval()

    def compute(images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(place, torch.float32)
        with full_precision(place.type):
            if hasattr(network, "get_image_features"):
                found = network.get_image_features(pixel_values=pixels)
                return found if isinstance(found, Tensor) else found.pooler_output
            output = network(pixel_values=pixels)
        if pooled and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output
        states = output.last_hidden_state  # (B, tokens, d), or (B, d, h, w)
        return states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)

    # A folder's place says nothing, and is nobody's business.
    name = local.resolve().name if local.exists() else str(pretrained_model_name_or_path)
    return FeatureExtractor(
        f"{name} ({type(network).__name__}, weights {_digest(network, loading['missing_keys'])})", compute
    )


def inception_features(weights: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Features by the Inception network of published FIDs, as `torch-fidelity` has it: 2,048 dimensions.

    Args:
        weights: torch-fidelity's converted weights, as safetensors or as the torch file that it publishes, which is read with
            ``weights_only=True``.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: no such file.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(weights)
    state = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    )
    # The library unpickles the file that it is given: it gets one that was written here.
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        network = FeatureExtractorInceptionV3("inception", ["2048"], str(Path(folder) / "weights.pth"))
    place = torch.device(device)
    network = network.to(place)

    def compute(images: Tensor) -> Tensor:
        with full_precision(place.type):
            return network(images.to(place))[0]

    return FeatureExtractor(f"Inception-v3 of torch-fidelity (weights {_digest(network)})", compute)


@dataclass(frozen=True)
class SampleQuality:
    """Distances of samples from data, and all that another number must share to be compared with them.

    Attributes:
        frechet_distance: squared Fréchet distance of normal distributions; FID, on Inception's features.
        kernel_distance: squared kernel distance with its standard error; KID, on Inception's features.
        precision: share of samples among the data, with 3 neighbours; as many of the data as samples, or all.
        recall: share of data among the samples, likewise.
        num_samples: how many samples.
        num_references: how many of the data.
        extractor: whose features.
        reference: which data: the set, and the split.
        sampler: how the samples were made.
        evaluations: of the network, for each sample.
        seeds: of the samples.
        dimensions: of the features.
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
        generator: of the subsets of kernel distance and precision. Default: seed 0.

    Raises:
        TypeError, ValueError: features that do not fit, or an empty stamp.
    """
    for name, value in {"extractor": extractor, "reference": reference, "sampler": sampler, "seeds": seeds}.items():
        if not value:
            raise ValueError(f"{name} is empty: a number that does not say how it was measured cannot be compared.")
    generator = generator or torch.Generator().manual_seed(0)
    distance = frechet_distance(FeatureStatistics.of(samples), data_statistics or FeatureStatistics.of(data))
    kernel = kernel_distance(samples, data, generator=generator)
    # Recall depends on the two numbers, and precision on the density of the data: as many of both.
    chosen = data[torch.randperm(len(data), generator=generator)[: len(samples)]]
    shares = precision_recall(samples, chosen)
    return SampleQuality(
        distance, kernel, *shares, len(samples), len(data), extractor, reference, sampler, evaluations, seeds, data.shape[1]
    )  # fmt: skip
