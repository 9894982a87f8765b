"""Finds body, spine, lungs, windpipe and heart in the voxels alone, whatever a header says.

Slices are canonical: feet to head, rows from front to back, columns from the patient's right to the left.
Shapes: Z slices of a volume; G H W slices, rows and columns of the coarse grid that anatomy is sought on.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

LOOK_MM = (4.0, 3.0, 3.0)
"""About how far apart voxels are looked at (slices, rows, columns). Our choice: a windpipe is 15 mm wide."""

AIR_HU = -500
"""Less is air or lung, more is tissue: half way between them, so that borders fall where they are."""

GAS_HU = -950
"""Most voxels of a windpipe, of bowel gas and of the air around a patient are below, most of a lung above."""

BONE_HU = 150
"""More is bone, or a vessel filled with contrast, which is seldom as long as a spine."""

PADDED_HU = -1024
"""The lowest HU that is kept: all padding is at this, and so is some air."""

MIN_LUNG_CM2, MIN_LUNG_LITRES = 5.0, 0.1
"""Smaller pieces, within a slice and in all, are bowel gas, or air between folds of skin. Our choice."""

SPINE_MM, SPINE_BONE = 15.0, 0.4
"""Side of a square within a vertebra, and the share of it that is bone at least. Our choice."""

AIRWAY_HU, AIRWAY_CM2, AIRWAY_MM = (-700, -850), (0.7, 8.0), 35.0
"""A windpipe's voxels and most of them, its area within a slice, and how far to the side of the spine it lies
at most. Our choice."""

MIN_HEART_LITRES = 0.05
"""Less tissue between the lungs is no heart. Our choice."""

_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


class Coarse(NamedTuple):
    """Every n-th voxel of a volume.

    Args:
        hu: ``(G, H, W)`` int16, in the range that shards keep.
        voxel_mm: size of its voxels as (z, y, x).
    """

    hu: np.ndarray
    voxel_mm: tuple[float, float, float]

    @property
    def litres(self) -> float:
        """Size of a voxel."""
        return math.prod(self.voxel_mm) / 1e6

    @property
    def cm2(self) -> float:
        """Area of a voxel within its slice."""
        return self.voxel_mm[1] * self.voxel_mm[2] / 100


class Anatomy(NamedTuple):
    """What a coarse grid shows.

    Args:
        grid: the coarse grid.
        lungs: ``(G, H, W)`` lung, also where the edge of the image cuts it; empty where there is none.
        box: first and last row, first and last column of the body at the height of the lungs.
        spine: row and column of the spine.
        spine_share: share of the slices that have bone there.
    """

    grid: Coarse
    lungs: np.ndarray
    box: tuple[int, int, int, int]
    spine: tuple[int, int]
    spine_share: float

    @property
    def lung_cm2(self) -> np.ndarray:
        """``(G,)`` area of lung in each slice."""
        return self.lungs.sum((1, 2)) * self.grid.cm2

    @property
    def lung_ends(self) -> tuple[int, int]:
        """First slice with lung and the one after the last."""
        places = np.flatnonzero(self.lungs.any((1, 2)))
        return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def coarse_steps(spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return every how many slices, rows and columns a volume is looked at; spacing as (x, y, z)."""
    x, y, z = (max(1, round(mm / spacing)) for mm, spacing in zip(LOOK_MM[::-1], spacing_mm, strict=True))
    return z, y, x


