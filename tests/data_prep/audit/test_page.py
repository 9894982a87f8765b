import re
from xml.etree import ElementTree

from data_prep.audit.page import STYLE, light, listing, page, section, table

EVIL = "<script>alert('x')</script>&\""


def test_all_text_is_escaped() -> None:
    pieces = (light("ok", EVIL), listing([EVIL]), section(EVIL, "<p></p>"), table([EVIL], [["<p></p>"]]))
    for piece in pieces:
        ElementTree.fromstring(piece)
        assert "<script" not in piece
    assert "<script" not in page(EVIL, "")


def test_a_page_needs_nothing_but_itself() -> None:
    whole = page("Audit", section("Checks", "<p>fine</p>"))
    assert not re.search(r"https?://|@import|url\(|<script|<link", whole)
    assert STYLE in whole
    assert '<meta charset="utf-8">' in whole


def test_empty_sections_and_lists_are_left_out() -> None:
    assert section("Left out", "") == ""
    assert listing([]) == ""


def test_a_table_has_its_cells_in_order() -> None:
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", table(["a", "b"], [["1", "2"], ["3", "4"]]))
    assert cells == ["a", "b", "1", "2", "3", "4"]
