"""The sheet shows what it says: views, masks, and crosses on the positions views were centred on."""

from typing import Any

import matplotlib.image
import numpy as np
import pytest
from ignite.engine import Engine
from PIL import Image

from common.reports.contact_sheet import ViewSheet, contact_sheet
from common.transforms.hounsfield import HU_WINDOWS
from tests.common.conftest import multi_crop

WINDOW = HU_WINDOWS["ct_rate"]
SHAPE = (61, 61)


@pytest.fixture
def batch_of(slabs_of):
    """Return ``batch(number, multi_crop, ...)`` of samples of grey slices with the given masks."""

    def batch(number: int, crop: Any, with_masks: bool = True, **masks: Any) -> dict:  # noqa: ANN401
        scan = {"hu": np.full((3, *SHAPE), -200, np.int16), **masks}
        slabs = slabs_of([scan], crop, with_masks=with_masks)
        return slabs.collate([slabs[place] for place in range(number)])

    return batch


def pixels(path: Any) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)[50:]  # below the legend


def coloured(image: np.ndarray, red: bool, green: bool, blue: bool) -> np.ndarray:
    """(row, column) of the pixels of a pure colour."""
    wanted = np.array([red, green, blue])
    return np.argwhere(((image > 200) == wanted).all(-1) & ((image < 90) == ~wanted).all(-1))


def one_finding() -> np.ndarray:
    rex = np.zeros((3, 128, 128), np.uint16)
    rex[:, 16:40, 80:112] = 1
    return rex


@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_cross_lies_inside_the_outlined_finding(batch_of, tmp_path, flip_prob):
    chances = {"blur_probs": (0,), "guided_prob": 1, "flip_prob": flip_prob}
    crop = multi_crop(32, 16, 8, num_global=1, num_local=1, **chances)
    contact_sheet(batch_of(1, crop, rex=one_finding()), WINDOW, tmp_path / "sheet.png")
    image = pixels(tmp_path / "sheet.png")
    image = image[:, : image.shape[1] * 2 // 3 - 4]  # the global view fills two of three columns
    outline = coloured(image, red=True, green=False, blue=False)
    label_frame_and_cross = coloured(image, red=True, green=True, blue=False)
    inside = ((label_frame_and_cross > outline.min(0)) & (label_frame_and_cross < outline.max(0))).all(1)
    assert len(outline) > 100
    assert inside.sum() > 20
    # the finding is right of the middle, unless mirrored
    assert (outline.mean(0)[1] > image.shape[1] / 2) == (flip_prob == 0)


def test_organs_are_tinted_and_unguided_views_have_no_cross(batch_of, tmp_path):
    ts = np.zeros((3, 128, 128), np.uint8)
    ts[:, :, :64] = 51
    crop = multi_crop(32, 16, 8, guided_prob=0)
    contact_sheet(batch_of(1, crop, ts=ts), WINDOW, tmp_path / "sheet.png")
    image = pixels(tmp_path / "sheet.png")
    assert len(coloured(image, red=False, green=True, blue=True)) == 0
    tinted = np.ptp(image, axis=-1) > 20
    assert 0.1 < tinted.mean() < 0.6


def test_views_without_masks_are_the_grey_the_encoder_sees(batch_of, tmp_path):
    crop = multi_crop(32, 16, 8, gamma_prob=0)
    contact_sheet(batch_of(2, crop, with_masks=False), WINDOW, tmp_path / "sheet.png")
    image = pixels(tmp_path / "sheet.png")
    grey = round(255 * (-200 - WINDOW.min_hu) / (WINDOW.max_hu - WINDOW.min_hu))
    assert (np.abs(image - grey) <= 1).all(-1).mean() > 0.6


def test_one_band_a_sample_up_to_the_limit(batch_of, tmp_path):
    crop = multi_crop(32, 16, 8)
    heights = []
    for number, most in ((1, 4), (2, 4), (3, 2)):
        contact_sheet(
            batch_of(number, crop, rex=one_finding()), WINDOW, tmp_path / "sheet.png", max_samples=most
        )
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[0] < heights[1] == heights[2]


def test_the_first_batch_is_drawn_and_later_ones_are_not(slabs_of, tmp_path):
    slabs = slabs_of([{"hu": np.full((3, 40, 44), 100, np.int16)}], multi_crop(32, 16, 8))
    batch = slabs.collate([slabs[0]])
    path = tmp_path / "run" / "views.png"
    written = []

    def step(engine, _):
        written.append(path.is_file() and path.stat().st_mtime_ns)
        engine.state.batch = batch

    engine = Engine(step)
    ViewSheet(path, HU_WINDOWS["ct_rate"]).attach(engine)
    engine.run([0, 1, 2])
    assert written[0] is False
    assert written[1] == written[2]
    assert matplotlib.image.imread(path).std() > 0
