"""Which volumes a run leaves out."""

from pathlib import Path

import pytest

from common.cohort.skip_list import listed_volumes


def test_names_are_those_of_paths_of_either_system_without_suffix(tmp_path: Path) -> None:
    listed = tmp_path / "no_chest_valid.txt"
    listed.write_text(
        "dataset/valid/valid_1_a_1.nii.gz\nC:\\ct\\valid_2_a_1.nii\n\n  valid_9_a_1 \n", "utf-8-sig"
    )
    assert listed_volumes(listed) == {"valid_1_a_1", "valid_2_a_1", "valid_9_a_1"}


def test_a_list_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="skip_list must be a text file, got 'none.txt'"):
        listed_volumes("none.txt")


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(ValueError, match="skip_list must be text in UTF-8, got '.*list.xls'"):
        listed_volumes(tmp_path / "list.xls")
