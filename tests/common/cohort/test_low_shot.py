import pytest

from common.cohort.low_shot import low_shot_split
from common.cohort.patient_split import patient_of, split_by_patient

VOLUMES = [f"train_{patient}_a_{recon}" for patient in range(1, 112) for recon in (1, 2)]


def patients(volumes: list[str]) -> set[str]:
    return {patient_of(volume) for volume in volumes}


def test_smaller_shares_are_inside_larger_ones_and_all_is_the_plain_split() -> None:
    sides = {fraction: low_shot_split(VOLUMES, 11, 42, fraction) for fraction in (0.01, 0.07, 0.1, 0.5, 1.0)}
    kept = [patients(split["train"]) for split in sides.values()]
    assert [len(own) for own in kept] == [1, 7, 10, 50, 100]
    assert all(small < large for small, large in zip(kept, kept[1:], strict=False))
    assert sides[1.0] == split_by_patient(VOLUMES, 11, 42)


def test_all_volumes_of_a_patient_are_kept_in_order_and_validation_stays() -> None:
    split = low_shot_split(VOLUMES, 11, 42, 0.1)
    assert split["validation"] == split_by_patient(VOLUMES, 11, 42)["validation"]
    assert split["train"] == [volume for volume in VOLUMES if patient_of(volume) in patients(split["train"])]
    assert len(split["train"]) == 20
    assert not patients(split["train"]) & patients(split["validation"])


def test_seed_decides_and_the_order_of_the_table_does_not() -> None:
    drawn = patients(low_shot_split(VOLUMES, 11, 42, 0.1)["train"])
    assert patients(low_shot_split(VOLUMES[::-1], 11, 42, 0.1)["train"]) == drawn
    assert patients(low_shot_split(VOLUMES, 11, 43, 0.1)["train"]) != drawn


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction must be above 0 and at most 1, got {fraction}"):
        low_shot_split(VOLUMES, 11, 42, fraction)
