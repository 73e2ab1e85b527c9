"""The network of a training: new from a preset or a config file, or pretrained; checked against the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ..export import DIT_NULL_LABEL, Network, read_metadata
from .conditioning import Conditioning
from .presets import PRESETS

_KINDS: dict[str, type[Network]] = {"UNet2DModel": UNet2DModel, "DiTTransformer2DModel": DiTTransformer2DModel}


def pretrained_metadata(
    pretrained_model_name_or_path: str | None, cache_dir: str | None = None
) -> dict[str, Any] | None:
    """`read_metadata` of the pipeline that is trained further; None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    if pretrained_model_name_or_path is None:
        return None
    try:
        return read_metadata(pretrained_model_name_or_path, cache_dir=cache_dir)
    except OSError as error:
        raise ValueError(
            f"pretrained_model_name_or_path={pretrained_model_name_or_path!r} cannot be read: {error}"
        ) from error


def choose_network(
    shape: tuple[int, int, int],
    *,
    pretrained_model_name_or_path: str | None = None,
    model_config: str | None = None,
    latents: bool = False,
    **labels_and_cache: Any,
) -> tuple[Network, Conditioning]:
    """`pretrained_network` where a pipeline is given, else `new_network`; arguments and errors are theirs."""
    if pretrained_model_name_or_path is not None:
        return pretrained_network(pretrained_model_name_or_path, shape, latents=latents, **labels_and_cache)
    return new_network(shape, model_config=model_config, **labels_and_cache)


def new_network(
    shape: tuple[int, int, int],
    *,
    model_config: str | None = None,
    num_classes: int | None = None,
    class_dropout: float = 0.0,
    reorient: float = 0.0,
    cache_dir: str | None = None,
) -> tuple[Network, Conditioning]:
    """A network with random weights.

    Args:
        shape: (C, H, W) of the images or latents.
        model_config: as for `network_config`, of a `UNet2DModel` or `DiTTransformer2DModel`; sizes, channels and classes in
            it are replaced. None: the preset for images of this size.
        num_classes, class_dropout, reorient: as for `Conditioning`.
        cache_dir: where downloads are kept.

    Raises:
        ValueError: no such config, or a network that does not fit.
    """
    channels, side = shape[0], max(shape[1:])
    preset = "digits_12" if side <= 16 else "cifar10_32" if side <= 32 else "celeba_64"
    config = network_config(model_config or preset, cache_dir)
    name = config.get("_class_name", "UNet2DModel")
    if name not in _KINDS:
        raise ValueError(
            f"model_config={model_config!r} must be the config of a {' or a '.join(_KINDS)}, as the presets are: "
            f"{', '.join(PRESETS)}; got {name}."
        )
    transformer = _KINDS[name] is DiTTransformer2DModel
    conditioning = Conditioning(num_classes, class_dropout, reorient, transformer)
    table = "num_embeds_ada_norm" if transformer else "num_class_embeds"
    fitted = {"sample_size": side, "in_channels": channels, "out_channels": channels}
    network = _KINDS[name].from_config({**config, **fitted, table: conditioning.embeddings})
    fit_network(network, shape, conditioning)
    return network, conditioning


