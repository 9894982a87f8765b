import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, KilledWorker

from common.ct.files import ct_file
from data_prep.shards import plan as module
from data_prep.shards.plan import PlannedShard, fingerprint, plan_shards
from data_prep.sources.ct_rate import find_ct_rate
from data_prep.sources.rexgroundingct import Annotation
from data_prep.sources.source_volume import Rescale, SourceVolume

VOLUMES = [f"train_{n}_a_1" for n in range(1, 7)]


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture
def sources(tiny: Any) -> list[SourceVolume]:
    for volume in VOLUMES:
        tiny.add(volume)
    return find_ct_rate(tiny.root, "train")[0]


def plan(
    sources: Sequence[SourceVolume], client: Client, slices_per_shard: int = 10
) -> tuple[list[PlannedShard], list]:
    return plan_shards(
        sources, Path("out"), "train", client, slices_per_shard=slices_per_shard, progress=quiet
    )


def names(shards: Sequence[PlannedShard]) -> list[list[str]]:
    return [[volume.source.volume for volume in shard.volumes] for shard in shards]


@pytest.mark.parametrize(
    ("slices_per_shard", "expected"),
    [(10, [2, 2, 2]), (14, [2, 2, 2]), (15, [3, 3]), (1, [1] * 6), (99, [6])],
)
def test_volumes_are_never_split_over_shards(slices_per_shard, expected, sources, dask) -> None:
    shards, _ = plan(sources, dask, slices_per_shard)
    assert [len(shard.volumes) for shard in shards] == expected
    assert [shard.path.name for shard in shards] == [f"train-{n:06d}.tar" for n in range(len(expected))]
    assert [name for group in names(shards) for name in group] == VOLUMES


def test_shards_fill_up_from_volumes_of_any_length(tiny, save_nifti, dask) -> None:
    """By hand: 4 + 6 fit into 10, 7 opens a shard, 3 fits it, 12 is alone though too large, 2 comes after."""
    for volume, num_slices in zip(VOLUMES, (4, 6, 7, 3, 12, 2), strict=True):
        save_nifti(tiny.add(volume), np.zeros((3, 4, num_slices), np.int16), tiny.affine())
    shards, _ = plan(find_ct_rate(tiny.root, "train")[0], dask)
    assert [len(shard.volumes) for shard in shards] == [2, 2, 1, 1]


def test_annotated_scans_are_planned_apart(sources, dask, tmp_path) -> None:
    mask = tmp_path / "mask.nii.gz"
    mask.touch()
    annotated = [source._replace(rex=Annotation(mask, ("1a",))) for source in sources[1::2]]
    shards, _ = plan([*sources[::2], *annotated], dask)
    assert [shard.path.name for shard in shards] == [
        *("train-000000.tar", "train-000001.tar"),
        *("train-rex-000000.tar", "train-rex-000001.tar"),
    ]
    assert names(shards) == [VOLUMES[0:3:2], VOLUMES[4:5], VOLUMES[1:4:2], VOLUMES[5:6]]
    assert shards[2].volumes[0].part.as_posix() == "out/.parts/train-rex-000000/train_2_a_1.tar"


def test_a_plan_does_not_depend_on_order_or_batches(sources, dask, monkeypatch) -> None:
    expected = plan(sources, dask)
    monkeypatch.setattr(module, "HEADERS_PER_TASK", 4)
    assert plan(sources[::-1], dask) == expected


def test_two_volumes_of_one_name_are_refused(sources, dask) -> None:
    with pytest.raises(ValueError, match="'train_2_a_1' is there twice"):
        plan([*sources, sources[1]], dask)


