"""From CT files to label probabilities: an encoder bundle, then a probe trained on its embeddings."""

# T tokens of a volume, Z slices, C classes

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from common.embeddings.work import CTSource
from common.engines.chest_cts import MAX_SHOWN, EmbeddedCTs, embed_chest_cts
from common.metrics.multilabel import auroc_and_average_precision
from common.networks.mil_probe import MILProbe, load_probe
from common.reports.ct_report import (
    WINDOWS_HU,
    Finding,
    Quality,
    attended_slices,
    jpeg_of,
    write_ct_report,
)
from common.reports.ct_tokens import cls_attention_maps
from common.reports.results import read_predictions
from common.run.process import atomic_file

Predictions = dict[str, list[dict[str, Any]]]


def predict(
    encoder_bundle: str | Path | None,
    probe_dir: str | Path | None,
    dataset_dir: str | Path,
    output_dir: str | Path,
    *,
    encoder_configs: Sequence[str] = (),
    encoder_knobs: Mapping[str, Any] | None = None,
    num_pages: int = 10,
    force: bool = False,
) -> Predictions:
    """Embed CTs with an encoder bundle and score them with a probe; write, print and return the result.

    What does not look like an upright CT of a whole chest (:mod:`common.ct.checks`) is not embedded, and
    listed with what cannot be read in ``rejected.csv``. Blank slices take no part.

    ``predictions.csv`` has a row per volume and class, ``predictions.json`` the same by volume. The
    embeddings stay in ``output_dir/embeddings``; a second run embeds only what is new, and refuses another
    file of a name that is there. ``<volume>.html`` is a page of one volume: its slices, the probabilities,
    how much each slice weighs in the probe's pooling, and where in the slice a vision transformer looks.

    A volume is read once; those that get a page twice, as their slices are too large to be kept meanwhile.

    Args:
        encoder_bundle: folder of the encoder bundle; its ``inference.json`` is run.
        probe_dir: folder of ``probe.safetensors`` and ``probe.json``, an evaluation bundle's output_dir.
        dataset_dir: CT file or folder, in any form that the encoder bundle reads.
        output_dir: folder to write.
        encoder_configs: further config files that change the encoder bundle's, as in training.
        encoder_knobs: knobs of the encoder bundle to set, such as ``encoder_weights`` or ``split``.
        num_pages: volumes that get a page, the first by name; some 3 MB each.
        force: whether to go on with what does not look like a chest CT; the page and the terminal say so.

    Returns:
        For each volume a dictionary per class, with ``class``, ``probability``, ``threshold`` and ``call``, 1
        for a probability that reaches the threshold.

    Raises:
        FileNotFoundError: if the bundle, the probe or a CT does not exist.
        ValueError: if a knob does not exist, the probe was made for other embeddings, or no volume is left,
            or one was embedded from another file before.
    """
    if encoder_bundle is None or probe_dir is None:
        raise ValueError("Pass --encoder_bundle and --probe_dir, the folders of encoder and probe.")
    output = Path(output_dir)
    probe, card = load_probe(probe_dir)
    embedded = embed_chest_cts(
        encoder_bundle,
        dataset_dir,
        output,
        encoder_configs=encoder_configs,
        encoder_knobs=encoder_knobs,
        force=force,
        card=card,
    )
    predictions = {
        source.volume: _scores(probe, card, embedded.tokens(source.volume)) for source in embedded.used
    }
    _write(output, predictions)
    quality = validation_quality(probe_dir)
    for source in embedded.used[:num_pages]:
        findings = [
            Finding(row["class"], row["probability"], row["threshold"], quality.get(row["class"]))
            for row in predictions[source.volume]
        ]
        _write_page(output, source, embedded, probe=probe, card=card, findings=findings)
    note = f"\n{card['note']}\n" if card.get("note") else ""
    sys.stdout.write(_summary(output, predictions, embedded) + note)
    return predictions


