"""Uploads of a run's pipeline to the Hub that never cost the run anything."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from huggingface_hub import HfApi

logger = logging.getLogger("train_unconditional_stf")

ATTEMPTS = 3


class HubUpload:
    """A repository on the Hub for the pipeline of a run.

    An upload that fails is tried again, then reported; it never raises.

    Raises:
        ValueError: when made, before the training: the Hub refuses the repository or cannot be reached.
    """

    def __init__(self, name: str, token: str | None, private: bool, first_delay: float = 2.0) -> None:
        self.api = HfApi(token=token)
        try:
            self.repository = self.api.create_repo(name, private=private or None, exist_ok=True).repo_id
        # The client's versions differ in their HTTP library and its errors.
        except Exception as error:
            raise ValueError(
                f"--push_to_hub: the repository {name} cannot be made or opened. Check --hub_token (or `hf auth login`) "
                f"and --hub_model_id, or train without --push_to_hub and upload afterwards. The client says: {error}"
            ) from error
        self.first_delay = first_delay
        self.failure: str | None = None

    def push(self, folder: Path, message: str, grid: Path) -> None:
        """Commit the pipeline, its card and its sample grid; no checkpoints, no logs."""
        patterns = [
            "README.md",
            "model_index.json",
            "scheduler/*",
            "unet/*",
            "unet_raw/*",
            str(grid.relative_to(folder)),
        ]
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self.first_delay * 4 ** (attempt - 1))
            try:
                self.api.upload_folder(
                    repo_id=self.repository, folder_path=folder, allow_patterns=patterns, commit_message=message
                )
            # Whatever goes wrong on the way to the Hub, the training is worth more.
            except Exception as error:
                self.failure = f"{error} {error.__cause__ or ''}".strip()
                logger.warning("Upload %d of %d to %s failed: %s", attempt + 1, ATTEMPTS, self.repository, self.failure)
            else:
                self.failure = None
                logger.info("Pushed to %s: %s.", self.repository, message)
                return

    def report(self, folder: Path) -> None:
        """At the end of the run: say so where the last upload did not succeed."""
        if self.failure is not None:
            logger.error(
                "NOT on the Hub: the last upload to %s failed (%s). The pipeline is complete in %s; upload it with "
                "`hf upload %s %s . --exclude 'checkpoint-*/*' 'logs/*'`.",
                self.repository, self.failure, folder, self.repository, folder,
            )  # fmt: skip
