"""From CT files to label probabilities: an encoder bundle, then a probe trained on its embeddings."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from common.data.atomic_file import atomic_file
from common.data.ct_sources import CTSource
from common.data.embedding_part import IDENTITY_KEYS
from common.data.embedding_store import EmbeddingStore
from common.networks.mil_probe import load_probe
from common.reports.ct_report import Finding, write_ct_report

# T tokens of a volume, C classes

MAX_SHOWN = 10
"""Volumes whose table is printed; of more, the files alone are named."""

Predictions = dict[str, list[dict[str, Any]]]


def predict(
    encoder_bundle: str | Path | None,
    probe_dir: str | Path | None,
    dataset_dir: str | Path,
    output_dir: str | Path,
    encoder_configs: Sequence[str] = (),
    encoder_knobs: Mapping[str, Any] | None = None,
    num_pages: int = 0,
) -> Predictions:
    """Embed CTs with an encoder bundle and score them with a probe; write, print and return the result.

    ``predictions.csv`` has a row a volume and class, ``predictions.json`` the same by volume. The embeddings
    stay in ``output_dir/embeddings``; a second run embeds only what is new. ``<volume>.html`` is a page of
    one volume: its slices, the probabilities and how much each slice weighs in the probe's pooling.

    Args:
        encoder_bundle: folder of the encoder bundle; its ``inference.json`` is run.
        probe_dir: folder of ``probe.safetensors`` and ``probe.json``, an evaluation bundle's output_dir.
        dataset_dir: CT file or folder, whatever the encoder bundle reads.
        output_dir: where to write.
        encoder_configs: further config files that change the encoder bundle's, as in training.
        encoder_knobs: its knobs to set, such as ``encoder_weights`` or ``split``.
        num_pages: volumes that get a page, the first by name; some 3 MB each.

    Raises:
        FileNotFoundError: if the bundle or the probe does not exist.
        ValueError: if a knob does not exist, or the probe was made for other embeddings.
    """
    for name, folder in (("encoder_bundle", encoder_bundle), ("probe_dir", probe_dir)):
        if folder is None:
            raise ValueError(f"{name} must be a folder, got none. Pass --{name}.")
    output = Path(output_dir)
    probe, card = load_probe(Path(str(probe_dir)))
    knobs = {"dataset_dir": str(dataset_dir), "output_dir": str(output / "embeddings")}
    encoder = _encoder_config(Path(str(encoder_bundle)), encoder_configs, knobs | dict(encoder_knobs or {}))
    if "strategies" in encoder:
        encoder["strategies"] = [card["preprocessing"]]
    set_determinism(seed=encoder["seed"])
    if "embedding_identity" in encoder:  # before the CTs are embedded in vain
        _check_identity(card, encoder.get_parsed_content("embedding_identity"))
    encoder.get_parsed_content("run")
    store = EmbeddingStore(output / "embeddings")
    _check_identity(card, store.identity)
    volumes, sources = store.volumes, {}
    if "sources" in encoder:
        sources = {source.volume: source for source in encoder.get_parsed_content("sources")[0]}
        volumes = [volume for volume in volumes if volume in sources]
    predictions = {
        volume: _scores(probe, card, store.read_tokens([volume]).to(torch.float32)) for volume in volumes
    }
    _write(output, predictions)
    for volume in [volume for volume in volumes if volume in sources][:num_pages]:
        _write_page(output / f"{volume}.html", sources[volume], store, probe, predictions[volume])
    sys.stdout.write(_summary(output, predictions))
    return predictions


def _encoder_config(bundle: Path, configs: Sequence[str], knobs: Mapping[str, Any]) -> ConfigParser:
    own = bundle / "configs" / "inference.json"
    if not own.is_file():
        raise FileNotFoundError(f"encoder_bundle must have configs/inference.json, got none in '{bundle}'.")
    parser = ConfigParser()
    parser.read_config([str(own), *map(str, configs)])
    unknown = [name for name in knobs if name not in parser]
    if unknown:
        raise ValueError(f"encoder_knobs must be knobs of '{own}', got '{unknown[0]}', which it lacks.")
    parser.update(pairs={"bundle_root": str(bundle), **knobs})
    return parser


def _check_identity(card: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Compare what the probe was trained on with what the embeddings are, as far as both say."""
    for key in ("dim", *IDENTITY_KEYS):
        if key in card and key in identity and card[key] != identity[key]:
            raise ValueError(
                f"{key} must be {card[key]!r} as of the embeddings that the probe was trained on, "
                f"got {identity[key]!r}. Pass the --encoder_bundle and weights that the probe was made for."
            )


@torch.no_grad()
def _scores(probe: torch.nn.Module, card: Mapping[str, Any], tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Score one volume of ``tokens (T, D)``: probability, threshold and call of each class."""
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    probabilities = torch.sigmoid(probe(tokens[None], mask))[0].tolist()
    return [
        {"class": name, "probability": p, "threshold": threshold, "call": int(p >= threshold)}
        for name, p, threshold in zip(card["class_names"], probabilities, card["thresholds"], strict=True)
    ]


@torch.no_grad()
def _write_page(
    path: Path, source: CTSource, store: EmbeddingStore, probe: torch.nn.Module, rows: list[dict[str, Any]]
) -> None:
    """Show one volume; the weights of slices where its tokens are slices."""
    hu, spacing_mm = source.read()
    tokens = store.read_tokens([source.volume]).to(torch.float32)
    pooler: Any = probe.pooler
    weights = pooler.slice_weights(tokens) if len(tokens) == len(hu) else None
    write_ct_report(
        path,
        title=source.volume,
        hu=hu,
        z_mm=(np.arange(len(hu)) * spacing_mm[2]).tolist(),
        facts=[f"{len(hu)} slices", " x ".join(f"{side:.2f}" for side in spacing_mm) + " mm"],
        origin=f"Encoder {store.identity['encoder']}, {store.identity['encoder_id']}.",
        findings=[Finding(row["class"], row["probability"], row["threshold"]) for row in rows],
        attention=None if weights is None else weights.numpy().clip(0, 1),
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


def _summary(output: Path, predictions: Predictions) -> str:
    lines = []
    for volume, rows in list(predictions.items())[:MAX_SHOWN]:
        width = max(len(row["class"]) for row in rows)
        lines.append(f"\n{volume}\n{'':{width}}  probability  threshold")
        for row in rows:
            mark = "  positive" if row["call"] else ""
            lines.append(f"{row['class']:{width}}  {row['probability']:11.3f}  {row['threshold']:9.3f}{mark}")
    if len(predictions) > MAX_SHOWN:
        lines.append(f"\nand {len(predictions) - MAX_SHOWN} volumes more")
    lines.append(f"\n{len(predictions)} volumes in '{output / 'predictions.csv'}'. Not for clinical use.\n")
    return "\n".join(lines)
