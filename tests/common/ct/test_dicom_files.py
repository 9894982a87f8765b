"""Every file of a folder is told apart by its content, not by its name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.uid import MRImageStorage, SecondaryCaptureImageStorage

from common.ct.dicom_files import (
    AXIAL_CT,
    DAMAGED,
    DERIVED,
    LOCALIZER,
    NO_IMAGE,
    REFORMAT,
    FoundFile,
    look_at,
    series_volume,
    sort_series,
)
from common.ct.rejection import NOT_AXIAL_CT, is_failure

HU = np.zeros((2, 5, 7), np.int16)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, AXIAL_CT),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, LOCALIZER),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"]}, DERIVED),
        ({"ImageType": ["DERIVED", "SECONDARY", "MINIP", "AXIAL"]}, DERIVED),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIN IP"]}, DERIVED),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MAX_IP"]}, DERIVED),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, DERIVED),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, AXIAL_CT),
        ({"ImageType": ["DERIVED", "SECONDARY", "CURVED_MPR"]}, DERIVED),
        ({"ImageType": ["DERIVED", "PRIMARY", "VOLUME_RENDER"]}, DERIVED),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]}, AXIAL_CT),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "HELIX", "SHRIMP"]}, AXIAL_CT),
        ({"VolumeBasedCalculationTechnique": "MAX_IP"}, DERIVED),
        ({"VolumeBasedCalculationTechnique": "NONE"}, AXIAL_CT),
        ({"ImageType": None}, AXIAL_CT),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "Secondary Capture Image Storage"),
        ({"SOPClassUID": MRImageStorage, "Modality": "MR"}, "MR Image Storage"),
    ],
)
def test_the_kind_is_in_the_header(
    tmp_path: Path, write_series: Callable[..., list[Path]], changes: dict, kind: str
) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        for name, value in changes.items():
            setattr(dataset, name, value)

    path = write_series(tmp_path, HU, edit=edit)[0]
    found = look_at(path)
    assert (found.path, found.kind, found.series) == (path, kind, "1.2.840.99.7")


def test_a_coronal_stack_is_a_reformat(tmp_path: Path, write_series: Callable[..., list[Path]]) -> None:
    assert look_at(write_series(tmp_path, HU, orientation=(1, 0, 0, 0, 0, -1))[0]).kind == REFORMAT


def test_other_files_are_no_images_and_broken_ones_damaged(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "slice.dcm").write_text("notes")
    assert look_at(tmp_path / "notes.txt").kind == NO_IMAGE
    damaged = look_at(tmp_path / "slice.dcm")
    assert damaged.kind == DAMAGED
    assert "Cannot read" in damaged.damage


def test_a_series_is_called_by_its_uid_or_a_checksum() -> None:
    assert series_volume("1.2.840.7") == "1_2_840_7"
    assert series_volume("a/b").startswith("series_")
    assert series_volume("a/b") != series_volume("a/c")


@pytest.mark.parametrize("name", ["DICOMDIR", "DICOMDIR-nopatient", "DICOMDIR-implicit", "DICOMDIR-bigEnd"])
def test_the_table_of_contents_of_a_cd_is_no_image(name: str, tmp_path: Path) -> None:
    """Real ones, of pydicom's tests; without its meta information one begins with group 4."""
    source = Path(get_testdata_file("DICOMDIR", download=False)).parent / name
    assert look_at(source).kind == NO_IMAGE
    content = source.read_bytes()
    meta = pydicom.dcmread(source).file_meta
    (tmp_path / "DICOMDIR").write_bytes(content[144 + meta.FileMetaInformationGroupLength :])
    assert look_at(tmp_path / "DICOMDIR").kind == NO_IMAGE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rtdose.dcm", "RT Dose Storage"),
        ("test-SR.dcm", "Comprehensive SR Storage"),
        ("CT_small.dcm", AXIAL_CT),
        ("ExplVR_BigEndNoMeta.dcm", "RT Ion Plan Storage"),
        ("ExplVR_LitEndNoMeta.dcm", "RT Ion Plan Storage"),
    ],
)
def test_real_files_are_what_their_header_says(name: str, kind: str, tmp_path: Path) -> None:
    source = Path(get_testdata_file(name, download=False))
    shutil.copy(source, tmp_path / "IM1")
    assert look_at(source).kind == look_at(tmp_path / "IM1").kind == kind


