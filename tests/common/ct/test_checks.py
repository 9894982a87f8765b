"""Upright whole chests pass whatever they suffer from; what is not in HU, cut, turned or blank is told."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.ct.checks import (
    CHEST_RULES,
    HU_RULES,
    blank_slices,
    check_hu,
    find_doubts,
    judge,
    levels_without_padding,
)
from common.ct.files import ct_file
from common.ct.geometry import CT, Grid, HUValues
from common.ct.nifti import Rescale
from common.ct.rejection import RejectedError
from common.embeddings.work import ct_sources
from data_prep.audit.volume import VolumeDecoder
from data_prep.phantom.anatomy import IS_LUNG
from data_prep.phantom.population import CT_RATE_LABELS, roster
from data_prep.phantom.scan import Volume, render
from data_prep.sources.source_volume import SourceVolume, read_ct, read_volume

MATRIX, SLICE_MM = 128, (4.0, 5.0)
SCAN = roster(1, seed=8)[0]

Change = Callable[[np.ndarray], np.ndarray]
Spacing = tuple[float, float, float]


def spacing_of(volume: Volume) -> Spacing:
    return volume.protocol.pixel_mm, volume.protocol.pixel_mm, volume.protocol.slice_mm


def found(hu: np.ndarray, spacing_mm: Spacing, refused: bool | None = None) -> set[str]:
    doubts, _ = find_doubts(hu.clip(-1024, 3071).astype(np.int16), spacing_mm)
    return {doubt.rule for doubt in doubts if refused in (None, doubt.refused)}


def unit_of(values: np.ndarray) -> set[str]:
    """Rules that make a reader refuse values before the clip."""
    seen = HUValues()
    seen.add(values.transpose(2, 1, 0))
    grid = Grid((1, 1, 1), np.eye(4))
    try:
        check_hu(CT(np.zeros(0), (1, 1, 1), grid, "", seen))
    except RejectedError as error:
        words = ("dark as air", "darker", "soft tissue", "bone", "no CT")
        return {word for word in words if word in error.detail} | (
            {"?"} if error.reason != "not in HU" else set()
        )
    return set()


@pytest.fixture(scope="module")
def chest() -> Volume:
    return render(SCAN, "a", MATRIX, SLICE_MM, {})


@pytest.mark.parametrize("site", ["a", "b"])
def test_phantom_chests_of_both_sites_pass(site: str) -> None:
    for scan in roster(6, seed=3, site=site):
        volume = render(scan, site, MATRIX, SLICE_MM)
        assert found(volume.hu, spacing_of(volume)) == set()


def test_the_worst_of_every_disease_is_still_a_chest() -> None:
    worst = render(SCAN, "a", MATRIX, SLICE_MM, dict.fromkeys(CT_RATE_LABELS, 1.0))
    assert {finding.label for finding in worst.findings} == set(CT_RATE_LABELS)
    assert found(worst.hu, spacing_of(worst), refused=True) == set()


@pytest.mark.parametrize(
    ("turn", "refused", "doubted"),
    [
        (lambda hu: hu[::-1], {"head"}, set()),
        (lambda hu: hu[:, ::-1], {"back"}, set()),
        (lambda hu: hu[:, :, ::-1], set(), {"heart"}),
        (lambda hu: hu[:, ::-1, ::-1], {"back"}, set()),
        (lambda hu: hu[::-1, ::-1], {"head", "back"}, set()),
    ],
    ids=["head_down", "back_to_front", "mirrored", "on_the_belly", "around_the_side"],
)
def test_a_turned_chest_is_refused_and_a_mirrored_one_doubted(
    turn: Change, refused: set[str], doubted: set[str], chest: Volume
) -> None:
    hu, spacing_mm = turn(chest.hu), spacing_of(chest)
    assert found(hu, spacing_mm, refused=True) == refused
    assert found(hu, spacing_mm, refused=False) == doubted


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_slices_that_are_not_axial_are_refused(axes: tuple[int, int, int], chest: Volume) -> None:
    turned = [spacing_of(chest)[::-1][axis] for axis in axes]
    refused = found(chest.hu.transpose(axes), (turned[2], turned[1], turned[0]), refused=True)
    assert refused & {"shape", "spine", "length", "lungs"}


@pytest.mark.parametrize(
    "part",
    [
        lambda z, y, x: np.s_[:, :, : x // 2],
        lambda z, y, x: np.s_[:, :, x // 2 :],
        lambda z, y, x: np.s_[:, : y // 2],
        lambda z, y, x: np.s_[:, y // 2 :],
        lambda z, y, x: np.s_[: z // 2],
        lambda z, y, x: np.s_[z // 2 :],
    ],
    ids=["right", "left", "front", "behind", "lower", "upper"],
)
def test_half_a_chest_is_refused_and_never_called_mirrored(part: Callable[..., tuple], chest: Volume) -> None:
    half = chest.hu[part(*chest.hu.shape)]
    assert found(half, spacing_of(chest), refused=True)
    if half.shape[1] < chest.hu.shape[1]:
        assert "lung_edges" in found(half, spacing_of(chest))
    assert "heart" not in found(half, spacing_of(chest))


def test_a_chest_cut_to_its_lungs_or_resampled_is_whole(chest: Volume) -> None:
    x, y, z = spacing_of(chest)
    places = np.argwhere(IS_LUNG[chest.ts])
    (_, top, left), (_, bottom, right) = places.min(0), places.max(0) + 1
    assert found(chest.hu[:, top:bottom, left:right], (x, y, z), refused=True) == set()
    fine = chest.hu.repeat(2, 0).repeat(3, 1).repeat(3, 2)
    assert found(fine, (x / 3, y / 3, z / 2)) == set()
    assert found(chest.hu[::2], (x, y, 2 * z), refused=True) == set()


def test_a_head_and_a_chest_without_its_lungs_have_no_lungs(chest: Volume) -> None:
    head = render(SCAN._replace(is_head=True), "a", MATRIX, SLICE_MM)
    assert found(head.hu, spacing_of(head), refused=True) == {"lungs"}
    filled = np.where(ndimage.binary_dilation(IS_LUNG[chest.ts], iterations=2), 40, chest.hu)
    assert found(filled, spacing_of(chest), refused=True) == {"lungs"}


def trunk(lung_hu: float = -850, num_slices: int = 24) -> np.ndarray:
    """A body 312 mm wide in voxels of 6 x 6 x 8 mm."""
    noise = np.random.default_rng(0).integers(-40, 41, (num_slices, 64, 64))
    hu = np.full((num_slices, 64, 64), -1000)
    hu[:, 10:54, 6:58] = 40
    hu[:, 18:46, 12:28] = hu[:, 18:46, 36:52] = lung_hu
    return (hu + noise).clip(-1023).astype(np.int16)


def test_lung_is_measured_in_mm_of_height() -> None:
    for num_slices, expected in ((15, False), (14, True)):  # of 8 mm
        bases = trunk()
        bases[num_slices:][bases[num_slices:] < -700] = 40
        bases[num_slices:, :2] = -1000
        assert ("lungs" in found(bases, (6.0, 6.0, 8.0))) == expected


def test_gas_of_the_bowel_and_what_lies_on_the_patient_are_not_lung() -> None:
    assert "lungs" in found(trunk(lung_hu=-1000), (6.0, 6.0, 8.0))
    hu = trunk(lung_hu=40)
    hu[:, 2:10, 6:58] = -800  # a pillow, open to the air around
    assert "lungs" in found(hu, (6.0, 6.0, 8.0))


def outside(hu: np.ndarray) -> np.ndarray:
    """Of a circular field of view."""
    y, x = np.mgrid[: hu.shape[1], : hu.shape[2]]
    return np.hypot(y - hu.shape[1] / 2 + 0.5, x - hu.shape[2] / 2 + 0.5) > hu.shape[2] / 2


@pytest.mark.parametrize("padding", [None, -1024, -2000, -3024, -32768])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hu: hu, set()),
        (lambda hu: hu.clip(-1024), set()),
        (lambda hu: hu + 1024, {"dark as air", "bone"}),
        (lambda hu: hu - 1024, {"soft tissue", "darker"}),
        (lambda hu: hu.clip(-1024) - 1024, {"soft tissue"}),
        (lambda hu: hu + 400, {"dark as air"}),
        (lambda hu: hu * 4, {"darker"}),
        (lambda hu: -hu, {"bone"}),
        (lambda hu: hu / 1000, {"dark as air"}),
        (lambda hu: np.rint((hu + 1000).clip(0, 2000) / 2000 * 255), {"dark as air"}),
        (lambda hu: (hu > -500).astype(float), {"dark as air"}),
    ],
    ids="hu saturated raw twice saturated_twice offset slope inverted unit picture mask".split(),
)
def test_values_that_are_not_hu_are_refused_whatever_the_padding(
    change: Change, words: set[str], padding: int | None, chest: Volume
) -> None:
    values = change(chest.hu.astype(float))
    if padding is not None:
        values[:, outside(values)] = padding
    assert unit_of(values) >= words
    assert bool(unit_of(values)) == bool(words)


def test_values_that_no_scanner_writes_are_refused(chest: Volume) -> None:
    values = chest.hu.astype(float)
    values[3, 4, 5] = 30_710  # extended range
    assert unit_of(values) == set()
    values[3, 4, 5] = 63_536 - 1024
    assert unit_of(values) == {"no CT"}


def test_padding_is_left_out_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, 50_000)
    padding = np.concatenate([np.full(9000, -3024), rng.integers(-3026, -3021, 900)])  # resampled
    # of a masked CT: lower values than its background are no padding
    background = np.concatenate([image, np.zeros(90_000, int)])
    for values, kept in ((image, image), (np.concatenate([padding, image]), image), (background, background)):
        expected = np.unique(kept, return_counts=True)
        np.testing.assert_array_equal(levels_without_padding(values + 0.2), expected)


@pytest.mark.parametrize("level", [-1024, -1000, 0, 40])
def test_blank_slices_are_listed(level: int, chest: Volume) -> None:
    hu = chest.hu.clip(-1024, 3071)
    assert blank_slices(hu) == []
    hu[[0, 7, -1]] = level
    hu[7, outside(hu)] = -1024
    assert blank_slices(hu) == [0, 7, len(hu) - 1]
    noise = np.random.default_rng(0).normal(-1000, 20, hu[0].shape)
    hu[4] = noise.round()
    doubts, blank = find_doubts(hu, spacing_of(chest))
    assert blank == [0, 4, 7, len(hu) - 1]
    assert "blank" in {doubt.rule for doubt in doubts}


def test_extents_that_no_chest_has_are_refused(chest: Volume) -> None:
    hu, (x, y, z) = chest.hu, spacing_of(chest)
    assert found(hu[:19], (x, y, 10.0), refused=True) == {"slices"}
    assert found(hu, (x / 10, y / 10, z / 10), refused=True) == {"length", "width", "depth"}
    assert found(hu, (x, y, 20.0), refused=True) == {"length"}
    # a narrow part of a slice is not widened by what pads it to a square
    assert "width" in found(hu[:, :, 30:60], (x, y, z), refused=True)


def store(path: Path, hu: np.ndarray, spacing_mm: Spacing) -> Path:
    x, y, z = spacing_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.ascontiguousarray(hu.transpose(2, 1, 0)), np.diag([-x, -y, z, 1.0]))
    nib.save(image, path)
    return path


def of_inference(path: Path) -> list[str]:
    """Doubts of a file as ``predict`` and ``inference.json`` read it, or why it is refused."""
    sources, _ = ct_sources(path)
    try:
        return [doubt.text for doubt in sources[0].read().doubts]
    except RejectedError as error:
        return [error.reason]


def of_data_prep_and_audit(path: Path) -> tuple[list[str], list[str]]:
    try:
        volume = read_volume(SourceVolume("a", "train", ct_file(path), "v2"))
    except RejectedError as error:
        return [error.reason], [error.reason]
    decoder = VolumeDecoder(len(volume.ct), volume.ct.shape[1:], volume.spacing_mm, has_ts=False)
    for z, ct in enumerate(volume.ct):
        decoder.add(z, ct, None, None)
    of_audit = [doubt.text for doubt in judge(decoder.content().measures)]
    return (volume.doubts.split("; ") if volume.doubts else []), of_audit


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu,
        lambda hu: hu[::-1],
        lambda hu: hu[:, ::-1],
        lambda hu: hu[:, :, ::-1],
        lambda hu: hu[:, :, : hu.shape[2] // 2],
        lambda hu: hu[: len(hu) // 2],
        lambda hu: np.where(np.arange(len(hu))[:, None, None] == len(hu) - 1, -1024, hu),
        lambda hu: hu + 1024,
        lambda hu: hu - 1024,
        lambda hu: hu + 150,
    ],
    ids="upright head_down back_front mirrored half lower blank raw twice offset".split(),
)
def test_inference_data_prep_and_audit_agree_about_a_file(
    change: Change, chest: Volume, tmp_path: Path
) -> None:
    path = store(tmp_path / "a.nii.gz", change(chest.hu).astype(np.int16), spacing_of(chest))
    of_shards, of_audit = of_data_prep_and_audit(path)
    assert of_inference(path) == of_audit
    assert of_shards == of_audit


def test_raw_ct_rate_with_padding_comes_out_equal_to_truth(chest: Volume, tmp_path: Path) -> None:
    """CT-RATE v1: raw values are right there, and their padding is not the air of a scan in HU."""
    truth = chest.hu.clip(-1024, 3071)
    raw = truth.astype(np.int16) + np.int16(1024)
    raw[:, outside(raw)] = -2000
    truth[:, outside(truth)] = -1024
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.ascontiguousarray(raw.transpose(2, 1, 0)), np.eye(4)), path)
    source = SourceVolume("a", "train", ct_file(path), "v1", Rescale(1, -1024, spacing_of(chest)))
    volume = read_volume(source)
    np.testing.assert_array_equal(volume.ct, truth)
    assert volume.doubts == ""
    in_hu = tmp_path / "b.nii.gz"
    nib.save(nib.Nifti1Image(np.ascontiguousarray(truth.transpose(2, 1, 0)), np.eye(4)), in_hu)
    with pytest.raises(RejectedError, match="not in HU: .*rescaled twice"):
        read_volume(source._replace(ct=ct_file(in_hu)))


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("lidc_idri_0314_ct_1p56x1p56x2mm.nii.gz", set()),
        ("lidc_idri_0314_ct_native_slices130_162.nii.gz", {"length"}),
        ("crlm_ct_1004_ct_1p59x1p59x5mm.nii.gz", {"lungs"}),
        ("totalseg_example_ct_3mm.nii.gz", {"lungs"}),
        ("totalseg_dicom_series", {"length"}),
    ],
)
def test_of_real_ct_only_the_whole_chest_passes(name: str, refused: set[str], real_ct_dir: Path) -> None:
    sources, _ = ct_sources(real_ct_dir / name)
    assert {doubt.rule for doubt in sources[0].read().doubts if doubt.refused} == refused


@pytest.mark.real_ct
def test_the_collected_cases_come_out_as_they_must(wrong_inputs: ModuleType, tmp_path: Path) -> None:
    cases = tmp_path
    for name, (make, _) in wrong_inputs.CASES.items():
        if name[:2] in ("03", "04", "20", "21"):
            make(cases / name[:2])

    def verdict(path: Path) -> set[str]:
        try:
            return {doubt.rule for doubt in ct_sources(path)[0][0].read().doubts} - {"blank"}
        except RejectedError as error:
            return {error.reason}

    assert verdict(cases / "03" / "nifti") == verdict(cases / "03" / "dicom") == {"not in HU"}
    assert verdict(cases / "04" / "nifti") == {"not in HU"}
    assert verdict(cases / "20" / "head.nii.gz") == {"head"}
    assert verdict(cases / "20" / "back.nii.gz") == {"back"}
    assert verdict(cases / "20" / "mirror.nii.gz") == {"heart"}
    assert verdict(cases / "21" / "half.nii.gz") & {"width", "lungs", "shape", "spine"}
    assert verdict(cases / "21" / "blank.nii.gz") == set()
    last = ct_sources(cases / "21" / "blank.nii.gz")[0][0].read()
    assert list(last.blank) == [len(last.hu) - 1]
    raw = cases / "04" / "ct_rate" / "dataset" / "train" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz"
    rescale = Rescale(1, -1024, (3.125, 3.125, 6.0))
    truth = read_ct(SourceVolume("b", "train", ct_file(cases / "04" / "truth.nii.gz"), "v2"))
    volume = read_volume(SourceVolume("a", "train", ct_file(raw), "v1", rescale))
    np.testing.assert_array_equal(volume.ct, truth.hu)


def test_only_what_lies_outside_its_range_is_doubted() -> None:
    assert judge({"back": 0.5, "lungs": 120.0, "heart": math.nan, "unknown": 7.0}) == []
    doubts = judge({"back": 0.49, "heart": -3.1, "length": 701.0})
    assert {doubt.rule: doubt.refused for doubt in doubts} == {"length": True, "back": True, "heart": False}
    assert "-3.1 mm" in next(doubt.text for doubt in doubts if doubt.rule == "heart")


@pytest.mark.parametrize("rules", [HU_RULES, CHEST_RULES])
def test_every_bound_has_words(rules: tuple) -> None:
    for rule in rules:
        assert bool(rule.too_low) == math.isfinite(rule.low)
        assert bool(rule.too_high) == math.isfinite(rule.high)
