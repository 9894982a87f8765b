"""On a synthetic patient whose anatomy is known, turned every way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.ct.orientation import axial_slices
from data_prep.audit.anatomy import extent_of, find_anatomy, measure_anatomy
from data_prep.audit.measures import reasons
from data_prep.audit.volume import mask_grid
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render

SLICE_MM = 8.0

Turn = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def patient() -> Volume:
    return render(roster(1, seed=2)[0], "a", 64, (SLICE_MM, SLICE_MM), {})


def measure(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    shape = hu.shape[1:]
    rows, columns = mask_grid(shape)
    return measure_anatomy(find_anatomy(hu[:, rows[:, None], columns], shape, spacing_mm))


def spacing(patient: Volume) -> tuple[float, float, float]:
    return (patient.protocol.pixel_mm, patient.protocol.pixel_mm, SLICE_MM)


def test_lungs_are_as_large_as_they_were_drawn(patient: Volume) -> None:
    measures = measure(patient.hu, spacing(patient))
    voxel_litres = patient.protocol.pixel_mm**2 * SLICE_MM / 1e6
    drawn = np.isin(patient.ts, range(10, 15)).sum() * voxel_litres
    assert measures["lungs"] == pytest.approx(drawn, rel=0.15)
    assert reasons(measures) == {}


@pytest.mark.parametrize(
    ("turn", "failing"),
    [
        (lambda hu: hu[::-1], {"airway"}),
        (lambda hu: hu[:, ::-1], {"spine", "table"}),
        (lambda hu: hu[:, :, ::-1], {"heart"}),
    ],
    ids=["upside_down", "front_to_back", "mirrored"],
)
def test_a_turned_patient_is_noticed_by_the_right_question(
    turn: Turn, failing: set[str], patient: Volume
) -> None:
    assert reasons(measure(turn(patient.hu), spacing(patient))).keys() == failing


def test_exchanged_rows_and_columns_are_noticed(patient: Volume) -> None:
    found = reasons(measure(patient.hu.transpose(0, 2, 1), spacing(patient)))
    assert "width" in found
    assert found["width"].startswith("deeper than wide: rows and columns exchanged")


def test_sagittal_slices_are_noticed(patient: Volume) -> None:
    x, y, z = spacing(patient)
    assert reasons(measure(patient.hu.transpose(2, 0, 1), (y, z, x)))


def test_an_empty_volume_has_no_lungs_and_breaks_nothing() -> None:
    air = np.full((3, 128, 128), -1000, np.int16)
    measures = measure_anatomy(find_anatomy(air, (128, 128), (1.0, 1.0, 1.0)))
    assert reasons(measures).keys() == {"lungs"}
    tissue = np.full((1, 128, 128), 40, np.int16)
    assert {"lungs", "corners"} <= reasons(
        measure_anatomy(find_anatomy(tissue, (128, 128), (1.0, 1.0, 1.0)))
    ).keys()


def test_thin_slices_are_averaged_to_the_coarser_grid() -> None:
    planes = np.arange(7, dtype=np.int16)[:, None, None] * np.ones((1, 128, 128), np.int16)
    anatomy = find_anatomy(planes, (256, 512), (0.5, 0.75, 2.0))
    np.testing.assert_array_equal(anatomy.hu[:, 0, 0], [0.5, 2.5, 4.5])
    assert anatomy.voxel_mm == (4.0, 1.5, 2.0)


def test_extent_of_a_mask() -> None:
    mask = np.zeros((4, 5, 6), bool)
    mask[1, 2, 3] = mask[2, 4, 3] = True
    assert extent_of(mask) == ((1, 2), (2, 4), (3, 3))
    assert extent_of(np.zeros((2, 2, 2), bool)) is None


@pytest.mark.real_ct
def test_a_real_chest_lies_right_and_is_noticed_upside_down(real_ct_dir: Path) -> None:
    import nibabel as nib

    image = nib.load(real_ct_dir / "lidc_idri_0314_ct_1p56x1p56x2mm.nii.gz")
    hu, spacing_mm = axial_slices(np.asarray(image.dataobj).astype(np.int16), image.affine)
    assert reasons(measure(hu, spacing_mm)) == {}
    assert reasons(measure(hu[::-1], spacing_mm)).keys() == {"airway"}
    assert reasons(measure(hu[:, ::-1], spacing_mm)).keys() == {"spine", "table"}
    assert "width" in reasons(measure(hu.transpose(0, 2, 1), spacing_mm))
