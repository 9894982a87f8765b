"""Statistics of foreground voxels: the clip range and the z-score of an encoder, reproduced from shards.

Shards hold whole HU in 4,096 steps, so a histogram of that many bins loses nothing: volumes are counted one
at a time, in any order, and everything follows exactly from the sum of their histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.ct.geometry import STORED_HU_RANGE
from common.shards.index import load_index
from common.shards.shards import ShardSet
from data_prep.cluster import ShowProgress, run_tasks
from data_prep.shards.slices import read_slices

if TYPE_CHECKING:
    from distributed import Client

LOWEST_HU, HIGHEST_HU = STORED_HU_RANGE
NUM_BINS = HIGHEST_HU - LOWEST_HU + 1
FOREGROUND_HU = -500
PERCENTILES = (0.05, 0.5, 50.0, 99.5)


class VolumeTask(NamedTuple):
    """A volume to count: path of its shard's tar, name, and the step between the slices to read."""

    shard: str
    volume: str
    slice_stride: int


class Counts(NamedTuple):
    """Voxels of one or several volumes.

    Args:
        histogram: ``(NUM_BINS,)`` int64, foreground voxels of each HU from ``LOWEST_HU`` on.
        num_slices: slices that were read.
        num_voxels: voxels in them, foreground or not.
    """

    histogram: np.ndarray
    num_slices: int
    num_voxels: int


class HUStatistics(NamedTuple):
    """Statistics of the foreground.

    Args:
        mean_hu: mean, exact for the stored HU.
        std_hu: standard deviation of the population, likewise.
        percentiles_hu: percentage to HU, interpolated linearly between voxels, as ``numpy.percentile`` does.
        num_foreground: foreground voxels.
        foreground_share: their share of all voxels.
        lowest_share: share of the foreground at the lowest HU that shards store, which stands for all below.
        highest_share: share of the foreground at the highest, likewise.
    """

    mean_hu: float
    std_hu: float
    percentiles_hu: dict[float, float]
    num_foreground: int
    foreground_share: float
    lowest_share: float
    highest_share: float


def foreground(hu: np.ndarray) -> np.ndarray:
    """Find the body in a slice, including air inside it.

    Above -500 HU, opened (4-connected, 2 iterations), holes filled.

    Source: DALE-CT's released statistics script. The image border counts as outside the body.

    Args:
        hu: one slice.

    Shape:
        ``(H, W)``. Output: bool, the same.

    Example:
        >>> hu = np.full((30, 30), -1000)
        >>> hu[5:25, 5:25] = 40
        >>> hu[12:18, 12:18] = -900
        >>> int(foreground(hu).sum())  # the hole is filled, each corner loses 3 pixels
        388
    """
    from scipy import ndimage  # slow to import, and --help does not need it

    body = ndimage.binary_opening(hu > FOREGROUND_HU, iterations=2)
    filled: np.ndarray = ndimage.binary_fill_holes(body)
    return filled


def count_volume(task: VolumeTask) -> Counts:
    """Count the foreground voxels of one volume.

    Raises:
        OSError: if the shard cannot be read.
        ValueError: if it is damaged, or holds HU outside the stored range.
    """
    shard = Path(task.shard)
    index = load_index(shard)
    place = int(np.flatnonzero(index.volume == task.volume)[0])
    first, num_slices = int(index.first_sample[place]), int(index.num_slices[place])
    histogram = np.zeros(NUM_BINS, np.int64)
    num_slices_read = num_voxels = 0
    for hu in read_slices(shard, index, "ct.blosc2", range(first, first + num_slices, task.slice_stride)):
        if hu.min() < LOWEST_HU or hu.max() > HIGHEST_HU:
            raise ValueError(
                f"CT must lie within {LOWEST_HU}..{HIGHEST_HU} HU, got {hu.min()}..{hu.max()} "
                f"for volume '{task.volume}'."
            )
        bins = hu[foreground(hu)].astype(np.int64) - LOWEST_HU
        histogram += np.bincount(bins, minlength=NUM_BINS)
        num_slices_read += 1
        num_voxels += hu.size
    return Counts(histogram, num_slices_read, num_voxels)


