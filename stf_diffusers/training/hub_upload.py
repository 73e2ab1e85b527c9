"""Uploads of a run's pipeline to the Hub that never cost the run anything."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from pathlib import Path

from huggingface_hub import HfApi

from ..export import PIPELINE_PARTS

logger = logging.getLogger(__name__)

ATTEMPTS = 3
PIPELINE_FILES = ("README.md", "model_index.json", *(f"{part}/*" for part in PIPELINE_PARTS))


def copy_or_link(path: Path, copy: Path) -> None:
    """A copy; of weights a link, where the disk has links: weight files are replaced, never written into."""
    if path.suffix == ".safetensors":
        try:
            os.link(path, copy)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(path, copy)


class HubUpload:
    """A repository on the Hub for the pipeline of a run.

    Uploads run beside the training, in order, from a snapshot of the files. One that fails is tried again, then
    reported; it never raises, and a Hub that does not answer stops nothing.

    Args:
        hub_model_id: the repository.
        hub_token: access token. None: that of `hf auth login`.
        private: whether a new repository is private.
        first_delay: seconds before the second attempt of an upload; each later one waits four times as long.

    Raises:
        ValueError: on creation, before the training: the Hub refuses the repository or cannot be reached.
    """

    def __init__(
        self, hub_model_id: str, hub_token: str | None = None, private: bool = False, first_delay: float = 2.0
    ) -> None:
        self.api = HfApi(token=hub_token)
        try:
            self.repository = self.api.create_repo(hub_model_id, private=private or None, exist_ok=True).repo_id
        # The client's versions differ in their HTTP library and its errors.
        except Exception as error:
            raise ValueError(
                f"the repository {hub_model_id} cannot be made or opened. Check hub_token= (or `hf auth login`) and hub_model_id=, "
                f"or train without push_to_hub= and upload afterwards. The client says: {error}"
            ) from error
        self.first_delay = first_delay
        self.missing: dict[str, str] = {}  # messages of the commits that are not on the Hub, and why
        self._last = ""
        self._pending: queue.Queue[tuple[Path, str]] = queue.Queue()
        # A daemon: a process that has finished does not wait for a Hub that hangs.
        threading.Thread(target=self._work, daemon=True).start()

    def push(self, folder: Path, message: str, grid: Path) -> None:
        """Have the pipeline, its card and its sample grid committed; no checkpoints, no logs. Returns at once."""
        self.missing[message] = "not finished"
        self._last = message
        try:
            snapshot = Path(tempfile.mkdtemp(prefix=".upload-", dir=folder))
            for pattern in (*PIPELINE_FILES, str(grid.relative_to(folder))):
                for path in folder.glob(pattern):
                    copy = snapshot / path.relative_to(folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy_or_link(path, copy)
        except OSError as error:
            self.missing[message] = f"the files could not be set aside: {error}"
            logger.warning("Nothing is uploaded to %s now: %s", self.repository, self.missing[message])
        else:
            self._pending.put((snapshot, message))

    def _work(self) -> None:
        while True:
            snapshot, message = self._pending.get()
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(self.first_delay * 4 ** (attempt - 1))
                try:
                    self.api.upload_folder(repo_id=self.repository, folder_path=snapshot, commit_message=message)
                # Whatever goes wrong on the way to the Hub, the training is worth more.
                except Exception as error:
                    self.missing[message] = f"{error} {error.__cause__ or ''}".strip()
                    logger.warning(
                        "Upload %d of %d to %s failed: %s",
                        attempt + 1,
                        ATTEMPTS,
                        self.repository,
                        self.missing[message],
                    )
                else:
                    del self.missing[message]
                    logger.info("Pushed to %s: %s.", self.repository, message)
                    break
            shutil.rmtree(snapshot, ignore_errors=True)
            self._pending.task_done()

    def report(self, folder: Path, patience: float = 1800) -> None:
        """At the end of the run: wait at most `patience` seconds for what is under way, then say what is not there."""
        end = time.monotonic() + patience
        while self._pending.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.05)
        if not self.missing:
            return
        missing = "; ".join(f"{message!r} ({reason})" for message, reason in self.missing.items())
        if self._last in self.missing:
            logger.error(
                "NOT on the Hub: %s. The pipeline is complete in %s; upload it with `hf upload %s %s . %s`.",
                missing, folder, self.repository, folder,
                " ".join(f"--include '{pattern}'" for pattern in (*PIPELINE_FILES, "samples/*")),
            )  # fmt: skip
        else:
            logger.error("The last pipeline is on the Hub; these commits before it are not: %s.", missing)
