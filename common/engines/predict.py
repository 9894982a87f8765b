"""From CT files to label probabilities: an encoder bundle, then a probe trained on its embeddings."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from timm.models.vision_transformer import VisionTransformer

from common.ct.rejection import Doubt, RejectedError, RejectedVolume
from common.embeddings.encoder_bundle import EncoderBundle
from common.embeddings.store import EmbeddingStore, check_identity
from common.embeddings.work import REJECTED, CTSource, report_rejected
from common.networks.mil_probe import load_probe
from common.reports.attended_slices import write_attended_slices
from common.reports.ct_report import Finding, write_ct_report
from common.reports.patch_maps import PatchMaps, cls_attention_maps
from common.run.config import first_cause
from common.run.process import atomic_file

# T tokens of a volume, C classes

NOT_CHEST_CT = "not a chest CT"

MAX_SHOWN = 10
"""Volumes whose table or reason is printed; of more, the files alone are named."""

Predictions = dict[str, list[dict[str, Any]]]


class ChestCTs(NamedTuple):
    """Volumes sorted by whether they look like upright CTs of a whole chest.

    Args:
        used: those to go on with.
        refused: those not, each with its reason.
        doubts: what seems wrong with volumes that are used.
        sha256: of the files of each volume that is used.
        has_image: ``(Z,)`` which of its slices are not blank.
    """

    used: list[CTSource]
    refused: list[RejectedVolume]
    doubts: dict[str, Sequence[Doubt]]
    sha256: dict[str, str]
    has_image: dict[str, np.ndarray]


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

    What does not look like an upright CT of a whole chest (:mod:`common.ct.checks`) is refused before
    anything is embedded, and listed with what cannot be read in ``rejected.csv``. Blank slices take no part.

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
    if "embedding_identity" in encoder:  # refuse before the CTs are read
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
    predictions = {
        volume: _scores(probe, card, _tokens(store, volume, chests.has_image[volume])) for volume in sources
    }
    _write(output, predictions)
    for volume in list(sources)[:num_pages]:
        notes = _notes(chests, volume)
        has_image = chests.has_image[volume]
        _write_page(output, sources[volume], encoder, store, probe, predictions[volume], has_image, notes)
    sys.stdout.write(_summary(output, predictions, chests, rejected))
    return predictions


def chest_cts(sources: Sequence[CTSource], num_workers: int, force: bool) -> ChestCTs:
    """Read all volumes and refuse those that do not look like chest CTs, or cannot be read.

    Args:
        sources: volumes.
        num_workers: threads that read, a volume each.
        force: use what does not look like a chest CT nonetheless; what cannot be read stays refused.
    """
    chests = ChestCTs([], [], {}, {}, {})

    def look_at(source: CTSource) -> RejectedVolume | None:
        volume = source.volume
        try:
            ct = source.read()
        except RejectedError as error:
            return error.of(volume)
        except (OSError, ValueError) as error:
            return RejectedError("unreadable", str(error)).of(volume)
        serious = [doubt.text for doubt in ct.doubts if doubt.refused]
        if serious and not force:
            return RejectedError(NOT_CHEST_CT, "; ".join(serious)).of(volume)
        chests.doubts[volume], chests.sha256[volume] = ct.doubts, ct.sha256
        chests.has_image[volume] = ~np.isin(np.arange(len(ct.hu)), ct.blank)
        return None

    with ThreadPoolExecutor(max(num_workers, 1), "check_ct") as pool:
        for source, refused in zip(sources, pool.map(look_at, sources), strict=True):
            if refused is None:
                chests.used.append(source)
            else:
                chests.refused.append(refused)
    return chests


def _notes(chests: ChestCTs, volume: str) -> list[str]:
    """What a reader of the result must know about a volume."""
    doubts = [doubt for doubt in chests.doubts[volume] if doubt.rule != "blank"]
    notes = [f"This does not look like a chest CT: {doubt.text}." for doubt in doubts if doubt.refused]
    notes += [f"Please check: {doubt.text}." for doubt in doubts if not doubt.refused]
    has_image = chests.has_image[volume]
    if not has_image.all():
        numbers = ", ".join(str(z + 1) for z in np.flatnonzero(~has_image))
        num_blank = np.count_nonzero(~has_image)
        notes.append(
            f"{num_blank} of {len(has_image)} slices are blank and take no part in the result: {numbers}."
        )
    return notes


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
    check_identity(
        identity,
        card,
        of="the embeddings",
        source="the probe needs",
        remedy="Pass the --encoder_bundle and weights that the probe was made for.",
    )


def _tokens(store: EmbeddingStore, volume: str, has_image: np.ndarray) -> torch.Tensor:
    """Read the tokens of a volume, without those of its blank slices."""
    tokens = store.view(volume).to(torch.float32)
    if store.identity["token_kind"] != "slice":
        return tokens
    return tokens[torch.from_numpy(has_image).repeat_interleave(len(tokens) // len(has_image))]


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
    has_image: np.ndarray,
    notes: Sequence[str],
) -> None:
    """Show one volume; the weights of slices where its tokens are slices."""
    hu, spacing_mm = source.read()[:2]
    z_mm = (np.arange(len(hu)) * spacing_mm[2]).tolist()
    tokens = _tokens(store, source.volume, has_image)
    pooler: Any = probe.pooler
    weights, maps = None, None
    if len(tokens) == has_image.sum() and store.identity["token_kind"] == "slice":
        weights = np.zeros(len(hu), np.float32)
        weights[has_image] = pooler.slice_weights(tokens).numpy().clip(0, 1)
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
        warnings=notes,
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
    doubts = [f"{source.volume}: {' '.join(_notes(chests, source.volume))}" for source in chests.used]
    lines += _listed("were used in spite of doubts", [text for text in doubts if not text.endswith(": ")])
    reasons = [f"{volume}: {reason}: {detail}" for volume, reason, detail in rejected]
    lines += _listed(f"were refused, see '{output / REJECTED}'", reasons)
    lines.append(f"\n{len(predictions)} volumes in '{output / 'predictions.csv'}'. Not for clinical use.\n")
    return "\n".join(lines)


def _listed(what: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    rest = [f"  and {len(texts) - MAX_SHOWN} more"] if len(texts) > MAX_SHOWN else []
    return [f"\n{len(texts)} volumes {what}:", *(f"  {text}" for text in texts[:MAX_SHOWN]), *rest]
