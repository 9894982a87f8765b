"""Files of one volume: the same voxels in the same place of the world in every form and orientation."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.ct.files import find_cts, read_ct
from data_prep.phantom.files import (
    affine_of,
    rad_name,
    rad_path,
    resample_linear,
    rex_findings,
    rex_path,
    sidecar_path,
    stored_order,
    ts_path,
    volume_path,
    write_reference,
    write_volume,
)
from data_prep.phantom.population import CT_RATE_LABELS, roster
from data_prep.phantom.scan import Volume, render

SPACING_MM = 4.0


@pytest.fixture(scope="module")
def volume() -> Volume:
    """Many findings, cubes of 4 mm as voxels."""
    labels = dict.fromkeys(CT_RATE_LABELS, 0.6)
    drawn = render(roster(1, seed=2)[0], "a", 48, (SPACING_MM, SPACING_MM), labels)
    return drawn._replace(protocol=drawn.protocol._replace(pixel_mm=SPACING_MM, intercept=-8192))


def stored_as(volume: Volume, axcodes: str) -> Volume:
    return volume._replace(protocol=volume.protocol._replace(axcodes=axcodes))


def canonical(image: nib.Nifti1Image, axcodes: str) -> np.ndarray:
    """Voxels in another orientation, by nibabel's own means."""
    own = nib.orientations.io_orientation(image.affine)
    wanted = nib.orientations.axcodes2ornt(tuple(axcodes))
    turn = nib.orientations.ornt_transform(own, wanted)
    return nib.orientations.apply_orientation(np.asarray(image.dataobj), turn)


def load(path: Path) -> nib.Nifti1Image:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAS", "RPI"])
def test_affine_places_each_voxel_of_any_orientation_at_the_same_point(volume, axcodes) -> None:
    shape = (5, 7, 11)
    index = np.moveaxis(np.indices(shape), 0, -1)
    stored = stored_order(index, axcodes)
    assert stored.shape == (11, 7, 5, 3)
    affine = affine_of(volume.protocol, shape, axcodes)
    assert "".join(nib.aff2axcodes(affine)) == axcodes
    reference = affine_of(volume.protocol, shape, "LPS")
    for place in ((0, 0, 0), (10, 0, 3), (4, 6, 4), (9, 2, 1)):
        z, y, x = stored[place]
        np.testing.assert_allclose((affine @ [*place, 1])[:3], (reference @ [x, y, z, 1])[:3], atol=1e-9)


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAS"])
def test_written_volumes_read_back_the_same_in_any_orientation(volume, axcodes, tmp_path) -> None:
    scan = volume.scan
    write_volume(stored_as(volume, axcodes), tmp_path, "v2", 0.0, None)
    image = load(volume_path(tmp_path, scan, "v2"))
    assert "".join(nib.aff2axcodes(image.affine)) == axcodes
    np.testing.assert_array_equal(canonical(image, "LPS"), volume.hu.T)
    np.testing.assert_allclose(image.header.get_zooms(), [4.0, 4.0, 4.0], rtol=1e-6)
    assert image.get_data_dtype() == np.int16
    labels = load(ts_path(tmp_path, scan))
    np.testing.assert_array_equal(canonical(labels, "LPS"), volume.ts.T)
    np.testing.assert_allclose(labels.affine, image.affine)
    assert labels.get_data_dtype() == np.uint8


def test_raw_form_has_a_blank_header_and_becomes_hu_by_its_intercept(volume, tmp_path) -> None:
    write_volume(volume, tmp_path, "v1", 0.0, None)
    image = load(volume_path(tmp_path, volume.scan, "v1"))
    np.testing.assert_array_equal(image.affine, np.eye(4))
    assert image.header["qform_code"] == 0
    raw = np.asarray(image.dataobj).astype(int)
    assert raw.min() >= 0
    np.testing.assert_array_equal(raw * 1 + volume.protocol.intercept, volume.hu.T)
    assert not volume_path(tmp_path, volume.scan, "v2").exists()


def test_rex_masks_are_the_findings_on_the_cts_grid(volume, tmp_path) -> None:
    record = write_volume(stored_as(volume, "RAS"), tmp_path, "v2", 1.0, None)
    image = load(rex_path(tmp_path, volume.scan))
    ct = load(volume_path(tmp_path, volume.scan, "v2"))
    np.testing.assert_allclose(image.affine, ct.affine)
    masks = np.asarray(image.dataobj)
    coded = [finding for finding in volume.findings if finding.code]
    assert masks.shape == (len(coded), *ct.shape)
    assert masks.dtype == np.uint8
    assert record["rexgroundingct"]["categories"] == {str(i): f.code for i, f in enumerate(coded)}
    for mask, finding in zip(masks, coded, strict=True):
        expected = np.zeros(volume.hu.shape, bool)
        expected[finding.region.box] = finding.region.mask
        np.testing.assert_array_equal(mask[::-1, ::-1], expected.T)
    assert (masks.sum(axis=0) > 1).any()


