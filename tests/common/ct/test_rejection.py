from common.ct.rejection import EXCLUDED, RejectedError, is_failure


def test_a_rejection_is_one_line_about_one_volume() -> None:
    error = RejectedError("unreadable", "Expected 9 bytes, got 7\n - could the file be damaged?")
    assert str(error).startswith("unreadable: Expected 9")
    assert "\n" not in str(error)
    assert error.of("train_1_a_1") == ("train_1_a_1", "unreadable", error.detail)
    assert error.detail == "Expected 9 bytes, got 7  - could the file be damaged?"


def test_scans_of_other_body_parts_are_no_failures() -> None:
    assert not is_failure(RejectedError(EXCLUDED, "listed").of("a"))
    assert is_failure(RejectedError("mask", "other shape").of("a"))
