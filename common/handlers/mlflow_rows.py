"""Rows of a results CSV in MLflow too, for evaluations that are not the run of an Ignite engine."""

import math
import os
import time

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported

from mlflow.entities import Metric, Param, RunStatus  # noqa: E402 (see above)
from mlflow.tracking import MlflowClient  # noqa: E402 (see above)

from common.handlers.mlflow_run import experiment_id  # noqa: E402 (see above)

MAX_METRICS_PER_CALL = 1000  # MLflow's own limit on a batch


def log_rows(rows: list[dict[str, str]], tracking_uri: str, experiment: str) -> None:
    """Record results of one encoder as a finished MLflow run: metrics ``<protocol>/<metric>``, their origin.

    An interval becomes two metrics more, ``..._low`` and ``..._high``. A value that is undefined is left out,
    which says the same.

    Args:
        rows: of :func:`common.handlers.results_table.add_rows`, all of one encoder and data set.
        tracking_uri: MLflow store or server.
        experiment: experiment to put the run in, made when missing.

    Raises:
        ValueError: if there is no row, or they are of several encoders or data sets.
    """
    origins = {(row["encoder"], row["dataset"]) for row in rows}
    if len(origins) != 1:
        raise ValueError(f"rows must be of one encoder and data set, got {sorted(origins)}.")
    client = MlflowClient(tracking_uri)
    run = client.create_run(experiment_id(client, tracking_uri, experiment), run_name=rows[0]["encoder"])
    names = ("encoder", "dataset", "n", "seeds", "commit", "config_hash")
    client.log_batch(run.info.run_id, params=[Param(name, rows[0][name]) for name in names])
    milliseconds = int(time.time() * 1000)
    metrics = [
        Metric(f"{row['protocol']}/{row['metric']}{suffix}", float(row[field]), milliseconds, 0)
        for row in rows
        for field, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
        if row[field] and math.isfinite(float(row[field]))
    ]
    for first in range(0, len(metrics), MAX_METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + MAX_METRICS_PER_CALL])
    client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.FINISHED))