def network_config(name_or_path: str, cache_dir: str | None = None) -> dict[str, Any]:
    """The config of a network.

    Args:
        name_or_path: a name in `PRESETS`, a JSON file, or a Diffusers network, in a folder or on the Hub.
        cache_dir: where downloads are kept.

    Raises:
        ValueError: it is none of these.
    """
    try:
        if name_or_path not in PRESETS and not Path(name_or_path).is_file():
            return dict(UNet2DModel.load_config(name_or_path, cache_dir=cache_dir))
        config = json.loads(PRESETS.get(name_or_path, Path(name_or_path)).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    # Files, folders and the Hub's client each raise errors of their own.
    except Exception as error:
        raise ValueError(
            f"model_config={name_or_path!r} is neither a preset ({', '.join(PRESETS)}) nor a readable JSON file or network "
            f"of Diffusers: {error}"
        ) from error
    return config


def pretrained_network(
    pretrained_model_name_or_path: str,
    shape: tuple[int, int, int],
    *,
    num_classes: int | None = None,
    class_dropout: float = 0.0,
    reorient: float = 0.0,
    latents: bool = False,
    cache_dir: str | None = None,
) -> tuple[Network, Conditioning]:
    """The network of a saved pipeline. Only safetensors are read.

    Args:
        pretrained_model_name_or_path: a folder, or a repository on the Hub.
        shape: (C, H, W) of the images or latents.
        num_classes, class_dropout, reorient: as for `Conditioning`.
        latents: whether it is trained on latents.
        cache_dir: where downloads are kept.

    Raises:
        ValueError: it does not fit the images, or knows latents where there are images, its labels have other meanings, or its weights are not finite.
        OSError: there is no such pipeline.
    """
    where: dict[str, Any] = {"cache_dir": cache_dir}
    parts = DiffusionPipeline.load_config(pretrained_model_name_or_path, **where)
    if not latents and any((parts.get(part) or [None])[0] for part in ("vae", "vqvae")):
        raise ValueError(
            f"the network of {pretrained_model_name_or_path} knows latents of its autoencoder, and this run trains on images. "
            f"Pass a pipeline of images; or, to train a diffusion model on latents, vae={pretrained_model_name_or_path!r}."
        )
    transformer = "transformer" in parts
    kind: type[Network] = DiTTransformer2DModel if transformer else UNet2DModel
    network = kind.from_pretrained(
        pretrained_model_name_or_path, subfolder="transformer" if transformer else "unet", use_safetensors=True, **where
    )
    conditioning = Conditioning(num_classes, class_dropout, reorient, transformer)
    saved = read_metadata(pretrained_model_name_or_path, cache_dir=cache_dir) or {}
    now = {"num_classes": num_classes, "class_dropout": class_dropout, "reorient": reorient}
    for name, value in now.items():
        same = saved.get(name) == value if name == "num_classes" else bool(saved.get(name)) == bool(value)
        if name in saved and not same:
            raise ValueError(
                f"{name}={value!r}: the pretrained network's labels have other meanings: {name} was {saved[name]} and is "
                f"{value} now. Use the same."
            )
    if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
        raise ValueError(f"{pretrained_model_name_or_path}: the weights are not finite. Choose another checkpoint.")
    fit_network(network, shape, conditioning)
    return network, conditioning


def fit_network(network: Network, shape: tuple[int, int, int], conditioning: Conditioning) -> None:
    """Check a network against images of `shape` (C, H, W) and their labels, and set its config to that size.

    Raises:
        ValueError: it does not fit.
    """
    channels, height, width = shape
    config = network.config
    if (config["in_channels"], config["out_channels"]) != (channels, channels):
        raise ValueError(
            f"the pretrained network has {config['in_channels']} channels and the images have {channels}. "
            "Choose with image_mode=."
        )
    if isinstance(network, DiTTransformer2DModel):
        if {height, width} != {config["sample_size"]} or height % config["patch_size"]:
            raise ValueError(
                f"latents of {height}x{width} do not fit this DiTTransformer2DModel: sample_size "
                f"{config['sample_size']}, patch_size {config['patch_size']}. See resolution=."
            )
        if config["num_embeds_ada_norm"] != DIT_NULL_LABEL:
            raise ValueError(f"the network's num_embeds_ada_norm must be {DIT_NULL_LABEL}, as DiTPipeline assumes.")
        for module in network.modules():
            if isinstance(module, LabelEmbedding):
                # It would drop classes by itself, unseen by the targets, in each block anew.
                module.dropout_prob = 0.0
        return
    network.register_to_config(sample_size=height if height == width else (height, width))
    if conditioning.reorient and height != width:
        raise ValueError(
            f"reorient={conditioning.reorient}: quarter turns need square images; got {height}x{width}. Leave it out, or pass "
            "one side as resolution=."
        )
    if config["num_class_embeds"] != conditioning.embeddings:
        raise ValueError(
            f"the pretrained network knows {config['num_class_embeds'] or 'no'} classes and this run has "
            f"{conditioning.embeddings or 'none'}. Pass or leave out class_conditional=, class_dropout= and reorient= accordingly."
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    side = next((side for side in (height, width) if side % factor), None)
    if side is not None:
        raise ValueError(f"the side {side} of what the network sees must be a multiple of {factor}; see resolution=.")
    if config["time_embedding_type"] != "positional":
        raise ValueError(
            f"time_embedding_type {config['time_embedding_type']!r} takes the logarithm of timesteps that are negative "
            "or 0 here; use 'positional'."
        )


def compute_channels_last(network: nn.Module) -> None:
    """Have a network convert its images (B, C, H, W) to channels-last, which its layers then pass on.

    The weights stay as they are, so that what is saved, averaged or reduced over processes is not concerned.
    """

    def convert(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not inputs:
            return inputs, named | {"sample": named["sample"].contiguous(memory_format=torch.channels_last)}
        return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]), named

    network.register_forward_pre_hook(convert, with_kwargs=True)
