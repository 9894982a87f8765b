import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import RLELossless

from common.ct.dicom import read_ct, read_grid
from common.ct.rejection import RejectedError

SHAPE_ZYX = (5, 17, 19)
SPACING_MM = (0.7, 0.8, 1.5)
Write = Callable[..., list[Path]]
Edit = Callable[[int, Dataset], None]


def canonical() -> np.ndarray:
    """HU that all differ, as (Z, H, W)."""
    voxels = np.random.default_rng(0).permutation(np.prod(SHAPE_ZYX))
    return voxels.reshape(SHAPE_ZYX).astype(np.int16) - 1000


def dataset_edit(**changes: Any) -> Edit:
    """Change tags of the third slice; None deletes them."""

    def edit(z: int, dataset: Dataset) -> None:
        for name, value in changes.items() if z == 2 else ():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    return edit


def test_a_series_is_sorted_by_position_and_shown_from_the_feet(tmp_path: Path, write_series: Write) -> None:
    files = write_series(tmp_path, canonical())
    assert files != sorted(files)
    for order in (files, sorted(files), files[::-1]):
        ct = read_ct(order)
        np.testing.assert_array_equal(ct.hu, canonical())
        assert ct.hu.dtype == np.int16
        assert ct.spacing_mm == pytest.approx(SPACING_MM)
        assert ct.values.lowest == -1000
        assert ct.grid.shape == SHAPE_ZYX[::-1]
        assert ct.grid.axcodes == "LPS"


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAI", "RPI", "LIP", "PIR"])
def test_a_scan_gives_the_same_slices_and_place_in_every_orientation(
    axcodes: str, tmp_path: Path, write_series: Write
) -> None:
    """Supine and prone, head or feet first, and slices of other planes; all turned by nibabel."""
    affine = np.diag([-0.7, -0.7, 0.7, 1])
    affine[:3, 3] = (11, 23, -130)
    image = nib.Nifti1Image(canonical().T, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axcodes))
    )
    turned = image.as_reoriented(turn)
    lps = np.diag([-1, -1, 1, 1]) @ turned.affine
    columns, rows, _ = (lps[:3, :3] / 0.7).T

    def place(z: int, dataset: Dataset) -> None:
        dataset.PixelSpacing = [0.7, 0.7]
        dataset.ImagePositionPatient = [round(float(mm), 6) for mm in lps[:3, 3] + z * lps[:3, 2]]

    stored = np.asarray(turned.dataobj).T
    files = write_series(tmp_path, stored, orientation=(*columns, *rows), edit=place)
    ct = read_ct(files)
    np.testing.assert_array_equal(ct.hu, canonical())
    assert ct.spacing_mm == pytest.approx((0.7, 0.7, 0.7))
    # Right-handed axes are stored as they are; the normal turns those of a left-handed stack.
    if np.linalg.det(lps[:3, :3]) > 0:
        assert ct.grid.axcodes == axcodes
        np.testing.assert_allclose(ct.grid.affine, turned.affine, atol=1e-5)


def test_the_checksum_is_that_of_the_digests_in_slice_order(tmp_path: Path, write_series: Write) -> None:
    files = write_series(tmp_path, canonical())
    digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    assert {read_ct(order).sha256 for order in (files, files[::-1])} == {hashlib.sha256(digests).hexdigest()}


STEPS = [
    ([0, 1.5, 3, 6, 7.5], r"missing slices: .*mostly 1\.5 mm, got 3 mm from '.*' to '"),
    ([0, 1.5, 3, 4.5, 7.5], r"missing slices: .*mostly 1\.5 mm, got 3 mm"),
    ([0, 1.5, 9, 10.5, 12], r"missing slices: .*mostly 1\.5 mm, got 7\.5 mm .*: 4 missing"),
    ([0, 1.5, 3, 4.5, 6.3], r"uneven spacing: .*mostly 1\.5 mm, got 1\.8 mm"),
    ([0, 4, 8, 15, 22], r"uneven spacing: .*mostly 4 mm, got 7 mm .*no slice is missing"),
    ([0, 1.3, 2.7, 4.3, 6.1], r"uneven spacing: .*mostly 1\.4 mm, got 1\.8 mm"),
    ([0, 1.5, 1.5, 3, 3], "duplicate: slices must lie at different positions"),
    ([0, 0, 0, 0, 0], "duplicate: slices must lie at different positions"),
]


