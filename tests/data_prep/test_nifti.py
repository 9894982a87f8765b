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
    assert [(source.ct.path, source.ts) for source in sources] == [
        (folder / "a.nii.gz", folder / "masks" / "a.nii.gz")
    ]


def test_volumes_of_one_name_are_rejected(tmp_path: Path) -> None:
    folder = touch(tmp_path / "ct", "a.nii.gz", "a.MHA", "1/d.nii.gz", "1/d.nrrd", "b.nii.gz", "c.nii.gz")
    masks = touch(tmp_path / "masks", "x/b.nii.gz", "y/b.nii", "c.nii")
    sources, rejected = find_volumes(folder, "train", masks)
    assert [source.volume for source in sources] == ["c"]
    assert [(item.volume, item.reason) for item in rejected] == [(name, "duplicate") for name in "adb"]
    assert rejected[0].detail.startswith("2 volumes have one name")
    assert rejected[2].detail.startswith("2 label maps have one name")


def test_a_file_name_that_is_not_unique_takes_its_folders(tmp_path: Path) -> None:
    """As TotalSegmentator publishes its data set; label maps in the same tree, or named like the volumes."""
    folder = touch(tmp_path / "ct", "s0/ct.nii.gz", "s1/ct.nii.gz", "s1/b.nrrd", "s2/x/ct.NII", "s3/x/ct.nii")
    masks = touch(tmp_path / "masks", "s0/ct.nii.gz", "s2/x/ct.mha", "s1.nii.gz", "b/m.nii", "c/m.nii")
    sources, rejected = find_volumes(folder, "train", masks)
    assert rejected == []
    found = {one.volume: (one.source, one.ts and one.ts.relative_to(masks).as_posix()) for one in sources}
    assert found == {
        "s0": ("s0/ct.nii.gz", "s0/ct.nii.gz"),
        "s1": ("s1/ct.nii.gz", "s1.nii.gz"),
        "b": ("s1/b.nrrd", "b/m.nii"),
        "s2_x_ct": ("s2/x/ct.NII", "s2/x/ct.mha"),
        "s3_x_ct": ("s3/x/ct.nii", None),
    }
    assert [source.source for source in find_volumes(folder / "s0" / "ct.nii.gz", "train")[0]] == [
        "ct.nii.gz"
    ]


def test_folders_and_dead_links_under_the_name_of_a_volume_are_accounted_for(tmp_path: Path) -> None:
    folder = touch(tmp_path / "Thorax é 中", "1 2/a.nii.gz")
    touch(folder, "b.nii.gz/b.nii")  # as some tools unpack
    (folder / "c.nii.gz").symlink_to("nowhere")
    sources, rejected = find_volumes(folder, "train")
    assert [source.source for source in sources] == ["1 2/a.nii.gz", "b.nii.gz/b.nii", "c.nii.gz"]
    assert rejected == []


def test_folders_without_volumes_or_matching_masks_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must be .*, got '.*nowhere', which does not exist"):
        find_volumes(tmp_path / "nowhere", "train")
    folder, masks = touch(tmp_path / "ct", "a.nii"), touch(tmp_path / "masks", "b.nii")
    with pytest.raises(FileNotFoundError, match="folder must hold volumes in NIfTI, .* got none in"):
        find_volumes(touch(tmp_path / "text", "a.txt"), "train")
    for wrong in (masks, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match="masks must hold label maps named like the volumes, got none"
        ):
            find_volumes(folder, "train", wrong)
