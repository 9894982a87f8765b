"""From CT files to label probabilities: an encoder bundle, then a probe trained on its embeddings."""

# T tokens of a volume, Z slices, C classes

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.utils import set_determinism
from timm.models.vision_transformer import VisionTransformer

from common.ct.rejection import Doubt, RejectedError, RejectedVolume
from common.embeddings.ct_batches import Prepared, read_ahead
from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.embeddings.store import EmbeddingStore, check_identity, stored_volumes
from common.embeddings.work import REJECTED, CTSlices, CTSource
from common.networks.mil_probe import MILProbe, load_probe
from common.reports.ct_report import Finding, write_attended_slices, write_ct_report
from common.reports.ct_tokens import cls_attention_maps
from common.run.process import atomic_file

NOT_CHEST_CT = "not a chest CT"

MAX_SHOWN = 10
"""Volumes whose table or reason is printed; of more, the files alone are named."""

Predictions = dict[str, list[dict[str, Any]]]


class ReadCT(NamedTuple):
    """What is remembered of a volume that was read and used.

    Args:
        sha256: checksum of its files.
        doubts: what seems wrong with it.
        has_image: ``(Z,)`` which of its slices are not blank.
    """

    sha256: str
    doubts: Sequence[Doubt]
    has_image: np.ndarray

    @property
    def notes(self) -> list[str]:
        """What a reader of the result must know about it."""
        doubts = [doubt for doubt in self.doubts if doubt.rule != "blank"]
        notes = [f"This does not look like a chest CT: {doubt.text}." for doubt in doubts if doubt.refused]
        notes += [f"Please check: {doubt.text}." for doubt in doubts if not doubt.refused]
        if blank := [str(z + 1) for z in np.flatnonzero(~self.has_image)]:
            shares = f"{len(blank)} of {len(self.has_image)}"
            numbers = ", ".join(blank)
            notes.append(f"{shares} slices are blank and take no part in the result: {numbers}.")
        return notes


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
    how much each slice weighs in the probe's pooling, and where in the slice a vision transformer looks;
    ``<volume>_attended.png`` shows the slices of largest weight.

    A volume is read once; those that get a page twice, as their slices are too large to be kept meanwhile.

    Args:
        encoder_bundle: folder of the encoder bundle; its ``inference.json`` is run.
        probe_dir: folder of ``probe.safetensors`` and ``probe.json``, an evaluation bundle's output_dir.
        dataset_dir: CT file or folder, in any form that the encoder bundle reads.
        output_dir: folder to write.
        encoder_configs: further config files that change the encoder bundle's, as in training.
        encoder_knobs: knobs of the encoder bundle to set, such as ``encoder_weights`` or ``split``.
        num_pages: volumes that get a page and a picture, the first by name; some 3 MB each.
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
    folder = output / "embeddings"
    probe, card = load_probe(probe_dir)
    knobs = {"dataset_dir": str(dataset_dir), "output_dir": str(folder), **(encoder_knobs or {})}
    bundle = open_encoder_bundle(encoder_bundle, encoder_configs, knobs)
    if "strategies" in bundle:
        bundle.update({"strategies": [card["preprocessing"]]})
    set_determinism(seed=bundle["seed"])
    if "embedding_identity" in bundle:  # refuse before the CTs are read
        _check_identity(card, bundle["embedding_identity"])
    found, rejected = bundle["sources"]
    cts: dict[str, ReadCT] = {}
    sources = [source._replace(read=partial(read_chest_ct, source, force, cts)) for source in found]
    rejected = [*rejected, *_compare_files(folder, sources, cts, bundle["num_workers"])]
    left_out = {item.volume for item in rejected}
    sources = [source for source in sources if source.volume not in left_out]
    handlers = {"handlers::0::output_dir": str(output), "max_rejected": 1.0}
    bundle.update({"sources": (sources, rejected), **handlers})
    _ = bundle["run"]
    rejected = bundle["dataloader"].rejected
    embedded = stored_volumes(folder)
    used = [source for source in found if source.volume in embedded and source.volume in cts]
    if not used:
        raise _nothing_left(rejected, dataset_dir)
    store = EmbeddingStore(folder)
    _check_identity(card, store.identity)
    predictions = {
        source.volume: _scores(probe, card, _tokens(store, source.volume, cts[source.volume].has_image))
        for source in used
    }
    _write(output, predictions)
    for source in used[:num_pages]:
        ct, rows = cts[source.volume], predictions[source.volume]
        _write_page(output, source, ct, bundle=bundle, store=store, probe=probe, rows=rows)
    notes = {source.volume: cts[source.volume].notes for source in used}
    sys.stdout.write(_summary(output, predictions, notes, rejected))
    return predictions


