from pathlib import Path

import numpy as np
import pytest

from data_prep import splits as module
from data_prep.splits import differing_patients, read_patients, read_split, split_errors, write_split

COMMITTED = Path(module.__file__).parent / "split_lists" / "ct_rate_validation_patients.csv"
WHOLE = [
    ("train_1_a_1", "train"),
    ("train_1_b_2", "train"),
    ("train_2_a_1", "validation"),
    ("train_10_a_1", "train"),
]


def test_a_split_comes_back_in_natural_order(tmp_path) -> None:
    path = tmp_path / "splits.csv"
    write_split(
        path, {"validation": ["train_2_a_1"], "train": ["train_10_a_1", "train_1_b_2", "train_1_a_1"]}
    )
    assert read_split(path) == WHOLE
    lines = path.read_text().splitlines()
    assert lines[:2] == ["volume,patient,split", "train_1_a_1,train_1,train"]
    assert [file.name for file in tmp_path.iterdir()] == ["splits.csv"]


def test_a_right_split_has_no_errors() -> None:
    assert split_errors(WHOLE) == []
    assert split_errors(WHOLE[::-1], [volume for volume, _ in WHOLE]) == []


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [WHOLE[0], ("train_1_b_2", "validation"), *WHOLE[2:]],
            "a patient must be on one side, got 1 on several: 'train_1'",
        ),
        ([*WHOLE, WHOLE[1]], "a volume must have one row, got 1 with several: 'train_1_b_2'"),
        (
            WHOLE[1:3],
            "every volume of the cohort must be in the split, but 2 are not: 'train_1_a_1', 'train_10_a_1'",
        ),
        (
            [*WHOLE, *((f"train_{patient}_a_1", "train") for patient in (14, 11, 13, 12))],
            "every volume of the split must be in the cohort, but 4 are not: "
            "'train_11_a_1', 'train_12_a_1', 'train_13_a_1', ...",
        ),
    ],
)
def test_every_error_is_found_and_told_alone(rows, error) -> None:
    assert split_errors(rows, [volume for volume, _ in WHOLE]) == [error]


def test_a_volume_on_both_sides_is_a_patient_on_both_sides() -> None:
    errors = split_errors([*WHOLE, ("train_1_a_1", "validation")])
    assert [error.split(",")[0] for error in errors] == [
        "a patient must be on one side",
        "a volume must have one row",
    ]


def test_patients_of_a_side_are_compared_with_a_list() -> None:
    assert differing_patients(WHOLE, "train", {"train_1", "train_10"}) == []
    assert differing_patients(WHOLE, "validation", {"train_3", "train_1"}) == [
        "'validation' must have the patients of the list, but 2 are missing: 'train_1', 'train_3'",
        "'validation' must have only the patients of the list, but has 1 more: 'train_2'",
    ]


def test_the_committed_patients_are_the_draw_among_20000() -> None:
    """NumPy's legacy draw without replacement is the head of a permutation, here of the numbers from 1."""
    expected = {f"train_{number + 1}" for number in np.random.RandomState(42).permutation(20_000)[:1000]}
    assert read_patients(COMMITTED) == expected
    assert len(COMMITTED.read_text().splitlines()) == 1001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("volume,side\ntrain_1_a_1,train\n", r"must have the column 'split', got \['volume', 'side'\] in"),
        ("", r"must have the column 'volume', got None in"),
        ("volume,split\n", "No rows"),
    ],
)
def test_a_file_that_is_no_split_list_is_refused(text, message, tmp_path) -> None:
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path / "splits.csv")
    with pytest.raises(FileNotFoundError, match="none.csv"):
        read_patients(tmp_path / "none.csv")
