import ctypes
import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.ct.files import ct_file
from common.ct.rejection import RejectedError, RejectedVolume
from common.shards.index import index_path, load_index
from common.shards.writer import VolumeSlices, write_shard
from data_prep.shards import parts as module
from data_prep.shards.parts import OutputError, assemble_shard, clean_parts, finished, put_part, write_part
from data_prep.shards.plan import PlannedShard, PlannedVolume
from data_prep.sources.source_volume import SourceVolume
from tests.noise_volume import noise_volume

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1")


def slices_of(source: SourceVolume) -> VolumeSlices:
    return noise_volume(source.volume, ts=False)


def planned(out: Path, shard: str = "train-000000.tar", plan: str = "plan") -> PlannedShard:
    path = out / shard
    sources = [SourceVolume(name, "train", ct_file(Path(f"{name}.nii.gz"))) for name in NAMES]
    return PlannedShard(
        path, tuple(PlannedVolume(source, f"{plan} {source.volume}", path) for source in sources), plan
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Volumes that were read, by readers that need no files."""
    seen: list[str] = []

    def read(source: SourceVolume) -> VolumeSlices:
        seen.append(source.volume)
        return slices_of(source)

    monkeypatch.setattr(module, "read_volume", read)
    return seen


def left(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_a_part_is_the_shard_of_one_volume(reads, tmp_path) -> None:
    volume = planned(tmp_path).volumes[1]
    report = write_part(volume)
    assert volume.part == tmp_path / ".parts" / "train-000000" / "train_2_a_1.tar"
    write_shard(tmp_path / "train-000000.tar", [slices_of(volume.source)], volume.plan)
    for part, shard in (
        (volume.part, tmp_path / "train-000000.tar"),
        (index_path(volume.part), tmp_path / "train-000000.index.npz"),
    ):
        assert part.read_bytes() == shard.read_bytes()
    assert (report.volume, report.was_there, report.rejected) == ("train_2_a_1", False, None)
    assert report.worker.endswith(f":{os.getpid()}")
    assert 10 * 2**20 < report.peak_bytes < 2**40
    assert len(left(volume.part.parent)) == 2


def test_a_part_that_is_there_is_not_written_again(reads, tmp_path) -> None:
    volume = planned(tmp_path).volumes[0]
    write_part(volume)
    assert write_part(volume).was_there
    assert reads == ["train_1_a_1"]
    assert not write_part(volume._replace(plan="another plan")).was_there
    os.truncate(volume.part, 512)
    assert not write_part(volume._replace(plan="another plan")).was_there
    assert len(reads) == 3


FAILURES = {
    "rejected": (RejectedError("mask", "of another\nshape"), "mask", "of another shape"),
    "defect": (KeyError("ct"), "unexpected error", "KeyError: 'ct'"),
    "input disk": (
        OSError(errno.EIO, "Input/output error"),
        "unexpected error",
        "OSError: .*Input/output error",
    ),
    "memory": (MemoryError("Unable to allocate"), "unexpected error", "MemoryError: Unable to allocate"),
}


@pytest.mark.parametrize("which", FAILURES)
def test_a_volume_that_fails_is_an_empty_part_that_says_why(which, tmp_path, monkeypatch) -> None:
    error, reason, detail = FAILURES[which]

    def fail(source: SourceVolume) -> VolumeSlices:
        raise error

    monkeypatch.setattr(module, "read_volume", fail)
    volume = planned(tmp_path).volumes[0]
    report = write_part(volume)
    assert report.rejected.reason == reason
    assert load_index(volume.part).rejections == [report.rejected]
    assert re.fullmatch(detail, report.rejected.detail)
    again = write_part(volume)
    assert (again.was_there, again.rejected) == (True, report.rejected)


def test_slices_that_break_the_schema_are_rejected_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        module, "read_volume", lambda source: slices_of(source)._replace(spacing_mm=(0.7, 0.7, -1.0))
    )
    report = write_part(planned(tmp_path).volumes[0])
    assert report.rejected.reason == "unexpected error"
    assert "ValueError: spacing_mm must be positive" in report.rejected.detail


def test_parts_become_the_shard_and_are_gone(reads, tmp_path) -> None:
    shard = planned(tmp_path / "out")
    rejection = RejectedVolume("train_2_a_1", "mask", "of another shape")
    write_part(shard.volumes[0])
    put_part(shard.volumes[1], rejection)
    write_part(shard.volumes[2])
    assert assemble_shard(shard) == ()
    contents = [slices_of(shard.volumes[0].source), rejection, slices_of(shard.volumes[2].source)]
    write_shard(tmp_path / "train-000000.tar", contents, shard.plan)
    for name in ("train-000000.tar", "train-000000.index.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert left(tmp_path / "out") == ["train-000000.index.npz", "train-000000.tar"]
    assert assemble_shard(shard) == ()


def test_parts_that_are_not_there_are_named(reads, tmp_path) -> None:
    """One missing, one of another plan: the third stays as it is."""
    shard = planned(tmp_path)
    write_part(shard.volumes[0])
    write_part(shard.volumes[1]._replace(plan="older"))
    assert assemble_shard(shard) == shard.volumes[1:]
    assert not shard.path.exists()
    assert finished(shard.volumes[0].part, shard.volumes[0].plan) is not None


def test_two_workers_may_do_the_same_tasks_at_once(reads, tmp_path) -> None:
    """As Dask has them do when it takes one for lost."""
    for attempt in range(5):
        shard = planned(tmp_path / str(attempt))
        with ThreadPoolExecutor(4) as pool:
            reports = list(pool.map(write_part, shard.volumes * 4))
            assert {report.rejected for report in reports} == {None}
            assert () in pool.map(assemble_shard, [shard] * 4)
        write_shard(tmp_path / "train-000000.tar", [slices_of(v.source) for v in shard.volumes], shard.plan)
        assert shard.path.read_bytes() == (tmp_path / "train-000000.tar").read_bytes()
        assert finished(shard.path, shard.plan) is not None


def test_what_older_plans_and_killed_runs_left_is_deleted(reads, tmp_path) -> None:
    shard = planned(tmp_path)
    write_part(shard.volumes[0])
    for stray in (
        *("train-000000.0f.tar", "train-000000.0f.tar.partial", "train-000000/gone_1_a_1.tar"),
        *("train-000009/train_9_a_1.tar", "train-rex-000000/x.tar"),
        *("train2-000000/y.tar", "valid-000000/z.tar", "valid-000000.0f.tar"),
    ):
        path = tmp_path / ".parts" / stray
        path.parent.mkdir(exist_ok=True)
        path.touch()
    clean_parts(tmp_path, "train", [shard])
    assert left(tmp_path / ".parts") == [
        *("train-000000/train_1_a_1.index.npz", "train-000000/train_1_a_1.tar"),
        *("train2-000000/y.tar", "valid-000000.0f.tar", "valid-000000/z.tar"),
    ]
    for split in ("train", "train2", "valid"):
        clean_parts(tmp_path, split, [])
    assert not (tmp_path / ".parts").exists()
    clean_parts(tmp_path, "train", [])


# Folders that cannot be written to


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; skipped where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=256k") != 0:
        pytest.skip(f"no right to mount a small disk ({os.strerror(ctypes.get_errno())})")
    yield folder
    libc.umount(os.fsencode(folder))


def test_a_full_disk_is_named_and_nothing_is_damaged(reads, small_disk) -> None:
    shard = planned(small_disk)
    write_part(shard.volumes[0])
    before = shard.volumes[0].part.read_bytes()
    (small_disk / "other data").write_bytes(bytes(256 * 1024 - len(before) - 16 * 1024))
    for _ in range(2):
        with pytest.raises(OutputError, match="disk': No space left on device"):
            write_part(shard.volumes[1])
    assert shard.volumes[0].part.read_bytes() == before
    assert not shard.volumes[1].part.exists()
    (small_disk / "other data").unlink()
    assert {write_part(volume).rejected for volume in shard.volumes} == {None}
    assert assemble_shard(shard) == ()


def test_a_folder_without_permission_is_named(reads, tmp_path) -> None:
    """Root may write everywhere: a file in place of the folder stands for it."""
    (tmp_path / ".parts").write_text("in the way")
    with pytest.raises(OutputError, match="Not a directory"):
        write_part(planned(tmp_path).volumes[0])
