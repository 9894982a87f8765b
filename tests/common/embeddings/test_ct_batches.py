"""Batches hold every slice of every volume once, in order, whatever the batch size and the threads."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Orientationd

from common.ct.rejection import RejectedError
from common.embeddings import ct_batches
from common.embeddings.ct_batches import SliceBatches, VolumeBatches, lps_volume
from common.embeddings.work import CTSlices, CTSource
from common.transforms.hounsfield import hu_window, normalize_hu
from common.transforms.slice_strategies import SliceStrategy, body_box

WINDOW = hu_window("ct_rate")
LENGTHS = {"a": 3, "b": 7, "c": 1, "d": 4}


def hu_of(volume: str, side: int = 48) -> np.ndarray:
    rng = np.random.default_rng(ord(volume))
    hu = np.full((LENGTHS[volume], side, side), -1000, np.int16)
    first = ord(volume) % 7
    hu[:, first : first + 36, 4:40] = rng.integers(-100, 300, (LENGTHS[volume], 36, 36))
    return hu


def work_of(*names: str, volumes: str = "abcd", side: int = 48) -> list[CTSource]:
    def read(volume: str) -> CTSlices:
        return CTSlices(hu_of(volume, side), (0.7, 0.7, 2.0), f"sum of {volume}")

    return [CTSource(volume, partial(read, volume), names) for volume in volumes]


def noted(work: list[CTSource]) -> tuple[list[CTSource], list[str]]:
    """The same work, and a list that grows by a name with each reading."""
    names: list[str] = []

    def read(source: CTSource) -> CTSlices:
        names.append(source.volume)
        return source.read()

    return [source._replace(read=partial(read, source)) for source in work], names


def failing(source: CTSource, error: Exception) -> CTSource:
    def read() -> CTSlices:
        raise error

    return source._replace(read=read)


def batches_of(work: list[CTSource], **changes: Any) -> SliceBatches:
    names = dict.fromkeys(name for source in work for name in source.stores)
    defaults = {"strategies": [SliceStrategy(name, 16) for name in names], "window": WINDOW}
    defaults |= {"slice_axes": "yx", "slices_per_batch": 4, "num_workers": 0, "padded": False}
    return SliceBatches(work=work, **defaults | {"device": torch.device("cpu")} | changes)


def volume_batches(work: list[CTSource], num_workers: int) -> VolumeBatches:
    return VolumeBatches(work, lambda item: {"image": item["image"] + 1}, "LPS", num_workers)


def images_of(batches: SliceBatches) -> dict[tuple[str, str], torch.Tensor]:
    """Images by volume and strategy, after checking that pieces follow one another."""
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for batch in batches:
        start = 0
        for piece in batch["pieces"]:
            images = found.setdefault((piece.task.volume, piece.task.store), [])
            assert piece.first == sum(map(len, images))
            images.append(batch["image"][start : start + piece.num_images])
            start += piece.num_images
    return {key: torch.cat(images) for key, images in found.items()}


@pytest.mark.parametrize("slices_per_batch", [1, 4, 5, 100])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_slice_comes_once_and_in_order(slices_per_batch: int, num_workers: int) -> None:
    work = work_of("cropped_32")
    images = images_of(batches_of(work, slices_per_batch=slices_per_batch, num_workers=num_workers))
    assert [volume for volume, _ in images] == list("abcd")
    for volume in "abcd":
        hu = torch.from_numpy(hu_of(volume))
        top, left, side = body_box(hu)
        shown = SliceStrategy("cropped_32", 16)(hu[:, top : top + side, left : left + side])
        torch.testing.assert_close(images[volume, "cropped_32"], normalize_hu(shown, WINDOW))


def test_batches_are_filled_across_volumes() -> None:
    batches = list(batches_of(work_of("raw_32")))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4, 3]
    volumes = ["".join(piece.task.volume for piece in batch["pieces"]) for batch in batches]
    assert volumes == ["ab", "b", "bcd", "d"]
    assert all(batch["is_fixed"] for batch in batches)


def test_a_compiled_encoder_is_given_one_shape() -> None:
    batches = list(batches_of(work_of("raw_32"), padded=True))
    assert {tuple(batch["image"].shape) for batch in batches} == {(4, 1, 32, 32)}
    assert sum(piece.num_images for piece in batches[-1]["pieces"]) == 3
    assert bool((batches[-1]["image"][3:] == 0).all())


def test_strategies_share_one_read_and_one_box(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("raw_32", "cropped_32", "cropped_full", "tiled_5cut")
    work, reads = noted(work_of(*names, volumes="ab"))
    boxes = []
    monkeypatch.setattr(ct_batches, "body_box", lambda hu: (boxes.append(1), body_box(hu))[1])
    batches = list(batches_of(work, slices_per_batch=10))
    assert reads == ["a", "b"]
    assert len(boxes) == 2
    tasks = {piece.task.store: piece.task for batch in batches for piece in batch["pieces"]}
    assert {name for name, task in tasks.items() if "box" in task.metadata} == {*names} - {"raw_32"}
    assert {key: tuple(tensor.shape) for key, tensor in images_of(batches).items() if key[0] == "b"} == {
        ("b", "raw_32"): (7, 1, 32, 32),
        ("b", "cropped_32"): (7, 1, 32, 32),
        ("b", "cropped_full"): (7, 1, 32, 32),
        ("b", "tiled_5cut"): (35, 1, 256, 256),
    }


def test_a_strategy_that_has_a_volume_already_gets_none_of_its_images() -> None:
    first, second = work_of("raw_32", "raw_48", volumes="ab")
    images = images_of(batches_of([first, second._replace(stores=("raw_48",))]))
    assert sorted(images) == [("a", "raw_32"), ("a", "raw_48"), ("b", "raw_48")]


def test_no_box_is_looked_for_where_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct_batches, "body_box", None)
    task = next(iter(batches_of(work_of("raw_32"))))["pieces"][0].task
    assert task.metadata == {"slice_axes": "yx", "side_px": 48, "sha256": "sum of a"}
    assert task.spacing_mm == (0.7, 0.7, 2.0)


def test_images_of_another_side_start_a_batch() -> None:
    work = [*work_of("raw_full", volumes="a"), *work_of("raw_full", volumes="d", side=64)]
    work += work_of("raw_full", volumes="b")
    batches = list(batches_of(work, slices_per_batch=5, padded=True))
    sides = [(len(batch["image"]), batch["image"].shape[-1]) for batch in batches]
    assert sides == [(3, 48), (4, 64), (5, 48), (2, 48)]
    assert not any(batch["is_fixed"] for batch in batches)


def test_xy_transposes_each_slice() -> None:
    work = work_of("cropped_32", volumes="b")
    yx, xy = (images_of(batches_of(work, slice_axes=axes))["b", "cropped_32"] for axes in ("yx", "xy"))
    torch.testing.assert_close(xy, yx.transpose(2, 3))
    assert not torch.equal(xy, yx)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", [batches_of, volume_batches], ids=["slices", "volumes"])
def test_a_bad_volume_is_passed_over_and_an_error_of_the_program_is_not_one(
    make: Any, num_workers: int
) -> None:
    work = work_of("raw_32")
    work[1] = failing(work[1], RejectedError("geometry", "tilted"))
    work[2] = failing(work[2], OSError("no such file"))
    batches = make(work, num_workers=num_workers)
    found = {piece.task.volume for batch in batches for piece in batch["pieces"]}
    assert found == {"a", "d"}
    assert [(item.volume, item.reason, item.detail) for item in batches.rejected] == [
        ("b", "geometry", "tilted"),
        ("c", "unreadable", "no such file"),
    ]
    with pytest.raises(AttributeError, match="oops"):
        list(make([failing(work[0], AttributeError("oops"))], num_workers=num_workers))


@pytest.mark.parametrize("make", [batches_of, volume_batches], ids=["slices", "volumes"])
def test_no_more_is_read_ahead_than_memory_is_allowed(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(ct_batches, "DECODED_BYTES", 1)
    work, started = noted(work_of("raw_32"))
    batches = iter(make(work, num_workers=1))
    next(batches)
    assert len(started) <= 2  # the one that is shown, and one beside it
    assert sum(1 for _ in batches) == 3
    assert started == list("abcd")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"slice_axes .*\('yx', 'xy'\), got 'zy'"):
        batches_of([], slice_axes="zy")
    with pytest.raises(ValueError, match="slices_per_batch .* 5 images of .*'tiled_5cut', got 4"):
        batches_of(work_of("tiled_5cut"))


def test_ct_is_lps_with_its_spacing():
    hu = np.random.default_rng(0).integers(-1000, 1000, (7, 5, 5)).astype(np.int16)
    volume = lps_volume(CTSlices(hu, (0.7, 0.8, 1.5)))
    assert volume.dtype == torch.float32
    assert volume.shape == (1, 5, 5, 7)
    assert volume.pixdim.tolist() == pytest.approx([0.7, 0.8, 1.5])
    for z, y, x in ((0, 0, 0), (6, 1, 3), (2, 4, 0)):
        assert float(volume[0, x, y, z]) == hu[z, y, x]
    # canonical slices run feet to head, front to back, right to left: seen from RAS, two axes turn
    ras = Orientationd("image", axcodes="RAS")({"image": volume})["image"]
    np.testing.assert_array_equal(ras[0].numpy(), hu.transpose(2, 1, 0)[::-1, ::-1])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_volumes_come_in_order_transformed_and_with_what_is_known_of_them(num_workers):
    given = list(volume_batches(work_of("grid"), num_workers))
    for batch, volume in zip(given, "abcd", strict=True):
        ((task, first, num_images),) = batch["pieces"]
        assert (task.volume, task.store, first, num_images, task.num_images) == (volume, "grid", 0, 1, 1)
        assert task.metadata == {"axcodes": "LPS", "sha256": f"sum of {volume}"}
        assert task.spacing_mm == (0.7, 0.7, 2.0)
        expected = hu_of(volume).transpose(2, 1, 0)[None, None] + 1
        np.testing.assert_array_equal(batch["image"].numpy(), expected)
