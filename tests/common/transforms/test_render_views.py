"""Views of a batch are those of a loop over float64 crops, resizes and augmentations."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.transforms.hounsfield import HU_WINDOWS, normalize_hu
from common.transforms.multi_crop import RandSlabMultiCrop
from common.transforms.render_views import (
    count_labels,
    cut_views,
    photometric,
    render_at_once,
    render_by_sample,
    render_views,
    resize_square,
    resize_squares,
    triangle_filters,
)
from common.transforms.view_batch import LABEL_FIELDS, VIEW_FIELDS, on_device
from tests.common.conftest import multi_crop

WINDOW = HU_WINDOWS["ct_rate"]
TO_HU = torch.tensor(WINDOW.std_hu)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(-1024, 3072, shape).astype(np.int16)


def organs(slices: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 118, (slices, 9, 8)).astype(np.uint8)
    return coarse.repeat(15, 1).repeat(16, 2)[:, :128]


def findings(slices: int) -> np.ndarray:
    rex = np.zeros((slices, 128, 128), np.uint16)
    rex[slices // 2, 40:60, 70:85] = 1 << 13
    rex[slices // 2, 50:70, 60:75] |= 1 << 2
    return rex


@pytest.fixture
def batch_of(slabs_of):
    """Return a batch of three slabs, of slices of different sizes, and the slabs' HU."""

    def batch(crop: RandSlabMultiCrop, **changes) -> tuple[dict, list[np.ndarray]]:
        hu = [noise(5, 97, 131), noise(7, 64, 60), noise(1, 150, 150)]
        masks = [{"ts": organs(5), "rex": findings(5)}, {"ts": organs(7)}, {}]
        slabs = slabs_of([{"hu": h, **m} for h, m in zip(hu, masks, strict=True)], crop, **changes)
        found = slabs.collate([slabs[place] for place in range(3)])
        order = [int(name.split("_")[1]) for name in found["volume"]]
        return found, [hu[number] for number in order]

    return batch


def view_by_hand(
    hu: np.ndarray, box: list[int], flip: bool, gamma: float, sigma: float, size: int
) -> torch.Tensor:
    """Float64: crop, antialiased resize, mirror, clip, gamma, 3 x 3 Gaussian, z-score."""
    z, top, left, side = box
    crop = torch.from_numpy(hu[z, top : top + side, left : left + side].astype(np.float64))
    view = functional.interpolate(crop[None, None], (size, size), mode="bilinear", antialias=True)
    view = view.flip(-1) if flip else view
    low, high, mean, std = WINDOW
    unit = ((view.clamp(low, high) - low) / (high - low)) ** gamma
    if sigma > 0:
        weights = torch.exp(-torch.tensor([1.0, 0, 1]).double() / (2 * sigma**2))
        kernel = torch.outer(weights, weights)
        padded = functional.pad(unit, (1, 1, 1, 1), mode="reflect")
        unit = functional.conv2d(padded, (kernel / kernel.sum())[None, None])
    return (unit[0] * (high - low) + low - mean) / std


@pytest.mark.parametrize("render", [render_by_sample, render_at_once])
@pytest.mark.parametrize(("sizes", "patch"), [((64, 24), 8), ((35, 14), 7)])
def test_views_equal_a_float64_loop_over_crops(batch_of, render, sizes, patch):
    crop = multi_crop(*sizes, patch, flip_prob=0.5, blur_probs=(1, 0.5))
    batch, hu = batch_of(crop)
    rendered = [render(views, WINDOW) for views in cut_views(batch)]
    assert [tuple(views.shape) for views in rendered] == [
        (3, 2, 1, sizes[0], sizes[0]),
        (3, 8, 1, sizes[1], sizes[1]),
    ]
    assert 0 < batch["flips"].sum() < batch["flips"].numel()
    for sample in range(3):
        for view in range(10):
            group, place = (0, view) if view < 2 else (1, view - 2)
            numbers = (batch[name][sample, view].item() for name in ("flips", "gamma", "blur_sigma"))
            expected = view_by_hand(hu[sample], batch["boxes"][sample, view].tolist(), *numbers, sizes[group])
            found = rendered[group][sample, place]
            assert found.dtype == torch.float32
            assert ((found - expected).abs() * TO_HU).max() < 5e-3  # HU


