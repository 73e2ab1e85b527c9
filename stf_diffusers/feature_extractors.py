"""Features of images, computed by a pretrained network."""

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

from .precision import full_precision


@dataclass(frozen=True)
class FeatureExtractor:
    """Features of images, computed by a network that is not trained.

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
            images: (n, C, H, W) uint8 pixels; C of 1 (grey) or 3 (RGB), or 4 (transparency is ignored).

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
        ValueError: it is not a vision model, or some of its weights are missing.
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
            f"{pretrained_model_name_or_path} lacks weights: {sorted(missing)[:5]}. Its features would be random."
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

    # A folder's path says nothing about the network, and is private.
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
