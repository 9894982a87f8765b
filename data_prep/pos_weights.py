"""How frequent each class is in the masks of a split, and the positive weights that follow.

Frequencies are shares of cells of the shards' 128 x 128 grid. TotalSegmentator's ids were resized to it by
nearest voxel, which keeps shares. A finding of ReXGroundingCT fills every cell that it touches, so that none
is lost: shares of small ones come out larger (at 512 x 512 up to 16 times), and weights smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.cohort.cohort import Label, load_labels
from common.shards.codec import MASK_SIZE_PX, NUM_TS_CLASSES, REX_CODES
from common.shards.index import ShardIndex, load_index
from data_prep.cluster import ShowProgress, run_tasks
from data_prep.shards.slices import read_slices
from data_prep.tables import write_table

if TYPE_CHECKING:
    from distributed import Client

LABEL_LISTS = ("totalsegmentator", "rexgroundingct")
MAX_WEIGHT = 1000.0
COLUMNS = (
    *("index", "name", "code", "pos_weight"),
    *("frequency", "cells", "weight_by_frequency", "weight_in_use"),
)
CELLS_PER_SLICE = MASK_SIZE_PX**2


class MaskCounts(NamedTuple):
    """Cells by class, of one or several shards.

    Args:
        cells: ``(C,)`` int64, cells of each class.
        num_cells: cells of all slices of the volumes that have masks, empty slices included.
        num_volumes: volumes that have masks.
        num_without: volumes that have none, and count for nothing.
    """

    cells: np.ndarray
    num_cells: int
    num_volumes: int
    num_without: int

    def plus(self, other: MaskCounts) -> MaskCounts:
        """Return the sum of two counts."""
        return MaskCounts(
            self.cells + other.cells,
            self.num_cells + other.num_cells,
            self.num_volumes + other.num_volumes,
            self.num_without + other.num_without,
        )


class ClassWeight(NamedTuple):
    """Weights of one class.

    Args:
        label: the class, with the weight in use.
        cells: its cells.
        frequency: their share of all cells.
        weight_by_frequency: ``min(1 / frequency, 1000)``.
        pos_weight: the same, but 1 where the weight in use is 1: those were set by hand.
    """

    label: Label
    cells: int
    frequency: float
    weight_by_frequency: float
    pos_weight: float


def count_shard(shard: str) -> dict[str, MaskCounts]:
    """Count the cells of every class in one shard; no CT is decoded.

    Args:
        shard: path of the tar.

    Returns:
        Name of the label list to its counts.

    Raises:
        OSError: if the shard cannot be read.
        ValueError: if it is damaged.
    """
    path = Path(shard)
    index = load_index(path)
    ids = np.zeros(2**8, np.int64)
    for mask in read_slices(path, index, "ts.png", np.flatnonzero(index.slice_has_ts)):
        ids += np.bincount(mask.ravel(), minlength=len(ids))
    if ids[NUM_TS_CLASSES:].any():
        raise ValueError(f"ids must be below {NUM_TS_CLASSES}, got {ids.nonzero()[0].max()} in '{shard}'.")
    combinations = np.zeros(2 ** len(REX_CODES), np.int64)
    for mask in read_slices(path, index, "rex.png", np.flatnonzero(index.slice_has_rex)):
        combinations += np.bincount(mask.ravel(), minlength=len(combinations))
    has_finding = np.arange(len(combinations))[:, None] >> np.arange(len(REX_CODES)) & 1
    ts = _of(index, index.has_ts, ids[:NUM_TS_CLASSES])
    ts.cells[0] += ts.num_cells - ts.cells.sum()  # slices without any organ were not read
    return {
        "totalsegmentator": ts,
        "rexgroundingct": _of(index, index.has_rex, combinations @ has_finding),
    }


def _of(index: ShardIndex, has_mask: np.ndarray, cells: np.ndarray) -> MaskCounts:
    num_cells = int(index.num_slices[has_mask].sum()) * CELLS_PER_SLICE
    return MaskCounts(cells, num_cells, int(has_mask.sum()), int((~has_mask).sum()))


def count_shards(
    client: Client, shards: Sequence[str], progress: ShowProgress
) -> tuple[dict[str, MaskCounts], dict[str, str]]:
    """Count the cells of every class in shards on a cluster.

    Args:
        client: Dask cluster.
        shards: paths of the tars.
        progress: called after every shard.

    Returns:
        Name of the label list to the counts of all shards together, and the error of each failed shard.
    """
    totals = {name: MaskCounts(np.zeros(len(load_labels(name)), np.int64), 0, 0, 0) for name in LABEL_LISTS}
    failed: dict[str, str] = {}
    for done, (shard, counts) in enumerate(run_tasks(client, count_shard, shards), 1):
        if isinstance(counts, BaseException):
            failed[shard] = str(counts)
        else:
            totals = {name: total.plus(counts[name]) for name, total in totals.items()}
        progress("Counting shards", done, len(shards))
    return totals, failed


def class_weights(name: str, counts: MaskCounts) -> list[ClassWeight]:
    """Return the weight of every class of a label list.

    Source: DALE-CT's released mask audit, min(1 / frequency, 1000). Its authors then set weights by hand: 1
    for the background and for anatomy outside the chest, which we repeat, and 800 for every finding, which
    stays the weight in use beside ours.

    Args:
        name: name of the label list.
        counts: counts of all shards.

    Raises:
        ValueError: if no volume has masks of that kind.

    Example:
        >>> counts = MaskCounts(np.array([40, *[0] * 13]), num_cells=16384, num_volumes=1, num_without=0)
        >>> class_weights("rexgroundingct", counts)[0].pos_weight
        409.6
    """
    if counts.num_volumes == 0:
        raise ValueError(f"None of {counts.num_without} volumes has masks of {name}.")
    weights = []
    for label, cells in zip(load_labels(name), counts.cells.tolist(), strict=True):
        weight = min(counts.num_cells / cells, MAX_WEIGHT) if cells else MAX_WEIGHT
        pos_weight = 1.0 if label.pos_weight == 1 else weight
        weights.append(ClassWeight(label, cells, cells / counts.num_cells, weight, pos_weight))
    return weights


def write_weights(path: Path, weights: Sequence[ClassWeight]) -> None:
    """Write a label list that can replace ``common/labels/<name>.csv``, with the figures behind it."""
    rows = (
        (
            *(weight.label.index, weight.label.name, weight.label.code, f"{weight.pos_weight:g}"),
            *(weight.frequency, weight.cells, weight.weight_by_frequency, f"{weight.label.pos_weight:g}"),
        )
        for weight in weights
    )
    write_table(path, COLUMNS, rows)
