from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.ct.files import ct_file
from common.ct.geometry import Grid
from common.ct.rejection import RejectedError
from common.embeddings.dense_labels import findings_present, read_dense_labels
from data_prep.dense_labels import dense_labels_of, write_all
from data_prep.sources.rexgroundingct import Annotation, read_full_findings
from data_prep.sources.source_volume import SourceVolume
from data_prep.sources.totalsegmentator import read_full_label_map

pytestmark = pytest.mark.usefixtures("any_values")

SHAPE_XYZ = (61, 53, 5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])


def as_stored(array: np.ndarray, axcodes: str) -> nib.Nifti1Image:
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    return nib.Nifti1Image(array, AFFINE).as_reoriented(turn)


@pytest.mark.parametrize("axcodes", ["LPS", "LAS", "RAS", "SPL", "PIR"])
def test_full_masks_are_turned_by_their_own_affine(axcodes, tmp_path) -> None:
    ids = np.random.default_rng(0).integers(0, 118, SHAPE_XYZ).astype(np.uint8)
    nib.save(as_stored(ids, axcodes), tmp_path / "a.nii.gz")
    grid = Grid(SHAPE_XYZ, AFFINE)
    np.testing.assert_array_equal(read_full_label_map(tmp_path / "a.nii.gz", grid), ids.transpose(2, 1, 0))
    finding = ids > 100
    nib.save(as_stored(finding.astype(np.uint8), axcodes), tmp_path / "rex.nii.gz")
    bits = read_full_findings(Annotation(tmp_path / "rex.nii.gz", ("2d",)), grid)
    np.testing.assert_array_equal(bits, finding.transpose(2, 1, 0) * np.uint16(1 << 9))


def source_of(folder: Path, organ_x: int, organ_y: int) -> SourceVolume:
    """A body in air, stored RAS, with liver and a nodule in it; masks stored LAS."""
    hu = np.full(SHAPE_XYZ, -1000, np.int16)
    hu[8:50, 5:47] = 30
    ids = np.zeros(SHAPE_XYZ, np.uint8)
    ids[organ_x : organ_x + 10, organ_y : organ_y + 8, 2] = 5
    nodule = np.zeros(SHAPE_XYZ, np.uint8)
    nodule[organ_x, organ_y, 2] = 1
    nib.save(as_stored(hu, "RAS"), folder / "ct.nii.gz")
    nib.save(as_stored(ids, "LAS"), folder / "ts.nii.gz")
    nib.save(as_stored(nodule, "LAS"), folder / "rex.nii.gz")
    rex = Annotation(folder / "rex.nii.gz", ("2d",))
    return SourceVolume(
        "valid_1_a_1", "valid", ct_file(folder / "ct.nii.gz"), "v2", None, folder / "ts.nii.gz", rex
    )


@pytest.mark.parametrize(("x", "y"), [(10, 8), (37, 36), (20, 30)])
def test_an_organ_is_found_where_the_cropped_image_shows_it(x, y, tmp_path) -> None:
    labels = dense_labels_of(source_of(tmp_path, x, y), grid=6)
    top, left, side = labels.box
    # slices of 53 rows and 61 columns are padded by 4 rows above and below
    assert (top <= 5 + 4, left <= 8, side < 61) == (True, True, True)
    shares = labels.shares.toarray().reshape(5, 6, 6, 118)[..., 5]
    assert not shares[[0, 1, 3, 4]].any()
    assert shares.sum() * (side / 6) ** 2 == pytest.approx(80, rel=1e-5)
    rows, columns = np.mgrid[:6, :6] + 0.5
    centre = [float((shares[2] * axis).sum() / shares.sum()) * side / 6 for axis in (rows, columns)]
    assert centre == pytest.approx([y + 4 + 4 - top, x + 5 - left], abs=side / 12)
    present = findings_present(labels.findings)
    assert present.sum() == 1
    assert present[2, (y + 4 - top) * 6 // side * 6 + (x - left) * 6 // side, 9]


def test_a_mask_on_another_grid_is_rejected(tmp_path) -> None:
    source = source_of(tmp_path, 10, 8)
    coarse = np.diag([-1.4, -1.6, 1.5, 1.0])
    nib.save(nib.Nifti1Image(np.zeros((31, 27, 5), np.uint8), coarse), tmp_path / "ts.nii.gz")
    with pytest.raises(RejectedError, match="'ts.nii.gz' must lie on the voxels of the CT for dense labels"):
        dense_labels_of(source, grid=6)
    with pytest.raises(RejectedError, match="'valid_1_a_1' must have a TotalSegmentator label map, got none"):
        dense_labels_of(source._replace(ts=None), grid=6)


def test_labels_that_are_there_are_kept_and_bad_volumes_listed(tmp_path, dask) -> None:
    good = source_of(tmp_path, 10, 8)
    bad = good._replace(volume="valid_2_a_1", ts=None)
    out, seen = tmp_path / "out", []
    rejected = write_all(dask, [good, bad], out, grid=6, progress=lambda *step: seen.append(step[1:]))
    assert [(item.volume, item.reason) for item in rejected] == [("valid_2_a_1", "mask")]
    assert seen[-1] == (2, 2)
    assert read_dense_labels(out / "valid_1_a_1.safetensors").volume == "valid_1_a_1"
    kept = (out / "valid_1_a_1.safetensors").stat().st_mtime_ns
    assert write_all(dask, [good], out, grid=6, progress=lambda *step: None) == []
    assert (out / "valid_1_a_1.safetensors").stat().st_mtime_ns == kept
