from pathlib import Path

import numpy as np
import pytest

from common.cohort.predictions import COLUMNS, Predictions, read_predictions, write_predictions


def predictions() -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions(
        "dale_ct_2s",
        ["valid_1_a_1", "valid_1_a_2", "valid_10_b_1"],
        ["Emphysema", "Nodule, solid"],
        rng.random((3, 2)),
        np.array([0.1 + 0.2, 1e-9]),
        np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
    )


def test_predictions_come_back_to_the_last_bit(tmp_path: Path) -> None:
    write_predictions(tmp_path / "test.csv", predictions())
    back = read_predictions(tmp_path / "test.csv")
    for name, value in predictions()._asdict().items():
        np.testing.assert_array_equal(getattr(back, name), value)
        assert type(getattr(back, name)) is type(value)


def test_file_is_a_plain_csv_of_one_row_for_each_volume_and_class(tmp_path: Path) -> None:
    write_predictions(tmp_path / "test.csv", predictions())
    lines = (tmp_path / "test.csv").read_text().splitlines()
    assert lines[0] == "encoder,volume,class,probability,threshold,label"
    assert len(lines) == 1 + 3 * 2
    assert lines[2].startswith('dale_ct_2s,valid_1_a_1,"Nodule, solid",')
    assert lines[2].endswith(",1e-09,1")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"predictions must be a CSV file, got '.*none.csv', which"):
        read_predictions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"predictions must have the column 'encoder', got \['a', 'b'\] in '.*test.csv'"),
        (",".join(COLUMNS) + "\n", "No predictions in '.*test.csv'"),
        (",".join(COLUMNS) + "\ne,v,A,0.1.2,0.5,1\n", r"Cannot read '.*test.csv': could .* '0.1.2'"),
        (",".join(COLUMNS) + "\ne,v,A,0.1\n", "Cannot read '.*test.csv': could not"),
    ],
)
def test_foreign_or_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "test.csv")


def test_file_that_lacks_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    write_predictions(path, predictions())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[4:]]))
    message = "one row for each volume and class, volume by volume, got 5 rows of 3 volumes and 2 classes"
    with pytest.raises(ValueError, match=message):
        read_predictions(path)
