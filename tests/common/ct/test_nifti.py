import gzip
import hashlib
import struct
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from common.ct import nifti
from common.ct.files import open_volume
from common.ct.geometry import CT, Grid, canonical_indices
from common.ct.nifti import Rescale, VolumeHeader, open_nifti
from common.ct.rejection import RejectedError

SHAPE_XYZ = (7, 5, 3)
SPACING_MM = (0.7, 0.8, 1.5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
RESCALE = Rescale(1, -1024, SPACING_MM)
ALL_AXCODES = ["".join(axes) for order in permutations(("LR", "PA", "IS")) for axes in product(*order)]
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def read_ct(path: Path, form: str = "v2", rescale: Rescale | None = None) -> CT:
    with open_volume(path) as file:
        return nifti.read_ct(file, form, rescale)


def read_header(path: Path) -> VolumeHeader:
    with open_volume(path) as file:
        return file.header


def read_grid(path: Path, form: str = "v2", rescale: Rescale | None = None) -> Grid:
    return nifti.grid_of(read_header(path), form, rescale)[0]


def hu() -> np.ndarray:
    return np.random.default_rng(0).integers(-1200, 3400, SHAPE_XYZ).astype(np.int16)


def with_rescale(path: Path, array: np.ndarray, slope: float, intercept: float) -> Path:
    """Written into the bytes: nibabel would choose a slope of its own for an image it saves."""
    content = bytearray(nib.Nifti1Image(array, AFFINE).to_bytes())
    content[112:120] = struct.pack("<2f", slope, intercept)
    path.write_bytes(content)
    return path


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
        match="non-finite voxels: voxels must be finite, .* in planes 0 to 2 as stored",
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
        assert (ct.grid.axcodes, ct.grid.has_origin, ct.values.lowest) == (axcodes, True, hu().min())
        assert ct.hu.dtype == np.int16


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (VolumeHeader(SHAPE_XYZ, AFFINE, is_blank=True), "v1 or v2: .*blank header"),
        (VolumeHeader(SHAPE_XYZ, AFFINE, contradiction="LPS and RPS"), "geometry: .* LPS and RPS"),
        (VolumeHeader((7, 5, 3, 2), AFFINE), r"geometry: .* 3 axes, got shape \(7, 5, 3, 2\)\. Save"),
        (VolumeHeader((7, 5), AFFINE), r"geometry: .* 3 axes, got shape \(7, 5\)"),
        (VolumeHeader(SHAPE_XYZ, AFFINE @ np.diag([1, 1, 0.01, 1])), "spacing: .*0.015"),
    ],
)
def test_headers_of_no_volume_in_hu_are_refused(header: VolumeHeader, message: str) -> None:
    with pytest.raises(RejectedError, match=message):
        nifti.grid_of(header)


@pytest.mark.parametrize("z_mm", [3.0, 0.035, 1.6, 0.0, -1.5, 1.56, 1.5, np.nan])
@pytest.mark.parametrize("xy_mm", [(0.7, 0.8), (0.71, 0.79), (0.8, 0.8)])
def test_a_header_must_agree_with_what_the_metadata_say(xy_mm: tuple[float, float], z_mm: float) -> None:
    """Of axes as of the body, whatever the storage; the table may round, or say nothing."""
    stated = Rescale(1, -1024, (*xy_mm, z_mm))
    agrees = xy_mm[0] < 0.75 and z_mm in (1.56, 1.5) or (xy_mm[0] < 0.75 and np.isnan(z_mm))
    for affine in (AFFINE, AFFINE[:, [2, 0, 1, 3]]):
        header = VolumeHeader(SHAPE_XYZ, affine)
        if agrees:
            np.testing.assert_array_equal(nifti.grid_of(header, "v2", stated)[0].affine, affine)
            continue
        with pytest.raises(RejectedError, match=rf"spacing: .* 1\.5\) mm .* {z_mm:g}\) mm in the metadata"):
            nifti.grid_of(header, "v2", stated)


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


def stored(dtype: type | str = np.int16, shape: tuple[int, ...] = (7, 5, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def read(path: Path) -> np.ndarray:
    with open_nifti(path) as file:
        return np.concatenate([planes.copy() for _, planes in file.planes()], axis=-1)


@pytest.fixture
def content(tmp_path: Path, save_nifti: Save) -> bytes:
    """A whole file, not yet gzipped: a header of 352 bytes and 210 of voxels."""
    return gzip.decompress(save_nifti(tmp_path / "ok.nii.gz", stored(), AFFINE).read_bytes())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.uint8, np.uint16, np.int32, np.float32, ">f8"])
