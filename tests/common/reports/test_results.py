import csv
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from common.reports import results as module
from common.reports.results import (
    PREDICTION_COLUMNS,
    Predictions,
    ResultRow,
    add_rows,
    code_version,
    config_hash,
    log_rows,
    read_predictions,
    read_rows,
    result_rows,
    results_table,
    write_predictions,
)


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
    with pytest.raises(FileNotFoundError, match="results.*none.csv"):
        read_rows(tmp_path / "none.csv")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A git repository with a copy of the module; returns a function that runs git there."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    copy = tmp_path / "results.py"
    shutil.copy(module.__file__, copy)
    monkeypatch.setattr(module, "__file__", str(copy))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_DIR", raising=False)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    return git


def test_version_is_the_commit_and_says_when_files_differ(checkout: Any, tmp_path: Path) -> None:
    checkout("add", ".")
    checkout("commit", "-q", "-m", "x")
    head = checkout("rev-parse", "HEAD")
    assert code_version() == head[:12]
    (tmp_path / "results.py").write_text("changed")
    assert code_version() == f"{head[:12]}-dirty"


def test_version_of_code_that_git_does_not_know_is_unknown(checkout: Any, tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    checkout("add", "other.txt")
    checkout("commit", "-q", "-m", "x")
    assert code_version() == "unknown"


def test_version_without_git_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version() == "unknown"


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


def test_predictions_come_back_to_the_last_bit(tmp_path: Path) -> None:
    write_predictions(tmp_path / "test.csv", predictions())
    back = read_predictions(tmp_path / "test.csv")
    for name, value in predictions()._asdict().items():
        np.testing.assert_array_equal(getattr(back, name), value)
        assert type(getattr(back, name)) is type(value)


def test_file_is_a_plain_csv_of_one_row_for_each_volume_and_class(tmp_path: Path) -> None:
    write_predictions(tmp_path / "test.csv", predictions())
    lines = (tmp_path / "test.csv").read_text().splitlines()
    assert lines[0] == "encoder,volume,class,probability,threshold,label"
    assert len(lines) == 1 + 3 * 2
    assert lines[2].startswith('dale_ct_2s,valid_1_a_1,"Nodule, solid",')
    assert lines[2].endswith(",1e-09,1")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="predictions.*none.csv"):
        read_predictions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"predictions must have the column 'encoder', got \['a', 'b'\] in '.*test.csv'"),
        (",".join(PREDICTION_COLUMNS) + "\n", "No predictions in '.*test.csv'"),
        (
            ",".join(PREDICTION_COLUMNS) + "\ne,v,A,0.1.2,0.5,1\n",
            r"Cannot read '.*test.csv': could .* '0.1.2'",
        ),
        (",".join(PREDICTION_COLUMNS) + "\ne,v,A,0.1\n", "Cannot read '.*test.csv': could not"),
    ],
)
def test_foreign_or_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "test.csv")


def test_file_that_lacks_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    write_predictions(path, predictions())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[4:]]))
    message = "one row for each volume and class, volume by volume, got 5 rows of 3 volumes and 2 classes"
    with pytest.raises(ValueError, match=message):
        read_predictions(path)


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
    command: list[object] = [
        sys.executable,
        "-m",
        "common.reports",
        "results",
        tmp_path / "a.csv",
        tmp_path / "b.csv",
    ]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert ["dale_ct_2s", "mil_probe", "ct_rate", "0.8333", "3002"] in lines
    assert ["merlin", "mil_probe", "rad_chestct", "0.8333", "3002"] in lines
