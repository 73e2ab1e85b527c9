"""Averages of the weights: an exponential one, and others whose width is chosen after the training."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..export import Network
from ..files import replacing
from .run_folder import SNAPSHOTS

# The exponential average, and those of post-hoc EMA, in a checkpoint.
AVERAGE, POST_HOC_AVERAGES = "ema.safetensors", "post_hoc_ema.safetensors"

# Widths of the two averages that post-hoc EMA keeps, as in the paper.
SIGMA_RELS = (0.05, 0.10)


class WeightAverage(ABC):
    """An average of a network's weights over the training, as a loop and its checkpoints use it."""

    @abstractmethod
    def step(self) -> None:
        """Take in the network's weights, after each optimizer step."""

    @abstractmethod
    def save(self, checkpoint: Path, output_dir: Path, step: int) -> None:
        """Write it into the checkpoint of `step`, which is being written, in the run's folder `output_dir`."""

    @abstractmethod
    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote. Raises whatever the reader raises where the file is missing, damaged, or of another
        network.
        """


class ExponentialAverage(WeightAverage):
    """An exponential moving average with warm-up, Diffusers' own `EMAModel`, in float32.

    Its decay after k steps is ``1 - (1 + k / inv_gamma)^-power``, at most `max_decay`.

    Args:
        network: the network.
        inv_gamma, power, max_decay: parameters of the decay.
    """

    def __init__(
        self, network: Network, *, inv_gamma: float = 1.0, power: float = 3 / 4, max_decay: float = 0.9999
    ) -> None:
        self._network = network
        self._average = EMAModel(
            network.parameters(), decay=max_decay, use_ema_warmup=True, inv_gamma=inv_gamma, power=power,
            foreach=network.device.type == "cuda",  # a few launches instead of some for each parameter
        )  # fmt: skip

    def step(self) -> None:
        self._average.step(self._network.parameters())

    def copy_to(self, network: Network) -> None:
        """Have another network of the same kind take the averaged weights."""
        self._average.copy_to(network.parameters())

    def save(self, checkpoint: Path, output_dir: Path, step: int) -> None:
        scalars = self._average.state_dict()
        averages = scalars.pop("shadow_params")
        names = [name for name, _ in self._network.named_parameters()]
        named = dict(zip(names, averages, strict=True))
        save_file(named, checkpoint / AVERAGE, metadata={"state": json.dumps(scalars)})

    def load(self, checkpoint: Path) -> None:
        with safe_open(checkpoint / AVERAGE, framework="pt") as file:
            averages = [file.get_tensor(name) for name, _ in self._network.named_parameters()]
            self._average.load_state_dict({**json.loads(file.metadata()["state"]), "shadow_params": averages})
        self._average.to(self._network.device)


class PostHocAverages(WeightAverage):
    """Two power-function averages of a network's weights, in float32, from whose snapshots `reconstruct` makes one of any
    width (Karras et al. 2024, arXiv 2312.02696, section 3).

    Args:
        network: the network; what is averaged is copied from it at each `step`.

    Raises:
        ValueError: the package ema-pytorch is not installed.
    """

    def __init__(self, network: Network) -> None:
        try:
            from ema_pytorch.post_hoc_ema import KarrasEMA
        except ImportError as error:
            raise ValueError(
                "averages of any width need the package ema-pytorch: pip install 'stf-diffusers[post-hoc-ema]'."
            ) from error
        with torch.device("cpu"):  # whatever the default device is
            self._averages = [
                KarrasEMA(
                    network,
                    sigma_rel=sigma_rel,
                    ema_model=type(network).from_config(network.config).to(network.device),
                    update_every=1,
                )
                for sigma_rel in SIGMA_RELS
            ]

    def step(self) -> None:
        with torch.device("cpu"):
            for average in self._averages:
                average.update()

    def save(self, checkpoint: Path, output_dir: Path, step: int) -> None:
        """Write them into the checkpoint, and as a snapshot that the rotation of checkpoints leaves alone."""
        state = {
            f"{number}.{name}": value.contiguous()
            for number, average in enumerate(self._averages)
            for name, value in average.state_dict().items()
        }
        save_file(state, checkpoint / POST_HOC_AVERAGES, metadata={"step": str(step)})
        with replacing(output_dir / SNAPSHOTS / f"step-{step:07d}.safetensors") as snapshot:
            shutil.copyfile(checkpoint / POST_HOC_AVERAGES, snapshot)

    def load(self, checkpoint: Path) -> None:
        state = load_file(checkpoint / POST_HOC_AVERAGES)
        for number, average in enumerate(self._averages):
            own = {name: state[f"{number}.{name}"] for name in average.state_dict()}
            average.load_state_dict(own)


def snapshots_of(output_dir: Path) -> list[Path]:
    """The snapshots that a run has left, oldest first."""
    return sorted((output_dir / SNAPSHOTS).glob("step-*.safetensors"))


def reconstruct(snapshots: Sequence[Path], sigma_rel: float) -> dict[str, Tensor]:
    """The weights averaged with width `sigma_rel` up to the last of the snapshots, in float32 (Algorithm 3).

    A least-squares combination of all snapshots; the more there are and the closer the width to those kept, the closer
    to the average that would have been kept with this width.

    Raises:
        ValueError: there are no snapshots, or the width is not in (0, 0.288), where the paper's relation has a solution.
    """
    from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights

    if not snapshots:
        raise ValueError("there are no snapshots. Train with post_hoc_ema=True.")
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie above 0 and below 0.288; got {sigma_rel}. The paper uses 0.01 to 0.25.")
    times, gammas, places = [], [], []
    for path in snapshots:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
        for number, kept in enumerate(SIGMA_RELS):
            times.append(step)
            gammas.append(sigma_rel_to_gamma(kept))
            places.append((path, f"{number}.ema_model."))

    wanted = [max(times)], [sigma_rel_to_gamma(sigma_rel)]
    weights = solve_weights(
        *(torch.tensor(values, dtype=torch.float64, device="cpu") for values in (times, gammas, *wanted))
    )
    total: dict[str, Tensor] = {}
    for (path, prefix), weight in zip(places, weights.flatten().tolist(), strict=True):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safetensors' file is not a dictionary)
                if name.startswith(prefix):
                    term = weight * file.get_tensor(name).to(torch.float64)
                    own = name.removeprefix(prefix)
                    total[own] = total[own] + term if own in total else term
    return {name: value.to(torch.float32) for name, value in total.items()}
