"""The 3D baselines' preprocessing: however a CT is stored, it comes out as each model documents."""

import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy.ndimage import map_coordinates

from common.embeddings.ct_batches import VolumeBatches
from common.embeddings.work import ct_sources

pytestmark = pytest.mark.usefixtures("any_values")

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


class Documented(NamedTuple):
    """What a model's documentation says of its input; axes are said by hand, from an LPS array (x, y, z)."""

    order: tuple[int, int, int]
    flips: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    hu: tuple[float, float]
    values: tuple[float, float]


DOCUMENTED = {
    # superior, posterior, left; 3 x 1 x 1 mm; a box of the foreground, at least a window
    "ct_fm": Documented((2, 1, 0), (1, 1, 1), (3, 1, 1), (24, 128, 128), (-1024, 2048), (0, 1)),
    # superior, left, posterior
    "ct_clip": Documented((2, 0, 1), (1, 1, 1), (1.5, 0.75, 0.75), (240, 480, 480), (-1000, 1000), (-1, 1)),
    # right, anterior, superior, with the slices first
    "merlin": Documented((2, 0, 1), (1, -1, -1), (3, 1.5, 1.5), (160, 224, 224), (-1000, 1000), (0, 1)),
    "colipri": Documented((0, 1, 2), (-1, -1, 1), (2, 2, 2), (192, 192, 192), (-1000, 1000), (-1, 1)),
}
each_bundle = pytest.mark.parametrize("bundle", DOCUMENTED)
ORIENTATIONS = ("LPS", "RAS", "LAS", "SPL")
INTERPOLATED = 1e-4  # of the values, 0.1 HU of 1000: places between voxels are float32


def arranged(lps: np.ndarray, bundle: str) -> np.ndarray:
    """Order and flip the axes of an LPS array as documented."""
    documented = DOCUMENTED[bundle]
    return lps.transpose(documented.order)[tuple(slice(None, None, flip) for flip in documented.flips)]


def windowed(hu: np.ndarray, bundle: str) -> np.ndarray:
    (low, high), (first, last) = DOCUMENTED[bundle].hu, DOCUMENTED[bundle].values
    return (np.clip(hu, low, high) - low) / (high - low) * (last - first) + first


