from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.networks.encoder import save_encoder
from common.reports.ct_tokens import (
    encode,
    open_encoder,
    overlay,
    read_images,
    show_slice,
    slices_to_show,
    spread_slices,
)


def test_slices_are_cropped_and_shown_the_radiological_way(ct_path: Path) -> None:
    images = read_images(ct_path, 32)
    assert images.name == "scan_1"
    assert images.hu.shape == (9, 1, 32, 32)
    np.testing.assert_allclose(images.z_mm, np.arange(9) * 2.5)
    bright = (images.hu[4, 0] > 700).nonzero().float().mean(0)
    assert bright[0] < 16
    assert bright[1] < 16  # the patient's right is on the left
    assert images.box[2] < 60


def test_tokens_lie_upright_whatever_the_encoder_was_shown(
    ct_path: Path, bundle: Path, small_json: Path
) -> None:
    encoder = open_encoder(bundle, "random", [small_json], 32)
    assert (encoder.grid, encoder.name) == (4, "dale_ct_2s")
    hu = read_images(ct_path, 32).hu
    upright = encode(encoder, hu)
    assert upright.cls.shape == (9, 24)
    assert upright.patches.shape == (9, 4, 4, 24)
    turned = encode(encoder._replace(slice_axes="xy"), hu.mT)
    torch.testing.assert_close(turned.cls, upright.cls)
    torch.testing.assert_close(turned.patches.transpose(1, 2), upright.patches)


def test_pictures_show_an_encoder_the_slices_that_its_weights_state(
    tmp_path: Path, bundle: Path, small_json: Path
) -> None:
    encoder = open_encoder(bundle, "random", [small_json], 32)
    assert encoder.slice_axes == "yx"
    identity = {"slice_axes": "xy", "hu_window": [-940.8, 923.1, -25.03, 246.87]}
    save_encoder(encoder.network.state_dict(), tmp_path / "model.safetensors", identity)
    stated = open_encoder(bundle, tmp_path / "model.safetensors", [small_json], 32)
    assert stated.slice_axes == "xy"
    assert stated.window == (-940.8, 923.1, -25.03, 246.87)


def test_weights_bundle_and_size_are_checked(
    tmp_path: Path, bundle: Path, small_json: Path, ct_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"bundle must hold configs/inference.json, got none in"):
        open_encoder(tmp_path)
    with pytest.raises(ValueError, match="size_px must be a multiple of patch_size_px, got 30 and 8"):
        open_encoder(bundle, "random", [small_json], 30)
    assert open_encoder(bundle, "random", [small_json]).size_px == 256
    ct_path.with_name("scan_2.nii.gz").write_bytes(ct_path.read_bytes())
    with pytest.raises(ValueError, match=r"ct must be one volume, got 2 in .*scan_1"):
        read_images(ct_path.parent, 32)


def test_spread_slices_keep_off_the_ends() -> None:
    assert spread_slices(9, 3) == [1, 4, 7]
    assert spread_slices(2, 5) == [0, 1]


def test_slices_asked_for_must_be_there() -> None:
    assert slices_to_show([3, 0], 4, 2) == [3, 0]
    assert slices_to_show(None, 9, 3) == slices_to_show([], 9, 3) == [1, 4, 7]
    for place in (-1, 4):
        with pytest.raises(ValueError, match=rf"slices must be 0 to 3 in this scan, got {place}\."):
            slices_to_show([0, place], 4, 2)


def test_overlay_covers_the_slice() -> None:
    axes = Figure().subplots()
    show_slice(axes, torch.zeros(1, 32, 32), "title")
    overlay(axes, np.zeros((4, 4)), 32)
    slice_image, cells = axes.get_images()
    assert cells.get_extent() == slice_image.get_extent()
    assert axes.get_title() == "title"
