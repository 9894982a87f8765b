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
from matplotlib.figure import Figure
from PIL import Image

from common.reports.ct_report import (
    Finding,
    attended_slices,
    jpeg_of,
    write_attended_slices,
    write_ct_report,
)
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
        "z_mm": 2.5 * np.arange(SLICES),
        "facts": ["5 slices"],
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
    page = page_of(tmp_path, title=evil, findings=[Finding("<b>bold</b>", 0.5, 0.1)], facts=[evil])
    assert page.count("<script") == 2
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "default-src 'none'" in page
    assert data_of(page)["title"] == evil


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hu": np.zeros((5, 4, 3))}, r"hu must be square slices \(S, H, H\), got \(5, 4, 3\)"),
        ({"z_mm": [1.0]}, "z_mm .* 5 heights.* got 1"),
        ({"attention": np.ones(4) / 4}, r"attention .* 5 entries.* got \(4,\)"),
        ({"attention": np.full(5, np.nan)}, "attention must be numbers from 0 to 1, got nan"),
        ({"maps": maps_of(np.full((5, 2, 2), 1.5))}, "maps must be numbers from 0 to 1, got 1.5"),
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
    page_of(tmp_path, hu=black, maps=maps_of(maps, (0.25, 0.5, 0.5, 0.25)))
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


def test_the_picture_holds_these_slices_with_place_and_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", kept)
    weights = np.array([0.3, 0.05, 0.05, 0.05, 0.25, 0.05, 0.05, 0.2])
    hu = np.full((8, 20, 20), -1350, np.int16) + 150 * np.arange(8, dtype=np.int16)[:, None, None]
    write_attended_slices(tmp_path / "new" / "a.png", "train_1_a_1", hu, 8.0 * np.arange(8), weights)
    (figure,) = figures
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == [
        "slice 1 of 8, 0.0 mm, weight 30.00%",
        "slice 5 of 8, 32.0 mm, weight 25.00%",
        "slice 8 of 8, 56.0 mm, weight 20.00%",
    ]
    assert "train_1_a_1" in figure.get_suptitle()
    assert "even: 12.50%" in figure.get_suptitle()
    assert [axes.get_images()[0].get_array()[0, 0] for axes in figure.axes[:3]] == [-1350, -750, -300]
    grey = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("L"))
    for expected in (0, 255 * 600 / 1500, 255 * 1050 / 1500):  # -600/1500
        assert (np.abs(grey - expected) < 2).mean() > 0.05
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