def test_the_array_is_read_as_it_is_stored(
    suffix: str, dtype: type | str, tmp_path: Path, save_nifti: Save
) -> None:
    path = tmp_path / f"a{suffix}"
    image = nib.Nifti1Image(stored(np.dtype(dtype).newbyteorder("=")), AFFINE)
    image.header["vox_offset"] = 352
    header = image.header.as_byteswapped(">" if str(dtype).startswith(">") else "<")
    content = header.binaryblock + bytes(4) + stored(dtype).tobytes(order="F")
    path.write_bytes(content if suffix == ".nii" else gzip.compress(content))
    array, header = read(path), read_header(path)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(array, stored(dtype))
    np.testing.assert_allclose(header.affine, AFFINE, rtol=1e-6)
    assert (header.slope, header.intercept, header.is_blank) == (1, 0, False)
    assert header.shape == (7, 5, 3)


@pytest.mark.parametrize("chunk_bytes", [1, 7 * 5 * 2 * 2, 10**6])
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 7, 5, 3), (7, 5), (7,), (7, 5, 1)])
def test_planes_come_in_order_whatever_fits_at_once(
    shape: tuple[int, ...],
    chunk_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_nifti: Save,
) -> None:
    monkeypatch.setattr(nifti, "CHUNK_BYTES", chunk_bytes)
    path = save_nifti(tmp_path / "a.nii.gz", stored(shape=shape), AFFINE)
    with open_nifti(path) as file:
        firsts = []
        for first, planes in file.planes():
            firsts.append(first)
            np.testing.assert_array_equal(planes, stored(shape=shape)[..., first : first + planes.shape[-1]])
    plane_bytes = 2 * stored(shape=shape).size // shape[-1]
    assert firsts == list(range(0, shape[-1], max(1, chunk_bytes // plane_bytes)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_checksum_is_that_of_the_whole_file(suffix: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    longer = content + bytes(3_000_000)  # behind the voxels
    path.write_bytes(longer if suffix == ".nii" else gzip.compress(longer))
    with open_nifti(path) as file:
        for _ in file.planes():
            pass
        assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_nifti_2_is_read(endianness: str, tmp_path: Path) -> None:
    image = nib.Nifti2Image(stored(), AFFINE)
    image.header["vox_offset"] = 544
    header = image.header.as_byteswapped(endianness)
    voxels = stored().astype(f"{endianness}i2").tobytes(order="F")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4) + voxels))
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz"), stored())


def test_an_extension_of_the_header_is_skipped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(stored(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 3_000_000))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz"), stored())


def affine_of(axcodes: str, origin: tuple[float, ...] = (0, 0, 0), mm: float = 1.0) -> np.ndarray:
    turn = nib.orientations.axcodes2ornt(axcodes)
    affine = np.diag([mm, mm, mm, 1.0]) @ nib.orientations.inv_ornt_aff(turn, (1, 1, 1))
    affine[:3, 3] = origin
    return affine


def test_a_header_is_blank_without_a_coordinate_system_or_with_voxels_of_1_mm_at_the_origin(
    tmp_path: Path,
) -> None:
    identity = nib.Nifti1Image(stored(), np.eye(4))
    turn = nib.orientations.axcodes2ornt("PSL")
    images = {
        "identity": (identity, True),
        "none": (nib.Nifti1Image(stored(), None), True),
        "itk": (nib.Nifti1Image(stored(), affine_of("LPS")), True),
        "permuted": (nib.Nifti1Image(stored(), affine_of("SLA")), True),
        "turned": (identity.as_reoriented(turn), True),  # its origin is another corner
        "canonical": (nib.as_closest_canonical(nib.Nifti1Image(stored(), affine_of("LPS"))), True),
        "placed": (nib.Nifti1Image(stored(), affine_of("LPS", (3, 0, 0))), False),
        "spaced": (nib.Nifti1Image(stored(), affine_of("LPS", mm=1.01)), False),
    }
    for name, (image, _) in images.items():
        nib.save(image, tmp_path / f"{name}.nii")
    found = {name: read_header(tmp_path / f"{name}.nii").is_blank for name in images}
    assert found == {name: is_blank for name, (_, is_blank) in images.items()}


def edited(path: Path, sform: np.ndarray | None, qform: np.ndarray | None, **fields: object) -> Path:
    """A file whose sform, qform and other fields of the header are as told, contradictory or not."""
    image = nib.Nifti1Image(stored(), None)
    image.header.set_qform(qform, 0 if qform is None else 1)
    image.header.set_sform(sform, 0 if sform is None else 1)
    for name, value in fields.items():
        image.header[name] = value
    image.header["vox_offset"] = 352
    path.write_bytes(image.header.binaryblock + bytes(4) + stored().tobytes(order="F"))
    return path


