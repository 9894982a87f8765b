"""What is recorded of a run while it goes on: its pace, a progress bar, and its run in MLflow."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported

import ignite.distributed as idist  # noqa: E402 (see above)
import torch  # noqa: E402 (see above)
from ignite.engine import Engine, Events  # noqa: E402 (see above)
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402 (see above)
from mlflow.exceptions import MlflowException  # noqa: E402 (see above)
from mlflow.tracking import MlflowClient  # noqa: E402 (see above)
from requests import RequestException  # noqa: E402 (see above)
from tqdm import tqdm  # noqa: E402 (see above)

from common.run.config import code_version, experiment_id, plain_knobs, read_knobs  # noqa: E402 (see above)
from common.run.process import atomic_file  # noqa: E402 (see above)

logger = logging.getLogger(__name__)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # names each table of a new store

UPLOAD_SECONDS = 600.0
"""How long the end of a run waits for uploads."""

MAX_PARAM_CHARS = 6000  # MLflow's limit on the value of a parameter
MAX_PARAMS_PER_CALL = 100  # MLflow's limit on a batch


@dataclass(kw_only=True, eq=False)
class Throughput:
    """Measure the pace of a run and put it into ``engine.state.metrics``, for the handlers attached after it.

    ``<rate_name>`` is the number of items per second over all ranks; ``data_wait_share`` the share of the
    time that this rank waited for its batch; ``gpu_memory_gib`` the most memory allocated so far, on a GPU;
    ``mfu`` the share of the device's peak that went into the network, where the peak is known.

    Args:
        log_every: iterations between two measurements.
        items_per_step: items that one step over all ranks consumes.
        rate_name: name of their rate, such as "views_per_second".
        device: device of this rank.
        flops_per_step: operations of one step on this rank; 0 if nobody counted.
        peak_flops: operations per second that the device can do at best; None if unknown.
    """

    log_every: int
    items_per_step: int
    rate_name: str
    device: torch.device
    flops_per_step: float = 0
    peak_flops: float | None = None

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._want_batch)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._get_batch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure_if_due)

    def _start(self, engine: Engine) -> None:
        self.last_step, self.last_time, self.waited = engine.state.iteration, time.perf_counter(), 0.0

    def _want_batch(self, engine: Engine) -> None:
        self.wanted = time.perf_counter()

    def _get_batch(self, engine: Engine) -> None:
        self.waited += time.perf_counter() - self.wanted

    def _measure_if_due(self, engine: Engine) -> None:
        step = engine.state.iteration
        if step % self.log_every and step != 1:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what follows is the time of finished steps
            engine.state.metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        now = time.perf_counter()
        steps_per_second = (step - self.last_step) / (now - self.last_time)
        engine.state.metrics[self.rate_name] = steps_per_second * self.items_per_step
        engine.state.metrics["data_wait_share"] = self.waited / (now - self.last_time)
        if self.flops_per_step and self.peak_flops:
            engine.state.metrics["mfu"] = steps_per_second * self.flops_per_step / self.peak_flops
        self.last_step, self.last_time, self.waited = step, now, 0.0


@dataclass(kw_only=True, eq=False)
class Progress:
    """Show one bar over all steps of a run, on rank 0: step, rate, time left and some numbers.

    Args:
        log_every: steps between two updates, since reading the loss waits for the device.
        names: terms of ``engine.state.output[0]`` and of ``engine.state.metrics`` to show.
        unit: what one iteration is, "step" or "volume".
    """

    log_every: int
    names: list[str]
    unit: str = "step"

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine; does nothing on ranks other than 0."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self._open)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
            engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def _open(self, engine: Engine) -> None:
        state: Any = engine.state
        self.total = state.max_epochs * state.epoch_length
        self.bar = tqdm(total=self.total, initial=state.iteration, unit=self.unit, dynamic_ncols=True)

    def _update(self, engine: Engine) -> None:
        state: Any = engine.state
        if state.iteration % self.log_every and state.iteration != self.total:
            return
        known = {**state.metrics, **state.output[0]}
        shown = {name: f"{float(known[name]):.4g}" for name in self.names if name in known}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(state.iteration - self.bar.n)


@dataclass(kw_only=True, eq=False)
class MLflowRun:
    """Record a run in MLflow: every knob, the terms of the loss, and files.

    MONAI's handler adopts whatever run is active and leaves it RUNNING when training fails, so that the next
    run's metrics land in it. Here a run belongs to an output folder: it is created when training starts at
    step 0, found again when training resumes, and ends FINISHED, FAILED (an exception) or KILLED (asked to
    stop). A thread uploads files, each once, also where a run is resumed. Attach it after the handlers whose
    files it uploads. Rank 0 alone records; others report an exception of theirs, since rank 0 then waits for
    them until it is killed.

    Args:
        tracking_uri: MLflow store or server, such as ``sqlite:///mlflow.db`` or ``http://127.0.0.1:5000``.
        experiment: experiment to put the run in, made when missing.
        run_name: name shown in the list of runs.
        output_dir: folder the run writes to; remembers the run's id.
        config: executed config: its plain values become parameters and the whole an artifact.
        log_every: iterations between two records of the metrics.
        artifacts: patterns, relative to ``output_dir``, of files to upload: at the start, after the first
            step and at the end.
        datasets: what each data set is to the run, such as "training", to its folder or file.
        optimizer: optimizer whose first learning rate is recorded as ``lr``, if there is one.
    """

    tracking_uri: str
    experiment: str
    run_name: str
    output_dir: str | Path
    config: dict[str, Any]
    log_every: int
    artifacts: list[str]
    datasets: Mapping[str, str | Path]
    optimizer: torch.optim.Optimizer | None = None

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        self.run_id, self.memory = "", Path(self.output_dir) / "mlflow_run.json"  # which run is the folder's
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        if idist.get_rank() != 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._find)
            return
        self.client = MlflowClient(self.tracking_uri)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._log_if_due)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: self.uploads.start())
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.last_step = engine.state.iteration
        if self.last_step == 0 or not self._resume():
            self._create()
        self.uploads = Uploads(self.client, self.run_id, Path(self.output_dir), self.artifacts)
        self.uploads.start()
        logger.info("MLflow run '%s' (%s) in '%s'.", self.run_name, self.run_id, self.tracking_uri)

    def _remembered(self) -> dict[str, str]:
        return dict(json.loads(self.memory.read_text())) if self.memory.is_file() else {}

    def _resume(self) -> bool:
        """Take up the run of this folder; tell whether the store has it."""
        known = self._remembered()
        if known.get("tracking_uri") != self.tracking_uri:
            return False
        try:
            self.client.update_run(known["run_id"], status="RUNNING")
            if "error" in self.client.get_run(known["run_id"]).data.tags:  # of the attempt before
                self.client.delete_tag(known["run_id"], "error")
        except MlflowException as error:  # a relative store of another working directory, or one deleted
            logger.warning("MLflow no longer has this run, which goes on as a new one: %s", error)
            return False
        self.run_id = known["run_id"]
        # steps that a killed run recorded after its last checkpoint come again, with the same values
        recorded = self.client.get_metric_history(self.run_id, "loss")
        self.last_step = max([self.last_step, *(metric.step for metric in recorded)])
        return True

    def _find(self, engine: Engine) -> None:
        """On another rank: rank 0 has written down its run before any step is done."""
        self.run_id = self.run_id or self._remembered().get("run_id", "")

    def _create(self) -> None:
        experiment = experiment_id(self.client, self.tracking_uri, self.experiment)
        self.run_id = self.client.create_run(experiment, run_name=self.run_name).info.run_id
        params = [
            Param(name, str(value)[:MAX_PARAM_CHARS]) for name, value in plain_knobs(self.config).items()
        ]
        for first in range(0, len(params), MAX_PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=params[first : first + MAX_PARAMS_PER_CALL])
        tags = {
            "output_dir": str(self.memory.parent.resolve()),
            "world_size": str(idist.get_world_size()),
            "mlflow.source.name": str(read_knobs(sys.argv).get("config_file", Path(sys.argv[0]).name)),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": code_version(),
            "mlflow.user": _user(),
        }
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        inputs = [dataset_input(path, context) for context, path in self.datasets.items()]
        self.client.log_inputs(self.run_id, inputs)
        self.client.log_dict(self.run_id, self.config, "executed_config.json")
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.memory, "w") as file:
            json.dump({"tracking_uri": self.tracking_uri, "run_id": self.run_id}, file)

    def _log_if_due(self, engine: Engine) -> None:
        step = engine.state.iteration
        if step > self.last_step and (step % self.log_every == 0 or step == 1):
            self._log(engine)

    def _log(self, engine: Engine) -> None:
        state: Any = engine.state
        values = dict(state.metrics)
        if state.iteration > self.last_step:  # else only what handlers measured after the last step is new
            values |= state.output[0]
            if self.optimizer is not None:
                values["lr"] = self.optimizer.param_groups[0]["lr"]
        self.last_step = state.iteration
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, state.iteration) for name, value in values.items()]
        # a store may refuse NaN (an undefined class), and leaving the point out says the same
        finite = [metric for metric in metrics if math.isfinite(metric.value)]
        self.client.log_batch(self.run_id, metrics=finite)

    def _finish(self, engine: Engine) -> None:
        if engine.state.output:  # with what handlers measured at the end
            self._log(engine)
        stopped = getattr(engine.state, "exit_status", 0)
        if not stopped:  # whoever stops a run does not wait, and a resumed one uploads what is left
            self.uploads.start()
            self.uploads.wait()
        self.client.set_terminated(self.run_id, "KILLED" if stopped else "FINISHED")

    def _fail(self, engine: Engine, error: BaseException) -> None:
        if self.run_id:
            client = MlflowClient(self.tracking_uri)
            stopped = isinstance(error, KeyboardInterrupt)
            if not stopped:
                client.set_tag(self.run_id, "error", f"{type(error).__name__}: {error}"[:500])
            client.set_terminated(self.run_id, "KILLED" if stopped else "FAILED")
        raise error  # Ignite takes an exception for handled as soon as there is a handler


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())


def dataset_input(path: str | Path, context: str) -> DatasetInput:
    """Describe a folder or file that a run reads.

    ``mlflow.data`` would import pandas and read the data; this looks at names and sizes only, and the digest
    is theirs.

    Args:
        path: folder of shards or embeddings, or a file.
        context: what it is to the run, such as "training".
    """
    place = Path(path).resolve()
    found = [file for file in place.iterdir() if file.is_file()] if place.is_dir() else [place]
    files = sorted((file.name, file.stat().st_size) for file in found if not file.name.startswith("."))
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    profile = json.dumps({"files": len(files), "bytes": sum(size for _, size in files)})
    source = json.dumps({"uri": place.as_uri()})
    name = "/".join(place.parts[-2:]).lstrip("/")
    dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])


class Uploads:
    """Upload files that are new or have changed to MLflow, one after the other, in a thread of its own.

    A file that cannot be uploaded costs one line of warning and is tried again by a resumed run.

    Args:
        client: client of the store.
        run_id: MLflow run.
        folder: folder of the run; remembers what was uploaded.
        patterns: patterns of the files, relative to ``folder``.
    """

    def __init__(self, client: MlflowClient, run_id: str, folder: Path, patterns: list[str]) -> None:
        self.client = client
        self.run_id = run_id
        self.folder = folder
        self.patterns = patterns
        self.memory = folder / "mlflow_uploads.json"
        known = json.loads(self.memory.read_text()) if self.memory.is_file() else {}
        self.done: dict[str, int] = known.get(run_id, {})
        self.queued = dict(self.done)
        self.waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="mlflow_uploads", daemon=True)
        self.thread.start()

    def start(self) -> None:
        """Queue the files that have changed since they were queued last, and return at once."""
        for path in sorted(path for pattern in self.patterns for path in self.folder.glob(pattern)):
            name, changed = path.relative_to(self.folder).as_posix(), path.stat().st_mtime_ns
            if self.queued.get(name) != changed:
                self.queued[name] = changed
                self.waiting.put(name)

    def wait(self, seconds: float = UPLOAD_SECONDS) -> None:
        """Wait for what is queued, but not forever; nothing can be queued afterwards.

        Args:
            seconds: longest wait.
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
