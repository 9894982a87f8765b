"""CTs of whole chests, read, judged and embedded for a result that people look at."""

# T tokens of a volume, Z slices, D embedding

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.utils import set_determinism

from common.ct.rejection import Doubt, RejectedError, RejectedVolume
from common.embeddings.ct_batches import Prepared, read_ahead
from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.embeddings.store import EmbeddingStore, check_identity, stored_volumes
from common.embeddings.work import REJECTED, CTSlices, CTSource

NOT_CHEST_CT = "not a chest CT"

MAX_SHOWN = 10
"""Volumes whose table or reason is printed; of more, the files alone are named."""


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


class EmbeddedCTs(NamedTuple):
    """CTs whose embeddings lie in a store."""

    bundle: EncoderBundle  # of their encoder
    store: EmbeddingStore
    used: list[CTSource]  # read and not refused
    cts: dict[str, ReadCT]  # what is remembered of these
    rejected: Sequence[RejectedVolume]

    def tokens(self, volume: str) -> torch.Tensor:
        """Read the tokens of a volume ``(T, D)``, without those of its blank slices."""
        tokens = self.store.view(volume).to(torch.float32)
        if self.store.identity["token_kind"] != "slice":
            return tokens
        has_image = self.cts[volume].has_image
        return tokens[torch.from_numpy(has_image).repeat_interleave(len(tokens) // len(has_image))]

    @property
    def origin(self) -> str:
        """Which encoder, with which weights, for the foot of a page."""
        known = self.store.identity
        return (
            f"Encoder {known['encoder']}, weights {known.get('weights', 'unknown')}, {known['encoder_id']}."
        )

    def remarks(self, output: Path) -> list[str]:
        """List for the terminal what was used in spite of doubts, and what was refused."""
        notes = {source.volume: self.cts[source.volume].notes for source in self.used}
        doubtful = [f"{volume}: {' '.join(texts)}" for volume, texts in notes.items() if texts]
        refused = [f"{volume}: {reason}: {detail}" for volume, reason, detail in self.rejected]
        lines = []
        listed = {
            "were used in spite of doubts": doubtful,
            f"were refused, see '{output / REJECTED}'": refused,
        }
        for what, texts in listed.items():
            if texts:
                lines += [f"\n{len(texts)} volumes {what}:", *(f"  {text}" for text in texts[:MAX_SHOWN])]
            if len(texts) > MAX_SHOWN:
                lines.append(f"  and {len(texts) - MAX_SHOWN} more")
        return lines


def embed_chest_cts(
    encoder_bundle: str | Path,
    dataset_dir: str | Path,
    output: Path,
    *,
    encoder_configs: Sequence[str],
    encoder_knobs: Mapping[str, Any] | None,
    force: bool,
    card: Mapping[str, Any] | None = None,
) -> EmbeddedCTs:
    """Embed the CTs that look like a chest into ``output/embeddings``; what is there already stays.

    Arguments and errors are those of :func:`common.engines.predict.predict`; ``card`` is that of the probe
    that the embeddings must fit, None for the bundle's own preprocessing.
    """
    folder = output / "embeddings"
    knobs = {"dataset_dir": str(dataset_dir), "output_dir": str(folder), **(encoder_knobs or {})}
    bundle = open_encoder_bundle(encoder_bundle, encoder_configs, knobs)
    if card and "strategies" in bundle:
        bundle.update({"strategies": [card["preprocessing"]]})
    set_determinism(seed=bundle["seed"])
    if card and "embedding_identity" in bundle:  # refuse before the CTs are read
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
    if card:
        _check_identity(card, store.identity)
    return EmbeddedCTs(bundle, store, used, cts, rejected)


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
        "Pass --force True (dale-ct: --force) to use nonetheless what can be read."
    )


def _check_identity(card: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    remedy = "Pass the --encoder_bundle and weights that the probe was made for."
    check_identity(identity, card, of="the embeddings", source="the probe needs", remedy=remedy)
