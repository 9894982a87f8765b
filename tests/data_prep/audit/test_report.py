import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.shards.index import VolumeEntry
from data_prep.audit.checks import CHECKS, Tally
from data_prep.audit.cohort import Volume
from data_prep.audit.pictures import Picture
from data_prep.audit.report import NUM_BINS, bars, histogram, write_report
from data_prep.audit.run import Audit
from data_prep.audit.volume import VolumeContent

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Tags, attributes and text as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def volume(name: str, labels: dict[str, int] | None) -> Volume:
    entry = VolumeEntry(name, "s.tar", 0, 300, (0.7, 0.7, 1.5), (512, 512), True, True, labels, "", "")
    return Volume(entry, "train", "")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(name: str = "train_1_a_1", errors: bool = False, suspicious: bool = False) -> str:
        tally = Tally()
        for check in CHECKS:
            tally.saw(check.name, 5)
        if errors:
            tally.fail("checksums", name, f"{name} is damaged")
        if suspicious:
            tally.fail("spine", name, f"{name}: bone is in front")
        measures = {"lungs": 5.0, "spine": 0.3}
        content = VolumeContent(measures, (-1000.0, -400.0, 500.0), np.ones(128), np.ones(118), np.ones(14))
        rejected = [{"volume": name, "split": "train", "reason": f"mask {name}", "detail": name}]
        audit = Audit(
            *(tmp_path / "shards", ("train",), 1.0, 1, 10**9, tally, [volume(name, {f"Label {name}": 1})]),
            *(
                {name: content},
                {name: {"spine": f"{name}: bone is in front"}} if suspicious else {},
                rejected,
            ),
        )
        sheet = Picture(name, b"jpeg bytes", (f"Nodules {name}",))
        write_report(audit, [sheet], [sheet] if suspicious else [], tmp_path / "audit.html")
        return (tmp_path / "audit.html").read_text(encoding="utf-8")

    return write


def test_bars_are_as_high_as_there_are_values() -> None:
    values = [0.0] * 6 + [10.0] * 3 + [5.1]
    (chart,) = histogram(values, "Length", "mm")
    assert len(chart.bars) == NUM_BINS
    heights = np.array([float(bar["height"]) for bar in chart.bars])
    np.testing.assert_allclose(heights / heights.max(), np.histogram(values, NUM_BINS)[0] / 6, atol=1e-3)
    assert (chart.most, [text for text, *_ in chart.ticks]) == (6, ["0", "5", "10"])


def test_bars_outside_the_limits_are_marked() -> None:
    chart = bars([1, 1, 1, 1], [0, 1, 2, 3, 4], "x", limits=(1.5, 2.5))
    assert [bar["sound"] for bar in chart.bars] == [False, True, True, False]


def test_one_value_and_none_can_be_drawn() -> None:
    (chart,) = histogram([3.0, 3.0], "x")
    assert sum(float(bar["height"]) > 0 for bar in chart.bars) == 1
    assert histogram([], "x") == []


@pytest.mark.parametrize(
    ("errors", "suspicious", "state", "words"),
    [
        (False, False, "ok", "All checks passed"),
        (False, True, "warn", "some volumes should be looked at"),
        (True, True, "bad", "1 check failed: do not train on these shards"),
    ],
)
def test_the_light_at_the_top_says_how_it_stands(errors, suspicious, state, words, written) -> None:
    html = written(errors=errors, suspicious=suspicious)
    verdict = re.search(r'<header class="verdict (\w+)"><h1>(.*?)</h1>', html)
    assert (verdict[1], words in verdict[2]) == (state, True)


def test_the_page_is_well_formed_and_needs_nothing_but_itself(written) -> None:
    html = written(errors=True, suspicious=True)
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert loaded
    assert all(value.startswith("data:image/jpeg;base64,") for value in loaded)
    assert not re.search(r"https?:|@import|url\(", html)
    assert base64.b64decode(loaded[0].partition(",")[2]) == b"jpeg bytes"


def test_names_from_the_data_cannot_inject_anything(written) -> None:
    page = Page(written(name=EVIL, errors=True, suspicious=True))
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # all of it is still there to read: header, labels, findings, reasons, offenders, rejected
    assert page.text.count(EVIL) >= 8


def test_a_suspicious_volume_is_shown_once_with_its_reason(written) -> None:
    html = written(suspicious=True)
    page = Page(html)
    assert page.tags.count("img") == 1
    assert re.search(r'<p class="why">! train_1_a_1: bone is in front</p>', html)
    assert "Also drawn for it, and shown above: train_1_a_1." in page.text
    assert Page(written()).tags.count("img") == 1


def test_facts_are_in_words(written) -> None:
    text = Page(written()).text
    for words in (
        "train · 300 slices of 512 × 512 · 0.70 × 0.70 × 1.50 mm · 450 mm from feet to head",
        "Labels: Label train_1_a_1",
        "Outlined: Nodules train_1_a_1",
        f"{len(CHECKS)} checks passed, 0 not applicable",
        "Label train_1_a_1100%",
        "mask train_1_a_1",
    ):
        assert words in text
