import csv
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from common.reports.results import (
    FIELDS,
    PREDICTION_COLUMNS,
    Predictions,
    ResultRow,
    add_rows,
    config_hash,
    log_rows,
    read_predictions,
    read_rows,
    result_rows,
    results_table,
    write_predictions,
)
from common.run.config import code_version

HEADER = ",".join(PREDICTION_COLUMNS)


def row(**changes: Any) -> ResultRow:
    made = ResultRow("dale_ct_2s", "mil_probe", "ct_rate", "macro_auroc", 0.8333, n=3002, seeds="42")
    return made._replace(**changes)


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


def _add(arguments: tuple[Path, int]) -> None:
    path, number = arguments
    add_rows(path, [row(encoder=f"encoder_{number}")])


def test_evaluations_that_end_together_lose_no_row(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(_add, [(tmp_path / "r.csv", number) for number in range(20)]))
    assert {r.encoder for r in read_rows(tmp_path / "r.csv")} == {f"encoder_{number}" for number in range(20)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"results must have the column 'encoder', got \['a', 'b'\] in '.*r.csv'"),
        (",".join(FIELDS) + "\ne,p,d,m,0.5x,,,1,,,\n", "n must be numbers, got .* in '.*r.csv'"),
        (",".join(FIELDS) + "\ne,p,d,m,,,,1,,,\n", "n must be numbers, got .* in '.*r.csv'"),
        (",".join(FIELDS) + "\ne,p,d,m,1,,,1,,,,more\n", "results .* columns .*, got .* in '.*r.csv'"),
    ],
)
def test_a_foreign_or_damaged_csv_is_refused_and_kept(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        add_rows(path, [row()])
    assert path.read_text() == text


def predictions() -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions(
        "dale_ct_2s",
        ["valid_1_a_1", "valid_1_a_2", "valid_10_b_1"],
        ["Emphysema", "Nodule, solid"],
        rng.random((3, 2)),
        np.array([0.1 + 0.2, 1e-9]),
        np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
    )


def test_predictions_are_a_plain_csv_and_come_back_to_the_last_bit(tmp_path: Path) -> None:
    write_predictions(tmp_path / "test.csv", predictions())
    with (tmp_path / "test.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert ",".join(lines[0]) == "encoder,volume,class,probability,threshold,label"
    assert len(lines) == 1 + 3 * 2
    assert lines[2][:3] == ["dale_ct_2s", "valid_1_a_1", "Nodule, solid"]
    assert lines[2][4:] == ["1e-09", "1"]
    back = read_predictions(tmp_path / "test.csv")
    for name, value in predictions()._asdict().items():
        np.testing.assert_array_equal(getattr(back, name), value)
        assert type(getattr(back, name)) is type(value)


@pytest.mark.parametrize(("read", "name"), [(read_rows, "results"), (read_predictions, "predictions")])
def test_a_missing_file_is_refused(tmp_path: Path, read: Any, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}.*none.csv"):
        read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"predictions must have the column 'encoder', got \['a', 'b'\] in '.*test.csv'"),
        (HEADER + "\n", "No predictions in '.*test.csv'"),
        (HEADER + "\ne,v,A,0.1.2,0.5,1\n", r"Cannot read '.*test.csv': could .* '0.1.2'"),
        (HEADER + "\ne,v,A,0.1\n", "Cannot read '.*test.csv': could not"),
        (HEADER + "\ne,v,A,0,0,1\ne,v,B,0,0,1\ne,w,B,0,0,1\n", "got 3 rows of 2 volumes and 2 classes"),
    ],
)
def test_foreign_or_damaged_predictions_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "test.csv")


def test_rows_become_a_finished_run_with_their_intervals(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    rows = [
        row(protocol="frozen", value=0.7, low=0.6, high=0.8),
        row(protocol="frozen", metric="macro_f1", value=math.nan),
        row(protocol="knn_5", value=0.65),
    ]
    log_rows(rows, uri, "eval_ct_rate")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("eval_ct_rate")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {
        "frozen/macro_auroc": 0.7,
        "frozen/macro_auroc_low": 0.6,
        "frozen/macro_auroc_high": 0.8,
        "knn_5/macro_auroc": 0.65,
    }
    assert run.data.params["n"] == "3002"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "dale_ct_2s")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], r"got \[\]"), ([row(), row(encoder="dale_ct_0")], r"\('dale_ct_0', 'ct_rate'\), \('dale_ct_2s'")],
)
def test_a_run_needs_rows_of_one_encoder(tmp_path: Path, rows: list[ResultRow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_rows(rows, f"sqlite:///{tmp_path}/mlflow.db", "x")


def test_printed_table_has_a_row_per_encoder_and_the_four_metrics() -> None:
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
