import random

import numpy as np
import pytest

from common.cohort.cohort import listed_volumes, read_labels
from data_prep.subset import choose_subset, write_skip_list, write_subset

NAMES = ["Emphysema", "Atelectasis", "Hiatal hernia", "Consolidation", "Lung nodule"]


def cohort(num_patients: int, num_classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Patients with 1 to 4 volumes; sicker ones have more of every label and more volumes."""
    rng = np.random.default_rng(seed)
    labels = {}
    for patient in range(1, num_patients + 1):
        sickness = rng.random()
        for recon in range(1, 1 + rng.integers(1, 3 + round(2 * sickness))):
            values = rng.random(num_classes) < sickness * np.linspace(0.05, 0.9, num_classes)
            labels[f"train_{patient}_a_{recon}"] = values.astype(np.float32)
    return labels


def prevalence(labels: dict[str, np.ndarray], volumes: list[str]) -> np.ndarray:
    return np.mean([labels[volume] for volume in volumes], axis=0, dtype=np.float64)


def patient(volume: str) -> str:
    return volume.split("_")[1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_patients", "num_classes"), [(3, 2), (40, 5), (300, 18)])
def test_the_subset_is_never_further_off_than_a_random_draw(num_patients, num_classes, seed) -> None:
    labels = cohort(num_patients, num_classes, seed)
    subset = choose_subset(labels, num_patients // 3, seed)
    everyone = prevalence(labels, list(labels))
    np.testing.assert_allclose(subset.prevalence_of_all, everyone)
    np.testing.assert_allclose(subset.prevalence, prevalence(labels, subset.volumes))
    drawn = np.random.default_rng(seed).permutation(num_patients)[: num_patients // 3] + 1
    random_volumes = [volume for volume in labels if int(patient(volume)) in drawn]
    np.testing.assert_allclose(subset.prevalence_of_random, prevalence(labels, random_volumes))
    assert len(subset.volumes) == len(random_volumes)
    assert abs(subset.prevalence - everyone).max() <= abs(subset.prevalence_of_random - everyone).max()


def test_a_large_cohort_is_matched_to_a_tenth_of_a_percentage_point() -> None:
    labels = cohort(2000, 18)
    subset = choose_subset(labels, 500, seed=42)
    assert abs(subset.prevalence - subset.prevalence_of_all).max() < 0.001
    assert abs(subset.prevalence_of_random - subset.prevalence_of_all).max() > 0.005


def test_an_exchange_takes_the_best_of_all_patients() -> None:
    """Brute force: with one patient to choose, the result is the one nearest to all patients' prevalence."""
    rng = np.random.default_rng(3)
    labels = {f"train_{n}_a_{r}": rng.integers(0, 2, 3) for n in range(1, 26) for r in (1, 2, 3)}
    subset = choose_subset(labels, 1, seed=0)
    everyone = prevalence(labels, list(labels))
    off = {
        p: abs(prevalence(labels, [v for v in labels if patient(v) == p]) - everyone).max()
        for p in map(patient, labels)
    }
    assert off[patient(subset.volumes[0])] == pytest.approx(min(off.values()))
    assert sum(value == pytest.approx(min(off.values())) for value in off.values()) < 5


def test_patients_are_whole_and_as_many_as_asked_for() -> None:
    labels = cohort(60, 5)
    subset = choose_subset(labels, 21, seed=1)
    patients = {patient(volume) for volume in subset.volumes}
    assert len(patients) == subset.num_patients == 21
    assert set(subset.volumes) == {volume for volume in labels if patient(volume) in patients}
    assert len(subset.volumes) == len(set(subset.volumes)) > 21


def test_seed_decides_and_order_of_the_table_does_not() -> None:
    labels = cohort(60, 5)
    shuffled = dict(random.Random(0).sample(list(labels.items()), len(labels)))
    first = choose_subset(labels, 20, seed=42)
    assert choose_subset(shuffled, 20, seed=42).volumes == first.volumes
    assert choose_subset(labels, 20, seed=43).volumes != first.volumes


def test_the_subset_is_a_label_table_and_the_rest_a_skip_list(tmp_path) -> None:
    labels = cohort(12, 5)
    subset = choose_subset(labels, 5, seed=0)
    write_subset(tmp_path / "subset.csv", subset, labels, NAMES)
    write_skip_list(tmp_path / "others.txt", subset, labels)
    read = read_labels(tmp_path / "subset.csv", NAMES)
    assert list(read) == sorted(subset.volumes, key=lambda volume: (int(patient(volume)), volume))
    for volume, values in read.items():
        np.testing.assert_array_equal(values, labels[volume])
    others = listed_volumes(tmp_path / "others.txt")
    assert others | read.keys() == labels.keys()
    assert not others & read.keys()


@pytest.mark.parametrize("num_patients", [0, 12, 13])
def test_a_subset_is_smaller_than_the_cohort(num_patients) -> None:
    message = rf"num_patients must be at least 1 and smaller than .* patients, 12, got {num_patients}\."
    with pytest.raises(ValueError, match=message):
        choose_subset(cohort(12, 5), num_patients, seed=42)
