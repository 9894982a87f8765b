"""The words of a report say what was drawn: its labels, lobes, sides and sizes."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from common.writing.labels import report_labels, sentences, stated_labels
from data_prep.phantom.cohort import Settings, write_cohort
from data_prep.phantom.files import sidecar
from data_prep.phantom.population import CT_RATE_LABELS, draw_labels, roster
from data_prep.phantom.reports import COLUMNS, findings_text, write_reports
from data_prep.phantom.scan import render

SCANS = roster(400, seed=5)


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[list[dict]]]:
    """For each label the findings of some volumes into which it was really drawn."""
    found: dict[str, list[list[dict]]] = {label: [] for label in CT_RATE_LABELS}
    for scan in SCANS[:6]:
        record = sidecar(render(scan, "a", 40, (8.0, 8.0), dict.fromkeys(CT_RATE_LABELS, 0.6)), [])
        for label in CT_RATE_LABELS:
            found[label].append([one for one in record["findings"] if one["label"] == label])
    return found


def test_labels_read_from_the_text_are_those_drawn_into_hundreds_of_volumes(drawn) -> None:
    texts, labels = [], []
    for scan in SCANS:
        labels.append(list(draw_labels(scan)))
        pick = scan.scan_rng(99)
        findings = [one for label in labels[-1] for one in drawn[label][int(pick.integers(6))]]
        texts.append(findings_text(labels[-1], findings, scan.scan_rng(20)))
    expected = np.array([[float(name in of_one) for name in CT_RATE_LABELS] for of_one in labels])
    np.testing.assert_array_equal(report_labels(texts), expected)
    assert (expected.sum(0) > 10).all()
    # reconstructions of a scan alone are worded alike
    assert len(set(texts)) == len({scan.name.rpartition("_")[0] for scan in SCANS})
    negated = sum(not stated_labels(part) for text in texts for part in sentences(text))
    assert negated > 3 * len(texts)


def test_sides_lobes_and_sizes_are_told() -> None:
    def text(label: str, *findings: dict) -> str:
        known = [{"label": label, "text": "", "size_mm": 0.0} | one for one in findings]
        return findings_text([label], known, np.random.default_rng(0))

    assert " on the left." in text("Pleural effusion", {"location": "left"})
    assert " on both sides." in text("Pleural effusion", {"location": "left"}, {"location": "right"})
    told = text(
        "Lung nodule",
        {"location": "left upper lobe", "size_mm": 6.2, "text": "Nodule of 6 mm in the left upper lobe."},
        {"location": "right lower lobe", "size_mm": 11.8, "text": "Calcified nodule of 12 mm in the …"},
    )
    assert re.search(r"calcified nodule .*left upper lobe and right lower lobe of 12 mm\.", told, re.I)
    nodes = ({"location": "mediastinum", "text": f"Enlarged {name} lymph node."} for name in ("b", "a"))
    assert " in the a and b stations." in text("Lymphadenopathy", *nodes)


def test_a_cohorts_tables_are_ct_rates_and_stamped(tmp_path: Path) -> None:
    list(write_cohort(tmp_path, 9, Settings(3, matrix=40, slice_mm=(12, 14), valid_share=0.4), 1))
    assert write_reports(tmp_path) == 9
    for split, name in (("train", "train"), ("valid", "validation")):
        with (tmp_path / f"dataset/radiology_text_reports/{name}_reports.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        labels = tmp_path / f"dataset/multi_abnormality_labels/{split}_predicted_labels.csv"
        with labels.open(newline="") as file:
            table = list(csv.DictReader(file))
        assert rows
        assert tuple(rows[0]) == COLUMNS
        assert [row["VolumeName"] for row in rows] == [row["VolumeName"] for row in table]
        found = report_labels([row["Findings_EN"] for row in rows])
        np.testing.assert_array_equal(found, [[int(row[c]) for c in CT_RATE_LABELS] for row in table])
        for row in rows:
            assert "SYNTHETIC" in row["ClinicalInformation_EN"]
            assert "SYNTHETIC" in row["Technique_EN"]
