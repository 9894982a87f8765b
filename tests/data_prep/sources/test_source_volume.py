import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.ct.files import ct_file
from common.ct.nifti import Rescale
from common.ct.npz import npz_affine
from common.ct.rejection import RejectedError
from data_prep.sources.rexgroundingct import Annotation
from data_prep.sources.source_volume import SourceVolume, planned_slices, read_volume

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
        return SourceVolume("train_1_a_1", "train", ct_file(path), "auto")._replace(**changes)

    return build


RAW = {"affine": np.eye(4), "form": "v1", "rescale": Rescale(1, -1024, SPACING_MM)}


def test_a_volume_in_hu_is_read_as_its_header_says(source) -> None:
    volume = read_volume(source(hu(), labels={"x": 1}))
    np.testing.assert_array_equal(volume.ct, hu().transpose(2, 1, 0))
    assert volume.spacing_mm == pytest.approx(SPACING_MM)
    assert volume.original_shape == SHAPE_XYZ
    assert volume.original_axcodes == "LPS"
    assert (volume.ts, volume.rex, volume.labels, volume.split) == (None, None, {"x": 1}, "train")


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, -8192), (2, -1024)])
def test_a_raw_volume_is_rescaled_by_the_metadata(slope, intercept, source) -> None:
    raw = ((hu() - intercept) // slope).astype(np.int16)
    volume = read_volume(source(raw, **RAW | {"rescale": Rescale(slope, intercept, SPACING_MM)}))
    np.testing.assert_array_equal(volume.ct, (raw.astype(int) * slope + intercept).transpose(2, 1, 0))
    assert volume.spacing_mm == SPACING_MM
    assert volume.original_axcodes == "LPS"


def test_both_forms_of_a_scan_give_the_same_slices(source) -> None:
    fixed = read_volume(source(hu()))
    raw = read_volume(source(hu() + 1024, **RAW))
    np.testing.assert_array_equal(raw.ct, fixed.ct)
    assert raw.spacing_mm == pytest.approx(fixed.spacing_mm)


def test_a_rescale_in_the_header_of_a_fixed_volume_is_applied_once(tmp_path, source) -> None:
    stored = source(hu() + 1024)
    content = bytearray(nib.Nifti1Image(hu() + 1024, AFFINE).to_bytes())
    content[112:120] = np.array([1, -1024], "<f4").tobytes()
    (tmp_path / "b.nii").write_bytes(content)
    volume = read_volume(
        stored._replace(ct=ct_file(tmp_path / "b.nii"), rescale=Rescale(1, -1024, SPACING_MM))
    )
    np.testing.assert_array_equal(volume.ct, hu().transpose(2, 1, 0))


def test_auto_goes_by_the_header(source) -> None:
    rescale = Rescale(1, -1024, SPACING_MM)
    raw = read_volume(source(hu() + 1024, **RAW | {"form": "auto"}))
    fixed = read_volume(source(hu(), form="auto", rescale=rescale))
    np.testing.assert_array_equal(raw.ct, fixed.ct)


def test_the_number_of_slices_is_known_from_headers(source) -> None:
    assert planned_slices(source(hu())) == 5
    assert planned_slices(source(hu(), form="v1", affine=np.eye(4), rescale=RAW["rescale"])) == 5
    turned = nib.Nifti1Image(hu(), AFFINE).as_reoriented(np.array([[1, -1], [2, 1], [0, 1]]))
    assert planned_slices(source(np.asarray(turned.dataobj), affine=turned.affine)) == 5


CONTRADICTIONS = {
    "stated raw, but in HU": (0, RAW, "not in HU: .*rescaled twice"),
    "stated raw, but the header speaks": (
        1024,
        RAW | {"affine": AFFINE},
        "v1 or v2: .*blank header, got .*LPS",
    ),
    "stated fixed, but blank": (0, {"form": "v2", "affine": np.eye(4)}, "v1 or v2: .*got a blank header"),
    "stated fixed, but raw": (1024, {"form": "v2"}, "not in HU: .*as dark as air: .* 24"),
    "raw, rescaled to no HU": (1024, RAW | {"rescale": Rescale(1, 0, SPACING_MM)}, "not in HU: .* 24"),
    "blank header and no metadata": (1024, {"affine": np.eye(4)}, "v1 or v2: .*a row in the metadata"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_between_forms_are_rejected(case, source) -> None:
    offset, changes, message = CONTRADICTIONS[case]
    with pytest.raises(RejectedError, match=message):
        read_volume(source(hu() + offset, **changes))


NAN = float("nan")


def tilted(deg: float) -> np.ndarray:
    """Slices shifted along y from one to the next, as by a tilted gantry."""
    affine = AFFINE.copy()
    affine[1, 2] = affine[2, 2] * np.tan(np.radians(deg))
    return affine


def file_of(array: np.ndarray, affine: np.ndarray = AFFINE) -> bytes:
    return nib.Nifti1Image(array, affine).to_bytes()


def with_bytes(content: bytes, at: int, values: list[float]) -> bytes:
    inserted = np.array(values, "<f4").tobytes()
    return content[:at] + inserted + content[at + len(inserted) :]


def with_voxel(value: float) -> np.ndarray:
    array = hu().astype(np.float32)
    array[3, 2, 1] = value
    return array


HEADERS: dict[str, tuple[bytes, str]] = {
    "a web page": (b"<html><body>Too many requests</body></html>", r"unreadable: .*b'<htm'.*again\."),
    "gantry tilt of 3 degrees": (file_of(hu(), tilted(3)), r"geometry: .*perpendicular, got 3\.0 degrees.*"),
    "an affine that is not finite": (
        with_bytes(file_of(hu()), 320, [np.nan]),
        r"spacing: .* 0\.1\.\.20\.0 mm, got \(0\.7, 0\.8, nan\)",
    ),
}
"""One per reason; ``tests/common/ct`` has all of them."""


@pytest.mark.parametrize("case", HEADERS)
def test_what_a_header_shows_is_rejected_by_planning(case, tmp_path) -> None:
    content, message = HEADERS[case]
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content) if content[4:5] == b"\0" else content)
    source = SourceVolume("a", "train", ct_file(tmp_path / "a.nii.gz"), "v2")
    for read in (planned_slices, read_volume):
        with pytest.raises(RejectedError) as caught:
            read(source)
        assert re.fullmatch(message, str(caught.value))


LARGE = np.random.default_rng(0).integers(-1024, 3072, (64, 64, 64), np.int16)
VOXELS: dict[str, tuple[bytes, str]] = {
    "truncated gzip": (gzip.compress(file_of(LARGE))[:-9], r"unreadable: .*'a\.nii\.gz' .* ended .*again\."),
    "truncated before it was gzipped": (
        gzip.compress(file_of(hu())[:-1]),
        r"unreadable: .*'a\.nii\.gz' .*3229 of 3230 bytes.*again\.",
    ),
    "NaN": (gzip.compress(file_of(with_voxel(np.nan))), "non-finite .*NaN or infinity in planes 0 to 4.*"),
    "infinity": (
        gzip.compress(file_of(with_voxel(np.inf))),
        "non-finite .*NaN or infinity in planes 0 to 4.*",
    ),
}


@pytest.mark.parametrize("case", VOXELS)
def test_what_only_the_voxels_show_is_rejected_by_reading(case, tmp_path) -> None:
    content, message = VOXELS[case]
    (tmp_path / "a.nii.gz").write_bytes(content)
    source = SourceVolume("a", "train", ct_file(tmp_path / "a.nii.gz"), "v2")
    assert planned_slices(source) in (5, 64)
    with pytest.raises(RejectedError) as caught:
        read_volume(source)
    assert re.fullmatch(message, str(caught.value))


def test_names_that_cannot_name_a_sample_are_rejected_by_planning(source) -> None:
    for name in ("../../x", "/etc/x", "vol 1 é", "a b", "1.2.840", ".hidden", "", "a" * 81, "a\n"):
        shown = name.replace("\n", " ")  # an error is one line
        with pytest.raises(RejectedError, match=rf"name: .*got '{re.escape(shown)}'\."):
            planned_slices(source(hu(), volume=name))


def test_masks_come_with_the_volume(source, tmp_path, save_nifti) -> None:
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


def test_a_volume_with_the_mask_of_another_is_rejected(source, tmp_path, save_nifti) -> None:
    path = save_nifti(tmp_path / "m.nii.gz", np.zeros((19, 17, 4), np.uint8), AFFINE)
    with pytest.raises(RejectedError, match=r"mask: 'm\.nii\.gz' .*\(5, 17, 19\), got \(4, 17, 19\)"):
        read_volume(source(hu(), ts=path))


def test_the_formats_of_a_ct_give_the_same_slices(source, tmp_path, save_nifti, write_series) -> None:
    """One phantom as NIfTI, as a DICOM series, and as RAD-ChestCT stores it; masks join each."""
    edge = np.diag([-0.8, -0.8, 0.8, 1.0])
    nifti = read_volume(source(hu(), affine=edge))
    np.savez_compressed(tmp_path / "trn1.npz", ct=hu().transpose(2, 1, 0)[::-1])
    rad = SourceVolume("trn1", "train", ct_file(tmp_path / "trn1.npz"))
    files = write_series(tmp_path / "series", hu().transpose(2, 1, 0))
    series = SourceVolume("series", "train", ct_file(*files))
    for other in (rad, series):
        assert planned_slices(other) == 5
        np.testing.assert_array_equal(read_volume(other).ct, nifti.ct)
    assert read_volume(rad).spacing_mm == pytest.approx((0.8, 0.8, 0.8))
    assert read_volume(series).spacing_mm == pytest.approx(SPACING_MM)
    wide = read_volume(rad._replace(rescale=Rescale(1, 0, (1.5, 1.5, 1.5))))
    assert wide.spacing_mm == pytest.approx((1.5, 1.5, 1.5))
    ids = (hu() + 1000).clip(0, 117).astype(np.uint8)
    as_lps = save_nifti(tmp_path / "lps.nii.gz", ids, edge)
    as_ipl = save_nifti(tmp_path / "ipl.nii.gz", ids.transpose(2, 1, 0)[::-1], npz_affine())
    np.testing.assert_array_equal(
        read_volume(rad._replace(ts=as_ipl)).ts, read_volume(source(hu(), affine=edge, ts=as_lps)).ts
    )


@pytest.mark.real_ct
def test_real_scans_are_read_with_plausible_hu(real_ct_dir) -> None:
    for name, axcodes in (("totalseg_example_ct_sm_3mm", "RAS"), ("crlm_ct_1004_ct_1p59x1p59x5mm", "LPS")):
        volume = read_volume(SourceVolume(name, "train", ct_file(real_ct_dir / f"{name}.nii.gz"), "v2"))
        assert volume.original_axcodes == axcodes
        assert -1024 <= volume.ct.min() < -950
        assert 0.2 < np.mean((volume.ct > -150) & (volume.ct < 150)) < 0.6


def test_absolute_paths_are_those_of_the_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    annotation = Annotation(Path("rex.nii.gz"), ("1a",))
    source = SourceVolume("a", "train", ct_file(Path("a.nii.gz")), "v2", ts=Path("ts.nii.gz"), rex=annotation)
    found = source.absolute()
    assert (found.ct.files, found.ts) == ((tmp_path / "a.nii.gz",), tmp_path / "ts.nii.gz")
    assert found.rex == Annotation(tmp_path / "rex.nii.gz", ("1a",))
    series = SourceVolume("a", "train", ct_file(Path("1.dcm"), Path("2.dcm"))).absolute()
    assert (series.ct.files, series.ts) == ((tmp_path / "1.dcm", tmp_path / "2.dcm"), None)