@pytest.mark.parametrize(("heights", "message"), STEPS)
def test_slices_that_are_no_even_stack_are_rejected(
    heights: list[float], message: str, tmp_path: Path, write_series: Write
) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, heights[z]]
        dataset.SpacingBetweenSlices = 1.5  # positions decide, whatever else a header says

    files = write_series(tmp_path, canonical(), edit=edit)
    for read in (read_grid, read_ct):
        with pytest.raises(RejectedError, match=message):
            read(files)


@pytest.mark.parametrize(
    ("spacing_mm", "jitter_mm"), [(0.625, 0.05), (1, 0.06), (3, 0.1), (6, 0.06), (6, 0.25), (10, 0.4)]
)
def test_positions_that_jitter_about_an_even_stack_are_even(
    spacing_mm: float, jitter_mm: float, tmp_path: Path, write_series: Write
) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, round(spacing_mm * z + (-1) ** z * jitter_mm, 3)]

    hu = np.repeat(canonical(), 5, 0)[:23]
    files = write_series(tmp_path, hu, edit=edit)
    ct = read_ct(files)
    np.testing.assert_array_equal(ct.hu, hu)
    assert ct.spacing_mm[2] == pytest.approx(spacing_mm, rel=0.001)
    with pytest.raises(RejectedError, match=f"missing slices: .*'{files[8]}' to '{files[10]}': 1 missing"):
        read_grid(files[:9] + files[10:])


