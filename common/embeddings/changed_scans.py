"""Slices of CTs as they are and after each change, in batches for an encoder, from one reading."""

# Z slices, H side of a slice

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cohort.cohort import load_labels
from common.ct import nifti
from common.ct.files import open_volume
from common.ct.rejection import RejectedError
from common.embeddings.ct_batches import Prepared, SliceBatches, Task
from common.embeddings.work import CTSource
from common.transforms.scan_changes import CHANGES, Scan
from common.transforms.slice_strategies import SliceStrategy, body_box, pad_to_square

logger = logging.getLogger(__name__)
UNCHANGED = "unchanged"
BLOOD = (
    *("heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk", "atrial_appendage_left"),
    *("subclavian_artery_right", "subclavian_artery_left", "superior_vena_cava", "inferior_vena_cava"),
    *("common_carotid_artery_right", "common_carotid_artery_left"),
    *("brachiocephalic_vein_left", "brachiocephalic_vein_right"),
)
"""TotalSegmentator's classes that hold blood in a chest CT."""


class ChangedScans(SliceBatches):
    """Batches of the slices of volumes as they are and after each change, from one reading of each.

    A change that a volume does not allow is left out. The random numbers of a change are a function of seed,
    volume and change, the same for all its strengths.

    Args:
        changes: name and strength of each, see :func:`common.transforms.scan_changes.chosen_changes`.
        seed: seed of the changes.
        masks: volume to its TotalSegmentator label map; may be empty.
        others: as :class:`SliceBatches`, of one strategy.

    Yields:
        As :class:`SliceBatches`; the ``store`` of a task is the label of its change, and its metadata have
        ``origin``, see :class:`common.transforms.scan_changes.Scan`, and the ``sha256`` of its files.
    """

    def __init__(
        self,
        *,
        changes: Sequence[tuple[str, float]],
        seed: int,
        masks: Mapping[str, Path],
        **others: Any,  # noqa: ANN401 (SliceBatches')
    ) -> None:
        super().__init__(**others)
        self.changes, self.seed, self.masks = changes, seed, masks

    def shown(
        self, source: CTSource, prepared: Prepared
    ) -> Iterator[tuple[Task, SliceStrategy, torch.Tensor]]:
        """Yield the volume as it is, then each change of it."""
        (strategy,) = self.strategies.values()
        hu = prepared.pixels.to(self.device)
        scan = Scan(hu, prepared.spacing_mm, torch.arange(len(hu)), self._blood(source.volume, hu))
        for name, strength in ((UNCHANGED, 0.0), *self.changes):
            changed: Scan | None = scan
            if name != UNCHANGED:
                generator = generator_of(self.seed, source.volume, name, self.device)
                changed = CHANGES[name].apply(scan, strength, generator)
            if changed is None:
                continue
            hu, spacing_mm, origin, _ = changed
            box = body_box(hu) if strategy.is_cropped else None
            kind = label(name, strength)
            facts = {"origin": origin, "sha256": prepared.notes.get("sha256", "")}
            task = Task(source.volume, kind, len(hu), spacing_mm, facts, strategy)
            yield task, strategy, strategy.region(hu, box)

    def _blood(self, volume: str, hu: torch.Tensor) -> torch.Tensor | None:
        path = self.masks.get(volume)
        if path is None:
            return None
        try:
            with open_volume(path) as file:
                labels = pad_to_square(nifti.read_ct(file).hu, 0)
        except RejectedError as error:
            logger.warning("Cannot read the masks '%s': %s", path, error.detail)
            return None
        if labels.shape != hu.shape:
            logger.warning("'%s' has %s voxels and its CT %s: no masks.", path, labels.shape, tuple(hu.shape))
            return None
        names = [one.name for one in load_labels("totalsegmentator")]
        return torch.from_numpy(np.isin(labels, [names.index(name) for name in BLOOD])).to(hu.device)


def generator_of(seed: int, volume: str, change: str, device: torch.device) -> torch.Generator:
    """Return the random numbers of a change of a volume."""
    words = (zlib.crc32(text.encode()) for text in (volume, change))
    state = np.random.SeedSequence([seed, *words]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def label(change: str, strength: float) -> str:
    """Name a change with its strength, as protocols do."""
    return change if change == UNCHANGED or not CHANGES[change].axis else f"{change}_{strength:g}"
