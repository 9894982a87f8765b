import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.reports.results import NAN, ResultRow, add_rows
from docs.render_results import cell

REPOSITORY = Path(__file__).resolve().parents[2]
PAPER = REPOSITORY / "docs" / "paper_results.csv"


def row(protocol: str, metric: str, *numbers: float, dataset: str = "rad_chestct") -> ResultRow:
    return ResultRow("dale_ct_2s", protocol, dataset, metric, *numbers)._replace(n=41)


def rendered(path: Path, *further: str) -> str:
    command = [sys.executable, "-m", "docs.render_results", str(path), *further]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_rows_stand_in_their_tables_with_intervals_costs_and_the_papers_figures(tmp_path):
    rows = [
        row("frozen", "macro_auroc", 0.601, 0.5238, 0.6693),
        row("frozen", "macro_f1", 0.254),
        row("retrained-frozen", "macro_auroc", -0.1075, -0.2252, 0.0085),
        row("preprocessing_raw_144", "macro_auroc", 0.8, dataset="ct_rate"),
        row("preprocessing_raw_144", "slices_per_second", 349.2, dataset="ct_rate"),
        row("preprocessing_raw_144", "tokens_per_slice", 82.0, dataset="ct_rate"),
        row("retrieval", "macro_recall_at_5", 0.1, dataset="ct_rate"),
    ]
    add_rows(tmp_path / "results.csv", rows)
    text = rendered(tmp_path / "results.csv", "--paper")
    assert "| frozen | .601 (.524 to .669) |  | .254 |  | 41 | .6342 / .3732 / .2824 / .5391 |" in text
    assert "| retrained-frozen | -.107 (-.225 to +.009) |" in text.replace("-.108", "-.107")
    assert "| preprocessing_raw_144 | .800 |  |  |  | 41 | 349 | 82 | .8183 / .5186 / .5015 / .7045 |" in text
    assert "Table III" not in text
    assert "paper" not in rendered(tmp_path / "results.csv")


@pytest.mark.parametrize("bundle", ["eval_rad_chestct", "eval_preprocessing", "eval_ct_rate"])
def test_model_cards_state_the_papers_figures_as_the_table_does(bundle):
    card = (REPOSITORY / "bundles" / bundle / "docs" / "README.md").read_text()
    with PAPER.open(newline="") as file:
        known = {
            " / ".join(row[name] for name in ("auroc", "auprc", "f1", "balanced_accuracy"))
            for row in csv.DictReader(file)
        }
    stated = re.findall(r"\| (\.\d{4} / \.\d{4} / \.\d{4} / \.\d{4}) \|", card)
    assert stated
    assert set(stated) <= known


@pytest.mark.parametrize(
    ("value", "signed", "expected"),
    [(0.6014, False, ".601"), (-0.05, True, "-.050"), (10.04, True, "+10.040"), (NAN, False, "")],
)
def test_numbers_are_written_as_in_the_paper(value, signed, expected):
    assert cell((value, NAN, NAN), signed) == expected