def sample_volumes(shards: ShardSet, num_volumes: int, seed: int, slice_stride: int) -> list[VolumeTask]:
    """Draw volumes, or take all if there are no more.

    The draw is among names in alphabetical order: how volumes are distributed over shards does not matter.

    Args:
        shards: shards to draw from.
        num_volumes: number to draw.
        seed: seed of the draw.
        slice_stride: step between the slices to read.

    Raises:
        ValueError: if ``num_volumes`` or ``slice_stride`` is not positive.
    """
    if num_volumes < 1:
        raise ValueError(f"num_volumes must be positive, got {num_volumes}.")
    if slice_stride < 1:
        raise ValueError(f"slice_stride must be positive, got {slice_stride}.")
    entries = sorted(shards.volumes, key=lambda entry: entry.volume)
    size = min(num_volumes, len(entries))
    drawn = np.random.default_rng(seed).choice(len(entries), size, replace=False)
    return [VolumeTask(entries[i].shard, entries[i].volume, slice_stride) for i in sorted(drawn)]


def count_volumes(
    client: Client, tasks: Sequence[VolumeTask], progress: ShowProgress
) -> tuple[Counts, dict[str, str]]:
    """Count the foreground voxels of volumes on a cluster; return the sum, and each failed volume's error."""
    histogram = np.zeros(NUM_BINS, np.int64)
    num_slices = num_voxels = 0
    failed: dict[str, str] = {}
    for done, (task, counts) in enumerate(run_tasks(client, count_volume, tasks), 1):
        if isinstance(counts, BaseException):
            failed[task.volume] = str(counts)
        else:
            histogram += counts.histogram
            num_slices += counts.num_slices
            num_voxels += counts.num_voxels
        progress("Counting volumes", done, len(tasks))
    return Counts(histogram, num_slices, num_voxels), failed


def hu_statistics(counts: Counts) -> HUStatistics:
    """Reduce counts to statistics.

    Raises:
        ValueError: if there is no foreground.

    Example:
        >>> histogram = np.zeros(NUM_BINS, np.int64)
        >>> histogram[[1024, 1024 + 100]] = 3, 1  # three voxels of 0 HU, one of 100 HU
        >>> statistics = hu_statistics(Counts(histogram, num_slices=1, num_voxels=8))
        >>> statistics.mean_hu, statistics.percentiles_hu[50.0], statistics.foreground_share
        (25.0, 0.0, 0.5)
    """
    number = int(counts.histogram.sum())
    if number == 0:
        raise ValueError(f"No foreground above {FOREGROUND_HU} HU in {counts.num_slices} slices.")
    values = np.arange(LOWEST_HU, HIGHEST_HU + 1)
    # Python's integers: sums over a whole cohort's voxels exceed 2**53
    mean = sum(n * hu for n, hu in zip(counts.histogram.tolist(), values.tolist(), strict=True)) / number
    variance = float((counts.histogram * (values - mean) ** 2).sum()) / number
    return HUStatistics(
        mean_hu=mean,
        std_hu=variance**0.5,
        percentiles_hu={percent: _percentile(counts.histogram, percent) for percent in PERCENTILES},
        num_foreground=number,
        foreground_share=number / counts.num_voxels,
        lowest_share=int(counts.histogram[0]) / number,
        highest_share=int(counts.histogram[-1]) / number,
    )


def _percentile(histogram: np.ndarray, percent: float) -> float:
    """Interpolate between the two voxels around the rank, in the order of their HU."""
    voxels_up_to = np.cumsum(histogram)
    rank = percent / 100 * (int(voxels_up_to[-1]) - 1)
    below = int(rank)
    low, high = np.searchsorted(voxels_up_to, [below, min(below + 1, int(voxels_up_to[-1]) - 1)], "right")
    return float(LOWEST_HU + low + (rank - below) * (high - low))
