"""Every file of a folder is told apart by its content, not by its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import MRImageStorage

from common.ct.dicom_files import (
    AXIAL_CT,
    DAMAGED,
    LOCALIZER,
    NO_IMAGE,
    REFORMAT,
    look_at,
    series_volume,
)

HU = np.zeros((2, 5, 7), np.int16)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, AXIAL_CT),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, LOCALIZER),
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
    assert look_at(path) == (path, kind, "1.2.840.99.7")


def test_a_coronal_stack_is_a_reformat(tmp_path: Path, write_series: Callable[..., list[Path]]) -> None:
    assert look_at(write_series(tmp_path, HU, orientation=(1, 0, 0, 0, 0, -1))[0]).kind == REFORMAT


def test_other_files_are_no_images_and_broken_ones_damaged(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "slice.dcm").write_text("notes")
    assert look_at(tmp_path / "notes.txt").kind == NO_IMAGE
    damaged = look_at(tmp_path / "slice.dcm")
    assert damaged.kind == DAMAGED
    assert "must be a whole DICOM file" in damaged.series


def test_a_series_is_called_by_its_uid_or_a_checksum() -> None:
    assert series_volume("1.2.840.7") == "1_2_840_7"
    assert series_volume("a/b").startswith("series_")
    assert series_volume("a/b") != series_volume("a/c")
