"""Training samples: the views of the slab that belongs to a position of the run, and batches of positions."""

import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from common.data.shards import ShardSet
from common.data.slabs import slab_num_slices, slab_starts
from common.transforms.multi_crop import RandSlabMultiCrop

logger = logging.getLogger(__name__)

# Second word of every random stream, after the seed.
OTHER_POOL, REX_POOL, VIEWS = 0, 1, 2


class SlabViews(Dataset[dict[str, Any]]):
    """Views of slabs, addressed by the position of the sample in the run.

    Position i = step * global batch + offset. Slab and views are a function of (seed, i) alone: ranks and
    workers share no randomness whatever their number, and a run resumes at any step at no cost.

    Slabs come from two pools, those of scans with ReX annotation and all others. Position i draws from the
    first iff floor((i + 1) f) > floor(i f), f the fraction, so that any stretch of positions has its exact
    share. The k-th draw of a pool of n slabs is element k mod n of its permutation number k // n: every slab
    comes once a pass, and a batch is spread over the cohort. If a pool is empty, all positions draw from the
    other.

    Source: DALE-CT III-A and III-C. Random access to slabs is our choice: SIGReg assumes independent samples,
    and a shuffle buffer behind a stream of volumes fills a batch from a handful of scans.

    Args:
        shards: the scans to train on.
        slab_mm: thickness of a slab in mm; 0 for single slices. Paper: 12.
        rex_fraction: share of positions that draw ReX-annotated slabs; None for one pool of all slabs, their
            natural share. Paper: 0.2.
        seed: of everything random.
        multi_crop: draws and renders the views.
        with_masks: whether samples hold masks. Guidance reads the slab's masks either way.

    Shape:
        A sample is a dictionary, ``default_collate``-able, V = Vg + Vl views, global first:
        ``global_views`` int16 HU (Vg, S, S), ``local_views`` int16 HU (Vl, s, s); with masks ``global_ts``,
        ``local_ts`` uint8 ids and ``global_rex``, ``local_rex`` int16 bits of the same shapes; ``has_ts``,
        ``has_rex`` bool, of the volume; ``boxes``, ``guide``, ``points``, ``flips``, ``gamma``,
        ``blur_sigma`` of ``ViewPlan``; ``position``, ``first_slice`` int; ``volume`` str; ``spacing_mm``
        float32 (3,), x y z.

    Raises:
        ValueError: if there is no volume, ``rex_fraction`` is not in [0, 1], ``slab_mm`` negative, or the
            spacing of a volume not positive.
    """

    def __init__(
        self,
        shards: ShardSet,
        slab_mm: float,
        rex_fraction: float | None,
        seed: int,
        multi_crop: RandSlabMultiCrop,
        with_masks: bool,
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

    def slab_of(self, position: int) -> tuple[int, int, int]:
        """Return the slab of a position: index of its volume, first slice, number of slices."""
        before, after = (int(i * self.rex_share) for i in (position, position + 1))
        pool, draw = (REX_POOL, before) if after > before else (OTHER_POOL, position - before)
        passes, element = divmod(draw, len(self.pools[pool]))
        slab = self.pools[pool][self._permutation(pool, passes)[element]]
        volume = int(self.slab_volumes[slab])
        return volume, int(self.slab_starts[slab]), int(self.slab_lengths[volume])

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the sample of a position, any integer from 0."""
        volume, first, length = self.slab_of(position)
        entry = self.shards.volumes[volume]
        ts = self.shards.read_ts(volume, first, length)
        rex = self.shards.read_rex(volume, first, length)
        rng = np.random.default_rng([self.seed, VIEWS, position])
        plan = self.multi_crop.draw(rng, length, entry.shape, ts, rex)
        views = self.multi_crop.render(
            plan, lambda z: self.shards.read_ct(volume, first + z), ts, rex, with_masks=self.with_masks
        )
        return {
            **views,
            **plan._asdict(),
            "has_ts": bool(entry.has_ts),
            "has_rex": bool(entry.has_rex),
            "position": position,
            "volume": entry.volume,
            "first_slice": first,
            "spacing_mm": np.asarray(entry.spacing_mm, np.float32),
        }

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


class StepBatches(Sampler[list[int]]):
    """Endless batches of positions: at each step this rank's share of the global batch.

    Step t covers positions t * world * B to (t + 1) * world * B; rank r takes the r-th run of B of them. Use
    as a DataLoader's ``batch_sampler``.

    Args:
        batch_size: samples per rank and step, B.
        rank: of this process.
        world_size: number of processes.
        start_step: step of the first batch. Set the attribute before iterating to resume.

    Raises:
        ValueError: if ``batch_size`` is not positive, ``rank`` not in [0, world_size) or ``start_step``
            negative.

    Example:
        >>> batches = iter(StepBatches(batch_size=2, rank=1, world_size=3, start_step=1))
        >>> next(batches), next(batches)
        ([8, 9], [14, 15])
    """

    def __init__(self, batch_size: int, rank: int, world_size: int, start_step: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank} and {world_size}.")
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}.")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1
