"""What a run shows and saves of its network: pipelines of the averaged weights, grids of samples, model cards, uploads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..export import Network, save_pipeline
from ..model_card import model_card
from . import run_folder
from .averages import ExponentialAverage
from .evaluation import Evaluation
from .hub_upload import HubUpload
from .sampling import sample_grid
from .stop_signal import settle_communication
from .training_log import TrainingLog, log_picture, tracker_may_fail
from .validation import Validation

logger = logging.getLogger(__name__)


class PipelineSaver:
    """Pipelines of copied weights: sampling and saving leave the trained ones alone. Methods are collective.

    Args:
        accelerator: the training's Accelerator.
        output_dir: the run's folder.
        network: the network that is trained, as it was before it was prepared.
        make_pipeline: makes the pipeline of a network after so many steps.
        ema: the average whose weights are saved. None: the network's own.
        evaluation: what measures the pipelines, for their cards.
        validation: what measures the networks.
        hub: where pipelines are uploaded. None: nowhere.
        num_samples: number of images in a grid.
        sampling: keyword arguments of `sample_grid`: seed, batch_size, num_inference_steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        network: Network,
        make_pipeline: Callable[[Network, int], DiffusionPipeline],
        *,
        ema: ExponentialAverage | None,
        evaluation: Evaluation | None,
        validation: Validation | None = None,
        hub: HubUpload | None,
        num_samples: int,
        sampling: Mapping[str, Any],
    ) -> None:
        self.accelerator, self.output_dir, self.network, self.ema = accelerator, output_dir, network, ema
        self.make_pipeline, self.evaluation, self.hub = make_pipeline, evaluation, hub
        self.measures = [measure for measure in (evaluation, validation) if measure is not None]
        self.num_samples, self.sampling = num_samples, dict(sampling)

    def averaged(self, step: int) -> DiffusionPipeline:
        """The pipeline after so many steps."""
        copied = type(self.network).from_config(self.network.config).to(self.accelerator.device).eval()
        copied.load_state_dict(self.network.state_dict())
        if self.ema is not None:
            self.ema.copy_to(copied)
        return self.make_pipeline(copied, step)

    def save_grid(self, pipeline: DiffusionPipeline, step: int) -> Path:
        """Sample a grid into the run's folder, and show it to the trackers."""
        grid = sample_grid(pipeline, self.num_samples, **self.sampling)
        path = self.output_dir / run_folder.SAMPLES / f"step-{step:07d}.png"
        if self.accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
            logger.info("Samples: %s", path)
            log_picture(self.accelerator, grid, step)
        return path

    def save_weights(self, pipeline: DiffusionPipeline) -> None:
        """Save the pipeline, and beside an average the network's own weights."""
        if self.accelerator.is_main_process:
            with run_folder.explained_write_errors("the pipeline", self.output_dir):
                save_pipeline(pipeline, self.output_dir, raw_network=None if self.ema is None else self.network)

    def save(self, step: int) -> None:
        """The pipeline, a grid of its samples, its card, and where asked for all of it on the Hub."""
        pipeline = self.averaged(step)
        self.save_weights(pipeline)
        grid = self.save_grid(pipeline, step)
        if self.accelerator.is_main_process:
            card = model_card(
                pipeline,
                repository=self.hub.repository if self.hub else str(self.output_dir),
                num_inference_steps=self.sampling["num_inference_steps"],
                grid=str(grid.relative_to(self.output_dir)),
                metrics=self.evaluation.metrics(step) if self.evaluation else None,
            )
            card.save(self.output_dir / "README.md")
            logger.info("Saved: %s", self.output_dir)
            if self.hub:
                self.hub.push(self.output_dir, f"Pipeline after {step} steps", grid)
        self.accelerator.wait_for_everyone()

    def evaluate(self, step: int, max_steps: int, log: TrainingLog) -> None:
        """Evaluate and validate the pipeline where that is due; the time does not count as training."""
        due = [measure for measure in self.measures if measure.due(step, max_steps)]
        if due:
            with log.paused():
                pipeline = self.averaged(step)
                for measure in due:
                    measure(pipeline, step)

    def end(self, patience: float = 1800) -> None:
        """Say what is on the Hub, waiting so many seconds for uploads, and end processes and trackers in order."""
        if self.hub is not None:
            self.hub.report(self.output_dir, patience)
        settle_communication()
        with tracker_may_fail():
            self.accelerator.end_training()
