import hashlib
import struct
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from common.ct import nifti_file
from common.ct.geometry import RejectedError, canonical_indices
from common.ct.nifti import Rescale, open_volume, read_ct, read_grid, read_header

SHAPE_XYZ = (7, 5, 3)
SPACING_MM = (0.7, 0.8, 1.5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
RESCALE = Rescale(1, -1024, SPACING_MM)
ALL_AXCODES = ["".join(axes) for order in permutations(("LR", "PA", "IS")) for axes in product(*order)]
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def hu() -> np.ndarray:
    return np.random.default_rng(0).integers(-1200, 3400, SHAPE_XYZ).astype(np.int16)


def with_rescale(path: Path, array: np.ndarray, slope: float, intercept: float) -> Path:
    """Written into the bytes: nibabel would choose a slope of its own for an image it saves."""
    content = bytearray(nib.Nifti1Image(array, AFFINE).to_bytes())
    content[112:120] = struct.pack("<2f", slope, intercept)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SLP", "IPL"])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 10**6])
def test_slices_are_those_of_the_whole_array(
    axcodes: str, chunk_bytes: int, tmp_path: Path, save_nifti: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle reads everything as float64 and reorients with nibabel."""
    monkeypatch.setattr(nifti_file, "CHUNK_BYTES", chunk_bytes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    image = nib.Nifti1Image(hu(), AFFINE).as_reoriented(turn)
    path = save_nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine)
    ct = read_ct(path)
    np.testing.assert_array_equal(ct.hu, hu().transpose(2, 1, 0).clip(-1024, 3071))
    assert ct.hu.dtype == np.int16
    assert ct.values.lowest == hu().min()
    assert ct.spacing_mm == pytest.approx(SPACING_MM)
    assert ct.grid.axcodes == axcodes
    assert ct.grid.has_origin
    assert ct.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    grid = read_grid(path)
    assert (grid.shape, grid.axcodes) == (ct.grid.shape, ct.grid.axcodes)
    np.testing.assert_array_equal(grid.affine, ct.grid.affine)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2, -8192), (0.5, -100.25), (10, 0)])
def test_the_rescale_of_the_header_is_applied_once(
    dtype: type, slope: float, intercept: float, tmp_path: Path
) -> None:
    stored = np.abs(hu()).astype(dtype)
    stored = np.minimum(stored, 31_743 // slope).astype(dtype)
    stored[0, 0, 0] = 19_967 if slope == 2 else 3_174  # twice this does not fit 16 bits
    ct = read_ct(with_rescale(tmp_path / "a.nii", stored, slope, intercept))
    exact = stored.astype(np.float64) * slope + intercept
    np.testing.assert_array_equal(ct.hu, np.rint(exact).clip(-1024, 3071).transpose(2, 1, 0))
    assert ct.values.lowest == exact.min()


def test_raw_volumes_have_no_origin(tmp_path: Path, save_nifti: Save) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", np.abs(hu()), np.eye(4))
    for form in ("v1", "auto"):
        grid = read_grid(path, form, RESCALE)
        assert (grid.axcodes, grid.has_origin) == ("LPS", False)
        np.testing.assert_array_equal(grid.affine, AFFINE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_named(value: float, tmp_path: Path, save_nifti: Save) -> None:
    array = hu().astype(np.float32)
    array[2, 3, 1] = value
    with pytest.raises(
        RejectedError,
        match=rf"non-finite voxels: voxels must be finite, got {value} at \(2, 3, 1\) as stored",
    ):
        read_ct(save_nifti(tmp_path / "a.nii.gz", array, AFFINE))


@pytest.mark.parametrize("axcodes", ALL_AXCODES)
def test_slices_of_all_48_axis_orders_are_those_that_simpleitk_finds_in_the_world(
    axcodes: str, tmp_path: Path, save_nifti: Save
) -> None:
    """By sform alone, by qform alone, and through .mha and .nrrd; SimpleITK reorients to LPS for itself."""
    placed = AFFINE.copy()
    placed[:3, 3] = 40, -30, 20
    turn = nib.orientations.ornt_transform(nib.io_orientation(placed), nib.orientations.axcodes2ornt(axcodes))
    image = nib.Nifti1Image(hu(), placed).as_reoriented(turn)
    image.header.set_sform(image.affine, 1)
    image.header.set_qform(image.affine, 0)
    nib.save(image, tmp_path / "sform.nii.gz")
    image.header.set_sform(None, 0)
    image.header.set_qform(image.affine, 1)
    nib.save(image, tmp_path / "qform.nii.gz")
    scan = sitk.ReadImage(str(tmp_path / "qform.nii.gz"))
    for key in scan.GetMetaDataKeys():
        scan.EraseMetaData(key)
    for suffix in ("mha", "nrrd"):
        sitk.WriteImage(scan, str(tmp_path / f"a.{suffix}"), useCompression=True)
    for path in sorted(tmp_path.iterdir()):
        lps = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
        ct = read_ct(path)
        np.testing.assert_array_equal(ct.hu, sitk.GetArrayFromImage(lps).clip(-1024, 3071))
        np.testing.assert_array_equal(ct.hu, hu().transpose(2, 1, 0).clip(-1024, 3071))
        assert ct.spacing_mm == pytest.approx(lps.GetSpacing())
        first = ct.grid.affine @ canonical_indices(ct.grid) @ [0, 0, 0, 1]
        assert first[:3] * [-1, -1, 1] == pytest.approx(lps.GetOrigin(), abs=1e-4)
        assert ct.grid.axcodes == axcodes


def test_a_contradictory_header_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu(), AFFINE)
    image.header.set_qform(np.diag([0.7, -0.8, 1.5, 1]), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    for read in (read_grid, read_ct):
        with pytest.raises(RejectedError, match="geometry: .* LPS in sform and RPS in qform"):
            read(tmp_path / "a.nii.gz")


def test_a_header_without_geometry_is_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(hu().T), str(tmp_path / "a.nii.gz"))
    with pytest.raises(RejectedError, match="v1 or v2: .*blank header"):
        read_ct(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("shape", [(7, 5, 3, 2), (7, 5)])
def test_volumes_have_three_axes(shape: tuple[int, ...], tmp_path: Path, save_nifti: Save) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros(shape, np.int16), AFFINE)
    for read in (read_grid, read_ct):
        with pytest.raises(
            RejectedError, match=r"geometry: volume must have 3 axes, got shape \(7, 5.*\. Save"
        ):
            read(path)


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ((0.7, 0.8, 3.0), r"\(0\.7, 0\.8, 3\)"),
        ((0.7, 0.8, 0.035), r"\(0\.7, 0\.8, 0\.035\)"),
        ((0.8, 0.8, float("nan")), r"\(0\.8, 0\.8, nan\)"),
        ((0.7, 0.8, 1.6), r"\(0\.7, 0\.8, 1\.6\)"),
        ((0.7, 0.8, 0.0), r"\(0\.7, 0\.8, 0\)"),
        ((0.7, 0.8, -1.5), r"\(0\.7, 0\.8, -1\.5\)"),
    ],
)
def test_a_header_that_contradicts_the_metadata_is_rejected(
    stated: tuple[float, float, float], shown: str, tmp_path: Path, save_nifti: Save
) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", hu(), AFFINE)
    with pytest.raises(
        RejectedError,
        match=r"spacing: header and metadata must state one spacing, "
        rf"got \(0\.7, 0\.8, 1\.5\) mm in the header and {shown} mm in the metadata",
    ):
        read_grid(path, "v2", Rescale(1, -1024, stated))


@pytest.mark.parametrize("stated", [(0.7, 0.8, 1.56), (0.71, 0.79, 1.5), (np.nan, np.nan, np.nan)])
def test_metadata_may_round_or_say_nothing(
    stated: tuple[float, float, float], tmp_path: Path, save_nifti: Save
) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", hu(), AFFINE)
    np.testing.assert_allclose(read_grid(path, "v2", Rescale(1, -1024, stated)).affine, AFFINE, rtol=1e-6)


def test_metadata_are_compared_along_the_axes_of_the_body(tmp_path: Path, save_nifti: Save) -> None:
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt("SLP"))
    image = nib.Nifti1Image(hu(), AFFINE).as_reoriented(turn)
    path = save_nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine)
    assert read_grid(path, "v2", RESCALE).axcodes == "SLP"


@pytest.mark.real_ct
def test_real_scans_are_those_that_nibabel_reads(real_ct_dir: Path) -> None:
    paths = [path for path in sorted(real_ct_dir.glob("*.nii.gz")) if "_ct_" in path.name]
    assert paths
    for path in paths:
        ct, image = read_ct(path), nib.as_closest_canonical(nib.load(path))
        ras = np.rint(np.asarray(image.dataobj, np.float64)).clip(-1024, 3071)
        np.testing.assert_array_equal(ct.hu, ras[::-1, ::-1].transpose(2, 1, 0))
        assert ct.spacing_mm == pytest.approx(image.header.get_zooms(), rel=1e-6)
        assert ct.values.lowest == np.asarray(image.dataobj).min()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("is_upper", [False, True])
def test_every_format_gives_the_same_voxels_and_header(suffix: str, is_upper: bool, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 100, (7, 5, 3)).astype(np.int16)
    affine = np.diag([-0.7, -0.8, 1.5, 1])
    affine[:3, 3] = 10, 20, 30
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "source.nii")
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "source.nii")), str(path))
    if is_upper:
        path = path.rename(tmp_path / f"a{suffix.upper()}")
    header = read_header(path)
    assert header.shape == (7, 5, 3)
    np.testing.assert_allclose(header.affine, affine, rtol=1e-6)
    assert (header.slope, header.intercept, header.is_blank, header.contradiction) == (1, 0, False, "")
    with open_volume(path) as file:
        array = np.concatenate([planes.copy() for _, planes in file.planes()], axis=-1)
    np.testing.assert_array_equal(array, stored)
