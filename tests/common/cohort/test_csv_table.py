from pathlib import Path

import pytest

from common.cohort.csv_table import table_rows


def test_cells_come_by_the_name_of_their_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b,c\n1,"2, 3",x\n\n4\n', encoding="utf-8-sig")
    rows = list(table_rows(tmp_path / "t.csv", "table", ("b", "a")))
    assert rows == [{"a": "1", "b": "2, 3", "c": "x"}, {"a": "4", "b": "", "c": ""}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "table must have the column 'a', got None in '.*t.csv'"),
        (b"a,c\n1,2\n", r"table must have the column 'b', got \['a', 'c'\] in '.*t.csv'"),
        (
            "a,b\n1,M\xfcller\n".encode("latin-1"),
            "table must be a CSV file in UTF-8, got '.*t.csv' \\('utf-8'",
        ),
        (b'a,b\n1,"x\n2,3\n', "table must be a CSV file in UTF-8, got '.*t.csv' \\(unexpected end of data"),
        (b'a,b\n1,"' + 40_000 * b"2,3\n", "table must be a CSV file in UTF-8, got '.*t.csv' \\(field larger"),
    ],
)
def test_what_is_no_such_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(table_rows(tmp_path / "t.csv", "table", ("a", "b")))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="table must be a CSV file, got '.*none.csv', which does not"):
        next(table_rows(tmp_path / "none.csv", "table", ()))
