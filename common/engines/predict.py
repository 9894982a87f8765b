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
from timm.models.vision_transformer import VisionTransformer

from common.ct.checks import ChestCTs, chest_cts
from common.ct.rejection import RejectedVolume
from common.embeddings.encoder_bundle import EncoderBundle
from common.embeddings.part import IDENTITY_KEYS
from common.embeddings.rejected_volumes import REJECTED, report_rejected
from common.embeddings.sources import CTSource
from common.embeddings.store import EmbeddingStore
from common.networks.mil_probe import load_probe
from common.reports.attended_slices import write_attended_slices
from common.reports.ct_report import Finding, write_ct_report
from common.reports.patch_maps import PatchMaps, cls_attention_maps
from common.run.atomic_file import atomic_file
from common.run.short_errors import first_cause

# T tokens of a volume, C classes

MAX_SHOWN = 10
"""Volumes whose table or reason is printed; of more, the files alone are named."""

Predictions = dict[str, list[dict[str, Any]]]


def predict(
    encoder_bundle: str | Path | None,
    probe_dir: str | Path | None,
    dataset_dir: str | Path,
    output_dir: str | Path,
    encoder_configs: Sequence[str] = (),
    encoder_knobs: Mapping[str, Any] | None = None,
    num_pages: int = 10,
    force: bool = False,
) -> Predictions:
    """Embed CTs with an encoder bundle and score them with a probe; write, print and return the result.

    What does not look like a chest CT (:mod:`common.ct.checks`) is refused before anything is embedded,
    and listed with what cannot be read in ``rejected.csv``.

    ``predictions.csv`` has a row a volume and class, ``predictions.json`` the same by volume. The embeddings
    stay in ``output_dir/embeddings``; a second run embeds only what is new, and refuses another file of a
    name that is there. ``<volume>.html`` is a page of one volume: its slices, the probabilities, how much
    each slice weighs in the probe's pooling, and where in the slice a vision transformer looks;
    ``<volume>_attended.png`` shows the slices of largest weight.

    Args:
        encoder_bundle: folder of the encoder bundle; its ``inference.json`` is run.
        probe_dir: folder of ``probe.safetensors`` and ``probe.json``, an evaluation bundle's output_dir.
        dataset_dir: CT file or folder, whatever the encoder bundle reads.
        output_dir: where to write.
        encoder_configs: further config files that change the encoder bundle's, as in training.
        encoder_knobs: its knobs to set, such as ``encoder_weights`` or ``split``.
        num_pages: volumes that get a page and a picture, the first by name; some 3 MB each.
        force: go on with what does not look like a chest CT; the page and the terminal say so.

    Returns:
        For each volume a dictionary a class, with ``class``, ``probability``, ``threshold`` and ``call``, 1
        for a probability that reaches the threshold.

    Raises:
        FileNotFoundError: if the bundle, the probe or a CT does not exist.
        ValueError: if a knob does not exist, the probe was made for other embeddings, or no volume is left,
            or one was embedded from another file before.
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
        _check_identity(card, _parsed(encoder, "embedding_identity"))
    found, unusable = _parsed(encoder, "sources")
    chests = chest_cts(found, _parsed(encoder, "num_workers"), force)
    rejected = [*chests.refused, *unusable]
    report_rejected(output, rejected, len(found) + len(unusable), max_rejected=1.0)
    _check_left(chests, rejected, dataset_dir)
    _check_files(output / "embeddings", chests.sha256)
    encoder["sources"] = (chests.used, [])
    _parsed(encoder, "run")
    store = EmbeddingStore(output / "embeddings")
    _check_identity(card, store.identity)
    sources = {source.volume: source for source in chests.used}
    predictions = {volume: _scores(probe, card, store.view(volume).to(torch.float32)) for volume in sources}
    _write(output, predictions)
    for volume in list(sources)[:num_pages]:
        doubts = chests.doubts.get(volume, [])
        _write_page(output, sources[volume], encoder, store, probe, predictions[volume], doubts)
    sys.stdout.write(_summary(output, predictions, chests, rejected))
    return predictions


def _parsed(encoder: ConfigParser, name: str) -> Any:  # noqa: ANN401 (whatever the config makes)
    """Resolve a part of the config; an error is the component's own, not MONAI's of each reference to it."""
    try:
        return encoder.get_parsed_content(name)
    except RuntimeError as error:
        cause = first_cause(error)
        if cause is None:
            raise
        raise cause from None


def _check_left(chests: ChestCTs, rejected: Sequence[RejectedVolume], dataset_dir: str | Path) -> None:
    if chests.used:
        return
    volume, reason, detail = rejected[0]
    others = f" {len(rejected) - 1} more are in '{REJECTED}'." if len(rejected) > 1 else ""
    raise ValueError(
        f"dataset_dir must hold a chest CT, got none in '{dataset_dir}': '{volume}' is refused, {reason}: "
        f"{detail}.{others} Pass --force True to predict nonetheless what can be read."
    )


def _check_files(folder: Path, sha256: Mapping[str, str]) -> None:
    """Refuse a volume that was embedded from another file, and remember of which each will be."""
    memory = folder / "sources.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
    other = [volume for volume, digest in sha256.items() if known.get(volume, digest) != digest]
    if other:
        raise ValueError(
            f"a volume must be the file that was embedded in '{folder}', got another '{other[0]}' "
            f"({len(other)} in all). Choose another --output_dir, rename the file, or delete the folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(memory, "w", encoding="utf-8") as file:
        json.dump({**known, **sha256}, file, indent=1)


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
    output: Path,
    source: CTSource,
    encoder: ConfigParser,
    store: EmbeddingStore,
    probe: torch.nn.Module,
    rows: list[dict[str, Any]],
    doubts: Sequence[str],
) -> None:
    """Show one volume; the weights of slices where its tokens are slices."""
    hu, spacing_mm, _ = source.read()
    z_mm = (np.arange(len(hu)) * spacing_mm[2]).tolist()
    tokens = store.view(source.volume).to(torch.float32)
    pooler: Any = probe.pooler
    weights, maps = None, None
    if len(tokens) == len(hu) and store.identity["token_kind"] == "slice":
        weights = pooler.slice_weights(tokens).numpy().clip(0, 1)
        maps = _patch_maps(encoder, hu, store.read(source.volume).metadata)
        write_attended_slices(output / f"{source.volume}_attended.png", source.volume, hu, z_mm, weights)
    write_ct_report(
        output / f"{source.volume}.html",
        title=source.volume,
        hu=hu,
        z_mm=z_mm,
        facts=[f"{len(hu)} slices", " x ".join(f"{side:.2f}" for side in spacing_mm) + " mm"],
        origin=f"Encoder {store.identity['encoder']}, {store.identity['encoder_id']}.",
        findings=[Finding(row["class"], row["probability"], row["threshold"]) for row in rows],
        attention=weights,
        patch_maps=None if maps is None else maps.values,
        map_box=(0, 0, 1, 1) if maps is None else maps.box,
        map_note="" if maps is None else maps.note,
        warnings=[f"This does not look like a chest CT: {doubt}." for doubt in doubts],
    )


def _patch_maps(encoder: ConfigParser, hu: np.ndarray, metadata: Mapping[str, Any]) -> PatchMaps | None:
    """Maps of an encoder that has CLS and patches, of one image a slice."""
    network, (strategy,) = _parsed(encoder, "network"), _parsed(encoder, "preprocessing")
    if strategy.is_tiled or not isinstance(network, VisionTransformer):
        return None
    whole = (0, 0, hu.shape[-1])
    box = tuple(metadata["box"]) if strategy.is_cropped else whole
    return cls_attention_maps(EncoderBundle(encoder), strategy, hu, box)


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


def _summary(
    output: Path, predictions: Predictions, chests: ChestCTs, rejected: Sequence[RejectedVolume]
) -> str:
    lines = []
    for volume, rows in list(predictions.items())[:MAX_SHOWN]:
        width = max(len(row["class"]) for row in rows)
        lines.append(f"\n{volume}\n{'':{width}}  probability  threshold")
        for row in rows:
            mark = "  positive" if row["call"] else ""
            lines.append(f"{row['class']:{width}}  {row['probability']:11.3f}  {row['threshold']:9.3f}{mark}")
    if len(predictions) > MAX_SHOWN:
        lines.append(f"\nand {len(predictions) - MAX_SHOWN} volumes more")
    doubts = [f"{volume}: {'; '.join(texts)}" for volume, texts in chests.doubts.items()]
    lines += _listed("do not look like a chest CT and were used by force", doubts)
    reasons = [f"{volume}: {reason}: {detail}" for volume, reason, detail in rejected]
    lines += _listed(f"were refused, see '{output / REJECTED}'", reasons)
    lines.append(f"\n{len(predictions)} volumes in '{output / 'predictions.csv'}'. Not for clinical use.\n")
    return "\n".join(lines)


def _listed(what: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    rest = [f"  and {len(texts) - MAX_SHOWN} more"] if len(texts) > MAX_SHOWN else []
    return [f"\n{len(texts)} volumes {what}:", *(f"  {text}" for text in texts[:MAX_SHOWN]), *rest]
