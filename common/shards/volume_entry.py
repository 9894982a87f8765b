"""What a shard set lists of each volume."""

from typing import NamedTuple

from common.shards.index import UNLABELLED, ShardIndex


class VolumeEntry(NamedTuple):
    """One volume of a shard set.

    Args:
        volume: name.
        shard: path of the tar.
        first_sample: place of its first slice in the shard.
        num_slices: its slices.
        spacing_mm: as (x, y, z).
        shape: height and width of its slices.
        has_ts: whether it has a TotalSegmentator label map.
        has_rex: whether it is annotated by ReXGroundingCT.
        labels: class name to 0 or 1, or None.
        source: path of the CT, of a DICOM series its folder, relative to the input folder.
        source_sha256: of the CT's bytes; of several files, of their digests in order.
    """

    volume: str
    shard: str
    first_sample: int
    num_slices: int
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int]
    has_ts: bool
    has_rex: bool
    labels: dict[str, int] | None
    source: str
    source_sha256: str


def volume_entries(shard: str, index: ShardIndex) -> list[VolumeEntry]:
    """List the volumes of a shard.

    Args:
        shard: path of the tar.
        index: of the shard.
    """
    names, first_samples = index.label_names.tolist(), index.first_sample.tolist()
    return [
        VolumeEntry(
            volume=str(index.volume[i]),
            shard=shard,
            first_sample=first_samples[i],
            num_slices=int(index.num_slices[i]),
            spacing_mm=tuple(index.spacing_mm[i].tolist()),
            shape=tuple(index.shape[i].tolist()),
            has_ts=bool(index.has_ts[i]),
            has_rex=bool(index.has_rex[i]),
            labels=None
            if not names or UNLABELLED in index.labels[i]
            else dict(zip(names, index.labels[i].tolist(), strict=True)),
            source=str(index.source[i]),
            source_sha256=str(index.source_sha256[i]),
        )
        for i in range(len(index.volume))
    ]