def test_headers_that_fail_are_reasons(sources, dask, monkeypatch) -> None:
    """One by a rule, one by a file that is gone, one by a defect of the reader."""
    planned_slices = module.planned_slices

    def planned(source: SourceVolume) -> int:
        if source.volume == "train_3_a_1":
            raise RuntimeError("a reader's\nmistake")
        return planned_slices(source)

    monkeypatch.setattr(module, "planned_slices", planned)
    evil = sources[0]._replace(volume="../../x")
    gone = sources[3]._replace(ts=Path("nowhere/mask.nii.gz"))
    shards, rejected = plan([*sources[1:3], gone, *sources[4:], evil], dask)
    assert {item.volume: item.reason for item in rejected} == {
        "../../x": "name",
        "train_3_a_1": "unexpected error",
        "train_4_a_1": "unreadable",
    }
    details = {item.volume: item.detail for item in rejected}
    assert details["train_3_a_1"] == "RuntimeError: a reader's mistake"
    assert "No such file or directory: 'nowhere/mask.nii.gz'" in details["train_4_a_1"]
    assert names(shards) == [["train_2_a_1", "train_5_a_1"], ["train_6_a_1"]]


def test_headers_that_kill_workers_are_found_one_by_one(sources, dask, monkeypatch) -> None:
    run_tasks = module.run_tasks

    def run_or_die(client: Client, function: Callable, batches: list) -> Iterator[tuple]:
        for batch, result in run_tasks(client, function, batches):
            deadly = any(source.volume == "train_4_a_1" for source in batch)
            yield batch, KilledWorker("task", None, 1) if deadly else result

    monkeypatch.setattr(module, "run_tasks", run_or_die)
    shards, rejected = plan(sources, dask)
    assert [(item.volume, item.reason) for item in rejected] == [("train_4_a_1", "worker died")]
    assert sum(names(shards), []) == [volume for volume in VOLUMES if volume != "train_4_a_1"]


def files(folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{name}.nii.gz" for name in ("ct", "ts", "rex", "first", "second")}
    for path in paths.values():
        path.write_bytes(b"four")
        os.utime(path, ns=(0, 10**18))
    return paths


def test_the_fingerprint_follows_all_that_the_bytes_depend_on(tmp_path, monkeypatch) -> None:
    paths = files(tmp_path)
    one = SourceVolume(
        volume="a",
        split="train",
        ct=ct_file(paths["ct"]),
        form="v1",
        rescale=Rescale(1.0, -1024.0, (0.7, 0.7, 1.5)),
        ts=paths["ts"],
        rex=Annotation(paths["rex"], ("1a", "2b")),
        labels={"x": 0, "y": 1},
        source="in/a.nii.gz",
    )
    several = one._replace(ct=ct_file(paths["first"], paths["second"]))
    others = [
        several,
        several._replace(ct=ct_file(paths["second"], paths["first"])),
        one._replace(volume="b"),
        one._replace(split="valid"),
        one._replace(form="auto"),
        one._replace(rescale=None),
        one._replace(rescale=Rescale(1.0, -8192.0, (0.7, 0.7, 1.5))),
        one._replace(ts=None),
        one._replace(rex=None),
        one._replace(rex=Annotation(paths["rex"], ("1a", "2c"))),
        one._replace(labels=None),
        one._replace(labels={"x": 1, "y": 1}),
        one._replace(labels={"y": 1, "x": 0}),
        one._replace(source="in/b.nii.gz"),
    ]
    seen = [fingerprint(source) for source in (one, *others)]
    assert len(set(seen)) == len(seen)
    assert fingerprint(one) == seen[0]
    for name, path in paths.items():
        source = several if name in ("first", "second") else one
        before = fingerprint(source)
        os.utime(path, ns=(0, 10**18 + 1))
        changed = fingerprint(source)
        path.write_bytes(b"five5")
        os.utime(path, ns=(0, 10**18))
        assert len({before, changed, fingerprint(source)}) == 3, name
    before = fingerprint(one)
    monkeypatch.setattr(module, "SCHEMA_VERSION", 99)
    assert fingerprint(one) != before


def test_the_fingerprint_does_not_depend_on_where_the_input_lies(tmp_path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = files(tmp_path / "here"), files(tmp_path / "there")
    one = SourceVolume("a", "train", ct_file(here["ct"]), "v2", source="a.nii.gz")
    assert fingerprint(one) == fingerprint(one._replace(ct=ct_file(there["ct"])))