def test_the_cpu_renders_sample_by_sample(batch_of):
    batch, _ = batch_of(multi_crop(32, 16, 8))
    expected = [render_by_sample(views, WINDOW) for views in cut_views(batch)]
    assert all(map(torch.equal, render_views(batch, WINDOW), expected))


@pytest.mark.gpu
def test_views_and_labels_on_the_gpu_are_those_on_the_cpu_and_nothing_waits_for_it(batch_of):
    batch, _ = batch_of(multi_crop(64, 24, 8, flip_prob=0.5))
    on_gpu = {name: part.cuda() if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = render_views(on_gpu, WINDOW)
        labels = count_labels(on_gpu, "presence")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, expected in zip(views, render_views(batch, WINDOW), strict=True):
        torch.testing.assert_close(found.cpu(), expected, atol=2e-5, rtol=0)
    for group, terms in count_labels(batch, "presence").items():
        for term, expected in terms.items():
            assert torch.equal(labels[group][term].cpu(), expected)


def test_the_same_slab_gives_the_same_views_whatever_is_beside_it(batch_of):
    crop = multi_crop(32, 16, 8)
    batch, _ = batch_of(crop)
    again, _ = batch_of(crop)
    assert all(map(torch.equal, render_views(batch, WINDOW), render_views(again, WINDOW)))
    other, _ = batch_of(crop, seed=1)
    assert not torch.equal(render_views(batch, WINDOW)[0], render_views(other, WINDOW)[0])


@pytest.mark.parametrize(("rex_targets", "pool"), [("presence", "max"), ("fraction", "avg")])
def test_labels_are_those_of_the_masks_under_the_views(batch_of, rex_targets, pool):
    batch, _ = batch_of(multi_crop(32, 16, 8, flip_prob=0.5))
    masks = {"train_0_a_1": (organs(5), findings(5)), "train_1_a_1": (organs(7), None)}
    labels = count_labels(batch, rex_targets)
    seen = 0
    for sample, volume in enumerate(batch["volume"]):
        planes = masks.get(volume, (None, None))
        for view in range(10):
            group, place, size = ("global", view, 32) if view < 2 else ("local", view - 2, 16)
            box, flip = batch["boxes"][sample, view].tolist(), bool(batch["flips"][sample, view])
            shape = batch["shape"][sample].tolist()
            under = [mask_by_hand(mask, box, flip, shape, size) for mask in planes]
            shares = functional.one_hot(under[0], 118).movedim(-1, 0).float()
            bits = torch.stack([(under[1] >> k) & 1 for k in range(14)]).float()
            seen += int(bits.any())
            found = {term: labels[group][term][sample, place] for term in labels[group]}
            pooled = functional.avg_pool2d(shares, 8).flatten(1).T
            assert torch.equal(found["ts_patch"], pooled)
            torch.testing.assert_close(found["ts_cls"], pooled.mean(0))
            pooled = getattr(functional, f"{pool}_pool2d")(bits, 8).flatten(1).T
            assert torch.equal(found["rex_patch"], pooled)
            torch.testing.assert_close(found["rex_cls"], pooled.amax(0) if pool == "max" else pooled.mean(0))
    assert seen > 3


def mask_by_hand(
    mask: np.ndarray | None, box: list[int], flip: bool, shape: list[int], size: int
) -> torch.Tensor:
    """The mask enlarged to the slice, cropped, resized and mirrored."""
    if mask is None:
        return torch.zeros(size, size, dtype=torch.long)
    z, top, left, side = box
    enlarged = nearest(mask[z].astype(np.int64), *shape)
    view = nearest(enlarged[top : top + side, left : left + side], size, size)
    return torch.from_numpy(view[:, ::-1].copy() if flip else view)


def nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = (
        [((2 * i + 1) * length) // (2 * size) for i in range(size)]
        for length, size in zip(image.shape, (height, width), strict=True)
    )
    return image[np.ix_(rows, columns)]


def test_labels_lie_on_the_anatomy_they_were_drawn_on(slabs_of):
    """The share of bright pixels in a patch is that of the organ, mirrored or not."""
    ts = np.zeros((1, 128, 128), np.uint8)
    ts[0, 36:80, 44:92] = 51
    crop = multi_crop(64, 32, 8, flip_prob=0.5, gamma_prob=0, blur_probs=(0, 0))
    slabs = slabs_of([{"hu": np.where(ts > 0, 800, -900).astype(np.int16), "ts": ts}], crop)
    for place in range(5):
        batch = slabs.collate([slabs[place]])
        labels = count_labels(batch, "presence")
        for group, views in zip(("global", "local"), render_views(batch, WINDOW), strict=True):
            bright = (views * WINDOW.std_hu + WINDOW.mean_hu > -50).float()[0]
            shares = functional.avg_pool2d(bright, 8).flatten(1)
            assert (shares - labels[group]["ts_patch"][0, :, :, 51]).abs().mean() < 0.03


def test_a_ct_keeps_its_range(slabs_of):
    """A 512 x 512 slab of air, lung, tissue and metal: nothing overshoots the window's ends."""
    slices = np.full((8, 512, 512), -1024, np.int16)
    slices[:, 100:400, 60:450] = 40
    slices[:, 150:300, 100:200] = -870
    slices[:, 200:204, 300:304] = 3071
    slabs = slabs_of([{"hu": slices}], multi_crop(256, 144, 16))
    for views in render_views(slabs.collate([slabs[0]]), WINDOW):
        hu = views * WINDOW.std_hu + WINDOW.mean_hu
        assert WINDOW.min_hu - 0.01 <= hu.min() < -990
        assert 30 < hu.max() <= WINDOW.max_hu + 0.01


@pytest.mark.parametrize("rex_targets", ["presence", "fraction"])
def test_a_gpu_is_asked_for_no_value(batch_of, fake_gpu, rex_targets):
    batch, _ = batch_of(multi_crop(16, 8, 8, num_local=3), with_masks=True)
    with fake_gpu.mode:
        given = fake_gpu.given(batch)
        moved = on_device(given, VIEW_FIELDS + LABEL_FIELDS, fake_gpu.device)
        views = render_views(moved, WINDOW)
        labels = count_labels(moved, rex_targets)
    assert [tuple(view.shape) for view in views] == [(3, 2, 1, 16, 16), (3, 3, 1, 8, 8)]
    results = [*views, *(of_term for of_group in labels.values() for of_term in of_group.values())]
    assert {result.device.type for result in results} == {"cuda"}
    fields = {name for name, value in moved.items() if value is not given[name]}
    assert fields == {*VIEW_FIELDS, *LABEL_FIELDS}


def drawn(batch: int = 2, views: int = 3, size: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hu = torch.randint(-1024, 3072, (batch, views, size, size), generator=generator).to(torch.int16)
    gamma = 0.9 + 0.2 * torch.rand(batch, views, generator=generator)
    sigma = 0.1 + 1.9 * torch.rand(batch, views, generator=generator)
    sigma[0, 1] = 0
    gamma[1, 0] = 1
    return hu, gamma, sigma


def test_gamma_1_and_sigma_0_are_plain_normalisation():
    hu, gamma, sigma = drawn()
    out = photometric(hu, torch.ones_like(gamma), torch.zeros_like(sigma), WINDOW)
    torch.testing.assert_close(out.squeeze(2), normalize_hu(hu, WINDOW), atol=2e-6, rtol=0)


def test_gamma_works_on_unit_intensities_and_keeps_black_and_white():
    low, high, mean, std = WINDOW
    middle = (low + high) / 2
    hu = torch.tensor([low - 20, middle, high + 20]).repeat(3, 1)[None, None]
    out = photometric(hu, torch.tensor([[2.0]]), torch.zeros(1, 1), WINDOW)[0, 0, 0, 0] * std + mean
    torch.testing.assert_close(out, torch.tensor([low, low + (high - low) / 4, high]), atol=1e-3, rtol=0)


def test_blur_keeps_a_constant_and_the_mean_of_a_far_off_spot():
    hu = torch.full((1, 1, 11, 11), -500, dtype=torch.int16)
    gamma, sigma = torch.ones(1, 1), torch.full((1, 1), 1.3)
    torch.testing.assert_close(
        photometric(hu, gamma, sigma, WINDOW).squeeze(2), normalize_hu(hu, WINDOW), atol=2e-6, rtol=0
    )
    hu[0, 0, 5, 5] = 300
    blurred, sharp = photometric(hu, gamma, sigma, WINDOW).squeeze(2), normalize_hu(hu, WINDOW)
    torch.testing.assert_close(blurred.mean(), sharp.mean())
    assert blurred.std() < sharp.std()


@pytest.mark.parametrize("name", ["gamma", "blur_sigma"])
def test_numbers_for_other_views_are_refused(name):
    hu, gamma, sigma = drawn()
    numbers = {"gamma": gamma, "blur_sigma": sigma}
    numbers[name] = numbers[name][:, :2]
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \(B, V\) .* got \(2, 2\) for \(2, 3, 7, 7\)"
    ):
        photometric(hu, window=WINDOW, **numbers)
    with pytest.raises(ValueError, match=r"got \(2, 3\) for \(2, 3, 1, 7, 7\)"):
        photometric(hu[:, :, None], gamma, sigma, WINDOW)


@pytest.mark.parametrize(
    ("side", "size"), [(512, 256), (307, 256), (154, 144), (61, 144), (131, 140), (97, 97), (1, 5)]
)
def test_resize_equals_torch_antialiased_bilinear(side, size):
    crop = np.random.default_rng(side).integers(-1024, 3072, (side, side)).astype(np.int16)
    reference = functional.interpolate(
        torch.from_numpy(crop)[None, None].double(), (size, size), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(resize_square(crop, size), reference[0, 0].numpy(), atol=3e-3)


@pytest.mark.parametrize(("sides", "size"), [([97, 31, 64, 1, 130], 48), ([16, 5], 24)])
def test_crops_of_any_sides_are_resized_at_once_as_one_by_one(sides, size):
    rng = np.random.default_rng(0)
    crops = [rng.integers(-1024, 3072, (side, side)).astype(np.int16) for side in sides]
    pixels = torch.from_numpy(np.concatenate([crop.ravel() for crop in crops]))
    for largest in (max(sides), max(sides) + 7):
        resized = resize_squares(pixels, torch.tensor(sides), largest, size)
        for one, crop in zip(resized, crops, strict=True):
            reference = functional.interpolate(
                torch.from_numpy(crop)[None, None].double(), (size, size), mode="bilinear", antialias=True
            )
            np.testing.assert_allclose(one, reference[0, 0], atol=3e-3)
            np.testing.assert_allclose(one, resize_square(crop, size), atol=2e-3)


def test_weights_are_the_rounded_ratios_of_whole_numbers():
    """A filter that is computed in floating point misses some by more than the last bit."""
    filters = triangle_filters(torch.tensor([307, 1000]), 1024, 144)
    for weights, side in zip(filters, (307, 1000), strict=True):
        exact = np.array(
            [
                [max(2 * side - abs((2 * j + 1) * 144 - (2 * i + 1) * side), 0) for j in range(side)]
                for i in range(144)
            ],
            float,
        )
        expected = (exact / exact.sum(1, keepdims=True)).astype(np.float32)
        np.testing.assert_array_max_ulp(weights[:, :side].numpy(), expected, maxulp=1)
        assert not weights[:, side:].any()


def test_only_square_images_are_resized():
    with pytest.raises(ValueError, match=r"crop must be a square image, got shape \(3, 4\)"):
        resize_square(np.zeros((3, 4)), 2)
