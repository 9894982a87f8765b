"""Changes of a scan that clinics meet: other slices, dose, kernel, calibration, field of view, orientation.

Each is a function of a scan, a strength and a generator of random numbers; ``CHANGES`` lists them with their
strengths. They run on the device of the scan and start from the image: what a scanner does before it
reconstructs (beam hardening, the spread of noise by attenuation) is simulated for metal alone.
"""

# Z slices, H side of a square slice

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from common.ct.anatomy import AIR_HU, coarse_grid, coarse_steps, find_anatomy
from common.ct.geometry import STORED_HU_RANGE
from common.transforms.streaks import ROD_BEHIND_MM, streaks_of_rods

AIR = -1000
NOISE_PEAK_PER_MM = 0.3
"""Frequency at which the added noise is strongest. Our choice, of the order of standard body kernels."""

UNSHARP_MM = 0.75
"""Standard deviation of the blur that a sharper kernel undoes in part. Our choice."""

PART_SLICES = 8  # changed at once: small enough that memory is used again rather than asked for anew


class Scan(NamedTuple):
    """A volume as canonical slices, feet to head.

    Args:
        hu: int16 ``(Z, H, H)``.
        spacing_mm: (x, y, z).
        origin: int64 ``(Z,)``, for each slice the number of the original's slice that lies where it does.
        blood: bool ``(Z, H, H)``, heart and large vessels, where masks are known.
    """

    hu: torch.Tensor
    spacing_mm: tuple[float, float, float]
    origin: torch.Tensor
    blood: torch.Tensor | None = None


class Change(NamedTuple):
    """A kind of change.

    Args:
        apply: returns the changed scan, or None where the scan does not allow the change.
        strengths: those to measure, mildest first on each side of the unchanged scan.
        axis: what the strength is, with its unit; empty for a change that is there or not.
        needs: what a scan must have, for the list of those that do not.
    """

    apply: Callable[[Scan, float, torch.Generator], Scan | None]
    strengths: tuple[float, ...] = (1.0,)
    axis: str = ""
    needs: str = ""


