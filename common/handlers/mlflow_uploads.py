"""Files of a run on their way to MLflow, in the background: training never waits for a server."""

import json
import logging
import os
import queue
import threading
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests import RequestException

from common.run.atomic_file import atomic_file

logger = logging.getLogger(__name__)

MEMORY = "mlflow_uploads.json"  # of the output folder: what is there already
WAIT_SECONDS = 600.0
"""How long the end of a run waits for what is under way."""


class Uploads:
    """Upload files that are new or have changed, one after the other, in a thread of its own.

    A file that cannot be uploaded costs one line of warning and is tried again by a resumed run.

    Args:
        client: of the store.
        run_id: MLflow run.
        folder: folder of the run; remembers what was uploaded.
        patterns: of files, relative to ``folder``.
    """

    def __init__(self, client: MlflowClient, run_id: str, folder: Path, patterns: list[str]) -> None:
        self.client = client
        self.run_id = run_id
        self.folder = folder
        self.patterns = patterns
        self.memory = folder / MEMORY
        known = json.loads(self.memory.read_text()) if self.memory.is_file() else {}
        self.done: dict[str, int] = known.get(run_id, {})
        self.asked = dict(self.done)
        self.waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="mlflow_uploads", daemon=True)
        self.thread.start()

    def start(self) -> None:
        """Queue the files that have changed since they were queued last, and return at once."""
        for path in sorted(path for pattern in self.patterns for path in self.folder.glob(pattern)):
            name, changed = path.relative_to(self.folder).as_posix(), path.stat().st_mtime_ns
            if self.asked.get(name) != changed:
                self.asked[name] = changed
                self.waiting.put(name)

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait for what is queued, but not for ever; nothing can be queued afterwards.

        Args:
            seconds: at most.
        """
        self.waiting.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            logger.warning("Uploads to MLflow did not end within %.0f s and are left undone.", seconds)

    def _work(self) -> None:
        while (name := self.waiting.get()) is not None:
            path = self.folder / name
            try:
                changed = path.stat().st_mtime_ns
                self.client.log_artifact(self.run_id, str(path), os.path.dirname(name) or None)
            except FileNotFoundError:  # a checkpoint that newer ones have replaced
                continue
            except (OSError, MlflowException, RequestException) as error:
                logger.warning("Could not upload '%s' to MLflow: %s", path, " ".join(str(error).split()))
                continue
            self.done[name] = changed
            with atomic_file(self.memory, "w") as file:
                json.dump({self.run_id: self.done}, file)
