import csv
from pathlib import Path

import pytest

from common.cohort.cohort import load_labels
from data_prep.rad_chestct import PREFIXES, read_labels

LOCATIONS = ("left_lung", "right_lung")
ABNORMALITIES = sorted(
    {prefix for prefixes in PREFIXES.values() for prefix in prefixes} | {"opacity_other", "mass"}
)


def test_every_class_has_its_abnormalities() -> None:
    assert list(PREFIXES) == [label.name for label in load_labels("rad_chestct")]


def write(path: Path, positive: dict[str, set[str]], leave_out: str = "") -> Path:
    """A label table in which each volume has some positive columns."""
    columns = [f"{a}*{place}" for a in ABNORMALITIES for place in LOCATIONS if a != leave_out]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["NoteAcc_DEID", *columns])
        table.writerows([volume, *(int(c in own) for c in columns)] for volume, own in positive.items())
    return path


def test_a_class_is_positive_if_any_abnormality_is_anywhere(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.csv",
        {
            "trn00001": {"nodulegr1cm*left_lung", "stent*right_lung"},
            "trn00002": {"nodule*right_lung", "hernia*left_lung", "fibrosis*left_lung"},
            "trn00003": {"opacity_other*left_lung", "mass*left_lung"},
        },
    )
    labels = read_labels([train, write(tmp_path / "valid.csv", {"val00001": {"calcification*left_lung"}})])
    assert list(labels) == ["trn00001", "trn00002", "trn00003", "val00001"]
    positive = {volume: [name for name, value in own.items() if value] for volume, own in labels.items()}
    assert positive["trn00001"] == ["Lung nodule", "Medical material"]
    assert positive["trn00002"] == ["Hiatal hernia", "Lung nodule", "Pulmonary fibrotic sequela"]
    assert positive["trn00003"] == []
    assert positive["val00001"] == ["Calcification"]
    assert list(labels["trn00001"]) == [label.name for label in load_labels("rad_chestct")]


def test_tables_that_lack_something_are_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", {"trn00001": set()}, leave_out="stent")
    with pytest.raises(ValueError, match=r"a\.csv' must have columns of .*, got none of \['stent'\]"):
        read_labels([table])
    table = write(tmp_path / "b.csv", {"trn00001": set()})
    with pytest.raises(
        ValueError, match="a volume must have one row, got two for 'trn00001', one in '.*b.csv'"
    ):
        read_labels([table, table])
    table.write_text(table.read_text().replace("trn00001,0", "trn00001,?"))
    with pytest.raises(ValueError, match=r"label must be 0 or 1, got '\?' of '.*' for volume 'trn00001'"):
        read_labels([table])
