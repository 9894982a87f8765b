"""What an encoder shows of a CT before any probe is trained: similar slices, levels, body and lungs."""

# S slices, B of them not blank, R slices of the reference, D embedding

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from common.ct.anatomy import coarse_grid, coarse_steps, find_anatomy
from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.engines.chest_cts import EmbeddedCTs, embed_chest_cts
from common.reports.ct_report import ChestMap, picture_of, write_ct_report
from common.reports.ct_tokens import encode, spread_slices
from common.reports.patch_rows import components_row
from common.reports.scan_levels import match_levels
from common.reports.slice_grid import SHOWN_HU
from common.run.process import atomic_file
from common.transforms.slice_strategies import body_box

logger = logging.getLogger(__name__)

NO_PROBE = (
    "No trained probe comes along, as CT-RATE is gated: this shows what needs none, and no disease. "
    "To train one: dale-ct probe /data/ct_rate; on synthetic CT: make demo; then predict with --probe."
)
NUM_TILES = 8
"""Slices whose patches are coloured; our choice."""


def overview(
    encoder_bundle: str | Path | None,
    dataset_dir: str | Path,
    output_dir: str | Path,
    *,
    reference: str | Path | None,
    encoder_configs: Sequence[str] = (),
    encoder_knobs: Mapping[str, Any] | None = None,
    num_pages: int = 10,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """Embed CTs and write what can be shown of them without a probe; nothing of it is about disease.

    ``overview.json`` has for each volume the boxes of body and lungs, and for each slice the most similar one
    of the reference by CLS tokens; ``<volume>.html`` shows them, which slices are similar, and, for a vision
    transformer, patches coloured by their first three principal components. The embeddings stay in
    ``output_dir/embeddings`` and, of the reference, in ``output_dir/reference/embeddings``.

    Args:
        encoder_bundle: folder of the bundle of an encoder of slices.
        dataset_dir: CTs, as for :func:`common.engines.predict.predict`.
        output_dir: folder to write.
        reference: a CT to find the levels in, such as a synthetic one; None for none.
        encoder_configs: as for ``predict``.
        encoder_knobs: as for ``predict``.
        num_pages: as for ``predict``.
        force: as for ``predict``.

    Returns:
        For each volume what ``overview.json`` holds.

    Raises:
        FileNotFoundError: if the bundle or a CT does not exist.
        ValueError: if the encoder takes volumes, or no CT is left.
    """
    if encoder_bundle is None:
        raise ValueError("Pass --encoder_bundle, the folder of the encoder.")
    if "strategies" not in open_encoder_bundle(encoder_bundle, encoder_configs):
        raise ValueError(
            f"encoder_bundle must be of an encoder of slices without a probe, got '{encoder_bundle}'. "
            "Pass --probe_dir, or another encoder."
        )
    logger.warning(NO_PROBE)
    output = Path(output_dir)
    how: dict[str, Any] = {"encoder_configs": encoder_configs, "encoder_knobs": dict(encoder_knobs or {})}
    embedded = embed_chest_cts(encoder_bundle, dataset_dir, output, **how, force=force)
    for choice in ("series", "subset_csv", "skip_list", "split"):  # of the CTs, not of the reference
        how["encoder_knobs"].pop(choice, None)
    other_hu = None
    if reference is not None:
        other = embed_chest_cts(encoder_bundle, reference, output / "reference", **how, force=True)
        other_name = other.used[0].volume
        other_hu, other_mm = other.used[0].read()[:2]
        other_tokens, other_slices = (
            _per_slice(other, other_name),
            np.flatnonzero(other.cts[other_name].has_image),
        )
    found = {}
    for number, source in enumerate(embedded.used):
        hu, spacing_mm = source.read()[:2]
        box = embedded.store.read(source.volume).metadata.get("box") or body_box(torch.from_numpy(hu))
        tokens, has_image = _per_slice(embedded, source.volume), embedded.cts[source.volume].has_image
        facts: dict[str, Any] = {"spacing_mm": spacing_mm, "boxes_px": find_boxes(hu, spacing_mm, box)}
        if other_hu is not None:
            facts["reference"] = {"name": other_name, "slices": len(other_hu)}
            facts["levels"] = _levels(tokens, has_image, other_tokens, other_slices, other_mm[2])
        found[source.volume] = facts
        if number < num_pages:
            alike = np.full((len(hu), len(hu)), np.nan)
            alike[np.ix_(has_image, has_image)] = match_levels(tokens, tokens).similarity
            write_ct_report(
                output / f"{source.volume}.html",
                title=source.volume,
                hu=hu,
                spacing_mm=spacing_mm,
                origin=embedded.origin,
                tiles=_tiles(embedded.bundle, hu, box),
                chest=ChestMap(facts, alike, other_hu),
                warnings=embedded.cts[source.volume].notes,
            )
    record = {"note": "For research, not for diagnosis.", **embedded.store.identity, "volumes": found}
    with atomic_file(output / "overview.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    where = output / "overview.json"
    lines = [*embedded.remarks(output), f"\n{len(found)} volumes in '{where}', pages beside it."]
    sys.stdout.write("\n".join([*lines, "For research, not for diagnosis.\n"]))
    return found


def _per_slice(embedded: EmbeddedCTs, volume: str) -> np.ndarray:
    """Read one vector per slice that is not blank ``(B, D)``; of tiles, all of a slice in one."""
    return embedded.tokens(volume).reshape(int(embedded.cts[volume].has_image.sum()), -1).numpy()


def _levels(
    tokens: np.ndarray,
    has_image: np.ndarray,
    other_tokens: np.ndarray,
    other_slices: np.ndarray,
    other_mm: float,
) -> list[dict[str, Any] | None]:
    """Find the slice of the reference most like each slice; None for blank ones."""
    match = match_levels(tokens, other_tokens)
    levels: list[dict[str, Any] | None] = [None] * len(has_image)
    for z, best, cosines in zip(np.flatnonzero(has_image), match.best, match.similarity, strict=True):
        there, cosine = int(other_slices[best]), round(float(cosines[best]), 4)
        levels[z] = {"slice": there + 1, "z_mm": round(there * other_mm, 2), "cosine": cosine}
    return levels


def find_boxes(
    hu: np.ndarray, spacing_mm: tuple[float, float, float], body: Sequence[int]
) -> dict[str, dict[str, list[int]]]:
    """Say where body and lungs lie: slices, rows and columns, each the first and the one after the last.

    Args:
        hu: canonical slices ``(S, H, H)`` in HU.
        spacing_mm: (x, y, z).
        body: top, left and side of the crop to the body.

    Returns:
        ``body`` and, where lungs are found, ``lungs``. They are sought on every n-th voxel, 3 to 4 mm apart.
    """
    top, left, side = body
    rows, columns = [top, top + side], [left, left + side]
    boxes = {"body": {"slices": [0, len(hu)], "rows": rows, "columns": columns}}
    anatomy = find_anatomy(coarse_grid(hu, spacing_mm))
    if anatomy is not None and anatomy.lungs.any():
        places = zip(np.nonzero(anatomy.lungs), coarse_steps(spacing_mm), hu.shape, strict=True)
        ends = [[int(at.min()) * n, min((int(at.max()) + 1) * n, size)] for at, n, size in places]
        boxes["lungs"] = dict(zip(("slices", "rows", "columns"), ends, strict=True))
    return boxes


def _tiles(bundle: EncoderBundle, hu: np.ndarray, box: Sequence[int]) -> dict[int, str]:
    """Colour the patches of some slices; none for an encoder without patch tokens, or of tiles."""
    strategy = bundle.strategies[0]
    if strategy.is_tiled or not isinstance(bundle.network, VisionTransformer):
        return {}
    chosen = spread_slices(len(hu), NUM_TILES)
    top, left, side = box
    images = strategy(strategy.region(torch.from_numpy(hu[chosen]), (top, left, side)))
    rgba = np.asarray(components_row(images, encode(bundle, images)[1]).values)
    size = bundle.patch_size_px
    rgba = rgba.repeat(size, axis=1).repeat(size, axis=2)
    darkest, brightest = SHOWN_HU
    grey = ((images.numpy() - darkest) / (brightest - darkest)).clip(0, 1)[:, 0, :, :, None]
    pictures = grey * (1 - rgba[..., 3:]) + rgba[..., :3] * rgba[..., 3:]
    return {z: picture_of(picture) for z, picture in zip(chosen, pictures, strict=True)}
