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


@pytest.mark.parametrize(
    ("content", "can_be_planned", "message"),
    [
        (b"<html><body>Too many requests</body></html>", False, r"unreadable: .*b'<htm'.*again\."),
        (nib.Nifti1Image(hu(), AFFINE).to_bytes()[:-1], True, r"unreadable: .*3229 of 3230 bytes.*again\."),
    ],
    ids=["header", "voxels"],
)
def test_planning_rejects_what_a_header_shows_and_reading_the_rest(
    content, can_be_planned, message, tmp_path
) -> None:
    """One of each; ``tests/common/ct`` has all of them."""
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content) if can_be_planned else content)
    source = SourceVolume("a", "train", ct_file(tmp_path / "a.nii.gz"), "v2")
    if can_be_planned:
        assert planned_slices(source) == 5
    for read in (read_volume,) if can_be_planned else (planned_slices, read_volume):
        with pytest.raises(RejectedError) as caught:
            read(source)
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
