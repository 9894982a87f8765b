from pathlib import Path

import numpy as np
import pytest

from common.cohort.tables import (
    COLUMNS,
    Predictions,
    listed_names,
    listed_volumes,
    read_labels,
    read_predictions,
    table_rows,
    write_predictions,
)


def test_cells_come_by_the_name_of_their_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b,c\n1,"2, 3",x\n\n4\n', encoding="utf-8-sig")
    rows = list(table_rows(tmp_path / "t.csv", "table", ("b", "a")))
    assert rows == [{"a": "1", "b": "2, 3", "c": "x"}, {"a": "4", "b": "", "c": ""}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "table must have the column 'a', got None in '.*t.csv'"),
        (b"a,c\n1,2\n", r"table must have the column 'b', got \['a', 'c'\] in '.*t.csv'"),
        (
            "a,b\n1,M\xfcller\n".encode("latin-1"),
            "table must be a CSV file in UTF-8, got '.*t.csv' \\('utf-8'",
        ),
        (b'a,b\n1,"x\n2,3\n', "table must be a CSV file in UTF-8, got '.*t.csv' \\(unexpected end of data"),
        (b'a,b\n1,"' + 40_000 * b"2,3\n", "table must be a CSV file in UTF-8, got '.*t.csv' \\(field larger"),
    ],
)
def test_what_is_no_such_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(table_rows(tmp_path / "t.csv", "table", ("a", "b")))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="table must be a CSV file, got '.*none.csv', which does not"):
        next(table_rows(tmp_path / "none.csv", "table", ()))


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


def test_names_are_those_of_paths_of_either_system_without_suffix(tmp_path: Path) -> None:
    listed = tmp_path / "no_chest_valid.txt"
    listed.write_text(
        "dataset/valid/valid_1_a_1.nii.gz\nC:\\ct\\valid_2_a_1.nii\n\n  valid_9_a_1 \n", "utf-8-sig"
    )
    assert listed_volumes(listed) == {"valid_1_a_1", "valid_2_a_1", "valid_9_a_1"}


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("heading", ["", "VolumeName", "volume", "Image ID", "series_instance_uid", "FILE"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_a_list_of_one_column_may_have_a_heading_or_none(
    suffix: str, ending: str, encoding: str, heading: str, quote: str, tmp_path: Path
) -> None:
    lines = [
        *([heading] if heading else []),
        f"{quote}a_1.nii.gz{quote}",
        "",
        f"{quote}d/b 2.NRRD{quote}",
        "c",
    ]
    (tmp_path / f"list{suffix}").write_bytes(ending.join(lines).encode(encoding))
    assert listed_names(tmp_path / f"list{suffix}", "subset_csv") == ["a_1.nii.gz", "d/b 2.NRRD", "c"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_column_of_volume_names_is_read_or_else_the_first(delimiter: str, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("split;VolumeName;n\ntrain;a;1\nvalid;b\n;;\ntrain\n".replace(";", delimiter))
    assert listed_names(table, "subset_csv") == ["a", "b"]
    table.write_text("a.nii;1;x\nb;2;y\n".replace(";", delimiter))
    assert listed_names(table, "subset_csv") == ["a.nii", "b"]


def test_a_comma_in_a_line_of_text_is_part_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("Smith, John.nii\n")
    assert listed_names(tmp_path / "list.txt", "skip_list") == ["Smith, John.nii"]


def test_an_empty_list_names_nothing(tmp_path: Path) -> None:
    for name in ("list.txt", "list.csv"):
        (tmp_path / name).write_text("\n")
        assert listed_names(tmp_path / name, "skip_list") == []


def test_a_list_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="skip_list must be a text file, got 'none.txt'"):
        listed_volumes("none.txt")


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(ValueError, match="skip_list must be text in UTF-8, got '.*list.xls'"):
        listed_volumes(tmp_path / "list.xls")


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
    with pytest.raises(FileNotFoundError, match=r"predictions must be a CSV file, got '.*none.csv', which"):
        read_predictions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"predictions must have the column 'encoder', got \['a', 'b'\] in '.*test.csv'"),
        (",".join(COLUMNS) + "\n", "No predictions in '.*test.csv'"),
        (",".join(COLUMNS) + "\ne,v,A,0.1.2,0.5,1\n", r"Cannot read '.*test.csv': could .* '0.1.2'"),
        (",".join(COLUMNS) + "\ne,v,A,0.1\n", "Cannot read '.*test.csv': could not"),
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
