"""The wrong inputs of a collection beside the repository, end to end: as they say, or refused."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from common.ct.rejection import RejectedError, RejectedVolume, is_failure
from common.embeddings.work import ct_sources
from data_prep.sources.ct_rate import find_ct_rate
from data_prep.sources.folders import find_volumes
from data_prep.sources.source_volume import SourceVolume, planned_slices, read_volume


@pytest.fixture
def case(wrong_inputs: ModuleType, tmp_path: Path) -> Callable[[str], Path]:
    """Write a case; return its folder."""

    def write(name: str) -> Path:
        make, _ = wrong_inputs.CASES[name]
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        return tmp_path / name

    return write


def embedded(folder: Path) -> dict[str, np.ndarray | str]:
    """What inference reads of a folder: slices, or the reason why not."""
    sources, rejected = ct_sources(folder)
    return _outcomes(sources, rejected, lambda source: source.read().hu)


def prepared(folder: Path, masks: Path | None = None) -> dict[str, np.ndarray | str]:
    """What ``data_prep nifti`` reads of a folder."""
    return _outcomes(*find_volumes(folder, "train", masks), _planned_and_read)


def _planned_and_read(source: SourceVolume) -> np.ndarray:
    volume = read_volume(source)
    assert planned_slices(source) == len(volume.ct)
    return volume.ct


def _outcomes(
    sources: list, rejected: list[RejectedVolume], read: Callable[[Any], np.ndarray]
) -> dict[str, np.ndarray | str]:
    found: dict[str, np.ndarray | str] = {item.volume: item.detail for item in rejected if is_failure(item)}
    for source in sources:
        try:
            found[source.volume] = read(source)
        except RejectedError as error:
            found[source.volume] = error.detail
    return found


@pytest.mark.parametrize(
    ("name", "folder", "volumes"),
    [
        ("09_upper_case_suffix", "", ["SCAN_1", "scan_2"]),
        ("10_macos_files", "nifti", ["a_1"]),
        ("15_singleton_axis", "", ["a_1"]),
        ("17_names", "uid", ["1_3_6_1_4_1_9328_50_4_0175"]),
        ("17_names", "blank", ["Patient_01"]),
        ("17_names", "totalsegmentator", ["s0000", "s0001"]),
        ("18_other_formats", "", ["a_1", "b_1", "c_1", "d_1"]),
    ],
)
def test_good_inputs_are_read(
    name: str, folder: str, volumes: list[str], case: Callable, wrong_inputs: ModuleType
) -> None:
    place = case(name) / folder
    for found in (embedded(place), prepared(place)):
        assert sorted(found) == volumes
        for hu in found.values():
            np.testing.assert_array_equal(hu, wrong_inputs.HU.clip(-1024, 3071))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("06_sform_against_pixdim", r"(1, 1, 1) mm in sform and of (3.125, 3.125, 6)"),
        ("07_no_geometry", "blank"),
    ],
)
def test_wrong_inputs_are_refused(name: str, said: str, case: Callable) -> None:
    place = case(name)
    for found in (embedded(place), prepared(place)):
        (detail,) = found.values()
        assert said in detail


def test_label_maps_are_read_right_or_refused(case: Callable) -> None:
    place = case("08_mask_geometry_lost")
    (detail,) = prepared(place / "cts", place / "masks").values()
    assert "(0.78, 0.78, 0.9) mm in the CT, (1, 1, 1) mm in the mask" in detail
    place = case("16_scaled_labels")
    (source,), _ = find_volumes(place / "cts", "train", place / "masks")
    volume = read_volume(source)
    assert np.unique(volume.ts).tolist() == [0, 10, 51]
    assert np.all(volume.ts[:30, 20:60, 20:60] == 10)


def test_files_of_macos_beside_dicom_are_no_failures(case: Callable, wrong_inputs: ModuleType) -> None:
    ((_, hu),) = embedded(case("10_macos_files") / "dicom").items()
    np.testing.assert_array_equal(hu, wrong_inputs.HU.clip(-1024, 3071))


def test_ct_rate_is_found_as_before(case: Callable) -> None:
    (source,), rejected = find_ct_rate(case("04_raw_with_padding") / "ct_rate", "train")
    assert rejected == []
    assert (source.volume, source.form, planned_slices(source)) == ("train_1_a_1", "v1", 46)
