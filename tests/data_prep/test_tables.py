import csv

import pytest

from data_prep.tables import write_table


def test_cells_with_commas_quotes_and_umlauts_come_back(tmp_path) -> None:
    rows = [["a,b", 'c"d', "Müller"], ["", "1", "2.5"]]
    write_table(tmp_path / "a.csv", ("x", "y", "z"), rows)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "y", "z"], *rows]
    assert b"\r" not in (tmp_path / "a.csv").read_bytes()


def test_a_table_that_breaks_off_leaves_the_one_before(tmp_path) -> None:
    write_table(tmp_path / "a.csv", ("x",), [["before"]])
    with pytest.raises(ZeroDivisionError):
        write_table(tmp_path / "a.csv", ("x",), ([1 / n] for n in (1, 0)))
    assert (tmp_path / "a.csv").read_text() == "x\nbefore\n"
