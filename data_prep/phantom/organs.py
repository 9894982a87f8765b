"""Draws the organs of mediastinum and upper abdomen; also the head in scans that are no chest CT.

Positions and sizes are those of an average adult (our choice, see :mod:`data_prep.phantom.anatomy`).
"""

import numpy as np

from data_prep.phantom.anatomy import HEART_ANGLE_DEG, HEART_LEAN, PERICARDIUM, TS_IDS, Anatomy, cage_field
from data_prep.phantom.body import FAT_HU, MUSCLE_HU, draw_tube
from data_prep.phantom.canvas import Canvas, Region
from data_prep.phantom.grid import Box, Floats, Mask

AIR_HU = -1000.0
# Name, centre (x, y, z), half axes, turn in degrees, HU. Later ones lie over earlier ones.
_ABDOMEN: tuple[tuple[str, tuple[float, float, float], tuple[float, float, float], float, float], ...] = (
    ("liver", (-52, -6, -165), (98, 90, 95), 0, 58),
    ("liver", (18, -48, -135), (62, 34, 42), -8, 58),
    ("spleen", (88, 40, -138), (28, 46, 46), 20, 48),
    ("stomach", (50, -26, -146), (44, 40, 48), 25, 42),
    ("colon", (96, -42, -186), (26, 26, 26), 0, 35),
    ("small_bowel", (42, -52, -218), (40, 26, 18), 0, 38),
    ("gallbladder", (-52, -58, -196), (15, 17, 22), 30, 12),
    ("duodenum", (-24, -16, -204), (16, 13, 26), 0, 38),
    ("pancreas", (14, -4, -192), (56, 11, 13), 14, 40),
    ("kidney_right", (-58, 46, -214), (26, 22, 46), 35, 33),
    ("kidney_left", (58, 46, -202), (26, 22, 46), -35, 33),
    ("adrenal_gland_right", (-26, 32, -164), (5, 15, 11), 12, 18),
    ("adrenal_gland_left", (30, 33, -160), (5, 16, 12), -12, 18),
)
# Arch of the aorta: axial positions of ascending and descending limb, and the height of the arch's axis.
_ASCENDING, _DESCENDING, _ARCH_Z = np.array([-8.0, -28.0]), np.array([32.0, 40.0]), 1.0
AORTA_DOWN = {
    "z": np.array([-222, -170, -120, -60, _ARCH_Z]),
    "x": np.array([4, 7, 13, 24, 32.0]),
    "y": np.array([12, 17, 28, 37, 40.0]),
    "radius": np.array([9.5, 10.5, 11, 12, 12.5]),
}


def draw_abdomen(canvas: Canvas, anatomy: Anatomy, abdomen: Mask) -> None:
    """Draw the organs below the diaphragm.

    Args:
        canvas: the scan.
        anatomy: the patient.
        abdomen: where organs may lie (:func:`data_prep.phantom.body.draw_body`).
    """
    contrast = max(0.0, anatomy.blood_hu[2] - 42)
    for name, center, axes, angle, hu in _ABDOMEN:
        lift = 0.35 * anatomy.dome_mm[0 if center[0] < 0 else 1]
        box, field = canvas.ellipsoid_field((center[0], center[1], center[2] + lift), axes, angle)
        value = hu + contrast * (
            0.55 if name.startswith("kidney") else 0.2 if name in ("liver", "spleen") else 0.0
        )
        canvas.paint(Region(box, (field < 1) & abdomen[box]), hu=value, label=TS_IDS[name])
        if name in ("stomach", "colon", "small_bowel"):
            _fill_hollow(canvas, anatomy, box, field, abdomen)
    vein = np.array([[-34, -10, -158], [-12, -6, -178], [12, 0, -188], [60, 26, -176.0]])
    draw_tube(canvas, vein, 5.5, 44 + 0.4 * contrast, TS_IDS["portal_vein_and_splenic_vein"])


def _fill_hollow(canvas: Canvas, anatomy: Anatomy, box: Box, field: Floats, abdomen: Mask) -> None:
    """Draw gas over fluid: the patient lies on the back, so gas gathers in front."""
    cavity = (field < 0.74) & abdomen[box]
    y = canvas.grid.y[box[1:]][None]
    rows = np.flatnonzero(cavity.any(axis=(0, 2)))
    if len(rows) == 0:
        return
    front = float(y[0, rows[0]].min())
    canvas.paint(Region(box, cavity), hu=18.0)
    canvas.paint(Region(box, cavity & (y < front + anatomy.gas_mm)), hu=AIR_HU + 20)


