from pathlib import Path

import pytest

from common.run.inputs import must_exist


def test_a_path_that_is_not_there_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"skip_list: '{tmp_path / 'no.txt'}'.*--skip_list"):
        must_exist(dataset_dir=tmp_path, subset_csv=None, skip_list=tmp_path / "no.txt")


def test_files_folders_and_options_not_used_pass(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("")
    must_exist(dataset_dir=tmp_path, subset_csv=None, skip_list=str(tmp_path / "list.txt"))
