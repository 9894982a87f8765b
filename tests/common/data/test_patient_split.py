import numpy as np
import pytest

from common.data.patient_split import patient_of, split_by_patient

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


def test_draw_is_numpys_legacy_choice_of_patients_in_order_of_appearance() -> None:
    state = np.random.RandomState(42)
    expected = set(state.choice([f"train_{patient}" for patient in range(1, 12)], 4, replace=False))
    drawn = split_by_patient(VOLUMES, num_val_patients=4, seed=42)["validation"]
    assert {patient_of(volume) for volume in drawn} == expected


@pytest.mark.parametrize("count", [0, 11, 1000])
def test_a_side_without_patients_is_refused(count: int) -> None:
    message = (
        rf"num_val_patients must be at least 1 and smaller than the number of patients, 11, got {count}\."
    )
    with pytest.raises(ValueError, match=message):
        split_by_patient(VOLUMES, num_val_patients=count, seed=42)


@pytest.mark.parametrize("name", ["trn00123", "train_1", "_1_a_1"])
def test_name_without_a_patient_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"volume must be named <split>_<patient>_.*, got '{name}'"):
        patient_of(name)
