import numpy as np
import pytest

from common.ct.dicom import read_ct
from data_prep.sources import folders
from data_prep.sources.folders import find_series, find_volumes
from tests.conftest import touch


def hu(seed: int = 0, num_slices: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, (num_slices, 4, 5)).astype(np.int16)


def test_series_are_told_apart_by_their_headers(tmp_path, dask, write_series) -> None:
    """Two series in one folder, one spread over two folders; every file without a suffix."""
    write_series(tmp_path / "study" / "a", hu(1), series="1.2.840.1")
    for name in ("IM0000", "IM0001", "IM0002"):
        (tmp_path / "study" / "a" / name).rename(tmp_path / "study" / "a" / f"0 {name}")
    write_series(tmp_path / "study" / "a", hu(2), series="1.2.840.2")
    write_series(tmp_path / "study" / "ä b", hu(3), series="1.2.840.3")
    (tmp_path / "study" / "ä b" / "IM0001").rename(tmp_path / "study" / "moved")
    sources, rejected = find_series(tmp_path, "valid", dask)
    assert rejected == []
    assert [(source.volume, source.source, source.form, source.split) for source in sources] == [
        ("1_2_840_1", "study/a", "v2", "valid"),
        ("1_2_840_2", "study/a", "v2", "valid"),
        ("1_2_840_3", "study", "v2", "valid"),
    ]
    for seed, source in enumerate(sources, start=1):
        np.testing.assert_array_equal(read_ct(source.ct.files).hu, hu(seed))


def test_many_files_are_looked_at_in_the_same_order(tmp_path, dask, write_series, monkeypatch) -> None:
    monkeypatch.setattr(folders, "FILES_PER_TASK", 2)
    for number in range(3):
        write_series(tmp_path / str(number), hu(number), series=f"1.{3 - number}")
    told: list[tuple[str, int, int]] = []
    sources, _ = find_series(tmp_path, "train", dask, progress=lambda *step: told.append(step))
    assert [source.volume for source in sources] == ["1_1", "1_2", "1_3"]
    assert all(list(source.ct.files) == sorted(source.ct.files) for source in sources)
    assert [step[0] for step in told] == ["Looking at files"] * 5
    assert told[-1] == ("Looking at files", 9, 9)


def test_label_maps_are_found_by_the_name_of_the_series(tmp_path, dask, write_series) -> None:
    for number in range(1, 5):
        write_series(tmp_path / "ct" / str(number), hu(number), series=f"1.2.{number}")
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("1.2.1.nii.gz", "1_2_2.nii", "1.2.4.nii.gz", "1_2_4.nii.gz", "9.nii"):
        (masks / name).touch()
    sources, rejected = find_series(tmp_path / "ct", "train", dask, masks=masks)
    assert {source.volume: source.ts and source.ts.name for source in sources} == {
        "1_2_1": "1.2.1.nii.gz",
        "1_2_2": "1_2_2.nii",
        "1_2_3": None,
    }
    assert [(item.volume, item.reason) for item in rejected] == [("1_2_4", "duplicate")]
    with pytest.raises(FileNotFoundError, match="masks must hold label maps named like"):
        find_series(tmp_path / "ct", "train", dask, masks=tmp_path / "nowhere")


def test_a_tree_without_ct_is_refused(tmp_path, dask) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="No axial CT series"):
        find_series(tmp_path, "train", dask)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_series(tmp_path / "nowhere", "train", dask)


def test_volumes_of_a_folder_get_the_label_maps_of_their_name(tmp_path) -> None:
    folder = touch(tmp_path / "ct", "b.nii.gz", "sub/a.nii", "notes.txt")
    masks = touch(tmp_path / "masks", "b.nii.gz", "c.nii.gz")
    sources, rejected = find_volumes(folder, "valid", masks)
    assert rejected == []
    assert [(source.volume, source.ts, source.split, source.form, source.source) for source in sources] == [
        ("a", None, "valid", "v2", "sub/a.nii"),
        ("b", masks / "b.nii.gz", "valid", "v2", "b.nii.gz"),
    ]


def test_masks_may_lie_inside_the_folder_of_volumes(tmp_path) -> None:
    folder = touch(tmp_path, "a.nii.gz", "masks/a.nii.gz")
    sources, rejected = find_volumes(folder, "train", folder / "masks")
    assert rejected == []
    assert [(source.ct.path, source.ts) for source in sources] == [
        (folder / "a.nii.gz", folder / "masks" / "a.nii.gz")
    ]


def test_volumes_of_one_name_are_rejected(tmp_path) -> None:
    folder = touch(tmp_path / "ct", "a.nii.gz", "a.MHA", "1/d.nii.gz", "1/d.nrrd", "b.nii.gz", "c.nii.gz")
    masks = touch(tmp_path / "masks", "x/b.nii.gz", "y/b.nii", "c.nii")
    sources, rejected = find_volumes(folder, "train", masks)
    assert [source.volume for source in sources] == ["c"]
    assert [(item.volume, item.reason) for item in rejected] == [(name, "duplicate") for name in "adb"]
    assert rejected[0].detail.startswith("2 volumes have one name")
    assert rejected[2].detail.startswith("2 label maps have one name")


def test_a_file_name_that_is_not_unique_takes_its_folders(tmp_path) -> None:
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


def test_folders_without_volumes_or_matching_masks_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_volumes(tmp_path / "nowhere", "train")
    folder, masks = touch(tmp_path / "ct", "a.nii"), touch(tmp_path / "masks", "b.nii")
    with pytest.raises(FileNotFoundError, match="No volume in NIfTI"):
        find_volumes(touch(tmp_path / "text", "a.txt"), "train")
    for wrong in (masks, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="masks must hold label maps"):
            find_volumes(folder, "train", wrong)


@pytest.mark.real_ct
def test_a_real_tree_is_one_series(real_ct_dir, dask) -> None:
    """Its identifiers are blank, and NIfTI files lie beside it."""
    (source,), rejected = find_series(real_ct_dir, "train", dask)
    assert rejected == []
    assert (len(source.ct.files), source.source) == (20, "totalseg_dicom_series")