PIXDIM = [1, 0.7, 0.8, 1.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("sform", "qform", "fields", "said"),
    [
        (
            np.eye(4) * 2,
            None,
            {"pixdim": PIXDIM},
            "(2, 2, 2) mm in sform and of (0.7, 0.8, 1.5)",
        ),
        (AFFINE, None, {"pixdim": [1, 0.7, 0.8, 1.6, 0, 0, 0, 0]}, "mm in pixdim"),
        (AFFINE, None, {"pixdim": [1, 0.71, 0.79, 1.53, 0, 0, 0, 0]}, ""),
        (AFFINE, None, {"pixdim": [0] * 8}, ""),  # states nothing
        (AFFINE, AFFINE, {}, ""),
        (AFFINE, np.diag([0.7, -0.8, 1.5, 1]), {}, "the axes LPS in sform and RPS in qform"),
        (None, AFFINE, {}, ""),
        (
            AFFINE * [[1000], [1000], [1000], [1]],
            None,
            {"xyzt_units": 3, "pixdim": [1, 700, 800, 1500, *4 * [0]]},
            "",
        ),
    ],
)
def test_contradictory_statements_of_a_geometry_are_named(
    sform: np.ndarray, qform: np.ndarray, fields: dict, said: str, tmp_path: Path
) -> None:
    header = read_header(edited(tmp_path / "a.nii", sform, qform, **fields))
    assert said in header.contradiction
    assert bool(said) == bool(header.contradiction)
    if not said:
        np.testing.assert_allclose(header.affine, AFFINE, rtol=1e-5)


def test_metres_and_microns_become_millimetres(tmp_path: Path) -> None:
    for unit, scale in (("meter", 1e-3), ("mm", 1), ("micron", 1e3)):
        image = nib.Nifti1Image(stored(), AFFINE @ np.eye(4))
        image.affine[:3] *= scale
        image.header.set_xyzt_units(unit)
        nib.save(nib.Nifti1Image(stored(), image.affine, image.header), tmp_path / f"{unit}.nii")
        np.testing.assert_allclose(read_header(tmp_path / f"{unit}.nii").affine, AFFINE, rtol=1e-5)


def test_a_suffix_need_not_say_whether_a_file_is_gzipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nii").write_bytes(gzip.compress(content))
    (tmp_path / "b.nii.gz").write_bytes(content)
    for name in ("a.nii", "b.nii.gz"):
        np.testing.assert_array_equal(read(tmp_path / name), stored())


@pytest.mark.parametrize(("suffix", "image"), [(".hdr", ".img"), (".hdr", ".IMG.GZ"), (".HDR.gz", ".img.gz")])
def test_a_pair_is_read_from_both_files(suffix: str, image: str, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(stored(), AFFINE), tmp_path / "x.hdr")
    contents = []
    for path, name in ((tmp_path / "x.hdr", f"a{suffix}"), (tmp_path / "x.img", f"a{image}")):
        contents.append(path.read_bytes())
        if name.lower().endswith(".gz"):
            contents[-1] = gzip.compress(contents[-1])
        path.unlink()
        (tmp_path / name).write_bytes(contents[-1])
    with open_nifti(tmp_path / f"a{suffix}") as file:
        array = np.concatenate([planes.copy() for _, planes in file.planes()], axis=-1)
        assert file.sha256() == hashlib.sha256(b"".join(contents)).hexdigest()
    np.testing.assert_array_equal(array, stored())
    np.testing.assert_allclose(file.header.affine, AFFINE, rtol=1e-6)
    (tmp_path / f"a{image}").unlink()
    with pytest.raises(RejectedError, match=rf"unreadable: .*'a{suffix}' .* 0 files 'a\.img' beside"):
        read_header(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("shape", [(7, 5, 3, 1), (7, 5, 3, 1, 1), (7, 5, 1, 1)])
def test_trailing_axes_of_one_are_dropped(shape: tuple[int, ...], tmp_path: Path) -> None:
    image = nib.Nifti1Image(stored(shape=shape), AFFINE)
    image.header.set_data_shape(shape)
    nib.save(image, tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii").shape == shape[:3]
    np.testing.assert_array_equal(read(tmp_path / "a.nii"), stored(shape=shape[:3]))


def labels_of(path: Path) -> np.ndarray:
    with open_nifti(path) as file:
        return np.concatenate([labels.copy() for _, labels in file.labels()], axis=-1)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.9995, 0), (1, 1), (0.5, -3), (1 / 3, 0)])
