import csv
import hashlib
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.shard_index import RejectedVolume, index_path, load_index
from common.data.shard_volume import VolumeSlices
from common.data.shards import ShardSet
from data_prep import write_shards as module
from data_prep.ct_rate import find_ct_rate
from data_prep.rejection import EXCLUDED
from data_prep.rexgroundingct import read_annotations
from data_prep.source_volume import SourceVolume
from data_prep.write_shards import Summary, plan_shards, write_shards

VOLUMES = [f"train_{n}_a_1" for n in range(1, 7)]
SHAPE_XYZ = (19, 17, 5)
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def run(tiny: Any, out: Path, **options: Any) -> Summary:
    sources, rejected = find_ct_rate(tiny.root, "train")
    return write_shards(sources, rejected, out, "train", **{"slices_per_shard": 10} | options)


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.iterdir()) if path.suffix in {".tar", ".npz", ".csv"})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rejected_rows(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "rejected.csv").open(newline="") as file:
        return {row["volume"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


@pytest.fixture
def cohort(tiny: Any) -> Any:
    for volume in VOLUMES:
        tiny.add(volume)
    return tiny


def test_every_voxel_arrives_in_the_shards(cohort: Any, tmp_path: Path) -> None:
    summary = run(cohort, tmp_path / "out")
    shards = ShardSet(tmp_path / "out", "train")
    assert [entry.volume for entry in shards.volumes] == VOLUMES
    for volume_id, volume in enumerate(VOLUMES):
        slices = np.stack([shards.read_ct(volume_id, z) for z in range(5)])
        np.testing.assert_array_equal(slices, cohort.hu(volume).transpose(2, 1, 0))
    assert summary.num_volumes == 6
    assert summary.num_slices == 30
    assert summary.num_shards == 3
    assert summary.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert (summary.num_ts, summary.num_rex, summary.num_resumed, summary.rejected) == (0, 0, 0, ())


def test_volumes_are_never_split_over_shards(cohort: Any, tmp_path: Path) -> None:
    sources, _ = find_ct_rate(cohort.root, "train")
    for slices_per_shard, expected in (
        (10, [2, 2, 2]),
        (14, [2, 2, 2]),
        (15, [3, 3]),
        (1, [1] * 6),
        (99, [6]),
    ):
        shards, _ = plan_shards(sources, tmp_path, "train", slices_per_shard, quiet)
        assert [len(shard.sources) for shard in shards] == expected
        assert [shard.path.name for shard in shards] == [f"train-{n:06d}.tar" for n in range(len(expected))]


def test_annotated_scans_get_shards_of_their_own(
    cohort: Any, tmp_path: Path, write_rex: Callable[..., tuple[Path, Path]], save_nifti: Save
) -> None:
    masks = np.zeros((2, *SHAPE_XYZ), np.uint8)
    masks[1, 3, 5, 2] = 1
    annotated = ("train_2_a_1", "train_5_a_1")
    listing = write_rex(
        dict.fromkeys(annotated, masks), dict.fromkeys(annotated, ["1a", "2g"]), cohort.affine()
    )
    ids = np.full(SHAPE_XYZ, 10, np.uint8)
    save_nifti(cohort.ts_path("train_2_a_1", "train"), ids, cohort.affine())
    sources, rejected = find_ct_rate(cohort.root, "train", annotations=read_annotations(*listing))
    summary = write_shards(sources, rejected, tmp_path / "out", "train")
    assert (summary.num_ts, summary.num_rex, summary.num_shards) == (1, 2, 2)
    shards = ShardSet(tmp_path / "out", "train")
    entries = {entry.volume: (i, entry) for i, entry in enumerate(shards.volumes)}
    volume_id, entry = entries["train_2_a_1"]
    assert Path(entry.shard).name == "train-rex-000000.tar"
    assert np.unique(shards.read_rex(volume_id, 2, 1)).tolist() == [0, 2**12]
    assert np.unique(shards.read_ts(volume_id, 0, 5)).tolist() == [10]
    assert shards.read_rex(entries["train_1_a_1"][0], 0, 1) is None


def test_the_order_of_the_sources_does_not_matter(cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path / "a")
    sources, rejected = find_ct_rate(cohort.root, "train")
    write_shards(sources[::-1], rejected, tmp_path / "b", "train", slices_per_shard=10)
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")


def test_a_finished_run_is_not_done_again(
    cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(cohort, tmp_path / "out")
    before = checksums(tmp_path / "out")
    monkeypatch.setattr(module, "read_volume", None)
    second = run(cohort, tmp_path / "out")
    assert second == first._replace(num_resumed=3)
    assert checksums(tmp_path / "out") == before


def run_until_killed(tiny: Any, out: Path, volumes_read: int) -> None:
    """Run in a process that kills itself, as hard as it gets, while it reads a volume."""
    read_volume, seen = module.read_volume, []

    def read_or_die(source: SourceVolume) -> VolumeSlices:
        seen.append(source)
        if len(seen) == volumes_read:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_volume(source)

    module.read_volume = read_or_die
    run(tiny, out)


def test_a_killed_run_goes_on_to_the_same_bytes(cohort: Any, tmp_path: Path) -> None:
    """Killed while it reads the fourth volume: one shard is finished, the second is half written."""
    run(cohort, tmp_path / "whole")
    process = get_context("fork").Process(target=run_until_killed, args=(cohort, tmp_path / "out", 4))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".lock", "train-000000.index.npz", "train-000000.tar", "train-000001.tar.partial"]
    assert run(cohort, tmp_path / "out").num_resumed == 1
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize("damage", ["no index", "no tar", "short tar", "broken index"])
def test_a_shard_that_is_not_whole_is_written_again(damage: str, cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path / "out")
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
    assert run(cohort, tmp_path / "out").num_resumed == 2
    assert checksums(tmp_path / "out") == before


def test_a_volume_that_was_mended_is_taken_up(cohort: Any, tmp_path: Path) -> None:
    path = cohort.path("train_3_a_1", "train")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert [item.volume for item in run(cohort, tmp_path / "out").rejected] == ["train_3_a_1"]
    assert [item.volume for item in run(cohort, tmp_path / "out").rejected] == ["train_3_a_1"]
    path.write_bytes(whole)
    summary = run(cohort, tmp_path / "out")
    assert (summary.num_volumes, summary.rejected, summary.num_resumed) == (6, (), 2)
    run(cohort, tmp_path / "whole")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_every_volume_is_in_the_shards_or_among_the_rejected(
    cohort: Any, tmp_path: Path, save_nifti: Save
) -> None:
    """One of each: no header, half a file, a mask of another scan, no chest, no metadata."""
    cohort.path("train_1_a_1", "train").write_bytes(b"<html>")
    half = cohort.path("train_2_a_1", "train")
    half.write_bytes(half.read_bytes()[:-100])
    save_nifti(cohort.ts_path("train_3_a_1", "train"), np.zeros((3, 5, 7), np.uint8), cohort.affine())
    (cohort.root / "dataset" / "metadata" / "no_chest_train.txt").write_text("train_4_a_1.nii.gz\n")
    cohort.rows = [row for row in cohort.rows if row["VolumeName"] != "train_5_a_1.nii.gz"]
    cohort.write_tables()
    summary = run(cohort, tmp_path / "out")
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
    assert summary.reasons == {"unreadable": 2, "mask": 1, EXCLUDED: 1, "metadata": 1}
    assert summary.rejected_share == pytest.approx(4 / 5)  # what is no chest was not meant to be used
    assert run(cohort, tmp_path / "out").reasons == summary.reasons


def test_a_cohort_of_nothing_counts_as_rejected() -> None:
    nothing = Summary(0, 0, 0, 0, 0, 0, 0, ())
    assert nothing.rejected_share == 1
    assert nothing._replace(num_volumes=3).rejected_share == 0
    only_heads = nothing._replace(num_volumes=3, rejected=(RejectedVolume("a", EXCLUDED, "listed"),))
    assert only_heads.rejected_share == 0


def test_a_shard_all_of_whose_volumes_failed_is_finished_too(cohort: Any, tmp_path: Path) -> None:
    for volume in VOLUMES[:2]:
        path = cohort.path(volume, "train")
        path.write_bytes(path.read_bytes()[:-100])
    assert run(cohort, tmp_path / "out").num_volumes == 4
    assert load_index(tmp_path / "out" / "train-000000.tar").rejected_volume.tolist() == VOLUMES[:2]
    assert run(cohort, tmp_path / "out").num_resumed == 3
    assert [entry.volume for entry in ShardSet(tmp_path / "out", "train").volumes] == VOLUMES[2:]


def test_splits_share_a_folder(cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path / "out")
    cohort.rows, cohort.labels = [], []
    cohort.add("valid_1_a_1", split="valid")
    sources, rejected = find_ct_rate(cohort.root, "valid")
    write_shards(sources, rejected, tmp_path / "out", "valid")
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        assert [row["volume"] for row in csv.DictReader(file)] == [*VOLUMES, "valid_1_a_1"]


def test_shards_of_another_plan_are_not_left_among_ours(cohort: Any, tmp_path: Path) -> None:
    run(cohort, tmp_path / "out")
    before = checksums(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"out must hold only shards of this plan, got \['train-000001\.tar', .*Delete"
    ):
        run(cohort, tmp_path / "out", slices_per_shard=99)
    assert checksums(tmp_path / "out") == before


def test_progress_counts_headers_and_slices(cohort: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run(cohort, tmp_path / "out", progress=lambda *step: seen.append(step))
    headers = [step for step in seen if step[0] == "Reading headers"]
    slices = [step for step in seen if step[0] == "Writing slices"]
    assert headers == [("Reading headers", n, 6) for n in range(1, 7)]
    assert sorted({done for _, done, _ in slices}) == [0, 5, 10, 15, 20, 25, 30]
    assert {total for _, _, total in slices} == {30}


def test_two_runs_do_not_write_into_one_folder(cohort: Any, tmp_path: Path) -> None:
    def meddle(stage: str, done: int, total: int) -> None:
        run(cohort, tmp_path / "out")

    with pytest.raises(
        BlockingIOError, match="out must be written by one run at a time, got another in '.*out'"
    ):
        run(cohort, tmp_path / "out", progress=meddle)
    assert run(cohort, tmp_path / "out").num_volumes == 6


def test_shards_must_hold_slices(cohort: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slices_per_shard must be positive, got 0"):
        run(cohort, tmp_path / "out", slices_per_shard=0)
