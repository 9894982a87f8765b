"""On a synthetic patient whose organs are known: colours must lie where the organs are."""

import io

import numpy as np
import pytest
from PIL import Image

from common.shards.writer import write_shard
from data_prep.audit.pictures import GAP_PX, TILE_PX, PictureTask, chosen_slices, draw_volume
from tests.data_prep.conftest import drawn_patient

SLICE_MM = 8.0
HEIGHT = 2 * TILE_PX + GAP_PX


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> PictureTask:
    """A patient with one finding in the right lower chest, a few pixels large."""
    slices = drawn_patient(0, "p")
    rex = np.zeros(slices.ts.shape, np.uint16)
    rex[10:12, 70:76, 30:36] = 1 << 9
    slices = slices._replace(rex=rex)
    path = tmp_path_factory.mktemp("shards") / "train-rex-000000.tar"
    write_shard(path, [slices, slices._replace(volume="q", ct=slices.ct[:7], ts=slices.ts[:7], rex=rex[:7])])
    return PictureTask(path, "p")


@pytest.fixture(scope="module")
def pixels(task: PictureTask) -> np.ndarray:
    image = Image.open(io.BytesIO(draw_volume(task).jpeg))
    assert image.format == "JPEG"
    return np.asarray(image).astype(int)


def centre(mask: np.ndarray) -> np.ndarray:
    assert mask.sum() > 20
    return np.argwhere(mask).mean(0)


def bluish(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 2] - pixels[..., 0] > 40) & (pixels[..., 2] - pixels[..., 1] > 25)


def orange(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return (red - blue > 50) & (red - green > 12) & (green - blue > 20)


def yellow(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return (red > 190) & (green > 180) & (blue < green - 25) & (red - green < 25)


def magenta(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] - pixels[..., 1] > 100) & (pixels[..., 2] - pixels[..., 1] > 80)


def test_the_coronal_cut_has_the_head_up_and_the_patients_right_on_the_left(pixels) -> None:
    coronal = pixels[:, : HEIGHT - 10]
    liver, lungs = centre(orange(coronal)), centre(bluish(coronal))
    assert liver[0] > lungs[0] + 40
    assert liver[1] < lungs[1] - 20


def test_the_sagittal_cut_has_the_front_on_the_left(pixels) -> None:
    sagittal = pixels[:, HEIGHT + GAP_PX : 2 * HEIGHT]
    spine = centre(yellow(sagittal[HEIGHT // 3 :]))
    assert spine[1] > HEIGHT / 2


def test_axial_slices_go_from_the_feet_up_and_show_masks_below(pixels) -> None:
    axial = pixels[:, -6 * (TILE_PX + GAP_PX) :]
    plain, tinted = axial[: TILE_PX - 2], axial[TILE_PX + GAP_PX :]
    assert bluish(plain).sum() < 20
    liver, lungs = centre(orange(tinted)), centre(bluish(tinted))
    assert liver[1] < lungs[1] - TILE_PX
    first = tinted[:, :TILE_PX]
    assert centre(orange(first))[1] < TILE_PX / 2


def test_findings_are_outlined_in_both_windows_and_put_in_words(task, pixels) -> None:
    assert draw_volume(task).findings == ("Nodules and masses (2d), slices 10 to 11",)
    axial = pixels[:, -6 * (TILE_PX + GAP_PX) :]
    for rows in (slice(0, TILE_PX), slice(TILE_PX + GAP_PX, None)):
        outline = np.argwhere(magenta(axial[rows]))
        row, column = outline.mean(0)
        number = int(column // (TILE_PX + GAP_PX))
        assert chosen_slices_of(task)[number] in (10, 11)
        assert abs(row - 73 / 128 * TILE_PX) < 4
        assert abs(column - number * (TILE_PX + GAP_PX) - 33 / 128 * TILE_PX) < 4


def chosen_slices_of(task: PictureTask) -> list[int]:
    rex = np.zeros((42, 128, 128), np.uint16)
    rex[10:12, 0, 0] = 1 << 9
    return chosen_slices(rex)


def test_a_short_scan_keeps_its_proportions(task) -> None:
    image = np.asarray(Image.open(io.BytesIO(draw_volume(task._replace(volume="q")).jpeg))).astype(int)
    lit = np.flatnonzero((image[:, : HEIGHT // 2].sum(2) > 60).any(1))
    assert np.ptp(lit) + 1 == pytest.approx(7 * SLICE_MM / 338.3 * HEIGHT, rel=0.15)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_volume_of_few_slices_shows_them_all(number) -> None:
    assert chosen_slices(np.zeros((number, 128, 128), np.uint16)) == list(range(number))


def test_the_largest_slice_of_every_finding_is_shown() -> None:
    rex = np.zeros((300, 128, 128), np.uint16)
    rex[100:110, 0, 0] = 1
    rex[107, 0, :5] = 1
    rex[109, 4, 4] = 1 << 13
    assert {107, 109} <= set(chosen_slices(rex))
    assert len(chosen_slices(rex)) == 6


def test_an_unknown_volume_is_refused(task) -> None:
    with pytest.raises(ValueError, match="'nobody'"):
        draw_volume(task._replace(volume="nobody"))


def test_the_page_stays_small(task) -> None:
    assert len(draw_volume(task).jpeg) < 250_000


def test_damage_is_an_error_and_no_picture(task, tmp_path) -> None:
    for file in task.shard.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / task.shard.name
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="damaged"):
        draw_volume(PictureTask(path, "p"))
