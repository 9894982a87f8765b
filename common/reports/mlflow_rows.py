"""Rows of a results CSV in MLflow too, for evaluations that are not the run of an Ignite engine."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported

from mlflow.entities import Metric, Param, RunStatus  # noqa: E402 (see above)
from mlflow.tracking import MlflowClient  # noqa: E402 (see above)

from common.reports.results_csv import ResultRow  # noqa: E402 (see above)

MAX_METRICS_PER_CALL = 1000  # MLflow's own limit on a batch


def log_rows(rows: Sequence[ResultRow], tracking_uri: str, experiment: str) -> None:
    """Record results of one encoder as a finished MLflow run: metrics ``<protocol>/<metric>``, their origin.

    An interval becomes two more metrics, ``..._low`` and ``..._high``. An undefined value is left out, which
    says the same.

    Args:
        rows: results, all of one encoder and data set.
        tracking_uri: MLflow store or server.
        experiment: experiment to put the run in, made when missing.

    Raises:
        ValueError: if there is no row, or they are of several encoders or data sets.
    """
    origins = {(row.encoder, row.dataset) for row in rows}
    if len(origins) != 1:
        raise ValueError(f"rows must be of one encoder and data set, got {sorted(origins)}.")
    client = MlflowClient(tracking_uri)
    run = client.create_run(experiment_id(client, tracking_uri, experiment), run_name=rows[0].encoder)
    names = ("encoder", "dataset", "n", "seeds", "commit", "config_hash")
    client.log_batch(run.info.run_id, params=[Param(name, str(getattr(rows[0], name))) for name in names])
    milliseconds = int(time.time() * 1000)
    metrics = [
        Metric(f"{row.protocol}/{row.metric}{suffix}", number, milliseconds, 0)
        for row in rows
        for number, suffix in zip(row.numbers, ("", "_low", "_high"), strict=True)
        if math.isfinite(number)
    ]
    for first in range(0, len(metrics), MAX_METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + MAX_METRICS_PER_CALL])
    client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.FINISHED))


def experiment_id(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """Find an experiment by its name, or make it.

    Args:
        client: of the store.
        tracking_uri: the store.
        name: of the experiment.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return str(experiment.experiment_id)
    # MLflow would put the files of a database store under the working directory of the first run
    location = None
    if tracking_uri.startswith("sqlite:///"):
        database = Path(tracking_uri.removeprefix("sqlite:///")).resolve()
        location = (database.parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))
