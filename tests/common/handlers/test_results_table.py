import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine

from common.handlers import results_table as module
from common.handlers.results_table import (
    FIELDS,
    ResultsTable,
    add_rows,
    code_version,
    read_rows,
    results_table,
)
from common.metrics.multilabel import multilabel_report

REPOSITORY = Path(__file__).resolve().parents[3]


def row(**changes: str) -> dict[str, str]:
    values = {"encoder": "dale_ct_2s", "protocol": "mil_probe", "dataset": "ct_rate", "metric": "macro_auroc"}
    return dict.fromkeys(FIELDS, "") | values | {"value": "0.833300", "n": "3002", "seeds": "42"} | changes


class Bags:
    """Three test volumes, of which only the origin matters here."""

    def __init__(self, encoder: str) -> None:
        self.identity = {"encoder": encoder}

    def __len__(self) -> int:
        return 3


def evaluation(encoder: str = "dale_ct_2s", further_seeds: Sequence[int] = ()) -> Engine:
    """An engine that has trained and tested a probe."""
    engine = Engine(lambda engine, batch: None)
    report = multilabel_report(
        [[0.1, 0.2], [0.8, 0.3], [0.3, 0.1]], [[0, 0], [1, 0], [1, 0]], [0.5, 0.5], ["A", "B"]
    )
    floor = multilabel_report([[0.0, 0.0]] * 3, [[0, 0], [1, 0], [1, 0]], [0.0, 0.0], ["A", "B"])
    engine.state.reports = {"probe": report, "prevalence": floor}
    engine.state.intervals = {
        subject: {"macro": dict.fromkeys(report["macro"], (0.25, 0.75))}
        for subject in ("probe", "prevalence")
    }
    engine.state.seed_reports = [report, floor, floor] if further_seeds else [report]
    engine.further_seeds = list(further_seeds)
    engine.test_bags = Bags(encoder)
    return engine


def run(engine: Engine, path: Path) -> None:
    ResultsTable(path, protocol="mil_probe", dataset="ct_rate", seed=42, config={"lr": 0.1}).attach(engine)
    engine.run([0], max_epochs=1)


def test_evaluation_adds_four_rows_for_the_encoder_and_four_for_the_floor(tmp_path: Path) -> None:
    run(evaluation(), tmp_path / "results" / "eval_ct_rate.csv")
    rows = read_rows(tmp_path / "results" / "eval_ct_rate.csv")
    values = {(row["encoder"], row["metric"]): float(row["value"]) for row in rows}
    assert values == pytest.approx(
        {
            ("dale_ct_2s", "macro_auroc"): 1.0,
            ("dale_ct_2s", "macro_auprc"): 1.0,
            ("dale_ct_2s", "macro_f1"): 2 / 3,
            ("dale_ct_2s", "macro_balanced_accuracy"): 0.75,
            ("prevalence", "macro_auroc"): 0.5,
            ("prevalence", "macro_auprc"): 2 / 3,
            ("prevalence", "macro_f1"): 0.8,
            ("prevalence", "macro_balanced_accuracy"): 0.5,
        },
        abs=1e-6,
    )
    assert {row["n"] for row in rows} == {"3"}
    assert {(row["low"], row["high"]) for row in rows} == {("0.250000", "0.750000")}
    assert {(row["encoder"], row["seeds"]) for row in rows} == {("dale_ct_2s", "42"), ("prevalence", "")}
    assert len({row["config_hash"] for row in rows}) == 1


def test_further_seeds_add_four_rows_of_their_mean_and_range(tmp_path: Path) -> None:
    run(evaluation(further_seeds=(43, 44)), tmp_path / "r.csv")
    rows = {
        row["metric"]: row for row in read_rows(tmp_path / "r.csv") if row["protocol"] == "mil_probe_seeds"
    }
    assert len(rows) == 4
    auroc = rows["macro_auroc"]  # 1 with one seed and .5 with two
    assert [float(auroc[name]) for name in ("value", "low", "high")] == pytest.approx([2 / 3, 0.5, 1.0])
    assert (auroc["encoder"], auroc["seeds"], auroc["n"]) == ("dale_ct_2s", "42 43 44", "3")


def test_second_encoder_joins_and_a_second_run_replaces(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    run(evaluation(), path)
    run(evaluation("random"), path)
    first = read_rows(path)
    assert len(first) == 12
    run(evaluation("random"), path)
    assert read_rows(path) == first


def test_run_that_was_asked_to_stop_adds_nothing(tmp_path: Path) -> None:
    engine = evaluation()
    engine.state.stopped_early = True
    run(engine, tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()


def test_row_of_the_same_key_is_replaced_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    add_rows(path, [row(), row(metric="macro_f1"), row(encoder="dale_ct_0")])
    add_rows(path, [row(metric="macro_f1", value="0.5", seeds="1"), row(dataset="rad_chestct")])
    rows = read_rows(path)
    assert [(r["encoder"], r["dataset"], r["metric"]) for r in rows] == [
        ("dale_ct_2s", "ct_rate", "macro_auroc"),
        ("dale_ct_2s", "ct_rate", "macro_f1"),
        ("dale_ct_0", "ct_rate", "macro_auroc"),
        ("dale_ct_2s", "rad_chestct", "macro_auroc"),
    ]
    assert rows[1]["value"] == "0.5"


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
    assert {r["encoder"] for r in read_rows(tmp_path / "r.csv")} == {
        f"encoder_{number}" for number in range(20)
    }


def test_row_without_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"row must have the columns \('encoder', .*\), got \('encoder', 'value'\)"
    ):
        add_rows(tmp_path / "r.csv", [{"encoder": "x", "value": "1"}])


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
    add_rows(path, [row(value="0.8333")])
    path.write_text(path.read_text().replace("0.8333", damage))
    with pytest.raises(ValueError, match="value, low and high must be numbers, got .* in '.*r.csv'"):
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


def test_printed_table_has_a_row_an_encoder_and_the_four_metrics() -> None:
    rows = [
        row(metric=metric, value=value)
        for metric, value in (("macro_auroc", "0.8333"), ("macro_f1", "0.51239"))
    ]
    rows += [row(encoder="prevalence", metric="macro_auroc", value="0.5"), row(encoder="ct_fm", value="nan")]
    rows += [row(encoder="merlin", value="0.8", low="0.79", high="0.81")]
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
    command = [sys.executable, "-m", "common.handlers.results_table", tmp_path / "a.csv", tmp_path / "b.csv"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert ["dale_ct_2s", "mil_probe", "ct_rate", "0.8333", "3002"] in lines
    assert ["merlin", "mil_probe", "rad_chestct", "0.8333", "3002"] in lines


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A git repository with a copy of the module; returns a function that runs git there."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    copy = tmp_path / "results_table.py"
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
    (tmp_path / "results_table.py").write_text("changed")
    assert code_version() == f"{head[:12]}-dirty"


def test_version_of_code_that_git_does_not_know_is_unknown(checkout: Any, tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    checkout("add", "other.txt")
    checkout("commit", "-q", "-m", "x")
    assert code_version() == "unknown"


def test_version_without_git_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version() == "unknown"
