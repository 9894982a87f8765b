"""Draws what surrounds the organs, from the skin to the ribs and the spine, and the outlines of the lungs.

HU are round numbers of the tissue in adults (our choice). Structures are drawn from the outside in, later
ones over earlier ones. One pass over blocks of slices draws everything that fills the whole volume, so that a
block stays in the processor's cache.
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom.anatomy import (
    RIB_TOP_MM,
    TS_IDS,
    VERTEBRA_PITCH_MM,
    VERTEBRA_TOP_MM,
    VERTEBRAE,
    Anatomy,
    body_field,
    cage_field,
    dome_z,
    fissure_distances,
    in_lung,
    lobe_ids,
    lung_box,
    spine_y,
)
from data_prep.phantom.canvas import Canvas, Region
from data_prep.phantom.grid import Box, Floats, Mask, Waves

FAT_HU, SKIN_HU, MUSCLE_HU, CARTILAGE_HU = -105.0, 5.0, 55.0, 115.0
CORTICAL_HU, MARROW_HU, SPONGY_HU, DISC_HU = 750.0, 260.0, 185.0, 75.0
LUNG_HU, LUNG_GRADIENT_HU_PER_MM, LUNG_TEXTURE_HU = -868.0, 0.30, 14.0
BLOCK_SLICES = 8
_LOWERED_ARM = np.array([[172.0, 22, 92], [200, 20, 0], [208, 10, -225]])

# Share of the way from the spine to the sternum at which the bone and the cartilage of each rib end.
_RIB_BONE_END = np.array([0.86, 0.86, 0.85, 0.84, 0.82, 0.80, 0.77, 0.73, 0.69, 0.63, 0.50, 0.36], np.float32)
_RIB_END = np.array([0.97, 0.97, 0.97, 0.97, 0.97, 0.97, 0.95, 0.88, 0.82, 0.74, 0.50, 0.36], np.float32)
_RIB_LEFT = np.array([TS_IDS[f"rib_left_{number}"] for number in range(1, 13)], np.uint8)
_RIB_RIGHT = np.array([TS_IDS[f"rib_right_{number}"] for number in range(1, 13)], np.uint8)


def draw_body(canvas: Canvas, anatomy: Anatomy) -> Mask:
    """Draw body wall, ribs, diaphragm and aerated lungs.

    Returns:
        Where abdominal organs may lie: below the diaphragm, inside the ribs; (Z, Y, X).
    """
    texture = Waves(anatomy.rng(1), 55.0)
    abdomen = np.zeros(canvas.grid.shape, dtype=bool)
    if anatomy.arms_down:
        _draw_lowered_arm(canvas, 1)
        _draw_lowered_arm(canvas, -1)
    num_slices = canvas.grid.shape[0]
    trunk = canvas.grid.box((0, 12, 0), (205 + 1.2 * anatomy.fat_mm, 125 + anatomy.fat_mm, 1))[1:]
    for start in range(0, num_slices, BLOCK_SLICES):
        box = (slice(start, min(start + BLOCK_SLICES, num_slices)), *trunk)
        x, y, z = canvas.grid.offsets(box)
        cage = cage_field(x, y, z)
        _draw_wall(canvas, anatomy, box, cage)
        _draw_ribs(canvas, box, cage)
        inside = cage < 1
        above = z - dome_z(anatomy, x, y)
        canvas.paint(Region(box, inside), hu=FAT_HU + 8)
        canvas.paint(Region(box, inside & (above < 1) & (above > -4)), hu=MUSCLE_HU)
        abdomen[box] = (cage < 0.93) & (above < -3)
    _draw_lungs(canvas, anatomy, texture)
    return abdomen


def _draw_lowered_arm(canvas: Canvas, sign: int) -> None:
    x, y, z = (_LOWERED_ARM[::-1] * np.array([sign, 1, 1])).T
    for thinner, hu in ((0.0, SKIN_HU), (2.0, FAT_HU), (10.0, MUSCLE_HU)):
        canvas.paint(canvas.column(z, x, y, 47 - thinner, 50 - thinner), hu=hu)


def _draw_wall(canvas: Canvas, anatomy: Anatomy, box: Box, cage: Floats) -> None:
    x, y, z = canvas.grid.offsets(box)
    body = body_field(anatomy, x, y, z)
    hu = canvas.hu[box]
    np.copyto(hu, np.float32(SKIN_HU), where=body < 1)
    np.copyto(hu, np.float32(FAT_HU), where=body < np.float32(0.965))
    # Fat is thinner at the shoulders than at the trunk.
    thickness = anatomy.fat_mm * np.interp(z, [40, 110], [1.0, 0.6]).astype(np.float32)
    muscle = body < (1 - thickness / np.float32(118)) ** 4
    np.copyto(hu, np.float32(MUSCLE_HU), where=muscle)
    between = (cage > np.float32(1.95)) & (cage < np.float32(2.25)) & muscle
    np.copyto(hu, np.float32(FAT_HU), where=between)
    np.copyto(hu, np.float32(MUSCLE_HU - 10), where=cage < np.float32(1.42))


def _draw_ribs(canvas: Canvas, box: Box, cage: Floats) -> None:
    """Ribs run down and forward in a shell around the cage; each shell voxel finds its own rib."""
    shell = np.flatnonzero((cage > np.float32(1.03)) & (cage < np.float32(1.47)))
    in_slice = shell % cage[0].size
    x, y = canvas.grid.x[box[1:]].reshape(-1)[in_slice], canvas.grid.y[box[1:]].reshape(-1)[in_slice]
    z = canvas.grid.z[box[0]][shell // cage[0].size]
    # Angle around the chest in units of its half axes: 0 at the back, 1 at the front.
    middle = np.interp(z, [-220, -60, 40, 70, 90, 112], [2, 3, 3, 8, 16, 25]).astype(np.float32)
    across, back = x / np.float32(128), (y - middle) / np.float32(92)
    along = np.arccos(np.clip(back / np.sqrt(across * across + back * back + 1e-9), -1, 1)) / np.float32(
        np.pi
    )
    level = np.clip((RIB_TOP_MM - z) / VERTEBRA_PITCH_MM, 0, 9)
    height = RIB_TOP_MM - z - (40 + 4.5 * level) * along
    number = np.rint(height / VERTEBRA_PITCH_MM).astype(np.intp)
    rib = np.clip(number, 0, 11)
    off = (height - number * np.float32(VERTEBRA_PITCH_MM)) / np.float32(6.5)
    depth = (np.sqrt(np.sqrt(cage.reshape(-1)[shell])) - np.float32(1.052)) * np.float32(21)
    distance = off * off + depth * depth
    exists = (number == rib) & (distance < 1) & (along > np.float32(0.13)) & (along < _RIB_END[rib])
    bone = exists & (along < _RIB_BONE_END[rib])
    gristle = exists & ~bone
    hu, labels = canvas.hu[box], canvas.labels[box]
    where = np.unravel_index(shell[bone], cage.shape)
    hu[where] = np.where(distance[bone] > np.float32(0.4), CORTICAL_HU, MARROW_HU)
    labels[where] = np.where(x[bone] > 0, _RIB_LEFT[rib[bone]], _RIB_RIGHT[rib[bone]])
    where = np.unravel_index(shell[gristle], cage.shape)
    hu[where] = CARTILAGE_HU
    labels[where] = TS_IDS["costal_cartilages"]


def _draw_lungs(canvas: Canvas, anatomy: Anatomy, texture: Waves) -> None:
    whole = lung_box(canvas.grid)
    for start in range(whole[0].start, whole[0].stop, BLOCK_SLICES):
        box = (slice(start, min(start + BLOCK_SLICES, whole[0].stop)), *whole[1:])
        x, y, z = canvas.grid.offsets(box)
        lung = in_lung(anatomy, x, y, z)
        oblique, horizontal = fissure_distances(anatomy, x, y, z)
        hu = texture.on(canvas.grid, box) * np.float32(LUNG_TEXTURE_HU)
        hu += np.float32(LUNG_HU) + np.float32(LUNG_GRADIENT_HU_PER_MM) * y
        # A fissure is thinner than a voxel: it shows by the share of the voxel that it fills.
        width = np.float32(0.5 * max(canvas.grid.voxel))
        fissure = (np.abs(oblique) < width) | ((np.abs(horizontal) < width) & (x < 0) & (oblique > 0))
        hu += fissure * np.float32(min(1.0, 1.2 / max(canvas.grid.voxel)) * 260)
        np.copyto(canvas.hu[box], hu, where=lung)
        np.copyto(canvas.labels[box], lobe_ids(anatomy, x, y, z), where=lung)


def draw_skeleton(canvas: Canvas, anatomy: Anatomy) -> None:
    """Draw back muscles, spine, sternum, shoulder girdle, breasts and lowered arms."""
    for side, sign in (("left", 1), ("right", -1)):
        _draw_back_muscle(canvas, side, sign)
        _draw_scapula(canvas, side, sign)
        _draw_arm(canvas, anatomy, side, sign)
        if anatomy.female:
            _draw_breast(canvas, anatomy, sign)
    _draw_sternum(canvas)
    _draw_spine(canvas)


def _draw_back_muscle(canvas: Canvas, side: str, sign: int) -> None:
    z = np.array([-220, -120, 0, 60, 100, 140.0])
    y = spine_y(z) + np.array([41, 41, 37, 35, 32, 29])
    box, field = canvas.column_field(z, sign * 27.0, y, 21.0, np.array([22, 20, 16, 15, 14, 13.0]))
    outside = cage_field(*canvas.grid.offsets(box)) > np.float32(1.2)
    bones = canvas.labels[box] == 0
    canvas.paint(
        Region(box, (field < 1) & outside & bones), hu=MUSCLE_HU + 3, label=TS_IDS[f"autochthon_{side}"]
    )


def _draw_spine(canvas: Canvas) -> None:
    top, bottom = VERTEBRA_TOP_MM, VERTEBRA_TOP_MM - VERTEBRA_PITCH_MM * len(VERTEBRAE)
    box = canvas.grid.box((0, 70, (top + bottom) / 2), (42, 75, (top - bottom) / 2))
    dx, y, z = canvas.grid.offsets(box)
    dy = y - spine_y(z)
    height = (np.float32(top) - z) / np.float32(VERTEBRA_PITCH_MM)
    ids = np.array([TS_IDS[f"vertebrae_{name}"] for name in VERTEBRAE], np.uint8)
    number = np.clip(height.astype(np.intp), 0, len(VERTEBRAE) - 1)
    label = np.broadcast_to(ids[number], dy.shape)
    part = height - number
    radius = np.interp(z, [-200, 0, 120], [21.5, 16.5, 13.0]).astype(np.float32)
    body = (dx / radius) ** 2 + (dy / (radius * np.float32(0.8))) ** 2
    whole = (part > 0.1) & (part < 0.9)
    canal = (dx / 9) ** 2 + ((dy - radius - 4) / 8) ** 2
    back = dy - radius - 4
    arch = (canal < 2.3) & (part > 0.15) & (part < 0.8)
    slanted = (np.float32(top) - z - np.float32(0.5) * np.maximum(back, 0)) / np.float32(VERTEBRA_PITCH_MM)
    slant = slanted - np.floor(slanted)
    spinous = (np.abs(dx) < 3.6) & (back > 8) & (back < 34) & (slant > 0.3) & (slant < 0.8)
    reach = np.abs(dx)
    transverse = (
        (reach > 9) & (reach < 33) & (np.abs(back - 0.22 * (reach - 9)) < 5.5) & (part > 0.2) & (part < 0.6)
    )
    bone = (body < 1) & whole | arch | spinous | transverse
    beside = (dy > 4) & (np.abs(dx) < 15 + np.float32(0.42) * dy) & (canvas.labels[box] == 0)
    canvas.paint(Region(box, beside & (canvas.hu[box] < 0) & (cage_field(dx, y, z) < 1)), hu=MUSCLE_HU - 8)
    canvas.paint(Region(box, (body < 1) & ~whole), hu=DISC_HU, label=0)
    canvas.paint(Region(box, bone), hu=np.where(arch | spinous | transverse, 420.0, SPONGY_HU), label=None)
    canvas.paint(Region(box, (body < 1) & (body > 0.8) & whole), hu=480.0)
    np.copyto(canvas.labels[box], label, where=bone)
    canvas.paint(Region(box, np.broadcast_to(canal < 1, dy.shape)), hu=8.0, label=0)
    canvas.paint(Region(box, np.broadcast_to(canal < 0.38, dy.shape)), hu=38.0, label=TS_IDS["spinal_cord"])


def _draw_sternum(canvas: Canvas) -> None:
    z = np.array([-62, -45, 30, 44, 52, 76.0])
    width = np.array([9, 17, 16, 14, 22, 28.0])
    y = np.array([-97, -96, -84, -80, -76, -66.0])
    for shrink, hu in ((1.0, 430.0), (0.72, 190.0)):
        region = canvas.column(z, 0.0, y, width * shrink, 7.5 * shrink)
        canvas.paint(region, hu=hu, label=TS_IDS["sternum"])


def polyline(points: NDArray[np.floating], step_mm: float) -> NDArray[np.float64]:
    """Points (N, 3) about ``step_mm`` apart along straight lines through ``points`` (M, 3)."""
    knots = np.asarray(points, float)
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
    at = np.linspace(0, length[-1], max(2, int(length[-1] / step_mm) + 2))
    return np.stack([np.interp(at, length, knots[:, axis]) for axis in range(3)], axis=1)


def draw_tube(
    canvas: Canvas, points: NDArray[np.floating], radius_mm: float, hu: float, label: int | None = None
) -> Region:
    """Draw a tube of one radius along straight lines through points (M, 3) in patient mm."""
    step = max(0.5 * canvas.grid.voxel[2], radius_mm / 4)
    return canvas.stamp(polyline(points, step), radius_mm, hu, label=label)


def _draw_scapula(canvas: Canvas, side: str, sign: int) -> None:
    """A blade behind the ribs, broad at the shoulder and pointed below, and its spine."""
    label = TS_IDS[f"scapula_{side}"]
    box = canvas.grid.box((sign * 120, 75, 45), (62, 60, 75))
    x, y, z = canvas.grid.offsets(box)
    start, end = np.array([sign * 68.0, 112.0]), np.array([sign * 150.0, 46.0])
    length = float(np.linalg.norm(end - start))
    ux, uy = (end - start) / length
    along = (x - start[0]) * ux + (y - start[1]) * uy
    # The blade follows the curve of the chest and thickens towards the joint.
    off = (
        (y - start[1]) * ux - (x - start[0]) * uy + sign * 0.0022 * (along - 0.5 * length) ** 2 * 4 - sign * 9
    )
    thick = np.float32(2.6) + 5.5 * np.clip((along / length - 0.72) / 0.28, 0, 1)
    begin = np.interp(z, [-28, 20, 100], [62, 12, 22]).astype(np.float32)
    blade = (np.abs(off) < thick) & (along > begin) & (along < length) & (z > -28) & (z < 105)
    ridge = (np.abs(off * sign - 0.0) < 22) & (np.abs(along - 62) < 30) & (np.abs(z - 82 - 0.2 * along) < 5)
    ridge &= (off * sign < 0) if sign > 0 else (off * sign < 0)
    region = Region(box, blade | ridge)
    canvas.paint(region, hu=np.where(np.abs(off) < thick - 2.2, 280.0, 560.0), label=label)


def _draw_arm(canvas: Canvas, anatomy: Anatomy, side: str, sign: int) -> None:
    label = TS_IDS[f"humerus_{side}"]
    collar = np.array([[13, -62, 78], [45, -66, 88], [95, -40, 108], [150, -4, 116]]) * np.array([sign, 1, 1])
    clavicle = TS_IDS[f"clavicula_{side}"]
    draw_tube(canvas, collar, 6.5, 620.0, clavicle)
    draw_tube(canvas, collar, 3.2, 300.0, clavicle)
    if anatomy.arms_down:
        shaft = _LOWERED_ARM * np.array([sign, 1, 1])
    else:
        shaft = np.array([[sign * 164.0, 20, 108], [sign * 172.0, 12, 190]])
    draw_tube(canvas, shaft, 10.5, 900.0, label)
    draw_tube(canvas, shaft, 5.5, 60.0, label)
    for shrink, hu in ((1.0, 520.0), (0.85, 230.0)):
        canvas.paint(canvas.ellipsoid(shaft[0], np.array([22, 22, 24]) * shrink), hu=hu, label=label)


def _draw_breast(canvas: Canvas, anatomy: Anatomy, sign: int) -> None:
    front = -88 - 0.75 * anatomy.fat_mm
    size = 0.7 + 0.022 * anatomy.fat_mm
    box, field = canvas.ellipsoid_field((sign * 86.0, front, -34.0), (60, 26 * size, 58), sign * 22.0)
    outside = canvas.hu[box] < -900
    canvas.paint(Region(box, (field < 1) & outside), hu=SKIN_HU)
    canvas.paint(Region(box, (field < 0.93) & outside), hu=FAT_HU)
    outer = canvas.hu[box] < -60
    gland = Waves(anatomy.rng(2), 16.0).on(canvas.grid, box)
    canvas.paint(Region(box, (field < 0.5) & outer & (gland > 0.25)), hu=25.0)
