"""Batches hold every slice of every volume once, in order, whatever the batch size and the threads."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Orientationd

from common.ct.rejection import RejectedError
from common.embeddings import ct_batches as slice_batches
from common.embeddings.ct_batches import SliceBatches, VolumeBatches, lps_volume, unembedded
from common.embeddings.store import EmbeddingStoreWriter
from common.embeddings.work import CTSlices, CTSource, Work
from common.transforms.hounsfield import hu_window, normalize_hu
from common.transforms.slice_strategies import SliceStrategy, body_box, slice_strategies

WINDOW = hu_window("ct_rate")
LENGTHS = {"a": 3, "b": 7, "c": 1, "d": 4}


def hu_of(volume: str, side: int = 48) -> np.ndarray:
    rng = np.random.default_rng(ord(volume))
    hu = np.full((LENGTHS[volume], side, side), -1000, np.int16)
    first = ord(volume) % 7
    hu[:, first : first + 36, 4:40] = rng.integers(-100, 300, (LENGTHS[volume], 36, 36))
    return hu


def work_of(strategies: list[SliceStrategy], volumes: str = "abcd", side: int = 48) -> list[Work]:
    sources = [
        CTSource(volume, lambda volume=volume: CTSlices(hu_of(volume, side), (0.7, 0.7, 2.0)))
        for volume in volumes
    ]
    return [Work(source, tuple(strategies)) for source in sources]


def noted(work: list[Work]) -> tuple[list[Work], list[str]]:
    """The same work, and a list that grows by a name with each reading."""
    names: list[str] = []

    def read(source: CTSource) -> CTSlices:
        names.append(source.volume)
        return source.read()

    return [Work(CTSource(w.source.volume, partial(read, w.source)), w.strategies) for w in work], names


def batches_of(work: list[Work], **changes: Any) -> SliceBatches:
    defaults = {"window": WINDOW, "slice_axes": "yx", "slices_per_batch": 4, "num_workers": 0}
    return SliceBatches(work, **defaults | {"device": torch.device("cpu"), "padded": False} | changes)


def images_of(batches: SliceBatches) -> dict[tuple[str, str], torch.Tensor]:
    """Images by volume and strategy, after checking that pieces follow one another."""
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for batch in batches:
        start = 0
        for piece in batch["pieces"]:
            own = found.setdefault((piece.task.volume, piece.task.strategy.name), [])
            assert piece.first == sum(map(len, own))
            own.append(batch["image"][start : start + piece.num_images])
            start += piece.num_images
    return {key: torch.cat(images) for key, images in found.items()}


@pytest.mark.parametrize("slices_per_batch", [1, 4, 5, 100])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_slice_comes_once_and_in_order(slices_per_batch: int, num_workers: int) -> None:
    (strategy,) = slice_strategies(["cropped_32"], 16)
    batches = batches_of(work_of([strategy]), slices_per_batch=slices_per_batch, num_workers=num_workers)
    images = images_of(batches)
    assert [volume for volume, _ in images] == list("abcd")
    for volume in "abcd":
        hu = torch.from_numpy(hu_of(volume))
        top, left, side = body_box(hu)
        expected = normalize_hu(strategy(hu[:, top : top + side, left : left + side]), WINDOW)
        torch.testing.assert_close(images[volume, "cropped_32"], expected)


def test_batches_are_filled_across_volumes() -> None:
    (strategy,) = slice_strategies(["raw_32"], 16)
    batches = list(batches_of(work_of([strategy])))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4, 3]
    assert [[piece.task.volume for piece in batch["pieces"]] for batch in batches] == [
        ["a", "b"],
        ["b"],
        ["b", "c", "d"],
        ["d"],
    ]
    assert all(batch["is_fixed"] for batch in batches)


def test_a_compiled_encoder_sees_one_shape() -> None:
    (strategy,) = slice_strategies(["raw_32"], 16)
    batches = list(batches_of(work_of([strategy]), padded=True))
    assert {tuple(batch["image"].shape) for batch in batches} == {(4, 1, 32, 32)}
    assert sum(piece.num_images for piece in batches[-1]["pieces"]) == 3
    assert bool((batches[-1]["image"][3:] == 0).all())


def test_strategies_share_one_read_and_one_box(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = slice_strategies(["raw_32", "cropped_32", "cropped_full", "tiled_5cut"], 16)
    work, reads = noted(work_of(strategies, "ab"))
    boxes = []
    monkeypatch.setattr(slice_batches, "body_box", lambda hu: (boxes.append(1), body_box(hu))[1])
    batches = list(batches_of(work, slices_per_batch=10))
    tasks = {piece.task.strategy.name: piece.task for batch in batches for piece in batch["pieces"]}
    assert {name: "box" in task.metadata for name, task in tasks.items()} == {
        name: name != "raw_32" for name in ("raw_32", "cropped_32", "cropped_full", "tiled_5cut")
    }
    images = images_of(batches)
    assert reads == ["a", "b"]
    assert len(boxes) == 2
    assert {key: tuple(tensor.shape) for key, tensor in images.items() if key[0] == "b"} == {
        ("b", "raw_32"): (7, 1, 32, 32),
        ("b", "cropped_32"): (7, 1, 32, 32),
        ("b", "cropped_full"): (7, 1, 32, 32),
        ("b", "tiled_5cut"): (35, 1, 256, 256),
    }


def test_no_box_is_looked_for_where_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_batches, "body_box", None)
    tasks = [
        piece.task
        for batch in batches_of(work_of(slice_strategies(["raw_32"], 16)))
        for piece in batch["pieces"]
    ]
    assert tasks[0].metadata == {"slice_axes": "yx", "side_px": 48}
    assert tasks[0].spacing_mm == (0.7, 0.7, 2.0)


def test_images_of_another_side_start_a_batch() -> None:
    (strategy,) = slice_strategies(["raw_full"], 16)
    work = [*work_of([strategy], "a"), *work_of([strategy], "d", side=64), *work_of([strategy], "b")]
    batches = list(batches_of(work, slices_per_batch=5, padded=True))
    assert [tuple(batch["image"].shape) for batch in batches] == [
        (3, 1, 48, 48),
        (4, 1, 64, 64),
        (5, 1, 48, 48),
        (2, 1, 48, 48),
    ]
    assert not any(batch["is_fixed"] for batch in batches)


def test_xy_transposes_each_slice() -> None:
    (strategy,) = slice_strategies(["cropped_32"], 16)
    yx, xy = (
        images_of(batches_of(work_of([strategy], "b"), slice_axes=axes))["b", "cropped_32"]
        for axes in ("yx", "xy")
    )
    torch.testing.assert_close(xy, yx.transpose(2, 3))
    assert not torch.equal(xy, yx)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_volume_is_passed_over(num_workers: int) -> None:
    (strategy,) = slice_strategies(["raw_32"], 16)
    work = work_of([strategy])
    errors = [RejectedError("geometry", "tilted"), OSError("no such file")]
    for place, error in ((1, errors[0]), (2, errors[1])):

        def fail(error: Exception = error) -> CTSlices:
            raise error

        work[place] = Work(CTSource(work[place].source.volume, fail), (strategy,))
    batches = batches_of(work, num_workers=num_workers)
    assert {volume for volume, _ in images_of(batches)} == {"a", "d"}
    assert [(item.volume, item.reason, item.detail) for item in batches.rejected] == [
        ("b", "geometry", "tilted"),
        ("c", "unreadable", "no such file"),
    ]


def test_an_error_of_the_program_is_not_a_bad_volume() -> None:
    (strategy,) = slice_strategies(["raw_32"], 16)

    def fail() -> CTSlices:
        raise AttributeError("oops")

    with pytest.raises(AttributeError, match="oops"):
        list(batches_of([Work(CTSource("a", fail), (strategy,))], num_workers=2))


def test_no_more_is_read_ahead_than_memory_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_batches, "DECODED_BYTES", 1)
    (strategy,) = slice_strategies(["raw_32"], 16)
    work, started = noted(work_of([strategy]))
    batches = iter(batches_of(work, num_workers=1, slices_per_batch=3))
    next(batches)
    assert len(started) <= 2  # the one that is shown, and one beside it
    assert sum(1 for _ in batches) == 4
    assert started == list("abcd")


def test_bad_arguments_are_refused() -> None:
    (strategy,) = slice_strategies(["tiled_5cut"], 16)
    with pytest.raises(ValueError, match=r"slice_axes must be one of \('yx', 'xy'\), got 'zy'"):
        batches_of([], slice_axes="zy")
    with pytest.raises(ValueError, match="must hold the 5 images of a slice of 'tiled_5cut', got 4"):
        batches_of(work_of([strategy]))


def slices(seed: int = 0) -> CTSlices:
    hu = np.random.default_rng(seed).integers(-1000, 1000, (7, 5, 5)).astype(np.int16)
    return CTSlices(hu, (0.7, 0.8, 1.5))


def source(name: str, seed: int = 0) -> CTSource:
    return CTSource(name, lambda: slices(seed))


def failing(name: str, error: Exception) -> CTSource:
    def read():
        raise error

    return CTSource(name, read)


def test_ct_is_lps_with_its_spacing():
    ct = slices()
    volume = lps_volume(ct)
    assert volume.dtype == torch.float32
    assert volume.shape == (1, 5, 5, 7)
    assert volume.pixdim.tolist() == pytest.approx([0.7, 0.8, 1.5])
    for z, y, x in ((0, 0, 0), (6, 1, 3), (2, 4, 0)):
        assert float(volume[0, x, y, z]) == ct.hu[z, y, x]
    # canonical slices run feet to head, front to back, right to left: seen from RAS, two axes turn
    ras = Orientationd("image", axcodes="RAS")({"image": volume})["image"]
    np.testing.assert_array_equal(ras[0].numpy(), ct.hu.transpose(2, 1, 0)[::-1, ::-1])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_volumes_come_in_order_and_bad_ones_are_listed(num_workers):
    work = [source("a", 1), failing("b", RejectedError("not axial", "it is oblique")), source("c", 2)]
    work += [failing("d", OSError("damaged")), source("e", 3), source("f", 4)]
    batches = VolumeBatches(work, lambda item: {"image": item["image"] + 1}, num_workers)
    given = list(batches)
    assert [batch["volume"] for batch in given] == ["a", "c", "e", "f"]
    for batch, seed in zip(given, (1, 2, 3, 4), strict=True):
        assert batch["image"].shape == (1, 1, 5, 5, 7)
        np.testing.assert_array_equal(batch["image"][0, 0].numpy(), slices(seed).hu.transpose(2, 1, 0) + 1)
        assert batch["spacing_mm"] == (0.7, 0.8, 1.5)
    assert [(item.volume, item.reason) for item in batches.rejected] == [
        ("b", "not axial"),
        ("d", "unreadable"),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_transform_is_no_fault_of_the_volume(num_workers):
    def broken(item):
        raise RuntimeError("axcodes")

    with pytest.raises(RuntimeError, match="axcodes"):
        list(VolumeBatches([source("a"), source("b"), source("c")], broken, num_workers))


def test_embedded_volumes_are_left_out(tmp_path):
    identity = {"encoder": "x", "encoder_id": "y", "preprocessing": "z"}
    identity |= {"slice_order": "none", "token_kind": "grid"}
    with EmbeddingStoreWriter(tmp_path, identity, "float32") as writer:
        writer.add("b", torch.ones(2, 3), (1.0, 1.0, 1.0))
    work = [source(name) for name in "abc"]
    assert [item.volume for item in unembedded(work, tmp_path)] == ["a", "c"]
    assert unembedded(work, tmp_path / "new") == work
