from pathlib import Path

import numpy as np
import pytest

from common.shards.index import FIELDS, load_index
from common.shards.writer import write_shard
from data_prep.shards.slices import read_slices
from tests.noise_volume import noise_volume

VOLUMES = [noise_volume("first", 2, rex=True), noise_volume("second", 3, rex=True)]
CT, TS, REX = (np.concatenate([getattr(one, name) for one in VOLUMES]) for name in ("ct", "ts", "rex"))


def written(path: Path) -> Path:
    write_shard(path / "train-rex-000000.tar", VOLUMES)
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
