import random

import numpy as np
import pytest

from common.cohort.patient_split import (
    low_shot_split,
    natural_order,
    patient_of,
    split_by_patient,
    split_three_ways,
)

VOLUMES = [
    f"train_{patient}_{scan}_{recon}" for patient in range(1, 12) for scan in "ab" for recon in (1, 2, 3)
]


def test_no_patient_is_on_both_sides_and_no_volume_is_lost() -> None:
    split = split_by_patient(VOLUMES, num_val_patients=3, seed=42)
    patients = {side: {patient_of(volume) for volume in volumes} for side, volumes in split.items()}
    assert len(patients["validation"]) == 3
    assert len(patients["train"]) == 8
    assert not patients["train"] & patients["validation"]
    assert sorted(split["train"] + split["validation"]) == sorted(VOLUMES)
    assert split["train"] == [volume for volume in VOLUMES if volume in split["train"]]


def test_the_same_number_in_two_splits_of_ct_rate_is_two_patients() -> None:
    split = split_by_patient(["train_7_a_1", "valid_7_a_1"], num_val_patients=1, seed=0)
    assert [len(volumes) for volumes in split.values()] == [1, 1]


def test_seed_decides_the_draw() -> None:
    draws = [split_by_patient(VOLUMES, num_val_patients=3, seed=seed)["validation"] for seed in (42, 42, 43)]
    assert draws[0] == draws[1] != draws[2]


def test_draw_is_numpys_legacy_choice_of_patients_in_order_of_their_numbers() -> None:
    state = np.random.RandomState(42)
    expected = set(state.choice([f"train_{patient}" for patient in range(1, 12)], 4, replace=False))
    drawn = split_by_patient(VOLUMES, num_val_patients=4, seed=42)["validation"]
    assert {patient_of(volume) for volume in drawn} == expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_the_table_does_not_matter(seed: int) -> None:
    shuffled = random.Random(seed).sample(VOLUMES, len(VOLUMES))
    for split in (
        lambda volumes: split_by_patient(volumes, 4, 42),
        lambda volumes: split_three_ways(volumes, 42),
    ):
        for side, volumes in split(VOLUMES).items():
            assert sorted(split(shuffled)[side]) == sorted(volumes)


@pytest.mark.parametrize("count", [0, 11, 1000])
def test_a_side_without_patients_is_refused(count: int) -> None:
    message = (
        rf"num_val_patients must be at least 1 and smaller than the number of patients, 11, got {count}\."
    )
    with pytest.raises(ValueError, match=message):
        split_by_patient(VOLUMES, num_val_patients=count, seed=42)


def test_three_sides_share_no_patient_and_lose_no_volume() -> None:
    volumes = [f"valid_{patient}_a_{recon}" for patient in range(1, 58) for recon in (1, 2)]
    split = split_three_ways(volumes, seed=42)
    patients = {side: {patient_of(volume) for volume in part} for side, part in split.items()}
    assert [len(members) for members in patients.values()] == [39, 5, 13]  # 70 % and 10 % of 57, rounded down
    assert len(set().union(*patients.values())) == 57
    assert sorted(sum(split.values(), [])) == sorted(volumes)


def test_three_ways_are_numpys_legacy_permutation_of_patients_in_alphabetical_order() -> None:
    alphabetical = [f"train_{patient}" for patient in (1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
    order = [alphabetical[place] for place in np.random.RandomState(7).permutation(11)]
    split = split_three_ways(VOLUMES, seed=7)
    patients = {side: {patient_of(volume) for volume in part} for side, part in split.items()}
    assert patients == {"train": set(order[:7]), "validation": {order[7]}, "test": set(order[8:])}


@pytest.mark.parametrize(
    ("num_patients", "percent", "message"),
    [
        (9, (70, 10, 20), r"enough patients for a \(70, 10, 20\) .*, got 9: none for 'validation'\."),
        (9, (70, 10, 10), r"percent must be positive and add up to 100, got \(70, 10, 10\)\."),
        (9, (90, 10, 0), r"percent must be positive and add up to 100, got \(90, 10, 0\)\."),
    ],
)
def test_three_sides_must_have_patients(
    num_patients: int, percent: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split_three_ways([f"valid_{patient}_a_1" for patient in range(num_patients)], 42, percent)


def test_names_are_ordered_by_their_numbers_and_never_tie() -> None:
    names = ["train_2_b_1", "train_10_a_1", "valid_1_a_1", "train_2_a_10", "train_2_a_9", "train_02_a_9"]
    ordered = ["train_02_a_9", "train_2_a_9", "train_2_a_10", "train_2_b_1", "train_10_a_1", "valid_1_a_1"]
    assert sorted(names, key=natural_order) == sorted(names[::-1], key=natural_order) == ordered


@pytest.mark.parametrize("name", ["trn", "trn00123_a", "xtst00001", "train_1", "_1_a_1", "1_2_840_55_7"])
def test_name_without_a_patient_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"volume must be named <split>_<patient>_.*, got '{name}'"):
        patient_of(name)


def test_a_volume_of_rad_chestct_stands_for_a_patient() -> None:
    assert [patient_of(name) for name in ("trn00001", "val00001", "tst00001")] == [
        "trn00001",
        "val00001",
        "tst00001",
    ]


VOLUMES_of_low_shot = [f"train_{patient}_a_{recon}" for patient in range(1, 112) for recon in (1, 2)]


def patients(volumes: list[str]) -> set[str]:
    return {patient_of(volume) for volume in volumes}


def test_smaller_shares_are_inside_larger_ones_and_all_is_the_plain_split() -> None:
    sides = {
        fraction: low_shot_split(VOLUMES_of_low_shot, 11, 42, fraction)
        for fraction in (0.01, 0.07, 0.1, 0.5, 1.0)
    }
    kept = [patients(split["train"]) for split in sides.values()]
    assert [len(own) for own in kept] == [1, 7, 10, 50, 100]
    assert all(small < large for small, large in zip(kept, kept[1:], strict=False))
    assert sides[1.0] == split_by_patient(VOLUMES_of_low_shot, 11, 42)


def test_all_volumes_of_a_patient_are_kept_in_order_and_validation_stays() -> None:
    split = low_shot_split(VOLUMES_of_low_shot, 11, 42, 0.1)
    assert split["validation"] == split_by_patient(VOLUMES_of_low_shot, 11, 42)["validation"]
    assert split["train"] == [
        volume for volume in VOLUMES_of_low_shot if patient_of(volume) in patients(split["train"])
    ]
    assert len(split["train"]) == 20
    assert not patients(split["train"]) & patients(split["validation"])


def test_seed_decides_and_the_order_of_the_table_does_not() -> None:
    drawn = patients(low_shot_split(VOLUMES_of_low_shot, 11, 42, 0.1)["train"])
    assert patients(low_shot_split(VOLUMES_of_low_shot[::-1], 11, 42, 0.1)["train"]) == drawn
    assert patients(low_shot_split(VOLUMES_of_low_shot, 11, 43, 0.1)["train"]) != drawn


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction must be above 0 and at most 1, got {fraction}"):
        low_shot_split(VOLUMES_of_low_shot, 11, 42, fraction)
