"""Outputs come back by volume, whatever batches they came in."""

import pytest
import torch

from common.embeddings.slice_batches import Piece, VolumeTask
from common.embeddings.volume_outputs import VolumeOutputs
from common.transforms.slice_strategies import SliceStrategy

RAW, TILED = SliceStrategy("raw_32", 16), SliceStrategy("tiled_5cut", 16)


def task(volume: str, num_slices: int, strategy: SliceStrategy = RAW) -> VolumeTask:
    return VolumeTask(volume, strategy, num_slices, (1.0, 1.0, 1.0), {})


@pytest.mark.parametrize("with_patches", [False, True])
def test_volumes_are_complete_when_their_last_image_is_there(with_patches: bool) -> None:
    a, b, c = task("a", 3), task("b", 4), task("c", 1)
    batches = [[Piece(a, 0, 3), Piece(b, 0, 1)], [Piece(b, 1, 3), Piece(c, 0, 1)]]
    cls = torch.randn(8, 5)
    patches = torch.randn(8, 4, 5) if with_patches else None
    outputs = VolumeOutputs(torch.float32)
    found = []
    for number, pieces in enumerate(batches):
        rows = slice(4 * number, 4 * number + 4)
        padded = torch.cat([cls[rows], torch.full((2, 5), torch.nan)])
        own = None if patches is None else torch.cat([patches[rows], torch.zeros(2, 4, 5)])
        volumes = list(outputs.add(pieces, padded, own))
        found.append([volume.task.volume for volume in volumes])
        for volume in volumes:
            place = {"a": slice(0, 3), "b": slice(3, 7), "c": slice(7, 8)}[volume.task.volume]
            assert torch.equal(volume.cls, cls[place])
            assert volume.patches is None if patches is None else torch.equal(volume.patches, patches[place])
    assert found == [["a"], ["b", "c"]]
    assert list(outputs.rest()) == []


def test_strategies_of_a_volume_are_kept_apart() -> None:
    raw, tiled = task("a", 2), task("a", 2, TILED)
    outputs = VolumeOutputs(torch.float16)
    assert list(outputs.add([Piece(raw, 0, 1)], torch.zeros(1, 3), None)) == []
    (volume,) = outputs.add([Piece(tiled, 0, 10)], torch.ones(10, 3), None)
    assert volume.task is tiled
    assert volume.cls.shape == (10, 3)
    assert volume.cls.dtype == torch.float16
    (volume,) = outputs.add([Piece(raw, 1, 1)], torch.full((1, 3), 2.0), None)
    assert volume.cls.tolist() == [[0] * 3, [2] * 3]


@pytest.mark.gpu
def test_outputs_of_a_gpu_come_later_and_whole() -> None:
    outputs = VolumeOutputs(torch.float32)
    cls = torch.randn(40, 5, device="cuda")
    found = [
        volume
        for number in range(10)
        for volume in outputs.add([Piece(task(str(number), 4), 0, 4)], cls[4 * number : 4 * number + 4], None)
    ]
    assert len(found) == 8
    found += outputs.rest()
    assert torch.equal(torch.cat([volume.cls for volume in found]), cls.cpu())
