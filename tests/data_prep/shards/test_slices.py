from pathlib import Path

import numpy as np
import pytest

from common.shards.index import FIELDS, load_index
from common.shards.writer import VolumeSlices, write_shard
from data_prep.shards.slices import read_slices

RNG = np.random.default_rng(0)
CT = RNG.integers(-1024, 3071, (5, 17, 19)).astype(np.int16)
TS = RNG.integers(0, 118, (5, 128, 128)).astype(np.uint8)
REX = RNG.integers(0, 2**14, (5, 128, 128)).astype(np.uint16)


def written(path: Path) -> Path:
    common = {"spacing_mm": (1, 1, 1), "original_shape": (19, 17, 5), "original_axcodes": "LPS"}
    volumes = [
        VolumeSlices(name, ct, ts, rex, labels=None, split="train", **common)
        for name, ct, ts, rex in (("first", CT[:2], TS[:2], REX[:2]), ("second", CT[2:], TS[2:], REX[2:]))
    ]
    write_shard(path / "train-rex-000000.tar", volumes)
    return path / "train-rex-000000.tar"


@pytest.mark.parametrize(("field", "content"), [("ct.blosc2", CT), ("ts.png", TS), ("rex.png", REX)])
def test_samples_come_in_the_order_asked_for(field, content, tmp_path) -> None:
    shard = written(tmp_path)
    read = list(read_slices(shard, load_index(shard), field, [4, 0, 3]))
    assert [array.dtype for array in read] == [content.dtype] * 3
    np.testing.assert_array_equal(read, content[[4, 0, 3]])


@pytest.mark.parametrize("field", ["ct.blosc2", "ts.png"])
def test_damage_is_told_with_its_place(field, tmp_path) -> None:
    shard = written(tmp_path)
    index = load_index(shard)
    offset = int(index.member_offset[3, FIELDS.index(field)])
    content = bytearray(shard.read_bytes())
    content[offset : offset + 50] = bytes(50)
    shard.write_bytes(content)
    assert len(list(read_slices(shard, index, field, [0, 1, 2, 4]))) == 4
    with pytest.raises(ValueError, match=rf"train-rex-000000.tar' is damaged at {field} of sample 3: "):
        list(read_slices(shard, index, field, [3]))
