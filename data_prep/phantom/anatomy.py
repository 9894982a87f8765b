"""Analytic anatomy of the synthetic chest: where cage, lungs, lobes, diaphragm, heart and vessels lie.

Everything here is a function of patient coordinates (see :mod:`data_prep.phantom.canvas`), of broadcast
arrays or of single points alike, so the same lung that is drawn on a grid can be asked where a lesion may
sit. Dimensions in millimetres are those of an average adult in supine position, rounded (our choice, by eye
against public chest CT); a patient differs by scale, fat, heart size, diaphragm level and small shifts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.cohort.cohort import load_labels
from data_prep.phantom.grid import Box, Floats, Grid, Mask

TS_IDS = {label.name: label.index for label in load_labels("totalsegmentator")}
LOBES = (
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
)
IS_LUNG = np.isin(np.arange(len(TS_IDS)), [TS_IDS[lobe] for lobe in LOBES])
VERTEBRAE = ("C7", *(f"T{number}" for number in range(1, 13)), "L1", "L2")

# Knots along z of the shape tables below; between them values are interpolated.
_CAGE_Z = np.array([-220, -170, -120, -60, 0, 40, 70, 90, 103, 112.0])
_CAGE = {
    "half_width": np.array([128, 132, 133, 130, 122, 107, 88, 66, 42, 18.0]),
    "half_depth": np.array([92, 97, 98, 95, 86, 73, 58, 45, 32, 16.0]),
    "center_y": np.array([2, 3, 4, 3, 1, 3, 8, 16, 22, 25.0]),
}
_BODY_Z = np.array([-220, -120, -60, 0, 40, 70, 95, 115, 140, 170.0])
_BODY = {
    "half_width": np.array([148, 152, 153, 154, 164, 178, 186, 180, 150, 90.0]),
    "half_depth": np.array([111, 115, 115, 111, 104, 97, 90, 83, 74, 66.0]),
    "center_y": np.array([5, 5, 5, 8, 12, 17, 21, 23, 22, 20.0]),
}
SPINE_Z = np.array([-220, -170, -120, -60, 0, 60, 100, 125, 160.0])
SPINE_Y = np.array([37, 42, 49, 56, 57, 49, 36, 26, 18.0])
VERTEBRA_TOP_MM = 131.0
VERTEBRA_PITCH_MM = 22.5
RIB_TOP_MM = 104.0
# Lowest and highest (x, y, z) of any lung with a diaphragm up to 35 mm below the average.
LUNG_BOX = np.array([[-134.0, -96.0, -225.0], [134.0, 100.0, 111.0]])


@dataclass(frozen=True)
class Anatomy:
    """What makes one patient's chest, in one scan, differ from the average.

    Args:
        female: breasts are drawn.
        fat_mm: thickness of the subcutaneous fat.
        heart_scale: size of the heart relative to 0.42 of the chest's width; 1.25 and more is cardiomegaly.
        dome_mm: height of the right and the left half of the diaphragm relative to the average (inspiration).
        fissure_mm: shift of the right and the left oblique fissure.
        arms_down: arms lie beside the body and not above the head.
        blood_hu: HU of the right heart, the left heart and the aorta: equal without contrast medium.
        gas_mm: radius of the gas bubble in the stomach.
        seed: entropy of everything else (vessel tree, textures).
    """

    female: bool = False
    fat_mm: float = 15.0
    heart_scale: float = 1.0
    dome_mm: tuple[float, float] = (0.0, 0.0)
    fissure_mm: tuple[float, float] = (0.0, 0.0)
    arms_down: bool = False
    blood_hu: tuple[float, float, float] = (42.0, 42.0, 42.0)
    gas_mm: float = 16.0
    seed: tuple[int, ...] = (0,)

    def rng(self, *purpose: int) -> np.random.Generator:
        """Random generator for one purpose; the same in every reconstruction of the scan."""
        return np.random.default_rng([*self.seed, *purpose])

    @property
    def heart_center(self) -> NDArray[np.float64]:
        """Centre (x, y, z); a larger heart grows to the left and towards the front."""
        grown = self.heart_scale - 1
        return np.array([13.0 + 20 * grown, -22.0 - 4 * grown, -62.0 + 0.25 * self.dome_mm[1]])

    @property
    def heart_axes(self) -> NDArray[np.float64]:
        """Half axes along the heart's axis (to the front left), across it, and along z."""
        return np.array([63.0, 47.0, 49.0]) * np.array(
            [self.heart_scale, self.heart_scale, self.heart_scale**0.5]
        )

    def heart_field(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Below 1 inside the heart; equals the field of the ellipsoid that draws it."""
        (cx, cy, cz), (along, across, height) = self.heart_center, self.heart_axes
        angle = np.deg2rad(HEART_ANGLE_DEG)
        first = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
        second = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
        lowered = z - cz + HEART_LEAN * first
        field: Floats = (first / along) ** 2 + (second / across) ** 2 + (lowered / height) ** 2
        return field


HEART_ANGLE_DEG = -38.0
HEART_LEAN = 0.3
# Heart field on the outside of the pericardium.
PERICARDIUM = 1.14


def _table(table: dict[str, NDArray[np.float64]], knots: NDArray[np.float64], z: Floats) -> list[Floats]:
    return [
        np.interp(z, knots, table[key]).astype(np.float32) for key in ("half_width", "half_depth", "center_y")
    ]


def _superellipse(
    x: Floats, y: Floats, width: Floats, depth: Floats, middle: Floats, squareness: float
) -> Floats:
    """Fourth power of the distance in units of the radius; squareness 2 is an ellipse, 0 a box."""
    u = np.square(x) * np.square(1 / width)
    v = np.square(y - middle) * np.square(1 / depth)
    field: Floats = u * u + v * v + np.float32(squareness) * (u * v)
    return field


def cage_field(x: Floats, y: Floats, z: Floats) -> Floats:
    """Fourth power of the relative distance from the chest's axis: 1 on the inner surface of the ribs."""
    width, depth, middle = _table(_CAGE, _CAGE_Z, z)
    return _superellipse(x, y, width, depth, middle, 1.5)


def back_distance(y: Floats, z: Floats) -> Floats:
    """Distance in mm, towards the front, from the rearmost point inside the ribs at this height."""
    _, depth, middle = _table(_CAGE, _CAGE_Z, z)
    return middle + depth - y


def body_field(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> Floats:
    """Fourth power of the relative distance from the body's axis: 1 on the skin."""
    width, depth, middle = _table(_BODY, _BODY_Z, z)
    extra = np.float32(anatomy.fat_mm - 12)
    depth = depth + np.float32(0.8) * extra
    field = _superellipse(x, y, width + np.float32(1.1) * extra, depth, middle, 1.1)
    # The patient lies on the back, which the table flattens.
    flat = np.maximum(y - middle, 0) / (np.float32(0.975) * depth)
    flat *= flat
    flattened: Floats = np.maximum(field, flat * flat)
    return flattened


def spine_y(z: Floats) -> Floats:
    """Y of the vertebral bodies' centres."""
    return np.interp(z, SPINE_Z, SPINE_Y).astype(np.float32)


def dome_z(anatomy: Anatomy, x: Floats, y: Floats) -> Floats:
    """Height of the diaphragm above each point of the axial plane; the right half stands higher."""
    right = x < 0
    level = np.where(right, -87 + anatomy.dome_mm[0], -99 + anatomy.dome_mm[1])
    drop = 60 * ((np.abs(x) - 58) / 72) ** 2 + 76 * ((y + 14) / 98) ** 2
    return (level - drop).astype(np.float32)


def mediastinum(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> Mask:
    """Inside the space between the lungs: column of vessels and fat, heart with pericardium, spine."""
    back = spine_y(z)
    half = np.interp(z, [-200, -110, -60, -15, 25, 60, 85, 112], [26, 29, 30, 28, 27, 31, 35, 28]).astype(
        np.float32
    )
    # Narrow in front, where the lungs almost meet, and rounded towards the spine.
    front = np.clip((y + np.float32(92)) / np.float32(88), np.float32(0.2), 1)
    narrowed = half * front * np.sqrt(np.clip((back + 4 - y) / np.float32(30), 0, 1))
    column = np.abs(x - np.float32(3)) < narrowed
    behind = y - back
    spine = (x / np.float32(25)) ** 2 + (behind / np.float32(23)) ** 2 < 1
    # Behind the vertebral body the roots of the ribs keep the lungs apart.
    arches = (np.abs(x) < 15 + np.float32(0.42) * behind) & (behind > 0)
    return column | spine | arches | (anatomy.heart_field(x, y, z) < np.float32(PERICARDIUM))


def in_lung(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> Mask:
    """Inside of either lung."""
    inside = (cage_field(x, y, z) < 1) & (z > dome_z(anatomy, x, y)) & (z < 110)
    return inside & ~mediastinum(anatomy, x, y, z)


def fissure_distances(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> tuple[Floats, Floats]:
    """Height in mm above the oblique fissure of the point's own lung, and above the horizontal fissure."""
    shift = np.where(x < 0, anatomy.fissure_mm[0], anatomy.fissure_mm[1] + 6)
    oblique = z - (np.float32(0.95) * y - 26 + shift + 5 * np.sin(x / 23))
    horizontal = z - (-24 + 0.5 * anatomy.fissure_mm[0] + 4 * np.sin(y / 21) + 0.06 * x)
    return oblique.astype(np.float32), horizontal.astype(np.float32)


def lobe_ids(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> NDArray[np.uint8]:
    """TotalSegmentator id of the lobe of points in the lungs."""
    oblique, horizontal = fissure_distances(anatomy, x, y, z)
    upper_left, lower_left, upper_right, middle_right, lower_right = (
        np.uint8(TS_IDS[lobe]) for lobe in LOBES
    )
    right = np.where(oblique < 0, lower_right, np.where(horizontal < 0, middle_right, upper_right))
    return np.where(x < 0, right, np.where(oblique < 0, lower_left, upper_left)).astype(np.uint8)


def lung_points(
    anatomy: Anatomy, rng: np.random.Generator, num_points: int, max_cage_field: float = 0.9
) -> NDArray[np.float64]:
    """Random points (N, 3) in the lungs, evenly spread.

    Args:
        anatomy: the patient.
        rng: source of the points.
        num_points: number of points.
        max_cage_field: values below 1 keep away from the ribs (:func:`cage_field`).
    """
    found: list[NDArray[np.float64]] = []
    count = 0
    while count < num_points:
        points = rng.uniform(LUNG_BOX[0], LUNG_BOX[1], (4 * num_points + 64, 3))
        x, y, z = points.T.astype(np.float32)
        keep = in_lung(anatomy, x, y, z) & (cage_field(x, y, z) < max_cage_field)
        found.append(points[keep])
        count += int(keep.sum())
    return np.concatenate(found)[:num_points]


def lung_box(grid: Grid, side: int = 0) -> Box:
    """Voxel box of both lungs (side 0), of the left one (1) or of the right one (-1)."""
    low, high = LUNG_BOX.copy()
    if side > 0:
        low[0] = 0.0
    elif side < 0:
        high[0] = 0.0
    return grid.box((low + high) / 2, (high - low) / 2)


def lobe_name(anatomy: Anatomy, point: NDArray[np.floating]) -> str:
    """Name of the lobe at a point, as a radiologist writes it: "right upper lobe"."""
    x, y, z = np.asarray(point, np.float32)[:, None]
    return LOBE_WORDS[int(lobe_ids(anatomy, x, y, z)[0])]


LOBE_WORDS = {
    TS_IDS[lobe]: f"{side} {part} lobe"
    for lobe in LOBES
    for part, side in [(lobe.split("_")[1], lobe.rsplit("_", maxsplit=1)[-1])]
}
