"""A rendered volume: what its labels say is in the image, where its masks say, and nowhere else."""

import numpy as np
import pytest
from scipy import ndimage

from common.cohort.cohort import load_labels
from data_prep.phantom.anatomy import IS_LUNG, TS_IDS
from data_prep.phantom.population import CT_RATE_LABELS, ScanId, roster
from data_prep.phantom.scan import DRAWERS, Volume, describe, render
from data_prep.phantom.scanner import KERNELS, Redraw

MATRIX, SLICE_MM = 72, (5.0, 5.0)
SCANS = roster(30, seed=8)


def draw(scan: ScanId, labels: dict[str, float] | None = None, site: str = "a") -> Volume:
    return render(scan, site, MATRIX, SLICE_MM, labels)


def union(volume: Volume, label: str) -> np.ndarray:
    mask = np.zeros(volume.hu.shape, bool)
    for finding in volume.findings:
        if finding.label == label:
            mask[finding.region.box] |= finding.region.mask
    return mask


@pytest.fixture(scope="module")
def healthy() -> Volume:
    return draw(SCANS[0], {})


def test_the_same_patient_is_scanned_with_another_dose_kernel_and_table(healthy) -> None:
    def redraw(**changes) -> Volume:
        return render(SCANS[0], "a", MATRIX, SLICE_MM, {}, Redraw(**changes))

    np.testing.assert_array_equal(redraw().hu, healthy.hu)
    still = redraw(dose=1e9).hu.astype(float)
    within = np.isin(healthy.ts, [TS_IDS["liver"], TS_IDS["heart"]])
    spread = {dose: (redraw(dose=dose).hu - still)[within].std() for dose in (1.0, 0.25)}
    assert spread[0.25] == pytest.approx(2 * spread[1.0], rel=0.02)
    bare, differs = redraw(table=False), redraw(table=False).hu != healthy.hu
    assert differs.any()
    assert not differs[bare.ts > 0].any()
    assert {redraw(kernel=name).protocol.kernel.name for name in KERNELS} == {*KERNELS}
    smooth, sharp = (redraw(kernel=name, dose=1e9).hu for name in ("PHANTOM_SOFT", "PHANTOM_SHARP"))
    steps = [np.abs(np.diff(hu.astype(float), axis=2)).max() for hu in (smooth, sharp)]
    assert steps[0] < 0.9 * steps[1]


def test_every_label_of_ct_rate_has_a_drawer() -> None:
    assert sorted(DRAWERS) == sorted(CT_RATE_LABELS)
    assert len(DRAWERS) == 18


@pytest.mark.parametrize("label", CT_RATE_LABELS)
def test_a_label_changes_the_image_where_its_mask_says_and_only_there(healthy, label) -> None:
    ill = draw(SCANS[0], {label: 0.6})
    assert {finding.label for finding in ill.findings} == {label}
    mask = union(ill, label)
    change = np.abs(ill.hu.astype(int) - healthy.hu)
    assert (change[mask] > 0).mean() > 0.85
    assert change[mask].mean() > 60
    # Edges are soft, and the kernel blurs them. A large heart also moves all that lies around it.
    around = ndimage.binary_dilation(mask, iterations=2)
    assert change[around].sum() > (0.7 if label == "Cardiomegaly" else 0.93) * change.sum()
    assert change[mask].mean() > 50 * change[~mask].mean()


@pytest.mark.parametrize("label", CT_RATE_LABELS)
def test_the_faintest_of_a_label_leaves_a_trace(label) -> None:
    assert union(draw(SCANS[1], {label: 0.05}), label).any()


def test_leaving_one_finding_out_leaves_the_others_alone() -> None:
    pair = draw(SCANS[0], {"Lung nodule": 0.7, "Hiatal hernia": 0.6})
    alone = draw(SCANS[0], {"Lung nodule": 0.7})
    np.testing.assert_array_equal(union(pair, "Lung nodule"), union(alone, "Lung nodule"))


def test_a_volume_is_the_same_every_time() -> None:
    first, second = draw(SCANS[3]), draw(SCANS[3])
    np.testing.assert_array_equal(first.hu, second.hu)
    np.testing.assert_array_equal(first.ts, second.ts)
    assert first.labels == second.labels


def test_reconstructions_show_the_same_patient_differently() -> None:
    first, second = next(
        (a, b) for a, b in zip(SCANS, SCANS[1:], strict=False) if (a.seed, a.scan) == (b.seed, b.scan)
    )
    a, b = draw(first), draw(second)
    assert a.labels == b.labels
    assert a.person == b.person
    assert a.hu.shape != b.hu.shape or (a.hu != b.hu).any()


def test_describe_tells_what_render_does(healthy) -> None:
    labels, person, protocol = describe(SCANS[0], "a", MATRIX, SLICE_MM, {})
    assert (labels, person, protocol) == (healthy.labels, healthy.person, healthy.protocol)
    assert healthy.hu.shape == (protocol.num_slices, MATRIX, MATRIX)


def test_a_chest_has_seventy_of_totalsegmentators_structures(healthy) -> None:
    ids = np.unique(healthy.ts)
    assert ids.max() < len(load_labels("totalsegmentator"))
    assert len(ids) > 70


def test_some_scans_have_overlapping_findings_and_two_findings_of_one_code() -> None:
    overlaps, twins = 0, 0
    for scan in SCANS[:7]:
        volume = draw(scan)
        coded = [finding for finding in volume.findings if finding.code]
        count = np.zeros(volume.hu.shape, int)
        for finding in coded:
            count[finding.region.box] += finding.region.mask
        overlaps += bool((count > 1).any())
        twins += len({finding.code for finding in coded}) < len(coded)
    assert overlaps >= 2
    assert twins >= 2


def test_codes_are_rexgroundingcts() -> None:
    codes = {label.code for label in load_labels("rexgroundingct")}
    volume = draw(SCANS[0], dict.fromkeys(CT_RATE_LABELS, 0.5))
    found = {finding.code for finding in volume.findings} - {""}
    assert found <= codes
    assert len(found) >= 9


def test_a_head_ct_has_no_chest_and_no_findings() -> None:
    head = draw(SCANS[0]._replace(is_head=True))
    assert head.labels == {}
    assert head.findings == []
    assert not IS_LUNG[head.ts].any()
    assert (head.ts == TS_IDS["brain"]).any()
