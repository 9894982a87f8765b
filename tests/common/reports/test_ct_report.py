"""The page holds what it was given, runs by itself, and shows strange text as text."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.reports.ct_report import ChestMap, Finding, Quality, attended_slices, jpeg_of, write_ct_report
from common.reports.ct_tokens import PatchMaps

SLICES, SIDE = 5, 40
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def maps_of(values: np.ndarray, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> PatchMaps:
    return PatchMaps(values, box, "Where it looks.")


def page_of(folder: Path, **changes: object) -> str:
    rng = np.random.default_rng(0)
    attention = np.array([0.1, 0.2, 0.15, 0.5, 0.05])
    given = {
        "title": "ct.nii.gz",
        "hu": rng.integers(-1000, 400, (SLICES, SIDE, SIDE)).astype(np.int16),
        "spacing_mm": (0.7, 0.7, 2.5),
        "origin": "dale_ct_2s",
        "findings": [Finding("Emphysema", 0.75, 0.5), Finding("Lung nodule", 0.25, 0.5)],
        "attention": attention,
        "maps": maps_of(rng.random((SLICES, 3, 4))),
    }
    write_ct_report(folder / "page.html", **(given | changes))  # type: ignore[arg-type]
    return (folder / "page.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_opens_at_the_most_attended_slice_and_names_what_is_called(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path))
    assert data["start"] == 3
    assert data["z_mm"] == [0, 2.5, 5, 7.5, 10]
    assert [(finding["name"], finding["called"]) for finding in data["findings"]] == [
        ("Emphysema", True),
        ("Lung nodule", False),
    ]
    assert len(data["windows"]["lung"]) == len(data["windows"]["mediastinum"]) == SLICES
    assert data["map_shape"] == [3, 4]
    assert len(base64.b64decode(data["maps"][0])) == 12
    assert data["map_note"] == "Where it looks."


def test_without_attention_it_opens_in_the_middle(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path, attention=None, maps=None, findings=()))
    assert data["start"] == 2
    assert data["attention"] is None
    assert data["maps"] is None


def test_a_probability_at_its_threshold_is_called(tmp_path: Path) -> None:
    (finding,) = data_of(page_of(tmp_path, findings=[Finding("Emphysema", 0.5, 0.5)]))["findings"]
    assert finding["called"]


def test_a_display_window_is_linear_between_its_ends() -> None:
    ramp = np.tile(np.array([-2000, -1350, -600, 150, 3000], np.int16).repeat(8), (40, 1))
    data = base64.b64decode(jpeg_of(ramp, -1350, 150).partition(",")[2])
    grey = np.asarray(Image.open(io.BytesIO(data)))[20, 4::8]
    np.testing.assert_allclose(grey, [0, 0, 127.5, 255, 255], atol=4)  # JPEG rounds


def test_slices_of_512_pixels_are_reduced_and_not_cropped(tmp_path: Path) -> None:
    hu = np.full((1, 512, 512), -1000, np.int16)
    hu[:, 256:, :] = 1000
    data = base64.b64decode(jpeg_of(hu[0], -1350, 150).partition(",")[2])
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == (384, 384)
    assert image[180].max() < 80
    assert image[205].min() > 240


def test_nothing_is_fetched_and_text_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    page = page_of(tmp_path, title=evil, findings=[Finding("<b>bold</b>", 0.5, 0.1)], warnings=[evil])
    assert page.count("<script") == 2
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "default-src 'none'" in page
    assert data_of(page)["title"] == evil


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hu": np.zeros((5, 4, 3))}, r"hu must be square slices \(S, H, H\), got \(5, 4, 3\)"),
        ({"attention": np.ones(4) / 4}, r"attention .* 5 entries.* got \(4,\)"),
        ({"attention": np.full(5, np.nan)}, "attention must be numbers from 0 to 1, got nan"),
        ({"maps": maps_of(np.full((5, 2, 2), 1.5))}, "maps must be numbers from 0 to 1, got 1.5"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        page_of(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def browse(folder: Path, *options: str, fragment: str = "") -> str:
    """Open the page in Chromium and return what it printed."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, (folder / "page.html").as_uri() + fragment]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@needs_browser
def test_the_viewer_runs_in_a_browser(tmp_path: Path) -> None:
    quality = Quality(0.875, float("nan"), 3, 12)
    findings = [Finding("Emphysema", 0.75, 0.5, quality), Finding("<i>odd</i>", 0.25, 0.5)]
    page_of(tmp_path, title="</script><b>odd</b>", findings=findings, warnings=["Few slices."])
    for fragment, expected in (
        ("", "slice 4 of 5 from the feet, 7.5 mm, weight 50.00 %"),
        ("#slice=2", "slice 2 of 5 from the feet, 2.5 mm"),
    ):
        shown = browse(tmp_path, "--dump-dom", fragment=fragment)
        assert expected in shown
        assert '<h1 id="title">&lt;/script&gt;&lt;b&gt;odd&lt;/b&gt;</h1>' in shown
        assert '<tr class="called"><td>Emphysema</td><td class="number">0.750</td>' in shown
        assert '≥ 0.500</td><td class="call">positive</td>' in shown
        assert re.search(r">0.875</td><td [^>]*>– \(0.250\)</td></tr>", shown)
        assert "<td>&lt;i&gt;odd&lt;/i&gt;</td>" in shown
        assert "Few slices." in shown
        assert re.search(r'id="map-card"><i></i><span id="map-note">Where it looks.</span>', shown)
        assert '<section class="warning" id="chest-card" hidden="">' in shown


