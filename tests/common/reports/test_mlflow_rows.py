from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from common.reports.mlflow_rows import log_rows
from common.reports.results_csv import ResultRow


def row(protocol: str, metric: str, value: float, *interval: float, encoder: str = "dale_ct_2s") -> ResultRow:
    return ResultRow(encoder, protocol, "rad_chestct", metric, value, *interval, n=360)


def test_rows_become_a_finished_run_with_their_intervals(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    rows = [
        row("frozen", "macro_auroc", 0.7, 0.6, 0.8),
        row("frozen", "macro_f1", float("nan")),
        row("knn_5", "macro_auroc", 0.65),
    ]
    log_rows(rows, uri, "eval_rad_chestct")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("eval_rad_chestct")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {
        "frozen/macro_auroc": 0.7,
        "frozen/macro_auroc_low": 0.6,
        "frozen/macro_auroc_high": 0.8,
        "knn_5/macro_auroc": 0.65,
    }
    assert run.data.params["n"] == "360"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "dale_ct_2s")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_rows_of_several_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows must be of one encoder and data set, got \[\]"):
        log_rows([], f"sqlite:///{tmp_path}/mlflow.db", "x")
    with pytest.raises(ValueError, match=r"got \[\('dale_ct_0', 'rad_chestct'\), \('dale_ct_2s'"):
        log_rows(
            [row("a", "b", 1.0), row("a", "b", 1.0, encoder="dale_ct_0")],
            f"sqlite:///{tmp_path}/mlflow.db",
            "x",
        )
