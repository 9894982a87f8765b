"""The folder as a whole: which shards there are, and whether they agree with one another and their tables."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from common.shards.index import FIELDS, ShardIndex, VolumeEntry, index_path, load_index, volume_entries
from common.shards.shards import SHARD_NAME
from data_prep.audit.checks import Tally
from data_prep.shards.tables import (
    MANIFEST,
    MANIFEST_COLUMNS,
    REJECTED,
    REJECTED_COLUMNS,
    WRITTEN,
    written_rows,
)

CT_COLUMN = FIELDS.index("ct.blosc2")
UNFINISHED = (".partial", ".parts")
Row = Mapping[str, str]


class Volume(NamedTuple):
    """A volume according to the index of its shard.

    Args:
        entry: what the index says.
        split: such as ``train``.
        ct_sha256: checksum of its CT slices' checksums: the same for two volumes of the same slices.
    """

    entry: VolumeEntry
    split: str
    ct_sha256: str

    @property
    def name(self) -> str:
        """Name of the volume."""
        return self.entry.volume


def load_indices(folder: Path, splits: Sequence[str], tally: Tally) -> dict[Path, ShardIndex]:
    """Read the indices of a folder's shards, and report files that do not belong there.

    Unreadable indices of splits that are not checked are ignored.

    Returns:
        The usable indices by the path of the tar.
    """
    files = {file.name for file in folder.iterdir()}
    tars = {name if name.endswith(".tar") else f"{name.removesuffix('.index.npz')}.tar" for name in files}
    shards = [folder / name for name in sorted(tars) if SHARD_NAME.fullmatch(name)]
    indices = {}
    for shard in shards:
        wanted = shard.name.partition("-")[0] in splits
        if wanted:
            tally.saw("index")
        try:
            indices[shard] = load_index(shard)
        except (OSError, ValueError) as error:
            if wanted:
                tally.fail("index", shard.name, str(error))
    known = {MANIFEST, REJECTED, *(path.name for shard in shards for path in (shard, index_path(shard)))}
    _check_leftovers(files - known, tally)
    return indices


def _check_leftovers(names: set[str], tally: Tally) -> None:
    tally.saw("leftovers")
    for name in sorted(names):
        if any(part in name for part in UNFINISHED):
            tally.fail("leftovers", name, "unfinished: a run still writes it, or was stopped")
        elif not name.startswith(".") and not name.startswith("audit."):
            tally.fail("leftovers", name, "was not written by data_prep")


def volumes_of(indices: Mapping[Path, ShardIndex]) -> list[Volume]:
    """List the volumes of shards in their order."""
    return [
        Volume(entry, str(index.split), _ct_sha256(index, entry))
        for shard, index in indices.items()
        for entry in volume_entries(str(shard), index)
    ]


def _ct_sha256(index: ShardIndex, entry: VolumeEntry) -> str:
    rows = slice(entry.first_sample, entry.first_sample + entry.num_slices)
    return sha256(index.member_crc32[rows, CT_COLUMN].tobytes()).hexdigest()


def check_identity(volumes: Sequence[Volume], splits: Sequence[str], tally: Tally) -> None:
    """Check that no volume and no CT is there twice, within a split or across splits.

    Two reconstructions of one scan have different voxels and are no duplicates.

    Args:
        volumes: volumes of all splits.
        splits: splits to check; volumes of others count only as partners.
        tally: record of the checks.
    """
    for check in ("unique", "leak", "duplicates"):
        tally.saw(check, sum(volume.split in splits for volume in volumes))
    for name, group in _groups((volume.name, volume) for volume in volumes).items():
        if len(group) > 1 and _concerns(group, splits):
            shards = [Path(volume.entry.shard).name for volume in group]
            tally.fail("unique", name, f"it lies in {_listed(shards)}")
    same_ct = _groups((volume.ct_sha256, volume) for volume in volumes)
    same_source = _groups((volume.entry.source_sha256, volume) for volume in volumes)
    same_source.pop("", None)
    reported = set()
    for what, groups in (("hold the same CT", same_ct), ("come from the same file", same_source)):
        for group in groups.values():
            names = frozenset(volume.name for volume in group)
            if len(names) > 1 and names not in reported and _concerns(group, splits):
                reported.add(names)
                listed = _listed([f"{volume.name} ({volume.split})" for volume in group])
                check = "leak" if len({volume.split for volume in group}) > 1 else "duplicates"
                tally.fail(check, group[0].name, f"{listed} {what}")


def _groups(pairs: Iterable[tuple[str, Volume]]) -> dict[str, list[Volume]]:
    groups = defaultdict(list)
    for key, volume in pairs:
        groups[key].append(volume)
    return groups


def _concerns(group: Sequence[Volume], splits: Sequence[str]) -> bool:
    return any(volume.split in splits for volume in group)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def check_labels(volumes: Sequence[Volume], tally: Tally) -> None:
    """Check that volumes are labelled for the same classes, and all or none of them."""
    labelled = [volume for volume in volumes if volume.entry.labels]
    tally.saw("unlabelled", len(volumes))
    tally.saw("labels", len(labelled))
    reported = set()
    for volume in labelled:
        classes, usual = tuple(volume.entry.labels or ()), tuple(labelled[0].entry.labels or ())
        if classes != usual and classes not in reported:
            reported.add(classes)
            differing = sorted(set(classes) ^ set(usual)) or "their order"
            tally.fail("labels", volume.name, f"its classes are not those of {labelled[0].name}: {differing}")
    for volume in volumes:
        if labelled and not volume.entry.labels:
            tally.fail("unlabelled", volume.name, "it has no labels, others have")


def check_tables(
    folder: Path, splits: Sequence[str], indices: Mapping[Path, ShardIndex], tally: Tally
) -> list[Row]:
    """Check manifest.csv and rejected.csv against the shards and one another.

    Args:
        folder: folder of the shards.
        splits: splits to check.
        indices: indices of all usable shards; rows about the others, reported already, are skipped.
        tally: record of the checks.

    Returns:
        The rows of rejected.csv.
    """
    manifest = _read(folder / MANIFEST, MANIFEST_COLUMNS, "manifest", splits, tally)
    rejected = _read(folder / REJECTED, REJECTED_COLUMNS, "rejected", splits, tally)
    wanted = {shard: index for shard, index in indices.items() if str(index.split) in splits}
    if manifest is not None:
        unreadable = {file.name for file in folder.glob("*.tar")} - {shard.name for shard in indices}
        written = [row for row in manifest if row["status"] == WRITTEN and row["shard"] not in unreadable]
        _check_written(written, wanted, tally)
    if rejected is not None:
        _check_rejected(manifest, rejected, wanted, tally)
    return rejected or []


def _read(
    path: Path, columns: Sequence[str], check: str, splits: Sequence[str], tally: Tally
) -> list[Row] | None:
    tally.saw(check)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        tally.fail(check, path.name, f"cannot be read: {type(error).__name__}")
        return None
    missing = [column for column in columns if column not in (table.fieldnames or ())]
    if missing:
        tally.fail(check, path.name, f"lacks the columns {missing}")
        return None
    return [row for row in rows if row["split"] in splits]


def _check_written(rows: Sequence[Row], indices: Mapping[Path, ShardIndex], tally: Tally) -> None:
    expected = {
        (str(row["volume"]), shard.name): {name: str(value) for name, value in row.items()}
        for shard, index in indices.items()
        for row in written_rows(shard.name, index)
    }
    tally.saw("manifest", len(expected))
    for row in rows:
        stated = expected.pop((row["volume"], row["shard"]), None)
        if stated is None:
            what = f"its row says that it is in {row['shard']}, where it is not, or the row is there twice"
            tally.fail("manifest", row["volume"], what)
            continue
        differing = [name for name, value in stated.items() if row[name] != value]
        if differing:
            what = f"its row has another {', '.join(differing)} than the shard"
            tally.fail("manifest", row["volume"], what)
    for volume, shard in expected:
        tally.fail("manifest", volume, f"it is in {shard} and has no row")


def _check_rejected(
    manifest: Sequence[Row] | None,
    rejected: Sequence[Row],
    indices: Mapping[Path, ShardIndex],
    tally: Tally,
) -> None:
    tally.saw("rejected", len(rejected))
    listed = {(row["volume"], row["reason"]) for row in rejected}
    for index in indices.values():
        for pair in zip(index.rejected_volume.tolist(), index.rejected_reason.tolist(), strict=True):
            if pair not in listed:
                tally.fail(
                    "rejected", pair[0], f"its shard rejected it ({pair[1]}), {REJECTED} does not list it"
                )
        for volume in {volume for volume, _ in listed} & set(index.volume.tolist()):
            tally.fail("rejected", volume, f"{REJECTED} lists it, and it is in a shard")
    if manifest is not None:
        stated = {(row["volume"], row["reason"]) for row in manifest if row["status"] != WRITTEN}
        for volume, reason in sorted(stated ^ listed):
            where = MANIFEST if (volume, reason) in stated else REJECTED
            tally.fail("rejected", volume, f"only {where} lists it as rejected for '{reason}'")