@needs_browser
def test_the_part_without_a_probe_says_what_its_facts_say(tmp_path: Path) -> None:
    levels = [None, *({"slice": z, "z_mm": 9.0 * (z - 1), "cosine": 0.25 * z} for z in (3, 1, 2, 2))]
    boxes = {"body": {"slices": [0, 5], "rows": [4, 34], "columns": [2, 32]}}
    boxes["lungs"] = {"slices": [1, 4], "rows": [10, 30], "columns": [5, 25]}
    reference = {"name": "SYNTHETIC<img src=x onerror=alert(1)>", "slices": 3}
    facts = {"spacing_mm": [1, 1, 2.5], "boxes_px": boxes, "levels": levels, "reference": reference}
    alike = np.corrcoef(np.random.default_rng(1).random((SLICES, 4)))
    alike[0] = np.nan
    tiles = {1: jpeg_of(np.zeros((8, 8)), -1, 1)}
    nothing = {"attention": None, "maps": None, "findings": (), "tiles": tiles}
    hu = np.full((3, SIDE, SIDE), -1000, np.int16)
    page_of(tmp_path, chest=ChestMap(facts, alike, hu), **nothing)
    shown = browse(tmp_path, "--dump-dom", fragment="#slice=2")
    assert "slice 3 of 3 from the feet, 18.0 mm, cosine 0.75" in shown
    assert "lungs: slices 2 to 4, 8 mm high" in shown
    assert "SYNTHETIC&lt;img src=x onerror=alert(1)&gt;</span>" in shown
    assert '<b class="stamp">SYNTHETIC, no patient</b>' in shown
    assert '<section id="findings-card" hidden="">' in shown
    assert '<section class="warning" id="chest-card">' in shown
    assert "<figcaption>slice 2, 2.5 mm</figcaption>" in shown
    assert shown.count('<b class="r">R</b><b class="l">L</b><b class="a">A</b><b class="p">P</b>') == 3
    assert "none: this slice is blank" in browse(tmp_path, "--dump-dom", fragment="#slice=1")
    # rows of canonical slices run to the back, columns to the patient's left
    sides = re.findall(r"\.frame \.(\w) \{ (\w+): 4px; ", (tmp_path / "page.html").read_text())
    assert sides == [("r", "left"), ("l", "right"), ("a", "top"), ("p", "bottom")]


@needs_browser
def test_a_map_is_painted_where_its_box_says_in_whole_patches(tmp_path: Path) -> None:
    maps = np.zeros((SLICES, 2, 4))
    maps[3, 1, 2] = 1  # of the slice that is shown first
    black = np.full((SLICES, SIDE, SIDE), -3000, np.int16)
    page_of(tmp_path, hu=black, maps=maps_of(maps, (0.25, 0.5, 0.5, 0.25)))
    picture = tmp_path / "page.png"
    browse(tmp_path, "--window-size=1200,1000", f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    red, green, blue = pixels.transpose(2, 0, 1)
    view = (green < 12) & (blue < 12)  # black, or black under red
    columns, rows = (np.flatnonzero(view.sum(axis) > 300) for axis in (0, 1))
    side = len(columns)
    assert 300 < side < 600
    assert abs(len(rows) - side) <= 1
    lit = view & (red > 60)
    lit[: rows[0]] = lit[rows[-1] + 1 :] = False  # the legend has these colours, too
    top, left = (np.flatnonzero(lit.any(axis))[0] for axis in (1, 0))
    bottom, right = (np.flatnonzero(lit.any(axis))[-1] + 1 for axis in (1, 0))
    found = [(left - columns[0]) / side, (top - rows[0]) / side, (right - left) / side, (bottom - top) / side]
    # a patch is 0.5 / 4 wide and 0.25 / 2 high
    np.testing.assert_allclose(found, [0.5, 0.625, 0.125, 0.125], atol=0.01)
    assert lit[top:bottom, left:right].mean() > 0.95


Z_MM = 4.0 * np.arange(12)


def test_the_largest_weight_comes_first_and_its_neighbours_do_not() -> None:
    weights = np.array([1, 1, 2, 8, 9, 7, 1, 1, 6, 1, 1, 5]) / 43
    # 3 and 5 lie 4 mm from 4; 11 lies 12 mm from 8
    assert attended_slices(weights, Z_MM, 3) == [4, 8, 11]
    assert attended_slices(weights, 2.5 * Z_MM, 3) == [4, 3, 5]  # 10 mm each


def test_of_few_slices_there_are_few() -> None:
    assert attended_slices(np.array([0.2, 0.5, 0.3]), [0, 1, 2]) == [1]
    assert attended_slices(np.array([0.2, 0.5, 0.3]), [0, 20, 40]) == [1, 2, 0]


def test_slices_of_equal_weight_are_spread_over_the_scan() -> None:
    assert attended_slices(np.full(12, 1 / 12, np.float32), Z_MM) == [1, 3, 5, 7, 9, 11]
