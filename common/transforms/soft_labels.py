"""From masks of a view to soft labels of the whole view (CLS) and of each of its patches."""

# N views, S view size, P patches in row-major order, C classes

import torch


def coverage_fractions(
    ts: torch.Tensor, patch_size_px: int, num_classes: int = 118
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which share of the pixels each class covers, in the whole view and in each patch.

    Exactly average pooling of the one-hot map, but by counting.

    Source: DALE-CT III-C2.

    Args:
        ts: class of every pixel, background included.
        patch_size_px: side of a patch.
        num_classes: C. TotalSegmentator's task "total" with the background: 118.

    Shape:
        Input ``(N, S, S)`` of integers. Output: ``cls (N, C)`` and ``patches (N, P, C)``, float32.

    Raises:
        ValueError: if the map is no stack of integer images that patches tile, or holds an unknown class.

    Example:
        >>> ts = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 2]]], dtype=torch.uint8)
        >>> cls, patches = coverage_fractions(ts, patch_size_px=2, num_classes=3)
        >>> cls
        tensor([[0.5000, 0.3750, 0.1250]])
        >>> patches
        tensor([[[1.0000, 0.0000, 0.0000],
                 [0.0000, 0.7500, 0.2500]]])
    """
    _check_maps("ts", ts, patch_size_px)
    classes = ts.long()
    lowest, highest = (int(value) for value in classes.aminmax())
    if lowest < 0 or highest >= num_classes:
        outlier = lowest if lowest < 0 else highest
        raise ValueError(f"ts must hold classes 0 to {num_classes - 1}, got {outlier}.")
    num_views, height, width = ts.shape
    rows = torch.arange(height, device=ts.device) // patch_size_px
    columns = torch.arange(width, device=ts.device) // patch_size_px
    num_patches = (height // patch_size_px) * (width // patch_size_px)
    patch = rows[:, None] * (width // patch_size_px) + columns
    view = torch.arange(num_views, device=ts.device)[:, None, None]
    bins = ((view * num_patches + patch) * num_classes).add(classes)
    counts = torch.bincount(bins.flatten(), minlength=num_views * num_patches * num_classes)
    counts = counts.view(num_views, num_patches, num_classes)
    return _shares(counts, patch_size_px)


def finding_presence(
    rex: torch.Tensor, patch_size_px: int, num_classes: int = 14
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 for each finding that at least one pixel shows, in the whole view and in each patch.

    Source: DALE-CT III-C2.

    Args:
        rex: findings of every pixel, bit k for the k-th of ``common/labels/rexgroundingct.csv``.
        patch_size_px: side of a patch.
        num_classes: C. ReXGroundingCT: 14.

    Shape:
        Input ``(N, S, S)`` of integers. Output: ``cls (N, C)`` and ``patches (N, P, C)``, float32.

    Raises:
        ValueError: if the map is no stack of integer images that patches tile, or has an unknown bit.

    Example:
        >>> rex = torch.tensor([[[0, 0, 1, 0], [0, 0, 3, 0]]], dtype=torch.int16)
        >>> cls, patches = finding_presence(rex, patch_size_px=2, num_classes=3)
        >>> cls
        tensor([[1., 1., 0.]])
        >>> patches
        tensor([[[0., 0., 0.],
                 [1., 1., 0.]]])
    """
    counts = _finding_counts(rex, patch_size_px, num_classes)
    return counts.any(1).float(), (counts > 0).float()


def finding_fractions(
    rex: torch.Tensor, patch_size_px: int, num_classes: int = 14
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which share of the pixels shows each finding, in the whole view and in each patch.

    Source: released DALE-CT code; the paper's text says presence, for which see ``finding_presence``.

    Args:
        rex: findings of every pixel, bit k for the k-th of ``common/labels/rexgroundingct.csv``.
        patch_size_px: side of a patch.
        num_classes: C. ReXGroundingCT: 14.

    Shape:
        Input ``(N, S, S)`` of integers. Output: ``cls (N, C)`` and ``patches (N, P, C)``, float32.

    Raises:
        ValueError: if the map is no stack of integer images that patches tile, or has an unknown bit.

    Example:
        >>> rex = torch.tensor([[[0, 0, 1, 0], [0, 0, 3, 0]]], dtype=torch.int16)
        >>> finding_fractions(rex, patch_size_px=2, num_classes=3)[0]
        tensor([[0.2500, 0.1250, 0.0000]])
    """
    return _shares(_finding_counts(rex, patch_size_px, num_classes), patch_size_px)


def _finding_counts(rex: torch.Tensor, patch_size_px: int, num_classes: int) -> torch.Tensor:
    """Return how many pixels of each patch have each bit, (N, P, C)."""
    _check_maps("rex", rex, patch_size_px)
    bits = rex.int()
    unknown = bits >> num_classes
    if bool(unknown.any()):
        raise ValueError(f"rex must only use bits 0 to {num_classes - 1}, got {int(bits[unknown != 0][0])}.")
    patches = bits.unflatten(2, (-1, patch_size_px)).unflatten(1, (-1, patch_size_px))
    counts = [((patches >> k) & 1).sum((2, 4)) for k in range(num_classes)]
    return torch.stack(counts, dim=-1).flatten(1, 2)


def _shares(counts: torch.Tensor, patch_size_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the patches' pixel counts, and their sum over the view, by the number of pixels."""
    patch_area = patch_size_px**2
    return counts.sum(1).float() / (counts.shape[1] * patch_area), counts.float() / patch_area


def _check_maps(name: str, maps: torch.Tensor, patch_size_px: int) -> None:
    if maps.dim() != 3 or maps.numel() == 0:
        raise ValueError(f"{name} must have shape (N, S, S) with pixels, got {tuple(maps.shape)}.")
    if maps.is_floating_point():
        raise ValueError(f"{name} must be a map of integers, got {maps.dtype}.")
    if patch_size_px < 1 or any(size % patch_size_px for size in maps.shape[1:]):
        size = " x ".join(str(length) for length in maps.shape[1:])
        rule = f"{name} must have sides that are multiples of patch_size_px={patch_size_px}"
        raise ValueError(f"{rule}, got {size}.")