def test_labels_are_rescaled_and_rounded_where_they_are_nearly_whole(
    slope: float, intercept: float, tmp_path: Path
) -> None:
    values = np.rint(np.arange(12).reshape(2, 3, 2) / (slope if slope < 0.9 else 1)).astype(np.int16)
    raw = bytearray(nib.Nifti1Image(values, AFFINE).to_bytes())
    raw[112:120] = struct.pack("<2f", slope, intercept)
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(labels_of(tmp_path / "a.nii"), np.arange(12).reshape(2, 3, 2) + intercept)


def test_fractions_are_no_labels(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((2, 3, 2), 3.011), AFFINE), tmp_path / "a.nii")
    with pytest.raises(RejectedError, match=r"mask: labels of 'a\.nii' must be whole numbers"):
        labels_of(tmp_path / "a.nii")


def put(at: int, layout: str, *values: float) -> Callable[[bytes], bytes]:
    """Overwrite numbers."""
    new = struct.pack(layout, *values)
    return lambda content: content[:at] + new + content[at + len(new) :]


PAGE, HUGE = b"<html>404</html>" * 50, put(42, "<3h", 30000, 30000, 30000)
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty.nii.gz": (lambda content: b"", "an end after 0 of 4 bytes"),
    "page.nii.gz": (lambda content: PAGE, r"it begins with b'<htm'"),
    "half.nii.gz": (lambda content: gzip.compress(content)[:150], "Compressed file ended"),
    "no_end.nii.gz": (lambda content: gzip.compress(content)[:-8], "Compressed file ended"),
    "short.nii.gz": (lambda content: gzip.compress(content[:-1]), "an end after 209 of 210 bytes"),
    "short.nii": (lambda content: content[:-100], r"462 bytes for an array of shape \(7, 5, 3\) of int16"),
    "header.nii": (lambda content: content[:200], "an end after 196 of 344 bytes"),
    "magic.nii": (put(344, "3s", b"xyz"), "it begins with"),
    "pair.nii": (put(344, "3s", b"ni1"), "0 files 'pair.img' beside it"),
    "offset.nii": (put(108, "<f", 100), "offset 100 too low"),
    "offset_nan.nii": (put(108, "<f", np.nan), ""),
    "offset_inf.nii": (put(108, "<f", np.inf), ""),
    "offset_low.nii": (put(108, "<f", -np.inf), ""),
    "type.nii": (put(70, "<h", 9999), "9999"),
    "negative.nii": (put(42, "<h", -7), r"an array of shape \(-7, 5, 3\)"),
    "huge.nii.gz": (
        lambda content: gzip.compress(HUGE(content)),
        r"of shape \(30000, 30000, 30000\)",
    ),
    "rescale.nii": (put(112, "<2f", 1, np.inf), "intercept inf"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_are_not_whole_are_rejected(name: str, tmp_path: Path, content: bytes) -> None:
    damage, message = DAMAGE[name]
    (tmp_path / name).write_bytes(damage(content))
    with pytest.raises(RejectedError, match=f"unreadable: Cannot read '{name}' as NIfTI: .*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize("at", [-8, -6, -4, -1])
def test_a_wrong_checksum_or_length_at_the_end_is_noticed(at: int, tmp_path: Path, save_nifti: Save) -> None:
    """The header is whole, and so are all voxels; only the last bytes of the file tell."""
    path = save_nifti(tmp_path / "a.nii.gz", stored(np.uint8, (128, 128, 128)), AFFINE)
    packed = bytearray(path.read_bytes())
    packed[at] ^= 1
    path.write_bytes(packed)
    assert read_header(path).shape == (128, 128, 128)
    with pytest.raises(RejectedError, match=r"unreadable: Cannot read 'a\.nii\.gz' as NIfTI: "):
        read(path)


def test_other_formats_under_a_nifti_name_are_rejected(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(stored(), None), tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    (tmp_path / "a.hdr").rename(tmp_path / "a.nii")
    with pytest.raises(RejectedError, match=r"geometry: 'a\.nii' is in Analyze format"):
        read_header(tmp_path / "a.nii")


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_complex_numbers_and_colors_are_no_voxels(dtype: Any, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), dtype), AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(RejectedError, match=r"unreadable: voxels of 'a\.nii\.gz' must be numbers, got "):
        read_header(tmp_path / "a.nii.gz")
