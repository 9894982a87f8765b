"""One MLflow run per training run: never merged into another, never left RUNNING by a crash."""

import getpass
import hashlib
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist  # noqa: E402 (see above)
import torch  # noqa: E402 (see above)
from ignite.engine import Engine, Events  # noqa: E402 (see above)
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag  # noqa: E402 (see above)
from mlflow.exceptions import MlflowException  # noqa: E402 (see above)
from mlflow.tracking import MlflowClient  # noqa: E402 (see above)
from requests import RequestException

from common.reports.results import code_version, experiment_id
from common.run.config import config_files, plain_knobs  # noqa: E402 (see above)
from common.run.files import atomic_file  # noqa: E402 (see above)

MEMORY_of_mlflow_uploads = "mlflow_uploads.json"  # of the output folder: what is there already
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
        self.memory = folder / MEMORY_of_mlflow_uploads
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


def dataset_input(path: str | Path, context: str) -> DatasetInput:
    """Describe a folder or file that a run reads.

    ``mlflow.data`` would import pandas and read the data; this looks at names and sizes only, and the digest
    is theirs.

    Args:
        path: folder of shards or embeddings, or a file.
        context: what it is to the run, such as "training".
    """
    place = Path(path).resolve()
    files = sorted((file.name, file.stat().st_size) for file in _files(place))
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    profile = json.dumps({"files": len(files), "bytes": sum(size for _, size in files)})
    source = json.dumps({"uri": place.as_uri()})
    name = "/".join(place.parts[-2:]).lstrip("/")
    dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])


def _files(place: Path) -> list[os.DirEntry[str] | Path]:
    if not place.is_dir():
        return [place]
    with os.scandir(place) as entries:
        return [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]


os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported


logger = logging.getLogger(__name__)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # names each table of a new store

MEMORY = "mlflow_run.json"  # of the output folder: which run it is
MAX_PARAM_CHARS = 6000  # MLflow's own limit on a parameter's value
MAX_PARAMS_PER_CALL = 100  # MLflow's own limit on a batch


