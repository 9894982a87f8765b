"""Lists of volumes, however they are written."""

from pathlib import Path

import pytest

from common.cohort.skip_list import listed_names, listed_volumes


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
