"""Slices and patches lie where they should, in the colours they were given."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from common.reports.slice_grid import Row, class_colours, slice_grid
from common.run.process import write_figure


def pixels_of(figure: Figure, folder: Path) -> np.ndarray:
    write_figure(folder / "new" / "a.png", figure)
    return np.asarray(Image.open(folder / "new" / "a.png").convert("RGB"), int)


def place_of(axes: Axes, image: np.ndarray) -> tuple[float, float, float]:
    """Top, left and side of square axes in the pixels of the picture."""
    box, scale = axes.get_window_extent(), len(image) / axes.figure.bbox.height
    return len(image) - box.y1 * scale, box.x0 * scale, box.width * scale


def test_patches_cover_their_part_of_the_slice(tmp_path: Path) -> None:
    hu = torch.full((2, 1, 32, 32), 1000.0)  # white
    colours = np.zeros((2, 4, 4, 4))
    colours[1, 0, 3] = (1, 0, 0, 1)  # the second slice's upper right patch
    figure, grid = slice_grid([Row(hu, ["one", "two"], "row", colours)], "title")
    image = pixels_of(figure, tmp_path)
    red = np.argwhere((image[..., 0] > 250) & (image[..., 1] < 5))
    top, left, side = place_of(grid[0, 1], image)
    assert len(red) == pytest.approx((side / 4) ** 2, rel=0.05)
    np.testing.assert_allclose(red.min(0), (top, left + 0.75 * side), atol=3)
    assert [axes.get_title() for axes in grid[0]] == ["one", "two"]


def test_numbers_have_the_colours_of_the_scale_over_the_grey_of_the_slice(tmp_path: Path) -> None:
    hu = np.full((1, 8, 8), -300.0)  # half way from black to white
    values, opacity = np.array([[[2.0, 4.0], [6.0, 3.0]]]), np.array([[[1.0, 0.5], [0.0, 0.25]]])
    row = Row(hu, values=values, opacity=opacity, cmap="viridis", limits=(2, 6), scale="unit", mark=(1, 1))
    figure, grid = slice_grid([row], "title")
    image = pixels_of(figure, tmp_path)
    top, left, side = place_of(grid[0, 0], image)
    for place in np.ndindex(2, 2):
        down, across = int(top + (place[0] + 0.25) * side / 2), int(left + (place[1] + 0.25) * side / 2)
        colour = np.array(matplotlib.colormaps["viridis"]((values[0][place] - 2) / 4)[:3])
        expected = 255 * (colour * opacity[0][place] + 0.5 * (1 - opacity[0][place]))
        np.testing.assert_allclose(image[down, across], expected, atol=3)
    assert len(figure.axes) == 2  # with the bar
    assert figure.axes[1].get_ylim() == (2, 6)
    np.testing.assert_allclose(grid[0, 0].lines[0].get_xydata(), [[5.5, 5.5]])  # the fourth patch's middle


def test_further_columns_are_left_to_the_caller() -> None:
    _, grid = slice_grid([Row(np.zeros((2, 4, 4)))] * 3, "title", more_columns=2)
    assert grid.shape == (3, 4)
    assert [bool(axes.images) for axes in grid[1]] == [True, True, False, False]


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_long_titles_fit_into_the_picture(columns: int) -> None:
    figure, _ = slice_grid([Row(np.zeros((columns, 4, 4)))], "a long name of a scan, " * 7)
    figure.canvas.draw()
    (title,) = figure.texts
    assert title.get_window_extent().width < figure.bbox.width


def test_letters_stand_at_the_patients_sides() -> None:
    """Columns run to the patient's left and rows to the back."""
    _, grid = slice_grid([Row(np.zeros((1, 8, 8)))], "title")
    axes = grid[0, 0]
    places = {
        text.get_text(): axes.transLimits.inverted().transform(text.get_position()) for text in axes.texts
    }
    assert places["R"][0] < 1 < 6 < places["L"][0]
    assert places["A"][1] < 1 < 6 < places["P"][1]


def test_neighbouring_classes_have_different_hues() -> None:
    hues = matplotlib.colors.rgb_to_hsv(class_colours(118))[:, 0]
    apart = np.abs(np.diff(hues))
    assert np.minimum(apart, 1 - apart).min() > 0.3
