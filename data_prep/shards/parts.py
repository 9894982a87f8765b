"""One volume is one task and one part, a shard of that volume alone; the parts of a shard become the shard.

Both are written under a temporary unique name and renamed, the index last: any process may be killed at any
time, and two workers may do the same task at once, since they write the same bytes.
"""

import os
import platform
import resource
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from common.ct.rejection import RejectedError, RejectedVolume
from common.run.process import flush_folder
from common.shards.index import ShardIndex, index_path, load_index
from common.shards.shards import PARTS, parse_shard_name
from common.shards.writer import VolumeSlices, write_tar
from data_prep.shards.join import join_tars
from data_prep.shards.plan import PlannedShard, PlannedVolume, parts_folder, unexpected_error
from data_prep.sources.source_volume import SourceVolume, read_volume


class OutputError(OSError):
    """The folder of the shards cannot be written to; the only error of a volume's task that stops the run."""


class PartReport(NamedTuple):
    """The outcome of a volume's task.

    Args:
        volume: name.
        was_there: whether an earlier run had written the part.
        rejected: why the volume is left out, or None.
        worker: host and process.
        peak_bytes: most memory that process has held.
    """

    volume: str
    was_there: bool
    rejected: RejectedVolume | None
    worker: str
    peak_bytes: int


def write_part(volume: PlannedVolume) -> PartReport:
    """Read a volume and write its part, unless it exists; whatever is wrong with the volume is a rejection.

    Raises:
        OutputError: if the part cannot be written.
    """
    index = finished(volume.part, volume.plan)
    was_there = index is not None
    if index is None:
        try:
            index = put_part(volume, _read(volume.source))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 (what a reader returned does not follow the schema)
            index = put_part(volume, unexpected_error(volume.source.volume, error))
    return PartReport(
        volume=volume.source.volume,
        was_there=was_there,
        rejected=next(iter(index.rejections), None),
        worker=f"{platform.node()}:{os.getpid()}",
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def put_part(volume: PlannedVolume, content: VolumeSlices | RejectedVolume) -> ShardIndex:
    """Write the part of a volume: its slices, or an empty tar whose index says why there are none.

    Args:
        volume: volume to write.
        content: its slices, or why it is rejected.

    Returns:
        The part's index.

    Raises:
        ValueError: if the slices do not follow the schema.
        OutputError: if the part cannot be written.
    """
    with output_errors(volume.shard.parent):
        aside = _aside(volume.shard)
        index = write_tar(aside, parse_shard_name(volume.shard.name), [content], volume.plan)
        _publish(aside, volume.part, volume.plan)
    return index


def assemble_shard(shard: PlannedShard) -> tuple[PlannedVolume, ...]:
    """Put the parts of a shard together and delete them; no slice is decoded.

    Returns:
        Volumes whose part is missing and that must be done again; empty if the shard is finished.

    Raises:
        OutputError: if the shard cannot be written.
        ValueError: if volumes differ in the classes of their labels.
    """
    parts = [finished(volume.part, volume.plan) for volume in shard.volumes]
    whole = [part for part in parts if part is not None]
    if len(whole) == len(parts) and finished(shard.path, shard.plan) is None:
        try:
            with output_errors(shard.path.parent):
                aside = _aside(shard.path)
                join_tars(aside, [volume.part for volume in shard.volumes], whole, shard.plan)
                _publish(aside, shard.path, shard.plan)
        except FileNotFoundError:  # another worker that did the same task has deleted the parts
            parts = [None] * len(parts)
    if finished(shard.path, shard.plan) is not None:
        shutil.rmtree(parts_folder(shard.path), ignore_errors=True)
        return ()
    return tuple(volume for volume, part in zip(shard.volumes, parts, strict=True) if part is None)


def clean_parts(out: Path, split: str, shards: Sequence[PlannedShard]) -> None:
    """Delete what killed runs and older plans of a split left, except parts that are still needed.

    Args:
        out: folder of the shards.
        split: split whose parts to look at.
        shards: shards still to be written.
    """
    wanted = {parts_folder(shard.path): shard for shard in shards}
    for path in (out / PARTS).glob(f"{split}-*"):
        if path in wanted:
            parts = [volume.part for volume in wanted[path].volumes]
            kept = {file for part in parts for file in (part, index_path(part))}
            for file in set(path.iterdir()) - kept:
                file.unlink(missing_ok=True)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # the parts of other splits stay
        (out / PARTS).rmdir()


def finished(tar: Path, plan: str) -> ShardIndex | None:
    """Return the index of a shard or part that is complete and follows a plan, else None."""
    try:
        index = load_index(tar)
    except (FileNotFoundError, ValueError):
        return None
    return index if str(index.plan) == plan else None


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Say in one line what to do about a folder that cannot be written to, such as one on a full disk.

    Raises:
        OutputError: in place of an ``OSError``, except for a missing file or one in use.
    """
    try:
        yield
    except (FileNotFoundError, BlockingIOError, OutputError):
        raise
    except OSError as error:
        raise OutputError(
            f"Cannot write to '{out}': {error.strerror or error}. "
            "Free some space, then run the same command again: it resumes."
        ) from error


def _aside(shard: Path) -> Path:
    """Return a temporary file name that no other process uses."""
    parts_folder(shard).mkdir(parents=True, exist_ok=True)
    return shard.parent / PARTS / f"{shard.stem}.{uuid.uuid4().hex}.tar"


def _publish(aside: Path, final: Path, plan: str) -> None:
    """Give a tar and its index their names; an index never stands beside a tar that is not its own."""
    if finished(final, plan) is None:
        index_path(final).unlink(missing_ok=True)
    aside.replace(final)
    index_path(aside).replace(index_path(final))
    flush_folder(final.parent)


def _read(source: SourceVolume) -> VolumeSlices | RejectedVolume:
    try:
        return read_volume(source)
    except RejectedError as error:
        return error.of(source.volume)
    except Exception as error:  # noqa: BLE001 (one volume never stops the run)
        return unexpected_error(source.volume, error)