def read_chest_ct(source: CTSource, force: bool, cts: dict[str, ReadCT]) -> CTSlices:
    """Read a volume, refuse what does not look like a chest CT, and remember the rest.

    Args:
        source: the volume.
        force: whether to use what does not look like a chest CT nonetheless.
        cts: what is remembered, by volume.

    Raises:
        RejectedError: if it must not be used.
    """
    ct = source.read()
    serious = [doubt.text for doubt in ct.doubts if doubt.refused]
    if serious and not force:
        raise RejectedError(NOT_CHEST_CT, "; ".join(serious))
    has_image = ~np.isin(np.arange(len(ct.hu)), ct.blank)
    cts[source.volume] = ReadCT(ct.sha256, ct.doubts, has_image)
    return ct


def _compare_files(
    folder: Path, sources: Sequence[CTSource], cts: Mapping[str, ReadCT], num_workers: int
) -> list[RejectedVolume]:
    """Read the volumes that are embedded already, and refuse one that was embedded from another file."""
    if not stored_volumes(folder):
        return []
    store = EmbeddingStore(folder)
    memory = folder / "sources.json"  # of earlier versions
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
    known |= {volume: store.read(volume).metadata.get("sha256") for volume in store.volumes}
    rejected: list[RejectedVolume] = []
    again = [source for source in sources if source.volume in known]
    for source, _ in read_ahead(again, _without_pixels, num_workers, rejected):
        if known[source.volume] not in (None, cts[source.volume].sha256):
            raise ValueError(
                f"'{source.volume}' was embedded in '{folder}' from another file. Choose another "
                "--output_dir, rename the file, or delete the folder."
            )
    return rejected


def _without_pixels(source: CTSource) -> Prepared:
    ct = source.read()
    return Prepared(torch.empty(0), ct.spacing_mm, ct.notes)


def _nothing_left(rejected: Sequence[RejectedVolume], dataset_dir: str | Path) -> ValueError:
    volume, reason, detail = rejected[0]
    others = f" {len(rejected) - 1} more are in '{REJECTED}'." if len(rejected) > 1 else ""
    return ValueError(
        f"No chest CT in '{dataset_dir}': '{volume}' is refused, {reason}: {detail}.{others} "
        "Pass --force True to predict nonetheless what can be read."
    )


def _check_identity(card: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    remedy = "Pass the --encoder_bundle and weights that the probe was made for."
    check_identity(identity, card, of="the embeddings", source="the probe needs", remedy=remedy)


def _tokens(store: EmbeddingStore, volume: str, has_image: np.ndarray) -> torch.Tensor:
    """Read the tokens of a volume, without those of its blank slices."""
    tokens = store.view(volume).to(torch.float32)
    if store.identity["token_kind"] != "slice":
        return tokens
    return tokens[torch.from_numpy(has_image).repeat_interleave(len(tokens) // len(has_image))]


@torch.no_grad()
def _scores(probe: MILProbe, card: Mapping[str, Any], tokens: torch.Tensor) -> list[dict[str, Any]]:
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
    ct: ReadCT,
    *,
    bundle: EncoderBundle,
    store: EmbeddingStore,
    probe: MILProbe,
    rows: list[dict[str, Any]],
) -> None:
    """Show one volume; the weights of slices where its tokens are slices."""
    hu, spacing_mm = source.read()[:2]
    z_mm = (np.arange(len(hu)) * spacing_mm[2]).tolist()
    tokens = _tokens(store, source.volume, ct.has_image)
    weights, maps = None, None
    if len(tokens) == ct.has_image.sum() and store.identity["token_kind"] == "slice":
        weights = np.zeros(len(hu), np.float32)
        weights[ct.has_image] = probe.slice_weights(tokens).numpy().clip(0, 1)
        (strategy,) = bundle.strategies
        if not strategy.is_tiled and isinstance(bundle.network, VisionTransformer):
            box = store.read(source.volume).metadata.get("box")
            maps = cls_attention_maps(bundle, strategy, hu, box)
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
        maps=maps,
        warnings=ct.notes,
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


def _summary(
    output: Path,
    predictions: Predictions,
    notes: Mapping[str, Sequence[str]],
    rejected: Sequence[RejectedVolume],
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
    doubtful = [f"{volume}: {' '.join(texts)}" for volume, texts in notes.items() if texts]
    refused = [f"{volume}: {reason}: {detail}" for volume, reason, detail in rejected]
    listed = {"were used in spite of doubts": doubtful, f"were refused, see '{output / REJECTED}'": refused}
    for what, texts in listed.items():
        if texts:
            lines += [f"\n{len(texts)} volumes {what}:", *(f"  {text}" for text in texts[:MAX_SHOWN])]
        if len(texts) > MAX_SHOWN:
            lines.append(f"  and {len(texts) - MAX_SHOWN} more")
    lines.append(f"\n{len(predictions)} volumes in '{output / 'predictions.csv'}'. Not for clinical use.\n")
    return "\n".join(lines)
