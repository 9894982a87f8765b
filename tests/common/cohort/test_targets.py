import logging

import pytest

from common.cohort.targets import read_targets

TABLE = """VolumeName,age,sick,days,died
a/train_1_a_1.nii.gz,61.5,1,100,1
train_2_a_1,,0,30,0
train_3_a_1,40,0,,
"""


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "targets.csv"
        path.write_text(text)
        return path

    return write


def test_each_kind_is_read_and_empty_cells_are_left_out(table, caplog):
    kinds = {"age": "number", "sick": "binary", "death": ["days", "died"]}
    with caplog.at_level(logging.WARNING):
        age, sick, death = read_targets(table(TABLE), kinds)
    assert age.values == {"train_1_a_1": (61.5,), "train_3_a_1": (40.0,)}
    assert list(sick.values.values()) == [(1.0,), (0.0,), (0.0,)]
    assert (death.name, death.kind) == ("death", "survival")
    assert death.values == {"train_1_a_1": (100.0, 1.0), "train_2_a_1": (30.0, 0.0)}
    assert "'age' is empty for 1 of 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("text", "targets", "named"),
    [
        (TABLE, {}, "at least one column"),
        (TABLE, {"age": "numeric"}, r"'binary', 'number' or \[time column, event column\], got 'numeric'"),
        (TABLE, {"death": ["days"]}, r"got \['days'\] for 'death'"),
        (TABLE, {"weight": "number"}, "'weight'"),
        (TABLE + "train_2_a_1.nii.gz,1,1,1,1\n", {"age": "number"}, "two rows for volume 'train_2_a_1'"),
        (
            TABLE.replace("61.5", "old"),
            {"age": "number"},
            "age must be a number, got 'old' for volume 'a/train",
        ),
        (TABLE.replace("61.5", "nan"), {"age": "number"}, "age must be a number, got 'nan'"),
        (TABLE, {"age": "binary"}, "age must be 0 or 1, got '61.5'"),
        (TABLE.replace("100", "0"), {"death": ["days", "died"]}, "days must be a positive number, got '0'"),
        (TABLE.replace("30,0", "30,2"), {"death": ["days", "died"]}, "died must be 0 or 1, got '2'"),
        ("VolumeName,age\na_1_a,\n", {"age": "number"}, r"no value of \['age'\]"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table, text, targets, named):
    with pytest.raises(ValueError, match=named):
        read_targets(table(text), targets)