def axial(folder: str, series: str, places: list[str], study: str = "1") -> list[FoundFile]:
    return [
        FoundFile(Path(folder, f"{i}"), AXIAL_CT, series, study, (place,)) for i, place in enumerate(places)
    ]


STACK = ["0 0 0", "0 0 2", "0 0 4"]


def test_a_contrast_study_is_its_axial_series_and_no_failure() -> None:
    stack = axial("4", "1.4", STACK)
    found = [
        FoundFile(Path("DICOMDIR"), NO_IMAGE),
        FoundFile(Path("1/a"), LOCALIZER, "1.1", "1"),
        *axial("2", "1.2", ["0 0 2"]),
        *axial("3", "1.3", ["0 0 2"] * 5),
        *axial("3b", "1.31", ["0 0 2", "0 0 2", "0 0 4"]),
        *stack,
        FoundFile(Path("5/a"), REFORMAT, "1.5", "1"),
        FoundFile(Path("6/a"), DERIVED, "1.6", "1"),
        FoundFile(Path("6/b"), "Secondary Capture Image Storage", "1.6", "1"),
    ]
    series, rejected = sort_series(found)
    assert series == [("1_4", tuple(file.path for file in stack))]
    assert {item.reason for item in rejected} == {NOT_AXIAL_CT}
    assert not any(map(is_failure, rejected))
    assert {item.volume: item.detail.partition("got files in ")[2] for item in rejected} == {
        "1_1": "'1': 1 of CT localizer",
        "1_2": "'2': a single image of a study of several series",
        "1_3": "'3': 5 images at one position, as of bolus tracking",
        "1_31": "'3b': 3 images at two positions, as of bolus tracking",
        "1_5": "'5': 1 of CT of another plane",
        "1_6": "'6': 1 of CT computed from slices, 1 of Secondary Capture Image Storage",
    }


@pytest.mark.parametrize(
    "found",
    [
        axial("a", "1.1", ["0 0 0"]),
        [file for z in range(4) for file in axial("a", f"1.{z}", [f"0 0 {z}"])],
        axial("a", "1.1", ["", "", ""]),
        axial("a", "1.1", [*STACK, *STACK]),
        axial("a", "1.1", ["0 0 0", "0 0 5"]),
        axial("a", "1.1", ["0 0 0"], "1") + axial("b", "1.2", STACK, "2"),
    ],
    ids=["alone", "a series per slice", "no positions", "two acquisitions", "two slices", "other study"],
)
def test_a_broken_export_is_left_to_fail_when_it_is_read(found: list[FoundFile]) -> None:
    series, rejected = sort_series(found)
    assert rejected == []
    assert sorted(path for _, files in series for path in files) == sorted(file.path for file in found)


def test_files_of_a_series_belong_together_and_without_one_by_folder() -> None:
    found = axial("a", "1.1", STACK) + axial("a/b", "1.1", ["0 0 6"])
    found += axial("x", "", STACK, "") + axial("x/y", "", STACK, "")
    damaged = FoundFile(Path("x/z.dcm"), DAMAGED, damage="Cannot read 'x/z.dcm' as DICOM: half")
    series, rejected = sort_series([damaged, *found[::-1]])
    assert [len(files) for _, files in series] == [4, 3, 3]
    assert [volume for volume, _ in series] == ["1_1", series_volume("x"), series_volume("x/y")]
    assert [(item.volume, item.reason) for item in rejected] == [("z.dcm", "unreadable")]
    assert is_failure(rejected[0])
