from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import KilledWorker

from common.ct.files import ct_file
from common.shards.index import load_index
from common.shards.writer import VolumeSlices
from data_prep.shards import parts
from data_prep.shards import tasks as module
from data_prep.shards.parts import OutputError, write_part
from data_prep.shards.plan import PlannedShard, PlannedVolume
from data_prep.shards.tasks import ShardTasks
from data_prep.sources.source_volume import SourceVolume
from tests.noise_volume import noise_volume


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[PlannedShard]:
    """Three shards of four volumes, whose readers need no files."""

    def read(source: SourceVolume) -> VolumeSlices:
        return noise_volume(source.volume, ts=False)

    monkeypatch.setattr(parts, "read_volume", read)
    paths = [tmp_path / f"train-{number:06d}.tar" for number in range(3)]
    return [
        PlannedShard(
            path,
            tuple(
                PlannedVolume(
                    SourceVolume(f"v{k}{n}", "train", ct_file(Path("x.nii.gz"))), f"plan {k}{n}", path
                )
                for n in range(4)
            ),
            f"plan {k}",
        )
        for k, path in enumerate(paths)
    ]


def test_every_volume_is_reported_once_and_every_shard_is_there(shards, dask) -> None:
    reports = [report.volume for report in ShardTasks(shards, dask).run()]
    assert sorted(reports) == [f"v{k}{n}" for k in range(3) for n in range(4)]
    assert [load_index(shard.path).volume.tolist() for shard in shards] == [
        [f"v{k}{n}" for n in range(4)] for k in range(3)
    ]
    assert list(ShardTasks([], dask).run()) == []


def test_shards_appear_while_later_volumes_are_read(shards, dask, monkeypatch) -> None:
    monkeypatch.setattr(module, "TASKS_AHEAD", 2)
    seen = [sum(shard.path.exists() for shard in shards) for _ in ShardTasks(shards, dask).run()]
    assert seen[-1] >= 1


def test_a_part_lost_before_its_shard_was_put_together_is_written_again(shards, dask) -> None:
    reports = []
    for report in ShardTasks(shards, dask).run():
        reports.append(report.volume)
        if report.volume == "v11" and reports.count("v11") == 1:
            shards[1].volumes[1].part.unlink()
    assert reports.count("v11") == 2
    assert len(reports) == 13
    assert load_index(shards[1].path).volume.tolist() == ["v10", "v11", "v12", "v13"]


def test_workers_that_write_elsewhere_end_the_run(shards, dask, monkeypatch) -> None:
    """Each machine has an own folder of that name: what one has written, no other finds."""

    def write_elsewhere(volume: PlannedVolume) -> object:
        return write_part(volume._replace(shard=volume.shard.parent / "elsewhere" / volume.shard.name))

    monkeypatch.setattr(module, "write_part", write_elsewhere)
    with pytest.raises(OutputError, match="4 parts of"):
        list(ShardTasks(shards, dask).run())


def test_a_volume_that_workers_die_of_is_rejected(shards, dask, monkeypatch) -> None:
    class Deadly(module.Tasks):
        """The volume v12 kills its workers."""

        def __iter__(self) -> Iterator:
            for item, result in super().__iter__():
                deadly = isinstance(item, PlannedVolume) and item.source.volume == "v12"
                yield item, KilledWorker("task", None, 1) if deadly else result

    monkeypatch.setattr(module, "Tasks", Deadly)
    shards[1].volumes[2].part.parent.mkdir(parents=True)
    rejected = {report.volume: report.rejected for report in ShardTasks(shards, dask).run()}
    assert rejected.pop("v12").reason == "worker died"
    assert set(rejected.values()) == {None}
    index = load_index(shards[1].path)
    assert index.volume.tolist() == ["v10", "v11", "v13"]
    assert index.rejected_reason.tolist() == ["worker died"]


@pytest.mark.parametrize("which", ["part", "shard"])
def test_a_folder_that_takes_no_more_ends_the_run(which, shards, dask, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, {"part": "write_tar", "shard": "join_tars"}[which], full)
    with pytest.raises(OutputError, match="No space left on device"):
        list(ShardTasks(shards, dask).run())


def test_more_tasks_than_wait_at_once_are_all_done(shards, dask, monkeypatch) -> None:
    started: list[Callable] = []
    start = module.Tasks.start

    def count(self: module.Tasks, function: Callable, *arguments: object, **options: object) -> None:
        started.append(function)
        start(self, function, *arguments, **options)

    monkeypatch.setattr(module, "TASKS_AHEAD", 3)
    monkeypatch.setattr(module.Tasks, "start", count)
    run = ShardTasks(shards, dask).run()
    next(run)
    assert len(started) == 4
    assert len(list(run)) == 11
    assert len(started) == 12 + 3
