"""Tables of a cohort have the data sets' columns and say what the images show."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from common.cohort.cohort import load_labels
from data_prep.phantom.files import rad_name, sidecar
from data_prep.phantom.population import CT_RATE_LABELS, ScanId, roster
from data_prep.phantom.scan import describe, render
from data_prep.phantom.scanner import SITES
from data_prep.phantom.tables import (
    metadata_row,
    write_ct_rate_tables,
    write_rad_chestct_tables,
    write_rexgroundingct_json,
)
from data_prep.sources.rad_chestct import read_all_labels

SCANS = roster(14, seed=5, site="b", valid_share=0.4)


@pytest.fixture(scope="module")
def records() -> dict[ScanId, dict[str, Any]]:
    """Sidecars of volumes whose labels are drawn by turns, so that each label occurs."""
    found = {}
    for index, scan in enumerate(SCANS):
        labels = {label: 0.7 for number, label in enumerate(CT_RATE_LABELS) if (number + index) % 3 == 0}
        volume = render(scan, "b", 40, (6.0, 6.0), labels)
        coded = [finding for finding in volume.findings if finding.code]
        found[scan] = sidecar(volume, coded if index % 2 == 0 else [])
    return found


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ct_rate_tables_have_their_columns_and_one_row_a_volume(tmp_path) -> None:
    scans = [scan._replace(is_head=scan.number == 3) for scan in SCANS]
    labels = {scan: {"Lung nodule": 0.5} if scan.number % 2 else {} for scan in scans}
    rows = {}
    for scan in scans:
        _, person, protocol = describe(scan, "a", 64, None, labels[scan])
        rows[scan] = metadata_row(scan, person, protocol, SITES["a"], 64)
    write_ct_rate_tables(tmp_path, rows, labels)
    for split, table in (("train", "train_metadata.csv"), ("valid", "validation_metadata.csv")):
        own = [scan for scan in scans if scan.split == split]
        assert own
        metadata = read(tmp_path / "dataset/metadata" / table)
        assert [row["VolumeName"] for row in metadata] == [f"{scan.name}.nii.gz" for scan in own]
        for row in metadata:
            first, second = row["XYSpacing"].strip("[]").split(", ")
            assert float(first) == float(second) > 0
            assert float(row["ZSpacing"]) > 0
            assert row["RescaleSlope"] == "1"
            assert row["RescaleIntercept"] in ("-1024", "-8192")
            assert row["PatientAge"].endswith("Y")
            assert "SYNTHETIC" in row["Manufacturer"]
            assert int(row["Rows"]) == int(row["Columns"]) == 64
        table_rows = read(tmp_path / f"dataset/multi_abnormality_labels/{split}_predicted_labels.csv")
        assert list(table_rows[0]) == ["VolumeName", *(label.name for label in load_labels("ct_rate"))]
        assert [int(row["Lung nodule"]) for row in table_rows] == [scan.number % 2 for scan in own]
        assert all(row["Emphysema"] == "0" for row in table_rows)
        heads = (tmp_path / f"dataset/metadata/no_chest_{split}.txt").read_text().split()
        assert heads == [f"dataset/{split}/{s.folder}/{s.name}.nii.gz" for s in own if s.is_head]


def test_rexgroundingct_lists_annotated_scans_with_text_and_code(records, tmp_path) -> None:
    write_rexgroundingct_json(tmp_path, records)
    splits = json.loads((tmp_path / "rexgroundingct/dataset.json").read_text())
    assert list(splits) == ["train", "val", "test"]
    codes = {label.code for label in load_labels("rexgroundingct")}
    items = [item for split in splits.values() for item in split]
    assert len(items) == sum(bool(record["rexgroundingct"]["categories"]) for record in records.values())
    for item in items:
        assert set(item) == {"name", "findings", "categories"}
        assert (
            set(item["findings"]) == set(item["categories"]) == {str(i) for i in range(len(item["findings"]))}
        )
        assert set(item["categories"].values()) <= codes
    assert all(item["name"].startswith("train_") for item in splits["train"])
    assert all(item["name"].startswith("valid_") for item in splits["val"] + splits["test"])


def test_rad_chestct_columns_give_back_the_16_classes(records, tmp_path) -> None:
    write_rad_chestct_tables(tmp_path, records, 0.8)
    read_back = read_all_labels(tmp_path)
    assert set(read_back) == {rad_name(scan) for scan in records}
    for scan, record in records.items():
        drawn = {finding["label"] for finding in record["findings"]}
        for name, value in read_back[rad_name(scan)].items():
            calcium = {"Arterial wall calcification", "Coronary artery wall calcification"}
            expected = bool(drawn & calcium) if name == "Calcification" else name in drawn
            assert value == expected, (name, scan.name)


def test_rad_chestct_says_its_spacing(records, tmp_path) -> None:
    head = SCANS[0]._replace(is_head=True)
    write_rad_chestct_tables(tmp_path, {**records, head: {"findings": []}}, 2.5)
    rows = read(tmp_path / "rad_chestct/CT_Scan_Metadata_Complete_35747.csv")
    assert len(rows) == len(records)
    assert {row["final_spacing"] for row in rows} == {"[2.5, 2.5, 2.5]"}
    assert all(row["VolumeAcc_DEID"] == f"{row['NoteAcc_DEID']}.npz" for row in rows)


def test_large_nodules_are_told_from_small_ones(tmp_path) -> None:
    def columns(size_mm: float) -> set[str]:
        finding = {"label": "Lung nodule", "code": "2d", "location": "left upper lobe", "size_mm": size_mm}
        write_rad_chestct_tables(tmp_path, {SCANS[0]: {"findings": [finding]}}, 0.8)
        (row,) = read(tmp_path / "rad_chestct/imgtrain_Abnormality_and_Location_Labels.csv")
        return {column for column, value in row.items() if value == "1"}

    assert SCANS[0].split == "train"
    assert columns(9.0) == {"nodule*left_upper"}
    assert columns(15.0) == {"nodulegr1cm*left_upper"}