def coarse_grid(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> Coarse:
    """Take every n-th voxel of ``hu (Z, H, W)``."""
    z, y, x = coarse_steps(spacing_mm)
    voxel_mm = (z * spacing_mm[2], y * spacing_mm[1], x * spacing_mm[0])
    return Coarse(np.ascontiguousarray(hu[::z, ::y, ::x]), voxel_mm)


def find_anatomy(grid: Coarse) -> Anatomy | None:
    """Find body, lungs and spine; None without a body."""
    pieces, sizes = _pieces(ndimage.binary_opening(grid.hu > AIR_HU, _IN_PLANE))
    if not sizes.any():
        return None
    body = pieces == sizes.argmax()
    lungs = _find_lungs(grid, body)
    area = lungs.sum((1, 2))
    at_lungs = body[area >= area.max() / 2]
    rows, columns = (np.flatnonzero(at_lungs.any(axes)) for axes in ((0, 2), (0, 1)))
    if not len(rows):
        return None
    box = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    return Anatomy(grid, lungs, box, *_find_spine(grid, body, box))


def _pieces(mask: np.ndarray, structure: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Number the connected pieces of a mask, and count their voxels; piece 0 is what is none."""
    pieces, number = ndimage.label(mask, structure)
    sizes = np.bincount(pieces.ravel(), minlength=number + 1)
    sizes[0] = 0
    return pieces, sizes


def _pieces_of_air(grid: Coarse, below: int, mostly: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the pieces of air within slices, without padding: area, and whether most of each is a gas."""
    pieces, sizes = _pieces((grid.hu < below) & (grid.hu > PADDED_HU), _IN_PLANE)
    num_gas = np.bincount(pieces[grid.hu < mostly], minlength=len(sizes))
    return pieces, sizes * grid.cm2, num_gas > sizes / 2


def _find_lungs(grid: Coarse, body: np.ndarray) -> np.ndarray:
    """Keep air as dense as lung that has the body in front of it and behind; a table's foam lies behind.

    Where the first or the last row cuts the body, it is taken to go on. The air around a patient is gas.
    """
    pieces, area_cm2, is_gas = _pieces_of_air(grid, AIR_HU, GAS_HU)
    is_lung = np.asarray(~is_gas & (area_cm2 >= MIN_LUNG_CM2))
    air = is_lung[pieces]
    around = body.copy()
    around[:, (0, -1)] |= body[:, (0, -1)].any(2, keepdims=True)
    air &= np.logical_or.accumulate(around, 1)
    air &= np.logical_or.accumulate(around[:, ::-1], 1)[:, ::-1]
    labels, sizes = _pieces(air)
    return np.asarray(sizes * grid.litres >= MIN_LUNG_LITRES)[labels]


def _find_spine(
    grid: Coarse, body: np.ndarray, box: tuple[int, int, int, int]
) -> tuple[tuple[int, int], float]:
    """Find where bone runs along the slices in the middle third of the body; arms lie to its sides."""
    left, right = part_of(box[2:], 1 / 3), part_of(box[2:], 2 / 3)
    size = [1, *(max(1, round(SPINE_MM / mm)) for mm in grid.voxel_mm[1:])]
    bone = ((grid.hu > BONE_HU) & body)[:, :, left : right + 1]
    share = (ndimage.uniform_filter(bone.astype(np.float32), size) >= SPINE_BONE).mean(0)
    core, _ = ndimage.label(share >= 0.7 * share.max())
    row, column = np.argwhere(core == core.flat[share.argmax()]).mean(0)
    return (round(row), round(column) + left), float(share.max())


def part_of(ends: tuple[int, ...], share: float) -> int:
    """Return the index at a share of the way from a first index to a last."""
    return ends[0] + round(share * (ends[1] + 1 - ends[0]))


def airway_at_the_top(anatomy: Anatomy) -> float:
    """Share of slices with a windpipe in the upper third of the lungs, less that in the lower; NaN without.

    A windpipe is a small piece of gas in front of the spine, midway from front to back.
    """
    pieces, area_cm2, is_gas = _pieces_of_air(anatomy.grid, *AIRWAY_HU)
    low, high = AIRWAY_CM2
    is_airway = is_gas & (area_cm2 > low) & (area_cm2 < high)
    first, stop = anatomy.lung_ends
    third = (stop - first) // 3
    if not is_airway.any() or third == 0:
        return math.nan
    places = np.nonzero(is_airway[pieces])
    names = pieces[places]
    number = np.maximum(np.bincount(names), 1)
    slices, rows, columns = (np.bincount(names, place) / number for place in places)
    is_middle = np.abs(columns - anatomy.spine[1]) * anatomy.grid.voxel_mm[2] <= AIRWAY_MM
    is_middle &= (rows > part_of(anatomy.box[:2], 0.3)) & (rows < part_of(anatomy.box[:2], 0.7))
    has_airway = np.zeros(len(pieces), bool)
    has_airway[slices[is_middle].astype(int)] = True
    within = has_airway[first:stop]
    return float(within[-third:].mean() - within[:third].mean()) if within.any() else math.nan


def heart_left_mm(anatomy: Anatomy) -> float:
    """How far the centre of the tissue between the lungs, in front of the spine, is left of the spine.

    At 35 to 55 % of the lungs' height: below comes the dome of the liver. NaN for too little tissue.
    """
    first, stop = anatomy.lung_ends
    part = slice(part_of((first, stop - 1), 0.35), part_of((first, stop - 1), 0.55))
    lung, hu = anatomy.lungs[part, : anatomy.spine[0]], anatomy.grid.hu[part, : anatomy.spine[0]]
    right_of = np.logical_or.accumulate(lung, axis=2)
    left_of = np.logical_or.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1]
    columns = np.nonzero(right_of & left_of & (hu > -200))[2]
    if len(columns) * anatomy.grid.litres < MIN_HEART_LITRES:
        return math.nan
    return float((columns.mean() - anatomy.spine[1]) * anatomy.grid.voxel_mm[2])


def lung_at_the_edges(anatomy: Anatomy) -> float:
    """Share of the lungs' width on the first or last row of the image, where they are largest."""
    area = anatomy.lungs.sum((1, 2))
    lung = anatomy.lungs[area >= area.max() / 2]
    width = int(np.count_nonzero(lung.any((0, 1))))
    on_edges = np.median(lung[:, (0, -1)].sum(2), axis=0)
    return float(on_edges.max()) / max(width, 1)


def lung_on_the_smaller_side(anatomy: Anatomy) -> float:
    """Share of the lungs on that side of the spine which has less of them."""
    of_columns = anatomy.lungs.sum((0, 1))
    right = of_columns[: anatomy.spine[1]].sum() / max(of_columns.sum(), 1)
    return float(min(right, 1 - right))


def width_over_depth(anatomy: Anatomy) -> float:
    """Width of the body over its depth at the height of the lungs."""
    front, back, right, left = anatomy.box
    _, y, x = anatomy.grid.voxel_mm
    return (left + 1 - right) * x / ((back + 1 - front) * y)
