"""Who is in a cohort, with which diseases: the same for the same seed, at the stated prevalence."""

import numpy as np
import pytest

from common.cohort.cohort import load_labels
from data_prep.phantom.population import (
    PREVALENCE,
    ScanId,
    draw_fluid,
    draw_labels,
    draw_person,
    roster,
)

NUM_SCANS = 1500


def scan_of(patient: int, scan: int = 0, reconstruction: int = 1) -> ScanId:
    return ScanId(0, "train", patient + 1, scan, reconstruction, (11, 0, patient), False)


@pytest.fixture(scope="module")
def drawn() -> list[dict[str, float]]:
    return [draw_labels(scan_of(patient)) for patient in range(NUM_SCANS)]


@pytest.mark.parametrize("site", ["a", "b"])
def test_volume_k_is_the_same_in_cohorts_of_any_size(site) -> None:
    large = roster(90, seed=4, site=site)
    for size in (1, 17, 89):
        assert roster(size, seed=4, site=site) == large[:size]


def test_names_are_ct_rates_and_unique() -> None:
    volumes = roster(300, seed=1)
    names = [volume.name for volume in volumes]
    assert names[0] == "train_1_a_1"
    assert len(set(names)) == 300
    first = next(volume for volume in volumes if volume.scan == 1)
    assert first.folder == f"train_{first.patient}/train_{first.patient}_b"
    # Patients of a split are numbered without gaps.
    for split in ("train", "valid"):
        numbers = sorted({volume.patient for volume in volumes if volume.split == split})
        assert numbers == list(range(1, len(numbers) + 1))


def test_some_patients_have_two_scans_and_some_scans_two_reconstructions() -> None:
    volumes = roster(600, seed=2)
    patients = len({volume.seed for volume in volumes})
    scans = len({(volume.seed, volume.scan) for volume in volumes})
    assert scans / patients == pytest.approx(7 / 6, abs=0.06)
    assert len(volumes) / scans == pytest.approx(5 / 4, abs=0.07)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_valid_share_is_that_of_the_patients(share) -> None:
    volumes = roster(200, seed=3, valid_share=share)
    patients = {volume.seed: volume.split for volume in volumes}
    valid = sum(split == "valid" for split in patients.values())
    assert abs(valid - share * len(patients)) <= 1


def test_no_patient_is_in_both_splits() -> None:
    splits: dict[tuple[int, ...], set[str]] = {}
    for volume in roster(200, seed=5):
        splits.setdefault(volume.seed, set()).add(volume.split)
    assert all(len(found) == 1 for found in splits.values())


def test_few_patients_are_heads_without_labels() -> None:
    heads = [volume for volume in roster(400, seed=0) if volume.is_head]
    assert 1 <= len({head.seed for head in heads}) <= 5
    assert draw_labels(heads[0]) == {}


def test_prevalence_names_every_label_between_5_and_45_percent() -> None:
    assert list(PREVALENCE) == [label.name for label in load_labels("ct_rate")]
    assert all(0.05 <= prevalence <= 0.45 for prevalence in PREVALENCE.values())


def test_labels_have_their_prevalence(drawn) -> None:
    for label, prevalence in PREVALENCE.items():
        share = np.mean([label in labels for labels in drawn])
        tolerance = 4 * np.sqrt(prevalence * (1 - prevalence) / NUM_SCANS)
        assert share == pytest.approx(prevalence, abs=tolerance), label


def test_diseases_that_keep_company_are_correlated_and_others_are_not(drawn) -> None:
    def odds_ratio(first: str, second: str) -> float:
        both, one, other, none = (
            sum((first in labels) == a and (second in labels) == b for labels in drawn)
            for a, b in ((True, True), (True, False), (False, True), (False, False))
        )
        return both * none / (one * other)

    assert odds_ratio("Arterial wall calcification", "Coronary artery wall calcification") > 2
    assert odds_ratio("Consolidation", "Lung opacity") > 2
    assert 0.6 < odds_ratio("Emphysema", "Lung opacity") < 1.6


def test_severity_spans_its_range(drawn) -> None:
    values = [severity for labels in drawn for severity in labels.values()]
    assert min(values) >= 0.05
    assert max(values) <= 1.0
    assert np.mean(values) == pytest.approx(0.525, abs=0.03)


def test_reconstructions_share_labels_and_visits_share_what_is_chronic() -> None:
    for patient in range(30):
        first, second = draw_labels(scan_of(patient)), draw_labels(scan_of(patient, reconstruction=2))
        assert first == second
        visit = draw_labels(scan_of(patient, scan=1))
        for label in ("Emphysema", "Coronary artery wall calcification", "Lung nodule"):
            assert (label in first) == (label in visit)
    acute = [
        "Consolidation" in draw_labels(scan_of(p)) and "Consolidation" not in draw_labels(scan_of(p, scan=1))
        for p in range(100)
    ]
    assert any(acute)


def test_fluid_follows_the_label() -> None:
    assert draw_fluid(scan_of(1), {}).depth_mm == (0.0, 0.0)
    mild = [sum(draw_fluid(scan_of(p), {"Pleural effusion": 0.1}).depth_mm) for p in range(20)]
    gross = [sum(draw_fluid(scan_of(p), {"Pleural effusion": 1.0}).depth_mm) for p in range(20)]
    assert min(mild) > 0
    assert all(more > less for more, less in zip(gross, mild, strict=True))


def test_persons_vary_and_stay_themselves() -> None:
    persons = [draw_person(scan_of(patient), {}, 0.3) for patient in range(60)]
    assert {person.sex for person in persons} == {"F", "M"}
    assert all(18 <= person.age_years <= 92 for person in persons)
    assert np.std([person.anatomy.fat_mm for person in persons]) > 4
    assert np.std([person.pose.scale[0] for person in persons]) > 0.03
    assert 0.1 < np.mean([person.anatomy.blood_hu[0] > 100 for person in persons]) < 0.55
    again = draw_person(scan_of(7, scan=1), {}, 0.3)
    assert again.anatomy.fat_mm == persons[7].anatomy.fat_mm
    assert again.pose.scale == persons[7].pose.scale
    assert again.pose.shift_mm != persons[7].pose.shift_mm


def test_cardiomegaly_is_a_heart_larger_than_any_healthy_one() -> None:
    healthy = [draw_person(scan_of(p), {}, 0.3).anatomy.heart_scale for p in range(40)]
    mild = draw_person(scan_of(0), {"Cardiomegaly": 0.05}, 0.3).anatomy.heart_scale
    assert mild > max(healthy) + 0.1
    assert draw_person(scan_of(0), {"Cardiomegaly": 1.0}, 0.3).anatomy.heart_scale > mild + 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_volumes": 0, "seed": 0}, "num_volumes must be at least 1, got 0"),
        ({"num_volumes": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"num_volumes": 1, "seed": 0, "site": "c"}, "site must be one of .*, got 'c'"),
        ({"num_volumes": 1, "seed": 0, "valid_share": 1.5}, "valid_share must be in"),
    ],
)
def test_roster_refuses_arguments_out_of_range(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        roster(**arguments)
