"""Training samples: the views of the slab that belongs to a position of the run, and batches of positions."""

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from common.shards.codec import MASK_SIZE_PX
from common.shards.index import UNLABELLED
from common.shards.shards import ShardSet
from common.transforms.multi_crop import RandSlabMultiCrop, ViewPlan, cut_crops
from common.transforms.patch_masks import PatchMasks, masked_places
from common.transforms.view_batch import Batch, Sample, collate_views

logger = logging.getLogger(__name__)

# Second word of every random stream, after the seed.
OTHER_POOL, REX_POOL, VIEWS = 0, 1, 2
SHARED_MEMORY = Path("/dev/shm")
SLABS_TRIED = 8  # whose crops are measured before the workers start; our choice
HEADER_TOLERANCE = 1e-6
"""Headers store spacings as float32: 4.8 mm reads 4.80000019 and must count as 4.8. Our choice, relative."""


def slab_num_slices(spacing_z_mm: float, slab_mm: float, volume: str = "") -> int:
    """Count the slices that span a slab: thickness over spacing, rounded half up, at least one.

    Source: DALE-CT III-A, 12 mm. Rounding half up is our choice (the released code rounds half to even).

    Args:
        spacing_z_mm: distance of neighbouring slices.
        slab_mm: thickness of the slab; 0 for slabs of one slice, the pure 2D ablation of Table V.
        volume: named in the error.

    Raises:
        ValueError: if the thickness is negative or not finite, or the spacing not positive and finite.

    Example:
        >>> [slab_num_slices(spacing, 12.0) for spacing in (0.5, 1.0, 1.5, 4.8, 5.0, 30.0)]
        [24, 12, 8, 3, 2, 1]
    """
    if not (math.isfinite(slab_mm) and slab_mm >= 0):
        raise ValueError(f"slab_mm must be positive, or 0 for single slices, got {slab_mm}.")
    if not (math.isfinite(spacing_z_mm) and spacing_z_mm > 0):
        raise ValueError(
            f"spacing_mm must be positive to cut {slab_mm} mm slabs, got {spacing_z_mm} for volume "
            f"'{volume}'. Prepare the shards again without it."
        )
    return max(1, math.floor(slab_mm / spacing_z_mm * (1 + HEADER_TOLERANCE) + 0.5))


def slab_starts(num_slices: int, length: int) -> np.ndarray:
    """Tile a volume with slabs from its first slice; return the first slice of each.

    A remainder becomes a slab that ends at the last slice and overlaps its neighbour, so that every slab of a
    volume has the full length. A volume shorter than a slab is one slab.

    Source: tiling from DALE-CT III-A; the full-length last slab is our choice (the released code keeps a
    short one).

    Raises:
        ValueError: if a number of slices is not positive.

    Example:
        >>> slab_starts(num_slices=29, length=12)
        array([ 0, 12, 17])
    """
    if num_slices < 1 or length < 1:
        raise ValueError(f"num_slices and length must be positive, got {num_slices} and {length}.")
    starts = np.arange(0, num_slices, length)
    return np.minimum(starts, max(num_slices - length, 0))


