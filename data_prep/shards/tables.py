"""The two tables beside the shards: what is in them, and what was left out."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.ct.rejection import RejectedVolume
from common.run.process import atomic_file
from common.shards.index import ShardIndex, index_path, load_index
from common.shards.shards import SHARD_NAME

MANIFEST = "manifest.csv"
MANIFEST_COLUMNS = (
    *("volume", "split", "status", "source", "source_sha256", "shard", "first_sample", "num_slices"),
    *("spacing_x_mm", "spacing_y_mm", "spacing_z_mm", "height_px", "width_px"),
    *("original_shape", "original_axcodes", "has_ts", "has_rex", "doubts", "reason"),
)
WRITTEN = "written"
LEFT_OUT = "rejected"
REJECTED = "rejected.csv"
REJECTED_COLUMNS = ("volume", "split", "reason", "detail")


def write_manifest(
    out: Path, split: str, rejected: Sequence[RejectedVolume], sources: Mapping[str, str]
) -> None:
    """Write one row per volume of all splits, written or left out; rejected ones of other splits stay.

    Args:
        out: folder of the shards.
        split: split of the rejected volumes.
        rejected: volumes that were left out.
        sources: volume to the path of its CT, where known.
    """
    rows = [
        row
        for shard in sorted(out.iterdir())
        if SHARD_NAME.fullmatch(shard.name) and index_path(shard).is_file()
        for row in written_rows(shard.name, load_index(shard))
    ]
    rows += [
        {
            "volume": item.volume,
            "split": split,
            "status": LEFT_OUT,
            "source": sources.get(item.volume, ""),
            "reason": item.reason,
        }
        for item in rejected
    ]
    rows += [row for row in _rows_of_others(out / MANIFEST, split) if row.get("status") == LEFT_OUT]
    _write_table(out / MANIFEST, MANIFEST_COLUMNS, rows)


def written_rows(shard: str, index: ShardIndex) -> list[dict[str, object]]:
    """Return the manifest's rows of a shard: column to cell."""
    return [
        {
            "volume": volume,
            "split": index.split,
            "status": WRITTEN,
            "source": index.source[i],
            "source_sha256": index.source_sha256[i],
            "shard": shard,
            "first_sample": index.first_sample[i],
            "num_slices": index.num_slices[i],
            **{f"spacing_{axis}_mm": f"{mm:g}" for axis, mm in zip("xyz", index.spacing_mm[i], strict=True)},
            "height_px": index.shape[i, 0],
            "width_px": index.shape[i, 1],
            "original_shape": "x".join(map(str, index.original_shape[i])),
            "original_axcodes": index.original_axcodes[i],
            "has_ts": int(index.has_ts[i]),
            "has_rex": int(index.has_rex[i]),
            "doubts": index.doubts[i],
        }
        for i, volume in enumerate(index.volume)
    ]


def write_rejected(out: Path, split: str, rejected: Sequence[RejectedVolume]) -> None:
    """Write one row per volume of a split that was left out; rows of other splits stay."""
    rows: list[dict[str, object]] = [{"split": split, **item._asdict()} for item in rejected]
    _write_table(out / REJECTED, REJECTED_COLUMNS, rows + _rows_of_others(out / REJECTED, split))


def _rows_of_others(path: Path, split: str) -> list[dict[str, object]]:
    """Rows of other splits in a table that an earlier run wrote."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file) if row["split"] != split]


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: (str(row["split"]), str(row["volume"]))))