def every_nth_slice(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Keep every n-th slice, as where a PACS stores fewer than were made.

    Source: n of 2, 4 and 8 as in DALE-CT's released stride probe (Table V).
    """
    step = int(strength)
    if len(scan.hu) <= step:
        return None
    x, y, z = scan.spacing_mm
    return scan._replace(hu=scan.hu[::step], spacing_mm=(x, y, z * step), origin=scan.origin[::step])


def thicker_slices(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Average each n neighbouring slices into one, in HU; the rest at the head is left out.

    Source: n of 2, 4 and 8 as in :func:`every_nth_slice`, so that the two compare: 1 mm slices become 2, 4
    and 8 mm thick, the range of clinical chest CT and beyond.
    """
    step = int(strength)
    count = len(scan.hu) // step
    if count < 2:
        return None
    x, y, z = scan.spacing_mm
    groups = scan.hu[: count * step].unflatten(0, (count, step))
    means = torch.stack([_stored(group.float().mean(0)) for group in groups])
    origin = scan.origin[(step - 1) // 2 :: step][:count]
    return scan._replace(hu=means, spacing_mm=(x, y, z * step), origin=origin)


def lower_dose(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Add the noise that a share of the dose would have added, as coarse as a kernel makes it.

    The variance of noise is inversely proportional to dose: to a scan of noise s, found by :func:`noise_hu`,
    noise of s sqrt(1 / share - 1) is added. Its spectrum is that of filtered back-projection, frequency times
    the square of a Gaussian kernel. It is the same all over the image, and its slices are independent.

    Source: a tenth is the simulated low dose of chest CT in the Low Dose CT Image and Projection Data (Moen
    et al., Med. Phys. 48:902, 2021), a quarter that of its abdomen; a half is our choice.
    """
    found = noise_hu(scan.hu)
    if not found > 0:
        return None
    added = found * math.sqrt(1 / strength - 1)

    def texture(frequency: torch.Tensor) -> torch.Tensor:
        return (frequency * torch.exp(-0.5 * (frequency / NOISE_PEAK_PER_MM) ** 2)).sqrt()

    kernel = _filter(scan, texture)

    def noisy(hu: torch.Tensor) -> torch.Tensor:
        noise = kernel(torch.randn(hu.shape, generator=generator, device=hu.device))
        return hu + noise * (added / noise.std())

    return _with(scan, noisy)


def smoother_kernel(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Blur each slice by a Gaussian of this standard deviation in mm.

    Source: our choice. From a sharp to a standard kernel, with MTFs of a half at some 0.75 and 0.35 per mm,
    takes 0.5 mm: a Gaussian's is a half at 0.187 / (its standard deviation).
    """
    return _with(scan, _filter(scan, _gaussian(strength)))


def sharper_kernel(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Add this many times what a blur of ``UNSHARP_MM`` takes away: edges and noise, as a sharp kernel does.

    Source: an unsharp mask; the strengths are our choice, 1 doubles the finest detail.
    """
    blur = _gaussian(UNSHARP_MM)
    return _with(scan, _filter(scan, lambda frequency: 1 + strength * (1 - blur(frequency))))


def hu_offset(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Add HU to all voxels, as where a scanner is out of calibration.

    Source: water must be within 7 HU of 0 in the CT accreditation of the American College of Radiology;
    four times that is our choice.
    """
    return _with(scan, lambda hu: hu + strength)


def hu_gain(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Multiply HU above water, as another beam energy does to bone and contrast medium; the rest stays.

    Source: the same accreditation lets acrylic read 110 to 135 HU, 10 % to each side; half is our choice.
    """
    return _with(scan, lambda hu: hu.where(hu <= 0, hu * strength))


def field_of_view(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Cut the square to the lungs with a margin in mm, which cuts off skin and muscle; pixels stay.

    Source: margins are our choice; 0 is the targeted field of view of a lung reconstruction.
    """
    anatomy = find_anatomy(coarse_grid(scan.hu.cpu().numpy(), scan.spacing_mm))
    if anatomy is None or not anatomy.lungs.any():
        return None
    size = scan.hu.shape[-1]
    ends = []
    for axis, spacing, voxel in ((1, scan.spacing_mm[1], 1), (2, scan.spacing_mm[0], 2)):
        others = tuple({0, 1, 2} - {axis})
        places = np.flatnonzero(anatomy.lungs.any(others)) * anatomy.grid.voxel_mm[voxel] / spacing
        margin = strength / spacing
        ends.append((places[0] - margin, places[-1] + 1 + margin))
    side = math.ceil(max(stop - start for start, stop in ends))
    if side >= size:
        return None
    top, left = (min(max(round((start + stop - side) / 2), 0), size - side) for start, stop in ends)
    return scan._replace(hu=scan.hu[:, top : top + side, left : left + side])


def body_alone(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Fill with air what is not the largest piece of tissue of its slice: table, blanket, and arms beside it.

    Source: masking the table is a usual step of preprocessing.
    """
    grid = coarse_grid(scan.hu.cpu().numpy(), scan.spacing_mm)
    masks = np.stack([_largest_piece(plane > AIR_HU) for plane in grid.hu])
    if not masks.any():
        return None
    body = torch.from_numpy(masks).to(scan.hu.device)
    steps = coarse_steps(scan.spacing_mm)
    places = [
        torch.arange(length, device=body.device).add(step // 2).div(step, rounding_mode="floor")
        for length, step in zip(scan.hu.shape, steps, strict=True)
    ]
    nearest = [place.clamp(max=length - 1) for place, length in zip(places, body.shape, strict=True)]
    hu = [
        part.where(body[z][:, nearest[1]][:, :, nearest[2]], AIR)
        for part, z in zip(scan.hu.split(PART_SLICES), nearest[0].split(PART_SLICES), strict=True)
    ]
    return scan._replace(hu=torch.cat(hu))


def coarser_pixels(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Resample slices to pixels of this many mm, antialiased.

    Source: what published encoders of chest CT resample to: 1.5 mm Merlin, 2 mm COLIPRI; and 3 mm, as the
    fast TotalSegmentator.
    """
    x, y, z = scan.spacing_mm
    side = round(scan.hu.shape[-1] * x / strength)
    share = scan.hu.shape[-1] / max(side, 1)
    if share <= 1:
        return None

    def resampled(hu: torch.Tensor) -> torch.Tensor:
        return F.interpolate(hu[:, None], (side, side), mode="bilinear", antialias=True)[:, 0]

    return _with(scan, resampled)._replace(spacing_mm=(x * share, y * share, z))


def flipped_left_right(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Mirror columns, as a header does that has lost the sign of x. Source: ``data_prep turned``."""
    return scan._replace(hu=scan.hu.flip(2))


def flipped_front_back(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Mirror rows, as a header does that has lost the sign of y.

    Source: as :func:`flipped_left_right`.
    """
    return scan._replace(hu=scan.hu.flip(1))


def flipped_head_feet(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Reverse the order of slices. Source: as :func:`flipped_left_right`; poolers may not see it at all."""
    return scan._replace(hu=scan.hu.flip(0), origin=scan.origin.flip(0))


def transposed(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Swap rows and columns. Source: how DALE-CT's authors showed CT-RATE to their encoders."""
    x, y, z = scan.spacing_mm
    return scan._replace(hu=scan.hu.transpose(1, 2), spacing_mm=(y, x, z))


def rescaled_again(scan: Scan, strength: float, generator: torch.Generator) -> Scan:
    """Add an intercept to HU: -1024 applies a file's rescaling twice, 1024 leaves it out.

    Source: slope 1 and intercept -1024 are those of most CT. Our reader refuses such files; others do not.
    """
    return hu_offset(scan, strength, generator)


def more_contrast(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Add HU to heart and large vessels, as contrast medium does; None without their masks.

    Source: blood has some 40 HU without, 150 to 200 in a portal venous phase and beyond 300 HU in a pulmonary
    angiography; the steps between are our choice. Organs and small vessels stay as they are.
    """
    if scan.blood is None:
        return None
    parts = zip(scan.hu.split(PART_SLICES), scan.blood.split(PART_SLICES), strict=True)
    return scan._replace(hu=torch.cat([_stored(hu.float() + strength * blood) for hu, blood in parts]))


def metal_streaks(scan: Scan, strength: float, generator: torch.Generator) -> Scan | None:
    """Implant two rods beside the spine along the middle half of the lungs, with streaks of this RMS in HU.

    The streaks of the middle slice, see :func:`common.transforms.streaks.streaks_of_rods`, are added to each
    slice; rods read the highest HU that is stored. The size is our choice.
    """
    anatomy = find_anatomy(coarse_grid(scan.hu.cpu().numpy(), scan.spacing_mm))
    if anatomy is None or not anatomy.lungs.any():
        return None
    _, row_mm, column_mm = anatomy.grid.voxel_mm
    down, across = anatomy.spine[0] * row_mm + ROD_BEHIND_MM, anatomy.spine[1] * column_mm
    if down >= anatomy.box[1] * row_mm:
        return None
    step = coarse_steps(scan.spacing_mm)[0]
    low, high = (end * step for end in anatomy.lung_ends)
    first, stop = low + (high - low) // 4, min(high - (high - low) // 4, len(scan.hu))
    middle = scan.hu[(first + stop) // 2].float()
    streaks, is_rod = streaks_of_rods(middle, scan.spacing_mm[:2], (across, down), generator)
    hu = scan.hu.clone()
    for part in hu[first:stop].split(PART_SLICES):
        part.copy_(_stored(part.float() + strength * streaks).where(~is_rod, STORED_HU_RANGE[1]))
    return scan._replace(hu=hu)


CHANGES: dict[str, Change] = {
    "every_nth_slice": Change(every_nth_slice, (2, 4, 8), "n", "more slices"),
    "thicker_slices": Change(thicker_slices, (2, 4, 8), "slices averaged", "more slices"),
    "lower_dose": Change(lower_dose, (0.5, 0.25, 0.1), "share of the dose", "noise in soft tissue"),
    "smoother_kernel": Change(smoother_kernel, (0.25, 0.5, 1), "blur in mm"),
    "sharper_kernel": Change(sharper_kernel, (0.5, 1, 2), "detail added"),
    "hu_offset": Change(hu_offset, (-28, -7, 7, 28), "HU added"),
    "hu_gain": Change(hu_gain, (0.9, 0.95, 1.05, 1.1), "factor"),
    "field_of_view": Change(field_of_view, (40, 20, 0), "margin in mm", "lungs, and more around them"),
    "coarser_pixels": Change(coarser_pixels, (1.5, 2, 3), "pixel in mm", "finer pixels"),
    "more_contrast": Change(more_contrast, (75, 150, 300), "HU added to blood", "masks, see --masks_dir"),
    "metal_streaks": Change(metal_streaks, (25, 50, 100), "RMS of streaks in HU", "lungs and a spine"),
    "rescaled_again": Change(rescaled_again, (-1024, 1024), "HU added"),
    "body_alone": Change(body_alone, needs="a body"),
    "flipped_left_right": Change(flipped_left_right),
    "flipped_front_back": Change(flipped_front_back),
    "flipped_head_feet": Change(flipped_head_feet),
    "transposed": Change(transposed),
}
"""Every change by its name, in the order of the card."""


def chosen_changes(names: Sequence[str] | None) -> list[tuple[str, float]]:
    """List names with each of their strengths; None for all changes.

    Raises:
        ValueError: if there is no change of a name, a name is given twice, or there is none.

    Example:
        >>> chosen_changes(["transposed", "thicker_slices"])
        [('transposed', 1.0), ('thicker_slices', 2), ('thicker_slices', 4), ('thicker_slices', 8)]
    """
    chosen = list(CHANGES) if names is None else list(names)
    if isinstance(names, str) or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"changes must be a list of names, each once, got {names!r}.")
    for name in chosen:
        if name not in CHANGES:
            near = difflib.get_close_matches(name, CHANGES, n=1, cutoff=0)
            raise ValueError(
                f"changes must be among {', '.join(CHANGES)}, got '{name}'. Did you mean '{near[0]}'?"
            )
    return [(name, strength) for name in chosen for strength in CHANGES[name].strengths]


def noise_hu(hu: torch.Tensor) -> float:
    """Estimate a scan's noise: the most frequent standard deviation within 7 x 7 pixels of soft tissue.

    Source: the global noise level of Christianson et al., AJR 205:W93, 2015; 32 slices and means of 0 to 100
    HU are our choice.

    Returns:
        HU; 0 without soft tissue.
    """
    slices = hu[:: max(1, len(hu) // 32)].float()[:, None]
    mean = F.avg_pool2d(slices, 7, 3)
    variance = F.avg_pool2d(slices.square(), 7, 3) - mean.square()
    deviation = (variance.clamp(min=0) * 49 / 48).sqrt()
    found = deviation[(mean > 0) & (mean < 100) & (deviation < 200)]
    if not len(found):
        return 0.0
    counts = torch.histc(found.cpu(), 200, 0, 200)
    smooth = F.avg_pool1d(counts[None, None], 3, 1, 1)[0, 0]
    return float(smooth.argmax()) + 0.5


def _stored(hu: torch.Tensor) -> torch.Tensor:
    """Round and clip as the readers of CTs do."""
    return hu.round().clamp_(*STORED_HU_RANGE).to(torch.int16)


def _with(scan: Scan, change: Callable[[torch.Tensor], torch.Tensor]) -> Scan:
    """Change slices in float32, some at a time."""
    parts = [_stored(change(part.float())) for part in scan.hu.split(PART_SLICES)]
    return scan._replace(hu=torch.cat(parts))


def _gaussian(sigma_mm: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda frequency: torch.exp(-2 * (math.pi * sigma_mm * frequency) ** 2)


def _filter(
    scan: Scan, response: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what multiplies the spectrum of slices by a function of the frequency per mm; borders meet."""
    (rows, columns), device = scan.hu.shape[1:], scan.hu.device
    down = torch.fft.fftfreq(rows, scan.spacing_mm[1], device=device)[:, None]
    across = torch.fft.rfftfreq(columns, scan.spacing_mm[0], device=device)
    factor = response(torch.hypot(down, across))
    return lambda hu: torch.fft.irfft2(torch.fft.rfft2(hu).mul_(factor), s=(rows, columns))


def _largest_piece(tissue: np.ndarray) -> np.ndarray:
    """Return the largest piece of a mask ``(H, W)``, its holes filled and its edge widened by a pixel."""
    pieces, _ = ndimage.label(ndimage.binary_opening(tissue))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    piece = (pieces == sizes.argmax()) & bool(sizes.any())
    return np.asarray(ndimage.binary_dilation(ndimage.binary_fill_holes(piece)))