def test_a_copy_of_a_file_counts_once(
    tmp_path: Path, write_series: Write, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_series(tmp_path / "ct", canonical())
    (tmp_path / "copies").mkdir()
    copies = [Path(shutil.copy(files[z], tmp_path / "copies")) for z in (1, 3)]
    whole, doubled = read_ct(files), read_ct([*copies, *files])
    np.testing.assert_array_equal(doubled.hu, canonical())
    assert doubled.sha256 == whole.sha256
    assert "2 slices are copies of others and count once" in caplog.text
    with pytest.raises(RejectedError, match="geometry: a series must have at least 2 slices, got 1"):
        read_grid([files[1], copies[0]])
    with pytest.raises(RejectedError, match="geometry: a series must have at least 2 slices, got 1"):
        read_grid(files[:1])
    changed = pydicom.dcmread(copies[0])
    changed.PixelData = bytes(len(changed.PixelData))
    changed.save_as(copies[0])
    with pytest.raises(RejectedError, match="duplicate: slices must lie at different positions"):
        read_grid([*files, copies[0]])


@pytest.mark.parametrize("position", ["HFS", "FFP", "HFDR", "", ["HFS", "FFS"], None])
def test_the_orientation_decides_whatever_patient_position_says(
    position: Any, tmp_path: Path, write_series: Write
) -> None:
    """Feet first and on the side are in ImageOrientationPatient; rows that run down make a turned slice."""
    side = (0, 1, 0, -1, 0, 0)  # columns to the back, rows to the right: a patient on the side
    files = write_series(
        tmp_path,
        canonical(),
        orientation=side,
        edit=lambda z, dataset: setattr(dataset, "PatientPosition", position),
    )
    expected = canonical().transpose(0, 2, 1)[:, :, ::-1]
    np.testing.assert_array_equal(read_ct(files).hu, expected)


def test_gantry_tilt_is_rejected(tmp_path: Path, write_series: Write) -> None:
    """The table moves along the body; the slices are tilted by 12 degrees against it."""
    angle = np.radians(12)
    row, column = (1, 0, 0), (0, float(np.cos(angle)), float(np.sin(angle)))

    def edit(z: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, 5 * z]

    files = write_series(tmp_path, canonical(), orientation=(*row, *column), edit=edit)
    with pytest.raises(RejectedError, match=r"geometry: .*sideways by 4\.2 mm, as by a gantry tilt of 12\.0"):
        read_grid(files)


def test_an_oblique_scan_is_rejected_by_its_slices(tmp_path: Path, write_series: Write) -> None:
    angle = np.radians(15)
    column = (0, float(np.cos(angle)), float(np.sin(angle)))
    files = write_series(tmp_path, canonical(), orientation=(1, 0, 0, *column))
    assert read_grid(files).shape == SHAPE_ZYX[::-1]
    with pytest.raises(RejectedError, match="geometry: affine must be within 10 degrees .* got 15"):
        read_ct(files)


POSITION, ORIENTATION = "ImagePositionPatient", "ImageOrientationPatient"
HEADERS: list[tuple[dict[str, Any], str]] = [
    ({POSITION: None}, f"metadata: {POSITION} must be 3 numbers"),
    (
        {POSITION: None, "SliceLocation": 3},
        f"metadata: {POSITION} .* got None .*SliceLocation cannot stand in",
    ),
    ({POSITION: ""}, f"metadata: {POSITION} must be 3 numbers"),
    ({POSITION: [1, 2]}, rf"metadata: {POSITION} must be 3 numbers, got \[1.*2"),
    ({POSITION: [3, -7, -97]}, r"geometry: .*sideways by 8\.0 mm"),
    ({ORIENTATION: None}, f"metadata: {ORIENTATION} must be 6 numbers"),
    (
        {ORIENTATION: [1, 0, 0, 0, 0, -1]},
        f"geometry: slices must share {ORIENTATION}, .* in '.*' and .* in '",
    ),
    ({ORIENTATION: [1, 0, 0, 1, 0, 0]}, f"geometry: {ORIENTATION} must be perpendicular"),
    ({"PixelSpacing": ""}, "metadata: PixelSpacing must be 2 numbers"),
    ({"PixelSpacing": [0, 0.7]}, r"spacing: .* got 17 x 19 of 0 x 0\.7"),
    ({"PixelSpacing": [0.8, 0.71]}, "geometry: slices must share PixelSpacing"),
    ({"RescaleIntercept": None}, "metadata: RescaleIntercept must be a number, got None in"),
    ({"RescaleSlope": None}, "metadata: RescaleSlope must be a number, got None in"),
    ({"RescaleSlope": [1, 2]}, "metadata: RescaleSlope must be a number, got .*1.*2"),
    ({"RescaleSlope": 0}, "rescale: RescaleSlope must be positive, got 0 in '"),
    ({"RescaleType": "HU_MOD"}, "not in HU: RescaleType must be HU or absent, got 'HU_MOD'"),
    ({"NumberOfFrames": 3}, "multi-frame: '.*' .* 3 frames lies, got 0 items"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, "unreadable: pixels of '.*' must be numbers"),
    ({"SamplesPerPixel": 3}, "unreadable: pixels of '.*' must be numbers"),
    ({"BitsStored": 12}, "unreadable: HighBit must be BitsStored - 1, got 15 and 12 in '"),
    ({"Rows": 16}, "geometry: slices must share Rows and Columns, got .17, 19. .* .16, 19."),
]


@pytest.mark.parametrize(("changes", "message"), HEADERS)
def test_headers_that_contradict_or_lack_something_are_rejected(
    changes: dict[str, Any], message: str, tmp_path: Path, write_series: Write
) -> None:
    files = write_series(tmp_path, canonical(), edit=dataset_edit(**changes))
    for read in (read_grid, read_ct):
        with pytest.raises(RejectedError, match=message):
            read(files)


@pytest.mark.parametrize("unit", [" HU", "hu ", "", None])
def test_blanks_around_the_unit_mean_nothing(unit: str | None, tmp_path: Path, write_series: Write) -> None:
    files = write_series(tmp_path, canonical(), edit=dataset_edit(RescaleType=unit))
    np.testing.assert_array_equal(read_ct(files).hu, canonical())


@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_are_not_whole_are_rejected(compressed: bool, tmp_path: Path, write_series: Write) -> None:
    edit = (lambda z, dataset: dataset.compress(RLELossless)) if compressed else (lambda z, dataset: None)
    files = write_series(tmp_path, canonical(), edit=edit)
    whole = files[1].read_bytes()
    for size in (0, 100, 200, len(whole) // 2, len(whole) - 300, len(whole) - 10):
        files[1].write_bytes(whole[:size])
        with pytest.raises(RejectedError, match=r"(unreadable: Cannot read '.*' as DICOM: |metadata: )"):
            read_ct(files)
    files[1].write_bytes(b"<html>404</html>" * 20)
    files[2].unlink()
    for order in (files[:2], [files[0], files[2]]):
        with pytest.raises(RejectedError, match=f"unreadable: Cannot read '{order[1]}' as DICOM: "):
            read_grid(order)
