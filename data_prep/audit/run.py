"""Reads shards back and proves them: :mod:`data_prep.audit.checks` lists what is checked."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.cohort.cohort import load_labels
from common.ct.checks import judge
from common.run.process import atomic_file
from common.shards.shards import SHARD_NAME
from data_prep.audit.checks import RULES, Tally
from data_prep.audit.cohort import (
    Row,
    Volume,
    check_identity,
    check_labels,
    check_tables,
    load_indices,
    volumes_of,
)
from data_prep.audit.pictures import Picture, PictureTask, draw_volume
from data_prep.audit.shard import ShardTask, audit_shard, draw
from data_prep.audit.volume import VolumeContent
from data_prep.cluster import ShowProgress, run_tasks

if TYPE_CHECKING:
    from distributed import Client

MAX_SUSPICIOUS_PICTURES = 24
"""Suspicious volumes with a picture in the report; the others are in its JSON file."""

MIN_COHORT = 20
"""With fewer volumes, none counts as an outlier."""

MAX_DEVIATIONS = 10
"""Robust standard deviations (1.4826 x median absolute deviation) from the median that are suspicious."""


class Audit(NamedTuple):
    """The outcome of an audit.

    Args:
        folder: folder of the shards.
        splits: splits that were checked.
        share: share of their volumes that was decoded.
        num_shards: shards of the splits.
        num_bytes: size of their tars.
        tally: outcome of each check.
        volumes: volumes of the splits.
        contents: content of the decoded volumes, by name.
        suspicious: volumes to look at: name to the checks it fails, and why.
        rejected: rows of rejected.csv.
    """

    folder: Path
    splits: tuple[str, ...]
    share: float
    num_shards: int
    num_bytes: int
    tally: Tally
    volumes: list[Volume]
    contents: dict[str, VolumeContent]
    suspicious: dict[str, dict[str, str]]
    rejected: list[Row]


def audit_shards(
    folder: Path,
    split: str | None,
    client: Client,
    *,
    share: float = 1.0,
    seed: int = 0,
    progress: ShowProgress = lambda stage, done, total: None,
) -> Audit:
    """Read shards back and check everything about them.

    One shard is one task and is read once. Names, places, bytes, order and records of every slice are
    checked; a share of the volumes is decoded, and looked at.

    Args:
        folder: folder of the shards.
        split: split to check; None for all.
        client: Dask cluster.
        share: share of the volumes to decode.
        seed: seed of their choice.
        progress: called after every shard.

    Raises:
        FileNotFoundError: if the folder is missing or holds no shard of the split.
    """
    splits = _splits(folder, split)
    tally = Tally()
    indices = load_indices(folder, splits, tally)
    wanted = {shard: index for shard, index in indices.items() if str(index.split) in splits}
    everything = volumes_of(indices)
    volumes = [volume for volume in everything if volume.split in splits]
    check_identity(everything, splits, tally)
    check_labels(volumes, tally)
    rejected = check_tables(folder, splits, indices, tally)
    contents: dict[str, VolumeContent] = {}
    tasks = [ShardTask(shard.resolve(), share, seed) for shard in wanted]
    progress("Reading shards", 0, len(tasks))
    for done, (task, result) in enumerate(run_tasks(client, audit_shard, tasks), start=1):
        if isinstance(result, BaseException):
            tally.fail("index", task.path.name, f"cannot be read: {result}")
        else:
            tally.add(result.tally)
            contents |= result.contents
        progress("Reading shards", done, len(tasks))
    contents = {volume.name: contents[volume.name] for volume in volumes if volume.name in contents}
    num_bytes = sum(int(index.tar_bytes) for index in wanted.values())
    suspicious = find_suspicious(contents, tally)
    return Audit(
        folder, splits, share, len(wanted), num_bytes, tally, volumes, contents, suspicious, rejected
    )


def _splits(folder: Path, split: str | None) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder '{folder}'.")
    names = (SHARD_NAME.fullmatch(file.name.replace(".index.npz", ".tar")) for file in folder.iterdir())
    present = tuple(sorted({name["split"] for name in names if name}))
    if not present or (split is not None and split not in present):
        what = "shards" if split is None else f"shards of split '{split}'"
        raise FileNotFoundError(f"No {what} in '{folder}', which has the splits {list(present)}.")
    return present if split is None else (split,)


def find_suspicious(contents: Mapping[str, VolumeContent], tally: Tally) -> dict[str, dict[str, str]]:
    """Compare every decoded volume with what a chest CT looks like, and with the other volumes.

    Args:
        contents: content of each volume.
        tally: record of the checks.

    Returns:
        Volume to the names of the checks it fails, and why.
    """
    suspicious: dict[str, dict[str, str]] = defaultdict(dict)
    for volume, content in contents.items():
        for rule in RULES:
            tally.saw(rule.name, not math.isnan(content.measures.get(rule.name, math.nan)))
        suspicious[volume] |= {doubt.rule: doubt.text for doubt in judge(content.measures, RULES)}
    for volume, why in _outliers(contents, tally).items():
        suspicious[volume]["outliers"] = why
    for volume, found in suspicious.items():
        for check, why in found.items():
            tally.fail(check, volume, why)
    return {volume: found for volume, found in suspicious.items() if found}


def _outliers(contents: Mapping[str, VolumeContent], tally: Tally) -> dict[str, str]:
    if len(contents) < MIN_COHORT:
        return {}
    tally.saw("outliers", len(contents))
    found = {}
    percentiles = np.array([content.hu_percentiles for content in contents.values()])
    for name, hu in (("median HU", percentiles[:, 1]), ("HU below which 99 % lie", percentiles[:, 2])):
        usual = np.median(hu)
        deviation = 1.4826 * np.median(np.abs(hu - usual))
        far = np.abs(hu - usual) > MAX_DEVIATIONS * max(deviation, 1.0)
        for volume, value in ((v, h) for v, h, is_far in zip(contents, hu, far, strict=True) if is_far):
            found[volume] = f"unlike the other volumes ({name}: {value:.0f}; others: {usual:.0f})"
    return found


def draw_pictures(
    audit: Audit,
    client: Client,
    num_sheets: int,
    *,
    seed: int = 0,
    progress: ShowProgress = lambda stage, done, total: None,
) -> tuple[list[Picture], list[Picture]]:
    """Draw a random sample of the volumes and the first suspicious ones, one task each.

    Args:
        audit: outcome of the checks.
        client: Dask cluster.
        num_sheets: size of the sample.
        seed: seed of the sample.
        progress: called after every picture.

    Returns:
        Pictures of the sample, and of suspicious volumes, without those that cannot be drawn.
    """
    by_name = {volume.name: volume for volume in audit.volumes}
    sample = sorted(by_name, key=lambda name: draw(name, seed))[:num_sheets]
    suspects = list(audit.suspicious)[:MAX_SUSPICIOUS_PICTURES]
    names = list(dict.fromkeys([*sample, *suspects]))
    tasks = [PictureTask(Path(by_name[name].entry.shard).resolve(), name) for name in names]
    pictures: dict[str, Picture] = {}
    for done, (task, result) in enumerate(run_tasks(client, draw_volume, tasks), start=1):
        if isinstance(result, Picture):
            pictures[task.volume] = result
        progress("Drawing volumes", done, len(tasks))
    return (
        [pictures[name] for name in sample if name in pictures],
        [pictures[name] for name in suspects if name in pictures],
    )


def write_json(audit: Audit, path: Path) -> None:
    """Write the audit for programs: checks, offenders, and a row of measures for every volume."""
    document = {
        "folder": str(audit.folder),
        "splits": audit.splits,
        "decoded_share": audit.share,
        "num_shards": audit.num_shards,
        "num_bytes": audit.num_bytes,
        "num_volumes": len(audit.volumes),
        "num_slices": sum(volume.entry.num_slices for volume in audit.volumes),
        "num_decoded": len(audit.contents),
        "passed": not audit.tally.has_errors,
        "checks": audit.tally.as_rows(),
        "label_prevalence": label_prevalence(audit.volumes),
        "organ_prevalence": organ_prevalence(audit.contents.values()),
        "rejected": audit.rejected,
        "suspicious": audit.suspicious,
        "volumes": [_volume_row(volume, audit.contents.get(volume.name)) for volume in audit.volumes],
    }
    with atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, allow_nan=False)


def _volume_row(volume: Volume, content: VolumeContent | None) -> dict[str, Any]:
    entry = volume.entry
    row = {
        "volume": entry.volume,
        "split": volume.split,
        "shard": Path(entry.shard).name,
        "num_slices": entry.num_slices,
        "spacing_mm": entry.spacing_mm,
        "shape": entry.shape,
    }
    if content is None:
        return row
    low, median, high = content.hu_percentiles
    measures = {name: round(value, 4) for name, value in content.measures.items() if not math.isnan(value)}
    return row | {"hu_p1": low, "hu_p50": median, "hu_p99": high, **measures}


def label_prevalence(volumes: Sequence[Volume]) -> dict[str, float]:
    """Return the share of the labelled volumes that have each label."""
    labelled = [volume.entry.labels for volume in volumes if volume.entry.labels]
    names = dict.fromkeys(name for labels in labelled for name in labels)
    return {name: sum(labels.get(name, 0) for labels in labelled) / len(labelled) for name in names}


def organ_prevalence(contents: Collection[VolumeContent]) -> dict[str, float]:
    """Return the share of the decoded volumes with a label map that show each TotalSegmentator class."""
    voxels = [content.organ_voxels for content in contents if content.organ_voxels.any()]
    if not voxels:
        return {}
    share = (np.stack(voxels) > 0).mean(0)
    return {label.name: float(share[label.index]) for label in load_labels("totalsegmentator")}