@torch.no_grad()
def _scores(probe: MILProbe, card: Mapping[str, Any], tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Score one volume of ``tokens (T, D)``: probability, threshold and call of each class."""
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    probabilities = torch.sigmoid(probe(tokens[None], mask))[0].tolist()
    return [
        {"class": name, "probability": p, "threshold": threshold, "call": int(p >= threshold)}
        for name, p, threshold in zip(card["class_names"], probabilities, card["thresholds"], strict=True)
    ]


def validation_quality(probe_dir: str | Path) -> dict[str, Quality]:
    """Say how well a probe did on its validation volumes, by class; empty if their predictions are not there.

    Args:
        probe_dir: output folder of an evaluation bundle.
    """
    path = Path(probe_dir) / "validation_predictions.csv"
    if not path.is_file():
        return {}
    found = read_predictions(path)
    numbers = np.stack([*auroc_and_average_precision(found.probabilities, found.labels), found.labels.sum(0)])
    return {
        name: Quality(auroc, auprc, int(positives), len(found.volumes))
        for name, (auroc, auprc, positives) in zip(found.class_names, numbers.T.tolist(), strict=True)
    }


@torch.no_grad()
def _write_page(
    output: Path,
    source: CTSource,
    embedded: EmbeddedCTs,
    *,
    probe: MILProbe,
    card: Mapping[str, Any],
    findings: list[Finding],
) -> None:
    """Show one volume; the weights of slices where its tokens are slices."""
    bundle, store, ct = embedded.bundle, embedded.store, embedded.cts[source.volume]
    hu, spacing_mm = source.read()[:2]
    tokens = embedded.tokens(source.volume)
    weights, maps, tiles = None, None, {}
    if len(tokens) == ct.has_image.sum() and store.identity["token_kind"] == "slice":
        weights = np.zeros(len(hu), np.float32)
        weights[ct.has_image] = probe.slice_weights(tokens).numpy().clip(0, 1)
        (strategy,) = bundle.strategies
        if not strategy.is_tiled and isinstance(bundle.network, VisionTransformer):
            box = store.read(source.volume).metadata.get("box")
            maps = cls_attention_maps(bundle, strategy, hu, box)
        chosen = attended_slices(weights, (np.arange(len(hu)) * spacing_mm[2]).tolist())
        tiles = {z: jpeg_of(hu[z], *WINDOWS_HU["lung"]) for z in chosen}
    auprc = card.get("validation_macro_auprc")
    auprc = "not known" if auprc is None else f"{auprc:.3f}"
    write_ct_report(
        output / f"{source.volume}.html",
        title=source.volume,
        hu=hu,
        spacing_mm=spacing_mm,
        origin=embedded.origin,
        findings=findings,
        probe=f"Probe: {card['pooler'].replace('_', ' ')} pooling, macro AUPRC {auprc} on validation.",
        attention=weights,
        maps=maps,
        tiles=tiles,
        warnings=[*filter(None, [card.get("note")]), *ct.notes],
    )


def _write(output: Path, predictions: Predictions) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["volume", "class", "probability", "threshold", "call"])
        for volume, rows in predictions.items():
            for row in rows:
                numbers = (f"{row[name]:.6f}" for name in ("probability", "threshold"))
                table.writerow([volume, row["class"], *numbers, row["call"]])
    with atomic_file(output / "predictions.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(predictions, indent=2) + "\n")


def _summary(output: Path, predictions: Predictions, embedded: EmbeddedCTs) -> str:
    lines = []
    for volume, rows in list(predictions.items())[:MAX_SHOWN]:
        width = max(len(row["class"]) for row in rows)
        lines.append(f"\n{volume}\n{'':{width}}  probability  threshold")
        for row in rows:
            mark = "  positive" if row["call"] else ""
            lines.append(f"{row['class']:{width}}  {row['probability']:11.3f}  {row['threshold']:9.3f}{mark}")
    if len(predictions) > MAX_SHOWN:
        lines.append(f"\nand {len(predictions) - MAX_SHOWN} volumes more")
    lines += embedded.remarks(output)
    where = output / "predictions.csv"
    lines.append(f"\n{len(predictions)} volumes in '{where}'. For research, not for diagnosis.\n")
    return "\n".join(lines)
