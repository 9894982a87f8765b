from pathlib import Path

import pytest

from data_prep.nifti import find_volumes


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_volumes_of_a_folder_get_the_label_maps_of_their_name(tmp_path: Path) -> None:
    folder = touch(tmp_path / "ct", "b.nii.gz", "sub/a.nii", "notes.txt")
    masks = touch(tmp_path / "masks", "b.nii.gz", "c.nii.gz")
    sources, rejected = find_volumes(folder, "valid", masks)
    assert rejected == []
    assert [(source.volume, source.ts, source.split, source.form, source.source) for source in sources] == [
        ("a", None, "valid", "v2", "sub/a.nii"),
        ("b", masks / "b.nii.gz", "valid", "v2", "b.nii.gz"),
    ]


def test_masks_may_lie_inside_the_folder_of_volumes(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.nii.gz", "masks/a.nii.gz")
    sources, rejected = find_volumes(folder, "train", folder / "masks")
    assert rejected == []
    assert [(source.ct, source.ts) for source in sources] == [
        (folder / "a.nii.gz", folder / "masks" / "a.nii.gz")
    ]


def test_volumes_of_one_name_are_rejected(tmp_path: Path) -> None:
    folder = touch(tmp_path / "ct", "1/a.nii.gz", "2/a.nii.gz", "b.nii.gz", "c.nii.gz")
    masks = touch(tmp_path / "masks", "b.nii.gz", "b.nii", "c.nii")
    sources, rejected = find_volumes(folder, "train", masks)
    assert [source.volume for source in sources] == ["c"]
    assert [(item.volume, item.reason) for item in rejected] == [("a", "duplicate"), ("b", "duplicate")]
    assert rejected[0].detail.startswith("a volume must be one file, got")
    assert rejected[1].detail.startswith("a label map must be one file, got")


def test_folders_and_dead_links_under_the_name_of_a_volume_are_accounted_for(tmp_path: Path) -> None:
    folder = touch(tmp_path / "Thorax é 中", "1 2/a.nii.gz")
    (folder / "b.nii.gz").mkdir()
    (folder / "c.nii.gz").symlink_to("nowhere")
    sources, rejected = find_volumes(folder, "train")
    assert [source.source for source in sources] == ["1 2/a.nii.gz", "c.nii.gz"]
    assert [(item.volume, item.reason) for item in rejected] == [("b", "unreadable")]
    assert rejected[0].detail.startswith("a volume must be a file that can be read, got the folder '")


def test_folders_without_volumes_or_matching_masks_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"folder must hold \.nii\.gz or \.nii volumes, got none in '.*nowhere'"
    ):
        find_volumes(tmp_path / "nowhere", "train")
    folder, masks = touch(tmp_path / "ct", "a.nii"), touch(tmp_path / "masks", "b.nii")
    with pytest.raises(FileNotFoundError, match=r"folder must hold \.nii\.gz or \.nii volumes"):
        find_volumes(touch(tmp_path / "text", "a.txt"), "train")
    for wrong in (masks, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match="masks must hold label maps named like the volumes, got none"
        ):
            find_volumes(folder, "train", wrong)
