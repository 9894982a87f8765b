"""Which volumes inference works on."""

import pytest
import torch

from common.data.ct_files import ct_files
from common.data.embedding_part import IDENTITY_KEYS
from common.data.embedding_store_writer import EmbeddingStoreWriter


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_volumes_are_found_in_sub_folders_and_sorted_by_name(tmp_path):
    touch(tmp_path, "train_2/b.nii.gz", "train_1/a.nii", "notes.txt")
    assert [item["volume"] for item in ct_files(tmp_path, tmp_path / "out")] == ["a", "b"]
    assert ct_files(tmp_path / "train_1" / "a.nii", tmp_path / "out")[0]["volume"] == "a"


def test_a_volume_with_an_embedding_is_done(tmp_path):
    touch(tmp_path, "in/a.nii.gz", "in/b.nii.gz")
    identity = dict.fromkeys(IDENTITY_KEYS, "x") | {"token_kind": "slice"}
    with EmbeddingStoreWriter(tmp_path / "out", identity, "float16") as writer:
        writer.add("a", torch.zeros(2, 3), (1, 1, 1))
    assert [item["volume"] for item in ct_files(tmp_path / "in", tmp_path / "out")] == ["b"]


def test_nothing_to_do_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold .nii.gz or .nii volumes, got none"):
        ct_files(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        ct_files(tmp_path / "no", tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    touch(tmp_path, "a/x.nii.gz", "b/x.nii.gz")
    with pytest.raises(ValueError, match="volume names must be unique"):
        ct_files(tmp_path, tmp_path / "out")


def test_volumes_of_the_skip_list_are_left_out_by_name(tmp_path, caplog):
    touch(tmp_path, "in/valid_1_a_1.nii.gz", "in/valid_2_a_1.nii.gz")
    listed = tmp_path / "no_chest_valid.txt"
    listed.write_text("dataset/valid/valid_1/valid_1_a/valid_1_a_1.nii.gz\nvalid_9_a_1\n\n")
    with caplog.at_level("INFO"):
        files = ct_files(tmp_path / "in", tmp_path / "out", skip_list=listed)
    assert [item["volume"] for item in files] == ["valid_2_a_1"]
    assert "2 volumes in" in caplog.text
    assert "1 left out by the skip list" in caplog.text
    with pytest.raises(FileNotFoundError, match="skip_list must be a text file, got 'none.txt'"):
        ct_files(tmp_path / "in", tmp_path / "out", skip_list="none.txt")
