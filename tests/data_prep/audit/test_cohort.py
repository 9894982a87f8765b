"""A folder of small shards and its tables, damaged in one way at a time."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from common.ct.rejection import RejectedVolume
from common.shards.index import index_path
from common.shards.writer import VolumeSlices, write_shard
from data_prep.audit.checks import Tally
from data_prep.audit.cohort import check_identity, check_labels, check_tables, load_indices, volumes_of
from data_prep.shards.tables import write_manifest, write_rejected
from tests.noise_volume import noise_volume

BAD = RejectedVolume("train_9_a_1", "spacing", "it is 0.035 mm")


def volume(name: str, **changes: object) -> VolumeSlices:
    fields = {"labels": {"Emphysema": 1, "Lung nodule": 0}, "split": name.partition("_")[0]}
    return noise_volume(name, 2, ts=False, **fields | changes)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    write_shard(tmp_path / "train-000000.tar", [volume("train_1_a_1"), BAD, volume("train_2_a_1")])
    write_shard(tmp_path / "train-000001.tar", [volume("train_3_a_1")])
    write_shard(tmp_path / "valid-000000.tar", [volume("valid_1_a_1")])
    write_tables(tmp_path)
    return tmp_path


def write_tables(folder: Path) -> None:
    write_manifest(folder, "train", [BAD], {})
    write_rejected(folder, "train", [BAD])


def audited(folder: Path, *splits: str) -> Tally:
    wanted = splits or ("train", "valid")
    tally = Tally()
    indices = load_indices(folder, wanted, tally)
    volumes = volumes_of(indices)
    check_identity(volumes, wanted, tally)
    check_labels([item for item in volumes if item.split in wanted], tally)
    check_tables(folder, wanted, indices, tally)
    return tally


def edit(path: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0])
    change(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def test_a_whole_folder_passes(cohort) -> None:
    for splits in ((), ("train",), ("valid",)):
        assert not audited(cohort, *splits).failed
    tally = audited(cohort)
    assert (tally.checked["index"], tally.checked["unique"], tally.checked["labels"]) == (3, 4, 4)


def test_a_dropped_row_is_missed(cohort) -> None:
    edit(cohort / "manifest.csv", lambda rows: rows.pop(1))
    tally = audited(cohort)
    assert tally.failed == {"manifest": 1}
    assert tally.offences["manifest"][0][1:] == ("train_2_a_1", "it is in train-000000.tar and has no row")
    assert not audited(cohort, "valid").failed


def test_rows_of_volumes_that_are_not_there_are_noticed(cohort) -> None:
    edit(cohort / "manifest.csv", lambda rows: rows.append(rows[0]))
    assert audited(cohort).failed == {"manifest": 1}
    edit(cohort / "manifest.csv", lambda rows: rows.append(rows[0] | {"volume": "train_7_a_1"}))
    assert audited(cohort).failed == {"manifest": 2}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("num_slices", "3"),
        ("first_sample", "1"),
        ("spacing_z_mm", "1.6"),
        ("spacing_x_mm", ""),
        ("source_sha256", "0"),
        ("has_ts", "1"),
        ("original_axcodes", "RAS"),
    ],
)
def test_a_row_must_say_what_the_shard_says(column, value, cohort) -> None:
    edit(cohort / "manifest.csv", lambda rows: rows[0].update({column: value}))
    tally = audited(cohort)
    assert tally.failed == {"manifest": 1}
    assert tally.offences["manifest"][0][1:] == (
        "train_1_a_1",
        f"its row has another {column} than the shard",
    )


def test_tables_must_be_there_and_have_their_columns(cohort) -> None:
    (cohort / "manifest.csv").unlink()
    (cohort / "rejected.csv").write_text("volume,split\na,train\n", encoding="utf-8")
    tally = audited(cohort)
    assert tally.failed == {"manifest": 1, "rejected": 1}
    assert "['reason', 'detail']" in tally.offences["rejected"][0].what


def test_what_was_left_out_must_be_listed_everywhere(cohort) -> None:
    edit(cohort / "rejected.csv", lambda rows: rows[0].update(reason="mask"))
    tally = audited(cohort)
    assert tally.failed.keys() == {"rejected"}
    edit(cohort / "rejected.csv", lambda rows: rows[0].update(reason="spacing"))
    assert not audited(cohort).failed
    edit(cohort / "rejected.csv", lambda rows: rows.append(rows[0] | {"volume": "train_1_a_1"}))
    assert any("and it is in a shard" in item.what for item in audited(cohort).offences["rejected"])


def test_an_index_must_be_there_readable_and_of_its_tar(cohort) -> None:
    index_path(cohort / "train-000000.tar").unlink()
    with (cohort / "train-000001.tar").open("ab") as file:
        file.write(bytes(512))
    (cohort / "valid-000000.tar").unlink()
    tally = audited(cohort)
    # rows of shards that cannot be read are not reported a second time; a tar that is gone is missed
    assert tally.failed.pop("manifest") == 1
    assert tally.failed == {"index": 3}
    assert [offence.where for offence in tally.offences["index"]] == [
        "train-000000.tar",
        "train-000001.tar",
        "valid-000000.tar",
    ]


def test_unfinished_and_foreign_files_are_noticed(cohort) -> None:
    (cohort / "train-000002.tar.partial").touch()
    (cohort / ".parts").mkdir()
    (cohort / "notes.txt").touch()
    for harmless in ("audit.html", "audit.json", ".lock"):
        (cohort / harmless).touch()
    tally = audited(cohort)
    assert tally.failed == {"leftovers": 3}
    assert {offence.where for offence in tally.offences["leftovers"]} == {
        "train-000002.tar.partial",
        ".parts",
        "notes.txt",
    }
    assert not tally.has_errors


def test_one_volume_in_two_shards_is_an_error(cohort) -> None:
    write_shard(cohort / "train-000002.tar", [volume("train_1_a_1")])
    write_tables(cohort)
    tally = audited(cohort)
    assert tally.failed == {"unique": 1}
    assert tally.offences["unique"][0].what == "it lies in train-000000.tar and train-000002.tar"


def test_the_same_ct_under_another_name_is_a_duplicate(cohort) -> None:
    original = volume("train_1_a_1")
    write_shard(cohort / "train-000002.tar", [volume("train_8_a_1", ct=original.ct)])
    write_tables(cohort)
    tally = audited(cohort)
    assert tally.failed == {"duplicates": 1}
    assert (
        tally.offences["duplicates"][0].what == "train_1_a_1 (train) and train_8_a_1 (train) hold the same CT"
    )
    assert not tally.has_errors


@pytest.mark.parametrize("field", ["ct", "source_sha256"])
def test_one_ct_in_two_splits_leaks(field, cohort) -> None:
    original = volume("train_1_a_1")
    write_shard(cohort / "valid-000001.tar", [volume("valid_8_a_1", **{field: getattr(original, field)})])
    write_tables(cohort)
    assert audited(cohort).failed == {"leak": 1}
    # the other split is looked at even if it is not the one to audit
    assert audited(cohort, "train").failed == {"leak": 1}


def test_reconstructions_of_one_scan_are_no_duplicates(cohort) -> None:
    sharper = volume("train_1_a_1").ct.copy()
    sharper[0, 0, 0] ^= 1
    write_shard(cohort / "train-000002.tar", [volume("train_1_a_2", ct=sharper)])
    write_tables(cohort)
    assert not audited(cohort).failed


def test_label_lists_must_agree(cohort) -> None:
    write_shard(cohort / "train-000002.tar", [volume("train_7_a_1", labels={"Emphysema": 1})])
    write_shard(cohort / "train-000003.tar", [volume("train_8_a_1", labels=None)])
    write_tables(cohort)
    tally = audited(cohort)
    assert tally.failed == {"labels": 1, "unlabelled": 1}
    assert "['Lung nodule']" in tally.offences["labels"][0].what
    assert tally.offences["unlabelled"][0].where == "train_8_a_1"


def test_unlabelled_cohorts_are_fine(tmp_path) -> None:
    write_shard(tmp_path / "train-000000.tar", [volume("train_1_a_1", labels=None)])
    write_manifest(tmp_path, "train", [], {})
    write_rejected(tmp_path, "train", [])
    assert not audited(tmp_path, "train").failed
