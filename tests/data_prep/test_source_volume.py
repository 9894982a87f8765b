from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep.rejection import RejectedError
from data_prep.rexgroundingct import Annotation
from data_prep.source_volume import Rescale, SourceVolume, planned_slices, read_volume

SHAPE_XYZ = (19, 17, 5)
SPACING_MM = (0.7, 0.8, 1.5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def hu() -> np.ndarray:
    """Whole HU from -1000 on, as (X, Y, Z) stored as LPS."""
    return np.random.default_rng(0).permutation(np.prod(SHAPE_XYZ)).reshape(SHAPE_XYZ).astype(np.int16) - 1000


@pytest.fixture
def source(tmp_path: Path, save_nifti: Save) -> Callable[..., SourceVolume]:
    """A volume of given voxels and affine."""

    def build(array: np.ndarray, affine: np.ndarray = AFFINE, **changes: Any) -> SourceVolume:
        path = save_nifti(tmp_path / "train_1_a_1.nii.gz", array, affine)
        return SourceVolume("train_1_a_1", "train", path, "auto")._replace(**changes)

    return build


Source = Callable[..., SourceVolume]
RAW = {"affine": np.eye(4), "form": "v1", "rescale": Rescale(1, -1024, SPACING_MM)}


def test_a_volume_in_hu_is_read_as_its_header_says(source: Source) -> None:
    volume = read_volume(source(hu(), labels={"x": 1}))
    np.testing.assert_array_equal(volume.ct, hu().transpose(2, 1, 0))
    assert volume.spacing_mm == pytest.approx(SPACING_MM)
    assert volume.original_shape == SHAPE_XYZ
    assert volume.original_axcodes == "LPS"
    assert (volume.ts, volume.rex, volume.labels, volume.split) == (None, None, {"x": 1}, "train")


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, -8192), (2, -1024)])
def test_a_raw_volume_is_rescaled_by_the_metadata(slope: float, intercept: float, source: Source) -> None:
    raw = ((hu() - intercept) // slope).astype(np.int16)
    volume = read_volume(source(raw, **RAW | {"rescale": Rescale(slope, intercept, SPACING_MM)}))
    np.testing.assert_array_equal(volume.ct, (raw.astype(int) * slope + intercept).transpose(2, 1, 0))
    assert volume.spacing_mm == SPACING_MM
    assert volume.original_axcodes == "LPS"


def test_both_forms_of_a_scan_give_the_same_slices(source: Source) -> None:
    fixed = read_volume(source(hu()))
    raw = read_volume(source(hu() + 1024, **RAW))
    np.testing.assert_array_equal(raw.ct, fixed.ct)
    assert raw.spacing_mm == pytest.approx(fixed.spacing_mm)


def test_a_rescale_in_the_header_of_a_fixed_volume_is_applied_once(tmp_path: Path, source: Source) -> None:
    stored = source(hu() + 1024)
    content = bytearray(nib.Nifti1Image(hu() + 1024, AFFINE).to_bytes())
    content[112:120] = np.array([1, -1024], "<f4").tobytes()
    (tmp_path / "b.nii").write_bytes(content)
    volume = read_volume(stored._replace(ct=tmp_path / "b.nii", rescale=Rescale(1, -1024, SPACING_MM)))
    np.testing.assert_array_equal(volume.ct, hu().transpose(2, 1, 0))


def test_auto_goes_by_the_header(source: Source) -> None:
    rescale = Rescale(1, -1024, SPACING_MM)
    raw = read_volume(source(hu() + 1024, **RAW | {"form": "auto"}))
    fixed = read_volume(source(hu(), form="auto", rescale=rescale))
    np.testing.assert_array_equal(raw.ct, fixed.ct)


def test_the_number_of_slices_is_known_from_headers(source: Source) -> None:
    assert planned_slices(source(hu())) == 5
    assert planned_slices(source(hu(), form="v1", affine=np.eye(4), rescale=RAW["rescale"])) == 5
    turned = nib.Nifti1Image(hu(), AFFINE).as_reoriented(np.array([[1, -1], [2, 1], [0, 1]]))
    assert planned_slices(source(np.asarray(turned.dataobj), affine=turned.affine)) == 5


CONTRADICTIONS = {
    "stated raw, but in HU": (
        hu(),
        RAW,
        r"v1 or v2: raw values must be above -800, got -1000: this is in HU",
    ),
    "stated raw, but the header speaks": (
        hu() + 1024,
        RAW | {"affine": AFFINE},
        "v1 or v2: a raw volume must have a blank header, got LPS",
    ),
    "stated fixed, but the header is blank": (
        hu(),
        {"form": "v2", "affine": np.eye(4)},
        "v1 or v2: a volume in HU must state its geometry, got a blank header",
    ),
    "stated fixed, but raw": (
        hu() + 1024,
        {"form": "v2"},
        "not in HU: a CT in HU must hold air, -800 or less, got .* 24",
    ),
    "raw, rescaled to anything but HU": (
        hu() + 1024,
        RAW | {"rescale": Rescale(1, 0, SPACING_MM)},
        "not in HU: a CT in HU must hold air, -800 or less, got values from 24 HU as v1",
    ),
    "blank header and no metadata": (
        hu() + 1024,
        {"affine": np.eye(4)},
        "v1 or v2: a raw volume must have a row in the metadata",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_between_forms_are_rejected(case: str, source: Source) -> None:
    array, changes, message = CONTRADICTIONS[case]
    with pytest.raises(RejectedError, match=message):
        read_volume(source(array, **changes))


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rescale": Rescale(1, -1024, (0.7, 0.8, NAN))},
            r"spacing: .* 0\.1\.\.20\.0 mm, got \(0\.7, 0\.8, nan\)",
        ),
        ({"rescale": Rescale(1, -1024, (0.7, 0.8, 0.0))}, r"spacing: .*, got \(0\.7, 0\.8, 0\)"),
        ({"rescale": Rescale(1, -1024, (0.7, 0.8, -1.5))}, r"spacing: .*, got \(0\.7, 0\.8, -1\.5\)"),
        ({"rescale": Rescale(1, -1024, (0.7, 0.8, 0.035))}, r"spacing: .*, got \(0\.7, 0\.8, 0\.035\)"),
        (
            {"rescale": Rescale(NAN, -1024, SPACING_MM)},
            "rescale: slope and intercept must be numbers, got nan",
        ),
        (
            {"rescale": Rescale(0, -1024, SPACING_MM)},
            "rescale: slope and intercept must be numbers, got 0 and",
        ),
        ({"rescale": Rescale(1, NAN, SPACING_MM)}, "rescale: .*, got 1 and nan"),
    ],
)
def test_metadata_that_says_nothing_is_rejected_by_planning(
    changes: dict[str, Any], message: str, source: Source
) -> None:
    with pytest.raises(RejectedError, match=message):
        planned_slices(source(hu() + 1024, **RAW | changes))