def draw_mediastinum(canvas: Canvas, anatomy: Anatomy) -> None:
    """Draw heart, great vessels, trachea and main bronchi, oesophagus and thyroid gland."""
    _draw_heart(canvas, anatomy)
    right, left, aorta = anatomy.blood_hu
    venous = 0.7 * right + 0.3 * 42
    _draw_pulmonary_vessels(canvas, right, left)
    _draw_aorta(canvas, aorta)
    _draw_great_vessels(canvas, aorta, venous)
    gullet = canvas.column(
        [-125, -60, 0, 60, 135], [12, 8, 4, 2, 0], [18, 30, 33, 33, 26], 8.5, [7.5, 7.5, 6, 6, 6]
    )
    canvas.paint(gullet, hu=40.0, label=TS_IDS["esophagus"])
    canvas.paint(canvas.column([-40, 10, 60], [7, 4, 2], [28, 32, 32], 2.4, 1.8), hu=-700.0)
    for sign in (1, -1):
        gland = canvas.ellipsoid((sign * 18.0, 3.0, 124.0), (9, 11, 19))
        canvas.paint(gland, hu=105.0, label=TS_IDS["thyroid_gland"])
    _draw_trachea(canvas)


def _draw_heart(canvas: Canvas, anatomy: Anatomy) -> None:
    center, axes = anatomy.heart_center, anatomy.heart_axes
    right, left, _ = anatomy.blood_hu
    muscle = 50 + 0.3 * (left - 42)
    box, field = canvas.ellipsoid_field(center, axes, HEART_ANGLE_DEG, HEART_LEAN, margin=1.1)
    fat = (field < np.float32(PERICARDIUM)) & (cage_field(*canvas.grid.offsets(box)) < 1)
    canvas.paint(Region(box, fat & (field > PERICARDIUM - 0.025)), hu=25.0, label=0)
    canvas.paint(Region(box, fat & (field <= PERICARDIUM - 0.025)), hu=FAT_HU + 12, label=0)
    canvas.paint(Region(box, field < 1), hu=muscle, label=TS_IDS["heart"])
    dx, dy, dz = canvas.grid.offsets(box, center)
    angle = np.deg2rad(HEART_ANGLE_DEG)
    along = (np.cos(angle) * dx + np.sin(angle) * dy) / np.float32(axes[0])
    across = (np.cos(angle) * dy - np.sin(angle) * dx) / np.float32(axes[1])
    height = (dz + HEART_LEAN * along * np.float32(axes[0])) / np.float32(axes[2])
    for place, size, blood in (
        ((0.28, 0.28, -0.05), (0.50, 0.40, 0.52), left),
        ((0.12, -0.52, -0.10), (0.56, 0.28, 0.56), right),
        ((-0.50, 0.38, 0.22), (0.34, 0.42, 0.46), left),
        ((-0.46, -0.36, 0.05), (0.34, 0.40, 0.60), right),
    ):
        (u, v, w), (a, b, c) = place, size
        chamber = ((along - u) / a) ** 2 + ((across - v) / b) ** 2 + ((height - w) / c) ** 2
        canvas.paint(Region(box, (chamber < 1) & (field < 0.9)), hu=blood)
    # The grooves between atria and ventricles and between the ventricles hold fat, and the coronary arteries.
    groove = (np.abs(along + 0.12) < 0.05) | ((np.abs(across + 0.14 - 0.1 * height) < 0.05) & (along > -0.1))
    canvas.paint(Region(box, groove & (field < 1) & (field > 0.83)), hu=FAT_HU + 25)
    ear = center + np.array([16.0, 8.0, 34.0])
    canvas.paint(canvas.ellipsoid(ear, (13, 9, 10), -30), hu=left, label=TS_IDS["atrial_appendage_left"])


def _draw_pulmonary_vessels(canvas: Canvas, right: float, left: float) -> None:
    for points, radius in (
        ([[10, -48, -36], [17, -32, -16], [16, -12, -11]], 13.0),
        ([[16, -12, -11], [34, 4, -10], [50, 14, -14]], 10.0),
        ([[16, -10, -14], [-10, -2, -18], [-44, 5, -20]], 9.5),
    ):
        draw_tube(canvas, np.array(points, float), radius, right, 0)
    for sign, inner in ((1, 24.0), (-1, -16.0)):
        for vein in (
            [[inner, 8, -40], [sign * 42.0, 2, -30], [sign * 56.0, -4, -18]],
            [[inner, 12, -52], [sign * 44.0, 18, -58], [sign * 58.0, 24, -68]],
        ):
            draw_tube(canvas, np.array(vein), 6.0, left, TS_IDS["pulmonary_vein"])


