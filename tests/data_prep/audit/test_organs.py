"""On a synthetic patient whose organs are known, and on label maps that do not belong to it."""

import numpy as np
import pytest

from common.ct.checks import judge
from common.ct.geometry import axial_slices
from data_prep.audit.checks import RULES
from data_prep.audit.organs import measure_organs, organ_voxels
from tests.data_prep.conftest import cells_of, drawn_patient

SLICE_MM = 8.0

Planes = tuple[np.ndarray, np.ndarray, tuple[int, int], tuple[float, float, float]]


def reasons(measures: dict[str, float]) -> dict[str, str]:
    return {doubt.rule: doubt.text for doubt in judge(measures, RULES)}


@pytest.fixture(scope="module")
def patient() -> Planes:
    """CT and label map of a patient on the masks' grid, shape and spacing of the slices."""
    drawn = drawn_patient(0, "a")
    return cells_of(drawn.ct), drawn.ts, drawn.ct.shape[1:], drawn.spacing_mm


def test_distances_are_in_millimetres(patient) -> None:
    hu, ts, shape, spacing_mm = patient
    measures = measure_organs(hu, ts, shape, spacing_mm)
    assert reasons(measures) == {}
    liver, left = np.argwhere(ts == 5), np.argwhere(np.isin(ts, (1, 6, 51)))
    column_mm = shape[1] * spacing_mm[0] / 128
    assert measures["organs_side"] == pytest.approx((left.mean(0) - liver.mean(0))[2] * column_mm)
    chest = np.argwhere(np.isin(ts, (10, 11, 12, 13, 14, 16, 51, 53)))
    abdomen = np.argwhere(np.isin(ts, (1, 2, 3, 4, 5, 6, 7)))
    assert measures["organs_head"] == pytest.approx((chest.mean(0) - abdomen.mean(0))[0] * SLICE_MM)
    assert measures["organs_lungs"] == np.median(hu[(ts >= 10) & (ts <= 14)])


@pytest.mark.parametrize(
    ("turn", "failing"),
    [
        (lambda array: array[::-1], {"organs_head"}),
        (lambda array: array[:, ::-1], {"organs_back"}),
        (lambda array: array[:, :, ::-1], {"organs_side", "organs_named"}),
    ],
    ids=["upside_down", "front_to_back", "mirrored"],
)
def test_a_patient_turned_with_its_label_map_is_noticed(turn, failing, patient) -> None:
    hu, ts, shape, spacing_mm = patient
    assert reasons(measure_organs(turn(hu), turn(ts), shape, spacing_mm)).keys() == failing


@pytest.mark.parametrize(
    "wrong",
    [lambda ts: ts[::-1], lambda ts: np.roll(ts, 30, axis=1), lambda ts: ts.transpose(0, 2, 1)],
    ids=["upside_down", "shifted", "transposed"],
)
def test_a_label_map_that_does_not_lie_on_its_scan_is_noticed(wrong, patient) -> None:
    hu, ts, shape, spacing_mm = patient
    found = reasons(measure_organs(hu, wrong(ts), shape, spacing_mm))
    assert {"organs_air", "organs_bones", "organs_lungs"} & found.keys()


def test_shuffled_ids_are_noticed(patient) -> None:
    hu, ts, shape, spacing_mm = patient
    ids = np.append(0, np.arange(117, 0, -1)).astype(np.uint8)
    assert "organs_bones" in reasons(measure_organs(hu, ids[ts], shape, spacing_mm))


def test_an_empty_label_map_is_noticed_and_asked_nothing_else(patient) -> None:
    hu, ts, shape, spacing_mm = patient
    assert reasons(measure_organs(hu, np.zeros_like(ts), shape, spacing_mm)).keys() == {"organs"}


def test_voxels_are_counted_by_id() -> None:
    counts = organ_voxels(np.array([[0, 5, 5], [117, 5, 0]], np.uint8))
    assert counts.shape == (118,)
    assert (counts[0], counts[5], counts[117], counts.sum()) == (2, 3, 1, 6)


@pytest.mark.real_ct
def test_a_real_label_map_stored_in_another_order_lies_on_its_scan(real_ct_dir) -> None:
    import nibabel as nib

    stored = [
        nib.load(real_ct_dir / f"totalseg_{name}_native.nii.gz") for name in ("dicom_ct", "dicom_seg117")
    ]
    (hu, spacing_mm), (ts, _) = (axial_slices(np.asarray(image.dataobj), image.affine) for image in stored)
    planes = [cells_of(hu.astype(np.int16)), cells_of(ts.astype(np.uint8))]
    assert reasons(measure_organs(*planes, hu.shape[1:], spacing_mm)) == {}
    mirrored = measure_organs(planes[0], planes[1][:, :, ::-1], hu.shape[1:], spacing_mm)
    assert {"organs_bones", "organs_side", "organs_named"} <= reasons(mirrored).keys()
