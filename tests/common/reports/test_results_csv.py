import csv
import math
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from common.reports.results_csv import (
    ResultRow,
    add_rows,
    config_hash,
    log_rows,
    read_rows,
    result_rows,
    results_table,
)
from common.run.config import code_version


def row(**changes: Any) -> ResultRow:
    own = ResultRow("dale_ct_2s", "mil_probe", "ct_rate", "macro_auroc", 0.8333, n=3002, seeds="42")
    return own._replace(**changes)


def test_rows_of_an_evaluation_share_their_origin() -> None:
    numbers = {"macro_auroc": (0.7, 0.6, 0.8), "macro_f1": (math.nan, math.nan, math.nan)}
    origin = {"encoder": "merlin", "protocol": "frozen", "dataset": "rad_chestct", "n": 17, "seeds": "1 2"}
    first, second = result_rows(numbers, **origin, config={"lr": 0.1})
    assert first.numbers == (0.7, 0.6, 0.8)
    assert all(math.isnan(number) for number in second.numbers)
    for made in (first, second):
        assert {name: getattr(made, name) for name in origin} == origin
        assert (made.commit, made.config_hash) == (code_version(), config_hash({"lr": 0.1}))


def test_what_was_written_is_read_with_or_without_an_interval(tmp_path: Path) -> None:
    rows = [row(low=0.81, high=0.85, commit="abc"), row(metric="a"), row(metric="b", value=math.nan)]
    add_rows(tmp_path / "r.csv", rows)
    for back, made in zip(read_rows(tmp_path / "r.csv"), rows, strict=True):
        assert back.numbers == pytest.approx(made.numbers, nan_ok=True)
        assert (*back.key, *back[7:]) == (*made.key, *made[7:])


def test_rows_of_earlier_versions_are_read_and_keep_their_text(tmp_path: Path) -> None:
    header = "encoder,protocol,dataset,metric,value,low,high,n,seeds,commit,config_hash\n"
    earlier = (
        "2s,mil_probe,ct_rate,macro_auroc,0.591780,0.541069,nan,120,42,0dd0d2efba77,d6b6bf791c19\n"
        "2s,preprocessing_raw_48,ct_rate,slices_per_second,1349.204101,,,,,,\n"
    )
    (tmp_path / "r.csv").write_text(header + earlier)
    first, second = read_rows(tmp_path / "r.csv")
    assert (first.value, first.low, first.n) == (0.59178, 0.541069, 120)
    assert (second.value, second.n, second.commit) == (1349.204101, 0, "")
    assert math.isnan(first.high)
    assert math.isnan(second.low)
    add_rows(tmp_path / "r.csv", [row()])
    assert (tmp_path / "r.csv").read_text() == (
        header + earlier + "dale_ct_2s,mil_probe,ct_rate,macro_auroc,0.8333,,,3002,42,,\n"
    )


def test_row_of_the_same_key_is_replaced_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    add_rows(path, [row(), row(metric="macro_f1"), row(encoder="dale_ct_0")])
    add_rows(path, [row(metric="macro_f1", value=0.5, seeds="1"), row(dataset="rad_chestct")])
    rows = read_rows(path)
    assert [(r.encoder, r.dataset, r.metric) for r in rows] == [
        ("dale_ct_2s", "ct_rate", "macro_auroc"),
        ("dale_ct_2s", "ct_rate", "macro_f1"),
        ("dale_ct_0", "ct_rate", "macro_auroc"),
        ("dale_ct_2s", "rad_chestct", "macro_auroc"),
    ]
    assert (rows[1].value, rows[1].seeds) == (0.5, "1")


def test_table_is_plain_csv_with_the_tidy_columns(tmp_path: Path) -> None:
    add_rows(tmp_path / "r.csv", [row()])
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == "encoder protocol dataset metric value low high n seeds commit config_hash".split()
    assert len(lines) == 2


def _add(arguments: tuple[Path, int]) -> None:
    path, number = arguments
    add_rows(path, [row(encoder=f"encoder_{number}")])


def test_evaluations_that_end_together_lose_no_row(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(_add, [(tmp_path / "r.csv", number) for number in range(20)]))
    assert {r.encoder for r in read_rows(tmp_path / "r.csv")} == {f"encoder_{number}" for number in range(20)}


def test_foreign_csv_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"results must have the column 'encoder', got \['a', 'b'\] in '.*r.csv'"
    ):
        add_rows(path, [row()])
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("damage", ["0.5x", ""])
def test_a_value_that_is_no_number_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "r.csv"
    add_rows(path, [row(value=0.8333)])
    path.write_text(path.read_text().replace("0.8333", damage))
    with pytest.raises(ValueError, match="value, low, high and n must be numbers, got .* in '.*r.csv'"):
        read_rows(path)


def test_a_row_with_a_cell_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    add_rows(path, [row()])
    path.write_text(path.read_text()[:-1] + ",more\n")
    with pytest.raises(ValueError, match="results must have the columns .*, got .* in '.*r.csv'"):
        read_rows(path)


def test_missing_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"results must be a CSV file, got '.*none.csv', which does not exist"
    ):
        read_rows(tmp_path / "none.csv")


def row_of_mlflow_rows(
    protocol: str, metric: str, value: float, *interval: float, encoder: str = "dale_ct_2s"
) -> ResultRow:
    return ResultRow(encoder, protocol, "rad_chestct", metric, value, *interval, n=360)


def test_rows_become_a_finished_run_with_their_intervals(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    rows = [
        row_of_mlflow_rows("frozen", "macro_auroc", 0.7, 0.6, 0.8),
        row_of_mlflow_rows("frozen", "macro_f1", float("nan")),
        row_of_mlflow_rows("knn_5", "macro_auroc", 0.65),
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
            [row_of_mlflow_rows("a", "b", 1.0), row_of_mlflow_rows("a", "b", 1.0, encoder="dale_ct_0")],
            f"sqlite:///{tmp_path}/mlflow.db",
            "x",
        )


REPOSITORY = Path(__file__).resolve().parents[3]


def test_printed_table_has_a_row_an_encoder_and_the_four_metrics() -> None:
    rows = [row(), row(metric="macro_f1", value=0.51239)]
    rows += [row(encoder="prevalence", metric="macro_auroc", value=0.5), row(encoder="ct_fm", value=math.nan)]
    rows += [row(encoder="merlin", value=0.8, low=0.79, high=0.81)]
    table = results_table(rows)
    header = [str(column.header) for column in table.columns]
    assert header == ["encoder", "protocol", "dataset", "AUROC", "AUPRC", "F1", "BA", "volumes"]
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("dale_ct_2s", "mil_probe", "ct_rate", "0.8333", "", "0.5124", "", "3002"),
        ("prevalence", "mil_probe", "ct_rate", "0.5000", "", "", "", "3002"),
        ("ct_fm", "mil_probe", "ct_rate", "undefined", "", "", "", "3002"),
        ("merlin", "mil_probe", "ct_rate", "0.8000\n0.790-0.810", "", "", "", "3002"),
    ]


def test_module_prints_the_tables_it_is_given(tmp_path: Path) -> None:
    add_rows(tmp_path / "a.csv", [row()])
    add_rows(tmp_path / "b.csv", [row(encoder="merlin", dataset="rad_chestct")])
    command = [sys.executable, "-m", "common.reports.results_csv", tmp_path / "a.csv", tmp_path / "b.csv"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert ["dale_ct_2s", "mil_probe", "ct_rate", "0.8333", "3002"] in lines
    assert ["merlin", "mil_probe", "rad_chestct", "0.8333", "3002"] in lines
