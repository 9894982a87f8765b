"""The tasks of a run in their order: parts shard by shard, and each shard as soon as its parts exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.cluster import TASKS_AHEAD, Tasks
from data_prep.shards.parts import OutputError, PartReport, assemble_shard, put_part, write_part
from data_prep.shards.plan import PlannedShard, PlannedVolume, worker_died

if TYPE_CHECKING:
    from distributed import Client

ATTEMPTS = 3
"""Attempts to put a shard together before missing parts are blamed on the folder."""


class ShardTasks:
    """Writes shards on a cluster.

    Args:
        shards: shards to write, in order.
        client: Dask cluster.
    """

    def __init__(self, shards: Sequence[PlannedShard], client: Client) -> None:
        self._tasks = Tasks(client)
        self._waiting = iter([volume for shard in shards for volume in shard.volumes])
        self._shards = {shard.path: shard for shard in shards}
        self._missing = {shard.path: {volume.part for volume in shard.volumes} for shard in shards}
        self._attempts: Counter[Path] = Counter()

    def run(self) -> Iterator[PartReport]:
        """Yield the report of each volume as it arrives; all shards exist at the end.

        A part that was lost before its shard was put together is written, and reported, again.

        Raises:
            OutputError: if the folder of the shards cannot be written to, or workers do not share it.
            ConnectionError: if the cluster is lost.
            ValueError: if volumes of a shard differ in the classes of their labels.
        """
        with self._tasks:
            self._start_parts(TASKS_AHEAD)
            for item, result in self._tasks:
                if isinstance(item, PlannedShard):
                    self._rewrite(item, result)
                else:
                    self._start_parts(1)
                    yield _report(item, result)
                    self._missing[item.shard].discard(item.part)
                    if not self._missing[item.shard]:
                        self._tasks.start(assemble_shard, self._shards[item.shard], priority=1)

    def _start_parts(self, number: int) -> None:
        for volume in islice(self._waiting, number):
            self._tasks.start(write_part, volume)

    def _rewrite(self, shard: PlannedShard, result: tuple[PlannedVolume, ...] | BaseException) -> None:
        """Write the parts again that a shard's task did not find."""
        if isinstance(result, BaseException):
            raise result
        self._attempts[shard.path] += 1
        if result and self._attempts[shard.path] == ATTEMPTS:
            raise OutputError(
                f"Workers wrote {len(result)} parts of '{shard.path.name}' that are not in "
                f"'{shard.path.parent}': all workers must share that folder. Choose another --out."
            )
        self._missing[shard.path] = {volume.part for volume in result}
        for volume in result:
            self._tasks.start(write_part, volume, priority=1)


def _report(volume: PlannedVolume, result: PartReport | BaseException) -> PartReport:
    """Return the result of a volume's task; if workers died of it, write and report its rejection."""
    from distributed import KilledWorker

    if isinstance(result, KilledWorker):
        rejection = worker_died(volume.source.volume)
        put_part(volume, rejection)
        return PartReport(rejection.volume, was_there=False, rejected=rejection, worker="", peak_bytes=0)
    if isinstance(result, BaseException):
        raise result
    return result
