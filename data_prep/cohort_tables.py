"""The two tables beside the shards: what is in them, and what was left out."""

import csv
from collections.abc import Sequence
from pathlib import Path

from common.data.atomic_file import atomic_file
from common.data.shard_index import RejectedVolume, ShardIndex, index_path, load_index
from common.data.shards import SHARD_NAME

MANIFEST = "manifest.csv"
MANIFEST_COLUMNS = (
    *(
        "volume",
        "split",
        "shard",
        "first_sample",
        "num_slices",
        "spacing_x_mm",
        "spacing_y_mm",
        "spacing_z_mm",
    ),
    *("height_px", "width_px", "original_shape", "original_axcodes", "has_ts", "has_rex"),
)
REJECTED = "rejected.csv"
REJECTED_COLUMNS = ("volume", "split", "reason", "detail")


def write_manifest(out: Path) -> None:
    """Write one row a volume of every finished shard in a folder, of all splits.

    Args:
        out: folder of the shards.
    """
    with atomic_file(out / MANIFEST, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(MANIFEST_COLUMNS)
        for shard in sorted(out.iterdir()):
            if SHARD_NAME.fullmatch(shard.name) and index_path(shard).is_file():
                table.writerows(_manifest_rows(shard.name, load_index(shard)))


def _manifest_rows(shard: str, index: ShardIndex) -> list[list[object]]:
    first_samples = index.first_sample
    return [
        [volume, index.split, shard, first_samples[i], index.num_slices[i]]
        + [f"{mm:g}" for mm in index.spacing_mm[i]]
        + [*index.shape[i], "x".join(map(str, index.original_shape[i])), index.original_axcodes[i]]
        + [int(index.has_ts[i]), int(index.has_rex[i])]
        for i, volume in enumerate(index.volume)
    ]


def write_rejected(out: Path, split: str, rejected: Sequence[RejectedVolume]) -> None:
    """Write one row a volume that was left out; rows of other splits stay.

    Args:
        out: folder of the shards.
        split: whose rows to replace.
        rejected: its volumes.
    """
    path = out / REJECTED
    rows: list[tuple[str, ...]] = [(item.volume, split, item.reason, item.detail) for item in rejected]
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["split"] != split]
        rows += [tuple(row[column] for column in REJECTED_COLUMNS) for row in kept]
    rows.sort(key=lambda row: (row[1], row[0]))
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(REJECTED_COLUMNS)
        table.writerows(rows)
