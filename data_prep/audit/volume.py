"""One volume, decoded slice by slice: what its voxels and masks say about it.

Shapes: Z slices of the volume, H rows, W columns.
"""

from typing import NamedTuple

import numpy as np

from common.ct.anatomy import Coarse, coarse_steps
from common.ct.checks import blank_slices, measure
from common.shards.codec import MASK_SIZE_PX, REX_CODES
from data_prep.audit.organs import measure_organs, organ_voxels
from data_prep.sources.mask_alignment import cell_voxels

HU_BIN = 32
"""Width of a bin of each volume's histogram."""

_NUM_UINT16 = 2**16


class VolumeContent(NamedTuple):
    """What a decoded volume holds.

    Args:
        measures: what ``RULES`` are about; NaN or absent where a rule does not apply.
        hu_percentiles: HU below which 1, 50 and 99 % of the voxels lie.
        hu_counts: ``(128,)`` int64 voxels of each 32 HU from -1024 to 3071.
        organ_voxels: ``(118,)`` int64 voxels of each TotalSegmentator id; zeros without a label map.
        finding_slices: ``(14,)`` int64 slices with each ReXGroundingCT code.
    """

    measures: dict[str, float]
    hu_percentiles: tuple[float, float, float]
    hu_counts: np.ndarray
    organ_voxels: np.ndarray
    finding_slices: np.ndarray


class VolumeDecoder:
    """Takes the slices of a volume in any order and needs little memory: 32 KiB per slice, and masks.

    Args:
        num_slices: number of slices.
        shape: height and width of a slice.
        spacing_mm: spacing as (x, y, z).
        has_ts: whether the volume has a label map.
    """

    def __init__(
        self, num_slices: int, shape: tuple[int, int], spacing_mm: tuple[float, float, float], has_ts: bool
    ) -> None:
        self.shape = shape
        self.spacing_mm = spacing_mm
        self.grid = tuple(map(cell_voxels, shape))
        self.steps = coarse_steps(spacing_mm)
        sizes = zip((num_slices, *shape), self.steps, strict=True)
        self.coarse = np.zeros([-(-size // step) for size, step in sizes], np.int16)
        self.planes = np.zeros((num_slices, MASK_SIZE_PX, MASK_SIZE_PX), np.int16)
        self.ts = np.zeros_like(self.planes, np.uint8) if has_ts else None
        self.counts = np.zeros(_NUM_UINT16, np.int64)
        self.num_blank = 0
        self.finding_slices = np.zeros(len(REX_CODES), np.int64)
        self.missing = set(range(num_slices))

    def add(self, z: int, ct: np.ndarray, ts: np.ndarray | None, rex: np.ndarray | None) -> None:
        """Take a slice.

        Args:
            z: its position, from the feet.
            ct: int16 HU ``(H, W)``.
            ts: TotalSegmentator ids, if there are any.
            rex: bit planes of findings, if there are any.
        """
        rows, columns = self.grid
        self.planes[z] = ct[rows[:, None], columns]
        every_z, every_y, every_x = self.steps
        if z % every_z == 0:
            self.coarse[z // every_z] = ct[::every_y, ::every_x]
        self.counts += np.bincount(ct.ravel().view(np.uint16), minlength=_NUM_UINT16)
        self.num_blank += len(blank_slices(ct[None]))
        if self.ts is not None and ts is not None:
            self.ts[z] = ts
        if rex is not None:
            present = int(np.bitwise_or.reduce(rex, axis=None))
            self.finding_slices += [present >> bit & 1 for bit in range(len(REX_CODES))]
        self.missing.discard(z)

    def content(self) -> VolumeContent:
        """Return what the volume holds, once it has all slices."""
        # bincount took int16 for uint16, in which the negative values come last
        counts = np.roll(self.counts, _NUM_UINT16 // 2)
        hu = np.arange(_NUM_UINT16) - _NUM_UINT16 // 2
        reached = np.cumsum(counts) / counts.sum()
        low, median, high = (float(hu[np.searchsorted(reached, share)]) for share in (0.01, 0.5, 0.99))
        z, y, x = (step * mm for step, mm in zip(self.steps, self.spacing_mm[::-1], strict=True))
        grid = Coarse(self.coarse, (z, y, x))
        measures = measure(grid, (len(self.planes), *self.shape), self.spacing_mm, self.num_blank)
        measures["step"] = greatest_step(self.planes)
        ts = self.ts if self.ts is not None else np.zeros(0, np.uint8)
        if self.ts is not None:
            measures |= measure_organs(self.planes, self.ts, self.shape, self.spacing_mm)
        return VolumeContent(
            measures,
            (low, median, high),
            counts[(hu >= -1024) & (hu < 3072)].reshape(-1, HU_BIN).sum(1),
            organ_voxels(ts),
            self.finding_slices,
        )


def greatest_step(planes: np.ndarray) -> float:
    """Find slices in the wrong place: unlike both neighbours, which are like each other.

    Args:
        planes: ``(Z, H, W)``.

    Returns:
        The greatest ratio, over all slices but the first and last, of the mean absolute change to the nearer
        neighbour to the change between both neighbours; NaN where nothing changes.

    Example:
        >>> ramp = np.arange(5)[:, None, None] * np.ones((1, 2, 2))
        >>> greatest_step(ramp), greatest_step(ramp[[0, 3, 1, 2, 4]])
        (0.5, 2.0)
    """
    small = planes[:, ::2, ::2].astype(np.float32)
    one, two = (
        (np.abs(small[gap:] - small[:-gap]).mean((1, 2)) for gap in (1, 2)) if len(small) > 2 else ([], [])
    )
    nearer, both = np.minimum(one[1:], one[:-1]), np.asarray(two)
    changed = both > 0
    return float((nearer[changed] / both[changed]).max()) if changed.any() else float("nan")
