from pathlib import Path

import numpy as np
import pytest

from common.cohort.labels_csv import read_labels


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_labels_come_in_the_order_of_rows_and_of_the_asked_classes(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "VolumeName,A,B,C\nb_2_a_1.nii.gz,0,1,1\na_1_a_1,1,0,1.0\n")
    labels = read_labels(table, ["C", "A"])
    assert list(labels) == ["b_2_a_1", "a_1_a_1"]
    np.testing.assert_array_equal(labels["b_2_a_1"], [1, 0])
    np.testing.assert_array_equal(labels["a_1_a_1"], [1, 1])
    assert labels["a_1_a_1"].dtype == np.float32


def test_byte_order_mark_of_a_spreadsheet_is_no_part_of_a_name(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("VolumeName,A\nv_1_a_1,1\n", encoding="utf-8-sig")
    assert list(read_labels(table, ["A"])) == ["v_1_a_1"]


def test_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"labels_csv must be a CSV file, got '.*none.csv', which does not exist"
    ):
        read_labels(tmp_path / "none.csv", ["A"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VolumeName,B\nv,1\n", r"labels_csv must have the column 'A', got \['VolumeName', 'B'\]"),
        ("name,A\nv,1\n", r"labels_csv must have the column 'VolumeName', got \['name', 'A'\]"),
        ("", "labels_csv must have the column 'VolumeName', got None"),
        (
            "VolumeName,A\nv.nii.gz,1\nw,0\nv,1\n",
            "labels_csv must have one row per volume, got two for volume 'v'",
        ),
        ("VolumeName,A\nv,\n", "label must be 0 or 1, got '' of 'A' for volume 'v'"),
        ("VolumeName,A\nv\n", "label must be 0 or 1, got '' of 'A' for volume 'v'"),
        ("VolumeName,A\nv,nan\n", "label must be 0 or 1, got 'nan' of 'A' for volume 'v'"),
        ("VolumeName,A\nv,0.3\n", "label must be 0 or 1, got '0.3' of 'A' for volume 'v'"),
    ],
)
def test_bad_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(write(tmp_path / "t.csv", text), ["A"])


def test_volumes_are_named_as_their_files_are(tmp_path: Path) -> None:
    """By name, and by folder where several rows have one name."""
    names = " train_1_a_1.NII.GZ", "1.2.840.113", "Patient 01.mha", "s0000/ct.nii.gz", "d\\s0001\\ct.nii.gz"
    text = "VolumeName,A\n" + "".join(f"{name},1\n" for name in names)
    labels = read_labels(write(tmp_path / "t.csv", text), ["A"])
    assert [*labels] == ["train_1_a_1", "1_2_840_113", "Patient_01", "s0000", "s0001"]
