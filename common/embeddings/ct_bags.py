"""CTs with labels, as bags of images for an encoder that is trained on them."""

# N volumes, C classes, S slices, I side of an image

import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common.cohort.cohort import read_labels
from common.ct.rejection import RejectedVolume, is_failure
from common.embeddings.ct_batches import Prepared, images_of, read_ahead, read_slices
from common.embeddings.encoder_bundle import EncoderBundle
from common.embeddings.work import CTSource

logger = logging.getLogger(__name__)


class CTBags:
    """A cohort of CTs: labels in memory, images read ahead in threads as the encoder wants them.

    Attributes:
        volumes: N names.
        labels: float32 ``(N, C)`` of 0 and 1.

    Args:
        sources: CTs, see :func:`common.embeddings.work.ct_sources`.
        labels_csv: label table, see :func:`common.cohort.cohort.read_labels`.
        class_names: classes to read, columns of the table.
        encoder: bundle of an encoder of slices: strategy, HU window and axes of its images.
        num_workers: threads that read ahead; 0 reads when needed.
        device: device on which images are made.
        volumes: volumes to use; None for all.

    Raises:
        FileNotFoundError: if the table does not exist, or there is no CT of one of ``volumes``.
        ValueError: if there is no volume, a volume has no labels, or the encoder is one of volumes or shows a
            slice as several images.
    """

    def __init__(
        self,
        *,
        sources: Sequence[CTSource],
        labels_csv: str | Path,
        class_names: Sequence[str],
        encoder: EncoderBundle,
        num_workers: int,
        device: torch.device,
        volumes: Sequence[str] | None = None,
    ) -> None:
        if "strategies" not in encoder:
            raise ValueError(f"encoder_bundle must encode slices, got '{encoder.name}', of volumes.")
        (self.strategy, *others) = encoder.strategies
        if others or self.strategy.num_images > 1:
            raise ValueError(f"strategies must be one, of one image per slice, got {encoder['strategies']}.")
        by_name = {source.volume: source for source in sources}
        labels = read_labels(labels_csv, class_names)
        self.volumes = list(by_name if volumes is None else volumes)
        if not self.volumes:
            raise ValueError(f"No CT of a volume in '{labels_csv}'.")
        for volume in self.volumes:
            if volume not in by_name:
                raise FileNotFoundError(f"No CT of volume '{volume}'.")
            if volume not in labels:
                raise ValueError(f"No row of volume '{volume}' in '{labels_csv}'.")
        self.sources = [by_name[volume] for volume in self.volumes]
        self.class_names = list(class_names)
        self.labels = torch.from_numpy(np.array([labels[volume] for volume in self.volumes], np.float32))
        self.window, self.slice_axes = encoder.window, encoder.slice_axes
        self.num_workers, self.device = num_workers, torch.device(device)

    def __len__(self) -> int:
        return len(self.volumes)

    def checksum(self) -> str:
        """Return eight hexadecimal digits that tell these volumes and labels from others."""
        listed = json.dumps([self.volumes, self.class_names, self.labels.tolist()])
        return f"{zlib.crc32(listed.encode()):08x}"

    def read(self, indices: Iterable[int]) -> Iterator[torch.Tensor]:
        """Yield the images ``(S, 1, I, I)`` of volumes by their places in the cohort, in this order.

        Raises:
            ValueError: if a volume cannot be read: training without it would be another training.
        """
        rejected: list[RejectedVolume] = []
        work = (self.sources[index] for index in indices)
        for _, prepared in read_ahead(work, self._images, self.num_workers, rejected):
            _refuse(rejected)
            yield prepared.pixels
        _refuse(rejected)

    def _images(self, source: CTSource) -> Prepared:
        """Read a volume and make its images, in a thread: they take less memory than its slices."""
        prepared = read_slices(source, self.strategy.is_cropped)
        region = self.strategy.region(prepared.pixels, prepared.box)
        images = images_of(region, self.strategy, self.window, self.slice_axes, self.device)
        return prepared._replace(pixels=images)


def _refuse(rejected: Sequence[RejectedVolume]) -> None:
    if rejected:
        volume, reason, detail = rejected[0]
        raise ValueError(
            f"Cannot read '{volume}': {reason}: {detail}. Replace the file, or name it in --skip_list. "
            "An embedding run with the same --dataset_dir lists all such volumes."
        )


def labelled_cts(
    sources: tuple[Sequence[CTSource], Sequence[RejectedVolume]], labels_csv: str | Path
) -> list[str]:
    """List the CTs that have labels, in the order of the label table; those without are counted in a warning.

    Args:
        sources: CTs and what was left out, of :func:`common.embeddings.work.ct_sources`.
        labels_csv: label table.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if a CT cannot be read, or none has labels.
    """
    _refuse([volume for volume in sources[1] if is_failure(volume)])
    found, labels = {source.volume for source in sources[0]}, read_labels(labels_csv, [])
    for what, missing in (("CTs", found - labels.keys()), ("rows", labels.keys() - found)):
        if missing:
            logger.warning(
                "%d %s have no counterpart in '%s' and are left out, such as '%s'.",
                *(len(missing), what, labels_csv if what == "CTs" else "the CTs", min(missing)),
            )
    volumes = [volume for volume in labels if volume in found]
    if not volumes:
        raise ValueError(f"None of {len(found)} CTs has a row in '{labels_csv}', such as '{min(found)}'.")
    return volumes