class MLflowRun:
    """Record a run in MLflow: every knob, the terms of the loss, and files.

    MONAI's handler adopts whatever run is active and leaves it RUNNING when training fails, so that the next
    run's metrics land in it. Here a run belongs to an output folder: it is created when training starts at
    step 0, found again when training resumes, and ends FINISHED, FAILED (an exception) or KILLED (asked to
    stop). A thread uploads files, each once, also where a run is resumed. Attach it after the handlers whose
    files it uploads. Rank 0 alone records; others say that they failed, for then rank 0 waits for them
    until it is killed.

    Args:
        tracking_uri: MLflow store or server, such as ``sqlite:///mlflow.db`` or ``http://127.0.0.1:5000``.
        experiment: experiment to put the run in, made when missing.
        run_name: name shown in the list of runs.
        output_dir: folder the run writes to; remembers the run's id.
        config: executed config: its plain values become parameters and the whole an artifact.
        log_every: iterations between two records of the metrics.
        optimizer: its first learning rate is recorded as ``lr``.
        artifacts: patterns, relative to ``output_dir``, of files to upload: at the start, after a step and at
            the end.
        datasets: what each data set is to the run, such as "training", to its folder or file.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        output_dir: str | Path,
        config: dict[str, Any],
        log_every: int,
        optimizer: torch.optim.Optimizer | None = None,
        artifacts: list[str] | None = None,
        datasets: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.run_name = run_name
        self.output_dir = Path(output_dir)
        self.config = config
        self.log_every = log_every
        self.optimizer = optimizer
        self.artifacts = artifacts or []
        self.datasets = datasets or {}
        self.run_id = ""

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        if idist.get_rank() != 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._find)
            return
        self.client = MlflowClient(self.tracking_uri)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._log_if_due)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self._upload)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.last_step = engine.state.iteration
        if self.last_step == 0 or not self._go_on():
            self._create()
        self.uploads = Uploads(self.client, self.run_id, self.output_dir, self.artifacts)
        self._upload(engine)
        logger.info("MLflow run '%s' (%s) in '%s'.", self.run_name, self.run_id, self.tracking_uri)

    def _known(self) -> dict[str, str]:
        memory = self.output_dir / MEMORY
        return json.loads(memory.read_text()) if memory.is_file() else {}

    def _go_on(self) -> bool:
        """Take up the run of this folder; tell whether the store has it."""
        known = self._known()
        if known.get("tracking_uri") != self.tracking_uri:
            return False
        try:
            self.client.update_run(known["run_id"], status=RunStatus.to_string(RunStatus.RUNNING))
            if "error" in self.client.get_run(known["run_id"]).data.tags:  # of the attempt before
                self.client.delete_tag(known["run_id"], "error")
        except MlflowException as error:  # a relative store of another working directory, or one deleted
            logger.warning("The run goes on as a new one of MLflow, which lacks the old: %s", error)
            return False
        self.run_id = known["run_id"]
        # steps that a killed run recorded after its last checkpoint come again, with the same values
        recorded = self.client.get_metric_history(self.run_id, "loss")
        self.last_step = max([self.last_step, *(metric.step for metric in recorded)])
        return True

    def _find(self, engine: Engine) -> None:
        """On another rank: rank 0 has written down its run before any step is done."""
        self.run_id = self.run_id or self._known().get("run_id", "")

    def _create(self) -> None:
        experiment = experiment_id(self.client, self.tracking_uri, self.experiment)
        self.run_id = self.client.create_run(experiment, run_name=self.run_name).info.run_id
        params = [
            Param(name, str(value)[:MAX_PARAM_CHARS]) for name, value in plain_knobs(self.config).items()
        ]
        for first in range(0, len(params), MAX_PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=params[first : first + MAX_PARAMS_PER_CALL])
        tags = {
            "output_dir": str(self.output_dir.resolve()),
            "world_size": str(idist.get_world_size()),
            "mlflow.source.name": (config_files(sys.argv) or [Path(sys.argv[0]).name])[0],
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": code_version(),
            "mlflow.user": _user(),
        }
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        inputs = [dataset_input(path, context) for context, path in self.datasets.items()]
        self.client.log_inputs(self.run_id, inputs)
        self.client.log_dict(self.run_id, self.config, "executed_config.json")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.output_dir / MEMORY, "w") as file:
            json.dump({"tracking_uri": self.tracking_uri, "run_id": self.run_id}, file)

    def _log_if_due(self, engine: Engine) -> None:
        step = engine.state.iteration
        if step > self.last_step and (step % self.log_every == 0 or step == 1):
            self._log(engine)

    def _log(self, engine: Engine) -> None:
        state: Any = engine.state
        step = state.iteration
        values = {name: float(value) for name, value in state.metrics.items()}
        if step > self.last_step:  # else only what handlers measured after the last step is new
            values |= {name: float(value) for name, value in state.output[0].items()}
        if self.optimizer is not None and step > self.last_step:
            values["lr"] = self.optimizer.param_groups[0]["lr"]
        self.last_step = step
        milliseconds = int(time.time() * 1000)
        # a store may refuse NaN (an undefined class), and leaving the point out says the same
        metrics = [
            Metric(name, value, milliseconds, step) for name, value in values.items() if math.isfinite(value)
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    def _upload(self, engine: Engine) -> None:
        self.uploads.start()

    def _finish(self, engine: Engine) -> None:
        if engine.state.output:  # with what handlers measured at the end
            self._log(engine)
        stopped = getattr(engine.state, "stopped_early", False)
        if not stopped:  # whoever stops a run does not wait, and a resumed one uploads what is left
            self.uploads.start()
            self.uploads.wait()
        status = RunStatus.KILLED if stopped else RunStatus.FINISHED
        self.client.set_terminated(self.run_id, RunStatus.to_string(status))

    def _fail(self, engine: Engine, error: BaseException) -> None:
        if self.run_id:
            client = MlflowClient(self.tracking_uri)
            stopped = isinstance(error, KeyboardInterrupt)
            if not stopped:
                client.set_tag(self.run_id, "error", f"{type(error).__name__}: {error}"[:500])
            status = RunStatus.KILLED if stopped else RunStatus.FAILED
            client.set_terminated(self.run_id, RunStatus.to_string(status))
        raise error  # Ignite holds an exception for handled as soon as there is a handler


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())
