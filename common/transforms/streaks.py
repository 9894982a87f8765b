"""Streaks of metal: what rays through metal measure wrongly, back-projected from parallel beams."""

# G side of a square slice in pixels, A angles over half a turn, P images

import math

import torch
from torch.nn import functional as F

NUM_ANGLES = 180
WATER_PER_MM, METAL_PER_MM = 0.02, 0.18
"""Attenuation of water and titanium. Source: NIST's tables of mass attenuation at 80 keV, 0.184 and 0.405
cm2/g, times densities of 1 and 4.5 g/cm3, rounded."""

ROD_MM, ROD_ASIDE_MM, ROD_BEHIND_MM = 6.0, 15.0, 20.0
"""Diameter of a rod of the spine, and how far it lies beside and behind the middle of a vertebra. Our choice,
of the order of what spinal fusion implants."""

STREAK_SIDE, STREAK_MM = 192, 50.0
"""Pixels of the grid that streaks are computed on, and how far from a rod they are measured. Our choice."""


def streaks_of_rods(
    hu: torch.Tensor,
    spacing_mm: tuple[float, float],
    middle_mm: tuple[float, float],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two rods that cross a slice, side by side, and the streaks of :func:`metal_errors`, half of each.

    There is no scatter, no partial volume, and no correction by the scanner; the halves are our choice.

    Args:
        hu: ``(H, H)``, float.
        spacing_mm: (x, y) of its pixels, which streaks take to be square.
        middle_mm: (x, y) of the point midway between the rods, from the first pixel's corner.
        generator: of the noise.

    Returns:
        Streaks ``(H, H)`` whose root mean square is 1 within ``STREAK_MM`` of a rod, outside both; and bool
        ``(H, H)``, where a rod lies.
    """

    def to_rod(side: int) -> torch.Tensor:
        """Distance in mm of each pixel to the axis of the nearer rod."""
        x, y = (mm * hu.shape[0] / side for mm in spacing_mm)
        at = torch.arange(side, device=hu.device) + 0.5
        aside = ((at * x - middle_mm[0]).abs() - ROD_ASIDE_MM).abs()
        return torch.hypot(at[:, None] * y - middle_mm[1], aside)

    coarse = F.interpolate(hu[None, None], (STREAK_SIDE,) * 2, mode="bilinear", antialias=True)[0, 0]
    pixel_mm = spacing_mm[0] * hu.shape[0] / STREAK_SIDE
    far = to_rod(STREAK_SIDE)
    metal = (0.5 + (ROD_MM / 2 - far) / pixel_mm).clamp(0, 1)
    near = (far < STREAK_MM) & (metal == 0)
    hardening, starvation = (
        image / image[near].square().mean().sqrt()
        for image in back_project(metal_errors(coarse, metal, pixel_mm, generator), pixel_mm)
    )
    streaks = hardening + starvation
    streaks /= streaks[near].square().mean().sqrt()
    streaks = F.interpolate(streaks[None, None], hu.shape, mode="bilinear", antialias=True)[0, 0]
    return streaks, to_rod(hu.shape[0]) < ROD_MM / 2


def metal_errors(
    hu: torch.Tensor, metal: torch.Tensor, pixel_mm: float, generator: torch.Generator
) -> torch.Tensor:
    """Tell what metal adds to the sinogram of a slice, but for its own attenuation.

    Beam hardening loses by the square of the attenuation along a ray, photon starvation adds noise whose
    variance grows with its exponent: of both, what metal adds.

    Args:
        hu: ``(G, G)``, the slice without metal.
        metal: ``(G, G)``, share of each pixel that is metal.
        pixel_mm: side of a pixel.
        generator: of the noise.

    Returns:
        ``(2, A, G)``, without unit, hardening and starvation; zero where no ray meets metal.
    """
    water = (hu / 1000 + 1).clamp(min=0) * WATER_PER_MM
    body, through = project(torch.stack([water, metal * METAL_PER_MM]), pixel_mm)
    hardening = body.square() - (body + through).square()
    noise = torch.randn(body.shape, generator=generator, device=body.device)
    starvation = noise * ((body + through).exp() - body.exp()).sqrt()
    return torch.stack([hardening, starvation])


def project(images: torch.Tensor, pixel_mm: float) -> torch.Tensor:
    """Sum images ``(P, G, G)`` along parallel rays, times mm: ``(P, A, G)``; the corners lie outside."""
    side = images.shape[-1]
    across, along = _plane(side, images.device)
    rays = []
    for angle in _angles():
        x = across * math.cos(angle) - along * math.sin(angle)
        y = across * math.sin(angle) + along * math.cos(angle)
        turned = F.grid_sample(images[None], torch.stack([x, y], -1)[None], align_corners=False)[0]
        rays.append(turned.sum(1) * pixel_mm)
    return torch.stack(rays, 1)


def back_project(sinograms: torch.Tensor, pixel_mm: float) -> torch.Tensor:
    """Return the images ``(P, G, G)`` of sinograms ``(P, A, G)``, per mm: filtered back-projection.

    Source: Kak and Slaney, Principles of Computerized Tomographic Imaging, 3.3: the band-limited ramp of
    equation 61, on twice the length against wrap-around.
    """
    num_images, _, side = sinograms.shape
    place = torch.fft.fftfreq(2 * side, 1 / (2 * side), device=sinograms.device)
    ramp = torch.where(place % 2 != 0, -1 / (math.pi * place).square(), 0)
    ramp[0] = 0.25
    spectrum = torch.fft.rfft(sinograms, 2 * side) * torch.fft.rfft(ramp) / pixel_mm
    filtered = torch.fft.irfft(spectrum, 2 * side)[..., :side]
    x, y = _plane(side, sinograms.device)
    images = torch.zeros(num_images, side, side, device=sinograms.device)
    for angle, rays in zip(_angles(), filtered.unbind(1), strict=True):
        across = x * math.cos(angle) + y * math.sin(angle)
        grid = torch.stack([across, torch.zeros_like(across)], -1)
        images += F.grid_sample(rays[None, :, None], grid[None], align_corners=False)[0]
    return images * math.pi / NUM_ANGLES


def _angles() -> list[float]:
    return [math.pi * step / NUM_ANGLES for step in range(NUM_ANGLES)]


def _plane(side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns' and the rows' places, from -1 to 1, each ``(G, G)``."""
    places = (torch.arange(side, device=device) * 2 + 1) / side - 1
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return columns, rows
