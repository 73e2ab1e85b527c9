"""Averages of the weights whose width is chosen after the training (Karras et al. 2024, arXiv 2312.02696, section 3)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..export import Network
from ..files import replacing
from .run_folder import SNAPSHOTS

# Widths of the two averages that are kept, as in the paper.
SIGMA_RELS = (0.05, 0.10)
FILE = "post_hoc_ema.safetensors"


class PostHocAverages:
    """Two power-function averages of a network's weights, in float32, of which snapshots are kept.

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
        """After each optimizer step."""
        for average in self._averages:
            average.update()

    def save(self, checkpoint: Path, output_dir: Path, step: int) -> None:
        """Into the checkpoint that is being written, and as a snapshot that rotation leaves alone."""
        state = {
            f"{number}.{name}": value.contiguous()
            for number, average in enumerate(self._averages)
            for name, value in average.state_dict().items()
        }
        save_file(state, checkpoint / FILE, metadata={"step": str(step)})
        with replacing(output_dir / SNAPSHOTS / f"step-{step:07d}.safetensors") as snapshot:
            shutil.copyfile(checkpoint / FILE, snapshot)

    def load(self, checkpoint: Path) -> None:
        """What `save` wrote.

        Raises:
            OSError, RuntimeError: the file is missing, or does not fit.
        """
        state = load_file(checkpoint / FILE)
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
    weights = solve_weights(*(torch.tensor(values, dtype=torch.float64) for values in (times, gammas, *wanted)))
    total: dict[str, Tensor] = {}
    for (path, prefix), weight in zip(places, weights.flatten().tolist(), strict=True):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safetensors' file is no dictionary)
                if name.startswith(prefix):
                    term = weight * file.get_tensor(name).to(torch.float64)
                    own = name.removeprefix(prefix)
                    total[own] = total[own] + term if own in total else term
    return {name: value.to(torch.float32) for name, value in total.items()}
