import csv
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from common.ct.rejection import EXCLUDED, RejectedVolume
from common.shards.index import index_path, load_index
from common.shards.shards import ShardSet
from data_prep.shards import parts
from data_prep.shards.parts import OutputError
from data_prep.shards.write import Summary, write_shards
from data_prep.sources.ct_rate import find_ct_rate
from data_prep.sources.rexgroundingct import read_annotations
from tests.data_prep.conftest import checksums

VOLUMES = [f"train_{n}_a_1" for n in range(1, 7)]
SHAPE_XYZ = (19, 17, 5)


class Cohort:
    """A small download whose volumes have 5 slices, and the shards that it is written into.

    Args:
        tiny: the download.
        client: of the workers.
    """

    def __init__(self, tiny: Any, client: Client) -> None:
        self.tiny = tiny
        self.client = client
        for volume in VOLUMES:
            tiny.add(volume)

    def run(self, out: Path, split: str = "train", **options: Any) -> Summary:
        sources, rejected = find_ct_rate(self.tiny.root, split)
        return write_shards(sources, rejected, out, split, self.client, **{"slices_per_shard": 10} | options)


def rejected_rows(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "rejected.csv").open(newline="") as file:
        return {row["volume"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


@pytest.fixture
def cohort(tiny: Any, dask: Client) -> Cohort:
    return Cohort(tiny, dask)


def test_every_voxel_arrives_in_the_shards(cohort, tmp_path) -> None:
    summary = cohort.run(tmp_path / "out")
    shards = ShardSet(tmp_path / "out", "train")
    assert [entry.volume for entry in shards.volumes] == VOLUMES
    for volume_id, volume in enumerate(VOLUMES):
        slices = np.stack([shards.read_slab(volume_id, z, 1).read_ct(0) for z in range(5)])
        np.testing.assert_array_equal(slices, cohort.tiny.hu(volume).transpose(2, 1, 0))
    assert summary.num_volumes == 6
    assert summary.num_slices == 30
    assert summary.num_shards == 3
    assert summary.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert (summary.num_ts, summary.num_rex, summary.num_resumed, summary.rejected) == (0, 0, 0, ())


def test_annotated_scans_get_shards_of_their_own(cohort, tmp_path, write_rex, save_nifti) -> None:
    masks = np.zeros((2, *SHAPE_XYZ), np.uint8)
    masks[1, 3, 5, 2] = 1
    annotated = ("train_2_a_1", "train_5_a_1")
    listing = write_rex(
        dict.fromkeys(annotated, masks), dict.fromkeys(annotated, ["1a", "2g"]), cohort.tiny.affine()
    )
    ids = np.full(SHAPE_XYZ, 10, np.uint8)
    save_nifti(cohort.tiny.ts_path("train_2_a_1", "train"), ids, cohort.tiny.affine())
    sources, rejected = find_ct_rate(cohort.tiny.root, "train", annotations=read_annotations(*listing))
    summary = write_shards(sources, rejected, tmp_path / "out", "train", cohort.client)
    assert (summary.num_ts, summary.num_rex, summary.num_shards) == (1, 2, 2)
    shards = ShardSet(tmp_path / "out", "train")
    entries = {entry.volume: (i, entry) for i, entry in enumerate(shards.volumes)}
    volume_id, entry = entries["train_2_a_1"]
    assert Path(entry.shard).name == "train-rex-000000.tar"
    assert np.unique(shards.read_slab(volume_id, 2, 1).read_rex()).tolist() == [0, 2**12]
    assert np.unique(shards.read_slab(volume_id, 0, 5).read_ts()).tolist() == [10]
    assert shards.read_slab(entries["train_1_a_1"][0], 0, 1).read_rex() is None


def test_a_finished_run_is_not_done_again(cohort, tmp_path, monkeypatch) -> None:
    first = cohort.run(tmp_path / "out")
    before = checksums(tmp_path / "out")
    monkeypatch.setattr(parts, "read_volume", None)
    second = cohort.run(tmp_path / "out")
    assert (first.num_done, first.num_resumed, first.num_workers) == (6, 0, 1)
    assert (second.num_done, second.num_resumed, second.num_resumed_shards) == (0, 6, 3)
    assert second[:6] == first[:6]
    assert checksums(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["no index", "no tar", "short tar", "broken index"])
def test_a_shard_that_is_not_whole_is_written_again(damage, cohort, tmp_path) -> None:
    cohort.run(tmp_path / "out")
    before = checksums(tmp_path / "out")
    shard = tmp_path / "out" / "train-000001.tar"
    if damage == "no index":
        index_path(shard).unlink()
    elif damage == "no tar":
        shard.unlink()
    elif damage == "short tar":
        os.truncate(shard, 512)
    else:
        index_path(shard).write_bytes(b"broken")
    assert cohort.run(tmp_path / "out").num_resumed_shards == 2
    assert checksums(tmp_path / "out") == before


def test_a_volume_that_was_mended_is_taken_up(cohort, tmp_path, save_nifti) -> None:
    path = cohort.tiny.path("train_3_a_1", "train")
    whole = path.read_bytes()
    save_nifti(path, np.zeros(SHAPE_XYZ, np.int16), cohort.tiny.affine())  # no air: seen in the voxels alone
    assert [item.volume for item in cohort.run(tmp_path / "out").rejected] == ["train_3_a_1"]
    assert [item.volume for item in cohort.run(tmp_path / "out").rejected] == ["train_3_a_1"]
    path.write_bytes(whole)
    summary = cohort.run(tmp_path / "out")
    assert (summary.num_volumes, summary.rejected, summary.num_resumed_shards) == (6, (), 2)
    cohort.run(tmp_path / "whole")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_every_volume_is_in_the_shards_or_among_the_rejected(cohort, tmp_path, save_nifti) -> None:
    """One of each: no header, half a file, a mask of another scan, no chest, no metadata."""
    cohort.tiny.path("train_1_a_1", "train").write_bytes(b"<html>")
    half = cohort.tiny.path("train_2_a_1", "train")
    half.write_bytes(half.read_bytes()[:-100])
    save_nifti(
        cohort.tiny.ts_path("train_3_a_1", "train"), np.zeros((3, 5, 7), np.uint8), cohort.tiny.affine()
    )
    (cohort.tiny.root / "dataset" / "metadata" / "no_chest_train.txt").write_text("train_4_a_1.nii.gz\n")
    cohort.tiny.rows = [row for row in cohort.tiny.rows if row["VolumeName"] != "train_5_a_1.nii.gz"]
    cohort.tiny.write_tables()
    summary = cohort.run(tmp_path / "out")
    assert [entry.volume for entry in ShardSet(tmp_path / "out", "train").volumes] == ["train_6_a_1"]
    rows = rejected_rows(tmp_path / "out")
    assert {volume: reason for volume, (reason, _) in rows.items()} == {
        "train_1_a_1": "unreadable",
        "train_2_a_1": "unreadable",
        "train_3_a_1": "mask",
        "train_4_a_1": EXCLUDED,
        "train_5_a_1": "metadata",
    }
    assert "must have the CT's shape (5, 17, 19), got (7, 5, 3)" in rows["train_3_a_1"][1]
    assert all("\n" not in detail for _, detail in rows.values())
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        manifest = {row["volume"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in manifest.values()] == ["rejected"] * 5 + ["written"]
    ct = cohort.tiny.path("train_6_a_1", "train")
    assert manifest["train_6_a_1"]["source"] == ct.relative_to(cohort.tiny.root).as_posix()
    assert manifest["train_6_a_1"]["source_sha256"] == hashlib.sha256(ct.read_bytes()).hexdigest()
    assert manifest["train_2_a_1"]["source"].endswith("train_2_a_1.nii.gz")
    assert summary.reasons == {"unreadable": 2, "mask": 1, EXCLUDED: 1, "metadata": 1}
    assert summary.rejected_share == pytest.approx(4 / 5)  # what is no chest was not meant to be used
    assert cohort.run(tmp_path / "out").reasons == summary.reasons


def test_a_cohort_of_nothing_counts_as_rejected() -> None:
    nothing = Summary(*[0] * 10, (), 0, 0, 0.0)
    assert nothing.rejected_share == 1
    assert nothing._replace(num_volumes=3).rejected_share == 0
    only_heads = nothing._replace(num_volumes=3, rejected=(RejectedVolume("a", EXCLUDED, "listed"),))
    assert only_heads.rejected_share == 0


def test_a_shard_all_of_whose_volumes_failed_is_finished_too(cohort, tmp_path, save_nifti) -> None:
    for volume in VOLUMES[:2]:
        save_nifti(cohort.tiny.path(volume, "train"), np.zeros(SHAPE_XYZ, np.int16), cohort.tiny.affine())
    assert cohort.run(tmp_path / "out").num_volumes == 4
    assert load_index(tmp_path / "out" / "train-000000.tar").rejected_volume.tolist() == VOLUMES[:2]
    assert cohort.run(tmp_path / "out").num_resumed_shards == 3
    assert [entry.volume for entry in ShardSet(tmp_path / "out", "train").volumes] == VOLUMES[2:]


def test_splits_share_a_folder(cohort, tmp_path) -> None:
    cohort.run(tmp_path / "out")
    cohort.tiny.rows, cohort.tiny.labels = [], []
    cohort.tiny.add("valid_1_a_1", split="valid")
    cohort.run(tmp_path / "out", "valid")
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        assert [row["volume"] for row in csv.DictReader(file)] == [*VOLUMES, "valid_1_a_1"]


def test_shards_of_another_plan_are_not_left_among_ours(cohort, tmp_path) -> None:
    cohort.run(tmp_path / "out")
    before = checksums(tmp_path / "out")
    with pytest.raises(ValueError, match=r"another run: \['train-000001\.tar'"):
        cohort.run(tmp_path / "out", slices_per_shard=99)
    assert checksums(tmp_path / "out") == before


def test_shards_of_another_cohort_are_not_written_over(cohort, tmp_path) -> None:
    cohort.run(tmp_path / "out", slices_per_shard=1000)
    before = checksums(tmp_path / "out")
    sources, _ = find_ct_rate(cohort.tiny.root, "train")
    others = [source._replace(volume=f"other_{source.volume}") for source in sources]
    with pytest.raises(ValueError, match=r"another run: \['train-000000\.tar'\]"):
        write_shards(others, [], tmp_path / "out", "train", cohort.client, slices_per_shard=1000)
    assert checksums(tmp_path / "out") == before
    some = write_shards(
        [*others, sources[0]], [], tmp_path / "out", "train", cohort.client, slices_per_shard=1000
    )
    assert some.num_volumes == 7  # the cohort has changed: it is the same one


def test_progress_counts_volumes_and_what_was_done_before(cohort, tmp_path) -> None:
    seen: list[tuple[str, int, int]] = []
    cohort.run(tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[:2] == [("Reading headers", 0, 6), ("Reading headers", 6, 6)]
    assert seen[2:] == [("Writing volumes", n, 6) for n in range(7)]
    index_path(tmp_path / "out" / "train-000002.tar").unlink()
    seen.clear()
    cohort.run(tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[2:] == [("Writing volumes", n, 6) for n in (4, 5, 6)]


def test_a_full_disk_stops_the_run_and_says_what_to_do(cohort, tmp_path, monkeypatch) -> None:
    """The disk fills up between the shards; what is finished stays, and the same command goes on."""
    cohort.run(tmp_path / "whole")
    write_tar, written = parts.write_tar, []

    def write_until_full(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tar(*arguments)

    monkeypatch.setattr(parts, "write_tar", write_until_full)
    with pytest.raises(OutputError, match="out': No space left on device"):
        cohort.run(tmp_path / "out")
    monkeypatch.undo()
    summary = cohort.run(tmp_path / "out")
    assert summary.num_resumed in (4, 5)  # one may have been at work while the other failed
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_two_runs_do_not_write_into_one_folder(cohort, tmp_path) -> None:
    def meddle(stage: str, done: int, total: int) -> None:
        cohort.run(tmp_path / "out")

    with pytest.raises(BlockingIOError, match="'.*out' is in use by process"):
        cohort.run(tmp_path / "out", progress=meddle)
    assert cohort.run(tmp_path / "out").num_volumes == 6


def test_a_split_must_be_able_to_name_a_shard(cohort, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"shard must be named .*, got 'my-split-000000\.tar'"):
        write_shards([], [], tmp_path / "out", "my-split", cohort.client)
    assert not (tmp_path / "out").exists()


def test_shards_must_hold_slices(cohort, tmp_path) -> None:
    with pytest.raises(ValueError, match="slices_per_shard must be positive, got 0"):
        cohort.run(tmp_path / "out", slices_per_shard=0)
