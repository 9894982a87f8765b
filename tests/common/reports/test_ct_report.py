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

from common.reports.ct_report import Finding, jpeg_of, write_ct_report

SLICES, SIDE = 5, 40
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def page_of(folder: Path, **changes: object) -> str:
    rng = np.random.default_rng(0)
    attention = np.array([0.1, 0.2, 0.15, 0.5, 0.05])
    given = {
        "title": "ct.nii.gz",
        "hu": rng.integers(-1000, 400, (SLICES, SIDE, SIDE)).astype(np.int16),
        "z_mm": 2.5 * np.arange(SLICES),
        "facts": ["5 slices"],
        "origin": "dale_ct_2s",
        "findings": [Finding("Emphysema", 0.75, 0.5), Finding("Lung nodule", 0.25, 0.5)],
        "attention": attention,
        "patch_maps": rng.random((SLICES, 3, 4)),
        "map_note": "Where it looks.",
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


def test_without_attention_it_opens_in_the_middle(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path, attention=None, patch_maps=None, findings=()))
    assert data["start"] == 2
    assert data["attention"] is None
    assert data["maps"] is None
    assert data["map_note"] == "Where it looks."


def test_a_probability_at_its_threshold_is_called() -> None:
    assert Finding("Emphysema", 0.5, 0.5).called


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
    page = page_of(tmp_path, title=evil, findings=[Finding("<b>bold</b>", 0.5, 0.1)], facts=[evil])
    assert page.count("<script") == 2
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "default-src 'none'" in page
    assert data_of(page)["title"] == evil


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hu": np.zeros((5, 4, 3))}, r"hu must be square slices \(S, H, H\), got \(5, 4, 3\)"),
        ({"z_mm": [1.0]}, "z_mm must have one height a slice, got 1 for 5 slices"),
        ({"attention": np.ones(4) / 4}, r"attention must have one entry a slice, got \(4,\) for 5"),
        ({"attention": np.full(5, np.nan)}, "attention must be numbers from 0 to 1, got nan"),
        ({"patch_maps": np.full((5, 2, 2), 1.5)}, "patch_maps must be numbers from 0 to 1, got 1.5"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        page_of(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_viewer_runs_in_a_browser(tmp_path: Path) -> None:
    page_of(tmp_path, title="</script><b>odd</b>", warnings=["Few slices."])
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    for fragment, expected in (("", "slice 4 of 5"), ("#slice=2", "slice 2 of 5 from the feet, 2.5 mm")):
        address = (tmp_path / "page.html").as_uri() + fragment
        result = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
        assert expected in result.stdout
        assert '<h1 id="title">&lt;/script&gt;&lt;b&gt;odd&lt;/b&gt;</h1>' in result.stdout
        assert '<tr class="called"><td>Emphysema</td>' in result.stdout
        assert "Few slices." in result.stdout
        assert 'id="map-card"><i></i><span id="map-note">Where it looks.</span>' in result.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_map_is_painted_where_its_box_says_in_whole_patches(tmp_path: Path) -> None:
    maps = np.zeros((SLICES, 2, 4))
    maps[3, 1, 2] = 1  # of the slice that is shown first
    black = np.full((SLICES, SIDE, SIDE), -3000, np.int16)
    page_of(tmp_path, hu=black, patch_maps=maps, map_box=(0.25, 0.5, 0.5, 0.25))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1000"]
    picture = tmp_path / "page.png"
    address = (tmp_path / "page.html").as_uri()
    subprocess.run(
        [*command, f"--screenshot={picture}", address], capture_output=True, check=True, timeout=120
    )
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