def _draw_aorta(canvas: Canvas, hu: float) -> None:
    label = TS_IDS["aorta"]
    canvas.paint(canvas.column([-48, -30, _ARCH_Z], [0, -7, -8], [-20, -26, -28], 15, 15), hu=hu, label=label)
    down = canvas.column(
        AORTA_DOWN["z"], AORTA_DOWN["x"], AORTA_DOWN["y"], AORTA_DOWN["radius"], AORTA_DOWN["radius"]
    )
    canvas.paint(down, hu=hu, label=label)
    middle, span = (_ASCENDING + _DESCENDING) / 2, _DESCENDING - _ASCENDING
    reach = float(np.linalg.norm(span)) / 2
    box = canvas.grid.box((*middle, _ARCH_Z + 28), (40, 52, 28))
    dx, dy, dz = canvas.grid.offsets(box, (*middle, _ARCH_Z))
    ux, uy = span / (2 * reach)
    along, aside = dx * ux + dy * uy, dy * ux - dx * uy
    ring = np.sqrt(along * along + (1.25 * dz) ** 2) - np.float32(reach)
    radius = np.float32(13.5) - along * np.float32(0.03)
    canvas.paint(Region(box, (ring * ring + aside * aside < radius * radius) & (dz >= 0)), hu=hu, label=label)


def _draw_great_vessels(canvas: Canvas, arterial: float, venous: float) -> None:
    for name, points, radius in (
        ("brachiocephalic_trunk", [[-3, -18, 34], [-14, -8, 52], [-26, -2, 80]], 6.5),
        ("common_carotid_artery_right", [[-26, -2, 80], [-30, 0, 110], [-28, 2, 150]], 4.0),
        ("subclavian_artery_right", [[-26, -2, 80], [-52, 6, 100], [-100, -8, 108]], 5.0),
        ("common_carotid_artery_left", [[6, -4, 38], [18, 2, 80], [28, 2, 150]], 4.0),
        ("subclavian_artery_left", [[20, 16, 38], [30, 18, 84], [54, 8, 104], [100, -8, 108]], 5.0),
    ):
        draw_tube(canvas, np.array(points, float), radius, arterial, TS_IDS[name])
    for name, points, radius in (
        ("brachiocephalic_vein_left", [[52, -38, 92], [22, -46, 72], [-24, -28, 48]], 6.5),
        ("brachiocephalic_vein_right", [[-46, -34, 94], [-34, -28, 72], [-28, -24, 48]], 6.5),
    ):
        draw_tube(canvas, np.array(points, float), radius, venous, TS_IDS[name])
    upper = canvas.column([-38, 0, 50], [-27, -31, -28], [-8, -16, -25], 10, [10, 9, 9])
    canvas.paint(upper, hu=venous, label=TS_IDS["superior_vena_cava"])
    lower = canvas.column([-222, -160, -85], [-24, -24, -20], [16, 12, 4], 12, 10)
    canvas.paint(lower, hu=0.5 * venous + 21, label=TS_IDS["inferior_vena_cava"])
    draw_tube(
        canvas, np.array([[-8, 36, -120], [-9, 40, 0], [-20, 20, 12], [-30, -10, 10.0]]), 3.6, venous, 0
    )


def _draw_trachea(canvas: Canvas) -> None:
    z, x, y = np.array([[-2, 20, 60, 100, 165], [-4, -6, -3, 0, 0], [20, 18, 14, 9, -2.0]])
    bronchi = (
        (np.array([[-4, 20, 1], [-20, 19, -13], [-40, 17, -25.0]]), 6.8),
        (np.array([[-4, 20, 1], [18, 21, -14], [44, 19, -30.0]]), 6.0),
    )
    label = TS_IDS["trachea"]
    canvas.paint(canvas.column(z, x, y, 10.5, 10.5), hu=MUSCLE_HU - 15, label=0)
    for points, radius in bronchi:
        draw_tube(canvas, points, radius + 1.5, MUSCLE_HU - 25, 0)
    canvas.paint(canvas.column(z, x, y, 8.8, 9.0), hu=AIR_HU + 15, label=label)
    for points, radius in bronchi:
        draw_tube(canvas, points, radius, AIR_HU + 20, label)


def draw_head(canvas: Canvas) -> None:
    """Draw a head instead of a chest: these scans are what the no_chest list is for."""
    for name, axes, hu in (
        ("", (82, 100, 112), 40.0),
        ("skull", (76, 94, 106), 900.0),
        ("brain", (70, 88, 99), 34.0),
    ):
        canvas.paint(canvas.ellipsoid((0.0, 0.0, 0.0), axes), hu=hu, label=TS_IDS.get(name, 0))
    for sign in (1, -1):
        canvas.paint(canvas.ellipsoid((sign * 14.0, 4.0, 10.0), (7, 26, 14), sign * -15.0), hu=8.0)
