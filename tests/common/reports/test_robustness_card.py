"""The card shows every number that was measured, on one scale, as text and never as markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.reports.robustness_card import Card, Effect, write_card

NAN = float("nan")


def effect(change: str, strength: float, axis: str, fall: float) -> Effect:
    numbers = {
        "macro_auroc": (0.7 - fall, NAN, NAN),
        "macro_auroc_change": (-fall, -fall - 0.02, -fall + 0.01),
        "macro_auprc": (NAN, NAN, NAN),
        "macro_auprc_change": (NAN, NAN, NAN),
        "probability_change": (fall / 2, fall / 3, fall),
        "calls_flipped": (fall, fall / 2, 2 * fall),
        "token_cosine": (1 - fall, 1 - 2 * fall, 1.0),
    }
    return Effect(change, strength, axis, 12, numbers)


CARD = Card(
    encoder="mine<b>",
    dataset="trunks & more",
    unchanged={"macro_auroc": (0.7, 0.6, 0.8), "macro_auprc": (0.4, 0.3, 0.5)},
    floor={"macro_auroc": (0.5, 0.5, 0.5), "macro_auprc": (0.2, 0.1, 0.3)},
    effects=[
        effect("hu_gain", 0.9, "factor", 0.125),
        effect("hu_gain", 1.1, "factor", 0.0625),
        effect("transposed", 1, "", 0.25),
    ],
    left_out=["more_contrast_75 (needs masks)"],
    facts=["12 volumes"],
    note="drawn <i>patients</i>",
)


class Elements(HTMLParser):
    """Collects tags and text, and fails for one that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_text_as_text(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    page = (tmp_path / "robustness.html").read_text()
    assert "@@" not in page
    assert "mine&lt;b&gt;" in page
    assert "drawn &lt;i&gt;patients&lt;/i&gt;" in page
    assert "For research, not for diagnosis" in page
    assert not re.search(r"https?://|<script|src=", page)
    elements = Elements()
    elements.feed(re.sub(r"(<(?:line|circle)[^>]*)/>", r"\1>", page))
    assert not elements.open
    assert elements.tags.count("section") == elements.tags.count("svg") == 2
    assert elements.tags.count("circle") == 3  # an undefined AUPRC has no dot
    assert "more_contrast_75 (needs masks)" in page


def test_dots_lie_where_the_scale_of_the_page_has_them(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    page = (tmp_path / "robustness.html").read_text()
    zero = float(re.search(r'class="zero"[^>]*y1="([0-9.]+)"', page)[1])
    dots = [float(y) for y in re.findall(r'<circle class="auroc"[^>]*cy="([0-9.]+)"', page)]
    falls = [dot - zero for dot in dots]
    assert falls[0] == pytest.approx(2 * falls[1], abs=0.3)
    assert falls[2] == pytest.approx(4 * falls[1], abs=0.3)
    assert zero + falls[2] < 110


def test_the_section_for_a_model_card_is_one_table(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    lines = (tmp_path / "robustness.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {7}
    cells = (
        "HU gain, factor = 0.9",
        "-0.125 (-0.145 to -0.115)",
        "undefined",
        "0.062 (0.042 to 0.125)",
        "12.5 %",
    )
    assert f"| {' | '.join(cells)} | 0.8750 (0.7500 to 1.0000) |" in table
    assert "| unchanged | 0.700 (0.600 to 0.800) | 0.400 (0.300 to 0.500) | | | |" in table
    with Image.open(tmp_path / "robustness.png") as picture:
        assert picture.width > 500


def test_a_card_without_effects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No change could be measured"):
        write_card(tmp_path, CARD._replace(effects=[]))
