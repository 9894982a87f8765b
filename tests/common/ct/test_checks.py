"""Chests pass whatever they suffer from; heads, abdomens, slabs and values that are not HU do not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.ct.checks import NOT_CHEST_CT, chest_cts, chest_doubts
from common.ct.rejection import RejectedError
from common.embeddings.sources import CTSlices, CTSource, ct_sources
from data_prep.phantom.anatomy import IS_LUNG
from data_prep.phantom.population import CT_RATE_LABELS, roster
from data_prep.phantom.scan import Volume, render

MATRIX, SLICE_MM = 96, (5.0, 5.0)
SCAN = roster(1, seed=8)[0]
# 384 mm wide, 192 mm high, all of it with lungs
SIDE_MM, THICK_MM = 6.0, 8.0


def ct_of(volume: Volume) -> CTSlices:
    pixel_mm = volume.protocol.pixel_mm
    return CTSlices(volume.hu, (pixel_mm, pixel_mm, volume.protocol.slice_mm))


def trunk(lung_hu: float = -850, num_slices: int = 24) -> CTSlices:
    hu = np.full((num_slices, 64, 64), -1000, np.int16)
    hu[:, 10:54, 6:58] = 40
    hu[:, 18:46, 12:28] = hu[:, 18:46, 36:52] = lung_hu
    return CTSlices(hu, (SIDE_MM, SIDE_MM, THICK_MM))


@pytest.fixture(scope="module")
def chest() -> Volume:
    return render(SCAN, "a", MATRIX, SLICE_MM, {})


@pytest.mark.parametrize("site", ["a", "b"])
def test_phantom_chests_of_both_sites_pass(site: str) -> None:
    for scan in roster(6, seed=3, site=site):
        assert chest_doubts(*ct_of(render(scan, site, MATRIX, SLICE_MM))[:2]) == []


def test_the_worst_of_every_disease_is_still_a_chest() -> None:
    worst = render(SCAN, "a", MATRIX, SLICE_MM, dict.fromkeys(CT_RATE_LABELS, 1.0))
    assert {finding.label for finding in worst.findings} == set(CT_RATE_LABELS)
    assert chest_doubts(*ct_of(worst)[:2]) == []


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "doubt"),
    [
        ("lidc_idri_0314_ct_1p56x1p56x2mm", None),
        ("lidc_idri_0314_ct_native_slices130_162", "slices must span 150 to 700 mm, got 32 mm"),
        ("crlm_ct_1004_ct_1p59x1p59x5mm", "lungs must show over at least 120 mm of its height, got 70 mm"),
        ("totalseg_example_ct_3mm", "lungs must show over at least 120 mm of its height, got 18 mm"),
        ("totalseg_dicom_series", "slices must span 150 to 700 mm, got 40 mm"),
    ],
)
def test_of_real_ct_only_the_whole_chest_passes(name: str, doubt: str | None, real_ct_dir: Path) -> None:
    path = real_ct_dir / name
    sources, _ = ct_sources(path if path.is_dir() else path.with_suffix(".nii.gz"))
    ct = sources[0].read()
    assert chest_doubts(*ct[:2]) == ([doubt] if doubt else [])


def test_a_head_and_a_chest_without_its_lungs_have_no_lungs(chest: Volume) -> None:
    (doubt,) = chest_doubts(*ct_of(render(SCAN._replace(is_head=True), "a", MATRIX, SLICE_MM))[:2])
    assert doubt == "lungs must show over at least 120 mm of its height, got 0 mm"
    hu, spacing_mm, _ = ct_of(chest)
    filled = np.where(IS_LUNG[chest.ts] | (hu < -500) & (hu > -900), 40, hu)
    (doubt,) = chest_doubts(filled, spacing_mm)
    assert doubt.startswith("lungs must show over at least 120 mm")


def test_lung_is_measured_in_mm_of_height() -> None:
    hu, spacing_mm, _ = trunk()
    assert chest_doubts(hu, spacing_mm) == []
    for num_slices, expected in ((15, []), (14, ["got 112 mm"])):  # of 8 mm
        bases = hu.copy()
        bases[num_slices:][bases[num_slices:] == -850] = 40
        assert [doubt.rpartition(", ")[2] for doubt in chest_doubts(bases, spacing_mm)] == expected


def test_gas_of_the_bowel_and_what_lies_on_the_patient_are_not_lung() -> None:
    assert chest_doubts(*trunk(lung_hu=-1000)[:2]) != []
    hu, spacing_mm, _ = trunk(lung_hu=40)
    hu[:, 2:10, 6:58] = -800  # a pillow, open to the air around
    assert chest_doubts(hu, spacing_mm) == ["lungs must show over at least 120 mm of its height, got 0 mm"]


@pytest.mark.parametrize(
    ("change", "doubts"),
    [
        (lambda hu: np.clip((hu + 1000) / 2000 * 255, 0, 255), ["air"]),  # a picture
        (lambda hu: hu / 1000, ["air"]),  # normalized
        (lambda hu: hu + 1024, ["air", "bone"]),  # raw, without the intercept
        (lambda hu: np.where(hu < -950, -1024, hu + 1024), ["bone"]),  # the same, padded as some scanners do
        (lambda hu: np.clip(hu - 1024, -1024, None), ["soft tissue"]),  # rescaled twice
    ],
)
def test_values_that_are_not_hu_are_told(
    change: Callable[[np.ndarray], np.ndarray], doubts: list[str], chest: Volume
) -> None:
    hu, spacing_mm, _ = ct_of(chest)
    found = chest_doubts(np.rint(change(hu.astype(float))).astype(np.int16), spacing_mm)
    assert len(found) == len(doubts)
    for text, name in zip(found, doubts, strict=True):
        assert f" be {name}, " in text
        assert text.endswith("values seem not to be HU")


def test_too_few_slices_and_extents_that_no_chest_has_are_told() -> None:
    hu = trunk().hu
    assert chest_doubts(hu[:3], (SIDE_MM, SIDE_MM, 60.0)) == ["it must have at least 20 slices, got 3"]
    assert chest_doubts(hu, (SIDE_MM, SIDE_MM, 0.8)) == ["slices must span 150 to 700 mm, got 19 mm"]
    # spacing in cm
    assert chest_doubts(hu, (0.6, 0.6, 0.8)) == [
        "slices must span 150 to 700 mm, got 19 mm",
        "a slice must span 200 to 700 mm, got 38 mm",
    ]
    assert chest_doubts(hu, (12.0, 12.0, THICK_MM)) == ["a slice must span 200 to 700 mm, got 768 mm"]


def test_volumes_are_refused_with_their_reasons_unless_forced() -> None:
    def damaged() -> CTSlices:
        raise RejectedError("unreadable", "the file ends early")

    def gone() -> CTSlices:
        raise FileNotFoundError("no such file")

    sources = [
        CTSource("a", trunk),
        CTSource("b", lambda: trunk(lung_hu=40)),
        CTSource("c", damaged),
        CTSource("d", gone),
        CTSource("e", trunk),
    ]
    for num_workers in (0, 2):
        chests = chest_cts(sources, num_workers, force=False)
        assert [source.volume for source in chests.used] == ["a", "e"]
        assert [(item.volume, item.reason) for item in chests.refused] == [
            *(("b", NOT_CHEST_CT), ("c", "unreadable"), ("d", "unreadable"))
        ]
        assert chests.refused[0].detail.startswith("lungs must show over at least 120 mm")
        assert chests.doubts == {}
    forced = chest_cts(sources, 1, force=True)
    assert [source.volume for source in forced.used] == ["a", "b", "e"]
    assert [item.volume for item in forced.refused] == ["c", "d"]
    assert list(forced.doubts) == ["b"]
    assert forced.doubts["b"] == [chests.refused[0].detail]
