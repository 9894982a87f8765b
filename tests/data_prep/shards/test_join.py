from pathlib import Path

import numpy as np
import pytest

from common.ct.rejection import RejectedVolume
from common.shards.index import index_path
from common.shards.shards import ShardName
from common.shards.writer import VolumeSlices, write_shard, write_tar
from data_prep.shards.join import join_tars
from tests.noise_volume import noise_volume


def volume(name: str, num_slices: int, **changes: object) -> VolumeSlices:
    fields = {"spacing_mm": (0.7, 0.8, 1.5 + num_slices), "labels": {"x": num_slices % 2, "y": 1}}
    return noise_volume(name, num_slices)._replace(**fields | changes)


LONG_NAME = "train_" + "9" * 70 + "_a_1"
CONTENTS: dict[str, list[VolumeSlices | RejectedVolume]] = {
    "one": [volume("a", 3)],
    "several": [volume("a", 3), volume("bb", 5, ts=None), volume(LONG_NAME, 2, original_axcodes="RAS")],
    "labels late": [volume("a", 3, labels=None), volume("b", 2), volume("c", 1, labels=None)],
    "no labels": [volume("a", 3, labels=None), volume("b", 2, labels=None)],
    "rejected": [
        RejectedVolume("r1", "mask", "of another shape"),
        volume("a", 3),
        RejectedVolume("r2", "unreadable", "é"),
        volume("b", 1),
    ],
    "all rejected": [RejectedVolume("r1", "mask", "x"), RejectedVolume("r2", "unreadable", "longer")],
}


def write_parts(folder: Path, contents: list[VolumeSlices | RejectedVolume]) -> tuple[list[Path], list]:
    paths = [folder / f"{item.volume}.tar" for item in contents]
    name = ShardName("train", annotated=False)
    return paths, [write_tar(path, name, [item], "p") for path, item in zip(paths, contents, strict=True)]


@pytest.mark.parametrize("which", CONTENTS)
def test_parts_joined_are_the_shard_written_at_once(which, tmp_path) -> None:
    whole, joined = tmp_path / "train-000000.tar", tmp_path / "joined.tar"
    write_shard(whole, CONTENTS[which], plan="the plan")
    join_tars(joined, *write_parts(tmp_path, CONTENTS[which]), "the plan")
    assert joined.read_bytes() == whole.read_bytes()
    assert index_path(joined).read_bytes() == index_path(whole).read_bytes()


def test_the_end_mark_is_right_wherever_the_body_ends(tmp_path) -> None:
    """A tar ends in two empty blocks and is filled up to a record of 20: bodies of every remainder."""
    remainders = set()
    for width in range(10, 310, 15):
        folder = tmp_path / str(width)
        folder.mkdir()
        ct = np.random.default_rng(width).integers(-1024, 3071, (1, 17, width)).astype(np.int16)
        contents = [volume("a", 1, ts=None), volume("b", 1, ts=None, ct=ct)]
        write_shard(folder / "train-000000.tar", contents)
        index = join_tars(folder / "joined.tar", *write_parts(folder, contents), "")
        assert (folder / "joined.tar").read_bytes() == (folder / "train-000000.tar").read_bytes()
        end = int((index.member_offset + index.member_size).max())
        remainders.add(-(-end // 512) % 20)
    assert {17, 18, 19, 0} <= remainders


def test_parts_that_differ_in_their_classes_are_refused(tmp_path) -> None:
    contents = [volume("a", 3), volume("b", 2, labels={"y": 1, "x": 0})]
    with pytest.raises(ValueError, match=r"same classes .*\['y', 'x'\] for volume 'b'"):
        join_tars(tmp_path / "joined.tar", *write_parts(tmp_path, contents), "")


def test_a_part_cut_short_leaves_no_shard(tmp_path) -> None:
    paths, indices = write_parts(tmp_path, CONTENTS["several"])
    paths[1].write_bytes(paths[1].read_bytes()[:2000])
    with pytest.raises(FileNotFoundError, match="a part is shorter than its index says"):
        join_tars(tmp_path / "joined.tar", paths, indices, "")
    assert not list(tmp_path.glob("joined*"))