def test_headers_that_are_no_axial_scans_are_rejected_by_planning(tmp_path: Path, source: Source) -> None:
    oblique = AFFINE.copy()
    oblique[1, 2] = 1.5
    with pytest.raises(RejectedError, match="geometry: affine must be within 10 degrees"):
        planned_slices(source(hu(), affine=oblique))
    with pytest.raises(
        RejectedError, match=r"spacing: spacing must lie in 0\.1\.\.20\.0 mm, got \(0\.7, 0\.8, 35\)"
    ):
        planned_slices(source(hu(), affine=np.diag([-0.7, -0.8, 35, 1])))
    damaged = source(hu())
    content = bytearray(nib.Nifti1Image(hu(), AFFINE).to_bytes())
    content[320:324] = np.array([NAN], "<f4").tobytes()
    (tmp_path / "b.nii").write_bytes(content)
    with pytest.raises(RejectedError, match=r"spacing: .*got \(0\.7, 0\.8, nan\)"):
        planned_slices(damaged._replace(ct=tmp_path / "b.nii"))


def test_names_that_cannot_name_a_sample_are_rejected_by_planning(source: Source) -> None:
    for name in ("../train", "a b", "1.2.840", ".hidden"):
        with pytest.raises(RejectedError, match="name: volume must match .*, got"):
            planned_slices(source(hu(), volume=name))


def test_masks_come_with_the_volume(source: Source, tmp_path: Path, save_nifti: Save) -> None:
    ids = np.zeros(SHAPE_XYZ, np.uint8)
    ids[:, :, 2] = 5
    findings = np.zeros((1, *SHAPE_XYZ), np.uint8)
    findings[0, 18, 0, 4] = 1
    ts = save_nifti(tmp_path / "ts.nii.gz", ids, AFFINE)
    rex = Annotation(save_nifti(tmp_path / "rex.nii.gz", findings, AFFINE), ("2g",))
    for changes in ({"array": hu()}, {"array": hu() + 1024, **RAW}):
        volume = read_volume(source(**changes, ts=ts, rex=rex))
        assert [int(plane.max()) for plane in volume.ts] == [0, 0, 5, 0, 0]
        assert np.flatnonzero(volume.rex.any(axis=(1, 2))).tolist() == [4]
        assert volume.rex[4, 0, 127] == 2**12
        assert volume.rex[4, 127, 0] == 0


@pytest.mark.real_ct
def test_real_scans_are_read_with_plausible_hu(real_ct_dir: Path) -> None:
    for name, axcodes in (("totalseg_example_ct_sm_3mm", "RAS"), ("crlm_ct_1004_ct_1p59x1p59x5mm", "LPS")):
        volume = read_volume(SourceVolume(name, "train", real_ct_dir / f"{name}.nii.gz", "v2"))
        assert volume.original_axcodes == axcodes
        assert -1024 <= volume.ct.min() < -950
        assert 0.2 < np.mean((volume.ct > -150) & (volume.ct < 150)) < 0.6
