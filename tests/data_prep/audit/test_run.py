"""A folder of synthetic patients, some of them turned, or with a wrong label map: who is noticed, and why."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from common.ct.rejection import RejectedVolume
from common.shards.writer import VolumeSlices, write_shard
from data_prep.audit.checks import CHECKS, ERROR, LEVELS, Tally
from data_prep.audit.run import (
    Audit,
    audit_shards,
    draw_pictures,
    find_suspicious,
    label_prevalence,
    organ_prevalence,
    write_json,
)
from data_prep.audit.shard import draw
from data_prep.audit.volume import VolumeContent
from data_prep.shards.tables import write_manifest, write_rejected
from tests.data_prep.conftest import drawn_patient

BAD = RejectedVolume("train_9_a_1", "mask", "it has <another> shape")


def patient(number: int, name: str) -> VolumeSlices:
    labels = {"Emphysema": number % 2, "Lung nodule": 1}
    fields = {"labels": labels, "split": name.partition("_")[0], "source_sha256": ""}  # no duplicates then
    return drawn_patient(number, name, **fields)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    sound, other, third = (patient(k, f"train_{k + 1}_a_1") for k in (0, 1, 3))
    turned = {
        "train_3_a_1": sound._replace(ct=sound.ct[::-1], ts=sound.ts[::-1]),
        "train_4_a_1": sound._replace(ct=sound.ct[:, :, ::-1], ts=sound.ts[:, :, ::-1]),
        "train_5_a_1": third._replace(ts=third.ts[::-1]),
        "train_6_a_1": sound._replace(ct=(sound.ct + np.int16(1024)).clip(-1024, 3071)),
        "train_7_a_1": sound._replace(ct=sound.ct[sorted(range(len(sound.ct)), key=str)]),
    }
    volumes = [sound, other, *(item._replace(volume=name) for name, item in turned.items())]
    write_shard(folder / "train-000000.tar", volumes[:4])
    write_shard(folder / "train-000001.tar", [*volumes[4:], BAD])
    write_shard(folder / "valid-000000.tar", [patient(2, "valid_1_a_1")])
    write_manifest(folder, "train", [BAD], {})
    write_rejected(folder, "train", [BAD])
    return folder


@pytest.fixture(scope="module")
def audit(cohort: Path, dask: Client) -> Audit:
    return audit_shards(cohort, None, dask)


def test_turned_and_mismatched_volumes_are_suspicious_for_the_right_reason(audit) -> None:
    found = {volume: set(reasons) for volume, reasons in audit.suspicious.items()}
    assert found["train_3_a_1"] == {"head", "organs_head"}
    assert found["train_4_a_1"] == {"heart", "organs_side", "organs_named"}
    assert {"organs_air", "organs_bones"} <= found["train_5_a_1"]
    assert {"air", "dense"} <= found["train_6_a_1"]
    assert "step" in found["train_7_a_1"]
    assert found.keys() == {f"train_{k}_a_1" for k in range(3, 8)}


def test_only_what_is_proven_is_an_error(audit) -> None:
    assert not audit.tally.has_errors
    assert {name for name, count in audit.tally.failed.items() if count} == {
        check for reasons in audit.suspicious.values() for check in reasons
    }
    assert audit.tally.failed["step"] == 1
    assert audit.tally.checked["step"] == 8


def test_every_slice_and_volume_was_read(audit) -> None:
    num_slices = sum(volume.entry.num_slices for volume in audit.volumes)
    assert len(audit.volumes) == len(audit.contents) == 8
    assert {audit.tally.checked[name] for name in ("order", "ct", "masks", "records")} == {num_slices}
    assert (audit.num_shards, audit.splits, len(audit.rejected)) == (3, ("train", "valid"), 1)


def test_one_split_and_a_share_of_its_volumes(cohort, dask) -> None:
    told = []
    part = audit_shards(cohort, "valid", dask, progress=lambda *what: told.append(what))
    assert [volume.name for volume in part.volumes] == ["valid_1_a_1"]
    assert told == [("Reading shards", 0, 1), ("Reading shards", 1, 1)]
    names = [f"train_{k}_a_1" for k in range(1, 8)]
    third = sorted(draw(name, 5) for name in names)[2]
    few = audit_shards(cohort, "train", dask, share=third, seed=5)
    assert set(few.contents) == {name for name in names if draw(name, 5) < third}
    assert len(few.contents) == 2
    assert few.tally.checked["checksums"] > few.tally.checked["ct"] > 0


def test_a_shard_that_cannot_be_read_does_not_end_the_audit(cohort, tmp_path, dask) -> None:
    for file in cohort.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "valid-000000.index.npz").write_bytes(b"PK")
    result = audit_shards(tmp_path, None, dask)
    errors = {name for name, count in result.tally.failed.items() if count and LEVELS[name] == ERROR}
    assert errors == {"index"}
    assert result.tally.offences["index"][0].where == "valid-000000.tar"
    assert len(result.contents) == 7


def test_folders_without_shards_are_refused(tmp_path, dask) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        audit_shards(tmp_path / "nowhere", None, dask)
    with pytest.raises(FileNotFoundError, match=r"No shards .*\[\]"):
        audit_shards(tmp_path, None, dask)
    (tmp_path / "valid-000000.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"'train'.*\['valid'\]"):
        audit_shards(tmp_path, "train", dask)


def test_pictures_are_of_a_seeded_sample_and_of_suspicious_volumes(audit, dask) -> None:
    sample, suspects = draw_pictures(audit, dask, num_sheets=3, seed=1)
    names = [volume.name for volume in audit.volumes]
    assert [picture.volume for picture in sample] == sorted(names, key=lambda name: draw(name, 1))[:3]
    assert [picture.volume for picture in suspects] == [f"train_{k}_a_1" for k in range(3, 8)]
    assert draw_pictures(audit, dask, num_sheets=0)[0] == []


def test_outliers_stand_apart_from_enough_others() -> None:
    rng = np.random.default_rng(0)

    def content(median: float) -> VolumeContent:
        return VolumeContent({}, (-1000.0, median, 500.0), np.zeros(128), np.zeros(118), np.zeros(14))

    usual = {f"v{k}": content(rng.normal(-400, 20)) for k in range(30)}
    tally = Tally()
    found = find_suspicious(usual | {"far": content(200.0)}, tally)
    assert found.keys() == {"far"}
    assert found["far"]["outliers"].startswith("unlike the other volumes (median HU: 200; others: -4")
    assert (tally.checked["outliers"], tally.failed["outliers"]) == (31, 1)
    few = dict(list(usual.items())[:10]) | {"far": content(200.0)}
    assert find_suspicious(few, Tally()) == {}


def test_prevalences_are_shares_of_volumes(audit) -> None:
    assert label_prevalence(audit.volumes) == {"Emphysema": 2 / 8, "Lung nodule": 1.0}
    assert organ_prevalence(audit.contents.values())["liver"] == 1.0
    assert organ_prevalence([]) == {}


def test_the_json_says_what_a_program_wants_to_know(audit, tmp_path) -> None:
    write_json(audit, tmp_path / "audit.json")
    document = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert document["passed"] is True
    assert [check["name"] for check in document["checks"]] == [check.name for check in CHECKS]
    rows = {row["volume"]: row for row in document["volumes"]}
    assert rows["train_3_a_1"]["head"] < 0 < rows["train_1_a_1"]["head"]
    assert rows["train_1_a_1"]["num_slices"] == 42
    assert document["rejected"][0]["reason"] == "mask"
    assert document["suspicious"].keys() == audit.suspicious.keys()
    assert all(
        math.isfinite(value) for row in rows.values() for value in row.values() if type(value) is float
    )