class SlabViews(Dataset[Sample]):
    """Views of slabs, addressed by the place of the slab in the run.

    A step of the run takes the next slabs, one per sample of the global batch. Slab and views of the i-th
    sample are a function of (seed, i) alone: ranks and workers share no randomness whatever their number, and
    a run resumes at any step at no cost.

    Slabs come from two pools, those of scans with ReX annotation and all others. Slab i is drawn from the
    first iff floor((i + 1) f) > floor(i f), f the fraction, so that any stretch of slabs has its exact share.
    The k-th draw of a pool of n slabs is element k mod n of its permutation number k // n: every slab comes
    once per pass, and a batch is spread over the cohort. If a pool is empty, all draws are from the other.

    Of a slab only the slices that its views use are decoded, and only their crops leave: rendering and
    counting labels are for the device.

    Source: DALE-CT III-A and III-C. Random access to slabs is our choice: SIGReg assumes independent samples,
    and a shuffle buffer behind a stream of volumes fills a batch from a handful of scans.

    Args:
        shards: the scans to train on.
        slab_mm: thickness of a slab; 0 for single slices. Paper: 12.
        rex_fraction: share of slabs from the ReX-annotated scans; None for their natural share. Paper: 0.2.
        seed: seed of everything random.
        multi_crop: draws the views.
        with_masks: whether samples hold masks. Guidance reads the slab's masks either way.
        patch_masks: draws the masks of the global views; None for none.

    Attributes:
        label_names: labels of the volumes, in the order of ``labels``.

    Raises:
        ValueError: if there is no volume, ``rex_fraction`` is not in [0, 1], ``slab_mm`` negative, or the
            spacing of a volume not positive.
    """

    def __init__(
        self,
        *,
        shards: ShardSet,
        slab_mm: float,
        rex_fraction: float | None,
        seed: int,
        multi_crop: RandSlabMultiCrop,
        with_masks: bool,
        patch_masks: PatchMasks | None = None,
    ) -> None:
        if rex_fraction is not None and not 0 <= rex_fraction <= 1:
            raise ValueError(
                f"rex_fraction must be between 0 and 1, or None for the natural share, got {rex_fraction}."
            )
        if not shards.volumes:
            raise ValueError("shards must hold at least one volume, got none.")
        self.shards = shards
        self.seed = seed
        self.multi_crop = multi_crop
        self.with_masks = with_masks
        self.patch_masks = patch_masks
        self.label_names = list(
            dict.fromkeys(name for volume in shards.volumes if volume.labels for name in volume.labels)
        )
        self.slab_lengths = np.array(
            [min(v.num_slices, slab_num_slices(v.spacing_mm[2], slab_mm, v.volume)) for v in shards.volumes]
        )
        starts = [
            slab_starts(v.num_slices, int(n)) for v, n in zip(shards.volumes, self.slab_lengths, strict=True)
        ]
        self.slab_volumes = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        self.slab_starts = np.concatenate(starts)
        self.pools, self.rex_share = self._make_pools(rex_fraction)
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def slab_of(self, place: int) -> tuple[int, int, int]:
        """Return a slab of the run, any place from 0: index of its volume, first slice, number of slices."""
        before, after = (int(i * self.rex_share) for i in (place, place + 1))
        pool, draw = (REX_POOL, before) if after > before else (OTHER_POOL, place - before)
        passes, element = divmod(draw, len(self.pools[pool]))
        slab = self.pools[pool][self._permutation(pool, passes)[element]]
        volume = int(self.slab_volumes[slab])
        return volume, int(self.slab_starts[slab]), int(self.slab_lengths[volume])

    def __getitem__(self, place: int) -> Sample:
        """Return the views of a slab of the run, any place from 0."""
        volume, first, length = self.slab_of(place)
        entry = self.shards.volumes[volume]
        slab = self.shards.read_slab(volume, first, length)
        ts, rex, read_slice = slab.read_ts(), slab.read_rex(), cache(slab.read_ct)
        rng = np.random.default_rng([self.seed, VIEWS, place])
        plan = self.multi_crop.draw(rng, length, entry.shape, ts, rex)
        num_global = self.multi_crop.num_views[0]
        sample = {
            "global_pixels": cut_crops(plan.boxes[:num_global], read_slice),
            "local_pixels": cut_crops(plan.boxes[num_global:], read_slice),
            **plan._asdict(),
            **(_planes_under(plan, ts, rex) if self.with_masks else {}),
            **({"masks": self.patch_masks.draw(place)} if self.patch_masks else {}),
            "shape": np.array(entry.shape, np.int32),
            "has_ts": bool(entry.has_ts),
            "has_rex": bool(entry.has_rex),
            "labels": self._labels(entry.labels),
            "volume": entry.volume,
            "first_slice": first,
            "spacing_mm": np.asarray(entry.spacing_mm, np.float32),
            "position": place,
        }
        return cast(Sample, sample)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Put the samples of a step together; see ``collate_views``."""
        crop = self.multi_crop
        batch = collate_views(samples, crop.num_views[0], crop.sizes_px, crop.patch_size_px)
        if self.patch_masks:
            bound = self.patch_masks.most_masked(len(samples))
            batch["masked_places"], batch["masked_weights"] = masked_places(batch["masks"], bound)
        return batch

    def _labels(self, labels: dict[str, int] | None) -> np.ndarray:
        known = labels or {}
        return np.array([known.get(name, UNLABELLED) for name in self.label_names], np.int8)

    def _make_pools(self, rex_fraction: float | None) -> tuple[tuple[np.ndarray, np.ndarray], Fraction]:
        """Slabs of the other and of the ReX pool, and the exact share of the latter."""
        every = np.arange(len(self.slab_volumes))
        if rex_fraction is None:
            return (every, every[:0]), Fraction(0)
        in_rex = np.array([bool(v.has_rex) for v in self.shards.volumes])[self.slab_volumes]
        share = Fraction(str(rex_fraction))  # 0.2 is one in five, not its binary neighbour
        if share > 0 and not in_rex.any():
            logger.warning("No volume has ReX annotation: rex_fraction %s has no effect.", rex_fraction)
            share = Fraction(0)
        elif share < 1 and in_rex.all():
            logger.warning("All volumes have ReX annotation: rex_fraction %s has no effect.", rex_fraction)
            share = Fraction(1)
        return (every[~in_rex], every[in_rex]), share

    def _permutation(self, pool: int, passes: int) -> np.ndarray:
        """Order of a pool in one of its passes; the latest of each pool is kept."""
        cached = self._permutations.get(pool)
        if cached is None or cached[0] != passes:
            order = np.random.default_rng([self.seed, pool, passes]).permutation(len(self.pools[pool]))
            cached = self._permutations[pool] = (passes, order)
        return cached[1]


def _planes_under(plan: ViewPlan, ts: np.ndarray | None, rex: np.ndarray | None) -> dict[str, np.ndarray]:
    """Take the masks of the slices that views use, each once and empty ones not at all."""
    used, slices = np.unique(plan.boxes[:, 0], return_inverse=True)
    planes: dict[str, np.ndarray] = {}
    for name, masks, dtype in (("ts", ts, np.uint8), ("rex", rex, np.int16)):
        empty = np.zeros((len(used), MASK_SIZE_PX, MASK_SIZE_PX), dtype)
        shown = empty if masks is None else masks[used].astype(dtype, copy=False)
        filled = shown.any((1, 2))
        planes[f"{name}_planes"] = shown[filled]
        planes[f"{name}_plane"] = np.where(filled, filled.cumsum() - 1, -1)[slices]
    return planes


class StepBatches(Sampler[list[int]]):
    """Endless batches of slabs: at each step this rank's share of the global batch.

    Step t covers the places t * world * B to (t + 1) * world * B of ``SlabViews``; rank r takes the r-th run
    of B of them. Use as the ``batch_sampler`` of ``StepLoader``. To resume, set ``start_step`` before
    iterating.

    Args:
        batch_size: samples per rank and step, B.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: if ``batch_size`` is not positive or ``rank`` not in [0, world_size).
    """

    def __init__(self, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank} and {world_size}.")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.start_step):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class StepLoader(DataLoader[Any]):
    """A DataLoader of ``SlabViews`` whose workers outlive the signals that stop a trainer at its next step.

    Args:
        dataset: what to load.
        batch_sampler: which slabs at which step; its ``start_step`` counts when an iteration starts.
        options: options of ``DataLoader``, such as ``num_workers``, ``pin_memory`` and ``prefetch_factor``.

    Raises:
        ValueError: if what the workers read ahead does not fit into the shared memory.
    """

    batch_sampler: StepBatches

    def __init__(self, dataset: SlabViews, batch_sampler: StepBatches, **options: Any) -> None:  # noqa: ANN401
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=dataset.collate,
            worker_init_fn=_leave_the_group,
            **options,
        )
        if self.num_workers and SHARED_MEMORY.is_dir():  # a Linux
            self._check_shared_memory(self.num_workers * (self.prefetch_factor or 2) + 1)

    def _check_shared_memory(self, num_batches: int) -> None:
        """Refuse batches on their way that together outgrow what is free, which would end in a bus error."""
        sampler = self.batch_sampler
        first = sampler.rank * sampler.batch_size
        tried = range(first, first + min(SLABS_TRIED, sampler.batch_size))
        arrays = [value for place in tried for value in self.dataset[place].values()]
        sizes = [value.nbytes for value in arrays if isinstance(value, np.ndarray)]
        needed = sum(sizes) * sampler.batch_size / len(tried) * num_batches
        ranks, free = idist.get_nproc_per_node(), shutil.disk_usage(SHARED_MEMORY).free
        if needed * ranks > free:
            raise ValueError(
                f"num_workers must leave room in {SHARED_MEMORY}, got {self.num_workers}: {num_batches} "
                f"batches of {sampler.batch_size} for each of {ranks} ranks take {needed * ranks / 1e9:.1f} "
                f"GB of its free {free / 1e9:.1f} GB. Lower num_workers, or enlarge it (docker --shm-size)."
            )


def _leave_the_group(worker: int) -> None:
    """Clusters signal the process group of a job; the trainer needs its workers up to the last step.

    A worker ends with its trainer.
    """
    os.setpgid(0, 0)