def test_rex_share_is_the_share_of_annotated_first_reconstructions(volume) -> None:
    scans = [scan for scan in roster(400, seed=0) if scan.reconstruction == 1]
    share = np.mean([bool(rex_findings(volume._replace(scan=scan), 0.3)) for scan in scans])
    assert share == pytest.approx(0.3, abs=0.03)
    few = np.mean([bool(rex_findings(volume._replace(scan=scan), 0.3)) for scan in scans[:20]])
    assert few == pytest.approx(0.3, abs=0.15)
    assert rex_findings(volume._replace(scan=scans[0]._replace(reconstruction=2)), 1.0) == []
    assert rex_findings(volume, 0.0) == []
    assert rex_findings(volume._replace(findings=[]), 1.0) == []


def test_every_nifti_says_that_it_is_synthetic(volume, tmp_path) -> None:
    write_volume(volume, tmp_path, "both", 1.0, None)
    files = sorted(tmp_path.rglob("*.nii.gz"))
    assert len(files) == 4
    for file in files:
        assert b"SYNTHETIC" in bytes(load(file).header["descrip"])


def test_the_same_volume_gives_the_same_bytes(volume, tmp_path) -> None:
    for folder in ("one", "two"):
        write_volume(volume, tmp_path / folder, "both", 1.0, SPACING_MM)
    first = {file.relative_to(tmp_path / "one"): file for file in (tmp_path / "one").rglob("*.*")}
    assert len(first) == 6
    for name, file in first.items():
        assert file.read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rad_chestct_array_is_the_nifti_turned_to_inferior_posterior_left(volume, tmp_path) -> None:
    write_volume(stored_as(volume, "LAS"), tmp_path, "v2", 0.0, SPACING_MM)
    image = load(volume_path(tmp_path, volume.scan, "v2"))
    # nibabel names where an axis goes to; (I, P, L) in its order of array axes.
    reference = np.clip(canonical(image, "LPS")[:, :, ::-1].transpose(2, 1, 0), -1000, 1000)
    with np.load(rad_path(tmp_path, volume.scan)) as archive:
        assert archive.files == ["ct"]
        stored = archive["ct"]
    assert stored.dtype == np.int16
    np.testing.assert_array_equal(stored, reference)


@pytest.mark.parametrize("target_mm", [0.8, 2.0, 3.7])
def test_resampling_is_trilinear(target_mm) -> None:
    volume = np.random.default_rng(0).integers(-1000, 1000, (6, 8, 9)).astype(np.int16)
    spacing = (3.0, 1.6, 1.1)
    result = resample_linear(volume, spacing, target_mm)
    shape = tuple(int((size - 1) * s / target_mm) + 1 for size, s in zip(volume.shape, spacing, strict=True))
    assert result.shape == shape
    at = np.meshgrid(
        *(np.arange(n) * target_mm / s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    expected = ndimage.map_coordinates(volume.astype(float), at, order=1)
    np.testing.assert_allclose(result, expected, atol=0.51)


def test_resampling_to_the_own_spacing_changes_nothing() -> None:
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.testing.assert_array_equal(resample_linear(volume, (0.8, 0.8, 0.8), 0.8), volume)


def test_rad_names_follow_the_patients_split() -> None:
    names = {scan: rad_name(scan) for scan in roster(200, seed=1)}
    assert {name[:3] for name in names.values()} == {"trn", "val", "tst"}
    assert len(set(names.values())) == 200
    prefixes: dict[tuple[int, ...], set[str]] = {}
    for scan, name in names.items():
        assert (name[:3] == "tst") == (scan.split == "valid")
        prefixes.setdefault(scan.seed, set()).add(name[:3])
    assert all(len(found) == 1 for found in prefixes.values())


def test_sidecar_says_what_was_drawn(volume, tmp_path) -> None:
    write_volume(volume, tmp_path, "v2", 0.0, None)
    record = json.loads(sidecar_path(tmp_path, volume.scan).read_text())
    assert record["synthetic"] is True
    assert set(record["severity"]) == set(CT_RATE_LABELS)
    assert len(record["findings"]) == len(volume.findings)
    assert all(finding["num_voxels"] > 0 for finding in record["findings"])


def test_the_reference_is_a_whole_chest_that_says_it_is_synthetic_and_is_drawn_once(tmp_path) -> None:
    path = write_reference(tmp_path / "reference")
    (file,), _ = find_cts(path)
    ct = read_ct(file)
    assert file.volume == "SYNTHETIC_reference"
    assert not [doubt.text for doubt in ct.doubts if doubt.refused]
    assert b"SYNTHETIC" in bytes(load(path).header["descrip"])
    assert ct.spacing_mm[2] == 5
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    assert write_reference(tmp_path / "reference").stat().st_mtime_ns == time
    assert write_reference(tmp_path / "other").read_bytes() == content
