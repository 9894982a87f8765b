from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.reports.ct_tokens import read_images
from common.reports.dense_overlay import colours_of, draw_overlay, patch_colours
from common.transforms.dense_labels import patch_shares


def test_patches_have_the_colour_of_their_largest_class() -> None:
    colours = patch_colours(np.array([[[0.2, 0.6], [0.9, 0.1]]]))
    np.testing.assert_allclose(colours[0, 0, :3], colours_of(2)[1])
    np.testing.assert_allclose(colours[0, 1, :3], colours_of(2)[0])
    assert colours[0, 1, 3] == pytest.approx(0.65 * 0.9)
    assert len({tuple(colour) for colour in colours_of(18)}) == 18


def test_colour_lies_where_the_ct_is_bright(ct_path: Path, tmp_path: Path) -> None:
    images = read_images(ct_path, 64)
    mask = np.zeros((1, 60, 60), np.uint8)
    # canonical and padded: columns to the left as stored in reverse, rows to the back
    mask[0, 13:21, 12:22] = 5
    shares = patch_shares(mask, images.box, 8, 6).toarray().reshape(1, 8, 8, 6)[..., 5:]
    draw_overlay(tmp_path / "a.png", images, [4], [("ours", shares)], mask, [(5, "liver")])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), float)
    red = (pixels[..., 0] > pixels[..., 1] + 60) & (pixels[..., 0] > pixels[..., 2] + 60)
    red[-60:] = False  # the legend
    assert red.any()
    # the block of 900 HU is white in the picture, and red covers it: nearly no white is left
    bright = images.hu[4, 0].numpy() > 700
    rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
    cells = np.argwhere(shares[0, ..., 0] > 0.9) * 8
    assert len(cells) > 0
    for row, column in cells:
        assert rows[0] - 1 <= row <= rows[-1] + 1 - 7
        assert columns[0] - 1 <= column <= columns[-1] + 1 - 7
