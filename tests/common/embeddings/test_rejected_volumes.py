"""Rejected volumes are listed, counted, and too many of them are an error."""

import csv
import logging

import pytest

from common.ct.rejection import EXCLUDED, RejectedError
from common.embeddings.rejected_volumes import log_embedded, report_rejected

CUT = RejectedError("unreadable", "cut\noff").of("b")
TWICE = RejectedError("duplicate", "two files").of("a")
LEFT_OUT = RejectedError(EXCLUDED, "no chest").of("c")


def test_the_list_is_sorted_and_complete_and_goes_with_the_last_of_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    failed = report_rejected(tmp_path / "out", [CUT, TWICE, LEFT_OUT, CUT], num_volumes=10, max_rejected=0.2)
    with (tmp_path / "out" / "rejected.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["volume", "reason", "detail"]
    assert rows[1:] == [["a", "duplicate", "two files"], ["b", "unreadable", "cut off"], list(LEFT_OUT)]
    assert failed == 2
    log_embedded(tmp_path / "out", 10, failed)
    (line,) = caplog.messages
    assert "8 volumes" in line
    assert f"2 rejected, listed in '{tmp_path / 'out' / 'rejected.csv'}'" in line
    report_rejected(tmp_path / "out", [], num_volumes=10, max_rejected=0.2)
    assert not (tmp_path / "out" / "rejected.csv").exists()


def test_a_name_that_is_no_text_is_listed(tmp_path):
    report_rejected(tmp_path, [RejectedError("unreadable", "M\udcfcller.nii").of("M")], 10, 0.2)
    assert "M,unreadable,M\\udcfcller.nii" in (tmp_path / "rejected.csv").read_text(encoding="utf-8")


def test_a_larger_share_than_allowed_is_an_error_that_names_one(tmp_path):
    with pytest.raises(ValueError, match=r"at most 10.00%, got 20.00% \(2 volumes, such as 'a': two files\)"):
        report_rejected(tmp_path, [CUT, TWICE, LEFT_OUT], num_volumes=10, max_rejected=0.1)
    # volumes that were never meant to be used do not count
    report_rejected(tmp_path, [LEFT_OUT] * 5, num_volumes=5, max_rejected=0.0)
