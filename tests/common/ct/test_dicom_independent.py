"""Every series is compared with SimpleITK's own reader, voxel for voxel at the same place in the world."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from pydicom import Dataset
from pydicom.uid import RLELossless

from common.ct.dicom import read_ct
from common.ct.dicom_files import look_at, sort_series
from common.ct.geometry import CT, canonical_indices
from common.ct.rejection import NOT_AXIAL_CT
from tests.fuzz_dicom import frames_of

Write = Callable[..., list[Path]]
HU = np.random.default_rng(7).integers(-1024, 3072, (7, 11, 13)).astype(np.int16)


def by_simpleitk(folder: Path) -> SimpleITK.Image:
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(names)
    return reader.Execute()


def assert_same_scan(ct: CT, image: SimpleITK.Image) -> None:
    """Every voxel of SimpleITK's lies on one of ours, with its value; the corner is found in float64."""
    steps = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    ours = np.diag([-1, -1, 1, 1]) @ ct.grid.affine @ canonical_indices(ct.grid)
    x, y, z = (np.arange(size) for size in image.GetSize())
    theirs = np.stack(np.meshgrid(z, y, x, indexing="ij"), -1)[..., ::-1] @ steps.T + image.GetOrigin()
    indices = (theirs - ours[:3, 3]) @ np.linalg.inv(ours[:3, :3]).T
    np.testing.assert_allclose(indices, np.rint(indices), atol=0.02)
    places = tuple(np.moveaxis(np.rint(indices).astype(int), -1, 0))
    assert np.prod(ct.hu.shape) == np.prod(image.GetSize())
    assert min(place.min() for place in places) == 0
    values = SimpleITK.GetArrayFromImage(image)
    np.testing.assert_array_equal(ct.hu[places], np.rint(values).clip(-1024, 3071))


def turned(*degrees: float) -> tuple[float, ...]:
    """Row and column directions of a slice turned about x, then z."""
    a, b = np.radians(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return tuple((about_z @ about_x)[:, :2].T.ravel().round(9).tolist())


PLANES = {
    "straight": (1, 0, 0, 0, 1, 0),
    "prone": (-1, 0, 0, 0, -1, 0),
    "on the side": (0, 1, 0, -1, 0, 0),
    "from head to feet": (-1, 0, 0, 0, 1, 0),
    "oblique by 5 and 3 degrees": turned(5, 3),
    "oblique by -7 and 4 degrees": turned(-7, 4),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_a_series_lies_where_simpleitk_puts_it(
    plane: str, compressed: bool, tmp_path: Path, write_series: Write
) -> None:
    """Pixels are 0.7 x 0.8 mm; half of the slices have a rescale of their own."""

    def edit(z: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = (1, -1024) if z % 2 else (2, -1500)
        if compressed:
            dataset.compress(RLELossless, generate_instance_uid=False)

    files = write_series(tmp_path, HU, orientation=PLANES[plane], edit=edit)
    assert_same_scan(read_ct(files[::-1]), by_simpleitk(tmp_path))


def test_frames_of_enhanced_ct_lie_where_simpleitk_puts_them(tmp_path: Path, write_series: Write) -> None:
    files = write_series(tmp_path / "classic", HU, orientation=PLANES["oblique by 5 and 3 degrees"])
    shared = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence")
    frames_of(tmp_path / "enhanced.dcm", files, shared)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(tmp_path / "enhanced.dcm"))
    image = reader.Execute()
    image.SetSpacing((*image.GetSpacing()[:2], 1.5))  # of the positions; GDCM takes SliceThickness
    assert_same_scan(read_ct([tmp_path / "enhanced.dcm"]), image)


@pytest.mark.real_ct
def test_a_real_series_lies_where_simpleitk_puts_it(real_ct_dir: Path) -> None:
    """JPEG 2000."""
    folder = real_ct_dir / "totalseg_dicom_series"
    assert_same_scan(read_ct(sorted(folder.iterdir())), by_simpleitk(folder))


CASES = ("01", "02", "05", "11", "12", "13", "14", "19")


@pytest.mark.real_ct
@pytest.mark.parametrize("number", CASES)
def test_exports_of_a_real_chest_are_read(
    number: str, wrong_inputs: ModuleType, real_ct_dir: Path, tmp_path: Path
) -> None:
    """They were once read wrongly."""
    (name,) = (name for name in wrong_inputs.CASES if name.startswith(number))
    folder = tmp_path / name
    folder.mkdir()
    wrong_inputs.CASES[name][0](folder)
    series, rejected = sort_series(look_at(path) for path in _files(folder))
    assert {item.reason for item in rejected} == ({NOT_AXIAL_CT} if number == "12" else set())
    assert len(series) == {"01": 2, "14": 3}.get(number, 1)
    stored = nib.load(real_ct_dir / "lidc_idri_0314_ct_1p56x1p56x2mm.nii.gz").dataobj[::2, ::2, ::3]
    truth = np.asarray(stored).transpose(2, 1, 0).clip(-1024, 3071)
    if (folder / "truth.nii.gz").exists():
        truth = np.asarray(nib.load(folder / "truth.nii.gz").dataobj).transpose(2, 1, 0).clip(-1024, 3071)
    for _, paths in series:
        ct = read_ct(paths)
        np.testing.assert_array_equal(ct.hu, truth)
        assert ct.spacing_mm == pytest.approx((3.125, 3.125, 6), rel=1e-4)


def _files(folder: Path) -> Sequence[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
