"""Rows of pictures that show something of each patch: components, attention, likeness, probability, label.

Slices are in HU ``(N, 1, I, I)``, their patch tokens ``(N, G, G, D)``.
"""

# N slices shown, I side of an image, H side of a padded slice, G patches along a side, D embedding, C classes

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from common.embeddings.dense_labels import TASKS
from common.networks.dense_probe import load_dense_probe
from common.reports.ct_tokens import CTImages, above_even
from common.reports.slice_grid import Row, class_colours, slice_grid

AIR_HU = -930.0
"""Patches whose mean is below it are air around the body; lungs are above. Our choice."""

OPACITY = 0.65


def components_row(hu: torch.Tensor, patches: torch.Tensor) -> Row:
    """Colour patches by the first three principal components of those in the body, as RGB.

    What looks alike to the encoder has one colour. Each component is spread from its 2nd to its 98th
    percentile; its sign is such that its third moment is positive, so that colours do not flip between runs.

    Source: the pictures of DINOv2, arXiv:2304.07193.
    """
    tokens = patches.flatten(0, 2).double()
    body = F.adaptive_avg_pool2d(hu, patches.shape[1]).flatten() > AIR_HU
    body = body if body.any() else ~body
    centred = tokens - tokens[body].mean(0)
    places = centred @ torch.linalg.svd(centred[body], full_matrices=False)[2][:3].T
    places = places * torch.where((places[body] ** 3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(places[body], torch.tensor([0.02, 0.98]).to(places), dim=0)
    colours = torch.zeros(len(tokens), 4, dtype=torch.float64)
    colours[:, : places.shape[1]] = ((places - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours[:, 3] = OPACITY * body
    return Row(hu, label="components 1 to 3", values=colours.unflatten(0, patches.shape[:3]).numpy())


def attention_row(hu: torch.Tensor, attention: torch.Tensor) -> Row:
    """Show where the CLS token looks: the patches with more than an even share of its attention.

    Args:
        hu: slices in HU.
        attention: maps of ``cls_attention``, ``(N, heads, G, G)``, whose mean over heads is shown.
    """
    shares = attention.mean(1).numpy()
    strength, even, full = above_even(shares)
    limits = (100 * even, 100 * full)
    scale = "% of CLS attention, from even"
    return Row(hu, (), "attention of CLS", 100 * shares, OPACITY * strength, limits=limits, scale=scale)


def likeness_row(hu: torch.Tensor, patches: torch.Tensor, patch: tuple[int, int] | None = None) -> Row:
    """Show the cosine similarity of every patch of a slice to one of them, which gets a cross.

    Args:
        hu: slices in HU.
        patches: patch tokens of the slices.
        patch: row and column of that patch; None for the middle.

    Raises:
        ValueError: if there is no such patch.
    """
    grid = patches.shape[1]
    row, column = patch or (grid // 2, grid // 2)
    if not (0 <= row < grid and 0 <= column < grid):
        raise ValueError(f"patch must lie in a grid of {grid} x {grid}, got ({row}, {column}).")
    unit = F.normalize(patches, dim=-1)
    cosines = torch.einsum("nrcd,nd->nrc", unit, unit[:, row, column]).numpy()
    shown = Row(hu, (), "like the patch at x", cosines, 0.5, "coolwarm", (-1, 1), "cosine similarity")
    return shown._replace(mark=(row, column))


def probe_of(probes: str | Path, names: Sequence[str], encoder: str) -> tuple[nn.Linear, list[int]]:
    """Load the patch probe that knows some classes, with their places in its output.

    Args:
        probes: output folder of eval_dense_2d.
        names: findings, or organs.
        encoder: name of the encoder that the probe must have been trained on.

    Raises:
        FileNotFoundError: if there is no probe.
        ValueError: if no task knows all the names, or the probe is of another encoder.
    """
    known: list[str] = []
    for task in TASKS:
        layer, card = load_dense_probe(probes, "patch", task)
        known += card["class_names"]
        if set(names) <= set(card["class_names"]):
            if card["encoder"] != encoder:
                raise ValueError(
                    f"The probes in '{probes}' were trained on '{card['encoder']}', not on '{encoder}'."
                )
            return layer, [card["class_names"].index(name) for name in names]
    raise ValueError(f"names must be of one task, among {known}, got {list(names)}.")


@torch.no_grad()
def probability_rows(
    hu: torch.Tensor, patches: torch.Tensor, *, layer: nn.Linear, places: Sequence[int], names: Sequence[str]
) -> list[Row]:
    """Show the probability of classes in every patch, a row each; the more opaque, the likelier.

    Args:
        hu: slices in HU.
        patches: patch tokens of the slices.
        layer: probe of patch tokens.
        places: places of the classes in the probe's output.
        names: names of the classes.
    """
    rows = []
    for values, name in zip(layer(patches).sigmoid()[..., list(places)].unbind(-1), names, strict=True):
        top = max(float(values.max()), 1e-9)
        opacity = 0.15 + 0.6 * values / top
        rows.append(Row(hu, (), name, values, opacity, limits=(0, top), scale="probability, linear probe"))
    return rows


def label_colours(shares: NDArray[np.floating]) -> NDArray[np.float64]:
    """Colour each patch by the largest of its classes' shares ``(..., C)``, the more opaque the more of it.

    Returns:
        RGBA ``(..., 4)``.
    """
    colours = class_colours(shares.shape[-1])[shares.argmax(-1)]
    return np.concatenate([colours, OPACITY * shares.max(-1)[..., None]], axis=-1)


def draw_labels(
    images: CTImages,
    labelled: Sequence[tuple[str, NDArray[np.floating]]],
    mask: NDArray[np.integer],
    classes: Sequence[tuple[int, str]],
) -> Figure:
    """Draw slices as the encoder sees them, with outlines of organs and, a row each, labels of patches.

    Outlines are the mask through the crop of the image, pixel by pixel, and labels the shares that were
    counted: colours must fill the outlines, and outlines follow what the CT shows.

    Args:
        images: slices to show.
        labelled: name of each row, and the shares ``(N, G, G, C)`` of the classes shown.
        mask: ids in slices padded to squares, ``(N, H, H)``.
        classes: id and name of the classes shown.
    """
    rows = [Row(images.hu, images.titles, name, label_colours(shares)) for name, shares in labelled]
    title = f"{images.name}: patches coloured by their labels, masks outlined"
    figure, panels = slice_grid(rows, title, inches=3.1)
    colours, (top, left, side) = class_colours(len(classes)), images.box
    grid, size = labelled[0][1].shape[1], images.hu.shape[-1]
    edges = np.arange(1, grid) * size / grid - 0.5
    centres = (np.arange(side) + 0.5) * size / side - 0.5
    cropped = mask[:, top : top + side, left : left + side]
    for axes, ids in zip(panels.ravel(), [*cropped] * len(rows), strict=True):
        axes.hlines(edges, -0.5, size - 0.5, color="white", linewidth=0.3, alpha=0.5)
        axes.vlines(edges, -0.5, size - 0.5, color="white", linewidth=0.3, alpha=0.5)
        for colour, (index, _) in zip(colours, classes, strict=True):
            if (ids == index).any():
                axes.contour(centres, centres, ids == index, levels=[0.5], colors=[colour], linewidths=1.0)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    handles = [Patch(color=colour, label=name) for colour, (_, name) in zip(colours, classes, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure
