import numpy as np
import pytest
import torch
from torch.nn import functional

from common.transforms.dense_labels import patch_bits, patch_shares, slice_shares
from common.transforms.slice_strategies import SliceStrategy, body_box, pad_to_square


def plain_shares(ids: np.ndarray, box: tuple[int, int, int], grid: int, num_classes: int) -> np.ndarray:
    """Look at every pixel of the crop, grid * grid times as fine, in float64."""
    top, left, side = box
    fine = ids[:, top : top + side, left : left + side].repeat(grid, 1).repeat(grid, 2)
    cells = fine.reshape(len(ids), grid, side, grid, side).transpose(0, 1, 3, 2, 4).reshape(-1, side * side)
    return (cells[..., None] == np.arange(num_classes)).mean(1)


@pytest.fixture
def blobs() -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, 7, (37, 6, 6)).astype(np.uint8).repeat(5, 1).repeat(5, 2)[:, 1:, :-1]


@pytest.mark.parametrize(("box", "grid"), [((2, 5, 23), 4), ((0, 0, 29), 7), ((3, 1, 12), 3), ((4, 6, 2), 5)])
def test_shares_are_those_of_every_pixel(blobs: np.ndarray, box: tuple[int, int, int], grid: int) -> None:
    shares = patch_shares(blobs, box, grid, num_classes=9)
    expected = plain_shares(blobs, box, grid, 9)
    assert shares.shape == expected.shape
    np.testing.assert_allclose(shares.toarray(), expected, atol=1e-7)
    np.testing.assert_allclose(
        slice_shares(shares, grid * grid), expected.reshape(37, grid * grid, 9).mean(1), atol=1e-7
    )


def test_findings_are_those_of_every_pixel(blobs: np.ndarray) -> None:
    bits = np.where(blobs > 2, 1 << blobs.astype(np.uint16), 0).astype(np.uint16)
    bits[5:9] = 0
    found = patch_bits(bits, (2, 5, 23), 4)
    expected = plain_shares(blobs, (2, 5, 23), 4, 9).reshape(37, 16, 9) > 0
    expected[5:9] = False
    for k in range(9):
        assert ((found >> k & 1) == (expected[..., k] & (k > 2))).all()


def organ_scan(top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
    """A body off the middle of a slice that is not square, and in it an organ of 900 HU."""
    hu = np.full((3, 150, 190), -1000.0)
    hu[:, 20:140, 50:170] = 0
    ids = np.zeros((3, 150, 190), np.uint8)
    hu[1, top : top + 22, left : left + 30] = 900
    ids[1, top : top + 22, left : left + 30] = 5
    return hu, ids


@pytest.mark.parametrize(("top", "left"), [(30, 60), (30, 130), (100, 60), (71, 97)])
def test_labels_follow_an_organ_through_the_crop_of_the_image(top: int, left: int) -> None:
    hu, ids = organ_scan(top, left)
    padded = torch.from_numpy(np.pad(hu, ((0, 0), (20, 20), (0, 0)), constant_values=-1000))
    box = body_box(padded)
    strategy = SliceStrategy("cropped_96", 8)
    image = strategy(strategy.region(padded, box))
    shares = patch_shares(pad_to_square(ids, 0), box, 12, 6).toarray().reshape(3, 12, 12, 6)[..., 5]
    # the organ is 900 HU in a body of 0, so that the mean HU of a patch says how much of it the organ is
    shown = functional.avg_pool2d(image, 8)[:, 0].numpy() / 900
    inside = shown > -0.01
    np.testing.assert_allclose(shares[inside], shown[inside], atol=0.04)
    assert shares[1].sum() == pytest.approx(22 * 30 / (box[2] / 12) ** 2, rel=1e-5)
    assert not shares[0].any()
    # without the crop, as upstream has it, the labels lie elsewhere
    uncropped = (
        patch_shares(pad_to_square(ids, 0), (0, 0, 190), 12, 6).toarray().reshape(3, 12, 12, 6)[..., 5]
    )
    assert np.abs(uncropped[1] - shares[1]).max() > 0.5


def test_bad_input_is_refused() -> None:
    ids = np.zeros((1, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"mask must have shape \(S, H, H\), got \(1, 8, 7\). Pad slices"):
        patch_shares(ids[:, :, :7], (0, 0, 4), 2, 3)
    with pytest.raises(ValueError, match=r"box must lie in slices of 8 pixels, got \(3, 0, 6\)"):
        patch_bits(ids.astype(np.uint16), (3, 0, 6), 2)
    with pytest.raises(ValueError, match="grid must be positive, got 0"):
        patch_shares(ids, (0, 0, 4), 0, 3)
    ids[0, 2, 2] = 9
    with pytest.raises(ValueError, match="ids must be 0 to 8, got 0 to 9"):
        patch_shares(ids, (0, 0, 8), 2, 9)
