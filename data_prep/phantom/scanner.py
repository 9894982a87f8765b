"""How the phantom is scanned: sites, protocols, and what the machine makes of the drawing.

Ranges are our choice, of the order met in clinical chest CT. The two sites differ on purpose in kernel,
noise, spacing, bias, contrast medium, table and storage, to study generalisation to another scanner.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Floats, Grid
from data_prep.phantom.population import Person, ScanId

STORED_RANGE_HU = (-1024, 3071)
BLOCK_SLICES = 8
# From the adrenal glands to above the apices, give or take a few slices.
SCAN_BOTTOM_MM, SCAN_TOP_MM, SCAN_MARGIN_MM = -197.0, 124.0, 12.0


class Kernel(NamedTuple):
    """A reconstruction kernel.

    Attributes:
        name: for the metadata.
        blur: share of the neighbours in the image; 0 keeps every edge as drawn.
        texture: the same for the noise: positive is smooth, negative is sharpened.
        noise: noise relative to the site's.
    """

    name: str
    blur: float
    texture: float
    noise: float


class Site(NamedTuple):
    """A scanner site.

    Attributes:
        manufacturer: for the metadata; never a real one.
        kernels: those in use.
        noise_hu: range of the standard deviation at 2.5 mm slices, in the middle of an average body.
        slice_mm: range of the slice distance where the command line gives none.
        margin: range of the field of view's width relative to the body's.
        bias_hu: constant error of calibration.
        contrast_prob: share of scans with contrast medium.
        axcodes: orientations in which volumes are stored.
        table_curve_mm: radius of the table's curve.
    """

    manufacturer: str
    kernels: tuple[Kernel, ...]
    noise_hu: tuple[float, float]
    slice_mm: tuple[float, float]
    margin: tuple[float, float]
    bias_hu: float
    contrast_prob: float
    axcodes: tuple[str, ...]
    table_curve_mm: float


SITES = {
    "a": Site(
        "SYNTHETIC PHANTOM A",
        (Kernel("PHANTOM_SOFT", 0.20, 0.12, 0.8), Kernel("PHANTOM_LUNG", 0.10, -0.10, 1.5)),
        (9.0, 20.0), (1.0, 5.0), (1.0, 1.18), 0.0, 0.25, ("LPS",), 620.0,
    ),
    "b": Site(
        "SYNTHETIC PHANTOM B",
        (Kernel("PHANTOM_SHARP", 0.04, -0.16, 1.4), Kernel("PHANTOM_STANDARD", 0.15, 0.0, 1.0)),
        (15.0, 30.0), (1.0, 3.0), (1.1, 1.35), 14.0, 0.5, ("RAS", "LAS"), 1400.0,
    ),
}  # fmt: skip


KERNELS = {kernel.name: kernel for site in SITES.values() for kernel in site.kernels}
"""The kernels of both sites."""


class Redraw(NamedTuple):
    """How the same patients are scanned otherwise, to check changes of a scan against scans drawn so.

    Attributes:
        kernel: name of one of ``KERNELS``; None for each scan's own.
        dose: share of each scan's own dose; the variance of noise is inversely proportional to it.
        table: whether the table is there.
    """

    kernel: str | None = None
    dose: float = 1.0
    table: bool = True


class Protocol(NamedTuple):
    """How one volume is taken and stored.

    Attributes:
        kernel: the reconstruction kernel.
        noise_hu: standard deviation of the noise in the middle of the body.
        slice_mm: distance of slices.
        pixel_mm: in-plane spacing.
        num_slices: slices.
        bottom_mm: scanner z of the lowest slice.
        circle: voxels outside the round field of view are padded with the intercept.
        bias_hu: constant error.
        intercept: RescaleIntercept of the raw form.
        axcodes: orientation of the stored volume.
        table_curve_mm: radius of the table's curve.
        is_enhanced: contrast medium was given.
    """

    kernel: Kernel
    noise_hu: float
    slice_mm: float
    pixel_mm: float
    num_slices: int
    bottom_mm: float
    circle: bool
    bias_hu: float
    intercept: int
    axcodes: str
    table_curve_mm: float
    is_enhanced: bool


def draw_protocol(
    scan: ScanId, person: Person, site: Site, matrix: int, slice_mm: tuple[float, float] | None
) -> Protocol:
    """Draw how a volume is taken.

    Args:
        scan: the volume.
        person: patient whom the field of view must hold.
        site: scanner site.
        matrix: rows and columns.
        slice_mm: range of the slice distance; None for the site's own.
    """
    rng = scan.reconstruction_rng(1)
    kernel = site.kernels[(scan.reconstruction - 1 + int(rng.random() < 0.35)) % len(site.kernels)]
    low, high = slice_mm or site.slice_mm
    distance = round(float(rng.uniform(low, high)), 2)
    body_mm = 2 * (154 + 1.1 * (person.anatomy.fat_mm - 12)) * person.pose.scale[0]
    field_mm = float(np.clip(body_mm * rng.uniform(*site.margin), 290, 500))
    visit = scan.scan_rng(4)
    margins = visit.uniform(-SCAN_MARGIN_MM, SCAN_MARGIN_MM, 2)
    bottom = (SCAN_BOTTOM_MM + float(margins[0])) * person.pose.scale[2]
    length = (SCAN_TOP_MM + float(margins[1])) * person.pose.scale[2] - bottom
    stoutness = 1.012 ** (person.anatomy.fat_mm - 15)
    noise = (
        rng.uniform(*site.noise_hu)
        * kernel.noise
        * stoutness
        * float(np.clip((2.5 / distance) ** 0.5, 0.7, 1.5))
    )
    return Protocol(
        kernel=kernel,
        noise_hu=float(noise),
        slice_mm=distance,
        pixel_mm=round(field_mm / matrix, 6),
        num_slices=round(length / distance) + 1,
        bottom_mm=round(bottom, 3),
        circle=bool(rng.random() < 0.4),
        bias_hu=site.bias_hu,
        intercept=-8192 if rng.random() < 0.26 else -1024,
        axcodes=site.axcodes[int(rng.integers(len(site.axcodes)))],
        table_curve_mm=site.table_curve_mm,
        is_enhanced=person.anatomy.blood_hu[0] > 100,
    )


def redrawn(protocol: Protocol, redraw: Redraw) -> Protocol:
    """Return a protocol with another kernel and dose; all else, the pattern of noise too, stays."""
    if redraw.kernel is not None:
        kernel = KERNELS[redraw.kernel]
        noise_hu = protocol.noise_hu * kernel.noise / protocol.kernel.noise
        protocol = protocol._replace(kernel=kernel, noise_hu=noise_hu)
    return protocol._replace(noise_hu=protocol.noise_hu / redraw.dose**0.5)


def draw_table(canvas: Canvas, person: Person, curve_mm: float) -> None:
    """Draw the table under the patient: a curved shell around foam."""
    grid = canvas.grid
    extra = 0.8 * (person.anatomy.fat_mm - 12)
    lowest = person.pose.shift_mm[1] + (122 + extra) * person.pose.scale[1]
    x, y = grid.axis_mm[None, :], grid.axis_mm[:, None]
    below = y - (lowest - x * x / np.float32(2 * curve_mm))
    plane = np.full(below.shape, -1000.0, np.float32)
    wide = np.abs(x) < 215
    np.copyto(plane, np.float32(-930), where=(below > 0) & (below < 42) & wide)
    edge = np.float32(max(2.2, 0.6 * grid.pixel_mm))
    np.copyto(plane, np.float32(-60), where=((np.abs(below - 2) < edge) | (np.abs(below - 40) < edge)) & wide)
    rows = np.flatnonzero((plane > -1000).any(axis=1))
    if len(rows):
        place = canvas.hu[:, rows[0] :]
        np.copyto(place, plane[None, rows[0] :], where=(place < -990) & (plane[None, rows[0] :] > -1000))


def _spread(block: Floats, share: float) -> Floats:
    """Give ``share`` of every pixel to its neighbours in the row, then in the column; (Z, Y, X)."""
    keep, give = np.float32(1 - share), np.float32(share / 2)
    for axis in (2, 1):
        spread = block * keep
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        spread[tuple(ahead)] += give * block[tuple(behind)]
        spread[tuple(behind)] += give * block[tuple(ahead)]
        # The first and the last pixel have one neighbour only.
        for end in (0, -1):
            border: list[slice | int] = [slice(None)] * 3
            border[axis] = end
            spread[tuple(border)] += give * block[tuple(border)]
        block = spread
    return block


def acquire(canvas: Canvas, protocol: Protocol, rng: np.random.Generator) -> NDArray[np.int16]:
    """Turn the drawing into what a scanner stores: blurred, noisy, biased, padded whole numbers.

    Args:
        canvas: the finished drawing.
        protocol: the scan's settings.
        rng: source of the noise.

    Returns:
        HU ``(Z, Y, X)`` int16 in LPS order from the feet, clipped to the stored range; outside a round field
        of view the intercept.
    """
    num_slices, rows, columns = canvas.grid.shape
    hu = np.empty(canvas.grid.shape, dtype=np.int16)
    center = canvas.grid.pose.shift_mm
    square = (canvas.grid.axis_mm[:, None] - center[1]) ** 2 + (canvas.grid.axis_mm[None, :] - center[0]) ** 2
    # Noise is strongest where the rays have crossed most tissue.
    strength = (np.float32(0.45) + np.float32(0.65) * np.exp(-square / np.float32(2 * 115.0**2))).astype(
        np.float32
    )
    # Keep the noise's variance: a kernel (give, keep, give) in both directions scales it by its energy.
    texture = protocol.kernel.texture
    strength *= np.float32(protocol.noise_hu / ((1 - texture) ** 2 + texture**2 / 2))
    shoulders = np.interp(canvas.grid.z, [60, 105], [1.0, 1.35]).astype(np.float32)
    for start in range(0, num_slices, BLOCK_SLICES):
        stop = min(start + BLOCK_SLICES, num_slices)
        noise = rng.standard_normal((stop - start, rows, columns), dtype=np.float32)
        noise = _spread(noise, texture) if texture else noise
        noise *= strength
        noise *= shoulders[start:stop, None, None]
        block = _spread(canvas.hu[start:stop], protocol.kernel.blur)
        block += noise
        block += np.float32(protocol.bias_hu)
        np.clip(np.rint(block, out=block), *STORED_RANGE_HU, out=block)
        hu[start:stop] = block
    if protocol.circle:
        radius = canvas.grid.pixel_mm * (rows / 2)
        outside = canvas.grid.axis_mm[:, None] ** 2 + canvas.grid.axis_mm[None, :] ** 2 > radius**2
        np.copyto(hu, np.int16(protocol.intercept), where=outside[None])
    return hu


def scan_grid(protocol: Protocol, person: Person, matrix: int) -> Grid:
    """The voxel grid of a volume."""
    return Grid(
        protocol.num_slices, matrix, protocol.pixel_mm, protocol.slice_mm, protocol.bottom_mm, person.pose
    )