def fitted(values: np.ndarray, bundle: str, foreground: np.ndarray) -> np.ndarray:
    """Crop and pad about the centre; CT-FM: the foreground's box, padded where it is below a window."""
    shape, fill = DOCUMENTED[bundle].shape, DOCUMENTED[bundle].values[0]
    if bundle == "ct_fm":
        for axis in range(3):
            where = np.flatnonzero(foreground.any(axis=tuple({0, 1, 2} - {axis})))
            values = values.take(range(where[0], where[-1] + 1), axis)
            foreground = foreground.take(range(where[0], where[-1] + 1), axis)
        shape = tuple(max(side, size) for side, size in zip(values.shape, shape, strict=True))
    for axis, (side, size) in enumerate(zip(values.shape, shape, strict=True)):
        start = max(side // 2 - size // 2, 0)
        values = values.take(range(start, min(start + size, side)), axis)
        missing = size - values.shape[axis]
        pads = [(missing // 2, missing - missing // 2) if a == axis else (0, 0) for a in range(3)]
        values = np.pad(values, pads, constant_values=fill)
    return values


def lps_affine(spacing_xyz: np.ndarray) -> np.ndarray:
    affine = np.diag([-spacing_xyz[0], -spacing_xyz[1], spacing_xyz[2], 1.0])
    affine[:3, 3] = (31.0, -17.0, 203.0)
    return affine


def spacing_xyz(bundle: str) -> np.ndarray:
    """The documented spacing, of the axes x, y, z."""
    return np.array(DOCUMENTED[bundle].spacing_mm)[np.argsort(DOCUMENTED[bundle].order)]


def store(lps: np.ndarray, spacing: np.ndarray, folder: Path, axcodes: str) -> Path:
    image = nib.Nifti1Image(lps.astype(np.int16), lps_affine(spacing))
    target = nib.orientations.axcodes2ornt(axcodes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target))
    path = folder / f"{axcodes}.nii.gz"
    nib.save(image, path)
    return path


def prepared(bundle: str, path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    parser = ConfigParser()
    parser.read_config(BUNDLES / bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(BUNDLES / bundle)
    (source,), _ = ct_sources(path)
    transform = parser.get_parsed_content("preprocessing")
    (batch,) = VolumeBatches([source._replace(stores=("grid",))], transform, "RAS", num_workers=0)
    assert type(batch["image"]) is torch.Tensor
    assert batch["image"].dtype == torch.float32
    return batch["image"][0, 0].numpy(), batch["pieces"][0].task.spacing_mm


def phantom(bundle: str) -> np.ndarray:
    """Random HU beyond every window, air around; longer than the input along z, shorter in the plane."""
    rng = np.random.default_rng(0)
    length = DOCUMENTED[bundle].shape[DOCUMENTED[bundle].order.index(2)] + 7
    hu = np.full((24, 24, length), -2000.0)
    hu[3:17, 2:20, 1:-2] = rng.integers(-1500, 3000, (14, 18, length - 3))
    hu[3:17, 2, 1], hu[16, 2:20, -3] = 100, 100  # the box of the foreground is all of it
    return hu


def same(image: np.ndarray, expected: np.ndarray, tolerance: float, which: str) -> None:
    assert image.shape == expected.shape, which
    assert np.abs(image - expected.astype(np.float32)).max() <= tolerance, which


@each_bundle
def test_four_orientations_come_out_voxel_for_voxel_as_documented(bundle, tmp_path):
    hu = phantom(bundle)
    values = windowed(arranged(hu, bundle), bundle)
    expected = fitted(values, bundle, arranged(hu, bundle) > -1024)
    spacing = spacing_xyz(bundle)
    for axcodes in ORIENTATIONS:
        image, spacing_mm = prepared(bundle, store(hu, spacing, tmp_path, axcodes))
        same(image, expected, 1e-6, axcodes)
        np.testing.assert_allclose(spacing_mm, spacing, rtol=1e-6)


@each_bundle
def test_a_scan_of_half_the_spacing_comes_out_the_same(bundle, tmp_path):
    """Every second voxel of the finer scan is one of the coarser: what lies between may be anything."""
    coarse = phantom(bundle)
    fine = np.full([2 * side - 1 for side in coarse.shape], -2000)
    body = fine[6:33, 4:39, 2:-4]
    body[:] = np.random.default_rng(1).integers(-900, 900, body.shape)
    fine[::2, ::2, ::2] = coarse
    spacing = spacing_xyz(bundle)
    expected, _ = prepared(bundle, store(coarse, spacing, tmp_path, "LPS"))
    for axcodes in ("RAS", "SPL"):
        image, spacing_mm = prepared(bundle, store(fine, spacing / 2, tmp_path, axcodes))
        np.testing.assert_allclose(spacing_mm, spacing / 2, rtol=1e-6)
        same(image, expected, INTERPOLATED, axcodes)


@each_bundle
def test_any_other_spacing_is_interpolated_linearly_from_the_first_voxel(bundle, tmp_path):
    hu = np.clip(phantom(bundle), -1000, 1000)  # inside all windows: clipping and resampling commute
    stored_spacing = spacing_xyz(bundle) * (0.8, 1.3, 0.9)
    oriented, target = arranged(hu, bundle), np.array(DOCUMENTED[bundle].spacing_mm)
    ratio = target / stored_spacing[list(DOCUMENTED[bundle].order)]
    sides = np.round((np.array(oriented.shape) - 1) / ratio + 1).astype(int)
    places = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij")) * ratio.reshape(3, 1, 1, 1)
    resampled = map_coordinates(oriented, places, order=1, mode="nearest")
    expected = fitted(windowed(resampled, bundle), bundle, resampled > -1024)
    for axcodes in ("LPS", "RAS"):
        image, _ = prepared(bundle, store(hu, stored_spacing, tmp_path, axcodes))
        same(image, expected, INTERPOLATED, axcodes)


@each_bundle
def test_metadata_states_the_documented_input(bundle):
    documented = DOCUMENTED[bundle]
    metadata = json.loads((BUNDLES / bundle / "configs" / "metadata.json").read_text())
    config = json.loads((BUNDLES / bundle / "configs" / "inference.json").read_text())
    assert tuple(config["spacing_mm"]) == tuple(metadata["spacing_mm"]) == documented.spacing_mm
    assert tuple(config["size_vox"]) == tuple(metadata["size_vox"]) == documented.shape
    assert tuple(config["hu_range"]) == tuple(metadata["hu_range"]) == documented.hu
    assert tuple(config["value_range"]) == documented.values
    assert config["axcodes"] == metadata["orientation"]
