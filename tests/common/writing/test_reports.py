import logging

import pytest

from common.writing.reports import read_reports, reported_volumes


def table(path, *rows: str) -> str:
    path.write_text("\n".join(["VolumeName,Findings_EN", *rows]) + "\n")
    return str(path)


def test_reports_are_read_in_order_and_empty_ones_counted(tmp_path, caplog) -> None:
    path = table(tmp_path / "a.csv", 'b_1.nii.gz,"Two\n  lines."', "a_1,One.", "c_1, ", "d_1,")
    with caplog.at_level(logging.WARNING):
        reports = read_reports(path)
    assert list(reports.items()) == [("b_1", "Two lines."), ("a_1", "One.")]
    assert "2 of 4 reports" in caplog.text
    assert "'c_1'" in caplog.text


def test_tables_without_reports_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="two rows for volume 'a'"):
        read_reports(table(tmp_path / "a.csv", "a.nii.gz,One.", "a,Two."))
    with pytest.raises(ValueError, match="No report with text"):
        read_reports(table(tmp_path / "b.csv", "a,"))
    with pytest.raises(ValueError, match="column 'Findings_DE'"):
        read_reports(table(tmp_path / "c.csv", "a,One."), "Findings_DE")


def test_volumes_need_both_an_embedding_and_a_report(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert reported_volumes(["c", "a", "x"], {"a": "…", "b": "…", "c": "…"}) == ["a", "c"]
    assert "1 volumes have no report and are left out, first 'x'" in caplog.text
    assert "1 volumes have no embedding and are left out, first 'b'" in caplog.text
    with pytest.raises(ValueError, match="None of 1 embedded volumes, such as 'x'"):
        reported_volumes(["x"], {"a": "…"})
