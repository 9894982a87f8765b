"""What a row shows of a patch is what its token says, in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.reports.ct_tokens import read_images
from common.reports.patch_rows import (
    attention_row,
    components_row,
    draw_labels,
    label_colours,
    likeness_row,
    probability_rows,
    probe_of,
)
from common.reports.slice_grid import class_colours
from common.run.process import write_figure
from common.transforms.dense_labels import patch_shares

pytestmark = pytest.mark.usefixtures("any_values")

BODY = torch.zeros(5, 1, 8, 8)


def test_components_are_the_three_main_ones_as_colours() -> None:
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 9, generator=rng, dtype=torch.float64))[0]
    places = torch.rand(5, 4, 4, 3, generator=rng, dtype=torch.float64) ** 3 * torch.tensor([9.0, 3.0, 1.0])
    colours = components_row(BODY, places @ basis[:3] + 7).values
    for channel in range(3):
        correlation = np.corrcoef(colours[..., channel].ravel(), places[..., channel].numpy().ravel())[0, 1]
        assert correlation > 0.9
    assert (colours[..., :3].min(), colours[..., :3].max()) == (0, 1)


def test_air_has_no_colour_and_does_not_change_that_of_others() -> None:
    tokens = torch.randn(5, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    hu = BODY.clone()
    hu[2, :, :4, :2] = -1000  # two patches
    before = components_row(hu, tokens).values
    tokens[2, :2, 0] = 100
    after = components_row(hu, tokens).values
    assert (after[..., 3] == 0).sum() == 2
    assert after[2, 1, 0, 3] == 0
    np.testing.assert_allclose(after[after[..., 3] > 0], before[after[..., 3] > 0])
    assert np.isfinite(components_row(hu - 1000, tokens).values).all()  # nothing but air


def test_attention_is_the_mean_of_heads_and_shows_from_an_even_share() -> None:
    heads = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(2)) ** 8
    heads /= heads.sum((2, 3), keepdim=True)
    row = attention_row(BODY, heads)
    mean = heads.double().mean(1).numpy()
    np.testing.assert_allclose(row.values, 100 * mean, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(row.opacity) > 0, mean > 1 / 16)
    assert row.limits == pytest.approx((100 / 16, 100 * np.quantile(mean, 0.99)))


def test_likeness_is_the_cosine_to_the_marked_patch_of_the_same_slice() -> None:
    patches = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    row = likeness_row(BODY[:2], patches, (1, 2))
    one, other = patches[1, 1, 2].numpy(), patches[1, 2, 0].numpy()
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert row.values[1, 2, 0] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(row.values[:, 1, 2], 1, rtol=1e-6)
    assert row.mark == (1, 2)
    assert likeness_row(BODY[:2], patches).mark == (1, 1)
    with pytest.raises(ValueError, match=r"patch .* 3 x 3, got \(3, 0\)"):
        likeness_row(BODY[:2], patches, (3, 0))


def test_probabilities_are_those_of_the_task_that_knows_the_classes(probes: Path) -> None:
    layer, places = probe_of(probes, ["heart", "liver"], "dale_ct_2s")
    assert (len(layer.bias), places) == (118, [51, 5])
    assert len(probe_of(probes, ["Emphysema"], "dale_ct_2s")[0].bias) == 14
    patches = torch.randn(2, 3, 3, 24)
    rows = probability_rows(BODY[:2], patches, layer=layer, places=places, names=["heart", "liver"])
    logit = (patches[1, 2, 0] @ layer.weight[51] + layer.bias[51]).item()
    assert float(rows[0].values[1, 2, 0]) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    assert [row.label for row in rows] == ["heart", "liver"]
    assert rows[1].limits == (0, float(rows[1].values.max()))
    with pytest.raises(ValueError, match=r"names .* got \['Emphysema', 'liver'\]"):
        probe_of(probes, ["Emphysema", "liver"], "dale_ct_2s")
    with pytest.raises(ValueError, match="'dale_ct_2s', not on 'dale_ct_0'"):
        probe_of(probes, ["liver"], "dale_ct_0")


def test_labelled_patches_have_the_colour_of_their_largest_class() -> None:
    colours = label_colours(np.array([[[0.2, 0.6], [0.9, 0.1]]]))
    np.testing.assert_allclose(colours[0, 0, :3], class_colours(2)[1])
    np.testing.assert_allclose(colours[0, 1, :3], class_colours(2)[0])
    assert colours[0, 1, 3] == pytest.approx(0.65 * 0.9)


def test_label_and_outline_lie_where_the_ct_is_bright(ct_path: Path, tmp_path: Path) -> None:
    images = read_images(ct_path, 64).some([4])
    mask = np.zeros((1, 60, 60), np.uint8)
    # canonical and padded: columns to the left as stored in reverse, rows to the back
    mask[0, 13:21, 12:22] = 5
    shares = patch_shares(mask, images.box, 8, 6).toarray().reshape(1, 8, 8, 6)[..., 5:]
    figure = draw_labels(images, [("ours", shares)], mask, [(5, "liver")])
    write_figure(tmp_path / "a.png", figure)
    axes = figure.axes[0]
    bright = np.argwhere(images.hu[0, 0].numpy() > 700)[:, ::-1]
    outline = axes.collections[-1].get_paths()[0].vertices
    np.testing.assert_allclose(outline.min(0), bright.min(0), atol=1.5)
    np.testing.assert_allclose(outline.max(0), bright.max(0), atol=1.5)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), float)
    red = np.argwhere((pixels[..., 0] > pixels[..., 1] + 60) & (pixels[..., 0] > pixels[..., 2] + 60))
    red = red[red[:, 0] < len(pixels) - 60]  # above the legend
    box, scale = axes.get_window_extent(), len(pixels) / figure.bbox.height
    shown = (red[:, ::-1] - (box.x0 * scale, len(pixels) - box.y1 * scale)) * 64 / (box.width * scale)
    assert len(shown) > 500
    assert (shown > bright.min(0) - 8).all()  # a patch beyond it at most
    assert (shown < bright.max(0) + 8).all()
