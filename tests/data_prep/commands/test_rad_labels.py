import csv
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from common.cohort.cohort import load_labels, read_labels
from data_prep import __main__ as module
from data_prep.rad_chestct import PREFIXES

NAMES = [label.name for label in load_labels("rad_chestct")]
COLUMNS = [f"{part}*{place}" for parts in PREFIXES.values() for part in parts for place in ("left", "right")]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(module.app, ["rad-labels", *map(str, arguments)], env={"COLUMNS": "200"})


def write_tables(root: Path, splits: tuple[tuple[str, str], ...]) -> dict[str, dict[str, int]]:
    rng, written = np.random.default_rng(0), {}
    for prefix, split in splits:
        path = root / "tables" / f"img{split}_Abnormality_and_Location_Labels.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["NoteAcc_DEID", *COLUMNS])
            for number in range(3):
                values = (rng.random(len(COLUMNS)) < 0.1).astype(int).tolist()
                written[f"{prefix}{number:05d}"] = dict(zip(COLUMNS, values, strict=True))
                table.writerow([f"{prefix}{number:05d}", *values])
    return written


def test_a_class_is_positive_if_any_part_is_at_any_place(tmp_path: Path) -> None:
    written = write_tables(tmp_path, (("trn", "train"), ("val", "valid"), ("tst", "test")))
    out = tmp_path / "new" / "labels.csv"
    answer = invoke("--root", tmp_path, "--out", out)
    assert answer.exit_code == 0, answer.output
    assert "9 volumes in" in answer.output
    labels = read_labels(out, NAMES)
    assert list(labels) == list(written)
    for volume, columns in written.items():
        for c, name in enumerate(NAMES):
            positive = any(
                columns[f"{part}*{place}"] for part in PREFIXES[name] for place in ("left", "right")
            )
            assert labels[volume][c] == positive, (volume, name)
    assert {0, 1} == {int(value) for own in labels.values() for value in own}


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    write_tables(tmp_path, (("trn", "train"), ("tst", "test")))
    answer = invoke("--root", tmp_path, "--out", tmp_path / "labels.csv")
    assert "root must hold 'imgvalid_Abnormality_and_Location_Labels.csv', got none in" in str(
        answer.exception
    )
    assert not (tmp_path / "labels.csv").exists()
