import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.reports.results_csv import ResultRow, add_rows
from common.reports.results_table import results_table

REPOSITORY = Path(__file__).resolve().parents[3]


def row(**changes: Any) -> ResultRow:
    own = ResultRow("dale_ct_2s", "mil_probe", "ct_rate", "macro_auroc", 0.8333, n=3002, seeds="42")
    return own._replace(**changes)


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
    command = [sys.executable, "-m", "common.reports.results_table", tmp_path / "a.csv", tmp_path / "b.csv"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line.split() for line in answer.stdout.splitlines()]
    assert ["dale_ct_2s", "mil_probe", "ct_rate", "0.8333", "3002"] in lines
    assert ["merlin", "mil_probe", "rad_chestct", "0.8333", "3002"] in lines
